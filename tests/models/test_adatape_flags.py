"""What the flags of models with a tape cannot be, and the criterion's."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.tape_ponder_loss import TapePonderLoss, TapePonderLossConfig
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_parity import AdaTapeParity, AdaTapeParityConfig
from fairseq_adaptive.models.adatape_vit import AdaTapeViT, AdaTapeViTConfig

SIZES = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 2, "encoder_layers": 4}
TASKS = {
    AdaTapeParity: SimpleNamespace(cfg=SimpleNamespace(sequence_length=50)),
    AdaTapeViT: SimpleNamespace(image_size=(28, 28), channels=1, classes=list("abc")),
}
PATCHES = {"patch_size": 14, "tape_bank_patch_size": 2, "tape_layer": 0}


@pytest.fixture
def makers(build):
    def maker(model, config, **fixed):
        def make(**flags):
            return model.build_model(OmegaConf.structured(config(**{**SIZES, **fixed, **flags})), TASKS[model])

        return make

    def text(**flags):
        return build("adatape", **{**SIZES, "tape_bank_size": 50, **flags})

    return text, maker(AdaTapeParity, AdaTapeParityConfig), maker(AdaTapeViT, AdaTapeViTConfig, **PATCHES)


@pytest.mark.parametrize(
    "flags, message",
    (
        ({"skimming": True, "router": "mixture_of_depths"}, "--skimming and --router mixture_of_depths contradict"),
        ({"reader": "tape", "tape_tokens": 0}, "reads the tape of --tape-tokens"),
        ({"router_args": "[1]", "router": "skimming"}, "is no JSON object"),
        ({"router_args": '{"width": 1}', "router": "skimming"}, "router skimming has no argument 'width'"),
        ({"router_kv": "recompute"}, "add --router"),
        ({"halting_args": '{"bias": 1}'}, "without --halting"),
        ({"halting": "act", "halting_threshold": 1.5}, "--halting-threshold is 1.5: use a number above 0 and up to 1"),
        ({"halting": "margin"}, "margin asks the word scores"),
        ({"tape_tokens": -1}, "--tape-tokens is -1: use a whole number from 0 to 10,000"),
        ({"tape_ffn_embed_dim": -3}, "--tape-ffn-embed-dim is -3"),
        ({"tape_query_noise": -1.0}, "--tape-query-noise is -1.0"),
        ({"tape_bank_dropout": 1.5}, "--tape-bank-dropout is 1.5: use a number from 0 to below 1"),
        ({"dropout": 2.0}, "--dropout is 2.0"),
        ({"encoder_attention_heads": 0}, "--encoder-attention-heads is 0: use a whole number from 1"),
        ({"encoder_embed_dim": 0}, "--encoder-embed-dim is 0"),
    ),
)
def test_refuses(makers, flags, message):
    for make in makers:
        with pytest.raises(UsageError, match=message):
            make(**flags)


def test_refuses_pondernet_where_the_output_has_no_depth(makers):
    text, *others = makers
    text(halting="pondernet")
    for make in others:
        with pytest.raises(UsageError, match="pondernet needs one token"):
            make(halting="pondernet")
    with pytest.raises(UsageError, match="--router decides how many layers run: leave out --encoder-layerdrop"):
        text(skimming=True, encoder_layerdrop=0.1)


@pytest.mark.parametrize("flags", ({"ponder_penalty": -1.0}, {"label_smoothing": 1.5}))
def test_criterion_refuses(flags):
    with pytest.raises(UsageError, match=f"--{list(flags)[0].replace('_', '-')} is"):
        TapePonderLoss(TapePonderLossConfig(**flags), None)


@pytest.mark.parametrize("model, config", ((AdaTapeParity, AdaTapeParityConfig), (AdaTapeViT, AdaTapeViTConfig)))
def test_checkpoints_from_before_a_flag_load(model, config):
    """fairseq does not fill in what the flags of a named architecture lack."""
    flags = {**vars(config()), **SIZES, **(PATCHES if model is AdaTapeViT else {})}
    for name in ("halting", "halting_threshold", "skimming", "skim_bias", "read_out"):
        flags.pop(name, None)
    built = model.build_model(OmegaConf.create(flags), TASKS[model])
    assert built.layers.halting is None and built.layers.router is None
