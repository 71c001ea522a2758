"""Facebook Messenger and Instagram: "Download your information" and secure storage, as JSON.

A chat is a folder of `message_1.json` (the newest), `message_2.json`…, each newest first. Text is
UTF-8 whose bytes were written as Latin-1 characters. The end-to-end encrypted chats of Messenger
come from another page, one `Name_12.json` each, with other keys. Neither says whose export it is.
"""

import collections
import functools
import itertools
import operator
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason, local_time, make_message
from exports.messenger_content import is_event, own_text, reason_of
from exports.messenger_files import group_chats, read_chat, undo_mojibake
from exports.repair import read_messages
from exports.source import Source

NUM_PASSES = 1
SAME_IDS = True  # people are known by their display names
group = group_chats
# Where a message or the array of them begins. What people type has its quotes escaped.
BEGINS = re.compile(
    r'\{\s*"(?:sender_name|senderName|isUnsent|timestamp|timestamp_ms|content|text)"\s*:'
    r'|(?P<type>"messages")\s*:\s*(?=\[)'
)
KEYS = re.compile(r'"(?:sender_name|senderName|threadName|thread_path)"\s*:')
# The keys of a message that is text and nothing else.
PLAIN = {
    "sender_name",
    "timestamp_ms",
    "content",
    "reactions",
    "is_geoblocked_for_viewer",
    "is_unsent_image_by_messenger_kid_parent",
}
MAX_SECOND = 4096  # messages of one second that are put in order


def can_read(head: str) -> bool:
    is_chat = '"participants"' in head or '"messages"' in head
    return head.lstrip("\ufeff \t\r\n").startswith("{") and is_chat and bool(KEYS.search(head))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. A file holds one chat: damage costs the messages that it hit."""
    yield read_chat(source), messages(source.parts, repairs)


def messages(parts: list[Source], repairs: collections.Counter) -> Iterator[Message]:
    """Yield the messages, newest second first; those of one second the oldest first."""
    last = 0
    same_second: list[Message] = []
    for raw in itertools.chain.from_iterable(read_messages(p, BEGINS, repairs) for p in parts):
        message = read_message(raw, last)
        if message.at == last and len(same_second) < MAX_SECOND:
            same_second.append(message)
            continue
        if len(same_second) == 1:  # nearly always; itertools.groupby takes twice as long
            yield same_second[0]
        else:
            yield from in_order(same_second)
        last, same_second = message.at, [message]
    yield from in_order(same_second)


def in_order(same_second: list[Message]) -> list[Message]:
    """Turn messages around, the newest of which is the first; each gets a number of its own."""
    by_id = sorted(reversed(same_second), key=operator.attrgetter("id"))
    return [message._replace(id=(message.id or 0) + i) for i, message in enumerate(by_id)]


def read_message(raw: dict, last: int) -> Message:
    """Make a Message of a JSON object of either shape; without a time it is as late as `last`."""
    try:
        return read_plain(raw) or read_special(raw, last)
    except (LookupError, TypeError, AttributeError):  # a key is missing, or holds something else
        return read_special(raw, last)


def read_plain(raw: dict) -> Message | None:
    """Make a Message of text and nothing else, as most are; None of others."""
    if not PLAIN.issuperset(raw):
        return None
    author, name = read_author(raw["sender_name"])
    at, text = raw["timestamp_ms"], raw["content"]
    text = text.strip() if text.isascii() else undo_mojibake(text).strip()
    second = at // 1000
    if not author or not text or not 0 < second < 1 << 37 or is_event(text, name):
        return None
    return make_message((at << 12, author, name, second, local_time(second), text, ""))


def read_special(raw: dict, last: int) -> Message:
    """Make a Message of what isn't plain text: media, events, secure storage, damage."""
    get = raw.get
    sender = get("sender_name") or get("senderName")
    author, name = read_author(sender) if isinstance(sender, str) else (None, "")
    content, at = get("content") or get("text"), get("timestamp_ms") or get("timestamp")
    content = undo_mojibake(content).strip() if isinstance(content, str) else ""
    text, left_out = own_text(raw, name, content), reason_of(raw, name, content)
    if not text and not left_out:
        left_out = Reason.FORWARD if "share" in raw else Reason.NO_TEXT
    if type(at) is not int or not 0 < at < 1 << 47:
        left_out, at = left_out or Reason.NO_AUTHOR, last * 1000
    elif "timestamp_ms" not in raw and at < 1 << 33:
        at *= 1000  # until 2018, in seconds
    second = at // 1000
    text = "" if left_out else text
    return make_message(
        (at << 12, author, name or None, second, local_time(second), text, left_out)
    )


@functools.lru_cache(1 << 12)
def read_author(name: str) -> tuple[str | None, str]:
    name = undo_mojibake(name)
    return f"messenger:{name}" if name else None, name
