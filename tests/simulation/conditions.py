"""The conditions of a run: how aidem is configured, and how bad the network and the machines are."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

Policy = Literal["run_again", "raise", "check"]
Style = Literal["coroutine", "future", "mixed", "settled"]

POLICIES: tuple[Policy, ...] = ("run_again", "run_again", "raise", "check")
STYLES: tuple[Style, ...] = ("coroutine", "future", "mixed", "mixed", "settled")
EAGER_TASKS: Callable[..., asyncio.Future] | None = None
if sys.version_info >= (3, 12):
    EAGER_TASKS = asyncio.eager_task_factory


class Conditions:
    """Drawn from the seed of the run; all of them stay as they are while it lasts."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        # The store and the clocks.
        self.own_clock = rng.random() < 0.7
        """Whether the store judges by its own clock (Redis, SQLite) or by its callers' (DynamoDB)."""
        self.skew = rng.choice([0.0, 0.0, 0.25, 1.0])
        """How far the clock of a process is off at most, in seconds."""
        self.max_clock_skew = 2 * self.skew
        if self.own_clock:
            self.skew, self.max_clock_skew = rng.choice([0.0, 0.0, 3.0]), 0.0
        # The configuration.
        self.policy: Policy = rng.choice(POLICIES)
        self.lease: float | None = rng.choice([0.5, 1.0, 2.0, 3.0, 6.0, 10.0])
        if rng.random() < 0.04 and self.policy != "check":
            self.lease = None
        self.renew = rng.random() < 0.92
        self.has_long_window = rng.random() < 0.75
        """Whether outcomes outlast the run."""
        self.kept = 100_000.0 if self.has_long_window else rng.choice([1.0, 3.0, 8.0])
        self.stores_exceptions = rng.random() < 0.5
        self.fail_open = self.policy == "run_again" and rng.random() < 0.15
        # The network and the machines.
        self.is_gentle = rng.random() < 0.2
        """Whether nothing goes wrong at all."""
        self.no_cancels = rng.random() < 0.1
        self.fault_rate = 0.0 if self.is_gentle else rng.choice([0.0, 0.02, 0.08, 0.25])
        self.stickiness = rng.choice([0.0, 0.5])
        """How likely a fault is followed by the like."""
        self.longest_late = rng.choice([0.5, 3.0, 8.0])
        self.client_timeout = rng.choice([0.3, 1.0, 2.0, 7.0, 30.0])
        self.style: Style = rng.choice(STYLES)
        """What the operations of the layer answer."""
        self.speed = rng.choice([0.0, 0.001, 0.01, 0.05])
        """How long a request or a reply takes at most, in seconds."""
        self.keys = rng.choice([1, 1, 2])
        self.processes = rng.choice([1, 2, 2, 3, 4])
        self.eager = EAGER_TASKS is not None and rng.random() < 0.3
        # The bodies.
        self.longest_body = rng.choice([2, 4, 7])
        """How many things a body does at most."""
        self.block_rate = rng.choice([0.05, 0.2])
        self.failure_rate = rng.choice([0.1, 0.1, 0.4, 0.7])

    @property
    def is_at_most_once(self) -> bool:
        """Whether a claim that has lapsed is in doubt."""
        return self.policy != "run_again"

    def lease_or(self, default: float) -> float:
        """Return the length of a lease; the default where claims have none."""
        return default if self.lease is None else self.lease

    def delay(self) -> float:
        """Draw how long a request or a reply takes."""
        if self.speed == 0.0:
            return 0.0
        return self._rng.uniform(0, min(self.speed, self.lease_or(3) / 20))
