"""Turn messages into packed rows: each arrow is a function of this file, each noun a record.

    Message… ─ sessions ▶ Session ─ render ▶ Document ─ split ▶ Sample ─ pack ▶ Row

A toy chat of four messages, which Ann exports. 40 minutes of silence precede the last one.

    10:00 Bob: hi    10:01 Ann: hey    10:01 Ann: you up?    10:41 Bob: was asleep

    sessions  [Bob: "hi"] [Ann: "hey", "you up?"]
              [Bob: "was asleep"]  skipped: Ann says nothing in it
    render    <|im_start|>Bob\\n>>> hi<|im_end|>\\n<|im_start|>Ann\\n>>> hey\\n>>> you up?<|im_end|>
    split     the same text as tokens; only what Ann wrote has labels:
              >>> hey\\n>>> you up?<|im_end|>
    pack      samples side by side in rows of 1,024 tokens; no sample attends to another

`python data.py result.json` (exports/command.py) reads messages and writes sessions to
data/*.jsonl, which people can read and edit. Training calls `load_rows`, which renders, splits
and packs these with the model's own tokenizer.
"""

import bisect
import dataclasses
import datetime
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

import cli
from cli import UserError, counted
from weights.tokenizer import IM_END, IM_START, Tokenizer

IGNORE_INDEX = -100  # the label of a token that is not trained
DEFAULT_SPECIALS = (IM_START, IM_END, "<s>", "</s>", "<unk>")  # where no tokenizer is known
WORD_JOINER = "\u2060"
DELETED_ACCOUNT = "Deleted Account"  # the name of an author without one
UNSAVED_CONTACT = "Unsaved Contact"  # the name of an author known by a phone number alone
# What `exports` writes in place of media and of secrets.
MARK = re.compile(
    r"<(?:voice|video|gif|audio|photo|file|poll|list|contact|location|game|sticker"
    r"|phone|email|card|iban|key|password)>"
)
# The kinds of chats that are read by default, by Telegram's names.
DEFAULT_CHAT_TYPES = (
    "personal_chat",
    "private_group",
    "private_supergroup",
    "public_supergroup",
    "unknown",
)
HEADER = "system"  # the author of a session's context header, a turn that is never trained
HEADER_PARTS = ("who", "when", "since", "before", "facts")
QUOTED_MESSAGES = 4  # messages of the previous session that a header quotes
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MIN_CUT_TOKENS = 16  # a message of the context is cut only if this many of its tokens stay
MAX_TOKEN_CHARS = 32  # characters a token is assumed to have at most, where a message is cut
CONTEXT_SHARE = 8  # a piece of a long session begins with at least 1/8 of a row of context
SILENT = "sessions in which I say nothing"
UNPROMPTED = "sessions in which nobody speaks before me"
TO_JSON = json.JSONEncoder(ensure_ascii=False).encode


# --- records


@dataclasses.dataclass(slots=True)
class Turn:
    """One author's consecutive messages. `at`: local ISO time of the first."""

    author: str
    me: bool
    at: str
    messages: list[str]


