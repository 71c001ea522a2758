"""What text exports without ids share: a chat is a file, a person a name, a time a local one."""

import collections
import datetime
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from exports import Chat, Message, Reason, fix_dst, iso_time, make_message
from exports.content import hash_name


class Event(NamedTuple):
    """A message as a file shows it, or with a reason what is none."""

    time: datetime.datetime
    name: str | None
    text: str
    left_out: str = ""


def read_chat(
    messenger: str,
    name: str,
    events: Callable[[collections.Counter], Iterator[Event]],
    repairs: collections.Counter,
) -> tuple[Chat, Iterator[Message]]:
    """Return a file's chat and its messages; `events` is called twice, first to see who wrote."""
    written = (event.name for event in events(collections.Counter()) if not event.left_out)
    people = dict.fromkeys(filter(None, written))
    known = name or ", ".join(itertools.islice(sorted(people), 50))
    chat_type = "personal_chat" if len(people) < 3 else "private_group"
    chat = Chat(
        f"{messenger}:{known}",
        f"{messenger}:{hash_name(known)}",
        chat_type,
        name or messenger,
        None,
    )
    return chat, messages(messenger, events(repairs))


def messages(messenger: str, events: Iterator[Event]) -> Iterator[Message]:
    last = None
    for event in events:
        at = int(event.time.replace(tzinfo=datetime.UTC).timestamp())
        last = at = fix_dst(at, last)
        reason = event.left_out or ("" if event.text else Reason.NO_TEXT)
        author = f"{messenger}:{event.name}" if event.name else None
        text = "" if reason else event.text
        yield make_message((None, author, event.name, at, iso_time(at), text, reason))
