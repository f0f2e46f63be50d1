"""Greedy search in rounds, in C: some depths draft, all verify; see ``speculative.h``.

What it finds is what :class:`~fairseq_adaptive.ops.decoder_step.native.Search` finds with one hypothesis a sentence, bit by
bit, which is its definition: a row is computed in the same way whatever rows stand beside it.
"""

import ctypes
from ctypes import byref, c_float, c_int64
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.decoder_step.native import Search, _done
from fairseq_adaptive.ops.decoder_step.packing import address
from fairseq_adaptive.ops.decoder_step.structures import Round

_ROUNDS = 16  # in one call


class Running(NamedTuple):
    """Sentences that run, R of them; tensors are changed by a round.

    Attributes:
        sentence: R, int64, their numbers in the search
        place: R, int64, the position of the newest word
        newest: R, int64, that word, which has not been computed yet
        score: R, float32, of the words so far
    """

    sentence: Tensor
    place: Tensor
    newest: Tensor
    score: Tensor


class Said(NamedTuple):
    """What sentences have said in some rounds.

    Attributes:
        counts: how many words each, R numbers
        words, scores: R x W, of which so many are there; a score is that of the sentence with the word
        rounds: of all sentences
        drafted: words that were drafted
    """

    counts: List[int]
    words: Tensor
    scores: Tensor
    rounds: int
    drafted: int


class Rules(NamedTuple):
    """What may be said; all is as in :class:`~fairseq_adaptive.ops.decoder_step.Asked`.

    Attributes:
        end: the word that ends a sentence
        least: before this position it may not be said
        most: from this position on nothing else may
        changes: word to what is added to its log-probability
        short_changes: the same before position ``least``
        heat: 1 / temperature
        drafted: drafts are among so many words, the first
    """

    end: int
    least: int
    most: int
    changes: Dict[int, float]
    short_changes: Dict[int, float]
    heat: float
    drafted: int


class Rounds(Search):
    """The caches of one search in rounds; arguments are those of :class:`native.Search`, and

    Args:
        exit: E, how many depths draft, 1 to N - 1
        rules: what may be said
        positions: T x C, what is added to the embeddings of tokens by their position, or None
    """

    def __init__(self, decoder, lengths, states, threads: int, exit: int, rules: Rules, positions: Optional[Tensor]):
        super().__init__(decoder, lengths, states, threads)
        self._exit, self._rules, self._positions = exit, rules, positions
        self._arrays = [self._array(each) for each in (rules.changes, rules.short_changes)]

    @staticmethod
    def _array(changes):
        words = sorted(changes)
        return (c_int64 * len(words))(*words), (c_float * len(words))(*(changes[word] for word in words))

    def rounds(self, running: Running, draft: int, given: Optional[Tensor] = None, count: Optional[List[int]] = None):
        """Let sentences go on until one of them ends, or for so many rounds that it would be time to ask again.

        Args:
            running: is changed
            draft: how many words to draft for each in a round, at most
            given: R x D, int64: in place of drafts words to say whatever the model says, in one round
            count: R, how many of them each has

        Returns:
            a :class:`Said`
        """
        sentences, rules, limit = len(running.sentence), self._rules, _ROUNDS
        width = draft + 1
        if given is not None:
            width, limit, given = given.size(1) + 1, 1, given.contiguous()
            rows = torch.tensor(count) + 1
        else:
            rows = running.newest.new_empty(sentences)
        room = limit * width
        got, rounds, tried = running.newest.new_zeros(3, sentences)
        words, scores = running.newest.new_empty(sentences, room), running.score.new_empty(sentences, room)
        (changed, change), (short_changed, short_change) = self._arrays
        asked = Round(
            exit=self._exit,
            width=width,
            limit=limit,
            room=room,
            least=rules.least,
            most=rules.most,
            end=rules.end,
            drafted=rules.drafted,
            changes=len(changed),
            short_changes=len(short_changed),
            changed=ctypes.addressof(changed),
            short_changed=ctypes.addressof(short_changed),
            change=ctypes.addressof(change),
            short_change=ctypes.addressof(short_change),
            positions=address(self._positions),
            heat=rules.heat,
            sentence=running.sentence.data_ptr(),
            place=running.place.data_ptr(),
            newest=running.newest.data_ptr(),
            score=running.score.data_ptr(),
            rows=rows.data_ptr(),
            got=got.data_ptr(),
            rounds=rounds.data_ptr(),
            tried=tried.data_ptr(),
            given=address(given),
            words=words.data_ptr(),
            scores=scores.data_ptr(),
        )
        deepest = min(int(running.place.max()) + room, rules.most + 1)
        _done(self._library.search_room(self._handle, deepest, sentences * width))
        self._split(
            lambda first, last: _done(self._library.search_rounds(self._handle, byref(asked), first, last)), sentences
        )
        return Said(got.tolist(), words, scores, int(rounds.sum()), int(tried.sum()))
