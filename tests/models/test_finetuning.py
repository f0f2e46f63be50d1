"""A training begins from a model with a policy more or less, and with other positions; one that goes on does not."""

import argparse
import logging

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from models.test_policy_flags import DECODER, FAMILIES, SIZES, made
from old_checkpoints.cases import inputs, task

from fairseq_adaptive.compat.restoring import beginning_anew
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import with_defaults
from fairseq_adaptive.models.fitting import POLICY_PARTS

READER = {"reader": "tape", "reader_args": '{"tokens": 4, "bank_size": 20, "depth": 1}'}
CHANGES = {
    "skimming": {"router": "skimming"},
    "mixture_of_depths": {"router": "mixture_of_depths"},
    "act": {"halting": "act"},
    "pondernet": {"halting": "pondernet"},
    "reader": READER,
    "admin": {"init": "admin"},
    "depth lora": {"depth_lora_rank": 2},
    "no tape": {"tape_tokens": 0},
    "wide tape": {"tape_mlp_dim": 9, "tape_ffn_embed_dim": 7},
}


def cases():
    for family in FAMILIES:
        for change, flags in CHANGES.items():
            if change == "reader" and family not in ("shared_transformer", "albert_act", "transkimmer"):
                continue
            if change == "admin" and family != "shared_transformer":
                continue
            if change == "depth lora" and family not in ("shared_transformer", "albert_act"):
                continue
            if "tape" in change and "adatape" not in family:
                continue
            if family.startswith("par_") and "router" in flags:
                continue
            if change == "pondernet" and family in ("adatape_parity", "adatape_vit"):
                continue
            yield pytest.param(family, flags, id=f"{family}-{change}")


def plain(family, **flags):
    without = {"halting": "none"} if family == "albert_act" else {}
    return made(family, **({"no_skimming": True} if family == "transkimmer" else {}), **without, **flags)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_change(family, flags):
    model = made(family, **{**({"halting": "none"} if family == "albert_act" else {}), **flags})
    for each in model.parameters():
        each.data.add_(1)
    return model


@pytest.mark.parametrize("family, flags", cases())
def test_policy_more_or_less(family, flags, caplog):
    caplog.set_level(logging.INFO, logger="fairseq_adaptive.models.fitting")
    one, other = plain(family), with_change(family, flags)
    for source, target in (one, other), (other, one):
        given, before = weights(source), weights(target)
        caplog.clear()
        with beginning_anew():
            target.load_state_dict(dict(given), strict=True)
        after = target.state_dict()
        fresh = {name for name in after if name not in given or given[name].shape != after[name].shape}
        for name, tensor in after.items():
            assert torch.equal(tensor, before[name] if name in fresh else given[name]), name
        said = [record.message for record in caplog.records]
        assert any("afresh" in each for each in said) == bool(fresh)
        assert any("left out" in each for each in said) == bool(set(given) - set(after)) and len(said) <= 2
        if fresh or set(given) - set(after):
            assert all(set(POLICY_PARTS) & set(name.split(".")) for name in {*fresh, *(set(given) - set(after))})
    assert set(one.state_dict()) != set(other.state_dict()) or "tape_mlp_dim" in flags


@pytest.mark.parametrize("family", FAMILIES)
def test_other_weights_are_refused(family):
    """What is no policy's has to fit, and a training that goes on has its policies."""
    model = plain(family)
    given = weights(model)
    name = next(name for name, _ in model.named_parameters() if not set(POLICY_PARTS) & set(name.split(".")))
    for wrong in ({**given, "decoder.more": torch.ones(1)}, {key: each for key, each in given.items() if key != name}):
        with beginning_anew(), pytest.raises(UsageError, match="of another architecture"):
            model.load_state_dict(dict(wrong), strict=True)
    halting = made(family, halting="act")
    with pytest.raises(UsageError, match="of another architecture"):
        halting.load_state_dict(dict(given), strict=True)
    with pytest.raises(UsageError, match="of another architecture"):
        model.load_state_dict(weights(halting), strict=True)


STOCK = {
    "shared_transformer": ("transformer", {"encoder_unique_layers": 3, "decoder_unique_layers": 3}),
    "shared_transformer_lm": ("transformer_lm", {"decoder_unique_layers": 3, "decoder_normalize_before": True}),
    "transkimmer": ("roberta", {}),
    "adatape": ("roberta", {}),
}


@pytest.mark.parametrize(
    "family, flags",
    [
        pytest.param(family, flags, id=f"{next(iter(flags))}-{family}")
        for flags in ({"halting": "act"}, {"router": "skimming"}, READER)
        for family in STOCK
        if flags is not READER or family not in ("shared_transformer_lm", "adatape")  # which have no --reader
    ],
)
def test_stock_model_with_a_policy(family, flags):
    arch, unique = STOCK[family]
    model = made(family, **unique, **flags)
    sizes = {**SIZES, **(DECODER if arch != "roberta" else {}), "max_positions": 20, "tokens_per_sample": 20}
    args = argparse.Namespace(**sizes, share_all_embeddings=arch == "transformer", max_target_positions=20)
    ARCH_CONFIG_REGISTRY[arch if arch != "transformer_lm" else "transformer_lm_big"](args)
    if arch == "transformer_lm":
        args = with_defaults(args, TransformerLanguageModelConfig)
        args.add_bos_token, args.tpu = False, False
    source = ARCH_MODEL_REGISTRY[arch].build_model(args, task())
    given = weights(source)
    with beginning_anew():
        model.load_state_dict(dict(given), strict=True)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in given.items() if name in after)
    assert not [name for name in given if name not in after and "version" not in name]


POSITIONS = {
    "shared_transformer": ("max_source_positions", {"encoder_learned_pos": True, "decoder_learned_pos": True}),
    "shared_transformer_lm": ("max_target_positions", {"decoder_learned_pos": True}),
    "albert_act": ("max_positions", {}),
    "transkimmer": ("max_positions", {}),
    "adatape": ("max_positions", {}),
}


@pytest.mark.parametrize("family", POSITIONS)
def test_positions_more_or_less(family, caplog):
    flag, flags = POSITIONS[family]

    def build(longest):
        both = {"max_positions": longest, "max_source_positions": longest, "max_target_positions": longest}
        return made(family, **{**flags, **both, "tokens_per_sample": longest})

    model = build(20)
    for each in model.parameters():
        each.data.add_(1)
    given = weights(model)
    tables = [name for name in given if name.endswith("embed_positions.weight")]
    assert tables
    for anew in (False, True):
        shorter = build(14)
        with beginning_anew(anew):
            shorter.load_state_dict(dict(given), strict=True)
        for name in tables:
            found = shorter.state_dict()[name]
            assert len(found) == len(given[name]) - 6 and torch.equal(found, given[name][: len(found)])
    longer = build(25)
    shown = f"--{flag.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{shown} 25 is more than the checkpoint has positions for: 20"):
        longer.load_state_dict(dict(given), strict=True)
    before = weights(longer)
    with beginning_anew():
        longer.load_state_dict(dict(given), strict=True)
    for name in tables:
        found = longer.state_dict()[name]
        assert torch.equal(found[: len(given[name])], given[name])
        assert torch.equal(found[len(given[name]) :], before[name][len(given[name]) :])
    assert f"20 positions: those up to {shown} 25 start afresh" in caplog.text
    assert torch.isfinite(longer.eval()(**inputs(family))[0]).all()
