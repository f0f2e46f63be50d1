"""A tape whose tokens, and those of the text, halt or are skimmed on their own: runs agree, rows do not see each other,
criterions price both."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.ponder_loss import PonderLoss, PonderLossConfig
from fairseq_adaptive.criterions.skim_loss import SkimLoss, SkimLossConfig
from fairseq_adaptive.criterions.tape_ponder_loss import TapePonderLoss, TapePonderLossConfig
from fairseq_adaptive.models.adatape_parity import AdaTapeParity, AdaTapeParityConfig
from fairseq_adaptive.models.adatape_vit import AdaTapeViT, AdaTapeViTConfig
from fairseq_adaptive.modules import recording

HEAD = "sentence_classification_head"
SIZES = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "encoder_layers": 4,
    "encoder_unique_layers": 2,
    "tape_mlp_dim": 8,
    "tape_ffn_embed_dim": 8,
    "tape_tokens": 6,
}
STOPS = (
    {"halting": "act"},
    {"halting": "ut_act"},
    {"halting": "saturation", "halting_threshold": 0.8},
    {"skimming": True, "skim_bias": 0.0},
)
TAPE_PRICE = {"task_criterion": "tape_ponder_loss", "task_criterion_args": '{"ponder_penalty": 0.5}'}


def unsure(model, stack, tape):
    """Weights with which tokens stop at all depths and tapes have several lengths."""
    torch.manual_seed(7)
    for name, parameter in stack.named_parameters():
        if name == "halting.unit.weight":
            torch.nn.init.normal_(parameter, -0.2, 0.5)
        elif "router" in name and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    if tape is not None:
        torch.manual_seed(8)
        torch.nn.init.normal_(tape.reader.norm.weight, 1.2)
    return model.double().eval()


def parity(**flags):
    cfg = AdaTapeParityConfig(**{**SIZES, "tape_threshold": 3.0, **flags})
    torch.manual_seed(1)
    task = SimpleNamespace(cfg=SimpleNamespace(sequence_length=12))
    model = AdaTapeParity.build_model(OmegaConf.structured(cfg), task)
    torch.nn.init.normal_(model.output_projection.weight)
    return unsure(model, model.layers, model.tape)


def vit(**flags):
    sizes = {**SIZES, "patch_size": 4, "tape_bank_patch_size": 2, "tape_tokens": 5, "tape_layer": 0}
    cfg = AdaTapeViTConfig(**{**sizes, **flags})
    torch.manual_seed(1)
    task = SimpleNamespace(image_size=(8, 8), channels=1, classes=list("abc"))
    model = AdaTapeViT.build_model(OmegaConf.structured(cfg), task)
    torch.nn.init.normal_(model.output_projection.weight)
    return unsure(model, model.layers, model.tape)


@pytest.fixture
def text(build):
    def text(**flags):
        model = build("adatape", **{**SIZES, "tape_bank_size": 40, "max_positions": 32, **flags})
        torch.manual_seed(9)
        model.register_classification_head(HEAD, num_classes=3)
        encoder = model.encoder.sentence_encoder
        return unsure(model, encoder.layers, encoder.tape)

    return text


@pytest.fixture
def tokens(dictionary):
    torch.manual_seed(5)
    tokens = torch.randint(4, 44, (9, 7))
    tokens[:, 0] = dictionary.bos()
    for row in range(9):
        tokens[row, 3 + row % 5 :] = dictionary.pad()
    return tokens


def sample_of(tokens):
    return {"net_input": {"src_tokens": tokens}, "target": torch.arange(9) % 3, "ntokens": 40, "nsentences": 9}


def criterion_of(criterion, config, **flags):
    stock = {"common": {"tpu": False}, "optimization": {"sentence_avg": False}}
    cfg = OmegaConf.create({**stock, "criterion": config(**flags)})
    return criterion.build_criterion(cfg.criterion, SimpleNamespace(state=StatefulContainer()))


def trace_of(traces):
    (trace,) = (trace for each in traces.values() for trace in each)
    return trace


def check(model, inputs, rows, **kwargs):
    """Dense and packed runs agree, in results and decisions; and with what each row gives alone, ``rows[i]``."""
    with recording(model) as traces:
        dense, extra = model(inputs, **kwargs)
    expected = trace_of(traces)
    with torch.no_grad(), recording(model) as traces:
        packed, again = model(inputs, **kwargs)
    packed_trace = trace_of(traces)
    assert torch.allclose(packed, dense, atol=1e-12)
    lengths = extra["tape"].live.sum(1)
    assert lengths.unique().numel() > 1 and torch.equal(again["tape"].entries, extra["tape"].entries)
    for trace in expected, packed_trace:
        assert torch.equal(trace.updates, expected.updates)
        assert all(torch.equal(step.tape, lengths) for step in trace.steps) and torch.equal(trace.tape_len, lengths)
        assert not (trace.updates[:, -extra["tape"].live.size(1) :] * ~extra["tape"].live).any()
    updates = expected.updates[expected.tokens]
    assert updates.unique().numel() > 1, "tokens stop at different depths, else nothing is adaptive here"
    with torch.no_grad():
        for row, alone in enumerate(rows):
            assert torch.allclose(model(alone, **kwargs)[0][0], dense[row], atol=1e-12)
        single = model.float()
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        same = torch.isclose(single(inputs, **kwargs)[0].double(), dense, atol=1e-4).all(1)
        assert same.double().mean() > 0.85  # where a near tie falls otherwise, another token stops
    return expected


@pytest.mark.parametrize("flags", STOPS, ids=lambda flags: next(iter(flags.values())))
def test_text(text, tokens, dictionary, flags):
    rows = [row[row.ne(dictionary.pad())].unsqueeze(0) for row in tokens]
    check(text(**flags), tokens, rows, classification_head_name=HEAD)


@pytest.mark.parametrize("flags", STOPS, ids=lambda flags: next(iter(flags.values())))
def test_parity(flags):
    torch.manual_seed(3)
    elements = torch.randint(0, 3, (40, 12))
    check(parity(**flags), elements, elements[:10].split(1))


@pytest.mark.parametrize("read_out", ("mean", "class"))
@pytest.mark.parametrize("flags", STOPS[::3], ids=("act", "skimming"))
def test_images(flags, read_out):
    torch.manual_seed(3)
    images = torch.rand(12, 1, 8, 8, dtype=torch.float64) * 2 - 1
    trace = check(vit(**flags, read_out=read_out), images, images[:4].split(1))
    assert trace.tokens.size(1) == trace.tape_len.max() + 4 + (read_out == "class")
    assert not flags.get("skimming") or (trace.updates[:, 0] == 4).all()


def test_halting_equals_a_loop_over_depths():
    """Of one sequence at a time: ACT's sums by hand over states and tape."""
    model = parity(halting="act", halting_threshold=0.9)
    torch.manual_seed(3)
    for elements in torch.randint(0, 3, (6, 12)).split(1):
        one_hot = torch.nn.functional.one_hot(elements, 3).double()
        x, mask, reading = model.tape(model.embedding(one_hot.flatten(1)).unsqueeze(0), None, model.bank(one_hot))
        length, unit = len(x), model.layers.halting.unit
        total, updates = torch.zeros(length).double(), torch.zeros(length)
        running = torch.ones(length, dtype=torch.bool)
        for depth in range(4):
            after = model.layers[depth](x, tape_len=length - 1)
            p = unit(after)[:, 0, 0].sigmoid()
            for place in range(length):
                if running[place]:
                    stops = total[place] + p[place] > 0.9
                    weight = 1 - total[place] if stops else p[place]
                    x[place] = weight * after[place] + (1 - weight) * x[place]
                    total[place], running[place] = total[place] + weight, not stops
                    updates[place] += 1
        logits = model.output_projection(model.layer_norm(x)[:, 0].mean(0))
        with recording(model) as traces:
            assert torch.allclose(model(elements)[0][0], logits, atol=1e-12)
        assert traces["layers"][0].updates[0].tolist() == updates.tolist()


