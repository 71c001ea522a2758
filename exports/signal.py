"""Signal Desktop's chats: the text that sigtop writes, and signal-export's data.json."""

import collections
import datetime
import email.utils
import hashlib
import json
import re
from collections.abc import Iterable, Iterator

from cli import UserError
from exports import Chat, Message, Reason, fix_dst, iso_time, make_message, mime_mark
from exports.source import Source
from exports.telegram import without_surrogates

NUM_PASSES = 1
SAME_IDS = True
ME = "signal:me"  # the id of who wrote what is outgoing
CONVERSATION = re.compile(r"Conversation: (.*)\r?\n\r?\n")
DATE = r"\w{3}, \d{1,2} \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}"
# The paragraph with which sigtop begins a message; those that follow are its text.
HEAD = re.compile(
    rf"(?:From: (?P<author>.+)\n)?Type: (?P<type>[\w-]+)"
    rf"(?:\nSent: (?P<sent>{DATE}))?(?:\nReceived: (?P<received>{DATE}|unknown))?"
    r"(?P<more>(?:\n(?:Attachment|Reaction|Edited): .*)*)"
)
# A line of such a paragraph: where it isn't whole, what follows is nobody's for certain.
FIELD = re.compile(rf"^(?:Type: [\w-]+|(?:Sent|Received): {DATE})$", re.MULTILINE)
ATTACHMENT = re.compile(r"\nAttachment: (.*) \((\S+), \d+ bytes\)")
CALL = re.compile(r"(?:Incoming|Outgoing|Missed)(?: voice| video)? call(?: \(.*\))?")
LINE = re.compile(r'\s*\{"date": "[^"]*", "sender": "')
DESKTOP_JSON = re.compile(r'\[\s*\{[^\n]*"(?:conversationId|sendStateByConversationId)"')
DAMAGED = "Signal's messages that aren't whole, left out"


def can_read(head: str) -> bool:
    head = head.removeprefix("\ufeff")
    return bool(CONVERSATION.match(head) or LINE.match(head) or DESKTOP_JSON.match(head))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. UserError for sigtop's JSON, in which there is no text since early 2025."""
    head = source.head().removeprefix("\ufeff")
    if DESKTOP_JSON.match(head):
        raise UserError(f"{source} is sigtop's JSON, which lacks text", "Export as text (-f text).")
    if LINE.match(head):
        yield make_json_chat(source, head), json_messages(source, repairs)
    elif match := CONVERSATION.match(head):
        name, detail = split_name(match[1].strip())
        chat_type = "private_group" if detail == "group" else "personal_chat"
        chat = Chat(f"signal:{match[1].strip()}", make_id(match[1].strip()), chat_type, name, ME)
        yield chat, text_messages(source, repairs)


def make_id(name: str) -> str:
    """Return an id without the name: ids are written into data/."""
    return "signal:" + hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def split_name(written: str) -> tuple[str, str]:
    """Split `Ann (+49170…)` into name and detail, which is a number, a user name or `group`."""
    match = re.fullmatch(r"(.+) \(([^()]*)\)", written)
    return (match[1], match[2]) if match else (written, "")


def lines_of(source: Source, repairs: collections.Counter) -> Iterator[str]:
    rest = ""
    for piece in source.text(repairs):
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield what stands between two empty lines, empty where more of them follow each other."""
    paragraph: list[str] = []
    for line in lines:
        line = line.removesuffix("\r")
        if line:
            paragraph.append(line)
        else:
            yield "\n".join(paragraph)
            paragraph = []
    yield "\n".join(paragraph)


def text_messages(source: Source, repairs: collections.Counter) -> Iterator[Message]:
    """Yield sigtop's messages. A damaged head costs its message and the one before it."""
    head: re.Match | None = None
    text: list[str] = []
    last = 0
    for paragraph in paragraphs(lines_of(source, repairs)):
        begins = HEAD.fullmatch(paragraph)
        if not begins and not FIELD.search(paragraph):
            text.append(paragraph + "\n\n" if paragraph else "\n")
            continue
        if head and begins and "\0" not in "".join(text):
            message = text_message(head, "".join(text), last)
            last = message.at
            yield message
        elif head:
            repairs[DAMAGED] += 1
        head, text = begins, []
    if head and "\0" not in "".join(text):
        yield text_message(head, "".join(text), last)


