"""Any messenger as a table: CSV with a header, or JSON lines, a message a row.

Columns are found by their names, in any order (COLUMNS). A first pass sorts the rows by chat into a
temporary file and learns in which order the dates have day and month; a second one yields messages.
A row that isn't whole is left out and counted: a lost quote would give one person another's words.

WeChat's CSV (as WeClone reads it: talker, room_name, msg, is_sender, type_name, CreateTime) and
KakaoTalk's (Date, User, Message) are tables too.
"""

import collections
import csv
import functools
import hashlib
import itertools
import json
import marshal
import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from exports import Chat, Message, Reason, local_time, make_message
from exports.dates import Clock
from exports.source import Source, full_lines

NUM_PASSES = 1  # over the file; the second is over our own
SAME_IDS = True  # of two files of one kind, a name is one person
# What a column may be called, the most telling name first, without spaces and signs.
COLUMNS = {
    "time": "timestamp datetime createtime createdat sentat datesent unixtime time date ts",
    "text": "text message content body msg messagetext strcontent",
    "author": "author sender from sendername authorname talker user username nickname name",
    "author_id": "authorid senderid fromid userid",
    "chat": "chat conversation channel roomname chatname conversationname room thread group dialog",
    "me": "issender isme fromme isfromme me mine",
    "kind": "typename messagetype kind type",
}
YES = ("1", "true", "yes", "me")
MARKS = {  # by what stands in the column `kind`
    "<photo>": "image photo picture 图片",
    "<voice>": "voice 语音",
    "<video>": "video 视频",
    "<audio>": "audio",
    "<gif>": "gif",
    "<sticker>": "sticker emoji 动画表情",
    "<file>": "file document 文件",
    "<location>": "location 位置",
    "<contact>": "contact 名片",
}
KINDS = {name: mark for mark, names in MARKS.items() for name in names.split()}
SERVICE = ("service", "system", "call", "系统通知", "拍一拍", "语音通话", "音视频通话", "撤回")
# What WeChat shows as a card: a link, a mini program, money.
CARDS = ("link", "卡片式链接", "分享", "小程序", "转账", "红包")
ME = "table:me"  # the id of whose rows say that they are mine
DELIMITERS = ",;\t|"
SPOOL_ROWS = 10_000  # rows in memory
DAMAGED = "rows that aren't whole, left out"
NO_TIME = "rows without a time that can be read, left out"


class Row(NamedTuple):
    time: str
    text: str
    author: str
    author_id: str
    chat: str
    me: str
    kind: str


def find_columns(names: list[str]) -> dict[str, int] | None:
    """Return {our name: index} of a header; None without time, author and text."""
    plain = [re.sub(r"[\W_]", "", name).casefold() for name in names]
    found: dict[str, int] = {}
    for column, spellings in COLUMNS.items():
        for spelling in spellings.split():
            if spelling in plain and plain.index(spelling) not in found.values():
                found[column] = plain.index(spelling)
                break
    if {"date", "time"} <= {*plain}:  # two columns that are one time
        found["time"], found["clock"] = plain.index("date"), plain.index("time")
    return found if {"time", "text", "author"} <= found.keys() else None


@functools.lru_cache(1 << 10)
def columns_of_keys(keys: tuple[str, ...]) -> dict[str, int] | None:
    return find_columns(list(keys))


def find_header(line: str) -> tuple[str, list[str]] | None:
    """Return (delimiter, names of the columns) of a CSV's first line; None of other text."""
    for delimiter in DELIMITERS:
        try:
            names = next(
                csv.reader([line.strip("\ufeff\r\n")], delimiter=delimiter, strict=True), []
            )
        except csv.Error:
            continue
        if find_columns(names):
            return delimiter, names
    return None


