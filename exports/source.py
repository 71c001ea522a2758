"""A file of an export as text: on disk or in a zip, damaged or not, in whatever encoding."""

import codecs
import collections
import functools
import itertools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from cli import UserError

CHUNK = 1 << 16  # bytes read at a time; from 128 KiB on, each chunk is fresh memory
HEAD_BYTES = 1 << 16  # bytes by which a reader recognises a file
SAMPLE_BYTES = 1 << 16  # bytes by which the code page of a file is found
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Windows' code pages of scripts other than Latin, and those of Latin with each language's letters.
CODE_PAGES = "cp1251 cp1253 cp1255 cp1256 cp874 cp932 cp949 gb18030 cp950".split()
LATIN_PAGES = {
    "cp1252": (
        "äöüß àâæçéèêëîïôœùûüÿ áéíñóúüºª ãáàâçéêíóôõúºª àèéìòóùî åäöé æøåéö ëïéèüöá áéíóúýþæöð"
    ),
    "cp1250": "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîșşţ čćđšž",
    "cp1254": "çğıöşüâîûi\u0307",
    "cp1257": "ąčęėįšųūž āčēģīķļņšūž äõöüšž",
}
SIGNS = "\u00a0«»“”„‘’‚–—…€£§°¿¡·•´"
CONTROL = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f]")
NOT_LATIN = re.compile(  # words without an ASCII letter
    r"(?<![a-zA-Z\x80-\U0010ffff])[^\W\x00-\x7f]{2,}(?![a-zA-Z\x80-\U0010ffff])"
)


class Source:
    """One file of an export. `progress(n)` is called as n bytes are read.

    `parts`: this file and those that its reader says belong to it, in the order of reading.
    `known`: what its reader learnt from other files when it grouped them.
    """

    def __init__(
        self,
        path: PurePath,
        progress: Callable[[int], object] = lambda size: None,
        archive: zipfile.ZipFile | None = None,
        member: zipfile.ZipInfo | None = None,
    ):
        self.path, self.progress, self.zip, self.member = path, progress, archive, member
        self.archive = Path(archive.filename) if archive and archive.filename else None
        self.size = member.file_size if member else Path(path).stat().st_size
        self.parts = [self]
        self.known: Any = None
        self.attached = 0  # other chats in its zip or folder, which were sent in this one

    def __str__(self) -> str:
        return f"{self.archive}: {self.path}" if self.archive else str(self.path)

    @property
    def total_size(self) -> int:
        return sum(part.size for part in self.parts)

    def blocks(self, repairs: collections.Counter) -> Iterator[bytes]:
        """Yield the bytes; of a damaged zip those before the damage."""
        try:
            if self.zip and self.member:
                opened: IO[bytes] = self.zip.open(self.member)
            else:
                opened = open(self.path, "rb", buffering=0)
            with opened as file:
                while block := file.read(CHUNK):
                    yield block
        except BROKEN_ZIP:
            repairs["files in damaged zips, read up to the damage"] += 1

    def head(self) -> str:
        count = 1 + HEAD_BYTES // CHUNK
        data = b"".join(itertools.islice(self.blocks(collections.Counter()), count))
        return make_decoder(data).decode(data)

    def text(self, repairs: collections.Counter) -> Iterator[str]:
        """Yield the text in pieces. Bytes that are not text become U+FFFD and are counted."""
        decoder, utf_8 = None, True
        for block in self.blocks(repairs):
            self.progress(len(block))
            decoder = decoder or make_decoder(block)
            pending = decoder.getstate()[0] if utf_8 else b""
            text = decoder.decode(block)
            damaged = "\ufffd" in text and count_damaged(text, block)
            if damaged > 0:
                # So far the file is ASCII, the same in each encoding: look at all of it, once.
                encoding = self.encoding if utf_8 else "utf-8"
                if encoding == "utf-8":
                    repairs["unreadable bytes"] += damaged
                else:
                    repairs[f"files in {encoding} instead of UTF-8"] += 1
                    decoder, utf_8 = codecs.getincrementaldecoder(encoding)("replace"), False
                    text = decoder.decode(pending + block)
            yield text

    @functools.cached_property
    def encoding(self) -> str:
        """The encoding of a file with bytes that aren't UTF-8. UserError where nothing tells."""
        if next(self.blocks(collections.Counter()), b"").startswith(UTF_16):
            return "utf-8"  # which here means: UTF-16, damaged
        encoding = guess_encoding(lines_of(self.blocks(collections.Counter())))
        if not encoding:
            raise UserError(
                f"{self} is not UTF-8, and which other encoding it has can't be told",
                "Export it again, or save it as UTF-8.",
            )
        return encoding

    def beside(self, name: str) -> str | None:
        """Return the text of a small file beside this one, by relative path; None without it."""
        if name.startswith("/") or ".." in name.split("/"):
            return None
        return self.read_other(self.path.parent / name)

    def above(self, name: str) -> str | None:
        """Return the text of a small file, by its path in the nearest of six folders above."""
        for folder in list(self.path.parents)[:6]:
            text = self.read_other(folder / name)
            if text is not None:
                return text
        return None

    def read_other(self, path: PurePath) -> str | None:
        try:
            data = self.zip.read(str(path)) if self.zip else Path(path).read_bytes()
        except (OSError, KeyError, ValueError, *BROKEN_ZIP):
            return None
        text = make_decoder(data).decode(data)
        encoding = guess_encoding(data.splitlines()) if "\ufffd" in text else "utf-8"
        return text if encoding == "utf-8" else encoding and data.decode(encoding, "replace")


