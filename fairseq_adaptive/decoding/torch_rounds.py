"""Rounds of self-speculative decoding with torch's operations: on any device, greedy or sampled."""

from typing import List, Optional

import torch
from fairseq.search import Sampling
from torch import Tensor

from fairseq_adaptive.decoding.beam_generator import best_candidates
from fairseq_adaptive.decoding.several_tokens import SeveralTokens
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.ops.decoder_step.speculative import Said


def truncated(lprobs: Tensor, top_k: int = -1, top_p: float = -1.0) -> Tensor:
    """... x V, the probabilities that fairseq's :class:`~fairseq.search.Sampling` draws from, which sum to 1.

    Args:
        lprobs: ... x V, log-probabilities
        top_k: from how many words it draws; below 1: from all
        top_p: or from the most probable ones that together have more than this; 0 and less: from all
    """
    probs = lprobs.exp()
    if top_p > 0:
        ordered, index = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    elif top_k > 0:
        best, index = probs.topk(top_k)
        probs = torch.zeros_like(probs).scatter(-1, index, best)
    return probs / probs.sum(-1, keepdim=True)


def accept(drafted: Tensor, draft: Tensor, target: Tensor):
    """Draw words from the distributions of all depths with the help of drafts (Leviathan et al., 2023, Algorithm 1).

    A draft stands with probability min(1, p / q); in place of the first that does not, a word is drawn from max(0, p - q);
    where all stand, one more is drawn from p. So each word has the distribution p, whatever q is.

    Args:
        drafted: D, words drawn from q
        draft: D x V, q
        target: (D + 1) x V, p

    Returns:
        the words, 1 to D + 1 of them
    """
    for place, word in enumerate(drafted.tolist()):
        p, q = target[place], draft[place]
        if torch.rand((), device=p.device, dtype=p.dtype) * q[word] < p[word]:
            continue
        rest = (p - q).clamp_min(0)
        rest = rest if rest.sum() > 0 else p  # equal but for rounding
        return torch.cat((drafted[:place], torch.multinomial(rest, 1)))
    return torch.cat((drafted, torch.multinomial(target[len(drafted)], 1)))


