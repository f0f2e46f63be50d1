import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fairseq_adaptive/__init__.py").read_text(encoding="utf-8"))[1]

# fairseq 0.12.2 itself cannot be imported on Python 3.11 and later. These are builds of the same code with that mended,
# under the same module name; each is there for some platforms only.
FAIRSEQ = [
    "ve-fairseq==0.12.3; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "fairseq-built==0.12.4; sys_platform == 'win32' and platform_machine == 'AMD64'",
    "fairseq-fixed==0.12.3.1; (sys_platform != 'linux' or platform_machine != 'x86_64')"
    " and (sys_platform != 'win32' or platform_machine != 'AMD64')",
]

setup(
    name="fairseq_adaptive",
    version=VERSION,
    description="Adaptive-compute and parameter-sharing Transformers as a plug-in for fairseq",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["fairseq_adaptive", "fairseq_adaptive.*"]),
    python_requires=">=3.11,<3.13",
    install_requires=[*FAIRSEQ, "torch", "sacrebleu", "sentencepiece"],
    extras_require={
        "test": ["hypothesis", "pytest", "pytest-xdist", "ruff", "triton; sys_platform == 'linux'"],
        "plots": ["matplotlib"],
        "cutoffs": ["scipy"],
        "images": ["pillow"],
        "hf": ["huggingface_hub", "safetensors", "tokenizers"],
        "export": ["ctranslate2"],
        "triton": ["triton; sys_platform == 'linux'"],
        "translation": ["polib", "sacremoses", "subword-nmt"],
    },
)
