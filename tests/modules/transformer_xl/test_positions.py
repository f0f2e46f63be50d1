"""Positions are projected once a layer: whatever depths it serves, and once an evaluation while weights are constant."""

import pytest
import torch

from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from fairseq_adaptive.modules.transformer_xl.relative_attention import RelativeAttention

TINY = {
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "memory_length": 8,
    "layout": "af*4",
    "dropout": 0.0,
}


@pytest.fixture
def projected(monkeypatch):
    """How many positions each projection has made."""
    made = []

    def count(module, inputs):
        made.append(inputs[0].size(0))

    inner = RelativeAttention.__init__

    def init(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        self.position_proj.register_forward_pre_hook(count)

    monkeypatch.setattr(RelativeAttention, "__init__", init)
    return made


@pytest.mark.parametrize("unique, layers", [(2, 1), (4, 2), (None, 4)])
@pytest.mark.parametrize("halting", ("none", "act"))
def test_once_a_layer_in_a_call(build, projected, unique, layers, halting):
    model = build("par_transformer_xl", **TINY, decoder_unique_layers=unique, halting=halting).train()
    memory, text = SegmentMemory(), torch.randint(4, 44, (2, 10))
    for part, length in zip(text.split(5, 1), (6, 11)):
        projected.clear()
        model(part, memory=memory)[0].sum().backward()
        assert projected == [length] * layers
    model.eval()
    with torch.no_grad():
        projected.clear()
        model(text)
        assert set(projected) == {11} and len(projected) <= layers  # where all have halted nothing is projected
        assert len(projected) == layers or halting == "act"


def test_a_projection_that_serves_several_depths_has_the_gradient_of_all(build):
    shared = build("par_transformer_xl", **TINY, decoder_unique_layers=2)
    unshared = build("par_transformer_xl", **TINY)
    weights = shared.state_dict()
    for name in list(weights):
        for depth in range(2, 8):
            if f".blocks.{depth % 2}." in name:
                weights[name.replace(f".blocks.{depth % 2}.", f".blocks.{depth}.")] = weights[name]
    unshared.load_state_dict(weights)
    text = torch.randint(4, 44, (2, 7))
    outs = [model(text)[0] for model in (shared, unshared)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    for out in outs:
        out.sin().sum().backward()
    own = shared.decoder.blocks[0].attention.position_proj.weight.grad
    each = [unshared.decoder.blocks[depth].attention.position_proj.weight.grad for depth in (0, 2, 4, 6)]
    torch.testing.assert_close(own, sum(each), rtol=0, atol=1e-12)


@pytest.mark.parametrize("halting", ("none", "act"))
def test_caches_of_a_layer_keep_them_once(build, projected, halting):
    model = build("par_transformer_xl", **TINY, decoder_unique_layers=4, halting=halting)
    text, memory, state = torch.randint(4, 44, (2, 12)), SegmentMemory(), {}
    with torch.no_grad():
        for part in text.split(4, 1):
            model(part, memory=memory)
        assert len(projected) == 2
        caches = [cache for cache, block in zip(memory.states, model.decoder.blocks) if block.attends is not None]
        assert len({id(cache.projected) for cache in caches}) == 2
        projected.clear()
        for end in range(1, 13):
            model.decoder(text[:, :end], incremental_state=state)
        assert len(projected) == 2


def test_once_an_evaluation_while_weights_are_constant(build, projected):
    model = build("par_transformer_xl", **TINY)
    texts = torch.randint(4, 44, (3, 2, 9)).unbind()
    with torch.no_grad():
        expected = [model(text[:, : 9 - number])[0] for number, text in enumerate(texts)]
        assert len(projected) == 12
        projected.clear()
        with constant_weights():
            for number, text in enumerate(texts):
                found = model(text[:, : 9 - number])[0]
                torch.testing.assert_close(found, expected[number], rtol=0, atol=1e-12)
                state = {}
                model.decoder(text[:, :4], incremental_state=state)
            first = len(projected)
            assert projected == [10] * 4  # the longest first: nothing is left to make
        model.decoder.blocks[0].attention.position_proj.weight.data.zero_()
        with constant_weights():
            model(texts[0])
        assert len(projected) == first + 4  # weights may have changed in between, and have


def test_training_within_an_evaluation_keeps_nothing(build, projected):
    model = build("par_transformer_xl", **TINY).train()
    text = torch.randint(4, 44, (2, 5))
    with constant_weights():
        for _ in range(2):
            model(text)[0].sum().backward()
    assert len(projected) == 8
