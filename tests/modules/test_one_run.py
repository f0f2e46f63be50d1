"""Every router with every halting rule: dense equals packed, decisions and states."""
from argparse import Namespace
import itertools
import pytest, torch
from fairseq.models.transformer import TransformerConfig
from fairseq_adaptive.modules import EncoderLayer, LayerStack
from fairseq_adaptive.modules.policies import MixtureOfDepths, Place, Skimming, build_policy

DIM, N = 8, 5

def layer(pre, tape=0):
    args = Namespace(encoder_embed_dim=DIM, encoder_ffn_embed_dim=12, encoder_attention_heads=2, dropout=0.0,
                     attention_dropout=0.0, activation_fn="gelu", encoder_normalize_before=pre)
    cfg = TransformerConfig.from_namespace(args); cfg.tape_ffn_embed_dim = tape
    return EncoderLayer(cfg)

def router_of(name):
    if name == "none": return None
    if name == "skim":
        r = Skimming(DIM, N)
        for p in r:
            torch.nn.init.normal_(p[1].weight); torch.nn.init.normal_(p[4].weight); p[4].bias.data.copy_(torch.tensor([-.7, .7]))
        return r
    r = MixtureOfDepths(DIM, N, 0.6)
    r.monotone = name == "mor"
    for p in r: torch.nn.init.normal_(p.weight)
    return r

def make(router, rule, pre, unique=2, tape=0):
    torch.manual_seed(3)
    halting = build_policy("halting", rule, Place(DIM, N), **{"threshold": t for t in [{"saturation": 0.93, "act": 0.9, "ut_act": 0.9}.get(rule)] if t})
    s = LayerStack([layer(pre, tape) for _ in range(unique)], tuple(d % unique for d in range(N)), pass_depth=True, halting=halting, router=router_of(router))
    if halting is not None and hasattr(halting, "unit"):
        torch.nn.init.normal_(halting.unit.weight, std=.6); torch.nn.init.constant_(halting.unit.bias, -1.2)
    for n, p in s.named_parameters():
        if not n.startswith(("router", "halting")): p.data += 0.1 * torch.randn_like(p)
    return s.double().eval()

def batch(lengths=(9, 1, 6, 4), extra=2):
    torch.manual_seed(5)
    x = torch.randn(max(lengths) + extra, len(lengths), DIM).double()
    mask = torch.arange(len(x))[None] >= torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(mask); protected[:, 0] = True
    return x, mask, protected

ROUTERS, RULES = ("none", "skim", "mod", "mor"), ("none", "act", "ut_act", "pondernet", "saturation")
CASES = [c for c in itertools.product(ROUTERS, RULES) if not (c[0] in ("mod", "mor") and c[1] == "saturation")]

@torch.no_grad()
@pytest.mark.parametrize("pre", (False, True))
@pytest.mark.parametrize("router, rule", CASES)
@pytest.mark.parametrize("tape", (0, 3))
def test_dense_equals_packed(router, rule, pre, tape):
    s = make(router, rule, pre, tape=5 if tape else 0)
    x, mask, protected = batch()
    s.recorder, outs = [], []
    for packed in (False, True):
        s.packed = packed
        outs.append(s(x, mask, protected, tape_len=tape))
    dense, packed = s.recorder
    torch.testing.assert_close(outs[0][~mask.t()], outs[1][~mask.t()], rtol=0, atol=1e-10)
    assert torch.equal(dense.updates, packed.updates)
    if router != "none" or rule != "none":
        assert dense.updates[dense.tokens].unique().numel() > 1
    if dense.remainders is not None:
        torch.testing.assert_close(dense.remainders[dense.tokens], packed.remainders[dense.tokens], rtol=0, atol=1e-10)
    for a, b in zip(dense.steps, packed.steps):
        assert torch.equal(a.alive, b.alive), (router, rule)

@torch.no_grad()
@pytest.mark.parametrize("router, rule", CASES)
def test_rows_do_not_see_each_other(router, rule):
    s = make(router, rule, False)
    x, mask, protected = batch()
    for packed in (False, True):
        s.packed = packed
        out = s(x, mask, protected)
        for row, length in enumerate((9, 1, 6, 4)):
            alone = s(x[:length, row : row + 1], None, protected[row : row + 1, :length])
            torch.testing.assert_close(alone[:, 0], out[:length, row], rtol=0, atol=1e-10)

@pytest.mark.parametrize("router, rule", CASES)
def test_gradients_reach_everything(router, rule):
    s = make(router, rule, False).train()
    x, mask, protected = batch()
    s.recorder = []
    out = s(x, mask, protected)
    loss = out[~mask.t()].sin().sum()
    for step in s.recorder[0].steps:
        if step.kept is not None: loss = loss + step.kept.sum() + 0 * step.keeping.sum()
    loss.backward()
    missing = [n for n, p in s.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, missing
