"""Before a converter says "wrote", the converted model computes what the definition of the original does."""

import ast
import json
import os
import random
import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interop import original_albert_act, original_bert, original_transfo_xl

from fairseq_adaptive.commands.convert import main
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import albert_act, bert, definitions, transfo_xl
from fairseq_adaptive.interop.conversion import Weights, find_format, write_folder
from fairseq_adaptive.interop.verifying import TRIES, clear_cut, draw_text

REFUSED = "the converted model computes something else, its outputs differ by .*: nothing was written"
FORMATS = ("bert", "roberta", "transkimmer", "albert_act", "transfo_xl")


def write_bert(folder, kind="bert", skims=False, head=True, layers=1, **changed):
    base = original_bert.ROBERTA if kind == "roberta" else original_bert.CONFIG
    config = {**base, "num_hidden_layers": layers, **changed}
    args = original_bert.write(folder, config, original_bert.random_weights(config, skims, head))
    args.format = "transkimmer" if skims else kind
    return args


def write_albert(folder, spm, config=original_albert_act.CONFIG, prefix="", heads=True):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = original_albert_act.published_weights(heads=heads)
    own = ("predictions", "sop_")
    weights = {name if name.startswith(own) else prefix + name: tensor for name, tensor in weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return Namespace(format="albert_act", input=folder, spm=spm)


def write_transfo_xl(folder, words=original_transfo_xl.WORDS, change=lambda weights: weights, **changed):
    config = {**original_transfo_xl.BASE, "n_layer": 2, **changed}
    args = original_transfo_xl.write_original(
        folder, config, change(original_transfo_xl.random_weights(config)), words=words
    )
    args.format = "transfo_xl"
    return args


@pytest.fixture
def original(tmp_path, spm):
    """``original(format)``: a folder with every head that there is; the flags of its conversion."""

    def original(name):
        if name == "albert_act":
            return write_albert(tmp_path / "theirs", spm)
        if name == "transfo_xl":
            return write_transfo_xl(
                tmp_path / "theirs", div_val=2, untie_r=True, tie_weight=False, tie_projs=[False] * 3
            )
        return write_bert(tmp_path / "theirs", "bert" if name == "transkimmer" else name, name == "transkimmer")

    return original


def convert(args, output):
    """The command, in this process."""
    given = {"format": args.format, "input": args.input, "output": output}
    given.update(vocab=getattr(args, "vocab", None), spm=getattr(args, "spm", None))
    main([each for name, value in given.items() if value for each in (f"--{name}", str(value))])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_right_is_written(name, original, tmp_path, capsys):
    convert(original(name), tmp_path / "ours")
    assert f"wrote {tmp_path / 'ours'}/checkpoint.pt" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["checkpoint.pt", "dict.txt"]


def aliases(weights):
    """Names of each tensor."""
    found = {}
    for name, tensor in weights.items():
        found.setdefault(tensor.data_ptr(), []).append(name)
    return found.values()


def one_of_each_kind(every):
    """Of the tensors that layers have alike, that of a layer drawn; all with ``TEST_CASES=all``."""
    kinds, drawn = {}, random.Random(3)
    for names in every:
        kind = names[0] if os.environ.get("TEST_CASES") == "all" else re.sub(r"\d+", "N", names[0])
        kinds.setdefault(kind, []).append(names)
    return [drawn.choice(each) for each in kinds.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_not_one_tensor_may_be_another(name, original, tmp_path):
    args = original(name)
    module = find_format(name)
    state, dictionary = module.convert(args)
    outputs = partial(module.outputs, args)
    write_folder(state, dictionary, tmp_path / "right", outputs)
    generator = torch.Generator().manual_seed(2)
    wrong, unseen = 0, []
    for names in one_of_each_kind(aliases(state["model"])):
        tensor = state["model"][names[0]]
        other = tensor + torch.randn(tensor.shape, generator=generator) / 2
        spoiled = {**state, "model": {**state["model"], **dict.fromkeys(names, other)}}
        if names[0].endswith("k_proj.bias"):  # shifts all scores of a query alike, which attention does not see
            unseen += names
            continue
        with pytest.raises(UsageError, match=REFUSED):
            write_folder(spoiled, dictionary, tmp_path / "wrong", outputs)
        wrong += 1
    assert wrong > 15 and len(unseen) == (name != "transfo_xl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "theirs"]


def swapped(table, *names):
    first, second = names
    return {**table, first: table[second], second: table[first]}


def swap_layer(*names):
    return lambda patch: patch.setattr(bert, "_LAYER", swapped(bert._LAYER, *names))


def swap_albert(*names):
    return lambda patch: patch.setattr(albert_act, "NAMES", swapped(albert_act.NAMES, *names))


def swap_rows(module, name):
    """Two words get each other's embeddings."""

    def spoil(patch):
        right = module.convert_weights

        def wrong(*args):
            found = right(*args)
            found[name][[5, 6]] = found[name][[6, 5]]
            return found

        patch.setattr(module, "convert_weights", wrong)

    return spoil


def swap_taken(*endings):
    """Weights of the Transformer-XL that are taken by names with one ending are those of the other."""

    def spoil(patch):
        class Wrong(Weights):
            def take(self, names, *shape):
                first, second = endings
                renamed = [
                    name.replace(first, "*").replace(second, first).replace("*", second)
                    for name in ([names] if isinstance(names, str) else names)
                ]
                return super().take(renamed, *shape)

        patch.setattr(transfo_xl, "Weights", Wrong)

    return spoil


def another_activation(module):
    return lambda patch: patch.setattr(module, "ACTIVATIONS", {**module.ACTIVATIONS, "gelu": "gelu_accurate"})


SPOILED = {
    "bert: query and key": ("bert", swap_layer("self_attn.q_proj", "self_attn.k_proj")),
    "bert: LayerNorms": ("bert", swap_layer("self_attn_layer_norm", "final_layer_norm")),
    "bert: words": ("bert", swap_rows(bert, "encoder.lm_head.weight")),
    "bert: activation": ("bert", another_activation(bert)),
    "roberta: key and value": ("roberta", swap_layer("self_attn.k_proj", "self_attn.v_proj")),
    "roberta: value and output": ("roberta", swap_layer("self_attn.v_proj", "self_attn.out_proj")),
    "transkimmer: query and value": ("transkimmer", swap_layer("self_attn.q_proj", "self_attn.v_proj")),
    "albert_act: query and key": (
        "albert_act",
        swap_albert("encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.self_attn.k_proj.weight"),
    ),
    "albert_act: LayerNorms": (
        "albert_act",
        swap_albert("encoder.layers.0.self_attn_layer_norm.bias", "encoder.layers.0.final_layer_norm.bias"),
    ),
    "albert_act: words": ("albert_act", swap_rows(albert_act, "encoder.lm_head.weight")),
    "albert_act: activation": ("albert_act", another_activation(albert_act)),
    "transfo_xl: u and v": ("transfo_xl", swap_taken("r_w_bias", "r_r_bias")),
    "transfo_xl: LayerNorms": ("transfo_xl", swap_taken("dec_attn.layer_norm", "pos_ff.layer_norm")),
    "transfo_xl: projections": ("transfo_xl", swap_taken("word_emb.emb_projs", "crit.out_projs")),
    "transfo_xl: words": ("transfo_xl", swap_rows(transfo_xl, "decoder.adaptive_softmax.tables.2")),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_map_is_refused(name, original, tmp_path, monkeypatch, capsys):
    format, spoil = SPOILED[name]
    args = original(format)
    spoil(monkeypatch)
    with pytest.raises(UsageError, match=REFUSED) as caught:
        convert(args, tmp_path / "ours")
    assert "\n" not in str(caught.value) and "wrote" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_the_way_back_is_compared_with_the_definition(original, tmp_path, monkeypatch):
    """With names that are wrong both ways, what is written reads back as it was."""
    convert(original("albert_act"), tmp_path / "ours")
    args = Namespace(input=tmp_path / "ours" / "checkpoint.pt", output=tmp_path / "back", spm=None)
    layer = "encoder.layers.0."
    for names in (("self_attn.q_proj.weight", "self_attn.k_proj.weight"), ("fc2.bias", "self_attn.out_proj.bias")):
        with monkeypatch.context() as patch:
            swap_albert(*(layer + name for name in names))(patch)
            with pytest.raises(UsageError, match="what is read from the folder computes something else, its outputs"):
                albert_act.convert_back(args)
    heads = ("encoder.pooler.bias", "encoder.layers.0.fc2.bias")
    with monkeypatch.context() as patch:
        swap_albert(*heads)(patch)
        with pytest.raises(UsageError, match="something else"):
            albert_act.convert_back(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    albert_act.convert_back(args)
    theirs, back = (torch.load(tmp_path / each / "pytorch_model.bin") for each in ("theirs", "back"))
    assert all(torch.equal(theirs[name], back[name]) for name in theirs if name.startswith(("predictions", "sop")))


def early_names(weights):
    names = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for late, early in names.items():
        weights = {name.replace(late, early): tensor for name, tensor in weights.items()}
    return weights


@pytest.mark.slow
@settings(max_examples=15)
@given(st.data())
def test_all_variants_of_bert_are_written(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(("bert", "roberta")), "kind")
    head, skims = data.draw(st.booleans(), "head"), data.draw(st.booleans(), "skims")
    activations = ["gelu"] if kind == "roberta" and head else list(bert.ACTIVATIONS)
    positions = data.draw(st.integers(1, 16), "positions")
    config = {
        **(original_bert.ROBERTA if kind == "roberta" else original_bert.CONFIG),
        "num_hidden_layers": data.draw(st.integers(1, 3), "layers"),
        "num_attention_heads": data.draw(st.sampled_from((1, 2, 4, 8)), "heads"),
        "hidden_act": data.draw(st.sampled_from(activations), "activation"),
        "type_vocab_size": data.draw(st.integers(0, 1 if kind == "roberta" else 3), "types"),
        "layer_norm_eps": data.draw(st.sampled_from((1e-12, 1e-5, 0.1)), "eps"),
        "max_position_embeddings": positions + 2 * (kind == "roberta"),
    }
    weights = original_bert.random_weights(config, skims, head)
    if head and data.draw(st.booleans(), "copies"):
        name = "lm_head" if kind == "roberta" else "cls.predictions"
        weights[f"{name}.decoder.weight"] = weights[f"{kind}.embeddings.word_embeddings.weight"]
        weights[f"{name}.decoder.bias"] = weights[f"{name}.bias"]
    if not head and data.draw(st.booleans(), "body alone"):
        weights = {name.removeprefix(f"{kind}."): tensor for name, tensor in weights.items()}
    if data.draw(st.booleans(), "early names"):
        weights = early_names(weights)
    folder = tmp_path_factory.mktemp("bert")
    args = original_bert.write(folder / "theirs", config, weights)
    args.format = "transkimmer" if skims else kind
    compared = []

    def outputs(made):
        for what, found, expected in bert.outputs(args, made):
            assert found.shape == expected.shape
            compared.append(what.partition(" of ")[0])
            yield what, found, expected

    write_folder(*bert.convert(args), folder / "ours", outputs)
    heads = ["the word head", "the sentence classifier", "the span classifier"]
    assert compared == ["the converted model"] + ["the skim predictors"] * skims + heads * head


@pytest.mark.parametrize(
    "changed",
    (
        {},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"bos_token_id": 3, "eos_token_id": 2},
        {"act_epsilon": 0.4, "num_hidden_layers": 3},
        {"num_attention_heads": 8},
        {"max_position_embeddings": 5},
    ),
    ids=str,
)
@pytest.mark.parametrize("prefix, heads", (("", False), ("albert.", True)))
def test_all_variants_of_albert_act_are_written(changed, prefix, heads, tmp_path, spm, monkeypatch):
    config = {**original_albert_act.CONFIG, **changed}
    right = original_albert_act.published_weights

    def shorter(heads):
        weights = right(heads=heads)
        name = "embeddings.position_embeddings.weight"
        return {**weights, name: weights[name][: config["max_position_embeddings"]].clone()}

    monkeypatch.setattr(original_albert_act, "published_weights", shorter)
    convert(write_albert(tmp_path / "theirs", spm, config, prefix, heads), tmp_path / "ours")
    assert (tmp_path / "ours" / "dict.txt").exists()


def per_layer(weights):
    """Biases of all layers, under the names of each."""
    shared = {name: weights.pop(f"transformer.{name}") for name in ("r_w_bias", "r_r_bias")}
    return {**weights, **{f"transformer.layers.{n}.dec_attn.{name}": shared[name] for n in (0, 1) for name in shared}}


def bare(weights):
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}


TRANSFO_XL = {
    "no memory": {"mem_len": 0},
    "same length": {"mem_len": 2, "same_length": True},
    "clamped": {"clamp_len": 3},
    "biases in each layer": {"change": per_layer},
    "the authors' names": {"change": bare},
    "no <unk>": {"words": [f"word{word}" if word == "<unk>" else word for word in original_transfo_xl.WORDS]},
    "22 clusters": {"cutoffs": list(range(6, 27)), "tie_projs": [False] + [True] * 21},
    "projections": {"div_val": 2, "tie_projs": [True, False, True]},
    "no clusters": {"cutoffs": [], "tie_projs": [False], "tie_weight": False},
}


@pytest.mark.parametrize("name", TRANSFO_XL)
def test_all_variants_of_transfo_xl_are_written(name, tmp_path):
    """The authors' names come with the authors' order of clusters."""
    convert(write_transfo_xl(tmp_path / "theirs", **TRANSFO_XL[name]), tmp_path / "ours")
    assert (tmp_path / "ours" / "dict.txt").exists()


def test_definitions_know_torch_alone():
    files = sorted(Path(definitions.__file__).parent.glob("*.py"))
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(each.name.partition(".")[0] for each in node.names)
            elif isinstance(node, ast.ImportFrom):
                own = node.module.startswith("fairseq_adaptive.interop.definitions.")
                found.add("their own" if own else node.module.partition(".")[0])
    assert len(files) == 5 and found == {"functools", "math", "their own", "torch", "typing"}


def test_a_text_that_rounding_decides_is_drawn_anew():
    texts, margins = [], iter([1e-6, 0.0, 0.5])

    def draw(generator):
        texts.append(draw_text(generator, 1, 2, [3, 4], list(range(10, 99)), 12))
        return texts[-1]

    text, found = clear_cut(draw, lambda text: Namespace(margin=next(margins)))
    assert found.margin == 0.5 and text == texts[2] and len({tuple(each) for each in texts}) == 3
    for each in texts:
        assert each[:3] == [1, 3, 4] and each[6] == each[11] == 2 and all(n >= 10 for n in each[3:6] + each[7:11])
    texts.clear()
    assert clear_cut(draw, lambda text: Namespace(margin=0.0))[0] == texts[-1] and len(texts) == TRIES
    assert draw_text(None, 1, 2, [3], [], 2) == [1, 3]
