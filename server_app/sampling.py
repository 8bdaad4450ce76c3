"""Which nodes are asked: draws that depend on the run's seed, and not on the order in which Flower lists the nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256


def sample_size(connected: int, fraction: float, least: int) -> int:
    """Return how many of the connected nodes are asked, as Flower's strategies count.

    Parameters
    ----------
    connected : int
        Number of connected nodes.
    fraction : float
        Fraction of them, rounded down.
    least : int
        At least this many; all, if there are fewer.
    """
    return min(max(int(connected * fraction), least), connected)


def draw(names: Mapping[int, str], count: int, seed: str) -> list[int]:
    """Draw nodes at random.

    A node that comes or goes changes the draw of no other node but the last one.

    Parameters
    ----------
    names : mapping of int to str
        The nodes to draw from, by id; the draw depends on their names.
    count : int
        Number of nodes to draw.
    seed : str
        Another seed gives another draw.
    """
    return sorted(names, key=lambda node_id: sha256(f"{seed}/{names[node_id]}".encode()).digest())[:count]


def draw_in_turns(
    names: Mapping[int, str], count: int, seed: str, drawn: Collection[str]
) -> tuple[list[int], frozenset[str]]:
    """Draw nodes at random, but none for a second time before each had its turn.

    Parameters
    ----------
    names, count, seed
        As in `draw`.
    drawn : collection of str
        Names of the nodes that already had their turn, from the last draw; at first empty.

    Returns
    -------
    tuple
        The drawn nodes, and the names for the next draw.
    """
    if count >= len(names):
        return list(names), frozenset(drawn)
    waiting = {node_id: name for node_id, name in names.items() if name not in drawn}
    chosen = draw(waiting, count, seed)
    if len(chosen) == count:
        return chosen, frozenset(drawn) | {names[node_id] for node_id in chosen}
    others = {node_id: name for node_id, name in names.items() if node_id not in waiting}
    again = draw(others, count - len(chosen), seed)
    return [*chosen, *again], frozenset(names[node_id] for node_id in again)
