"""The search for a layout: ``--arch par_supernet``, a Transformer-XL whose blocks choose their kinds.

Mandava et al., *Pay Attention when Required* (2020), Section 3. Train it with ``--optimizer architecture_adam`` and
``--criterion architecture_entropy_loss``; ``fairseq-adaptive derive`` reads the layout from a checkpoint.
"""

from dataclasses import dataclass, field

import torch
from fairseq.models import register_model
from omegaconf import II
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import with_defaults
from fairseq_adaptive.models.par_transformer_xl import SegmentedLanguageModel, TransformerXLConfig
from fairseq_adaptive.models.segmented_decoder import SegmentedDecoder
from fairseq_adaptive.modules.policies import Search
from fairseq_adaptive.modules.transformer_xl.block_costs import block_costs
from fairseq_adaptive.modules.transformer_xl.layout import BLOCKS
from fairseq_adaptive.modules.transformer_xl.supernet_block import KINDS, StochasticBlock, mixture_weights
from fairseq_adaptive.ranges import TEMPERATURE, UPDATES, check_ranges, ranged


@dataclass
class PARSupernetConfig(TransformerXLConfig):
    blocks: int = ranged(32, BLOCKS, "number of stochastic blocks")
    sample_paths: bool = field(
        default=False,
        metadata={
            "help": "run one kind of each block, drawn anew at every step, instead of the mixture of all: a step costs "
            "what a step of a found model costs; in evaluation, the most probable kind"
        },
    )
    temperature_start: float = ranged(1.0, TEMPERATURE, "temperature of the Gumbel-softmax at the beginning")
    temperature_end: float = ranged(0.1, TEMPERATURE, "temperature after --temperature-updates")
    temperature_updates: int = ranged(
        II("optimization.max_update"),
        UPDATES,
        "updates in which the temperature falls, by a constant factor (default: --max-update)",
    )


class SupernetDecoder(Search, SegmentedDecoder):
    """Stochastic blocks, their architecture parameters, and the temperature.

    Attributes:
        architecture: logits ``[blocks, 3]``, the columns as in ``KINDS``
        temperature: a buffer, since evaluation needs that of the checkpoint
        block_costs: what a block of each kind costs, ``[3]``, as a share of attention and feed-forward together; zeros
            until :meth:`measure_costs`
    """

    kinds = KINDS

    def __init__(self, cfg, dictionary):
        if cfg.temperature_updates < 1:
            raise UsageError("the temperature falls in --temperature-updates, or in --max-update: give one of them")
        super().__init__(cfg, dictionary, "m" * cfg.blocks)
        self.sample_paths = cfg.sample_paths
        self.schedule = (cfg.temperature_start, cfg.temperature_end, cfg.temperature_updates)
        self.architecture = nn.Parameter(torch.zeros(cfg.blocks, len(KINDS)))
        self.architecture.param_group = "architecture"  # architecture_adam, and fairseq's composite, look for it
        self.register_buffer("temperature", torch.tensor(float(cfg.temperature_start)))
        self.register_buffer("block_costs", torch.zeros(len(KINDS)))
        self.num_updates = 0

    def build_block(self, kind, cfg, content_bias, position_bias):
        kinds = (super(SupernetDecoder, self).build_block(kind, cfg, content_bias, position_bias) for kind in "af")
        return StochasticBlock(*kinds)

    def set_num_updates(self, num_updates):
        """Let the temperature fall from its start, by a constant factor an update, to its end."""
        self.num_updates = num_updates
        self.blocks.set_num_updates(num_updates)
        start, end, updates = self.schedule
        self.temperature.fill_(start * (end / start) ** min(1.0, num_updates / updates))

    def probabilities(self):
        """How probable each kind of each block is, ``[blocks, 3]`` in float32."""
        return torch.softmax(self.architecture.float(), dim=-1)

    def measure_costs(self, measure, tokens):
        """Fill ``block_costs``, once in a training, from batches as large as ``tokens`` ``[B, T]`` and a full memory.

        Workers take the costs of the first one.
        """
        if self.block_costs.any():
            return
        x = self.architecture.new_zeros(*tokens.shape, self.embed_tokens.output_dim)
        memory = x.new_zeros(len(x), self.memory_length, x.size(-1)) if self.memory_length else None
        block = self.blocks[0]
        arguments = {"a": (self.positions, memory, self.window), "f": ()}
        costs = block_costs({"a": block.attention, "f": block.feed_forward}, arguments, x, measure)
        for index, kind in enumerate("af"):
            self.block_costs[index] = costs[kind] / sum(costs.values())
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(self.block_costs, 0)

    def run_blocks(self, x, states, tokens=None):
        weights = mixture_weights(self.architecture, float(self.temperature), noise=self.training)
        paths = weights.argmax(dim=-1).tolist() if self.sample_paths else [None] * len(weights)
        extra = [{"weights": weight, "path": path} for weight, path in zip(weights, paths, strict=True)]
        x, remembered, _ = super().run_blocks(x, states, tokens, extra)
        probabilities = self.probabilities()
        if self.blocks.recorder:
            self.blocks.recorder[-1].mixture = probabilities
            self.blocks.recorder[-1].paths = [KINDS[path] for path in paths] if self.sample_paths else None
        return x, remembered, {"block_probabilities": probabilities}


@register_model("par_supernet", dataclass=PARSupernetConfig)
class PARSupernetModel(SegmentedLanguageModel):
    """A language model whose layout is searched while it is trained."""

    @classmethod
    def build_model(cls, cfg, task):
        cfg = with_defaults(cfg, PARSupernetConfig)
        check_ranges(cfg, cls)
        cls.warn_of_forgetting(cfg, task)
        return cls(SupernetDecoder(cfg, task.target_dictionary))
