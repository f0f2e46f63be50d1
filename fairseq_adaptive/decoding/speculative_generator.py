"""Self-speculative decoding: the first depths of a decoder draft words, and all depths verify them in one call.

Elhoushi et al., *LayerSkip* (2024), Section 4.3; from secondary sources and the authors' code. There a search has one
sentence. Here each sentence of a batch goes on from a position of its own, so that none waits for the others.
"""

import logging
import weakref
from typing import List, Optional

import torch
from fairseq.search import BeamSearch, Sampling
from torch import Tensor

from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.decoding.native_rounds import NativeRounds
from fairseq_adaptive.decoding.native_steps import native_steps
from fairseq_adaptive.decoding.pace import Pace
from fairseq_adaptive.decoding.torch_rounds import TorchRounds
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ops.decoder_step.speculative import Running, Said

logger = logging.getLogger(__name__)


class Tally:
    """What drafting was good for.

    Attributes:
        rounds: of sentences
        drafted, right: words, and how many of them were said
        words: that were said
    """

    def __init__(self):
        self.rounds = self.drafted = self.right = self.words = 0

    def add(self, said: Said):
        """Count some rounds: in each the last word is that of all depths, whatever was drafted."""
        words = sum(said.counts)
        self.rounds, self.drafted, self.words = (
            self.rounds + said.rounds,
            self.drafted + said.drafted,
            self.words + words,
        )
        self.right += words - said.rounds

    @property
    def acceptance(self) -> float:
        """The share of the drafted words that were said."""
        return self.right / max(self.drafted, 1)

    def say(self, exit_depth: int):
        """Log it, where there is something to say."""
        if self.rounds:
            logger.info(
                "self-speculative decoding: %d depths drafted %d words, %.1f%% of which were said; %.2f words a round",
                exit_depth,
                self.drafted,
                100 * self.acceptance,
                self.words / self.rounds,
            )


class SpeculativeGenerator(BeamGenerator):
    """Greedy search, or sampling, with drafts; whatever else is asked for takes the plain path, and the log says why.

    Greedy search finds what it finds without drafts, with the same scores: with native steps bit by bit. Sampling draws from
    the distribution that it has without drafts (not the same sample from the same seed). The log has the acceptance rate when
    the generator is no longer in use.

    Args:
        models, dictionary: of :class:`~fairseq_adaptive.decoding.beam_generator.BeamGenerator`, as all others
        exit_depth: E, how many depths draft
        draft: K, how many words they draft at most before all depths are asked

    Attributes:
        tally: a :class:`Tally` of all searches
        pace: chooses how many words greedy search drafts, ``draft`` at most, by what they have cost
        adapts: whether it does, or always ``draft``

    Raises:
        UsageError: for a beam, and where the models have no depth E before their last
    """

    def __init__(self, models, dictionary, *args, exit_depth: int, draft: int, **kwargs):
        super().__init__(models, dictionary, *args, **kwargs)
        self.exit_depth, self.draft, self.tally, self.pace = exit_depth, draft, Tally(), Pace(draft)
        if self.beam_size != 1:
            raise UsageError(
                f"--self-speculative drafts for one hypothesis, in greedy search or sampling, not for {self.beam_size}: add "
                "--beam 1"
            )
        for model in self.model.models:
            depths = len(getattr(getattr(model, "decoder", None), "layers", ()))
            if depths and not exit_depth < depths:
                raise UsageError(
                    f"--self-speculative {exit_depth} leaves no depth to verify with: the decoder has {depths}, give 1 to "
                    f"{depths - 1}"
                )
        weakref.finalize(self, self.tally.say, exit_depth)

    adapts = True

    @constant_weights()
    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        net_input, bos = sample["net_input"], self.eos if bos_token is None else bos_token
        why = self._obstacle(net_input, prefix_tokens, constraints)
        rounds = None if why is not None else self._rounds(net_input)
        if rounds is None:
            say_once("self-speculative decoding", why or "its decoder is not plain, and the log says why")
            return super()._generate(sample, prefix_tokens, constraints, bos_token)
        try:
            found = self._search_in_rounds(rounds, net_input["src_tokens"], bos, prefix_tokens)
        finally:
            rounds.close()
        return self._with_attention(found, net_input, bos)

    def _obstacle(self, net_input, prefix, constraints) -> Optional[str]:
        """Why there is no search in rounds, in words, or None."""
        if type(self.search) not in (BeamSearch, Sampling):
            return f"the search is a {type(self.search).__name__}"
        if len(self.model.models) > 1:
            return "several models decode together"
        if self.lm_model is not None or constraints is not None or self.match_source_len:
            return "a language model, constraints or the length of the source take part"
        if self.repeat_ngram_blocker is not None:
            return "n-grams are blocked"
        if "src_tokens" not in net_input:
            return "the source is no text"
        if not hasattr(getattr(self.model.models[0], "decoder", None), "begin_search"):
            return "its decoder takes whole segments"
        if prefix is not None:
            words = prefix.ne(self.pad)
            if prefix.eq(self.eos).any() or (words[:, 1:] & ~words[:, :-1]).any():
                return "a prefix ends within, or does not begin at once"
        return None

    def longest(self, source: Tensor) -> int:
        """How many words a hypothesis has at most, without the end."""
        found = min(int(self.max_len_a * source.size(1) + self.max_len_b), self.max_len - 1)
        assert self.min_len <= found, "min_len cannot be larger than max_len, please adjust these!"
        return found

    def _rounds(self, net_input):
        if type(self.search) is BeamSearch:
            found = native_steps(self, net_input, NativeRounds)
            if found is not None:
                return found
        return TorchRounds.of(self, net_input)

    def _search_in_rounds(self, rounds, source: Tensor, bos: int, prefix: Optional[Tensor]) -> List[List[dict]]:
        sentences, max_len, device = len(source), self.longest(source), source.device
        zeros = torch.zeros(sentences, dtype=torch.long, device=device)
        running = Running(torch.arange(sentences, device=device), zeros, zeros + bos, zeros.to(rounds.dtype))
        words: List[List[Tensor]] = [[] for _ in range(sentences)]
        scores: List[List[Tensor]] = [[] for _ in range(sentences)]
        given = None if prefix is None or not prefix.numel() else prefix[:, :max_len]
        while len(running.sentence):
            size = len(running.sentence)
            if given is not None:
                said = rounds.rounds(running, 0, given, given.ne(self.pad).sum(1).tolist())
                given = None
            else:
                draft = self.pace.choose(size) if rounds.same and self.adapts else self.draft
                began = self.pace.begin()
                said = rounds.rounds(running, draft)
                self.pace.end(began, size, draft, sum(said.counts))
                self.tally.add(said)
            for row, (sentence, count) in enumerate(zip(running.sentence.tolist(), said.counts)):
                words[sentence].append(said.words[row, :count])
                scores[sentence].append(said.scores[row, :count])
            ended = running.newest.eq(self.eos)
            assert not (running.place.gt(max_len) & ~ended).any(), "no word may follow"
            if ended.any():
                goes_on = (~ended).nonzero().squeeze(1)
                running = Running(*(each[goes_on] for each in running))
                rounds.keep(goes_on)
        return [[self._hypothesis(torch.cat(w), torch.cat(s))] for w, s in zip(words, scores)]

    def _hypothesis(self, words, totals):
        score = totals[-1]
        return {
            "tokens": words,
            "score": score / len(words) ** self.len_penalty if self.normalize_scores else score,
            "alignment": torch.empty(0),
            "positional_scores": torch.cat((totals[:1], totals.diff())),
        }
