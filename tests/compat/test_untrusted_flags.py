"""A string payload in every flag of every registered architecture, task and criterion: nothing runs, nothing is read."""

import argparse
import copy
import json

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from omegaconf import OmegaConf

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
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint

ARCHITECTURES = {}  # of each model, the first one has the model's name where there is one of that name
for _arch in sorted(ARCH_MODEL_REGISTRY, key=lambda arch: (arch != ARCH_MODEL_NAME_REGISTRY[arch], arch)):
    ARCHITECTURES.setdefault(ARCH_MODEL_NAME_REGISTRY[_arch], []).append(_arch)
QUICK = {"shared_transformer", "shared_transformer_lm", "par_transformer_xl", "albert_act", "transkimmer",
         "adatape_parity", "transformer_lm", "fconv", "lstm"}
# these need what is not installed (Megatron), or more of their tasks than a test can give: their flags are given all
# the same, but building ends early
UNREACHED = {"model_parallel_roberta", "s2spect2_conformer", "s2spect_conformer", "s2spect_transformer",
             "s2ut_conformer_translatotron2", "s2spect_conformer_translatotron2", "speech_dlm", "transformer_ulm",
             "unity_conformer"}
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
    model = model_state(arch)["cfg"]["model"]
    component = ARCH_MODEL_REGISTRY[arch]
    known = parsed_flags(component, getattr(component, "__dataclass", None), arch)
    return sorted({*known, *(model if isinstance(model, dict) else vars(model))} - {"tpu", "cpu"})


def reached(error):
    """Whether a model was built: its weights, which there are none of, are missing; or a file was refused."""
    return any(words in str(error) for words in ("loading state_dict", "no longer supported", "is refused"))


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


@pytest.mark.parametrize("name", marked(ARCHITECTURES))
def test_the_environment_is_not_read(name):
    for arch in ARCHITECTURES[name][:1]:
        for flag in flags_of(arch):
            with stored(model_state(arch, **{flag: ENVIRONMENT})) as path, pytest.raises(UsageError) as refused:
                checkpoint_utils.load_checkpoint_to_cpu(path)
            assert all(each in str(refused.value) for each in (path, f"model.{flag}", ENVIRONMENT))


def test_every_model_is_tested():
    assert len(ARCH_MODEL_REGISTRY) == sum(map(len, ARCHITECTURES.values())) > 180
    assert set(MODEL_REGISTRY) >= set(ARCHITECTURES) and len(ARCHITECTURES) > 60


@pytest.mark.parametrize("name", sorted(TASK_REGISTRY))
def test_nothing_runs_when_a_task_is_made(name, folder):
    known = parsed_flags(TASK_REGISTRY[name], TASK_DATACLASS_REGISTRY.get(name))
    for flag in known:
        task = {**TASK, **{key: value for key, value in known.items() if value is not None}, "_name": name,
                "data": "data", flag: CODE}
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