@dataclasses.dataclass(slots=True)
class Session:
    """A stretch of a chat without a long silence: one line of data/*.jsonl."""

    chat: str
    chat_id: str
    type: str
    start: str
    turns: list[Turn]

    def to_json(self) -> str:
        turns = [
            {"author": turn.author, "me": turn.me, "at": turn.at, "messages": turn.messages}
            for turn in self.turns
        ]
        fields = {"chat": self.chat, "chat_id": self.chat_id, "type": self.type}
        return TO_JSON(fields | {"start": self.start, "turns": turns})

    @classmethod
    def from_json(cls, line: str | bytes) -> "Session":
        """Read a line that a person may have edited; drop emptied messages and turns."""
        fields = json.loads(line)
        session = cls(**fields)
        session.turns = [Turn(**turn) for turn in fields["turns"]]
        for turn in session.turns:
            turn.messages = [text for text in turn.messages if text.strip()]
        session.turns = [turn for turn in session.turns if turn.messages]
        return session


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A rendered text with the character spans (begin, end) that are trained.

    `content_spans`: the parts of `targets` that people typed, without `>>> ` and `<|im_end|>`.
    """

    text: str
    targets: list[tuple[int, int]]
    content_spans: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A document's input ids and their labels, shifted by one: (n,) int32 each.

    `content_mask`: which labels are text that people typed, of `chars` characters in all.
    `session`: the number of the session that this is, or is a piece of.
    """

    ids: np.ndarray
    labels: np.ndarray
    content_mask: np.ndarray
    chars: int
    session: int

    def __post_init__(self):
        lengths = (len(self.ids), len(self.labels), len(self.content_mask))
        assert min(lengths) == max(lengths) > 0, lengths
        assert not (self.content_mask & (self.labels == IGNORE_INDEX)).any()


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Samples side by side: ids, labels, content_mask (T,); T is at most the length of a row.

    doc_lengths, chars, sessions: one number a document.
    """

    ids: np.ndarray
    labels: np.ndarray
    content_mask: np.ndarray
    doc_lengths: np.ndarray
    chars: np.ndarray
    sessions: np.ndarray

    def __post_init__(self):
        lengths = (len(self.ids), len(self.labels), len(self.content_mask), self.doc_lengths.sum())
        assert min(lengths) == max(lengths), lengths
        assert len(self.doc_lengths) == len(self.chars) == len(self.sessions)


# --- messages → sessions


def sessions(messages: Iterable, chat, me, gap: float) -> Iterator[Session]:
    """Cut a chat where nobody writes for more than `gap` seconds.

    `messages`, `chat`: as in exports. Authors stay ids; `me`: the ids that are mine.
    """
    session, turn, last = None, None, None
    for _id, author, _name, at, date, text, _left_out in messages:
        if session is None or at - last > gap:
            if session:
                yield session
            session, turn = Session(chat.name, chat.id, chat.type, date, []), None
        last = at
        # What I write under two ids is one turn.
        if turn is None or (author != turn.author and not (turn.me and author in me)):
            turn = Turn(author, author in me, date, [])
            session.turns.append(turn)
        turn.messages.append(text)
    if session:
        yield session


def text_messages(turn: Turn) -> list[str]:
    """Return a turn's messages without those that are only a mark."""
    return [text for text in turn.messages if text[0] != "<" or not MARK.fullmatch(text)]


def replies(session: Session) -> list[int]:
    """Return the places of my turns with text that answer somebody."""
    places = []
    for i, turn in enumerate(session.turns):
        if i and turn.me and session.turns[i - 1].author != HEADER and text_messages(turn):
            places.append(i)
    return places


def skip_reason(session: Session) -> str:
    """Return why a session doesn't show how I answer, "" where it does.

    A chat that --include names (a channel, Saved Messages) may be mine alone.
    """
    mine = [i for i, turn in enumerate(session.turns) if turn.me and text_messages(turn)]
    if not mine:
        return SILENT
    if session.type not in DEFAULT_CHAT_TYPES:
        return ""
    before = session.turns[: mine[-1]]
    return UNPROMPTED if all(turn.me or turn.author == HEADER for turn in before) else ""


def unique_name(name: str | None, taken: set[str]) -> str:
    """Return a display name for sessions (one line, no marks) and add it to `taken`.

    A second Bob is `Bob (2)`.
    """
    name = re.sub(r"<\|[^|<>]*\|>|</?s>|<unk>|>>>", " ", name or "")
    name = " ".join(name.split()) or DELETED_ACCOUNT
    name = UNSAVED_CONTACT if MARK.fullmatch(name) else name
    unique, number = name, 2
    while unique.casefold() in taken:
        unique, number = f"{name} ({number})", number + 1
    taken.add(unique.casefold())
    return unique


def header(
    parts: Sequence[str], session: Session, before: Session | None = None, facts: str = ""
) -> Turn | None:
    """Make the turn that opens a session with what I know then; None where that is nothing.

    `parts`: some of HEADER_PARTS. `before`: the previous session of the chat; its last messages
    are quoted up to 200 characters each. `facts`: lines of text.
    """
    lines, now = [], datetime.datetime.fromisoformat(session.start)
    if "facts" in parts:
        lines += [line for line in facts.splitlines() if line.strip()]
    if "who" in parts and session.type == "personal_chat":
        friend = next((turn.author for turn in session.turns if not turn.me), session.chat)
        lines.append(f"talking to {friend}")
    elif "who" in parts:
        lines.append(f"in the group {session.chat}")
    if "when" in parts:
        lines.append(f"{DAYS[now.weekday()]}, {now.hour} o'clock")
    if "since" in parts and before:
        last = datetime.datetime.fromisoformat(before.turns[-1].at)
        lines.append(f"the last talk was {ago(now - last)}")
    if "before" in parts and before:
        quoted = []
        for turn in before.turns[-QUOTED_MESSAGES:]:
            quoted += [f"{turn.author}: {text:.200}" for text in turn.messages]
        lines += ["it ended:", *quoted[-QUOTED_MESSAGES:]]
    return Turn(HEADER, False, session.start, lines) if lines else None


