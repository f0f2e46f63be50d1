"""Parity of a sequence that comes as one token: ``--arch adatape_parity``, for ``--task parity``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023), section 5.1.
"""

from dataclasses import dataclass

from fairseq.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_flags import TAPE_HELP
from fairseq_adaptive.models.adatape_stack import TapeClassifier, TapeClassifierConfig
from fairseq_adaptive.models.defaults import with_defaults
from fairseq_adaptive.modules.policies.tape import InputBank
from fairseq_adaptive.ranges import LAYERS, OPTIONAL_WIDTH, ranged


@dataclass
class AdaTapeParityConfig(TapeClassifierConfig):
    encoder_layers: int = ranged(1, LAYERS, "num encoder layers")
    tape_mlp_dim: int = ranged(128, OPTIONAL_WIDTH, TAPE_HELP["tape_mlp_dim"])
    tape_ffn_embed_dim: int = ranged(128, OPTIONAL_WIDTH, TAPE_HELP["tape_ffn_embed_dim"])


@register_model("adatape_parity", dataclass=AdaTapeParityConfig)
class AdaTapeParity(TapeClassifier):
    """The whole sequence makes the one input token, each of its elements a bank entry.

    Entries have no position: equal elements are equal entries, which the reading takes together.

    Args:
        cfg: namespace with the flags of :class:`AdaTapeParityConfig`
        length: L, the longest sequence
    """

    def __init__(self, cfg, length):
        super().__init__(cfg, num_classes=2)
        self.embedding = nn.Linear(3 * length, cfg.encoder_embed_dim)
        self.bank = InputBank(3, cfg.encoder_embed_dim) if self.tape else None
        if self.tape:
            self.tape.reader.check_bank(length)

    @classmethod
    def build_model(cls, cfg, task):
        length = getattr(task.cfg, "sequence_length", None)
        if length is None:
            raise UsageError("--arch adatape_parity is a model for --task parity")
        return cls(with_defaults(cfg, AdaTapeParityConfig), length)

    def forward(self, elements: Tensor, **unused):
        """
        Args:
            elements: B x L; 0, 1, 2 for the elements -1, 0, 1, and 3 for padding

        Returns:
            logits B x 2, and what :meth:`~TapeClassifier.classify` tells
        """
        one_hot = F.one_hot(elements, 4)[..., :3].type_as(self.embedding.weight)  # B x L x 3
        x = self.embedding(one_hot.flatten(1)).unsqueeze(0)  # 1 x B x C
        if self.tape is None:
            return self.classify(x)
        padding = elements.eq(3)
        return self.classify(x, self.bank(one_hot), padding if padding.any() else None)
