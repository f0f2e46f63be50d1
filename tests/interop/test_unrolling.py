"""Unrolling: fairseq's plain Transformer with the same outputs, from a file of the shared size."""

import argparse
import copy

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import load_checkpoint, save_checkpoint, unroll_checkpoint, unrolling, write_plain
from fairseq_adaptive.models.policy_flags import KINDS
from fairseq_adaptive.modules import layer_schedule
from fairseq_adaptive.modules.policies.registry import policies

STRATEGIES = ("sequence", "cycle", "cycle_rev")
LM = {
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 5,
    "decoder_input_dim": 16,
    "decoder_output_dim": 16,
    "decoder_unique_layers": 2,
    "layer_sharing": "cycle",
}


def rebuilt(build, state):
    """fairseq's model from a checkpoint, as ``fairseq-generate`` builds it."""
    options = dict(state["cfg"]["model"])
    model = build(options.pop("_name"), seed=99, **options)
    model.load_state_dict({name: tensor.double() for name, tensor in state["model"].items()}, strict=True)
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("unique", (1, 2, 3, 5))
def test_computes_the_same(flags_of, build, checkpoint, batch, tmp_path, strategy, unique):
    model, state = checkpoint("shared_transformer", dtype=torch.float64, **flags_of(unique, strategy))
    save_checkpoint(unroll_checkpoint(state), tmp_path / "plain.pt")
    plain = rebuilt(build, load_checkpoint(tmp_path / "plain.pt"))
    assert type(plain).__name__ == "TransformerModel" and len(plain.encoder.layers) == 5
    torch.testing.assert_close(plain(**batch)[0], model(**batch)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_file_keeps_the_shared_size(flags_of, checkpoint, tmp_path, strategy):
    """Every tensor is stored once: the bytes are those of the M layers, the names those of the N depths."""
    flags = flags_of(2, strategy, encoder_ffn_embed_dim=2048, decoder_ffn_embed_dim=2048)
    model, state = checkpoint("shared_transformer", **flags)
    save_checkpoint(unroll_checkpoint(state), tmp_path / "plain.pt")
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert stored < (tmp_path / "plain.pt").stat().st_size < 1.15 * stored
    weights = load_checkpoint(tmp_path / "plain.pt")["model"]
    assert sum(tensor.nbytes for tensor in weights.values()) > 2 * stored
    for depth, index in enumerate(layer_schedule(strategy, 2, 5)):
        name = "encoder.layers.{}.fc1.weight"
        assert torch.equal(weights[name.format(depth)], state["model"][name.format(index)])


def test_configuration_is_that_of_a_plain_model(flags_of, checkpoint):
    """A dict instead of a Namespace, which fairseq without plug-in cannot load, and nothing of ours in it."""
    _, state = checkpoint("shared_transformer_wmt_en_de_18", **flags_of(encoder_layers=6))
    before = copy.deepcopy(state["cfg"])
    plain = unroll_checkpoint(state)
    options = plain["cfg"]["model"]
    assert type(options) is dict and options["_name"] == "transformer"
    assert options["encoder_layers"] == 6 and options["decoder_layers"] == 5 and options["activation_fn"] == "relu"
    assert not {
        "layer_sharing",
        "init",
        "encoder_unique_layers",
        "decoder_unique_layers",
        "arch",
        "halting",
        "router",
        "reader",
        "decoder_router_kv",
    } & set(options)
    assert plain["cfg"]["common"]["user_dir"] is None
    assert "last_optimizer_state" not in plain and plain["extra_state"] == state["extra_state"]
    assert state["cfg"] == before and "encoder.layers.5.fc1.weight" not in state["model"]


def test_takes_the_defaults_of_the_architecture(build, checkpoint):
    """fairseq-hydra-train writes the flags that were given, as a dict: the rest is what the architecture says."""
    _, state = checkpoint("shared_transformer_tiny")
    state["cfg"]["model"] = {"_name": "shared_transformer_tiny"}
    plain = unroll_checkpoint(state)
    assert plain["cfg"]["model"]["encoder_layers"] == 6 and plain["cfg"]["model"]["decoder_embed_dim"] == 128
    rebuilt(build, plain)


def test_language_model(build, checkpoint, batch):
    model, state = checkpoint("shared_transformer_lm_base", "language_modeling", torch.float64, **LM)
    plain = unroll_checkpoint(state)
    assert plain["cfg"]["model"].pop("_name") == "transformer_lm"
    stock = build("transformer_lm", seed=99, **plain["cfg"]["model"])
    stock.load_state_dict(plain["model"], strict=True)
    tokens = batch["src_tokens"].flip(1)
    torch.testing.assert_close(stock(tokens)[0], model(tokens)[0], rtol=0, atol=1e-6)


def test_leaves_plain_models_as_they_are(flags_of, checkpoint):
    flags = {name: value for name, value in flags_of().items() if "unique" not in name and name != "layer_sharing"}
    _, state = checkpoint("transformer", **flags)
    plain = unroll_checkpoint(state)
    assert plain["model"] == dict(state["model"]) and plain["cfg"]["model"]["_name"] == "transformer"


def test_refuses_what_a_plain_transformer_cannot_express(flags_of, checkpoint):
    with pytest.raises(UsageError, match="trained with --init admin"):
        unroll_checkpoint(checkpoint("shared_transformer", **flags_of(init="admin"))[1])
    _, state = checkpoint("shared_transformer", **flags_of())
    state["cfg"]["model"] = argparse.Namespace(arch="lstm")
    with pytest.raises(UsageError, match="architecture lstm: only shared_transformer"):
        unroll_checkpoint(state)


POLICIES = [(kind, name) for kind in KINDS for name in policies(kind) if name != "none"]


# tapes and merging are for encoders, and confidence needs scores of words
IMPOSSIBLE = (("decoder", "tape"), ("decoder", "token_merging"), ("encoder", "margin"), ("encoder", "patience"))


@pytest.mark.parametrize(
    "side,kind,name",
    [(side, *each) for side in ("encoder", "decoder") for each in POLICIES if (side, each[1]) not in IMPOSSIBLE],
)
def test_refuses_policies_by_name(flags_of, checkpoint, kind, name, side):
    """Those without weights, such as saturation, too: the plain model would be another one."""
    _, state = checkpoint("shared_transformer", **flags_of(1, "cycle", **{f"{side}_{kind}": name}))
    with pytest.raises(UsageError, match=rf"has a policy \({kind} {name}\): .*computes every token at every"):
        unroll_checkpoint(state)


def test_weights_of_a_policy_are_refused_whatever_flags_say(flags_of, checkpoint):
    _, state = checkpoint("shared_transformer", **flags_of(2, "cycle", halting="act"))
    state["cfg"]["model"].halting = "none"
    with pytest.raises(UsageError, match=r"has a policy \(halting\)"):
        unroll_checkpoint(state)


def test_refuses_weights_that_a_plain_model_has_no_place_for(flags_of, checkpoint):
    _, state = checkpoint("shared_transformer", **flags_of())
    state["model"]["decoder.layers.0.fc1.adapter.weight"] = torch.ones(3)
    with pytest.raises(UsageError, match=r"cannot be exported: .*fc1\.adapter\.weight"):
        unroll_checkpoint(state)
    del state["model"]["decoder.layers.0.fc1.adapter.weight"], state["model"]["decoder.layers.0.fc1.weight"]
    with pytest.raises(UsageError, match=r"cannot be exported: .*decoder\.layers\.0\.fc1\.weight"):
        unroll_checkpoint(state)


def test_refuses_what_computes_something_else(flags_of, checkpoint, monkeypatch):
    _, state = checkpoint("shared_transformer", **flags_of(2, "cycle"))
    monkeypatch.setattr(unrolling, "layer_schedule", lambda *args: layer_schedule("sequence", *args[1:]))
    with pytest.raises(UsageError, match="the plain Transformer computes something else, its outputs differ by"):
        unroll_checkpoint(state)


def test_what_was_written_is_read_back(flags_of, checkpoint, tmp_path, monkeypatch):
    plain = unroll_checkpoint(checkpoint("shared_transformer", **flags_of())[1])
    write_plain(plain, tmp_path / "plain.pt")
    assert load_checkpoint(tmp_path / "plain.pt")["model"].keys() == plain["model"].keys()
    save = unrolling.save_checkpoint

    def save_another(state, path):
        name = "decoder.layers.0.fc1.bias"
        save({**state, "model": {**state["model"], name: state["model"][name] + 1}}, path)

    monkeypatch.setattr(unrolling, "save_checkpoint", save_another)
    with pytest.raises(UsageError, match="holds other weights than were written"):
        write_plain(plain, tmp_path / "other.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt"]
