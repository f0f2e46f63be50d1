"""What a search has found: the layout, and what it costs beside a Transformer-XL."""

import argparse
import statistics
from typing import Dict, List, Tuple

import torch
from fairseq.data import Dictionary

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
    options = argparse.Namespace(**{**vars(options), "adaptive_softmax_cutoff": None, "tie_adaptive_proj": False})
    length = len(blocks)
    steps = []
    for kinds in blocks.replace("i", ""), ("af" * length)[:length]:
        decoder = SegmentedDecoder(options, Dictionary(), kinds)
        x = torch.randn(batch, segment, options.decoder_embed_dim)
        memory = torch.randn(batch, options.memory_length, options.decoder_embed_dim) if options.memory_length else None
        states = [memory if kind == "a" else None for kind in kinds]

        def step(decoder=decoder, x=x, states=states):
            y, _, _ = decoder.run_blocks(x.clone().requires_grad_(), states)
            y.backward(torch.ones_like(y))

        steps.append(step)
    seconds = [
        [cost(step, "time", repeats=1) for step in steps] for _ in progress(range(rounds + 1), "rounds of timing")
    ][1:]
    return {
        "flops": [cost(step, "flops") for step in steps],
        "seconds": [statistics.median(column) for column in zip(*seconds, strict=True)],
    }
