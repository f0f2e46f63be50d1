"""Stock fairseq-train and fairseq-validate with the fused criterion, for one of fairseq's own models."""

import re

from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data

TRAIN = (
    "--task translation --user-dir {} --arch transformer --dropout 0 --criterion fused_label_smoothed_cross_entropy "
    "--label-smoothing 0.1 --report-accuracy --optimizer adam --lr 1e-2 --max-tokens 256 --max-epoch 2 --cpu "
    "--num-workers 0 --seed 1 --log-format simple --no-epoch-checkpoints"
).format(USER_DIR)
FIGURES = r"valid on 'valid' subset \| loss ([\d.]+) \| nll_loss ([\d.]+) .*?\| ppl ([\d.]+) \| accuracy ([\d.]+)"


def test_trains_and_validates(tmp_path):
    data = tiny_translation_data(tmp_path / "data")
    done = run("fairseq-train", data, *TRAIN.split(), *TINY_TRANSFORMER, "--save-dir", tmp_path)
    first, last = re.findall(FIGURES, done.stderr + done.stdout)
    assert float(last[0]) < float(first[0]) and float(last[3]) > 0
    flags = f"--user-dir {USER_DIR} --task translation --max-tokens 256 --cpu --num-workers 0"
    done = run("fairseq-validate", data, *flags.split(), "--path", tmp_path / "checkpoint_last.pt")
    assert f"loss {last[0]} | nll_loss {last[1]} " in done.stderr + done.stdout
