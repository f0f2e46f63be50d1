"""ALBERT-ACT: sizes, heads, the interface of stock tasks, packed equals dense."""

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording

TINY = {
    "encoder_input_dim": 8,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 32,
}


@pytest.fixture
def tokens(batch):
    return batch["prev_output_tokens"]  # padded on the right


def albert(build, arch="albert_act_tiny", **flags):
    model = build(arch, **{**TINY, **flags})
    if hasattr(model.encoder.layers.halting, "unit"):
        torch.nn.init.normal_(model.encoder.layers.halting.unit.weight, std=0.5)
    return model


@pytest.mark.parametrize("arch, depths", (("albert_act_tiny", 6), ("albert_act_small", 12), ("albert_act_base", 24)))
def test_published_sizes(build, arch, depths):
    model = build(arch, dtype=torch.float32, max_positions=512)
    names = dict(model.named_parameters())
    assert len(model.encoder.layers) == depths and model.encoder.layers.halting.threshold == 0.99
    vocabulary = 30_000  # ALBERT base (Lan et al., 2020) has 11.7M with pooler and heads; depth adds none
    count = sum(p.numel() for p in names.values()) + (vocabulary - 48) * (128 + 1)
    assert 11.6e6 < count < 11.9e6


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet", "margin", "none"))
@torch.no_grad()
def test_packed_equals_dense_and_rows_are_independent(build, tokens, rule):
    model = albert(build, halting=rule, halting_threshold=1e-3 if rule == "margin" else None)
    outputs = []
    for packed in (True, False):
        model.encoder.layers.packed = packed
        with recording(model) as traces:
            outputs.append((model(tokens, features_only=True)[0], traces["encoder.layers"]))
    (packed, traces), (dense, others) = outputs
    real = tokens != 1
    torch.testing.assert_close(packed[real], dense[real], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(tokens[2:, :3], features_only=True)[0][0], packed[2, :3], rtol=0, atol=1e-6)
    if rule != "none":
        assert torch.equal(traces[0].updates, others[0].updates) and traces[0].updates[real].unique().numel() > 1


def test_halting_unit_keeps_the_bias_of_its_rule(build):
    assert float(albert(build, halting="ut_act").encoder.layers.halting.unit.bias) == 1.0


def test_heads(build, tokens):
    model = albert(build)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[0, 2] = masked[1, 5] = True
    scores, extra = model(tokens)
    assert scores.shape == (*tokens.shape, 48)
    torch.testing.assert_close(model(tokens, masked_tokens=masked)[0], scores[masked])
    assert model.sentence_order(extra).shape == (3, 2)
    segments = (torch.arange(tokens.size(1)) > 3).long().expand_as(tokens)
    assert not torch.allclose(model(tokens, segments=segments)[0], scores)
    model.register_classification_head("topic", num_classes=5)
    assert model.double()(tokens, classification_head_name="topic")[0].shape == (3, 5)
    assert model.encoder.lm_head.weight is model.encoder.embed_tokens.weight


@pytest.mark.parametrize("kwargs", ({}, {"classification_head_name": "topic"}, {"masked_tokens": True}), ids=str)
def test_heads_that_a_task_leaves_out_have_gradients_of_zero(build, tokens, kwargs):
    """Several workers wait for the gradient of every parameter."""
    model = albert(build).train()
    model.register_classification_head("topic", num_classes=5)
    model.double()
    kwargs = {name: tokens == 9 if value is True else value for name, value in kwargs.items()}
    model(tokens, **kwargs)[0].sin().sum().backward()
    idle = ("encoder.pooler.", "encoder.sentence_order_head.")
    idle += ("encoder.lm_head.",) if "classification_head_name" in kwargs else ("classification_heads.",)
    for name, parameter in model.named_parameters():
        if name.startswith(idle):
            assert name.startswith("classification_heads.") or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name


def test_loads_without_the_heads_of_another_task(build, tokens):
    pretrained, model = albert(build), albert(build, seed=2)
    model.register_classification_head("topic", num_classes=5)
    model.load_state_dict(pretrained.state_dict())
    torch.testing.assert_close(model.double()(tokens)[0], pretrained(tokens)[0])
    with pytest.raises(UsageError, match="another architecture"):
        albert(build, encoder_ffn_embed_dim=64).load_state_dict(pretrained.state_dict())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"encoder_layers": 0}, "--encoder-layers is 0"),
        ({"encoder_attention_heads": 3}, "cannot be divided among 3 heads"),
        ({"halting_threshold": 1.5}, "above 0 and up to 1"),
    ],
)
def test_refuses_impossible_flags(build, flags, message):
    with pytest.raises(UsageError, match=message):
        albert(build, **flags)


def test_refuses_long_sequences(build, tokens):
    with pytest.raises(UsageError, match="8 tokens is longer than --max-positions 4"):
        albert(build, max_positions=4)(tokens)
