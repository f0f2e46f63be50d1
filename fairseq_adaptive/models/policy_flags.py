"""The flags of policies, the same for every family, and what is built from them."""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

from fairseq.dataclass import FairseqDataclass

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies import Place, build_policy
from fairseq_adaptive.modules.policies.pairing import check_pairing
from fairseq_adaptive.modules.policies.registry import check_name
from fairseq_adaptive.ranges import POSITIVE_SHARE, ranged

logger = logging.getLogger(__name__)
KINDS = ("router", "halting", "reader")
_KV = {
    "router": "what others see of a token that the router leaves out: active, nothing; recompute, the keys and values "
    "of the state that it has; first, those that its layer made first (default: that of the router, active)",
    "halting": "what others see of a token that has halted: recompute, the keys and values of its last state; keep, "
    "those that it had when the layer last ran for it; active, "
    "nothing; first, those that its layer made first (default: recompute)",
}


@dataclass
class PolicyConfig(FairseqDataclass):
    """The policies of a stack; names are open, since a --user-dir may register more."""

    halting: str = field(
        default="none",
        metadata={
            "help": "when a token stops: act (Simoulin and Crabbe, 2021), ut_act (Dehghani et al., 2019), pondernet "
            "(Banino et al., 2021); train with --criterion ponder_loss or adaptive_compute_loss. "
            "Exits by confidence (Schuster et al., 2022) "
            "for inference with a model trained without halting: saturation of the state, or margin between the two "
            "best words; or a learned exit_head (default: none)"
        },
    )
    halting_threshold: Optional[float] = ranged(
        None, POSITIVE_SHARE, "sum of halting probabilities at which a token stops (default: 0.99, with pondernet 0.5)"
    )
    exit_quantile: Optional[float] = ranged(
        None,
        POSITIVE_SHARE,
        "in evaluation a token stops at this quantile of its distribution over depths (Balagansky and Gavrilov, 2022): "
        "with act, ut_act, stick_breaking; with pondernet, loop_gate another name of --halting-threshold (default: the "
        "rule's own threshold)",
    )
    halting_kv: Optional[str] = field(default=None, metadata={"help": _KV["halting"]})
    halting_args: Optional[str] = field(
        default=None, metadata={"help": 'further arguments of the halting rule, in JSON: {"bias": -1}'}
    )
    router: str = field(
        default="none",
        metadata={
            "help": "which tokens are computed at each depth: skimming (Guan et al., 2022), mixture_of_depths "
            "(Raposo et al., 2024), mixture_of_recursions or token_choice (Bae et al., 2025; with --layer-sharing "
            "middle_cycle), in encoders token_merging (Bolya et al., 2023) (default: none)"
        },
    )
    router_kv: Optional[str] = field(default=None, metadata={"help": _KV["router"]})
    router_args: Optional[str] = field(
        default=None, metadata={"help": 'arguments of the router, in JSON: {"capacity": 0.5}'}
    )
    reader: str = field(
        default="none",
        metadata={
            "help": "which tokens join a sequence of an encoder: tape (Xue et al., 2023), from a learned bank "
            "(default: none)"
        },
    )
    reader_args: Optional[str] = field(
        default=None, metadata={"help": 'arguments of the reader, in JSON: {"tokens": 10, "bank_size": 1000}'}
    )


FLAGS = tuple(each.name for each in dataclasses.fields(PolicyConfig) if each.name != "_name")


def add_policy_args(parser, sides=(), leave_out=()):
    """Add the flags of policies to a model's parser.

    Args:
        sides: where there are several, ``encoder`` and ``decoder``, each has them for itself, too
        leave_out: names of flags that the parser has
    """
    for each in dataclasses.fields(PolicyConfig):
        if each.name not in FLAGS or each.name in leave_out:
            continue
        flag, text = each.name.replace("_", "-"), each.metadata["help"].replace("%", "%%")
        options = {"type": each.metadata["range"]} if "range" in each.metadata else {}
        parser.add_argument(f"--{flag}", help=text, **options)
        for side in sides if len(sides) > 1 else ():
            if side != "decoder" or not each.name.startswith("reader"):
                parser.add_argument(f"--{side}-{flag}", help=f"the same in the {side} (default: --{flag})", **options)


