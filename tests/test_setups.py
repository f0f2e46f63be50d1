"""Trainings that would train something else than their flags say are refused, or say so in one warning."""

import argparse
import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from families import build_trainer, write_data
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks.fairseq_task import StatefulContainer
from models.test_policy_flags import FAMILIES, made
from old_checkpoints.cases import flags_of, inputs, task
from omegaconf import OmegaConf

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.par_transformer_xl import PARTransformerXLModel
from fairseq_adaptive.models.without_effect import CRITERION, MODEL, without_effect
from fairseq_adaptive.modules.policies import Policy
from fairseq_adaptive.modules.policies.registry import _REGISTERED
from fairseq_adaptive.setups import check_setup

LOGGERS = ("fairseq_adaptive.setups", "fairseq_adaptive.models.without_effect")
READER = {"reader": "tape", "reader_args": '{"tokens": 4, "bank_size": 20, "depth": 1}'}


def criterion(name, **flags):
    owner = CRITERION_REGISTRY[name]
    defaults = {
        each.name: each.default
        for each in dataclasses.fields(getattr(owner, "__dataclass"))
        if each.default is not dataclasses.MISSING and not str(each.default).startswith("${")
    }
    words = task()
    words.state = StatefulContainer()
    given = {**defaults, "task_criterion": "cross_entropy", "_name": name, "sentence_avg": False, **flags}
    root = OmegaConf.create({"criterion": given, "optimization": {"sentence_avg": False}})
    return owner.build_criterion(root.criterion, words), given


def check(family, loss="cross_entropy", optimizer="adam", given=None, **flags):
    """The check of a training of a family; ``given`` are flags of the criterion."""
    built, config = criterion(loss, **(given or {}))
    model = flags_of(family, {**FAMILIES[family], **flags})
    cfg = SimpleNamespace(
        model=argparse.Namespace(**model),
        criterion=argparse.Namespace(**config),
        optimizer=argparse.Namespace(_name=optimizer),
    )
    check_setup(cfg, made(family, **flags), built)


def warnings(caplog, *args, **flags):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check(*args, **flags)
    return [record.getMessage() for record in caplog.records if record.name in LOGGERS]


@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "par_supernet"])
def test_plain_training_is_silent(family, caplog):
    plain = {"albert_act": {"halting": "none"}, "transkimmer": {"no_skimming": True}}.get(family, {})
    loss = "adaptive_compute_loss" if "adatape" in family else "cross_entropy"
    assert warnings(caplog, family, loss, **plain) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_without_a_price(family, caplog):
    flags = {"halting": "act"}
    said = warnings(caplog, family, optimizer="architecture_adam", **flags)
    assert len(said) == 1 and "act" in said[0].split(":")[0] and "adaptive_compute_loss" in said[0]
    said = warnings(caplog, family, "adaptive_compute_loss", optimizer="architecture_adam", **flags)
    assert said == []
    said = warnings(caplog, family, "ponder_loss", optimizer="architecture_adam", **flags)
    others = {"transkimmer": "skimming", "par_supernet": "search"}.get(family, "tape" if "adatape" in family else None)
    assert [each.split(":")[0] for each in said] == ([others] if others else [])


@pytest.mark.parametrize(
    "flags", ({"router": "skimming"}, {"router": "mixture_of_depths"}, {"halting": "pondernet"}, READER), ids=str
)
def test_every_priced_policy_is_named(flags, caplog):
    (said,) = warnings(caplog, "shared_transformer", **flags)
    assert said.startswith(next(iter(flags.values())))


@pytest.mark.parametrize("rule", ("saturation", "margin"))
def test_exit_by_confidence_has_no_price(rule, caplog):
    assert warnings(caplog, "shared_transformer", decoder_halting=rule) == []


@pytest.mark.parametrize(
    "family, loss, given, flags, said",
    (
        ("shared_transformer", "ponder_loss", {"target_depth": 2.0}, {"halting": "saturation"}, "set --halting-thresh"),
        ("albert_act", "ponder_loss", {"target_depth": 2.0}, {"halting": "pondernet"}, "set --prior-rate to 1 over"),
        ("shared_transformer", "ponder_loss", {"target_depth": 2.0}, {"decoder_halting": "patience"}, "depths_agreed"),
        (
            "shared_transformer_lm",
            "adaptive_compute_loss",
            {"target_flops": 0.5},
            {
                "router": "token_choice",
                "layer_sharing": "middle_cycle",
                "decoder_layers": 8,
                "decoder_unique_layers": 4,
            },
            "--router-args",
        ),
    ),
)
def test_targets_that_steer_nothing(family, loss, given, flags, said):
    with pytest.raises(UsageError, match=f"--target-(depth|flops) cannot steer .*{said}"):
        check(family, loss, given=given, **flags)


