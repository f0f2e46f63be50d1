"""Depth of the tokens of raw text: what is read, how it is shown, what is counted."""

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording
from fairseq_adaptive.report.depth_map import (
    Sentence,
    depth_tables,
    format_tables,
    plot_tables,
    read_depths,
    tables_figure,
    token_type,
)

TINY = {
    "encoder_input_dim": 8,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 12,
}
SENTENCE = Sentence(["[CLS]", "▁a", "▁lu", "mp", ".", "[SEP]"], [1, 3, 6, 2, 4, 1], 6)


@pytest.fixture
def model(build):
    model = build("albert_act_tiny", **TINY)
    torch.nn.init.normal_(model.encoder.layers.halting.unit.weight, std=0.5)
    return model


def test_reads_what_the_model_does(model, dictionary):
    texts = [[f"word{number}" for number in range(first, first + length)] for first, length in ((0, 5), (9, 9), (3, 2))]
    found = list(read_depths(model, dictionary, [texts[0], [], *texts[1:]], batch_size=2))
    assert [each.tokens for each in found] == [["[CLS]", *text, "[SEP]"] for text in texts]
    assert {each.limit for each in found} == {6}
    for text, each in zip(texts, found):
        tokens = torch.tensor([[0, *(dictionary.index(word) for word in text), 2]])
        with recording(model) as traces, torch.no_grad():
            model(tokens)
        assert each.depths == traces["encoder.layers"][0].updates[0].tolist()
    assert len({depth for each in found for depth in each.depths}) > 1


def test_reads_long_texts_in_parts(model, dictionary):
    found = list(read_depths(model, dictionary, [[f"word{number}" for number in range(25)]]))
    assert [len(each.tokens) for each in found] == [12, 12, 7]
    assert [each.continued for each in found] == [False, True, True]
    assert [token for each in found for token in each.tokens[1:-1]] == [f"word{number}" for number in range(25)]


def test_reads_encoders_of_translation_and_refuses_what_does_not_halt(build, dictionary):
    flags = {
        "encoder_embed_dim": 16,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "encoder_layers": 3,
        "decoder_embed_dim": 16,
        "decoder_ffn_embed_dim": 32,
        "decoder_attention_heads": 2,
        "decoder_layers": 2,
    }
    translator = build("shared_transformer", halting="act", **flags)
    (found,) = read_depths(translator, dictionary, [["word1", "word2"]])
    assert found.tokens == ["word1", "word2", "</s>"] and all(1 <= depth <= 3 for depth in found.depths)
    with pytest.raises(UsageError, match="no encoder in which tokens halt"):
        list(read_depths(build("albert_act_tiny", halting="none", **TINY), dictionary, [["word1"]]))


@pytest.mark.parametrize(
    "token, following, kind",
    [
        ("[CLS]", "▁a", "special"),
        ("</s>", None, "special"),
        ("▁a", "▁lu", "whole word"),
        ("▁a", ".", "whole word"),
        ("▁lu", "mp", "start of a word"),
        ("mp", ".", "inside a word"),
        (".", None, "punctuation"),
        ("▁", "3", "punctuation"),
        ("▁19", "90", "number"),
        ("90", "th", "number"),
        ("▁[", "▁a", "punctuation"),
        ("▁last", None, "whole word"),
    ],
)
def test_types(token, following, kind):
    assert token_type(token, following) == kind


def test_tables_by_hand():
    other = Sentence(["[CLS]", "▁a", "▁a", "[SEP]"], [2, 5, 4, 1], 6)
    tables = depth_tables([SENTENCE, other])
    assert tables["token type"] == {
        "[CLS]": (2, 1.5),
        "[SEP]": (2, 1.0),
        "inside a word": (1, 2.0),
        "punctuation": (1, 4.0),
        "start of a word": (1, 6.0),
        "whole word": (3, 4.0),
    }
    assert tables["frequency rank"] == {"1": (3, 4.0), "2-3": (2, 4.0), "4-7": (1, 4.0)}
    assert tables["part of the text"] == {"1/10": (2, 4.0), "3/10": (1, 6.0), "6/10": (2, 3.0), "8/10": (1, 4.0)}
    assert "| whole word | 3 | 4.00 |\n" in format_tables(tables)
    assert list(depth_tables([Sentence([f"▁{i}"], [i], 20) for i in range(1, 20)])["frequency rank"]) == [
        "1",
        "2-3",
        "4-7",
        "8-15",
        "16-31",
    ]
    with pytest.raises(UsageError, match="nothing to count"):
        depth_tables([])


def test_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    plot_tables(depth_tables([SENTENCE]), 6, tmp_path / "depth.png")
    picture = image.open(tmp_path / "depth.png")
    assert picture.format == "PNG" and picture.size[0] > 1000
    panels = tables_figure(depth_tables([SENTENCE]), 6).axes
    assert [panel.get_xlabel() for panel in panels] == ["frequency rank", "part of the text", "token type"]
    assert panels[0].get_ylabel() == "mean updates" and [len(panel.patches) for panel in panels] == [3, 4, 6]
    assert [bar.get_height() for bar in panels[2].patches] == [1.0, 1.0, 2.0, 4.0, 6.0, 3.0]
