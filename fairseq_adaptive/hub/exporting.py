"""Models as graphs of fixed shape: for ONNX, ``torch.export`` and ``torch.jit.trace``."""

import copy
import warnings

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.hub.plain import describe, load_state

SAME = 1e-4  # of the largest output: what onnxruntime may differ by
OPSET = 17


class Exportable(nn.Module):
    """Numbers of words to scores of classes, or to states of an encoder; every token is computed at every depth.

    What policies decide are masks: the outputs are those of the model, and nothing is saved.

    Args:
        model: a plain encoder, or a classifier of one

    Raises:
        UsageError: for policies that are not traced, by name
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder, self.head = getattr(model, "encoder", model), getattr(model, "head", None)
        self.encoder.check_dense()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> scores [B, K], or states [B, T, C]"""
        states = self.encoder.dense(tokens)
        return states if self.head is None else self.head(states)

    @property
    def output(self) -> str:
        """What comes out, in a word."""
        return "states" if self.head is None else "scores"

    def example(self) -> Tensor:
        """Words [2, T], of which the second text has padding."""
        about = self.encoder.about
        length = min(9, about.max_positions)
        tokens = torch.arange(2 * length).view(2, length) * 7 % max(1, about.vocabulary - 4) + 4
        tokens[0, -1], tokens[1, length // 2] = about.separator, about.separator
        tokens[1, length // 2 + 1 :] = about.padding
        return tokens


def exportable(pretrained, counterpart: bool = False) -> Exportable:
    """A model of the hub in a form of fixed shape.

    Args:
        pretrained: a classifier or a translator of the hub; of the latter it is the encoder
        counterpart: the same weights without the policies, every layer on every token

    Raises:
        UsageError: for models that are not built in plain torch, and policies that are not traced, by name
    """
    plain, reason = describe(pretrained.model, pretrained.origin)
    if plain is None:
        raise UsageError(
            f"{pretrained.origin.architecture} for {pretrained.origin.task} has no form of fixed shape: {reason}"
        )
    plain = copy.deepcopy(plain)
    if counterpart:
        plain["encoder"].update(router=None, halting=None, reader=None)
    return Exportable(load_state(plain, pretrained.model))


def write_onnx(pretrained, path, counterpart: bool = False) -> None:
    """Write an ONNX model: ``tokens``, [batch, length] of int64, to ``scores`` or ``states``; read back and compared.

    Args:
        path: of the new file
        pretrained, counterpart: of :func:`exportable`

    Raises:
        UsageError: where the file exists, onnx or onnxruntime is not installed, and as :func:`exportable`
    """
    path = require_new(path)
    write_graph(exportable(pretrained, counterpart).cpu(), path)


@torch.no_grad()
def write_graph(model: Exportable, path) -> None:
    """As :func:`write_onnx`, of a model in a form of fixed shape."""
    path = require_new(path)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UsageError("to write ONNX, install onnx and onnxruntime: pip install 'fairseq_adaptive[onnx]'") from error
    tokens, free = model.example(), {0: "batch", 1: "length"}
    with whole_file(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's newer exporter takes 15 times as long, and its graphs are larger
        torch.onnx.export(
            model,
            (tokens,),
            part,
            dynamo=False,
            opset_version=OPSET,
            input_names=["tokens"],
            output_names=[model.output],
            dynamic_axes={"tokens": free, model.output: free if model.head is None else {0: "batch"}},
        )
        _compare(model, part, tokens)


def _compare(model, path, tokens):
    """Refuse a file that computes another thing, at other sizes than those that were traced, too."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for given in (tokens, tokens[:1, :3], tokens[:, :5].repeat(2, 1)):
        (found,) = session.run(None, {"tokens": given.numpy()})
        there = given.ne(model.encoder.about.padding) if model.head is None else slice(None)
        expected, found = model(given)[there], torch.from_numpy(found)[there]
        apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not apart <= SAME:
            raise UsageError(f"what was exported computes another thing, by {apart:.1e} of the largest output")
