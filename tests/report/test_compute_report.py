"""``fairseq-adaptive report``: what models of every kind spend, where, and how good they are."""

import json
import logging
import re
import shutil

import families
import pytest
import torch
from cli.helpers import USER_DIR, run
from families import Family, build_trainer, train, write_data
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.commands import report as command
from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.stack.compute import stack_macs
from fairseq_adaptive.report.compute_page import to_html
from fairseq_adaptive.report.compute_report import compute_report, describe
from fairseq_adaptive.report.compute_table import overview, short, to_text
from fairseq_adaptive.report.costs import PARTS, Costs, Place, parameters
from fairseq_adaptive.report.evaluated import Evaluated

STOCK = {
    "stock": Family(
        "pairs",
        f"{families._TRANSLATION} --arch transformer --criterion label_smoothed_cross_entropy --eval-bleu "
        '--eval-bleu-args {"max_len_a":0,"max_len_b":3,"beam":1}',
    ),
    "stock_lm": Family(
        "text",
        f"--task language_modeling --arch transformer_lm --decoder-layers 2 {families._DECODER} --tokens-per-sample 24 "
        "--batch-size 10 --criterion cross_entropy",
    ),
    "stock_roberta": Family(
        "text",
        f"--task masked_lm --arch roberta_base {families._ENCODER} --encoder-layers 2 --criterion masked_lm "
        "--tokens-per-sample 24 --sample-break-mode eos --batch-size 24",
    ),
    "stock_classifier": Family(
        "labels",
        "--task sentence_prediction --num-classes 2 --max-positions 32 --init-token 0 --arch roberta_base "
        f"{families._ENCODER} --encoder-layers 2 --criterion sentence_prediction --batch-size 24",
    ),
    "xl_act": families.COMPOSITIONS["halting_transformer_xl"],
}
QUICK = ("shared_transformer", "universal_transformer", "transkimmer", "shared_transformer_lm", "par_transformer_xl")
QUICK += ("adatape_vit", "stock", "xl_act")
EVERY = {**families.FAMILIES, **families.COMPOSITIONS, **STOCK}


