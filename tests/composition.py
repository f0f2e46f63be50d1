"""What composes: every family with every schedule, router, rule, reader and answer of what is seen of tokens that are not
computed; which of these are refused, and with which reason. Written down here a second time, apart from the code that
refuses, and made into docs/composition.md."""

import itertools
import random
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import nn

from fairseq_adaptive.modules import LayerStack, ParameterSharedTransformerEncoder
from fairseq_adaptive.modules.policies import Place, build_policy
from fairseq_adaptive.modules.policies.pairing import ANSWERS
from old_checkpoints.cases import build, flags_of

DEPTHS = 6
SCHEDULES = {  # how many unique layers, --layer-sharing, and what serves the depths
    "own": (6, "cycle", "0 1 2 3 4 5"),
    "one": (1, "cycle", "0 0 0 0 0 0"),
    "sequence": (2, "sequence", "0 0 0 1 1 1"),
    "cycle": (2, "cycle", "0 1 0 1 0 1"),
    "cycle_rev": (2, "cycle_rev", "0 1 0 1 1 0"),
    "middle_cycle": (4, "middle_cycle", "0 1 2 1 2 3"),
    "middle_sequence": (4, "middle_sequence", "0 1 1 2 2 3"),
}
ROUTERS = ("none", "skimming", "mixture_of_depths", "mixture_of_recursions", "token_choice", "token_merging")
RULES = ("none", "act", "ut_act", "pondernet", "stick_breaking", "saturation", "margin")
READERS = ("none", "first", "later")  # a tape, before the first depth or before the third
KV = (None, *ANSWERS)
RECURSIONS, WEIGHED = ("mixture_of_recursions", "token_choice"), ROUTERS[2:5]


class Family(NamedTuple):
    """
    Attributes:
        arch: a name of fairseq's registry, or ``plain``
        flags: what makes it tiny
        side: of an encoder-decoder the only one that has the policies; empty: both, or there is but one
        schedules: those that its flags can say
        reads: whether it is an encoder
        scores: whether its stacks can score words
    """

    arch: str
    flags: Dict
    side: str = ""
    schedules: Tuple[str, ...] = tuple(SCHEDULES)
    reads: bool = True
    scores: bool = False


_DRY = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_DECODER = {
    "decoder_embed_dim": 8,
    "decoder_ffn_embed_dim": 12,
    "decoder_attention_heads": 2,
    "decoder_layers": DEPTHS,
    **_DRY,
}
_ENCODER = {
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 2,
    "encoder_layers": DEPTHS,
    **_DRY,
}
_PAIRS = {**_ENCODER, **_DECODER, "share_all_embeddings": True}
_TAPE = {**_ENCODER, "tape_mlp_dim": 6}
_SEGMENTS = {
    "decoder_embed_dim": 8,
    "decoder_ffn_embed_dim": 12,
    "decoder_attention_heads": 2,
    "dropout": 0.0,
    "memory_length": 5,
}
FAMILIES = {
    "shared_transformer": Family("shared_transformer", _PAIRS),
    "its encoder alone": Family("shared_transformer", _PAIRS, "encoder"),
    "its decoder alone": Family("shared_transformer", _PAIRS, "decoder", reads=False, scores=True),
    "shared_transformer_lm": Family(
        "shared_transformer_lm", {**_DECODER, "decoder_input_dim": 8, "decoder_output_dim": 8}, reads=False, scores=True
    ),
    "albert_act": Family(
        "albert_act", {**_ENCODER, "encoder_input_dim": 6, "pooler_dropout": 0.0}, schedules=("one",), scores=True
    ),
    "transkimmer": Family("transkimmer", {**_ENCODER, "max_positions": 20}),
    "adatape": Family("adatape", {**_TAPE, "max_positions": 20, "tape_bank_size": 20}),
    "adatape_parity": Family("adatape_parity", _TAPE),
    "adatape_vit": Family("adatape_vit", {**_TAPE, "patch_size": 4, "tape_bank_patch_size": 2}),
    "par_transformer_xl": Family("par_transformer_xl", {**_SEGMENTS, "layout": "af*3"}, reads=False, scores=True),
    "par_supernet": Family(
        "par_supernet",
        {**_SEGMENTS, "blocks": DEPTHS, "temperature_updates": 10},
        schedules=("own",),
        reads=False,
        scores=True,
    ),
    "ParameterSharedTransformerEncoder": Family("plain", {}),
}


