"""The rules that the judge of the simulation knows: every violation names one of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Rule(StrEnum):
    """What must hold in every run; P1, P2 and P4 are the promises of the product, by their names there."""

    P1 = "within the window everyone who gets an outcome gets the same one, the recorded one; the loser of a lease too"
    P2 = (
        "a body begins, and ensure_owned() passes, only while the store holds the claim for it; "
        "a live owner that renews and reaches the store is never taken over from"
    )
    P4 = (
        'with on_abandoned="raise" no body begins after one that did not end with an ordinary exception, and with a '
        "check only after one that the check has found to have no effect; "
        "nothing is in doubt while its lease holds"
    )
    H0 = "the simulation itself does not fail"
    H1 = "a call runs its body once"
    H2 = (
        "nothing is renewed after its call has ended or in the context of another call, completed before its body has, "
        "or released while its body runs"
    )
    H3 = "the caller gets the very exception of the body; every error is true, and says what has become of the body"
    H4 = "fences grow"
    H5 = "without faults nothing fails and no lease is lost"
    H6 = "a cancelled caller ends within 5 seconds; no cancellation is swallowed, made up or counted twice"
    H7 = "nothing is left behind: flights, renewals, tasks, writes, objects, exceptions that nobody has looked at"
    H8 = "waiters wait as long as they may, no longer, and not for what is there already"
    H9 = "without faults a call leaves its key as it should: free, completed, or in doubt at once"
    H10 = "MemoryPersistenceLayer answers as the store of the simulation does"
    H11 = "every call ends"
    H12 = "once the faults are over, every key answers within a lease"
    H13 = "a completion is tried again while the lease is held, and no longer"
    H14 = (
        "a lease counts from before the request: it is renewed a third after that, and its loss is told when it passes"
    )
    H15 = "a claim that hooks are told of has one ending, unless its process crashes; what has none was not told of"


@dataclass(frozen=True)
class Violation:
    """A rule that was broken, at an instant of virtual time."""

    rule: Rule
    text: str
    at: float

    def __str__(self) -> str:
        return f"{self.rule.name}: {self.text} (at {self.at:.4f})"
