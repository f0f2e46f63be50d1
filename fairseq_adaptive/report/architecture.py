"""What a search has found: the layout, and what it costs beside a Transformer-XL."""

import argparse
import statistics
from typing import Callable, Dict, List, Tuple

import torch
from fairseq.data import Dictionary

from fairseq_adaptive.criterions.controller import TOLERANCE
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, model_options
from fairseq_adaptive.models.segmented_decoder import SegmentedDecoder
from fairseq_adaptive.modules.transformer_xl.block_costs import cost
from fairseq_adaptive.modules.transformer_xl.layout import format_layout
from fairseq_adaptive.modules.transformer_xl.supernet_block import KINDS
from fairseq_adaptive.progress import progress


def load_search(path) -> Tuple[torch.Tensor, argparse.Namespace]:
    """The probabilities ``[N, 3]`` (columns as in ``KINDS``) and the options of the model in a checkpoint.

    Raises:
        UsageError: when it is not a supernet's, or that of one whose architecture was not trained
    """
    state = load_checkpoint(path)
    logits = state["model"].get("decoder.architecture")
    if logits is None:
        raise UsageError(f"{path} is no checkpoint of --arch par_supernet: it has no architecture parameters")
    open_ = (logits == logits[:, :1]).all(dim=1).nonzero().flatten().tolist()
    if open_:
        raise UsageError(
            f"{path} has not chosen among the kinds of {len(open_)} of {len(logits)} blocks: go on with the search until "
            "--architecture-warmup-updates are over"
        )
    return torch.softmax(logits.float(), dim=-1), argparse.Namespace(**model_options(state))


def found_blocks(probabilities: torch.Tensor) -> str:
    """The most probable kind of each block, one letter each, identities included."""
    return "".join(KINDS[kind] for kind in probabilities.argmax(dim=-1).tolist())


def found_layout(blocks: str) -> str:
    """The flag's value for a found model.

    Raises:
        UsageError: when every block is an identity
    """
    kept = blocks.replace("i", "")
    if not kept:
        raise UsageError("the search has found identities only: search with less weight on compute, or for longer")
    return format_layout(kept)


def blocks_within(probabilities: torch.Tensor, costs: Dict[str, float], share: float) -> str:
    """The most probable kinds of all blocks together that cost a share of a Transformer-XL of as many blocks.

    Args:
        probabilities: ``[N, 3]``, of :func:`load_search`
        costs: of a block of kind ``a`` and of kind ``f``
        share: above 0, met within 3%

    Returns:
        one letter a block, identities included

    Raises:
        UsageError: for a share that no kinds meet, and where scipy is not installed
    """
    try:
        import numpy
        from scipy.optimize import LinearConstraint, milp
    except ImportError as error:
        raise UsageError("--compute needs scipy: pip install 'fairseq_adaptive[cutoffs]'") from error

    blocks = len(probabilities)
    each = numpy.array([costs.get(kind, 0.0) for kind in KINDS])
    full = sum(costs["af"[number % 2]] for number in range(blocks))
    one_kind = LinearConstraint(numpy.kron(numpy.eye(blocks), numpy.ones(len(KINDS))), 1, 1)
    near = LinearConstraint(numpy.tile(each / full, blocks), share * (1 - TOLERANCE), share * (1 + TOLERANCE))
    gain = probabilities.double().clamp_min(1e-30).log().flatten().numpy()
    found = milp(-gain, integrality=numpy.ones_like(gain), bounds=(0, 1), constraints=[one_kind, near])
    if found.x is None:
        least = min(each[each > 0]) / full
        raise UsageError(
            f"--compute {share:g}: no layout of {blocks} blocks costs that share of a Transformer-XL's within 3%; shares go from "
            f"{least:.3f} to {blocks * max(each) / full:.3f} in steps"
        )
    return "".join(KINDS[kind] for kind in found.x.reshape(blocks, -1).argmax(1))


def kind_costs(options, batch: int, segment: int) -> Dict[str, float]:
    """FLOPs of a forward and backward of an attention and of a feed-forward block; arguments as of
    :func:`compare_compute`."""
    return {kind: cost(_steps(options, [kind], batch, segment)[0], "flops") for kind in "af"}


def compare_compute(options, blocks: str, batch: int, segment: int, rounds: int = 5) -> Dict[str, List[float]]:
    """Forward and backward through the blocks of a found model and of a Transformer-XL of as many blocks, in turn.

    Embeddings and output, which are the same in both, are left out.

    Args:
        options: of the supernet
        blocks: of :func:`found_blocks`
        batch, segment: B and T; the memory is full
        rounds: how often each is timed

    Returns:
        ``flops`` and ``seconds`` (medians), each of the found model and of the Transformer-XL
    """
    length = len(blocks)
    steps = _steps(options, [blocks.replace("i", ""), ("af" * length)[:length]], batch, segment)
    seconds = [
        [cost(step, "time", repeats=1) for step in steps] for _ in progress(range(rounds + 1), "rounds of timing")
    ][1:]
    return {
        "flops": [cost(step, "flops") for step in steps],
        "seconds": [statistics.median(column) for column in zip(*seconds, strict=True)],
    }


def _steps(options, layouts: List[str], batch: int, segment: int) -> List[Callable[[], None]]:
    """For each layout a forward and backward through its blocks."""
    options = argparse.Namespace(**{**vars(options), "adaptive_softmax_cutoff": None, "tie_adaptive_proj": False})
    steps = []
    for kinds in layouts:
        decoder = SegmentedDecoder(options, Dictionary(), kinds)
        x = torch.randn(batch, segment, options.decoder_embed_dim)
        memory = torch.randn(batch, options.memory_length, options.decoder_embed_dim) if options.memory_length else None
        states = [memory if kind == "a" else None for kind in kinds]

        def step(decoder=decoder, x=x, states=states):
            y, _, _ = decoder.run_blocks(x.clone().requires_grad_(), states)
            y.backward(torch.ones_like(y))

        steps.append(step)
    return steps