class TorchRounds:
    """The rounds of one search, in which all sentences that run go on by one word or more.

    Args:
        generator: a :class:`~fairseq_adaptive.decoding.speculative_generator.SpeculativeGenerator` of one model
        net_input: has ``src_tokens``, B x S

    Attributes:
        dtype: of sums of scores
        same: whether the words are the same whatever is drafted, so that only what it costs counts
    """

    dtype = torch.float64  # holds those of any precision

    def __init__(self, generator, net_input):
        self._generator, self._model = generator, generator.model.models[0]
        self._decoder, self._longest = self._model.decoder, generator.longest(net_input["src_tokens"])
        encoder_out = generator.model.forward_encoder(net_input)[0] if generator.model.has_encoder() else None
        source = mask = None
        if encoder_out is not None:
            source, mask = (next(iter(encoder_out[name]), None) for name in ("encoder_out", "encoder_padding_mask"))
        self._step = SeveralTokens(self._decoder.layers, len(net_input["src_tokens"]), source, mask)
        self._positions = None
        if self._decoder.embed_positions is not None:
            word = self._decoder.padding_idx + 1  # any but padding, which has no position
            tokens = net_input["src_tokens"].new_full((1, self._longest + 1), word)
            self._positions = self._decoder.embed_positions(tokens)[0]
        self._sampling = None
        if isinstance(generator.search, Sampling):
            self._sampling = {"top_k": generator.search.sampling_topk, "top_p": generator.search.sampling_topp}

    @property
    def same(self):
        return self._sampling is None

    @classmethod
    def of(cls, generator, net_input) -> Optional["TorchRounds"]:
        """The rounds, or None where the decoder is not plain; the log says why."""
        decoder = generator.model.models[0].decoder
        if decoder.layers.adaptive:
            say_once("rounds of self-speculative decoding in torch", "tokens halt or are left out")
            return None
        return cls(generator, net_input) if decoder.begin_search(1) else None

    def _states(self, words: Tensor, places: Tensor) -> Tensor:
        """R x T -> R x T x C, before the first depth."""
        positions = None if self._positions is None else self._positions[places.clamp_max(self._longest)]
        return self._decoder._embed(words, positions)

    def _lprobs(self, states: Tensor, places: Tensor) -> Tensor:
        """R x T x C -> R x T x V, as a search has them; minus infinity where a word may not follow."""
        generator, decoder = self._generator, self._decoder
        logits = decoder.output_layer(decoder._leave(states))
        lprobs = self._model.get_normalized_probs((logits / generator.temperature, None), log_probs=True)
        lprobs[..., generator.pad] = -torch.inf
        if generator.unk_penalty:
            lprobs[..., generator.unk] -= generator.unk_penalty
        at_end = (places >= self._longest).unsqueeze(-1).expand_as(lprobs).clone()
        at_end[..., generator.eos] = False
        lprobs.masked_fill_(at_end, -torch.inf)
        lprobs[..., generator.eos].masked_fill_(places < generator.min_len, -torch.inf)
        if generator.token_indices_to_suppress is not None:
            lprobs[..., generator.token_indices_to_suppress] = -torch.inf
        return lprobs

    def rounds(self, running, draft: int, given: Optional[Tensor] = None, count: Optional[List[int]] = None) -> Said:
        """As :meth:`fairseq_adaptive.ops.decoder_step.speculative.Rounds.rounds`, one round of R sentences."""
        drafts = count or [min(draft, self._longest - place) for place in running.place.tolist()]
        counts, words, scores = self._round(running, drafts, given)
        return Said(counts, words, scores, len(counts), 0 if given is not None else sum(drafts))

    def _round(self, running, drafts, given):
        stack, width, exit_depth = self._decoder.layers, max(drafts) + 1, self._generator.exit_depth
        places = running.place.unsqueeze(1) + torch.arange(width, device=running.place.device)  # R x W
        words, draft = running.newest.unsqueeze(1), []
        if given is not None:
            words = torch.cat((words, given[:, : width - 1]), 1)
            states = self._step(self._states(words, places), places, range(exit_depth))
        else:
            parts = []
            for number in range(width):
                newest, here = (
                    self._states(words[:, -1:], places[:, number : number + 1]),
                    places[:, number : number + 1],
                )
                parts.append(self._step(newest, here, range(exit_depth)))
                if number < width - 1:
                    lprobs = self._lprobs(parts[-1], here)[:, 0]
                    if self._sampling is None:
                        said = lprobs.argmax(-1, keepdim=True)
                    else:
                        draft.append(truncated(lprobs, **self._sampling))
                        said = torch.multinomial(draft[-1], 1)
                    words = torch.cat((words, said), 1)
            states = torch.cat(parts, 1)
        lprobs = self._lprobs(self._step(states, places, range(exit_depth, len(stack))), places)
        counts = []
        found, scores = words.new_empty(words.shape), lprobs.new_empty(words.shape)
        for row, asked in enumerate(drafts):
            own = lprobs[row], words[row, 1 : 1 + asked], running.score[row].to(lprobs)
            said, total = self._said(*own, [each[row] for each in draft], given is not None)
            counts.append(len(said))
            found[row, : len(said)], scores[row, : len(said)] = said, total
            running.place[row] += len(said)
            running.newest[row], running.score[row] = said[-1], total[-1]
        return counts, found, scores

    def _said(self, lprobs, drafted, score, draft, forced):
        """Words of a sentence and its scores with them."""
        if self._sampling is not None and not forced:
            target = truncated(lprobs, **self._sampling)
            said = accept(drafted, torch.stack(draft[: len(drafted)]) if len(drafted) else target[:0], target)
            ends = said.eq(self._generator.eos).nonzero()
            said = said[: int(ends[0]) + 1] if len(ends) else said
            return said, score + lprobs[: len(said)].gather(1, said.unsqueeze(1)).squeeze(1).cumsum(0)
        said, total = [], []
        for place in range(len(drafted) + 1):
            if forced and place < len(drafted):
                word, score = drafted[place], score + lprobs[place, drafted[place]]
            elif forced and self._sampling is not None:
                word = torch.multinomial(truncated(lprobs[place], **self._sampling), 1)[0]
                score = score + lprobs[place, word]
            else:
                best, words, _ = best_candidates(lprobs[place].view(1, 1, -1), score.view(1, 1), 2)
                word, score = words[0, 0], best[0, 0]
            said.append(word)
            total.append(score)
            if not forced and (place == len(drafted) or word != drafted[place] or word == self._generator.eos):
                break
        return torch.stack(said), torch.stack(total)

    def keep(self, rows: Tensor):
        """Other sentences have ended."""
        self._step.keep(rows)

    def close(self):
        """Nothing is kept but tensors."""
