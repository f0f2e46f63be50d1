"""examples/gallery: commands that real parsers and models take, results that are read and drawn, keys that are exchanged."""

import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fairseq_adaptive
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack

FOLDER = Path(__file__).parents[2] / "examples" / "gallery"
USER_DIR = str(Path(fairseq_adaptive.__file__).parent)


@pytest.fixture(scope="module", autouse=True)
def example():
    """The modules of the example, which lie beside each other."""
    sys.path.insert(0, str(FOLDER))
    import cells
    import gallery
    import plot_gallery
    import repeats
    import results

    yield SimpleNamespace(cells=cells, gallery=gallery, results=results, plot=plot_gallery, repeats=repeats)
    sys.path.remove(str(FOLDER))
    for name in ("cells", "gallery", "plot_gallery", "repeats", "results"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What prepare.sh leaves, as far as it is looked at before there is work."""
    folders = {}
    for task, names in (("language_model", ("",)), ("translation", ("en", "de"))):
        folder = folders[task] = tmp_path_factory.mktemp(task)
        (folder / "bin").mkdir()
        pair = ".en-de" if names[0] else ""
        for name in names:
            ending = f".{name}" if name else ""
            (folder / "bin" / f"dict{ending}.txt").write_text("".join(f"word{number} 1\n" for number in range(20)))
            (folder / f"test{ending or '.txt'}").write_text("word1\n")
            for split in ("train", "test"):
                (folder / "bin" / f"{split}{pair}{ending}.bin").write_text("")
    return folders


def commands(example, group, data, *flags):
    args = example.gallery.parse([group, str(data), "runs", "--user-dir", USER_DIR, "--width", "8", *flags])
    found = example.gallery.Gallery(args)
    return [(name, words) for name in found.cells for words in found.plan(name, 1)]


@pytest.mark.parametrize(
    "group, task, names",  # those whose flags differ most; reading the flags of a training takes half a second
    (
        ("gallery", "language_model", ("plain-3", "shared", "pondernet", "mixture_of_depths", "layerskip")),
        ("gallery", "translation", ("layerskip", "tape-act")),
        ("keys", "language_model", ("token_choice-first",)),
    ),
)
def test_a_cell_is_what_fairseq_trains(example, data, group, task, names):
    """The real parsers, models and criterions take what a dry run prints."""
    parameters = {}
    for name, words in commands(example, group, data[task], "--only", ",".join(names)):
        if words[0] != "fairseq-train":
            continue
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words[1:]))
        setup = tasks.setup_task(cfg.task)
        model, criterion = setup.build_model(cfg.model), setup.build_criterion(cfg.criterion)
        if hasattr(criterion, "check_model"):
            criterion.check_model(model)
        stack = [each for each in model.modules() if isinstance(each, LayerStack)][-1]
        cell = example.cells.CELLS[name]
        assert (len(stack), stack.unique_layers) == (cell.depths, cell.layers)
        parameters[name] = sum(each.numel() for each in model.parameters())
    assert set(parameters) == set(names)
    if "shared" in names:
        assert parameters["plain-3"] == parameters["shared"] == parameters["layerskip"] < parameters["pondernet"]


def test_a_dry_run_prints_what_can_be_run(example, data, capsys, monkeypatch):
    words = [
        "gallery",
        str(data["translation"]),
        "runs",
        "--only",
        "act,mixture_of_depths",
        "--seeds",
        "7",
        "--dry-run",
    ]
    monkeypatch.setattr(sys, "argv", ["gallery.py", *words])
    example.gallery.main()
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if line[0] == "fairseq-adaptive"] == [
        ["fairseq-adaptive", name] for name in ("report", "dial", "report", "report")
    ]
    assert (
        sum(line[0] == "fairseq-train" for line in lines) == sum(line[0] == "fairseq-generate" for line in lines) == 2
    )
    assert not Path("runs").exists() and "runs/act-7" in lines[0]


@pytest.mark.parametrize(
    "flags, why",
    (
        (["--only", "nothing"], "'nothing' is no cell of this: there are plain-6"),
        (["--seeds", "1,1"], "give different whole numbers"),
        (["--seeds", "one"], "give different whole numbers"),
        (["--width", "10"], "no multiple of the 4 heads"),
    ),
)
def test_mistakes_are_refused_first(example, data, flags, why):
    args = example.gallery.parse(["gallery", str(data["language_model"]), "runs", *flags])
    with pytest.raises(UsageError, match=why):
        example.gallery.Gallery(args)


def test_data_and_folders_are_looked_at_first(example, data, tmp_path):
    def of(group, folder, *flags):
        return example.gallery.Gallery(example.gallery.parse([group, str(folder), str(tmp_path / "runs"), *flags]))

    with pytest.raises(UsageError, match="test.txt is missing: make it with prepare.sh"):
        of("gallery", tmp_path)
    with pytest.raises(UsageError, match="keys.sh is for language models"):
        of("keys", data["translation"])
    of("gallery", data["translation"]).begin()
    of("gallery", data["translation"], "--only", "act").begin()
    with pytest.raises(UsageError, match="was begun with .*240"):
        of("gallery", data["translation"], "--updates", "10").begin()


def test_share_of_a_depth(example):
    rows = {name: {"depths": [{"counterpart_multiply_adds": 10.0}] * depths} for name, depths in (("a", 3), ("b", 6))}
    report = {"models": [{"stacks": rows, "counterpart": {"multiply_adds": {"total": 120.0}}}]}
    assert example.gallery.share_at(3, report) == 1 - 30 / 120
    assert example.gallery.share_at(6, report) == 1


def small(seed, schedule_of):
    """A language model of ours in float64 with some schedule, and fairseq's samples of random tokens."""
    words = f"DATA --user-dir {USER_DIR} --task language_modeling --arch shared_transformer_lm --layer-sharing cycle"
    words += f" --decoder-layers 4 --decoder-unique-layers {schedule_of} --decoder-embed-dim 8 --decoder-input-dim 8"
    words += " --decoder-output-dim 8 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2"
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words.split()))
    from fairseq.data import Dictionary
    from fairseq.tasks.language_modeling import LanguageModelingTask

    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(str(number))
    torch.manual_seed(seed)
    model = LanguageModelingTask(cfg.task, dictionary, dictionary).build_model(cfg.model).double().eval()
    tokens = torch.randint(4, len(dictionary), (3, 7))
    batch = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:]}
    return model, [batch], dictionary.pad()


