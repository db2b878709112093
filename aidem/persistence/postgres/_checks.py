"""What is looked at when the layer is opened: the table, the rights to it, and settings that endanger records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.postgres import _errors
from aidem.persistence.postgres._statements import Statement
from aidem.persistence.postgres._table import COLUMNS

if TYPE_CHECKING:
    from aidem.persistence.postgres._table import Table

CHECK: Final = Statement(
    "aidem_check",
    """
SELECT c.oid IS NOT NULL,
    coalesce((
        SELECT string_agg(a.attname || ' ' || format_type(a.atttypid, NULL), ', ')
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    ), ''),
    EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1
            AND a.attname = 'id'
    ),
    coalesce(bool_and(has_table_privilege(c.oid, p)), true),
    pg_is_in_recovery(),
    c.relpersistence = 'p',
    current_setting('fsync') = 'on',
    current_setting('synchronous_commit') <> 'off'
FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
LEFT JOIN pg_class c ON c.oid = to_regclass($1::text)
GROUP BY c.oid, c.relpersistence
""",
)

_TYPES: Final = {"text": ("text", "character varying"), "bigint": ("bigint",)}

_DANGERS: Final = (
    "table %s is not an ordinary one: PostgreSQL empties it after a crash; make it LOGGED",
    "fsync is off: a crash of its machine loses what was stored",
    "synchronous_commit is off: a crash loses what was stored in the last moments; set it to on for this user",
)


class MissingTableError(IdempotencyPersistenceConfigError):
    """There is no table."""


def dangers(row: Any, table: Table) -> list[str]:
    """Return what is unsafe.

    Raises:
        IdempotencyPersistenceLayerError: The table cannot be used.
    """
    exists, columns, is_unique, is_allowed, is_replica, *safe = row
    if is_replica:
        raise _errors.is_replica()
    if not exists:
        raise MissingTableError(
            f"PostgreSQL table {table.name!r} does not exist in this database; create it with "
            f"`await layer.create_table()`, or by a migration with:\n{table.ddl()}"
        )
    found = dict(column.split(" ", 1) for column in columns.split(", "))
    missing = [f"ADD COLUMN {name} {kind}" for name, kind in COLUMNS.items() if name not in found]
    if missing:
        raise _errors.unfit(table, "lacks columns; add them with", f"ALTER TABLE {table.quoted} {', '.join(missing)};")
    wrong = [name for name, kind in COLUMNS.items() if found[name] not in _TYPES[kind.split()[0]]]
    if wrong or not is_unique:
        problem = f"has other types in {', '.join(wrong)}" if wrong else "has no unique index on id"
        raise _errors.unfit(table, f"{problem}; use another one, made with", table.ddl())
    if not is_allowed:
        raise _errors.lacks_rights(table)
    return [
        danger.replace("%s", repr(table.name)) for danger, is_safe in zip(_DANGERS, safe, strict=True) if not is_safe
    ]
