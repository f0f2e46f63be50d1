import types

import groups
import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.distributed import ModuleProxyWrapper
from fairseq.logging import metrics
from fairseq.modules import AdaptiveInput as FairseqAdaptiveInput
from fairseq.modules import AdaptiveSoftmax as FairseqAdaptiveSoftmax

from fairseq_adaptive.criterions.adaptive_cross_entropy import (
    AdaptiveCrossEntropy,
    AdaptiveCrossEntropyConfig,
    adaptive_losses,
)
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveSoftmax

DIM, CUTOFFS = 16, [20, 30]


class Model(torch.nn.Module):
    """A decoder that shifts its features, and an adaptive softmax that the criterion applies."""

    def __init__(self, dictionary, softmax):
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.shift = torch.nn.Parameter(torch.zeros(DIM))
        self.decoder.adaptive_softmax = softmax
        self.decoder.dictionary = dictionary

    def forward(self, features):
        return features + self.decoder.shift, None

    def get_targets(self, sample, net_output):
        return sample["target"]


def model_of(kind, dictionary):
    torch.manual_seed(2)
    if kind == "ours":
        softmax = AdaptiveSoftmax(len(dictionary), CUTOFFS, DIM, factor=2)
    else:
        tied = FairseqAdaptiveInput(len(dictionary), dictionary.pad(), DIM, 2, DIM, CUTOFFS) if "tied" in kind else None
        softmax = FairseqAdaptiveSoftmax(
            len(dictionary), DIM, CUTOFFS, dropout=0.0, factor=2, adaptive_inputs=tied, tie_proj=True
        )
    return Model(dictionary, softmax)


@pytest.fixture
def sample(dictionary):
    """Every word but padding once, then padding."""
    words = [word for word in range(len(dictionary)) if word != dictionary.pad()]
    target = torch.tensor(words + [dictionary.pad()] * 9).view(7, 8)
    torch.manual_seed(4)
    return {"net_input": {"features": torch.randn(7, 8, DIM)}, "target": target, "ntokens": len(words)}


def criterion(dictionary, **options):
    cfg = AdaptiveCrossEntropyConfig(**{"sentence_avg": False, **options})
    return AdaptiveCrossEntropy.build_criterion(cfg, types.SimpleNamespace(target_dictionary=dictionary))


@pytest.mark.parametrize("kind", ("ours", "fairseq", "fairseq tied"))
def test_equals_log_probs_without_padding(dictionary, sample, kind):
    model = model_of(kind, dictionary).double()
    features, target = sample["net_input"]["features"].double(), sample["target"]
    loss, nll = adaptive_losses(model, (features,), target)
    log_probs = model.decoder.adaptive_softmax.get_log_prob(features, None)
    expected = -log_probs.gather(-1, target[..., None])[..., 0][target != dictionary.pad()]
    assert len(expected) == sample["ntokens"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, expected)


def test_fairseqs_softmax_and_ours_agree_with_label_smoothing(dictionary, sample):
    theirs, ours = model_of("fairseq", dictionary), model_of("ours", dictionary)
    with torch.no_grad():
        stock, softmax = theirs.decoder.adaptive_softmax, ours.decoder.adaptive_softmax
        head = stock.head.weight
        softmax.tables[0].copy_(head[: CUTOFFS[0]])
        softmax.cluster_weight.copy_(head[CUTOFFS[0] :])
        softmax.projections[0].copy_(torch.eye(DIM))
        for number, tail in enumerate(stock.tail, start=1):
            softmax.projections[number].copy_(tail[0].weight.T)
            softmax.tables[number].copy_(tail[2].weight)
    net_output = (sample["net_input"]["features"],)
    for smoothing in (0.0, 0.1):
        losses = (torch.stack(adaptive_losses(m, net_output, sample["target"], smoothing)) for m in (ours, theirs))
        torch.testing.assert_close(*losses)


def test_counts_words_that_fairseqs_criterion_leaves_out(dictionary, sample):
    model = model_of("fairseq", dictionary)
    loss, _, logged = criterion(dictionary)(model, sample)
    _, nll = adaptive_losses(model, model(**sample["net_input"]), sample["target"])
    words = sample["target"][sample["target"] != dictionary.pad()].tolist()
    second_of_tails = sum(nll[words.index(cutoff + 1)] - nll_of_head(model, sample, cutoff + 1) for cutoff in CUTOFFS)
    task = types.SimpleNamespace(target_dictionary=dictionary)
    stock, _, stock_logged = AdaptiveLoss(task, sentence_avg=False)(model, sample)
    torch.testing.assert_close(loss, stock.squeeze() + second_of_tails)
    assert logged["ntokens"] == stock_logged["ntokens"] == sample["ntokens"]


