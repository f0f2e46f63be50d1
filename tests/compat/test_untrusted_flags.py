"""A string payload in every flag of every architecture, task and criterion: nothing runs, nothing is read."""

import argparse
import copy
import json

import pytest
import torch
from fairseq import checkpoint_utils, models
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from omegaconf import OmegaConf

from cli.helpers import USER_DIR
from compat.hostile import (
    CODE,
    SECRET,
    TASK,
    build,
    build_task,
    dictionary,
    model_state,
    parsed_flags,
    state_of,
    stored,
    task_for,
    watching,
)
from families import FAMILIES, build_trainer, train, write_data
from pairwise import all_cases
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint

ARCHITECTURES = {}  # of each model, the first one has the model's name where there is one of that name
for _arch in sorted(ARCH_MODEL_REGISTRY, key=lambda arch: (arch != ARCH_MODEL_NAME_REGISTRY[arch], arch)):
    ARCHITECTURES.setdefault(ARCH_MODEL_NAME_REGISTRY[_arch], []).append(_arch)
QUICK = {
    "shared_transformer_lm",
    "par_transformer_xl",
    "fconv",  # models, and tasks
    "translation",
    "language_modeling",
    "sentence_prediction",
    "question_answering",
    "translation_multi_simple_epoch",
}
# These need what is not installed (Megatron, fairscale, transformers), or more of their tasks than a test can give:
# their flags get the payload all the same, but building ends early.
UNREACHED = {
    "model_parallel_roberta",
    "model_parallel_transformer_lm",
    "pipeline_parallel_transformer",
    "hf_gpt2",
    "s2spect2_conformer",
    "s2spect_conformer",
    "s2spect_transformer",
    "s2spect_conformer_translatotron2",
    "s2ut_conformer_translatotron2",
    "speech_dlm",
    "transformer_ulm",
    "unity_conformer",
}
CRITERIONS = REGISTRIES["criterion"]
ENVIRONMENT = "${oc.env:SECRET}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, where CODE is the name of a file, too, and the environment has a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)
    for name in ("checkpoint.pt", "other.pt"):
        (tmp_path / name).touch()
    (tmp_path / CODE).write_text("1 16\na" + " 0" * 16 + "\n")
    (tmp_path / "data").mkdir()
    for name in ("dict.txt", "dict.x.txt", "dict.y.txt"):
        dictionary().save(str(tmp_path / "data" / name))
    return tmp_path


def flags_of(arch):
    """Those of stock models whose honest value is yes or no are left out, but for models in QUICK."""
    model = model_state(arch)["cfg"]["model"]
    component = ARCH_MODEL_REGISTRY[arch]
    known = parsed_flags(component, getattr(component, "__dataclass", None), arch)
    model = model if isinstance(model, dict) else vars(model)
    every = (
        all_cases() or component.__module__.startswith("fairseq_adaptive") or ARCH_MODEL_NAME_REGISTRY[arch] in QUICK
    )
    switches = set() if every else {name for name, value in {**known, **model}.items() if isinstance(value, bool)}
    return sorted({*known, *model} - {"tpu", "cpu"} - switches)


def reached(error):
    """Whether a model was built: its weights, which there are none of, are missing; or a file was refused."""
    return any(
        words in str(error)
        for words in ("loading state_dict", "another architecture", "no longer supported", "is refused")
    )


def marked(names):
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(names)]


@pytest.mark.parametrize("name", marked(ARCHITECTURES))
def test_nothing_runs_when_a_model_is_built(name, folder):
    first, *others = ARCHITECTURES[name]
    task = task_for(first)
    assert reached(build(model_state(first), task)) or name in UNREACHED
    for flag in flags_of(first):
        with watching() as seen:
            build(model_state(first, **{flag: CODE}), task)
        assert not seen, flag
    for arch in others:  # other defaults of the same model
        for flag in flags_of(arch):
            with watching() as seen:
                try:
                    ARCH_CONFIG_REGISTRY[arch](argparse.Namespace(**{flag: CODE}))
                except Exception:
                    pass
            assert not seen, (arch, flag)
    assert not (folder / "PWNED").exists()


# which is found in a file whatever model it is of
@pytest.mark.parametrize("name", marked(name for name in ARCHITECTURES if all_cases() or name in QUICK))
def test_the_environment_is_not_read(name):
    for arch in ARCHITECTURES[name][:1]:
        for flag in flags_of(arch):
            with stored(model_state(arch, **{flag: ENVIRONMENT})) as path, pytest.raises(UsageError) as refused:
                checkpoint_utils.load_checkpoint_to_cpu(path)
            assert all(each in str(refused.value) for each in (path, f"model.{flag}", ENVIRONMENT))


def test_every_model_is_tested():
    assert len(ARCH_MODEL_REGISTRY) == sum(map(len, ARCHITECTURES.values())) > 180
    assert set(MODEL_REGISTRY) >= set(ARCHITECTURES) and len(ARCHITECTURES) > 60


