from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_parity import AdaTapeParity, AdaTapeParityConfig

LENGTH = 12


def build(seed=1, **flags):
    sizes = {
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "tape_mlp_dim": 8,
        "tape_ffn_embed_dim": 8,
        "tape_tokens": 6,
        "tape_threshold": 3.0,
    }
    cfg = OmegaConf.structured(AdaTapeParityConfig(**{**sizes, **flags}))
    torch.manual_seed(seed)
    task = SimpleNamespace(cfg=SimpleNamespace(sequence_length=LENGTH))
    model = AdaTapeParity.build_model(cfg, task).double().eval()
    torch.nn.init.normal_(model.output_projection.weight)
    if model.tape:
        torch.nn.init.normal_(model.tape.reader.norm.weight, 2.0)  # tapes of several lengths
    return model


@pytest.fixture
def elements():
    torch.manual_seed(3)
    return torch.randint(0, 3, (40, LENGTH))


def lengths(extra):
    return extra["tape"].live.sum(1).tolist()


def test_rows_do_not_see_each_other(elements):
    model = build()
    logits, extra = model(elements)
    assert len(set(lengths(extra))) > 1
    for row in range(10):
        assert torch.allclose(model(elements[row : row + 1])[0][0], logits[row], atol=1e-12)


def test_inference_computes_live_tokens_only_and_equals_training(elements):
    model = build()
    dense, extra = model(elements)
    seen = []
    handle = model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        packed, again = model(elements)
    handle.remove()
    assert torch.allclose(packed, dense, atol=1e-12)
    assert torch.equal(again["tape"].tokens, extra["tape"].tokens)
    assert sum(seen) == 40 + sum(lengths(extra)) < 40 * (1 + max(lengths(extra)))


def test_dead_tape_places_do_not_matter(elements, monkeypatch):
    model = build()
    expected, extra = model(elements)
    assert len(set(lengths(extra))) > 1
    mlp = model.tape.mlp.forward

    def poisoned(tokens):
        return mlp(tokens).masked_fill(~extra["tape"].live.unsqueeze(-1), torch.nan)

    monkeypatch.setattr(model.tape.mlp, "forward", poisoned)
    assert torch.allclose(model(elements)[0], expected, atol=1e-12)


def test_order_of_elements_reaches_the_tape_through_the_query_only(elements):
    """Bank entries have no position: with the same query, a permuted sequence has the same tape."""
    model = build()
    torch.nn.init.zeros_(model.embedding.weight)
    permuted = elements[:, torch.randperm(LENGTH)]
    assert torch.allclose(model(elements)[0], model(permuted)[0], atol=1e-12)


def test_shorter_sequences_stop_at_their_end(elements):
    model = build(tape_allow_exhausted=True)
    padded = elements.clone()
    padded[:, 5:] = 3
    _, extra = model(padded)
    assert extra["tape"].entries.max() < 5
    alone, _ = model(padded[:1])
    assert torch.allclose(alone, model(padded)[0][:1], atol=1e-12)
    with pytest.raises(UsageError, match="bank of 5 entries can be exhausted"):
        build()(padded)


def test_every_parameter_learns(elements):
    model = build().train()
    logits, extra = model(elements)
    (logits.square().sum() + extra["tape"].cost.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or name.endswith("k_proj.bias")), name


def test_without_tape_and_with_shared_layers(elements):
    plain = build(tape_tokens=0, encoder_layers=4)
    universal = build(tape_tokens=0, encoder_layers=4, encoder_unique_layers=1)
    assert not any("tape" in name or "bank" in name for name, _ in plain.named_parameters())
    count = {model: sum(p.numel() for p in model.layers.parameters()) for model in (plain, universal)}
    assert count[plain] == 4 * count[universal]
    assert plain(elements)[1] == {"tape": None}
    assert len(build(encoder_layers=4, encoder_unique_layers=1)(elements)[0]) == 40


def test_tape_may_be_read_later(elements):
    assert not torch.allclose(build(tape_layer=1)(elements)[0], build()(elements)[0])
    with torch.no_grad():
        packed = build(tape_layer=1)(elements)[0]
    assert torch.allclose(packed, build(tape_layer=1)(elements)[0], atol=1e-12)


@pytest.mark.parametrize(
    "flags, message",
    (
        ({"tape_threshold": 1.0}, "bank of 12 entries can be exhausted by 6 tape tokens of 6"),
        ({"encoder_attention_heads": 3}, "--encoder-embed-dim 16 cannot be divided among 3 heads"),
        ({"tape_layer": 2}, "--tape-layer is 2: use 0 to 1"),
        ({"encoder_unique_layers": 3}, "unique layers"),
    ),
)
def test_refuses(flags, message):
    with pytest.raises(UsageError, match=message):
        build(**flags)


def test_is_for_the_parity_task():
    with pytest.raises(UsageError, match="--task parity"):
        AdaTapeParity.build_model(OmegaConf.structured(AdaTapeParityConfig()), SimpleNamespace(cfg=SimpleNamespace()))


@pytest.mark.parametrize("mode", ("bf16", "fp16", "amp"))
def test_lower_precision(elements, mode):
    """As --bf16 and --fp16 (weights converted) and --amp (autocast) run it; the ponder cost stays fp32."""
    exact = build()(elements)[0]
    model = build().to({"bf16": torch.bfloat16, "fp16": torch.float16, "amp": torch.float32}[mode]).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "amp"):
        logits, extra = model(elements)
    assert extra["tape"].cost.dtype == torch.float32
    (logits.float().square().sum() + extra["tape"].cost.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    close = (logits - exact).abs().amax(1) < 0.1  # where a near tie falls otherwise, other entries are read
    assert close.float().mean() > 0.7