class Case(NamedTuple):
    """A place of the matrix; None: the default answer."""

    family: str
    schedule: str
    router: str = "none"
    rule: str = "none"
    reader: str = "none"
    router_kv: Optional[str] = None
    halting_kv: Optional[str] = None

    def __str__(self):
        return "-".join(str(each) for each in self if each is not None).replace(" ", "_")


def reasons(case: Case) -> List[str]:
    """Why a case is refused, in words that the message has; none: it is legal."""
    family, found = FAMILIES[case.family], []
    router, rule, reader = (each != "none" for each in (case.router, case.rule, case.reader))
    segments, own_tape = family.arch.startswith("par_"), family.arch.startswith("adatape")
    # schedules
    if family.arch == "par_transformer_xl" and case.schedule not in ("own", "cycle", "middle_cycle"):
        found.append("cannot serve depth")
    if case.router in RECURSIONS and case.schedule == "own":
        found.append("share layers with --layer-sharing middle_cycle")
    # families
    if segments and case.halting_kv == "keep":
        found.append("--halting-kv keep: the memory of a Transformer-XL")
    if reader and not family.reads:  # the decoder of a pair has no such flag
        found.append("--reader is for encoders")
    if case.rule == "margin" and not family.scores:
        found.append("margin asks the word scores")
    if case.rule == "pondernet" and own_tape and case.family != "adatape":
        found.append("pondernet needs one token to read the output from")
    if case.router == "token_merging" and family.arch == "plain":
        found.append("cannot be told how much a key weighs")
    if case.router == "token_merging" and (
        not family.reads or (family.arch == "shared_transformer" and not family.side)
    ):
        found.append("a token of a causal decoder would hold later ones")
    # pairs of policies
    if case.rule == "saturation" and case.router in WEIGHED:
        found.append("this router's score scales how far")
    # answers
    if not router and case.router_kv is not None:
        found += ["add --router", "without a router policy"]
    if not rule and case.halting_kv is not None:
        found += ["add --halting", "without a halting policy"]
    found += [f"--{flag}-kv last" for flag in ("router", "halting") if getattr(case, f"{flag}_kv") == "last"]
    if case.router_kv == "keep":
        found.append("--router-kv keep: a token that is left out at once has no keys")
    if case.router == "token_merging" and case.router_kv not in (None, "active", "keep", "last"):
        found.append("would be seen twice")
    whole = case.router in RECURSIONS and case.schedule in ("one", "cycle", "cycle_rev", "middle_cycle")
    if router and case.router_kv == "first" and not whole:
        found.append("--router-kv first needs a router that computes all tokens")
    if case.halting_kv == "keep" and case.schedule == "own":
        found.append("--halting-kv keep needs a layer that serves several depths")
    if case.halting_kv == "first" and case.schedule != "one":
        found.append("--halting-kv first needs one layer at all depths")
    if router and rule and "first" in case[-2:] and case.router_kv != case.halting_kv:
        found.append("give it to both")
    kept = [each for each in case[-2:] if each in ("keep", "first")]
    if kept and case.reader == "later":
        found.append("cannot be combined with a reader that reads after the first layer")
    if kept and family.arch == "plain":
        found.append("which layers of other libraries do not show")
    return found


def legal_cases(family: str) -> Iterator[Case]:
    """All cases of a family that are not refused."""
    for each in itertools.product(FAMILIES[family].schedules, ROUTERS, RULES, READERS):
        if not reasons(Case(family, *each)):  # what is refused by default is refused with every answer
            yield from (case for pair in itertools.product(KV, KV) if not reasons(case := Case(family, *each, *pair)))


