"""Shaded text: what is read from a terminal's line and from a page, and how colours are spaced."""

import random
import re

import pytest

from fairseq_adaptive.report.shading import Sentence, to_fragment, ink, legend, ramp, shares, to_html, to_text

SENTENCE = Sentence(["[CLS]", "▁a", "▁lu", "mp", ".", "[SEP]"], [1, 3, 6, 2, 4, 1], 6)
SKIMMED = Sentence(
    ["[CLS]", "▁a", "▁film"], [3, 1, 2], 3, "skimmed before layer", "kept", label="<good>", probability=0.98765
)


def luminance(colour):
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("limit", (1, 2, 6, 24))
def test_ramp_is_perceptual_and_text_on_it_is_readable(limit):
    colours = [ramp(share) for share in shares(limit)]
    assert len(set(colours)) == limit
    lightness = [116 * luminance(each) ** (1 / 3) - 16 for each in colours]  # CIELAB's, another measure than OKLab's
    steps = [before - after for before, after in zip(lightness, lightness[1:])]
    assert all(0.7 * sum(steps) / len(steps) < step < 1.3 * sum(steps) / len(steps) for step in steps)
    for colour in colours:
        bright, dark = sorted((luminance(colour), luminance(ink(colour))), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("depth", ("truecolor", ""))
def test_line_for_a_terminal(depth, monkeypatch):
    monkeypatch.setenv("COLORTERM", depth)
    assert to_text(SENTENCE, colour=False) == "[CLS]/1 ▁a/3 ▁lu/6 mp/2 ./4 [SEP]/1"
    assert to_text(SKIMMED._replace(continued=True), colour=False) == "… [CLS]/kept ▁a/1 ▁film/2"
    spans = re.findall("\033\\[([\\d;]+)m([^\033]+)\033\\[0m", to_text(SENTENCE, colour=True))
    assert "".join(text for _, text in spans).split() == ["[CLS]", "a", "lump.", "[SEP]"]
    colours = dict((int(number), colour) for colour, number in re.findall("\033\\[([\\d;]+)m (\\d) ", legend(6)))
    assert len(set(colours.values())) == 6
    assert [colour for colour, _ in spans] == [colours[depth] for depth in SENTENCE.depths]
    if depth:
        wanted = [int(ramp(0.4)[place : place + 2], 16) for place in (1, 3, 5)]
        assert colours[3].endswith("48;2;" + ";".join(map(str, wanted)))


def test_skimmed_text_fades_to_grey():
    assert "kept" in legend(3, "skimmed before layer", "kept")
    greys = re.findall("\033\\[38;5;(\\d+);48;5;231m", legend(6, "skimmed before layer", "kept"))
    assert greys[-1] == "16" and greys[:-1] == sorted(greys[:-1], reverse=True) and len(set(greys)) == 6
    faint = re.findall(r"\.skim-6 \.d(\d)\{opacity:([\d.]+)\}", to_fragment([SKIMMED._replace(limit=6)]))
    assert [number for number, _ in faint] == list("123456")
    assert [float(share) for _, share in faint] == sorted(float(share) for _, share in faint)
    assert float(faint[-1][1]) == 1.0


def test_page():
    page = to_html([SENTENCE, Sentence(["▁<b>", "&"], [6, 6], 6), SKIMMED, SENTENCE._replace(continued=True)], "A & B")
    assert page.startswith("<!DOCTYPE html>") and "<title>A &amp; B</title>" in page and "<b>good" not in page
    assert "style=" not in page and "src=" not in page and "href=" not in page and "url(" not in page
    plain, escaped, skimmed, continued = re.findall(r'<p class="([\w-]+)">(.*?)<bdi>(.*?)</bdi>', page)
    spans = re.findall("<i class=d(.)>(.*?)</i>", plain[2])
    assert spans == [("1", "[CLS] "), ("3", " a"), ("6", " lu"), ("2", "mp"), ("4", "."), ("1", " [SEP]")]
    assert escaped[0] == "depth-6" and re.findall("<i class=d(.)>(.*?)</i>", escaped[2]) == [("6", "&lt;b&gt;&amp;")]
    assert skimmed[:2] == ("skim-3", "<b>&lt;good&gt;</b><small>0.988</small>")
    assert continued[1] == "<small>… continued</small>" and not plain[1]
    assert page.count("updates: ") == page.count("skimmed before layer: ") == 1
    for number in range(1, 7):  # a rule a number, which also says it under the pointer
        assert f'.depth-6 .d{number}:hover::after{{content:"{number}"}}' in page
    assert '.skim-3 .d3:hover::after{content:"kept"}' in page


def test_a_page_of_300_lines_is_small():
    drawn = random.Random(1)
    sentences = [
        Sentence([f"▁w{drawn.randrange(999):03}" for _ in range(25)], [drawn.randint(1, 12) for _ in range(25)], 12)
        for _ in range(300)
    ]
    assert len(to_html(sentences, "Depth").encode()) < 200_000
