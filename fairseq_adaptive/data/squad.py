"""Questions and answers in the JSON of SQuAD v1.1 (Rajpurkar et al., 2016) and v2.0 (2018), cut into windows."""

import os
from typing import List, NamedTuple, Optional, Tuple

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json


class Question(NamedTuple):
    """``answers`` are texts and where they begin in ``context``; none where the question cannot be answered, or in a
    file without answers."""

    id: str
    text: str
    context: str
    answers: Tuple[Tuple[str, int], ...]
    impossible: bool


def read_squad(path) -> Tuple[List[Question], bool]:
    """Return the questions of a file, and whether it is of version 2, where some cannot be answered.

    An answer that is off by up to two characters, once spaces around it are gone, is put right: as in SQuADShifts.

    Raises:
        UsageError: when the file is missing, cut short, of another form, or contradicts itself, with the question's id
    """
    articles = read_json(path).get("data")
    if not isinstance(articles, list):
        raise UsageError(f'{path} is not in the format of SQuAD: it has no "data" in a list')
    questions, seen, version_2 = [], set(), False
    for number, article in enumerate(articles):
        where = f"{path}, article {number}"
        try:
            where += f" ({article['title']})" if "title" in article else ""
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for entry in paragraph["qas"]:
                    where = f"{path}, question {entry['id']}"
                    version_2 = version_2 or "is_impossible" in entry
                    answers = tuple(
                        _align(each["text"], each["answer_start"], context, where) for each in entry.get("answers", ())
                    )
                    impossible = entry.get("is_impossible", False)
                    if not isinstance(impossible, bool):
                        raise UsageError(f"{where}: is_impossible is {impossible!r:.40}, not true or false")
                    question = Question(str(entry["id"]), entry["question"], context, answers, impossible)
                    _check(question, where)
                    if question.id in seen:
                        raise UsageError(f"{where}: there are two of this id")
                    seen.add(question.id)
                    questions.append(question)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{where}: not in the format of SQuAD, {type(error).__name__} {error}") from error
    if not questions:
        raise UsageError(f"{path} has no questions")
    return questions, version_2


def _check(question, where):
    if not isinstance(question.text, str) or not isinstance(question.context, str):
        raise UsageError(f"{where}: the question and its context must be texts")
    if question.impossible and question.answers:
        raise UsageError(f"{where}: is_impossible, but there is an answer")


def _align(text, start, context, where):
    if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
        raise UsageError(f"{where}: an answer is a text and a whole number, not {text!r:.40} and {start!r:.40}")
    for shift in (0, 1, -1, 2, -2):
        for wanted in (text, text.strip()):
            if wanted and start + shift >= 0 and context.startswith(wanted, start + shift):
                return wanted, start + shift
    raise UsageError(
        f"{where}: the answer {text!r} is not at character {start} of the context, where "
        f"{context[max(start, 0) : max(start, 0) + max(len(text), 10)]!r} is"
    )


class Window(NamedTuple):
    """Tokens ``<s> question </s> part of the context </s>``, the third after a second ``</s>`` in RoBERTa.

    ``question`` is the number of the question; the context's token of number ``first_token`` is at ``first`` of
    ``tokens`` and ``count`` of them are there; ``start`` and ``end`` are the answer's first and last place, 0 where it
    is not in the window.
    """

    question: int
    tokens: List[int]
    first: int
    first_token: int
    count: int
    start: int
    end: int


def load_tokenizer(folder, cased: bool):
    """Return WordPiece of ``vocab.txt``, or byte-level BPE of ``vocab.json`` and ``merges.txt``, in ``folder``; and
    whether it is the latter, RoBERTa's.

    Raises:
        UsageError: when they are missing, or the library is
    """
    try:
        from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
    except ImportError as error:
        raise UsageError("to cut words into pieces, install tokenizers: pip install 'fairseq_adaptive[hf]'") from error
    vocabulary, numbers, merges = (os.path.join(folder, name) for name in ("vocab.txt", "vocab.json", "merges.txt"))
    try:
        if os.path.isfile(vocabulary):
            return BertWordPieceTokenizer(vocabulary, lowercase=not cased), False
        if os.path.isfile(numbers) and os.path.isfile(merges):
            return ByteLevelBPETokenizer(numbers, merges, add_prefix_space=True, trim_offsets=True), True
    except Exception as error:  # the library has no class of its own for damaged files
        raise UsageError(f"the vocabulary in {folder} is damaged: {' '.join(str(error).split())}") from error
    raise UsageError(
        f"there is neither vocab.txt nor vocab.json with merges.txt in {folder}: --tokenizer names the "
        "folder that the model was converted from"
    )


def cut(tokenizer, text: str) -> Tuple[List[str], List[Tuple[int, int]]]:
    """Pieces of a text, and of each where it begins and ends there."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded.tokens, encoded.offsets


def answer_tokens(offsets, start: int, end: int) -> Optional[Tuple[int, int]]:
    """Number of the first and the last token of characters ``start`` up to ``end``; None where no token is."""
    inside = [number for number, (begin, stop) in enumerate(offsets) if stop > start and begin < end]
    return (inside[0], inside[-1]) if inside else None


def windows_of(
    number: int,
    question: Question,
    pieces,
    context,
    dictionary,
    max_length: int,
    stride: int,
    max_query_length: int,
    double_separator: bool,
) -> List[Window]:
    """Cut one question into windows.

    Args:
        number: of the question
        pieces: of the question's text
        context: pieces and offsets of the context, from :func:`cut`
        dictionary: fairseq's
        max_length: longest window
        stride: from the beginning of a window to that of the next
        max_query_length: longest question; the rest is cut off
        double_separator: RoBERTa's form

    Raises:
        UsageError: when no token of the context has room beside the question
    """

    def numbers(pieces):
        return [dictionary.index(piece) for piece in pieces]

    head = [dictionary.bos(), *numbers(pieces[:max_query_length]), *[dictionary.eos()] * (1 + double_separator)]
    room, (body, offsets) = max_length - len(head) - 1, context
    if room < 1:
        raise UsageError(
            f"question {question.id} leaves no room for its context in {max_length} tokens: raise "
            "--max-positions or lower --max-query-length"
        )
    answer = None
    if question.answers:
        text, start = question.answers[0]
        answer = answer_tokens(offsets, start, start + len(text))
    body, windows, begin = numbers(body), [], 0
    while True:
        part = body[begin : begin + room]
        start = end = 0
        if answer is not None and begin <= answer[0] and answer[1] < begin + len(part):
            start, end = (len(head) + place - begin for place in answer)
        tokens = [*head, *part, dictionary.eos()]
        windows.append(Window(number, tokens, len(head), begin, len(part), start, end))
        if begin + len(part) >= len(body):
            return windows
        begin += min(stride, room)
