"""Any messenger as a table: CSV with a header, or JSON lines, a message a row.

A first pass sorts the rows by chat into a temporary file and learns in which order the dates have
day and month; a second one yields messages. WeChat's CSV (as WeClone reads it: type_name,
is_sender, talker, room_name, msg, CreateTime) and KakaoTalk's (Date, User, Message) are tables too.
"""

import collections
import marshal
import re
import tempfile
from collections.abc import Iterator

from exports import Chat, Message, Reason, local_time, make_message
from exports.content import hash_name
from exports.dates import Clock
from exports.source import Source
from exports.table_columns import is_table
from exports.table_kinds import mark_of, reason_of
from exports.table_rows import Row, rows

can_read = is_table
NUM_PASSES = 1  # over the file; the second is over our own
SAME_IDS = True  # of two files of one kind, a name is one person
YES = ("1", "true", "yes", "me")
ME = "table:me"  # the id of whose rows say that they are mine
SPOOL_ROWS = 10_000  # rows in memory
NO_TIME = "rows without a time that can be read, left out"


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. UserError where dates may be read in two ways."""
    clock, spool = Clock(), Spool()
    with spool.file:
        for row in rows(source, repairs):
            if reason_of(row.kind) != Reason.SERVICE:
                clock.add(row.time)
            spool.add(row)
        spool.flush()
        clock.settle(str(source))
        for name in spool.places:
            chat = make_chat(source.path.stem, spool, name)
            yield chat, messages(spool, name, clock, repairs)


def make_chat(file: str, spool: "Spool", name: str) -> Chat:
    # WeChat's exporters number the parts of a chat: Bob_0_5000.csv.
    shown = name or re.sub(r"_\d+_\d+$", "", file)
    chat_type = "personal_chat" if len(spool.authors[name]) < 3 else "private_group"
    owner = ME if spool.mine else None
    return Chat(f"table:{shown}", f"table:{hash_name(shown)}", chat_type, shown, owner)


class Spool:
    """Rows by chat in a temporary file. `mine`, `others`: the names in rows that are, or aren't."""

    def __init__(self):
        self.file = tempfile.TemporaryFile()
        self.places: dict[str, list[tuple[int, int]]] = {}
        self.waiting: dict[str, list] = collections.defaultdict(list)
        self.authors: dict[str, set] = collections.defaultdict(set)
        self.mine: set[str] = set()
        self.others: set[str] = set()
        self.count = 0

    def add(self, row: Row) -> None:
        self.waiting[row.chat].append(tuple(row))
        if row.author and reason_of(row.kind) != Reason.SERVICE:
            self.authors[row.chat].add(author_id(row))
            (self.mine if is_mine(row) else self.others).add(row.author)
        self.count += 1
        if self.count % SPOOL_ROWS == 0:
            self.flush()

    def flush(self) -> None:
        for chat, some in self.waiting.items():
            data = marshal.dumps(some)
            self.places.setdefault(chat, []).append((self.file.tell(), len(data)))
            self.file.write(data)
        self.waiting.clear()

    def rows(self, chat: str) -> Iterator[Row]:
        for offset, length in self.places[chat]:
            self.file.seek(offset)
            yield from map(Row._make, marshal.loads(self.file.read(length)))


def is_mine(row: Row) -> bool:
    return row.me.casefold() in YES


def author_id(row: Row) -> str:
    return ME if is_mine(row) else f"table:{row.author_id or row.author}"


def messages(
    spool: Spool, chat: str, clock: Clock, repairs: collections.Counter
) -> Iterator[Message]:
    for row in spool.rows(chat):
        time = clock.read(row.time)
        if time is None:
            repairs[NO_TIME] += 1
            continue
        at, date = time
        text, reason = read_text(row)
        author, name = (author_id(row), row.author) if row.author else (None, None)
        if author == ME and name in spool.others:
            name = "Me"  # some exporters write the chat's other side in all rows
        yield make_message((None, author, name, at, date or local_time(at), text, reason))


def read_text(row: Row) -> tuple[str, str]:
    """Return (what somebody wrote, or its mark; "") or ("", why it is left out)."""
    if reason := reason_of(row.kind):
        return "", reason
    if row.forwarded.casefold() in YES:
        return "", Reason.FORWARD
    if not row.author:
        return "", Reason.NO_AUTHOR
    text = mark_of(row.kind) or row.text
    return text, "" if text else Reason.NO_TEXT
