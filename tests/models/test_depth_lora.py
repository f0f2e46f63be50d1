"""Differences of depths: a new model is the one without, and all paths of a model know at which depth a layer runs."""

import copy

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator

from families import FAMILIES, build_trainer, train, write_data
from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers.depth_lora import PARTS, DepthLinear, DepthNorm
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.stack.compute import stack_macs
from searches import moved
from threads import assert_threads_equal_one

SIDES = ("encoder", "decoder")
SMALL = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 4, "unique_layers": 2}
FLAGS = {f"{side}_{name}": value for side in SIDES for name, value in SMALL.items()}
LM = {**{f"decoder_{name}": value for name, value in SMALL.items()}, "decoder_input_dim": 16, "decoder_output_dim": 16}


def flags_for(policies):
    """``--halting-kv first`` needs one layer at all depths."""
    one = policies.get("halting_kv") == "first"
    return {**FLAGS, **{f"{side}_unique_layers": 1 if one else 2 for side in SIDES}}


def stacks(model):
    return [each for each in model.modules() if isinstance(each, LayerStack)]


@pytest.mark.parametrize("arch, flags", (("shared_transformer", FLAGS), ("shared_transformer_lm", LM)))
def test_a_new_model_is_the_one_without(build, batch, arch, flags):
    """With the same seed, too: nothing that is initialised later is drawn otherwise."""
    inputs = batch if arch == "shared_transformer" else {"src_tokens": batch["src_tokens"].flip(1)}
    plain, model = build(arch, **flags), build(arch, depth_lora_rank=3, **flags)
    own = model.state_dict()
    assert all(torch.equal(own[name], each) for name, each in plain.state_dict().items())
    assert {name.rpartition(".")[2] for name in own.keys() - plain.state_dict().keys()} == set(PARTS)
    assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
    assert not torch.equal(moved(model)(**inputs)[0], plain(**inputs)[0])


def test_is_the_unshared_model_of_the_summed_weights(build, batch):
    model = moved(build("shared_transformer", depth_lora_rank=3, layer_sharing="cycle", **FLAGS))
    plain = build("shared_transformer", layer_sharing="cycle", **{**FLAGS, **{f"{s}_unique_layers": 4 for s in SIDES}})
    weights = dict(model.state_dict())
    for side in SIDES:
        for depth, number in enumerate(getattr(model, side).layers.schedule):
            layer = getattr(model, side).layers.layer(number)
            for name, each in layer.named_modules():
                into = f"{side}.layers.{depth}.{name}"
                if isinstance(each, DepthLinear):
                    place = each.depths.index(depth)
                    weights[f"{into}.weight"] = each.weight + each.depth_b[place] @ each.depth_a[place]
                    weights[f"{into}.bias"] = each.bias + each.depth_bias[place]
                elif isinstance(each, DepthNorm):
                    place = each.depths.index(depth)
                    weights[f"{into}.weight"] = each.weight + each.depth_weight[place]
                    weights[f"{into}.bias"] = each.bias + each.depth_bias[place]
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    torch.testing.assert_close(model(**batch)[0], plain(**batch)[0], rtol=0, atol=1e-12)
    with torch.no_grad(), constant_weights():  # each sum is made once
        torch.testing.assert_close(model(**batch)[0], plain(**batch)[0], rtol=0, atol=1e-12)