@pytest.mark.parametrize("name", marked(TASK_REGISTRY))
def test_nothing_runs_when_a_task_is_made(name, folder):
    known = parsed_flags(TASK_REGISTRY[name], TASK_DATACLASS_REGISTRY.get(name))
    for flag in known:
        task = {
            **TASK,
            **{key: value for key, value in known.items() if value is not None},
            "_name": name,
            "data": "data",
            flag: CODE,
        }
        if name not in TASK_DATACLASS_REGISTRY:
            task = argparse.Namespace(**task, task=name)
        with watching() as seen:
            build_task(state_of(task=task))
        assert not seen, flag
    assert not (folder / "PWNED").exists()


@pytest.mark.parametrize("name", sorted(CRITERIONS["registry"]))
def test_nothing_runs_when_a_criterion_is_built(name, folder):
    before = (folder / CODE).read_text()
    known = parsed_flags(CRITERIONS["registry"][name], CRITERIONS["dataclass_registry"].get(name))
    for flag in known:
        criterion = {**{key: value for key, value in known.items() if value is not None}, "_name": name, flag: CODE}
        if name not in CRITERIONS["dataclass_registry"]:
            criterion = argparse.Namespace(**criterion, criterion=name)
        with watching() as seen:
            build_task(state_of(criterion=criterion))
        assert not seen, flag
    assert (folder / CODE).read_text() == before and not (folder / "PWNED").exists()


def read(state, **kwargs):
    with stored(state) as path:
        return checkpoint_utils.load_checkpoint_to_cpu(path, **kwargs)


def refused(state, *words, **kwargs):
    with pytest.raises(UsageError) as error:
        read(state, **kwargs)
    assert all(word in str(error.value) for word in ("checkpoint.pt", *words)), error.value
    assert SECRET not in str(error.value)


RESOLVERS = [
    ENVIRONMENT,
    "a ${oc.env:SECRET} b",
    "${oc.decode:${oc.env:SECRET}}",
    "${oc.create:{a: 1}}",
    "${oc.dict.keys:model}",
    r"\${oc.env:SECRET}",
    "${model.${model.a}}",
    "$${model.a}{oc.env:SECRET}",
    "${oc.env:\nSECRET}",
    "${mine:}",
]


@pytest.mark.parametrize("value", RESOLVERS)
@pytest.mark.parametrize("place", ["model", "task", "nested", "list", "namespace", "args", "key", "json"])
def test_resolvers_are_refused_everywhere(value, place):
    part = {"_name": "transformer", "a": "oc.env:SECRET"}
    if place == "json":
        part["task_criterion_args"] = json.dumps({"b": value}).replace("$", "\\u0024")
    part["b"] = {
        "nested": {"c": value},
        "list": [["x", value]],
        "namespace": argparse.Namespace(c=value),
        "key": {value: 1},
    }.get(place, value if place in ("model", "task") else 1)
    state = state_of(**{"task" if place == "task" else "model": part})
    if place == "args":
        state.update(cfg=None, args=argparse.Namespace(arch="transformer", task="translation", dropout=value))
    refused(state, "is refused: its flag", "Write the value itself into the file")


def test_what_is_put_together_from_pieces_is_refused():
    model = {"_name": "transformer", "a": "$", "b": "{oc.env:SECRET}", "c": "${model.a}${model.b}"}
    refused(state_of(model=model), "model.c", "${oc.env:SECRET}")


def test_flags_may_name_each_other(tmp_path):
    model = {"_name": "transformer", "dropout": 0.3, "attention_dropout": "${model.dropout}", "x": "${.dropout}"}
    cfg = read(state_of(model=model))["cfg"]
    assert cfg.model.attention_dropout == cfg.model.x == 0.3
    assert "${" not in str(OmegaConf.to_container(cfg, resolve=False))
    refused({**state_of(model={"_name": "transformer", "x": "${model.absent}"})}, "which it lacks")


@pytest.mark.parametrize("key", ["bpe", "tokenizer", "scoring", "task", "arch", "optimizer"])
@pytest.mark.parametrize("value", ["../../other", "a.b", r"$\{oc.env:SECRET\}", ["moses", "../x"], {"a": 1}, "a=b", ""])
def test_names_of_components_are_names(key, value):
    """hydra opens bpe/../../other.yaml."""
    args = argparse.Namespace(**{"arch": "transformer", "task": "translation", key: value})
    refused({**state_of(), "cfg": None, "args": args}, f"args.{key}", "letters, digits")


