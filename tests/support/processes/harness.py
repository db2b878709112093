"""Real processes on one persistence layer: started together, killed and stopped on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from tests.support.processes.log import FleetLog

ROOT = Path(__file__).parents[3]
POLL_SECONDS = 0.02
ATTEMPTS_SECONDS = 40.0


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a worker does.

    Attributes:
        argument: What the factory gets, such as a URL.
        log: Where events go.
        keys: What it calls, in this order or shuffled.
        tasks: How many calls it makes at a time.
        body_seconds: How long a body takes, at least and at most.
        factory: `module:function`, which makes the layer.
        asks_after_calls: If not 0, calls have a check, which answers when the log has so many of its key.
        together: If not 0, a body goes on when the log has so many calls of its key.
    """

    argument: str
    log: str
    keys: list[str]
    lease_seconds: float = 30.0
    wait_timeout_seconds: float = 30.0
    tasks: int = 2
    body_seconds: tuple[float, float] = (0.002, 0.02)
    shuffled: bool = False
    seed: int = 0
    factory: str = "aidem.persistence:open_persistence_layer"
    asks_after_calls: int = 0
    together: int = 0


@dataclass
class Fleet:
    """Workers with the same orders; a context manager that leaves none behind.

    Attributes:
        orders: What they do.
        size: How many they are.
        kills: So many of them kill themselves in a body.
        stops: So many others stop themselves in a body. Each has a key of its own for that, at which the others
            come last, and not before its body has begun: they all have to take it over.
    """

    orders: Orders
    size: int
    kills: int = 0
    stops: int = 0
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def killed(self) -> set[int]:
        return {worker.pid for worker in self.workers[: self.kills]}

    @property
    def stopped(self) -> set[int]:
        return {worker.pid for worker in self.workers[self.kills : self.kills + self.stops]}

    def __enter__(self) -> Self:
        signals = [signal.SIGKILL] * self.kills + [signal.SIGSTOP] * self.stops
        ends = dict(zip(self.orders.keys, map(int, signals), strict=False))
        for number in range(self.size):
            orders = json.dumps(asdict(self.orders) | {"seed": number, "ends": ends})
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.processes.worker", orders],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()
            worker.communicate()

    def go(self) -> None:
        """Let them all begin, once all are ready."""
        for worker in self.workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()

    def log(self) -> FleetLog:
        return FleetLog.read(self.orders.log)

    def wait_for_ends(self) -> None:
        """Wait until the workers that are to be killed or stopped in a body are."""
        for pid in self.killed | self.stopped:
            ended = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert ended is not None
            assert ended.si_status == (signal.SIGKILL if pid in self.killed else signal.SIGSTOP)
        assert self.killed | self.stopped <= self.log().running_pids()

    def resume(self) -> None:
        """Let those that are stopped go on."""
        for pid in self.stopped:
            os.kill(pid, signal.SIGCONT)

    def wait_until(self, has_happened: Callable[[FleetLog], bool]) -> None:
        deadline = time.monotonic() + ATTEMPTS_SECONDS
        while not has_happened(self.log()):
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(POLL_SECONDS)

    def join(self, timeout_seconds: float) -> None:
        """Wait until all have left; those that were not killed must leave well and say nothing."""
        for worker in self.workers:
            _, errors = worker.communicate(timeout=timeout_seconds)
            if worker.pid in self.killed:
                assert worker.returncode == -signal.SIGKILL
            else:
                assert worker.returncode == 0, errors
