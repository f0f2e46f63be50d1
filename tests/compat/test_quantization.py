"""Quantization noise on a CPU."""

import pytest
import torch
from fairseq.modules.quantization.pq import SizeTracker
from fairseq.modules.quantization.pq import quantize_model_ as quantize_products_
from fairseq.modules.quantization.scalar import ops, quantize_model_


@pytest.mark.parametrize("method", ("histogram", "tensor", "channel"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_weights_come_to_the_nearest_of_so_many_levels(method, dtype):
    torch.manual_seed(1)
    weight = torch.randn(64, 8, dtype=dtype)
    quantized, scale, zero_point = ops.emulate_int(weight, bits=8, method=method)
    assert quantized.dtype == scale.dtype == dtype and scale.device == weight.device
    if method == "channel":
        assert scale.shape == (8,)
    levels = quantized / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    near = (quantized - weight).abs() <= scale / 2 + 1e-6
    assert near.all() if method != "histogram" else near.float().mean() > 0.95  # a histogram clips what is rare
    again = ops.emulate_int(weight, bits=8, method=method, scale=scale, zero_point=zero_point)
    assert torch.equal(again[0], quantized)


@pytest.mark.parametrize("arch", ("transformer", "shared_transformer"))
def test_model_with_noise_trains(arch, build, batch):
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 2}.items()
    }
    model = build(arch, dtype=torch.float32, **sizes)
    plain = model(**batch)[0]
    quantize_model_(model, p=0.5, bits=8, update_step=1000)
    assert 0 < (model(**batch)[0] - plain).abs().max() < 0.2 * plain.abs().max()
    model.train()(**batch)[0].logsumexp(-1).sum().backward()
    assert model.encoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_maps_are_found_by_the_name_of_plain_ones(build):
    """--quantization-config-path names classes of layers."""
    model = build("shared_transformer", dtype=torch.float32, encoder_embed_dim=16, decoder_embed_dim=16)
    config, name = {"Linear": ("in_features", {"*": 4})}, "encoder.layers.0.fc1"
    before = model.encoder.layers[0].fc1.weight.clone()
    quantize_products_(model, SizeTracker(model), [name], config, {"Linear": ("in_features", {"*": 8})}, n_iter=2)
    after = model.encoder.layers[0].fc1
    assert type(after).__name__ == "PQLinear" and after.weight.shape == before.shape
    assert len(after.weight.reshape(-1, 4).unique(dim=0)) <= 8
