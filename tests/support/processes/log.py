"""What the workers of a fleet wrote, and the promises that it must show."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class Body:
    """One execution of the effect."""

    key: str
    pid: int
    fence: int
    effect: str
    lease_end: float  # epoch seconds; renewals only move it on
    started_at: float
    started_wall: float
    ended_at: float = float("inf")


@dataclass
class FleetLog:
    """What all workers wrote."""

    events: list[dict[str, Any]]
    bodies: dict[str, list[Body]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, path: str) -> FleetLog:
        try:
            lines = Path(path).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        log = cls([json.loads(line) for line in lines if line.endswith(b"\n")])
        for event in log.events:
            log._take(event)
        return log

    def _take(self, event: dict[str, Any]) -> None:
        bodies = self.bodies[event["key"]]
        if event["kind"] == "start":
            bodies.append(
                Body(
                    key=event["key"],
                    pid=event["pid"],
                    fence=event["fence"],
                    effect=event["effect"],
                    lease_end=event["lease_end"] / 1000,
                    started_at=event["at"],
                    started_wall=event["wall"],
                )
            )
        elif event["kind"] == "end":
            next(body for body in bodies if body.effect == event["effect"]).ended_at = event["at"]

    def all_bodies(self) -> list[Body]:
        return [body for bodies in self.bodies.values() for body in bodies]

    def running_pids(self) -> set[int]:
        return {body.pid for body in self.all_bodies() if body.ended_at == float("inf")}

    def results(self) -> dict[str, list[dict[str, Any]]]:
        results = defaultdict(list)
        for event in self.events:
            if event["kind"] == "result":
                results[event["key"]].append(event)
        return results

    def counts(self) -> Counter[str]:
        return Counter(event.get("error", event["kind"]) for event in self.events)

    def pairs(self) -> Iterator[tuple[Body, Body]]:
        """Return every two bodies of one key, the one that started first first."""
        for bodies in self.bodies.values():
            yield from itertools.combinations(sorted(bodies, key=lambda body: body.started_at), 2)

    def taken_over(self) -> list[Body]:
        """Return the bodies before whose end another started; a body that was killed has no end."""
        by_effect = {earlier.effect: earlier for earlier, later in self.pairs() if later.started_at < earlier.ended_at}
        return list(by_effect.values())

    def contended_keys(self) -> int:
        """Return for how many keys a process asked before the body of another had ended."""
        body_of = {body.key: body for body in self.all_bodies()}
        asked = ((body_of[event["key"]], event) for event in self.events if event["kind"] == "call")
        return len({body.key for body, call in asked if body.pid != call["pid"] and call["at"] < body.ended_at})

    def longest_calls(self, *, without: set[int]) -> dict[str, float]:
        """Return, by key, the longest time that a call took, in seconds."""
        asked: dict[tuple[str, int], float] = {}
        longest: defaultdict[str, float] = defaultdict(float)
        for event in self.events:
            call = (event["key"], event["pid"])
            if event["pid"] in without:
                continue
            if event["kind"] == "call":
                asked[call] = event["at"]
            elif event["kind"] in {"result", "error"}:
                longest[event["key"]] = max(longest[event["key"]], event["at"] - asked[call])
        return longest


# --- The promises -----------------------------------------------------------------------------------------------------


def check_one_outcome_per_key(log: FleetLog) -> None:
    """Everyone who got an outcome of a key got the same one, of a body that ended."""
    for key, results in log.results().items():
        effects = {result["effect"] for result in results}
        assert len(effects) == 1, f"{key}: {results}"
        assert effects <= {body.effect for body in log.bodies[key] if body.ended_at < float("inf")}


def check_no_body_starts_under_a_live_lease(log: FleetLog) -> None:
    """Who starts while another runs has a higher fence, and that one's lease had passed."""
    for earlier, later in log.pairs():
        assert later.fence > earlier.fence, f"a late owner started beside its successor: {earlier} {later}"
        if later.started_at < earlier.ended_at:
            assert later.started_wall > earlier.lease_end, f"two bodies under a live lease: {earlier} {later}"


def check_late_owners_changed_nothing(log: FleetLog) -> None:
    """The outcome is not that of a body that was taken over while it ran."""
    late = {body.effect for body in log.taken_over()}
    outcomes = {result["effect"] for results in log.results().values() for result in results}
    assert not late & outcomes


def check_nothing_was_stuck(
    log: FleetLog, *, seconds_per_lease: float, slack_seconds: float, stopped: set[int]
) -> None:
    """No call waited longer than for the leases that had to pass on its key; those that were stopped do not count."""
    taken_over = Counter(body.key for body in log.taken_over())
    for key, seconds in log.longest_calls(without=stopped).items():
        assert seconds < taken_over[key] * seconds_per_lease + slack_seconds, key
