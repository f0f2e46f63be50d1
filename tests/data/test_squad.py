"""SQuAD's files, windows, answers and figures."""

import json

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_adaptive.data.squad import Question, Window, answer_tokens, read_squad, windows_of
from fairseq_adaptive.data.squad_answers import best_threshold, candidates, evaluate, f1, n_best, normalise, worth
from fairseq_adaptive.errors import UsageError

CONTEXT = "The old mill stands by the river Wye, built in 1784."


def entry(**changes):
    return {"id": "q1", "question": "When was it built?", "answers": [{"text": "1784", "answer_start": 47}], **changes}


def write(path, *entries, **article):
    data = [{"title": "Mill", "paragraphs": [{"context": CONTEXT, "qas": list(entries)}], **article}]
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


def test_reads_both_versions(tmp_path):
    (first,), version_2 = read_squad(write(tmp_path / "a.json", entry()))
    assert first == Question("q1", "When was it built?", CONTEXT, (("1784", 47),), False) and not version_2
    nothing = entry(id="q2", answers=[], is_impossible=True)
    questions, version_2 = read_squad(write(tmp_path / "b.json", entry(is_impossible=False), nothing))
    assert [each.impossible for each in questions] == [False, True] and version_2


def test_puts_answers_right_that_are_off_by_a_character(tmp_path):
    spaced = entry(answers=[{"text": " built in 1784", "answer_start": 35}, {"text": "1784", "answer_start": 46}])
    (first,), _ = read_squad(write(tmp_path / "a.json", spaced))
    assert all(CONTEXT.startswith(text, start) for text, start in first.answers)
    assert [text.strip() for text, _ in first.answers] == ["built in 1784", "1784"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: [entry(answers=[{"text": "1785", "answer_start": 47}])], "question q1: the answer '1785' is not at"),
        (lambda: [entry(answers=[{"text": "1784", "answer_start": 900}])], "question q1: the answer '1784' is not at"),
        (lambda: [entry(), entry()], "question q1: there are two of this id"),
        (lambda: [entry(is_impossible=True)], "question q1: is_impossible, but there is an answer"),
        (lambda: [entry(), {"id": "q7"}], "question q7: not in the format of SQuAD, KeyError 'question'"),
        (lambda: [entry(id="q8", answers=[{"text": "1784"}])], "question q8: .*answer_start"),
        (lambda: [{"question": "Who?"}], r"article 0 \(Mill\): not in the format of SQuAD, KeyError 'id'"),
        (lambda: [], "has no questions"),
    ],
)
def test_refuses_what_contradicts_itself(tmp_path, spoil, message):
    with pytest.raises(UsageError, match=message):
        read_squad(write(tmp_path / "a.json", *spoil()))


def test_refuses_what_is_cut_short(tmp_path):
    path = write(tmp_path / "a.json", entry())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UsageError, match="cut short, damaged or no JSON"):
        read_squad(path)
    path.write_text('{"version": 1}')
    with pytest.raises(UsageError, match='no "data"'):
        read_squad(path)


@pytest.fixture
def words():
    dictionary = Dictionary()
    for number in range(40):
        dictionary.add_symbol(f"t{number}")
    return dictionary


def test_windows_overlap_and_hold_the_answer(words):
    offsets = [(3 * number, 3 * number + 2) for number in range(20)]
    question = Question("q", "", "x" * 60, (("xxxxx", 27),), False)  # tokens 9 and 10
    context = ([f"t{number}" for number in range(20)], offsets)
    made = windows_of(5, question, ["t30", "t31", "t32"], context, words, 14, 6, 2, False)
    head = [0, words.index("t30"), words.index("t31"), 2]  # the question is cut to two tokens
    assert [(window.first_token, window.count) for window in made] == [(0, 9), (6, 9), (12, 8)]
    assert all(window.tokens[:4] == head and window.tokens[-1] == 2 and window.question == 5 for window in made)
    assert [(window.start, window.end) for window in made] == [(0, 0), (7, 8), (0, 0)]
    assert [words.symbols[each] for each in made[1].tokens[7:9]] == ["t9", "t10"]
    double = windows_of(5, question, ["t30"], context, words, 14, 6, 2, True)
    assert double[0].tokens[:4] == [0, words.index("t30"), 2, 2] and double[0].count == 9
    with pytest.raises(UsageError, match="question q leaves no room"):
        windows_of(5, question, ["t30", "t31"], context, words, 5, 6, 9, False)
    assert answer_tokens(offsets, 28, 29) == (9, 9) and answer_tokens(offsets, 90, 95) is None


