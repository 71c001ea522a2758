"""Telegram Desktop's `result.json`, of an account or of one chat; damaged, as far as it goes."""

import collections
import datetime
import functools
import json
import mimetypes
import re
from collections.abc import Iterable, Iterator
from typing import Any

from cli import UserError
from exports import SUPPORTED, Chat, Message, Reason, fix_dst, iso_time, make_message
from exports.content import without_surrogates
from exports.repair import Cursor, mend
from exports.source import Source

NUM_PASSES = 1  # over the file
# Where a message, the owner or a chat begins. Telegram writes these keys first, in this order, and
# nothing that people type looks like it, for their quotes are escaped.
BEGINS = re.compile(
    r"""\{\s*"id"\s*:\s*-?\d+\s*,\s*"type"\s*:\s*"(?:message|service|unsupported)"
    |"personal_information"\s*:\s*\{\s*"user_id"\s*:\s*(?P<owner>\d{1,40})
    |(?:\{\s*(?:"name"\s*:\s*(?P<name>null|"(?:[^"\\]|\\.)*+")\s*,\s*)?)?
     "type"\s*:\s*(?P<type>null|"\w*")\s*,\s*"id"\s*:\s*(?P<id>-?\d{1,40}|"[^"]{0,40}")\s*,\s*
     (?:"\w+"\s*:\s*(?:"(?:[^"\\]|\\.)*+"|[\w.-]+)\s*,\s*){0,9}"messages"\s*:\s*(?=\[)""",
    re.VERBOSE,
)
NO_HEAD = "messages of chats whose head (name, type, id) can't be read, left out"
ODD_ID = re.compile(
    r'"id"\s*:\s*(?!-?\d{1,40}\s*,)([^\s,"{}[\]]{1,60})\s*,'
    r'\s*"messages"\s*:\s*\[\s*\Z',
)
DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d:]+$", re.ASCII)
MEDIA = {
    "voice_message": "<voice>",
    "video_message": "<video>",
    "video_file": "<video>",
    "animation": "<gif>",
    "audio_file": "<audio>",
}
MARKS = (
    ("photo", "<photo>"),
    ("file", "<file>"),
    ("poll", "<poll>"),
    ("todo_list", "<list>"),
    ("contact_information", "<contact>"),
    ("location_information", "<location>"),
    ("place_name", "<location>"),
    ("game_title", "<game>"),
)
NAMELESS = {  # chats that have no name of their own
    "saved_messages": "Saved Messages",
    "replies": "Replies",
    "verification_codes": "Verification Codes",
}
PEERS = {  # what an id is of, by the type of the chat
    "user": ("personal_chat", "bot_chat", "saved_messages", "replies", "verification_codes"),
    "chat": ("private_group",),
    "channel": ("private_supergroup", "public_supergroup", "private_channel", "public_channel"),
}

NAMED = "telegram:"  # before the name of an author who has no id
PEER = re.compile(r"(?:user|chat|channel)\d{1,40}", re.ASCII)
# Other tools write chats in this shape too. KnugiHK's WhatsApp-Chat-Exporter (--telegram), as of
# 2026-01: `user00000` is the phone's owner, others are `user` and a number or a name, a time is a
# number, a new line <br>, and what isn't text is a file's path or one of these sentences.
EVENTS = re.compile(
    r"(?:Message deleted|The media is (?:missing|omitted in the chat)"
    r"|The message is binary data and its base64 is .*"
    r"|A (?:video|voice) call (?:was missed|(?:to|from) .*))$",
    re.DOTALL,
)
SENTENCES = (
    ("Location shared: (", "<location>"),
    ("This media include the following vCard file(s):", "<contact>"),
)
PATH = re.compile(r"(?:[^\n/]+/)*(?:WhatsApp(?: Business)?|Message)/Media/[^\n]*\.\w{2,5}$")
JID = re.compile(r"(?::\d+)?@(?:s\.whatsapp\.net|c\.us)$")


