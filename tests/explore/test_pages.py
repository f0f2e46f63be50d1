"""Every page that we write or serve, in headless Chromium: no error, no other host, readable small, in the dark, on paper."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cli import commands
from fairseq_adaptive.report import compute_page
from fairseq_adaptive.report.shading import Sentence, to_html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)
QUIET = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
HOSTILE = "<script>alert(1)</script> <b>bold</b> &amp; <img src=http://example.org/x.png onerror=alert(2)>"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of 400 pixels; what it says to the console, and asks of hosts, is checked in the end."""
    made = browser.new_page(viewport={"width": 400, "height": 800})
    errors, hosts = [], set()
    made.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
    made.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    yield made
    made.close()
    assert not errors and hosts <= {None, "", "127.0.0.1"}


WIDTHS = """() => {
  const wide = [...document.querySelectorAll("body *")].filter(each => {
    for (let above = each; above !== document.body; above = above.parentElement)
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(above).overflowX)) return false;  // scrolls by itself
    return each.getBoundingClientRect().right > innerWidth + 1;
  });
  return [document.documentElement.scrollWidth, wide.map(each => each.outerHTML.slice(0, 80))];
}"""
LIGHT = """(selector) => {  // how bright text and what is behind it are, 0 to 1
  const bright = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(each => each / 255);
    return 0.2126 * r ** 2.2 + 0.7152 * g ** 2.2 + 0.0722 * b ** 2.2;
  };
  const each = getComputedStyle(document.querySelector(selector));
  return [bright(each.color), bright(each.backgroundColor)];
}"""


LIGHTS = ("light", "screen", False), ("dark", "screen", True), ("dark", "print", False)


def readable(page, selector="body", lights=LIGHTS):
    """Small, in the light, in the dark and on paper."""
    assert page.evaluate(WIDTHS) == [400, []]
    for scheme, media, dark in lights:
        page.emulate_media(color_scheme=scheme, media=media)
        text, back = page.wait_for_function(
            f"(dark) => {{ const found = ({LIGHT})({selector!r}); return found[1] < 0.5 === dark ? found : null }}",
            arg=dark,
        ).json_value()
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) > 7, (scheme, media)
    assert page.pdf(print_background=True).startswith(b"%PDF")


def test_shaded_texts(page, tmp_path):
    long = [f"▁word{number}" for number in range(120)]
    sentences = [
        Sentence([f"▁{HOSTILE}", "▁x" * 40], [1, 6], 6, label="<i>good</i>", probability=0.5),
        Sentence(long, [1 + number % 6 for number in range(120)], 6, continued=True),
        Sentence(long, [1 + number % 13 for number in range(120)], 13, "skimmed before layer", "kept"),
    ]
    (tmp_path / "a.html").write_text(to_html(sentences, "Depth of <model>" + "x" * 80))
    page.goto((tmp_path / "a.html").as_uri())
    assert HOSTILE in page.inner_text("body") and page.inner_text("b") == "<i>good</i>"
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    page.hover(".depth-6 .d6")
    shown = page.evaluate("getComputedStyle(document.querySelector('.depth-6 .d6'), '::after').content")
    assert shown == '"6"'
    opacities = [
        float(page.evaluate(f"getComputedStyle(document.querySelector('.skim-13 .d{n}')).opacity")) for n in (1, 6, 13)
    ]
    assert 0.4 < opacities[0] < opacities[1] < opacities[2] == 1
    readable(page)


