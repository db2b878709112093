"""Snapshots of Lambda SnapStart: nothing is connected while one is taken, and every restored copy connects anew.

The hooks are those of `snapshot_restore_py`, which Lambda's runtime has; where it is missing, nobody takes snapshots.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class BeforeSnapshot:
    """Has something closed before a snapshot is taken.

    Args:
        close: Closes it.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close
        self._is_armed = False

    def arm(self) -> None:
        """Take note that there is something to close.

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
