"""Texts and pairs of texts as a sentence classifier reads them."""

from typing import List, Sequence

from fairseq_adaptive.errors import UsageError


def shorten(texts: Sequence[Sequence], room: int) -> List[list]:
    """Cut tokens off the end of the longest text until all texts together have ``room`` tokens; of two equally long
    ones off the last, as BERT does (Devlin et al., 2019)."""
    lengths = [len(text) for text in texts]
    while sum(lengths) > max(room, 0):
        longest = max(range(len(lengths)), key=lambda number: (lengths[number], number))
        others = max((length for number, length in enumerate(lengths) if number != longest), default=0)
        surplus = sum(lengths) - max(room, 0)
        lengths[longest] -= min(surplus, max(lengths[longest] - others, 1))
    return [list(text[:length]) for text, length in zip(texts, lengths)]


def join(texts: Sequence[Sequence], end, init=None, separator=None) -> list:
    """One or two texts in one list of tokens, as fairseq's ``sentence_prediction`` joins them.

    Args:
        texts: one or two, of tokens of any kind
        end: closes each text: ``</s>``
        init: before the first text, if not None: ``<s>``
        separator: before the second text, if not None: RoBERTa's second ``</s>``
    """
    joined = [] if init is None else [init]
    for number, text in enumerate(texts):
        joined += [separator] if number and separator is not None else []
        joined += [*text, end]
    return joined


def check_vocabulary(tokenizer, dictionary, where) -> None:
    """
    Raises:
        UsageError: when most of the tokenizer's pieces are not in the dictionary, which is then that of another model
    """
    pieces = tokenizer.get_vocab()
    missing = sum(piece not in dictionary.indices for piece in pieces)
    if missing > len(pieces) / 2:
        raise UsageError(
            f"the tokenizer in {where} is not that of the model: {missing:,} of its {len(pieces):,} "
            "pieces are not in the dictionary"
        )
