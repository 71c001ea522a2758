"""Discord: a channel as DiscordChatExporter writes it (JSON), in one file or several parts."""

import collections
import itertools
import operator
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason, discord_fields, local_time, make_message, read_each
from exports.content import as_dict, as_list, as_text, value_behind, without_surrogates
from exports.repair import MessageCursor, read_messages
from exports.source import Source

NUM_PASSES = 1
SAME_IDS = True
# Where a message or the array of them begins.
BEGINS = re.compile(
    r'\{\s*"id"\s*:\s*"\d+"\s*,\s*"type"\s*:\s*"\w+"\s*,\s*"timestamp"'
    r'|(?P<type>"messages")\s*:\s*(?=\[)'
)
CHANNEL = re.compile(r'\s*\{\s*"guild"\s*:')
OWN_TYPES = ("Default", "Reply", "0", "19")
BOT_TYPES = ("20", "23", "ChatInputCommand", "ContextMenuCommand")
DELETED_USER = "Deleted User"
NO_CHANNEL = "files of channels whose head can't be read, left out"


def can_read(head: str) -> bool:
    return bool(CHANNEL.match(head.removeprefix("\ufeff"))) and '"channel"' in head


def group(sources: list[Source]) -> list[list[Source]]:
    """Put the parts of a channel together, the oldest first."""
    channels: dict[object, list[tuple[str, Source]]] = collections.defaultdict(list)
    for source in sources:
        head = source.head()
        channel = find_channel(head)
        first = re.search(r'"timestamp"\s*:\s*"([^"]*)"', head)
        channels[channel.key if channel else source].append((first[1] if first else "", source))
    by_time = operator.itemgetter(0)
    return [[source for _, source in sorted(parts, key=by_time)] for parts in channels.values()]


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. A file holds one channel: damage costs the messages that it hit."""
    if chat := find_channel(source.head()):
        parts = (read_messages(part, BEGINS, repairs) for part in source.parts)
        yield chat, read_each(itertools.chain.from_iterable(parts), read_message)
    else:
        repairs[NO_CHANNEL] += 1


def find_channel(head: str) -> Chat | None:
    """Make the Chat of the beginning of a file; None where that is damaged."""
    guild, channel = (as_dict(value_behind(head, key)) for key in ("guild", "channel"))
    number = str(channel.get("id"))
    if not re.fullmatch(r"\d{1,20}", number):
        return None
    kind, name = discord_fields.chat_type(channel), str(channel.get("name") or number)
    if kind == "private_supergroup":
        name = f"{guild.get('name')} #{name}"
    owner = find_owner(head, name) if kind == "personal_chat" else None
    return Chat(f"discord:c{number}", number, kind, without_surrogates(name), owner)


def find_owner(head: str, name: str) -> str | None:
    """Return who isn't the one as whom a chat of two people is called; None before both wrote."""
    people = {}
    for raw in MessageCursor(iter([head]), BEGINS, collections.Counter()).read():
        if author := as_dict(as_dict(raw).get("author")):
            shown = author.get("nickname"), author.get("name")
            people[discord_fields.author_id(author)] = name in shown
    mine = [author for author, is_other in people.items() if not is_other]
    return mine[0] if len(people) == 2 and len(mine) == 1 else None


def read_message(raw: dict, last: int) -> Message:
    """Make a Message of a JSON object; without a time it is as late as the one before, `last`."""
    get = raw.get
    author = as_dict(get("author"))
    person = discord_fields.author_id(author)
    name = as_text(author.get("nickname") or author.get("name"))
    at, date = discord_fields.read_time(get("timestamp"), last)
    text, left_out = "", ""
    if not raw:
        left_out = Reason.DAMAGED
    elif author.get("isBot") or get("type") in BOT_TYPES:
        left_out = Reason.BOT
    elif get("type") not in OWN_TYPES:
        left_out = Reason.SERVICE
    elif "forwardedMessage" in raw:
        left_out = Reason.FORWARD
    elif not person or not date:
        left_out = Reason.NO_AUTHOR
    else:
        text = discord_fields.clean_text(get("content"), get("mentions"))
        text = text or first_mark(as_list(get("attachments")), get("stickers"))
        left_out = "" if text else Reason.NO_TEXT
    shown = name if name not in ("", DELETED_USER) else None
    number = discord_fields.snowflake(get("id"))
    return make_message((number, person, shown, at, date or local_time(at), text, left_out))


def first_mark(attachments: list, stickers: object) -> str:
    if attachments:
        return discord_fields.attachment_mark(str(as_dict(attachments[0]).get("fileName") or ""))
    return "<sticker>" if stickers else ""
