"""Models of fixed shape: decisions as masks give what the model gives, in torch's exporters and in onnxruntime."""

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import exporting
from fairseq_adaptive.hub.exporting import Exportable
from fairseq_adaptive.modules.plain_encoder import ClassificationHead, EncoderDescription, PlainClassifier, PlainEncoder

SIZES = dict(vocabulary=30, dim=16, ffn_dim=32, heads=2, schedule=(0, 1, 0, 1), max_positions=32)
SKIMMING = {"name": "skimming", "options": {"bias": 0.0}}
CASES = {
    "dense": {"positions": "sinusoidal", "normalize_before": True, "final_norm": True},
    "skimming": {"router": SKIMMING, "protect_separators": True, "segments": 2, "segments_after_separator": True},
    "act": {
        "halting": {"name": "act"},
        "positions": "from_zero",
        "input_dim": 8,
        "segments": 2,
        "embedding_norm": True,
    },
    "both": {"router": SKIMMING, "halting": {"name": "ut_act", "kv": "active"}, "protect_first": True},
    "kept keys": {"halting": {"name": "pondernet", "kv": "keep"}, "lora_rank": 2},
    "saturation": {"halting": {"name": "saturation", "options": {"threshold": 0.7}}, "admin": True},
}


def made(case, classes=3):
    torch.manual_seed(1)
    encoder = PlainEncoder(EncoderDescription(**SIZES, **CASES[case]))
    model = encoder if not classes else PlainClassifier(encoder, ClassificationHead(16, 16, classes))
    for name, weight in model.named_parameters():
        if any(part in name for part in (".router.", ".halting.", "head.out_proj", "depth_b")):
            torch.nn.init.normal_(weight)
    return model


def texts(lengths, most=9):
    torch.manual_seed(2)
    tokens = torch.randint(4, 30, (len(lengths), most))
    tokens[torch.arange(most) >= torch.tensor(lengths)[:, None]] = 1
    return tokens


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_masks_are_the_decisions(case):
    """Dense without a look at the tokens = packed; traced, too, and at other lengths than those of the example."""
    model = made(case)
    fixed, few, many = Exportable(model), texts((4, 6), 6), texts((9, 3, 5, 1))
    expected = model(many)[0]
    torch.testing.assert_close(fixed(many), expected, rtol=0, atol=2e-6)
    traced = torch.jit.trace(fixed, (few,), check_trace=False)
    torch.testing.assert_close(traced(many), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@torch.no_grad()
def test_exported_by_torch():
    """A plain model is dense while it is exported, and a stack of its own is refused."""
    model, many = made("both"), texts((9, 3, 5, 1))
    sizes = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=32)}}
    program = torch.export.export(Exportable(model), (texts((4, 6), 6),), dynamic_shapes=sizes, strict=False).module()
    torch.testing.assert_close(program(many), model(many)[0], rtol=0, atol=2e-6)
    traced = torch.jit.trace(model.encoder, (texts((4, 6), 6),), check_trace=False)
    there = many.ne(1)
    torch.testing.assert_close(traced(many)[there], model.encoder(many)[there], rtol=0, atol=2e-6)
    for export in (torch.export.export, torch.jit.trace):
        with pytest.raises(UsageError, match="export the dense form"):
            export(model.encoder.layers, (torch.randn(6, 2, 16),))


@pytest.mark.parametrize("name", ("mixture_of_depths", "tape"))
def test_what_compares_tokens_is_named(name):
    kind = (
        {"reader": {"name": "tape", "options": {"tokens": 2, "bank_size": 9}}}
        if name == "tape"
        else {"router": {"name": name}}
    )
    with pytest.raises(UsageError, match=f"^{name} compares tokens"):
        Exportable(PlainEncoder(EncoderDescription(**SIZES, **kind)))


@pytest.mark.parametrize("case, classes", [("both", 3), ("act", 3), ("skimming", 0)])
def test_onnx_says_the_same(case, classes, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = made(case, classes)
    monkeypatch.setattr(exporting, "exportable", lambda *_: Exportable(model))
    exporting.write_onnx(None, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    many = texts((9, 3, 5, 1, 20), 20)
    (found,) = session.run(None, {"tokens": many.numpy()})
    with torch.no_grad():
        expected = model(many)[0] if classes else model(many)
    there = slice(None) if classes else many.ne(1)
    torch.testing.assert_close(torch.from_numpy(found)[there], expected[there], rtol=0, atol=1e-5)
    if classes:
        assert torch.equal(torch.from_numpy(found).argmax(-1), expected.argmax(-1))
    with pytest.raises(UsageError, match="exists"):
        exporting.write_onnx(None, tmp_path / "model.onnx")