@torch.no_grad()
def test_keys_are_exchanged(example):
    model, (batch,), pad = small(1, 2)
    logits = model.decoder(batch["net_input"]["src_tokens"])[0]
    parallel = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())
    found = {answer: example.repeats.loss(model.decoder, [batch], answer, pad) for answer in example.repeats.ANSWERS}
    assert math.isclose(found["own"], float(parallel), rel_tol=1e-10)
    assert len({round(each, 10) for each in found.values()}) == 3  # the exchange changes something
    stack, state = model.decoder.layers, {}
    model.decoder(batch["net_input"]["src_tokens"][:, :1], incremental_state=state)

    def keys(depth):
        layer = stack[depth]
        return layer.self_attn._get_input_buffer(layer.depth_cache(state, depth))["prev_key"].clone()

    before = [keys(depth) for depth in range(4)]
    assert not torch.equal(before[0], before[2])
    example.repeats.exchange(stack, state, "last")
    assert [torch.equal(keys(depth), before[depth % 2 + 2]) for depth in range(4)] == [True] * 4
    model, batches, pad = small(1, 4)  # of layers that run once there is nothing to exchange
    assert len({example.repeats.loss(model.decoder, batches, answer, pad) for answer in example.repeats.ANSWERS}) == 1


def results(task="language_model", **changed):
    rows = [
        {"task": task, "cell": cell, "seed": seed, "dialled_to": None, "parameters": 10, "multiply_adds": 1e6 * depths}
        | {"mean_depth": {"decoder": depths}, "bits": 2 + seed / 10, "milliseconds": depths + 0.1 * seed}
        for cell, depths in (("plain-6", 6.0), ("act", 3.0))
        for seed in (1, 2, 3)
    ]
    found = {"group": "gallery", "task": task, "machine": "x", "batch_size": 16, "updates": 1, "runs": rows}
    return {**found, **changed}


def test_points_of_a_file(example, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(results()))
    found = example.results.read_results(path)
    drawn = example.plot.points(found)
    assert [(name, kind, len(times)) for name, kind, times, _ in drawn] == [
        ("act", "halting", 3),
        ("plain-6", "plain", 3),
    ]
    middle, ((down,), (up,)) = example.plot.whiskers(drawn[0][3])
    assert math.isclose(middle, 2.2) and math.isclose(down, 0.1) and math.isclose(up, 0.1)
    text = example.results.table(found)
    assert "| `act` | 10 | 0.50 | 3.00 | 3.20 ± 0.10 | 2.200 ± 0.100 | 3 |" in text.splitlines()
    path.write_text(json.dumps({"models": []}))
    with pytest.raises(UsageError, match="was not written by examples/gallery"):
        example.results.read_results(path)


def test_ends_of_one_cell_and_of_one_far_outside(example):
    low, high = example.plot.ends([2.0])
    assert low < 2 < high
    low, high = example.plot.ends([2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 9.0])
    assert low < 2 and 2.5 < high < 9


@pytest.mark.parametrize("path", sorted(FOLDER.glob("results/[lt]*.json")), ids=lambda path: path.stem)
def test_committed_results_are_drawn(example, path):
    pytest.importorskip("matplotlib")
    found = example.results.read_results(path)
    figure, panel = example.plot.pyplot().subplots()
    drawn = example.plot.draw(panel, "title", found)
    assert (
        len(drawn)
        == len(example.results.by_cell(found))
        == len(panel.containers)
        == len(panel.get_legend().get_texts())
    )
    example.plot.pyplot().close(figure)
    assert found["commit"] and found["date"] and len({row["seed"] for row in found["runs"]}) > 1
