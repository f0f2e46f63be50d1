import argparse
import math

import pytest
import torch
from fairseq.logging import metrics

from fairseq_adaptive.criterions.architecture_entropy_loss import ArchitectureEntropyLoss, ArchitectureEntropyLossConfig
from fairseq_adaptive.errors import UsageError

TINY = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "memory_length": 8}
TINY.update(blocks=4, dropout=0.0, temperature_updates=100)
ADAPTIVE = {"adaptive_softmax_cutoff": "10,30"}


@pytest.fixture
def sample():
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, 11))
    target = tokens[:, 1:].clone()
    target[1, 6:] = 1
    return {"net_input": {"src_tokens": tokens[:, :-1]}, "target": target}


def criterion(task, **values):
    cfg = ArchitectureEntropyLossConfig(sentence_avg=False, **values)
    return ArchitectureEntropyLoss(task, argparse.Namespace(**vars(cfg)))


@pytest.mark.parametrize("softmax", [{}, ADAPTIVE], ids=("full", "adaptive"))
def test_is_the_cross_entropy_without_weights(build, task, sample, softmax):
    model = build("par_supernet", **TINY, **softmax)
    loss, sample_size, log = criterion(task)(model, sample)
    probabilities = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    kept = sample["target"] != 1
    gold = probabilities.gather(-1, sample["target"].unsqueeze(-1)).squeeze(-1)[kept]
    assert sample_size == log["ntokens"] == int(kept.sum()) == 26
    torch.testing.assert_close(loss, -gold.sum(), rtol=1e-6, atol=0, check_dtype=False)
    assert float(log["entropy"]) == pytest.approx(math.log2(3))
    assert float(log["compute"]) == pytest.approx(
        2 / 3
    )  # a third of attention + a third of feed-forward, 2 blocks a pair


def test_terms_are_means_times_the_sample_size(build, task, sample):
    model = build("par_supernet", **TINY)
    with torch.no_grad():
        model.decoder.architecture.copy_(torch.tensor([[1.0, 0, -1], [0, 2, 0], [0, 0, 3], [0.5, 0, 0]]))
    plain, sample_size, log = criterion(task)(model, sample)
    model.decoder.set_num_updates(5)
    model.decoder.temperature.fill_(1.0)
    options = {"entropy_weight": 0.3, "entropy_warmup_updates": 10, "target_compute": 0.2, "compute_weight": 0.7}
    loss, _, _ = criterion(task, **options)(model, sample)
    p = torch.softmax(model.decoder.architecture, -1)
    entropy = -(p * p.log()).sum(-1).mean()
    compute = (p @ model.decoder.block_costs).sum() / 2
    expected = plain + sample_size * (0.15 * entropy + 0.7 * (compute / 0.2 - 1))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert float(log["compute"]) == pytest.approx(float(compute))


def test_compute_below_the_target_costs_nothing(build, task, sample):
    model = build("par_supernet", **TINY)
    assert criterion(task, target_compute=0.7)(model, sample)[0] == criterion(task)(model, sample)[0]


def test_terms_reach_the_architecture(build, task, sample):
    gradients = []
    for options in {}, {"entropy_weight": 1.0}, {"target_compute": 0.1}:
        model = build("par_supernet", **TINY)
        with torch.no_grad():
            model.decoder.architecture.copy_(torch.eye(3)[[0, 1, 2, 0]])
        criterion(task, **options)(model, sample)[0].backward()
        gradients.append(model.decoder.architecture.grad)
    entropy, compute = gradients[1] - gradients[0], gradients[2] - gradients[0]
    # falling entropy lets the likely kind grow; less compute lets identity grow
    assert (entropy[range(4), [0, 1, 2, 0]] < 0).all() and (compute[:, 2] < 0).all() and (compute[:, 0] > 0).all()


def test_probabilities_are_logged_over_workers(build, task, sample):
    model = build("par_supernet", **TINY)
    logs = [criterion(task)(model, sample)[2] for _ in range(2)]
    with metrics.aggregate() as found:
        ArchitectureEntropyLoss.reduce_metrics([{name: sum(log[name] for log in logs) for name in logs[0]}])
    values = found.get_smoothed_values()
    assert values["block_3_i"] == pytest.approx(1 / 3, abs=1e-3) and values["compute"] == pytest.approx(0.667)
    assert sum(name.startswith("block_") for name in values) == 12


def test_wrong_use_is_refused(build, task, sample):
    with pytest.raises(UsageError, match="-(weight|compute) is -1"):
        criterion(task, entropy_weight=-1.0)
    with pytest.raises(UsageError, match="is for --arch par_supernet"):
        criterion(task)(build("par_transformer_xl", **{**TINY, "layout": "af"}), sample)
