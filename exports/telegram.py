"""Telegram Desktop's `result.json`, full or of a single chat, read as a stream and, where it is damaged, as far as it goes."""

import collections
import datetime
import json
import re

from config import UserError
from exports import DELETED, WHAT_TO_GIVE, Chat, Message, forward, make
from exports.repair import Cursor, Damaged, mend

PASSES = 1  # over the file
# Telegram writes these keys first, in this order; nothing that people typed can look like it, for their quotes are escaped.
BEGINS = re.compile(
    r"""\{\s*"id"\s*:\s*-?\d+\s*,\s*"type"\s*:\s*"(?:message|service|unsupported)"
    |(?:\{\s*(?:"name"\s*:\s*(?P<name>null|"(?:[^"\\]|\\.)*+")\s*,\s*)?)?
     "type"\s*:\s*(?P<type>null|"\w*")\s*,\s*"id"\s*:\s*(?P<id>-?\d{1,18})\s*,\s*"messages"\s*:\s*(?=\[)""",
    re.VERBOSE,
)
USER = re.compile(r'\{\s*"user_id"\s*:\s*(\d{1,18})')
MEDIA = {"voice_message": "<voice>", "video_message": "<video>", "video_file": "<video>", "animation": "<gif>", "audio_file": "<audio>"}
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
NAMELESS = {"saved_messages": "Saved Messages", "replies": "Replies", "verification_codes": "Verification Codes"}
KINDS = {
    "user": ("personal_chat", "bot_chat", "saved_messages", "replies", "verification_codes"),
    "chat": ("private_group",),
    "channel": ("private_supergroup", "public_supergroup", "private_channel", "public_channel"),
}


def recognises(head):
    return head.lstrip("\ufeff \t\r\n").startswith("{") and bool(re.search(r'"(?:personal_information|chats|left_chats|messages)"', head))


def read(source, notes):
    """See `exports.read`. A file that is damaged between its messages is read on chat by chat, wherever one plainly begins."""
    cursor, account = Cursor(source.pieces(notes), BEGINS, notes), {}
    try:
        yield from chats(cursor, source, account)
        if cursor.peek():  # something behind the end: a bracket was missing
            raise Damaged
    except Damaged:
        notes["files that end early or are damaged between messages, read as far as they go"] += 1
        yield from rest(cursor, source, account)
    if "found" not in account:
        raise UserError(f"{source} is not a Telegram export: neither chats nor messages in it", WHAT_TO_GIVE)


def chats(cursor, source, account, skim=False):
    """Walk the whole file. The root of a single chat's export is that chat. `skim`: only note each chat's head in `account`."""

    def one():
        header = {}
        for key in cursor.keys():
            if key == "messages" and skim:
                account["heads"].append(header)  # of which some keys may still follow
                cursor.skip()
            elif key == "messages":
                account["read"] = account.get("read", 0) + 1
                head = header if {"type", "id"} <= header.keys() else following(source, account)
                if head:
                    yield from messages_here(cursor, source, head, account)
                else:
                    cursor.notes["chats whose head is damaged, left out"] += 1
                    cursor.skip()
            elif key in ("name", "type", "id"):
                header[key] = cursor.value()
            elif key == "personal_information":
                owner(cursor, account)
            elif key in ("chats", "left_chats"):
                account["found"] = True
                yield from listed()
            else:
                cursor.skip()

    def listed():
        for key in cursor.keys():
            if key == "list":
                for _ in cursor.elements():
                    yield from one()
            else:
                cursor.skip()

    yield from one()


def following(source, account):
    """The head of a chat whose messages come first, for some tool sorted the keys: the file is walked once more, for all such heads."""
    if "heads" not in account:
        account["heads"] = []
        try:
            collections.deque(chats(Cursor(source.pieces(collections.Counter()), BEGINS, collections.Counter()), source, account, True), 0)
        except Damaged:
            pass
    head = account["heads"][account["read"] - 1] if account["read"] <= len(account["heads"]) else {}
    return head if {"type", "id"} <= head.keys() else None