def can_read(head: str) -> bool:
    keys = r'"(?:personal_information|chats|left_chats|messages)"\s*:'
    return head.lstrip("\ufeff \t\r\n").startswith("{") and bool(re.search(keys, head))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. Damage costs no more than the message or the chat that it hit."""
    cursor = Cursor(source.text(repairs), BEGINS, repairs)
    owner, any_chat, damaged = None, False, False
    closing = "}]}}"  # how the file ends; "}" where it is a single chat
    author_style, lost = find_author_style(source.head()), NO_HEAD
    while begins := cursor.next():
        cursor.at = begins.end()
        if begins["owner"]:
            owner = f"user{begins['owner']}"
            continue
        if not any_chat and not cursor.text[: begins.start()].strip():
            closing = "}"
        any_chat = True
        if not begins["type"]:  # a message outside of any chat
            head = ODD_ID.search(cursor.text, max(0, begins.start() - 200), begins.start())
            if head:
                lost = f"messages of a chat whose id can't be read ({head[1]}), left out"
            repairs[lost] += 1
            continue
        chat, objects, lost = read_head(begins, owner), cursor.messages(), NO_HEAD
        owner = chat.owner
        telegram = author_style == "telegram"
        yield chat, messages(objects if telegram else convert(objects, chat, author_style), source)
        collections.deque(objects, 0)  # what the caller left unread
        damaged = damaged or cursor.lost
    if not any_chat and re.search(r'"messages"\s*:\s*\[', source.head()):
        raise UserError(
            f"{source} is not a Telegram export: no chat begins in it as Telegram writes one",
            SUPPORTED,
        )
    if damaged or not is_closed(cursor.text[cursor.at :], closing):
        repairs["files cut off, or damaged between messages, read as far as possible"] += 1


def is_closed(rest: str, closing: str) -> bool:
    """Return whether what follows the last messages closes all brackets that are open."""
    brackets = re.sub(r'"(?:[^"\\]|\\.)*"|[^][{}]', "", rest)
    still_open = len(closing) - sum(-1 if bracket in "[{" else 1 for bracket in brackets)
    return brackets.endswith(closing[1:] or closing) or still_open == 0


def read_head(begins: re.Match, owner: str | None) -> Chat:
    """Make the Chat of a match of its head. Saved Messages tell whose the export is."""
    chat_type, number = begins["type"].strip('"'), begins["id"].strip('"')
    chat_type = "unknown" if chat_type == "null" else chat_type
    # A group that turns public keeps its key.
    prefix = next((peer for peer, types in PEERS.items() if chat_type in types), chat_type)
    name = json.loads(mend(begins["name"] or "null"), strict=False)
    name = name or NAMELESS.get(chat_type, "Deleted Account")
    if chat_type == "saved_messages":
        owner = owner or f"user{number}"
    return Chat(prefix + number, number, chat_type, without_surrogates(name), owner)


@functools.lru_cache(1 << 16, typed=True)
def author_id(value: str | int) -> str | None:
    """Return `user123` for `user123`, `123` or 123; None for what isn't an id.

    The bits above 32 of a bare number (before 2021-04) say what it is the id of.
    """
    text = str(value)
    if text.startswith(NAMED):
        return text
    if re.fullmatch(r"\d{1,18}", text, re.ASCII):
        kind, number = divmod(int(text), 1 << 32)
        return {1: f"chat{number}", 2: f"channel{number}"}.get(kind, f"user{text}")
    return text if PEER.fullmatch(text) else None


def find_author_style(head: str) -> str:
    """Return how a file's messages say who wrote them, from its first characters.

    "telegram": as Telegram does. "id" or "name": another tool wrote this single chat, with ids of
    its own or with names alone. Most messages decide: one that is damaged changes nothing.
    """
    count = len(re.findall(r'"type"\s*:\s*"message"', head))
    times = re.findall(r'"date_unixtime"\s*:\s*("?)\d', head)
    peers = re.findall(r'"from_id"\s*:\s*"?(?:user|chat|channel)?\d{1,18}"?\s*[,}]', head)
    foreign = 2 * len(peers) < count or 2 * times.count("") > len(times)
    if '"personal_information"' in head or not foreign:
        return "telegram"
    return "id" if '"from_id"' in head else "name"


def convert(objects: Iterable, chat: Chat, author_style: str) -> Iterator:
    """Turn another tool's messages into those that Telegram would have written."""
    key = "from_id" if author_style == "id" else "from"
    for raw in objects:
        if not isinstance(raw, dict):
            yield raw
            continue
        author, name = foreign_author(raw.get(key), author_style)
        name = raw.get("from") or name
        if author == chat.key and name in (None, chat.id):
            name = chat.name  # there the other side of a personal chat is a number
        text, kind = re.sub(" ?<br>", "\n", flat_text(raw.get("text"))).strip(), raw.get("type")
        by_group = author == f"user{chat.id}" and "group" in chat.type  # "Ann left" and the like
        if EVENTS.match(text) or by_group:
            kind = "service"
        elif PATH.match(text):
            text = file_mark(text)
        text = next((mark for start, mark in SENTENCES if text.startswith(start)), text)
        yield raw | {"from": name, "from_id": author, "type": kind, "text": text}


