"""A decoder that reads a text segment by segment, as Transformer-XL does, with blocks of any kind."""

import torch
from fairseq.models import FairseqIncrementalDecoder
from fairseq.modules import FairseqDropout, LayerNorm
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.layerdrop_flags import layerdrop_arguments
from fairseq_adaptive.models.policy_flags import Policies, check_used
from fairseq_adaptive.modules.layers.dropout import quicken_dropout
from fairseq_adaptive.modules.policies import Place
from fairseq_adaptive.modules.stack.schedule import check_kinds, layer_schedule
from fairseq_adaptive.modules.tracing import is_traced
from fairseq_adaptive.modules.transformer_xl.blocks import AttentionBlock, FeedForwardBlock
from fairseq_adaptive.modules.transformer_xl.depth_memory import DepthMemory
from fairseq_adaptive.modules.transformer_xl.layout import BLOCK_KINDS
from fairseq_adaptive.modules.transformer_xl.positions import RelativePositions
from fairseq_adaptive.modules.transformer_xl.relative_attention import RelativeAttention
from fairseq_adaptive.modules.transformer_xl.segments import SegmentStack
from fairseq_adaptive.modules.vocabulary.adaptive_input import parse_cutoffs
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveInput, AdaptiveSoftmax


def check_config(cfg, dictionary) -> None:
    """Refuse options that contradict each other or the vocabulary.

    Raises:
        UsageError: with what would be right
    """
    if cfg.decoder_head_dim is None and cfg.decoder_embed_dim % cfg.decoder_attention_heads:
        raise UsageError(
            f"--decoder-embed-dim {cfg.decoder_embed_dim} is no multiple of --decoder-attention-heads "
            f"{cfg.decoder_attention_heads}: change one, or give --decoder-head-dim"
        )
    if cfg.decoder_embed_dim % 2:
        raise UsageError(f"--decoder-embed-dim {cfg.decoder_embed_dim} is odd: positions are pairs of sine and cosine")
    if cfg.same_length and not cfg.memory_length:
        raise UsageError("--same-length lets each position see --memory-length keys: that cannot be 0")
    if cfg.tie_adaptive_proj and not (cfg.adaptive_softmax_cutoff and cfg.share_decoder_input_output_embed):
        raise UsageError("--tie-adaptive-proj needs --adaptive-softmax-cutoff and --share-decoder-input-output-embed")
    if cfg.adaptive_softmax_cutoff:
        counts = dictionary.count[dictionary.nspecial :]
        for index, (before, after) in enumerate(zip(counts, counts[1:], strict=False), start=dictionary.nspecial):
            if before < after:
                raise UsageError(
                    f"the dictionary is not sorted by frequency: {dictionary[index + 1]!r} ({after} times) comes after "
                    f"{dictionary[index]!r} ({before} times), but --adaptive-softmax-cutoff takes the first words for "
                    "the frequent ones: let fairseq-preprocess make the dictionary, or sort dict.txt and binarise again"
                )


