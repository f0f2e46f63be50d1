import itertools

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveInput, AdaptiveSoftmax

VOCAB, DIM = 60, 16
# cutoffs, factor, width of the first cluster, tied
LAYOUTS = [
    ((), 1, 16, True),
    ((), 2, 16, False),
    ((10, 25), 1, 16, True),
    ((10, 25), 1, 12, True),
    ((10, 25, 59), 2, 16, True),
    ((10, 25), 4, 20, False),
    ((1,), 1.5, 16, True),
]


def build(cutoffs, factor, embed_dim, tied, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(3)
    embed = AdaptiveInput(VOCAB, cutoffs, embed_dim, factor, DIM)
    softmax = AdaptiveSoftmax(VOCAB, cutoffs, DIM, factor, embed if tied else None, tied, dropout, embed_dim)
    for parameter in (*embed.parameters(), *softmax.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return embed.to(dtype), softmax.to(dtype)


def dense_log_probs(softmax, hidden):
    """All of the definition at once: a softmax over the head, one over each tail, and their products."""
    sizes = [end - start for start, end in zip((0, *softmax.ends), softmax.ends)]
    biases = softmax.bias.split(sizes)
    logits = []
    for cluster, size in enumerate(sizes):
        start = softmax.ends[cluster] - size
        table = softmax.tables[0][start : start + size] if softmax.factor == 1 else softmax.tables[cluster]
        projected = hidden @ softmax.projections[cluster] if len(softmax.projections) else hidden
        if cluster == 0 and len(sizes) > 1:
            extra = projected @ softmax.cluster_weight.T + softmax.cluster_bias
        logits.append(projected @ table.T + biases[cluster])
    if len(sizes) == 1:
        return logits[0].log_softmax(-1)
    head = torch.cat((logits[0], extra), -1).softmax(-1)
    parts = [head[..., : sizes[0]]]
    parts += [head[..., sizes[0] + i, None] * tail.softmax(-1) for i, tail in enumerate(logits[1:])]
    return torch.cat(parts, -1).log()


def gradients(loss, *modules):
    names = {name: p for i, m in enumerate(modules) for name, p in m.named_parameters(f"{i}")}
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return dict(zip(names, grads))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_dense_definition(layout):
    embed, softmax = build(*layout)
    hidden = torch.randn(4, 15, DIM, dtype=torch.float64).transpose(0, 1)  # not contiguous
    target = torch.randperm(VOCAB).view(15, 4)  # every word, so also those on each side of every cutoff
    weight = torch.rand(15, 4, dtype=torch.float64)
    loss, nll = softmax(hidden, target)
    dense = dense_log_probs(softmax, hidden)
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones_like(weight))
    expected = -dense.gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(softmax.get_log_prob(hidden), dense)
    ours, theirs = (gradients((value * weight).sum(), softmax) for value in (loss, expected))
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_label_smoothing_is_within_each_softmax(layout):
    _, softmax = build(*layout)
    hidden, target = torch.randn(VOCAB, DIM, dtype=torch.float64, requires_grad=True), torch.arange(VOCAB)
    loss, nll = softmax(hidden, target, label_smoothing=0.1)
    torch.testing.assert_close(nll, softmax(hidden, target)[1])
    dense, ends = dense_log_probs(softmax, hidden), softmax.ends
    starts = (0, *ends)
    tail_sums = [dense[:, start:end].logsumexp(-1, keepdim=True) for start, end in zip(ends, ends[1:])]
    head = torch.cat([dense[:, : ends[0]], *tail_sums], -1)
    expected = []
    for word in range(VOCAB):
        cluster = sum(word >= end for end in ends)
        used = [(head[word], word if cluster == 0 else ends[0] + cluster - 1)]
        if cluster:
            within = dense[word, starts[cluster] : ends[cluster]]
            used.append((within - within.logsumexp(-1), word - starts[cluster]))
        total = 0
        for log_probs, right in used:
            if len(log_probs) > 1:
                q = torch.full_like(log_probs, 0.1 / (len(log_probs) - 1))
                q[right] = 0.9
                total = total - (q * log_probs).sum()
        expected.append(total)
    expected = torch.stack(expected)
    torch.testing.assert_close(loss, expected)
    weight = torch.rand(VOCAB, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((v * weight).sum(), hidden, retain_graph=True)[0] for v in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    # both results can be used in one loss
    both = torch.autograd.grad((loss * weight + nll).sum(), hidden)[0]
    torch.testing.assert_close(both, theirs + torch.autograd.grad(softmax(hidden, target)[1].sum(), hidden)[0])


@pytest.mark.parametrize("words", ([0, 3, 59, 20, 7, 30] * 50, [0, 0, 0], []), ids=("all clusters", "one", "none"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sums_in_one_pass(layout, words):
    embed, softmax = build(*layout)
    hidden = torch.randn(len(words), DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (softmax, softmax.summed):
        loss, nll = function(hidden, torch.tensor(words, dtype=torch.long), 0.1)
        grads = gradients(3 * loss.sum() + embed(torch.arange(VOCAB)).sum(), embed, softmax)
        results.append({"loss": loss.sum(), "nll": nll.sum(), **grads})
    expected, ours = results
    torch.testing.assert_close(ours, expected)
    assert set(ours) > {"1.bias"} and not any(grad is None for grad in ours.values())
    with torch.no_grad():
        assert softmax.summed(hidden, torch.tensor(words, dtype=torch.long))[0].grad_fn is None


def test_sums_under_autocast():
    _, softmax = build((10, 25), 1, 16, False, torch.float32)
    hidden, target = torch.randn(500, DIM), torch.randint(VOCAB, (500,))
    exact = gradients(softmax.summed(hidden, target, 0.1)[0], softmax)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = softmax.summed(hidden, target, 0.1)
    assert loss.dtype == torch.float32
    for name, grad in gradients(loss, softmax).items():
        assert 0 < (grad - exact[name]).norm() / exact[name].norm() < 0.02, name


def test_one_cluster_is_fairseqs_label_smoothing():
    _, softmax = build((), 1, 16, False)
    hidden, target = torch.randn(30, DIM, dtype=torch.float64), torch.arange(30)
    log_probs = (hidden @ softmax.tables[0].T + softmax.bias).log_softmax(-1)
    expected = label_smoothed_nll_loss(log_probs, target, 0.2, reduce=False)
    torch.testing.assert_close(torch.stack(softmax(hidden, target, 0.2)), torch.stack(expected))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_input_equals_dense_definition(layout):
    cutoffs, factor, embed_dim, _ = layout
    embed, _ = build(*layout)
    tokens = torch.randperm(VOCAB).view(6, 10)
    rows = []
    for cluster, table in enumerate(embed.tables):
        rows.append(table @ embed.projections[cluster].T if len(embed.projections) else table)
    expected = torch.cat(rows)[tokens] * DIM**0.5
    torch.testing.assert_close(embed(tokens), expected)
    weight = torch.rand(6, 10, DIM, dtype=torch.float64)
    ours, theirs = (gradients((value * weight).sum(), embed) for value in (embed(tokens), expected))
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=name)
    assert embed(tokens[:0]).shape == (0, 10, DIM)


@pytest.mark.parametrize("factor", (1, 2))
def test_padding_is_zero_and_learns_nothing(factor):
    embed = AdaptiveInput(VOCAB, (10, 25), 16, factor, padding_idx=11)
    embedded = embed(torch.tensor([[11, 1], [12, 11]]))
    assert embedded[0, 0].eq(0).all() and embedded[1, 1].eq(0).all() and embedded[1, 0].ne(0).any()
    embedded.sum().backward()
    table, row = (embed.tables[0], 11) if factor == 1 else (embed.tables[1], 1)
    assert table.grad[row].eq(0).all() and table.grad[row + 1].ne(0).all()


def test_transformer_xl_layout():
    """Shapes of the wt103 models: one table and no projection (base); four of each, narrower by 4 (large)."""
    cutoffs = (20, 40, 50)
    base = AdaptiveSoftmax(VOCAB, cutoffs, 16, 1, AdaptiveInput(VOCAB, cutoffs, 16), True)
    assert [tuple(t.shape) for t in base.tables] == [(60, 16)] and not len(base.projections)
    embed = AdaptiveInput(VOCAB, cutoffs, 64, 4)
    large = AdaptiveSoftmax(VOCAB, cutoffs, 64, 4, embed, True)
    assert [tuple(t.shape) for t in large.tables] == [(20, 64), (20, 16), (10, 4), (10, 1)]
    assert [tuple(p.shape) for p in large.projections] == [(64, 64), (64, 16), (64, 4), (64, 1)]
    assert all(ours is theirs for ours, theirs in zip(large.tables, embed.tables))
    assert [ours is theirs for ours, theirs in zip(large.projections, embed.projections)] == [False, True, True, True]
    chosen = AdaptiveSoftmax(VOCAB, cutoffs, 64, 4, embed, [True, False, True, False])
    assert [ours is theirs for ours, theirs in zip(chosen.projections, embed.projections)] == [True, False, True, False]


@pytest.mark.parametrize("tied, target", list(itertools.product((True, False), ([], [3, 4], [30]))))
def test_every_parameter_gets_a_gradient(tied, target):
    embed, softmax = build((10, 25), 2, 16, tied)
    target = torch.tensor(target, dtype=torch.long)
    hidden = torch.randn(len(target), DIM, dtype=torch.float64)
    loss, nll = softmax(hidden, target)
    assert loss.shape == nll.shape == target.shape
    loss.sum().backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in softmax.parameters())
    if not target.ge(25).any():
        assert softmax.tables[2].grad.eq(0).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_accumulates_in_float32(dtype):
    _, exact = build((10, 25), 2, 16, False)
    _, softmax = build((10, 25), 2, 16, False, dtype)
    exact.load_state_dict({name: value.double() for name, value in softmax.state_dict().items()})
    hidden, target = torch.randn(4096, DIM).to(dtype), torch.randint(VOCAB, (4096,))
    loss, nll = softmax(hidden, target, 0.1)
    reference, _ = exact(hidden.double(), target, 0.1)
    assert loss.dtype == nll.dtype == softmax.get_log_prob(hidden).dtype == torch.float32
    # logits are rounded to the dtype; what is done with them is not
    torch.testing.assert_close(loss.double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(loss.sum().double(), reference.sum(), rtol=1e-3, atol=0)
    loss.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in softmax.parameters())


def test_autocast():
    embed, softmax = build((10, 25), 2, 16, True, torch.float32)
    tokens = torch.randint(VOCAB, (3, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = softmax(embed(tokens), tokens, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, softmax(embed(tokens), tokens, 0.1)[0], rtol=0.03, atol=0.03)
    loss.sum().backward()
    assert all(p.grad is not None for p in (*embed.parameters(), *softmax.parameters()))


def test_log_prob_of_targets_needs_no_memory():
    _, softmax = build((10, 25), 2, 16, False)
    hidden, target = torch.randn(2, 3, DIM, dtype=torch.float64), torch.randint(VOCAB, (2, 3))
    log_probs = softmax.get_log_prob(hidden, target)
    assert log_probs.shape == (2, 3, VOCAB) and log_probs.stride(-1) == 0
    full = softmax.get_log_prob(hidden).gather(-1, target[..., None])
    torch.testing.assert_close(log_probs.gather(-1, target[..., None]), full)


def test_dropout_of_tails_only():
    _, softmax = build((10, 25), 2, 16, False, dropout=0.5)
    hidden, target = torch.randn(VOCAB, DIM, dtype=torch.float64), torch.arange(VOCAB)
    trained = softmax(hidden, target)[0]
    evaluated = softmax.eval()(hidden, target)[0]
    torch.testing.assert_close(trained[:10], evaluated[:10], rtol=0, atol=0)
    assert (trained[10:] - evaluated[10:]).abs().min() > 0


@pytest.mark.parametrize("cutoffs", ((25, 10), (10, 10), (0, 10), (-1,), (60,), (10, 61)), ids=str)
def test_refuses_wrong_cutoffs(cutoffs):
    for build in (lambda: AdaptiveInput(VOCAB, cutoffs, 16), lambda: AdaptiveSoftmax(VOCAB, cutoffs, 16)):
        with pytest.raises(UsageError, match="increasing numbers from 1 to 59"):
            build()


def test_refuses_what_does_not_fit():
    embed = AdaptiveInput(VOCAB, (10, 25), 16, 2)
    with pytest.raises(UsageError, match="same ends of clusters"):
        AdaptiveSoftmax(VOCAB, (10, 26), 16, 2, embed)
    with pytest.raises(UsageError, match="same output width"):
        AdaptiveSoftmax(VOCAB, (10, 25), 32, 2, embed, True)
    with pytest.raises(UsageError, match="3 adaptive clusters, but 2 values"):
        AdaptiveSoftmax(VOCAB, (10, 25), 16, 2, embed, [False, True])
    with pytest.raises(UsageError, match="smaller factor"):
        AdaptiveInput(VOCAB, (10, 25), 15, 4)
    with pytest.raises(UsageError, match="at least 1"):
        AdaptiveInput(VOCAB, (10, 25), 16, 0.5)


@pytest.mark.parametrize("word", (-1, VOCAB))
def test_refuses_words_outside_the_vocabulary(word):
    embed, softmax = build((10, 25), 2, 16, True)
    words = torch.tensor([3, word])
    with pytest.raises(UsageError, match=f"target {word} is outside the 60 entries"):
        softmax(torch.zeros(2, DIM, dtype=torch.float64), words)
    with pytest.raises(UsageError, match="outside the 60 entries"):
        embed(words)
