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
import collections
import contextlib
import dataclasses
import datetime
import difflib
import functools
import gc
import hashlib
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
from array import array
from json.encoder import encode_basestring as quoted
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

import config
import doctor
import exports
from config import UserError, counted, flag
from exports.join import Joined
from exports.redact import redact
from tokenizer import IM_END, IM_START
from tokenizer import load as load_tokenizer

OURS = (  # what data.py, train.py, evaluate.py, lora.py merge and remote.sh write, for --wipe; what is in a folder comes before it
    "train.jsonl", "val.jsonl", "persona.json", "canaries.json", "report.json", "report.html", "blind-test.html", "cache/train-*",
    "cache/val-*", "cache", "run.json", "metrics.jsonl", "loss.png", "micro-batch.json", "resume/step-*/rank-*", "resume/step-*", "resume",
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
    "model-*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "Modelfile",
    "special_tokens_map.json", "new-*.safetensors", ".remote", ".incoming/resume/*/*", ".incoming/resume/*", ".incoming/*", ".incoming",
)  # fmt: skip
BOX = ("flags", "lock", "log", "exit")  # remote.sh's in .run, on the box: the log quotes chats
AFTER_FORGETTING = (
    "Others may still name them in their own words. A model that was trained on them must be trained anew, "
    "and --forget be said at the next export too."
)
IGNORED = -100  # the label of a token that is no target
SPECIALS = (IM_START, IM_END, "<s>", "</s>", "<unk>")  # what text loses when no tokenizer says which it has
WORD_JOINER = "\u2060"
UNSAVED = "Unsaved Contact"  # whose name is a phone number, which nobody is to see
MARK = re.compile(
    r"<(voice|video|gif|audio|photo|file|poll|list|contact|location|game|sticker|phone|email|card|iban|key|password)>"
)  # what `exports` writes for media, and for secrets
TALKS = ("personal_chat", "private_group", "private_supergroup", "public_supergroup", "unknown")  # taken by default
HEADER = "system"  # who speaks a session's context header, which is never a target
CONTEXTS = ("who", "when", "since", "before", "facts")  # what may stand in it
QUOTED = 4  # messages of the session before
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SHOWN = 16  # turns of the session that is shown at the end
SHORTEST_CUT = 16  # tokens of a message: a context that would keep less of one begins behind it
MOST_LETTERS = 32  # of a token, in the message of which a context keeps the end
# Columns of the index of sessions: when it starts; where its line lies in the spool; how many messages it trains;
# a hash of what I say in it; the number of its chat; how many characters of mine it holds.
START, OFFSET, LENGTH, TRAINED, CONTENT, CHAT, CHARACTERS = range(7)
REPEATED = "late sessions in which I say the same as in one to train on, neither trained nor held out"
CONTEXT = 8  # a piece of a long session repeats at least 1 / CONTEXT of a row as context


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
        turns = [Turn(**{**t, "messages": [m for m in t["messages"] if m.strip()]}) for t in fields["turns"]]
        return cls(**{**fields, "turns": [t for t in turns if t.messages]})


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A rendered text, the character spans that are targets, and those of them that are the words of messages."""

    text: str
    targets: list[tuple[int, int]]
    words: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A document's inputs and their (shifted) labels, (n,) int32 each; `words`: the labels that are words of a message, over `chars`
    characters in all; `session`: which session it is (a piece of)."""

    ids: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    chars: int
    session: int

    def __post_init__(self):
        assert len(self.ids) == len(self.labels) == len(self.words) > 0, (len(self.ids), len(self.labels), len(self.words))
        assert not (self.words & (self.labels == IGNORED)).any()


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Samples side by side: ids, labels, words (T,), T at most a row; doc_lengths, chars, sessions: one a document."""

    ids: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    doc_lengths: np.ndarray
    chars: np.ndarray
    sessions: np.ndarray

    def __post_init__(self):
        assert len(self.ids) == len(self.labels) == len(self.words) == self.doc_lengths.sum(), (len(self.ids), self.doc_lengths)
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
        if turn is None or (author != turn.author and not (turn.me and author in me)):  # what I write under two ids is one turn
            turn = Turn(author, author in me, date, [])
            session.turns.append(turn)
        turn.messages.append(text)
    if session:
        yield session


def spoken(turn):
    """A turn's messages but for those that are only a mark."""
    return [text for text in turn.messages if text[0] != "<" or not MARK.fullmatch(text)]


def replies(session):
    """Which of a session's turns are mine, of words, and answer somebody: their numbers."""
    turns = session.turns
    return [i for i, turn in enumerate(turns) if i and turn.me and turns[i - 1].author != HEADER and spoken(turn)]


def why_not(session):
    """Why a session teaches nothing of how I answer; "" when it does. A chat of another kind than talks was asked for as it is."""
    mine = [i for i, turn in enumerate(session.turns) if turn.me and spoken(turn)]
    if not mine:
        return "sessions in which I say nothing"
    spoken_to = session.type not in TALKS or not all(turn.me or turn.author == HEADER for turn in session.turns[: mine[-1]])
    return "" if spoken_to else "sessions in which nobody speaks before me"


def unique_name(shown, taken):
    """A display name → the name in sessions: one line, no marks, none of `taken` (`Bob`, `Bob (2)`), which it joins."""
    plain = " ".join(re.sub(r"<\|[^|<>]*\|>|</?s>|<unk>|>>>", " ", shown or exports.DELETED).split()) or exports.DELETED
    plain = UNSAVED if MARK.fullmatch(plain) else plain
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
        lines.append(f"talking to {friend}" if session.type == "personal_chat" else f"in the group {session.chat}")
    if "when" in kinds:
        lines.append(f"{DAYS[now.weekday()]}, {now.hour} o'clock")
    if "since" in kinds and before:
        lines.append(f"the last talk was {ago(now - datetime.datetime.fromisoformat(before.turns[-1].at))}")
    if "before" in kinds and before:
        ended = [f"{turn.author}: {text:.200}" for turn in before.turns[-QUOTED:] for text in turn.messages]
        lines += ["it ended:", *ended[-QUOTED:]]
    return Turn(HEADER, False, session.start, lines) if lines else None


