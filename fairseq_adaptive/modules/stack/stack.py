"""The stack: M layers that serve N depths."""

import contextlib
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.depth_lora import add_depth_lora, at_depth
from fairseq_adaptive.modules.policies.base import Halting, Reader, Router
from fairseq_adaptive.modules.policies.pairing import check_pairing
from fairseq_adaptive.modules.stack.context import encoder_context
from fairseq_adaptive.modules.stack.contract import changed_layers, check_layer
from fairseq_adaptive.modules.stack.folding import fold
from fairseq_adaptive.modules.stack.layer_dropout import dropout_rates
from fairseq_adaptive.modules.stack.packed_context import ActiveContext, PackedContext
from fairseq_adaptive.modules.stack.reading import Reading, check_reader, joined
from fairseq_adaptive.modules.stack.run import run_dense, run_packed
from fairseq_adaptive.modules.stack.sequence import append, part
from fairseq_adaptive.modules.stack.trace import Trace, recorder
from fairseq_adaptive.modules.stack.visibility import Visibility
from fairseq_adaptive.modules.tracing import refuse_tracing


class LayerStack(Visibility, nn.Module):
    """Layers run at the depths of a schedule, under policies that say which tokens are computed there.

    Every layer is registered once, under its number, so that parameters, optimizer states and checkpoints hold M layers
    with the names that an unshared stack of M layers has (``0.fc1.weight`` ...). As a sequence the stack has N depths:
    ``len(stack)`` is N, ``stack[depth]`` is the layer that serves a depth, and iterating gives them in turn;
    ``stack.layer(number)`` is one of the M. A slice is a stack of some depths, and layers can be appended, see
    :mod:`~fairseq_adaptive.modules.stack.sequence`.

    The contract of a layer. It is called ``layer(x, encoder_padding_mask=, tape_len=)`` with states T x B x C and B x T,
    true at padding, and returns states, or a tuple that begins with them; with ``pass_depth`` it gets ``depth`` and
    ``residual``, too. Under policies, which is checked here:

    - it takes ``self_attention``, a decoder's layer ``cross_attention``, too: what its attention reads, ... x C, to what
      that adds. Where these are given, states come in any layout, ... x C, and nothing but they may mix tokens
    - it has ``attends``, the block that has keys and values: itself, one within it, or None. The block has ``before(x)``,
      what its attention reads of states, ``keys_and_values(read)``, and fairseq's attention as ``self_attn``
    - it may have ``step_kind``, its name in a trace
    - its class and that of its attention say that they are known (:func:`~fairseq_adaptive.modules.layers.known.known`); with
      others, a subclass among them, or hooks on attention, nothing is packed: attention is called, and hides by its mask

    Any other layer, which maps states and a padding mask to states, goes into a
    :class:`~fairseq_adaptive.modules.ForeignStack`.

    Args:
        layers: the M unique layers
        schedule: for each depth the number of the layer that serves it, see
            :func:`~fairseq_adaptive.modules.stack.schedule.layer_schedule`
        layerdrop: probability with which a depth is left out in a training step (Fan et al., 2020)
        residual: how the layers add a branch to their input (default: plain addition); one for all depths
        pass_depth: whether layers take ``depth`` and ``residual``; with policies they must
        halting: when a token is done
        router: which tokens are computed at each depth
        router_kv, halting_kv: what others read of a token that is left out, and of one that is done, see
            :mod:`~fairseq_adaptive.modules.policies.pairing`; None: the router's default, and ``recompute``
        halting_depths: after which depths the rule is asked, the last in any case; all depths since it was asked before
            are one layer to it (default: after each)
        lora_rank: r of what the maps of a layer differ by from depth to depth, 0: they are the same, see
            :func:`~fairseq_adaptive.modules.layers.depth_lora.add_depth_lora`; layers are then those of
            :mod:`~fairseq_adaptive.modules.layers.transformer_layer`
        layerdrop_by_depth, layerdrop_warmup_updates: how ``layerdrop`` changes with depth and time, see
            :func:`~fairseq_adaptive.modules.stack.layer_dropout.dropout_rates`

    Attributes:
        packed: whether tokens that are not computed are left out of the computation, rather than masked; None: in
            evaluation without gradients they are
        without_padding: dense runs, too, take the padding away
        every_depth: in training, where the halting rule weighs depths (PonderNet), return the states of all of them,
            one after the other in the batch
        num_updates: how many updates the model has had

    Raises:
        UsageError: (a ValueError) when the schedule names a layer that is not there, or leaves one unused; for policies
            and answers that make no sense together; and for a layer that breaks its contract
    """

    attention = "self_attn"  # its name in a block that attends
    resizable = True  # depths can be taken out and appended
    positioned = False  # runs can say where in its sentence a token is
    unmergeable = ""  # why no router can merge tokens here; empty: one can

    def __init__(
        self,
        layers: Iterable[nn.Module],
        schedule: Sequence[int],
        layerdrop: float = 0.0,
        residual=None,
        pass_depth: bool = False,
        halting: Optional[Halting] = None,
        router: Optional[Router] = None,
        router_kv: Optional[str] = None,
        halting_kv: Optional[str] = None,
        halting_depths: Optional[Iterable[int]] = None,
        lora_rank: int = 0,
        layerdrop_by_depth: str = "uniform",
        layerdrop_warmup_updates: int = 0,
    ):
        super().__init__()
        self.unique_layers = 0
        for layer in layers:
            self.add_module(str(self.unique_layers), layer)
            self.unique_layers += 1
        self._set_schedule(schedule)
        unused = set(range(self.unique_layers)) - set(self.schedule)
        if unused:
            raise UsageError(
                f"the schedule {' '.join(map(str, self.schedule))} never runs layer {min(unused)} of "
                f"{self.unique_layers}: use {self.unique_layers - len(unused)} unique layers or another strategy"
            )
        if max(self.schedule) >= self.unique_layers:
            raise UsageError(f"the schedule runs layer {max(self.schedule)}, but there are only {self.unique_layers}")
        for policy, flag in ((halting, "--halting"), (router, "--router")):
            if policy is not None and layerdrop:
                raise UsageError(f"{flag} decides how many layers run: leave out layerdrop")
        if halting is not None and halting.reads_position and not self.positioned:
            raise UsageError(
                f"--halting {halting.policy_name} with decay_over follows a sentence that grows word by word: it is for the "
                "decoders of shared_transformer and shared_transformer_lm, in translation with --decoder-halting"
            )
        if router is not None and router.merges and self.unmergeable:
            raise UsageError(f"--router {router.policy_name} merges tokens: {self.unmergeable}")
        self.router_kv, self.halting_kv = check_pairing(router, halting, router_kv, halting_kv, self.schedule)
        self.layerdrop = layerdrop
        self.layerdrop_by_depth, self.layerdrop_warmup_updates = layerdrop_by_depth, layerdrop_warmup_updates
        dropout_rates(layerdrop, len(self.schedule), layerdrop_by_depth)
        self.residual = residual
        self.pass_depth = pass_depth
        self.halting = halting
        depths = range(len(self.schedule)) if halting_depths is None else (*halting_depths, len(self.schedule) - 1)
        self.halting_depths = frozenset(depths)
        self.router = router
        self.packed: Optional[bool] = None
        self.without_padding = False
        self.every_depth = False
        self.num_updates = 0
        self.lora_rank = lora_rank
        add_depth_lora([self.layer(number) for number in range(self.unique_layers)], self.schedule, lora_rank)
        if self.adaptive:
            self.check_layers()

    def check_layers(self):
        """Refuse layers that cannot run under policies."""
        needs = ("self_attention", "depth", "residual") if self.pass_depth else ("self_attention",)
        for number in range(self.unique_layers):
            check_layer(self.layer(number), self.attention, needs)

    def check_reader(self, reader: Optional[Reader]):
        """Refuse a reader that never reads, or whose tokens would lack keys; models ask when they are built.

        Raises:
            UsageError: with what would be right
        """
        check_reader(self, reader)

    def _set_schedule(self, schedule: Sequence[int]):
        self.schedule = tuple(schedule)
        self._names = tuple(map(str, self.schedule))

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, depth: Union[int, slice]) -> nn.Module:
        if isinstance(depth, slice):
            return part(self, range(len(self))[depth])
        return self._modules[self._names[depth]]

    def append(self, layer: nn.Module) -> "LayerStack":
        """Let one more depth follow, see :func:`~fairseq_adaptive.modules.stack.sequence.append`; returns the stack."""
        return self.extend([layer])

    def extend(self, layers: Iterable[nn.Module]) -> "LayerStack":
        """:meth:`append`, of several."""
        append(self, layers)
        return self

    def __iter__(self) -> Iterator[nn.Module]:
        return map(self.__getitem__, range(len(self)))

    def layer(self, number: int) -> nn.Module:
        """One of the M layers."""
        return self._modules[str(number)]

    @property
    def changed(self) -> Optional[str]:
        """What makes layers or attention other than packed runs know them, in words, or None: these take the place of
        attention, and so do runs in which tokens are hidden.

        Raises:
            UsageError: where that leaves no way to give tokens the keys and values that they are to read
        """
        return changed_layers(self)

    @property
    def recorder(self) -> Optional[List[Trace]]:
        """The list that takes the traces of this call, see :func:`~fairseq_adaptive.modules.stack.trace.recording`."""
        return recorder(self)

    @property
    def profiling(self) -> bool:
        return self.training and self.residual is not None and not self.residual.profiled

    def finish_profiling(self):
        if self.profiling:
            self.residual.finish_profiling()

    def depths(self):
        """The depths of a run, without those that LayerDrop leaves out; drawn anew with each call."""
        if self.training and self.layerdrop > 0 and not self.profiling:
            changes = self.layerdrop_by_depth, self.layerdrop_warmup_updates, self.num_updates
            kept = (torch.rand(len(self)) > dropout_rates(self.layerdrop, len(self), *changes)).tolist()
            return [depth for depth, keep in enumerate(kept) if keep]
        return range(len(self))

    def running_at(self, depth: int):
        """While this is open, maps and norms are those of a depth."""
        return at_depth(depth) if self.lora_rank else contextlib.nullcontext()

    def call(self, depth: int, x: Tensor, **arguments):
        """Run the layer of a depth."""
        layer = self._modules[self._names[depth]]
        if self.pass_depth:
            return layer(x, depth=depth, residual=self.residual, **arguments)
        return layer(x, **arguments)

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor] = None,
        protected: Optional[Tensor] = None,
        tape_len: int = 0,
        reader: Optional[Reader] = None,
        bank: Optional[Tensor] = None,
        bank_padding_mask: Optional[Tensor] = None,
        states: Optional[List[Tensor]] = None,
    ):
        """Run encoder layers until no token is left to compute, or all layers have run.

        Args:
            x: T x B x C
            encoder_padding_mask: B x T, true at padding, which is never computed for and never seen
            protected: B x T, true at tokens that a router must not leave out; a reader's tokens are not
            tape_len: how many states at the end are tape tokens, which halt and are left out as all others
            reader: which tokens join, before its depth
            bank: N x C or B x N x C, what it reads (default: what the reader has)
            bank_padding_mask: B x N, true at entries that are none
            states: takes the states after each depth; then all tokens are computed

        Returns:
            T x B x C; with a reader (T + S) x B x C, the padding mask B x (T + S), and what was read

        Raises:
            UsageError: see :meth:`check_reader`
        """
        return self._run(
            x,
            encoder_padding_mask,
            protected,
            tape_len,
            reader,
            bank,
            bank_padding_mask,
            states,
            self._dense_context,
            self._packed_context,
        )

    def _dense_context(self, x, padding_mask, tape_len, read):
        return encoder_context(self, x, padding_mask, tape_len, read)

    def _packed_context(self, x, padding_mask, tape_len, reading):
        kind = PackedContext if self.sees_others else ActiveContext
        return kind(x, padding_mask, tape_len=tape_len, reading=reading, kv=self.kv)

    def _run(
        self,
        x,
        encoder_padding_mask,
        protected=None,
        tape_len=0,
        reader=None,
        bank=None,
        bank_padding_mask=None,
        states=None,
        dense=None,
        packed=None,
    ):
        """:meth:`forward`, in the contexts that ``dense`` and ``packed`` make."""
        if self.adaptive or reader is not None:
            refuse_tracing()
        reading = read = None
        if reader is not None:
            reading = Reading(reader, bank, bank_padding_mask)
            self.check_reader(reader)
            if not reader.depth:
                x, encoder_padding_mask, protected, read = joined(reading, x, encoder_padding_mask, protected)
                reading, tape_len = None, read.live.size(1)
        if self.adaptive and self._packed_now() and states is None and self.changed is None:
            context = packed(x, encoder_padding_mask, tape_len, reading)
            out = run_packed(self, context, protected)
        else:
            context = dense(x, encoder_padding_mask, tape_len, read if reading is None else None)
            context.reading = reading
            out = run_dense(self, context, protected, states)
        if reader is None:
            return out
        if read is None:
            read = context.read
            padding = torch.zeros_like(read.live[:, :1]).expand(-1, x.size(0))
            padding = padding if encoder_padding_mask is None else encoder_padding_mask.bool()
            encoder_padding_mask = torch.cat((padding, ~read.live), 1)
        elif self.recorder:
            self.recorder[-1].reading = read
        return out, encoder_padding_mask, read

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
        trace.tape_room = tape_len
        if tape_len:
            lengths = trace.tokens[:, -tape_len:].sum(1)
            for step in trace.steps:
                step.tape = lengths if step.tape is None else step.tape
        self.recorder.append(trace)

    def fold_state_dict(self, state_dict: Dict[str, Tensor], prefix: str):
        """:func:`~fairseq_adaptive.modules.stack.folding.fold` the weights of N layers to those of this stack."""
        fold(self, state_dict, prefix)

    def extra_repr(self) -> str:
        return f"schedule=({' '.join(map(str, self.schedule))})"
