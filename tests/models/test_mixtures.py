"""Mixture-of-Depths and Mixture-of-Recursions in whole models: dense equals packed equals one token at a time, causally,
alone and in any batch."""

import pytest
import torch

from fairseq_adaptive.modules import LayerStack, recording

FLAGS = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2}
CASES = {
    "depths": ("mixture_of_depths_lm_tiny", {}),
    "depths-predictor": (
        "mixture_of_depths_lm_tiny",
        {"router_args": '{"every": 2, "predictor": true, "weighting": "score"}'},
    ),
    "depths-recompute": ("mixture_of_depths_lm_tiny", {"router_kv": "recompute"}),
    "expert": ("mixture_of_recursions_lm_tiny", {}),
    "expert-first": ("mixture_of_recursions_lm_tiny", {"router_kv": "first"}),
    "expert-recompute": ("mixture_of_recursions_lm_tiny", {"router_kv": "recompute"}),
    "expert-auxiliary": ("mixture_of_recursions_lm_tiny", {"router_args": '{"auxiliary": true, "gate": "tanh"}'}),
    "expert-sequence": ("mixture_of_recursions_lm_tiny", {"layer_sharing": "middle_sequence"}),
    "expert-act": ("mixture_of_recursions_lm_tiny", {"halting": "act"}),
    "token": ("mixture_of_recursions_lm_tiny", {"router": "token_choice"}),
    "token-first": ("mixture_of_recursions_lm_tiny", {"router": "token_choice", "router_kv": "first"}),
    "token-act-active": (
        "mixture_of_recursions_lm_tiny",
        {"router": "token_choice", "halting": "act", "halting_kv": "active"},
    ),
}


def model_of(build, case, seed=3, arch=None):
    preset, flags = CASES[case]
    sides = ("decoder",) if arch is None else ("encoder", "decoder")
    sizes = {f"{side}_{name}": value for side in sides for name, value in FLAGS.items()}
    if arch is None:
        sizes.update(decoder_input_dim=16, decoder_output_dim=16)
    model = build(arch or preset, seed=seed, **sizes, **flags)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        size = 0.1 if "router" not in name else 0.1 if name.endswith("bias") else 0.6
        parameter.data += size * torch.randn_like(parameter)
    for stack in stacks(model):
        for layer in stack:
            layer.need_attn = False  # with weights fairseq takes its softmax in float32, in a float64 model, too
    return model


def stacks(model):
    return [each for each in model.modules() if isinstance(each, LayerStack)]


def full(model, packed, *args, **kwargs):
    for stack in stacks(model):
        stack.packed = packed
    with recording(model) as traces:
        out = model(*args, **kwargs)[0]
    return out, traces["decoder.layers"][0]


def words(batch=3, length=9, seed=5):
    return torch.randint(4, 44, (batch, length), generator=torch.Generator().manual_seed(seed))


def alive(trace, depths=8):
    steps = [step.alive for step in trace.steps]
    return torch.stack(steps + [torch.zeros_like(steps[0])] * (depths - len(steps)), 2)


