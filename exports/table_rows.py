"""The rows of a table: CSV with a header, or JSON lines, whatever its columns are called.

An incomplete row is left out and counted: after a lost quote, text would get a wrong author.
"""

import collections
import csv
import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from exports.content import parse_object, without_surrogates
from exports.dates import Clock
from exports.source import Source, full_lines

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
DAMAGED = "rows that aren't whole, left out"


class Row(NamedTuple):
    time: str
    text: str
    author: str
    author_id: str
    chat: str
    me: str
    kind: str
    forwarded: str


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


def is_table(head: str) -> bool:
    """Return whether a text begins with a header, or with JSON lines, that we know."""
    lines = head.lstrip("\ufeff\r\n").split("\n")[:20]
    if lines[0].startswith("{"):
        return any(columns_of_keys(tuple(parse_object(line))) for line in lines)
    return find_header(lines[0]) is not None


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
        value = parse_object(line.strip())
        columns = columns_of_keys(tuple(value))
        if columns:
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
    inner = parse_object(row.text).get("msg") if row.kind and row.text.startswith("{") else None
    if isinstance(inner, str):  # of WeChat's exporters in 2023
        row = row._replace(text=inner.strip())
    return row


def as_text(value: object) -> str:
    """Return a cell's text; lone surrogates, which no file can hold, become U+FFFD."""
    if value is None or isinstance(value, (dict, list)):
        return ""
    return without_surrogates(str(value).strip())


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
