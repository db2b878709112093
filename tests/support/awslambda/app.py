"""Lambda functions for tests, as Lambda's runtime imports them; the environment says which layer and which log.

Every effect is one `write` to a file opened with O_APPEND, so what a killed process wrote is there.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from snapshot_restore_py import register_before_snapshot

from aidem import IdempotencyConfig, current_execution, idempotent, sync
from aidem.awslambda import lambda_handler
from aidem.persistence import open_persistence_layer

HANGING_SECONDS = 3600.0
POLL_SECONDS = 0.01
LOG = Path(os.environ["AIDEM_TEST_LOG"])

layer = open_persistence_layer(os.environ["AIDEM_TEST_LAYER"])
config = IdempotencyConfig(
    event_key_jmespath="order", wait_timeout_seconds=float(os.environ.get("AIDEM_TEST_WAIT_SECONDS", "0"))
)


@lambda_handler(warm=[layer])
@idempotent(persistence_store=layer, config=config, key_prefix="charge")
async def async_handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    effect = charge(event)
    while not everybody_is_there(event):  # noqa: ASYNC110 - the others are processes
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.sleep(event.get("hangs_seconds", 0.0))
    return effect


@sync.idempotent(persistence_store=layer, config=config, key_prefix="charge")
def sync_handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    effect = charge(event)
    while not everybody_is_there(event):
        time.sleep(POLL_SECONDS)
    time.sleep(event.get("hangs_seconds", 0.0))
    return effect


def charge(event: dict[str, Any]) -> dict[str, Any]:
    """Have the effect, or fail before it."""
    record = current_execution().record
    assert record is not None
    if event.get("fails"):
        raise ValueError(event)
    effect = {
        "order": event["order"],
        "pid": os.getpid(),
        "owner": record.owner,
        "at": time.time(),
        "lease_end": (record.in_progress_expiry_timestamp or 0) / 1000,
    }
    with LOG.open("ab", buffering=0) as log:
        log.write(json.dumps(effect).encode() + b"\n")
    return effect


def everybody_is_there(event: dict[str, Any]) -> bool:
    """Whether as many effects have happened as the event says."""
    return LOG.read_bytes().count(b"\n") >= event.get("together", 0)


def prime() -> None:
    """Make a call before the snapshot is taken, so that all that it needs is in there."""
    handler = async_handler if os.environ["AIDEM_TEST_PRIMES"] == "async_handler" else sync_handler
    handler({"order": str(LOG)}, None)


if "AIDEM_TEST_PRIMES" in os.environ:
    register_before_snapshot(prime)
