"""Skimming against deletion of tokens in float64, its gradients, and the two ways to run."""

from argparse import Namespace

import pytest
import torch
from fairseq.models.transformer import TransformerConfig

from fairseq_adaptive.modules import EncoderLayer, LayerStack, recording
from fairseq_adaptive.modules.policies.skimming import Skimming, SkimPredictor

DIM, DEPTHS, LENGTHS = 8, 4, (9, 1, 6, 4)


def layer(normalize_before=False):
    args = Namespace(
        encoder_embed_dim=DIM,
        encoder_ffn_embed_dim=12,
        encoder_attention_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        activation_fn="gelu",
        encoder_normalize_before=normalize_before,
    )
    return EncoderLayer(TransformerConfig.from_namespace(args))


@pytest.fixture(params=[False, True], ids=("post-LN", "pre-LN"))
def stack(request):
    """Two layers at four depths, and predictors that skim about a third of the tokens at each of them."""
    torch.manual_seed(3)
    layers = [layer(request.param), layer(request.param)]
    stack = LayerStack(layers, (0, 1, 1, 0), pass_depth=True, router=Skimming(DIM, DEPTHS))
    for predictor in stack.router:
        torch.nn.init.normal_(predictor[1].weight)
        torch.nn.init.normal_(predictor[4].weight)
        predictor[4].bias.data.copy_(torch.tensor([-0.5, 0.5]))
    for parameter in stack.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stack.double().eval()
    with recording(stack):
        yield stack


def run(stack, packed, *args):
    stack.packed = packed
    return stack(*args)


def skim_dense(stack, *args):
    return run(stack, False, *args)


def skim_packed(stack, *args):
    return run(stack, True, *args)


def decide(router, depth, x, protected=None):
    return router.choose(depth, x, {}, None, None, protected, False)[:2]


