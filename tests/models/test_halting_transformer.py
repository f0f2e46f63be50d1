"""Halting in translation and language models: dense equals packed equals incremental, per token."""

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.policies import ACT, Margin, UniversalACT
from fairseq_adaptive.modules.policies.pondernet import PonderNet

RULES = ("act", "ut_act", "pondernet", "saturation", "stick_breaking")
TINY = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 5}.items()
}


def halting(build, rule, unique=2, arch="shared_transformer", **flags):
    threshold = {"saturation": 0.97, "pondernet": 0.5}.get(rule, 0.9)
    flags = {"encoder_unique_layers": unique, "decoder_unique_layers": unique, **TINY, **flags}
    model = build(arch, halting=rule, halting_threshold=threshold, **flags)
    torch.manual_seed(3)
    for stack in stacks(model):
        if rule != "saturation":  # a unit that tells tokens apart
            torch.nn.init.normal_(stack.halting.unit.weight, std=0.4)
            torch.nn.init.constant_(stack.halting.unit.bias, -1.0)
    return model


def stacks(model):
    return [module for module in model.modules() if isinstance(module, LayerStack)]


def run(model, batch, packed=None):
    """Logits and the traces of the stacks."""
    for stack in stacks(model):
        stack.packed = packed
    with torch.no_grad(), recording(model) as traces:
        out = model(**batch)
    return out[0], [trace for runs in traces.values() for trace in runs]


def real(batch):
    return batch["prev_output_tokens"] != 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unique", (1, 2, 5))
@pytest.mark.parametrize("before", (False, True), ids=("post-LN", "pre-LN"))
def test_packed_equals_dense(build, batch, rule, unique, before):
    model = halting(build, rule, unique, encoder_normalize_before=before, decoder_normalize_before=before)
    (dense, expected), (packed, traces) = run(model, batch, False), run(model, batch, True)
    torch.testing.assert_close(packed[real(batch)], dense[real(batch)], rtol=0, atol=1e-6)
    for trace, other in zip(traces, expected):
        assert torch.equal(trace.updates, other.updates)
        assert [step.layer for step in trace.steps] == [step.layer for step in other.steps]
        assert not trace.updates[~trace.tokens].any() and (trace.updates[trace.tokens] > 0).all()
        for step, counterpart in zip(trace.steps, other.steps):
            assert torch.equal(step.alive, counterpart.alive) and torch.equal(step.halted, counterpart.halted)
        if trace.remainders is not None:
            torch.testing.assert_close(trace.remainders, other.remainders, rtol=0, atol=1e-6)
    assert len(torch.cat([trace.updates[trace.tokens] for trace in traces]).unique()) > 1
    assert torch.equal(run(model, batch)[0], packed)  # what evaluation without gradients does by itself


def test_untied_layers_recompute_what_tied_layers_keep(build, batch):
    """The keys of halted tokens are projected once where the layer is tied, and at every depth where it is not."""
    counts = {}
    for unique in (1, 5):
        model = halting(build, "act", unique)
        rows = []
        for index in range(unique):
            projection = model.encoder.layers._modules[str(index)].self_attn.k_proj
            projection.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].size(0)))
        _, traces = run(model, batch)
        updates, depths = traces[0].updates, len(traces[0].steps)
        counts[unique] = sum(rows)
        halted = (updates[traces[0].tokens] < depths).sum()
        assert 0 < halted < traces[0].tokens.sum()
        expected = updates.sum() + halted if unique == 1 else depths * traces[0].tokens.sum()
        assert sum(rows) == expected
    assert counts[1] < counts[5]


def test_stops_when_all_have_halted(build, batch):
    model = halting(build, "act", 1)
    for stack in stacks(model):
        torch.nn.init.constant_(stack.halting.unit.bias, 9.0)
        torch.nn.init.zeros_(stack.halting.unit.weight)
    calls = []
    model.encoder.layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    for packed in (False, True):
        calls.clear()
        _, traces = run(model, batch, packed)
        assert len(calls) == 1 and all(len(trace.steps) == 1 and trace.updates.max() == 1 for trace in traces)


@pytest.mark.parametrize("rule", RULES)
def test_independent_of_padding_and_of_other_rows(build, batch, rule):
    model = halting(build, rule)
    alone = {"src_tokens": batch["src_tokens"][2:, -4:], "src_lengths": torch.tensor([4])}
    alone["prev_output_tokens"] = batch["prev_output_tokens"][2:, :3]
    for packed in (False, True):
        logits, traces = run(model, batch, packed)
        own, own_traces = run(model, alone, packed)
        torch.testing.assert_close(own[0], logits[2, :3], rtol=0, atol=1e-6)
        assert torch.equal(own_traces[0].updates[0], traces[0].updates[2, -4:])
        assert torch.equal(own_traces[1].updates[0], traces[1].updates[2, :3])


