"""Transkimmer against fairseq's RoBERTa, its two ways to run, token types, heads and foreign checkpoints."""

import copy

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording

TINY = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_layers": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_positions": 20,
}


@pytest.fixture
def tokens():
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, 12))
    tokens[:, 0] = 0
    for row, length in enumerate((12, 7, 9)):
        tokens[row, length - 1], tokens[row, length:] = 2, 1
    tokens[0, 5] = tokens[2, 4] = 2
    return tokens


def eager(model):
    """Predictors that skim: about half of the tokens at each depth."""
    for predictor in model.encoder.sentence_encoder.layers.router:
        torch.nn.init.normal_(predictor[4].weight)
        torch.nn.init.zeros_(predictor[4].bias)
    return model


def stack_of(model):
    return model.encoder.sentence_encoder.layers


def roberta_weights(build, **flags):
    return build("roberta", **{**TINY, **flags}).state_dict()


@torch.no_grad()
@pytest.mark.parametrize("flags", ({}, {"no_skimming": True}), ids=("skimming", "dense"))
def test_loads_a_roberta_and_equals_it_while_nothing_is_skimmed(build, tokens, flags):
    roberta = build("roberta", **TINY)
    model = build("transkimmer_base", seed=2, **TINY, **flags)
    model.load_state_dict(roberta.state_dict(), strict=True)
    expected, found = (each(tokens)[0][tokens.ne(1)] for each in (roberta, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("flags", ({}, {"encoder_unique_layers": 1}, {"token_types": 2, "layer_norm_eps": 1e-12}))
def test_dense_equals_packed_alone_or_together(build, tokens, flags):
    model = eager(build("transkimmer_base", **TINY, **flags))
    assert len({parameter.shape for parameter in stack_of(model).router.parameters()}) == 4
    layers = sum(name.endswith("fc1.weight") for name, _ in model.named_parameters())
    assert layers == flags.get("encoder_unique_layers", 3)
    results = {}
    for packed in (False, True):
        stack_of(model).packed = packed
        with recording(model) as traces:
            results[packed] = model(tokens, features_only=True)[0]
        updates = traces["encoder.sentence_encoder.layers"][0].updates
        assert (updates[:, 0] == 3).all() and 0.5 < updates[tokens.ne(1)].float().mean() < 2.5
    torch.testing.assert_close(results[True][tokens.ne(1)], results[False][tokens.ne(1)], rtol=0, atol=1e-10)
    alone = model(tokens[1:2, :7], features_only=True)[0]
    torch.testing.assert_close(alone[0], results[True][1, :7], rtol=0, atol=1e-10)


@torch.no_grad()
def test_separators_can_be_protected(build, tokens):
    for protect in (False, True):
        model = eager(build("transkimmer_base", protect_separators=protect, **TINY))
        for predictor in stack_of(model).router:
            predictor[4].bias.copy_(torch.tensor([50.0, -50.0]))
        with recording(model) as traces:
            model(tokens)
        expected = 3 * tokens.eq(0) + (3 * tokens.eq(2) if protect else 0)
        assert torch.equal(traces["encoder.sentence_encoder.layers"][0].updates, expected)


@torch.no_grad()
def test_token_types_change_after_the_first_separator(build, tokens):
    model = build("transkimmer_base", token_types=2, **TINY)
    segments = model.encoder.sentence_encoder.segments(tokens)
    assert segments[0].tolist() == [0] * 6 + [1] * 6
    assert segments[1, :7].tolist() == [0] * 7
    found, given = model(tokens)[0], model(tokens, segments=segments)[0]
    assert torch.equal(found[tokens.ne(1)], given[tokens.ne(1)])
    other = model(tokens, segments=torch.zeros_like(tokens))[0]
    assert not torch.allclose(found[0], other[0])
    torch.testing.assert_close(found[1, :7], other[1, :7])


def test_starts_as_published_and_trains(build, tokens):
    model = build("transkimmer_base", dtype=torch.float32, **TINY).train()
    biases = torch.stack([predictor[4].bias for predictor in stack_of(model).router])
    assert (biases[:, 1] > 4.5).all() and (biases[:, 0] < -4.5).all()
    unsure = stack_of(build("transkimmer_base", skim_bias=1.0, **TINY)).router[2][4].bias
    assert unsure.tolist() == pytest.approx([-1, 1], abs=0.1)
    model.register_classification_head("sentence_classification_head", num_classes=3)
    eager(model)
    logits, _ = model(tokens, features_only=True, classification_head_name="sentence_classification_head")
    assert logits.shape == (3, 3)
    logits.square().sum().backward()
    assert all(predictor[4].weight.grad.norm() > 0 for predictor in stack_of(model).router)
    masked = tokens.eq(tokens[0, 3])
    assert model(tokens, masked_tokens=masked)[0].shape == (int(masked.sum()), 48)


def test_span_head_comes_and_goes_with_the_checkpoint(build, tokens):
    model = build("transkimmer_base", **TINY)
    model.register_span_head()
    model.span_head.double()
    assert model(tokens, spans=True)[0].shape == (3, 2, 12)
    plain = build("transkimmer_base", no_skimming=True, **TINY)
    plain.load_state_dict(model.state_dict(), strict=True)
    fresh = build("transkimmer_base", seed=3, **TINY)
    fresh.register_span_head()
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(fresh.encoder.lm_head.weight, model.encoder.lm_head.weight)
    assert not torch.equal(fresh.span_head.weight, model.span_head.weight)


@torch.no_grad()
def test_fewer_positions_load_and_more_are_refused(build, tokens):
    state = build("transkimmer_base", **TINY).state_dict()
    short = build("transkimmer_base", **{**TINY, "max_positions": 12})
    short.load_state_dict(state, strict=True)
    assert torch.equal(
        short.state_dict()["encoder.sentence_encoder.embed_positions.weight"],
        state["encoder.sentence_encoder.embed_positions.weight"][:14],
    )
    with pytest.raises(UsageError, match="a sequence of 13 tokens is longer than --max-positions 12"):
        short(torch.full((1, 13), 5))
    with pytest.raises(UsageError, match="--max-positions 30 is more than the checkpoint has positions for: 12"):
        build("transkimmer_base", **{**TINY, "max_positions": 30}).load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"encoder_layerdrop": 0.1}, "--encoder-layerdrop cannot be combined with skimming"),
        ({"no_skimming": True, "router": "skimming"}, "contradict each other"),
        ({"encoder_attention_heads": 3}, "16 cannot be divided among 3 heads"),
        ({"encoder_unique_layers": 4}, "between 1 and 3"),
        ({"skim_noise": 1.5}, "--skim-noise is 1.5"),
    ],
)
def test_refuses(build, flags, message):
    with pytest.raises(UsageError, match=message):
        build("transkimmer_base", **{**TINY, **flags})


