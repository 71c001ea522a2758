"""JSON as it really arrives: read as a stream, mended where it is known how, left where it isn't.

A Cursor walks containers and decodes values one at a time, so memory holds one message and a piece of the file. What the decoder refuses is
mended (below) and decoded again; what can't be mended is skipped, up to the next place where a message or a chat plainly begins.
Only damage costs time: undamaged text goes from the file through json's own scanner once.
"""

import json
import re

LIMIT = 1 << 24  # characters of one value: whatever is longer is damage that swallows the rest
TAIL = 1 << 12  # characters in which the beginning of a message or a chat must fit

SPACE = re.compile(r"[\s\ufeff]*")
SEPARATORS = re.compile(r"[\s,:]*")
GAP = re.compile(r"[\s,]*")  # between elements: a comma too many or too few costs nothing
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}\[\]]|[^\s"{}\[\],:]+', re.DOTALL)  # strings whatever their escapes, brackets, bare words
HEAD = re.compile(
    r'"messages"|"name"\s*:|"(?:\w+_(?:chat|group|supergroup|channel|messages|codes)|replies)"'
)  # what is left of a chat's head
ESCAPE = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))?')  # pair by pair: in `\\x41` the x is behind a whole `\\`
UNQUOTED = re.compile(r'("\w+"\s*+:\s*+)(?!["{\[]|(?:-?\d[\d.eE+-]*+|true|false|null)\s*+(?:[,}\]]|$))([^"\n]++)')
HOLE = "\0" * 40  # lost bytes in which a chat's head may have stood


class Damaged(Exception):
    """The text can't be what belongs here, nor be mended."""


def mend(text):
    """Escapes that JSON doesn't know, and values without quotes, as JSON. (Control characters inside strings: the decoder is lenient.)"""
    if "\\" in text:
        text = ESCAPE.sub(lambda m: m[0] if m[1] else f"\\u00{m[2]}" if m[2] else "\\\\", text)
    return UNQUOTED.sub(quote, text)


def quote(found):
    value = found[2].rstrip(" \t\r,{}[]")
    return found[1] + (json.dumps(value) if value else "") + found[2][len(value) :]


