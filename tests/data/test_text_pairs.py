"""How long texts are cut and joined."""

import pytest
from fairseq.data import Dictionary

from fairseq_adaptive.data.text_pairs import check_vocabulary, join, shorten
from fairseq_adaptive.errors import UsageError


def popped(texts, room):
    """The definition: take tokens off the longest, one at a time."""
    texts = [list(text) for text in texts]
    while sum(map(len, texts)) > room:
        longest = max(map(len, texts))
        next(text for text in reversed(texts) if len(text) == longest).pop()
    return texts


@pytest.mark.parametrize("lengths", [(7,), (0,), (9, 4), (4, 9), (6, 6), (0, 5), (1, 40)])
@pytest.mark.parametrize("room", [0, 1, 5, 8, 11, 100])
def test_takes_from_the_longest(lengths, room):
    texts = [[f"{number}.{place}" for place in range(length)] for number, length in enumerate(lengths)]
    assert shorten(texts, room) == popped(texts, room)


def test_joins_as_fairseq_does():
    assert join([[5, 6]], end=2) == [5, 6, 2]
    assert join([[5, 6], [7]], end=2, init=0) == [0, 5, 6, 2, 7, 2]  # BERT
    assert join([[5, 6], [7]], end=2, init=0, separator=2) == [0, 5, 6, 2, 2, 7, 2]  # RoBERTa


def test_vocabulary():
    class Tokenizer:
        def get_vocab(self):
            return {"a": 0, "b": 1, "[UNK]": 2}

    dictionary = Dictionary()
    dictionary.add_symbol("a")
    with pytest.raises(UsageError, match="tokenizer in here is not that of the model: 2 of its 3 pieces"):
        check_vocabulary(Tokenizer(), dictionary, "here")
    dictionary.add_symbol("b")
    check_vocabulary(Tokenizer(), dictionary, "here")
