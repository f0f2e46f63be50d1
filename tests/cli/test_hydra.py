"""``fairseq-hydra-train``, with models that are no dataclasses to fairseq, and with what a user can put right."""

import subprocess
import sys

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
SKIM = "{_name: skim_loss}"
PONDER = "{_name: ponder_loss, task_criterion: sentence_prediction}"
CASES = {
    "transkimmer_base": [SKIM, "{_name: adaptive_compute_loss, task_criterion: sentence_prediction}"],
    "albert_act_tiny": [PONDER],
    "adatape_tiny": ["{_name: tape_ponder_loss}", "{_name: sentence_prediction}"],
}
CASES = [(arch, criterion) for arch, criterions in CASES.items() for criterion in criterions]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


def train(data, folder, arch, criterion, heads=2, **env):
    text = CONFIG.format(user_dir=USER_DIR, data=data, arch=arch, criterion=criterion, heads=heads)
    (folder / "case.yaml").write_text(text)
    return run("fairseq-hydra-train", "--config-dir", folder, "--config-name", "case", check=False, cwd=folder, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("arch, criterion", CASES)
def test_trains(data, tmp_path, arch, criterion):
    """The task takes two values from its criterion: hydra must know ours when it composes the configuration."""
    done = train(data, tmp_path, arch, criterion)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_groups_have_our_models_and_criterions(data, tmp_path):
    said = ["task=language_modeling", f"task.data={data}/text", "model=shared_transformer_lm", "criterion=ponder_loss"]
    said += ["criterion.task_criterion=cross_entropy", "model.halting=act", "model.decoder_layers=2"]
    said += ["optimizer=adam", "lr_scheduler=fixed", "optimization.lr=[0.001]", "optimization.max_update=1"]
    said += ["common.cpu=true", "checkpoint.no_save=true", "dataset.num_workers=0", "dataset.batch_size=4"]
    done = run("fairseq-hydra-train", *said, "dataset.disable_validation=true", check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_other_programs_that_use_hydra_import_nothing(tmp_path):
    """Hydra imports hydra_plugins of every package in every program."""
    (tmp_path / "program.py").write_text(
        "import sys\nfrom hydra.core.plugins import Plugins\nPlugins.instance()\n"
        "assert 'hydra_plugins.fairseq_adaptive' in sys.modules\n"
        "assert not {'fairseq', 'torch', 'fairseq_adaptive'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, tmp_path / "program.py"], check=True, cwd=tmp_path)


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
