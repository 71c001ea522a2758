"""Read what messengers export, as streams of records.

A reader is a module with three names (telegram.py and whatsapp.py are two; docs/CONTRIBUTING.md has
a whole one of 30 lines), and it stands in `readers`:

    NUM_PASSES              how often it reads a file, for the progress bar
    can_read(head)          whether a file that begins with this text is one of its own
    read(source, repairs)   yield (Chat, iterator of its Messages); count repairs in `repairs`

Two more are optional:

    group(sources)          which of its files in a folder or zip belong together: a list of lists,
                            each in the order of reading. `read` gets the first file of each list,
                            and `source.parts` is the list. Without it each file is read alone.
                            What it learns for `read` goes into the first one's `known`.
    SAME_IDS = True         a person has the same id in all files, so `--me` is looked for in all of
                            them at once, and I may be silent in some
"""

import collections
import datetime
import functools
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

from cli import UserError
from exports.source import BROKEN_ZIP, Source

SUPPORTED = (
    "Give Telegram's result.json (Export, format JSON), a WhatsApp chat (.txt or .zip), or another "
    "messenger's export: docs/EXPORTS.md lists them, and how any other becomes a CSV."
)
# A file whose name ends otherwise is looked at only where it is named itself.
SUFFIXES = tuple(".json .jsonl .ndjson .txt .csv .tsv .html .htm .md .db .sqlite .sqlite3".split())
# Messages' database in an iPhone's backup: the SHA-1 of HomeDomain-Library/SMS/sms.db.
IPHONE_MESSAGES = "3d0d7e5fb2ce288813306e4d4636395e047a3d28"
SLACK_DAY = re.compile(r"\d{4}-\d\d-\d\d\.json")
# Folders in which exports keep what was sent. A chat that was sent in a chat isn't one of mine.
ATTACHMENTS = re.compile(
    r"__macosx|\..+|.+_files|(?:video_|profile_)?(?:files|pictures)|photos|videos|audio|gifs"
    r"|(?:round_)?(?:voice|video)_messages|stickers(?:_used)?|images|media|attachments|css|js"
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


MINUTES = [f"{minute:02}:{second:02}" for minute in range(60) for second in range(60)]

# Makes a Message of a tuple of its fields, faster than Message(…): it runs once a message.
make_message = functools.partial(tuple.__new__, Message)


def read_each(raws: Iterable, read_message: Callable[[Any, int], Message]) -> Iterator[Message]:
    """Make a Message of each; one without a time is as late as the one before, which is given."""
    last = 0
    for raw in raws:
        message = read_message(raw, last)
        last = message.at
        yield message


def readers() -> tuple[ModuleType, ...]:
    """List the readers; a file is read by the first that can. Those that take most come last."""
    from exports import (
        discord,
        discord_package,
        imessage,
        kakaotalk,
        line,
        messenger,
        signal,
        slack,
        table,
        telegram,
        vk,
        whatsapp,
    )

    first = imessage, messenger, discord, discord_package, signal, slack, telegram
    return *first, line, kakaotalk, vk, whatsapp, table


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
    """Find the chat files in a file, zip or folder: [(reader, Source)]. UserError where none is.

    Of files that belong together only the first is in the list; its `parts` are all of them.
    """
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
        reader = next((reader for reader in readers() if reader.can_read(head)), None)
        if reader:
            pairs.append((reader, source))
    if pairs:
        return group_parts(pairs)
    names = [str(inner) for inner in (path, *path.rglob("*"))]
    if names == [str(path)] and (path.is_dir() or not path.stat().st_size):
        raise UserError(f"{path} is empty", SUPPORTED)
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
    if any("messages" in name and name.endswith(".html") for name in names):
        raise UserError(f"{path} is an export in HTML", "Export again, format JSON.")
    raise UserError(f"{path} is not an export that we know", SUPPORTED)


def group_parts(pairs: Iterable[tuple[ModuleType, Source]]) -> list[tuple[ModuleType, Source]]:
    """Let each reader say which of its files in one folder or zip belong together."""
    together = collections.defaultdict(list)
    for reader, source in pairs:
        together[reader, source.archive].append(source)
    grouped = []
    for (reader, _), files in together.items():
        group = getattr(reader, "group", None)
        for parts in group(files) if group else [[source] for source in files]:
            parts[0].parts = parts
            grouped.append((reader, parts[0]))
    return grouped


def candidates(path: Path, progress: Callable[[int], object]) -> list[Source]:
    """List the files that may be chats, by name: this one, or all in a folder or a zip."""
    if path.is_dir():
        return files_of_folder(path, progress)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04" and not zipfile.is_zipfile(path):
            return [Source(path, progress)]
    return files_of_zip(path, progress)


def files_of_folder(path: Path, progress: Callable[[int], object]) -> list[Source]:
    """List the files that may be chats in a folder, its folders and zips."""
    from exports import whatsapp

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, inner, names in os.walk(path, onerror=refuse):
        slack = {"users.json", "org_users.json"} & {*names}  # its channels may have any name
        inner[:] = sorted(
            name for name in inner if slack or not ATTACHMENTS.fullmatch(name.lower())
        )
        files = [Path(folder, name) for name in sorted(names)]
        files = [file for file in files if file.is_file()]
        chats = [
            file
            for file in files
            if file.suffix.lower() in SUFFIXES or file.name == IPHONE_MESSAGES
        ]
        here = [Source(file, progress) for file in chats]
        if own := whatsapp.chat_of_container(Path(folder).resolve().name, here):
            found += own
            continue
        found += here
        for file in files:
            if file.suffix.lower() == ".zip":
                found += files_of_zip(file, progress)
    return found


def files_of_zip(path: Path, progress: Callable[[int], object]) -> list[Source]:
    """List the files that may be chats in a zip. UserError where it can't be read."""
    from exports import whatsapp

    try:
        archive = zipfile.ZipFile(path)
    except BROKEN_ZIP:
        raise UserError(
            f"{path} is a damaged zip",
            "Copy it again, or unpack it as far as it goes and give the folder.",
        ) from None
    members, likely = [], []
    for member in archive.infolist():
        *folders, name = member.filename.lower().split("/")
        if name.endswith(SUFFIXES) and "__macosx" not in folders:
            members.append(member)
            if SLACK_DAY.fullmatch(name) or not any(map(ATTACHMENTS.fullmatch, folders)):
                likely.append(member)
    if any(member.flag_bits & 1 for member in members):
        raise UserError(f"{path} is encrypted", "Unpack it, then give the folder.")
    files = []
    for member in likely or members:
        files.append(Source(PurePosixPath(member.filename), progress, archive, member))
    return whatsapp.chat_of_container(path.stem, files) or whatsapp.drop_attached_chats(files)


def iso_time(at: int) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()[:19]


def local_time(at: int) -> str:
    """Return the ISO time of a moment by this computer's clock, for exports that have UTC alone.

    (datetime takes three times as long.)
    """
    quarter, seconds = divmod(at, 900)
    begin = begin_of_quarter(quarter)
    if begin is None:
        return datetime.datetime.fromtimestamp(at).isoformat()
    hour, offset = begin
    return hour + MINUTES[offset + seconds]


@functools.lru_cache(1 << 12)
def begin_of_quarter(quarter: int) -> tuple[str, int] | None:
    """Return (date and hour, seconds since that) when a quarter of an hour begins.

    None where the hour changes within it, as in zones whose summer time began at 0:01.
    """
    begin = datetime.datetime.fromtimestamp(900 * quarter)
    end = datetime.datetime.fromtimestamp(900 * quarter + 899)
    if end.hour != begin.hour or (end - begin).seconds != 899:
        return None
    return begin.isoformat()[:14], 60 * begin.minute + begin.second


def fix_dst(at: int, last: int | None) -> int:
    """Move local time `at` up to `last` in the hour that the end of summer time repeats."""
    hour = (at // 3600 + 72) % 168  # since Monday
    sunday_night = 143 <= hour < 149  # Saturday 23:00 to Sunday 4:59
    return last if last is not None and 0 < last - at <= 3600 and sunday_night else at
