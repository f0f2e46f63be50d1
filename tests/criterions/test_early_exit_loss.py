"""The loss of all depths is what a plain loop over depths says, with its gradients, and never has logits of several."""

import math

import pytest
import torch
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.early_exit_loss import EarlyExitLoss, EarlyExitLossConfig
from fairseq_adaptive.criterions.exit_weights import exit_depths, exit_weights
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.stack.layer_dropout import dropout_rates

WIDTHS = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 4}
DECODER = {f"decoder_{name}": value for name, value in WIDTHS.items()}
CUTOFFS = {"adaptive_softmax_cutoff": "10,20"}
MODELS = {
    "shared_transformer": {**DECODER, **{f"encoder_{name}": value for name, value in WIDTHS.items()}, "dropout": 0.0},
    "shared_transformer_lm": {**DECODER, "decoder_input_dim": 16, "decoder_output_dim": 16, "dropout": 0.0},
    "par_transformer_xl": {
        "layout": "af*2",
        "memory_length": 0,
        "dropout": 0.0,
        **{name: value for name, value in DECODER.items() if name != "decoder_layers"},
    },
}


class Task:
    def __init__(self, dictionary):
        self.target_dictionary = self.source_dictionary = dictionary
        self.state = StatefulContainer()


@pytest.fixture
def samples(batch, dictionary):
    target = batch["prev_output_tokens"].roll(-1, 1)
    target[:, -1] = dictionary.pad()
    whole = {"net_input": batch, "target": target, "ntokens": int(target.ne(dictionary.pad()).sum())}
    net_input = {"src_tokens": batch["prev_output_tokens"], "src_lengths": None}
    return lambda family: whole if family == "shared_transformer" else {**whole, "net_input": net_input}


def criterion(dictionary, **flags):
    given = {**vars(EarlyExitLossConfig()), **flags}
    cfg = OmegaConf.create({"criterion": given, "optimization": {"sentence_avg": False}})
    return EarlyExitLoss.build_criterion(cfg.criterion, Task(dictionary))


def naive(model, sample, weights, smoothing):
    """Sum over depths of weight x label-smoothed cross-entropy, from states that hooks have seen, in float64."""
    decoder, states = model.decoder, []
    stack = getattr(decoder, "layers", None) or decoder.blocks

    def see(module, given, out):
        states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(see) for layer in {id(each): each for each in stack}.values()]
    model(**sample["net_input"])
    for each in hooks:
        each.remove()
    target, total = sample["target"], 0.0
    there = target.ne(1)
    for weight, state in zip(weights, states):
        state = state if hasattr(decoder, "blocks") else state.transpose(0, 1)
        state = state if decoder.layer_norm is None else decoder.layer_norm(state)
        if decoder.adaptive_softmax is None:
            lprobs = torch.nn.functional.linear(state, decoder.output_projection.weight).log_softmax(-1)
        else:
            lprobs = model.get_normalized_probs((state, None), log_probs=True)
        chosen = lprobs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        others = (lprobs.sum(-1) - chosen) * smoothing / (lprobs.size(-1) - 1)
        total = total - weight * ((1 - smoothing) * chosen + others)[there].sum()
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


CASES = [
    ("shared_transformer", {}, "label_smoothed_cross_entropy", 0.1),
    ("shared_transformer", {}, "fused_label_smoothed_cross_entropy", 0.1),
    ("shared_transformer_lm", {}, "fused_label_smoothed_cross_entropy", 0.0),
    ("shared_transformer_lm", CUTOFFS, "adaptive_cross_entropy", 0.0),
    ("par_transformer_xl", {}, "fused_label_smoothed_cross_entropy", 0.1),
    ("par_transformer_xl", {**CUTOFFS, "decoder_normalize_before": True}, "adaptive_cross_entropy", 0.0),
]


@pytest.mark.parametrize("family, flags, inner, smoothing", CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_equals_a_loop_over_depths(build, dictionary, samples, family, flags, inner, smoothing):
    model, sample = build(family, **MODELS[family], **flags).train(), samples(family)
    mine = criterion(
        dictionary, task_criterion=inner, label_smoothing=smoothing or None, exit_weights="sqrt", exit_scale=0.5
    )
    mine.check_model(model)
    loss, size, log = mine.train()(model, sample)
    weights = [0.5 * math.sqrt(depth + 1) for depth in range(3)] + [2.0]
    weights = [each / sum(weights) for each in weights]
    expected = naive(model, sample, weights, smoothing)
    in_float32 = inner == "label_smoothed_cross_entropy"  # fairseq's log-probabilities
    near = {"rtol": 1e-6 if in_float32 else 1e-10, "atol": 0, "check_dtype": False}
    torch.testing.assert_close(loss, expected, **near)
    assert size == sample["ntokens"]
    torch.testing.assert_close(log["exit_loss"], expected.detach(), **near)
    ours, theirs = gradients(model, loss), gradients(model, naive(model, sample, weights, smoothing))
    assert ours.keys() == theirs.keys()
    for name, each in ours.items():
        atol = 1e-6 if in_float32 else 1e-7
        torch.testing.assert_close(each, theirs[name], rtol=1e-6, atol=atol, msg=lambda said: f"{name}: {said}")


def test_evaluation_has_the_loss_of_the_task_and_that_of_each_depth(build, dictionary, samples):
    model, sample = build("shared_transformer", **MODELS["shared_transformer"]).eval(), samples("shared_transformer")
    mine = criterion(dictionary, exit_curriculum="rotational").eval()
    with torch.no_grad():
        loss, _, log = mine(model, sample)
        assert torch.equal(loss, mine.task_criterion(model, sample)[0])
        for depth in range(3):
            weights = [float(depth == each) for each in range(4)]
            torch.testing.assert_close(
                log[f"exit_loss_{depth + 1}"], naive(model, sample, weights, 0.0), rtol=1e-6, atol=0, check_dtype=False
            )


@pytest.mark.parametrize("family", ("shared_transformer_lm", "par_transformer_xl"))
def test_no_logits_are_kept(build, dictionary, samples, family):
    """Of what the backward pass reads, nothing has a score of each token for each word."""
    model, sample, widths = build(family, dtype=torch.float32, **MODELS[family]).train(), samples(family), []
    mine = criterion(dictionary, task_criterion="fused_label_smoothed_cross_entropy").train()
    tokens, words = (sample["target"].numel(), sample["ntokens"]), len(dictionary)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: (widths.append(each.shape), each)[1], lambda each: each):
        mine(model, sample)
    assert widths and not any(shape[-1:] == (words,) and shape[:-1].numel() in tokens for shape in widths)


