"""The package is described in pyproject.toml; this copies the examples into a wheel, for ``fairseq-adaptive recipe``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.py[cod]", "setup.sh", "test.sh")  # these two are for a clone


class BuildWithExamples(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ("examples", "scripts"):
                target = Path(self.build_lib, "fairseq_adaptive", "recipes", name)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(name, target, ignore=LEFT_OUT)


setup(cmdclass={"build_py": BuildWithExamples})
