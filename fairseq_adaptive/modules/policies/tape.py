"""The tape: tokens that a sequence reads from a bank, as many as it needs.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023), section 3.
"""

import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.policies.base import Reader, upcast
from fairseq_adaptive.modules.policies.registry import register_policy
from fairseq_adaptive.modules.policies.shift import Shifted

COSTS = ("entropy", "max")
QUERIES = ("mean", "first")
QUERY_UPDATES = ("average", "replace")


class Reading(NamedTuple):
    """What was read: S is the longest tape of the batch, K the entries mixed into one token."""

    tokens: Tensor  # B x S x C, 0 where the tape of a row is shorter
    live: Tensor  # B x S, true where the tape of a row has a token
    cost: Tensor  # B, ponder cost
    entries: Tensor  # B x S x K, places in the bank; -1 where nothing was read
    weights: Tensor  # B x S x K, the share of each entry in its token
    appended: Optional[Tensor] = (
        None  # B x S x C, what joins the sequence: the tokens, through an MLP where there is one
    )
    size: int = 0  # N, entries of the bank
    shared: bool = False  # one bank for all sequences

    def used(self) -> Tuple[Tensor, int]:
        """How many entries of the bank were read, once a batch where it is shared, and of how many."""
        rows = self.entries.flatten(1)  # B x (S K)
        read = torch.zeros(len(rows), self.size + 1, dtype=torch.bool, device=rows.device)
        read = read.scatter(1, rows.where(rows >= 0, self.size), True)[:, : self.size]
        read = read.any(0) if self.shared else read
        return read.sum(), read.numel()


class LearnedBank(nn.Module):
    """Entries that are parameters, the same for all sequences (section 3.1).

    Args:
        size: N, entries (the paper has 10,000)
        embed_dim: C

    Raises:
        UsageError: for a bank without entries
    """

    def __init__(self, size: int, embed_dim: int):
        super().__init__()
        if size < 1:
            raise UsageError(f"a learned bank has 1 entry or more, not {size}")
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(size, embed_dim), std=0.02, a=-0.04, b=0.04))

    def forward(self) -> Tensor:
        """Returns: N x C"""
        return self.weight


