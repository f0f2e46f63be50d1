"""A change that a user makes to a layer, a halting unit or a router is seen by the encoders, the language models and the
Transformer-XL, too: packed runs are the dense ones, and adapters do what their weights do."""

import pytest
import torch
from models.test_changed_modules import LoRA, called, hooked, overridden, scaled
from torch import nn
from torch.nn.utils import parametrize

from fairseq_adaptive.modules import LayerStack, RelativeAttention, recording
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from fairseq_adaptive.modules.layers.attention import FastAttention

ENCODER = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_layers": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_positions": 20,
}
DECODER = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2, "dropout": 0.0}
FAMILIES = {
    "albert_act": ("albert_act_tiny", {**ENCODER, "encoder_input_dim": 8, "attention_dropout": 0.0}),
    "transkimmer": ("transkimmer_base", ENCODER),
    "adatape": (
        "adatape",
        {
            **ENCODER,
            "halting": "act",
            "halting_kv": "active",
            "tape_tokens": 4,
            "tape_threshold": 2.0,
            "tape_bank_size": 40,
            "tape_ffn_embed_dim": 24,
        },
    ),
    "language_model": (
        "shared_transformer_lm_base",
        {
            **DECODER,
            "decoder_layers": 4,
            "decoder_unique_layers": 2,
            "decoder_input_dim": 16,
            "decoder_output_dim": 16,
            "halting": "ut_act",
            "router": "mixture_of_depths",
        },
    ),
    "transformer_xl": (
        "par_transformer_xl",
        {**DECODER, "layout": "af*3", "decoder_unique_layers": 2, "halting": "act", "memory_length": 6},
    ),
}


class ScaledRelativeAttention(RelativeAttention):
    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs))


class Other(nn.Module):
    def forward(self, weight):
        return 1.4 * weight


def make(build, family):
    arch, flags = FAMILIES[family]
    model = build(arch, seed=1, **flags)
    torch.manual_seed(4)
    stack = stack_of(model)
    for name, parameter in stack.named_parameters():
        if "router" in name or "halting" in name:
            nn.init.normal_(parameter, std=0.4)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if stack.halting is not None:
        nn.init.constant_(stack.halting.unit.bias, -1.0)
    return model.double().eval()


def stack_of(model):
    return next(each for each in model.modules() if isinstance(each, LayerStack))


def attention_of(stack):
    return getattr(stack.layer(0), stack.attention)


def projection(stack, kind):
    owner = attention_of(stack)
    return owner, kind if hasattr(owner, kind) else "qkv_proj"


def adapt(owner, name, by=1.0):
    setattr(owner, name, LoRA(getattr(owner, name)))
    getattr(owner, name).up.weight.data *= by


def subclass_attention(stack):
    made = {
        FastAttention: type(
            "Scaled",
            (FastAttention,),
            {"forward": lambda self, *args, **kwargs: scaled(FastAttention.forward(self, *args, **kwargs))},
        ),
        RelativeAttention: ScaledRelativeAttention,
    }
    attention = attention_of(stack)
    base = type(attention)
    attention.__class__ = made.get(base) or type(
        "Scaled", (base,), {"forward": lambda self, *args, **kwargs: scaled(base.forward(self, *args, **kwargs))}
    )


def fed(stack):
    return next(layer for layer in map(stack.layer, range(stack.unique_layers)) if hasattr(layer, "fc1"))


CHANGES = {
    "lora-q": lambda stack: adapt(*projection(stack, "q_proj")),
    "lora-k": lambda stack: adapt(*projection(stack, "k_proj")),
    "lora-out": lambda stack: adapt(attention_of(stack), "out_proj"),
    "lora-fc1": lambda stack: adapt(fed(stack), "fc1"),
    "lora-unit": lambda stack: adapt(stack.halting, "unit"),
    "lora-router": lambda stack: (
        adapt(stack.router[0], "1", 20.0)
        if isinstance(stack.router[0], nn.Sequential)
        else (stack.router.__setitem__(0, LoRA(stack.router[0])))
    ),
    "hook-layer": lambda stack: hooked(stack.layer(0)),
    "hook-attention": lambda stack: hooked(attention_of(stack)),
    "hook-fc1": lambda stack: hooked(fed(stack).fc1),
    "subclass-attention": subclass_attention,
    "override-attention": lambda stack: overridden(attention_of(stack)),
    "parametrization-out": lambda stack: parametrize.register_parametrization(
        attention_of(stack).out_proj, "weight", Other()
    ),
}
CASES = [
    (family, change)
    for family in FAMILIES
    for change in CHANGES
    if (change != "lora-unit" or family != "transkimmer")
    and (change != "lora-router" or family in ("transkimmer", "language_model"))
]
cases = pytest.mark.parametrize("family, change", CASES)


@pytest.fixture
def tokens():
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, 12))
    tokens[1, 7:] = tokens[2, 4:] = 1
    return tokens


def run(model, tokens, packed):
    """Features of all tokens, one after the other, and how often each was computed; a Transformer-XL reads two segments."""
    stack_of(model).packed = packed
    with torch.no_grad(), recording(stack_of(model)) as traces:
        if hasattr(stack_of(model), "memory") or type(stack_of(model)).__name__ == "SegmentStack":
            memory = SegmentMemory()
            outs = [model.decoder(part, memory=memory, features_only=True)[0] for part in tokens.split(6, 1)]
            out = torch.cat(outs, 1)
        else:
            out = model(tokens, features_only=True)[0]
    return out[:, : tokens.size(1)][tokens != 1], [trace.updates for trace in traces[""]]


@cases
def test_a_packed_run_is_the_dense_one(build, tokens, family, change):
    model = make(build, family)
    plain, _ = run(model, tokens, True)
    torch.manual_seed(9)
    CHANGES[change](stack_of(model))
    called.clear()
    dense, first = run(model, tokens, False)
    assert bool(called) == change.startswith("hook")
    called.clear()
    packed, second = run(model, tokens, True)
    assert bool(called) == change.startswith("hook")
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    assert (plain - packed).abs().max() > 1e-5


@pytest.mark.parametrize("family, change", [case for case in CASES if case[1].startswith("lora")])
def test_an_adapter_does_what_its_weights_do(build, tokens, family, change):
    model = make(build, family)
    torch.manual_seed(9)
    CHANGES[change](stack_of(model))
    changed, _ = run(model, tokens, True)
    for parent in [each for each in model.modules() if any(isinstance(child, LoRA) for child in each.children())]:
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRA):
                parent._modules[name] = child.merged()
    merged, _ = run(model, tokens, True)
    torch.testing.assert_close(changed, merged, rtol=0, atol=1e-6)
