"""What all models of the hub have in common."""

import contextlib
import html
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import Origin, write_folder
from fairseq_adaptive.modules import LayerStack, Trace, recording
from fairseq_adaptive.printable import printable
from fairseq_adaptive.report.shading import Sentence, to_fragment

SHOWN = 50  # texts in a notebook


class Said(NamedTuple):
    """What a model's last call left: the traces of its last batch by the stack's name, texts, and lengths of tapes."""

    traces: Dict[str, Trace]
    sentences: Sequence[Sentence] = ()
    tapes: Sequence[int] = ()


_LAST = threading.local()  # a model serves several threads, and each sees its own calls


def _said() -> WeakKeyDictionary:
    if not hasattr(_LAST, "said"):
        _LAST.said = WeakKeyDictionary()
    return _LAST.said


class Pretrained:
    """A trained model with what it reads and writes; each kind of it has a ``from_pretrained`` of its own.

    Attributes:
        model: in evaluation mode; fairseq's, or the plain torch one where fairseq is not installed
        task: fairseq's, or what stands for it
        origin: what the model was read from; None: it was made otherwise, and cannot be saved
    """

    origin: Optional[Origin] = None

    @property
    def trace(self) -> Dict[str, Trace]:
        """What the last call in this thread has computed: of each stack, by its name, the
        :class:`~fairseq_adaptive.modules.Trace` of the last batch. Empty before the first call."""
        said = _said().get(self)
        return {} if said is None else said.traces

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Dict[str, List[Trace]]]:
        """The traces of the calls within; they are :attr:`trace` afterwards."""
        with recording(self.model) as traces:
            yield traces
        _said()[self] = Said({name: runs[-1] for name, runs in traces.items() if runs})

    def _show(self, sentences: Sequence[Sentence], tapes: Sequence[int] = ()):
        """Say what a notebook is to show of the last call."""
        _said()[self] = Said(self.trace, list(sentences)[:SHOWN], list(tapes)[:SHOWN])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save_pretrained(self, folder) -> None:
        """Write a new folder: ``config.json``, ``model.safetensors``, dictionaries, and the files of the tokenizer where
        there is one. What is there is not overwritten; the folder appears once all of it is written and read back.

        Raises:
            UsageError: where ``folder`` exists or cannot be written, or the model came from no file
        """
        if self.origin is None:
            raise UsageError("only what from_pretrained has read can be saved: flags and dictionaries are needed, too")
        write_folder(folder, self.origin, self.model, self.task)

    def exportable(self, counterpart: bool = False) -> nn.Module:
        """The model, of a translator the encoder, as a module of fixed shape, [B, T] to scores or states: for
        ``torch.export``, ``torch.jit.trace`` and ONNX. Every token is computed, and decisions are masks.

        Args:
            counterpart: the same weights without the policies

        Raises:
            UsageError: for models and policies that have no such form, by name
        """
        from fairseq_adaptive.hub.exporting import exportable

        return exportable(self, counterpart)

    def export_onnx(self, path, counterpart: bool = False) -> None:
        """Write :meth:`exportable` as a new ONNX file, with any number and length of texts.

        Raises:
            UsageError: as :meth:`exportable`; where the file exists, or onnx and onnxscript are not installed
        """
        from fairseq_adaptive.hub.exporting import write_onnx

        write_onnx(self, path, counterpart)

    def to(self, device) -> "Pretrained":
        """Move the model to a device; returns this object."""
        self.model.to(device)
        return self

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(self._facts())})"

    def _facts(self) -> List[str]:
        count = sum(each.numel() for each in self.model.parameters())
        facts = [
            type(self.model).__name__ if self.origin is None else self.origin.architecture,
            f"{count:,} parameters",
        ]
        for name, stack in stacks_of(self.model).items():
            named = (getattr(each, "policy_name", "") for each in (stack.router, stack.halting))
            facts.append(" ".join([name, f"{len(stack)} depths", *filter(None, named)]))
        return facts

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and the texts of its last call, coloured by depth or skimming."""
        facts = "".join(f"<li>{html.escape(printable(fact))}</li>" for fact in self._facts())
        said = _said().get(self)
        parts = [f"<p><b>{html.escape(type(self).__name__)}</b></p><ul>{facts}</ul>"]
        if said is not None and said.sentences:
            parts.append(to_fragment(said.sentences))
        if said is not None and said.tapes:
            parts.append(f"<p>tape tokens that were read: {html.escape(', '.join(map(str, said.tapes)))}</p>")
        return "".join(parts)


def stacks_of(model: nn.Module) -> Dict[str, LayerStack]:
    """The stacks of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}


def padded(rows: Sequence[Sequence[int]], padding: int, device=None) -> Dict[str, Tensor]:
    """Numbers of words as ``input_ids`` and ``attention_mask``, [B, T], padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max()) if len(rows) else 0), padding)
    for row, numbers in zip(ids, rows):
        row[: len(numbers)] = torch.as_tensor(numbers)
    mask = torch.arange(ids.size(1)) < lengths[:, None]
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def shaded(stack: LayerStack, trace: Trace, row: int, tokens: Sequence[str]) -> Sentence:
    """A text by how often its tokens were computed.

    Args:
        stack: that has computed them
        trace: of the batch
        row: which of its sequences
        tokens: the first of them, as they are to be shown
    """
    updates = trace.updates[row, : len(tokens)].round().long().tolist()
    if stack.router is not None:
        return Sentence(
            list(tokens), [each + 1 for each in updates], trace.most + 1, "layers that computed it", None, 0
        )
    if stack.halting is None:
        updates = [trace.most] * len(tokens)
    return Sentence(list(tokens), [max(1, each) for each in updates], trace.most)


def texts_of(texts: Any) -> List[Any]:
    """A list of texts, of one or of several.

    Raises:
        UsageError: for what is no text
    """
    found = [texts] if isinstance(texts, str) else list(texts)
    for text in found:
        if not isinstance(text, str):
            raise UsageError(f"{text!r:.60} is no text: give a string, or several")
    return found
