"""Mistakes of users, provoked in this process: each is refused in one line, before work starts, and nothing is written.

Numbers out of range are in ``test_ranges.py``.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build_trainer, write_data

from fairseq_adaptive.command import device, run, wants_colour
from fairseq_adaptive.data.squad import load_tokenizer, read_squad
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, read_lines, whole_file, whole_folder
from fairseq_adaptive.interop import albert_act, bert, save_checkpoint, transfo_xl

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
    assert len(MISTAKES) + len(CONFIGS) >= 250


CONFIG = {
    "bert": (
        {
            "model_type": "bert",
            "vocab_size": 30,
            "hidden_size": 8,
            "intermediate_size": 12,
            "hidden_act": "gelu",
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_dropout_prob": 0.1,
            "layer_norm_eps": 1e-12,
            "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 16,
            "type_vocab_size": 2,
        },
        bert,
    ),
    "albert_act": (
        {
            "vocab_size": 30,
            "hidden_size": 8,
            "intermediate_size": 12,
            "embedding_size": 4,
            "act_epsilon": 0.1,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_dropout_prob": 0,
            "type_vocab_size": 2,
            "attention_probs_dropout_prob": 0,
            "classifier_dropout_prob": 0.1,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "unk_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        albert_act,
    ),
    "transfo_xl": (
        {
            "vocab_size": 30,
            "d_model": 8,
            "n_head": 2,
            "d_head": 4,
            "d_inner": 12,
            "n_layer": 2,
            "mem_len": 4,
            "cutoffs": [10],
            "div_val": 1,
            "clamp_len": -1,
            "dropout": 0.1,
            "dropatt": 0.0,
            "tie_projs": [False, False],
            "sample_softmax": -1,
        },
        transfo_xl,
    ),
}
WRONG = ("three", None, [3], {"a": 1}, True, -5, math.nan, math.inf, 10**9 + 7, 2.5)
CONFIGS = [(kind, name, value) for kind, (config, _) in CONFIG.items() for name in config for value in WRONG]


@pytest.mark.parametrize("kind", CONFIG)
def test_config_of_these_tests_is_right(kind):
    config, module = CONFIG[kind]
    module.read_config(config)


@pytest.mark.parametrize("kind, name, value", CONFIGS)
def test_config_json_refused(kind, name, value):
    config, module = CONFIG[kind]
    if kind == "transfo_xl" and value is None and name not in transfo_xl.RANGES:
        pytest.skip("null is as good as absent")
    if name == "cutoffs" and value == [3]:
        pytest.skip("these are cutoffs")
    with pytest.raises(UsageError) as caught:
        module.read_config({**config, name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    (
        {"cutoffs": [10, 10]},
        {"cutoffs": [20, 10]},
        {"cutoffs": [30]},
        {"cutoffs": ["10"]},
        {"cutoffs": [-1]},
        {"cutoffs": 10},
        {"tie_projs": "no"},
        {"same_length": "false"},
        {"tie_weight": "yes"},
        {"n_layer": 0},
        {"d_model": 0},
    ),
)
def test_shape_of_transfo_xl_refused(change):
    with pytest.raises(UsageError):
        transfo_xl.read_config({**CONFIG["transfo_xl"][0], **change})


@pytest.mark.parametrize("kind", ("bert", "albert_act"))
def test_heads_of_config_that_do_not_divide(kind):
    config, module = CONFIG[kind]
    with pytest.raises(UsageError, match="3 attention heads share a width of 8"):
        module.read_config({**config, "num_attention_heads": 3})


@pytest.mark.parametrize("name", ("pad_token_id", "unk_token_id", "bos_token_id", "eos_token_id"))
@pytest.mark.parametrize("value", (-1, 30, "0", 2, 1))
def test_special_tokens_of_config(name, value):
    config, module = CONFIG["albert_act"]
    if config[name] == value:
        return
    with pytest.raises(UsageError):
        module.read_config({**config, name: value})


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


@pytest.mark.parametrize("content", ("[" * 100_000, "{", "", "\x00", "[1, 2]", '"text"', "NaN", "9" * 5000))
def test_json_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UsageError, match="a.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("value", ("false", "true", 0, 1, None, []))
def test_texts_are_no_truth_values(tmp_path, value):
    entry = {"id": "a", "question": "q", "answers": [], "is_impossible": value}
    article = {"paragraphs": [{"context": "c", "qas": [entry]}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [article]}))
    with pytest.raises(UsageError, match="is_impossible is .*, not true or false"):
        read_squad(tmp_path / "a.json")


@pytest.mark.parametrize("name, content", (("vocab.txt", None), ("vocab.json", "{"), ("vocab.json", "[]")))
def test_damaged_vocabulary(tmp_path, name, content):
    pytest.importorskip("tokenizers")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    if content is None:
        (tmp_path / name).write_bytes(b"\xff\xfe\n")
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="damaged"):
        load_tokenizer(tmp_path, False)


def test_lines_end_with_a_line_feed_only(tmp_path):
    (tmp_path / "a").write_bytes("one\rtwo\n\nthree\r\nfo\u2028ur\u0085 \x0b".encode())
    assert read_lines(tmp_path / "a") == ["one\rtwo", "", "three", "fo\u2028ur\u0085 \x0b"]


@pytest.mark.parametrize("name", ("gpu", "cuda:99", "meta", "", "cpu:x", "xla"))
def test_unknown_devices(name):
    with pytest.raises(Exception, match="there is no device"):
        device(name)
    assert device("cpu") == "cpu"


def test_closed_standard_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        read_lines("-")
    monkeypatch.setattr(sys, "stdout", None)
    assert not wants_colour("auto")
    run(lambda: print("nobody hears it"))


def test_reader_that_went_away():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom fairseq_adaptive.command import run\n"
        "run(lambda: [print('x' * 1000) for _ in range(1000)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 141 and "Traceback" not in errors and "BrokenPipe" not in errors


def _full(path, *unused):
    raise OSError(28, "No space left on device", path)


@pytest.mark.parametrize("made", (whole_file, whole_folder))
def test_full_disk_is_named_and_leaves_nothing(tmp_path, made, monkeypatch):
    with pytest.raises(UsageError, match="cannot write .*/result: No space left on device"):
        with made(tmp_path / "result") as part:
            if made is whole_file:
                Path(part).write_text("half")
            _full(part)
    assert not list(tmp_path.iterdir())


def test_torch_says_a_full_disk_in_its_own_way(tmp_path):
    with pytest.raises(UsageError, match="No space left on device"):
        with whole_file(tmp_path / "result") as part:
            try:
                _full(part)
            except OSError:
                raise RuntimeError("unexpected pos 64 vs 0")


@pytest.mark.parametrize("made", (whole_file, whole_folder))
def test_what_is_there_is_whole_and_never_replaced(tmp_path, made):
    with made(tmp_path / "result") as part:
        assert not (tmp_path / "result").exists()
        (Path(part) / "inside" if made is whole_folder else Path(part)).write_text("all")
    path = tmp_path / "result" / "inside" if made is whole_folder else tmp_path / "result"
    assert path.read_text() == "all" and path.stat().st_mode & 0o044
    with pytest.raises(UsageError, match="exists"):
        with made(tmp_path / "result"):
            pass
    with pytest.raises(KeyboardInterrupt):
        with made(tmp_path / "other"):
            raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == ["result"]


def test_ending_of_a_picture_stays(tmp_path):
    with whole_file(tmp_path / "a.PnG") as part:
        assert part.endswith(".PnG")
        Path(part).touch()


def test_save_dir_that_is_a_file_is_refused(tmp_path):
    from fairseq import checkpoint_utils

    (tmp_path / "file").touch()
    for name in ("file", "file/inside"):
        with pytest.raises(UsageError, match="--save-dir .* name a folder"):
            checkpoint_utils.verify_checkpoint_directory(str(tmp_path / name))
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())


def test_sixteen_bits_are_not_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from fairseq_adaptive.data.image_files import FolderImages

    (tmp_path / "a").mkdir()
    grey = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    image.fromarray(grey).save(tmp_path / "a" / "grey.png")
    read = np.asarray(FolderImages(str(tmp_path), 3)[0])
    assert read.shape == (2, 3, 3) and (read == (grey >> 8)[..., None]).all()


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_weights_that_are_not_finite_are_not_converted(value):
    from fairseq_adaptive.interop.conversion import Weights

    with pytest.raises(UsageError, match="NaN or infinity"):
        Weights({"a": torch.tensor([1.0, value])}).take("a", 2)
    with pytest.raises(UsageError, match="type int64"):
        Weights({"a": torch.tensor([1, 2])}).take("a", 2)


STOCK = (
    ("dataset", "batch_size", (0, -1, 10**9)),
    ("dataset", "batch_size_valid", (0, -1)),
    ("dataset", "max_tokens", (0, -5)),
    ("dataset", "num_workers", (-1, 10**6)),
    ("dataset", "required_batch_size_multiple", (0,)),
    ("optimization", "clip_norm", (math.nan, math.inf, -1.0)),
    ("optimization", "max_update", (-1,)),
    ("optimization", "max_epoch", (-1,)),
    ("optimization", "update_freq", ([0], [1, -1])),
    ("optimization", "lr", ([math.nan], [-0.1], [0.1, math.inf])),
    ("checkpoint", "save_interval", (0,)),
    ("common", "log_interval", (0, -1)),
    ("eval_lm", "context_window", (-1,)),
)


@pytest.mark.parametrize(
    "group, name, value", [(group, name, value) for group, name, values in STOCK for value in values]
)
def test_numbers_of_fairseq_are_refused_before_work(group, name, value):
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.distributed import utils as distributed_utils
    from fairseq.trainer import Trainer
    from omegaconf import OmegaConf

    cfg = OmegaConf.structured(FairseqConfig)
    cfg.dataset.num_workers = 1  # the class is shared
    worked = []
    distributed_utils.call_main(cfg, worked.append)
    assert len(worked) == 1
    cfg[group][name] = value
    for call in (lambda: distributed_utils.call_main(cfg, worked.append), lambda: Trainer(cfg, None, None, None)):
        with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} is .*: use a "):
            call()
    assert len(worked) == 1


def test_messages_do_not_control_the_terminal():
    error = UsageError("the label '\x1b[31m\u202ebad' is unknown\nknown are a")
    assert str(error) == "the label '\\x1b[31m\\u202ebad' is unknown\nknown are a"


@pytest.mark.parametrize("saves", ("torch", "text"))
def test_a_write_that_the_system_refuses(tmp_path, saves):
    """As on a full disk, but for real: no file may grow beyond a limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write .*/result: File too large; nothing of it was left"):
            if saves == "torch":
                save_checkpoint({"a": torch.zeros(100_000)}, tmp_path / "result")
            else:
                with whole_file(tmp_path / "result") as part:
                    Path(part).write_text("a" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
