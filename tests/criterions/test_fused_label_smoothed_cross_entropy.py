"""Everything is that of fairseq's criterion: values, gradients, logs; and what does not fit is refused."""

import argparse

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.distributed import ModuleProxyWrapper
from fairseq.tasks.fairseq_task import StatefulContainer
from groups import one_worker
from omegaconf import OmegaConf
from torch import nn

from fairseq_adaptive.modules.watched import Watched
from fairseq_adaptive.criterions.fused_label_smoothed_cross_entropy import FusedLabelSmoothedCrossEntropy
from fairseq_adaptive.criterions.ponder_loss import PonderLoss, PonderLossConfig
from fairseq_adaptive.errors import UsageError

WIDTHS = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 2}
DECODER = {"dtype": torch.float32, **{f"decoder_{name}": value for name, value in WIDTHS.items()}}
BOTH = {**DECODER, **{f"encoder_{name}": value for name, value in WIDTHS.items()}}
SHARED = {"decoder_unique_layers": 1}
MODELS = {
    "transformer": BOTH,
    "shared_transformer": {**BOTH, **SHARED, "encoder_unique_layers": 1, "share_all_embeddings": True},
    "transformer_lm": DECODER,
    "shared_transformer_lm": {**DECODER, **SHARED, "share_decoder_input_output_embed": True},
}


@pytest.fixture
def sample(batch, dictionary):
    target = batch["prev_output_tokens"].roll(-1, 1)
    target[:, -1] = dictionary.pad()
    return {"net_input": batch, "target": target, "ntokens": int(target.ne(dictionary.pad()).sum())}


def of_model(sample, arch):
    if not arch.endswith("lm"):
        return sample
    net_input = {"src_tokens": sample["net_input"]["prev_output_tokens"], "src_lengths": None}
    return {**sample, "net_input": net_input}


def criteria(dictionary, *args):
    task = argparse.Namespace(target_dictionary=dictionary)
    return [kind(task, *args) for kind in (FusedLabelSmoothedCrossEntropy, LabelSmoothedCrossEntropyCriterion)]


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def everything(criterion, model, sample, **kwargs):
    model.zero_grad()
    loss, size, log = criterion(model, sample, **kwargs)
    loss.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "size": size, "log": log, **grads}


@pytest.mark.parametrize("smoothing, prefix, sentence_avg", [(0.1, 0, False), (0.0, 0, True), (0.2, 2, False)])
@pytest.mark.parametrize("arch", MODELS)
def test_equals_fairseqs(build, dictionary, sample, arch, smoothing, prefix, sentence_avg):
    model, sample = build(arch, **MODELS[arch]), of_model(sample, arch)
    fused, stock = criteria(dictionary, sentence_avg, smoothing, prefix, True)
    ours, expected = everything(fused, model, sample), everything(stock, model, sample)
    assert_close(ours, expected)
    assert expected["loss"] > 1 and expected["log"]["total"] == sample["target"][:, prefix:].ne(dictionary.pad()).sum()
    assert all(grad is not None for grad in expected.values())


def test_never_asks_for_scores(build, dictionary, sample, monkeypatch):
    model = build("shared_transformer", **MODELS["shared_transformer"])
    fused, stock = criteria(dictionary, False, 0.1)
    monkeypatch.setattr(model.decoder, "output_layer", lambda features: pytest.fail("all logits were made"))
    fused(model, sample)
    with pytest.raises(pytest.fail.Exception):
        stock(model, sample)


def test_loss_of_each_token(build, dictionary, sample):
    model = build("transformer", **BOTH)
    ours, expected = (everything(each, model, sample, reduce=False) for each in criteria(dictionary, False, 0.1))
    assert_close(ours, expected)
    assert ours["loss"].numel() == sample["target"].numel()


def test_a_teacher_sees_scores(build, dictionary, sample):
    watched = Watched(build("transformer", **BOTH))
    fused, stock = criteria(dictionary, False, 0.1)
    assert_close(fused(watched, sample)[0], stock(watched, sample)[0])
    assert watched.output.size(-1) == len(dictionary)


@pytest.mark.parametrize("halting", ("act", "pondernet"))
def test_is_a_task_criterion_of_ponder_loss(build, dictionary, sample, halting):
    model = build("shared_transformer", **MODELS["shared_transformer"], halting=halting, dropout=0.0).train()
    results = []
    for name in ("fused_label_smoothed_cross_entropy", "label_smoothed_cross_entropy"):
        task = argparse.Namespace(target_dictionary=dictionary, state=StatefulContainer())
        cfg = PonderLossConfig(task_criterion=name, task_criterion_args='{"label_smoothing": 0.1}')
        root = OmegaConf.create({"common": {"tpu": False}, "optimization": {"sentence_avg": False}, "criterion": cfg})
        results.append(everything(PonderLoss.build_criterion(root.criterion, task), model, sample))
    assert_close(*results)


@pytest.mark.parametrize("tied", (True, False))
def test_distributed_data_parallel(build, dictionary, sample, tmp_path, tied):
    """Its hooks see one gradient of each parameter, although the projection is not used in the model's own forward."""
    model = build("transformer", **BOTH, share_all_embeddings=tied)
    fused, _ = criteria(dictionary, False, 0.1)
    expected = everything(fused, model, sample)
    with one_worker(tmp_path):
        # as fairseq wraps a model for --ddp-backend pytorch_ddp
        parallel = ModuleProxyWrapper(torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False))
        for _ in range(2):
            model.zero_grad()
            loss = fused(parallel, sample)[0]
            loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


def test_refuses_bad_input(build, dictionary, sample):
    fused, _ = criteria(dictionary, False, 0.1)
    model = build("transformer_lm", **DECODER, adaptive_softmax_cutoff="20,30", criterion="adaptive_loss")
    with pytest.raises(UsageError, match="has an adaptive softmax; train with --criterion adaptive_cross_entropy"):
        fused(model, of_model(sample, "transformer_lm"))
    with pytest.raises(UsageError, match="linear output projection; train with --criterion label_smoothed"):
        fused(build("fconv_iwslt_de_en", encoder_layers="[(8, 3)]", decoder_layers="[(8, 3)]"), sample)
    for smoothing in (-0.1, 1.0):
        with pytest.raises(UsageError, match="--label-smoothing is .*: use a number from 0 to below 1"):
            criteria(dictionary, False, smoothing)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    in_features = property(lambda self: self.base.in_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def scaled_output_layer(self, features, **kwargs):
    return type(self).__mro__[1].output_layer(self, features, **kwargs) / 2


CHANGES = {
    "adapter": lambda decoder: setattr(decoder, "output_projection", LoRA(decoder.output_projection)),
    "hook": lambda decoder: decoder.output_projection.register_forward_hook(lambda module, args, out: out / 2),
    "subclass": lambda decoder: setattr(decoder.output_projection, "__class__", Halved),
    "output_layer": lambda decoder: setattr(
        decoder, "__class__", type("Other", (type(decoder),), {"output_layer": scaled_output_layer})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_projection_is_called(build, sample, dictionary, change):
    """Adapters, hooks and subclasses are in the loss and get gradients."""
    model = build("shared_transformer", seed=2, **MODELS["shared_transformer"])
    fused, stock = criteria(dictionary, False, 0.1)
    plain = float(fused(model, sample)[0])
    CHANGES[change](model.decoder)
    ours, expected = everything(fused, model, sample), everything(stock, model, sample)
    assert ours.keys() == expected.keys() and abs(float(ours["loss"]) - plain) > 1e-3
    for name, value in expected.items():
        if name != "log":
            assert_close(ours[name], value)
