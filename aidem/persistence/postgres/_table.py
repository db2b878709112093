"""The table: its columns, and the statements that create it."""

from __future__ import annotations

from typing import Final

from aidem.exceptions import IdempotencyPersistenceConfigError

COLUMNS: Final = {
    "id": 'text COLLATE "C" PRIMARY KEY',  # bytes are compared: no upgrade of a locale can damage the index
    "status": "text NOT NULL",
    "expiration": "bigint",
    "in_progress_expiration": "bigint",
    "lease_expiration": "bigint",
    "data": "text",  # neither json nor jsonb, which change what they are given
    "validation": "text",
    "owner": "text",
    "fence": "bigint NOT NULL",
    "outcome": "text",
    "note": "text",
    "purge_after": "bigint",
}

MAX_NAME_BYTES: Final = 63 - len("_purge_after")
"""PostgreSQL cuts longer names off, and the index is named after the table."""


class Table:
    """The name of a table, which may begin with a schema.

    Attributes:
        name: As it was given.
        quoted: As it is written in SQL.
    """

    __slots__ = ("_index", "name", "quoted")

    def __init__(self, name: str) -> None:
        parts = name.split(".")
        if len(parts) > 2 or not all(0 < len(part.encode()) <= MAX_NAME_BYTES and "\0" not in part for part in parts):  # noqa: PLR2004 - schema and table
            raise IdempotencyPersistenceConfigError(
                f"table={name!r} names no table; write 'aidem_records' or 'schema.aidem_records', each name of "
                f"{MAX_NAME_BYTES} bytes at most"
            )
        self.name = name
        self.quoted = ".".join(map(_quoted, parts))
        self._index = _quoted(f"{parts[-1]}_purge_after")

    def statements(self) -> tuple[str, str]:
        """Return the statements that create the table and its index."""
        columns = ",\n".join(f"    {name} {kind}" for name, kind in COLUMNS.items())
        return (
            f"CREATE TABLE IF NOT EXISTS {self.quoted} (\n{columns}\n) WITH (fillfactor = 70);",
            f"CREATE INDEX IF NOT EXISTS {self._index} ON {self.quoted} (purge_after);",
        )

    def ddl(self) -> str:
        """Return them as one text."""
        return "\n".join(self.statements())


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