def parse_json(line: str) -> dict | None:
    """Return the object of a line of JSON; None of anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def can_read(head: str) -> bool:
    lines = head.lstrip("\ufeff\r\n").split("\n")[:20]
    if lines[0].startswith("{"):
        values = filter(None, map(parse_json, lines))
        return any(find_columns(list(value)) for value in values)
    return find_header(lines[0]) is not None


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. UserError where dates may be read in two ways."""
    clock, spool = Clock(), Spool()
    with spool.file:
        for row in rows(source, repairs):
            if row.kind.casefold() not in SERVICE:
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
    id = hashlib.blake2b(shown.encode(), digest_size=8).hexdigest()
    chat_type = "personal_chat" if len(spool.authors[name]) < 3 else "private_group"
    return Chat(f"table:{shown}", f"table:{id}", chat_type, shown, ME if spool.mine else None)


def rows(source: Source, repairs: collections.Counter) -> Iterator[Row]:
    """Yield the rows that are whole; count the others."""
    lines = full_lines(source, repairs)
    first = next((line for line in lines if line.strip("\ufeff\r\n")), "")
    delimiter, header = find_header(first) or (",", [])
    columns = find_columns(header)
    if not columns:
        yield from json_rows(itertools.chain([first], lines), repairs)
        return
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a quote that isn't closed, or not where one may stand
            repairs[DAMAGED] += 1
            continue
        if not any(cells):
            continue
        cells = cells[: len(header)] if not any(cells[len(header) :]) else cells
        hole = any("\0" in cell for cell in cells)  # what follows it belongs to something else
        if hole or len(cells) != len(header) or swallowed(cells, columns, delimiter):
            repairs[DAMAGED] += 1
            continue
        yield make_row(cells, columns)


def json_rows(lines: Iterator[str], repairs: collections.Counter) -> Iterator[Row]:
    for line in lines:
        value = parse_json(line)
        columns = columns_of_keys(tuple(value)) if value else None
        if value and columns:
            yield make_row(list(value.values()), columns)
        elif line.strip():
            repairs[DAMAGED] += 1


def make_row(cells: list, columns: dict[str, int]) -> Row:
    values = []
    for name in Row._fields:
        values.append(as_text(cells[columns[name]]) if name in columns else "")
    row = Row(*values)
    if "clock" in columns:
        row = row._replace(time=f"{row.time} {as_text(cells[columns['clock']])}")
    inner = parse_json(row.text) if row.kind and row.text.startswith("{") else None
    if inner and isinstance(inner.get("msg"), str):  # of WeChat's exporters in 2023
        row = row._replace(text=inner["msg"].strip())
    return row


def as_text(value: object) -> str:
    """Return a cell's text; lone surrogates, which no file can hold, become U+FFFD."""
    if value is None or isinstance(value, (dict, list)):
        return ""
    text = str(value).strip()
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def swallowed(cells: list[str], columns: dict[str, int], delimiter: str) -> bool:
    """Return whether a cell holds whole rows: the end of its quotes is lost."""
    long_cells = [cell for cell in cells if "\n" in cell]
    if not long_cells:
        return False
    for line in "\n".join(long_cells).split("\n"):
        inner = line.split(delimiter)
        if len(inner) >= len(cells) and Clock.is_time(inner[columns["time"]].strip('" ')):
            return True
    return False


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
        if row.author and row.kind.casefold() not in SERVICE:
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
        kind, text, reason = row.kind.casefold(), row.text, ""
        if kind in SERVICE:
            reason = Reason.SERVICE
        elif kind in CARDS:
            reason = Reason.UNSUPPORTED
        elif not row.author:
            reason = Reason.NO_AUTHOR
        elif not (text := KINDS.get(kind, text)):
            reason = Reason.NO_TEXT
        author, name = (author_id(row), row.author) if row.author else (None, None)
        if author == ME and name in spool.others:
            name = "Me"  # some exporters write the chat's other side in all rows
        text = "" if reason else text
        yield make_message((None, author, name, at, date or local_time(at), text, reason))
