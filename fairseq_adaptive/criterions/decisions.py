"""Who decides in a model: routers, halting rules, readers and searches, with the stack that each decides for."""

from typing import List, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from fairseq_adaptive.modules import LayerStack, Trace
from fairseq_adaptive.modules.policies import Policy, Reader, Search
from fairseq_adaptive.modules.stack.compute import stack_macs


class Decision(NamedTuple):
    """A policy where it decides.

    Attributes:
        policy: the policy
        name: of the stack, in the model
        stack: the stack
        label: the policy's name, with that of the side in front where several stacks have such a policy
        trace: of a run
        macs: multiply-adds of that run, and of all tokens without policies; of a router over layers that
            can be counted
    """

    policy: Policy
    name: str
    stack: LayerStack
    label: str = ""
    trace: Optional[Trace] = None
    macs: Optional[Tuple[Tensor, Tensor]] = None

    def ran(self, trace: Trace, training: bool) -> "Decision":
        """The decision in a run."""
        macs = None
        if self.policy.kind == "router" and (hasattr(self.stack[0], "macs") or hasattr(self.stack[0], "fc1")):
            macs = stack_macs(self.stack, trace, self.policy.decided(trace) if training else None)
        return self._replace(trace=trace, macs=macs)

    @property
    def side(self) -> str:
        """``encoder`` or ``decoder``, also under a wrapper."""
        return self.name.split(".")[-2] if "." in self.name else self.name


def _shared(first: str, second: str) -> int:
    """How many parts two modules' names have in common."""
    pairs = list(zip(first.split("."), second.split(".")))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))


def decisions(model: nn.Module) -> List[Decision]:
    """All policies of a model, by stacks in their order.

    A reader or a search belongs to the stack that is nearest in the model's tree.
    """
    modules = dict(model.named_modules())
    stacks = {name: module for name, module in modules.items() if isinstance(module, LayerStack)}
    found = [
        Decision(policy, name, stack)
        for name, stack in stacks.items()
        for policy in (stack.router, stack.halting)
        if policy is not None
    ]
    for name, module in modules.items():
        if stacks and isinstance(module, (Reader, Search)):
            nearest = max(stacks, key=lambda each: _shared(name, each))
            found.append(Decision(module, nearest, stacks[nearest]))
    names = [_name(each.policy) for each in found]
    return [
        each._replace(label=name if names.count(name) == 1 else f"{each.side}_{name}")
        for each, name in zip(found, names)
    ]


def _name(policy):
    return policy.policy_name or type(policy).__name__.lower()