def test_targets_steer_what_can_be_steered():
    check("shared_transformer", "ponder_loss", given={"target_depth": 2.0}, halting="act")
    check("shared_transformer_lm", "skim_loss", given={"target_flops": 0.5}, router="mixture_of_depths")
    check(
        "shared_transformer",
        "ponder_loss",
        given={"target_depth": 2.0},
        encoder_halting="act",
        decoder_halting="saturation",
    )


def test_every_policy_says_whether_it_is_steered():
    """Where ``lever`` is always None, a target would steer nothing without a word."""
    seen = 0
    for policy in (each for kind in _REGISTERED.values() for each in kind.values()):
        if policy.__module__.startswith("fairseq_adaptive.") and policy.lever is not Policy.lever:
            none = policy.lever.__code__.co_consts[1:] in ((), (None,)) and not policy.lever.__code__.co_names
            assert none == (bool(policy.unsteered) or policy.movable), policy
            seen += none
    assert seen >= 4


def test_search_with_a_plain_optimizer(caplog):
    said = warnings(caplog, "par_supernet", "architecture_entropy_loss", given={"label_smoothing": 0.0})
    assert len(said) == 1 and said[0].startswith("--optimizer adam trains the architecture as")
    loss = {"given": {"label_smoothing": 0.0}}
    assert warnings(caplog, "par_supernet", "architecture_entropy_loss", "architecture_adam", **loss) == []


@pytest.mark.parametrize(
    "family, flags, said",
    (
        *((family, {"halting": "none", "halting_threshold": 0.5}, "--halting-threshold") for family in FAMILIES),
        *((family, {"halting": "none", "exit_quantile": 0.5}, "--exit-quantile") for family in FAMILIES),
        ("shared_transformer", {"encoder_halting": "act", "decoder_halting_threshold": 0.5}, "--decoder-halting-thr"),
        ("shared_transformer", {"encoder_halting": "act", "decoder_exit_quantile": 0.5}, "--decoder-exit-quantile"),
        ("shared_transformer", {"decoder_halting": "act", "encoder_exit_quantile": 0.5}, "--encoder-exit-quantile"),
        *(
            (
                "shared_transformer",
                {f"{side}_{kind}_args": '{"bias": 1}', f"{other}_{kind}": name},
                f"--{side}-{kind}-args",
            )
            for side, other in (("encoder", "decoder"), ("decoder", "encoder"))
            for kind, name in (("halting", "act"), ("router", "skimming"))
        ),
        ("shared_transformer", {"encoder_reader_args": '{"tokens": 4}'}, "--encoder-reader-args"),
        *(  # of a policy that no side has from them
            ("shared_transformer", {name: value, "halting": "act", **of_sides}, "--halting-")
            for name, value, of_sides in (
                ("halting_args", '{"bias": 1}', {"encoder_halting": "ut_act", "decoder_halting": "none"}),
                ("halting_threshold", 0.5, {"encoder_halting_threshold": 0.6, "decoder_halting_threshold": 0.7}),
                ("halting_threshold", 0.5, {"encoder_halting": "none", "decoder_halting": "none"}),
            )
        ),
        (
            "shared_transformer",
            {"halting": "act", "encoder_halting": "none", "encoder_halting_threshold": 0.5},
            "--encod",
        ),
        ("transkimmer", {"router": "none"}, "--router"),
        *(
            ("shared_transformer", {name: True}, "--" + name.replace("_", "-"))
            for name in ("adaptive_input", "tie_adaptive_weights", "tie_adaptive_proj")
        ),
        *(
            (family, {name: value}, "--" + name.replace("_", "-"))
            for family in ("transkimmer", "adatape")
            for name, value in (
                ("mha_reg_scale_factor", 0.1),
                ("ffn_reg_scale_factor", 0.1),
                ("mha_heads_to_keep", 1),
                ("ffn_blocks_to_remove", 1),
            )
        ),
    ),
)
def test_flag_that_changes_nothing_is_refused(family, flags, said):
    with pytest.raises(UsageError, match=f"{said}.* changes nothing without .*: add that, or leave it out"):
        check(family, optimizer="architecture_adam", **flags)


