"""Runs of many seeds, with what they need of the interpreter."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import sys
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.simulation.internals import clock_since_boot
from tests.simulation.rules import Rule
from tests.simulation.store import Store
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.simulation.rules import Violation

MOST_BAD_SEEDS = 20


class Report:
    """What many runs came to.

    Attributes:
        violations: By seed.
        happened: What happened in them how often.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.steps = 0
        self.virtual_seconds = 0.0
        self.violations: dict[int, list[Violation]] = {}
        self.happened: Counter[str] = Counter()

    def add(self, world: World) -> None:
        self.runs += 1
        self.steps += world.steps
        self.virtual_seconds += world.now
        self.happened += world.happened
        self.happened["call"] += len(world.calls)
        if world.violations:
            self.violations[world.seed] = world.violations

    def __str__(self) -> str:
        lines = [f"seed {seed}: {violation}" for seed, found in self.violations.items() for violation in found[:1]]
        lines += [f"{self.runs} runs, {self.steps} steps, {self.virtual_seconds:.0f} virtual seconds"]
        return "\n".join(lines)


def simulate(
    seeds: Iterable[int], *, make_store: Callable[[World], Store] = Store, most_bad: int = MOST_BAD_SEEDS
) -> Report:
    """Run the seeds one after another, until so many of them have shown a violation."""
    report = Report()
    with _undisturbed() as unraisable:
        for seed in seeds:
            world = run(seed, make_store=make_store, unraisable=unraisable)
            report.add(world)
            is_dirty = bool(world.violations) or any(process.is_dead for process in world.processes)
            del world
            if is_dirty or report.runs % 50 == 0:
                gc.collect()  # what crashed is collected here
                gc.collect()
            if len(report.violations) >= most_bad:
                break
    return report


def history_of(seed: int) -> list[str]:
    """Run one seed, and return what happened in order."""
    with _undisturbed() as unraisable:
        world = run(seed, is_verbose=True, unraisable=unraisable)
    return [*world.history, *map(str, world.violations)]


def run(
    seed: int,
    *,
    is_verbose: bool = False,
    make_store: Callable[[World], Store] = Store,
    unraisable: list[str],
) -> World:
    unraisable.clear()
    random.seed(seed)  # the jitter of aidem
    world = World(seed, is_verbose=is_verbose, make_store=make_store)
    with clock_since_boot(lambda: world.now):
        world.run()
    if unraisable:
        world.violate(Rule.H7, f"unraisable: {unraisable[:3]}")
    return world


@contextlib.contextmanager
def _undisturbed() -> Iterator[list[str]]:
    """Keep the runs and everything else apart; yield what could not be raised."""
    unraisable: list[str] = []

    def note(found: Any) -> None:
        unraisable.append(f"{found.err_msg}: {found.exc_value!r} in {found.object!r}")

    hook, state = sys.unraisablehook, random.getstate()
    levels = {name: logging.getLogger(name).level for name in ("aidem", "asyncio")}
    gc.collect()
    gc.freeze()  # looking for what is left takes time with the number of objects
    sys.unraisablehook = note
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", category=RuntimeWarning)  # a coroutine that was never awaited
            yield unraisable
    finally:
        sys.unraisablehook = hook
        random.setstate(state)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
