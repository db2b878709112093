"""A checkout to try in a browser: click "Pay" as often as you like, kill the worker in the middle, and see one charge.

    python checkout.py                 # then open http://127.0.0.1:8000

Two workers share the records in an SQLite file. The bank is a file, too, and takes some seconds to answer.
"""

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field

from aidem import AbandonedExecution, DidNotHappen, Happened, IdempotencyConfig, Verdict, current_execution, operations
from aidem.fastapi import IdempotentRoute
from aidem.operations import RecordState
from aidem.persistence.sqlite import SQLitePersistenceLayer

BANK_SECONDS = 5.0
folder = Path(os.environ.setdefault("CHECKOUT_FOLDER", tempfile.mkdtemp()))  # the workers inherit it
bank = folder / "bank.jsonl"  # every line is a charge
layer = SQLitePersistenceLayer(folder / "records.sqlite3")


class Payment(BaseModel):
    order_id: str = Field(pattern="^[A-Z0-9-]{1,20}$")
    cents: int = Field(gt=0)


class Receipt(Payment):
    reference: str


def charges() -> list[Receipt]:
    """Return what the bank has on its books."""
    return [Receipt(**json.loads(line)) for line in bank.read_text().splitlines()] if bank.exists() else []


async def was_charged(abandoned: AbandonedExecution) -> Verdict:
    """Find out what became of a payment whose worker is gone."""
    reference = abandoned.key_for("bank")
    found = [charge for charge in charges() if charge.reference == reference]
    return Happened(JSONResponse(found[0].model_dump(), 201)) if found else DidNotHappen()


payments = APIRouter(
    route_class=IdempotentRoute.configure(
        key_prefix="checkout",
        scope=None,  # one customer; a real shop says whose key it is
        persistence_store=layer,
        config=IdempotencyConfig(
            on_abandoned=was_charged,
            lease_seconds=3,
            wait_timeout_seconds=10,
            note=lambda _: f"worker {os.getpid()}",
        ),
        required=True,
    )
)


@payments.post("/payments", status_code=201)
async def pay(payment: Payment) -> Receipt:
    """Charge for an order."""
    receipt = Receipt(**payment.model_dump(), reference=current_execution().key_for("bank"))
    with bank.open("a") as books:
        books.write(receipt.model_dump_json() + "\n")
    await asyncio.sleep(BANK_SECONDS)  # the money is taken, and the bank's answer is on its way
    return receipt


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with layer:
        yield


app = FastAPI(title="Checkout", lifespan=lifespan)
app.include_router(payments)


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Send the page with the buttons."""
    return FileResponse(Path(__file__).with_suffix(".html"))


@app.get("/state")
async def state() -> dict[str, Any]:
    """Return the charges, and the records as `aidem list` shows them."""
    records = [
        {"key": record.idempotency_key, "state": state, "fence": record.fence, "note": record.note}
        async for record, state in operations.find(layer)
    ]
    return {"worker": os.getpid(), "charges": [charge.model_dump() for charge in charges()], "records": records}


@app.post("/kill")
async def kill() -> dict[str, int]:
    """Kill the worker that is making a payment, as the kernel does when memory is short."""
    async for record, _ in operations.find(layer, state=RecordState.RUNNING):
        worker = int((record.note or "").removeprefix("worker "))
        os.kill(worker, signal.SIGKILL)
        return {"killed": worker}
    raise HTTPException(409, "No payment is being made; click Pay first.")


if __name__ == "__main__":
    uvicorn.run("checkout:app", workers=2, port=int(os.environ.get("PORT", "8000")))
