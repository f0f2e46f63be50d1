"""Published models in plain Python, without fairseq's tasks."""

import os
from argparse import Namespace
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

import fairseq_adaptive  # noqa: F401  mends what fairseq needs mended
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import albert_act
from fairseq_adaptive.interop.conversion import read_folder
from fairseq_adaptive.models.albert_act import AlbertActModel as _FairseqModel
from fairseq_adaptive.modules import Trace, recording


class AlbertActOutput(NamedTuple):
    """What a model returns; padding has 0 updates and remainders.

    ``trace`` tells depth by depth what happened to each token.
    """

    last_hidden_state: Tensor  # B x T x C
    pooler_output: Tensor  # B x C
    updates: Tensor  # B x T, how often each token went through the layer
    remainders: Tensor  # B x T
    trace: Trace


class AlbertActModel(nn.Module):
    """ALBERT-ACT (Simoulin and Crabbe, 2021); ids are those of the published tokenizer.

    In evaluation without gradients halted tokens are left out of the computation.

    Attributes:
        config: what ``config.json`` says
        model: fairseq's model
    """

    def __init__(self, config, model):
        super().__init__()
        self.config, self.model = config, model
        order = torch.tensor(albert_act.row_order(config))
        self.register_buffer("_fairseq_ids", order.argsort(), persistent=False)

    @classmethod
    def from_pretrained(cls, folder_or_hub_name: str) -> "AlbertActModel":
        """Return a model in evaluation mode.

        Args:
            folder_or_hub_name: a folder with ``config.json`` and ``pytorch_model.bin`` or ``model.safetensors``, or a
                name on the Hugging Face hub, such as ``asi/albert-act-base``

        Raises:
            UsageError: when it is neither, or does not hold an ALBERT-ACT
        """
        config, tensors = read_folder(_folder(folder_or_hub_name))
        args = Namespace(**albert_act.read_config(config))
        dictionary = albert_act.numbered_dictionary(config["vocab_size"])
        model = _FairseqModel.build_model(args, Namespace(source_dictionary=dictionary))
        model.load_state_dict(albert_act.convert_weights(tensors, config), strict=True)
        return cls(config, model).eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
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
            raise UsageError(f"ids go up to {int(input_ids.max())}, but the vocabulary has "
                             f"{self.config['vocab_size']}: the tokenizer is not that of this model")
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise UsageError(f"{name} is {tuple(given.shape)}, but input_ids are {tuple(input_ids.shape)}")
        padding = torch.zeros_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask == 0
        with recording(self.model) as traces:
            states, extra = self.model(
                self._fairseq_ids[input_ids], features_only=True, segments=token_type_ids, padding_mask=padding
            )
        (trace,) = traces["encoder.layers"]
        return AlbertActOutput(states, extra["pooled"], trace.updates, trace.remainders, trace)


def _folder(name) -> str:
    if os.path.isdir(name):
        return os.fspath(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(f"there is no folder {name}; to load it from the Hugging Face hub by this name, install "
                         "huggingface_hub") from None
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.bin", "*.safetensors", "*.model"])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} is neither a folder nor on the Hugging Face hub: {reason}") from error
