"""The front door: what is light, and that fairseq finds all there is whichever way it comes in."""

from pathlib import Path

import pytest

import fairseq_adaptive
from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data

ROOT = str(Path(USER_DIR).parent)
LIGHT = "import fairseq_adaptive, fairseq_adaptive.modules, fairseq_adaptive.ops, fairseq_adaptive.report"
# what a program, or a configuration that is unpickled, may import before fairseq is told of --user-dir
FIRST = (
    "",
    LIGHT,
    "from fairseq_adaptive.modules import EncoderLayer",
    *(
        f"import fairseq_adaptive.{name}"
        for name in ("models.par_transformer_xl", "tasks", "criterions", "optim", "interop", "hub")
    ),
)
# what does not need fairseq; the other modules are parts of its layers
PLAIN = (
    "data.words",
    "hub",
    "hub.classifier",
    "hub.encoder",
    "hub.loading",
    "ops",
    "errors",
    "modules",
    *(
        f"modules.{name}"
        for name in (
            "layers.admin",
            "layers.attends",
            "layers.known",
            "layers.plain_layer",
            "layers.prepacked_linear",
            "layers.zero_gradients",
            "plain_encoder",
            "policies",
            "shared_encoder",
            "stack",
            "transformer_xl.layout",
            "transformer_xl.memory",
            "transformer_xl.relative_attention",
            "vocabulary.adaptive_input",
            "vocabulary.adaptive_softmax",
        )
    ),
    *(
        f"modules.{folder}.{path.stem}"
        for folder in ("policies", "stack")
        for path in Path(USER_DIR, "modules", folder).glob("[!_]*.py")
    ),
)


def program(code, *args, cwd=ROOT, **kwargs):
    """Run a program that finds this package; its standard output."""
    path = f"import sys; sys.path.insert(0, {ROOT!r})\n"
    return run("python", "-c", path + code, *args, cwd=cwd, **kwargs)


def test_the_package_alone_imports_nothing():
    done = program("before = set(sys.modules); import fairseq_adaptive; print(*sorted(set(sys.modules) - before))")
    assert done.stdout.split() == ["fairseq_adaptive"]


SNAPSHOT = """
import inspect, numpy, torch
import fairseq_cli.train, fairseq_cli.generate

def snapshot():
    seen = {"hook": sys.excepthook, "compat": hasattr(numpy, "compat")}
    seen["safe"] = frozenset(map(str, torch.serialization.get_safe_globals()))
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("fairseq", "fairseq_cli"):
            for key, value in vars(module).items():
                seen[name, key] = value
                for part, content in vars(value).items() if inspect.isclass(value) else ():
                    seen[name, key, part] = content
    return {key: value if isinstance(value, (bool, frozenset)) else id(value) for key, value in seen.items()}

before = snapshot()
"""


def test_light_imports_change_nothing():
    code = (
        SNAPSHOT
        + f"""
{LIGHT}
assert snapshot() == before
import fairseq_adaptive.plugin
changed = {{key for key, value in snapshot().items() if before.get(key) != value}}
assert {{"hook", "safe", ("fairseq.checkpoint_utils", "load_checkpoint_to_cpu")}} < changed
print(len(changed))
"""
    )
    assert int(program(code).stdout.split()[-1]) > 20


def test_light_imports_leave_fairseq_alone():
    done = program(f"{LIGHT}\nprint(*sys.modules)")
    assert not {"fairseq", "hydra", "omegaconf", "fairseq_adaptive.plugin"} & set(done.stdout.split())


def folder_spelling(tmp_path, spelling):
    if spelling == "a link":
        (tmp_path / "fairseq_adaptive").symlink_to(USER_DIR)
        return str(tmp_path / "fairseq_adaptive")
    # fairseq's own for the bare name of an installed package is ".../site-packages/fairseq/../fairseq_adaptive"
    name = "fairseq_adaptive"
    return {"a path": USER_DIR, "a name": name, "up and down": f"{USER_DIR}/../{name}"}[spelling]


PARSE = """
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
args = options.parse_args_and_arch(options.get_training_parser(), sys.argv[1:])
convert_namespace_to_omegaconf(args)
from fairseq_adaptive import compat
assert len(compat.applied) > 10 and "load_safely" in compat.applied
print(args.arch, args.criterion, args.optimizer, args.task)
"""
OURS = ["par_supernet", "architecture_entropy_loss", "architecture_adam", "segmented_language_modeling"]


SPELLINGS = ("a path", "a name", "up and down", "a link")


@pytest.mark.parametrize(
    "first, spelling",
    [*((first, "a path") for first in FIRST), *((first, other) for first in FIRST[:2] for other in SPELLINGS[1:])],
)
def test_fairseq_finds_all(first, spelling, tmp_path):
    flags = (f"--{name}={ours}" for name, ours in zip(("arch", "criterion", "optimizer", "task"), OURS))
    done = program(f"{first}\n{PARSE}", "data", "--user-dir", folder_spelling(tmp_path, spelling), *flags)
    assert done.stdout.splitlines()[-1].split() == OURS


