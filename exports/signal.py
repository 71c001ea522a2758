"""Signal Desktop's chats: signal-export's data.json, and the text that sigtop writes."""

import collections
import datetime
import json
import re
from collections.abc import Iterator

from cli import UserError
from exports import Chat, Message, Reason, fix_dst, make_message, sigtop
from exports.content import as_dict, as_list, as_text, file_mark, without_surrogates
from exports.sigtop import DAMAGED, ME, make_id
from exports.source import Source, full_lines

NUM_PASSES = 1
SAME_IDS = True
CALL = re.compile(r"(?:Incoming|Outgoing|Missed)(?: voice| video)? call(?: \(.*\))?")
LINE = re.compile(r'\s*\{"date": "[^"]*", "sender": "')
DESKTOP_JSON = re.compile(r'\[\s*\{[^\n]*"(?:conversationId|sendStateByConversationId)"')


def can_read(head: str) -> bool:
    head = head.removeprefix("\ufeff")
    patterns = (sigtop.CONVERSATION, LINE, DESKTOP_JSON)
    return any(pattern.match(head) for pattern in patterns)


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. UserError for sigtop's JSON, in which there is no text since early 2025."""
    head = source.head().removeprefix("\ufeff")
    if DESKTOP_JSON.match(head):
        raise UserError(f"{source} is sigtop's JSON, which lacks text", "Export as text (-f text).")
    if chat := sigtop.read_chat(source):
        yield chat, sigtop.messages(source, repairs)
    else:
        yield read_chat(source, head), messages(source, repairs)


def read_chat(source: Source, head: str) -> Chat:
    """Make the Chat of a data.json: its folder's name, which in a chat of two is the other's."""
    name = source.path.parent.name or "Signal"
    senders = {*re.findall(r'^\{"date": "[^"]*", "sender": "([^"]*)"', head, re.MULTILINE)}
    is_group = bool(senders - {"Me", "No-Sender", name})
    chat_type = "private_group" if is_group else "personal_chat"
    return Chat(f"signal:{name}", make_id(name), chat_type, name, ME)


def messages(source: Source, repairs: collections.Counter) -> Iterator[Message]:
    last = 0
    for line in full_lines(source, repairs):
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
        yield read_message(raw, sender, at, local.isoformat()[:19])


def read_message(raw: dict, sender: str, at: int, date: str) -> Message:
    text, left_out = as_text(raw.get("body")).strip(), ""
    if raw.get("deleted"):
        left_out = Reason.DELETED
    elif raw.get("call") or CALL.fullmatch(text):
        left_out = Reason.SERVICE
    elif sender in ("No-Sender", "None", ""):
        left_out = Reason.NO_AUTHOR
    else:
        text = text or attachment_mark(raw)
        left_out = "" if text else Reason.NO_TEXT
    person = ME if sender == "Me" else make_id(sender)
    return make_message((None, person, sender, at, date, "" if left_out else text, left_out))


def attachment_mark(raw: dict) -> str:
    """Return what stands for a sticker or the first attachment."""
    if sticker := raw.get("sticker"):
        emoji = sticker.get("emoji") if isinstance(sticker, dict) else sticker
        return without_surrogates(str(emoji or "<sticker>"))
    files = as_list(raw.get("attachments"))
    return file_mark(as_dict(files[0]).get("name")) if files else ""