@pytest.mark.parametrize("flags", STOPS[::3], ids=("act", "skimming"))
def test_inference_computes_running_tokens_only(flags):
    model = parity(**flags)
    torch.manual_seed(3)
    elements, seen = torch.randint(0, 3, (40, 12)), []
    for layer in (model.layers[0], model.layers[1]):
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad(), recording(model) as traces:
        model(elements)
    assert sum(seen) == traces["layers"][0].updates.sum() < 4 * (40 + traces["layers"][0].tape_len.sum())


@pytest.mark.parametrize("flags", ({}, {"tape_layer": 2, "encoder_layerdrop": 0.5}), ids=("plain", "later"))
def test_without_halting_the_trace_tells_the_layers_and_the_tape(text, tokens, dictionary, flags):
    model = text(**flags)
    for train in (False, True) if flags else (False,):
        model.train(train)
        with recording(model) as traces:
            _, extra = model(tokens, features_only=True)
        trace, lengths = trace_of(traces), extra["tape"].live.sum(1)
        assert train or [step.layer for step in trace.steps] == [0, 1, 0, 1]
        before = sum(not step.tape.any() for step in trace.steps)  # LayerDrop leaves some of them out
        assert before <= flags.get("tape_layer", 0) and (train or before == flags.get("tape_layer", 0))
        for step in trace.steps[before:]:
            assert torch.equal(step.tape, lengths)
            assert torch.equal(step.alive.sum(1), tokens.ne(dictionary.pad()).sum(1) + lengths)
        for step in trace.steps[:before]:
            assert not step.tape.any() and torch.equal(step.alive.sum(1), tokens.ne(dictionary.pad()).sum(1))