class Policies:
    """What the flags say of one stack.

    Args:
        args: namespace with the flags of a :class:`PolicyConfig`; what is not there is not given
        side: ``encoder`` or ``decoder``
        router: which router there is where no flag names one
        router_options: arguments of the router that other flags have given
        alone: the model has no other side; a reader is the encoder's where there are both

    Attributes:
        router, halting, reader: names

    Raises:
        UsageError: for names that are unknown, arguments that are no JSON, and a decoder with a reader
    """

    def __init__(
        self, args, side: str, router: str = "none", router_options: Optional[Dict[str, Any]] = None, alone: bool = True
    ):
        self.side, self._options, self._kv = side, {}, {}
        for kind in KINDS:
            name = self._given(args, kind) if alone or side != "decoder" or kind != "reader" else "none"
            name = check_name(kind, router if kind == "router" and name in (None, "none") else name)
            setattr(self, kind, name)
            if name == "none":
                if kind != "reader" and getattr(args, f"{side}_{kind}_kv", None) is not None:
                    raise UsageError(f"--{side}-{kind}-kv is given without a {kind} policy: add --{side}-{kind}")
                continue
            options = (router_options or {}) if kind == "router" else {}
            self._options[kind] = {**options, **self._arguments(args, kind)}
            self._kv[kind] = self._given(args, f"{kind}_kv")
        threshold = self._given(args, "halting_threshold")
        if self.halting != "none" and threshold is not None:
            within = self._options["halting"].get("threshold")
            if within is not None and within != float(threshold):  # the flag is what a dial and a calibration set
                logger.warning("--halting-threshold %s takes the place of the %s in --halting-args", threshold, within)
            self._options["halting"]["threshold"] = float(threshold)
        self._quantile = None if self.halting == "none" else self._given(args, "exit_quantile")
        if side == "decoder" and self.reader != "none":
            raise UsageError("--reader is for encoders: a decoder's tokens would learn of later ones from what is read")

    def _given(self, args, name):
        found = getattr(args, f"{self.side}_{name}", None)
        found = getattr(args, name, None) if found is None else found
        return found if found is None or isinstance(found, float) else str(found)

    def _arguments(self, args, kind):
        own = getattr(args, f"{self.side}_{kind}", None) is not None  # arguments of all sides are of another policy
        text = getattr(args, f"{self.side}_{kind}_args", None) if own else self._given(args, f"{kind}_args")
        try:
            found = json.loads(text or "{}")
            assert isinstance(found, dict)
            return found
        except (ValueError, AssertionError) as error:
            raise UsageError(f'--{kind}-args {text!r} is no JSON object: write {{"name": value}}') from error

    def build(self, kind: str, place: Place):
        """Return the policy of a kind, or None.

        Raises:
            UsageError: for an exit quantile of a rule that has none, or whose threshold is given, too
        """
        options = self._options.get(kind, {})
        policy = build_policy(kind, getattr(self, kind), place, **options)
        if kind == "halting" and policy is not None and self._quantile is not None:
            policy.exit_at(float(self._quantile))
            if "threshold" in options and not policy.halts_in_training:
                raise UsageError(
                    f"--exit-quantile and --halting-threshold are one knob of --halting {self.halting}: leave one of them "
                    "out (of a checkpoint, set it to None in --model-overrides)"
                )
        return policy

    def description(self) -> Dict[str, Optional[Dict]]:
        """Of each kind its policy's ``name``, ``options``, ``kv`` and ``quantile``, or None: what plain torch makes it of."""
        found = {}
        for kind in KINDS:
            name, quantile = getattr(self, kind), self._quantile if kind == "halting" else None
            about = {"name": name, "options": self._options.get(kind, {}), "kv": self._kv.get(kind)}
            about["quantile"] = None if quantile is None else float(quantile)
            found[kind] = None if name == "none" else about
        return found

    def stack_arguments(self, place: Place) -> Dict:
        """Return what a :class:`~fairseq_adaptive.modules.LayerStack` takes of them."""
        return {
            "halting": self.build("halting", place),
            "router": self.build("router", place),
            "router_kv": self._kv.get("router"),
            "halting_kv": self._kv.get("halting"),
        }


def check_used(args, *found: Policies):
    """Refuse flags that no stack of a model has a use for.

    Raises:
        UsageError: with what is missing
    """
    for kind in ("router", "halting"):
        if all(getattr(each, kind) == "none" for each in found):
            answer = getattr(args, f"{kind}_kv", None)
            check_pairing(None, None, **{"router_kv": None, "halting_kv": None, f"{kind}_kv": answer}, schedule=(0,))
    for kind in KINDS:
        if getattr(args, f"{kind}_args", None) and all(getattr(each, kind) == "none" for each in found):
            raise UsageError(f"--{kind}-args is given without --{kind}: add it, or leave the arguments out")