def without_header(session: Session) -> Session:
    turns = [turn for turn in session.turns if turn.author != HEADER]
    return dataclasses.replace(session, turns=turns)


def parse_header_parts(text: str) -> list[str]:
    """Parse --context: some of HEADER_PARTS, with commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := {*parts} - {*HEADER_PARTS}:
        raise UserError(
            f"--context {text}: {', '.join(sorted(unknown))} is unknown",
            f"Known: {','.join(HEADER_PARTS)}",
        )
    return parts


UNITS = {"years": 525600, "months": 43800, "weeks": 10080, "days": 1440, "hours": 60}  # minutes


def ago(time: datetime.timedelta) -> str:
    """Return "3 days ago", rounded down; a clock that was set back gives "0 minutes ago"."""
    minutes = max(0, int(time.total_seconds() // 60))
    for name, size in UNITS.items():
        if minutes >= size:
            return f"{counted(minutes // size, name)} ago"
    return f"{counted(minutes, 'minutes')} ago"


# --- sessions → text


def escape_specials(text: str, specials: Iterable[str]) -> str:
    """Break each special token's spelling with a word joiner: typed text stays characters."""
    for special in specials:
        text = text.replace(special, special[0] + WORD_JOINER + special[1:])
    return text


def quote(message: str, specials: Iterable[str] = DEFAULT_SPECIALS) -> str:
    """Escape a message that follows `>>> `: no special token, no line that looks like a message."""
    return re.sub("^>>>", " >>>", escape_specials(message, specials), flags=re.MULTILINE)


def is_trained(turn: Turn, message: str, loss_on: str) -> bool:
    mine = turn.me or loss_on == "everyone" and turn.author != HEADER
    return mine and not MARK.fullmatch(message)


def render(
    turns: Sequence[Turn],
    loss_on: str = "me",
    first: tuple[int, int] = (0, 0),
    closed: bool = True,
    specials: Iterable[str] = DEFAULT_SPECIALS,
) -> Document:
    """Render turns as ChatML, each message on a line that opens with `>>> `.

    Targets are my turns (`loss_on="everyone"`: all but the header) from their first `>>>` on, with
    `<|im_end|>`, without messages that are only a mark. What precedes message `first` (turn,
    message) is context. `closed`: the last turn ends here.
    """
    text, targets, content_spans = "", [], []
    for number, turn in enumerate(turns):
        text += f"{IM_START}{escape_specials(turn.author, specials)}"
        target = False
        for i, message in enumerate(turn.messages):
            begin = len(text) + 1
            text += "\n>>> " + quote(message, specials)
            target = is_trained(turn, message, loss_on) and (number, i) >= first
            if target:
                # The newline that follows is trained too: it says that I go on.
                targets.append((begin, len(text) + 1))
                content_spans.append((begin + len(">>> "), len(text)))
        if closed or number < len(turns) - 1:
            if target:
                targets[-1] = (begin, len(text) + len(IM_END))
            text += IM_END
        text += "\n"
    return Document(text, targets, content_spans)


def prompt(turns: Sequence[Turn], me: str, specials: Iterable[str] = DEFAULT_SPECIALS) -> str:
    """Render a chat up to where my next turn begins; it tokenises as that does in training."""
    return render(turns, specials=specials).text + f"{IM_START}{escape_specials(me, specials)}\n>>>"


def split_messages(text: str) -> list[str]:
    """Split what a model wrote after `prompt` into messages, without halves of characters."""
    parts = re.split(r"(?:^|\n)>>>", ">>>" + text.replace("\ufffd", ""))
    return [part.strip() for part in parts if part.strip()]


# --- text → samples


def encode(document: Document, tokenizer: Tokenizer, session: int = 0) -> Sample:
    """Tokenise a document. A label is the next token where that begins inside a target."""
    text = document.text
    token_ids, offsets = tokenizer.encode(text[:-1] if text.endswith(IM_END + "\n") else text)
    ids = np.array(token_ids, dtype=np.int32)
    begins, ends = np.array(offsets, dtype=np.int64).T
    target = overlaps(begins, begins + 1, document.targets)
    content_mask = overlaps(begins, np.maximum(ends, begins + 1), document.content_spans) & target
    labels = np.where(target, ids, IGNORE_INDEX).astype(np.int32)
    chars = sum(end - begin for begin, end in document.content_spans)
    return Sample(ids[:-1], labels[1:], content_mask[1:], chars, session)


