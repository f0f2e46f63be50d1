"""Which layer serves which depth.

Takase and Kiyono, *Lessons on Parameter Sharing across Layers in Transformers* (SustaiNLP 2023), Section 3: M unique
layers serve N depths under one of three strategies. Bae et al., *Mixture-of-Recursions* (2025), leave the first and the
last layer out of the sharing.
"""

from typing import Dict, Mapping, Sequence, Tuple

from fairseq_adaptive.errors import UsageError

STRATEGIES = ("sequence", "cycle", "cycle_rev", "middle_cycle", "middle_sequence")


def layer_schedule(strategy: str, num_unique: int, num_total: int) -> Tuple[int, ...]:
    """Return, for each of the ``num_total`` depths, the index of the unique layer that serves it.

    ``sequence`` repeats each layer before the next one starts; ``cycle`` runs through all layers again and again;
    ``cycle_rev`` is ``cycle`` with the last ``num_unique`` depths in reverse order. ``num_unique`` need not divide
    ``num_total``: the map is then that of the authors' code, where ``sequence`` can leave the last layers unused (5
    layers at 6 depths give 0 0 1 1 2 2; :class:`~fairseq_adaptive.modules.LayerStack` refuses such a schedule).

    ``middle_cycle`` and ``middle_sequence`` give the first and the last depth a layer of their own, and those between to
    the other layers by ``cycle`` and ``sequence``.

    >>> layer_schedule("cycle_rev", 3, 6)
    (0, 1, 2, 2, 1, 0)
    >>> layer_schedule("middle_cycle", 4, 8)
    (0, 1, 2, 1, 2, 1, 2, 3)

    Args:
        strategy: one of :data:`STRATEGIES`
        num_unique: M, how many layers have parameters of their own, 1 <= M <= N
        num_total: N, how many depths there are

    Raises:
        UsageError: (a ValueError) when the strategy is unknown, or the number of layers or depths is impossible
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown layer sharing strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if num_total < 1:
        raise UsageError(f"a model has at least 1 layer, not {num_total}")
    if not 1 <= num_unique <= num_total:
        raise UsageError(
            f"{num_unique} unique layers cannot serve {num_total} depths: "
            f"the number of unique layers must be between 1 and {num_total}"
        )
    if num_unique == num_total:
        return tuple(range(num_total))
    if strategy.startswith("middle_"):
        if num_unique < 3:
            raise UsageError(
                f"{strategy} gives the first and the last of {num_total} depths layers of their own: "
                f"it needs at least 3 unique layers, not {num_unique}"
            )
        middle = layer_schedule(strategy[len("middle_") :], num_unique - 2, num_total - 2)
        return (0, *(1 + number for number in middle), num_unique - 1)
    if strategy == "sequence":
        repeats = -(-num_total // num_unique)
        return tuple(depth // repeats for depth in range(num_total))
    if strategy == "cycle":
        return tuple(depth % num_unique for depth in range(num_total))
    turn = max(num_unique, num_total - num_unique)
    return tuple(
        depth % num_unique if depth < turn else num_unique - 1 - (depth - turn) % num_unique
        for depth in range(num_total)
    )


def check_kinds(schedule: Sequence[int], kinds: str, names: Mapping[str, str]) -> str:
    """The kind of each unique layer, one letter each.

    Args:
        schedule: of :func:`layer_schedule`
        kinds: one letter for each depth
        names: what the letters mean

    Raises:
        UsageError: where a layer would serve depths of different kinds
    """
    found: Dict[int, int] = {}
    for depth, number in enumerate(schedule):
        first = found.setdefault(number, depth)
        if kinds[first] != kinds[depth]:
            raise UsageError(
                f"layer {number} cannot serve depth {first} ({names[kinds[first]]}) and depth {depth} "
                f"({names[kinds[depth]]}) of the layout {kinds}: the schedule {' '.join(map(str, schedule))} must "
                "repeat the kinds; choose another --layer-sharing or --decoder-unique-layers"
            )
    return "".join(kinds[found[number]] for number in sorted(found))
