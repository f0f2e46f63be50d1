"""Rounds of self-speculative decoding, each one call of :mod:`fairseq_adaptive.ops.decoder_step.speculative`."""

import torch

from fairseq_adaptive.decoding.native_steps import NativeSteps
from fairseq_adaptive.ops.decoder_step.speculative import Rounds, Rules


class NativeRounds(NativeSteps):
    """The rounds of one greedy search; see :class:`~fairseq_adaptive.decoding.torch_rounds.TorchRounds`.

    Args:
        generator: a :class:`~fairseq_adaptive.decoding.speculative_generator.SpeculativeGenerator` of one model
        kind: not read: there is one implementation
        net_input: has ``src_tokens``, B x S

    Raises:
        Unfit: with what is not known, in words
    """

    dtype, same = torch.float32, True

    def __init__(self, generator, kind, net_input):
        self._longest = generator.longest(net_input["src_tokens"])
        super().__init__(generator, kind, net_input)

    def _open(self, kind, packed, lengths, states, threads):
        generator, positions = self._generator, None
        if self._decoder.embed_positions is not None:
            positions = self._embed_positions(self._longest + 1)
        rules = Rules(
            end=generator.eos,
            least=generator.min_len,
            most=self._longest,
            changes=self._changes(False),
            short_changes=self._changes(True),
            heat=1 / generator.temperature,
            drafted=self._words,
        )
        return Rounds(packed, lengths, states, threads, generator.exit_depth, rules, positions)

    def rounds(self, running, draft, given=None, count=None):
        """As :meth:`fairseq_adaptive.ops.decoder_step.speculative.Rounds.rounds`."""
        return self._search.rounds(running, draft, given, count)

    def keep(self, rows):
        """Other sentences have ended; their caches stay where they are."""