@torch.no_grad()
@pytest.mark.parametrize("seed", (3, 5))
@pytest.mark.parametrize("case", CASES)
def test_dense_packed_incremental(build, case, seed):
    model, tokens = model_of(build, case, seed), words(seed=seed)
    dense, trace = full(model, False, tokens)
    packed, other = full(model, True, tokens)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-10)
    assert torch.equal(alive(trace), alive(other)) and (seed > 3 or trace.updates.unique().numel() > 1)
    order, state, steps = torch.tensor([1, 1, 2]), {}, []
    for step in range(tokens.size(1)):
        if step == 4:  # as a beam search does
            model.decoder.reorder_incremental_state_scripting(state, order)
        now = tokens if step < 4 else tokens[order]
        steps.append(model(now[:, : step + 1], incremental_state=state)[0][:, -1])
    torch.testing.assert_close(torch.stack(steps[:4], 1), dense[:, :4], rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.stack(steps[4:], 1), dense[order, 4:], rtol=0, atol=1e-10)
    for kind in (False, True):
        for row in range(len(tokens)):  # alone, and shorter
            alone, _ = full(model, kind, tokens[row : row + 1, : 4 + row])
            torch.testing.assert_close(alone[0], dense[row, : 4 + row], rtol=0, atol=1e-10)
        padded = tokens.clone()
        padded[0, 4:], padded[1, 7:] = 1, 1
        out, _ = full(model, kind, padded)
        for row, length in enumerate((4, 7, 9)):
            torch.testing.assert_close(out[row, :length], dense[row, :length], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_causal(build, case):
    """Random cases: other words from a place on change nothing before."""
    model = model_of(build, case)
    for seed in range(10):
        tokens, other = words(2, 8, seed), words(2, 8, seed + 100)
        place = 1 + seed % 7
        other[:, :place] = tokens[:, :place]
        for kind in (False, True):
            one, two = full(model, kind, tokens)[0], full(model, kind, other)[0]
            torch.testing.assert_close(one[:, :place], two[:, :place], rtol=0, atol=1e-10)
            assert not torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("case", ("expert-first", "token-first"))
def test_first_keeps_one_cache_a_layer(build, case):
    """All repeats of a layer read the keys that its first one made: no other is kept."""
    model, tokens, state = model_of(build, case), words(), {}
    for step in range(tokens.size(1)):
        model(tokens[:, : step + 1], incremental_state=state)
    caches = [key for key in state if "depth." in key]
    assert len(caches) == model.decoder.layers.unique_layers == 4
    for key in caches:
        assert [each["prev_key"].size(2) for each in state[key].values()] == [tokens.size(1)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_everything(build, case):
    model, tokens = model_of(build, case).train(), words()
    tokens[0, 5:] = 1
    with recording(model) as traces:
        out = model(tokens)[0]
    stack = model.decoder.layers
    loss = out[tokens != 1].sin().sum() + stack.router.price(traces["decoder.layers"][0])
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert "router" not in name or name.endswith("bias") or "act" in case or parameter.grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("depths")])
def test_translation(build, batch, case):
    """The encoder's choices are the best of the sentence in evaluation, too."""
    model = model_of(build, case, arch="mixture_of_recursions_tiny")
    dense, trace = full(model, False, **batch)
    packed, other = full(model, True, **batch)
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(packed[real], dense[real], rtol=0, atol=1e-10)
    assert torch.equal(alive(trace), alive(other))
    for row, length in enumerate(batch["src_lengths"].tolist()):
        source, previous = batch["src_tokens"][row : row + 1, -length:], batch["prev_output_tokens"][row]
        previous = previous[previous != 1][None]
        for kind in (False, True):
            alone, _ = full(model, kind, source, torch.tensor([length]), previous)
            torch.testing.assert_close(alone[0], dense[row, : previous.size(1)], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("case", ("expert", "expert-first", "token"))
def test_beam_search_scores_are_those_of_the_model(build, batch, dictionary, case):
    from fairseq_adaptive.decoding.beam_generator import BeamGenerator

    model = model_of(build, case, arch="mixture_of_recursions_tiny")
    found = BeamGenerator([model], dictionary, beam_size=3, max_len_b=8, normalize_scores=False).generate(
        [model], {"net_input": batch}
    )
    for row, hypotheses in enumerate(found):
        source = batch["src_tokens"][row : row + 1]
        source = source[source != 1][None]
        for hypothesis in hypotheses:
            target = hypothesis["tokens"]
            previous = torch.cat((torch.tensor([2]), target[:-1]))[None]
            logits, _ = full(model, False, source, torch.tensor([source.size(1)]), previous)
            scores = logits[0].log_softmax(-1).gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(hypothesis["positional_scores"], scores, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("case", ("depths-predictor", "expert", "token"))
def test_checkpoints(build, case):
    model, other = model_of(build, case), model_of(build, case, seed=4)
    assert any("decoder.layers.router" in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(words())[0], model(words())[0])


def test_presets(build):
    flags = {"max_source_positions": 16, "max_target_positions": 16, "tokens_per_sample": 16}
    sizes = {"mixture_of_depths_lm_base": (12, 12), "mixture_of_recursions_lm_360m": (32, 12)}
    for arch, (depths, unique) in sizes.items():
        model = build(
            arch,
            dtype=torch.float32,
            decoder_embed_dim=16,
            decoder_ffn_embed_dim=16,
            decoder_attention_heads=2,
            decoder_input_dim=16,
            decoder_output_dim=16,
            **flags,
        )
        stack = model.decoder.layers
        assert (len(stack), stack.unique_layers, stack.router_kv) == (depths, unique, "active")
    assert (stack.router.first, stack.router.block, stack.router.count) == (1, 10, 3)
    model = build("mixture_of_depths_lm_base", dtype=torch.float32, decoder_layers=4, decoder_unique_layers=4, **flags)
    router = model.decoder.layers.router
    assert (router.capacity, router.every, len(router)) == (0.125, 2, 2) and model.decoder.embed_tokens.weight.size(
        1
    ) == 768
    model = build("mixture_of_recursions_iwslt_de_en", dtype=torch.float32, decoder_router="token_choice")
    encoder, decoder = model.encoder.layers, model.decoder.layers
    assert encoder.schedule == decoder.schedule == (0, 1, 2, 1, 2, 1, 2, 3)
    assert type(encoder.router).__name__ == "ExpertChoice" and type(decoder.router).__name__ == "TokenChoice"
    assert model.encoder.layer_norm is not None and decoder.layer(0).embed_dim == 512


FAMILIES = {
    "transkimmer_base": {
        "encoder_layers": 8,
        "encoder_unique_layers": 4,
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "max_positions": 32,
    },
    "shared_transformer": {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {**FLAGS, "layers": 8, "unique_layers": 4}.items()
    },
    "albert_act_tiny": {
        "encoder_layers": 6,
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 32,
        "max_positions": 32,
        "encoder_attention_heads": 2,
        "encoder_input_dim": 16,
        "halting": "none",
    },
}


@pytest.mark.parametrize("router", ("mixture_of_recursions", "token_choice", "mixture_of_depths"))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(build, batch, family, router):
    """The routers are choices of all, and middle_cycle of those that share layers; dense equals packed."""
    flags = {} if family.startswith("albert") else {"layer_sharing": "middle_cycle"}
    model = build(family, router=router, **flags, **FAMILIES[family])
    for name, parameter in model.named_parameters():
        parameter.data += (0.5 if "router" in name else 0.1) * torch.randn_like(parameter)
    tokens = batch["prev_output_tokens"]
    inputs = batch if family == "shared_transformer" else {"src_tokens": tokens}
    names = [name for name, each in model.named_modules() if isinstance(each, LayerStack)]
    outs = []
    for packed in (False, True):
        for stack in stacks(model):
            stack.packed = packed
        with torch.no_grad(), recording(model) as traces:
            outs.append(model(**inputs)[0])
        assert all(len(traces[name][0].steps) == len(model.get_submodule(name)) for name in names)
    real = tokens != 1
    real = real[:, : outs[0].size(1)] if outs[0].dim() == 3 else slice(None)
    torch.testing.assert_close(outs[0][real], outs[1][real], rtol=0, atol=1e-6)
    with recording(model.train()) as traces:
        out = model(**inputs)[0]
    price = sum(model.get_submodule(name).router.price(traces[name][0]) for name in names)
    (out[real].sin().sum() + price).backward()
    for name, parameter in model.named_parameters():
        assert "router" not in name or parameter.grad.isfinite().all(), name


def test_middle_cycle_in_a_transformer_xl(build):
    """Which takes no router yet."""
    model = build(
        "par_transformer_xl",
        layout="afafafaf",
        decoder_unique_layers=4,
        layer_sharing="middle_cycle",
        decoder_embed_dim=16,
        decoder_ffn_embed_dim=32,
        decoder_attention_heads=2,
    )
    (stack,) = stacks(model)
    assert (
        stack.schedule == (0, 1, 2, 1, 2, 1, 2, 3)
        and [each.step_kind for each in stack] == ["attention", "feed-forward"] * 4
    )


@pytest.mark.parametrize("case", ("depths-predictor", "expert", "token", "token-first"))
def test_half_precision(build, case):
    """In bfloat16 and under autocast: scores and prices stay in float32."""
    model, tokens = model_of(build, case).float().train(), words()
    for half, context in ((False, torch.autocast("cpu", torch.bfloat16)), (True, torch.autocast("cpu", enabled=False))):
        model = model.bfloat16() if half else model
        with context, recording(model) as traces:
            out = model(tokens)[0]
            price = model.decoder.layers.router.price(traces["decoder.layers"][0])
        assert price.dtype == torch.float32 and price.isfinite()
        (out.float().sin().sum() + price).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        with torch.no_grad(), context:
            assert all(full(model.eval(), packed, tokens)[0].isfinite().all() for packed in (False, True))
        model.zero_grad(), model.train()
