"""``fairseq-adaptive recipe`` and ``demo``: what is printed, what is copied, and what is refused before work starts."""

import os
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cli import wmt14
from cli.helpers import USER_DIR
from fairseq_adaptive.commands import demo, recipe
from fairseq_adaptive.errors import UsageError

ROOT = Path(USER_DIR).parent
EXAMPLES = sorted(path.name for path in ROOT.glob("examples/[!_]*") if path.is_dir())


def said(capsys, *words):
    recipe.main([*words], prog="fairseq-adaptive recipe")
    return capsys.readouterr().out


def test_all_examples_are_listed(capsys):
    assert [line.split("  ")[0] for line in said(capsys).splitlines()] == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_script_is_printed_with_its_usage(name, capsys):
    out = said(capsys, name)
    for script in ROOT.glob(f"examples/{name}/*.sh"):
        usage = next(line for line in script.read_text().splitlines() if line.startswith("# usage: "))
        assert f"examples/{name}/{script.name}\n" in out and f"\n    {usage[2:]}\n" in out


def test_a_file_is_printed(capsys):
    assert said(capsys, "translation", "evaluate.sh") == (ROOT / "examples" / "translation" / "evaluate.sh").read_text()


def test_a_copy_is_whole_and_can_be_made_again(tmp_path, capsys):
    out = tmp_path / "a b"
    assert "run from there" in said(capsys, "translation", "--output", str(out))
    copied = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    own = {each for each in recipe.files("examples/translation")}
    assert own | {"examples/common.sh", "scripts/average_checkpoints.py"} <= set(copied)
    for name, path in copied.items():
        assert os.access(path, os.X_OK) == os.access(ROOT / name, os.X_OK)
        if not name.endswith(".yaml"):
            assert path.read_bytes() == (ROOT / name).read_bytes()
        else:  # the package is not beside the copy
            assert "cwd}/fairseq_adaptive" not in path.read_text()
    config = OmegaConf.load(out / "examples/translation/config/wmt14_en_de_shared.yaml")
    assert config.common.user_dir == str(ROOT / "fairseq_adaptive")  # of a clone fairseq does not find the bare name
    copied["examples/translation/evaluate.sh"].unlink()
    said(capsys, "translation", "--output", str(out))  # what is missing comes back
    said(capsys, "pretraining", "--output", str(out))
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} > set(copied)


def test_beside_fairseq_the_bare_name_is_found(monkeypatch):
    monkeypatch.setattr(recipe, "PACKAGE", Path(recipe.importlib.util.find_spec("fairseq").origin).parents[1] / "ours")
    assert recipe.user_dir() == "ours"


def test_a_changed_file_is_left_and_nothing_is_written(tmp_path):
    changed = tmp_path / "examples" / "common.sh"
    changed.parent.mkdir()
    changed.write_text("mine")
    with pytest.raises(UsageError, match="common.sh exists and is left as it is"):
        recipe.main(["translation", "--output", str(tmp_path)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [changed] and changed.read_text() == "mine"


@pytest.mark.parametrize(
    "words, message",
    (
        (["translaton"], "no example translaton: did you mean translation"),
        (["translation", "tune.sh"], "no file tune.sh: it has README.md, config/wmt14"),
        (["pretraining", "depth.png"], "is a picture"),
    ),
)
def test_what_there_is_not(words, message):
    with pytest.raises(UsageError, match=message):
        recipe.main(words)


def test_without_examples_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "PACKAGE", tmp_path / "fairseq_adaptive")
    with pytest.raises(UsageError, match="install the package anew"):
        recipe.main([])


def test_demo_calls_the_script_in_this_environment(tmp_path, monkeypatch):
    called = {}

    def run(words, env):
        called.update(words=words, path=env["PATH"])
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(demo.subprocess, "run", run)
    with pytest.raises(SystemExit) as end:
        demo.main(["--updates", "5", "--data", "x", "--source", "fr", "--target", "cs"])
    assert end.value.code == 3
    assert called["words"][1:3] == [str(ROOT / "scripts" / "demo.sh"), "--here"]
    assert " ".join(called["words"][3:]) == "--updates 5 --out demo --source fr --target cs --data x"
    assert called["path"].startswith(os.path.dirname(demo.sys.executable))
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "polib" else name)
    with pytest.raises(UsageError, match=r"needs polib: pip install 'fairseq_adaptive\[translation\]'"):
        demo.main([])


@pytest.mark.slow
def test_demo_of_another_pair_goes_on_where_it_stopped(tmp_path):
    """Cut off behind the training, and called again: nothing is trained anew."""
    data = tmp_path / "data"
    data.mkdir()
    for split, first in (("train", 0), ("valid", 300), ("test", 320)):
        for lang, name in (("en", "fr"), ("de", "cs")):
            count = 300 if split == "train" else 20
            (data / f"{split}.{name}").write_text("\n".join(wmt14.sentences(lang, first, count)) + "\n")
    flags = ["--here", "--data", data, "--source", "fr", "--target", "cs", "--updates", "2"]
    out, script = tmp_path / "out", ROOT / "scripts" / "demo.sh"
    failing = tmp_path / "bin"
    failing.mkdir()
    (failing / "fairseq-generate").write_text("#!/bin/sh\nexit 1\n")
    (failing / "fairseq-generate").chmod(0o755)
    cut = wmt14.bash(script, *flags, "--out", out, path=[failing], check=False)
    assert cut.returncode == 1 and "fairseq-generate failed" in cut.stderr
    assert f"to do: 2 updates on the text of {data}" in cut.stdout
    done = (out / "checkpoints" / "checkpoint_last.pt").stat().st_mtime_ns
    assert "BLEU|nrefs:1" in wmt14.bash(script, *flags, "--out", out).stdout
    assert (out / "checkpoints" / "checkpoint_last.pt").stat().st_mtime_ns == done
    assert len((out / "translations.cs").read_text().splitlines()) == 20
    wrong = wmt14.bash(script, "--here", "--source", "fr", "--out", tmp_path / "x", check=False)
    assert wrong.returncode == 1 and "are for text of your own" in wrong.stderr and not (tmp_path / "x").exists()
