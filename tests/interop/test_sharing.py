"""A plain Transformer becomes one with shared layers, and at full rank computes the same."""

import copy
import re

import pytest
import torch
from families import FAMILIES, Family, build_trainer, train, write_data
from fairseq.checkpoint_utils import load_checkpoint as load_checkpoint_of
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from hypothesis import given
from hypothesis import strategies as st

from fairseq_adaptive.commands import convert, export
from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import load_checkpoint, save_checkpoint, unroll_checkpoint
from fairseq_adaptive.interop.sharing import STARTS, low_rank, share_layers, start_of
from fairseq_adaptive.interop.verifying import built, scores, sequences
from fairseq_adaptive.modules import layer_schedule

SIDES = ("encoder", "decoder")
SIZES = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 6}
TASKS = {"transformer": "translation", "transformer_lm": "language_modeling", "roberta_base": "masked_lm"}
LM = {**{f"decoder_{name}": value for name, value in SIZES.items()}, "decoder_input_dim": 16, "decoder_output_dim": 16}


@pytest.fixture
def plain(checkpoint):
    """``plain(arch, flag=value ...)``: a model with weights that are all random, and its checkpoint."""

    def plain(arch="transformer", **flags):
        if arch == "transformer":
            sizes = {f"{side}_{name}": value for side in SIDES for name, value in SIZES.items()}
            sizes.update(max_source_positions=64, max_target_positions=64)
        elif arch == "roberta_base":
            sizes = {f"encoder_{name}": value for name, value in SIZES.items()} | {"max_positions": 64}
        else:
            sizes = {**LM, "tokens_per_sample": 64}
        task = TASKS[arch]
        model, state = checkpoint(arch, task, **{**sizes, **flags})
        torch.manual_seed(7)
        with torch.no_grad():
            for each in model.parameters():
                each.add_(torch.randn_like(each) * 0.2)
        state["model"] = {name: each.clone() for name, each in model.state_dict().items()}
        return model, state

    return plain


@pytest.mark.parametrize("schedule", ("cycle", "sequence", "cycle_rev", "middle_cycle"))
@pytest.mark.parametrize("pre_norm", (False, True), ids=("post-norm", "pre-norm"))
@pytest.mark.parametrize("start", STARTS)
def test_full_rank_is_the_original(plain, batch, schedule, pre_norm, start):
    model, state = plain(**{f"{side}_normalize_before": pre_norm for side in SIDES})
    before = copy.deepcopy(state["model"])
    found = share_layers(state, 3, schedule, 16, start)
    assert found.exact and found.kept == 1 and found.difference < 1e-4
    shared = built(found.state)
    assert shared.encoder.layers.unique_layers == 3
    assert shared.encoder.layers.schedule == layer_schedule(schedule, 3, 6)
    with torch.no_grad():
        expected = model(**batch)[0]
        torch.testing.assert_close(shared(**batch)[0], expected, rtol=1e-5, atol=1e-5)
        back = built(unroll_checkpoint(found.state))
        torch.testing.assert_close(back(**batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], each) for name, each in state["model"].items())


@pytest.mark.parametrize(
    "flags",
    (
        {},
        {"decoder_normalize_before": True},
        {"adaptive_input": True, "adaptive_input_cutoff": "10,20", "adaptive_softmax_cutoff": "10,20"},
    ),
    ids=("post-norm", "pre-norm", "adaptive"),
)
def test_full_rank_of_a_language_model(plain, batch, flags):
    model, state = plain("transformer_lm", **flags)
    shared = built(share_layers(state, 2, "cycle", 16).state)
    tokens = batch["src_tokens"].flip(1)
    with torch.no_grad():
        expected, found = (each.get_normalized_probs(each(tokens), True) for each in (model, shared))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", (16, 3))
def test_a_classifier(plain, batch, rank):
    """Of fairseq's RoBERTa, heads and all; it goes back as one."""
    model, state = plain("roberta_base")
    model.register_classification_head("topic", num_classes=3)
    state["model"] = {name: each.clone() for name, each in model.state_dict().items()}
    found = share_layers(state, 2, "cycle", rank)
    shared = built(found.state)
    assert found.exact == (rank == 16) and shared.encoder.sentence_encoder.layers.unique_layers == 2
    tokens = batch["src_tokens"].flip(1)
    with torch.no_grad():
        expected, scored = (each(tokens, classification_head_name="topic")[0] for each in (model, shared))
        assert torch.allclose(scored, expected, rtol=1e-5, atol=1e-5) == found.exact
        back = built(unroll_checkpoint(found.state))
        assert type(back).__name__ == "RobertaModel"
        torch.testing.assert_close(back(tokens, classification_head_name="topic")[0], scored, rtol=1e-5, atol=1e-5)


