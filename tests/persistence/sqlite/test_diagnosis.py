from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from aidem.persistence.sqlite import SQLitePersistenceLayer, _checks
from aidem.persistence.sqlite._checks import diagnosis, file_system
from aidem.testing import claim_of

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/shared\\040disk rw,relatime shared:5 - nfs4 server:/export rw
31 22 0:41 / /mnt/home rw - fuse.sshfs server: rw
32 22 8:2 / /mnt rw - xfs /dev/sdb rw
33 22 8:3 / /mnt/twice rw - nfs4 server:/a rw
34 22 8:3 / /mnt/twice rw - ext4 /dev/sdc rw
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("path", "system"),
    [
        ("/srv/records", "ext4"),
        ("/mnt/records", "xfs"),
        ("/mnt/shared disk/records", "nfs4"),
        ("/mnt/shared disks/records", "xfs"),
        ("/mnt/home/a/records", "fuse.sshfs"),
        ("/mnt/twice/records", "ext4"),
    ],
)
def test_the_file_system_of_a_file_is_that_of_the_nearest_mount(mounts: Path, path: str, system: str) -> None:
    assert file_system(Path(path), mounts=mounts) == system


def test_where_the_operating_system_does_not_say_the_file_system_is_not_known(tmp_path: Path, mounts: Path) -> None:
    assert file_system(Path("/srv/records"), mounts=tmp_path / "none") == "not known"
    mounts.write_text("")
    assert file_system(Path("/srv/records"), mounts=mounts) == "not known"


def test_a_file_on_a_network_and_a_log_that_grows_are_told(
    tmp_path: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.sqlite3"
    monkeypatch.setattr(_checks, "LOG_BYTES", 0)
    mounts.write_text(MOUNTS + f"40 22 0:50 / {tmp_path} rw - fuse.sshfs server: rw\n")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE any (id)")
        facts, problems = diagnosis(connection.cursor(), path, found=["noticed"], mounts=mounts)
    assert facts["file system"] == "fuse.sshfs"
    assert facts["journal mode"] == "wal"
    assert problems[0] == "noticed"
    assert f"{path} is on fuse.sshfs, where locks of SQLite may not work" in problems[1]
    assert "the write-ahead log has 0 MB: a reader that does not end keeps it from being written back" in problems[2]


async def test_a_diagnosis_tells_what_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite3"
    async with SQLitePersistenceLayer(path) as layer:
        await layer.acquire(claim_of("key", now=layer.clock()), now=layer.clock())
        facts, problems = await layer.diagnose()
        assert facts["server"] == f"SQLite {sqlite3.sqlite_version}, in this process"
        assert facts["file"].startswith(f"{path}, ")
        assert problems == ()
        path.chmod(0o666)
        async with SQLitePersistenceLayer(path) as another:
            [problem] = (await another.diagnose()).problems
            assert "is writable by all users, who can forge results and drop claims; chmod o-w" in problem


async def test_a_file_of_an_application_without_a_log_is_told_as_it_is(tmp_path: Path) -> None:
    async with SQLitePersistenceLayer(tmp_path / "shop.sqlite3", in_application_database=True) as layer:
        facts, problems = await layer.diagnose()
        assert (facts["journal mode"], facts["write-ahead log"], problems) == ("delete", "0 KB", ())


async def test_whether_a_file_holds_records_is_found_out_without_a_change(tmp_path: Path) -> None:
    path = tmp_path / "shop.sqlite3"
    for of_application in (False, True):
        layer = SQLitePersistenceLayer(path, in_application_database=of_application)
        assert not layer.holds_records()
        assert not path.exists()
    path.touch()
    assert not layer.holds_records()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE orders (id)")
    before = path.read_bytes()
    assert not layer.holds_records()
    assert SQLitePersistenceLayer(path).holds_records()  # it is refused as another application's when it is opened
    assert path.read_bytes() == before
    async with layer:
        assert layer.holds_records()
    path.write_bytes(b"no database" * 100)
    assert layer.holds_records()