class SegmentedDecoder(FairseqIncrementalDecoder):
    """Embeddings, blocks, and an output layer: adaptive softmax or the whole vocabulary.

    Args:
        cfg: a :class:`~fairseq_adaptive.models.par_transformer_xl.TransformerXLConfig`
        dictionary: fairseq's; sorted by frequency where there are cutoffs
        kinds: one entry a block, given to :meth:`build_block`

    Raises:
        UsageError: where options contradict each other or the dictionary
    """

    def __init__(self, cfg, dictionary, kinds):
        super().__init__(dictionary)
        check_config(cfg, dictionary)
        self.padding_idx = dictionary.pad()
        dim, cutoffs = cfg.decoder_embed_dim, parse_cutoffs(cfg.adaptive_softmax_cutoff)
        self.memory_length = cfg.memory_length
        self.window = cfg.memory_length if cfg.same_length else None
        self.dropout_module = FairseqDropout(cfg.dropout, module_name=self.__class__.__name__)
        self.embed_tokens = AdaptiveInput(
            len(dictionary), cutoffs, dim, factor=cfg.adaptive_softmax_factor, padding_idx=dictionary.pad()
        )
        self.positions = RelativePositions(dim, clamp_length=cfg.clamp_length, dropout=cfg.dropout)
        shape = (cfg.decoder_attention_heads, cfg.decoder_head_dim or dim // cfg.decoder_attention_heads)
        biases = [None if cfg.untie_relative_bias else nn.Parameter(torch.empty(shape)) for _ in range(2)]
        self.blocks = self.build_stack(cfg, kinds, biases)
        self.layer_norm = LayerNorm(dim) if cfg.decoder_normalize_before else None
        self.adaptive_softmax = self.output_projection = None
        if cutoffs:
            self.adaptive_softmax = AdaptiveSoftmax(
                len(dictionary),
                cutoffs,
                dim,
                factor=cfg.adaptive_softmax_factor,
                tied_to=self.embed_tokens if cfg.share_decoder_input_output_embed else None,
                # the authors tie the projections of all clusters but the first
                tie_projections=[False] + [cfg.tie_adaptive_proj] * len(cutoffs),
                dropout=cfg.adaptive_softmax_dropout,
            )
        else:
            self.output_projection = nn.Linear(dim, len(dictionary), bias=False)
        self.reset_parameters(cfg.init_std)
        self.blocks.reset_rules()
        if cfg.share_decoder_input_output_embed and not cutoffs:
            self.output_projection.weight = self.embed_tokens.tables[0]
        quicken_dropout(self)

    def build_stack(self, cfg, kinds, biases):
        """The blocks; ``kinds`` has one letter a depth."""
        depths = len(kinds)
        unique = getattr(cfg, "decoder_unique_layers", None) or depths
        schedule = layer_schedule(str(getattr(cfg, "layer_sharing", None) or "cycle"), unique, depths)
        layerdrop, policies = getattr(cfg, "decoder_layerdrop", 0.0), Policies(cfg, "decoder")
        for flag in ("halting", "router"):
            if getattr(policies, flag) != "none" and layerdrop:
                raise UsageError(f"--{flag} decides how many layers run: leave out --decoder-layerdrop")
        check_used(cfg, policies)
        after = str(getattr(cfg, "halting_after", None) or "any")
        if after != "any" and policies.halting == "none":
            raise UsageError("--halting-after says after which blocks a halting rule is asked: add --halting")
        scores = None if parse_cutoffs(cfg.adaptive_softmax_cutoff) else self.word_scores
        place = Place(cfg.decoder_embed_dim, depths, scores, cfg.decoder_attention_heads, schedule)
        return SegmentStack(
            [self.build_block(kind, cfg, *biases) for kind in check_kinds(schedule, kinds, BLOCK_KINDS)],
            schedule,
            layerdrop=layerdrop,
            halting_depths=None if after == "any" else [depth for depth, kind in enumerate(kinds) if kind == after],
            **layerdrop_arguments(cfg),
            **policies.stack_arguments(place),
        )

    def word_scores(self, states):
        """Logits ... x V of the words, should the states ... x C be those after the last block."""
        return self.output_layer(states if self.layer_norm is None else self.layer_norm(states))

    def build_block(self, kind, cfg, content_bias, position_bias):
        """A block of one kind, ``a`` or ``f``; the biases u and v are None where each block has its own."""
        if kind == "f":
            return FeedForwardBlock(
                cfg.decoder_embed_dim,
                cfg.decoder_ffn_embed_dim,
                cfg.dropout,
                cfg.activation_dropout,
                cfg.decoder_normalize_before,
            )
        attention = RelativeAttention(
            cfg.decoder_embed_dim,
            cfg.decoder_attention_heads,
            head_dim=cfg.decoder_head_dim,
            dropout=cfg.attention_dropout,
            content_bias=content_bias,
            position_bias=position_bias,
        )
        return AttentionBlock(attention, cfg.decoder_embed_dim, cfg.dropout, cfg.decoder_normalize_before)

    def reset_parameters(self, std):
        """As the authors' code: biases 0, except u and v; LayerNorm's weights around 1; projections of clusters 0.01."""
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.normal_(parameter, 1.0, std)
            elif name.endswith(("norm.bias", "fc1.bias", "fc2.bias", "softmax.bias", "cluster_bias")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0.0, 0.01 if "projections" in name else std)

    def upgrade_state_dict_named(self, state_dict, name):
        self.blocks.fold_state_dict(state_dict, f"{name}.blocks.")
        return super().upgrade_state_dict_named(state_dict, name)

    def max_positions(self):
        """Segments may have any length."""
        return int(1e6)

    def forward(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        memory=None,
        src_lengths=None,
        features_only=False,
    ):
        """
        Args:
            prev_output_tokens: ``[B, T]``, each row padded on its right
            encoder_out, src_lengths: not needed; fairseq passes them
            memory: :class:`~fairseq_adaptive.modules.transformer_xl.memory.SegmentMemory` of the segments before, which
                is replaced by that of the next segment; None: there are none
            incremental_state: for decoding position by position; the tokens seen before are not computed again
            features_only: return features where there is no adaptive softmax, too

        Returns:
            logits ``[B, T, V]``, or features ``[B, T, C]`` where there is an adaptive softmax; and a dict of extras
        """
        if memory is not None and is_traced():
            raise UsageError(
                "a traced graph would keep the memory of this segment for all that follow: export without memory, and read "
                "each text by itself"
            )
        states = self.open_memory(memory, incremental_state)
        if incremental_state is not None:
            seen = incremental_state.setdefault("segmented_decoder", {"states": states, "seen": 0})
            prev_output_tokens, seen["seen"] = prev_output_tokens[:, seen["seen"] :], prev_output_tokens.size(1)
        x = self.dropout_module(self.embed_tokens(prev_output_tokens))  # [B, T, C]
        x, remembered, extra = self.run_blocks(x, states, prev_output_tokens.ne(self.padding_idx))
        if memory is not None and incremental_state is None:
            memory.states = remembered
        x = self.features_of(x)
        return (x if features_only else self.output_layer(x)), {"attn": [None], **extra}

    def features_of(self, states):
        """``[B, T, C]``, what words are scored by, should the states after some block be those after the last."""
        return self.dropout_module(states if self.layer_norm is None else self.layer_norm(states))

    def extract_features(
        self, prev_output_tokens, encoder_out=None, incremental_state=None, *rest, memory=None, **unused
    ):
        """As fairseq's, which passes what a Transformer-XL has no use for: ``[B, T]`` to what :meth:`output_layer` takes,
        features ``[B, T, C]``, and a dict of extras; ``memory`` is that of :meth:`forward`."""
        return self(prev_output_tokens, encoder_out, incremental_state, memory, features_only=True)

    def open_memory(self, memory, incremental_state):
        """What each block knows of earlier positions: None, inputs ``[B, M, C]``, or keys and values."""
        if incremental_state is not None:
            if "segmented_decoder" in incremental_state:
                return incremental_state["segmented_decoder"]["states"]
            return self.blocks.caches(self.window, self.positions)
        if memory is None or not self.memory_length:
            return [None] * len(self.blocks)
        if memory.states is None and not self.training and not torch.is_grad_enabled():
            return self.blocks.caches(self.memory_length, self.positions)
        states = memory.states or []
        return states + [None] * (len(self.blocks) - len(states))

    def run_blocks(self, x, states, tokens=None, extra=None):
        """Run all blocks; returns the features, what to remember, and extras."""
        tokens = x.new_ones(x.shape[:2], dtype=torch.bool) if tokens is None else tokens
        memory = DepthMemory(states, self.memory_length, self.positions, self.window, self.blocks.schedule, extra)
        return self.blocks(x, tokens, memory), memory.remembered, {}

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        """``[B, T, V]``; where ``sample`` has targets and the softmax is adaptive, a view that holds theirs only."""
        if self.adaptive_softmax is None:
            return super().get_normalized_probs(net_output, log_probs, sample)
        target = None if sample is None else sample["target"]
        lprobs = self.adaptive_softmax.get_log_prob(net_output[0], target)
        if log_probs:
            return lprobs
        return lprobs.exp() if target is None else lprobs[..., :1].exp().expand_as(lprobs)

    def output_layer(self, features):
        return features if self.output_projection is None else self.output_projection(features)

    def reorder_incremental_state(self, incremental_state, new_order):
        for state in incremental_state.get("segmented_decoder", {}).get("states", []):
            if state is not None:
                state.reorder(new_order)
