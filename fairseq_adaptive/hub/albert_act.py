"""Published ALBERT-ACT in plain Python::

from fairseq_adaptive.hub import AlbertActModel
from fairseq_adaptive.report.depth_map import depth_tables, to_html, to_text

model = AlbertActModel.from_pretrained("FOLDER")  # or a name on the Hugging Face hub
output = model(**model.encode(["a lump in the middle of the monkeys stirred and then fell quiet ."]))
output.updates  # B x T
sentences = model.depths(open("text.txt"))
print(to_text(sentences[0], colour=True))
page, tables = to_html(sentences, "Depth"), depth_tables(sentences)
"""

import os
from argparse import Namespace
from typing import Dict, Iterable, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
from fairseq_adaptive.data.albert_tokenizer import FILE, AlbertTokenizer
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.loading import local_folder
from fairseq_adaptive.hub.pretrained import Pretrained, padded
from fairseq_adaptive.interop import albert_act
from fairseq_adaptive.interop.conversion import read_folder
from fairseq_adaptive.models.albert_act import AlbertActModel as _FairseqModel
from fairseq_adaptive.modules import Trace
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.report.depth_map import Sentence, read_depths


class AlbertActOutput(NamedTuple):
    """What a model returns; padding has 0 updates and remainders.

    ``trace`` tells depth by depth what happened to each token.
    """

    last_hidden_state: Tensor  # B x T x C
    pooler_output: Tensor  # B x C
    updates: Tensor  # B x T, how often each token went through the layer
    remainders: Tensor  # B x T
    trace: Trace


class AlbertActModel(nn.Module, Pretrained):
    """ALBERT-ACT (Simoulin and Crabbe, 2021); ids are those of the published tokenizer.

    In evaluation without gradients halted tokens are left out of the computation.

    Attributes:
        config: what ``config.json`` says
        model: fairseq's model
        tokenizer: None where the folder had no ``spiece.model``
    """

    def __init__(self, config, model, tokenizer=None):
        super().__init__()
        self.config, self.model, self.tokenizer = config, model, tokenizer
        order = torch.tensor(albert_act.row_order(config))
        self.register_buffer("_fairseq_ids", order.argsort(), persistent=False)

    @classmethod
    def from_pretrained(cls, folder_or_hub_name: str, int8: bool = False) -> "AlbertActModel":
        """Return a model in evaluation mode.

        Args:
            folder_or_hub_name: a folder with ``config.json``, ``pytorch_model.bin`` or ``model.safetensors`` and
                ``spiece.model`` (without which the model reads ids alone), or a name on the Hugging Face hub, such as
                ``asi/albert-act-base``
            int8: run the maps of the layer in int8, for inference on a CPU

        Raises:
            UsageError: when it is neither, does not hold an ALBERT-ACT, or the tokenizer is not that of the model;
                where int8 cannot run
        """
        folder = local_folder(folder_or_hub_name)
        config, tensors = read_folder(folder)
        args = Namespace(**albert_act.read_config(config))
        if os.path.isfile(os.path.join(folder, FILE)):
            tokenizer = AlbertTokenizer.from_folder(folder)
            dictionary = albert_act.dictionary_of(tokenizer, config)
        else:
            tokenizer, dictionary = None, albert_act.numbered_dictionary(config["vocab_size"])
        model = _FairseqModel.build_model(args, Namespace(source_dictionary=dictionary))
        model.load_state_dict(albert_act.convert_weights(tensors, config), strict=True)
        return cls(config, model.int8() if int8 else model, tokenizer).eval()

    def needs_tokenizer(self) -> AlbertTokenizer:
        """Return the tokenizer.

        Raises:
            UsageError: when the model came without one
        """
        if self.tokenizer is None:
            raise UsageError(f"the model came without a tokenizer: put its {FILE} into its folder")
        return self.tokenizer

    def encode(self, texts: Iterable[str]) -> Dict[str, Tensor]:
        """Texts to ``input_ids`` and ``attention_mask``, B x T, with [CLS] and [SEP], padded on the right.

        Raises:
            UsageError: when the model came without a tokenizer, or a text is longer than it reads
        """
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        cls, sep, pad = (self.config.get(name, albert_act.SPECIAL[name]) for name in names)
        encode, device = self.needs_tokenizer().encode, self._fairseq_ids.device
        given = padded([[cls, *encode(text), sep] for text in texts], pad, device)
        most = self.config["max_position_embeddings"]
        length = given["input_ids"].size(1)
        if length > most:
            raise UsageError(f"a text has {length} tokens, but the model reads {most} at most: divide it")
        return given

    @constant_weights()
    def depths(self, texts: Iterable[str], batch_size: int = 16) -> List[Sentence]:
        """Texts as tokens with the number of updates of each, to be shown by :mod:`fairseq_adaptive.report.depth_map`.

        Texts that are too long are read in parts, empty ones are left out; ``batch_size`` texts are read at a time.

        Raises:
            UsageError: when the model came without a tokenizer
        """
        pieces = [self.needs_tokenizer().tokenize(text) for text in texts]
        with self._watched():
            found = list(read_depths(self.model, self.model.encoder.dictionary, pieces, batch_size))
        self._show(found)
        return found

    def save_pretrained(self, folder) -> None:
        """Write a new folder in the published layout: ``config.json``, ``model.safetensors`` and, where the model has a
        tokenizer, its files.

        Raises:
            UsageError: where ``folder`` exists or cannot be written
        """
        albert_act.write_published(folder, self.config, self.model.state_dict(), self.tokenizer)

    def forward(
        self, input_ids: Tensor, attention_mask: Optional[Tensor] = None, token_type_ids: Optional[Tensor] = None
    ) -> AlbertActOutput:
        """
        Args:
            input_ids: B x T
            attention_mask: B x T, 1 at tokens and 0 at padding (default: 1)
            token_type_ids: B x T, 0 in the first text and 1 in the second (default: 0)

        Raises:
            UsageError: when an id is outside the vocabulary, which another tokenizer gives, or shapes differ
        """
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config["vocab_size"]:
            raise UsageError(
                f"ids go up to {int(input_ids.max())}, but the vocabulary has "
                f"{self.config['vocab_size']}: the tokenizer is not that of this model"
            )
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise UsageError(f"{name} is {tuple(given.shape)}, but input_ids are {tuple(input_ids.shape)}")
        padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0
        with self._watched() as traces:
            states, extra = self.model(
                self._fairseq_ids[input_ids], features_only=True, segments=token_type_ids, padding_mask=padding
            )
        (trace,) = traces["encoder.layers"]
        return AlbertActOutput(states, extra["pooled"], trace.updates, trace.remainders, trace)
