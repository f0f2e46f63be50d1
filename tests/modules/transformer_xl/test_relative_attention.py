import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl.relative_attention import (
    KeyValueCache,
    RelativeAttention,
    RelativePositions,
)
from fairseq_adaptive.ops.relative_attention import eager

CHANNELS, HEADS, DIM = 12, 3, 5


def layer(dtype=torch.float64, seed=1, clamp_length=0, **options):
    torch.manual_seed(seed)
    attention = RelativeAttention(CHANNELS, HEADS, DIM, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention.to(dtype).eval(), RelativePositions(CHANNELS, clamp_length).eval()


def inputs(length, batch=2, dtype=torch.float64, seed=2):
    torch.manual_seed(seed)
    return torch.randn(batch, length, CHANNELS, dtype=torch.float64).to(dtype)


def encoding(distance, clamp_length):
    if clamp_length:
        distance = min(distance, clamp_length)
    frequencies = 1 / 10000 ** (torch.arange(0.0, CHANNELS, 2.0) / CHANNELS)  # fp32, as published weights were trained
    angles = distance * frequencies.double()
    return torch.cat((angles.sin(), angles.cos()))


def reference(attention, x, memory=None, window=None, clamp_length=0):
    """The formula of the paper, one score at a time."""
    query_weight, key_weight, value_weight = attention.qkv_proj.weight.chunk(3)
    source = x if memory is None else torch.cat((memory, x), 1)
    before = source.size(1) - x.size(1)
    rows = []
    for b in range(x.size(0)):
        for i in range(x.size(1)):
            heads = []
            for h in range(HEADS):
                of_head = slice(h * DIM, (h + 1) * DIM)
                query = query_weight[of_head] @ x[b, i]
                scores, values = [], []
                for j in range(source.size(1)):
                    distance = before + i - j
                    if distance < 0 or (window is not None and distance >= window):
                        continue
                    position = attention.position_proj.weight[of_head] @ encoding(distance, clamp_length)
                    key = key_weight[of_head] @ source[b, j]
                    score = (query + attention.content_bias[h]) @ key + (query + attention.position_bias[h]) @ position
                    scores.append(score / math.sqrt(DIM))
                    values.append(value_weight[of_head] @ source[b, j])
                heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            rows.append(attention.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("queried, remembered", [(1, 0), (1, 4), (5, 0), (3, 7), (7, 3)])
@pytest.mark.parametrize("window, clamp_length", [(None, 0), (3, 0), (None, 2), (4, 2)])
def test_equals_the_formula_in_outputs_and_every_gradient(queried, remembered, window, clamp_length):
    attention, positions = layer(clamp_length=clamp_length)
    x = inputs(queried).requires_grad_()
    memory = inputs(remembered, seed=3).requires_grad_() if remembered else None
    weight = inputs(queried, seed=4)
    leaves = {"x": x, **dict(attention.named_parameters())}
    if memory is not None:
        leaves["memory"] = memory
    results = []
    for out in attention(x, positions, memory, window=window), reference(attention, x, memory, window, clamp_length):
        grads = torch.autograd.grad((out * weight).sum(), leaves.values(), allow_unused=True)
        results.append((out, dict(zip(leaves, grads))))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for name, grad in their_grads.items():
        if grad is None:  # a memory position that the window never reaches
            grad = torch.zeros_like(leaves[name])
        torch.testing.assert_close(our_grads[name], grad, rtol=0, atol=1e-11, msg=lambda text: f"{name}: {text}")
    if queried > 1 or remembered > 0:
        assert {"x", "qkv_proj.weight", "position_proj.weight", "content_bias", "position_bias"} <= set(our_grads)
        assert our_grads["position_bias"].abs().max() > 1e-4


def test_position_table_holds_sines_then_cosines_of_falling_distances():
    table = RelativePositions(CHANNELS, clamp_length=3)(6, inputs(1))
    torch.testing.assert_close(table, torch.stack([encoding(d, 3) for d in (5, 4, 3, 2, 1, 0)]), rtol=0, atol=1e-15)
    assert torch.equal(table[0], table[2]) and not torch.equal(table[2], table[3])
    assert table[-1].tolist() == [0.0] * 6 + [1.0] * 6


def test_position_table_is_no_state_and_follows_type_and_length():
    positions = RelativePositions(CHANNELS)
    with torch.inference_mode():
        positions(4, inputs(1))
    attention, _ = layer()
    attention(inputs(3), positions).sum().backward()  # a table made in inference mode does not stop training
    assert not positions.state_dict() and not list(positions.parameters())
    assert positions(9, inputs(1)).shape == (9, CHANNELS)
    assert torch.equal(positions(2, inputs(1)), positions(9, inputs(1))[-2:])
    assert positions(2, inputs(1, dtype=torch.bfloat16)).dtype is torch.bfloat16
    again = pickle.loads(pickle.dumps(copy.deepcopy(positions)))
    assert torch.equal(again(3, inputs(1)), positions(3, inputs(1)))


def test_position_dropout_is_for_training_only():
    positions = RelativePositions(CHANNELS, dropout=0.5)
    torch.manual_seed(1)
    noisy = positions(40, inputs(1))
    clean = positions.eval()(40, inputs(1))
    dropped = noisy == 0
    assert 0.3 < dropped.double().mean() < 0.75
    torch.testing.assert_close(noisy[~dropped], 2 * clean[~dropped])


def test_tied_biases_are_one_parameter_with_the_sum_of_gradients():
    shared = [nn.Parameter(torch.randn(HEADS, DIM, dtype=torch.float64)) for _ in range(2)]
    first, positions = layer(content_bias=shared[0], position_bias=shared[1])
    second, _ = layer(seed=5, content_bias=shared[0], position_bias=shared[1])
    assert first.content_bias is second.content_bias and first.position_bias is second.position_bias
    x = inputs(4)
    separate = [torch.autograd.grad(each(x, positions).sum(), shared) for each in (first, second)]
    together = torch.autograd.grad((first(x, positions) + second(x, positions)).sum(), shared)
    for both, one, other in zip(together, *separate):
        torch.testing.assert_close(both, one + other)
        assert one.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 3, 4], [13]])
