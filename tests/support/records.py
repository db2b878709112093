"""Records of a layer in memory, changed behind its back as another process or a hand would change those of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem.persistence.memory import MemoryPersistenceLayer

if TYPE_CHECKING:
    from aidem._rules.record import DataRecord


def put(layer: MemoryPersistenceLayer, record: DataRecord) -> None:
    """Store a record as it is, in the place of any other; what a subclass does before its operations is left out."""
    _ = MemoryPersistenceLayer.forget(layer, record.idempotency_key)
    assert MemoryPersistenceLayer.complete(layer, record, now=layer.clock()).answer


def clear(layer: MemoryPersistenceLayer) -> None:
    """Drop all records."""
    for key in layer.records():
        _ = MemoryPersistenceLayer.forget(layer, key)
