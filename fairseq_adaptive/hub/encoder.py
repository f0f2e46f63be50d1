"""The encoder of a translation model, in plain torch."""

from typing import Dict, Iterable, List, Union

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import Origin, as_plain_origin
from fairseq_adaptive.hub.loading import local_folder
from fairseq_adaptive.hub.plain import load_plain, plain_task
from fairseq_adaptive.hub.pretrained import Pretrained, padded, shaded, stacks_of, texts_of
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights


class Encoder(Pretrained):
    """Texts to states, with torch and safetensors alone; tokens that are left out or have halted are not computed.

    Texts are cut at spaces, as fairseq's dictionaries do: give them in the pieces that the model was trained on.

    Example:
        >>> encoder = Encoder.from_pretrained("FOLDER")  # of Translator.save_pretrained
        >>> encoder.states(["ein mann ."]).shape
        torch.Size([1, 4, 128])
    """

    def __init__(self, model, task, origin: Origin = None):
        self.model, self.task, self.origin = model.eval(), task, origin

    @classmethod
    def from_pretrained(cls, source, device=None) -> "Encoder":
        """
        Args:
            source: a folder of ``Translator.save_pretrained``, or a name on the Hugging Face hub
            device: (default: the CPU)

        Raises:
            UsageError: for what is no such folder, and for models whose encoders plain torch does not build, by name
        """
        folder = local_folder(source)
        model, config = load_plain(folder)
        if config["task"] != "translation":
            raise UsageError(f"{folder} has a model of --task {config['task']}: read it with hub.from_pretrained")
        return cls(model.to(device or "cpu"), plain_task(folder, config), as_plain_origin(folder, config))

    def encode(self, texts: Union[str, Iterable[str]]) -> Dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, [B, T], with ``</s>`` behind each text.

        Raises:
            UsageError: for what is no text, or longer than the model reads
        """
        words = self.task.source_dictionary
        rows = [[*map(words.index, text.split()), words.eos()] for text in texts_of(texts)]
        most = self.model.about.max_positions
        if any(len(row) > most for row in rows):
            raise UsageError(f"a text has {max(map(len, rows))} tokens, but the model reads {most} at most: divide it")
        return padded(rows, words.pad(), self.device)

    @torch.no_grad()
    @constant_weights()
    def states(self, texts: Union[str, Iterable[str]]) -> Tensor:
        """[B, T, C], 0 at padding."""
        given = self.encode(texts)
        with self._watched() as traces:
            found = self.model(given["input_ids"])
        self._show(self._shaded(given, traces))
        return found * given["attention_mask"][..., None]

    def _shaded(self, given, traces) -> List:
        words, ((name, stack),) = self.task.source_dictionary, stacks_of(self.model).items()
        shown = [[f"▁{words[number]}" for number in row[row != words.pad()].tolist()] for row in given["input_ids"]]
        return [shaded(stack, traces[name][-1], row, tokens) for row, tokens in enumerate(shown)]

    def translate(self, *texts, **options):
        """
        Raises:
            UsageError: always: decoders are not built without fairseq
        """
        raise UsageError(
            "decoders are not built in plain torch: install fairseq to translate, and read the folder with "
            "hub.from_pretrained"
        )