def test_a_depth_that_is_left_out_gives_the_states_before_it(build, dictionary, samples):
    model = build("shared_transformer", **MODELS["shared_transformer"], decoder_layerdrop=0.2).train()
    model.decoder.layers.layerdrop = 0.999999
    mine, log = criterion(dictionary, exit_weights="uniform").train(), {}
    loss, _, log = mine(model, samples("shared_transformer"))
    torch.testing.assert_close(loss, log["loss"], rtol=1e-6, atol=0, check_dtype=False)  # all depths say the same


def test_weights():
    depths = [0, 1, 2, 3]
    assert exit_weights("uniform", depths, 3) == [0.25] * 4
    assert exit_weights("linear", depths, 3) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert exit_weights("cumulative", depths, 3) == pytest.approx([0.05, 0.15, 0.3, 0.5])
    assert exit_weights("cumulative", depths, 3, 0.0) == [0, 0, 0, 1]
    roots = [math.sqrt(each) for each in (1, 2, 3, 4)]
    assert exit_weights("sqrt", depths, 3) == pytest.approx([each / sum(roots) for each in roots])


def test_curricula():
    for update in range(10):
        assert exit_depths("none", 5, update) == [0, 1, 2, 3, 4]
    seen = [exit_depths("rotational", 8, update, every=4) for update in range(4)]
    assert seen == [[0, 4, 7], [1, 5, 7], [2, 6, 7], [3, 7]]
    first = [exit_depths("gradual", 4, update, updates=100)[0] for update in range(0, 120, 5)]
    assert first[0] == 3 and first == sorted(first, reverse=True) and first[15:] == [0] * 9


def test_a_gradual_curriculum_takes_half_of_the_training(build, dictionary):
    model = build("shared_transformer", **MODELS["shared_transformer"])
    mine = criterion(dictionary, exit_curriculum="gradual")
    mine.prepare_targets(80)
    for update, first in ((0, 3), (10, 2), (30, 0), (79, 0)):
        model.set_num_updates(update)
        assert mine.depths(model.decoder.layers, True)[0][0] == first
        assert mine.depths(model.decoder.layers, False)[0][0] == 0
    with pytest.raises(UsageError, match="which has no end: add --max-update"):
        criterion(dictionary, exit_curriculum="gradual").prepare_targets(None)


def test_rates_of_layer_dropout():
    assert dropout_rates(0.3, 4).tolist() == pytest.approx([0.3] * 4)
    expected = [0.3 * (2 ** (depth / 3) - 1) for depth in range(4)]
    assert dropout_rates(0.3, 4, "exponential").tolist() == pytest.approx(expected)
    half = dropout_rates(0.3, 4, "exponential", 100, 50).tolist()
    assert half == pytest.approx([each * (math.sqrt(2) - 1) for each in expected])
    assert dropout_rates(0.3, 4, "uniform", 100, 0).tolist() == [0.0] * 4
    assert dropout_rates(0.3, 4, "uniform", 100, 100).tolist() == pytest.approx([0.3] * 4)


def test_depths_are_left_out_at_their_rates(build):
    flags = {"decoder_layerdrop": 0.5, "layerdrop_by_depth": "exponential", "layerdrop_warmup_updates": 10}
    stack = build("shared_transformer", **MODELS["shared_transformer"], **flags).train().decoder.layers
    assert list(stack.depths()) == [0, 1, 2, 3]
    stack.set_num_updates(10)
    torch.manual_seed(0)
    ran = [sum(depth in kept for kept in (list(stack.depths()) for _ in range(2000))) / 2000 for depth in range(4)]
    assert ran[0] == 1
    assert ran == pytest.approx([1 - 0.5 * (2 ** (depth / 3) - 1) for depth in range(4)], abs=0.04)


REFUSED = [
    ("shared_transformer", {"decoder_router": "skimming"}, "leave --router and --halting out"),
    ("shared_transformer", {"decoder_halting": "act"}, "leave --router and --halting out"),
    ("shared_transformer_lm", {"halting": "pondernet"}, "leave --router and --halting out"),
    ("transformer", {}, "needs a decoder whose depths"),
]


@pytest.mark.parametrize("family, flags, message", REFUSED, ids=[f"{c[0]}-{''.join(c[1])}" for c in REFUSED])
def test_models_without_such_depths_are_refused(build, dictionary, family, flags, message):
    model = build(family, **MODELS.get(family, MODELS["shared_transformer"]), **flags)
    with pytest.raises(UsageError, match=message):
        criterion(dictionary).check_model(model)


def test_exits_by_confidence_are_trained_as_all(build, dictionary, samples):
    model = build("shared_transformer", **MODELS["shared_transformer"], decoder_halting="margin").train()
    loss, _, log = criterion(dictionary).train()(model, samples("shared_transformer"))
    assert float(loss) == pytest.approx(float(log["exit_loss"])) and float(loss) != float(log["loss"])