def test_architectures_have_the_published_sizes(build):
    flags = {"encoder_layers": 1, "max_positions": 8, "dtype": torch.float32}
    minilm = build("transkimmer_minilm_l6", **flags)
    assert stack_of(minilm)[0].fc1.weight.shape == (1536, 384) and stack_of(minilm)[0].self_attn.num_heads == 12
    assert minilm.encoder.sentence_encoder.embed_segments.weight.shape == (2, 384)
    assert minilm.encoder.lm_head.layer_norm.eps == stack_of(minilm)[0].final_layer_norm.eps == 1e-12
    assert stack_of(minilm).router[0][0].eps == 1e-5
    large = build("transkimmer_large", **flags)
    assert stack_of(large)[0].fc1.weight.shape == (4096, 1024)
    assert large.encoder.sentence_encoder.embed_segments is None


@pytest.mark.parametrize("autocast", (False, True))
def test_bfloat16_runs_both_ways(build, tokens, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model = build("transkimmer_base", dtype=dtype, **TINY)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.train()(tokens)[0].float().square().mean().backward()
        model.eval()
        results = {}
        for packed in (False, True):
            stack_of(model).packed = packed
            with torch.no_grad():
                results[packed] = model(tokens, features_only=True)[0]
                skimming = eager(copy.deepcopy(model))
                assert skimming(tokens, features_only=True)[0][tokens.ne(1)].isfinite().all()
    assert results[True].dtype == results[False].dtype == dtype
    torch.testing.assert_close(results[True][tokens.ne(1)], results[False][tokens.ne(1)], rtol=0, atol=0.1)
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)
