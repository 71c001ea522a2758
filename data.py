"""From an export to packed rows: every arrow below is a function of this file, every noun a record.

    result.json ─ exports.read ▶ Message… ─ sessions ▶ Session ─ render ▶ Document ─ split ▶ Sample ─ pack ▶ Row

A toy chat of four messages (Ann exports it; 40 minutes of silence before the last):

    10:00 Bob: hi    10:01 Ann: hey    10:01 Ann: you up?    10:41 Bob: was asleep

    sessions  [Bob: "hi"] [Ann: "hey", "you up?"]                       and [Bob: "was asleep"], dropped: Ann says nothing in it
    render    <|im_start|>Bob\\n>>> hi<|im_end|>\\n<|im_start|>Ann\\n>>> hey\\n>>> you up?<|im_end|>
    split     the same, tokenised; targets (what Ann wrote):           >>> hey\\n>>> you up?<|im_end|>
    pack      samples side by side in rows of 1024 tokens; none sees another

`python data.py result.json` goes as far as sessions (data/*.jsonl, to read and to edit); training renders, splits and packs with the
model's own tokenizer.
"""

import bisect
import dataclasses
import datetime
import hashlib
import json
import os
import random
import re
from json.encoder import encode_basestring as quoted
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

import cli
import exports
from cli import UserError, counted
from weights.tokenizer import IM_END, IM_START

IGNORE_INDEX = -100  # the label of a token that is no target
DEFAULT_SPECIALS = (
    IM_START,
    IM_END,
    "<s>",
    "</s>",
    "<unk>",
)  # what text loses when no tokenizer says which it has
WORD_JOINER = "\u2060"
UNSAVED_CONTACT = "Unsaved Contact"  # whose name is a phone number, which nobody is to see
MARK = re.compile(
    r"<(voice|video|gif|audio|photo|file|poll|list|contact|location|game|sticker|phone|email|card|iban|key|password)>"
)  # what `exports` writes for media, and for secrets
DEFAULT_CHAT_TYPES = (
    "personal_chat",
    "private_group",
    "private_supergroup",
    "public_supergroup",
    "unknown",
)  # taken by default
HEADER = "system"  # who speaks a session's context header, which is never a target
HEADER_PARTS = ("who", "when", "since", "before", "facts")  # what may stand in it
QUOTED_MESSAGES = 4  # messages of the session before
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MIN_CUT_TOKENS = 16  # tokens of a message: a context that would keep less of one begins behind it
MAX_TOKEN_CHARS = 32  # of a token, in the message of which a context keeps the end
CONTEXT_SHARE = 8  # a piece of a long session repeats at least 1 / CONTEXT of a row as context


@dataclasses.dataclass(slots=True)
class Turn:
    """One author's consecutive messages. `at`: local ISO time of the first."""

    author: str
    me: bool
    at: str
    messages: list[str]


