"""``fairseq-hydra-train``, with models that are no dataclasses to fairseq, and with what a user can put right."""

import pytest
from cli.helpers import USER_DIR, run
from families import write_data

CONFIG = """# @package _group_
common: {{user_dir: {user_dir}, cpu: true, seed: 1}}
dataset: {{num_workers: 0, batch_size: 24, disable_validation: true}}
optimization: {{max_update: 1, lr: [0.001]}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
checkpoint: {{no_save: true}}
task: {{_name: sentence_prediction, data: {data}/labels, num_classes: 2, max_positions: 32, init_token: 0}}
criterion: {criterion}
model: {{_name: {arch}, encoder_layers: 2, encoder_embed_dim: 32, encoder_ffn_embed_dim: 64, encoder_attention_heads: {heads}}}
"""
# the task reads two flags of its criterion, which hydra knows of fairseq's own criterions only
SKIM = "{_name: skim_loss, regression_target: false, classification_head_name: sentence_classification_head}"
PONDER = SKIM.replace("skim_loss", "ponder_loss, task_criterion: sentence_prediction")
CASES = {"transkimmer_base": SKIM, "albert_act_tiny": PONDER, "adatape_tiny": "{_name: sentence_prediction}"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


def train(data, folder, arch, criterion, heads=2, **env):
    text = CONFIG.format(user_dir=USER_DIR, data=data, arch=arch, criterion=criterion, heads=heads)
    (folder / "case.yaml").write_text(text)
    return run("fairseq-hydra-train", "--config-dir", folder, "--config-name", "case", check=False, cwd=folder, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CASES)
def test_trains(data, tmp_path, arch):
    done = train(data, tmp_path, arch, CASES[arch])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_mistake_is_told_in_one_line(data, tmp_path):
    done = train(data, tmp_path, "transkimmer_base", SKIM, heads=3)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [
        "error: --encoder-embed-dim 32 cannot be divided among 3 heads: choose another --encoder-attention-heads"
    ]
    shown = train(data, tmp_path, "transkimmer_base", SKIM, heads=3, FAIRSEQ_ADAPTIVE_TRACEBACK="1")
    assert "Traceback" in shown.stderr and "UsageError" in shown.stderr
