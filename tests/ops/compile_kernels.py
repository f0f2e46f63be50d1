"""Compile every Triton kernel for GPUs that need not be here, with the arguments that the launchers give.

Run without TRITON_INTERPRET. The launchers run on the CPU; a recorder stands in for each kernel, and computes nothing.
Prints a line for each kernel and each set of types.
"""

import importlib
import itertools

import torch
import triton
from kernel_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fairseq_adaptive.ops import OPS, registry

CAPABILITIES = {torch.float32: 80, torch.bfloat16: 90}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
         torch.int64: "*i64", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Takes the place of a kernel, and compiles it for what it is called with."""

    capability = None

    def __init__(self, op, kernel):
        self.op, self.kernel, self.seen = op, kernel, set()

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = self.kernel.arg_names
        given = {**dict(zip(names, args)), **kwargs}
        constants = {name: value for name, value in given.items() if name in kwargs or value is None}
        signature = {name: "constexpr" if name in constants else self.type(given[name]) for name in names}
        line = f"{self.op} {self.kernel.__name__} {list(signature.values())} {list(constants.values())}"
        if line in self.seen:
            return
        self.seen.add(line)
        source = ASTSource(self.kernel, signature, {(names.index(name),): value for name, value in constants.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert compiled.asm["cubin"]
        print(line, flush=True)

    @staticmethod
    def type(value):
        return TYPES[value.dtype] if torch.is_tensor(value) else "fp32" if isinstance(value, float) else "i32"


def main():
    registry.Op.choose = lambda op, device, dtype: ("triton", "here launchers run on any device")
    for name, (make, _, on_cpu, _) in CASES.items():
        module = importlib.import_module(OPS[name].backends["triton"].partition(":")[0])
        for attribute, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and attribute.endswith("_kernel"):
                setattr(module, attribute, Recorder(name, value))
        for (dtype, Recorder.capability), (rows, *shape) in itertools.product(CAPABILITIES.items(), on_cpu):
            case = make(dtype, min(rows, 8), *shape)
            leaves = {key: leaf.requires_grad_() for key, leaf in case.leaves.items()}
            outputs = case.fused(**leaves, **case.others)
            outputs = [each for each in outputs if each is not None and each.requires_grad]
            torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(each) for each in outputs])


if __name__ == "__main__":
    main()
