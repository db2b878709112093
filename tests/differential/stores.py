"""Where the two sides keep their records: the same kind of store for both, a place of its own for each."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import boto3
import redis
from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer as TheirDynamoDB
from aws_lambda_powertools.utilities.idempotency.persistence.cache import CachePersistenceLayer as TheirRedis
from botocore.config import Config
from redis import asyncio as async_redis

from aidem.persistence.redis import RedisPersistenceLayer
from tests.differential.scenario import Ago
from tests.migration import own_layer_after, own_layer_before
from tests.support.aws_servers import Database
from tests.support.servers import RedisServer

MINUTE = 60
OURS_ALONE = {"owner", "fence"}
"""Attributes that aidem adds to every record; those of some records only are compared."""

NAMES = {
    "expiry_attr": "ttl",
    "in_progress_expiry_attr": "in-progress",
    "status_attr": "state",
    "data_attr": "values",
    "validation_key_attr": "hash",
}
KEY_NAMES = {"key_attr": "partition", "sort_key_attr": "key", "static_pk_value": "payments"}
ROLES = {"ttl": "expiration", "in-progress": "in_progress_expiration", "state": "status", "values": "data"} | {
    "hash": "validation",
    "partition": "id",
}


class Store(Protocol):
    """A place for the records of one side."""

    def prepare(self, kind: str) -> None: ...

    def layer(self, side: str) -> Any: ...

    def raw_records(self) -> dict[str, dict[str, Any]]: ...

    def change(self, changes: Mapping[str, Any]) -> None: ...

    def replace(self, text: str) -> None: ...

    def forget(self) -> None: ...

    def fail(self) -> None: ...


def records_of(store: Store) -> tuple[dict[str, str], ...]:
    """Return what is stored, as text; instants as minutes from now, so that clocks and slowness do not matter."""
    return tuple(
        {"key": key} | {name: _text(name, value) for name, value in sorted(record.items()) if name not in OURS_ALONE}
        for key, record in sorted(store.raw_records().items())
    )


def _text(name: str, value: Any) -> str:
    if name.endswith("expiration") and isinstance(value, int):
        seconds = value / 1000 if name != "expiration" else value
        return f"in {round((seconds - time.time()) / MINUTE)} min"
    if name == "time to live":
        return f"{round(value / MINUTE)} min"
    return repr(str(value) if isinstance(value, str) else value)


def _changed(record: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = record | {name: _instant(name, value) for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


def _instant(name: str, value: Any) -> Any:
    if not isinstance(value, Ago):
        return value
    return int((time.time() - value.seconds) * (1 if name == "expiration" else 1000))


# --- DynamoDB ---------------------------------------------------------------------------------------------------------


@dataclass
class DynamoDB:
    database: Database
    kind: str = "plain"
    table: str = ""
    names: dict[str, str] = field(default_factory=dict)

    def prepare(self, kind: str) -> None:
        self.kind = kind
        self.names = {"composite": NAMES | KEY_NAMES, "names": NAMES}.get(kind, {})
        keys = ("partition", "key") if kind == "composite" else ("id", None)
        self.table = "missing" if kind == "missing" else self.database.create_table(*keys)

    def layer(self, side: str) -> Any:
        from aidem.persistence.dynamodb import DynamoDBPersistenceLayer  # its client cannot be had on every interpreter

        make: Any = TheirDynamoDB if side == "powertools" else DynamoDBPersistenceLayer
        return make(table_name=self.table, **self.names, **self._client_options(side, self.kind))

    def _client_options(self, side: str, kind: str) -> dict[str, Any]:
        quick = Config(connect_timeout=1, read_timeout=30, retries={"total_max_attempts": 1})
        if kind == "session":
            import aioboto3

            return {"boto3_session": boto3.Session()} if side == "powertools" else {"session": aioboto3.Session()}
        if kind == "boto_config":
            return {"boto_config": quick}
        return {"boto3_client": self.database.client} if side == "powertools" else {}

    def raw_records(self) -> dict[str, dict[str, Any]]:
        try:
            items = self.database.items(self.table)
        except self.database.client.exceptions.ResourceNotFoundException:
            return {}
        return {key: record for key, record, _ in map(self._read, items)}

    def _read(self, item: dict[str, dict[str, str]]) -> tuple[str, dict[str, Any], dict[str, Any]]:
        key_attr = self.names.get("sort_key_attr", "id")
        record = {
            ROLES.get(name, name): int(value["N"]) if "N" in value else value["S"]
            for name, value in item.items()
            if name != key_attr
        }
        return item[key_attr]["S"], record, item

    def change(self, changes: Mapping[str, Any]) -> None:
        stored_names = {role: name for name, role in ROLES.items() if name in self.names.values()}
        for _, record, item in map(self._read, self.database.items(self.table)):
            changed = {stored_names.get(name, name): value for name, value in _changed(record, changes).items()}
            keys = {name: value for name, value in item.items() if name in {"id", "partition", "key"}}
            attributes = {
                name: {"N": str(value)} if isinstance(value, int) else {"S": value} for name, value in changed.items()
            }
            self.database.put(self.table, **attributes | keys)

    def forget(self) -> None:
        for item in self.database.items(self.table):
            keys = {name: value for name, value in item.items() if name in {"id", "partition", "key"}}
            self.database.client.delete_item(TableName=self.table, Key=keys)

    def fail(self) -> None:
        self.database.client.delete_table(TableName=self.table)

    def replace(self, text: str) -> None:
        raise NotImplementedError


# --- Redis ------------------------------------------------------------------------------------------------------------


@dataclass
class Redis:
    server: RedisServer
    database: int
    kind: str = "plain"
    names: dict[str, str] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return redis.Redis(port=self.server.port, db=self.database, decode_responses=True)

    def prepare(self, kind: str) -> None:
        self.kind = kind
        self.names = NAMES if kind == "names" else {}
        self.forget()

    def layer(self, side: str) -> Any:
        make: Any = TheirRedis if side == "powertools" else RedisPersistenceLayer
        kind = self.kind
        url = f"redis://127.0.0.1:{self.server.port}/{self.database}"
        if kind == "client":
            return make(client=self.client if side == "powertools" else async_redis.Redis.from_url(url))
        return make(url=url, **self.names)

    def raw_records(self) -> dict[str, dict[str, Any]]:
        with self.client as client:
            return {
                key: {ROLES.get(name, name): value for name, value in _decoded(client.get(key)).items()}
                | {"time to live": client.ttl(key)}
                for key in client.scan_iter()
                if not key.endswith(":lock")
            }

    def change(self, changes: Mapping[str, Any]) -> None:
        stored_names = {role: name for name, role in ROLES.items() if name in self.names.values()}
        with self.client as client:
            for key, record in self.raw_records().items():
                changed = _changed(record, {"time to live": None} | dict(changes))
                text = json.dumps({stored_names.get(name, name): value for name, value in changed.items()})
                client.set(key, text, keepttl=True)

    def replace(self, text: str) -> None:
        with self.client as client:
            for key in client.scan_iter():
                client.set(key, text, keepttl=True)

    def forget(self) -> None:
        with self.client as client:
            client.flushdb()

    def fail(self) -> None:
        raise NotImplementedError


@dataclass
class RedisCluster(Redis):
    """A cluster has one database, so both sides share it, one after the other."""

    @property
    def client(self) -> Any:
        return redis.RedisCluster(host="127.0.0.1", port=self.server.port, decode_responses=True)

    def layer(self, side: str) -> Any:
        make: Any = TheirRedis if side == "powertools" else RedisPersistenceLayer
        return make(url=self.server.url, mode="cluster")


def _decoded(text: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(text)
    except ValueError:
        return {"text": text}
    return fields


# --- One's own --------------------------------------------------------------------------------------------------------


@dataclass
class Own:
    items: dict[str, dict[str, Any]] = field(default_factory=dict)

    def prepare(self, kind: str) -> None:
        assert kind == "plain"

    def layer(self, side: str) -> Any:
        module: Any = own_layer_before if side == "powertools" else own_layer_after
        return module.OwnPersistenceLayer(self.items)

    def raw_records(self) -> dict[str, dict[str, Any]]:
        return self.items

    def change(self, changes: Mapping[str, Any]) -> None:
        for key, record in self.items.items():
            self.items[key] = _changed(dict(record), changes)

    def replace(self, text: str) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        self.items.clear()

    def fail(self) -> None:
        raise NotImplementedError
