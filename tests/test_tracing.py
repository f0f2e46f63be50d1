"""Language models traced, as ``torch.onnx.export(..., dynamo=False)`` traces them: what comes out is the same."""

import io

import pytest
import torch
from families import build_trainer, write_data

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory

LANGUAGE_MODELS = ("shared_transformer_lm", "par_transformer_xl", "par_supernet")
VIEWS = {f"aten::{name}" for name in "view slice select permute transpose reshape as_strided expand unsqueeze".split()}
VIEWS |= {f"aten::{name}" for name in "squeeze t diagonal narrow flatten unflatten chunk split detach view_as".split()}


class Output(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def model(data, request):
    trainer, _ = build_trainer(request.param, data, "--max-update", "5")
    return Output(trainer._model).eval()


@pytest.mark.parametrize("model", LANGUAGE_MODELS, indirect=True)
def test_nothing_is_written_through_a_view(model):
    """That exporter loses it without a word: scores differed by 0.2 to 2.3."""
    with torch.no_grad():
        graph = torch.jit.trace(model, torch.arange(4, 16).view(2, 6), check_trace=False).inlined_graph
    written = [node for node in graph.nodes() if node.kind().startswith("aten::") and node.kind().endswith("_")]
    wrong = [str(node) for node in written if "copy_" in node.kind() or next(node.inputs()).node().kind() in VIEWS]
    assert not wrong


@pytest.mark.parametrize("model", LANGUAGE_MODELS, indirect=True)
def test_onnx_computes_the_same(model):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    file, every_cluster = (
        io.BytesIO(),
        torch.arange(4, 28, 2).view(2, 6),
    )  # fairseq's adaptive input traces those it sees
    with torch.no_grad():
        torch.onnx.export(model, (every_cluster,), file, dynamo=False)
        tokens = torch.randint(4, 30, (2, 6))
        expected = model(tokens)
    session = runtime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ("halting_transformer_xl",), indirect=True)
def test_what_would_be_wrong_is_refused(model):
    """Decisions and memories of the example would be those of all that the graph ever gets."""
    tokens = torch.arange(4, 16).view(2, 6)
    traces = (
        lambda: torch.jit.trace(model, tokens, check_trace=False),
        lambda: torch.onnx.export(model, (tokens,), io.BytesIO(), dynamo=False),
        lambda: torch.export.export(model, (tokens,), strict=False),
    )
    for trace in traces:
        with torch.no_grad(), pytest.raises(UsageError, match="export the dense form"):
            trace()

    class Remembers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.model

        def forward(self, tokens):
            return self.model(tokens, memory=SegmentMemory())[0]

    with torch.no_grad(), pytest.raises(UsageError, match="keep the memory of this segment"):
        torch.jit.trace(Remembers(), tokens, check_trace=False)
