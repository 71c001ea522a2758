"""What text exports without ids share: a chat is a file, a person a name, a time a local one.

A reader of such a file yields pieces: an Event where a message begins, text for each line that
continues it, and None where neither is the case.
"""

import collections
import datetime
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from exports import Chat, Message, Reason, fix_dst, iso_time, make_message
from exports.content import hash_name
from exports.source import Source

DAMAGED = "damaged lines, left out"
UNDATED = "messages before the first date, left out"


class Event(NamedTuple):
    """A message as a file shows it, or with a reason what is none."""

    time: datetime.datetime
    name: str | None
    text: str
    left_out: str = ""


Pieces = Iterator[Event | str | None]
ReadText = Callable[[str], tuple[str, str]]  # what was written, or its mark; why it is left out


def first_line(source: Source) -> str:
    return source.head().lstrip("\ufeff").split("\n")[0].strip()


def chat_name(source: Source, *titles: re.Match | None) -> str:
    """Return the first group of the first title that matched, else the file's name."""
    title = next(filter(None, titles), None)
    return next(filter(None, title.groups()), "").strip() if title else source.path.stem


def read_chat(
    messenger: str,
    name: str,
    read_pieces: Callable[[collections.Counter], Pieces],
    read_text: ReadText,
    repairs: collections.Counter,
) -> tuple[Chat, Iterator[Message]]:
    """Return a file's chat and its messages; it is read twice, first to see who wrote."""
    written = events(read_pieces(collections.Counter()), read_text)
    people = dict.fromkeys(event.name for event in written if event.name and not event.left_out)
    known = name or ", ".join(itertools.islice(sorted(people), 50))
    chat_type = "personal_chat" if len(people) < 3 else "private_group"
    key, chat_id = f"{messenger}:{known}", f"{messenger}:{hash_name(known)}"
    chat = Chat(key, chat_id, chat_type, name or messenger, None)
    return chat, messages(messenger, events(read_pieces(repairs), read_text))


def events(pieces: Pieces, read_text: ReadText) -> Iterator[Event]:
    """Yield events with the lines that continue them; lines that follow None are nobody's."""
    event: Event | None = None
    lines: list[str] = []
    for piece in itertools.chain(pieces, [None]):
        if isinstance(piece, str):
            if event:
                lines.append(piece)
            continue
        if event:
            text, reason = read_text("\n".join([event.text, *lines]).strip())
            yield event._replace(text=text, left_out=reason or event.left_out)
        event, lines = piece, []


def messages(messenger: str, events: Iterator[Event]) -> Iterator[Message]:
    last = None
    for event in events:
        at = int(event.time.replace(tzinfo=datetime.UTC).timestamp())
        last = at = fix_dst(at, last)
        reason = event.left_out or ("" if event.text else Reason.NO_TEXT)
        author = f"{messenger}:{event.name}" if event.name else None
        text = "" if reason else event.text
        yield make_message((None, author, event.name, at, iso_time(at), text, reason))
