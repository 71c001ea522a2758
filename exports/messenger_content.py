"""The content of a Facebook or Instagram message: text, an attachment, or a service sentence."""

import re

from exports import Reason
from exports.content import as_dict, as_list, file_mark

MARKS = (
    ("photos", "<photo>"),
    ("videos", "<video>"),
    ("audio_files", "<voice>"),
    ("gifs", "<gif>"),
    ("sticker", "<sticker>"),
    ("files", "<file>"),
)
# Sentences that the messenger writes in somebody's name. Other languages have theirs: those that
# begin with the author's name are found as well.
EVENTS = re.compile(
    r"(?:Reacted .{1,40} to your message|Liked a message|You are now connected on Messenger\.?"
    r"|You (?:sent (?:an attachment|a location)|left the group|created (?:the|this) group"
    r"|missed (?:an?|your) [\w ]{0,20}call|waved at .{1,80}|added .{1,200} to the group"
    r"|(?:named|set|changed) the (?:group|nickname|quick|emoji|theme|chat)\b.{0,200})\.) ?$"
)
EVENT_LETTERS = "LRY"  # with which these sentences begin
OWN_TYPES = (None, "Generic", "Share", "text", "media", "link")  # others: calls, joins


def reason_of(raw: dict, author: str, content: str) -> str:
    """Return why a message is left out, "" if it is kept."""
    kind = raw.get("type")
    if not raw:
        return Reason.DAMAGED
    if raw.get("is_unsent") or raw.get("isUnsent") or raw.get("is_taken_down"):
        return Reason.DELETED
    if kind == "placeholder":  # where something was, in secure storage
        return Reason.DELETED
    if "call_duration" in raw or "missed" in raw or kind not in OWN_TYPES:
        return Reason.SERVICE
    if not author:
        return Reason.NO_AUTHOR
    # "Ann named the group X.", "Ann hat einen Anhang gesendet."; an attachment has its mark.
    return Reason.SERVICE if is_event(content, author) and not has_attachment(raw) else ""


def has_attachment(raw: dict) -> bool:
    return "share" in raw or any(raw.get(key) for key, _ in MARKS)


def own_text(raw: dict, author: str, content: str) -> str:
    """Return what somebody wrote, else the mark of what was sent; "" of what somebody shared."""
    if content and not is_event(content, author):
        return content
    for file in as_list(raw.get("media")):
        uri = str(as_dict(file).get("uri"))
        mark = "<sticker>" if uri.endswith(".webp") else file_mark(uri)
        return "<voice>" if mark == "<audio>" else mark
    for key, mark in MARKS:
        if raw.get(key):
            return mark
    link = str(as_dict(raw.get("share")).get("link"))
    return "<location>" if re.search(r"//(?:www\.bing\.com/maps|maps\.)", link) else ""


def is_event(content: str, author: str) -> bool:
    """Return whether the messenger wrote this in the author's name."""
    if content[-1:] == "." and content.startswith(author + " "):
        return True
    return content[:1] in EVENT_LETTERS and bool(EVENTS.match(content))
