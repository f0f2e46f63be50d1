"""Small models and what the tests of compute losses compare."""

import argparse
import json

import torch
from fairseq.logging import metrics
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf
from torch import nn

from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss, AdaptiveComputeLossConfig
from fairseq_adaptive.modules.policies import Choice, Router, register_policy

HEAD = "sentence_classification_head"
ALBERT = {
    "encoder_input_dim": 8,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 64,
    "encoder_layers": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
BOTH = {"router": "skimming", "router_args": '{"noise": 0, "bias": 0}', "halting": "act"}
LM = {
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 4,
    "decoder_unique_layers": 2,
    "dropout": 0.0,
}
PAIRS = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "embed_dim": 16,
        "ffn_embed_dim": 32,
        "attention_heads": 2,
        "layers": 4,
        "unique_layers": 2,
    }.items()
}
TAPE = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "encoder_layers": 4,
    "encoder_unique_layers": 2,
    "tape_mlp_dim": 8,
    "tape_ffn_embed_dim": 8,
    "tape_tokens": 6,
    "tape_bank_size": 40,
    "max_positions": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pooler_dropout": 0.0,
}


@register_policy("test_gate")
class Gate(Router, nn.Module):
    """A user's own: leaves out tokens below a threshold, and asks a price that no one else knows."""

    monotone, weighs, weight = False, True, 2.0

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        p = self.score(x).squeeze(-1).sigmoid()
        return Choice((p >= 0.5).to(p), p)

    def combine(self, before, after, choice):
        return before + (choice.run * choice.probability).unsqueeze(-1).to(before) * (after - before)

    def price(self, trace, power: int = 2):
        return sum((step.keeping**power * trace.tokens).sum() for step in trace.steps) / trace.tokens.sum()

    def measures(self, trace):
        opened = sum((step.keeping.detach() * trace.tokens).sum() for step in trace.steps)
        return {"openness": (opened, trace.tokens.sum())}


def criterion_of(dictionary, state=None, **flags):
    task = argparse.Namespace(target_dictionary=dictionary, label_dictionary=dictionary, state=StatefulContainer())
    if state is not None:
        task.state.merge_state_dict(state)
    for name in ("prices", "target_args", "task_criterion_args"):
        if isinstance(flags.get(name), dict):
            flags[name] = json.dumps(flags[name])
    cfg = OmegaConf.create(
        {
            "common": {"tpu": False},
            "optimization": {"sentence_avg": False},
            "criterion": AdaptiveComputeLossConfig(**flags),
        }
    )
    return AdaptiveComputeLoss.build_criterion(cfg.criterion, task)


def stir(model):
    """Weights under which tokens stop, pass by and are left out at several depths."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "router" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.7)
        elif name.endswith("halting.unit.weight"):
            nn.init.normal_(parameter, std=0.4)
    return model.train()


def logged(criterion, *logs):
    with metrics.aggregate(new_root=True) as found:
        criterion.reduce_metrics(list(logs))
    return found.get_smoothed_values()


def taught(module):
    return all(each.grad is not None and each.grad.any() for each in module.parameters())


def agree(model, loss, by_hand):
    """In value and in every gradient."""
    torch.testing.assert_close(loss, by_hand, check_dtype=False)
    gradients = [
        torch.autograd.grad(each, list(model.parameters()), retain_graph=True, allow_unused=True)
        for each in (loss, by_hand)
    ]
    for name, found, expected in zip(dict(model.named_parameters()), *gradients):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def depth_price(trace):
    real = trace.tokens
    return (trace.updates[real] + trace.remainders[real]).mean()


def kept_price(trace):
    return sum(step.kept.sum() for step in trace.steps) / trace.limit / trace.tokens.sum()
