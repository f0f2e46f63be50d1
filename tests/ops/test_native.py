"""The library is built once, by whoever needs it first, and what cannot be built is said in words."""

import ctypes
import os
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch

import fairseq_adaptive
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops import native, registry
from fairseq_adaptive.ops.decoder_step import OP
from fairseq_adaptive.ops.decoder_step import native as steps
from fairseq_adaptive.ops.decoder_step import packing, structures
from fairseq_adaptive.ops.encoder_layer import native as layers

ROOT = Path(fairseq_adaptive.__file__).parent.parent


def there():
    try:
        return bool(native._compiler())
    except native.Unavailable:
        return False


needs_compiler = pytest.mark.skipif(not there(), reason="there is no C compiler")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "answer"
    folder.mkdir()
    (folder / "number.h").write_text("enum { NUMBER = 42 };\n")
    (folder / "native.c").write_text('#include "number.h"\nint answer(void) { return NUMBER; }\n')
    return folder / "native.c"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def fresh():
    """The process has not tried to load a library yet."""
    for each in (caches := (steps.library, layers.library, native._attempt, registry._load)):
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_sources_are_in_the_package():
    package = ROOT / "fairseq_adaptive"
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "fairseq_adaptive"
    ]
    told = {path for pattern in told for path in package.glob(pattern)}
    assert {path for path in package.rglob("*") if path.suffix in (".c", ".h")} <= told and steps.SOURCE in told


@needs_compiler
def test_what_is_skipped_without_a_library_is_not_skipped_here():
    """A compiler that refuses our sources is a failure, not a machine that lacks one."""
    assert steps.obstacle() is None and layers.obstacle() is None


@needs_compiler
def test_built_once(source, cache, monkeypatch):
    assert native.build(source).answer() == 42
    (file,) = cache.iterdir()
    assert file.name.startswith("answer-") and not file.stat().st_mode & 0o077
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(native, "_compile", lambda *args: pytest.fail("it is there"))
    assert native.build(source).answer() == 42 and file.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("what", ("header", "header elsewhere", "flags", "processor", "compiler"))
