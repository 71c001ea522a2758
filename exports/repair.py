"""Read damaged JSON as a stream: repair what can be repaired, skip the rest.

A Cursor looks for the places where something plainly begins and decodes values from there, so
memory holds one message and a piece of the file. What the decoder refuses is repaired and decoded
again; what can't be repaired is skipped up to the next message. Only damage costs time: undamaged
messages go through json's own scanner once.
"""

import collections
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator

from exports.source import Source

WHOLE = 1 << 23  # bytes of a file that is decoded at once; in memory it is seven times as large
LIMIT = 1 << 24  # characters of one value; a longer one is damage that swallows the rest
TAIL = 1 << 12  # characters in which the beginning of a message or a chat must fit

# Between elements: a comma too many or too few costs nothing. It always matches.
GAP = re.compile(r"[\s,]*")
match_gap: Callable[[str, int], re.Match[str]] = GAP.match  # type: ignore[assignment]
CHAT_HEAD = re.compile(  # what may be left of one
    r'"messages"|"name"\s*:|"(?:\w+_(?:chat|group|supergroup|channel|messages|codes)|replies)"'
)
HOLE = "\0" * 40  # lost bytes in which a chat's head may have stood
# Pair by pair: in `\\x41` the x follows a whole `\`.
ESCAPE = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))?')
UNQUOTED = re.compile(
    r'("\w+"\s*+:\s*+)(?!["{\[]|(?:-?\d[\d.eE+-]*+|true|false|null)\s*+(?:[,}\]]|$))([^"\n]++)'
)


class Damaged(Exception):
    """The text can neither be what belongs here nor be repaired."""


def mend(text: str) -> str:
    """Turn escapes that JSON doesn't know, and values without quotes, into JSON."""
    return UNQUOTED.sub(quote, ESCAPE.sub(escape, text))


def escape(match: re.Match) -> str:
    if match[1]:
        return match[0]
    return f"\\u00{match[2]}" if match[2] else "\\\\"


def quote(match: re.Match) -> str:
    value = match[2].rstrip(" \t\r,{}[]")
    return match[1] + (json.dumps(value) if value else "") + match[2][len(value) :]