def test_start_weights_are_not_read_again():
    state = state_of(
        model=argparse.Namespace(arch="transformer", encoder_embed_path=CODE, decoder_embed_path="absent"),
        criterion={"_name": "skim_loss", "distill_from": "absent.pt", "skim_factor": 0.5},
    )
    cfg = read(state)["cfg"]
    assert cfg.model.encoder_embed_path is cfg.model.decoder_embed_path is cfg.criterion.distill_from is None
    assert cfg.criterion.skim_factor == 0.5


def test_what_its_user_names_is_kept():
    state = state_of(
        criterion={"_name": "skim_loss", "distill_from": "absent.pt"},
        model={"_name": "transformer", "encoder_embed_path": "absent"},
    )
    given = {"distill_from": "mine.pt", "encoder_embed_path": "mine"}
    cfg = read(state, arg_overrides=given)["cfg"]
    assert (cfg.criterion.distill_from, cfg.model.encoder_embed_path) == ("mine.pt", "mine")


def test_files_of_a_task():
    state = state_of(task={**TASK, "_name": "translation_multi_simple_epoch", "lang_dict": CODE})
    read(state)  # where the task is the command line's
    error = build_task(state)
    assert isinstance(error, UsageError) and all(each in str(error) for each in ("task.lang_dict", CODE, "--lang-dict"))
    with stored(state) as path:
        for overrides in ({"lang_dict": None}, {"lang_dict": "mine.txt"}):
            with pytest.raises(Exception) as error:
                checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
            assert "refused" not in str(error.value)


def test_a_checkpoint_opens_no_other(monkeypatch):
    model = {"_name": "wav2vec_ctc", "w2v_path": "other.pt", "normalize": False}
    error = build(state_of(model=model), task_for("wav2vec_ctc"))
    assert isinstance(error, UsageError)
    assert all(each in str(error) for each in ("model.w2v_path", "'other.pt'", "FAIRSEQ_ADAPTIVE_TRUST=checkpoint.pt"))
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_TRUST", "elsewhere.pt:checkpoint.pt")
    with watching() as seen:
        error = build(state_of(model=model), task_for("wav2vec_ctc"))
    assert "refused" not in str(error) and not seen


def test_trust_is_the_users_to_give(monkeypatch):
    state = state_of(model={"_name": "transformer", "encoder_embed_path": CODE}, trust=True, FAIRSEQ_ADAPTIVE_TRUST="1")
    assert read(state)["cfg"].model.encoder_embed_path is None
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_TRUST", "checkpoint.pt")
    assert read(state)["cfg"].model.encoder_embed_path == CODE


def test_code_is_refused_by_name():
    arch = "shared_transformer_lm"
    error = build(model_state(arch, adaptive_softmax_cutoff=CODE), task_for(arch))
    assert isinstance(error, UsageError)
    assert all(each in str(error) for each in ("checkpoint.pt", "model.adaptive_softmax_cutoff", CODE, "literal"))


def test_flags_that_contain_themselves():
    args = argparse.Namespace(arch="transformer", task="translation")
    args.a = args
    refused({**state_of(), "cfg": None, "args": args}, "too deeply")


def test_outputs_hold_nothing_of_the_environment(tmp_path):
    torch.save(state_of(model={"_name": "transformer", "dropout": ENVIRONMENT}), tmp_path / "hostile.pt")
    with pytest.raises(UsageError, match="hostile.pt is refused: its flag model.dropout"):
        load_checkpoint(tmp_path / "hostile.pt")  # what averaging, exporting and converting read with


@pytest.mark.parametrize("arch", ["transformer", "lstm", "lightconv", "fconv"])
def test_honest_start_weights(arch, folder):
    """A model that was trained from embeddings in a file is the same without that file."""
    state, task = model_state(arch, encoder_embed_path=CODE, share_all_embeddings=False), task_for(arch)
    model = models.build_model(copy.deepcopy(state["cfg"]["model"]), task)
    assert any((weight == 0).all(-1).any() for name, weight in model.state_dict().items() if "embed_tokens" in name)
    state["model"] = model.state_dict()
    (folder / CODE).unlink()
    with stored(state) as path:
        (loaded,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], task=task)
    different = [
        name
        for name, weight in loaded.named_parameters()
        if not torch.allclose(weight, state["model"][name], rtol=0, atol=0, equal_nan=True)
    ]
    assert not different


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_honest_checkpoints_load(family, data, tmp_path):
    trainer, batches = build_trainer(family, data, "--user-dir", USER_DIR, "--max-update", "9")
    train(trainer, batches, 1)
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(tmp_path / "honest.pt"), {"train_iterator": {"epoch": 1}})
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "honest.pt")])
    weights = trainer.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    task.build_criterion(cfg.criterion)
    trained, read = (OmegaConf.to_container(each, resolve=True, enum_to_str=True) for each in (trainer.cfg, cfg))
    assert {name: read[name] for name in ("task", "criterion", "common")} == {
        name: trained[name] for name in ("task", "criterion", "common")
    }
    load_checkpoint(tmp_path / "honest.pt")
