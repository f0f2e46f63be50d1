"""The stack with a tape: an encoder that classifies, for ``adatape_parity`` and ``adatape_vit``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023).
"""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.models import BaseFairseqModel
from fairseq.utils import get_available_activation_fns
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_flags import TapeConfig, build_tape, check_flags, tape_policies
from fairseq_adaptive.models.fitting import ExplainsLoading
from fairseq_adaptive.models.int8 import HELP, RunsInInt8, as_asked
from fairseq_adaptive.models.sharing_flags import DEPTH_LORA_HELP, sharing_config
from fairseq_adaptive.modules import STRATEGIES, EncoderLayer, LayerStack, layer_schedule
from fairseq_adaptive.modules.policies import Place
from fairseq_adaptive.modules.policies.tape import masked_mean
from fairseq_adaptive.ranges import DROPOUT, FFN_WIDTH, HEADS, LAYERS, OPTIONAL_WIDTH, WIDTH, ranged


def run_tape(layers, x, padding_mask, tape=None, bank=None, bank_padding_mask=None, states=None):
    """Run the layers, and on the way read the tape; the first token is never left out.

    Args:
        layers: a :class:`LayerStack` of encoder layers
        x: T x B x C
        padding_mask: B x T, true at padding, or None
        tape: None for a plain Transformer
        bank: N x C or B x N x C
        bank_padding_mask: B x N, true at entries that are none
        states: takes the states after each depth

    Returns:
        (T + S) x B x C, padding mask B x (T + S) or None, what was read or None. Where ``layers.every_depth`` is set
        and PonderNet trains, N B takes the place of the first B
    """
    protected = None
    if layers.router is not None:
        protected = torch.zeros(x.size(1), x.size(0), dtype=torch.bool, device=x.device)
        protected[:, 0] = True
    if tape is None:
        return layers(x, padding_mask, protected, states=states), padding_mask, None
    bank = {"bank": bank, "bank_padding_mask": bank_padding_mask}
    return layers(x, padding_mask, protected, reader=tape, states=states, **bank)


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
        None,
        LAYERS,
        "how many layers have parameters of their own; they serve --encoder-layers depths (default: all; "
        "1: a Universal Transformer)",
    )
    layer_sharing: ChoiceEnum(STRATEGIES) = field(
        default="cycle", metadata={"help": "which unique layer serves which depth (Takase and Kiyono, 2021)"}
    )
    depth_lora_rank: int = ranged(0, OPTIONAL_WIDTH, DEPTH_LORA_HELP)
    activation_fn: ChoiceEnum(get_available_activation_fns()) = field(
        default="gelu", metadata={"help": "activation function to use"}
    )
    dropout: float = ranged(0.0, DROPOUT, "dropout probability")
    attention_dropout: float = ranged(0.0, DROPOUT, "dropout probability for attention weights")
    activation_dropout: float = ranged(0.0, DROPOUT, "dropout probability after activation in FFN.")
    int8: bool = field(default=False, metadata={"help": HELP})


class TapeClassifier(RunsInInt8, ExplainsLoading, BaseFairseqModel):
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
        policies = tape_policies(cfg)
        layer_cfg = sharing_config(cfg, ("encoder",), encoder=policies)
        layer_cfg.tape_ffn_embed_dim = cfg.tape_ffn_embed_dim if cfg.tape_tokens else 0
        self.tape = build_tape(cfg, cfg.encoder_embed_dim, cfg.encoder_attention_heads, cfg.encoder_layers)
        schedule = layer_schedule(layer_cfg.layer_sharing, cfg.encoder_unique_layers, cfg.encoder_layers)
        place = Place(cfg.encoder_embed_dim, cfg.encoder_layers, heads=cfg.encoder_attention_heads, schedule=schedule)
        self.layers = LayerStack(
            (EncoderLayer(layer_cfg) for _ in range(cfg.encoder_unique_layers)),
            schedule,
            pass_depth=True,
            lora_rank=layer_cfg.depth_lora_rank,
            **policies.stack_arguments(place),
        )
        self.layers.check_reader(self.tape)
        self.layer_norm = nn.LayerNorm(cfg.encoder_embed_dim)
        self.output_projection = nn.Linear(cfg.encoder_embed_dim, num_classes)
        nn.init.zeros_(self.output_projection.weight)
        nn.init.zeros_(self.output_projection.bias)
        as_asked(self, cfg)

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
        x, padding_mask, reading = run_tape(self.layers, x, None, self.tape, bank, bank_padding_mask)
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
