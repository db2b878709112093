"""A row of the table: two figures, their ratio, and the target that it meets or misses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

A_THOUSAND = "a thousand records"
"""The other side of rows about growth: the same layer with few records."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a row is to reach."""

    relation: Literal["≤", "≥", "="]
    bound: float

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"

    def is_met(self, value: float) -> bool:
        """Whether a ratio, or a count without one, is as it should be."""
        if self.relation == "=":
            return value == self.bound
        return value <= self.bound if self.relation == "≤" else value >= self.bound


def at_most(bound: float) -> Target:
    return Target("≤", bound)


def at_least(bound: float) -> Target:
    return Target("≥", bound)


def exactly(bound: float) -> Target:
    return Target("=", bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        what: What is measured.
        against: With what it is compared; empty: with the target alone.
        ours: The figure of aidem, the median of the rounds.
        theirs: That of the other side; None: there is none.
        unit: Of both.
        ratio: Ours / theirs, the median of the ratios of the rounds; None: the target is for `ours`.
        target: What to reach; None: the row informs.
        clock: Which clock the ratio is by: `cpu`, `wall`, or empty for what is not a time.
        other_ratio: The ratio by the other clock.
    """

    what: str
    against: str = ""
    ours: float
    theirs: float | None = None
    unit: str
    ratio: float | None = None
    target: Target | None = None
    clock: Literal["cpu", "wall", ""] = ""
    other_ratio: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None: there is none."""
        return None if self.target is None else self.target.is_met(self.ours if self.ratio is None else self.ratio)

    @property
    def is_growth(self) -> bool:
        """Whether aidem is compared with itself, with fewer records."""
        return self.against == A_THOUSAND

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        """Return the row that `as_json` gave."""
        fields = {name: value for name, value in values.items() if name != "is_met"}
        if fields["target"] is not None:
            relation, bound = fields["target"].split()
            fields["target"] = Target(relation, float(bound))
        return cls(**fields)

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        target = None if self.target is None else str(self.target)
        return asdict(self) | {"target": target, "is_met": self.is_met}
