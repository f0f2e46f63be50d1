"""A mechanism of one's own, in a folder of one's own: ``--user-dir examples/add_a_mechanism --router energy``.

Each token has an energy of 1, spends some of it at each depth, and is left out for good when there is none. It is made up
to show all that a router has; docs/add-a-mechanism.md explains it line by line.
"""

import torch
from torch import nn

import fairseq_adaptive.plugin  # noqa: F401  our models and criterions
from fairseq_adaptive.modules.policies import Choice, Router, register_policy


@register_policy("energy")
class Energy(Router, nn.Module):
    monotone, weight = True, 0.1  # who is left out once is not asked again; of the price

    def __init__(self, dim, depths, use=0.3):
        super().__init__()
        self.unit = nn.Linear(dim, 1)
        nn.init.constant_(self.unit.bias, torch.tensor(use).logit())  # what a token spends at a depth at first

    def start(self, x):
        return {"energy": torch.ones_like(x[..., 0])}

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        energy = carry["energy"]
        run = (energy > 0).to(energy)
        if protected is not None:
            run = run.masked_fill(protected, 1.0)
        if self.training:  # hard forward, soft backward
            soft = energy.clamp(0, 1)
            run = run + soft - soft.detach()
        spent = self.unit(x).squeeze(-1).sigmoid()
        return Choice(run, energy.detach().clamp(0, 1), {"energy": energy - spent})

    def price(self, trace):
        """The share of tokens and depths that is computed."""
        return sum(step.kept.sum() for step in trace.steps) / sum(trace.counts())

    def macs(self, counts):
        return counts.asked * counts.dim