_PLAIN_TAPE = {
    "tape_threshold": 3.0,
    "tape_cost": "max",
    "tape_query": "first",
    "tape_query_update": "replace",
    "tape_key_dim": 2,
    "tape_mlp_dim": 9,
    "tape_ffn_embed_dim": 9,
    "tape_layer": 2,
    "tape_allow_exhausted": True,
    "tape_query_noise": 0.5,
    "tape_bank_dropout": 0.5,
    "tape_bank_size": 40,
}
_CHARACTERS = {"character_embeddings": True, "character_filters": "[(1, 8)]"}
_CUTOFFS = {"adaptive_softmax_cutoff": "10,20", "adaptive_softmax_factor": 2.0}
_FAIRSEQS = ("shared_transformer", "shared_transformer_lm")
NO_EFFECT = (
    *(
        ("transkimmer", {name: value}, {"no_skimming": True})
        for name, value in (("skim_bias", 1.0), ("skim_noise", 0.5))
    ),
    ("transkimmer", {"protect_separators": True}, {"no_skimming": True}),
    *((family, {"skim_bias": 1.0}, {}) for family in ("adatape", "adatape_parity", "adatape_vit")),
    *(("adatape", {name: value}, {"tape_tokens": 0}) for name, value in _PLAIN_TAPE.items()),
    ("adatape_vit", {"tape_bank": "learned"}, {"tape_tokens": 0}),
    ("adatape_vit", {"tape_bank_size": 30}, {}),
    ("adatape_vit", {"tape_bank_patch_size": 4}, {"tape_bank": "learned", "tape_bank_size": 40}),
    *(
        (family, {name: value}, {})
        for family in ("transkimmer", "adatape", "adatape_vit")
        for name, value in (("layer_sharing", "sequence"), ("depth_lora_rank", 2))
    ),
    ("par_transformer_xl", {"layer_sharing": "sequence"}, {}),
    *(
        (family, {"adaptive_softmax_dropout": 0.5}, {})
        for family in ("shared_transformer", "shared_transformer_lm", "par_transformer_xl", "par_supernet")
    ),
    ("shared_transformer_lm", {"tie_adaptive_proj": True}, {}),
    (
        "shared_transformer_lm",
        {"adaptive_input": True},
        {**_CHARACTERS, "adaptive_input_cutoff": "5,10", "adaptive_input_factor": 2.0},
    ),
    ("shared_transformer_lm", {"decoder_input_dim": 12}, _CHARACTERS),
    ("shared_transformer_lm", {"share_decoder_input_output_embed": True}, _CUTOFFS),
    *((family, {"no_decoder_final_norm": True}, {}) for family in ("shared_transformer", "shared_transformer_lm")),
    *((family, {"relu_dropout": 0.3}, {"activation_dropout": 0.2}) for family in _FAIRSEQS),
    *((family, {"decoder_learned_pos": True}, {"no_token_positional_embeddings": True}) for family in _FAIRSEQS),
    ("shared_transformer", {"encoder_learned_pos": True}, {"no_token_positional_embeddings": True}),
    *(
        (family, {name: value}, {})
        for family in _FAIRSEQS
        for name, value in (("base_shuffle", 0), ("base_sublayers", 2))
    ),
    ("shared_transformer", {"char_inputs": True}, {}),
    ("shared_transformer", {"alignment_layer": 0}, {"no_cross_attention": True}),
    ("shared_transformer", {"alignment_heads": 1}, {"no_cross_attention": True}),
    *(
        (family, {name: value}, {})
        for family in (*_FAIRSEQS, "par_transformer_xl")
        for name, value in (("layerdrop_by_depth", "exponential"), ("layerdrop_warmup_updates", 10))
    ),
    ("adatape_parity", {"tape_query": "first"}, {}),
    ("adatape", {"tape_cost": "max"}, {"tape_threshold": 3.0}),
    ("adatape", {"layer_sharing": "sequence"}, {"encoder_unique_layers": 1}),
    *(("shared_transformer_lm", {name: 2.0}, {}) for name in ("adaptive_softmax_factor", "adaptive_input_factor")),
    ("shared_transformer_lm", {"adaptive_input_cutoff": "10,20"}, {}),
    ("shared_transformer_lm", {"character_embedding_dim": 16}, {}),
    ("shared_transformer_lm", {"character_filters": "[(1, 32)]"}, {}),
    ("shared_transformer_lm", {"char_embedder_highway_layers": 3}, {}),
    ("shared_transformer", {"quant_noise_pq_block_size": 4}, {}),
)


def _answer(family, **flags):
    model = made(family, **flags)
    given = inputs("shared_transformer_lm" if family.startswith("par_") else family)
    torch.manual_seed(2)
    return model.state_dict(), model.train()(**given)[0]


