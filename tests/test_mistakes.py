"""Mistakes of users, provoked in this process: each is refused in one line, before work starts, and nothing is written.

Numbers out of range are in ``test_ranges.py``.
"""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from families import build_trainer, write_data

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
TRAINED = {
    "labels": "transkimmer",
    "pairs": "shared_transformer",
    "search": "par_supernet",
    "text": "par_transformer_xl",
    "images": "adatape_vit",
    "parity": "adatape_parity",
    "depth": "albert_act",
}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with data, a checkpoint of every kind of model, and files that are wrong."""
    folder = tmp_path_factory.mktemp("mistakes")
    data = write_data(folder / "data")
    for name, family in TRAINED.items():
        trainer, _ = build_trainer(family, data, "--max-update", "5")
        trainer._gathered_optim_state = None
        trainer.save_checkpoint(str(folder / f"{name}.pt"), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
        state = torch.load(folder / f"{name}.pt", weights_only=False)
        first = next(key for key, value in state["model"].items() if value.is_floating_point())
        state["model"][first] = torch.full_like(state["model"][first], math.nan)
        torch.save(state, folder / f"{name}-nan.pt")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "latin1.txt").write_bytes(b"caf\xe9\n")
    (folder / "text.txt").write_text("a b\n")
    (folder / "list.json").write_text("[1]")
    (folder / "cut.json").write_text('{"data": [')
    (folder / "nested.json").write_text("[" * 100_000)
    (folder / "blank.txt").write_text("\n \n")
    (folder / "counts").write_text("9\n8\n7\n6\n5\n4\n3\n2\n")
    (folder / "log").write_text("nothing\n")
    return folder


def _listing(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*"))


def _load(path):
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"mistake_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def refusal(script, arguments, place, monkeypatch, capsys):
    """What a command says to a mistake."""
    before = _listing(place)
    monkeypatch.setattr(sys, "argv", [script, *(each.replace("@", str(place) + "/") for each in arguments.split())])
    with pytest.raises((UsageError, SystemExit)) as caught:
        run(_load(ROOT / script).main)
    assert _listing(place) == before
    if isinstance(caught.value, UsageError):
        message = str(caught.value)
    else:
        assert caught.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
    assert message and "\n" not in message and len(message) < 600
    return message


SCRIPTS = {
    "scripts/predict.py": (
        "@labels.pt --input @text.txt --batch-size 0",
        "@labels.pt --input @text.txt --batch-size -1",
        "@labels.pt --input @folder",
        "@labels.pt --input @nothing",
        "@labels.pt --input @empty",
        "@labels.pt --input @blank.txt",
        "@labels.pt --input @latin1.txt",
        "@labels.pt --input @text.txt --pairs",
        "@folder --input @text.txt",
        "@nothing.pt --input @text.txt",
        "@text.txt --input @text.txt",
        "@empty --input @text.txt",
        "@pairs.pt --input @text.txt",
        "@labels.pt --input @text.txt --html @folder",
        "@labels.pt --input @text.txt --html @nowhere/page.html",
        "@labels.pt --input @text.txt --html @text.txt",
        "@labels.pt --input @text.txt --data @folder",
        "@labels.pt --input @text.txt --data @text.txt",
        "@labels.pt --input @text.txt --color red",
        "@labels-nan.pt --input @text.txt",
    ),
    "scripts/plot_depth.py": (
        "@depth.pt --input @text.txt",
        "@depth.pt --input @text.txt --spm @text.txt",
        "@depth.pt --input @text.txt --spm @folder",
        "@depth.pt --input @folder --spm @text.txt",
        "@depth.pt --input @latin1.txt --spm @text.txt",
        "@depth.pt --input @text.txt --plot @depth.xyz",
        "@depth.pt --input @text.txt --plot @depth",
        "@depth.pt --input @text.txt --plot @nowhere/a.png",
        "@depth.pt --input @text.txt --html @text.txt",
        "@depth.pt --input @text.txt --batch-size 0",
        "@folder --input @text.txt",
    ),
    "scripts/plot_tape.py": (
        "@data/images --path @images.pt --output @tape.xyz",
        "@data/images --path @images.pt --output @folder",
        "@data/images --path @images.pt --output @a.png --batch-size 0",
        "@data/images --path @images.pt --output @a.png --gen-subset nothing",
        "@data/images --path @nothing.pt --output @a.png",
        "@data/images --path @folder --output @a.png",
        "@folder --path @images.pt --output @a.png",
        "@text.txt --path @images.pt --output @a.png",
        "@data/images --path @pairs.pt --output @a.png",
        "@data/images --path @images-nan.pt --output @a.png",
    ),
    "scripts/answer_questions.py": (
        "@cut.json --path @labels.pt --output @answers",
        "@cut.json --path @folder --output @answers",
        "@cut.json --path @labels.pt --output @folder",
        "@cut.json --path @labels.pt --output @answers --batch-size -1",
        "@cut.json --path @labels.pt --output @answers --null-threshold nan",
        "@cut.json --path @empty --output @answers",
    ),
    "scripts/average_checkpoints.py": (
        "--inputs @pairs.pt @pairs-nan.pt --output @average.pt",
        "--inputs @pairs.pt @pairs.pt --output @average.pt",
        "--inputs @pairs.pt @text.pt --output @average.pt",
        "--inputs @folder --output @average.pt",
        "--inputs @folder --num-epoch-checkpoints 0 --output @average.pt",
        "--inputs @pairs.pt --output @folder",
        "--inputs @folder --num-epoch-checkpoints 2 --output @average.pt",
        "--inputs @text.txt --output @average.pt",
        "--inputs @pairs.pt --num-epoch-checkpoints 2 --output @average.pt",
        "--inputs @nothing.pt --output @average.pt",
        "--inputs @pairs.pt --checkpoint-upper-bound 3 --output @average.pt",
        "--inputs @pairs.pt --output @nowhere/a.pt",
    ),
    "scripts/export_checkpoint.py": (
        "@pairs-nan.pt --to fairseq --output @out.pt",
        "@folder --to fairseq --output @out.pt",
        "@images.pt --to fairseq --output @out.pt",
        "@pairs.pt --to ctranslate2 --output @out",
        "@pairs.pt --to ctranslate2 --data-dir @nothing --output @out",
        "@pairs.pt --to nowhere --output @out",
        "@images.pt --to onnx --output @out",
        "@pairs.pt --to fairseq --counterpart --output @out.pt",
        "@pairs.pt --to fairseq --output @text.txt",
        "@empty --to fairseq --output @out.pt",
    ),
    "scripts/convert_checkpoint.py": (
        "--format bert --input @folder --output @out",
        "--format bert --input @nothing --output @out",
        "--format bert --input @text.txt --output @out",
        "--format albert_act --input @pairs.pt --output @out",
        "--format albert_act --input @text.txt --output @out",
        "--format xlnet --input @folder --output @out",
        "--format transfo_xl --input @folder --output @out",
        "--format bert --input @folder --output @text.txt",
        "--format albert_act --input @depth-nan.pt --output @out",
    ),
    "scripts/derive_architecture.py": (
        "@text.pt",
        "@folder",
        "@empty",
        "@search-nan.pt",
        "@search.pt --batch-size 0",
        "@search.pt --tokens-per-sample 0",
        "@search.pt --plot @a.png",
        "@search.pt --log @log",
        "@search.pt --log @log --plot @a.png",
        "@search.pt --log @log --plot @a.xyz",
        "@search.pt --log @folder --plot @a.png",
        "@search.pt --log @log --animation @a.mp5",
        "@search.pt --log @log --animation @text.txt",
    ),
    "scripts/evaluate_perplexity.py": (
        "@text.pt @data/text --split train --batch-size 0",
        "@text.pt @data/text --split nothing",
        "@text.pt @folder --split train",
        "@text.pt @nothing --split train",
        "@folder @data/text --split train",
        "@text-nan.pt @data/text --split train",
        "@text.pt @data/text --split train --tokens-per-sample 0",
        "@text.pt @data/text --split train --raw @folder",
        "@text.pt @data/text --split train --raw @latin1.txt",
        "@text.pt @data/text --split train --bytes",
        "@text.pt @data/text --split train --context-window 5",
        "@text.pt @data/text --split train --memory-length -1",
        "@pairs.pt @data/text --split train --memory-length 4",
        "@text.pt @data/text --split train --batch-size 1000000",
    ),
    "scripts/optimal_cutoffs.py": (
        "--counts @counts --costs nan,1,1 --hidden-dim 8",
        "--counts @counts --costs 1,inf,1 --hidden-dim 8",
        "--counts @counts --costs 1,-1,1 --hidden-dim 8",
        "--counts @counts --costs a --hidden-dim 8",
        "--counts @counts --costs 1,1 --hidden-dim 8",
        "--counts @counts --costs 0,0,0 --hidden-dim 8",
        "--counts @folder --costs 0,0,1 --hidden-dim 8",
        "--counts @empty --costs 0,0,1 --hidden-dim 8",
        "--counts @text.txt --costs 0,0,1 --hidden-dim 8",
        "--counts @latin1.txt --costs 0,0,1 --hidden-dim 8",
        "--dictionary @text.txt --costs 0,0,1 --hidden-dim 8",
        "--dictionary @latin1.txt --costs 0,0,1 --hidden-dim 8",
        "--counts @counts --costs 0,0,1 --hidden-dim 0",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --clusters 0",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --clusters 99",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --clusters two",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --factor 0.5",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --tokens 0",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --least-head 3",
        "--counts @counts --costs 0,0,1 --hidden-dim 8 --plot @a.xyz",
        "--counts @counts --calibrate --hidden-dim 8 --device gpu",
        "--counts @counts --calibrate --hidden-dim 8 --device meta",
        "--counts @counts --calibrate --hidden-dim 8 --device cuda:99",
        "--counts @counts --calibrate --hidden-dim 8 --device mps",
    ),
    "examples/adatape/show_reading.py": (
        "@pairs.pt",
        "@folder",
        "@nothing.pt",
        "@parity.pt --sequences 0",
        "@parity-nan.pt",
    ),
    "examples/adatape/plot_parity.py": (
        "@folder --output @a.png",
        "@folder --output @a.xyz",
        "@folder --output @folder",
    ),
    "examples/classification/encode.py": (
        "@text.txt --tokenizer @folder",
        "@text.txt --tokenizer @nothing",
        "@text.txt --tokenizer @text.txt",
        "@text.txt --tokenizer @folder --max-length 0",
    ),
    "examples/classification/texts.py": (
        "SST-2 @folder @out",
        "SST-2 @text.txt @out",
        "imdb @nothing @out",
        "x @folder @out",
        "yelp @folder @folder",
        "20news @folder @out",
    ),
    "examples/classification/evaluate.py": (
        "SST-2 @folder --path @labels.pt",
        "SST-2 @folder --path @labels.pt --batch-size 0",
        "SST-2 @folder --path @labels.pt --max-length 0",
        "SST-2 @text.txt --path @labels.pt",
    ),
    "examples/classification/plot_tradeoff.py": (
        "@list.json --output @a.xyz",
        "@nested.json --output @a.png",
        "@folder --output @a.png",
        "@list.json --output @a.png",
    ),
    "examples/question_answering/split.py": (
        "@cut.json @a @b",
        "@nested.json @a @b",
        "@list.json @a @b",
        "@folder @a @b",
        "@nothing @a @b",
        "@cut.json @text.txt @b",
        "@cut.json @a @b --valid-share 1",
        "@cut.json @a @b --valid-share nan",
    ),
    "examples/question_answering/count_windows.py": ("@folder", "@text.txt", "@nothing"),
}
MISTAKES = [(script, arguments) for script, each in SCRIPTS.items() for arguments in each]


@pytest.mark.parametrize("script, arguments", MISTAKES, ids=lambda text: text.rpartition("/")[2])
def test_command_refuses(script, arguments, place, monkeypatch, capsys):
    if "classification" in script:
        pytest.importorskip("sklearn")
    refusal(script, arguments, place, monkeypatch, capsys)


def test_there_are_many():
    assert len(MISTAKES) >= 150


FAMILIES = [
    ("shared_transformer", "encoder"),
    ("shared_transformer", "decoder"),
    ("shared_transformer_lm", "decoder"),
    ("transkimmer", "encoder"),
    ("albert_act", "encoder"),
    ("adatape", "encoder"),
    ("par_transformer_xl", "decoder"),
]


@pytest.mark.parametrize("arch, side", FAMILIES)
def test_heads_that_do_not_divide(arch, side, build):
    with pytest.raises(UsageError, match=f"--{side}-embed-dim 32 .*3"):
        build(arch, **{f"{side}_embed_dim": 32, f"{side}_attention_heads": 3})
