"""For the tests of those who use aidem or write a persistence layer; only the conformance suites need pytest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from aidem.testing._clock import FakeClock
from aidem.testing._crash import crash_everywhere
from aidem.testing._report import CrashPoint, CrashReport, CrashWay
from aidem.testing._trial import Trial, claim_of, completed_of

__all__ = [
    "CompletionInTransactionConformance",
    "CompletionItemConformance",
    "CrashPoint",
    "CrashReport",
    "CrashWay",
    "FakeClock",
    "OpenTransaction",
    "PersistenceLayerConformance",
    "PurgeConformance",
    "ScanConformance",
    "TakeOverConformance",
    "Trial",
    "claim_of",
    "completed_of",
    "crash_everywhere",
]

_SUITES: Final = {
    "CompletionInTransactionConformance": "aidem.testing._transactions",
    "CompletionItemConformance": "aidem.testing._transactions",
    "OpenTransaction": "aidem.testing._transactions",
    "PersistenceLayerConformance": "aidem.testing._conformance",
    "PurgeConformance": "aidem.testing._scan",
    "ScanConformance": "aidem.testing._scan",
    "TakeOverConformance": "aidem.testing._take_over",
}

if TYPE_CHECKING:
    from aidem.testing._conformance import PersistenceLayerConformance
    from aidem.testing._scan import PurgeConformance, ScanConformance
    from aidem.testing._take_over import TakeOverConformance
    from aidem.testing._transactions import (
        CompletionInTransactionConformance,
        CompletionItemConformance,
        OpenTransaction,
    )
else:  # or type checkers would take any name for one of this module's

    def __getattr__(name: str) -> Any:
        if name not in _SUITES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import pytest  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{name} needs pytest: pip install pytest") from error
        return getattr(importlib.import_module(_SUITES[name]), name)