def foreign_author(written: object, author_style: str) -> tuple[str | None, str | None]:
    """Return (id, name or None) of an author as another tool writes one; (None, None) of nobody."""
    if isinstance(written, bool) or not isinstance(written, (str, int)):
        return None, None
    author = JID.sub("", str(written).strip())
    if author_style == "id" and re.fullmatch(r"\+?\d{1,40}", author):
        author = "user" + author.removeprefix("+")
    if PEER.fullmatch(author) and author_style == "id":
        return author, None
    return (NAMED + author, author) if author else (None, None)


def file_mark(path: str) -> str:
    """Return the mark for a file, by its path."""
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    if kind == "audio" or path.endswith(".opus"):
        return "<voice>" if "Voice" in path or path.endswith(".opus") else "<audio>"
    if path.endswith(".webp"):
        return "<sticker>"
    return {"image": "<photo>", "video": "<video>"}.get(kind, "<file>")


def flat_text(text: object) -> str:
    """Return the words of a string, of `{type, text}` whatever the type, or of a list of these."""
    if isinstance(text, str):
        return text
    if isinstance(text, dict):
        return flat_text(text.get("text"))
    return "".join(map(flat_text, text)) if isinstance(text, list) else ""


def messages(objects: Iterable, source: Source) -> Iterator[Message]:
    last = 0
    for raw in objects:
        message = read_message(raw, last, source)
        last = message.at
        yield message


def read_message(raw: object, last: int, source: Source) -> Message:
    """Make a Message of a JSON object; without a date it is as late as the one before, `last`."""
    if not isinstance(raw, dict):
        return Message(None, None, None, last, iso_time(last), "", Reason.DAMAGED)
    get = raw.get
    author, date, kind = get("from_id"), get("date"), get("type")
    at = read_time(get("date_unixtime"), date, last)
    author = author_id(author) if isinstance(author, (str, int)) else None
    text, left_out = "", ""
    if kind != "message":
        left_out = Reason.SERVICE if kind == "service" else Reason.UNSUPPORTED
    elif "forwarded_from" in raw or "saved_from" in raw:
        left_out = Reason.FORWARD
    elif "via_bot" in raw or "inline_bot_buttons" in raw:
        left_out = Reason.BOT
    elif at is None or author is None:
        left_out = Reason.NO_AUTHOR
    else:
        text = without_surrogates(flat_text(get("text"))).strip() or media_mark(raw, source)
        left_out = "" if text else Reason.NO_TEXT
    at = last if at is None else at
    if not isinstance(date, str) or not DATE.match(date):
        date = iso_time(at)
    number, name = get("id"), get("from")
    name = without_surrogates(name) if isinstance(name, str) else None
    if not isinstance(number, int) or abs(number) >= 1 << 62:
        number = None
    return make_message((number, author, name, at, date, text, left_out))


def read_time(unixtime: Any, date: Any, last: int) -> int | None:
    """Return seconds since 1970, of local time where that is all there is; None of neither."""
    try:
        at = int(unixtime)
        if 0 <= at < 1 << 37:  # the year 6325
            return at
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        local = datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)
        return fix_dst(int(local.timestamp()), last)
    except (TypeError, ValueError, OverflowError):
        return None


def media_mark(raw: dict, source: Source) -> str:
    """Return what stands for media: a transcript beside a voice message, an emoji, else a mark."""
    media, file = raw.get("media_type"), raw.get("file")
    if media in ("voice_message", "video_message") and isinstance(file, str):
        transcript = source.beside(file.rpartition(".")[0] + ".txt") or source.beside(file + ".txt")
        if transcript and transcript.strip():
            return transcript.strip()
    if media == "sticker":
        return without_surrogates(flat_text(raw.get("sticker_emoji"))) or "<sticker>"
    if isinstance(media, str) and media in MEDIA:
        return MEDIA[media]
    return next((mark for key, mark in MARKS if key in raw), "")