def test_ponder_loss_prices_depth_and_tape(text, tokens):
    model = text(halting="act", dropout=0.0, attention_dropout=0.0, pooler_dropout=0.0).train()
    flags = {**TAPE_PRICE, "time_penalty": 0.3}
    loss, size, log = criterion_of(PonderLoss, PonderLossConfig, **flags)(model, sample_of(tokens))
    with recording(model) as traces:
        logits, extra = model(tokens, classification_head_name=HEAD)
    trace = trace_of(traces)
    task_loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(9) % 3, reduction="sum")
    lengths = extra["tape"].live.sum(1)
    price = 0.3 * trace.ponder_cost() / trace.tokens.sum() * 9
    torch.testing.assert_close(loss, task_loss + 0.5 * extra["tape"].cost.sum() + price)
    assert log["ponder_tokens"] == trace.tokens.sum() == tokens.ne(1).sum() + lengths.sum()
    assert log["tape_tokens"] == lengths.sum() and log["ponder_depth"] == trace.updates.sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        if "lm_head" not in name:
            assert parameter.grad is not None and (parameter.grad.any() or name.endswith("k_proj.bias")), name


def test_skim_loss_prices_kept_tokens_and_tape(text, tokens):
    model = text(**STOPS[-1], dropout=0.0, attention_dropout=0.0, pooler_dropout=0.0).train()
    flags = {**TAPE_PRICE, "skim_factor": 0.7}
    criterion = criterion_of(SkimLoss, SkimLossConfig, **flags)
    torch.manual_seed(0)  # at every depth a token is kept that is not protected
    loss, _, log = criterion(model, sample_of(tokens))
    torch.manual_seed(0)
    with recording(model) as traces:
        plain, _, _ = TapePonderLoss(TapePonderLossConfig(ponder_penalty=0.5), None)(model, sample_of(tokens))
    trace = trace_of(traces)
    kept = sum(step.kept.sum() for step in trace.steps) / 4 / trace.tokens.sum()
    torch.testing.assert_close(loss, plain + 0.7 * kept * 9)
    assert log["tape_tokens"] == trace.tape_len.sum()
    loss.backward()
    assert all(predictor[4].weight.grad.any() for predictor in model.encoder.sentence_encoder.layers.router)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_pondernet_weighs_the_loss_by_the_depths_of_the_first_token(text, tokens, smoothing):
    model = text(halting="pondernet", dropout=0.0, attention_dropout=0.0, pooler_dropout=0.0).train()
    args = f'{{"ponder_penalty": 0.5, "label_smoothing": {smoothing}}}'
    flags = {"task_criterion": "tape_ponder_loss", "task_criterion_args": args, "kl_weight": 0.0}
    loss, size, log = criterion_of(PonderLoss, PonderLossConfig, **flags)(model, sample_of(tokens))
    stack = model.encoder.sentence_encoder.layers
    stack.every_depth = True
    with recording(model) as traces:
        logits, extra = model(tokens, classification_head_name=HEAD)
    weights = trace_of(traces).distribution[:, :, 0]  # depths x B
    losses = torch.nn.functional.cross_entropy(
        logits, (torch.arange(9) % 3).repeat(4), reduction="none", label_smoothing=smoothing
    ).view(4, 9)
    expected = (weights * losses).sum() + 0.5 * extra["tape"].cost.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert size == 9 and log["tape_tokens"] == extra["tape"].live.sum()


