"""Every preset is the same model under fairseq-train and fairseq-hydra-train, and what a user gives is kept."""

import argparse
import contextlib
import io
import pickle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    build_model,
)
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import fairseq_adaptive.plugin  # noqa: F401  registers models
from fairseq_adaptive.models.defaults import fill_architecture, fill_defaults, with_defaults
from fairseq_adaptive.models.par_supernet import PARSupernetConfig
from fairseq_adaptive.report.flags import ours

OURS = [name for name, model in ARCH_MODEL_REGISTRY.items() if model.__module__.startswith("fairseq_adaptive.")]
STOCK = ["transformer_lm", "transformer_lm_gpt", "transformer_lm_gpt2_tiny", "transformer_lm_wiki103"]
TASKS = {"shared_transformer": "translation", "shared_transformer_lm": "language_modeling"}
TASKS.update(dict.fromkeys(("albert_act", "transkimmer", "adatape"), "masked_lm"))


SLOW = pytest.mark.slow


class Words(Dictionary):
    """As many words as the largest preset has cutoffs for."""

    def __init__(self):
        super().__init__()
        self.count = [*self.count, *[1] * 210000]

    def __len__(self):
        return len(self.count)


def task(cfg):
    words = Words()
    return SimpleNamespace(
        source_dictionary=words,
        target_dictionary=words,
        dictionary=words,
        cfg=SimpleNamespace(**{"sequence_length": 64, "tokens_per_sample": 512, **(cfg.task or {})})
        if OmegaConf.is_config(cfg.task)
        else SimpleNamespace(sequence_length=64),
        image_size=(224, 224),
        channels=3,
        classes=range(10),
        max_positions=lambda: None,
    )


def _task_of(arch):
    return TASKS.get(ARCH_MODEL_NAME_REGISTRY[arch], "language_modeling")


def by_train(arch, *flags):
    """The configuration of ``fairseq-train --arch ARCH``."""
    command = ["nowhere", "--task", _task_of(arch), "--arch", arch, "--max-update", "7", *flags]
    with contextlib.redirect_stderr(io.StringIO()):
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    add_defaults(cfg)  # as fairseq_cli.train.main
    return cfg


def by_hydra(arch, **flags):
    """The configuration of ``fairseq-hydra-train model._name=ARCH``, as fairseq_cli.train.main makes it."""
    cfg = OmegaConf.structured(FairseqConfig)
    OmegaConf.set_struct(cfg, False)
    cfg.task, cfg.model = {"_name": _task_of(arch), "data": "nowhere"}, {"_name": arch, **flags}
    cfg.optimization.max_update = 7
    add_defaults(cfg)
    return cfg


def built(cfg, arch):
    """The flags that a model is built from, and how many parameters it has."""
    owner, seen = ARCH_MODEL_REGISTRY[arch], []
    parser = argparse.ArgumentParser(add_help=False)
    owner.add_args(parser)
    known = {action.dest for action in parser._actions}
    stock = owner.build_model.__func__

    def build(cls, args, task):
        model = stock(cls, args, task)
        seen.append(getattr(model, "args", None) or args)
        return model

    on_meta = mock.patch.object(torch.Tensor, "cpu", lambda self: self)  # RoBERTa's initialisation asks for it
    with mock.patch.object(owner, "build_model", classmethod(build)), on_meta, torch.device("meta"):
        model = build_model(cfg.model, task(cfg))
    (args,) = seen
    values = {name: getattr(args, name, None) for name in sorted(known)}
    values = {
        name: value if isinstance(value, (int, float, type(None))) else str(value) for name, value in values.items()
    }
    return values, sum(each.numel() for each in model.parameters())


QUICK = {"transformer_xl_wt103_base", "adatape_vit_mini", "shared_transformer_lm_wikitext103", "transkimmer_minilm_l6"}
QUICK |= {"albert_act_small", "adatape_tiny", "mixture_of_recursions_tiny", "transformer_lm_gpt2_tiny"}


@pytest.mark.parametrize("arch", [each if each in QUICK else pytest.param(each, marks=SLOW) for each in OURS + STOCK])
def test_both_front_ends_build_one_model(arch):
    by_command, parameters = built(by_train(arch), arch)
    by_config, same = built(by_hydra(arch), arch)
    assert {n: (v, by_config[n]) for n, v in by_command.items() if v != by_config[n]} == {}
    assert parameters == same > 0