def overlaps(begins: np.ndarray, ends: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Return which intervals [begin, end) share a character with a span. (n,), (n,) → (n,) bool

    `spans` ascend and don't touch.
    """
    if not spans:
        return np.zeros(len(begins), dtype=bool)
    span_begins, span_ends = np.array(spans).T
    # The first span that ends after the interval begins is the only one to look at.
    following = np.searchsorted(span_ends, begins, side="right")
    return (following < len(spans)) & (span_begins[np.minimum(following, len(spans) - 1)] < ends)


def split(
    session: Session, tokenizer: Tokenizer, seq_len: int, loss_on: str = "me", number: int = 0
) -> Iterator[Sample]:
    """Split a session into samples of at most `seq_len` tokens that train each target once.

    What follows the last target is left off. A long session is cut between turns, a long turn
    between messages, a long message between tokens; each piece ends with a target. It begins with
    what precedes its first target, as context: at least 1/8 of the row, or all that fits.
    """
    turns = session.turns
    while turns and not any(is_trained(turns[-1], m, loss_on) for m in turns[-1].messages):
        turns = turns[:-1]
    if not turns:
        return
    document = render(turns, loss_on, specials=tokenizer.specials)
    whole = encode(document, tokenizer, number)
    if len(whole.ids) <= seq_len:
        yield whole
        return

    splitter = SessionSplitter(turns, document, loss_on, tokenizer, number)
    targets, min_context = splitter.targets, seq_len // CONTEXT_SHARE
    done = 0  # how many targets are in a piece already
    while done < len(targets):
        first = targets[done]
        room = seq_len - min(min_context, splitter.places[first])
        end = splitter.last_that_fits(done, room) + 1
        last = targets[end - 1]
        spare = seq_len - splitter.size(first, last)
        if spare < 0:  # a message longer than a row
            sample = splitter.piece(first, last, min_context)
        elif end == len(targets) and spare > seq_len // 2:
            # The short end of a session shares its row with other samples.
            sample = splitter.piece(first, last, 2 * min_context)
        else:
            sample = splitter.filled_piece(first, last, spare, seq_len)
        yield from windows(sample, seq_len)
        done = end


class SessionSplitter:
    """A long session to cut into pieces. Its messages are numbered through all turns.

    `messages`: (turn, message in it) of each. `targets`: the numbers of those that are trained.
    `places`: at which token of the document each begins (the first one of a turn with the author's
    line), then where all end. `overheads`: tokens of an author's line and of the end of a turn.
    """

    def __init__(self, turns, document, loss_on, tokenizer, number):
        self.turns, self.loss_on, self.tokenizer, self.number = turns, loss_on, tokenizer, number
        begins = [begin for begin, _ in tokenizer.encode(document.text)[1]]
        self.messages: list[tuple[int, int]] = []
        self.targets: list[int] = []
        self.places: list[int] = []
        self.overheads: dict[str, int] = {}
        at = 0  # characters
        for t, turn in enumerate(turns):
            author_line = IM_START + escape_specials(turn.author, tokenizer.specials)
            if turn.author not in self.overheads:
                self.overheads[turn.author] = len(tokenizer.encode(author_line)[0]) + 4
            for m, message in enumerate(turn.messages):
                if is_trained(turn, message, loss_on):
                    self.targets.append(len(self.messages))
                self.messages.append((t, m))
                self.places.append(bisect.bisect_left(begins, at))
                at += 0 if m else len(author_line)
                at += len("\n>>> " + quote(message, tokenizer.specials))
            at += len(IM_END + "\n")
        self.places.append(len(begins))

    def overhead(self, number: int) -> int:
        turn, _ = self.messages[number]
        return self.overheads[self.turns[turn].author]

    def size(self, first: int, last: int) -> int:
        """Return about how many tokens a piece of messages first … last has."""
        return self.places[last + 1] - self.places[first] + self.overhead(first)

    def last_that_fits(self, done: int, room: int) -> int:
        """Return the place in `targets` of the last one that fits into `room` with target `done`.

        That is the last of its turn, if the end of a turn fits.
        """
        targets = self.targets
        limit = self.places[targets[done]] + room - self.overhead(targets[done])
        end = bisect.bisect_right(self.places, limit) - 1  # the first message that doesn't fit
        last = max(done, bisect.bisect_left(targets, end) - 1)
        for k in range(last, done - 1, -1):
            turns = [self.messages[target][0] for target in targets[k : k + 2]]
            if len(turns) == 1 or turns[0] != turns[1]:
                return k
        return last

    def filled_piece(self, first: int, last: int, room: int, seq_len: int) -> Sample:
        """Make a piece of messages first … last with as much context as fits; `room` is a guess."""
        sample = self.piece(first, last, room)
        room += seq_len - len(sample.ids)
        sample = self.piece(first, last, room)
        # Text that is cut elsewhere can take some tokens more.
        while len(sample.ids) > seq_len and room > 0:
            room -= len(sample.ids) - seq_len
            sample = self.piece(first, last, room)
        return sample

    def piece(self, first: int, last: int, room: int) -> Sample:
        """Make a Sample of messages first … last and of `room` tokens of context before them."""
        begin = bisect.bisect_left(self.places, self.places[first] - max(room, 0))
        cut = ""
        if begin:  # the end of the message before, where enough of it fits
            turn, message = self.messages[begin - 1]
            left = room - (self.places[first] - self.places[begin]) - self.overhead(begin - 1)
            if left >= MIN_CUT_TOKENS:
                cut = self.cut_message(self.turns[turn].messages[message], left)
        begin -= bool(cut)

        from_turn, from_message = self.messages[begin]
        last_turn, last_message = self.messages[last]
        turns = [
            dataclasses.replace(turn, messages=list(turn.messages))
            for turn in self.turns[from_turn : last_turn + 1]
        ]
        closed = last_message == len(turns[-1].messages) - 1
        del turns[-1].messages[last_message + 1 :]
        del turns[0].messages[:from_message]
        turns[0].messages[0] = cut or turns[0].messages[0]

        turn, message = self.messages[first]
        message -= from_message if turn == from_turn else 0
        trained_from = (turn - from_turn, message)
        specials = self.tokenizer.specials
        document = render(turns, self.loss_on, trained_from, closed, specials)
        return encode(document, self.tokenizer, self.number)

    def cut_message(self, message: str, room: int) -> str:
        """Return the end of a message, from a word on, of at most `room` tokens."""
        message = message[-MAX_TOKEN_CHARS * room :]
        offsets = self.tokenizer.encode(message)[1]
        if len(offsets) <= room:
            return message
        text = message[offsets[-room][0] :]
        return (re.split(r"\s", text, maxsplit=1)[-1] or text).strip()


def windows(sample: Sample, seq_len: int) -> Iterator[Sample]:
    """Cut a sample longer than a row; each window repeats 1/8 of a row of the one before."""
    begin = 0  # the window's first token
    trained = 0  # the first token whose label no window trains yet
    while trained < len(sample.ids):
        part = slice(begin, begin + seq_len)
        fresh = np.arange(len(sample.ids))[part] >= trained
        labels = np.where(fresh, sample.labels[part], IGNORE_INDEX)
        content_mask = sample.content_mask[part] & fresh
        chars = round(sample.chars * content_mask.sum() / max(1, sample.content_mask.sum()))
        if (labels != IGNORE_INDEX).any():
            yield Sample(sample.ids[part], labels, content_mask, chars, sample.session)
        trained = begin + seq_len
        begin = trained - seq_len // CONTEXT_SHARE


# --- samples → rows


def pack(samples: Iterable[Sample], seq_len: int) -> list[Row]:
    """Pack best-fit decreasing: the longest sample first, into the fullest row with room for it."""
    rows: list[list[Sample]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, number of the row), ascending
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        size = len(sample.ids)
        assert size <= seq_len, (size, seq_len)
        best = bisect.bisect_left(rooms, (size, 0))
        if best < len(rooms):
            room, number = rooms.pop(best)
        else:
            room, number = seq_len, len(rows)
            rows.append([])
        rows[number].append(sample)
        if room > size:
            bisect.insort(rooms, (room - size, number))
    return [make_row(row) for row in rows]


def make_row(samples: list[Sample]) -> Row:
    return Row(
        ids=np.concatenate([sample.ids for sample in samples]),
        labels=np.concatenate([sample.labels for sample in samples]),
        content_mask=np.concatenate([sample.content_mask for sample in samples]),
        doc_lengths=np.array([len(sample.ids) for sample in samples], np.int32),
        chars=np.array([sample.chars for sample in samples], np.int32),
        sessions=np.array([sample.session for sample in samples], np.int32),
    )


def fill_share(rows: Sequence[Row], seq_len: int) -> float:
    """Return the share of computed positions that hold a token; the last row isn't padded."""
    lengths = sorted(len(row.ids) for row in rows)
    return sum(lengths) / (lengths[0] + seq_len * (len(lengths) - 1))


# --- files


def load_sessions(path: str | os.PathLike) -> list[Session]:
    """Read a data/*.jsonl, edited or not. UserError names a line that is not a session."""
    try:
        lines = cli.read_text(path).split("\n")  # splitlines would also cut at U+2028
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing", "Make it from your export: python data.py result.json"
        ) from None
    loaded = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                loaded.append(Session.from_json(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is not a session: {error}",
                "Correct the line, or write the files again: data.py --overwrite",
            ) from None
    return loaded


def drop_short_turns(session: Session, number: int, weight: float, most: int = 2) -> Session:
    """Train a turn of mine of at most `most` words with probability `weight`.

    Draws once for session `number`: the same turns are trained in every epoch.
    """
    draw, turns = random.Random(number), []
    for turn in session.turns:
        short = turn.me and len(" ".join(turn.messages).split()) <= most
        dropped = short and draw.random() >= weight
        turns.append(dataclasses.replace(turn, me=False) if dropped else turn)
    return dataclasses.replace(session, turns=turns)


def load_rows(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    seq_len: int,
    loss_on: str = "me",
    short_weight: float = 1.0,
) -> list[Row]:
    """Return the packed rows of a data/*.jsonl; they stay on disk until they are read.

    They are made once and cached beside it, by content. `short_weight`: see drop_short_turns.
    """
    path = Path(path)
    if not path.exists():
        load_sessions(path)  # says what to do
    settings = f"{seq_len} {loss_on} {short_weight} {tokenizer.bos} {tokenizer.engine.to_str()} "
    key = hashlib.sha256(settings.encode() + path.read_bytes() + Path(__file__).read_bytes())
    cache = path.parent / "cache" / f"{path.stem}-{key.hexdigest()[:16]}.safetensors"
    if not cache.exists():
        samples: list[Sample] = []
        progress = tqdm(load_sessions(path), f"tokenising {path.name}", leave=False, disable=None)
        for number, session in enumerate(progress):
            session = drop_short_turns(session, number, short_weight)
            samples += split(session, tokenizer, seq_len, loss_on, number)
        if not samples:
            return []
        cache.parent.mkdir(exist_ok=True)
        # Another rank of this host may be doing the same.
        for old in {*cache.parent.glob(f"{path.stem}-*.safetensors")} - {cache}:
            old.unlink(missing_ok=True)
        write_rows(pack(samples, seq_len), cache)
    return read_rows(cache)


ROW_FIELDS = [field.name for field in dataclasses.fields(Row)]


def write_rows(rows: list[Row], path: Path) -> None:
    """Write each field of all rows end to end, with its length in each row."""
    tensors = {}
    for name in ROW_FIELDS:
        arrays = [getattr(row, name) for row in rows]
        tensors[name] = np.concatenate(arrays)
        tensors[f"{name}.lengths"] = np.array([len(array) for array in arrays])
    new = path.with_suffix(f".{os.getpid()}.new")
    try:
        save_file(tensors, new)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise cli.write_error(path, error) from None


def read_rows(path: Path) -> list[Row]:
    tensors = mmap_safetensors(path)
    columns = []
    for name in ROW_FIELDS:
        ends = np.cumsum(tensors[f"{name}.lengths"])
        columns.append(np.split(tensors[name], ends[:-1]))
    return [Row(*fields) for fields in zip(*columns)]


def mmap_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map a file of `write_rows` into memory: {name: (n,)}; a page is read when it is touched."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    # Mode "c" (copy on write): torch warns of arrays that can't be written.
    data = np.asarray(np.memmap(path, np.uint8, "c", 8 + size))
    dtypes = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
    tensors: dict[str, np.ndarray] = {}
    for name, field in header.items():
        tensors[name] = data[slice(*field["data_offsets"])].view(dtypes[field["dtype"]])
    return tensors


if __name__ == "__main__":
    from exports import command  # imports this file as the module `data`

    cli.run(command.main)