def test_long_sequences(build):
    """From 129 tokens on fairseq's own attention reads weights of plain maps; here it has to call them."""
    flags = {**FLAGS, "max_source_positions": 256, "max_target_positions": 256}
    model = moved(build("shared_transformer", depth_lora_rank=3, **flags))
    tokens = torch.randint(4, 44, (1, 200), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 2
    long = model.encoder(tokens, torch.tensor([200]))["encoder_out"][0]
    short = copy.deepcopy(model)
    for each in short.modules():
        if hasattr(each, "has_plain_maps"):
            each.forward = lambda q, k, v, mask=None, need_weights=False, attn_mask=None, of=each, **rest: of._short(
                q, k, v, mask, attn_mask, False, False
            )
    found = short.encoder(tokens, torch.tensor([200]))["encoder_out"][0]
    torch.testing.assert_close(found, long, rtol=0, atol=1e-5)  # fairseq's softmax is in float32


@pytest.mark.parametrize(
    "policies",
    (
        {"halting": "act"},
        {"halting": "act", "halting_kv": "keep"},
        {"halting": "act", "halting_kv": "first"},
        {"halting": "act", "halting_kv": "active"},
        {"halting": "saturation", "halting_threshold": 0.9},
        {"router": "skimming", "router_args": '{"bias": 0.5, "noise": 0}'},
        {"router": "skimming", "router_kv": "recompute", "router_args": '{"bias": 0.5}', "halting": "ut_act"},
        {"router": "mixture_of_depths", "router_kv": "recompute"},
        {"router": "mixture_of_depths", "encoder_halting": "act", "halting_kv": "recompute"},
    ),
    ids=lambda value: "-".join(map(str, value.values()))[:60],
)
def test_dense_is_packed(build, batch, policies):
    model = moved(build("shared_transformer", depth_lora_rank=4, **flags_for(policies), **policies), 0.4)
    for each in stacks(model):
        for name, part in each.named_parameters():
            if "halting" in name or "router" in name:
                torch.nn.init.normal_(part, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        outs = []
        for packed in (False, True):
            for each in stacks(model):
                each.packed = packed
            with recording(model) as traces:
                outs.append(model(**batch)[0][batch["prev_output_tokens"].ne(1)])
        torch.testing.assert_close(*outs, rtol=0, atol=1e-10)
        assert any(
            not step.alive.all() for trace in traces["decoder.layers"] for step in trace.steps if step.alive is not None
        )


@pytest.mark.parametrize(
    "policies",
    (
        {},
        {"normalize_before": True},
        {"halting": "act"},
        {"halting": "act", "halting_kv": "keep"},
        {"halting": "act", "halting_kv": "first"},
        {"router": "skimming", "router_args": '{"bias": 0.5}'},
    ),
    ids=lambda value: "-".join(map(str, value.values())) or "plain",
)
def test_incremental_is_full(build, batch, policies):
    flags = {f"{side}_normalize_before": policies.get("normalize_before", False) for side in SIDES}
    policies = {name: each for name, each in policies.items() if name != "normalize_before"}
    model = moved(build("shared_transformer", depth_lora_rank=4, **flags_for(policies), **policies, **flags))
    tokens, state, steps = batch["prev_output_tokens"][:2, :4], {}, []
    with torch.no_grad():
        source = model.encoder(batch["src_tokens"][:2], batch["src_lengths"][:2])
        full = model.decoder(tokens, encoder_out=source)[0]
        for length in range(1, 5):
            steps.append(model.decoder(tokens[:, :length], encoder_out=source, incremental_state=state)[0])
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-5)  # fairseq's softmax is in float32


@pytest.mark.parametrize("policies", ({}, {"halting": "act"}), ids=("plain", "act"))
def test_beam_search_is_that_of_fairseq(build, batch, task, dictionary, policies):
    """Caches of all depths are reordered, those of cross-attention, too; no fast path takes the shared maps for all depths."""
    model = moved(build("shared_transformer", depth_lora_rank=4, dtype=torch.float32, **FLAGS, **policies))
    sample = {"net_input": {name: batch[name] for name in ("src_tokens", "src_lengths")}}
    sizes = {"beam_size": 3, "max_len_b": 8}
    ours = BeamGenerator([model], dictionary, **sizes).generate([model], sample)
    assert model.decoder.begin_search(3) is not None
    plain = SequenceGenerator([copy.deepcopy(model)], dictionary, **sizes)
    theirs = plain.generate([plain.model], sample)
    for mine, other in zip(ours, theirs):
        assert [each["tokens"].tolist() for each in mine] == [each["tokens"].tolist() for each in other]
        for one, two in zip(mine, other):
            assert abs(float(one["score"]) - float(two["score"])) < 1e-5
    rows = ours[0][0]["tokens"][:-1]
    previous = torch.cat((torch.tensor([dictionary.eos()]), rows)).unsqueeze(0)
    with torch.no_grad():
        out = model(batch["src_tokens"][:1], batch["src_lengths"][:1], previous)
        scores = model.get_normalized_probs(out, True)[0].gather(1, ours[0][0]["tokens"].unsqueeze(1))
    torch.testing.assert_close(scores.squeeze(1), ours[0][0]["positional_scores"], rtol=0, atol=1e-4)


def test_every_difference_gets_a_gradient(build, batch):
    model = moved(build("shared_transformer", depth_lora_rank=2, **FLAGS))
    model.train()
    model(**batch)[0].square().sum().backward()
    for name, each in model.named_parameters():
        if name.rpartition(".")[2] in PARTS and "k_proj.depth_bias" not in name:
            assert (each.grad.flatten(1).abs().sum(1) > 0).all(), name  # at each depth


def test_checkpointed_activations_have_the_same_gradients(build, batch):
    found = []
    for flag in (False, True):
        model = moved(build("shared_transformer", depth_lora_rank=2, checkpoint_activations=flag, dropout=0.0, **FLAGS))
        model.train()
        model(**batch)[0].square().sum().backward()
        found.append({name: each.grad for name, each in model.named_parameters()})
    for name, each in found[0].items():
        torch.testing.assert_close(found[1][name], each, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("depth_lora"))


SHARED = {
    "adatape_parity": ("--encoder-layers", "4", "--encoder-unique-layers", "2"),
    "adatape_vit": ("--encoder-unique-layers", "1", "--tape-layer", "1"),
    "transkimmer": ("--encoder-layers", "4", "--encoder-unique-layers", "2"),
    **dict.fromkeys(
        ("shared_transformer", "universal_transformer", "pondernet", "shared_transformer_lm", "albert_act"), ()
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_every_family_trains(data, name):
    """Updates move A, B and vectors, of every map and norm."""
    trainer, batches = build_trainer(name, data, *SHARED[name], "--depth-lora-rank", "2")
    before = {name: each.clone() for name, each in trainer.model.named_parameters() if name.rpartition(".")[2] in PARTS}
    assert before and all((each == 0).all() for name, each in before.items() if not name.endswith("depth_a"))
    logged = train(trainer, batches, 3)
    assert all(each["loss"] == each["loss"] for each in logged)
    still = [
        name for name, each in trainer.model.named_parameters() if name in before and torch.equal(each, before[name])
    ]
    assert not [name for name in still if "k_proj.depth_bias" not in name], still


def test_a_training_goes_on_where_it_was_saved(data, tmp_path):
    flags = ("--depth-lora-rank", "2")
    trainer, batches = build_trainer("shared_transformer", data, *flags)
    batches = [each for _, each in zip(range(4), batches)]
    train(trainer, batches[:2], 2)
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(
        str(tmp_path / "a.pt"), {"train_iterator": {"epoch": 1, "version": 2, "iterations_in_epoch": 2}}
    )
    expected = [each["loss"] for each in train(trainer, batches[2:], 2)]
    resumed, _ = build_trainer("shared_transformer", data, *flags)
    resumed.load_checkpoint(str(tmp_path / "a.pt"))
    assert [each["loss"] for each in train(resumed, batches[2:], 2)] == expected
    other, _ = build_trainer("shared_transformer", data)
    with pytest.raises(UsageError, match="a.pt: .*depth_"):
        other.load_checkpoint(str(tmp_path / "a.pt"))


def test_threads(build, batch):
    """Each thread has a depth of its own."""
    model = moved(build("shared_transformer", depth_lora_rank=4, **FLAGS))
    inputs = [{name: each[row : row + 1] for name, each in batch.items()} for row in range(3)]
    with torch.no_grad():
        assert_threads_equal_one(
            lambda each: model(**each)[0].detach(),
            inputs,
            lambda one, two: one.shape == two.shape and torch.equal(one, two),
        )


def test_par_transformer_xl_has_no_such_flag(data):
    with pytest.raises(SystemExit):
        build_trainer("par_transformer_xl", data, "--depth-lora-rank", "2")
    assert "par_transformer_xl" in FAMILIES


def test_cost_of_a_rank(build, batch):
    cost = {}
    for rank in (0, 3):
        model = build("shared_transformer", depth_lora_rank=rank, **FLAGS)
        with torch.no_grad(), recording(model) as traces:
            model(**batch)
        cost[rank] = [float(stack_macs(getattr(model, side).layers, traces[f"{side}.layers"][0])[0]) for side in SIDES]
    source, target = 9 + 6 + 4, 5 + 8 + 3
    layer = 4 * 3 * (16 + 16) + 2 * 3 * (16 + 32)  # four maps of attention, two of the feed-forward
    assert cost[3][0] - cost[0][0] == 4 * layer * source
    cross = 4 * (2 * 3 * 32 * target + 2 * 3 * 32 * source)
    assert cost[3][1] - cost[0][1] == 4 * layer * target + cross


@pytest.mark.parametrize(
    "flags, message",
    (
        ({"depth_lora_rank": 17}, "--depth-lora-rank 17 is impossible: .* dimension of 16; use 1 to 16"),
        ({"depth_lora_rank": -1}, "--depth-lora-rank is -1: use a whole number from 0"),
        ({"depth_lora_rank": 2, "quant_noise_pq": 0.1}, "cannot be combined with --quant-noise-pq"),
        ({"depth_lora_rank": 2, "quant_noise_scalar": 0.1}, "cannot be combined with --quant-noise-scalar"),
    ),
)
def test_refusals(build, flags, message):
    with pytest.raises(UsageError, match=message):
        build("shared_transformer", **FLAGS, **flags)


def test_a_layer_asked_for_another_depth_says_so(build):
    layer = build("shared_transformer", depth_lora_rank=2, layer_sharing="cycle", **FLAGS).encoder.layers.layer(1)
    with pytest.raises(UsageError, match="for the depths 1, 3 is asked for depth 0"):
        layer(torch.zeros(2, 1, 16, dtype=torch.float64))


def test_layers_of_one_depth_have_no_differences(build):
    model = build(
        "shared_transformer",
        depth_lora_rank=2,
        layer_sharing="middle_cycle",
        **{**FLAGS, **{f"{side}_{n}": v for side in SIDES for n, v in {"layers": 5, "unique_layers": 3}.items()}},
    )
    served = [model.encoder.layers.layer(number).lora_rank for number in range(3)]
    assert served == [0, 2, 0] and model.encoder.layers.layer(1).fc1.depths == (1, 2, 3)
    assert type(model.encoder.layers.layer(0).fc1) is not DepthLinear
