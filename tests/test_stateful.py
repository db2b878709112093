"""Anything may happen in any order, and the promises are kept: several callers, crashes, lost replies, moving time."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import FakeClock
from tests.stateful_world import KEPT_SECONDS, LEASE_SECONDS, WAIT_SECONDS, Fault, World, config_of

PROCESSES = 3
CONFIGS = st.builds(config_of, wait=st.booleans(), at_most_once=st.booleans(), renew=st.booleans(), validate=st.booleans())
SPANS = st.sampled_from(
    [
        0.001,
        1.0,
        LEASE_SECONDS / 3 + 0.001,
        LEASE_SECONDS - 0.001,
        LEASE_SECONDS,
        LEASE_SECONDS + 0.001,
        WAIT_SECONDS,
        KEPT_SECONDS - 1.0,
        KEPT_SECONDS,
        KEPT_SECONDS + 1.0,
    ]
)
VERDICTS = st.sampled_from(["returned", "returned", "refused", "declined", "confirmed"])
OPERATIONS = st.sampled_from(["acquire", "complete", "renew", "release"])
ANY = st.integers(min_value=0, max_value=99)


class Machine(RuleBasedStateMachine):
    """Drives a world at random; every step of it is judged."""

    happened: ClassVar[Counter[str]]

    def make_store(self, clock: FakeClock) -> Any:
        return MemoryPersistenceLayer(clock=clock)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.make_store, PROCESSES, self.happened)

    @rule(process=st.integers(0, PROCESSES - 1), key=st.sampled_from("aab"), config=CONFIGS, amount=st.sampled_from([1, 1, 2]), block=st.booleans())
    def call(self, process: int, key: str, config: Any, amount: int, block: bool) -> None:
        self.world.call(process, key, config, amount=amount, block=block)
        self.world.settle()

    @rule(key=st.sampled_from("aab"), config=CONFIGS)
    def call_everywhere_at_once(self, key: str, config: Any) -> None:
        for process in range(PROCESSES):
            self.world.call(process, key, config)
        self.world.settle()

    @precondition(lambda self: self.world.bodies)
    @rule(which=ANY, verdict=VERDICTS)
    def end_a_body(self, which: int, verdict: str) -> None:
        self.world.end_body(_pick(self.world.bodies, which), verdict)
        self.world.settle()

    @precondition(lambda self: self.world.running)
    @rule(which=ANY)
    def cancel_a_call(self, which: int) -> None:
        self.world.cancel(_pick(self.world.running, which))
        self.world.settle()

    @rule(process=st.integers(0, PROCESSES - 1))
    def kill_a_process(self, process: int) -> None:
        self.world.kill(process)
        self.world.settle()

    @rule(process=st.integers(0, PROCESSES - 1), operation=OPERATIONS, fault=st.sampled_from(Fault))
    def plan_a_fault(self, process: int, operation: str, fault: Fault) -> None:
        self.world.processes[process].faults[operation] = fault

    @precondition(lambda self: self.world.held)
    @rule(which=ANY)
    def deliver_what_is_held(self, which: int) -> None:
        self.world.deliver(_pick(self.world.held, which))
        self.world.settle()

    @precondition(lambda self: self.world.held)
    @rule(which=ANY)
    def lose_what_is_held(self, which: int) -> None:
        self.world.drop(_pick(self.world.held, which))
        self.world.settle()

    @rule(seconds=SPANS)
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(seconds=SPANS)
    def jump(self, seconds: float) -> None:
        self.world.jump(seconds)

    def teardown(self) -> None:
        try:
            if not self.world.judge.broken:
                self.world.finish()
        finally:
            self.world.close()


def _pick(things: list[Any], which: int) -> Any:
    return things[which % len(things)]


def run(machine: type[Machine], **options: Any) -> Counter[str]:
    machine.happened = Counter()
    with_defaults = {"stateful_step_count": 40, "database": None, "deadline": None} | options
    run_state_machine_as_test(machine, settings=settings(suppress_health_check=list(HealthCheck), **with_defaults))
    return machine.happened


def test_memory() -> None:
    print(run(Machine, max_examples=100))
