"""Every closed form of multiply-adds against torch's FlopCounterMode, on dense and packed runs of every family."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES, build_trainer, write_data
from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.policies import Counts
from fairseq_adaptive.modules.stack.compute import stack_macs

SKIM = ("--router", "skimming", "--router-args", '{"bias": 20, "noise": 0}')
MERGE = ("--router", "token_merging", "--router-args", '{"share": 0.3}')
TAPE = ("--reader", "tape", "--encoder-reader-args", '{"tokens": 6, "bank_size": 30, "mlp_dim": 16}')
CASES = {
    **{name: (name,) for name in FAMILIES},
    "translation-skimming": ("shared_transformer", *SKIM),
    "translation-skimming-recompute": ("shared_transformer", *SKIM, "--router-kv", "recompute"),
    "translation-depths": ("shared_transformer", "--router", "mixture_of_depths"),
    "translation-depths-all": ("shared_transformer", "--router", "mixture_of_depths", "--router-kv", "recompute"),
    "translation-act-unshared": (
        "shared_transformer",
        "--halting",
        "act",
        "--encoder-unique-layers",
        "4",
        "--decoder-unique-layers",
        "4",
    ),
    "translation-act-active": ("universal_transformer", "--halting-kv", "active"),
    "translation-act-keep": ("universal_transformer", "--halting-kv", "keep"),
    "translation-act-first": ("universal_transformer", "--halting-kv", "first"),
    "translation-tape": ("shared_transformer", *TAPE),
    "translation-tape-skimming-act": ("shared_transformer", *TAPE, *SKIM, "--encoder-halting", "act"),
    "translation-margin": ("shared_transformer", "--decoder-halting", "margin"),
    "translation-cross-self": ("shared_transformer", "--cross-self-attention", "--no-cross-attention"),
    "translation-lora": ("shared_transformer", "--depth-lora-rank", "3"),
    "translation-lora-act": ("universal_transformer", "--depth-lora-rank", "3"),
    "translation-lora-act-keep": ("universal_transformer", "--depth-lora-rank", "3", "--halting-kv", "keep"),
    "translation-lora-act-first": ("universal_transformer", "--depth-lora-rank", "3", "--halting-kv", "first"),
    "translation-lora-skimming-recompute": (
        "shared_transformer",
        "--depth-lora-rank",
        "3",
        *SKIM,
        "--router-kv",
        "recompute",
    ),
    "adatape-lora": (
        "adatape_vit",
        "--depth-lora-rank",
        "3",
        "--encoder-unique-layers",
        "1",
        "--tape-ffn-embed-dim",
        "16",
    ),
    "albert-lora": ("albert_act", "--depth-lora-rank", "3"),
    "lm-recursions": (
        "shared_transformer_lm",
        "--router",
        "mixture_of_recursions",
        "--router-args",
        '{"auxiliary": true}',
    ),
    "lm-recursions-first": ("shared_transformer_lm", "--router", "mixture_of_recursions", "--router-kv", "first"),
    "lm-token-choice": ("shared_transformer_lm", "--router", "token_choice"),
    "lm-predictor": ("shared_transformer_lm", "--router", "mixture_of_depths", "--router-args", '{"predictor": true}'),
    "transkimmer-act": ("transkimmer", "--halting", "act"),
    "albert-skimming": ("albert_act", *SKIM),
    "albert-merging-act": ("albert_act", *MERGE),
    "transkimmer-merging": ("transkimmer", *MERGE),
    "adatape-merging": ("adatape_vit", *MERGE, "--tape-layer", "1"),
    "xl-act": ("par_transformer_xl", "--halting", "act"),
    "xl-act-shared": (
        "par_transformer_xl",
        "--halting",
        "ut_act",
        "--decoder-unique-layers",
        "3",
        "--layer-sharing",
        "cycle",
    ),
    "supernet-paths": ("par_supernet", "--sample-paths"),
    "adatape-skimming-act": ("adatape_vit", "--halting", "act", *SKIM, "--tape-layer", "1"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("compute"))


def one_length(sample):
    """The first sentence: no padding, and no sentence that waits for another."""
    inputs = {}
    for name, each in sample["net_input"].items():
        each = each[:1] if isinstance(each, torch.Tensor) else each
        if name in ("src_tokens", "prev_output_tokens"):
            each = each[:, each[0] != 1]
        inputs[name] = each
    if "src_lengths" in inputs and "src_tokens" in inputs:
        inputs["src_lengths"] = torch.tensor([inputs["src_tokens"].size(1)])
    return inputs


def still(model):
    """Nobody halts or is left out."""
    for module in model.modules():
        if isinstance(module, LayerStack) and module.halting is not None:
            if hasattr(module.halting, "unit"):
                nn.init.zeros_(module.halting.unit.weight), nn.init.constant_(module.halting.unit.bias, -20)
            else:
                module.halting.threshold = 2.0


def stir(model):
    """Weights under which tokens stop, pass by and are left out at several depths."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "router" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.7)
        elif "router" in name and "skim" not in name:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("halting.unit.weight"):
            nn.init.normal_(parameter, std=0.4)
        elif name.endswith("halting.unit.bias"):
            nn.init.constant_(parameter, -1.5)
        elif name.endswith("reader.norm.weight"):
            nn.init.constant_(parameter, 2.0)
    for module in model.modules():
        if isinstance(module, LayerStack) and module.halting is not None and not hasattr(module.halting, "unit"):
            module.halting.threshold = 0.02


def counted(model, call):
    """Traces of a call, and the multiply-adds that torch counts within each stack."""
    with FlopCounterMode(display=False) as counter, recording(model) as traces:
        call()
    counts = counter.get_flop_counts()
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}
    return {
        name: (stack, traces[name][-1], sum(counts[f"{type(model).__name__}.{name}"].values()) / 2)
        for name, stack in stacks.items()
        if traces[name]
    }


def deciding(stack, trace):
    """What the policies of a dense run in which nobody halts cost: all tokens are asked at all depths."""
    return sum(
        float(policy.macs(Counts(float(count), 1, stack[depth].embed_dim, depth)))
        for depth, count in enumerate(trace.counts())
        for policy in (stack.router, stack.halting)
        if policy is not None
    )


def readers(model):
    return {each.name: each.reader for each in decisions(model)}


QUICK = {*FAMILIES, "translation-tape-skimming-act", "lm-recursions", "xl-act-shared", "transkimmer-merging"}


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_closed_forms_are_what_torch_counts(case, data):
    name, *flags = CASES[case]
    trainer, batches = build_trainer(name, data, "--max-update", "10", *flags)
    model, inputs = trainer.model.eval(), one_length(next(iter(batches)))
    for module in model.modules():
        module.need_attn = False  # weights of attention that somebody wants to see are computed beside it
    reading = readers(model)
    still(model)
    dense = counted(model, lambda: model(**inputs))  # gradients could be asked for: all tokens are computed
    for where, (stack, trace, measured) in dense.items():
        spent, alone = stack_macs(stack, trace, None, reading.get(where))
        if not stack.adaptive:
            assert float(spent) == pytest.approx(measured, rel=0.02), where
        elif trace.reading is None:
            assert float(alone) + deciding(stack, trace) == pytest.approx(measured, rel=0.02), where
    stir(model)
    with torch.no_grad():
        packed = counted(model, lambda: model(**inputs))
    for where, (stack, trace, measured) in packed.items():
        spent, least = stack_macs(stack, trace, None, reading.get(where))
        assert float(spent) == pytest.approx(measured, rel=0.02), where
