"""A shop whose charges can be counted, and a client that speaks to an app without a server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from decimal import Decimal

import httpx
from fastapi import FastAPI, responses
from pydantic import BaseModel, Field

ORJSON, UJSON = (vars(responses)[f"{name}Response"] for name in ("ORJSON", "UJSON"))
"""Response classes that FastAPI has deprecated, with signatures that say nothing."""

ORDER = {"id": "o-1", "amount": "12.50"}


class Order(BaseModel):
    id: str
    amount: Decimal = Field(gt=0)
    note: str | None = None


class PublicReceipt(BaseModel):
    order: Order
    number: int


class Receipt(PublicReceipt):
    card_token: str


class Bank:
    """Counts its charges."""

    def __init__(self) -> None:
        self.charges = list[str]()
        self.users = list[str]()

    def charge(self, order: Order) -> Receipt:
        self.charges.append(order.id)
        return Receipt(order=order, number=len(self.charges), card_token="secret")


@contextlib.asynccontextmanager
async def served(app: FastAPI, *, raises: bool = True) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        yield client


def same(first: httpx.Response, second: httpx.Response) -> bool:
    return (first.status_code, first.headers.multi_items(), first.content) == (
        second.status_code,
        second.headers.multi_items(),
        second.content,
    )
