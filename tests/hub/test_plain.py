"""Folders of save_pretrained in plain torch: the same outputs, and the same tokens computed, without fairseq."""

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import tasks
from omegaconf import OmegaConf
from test_plugin import BLOCK

from fairseq_adaptive import hub
from fairseq_adaptive.commands import export
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import save_checkpoint
from fairseq_adaptive.interop.conversion import new_state
from fairseq_adaptive.report.costs import without_policies

pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[2]
WORDS = "good bad film was the a story , . it never works plot ##s".split()
SIZES = "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --max-positions 16"
TASK = "--task sentence_prediction --criterion sentence_prediction --init-token 0 --num-classes 2"
TEXTS = ["a good story", "the film never works , it was bad .", "", "a bad plot , bad films ."]
CASES = {
    "transkimmer": "--arch transkimmer_bert_base --encoder-layers 3 --skim-bias 0",
    "roberta_shared": "--arch transkimmer_base --encoder-layers 4 --encoder-unique-layers 2 --depth-lora-rank 2 "
    "--router mixture_of_depths --halting pondernet --exit-quantile 0.3 --activation-fn relu "
    "--protect-separators --encoder-normalize-before",
    "dense": "--arch transkimmer_minilm_l6 --encoder-layers 2 --no-skimming --reader tape "
    '--reader-args {"tokens":4,"bank_size":20,"depth":1}',
    "albert_act": "--arch albert_act_tiny --encoder-layers 4 --encoder-input-dim 8",
    "albert_skim": "--arch albert_act_tiny --encoder-layers 4 --encoder-input-dim 8 --router skimming --halting-kv active",
}


