"""--router, --halting and --reader on every family: they build, dense equals packed, all is trained, a foreign one serves."""

import argparse
import itertools

import pytest
import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.policy_flags import FLAGS
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.policies import Choice, Halting, Router, Verdict, register_policy
from fairseq_adaptive.modules.policies.registry import build_policy
from old_checkpoints.cases import answers, build, flags_of, inputs, unsettle

SIZES = {
    "encoder_embed_dim": 8,
    "encoder_ffn_embed_dim": 12,
    "encoder_attention_heads": 2,
    "encoder_layers": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
DECODER = {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 12, "decoder_attention_heads": 2, "decoder_layers": 3}
TAPE = {"tape_tokens": 4, "tape_mlp_dim": 6}
FAMILIES = {
    "shared_transformer": {**SIZES, **DECODER, "share_all_embeddings": True},
    "shared_transformer_lm": {
        **{k: v for k, v in SIZES.items() if "dropout" in k},
        **DECODER,
        "decoder_input_dim": 8,
        "decoder_output_dim": 8,
    },
    "albert_act": {**SIZES, "encoder_input_dim": 6, "pooler_dropout": 0.0},
    "transkimmer": {**SIZES, "max_positions": 20},
    "adatape": {**SIZES, **TAPE, "max_positions": 20, "tape_bank_size": 20},
    "adatape_parity": {**SIZES, **TAPE},
    "adatape_vit": {**SIZES, **TAPE, "patch_size": 4, "tape_bank_patch_size": 2, "tape_layer": 1},
    "par_transformer_xl": {
        "decoder_embed_dim": 8,
        "decoder_ffn_embed_dim": 12,
        "decoder_attention_heads": 2,
        "dropout": 0.0,
        "memory_length": 5,
        "layout": "af*2",
    },
    "par_supernet": {
        "decoder_embed_dim": 8,
        "decoder_ffn_embed_dim": 12,
        "decoder_attention_heads": 2,
        "dropout": 0.0,
        "memory_length": 5,
        "blocks": 3,
        "temperature_updates": 10,
    },
}
ROUTERS, RULES = (
    ("none", "skimming", "mixture_of_depths", "test_every_other"),
    ("none", "act", "ut_act", "pondernet", "test_after"),
)


@register_policy("test_every_other")
class EveryOther(Router, nn.Module):
    """Leaves out every token whose first number is below ``least``, at every other depth."""

    monotone = False

    def __init__(self, dim, least=0.0):
        super().__init__()
        self.dim, self.least = dim, least

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        run = (x[..., 0] >= self.least) | (depth % 2 == 0)
        run = run if protected is None else run | protected
        return Choice(run.to(x), run.to(x))


@register_policy("test_after")
class After(Halting):
    """Every token halts after ``depths_to_go`` layers; counts them in its carry."""

    def __init__(self, depths_to_go=2):
        super().__init__()
        self.depths_to_go = depths_to_go

    def start(self, x):
        return {"count": torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)}

    def step(self, before, after, carry, running, last):
        count = carry["count"] + running
        state = torch.where(running.unsqueeze(-1), after, before)
        return Verdict(state, {"count": count}, running & (count < self.depths_to_go), running.to(before))


def made(family, **flags):
    torch.manual_seed(1)
    return build(family, flags_of(family, {**FAMILIES[family], **flags}))


def cases():
    for family, router, rule in itertools.product(FAMILIES, ROUTERS, RULES):
        if family in ("adatape_parity", "adatape_vit") and rule == "pondernet":  # no token to read the output from
            continue
        yield family, router, rule


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_flags(family):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    model = ARCH_MODEL_REGISTRY[family]
    model.add_args(parser)
    if getattr(model, "__dataclass", None):
        gen_parser_from_dataclass(parser, model.__dataclass())
    known = {action.dest for action in parser._actions}
    assert set(FLAGS) <= known
    if family == "shared_transformer":
        assert {"encoder_router", "decoder_router_kv", "encoder_halting_args", "encoder_reader"} <= known


