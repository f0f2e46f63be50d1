"""Weights laid out for the C file: matrices in panels, heads and widths rounded up to whole vectors."""

import ctypes
from ctypes import POINTER, byref, c_int32
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops import native
from fairseq_adaptive.ops.decoder_step import naive
from fairseq_adaptive.ops.decoder_step.structures import MAPS, Layer, Map, Norm, Stack
from fairseq_adaptive.ops.int8_linear.naive import round_weight


def round_up(size, unit):
    return -(-size // unit) * unit


def padded(tensor, *amounts):
    """``F.pad``, which copies also where there is nothing to add."""
    return F.pad(tensor, amounts) if any(amounts) else tensor


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


class Packing:
    """Lays weights out; keeps the tensors to which structures point."""

    def __init__(self, built):
        self.library, self.lanes, self.panel = built, built.lanes(), built.panel_width()
        self.kept: List = []

    def keep(self, tensor, *sizes):
        """A contiguous copy, zero behind its end up to some sizes of the last dimensions."""
        pad = [amount for have, want in zip(reversed(tensor.shape), reversed(sizes)) for amount in (0, want - have)]
        self.kept.append(F.pad(tensor.detach(), pad).clone(memory_format=torch.contiguous_format))
        return self.kept[-1]

    def map(self, weight, bias, unit=None, fill=0.0):
        """O x I, where both are what is read and written, to a structure; ``unit``: O is rounded up to it."""
        outer, inner = weight.shape
        width = round_up(outer, unit or self.lanes)
        weight = weight.detach().contiguous()
        panels, written = (self.library.packed_size(size, inner) for size in (width, outer))
        panels = weight.new_empty(panels)
        panels[written:] = 0
        self.library.pack(weight.data_ptr(), outer, inner, panels.data_ptr())
        biases = weight.new_full((round_up(width, self.panel),), fill)
        biases[:outer] = 0 if bias is None else bias.detach()
        self.kept += [panels, biases]
        return Map(panels=panels.data_ptr(), bias=biases.data_ptr(), inner=inner, outer=width)

    def small_map(self, weight, bias, unit=None, fill=0.0):
        """The same with a product of int8, whose rows are rounded as they are: I is whole vectors."""
        outer, inner = weight.shape
        width = round_up(outer, unit or self.lanes)
        more, depth = round_up(width, self.panel) - outer, self.library.small_depth()
        v, scale = round_weight(weight.detach())
        panels = padded(v, 0, 0, 0, more).view(-1, self.panel, inner // depth, depth).transpose(1, 2).contiguous()
        biases = scale.new_full((outer + more,), fill)
        biases[:outer] = 0 if bias is None else bias.detach()
        self.kept += [panels, biases]
        scale, sums = (self.keep(each, outer + more).data_ptr() for each in (scale, scale * v.sum(1)))
        bias, small = biases.data_ptr(), panels.data_ptr()
        return Map(bias=bias, small=small, scale=scale, sums=sums, inner=inner, outer=width)

    def small_obstacle(self, *sizes: int) -> Optional[str]:
        """Why there are no such maps, in words, or None.

        Args:
            sizes: of heads and states
        """
        odd = next((size for size in sizes if size % self.lanes), None)
        if odd is not None:
            return f"{odd} is no multiple of {self.lanes}"
        return None if max(sizes, default=0) <= self.library.small_widest() else f"{max(sizes)} is too wide for int8"

    def norm(self, norm):
        if norm is None:
            return Norm(None, None, 0)
        width = round_up(len(norm.gain), self.lanes)
        return Norm(self.keep(norm.gain, width).data_ptr(), self.keep(norm.bias, width).data_ptr(), norm.eps)

    def heads(self, each: naive.Map, parts, heads):
        """A map to heads, which are padded one by one."""
        if type(each) is naive.Int8Map:
            return self.small_map(*each)
        weight = each.weight.unflatten(0, (parts * heads, -1))
        head = round_up(weight.size(1), self.lanes)
        weight = padded(weight, 0, -weight.size(2) % self.lanes, 0, head - weight.size(1))
        bias = each.bias
        if bias is not None:
            bias = bias.unflatten(0, (parts * heads, -1))
            bias = padded(bias, 0, head - bias.size(1)).flatten()
        return self.map(weight.flatten(0, 1), bias)

    def merge(self, each: naive.Map, heads):
        """A map of heads."""
        if type(each) is naive.Int8Map:
            return self.small_map(*each)
        weight = each.weight.unflatten(1, (heads, -1))
        weight = padded(weight, 0, -weight.size(2) % self.lanes)
        return self.map(weight.flatten(1), each.bias)

    def plain(self, each: naive.Map):
        if type(each) is naive.Int8Map:
            return self.small_map(*each)
        return self.map(padded(each.weight, 0, -each.weight.size(1) % self.lanes), each.bias)

    def layer(self, layer: naive.Layer, heads):
        maps = {"qkv": self.heads(layer.qkv, 3, heads), "merge": self.merge(layer.merge, heads)}
        maps.update(up=self.plain(layer.up), down=self.plain(layer.down))
        if layer.source is not None:
            maps.update(query=self.heads(layer.query, 1, heads), source=self.heads(layer.source, 2, heads))
            maps["merge_source"] = self.merge(layer.merge_source, heads)
        return Layer((Norm * 3)(*map(self.norm, layer.norms)), *(maps.get(name, Map()) for name in MAPS))

    def stack(self, stack: naive.Stack):
        layers = (Layer * len(stack.layers))(*(self.layer(each, stack.heads) for each in stack.layers))
        schedule = (c_int32 * len(stack.schedule))(*stack.schedule)
        self.kept += [layers, schedule]
        first = stack.layers[0]
        real, head = first.merge.weight.size(0), first.merge.weight.size(1) // stack.heads
        width, cross = round_up(real, self.lanes), first.source is not None
        return Stack(
            real=real,
            width=width,
            heads=stack.heads,
            head=round_up(head, self.lanes),
            hidden=round_up(first.up.weight.size(0), self.lanes),
            depths=len(schedule),
            sublayers=3 if cross else 2,
            pre_norm=stack.pre_norm,
            gelu=stack.activation == "gelu",
            cross=cross,
            scale=head**-0.5,
            schedule=ctypes.addressof(schedule),
            layers=ctypes.cast(layers, POINTER(Layer)),
            omega=None if stack.omega is None else self.keep(stack.omega, width).data_ptr(),
            last=self.norm(stack.last),
        )


def linear(packing: Packing, each: naive.Map, x: Tensor) -> Tensor:
    """N x I by a map, where I and O are whole vectors: the product that all else is made of."""
    y = x.new_empty(len(x), len(each.weight))
    packing.library.linear(byref(packing.plain(each)), x.data_ptr(), len(x), y.data_ptr())
    return y


def check(built):
    """See that a library computes what it should.

    Raises:
        native.Unavailable: when it does not
    """
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((13, 64), (80, 64), (80,)))
    weight[0], weight[1], x[0], x[0, 0] = 1.0, -1.0, 1.0, 0.0  # the largest sums of int8
    for kind, what in ((naive.Map, ""), (naive.Int8Map, " of int8")):
        each = kind(weight, bias)
        if not torch.allclose(linear(Packing(built), each, x), each(x), rtol=1e-4, atol=1e-4):
            raise native.Unavailable(f"its test product{what} is wrong")
