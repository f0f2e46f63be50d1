"""The example of docs/add-a-mechanism.md, from a folder that is not ours, through the stock commands."""

import re
import sys
from pathlib import Path

import pytest
import torch
from cli.helpers import TINY_TRANSFORMER, run, tiny_translation_data

FOLDER = Path(__file__).parents[2] / "examples" / "add_a_mechanism"


@pytest.fixture(scope="module")
def energy():
    sys.path.insert(0, str(FOLDER.parent))
    try:
        import add_a_mechanism
    finally:
        sys.path.remove(str(FOLDER.parent))
    return add_a_mechanism.Energy


def test_is_short():
    assert len((FOLDER / "__init__.py").read_text().splitlines()) <= 50


def test_what_the_page_says_of_the_example(energy, build, batch):
    """Dense equals packed; the price has a gradient; all of it is in the page."""
    from fairseq_adaptive.modules import LayerStack, recording

    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 5}.items()
    }
    model, outs = build("shared_transformer", router="energy", router_args='{"use": 0.3}', **sizes), []
    assert isinstance(model.decoder.layers.router, energy)
    torch.nn.init.normal_(model.decoder.layers.router.unit.weight, std=0.3)
    for packed in (False, True):
        for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
            stack.packed = packed
        with torch.no_grad(), recording(model) as traces:
            outs.append(model(**batch)[0])
    real = batch["prev_output_tokens"] != 1
    torch.testing.assert_close(outs[0][real], outs[1][real], rtol=0, atol=1e-6)
    assert traces["decoder.layers"][0].updates[real].unique().numel() > 1
    with recording(model.train()) as traces:
        model(**batch)
    router = model.decoder.layers.router
    price = router.price(traces["decoder.layers"][0])
    assert 0 < price < 1
    price.backward()
    assert router.unit.weight.grad.any()
    page, code = (FOLDER.parents[1] / "docs" / "add-a-mechanism.md").read_text(), (FOLDER / "__init__.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    quoted = [line.strip() for block in blocks[:1] for line in block.splitlines() if line.strip()]
    assert len(quoted) > 20 and not [line for line in quoted if line not in code]


@pytest.mark.slow
def test_trains_and_generates(tmp_path):
    data = tiny_translation_data(tmp_path / "data")
    common = f"--user-dir {FOLDER} --cpu --num-workers 0 --seed 1".split()
    flags = (
        "--task translation -s src -t tgt --arch shared_transformer --optimizer adam --lr 3e-3 --max-tokens 400 "
        "--max-update 20 --criterion label_smoothed_cross_entropy --router energy"
    ).split()
    sizes = [*TINY_TRANSFORMER, "--encoder-layers", "4", "--decoder-layers", "4"]
    run(
        "fairseq-train", data, *common, *flags, *sizes, "--router-args", '{"use": 0.4}', "--save-dir", tmp_path / "save"
    )
    state = torch.load(tmp_path / "save" / "checkpoint_last.pt", weights_only=True)["model"]
    assert {f"{side}.layers.router.unit.weight" for side in ("encoder", "decoder")} <= set(state)
    path = ("--path", tmp_path / "save" / "checkpoint_last.pt")
    done = run("fairseq-generate", data, *common, *path, "--beam", "3", "--batch-size", "8")
    assert len(re.findall(r"^H-\d+", done.stdout, re.M)) == 20
    bad = run("fairseq-train", data, *common, *flags, *sizes, "--router-args", '{"usage": 1}', check=False)
    assert "the router energy has no argument 'usage': it has use" in bad.stderr