def test_generation_is_the_original(plain, batch, dictionary):
    model, state = plain()
    shared = built(share_layers(state, 2, "sequence", 16).state)
    sample = {"net_input": {name: batch[name] for name in ("src_tokens", "src_lengths")}}
    found = []
    for each in (model, shared):
        generator = BeamGenerator([each], dictionary, beam_size=4, max_len_b=10)
        found.append([[hypo["tokens"].tolist() for hypo in hypos] for hypos in generator.generate([each], sample)])
    assert found[0] == found[1]


def test_error_falls_with_the_rank(plain):
    """What is kept rises to all of it; with rank 0 nothing is, and the layers are the averages."""
    _, state = plain()
    found = [share_layers(state, 2, "cycle", rank) for rank in (0, 1, 2, 4, 8, 12, 15, 16)]
    kept = [each.kept for each in found]
    assert kept[0] == 0 and kept == sorted(set(kept)) and kept[-1] == 1
    assert [each.exact for each in found] == [False] * 7 + [True]
    assert found[1].difference > 100 * found[-1].difference
    weights, shared = state["model"], found[0].state["model"]
    assert not any(".depth_" in name for name in shared)
    for name in ("fc1.weight", "final_layer_norm.bias"):
        mean = torch.stack([weights[f"encoder.layers.{depth}.{name}"].double() for depth in (1, 3, 5)]).mean(0)
        torch.testing.assert_close(shared[f"encoder.layers.1.{name}"], mean.float())


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_low_rank_is_the_nearest(rows, columns, rank, seed):
    """Its squared distance is the tail of the singular values (Eckart and Young, 1936)."""
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a, b, lost = low_rank(matrix, rank)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
    torch.testing.assert_close((matrix - b @ a).square().sum(), tail, rtol=1e-9, atol=1e-12)
    assert lost == pytest.approx(float(tail), rel=1e-9, abs=1e-12)


def test_starts():
    assert [start_of("stepwise", number, 3, 6) for number in range(3)] == [0, 2, 5]
    assert [start_of("lower", number, 3, 6) for number in range(3)] == [0, 1, 2]
    assert [start_of("upper", number, 3, 6) for number in range(3)] == [3, 4, 5]
    assert start_of("average", 1, 3, 6) is None and start_of("stepwise", 0, 1, 6) == 0


@pytest.mark.parametrize("start", STARTS)
def test_what_tied_layers_start_from(plain, start):
    _, state = plain()
    found = share_layers(state, 3, "cycle", 2, start).state["model"]
    name = "decoder.layers.{}.encoder_attn.v_proj.weight"
    for number in range(3):
        first = start_of(start, number, 3, 6)
        if first is not None:
            assert torch.equal(found[name.format(number)], state["model"][name.format(first)])


def test_command_line(plain, tmp_path, capsys, monkeypatch):
    model, state = plain()
    save_checkpoint(state, tmp_path / "plain.pt")
    common = ["convert", "--format", "fairseq", "--input", str(tmp_path / "plain.pt"), "--share", "3"]
    convert.main([*common[1:], "--depth-lora-rank", "16", "--output", str(tmp_path / "full")])
    assert "checkpoint.pt, the same scores as" in capsys.readouterr().out
    convert.main([*common[1:], "--depth-lora-rank", "4", "--schedule", "cycle_rev", "--output", str(tmp_path / "low")])
    said = capsys.readouterr().out
    assert "scores unlike those of" in said and "rank 4 keeps" in said
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["checkpoint.pt"]
    read = load_checkpoint(tmp_path / "full" / "checkpoint.pt")
    inputs = sequences(model)
    torch.testing.assert_close(scores(built(read), inputs), scores(model, inputs), rtol=1e-5, atol=1e-5)
    export.main(["--to", "fairseq", str(tmp_path / "low" / "checkpoint.pt"), "--output", str(tmp_path / "back.pt")])
    low, back = (built(load_checkpoint(tmp_path / name)) for name in ("low/checkpoint.pt", "back.pt"))
    assert type(back).__name__ == "TransformerModel"
    torch.testing.assert_close(scores(back, inputs), scores(low, inputs), rtol=1e-5, atol=1e-5)


