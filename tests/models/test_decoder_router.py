"""A router in a decoder, alone and with a halting rule: dense equals packed equals one token at a time, causally."""

import itertools

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.policies import MixtureOfDepths, Place, build_policy, register_policy
from pairwise import pairwise


@register_policy("monotone_capacity")
class MonotoneCapacity(MixtureOfDepths):
    """Who is left out once stays so: as in the expert-choice router of Mixture-of-Recursions."""

    monotone = True


HALF = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 5}
TINY = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in HALF.items()}
ROUTERS = ("none", "skimming", "mixture_of_depths", "monotone_capacity")
RULES = ("none", "act", "ut_act", "pondernet", "saturation")
KV = ("active", "recompute")
CASES = [
    (router, rule, router_kv, halting_kv)
    for router, rule, router_kv, halting_kv in itertools.product(ROUTERS, RULES, KV, KV)
    if (router != "none" or router_kv == "active")
    and (rule != "none" or halting_kv == "recompute")
    and (router, rule) != ("none", "none")
]
CASES += [(router, rule, "active", "keep") for router in ROUTERS for rule in RULES if rule != "none"]


def paired(*values):
    """Cases, each with one of some values: pairs of what goes together, all of them."""
    chosen = pairwise([(*case, value) for case in CASES for value in values])
    return [pytest.param(case, value, id="-".join(map(str, (*case, value)))) for *case, value in chosen]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def model_of(
    build,
    router,
    rule,
    router_kv,
    halting_kv,
    arch="shared_transformer_lm_base",
    seed=3,
    unique=2,
    dtype=torch.float64,
    before=True,
    encoder=False,
):
    """Every case, also those that the flags refuse: the equality holds for them, too."""
    flags = dict(TINY) if arch == "shared_transformer" else {n: v for n, v in TINY.items() if n.startswith("decoder")}
    flags.update(decoder_unique_layers=unique, encoder_unique_layers=unique, decoder_normalize_before=before)
    if arch != "shared_transformer":
        flags.update(decoder_input_dim=16, decoder_output_dim=16)
    model = build(arch, seed=seed, **flags)
    torch.manual_seed(seed)
    sides = [model.decoder.layers] + ([model.encoder.layers] if encoder else [])
    for stack in sides:
        stack.halting = build_policy(
            "halting",
            rule,
            Place(16, 5),
            **({"threshold": {"saturation": 0.95, "pondernet": 0.5}.get(rule, 0.9)} if rule != "none" else {}),
        )
        stack.router = build_policy("router", router, Place(16, 5))
        stack.router_kv, stack.halting_kv = router_kv, halting_kv
        if hasattr(stack.halting, "unit"):
            torch.nn.init.normal_(stack.halting.unit.weight, std=0.4)
            torch.nn.init.constant_(stack.halting.unit.bias, -1.0)
        for each in stack.router or ():
            if router == "skimming":
                torch.nn.init.normal_(each[1].weight), torch.nn.init.normal_(each[4].weight)
                each[4].bias.data.copy_(torch.tensor([-0.7, 0.7]))
            else:
                torch.nn.init.normal_(each.weight, std=0.4), torch.nn.init.constant_(each.bias, 0.3)
    for name, parameter in model.named_parameters():
        if "router" not in name and "halting" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for each in model.decoder.layers.children():
        each.need_attn = False  # with weights fairseq takes its softmax in float32, in a float64 model, too
    return model.to(dtype).eval()


def full(model, packed, *args, **kwargs):
    for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
        stack.packed = packed
    with recording(model) as traces:
        out = model(*args, **kwargs)[0]
    return out, traces["decoder.layers"][0]


def one_by_one(call, length):
    """Logits and, token by token, at which depths it was computed: B x T x N."""
    state, logits, alive = {}, [], []
    for step in range(length):
        out, trace = call(step, state)
        logits.append(out[:, -1])
        steps = [each.alive[:, 0] for each in trace.steps]
        alive.append(torch.stack(steps + [torch.zeros_like(steps[0])] * (5 - len(steps)), 1))
    return torch.stack(logits, 1), torch.stack(alive, 1), state


