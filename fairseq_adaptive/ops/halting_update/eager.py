"""The update and its gradient on torch's own kernels, in fewer passes over the states than autograd's."""

import torch
import torch.nn.functional as F


def _computed(running, after, before):
    """``after``, and ``before`` where nothing ran; a copy only where there is such a token, or where asking waits."""
    if not running.is_cuda and bool(running.all()):
        return after
    return torch.where(running.unsqueeze(-1), after, before)


def forward(before, after, output, weight, bias, halting, remainders, running, threshold):
    """Return the fields of an ``Update``, and the share of each token's new state in the result, ...

    Arguments are those of the definition in ``naive.py``.
    """
    exact = halting.dtype
    after = _computed(running, after, before)
    seen = (after if output is None else before).to(exact)
    p = F.linear(seen, weight.to(exact)[None], bias.to(exact)).squeeze(-1).sigmoid_().mul_(running)
    stops = running & (halting + p > threshold)
    remainders = torch.where(stops, 1 - halting, remainders)
    share = torch.where(stops, remainders, p)
    old = before if output is None else output
    blended = torch.lerp(old.to(exact), after.to(exact), share.unsqueeze(-1)).to(old.dtype)
    state, output = (blended, None) if output is None else (after.to(before.dtype), blended)
    return state, output, halting + share, remainders, running & ~stops, p, share


def infer(before, after, output, weight, bias, halting, remainders, running, threshold):
    """As :func:`forward` without the share, on a CPU and without a gradient, in fewer calls where nothing stops: at one
    token these are what an update costs. Results may be tensors that were given."""
    exact, everyone = halting.dtype, bool(running.all())
    after = after if everyone else torch.where(running.unsqueeze(-1), after, before)
    seen = (after if output is None else before).to(exact)
    p = F.linear(seen, weight.to(exact)[None], bias.to(exact)).squeeze(-1).sigmoid_()
    if not everyone:
        p.mul_(running)
    share, total = p, halting + p
    stops = total > threshold
    if not everyone:
        stops &= running
    if bool(stops.any()):
        remainders = torch.where(stops, 1 - halting, remainders)
        share = torch.where(stops, remainders, p)
        total, running = halting + share, running & ~stops
    old = before if output is None else output
    blended = torch.lerp(old.to(exact), after.to(exact), share.unsqueeze(-1)).to(old.dtype)
    state, output = (blended, None) if output is None else (after.to(before.dtype), blended)
    return state, output, total, remainders, running, p


def backward(before, after, output, weight, running, going_on, p, share, d_state, d_output, d_halting, d_rest, d_p):
    """Return the gradients of before, after, output, weight, bias, halting and remainders.

    Args:
        before, after, output, weight, running: of the forward pass
        going_on, p, share: what it has returned
        d_state, d_output, d_halting, d_rest, d_p: gradients of its results, of remainders the last but one
    """
    exact, after = p.dtype, _computed(running, after, before)
    old, d_blended = (before, d_state) if output is None else (output, d_output)
    d_blended = d_blended.to(exact)
    d_share = torch.sub(after, old).to(exact).mul_(d_blended).sum(-1)
    d_logit = torch.where(going_on, d_p + d_halting + d_share, d_p) * p * (1 - p)

    d_after = d_blended * share.unsqueeze(-1)
    d_old = d_blended - d_after
    seen = (after if output is None else before).to(exact)
    d_weight = (d_logit.flatten()[None] @ seen.flatten(0, -2)).squeeze(0)
    d_seen = d_logit.unsqueeze(-1), weight.to(exact)
    if output is None:
        d_before, d_output = d_old, None
        d_after.addcmul_(*d_seen)
    else:
        d_running = d_state * running.unsqueeze(-1)
        d_before, d_output = (d_state - d_running).to(exact).addcmul_(*d_seen), d_old
        d_after += d_running
    stops = running & ~going_on
    d_halting = torch.where(stops, -d_rest - d_share, d_halting)
    return d_before, d_after, d_output, d_weight, d_logit.sum()[None], d_halting, d_rest.masked_fill(stops, 0)
