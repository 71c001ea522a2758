"""What messengers wrote, as streams of records. The next messenger is a module here with `recognises` and `read`, named in `sources`."""

import codecs
import collections
import functools
import itertools
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cli import UserError

DELETED = "Deleted Account"
CHUNK = 1 << 16  # bytes read at a time; from 128 KiB on, each costs fresh memory
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)
HEAD_BYTES = 1 << 16  # bytes by which a messenger's file is recognised
WHAT_TO_GIVE = "Give the result.json that Telegram Desktop wrote (Export, format JSON), or a WhatsApp chat (Export chat: .txt or .zip)."


SAMPLE_BYTES = 1 << 16  # bytes by which a code page is told
CODE_PAGES = (
    "cp1251 cp1253 cp1255 cp1256 cp874 cp932 cp949 gb18030 cp950".split()
)  # Windows' own, of other scripts
LATIN = {  # and of Latin: the letters of each language
    "cp1252": "äöüß àâæçéèêëîïôœùûüÿ áéíñóúüºª ãáàâçéêíóôõúºª àèéìòóùî åäöé æøåéö ëïéèüöá áéíóúýþæöð",
    "cp1250": "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîșşţ čćđšž",
    "cp1254": "çğıöşüâîûi\u0307",
    "cp1257": "ąčęėįšųūž āčēģīķļņšūž äõöüšž",
}
SIGNS = "\u00a0«»“”„‘’‚–—…€£§°¿¡·•´"
CONTROL = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f]")
FOREIGN = re.compile(
    r"(?<![a-zA-Z\x80-\U0010ffff])[^\W\x00-\x7f]{2,}(?![a-zA-Z\x80-\U0010ffff])"
)  # words without an ASCII letter


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


make = functools.partial(
    tuple.__new__, Message
)  # of a tuple of its fields: Message(…) would call Python once more, millions of times