def test_presets_differ():
    """The models that the issue names: neither is its model's default."""
    assert built(by_hydra("transformer_xl_wt103_base"), "transformer_xl_wt103_base")[0]["layout"] == "af*16"
    assert built(by_hydra("adatape_vit_mini"), "adatape_vit_mini")[0]["encoder_embed_dim"] == 64


# a preset, a value that is its model's default and not the preset's, and how fairseq-train is told of it
GIVEN = [
    ("transformer_xl_wt103_large", {"dropout": 0.1}, ["--dropout", "0.1"]),
    ("transformer_xl_wt103_large", {"dropout": 0.0}, ["--dropout", "0"]),
    ("transformer_xl_wt103_base", {"share_decoder_input_output_embed": False, "tie_adaptive_proj": False}, None),
    ("mixture_of_depths_lm_tiny", {"router": "none", "router_args": ""}, ["--router", "none", "--router-args", ""]),
    ("adatape_vit_mini", {"tape_tokens": 0}, ["--tape-tokens", "0"]),
    ("adatape_vit_mini", {"patch_size": 16, "tape_bank_patch_size": 8}, ["--patch-size", "16"]),
    ("shared_transformer_tiny", {"encoder_layers": 12}, ["--encoder-layers", "12"]),
    ("transkimmer_bert_base", {"token_types": 0}, ["--token-types", "0"]),
    ("shared_transformer_lm_wikitext103", {"decoder_layers": 6}, ["--decoder-layers", "6"]),
]


@pytest.mark.parametrize("arch, given, flags", GIVEN, ids=[f"{arch}-{next(iter(each))}" for arch, each, _ in GIVEN])
def test_what_is_given_is_kept(arch, given, flags):
    """False, 0 and "none" are given."""
    found = [built(by_hydra(arch, **given), arch)[0]]
    if flags is not None:
        found.append(built(by_train(arch, *flags), arch)[0])
    for each in found:
        name = next(iter(given))
        assert each[name] == given[name]


@pytest.mark.parametrize("arch", sorted({ARCH_MODEL_NAME_REGISTRY[arch] for arch in OURS}))
def test_none_is_not_given(arch):
    """``null`` in a configuration is no value."""
    stock = built(by_hydra(arch), arch)
    named = {name: None for name, value in stock[0].items() if value is not None}
    if ARCH_MODEL_NAME_REGISTRY[arch] in MODEL_DATACLASS_REGISTRY:
        config = MODEL_DATACLASS_REGISTRY[ARCH_MODEL_NAME_REGISTRY[arch]]
        named = {n: None for n in named if not str(config.__dataclass_fields__[n].default).startswith("${")}
    assert built(by_hydra(arch, **named), arch) == stock


def test_fill_defaults():
    args = argparse.Namespace(no=False, zero=0, none=None, named="none")
    fill_defaults(args, no=True, zero=1, none=2, named="act", absent=3)
    assert vars(args) == {"no": False, "zero": 0, "none": 2, "named": "none", "absent": 3}
    fill_architecture(args, lambda given: setattr(given, "none", getattr(given, "none", 4) + 1))
    assert args.none == 3
    found = with_defaults(argparse.Namespace(blocks=None, dropout=0), PARSupernetConfig)
    assert (found.blocks, found.dropout, hasattr(found, "temperature_updates")) == (32, 0, False)


def _with_arguments():
    """The presets whose policies have arguments of the preset's, and of what kind."""
    for arch in OURS:
        args = argparse.Namespace()
        ARCH_CONFIG_REGISTRY.get(arch, lambda args: None)(args)
        yield from ((arch, kind) for kind in ("router", "halting", "reader") if getattr(args, f"{kind}_args", None))


@pytest.mark.parametrize("arch, kind", _with_arguments())
def test_another_policy_does_not_get_the_arguments_of_the_preset(arch, kind):
    assert getattr(by_train(arch).model, f"{kind}_args")
    other = by_train(arch, f"--{kind}", "none").model
    assert getattr(other, kind) == "none" and not getattr(other, f"{kind}_args")
    built(by_train(arch, f"--{kind}", "none"), arch)
    own = by_train(arch, f"--{kind}-args", "{}").model
    assert getattr(own, f"{kind}_args") == "{}"


def test_every_model_and_criterion_is_in_a_group_of_hydra():
    """``fairseq-hydra-train model=shared_transformer``: fairseq puts there what has a dataclass."""
    store = ConfigStore.instance().repo
    for kind, name, owner in ours():
        if kind in ("model", "criterion"):
            assert f"{name}.yaml" in store[kind], name
            config = getattr(owner, "__dataclass")
            assert pickle.loads(pickle.dumps(config)) is config