def decode(model, batch, reorder=None):
    """Logits and decoder depths of each step; ``reorder = (step, order)`` permutes hypotheses after that step."""
    encoder_out = model.encoder(batch["src_tokens"], batch["src_lengths"])
    previous, state, steps, depths = batch["prev_output_tokens"], {}, [], []
    for step in range(previous.size(1)):
        with recording(model.decoder) as traces:
            out, extra = model.decoder(previous[:, : step + 1], encoder_out=encoder_out, incremental_state=state)
        steps.append(out[:, -1])
        depths.append(traces["layers"][0].updates[:, 0])
        assert extra["attn"][0].shape == (previous.size(0), 1, batch["src_tokens"].size(1))
        if reorder and step == reorder[0]:
            order = torch.tensor(reorder[1])
            model.decoder.reorder_incremental_state_scripting(state, order)
            encoder_out, previous = model.encoder.reorder_encoder_out(encoder_out, order), previous[order]
    return steps, depths


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unique", (1, 2, 5))
def test_incremental_equals_full(build, batch, rule, unique):
    model = halting(build, rule, unique)
    batch["prev_output_tokens"][batch["prev_output_tokens"] == 1] = 7
    logits, traces = run(model, batch)
    with torch.no_grad():
        steps, depths = decode(model, batch)
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=0, atol=1e-6)
    assert torch.equal(torch.stack(depths, 1), traces[1].updates)


@pytest.mark.parametrize("order", ([1, 0, 2, 2, 5, 4], [3, 3, 4, 5]), ids=("within-sentences", "sentence-finished"))
@pytest.mark.parametrize("beam", (1, 2))
def test_incremental_equals_full_after_reordering(build, batch, order, beam):
    model = halting(build, "act")
    batch["prev_output_tokens"][batch["prev_output_tokens"] == 1] = 7
    batch = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    batch["prev_output_tokens"][1::2, 1:] += 1
    model.decoder.set_beam_size(beam)
    with torch.no_grad():
        steps, _ = decode(model, batch, reorder=(3, order))
        expected, _ = run(model, {name: value[order] for name, value in batch.items()})
    torch.testing.assert_close(torch.stack(steps[4:], 1), expected[:, 4:], rtol=0, atol=1e-6)


def test_attention_weights_are_those_of_the_last_depth_of_a_token(build, batch):
    model = halting(build, "act")
    with torch.no_grad():
        packed, dense = (run(model, batch, kind) and model(**batch)[1]["attn"][0] for kind in (True, False))
    torch.testing.assert_close(packed[real(batch)], dense[real(batch)], rtol=0, atol=1e-6)
    sums = packed[real(batch)].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ("act", "pondernet"))
@pytest.mark.parametrize("adaptive", (False, True))
def test_language_model(build, batch, rule, adaptive):
    flags = {name: value for name, value in TINY.items() if name.startswith("decoder")}
    flags.update(decoder_input_dim=16, decoder_output_dim=16, decoder_unique_layers=2)
    if adaptive:
        flags.update(adaptive_input=True, adaptive_input_cutoff="20,30", adaptive_softmax_cutoff="20,30")
    model = build("shared_transformer_lm_base", halting=rule, **flags)
    torch.nn.init.normal_(model.decoder.layers.halting.unit.weight, std=0.3)
    tokens = batch["prev_output_tokens"].masked_fill(batch["prev_output_tokens"] == 1, 9)
    dense, (trace,) = run(model, {"src_tokens": tokens}, False)
    packed, (other,) = run(model, {"src_tokens": tokens})
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-6)
    assert torch.equal(trace.updates, other.updates) and trace.updates.unique().numel() > 1
    state = {}
    with torch.no_grad():
        steps = [model(tokens[:, : n + 1], incremental_state=state)[0][:, -1] for n in range(tokens.size(1))]
    torch.testing.assert_close(torch.stack(steps, 1), packed, rtol=0, atol=1e-6)


