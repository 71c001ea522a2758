"""JSON as it really arrives: read as a stream, mended where it is known how, left where it isn't.

A Cursor looks for the places where something plainly begins, and decodes one value after another from there, so memory holds one message
and a piece of the file. What the decoder refuses is mended (below) and decoded again; what can't be mended is skipped up to the next.
Only damage costs time: undamaged messages go from the file through json's own scanner once.
"""

import json
import re

LIMIT = 1 << 24  # characters of one value: whatever is longer is damage that swallows the rest
TAIL = 1 << 12  # characters in which the beginning of a message or a chat must fit

GAP = re.compile(r"[\s,]*")  # between elements: a comma too many or too few costs nothing
HEAD = re.compile(
    r'"messages"|"name"\s*:|"(?:\w+_(?:chat|group|supergroup|channel|messages|codes)|replies)"'
)  # what is left of a chat's head
HOLE = "\0" * 40  # lost bytes in which a chat's head may have stood
ESCAPE = re.compile(
    r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))?'
)  # pair by pair: in `\\x41` the x is behind a whole `\\`
UNQUOTED = re.compile(
    r'("\w+"\s*+:\s*+)(?!["{\[]|(?:-?\d[\d.eE+-]*+|true|false|null)\s*+(?:[,}\]]|$))([^"\n]++)'
)


class Damaged(Exception):
    """The text can't be what belongs here, nor be mended."""


def mend(text):
    """Escapes that JSON doesn't know, and values without quotes, as JSON. (Control characters inside strings: the decoder is lenient.)"""
    text = ESCAPE.sub(lambda m: m[0] if m[1] else f"\\u00{m[2]}" if m[2] else "\\\\", text)
    return UNQUOTED.sub(quote, text)


def quote(found):
    value = found[2].rstrip(" \t\r,{}[]")
    return found[1] + (json.dumps(value) if value else "") + found[2][len(value) :]


class Cursor:
    """A place in a JSON text that arrives in pieces. `begins`: a pattern of where something begins; its group `type` says that it's a chat.

    `lost`: the array of messages that was read last had no end.
    """

    def __init__(self, pieces, begins, notes):
        self.pieces, self.begins, self.notes = pieces, begins, notes
        self.text, self.at, self.ended, self.lost = "", 0, False, False
        self.strict = json.JSONDecoder(object_pairs_hook=self.object).scan_once  # type: ignore[attr-defined]
        self.lenient = json.JSONDecoder(object_pairs_hook=self.object, strict=False).scan_once  # type: ignore[attr-defined]

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
        self.text, self.at = "".join(unread), 0

    def next(self):
        """Move to where something begins, whatever stands before it. → the match, None at the end of the text."""
        while not (found := self.begins.search(self.text, self.at)) and not self.ended:
            self.at = max(self.at, len(self.text) - TAIL)
            self.more()
        if found:
            self.at = found.start()
        return found

    def border(self):
        """Where something begins behind this place; the end of what is read where nothing does."""
        found = self.begins.search(self.text, self.at + 1)
        return found.start() if found else len(self.text)

    def peek(self):
        """The next character that isn't white space, with TAIL characters behind it read too; "" at the end of the text."""
        while True:
            self.at = GAP.match(self.text, self.at).end()
            if len(self.text) - self.at > TAIL or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def decoded(self, scan):
        """Decode the value that begins here, reading on while it may have no end yet."""
        while True:
            try:
                value, end = scan(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number that ends with the text may go on
                    self.at = end
                    return value
            except (
                StopIteration,
                ValueError,
                RecursionError,
            ):  # a thousand brackets are a RecursionError
                pass
            if self.ended or self.border() < len(self.text) or len(self.text) - self.at > LIMIT:
                raise Damaged
            self.more()

    def value(self):
        """Decode the value that begins here, mended if need be. Damaged leaves the cursor on it."""
        try:
            return self.decoded(self.strict)
        except Damaged:
            end = self.border()
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

    def messages(self):
        """Walk the array of messages that begins here: yield each one decoded, None for one that is lost."""
        self.at += 1
        self.lost, scan, gap = False, self.strict, GAP.match
        while not self.lost:
            try:
                value, end = scan(self.text, gap(self.text, self.at).end())
                if (
                    end < len(self.text) and "messages" not in value
                ):  # undamaged, and whole in what was read so far: nearly always
                    self.at = end
                    yield value
                    continue
            except (StopIteration, ValueError, RecursionError, TypeError):
                pass
            following = self.peek()
            if following == "]" and not self.is_message(
                GAP.match(self.text, self.at + 1).end()
            ):  # or else the bracket is the damage
                self.at += 1
                return
            begins = self.begins.match(self.text, self.at)
            self.lost = not following or bool(
                begins and begins["type"]
            )  # a chat: the bracket that ends this array is missing
            if self.lost:
                return
            try:
                yield self.value()
            except Damaged:
                yield None
                end = self.border()
                # the damaged head of another chat may lie between: its messages are not to be taken for this one's
                between = self.text[self.at : end]
                self.lost = (
                    not self.is_message(end) or bool(HEAD.search(between)) or HOLE in between
                )
                self.at = end

    def is_message(self, at):
        begins = self.begins.match(self.text, at)
        return bool(begins) and not begins["type"]