class Cursor:
    """A place in a JSON text that arrives in pieces.

    `begins`: a pattern of where something begins; its group `type` matches in a chat. `lost`: the
    array of messages that was read last had no end.
    """

    def __init__(self, pieces: Iterator[str], begins: re.Pattern, repairs: collections.Counter):
        self.pieces, self.begins, self.repairs = pieces, begins, repairs
        self.text, self.at = "", 0
        self.ended = self.lost = False
        self.strict = self.scanner(strict=True)
        self.lenient = self.scanner(strict=False)  # allows control characters in strings

    def scanner(self, strict: bool) -> Callable:
        decoder = json.JSONDecoder(object_pairs_hook=self.make_object, strict=strict)
        return decoder.scan_once  # type: ignore[attr-defined]

    def make_object(self, pairs: list) -> dict:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.repairs["objects with a key written twice (the last one counts)"] += 1
        return made

    def read_more(self) -> None:
        """Read twice as much as is unread: a long value is tried again, but not at every piece."""
        unread = [self.text[self.at :]]
        room = max(1, len(unread[0]))
        while room > 0 and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            unread.append(piece or "")
            room -= len(unread[-1])
        self.text, self.at = "".join(unread), 0

    def next(self) -> re.Match | None:
        """Move to where something begins and return the match; None at the end of the text."""
        while not (match := self.begins.search(self.text, self.at)) and not self.ended:
            self.at = max(self.at, len(self.text) - TAIL)
            self.read_more()
        if match:
            self.at = match.start()
        return match

    def border(self) -> int:
        """Return where the next thing begins; the end of what is read where nothing does."""
        match = self.begins.search(self.text, self.at + 1)
        return match.start() if match else len(self.text)

    def peek(self) -> str:
        """Return the next character, without white space, and read TAIL more; "" at the end."""
        while True:
            self.at = match_gap(self.text, self.at).end()
            if len(self.text) - self.at > TAIL or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def decode(self, scan: Callable) -> object:
        """Decode the value that begins here, reading on while it may have no end yet."""
        while True:
            try:
                value, end = scan(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number that ends with the text may go on
                    self.at = end
                    return value
            except (StopIteration, ValueError, RecursionError):  # the last: a thousand brackets
                pass
            if self.ended or self.border() < len(self.text) or len(self.text) - self.at > LIMIT:
                raise Damaged
            self.read_more()

    def value(self) -> object:
        """Decode the value that begins here, repaired if need be. Damaged: the cursor stays."""
        try:
            return self.decode(self.strict)
        except Damaged:
            end = self.border()
        broken, rest = self.text[self.at : end], self.text[end:]
        if "\0" in broken:  # a hole in the file: what follows belongs to something else
            raise Damaged
        self.text, self.at = mend(broken) + rest, 0
        try:
            value = self.decode(self.lenient)
        except Damaged:
            self.text, self.at = broken + rest, 0
            raise
        self.repairs["values without valid JSON, mended"] += 1
        return value

    def messages(self) -> Iterator[object]:
        """Yield each message of the array that begins here, decoded; None for one that is lost."""
        self.at += 1
        self.lost, scan, gap = False, self.strict, match_gap
        while not self.lost:
            try:
                value, end = scan(self.text, gap(self.text, self.at).end())
                if end < len(self.text) and "messages" not in value:
                    # Undamaged, and whole in what is read: nearly always.
                    self.at = end
                    yield value
                    continue
            except (StopIteration, ValueError, RecursionError, TypeError):
                pass
            following = self.peek()
            after = match_gap(self.text, self.at + 1).end()
            if following == "]" and not self.is_message(after):  # else the bracket is the damage
                self.at += 1
                return
            begins = self.begins.match(self.text, self.at)
            # A chat begins here: the bracket that ends this array is missing.
            self.lost = not following or bool(begins and begins["type"])
            if self.lost:
                return
            try:
                yield self.value()
            except Damaged:
                yield None
                # The damaged head of another chat may lie between: its messages aren't this one's.
                end = self.border()
                between = self.text[self.at : end]
                head = CHAT_HEAD.search(between) or HOLE in between
                self.lost = bool(head) or not self.is_message(end)
                self.at = end

    def is_message(self, at: int) -> bool:
        begins = self.begins.match(self.text, at)
        return begins is not None and not begins["type"]


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Make an object, for json's decoder. ValueError for a key written twice.

    Those are two messages whose border is lost.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError
    return made


class MessageCursor(Cursor):
    """A Cursor in a file that holds the messages of one chat and nothing else."""

    def make_object(self, pairs: list) -> dict:
        return unique_keys(pairs)

    def read(self) -> Iterator[object]:
        """Yield each message, None where it is damaged. Reading goes on behind any damage."""
        while match := self.next():
            # Messages outside of an array are read as if its bracket stood before them.
            self.at = match.end() if match["type"] else match.start() - 1
            yield from self.messages()


def read_messages(
    source: Source, begins: re.Pattern, repairs: collections.Counter
) -> Iterable[dict]:
    """Return the messages of a file of one chat, empty where one is damaged.

    They are a list, or the list `messages` of an object. A file that is neither large nor damaged
    is decoded at once, which takes half the time; `begins` is for a MessageCursor in others.
    """
    pieces, found = source.text(repairs), None
    if source.size <= WHOLE:
        text = "".join(pieces)
        with contextlib.suppress(ValueError, RecursionError, LookupError):
            found = json.loads(text, object_pairs_hook=unique_keys)
            found = found["messages"] if isinstance(found, dict) else found
        pieces = iter([text])
    if isinstance(found, list):
        return [message if isinstance(message, dict) else {} for message in found]
    cursor = MessageCursor(pieces, begins, repairs)
    return (message if isinstance(message, dict) else {} for message in cursor.read())