@pytest.fixture(autouse=True)
def logging_stays():
    """Commands, which end with their process, turn messages off for good."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


def stir(model):
    """Routers that leave tokens out."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".router." in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.7)
        elif ".router." in name and parameter.numel() == 2:  # or all tokens are kept
            nn.init.zeros_(parameter)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A function that gives the checkpoint of a family, after an update, and the flags of its data."""
    folder, made = write_data(tmp_path_factory.mktemp("report")), {}

    def checkpoint(name, *flags):
        path = folder / f"{name}.pt"
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(families, "COMPOSITIONS", {**families.COMPOSITIONS, **STOCK})
                trainer, batches = build_trainer(name, folder, "--max-update", "10", *flags)
                train(trainer, batches, 1)
            stir(trainer.model)
            trainer._gathered_optim_state = None
            trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
            made[name] = path
        return path, (str(folder / EVERY[name].data) if EVERY[name].data else None)

    checkpoint.folder = folder
    return checkpoint


def evaluated(place, name, **options):
    path, data = place(name)
    return Evaluated(path, data, "train", **{"batch_size": 1, "texts": 6, **options})


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)
def test_multiply_adds_are_those_of_the_closed_forms(name, place):
    """Stack by stack, of packed runs and of their counterpart, and in sum what torch counts."""
    segments = "segmented_language_modeling" in EVERY[name].flags
    each = evaluated(
        place, name, texts=12 if segments else 4
    )  # the encodings of distances are projected once for a stream
    costs = each.costs()
    with FlopCounterMode(display=False) as counter:
        each.run()
    assert 2 * costs.total() == counter.get_total_flops()
    assert sum(map(costs.total, PARTS)) == costs.total() > 0
    readers = {found.name: found.reader for found in decisions(each.model)}
    expected, alone = {}, {}
    for batch in each.batches:
        with recording(each.model) as traces:
            each.run([batch])
        for stack, (trace,) in traces.items():
            spent, dense = stack_macs(each.model.get_submodule(stack), trace, None, readers.get(stack))
            expected[stack] = expected.get(stack, 0) + float(spent)
            alone[stack] = alone.get(stack, 0) + float(dense)
    assert bool(expected) == (not name.startswith("stock"))
    for stack in expected:
        assert costs.total(stack=stack) == pytest.approx(expected[stack], rel=0.02)
    if each.has_counterpart:
        with each.counterpart():
            dense = each.costs()
        assert dense.total("policies") == 0
        for stack in expected:
            if name != "skimming_decoder" or stack.startswith("encoder"):  # whose decoder's closed form reads the tape
                assert dense.total(stack=stack) == pytest.approx(alone[stack], rel=0.02)
        again = each.costs()
        assert again.counts == costs.counts  # the policies are on again


def layer_macs(tokens, source=None, dim=32, ffn=64):
    attention = 4 * dim * dim * tokens + 2 * dim * tokens * tokens
    cross = 0 if source is None else 2 * dim * dim * (tokens + source) + 2 * dim * tokens * source
    return attention + cross, 2 * dim * ffn * tokens


@pytest.mark.parametrize("name", ("stock", "shared_transformer"))
def test_a_dense_transformer_by_hand(name, place):
    each = evaluated(place, name)
    costs, pad, words = each.costs(), each.task.target_dictionary.pad(), len(each.task.target_dictionary)
    attention = ffn = output = tokens = 0
    for batch in each.batches:
        source = int((batch["net_input"]["src_tokens"] != pad).sum())
        target = int((batch["target"] != pad).sum())
        parts = [layer_macs(source), layer_macs(target, source)]
        attention, ffn = (total + 4 * sum(part[n] for part in parts) for n, total in enumerate((attention, ffn)))
        output, tokens = output + target * words * 32, tokens + source + target
    assert each.tokens == tokens
    assert costs.total("attention") == pytest.approx(attention, rel=0.02)
    assert costs.total("feed-forward") == ffn and costs.total("output layer") == output
    assert costs.total("embedding") == costs.total("policies") == costs.total("other") == 0
    first = [costs.total(stack="encoder.layers", depth=depth) for depth in range(4)]
    assert len(set(first)) == 1 and 4 * first[0] == costs.total(stack="encoder.layers")


def test_parameters_by_hand(place):
    """A layer at two depths, and an embedding in three places, count once, and as often as they are used."""
    norms, ffn, square = 2 * 32, 2 * 32 * 64 + 64 + 32, 4 * (32 * 32 + 32)
    encoder, decoder, embedding = square + ffn + 2 * norms, 2 * square + ffn + 3 * norms, 40 * 32
    model = evaluated(place, "shared_transformer").model
    assert len(model.encoder.embed_tokens.weight) == 40
    assert parameters(model) == (embedding + 2 * (encoder + decoder), 3 * embedding + 4 * (encoder + decoder))
    whole = embedding + 4 * (encoder + decoder)
    assert parameters(evaluated(place, "stock").model) == (whole, 2 * embedding + whole)


@pytest.mark.parametrize("name", ("universal_transformer", "xl_act"))
def test_halting_is_that_of_the_traces(name, place):
    each = evaluated(place, name, batch_size=4, texts=12)
    found = describe(each)
    with recording(each.model) as traces:
        each.run()
    for stack, runs in traces.items():
        tokens = sum(int(trace.tokens.sum()) for trace in runs)
        shown = found["stacks"][stack]
        mean = sum(float(trace.updates.sum()) for trace in runs) / tokens
        assert shown["mean_depth"] == pytest.approx(mean) and 1 <= mean < len(shown["depths"])
        assert sum(row["alive"] for row in shown["depths"]) == pytest.approx(mean)
        assert sum(row["halted"] for row in shown["depths"]) <= 1 + 1e-9
        for depth, row in enumerate(shown["depths"]):
            alive = [trace.steps[depth].alive for trace in runs if depth < len(trace.steps)]
            assert row["alive"] == pytest.approx(sum(int(mask.sum()) for mask in alive) / tokens)
            assert row["kept"] is None and row["added"] is None and row["depth"] == depth
            assert (row["multiply_adds"]["feed-forward"] > 0) <= (row["alive"] > 0)
    assert found["multiply_adds"]["total"] < found["counterpart"]["multiply_adds"]["total"]


def test_skimming_is_what_the_criterion_logs(place):
    each = evaluated(place, "transkimmer", batch_size=48, texts=800)
    found, logged = describe(each), each.quality()
    rows = found["stacks"]["encoder.sentence_encoder.layers"]["depths"]
    assert each.texts == 800
    assert [row["kept"] for row in rows] == pytest.approx([logged["kept_1"], logged["kept_2"]], abs=1e-4)
    assert 0 < rows[1]["kept"] < rows[0]["kept"] < 1
    assert 0 <= logged["accuracy"] <= 100 and "wps" not in logged


def test_a_tape_adds_tokens(place):
    found = describe(evaluated(place, "adatape_vit", batch_size=8, texts=16))
    (stack,) = found["stacks"].values()
    added = [row["added"] for row in stack["depths"]]
    assert added[0] == 0 and added[1] == added[2] and 0 < added[1] <= 1  # at most 4 tokens beside 4 patches
    policies = [row["multiply_adds"]["policies"] for row in stack["depths"]]
    assert policies[0] == policies[2] == 0 < policies[1] == found["multiply_adds"]["policies"]
    assert found["tokens"] == 4 * found["texts"]
    assert found["multiply_adds"]["total"] > found["counterpart"]["multiply_adds"]["total"]
    assert found["counterpart"]["multiply_adds"]["embedding"] < found["multiply_adds"]["embedding"]  # no bank


def test_a_memory_is_read(place):
    """Segments in a row cost more than the first ones: they attend to the memory, too."""
    first = evaluated(place, "par_transformer_xl", texts=1).costs()
    more = evaluated(place, "par_transformer_xl", texts=3)
    costs = more.costs()
    assert more.texts == 3 and costs.total("attention") > 3.2 * first.total("attention")
    assert costs.total("feed-forward") == 3 * first.total("feed-forward") == 3 * 4 * 12 * 2 * 32 * 64
    assert [costs.total("feed-forward", depth=depth) > 0 for depth in range(6)] == [False, True, True] * 2


def test_counting_leaves_nothing_behind(place):
    each = evaluated(place, "universal_transformer")
    before = [set(vars(module)) for module in each.model.modules()]
    hooks = [len(getattr(torch_module, f"_global{name}")) for name in ("_forward_hooks", "_forward_pre_hooks")]
    for _ in range(2):
        counted = each.costs()
        with each.counterpart():
            assert not any(module.adaptive for module in each.model.modules() if isinstance(module, LayerStack))
    assert [set(vars(module)) for module in each.model.modules()] == before
    assert hooks == [len(getattr(torch_module, f"_global{name}")) for name in ("_forward_hooks", "_forward_pre_hooks")]
    assert each.costs().counts == counted.counts
    assert {place.part for place in counted.counts} <= set(PARTS) and Place(
        "policies", "encoder.layers", 0
    ) in counted.counts


def test_parts_outside_of_layers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Parameter(torch.ones(3, 4, 5))

        def forward(self, x):
            return torch.conv_tbc(x, self.convolution, torch.zeros(5), 1)

    costs, model = Costs(Plain()), Plain()
    costs.count(lambda: model(torch.ones(7, 2, 4)))
    assert costs.total("other") == costs.total() == 7 * 2 * 3 * 4 * 5
    with pytest.raises(UsageError, match="does not count what an LSTM computes"):
        Costs(nn.Sequential(nn.LSTM(2, 2)))


@pytest.fixture(scope="module")
def two(place):
    """A report of two checkpoints of one task."""
    paths = [str(place(name)[0]) for name in ("stock", "universal_transformer")]
    return compute_report(paths, place("stock")[1], "train", texts=16, rounds=2)


def test_two_side_by_side(two):
    table = overview(two)
    assert table.columns == ["", "stock.pt", "universal_transformer.pt"]
    rows = {row[0]: row[1:] for row in table.rows}
    stock, ours = two["models"]
    assert rows["parameters, each once"] == [f"{each['parameters']['unique']:,}" for each in two["models"]]
    assert stock["texts"] == ours["texts"] == 16 and stock["tokens"] == ours["tokens"]
    assert stock["counterpart"] is None and rows["  times as fast as it"][0] == "-"
    # the counterpart is stock fairseq's Transformer with shared weights
    dense = ours["counterpart"]["multiply_adds"]["total"]
    assert dense == pytest.approx(stock["multiply_adds"]["total"], rel=0.01)
    share = ours["multiply_adds"]["total"] / dense
    assert rows["  share of the counterpart's"] == ["-", f"{share:.3f}"] and share < 1
    for each in (stock, ours, ours["counterpart"]):
        assert each["seconds"] > 0 and (each["peak_memory_bytes"] is None or each["peak_memory_bytes"] >= 0)
    assert rows["bleu"][1] == "-" and float(rows["bleu"][0]) >= 0
    assert 0 < stock["quality"]["loss"] < 10 and rows["ppl"] == [str(each["quality"]["ppl"]) for each in two["models"]]
    for each in two["models"]:
        inside = sum(row["multiply_adds"]["total"] for stack in each["stacks"].values() for row in stack["depths"])
        outside = sum(each["multiply_adds"][part] for part in ("embedding", "output layer"))
        assert inside + outside == pytest.approx(each["multiply_adds"]["total"])


def test_the_command_writes_what_it_shows(place, tmp_path, capsys):
    path, data = place("universal_transformer")
    written, page = tmp_path / "report.json", tmp_path / "report.html"
    flags = ["--data", data, "--subset", "train", "--texts", "8", "--rounds", "1", "--device", "cpu"]
    command.main([str(path), *flags, "--json", str(written), "--html", str(page)])
    out = capsys.readouterr().out
    report = json.loads(written.read_text(), parse_constant=pytest.fail)
    assert out.startswith(to_text(report)) and page.read_text() == to_html(report)
    (model,) = report["models"]
    shown = re.search(r"^multiply-adds a text +(\S+)$", out, re.MULTILINE)[1]
    assert shown == short(model["multiply_adds"]["total"] / model["texts"])
    with pytest.raises(UsageError, match="exists and is left as it is"):
        command.main([str(path), *flags, "--json", str(written)])
    command.main([str(path), *flags, "--no-quality"])
    assert "nll_loss" in out and "nll_loss" not in capsys.readouterr().out


def test_a_page_loads_nothing_and_escapes_names(two):
    hostile = '<script>alert("x")<u>&\x1b[2J\u202e.pt'
    models = [{**two["models"][0], "checkpoint": f"/a/{hostile}", "quality": {"<u>": 1.0}}, two["models"][1]]
    page = to_html({**two, "models": models, "subset": "<i>"})
    for text in ("http:", "https:", "src=", "<script", "<u>", "<i>", "\x1b", "\u202e", "@import", "url("):
        assert text not in page
    assert (
        "&lt;script&gt;" in page and "\\x1b" in page and "prefers-color-scheme:dark" in page and "@media print" in page
    )
    bars = [float(width) for width in re.findall(r'width="([\d.]+)"', page)]
    assert bars and max(bars) <= 100.01
    assert page.count("<svg") == 2 + sum(len(stack["depths"]) for each in models for stack in each["stacks"].values())
    text = to_text({**two, "models": models})
    assert "\x1b" not in text and "\u202e" not in text


def test_short():
    shown = [
        short(number) for number in (0, 7.5, 999.96, 1234, 9999, 10_000, 588_300, 999_960, 1_745_000, 5e9, 3e12, 2e17)
    ]
    assert shown == "0 7.5 1000 1234 9999 10k 588.3k 1000k 1745k 5000M 3000G 2e+05T".split()


@pytest.mark.parametrize(
    "arguments, told",
    (
        ("{folder}/nothing.pt --data {data}", "nothing.pt is missing"),
        ("{folder} --data {data}", "a folder: name a file in it"),
        ("{folder}/pairs/dict.src.txt --data {data}", "cannot be read"),
        ("{stock} --data {folder}/text", "there is no dictionary"),
        ("{stock} --data {other}", "does not fit.*must have the dictionary of its training"),
        ("{stock} --data {empty}", "has no sentence"),
        ("{images} --data {folder}/images --subset valid", "has no split valid"),
        ("{stock} --data {data} --subset nothing", "Dataset not found: nothing"),
    ),
)
def test_mistakes(arguments, told, place, tmp_path):
    (stock, data), (images, _) = place("stock"), place("adatape_vit")
    for name in ("other", "empty"):
        shutil.copytree(data, tmp_path / name)
    for side in ("src", "tgt"):
        kept = (tmp_path / "other" / f"dict.{side}.txt").read_text().splitlines()[:5]
        (tmp_path / "other" / f"dict.{side}.txt").write_text("\n".join(kept) + "\n")
        index = tmp_path / "empty" / f"train.src-tgt.{side}.idx"
        index.write_bytes(index.read_bytes()[:18] + bytes(8))
    names = {name: tmp_path / name for name in ("other", "empty")}
    words = arguments.format(folder=place.folder, stock=stock, data=data, images=images, **names).split()
    subset = [] if "--subset" in words else ["--subset", "train"]
    outputs = [tmp_path / "a.json", tmp_path / "a.html"]
    with pytest.raises((UsageError, FileNotFoundError), match=told) as caught:
        command.main([*words, *subset, "--json", str(outputs[0]), "--html", str(outputs[1])])
    assert "\n" not in str(caught.value) and not any(path.exists() for path in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("stock_roberta", "shared_transformer", "par_transformer_xl", "adatape_vit"))
def test_quality_is_that_of_fairseq_validate(name, place):
    path, data = place(name)
    task = EVERY[name].flags.split("--task ")[1].split()[0]
    flags = ["--user-dir", USER_DIR, "--path", path, "--task", task, "--valid-subset", "train", "--batch-size", 8]
    more = ["--sample-break-mode", "eos", "--tokens-per-sample", 24] if name == "stock_roberta" else []
    more = ["--tokens-per-sample", 12] if name == "par_transformer_xl" else more
    told = run("fairseq-validate", data, *flags, *more, "--log-format", "simple", "--cpu", "--num-workers", 0)
    logged = evaluated(place, name, batch_size=8, texts=8).quality()
    losses = re.findall(r"\| loss ([\d.]+)", told.stdout + told.stderr)
    assert float(losses[-1]) == pytest.approx(logged["loss"], abs=2e-3)


@pytest.mark.slow
def test_a_teacher_that_is_gone(place):
    teacher, _ = place("transkimmer")
    copy = teacher.with_name("teacher.pt")
    shutil.copy(teacher, copy)
    EVERY["taught"] = Family("labels", f"{families.FAMILIES['transkimmer'].flags} --distill-from {copy}")
    STOCK["taught"] = EVERY["taught"]
    path, _ = place("taught")
    copy.unlink()
    found, alone = describe(evaluated(place, "taught")), describe(evaluated(place, "transkimmer"))
    assert found["parameters"] == alone["parameters"] and found["tokens"] == alone["tokens"]
    assert found["counterpart"]["multiply_adds"] == alone["counterpart"]["multiply_adds"]
