"""nn.Linear with weights laid out once: same results, never old weights."""

import copy
import threading

import pytest
import torch
from torch import nn

from families import FAMILIES, build_trainer, write_data
from fairseq_adaptive.modules import LayerStack
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear, constant_weights, prepacked_weights


@pytest.fixture
def pair():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(96, 301), nn.ReLU(), nn.Linear(301, 64, bias=False))
    packed = copy.deepcopy(plain)
    PrepackedLinear.adopt(packed)
    return plain, packed


@pytest.mark.parametrize("rows", ((3,), (200,), (7, 31)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_equals_linear(pair, rows, dtype):
    plain, packed = (each.to(dtype) for each in pair)
    x = torch.randn(*rows, 96, dtype=dtype)
    with torch.no_grad(), constant_weights():
        for _ in range(3):  # the second product lays the weights out
            torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
        strided = torch.randn(96, 200, dtype=dtype).t()
        torch.testing.assert_close(packed(strided), plain(strided), rtol=1e-5, atol=1e-5)
    assert list(packed.state_dict()) == list(plain.state_dict())


def test_lays_out_what_is_multiplied_again(pair):
    _, packed = pair
    with torch.no_grad(), constant_weights():
        for rows, laid_out in ((3, False), (3, False), (200, False), (200, True), (3, True)):
            packed(torch.randn(rows, 96))
            assert (prepacked_weights(packed[0])._packed is not None) == laid_out


def test_nothing_outlives_what_holds_the_weights(pair):
    """Written through .data, as optimizers do: no version tells."""
    plain, packed = pair
    x = torch.randn(200, 96)
    with torch.no_grad():
        for _ in range(3):
            with constant_weights():
                with constant_weights():
                    packed(x)
                packed(x), packed(x)
                assert prepacked_weights(packed[0])._packed is not None
            for each in (*plain.parameters(), *packed.parameters()):
                each.data.mul_(1.5)
            torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
            with constant_weights():
                torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


def test_ends_with_an_error_and_is_of_one_thread(pair):
    _, packed = pair
    with pytest.raises(KeyError), constant_weights():
        raise KeyError
    kept, found = [], []
    with constant_weights():
        kept.append(prepacked_weights(packed[0]))
        thread = threading.Thread(target=lambda: found.append(prepacked_weights(packed[0])))
        thread.start(), thread.join()
        assert prepacked_weights(packed[0]) is kept[0] is not found[0]
    assert prepacked_weights(packed[0]) is not kept[0]


def test_follows_what_happens_meanwhile(pair):
    """Another precision, a copy, a new parameter, a training step between two products of one evaluation."""
    plain, packed = pair
    x = torch.randn(200, 96)
    with torch.no_grad(), constant_weights():
        for _ in range(3):
            packed(x)
        torch.testing.assert_close(copy.deepcopy(packed)(x), plain(x), rtol=1e-5, atol=1e-5)
        assert packed.double()(x.double()).dtype == torch.float64
        packed.float()[0].weight = nn.Parameter(2 * plain[0].weight)
        plain[0].weight.mul_(2)
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


def test_has_gradients(pair):
    plain, packed = pair
    x = torch.randn(200, 96)
    for each in pair:
        each(x).sin().sum().backward()
    for ours, theirs in zip(packed.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_maps_of_layers_have_the_choice(family, data):
    """In training and in evaluation, and not only where fairseq makes a model fast for generation."""
    model = build_trainer(family, data, "--max-update", "5")[0].model
    stacks = [each for each in model.modules() if isinstance(each, LayerStack)]
    layers = [each.layer(number) for each in stacks for number in range(each.unique_layers)]
    maps = [each for layer in layers for each in layer.modules() if isinstance(each, nn.Linear)]
    large = [each for each in maps if min(each.weight.shape) > 2]  # no unit or gate
    assert large and all(type(each) is PrepackedLinear for each in large)
