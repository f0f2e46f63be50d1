"""The stack with a tape: its run, and an encoder that classifies, for ``adatape_parity`` and ``adatape_vit``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023).
"""

import itertools
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel
from fairseq.utils import get_available_activation_fns
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_flags import TapeConfig, build_router, build_tape, check_flags
from fairseq_adaptive.models.shared_stack import ExplainsLoading, sharing_config
from fairseq_adaptive.modules import STRATEGIES, EncoderLayer, LayerStack, Step, Trace, layer_schedule
from fairseq_adaptive.modules.halting_rules import build_halting
from fairseq_adaptive.modules.packing import token_mask
from fairseq_adaptive.modules.tape import masked_mean
from fairseq_adaptive.ranges import DROPOUT, FFN_WIDTH, HEADS, LAYERS, WIDTH, ranged


def run_stack(layers, x, padding_mask, tape=None, bank=None, bank_padding_mask=None, tape_layer=0):
    """Run the layers, and on the way read the tape.

    Inference computes no dead tape token: rows with tapes of the same length run together; where tokens halt or are
    skimmed, those of all rows do. The trace of the run says how long the tapes were.

    Args:
        layers: a :class:`LayerStack` of encoder layers
        x: T x B x C
        padding_mask: B x T, true at padding, or None
        tape: None for a plain Transformer
        bank: N x C or B x N x C
        bank_padding_mask: B x N, true at entries that are none
        tape_layer: how many layers run before the tape is read; 0 where tokens halt or are skimmed

    Returns:
        (T + S) x B x C, padding mask B x (T + S) or None, what was read or None. Where ``layers.every_depth`` is set
        and PonderNet trains, N B takes the place of the first B
    """
    adaptive = layers.halting is not None or layers.router is not None
    depths, length, reading = [], x.size(0), None

    def noted():
        for layer in layers:
            depths.append(None if adaptive else layer.keywords["depth"])
            yield layer

    remaining = noted()
    if tape is not None:
        for layer in itertools.islice(remaining, tape_layer):
            x = layer(x, encoder_padding_mask=padding_mask)
        x, padding_mask, reading = tape(x, padding_mask, bank, bank_padding_mask)
    where = {"encoder_padding_mask": padding_mask, "tape_len": x.size(0) - length}
    if layers.router is not None:
        where["protected"] = torch.zeros(x.size(1), x.size(0), dtype=torch.bool, device=x.device)
        where["protected"][:, 0] = True
    if reading is None or adaptive or layers.training or torch.is_grad_enabled():
        for layer in remaining:
            x = layer(x, **where)
    else:
        x = _run_by_tape_length(list(remaining), x, padding_mask, reading.live.sum(1), length)
    if layers.recorder is not None and not adaptive:
        layers.record(_trace(layers, depths, token_mask(x, padding_mask), reading, tape_layer))
    return x, padding_mask, reading


def _trace(layers, depths, tokens, reading, tape_layer):
    """Of a run in which all tokens go through the layers at ``depths``, those of the tape from ``tape_layer`` on."""
    trace = Trace(tokens, len(layers))
    for place, depth in enumerate(depths):
        alive, tape = tokens, None if reading is None else reading.live.sum(1)
        if reading is not None and place < tape_layer:
            alive, tape = tokens.clone(), torch.zeros_like(tape)
            alive[:, -reading.live.size(1) :] = False
        trace.steps.append(Step(layers.schedule[depth], alive, tape=tape))
    return trace


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
    encoder_embed_dim: int = ranged(128, WIDTH, "encoder embedding dimension")
    encoder_ffn_embed_dim: int = ranged(512, FFN_WIDTH, "encoder embedding dimension for FFN")
    encoder_layers: int = ranged(4, LAYERS, "num encoder layers")
    encoder_attention_heads: int = ranged(4, HEADS, "num encoder attention heads")
    encoder_unique_layers: Optional[int] = ranged(
        None, LAYERS, "how many layers have parameters of their own; they serve --encoder-layers depths (default: all; "
        "1: a Universal Transformer)"
    )
    layer_sharing: ChoiceEnum(STRATEGIES) = field(
        default="cycle", metadata={"help": "which unique layer serves which depth (Takase and Kiyono, 2021)"}
    )
    activation_fn: ChoiceEnum(get_available_activation_fns()) = field(
        default="gelu", metadata={"help": "activation function to use"}
    )
    dropout: float = ranged(0.0, DROPOUT, "dropout probability")
    attention_dropout: float = ranged(0.0, DROPOUT, "dropout probability for attention weights")
    activation_dropout: float = ranged(0.0, DROPOUT, "dropout probability after activation in FFN.")


class TapeClassifier(ExplainsLoading, BaseFairseqModel):
    """Pre-LN encoder layers over states and tape, read out by the mean of what is there, or from the first state.

    Args:
        cfg: namespace with the flags of a :class:`TapeClassifierConfig`
        num_classes: what it chooses from
    """

    def __init__(self, cfg, num_classes):
        super().__init__()
        check_flags(cfg, type(self))
        cfg = Namespace(**vars(cfg))
        if cfg.encoder_unique_layers is None:
            cfg.encoder_unique_layers = cfg.encoder_layers
        cfg.encoder_normalize_before, cfg.init = True, "default"
        if str(cfg.halting) == "pondernet":
            raise UsageError(
                "--halting pondernet needs one token to read the output from, whose depth weighs the loss; here it is "
                "read from all of them: use --halting act or ut_act"
            )
        layer_cfg = sharing_config(cfg, ("encoder",))
        layer_cfg.tape_ffn_embed_dim = cfg.tape_ffn_embed_dim if cfg.tape_tokens else 0
        self.tape = build_tape(cfg, cfg.encoder_embed_dim, cfg.encoder_attention_heads, cfg.encoder_layers)
        self.tape_layer = cfg.tape_layer
        self.layers = LayerStack(
            (EncoderLayer(layer_cfg) for _ in range(cfg.encoder_unique_layers)),
            layer_schedule(layer_cfg.layer_sharing, cfg.encoder_unique_layers, cfg.encoder_layers),
            pass_depth=True,
            halting=build_halting(str(cfg.halting), cfg.encoder_embed_dim, cfg.halting_threshold),
            router=build_router(cfg, cfg.encoder_embed_dim, cfg.encoder_layers),
        )
        self.layer_norm = nn.LayerNorm(cfg.encoder_embed_dim)
        self.output_projection = nn.Linear(cfg.encoder_embed_dim, num_classes)
        nn.init.zeros_(self.output_projection.weight)
        nn.init.zeros_(self.output_projection.bias)

    def classify(self, x, bank=None, bank_padding_mask=None, from_first=False):
        """
        Args:
            x: T x B x C
            bank: N x C or B x N x C
            bank_padding_mask: B x N, true at entries that are none
            from_first: read the first state rather than the mean

        Returns:
            logits B x classes, and :func:`tape_report`
        """
        x, padding_mask, reading = run_stack(self.layers, x, None, self.tape, bank, bank_padding_mask, self.tape_layer)
        x = self.layer_norm(x)
        if from_first:
            x = x[0]
        else:
            x = x.mean(0) if padding_mask is None else masked_mean(x, padding_mask)
        return self.output_projection(x), tape_report(reading, bank, self.tape)

    def get_targets(self, sample, net_output):
        return sample["target"]

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        logits = net_output[0].float()
        return logits.log_softmax(-1) if log_probs else logits.softmax(-1)
