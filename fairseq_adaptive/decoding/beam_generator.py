"""Beam search without the overhead of fairseq's: same hypotheses, same scores."""

import functools
import math
from typing import List, Optional, Tuple

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_adaptive.decoding.native_steps import native_steps, refuse
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights

_CHUNK = 128
_FEW = 2**18  # log-probabilities of which a CPU's topk is fast enough


def best_candidates(lprobs: Tensor, scores: Tensor, count: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Find the best continuations of the hypotheses of each sentence.

    Args:
        lprobs: B x Q x V, log-probabilities of the next word
        scores: B x Q, scores of the hypotheses so far
        count: K, how many to return

    Returns:
        B x K each, best first: scores with those of the hypotheses added, words, hypotheses
    """
    sentences, rows, words = lprobs.shape
    chunks = words // _CHUNK
    if lprobs.is_cuda or count > chunks or lprobs.numel() < _FEW:
        best, index = (lprobs + scores.unsqueeze(2)).flatten(1).topk(count)
        return best, index % words, index.div(words, rounding_mode="floor")
    # a CPU's topk is slow over a vocabulary; the best K words are in the K chunks with the best maxima, or in the rest
    whole = lprobs[..., : chunks * _CHUNK].unflatten(2, (chunks, _CHUNK))
    maxima = (whole.amax(-1) + scores.unsqueeze(2)).flatten(1)
    chosen = maxima.topk(count, sorted=False).indices  # B x K, of Q x chunks
    sentence = torch.arange(sentences, device=lprobs.device).unsqueeze(1)
    row = chosen.div(chunks, rounding_mode="floor")
    found = whole[sentence, row, chosen % chunks] + scores.gather(1, row).unsqueeze(2)  # B x K x chunk
    rest = lprobs[..., chunks * _CHUNK :]
    best, place = torch.cat((found.flatten(1), (rest + scores.unsqueeze(2)).flatten(1)), 1).topk(count)
    chunk = chosen.gather(1, place.div(_CHUNK, rounding_mode="floor").clamp_(max=count - 1))
    in_chunk = chunk * _CHUNK + place % _CHUNK  # of Q x (chunks x size)
    beam, word = in_chunk.div(chunks * _CHUNK, rounding_mode="floor"), in_chunk % (chunks * _CHUNK)
    if rest.size(2):
        place = place - found[0].numel()
        beam = torch.where(place < 0, beam, place.div(rest.size(2), rounding_mode="floor"))
        word = torch.where(place < 0, word, place % rest.size(2) + chunks * _CHUNK)
    return best, word, beam


class TorchSteps:
    """Steps of a search in which the models' decoders run as fairseq calls them.

    Args:
        generator: the :class:`BeamGenerator`
        encoder_outs: of each model
        states: of each model, from ``begin_search``
    """

    def __init__(self, generator, encoder_outs, states):
        self._generator, self._encoder_outs, self._states = generator, encoder_outs, states

    def __call__(self, step: int, max_len: int, tokens: Tensor, past: Tensor, order: Optional[Tensor], sentences: int):
        """Find the best continuations of the rows of each sentence.

        Args:
            step: number of words so far
            max_len: at which number nothing but the end may follow
            tokens: (B Q) x T, of which ``step + 1`` are there
            past: (B Q), scores of the hypotheses so far
            order: (B Q), the rows of the step before that these continue; None in the first step, where Q is 1
            sentences: B

        Returns:
            B x K each, best first: scores, words, and rows
        """
        generator, model = self._generator, self._generator.model
        if order is not None:
            model.reorder_incremental_state(self._states, order)
        lprobs, _ = model.forward_decoder(
            tokens[:, : step + 1], self._encoder_outs, self._states, generator.temperature
        )
        generator._restrict(lprobs, tokens, step, max_len)
        rows = lprobs.size(0) // sentences
        past, lprobs = past.type_as(lprobs).view(sentences, rows), lprobs.view(sentences, rows, -1)
        count = generator.candidates(lprobs[0].numel())
        best, words, hypotheses = best_candidates(lprobs, past, count)
        if math.isnan(best.sum()):  # for topk the greatest of all
            lprobs = lprobs.masked_fill(lprobs.isnan(), -math.inf)
            best, words, hypotheses = best_candidates(lprobs, past, count)
        return best, words, hypotheses + torch.arange(sentences, device=words.device).unsqueeze(1) * rows

    def close(self):
        """Nothing is kept but tensors."""


class Hypothesis(dict):
    """A hypothesis as fairseq has them, whose attention weights are computed when they are asked for: a search need not.

    Args:
        entries: of the hypothesis
        attention: makes ``attention``
    """

    def __init__(self, entries, attention):
        super().__init__(entries)
        self._attention = attention

    def __missing__(self, name):
        if name != "attention":
            raise KeyError(name)
        self[name] = self._attention()
        return self[name]

    def get(self, name, default=None):
        return self[name] if name in self or name == "attention" else default


class BeamGenerator(SequenceGenerator):
    """:class:`fairseq.sequence_generator.SequenceGenerator` with a lean loop for plain beam search.

    Sampling, constraints, prefixes, language models in fusion and other kinds of search take fairseq's own loop. In the
    lean one each step of one model that is all known is one call of :mod:`fairseq_adaptive.ops.decoder_step` where that
    runs.
    """

    @constant_weights()
    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        net_input = sample["net_input"]
        decoders = [getattr(model, "decoder", None) for model in self.model.models]
        lean = (
            type(self.search) is BeamSearch
            and all(hasattr(decoder, "begin_search") for decoder in decoders)
            and all(each is None for each in (prefix_tokens, constraints, self.lm_model))
            and "src_tokens" in net_input
            and not self.match_source_len
        )
        states = [decoder.begin_search(self.beam_size) for decoder in decoders] if lean else [None]
        if not all(states):
            refuse("it is no plain beam search" if not lean else "its decoder is not plain, and the log says why")
            return super()._generate(sample, prefix_tokens, constraints, bos_token)
        return self._search(net_input, states, self.eos if bos_token is None else bos_token)

    def candidates(self, continuations: int) -> int:
        """How many of a sentence's continuations are looked at: some of them may end."""
        return min(2 * self.beam_size, continuations - 1)

    def _search(self, net_input, states, bos):
        source = net_input["src_tokens"]
        sentences, length = source.shape
        max_len = min(int(self.max_len_a * length + self.max_len_b), self.max_len - 1)
        assert self.min_len <= max_len, "min_len cannot be larger than max_len, please adjust these!"
        steps = native_steps(self, net_input)
        if steps is None:
            steps = TorchSteps(self, self.model.forward_encoder(net_input), states)
        try:
            found = self._loop(steps, source, max_len, bos)
        finally:
            steps.close()
        return self._with_attention(found, net_input, bos)

    def _with_attention(self, found, net_input, bos):
        """Hypotheses of each sentence, whose attention is computed when it is asked for."""
        device = net_input["src_tokens"].device.type
        modes = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def attention(sentence, words):
            with torch.no_grad(), torch.autocast(device, enabled=modes[0], dtype=modes[1]):
                return self._attention(net_input, sentence, bos, words)

        return [
            [Hypothesis(each, functools.partial(attention, sentence, each["tokens"])) for each in hypotheses]
            for sentence, hypotheses in enumerate(found)
        ]

    def _attention(self, net_input, sentence, bos, words):
        """S x T, the mean of the models' attention over the source; empty where there is no source."""
        models = [model for model in self.model.models if hasattr(model, "encoder")]
        if not models:
            return torch.empty(0)
        source = {name: net_input[name][sentence : sentence + 1] for name in ("src_tokens", "src_lengths")}
        previous = torch.cat((words.new_tensor([bos]), words[:-1])).unsqueeze(0)
        found = [model(**source, prev_output_tokens=previous)[1]["attn"][0] for model in models]
        return sum(each[0].t().float() for each in found if each is not None) / len(self.model.models)

    def _loop(self, steps, source, max_len, bos):
        beam, sentences = self.beam_size, len(source)
        finished: List[List[dict]] = [[] for _ in range(sentences)]
        running = list(range(sentences))  # the sentences behind the rows
        tokens = source.new_full((sentences, max_len + 2), self.pad)  # (B Q) x T, with Q = 1 in the first step
        tokens[:, 0] = bos
        scores = torch.zeros(sentences, max_len + 1, device=source.device)  # (B Q) x T, of all words so far
        order = closed = None  # closed: B x beam, hypotheses that nothing may follow; none where None
        for step in range(max_len + 1):
            past = scores[:, max(step - 1, 0)]
            best, words, hypotheses = steps(step, max_len, tokens, past, order, len(running))
            scores, count = scores.type_as(best), best.size(1)
            ends = words.eq(self.eos) & best.ne(-math.inf)
            if closed is None and not ends.any():
                best, words, hypotheses = best[:, :beam], words[:, :beam], hypotheses[:, :beam]
            else:
                if closed is not None:
                    ends[:, :beam] &= ~closed
                kept = self._finish(ends[:, :beam], best, hypotheses, tokens, scores, step, max_len, running, finished)
                if not kept:
                    break
                if closed is not None:
                    ends[:, :beam] |= closed
                if len(kept) < len(running):
                    running = [running[index] for index in kept]
                    kept = torch.tensor(kept, device=source.device)
                    best, words, hypotheses, ends = (each[kept] for each in (best, words, hypotheses, ends))
                # the first that go on, in order; where there are too few, a hypothesis is closed
                rank, going_on = (ends * count + torch.arange(count, device=source.device)).topk(beam, largest=False)
                closed = rank >= count
                closed = closed if closed.any() else None
                best, words, hypotheses = (each.gather(1, going_on) for each in (best, words, hypotheses))
            assert step < max_len, f"{step} < {max_len}"
            order = hypotheses.flatten()
            tokens, scores = tokens.index_select(0, order), scores.index_select(0, order)
            tokens[:, step + 1], scores[:, step] = words.flatten(), best.flatten()
        return [sorted(found, key=lambda each: each["score"].item(), reverse=True) for found in finished]

    def _restrict(self, lprobs, tokens, step, max_len):
        """Change the log-probabilities of what may not follow, (B Q) x V, in place."""
        lprobs[:, self.pad] = -math.inf
        if self.unk_penalty:
            lprobs[:, self.unk] -= self.unk_penalty
        if step >= max_len:
            lprobs[:, : self.eos] = -math.inf
            lprobs[:, self.eos + 1 :] = -math.inf
        if step < self.min_len:
            lprobs[:, self.eos] = -math.inf
        if self.token_indices_to_suppress is not None:
            lprobs[:, self.token_indices_to_suppress] = -math.inf
        if self.repeat_ngram_blocker is not None:
            rows = lprobs.size(0)
            self.repeat_ngram_blocker(tokens, lprobs, rows, 1, step)

    def _finish(self, ends, best, hypotheses, tokens, scores, step, max_len, running, finished) -> List[int]:
        """Put hypotheses that end here where they belong; return the rows of ``running`` that go on."""
        ended = ends.nonzero().tolist()
        best, hypotheses = best[:, : ends.size(1)][ends], hypotheses[:, : ends.size(1)][ends]
        words = tokens.index_select(0, hypotheses)[:, 1 : step + 2]
        words[:, step] = self.eos
        totals = scores.index_select(0, hypotheses)[:, : step + 1]
        totals[:, step] = best
        each_score = torch.cat((totals[:, :1], totals.diff()), 1)
        if self.normalize_scores:
            best = best / (step + 1) ** self.len_penalty
        touched = set()
        for number, (row, _) in enumerate(ended):
            touched.add(row)
            if len(finished[running[row]]) < self.beam_size:
                finished[running[row]].append(
                    {
                        "tokens": words[number],
                        "score": best[number],
                        "alignment": torch.empty(0),
                        "positional_scores": each_score[number],
                    }
                )

        def goes_on(row):
            return row not in touched or (len(finished[running[row]]) < self.beam_size and step < max_len)

        return [row for row in range(len(running)) if goes_on(row)]
