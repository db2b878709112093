"""What all calls on one persistence layer share: the local cache, and per event loop the flights and the renewals."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from aidem._engine.local_cache import LocalCache
from aidem._engine.renewal import Renewals

if TYPE_CHECKING:
    import asyncio

    from aidem._engine.single_flight import SingleFlight
    from aidem.persistence import PersistenceLayer


class PerLoop:
    """What the calls of one event loop share.

    Attributes:
        flights: The calls that are at the store, by key.
        renewals: The claims that are held.
        time: The clock of the loop, in seconds.
    """

    __slots__ = ("flights", "renewals", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.flights: dict[str, SingleFlight] = {}
        self.renewals = Renewals()
        self.time = loop.time


class PerLayer:
    """What the calls of one layer share.

    Attributes:
        cache: Completed records.
    """

    __slots__ = ("_loops", "cache")

    def __init__(self) -> None:
        self.cache = LocalCache()
        self._loops: dict[asyncio.AbstractEventLoop, PerLoop] = {}

    def of(self, loop: asyncio.AbstractEventLoop) -> PerLoop:
        """Return what the calls of a loop share; what belonged to loops that are closed by now is dropped."""
        state = self._loops.get(loop)
        if state is None:
            # Not a weak dictionary: timers hold their loop, so the values would keep the keys alive.
            for other in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(other, None)  # another thread may do the same
            state = self._loops.setdefault(loop, PerLoop(loop))
        return state


_by_layer: WeakKeyDictionary[PersistenceLayer, PerLayer] = WeakKeyDictionary()


def shared_by(layer: PersistenceLayer) -> PerLayer:
    """Return what the calls of a layer share."""
    return _by_layer.setdefault(layer, PerLayer())