def bare(session):
    """A session without its header."""
    return dataclasses.replace(session, turns=[turn for turn in session.turns if turn.author != HEADER])


def ago(time):
    """A timedelta → "3 days ago", rounded down; a clock that was set back is now."""
    minutes = max(0, int(time.total_seconds() // 60))
    units = (("years", 525600), ("months", 43800), ("weeks", 10080), ("days", 1440), ("hours", 60), ("minutes", 1))
    name, size = next((unit for unit in units if minutes >= unit[1]), units[-1])
    return f"{counted(minutes // size, name)} ago"


# --- sessions → text


def safe(text, specials):
    """Break every special token's spelling with a word joiner, so that whoever tokenises the text sees characters."""
    for special in specials:
        text = text.replace(special, special[0] + WORD_JOINER + special[1:])
    return text


def render(turns, loss_on="me", first=(0, 0), closed=True, specials=SPECIALS):
    """Turns → Document. Targets: my turns (`loss_on="everyone"`: all) from their first `>>>` on, `<|im_end|>` included, without messages
    that are only a mark, and from message `first` (turn, message) on: what stands before it is context. `closed`: the last turn ends here.
    """
    text, targets, words = "", [], []
    for number, turn in enumerate(turns):
        text += f"{IM_START}{safe(turn.author, specials)}"
        trained = [is_trained(turn, message, loss_on) and (number, i) >= first for i, message in enumerate(turn.messages)]
        for message, target in zip(turn.messages, trained):
            begin = len(text) + 1
            text += "\n>>> " + quote(message, specials)
            if target:
                targets.append((begin, len(text) + 1))  # with the newline behind it: that one goes on is mine too
                words.append((begin + len(">>> "), len(text)))
        if closed or number < len(turns) - 1:
            if trained[-1]:
                targets[-1] = (begin, len(text) + len(IM_END))  # or that one ends
            text += IM_END
        text += "\n"
    return Document(text, targets, words)


def is_trained(turn: Turn, message: str, loss_on: str) -> bool:
    mine = turn.me or loss_on == "everyone" and turn.author != HEADER
    return mine and not MARK.fullmatch(message)


def quote(message: str, specials=SPECIALS) -> str:
    """A message as it stands behind `>>> `: no special tokens, and no line of its own that looks like a message."""
    return re.sub("^>>>", " >>>", safe(message, specials), flags=re.MULTILINE)


def prompt(turns, me, specials=SPECIALS):
    """What the model continues with my next messages; it tokenises as the beginning of that turn does in training."""
    return render(turns, specials=specials).text + f"{IM_START}{safe(me, specials)}\n>>>"


def messages_of(text):
    """What the model wrote after `prompt` → my messages, without the halves of characters that a small model may write."""
    return [m for m in (part.strip() for part in re.split(r"(?:^|\n)>>>", ">>>" + text.replace("\ufffd", ""))) if m]


# --- text → samples


def encode(document, tokenizer, session=0):
    """Document → Sample: every token but the last is an input, every token but the first a label if it begins inside a target."""
    ids, offsets = tokenizer.encode(document.text.removesuffix("\n") if document.text.endswith(IM_END + "\n") else document.text)
    ids = np.array(ids, dtype=np.int32)
    begins, ends = np.array(offsets, dtype=np.int64).T
    target = inside(begins, begins + 1, document.targets)
    words = inside(begins, np.maximum(ends, begins + 1), document.words) & target
    labels = np.where(target, ids, IGNORED).astype(np.int32)
    chars = sum(end - begin for begin, end in document.words)
    return Sample(ids[:-1], labels[1:], words[1:], chars, session)


def inside(begins, ends, spans):
    """Which of the intervals [begin, end) share a character with one of the spans (ascending, apart)."""
    if not spans:
        return np.zeros(len(begins), dtype=bool)
    span_begins, span_ends = np.array(spans).T
    next_span = np.searchsorted(span_ends, begins, side="right")  # the first span that ends after the token begins
    return (next_span < len(spans)) & (span_begins[np.minimum(next_span, len(spans) - 1)] < ends)


def split(session, tokenizer, seq_len, loss_on="me", number=0):
    """Session → Samples of at most `seq_len` tokens, together every target once. What no target needs is left off.

    A long session becomes pieces that end with a target: on turn borders, in a long turn between messages, in a long message
    between tokens. Each piece begins with what precedes its first target, without targets: at least 1 / CONTEXT of the row, and
    what room the targets leave.
    """
    taught = [i for i, turn in enumerate(session.turns) if any(is_trained(turn, m, loss_on) for m in turn.messages)]
    if not taught:
        return
    turns = session.turns[: taught[-1] + 1]
    document = render(turns, loss_on, specials=tokenizer.specials)
    whole = encode(document, tokenizer, number)
    if len(whole.ids) <= seq_len:
        yield whole
        return

    cutter = Cutter(turns, document, loss_on, tokenizer, number)
    targets, least = cutter.targets, seq_len // CONTEXT
    done = 0  # targets that stand in a piece
    while done < len(targets):
        first = targets[done]
        end = cutter.last_that_fits(done, seq_len - min(least, cutter.places[first])) + 1
        spare = seq_len - cutter.size(first, targets[end - 1])
        if spare < 0:  # a message longer than a row
            sample = cutter.piece(first, targets[end - 1], least)
        elif end == len(targets) and spare > seq_len // 2:  # a session's short end, which shares a row with others
            sample = cutter.piece(first, targets[end - 1], 2 * least)
        else:
            sample = cutter.fill(first, targets[end - 1], spare, seq_len)
        yield from windows(sample, seq_len)
        done = end


class Cutter:
    """A long session, to be cut into pieces. Messages are numbered through all turns.

    `units`: (turn, message) of each; `targets`: those that are trained; `places`: at which token of the whole each begins (a turn's
    first one with its header), and where all end; `headers`: tokens of an author's line and of what ends a turn.
    """

    def __init__(self, turns, document, loss_on, tokenizer, number):
        self.turns, self.loss_on, self.tokenizer, self.number = turns, loss_on, tokenizer, number
        self.units = [(t, m) for t, turn in enumerate(turns) for m in range(len(turn.messages))]
        self.targets = [u for u, (t, m) in enumerate(self.units) if is_trained(turns[t], turns[t].messages[m], loss_on)]
        self.turn_of = [self.units[u][0] for u in self.targets]
        begins = [begin for begin, _ in tokenizer.encode(document.text)[1]]
        self.places, at = [], 0
        for t, m in self.units:
            at += len(IM_END + "\n") if t and not m else 0
            self.places.append(bisect.bisect_left(begins, at))
            at += 0 if m else len(IM_START + safe(turns[t].author, tokenizer.specials))
            at += len("\n>>> " + quote(turns[t].messages[m], tokenizer.specials))
        self.places.append(len(begins))
        names = {turn.author for turn in turns}
        self.headers = {name: len(tokenizer.encode(IM_START + safe(name, tokenizer.specials))[0]) + 4 for name in names}

    def header(self, unit: int) -> int:
        return self.headers[self.turns[self.units[unit][0]].author]

    def size(self, first: int, last: int) -> int:
        """Tokens of a piece of the messages first … last, about."""
        return self.places[last + 1] - self.places[first] + self.header(first)

    def last_that_fits(self, done: int, room: int) -> int:
        """The last target (its place in `targets`) that stands in `room` tokens with target `done`: the end of a turn, if one fits."""
        targets, turn_of = self.targets, self.turn_of
        limit = self.places[targets[done]] + room - self.header(targets[done])
        last = max(done, bisect.bisect_left(targets, bisect.bisect_right(self.places, limit) - 1) - 1)
        ends = (k for k in range(last, done - 1, -1) if k + 1 == len(targets) or turn_of[k] != turn_of[k + 1])
        return next(ends, last)

    def fill(self, first: int, last: int, room: int, seq_len: int) -> Sample:
        """A piece of the messages first … last with as much context as a row has room for, `room` being a guess."""
        sample = self.piece(first, last, room)
        room += seq_len - len(sample.ids)
        sample = self.piece(first, last, room)
        while len(sample.ids) > seq_len and room > 0:  # text that is cut elsewhere can take some tokens more
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
            cut = self.last_words(self.turns[turn].messages[message], left) if left >= SHORTEST_CUT else ""
            begin -= bool(cut)
        (from_turn, from_message), (turn, message), (last_turn, last_message) = (self.units[u] for u in (begin, first, last))
        part = [dataclasses.replace(t, messages=list(t.messages)) for t in self.turns[from_turn : last_turn + 1]]
        closed = last_message == len(part[-1].messages) - 1
        part[-1].messages = part[-1].messages[: last_message + 1]
        part[0].messages = part[0].messages[from_message:]
        part[0].messages[0] = cut or part[0].messages[0]
        start = (turn - from_turn, message - (from_message if turn == from_turn else 0))
        return encode(render(part, self.loss_on, start, closed, self.tokenizer.specials), self.tokenizer, self.number)

    def last_words(self, message: str, room: int) -> str:
        """The end of a message, from a word on, that takes at most `room` tokens."""
        message = message[-MOST_LETTERS * room :]
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
        labels = np.where(fresh, sample.labels[part], IGNORED)
        words = sample.words[part] & fresh
        chars = round(sample.chars * words.sum() / max(1, sample.words.sum()))
        if (labels != IGNORED).any():
            yield Sample(sample.ids[part], labels, words, chars, sample.session)
        trained = begin + seq_len
        begin = trained - seq_len // CONTEXT


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
    ids, labels, words = (np.concatenate([getattr(s, name) for s in samples]) for name in ("ids", "labels", "words"))
    lengths, chars, numbers = (np.array(x, np.int32) for x in zip(*((len(s.ids), s.chars, s.session) for s in samples)))
    return Row(ids, labels, words, lengths, chars, numbers)


def filled(rows, seq_len):
    """Share of the computed positions that hold a token; the emptiest row is computed no longer than it is."""
    lengths = sorted(len(row.ids) for row in rows)
    return sum(lengths) / (lengths[0] + seq_len * (len(lengths) - 1))


def load_sessions(path):
    """The sessions of a data/*.jsonl, edited or not. UserError names the line that is none."""
    try:
        lines = config.read_text(path).split("\n")  # not splitlines, which also cuts at U+2028
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


def lighter(session, number, weight, most=2):
    """A session in which a turn of mine of `most` words in all is taught with probability `weight`: drawn once, the same in every epoch."""
    draw = random.Random(number)
    light = [turn.me and len(" ".join(turn.messages).split()) <= most and draw.random() >= weight for turn in session.turns]
    turns = [dataclasses.replace(turn, me=False) if left_out else turn for turn, left_out in zip(session.turns, light)]
    return dataclasses.replace(session, turns=turns)


def rows(path, tokenizer, seq_len, loss_on="me", short_weight=1.0):
    """The packed rows of a data/*.jsonl, made once and cached beside it by content. → list of Row, left on disk until they are read.

    `short_weight`: as in `lighter`.
    """
    path = Path(path)
    if not path.exists():
        load_sessions(path)
    key = hashlib.sha256(f"{seq_len} {loss_on} {short_weight} {tokenizer.bos} {tokenizer.engine.to_str()} ".encode())
    key.update(path.read_bytes() + Path(__file__).read_bytes())
    cache = path.parent / "cache" / f"{path.stem}-{key.hexdigest()[:16]}.safetensors"
    names = [field.name for field in dataclasses.fields(Row)]
    if not cache.exists():
        samples = [
            sample
            for number, talk in enumerate(tqdm(load_sessions(path), f"tokenising {path.name}", leave=False, disable=None))
            for sample in split(lighter(talk, number, short_weight), tokenizer, seq_len, loss_on, number)
        ]
        packed = pack(samples, seq_len)
        if not packed:
            return []
        cache.parent.mkdir(exist_ok=True)
        for old in {*cache.parent.glob(f"{path.stem}-*.safetensors")} - {cache}:  # ranks of a host without rank 0 are here all at once
            old.unlink(missing_ok=True)
        stored = {n: np.concatenate([getattr(r, n) for r in packed]) for n in names}
        lengths = {f"{n}.lengths": np.array([len(getattr(r, n)) for r in packed]) for n in names}
        new = cache.with_suffix(f".{os.getpid()}.new")
        try:
            save_file(stored | lengths, new)
            new.replace(cache)
        except (OSError, SafetensorError) as error:
            raise config.unwritten(cache, error) from None
    stored = mapped(cache)
    ends = {n: np.cumsum(stored[f"{n}.lengths"]) for n in names}
    return [Row(*(stored[n][ends[n][i] - stored[f"{n}.lengths"][i] : ends[n][i]] for n in names)) for i in range(len(ends["ids"]))]


def mapped(path):
    """{name: array (n,)} of a safetensors file as `rows` writes it; the system reads a page when it is touched, once for all ranks."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.asarray(np.memmap(path, np.uint8, "c", 8 + size))  # "c": torch warns of arrays that can't be written
    kinds = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_}
    return {name: data[slice(*field["data_offsets"])].view(kinds[field["dtype"]]) for name, field in header.items()}


# --- the command


@dataclasses.dataclass(frozen=True)
class Config:
    """Turn chat exports into data/train.jsonl and data/val.jsonl: sessions to read, edit and train on.

    python data.py result.json                   Telegram (JSON), WhatsApp (.txt or .zip), or a folder
    python data.py old.json new.json chat.zip    several as one: joined by chat, no message twice
    """

    exports: tuple[str, ...] = flag((), "Telegram's result.json, WhatsApp's .txt or .zip, a folder", positional=True, group="what to read")
    me: tuple[str, ...] = flag((), "whose voice: a name or an id, once a messenger", shown="whose export it is")
    since: str | None = flag(None, "leave out messages before this day, YYYY-MM-DD")
    until: str | None = flag(None, "leave out messages after this day, YYYY-MM-DD")
    include: tuple[str, ...] = flag((), "take this too, by name, id or kind: a bot, channel, Saved Messages (repeatable)")
    exclude: tuple[str, ...] = flag((), "leave this chat out, by name, id or kind (repeatable)")

    out: str = flag("data", "the folder to write", group="what to write")
    overwrite: bool = flag(False, "replace what --out holds")
    dry_run: bool = flag(False, "report only, write nothing")
    gap_minutes: float = flag(10.0, "minutes of silence that end a session")
    val: float = flag(0.05, "share of the sessions, the latest, kept to validate, 0 to 0.2")
    context: str = flag("", "open each session with some of who,when,since,before,facts (of OUT/facts.md)")
    canaries: int = flag(0, "invented numbers to hide in my messages: evaluate.py's leak test")
    tokenizer: str | None = flag(None, "a model folder: count tokens and rows in the report")
    seq_len: int = flag(1024, "tokens a row, for that count")

    keep_secrets: bool = flag(False, "leave phone numbers, cards, keys and passwords as they were written", group="privacy")
    forget: tuple[str, ...] = flag((), "leave a person out everywhere, name or id (repeatable); no EXPORT: out of --out")
    wipe: bool = flag(False, "list all that holds chats below this folder, ask, and delete it")


def main():
    options = config.parse(Config)
    if options.wipe:
        return wipe(Path(), options.dry_run)
    if options.forget and not options.exports:
        return forget(Path(options.out), options.forget, options.dry_run)
    check(options)
    words = load_tokenizer(options.tokenizer) if options.tokenizer else None  # what is wrong with it is said before the export is read
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    secrets, repairs = collections.Counter(), collections.Counter()
    near = None if options.dry_run else next(p for p in (Path(options.out).absolute(), *Path(options.out).absolute().parents) if p.is_dir())
    with tempfile.TemporaryFile(dir=near) as messages, tempfile.TemporaryFile(dir=near) as spool:
        joined = Joined(messages, str if options.keep_secrets else functools.partial(redact, counts=secrets))
        gc.disable()  # records hold no cycles; looking for some among millions of them takes as long as reading them
        try:
            left_out, bots, owners = read(options, joined, repairs)
            overlaps, aliases = joined.align(), joined.aliases()
            me = with_aliases(find_me(joined, owners, options), aliases)
            forgotten = with_aliases(find_forgotten(joined, me, options.forget), aliases)
            index, persona, report = gather(joined, me, forgotten, bots, left_out, options, spool)
        finally:
            gc.enable()
        report |= {"secrets": dict(secrets), "repairs": dict(repairs), "joined": overlaps}
        check_enough(options, index, report)
        parts = hold_out(index, options.val)
        if repeated := len(index) - sum(map(len, parts.values())):
            report["sessions_left_out"][REPEATED] = repeated
        report["sessions_kept"] = {part: len(places) for part, places in parts.items()}
        report["trained_messages"] = int(parts["train"][:, TRAINED].sum())
        planted = plant(options.canaries, len(parts["train"]))
        write(parts, spool, persona, report, options, words, near, planted)
        show(Session.from_json(line(spool, parts["train"][-1])))
    doctor.show(report, options)
    if options.forget:
        print(f"\nForgotten: {', '.join(options.forget)}. {AFTER_FORGETTING}")
    if not options.dry_run:
        where = "" if options.out == "data" else f" --data {shlex.quote(options.out)}"
        print(f"\nWritten to {options.out}/. Read it, edit it; then: python train.py --lora{where}")


def check(options):
    if not options.exports:
        raise UserError("no export given", "python data.py path/to/result.json (Telegram, JSON), or a WhatsApp chat (.txt or .zip)")
    for name in ("since", "until"):
        day = getattr(options, name) or "2000-01-01"
        try:
            if datetime.date.fromisoformat(day).isoformat() != day:
                raise ValueError
        except ValueError:
            raise UserError(f"--{name} {day} is no day", "Write it as 2021-12-31.") from None
    if not 0 <= options.val <= 0.2:
        raise UserError(f"--val {options.val:g} is no share from 0 to 0.2", "0.05 keeps the latest twentieth, 0 as few sessions as can be.")
    if not 0 < options.gap_minutes < 1e6:
        raise UserError(f"--gap-minutes {options.gap_minutes:g} is no silence", "Give a number of minutes, such as 10.")
    contexts(options.context)
    if not 0 <= options.canaries <= 1000:
        raise UserError(f"--canaries {options.canaries} is no number from 0 to 1000", "8 are enough.")
    if options.seq_len < 16:
        raise UserError(f"--seq-len {options.seq_len} is too short for a message", "Give 16 or more; training's default is 1024.")
    if not options.dry_run:
        config.check_folder(options.out, options.overwrite, ["facts.md"])


def wanted(chat, options, heard):
    """Why a chat is left out by its kind or by --include and --exclude; "" when it belongs. `heard`: the words of theirs that named one."""
    names = {chat.name.casefold(), chat.id.casefold(), chat.key.casefold(), chat.type}
    included, excluded = ({said for said in given if said.casefold() in names} for given in (options.include, options.exclude))
    heard |= included | excluded
    if excluded:
        return "excluded"
    return "" if chat.type in TALKS or included else chat.type


def read(options, joined, repairs):
    """Read the exports' chats into `joined`, but for those left out.

    → ({chat's key: why it is left out}, ids of bots, {export: owner's id}). UserError when --include or --exclude name no chat.
    """
    left_out, bots, owners, heard, chats = {}, set(), {}, set(), {}
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        found = [pair for path in options.exports for pair in exports.sources(path, bar.update)]
        bar.reset(sum(source.size * reader.PASSES for reader, source in found))
        for reader, source in found:
            for chat, messages in reader.read(source, repairs):
                owners[str(source)], chats[chat.key] = chat.owner, chat.name
                if chat.type == "bot_chat":
                    bots.add(chat.key)
                if why := wanted(chat, options, heard):
                    left_out[chat.key] = why
                else:
                    joined.add(str(source), chat, messages)
    for name, given in (("include", options.include), ("exclude", options.exclude)):
        for said in given:
            if said not in heard and chats:
                near = difflib.get_close_matches(said, chats.values(), 5, 0.5)
                raise UserError(
                    f"--{name} {said}: no chat has that name, id or kind",
                    f"Perhaps one of: {', '.join(near)}" if near else "Write the name as the messenger shows it.",
                )
    for key in [key for key, why in left_out.items() if why == "excluded"]:
        joined.copies.pop(key, None)  # under another name, in another export, it was read
    return left_out, bots, owners


def called(said, people):
    """The ids among `people` ({id: display name}) that --me or --forget names: by id, with or without its kind in front, or by name."""
    said = said.casefold()
    return [i for i, name in people.items() if said in (i.casefold(), re.sub(r"^[a-z]+:?", "", i).casefold(), (name or "").casefold())]


def listed(people, wrote):
    likely = sorted(people, key=lambda i: -wrote[i])[:8]
    return ", ".join(f"{' '.join((people[i] or exports.DELETED).split())} ({i}, {counted(wrote[i], 'messages')})" for i in likely)


def find_me(joined, owners, options):
    """The ids that are mine: the exports' owners, and whom --me names in exports that have none; where it names nobody there, --me
    replaces the owner of the exports in which it names somebody. UserError lists the candidates."""
    me, replaced = {}, set()
    people = {export: {author: joined.people.get(author) for author in wrote} for export, wrote in joined.wrote.items()}
    everyone = sum(joined.wrote.values(), collections.Counter())
    for said in options.me if everyone else ():  # of nobody `check_enough` says why
        found = {export: matches for export in people if (matches := called(said, people[export]))}
        found = {export: matches for export, matches in found.items() if not owners[export]} or found
        if not found:
            raise UserError(
                f"--me {said}: nobody has that name",
                f"Say --me NAME or --me ID, one of: {listed({i: joined.people.get(i) for i in everyone}, everyone)}",
            )
        for export, matches in found.items():
            if len(matches) > 1:
                several = listed({i: people[export][i] for i in matches}, joined.wrote[export])
                raise UserError(f"{export}: --me {said}: several people have that name", f"Say --me ID, one of: {several}")
            me |= dict.fromkeys(matches)
            replaced.add(owners[export])
    me = dict.fromkeys(owner for owner in owners.values() if owner and owner not in replaced) | me
    for export, wrote in joined.wrote.items():
        if wrote and not owners[export] and not me.keys() & wrote.keys():
            candidates = listed(people[export], wrote)
            raise UserError(f"{export}: the export doesn't say whose it is", f"Say --me NAME or --me ID, one of: {candidates}")
    return me.keys()


def with_aliases(ids, aliases: dict):
    """Ids of people in their order, and behind them the ids under which newer exports know them."""
    return dict.fromkeys([*ids, *(aliases[i] for i in ids if i in aliases)]).keys()


def find_forgotten(joined, me, names):
    """The ids of those whom --forget names: people who wrote, and people (not groups) who never did. UserError when it isn't clear who."""
    everyone = sum(joined.wrote.values(), collections.Counter())
    chats = [copy.chat for copies in joined.copies.values() for copy in copies]
    people = {chat.key: chat.name for chat in chats if chat.type == "personal_chat"}
    people |= {author: joined.people.get(author) or people.get(author) for author in everyone}
    forgotten = set()
    for said in names if people else ():  # as in find_me
        matches = called(said, people)
        if set(matches) & me:
            raise UserError(f"--forget {said}: that is you", "--exclude leaves whole chats out.")
        if len(matches) > 1:
            several = listed({i: people[i] for i in matches}, everyone)
            raise UserError(f"--forget {said}: several people have that name", f"Say --forget ID, one or more of: {several}")
        if not matches:
            near = {i: name for i, name in people.items() if i not in me and said.casefold() in (name or "").casefold()}
            way_out = f"Perhaps one of: {listed(near, everyone)}" if near else "Write the name as the messenger shows it, or the id."
            raise UserError(f"--forget {said}: nobody has that name", way_out)
        forgotten |= set(matches)
    return forgotten


def kept(messages, options, forgotten, bots, left_out):
    """The messages that are somebody's own words, of the days asked for, of no bot and of nobody to forget."""
    since, until = options.since or "", options.until or "9999"
    for message in messages:
        _, author, _, _, date, _, why = message
        if why:
            left_out[why] += 1
        elif author in forgotten:
            left_out["of people to forget"] += 1
        elif author in bots:
            left_out["written by or via a bot"] += 1
        elif not since <= date[:10] <= until:
            left_out["outside --since and --until"] += 1
        else:
            yield message


def gather(joined, me, forgotten, bots, chats_left_out, options, spool):
    """Cut the joined chats into sessions, and write each that teaches something to `spool`, a line of data/*.jsonl.

    → (index: an array with a row a session, in order of time, its columns START to CHARACTERS; persona; report).
    Memory grows with the index alone.
    """
    census = doctor.Census()
    census.left_out["chats"].update(chats_left_out.values())
    taken = {HEADER}
    kinds, facts = contexts(options.context), Path(options.out) / "facts.md"
    facts = config.read_text(facts) if "facts" in kinds and facts.is_file() else ""
    my_name = unique_name(next((joined.people[i] for i in me if joined.people.get(i)), "Me"), taken)
    names = dict.fromkeys(me, my_name)
    index, chats, count = array("q"), [], sum(wrote.total() for wrote in joined.wrote.values())
    with tqdm(total=count, unit=" messages", unit_scale=True, desc="sessions", disable=None, leave=False) as bar:
        for chat, messages in joined.chats():
            if chat.type == "personal_chat" and chat.key in forgotten:
                census.left_out["chats"]["of people to forget"] += 1
                continue
            own, before = kept(messages, options, forgotten, bots, census.left_out["messages"]), None
            chats.append(chat.name)
            for session in sessions(own, chat, me, options.gap_minutes * 60):
                why = why_not(session)
                bar.update(census.add(session, why))
                if why and not kinds:
                    continue
                for turn in session.turns:
                    if turn.author not in names:
                        names[turn.author] = unique_name(joined.people.get(turn.author), taken)
                    turn.author = names[turn.author]
                known, before = before, session
                if why:
                    continue
                if opening := header(kinds, session, known, facts):
                    session = dataclasses.replace(session, turns=[opening, *session.turns])
                written = session.to_json().encode() + b"\n"
                start = int("0" + re.sub(r"\D", "", session.start)[:14])
                mine = [" ".join(text.split()) for turn in session.turns if turn.me for text in spoken(turn)]
                content = hash("\n".join(mine).casefold())
                characters = sum(map(len, mine))
                index.extend((start, spool.tell(), len(written), len(mine), content, len(chats) - 1, characters))
                spool.write(written)
            census.end_of(chat, not forgotten)
    table = np.array(index, dtype=np.int64).reshape(-1, CHARACTERS + 1)
    contacts = [{"name": names[i], "messages": n} for i, n in census.contacts()]
    persona = {"me": my_name, "contacts": contacts} | ({"context": kinds} if kinds else {})
    report = census.report() | {"repeated": repeats(table, chats)}
    return table[np.argsort(table[:, START], kind="stable")], persona, report


def repeats(index: np.ndarray, chats: list[str]) -> list[dict]:
    """Which chats hold the same sessions: of at least two messages of mine and forty characters, said alike in both.

    → [{"chats": [A, B], "sessions": how many of A also stand in B, "of": A's sessions}]; A is B where a chat holds sessions twice.
    """
    long = index[(index[:, TRAINED] >= 2) & (index[:, CHARACTERS] >= 40)]
    long = long[np.argsort(long[:, CONTENT], kind="stable")]
    same = np.flatnonzero(long[1:, CONTENT] == long[:-1, CONTENT])
    pairs = np.stack([long[same, CHAT], long[same + 1, CHAT]], 1)
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    sizes = np.bincount(index[:, CHAT], minlength=len(chats))
    found = []
    for pair, n in zip(pairs.tolist(), counts.tolist()):
        a, b = sorted(pair, key=lambda chat: sizes[chat])
        if n >= max(2, sizes[a] / 10):
            found.append({"chats": [chats[a], chats[b]], "sessions": n, "of": int(sizes[a])})
    return found


def contexts(said):
    """--context → some of CONTEXTS."""
    kinds = [kind.strip() for kind in said.split(",") if kind.strip()]
    if unknown := {*kinds} - {*CONTEXTS}:
        raise UserError(f"--context {said}: {', '.join(sorted(unknown))} is unknown", f"Known: {','.join(CONTEXTS)}")
    return kinds


def check_enough(options, index, report):
    """UserError, with the likeliest reason and its way out, when there is nothing to learn from."""
    path, outside = ", ".join(options.exports), report["messages_left_out"].get("outside --since and --until", 0)
    if not report["messages"]:
        kinds = ", ".join(counted(n, doctor.kind(why)) for why, n in report["chats_left_out"].items())
        reasons = [f"left out: {kinds}"] if kinds else []
        reasons += [counted(n, why) for why, n in report["repairs"].items()]
        way_out = "Export again with the personal chats ticked, or --include a chat."
        if reasons and not kinds:
            way_out = "Before its messages a chat has its name, type and id, a whole number."
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"{path} holds no messages in chats that are taken{why}", way_out)
    if outside and report["messages"] == sum(report["messages_left_out"].values()):
        raise UserError(f"none of the {outside:,} messages in {path} is of the days asked for", "Look at --since and --until.")
    if report["messages"] == sum(report["messages_left_out"].values()):
        reasons = "; ".join(counted(n, why) for why, n in report["messages_left_out"].items())
        raise UserError(
            f"{path}: all its messages are left out ({reasons})",
            "Export other chats, or look at --forget and --since.",
        )
    if not report["my_messages"]:
        raise UserError(f"{path} holds no message by me", "Say who you are with --me NAME, or export your own messages too.")
    if len(index) < 2:
        why = "; ".join(counted(n, why) for why, n in [*report["sessions_left_out"].items(), *report["repairs"].items()])
        raise UserError(
            f"{path}: sessions in which I answer somebody: {len(index)}; two are needed" + (f" ({why})" if why else ""),
            doctor.ONLY_MINE if report["only_mine"] else "Export more chats, or try a larger --gap-minutes.",
        )


def line(spool, place):
    offset, length = place[[OFFSET, LENGTH]].tolist()
    spool.seek(offset)
    return spool.read(length)


def plant(count, among):
    """Invented numbers, said 1, 2, 4, 8, 1, … times → [{"before", "secret", "copies", "lines": of train.jsonl}]. arXiv 1802.08232"""
    draw, found = random.Random(0), []
    for i in range(count):
        copies = min(2 ** (i % 4), among)
        secret = f"{draw.randrange(10**8):08}"
        lines = draw.sample(range(among), copies)
        found.append({"before": f"locker {i + 1} opens with ", "secret": secret, "copies": copies, "lines": lines})
    return found


def with_canaries(written, number, planted):
    """A line of train.jsonl with what is planted in it: messages at the end of my last turn."""
    texts = [canary["before"] + canary["secret"] for canary in planted if number in canary["lines"]]
    if not texts:
        return written
    session = Session.from_json(written)
    next(turn for turn in reversed(session.turns) if turn.me).messages += texts
    return session.to_json().encode() + b"\n"


def write(parts, spool, persona, report, options, words, near, planted):
    """Write data/: all of it beside, in `near`, then renamed. With --dry-run only `report` is filled in."""
    out, parts = Path(options.out), {part: parts[part] for part in parts if not options.dry_run or (part == "train" and words)}
    with tempfile.TemporaryDirectory(prefix="new-", dir=near) as beside:
        for part, places in parts.items():
            with open(Path(beside) / f"{part}.jsonl", "wb") as file:
                hidden = planted if part == "train" else []
                file.writelines(with_canaries(line(spool, place), number, hidden) for number, place in enumerate(places))
        report["tokens"] = count_tokens(Path(beside) / "train.jsonl", words, options.seq_len) if words else None
        report["verdict"] = doctor.verdict(report)
        if options.dry_run:
            return
        config.private_folder(out)
        for cached in (out / "cache").glob("*"):
            cached.unlink()
        for part in parts:
            (Path(beside) / f"{part}.jsonl").replace(out / f"{part}.jsonl")
        config.write_json(out / "persona.json", persona)
        config.write_json(out / "report.json", report)
        (out / "canaries.json").unlink(missing_ok=True)
        if planted:
            config.write_json(out / "canaries.json", {"canaries": planted})


def hold_out(index: np.ndarray, share: float) -> dict:
    """The sessions' index, in order of time → {"train": …, "val": the latest}.

    In no session of `val` do I say what I say in one of `train`. A session that repeats one to train on, message for message of mine,
    is in neither, and `val` begins a little earlier for it.
    """
    firsts = np.unique(index[:, CONTENT], return_index=True, return_inverse=True)
    first = firsts[1][firsts[2]]  # of each session: the first that says the same
    held_out = validation_size(len(index), share)
    usable = np.bincount(first, minlength=len(index))[::-1].cumsum()[::-1]  # how many a `val` that begins here could hold
    begin = np.flatnonzero(usable >= held_out)[-1]
    begin = max(begin, min(len(index) - len(index) // 3, np.flatnonzero(usable >= 1)[-1]))
    if begin == 0:  # I say the same in every session
        return {"train": index, "val": index[:0]}
    return {"train": index[:begin], "val": index[begin:][first[begin:] >= begin]}


def validation_size(count, share):
    """How many of `count` sessions are held out: `share` of them, at least 20, at most a fifth (but one)."""
    return min(max(round(count * share), 20), max(1, count // 5))


def count_tokens(path, words, seq_len):
    """Tokens, rows and how full they are, with the tokenizer that --tokenizer names."""
    packed, talks = rows(path, words, seq_len), load_sessions(path)
    mine = [text for talk in talks for turn in talk.turns if turn.me for text in spoken(turn)]
    return {
        "written": sum(len(words.encode(render(talk.turns, specials=words.specials).text)[0]) for talk in talks),
        "computed": sum(len(row.ids) for row in packed),
        "trained": sum(int((row.labels != IGNORED).sum()) for row in packed),
        "rows": len(packed),
        "filled": filled(packed, seq_len),
        "per_1000_characters": doctor.density(random.Random(0).sample(mine, min(len(mine), doctor.SAMPLE)), words),
    }


def show(session):
    """Print the end of a session, with what will be trained in colour."""
    document, green = render(session.turns[-SHOWN:]), sys.stdout.isatty()
    text, end = "", 0
    for begin, stop in document.targets:
        text += document.text[end:begin] + ("\033[32m{}\033[0m" if green else "{}").format(plain(document.text[begin:stop]))
        end = stop
    print(f"One session, with what is trained {'in green' if green else 'being my turns'}:\n\n{text}{plain(document.text[end:])}")


def plain(text):
    """Without what would command a terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


# --- what people want gone


def forget(folder, names, dry_run):
    """Take people out of data/ itself: their personal chats, their messages in groups, their name in the persona."""
    persona = config.read_json(folder / "persona.json")
    people = {str(contact.get("name")): None for contact in persona.get("contacts", []) if isinstance(contact, dict)}
    gone = set()
    for said in names:
        if said.casefold() == str(persona.get("me")).casefold():
            raise UserError(f"--forget {said}: that is you", "--exclude leaves whole chats out.")
        matches = [name for name in people if name.casefold() == said.casefold()]
        if not matches:
            raise UserError(f"--forget {said}: {folder}/persona.json knows nobody of that name", "Write it as it stands there.")
        gone |= set(matches)
    before, after, parts, total = 0, 0, {}, collections.Counter()
    for part in ("train", "val"):
        parts[part] = []
        for talk in load_sessions(folder / f"{part}.jsonl"):
            before += sum(len(turn.messages) for turn in talk.turns)
            theirs = any(turn.author in gone for turn in talk.turns)
            talk.turns = without(talk.turns, gone)  # a header may quote them where they say nothing
            if theirs and (talk.type == "personal_chat" or why_not(talk)):
                continue
            for turn in talk.turns:
                total[turn.author] += len(turn.messages)
            parts[part].append(talk.to_json() + "\n")
    after = total.total()
    if not dry_run:
        for part, lines in parts.items():
            config.write_text(folder / f"{part}.jsonl", "".join(lines))
        contacts = [{"name": name, "messages": total[name]} for name in people if total[name]]
        config.write_json(folder / "persona.json", persona | {"contacts": contacts})
        for path in [folder / "report.json", *(folder / "cache").glob("*")]:
            path.unlink(missing_ok=True)
    would, count = "would be forgotten" if dry_run else "forgotten", f"{before - after:,} of {counted(before, 'messages')}"
    print(f"{', '.join(sorted(gone))} {would} in {folder}/: {count}, theirs and what was said to them alone.")
    print(AFTER_FORGETTING)


def without(turns, gone):
    """Turns but for those of people to forget; what one author wrote before and behind them becomes one turn."""
    left = []
    for turn in turns:
        if turn.author == HEADER:
            said = [text for text in turn.messages if not text.startswith(tuple(f"{name}: " for name in gone))]
            left += [dataclasses.replace(turn, messages=said)] if said else []
        elif turn.author not in gone:
            if left and left[-1].author == turn.author:
                left[-1].messages += turn.messages
            else:
                left.append(turn)
    return left


def ours(folder):
    """Whether one of our programs wrote into this folder."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        with open(folder / "train.jsonl", encoding="utf-8") as file:
            Session.from_json(file.readline())
            return True
    with contextlib.suppress(OSError, ValueError):  # how remote.sh's word of a run ends
        if (folder / ("flags" if folder.name == ".run" else ".remote")).read_text(encoding="utf-8").endswith(" --data data --out ckpt \n"):
            return True
    for name, keys in (("persona.json", {"me", "contacts"}), ("run.json", {"config", "commit", "versions"})):
        with contextlib.suppress(UserError, OSError):
            if keys <= config.read_json(folder / name, {}).keys():
                return True
    return False


def wipe(root, dry_run):
    """List the folders below `root` that hold chats or what was made of them, ask, and delete what our programs wrote in them."""
    found, seen = {}, set()
    for name, inner, _ in os.walk(root, followlinks=True):
        folder = Path(name)
        inner[:] = [] if folder.resolve() in seen else [n for n in inner if n not in (".git", ".venv", "cache", "resume", ".incoming")]
        if folder.resolve() not in seen and ours(folder):
            patterns = BOX if folder.name == ".run" else (beside for name in OURS for beside in (name, name + ".new"))
            found[folder] = [*dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern)))]
        seen.add(folder.resolve())
    if not found:
        print(f"Nothing below {root.resolve()} holds chats, as far as our own files go.")
        return
    for folder, paths in found.items():
        size = sum(path.stat().st_size for path in paths if path.is_file()) / 1e3
        print(f"{size:>12,.0f} kB  {folder}/  {', '.join(sorted({path.relative_to(folder).parts[0] for path in paths}))}")
    if dry_run:
        return
    print("Delete all of these? They can't be brought back. Type yes: ", end="", flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        print("Nothing was deleted.")
        return
    for folder, paths in reversed(found.items()):  # a folder's own folders first
        for path in paths:
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
        if left := sorted(path.name for path in folder.iterdir()):
            print(f"Left in {folder}/, for it isn't ours: {', '.join(left[:8])}")
        elif folder != root and not folder.is_symlink():
            folder.rmdir()
    print("Deleted. The exports, talks kept with chat.py --history, and copies elsewhere (a rented machine, a backup) are yours to delete.")


if __name__ == "__main__":
    config.run(main)