def test_cache_equals_the_whole(chunks, window):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        attention, positions = layer(dtype)
        x = inputs(13, dtype=dtype)
        cache = KeyValueCache()
        out = torch.cat([attention(part, positions, cache=cache, window=window) for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(out, attention(x, positions, window=window), rtol=0, atol=tolerance)
        assert cache.keys.shape == cache.values.shape == (2, HEADS, 13, DIM)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 6])
def test_bounded_cache_equals_memory_of_that_length(length):
    attention, positions = layer()
    x, cache, memory = inputs(200), KeyValueCache(length), None
    for part in x.split([1] * 80 + [5] * 20 + [7, 2, 11], 1):
        with_memory = attention(part, positions, memory)
        memory = part if memory is None else torch.cat((memory, part), 1)
        memory = memory[:, -length:]
        torch.testing.assert_close(attention(part, positions, cache=cache), with_memory, rtol=0, atol=1e-12)
        assert len(cache) == cache.keys.size(2) == memory.size(1)
    expected = attention.by_head(attention.qkv_proj(memory))[1].transpose(0, 1)
    torch.testing.assert_close(cache.keys, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_cache_projects_nothing_twice():
    attention, positions = layer()
    seen = []
    for name in ("qkv_proj", "position_proj"):
        getattr(attention, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    cache = KeyValueCache(8)
    for part in inputs(40).split(4, 1):
        attention(part, positions, cache=cache)
    assert (seen.count("qkv_proj"), seen.count("position_proj")) == (10, 1)


def test_cache_passes_gradients_of_the_segment_and_none_of_the_past():
    attention, positions = layer()
    first, second = inputs(4), inputs(3, seed=7)
    cache = KeyValueCache()
    attention(first, positions, cache=cache)
    out = attention(second, positions, cache=cache)
    memory = first.requires_grad_()
    expected = attention(second, positions, memory)
    for_out = attention.out_proj.weight
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), for_out)[0] for y in (out, expected)))
    assert memory.grad is None and not cache.keys.requires_grad


