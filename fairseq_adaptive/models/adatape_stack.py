"""The stack with a tape: flags of the tape, and an encoder that classifies, for ``adatape_parity`` and ``adatape_vit``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023).
"""

import itertools
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import BaseFairseqModel
from fairseq.utils import get_available_activation_fns
from omegaconf import OmegaConf
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.shared_stack import ExplainsLoading, sharing_config
from fairseq_adaptive.modules import STRATEGIES, EncoderLayer, LayerStack, layer_schedule
from fairseq_adaptive.modules.tape import COSTS, QUERIES, QUERY_UPDATES, GatedMLP, Tape, TapeReader, masked_mean


@dataclass
class TapeConfig(FairseqDataclass):
    tape_tokens: int = field(default=10, metadata={"help": "the longest tape; 0: no tape, a plain Transformer"})
    tape_threshold: float = field(
        default=2.0,
        metadata={"help": "sum of certainties at which a sequence stops reading; a tape token mixes as many bank "
                  "entries as --tape-tokens // this"},
    )
    tape_cost: ChoiceEnum(COSTS) = field(
        default="entropy", metadata={"help": "ponder cost of a step with weights w: 1 - sum of w^2, or 1 - max w"}
    )
    tape_query: ChoiceEnum(QUERIES) = field(
        default="mean",
        metadata={"help": "what the tape is read with: the mean of the states, or the first ([CLS]), which knows the "
                  "others from --tape-layer 1 on"},
    )
    tape_query_update: ChoiceEnum(QUERY_UPDATES) = field(
        default="average", metadata={"help": "the next query: average of query and token read, or that token"}
    )
    tape_key_dim: Optional[int] = field(
        default=None, metadata={"help": "dimensions in which query and entries are compared (default: those of a head)"}
    )
    tape_mlp_dim: int = field(
        default=0, metadata={"help": "width of the gated MLP between bank and sequence; 0: none"}
    )
    tape_ffn_embed_dim: int = field(
        default=0, metadata={"help": "width of the second feed-forward, for tape tokens, in each layer; 0: none"}
    )
    tape_layer: int = field(default=0, metadata={"help": "how many layers run before the tape is read"})
    tape_allow_exhausted: bool = field(
        default=False,
        metadata={"help": "a sequence that has read its whole bank stops, instead of refusing such banks"},
    )
    tape_query_noise: float = field(default=0.0, metadata={"help": "deviation of noise on the query in training"})
    tape_bank_dropout: float = field(
        default=0.0, metadata={"help": "probability that a sequence cannot see an entry in training"}
    )


def build_tape(cfg, embed_dim, heads) -> Optional[Tape]:
    """Return the tape of a :class:`TapeConfig` (or a namespace with its names), None where there is to be none.

    Raises:
        UsageError: when options contradict each other
    """
    if cfg.tape_tokens == 0:
        return None
    reader = TapeReader(
        embed_dim,
        num_tokens=cfg.tape_tokens,
        threshold=cfg.tape_threshold,
        key_dim=cfg.tape_key_dim or embed_dim // heads,
        cost=str(cfg.tape_cost),
        query_update=str(cfg.tape_query_update),
        allow_exhausted=cfg.tape_allow_exhausted,
        query_noise=cfg.tape_query_noise,
        bank_dropout=cfg.tape_bank_dropout,
    )
    mlp = GatedMLP(embed_dim, cfg.tape_mlp_dim) if cfg.tape_mlp_dim else None
    return Tape(reader, mlp, str(cfg.tape_query))


def run_stack(layers, x, padding_mask, tape=None, bank=None, bank_padding_mask=None, tape_layer=0):
    """Run the layers, and on the way read the tape.

    Inference computes no dead tape token: rows with tapes of the same length run together.

    Args:
        layers: a :class:`LayerStack` of encoder layers
        x: T x B x C
        padding_mask: B x T, true at padding, or None
        tape: None for a plain Transformer
        bank: N x C or B x N x C
        bank_padding_mask: B x N, true at entries that are none
        tape_layer: how many layers run before the tape is read

    Returns:
        (T + S) x B x C, padding mask B x (T + S) or None, what was read or None
    """
    remaining = iter(layers)
    if tape is None:
        for layer in remaining:
            x = layer(x, encoder_padding_mask=padding_mask)
        return x, padding_mask, None
    for layer in itertools.islice(remaining, tape_layer):
        x = layer(x, encoder_padding_mask=padding_mask)
    length = x.size(0)
    x, padding_mask, reading = tape(x, padding_mask, bank, bank_padding_mask)
    if layers.training or torch.is_grad_enabled():
        for layer in remaining:
            x = layer(x, encoder_padding_mask=padding_mask, tape_len=x.size(0) - length)
    else:
        x = _run_by_tape_length(list(remaining), x, padding_mask, reading.live.sum(1), length)
    return x, padding_mask, reading


