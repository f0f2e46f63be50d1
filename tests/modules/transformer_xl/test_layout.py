import itertools

import pytest

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl.layout import format_layout, parse_layout


@pytest.mark.parametrize(
    ("layout", "blocks"),
    [
        ("a", "a"),
        ("af*3", "afafaf"),
        ("afff*6,f*8", "afff" * 6 + "f" * 8),
        ("aff*7,f*15", "aff" * 7 + "f" * 15),
        (" a*2 , fa ,f", "aafaf"),
    ],
)
def test_layout_is_spelled_out(layout, blocks):
    assert parse_layout(layout) == blocks


@pytest.mark.parametrize(
    ("layout", "character"),
    [
        ("", 1),
        ("afxf*6", 3),
        ("af,", 4),
        (",af", 1),
        ("af*", 3),
        ("af*0", 4),
        ("a f", 3),
        ("af*2f", 5),
        ("AF", 1),
        ("a,,f", 3),
    ],
)
def test_malformed_layout_points_at_the_character(layout, character):
    with pytest.raises(UsageError, match=f"malformed at character {character}:") as error:
        parse_layout(layout)
    _, shown, pointer, *_ = str(error.value).splitlines()
    assert shown.strip() == layout.strip() and pointer.index("^") == 4 + character - 1


def test_formatted_layout_is_short_and_the_same():
    for length in range(1, 9):
        for blocks in map("".join, itertools.product("af", repeat=length)):
            layout = format_layout(blocks)
            assert parse_layout(layout) == blocks and len(layout) <= len(blocks)
    assert format_layout("afff" * 6 + "f" * 8) == "afff*6,f*8"
    assert format_layout("af" * 16) == "af*16"
