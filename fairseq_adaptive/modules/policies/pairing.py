"""What others read of a token that is not computed, and which policies and answers go together.

Asked twice: of a token that a router leaves out (``--router-kv``), and of one that is done (``--halting-kv``).

- ``active``: nothing, it is invisible. The recursion-wise cache of Mixture-of-Recursions; Transkimmer
- ``recompute``: the state that it has goes through this depth's key and value maps. Exact for ACT and early exit
- ``keep``: the keys and values that it had when this layer last ran for it
- ``first``: all repeats of a layer read the keys and values that its first repeat made
- ``last``: those of its last repeat. Refused: all tokens run a depth together, so at the first one nobody has them

What composes with what is in docs/composition.md, which tests/test_composition.py writes and compares.
"""

from typing import Optional, Sequence, Tuple

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Halting, Router

ANSWERS = ("recompute", "keep", "active", "first", "last")


def check_pairing(
    router: Optional[Router],
    halting: Optional[Halting],
    router_kv: Optional[str],
    halting_kv: Optional[str],
    schedule: Sequence[int],
) -> Tuple[str, str]:
    """Return both answers, with their defaults where they are None.

    Raises:
        UsageError: for what makes no sense, with the reason
    """
    for flag, answer in (("--router-kv", router_kv), ("--halting-kv", halting_kv)):
        if answer is not None and answer not in ANSWERS:
            raise UsageError(f"unknown {flag} {answer!r}: choose one of {', '.join(ANSWERS)}")
        if answer == "last":
            raise UsageError(
                f"{flag} last: a token would need the last depth of the others at its own first one; "
                "choose first, keep or recompute"
            )
    if router is None and router_kv is not None:
        raise UsageError("--router-kv says what is seen of tokens that a router leaves out: add --router")
    if halting is None and halting_kv is not None:
        raise UsageError("--halting-kv says what is seen of tokens that have halted: add --halting")
    repeats, single = len(set(schedule)) < len(schedule), len(set(schedule)) == 1
    if router_kv == "keep":
        raise UsageError(
            "--router-kv keep: a token that is left out at once has no keys to keep; choose active or recompute"
        )
    if router is not None and router.merges and router_kv not in (None, "active"):
        raise UsageError(
            f"--router-kv {router_kv}: a token that was merged is seen in the one that stands for it, and would be seen "
            "twice; choose active"
        )
    if router_kv == "first" and not router.computes_all_first:
        raise UsageError(
            "--router-kv first needs a router that computes all tokens at the first repeat of every layer: "
            "here a token that is left out there has no keys; choose active or recompute"
        )
    if halting_kv == "keep" and not repeats:
        raise UsageError(
            "--halting-kv keep needs a layer that serves several depths: here each runs once, and a token "
            "that has halted has no keys of it; choose recompute or active"
        )
    if halting_kv == "first" and not (single and repeats):
        raise UsageError(
            "--halting-kv first needs one layer at all depths: a token may halt before another layer has "
            "run once; choose recompute, keep or active"
        )
    if "first" in (router_kv, halting_kv) and router is not None and halting is not None and router_kv != halting_kv:
        raise UsageError(
            "with first all tokens read the keys of a layer's first repeat: give it to both --router-kv "
            "and --halting-kv"
        )
    if router is not None and router.weighs and halting is not None and halting.compares_states:
        raise UsageError(
            "this halting rule asks how far a layer moves the state, and this router's score scales how "
            "far: choose act or margin"
        )
    router_kv = router_kv or (router.default_kv if router is not None else "active")
    return router_kv, halting_kv or "recompute"
