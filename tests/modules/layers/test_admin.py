"""Admin initialisation: the profile is that of Liu et al. (2020), is taken once, and does not depend on padding."""

import copy

import pytest
import torch

from fairseq_adaptive.modules import AdminResidual

TINY = {
    "layers": 4, "unique_layers": 2, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2
}  # fmt: skip
FLAGS = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in TINY.items()}


@pytest.fixture
def model(build):
    return build("shared_transformer", layer_sharing="cycle", init="admin", dropout=0.0, **FLAGS)


def test_profile_is_the_root_of_the_summed_variances():
    """omega starts at 1 and grows by the variance of what each branch adds to the stream."""
    torch.manual_seed(0)
    admin = AdminResidual(2, 2, 8).double().train()
    expected, variance = [], 1.0
    for depth in range(2):
        for sublayer in range(2):
            x, branch = torch.randn(5, 3, 8).double(), 3 * torch.randn(5, 3, 8).double()
            omega = variance**0.5
            expected.append(omega)
            torch.testing.assert_close(admin(branch, x, depth, sublayer, None), branch + omega * x)
            variance = (omega * x).var(unbiased=False).item() + branch.var(unbiased=False).item()
    admin.finish_profiling()
    torch.testing.assert_close(admin.start.flatten().tolist(), expected)
    assert expected[0] == 1.0 and expected == sorted(expected) and admin.profiled


def test_first_training_step_profiles_and_later_ones_do_not(model, batch):
    assert not model.encoder.layers.residual.profiled
    model(**batch)
    assert not model.encoder.layers.residual.profiled  # an evaluation is no training step
    model.train()
    model(**batch)
    starts = {}
    for side, sublayers in (("encoder", 2), ("decoder", 3)):
        residual = getattr(model, side).layers.residual
        assert residual.profiled and residual.start.shape == (4, sublayers) and residual.start[0, 0] == 1
        assert (residual.start.flatten()[1:] > 1).all()
        starts[side] = residual.start.clone()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model(**batch)
    for side, start in starts.items():
        assert torch.equal(getattr(model, side).layers.residual.start, start)


def test_profile_ignores_padding(model, batch):
    other = copy.deepcopy(model)
    longer = dict(batch)
    longer["src_tokens"] = torch.cat((torch.full((3, 6), 1), batch["src_tokens"]), 1)
    longer["prev_output_tokens"] = torch.cat((batch["prev_output_tokens"], torch.full((3, 6), 1)), 1)
    model.train()(**batch)
    other.train()(**longer)
    for side in ("encoder", "decoder"):
        ours, theirs = (getattr(m, side).layers.residual.start for m in (model, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_scales_are_saved_trained_and_restored(build, model, batch):
    model.train()(**batch)[0].sum().backward()
    offset = model.decoder.layers.residual.offset
    assert offset.grad.abs().min(-1).values.gt(0).any()
    with torch.no_grad():
        offset.add_(0.1)
    other = build("shared_transformer", seed=2, layer_sharing="cycle", init="admin", dropout=0.0, **FLAGS)
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.encoder.layers.residual.profiled
    torch.testing.assert_close(other.train()(**batch)[0], model(**batch)[0], rtol=0, atol=0)


def test_before_the_profile_nothing_differs_from_default_initialisation(build, model, batch):
    plain = build("shared_transformer", layer_sharing="cycle", dropout=0.0, **FLAGS)
    torch.testing.assert_close(model(**batch)[0], plain(**batch)[0], rtol=0, atol=0)


def test_activation_checkpointing_changes_nothing(build, model, batch):
    checkpointed = build(
        "shared_transformer", layer_sharing="cycle", init="admin", dropout=0.0, checkpoint_activations=True, **FLAGS
    )
    gradients = []
    for each in (model, checkpointed):
        each.train()
        for _ in range(2):
            each.zero_grad()
            each(**batch)[0].sin().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)
