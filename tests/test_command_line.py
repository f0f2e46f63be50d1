"""``fairseq-adaptive COMMAND``: every command, its help, the scripts that call the same, and the page of flags."""

import argparse
import logging
import os
import resource
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fairseq import options

import fairseq_adaptive
from fairseq_adaptive import commands
from fairseq_adaptive.commands import COMMANDS, NAMES, convert
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import conversion
from fairseq_adaptive.report import flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("scripts/*.py"))
WITHOUT_SCRIPT = (
    "demo",
    "dial",
    "explore",
    "flags",
    "info",
    "plot_search",
    "plot_skim",
    "plot_tradeoff",
    "recipe",
    "report",
    "zoo_check",
    "zoo_list",
    "zoo_pack",
)
ENTRIES = {f"{each[0]} {each[1]}": each for each in flags.known()}


@pytest.fixture(autouse=True)
def logging_stays():
    """Commands, which end with their process, turn messages off for good."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


def program(*words):
    """``python -m fairseq_adaptive`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "fairseq_adaptive", *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def ends(words, capsys):
    """Status, stdout and stderr of a command that ends at its words."""
    with pytest.raises(SystemExit) as caught:
        commands.main(words)
    return caught.value.code, *capsys.readouterr()


def test_every_module_is_a_command():
    assert {path.stem for path in ROOT.glob("fairseq_adaptive/commands/*.py")} == {"__init__", *COMMANDS}


@pytest.mark.parametrize("name", NAMES)
def test_help(name, capsys):
    status, out, errors = ends([*name.split(), "--help"], capsys)
    assert status == 0 and not errors
    assert out.startswith(f"usage: fairseq-adaptive {name} ") and "--help" in out


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_flag_is_named(name, capsys):
    status, out, errors = ends([*name.split(), "--nothing-such"], capsys)
    assert status == 2 and not out
    assert errors.splitlines()[-1].startswith(f"fairseq-adaptive {name}: error: ")


def test_help_imports_neither_torch_nor_fairseq():
    code = f"""
import sys
from fairseq_adaptive.commands import NAMES, main
for name in NAMES:
    try:
        main([*name.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, name
    slow = {{"torch", "numpy", "fairseq", "matplotlib"}} & set(sys.modules)
    assert not slow, f"{{name}} --help imports {{slow}}"
assert main.__code__.co_filename.startswith({str(ROOT)!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_takes_less_than_a_second(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = program(*name.split(), "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith(f"usage: python -m fairseq_adaptive {name} ")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_overview(capsys):
    status, out, errors = ends(["--help"], capsys)
    assert status == 0 and not errors
    assert all(f"\n  {name} " in out for name in NAMES)
    assert max(map(len, out.splitlines())) <= 100
    assert ends([], capsys) == (2, "", out)
    assert ends(["--version"], capsys) == (0, f"fairseq_adaptive {fairseq_adaptive.__version__}\n", "")


@pytest.mark.parametrize(
    "words, told",
    (
        (["nothing"], NAMES),
        (["averag", "--inputs"], ["did you mean average?", *NAMES]),
        (["plot"], ["'plot'", "plot depth, plot skim, plot tape, plot search, plot tradeoff"]),
        (["plot", "dept"], ["'plot dept'", "plot depth, plot skim, plot tape, plot search, plot tradeoff"]),
        (["plot_depth"], ["did you mean plot depth?"]),
        (["__init__"], NAMES),
        ([""], NAMES),
        (["\x1b[2J\n"], [r"\x1b"]),
    ),
)
def test_no_such_command(words, told, capsys):
    status, out, errors = ends(words, capsys)
    assert status == 2 and not out
    assert errors.startswith("fairseq-adaptive: error: ") and errors.count("\n") == 1 and "\x1b" not in errors
    assert all(each in errors for each in told)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_its_command(script, capsys, monkeypatch):
    called = runpy.run_path(str(script))["main"]
    name = called.__module__.removeprefix("fairseq_adaptive.commands.")
    assert name in COMMANDS
    assert f"``fairseq-adaptive {name.replace('_', ' ')}``" in script.read_text(encoding="utf-8")
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 8
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {script.name} ")
    # all behind the usage, which is wrapped by the length of the program's name
    assert said.partition("\n\n")[2] == ends([*name.split("_"), "--help"], capsys)[1].partition("\n\n")[2]


def test_every_script_calls_another_command():
    called = [runpy.run_path(str(script))["main"].__module__.rpartition(".")[2] for script in SCRIPTS]
    assert sorted([*called, *WITHOUT_SCRIPT]) == sorted(COMMANDS)


def test_formats_are_those_of_the_conversion():
    assert sorted(convert.FORMATS) == sorted(conversion.FORMATS) == list(convert.FORMATS)


def test_help_of_a_format_has_its_flags(capsys):
    status, out, _ = ends(["convert", "--format", "transfo_xl", "--help"], capsys)
    assert status == 0 and "--eos SYMBOL" in out
    assert "--eos" not in ends(["convert", "--help"], capsys)[1]


def test_flags_of_nothing():
    with pytest.raises(UsageError, match="^shared_transformer_tini is no .* did you mean shared_transformer_tiny?"):
        commands.main(["flags", "shared_transformer_tini"])


def test_flags_without_a_name_lists_all(capsys):
    commands.main(["flags"])
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["architecture", "criterion", "task", "optimizer"]
    assert sum(len(names.split()) for names in lines.values()) == len(ENTRIES)
    assert "transformer" not in lines["architecture"].split()


@pytest.mark.parametrize("name", ENTRIES)
def test_flags_of_each(name, capsys):
    kind, name, owner, preset = ENTRIES[name]
    commands.main(["flags", name])
    few = capsys.readouterr().out
    commands.main(["flags", name, "--all"])
    all_of_it = capsys.readouterr().out
    assert few.startswith(
        tuple(f"{kind} {name}" for kind in ("architecture", "criterion", "optimizer")) + (f"task {name}",)
    )
    for each in flags.flags_of(owner, preset):
        line = f"\n  {each.name}  {each.takes}, default {flags.shown(each.default)}\n"
        assert line in all_of_it
        assert each.stock or (line in few and each.help)
        assert "%(" not in each.help and "%%" not in each.help


@pytest.mark.parametrize("name", flags.presets())
def test_defaults_are_those_with_which_fairseq_trains(name):
    _, _, owner, preset = ENTRIES[f"architecture {name}"]
    args = options.parse_args_and_arch(options.get_training_parser(), ["data", "--arch", name])
    declared = {each.dest: each.default for each in flags.flags_of(owner)}
    found = flags.flags_of(owner, preset)
    assert len(found) > 20
    for each in found:
        wanted = getattr(args, each.dest, declared[each.dest])
        assert each.default == wanted or {each.default, wanted} <= {None, argparse.SUPPRESS}, each


def test_presets_differ():
    def layers(name):
        found = flags.flags_of(*ENTRIES[f"architecture {name}"][2:])
        return next(each.default for each in found if each.dest == "encoder_embed_dim")

    assert layers("shared_transformer_tiny") < layers("shared_transformer") < layers("shared_transformer_wmt_en_de_big")


def test_flags_of_fairseq_are_told_from_ours():
    found = {each.dest: each.stock for each in flags.flags_of(ENTRIES["architecture shared_transformer"][2])}
    assert found["encoder_layers"] and found["dropout"]
    assert not found["encoder_unique_layers"] and not found["router"]


def test_the_page_of_flags_is_current():
    page = ROOT.joinpath("docs", "flags.md").read_text(encoding="utf-8")
    assert page == flags.markdown(), "run: fairseq-adaptive flags --markdown > docs/flags.md"


def test_the_page_of_flags_has_all_of_ours():
    page = flags.markdown()
    for kind, name, owner in flags.ours():
        section = page.partition(f"\n### {name} ({kind})\n")[2] or page.partition(f"\n### {name}\n")[2]
        section = section.partition("\n##")[0]
        assert section.strip(), name
        for each in flags.flags_of(owner):
            assert (f"\n| `{each.name}` | " in section) != each.stock, (name, each.name)
    for line in page.splitlines():
        assert not line.startswith("|") or line.replace("\\|", "").count("|") == 5, line


@pytest.mark.slow
def test_the_wheel_has_the_commands(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "fairseq_adaptive", source / "fairseq_adaptive", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("examples", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"fairseq_adaptive/commands/{name}.py" for name in ("__init__", *COMMANDS)} <= set(held)
    assert {f"fairseq_adaptive/{name}" for name in ("__main__.py", "py.typed", "hub/zoo.json")} <= set(held)
    examples = [str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*/*.sh")]
    examples += [str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*/config/*.yaml")]
    assert len(examples) > 25 and {f"fairseq_adaptive/recipes/{each}" for each in examples} <= set(held)
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def installed(*words):
        command = [str(site / "bin" / "fairseq-adaptive"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    done = installed("plot", "depth", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: fairseq-adaptive plot depth "), done.stderr
    done = installed("recipe", "translation", "--output", "mine")
    assert done.returncode == 0 and "run from there" in done.stdout, done.stderr
    script = "set -euo pipefail; set --; . mine/examples/common.sh; echo $user_dir"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**environment, "PATH": path}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == f"{site / 'fairseq_adaptive'}\n", done.stderr  # a copy has the installed plug-in
    done = installed("flags", "nothing")
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: nothing is no architecture")
