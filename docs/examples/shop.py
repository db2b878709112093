"""A shop on FastAPI and SQLAlchemy: a payment and the result of its request are committed together.

    python shop.py                     # creates the tables
    uvicorn shop:app --workers 4

Everything is in one database: PostgreSQL, if DATABASE_URL names one (postgresql://user:password@host/shop), else the
SQLite file shop.sqlite3. The URL is read by asyncpg, so it may have `?sslmode=require` and the like.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aidem import IdempotencyConfig, idempotency
from aidem.exceptions import IdempotencyAlreadyInProgressError, IdempotencyValidationError
from aidem.persistence.postgres import PostgresPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer

url = os.environ.get("DATABASE_URL", "")
layer: PostgresPersistenceLayer | SQLitePersistenceLayer
if url:
    import asyncpg

    layer = PostgresPersistenceLayer(url)  # on connections of its own, beside those of the engine
    # asyncpg reads the URL, as it does for the layer: `postgres://` and `sslmode` are not SQLAlchemy's.
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url))
else:
    layer = SQLitePersistenceLayer("shop.sqlite3", in_application_database=True)
    engine = create_async_engine("sqlite+aiosqlite:///shop.sqlite3")
sessions = async_sessionmaker(engine)
config = IdempotencyConfig(expires_after_seconds=24 * 3600, lease_seconds=5, wait_timeout_seconds=5)


class Base(DeclarativeBase):
    pass


class PaymentRow(Base):
    __tablename__ = "payments"
    number: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[str]
    cents: Mapped[int]


class Payment(BaseModel):
    order_id: str
    cents: int = Field(gt=0)


class Receipt(Payment):
    number: int


async def create_tables() -> None:
    """Do once what a migration does in a real shop."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    if isinstance(layer, PostgresPersistenceLayer):
        await layer.create_table()
    else:
        await layer.open()
    await layer.aclose()
    await engine.dispose()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with layer:
        yield
    await engine.dispose()


async def open_session() -> AsyncIterator[AsyncSession]:
    """Give a route its session; the route commits it, because FastAPI comes back here after the response."""
    async with sessions() as session:
        yield session


app = FastAPI(title="Shop", lifespan=lifespan)


@app.post("/payments", status_code=201)
async def create_payment(
    payment: Payment, session: Annotated[AsyncSession, Depends(open_session)], idempotency_key: Annotated[str, Header()]
) -> Receipt:
    """Charge for an order, once for each key."""
    async with idempotency(
        idempotency_key, payload=payment, key_prefix="payments", persistence_store=layer, config=config
    ) as execution:
        if not execution.replayed:
            row = PaymentRow(order_id=payment.order_id, cents=payment.cents)
            session.add(row)
            await session.flush()  # gives the row its number
            receipt = Receipt(number=row.number, order_id=row.order_id, cents=row.cents)
            await execution.complete(receipt.model_dump(), transaction=session)
            await session.commit()
    return Receipt(**execution.result)


@app.exception_handler(IdempotencyAlreadyInProgressError)
async def payment_in_progress(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "This payment is being made; ask again."}, 409, {"Retry-After": "1"})


@app.exception_handler(IdempotencyValidationError)
async def another_payment(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "This key was used for another payment."}, 422)


if __name__ == "__main__":
    asyncio.run(create_tables())
