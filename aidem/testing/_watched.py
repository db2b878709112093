"""The persistence layers that a call asks: what they are asked is seen, takes a turn of the loop, and can be lost."""

from __future__ import annotations

import asyncio
import types
from typing import TYPE_CHECKING, Any, Final

from aidem._rules.record import DataRecord, RecordStatus
from aidem.testing._process import ProcessLoop, misuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem.persistence import PersistenceLayer
    from aidem.testing._clock import FakeClock

OPERATIONS: Final = ("acquire", "complete", "renew", "release", "get")


class WatchedLayers:
    """The layers that a call asks, all by one clock; watched from when they are first seen until `give_back`.

    A decorator has its layer for good, and a layer may have slots. So a layer is watched by way of its class: that
    becomes a subclass which differs in these operations alone, for this one object.
    """

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._classes: dict[PersistenceLayer, type] = {}
        self._leases_end = 0  # in epoch milliseconds
        self._records_end = 0  # in epoch seconds

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, layer: PersistenceLayer) -> bool:
        return layer in self._classes

    def watch(self, layer: PersistenceLayer) -> None:
        """Let operations that come from a `ProcessLoop` go to its `on_operation`; on other loops nothing changes.

        Raises:
            IdempotencyUsageError: The layer goes by another clock, or is watched already.
        """
        cls = type(layer)
        if getattr(layer, "clock", None) is not self._clock:
            raise misuse(
                f"the call asks a {cls.__qualname__} that does not go by this clock, so its leases cannot be made to "
                "pass; make the layer with `clock=clock`, and pass the same one here"
            )
        if "_aidem_watched" in vars(cls):
            raise misuse(f"this {cls.__qualname__} is being watched already: use one layer in one test at a time")
        methods = {name: self._method(cls, name) for name in OPERATIONS}
        marks: dict[str, Any] = {"__slots__": (), "__module__": cls.__module__, "_aidem_watched": True}
        layer.__class__ = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(marks | methods))
        self._classes[layer] = cls

    def give_back(self) -> None:
        """Leave all layers as they were."""
        while self._classes:
            layer, cls = self._classes.popitem()
            layer.__class__ = cls

    async def finish(self) -> None:
        """Wait until the layers have done what was asked of them, also by loops that have vanished since."""
        for layer, cls in [*self._classes.items()] * 2:  # the first answer can overtake what is to be written
            await cls.get(layer, "aidem.testing")  # type: ignore[attr-defined]

    def note(self, record: DataRecord, *, max_clock_skew_seconds: float = 0.0) -> None:
        """Remember how long what is stored now may count."""
        expiry = record.expiry_timestamp or 0
        instants = (record.in_progress_expiry_timestamp, record.lease_expiry_timestamp, (expiry + 1) * 1000)
        lease_end = next(instant for instant in instants if instant is not None)
        if record.status is RecordStatus.INPROGRESS:
            self._leases_end = max(self._leases_end, lease_end + round(max_clock_skew_seconds * 1000))
        self._records_end = max(self._records_end, expiry, self._leases_end // 1000)

    def pass_leases(self) -> None:
        """Move the clock past the end of all claims."""
        self._clock.set(max(self._clock(), self._leases_end / 1000 + 0.001))
        self._leases_end = 0

    def pass_records(self) -> None:
        """Move the clock to when all records have expired."""
        self._clock.set(max(self._clock(), self._records_end + 2.0))

    def _method(self, cls: type, name: str) -> Callable[..., Any]:
        original = getattr(cls, name)

        def operation(layer: PersistenceLayer, *args: Any, **options: Any) -> Any:
            loop = asyncio.get_running_loop()
            if not isinstance(loop, ProcessLoop):
                return original(layer, *args, **options)
            if name in {"acquire", "complete", "renew"}:
                record = args[0] if args else options["record"]
                self.note(record, max_clock_skew_seconds=options.get("max_clock_skew_seconds", 0.0))
            return loop.on_operation(name, lambda: original(layer, *args, **options))

        return operation
