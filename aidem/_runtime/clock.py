"""The clock of the machine, where no other is passed in."""

from __future__ import annotations

import time
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

wall_clock: Final[Callable[[], float]] = partial(methodcaller("time"), time)
"""Returns epoch seconds; `time.time` is looked up at every call, so that tests may replace it, as freezegun does."""