def lines(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(content) + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(flags)``: a classifier with random weights."""
    folder = tmp_path_factory.mktemp("plain")
    lines(folder / "vocab.txt", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    lines(folder / "input0" / "dict.txt", [f"{word} 1" for word in ["<mask>", *WORDS]])
    lines(folder / "label" / "dict.txt", ["positive 2", "negative 1"])

    @functools.cache
    def made(flags):
        state = new_state([*TASK.split(), *SIZES.split(), *flags.split()], {})
        state["cfg"]["task"]["data"] = str(folder)
        cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        torch.manual_seed(3)
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
        for name, weight in model.named_parameters():
            if any(part in name for part in (".router.", ".halting.", "out_proj", "embed_positions", "lora_b")):
                torch.nn.init.normal_(weight)
        state["model"] = model.state_dict()
        path = folder / f"{abs(hash(flags))}.pt"
        save_checkpoint(state, path)
        classifier = hub.from_pretrained(path, device="cpu")
        path.unlink()
        return classifier

    return made


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_plain_torch_says_the_same(flags, made, tmp_path):
    classifier = made(flags)
    classifier.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["needs_fairseq"] is None and str(tmp_path.parent) not in json.dumps(config)
    plain = hub.TranskimmerClassifier._plain(tmp_path / "saved", None, False, None, "cpu", False)
    expected = classifier.predict(TEXTS, batch_size=3)
    plain.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()
    for other in (plain, hub.from_pretrained(tmp_path / "twice", device="cpu")):
        for one, two in zip(expected, other.predict(TEXTS, batch_size=3)):
            assert one.tokens == two.tokens and one.updates == two.updates and one.skimmed == two.skimmed
            assert one.probabilities == pytest.approx(two.probabilities, abs=1e-6)
    assert torch.equal(plain.encode(TEXTS)["input_ids"], classifier.encode(TEXTS)["input_ids"])
    assert plain._repr_html_().count("<i class=d") == classifier._repr_html_().count("<i class=d") > 5


def test_some_tokens_are_not_computed(made):
    (found,) = made(CASES["albert_skim"]).predict([TEXTS[1]])
    assert len(set(found.updates)) > 1


def test_without_fairseq(made, tmp_path):
    """In a process that has torch and safetensors alone, and tokenizers to cut texts."""
    made(CASES["albert_act"]).save_pretrained(tmp_path / "saved")
    expected = [each.probabilities for each in made(CASES["albert_act"]).predict(TEXTS)]
    (tmp_path / "other").mkdir()
    content = {"fairseq_adaptive": "0", "format": 1, "architecture": "par_transformer_xl", "task": "language_modeling"}
    content |= {"flags": {}, "tied": {}, "options": {}, "plain": None, "needs_fairseq": "it has memories"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(content))
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
{BLOCK}
import json
from fairseq_adaptive import hub
from fairseq_adaptive.commands import export
from fairseq_adaptive.errors import UsageError
classifier = hub.from_pretrained({str(tmp_path / "saved")!r})
print(json.dumps([each.probabilities for each in classifier.predict({TEXTS!r})]))
for source in ({str(tmp_path / "other")!r}, "some.pt"):
    try:
        hub.from_pretrained(source)
    except UsageError as error:
        print(error)
assert "fairseq" not in sys.modules and classifier.trace
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, refused, checkpoint = done.stdout.splitlines()
    for one, two in zip(json.loads(said), expected, strict=True):
        assert one == pytest.approx(two, abs=1e-6)
    assert "par_transformer_xl for language_modeling, which needs fairseq: it has memories" in refused
    assert checkpoint.startswith("the checkpoint some.pt is read with fairseq, which is not installed here")


def test_what_is_not_built_is_named(made, tmp_path, monkeypatch):
    """By the folder, which fairseq still reads."""
    classifier = made(CASES["transkimmer"])
    monkeypatch.setattr(classifier.model.encoder.sentence_encoder.cfg, "activation_fn", "mish")
    classifier.save_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match="needs fairseq: --activation-fn mish is not built in plain torch"):
        hub.TranskimmerClassifier._plain(tmp_path / "saved", None, False, None, "cpu", False)


def test_damaged_descriptions(made, tmp_path):
    made(CASES["albert_act"]).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    text = path.read_text()
    for damage, said in (
        ({"dim": 0}, "dim of the encoder is 0"),
        ({"heads": 3}, "heads, which do not divide"),
        ({"positions": "x"}, "positions of the encoder are"),
        ({"more": 1}, "that of another version"),
        ({"halting": {"name": "nonsense"}}, "unknown halting rule"),
        ({"ffn_dim": 8}, "do not fit its config.json"),
    ):
        config = json.loads(text)
        config["plain"]["encoder"].update(damage)
        path.write_text(json.dumps(config))
        with pytest.raises(UsageError, match=said):
            hub.TranskimmerClassifier._plain(tmp_path / "saved", None, False, None, "cpu", False)


def test_onnx_from_the_command(made, tmp_path):
    """The labels of a classifier that skims and halts, and those of its counterpart; what has no such form is refused."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    classifier = made(CASES["albert_skim"])
    classifier.save_pretrained(tmp_path / "saved")
    tokens = classifier.encode(TEXTS)["input_ids"]
    for flags in ([], ["--counterpart"]):
        path = str(tmp_path / f"model{len(flags)}.onnx")
        export.main([str(tmp_path / "saved"), "--to", "onnx", "--output", path, *flags])
        (scores,) = runtime.InferenceSession(path).run(None, {"tokens": tokens.numpy()})
        with without_policies(classifier.model) if flags else contextlib.nullcontext():
            expected = classifier.predict(TEXTS)
        labels = [classifier.labels[number] for number in scores.argmax(-1)]
        assert labels == [each.label for each in expected]
        chances = torch.from_numpy(scores).softmax(-1)[:, classifier.labels.index("positive")].tolist()
        assert chances == pytest.approx([each.probabilities["positive"] for each in expected], abs=1e-5)
    routed = made(CASES["roberta_shared"])
    with pytest.raises(UsageError, match="mixture_of_depths compares tokens"):
        routed.export_onnx(tmp_path / "routed.onnx")
    assert routed.exportable(counterpart=True)(tokens).shape == (4, 2)
    assert not (tmp_path / "routed.onnx").exists()
