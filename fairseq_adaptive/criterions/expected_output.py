"""PonderNet's expected loss through stock criterions."""

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError


def expected_log_probs(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Return logits ... x (V + 1) whose cross-entropy with a target below V is the expected one.

    A loss that is linear in log-probabilities, as cross-entropy with or without label smoothing is, has as its
    expectation over depths that of the expected log-probabilities. Their exponentials sum to at most 1: an additional
    class takes what is left, so that a softmax over the result changes nothing.

    Args:
        log_probs: N x ... x V, normalised
        weights: N x ..., sum to 1 over the first dimension
    """
    expected = (log_probs * weights.unsqueeze(-1).to(log_probs)).sum(0)
    total = expected.logsumexp(-1, keepdim=True).clamp_max(-torch.finfo(expected.dtype).eps)
    return torch.cat((expected, torch.log(-torch.expm1(total))), -1)


def check_expected(model, regression: bool = False) -> None:
    """
    Args:
        model: of which the expected output is to be learned
        regression: it is a number

    Raises:
        UsageError: for an adaptive softmax, or outputs that are no scores of classes
    """
    if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
        raise UsageError(
            "PonderNet's expected loss cannot be computed with an adaptive softmax: leave out "
            "--adaptive-softmax-cutoff, or train with --halting act"
        )
    if regression:
        raise UsageError("PonderNet's expected loss needs scores of classes: train regression with --halting act")


def _expected(scores, weights):
    """Scores of all depths, (N ...) x V, to those of their expectation."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return expected_log_probs(scores.log_softmax(-1).view(*weights.shape, -1), weights)


class ExpectedOutput:
    """Stands for a model in a criterion; its output is the expected one over the depths of a stack.

    Args:
        model: a fairseq model
        stack: the stack from which its output is made
        traces: of a :func:`~fairseq_adaptive.modules.recording` that is going on

    Raises:
        UsageError: for an adaptive softmax, or outputs that are no scores of classes
    """

    needs_scores = True  # a criterion must not ask the model for features instead

    def __init__(self, model, stack, traces):
        check_expected(model)
        self._model, self._stack = model, stack
        self._traces = next(traces[name] for name, module in model.named_modules() if module is stack)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        self._stack.every_depth = True
        try:
            output, *rest = self._model(*args, **kwargs)
        finally:
            self._stack.every_depth = False
        weights = self._traces[-1].distribution  # N x B x T
        if kwargs.get("masked_tokens") is not None:
            masked = kwargs["masked_tokens"]
            weights = weights[:, :, : masked.size(1)][:, masked]  # without what a reader has added
        elif kwargs.get("classification_head_name") is not None:
            weights = weights[:, :, 0]
        if output.size(-1) < 2:
            check_expected(self._model, regression=True)
        return (_expected(output, weights), *rest)

    def sentence_order(self, extra):
        return _expected(self._model.sentence_order(extra), self._traces[-1].distribution[:, :, 0])

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        log = net_output[0][..., :-1]
        return log if log_probs else log.exp()
