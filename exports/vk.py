"""VK's data archive: pages of 50 messages, newest first, `messages/PEER/messages0.html` and so on.

    <div class="message" data-id="7"><div class="message__header">
      <a href="https://vk.com/id123">Боб Ут</a>, 31 янв 2024 в 18:05:06</div>
    <div>On my way<div class="kludges">…<div class="attachment__description">Фотография</div>

Without a link the header begins with "Вы": the message is mine. Pages are in Windows' Cyrillic.
"""

import collections
import datetime
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason, iso_time, make_message
from exports.source import Source
from exports.vk_page import Page

NUM_PASSES = 1  # over the file
ME = "vk:me"
MONTHS = "янв фев мар апр мая июн июл авг сен окт ноя дек".split()
TIME = re.compile(r"(\d{1,2}) (\w{3})\w* (\d{4}) (?:в|at) (\d{1,2}):(\d\d):(\d\d)")
PEER = re.compile(r"vk\.com/(id|club|public|event)(\d{1,20})")
MARKS = (
    ("фотограф", "<photo>"),
    ("стикер", "<sticker>"),
    ("видеозапис", "<video>"),
    ("аудиозапис", "<audio>"),
    ("голосов", "<voice>"),
    ("карта", "<location>"),
    ("файл", "<file>"),
)
NO_HEADER = "messages without a time or an author, left out"


def can_read(head: str) -> bool:
    return "message__header" in head and 'class="message"' in head


def group(sources: list[Source]) -> list[list[Source]]:
    """Put the pages of each peer's folder together, the oldest first."""
    folders = collections.defaultdict(list)
    for source in sources:
        folders[source.path.parent].append(source)
    return [sorted(pages, key=page_number, reverse=True) for pages in folders.values()]


def page_number(source: Source) -> int:
    return int("0" + re.sub(r"\D", "", source.path.stem))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. A chat's folder is called as its peer; without one, as its title."""
    peer, title = source.path.parent.name, parse_page(source, collections.Counter()).title
    peer = peer if re.fullmatch(r"-?\d{1,20}", peer) else title
    chat_type = "personal_chat"
    if peer.startswith("-"):
        chat_type = "bot_chat"  # a community: who writes there is nobody I know
    elif peer.isdigit() and int(peer) >= 2_000_000_000:
        chat_type = "private_group"
    yield Chat(f"vk:{peer}", peer, chat_type, title or "VK", ME), messages(source, repairs)


def messages(source: Source, repairs: collections.Counter) -> Iterator[Message]:
    for part in source.parts:
        page = parse_page(part, repairs)
        part.progress(part.size)
        for raw in reversed(page.messages):
            message = make(raw)
            if message:
                yield message
            else:
                repairs[NO_HEADER] += 1


def parse_page(source: Source, repairs: collections.Counter) -> Page:
    data = b"".join(source.blocks(repairs))
    utf_8 = re.search(rb'charset="?utf-8', data[:2000], re.IGNORECASE)
    page, text = Page(), data.decode("utf-8" if utf_8 else "cp1251", "replace")
    for piece in re.split("\0+", text):  # what follows a hole belongs to something else
        page.end_damaged_message()
        page.reset()
        try:
            page.feed(piece)
            page.close()
        except AssertionError:  # html.parser's word for a damaged declaration
            repairs["damaged pages, read up to the damage"] += 1
    return page


def make(raw: dict) -> Message | None:
    """Make a Message of what a page shows of it; None where its time or author is lost."""
    header, link = " ".join(raw["header"].split()), PEER.search(raw["link"])
    match = TIME.search(header)
    name = header[: match.start()].strip(" ,") if match else ""
    month = match[2].lower() if match else ""
    if not match or month not in MONTHS or not name or (raw["link"] and not link):
        return None
    if not link and name not in ("Вы", "You"):
        return None
    clock = "-".join(match.group(3, 1, 4, 5, 6))
    try:
        local = datetime.datetime.strptime(
            f"{clock}-{MONTHS.index(month) + 1}", "%Y-%d-%H-%M-%S-%m"
        )
    except ValueError:
        return None
    author = ME if not link else f"vk:{'' if link[1] == 'id' else '-'}{link[2]}"
    text, reason = raw["text"].strip(), ""
    shown = " ".join(raw["attachments"]).lower()
    if not text and "звонок" in shown:
        reason = Reason.SERVICE
    elif not text and "прикрепл" in shown:
        reason = Reason.FORWARD
    elif not text:
        text = next((mark for stem, mark in MARKS if stem in shown), "")
        reason = "" if text else Reason.NO_TEXT
    at = int(local.replace(tzinfo=datetime.UTC).timestamp())
    number = int(raw["id"]) if re.fullmatch(r"\d{1,18}", raw["id"]) else None
    return make_message((number, author, name if link else None, at, iso_time(at), text, reason))