@torch.no_grad()
def test_margin_exit_equals_the_loop(build, batch):
    """A token keeps the state in which its two best words are far enough apart, and others go on seeing it."""
    flags = {name: value for name, value in TINY.items() if name.startswith("decoder")}
    flags.update(decoder_input_dim=16, decoder_output_dim=16, decoder_unique_layers=2)
    plain = build("shared_transformer_lm_base", **flags)
    model = build("shared_transformer_lm_base", halting="margin", halting_threshold=0.02, **flags)
    tokens, first = batch["prev_output_tokens"].masked_fill(batch["prev_output_tokens"] == 1, 9), []
    hook = plain.decoder.layers[0].register_forward_pre_hook(lambda *call: first.append(call[1:]), with_kwargs=True)
    plain(tokens)
    hook.remove()
    ((x, *_), flags), layers = first[0], plain.decoder.layers
    running = torch.ones(x.shape[:2], dtype=torch.bool)
    updates = torch.zeros_like(running, dtype=torch.long)
    for depth in range(len(layers)):
        after = layers[depth](x, self_attn_mask=flags["self_attn_mask"], depth=depth)[0]
        x, updates = torch.where(running.unsqueeze(-1), after, x), updates + running
        best = plain.decoder.word_scores(x).softmax(-1).sort(-1).values
        running &= best[..., -1] - best[..., -2] < 0.02
    assert updates.unique().numel() > 2
    for packed in (False, True):
        logits, (trace,) = run(model, {"src_tokens": tokens}, packed)
        assert torch.equal(trace.updates, updates.transpose(0, 1))
        torch.testing.assert_close(logits, plain.decoder.word_scores(x).transpose(0, 1), rtol=0, atol=1e-6)
    state = {}
    steps = [model(tokens[:, : n + 1], incremental_state=state)[0][:, -1] for n in range(tokens.size(1))]
    torch.testing.assert_close(torch.stack(steps, 1), logits, rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="asks the word scores"):
        cutoffs = {"adaptive_input": True, "adaptive_input_cutoff": "20,30", "adaptive_softmax_cutoff": "20,30"}
        build("shared_transformer_lm_base", halting="margin", **cutoffs)


@pytest.mark.parametrize("sides", (("act", "none"), ("none", "ut_act"), ("pondernet", "margin")), ids="-".join)
def test_encoder_and_decoder_halt_by_their_own_rules(build, batch, sides):
    model = build("shared_transformer", encoder_halting=sides[0], decoder_halting=sides[1], **TINY)
    kinds = {"act": ACT, "ut_act": UniversalACT, "pondernet": PonderNet, "margin": Margin, "none": type(None)}
    assert [type(stack.halting) for stack in stacks(model)] == [kinds[rule] for rule in sides]
    dense, packed = (run(model, batch, kind)[0] for kind in (False, True))
    torch.testing.assert_close(packed[real(batch)], dense[real(batch)], rtol=0, atol=1e-6)
    own = build("shared_transformer", halting=sides[0], decoder_halting=sides[1], **TINY)
    assert torch.equal(run(own, batch, True)[0], packed)


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet"))
def test_every_parameter_has_a_gradient_in_training(build, batch, rule):
    """Also when all tokens halt at once: a layer that a worker leaves out would stop a training with several."""
    model = halting(build, rule, 3).train()
    for stack in stacks(model):
        torch.nn.init.constant_(stack.halting.unit.bias, 9.0)
    with recording(model) as traces:
        loss = model(**batch)[0].sin().sum()
    (loss + sum(trace.ponder_cost() for runs in traces.values() for trace in runs)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_admin_initialisation_profiles_every_depth(build, batch):
    model = halting(build, "act", 2, init="admin").train()
    model(**batch)
    for stack in stacks(model):
        assert stack.residual.profiled and (stack.residual.start.flatten()[1:] != 1).all()
    model.eval()
    torch.testing.assert_close(
        *(run(model, batch, packed)[0][real(batch)] for packed in (True, False)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(build, batch, dtype):
    """What --fp16 and --bf16 make of the model, and --amp in evaluation."""
    model = halting(build, "act", dtype=dtype)
    logits, traces = run(model, batch)
    assert logits.dtype == dtype and logits[real(batch)].isfinite().all()
    assert all(trace.remainders.dtype == torch.float32 for trace in traces)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(halting(build, "ut_act", dtype=torch.float32), batch)[0].isfinite().all()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"halting_threshold": 0.0}, "above 0 and up to 1"),
        ({"halting": "margin"}, "--decoder-halting margin alone"),
        ({"encoder_layerdrop": 0.1}, "leave out --encoder-layerdrop"),
        ({"no_cross_attention": True, "cross_self_attention": True}, "--cross-self-attention"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses_impossible_flags(build, flags, message):
    with pytest.raises(UsageError, match=message):
        build("shared_transformer", **{**TINY, "halting": "act", **flags})
