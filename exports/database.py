"""SQLite databases of messengers, opened so that nothing is written beside them."""

import collections
import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exports.source import BROKEN_ZIP, Source


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
