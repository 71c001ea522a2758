"""The rows of a table: CSV with a header, or JSON lines, whatever its columns are called.

An incomplete row is left out and counted: after a lost quote, text would get a wrong author.
"""

import collections
import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from exports.content import parse_object, without_surrogates
from exports.dates import Clock
from exports.source import Source, full_lines
from exports.table_columns import find_columns, find_header

DAMAGED = "rows that aren't whole, left out"


class Row(NamedTuple):
    time: str
    text: str
    author: str
    author_id: str = ""
    chat: str = ""
    me: str = ""
    kind: str = ""
    forwarded: str = ""


def rows(source: Source, repairs: collections.Counter) -> Iterator[Row]:
    """Yield the rows that are whole; count the others."""
    lines = full_lines(source, repairs)
    first = next((line for line in lines if line.strip("\ufeff\r\n")), "")
    if header := find_header(first):
        found = csv_rows(lines, *header)
    else:
        found = json_rows(itertools.chain([first], lines))
    for row in found:
        if row:
            yield row
        else:
            repairs[DAMAGED] += 1


def csv_rows(lines: Iterator[str], delimiter: str, header: tuple[str, ...]) -> Iterator[Row | None]:
    """Yield the rows, None for one that isn't whole."""
    columns = find_columns(header) or {}
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a quote that isn't closed, or not where one may stand
            yield None
            continue
        if not any(cells):
            continue
        if not any(cells[len(header) :]):
            cells = cells[: len(header)]
        hole = any("\0" in cell for cell in cells)  # what follows it belongs to something else
        damaged = hole or len(cells) != len(header) or swallowed(cells, columns, delimiter)
        yield None if damaged else make_row(cells, columns)


def json_rows(lines: Iterable[str]) -> Iterator[Row | None]:
    for line in lines:
        if line.strip():
            value = parse_object(line.strip())
            columns = find_columns(tuple(value))
            yield make_row(list(value.values()), columns) if columns else None


def make_row(cells: list, columns: dict[str, int]) -> Row:
    values = {name: cell_text(cells[index]) for name, index in columns.items()}
    if "clock" in values:
        values["time"] += " " + values.pop("clock")
    row = Row(**values)
    inner = parse_object(row.text).get("msg") if row.kind and row.text.startswith("{") else None
    if isinstance(inner, str):  # of WeChat's exporters in 2023
        row = row._replace(text=inner.strip())
    return row


def cell_text(value: object) -> str:
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