class InputBank(nn.Module):
    """Entries made from the input, of every sequence its own (section 3.1).

    Args:
        input_dim: width of what an entry is made of
        embed_dim: C
        positions: how many entries have a position of their own, which is added before the projection; 0: entries are
            a set, and those made of the same input are the same
    """

    def __init__(self, input_dim: int, embed_dim: int, positions: int = 0):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(positions, input_dim) * 0.02) if positions else None
        self.projection = nn.Linear(input_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: B x N x input_dim

        Returns:
            B x N x C

        Raises:
            UsageError: when there are not as many entries as positions
        """
        if self.positions is not None:
            if x.size(1) != len(self.positions):
                raise UsageError(
                    f"the input makes {x.size(1)} bank entries, the bank has {len(self.positions)} positions"
                )
            x = x + self.positions
        return self.projection(x)


@known
class GatedMLP(nn.Module):
    """Feed-forward with a gated linear unit, for tape tokens (section 3.3).

    Args:
        embed_dim: C
        ffn_embed_dim: width behind the gate
        dropout: after the gate and after the output
    """

    def __init__(self, embed_dim: int, ffn_embed_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 2 * ffn_embed_dim)
        self.fc2 = nn.Linear(ffn_embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def macs(self) -> int:
        """Multiply-adds of a token."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """... x C -> ... x C"""
        return self.dropout(self.fc2(self.dropout(F.glu(self.fc1(x)))))


class TapeReader(Shifted, nn.Module):
    """Adaptive tape reading (section 3.2, algorithm 1).

    A step mixes the K unread entries that are nearest to the query into one token, by the softmax of their scores, and
    the largest weight p is a measure of certainty. A row goes on until the sum of its p reaches the threshold, its tape
    is full, or its bank is read to the end; the whole batch stops with the last row.

    Args:
        embed_dim: C
        num_tokens: the longest tape
        threshold: where the sum of p ends the reading; K = num_tokens // threshold, so that a row that is never certain
            reads a full tape, and a certain one as many tokens as the threshold
        key_dim: the first dimensions, which are compared with the query (default: all)
        cost: what a step adds to the ponder cost: ``entropy`` is 1 - sum of w^2, ``max`` is 1 - max w
        query_update: the query of the next step: ``average`` of query and what was read, or ``replace`` by that
        allow_exhausted: let rows stop where their bank is read to the end; otherwise a bank that could be is refused
        query_noise: deviation of Gaussian noise on the query, in training
        bank_dropout: probability that a row cannot see an entry, in training

    Attributes:
        shift: of the threshold's logarithm, where a dial has moved it; K stays

    Raises:
        UsageError: for settings that read nothing
    """

    def __init__(
        self,
        embed_dim: int,
        num_tokens: int = 10,
        threshold: float = 2.0,
        key_dim: Optional[int] = None,
        cost: str = "entropy",
        query_update: str = "average",
        allow_exhausted: bool = False,
        query_noise: float = 0.0,
        bank_dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 < threshold <= num_tokens:
            raise UsageError(
                f"the tape threshold is {threshold:g}: use more than 0, and at most the {num_tokens} tape tokens"
            )
        if key_dim is not None and not 0 < key_dim <= embed_dim:
            raise UsageError(f"the tape keys have {key_dim} dimensions: use 1 to {embed_dim}")
        for name, value, choices in (("cost", cost, COSTS), ("query update", query_update, QUERY_UPDATES)):
            if value not in choices:
                raise UsageError(f"unknown tape {name} {value!r}: choose one of {', '.join(choices)}")
        self.num_tokens, self.threshold = num_tokens, threshold
        self.entries_per_token = int(num_tokens // threshold)
        self.key_dim = key_dim or embed_dim
        self.cost, self.query_update = cost, query_update
        self.allow_exhausted = allow_exhausted
        self.query_noise, self.bank_dropout = query_noise, bank_dropout
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.register_shift()

    def check_bank(self, size: int):
        """
        Raises:
            UsageError: when a bank of ``size`` entries can be read to the end and that is not allowed
        """
        needed = self.num_tokens * self.entries_per_token
        if size < needed and not self.allow_exhausted:
            raise UsageError(
                f"a bank of {size} entries can be exhausted by {self.num_tokens} tape tokens of "
                f"{self.entries_per_token} entries each: use {needed} entries or more, a shorter tape, or "
                "--tape-allow-exhausted, where reading stops"
            )

    def forward(self, query: Tensor, bank: Tensor, bank_padding_mask: Optional[Tensor] = None) -> Reading:
        """
        Args:
            query: B x C
            bank: N x C for all rows, or B x N x C
            bank_padding_mask: B x N, true at entries that are none

        Raises:
            UsageError: when a bank can be read to the end and that is not allowed
        """
        batch, size = query.size(0), bank.size(-2)
        used = torch.zeros(batch, size, dtype=torch.bool, device=bank.device)
        if bank_padding_mask is None:
            self.check_bank(size)
        else:
            if not self.allow_exhausted and batch:
                self.check_bank(int((~bank_padding_mask).sum(-1).min()))
            used = bank_padding_mask
            bank = bank.masked_fill(used.unsqueeze(-1), 0)
        if self.training and self.query_noise:
            query = query + self.query_noise * torch.randn_like(query)
        if self.training and self.bank_dropout:
            used = used | (torch.rand(batch, size, device=bank.device) < self.bank_dropout)
        bank = self.norm(bank)
        with torch.autocast(bank.device.type, enabled=False):
            steps, cost = self._read(*(upcast(x[..., : self.key_dim]) for x in (self.norm(query), bank)), used)
        live, entries, weights = (torch.stack(parts, 1) for parts in zip(*steps))
        tokens = _mix(bank, entries, weights).masked_fill(~live.unsqueeze(-1), 0)
        read = live.unsqueeze(-1) & (weights > 0)
        return Reading(
            tokens, live, cost, entries.masked_fill(~read, -1), weights * read, size=size, shared=bank.dim() == 2
        )

    def _read(self, query, keys, used):
        """Return (running, entries, weights) of each step, and the ponder cost.

        Which entries are nearest, and when to stop, is decided in at least single precision: a rounded score reads
        another entry.
        """
        each = min(self.entries_per_token, keys.size(-2))
        total, threshold = query.new_zeros(len(query)), self.shifted(self.threshold)
        cost = total
        steps = []
        running = ~used.all(-1)
        while len(steps) < self.num_tokens and (not steps or running.any()):
            scores = (keys @ query.unsqueeze(-1)).squeeze(-1) if keys.dim() == 3 else query @ keys.T
            scores, entries = scores.masked_fill(used, -torch.inf).topk(each)  # B x K
            weights = (scores.masked_fill(~running.unsqueeze(-1), 0) * self.key_dim**-0.5).softmax(-1)
            steps.append((running, entries, weights))
            step_cost = 1 - (weights**2).sum(-1) if self.cost == "entropy" else 1 - weights[:, 0]
            cost = cost + step_cost.masked_fill(~running, 0)
            key = _mix(keys, entries.unsqueeze(1), weights.unsqueeze(1)).squeeze(1)
            query = (query + key) / 2 if self.query_update == "average" else key
            total = total + weights[:, 0].detach().masked_fill(~running, 0)
            used = used.scatter(1, entries, True)
            running = running & (total < threshold) & ~used.all(-1)
        return steps, cost


def _mix(bank, entries, weights):
    """sum_k w_k bank[entries_k]: N x C or B x N x C, B x S x K, B x S x K -> B x S x C"""
    if bank.dim() == 2:
        values = bank[entries]
    else:
        each = entries.flatten(1).unsqueeze(-1).expand(-1, -1, bank.size(-1))
        values = bank.gather(1, each).unflatten(1, entries.shape[1:])  # B x S x K x C
    return (weights.to(values.dtype).unsqueeze(-2) @ values).squeeze(-2)


class Tape(Reader):
    """Reads the tape once, and appends it to the sequence (section 3).

    Args:
        reader: how it is read
        mlp: what tape tokens pass before they are appended (default: nothing)
        query: ``mean`` of the states, or the ``first`` state ([CLS])
        depth: before which depth it is read
    """

    policy_name, weight = "tape", 0.01

    def __init__(self, reader: TapeReader, mlp: Optional[nn.Module] = None, query: str = "mean", depth: int = 0):
        super().__init__()
        if query not in QUERIES:
            raise UsageError(f"unknown tape query {query!r}: choose one of {', '.join(QUERIES)}")
        self.reader, self.mlp, self.query, self.depth = reader, mlp, query, depth

    @property
    def room(self):
        return self.reader.num_tokens

    def read(
        self, x: Tensor, padding_mask: Tensor, bank: Tensor, bank_padding_mask: Optional[Tensor] = None
    ) -> Reading:
        """As :class:`~fairseq_adaptive.modules.policies.Reader` has it.

        Raises:
            UsageError: when a bank can be read to the end and that is not allowed
        """
        reading = self.reader(
            first_state(x, padding_mask) if self.query == "first" else masked_mean(x, padding_mask),
            bank,
            bank_padding_mask,
        )
        tokens = reading.tokens if self.mlp is None else self.mlp(reading.tokens)
        # 0 and not just masked: attention multiplies what it masks by 0, and 0 times an overflow is no number
        return reading._replace(appended=tokens.masked_fill(~reading.live.unsqueeze(-1), 0).to(x.dtype))

    def forward(
        self, x: Tensor, padding_mask: Optional[Tensor], bank: Tensor, bank_padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor, Reading]:
        """Read, and append what was read.

        Args:
            x: T x B x C
            padding_mask: B x T, true at padding
            bank: N x C or B x N x C
            bank_padding_mask: B x N

        Returns:
            (T + S) x B x C, its padding mask B x (T + S) in which the dead places of the tape count as padding, and
            what was read

        Raises:
            UsageError: when a bank can be read to the end and that is not allowed
        """
        if padding_mask is None:
            padding_mask = torch.zeros(x.size(1), x.size(0), dtype=torch.bool, device=x.device)
        reading = self.read(x, padding_mask, bank, bank_padding_mask)
        mask = torch.cat((padding_mask, ~reading.live), dim=1)
        return torch.cat((x, reading.appended.transpose(0, 1))), mask, reading

    def turn(self, position, causal=False):
        """Set the sum of certainties that ends the reading: from the first tape token to a full tape, which is saved with
        the weights."""
        limit = max(1e-6, position) * self.reader.num_tokens
        self.reader.set_shift(math.log(limit / self.reader.threshold))
        return {}

    def price(self, trace):
        """The mean over the sequences of the ponder cost of reading."""
        return super().price(trace) if trace.reading is None else trace.reading.cost.mean()

    def macs(self, counts):
        """Scores of all entries, the mixture that is the next query, that which is a token, and its MLP."""
        each = min(self.reader.entries_per_token, counts.bank)
        token = (counts.bank + each) * self.reader.key_dim + each * counts.dim
        mlp = self.mlp.macs() if hasattr(self.mlp, "macs") else 0
        return counts.asked * (token + mlp)

    def measures(self, trace):
        if trace.reading is None:
            return super().measures(trace)
        cost = trace.reading.cost.detach().sum(), len(trace.tokens)
        return {**super().measures(trace), "cost": cost, "bank_used": trace.reading.used()}


@register_policy("tape")
class LearnedTape(Tape):
    """A tape with a bank of its own, for any encoder: ``--reader tape``.

    Args:
        dim, heads: of the stack
        tokens, threshold, cost, query_update, query, key_dim: of :class:`TapeReader` and :class:`Tape`
        bank_size: entries of the bank
        mlp_dim: width of the MLP between bank and sequence; 0: none
        depth: before which depth it is read
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        tokens: int = 10,
        threshold: float = 2.0,
        bank_size: int = 10000,
        mlp_dim: int = 0,
        cost: str = "entropy",
        query: str = "mean",
        query_update: str = "average",
        key_dim: Optional[int] = None,
        depth: int = 0,
    ):
        reader = TapeReader(dim, tokens, threshold, key_dim or dim // heads, cost, query_update)
        reader.check_bank(bank_size)
        super().__init__(reader, GatedMLP(dim, mlp_dim) if mlp_dim else None, query, depth)
        self.bank = LearnedBank(bank_size, dim)

    def read(self, x, padding_mask, bank=None, bank_padding_mask=None):
        return super().read(x, padding_mask, self.bank() if bank is None else bank, bank_padding_mask)


def first_state(x: Tensor, padding_mask: Tensor) -> Tensor:
    """The first state of each row that is no padding, which may be on the left: T x B x C and B x T -> B x C."""
    return x[(~padding_mask).byte().argmax(1), torch.arange(x.size(1), device=x.device)]


def masked_mean(x: Tensor, padding_mask: Tensor) -> Tensor:
    """The mean of the states of each row, T x B x C -> B x C, without those where padding_mask, B x T, is true."""
    kept = ~padding_mask.T.unsqueeze(-1)  # T x B x 1
    return (upcast(x.masked_fill(~kept, 0)).sum(0) / kept.sum(0)).to(x.dtype)