@pytest.mark.parametrize(
    "family, flag, others", NO_EFFECT, ids=[f"{each[0]}-{next(iter(each[1]))}" for each in NO_EFFECT]
)
def test_flag_that_changes_nothing_is_said(family, flag, others, caplog):
    """And it is true: the model is that without the flag."""
    found = [
        each for each in warnings(caplog, family, **flag, **others) if each.startswith("these flags change nothing")
    ]
    assert len(found) == 1 and f"--{next(iter(flag)).replace('_', '-')} without " in found[0]
    (one, answer), (other, same) = _answer(family, **flag, **others), _answer(family, **others)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(answer, same)


def test_every_need_was_tried():
    tried = {name for _, flag, _ in NO_EFFECT for name in flag}
    assert {name for need in MODEL for name in need.names if not need.refused} == tried


@pytest.mark.parametrize(
    "loss, given, said",
    (
        ("ponder_loss", {"target_depth_rate": 0.5}, "--target-depth-rate without --target-depth"),
        ("ponder_loss", {"target_depth": 2.0, "time_penalty": 0.5}, "--time-penalty without no --target-depth"),
        ("skim_loss", {"target_flops_gain": 2.0}, "--target-flops-gain without --target-flops"),
        ("skim_loss", {"distill_weight": 2.0}, "--distill-weight without --distill-from"),
        ("ponder_loss", {"kl_weight": 0.1}, "--kl-weight without --halting pondernet"),
        ("ponder_loss", {"prior_rate": 0.1}, "--prior-rate without --halting pondernet"),
    ),
)
def test_flag_of_a_criterion_that_changes_nothing(loss, given, said, caplog):
    assert any(said in each for each in warnings(caplog, "shared_transformer", loss, given=given, halting="act"))


def test_needs_are_of_flags_that_there_are():
    models = {name for family in FAMILIES for name in flags_of(family, FAMILIES[family])}
    configs = [getattr(each, "__dataclass", None) for each in CRITERION_REGISTRY.values()]
    fields = {name for each in configs if each is not None for name in each.__dataclass_fields__}
    known = models | {f"{side}_halting_{name}" for side in ("encoder", "decoder") for name in ("threshold", "args")}
    known |= {"encoder_router_args", "decoder_router_args", "encoder_reader_args", "char_inputs"}
    known |= {"alignment_layer", "alignment_heads", "encoder_exit_quantile", "decoder_exit_quantile"}
    pruning = {"mha_reg_scale_factor", "ffn_reg_scale_factor", "mha_heads_to_keep", "ffn_blocks_to_remove"}
    parsers = {"character_filters", "character_embedding_dim", "char_embedder_highway_layers"}
    assert {name for need in MODEL for name in need.names} <= known | pruning | parsers
    assert {name for need in CRITERION for name in need.names} <= fields
    assert without_effect({}, {}, MODEL + CRITERION) == []


@pytest.mark.parametrize("arch", ("par_transformer_xl", "par_supernet"))
def test_task_without_memory(arch, caplog):
    with caplog.at_level(logging.WARNING):
        made(arch)
        assert "--memory-length 5 is not used" in caplog.text and "segmented_language_modeling" in caplog.text
        caplog.clear()
        made(arch, memory_length=0)
        PARTransformerXLModel.warn_of_forgetting(SimpleNamespace(memory_length=5), SimpleNamespace(takes_memory=True))
    assert "--memory-length" not in caplog.text


@pytest.mark.parametrize(
    "family", ("shared_transformer", "shared_transformer_lm", "par_transformer_xl", "par_supernet")
)
@pytest.mark.parametrize("cutoffs", ("10,10", "20,10", "0,10", "10,5000"))
def test_wrong_cutoffs(family, cutoffs):
    flags = {"share_all_embeddings": False} if family == "shared_transformer" else {}
    with pytest.raises(UsageError, match="adaptive cutoffs must be increasing numbers"):
        made(family, adaptive_softmax_cutoff=cutoffs, **flags)
    if family == "shared_transformer_lm":
        with pytest.raises(UsageError, match=f"--adaptive-input-cutoff {cutoffs}: adaptive cutoffs must be"):
            made(family, adaptive_input=True, adaptive_input_cutoff=cutoffs)


def test_trainer_asks(tmp_path):
    """fairseq-train does, before the first update."""
    folder = write_data(tmp_path / "data")
    with pytest.raises(UsageError, match="--halting-threshold changes nothing without --halting"):
        build_trainer("shared_transformer", folder, "--halting-threshold", "0.5")


def test_all_models_are_ours():
    ours = {ARCH_MODEL_REGISTRY[family] for family in FAMILIES}
    assert len(ours) == len(FAMILIES)
