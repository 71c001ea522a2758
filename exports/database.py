"""SQLite databases of messengers, opened so that nothing is written beside them."""

import collections
import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exports.source import BROKEN_ZIP, Source

DAMAGED = "damaged databases, read as far as possible"


@contextlib.contextmanager
def open_database(source: Source, repairs: collections.Counter) -> Iterator[sqlite3.Connection]:
    """Open a database without writing to it; one in a zip, or with a `-wal` beside it, as a copy.

    The `-wal` holds the latest messages. SQLite can only read it where it may write.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(source.path), Path(f"{source.path}-wal")
        in_zip = source.zip is not None
        if in_zip or (log.exists() and log.stat().st_size):
            path = Path(folder, "chat.db")
            with open(path, "wb") as copy:
                copy.writelines(source.blocks(repairs))
            copy_log(source, log, Path(f"{path}-wal"))
            options = "mode=rw"
        else:
            options = "immutable=1"
        database = sqlite3.connect(f"{path.resolve().as_uri()}?{options}", uri=True)
        database.text_factory = lambda data: data.decode("utf-8", "replace")
        database.row_factory = sqlite3.Row
        with contextlib.closing(database):
            yield database


def copy_log(source: Source, log: Path, to: Path) -> None:
    if not source.zip:
        shutil.copyfile(log, to)
        return
    with contextlib.suppress(KeyError, *BROKEN_ZIP):
        member = source.zip.getinfo(f"{source.path}-wal")
        with source.zip.open(member) as packed, open(to, "wb") as copy:
            shutil.copyfileobj(packed, copy)


def read_rows(
    database: sqlite3.Connection,
    select: str,
    members: str,
    order: str,
    repairs: collections.Counter,
) -> Iterator[sqlite3.Row]:
    """Yield in order the rows of `select`, a query that ends with a column, IN query `members`.

    SQLite sorts before it gives the first row, so any damage costs all: then each is asked for.
    """
    unread = True
    try:
        for row in database.execute(f"{select} IN ({members}) ORDER BY {order}"):
            unread = False
            yield row
        return
    except sqlite3.Error:
        repairs[DAMAGED] += 1
    with contextlib.suppress(sqlite3.Error):
        for member in database.execute(members) if unread else ():
            with contextlib.suppress(sqlite3.Error):
                yield from database.execute(f"{select} = ?", tuple(member)).fetchall()