def test_another_folder_of_this_name_is_refused(tmp_path):
    other = tmp_path / "fairseq_adaptive"
    other.mkdir()
    done = program(f"{LIGHT}\n{PARSE}", "data", "--user-dir", other, check=False)
    assert "not globally unique" in done.stderr and done.returncode == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_translation_data(tmp_path_factory.mktemp("data"), n_train=40)


def train_flags(data, folder):
    return [
        data,
        "--user-dir",
        USER_DIR,
        "--arch",
        "shared_transformer",
        *TINY_TRANSFORMER,
        "--optimizer",
        "adam",
        "--lr",
        "0.001",
        "--batch-size",
        "20",
        "--cpu",
        "--num-workers",
        "0",
        "--max-update",
        "2",
        "--save-dir",
        folder,
    ]


def test_training_after_our_modules(data, tmp_path):
    """fairseq-train and fairseq-generate in one process in which a module of ours ran before."""
    code = """
import torch
from fairseq_adaptive.modules import ParameterSharedTransformerEncoder
ParameterSharedTransformerEncoder(16, 4, 32)(torch.randn(2, 3, 16))
from fairseq_cli import generate, train
flags = sys.argv[1:]
train.cli_main()
path = flags[flags.index("--save-dir") + 1] + "/checkpoint_last.pt"
sys.argv[1:] = [flags[0], "--user-dir", flags[2], "--path", path, "--cpu", "--beam", "2"]
generate.cli_main()
"""
    done = program(code, *train_flags(data, tmp_path), cwd=tmp_path)
    assert sum(line.startswith("H-") for line in done.stdout.splitlines()) == 20  # all: fairseq's batches are patched


BLOCK = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "fairseq_cli", "omegaconf", "hydra"):
            raise ModuleNotFoundError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_plain_torch_without_fairseq():
    code = (
        BLOCK
        + f"""
import importlib, torch
for name in {PLAIN!r}:
    importlib.import_module("fairseq_adaptive." + name)
from fairseq_adaptive.modules import ParameterSharedTransformerEncoder
from fairseq_adaptive.ops.residual_norm import residual_norm
x = torch.randn(2, 3, 16, requires_grad=True)
for policies in {{}}, {{"halting": "act", "router": "skimming", "reader": "tape"}}, {{"router": "mixture_of_depths"}}:
    model, x.grad = ParameterSharedTransformerEncoder(16, 4, 32, **policies), None
    states = model(x)
    (states[0] if "reader" in policies else states).sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        model.eval()(x)
assert residual_norm(x, x, torch.ones(16), torch.zeros(16))[0].equal(x + x)
try:
    from fairseq_adaptive.modules import EncoderLayer
except ModuleNotFoundError as error:
    assert error.name == "fairseq"
try:
    from fairseq_adaptive.modules import Nonsense
except ImportError as error:
    print(error)
"""
    )
    assert "Nonsense" in program(code).stdout


def test_names_of_the_package():
    for name in fairseq_adaptive.modules.__all__:
        assert getattr(fairseq_adaptive.modules, name) is not None
    with pytest.raises(AttributeError, match="has no attribute Nonsense"):
        fairseq_adaptive.modules.Nonsense


FAULTS = {
    "a missing file": "open('absent.txt')",
    "an empty set": "raise ValueError('The dataset is empty')",
    "a fault while an error is handled": """
from fairseq_adaptive.errors import UsageError
try:
    raise UsageError("cannot do it")
except UsageError:
    int("a fault of the program")
""",
}


@pytest.mark.parametrize("imported", [LIGHT, "import fairseq_adaptive.hub"], ids=["light", "hub"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_of_a_program_keep_their_traceback(fault, imported):
    done = program(f"{imported}\n{fault}", check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "\nerror: " not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "code, where, line",
    [
        ("from fairseq_cli.train import cli_main; cli_main()", "", "absent"),
        ("from fairseq_cli.train import cli_main; cli_main()", LIGHT, "absent"),
        ("open('absent')", "from fairseq_adaptive import errors; errors.report_usage_errors()", "absent"),
    ],
    ids=["fairseq", "modules first", "a command of ours"],
)
def test_usage_errors_are_one_line(code, where, line, tmp_path):
    flags = [
        "absent",
        "--user-dir",
        USER_DIR,
        "--arch",
        "shared_transformer",
        "-s",
        "src",
        "-t",
        "tgt",
        "--cpu",
        "--batch-size",
        "1",
    ]
    done = program(f"{where}\n{code}", *flags, cwd=tmp_path, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and line in last, done.stderr
    assert "Traceback" not in done.stderr


COMMANDS = [
    path
    for folder in ("scripts/*.py", "scripts/benchmark/*.py", "examples/*/*.py")
    for path in Path(ROOT).glob(folder)
    if "fairseq_adaptive" in (text := path.read_text(encoding="utf-8")) and "def main(" in text
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_says_that_it_is_one(path):
    last = path.read_text(encoding="utf-8").partition('if __name__ == "__main__":')[2]
    assert last.strip().removeprefix("command.") in ("run(main)", "run(torch.no_grad()(main))")


def test_a_command_misses_a_file(tmp_path):
    done = run(
        "python", Path(ROOT, "scripts/plot_depth.py"), "model", "--input", "absent.txt", cwd=tmp_path, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "absent.txt" in last
