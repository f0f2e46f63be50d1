"""The stack: M layers that serve N depths."""

import functools
from typing import Dict, Iterable, Iterator, Optional, Sequence

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.admin import AdminResidual


class LayerStack(nn.Module):
    """Layers run at the depths of a schedule.

    Every layer is registered once, under its number, so that parameters, optimizer states and checkpoints hold M layers
    with the names that an unshared stack of M layers has (``0.fc1.weight`` ...). As a sequence the stack has N depths:
    ``len(stack)`` is N, ``stack[depth]`` is the layer that serves a depth, and iterating gives, depth by depth, what to
    call there::

        for layer in stack:
            x = layer(x)

    Args:
        layers: the M unique layers
        schedule: for each depth the number of the layer that serves it, see
            :func:`~fairseq_adaptive.modules.sharing.layer_schedule`
        layerdrop: probability with which a depth is left out in a training step (Fan et al., 2020)
        residual: how the layers add a branch to their input (default: plain addition); one for all depths

    Layers that have caches or residual scales of their own at every depth take the keyword arguments ``depth`` and
    ``residual``; for those pass ``pass_depth=True``.

    Raises:
        UsageError: (a ValueError) when the schedule names a layer that is not there, or leaves one unused
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        schedule: Sequence[int],
        layerdrop: float = 0.0,
        residual: Optional[AdminResidual] = None,
        pass_depth: bool = False,
    ):
        super().__init__()
        self.unique_layers = 0
        for layer in layers:
            self.add_module(str(self.unique_layers), layer)
            self.unique_layers += 1
        self.schedule = tuple(schedule)
        unused = set(range(self.unique_layers)) - set(self.schedule)
        if unused:
            raise UsageError(
                f"the schedule {' '.join(map(str, self.schedule))} never runs layer {min(unused)} of "
                f"{self.unique_layers}: use {self.unique_layers - len(unused)} unique layers or another strategy"
            )
        if max(self.schedule) >= self.unique_layers:
            raise UsageError(f"the schedule runs layer {max(self.schedule)}, but there are only {self.unique_layers}")
        self.layerdrop = layerdrop
        self.residual = residual
        self.pass_depth = pass_depth

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, depth: int) -> nn.Module:
        return self._modules[str(self.schedule[depth])]

    def __iter__(self) -> Iterator:
        profiling = self.training and self.residual is not None and not self.residual.profiled
        if self.training and self.layerdrop > 0 and not profiling:
            kept = (torch.rand(len(self)) > self.layerdrop).tolist()
        else:
            kept = [True] * len(self)
        for depth in range(len(self)):
            if kept[depth]:
                layer = self[depth]
                if self.pass_depth:
                    layer = functools.partial(layer, depth=depth, residual=self.residual)
                yield layer
        if profiling:
            self.residual.finish_profiling()

    def fold_state_dict(self, state_dict: Dict[str, Tensor], prefix: str):
        """Make the weights of an unshared stack of N layers those of this stack, in place, where that loses nothing.

        Weights of M layers are left as they are.

        Args:
            state_dict: weights of a whole model
            prefix: name of the stack in it, ``encoder.layers.``

        Raises:
            UsageError: when the number of layers is neither M nor N, or N layers are there but those that this stack
                shares differ
        """
        by_layer: Dict[int, Dict[str, Tensor]] = {}
        for name, tensor in state_dict.items():
            number, _, rest = name[len(prefix) :].partition(".")
            if name.startswith(prefix) and number.isdigit():
                by_layer.setdefault(int(number), {})[rest] = tensor
        if len(by_layer) in (0, self.unique_layers):
            return
        ours = f"{self.unique_layers} unique layers at {len(self)} depths"
        if len(by_layer) != len(self):
            raise UsageError(f"{prefix[:-1]} has {len(by_layer)} layers in the checkpoint, this model has {ours}")
        for depth, index in enumerate(self.schedule):
            first = self.schedule.index(index)
            for rest, tensor in by_layer[depth].items():
                if not torch.equal(tensor, by_layer[first][rest]):
                    raise UsageError(
                        f"{prefix[:-1]} has {len(by_layer)} layers in the checkpoint and this model has {ours}, "
                        f"but layers {first} and {depth}, which it shares, differ: "
                        f"use {len(by_layer)} unique layers, or a checkpoint of {self.unique_layers} layers"
                    )
        for depth, weights in by_layer.items():
            for rest in weights:
                del state_dict[f"{prefix}{depth}.{rest}"]
        for index in range(self.unique_layers):
            for rest, tensor in by_layer[self.schedule.index(index)].items():
                state_dict[f"{prefix}{index}.{rest}"] = tensor

    def extra_repr(self) -> str:
        return f"schedule=({' '.join(map(str, self.schedule))})"
