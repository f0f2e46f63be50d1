"""Vision Transformers that read finer patches when they need them: ``--arch adatape_vit`` and its presets.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023), section 5.2; for ``--task
image_classification``.
"""

from dataclasses import dataclass, field

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_flags import TAPE_LAYER
from fairseq_adaptive.models.adatape_stack import TapeClassifier, TapeClassifierConfig
from fairseq_adaptive.models.defaults import fill_defaults, with_defaults
from fairseq_adaptive.modules.policies.tape import InputBank, LearnedBank
from fairseq_adaptive.ranges import BANK, WIDTH, ranged


@dataclass
class AdaTapeViTConfig(TapeClassifierConfig):
    patch_size: int = ranged(16, WIDTH, "height and width of the patches that make the sequence")
    tape_bank: ChoiceEnum(("input", "learned")) = field(
        default="input", metadata={"help": "the bank: finer patches of the image, or parameters"}
    )
    tape_bank_patch_size: int = ranged(8, WIDTH, "height and width of the patches of the bank")
    tape_bank_size: int = ranged(10000, BANK, "entries of a learned bank")
    tape_layer: int = ranged(1, TAPE_LAYER, "how many layers run before the tape is read")
    read_out: ChoiceEnum(("mean", "class")) = field(
        default="mean", metadata={"help": "what the class is read from: the mean of the states, or a class token"}
    )


class PatchEmbedding(nn.Module):
    """Patches of an image, B x channels x H x W, as states B x N x C.

    Args:
        name: the flag that sets the size, for messages
        size: height and width of a patch
        image_size: (H, W)
        channels: of the image
        embed_dim: C

    Raises:
        UsageError: when patches do not fill the image
    """

    def __init__(self, name, size, image_size, channels, embed_dim):
        super().__init__()
        height, width = image_size
        if size < 1 or height % size or width % size:
            raise UsageError(
                f"{name} is {size}, and does not divide images of {height} x {width}: use a size that does"
            )
        self.count = (height // size) * (width // size)
        self.projection = nn.Conv2d(channels, embed_dim, size, stride=size)

    def forward(self, image: Tensor) -> Tensor:
        return self.projection(image).flatten(2).transpose(1, 2)


@register_model("adatape_vit", dataclass=AdaTapeViTConfig)
class AdaTapeViT(TapeClassifier):
    """A Vision Transformer with a tape; ``--tape-tokens 0`` gives the plain one.

    Args:
        cfg: namespace with the flags of :class:`AdaTapeViTConfig`
        image_size: (H, W)
        channels: of the images
        num_classes: what it chooses from
    """

    def __init__(self, cfg, image_size, channels, num_classes):
        super().__init__(cfg, num_classes)
        embed_dim = cfg.encoder_embed_dim
        self.embedding = PatchEmbedding("--patch-size", cfg.patch_size, image_size, channels, embed_dim)
        from_class = str(cfg.read_out) == "class"
        self.class_token = nn.Parameter(torch.zeros(embed_dim)) if from_class else None
        self.positions = nn.Parameter(torch.randn(self.embedding.count + from_class, embed_dim) * 0.02)
        self.dropout = nn.Dropout(cfg.dropout)
        self.bank_embedding = self.bank = None
        if self.tape and str(cfg.tape_bank) == "learned":
            self.tape.reader.check_bank(cfg.tape_bank_size)
            self.bank = LearnedBank(cfg.tape_bank_size, embed_dim)
        elif self.tape:
            self.bank_embedding = PatchEmbedding(
                "--tape-bank-patch-size", cfg.tape_bank_patch_size, image_size, channels, embed_dim
            )
            self.tape.reader.check_bank(self.bank_embedding.count)
            self.bank = InputBank(embed_dim, embed_dim, positions=self.bank_embedding.count)

    @classmethod
    def build_model(cls, cfg, task):
        if not hasattr(task, "image_size"):
            raise UsageError(f"--arch {cfg._name} is a model for --task image_classification")
        cfg = with_defaults(cfg, AdaTapeViTConfig)
        return cls(cfg, task.image_size, task.channels, len(task.classes))

    def forward(self, image: Tensor, **unused):
        """
        Args:
            image: B x channels x H x W

        Returns:
            logits B x classes, and what :func:`~fairseq_adaptive.models.adatape_stack.tape_report` tells
        """
        image = image.to(self.positions.dtype)
        x = self.embedding(image)
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), 1)
        x = self.dropout(x + self.positions).transpose(0, 1)  # N x B x C, the class token first
        bank = None
        if self.bank is not None:
            bank = self.bank() if self.bank_embedding is None else self.bank(self.bank_embedding(image))
        return self.classify(x, bank, from_first=self.class_token is not None)


SIZES = {  # width, feed-forward, heads, depth (Dosovitskiy et al., 2021; Touvron et al., 2021)
    "ti": (192, 768, 3, 12),
    "s": (384, 1536, 6, 12),
    "b": (768, 3072, 12, 12),
}


def _register(size, patch):
    """``adatape_vit_s16``: the gated MLP before the sequence is as wide as the feed-forward, as in the public code."""
    width, ffn, heads, depth = SIZES[size]

    @register_model_architecture("adatape_vit", f"adatape_vit_{size}{patch}")
    def architecture(args):
        fill_defaults(
            args,
            encoder_embed_dim=width,
            encoder_ffn_embed_dim=ffn,
            encoder_attention_heads=heads,
            encoder_layers=depth,
            patch_size=patch,
            tape_bank_patch_size=patch // 2,
            tape_mlp_dim=ffn,
        )


for _size in SIZES:
    for _patch in (32, 16):
        _register(_size, _patch)


@register_model_architecture("adatape_vit", "adatape_vit_mini")
def adatape_vit_mini(args):
    """For images of 28 x 28: patches of 7, a bank of patches of 4, width 64."""
    fill_defaults(
        args,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=128,
        encoder_attention_heads=4,
        encoder_layers=4,
        patch_size=7,
        tape_bank_patch_size=4,
        tape_mlp_dim=128,
        tape_ffn_embed_dim=128,
        tape_tokens=8,
    )


_MERGING = {"tape_tokens": 0, "read_out": "class", "router": "token_merging"}


@register_model_architecture("adatape_vit", "token_merging_vit_s16")
def token_merging_vit_s16(args):
    """A plain ViT-S/16 with a class token, in which 13 tokens are merged before each depth but the first: of an image of
    224 x 224, with 197 tokens, 54 are left at the last."""
    fill_defaults(args, router_args='{"r": 13}', **_MERGING)
    ARCH_CONFIG_REGISTRY["adatape_vit_s16"](args)


@register_model_architecture("adatape_vit", "token_merging_vit_mini")
def token_merging_vit_mini(args):
    """For images of 28 x 28: patches of 4, width 64, 4 layers; 10 of 50 tokens are merged before each depth but the first."""
    fill_defaults(args, patch_size=4, router_args='{"r": 10}', **_MERGING)
    adatape_vit_mini(args)
