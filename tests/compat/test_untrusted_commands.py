"""Every command that opens a checkpoint, given one whose flags are code, or read the environment."""

import json
from pathlib import Path

import pytest
import torch
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from cli.helpers import USER_DIR, run
from compat.hostile import CODE, SECRET, TASK, AnyTask, dictionary, model_state
from fairseq_adaptive.criterions.distillation import Teacher
from fairseq_adaptive.errors import UsageError

SCRIPTS = Path(USER_DIR).parent / "scripts"
HUB = """
import sys, fairseq_adaptive.plugin
from fairseq.models.transformer import TransformerModel
TransformerModel.from_pretrained("FOLDER", "code.pt", "DATA")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with code in a flag, one that reads the environment, and what the commands read before them."""
    folder = tmp_path_factory.mktemp("hostile")
    arch, data = "shared_transformer_lm", folder / "data"
    tasks = {
        "code": {"_name": "translation", "source_lang": "x", "target_lang": "y"},
        "sentences": {"_name": "sentence_prediction", "num_classes": 2, "regression_target": False},
        "questions": {"_name": "question_answering"},
        "tape": {"_name": "language_modeling"},
    }
    for name, task in tasks.items():
        state = model_state(arch, adaptive_softmax_cutoff=CODE)
        known = vars(TASK_DATACLASS_REGISTRY[task["_name"]]())
        flags = {key: value for key, value in {**TASK, **task, "data": str(data)}.items() if key in known}
        state["cfg"]["task"] = flags
        torch.save(state, folder / f"{name}.pt")
    torch.save(model_state(arch, activation_fn="${oc.env:SECRET}"), folder / "environment.pt")
    for part in ("", "input0"):
        (data / part).mkdir()
        for language in ("", "x.", "y."):
            dictionary().save(str(data / part / f"dict.{language}txt"))
    (data / "label").mkdir()
    (data / "label" / "dict.txt").write_text("good 1\nbad 1\n")
    (data / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]) + "\n")
    answers = [{"text": "b", "answer_start": 2}]
    paragraph = {"context": "a b c", "qas": [{"id": "1", "question": "a", "answers": answers}]}
    (folder / "questions.json").write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [paragraph]}]}))
    (folder / "text.txt").write_text("a b c\n")
    return folder


def commands(folder):
    data, stock = folder / "data", ["--user-dir", USER_DIR, "--cpu", "--path", folder / "code.pt"]
    pair = ["--task", "translation", "-s", "x", "-t", "y"]
    return {
        "generate": ["fairseq-generate", data, *stock, *pair],
        "interactive": ["fairseq-interactive", data, *stock, *pair, "--input", folder / "text.txt"],
        "validate": ["fairseq-validate", data, *stock, *pair, "--batch-size", "8"],
        "eval-lm": ["fairseq-eval-lm", data, *stock],
        "evaluate_perplexity": ["python", SCRIPTS / "evaluate_perplexity.py", folder / "tape.pt", data],
        "predict": ["python", SCRIPTS / "predict.py", folder / "sentences.pt", "--input", folder / "text.txt"],
        "answer_questions": [
            "python",
            SCRIPTS / "answer_questions.py",
            folder / "questions.json",
            "--path",
            folder / "questions.pt",
            "--output",
            folder / "answers",
        ],
        "plot_tape": [
            "python",
            SCRIPTS / "plot_tape.py",
            data,
            "--path",
            folder / "tape.pt",
            "--output",
            folder / "tape.png",
        ],
        "plot_depth": [
            "python",
            SCRIPTS / "plot_depth.py",
            folder / "tape.pt",
            "--data",
            data,
            "--spm",
            folder / "pieces.model",
        ],
        "report": ["python", "-m", "fairseq_adaptive", "report", folder / "code.pt", "--data", data],
        "hub": ["python", "-c", HUB.replace("FOLDER", str(folder)).replace("DATA", str(data))],
        "average": [
            "python",
            SCRIPTS / "average_checkpoints.py",
            "--inputs",
            folder / "environment.pt",
            "--output",
            folder / "averaged.pt",
        ],
        "export": [
            "python",
            SCRIPTS / "export_checkpoint.py",
            folder / "environment.pt",
            "--to",
            "fairseq",
            "--output",
            folder / "exported.pt",
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(commands(Path("x"))))
def test_commands_refuse(name, folder, tmp_path):
    if name == "plot_depth":
        spm = pytest.importorskip("sentencepiece")
        (folder / "corpus.txt").write_text("a b c d e f g h\n" * 9)
        spm.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / "pieces"),
            vocab_size=20,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    command = commands(folder)[name]
    before = sorted(folder.rglob("*"))
    (tmp_path / CODE).touch()
    done = run(*command, check=False, cwd=tmp_path, env={"SECRET": SECRET})
    ends = (
        "fairseq_adaptive.errors.UsageError: " if name == "hub" else "error: "
    )  # a user's own program has a traceback
    errors = [line for line in done.stderr.splitlines() if line.startswith(ends)]
    assert done.returncode != 0 and len(errors) == 1, done.stderr
    payload = "activation_fn" if "environment" in str(command) else "adaptive_softmax_cutoff"
    assert f".pt is refused: its flag model.{payload} is " in errors[0], errors
    assert name == "hub" or "Traceback" not in done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "PWNED").exists() and sorted(folder.rglob("*")) == before


def test_a_teacher_is_refused(folder):
    state = torch.load(folder / "code.pt", weights_only=False)
    state["cfg"]["task"]["_name"] = "any"  # which the registry does not know: it is taken for the student's
    torch.save(state, folder / "teacher.pt")
    with pytest.raises(UsageError, match="teacher.pt is refused: its flag model.adaptive_softmax_cutoff"):
        Teacher(str(folder / "teacher.pt"), AnyTask())
