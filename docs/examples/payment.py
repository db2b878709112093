"""A payment handler gets an event twice in each of two processes, and charges once."""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from aidem import IdempotencyConfig, current_execution, idempotent
from aidem.persistence.sqlite import SQLitePersistenceLayer

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
config = IdempotencyConfig(event_key_jmespath="order.id", wait_timeout_seconds=5)
layer = SQLitePersistenceLayer(folder / "aidem.sqlite3")
# stands for the payment service: every line in it is a charge
bank = folder / "bank.log"


@idempotent(persistence_store=layer, config=config)
async def handler(event: dict[str, Any], _context: object) -> dict[str, Any]:
    """Charge an order."""
    await asyncio.sleep(0.1)  # the payment service takes its time
    with bank.open("a") as file:
        file.write(f"charged {event['order']['amount']} for {event['order']['id']}\n")
    return {
        "charged": event["order"]["amount"],
        "bank_key": current_execution().key_for("bank")[:8],
    }


async def main(name: str) -> None:
    """Deliver the same event twice at once, as a queue may do."""
    event = {"order": {"id": "order-1", "amount": 42}}
    async with layer:
        for answer in await asyncio.gather(handler(event, None), handler(event, None)):
            print(f"{name}: {answer}", flush=True)


async def both_processes() -> None:
    """Run this file in another process on the same SQLite file, at the same time."""
    other = await asyncio.create_subprocess_exec(sys.executable, __file__, str(folder))
    await main("this process ")
    await other.wait()
    print(f"the bank: {bank.read_text()}", end="")


if __name__ == "__main__":
    asyncio.run(main("other process") if len(sys.argv) > 1 else both_processes())