class Cursor:
    """A place in a JSON text that arrives in pieces. `begins`: a pattern of where a message (or, with group `type`, a chat) begins."""

    def __init__(self, pieces, begins, notes):
        self.pieces, self.begins, self.notes = pieces, begins, notes
        self.text, self.at, self.ended, self.lost, self.reads = "", 0, False, False, 0
        self.strict = json.JSONDecoder(object_pairs_hook=self.object).scan_once
        self.lenient = json.JSONDecoder(object_pairs_hook=self.object, strict=False).scan_once

    def object(self, pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            self.notes["objects with a key written twice (the last one counts)"] += 1
        return found

    def more(self):
        """Read on, twice as much as lies unread: a long value is tried again as it grows, but not at every piece."""
        unread = [self.text[self.at :]]
        room = max(1, len(unread[0]))
        while room > 0 and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            unread.append(piece or "")
            room -= len(unread[-1])
        self.text, self.at, self.reads = "".join(unread), 0, self.reads + 1

    def peek(self, between=SPACE):
        """The next character that isn't white space; "" at the end of the text."""
        while True:
            self.at = between.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def take(self, character):
        if self.peek() != character:
            raise Damaged
        self.at += 1

    def decoded(self, scan):
        """Decode the value that begins here, reading on while the text ends inside it."""
        while True:
            try:
                value, end = scan(self.text, self.at)
                if end < len(self.text) or self.ended:
                    self.at = end
                    return value
                cut = True  # a number that ends with the text may go on
            except StopIteration as stop:
                cut = stop.value >= len(self.text) - 16  # `tru`: the rest is still unread
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
            except (RecursionError, ValueError):  # a thousand brackets, a number of thousands of digits
                cut = False
            if self.ended or not cut or len(self.text) - self.at > LIMIT:
                raise Damaged
            self.more()

    def value(self):
        """Decode the value that begins here, mended if need be. Damaged leaves the cursor on it."""
        self.peek()
        try:
            return self.decoded(self.strict)
        except Damaged:
            end = self.find(1)
        broken, rest = self.text[self.at : end], self.text[end:]
        if "\0" in broken:  # a hole in the file: what stands behind it belongs to something else
            raise Damaged
        self.text, self.at = mend(broken) + rest, 0
        try:
            value = self.decoded(self.lenient)
        except Damaged:
            self.text, self.at = broken + rest, 0
            raise
        self.notes["values without valid JSON, mended"] += 1
        return value

    def find(self, start):
        """Where the next message or chat begins, `start` characters on or later; the end of the text where none does within LIMIT."""
        while True:
            if found := self.begins.search(self.text, self.at + start):
                return found.start()
            if self.ended or len(self.text) - self.at > LIMIT:
                return len(self.text)
            start = max(start, len(self.text) - self.at - TAIL)
            self.more()

    def skip(self):
        """Move behind the value that begins here without decoding it, whatever its size and escapes. Damaged when a chat begins in it."""
        depth, reads, chat = 0, None, 0
        while True:
            self.peek(SEPARATORS)
            if reads != self.reads:
                reads, heads = self.reads, (found.start() for found in self.begins.finditer(self.text, self.at) if found["type"])
                chat = next(heads, len(self.text) + 1)
            token = TOKEN.match(self.text, self.at)
            open_end = token is None or token.end() == len(self.text)
            if open_end and not self.ended and chat > len(self.text) and len(self.text) - self.at <= LIMIT:
                self.more()  # the token may go on there
                continue
            if token is None or token.end() > chat or (token[0][0] == '"' and "\n" in token[0]):
                raise Damaged  # a bracket or a quotation mark is missing somewhere
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
            if depth < 0:
                raise Damaged
            self.at = token.end()
            if depth == 0:
                return

    def keys(self):
        """Walk an object: yield each key with the cursor on its value, which the caller must consume."""
        self.take("{")
        while self.peek(GAP) != "}":
            key = self.value()
            self.take(":")
            self.peek()
            yield key
        self.at += 1

    def elements(self):
        """Walk an array: yield with the cursor on each element, which the caller must consume."""
        self.take("[")
        while found := self.peek(GAP):
            if found == "]":
                self.at += 1
                return
            yield
        raise Damaged

    def messages(self):
        """Walk an array of messages: yield each one decoded, None for one that is lost. `lost` says that what follows is no message."""
        self.lost = self.peek() != "["
        self.at += not self.lost
        scan, gap = self.strict, GAP.match
        while not self.lost:
            begin = self.at
            try:
                begin = gap(self.text, begin).end()
                value, end = scan(self.text, begin)
                if end < len(self.text) and "messages" not in value:  # undamaged, and whole in what was read so far: nearly always
                    self.at = end
                    yield value
                    continue
            except (StopIteration, ValueError, RecursionError, TypeError):
                pass
            if self.peek(GAP) == "]" and not self.goes_on():
                self.at += 1
                return
            begins = self.begins.match(self.text, self.at)
            self.lost = bool(begins and begins["type"])  # a chat: the bracket that ends this array is missing
            if self.lost:
                return
            try:
                yield self.value()
            except Damaged:
                yield None
                end = self.find(1)
                begins = self.begins.match(self.text, end)
                # the damaged head of another chat may lie between: its messages are not to be taken for this one's
                between = self.text[self.at : end]
                self.lost = not begins or bool(begins["type"]) or bool(HEAD.search(between)) or HOLE in between
                self.at = end

    def goes_on(self):
        """Whether behind a `]` stands a message: then the bracket is the damage."""
        if len(self.text) - self.at < TAIL and not self.ended:
            self.more()
        begins = self.begins.match(self.text, GAP.match(self.text, self.at + 1).end())
        return bool(begins) and not begins["type"]