@dataclasses.dataclass(slots=True)
class Session:
    """A talk without a long silence in it: a line of data/*.jsonl."""

    chat: str
    chat_id: str
    type: str
    start: str
    turns: list[Turn]

    def to_json(self):
        turns = ", ".join([
            f'{{"author": {quoted(t.author)}, "me": {"true" if t.me else "false"}, "at": {quoted(t.at)}, '
            f'"messages": [{", ".join(map(quoted, t.messages))}]}}'
            for t in self.turns
        ])  # fmt: skip
        head = f'"chat": {quoted(self.chat)}, "chat_id": {quoted(self.chat_id)}, "type": {quoted(self.type)}, "start": {quoted(self.start)}'
        return f'{{{head}, "turns": [{turns}]}}'

    @classmethod
    def from_json(cls, line):
        """Turns and messages that a person emptied are dropped."""
        fields = json.loads(line)
        turns = [
            Turn(**{**t, "messages": [m for m in t["messages"] if m.strip()]})
            for t in fields["turns"]
        ]
        return cls(**{**fields, "turns": [t for t in turns if t.messages]})


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A rendered text, the character spans that are targets, and those of them that are the words of messages."""

    text: str
    targets: list[tuple[int, int]]
    content_spans: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A document's inputs and their (shifted) labels, (n,) int32 each; `content_mask`: which labels are text of a message, over `chars`
    characters in all; `session`: which session it is (a piece of)."""

    ids: np.ndarray
    labels: np.ndarray
    content_mask: np.ndarray
    chars: int
    session: int

    def __post_init__(self):
        assert len(self.ids) == len(self.labels) == len(self.content_mask) > 0, (
            len(self.ids),
            len(self.labels),
            len(self.content_mask),
        )
        assert not (self.content_mask & (self.labels == IGNORE_INDEX)).any()


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Samples side by side: ids, labels, content_mask (T,), T at most a row; doc_lengths, chars, sessions: one a document."""

    ids: np.ndarray
    labels: np.ndarray
    content_mask: np.ndarray
    doc_lengths: np.ndarray
    chars: np.ndarray
    sessions: np.ndarray

    def __post_init__(self):
        assert (
            len(self.ids) == len(self.labels) == len(self.content_mask) == self.doc_lengths.sum()
        ), (
            len(self.ids),
            self.doc_lengths,
        )
        assert len(self.doc_lengths) == len(self.chars) == len(self.sessions)


# --- messages → sessions


def sessions(messages, chat, me, gap):
    """A chat's messages → its sessions, cut where nobody wrote for more than `gap` seconds. Authors are ids; `me`: those that are mine."""
    session, turn, last = None, None, None
    for _, author, _, at, date, text, _ in messages:
        if session is None or at - last > gap:
            if session:
                yield session
            session, turn = Session(chat.name, chat.id, chat.type, date, []), None
        last = at
        if turn is None or (
            author != turn.author and not (turn.me and author in me)
        ):  # what I write under two ids is one turn
            turn = Turn(author, author in me, date, [])
            session.turns.append(turn)
        turn.messages.append(text)
    if session:
        yield session


def text_messages(turn):
    """A turn's messages but for those that are only a mark."""
    return [text for text in turn.messages if text[0] != "<" or not MARK.fullmatch(text)]


def replies(session):
    """Which of a session's turns are mine, of words, and answer somebody: their numbers."""
    turns = session.turns
    return [
        i
        for i, turn in enumerate(turns)
        if i and turn.me and turns[i - 1].author != HEADER and text_messages(turn)
    ]


def skip_reason(session):
    """Why a session teaches nothing of how I answer; "" when it does. A chat of another kind than talks was asked for as it is."""
    mine = [i for i, turn in enumerate(session.turns) if turn.me and text_messages(turn)]
    if not mine:
        return "sessions in which I say nothing"
    spoken_to = session.type not in DEFAULT_CHAT_TYPES or not all(
        turn.me or turn.author == HEADER for turn in session.turns[: mine[-1]]
    )
    return "" if spoken_to else "sessions in which nobody speaks before me"


def unique_name(shown, taken):
    """A display name → the name in sessions: one line, no marks, none of `taken` (`Bob`, `Bob (2)`), which it joins."""
    plain = (
        " ".join(re.sub(r"<\|[^|<>]*\|>|</?s>|<unk>|>>>", " ", shown or exports.DELETED).split())
        or exports.DELETED
    )
    plain = UNSAVED_CONTACT if MARK.fullmatch(plain) else plain
    name, number = plain, 2
    while name.casefold() in taken:
        name, number = f"{plain} ({number})", number + 1
    taken.add(name.casefold())
    return name


def header(kinds, session, before=None, facts=""):
    """What I know when a session begins → its first turn, nobody's words; None where there is nothing to say.

    `kinds`: some of CONTEXTS. `before`: the Session before it in the same chat, of which messages are quoted up to 200 characters.
    `facts`: lines.
    """
    lines, now = [], datetime.datetime.fromisoformat(session.start)
    if "facts" in kinds:
        lines += [line for line in facts.splitlines() if line.strip()]
    if "who" in kinds:
        friend = next((turn.author for turn in session.turns if not turn.me), session.chat)
        lines.append(
            f"talking to {friend}"
            if session.type == "personal_chat"
            else f"in the group {session.chat}"
        )
    if "when" in kinds:
        lines.append(f"{DAYS[now.weekday()]}, {now.hour} o'clock")
    if "since" in kinds and before:
        lines.append(
            f"the last talk was {ago(now - datetime.datetime.fromisoformat(before.turns[-1].at))}"
        )
    if "before" in kinds and before:
        ended = [
            f"{turn.author}: {text:.200}"
            for turn in before.turns[-QUOTED_MESSAGES:]
            for text in turn.messages
        ]
        lines += ["it ended:", *ended[-QUOTED_MESSAGES:]]
    return Turn(HEADER, False, session.start, lines) if lines else None


