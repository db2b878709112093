"""What all layers say alike about their stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CLOCKS_AGREE_SECONDS: Final = 2
"""Some services tell their time in whole seconds, and an answer takes a while."""


def clock_fact(ahead_seconds: float) -> str:
    """Return how far the clock of this process is from the store's."""
    if abs(ahead_seconds) <= CLOCKS_AGREE_SECONDS:
        return "as the store's"
    return f"{abs(ahead_seconds):,.0f} s {'ahead of' if ahead_seconds > 0 else 'behind'} the store's"


def clock_problems(ahead_seconds: float, *, danger: str) -> Iterator[str]:
    """Yield the problem that this difference is, if it is one.

    Args:
        ahead_seconds: How far the clock of this process is ahead.
        danger: What may come of it.
    """
    if abs(ahead_seconds) > CLOCKS_AGREE_SECONDS:
        yield f"the clock of this machine is {clock_fact(ahead_seconds)}: {danger}; set it by NTP"


def joined(values: Iterable[str]) -> str:
    """Return what several servers say, each different answer once."""
    return " / ".join(dict.fromkeys(values))