def _run_by_tape_length(layers, x, padding_mask, tape_lens, length):
    out = torch.zeros_like(x)
    for tape_len in tape_lens.unique().tolist():
        rows = (tape_lens == tape_len).nonzero().squeeze(1)
        end = length + tape_len
        part, mask = x[:end, rows], padding_mask[rows, :end]
        mask = mask if mask.any() else None
        for layer in layers:
            part = layer(part, encoder_padding_mask=mask, tape_len=tape_len)
        out[:end, rows] = part.to(out.dtype)
    return out


def tape_report(reading, bank, tape):
    """What criterions and maps read: ``tape`` (a Reading, or None), ``bank_size``, ``bank_shared``, ``max_tokens``."""
    if reading is None:
        return {"tape": None}
    return {
        "tape": reading,
        "bank_size": bank.size(-2),
        "bank_shared": bank.dim() == 2,
        "max_tokens": tape.reader.num_tokens,
    }


@dataclass
class TapeClassifierConfig(TapeConfig):
    encoder_embed_dim: int = field(default=128, metadata={"help": "encoder embedding dimension"})
    encoder_ffn_embed_dim: int = field(default=512, metadata={"help": "encoder embedding dimension for FFN"})
    encoder_layers: int = field(default=4, metadata={"help": "num encoder layers"})
    encoder_attention_heads: int = field(default=4, metadata={"help": "num encoder attention heads"})
    encoder_unique_layers: Optional[int] = field(
        default=None,
        metadata={"help": "how many layers have parameters of their own; they serve --encoder-layers depths "
                  "(default: all; 1: a Universal Transformer)"},
    )
    layer_sharing: ChoiceEnum(STRATEGIES) = field(
        default="cycle", metadata={"help": "which unique layer serves which depth (Takase and Kiyono, 2021)"}
    )
    activation_fn: ChoiceEnum(get_available_activation_fns()) = field(
        default="gelu", metadata={"help": "activation function to use"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout probability for attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout probability after activation in FFN."})


class TapeClassifier(ExplainsLoading, BaseFairseqModel):
    """Pre-LN encoder layers over states and tape, read out by the mean of what is alive.

    Args:
        cfg: :class:`TapeClassifierConfig`
        num_classes: what it chooses from
    """

    def __init__(self, cfg, num_classes):
        super().__init__()
        if cfg.encoder_embed_dim % cfg.encoder_attention_heads:
            raise UsageError(
                f"--encoder-embed-dim {cfg.encoder_embed_dim} cannot be divided among "
                f"{cfg.encoder_attention_heads} heads"
            )
        cfg = Namespace(**(cfg if OmegaConf.is_config(cfg) else vars(cfg)))
        cfg.encoder_unique_layers = cfg.encoder_unique_layers or cfg.encoder_layers
        cfg.encoder_normalize_before, cfg.init = True, "default"
        layer_cfg = sharing_config(cfg, ("encoder",))
        layer_cfg.tape_ffn_embed_dim = cfg.tape_ffn_embed_dim if cfg.tape_tokens else 0
        self.tape = build_tape(cfg, cfg.encoder_embed_dim, cfg.encoder_attention_heads)
        if self.tape and not 0 <= cfg.tape_layer < cfg.encoder_layers:
            raise UsageError(f"--tape-layer is {cfg.tape_layer}: use 0 to {cfg.encoder_layers - 1}")
        self.tape_layer = cfg.tape_layer
        self.layers = LayerStack(
            (EncoderLayer(layer_cfg) for _ in range(cfg.encoder_unique_layers)),
            layer_schedule(layer_cfg.layer_sharing, cfg.encoder_unique_layers, cfg.encoder_layers),
            pass_depth=True,
        )
        self.layer_norm = nn.LayerNorm(cfg.encoder_embed_dim)
        self.output_projection = nn.Linear(cfg.encoder_embed_dim, num_classes)
        nn.init.zeros_(self.output_projection.weight)
        nn.init.zeros_(self.output_projection.bias)

    def classify(self, x, bank=None, bank_padding_mask=None):
        """
        Args:
            x: T x B x C
            bank: N x C or B x N x C
            bank_padding_mask: B x N, true at entries that are none

        Returns:
            logits B x classes, and :func:`tape_report`
        """
        x, padding_mask, reading = run_stack(self.layers, x, None, self.tape, bank, bank_padding_mask, self.tape_layer)
        x = self.layer_norm(x)
        x = x.mean(0) if padding_mask is None else masked_mean(x, padding_mask)
        return self.output_projection(x), tape_report(reading, bank, self.tape)

    def get_targets(self, sample, net_output):
        return sample["target"]

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        logits = net_output[0].float()
        return logits.log_softmax(-1) if log_probs else logits.softmax(-1)