def without_header(session):
    """A session without its header."""
    return dataclasses.replace(
        session, turns=[turn for turn in session.turns if turn.author != HEADER]
    )


def ago(time):
    """A timedelta → "3 days ago", rounded down; a clock that was set back is now."""
    minutes = max(0, int(time.total_seconds() // 60))
    units = (
        ("years", 525600),
        ("months", 43800),
        ("weeks", 10080),
        ("days", 1440),
        ("hours", 60),
        ("minutes", 1),
    )
    name, size = next((unit for unit in units if minutes >= unit[1]), units[-1])
    return f"{counted(minutes // size, name)} ago"


# --- sessions → text


def escape_specials(text, specials):
    """Break every special token's spelling with a word joiner, so that whoever tokenises the text sees characters."""
    for special in specials:
        text = text.replace(special, special[0] + WORD_JOINER + special[1:])
    return text


def render(turns, loss_on="me", first=(0, 0), closed=True, specials=DEFAULT_SPECIALS):
    """Turns → Document. Targets: my turns (`loss_on="everyone"`: all) from their first `>>>` on, `<|im_end|>` included, without messages
    that are only a mark, and from message `first` (turn, message) on: what stands before it is context. `closed`: the last turn ends here.
    """
    text, targets, content_spans = "", [], []
    for number, turn in enumerate(turns):
        text += f"{IM_START}{escape_specials(turn.author, specials)}"
        trained = [
            is_trained(turn, message, loss_on) and (number, i) >= first
            for i, message in enumerate(turn.messages)
        ]
        for message, target in zip(turn.messages, trained):
            begin = len(text) + 1
            text += "\n>>> " + quote(message, specials)
            if target:
                targets.append(
                    (begin, len(text) + 1)
                )  # with the newline behind it: that one goes on is mine too
                content_spans.append((begin + len(">>> "), len(text)))
        if closed or number < len(turns) - 1:
            if trained[-1]:
                targets[-1] = (begin, len(text) + len(IM_END))  # or that one ends
            text += IM_END
        text += "\n"
    return Document(text, targets, content_spans)


def is_trained(turn: Turn, message: str, loss_on: str) -> bool:
    mine = turn.me or loss_on == "everyone" and turn.author != HEADER
    return mine and not MARK.fullmatch(message)


def quote(message: str, specials=DEFAULT_SPECIALS) -> str:
    """A message as it stands behind `>>> `: no special tokens, and no line of its own that looks like a message."""
    return re.sub("^>>>", " >>>", escape_specials(message, specials), flags=re.MULTILINE)


def prompt(turns, me, specials=DEFAULT_SPECIALS):
    """What the model continues with my next messages; it tokenises as the beginning of that turn does in training."""
    return render(turns, specials=specials).text + f"{IM_START}{escape_specials(me, specials)}\n>>>"


def split_messages(text):
    """What the model wrote after `prompt` → my messages, without the halves of characters that a small model may write."""
    return [
        m
        for m in (
            part.strip() for part in re.split(r"(?:^|\n)>>>", ">>>" + text.replace("\ufffd", ""))
        )
        if m
    ]


# --- text → samples


def encode(document, tokenizer, session=0):
    """Document → Sample: every token but the last is an input, every token but the first a label if it begins inside a target."""
    ids, offsets = tokenizer.encode(
        document.text.removesuffix("\n") if document.text.endswith(IM_END + "\n") else document.text
    )
    ids = np.array(ids, dtype=np.int32)
    begins, ends = np.array(offsets, dtype=np.int64).T
    target = overlaps(begins, begins + 1, document.targets)
    content_mask = overlaps(begins, np.maximum(ends, begins + 1), document.content_spans) & target
    labels = np.where(target, ids, IGNORE_INDEX).astype(np.int32)
    chars = sum(end - begin for begin, end in document.content_spans)
    return Sample(ids[:-1], labels[1:], content_mask[1:], chars, session)


def overlaps(begins, ends, spans):
    """Which of the intervals [begin, end) share a character with one of the spans (ascending, apart)."""
    if not spans:
        return np.zeros(len(begins), dtype=bool)
    span_begins, span_ends = np.array(spans).T
    next_span = np.searchsorted(
        span_ends, begins, side="right"
    )  # the first span that ends after the token begins
    return (next_span < len(spans)) & (span_begins[np.minimum(next_span, len(spans) - 1)] < ends)


def split(session, tokenizer, seq_len, loss_on="me", number=0):
    """Session → Samples of at most `seq_len` tokens, together every target once. What no target needs is left off.

    A long session becomes pieces that end with a target: on turn borders, in a long turn between messages, in a long message
    between tokens. Each piece begins with what precedes its first target, without targets: at least 1 / CONTEXT of the row, and
    what room the targets leave.
    """
    taught = [
        i
        for i, turn in enumerate(session.turns)
        if any(is_trained(turn, m, loss_on) for m in turn.messages)
    ]
    if not taught:
        return
    turns = session.turns[: taught[-1] + 1]
    document = render(turns, loss_on, specials=tokenizer.specials)
    whole = encode(document, tokenizer, number)
    if len(whole.ids) <= seq_len:
        yield whole
        return

    cutter = SessionSplitter(turns, document, loss_on, tokenizer, number)
    targets, least = cutter.targets, seq_len // CONTEXT_SHARE
    done = 0  # targets that stand in a piece
    while done < len(targets):
        first = targets[done]
        end = cutter.last_that_fits(done, seq_len - min(least, cutter.places[first])) + 1
        spare = seq_len - cutter.size(first, targets[end - 1])
        if spare < 0:  # a message longer than a row
            sample = cutter.piece(first, targets[end - 1], least)
        elif (
            end == len(targets) and spare > seq_len // 2
        ):  # a session's short end, which shares a row with others
            sample = cutter.piece(first, targets[end - 1], 2 * least)
        else:
            sample = cutter.fill(first, targets[end - 1], spare, seq_len)
        yield from windows(sample, seq_len)
        done = end


class SessionSplitter:
    """A long session, to be cut into pieces. Messages are numbered through all turns.

    `units`: (turn, message) of each; `targets`: those that are trained; `places`: at which token of the whole each begins (a turn's
    first one with its header), and where all end; `headers`: tokens of an author's line and of what ends a turn.
    """

    def __init__(self, turns, document, loss_on, tokenizer, number):
        self.turns, self.loss_on, self.tokenizer, self.number = turns, loss_on, tokenizer, number
        self.units = [(t, m) for t, turn in enumerate(turns) for m in range(len(turn.messages))]
        self.targets = [
            u
            for u, (t, m) in enumerate(self.units)
            if is_trained(turns[t], turns[t].messages[m], loss_on)
        ]
        self.turn_of = [self.units[u][0] for u in self.targets]
        begins = [begin for begin, _ in tokenizer.encode(document.text)[1]]
        self.places, at = [], 0
        for t, m in self.units:
            at += len(IM_END + "\n") if t and not m else 0
            self.places.append(bisect.bisect_left(begins, at))
            at += 0 if m else len(IM_START + escape_specials(turns[t].author, tokenizer.specials))
            at += len("\n>>> " + quote(turns[t].messages[m], tokenizer.specials))
        self.places.append(len(begins))
        names = {turn.author for turn in turns}
        self.headers = {
            name: len(tokenizer.encode(IM_START + escape_specials(name, tokenizer.specials))[0]) + 4
            for name in names
        }

    def header(self, unit: int) -> int:
        return self.headers[self.turns[self.units[unit][0]].author]

    def size(self, first: int, last: int) -> int:
        """Tokens of a piece of the messages first … last, about."""
        return self.places[last + 1] - self.places[first] + self.header(first)

    def last_that_fits(self, done: int, room: int) -> int:
        """The last target (its place in `targets`) that stands in `room` tokens with target `done`: the end of a turn, if one fits."""
        targets, turn_of = self.targets, self.turn_of
        limit = self.places[targets[done]] + room - self.header(targets[done])
        last = max(
            done, bisect.bisect_left(targets, bisect.bisect_right(self.places, limit) - 1) - 1
        )
        ends = (
            k
            for k in range(last, done - 1, -1)
            if k + 1 == len(targets) or turn_of[k] != turn_of[k + 1]
        )
        return next(ends, last)

    def fill(self, first: int, last: int, room: int, seq_len: int) -> Sample:
        """A piece of the messages first … last with as much context as a row has room for, `room` being a guess."""
        sample = self.piece(first, last, room)
        room += seq_len - len(sample.ids)
        sample = self.piece(first, last, room)
        while (
            len(sample.ids) > seq_len and room > 0
        ):  # text that is cut elsewhere can take some tokens more
            room -= len(sample.ids) - seq_len
            sample = self.piece(first, last, room)
        return sample

    def piece(self, first: int, last: int, room: int) -> Sample:
        """The messages first … last, trained, behind the `room` tokens of context that precede them."""
        begin = bisect.bisect_left(self.places, self.places[first] - max(room, 0))
        cut = ""
        if begin:  # of the message before, its end
            turn, message = self.units[begin - 1]
            left = room - (self.places[first] - self.places[begin]) - self.header(begin - 1)
            cut = (
                self.last_words(self.turns[turn].messages[message], left)
                if left >= MIN_CUT_TOKENS
                else ""
            )
            begin -= bool(cut)
        (from_turn, from_message), (turn, message), (last_turn, last_message) = (
            self.units[u] for u in (begin, first, last)
        )
        part = [
            dataclasses.replace(t, messages=list(t.messages))
            for t in self.turns[from_turn : last_turn + 1]
        ]
        closed = last_message == len(part[-1].messages) - 1
        part[-1].messages = part[-1].messages[: last_message + 1]
        part[0].messages = part[0].messages[from_message:]
        part[0].messages[0] = cut or part[0].messages[0]
        start = (turn - from_turn, message - (from_message if turn == from_turn else 0))
        return encode(
            render(part, self.loss_on, start, closed, self.tokenizer.specials),
            self.tokenizer,
            self.number,
        )

    def last_words(self, message: str, room: int) -> str:
        """The end of a message, from a word on, that takes at most `room` tokens."""
        message = message[-MAX_TOKEN_CHARS * room :]
        offsets = self.tokenizer.encode(message)[1]
        if len(offsets) <= room:
            return message
        text = message[offsets[-room][0] :]
        return (re.split(r"\s", text, maxsplit=1)[-1] or text).strip()


def windows(sample, seq_len):
    """A sample longer than a row → samples of a row, each opening with the 1 / CONTEXT of a row that the one before it ended with."""
    begin, trained = 0, 0  # the window's first token, and the first whose label is not yet trained
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


def pack(samples, seq_len):
    """Best-fit decreasing: the longest sample first, each into the fullest row that still has room for it. → Rows."""
    rows, room = [], []  # room: (free tokens, row), ascending
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        assert len(sample.ids) <= seq_len, (len(sample.ids), seq_len)
        fit = bisect.bisect_left(room, (len(sample.ids), 0))
        free, row = room.pop(fit) if fit < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        if free > len(sample.ids):
            bisect.insort(room, (free - len(sample.ids), row))
    return [join(row) for row in rows]


def join(samples):
    ids, labels, content_mask = (
        np.concatenate([getattr(s, name) for s in samples])
        for name in ("ids", "labels", "content_mask")
    )
    lengths, chars, numbers = (
        np.array(x, np.int32) for x in zip(*((len(s.ids), s.chars, s.session) for s in samples))
    )
    return Row(ids, labels, content_mask, lengths, chars, numbers)


def fill_share(rows, seq_len):
    """Share of the computed positions that hold a token; the emptiest row is computed no longer than it is."""
    lengths = sorted(len(row.ids) for row in rows)
    return sum(lengths) / (lengths[0] + seq_len * (len(lengths) - 1))


def load_sessions(path):
    """The sessions of a data/*.jsonl, edited or not. UserError names the line that is none."""
    try:
        lines = cli.read_text(path).split("\n")  # not splitlines, which also cuts at U+2028
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing",
            "Make it from your export: python data.py result.json",
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(Session.from_json(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is no session: {error}",
                "Mend the line, or make the files anew: data.py --overwrite",
            ) from None
    return found


def drop_short_turns(session, number, weight, most=2):
    """A session in which a turn of mine of `most` words in all is taught with probability `weight`: drawn once, the same in every epoch."""
    draw = random.Random(number)
    light = [
        turn.me and len(" ".join(turn.messages).split()) <= most and draw.random() >= weight
        for turn in session.turns
    ]
    turns = [
        dataclasses.replace(turn, me=False) if left_out else turn
        for turn, left_out in zip(session.turns, light)
    ]
    return dataclasses.replace(session, turns=turns)


def load_rows(path, tokenizer, seq_len, loss_on="me", short_weight=1.0):
    """The packed rows of a data/*.jsonl, made once and cached beside it by content. → list of Row, left on disk until they are read.

    `short_weight`: as in `lighter`.
    """
    path = Path(path)
    if not path.exists():
        load_sessions(path)
    key = hashlib.sha256(
        f"{seq_len} {loss_on} {short_weight} {tokenizer.bos} {tokenizer.engine.to_str()} ".encode()
    )
    key.update(path.read_bytes() + Path(__file__).read_bytes())
    cache = path.parent / "cache" / f"{path.stem}-{key.hexdigest()[:16]}.safetensors"
    names = [field.name for field in dataclasses.fields(Row)]
    if not cache.exists():
        samples = [
            sample
            for number, talk in enumerate(
                tqdm(load_sessions(path), f"tokenising {path.name}", leave=False, disable=None)
            )
            for sample in split(
                drop_short_turns(talk, number, short_weight), tokenizer, seq_len, loss_on, number
            )
        ]
        packed = pack(samples, seq_len)
        if not packed:
            return []
        cache.parent.mkdir(exist_ok=True)
        for old in {*cache.parent.glob(f"{path.stem}-*.safetensors")} - {
            cache
        }:  # ranks of a host without rank 0 are here all at once
            old.unlink(missing_ok=True)
        stored = {n: np.concatenate([getattr(r, n) for r in packed]) for n in names}
        lengths = {f"{n}.lengths": np.array([len(getattr(r, n)) for r in packed]) for n in names}
        new = cache.with_suffix(f".{os.getpid()}.new")
        try:
            save_file(stored | lengths, new)
            new.replace(cache)
        except (OSError, SafetensorError) as error:
            raise cli.write_error(cache, error) from None
    stored = mmap_safetensors(cache)
    ends = {n: np.cumsum(stored[f"{n}.lengths"]) for n in names}
    return [
        Row(*(stored[n][ends[n][i] - stored[f"{n}.lengths"][i] : ends[n][i]] for n in names))
        for i in range(len(ends["ids"]))
    ]


def mmap_safetensors(path):
    """{name: array (n,)} of a safetensors file as `rows` writes it; the system reads a page when it is touched, once for all ranks."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.asarray(
        np.memmap(path, np.uint8, "c", 8 + size)
    )  # "c": torch warns of arrays that can't be written
    kinds = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
    return {
        name: data[slice(*field["data_offsets"])].view(kinds[field["dtype"]])
        for name, field in header.items()
    }


def parse_header_parts(said):
    """--context → some of CONTEXTS."""
    kinds = [kind.strip() for kind in said.split(",") if kind.strip()]
    if unknown := {*kinds} - {*HEADER_PARTS}:
        raise UserError(
            f"--context {said}: {', '.join(sorted(unknown))} is unknown",
            f"Known: {','.join(HEADER_PARTS)}",
        )
    return kinds


if __name__ == "__main__":
    from exports import command  # imports this file as the module `data`

    cli.run(command.main)
