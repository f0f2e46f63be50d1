"""Beam search in which each step is one call of :mod:`fairseq_adaptive.ops.decoder_step`, and so is the encoder.

The operation gets weights and calls nothing, so it serves one model in which all is known, in float32 on a CPU. Elsewhere
the search does without, and the log says why; where ``FAIRSEQ_ADAPTIVE_KERNELS=native`` asks for it, that is an error.
"""

import math
from typing import List, Optional, Tuple

import torch
from fairseq.sequence_generator import EnsembleModel
from torch import Tensor

from fairseq_adaptive.decoding.plain_weights import Unfit, decoder_weights, encoder_weights, require_nothing_else
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear
from fairseq_adaptive.modules.layers.known import change, say_once
from fairseq_adaptive.modules.layers.prepacked_linear import laid_out
from fairseq_adaptive.ops.decoder_step import OP, Asked
from fairseq_adaptive.ops.registry import VARIABLE, requested

_POSITIONS = 64  # looked up at a time
_GENERATORS = "BeamGenerator", "SpeculativeGenerator"


def refuse(why: str):
    """Take the search without native steps.

    Raises:
        UsageError: where they are asked for by name
    """
    if requested() == "native":
        raise UsageError(f"{VARIABLE}=native, but {OP.name} cannot use it in this search: {why}")


def native_steps(generator, net_input, make=None):
    """Return the steps of a search, or None where the operation does not fit or cannot run.

    Args:
        generator: a :class:`~fairseq_adaptive.decoding.beam_generator.BeamGenerator`
        net_input: has ``src_tokens``, B x S
        make: what is returned, from generator, implementation and input (default: :class:`NativeSteps`)

    Raises:
        UsageError: where it is asked for by name and cannot be had
    """
    model = generator.model.models[0]
    weight = getattr(model.decoder.embed_tokens, "weight", None)
    known = isinstance(weight, Tensor)
    if known and OP.choose(weight.device.type, weight.dtype)[0] != "native":
        OP.implementation(weight, weight.dtype)  # says so once
        return None
    try:
        if not known:
            raise Unfit(f"the embedding is {type(model.decoder.embed_tokens).__name__}")
        _check(generator, len(net_input["src_tokens"]) * generator.beam_size)
        return (make or NativeSteps)(generator, OP.implementation(weight, weight.dtype), net_input)
    except Unfit as error:
        refuse(str(error))
        say_once("native steps of beam search", str(error))
        return None


def _check(generator, rows):
    models = generator.model.models
    if len(models) > 1:
        raise Unfit("several models decode together")
    if generator.repeat_ngram_blocker is not None:
        raise Unfit("n-grams are blocked")
    if type(generator).__qualname__ not in _GENERATORS or change(generator.model, (EnsembleModel,)) is not None:
        raise Unfit("the generator is changed")
    why = change(models[0], ignored=("train",))  # fairseq forbids to train a model that is made ready for a search
    if why is not None:
        raise Unfit(why)
    require_nothing_else()
    if requested() != "native":
        from fairseq_adaptive.ops.decoder_step.native import slower

        layer = models[0].decoder.layers[0]
        why = slower(layer.fc1.in_features, layer.fc1.out_features, rows, type(layer.fc1) is Int8Linear)
        if why is not None:
            raise Unfit(why)


class NativeSteps:
    """The steps of one search; see :class:`~fairseq_adaptive.decoding.beam_generator.TorchSteps`.

    Args:
        generator: of one model
        kind: the implementation of the operation
        net_input: has ``src_tokens``, B x S

    Raises:
        Unfit: with what is not known, in words
    """

    def __init__(self, generator, kind, net_input):
        from fairseq_adaptive.ops.decoder_step import native  # loads the library

        self._generator, self._decoder = generator, generator.model.models[0].decoder
        threads = torch.get_num_threads()
        weights, parts, rest = decoder_weights(self._decoder)
        lengths, states = self._source(generator.model, net_input, native, threads)
        packed = laid_out(self._decoder, parts, rest, lambda: native.Packed(weights()))
        self._words = self._decoder.output_projection.weight.size(0)
        self._positions, self._lowest = None, {}
        self._search = self._open(kind, packed, lengths, states, threads)

    def _open(self, kind, packed, lengths, states, threads):
        return kind(packed, lengths, states, threads)

    def _source(self, model, net_input, native, threads) -> Tuple[List[int], Optional[Tensor]]:
        """Lengths of the sources, and their states, P x C', without padding."""
        source = net_input["src_tokens"]
        if not model.has_encoder():
            return [0] * len(source), None
        encoder = model.models[0].encoder
        try:
            weights, parts, rest = encoder_weights(encoder, net_input)
        except Unfit as error:
            say_once("native encoder of beam search", str(error))
            out = model.forward_encoder(net_input)[0]
            states = out["encoder_out"][0].transpose(0, 1)
            real = ~out["encoder_padding_mask"][0].bool()
            lengths, states = real.sum(1).tolist(), states[real]
        else:
            real = source.ne(encoder.padding_idx)
            lengths = real.sum(1).tolist()
            x = encoder.forward_embedding(source)[0]
            x = x.flatten(0, 1) if min(lengths) == real.size(1) else x[real]
            packed = laid_out(encoder, parts, rest, lambda: native.Packed(weights()))
            states = native.encode(packed, x, lengths, threads)
        if self._decoder.layers[0].encoder_attn is None:
            return lengths, None
        if min(lengths) == 0:
            raise Unfit("a source has no words")
        return lengths, states

    def __call__(self, step, max_len, tokens, past, order, sentences):
        generator, rows = self._generator, len(tokens) // sentences
        asked = Asked(
            tokens=tokens[:, step],
            scores=past,
            order=order,
            rows=rows,
            position=self._position(step, max_len),
            count=generator.candidates(rows * self._words),
            only=generator.eos if step >= max_len else -1,
            changes=self._changes(step < generator.min_len),
            heat=1 / generator.temperature,
        )
        return self._search.step(asked)

    def _position(self, step, max_len):
        """C, what the decoder adds to the embedding of a token; None: nothing."""
        embed = self._decoder.embed_positions
        if embed is None:
            return None
        if self._positions is None or step >= len(self._positions):
            count = min(max(_POSITIONS, 2 * step), max_len + 1, embed.max_positions)
            self._positions = self._embed_positions(max(count, step + 1))
        return self._positions[step]

    def _embed_positions(self, count):
        word = self._decoder.padding_idx + 1  # any but padding, which has no position
        return self._decoder.embed_positions(torch.full((1, count), word))[0].contiguous()

    def _changes(self, too_short):
        """What is added to the log-probabilities of some words: as ``BeamGenerator._restrict`` does it."""
        if too_short not in self._lowest:
            generator = self._generator
            changes = {generator.unk: -generator.unk_penalty} if generator.unk_penalty else {}
            banned = [generator.pad, *([generator.eos] if too_short else [])]
            if generator.token_indices_to_suppress is not None:
                banned += generator.token_indices_to_suppress.tolist()
            self._lowest[too_short] = {**changes, **dict.fromkeys(banned, -math.inf)}
        return self._lowest[too_short]

    def close(self):
        """Give the caches back."""
        self._search.close()
