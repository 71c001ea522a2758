"""Telegram Desktop's `result.json`, full or of a single chat, read as a stream and, where it is damaged, as far as it goes."""

import collections
import datetime
import functools
import json
import mimetypes
import re
from collections.abc import Iterable, Iterator

from cli import UserError
from exports import DELETED, WHAT_TO_GIVE, Chat, Message, fix_dst, make
from exports.repair import Cursor, mend

NUM_PASSES = 1  # over the file
# Telegram writes these keys first, in this order; nothing that people typed can look like it, for their quotes are escaped.
BEGINS = re.compile(
    r"""\{\s*"id"\s*:\s*-?\d+\s*,\s*"type"\s*:\s*"(?:message|service|unsupported)"
    |"personal_information"\s*:\s*\{\s*"user_id"\s*:\s*(?P<owner>\d{1,40})
    |(?:\{\s*(?:"name"\s*:\s*(?P<name>null|"(?:[^"\\]|\\.)*+")\s*,\s*)?)?
     "type"\s*:\s*(?P<type>null|"\w*")\s*,\s*"id"\s*:\s*(?P<id>-?\d{1,40}|"[^"]{0,40}")\s*,\s*
     (?:"\w+"\s*:\s*(?:"(?:[^"\\]|\\.)*+"|[\w.-]+)\s*,\s*){0,9}"messages"\s*:\s*(?=\[)""",
    re.VERBOSE,
)
UNREAD = "messages of chats whose head (name, type, id) can't be read, left out"
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
NAMELESS = {
    "saved_messages": "Saved Messages",
    "replies": "Replies",
    "verification_codes": "Verification Codes",
}
KINDS = {
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


def can_read(head):
    return head.lstrip("\ufeff \t\r\n").startswith("{") and bool(
        re.search(r'"(?:personal_information|chats|left_chats|messages)"', head)
    )


def read(source, notes):
    """See `exports.read`. Chats and messages are looked for where they plainly begin: what is broken costs no more than itself."""
    cursor, owner, closing, found, broken = (
        Cursor(source.pieces(notes), BEGINS, notes),
        None,
        "}]}}",
        False,
        False,
    )
    known_by, unread = authors_of(source.head()), UNREAD
    while begins := cursor.next():
        cursor.at = begins.end()
        if begins["owner"]:
            owner = f"user{begins['owner']}"
            continue
        if not found and not cursor.text[: begins.start()].strip():
            closing = "}"  # the file is a single chat
        found = True
        if begins["type"]:
            chat, raw, unread = describe(begins, owner), cursor.messages(), UNREAD
            owner = chat.owner
            own = raw if known_by == "telegram" else as_telegram(raw, chat, known_by)
            yield chat, messages(own, source)
            collections.deque(raw, 0)  # what the caller left unread
            broken = broken or cursor.lost
        else:
            if odd := ODD_ID.search(cursor.text, max(0, begins.start() - 200), begins.start()):
                unread = f"messages of a chat whose id can't be read ({odd[1]}), left out"
            notes[unread] += 1
    if not found and re.search(r'"messages"\s*:\s*\[', source.head()):
        raise UserError(
            f"{source} is not a Telegram export: no chat begins in it as Telegram writes one",
            WHAT_TO_GIVE,
        )
    if broken or not closed(cursor.text[cursor.at :], closing):
        notes["files cut off, or damaged between messages, read as far as possible"] += 1


def closed(rest, closing):
    """Whether what stands behind the last messages ends all that was open before them."""
    brackets = re.sub(r'"(?:[^"\\]|\\.)*"|[^][{}]', "", rest)
    return brackets.endswith(closing[1:] or closing) or len(closing) == sum(
        -1 if one in "[{" else 1 for one in brackets
    )


def describe(begins, owner):
    """The match of a chat's head → Chat. Saved Messages say whose they are."""
    kind, number = begins["type"].strip('"'), begins["id"].strip('"')
    kind = "unknown" if kind == "null" else kind
    key = (
        next((peer for peer, kinds in KINDS.items() if kind in kinds), kind) + number
    )  # a group that turns public stays itself
    name = json.loads(mend(begins["name"] or "null"), strict=False) or NAMELESS.get(kind, DELETED)
    return Chat(
        key,
        number,
        kind,
        whole(name),
        owner or (f"user{number}" if kind == "saved_messages" else None),
    )


@functools.lru_cache(1 << 16, typed=True)
def peer(value):
    """`user123` for `user123`, `123` or 123; None for what is no id. A bare number (before 2021-04) says the kind of peer above 32 bits."""
    text = str(value)
    if text.startswith(NAMED):
        return text
    if re.fullmatch(r"\d{1,18}", text, re.ASCII):
        kind, number = divmod(int(text), 1 << 32)
        return {1: f"chat{number}", 2: f"channel{number}"}.get(kind, f"user{text}")
    return text if PEER.fullmatch(text) else None


def authors_of(head: str) -> str:
    """Find how a file's messages say who wrote them, from its first characters.

    `telegram`: as Telegram does. `id` or `name`: another tool wrote this single chat, with ids of its
    own or with names alone. Most messages decide: a damaged one doesn't make its author a stranger.
    """
    count = len(re.findall(r'"type"\s*:\s*"message"', head))
    times = re.findall(r'"date_unixtime"\s*:\s*("?)\d', head)
    peers = re.findall(r'"from_id"\s*:\s*"?(?:user|chat|channel)?\d{1,18}"?\s*[,}]', head)
    foreign = 2 * len(peers) < count or 2 * times.count("") > len(times)
    if '"personal_information"' in head or not foreign:
        return "telegram"
    return "id" if '"from_id"' in head else "name"


def as_telegram(found: Iterable, chat: Chat, known_by: str) -> Iterator:
    """Yield another tool's messages as Telegram would have written them."""
    for raw in found:
        if not isinstance(raw, dict):
            yield raw
            continue
        author, name = foreign_author(raw.get("from_id" if known_by == "id" else "from"), known_by)
        name = raw.get("from") or name
        if author == chat.key and name in (None, chat.id):
            name = chat.name  # there the other side of a personal chat is a number
        text, kind = re.sub(" ?<br>", "\n", flat(raw.get("text"))).strip(), raw.get("type")
        by_group = author == f"user{chat.id}" and "group" in chat.type  # "Ann left" and the like
        if EVENTS.match(text) or by_group:
            kind = "service"
        elif PATH.match(text):
            text = file_mark(text)
        text = next((mark for begin, mark in SENTENCES if text.startswith(begin)), text)
        yield raw | {"from": name, "from_id": author, "type": kind, "text": text}


def foreign_author(written: object, known_by: str) -> tuple[str | None, str | None]:
    """Return (id, name or None) of an author as another tool writes one; (None, None) of nobody."""
    if isinstance(written, bool) or not isinstance(written, (str, int)):
        return None, None
    author = JID.sub("", str(written).strip())
    if known_by == "id" and re.fullmatch(r"\+?\d{1,40}", author):
        author = "user" + author.removeprefix("+")
    if PEER.fullmatch(author) and known_by == "id":
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


def flat(text):
    """The words of a string, of `{type, text}` whatever the type, or of a list of these."""
    if isinstance(text, str):
        return text
    if isinstance(text, dict):
        return flat(text.get("text"))
    return "".join(map(flat, text)) if isinstance(text, list) else ""


def whole(text):
    """Text without half characters (lone surrogates, which JSON can spell and no file can hold)."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def messages(found, source):
    """Decoded objects → Messages. One without a date is as late as the one before it."""
    last = 0
    for raw in found:
        one = message(raw, last, source)
        last = one.at
        yield one


def message(raw, last, source):
    """One JSON object → Message. What is no message of somebody's own says so in `left_out`."""
    if not isinstance(raw, dict):
        return Message(None, None, None, last, iso(last), "", "damaged messages")
    get = raw.get
    number, author, name, date, kind = (
        get("id"),
        get("from_id"),
        get("from"),
        get("date"),
        get("type"),
    )
    at = seconds(get("date_unixtime"), date, last)
    author = peer(author) if isinstance(author, (str, int)) else None
    text, left_out = "", ""
    if kind != "message":
        left_out = "service messages" if kind == "service" else "messages of an unsupported kind"
    elif "forwarded_from" in raw or "saved_from" in raw:
        left_out = "forwards"
    elif "via_bot" in raw or "inline_bot_buttons" in raw:
        left_out = "written by or via a bot"
    elif at is None or author is None:
        left_out = "messages without author or date"
    else:
        text = whole(flat(get("text"))).strip() or mark(raw, source)
        left_out = "" if text else "messages without text"
    at = last if at is None else at
    if not isinstance(date, str) or not DATE.match(date):
        date = iso(at)
    name = whole(name) if isinstance(name, str) else None
    if not isinstance(number, int) or abs(number) >= 1 << 62:
        number = None
    return make((number, author, name, at, date, text, left_out))


def seconds(unixtime, date, last):
    """When a message was sent, in seconds since 1970; where only its local time is known, that. None when neither can be read."""
    try:
        at = int(unixtime)
        if 0 <= at < 1 << 37:  # the year 6325
            return at
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        return fix_dst(
            int(datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC).timestamp()),
            last,
        )
    except (TypeError, ValueError, OverflowError):
        return None


def iso(at):
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()[:19]


def mark(raw, source):
    """What stands for a message without words: a transcript that lies beside a voice message, a sticker's emoji, else a mark."""
    media, file = raw.get("media_type"), raw.get("file")
    if media in ("voice_message", "video_message") and isinstance(file, str):
        said = source.beside(file.rpartition(".")[0] + ".txt") or source.beside(file + ".txt")
        if said and said.strip():
            return said.strip()
    if media == "sticker":
        return whole(flat(raw.get("sticker_emoji"))) or "<sticker>"
    if isinstance(media, str) and media in MEDIA:
        return MEDIA[media]
    return next((shown for key, shown in MARKS if key in raw), "")