def rest(cursor, source, account):
    """Read on behind a damage: every chat whose head is whole."""
    while True:
        cursor.at = cursor.find(0)
        begins = BEGINS.match(cursor.text, cursor.at)
        if not begins and cursor.ended:
            return
        if not begins:
            cursor.more()
        elif not begins["type"]:
            cursor.notes["messages of chats whose head is damaged, left out"] += 1
            cursor.at = begins.end()
        else:
            cursor.at = begins.end()
            header = {key: json.loads(mend(begins[key] or "null"), strict=False) for key in ("name", "type", "id")}
            try:
                yield from messages_here(cursor, source, header, account)
            except Damaged:
                continue


def messages_here(cursor, source, header, account):
    """Yield the (Chat, messages) whose array begins at the cursor, then move behind what the caller left unread."""
    account["found"] = True
    raw = cursor.messages()
    yield describe(header, account), messages(raw, source)
    for _ in raw:
        pass
    if cursor.lost:
        raise Damaged


def owner(cursor, account):
    """Note whose account it is. The number is taken before the rest is read, which may be damaged."""
    if found := USER.match(cursor.text, cursor.at):
        account["owner"] = f"user{found[1]}"
        cursor.skip()
    else:
        value = cursor.value()
        if isinstance(value, dict) and peer(value.get("user_id")):
            account["owner"] = f"user{value['user_id']}"


def describe(header, account):
    kind, number = header.get("type"), whole(str(header.get("id")))
    kind = kind if isinstance(kind, str) else "unknown"
    if kind == "saved_messages" and not account.get("owner"):
        account["owner"] = f"user{number}"
    key = next((peer for peer, kinds in KINDS.items() if kind in kinds), kind) + number  # a group that turns public stays itself
    name = header.get("name") or NAMELESS.get(kind)
    return Chat(key, number, kind, whole(name) if isinstance(name, str) else DELETED, account.get("owner"))


def peer(value):
    """`user123` for `user123`, `123` or 123; None for what is no id. A bare number (before 2021-04) says the kind of peer above 32 bits."""
    text = str(value) if isinstance(value, (str, int)) else ""
    if re.fullmatch(r"\d{1,18}", text, re.ASCII):
        kind, number = divmod(int(text), 1 << 32)
        return {1: f"chat{number}", 2: f"channel{number}"}.get(kind, f"user{text}")
    return text if re.fullmatch(r"(user|chat|channel)\d{1,18}", text, re.ASCII) else None


def flat(text):
    """A string, or a list that mixes strings and `{type, text}`, of whatever type."""
    if isinstance(text, list):
        return "".join(part if isinstance(part, str) else flat(part.get("text")) if isinstance(part, dict) else "" for part in text)
    return text if isinstance(text, str) else ""


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
    number, author, name, date, kind = get("id"), get("from_id"), get("from"), get("date"), get("type")
    text, left_out = "", ""
    at = seconds(get("date_unixtime"), date, last)
    if author.__class__ is not str or author[:4] != "user" or not author[4:].isdecimal():
        author = peer(author)
    if kind != "message":
        left_out = "service messages" if kind == "service" else "messages of an unsupported kind"
    elif "forwarded_from" in raw or "saved_from" in raw:
        left_out = "forwards"
    elif "via_bot" in raw or "inline_bot_buttons" in raw:
        left_out = "written by or via a bot"
    elif at is None or author is None:
        left_out = "messages without author or date"
    else:
        text = get("text")
        if text.__class__ is not str:
            text = flat(text)
        text = (text if text.isascii() else whole(text)).strip() or mark(raw, source)
        left_out = "" if text else "messages without text"
    if at is None:
        at = last
    if date.__class__ is not str or date[4:5] != "-" or date[10:11] != "T" or not date.isascii():
        date = iso(at)
    if name is not None and (name.__class__ is not str or not name.isascii()):
        name = whole(name) if isinstance(name, str) else None
    if number.__class__ is not int or abs(number) >= 1 << 62:
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
        return forward(int(datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC).timestamp()), last)
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
