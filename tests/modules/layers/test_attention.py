"""Outputs and gradients are those of fairseq's attention, whose fused path is not taken."""

import pytest
import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention

from fairseq_adaptive.modules.layers import attention
from fairseq_adaptive.modules.layers.attention import FastAttention

FUTURE = torch.full((7, 7), float("-inf")).triu(1)
PADDING = torch.arange(7) >= torch.tensor([7, 3, 5])[:, None]


def pair(**kwargs):
    torch.manual_seed(2)
    theirs = MultiheadAttention(16, 4, **kwargs)
    ours = FastAttention(16, 4, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(attention, query, key, **kwargs):
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    out, weights = attention(query, key, key, need_weights=False, **kwargs)
    (out * torch.arange(out.numel()).view(out.shape) / out.numel()).sum().backward()
    assert weights is None
    grads = {name: parameter.grad for name, parameter in attention.named_parameters()}
    return {"out": out.detach(), "query": query.grad, "key": key.grad, **grads}


MASKS = [
    {},
    {"key_padding_mask": PADDING},
    {"attn_mask": FUTURE},
    {"attn_mask": FUTURE, "key_padding_mask": PADDING},
    {"attn_mask": FUTURE.bool(), "key_padding_mask": PADDING},
]


@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: " ".join(masks) or "no mask")
def test_self_attention(masks, monkeypatch):
    ours, theirs = pair(self_attention=True)
    x = torch.randn(7, 3, 16)
    expected = results(theirs, x, x, **masks)
    monkeypatch.setattr(F, "multi_head_attention_forward", lambda *args, **kwargs: pytest.fail("fairseq's path"))
    torch.testing.assert_close(results(ours, x, x, **masks), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_of_another_width(monkeypatch):
    ours, theirs = pair(encoder_decoder_attention=True, kdim=12, vdim=12)
    query, key = torch.randn(5, 3, 16), torch.randn(7, 3, 12)
    expected = results(theirs, query, key, key_padding_mask=PADDING)
    monkeypatch.setattr(F, "multi_head_attention_forward", lambda *args, **kwargs: pytest.fail("fairseq's path"))
    torch.testing.assert_close(results(ours, query, key, key_padding_mask=PADDING), expected, rtol=1e-4, atol=1e-5)


def test_weights_and_long_sequences_are_fairseqs(monkeypatch):
    ours, theirs = pair(self_attention=True)
    x = torch.randn(7, 3, 16)
    torch.testing.assert_close(ours(x, x, x, need_weights=True), theirs(x, x, x, need_weights=True))
    monkeypatch.setattr(attention, "LONGEST", 6)
    monkeypatch.setattr(torch, "bmm", lambda *args: pytest.fail("the short path was taken"))
    ours(x, x, x, need_weights=False)


def test_a_query_that_sees_nothing_is_finite():
    ours, _ = pair(self_attention=True)
    x = torch.randn(7, 3, 16)
    left = torch.arange(7) < torch.tensor([0, 3, 7])[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        out = ours.to(dtype)(x.to(dtype), x.to(dtype), x.to(dtype), left, need_weights=False, attn_mask=FUTURE)[0]
        assert out.isfinite().all()


def test_dropout_of_weights():
    ours, _ = pair(self_attention=True, dropout=0.5)
    x = torch.randn(7, 3, 16)
    first, second = (ours.train()(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
