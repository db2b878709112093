"""A stub that speaks as much of DynamoDB's protocol as idempotency needs, and answers at once.

    python _instant_dynamodb.py PORT [TLS_PORT CERTIFICATE KEY]

The emulators take milliseconds a request, which would hide what clients cost. This one keeps items in a dict and knows
one condition: a write that asks for the absence of the item (`attribute_not_exists`) is refused when it is completed.
`GET /` answers how many requests of each kind there were.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
from collections import Counter
from functools import cache
from typing import Any, TypeAlias, cast

Item: TypeAlias = "dict[str, dict[str, Any]]"

TABLE = {
    "TableStatus": "ACTIVE",
    "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}],
    "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
}
REFUSED = {"__type": "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException", "message": "refused"}
COMPLETED = {"S": "COMPLETED"}
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TARGET = re.compile(rb"\r\nx-amz-target: *\w+\.(\w+)", re.IGNORECASE)

items: dict[str, Item] = {}
requests: Counter[str] = Counter()


class Connection(asyncio.Protocol):
    """A connection that is kept open, as those of a client's pool are."""

    transport: asyncio.Transport
    _unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        head, separator, rest = (self._unread + data).partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        size = 0 if length is None else int(length[1])
        if not separator or len(rest) < size:
            self._unread += data
            return
        self._unread = b""  # clients send one request at a time
        target = TARGET.search(head)
        status, body = (200, requests) if target is None else answer(target[1].decode(), json.loads(rest[:size]))
        text = json.dumps(body).encode()
        self.transport.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(text), text))


def answer(operation: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    requests[operation] += 1
    if operation == "DescribeTable":
        return 200, {"Table": TABLE | {"TableName": request["TableName"]}}
    if operation == "CreateTable":
        return 200, {"TableDescription": TABLE | {"TableName": request["TableName"]}}
    if operation not in {"PutItem", "UpdateItem", "GetItem"}:
        return 200, {}
    key = next(iter(request["Key"].values()))["S"] if "Key" in request else request["Item"]["id"]["S"]
    found = items.get(key)
    if operation == "GetItem":
        return 200, {} if found is None else {"Item": found}
    if found and COMPLETED in found.values() and "attribute_not_exists" in request.get("ConditionExpression", ""):
        wants_item = request.get("ReturnValuesOnConditionCheckFailure") == "ALL_OLD"
        return 400, REFUSED | ({"Item": found} if wants_item else {})
    items[key] = new = request["Item"] if operation == "PutItem" else updated(found or request["Key"], request)
    return 200, {"Attributes": new} if request.get("ReturnValues") == "ALL_NEW" else {}


def updated(item: Item, request: dict[str, Any]) -> Item:
    names, values = request["ExpressionAttributeNames"], request["ExpressionAttributeValues"]
    return item | {names.get(name, name): values[value] for name, value in settings(request["UpdateExpression"])}


@cache
def settings(expression: str) -> list[tuple[str, str]]:
    """Return which attribute gets which value, where it had none before."""
    return re.findall(r"(#?\w+) = (?:if_not_exists\(#?\w+, )?(:\w+)", expression)


async def main() -> None:
    port, *tls = sys.argv[1:]
    loop = asyncio.get_running_loop()
    if tls:
        tls_port, certificate, key = tls
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        await loop.create_server(Connection, "127.0.0.1", int(tls_port), ssl=context)
    await (await loop.create_server(Connection, "127.0.0.1", int(port))).serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
