"""Policies: who is computed (routers), who is done (halting rules), who is added (readers). One file a mechanism."""

from fairseq_adaptive.modules.policies.act import ACT, UniversalACT
from fairseq_adaptive.modules.policies.base import (
    Choice,
    Counts,
    Halting,
    LearnedHalting,
    Merged,
    Place,
    Policy,
    Reader,
    Router,
    Verdict,
)
from fairseq_adaptive.modules.policies.confidence import ConfidenceExit, Margin, Saturation
from fairseq_adaptive.modules.policies.exit_head import ExitHead
from fairseq_adaptive.modules.policies.mixture_of_depths import MixtureOfDepths
from fairseq_adaptive.modules.policies.mixture_of_recursions import ExpertChoice
from fairseq_adaptive.modules.policies.pondernet import PonderNet
from fairseq_adaptive.modules.policies.quantile import Distributed
from fairseq_adaptive.modules.policies.loop_gate import LoopGate
from fairseq_adaptive.modules.policies.stick_breaking import StickBreaking
from fairseq_adaptive.modules.policies.patience import Patience
from fairseq_adaptive.modules.policies.registry import build_policy, policies, register_policy
from fairseq_adaptive.modules.policies.search import Search
from fairseq_adaptive.modules.policies.skimming import Skimming
from fairseq_adaptive.modules.policies.tape import Tape
from fairseq_adaptive.modules.policies.token_choice import TokenChoice
from fairseq_adaptive.modules.policies.token_merging import TokenMerging

__all__ = [
    "ACT",
    "Choice",
    "ConfidenceExit",
    "Counts",
    "Distributed",
    "ExitHead",
    "ExpertChoice",
    "Halting",
    "LearnedHalting",
    "LoopGate",
    "Margin",
    "Merged",
    "MixtureOfDepths",
    "Place",
    "Policy",
    "Patience",
    "PonderNet",
    "Reader",
    "Router",
    "Saturation",
    "Search",
    "Skimming",
    "StickBreaking",
    "Tape",
    "TokenChoice",
    "TokenMerging",
    "UniversalACT",
    "Verdict",
    "build_policy",
    "policies",
    "register_policy",
]
