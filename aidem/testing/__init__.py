"""For the tests of those who use aidem or write a persistence layer. Needs pytest, which `import aidem` does not."""

from __future__ import annotations

from aidem.testing._clock import FakeClock
from aidem.testing._conformance import PersistenceLayerConformance
from aidem.testing._trial import Trial, claim_of, completed_of

__all__ = ["FakeClock", "PersistenceLayerConformance", "Trial", "claim_of", "completed_of"]