def test_ctranslate2(plain, tmp_path, data_dir):
    pytest.importorskip("ctranslate2")
    from fairseq_adaptive.interop import convert_to_ctranslate2

    _, state = plain()
    unrolled = unroll_checkpoint(share_layers(state, 2, "cycle", 5).state)
    convert_to_ctranslate2(unrolled, data_dir, tmp_path / "ct2")  # compares the scores


@pytest.mark.parametrize(
    "share, message",
    (
        ((7, "cycle", 2), "7 unique layers cannot serve 6 depths"),
        ((6, "cycle", 2), "--share 6 shares nothing: the model has 6 layers"),
        ((2, "middle_cycle", 2), "needs at least 3 unique layers, not 2"),
        ((2, "cycle", 17), "--depth-lora-rank 17 is impossible: .* dimension of 16"),
        ((2, "cycle", -1), "--depth-lora-rank -1 is impossible"),
    ),
)
def test_refusals(plain, share, message):
    with pytest.raises(UsageError, match=message):
        share_layers(plain()[1], *share)


def test_refuses_what_cannot_differ(plain, flags_of, checkpoint):
    with pytest.raises(UsageError, match="c_attn differs from layer to layer, and shared layers have no place"):
        share_layers(plain(scale_heads=True)[1], 2, "cycle", 4)
    with pytest.raises(UsageError, match="of architecture shared_transformer: only fairseq's own"):
        share_layers(checkpoint("shared_transformer", **flags_of())[1], 2)
    sizes = {f"encoder_{name}": value for name, value in SIZES.items()} | {"max_positions": 64}
    _, state = checkpoint("transkimmer_base", "masked_lm", **sizes)
    with pytest.raises(UsageError, match=r"the model has a policy \(router\): fairseq's plain RoBERTa computes"):
        unroll_checkpoint(state)
    _, state = checkpoint("transkimmer_base", "masked_lm", **sizes, no_skimming=True, layer_norm_eps=0.1)
    with pytest.raises(UsageError, match="the plain RoBERTa computes something else"):
        unroll_checkpoint(state)


SHARING, CONVERSION = (f"--{name} sequence --depth-lora-rank 32" for name in ("layer-sharing", "schedule"))
_TRANSLATION = FAMILIES["shared_transformer"].flags
_CLASSIFIER = f"{FAMILIES['transkimmer'].flags} --encoder-layers 4"
_CLASSIFIER = re.sub(" --skim-factor [0-9.]+", "", _CLASSIFIER.replace("skim_loss", "sentence_prediction"))
STOCK = {
    "pairs": (re.sub(r"--arch \w+|--\w+-unique-layers \d+", "", _TRANSLATION) + " --arch transformer", _TRANSLATION),
    "labels": (
        _CLASSIFIER.replace("transkimmer_base", "roberta_base"),
        f"{_CLASSIFIER} --no-skimming --encoder-unique-layers 2",
    ),
}


@pytest.mark.parametrize("data", STOCK)
def test_a_training_is_converted_and_goes_on(data, tmp_path, monkeypatch):
    """What fairseq's trainer wrote, read back as fairseq-generate does, and the start of a training that moves it."""
    folder, (stock, tuned) = write_data(tmp_path / "data"), STOCK[data]
    monkeypatch.setitem(FAMILIES, "stock", Family(data, stock))
    monkeypatch.setitem(FAMILIES, "tuned", Family(data, f"{tuned} {SHARING}"))
    trainer, batches = build_trainer("stock", folder)
    assert not type(trainer.model).__module__.startswith("fairseq_adaptive")
    train(trainer, batches, 3)
    trainer.consolidate_optimizer()
    path = tmp_path / "plain.pt"
    trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "version": 2, "iterations_in_epoch": 3}})
    out = tmp_path / "out"
    convert.main(f"--format fairseq --input {path} --share 2 {CONVERSION} --output {out}".split())
    (model,), _, task = load_model_ensemble_and_task([str(out / "checkpoint.pt")])
    inputs = dict(next(iter(batches))["net_input"])
    if data == "labels":
        inputs.update(features_only=True, classification_head_name="sentence_classification_head")

    def compared(found):
        with torch.no_grad():
            expected, found = (each.eval()(**inputs)[0] for each in (trainer.model, found))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    compared(model)
    start = ["--finetune-from-model", str(out / "checkpoint.pt"), "--save-dir", str(tmp_path / "new")]
    tuned, batches = build_trainer("tuned", folder, *start)
    load_checkpoint_of(tuned.cfg.checkpoint, tuned, disable_iterator_cache=True)
    compared(tuned.model)
    assert len(train(tuned, batches, 2)) == 2
