"""For the tests of those who use aidem or write a persistence layer; only the conformance suite needs pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aidem.testing._clock import FakeClock
from aidem.testing._crash import crash_everywhere
from aidem.testing._report import CrashPoint, CrashReport, CrashWay
from aidem.testing._trial import Trial, claim_of, completed_of

if TYPE_CHECKING:
    from aidem.testing._conformance import PersistenceLayerConformance

__all__ = [
    "CrashPoint",
    "CrashReport",
    "CrashWay",
    "FakeClock",
    "PersistenceLayerConformance",
    "Trial",
    "claim_of",
    "completed_of",
    "crash_everywhere",
]


if not TYPE_CHECKING:  # or type checkers would take any name for one of this module's

    def __getattr__(name: str) -> Any:
        if name != "PersistenceLayerConformance":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import pytest  # noqa: F401 # pyright: ignore[reportUnusedImport]
        except ImportError as error:
            raise ImportError("PersistenceLayerConformance needs pytest: pip install pytest") from error
        from aidem.testing._conformance import PersistenceLayerConformance

        return PersistenceLayerConformance
