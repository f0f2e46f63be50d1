"""What controls a terminal or a page reaches neither as it is."""

import re
import unicodedata

import pytest

from fairseq_adaptive.report.shading import Sentence, to_html, to_text
from fairseq_adaptive.printable import printable

CONTROLS = [
    chr(number)
    for number in (
        *range(0x20),
        *range(0x7F, 0xA0),
        0x61C,
        0x200E,
        0x200F,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0x2028,
        0x2029,
    )
]


@pytest.mark.parametrize("character", CONTROLS, ids=lambda character: f"U+{ord(character):04X}")
def test_controls_are_escaped_in_terminal_and_page(character):
    hostile = f"a{character}[31mb"
    assert (
        character not in printable(hostile)
        and printable(hostile).startswith("a\\")
        and printable(hostile).endswith("b")
    )
    sentence = Sentence(["[CLS]", hostile, "▁c"], [1, 2, 3], 3)
    for colour in (True, False):
        line = to_text(sentence, colour)
        line = re.sub("\033\\[(?:38;5;\\d+;48;5;\\d+|0)m", "", line) if colour else line  # our own
        if character != "\033" or not colour:
            assert character not in line
        assert "\033[31m" not in line and printable(hostile) in line
    page = to_html([sentence], hostile)
    assert "\n" in page and (character == "\n" or character not in page)
    assert page.count("\n") == to_html([Sentence(["a", "b", "c"], [1, 2, 3], 3)], "title").count("\n")


@pytest.mark.parametrize(
    "text", ("plain", "naïve Ärger", "שלום", "مرحبا", "👩‍👩‍👧", "日本語", "a\u00a0b\u3000c", "क्‍ष", "e\u0301")
)
def test_all_else_stays(text):
    assert printable(text) == text
    assert not any(unicodedata.category(each) == "Cc" for each in text)


def test_line_of_a_page_has_its_own_direction():
    page = to_html([Sentence(["\u202eabc", "x"], [1, 2], 2)], "title")
    assert "><bdi><i class=d1>" in page and "</i></bdi></p>" in page and "\\u202eabc" in page