def lm_step(model, tokens):
    def call(step, state):
        with recording(model) as traces:
            out = model(tokens[:, : step + 1], incremental_state=state)[0]
        return out, traces["decoder.layers"][0]

    return call


def alive_of(trace):
    steps = [each.alive for each in trace.steps]
    return torch.stack(steps + [torch.zeros_like(steps[0])] * (5 - len(steps)), 2)


def words(batch=4, length=11, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 44, (batch, length), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("case, before", paired(False, True))
def test_language_model_dense_packed_incremental(build, case, before):
    for seed, unique, dtype in (
        (3, 2, torch.float64),
        (4, 1, torch.float64),
        (5, 5, torch.float64),
        (6, 2, torch.float32),
    ):
        model, tokens = model_of(build, *case, seed=seed, unique=unique, dtype=dtype, before=before), words(seed=seed)
        dense, trace = full(model, False, tokens)
        packed, other = full(model, True, tokens)
        one, alive, _ = one_by_one(lm_step(model, tokens), tokens.size(1))
        assert dense.isfinite().all()
        for each in (packed, one):
            torch.testing.assert_close(each, dense, rtol=0, atol=TOLERANCE[dtype])
        assert torch.equal(alive_of(trace), alive_of(other)) and torch.equal(alive_of(trace), alive)
        if seed == 3:
            assert trace.updates.unique().numel() > 1
        if trace.remainders is not None:
            torch.testing.assert_close(trace.remainders, other.remainders, rtol=0, atol=TOLERANCE[dtype])
        # causality: other words from the seventh on change nothing before
        changed = tokens.clone()
        changed[:, 6:] = words(seed=99)[:, 6:]
        for kind, expected in ((False, dense), (True, packed)):
            out, _ = full(model, kind, changed)
            torch.testing.assert_close(out[:, :6], expected[:, :6], rtol=0, atol=TOLERANCE[dtype])
        # batch invariance: alone, shorter, and among padding
        for row in range(tokens.size(0)):
            for kind in (False, True):
                alone, _ = full(model, kind, tokens[row : row + 1, : 5 + row])
                torch.testing.assert_close(alone[0], dense[row, : 5 + row], rtol=0, atol=TOLERANCE[dtype])
            alone, _, _ = one_by_one(lm_step(model, tokens[row : row + 1]), 7)
            torch.testing.assert_close(alone[0], dense[row, :7], rtol=0, atol=TOLERANCE[dtype])
        padded = tokens.clone()
        for row in range(tokens.size(0)):
            padded[row, 5 + row :] = 1
        for kind in (False, True):
            out, _ = full(model, kind, padded)
            for row in range(tokens.size(0)):
                torch.testing.assert_close(out[row, : 5 + row], dense[row, : 5 + row], rtol=0, atol=TOLERANCE[dtype])


@torch.no_grad()
@pytest.mark.parametrize("case, beam", paired(1, 2))
def test_translation_dense_packed_incremental_with_reordering(build, batch, case, beam):
    model = model_of(build, *case, arch="shared_transformer", before=False, encoder=True)
    dense, trace = full(model, False, **batch)
    packed, other = full(model, True, **batch)
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(packed[real], dense[real], rtol=0, atol=1e-10)
    assert torch.equal(alive_of(trace), alive_of(other))
    batch["prev_output_tokens"] = words(3, 8)
    batch = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    batch["prev_output_tokens"][1::2, 1:] -= 1
    model.decoder.set_beam_size(beam)
    for order in ([1, 0, 2, 2, 5, 4], [3, 3, 4, 5]):
        encoder_out, previous = model.encoder(batch["src_tokens"], batch["src_lengths"]), batch["prev_output_tokens"]
        state, steps = {}, []
        for step in range(8):
            steps.append(
                model.decoder(previous[:, : step + 1], encoder_out=encoder_out, incremental_state=state)[0][:, -1]
            )
            if step == 3:
                index = torch.tensor(order)
                model.decoder.reorder_incremental_state_scripting(state, index)
                encoder_out, previous = model.encoder.reorder_encoder_out(encoder_out, index), previous[index]
        for kind in (False, True):
            expected, _ = full(model, kind, **{name: value[torch.tensor(order)] for name, value in batch.items()})
            torch.testing.assert_close(torch.stack(steps[4:], 1), expected[:, 4:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "none" and c[1] in ("none", "act")], ids="-".join)
def test_gradients(build, case):
    model, tokens = model_of(build, *case).train(), words()
    tokens[0, 5:] = 1
    with recording(model) as traces:
        out = model(tokens)[0]
    loss = out[tokens != 1].sin().sum()
    loss = loss + sum(s.kept.sum() + 0 * s.keeping.sum() for s in traces["decoder.layers"][0].steps)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, missing


def test_absent_tokens_take_no_room_in_the_cache(build):
    """Alone in its batch, a token that a router leaves out is not even cached."""
    model, tokens = model_of(build, "mixture_of_depths", "none", "active", "recompute"), words(1)
    with torch.no_grad():
        _, alive, state = one_by_one(lm_step(model, tokens), 11)
    sizes = [
        cache[name]["prev_key"].size(2) if (cache := state.get(key)) and (name := next(iter(cache))) else 0
        for key in sorted(state)
        if "depth." in key
    ]
    assert sorted(sizes) == sorted(n for n in alive[0].sum(0).tolist() if n) and min(sizes) < 11


def test_training_takes_the_best_and_evaluation_the_threshold(build):
    model, tokens = model_of(build, "mixture_of_depths", "none", "active", "recompute"), words()
    tokens[0, 5:] = 1
    with recording(model) as traces:
        model.train()(tokens)
    for step in traces["decoder.layers"][0].steps:
        assert step.alive.sum(1).tolist() == [3, 6, 6, 6]  # half of 5 and of 11: padding has no share


def test_flags(build):
    flags = {n: v for n, v in TINY.items() if n.startswith("decoder")}
    model = build(
        "shared_transformer_lm_base",
        router="mixture_of_depths",
        router_kv="recompute",
        halting="act",
        router_args='{"capacity": 0.25}',
        **flags,
    )
    stack = model.decoder.layers
    assert (stack.router_kv, stack.halting_kv, stack.router.capacity) == ("recompute", "recompute", 0.25)
    assert model.decoder.begin_search(4) is not None
    for bad in ({"router_kv": "recompute"}, {"halting_kv": "active"}):
        with pytest.raises(UsageError, match="says what is seen"):
            build("shared_transformer_lm_base", **bad, **flags)
    for bad in (
        {"halting": "saturation"},
        {"decoder_layerdrop": 0.1},
        {"router_args": '{"capacity": 0}'},
        {"reader": "tape"},
    ):
        with pytest.raises(UsageError):
            build("shared_transformer_lm_base", router="mixture_of_depths", **bad, **flags)


def test_sides_have_policies_of_their_own(build):
    model = build(
        "shared_transformer",
        **TINY,
        router="skimming",
        decoder_router="mixture_of_depths",
        decoder_router_args='{"capacity": 0.3}',
        encoder_halting="act",
        encoder_halting_kv="active",
    )
    encoder, decoder = model.encoder.layers, model.decoder.layers
    assert type(encoder.router).__name__ == "Skimming" and decoder.router.capacity == 0.3
    assert encoder.halting_kv == "active" and encoder.halting is not None and decoder.halting is None
    with pytest.raises(UsageError, match="add --decoder-router"):
        build("shared_transformer", **TINY, encoder_router="skimming", decoder_router_kv="recompute")


@pytest.mark.parametrize("router_kv", KV)
def test_the_differentiable_mask_is_the_hard_one(build, router_kv):
    """Training without noise, where the gradient reaches who is skimmed through attention, and evaluation."""
    model, tokens = model_of(build, "skimming", "none", router_kv, "recompute"), words()
    tokens[0, 5:] = 1
    hard = full(model, False, tokens)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or hasattr(module, "p"):
            module.p = 0.0
    model.train().decoder.layers.router.noise = 0.0
    out, trace = full(model, False, tokens)
    torch.testing.assert_close(out[tokens != 1], hard[tokens != 1], rtol=0, atol=1e-10)
    assert trace.steps[0].kept.requires_grad


@torch.no_grad()
def test_unsafe_variants_fail(build, monkeypatch):
    """The best of a sentence in evaluation see the future, and a cache without a mask of its own shows what is hidden."""
    from fairseq_adaptive.modules.stack.packed_context import StepContext

    model, tokens = model_of(build, "mixture_of_depths", "none", "active", "recompute"), words()
    expected = full(model, False, tokens)[0]
    monkeypatch.setattr(StepContext, "hide", lambda self, rows: None)
    one, _, _ = one_by_one(lm_step(model, tokens), 11)
    assert (one - expected).abs().max() > 1e-3
    monkeypatch.undo()
    choose = MixtureOfDepths.choose
    monkeypatch.setattr(MixtureOfDepths, "choose", lambda self, *args: choose(self, *args[:-1], False))
    best, changed = full(model, False, tokens)[0], tokens.clone()
    changed[:, 6:] = words(seed=99)[:, 6:]
    assert (full(model, False, changed)[0][:, :6] - best[:, :6]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS[1:])
def test_attention_weights(build, batch, router):
    model = model_of(build, router, "none", "active", "recompute", arch="shared_transformer", before=False)
    for each in model.decoder.layers.children():
        each.need_attn = True
    weights = []
    for kind in (False, True):
        model.decoder.layers.packed = kind
        weights.append(model(**batch)[1]["attn"][0])
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(weights[0][real], weights[1][real], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "router, rule", (("skimming", "act"), ("mixture_of_depths", "act"), ("mixture_of_depths", "none"))
)
@pytest.mark.parametrize("router_kv", KV)
def test_beam_search_scores_are_those_of_the_model(build, batch, dictionary, router, rule, router_kv):
    """fairseq's own search over the plain incremental path; every hypothesis is scored again, dense, and alone."""
    from fairseq_adaptive.decoding.beam_generator import BeamGenerator

    model = model_of(build, router, rule, router_kv, "recompute", arch="shared_transformer", before=False, encoder=True)
    # weights to tell words apart
    generator = BeamGenerator([model], dictionary, beam_size=3, max_len_b=8, normalize_scores=False)
    found = generator.generate([model], {"net_input": batch})
    for row, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            target = hypothesis["tokens"]
            previous = torch.cat((torch.tensor([2]), target[:-1]))[None]
            source = batch["src_tokens"][row : row + 1]
            source = source[source != 1][None]
            lengths = torch.tensor([source.size(1)])
            logits, _ = full(model, False, src_tokens=source, src_lengths=lengths, prev_output_tokens=previous)
            scores = logits[0].log_softmax(-1).gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(hypothesis["positional_scores"], scores, rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("router_kv", KV)
def test_a_rule_does_not_stop_the_gradient_of_skimming(build, router_kv):
    """Nothing halts by saturation in training: all gradients are those without a rule."""
    grads = []
    for rule in ("none", "saturation"):
        model, tokens = model_of(build, "skimming", rule, router_kv, "recompute"), words()
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        model.train().decoder.layers.router.noise = 0.0
        with recording(model) as traces:
            out = model(tokens)[0]
        (out.sin().sum() + sum(step.kept.sum() for step in traces["decoder.layers"][0].steps)).backward()
        assert not all(step.alive.all() for step in traces["decoder.layers"][0].steps)
        grads.append({name: each.grad for name, each in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-8, atol=1e-10)