def padded(sequences, extra=0):
    """T x B x C, padding B x T, protected B x T: the first token of each."""
    length = max(len(sequence) for sequence in sequences) + extra
    x = torch.full((length, len(sequences), DIM), 1e3, dtype=torch.float64)
    padding = torch.ones(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        x[: len(sequence), row], padding[row, : len(sequence)] = sequence, False
    protected = torch.zeros_like(padding)
    protected[:, 0] = True
    return x, padding, protected


@pytest.fixture
def sequences():
    torch.manual_seed(4)
    return [torch.randn(length, DIM, dtype=torch.float64) for length in LENGTHS]


def deleting(stack, sequence):
    """One sequence, tokens deleted in fact; the last states and how many depths each token went through."""
    result, depths = sequence.clone(), torch.zeros(len(sequence), dtype=torch.long)
    places = list(range(len(sequence)))
    for depth in range(len(stack)):
        scores = stack.router[depth](result[places])
        places = [place for place, (skim, keep) in zip(places, scores.tolist()) if keep >= skim or place == 0]
        result[places] = stack[depth](result[places].unsqueeze(1))[:, 0]
        depths[places] += 1
    return result, depths


@torch.no_grad()
@pytest.mark.parametrize("run", (skim_dense, skim_packed))
@pytest.mark.parametrize("extra", (0, 3))
def test_equals_deleting_tokens(stack, sequences, run, extra):
    out = run(stack, *padded(sequences, extra))
    trace = stack.recorder[-1]
    total = 0
    for row, sequence in enumerate(sequences):
        expected, depths = deleting(stack, sequence)
        torch.testing.assert_close(out[: len(sequence), row], expected, rtol=0, atol=1e-12)
        assert trace.updates[row, : len(sequence)].tolist() == depths.tolist()
        total += depths.sum().item()
    assert sum(step.kept.sum().item() for step in trace.steps) == total == trace.updates.sum()  # no padding in it
    assert 0.2 < total / (DEPTHS * sum(LENGTHS)) < 0.8
    assert (trace.updates[:, 0] == DEPTHS).all()


@torch.no_grad()
@pytest.mark.parametrize("run", (skim_dense, skim_packed))
def test_sequences_are_on_their_own(stack, sequences, run):
    together = run(stack, *padded(sequences))
    for row, sequence in enumerate(sequences):
        alone = run(stack, *padded([sequence]))
        torch.testing.assert_close(together[: len(sequence), row], alone[:, 0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_runs_agree_in_single_precision(stack, sequences):
    stack = stack.float()
    x, padding, protected = padded(sequences)
    dense, packed = (run(stack, x.float(), padding, protected) for run in (skim_dense, skim_packed))
    torch.testing.assert_close(dense[~padding.t()], packed[~padding.t()], rtol=0, atol=1e-5)
    first, second = stack.recorder
    assert all(torch.equal(a.alive, b.alive) for a, b in zip(first.steps, second.steps))
    for a, b in zip(first.steps, second.steps):
        torch.testing.assert_close(a.probability[b.alive], b.probability[b.alive], rtol=0, atol=1e-5)


@torch.no_grad()
def test_input_is_left_alone_and_nothing_may_stay(stack, sequences):
    for predictor in stack.router:
        predictor[4].bias.data.copy_(torch.tensor([50.0, -50.0]))
    for sequence in (sequences[:1], sequences):  # one alone shares its memory when it is turned to B x T x C
        x, padding, protected = padded(sequence)
        before = x.clone()
        for run in (skim_dense, skim_packed):
            assert torch.equal(run(stack, x, padding, None)[~padding.t()], x[~padding.t()])
            run(stack, x, padding, protected)
            assert torch.equal(x, before)
            assert stack.recorder[-1].updates.sum(1).tolist() == [DEPTHS] * len(sequence)
    empty = torch.ones_like(padding)
    assert torch.equal(skim_packed(stack, x, empty, None), x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_without_router_all_tokens_run_and_padding_is_left_out(sequences, dtype):
    torch.manual_seed(7)
    stack = LayerStack([layer(), layer()], (0, 1, 1, 0), pass_depth=True).eval()
    x, padding, _ = padded(sequences)
    x = x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        stack.without_padding = True
        out = stack(x, padding)
    for row, sequence in enumerate(sequences):
        alone = sequence.float().unsqueeze(1)
        for each in stack:
            alone = each(alone)
        torch.testing.assert_close(
            out[: len(sequence), row], alone[:, 0], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1
        )
    assert torch.equal(out[padding.t()], x[padding.t()])


def test_training_draws_with_the_gradient_of_the_soft_sample(stack):
    stack.train()
    x = torch.randn(20000, DIM, dtype=torch.float64)[:1].expand(20000, DIM)
    kept, probability = decide(stack.router, 0, x)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert 0.05 < probability[0] < 0.95
    assert kept.mean().item() == pytest.approx(probability[0].item(), abs=0.015)
    x = torch.randn(3, 50, DIM, dtype=torch.float64)
    torch.manual_seed(6)
    kept, _ = decide(stack.router, 1, x, torch.arange(50) == 0)
    assert (kept[:, 0] == 1).all()
    weight = stack.router[1][4].weight
    found = torch.autograd.grad(kept[:, 1:].square().sum(), weight)[0]
    torch.manual_seed(6)
    soft = torch.nn.functional.gumbel_softmax(stack.router[1](x), tau=1.0)[:, 1:, 1]
    expected = torch.autograd.grad(soft, weight, grad_outputs=2 * kept[:, 1:].detach())[0]
    torch.testing.assert_close(found, expected)


def test_without_noise_training_decides_as_evaluation_does(stack):
    x = torch.randn(300, DIM, dtype=torch.float64)
    expected, probability = decide(stack.eval().router, 1, x)
    stack.train().router.noise = 0.0
    kept, _ = decide(stack.router, 1, x)
    assert torch.equal(kept, expected) and 0.1 < kept.mean() < 0.9
    weight = stack.router[1][4].weight
    soft = stack.router[1](x).softmax(-1)[:, 1]
    found, expected = (torch.autograd.grad(each.sum(), weight)[0] for each in (kept, soft))
    torch.testing.assert_close(found, expected)


def test_evaluation_is_deterministic_and_every_predictor_learns(stack, sequences):
    x, padding, protected = padded(sequences)
    assert torch.equal(skim_dense(stack, x, padding, protected), skim_dense(stack, x, padding, protected))
    stack.train()
    out = skim_dense(stack, x, padding, protected)
    out[0].square().sum().backward()  # of the first tokens, which other tokens reach by attention only
    gradients = [predictor[4].weight.grad.norm().item() for predictor in stack.router]
    assert all(gradient > 0 for gradient in gradients)
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters())
    stack.recorder.clear()
    skim_dense(stack, x, padding, protected)
    share = sum(step.kept.sum() for step in stack.recorder[0].steps)
    assert share.requires_grad and not stack.recorder[0].steps[0].kept[padding].any()


def test_stack_runs_packed_where_no_gradient_is_wanted(stack, sequences):
    x, *masks = padded(sequences)
    assert list(stack) == [stack.layer(number) for number in (0, 1, 1, 0)]
    stack.packed = None
    assert stack(x, *masks).requires_grad
    with torch.no_grad():
        assert torch.equal(stack(x, *masks), skim_packed(stack, x, *masks))
        stack.packed = False
        assert torch.equal(stack(x, *masks), skim_dense(stack, x, *masks))


def test_predictor_is_as_published():
    predictor = SkimPredictor(384)
    numbers = sorted(predictor.state_dict())
    assert numbers == sorted(f"{number}.{kind}" for number in (0, 1, 2, 4) for kind in ("weight", "bias"))
    assert predictor[4].bias.tolist() == pytest.approx([-5, 5], abs=0.2)
    assert predictor[4].weight.std().item() == pytest.approx(0.02, rel=0.15)
    router = Skimming(384, 2).eval()
    kept, probability = decide(router, 1, torch.randn(100, 384))
    assert kept.all() and probability.min() > 0.999
