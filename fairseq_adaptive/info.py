"""``python -m fairseq_adaptive.info``: what is installed, what runs where, and why.

Exit status 1 where fairseq cannot be imported, else 0.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sys
import textwrap

import torch

import fairseq_adaptive.plugin  # noqa: F401  else no patch is in force and no model registered
from fairseq_adaptive import compat, ops
from fairseq_adaptive.compat import precision
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops import matmul, probe

PACKAGES = (
    "numpy",
    "omegaconf",
    "hydra-core",
    "sacrebleu",
    "sentencepiece",
    "subword-nmt",
    "sacremoses",
    "ctranslate2",
    "transformers",
    "triton",
)


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _installed(module):
    return importlib.util.find_spec(module) is not None


def _torchaudio():
    if not _installed("torchaudio"):
        return "not installed; only fairseq's speech tasks need it"
    try:
        importlib.import_module("torchaudio")
    except Exception as error:  # an OSError where it is built for another torch
        return (
            f"{_version('torchaudio')}  (cannot be imported, and so neither can transformers and peft: {error}; "
            "pip uninstall torchaudio)"
        )
    return _version("torchaudio")


def versions():
    """Rows (name, text) of what is installed; every distribution that supplies the module fairseq is named."""
    suppliers = sorted(set(importlib.metadata.packages_distributions().get("fairseq", [])))
    fairseq = ", ".join(f"{supplier} {_version(supplier)}" for supplier in suppliers) or "not installed"
    if len(suppliers) > 1:
        fairseq += "  (they overwrite each other's files: keep one)"
    if compat.fairseq_error is not None:
        error = compat.fairseq_error
        fairseq += f"  (cannot be imported: {type(error).__name__}: {error})"
    return [
        ("fairseq_adaptive", fairseq_adaptive.__version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        ("fairseq", fairseq),
        ("torchaudio", _torchaudio()),
        *((package, _version(package)) for package in PACKAGES),
    ]


def devices():
    """Rows (name, text): every CUDA device, and the CPU."""
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{device.name}, capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB",
            )
        )
    if not rows:
        rows.append(("cuda", "no device" if torch.version.cuda else "no device (this torch is built without CUDA)"))
    instructions = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    bf16 = f"bf16 native ({', '.join(instructions)})" if instructions else "bf16 emulated"
    return [
        *rows,
        (
            "cpu",
            f"{torch.get_num_threads()} threads of {os.cpu_count()}, {torch.backends.cpu.get_cpu_capability()}, {bf16}",
        ),
    ]


def _apex():
    if not _installed("fused_layer_norm_cuda"):  # see ops.registry.EXTENSIONS
        return "unavailable: NVIDIA apex with its extension fused_layer_norm_cuda is not installed"
    if not torch.cuda.is_available():
        return "unavailable: fused_layer_norm_cuda is installed, but there is no CUDA device"
    if not (compat.fairseq_error is None and importlib.import_module("fairseq.modules.layer_norm").has_fused_layernorm):
        return "unavailable: fused_layer_norm_cuda is installed, but fairseq cannot import apex.normalization"
    return "active: fairseq uses apex's fused layer norm on CUDA devices"


def _choices(operation):
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        try:
            yield "{}: {} ({})".format(device, *operation.choose(device, torch.float32))
        except UsageError as error:
            yield f"{device}: error: {error}"


def operations():
    """Rows (name, text): which implementation of each fused operation runs where, and why not another."""
    return [(name, "; ".join(_choices(operation))) for name, operation in sorted(ops.OPS.items())]


def _followed(rows, weights, figures):
    """Whose float32 products run at a size, for weights that change and for those that do not."""
    if rows * weights < matmul.LEAST:
        return "fp32 runs on torch: small"
    asked = probe.requested()
    changing, constant = (
        "torch" if asked == "torch" else kinds[0] if asked == "onednn" else figures.faster(rows, weights, kinds)
        for kinds in (probe.KINDS[1:], probe.KINDS)
    )
    return f"fp32 runs on {changing}" + (f", and {constant} where weights are constant" if constant != changing else "")


def products():
    """Rows (name, text): GFLOP/s of products on the CPU by size and kind, and what follows; measured where not known."""
    try:
        asked, gains = probe.requested(), precision.bf16_gains()
    except UsageError as error:
        return [("products", f"error: {error}")]
    threads = torch.get_num_threads()
    figures = probe.figures(threads)
    rows = [("measured", f"with {threads} threads, kept in {figures.place or 'no file: it cannot be written'}")]
    for number, (count, outer, inner) in enumerate(probe.SIZES):
        speeds = (
            f"{dtype} " + ", ".join(f"{kind} {figures.speeds[f'{dtype} {kind}'][number]:g}" for kind in probe.KINDS)
            for dtype in probe.DTYPES
        )
        text = "; ".join((*speeds, _followed(count, outer * inner, figures)))
        rows.append((f"{count}x{inner}x{outer}", text))
    half, single = figures.training("bf16"), figures.training("fp32")
    follows = "bf16 autocast" if gains else "fp32, since bf16 gains nothing"
    return [
        *rows,
        (probe.VARIABLE, asked),
        ("--bf16", f"trains in {follows}; products in training: bf16 {half:.0f}, fp32 {single:.0f} GFLOP/s"),
    ]


def patches():
    """Rows (name, text): what :mod:`fairseq_adaptive.compat` has patched."""
    applied = [patch for patch in compat.PATCHES if patch.__name__ in compat.applied]
    return [(patch.__name__, inspect.getdoc(patch).splitlines()[0]) for patch in applied]


def architectures():
    """Rows (model, its architectures) that this package registers with fairseq."""
    from fairseq.models import ARCH_MODEL_INV_REGISTRY, MODEL_REGISTRY

    ours = [name for name, model in MODEL_REGISTRY.items() if model.__module__.startswith("fairseq_adaptive.")]
    return [(name, " ".join(sorted(ARCH_MODEL_INV_REGISTRY.get(name, [])))) for name in sorted(ours)]


def main():
    sections = [("versions", versions()), ("devices", devices()), ("kernels", [*operations(), ("layer_norm", _apex())])]
    sections.append(("products on the CPU: rows x inputs x outputs, GFLOP/s", products()))
    if compat.fairseq_error is None:
        sections += [("patches of fairseq, torch and NumPy", patches()), ("models and architectures", architectures())]
    width = max(len(name) for _, rows in sections for name, _ in rows)
    for title, rows in sections:
        print(title)
        for name, text in rows:
            print(
                textwrap.fill(
                    text,
                    120,
                    initial_indent=f"  {name:<{width}}  ",
                    subsequent_indent=" " * (width + 4),
                    break_on_hyphens=False,
                )
            )
        print()
    if compat.fairseq_error is not None:
        print(
            "error: fairseq cannot be imported; install ve-fairseq (Linux x86-64) or fairseq-fixed (elsewhere)",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