@pytest.mark.parametrize("flags", ({"halting": "act"}, STOPS[-1]), ids=("act", "skimming"))
def test_bfloat16_autocast_keeps_prices_in_single_precision(text, tokens, flags):
    """As --bf16 runs on a CPU. Where a near tie falls otherwise, other entries are read: not all rows are close."""
    model = text(**flags, dropout=0.0, attention_dropout=0.0, pooler_dropout=0.0).float().train()
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), recording(model) as traces:
            logits, extra = model(tokens, classification_head_name=HEAD)
        trace = trace_of(traces)
        outputs.append(logits.float())
    assert logits.dtype == torch.bfloat16 and not torch.equal(*outputs)
    assert ((outputs[0] - outputs[1]).abs().amax(1) < 0.1 * outputs[0].abs().max()).double().mean() > 0.6
    assert extra["tape"].cost.dtype == torch.float32 and trace.steps[0].probability.dtype == torch.float32
    assert trace.ponder_cost().dtype == torch.float32
    (logits.float().square().sum() + extra["tape"].cost.sum() + trace.ponder_cost()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("flags", ({}, STOPS[0], STOPS[-1]), ids=("dense", "act", "skimming"))
def test_layers_before_the_tape_leave_no_parameter_without_gradient(flags):
    """Their second feed-forward has nothing to serve; DistributedDataParallel waits for all gradients."""
    model = vit(tape_layer=2, encoder_unique_layers=4, **flags).train()
    logits, extra = model(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double())
    (logits.sin().sum() + extra["tape"].cost.sum()).backward()
    found = {name: each.grad for name, each in model.layers.named_parameters() if "tape_ffn" in name}
    assert len(found) > 8 and all(each is not None and each.isfinite().all() for each in found.values())
    assert not found["0.tape_ffn.fc1.weight"].any() and found["3.tape_ffn.fc1.weight"].any()


def test_initialisation_of_the_halting_unit_and_the_predictors_is_theirs(build):
    """RoBERTa's sets all biases to 0."""
    flags = {**SIZES, "tape_bank_size": 40}
    halting = build("adatape", halting="ut_act", **flags).encoder.sentence_encoder.layers.halting
    assert halting.unit.bias.item() == 1.0
    router = build("adatape", skimming=True, **flags).encoder.sentence_encoder.layers.router
    assert len(router) == 4 and all(predictor[4].bias[1] > 4.9 for predictor in router)