def all_pairs(seed: int = 1) -> List[Case]:
    """Few legal cases, of all families, in which every two values that go together at all are together once."""
    bits: Dict[Tuple, int] = {}

    def pairs(case):  # one bit for each two dimensions with their values
        return sum(1 << bits.setdefault(pair, len(bits)) for pair in itertools.combinations(enumerate(case), 2))

    pool = [(case, pairs(case)) for family in FAMILIES for case in legal_cases(family)]
    random.Random(seed).shuffle(pool)
    found, missing = [], (1 << len(bits)) - 1
    while missing:
        some = list(itertools.islice((each for each in pool if each[1] & missing), 100))
        case, covered = max(some, key=lambda each: (each[1] & missing).bit_count())
        found.append(case)
        missing &= ~covered
    return found


def flags(case: Case, **more) -> Dict:
    """The flags of fairseq's parser that say a case."""
    family = FAMILIES[case.family]
    unique, sharing, _ = SCHEDULES[case.schedule]
    found = dict(family.flags)
    if len(family.schedules) > 1:
        found["layer_sharing"] = sharing
        sides = (
            ("encoder", "decoder")
            if family.arch == "shared_transformer"
            else ("decoder" if not family.reads else "encoder",)
        )
        found.update({f"{side}_unique_layers": unique for side in sides})
    start = f"{family.side}_" if family.side else ""
    found.update({f"{start}router": case.router, f"{start}halting": case.rule})
    found.update({f"{start}router_kv": case.router_kv, f"{start}halting_kv": case.halting_kv})
    if family.arch == "transkimmer":
        found["no_skimming"] = case.router == "none"
    if family.arch.startswith("adatape"):
        found["tape_tokens"], found["tape_layer"] = 0 if case.reader == "none" else 4, 2 * (case.reader == "later")
    elif case.reader != "none":
        depth = 2 * (case.reader == "later")
        found[f"{start}reader"] = "tape"
        found[f"{start}reader_args"] = f'{{"tokens": 4, "bank_size": 20, "depth": {depth}}}'
    return {**found, **more}


def made(case: Case, seed: int = 1, **more) -> nn.Module:
    """A model in float64 with random weights, under which tokens stop everywhere.

    Args:
        seed: of the weights
        more: further flags
    """
    family = FAMILIES[case.family]
    torch.manual_seed(seed)
    if family.arch == "plain":
        unique, sharing, _ = SCHEDULES[case.schedule]
        policies = {
            "router": case.router,
            "halting": case.rule,
            "router_kv": case.router_kv,
            "halting_kv": case.halting_kv,
        }
        reader = None
        if case.reader != "none":
            reader = build_policy(
                "reader", "tape", Place(8, DEPTHS, heads=2), tokens=4, bank_size=20, depth=2 * (case.reader == "later")
            )
        model = ParameterSharedTransformerEncoder(
            8, 2, 12, 0.0, num_unique_layers=unique, num_total_layers=DEPTHS, mode=sharing, reader=reader, **policies
        )
    else:
        model = build(family.arch, flags_of(family.arch, flags(case, **more)))
    for name, each in model.named_parameters():
        if name.endswith("halting.unit.bias"):
            each.data.fill_(-1.0)
        elif name.endswith("reader.norm.weight"):
            each.data.normal_(1.0, 0.5)
        elif ".router." in name and name.endswith(".4.bias") and each.numel() == 2:
            each.data.copy_(torch.tensor([-0.5, 0.5]))
        elif "halting.unit" in name or ".router." in name:
            each.data.normal_(0.0, 0.7)
        else:
            each.data += 0.2 * torch.randn_like(each)
    for stack in stacks(model):
        for each in stack:
            each.need_attn = False  # with weights fairseq takes its softmax in float32, in a float64 model, too
    return model.double().eval()


def stacks(model) -> List[LayerStack]:
    return [each for each in model.modules() if isinstance(each, LayerStack)]
