"""Read what messengers export, as streams of records.

A reader is a module with three names (telegram.py and whatsapp.py are two; docs/CONTRIBUTING.md has
a whole one of 30 lines), and it stands in `readers`:

    NUM_PASSES              how often it reads a file, for the progress bar
    can_read(head)          whether a file that begins with this text is one of its own
    read(source, repairs)   yield (Chat, iterator of its Messages); count repairs in `repairs`
"""

import collections
import datetime
import functools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple

from cli import UserError
from exports.source import BROKEN_ZIP, Source

SUPPORTED = (
    "Give the result.json that Telegram Desktop wrote (Export, format JSON), "
    "or a WhatsApp chat (Export chat: .txt or .zip)."
)


class Reason:
    """Why a message, chat or session is left out, in the report's words."""

    BOT = "written by or via a bot"
    DAMAGED = "damaged messages"
    DELETED = "deleted messages"
    EXCLUDED = "excluded"
    FORGOTTEN = "of people to forget"
    FORWARD = "forwards"
    NO_AUTHOR = "messages without author or date"
    NO_TEXT = "messages without text"
    OUTSIDE_DAYS = "outside --since and --until"
    REPEATED = "late sessions in which I say what I say in one to train on"
    SERVICE = "service messages"
    UNSUPPORTED = "messages of an unsupported kind"


class Chat(NamedTuple):
    key: str  # the same in every export of this chat
    id: str
    type: str  # Telegram's names: personal_chat, private_group, public_supergroup, bot_chat…
    name: str
    owner: str | None  # the id of whose export it is, None where the file doesn't say


class Message(NamedTuple):
    id: int | None  # unique in its chat; None where the messenger has no ids
    author: str | None  # an id; where there are none, `messenger:name`
    name: str | None
    at: int  # seconds since 1970
    date: str  # local ISO time
    text: str  # a mark (see data.MARK) for media
    left_out: str = ""  # a Reason why these are nobody's own words


# Makes a Message of a tuple of its fields, faster than Message(…): it runs once a message.
make_message = functools.partial(tuple.__new__, Message)


def readers() -> tuple[ModuleType, ...]:
    from exports import telegram, whatsapp

    return telegram, whatsapp


def read(
    path: str | Path, repairs: collections.Counter | None = None, progress=lambda size: None
) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """Yield (Chat, iterator of its Messages); read each chat before asking for the next.

    Memory grows neither with the export nor with a chat. UserError where nothing can be read.
    """
    repairs = collections.Counter() if repairs is None else repairs
    for reader, source in sources(path, progress):
        yield from reader.read(source, repairs)


def sources(
    path: str | Path, progress: Callable[[int], object] = lambda size: None
) -> list[tuple[ModuleType, Source]]:
    """Find the chat files in a file, zip or folder: [(reader, Source)]. UserError where none is."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file", SUPPORTED)
    if not path.is_dir() and not path.is_file():
        raise UserError(
            f"{path} is neither a file nor a folder", "Save it to a file: it is read twice."
        )
    pairs = []
    for source in candidates(path, progress):
        head = source.head()
        pairs += [(reader, source) for reader in readers() if reader.can_read(head)][:1]
    if pairs:
        return pairs
    names = [str(inner) for inner in (path, *path.rglob("*"))]
    if names == [str(path)] and (path.is_dir() or not path.stat().st_size):
        raise UserError(f"{path} is empty", SUPPORTED)
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
    if any("messages" in name and name.endswith(".html") for name in names):
        raise UserError(f"{path} is an export in HTML", "Export again, format JSON.")
    raise UserError(f"{path} is not an export that we know", SUPPORTED)


def candidates(path: Path, progress: Callable[[int], object]) -> list[Source]:
    """List the files that may be chats: this one; those in a folder, a zip, a folder's folders."""
    from exports import whatsapp

    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".txt") and p.is_file()]
        files += sorted(path.glob("*/result.json"))
        sources = [Source(file, progress) for file in files]
        if own := whatsapp.chat_of_container(path.resolve().name, sources):
            return own
        for inner in sorted(path.glob("*.zip")):
            sources += candidates(inner, progress)
        return sources
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04" and not zipfile.is_zipfile(path):
            return [Source(path, progress)]
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN_ZIP:
        raise UserError(
            f"{path} is a damaged zip",
            "Copy it again, or unpack it as far as it goes and give the folder.",
        ) from None
    members, likely = [], []
    for member in archive.infolist():
        folder, _, name = member.filename.rpartition("/")
        if name.endswith((".json", ".txt")) and not folder.startswith("__MACOSX"):
            members.append(member)
            if not folder or name in ("result.json", "_chat.txt"):
                likely.append(member)
    if any(member.flag_bits & 1 for member in members):
        raise UserError(f"{path} is encrypted", "Unpack it, then give the folder.")
    sources = []
    for member in likely or members:
        sources.append(Source(PurePosixPath(member.filename), progress, archive, member))
    return whatsapp.chat_of_container(path.stem, sources) or whatsapp.drop_attached_chats(sources)


def iso_time(at: int) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()[:19]


def fix_dst(at: int, last: int | None) -> int:
    """Move local time `at` up to `last` in the hour that the end of summer time repeats."""
    hour = (at // 3600 + 72) % 168  # since Monday
    sunday_night = 143 <= hour < 149  # Saturday 23:00 to Sunday 4:59
    return last if last is not None and 0 < last - at <= 3600 and sunday_night else at
