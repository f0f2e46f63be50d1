"""A training for early exit, and self-speculative decoding with it, through the stock commands."""

import re

import pytest
import torch
from cli.helpers import USER_DIR, run, tiny_translation_data
from fairseq_adaptive.ops.decoder_step import OP

MODEL = f"--user-dir {USER_DIR} --arch layerskip_tiny --share-all-embeddings --decoder-layers 6 --encoder-layers 2"
for _side, _unique in (("encoder", 2), ("decoder", 3)):
    MODEL += f" --{_side}-unique-layers {_unique} --{_side}-embed-dim 32 --{_side}-ffn-embed-dim 64 --{_side}-attention-heads 2"
LOSS = (
    "--criterion early_exit_loss --task-criterion fused_label_smoothed_cross_entropy --label-smoothing 0.1 "
    "--exit-weights sqrt --exit-curriculum gradual"
)
TRAINING = (
    "--optimizer adam --lr 5e-3 --clip-norm 1 --max-tokens 400 --cpu --num-workers 0 --log-format simple --seed 3"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layerskip")
    data = tiny_translation_data(folder, n_train=400, n_words=12)
    flags = f"--task translation -s src -t tgt {MODEL} {LOSS} {TRAINING} --max-update 40 --no-epoch-checkpoints"
    done = run("fairseq-train", data, *flags.split(), "--save-dir", folder / "save")
    return data, folder / "save" / "checkpoint_last.pt", done.stdout + done.stderr


def generate(trained, *flags, batch_size=64, **keywords):
    data, path, _ = trained
    given = f"--user-dir {USER_DIR} --path {path} --batch-size {batch_size} --cpu --num-workers 0 --gen-subset test"
    return run("fairseq-generate", data, *given.split(), *flags, **keywords)


def lines(done):
    return sorted(line for line in done.stdout.splitlines() if re.match(r"[STHDP]-\d", line))


def test_the_log_has_the_loss_of_each_depth(trained):
    valid = re.findall(r"valid on 'valid' subset \|.*", trained[2])[-1]
    assert all(f"exit_loss_{depth} " in valid for depth in range(1, 6))
    history = [float(each) for each in re.findall(r"train_inner.* exit_loss=([\d.]+)", trained[2])]
    assert not history or history[-1] < history[0]


INT8 = ("--model-overrides", "{'int8': True}")


@pytest.mark.parametrize("kernels, batch_size, more", (("native", 64, ()), ("native", 5, INT8), ("torch", 3, ())))
def test_generate_says_the_same(trained, kernels, batch_size, more):
    """With native steps also the same scores, in all digits that are printed, in float32 and in int8."""
    if kernels == "native" and OP.obstacle("native", "cpu", torch.float32) is not None:
        pytest.skip("the library is not there")
    env = {"FAIRSEQ_ADAPTIVE_KERNELS": kernels}
    plain = lines(generate(trained, "--beam", "1", *more, env=env))
    drafts = "--self-speculative", "2", "--draft", "3"
    done = generate(trained, "--beam", "1", *drafts, *more, batch_size=batch_size, env=env)
    assert ("int8: " in done.stdout + done.stderr) == bool(more)
    found = lines(done)
    if kernels == "torch":
        plain, found = (re.sub(r"-?\d\.\d+", "", "\n".join(each)) for each in (plain, found))
    assert len(plain) > 40 and found == plain
    said = re.search(r"2 depths drafted (\d+) words, ([\d.]+)% of which were said", done.stdout + done.stderr)
    assert int(said[1]) > 0 and float(said[2]) > 0


def test_interactive_says_the_same(trained):
    """Also by sampling where there is one word to draw."""
    data, path, _ = trained
    flags = f"--user-dir {USER_DIR} --path {path} --beam 1 --cpu -s src -t tgt".split()
    text, more = (
        (data.parent / "test.src").read_text(),
        ("--self-speculative", "1", "--sampling", "--sampling-topk", "1"),
    )
    found = [run("fairseq-interactive", data, *flags, *each, input=text).stdout for each in ((), more)]
    said = [[line.split("\t")[2] for line in each.splitlines() if line.startswith("H-")] for each in found]
    assert said[0] == said[1] and said[0]


def test_a_beam_is_refused(trained):
    done = generate(trained, "--self-speculative", "2", check=False)
    assert done.returncode and "add --beam 1" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