def text_message(head: re.Match, body: str, last: int) -> Message:
    """Make a Message; without a time it is as late as the one before, `last`."""
    author, text, left_out = head["author"], "", ""
    mine = head["type"] == "outgoing"
    written = head["sent"] or head["received"]
    time = None
    if written and written != "unknown":
        time = read_time(written)
    if head["type"] not in ("incoming", "outgoing"):
        left_out = Reason.SERVICE
    elif not author or mine != (author == "You") or not time:
        left_out = Reason.NO_AUTHOR
    else:
        edited = "\nEdited: " in head["more"]
        text = latest_version(body) if edited else without_quote(body)
        text = text.strip() or attachment_mark(head["more"])
        left_out = "" if text else Reason.NO_TEXT
    at, date = time or (last, iso_time(last))
    name = "Me" if mine else split_name(author or "")[0] or None
    person = ME if mine else author and make_id(author)
    return make_message((None, person, name, at, date, text, left_out))


def read_time(written: str) -> tuple[int, str] | None:
    """Return (seconds since 1970, local ISO time) of sigtop's time; None where it isn't one."""
    try:
        time = email.utils.parsedate_to_datetime(written)
        return int(time.timestamp()), time.isoformat()[:19]
    except (ValueError, OverflowError):
        return None


def without_quote(body: str) -> str:
    """Drop the paragraphs of a quoted message, which stand first."""
    if not body.startswith("> From: "):
        return body
    lines = body.split("\n")
    while lines and lines[0].startswith(">"):
        lines.pop(0)
    return "\n".join(lines)


def latest_version(body: str) -> str:
    """Return the text of an edited message: the first of its versions, all behind a `|`."""
    lines = [line.removeprefix("|").removeprefix(" ") for line in body.split("\n")]
    fields, _, rest = "\n".join(lines).partition("\n\n")
    if not fields.startswith("Version: "):
        return ""
    older = re.search(r"(?:^|\n)\n?Version: \d+\n(?:Attachment: .*\n)*Sent: ", rest)
    return without_quote(rest[: older.start()] if older else rest)


def attachment_mark(fields: str) -> str:
    match = ATTACHMENT.search(fields)
    if not match:
        return ""
    mark = mime_mark(match[2])
    return "<voice>" if mark == "<audio>" and match[1] == "no filename" else mark


def make_json_chat(source: Source, head: str) -> Chat:
    """Make the Chat of a data.json: its folder's name, which in a chat of two is the other's."""
    name = source.path.parent.name or "Signal"
    senders = {*re.findall(r'^\{"date": "[^"]*", "sender": "([^"]*)"', head, re.MULTILINE)}
    is_group = bool(senders - {"Me", "No-Sender", name})
    chat_type = "private_group" if is_group else "personal_chat"
    return Chat(f"signal:{name}", make_id(name), chat_type, name, ME)


def json_messages(source: Source, repairs: collections.Counter) -> Iterator[Message]:
    last = 0
    for line in lines_of(source, repairs):
        if not line.strip():
            continue
        try:
            raw = json.loads(line.removeprefix("\ufeff"))
            local = datetime.datetime.fromisoformat(raw["date"]).replace(tzinfo=datetime.UTC)
            # Local time alone is written, so that is what counts.
            at = fix_dst(max(0, int(local.timestamp())), last)
            sender = str(raw["sender"])
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            repairs[DAMAGED] += 1
            continue
        last = at
        yield json_message(raw, sender, at, local.isoformat()[:19])


def json_message(raw: dict, sender: str, at: int, date: str) -> Message:
    body, left_out = raw.get("body"), ""
    text = body.strip() if isinstance(body, str) else ""
    if raw.get("deleted"):
        left_out = Reason.DELETED
    elif raw.get("call") or CALL.fullmatch(text):
        left_out = Reason.SERVICE
    elif sender in ("No-Sender", "None", ""):
        left_out = Reason.NO_AUTHOR
    else:
        text = text or json_mark(raw)
        left_out = "" if text else Reason.NO_TEXT
    person = ME if sender == "Me" else make_id(sender)
    text = without_surrogates(text)
    return make_message((None, person, sender, at, date, "" if left_out else text, left_out))


def json_mark(raw: dict) -> str:
    """Return what stands for a sticker or the first attachment."""
    if sticker := raw.get("sticker"):
        emoji = sticker.get("emoji") if isinstance(sticker, dict) else sticker
        return str(emoji or "<sticker>")
    files = raw.get("attachments")
    if not isinstance(files, list) or not files:
        return ""
    return mime_mark(None, files[0].get("name") if isinstance(files[0], dict) else None)
