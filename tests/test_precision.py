"""Training in half precision follows that in single precision in every family, and nothing is summed in half."""

import copy
import functools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fairseq.optim import AMPOptimizer

from families import FAMILIES, build_trainer, train, write_data
from fairseq_adaptive.compat import precision
from fairseq_adaptive.criterions.expected_output import _expected
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies import ACT, UniversalACT
from fairseq_adaptive.modules.policies.pondernet import PonderNet, prior_divergence, truncated_geometric
from fairseq_adaptive.ops import probe
from fairseq_adaptive.ops.skim_attention.naive import masked_softmax
from fairseq_adaptive.modules.policies.tape import TapeReader, masked_mean
from fairseq_adaptive.modules.stack.trace import Step, Trace

UPDATES = 12
# largest distance of an update's loss from that in single precision, as a share of the first loss. Over three seeds on
# a CPU it was at most 0.006, and 0.017 without weights in single precision
TOLERANCE = {"--memory-efficient-bf16": 0.03}
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
HALF = ["--fp16", "--memory-efficient-fp16", "--bf16", "--memory-efficient-bf16", "--amp"]
# ponder costs, depths, kept tokens, the tape: in the log besides the loss
AUXILIARY = [
    "ponder_loss",
    "depth",
    "encoder_depth",
    "decoder_depth",
    "skim_loss",
    "kept",
    "entropy",
    "compute",
    "ponder_cost",
    "tape_len",
]

pytestmark = pytest.mark.filterwarnings("ignore")  # fairseq's, of torch.cuda.amp


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


@pytest.fixture
def prepare(monkeypatch):
    """Return the flags of a device; ``half weights`` is a CPU that trains as a GPU does, with weights in half."""

    def prepare(device):
        if device == "half weights":
            monkeypatch.setattr(precision, "fit_to_cpu", lambda common: None)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # where fairseq puts single precision
            monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # and the norm of an overflow
        return [] if device == "cuda" else ["--cpu"]

    return prepare


@pytest.fixture(scope="module")
def single(data):
    """``single(family, flags)``: the log in single precision, computed once."""

    @functools.lru_cache(maxsize=None)
    def single(family, *flags):
        return train(*build_trainer(family, data, "--max-update", "100", *flags), UPDATES)

    return single


def distance(log, reference):
    apart = [abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(log, reference)]
    return max(apart) / reference[0]["loss"]


def refuse_half(criterion, inputs, outputs):
    """A hook: what a criterion returns and logs is summed over workers and batches."""
    loss, _, logging_output = outputs
    for name, value in {"returned": loss, **logging_output}.items():
        assert not torch.is_tensor(value) or value.dtype not in (torch.float16, torch.bfloat16), name


def assert_same_training(log, reference, tolerance=0.01):
    assert distance(log, reference) < tolerance
    for name in set(AUXILIARY) & set(reference[0]):
        ours, theirs = ([each[name] for each in updates] for updates in (log, reference))
        assert ours == pytest.approx(theirs, rel=0.05, abs=1e-3), name


@pytest.mark.parametrize(
    "family, device, flag",
    [
        *((family, *each) for family in FAMILIES for each in (("cpu", "--bf16"), ("half weights", "--fp16"))),
        # the same operations, scaled or not: of every fourth family
        *((family, *each) for family in [*FAMILIES][::4] for each in (("cpu", "--amp"), ("half weights", "--bf16"))),
        *[pytest.param(family, *GPU.values, flag, marks=GPU.marks) for family in FAMILIES for flag in HALF],
    ],
)
def test_training_follows_single_precision(family, device, flag, data, single, prepare):
    flags = prepare(device)
    reference = single(family, *flags)
    trainer, batches = build_trainer(family, data, "--max-update", "100", flag, *flags)
    trainer.criterion.register_forward_hook(refuse_half)
    log = train(trainer, batches, UPDATES)
    half = any(each.dtype in (torch.float16, torch.bfloat16) for each in trainer.model.parameters())
    assert half == (device != "cpu" and flag != "--amp")
    assert len(log) == trainer.get_num_updates() == UPDATES
    assert log != reference  # computed in another precision
    assert_same_training(log, reference, TOLERANCE.get(flag, 0.01))


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_in_half_precision_would_not_pass(family, data, single, monkeypatch):
    reference = single(family, "--cpu")
    sum_up, losses = torch.Tensor.sum, (F.nll_loss, F.cross_entropy)

    def running_sum(values):
        total, exact = torch.zeros((), dtype=torch.bfloat16), sum_up(values)
        for value in values.detach().flatten().bfloat16():
            total = total + value
        return exact + (total.to(exact) - exact.detach())

    def summed(self, *args, **kwargs):
        return sum_up(self, *args, **kwargs) if args or kwargs or not self.is_floating_point() else running_sum(self)

    def broken(loss, *args, reduction="mean", **kwargs):
        if reduction != "sum":
            return loss(*args, reduction=reduction, **kwargs)
        return running_sum(loss(*args, reduction="none", **kwargs))

    monkeypatch.setattr(torch.Tensor, "sum", summed)
    for loss in losses:
        monkeypatch.setattr(F, loss.__name__, functools.partial(broken, loss))
    log = train(*build_trainer(family, data, "--max-update", "100", "--bf16", "--cpu"), 6)
    assert distance(log, reference) > 0.01


