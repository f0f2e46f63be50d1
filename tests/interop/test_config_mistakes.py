"""Configurations of published models that are wrong: each is refused in one line that names the key."""

import math

import pytest

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import albert_act, bert, transfo_xl


CONFIG = {
    "bert": (
        {
            "model_type": "bert",
            "vocab_size": 30,
            "hidden_size": 8,
            "intermediate_size": 12,
            "hidden_act": "gelu",
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_dropout_prob": 0.1,
            "layer_norm_eps": 1e-12,
            "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 16,
            "type_vocab_size": 2,
        },
        bert,
    ),
    "albert_act": (
        {
            "vocab_size": 30,
            "hidden_size": 8,
            "intermediate_size": 12,
            "embedding_size": 4,
            "act_epsilon": 0.1,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_dropout_prob": 0,
            "type_vocab_size": 2,
            "attention_probs_dropout_prob": 0,
            "classifier_dropout_prob": 0.1,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "unk_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        albert_act,
    ),
    "transfo_xl": (
        {
            "vocab_size": 30,
            "d_model": 8,
            "n_head": 2,
            "d_head": 4,
            "d_inner": 12,
            "n_layer": 2,
            "mem_len": 4,
            "cutoffs": [10],
            "div_val": 1,
            "clamp_len": -1,
            "dropout": 0.1,
            "dropatt": 0.0,
            "tie_projs": [False, False],
            "sample_softmax": -1,
        },
        transfo_xl,
    ),
}
WRONG = ("three", None, [3], {"a": 1}, True, -5, math.nan, math.inf, 10**9 + 7, 2.5)


def is_right(kind, name, value):
    """Null is as good as absent there; and cutoffs are such a list."""
    return (kind == "transfo_xl" and value is None and name not in transfo_xl.RANGES) or (
        name == "cutoffs" and value == [3]
    )


CONFIGS = [
    (kind, name, value)
    for kind, (config, _) in CONFIG.items()
    for name in config
    for value in WRONG
    if not is_right(kind, name, value)
]


@pytest.mark.parametrize("kind", CONFIG)
def test_config_of_these_tests_is_right(kind):
    config, module = CONFIG[kind]
    module.read_config(config)


@pytest.mark.parametrize("kind, name, value", CONFIGS)
def test_config_json_refused(kind, name, value):
    config, module = CONFIG[kind]
    with pytest.raises(UsageError) as caught:
        module.read_config({**config, name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    (
        {"cutoffs": [10, 10]},
        {"cutoffs": [20, 10]},
        {"cutoffs": [30]},
        {"cutoffs": ["10"]},
        {"cutoffs": [-1]},
        {"cutoffs": 10},
        {"tie_projs": "no"},
        {"same_length": "false"},
        {"tie_weight": "yes"},
        {"n_layer": 0},
        {"d_model": 0},
    ),
)
def test_shape_of_transfo_xl_refused(change):
    with pytest.raises(UsageError):
        transfo_xl.read_config({**CONFIG["transfo_xl"][0], **change})


@pytest.mark.parametrize("kind", ("bert", "albert_act"))
def test_heads_of_config_that_do_not_divide(kind):
    config, module = CONFIG[kind]
    with pytest.raises(UsageError, match="3 attention heads share a width of 8"):
        module.read_config({**config, "num_attention_heads": 3})


@pytest.mark.parametrize("name", ("pad_token_id", "unk_token_id", "bos_token_id", "eos_token_id"))
@pytest.mark.parametrize("value", (-1, 30, "0", 2, 1))
def test_special_tokens_of_config(name, value):
    config, module = CONFIG["albert_act"]
    if config[name] == value:
        return
    with pytest.raises(UsageError):
        module.read_config({**config, name: value})


def test_there_are_many():
    assert len(CONFIGS) >= 400
