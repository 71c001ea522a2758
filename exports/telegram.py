"""Telegram Desktop's `result.json`, full or of a single chat, read as a stream."""

import datetime
import json

from config import UserError
from exports import DELETED, Chat, Message

PIECE = 1 << 20  # characters read at a time
MEDIA = {"voice_message": "<voice>", "video_message": "<video>", "video_file": "<video>", "animation": "<gif>", "audio_file": "<audio>"}
WHAT_TO_GIVE = "Give the result.json that Telegram Desktop wrote (Settings > Advanced > Export, format JSON)."


class Cursor:
    """A place in a JSON file. Containers are walked, values are decoded whole; a value may be cut by the end of what was read so far."""

    def __init__(self, file, path):
        self.file, self.path, self.text, self.at, self.ended = file, path, "", 0, False
        self.decode = json.JSONDecoder(strict=False).raw_decode

    def more(self):
        try:
            piece = self.file.read(PIECE)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 text: {error.reason}",
                WHAT_TO_GIVE,
            ) from None
        self.text, self.at, self.ended = self.text[self.at :] + piece, 0, not piece

    def peek(self):
        """The next character that isn't white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \n\r\t":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def expect(self, characters):
        found = self.peek()
        if not found or found not in characters:
            raise UserError(
                f"{self.path} breaks off or is damaged: {found or 'its end'!r} where one of {characters!r} belongs",
                "Export again, or cut the file after its last whole chat.",
            )
        self.at += 1
        return found

    def value(self):
        """Decode the value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number that ends with the text may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16  # `tru`, `\\u00`: the rest is still unread
                if self.ended or not cut:
                    raise UserError(
                        f"{self.path} breaks off or is damaged: {error.msg}",
                        "Export again.",
                    ) from None
            self.more()

    def keys(self):
        """Walk an object: yield each key with the cursor on its value, which the caller must consume."""
        self.expect("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key = self.value()
            self.expect(":")
            yield key
            if self.expect(",}") == "}":
                return

    def elements(self):
        """Walk an array: yield with the cursor on each element, which the caller must consume."""
        self.expect("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield
            if self.expect(",]") == "]":
                return

    def items(self):
        """Walk an array: yield its elements, decoded."""
        for _ in self.elements():
            yield self.value()


def read(path):
    """See `exports.read`."""
    with open(path, encoding="utf-8-sig") as file:
        cursor = Cursor(file, path)
        if cursor.peek() != "{":
            raise UserError(
                f"{path} is not a Telegram export: it doesn't begin with {{",
                WHAT_TO_GIVE,
            )
        owner, found = None, False
        chat = {}  # a single-chat export is a chat at the root
        for key in cursor.keys():
            if key == "personal_information":
                owner = peer((cursor.value() or {}).get("user_id"))
            elif key in ("chats", "left_chats"):
                found = True
                for inner in cursor.keys():
                    if inner != "list":
                        cursor.value()
                        continue
                    for _ in cursor.elements():
                        yield from chats(cursor, {}, owner)
            elif key == "messages":
                found = True
                yield from messages_here(cursor, chat, None)
            else:
                chat[key] = cursor.value()
        if not found:
            raise UserError(
                f"{path} is not a Telegram export: neither chats nor messages in it",
                WHAT_TO_GIVE,
            )


def chats(cursor, header, owner):
    """One chat of the list, when its messages are reached; they are held where another tool has put them before the type."""
    held = None
    for key in cursor.keys():
        if key != "messages":
            header[key] = cursor.value()
        elif "type" in header:
            yield from messages_here(cursor, header, owner)
        else:
            held = list(cursor.items())
    if held is not None:
        yield describe(header, owner), map(message, held)


def messages_here(cursor, header, owner):
    """Yield the (Chat, messages) whose array begins at the cursor, then move behind what the caller left unread."""
    raw = cursor.items()
    yield describe(header, owner), map(message, raw)
    for _ in raw:
        pass


def describe(header, owner):
    return Chat(str(header.get("id")), header.get("type") or "unknown", whole(header.get("name") or DELETED), owner)


def peer(value):
    """`user123` for `user123`, `123` or 123 (bare numbers were written before 2021-04); None stays None."""
    return f"user{value}" if value is not None and str(value).isdigit() else value


def flat(text):
    """A string, or a list that mixes strings and `{type, text}`, of whatever type."""
    return text if isinstance(text, str) else "".join(part if isinstance(part, str) else part.get("text", "") for part in text or ())


def whole(text):
    """Text without half characters (lone surrogates, which JSON can spell and no file can hold)."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def seconds(raw):
    """When a message was sent, in seconds since 1970; None where neither of its dates can be read."""
    try:
        if "date_unixtime" in raw:
            return int(raw["date_unixtime"])
        return int(datetime.datetime.fromisoformat(raw["date"]).replace(tzinfo=datetime.UTC).timestamp())
    except (KeyError, TypeError, ValueError):
        return None


def message(raw):
    """One JSON object → Message. What is no message of somebody's own says so in `left_out`."""
    if not isinstance(raw, dict):
        raw = {}
    at, text, kind = seconds(raw), whole(flat(raw.get("text", ""))).strip(), raw.get("type")
    if kind != "message":
        left_out = "service messages" if kind == "service" else "messages of an unsupported kind"
    elif "forwarded_from" in raw or "saved_from" in raw:
        left_out = "forwards"
    elif "via_bot" in raw:
        left_out = "written via a bot"
    elif at is None or raw.get("from_id") is None:
        left_out = "messages without author or date"
    else:
        text = text or mark(raw)
        left_out = "" if text else "messages without text"
    date = raw.get("date") or datetime.datetime.fromtimestamp(at or 0, datetime.UTC).isoformat()[:19]
    return Message(peer(raw.get("from_id")), whole(raw.get("from") or "") or None, at or 0, date, text, left_out)


def mark(raw):
    """What stands for a message without words: a sticker is its emoji, other media are a mark."""
    if raw.get("media_type") == "sticker":
        return raw.get("sticker_emoji") or "<sticker>"
    if raw.get("media_type") in MEDIA:
        return MEDIA[raw["media_type"]]
    for key, shown in (
        ("photo", "<photo>"),
        ("file", "<file>"),
        ("poll", "<poll>"),
        ("contact_information", "<contact>"),
        ("location_information", "<location>"),
    ):
        if key in raw:
            return shown
    return ""
