"""CTranslate2 models: the scores of the fairseq model, in the space of the shared layers."""

import sys

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import convert_to_ctranslate2, to_ctranslate2, unroll_checkpoint

OPTIONS = [
    {"strategy": "sequence", "unique": 2},
    {"strategy": "cycle", "unique": 3, "share_all_embeddings": True},
    {"strategy": "cycle_rev", "unique": 5, "activation_fn": "gelu"},
    {"unique": 1, "encoder_normalize_before": True, "decoder_normalize_before": True},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True, "no_scale_embedding": True},
    {"encoder_embed_dim": 32},
]


@pytest.fixture
def ctranslate2():
    return pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (extra export)")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_scores_are_those_of_the_model(
    flags_of, ctranslate2, checkpoint, dictionary, data_dir, batch, tmp_path, options
):
    model, state = checkpoint("shared_transformer", **flags_of(**options))
    convert_to_ctranslate2(unroll_checkpoint(state), data_dir, tmp_path / "model")
    translator = ctranslate2.Translator(str(tmp_path / "model"), intra_threads=1)
    with torch.no_grad():
        expected = model(**batch)[0].log_softmax(-1)
    for row, (tokens, previous) in enumerate(zip(batch["src_tokens"], batch["prev_output_tokens"])):
        source = [dictionary[token] for token in tokens if token not in (dictionary.pad(), dictionary.eos())]
        target = [token for token in previous[1:].tolist() if token != dictionary.pad()]
        scores = translator.score_batch([source], [[dictionary[token] for token in target]])[0].log_probs
        target.append(dictionary.eos())
        wanted = [expected[row, step, token].item() for step, token in enumerate(target)]
        assert scores == pytest.approx(wanted, abs=1e-4)


def test_language_model(ctranslate2, checkpoint, dictionary, data_dir, batch, tmp_path):
    flags = {
        "decoder_embed_dim": 16,
        "decoder_ffn_embed_dim": 32,
        "decoder_attention_heads": 2,
        "decoder_layers": 5,
        "decoder_input_dim": 16,
        "decoder_output_dim": 16,
        "decoder_unique_layers": 2,
        "tokens_per_sample": 64,
        "max_target_positions": 64,
    }
    model, state = checkpoint("shared_transformer_lm_base", "language_modeling", **flags)
    state["cfg"]["task"].update(add_bos_token=False)
    convert_to_ctranslate2(unroll_checkpoint(state), data_dir, tmp_path / "model")
    generator = ctranslate2.Generator(str(tmp_path / "model"), intra_threads=1)
    tokens = batch["prev_output_tokens"][1:2]
    with torch.no_grad():
        expected = model(tokens)[0].log_softmax(-1)[0]
    scores = generator.score_batch([[dictionary[token] for token in tokens[0]]])[0].log_probs
    wanted = [expected[step, token].item() for step, token in enumerate(tokens[0, 1:])]
    assert scores == pytest.approx(wanted, abs=1e-4)


def test_depth_takes_no_space(flags_of, ctranslate2, checkpoint, data_dir, tmp_path):
    """2 unique layers at 5 depths take the space of 2 layers, a few names aside; 5 unique ones take more than twice."""
    sizes = {}
    for unique, depths in ((2, 2), (2, 5), (5, 5)):
        flags = flags_of(unique, "cycle", encoder_layers=depths, decoder_layers=depths, encoder_ffn_embed_dim=2048)
        state = unroll_checkpoint(checkpoint("shared_transformer", **flags)[1])
        convert_to_ctranslate2(state, data_dir, tmp_path / f"model{unique}-{depths}")
        sizes[unique, depths] = (tmp_path / f"model{unique}-{depths}" / "model.bin").stat().st_size
    assert sizes[2, 5] < 1.05 * sizes[2, 2]
    assert sizes[5, 5] > 2 * sizes[2, 5]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"adaptive_softmax_cutoff": "20,30"}, "no equivalent of --adaptive-softmax-cutoff"),
        ({"no_cross_attention": True, "cross_self_attention": True}, "--no-cross-attention, --cross-self-attention"),
        (
            {"encoder_normalize_before": True, "decoder_normalize_before": True, "no_decoder_final_norm": True},
            "--no-decoder-final-norm",
        ),
        ({"decoder_output_dim": 8}, "--decoder-output-dim"),
        ({"encoder_normalize_before": True}, "cannot convert the model: .*--encoder-normalize-before and --decoder"),
        ({"activation_fn": "tanh"}, "cannot convert the model: .*--activation-fn tanh"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses_what_ctranslate2_cannot_express(flags_of, ctranslate2, checkpoint, data_dir, tmp_path, flags, message):
    state = unroll_checkpoint(checkpoint("shared_transformer", **flags_of(**flags))[1])
    with pytest.raises(UsageError, match=message):
        convert_to_ctranslate2(state, data_dir, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["data-bin"]


def test_refuses_a_model_that_computes_something_else(
    flags_of, ctranslate2, checkpoint, data_dir, tmp_path, monkeypatch
):
    """What the converter loses without a word is seen, and nothing is left of it."""
    state = unroll_checkpoint(checkpoint("shared_transformer", **flags_of())[1])
    save = to_ctranslate2.save_tensors

    def save_without_a_bias(content, path):
        name = "decoder.layers.0.fc1.bias"
        save({**content, "model": {**content["model"], name: content["model"][name] + 1}}, path)

    monkeypatch.setattr(to_ctranslate2, "save_tensors", save_without_a_bias)
    with pytest.raises(UsageError, match="the CTranslate2 model computes something else, its outputs differ by"):
        convert_to_ctranslate2(state, data_dir, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["data-bin"]


def test_asks_for_the_missing_package(flags_of, checkpoint, data_dir, tmp_path, monkeypatch):
    state = unroll_checkpoint(checkpoint("shared_transformer", **flags_of())[1])
    for name in ("ctranslate2", "ctranslate2.converters"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"CTranslate2 is not installed: pip install 'fairseq_adaptive\[export\]'"):
        convert_to_ctranslate2(state, data_dir, tmp_path / "model")


def test_never_overwrites(flags_of, checkpoint, data_dir, tmp_path):
    (tmp_path / "model").mkdir()
    state = unroll_checkpoint(checkpoint("shared_transformer", **flags_of())[1])
    with pytest.raises(UsageError, match="model exists"):
        convert_to_ctranslate2(state, data_dir, tmp_path / "model")


def test_refuses_data_of_another_model(flags_of, ctranslate2, checkpoint, data_dir, dictionary, tmp_path):
    state = unroll_checkpoint(checkpoint("shared_transformer", **flags_of())[1])
    with pytest.raises(UsageError, match="no folder .*nowhere with the dictionaries"):
        convert_to_ctranslate2(state, tmp_path / "nowhere", tmp_path / "model")
    state["cfg"]["task"].update(source_lang=None, target_lang=None)
    with pytest.raises(UsageError, match="data-bin does not tell the languages .*--source-lang"):
        convert_to_ctranslate2(state, data_dir, tmp_path / "model")
    convert_to_ctranslate2(state, data_dir, tmp_path / "model", "src", "tgt")
    with open(data_dir / "dict.src.txt", "a") as words:
        words.write("another 1\n")
    with pytest.raises(UsageError, match="does not fit the dictionaries in .*data-bin: .*size mismatch"):
        convert_to_ctranslate2(state, data_dir, tmp_path / "other", "src", "tgt")
