"""Which kind of block runs at each depth, while that is searched (Mandava et al., 2020)."""

import math

import torch

from fairseq_adaptive.modules.policies.base import Policy


class Search(Policy):
    """What prices ask of a supernet, which has its blocks' probabilities left in the trace.

    Attributes:
        kinds: one letter for each kind
        block_costs: what a block of each kind costs, ``[K]``; attention and feed-forward together cost 1
    """

    kind, policy_name, weight = "search", "search", 0.0
    kinds = ""

    def price(self, trace):
        """The mean over the blocks of the entropy of a choice, in nats, at most ln K."""
        return -torch.xlogy(trace.mixture, trace.mixture).sum(-1).mean()

    def compute(self, trace):
        """The expected cost, a scalar with a gradient: a share of that of attention and feed-forward in turn."""
        return (trace.mixture * self.block_costs).sum() / (len(trace.mixture) / 2)

    lever = compute

    def measures(self, trace):
        """The entropy in bits, compute, and the probability of each kind of each block."""
        found = {"entropy": self.price(trace).detach() / math.log(2), "compute": self.compute(trace).detach()}
        for block, probabilities in enumerate(trace.mixture.detach()):
            found.update((f"block_{block}_{kind}", each) for kind, each in zip(self.kinds, probabilities, strict=True))
        return {name: (value, 1) for name, value in found.items()}
