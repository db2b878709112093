"""What operators are told of a file."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aidem.persistence import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Sequence

MOUNTS: Final = Path("/proc/self/mountinfo")
NETWORK: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
)
"""https://www.sqlite.org/faq.html#q5"""

LOG_BYTES: Final = 64 * 1024 * 1024
"""Four times the size at which the log is written back to the file."""


def diagnosis(cursor: sqlite3.Cursor, path: Path, *, found: Sequence[str], mounts: Path = MOUNTS) -> Diagnosis:
    """Return what a file is, and what endangers the records in it.

    Args:
        cursor: Of a connection to it.
        path: The file.
        found: What was noticed when it was opened.
        mounts: See `file_system`.
    """
    (mode,) = cursor.execute("PRAGMA journal_mode").fetchone()
    log = path.with_name(f"{path.name}-wal")
    log_bytes = log.stat().st_size if log.exists() else 0
    system = file_system(path, mounts=mounts)
    problems = list(found)
    if system in NETWORK or system.startswith("fuse."):
        problems.append(
            f"{path} is on {system}, where locks of SQLite may not work: two calls may claim one key, and the file may "
            "be damaged; move it to a local disk, or use another layer for several machines"
        )
    if log_bytes > LOG_BYTES:
        problems.append(
            f"the write-ahead log has {log_bytes // 2**20} MB: a reader that does not end keeps it from being written "
            "back; look for a connection or a transaction that was left open"
        )
    facts = {
        "server": f"SQLite {sqlite3.sqlite_version}, in this process",
        "file": f"{path}, {path.stat().st_size // 1024} KB",
        "journal mode": mode,
        "write-ahead log": f"{log_bytes // 1024} KB",
        "file system": system,
        "clock of this machine": "the only one",
    }
    return Diagnosis(facts, tuple(problems))


def file_system(path: Path, *, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system that a file is on, where the operating system says so.

    Args:
        path: The file.
        mounts: Where Linux lists what is mounted, https://www.kernel.org/doc/html/latest/filesystems/proc.html
    """
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return "not known"
    longest, system = "", "not known"
    for fields in map(str.split, lines):
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        # Of several at one place the last hides the others.
        if path.is_relative_to(point) and len(point) >= len(longest):
            longest, system = point, fields[fields.index("-") + 1]
    return system
