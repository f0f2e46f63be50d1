"""What the policies of a stack are asked, and what they answer: routers, halting rules and readers.

The same code serves dense runs, where a decision is a mask, and packed runs, where only some tokens are there: a policy
works on tokens in any layout, ``...``, and keeps nothing but its parameters. What it wants to know at the next depth it
carries along, in tensors that begin with the shape of the tokens.
"""

import abc
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import is_plain
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS

Carry = Dict[str, Tensor]


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def where_token(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """... x C, ``x`` where ``mask`` (...) is true, else ``y``; in the precision of ``y``."""
    return torch.where(mask.unsqueeze(-1), x.to(y.dtype), y)


class Counts(NamedTuple):
    """What deciding is counted from.

    Attributes:
        asked: how many tokens were asked, or were read by a reader
        depths: at how many depths
        dim: C, their width
        depth: at which depth; of several, the first
        bank: how many entries a reader chose from
        lengths: B, how many of them each sequence had; None: they were one sequence
    """

    asked: float
    depths: int
    dim: int
    depth: int = 0
    bank: int = 0
    lengths: Optional[Tensor] = None


class Place(NamedTuple):
    """The stack that a policy is made for.

    Attributes:
        dim: C, width of the states
        depths: N
        scores: maps states, ... x C, to the logits of words, ... x V; None where the stack has none
        heads: of its attention
        schedule: N, the layer that serves each depth; empty: each depth has its own
    """

    dim: int
    depths: int
    scores: Optional[Callable] = None
    heads: int = 1
    schedule: Sequence[int] = ()


class Policy:
    """What routers, halting rules and readers have in common.

    Attributes:
        kind: ``router``, ``halting``, ``reader`` or ``search``
        policy_name: under which it is registered, and logged
        weight: of the price in a loss where none is given
        unsteered: why a controller cannot weigh it, and what to do instead; empty: it has a :meth:`lever`
        movable: whether it has thresholds that a controller moves: it has ``move(by)``, up to compute more, and
            ``decided(trace, by)``, what it would decide
    """

    kind, policy_name, weight, unsteered, movable = "", "", 1.0, "", False

    @property
    def priced(self) -> bool:
        """Whether it has a price."""
        return type(self).price is not Policy.price

    def price(self, trace) -> Tensor:
        """What a run costs, a scalar with a gradient: the mean over its tokens; a loss weighs and adds it.

        Further arguments are options that ``--prices`` of ``adaptive_compute_loss`` may give.
        """
        return torch.zeros((), device=trace.tokens.device)

    def lever(self, trace) -> Optional[Tensor]:
        """What a controller weighs in place of the price, so that the model spends less, or more where the weight is
        below 0: a scalar with a gradient; None: the policy cannot be steered."""
        return self.price(trace)

    def measures(self, trace) -> Dict[str, Tuple]:
        """What is logged of a run: names, the same in all runs, and of each a sum and what it is divided by."""
        return {}

    def decided(self, trace) -> List[Tensor]:
        """For each depth that ran, B x T, true where evaluation would compute the token; of a training step, too."""
        return [step.alive for step in trace.steps]

    def macs(self, counts: Counts) -> float:
        """How many multiply-accumulates deciding took."""
        return 0.0

    def turn(self, position: float, causal: bool = False) -> Dict[str, object]:
        """Compute more or less after a training.

        Args:
            position: from the least that the policy can compute, 0, to the most, 1
            causal: in a decoder, where a choice does not depend on later tokens

        Returns:
            the flags that say so, by their names without a side, for what is no weight; of ``..._args`` a dict

        Raises:
            UsageError: where nothing can be turned after a training, with what to do instead
        """
        raise UsageError(
            f"{self.policy_name} has no threshold to turn after a training"
            + (f", {self.unsteered}" if self.unsteered else ": train it for what it is to compute")
        )


class Merged(NamedTuple):
    """Tokens that a router has put together; one of them stands for all.

    Attributes:
        state: ... x C, what the depth reads
        size: ..., for how many tokens each stands, in floating point: attention adds the logarithm to the scores of its key
        into: ..., of a token that another stands for from now on the number of that one among these tokens, flattened; of
            others their own. Who is merged away is left out (``run`` is 0), and has the state of that one in the end
    """

    state: Tensor
    size: Tensor
    into: Tensor


class Choice(NamedTuple):
    """What a router says before a depth.

    Attributes:
        run: ..., 1 where the token is to be computed and 0 where it is left out, with a gradient where there is one
        probability: ..., what it was drawn from, or the score
        carry: what the router wants back at the next depth, and in :meth:`Router.combine`; None: what it had
        score: ..., the logit that a price is made of; None: there is none
        merged: what tokens were put together, of a router that ``merges``; None: none has been so far
    """

    run: Tensor
    probability: Tensor
    carry: Optional[Carry] = None
    score: Optional[Tensor] = None
    merged: Optional[Merged] = None


class Router(Policy, abc.ABC):
    """Says before each depth who is computed there.

    Attributes:
        monotone: who is left out once is not asked again
        weighs: :meth:`combine` does more than to take the state after the layer where the token was computed
        default_kv: what others see of a token that is left out, where ``--router-kv`` says nothing
        computes_all_first: all tokens are computed at the first repeat of every layer that runs again
        merges: its choices have ``merged``; it must be monotone, and nobody sees who is left out
    """

    kind = "router"
    monotone, weighs, default_kv, computes_all_first, merges = True, False, "active", False, False

    def start(self, x: Tensor) -> Carry:
        """Return what to carry into the first depth; ``x`` is ... x C, the states before it."""
        return {}

    @abc.abstractmethod
    def choose(
        self,
        depth: int,
        x: Tensor,
        carry: Carry,
        asked: Tensor,
        sentence: Tensor,
        protected: Optional[Tensor],
        causal: bool,
    ) -> Choice:
        """Say who is computed.

        Args:
            depth: before which depth
            x: ... x C, states
            carry: from :meth:`start` or the choice before
            asked: ..., true at tokens that may be chosen; what is said of others is not read
            sentence: ..., the number of the sequence that each token belongs to
            protected: ..., true at tokens that must not be left out; None: there are none
            causal: a choice must not depend on later tokens of the sequence (on other sequences it never may)
        """

    def combine(self, before: Tensor, after: Tensor, choice: Choice) -> Tensor:
        """... x C, what is made of the states before and after the layer; ``choice.carry`` is that of these tokens."""
        gate = choice.run.unsqueeze(-1).to(before)
        return after * gate + before * (1 - gate)

    def measures(self, trace):
        """The share of tokens that are computed: ``kept``, over all depths, and that of each depth."""
        kept, there = [step.kept.detach().sum() for step in trace.steps], trace.counts()
        kept += [torch.zeros_like(there[-1])] * (trace.limit - len(kept))  # where no token is left no depth runs
        each = {f"kept_{depth}": pair for depth, pair in enumerate(zip(kept, there), start=1)}
        return {"kept": (sum(kept), sum(there)), **each}


class Verdict(NamedTuple):
    """What a halting rule says after a depth.

    Attributes:
        state: ... x C, what the next depth reads; that of halted tokens does not change
        carry: what the rule wants back after the next depth
        running: ..., true where the token goes on
        probability: ..., halting probability; ACT's is 0 where the token was not running
    """

    state: Tensor
    carry: Carry
    running: Tensor
    probability: Tensor


class Halting(Policy, nn.Module, abc.ABC):
    """Says after each depth who is done.

    Sums and probabilities are float32 (float64 in a float64 model) whatever the precision of the states.

    Attributes:
        weighs_depths: whether, at present, nothing halts and the probabilities of all depths weigh their states
        compares_states: the rule reads how far a layer moved the state
        halts_in_training: tokens halt in training as in evaluation
        reads_position: it wants ``position`` in its carry, ..., how many tokens of the sentence come before each; of decoders
        no_quantile: what a rule without a distribution over depths has in its place, for :meth:`exit_at`
    """

    kind = "halting"
    weighs_depths, compares_states, halts_in_training, reads_position, no_quantile = False, False, False, False, ""

    def start(self, x: Tensor) -> Carry:
        """Return what to carry into the first depth; ``x`` is ... x C, the states before it."""
        return {}

    @abc.abstractmethod
    def step(self, before: Tensor, after: Tensor, carry: Carry, running: Tensor, last: bool) -> Verdict:
        """Decide after one depth.

        Args:
            before, after: ... x C, states at the input and at the output of the layer
            carry: from :meth:`start` or the step before
            running: ..., true at tokens that were computed; what the layer made of others is to be ignored
            last: whether this is the last depth
        """

    def exit_at(self, quantile: float) -> None:
        """Let tokens exit, in evaluation, where the probability to have halted reaches ``quantile``, in (0, 1].

        Raises:
            UsageError: where the rule has no distribution over depths
        """
        raise UsageError(
            f"--exit-quantile {quantile} is for rules with a distribution over depths (act, ut_act, pondernet, loop_gate, "
            f"stick_breaking), which --halting {self.policy_name} has not{self.no_quantile and ': '}{self.no_quantile}"
        )

    def output(self, state: Tensor, carry: Carry, finished: Optional[Tensor] = None) -> Tensor:
        """Return the result of the run, ... x C.

        Args:
            state: ... x C, the last states
            carry: from the last step
            finished: ..., false where a router left the token out before the rule had done with it: what the rule has
                yet to give is the last state's; None: true everywhere
        """
        return state

    def at_limit(self, trace) -> Tensor:
        """How many tokens the rule had not done with after the last depth, a scalar."""
        return trace.at_limit()

    def measures(self, trace):
        """Updates of a token, remainder, the share at the limit, and the share that took 1, 2 ... updates."""
        tokens = trace.tokens.sum()
        remainders = 0.0 if trace.remainders is None else (trace.remainders.detach() * trace.tokens).sum()
        found = {"depth": trace.updates.sum(), "remainder": remainders, "at_limit": self.at_limit(trace)}
        found.update((f"depth_{depth}", share) for depth, share in enumerate(trace.histogram(), start=1))
        return {name: (value, tokens) for name, value in found.items()}


class LearnedHalting(Halting):
    """A rule with a halting unit: one linear layer and a sigmoid."""

    def __init__(self, dim: int, bias: float = 0.0):
        super().__init__()
        self.unit, self.bias = nn.Linear(dim, 1), bias
        self.reset_parameters()

    def reset_parameters(self):
        """For models that initialise all that is linear in their own way, after they have."""
        nn.init.normal_(self.unit.weight, std=0.02)
        nn.init.constant_(self.unit.bias, self.bias)

    def probability(self, state: Tensor) -> Tensor:
        """... x C -> ..., in float32 also where the model is in half precision."""
        if not is_plain(self.unit, LINEARS):
            return upcast(self.unit(state).squeeze(-1)).sigmoid()
        with torch.autocast(state.device.type, enabled=False):
            state = upcast(state)
            weight, bias = self.unit.weight.to(state.dtype), self.unit.bias.to(state.dtype)
            return F.linear(state, weight, bias).squeeze(-1).sigmoid()

    def macs(self, counts):
        return counts.asked * counts.dim


class Reader(Policy, nn.Module, abc.ABC):
    """Says which tokens join a sequence, once in a run.

    Attributes:
        depth: before which depth it reads
        room: how many tokens it adds at most
    """

    kind = "reader"
    depth, room = 0, 0

    def measures(self, trace):
        """How many tokens joined a sequence."""
        return {"length": (trace.tape_len.sum(), len(trace.tokens))}

    @abc.abstractmethod
    def read(self, x: Tensor, padding_mask: Tensor, bank: Tensor, bank_padding_mask: Optional[Tensor] = None):
        """Read.

        Args:
            x: T x B x C, states
            padding_mask: B x T, true at padding
            bank: N x C or B x N x C, what there is to read
            bank_padding_mask: B x N, true at entries that are none

        Returns:
            has ``appended``, B x S x C, 0 where a sequence gets fewer; and ``live``, B x S, true at those that it gets
        """


def check_threshold(threshold: float, what: str = "a halting threshold") -> float:
    """Return ``threshold``.

    Args:
        what: it is, for the message

    Raises:
        UsageError: when it is not in (0, 1]
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"{what} of {threshold} is impossible: it must be above 0 and at most 1")
    return float(threshold)
