"""A stack is iterated, sliced and appended to as fairseq's lists of layers are."""

import pytest
import torch
from fairseq.modules import TransformerEncoderLayer
from torch import nn

from fairseq_adaptive.errors import UsageError

TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 4}.items()
}
TINY["dropout"] = 0.0
OWN = {"encoder_unique_layers": 4, "decoder_unique_layers": 4, "layer_sharing": "sequence"}


def pair(build):
    stock, ours = build("transformer", **TINY), build("shared_transformer", **TINY, **OWN)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@torch.no_grad()
def test_iterating_runs_what_the_encoder_runs(build, batch):
    for model in pair(build):
        x, _ = model.encoder.forward_embedding(batch["src_tokens"])
        padding = batch["src_tokens"].eq(1)
        x = (x * ~padding.unsqueeze(-1)).transpose(0, 1)
        for layer in model.encoder.layers:
            x = layer(x, encoder_padding_mask=padding)
        torch.testing.assert_close(x, model.encoder(batch["src_tokens"])["encoder_out"][0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("cut", (slice(2), slice(1, None), slice(None, None, 2), slice(None, None, -1)), ids=str)
def test_a_model_of_some_layers_equals_stock(build, batch, cut):
    results = []
    for model in pair(build):
        for side in (model.encoder, model.decoder):
            side.layers = side.layers[cut]
            side.num_layers = len(side.layers)
        results.append(model(**batch))
    (theirs, extra), (ours, our_extra) = results
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-6)
    torch.testing.assert_close(our_extra["attn"][0][real], extra["attn"][0][real], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("new", (False, True), ids=("own-layer", "new-layer"))
def test_appended_layers_run_as_in_stock(build, batch, new):
    results = []
    for model in pair(build):
        torch.manual_seed(4)
        for side, build_layer in ((model.encoder, "build_encoder_layer"), (model.decoder, "build_decoder_layer")):
            layer = getattr(side, build_layer)(side.cfg).double().eval() if new else side.layers[1]
            assert side.layers.append(layer) is side.layers and side.layers.extend([side.layers[0]]) is side.layers
            side.num_layers = len(side.layers)
            assert len(side.layers) == 6 == len(list(side.layers)) and side.layers[4] is layer
        results.append((model(**batch), model.state_dict().keys()))
    ((theirs, extra), names), ((ours, our_extra), our_names) = results
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-6)
    torch.testing.assert_close(our_extra["attn"][0][real], extra["attn"][0][real], rtol=0, atol=1e-6)
    assert set(our_names) < set(names)  # a layer that runs again has no second weights


@torch.no_grad()
def test_shared_layers_stay_shared(build, batch):
    model = build("shared_transformer", **TINY, encoder_unique_layers=2, layer_sharing="cycle")
    layers = model.encoder.layers
    part = layers[1:3]
    assert part.schedule == (0, 1) and [part[0], part[1]] == [layers[1], layers[0]] and layers.schedule == (0, 1, 0, 1)
    assert len(layers[4:]) == 0 and layers[:2][-1] is layers.layer(1)
    for layer in layers[:1]:
        layer.requires_grad_(False)
    assert not any(each.requires_grad for each in layers.layer(0).parameters())


FIXED = {"policies": {"halting": "act"}, "routers": {"router": "skimming"}, "admin": {"init": "admin"}}


@pytest.mark.parametrize("why", FIXED)
def test_depths_that_are_known_by_number(build, why):
    """They can be read, and are told apart from what would run without what belongs to them."""
    model = build("shared_transformer", **TINY, **FIXED[why])
    for side in (model.encoder, model.decoder):
        part = side.layers[:2]
        assert type(part) is nn.ModuleList and [*part] == [side.layers[0], side.layers[1]]
        with pytest.raises(UsageError, match="no layer can be appended: .*build the model with as many"):
            side.layers.append(side.layers[0])
        assert len(side.layers) == 4


def test_layers_that_are_called_otherwise_are_refused(build):
    stock, ours = pair(build)
    with pytest.raises(UsageError, match="TransformerEncoderLayerBase cannot be appended: it lacks the argument depth"):
        ours.encoder.layers.append(stock.encoder.layers[0])
    assert len(ours.encoder.layers) == 4 and ours.encoder.layers.unique_layers == 4
    assert issubclass(TransformerEncoderLayer, type(stock.encoder.layers[0]))


def test_transformer_xl(build):
    model = build("par_transformer_xl", layout="af*2", decoder_embed_dim=16, decoder_attention_heads=2)
    blocks = model.decoder.blocks
    assert [*blocks[1:3]] == [blocks[1], blocks[2]] and len(blocks[::2]) == 2
    with pytest.raises(UsageError, match="a SegmentStack is made for its depths"):
        blocks.append(blocks[0])