def test_another_build_for_what_is_another(source, cache, monkeypatch, tmp_path, what):
    header, others = source.parent / "number.h", []
    if what == "header elsewhere":
        others, header = [tmp_path / "elsewhere"], tmp_path / "elsewhere" / "number.h"
        others[0].mkdir()
        (source.parent / "number.h").rename(header)
        source.write_text('#include "../elsewhere/number.h"\nint answer(void) { return NUMBER; }\n')
    native.build(source, *others)
    if what.startswith("header"):
        header.write_text("enum { NUMBER = 43 };\n")
    elif what == "flags":
        monkeypatch.setenv("FAIRSEQ_ADAPTIVE_CFLAGS", "-DOTHER")
    elif what == "processor":
        monkeypatch.setattr(native, "processor", lambda: "another")
    else:
        wrapper = tmp_path / "mycc"
        wrapper.write_text(f'#!/bin/sh\nexec {native._compiler()[0]} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("CC", str(wrapper))
    assert native.build(source, *others).answer() == (43 if what.startswith("header") else 42)
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_damaged_file_is_built_again(source, cache):
    native.build(source)
    (file,) = cache.iterdir()
    file.write_bytes(b"no library")
    assert native.build(source).answer() == 42
    assert file.stat().st_size > 100 and list(cache.iterdir()) == [file]


@needs_compiler
def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_CACHE", str(tmp_path / "file"))
    assert native.build(source).answer() == 42


@needs_compiler
def test_a_file_that_others_may_write_is_not_loaded(source, cache, monkeypatch):
    native.build(source)
    (file,) = cache.iterdir()
    file.chmod(file.stat().st_mode | stat.S_IWOTH)
    compiled, compile_ = [], native._compile
    monkeypatch.setattr(native, "_compile", lambda *args: (compiled.append(args), compile_(*args)))
    assert native.build(source).answer() == 42 and len(compiled) == 1
    assert not file.stat().st_mode & stat.S_IWOTH
    cache.chmod(0o777)
    assert native.build(source).answer() == 42 and len(compiled) == 2


@needs_compiler
def test_several_at_once(source, cache):
    found, start = [], threading.Barrier(4)

    def build():
        start.wait()
        found.append(native.build(source).answer())

    threads = [threading.Thread(target=build) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [42] * 4 and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "compiler, why",
    [
        ("", "there is no C compiler (cc, gcc or clang)"),
        ("no-such-compiler", "CC=no-such-compiler is no compiler"),
        ("false", "false ended with 1: it says nothing"),
    ],
)
def test_no_compiler(fresh, cache, monkeypatch, caplog, compiler, why):
    """The search goes today's way, with one line that says why; who asks for it by name is told."""
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    backend, reason = OP.choose("cpu", torch.float32)
    assert backend == "torch" and reason.startswith("native: ") and why.rpartition("/")[2] in reason
    with caplog.at_level("INFO"):
        OP.implementation(torch.zeros(1), torch.float32), OP.implementation(torch.zeros(1), torch.float32)
    assert [record.message for record in caplog.records] == [f"decoder_step runs on torch ({reason})"]
    monkeypatch.setenv(registry.VARIABLE, "native")
    with pytest.raises(UsageError, match="KERNELS=native, but decoder_step cannot use it: "):
        OP.choose("cpu", torch.float32)


@needs_compiler
def test_the_compiler_says_what_is_wrong(source, cache):
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.raises(native.Unavailable, match="ended with 1: .*error: .*nothing"):
        native.build(source)


@needs_compiler
def test_a_library_that_computes_something_else_is_not_used(fresh, monkeypatch):
    monkeypatch.setattr(packing, "linear", lambda packing, each, x: x @ each.weight.t())
    assert steps.obstacle() == "its test product is wrong"


def _check(tmp_path, flags, **environment):
    """The tests of the operation in a process of its own, on a library built with other flags."""
    script = tmp_path / "check.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'ops')!r}]\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "import test_decoder_step as tests\n"
        "import test_encoder_layer as layers\n"
        "for sizes in layers.SIZES[:-1]:\n"
        "    for pre_norm in (True, False):\n"
        "        x = torch.randn(sum(layers.LENGTHS), sizes[0])\n"
        "        layers.assert_as_defined(layers.stack(*sizes, pre_norm=pre_norm), x, layers.LENGTHS, 0, 1e-3)\n"
        "for width in (1, 24, 64):\n"
        "    layers.test_predictor(width, 7)\n"
        "for kind in (layers.Map, layers.Int8Map):\n"
        "    layers.test_a_sentence_does_not_depend_on_others(kind)\n"
        "    layers.test_what_is_not_finite_stays_in_its_sentence(float('nan'), kind)\n"
        "layers.test_int8((64, 4, 96), True), layers.test_a_map_of_int8(), layers.test_the_largest_sums_of_int8()\n"
        "tests.test_int8('none', True), tests.test_int8('pondernet', False)\n"
        "for sizes in tests.SIZES:\n"
        "    for pre_norm in (True, False):\n"
        "        made = tests.decoder(pre_norm=pre_norm, activation='gelu', admin=not pre_norm, **sizes)\n"
        "        tests.run(made, [5, 1, 8, 3])\n"
        "for rule in tests.naive.RULES[1:]:\n"
        "    tests.run(tests.decoder(rule=rule, depths=5), [4, 2], threads=2)\n"
        "from fairseq_adaptive.ops.decoder_step.native import library\n"
        "print('lanes', library().lanes())\n"
    )
    known = {"FAIRSEQ_ADAPTIVE_CACHE": str(tmp_path), "FAIRSEQ_ADAPTIVE_CFLAGS": flags, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, **known, **environment}
    )
    assert done.returncode == 0 and "runtime error" not in done.stderr, done.stdout + done.stderr
    return int(done.stdout.split("lanes")[1])


@needs_compiler
@pytest.mark.slow
def test_narrower_vectors(tmp_path):
    if os.uname().machine != "x86_64":
        pytest.skip("the flag is one for x86-64")
    assert _check(tmp_path, "-march=x86-64") == 4


@needs_compiler
@pytest.mark.slow
def test_vectors_of_32_bytes(tmp_path):
    """Also where these have products of int8, as processors without AVX-512 may."""
    if "avx2" not in native.processor():
        pytest.skip("the processor has none")
    more = " -mavxvnni" if "avx_vnni" in native.processor() else ""
    assert _check(tmp_path, f"-march=haswell{more}") == 8


@needs_compiler
@pytest.mark.slow
def test_sanitizers(tmp_path):
    """No access out of bounds, no undefined behaviour."""
    compiler = native._compiler()
    runtime = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{compiler[0]} has no address sanitizer")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=alignment -g -O1"
    _check(tmp_path, flags, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0")


def test_structures_have_the_sizes_of_the_c_file():
    """Fields are told twice, in Python and in C."""
    pytest.importorskip("ctypes")
    if steps.obstacle():
        pytest.skip(steps.obstacle())
    assert layers.library().size_of_Predictor() == ctypes.sizeof(layers.Predictor)
    for name, structure in {
        "Map": structures.Map,
        "Layer": structures.Layer,
        "Decoder": structures.Decoder,
        "Step": structures.Step,
        "Round": structures.Round,
    }.items():
        assert steps.library()[f"size_of_{name}"]() == ctypes.sizeof(structure), name
