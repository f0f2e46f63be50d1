"""The adaptive softmax of fairseq's Transformers: its flags checked, and log-probabilities that have a gradient."""

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_adaptive.compat.literals import NotLiteral, read_literal, shorten
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.vocabulary.adaptive_input import cluster_ends, cluster_widths


def check_cutoffs(flags, vocab_size: int, width: int, name: str = "adaptive_softmax") -> None:
    """Refuse cutoffs that do not fit the vocabulary, and a factor that leaves a cluster no width.

    Args:
        flags: with ``adaptive_softmax_cutoff``, None or a text such as ``1000,5000``, and ``adaptive_softmax_factor``
        vocab_size: V; the last cutoff may be V, as in fairseq
        width: of the widest embeddings
        name: what the two begin with

    Raises:
        UsageError: with what would be right
    """
    cutoffs, flag = getattr(flags, f"{name}_cutoff", None), f"--{name.replace('_', '-')}-cutoff"
    if cutoffs is None:
        return
    said = f"{flag} {shorten(cutoffs, 40)} is no comma separated list of whole numbers such as 1000,5000"
    try:
        found = read_literal(cutoffs) if isinstance(cutoffs, str) else cutoffs
    except NotLiteral as error:
        error.args = (said,)  # what reads checkpoints names the file
        raise
    found = [found] if isinstance(found, int) else found
    if not isinstance(found, (list, tuple)) and not OmegaConf.is_list(found):
        raise UsageError(said)
    found = list(found)
    if not found or not all(type(cutoff) is int for cutoff in found):
        raise UsageError(said)
    found = found[:-1] if found[-1] == vocab_size else found
    try:
        cluster_ends(vocab_size, found)
        cluster_widths(width, float(getattr(flags, f"{name}_factor", None) or 4), len(found) + 1)
    except UsageError as error:
        raise UsageError(f"{flag} {str(cutoffs)[:40]}: {error}") from error


def check_ties(args) -> None:
    """Refuse ties between the input and the output of a language model that have not the same embeddings.

    Raises:
        UsageError: with the flag that is missing or differs
    """
    others = [flag for flag in ("character_embeddings", "adaptive_input") if getattr(args, flag)]
    if args.share_decoder_input_output_embed and others and args.adaptive_softmax_cutoff is None:
        raise UsageError(
            "--share-decoder-input-output-embed shares embeddings of words that have one width, and those of "
            f"--{others[0].replace('_', '-')} are others: leave one of them out"
        )
    if args.adaptive_input and args.adaptive_input_cutoff is None:
        raise UsageError("--adaptive-input needs --adaptive-input-cutoff, such as 20000,60000: add it")
    if not getattr(args, "tie_adaptive_weights", False):
        return
    if args.character_embeddings:
        raise UsageError(
            "--tie-adaptive-weights ties what --character-embeddings take the place of: leave out one of them"
        )
    if not args.adaptive_input or args.adaptive_softmax_cutoff is None:
        raise UsageError("--tie-adaptive-weights needs --adaptive-input and --adaptive-softmax-cutoff: add them")
    for one, other in (
        ("adaptive_input_cutoff", "adaptive_softmax_cutoff"),
        ("adaptive_input_factor", "adaptive_softmax_factor"),
        ("decoder_input_dim", "decoder_output_dim"),
        ("decoder_output_dim", "decoder_embed_dim"),
    ):
        if getattr(args, one) != getattr(args, other):
            raise UsageError(
                f"--tie-adaptive-weights needs the same --{one.replace('_', '-')} and --{other.replace('_', '-')}, "
                f"not {getattr(args, one)} and {getattr(args, other)}"
            )


def log_probs(softmax, hidden: Tensor) -> Tensor:
    """What fairseq's ``AdaptiveSoftmax.get_log_prob`` returns without targets, which changes it in place and has no gradient.

    Args:
        softmax: fairseq's
        hidden: [..., C]

    Returns:
        [..., V]
    """
    rows, first = hidden.reshape(-1, hidden.size(-1)), softmax.cutoff[0]
    head = softmax.head(rows).log_softmax(-1)
    tails = [tail(rows).log_softmax(-1) + head[:, first + number, None] for number, tail in enumerate(softmax.tail)]
    return torch.cat((head[:, :first], *tails), -1).view(*hidden.shape[:-1], -1)
