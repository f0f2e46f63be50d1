"""Models whose input is no text: classes of images, and the parity of sequences, with tapes."""

import os
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import as_checkpoint, needs_fairseq, origin_of
from fairseq_adaptive.hub.loading import default_device, located, trained_state
from fairseq_adaptive.hub.pretrained import Pretrained
from fairseq_adaptive.ranges import BATCH


class Class(NamedTuple):
    """What a model says of an input.

    Attributes:
        label: the most probable one
        probabilities: of all, the greatest first
        tape: how many tape tokens the model read; None: it has no tape
    """

    label: str
    probabilities: Dict[str, float]
    tape: Optional[int]


class _Tapes(Pretrained):
    """What both have in common.

    Attributes:
        labels: in the order of the model's output
    """

    labels: Sequence[str]

    def __init__(self, model, task):
        self.model, self.task = model.eval(), task

    def _classes(self, batches) -> List[Class]:
        found, tapes = [], []
        for batch in batches:
            with self._watched() as traces:
                logits = self.model(batch)[0].float()
            if not logits.isfinite().all():
                raise UsageError("the model gives scores that are NaN or infinite: it overflows on this input")
            lengths = [each[-1].tape_len.tolist() for each in traces.values() if each and each[-1].reading is not None]
            for row, scores in enumerate(logits.softmax(-1).tolist()):
                ranked = dict(sorted(zip(self.labels, scores), key=lambda each: -each[1]))
                tapes += [lengths[0][row]] if lengths else []
                found.append(Class(next(iter(ranked)), ranked, lengths[0][row] if lengths else None))
        self._show((), tapes)
        return found


class ImageClassifier(_Tapes):
    """A model that ``--task image_classification`` has trained.

    Example:
        >>> model = ImageClassifier.from_pretrained("checkpoint_best.pt", classes=["t-shirt", ...])
        >>> model.predict(images)[0].tape  # images: uint8, B x H x W
        3
    """

    @classmethod
    def from_pretrained(
        cls, source, classes: Optional[Sequence[str]] = None, data=None, device=None
    ) -> "ImageClassifier":
        """
        Args:
            source: a checkpoint, a folder of :meth:`save_pretrained`, or the name of such a folder on the Hugging Face hub
            classes: their names (default: those of the training data)
            data: folder of the images (default: that of the training; a folder of :meth:`save_pretrained` needs none)
            device: (default: a GPU if there is one)

        Raises:
            UsageError: when files are missing, or of another task
        """
        source = located(source)
        needs_fairseq(f"{source}, a model of images,")
        import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
        from fairseq_adaptive.interop.checkpoint import load_trained

        with as_checkpoint(source) as (path, folder, saved):
            state = trained_state(path, source, "image_classification")
            if saved.get("images") is not None:
                task = _Images(**saved["images"])
                (model,) = _ensemble(path, task)
            else:
                model, _, task = load_trained(path, {} if data is None else {"data": os.fspath(data)})
        model.to(device or default_device())
        names = list(map(str, task.classes if classes is None else classes))
        if len(names) != len(task.classes):
            raise UsageError(f"there are {len(names)} names of classes, but the model has {len(task.classes)}")
        about = {"image_size": list(task.image_size), "channels": int(task.channels), "classes": names}
        made = cls(model, _Images(**about))
        made.origin = origin_of(state, {"images": about})
        return made

    @property
    def labels(self):
        return self.task.classes

    def encode(self, images) -> Dict[str, Tensor]:
        """``image``, [B, channels, H, W], -1 to 1, of bytes.

        Args:
            images: uint8, [B, H, W] or [B, H, W, channels], an array or a tensor, of the size of the training

        Raises:
            UsageError: for another type or shape
        """
        images = torch.as_tensor(images)
        images = images.unsqueeze(-1) if images.dim() == 3 else images
        size = (*self.task.image_size, self.task.channels)
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != size:
            raise UsageError(
                f"images are {images.dtype} of {tuple(images.shape)}: give bytes (uint8) of [B, {', '.join(map(str, size))}]"
            )
        return {"image": images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous().to(self.device)}

    @torch.no_grad()
    def predict(self, images, batch_size: int = 32) -> List[Class]:
        """The class of each image.

        Raises:
            UsageError: as :meth:`encode`, and for a batch size below 1
        """
        BATCH.check(batch_size, "batch_size")
        return self._classes(self.encode(images)["image"].split(batch_size))


class ParityModel(_Tapes):
    """A model that ``--task parity`` has trained: whether the number of ones in a sequence of 1, 0 and -1 is odd."""

    labels = ("0", "1")

    @classmethod
    def from_pretrained(cls, source, device=None) -> "ParityModel":
        """
        Args:
            source: a checkpoint, a folder of :meth:`save_pretrained`, or the name of such a folder on the Hugging Face hub
            device: (default: a GPU if there is one)

        Raises:
            UsageError: when it is missing, or of another task
        """
        source = located(source)
        needs_fairseq(f"{source}, a model of parity,")
        import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
        from fairseq_adaptive.interop.checkpoint import load_trained

        with as_checkpoint(source) as (path, _, _):
            state = trained_state(path, source, "parity")
            model, _, task = load_trained(path)
        made = cls(model.to(device or default_device()), task)
        made.origin = origin_of(state)
        return made

    def encode(self, sequences: Sequence[Sequence[int]]) -> Dict[str, Tensor]:
        """``elements``, [B, L]: 0, 1, 2 for -1, 0, 1, and 3 for padding up to the longest that the model reads.

        Raises:
            UsageError: for other numbers, and sequences that are empty or too long
        """
        most, rows = self.task.max_positions(), []
        for each in sequences:
            row = [int(number) for number in each]
            if not 1 <= len(row) <= most or not {*row} <= {-1, 0, 1}:
                raise UsageError(f"a sequence is {str(row)[:40]}: give 1 to {most} numbers, each 1, 0 or -1")
            rows.append([number + 1 for number in row] + [3] * (most - len(row)))
        return {"elements": torch.tensor(rows, device=self.device).view(len(rows), most)}

    @torch.no_grad()
    def predict(self, sequences: Sequence[Sequence[int]], batch_size: int = 32) -> List[Class]:
        """The parity of each sequence, ``1`` where the number of ones is odd.

        Raises:
            UsageError: as :meth:`encode`, and for a batch size below 1
        """
        BATCH.check(batch_size, "batch_size")
        return self._classes(self.encode(sequences)["elements"].split(batch_size))


class _Images:
    """What a model of images asks of its task, without the images."""

    def __init__(self, image_size, channels, classes):
        self.image_size, self.channels, self.classes = tuple(image_size), channels, list(classes)
        self.source_dictionary = None

    def load_state_dict(self, state):
        """A task of images has none."""

    def build_model(self, cfg, from_checkpoint=False):
        from fairseq import models

        return models.build_model(cfg, self, from_checkpoint)


def _ensemble(path, task):
    from fairseq import checkpoint_utils

    return checkpoint_utils.load_model_ensemble([path], task=task)[0]
