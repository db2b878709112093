"""Layers that are opened before they are needed: while Lambda initializes an environment, and when it restores one."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

    from aidem.persistence import PersistenceLayer

logger = logging.getLogger("aidem")

WARM_SECONDS: Final = 5.0
"""How long opening layers may hold up a start; Lambda allows 10 s for an init, and for what follows a restore."""


async def open_all(layers: Collection[PersistenceLayer]) -> None:
    """Open layers side by side, bounded; one that cannot be opened is logged, and its first use opens it."""
    await asyncio.gather(*map(_open_one, layers))


async def _open_one(layer: PersistenceLayer) -> None:
    try:
        async with asyncio.timeout(WARM_SECONDS):
            await layer.open()
    except Exception as error:  # noqa: BLE001 - an init that fails is repeated by every invocation
        logger.warning("%s could not be opened yet, its first use will: %r", type(layer).__name__, error)
