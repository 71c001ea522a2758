"""Discord: a channel as DiscordChatExporter writes it (JSON), in one file or several parts."""

import collections
import datetime
import itertools
import json
import operator
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason, local_time, make_message
from exports.repair import MessageCursor
from exports.source import Source

NUM_PASSES = 1
SAME_IDS = True
# Where a message or the array of them begins.
BEGINS = re.compile(
    r'\{\s*"id"\s*:\s*"\d+"\s*,\s*"type"\s*:\s*"\w+"\s*,\s*"timestamp"'
    r'|(?P<type>"messages")\s*:\s*(?=\[)'
)
CHANNEL = re.compile(r'\s*\{\s*"guild"\s*:')
TYPES = {"DirectTextChat": "personal_chat", "DirectGroupTextChat": "private_group"}
OWN_TYPES = ("Default", "Reply", "0", "19")
BOT_TYPES = ("20", "23", "ChatInputCommand", "ContextMenuCommand")
DELETED_USER = "Deleted User"
MARKUP = re.compile(r"<(?:a?(:\w+:)\d+|@!?(\d+)|[@#]&?\d+|t:-?\d+(?::\w)?)>")
GIF = re.compile(r"https://(?:tenor\.com/view|giphy\.com/gifs|media\.giphy\.com)/\S+$")
SUFFIXES = {
    "<photo>": "jpg jpeg png webp heic avif",
    "<gif>": "gif",
    "<video>": "mp4 mov webm mkv",
    "<audio>": "mp3 wav flac m4a ogg",
}
BY_SUFFIX = {suffix: mark for mark, names in SUFFIXES.items() for suffix in names.split()}
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
        parts = (messages(part, repairs) for part in source.parts)
        yield chat, itertools.chain.from_iterable(parts)
    else:
        repairs[NO_CHANNEL] += 1


def find_channel(head: str) -> Chat | None:
    """Make the Chat of the beginning of a file; None where that is damaged."""
    guild, channel = object_at(head, "guild"), object_at(head, "channel")
    number = str(channel.get("id"))
    if not re.fullmatch(r"\d{1,20}", number):
        return None
    chat_type = TYPES.get(str(channel.get("type")), "private_supergroup")
    name = str(channel.get("name") or number)
    if chat_type == "private_supergroup":
        name = f"{guild.get('name')} #{name}"
    owner = find_owner(head, name) if chat_type == "personal_chat" else None
    return Chat(f"discord:c{number}", number, chat_type, whole_text(name), owner)


def object_at(head: str, key: str) -> dict:
    """Decode the object behind a key; empty where it is damaged."""
    place = re.search(rf'"{key}"\s*:\s*(?={{)', head)
    try:
        value, _ = json.JSONDecoder().raw_decode(head, place.end() if place else len(head))
    except (ValueError, RecursionError):
        return {}
    return value


def find_owner(head: str, name: str) -> str | None:
    """Return who isn't the one as whom a chat of two people is called; None before both wrote."""
    people = {}
    for raw in MessageCursor(iter([head]), BEGINS, collections.Counter()).read():
        author = raw.get("author")
        if isinstance(author, dict):
            shown = {author.get("nickname"), author.get("name")}
            people[author_id(author)] = name in shown
    mine = [author for author, is_other in people.items() if not is_other]
    return mine[0] if len(people) == 2 and len(mine) == 1 else None


def author_id(author: dict) -> str | None:
    number = str(author.get("id"))
    return f"discord:{number}" if re.fullmatch(r"\d{1,20}", number) else None


def messages(part: Source, repairs: collections.Counter) -> Iterator[Message]:
    last = 0
    for raw in MessageCursor(part.text(repairs), BEGINS, repairs).read():
        message = read_message(raw, last)
        last = message.at
        yield message


def read_message(raw: dict, last: int) -> Message:
    """Make a Message of a JSON object; without a time it is as late as the one before, `last`."""
    get = raw.get
    author, (at, date), text = get("author"), read_time(get("timestamp"), last), ""
    author = author if isinstance(author, dict) else {}
    person, name = author_id(author), author.get("nickname") or author.get("name")
    left_out = ""
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
        content, mentions = get("content"), get("mentions")
        text = clean_text(content, mentions) or first_mark(get("attachments"), get("stickers"))
        left_out = "" if text else Reason.NO_TEXT
    name = whole_text(name) if isinstance(name, str) and name != DELETED_USER else None
    return make_message(
        (snowflake(get("id")), person, name, at, date or local_time(at), text, left_out)
    )


def read_time(written: object, last: int) -> tuple[int, str]:
    """Return (seconds since 1970, local time as written); (`last`, "") of what isn't a time."""
    try:
        time = datetime.datetime.fromisoformat(str(written))
        at = int((time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp())
    except (ValueError, OverflowError):
        return last, ""
    return (at, time.isoformat()[:19]) if 0 <= at < 1 << 37 else (last, "")


def snowflake(written: object) -> int | None:
    """Return an id of Discord's as a number; None where it isn't one."""
    number = int(written) if re.fullmatch(r"[0-9]{1,19}", written := str(written)) else 0
    return number if 0 < number < 1 << 62 else None


def clean_text(content: object, mentions: object = None) -> str:
    """Write mentions and Discord's own emojis as people see them; those unknown are dropped."""
    if not isinstance(content, str):
        return ""
    content = whole_text(content).strip()
    if GIF.match(content):
        return "<gif>"
    if "<" not in content:
        return content
    names = {}
    for person in mentions if isinstance(mentions, list) else ():
        if isinstance(person, dict):
            names[str(person.get("id"))] = f"@{person.get('nickname') or person.get('name')}"
    return MARKUP.sub(lambda match: match[1] or names.get(match[2], ""), content).strip()


def first_mark(attachments: object, stickers: object) -> str:
    for file in attachments if isinstance(attachments, list) else ():
        return file_mark(str(file.get("fileName")) if isinstance(file, dict) else "")
    return "<sticker>" if stickers else ""


def file_mark(name: str) -> str:
    if name.endswith("voice-message.ogg"):
        return "<voice>"
    return BY_SUFFIX.get(name.rpartition(".")[2].lower(), "<file>")


def whole_text(text: str) -> str:
    """Replace half characters (lone surrogates), which JSON can spell and no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
