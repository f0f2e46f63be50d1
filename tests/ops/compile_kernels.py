"""Compile every Triton kernel for a GPU that need not be here, with the arguments that the launchers give.

Run without TRITON_INTERPRET. The launchers run on the CPU; a call of a kernel compiles it, and computes nothing. Prints
a line for each kernel and each set of types.
"""

import functools

import torch
import triton
from kernel_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fairseq_adaptive.ops import registry

CAPABILITY, DTYPE = 90, torch.bfloat16
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages")
compiled = set()


def signature_of(value):
    return TYPES[value.dtype] if torch.is_tensor(value) else "fp32" if isinstance(value, float) else "i32"


def compile_kernel(op, kernel, *args, **kwargs):
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    names = kernel.arg_names
    given = {**dict(zip(names, args)), **kwargs}
    constants = {
        parameter.name: given[parameter.name]
        for parameter in kernel.params
        if parameter.is_constexpr or given[parameter.name] is None
    }
    signature = {name: "constexpr" if name in constants else signature_of(given[name]) for name in names}
    line = f"{op} {kernel.__name__} {list(signature.values())} {list(constants.values())}"
    if line not in compiled:
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        assert triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options).asm["cubin"]
        print(line, flush=True)
        compiled.add(line)


def main():
    registry.Op.choose = lambda op, device, dtype: ("triton", "here launchers run on any device")
    for name, (make, _, _, smallest) in CASES.items():
        triton.JITFunction.__getitem__ = lambda kernel, grid, op=name: functools.partial(compile_kernel, op, kernel)
        for shape in smallest:
            case = make(DTYPE, *shape)
            leaves = {key: leaf.requires_grad_() for key, leaf in case.leaves.items()}
            outputs = case.fused(**leaves, **case.others)
            outputs = [each for each in outputs if each is not None and each.requires_grad]
            if leaves:
                torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(each) for each in outputs])


if __name__ == "__main__":
    main()
