"""The clock of the machine, where no other is passed in."""

from __future__ import annotations

import time


def wall_clock() -> float:
    """Return epoch seconds; `time.time` is looked up at every call, so that tests may replace it, as freezegun does."""
    return time.time()
