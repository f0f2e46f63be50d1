"""Shared parameters through the stock commands: train, resume, validate, generate, and what bad input gets."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch
from cli.helpers import USER_DIR, call, run, tiny_translation_data
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops.decoder_step import OP

MODEL = "--user-dir {} --arch shared_transformer --layer-sharing cycle_rev --share-all-embeddings --dropout 0.1".format(
    USER_DIR
)
for _side in ("encoder", "decoder"):
    MODEL += f" --{_side}-layers 6 --{_side}-unique-layers 3 --{_side}-embed-dim 32 --{_side}-ffn-embed-dim 64"
    MODEL += f" --{_side}-attention-heads 2"
OPTIMIZATION = (
    "--optimizer adam --lr 5e-3 --clip-norm 1.0 --criterion label_smoothed_cross_entropy --label-smoothing 0.1"
)
TRAINING = f"--max-tokens 400 --cpu --num-workers 0 --log-format simple --log-interval 1 --seed 3 {OPTIMIZATION}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_translation_data(tmp_path_factory.mktemp("data"), n_train=400, n_words=12)


def train(data, save_dir, updates, *flags, **keywords):
    command = f"--task translation -s src -t tgt {MODEL} {TRAINING} --max-update {updates} --save-dir {save_dir}"
    return run("fairseq-train", data, *command.split(), *flags, **keywords)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """60 updates, a checkpoint at every 20th."""
    save_dir = tmp_path_factory.mktemp("trained")
    log = train(data, save_dir, 60, "--save-interval-updates", "20")
    return save_dir, log.stderr + log.stdout


def losses(log):
    return {
        int(n): float(loss) for loss, n in re.findall(r"\| train_inner \|.* loss=([\d.]+),.* num_updates=(\d+)", log)
    }


def weights(path):
    state = torch.load(path, weights_only=True)
    return state["model"], state["last_optimizer_state"]


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            assert_equal(*pair)
    else:
        assert ours == theirs


def test_learns_and_stores_m_layers(trained):
    save_dir, log = trained
    history = losses(log)
    assert len(history) == 60 and history[60] < 0.8 * history[1]
    model, optimizer = weights(save_dir / "checkpoint_last.pt")
    for side in ("encoder", "decoder"):
        assert {name.split(".")[2] for name in model if name.startswith(f"{side}.layers.")} == {"0", "1", "2"}
    # one Adam state a parameter; the tied embedding is written under three names but stored once
    numbers = sum({tensor.data_ptr(): tensor.numel() for tensor in model.values()}.values())
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == numbers - 2  # but "version"
    assert (save_dir / "checkpoint_last.pt").stat().st_size < 1.25 * 3 * 4 * numbers


def test_resuming_continues_exactly(data, trained, tmp_path):
    """From the checkpoint in the middle: same losses, and in the end the same weights and Adam states, bit by bit."""
    save_dir, log = trained
    middle = next(save_dir.glob("checkpoint_*_20.pt"))
    resumed = train(data, tmp_path, 60, "--restore-file", middle)
    expected = {n: loss for n, loss in losses(log).items() if n > 20}
    assert losses(resumed.stderr + resumed.stdout) == expected
    for ours, theirs in zip(weights(tmp_path / "checkpoint_last.pt"), weights(save_dir / "checkpoint_last.pt")):
        assert_equal(ours, theirs)


def test_killed_training_resumes_exactly(data, trained, tmp_path):
    """kill -9 after some checkpoint, then the same command again."""
    from sys import executable

    save_dir, _ = trained
    flags = f"--task translation -s src -t tgt {MODEL} {TRAINING} --save-interval-updates 20".split()
    command = [
        os.path.join(os.path.dirname(executable), "fairseq-train"),
        str(data),
        *flags,
        "--save-dir",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "--max-update", "10000"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.glob("checkpoint_*_20.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(data, tmp_path, 60, "--save-interval-updates", "20")
    for ours, theirs in zip(weights(tmp_path / "checkpoint_last.pt"), weights(save_dir / "checkpoint_last.pt")):
        assert_equal(ours, theirs)


def test_validate_reports_the_loss_of_training(data, trained):
    save_dir, log = trained
    flags = f"--task translation --user-dir {USER_DIR} --max-tokens 400 --cpu --num-workers 0 --log-format simple"
    output = run("fairseq-validate", data, *flags.split(), "--path", save_dir / "checkpoint_last.pt")
    loss = re.findall(r"valid on 'valid' subset \| .*?loss ([\d.]+)", log)[-1]
    assert f"loss {loss} |" in output.stderr + output.stdout


def generate(data, checkpoint, *flags, **keywords):
    command = f"--user-dir {USER_DIR} -s src -t tgt --beam 4 --cpu --num-workers 0"
    return run("fairseq-generate", data, *command.split(), "--path", checkpoint, *flags, **keywords).stdout


def test_generate_does_not_depend_on_the_batch(data, trained):
    checkpoint = trained[0] / "checkpoint_last.pt"
    one, many = (generate(data, checkpoint, "--batch-size", size) for size in ("1", "20"))
    hypotheses = [
        {
            number: (round(float(score), 3), text)
            for number, score, text in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", out, re.M)
        }
        for out in (one, many)
    ]
    assert len(hypotheses[0]) == 20 and hypotheses[0] == hypotheses[1]


def test_generate_is_the_same_on_native_steps(data, trained, monkeypatch):
    """Or says in one line why it cannot have them, before the work starts."""
    if OP.obstacle("native", "cpu", torch.float32):
        pytest.skip(OP.obstacle("native", "cpu", torch.float32))
    command = f"{data} --user-dir {USER_DIR} -s src -t tgt --beam 4 --cpu --num-workers 0 --batch-size 7"
    command = [*command.split(), "--path", trained[0] / "checkpoint_last.pt"]
    found = []
    for kernels in ("native", "torch"):
        monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", kernels)
        lines = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", call("fairseq-generate", *command), re.M)
        found.append([(number, round(float(score), 3), text) for number, score, text in lines])
    assert len(found[0]) == 20 and found[0] == found[1]
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", "native")
    with pytest.raises(UsageError, match="cannot use it in this search: it is no plain beam search"):
        call("fairseq-generate", *command, "--diverse-beam-groups", "2")


def test_interactive_takes_empty_and_refuses_long_lines(data, trained, tmp_path):
    checkpoint = trained[0] / "checkpoint_last.pt"
    command = f"{data} --user-dir {USER_DIR} -s src -t tgt --path {checkpoint} --beam 2 --cpu".split()
    done = run("fairseq-interactive", *command, input="src01 src02 src03\n\nsrc04 unknown\n")
    assert [line[:3] for line in done.stdout.splitlines() if re.match(r"H-\d", line)] == ["H-0", "H-1", "H-2"]
    done = run("fairseq-interactive", *command, input="src01 " * 2000 + "\n", check=False)
    assert done.returncode == 1 and "error: 1 of 1 samples are longer than" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (
            ["--layer-sharing", "spiral"],
            2,
            "invalid choice: spiral (choose from sequence, cycle, cycle_rev, middle_cycle, middle_sequence)",
        ),
        (["--decoder-unique-layers", "7"], 1, "error: 7 unique layers cannot serve 6 depths"),
        (["--encoder-unique-layers", "0"], 2, "argument --encoder-unique-layers: 0 is impossible"),
    ],
    ids=("strategy", "too-many", "none"),
)
def test_impossible_sharing_ends_in_one_line(data, tmp_path, flags, status, message):
    done = train(data, tmp_path / "new", 1, *flags, check=False)
    # argparse quotes the choices or not, depending on the version of Python
    assert done.returncode == status and message in done.stderr.replace("'", "")
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("new/*.pt"))


def test_missing_dictionary_ends_in_one_line(data, tmp_path):
    for file in data.iterdir():
        if not file.name.startswith("dict."):
            (tmp_path / file.name).symlink_to(file)
    done = train(tmp_path, tmp_path / "new", 1, check=False)
    assert done.returncode == 1 and "dict.src.txt" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_checkpoint_of_another_architecture_is_refused_and_kept(data, trained, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in trained[0].iterdir()}
    done = train(data, trained[0], 70, "--encoder-unique-layers", "2", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "encoder.layers has 3 layers in the checkpoint, this model has 2 unique layers at 6 depths" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in trained[0].iterdir()} == before


def test_sentences_longer_than_the_positions_are_refused_before_training(data, tmp_path):
    done = train(data, tmp_path, 1, "--max-source-positions", "4", check=False)
    assert done.returncode == 1 and "skip-invalid-size-inputs-valid-test" in done.stderr
    assert not list(tmp_path.glob("*.pt"))


def test_admin_profiles_in_the_training_command(data, tmp_path):
    log = train(data, tmp_path, 12, "--init", "admin", "--save-interval-updates", "6")
    output = log.stderr + log.stdout
    assert output.count("Admin initialisation, residual scale of each sublayer") == 2  # encoder and decoder, once
    again = train(data, tmp_path / "again", 12, "--init", "admin", "--restore-file", next(tmp_path.glob("*_6.pt")))
    assert "Admin initialisation" not in again.stderr + again.stdout
    for ours, theirs in zip(weights(tmp_path / "again/checkpoint_last.pt"), weights(tmp_path / "checkpoint_last.pt")):
        assert_equal(ours, theirs)
