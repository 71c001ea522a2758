"""The text that sigtop writes of Signal Desktop's chats: paragraphs with empty lines between."""

import collections
import email.utils
import re
from collections.abc import Iterable, Iterator

from exports import Chat, Message, Reason, iso_time, make_message
from exports.content import file_mark, hash_name
from exports.source import Source, full_lines

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
QUOTE = re.compile(r"> From: .*\n?(?:>.*\n?)*")  # of another message, before the text
BAR = re.compile(r"^\|? ?", re.MULTILINE)  # before the lines of an edited message's versions
ATTACHMENT = re.compile(r"\nAttachment: (.*) \((\S+), \d+ bytes\)")
DAMAGED = "Signal's messages that aren't whole, left out"


def read_chat(source: Source) -> Chat | None:
    """Make the Chat of a file's first line; None where it isn't sigtop's."""
    match = CONVERSATION.match(source.head().removeprefix("\ufeff"))
    if not match:
        return None
    written = match[1].strip()
    name, detail = split_name(written)
    chat_type = "private_group" if detail == "group" else "personal_chat"
    return Chat(f"signal:{written}", make_id(written), chat_type, name, ME)


def make_id(name: str) -> str:
    return f"signal:{hash_name(name)}"


def split_name(written: str) -> tuple[str, str]:
    """Split `Ann (+49170…)` into name and detail, which is a number, a user name or `group`."""
    match = re.fullmatch(r"(.+) \(([^()]*)\)", written)
    return (match[1], match[2]) if match else (written, "")


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield what stands between two empty lines, empty where more of them follow each other."""
    paragraph: list[str] = []
    for line in lines:
        line = line.rstrip("\r\n")
        if line:
            paragraph.append(line)
        else:
            yield "\n".join(paragraph)
            paragraph = []
    yield "\n".join(paragraph)


def messages(source: Source, repairs: collections.Counter) -> Iterator[Message]:
    """Yield sigtop's messages. A damaged head costs its message and the one before it."""
    head: re.Match | None = None
    text: list[str] = []
    last = 0
    for paragraph in paragraphs(full_lines(source, repairs)):
        begins = HEAD.fullmatch(paragraph)
        if not begins and not FIELD.search(paragraph):
            text.append(paragraph + "\n\n" if paragraph else "\n")
            continue
        if head and begins and "\0" not in "".join(text):
            message = read_message(head, "".join(text), last)
            last = message.at
            yield message
        elif head:
            repairs[DAMAGED] += 1
        head, text = begins, []
    if head and "\0" not in "".join(text):
        yield read_message(head, "".join(text), last)


def read_message(head: re.Match, body: str, last: int) -> Message:
    """Make a Message; without a time it is as late as the one before, `last`."""
    author, text, left_out = head["author"], "", ""
    mine = head["type"] == "outgoing"
    time = read_time(head["sent"] or head["received"] or "")
    if head["type"] not in ("incoming", "outgoing"):
        left_out = Reason.SERVICE
    elif not author or mine != (author == "You") or not time:
        left_out = Reason.NO_AUTHOR
    else:
        text = latest_version(body) if "\nEdited: " in head["more"] else body
        text = without_quote(text).strip() or attachment_mark(head["more"])
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
    quote = QUOTE.match(body)
    return body[quote.end() :] if quote else body


def latest_version(body: str) -> str:
    """Return the text of an edited message: the first of its versions, all behind a `|`."""
    fields, _, rest = BAR.sub("", body).partition("\n\n")
    if not fields.startswith("Version: "):
        return ""
    older = re.search(r"(?:^|\n)\n?Version: \d+\n(?:Attachment: .*\n)*Sent: ", rest)
    return rest[: older.start()] if older else rest


def attachment_mark(fields: str) -> str:
    match = ATTACHMENT.search(fields)
    if not match:
        return ""
    mark = file_mark(match[1], match[2])
    return "<voice>" if mark == "<audio>" and match[1] == "no filename" else mark
