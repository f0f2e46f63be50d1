"""The fused update of adaptive computation time against its definition, by value and by gradient."""

import pytest
import torch

from fairseq_adaptive.modules.policies import ACT, UniversalACT
from fairseq_adaptive.ops.halting_update import halting_update, naive

OUTPUTS = ("state", "output", "halting", "remainders", "running", "probability")
GRADIENTS = ("before", "after", "weight", "bias", "halting", "remainders", "output")
SIZES = [(1, 1), (63, 5), (500, 33), (4, 2100)]
SHARES = {"some": 0.7, "none": 0.0, "all": 1.0}


@pytest.fixture(params=(False, True), ids=("act", "ut_act"))
def universal(request):
    return request.param


def rows_of(rows, backend, device):
    return min(rows, 63) if backend == "triton" and device == "cpu" else rows  # interpreted, a program takes ms


def inputs(shape, universal, share=0.7, dtype=torch.float32, exact=torch.float32):
    """Arguments by name; of those that run some stop, unless all or none do."""
    torch.manual_seed(1)
    tokens = shape[:-1]
    states = {name: torch.randn(shape, dtype=exact).to(dtype) for name in ("before", "after")}
    unit = {"weight": (torch.randn(shape[-1]) / shape[-1] ** 0.5).to(dtype), "bias": torch.randn(1).to(dtype)}
    sums = {"halting": torch.rand(tokens, dtype=exact) * 0.8, "remainders": torch.rand(tokens, dtype=exact)}
    output = torch.randn(shape, dtype=exact) if universal else None
    return {**states, **unit, **sums, "running": torch.rand(tokens) < share, "threshold": 0.9, "output": output}


def results(function, arguments, factors=None):
    """Every output and every gradient by name; each output's gradient is drawn, or taken from ``factors``."""
    leaves = {
        name: value.clone().requires_grad_() if name in GRADIENTS and value is not None else value
        for name, value in arguments.items()
    }
    outputs = function(**leaves)._asdict()
    found = {name: value for name, value in outputs.items() if name != "running" and value is not None}
    generator = torch.Generator(arguments["before"].device).manual_seed(3)
    gradients = [
        torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype) for value in found.values()
    ]
    torch.autograd.backward(list(found.values()), gradients)
    named = {f"d {name}": leaves[name].grad for name in GRADIENTS if leaves[name] is not None}
    return {**{name: value if value is None else value.detach() for name, value in outputs.items()}, **named}


def check(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], **tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("running", SHARES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_definition(size, running, universal, backend, device, poisoned):
    arguments = inputs((rows_of(size[0], backend, device), size[1]), universal, SHARES[running])
    expected = results(naive.halting_update, arguments)
    check(results(halting_update, arguments), expected, rtol=2e-5, atol=2e-5)
    if running == "some" and size[0] >= 63:
        stopped = arguments["running"] & ~expected["running"]
        assert stopped.any() and expected["running"].any() and not arguments["running"].all()


def test_double_precision(universal):
    arguments = inputs((63, 7), universal, dtype=torch.float64, exact=torch.float64)
    check(results(halting_update, arguments), results(naive.halting_update, arguments))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype, universal, backend, device):
    """As exact as the rounding of states and gradients lets it be; sums and decisions are float32."""
    arguments = inputs((rows_of(500, backend, device), 33), universal, dtype=dtype)
    ours = results(halting_update, arguments)
    floats = {name: value.float() for name, value in arguments.items() if torch.is_tensor(value) and name != "running"}
    exact = {**arguments, **floats}
    expected = results(naive.halting_update, exact)
    assert torch.equal(ours["running"], expected["running"])
    assert ours["state"].dtype == dtype and ours["halting"].dtype == ours["probability"].dtype == torch.float32
    for name in ("halting", "remainders", "probability"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("state", *(name for name in expected if name.startswith("d "))):
        difference = (ours[name].float() - expected[name]).norm() / expected[name].norm()
        assert difference < 2 * torch.finfo(dtype).eps, name


def test_autocast_does_not_reach_it(universal, backend, device):
    """Nor does it round what a layer under autocast returns before float32 states have been added."""
    arguments = inputs((5, 33), universal)
    arguments["after"] = arguments["after"].bfloat16()
    with torch.autocast(device, torch.bfloat16):
        ours = halting_update(**arguments)
    assert ours.state.dtype == torch.float32
    check(ours._asdict(), halting_update(**arguments)._asdict(), rtol=0, atol=0)
    check(ours._asdict(), naive.halting_update(**arguments)._asdict())


def test_tokens_that_do_not_run_keep_all_they_have(universal, backend, poisoned):
    """Whatever the layer made of them, NaN included, in values and in gradients."""
    arguments = inputs((7, 5), universal, 0.5)
    arguments["running"][:2] = torch.tensor([True, False])
    halted, clean = ~arguments["running"], results(halting_update, arguments)
    arguments["after"][halted] = float("nan")
    ours = results(halting_update, arguments)
    check(ours, clean, rtol=0, atol=0)
    for name, kept in (("state", "before"), ("halting", "halting"), ("remainders", "remainders")):
        assert torch.equal(ours[name][halted], arguments[kept][halted])
    assert not ours["probability"][halted].any() and not ours["d after"][halted].any()
    if universal:
        assert torch.equal(ours["output"][halted], arguments["output"][halted])


def test_nothing_depends_on_strides(universal, backend):
    arguments = inputs((3, 4, 6), universal)
    strided = dict(arguments)
    for name in ("before", "after", "halting", "remainders", "running"):
        strided[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((12,), float("nan"))
    wide[::2] = arguments["weight"]
    strided["weight"] = wide[::2]
    check(results(halting_update, strided), results(halting_update, arguments))


def test_no_tokens(universal, backend, poisoned):
    ours = results(halting_update, inputs((0, 5), universal))
    assert ours["state"].shape == (0, 5) and ours["running"].shape == (0,)
    assert ours["d weight"].eq(0).all() and ours["d bias"].eq(0).all()


@pytest.mark.parametrize("rule", (ACT, UniversalACT))
def test_training_ends_where_that_of_the_definition_does(rule, backend, device, monkeypatch):
    """Twenty updates of a model that halts, with the cost of its remainders in the loss."""

    def train():
        torch.manual_seed(1)
        halting, layer = rule(4).to(device), torch.nn.Linear(4, 4)
        x, target = torch.randn(6, 4), torch.randn(6, 4)
        optimizer = torch.optim.SGD([*halting.parameters(), *layer.parameters()], lr=0.2)
        for _ in range(20):
            state, carry, running = x, halting.start(x), torch.ones(6, dtype=torch.bool)
            for depth in range(3):
                state, carry, running, _ = halting.step(state, torch.tanh(layer(state)), carry, running, depth == 2)
            loss = (halting.output(state, carry) - target).pow(2).mean() + 0.1 * carry["remainders"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach()

    ours = train()
    monkeypatch.setattr("fairseq_adaptive.modules.policies.act.halting_update", naive.halting_update)
    torch.testing.assert_close(ours, train(), rtol=1e-5, atol=0)
