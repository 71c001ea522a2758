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
import dataclasses
import datetime
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import config
import exports
from config import UserError, flag
from tokenizer import IM_END, IM_START

IGNORED = -100  # the label of a token that is no target
SPECIALS = (IM_START, IM_END, "<s>", "</s>", "<unk>")  # what text loses when no tokenizer says which it has
WORD_JOINER = "\u2060"
MARK = re.compile(r"<(voice|video|gif|audio|photo|file|poll|contact|location|sticker)>")
TALKS = ("personal_chat", "private_group", "private_supergroup", "public_supergroup")  # kept by default
CONTEXT = 4  # a piece of a long session repeats at most 1 / CONTEXT of a row as context


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
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

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
    """A chat's messages → its sessions, cut where nobody wrote for more than `gap` seconds; authors are ids. `me`: my id."""
    session, last = None, None
    for message in messages:
        if session is None or message.at - last > gap:
            if session:
                yield session
            session = Session(chat.name, chat.id, chat.type, message.date, [])
        last = message.at
        if not session.turns or session.turns[-1].author != message.author:
            session.turns.append(Turn(message.author, message.author == me, message.date, []))
        session.turns[-1].messages.append(message.text)
    if session:
        yield session


def why_not(session):
    """Why a session teaches nothing of how I answer; "" when it does."""
    mine = [i for i, turn in enumerate(session.turns) if turn.me and not all(map(MARK.fullmatch, turn.messages))]
    if not mine:
        return "sessions in which I say nothing"
    return "" if mine[-1] > 0 else "sessions in which nobody speaks before me"