def test_candidates_are_the_best_spans():
    torch.manual_seed(1)
    window = Window(0, list(range(12)), 3, 2, 8, 0, 0)
    offsets = [(number, number + 1) for number in range(12)]
    scores = torch.randn(2, 12, dtype=torch.float64)
    scores[:, :3] += 50  # the question is no answer
    found = candidates(scores, window, "abcdefghijkl", offsets, 3, 100)
    expected = {}
    for start in range(8):
        for end in range(start, min(start + 3, 8)):
            expected["abcdefghijkl"[start + 2 : end + 3]] = float(scores[0, 3 + start] + scores[1, 3 + end])
    assert {each.text: each.score for each in found} == pytest.approx(expected)
    assert found == sorted(found, reverse=True) and candidates(scores, window, "abcdefghijkl", offsets, 3, 1) != []
    best = n_best(found + found, 4)
    assert [each["text"] for each in best] == [each.text for each in found[:4]]
    assert sum(each["probability"] for each in best) == pytest.approx(1)
    null = found[0]._replace(score=-90.0, text="")
    assert n_best(found, 2, null)[-1]["text"] == "" and n_best([], 3)[0]["text"] == ""


def test_figures_are_those_of_the_definition():
    assert normalise("The  Wye, a river's!") == "wye rivers"
    assert f1("river Wye bank", "the river Wye", True) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("wye wye", "wye", False) == pytest.approx(2 / 3)
    assert (f1("", "", True), f1("", "", False), f1("x", "", True)) == (1.0, 0.0, 0.0)
    question = Question("1", "", "", (("in 1784", 0), ("1784", 3)), False)
    assert worth(question, "1784.", False) == (1.0, 1.0)
    questions = [question, Question("2", "", "", (), True), Question("3", "", "", (("red mill", 0),), False)]
    predictions = {"1": "1784", "2": "something", "3": "mill"}
    figures = evaluate(questions, predictions, True)
    assert figures["exact"] == pytest.approx(100 / 3) and figures["total"] == 3
    assert figures["f1"] == pytest.approx(100 * (1 + 0 + 2 / 3) / 3)
    assert figures["HasAns_exact"] == 50 and figures["NoAns_exact"] == 0 and figures["NoAns_total"] == 1
    assert evaluate(questions[:1], {}, False)["exact"] == 0

    odds = {"1": -3.0, "2": 4.0, "3": 1.0}
    found = best_threshold(questions, predictions, odds)
    tried = {}
    for threshold in (-9.0, -3.0, 1.0, 4.0):
        given = {name: "" if odds[name] > threshold else text for name, text in predictions.items()}
        tried[threshold] = evaluate(questions, given, True)
    assert found["best_exact"] == pytest.approx(max(each["exact"] for each in tried.values()))
    assert found["best_f1"] == pytest.approx(max(each["f1"] for each in tried.values()))
    assert tried[found["best_f1_thresh"]]["f1"] == pytest.approx(found["best_f1"])


def test_figures_are_those_of_torchmetrics():
    pytest.importorskip("torchmetrics", reason="torchmetrics, which knows the figures of version 1.1, is not installed")
    from torchmetrics.functional.text import squad

    words = ["The old mill", "an old mill.", "mill", "river Wye", "the river, Wye!", "1784", "in 1784", "", "a"]
    questions, predictions = [], {}
    for number, right in enumerate(words[:7]):
        for other, said in enumerate(words):
            name = f"{number}-{other}"
            questions.append(Question(name, "?", CONTEXT, ((right, 0), (words[(number + 3) % 7], 0)), False))
            predictions[name] = said
    given = [{"id": name, "prediction_text": said} for name, said in predictions.items()]
    right = [
        {"id": each.id, "answers": {"text": [text for text, _ in each.answers], "answer_start": [0, 0]}}
        for each in questions
    ]
    found, wanted = evaluate(questions, predictions, False), squad(given, right)
    assert found["exact"] == pytest.approx(float(wanted["exact_match"]), abs=1e-4)
    assert found["f1"] == pytest.approx(float(wanted["f1"]), abs=1e-4) and 20 < found["f1"] < 90
