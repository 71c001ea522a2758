"""What messengers wrote, as streams of records. The next messenger is a module here with `recognises` and `read`, named in `sources`."""

import codecs
import collections
import functools
import itertools
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from config import UserError

DELETED = "Deleted Account"
PIECE = 1 << 16  # bytes read at a time; from 128 KiB on, each costs fresh memory
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError)
HEAD = 1 << 16  # bytes by which a messenger's file is recognised
WHAT_TO_GIVE = "Give the result.json that Telegram Desktop wrote (Export, format JSON), or a WhatsApp chat (Export chat: .txt or .zip)."


class Chat(NamedTuple):
    """`key`: what it is known by in every export of it. `owner`: the id of whose export it is, None where the file doesn't say."""

    key: str
    id: str
    type: str  # Telegram's names: personal_chat, private_group, public_supergroup, bot_chat, saved_messages…
    name: str
    owner: str | None


class Message(NamedTuple):
    """`at`: seconds since 1970. `date`: local ISO time as written. `left_out`: why this is nobody's own words ("" when it is)."""

    id: int | None  # unique in its chat; None where the messenger doesn't number
    author: str | None  # an id, where the messenger has any; else a name behind the messenger's
    name: str | None
    at: int
    date: str
    text: str
    left_out: str = ""


make = functools.partial(tuple.__new__, Message)  # of a tuple of its fields: Message(…) would call Python once more, millions of times


class Source:
    """One file of an export, on disk or in a zip. `watch(n)` is called as bytes are read."""

    def __init__(self, path, watch=lambda read: None, archive=None, member=None):
        self.path, self.watch, self.zip, self.member = path, watch, archive, member
        self.archive = Path(archive.filename) if archive else None
        self.size = member.file_size if archive else path.stat().st_size

    def __str__(self):
        return f"{self.archive}: {self.path}" if self.archive else str(self.path)

    def blocks(self, notes):
        """The bytes, a block at a time; of a damaged zip those before the damage."""
        try:
            with self.zip.open(self.member) if self.zip else open(self.path, "rb", buffering=0) as file:
                while block := file.read(PIECE):
                    yield block
        except BROKEN_ZIP:
            notes["files in damaged zips, read up to the damage"] += 1

    def head(self):
        """Its first characters."""
        data = b"".join(itertools.islice(self.blocks(collections.Counter()), 1 + HEAD // PIECE))
        return decoder(data).decode(data)

    def pieces(self, notes):
        """The text, a piece at a time. Bytes that are no text become U+FFFD and are counted in `notes`."""
        decode = None
        for block in self.blocks(notes):
            self.watch(len(block))
            decode = decode or decoder(block).decode
            text = decode(block)
            if "\ufffd" in text and (damaged := text.count("\ufffd") - block.count("\ufffd".encode())) > 0:
                notes["unreadable bytes"] += damaged
            yield text

    def beside(self, name):
        """The text of a small file that lies beside this one, None where there is none. `name`: as an export writes it, relative."""
        if name.startswith("/") or ".." in name.split("/"):
            return None
        try:
            if self.zip:
                return self.zip.read(str(self.path.parent / name)).decode("utf-8", "replace")
            return (self.path.parent / name).read_text(encoding="utf-8", errors="replace")
        except (OSError, KeyError, ValueError, *BROKEN_ZIP):
            return None


def decoder(data):
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return codecs.getincrementaldecoder("utf-16" if utf_16 else "utf-8-sig")("replace")


def sources(path, watch=lambda read: None):
    """The chat files in what a person gave (a file, a zip, a folder) → [(reader module, Source)]. UserError when there is none."""
    from exports import telegram, whatsapp

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file", WHAT_TO_GIVE)
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder", "Save what it gives to a file: it is read more than once.")
    found = []
    for source in candidates(path, watch):
        found += [(reader, source) for reader in (telegram, whatsapp) if reader.recognises(source.head())][:1]
    if found:
        return found
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else [str(inner) for inner in (path, *path.rglob("*"))]
    if names == [str(path)] and (path.is_dir() or not path.stat().st_size):
        raise UserError(f"{path} is empty", WHAT_TO_GIVE)
    if any("messages" in name and name.endswith(".html") for name in names):
        raise UserError(f"{path} is an export in HTML", "Export again, format JSON.")
    raise UserError(f"{path} is not an export that we know", WHAT_TO_GIVE)


def candidates(path, watch):
    """The files in which chats may be: the one given; of a folder its .json, .txt and .zip and the result.json of folders in it."""
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".txt") and p.is_file()] + sorted(path.glob("*/result.json"))
        return [Source(p, watch) for p in files] + [source for inner in sorted(path.glob("*.zip")) for source in candidates(inner, watch)]
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04" and not zipfile.is_zipfile(path):
            return [Source(path, watch)]
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN_ZIP:
        raise UserError(f"{path} is a damaged zip", "Copy it again, or unpack it as far as it goes and give the folder.") from None
    members = [m for m in archive.infolist() if m.filename.endswith((".json", ".txt")) and not m.filename.startswith("__MACOSX/")]
    if any(m.flag_bits & 1 for m in members):
        raise UserError(f"{path} is encrypted", "Unpack it, then give the folder.")
    named = [m for m in members if m.filename.rpartition("/")[2] in ("result.json", "_chat.txt") or "/" not in m.filename]
    return [Source(PurePosixPath(member.filename), watch, archive, member) for member in named or members]


def read(path, notes=None, watch=lambda read: None):
    """Yield (Chat, iterator of its Messages); each chat's messages are to be read before the next chat is asked for.

    Memory grows neither with the export nor with one chat. What was repaired is counted in `notes` (a Counter). UserError when `path`
    is no export that we know.
    """
    notes = collections.Counter() if notes is None else notes
    for reader, source in sources(path, watch):
        yield from reader.read(source, notes)


def forward(at, last):
    """`at`, local time, moved up to `last` where clocks went back: the hour that a night to Sunday repeats is no way back in time."""
    night = (at // 3600 + 72) % 168 in range(143, 149)  # hours since a Monday: Saturday 23:00 to Sunday 4:59
    return last if last is not None and 0 < last - at <= 3600 and night else at