def unique_names(people):
    """{id: display name} → {id: name}: one line, no marks, no two alike (`Bob`, `Bob (2)`), none of them `system`."""
    names, taken = {}, {"system"}
    for person, shown in people.items():
        plain = " ".join(re.sub(r"<\|[^|<>]*\|>|</?s>|<unk>|>>>", " ", shown or exports.DELETED).split()) or exports.DELETED
        name, number = plain, 2
        while name.casefold() in taken:
            name, number = f"{plain} ({number})", number + 1
        taken.add(name.casefold())
        names[person] = name
    return names


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
        trained = [
            (turn.me or loss_on == "everyone") and (number, i) >= first and not MARK.fullmatch(message)
            for i, message in enumerate(turn.messages)
        ]
        for message, target in zip(turn.messages, trained):
            begin = len(text) + 1
            text += "\n>>> " + re.sub("^>>>", " >>>", safe(message, specials), flags=re.MULTILINE)
            if target:
                targets.append((begin, len(text) + 1))  # with the newline behind it: that one goes on is mine too
                words.append((begin + len(">>> "), len(text)))
        if closed or number < len(turns) - 1:
            if trained[-1]:
                targets[-1] = (begin, len(text) + len(IM_END))  # or that one ends
            text += IM_END
        text += "\n"
    return Document(text, targets, words)


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
    """Session → Samples of at most `seq_len` tokens, together every target once. What follows the last target is left off.

    A long session is cut on turn borders, a long turn on message borders, a long message on tokens; each piece begins with what
    preceded it, without targets, up to a quarter of the row.
    """
    taught = [
        i for i, turn in enumerate(session.turns) if (turn.me or loss_on == "everyone") and not all(map(MARK.fullmatch, turn.messages))
    ]
    if not taught:
        return
    turns = session.turns[: taught[-1] + 1]
    whole = encode(render(turns, loss_on, specials=tokenizer.specials), tokenizer, number)
    if len(whole.ids) <= seq_len:
        yield whole
        return

    units = [(t, m) for t, turn in enumerate(turns) for m in range(len(turn.messages))]
    size = lambda text: len(tokenizer.encode(text)[0])  # noqa: E731
    headers = {name: size(f"{IM_START}{safe(name, tokenizer.specials)}{IM_END}\n") for name in {turn.author for turn in turns}}
    header = [headers[turns[t].author] for t, m in units]
    texts = [safe(turns[t].messages[m], tokenizer.specials) for t, m in units]
    cost = [size(f"\n>>>  {text}") + (header[u] if units[u][1] == 0 else 0) for u, text in enumerate(texts)]
    until = np.concatenate([[0], np.cumsum(cost)])  # tokens before each unit, rather too many than too few
    borders = [u for u, (t, m) in enumerate(units) if m == 0] + [len(units)]

    def length(begin, end):
        return until[end] - until[begin] + (header[begin] if units[begin][1] else 0)

    def piece(context, first, end):
        """The sample of units[context:end], trained from units[first] on."""
        (from_turn, from_message), (last_turn, last_message), (turn, message) = units[context], units[end - 1], units[first]
        part = [dataclasses.replace(t) for t in turns[from_turn : last_turn + 1]]
        closed = last_message == len(part[-1].messages) - 1
        part[-1].messages = part[-1].messages[: last_message + 1]
        part[0].messages = part[0].messages[from_message:]
        start = (turn - from_turn, message - (from_message if turn == from_turn else 0))
        return encode(render(part, loss_on, start, closed, tokenizer.specials), tokenizer, number)

    first = 0
    while first < len(units):
        own_turn = borders[bisect.bisect_right(borders, first) - 1]
        starts = [u for u in borders if u <= own_turn] + list(range(own_turn + 1, first + 1))
        context = next(u for u in starts if u == first or length(u, first) <= seq_len // CONTEXT)
        if length(context, first + 1) > seq_len:
            context = first
        end = first
        while end < len(units) and length(context, end + 1) <= seq_len:
            end += 1
        if end == first:
            yield from windows(piece(first, first, first + 1), seq_len)
            first += 1
            continue
        before = borders[bisect.bisect_right(borders, end) - 1]
        end = before if before > first else end
        sample = piece(context, first, end)
        if (sample.labels != IGNORED).any():
            yield sample
        first = end


def windows(sample, seq_len):
    """A sample longer than a row → samples of a row, each opening with a quarter of a row that the one before it ended with."""
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
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines, which also cuts at U+2028
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


def rows(path, tokenizer, seq_len, loss_on="me"):
    """The packed rows of a data/*.jsonl, cached beside it by content. → list of Row."""
    path = Path(path)
    if not path.exists():
        load_sessions(path)
    key = hashlib.sha256(f"{seq_len} {loss_on} {tokenizer.bos} {tokenizer.engine.to_str()} ".encode())
    key.update(path.read_bytes() + Path(__file__).read_bytes())
    cache = path.parent / "cache" / f"{path.stem}-{key.hexdigest()[:16]}.safetensors"
    names = [field.name for field in dataclasses.fields(Row)]
    if cache.exists():
        stored = load_file(cache)
        ends = {n: np.cumsum(stored[f"{n}.lengths"]) for n in names}
        return [Row(*(stored[n][ends[n][i] - stored[f"{n}.lengths"][i] : ends[n][i]] for n in names)) for i in range(len(ends["ids"]))]
    talks = load_sessions(path)
    samples = [
        s
        for number, talk in enumerate(tqdm(talks, f"tokenising {path.name}", leave=False))
        for s in split(talk, tokenizer, seq_len, loss_on, number)
    ]
    packed = pack(samples, seq_len)
    if packed:
        cache.parent.mkdir(exist_ok=True)
        for old in cache.parent.glob(f"{path.stem}-*.safetensors"):
            old.unlink()
        stored = {n: np.concatenate([getattr(r, n) for r in packed]) for n in names}
        lengths = {f"{n}.lengths": np.array([len(getattr(r, n)) for r in packed]) for n in names}
        save_file(stored | lengths, cache.with_suffix(".new"))
        cache.with_suffix(".new").replace(cache)
    return packed


# --- the command


@dataclasses.dataclass(frozen=True)
class Config:
    """Turn a Telegram export into data/train.jsonl and data/val.jsonl: sessions to read, to edit and to train on."""

    export: str = flag("", "result.json, as Telegram Desktop wrote it", positional=True)
    out: str = flag("data", "the folder to write")
    me: str | None = flag(None, "whose voice to learn: a name or an id (default: whose export it is)")
    gap_minutes: float = flag(10.0, "a session ends where nobody wrote for so long")
    val: float = flag(0.05, "share of the sessions, the latest, kept for validation (at least 20 of them, at most a fifth)")
    since: str | None = flag(None, "leave out messages before this day, YYYY-MM-DD")
    until: str | None = flag(None, "leave out messages after this day, YYYY-MM-DD")
    include: tuple[str, ...] = flag((), "take this chat too, by name or id: a bot, a channel, Saved Messages (repeatable)")
    exclude: tuple[str, ...] = flag((), "leave this chat out, by name or id (repeatable)")
    tokenizer: str | None = flag(None, "a model folder: count tokens and rows in the report")
    seq_len: int = flag(1024, "tokens a row, for that count")
    dry_run: bool = flag(False, "report only, write nothing")
    overwrite: bool = flag(False, "replace what --out holds")


def find_me(path, said):
    """The id of the person to learn: the export's owner, or whom --me names. UserError lists the candidates."""
    people, owner, saved = {}, None, None
    for chat, messages in exports.read(path):
        owner = owner or chat.owner
        if said is None and owner:
            return owner
        if chat.type == "saved_messages":
            saved = f"user{chat.id}"
        for message in messages:
            if message.author:
                seen = people.setdefault(message.author, [message.name, 0])
                seen[1] += 1
    if said is None and saved:
        return saved
    matches = [i for i, (name, _) in people.items() if said is not None and said.casefold() in (i.casefold(), (name or "").casefold())]
    if len(matches) == 1:
        return matches[0]
    if not people:
        raise UserError(
            f"{path} holds no messages",
            "Export again, with the personal chats ticked.",
        )
    likely = sorted(matches or people, key=lambda i: -people[i][1])[:8]
    listed = ", ".join(f"{people[i][0] or exports.DELETED} ({i}, {people[i][1]} messages)" for i in likely)
    why = (
        "the export doesn't say whose it is"
        if said is None
        else f"--me {said}: {'several people have' if matches else 'nobody has'} that name"
    )
    raise UserError(
        f"{path}: {why}",
        f"Say --me NAME or --me ID, one of: {listed}",
    )


def wanted(chat, options):
    """Why a chat is left out by its kind or by --include and --exclude; "" when it belongs."""
    names = {chat.name.casefold(), chat.id}
    if names & {n.casefold() for n in options.exclude}:
        return "excluded"
    if chat.type in TALKS or names & {n.casefold() for n in options.include}:
        return ""
    return chat.type


def kept(messages, options, report, names, authors, bar):
    """The messages that are somebody's own words and of the days asked for; what they tell is noted in the other arguments."""
    for message in messages:
        bar.update()
        report["messages"] += 1
        why = message.left_out
        if not why and not (options.since or "") <= message.date[:10] <= (options.until or "9999"):
            why = "outside --since and --until"
        if why:
            report["messages_left_out"][why] += 1
            continue
        names[message.author] = message.name or names.get(message.author)
        authors[message.author] += 1
        yield message


def gather(path, me, options, spool):
    """Read the export; write every session that teaches something to `spool`, authors as ids.

    → (index: [(start, place in the spool, length)], names: {id: latest display name}, report). Memory grows with the index alone.
    """
    report = {"my_messages": 0, "only_mine": []}
    for what in ("chats", "messages", "sessions"):
        report |= {what: 0, f"{what}_left_out": collections.Counter()}
    index, names = [], {}
    bar = tqdm(unit=" messages", desc=f"reading {Path(path).name}", disable=None, leave=False)
    for chat, messages in exports.read(path):
        report["chats"] += 1
        if why := wanted(chat, options):
            report["chats_left_out"][why] += 1
            continue
        authors = collections.Counter()
        for session in sessions(kept(messages, options, report, names, authors, bar), chat, me, options.gap_minutes * 60):
            report["sessions"] += 1
            if why := why_not(session):
                report["sessions_left_out"][why] += 1
                continue
            line = session.to_json().encode() + b"\n"
            index.append((session.start, spool.tell(), len(line)))
            spool.write(line)
        report["my_messages"] += authors[me]
        if chat.type != "personal_chat" and set(authors) == {me}:
            report["only_mine"].append(chat.name)
    bar.close()
    return sorted(index), names, report


def validation_size(count, share):
    """How many of `count` sessions are held out: `share` of them, at least 20, at most a fifth (but one)."""
    return min(max(round(count * share), 20), max(1, count // 5))


def main():
    options = config.parse(Config)
    check_days(options)
    if not options.dry_run:
        config.check_folder(options.out, options.overwrite)
    me = find_me(options.export, options.me)
    with tempfile.TemporaryFile() as spool:
        index, people, report = gather(options.export, me, options, spool)
        check_enough(options, me, index, report)
        names, held_out = unique_names(people), validation_size(len(index), options.val)
        parts = {"train": index[:-held_out], "val": index[-held_out:]}
        report["sessions_kept"] = {part: len(places) for part, places in parts.items()}
        with tempfile.TemporaryDirectory(dir=None if options.dry_run else config.private_folder(options.out)) as beside:
            contacts = write_sessions(Path(beside), parts, spool, names)
            if options.tokenizer:
                report["tokens"] = count_tokens(Path(beside), options)
            if not options.dry_run:
                for part in parts:
                    (Path(beside) / f"{part}.jsonl").replace(Path(options.out) / f"{part}.jsonl")
                config.write_json(Path(options.out) / "persona.json", {"me": names[me], "contacts": contacts})
                config.write_json(Path(options.out) / "report.json", report)
        show(report, read_session(spool, parts["train"][-1], names), options)


def check_days(options):
    for name in ("since", "until"):
        try:
            datetime.datetime.strptime(getattr(options, name) or "2000-01-01", "%Y-%m-%d")
        except ValueError:
            raise UserError(f"--{name} {getattr(options, name)} is no day", "Write it as 2021-12-31.") from None


def check_enough(options, me, index, report):
    path = options.export
    if not report["messages"]:
        raise UserError(
            f"{path} holds no messages in chats that belong", "Export again with the personal chats ticked, or --include a chat."
        )
    if not report["my_messages"]:
        raise UserError(f"{path} holds no message by {me}", "Say who you are with --me NAME, or export your own messages too.")
    if len(index) < 2:
        raise UserError(
            f"{path}: {len(index)} sessions in which I answer, 2 are the least", "Export more chats, or try a larger --gap-minutes."
        )


def read_session(spool, place, names):
    """A session as `gather` spooled it, with names for ids."""
    _, begin, length = place
    spool.seek(begin)
    session = Session.from_json(spool.read(length))
    for turn in session.turns:
        turn.author = names[turn.author]
    return session


def write_sessions(folder, parts, spool, names):
    """Write {part: places in the spool} to part.jsonl. → [{name, messages}] of whom I talk with, personal chats first, then by messages."""
    private, total, mine = collections.Counter(), collections.Counter(), set()
    for part, places in parts.items():
        with open(folder / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for place in places:
                session = read_session(spool, place, names)
                file.write(session.to_json() + "\n")
                for turn in session.turns:
                    total[turn.author] += len(turn.messages)
                    private[turn.author] += len(turn.messages) * (session.type == "personal_chat")
                    mine |= {turn.author} if turn.me else set()
    order = sorted(set(total) - mine, key=lambda name: (-private[name], -total[name], name))
    return [{"name": name, "messages": total[name]} for name in order]


def count_tokens(folder, options):
    """Tokens, rows and how full they are, with the tokenizer that --tokenizer names."""
    import tokenizer

    words = tokenizer.load(options.tokenizer)
    packed = rows(folder / "train.jsonl", words, options.seq_len)
    written = (render(talk.turns, specials=words.specials).text for talk in load_sessions(folder / "train.jsonl"))
    return {
        "written": sum(len(words.encode(text)[0]) for text in written),
        "computed": sum(len(row.ids) for row in packed),
        "trained": sum(int((row.labels != IGNORED).sum()) for row in packed),
        "rows": len(packed),
        "filled": filled(packed, options.seq_len),
    }


def show(report, example, options):
    """The report for a person, and one session with what will be trained in colour."""

    def line(count, what, reasons=()):
        left = "".join(f"\n{'':>10}- {n:,} {why}" for why, n in sorted(dict(reasons).items(), key=lambda item: -item[1]))
        print(f"{count:>9,} {what}{left}")

    line(report["chats"], "chats", report["chats_left_out"])
    line(report["messages"], "messages in the chats that belong", report["messages_left_out"])
    line(report["my_messages"], "of them mine")
    line(report["sessions"], f"sessions (cut at {options.gap_minutes:g} minutes of silence)", report["sessions_left_out"])
    kept = report["sessions_kept"]
    line(sum(kept.values()), f"sessions kept: {kept['train']:,} to train on, the latest {kept['val']:,} to validate")
    if tokens := report.get("tokens"):
        line(tokens["written"], "tokens in the sessions to train on")
        line(tokens["computed"], "tokens computed: none behind my last word or far before the next, some twice as context")
        line(
            tokens["rows"],
            f"rows of {options.seq_len:,} tokens, {tokens['filled']:.1%} filled; {tokens['trained']:,} of their tokens trained",
        )
    if report["only_mine"]:
        print(f"\nOnly my own messages were exported from: {', '.join(report['only_mine'][:5])}. There is nothing to answer in them:\n"
              "export again and untick 'Only my messages'.")  # fmt: skip
    document = render(example.turns)
    coloured, end = "", 0
    paint = "\033[32m{}\033[0m" if sys.stdout.isatty() else "{}"
    for begin, stop in document.targets:
        coloured += document.text[end:begin] + paint.format(document.text[begin:stop])
        end = stop
    print(
        f"\nOne session, with what is trained {'in green' if sys.stdout.isatty() else 'being my turns'}:\n\n{coloured}{document.text[end:]}"
    )
    if not options.dry_run:
        print(
            f"Written to {options.out}/. Read it, edit it; then: python train.py --lora"
            + ("" if options.out == "data" else f" --data {options.out}")
        )


if __name__ == "__main__":
    config.run(main)
