"""For the tests of those who use aidem or write a persistence layer. Needs pytest, which `import aidem` does not."""

from __future__ import annotations

try:
    import pytest  # noqa: F401 # pyright: ignore[reportUnusedImport]
except ImportError as error:
    raise ImportError("aidem.testing needs pytest: pip install pytest") from error
from aidem.testing._clock import FakeClock
from aidem.testing._conformance import PersistenceLayerConformance
from aidem.testing._scan import PurgeConformance, ScanConformance
from aidem.testing._take_over import TakeOverConformance
from aidem.testing._transactions import (
    CompletionInTransactionConformance,
    CompletionItemConformance,
    OpenTransaction,
)
from aidem.testing._trial import Trial, claim_of, completed_of

__all__ = [
    "CompletionInTransactionConformance",
    "CompletionItemConformance",
    "FakeClock",
    "OpenTransaction",
    "PersistenceLayerConformance",
    "PurgeConformance",
    "ScanConformance",
    "TakeOverConformance",
    "Trial",
    "claim_of",
    "completed_of",
]
