"""Questions to answers: what the reader says is what validation and the script say, alone and in threads."""

import json

import pytest
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from pages import run_python
from threads import assert_threads_equal_one

from fairseq_adaptive.commands.answer import main
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import TranskimmerClassifier, TranskimmerReader
from fairseq_adaptive.interop.checkpoint import save_checkpoint
from fairseq_adaptive.interop.conversion import new_state

pytest.importorskip("tokenizers")
WORDS = "the is in where ? . berlin paris rome germany france italy".split()
FLAGS = (
    "--task question_answering --max-positions 16 --doc-stride 4 --arch transkimmer_base --token-types 2 "
    "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--criterion skim_loss --task-criterion span_prediction"
).split()
CONTEXT = "Berlin is in Germany. Paris is in  France. Rome is in Italy."
QUESTIONS = ["Where is Berlin?", "Where is Rome?", "Is the Paris in Italy?", "Berlin?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint``: of a model with random weights that skims some tokens; beside it its data."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    dictionary = Dictionary()
    for word in ["<mask>", *WORDS]:
        dictionary.add_symbol(word)
    dictionary.save(str(folder / "dict.txt"))
    state = new_state(FLAGS, {})
    state["cfg"]["task"]["data"] = str(folder)
    cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    torch.manual_seed(3)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    for name, weight in model.named_parameters():
        if ".router." in name or "span" in name:
            torch.nn.init.normal_(weight)
    state["model"] = model.state_dict()
    save_checkpoint(state, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


@pytest.fixture
def reader(checkpoint):
    return TranskimmerReader.from_pretrained(checkpoint, device="cpu")


def test_the_page_says_how(checkpoint):
    answer = run_python("examples/question_answering/README.md", "reader.answer", checkpoint)["answer"]
    assert answer.text in "Berlin is in Germany."


@pytest.mark.parametrize("unanswerable", (False, True))
def test_says_what_validation_says(reader, unanswerable, tmp_path):
    qas = [{"id": f"q{number}", "question": text, "answers": []} for number, text in enumerate(QUESTIONS)]
    content = {"data": [{"title": "Places", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}
    if unanswerable:
        qas[:] = [{**each, "is_impossible": True} for each in qas]
    (tmp_path / "questions.json").write_text(json.dumps(content))
    task = reader.task
    data = task.load_file("test", tmp_path / "questions.json")
    assert len(data) > 2 * len(QUESTIONS)  # more windows than one each
    with torch.no_grad():
        sample = data.collater(list(range(len(data))))
        task.collect(sample, reader.model(**sample["net_input"], spans=True)[0])
    answers, lists, odds = task.answers("test")
    said = [reader.answer(each, CONTEXT, unanswerable, batch_size=3) for each in QUESTIONS]
    for number, answer in enumerate(said):
        assert answer.text == answers[f"q{number}"] and (answer.text in CONTEXT)
        assert [each["text"] for each in answer.best] == [each["text"] for each in lists[f"q{number}"]]
        assert answer.null_odds == (pytest.approx(odds[f"q{number}"], abs=1e-4) if unanswerable else None)
        assert 0 < answer.probability <= 1 and 0 < answer.kept <= 1
    assert any(answer.kept < 1 for answer in said) and any(answer.text for answer in said)


def test_threshold_of_no_answer(checkpoint):
    texts = [
        TranskimmerReader.from_pretrained(checkpoint, null_threshold=each, device="cpu")
        .answer(QUESTIONS[0], CONTEXT, unanswerable=True)
        .text
        for each in (-1000.0, 1000.0)
    ]
    assert texts[0] == "" and texts[1]


@pytest.mark.parametrize(
    "given, said",
    (
        ((3, CONTEXT), "the question is 3: give a text"),
        (("Where?", None), "the context is None: give a text"),
        (("Where?", " "), "the context has no words"),
        (("where " * 40, CONTEXT), "leaves no room for its context in 16 tokens"),
        (("Where?", CONTEXT, False, 0), "batch_size"),
    ),
)
def test_what_cannot_be_answered(reader, given, said):
    with pytest.raises(UsageError, match=said):
        reader.answer(*given)


def test_checkpoints_of_other_tasks(checkpoint):
    with pytest.raises(UsageError, match="was trained with --task question_answering, not sentence_prediction"):
        TranskimmerClassifier.from_pretrained(checkpoint)


def test_serves_several_threads(reader):
    assert_threads_equal_one(
        lambda question: reader.answer(question, CONTEXT), QUESTIONS, lambda one, other: one == other, times=5
    )


def test_int8(checkpoint, reader, tmp_path, capsys):
    made = TranskimmerReader.from_pretrained(checkpoint, int8=True)
    assert made.model.maps_in_int8
    for question in QUESTIONS:
        one, other = reader.answer(question, CONTEXT), made.answer(question, CONTEXT)
        assert one.kept == pytest.approx(other.kept, abs=0.1)
        scores = {each["text"]: each["start_logit"] for each in one.best}
        shared = [each for each in other.best if each["text"] in scores]
        assert shared and scores[shared[0]["text"]] == pytest.approx(shared[0]["start_logit"], abs=0.5)
    qas = [{"id": f"q{number}", "question": text, "answers": []} for number, text in enumerate(QUESTIONS)]
    (tmp_path / "asked.json").write_text(
        json.dumps({"data": [{"title": "Places", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]})
    )
    main([str(tmp_path / "asked.json"), "--path", str(checkpoint), "--output", str(tmp_path / "out"), "--int8"])
    said = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert said == {f"q{number}": made.answer(text, CONTEXT).text for number, text in enumerate(QUESTIONS)}
