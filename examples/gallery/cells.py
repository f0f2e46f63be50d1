"""The cells of the gallery: what each is made of, and the ``fairseq-train`` that trains it.

A cell is a schedule x a router x a halting rule x a reader. All have the same width, data, order of batches, optimiser and
number of updates. Those that spend less compute than their depths are held to DEPTHS of FULL depths: by --compute in
training and ``fairseq-adaptive dial`` afterwards where that can be, else by what they are built of.
"""

import json
from typing import Dict, List, NamedTuple, Optional

LANGUAGE_MODEL, TRANSLATION = TASKS = "language_model", "translation"
FULL, DEPTHS = 6, 3
COMPUTE = DEPTHS / FULL
SIDES = {LANGUAGE_MODEL: ("decoder",), TRANSLATION: ("encoder", "decoder")}
ARCHITECTURES = {LANGUAGE_MODEL: "shared_transformer_lm", TRANSLATION: "shared_transformer"}
FEED_FORWARD = {LANGUAGE_MODEL: 4, TRANSLATION: 2}  # times the width
FLAGS = {
    LANGUAGE_MODEL: "--task language_modeling --tokens-per-sample 64 --dropout 0 "
    "--decoder-input-dim {width} --decoder-output-dim {width}",
    TRANSLATION: "--encoder-normalize-before --decoder-normalize-before --dropout 0.1",
}
ROTATING = "--exit-curriculum rotational"
LOSSES = {LANGUAGE_MODEL: "cross_entropy", TRANSLATION: "label_smoothed_cross_entropy"}
# at higher ones short trainings stay at the frequencies of the words for longer
LEARNING_RATE = {LANGUAGE_MODEL: 0.001, TRANSLATION: 0.001}


class Cell(NamedTuple):
    """A row of the gallery.

    Attributes:
        title: what it is called in the figure
        kind: by which it is coloured: plain, schedule, router, halting, several
        depths, layers: N and M of encoder and decoder
        flags: of the model; DECODER is what names the flag of a translation model's decoder
        loss: ``task``; ``adaptive``, with the prices of policies; or ``exits``, of every depth
        steered: by ``--compute`` in training
        dialled: by ``fairseq-adaptive dial`` after training
        prices: of its loss
        tasks: that it is for
        of: the cell whose trained model it takes, with ``changed`` flags of the model
        encoder: N and M of the encoder, where they are others
    """

    title: str
    kind: str
    depths: int = FULL
    layers: int = DEPTHS
    flags: str = ""
    loss: str = "adaptive"
    steered: bool = False
    dialled: bool = False
    prices: Optional[Dict] = None
    tasks: tuple = TASKS
    of: Optional[str] = None
    changed: Optional[Dict] = None
    encoder: Optional[tuple] = None