def make_decoder(data: bytes) -> codecs.IncrementalDecoder:
    encoding = "utf-16" if data.startswith(UTF_16) else "utf-8-sig"
    return codecs.getincrementaldecoder(encoding)("replace")


def count_damaged(text: str, data: bytes) -> int:
    """Count the U+FFFD in `text` that aren't in the `data` it was decoded from."""
    return text.count("\ufffd") - data.count("\ufffd".encode())


def lines_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        if len(rest) >= SAMPLE_BYTES:  # a line without end
            yield rest
            rest = b""
    yield rest


def full_lines(source: Source, repairs: collections.Counter) -> Iterator[str]:
    """Yield a file's lines, each with the newline that ends it."""
    unread: list[str] = []  # joined once: a file may be one line
    for text in source.text(repairs):
        whole, newline, rest = text.rpartition("\n")
        if newline:
            lines = "".join([*unread, whole]).split("\n")
            yield from (line + "\n" for line in lines)
            unread = []
        unread.append(rest)
    if last := "".join(unread):
        yield last


def guess_encoding(lines: Iterable[bytes]) -> str | None:
    """Return the encoding of lines some of which aren't UTF-8; None where nothing tells.

    Windows' editors save in the code page of a language. In damaged UTF-8 ("utf-8") more lines have
    whole characters than broken ones.
    """
    utf_8, broken, sample = 0, 0, bytearray()
    for line in lines:
        if line.isascii():
            continue
        text = line.decode("utf-8", "replace")
        letters = len(text) - len(text.encode("ascii", "ignore"))
        if 2 * count_damaged(text, line) <= letters:
            utf_8 += 1
        elif not CONTROL.search(line):
            broken += 1
            if len(sample) < SAMPLE_BYTES:
                sample += line[:SAMPLE_BYTES] + b"\n"
    if broken < 2 or broken <= 4 * utf_8:
        return "utf-8"
    return guess_code_page(bytes(sample)) or (None if broken > 2 else "utf-8")


def guess_code_page(sample: bytes) -> str | None:
    """Return the code page of some lines; None where two could be, and read differently."""
    latin: dict[str, str] = {}
    for page, alphabets in LATIN_PAGES.items():
        text = sample.decode(page, "replace")
        letters = [c for c in text.lower() if not c.isascii() and c not in SIGNS]
        for alphabet in alphabets.split():
            known = sum(c in alphabet for c in letters)
            if known >= 0.98 * len(letters) and not NOT_LATIN.search(text):
                latin.setdefault(text, page)
    if latin:
        return next(iter(latin.values())) if len(latin) == 1 else None
    try:
        import charset_normalizer
    except ImportError:
        return None
    matches = charset_normalizer.from_bytes(
        sample, steps=16, chunk_size=1024, cp_isolation=CODE_PAGES
    )
    best = matches.best()
    # A high coherence: the text is in a language that is known.
    return best.encoding if best and best.chaos < 0.1 and best.coherence > 0.1 else None
