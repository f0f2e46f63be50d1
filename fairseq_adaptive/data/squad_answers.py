"""From scores of tokens to answers, and what they are worth: exact match and F1 as SQuAD's authors define them."""

import collections
import heapq
import math
import re
import string
from typing import Dict, List, NamedTuple, Sequence

from fairseq_adaptive.data.squad import Question


class Candidate(NamedTuple):
    """A possible answer; ``score`` is the sum of the two others."""

    score: float
    text: str
    start_logit: float
    end_logit: float


def candidates(scores, window, context: str, offsets, max_answer_length: int, count: int) -> List[Candidate]:
    """The best answers of one window, best first.

    Args:
        scores: 2 x T, of being an answer's first and last token
        window: :class:`~fairseq_adaptive.data.squad.Window`
        context: the text
        offsets: of its tokens
        max_answer_length: in tokens
        count: how many
    """
    start_scores, end_scores = (row[window.first : window.first + window.count].tolist() for row in scores)
    starts, ends = (
        heapq.nlargest(count, range(window.count), key=row.__getitem__) for row in (start_scores, end_scores)
    )
    found = []
    for start in starts:
        for end in ends:
            if start <= end < start + max_answer_length:
                first, last = offsets[window.first_token + start][0], offsets[window.first_token + end][1]
                total = start_scores[start] + end_scores[end]
                found.append(Candidate(total, context[first:last], start_scores[start], end_scores[end]))
    return heapq.nlargest(count, found)


def n_best(found: Sequence[Candidate], count: int, null: Candidate = None) -> List[dict]:
    """The best answers of all windows with different texts, best first, in the format of BERT's ``nbest`` files.

    Args:
        found: candidates of all windows
        count: how many
        null: what "no answer" has, in version 2
    """
    best: Dict[str, Candidate] = {}
    for candidate in sorted([*found, *([null] if null else [])], reverse=True):
        best.setdefault(candidate.text, candidate)
    chosen = list(best.values())[:count]
    if null and null not in chosen:
        chosen.append(best[""])
    chosen = chosen or [Candidate(0.0, "", 0.0, 0.0)]
    total = sum(math.exp(each.score - chosen[0].score) for each in chosen)
    return [
        {
            "text": each.text,
            "probability": math.exp(each.score - chosen[0].score) / total,
            "start_logit": each.start_logit,
            "end_logit": each.end_logit,
        }
        for each in chosen
    ]


def concluded(found: Sequence[Candidate], null: Candidate, count: int, threshold: float):
    """The answer to a question.

    Args:
        found: candidates of all windows
        null: what "no answer" has; None in version 1, where there is always one
        count: how many of the best ones to keep
        threshold: "no answer" is given where it scores by more than this above the best one

    Returns:
        the text, the list of :func:`n_best`, and by how much "no answer" scores above the best answer, in version 2
    """
    best = n_best(found, count, null)
    if null is None:
        return best[0]["text"], best, None
    chosen = max(found, default=null)
    odds = null.score - chosen.score
    return "" if odds > threshold else chosen.text, best, odds


def normalise(text: str) -> str:
    """Lower-cased, without punctuation and articles, single spaces between words."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, answer: str, version_2: bool) -> float:
    """Harmonic mean of the precision and recall of words; of nothing 1 if both are nothing, in version 2."""
    given, wanted = normalise(prediction).split(), normalise(answer).split()
    if version_2 and not (given and wanted):
        return float(given == wanted)
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def worth(question: Question, prediction: str, version_2: bool):
    """Exact match and F1 of one answer, the best over those that are right."""
    answers = [text for text, _ in question.answers]
    if version_2:
        answers = [text for text in answers if normalise(text)] or [""]
    exact = max(float(normalise(prediction) == normalise(answer)) for answer in answers)
    return exact, max(f1(prediction, answer, version_2) for answer in answers)


def evaluate(questions: Sequence[Question], predictions: Dict[str, str], version_2: bool) -> Dict[str, float]:
    """The figures of the official evaluation, in per cent.

    Args:
        questions: with answers (in version 2, also those without)
        predictions: by the question's id; one that lacks counts 0
        version_2: adds those of questions with and without an answer

    Returns:
        ``exact``, ``f1``, ``total``, in version 2 also ``HasAns_exact`` ... ``NoAns_total``
    """
    values = [
        worth(each, predictions[each.id], version_2) if each.id in predictions else (0.0, 0.0) for each in questions
    ]
    figures = _means(values)
    if not version_2:
        return figures
    for name, impossible in (("HasAns", False), ("NoAns", True)):
        part = [value for value, each in zip(values, questions) if bool(each.answers) != impossible]
        figures.update({f"{name}_{key}": value for key, value in _means(part).items()})
    return figures


def _means(values):
    total = max(len(values), 1)
    return {
        "exact": 100 * sum(exact for exact, _ in values) / total,
        "f1": 100 * sum(f for _, f in values) / total,
        "total": len(values),
    }


def best_threshold(questions: Sequence[Question], answers: Dict[str, str], null_odds: Dict[str, float]):
    """The threshold of "no answer" with the best exact match and that with the best F1, and what they give, per cent.

    Args:
        questions: with and without answers
        answers: the best answer to each that is not empty
        null_odds: score of "no answer" above that of this answer; "no answer" is given where it is above the threshold
    """
    figures = {}
    order = sorted((each for each in questions if each.id in null_odds), key=lambda each: null_odds[each.id])
    for place, name in enumerate(("exact", "f1")):
        current = best = sum(not each.answers for each in questions)
        threshold = 0.0
        for each in order:
            current += worth(each, answers[each.id], True)[place] if each.answers else -1 if answers[each.id] else 0
            if current > best:
                best, threshold = current, null_odds[each.id]
        figures[f"best_{name}"], figures[f"best_{name}_thresh"] = 100 * best / len(questions), threshold
    return figures
