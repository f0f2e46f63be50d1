"""The stack: M layers that serve N depths."""

import functools
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.adaptive_run import run_dense, run_packed
from fairseq_adaptive.modules.admin import AdminResidual
from fairseq_adaptive.modules.halting import HaltingRule
from fairseq_adaptive.modules.packed_attention import PackedCrossAttention, PackedSelfAttention, StepSelfAttention
from fairseq_adaptive.modules.skim_run import skim_dense, skim_packed
from fairseq_adaptive.modules.skimming import SkimRouter
from fairseq_adaptive.modules.trace import Trace


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
        halting: when a token stops. Then a pass over the stack has one step, which runs all depths
        router: which tokens go on before each depth, in place of ``halting``; the same holds

    Layers that have caches or residual scales of their own at every depth take the keyword arguments ``depth`` and
    ``residual``; for those pass ``pass_depth=True``.

    Attributes:
        packed: whether halted and skimmed tokens are left out of the computation, rather than masked; None: in
            evaluation without gradients they are
        every_depth: in training, where the halting rule weighs depths (PonderNet), return the states of all of them,
            one after the other in the batch
        recorder: a list that takes the trace of every run with halting or skimming, see
            :func:`~fairseq_adaptive.modules.trace.recording`
        num_updates: how many updates the model has had

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
        halting: Optional[HaltingRule] = None,
        router: Optional[SkimRouter] = None,
    ):
        super().__init__()
        if halting is not None and router is not None:
            raise UsageError("tokens can halt or be skimmed, not both: leave out the halting rule or the router")
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
        self.halting = halting
        self.router = router
        self.packed: Optional[bool] = None
        self.every_depth = False
        self.recorder: Optional[List[Trace]] = None
        self.num_updates = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, depth: int) -> nn.Module:
        return self._modules[str(self.schedule[depth])]

    def __iter__(self) -> Iterator:
        if self.halting is not None or self.router is not None:
            yield self
            return
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

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor] = None,
        protected: Optional[Tensor] = None,
        tape_len: int = 0,
    ) -> Tensor:
        """Run encoder layers until every token has halted or been skimmed, or all layers have run.

        Args:
            x: T x B x C
            encoder_padding_mask: B x T, true at padding, which has halted from the start
            protected: B x T, true at tokens that a router must not skim
            tape_len: how many states at the end are tape tokens, which halt and are skimmed as all others

        Returns:
            T x B x C
        """
        if self.router is not None:
            run = skim_packed if self._packed_now() else skim_dense
            return run(self, x, encoder_padding_mask, protected, tape_len)
        if self._packed_now():
            return run_packed(self, x, encoder_padding_mask, PackedSelfAttention, tape_len=tape_len)

        def call(layer, x, depth):
            return layer(x, encoder_padding_mask, depth=depth, residual=self.residual, tape_len=tape_len), None

        return run_dense(self, x, encoder_padding_mask, call, tape_len)[0]

    def _packed_now(self):
        return not (self.training or torch.is_grad_enabled()) if self.packed is None else self.packed

    def reset_rules(self):
        """Initialise halting rule and router again, for models whose initialisation goes over all that is linear."""
        for rule in (self.halting, self.router):
            if hasattr(rule, "reset_parameters"):
                rule.reset_parameters()

    def set_num_updates(self, num_updates: int):
        """fairseq says before each update how many there were; penalties that change over training read it."""
        self.num_updates = num_updates

    def record(self, trace: Trace, tape_len: int = 0):
        """Keep the trace of a run where someone wants it; its last ``tape_len`` places are those of the tape."""
        if self.recorder is None:
            return
        if tape_len:
            lengths = trace.tokens[:, -tape_len:].sum(1)
            for step in trace.steps:
                step.tape = lengths
        self.recorder.append(trace)

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


class DecoderStack(LayerStack):
    """:class:`LayerStack` of decoder layers."""

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict] = None,
        self_attn_mask: Optional[Tensor] = None,
        self_attn_padding_mask: Optional[Tensor] = None,
        need_attn: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor], None]:
        """Run decoder layers until every token has halted.

        Arguments and results are those of :class:`~fairseq_adaptive.modules.DecoderLayer`; the attention weights, H x B
        x T x S, are those of the last depth of every token.
        """
        where = (x, self_attn_padding_mask)
        need_weights = (need_attn or need_head_weights) and not self.training
        if incremental_state is None and not self._packed_now():

            def call(layer, x, depth):
                x, weights, _ = layer(
                    x,
                    encoder_out,
                    encoder_padding_mask,
                    self_attn_mask=self_attn_mask,
                    self_attn_padding_mask=self_attn_padding_mask,
                    need_head_weights=need_weights,
                    depth=depth,
                    residual=self.residual,
                )
                return x, weights if need_weights else None

            return (*run_dense(self, *where, call), None)
        if incremental_state is None:
            attention = functools.partial(PackedSelfAttention, causal=self_attn_mask is not None)
        else:
            attention = functools.partial(StepSelfAttention, incremental_state=incremental_state)
        cross = None
        if encoder_out is not None and self[0].encoder_attn is not None:
            size = (x.size(0), x.size(1))
            cross = PackedCrossAttention(encoder_out, encoder_padding_mask, incremental_state, need_weights, *size)
        x = run_packed(self, *where, attention, cross)
        return x, None if cross is None else cross.head_weights(), None
