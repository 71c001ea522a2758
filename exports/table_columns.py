"""The columns of a table: which one holds what, by the names in its header or in its objects."""

import contextlib
import csv
import functools
import re

from exports.content import parse_object

# What a column may be called, the most telling name first, without spaces and signs.
COLUMNS = {
    "time": "timestamp datetime createtime createdat sentat datesent unixtime time date ts",
    "text": "text message content body msg messagetext strcontent",
    "author": "author sender from sendername authorname talker user username nickname name",
    "author_id": "authorid senderid fromid userid",
    "chat": "chat conversation channel roomname chatname conversationname room thread group dialog",
    "me": "issender isme fromme isfromme me mine",
    "kind": "typename messagetype kind type",
    "forwarded": "isforward isforwarded forwarded",
}
DELIMITERS = ",;\t|"


@functools.lru_cache(1 << 10)
def find_columns(names: tuple[str, ...]) -> dict[str, int] | None:
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


def find_header(line: str) -> tuple[str, tuple[str, ...]] | None:
    """Return (delimiter, names of the columns) of a CSV's first line; None of other text."""
    text = line.strip("\ufeff\r\n")
    for delimiter in DELIMITERS:
        with contextlib.suppress(csv.Error):
            names = tuple(next(csv.reader([text], delimiter=delimiter, strict=True), []))
            if find_columns(names):
                return delimiter, names
    return None


def is_table(head: str) -> bool:
    """Return whether a text begins with a header, or with JSON lines, that we know."""
    lines = head.lstrip("\ufeff\r\n").split("\n")[:20]
    if lines[0].startswith("{"):
        return any(find_columns(tuple(parse_object(line))) for line in lines)
    return find_header(lines[0]) is not None