def test_compute_report(page, tmp_path):
    macs = {
        "total": 6e6,
        "embedding": 0.0,
        "attention": 3e6,
        "feed-forward": 2e6,
        "policies": 0.0,
        "output layer": 1e6,
        "other": 0.0,
    }
    row = {"depth": 0, "layer": 0, "alive": 1.0, "kept": None, "halted": 0.5, "added": None}
    row.update(multiply_adds=macs, counterpart_multiply_adds=8e6)
    one = {
        "checkpoint": f"runs/{'long' * 12}/{HOSTILE.replace('/', '')}.pt",
        "architecture": "shared_transformer",
        "task": "translation",
        "criterion": "label_smoothed_cross_entropy_with_alignment",
        "parameters": {"unique": 10**6, "used": 10**7},
        "texts": 10,
        "tokens": 100,
        "multiply_adds": macs,
        "seconds": 0.5,
        "peak_memory_bytes": 2**20,
        "quality": {"loss": 1.0},
        "stacks": {"encoder.layers": {"mean_depth": 1.0, "depths": [row, {**row, "depth": 1}]}},
        "counterpart": {"multiply_adds": {**macs, "total": 8e6}, "seconds": 0.7, "peak_memory_bytes": None},
    }
    report = {
        "subset": "valid",
        "batch_size": 8,
        "device": "cpu",
        "threads": 1,
        "models": [one, {**one, "checkpoint": "b.pt"}],
    }
    (tmp_path / "a.html").write_text(compute_page.to_html(report))
    page.goto((tmp_path / "a.html").as_uri())
    assert (
        "<b>bold<b>" in page.inner_text("body")
        and page.evaluate("document.querySelectorAll('script, img').length") == 0
    )
    readable(page)


@pytest.fixture(scope="module")
def served(place):
    """The address of ``fairseq-adaptive explore``."""
    pytest.importorskip("streamlit", reason="streamlit is not installed (extra explore)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.update(commands.stubs(environment))
    command = [
        str(Path(commands.stub_folder(), "fairseq-adaptive")),
        "explore",
        str(place / "pondernet.pt"),
        "--tokenized",
    ]
    with open(place / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            if "http://127.0.0.1" in (place / "log").read_text():
                break
            assert server.poll() is None, (place / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", port
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def test_explore(page, served):
    address, port = served
    page.goto(address)
    page.get_by_label("Text", exact=True).fill(f"w01 w02 {HOSTILE}")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("Over the exit quantile").wait_for(timeout=60_000)
    page.locator("canvas, svg.marks").first.wait_for(timeout=60_000)
    text = page.inner_text("body")
    for wanted in (
        "Translation",
        "all policies off",
        "multiply-adds",
        "time, ms",
        "updates:",
        "pondernet.pt",
        "w01 w02",
    ):
        assert wanted in text
    assert HOSTILE in page.inner_text(".shaded >> nth=0") and "alert" not in page.content().replace(
        "&lt;script&gt;alert", ""
    ).replace("onerror=alert(2)&gt;", "")
    assert page.locator(".shaded .d1").count() >= 2 and page.locator(".costs tr").count() == 3
    background = page.evaluate("getComputedStyle(document.querySelector('.shaded .d1')).backgroundColor")
    assert background == "rgb(250, 250, 210)" or background.startswith(
        "rgb(2"
    )  # the ramp's pale end: the style is there
    readable(page, ".stApp", LIGHTS[:2])
    page.emulate_media(color_scheme="dark", media="print")
    for selector in (".stApp", ".shaded .d1"):  # all but the shades, which are turned round twice
        assert page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).filter").startswith("invert(1)")


def test_the_page_listens_on_this_machine_alone(served):
    _, port = served
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    addresses = {
        line.split()[1] for line in listening if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    }
    assert addresses == {f"0100007F:{port:04X}"}


def test_port_that_is_taken(served, tmp_path):
    from fairseq_adaptive.commands.explore import serve
    from fairseq_adaptive.errors import UsageError

    with pytest.raises(UsageError, match=f"port {served[1]} is taken .*: choose another with --port"):
        serve(served[1])


def test_without_streamlit(monkeypatch):
    from fairseq_adaptive.commands import explore
    from fairseq_adaptive.errors import UsageError

    monkeypatch.setitem(sys.modules, "streamlit", None)
    with pytest.raises(UsageError, match=r"needs streamlit: pip install 'fairseq_adaptive\[explore\]'"):
        explore.main(["model.pt", "--tokenized"])