class Source:
    """One file of an export, on disk or in a zip. `watch(n)` is called as bytes are read."""

    def __init__(self, path, watch=lambda read: None, archive=None, member=None):
        self.path, self.watch, self.zip, self.member = path, watch, archive, member
        self.archive = Path(archive.filename) if archive else None
        self.size = member.file_size if archive else path.stat().st_size
        self.attached = 0  # other chats in its zip or folder that were sent in this one

    def __str__(self):
        return f"{self.archive}: {self.path}" if self.archive else str(self.path)

    def blocks(self, notes):
        """The bytes, a block at a time; of a damaged zip those before the damage."""
        try:
            with (
                self.zip.open(self.member)
                if self.zip
                else open(self.path, "rb", buffering=0) as file
            ):
                while block := file.read(CHUNK):
                    yield block
        except BROKEN_ZIP:
            notes["files in damaged zips, read up to the damage"] += 1

    def head(self):
        """Its first characters."""
        data = b"".join(
            itertools.islice(self.blocks(collections.Counter()), 1 + HEAD_BYTES // CHUNK)
        )
        return decoder(data).decode(data)

    def pieces(self, notes):
        """The text, a piece at a time. Of a UTF-8 file, bytes that are no text become U+FFFD and are counted in `notes`."""
        text_decoder, utf_8 = None, True
        for block in self.blocks(notes):
            self.watch(len(block))
            text_decoder = text_decoder or decoder(block)
            pending = text_decoder.getstate()[0] if utf_8 else b""
            text = text_decoder.decode(block)
            if (
                "\ufffd" in text
                and (damaged := text.count("\ufffd") - block.count("\ufffd".encode())) > 0
            ):
                # All before this block is the same in each encoding, being ASCII: the file is looked at only now, and then once.
                encoding = self.encoding if utf_8 else "utf-8"
                if encoding == "utf-8":
                    notes["unreadable bytes"] += damaged
                else:
                    notes[f"files in {encoding} instead of UTF-8"] += 1
                    text_decoder, utf_8 = codecs.getincrementaldecoder(encoding)("replace"), False
                    text = text_decoder.decode(pending + block)
            yield text

    @functools.cached_property
    def encoding(self) -> str:
        """The encoding of a file that has bytes which are no UTF-8. UserError where nothing tells."""
        if next(self.blocks(collections.Counter()), b"").startswith(
            (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        ):
            return "utf-8"  # or rather UTF-16, damaged
        encoding = encoding_of(chunks_of_lines(self.blocks(collections.Counter())))
        if not encoding:
            raise UserError(
                f"{self} is not UTF-8, and which other encoding it has can't be told",
                "Export it again, or save it as UTF-8.",
            )
        return encoding

    def beside(self, name):
        """The text of a small file that lies beside this one, None where there is none. `name`: as an export writes it, relative."""
        if name.startswith("/") or ".." in name.split("/"):
            return None
        try:
            if self.zip:
                data = self.zip.read(str(self.path.parent / name))
            else:
                data = (self.path.parent / name).read_bytes()
            text = decoder(data).decode(data)
            encoding = encoding_of(data.splitlines()) if "\ufffd" in text else "utf-8"
            return text if encoding == "utf-8" else encoding and data.decode(encoding, "replace")
        except (OSError, KeyError, ValueError, *BROKEN_ZIP):
            return None


def decoder(data):
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return codecs.getincrementaldecoder("utf-16" if utf_16 else "utf-8-sig")("replace")


def chunks_of_lines(blocks):
    """The lines in blocks of bytes; one without end in pieces of some SAMPLE bytes."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(rest) >= SAMPLE_BYTES:
            yield rest
            rest = b""
    yield rest


def encoding_of(lines: Iterable[bytes]) -> str | None:
    """The encoding of lines of which some are no UTF-8, as far as these tell it; "utf-8" where they are damaged, None where nothing tells.

    Windows' editors save in the code page of a language. UTF-8 that was damaged has more lines with whole characters than broken ones.
    """
    utf_8, broken, sample = 0, 0, bytearray()
    for line in lines:
        if line.isascii():
            continue
        text = line.decode("utf-8", "replace")
        damaged = text.count("\ufffd") - line.count("\ufffd".encode())
        if 2 * damaged <= len(text) - len(text.encode("ascii", "ignore")):
            utf_8 += 1
        elif not CONTROL.search(line):
            broken += 1
            if len(sample) < SAMPLE_BYTES:
                sample += line[:SAMPLE_BYTES] + b"\n"
    if broken < 2 or broken <= 4 * utf_8:
        return "utf-8"
    return code_page(bytes(sample)) or (None if broken > 2 else "utf-8")


def code_page(sample):
    """The code page of some lines, None where it isn't well determined: of Latin ones, where two could be and read otherwise."""
    latin = {}
    for page, alphabets in LATIN.items():
        text = sample.decode(page, "replace")
        letters = [c for c in text.lower() if not c.isascii() and c not in SIGNS]
        if not FOREIGN.search(text) and any(
            sum(c in alphabet for c in letters) >= 0.98 * len(letters)
            for alphabet in alphabets.split()
        ):
            latin.setdefault(text, page)
    if latin:
        return next(iter(latin.values())) if len(latin) == 1 else None
    try:
        import charset_normalizer
    except ImportError:
        return None
    best = charset_normalizer.from_bytes(
        sample, steps=16, chunk_size=1024, cp_isolation=CODE_PAGES
    ).best()
    return (
        best.encoding if best and best.chaos < 0.1 and best.coherence > 0.1 else None
    )  # coherent: it is in a language that is known


def sources(path, watch=lambda read: None):
    """The chat files in what a person gave (a file, a zip, a folder) → [(reader module, Source)]. UserError when there is none."""
    from exports import telegram, whatsapp

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file", WHAT_TO_GIVE)
    if not path.is_dir() and not path.is_file():
        raise UserError(
            f"{path} is neither a file nor a folder",
            "Save what it gives to a file: it is read more than once.",
        )
    found = []
    for source in candidates(path, watch):
        found += [
            (reader, source) for reader in (telegram, whatsapp) if reader.can_read(source.head())
        ][:1]
    if found:
        return found
    names = (
        zipfile.ZipFile(path).namelist()
        if zipfile.is_zipfile(path)
        else [str(inner) for inner in (path, *path.rglob("*"))]
    )
    if names == [str(path)] and (path.is_dir() or not path.stat().st_size):
        raise UserError(f"{path} is empty", WHAT_TO_GIVE)
    if any("messages" in name and name.endswith(".html") for name in names):
        raise UserError(f"{path} is an export in HTML", "Export again, format JSON.")
    raise UserError(f"{path} is not an export that we know", WHAT_TO_GIVE)


def candidates(path, watch):
    """The files in which chats may be: the one given; of a folder its .json, .txt and .zip and the result.json of folders in it."""
    if path.is_dir():
        files = [
            p for p in sorted(path.iterdir()) if p.suffix in (".json", ".txt") and p.is_file()
        ] + sorted(path.glob("*/result.json"))
        found = [Source(p, watch) for p in files]
        zips = (
            source for inner in sorted(path.glob("*.zip")) for source in candidates(inner, watch)
        )
        return named_after(path.resolve(), found) or found + list(zips)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04" and not zipfile.is_zipfile(path):
            return [Source(path, watch)]
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN_ZIP:
        raise UserError(
            f"{path} is a damaged zip",
            "Copy it again, or unpack it as far as it goes and give the folder.",
        ) from None
    members = [
        m
        for m in archive.infolist()
        if m.filename.endswith((".json", ".txt")) and not m.filename.startswith("__MACOSX/")
    ]
    if any(m.flag_bits & 1 for m in members):
        raise UserError(f"{path} is encrypted", "Unpack it, then give the folder.")
    named = [
        m
        for m in members
        if m.filename.rpartition("/")[2] in ("result.json", "_chat.txt") or "/" not in m.filename
    ]
    found = [
        Source(PurePosixPath(member.filename), watch, archive, member)
        for member in named or members
    ]
    return named_after(path.with_suffix(""), found) or without_sent(found)


def named_after(container, found):
    """Of a WhatsApp export's sources the chat itself: the file that is called as its zip or folder is, or the one that an iPhone calls so.

    Chats of others that were sent in it lie beside it: `WhatsApp Chat with Eve.txt` in `WhatsApp Chat with Bob.zip`.
    """
    from exports import whatsapp

    name = title(container.name)
    own = [
        source
        for source in found
        if title(source.path.stem) == name and "whatsapp" in name and source.path.suffix == ".txt"
    ]
    if not own and whatsapp.TITLE.fullmatch(name):
        own = [
            source
            for source in found
            if source.path.stem.startswith("_chat") and source.path.suffix == ".txt"
        ]
    if len(own) != 1:
        return []
    own[0].attached = sum(
        "whatsapp" in title(source.path.stem) for source in found if source is not own[0]
    )
    return own


def title(name):
    """A chat's name in the name of its file, without what tells copies apart: `Chat (1)`, `Chat_1`."""
    return (
        re.sub(r"(?:\s?\(\d{1,2}\)|_\d{1,2})+$", "", unicodedata.normalize("NFC", name))
        .replace("_", " ")
        .casefold()
    )


def without_sent(found):
    """Without the chats of which another one says that they were sent in it."""
    names = [
        source.path.name
        for source in found
        if source.path.suffix == ".txt" and "whatsapp" in title(source.path.stem)
    ]
    if not names or len(found) < 2:
        return found
    pattern = re.compile(
        b"(?:%s)(?= ?[>(])" % b"|".join(re.escape(name.encode()) for name in names)
    )
    sent = set()
    for source in found:
        rest = b""
        for block in source.blocks(collections.Counter()):
            others = {match.decode() for match in pattern.findall(rest + block)} - {
                source.path.name,
                *sent,
            }
            source.attached += len(others)
            sent |= others
            rest = block[-1024:]
    return [source for source in found if source.path.name not in sent]


def read(path, notes=None, watch=lambda read: None):
    """Yield (Chat, iterator of its Messages); each chat's messages are to be read before the next chat is asked for.

    Memory grows neither with the export nor with one chat. What was repaired is counted in `notes` (a Counter). UserError when `path`
    is no export that we know.
    """
    notes = collections.Counter() if notes is None else notes
    for reader, source in sources(path, watch):
        yield from reader.read(source, notes)


def fix_dst(at, last):
    """`at`, local time, moved up to `last` where clocks went back: the hour that a night to Sunday repeats is no way back in time."""
    night = (at // 3600 + 72) % 168 in range(
        143, 149
    )  # hours since a Monday: Saturday 23:00 to Sunday 4:59
    return last if last is not None and 0 < last - at <= 3600 and night else at