_PONDER = {"pondernet": {"weight": 0.01, "prior_rate": 1 / DEPTHS}}
_RECURSIONS = "--router mixture_of_recursions"
CELLS = {
    # the models to beat: of all depths, and of the multiply-adds and the parameters of the cells below
    "plain-6": Cell("plain, 6 layers", "plain", layers=FULL, loss="task"),
    "plain-3": Cell("plain, 3 layers", "plain", depths=DEPTHS, loss="task"),
    # schedules: all depths, fewer layers
    "shared": Cell("3 layers at 6 depths", "schedule", loss="task"),
    "lora": Cell("3 layers at 6 depths, LoRA", "schedule", flags="--depth-lora-rank 8", loss="task"),
    "universal": Cell("1 layer at 6 depths", "schedule", layers=1, loss="task"),
    # halting rules
    "act": Cell("ACT", "halting", flags="--halting act", steered=True, dialled=True),
    "stick_breaking": Cell("stick-breaking", "halting", flags="--halting stick_breaking", steered=True, dialled=True),
    "pondernet": Cell("PonderNet", "halting", flags="--halting pondernet", dialled=True, prices=_PONDER),
    "loop_gate": Cell("loop gate", "halting", flags="--halting loop_gate", dialled=True),
    "saturation": Cell("early exit", "halting", of="shared", changed={"halting": "saturation"}, dialled=True),
    "layerskip": Cell(
        "LayerSkip", "halting", flags="--DECODERhalting margin", loss="exits", dialled=True, encoder=(DEPTHS, DEPTHS)
    ),
    # routers
    "skimming": Cell("skimming", "router", flags="--router skimming", steered=True, dialled=True),
    "mixture_of_depths": Cell(
        "Mixture-of-Depths",
        "router",
        flags="""--router mixture_of_depths --router-args {"capacity":"12.5%","every":2,"weighting":"score"}""",
    ),
    # 2 recursions of 2 layers: all tokens in the first, half of them in the second, or a mean of 1.5: 3 depths
    "mixture_of_recursions": Cell("Mixture-of-Recursions", "router", depths=4, layers=2, flags=_RECURSIONS),
    "token_choice": Cell("Recursions, token choice", "router", depths=4, layers=2, flags="--router token_choice"),
    # several at once
    "skimming-act": Cell(
        "skimming + ACT", "several", flags="--router skimming --halting act", steered=True, dialled=True
    ),
    "tape-act": Cell(
        "tape + ACT", "several", flags="--reader tape --halting act", steered=True, dialled=True, tasks=(TRANSLATION,)
    ),
    # for keys.sh alone: recursions that read the keys and values of the first one
    "mixture_of_recursions-first": Cell(
        "Mixture-of-Recursions, keys of the first", "router", 4, 2, f"{_RECURSIONS} --router-kv first", tasks=()
    ),
    "token_choice-first": Cell(
        "token choice, keys of the first", "router", 4, 2, "--router token_choice --router-kv first", tasks=()
    ),
}
KEYS = ("mixture_of_recursions", "mixture_of_recursions-first", "token_choice", "token_choice-first")
REPEATS = ("shared", "universal")  # whose keys repeats.py exchanges
PRIORS = ("pondernet", "loop_gate")
PRIOR_DEPTHS = (2, 3, 4)  # at which they are compared
GROUPS = {"gallery": None, "keys": (*REPEATS, *KEYS), "priors": PRIORS}


def cells_of(group: str, task: str) -> List[str]:
    """The names of the cells of ``gallery``, ``keys`` or ``priors`` for a task."""
    return [
        name for name, cell in CELLS.items() if (task in cell.tasks if GROUPS[group] is None else name in GROUPS[group])
    ]


def training(name: str, task: str, folder: str, seed: int, updates: int, width: int) -> List[str]:
    """The flags of ``fairseq-train`` behind the folder of its data and ``--user-dir``.

    Args:
        name: of a cell that is trained
        task: of TASKS
        folder: for its checkpoints
        seed, updates, width: positive
    """
    cell, interval = CELLS[name], max(1, updates // 2)
    words = f"--arch {ARCHITECTURES[task]} --layer-sharing cycle".split()
    for side in SIDES[task]:
        depths, layers = cell.encoder if cell.encoder and side == "encoder" else (cell.depths, cell.layers)
        words += f"--{side}-layers {depths} --{side}-unique-layers {layers} --{side}-embed-dim {width}".split()
        words += f"--{side}-ffn-embed-dim {FEED_FORWARD[task] * width} --{side}-attention-heads 4".split()
    words += FLAGS[task].format(width=width).split()
    if cell.loss == "task":
        words += ["--criterion", LOSSES[task]]
    else:
        criterion, more = ("adaptive_compute_loss", "") if cell.loss == "adaptive" else ("early_exit_loss", ROTATING)
        words += f"--criterion {criterion} --task-criterion {LOSSES[task]} {more}".split()
    words += ["--label-smoothing", "0.1"] if task == TRANSLATION else []
    words += cell.flags.replace("DECODER", "decoder-" if task == TRANSLATION else "").split()
    words += ["--compute", str(COMPUTE)] if cell.steered else []
    words += ["--prices", json.dumps(cell.prices)] if cell.prices else []
    words += f"--optimizer adam --adam-betas (0.9,0.98) --clip-norm 1 --lr {LEARNING_RATE[task]}".split()
    words += f"--lr-scheduler fixed --warmup-updates {max(1, updates // 20)}".split()
    words += f"--max-update {updates} --max-tokens 1024 --seed {seed} --num-workers 0 --log-format simple".split()
    words += f"--save-interval-updates {interval} --validate-interval-updates {interval} --max-valid-steps 8".split()
    return [*words, *"--no-epoch-checkpoints --keep-interval-updates 1 --log-interval 50 --save-dir".split(), folder]
