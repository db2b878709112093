"""What the tests of greenlets have gunicorn and Celery serve; both patch the standard library themselves.

Every effect is a line in the file `effects`, beside the records.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from celery import Celery

from aidem import IdempotencyConfig, sync
from aidem.persistence.sqlite import SQLitePersistenceLayer

DIRECTORY = Path(os.environ["AIDEM_TEST_DIRECTORY"])
LEASE_SECONDS = 5.0  # a worker that has to wait for the processor must not lose it

layer = SQLitePersistenceLayer(DIRECTORY / "records.sqlite3")
config = IdempotencyConfig(lease_seconds=LEASE_SECONDS, wait_timeout_seconds=40.0)


@sync.idempotent_function(persistence_store=layer, config=config)
def charge(order: str) -> str:
    with (DIRECTORY / "effects").open("a") as effects:
        effects.write(f"{order}\n")
    time.sleep(1.2 * LEASE_SECONDS)
    return f"charged {order}"


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Charge the order that the path names."""
    answer = charge(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer.encode()]


queue = Celery(broker="filesystem://")
queue.conf.broker_transport_options = {
    "data_folder_in": str(DIRECTORY / "queue"),
    "data_folder_out": str(DIRECTORY / "queue"),
    "control_folder": str(DIRECTORY / "control"),
}


@queue.task(name="charge")
def charge_later(order: str) -> None:
    """Charge an order; every delivery that ends well is a line in the file `answers`."""
    answer = charge(order)
    with (DIRECTORY / "answers").open("a") as answers:
        answers.write(f"{answer}\n")
