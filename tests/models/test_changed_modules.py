"""A change that a user makes to a model is seen: adapters, hooks, subclasses, parametrizations, overridden methods.

Fast paths read weights and call nothing; they must not be taken where a module does something else. Searches find what
fairseq's generator finds on the same model, packed runs what dense runs do, and hooks are called.
"""

import copy
import logging

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import nn
from torch.nn.utils import parametrize

from fairseq_adaptive.models.shared_stack import SharedTransformerDecoder
from fairseq_adaptive.modules import DecoderLayer, EncoderLayer, LayerStack, recording
from fairseq_adaptive.modules.layers.attention import FastAttention
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear
from fairseq_adaptive.modules.policies import LearnedHalting

from searches import TINY, UNIQUE, assert_same, lively, search


class LoRA(nn.Module):
    """An adapter in the place of a linear map, which shows that map's weight, as PEFT's does."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.to(base.weight)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        self.base.weight.data += self.up.weight.data @ self.down.weight.data
        return self.base


def scaled(out, by=1.2):
    return (out[0] * by, *out[1:]) if isinstance(out, tuple) else out * by


class ScaledDecoderLayer(DecoderLayer):
    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs))


class ScaledEncoderLayer(EncoderLayer):
    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs))


class ScaledFastAttention(FastAttention):
    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs))


class ScaledNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.2


class RMSNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.scale = nn.Parameter(norm.weight.detach() * 1.1)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale


class Doubled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


SUBCLASSES = {
    DecoderLayer: ScaledDecoderLayer,
    EncoderLayer: ScaledEncoderLayer,
    FastAttention: ScaledFastAttention,
    nn.LayerNorm: ScaledNorm,
}
PARTS = (
    "",
    "self_attn",
    "encoder_attn",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "encoder_attn.v_proj",
    "self_attn_layer_norm",
    "final_layer_norm",
    "fc1",
    "fc2",
    "dropout_module",
)


def replaced(parent, path, make):
    owner = parent.get_submodule(path.rpartition(".")[0])
    setattr(owner, path.rpartition(".")[2], make(parent.get_submodule(path)))


def subclassed(module):
    module.__class__ = SUBCLASSES[type(module)]


def hooked(module):
    module.register_forward_hook(lambda module, args, out: (called.append(module), scaled(out))[1])


def prehooked(module):
    module.register_forward_pre_hook(lambda module, args: (called.append(module), (args[0] * 1.2, *args[1:]))[1])


def overridden(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))


called = []  # modules whose hooks were called
# name: (what it changes of a layer, how)
CHANGES = {
    **{
        f"lora-{path}": (path, lambda layer, path: replaced(layer, path, LoRA))
        for path in ("self_attn.q_proj", "self_attn.out_proj", "encoder_attn.v_proj", "fc1")
    },
    **{f"hook-{path or 'layer'}": (path, lambda layer, path: hooked(layer.get_submodule(path))) for path in PARTS},
    "prehook-self_attn": ("self_attn", lambda layer, path: prehooked(layer.self_attn)),
    **{
        f"subclass-{path or 'layer'}": (path, lambda layer, path: subclassed(layer.get_submodule(path)))
        for path in ("", "self_attn", "encoder_attn", "final_layer_norm")
    },
    "rmsnorm": ("self_attn_layer_norm", lambda layer, path: replaced(layer, path, RMSNorm)),
    "override-layer": ("", lambda layer, path: overridden(layer)),
    "override-self_attn": ("self_attn", lambda layer, path: overridden(layer.self_attn)),
    **{
        f"parametrization-{path}": (
            path,
            lambda layer, path: parametrize.register_parametrization(layer.get_submodule(path), "weight", Doubled()),
        )
        for path in ("fc1", "self_attn.out_proj", "self_attn.k_proj")
    },
}


def change_model(model, name):
    """Change the first layer of each stack that has the part; return how many were changed."""
    path, how = CHANGES[name]
    count = 0
    torch.manual_seed(9)
    for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
        layer = stack.layer(0)
        owner = layer
        for part in filter(None, path.split(".")):
            owner = getattr(owner, part, None)
        if owner is None:
            continue
        if path == "" and name.startswith(("subclass", "override", "hook")) or owner is not None:
            how(layer, path)
            count += 1
    called.clear()
    return count


FAMILIES = {
    "shared": {},
    "act": {"halting": "act", "halting_threshold": 0.9},
    "act-active": {"halting": "ut_act", "halting_threshold": 0.9, "halting_kv": "active"},
    "skimming": {"router": "skimming"},
    "depths-act": {"router": "mixture_of_depths", "halting": "act", "halting_threshold": 0.9, "router_kv": "recompute"},
}


def make(build, family, **flags):
    model = lively(build("shared_transformer", seed=1, **{**TINY, **UNIQUE, **FAMILIES[family], **flags}))
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, LearnedHalting):
            nn.init.normal_(module.unit.weight, std=0.4), nn.init.constant_(module.unit.bias, -1.0)
    for stack in (model.encoder.layers, model.decoder.layers):
        for each in stack.router or ():
            if family == "skimming":
                nn.init.normal_(each[1].weight), nn.init.normal_(each[4].weight)
                each[4].bias.data.copy_(torch.tensor([-1.0, 1.0]))
            else:
                nn.init.normal_(each.weight, std=0.4), nn.init.constant_(each.bias, 0.1)
        for layer in stack.children():
            if isinstance(layer, DecoderLayer):
                layer.need_attn = False
    return model


def scores(found):
    return torch.stack([each["score"] for each in sum(found, [])])


OPTIONS = {"max_len_b": 8, "beam": 3}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_search_finds_what_fairseq_finds(build, batch, dictionary, family, name):
    model = make(build, family)
    before = scores(search([model], dictionary, batch, fast=True, **OPTIONS))
    assert change_model(model, name)
    theirs = search([model], dictionary, batch, SequenceGenerator, **OPTIONS)
    theirs_called = len(called)
    called.clear()
    ours = search([model], dictionary, batch, fast=True, **OPTIONS)
    assert_same(ours, theirs)
    assert len(called) == theirs_called or family != "shared"
    assert bool(called) == ("hook" in name)
    after = scores(ours)
    assert name == "hook-dropout_module" or len(after) != len(before) or (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "shared"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_packed_run_is_the_dense_one(build, batch, family, name):
    model = make(build, family)
    plain = model(**batch)[0]
    assert change_model(model, name)
    real, outs, updates = batch["prev_output_tokens"] != 1, [], []
    for packed in (False, True):
        for stack in (model.encoder.layers, model.decoder.layers):
            stack.packed = packed
        called.clear()
        with torch.no_grad(), recording(model) as traces:
            outs.append(model(**batch)[0])
        updates.append([trace.updates for trace in sum(traces.values(), [])])
        assert bool(called) == ("hook" in name)
    torch.testing.assert_close(outs[1][real], outs[0][real], rtol=0, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(*updates))
    assert (outs[0] - plain)[real].abs().max() > 1e-4
    # a sentence has what it has alone
    alone = model(batch["src_tokens"][2:, -4:], batch["src_lengths"][2:], batch["prev_output_tokens"][2:, :3])[0]
    torch.testing.assert_close(outs[1][2:, :3], alone.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", [name[5:] for name in CHANGES if name.startswith("lora")])
def test_an_adapter_does_what_its_weights_do(build, batch, dictionary, family, path):
    """Against the same model whose adapters were merged into the weights: that takes every fast path."""
    model = make(build, family)
    change_model(model, f"lora-{path}")
    with torch.no_grad():
        ours, found = model(**batch)[0], search([model], dictionary, batch, fast=True, **OPTIONS)
        for parent in [each for each in model.modules() if any(isinstance(child, LoRA) for child in each.children())]:
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRA):
                    setattr(parent, name, child.merged())
        merged = model(**batch)[0]
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(ours[real], merged[real], rtol=0, atol=1e-6)
    assert_same(found, search([model], dictionary, batch, fast=True, **OPTIONS))


@pytest.mark.parametrize("family", ("act-active", "skimming"))
@pytest.mark.parametrize("part", ("self_attn", "encoder_attn"))
def test_attention_that_scales_is_its_scaled_output_map(build, batch, family, part):
    """What is hidden is hidden from attention that is called, too: encoder, decoder, and in training mode."""
    model, merged = make(build, family), make(build, family)
    change_model(model, f"hook-{part}")
    for stack in (merged.encoder.layers, merged.decoder.layers):
        if getattr(stack.layer(0), part, None) is not None:
            for each in getattr(stack.layer(0), part).out_proj.parameters():
                each.data *= 1.2
    real = batch["prev_output_tokens"] != 1
    for train in (False, True):
        outs = []
        for each in (model, merged):
            torch.manual_seed(2)
            for module in each.modules():
                if isinstance(module, LayerStack):
                    module.packed = not train
            with torch.set_grad_enabled(train):
                outs.append(each(**batch)[0])
        torch.testing.assert_close(outs[0][real], outs[1][real], rtol=0, atol=1e-6)
    model(**batch)[0][real].sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("method", ("extract_features_scriptable", "extract_features", "output_layer"))
@pytest.mark.parametrize("how", ("subclass", "instance"))
def test_an_overridden_decoder(build, batch, dictionary, method, how):
    model = make(build, "shared")
    before = scores(search([model], dictionary, batch, **OPTIONS))
    stock = getattr(SharedTransformerDecoder, method)

    def changed(self, *args, **kwargs):
        return scaled(stock(self, *args, **kwargs))

    if how == "subclass":
        model.decoder.__class__ = type("Other", (SharedTransformerDecoder,), {method: changed})
    else:
        setattr(model.decoder, method, changed.__get__(model.decoder))
    theirs = search([model], dictionary, batch, SequenceGenerator, **OPTIONS)
    assert_same(search([model], dictionary, batch, fast=True, **OPTIONS), theirs)
    assert len(scores(theirs)) != len(before) or (scores(theirs) - before).abs().max() > 1e-4
    assert model.decoder.begin_search(3) is None


def test_a_global_hook_is_called(build, batch, dictionary):
    model = make(build, "shared")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        theirs = search([model], dictionary, batch, SequenceGenerator, **OPTIONS)
        expected = len(seen)
        seen.clear()
        assert_same(search([model], dictionary, batch, **OPTIONS), theirs)
    finally:
        handle.remove()
    assert len(seen) == expected and FastAttention in seen
    assert model.decoder.begin_search(3)


@pytest.mark.parametrize("fast", (False, True))
def test_quantize_dynamic_quantizes_every_map(build, batch, dictionary, fast):
    model = make(build, "shared").float()
    if fast:
        model.make_generation_fast_(need_attn=False)
        assert any(type(each) is PrepackedLinear for each in model.modules())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(each, nn.Linear) for each in quantized.modules())
    theirs = search([quantized], dictionary, batch, SequenceGenerator, **OPTIONS)
    assert_same(search([quantized], dictionary, batch, **OPTIONS), theirs)
    assert (scores(theirs) - scores(search([model], dictionary, batch, **OPTIONS))).abs().max() > 1e-5


def test_checkpointed_layers_take_the_fast_path(build):
    assert make(build, "shared", checkpoint_activations=True).decoder.begin_search(3)


def test_the_log_says_why_once(build, batch, dictionary, caplog):
    say_once.cache_clear()
    model = make(build, "act")
    change_model(model, "subclass-self_attn")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            search([model], dictionary, batch, **OPTIONS)
    lines = [record.getMessage() for record in caplog.records if "plain path" in record.getMessage()]
    assert sorted(lines) == [
        "beam search: the plain path is taken, since ScaledFastAttention is none of the known classes",
        "packed runs: the plain path is taken, since ScaledFastAttention is none of the known classes",
    ]


def test_a_copy_is_as_it_was(build, batch):
    model = make(build, "shared")
    model.make_generation_fast_(need_attn=False)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**batch)[0], model(**batch)[0], rtol=0, atol=1e-12)
    assert {name for name, _ in copied.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_counting_flops_changes_nothing(build, batch):
    """torch's counter hooks into every module to know where it is: what it counts is the packed run."""
    from torch.utils.flop_counter import FlopCounterMode

    model, counts = make(build, "act-active"), []
    for packed in (False, True):
        model.encoder.layers.packed = model.decoder.layers.packed = packed
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch)
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.95 * counts[0]
    with FlopCounterMode(display=False):
        assert model.decoder.layers.changed is None
