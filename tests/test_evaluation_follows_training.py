"""What an evaluation says is what the weights of this moment say, whatever wrote them, and also without autograd."""

import argparse
import copy
import re
from argparse import Namespace

import pytest
import torch
from cli.helpers import USER_DIR, run
from families import FAMILIES, build_trainer, train, write_data
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from pairwise import all_cases

from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ops import matmul

# composite needs to be told which groups of parameters there are; cpu_adam needs deepspeed, fairseq's lamb apex
OPTIMIZERS = sorted(set(OPTIMIZER_REGISTRY) - {"composite", "cpu_adam", "lamb", "architecture_adam"})
PAIRS = [("par_supernet", "architecture_adam")]  # every family with adam, every optimizer with a third of the families
for _number, _name in enumerate(FAMILIES):
    PAIRS += [
        (_name, optimizer)
        for place, optimizer in enumerate(OPTIMIZERS)
        if optimizer == "adam" or (_number + place) % 3 == 0 or all_cases()
    ]
TRANSLATING = [name for name, family in FAMILIES.items() if family.data == "pairs"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def trained(data):
    """``trained(family, optimizer)``: a new trainer, and batches; fairseq reads a family's flags once."""
    read = {}

    def build(name, optimizer):
        if name not in read:
            read.clear()  # of one family after the other
            trainer, batches = build_trainer(name, data, "--max-update", "100", "--lr", "0.01")
            read[name] = trainer, [next(batches) for _ in range(5)]
        trainer, batches = read[name]
        cfg, task = copy.deepcopy(trainer.cfg), trainer.task
        cfg.optimizer = optimizer_config(optimizer)
        torch.manual_seed(1)
        trainer = Trainer(cfg, task, task.build_model(cfg.model), trainer.criterion)
        trainer.begin_epoch(1)
        return trainer, batches

    return build


@pytest.fixture(autouse=True)
def small_products_count(monkeypatch):
    """Products of these tiny models take the ways of large ones."""
    monkeypatch.setattr(matmul, "LEAST", 1)


def optimizer_config(name):
    dataclass = REGISTRIES["optimizer"]["dataclass_registry"].get(name)
    if dataclass is not None:
        cfg = OmegaConf.structured(dataclass)
    else:
        parser = argparse.ArgumentParser()
        OPTIMIZER_REGISTRY[name].add_args(parser)
        cfg = OmegaConf.create(vars(parser.parse_args([])))
        cfg.lr = [0.01]
    cfg._name = name
    return cfg


def built_anew(trainer):
    """The model as a command builds it that loads the checkpoint of this moment."""
    model = trainer.task.build_model(trainer.cfg.model)
    model.load_state_dict({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
    return model


def losses(trainer, model, batches):
    """What a validation sees, batch by batch."""
    found = []
    model.eval(), trainer.criterion.eval()
    with constant_weights():
        for batch in batches:
            torch.manual_seed(7)
            loss, size, _ = trainer.task.valid_step(batch, model, trainer.criterion)
            found.append(float(loss) / float(size))
    return found


@pytest.mark.parametrize("name, optimizer", PAIRS, ids=[f"{name}-{optimizer}" for name, optimizer in PAIRS])
def test_validation_in_a_training_is_that_of_its_checkpoint(name, optimizer, trained):
    trainer, batches = trained(name, optimizer)
    seen = []
    for batch in batches[:3]:
        train(trainer, [batch], 1)
        seen.append(losses(trainer, trainer.model, batches[3:]))
        assert seen[-1] == pytest.approx(losses(trainer, built_anew(trainer), batches[3:]), rel=1e-5)
    assert seen[0] != seen[1] != seen[2], "the training did not change what the model says"


def generate(task, model, batch, generator=None):
    """The words and scores of the best hypotheses, by the generator that the commands build."""
    generator = generator or task.build_generator([model], Namespace(beam=3, max_len_b=12))
    found = task.inference_step(generator, [model], batch)
    return [(each["tokens"].tolist(), float(each["score"])) for hypotheses in found for each in hypotheses]


def same(ours, theirs):
    assert [words for words, _ in ours] == [words for words, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], rel=1e-5)


def change(model, _):
    """As averages in place, merged adapters and optimizers do."""
    for parameter in model.parameters():
        parameter.data.mul_(1.5).add_(0.1 * torch.rand_like(parameter))


def move(model, weights):
    """As a copy of an average does (fairseq's EMA)."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


@pytest.mark.parametrize(
    "write", (change, move, lambda model, weights: model.load_state_dict(weights)), ids=("in place", "average", "load")
)
@pytest.mark.parametrize("name", TRANSLATING)
def test_generation_follows_the_weights(name, write, trained):
    trainer, batches = trained(name, "adam")
    first = generate(trainer.task, fast(trainer.model), batches[0])
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    torch.manual_seed(3)
    write(trainer.model, {name: weight + 0.3 * torch.randn_like(weight) for name, weight in before.items()})
    found = generate(trainer.task, trainer.model, batches[0])
    assert found != first
    same(found, generate(trainer.task, fast(built_anew(trainer)), batches[0]))


def fast(model):
    model.eval().make_generation_fast_()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_in_inference_mode(name, trained):
    """Of the weights of a training, and of a model that is built in that mode."""
    trainer, batches = trained(name, "adam")
    expected = losses(trainer, trainer.model, batches[:2])
    with torch.inference_mode():
        assert losses(trainer, trainer.model, batches[:2]) == pytest.approx(expected, rel=1e-5)
        model = built_anew(trainer)
        assert losses(trainer, model, batches[:2]) == pytest.approx(expected, rel=1e-5)
        if name in TRANSLATING:
            same(generate(trainer.task, fast(model), batches[0]), generate(trainer.task, model, batches[0]))
    assert losses(trainer, trainer.model, batches[:2]) == pytest.approx(expected, rel=1e-5)
    train(trainer, batches[:1], 1)  # nothing that inference mode made is left in the way of a training
    if name in TRANSLATING:
        with torch.inference_mode():
            found = generate(trainer.task, fast(trainer.model), batches[0])
        same(found, generate(trainer.task, trainer.model, batches[0]))


@pytest.mark.slow
def test_fairseq_train_logs_what_fairseq_validate_says(tmp_path):
    """The log of a training with three validations, beside fairseq-validate of the checkpoints saved there."""
    words = (
        torch.randint(0, 200, (20000,), generator=torch.Generator().manual_seed(1)).cumsum(0).remainder(200).tolist()
    )
    lines = [" ".join(f"w{word}" for word in words[start : start + 20]) for start in range(0, len(words), 20)]
    for split, text in (("train", lines[:900]), ("valid", lines[900:])):
        (tmp_path / f"{split}.txt").write_text("\n".join(text) + "\n")
    run(
        "fairseq-preprocess",
        "--only-source",
        "--trainpref",
        tmp_path / "train.txt",
        "--validpref",
        tmp_path / "valid.txt",
        "--destdir",
        tmp_path / "bin",
    )
    task = ["--task", "segmented_language_modeling", "--tokens-per-sample", "32", "--batch-size", "16"]
    log = run(
        "fairseq-train",
        tmp_path / "bin",
        "--user-dir",
        USER_DIR,
        *task,
        "--arch",
        "par_transformer_xl",
        "--layout",
        "af*2",
        "--memory-length",
        "32",
        "--decoder-embed-dim",
        "128",
        "--decoder-ffn-embed-dim",
        "256",
        "--decoder-attention-heads",
        "4",
        "--optimizer",
        "adam",
        "--lr",
        "0.002",
        "--max-update",
        "30",
        "--validate-interval-updates",
        "10",
        "--save-interval-updates",
        "10",
        "--log-format",
        "simple",
        "--save-dir",
        tmp_path / "run",
        "--num-workers",
        "0",
    ).stdout
    logged = dict(re.findall(r"valid on 'valid' subset \|.*? loss ([\d.]+) .*num_updates (\d+)", log))
    logged = {updates: loss for loss, updates in logged.items()}
    assert len(logged) == 3 and len(set(logged.values())) == 3
    for updates, loss in logged.items():
        (checkpoint,) = (tmp_path / "run").glob(f"checkpoint_*_{updates}.pt")
        said = run("fairseq-validate", tmp_path / "bin", "--user-dir", USER_DIR, *task, "--path", checkpoint).stdout
        assert re.search(r" loss ([\d.]+) ", said)[1] == loss