def nll_of_head(model, sample, word):
    """The part of a word's loss that stands for its cluster."""
    place = (sample["target"] == word).nonzero()[0]
    softmax = model.decoder.adaptive_softmax
    head = softmax.head(sample["net_input"]["features"][tuple(place)][None]).log_softmax(-1)[0]
    return -head[CUTOFFS[0] + sum(word >= cutoff for cutoff in CUTOFFS) - 1]


@pytest.mark.parametrize("kind", ("ours", "fairseq"))
def test_padding_never_counts(dictionary, sample, kind):
    model = model_of(kind, dictionary)
    padded = sample["target"] == dictionary.pad()
    results = []
    for poison in (0.0, float("nan")):
        features = sample["net_input"]["features"].masked_fill(padded[..., None], poison).requires_grad_()
        poisoned = {**sample, "net_input": {"features": features}}
        loss, size, logged = criterion(dictionary, label_smoothing=0.1)(model, poisoned)
        grad = torch.autograd.grad(loss, features)[0]
        assert grad[padded].eq(0).all()
        results.append((loss, logged["nll_loss"], grad, torch.tensor(size)))
    for first, second in zip(*results):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    empty = {**sample, "target": torch.full_like(sample["target"], dictionary.pad())}
    loss, size, logged = criterion(dictionary)(model, empty)
    assert loss == 0 and size == logged["ntokens"] == 0
    loss.backward()
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())


@pytest.mark.parametrize("sentence_avg", (False, True))
def test_metrics(dictionary, sample, sentence_avg):
    loss, size, logged = criterion(dictionary, label_smoothing=0.1, sentence_avg=sentence_avg)(
        model_of("fairseq", dictionary), sample
    )
    assert size == logged["sample_size"] == (7 if sentence_avg else 47)
    assert logged["nsentences"] == 7 and logged["ntokens"] == 47
    assert AdaptiveCrossEntropy.logging_outputs_can_be_summed()
    with metrics.aggregate(new_root=True) as meters:
        AdaptiveCrossEntropy.reduce_metrics([logged, logged])
    values, log2 = meters.get_smoothed_values(), torch.log(torch.tensor(2.0)).item()
    assert values["loss"] == pytest.approx(loss.item() / size / log2, abs=1e-3)
    assert values["nll_loss"] == pytest.approx(logged["nll_loss"].item() / 47 / log2, abs=1e-3)
    assert values["ppl"] == pytest.approx(2 ** values["nll_loss"], rel=1e-2)
    assert values["loss"] != values["nll_loss"]


@pytest.mark.parametrize("kind", ("ours", "fairseq", "fairseq tied"))
def test_half_precision_sums_in_float32(dictionary, kind):
    """A loss beyond the largest number of float16, where fairseq's criterion returns infinity."""
    model = model_of(kind, dictionary).half()
    target = torch.randint(4, len(dictionary), (40, 512))
    features = torch.randn(40, 512, DIM).half()
    sample = {"net_input": {"features": features}, "target": target}
    loss, _, _ = criterion(dictionary)(model, sample)
    exact = adaptive_losses(model.double(), (features.double(),), target)[0].sum()
    assert loss.dtype == torch.float32 and exact > torch.finfo(torch.float16).max
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.fixture
def one_worker(tmp_path):
    with groups.one_worker(tmp_path):
        yield


def two_steps(loss_of, model, sample):
    # as fairseq wraps a model for --ddp-backend pytorch_ddp
    parallel = ModuleProxyWrapper(torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False))
    for _ in range(2):
        parallel.zero_grad()
        loss_of(parallel, sample)[0].backward()


@pytest.mark.parametrize("kind", ("ours", "fairseq", "fairseq tied"))
def test_distributed_data_parallel_with_unused_tails(dictionary, sample, one_worker, kind):
    sample = {**sample, "target": sample["target"].clamp(max=CUTOFFS[0] - 1)}
    model = model_of(kind, dictionary)
    two_steps(criterion(dictionary), model, sample)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_distributed_data_parallel_refuses_fairseqs_criterion(dictionary, sample, one_worker):
    sample = {**sample, "target": sample["target"].clamp(max=CUTOFFS[0] - 1)}
    stock = AdaptiveLoss(types.SimpleNamespace(target_dictionary=dictionary), sentence_avg=False)
    with pytest.raises(RuntimeError, match="parameters that were not used in producing loss"):
        two_steps(stock, model_of("fairseq", dictionary), sample)


def test_refuses_bad_input(dictionary, sample):
    with pytest.raises(UsageError, match="--adaptive-softmax-cutoff"):
        criterion(dictionary)(Model(dictionary, None), sample)
    for smoothing in (-0.1, 1.0):
        with pytest.raises(UsageError, match="--label-smoothing is .*: use a number from 0 to below 1"):
            criterion(dictionary, label_smoothing=smoothing)
    with pytest.raises(UsageError, match="outside the 48 entries"):
        criterion(dictionary)(model_of("ours", dictionary), {**sample, "target": sample["target"] + 9})
