"""A clock that stands still until it is told to move."""

from __future__ import annotations

import math


class FakeClock:
    """Answers epoch seconds, in whole milliseconds like the instants of a record; pass it to a layer as `clock`."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._milliseconds = round(start * 1000)

    def __call__(self) -> float:
        """Return the time in epoch seconds."""
        seconds = self._milliseconds / 1000
        if int(seconds * 1000) < self._milliseconds:  # the nearest float may lie in the millisecond before
            return math.nextafter(seconds, math.inf)
        return seconds

    def advance(self, seconds: float) -> None:
        """Move on by so many seconds; a negative number moves back."""
        self._milliseconds += round(seconds * 1000)

    def set(self, seconds: float) -> None:
        """Move to an instant in epoch seconds."""
        self._milliseconds = round(seconds * 1000)
