"""What of all depths comes out of a stack, as RoBERTa names it."""


def inner_states(stack, start, between, end, length):
    """What RoBERTa calls so, N + 1 states T x B x C: before the first depth, and after each.

    Args:
        stack: of N depths
        start: T x B x C, before the first
        between: states after the depths that ran, (T + S) x B x C; None: they are not wanted
        end: what the stack returned, (T + S) x B x C; it stands for the depths that did not run, too
        length: T
    """
    if between is None:
        return None
    states = [start, *between[: len(stack) - 1]]
    return [each[:length] for each in states + [end] * (len(stack) + 1 - len(states))]


def of_all_depths(masked_tokens, features):
    """The mask B x T of masked words for features N B x T x C, which a halting rule that weighs depths makes in training;
    as it is where there are those of one depth, or no mask."""
    if masked_tokens is None or len(masked_tokens) == len(features):
        return masked_tokens
    return masked_tokens.repeat(len(features) // len(masked_tokens), 1)
