"""A worker is killed after the bank has taken the money and before it could say so. The retries charge nobody again."""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from aidem import (
    AbandonedExecution,
    DidNotHappen,
    Happened,
    IdempotencyConfig,
    Verdict,
    current_execution,
    idempotent_function,
)
from aidem.persistence.sqlite import SQLitePersistenceLayer

started_at = time.monotonic()
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
bank = folder / "bank.jsonl"  # stands for a bank: every line in it is a charge
layer = SQLitePersistenceLayer(folder / "records.sqlite3")


def charges() -> list[dict[str, str | int]]:
    """Return what the bank has on its books."""
    return [json.loads(line) for line in bank.read_text().splitlines()] if bank.exists() else []


async def was_charged(abandoned: AbandonedExecution) -> Verdict:
    """Find out what became of a charge whose worker is gone: its key tells the bank which one is meant."""
    say("retry ", "its worker is gone, and nobody knows whether it charged; the bank is asked")
    found = [charge for charge in charges() if charge["key"] == abandoned.key_for("bank")]
    return Happened({"charged": found[0]["cents"]}) if found else DidNotHappen()


config = IdempotencyConfig(on_abandoned=was_charged, lease_seconds=2, wait_timeout_seconds=10)


@idempotent_function(persistence_store=layer, config=config)
async def charge(order_id: str, cents: int) -> dict[str, int]:
    """Charge an order."""
    with bank.open("a") as books:
        books.write(json.dumps({"key": current_execution().key_for("bank"), "order": order_id, "cents": cents}) + "\n")
    await asyncio.sleep(5)  # the answer of the bank is on its way
    return {"charged": cents}


def say(who: str, what: object) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - started_at:4.1f} s  {who}: {what}", flush=True)


async def retry() -> None:
    """Call again, as a client or a queue does that got no answer."""
    say("retry ", await charge("order-1", 4200))


async def main() -> None:
    """Kill a worker in the middle of a charge, then retry it, from several callers at once."""
    worker = await asyncio.create_subprocess_exec(sys.executable, __file__, str(folder))
    while not charges():  # noqa: ASYNC110 another process writes them
        await asyncio.sleep(0.01)
    say("worker", "the bank has taken the money")
    worker.kill()
    await worker.wait()
    say("worker", "killed, before it recorded that")
    async with layer:
        await asyncio.gather(retry(), retry(), retry())
    say("bank  ", f"{len(charges())} charge: {charges()[0]['cents']} cents for {charges()[0]['order']}")


if __name__ == "__main__":
    asyncio.run(charge("order-1", 4200) if len(sys.argv) > 1 else main())
