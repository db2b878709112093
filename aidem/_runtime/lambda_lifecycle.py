"""The life of a Lambda environment: layers are opened while it initializes; a snapshot finds nothing connected.

The hooks are those of `snapshot_restore_py`, which Lambda's runtime has; where it is missing, there are no snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

logger = logging.getLogger("aidem")

WARM_SECONDS: Final = 5.0
"""How long opening layers may hold up a start; Lambda allows 10 s for an init, and for what follows a restore."""


class Openable(Protocol):
    """What can be opened before it is needed, such as a persistence layer."""

    async def open(self) -> None:
        """Connect."""
        ...


async def open_all(layers: Collection[Openable]) -> None:
    """Open layers side by side, bounded; one that cannot be opened is logged, and its first use opens it."""
    await asyncio.gather(*map(_open_one, layers))


async def _open_one(layer: Openable) -> None:
    try:
        async with asyncio.timeout(WARM_SECONDS):
            await layer.open()
    except Exception as error:  # noqa: BLE001 - an init that fails is repeated by every invocation
        logger.warning("%s could not be opened yet, its first use will: %r", type(layer).__name__, error)


class BeforeSnapshot:
    """Has something closed before a snapshot is taken.

    Args:
        close: Closes it.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close
        self._is_armed = False

    def arm(self) -> None:
        """Make sure that it is closed before the next snapshot.

        Hooks run in the reverse order of their registration, so this one comes after those of the user which were
        registered later; one that comes after this one and opens something arms it again.
        """
        if self._is_armed:
            return
        self._is_armed = True
        with contextlib.suppress(ImportError):
            from snapshot_restore_py import register_before_snapshot

            register_before_snapshot(self._run)

    def _run(self) -> None:
        self._is_armed = False
        self._close()


def after_restore(action: Callable[[], object]) -> None:
    """Have something done in every environment that is restored from a snapshot."""
    with contextlib.suppress(ImportError):
        from snapshot_restore_py import register_after_restore

        register_after_restore(action)
