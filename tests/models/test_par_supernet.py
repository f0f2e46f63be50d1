import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory

TINY = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "memory_length": 8}
TINY.update(blocks=4, dropout=0.0, temperature_updates=100, temperature_start=2.0, temperature_end=0.5)


@pytest.fixture
def tokens():
    torch.manual_seed(2)
    return torch.randint(4, 44, (3, 10))


def choose(model, kinds, certainty=100.0):
    with torch.no_grad():
        for row, kind in enumerate(kinds):
            model.decoder.architecture[row] = torch.tensor([certainty * (kind == other) for other in "afi"])


def found(build, supernet, layout):
    """The model of a layout, with the weights of the blocks of the supernet that it is made of."""
    model = build("par_transformer_xl", layout=layout.replace("i", ""), **{**TINY, "blocks": None})
    weights = {name: tensor for name, tensor in supernet.state_dict().items() if ".blocks." not in name}
    place = 0
    for row, kind in enumerate(layout):
        if kind != "i":
            part = {"a": "attention", "f": "feed_forward"}[kind]
            prefix = f"decoder.blocks.{row}.{part}."
            for name, tensor in supernet.state_dict().items():
                if name.startswith(prefix):
                    weights[f"decoder.blocks.{place}.{name[len(prefix) :]}"] = tensor
            place += 1
    for name in ("architecture", "temperature", "block_costs"):
        del weights[f"decoder.{name}"]
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("sample_paths", (False, True))
def test_certain_choice_equals_the_found_model(build, tokens, sample_paths):
    supernet = build("par_supernet", sample_paths=sample_paths, **TINY)
    choose(supernet, "afia")
    model = found(build, supernet, "afia")
    ours, theirs = SegmentMemory(), SegmentMemory()
    with torch.no_grad():
        for segment in tokens.split(5, dim=1):
            torch.testing.assert_close(
                supernet(segment, memory=ours)[0], model(segment, memory=theirs)[0], rtol=0, atol=1e-9
            )


def test_no_noise_in_evaluation_and_noise_in_training(build, tokens):
    model = build("par_supernet", **TINY)
    torch.testing.assert_close(model(tokens)[0], model(tokens)[0], rtol=0, atol=0)
    model.train()
    assert (model(tokens)[0] - model(tokens)[0]).abs().max() > 1e-3


def test_noise_has_the_probabilities_of_the_softmax():
    from fairseq_adaptive.modules.transformer_xl.supernet_block import mixture_weights

    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(20000, 3)
    drawn = mixture_weights(logits, 0.3, noise=True).argmax(-1).bincount() / 20000
    torch.testing.assert_close(drawn, torch.softmax(logits[0], -1), rtol=0, atol=0.015)
    soft = mixture_weights(logits[:1], 0.5, noise=False)
    torch.testing.assert_close(soft, torch.softmax(logits[:1] * 2, -1))


def test_temperature_ends_at_its_end(build):
    decoder = build("par_supernet", **TINY).decoder
    for updates, temperature in (0, 2.0), (50, 1.0), (100, 0.5), (1000, 0.5):
        decoder.set_num_updates(updates)
        assert float(decoder.temperature) == pytest.approx(temperature)


def test_mixture_gives_gradients_to_every_choice(build, tokens):
    model = build("par_supernet", **TINY).train()
    model(tokens)[0].pow(2).sum().backward()
    assert (model.decoder.architecture.grad != 0).all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sampled_path_runs_alone_and_has_the_gradient_of_its_weight(build, tokens):
    model = build("par_supernet", sample_paths=True, **{**TINY, "blocks": 1}).train()
    seen = set()
    for seed in range(12):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        output = model(tokens)[0]
        output.pow(2).sum().backward()
        block = model.decoder.blocks[0]
        gradients = {
            kind: [parameter.grad for parameter in part.parameters()]
            for kind, part in (("a", block.attention), ("f", block.feed_forward))
        }
        ran = "".join(kind for kind, found in gradients.items() if any((gradient != 0).any() for gradient in found))
        assert len(ran) <= 1
        seen.add(ran)
        assert (model.decoder.architecture.grad != 0).all()
    assert seen == {"a", "f", ""}


def test_costs_are_measured_once_and_leave_no_trace(build, tokens):
    model = build("par_supernet", **TINY).train()
    state = torch.get_rng_state()
    model.decoder.measure_costs("flops", tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    attention, feed_forward, identity = model.decoder.block_costs.tolist()
    assert attention + feed_forward == pytest.approx(1) and identity == 0 and attention > feed_forward > 0
    model.decoder.measure_costs("time", tokens[:1])
    assert model.decoder.block_costs.tolist() == [attention, feed_forward, identity]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"blocks": 0}, "--blocks is 0"),
        ({"temperature_end": 0.0}, "--temperature-end is 0.0"),
        ({"temperature_updates": 0}, "give one"),
    ],
)
def test_bad_options_are_refused(build, flags, message):
    with pytest.raises(UsageError, match=message):
        build("par_supernet", **{**TINY, **flags})
