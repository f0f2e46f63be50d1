import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from cli.helpers import USER_DIR, run
from fairseq import checkpoint_utils, tasks
from omegaconf import OmegaConf
from interop.original_transfo_xl import BASE, WORDS, original_losses, random_weights, write_original

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import transfo_xl
from fairseq_adaptive.interop.conversion import write_folder
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory

CONFIGS = {
    "base": {},
    "large": {"div_val": 2, "same_length": True, "clamp_len": 5, "untie_r": True},
    "untied": {"div_val": 2, "tie_weight": False, "tie_projs": [False, False, True], "untie_r": True},
    "characters": {"cutoffs": [], "tie_projs": [False], "clamp_len": 9},
}


def load(folder):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint.pt"))
    cfg = OmegaConf.create(state["cfg"])
    cfg.task.data = str(folder)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    return model.double().eval(), task


@torch.no_grad()
def our_losses(model, task, text, segment):
    ids = torch.tensor([[task.dictionary.eos() if w == "<eos>" else task.dictionary.index(w) for w in text]])
    memory, losses = SegmentMemory(), []
    for first in range(0, len(text) - 1, segment):
        last = min(first + segment, len(text) - 1)
        features, _ = model(ids[:, first:last], memory=memory)
        losses.append(model.decoder.adaptive_softmax(features, ids[:, first + 1 : last + 1])[1])
    return torch.cat(losses, 1)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_equal_those_of_the_original(name, tmp_path):
    config = {**BASE, **CONFIGS[name]}
    weights = random_weights(config)
    args = write_original(tmp_path / "original", config, weights, safe=name == "large")
    state, dictionary = transfo_xl.convert(args)
    write_folder(state, dictionary, tmp_path / "ours", partial(transfo_xl.outputs, args))
    model, task = load(tmp_path / "ours")
    torch.manual_seed(7)
    numbers = torch.cat((torch.tensor([1]), torch.randperm(len(WORDS)), torch.randint(len(WORDS), (12,)))).tolist()
    theirs = original_losses(weights, config, numbers, 5)
    ours = our_losses(model, task, [WORDS[number] for number in numbers], 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert theirs.std() > 0.1

    # nothing is left for what the original has not, in single precision, either
    features = torch.randn(3, config["d_model"])
    lprobs = model.float().decoder.adaptive_softmax.get_log_prob(features)
    assert lprobs.size(1) == len(WORDS) + 2 == len(task.dictionary)
    assert (lprobs[:, :2].exp() == 0).all()
    torch.testing.assert_close(lprobs[:, 2:].exp().sum(1), torch.ones(3))


def test_accepts_names_without_prefix_and_without_what_is_tied(tmp_path):
    config = {**BASE, **CONFIGS["large"]}
    weights = random_weights(config)
    expected, _ = transfo_xl.convert(write_original(tmp_path / "all", config, weights))
    fewer = {
        name.removeprefix("transformer."): tensor
        for name, tensor in weights.items()
        if not name.startswith("crit.out_layers") or name.endswith("bias")
    }
    fewer = {name: tensor for name, tensor in fewer.items() if name not in ("crit.out_projs.1", "crit.out_projs.2")}
    assert len(fewer) == len(weights) - 5
    args = write_original(tmp_path / "fewer", config, fewer)
    args.cluster_order = "forward"
    found, _ = transfo_xl.convert(args)
    assert expected["model"].keys() == found["model"].keys()
    assert all(torch.equal(expected["model"][name], found["model"][name]) for name in found["model"])


def test_clusters_are_reversed_in_the_first_authors_code_which_has_no_prefix(tmp_path):
    weights = random_weights(BASE)
    forward, _ = transfo_xl.convert(write_original(tmp_path / "prefixed", BASE, weights))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    args = write_original(tmp_path / "bare", BASE, bare)
    found, _ = transfo_xl.convert(args)
    args.cluster_order = "forward"
    overruled, _ = transfo_xl.convert(args)
    for kind in ("weight", "bias"):
        name = f"decoder.adaptive_softmax.cluster_{kind}"
        assert torch.equal(found["model"].pop(name), forward["model"][name].flip(0))
        assert torch.equal(overruled["model"][name], forward["model"][name])
    assert all(torch.equal(tensor, forward["model"][name]) for name, tensor in found["model"].items())


def test_dictionary_has_the_words_in_order_with_falling_counts():
    dictionary, order, cutoffs = transfo_xl.lay_out(WORDS, list(range(31, 0, -1)), [8, 20], "<eos>")
    assert order == [-1, -1, 1, 4, 0, 2, 3, *range(5, 31)]
    assert cutoffs == [10, 22]
    assert dictionary.symbols[4:8] == ["the", ",", "of", "w0"]
    assert dictionary.count[4:] == sorted(dictionary.count[4:], reverse=True)
    # without <unk>, that is the third word without a row
    _, order, cutoffs = transfo_xl.lay_out(["a", "10", "b"], [3, 2, 1], [], "10")
    assert (order, cutoffs) == ([-1, -1, 1, -1, 0, 2], [5])


def test_counts_of_the_vocabulary_are_kept_when_they_fall(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("a 9\nb 9\nc 1\n")
    assert transfo_xl.read_vocabulary(path) == (["a", "b", "c"], [9, 9, 1])
    path.write_text("a 1\nb 9\nc 1\n")
    assert transfo_xl.read_vocabulary(path) == (["a", "b", "c"], [3, 2, 1])


def without(name):
    return lambda config, weights, words: weights.pop(name)


def change(**values):
    return lambda config, weights, words: config.update(values)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without("transformer.layers.1.dec_attn.r_net.weight"), "the weights lack layers.1.dec_attn.r_net.weight"),
        (without("crit.cluster_weight"), "the weights lack crit.cluster_weight"),
        (without("transformer.r_w_bias"), "the weights lack r_w_bias or layers.0.dec_attn.r_w_bias"),
        (change(d_inner=32), r"CoreNet.0.weight has the shape \(24, 16\), but by config.json it should be \(32, 16\)"),
        (change(n_layer=2), "the weights hold layers.2..*but by config.json there are only 2 layers"),
        (change(n_layer="3"), "n_layer in config.json is .3.: use a whole number"),
        (change(attn_type=2), "attn_type 2, but only 0"),
        (change(pre_lnorm=True), "pre_lnorm True, but only False"),
        (change(d_embed=8), "d_embed 8, but only 16"),
        (change(sample_softmax=100), "sampled softmax"),
        (change(tie_projs=[False, True]), "2 cutoffs, but 2 entries in tie_projs"),
        (change(vocab_size=40), "31 symbols, but the model's vocabulary 40"),
        (lambda c, w, words: words.pop(), "30 symbols, but the model's vocabulary 31"),
        (lambda c, w, words: words.__setitem__(3, "the"), "lines 1 and 4 of .* are both 'the'"),
        (lambda c, w, words: words.__setitem__(3, " "), "line 4 of .* is empty"),
        (lambda c, w, words: words.__setitem__(1, "</s>"), "no symbol '<eos>' for the end of a line: .* --eos"),
        (lambda c, w, words: words.__setitem__(3, "</s>"), "'<eos>' and '</s>' are both fairseq's '</s>'"),
        (lambda c, w, words: words.reverse(), "'<unk>' is not in the first cluster"),
    ],
)
def test_says_what_is_wrong(spoil, message, tmp_path):
    config, words = dict(BASE), list(WORDS)
    weights = random_weights(config)
    spoil(config, weights, words)
    with pytest.raises(UsageError, match=message):
        transfo_xl.convert(write_original(tmp_path / "original", config, weights, words=words))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", None, "there is no .*config.json"),
        ("config.json", "[1]", "no JSON object"),
        ("pytorch_model.bin", None, "neither model.safetensors nor pytorch_model.bin"),
        ("pytorch_model.bin", "junk", "damaged or holds more than tensors"),
        ("model.safetensors", "junk", "model.safetensors is damaged"),
        ("vocab.txt", None, "cannot read .*vocab.txt: No such file"),
    ],
)
def test_says_which_file_is_wrong(name, content, message, tmp_path):
    args = write_original(tmp_path / "original", BASE, random_weights(BASE))
    path = tmp_path / "original" / name
    path.unlink() if content is None else path.write_text(content)
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed (extra hf)")
    with pytest.raises(UsageError, match=message):
        transfo_xl.convert(args)


SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


def convert(*args, **options):
    return run("python", SCRIPT, "--format", "transfo_xl", *args, **options)


def test_eval_lm_gives_the_perplexity_of_the_original(tmp_path):
    config = {**BASE, **CONFIGS["large"]}
    weights = random_weights(config)
    args = write_original(tmp_path / "original", config, weights)
    out, text = tmp_path / "out", tmp_path / "test.txt"
    assert "33 entries" in convert("--input", args.input, "--vocab", args.vocab, "--output", out).stdout
    words = [word for word in WORDS if word != "<eos>"]
    lines = [[words[(7 * row + 3 * place * place) % len(words)] for place in range(row)] for row in (6, 9, 0, 4, 11, 8)]
    text.write_text("".join(" ".join(line) + "\n" for line in lines))
    numbers = [WORDS.index(word) for line in [[], *lines] for word in (*line, "<eos>")]
    loss = original_losses(weights, config, numbers, 5).mean()

    run(
        "fairseq-preprocess",
        "--only-source",
        "--srcdict",
        out / "dict.txt",
        "--testpref",
        text,
        "--destdir",
        out / "bin",
    )
    done = run(
        "fairseq-eval-lm",
        out / "bin",
        "--user-dir",
        USER_DIR,
        "--task",
        "segmented_language_modeling",
        "--tokens-per-sample",
        "5",
        "--batch-size",
        "1",
        "--path",
        out / "checkpoint.pt",
        "--cpu",
    )
    found = re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", done.stdout + done.stderr)
    assert float(found[1]) == pytest.approx(loss.item() / math.log(2), abs=2e-4)
    assert float(found[2]) == pytest.approx(loss.exp().item(), rel=2e-4)


def assert_one_line(done, message):
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("INFO:")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


def test_command_ends_with_one_line_and_leaves_what_is_there(tmp_path):
    args = write_original(tmp_path / "original", BASE, random_weights(BASE))
    given = ["--input", args.input, "--vocab", args.vocab, "--output"]
    (tmp_path / "there").mkdir()
    assert_one_line(convert(*given, tmp_path / "there", check=False), "there exists and is left as it is")
    (tmp_path / "original" / "config.json").unlink()
    assert_one_line(convert(*given, tmp_path / "new", check=False), "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "there"]
    assert not list((tmp_path / "there").iterdir())