@pytest.mark.parametrize("device", ["half weights", GPU])
@pytest.mark.parametrize(
    "family, flag",
    [
        ("universal_transformer", "--fp16"),
        ("pondernet", "--fp16"),
        ("transkimmer", "--memory-efficient-fp16"),
        ("par_supernet", "--memory-efficient-fp16"),
    ],
)
def test_a_scale_that_is_too_high_is_halved(family, flag, device, data, prepare):
    flags, first, batches_seen = prepare(device), 2**22, 16
    trainer, batches = build_trainer(family, data, "--max-update", "100", flag, "--fp16-init-scale", str(first), *flags)
    log = train(trainer, batches, batches_seen)
    skipped = batches_seen - trainer.get_num_updates()
    assert 2 <= skipped < batches_seen - 2
    assert trainer.optimizer.scaler.loss_scale == first / 2**skipped
    done = [number for number, each in enumerate(log) if "loss" in each]
    assert len(done) == trainer.get_num_updates()
    trainer, batches = build_trainer(family, data, "--max-update", "100", *flags)
    batches = list(batches)
    reference = train(trainer, [batches[number] for number in done], len(done))
    assert_same_training([log[number] for number in done], reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", ["universal_transformer", "transkimmer", "par_supernet"])
def test_autocast_halves_a_scale_that_is_too_high(family, data):
    """fairseq tries a batch three times with --amp before it goes on to the next."""
    flags = "--amp", "--fp16-init-scale", str(2**40)
    trainer, batches = build_trainer(family, data, "--max-update", "100", *flags)
    log = [each for each in train(trainer, batches, 24) if "loss" in each]
    assert trainer.optimizer.scaler.get_scale() < 2**40
    assert 2 <= len(log) <= trainer.get_num_updates() and all(math.isfinite(each["loss"]) for each in log)


@pytest.mark.parametrize("flag", ["--fp16", "--memory-efficient-fp16"])
def test_weights_in_half_precision_are_refused_on_a_cpu(flag, data):
    with pytest.raises(UsageError, match="need a GPU; on a CPU train with --bf16"):
        build_trainer("par_supernet", data, "--max-update", "100", flag, "--cpu")


def test_the_profile_of_admin_outlives_weights_in_half_precision(data, single, prepare):
    """The optimizer copies the weights before the first step, which sets the scales of the residual branches."""
    flags = prepare("half weights") + ["--init", "admin"]
    trainer, batches = build_trainer("shared_transformer", data, "--max-update", "100", "--fp16", *flags)
    assert_same_training(train(trainer, batches, UPDATES), single("shared_transformer", *flags))
    start = trainer.model.decoder.layers.residual.start
    assert start.dtype == torch.float16 and (start.flatten()[1:] > 1).all()


@pytest.fixture
def autocast():
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        yield


def close(ours, exact, tolerance=1e-3):
    assert exact.dtype == torch.float64 and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("rule_class", [ACT, UniversalACT, PonderNet])
def test_halting_sums(rule_class, autocast):
    """Twelve depths of states in bfloat16: what is summed is what float64 makes of the same states."""
    rule = rule_class(16, **({} if rule_class is PonderNet else {"bias": -2.5})).train()
    states = torch.randn(13, 40, 16).bfloat16()
    carries = []
    for exact in False, True:
        each, x = (copy.deepcopy(rule).double(), states.double()) if exact else (rule, states)
        carry, running = each.start(x[0]), torch.ones(40, dtype=torch.bool)
        for depth in range(12):
            _, carry, running, _ = each.step(x[depth], x[depth + 1], carry, running, depth == 11)
        carries.append(carry)
    for name, exact in carries[1].items():
        close(carries[0][name], exact, 1e-5)


def test_sums_of_a_trace(autocast):
    distribution = torch.rand(6, 4, 200).softmax(0)
    tokens = torch.rand(4, 200) < 0.9
    traces = []
    for exact in False, True:
        p = distribution.double() if exact else distribution
        trace = Trace(tokens, 6, [Step(0, tokens, halted=~tokens, probability=p[0])] * 6, p[1], p)
        divergence = (prior_divergence(p, truncated_geometric(0.2, 6)) * tokens).sum()
        traces.append(
            [
                trace.updates.sum(),
                PonderNet(4).at_limit(trace),
                trace.reluctance(),
                trace.histogram(),
                divergence,
                (trace.remainders * tokens).sum(),
            ]
        )
    for ours, exact in zip(*traces):
        close(ours, exact, 1e-5)


@pytest.mark.parametrize("input_bank", [False, True])
def test_the_tape_is_read_exactly(input_bank, autocast):
    reader = TapeReader(32, 8, 2.0)
    reader.norm = nn.Identity()
    query, bank = torch.randn(5, 32).bfloat16(), torch.randn(*[5] * input_bank, 100, 32).bfloat16()
    ours, exact = reader(query, bank), reader(query.double(), bank.double())
    assert torch.equal(ours.entries, exact.entries)
    close(ours.cost, exact.cost, 1e-5)
    close(ours.weights, exact.weights, 1e-5)


def test_other_sums(autocast):
    scores, kept = torch.randn(2, 2, 50, 50).bfloat16(), (torch.rand(2, 50) < 0.7).float()
    close(masked_softmax(scores, kept), masked_softmax(scores.double(), kept.double()), 1e-5)
    scores, weights = torch.randn(6, 30, 100).bfloat16(), torch.rand(6, 30).softmax(0)
    close(_expected(scores.flatten(0, 1), weights), _expected(scores.double().flatten(0, 1), weights.double()), 1e-5)
    x, padding = (torch.randn(300, 3, 8) + 400).half(), torch.rand(3, 300) < 0.2  # the sum is beyond half precision
    torch.testing.assert_close(masked_mean(x, padding).double(), masked_mean(x.double(), padding), rtol=1e-3, atol=0)


@pytest.fixture
def measured(monkeypatch):
    """``measured(bf16, fp32)``: GFLOP/s that the probe of products has found, by which training goes."""

    def measured(bf16, fp32):
        monkeypatch.setenv(precision.VARIABLE, "auto")
        monkeypatch.setenv(probe.VARIABLE, "onednn")  # the same products in both
        speeds = {name: [float(fp32 if name.startswith("fp32") else bf16)] * len(probe.SIZES) for name in probe._NAMES}
        monkeypatch.setattr(probe, "_KNOWN", {torch.get_num_threads(): probe.Figures(speeds)})

    return measured


SLOW = "bf16 products run at 85 GFLOP/s here and fp32 ones at 150, which is no gain: training in fp32"


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16", "--amp"])
def test_bfloat16_that_gains_nothing_is_single_precision(flag, data, measured, caplog):
    """To the last bit, and with the optimizer whose state a checkpoint of autocast holds."""
    measured(bf16=85, fp32=150)
    caplog.set_level(logging.INFO)
    found = []
    for flags in ((), (flag,)):
        trainer, batches = build_trainer("shared_transformer", data, "--max-update", "100", *flags, "--cpu")
        log = train(trainer, batches, UPDATES)
        found.append(([each["loss"] for each in log], list(trainer.model.parameters())))
    assert isinstance(trainer.optimizer, AMPOptimizer)
    (losses, weights), (ours, own) = found
    assert ours == losses and all(map(torch.equal, own, weights))
    said = [record.message for record in caplog.records if record.name == precision.__name__]
    assert said == [f"{SLOW}; FAIRSEQ_ADAPTIVE_BF16=always forces bf16"]


@pytest.mark.parametrize("bf16, forced", [(85, True), (160, False), (170, False)])
def test_bfloat16_that_gains_or_is_forced(bf16, forced, data, single, measured, monkeypatch):
    """Casts cost time, too: what is less than a tenth faster is no gain."""
    measured(bf16=bf16, fp32=150)
    if forced:
        monkeypatch.setenv(precision.VARIABLE, "always")
    reference = single("shared_transformer", "--cpu")
    log = train(*build_trainer("shared_transformer", data, "--max-update", "100", "--bf16", "--cpu"), UPDATES)
    assert ([each["loss"] for each in log] != [each["loss"] for each in reference]) == (forced or bf16 > 165)
    assert_same_training(log, reference)


def test_a_training_keeps_its_precision(data, measured):
    """What is found later, by another number of threads or another trainer, does not change it."""
    measured(bf16=85, fp32=150)
    slow, _ = build_trainer("shared_transformer", data, "--max-update", "100", "--bf16", "--cpu")
    measured(bf16=400, fp32=150)
    fast, _ = build_trainer("shared_transformer", data, "--max-update", "100", "--bf16", "--cpu")
    assert (slow.task.bf16_on_cpu, fast.task.bf16_on_cpu) == (False, True)


def test_single_precision_measures_nothing(data, monkeypatch):
    monkeypatch.setenv(precision.VARIABLE, "auto")
    monkeypatch.setattr(probe, "figures", None)
    build_trainer("shared_transformer", data, "--max-update", "100", "--cpu")


@pytest.mark.parametrize("flags", [("--bf16",), ()])
@pytest.mark.parametrize("variable", [precision.VARIABLE, probe.VARIABLE])
def test_wrong_variables_end_a_training_before_it_starts(variable, flags, data, monkeypatch):
    monkeypatch.setenv(variable, "never")
    if variable == precision.VARIABLE and not flags:
        build_trainer("shared_transformer", data, "--max-update", "100", "--cpu")  # asks for no bfloat16
        return
    with pytest.raises(UsageError, match=f"{variable}=never is unknown: choose one of auto"):
        build_trainer("shared_transformer", data, "--max-update", "100", "--cpu", *flags)