@torch.no_grad()
def test_cache_is_reordered_like_the_beam():
    attention, positions = layer()
    x, order = inputs(5, batch=3), torch.tensor([2, 0, 0, 1])
    cache = KeyValueCache()
    cache.reorder(order)  # before the first step there is nothing to reorder
    attention(x, positions, cache=cache)
    cache.reorder(order)
    step = inputs(1, batch=4, seed=8)
    expected = attention(step, positions, x[order])
    torch.testing.assert_close(attention(step, positions, cache=cache), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("with_cache", [False, True])
def test_long_segments_are_computed_in_blocks(window, with_cache, monkeypatch):
    attention, positions = layer(clamp_length=6)
    x, memory = inputs(19), inputs(8, seed=3)
    parameters = dict(attention.named_parameters())
    whole = attention(x, positions, memory, window=window)
    whole_grads = torch.autograd.grad(whole.square().sum(), parameters.values())
    monkeypatch.setattr(eager, "BLOCK", 4)
    blocks, weights = [], eager._weights
    monkeypatch.setattr(eager, "_weights", lambda *args: blocks.append(args[1].size(2)) or weights(*args))
    if with_cache:
        cache = KeyValueCache()
        attention(memory, positions, cache=cache, window=window)
        out = attention(x, positions, cache=cache, window=window)
    else:
        out = attention(x, positions, memory, window=window)
        grads = torch.autograd.grad(out.square().sum(), parameters.values())
        for name, grad, expected in zip(parameters, grads, whole_grads):
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    blocks = blocks[-5:]
    assert blocks == [12, 16, 20, 24, 27] if window in (None, 40) else blocks == 4 * [3 + window] + [2 + window]


@torch.no_grad()
def test_window_makes_results_independent_of_the_segment_length():
    attention, positions = layer()
    x, window = inputs(24), 6
    whole = attention(x, positions, window=window)

    def in_segments(length, window):
        outputs, memory = [], None
        for part in x.split(length, 1):
            outputs.append(attention(part, positions, memory, window=window))
            memory = (part if memory is None else torch.cat((memory, part), 1))[:, -6:]
        return torch.cat(outputs, 1)

    for length in (1, 5, 8, 24):
        torch.testing.assert_close(in_segments(length, window), whole, rtol=0, atol=1e-10)
    # without it they do: the test above can fail
    assert (in_segments(5, None) - in_segments(8, None)).abs().max() > 1e-3


@torch.no_grad()
def test_looks_neither_ahead_nor_beyond_the_window_nor_at_other_rows():
    attention, positions = layer()
    x, memory = inputs(6), inputs(4, seed=3)
    out = attention(x, positions, memory, window=3)
    later = x.clone()
    later[:, 4:] += 1
    changed = attention(later, positions, memory, window=3)
    torch.testing.assert_close(changed[:, :4], out[:, :4], rtol=0, atol=1e-12)
    assert (changed[:, 4] - out[:, 4]).abs().max() > 1e-3

    earlier = memory.clone()
    earlier[:, -2] += 1
    changed = attention(x, positions, earlier, window=3)
    torch.testing.assert_close(changed[:, 1:], out[:, 1:], rtol=0, atol=1e-12)
    assert (changed[:, 0] - out[:, 0]).abs().max() > 1e-3
    wider = [attention(x, positions, each, window=4)[:, 1] for each in (earlier, memory)]
    assert (wider[0] - wider[1]).abs().max() > 1e-3

    alone = attention(x[1:], positions, memory[1:], window=3)
    torch.testing.assert_close(alone, out[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_is_close_and_finite(dtype, tolerance):
    attention, positions = layer(torch.float32)
    x, memory = inputs(9, dtype=torch.float32), inputs(7, dtype=torch.float32, seed=3)
    exact = attention(x, positions, memory)
    half = copy.deepcopy(attention).to(dtype)
    out = half(x.to(dtype), positions, memory.to(dtype))
    out.float().square().sum().backward()
    assert out.dtype is dtype
    assert (out.float() - exact).abs().max() < tolerance * exact.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


def test_dropout_is_on_the_probabilities_in_training_only():
    attention, positions = layer(dropout=0.5)
    x = inputs(6)
    assert torch.equal(attention(x, positions), attention(x, positions))
    attention.train()
    torch.manual_seed(3)
    samples = torch.stack([attention(x, positions) for _ in range(4000)])
    assert (samples[0] - samples[1]).abs().max() > 1e-2
    error = (samples.mean(0) - attention.eval()(x, positions)).abs()
    assert (error < 6 * samples.std(0) / 4000**0.5 + 1e-9).all()


def test_says_what_is_wrong():
    with pytest.raises(UsageError, match="5 attention heads do not divide the embedding dimension 12"):
        RelativeAttention(12, 5)
    with pytest.raises(UsageError, match="even embedding dimension, not 7"):
        RelativePositions(7)
    attention, positions = layer()
    with pytest.raises(ValueError, match="memory or cache, not both"):
        attention(inputs(2), positions, inputs(2), KeyValueCache())