@pytest.mark.parametrize("family, router, rule", cases())
def test_policies_run_on_every_family(family, router, rule):
    model = unsettle(made(family, router=router, halting=rule)).double()
    for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
        for each in stack.router.parameters() if isinstance(stack.router, nn.ModuleList) else ():
            each.data.add_(0.3 * torch.randn_like(each))
    for each in model.decoder.layers.children() if family == "shared_transformer" else ():
        each.need_attn = False  # with weights fairseq takes its softmax in float32, in a float64 model, too
    given = inputs("shared_transformer_lm" if family.startswith("par_") else family)
    outs = []
    for packed in (False, True):
        for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
            stack.packed = packed
        with torch.no_grad(), recording(model.eval()) as traces:
            outs.append((model(**given)[0], [each for trace in traces.values() for each in trace]))
    (dense, one), (packed, other) = outs
    real = given["src_tokens"].ne(1) if "src_tokens" in given and dense.dim() == 3 else None
    if family == "shared_transformer":
        real = given["prev_output_tokens"].ne(1)
    torch.testing.assert_close(
        dense if real is None else dense[real], packed if real is None else packed[real], rtol=0, atol=1e-10
    )
    assert len(one) == len(other) == (2 if family == "shared_transformer" else 1)
    assert all(torch.equal(a.updates[a.tokens], b.updates[b.tokens]) for a, b in zip(one, other))
    for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
        stack.packed = None
    with recording(model.train()) as traces:
        loss = model(**given)[0].sin().sum()
    for name, stack in model.named_modules():
        if isinstance(stack, LayerStack):
            (trace,) = traces[name]
            loss = loss + sum(each.price(trace) for each in (stack.router, stack.halting) if each is not None)
    loss.backward()
    for name, parameter in model.named_parameters():
        unused = ("sentence_order_head", "pooler", "lm_head")
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) or any(
            each in name for each in unused
        ), name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.startswith("shared_transformer")])
@pytest.mark.parametrize(
    "router, rule", [("skimming", "none"), ("mixture_of_depths", "act"), ("test_every_other", "none")]
)
def test_a_model_is_saved_and_generates(family, router, rule):
    model = unsettle(made(family, router=router, halting=rule))
    weights = model.state_dict()
    again = made(family, router=router, halting=rule)
    again.load_state_dict(weights, strict=True)
    for key, found in answers(model, family, inputs(family)).items():
        torch.testing.assert_close(answers(again, family, inputs(family))[key], found)


@torch.no_grad()
@pytest.mark.parametrize("family", ("shared_transformer", "albert_act", "transkimmer"))
def test_every_encoder_reads(family):
    reader = {"reader": "tape", "reader_args": '{"tokens": 4, "bank_size": 20, "depth": 1}'}
    given, outs = inputs(family), []
    model = unsettle(made(family, **reader)).double().eval()
    without = made(family).double().eval()
    assert any("reader.bank" in name for name in model.state_dict())
    without.load_state_dict({n: t for n, t in model.state_dict().items() if ".reader." not in n})
    with recording(model) as traces:
        outs = [each(**given)[0] for each in (model, without)]
    trace = next(iter(traces.values()))[0]
    assert outs[0].shape == outs[1].shape and (outs[0] - outs[1]).abs().max() > 1e-6
    assert trace.reading.live.any() and not trace.steps[0].alive[:, -trace.reading.live.size(1) :].any()
    if family == "shared_transformer":
        one = {name: value[1:2] for name, value in given.items()}
        one["src_tokens"] = one["src_tokens"][:, :5]
        alone = model(**one)[0]
        torch.testing.assert_close(alone[0], outs[0][1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "family, flags, message",
    [
        ("shared_transformer_lm", {"reader": "tape"}, "--reader is for encoders"),
        ("par_transformer_xl", {"reader": "tape"}, "--reader is for encoders"),
        ("par_transformer_xl", {"reader": "tape"}, "--reader is for encoders"),
        ("par_supernet", {"halting": "act", "halting_kv": "keep"}, "serves several depths"),
        (
            "par_transformer_xl",
            {"halting": "act", "halting_kv": "keep", "decoder_unique_layers": 2},
            "the memory of a Transformer-XL",
        ),
        ("adatape", {"reader": "test_other"}, "reads the tape of --tape-tokens"),
        ("albert_act", {"reader": "tape", "reader_args": '{"depth": 9, "bank_size": 99}'}, "at depth 9 never reads"),
        ("albert_act", {"router": "every"}, "unknown router 'every': choose one of none, "),
        (
            "albert_act",
            {"halting": "test_after", "halting_args": '{"depth": 1}'},
            "has no argument 'depth': it has depths_to_go",
        ),
        ("shared_transformer", {"router": "skimming", "encoder_layerdrop": 0.1}, "leave out --encoder-layerdrop"),
    ],
)
def test_refused(family, flags, message):
    with pytest.raises(UsageError, match=message):
        made(family, **flags)


def test_registry_refuses():
    with pytest.raises(UsageError, match="is no policy"):
        register_policy("test_nothing")(nn.Linear)
    with pytest.raises(UsageError, match="already"):
        register_policy("act")(After)
    assert build_policy("router", None, None) is None
