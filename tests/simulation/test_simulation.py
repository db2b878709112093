"""The library in a simulated world, seed after seed: no rule is broken, and every broken rule would be noticed."""

from __future__ import annotations

import itertools

import pytest

from aidem.hooks import EventKind
from tests.simulation.call import End
from tests.simulation.cancellation import Way
from tests.simulation.controls import CONTROLS, Control
from tests.simulation.network import Fault
from tests.simulation.runs import history_of, simulate

pytestmark = pytest.mark.timeout(300)  # many runs of a second, beside other tests, with every line counted

SEEDS = 2400
SEEDS_PER_TEST = 400
MOST_SEEDS_OF_A_CONTROL = 1000

ASKED = ("acquire", "renew", "complete", "release", "take_over")

HAPPENS = {
    *(f"{fault}: acquire" for fault in Fault),
    *(f"body: {end}" for end in End),
    *(f"cancelled before the body: {way}" for way in Way if way not in {Way.NONE, Way.CLOSE}),
    *(f"event: {kind}" for kind in EventKind),
    *(f"cancelled while asking to {operation}" for operation in ASKED),
    *(f"paused while asking to {operation}" for operation in ASKED),
    *(f"check: {said}" for said in ("happened", "did not happen", "still unknown", "None", "fails", "is cancelled")),
    "blocked loop",
    "cancelled, ended promptly",
    "closed at the store",
    "closed by aclose",
    "closed in the body",
    "crash",
    "ensured that it is owned",
    "outcome of another call",
    "overlap",
    "partition",
    "pause",
    "resolved by hand",
    "store restart",
    "suspension",
    "take-over",
    "take-over to check",
    "wait_for_change",
}
"""What has to happen among so many seeds, or they prove nothing."""


def test_no_rule_is_broken_whatever_happens() -> None:
    check_seeds(0)


@pytest.mark.parametrize("start", range(SEEDS_PER_TEST, SEEDS, SEEDS_PER_TEST))
def test_no_rule_is_broken_in_many_more_runs(start: int) -> None:
    check_seeds(start)


def check_seeds(start: int) -> None:
    report = simulate(range(start, start + SEEDS_PER_TEST))
    assert not report.violations, str(report)
    assert HAPPENS - {what for what, count in report.happened.items() if count} == set()


@pytest.mark.parametrize("seed", range(10))
def test_a_run_is_a_function_of_its_seed(seed: int) -> None:
    assert history_of(seed) == history_of(seed)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_broken_promise_is_noticed(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    if control.break_engine is not None:
        control.break_engine(monkeypatch)
    seeds = itertools.islice(control.seeds(), MOST_SEEDS_OF_A_CONTROL)
    report = simulate(seeds, make_store=control.store, most_bad=1)
    [violations] = report.violations.values()
    assert violations[0].rule in control.rules, str(report)
