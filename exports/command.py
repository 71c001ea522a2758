"""Make data/ from chat exports: `python data.py result.json`.

    read_exports ▶ find_me, find_forgotten ▶ build_sessions ▶ hold_out ▶ write_sessions ▶ save

Messages and sessions wait in temporary files: memory grows with an index of sessions alone.
"""

import collections
import csv
import dataclasses
import datetime
import difflib
import functools
import gc
import itertools
import random
import re
import shlex
import signal
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

import cli
import data
import exports
from cli import UserError, flag
from exports import Chat, Message, Reason, report
from exports.join import MessageStore
from exports.redact import redact
from exports.source import Source
from exports.timing import TimingStats
from weights.tokenizer import load_tokenizer

AFTER_FORGETTING = (
    "Others may still mention them in their own words. Train again what was trained on them, "
    "and give --forget at the next export too."
)
SHOWN_TURNS = 16  # turns of the session that is printed
# The index of sessions: when each starts, where its line lies in the spool file, how many of its
# messages are trained, and a hash of what I say in it.
INDEX = np.dtype([(name, np.int64) for name in ("start", "offset", "length", "trained", "content")])


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn chat exports into data/train.jsonl and data/val.jsonl: sessions to edit and train on.

    python data.py result.json                  Telegram (JSON), WhatsApp (.txt, .zip), or a folder
    python data.py *.zip chats/*.csv            other messengers: docs/EXPORTS.md
    python data.py old.json new.json chat.zip   several as one: joined by chat, no message twice
    """

    exports: tuple[str, ...] = flag(
        (),
        "Telegram's result.json, WhatsApp's .txt or .zip, others', a CSV, a folder",
        positional=True,
        group="what to read",
    )
    me: tuple[str, ...] = flag(
        (), "whose voice: a name or an id, once a messenger", shown="the export's owner"
    )
    same: tuple[str, ...] = flag(
        (), 'one person\'s names and ids everywhere: "Ann,ann_99,+49 170…" (repeatable)'
    )
    since: str | None = flag(None, "leave out messages before this day, YYYY-MM-DD")
    until: str | None = flag(None, "leave out messages after this day, YYYY-MM-DD")
    include: tuple[str, ...] = flag(
        (), "also read this bot, channel or Saved Messages, by name, id or type (repeatable)"
    )
    exclude: tuple[str, ...] = flag((), "leave out this chat, by name, id or type (repeatable)")

    out: str = flag("data", "the folder to write", group="what to write")
    overwrite: bool = flag(False, "replace what --out holds")
    dry_run: bool = flag(False, "report only, write nothing")
    gap_minutes: float = flag(10.0, "minutes of silence that end a session")
    val: float = flag(0.05, "share of the sessions, the latest, kept for validation, 0 to 0.2")
    context: str = flag(
        "", "open each session with some of who,when,since,before,facts (of OUT/facts.md)"
    )
    canaries: int = flag(0, "invented numbers to hide in my messages: evaluate.py's leak test")
    tokenizer: str | None = flag(None, "a model folder: count tokens and rows in the report")
    seq_len: int = flag(1024, "tokens a row, for that count")

    keep_secrets: bool = flag(
        False, "keep phone numbers, cards, keys and passwords", group="privacy"
    )
    forget: tuple[str, ...] = flag(
        (), "leave out a person, name or id (repeatable); without EXPORT: from --out"
    )


def main():
    options = cli.parse(Options)
    if options.forget and not options.exports:
        return forget_people(Path(options.out), options.forget, options.dry_run)
    validate(options)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    secrets, repairs = collections.Counter[str](), collections.Counter[str]()
    clean = str if options.keep_secrets else functools.partial(redact, counts=secrets)
    parent = None if options.dry_run else temp_parent(Path(options.out))
    with (
        tempfile.TemporaryFile(dir=parent) as messages,
        tempfile.TemporaryFile(dir=parent) as spool,
        tempfile.TemporaryDirectory(prefix="new-", dir=parent) as new,
    ):
        store = MessageStore(messages, clean)
        # Records hold no cycles; searching millions of them takes as long as reading them.
        gc.disable()
        try:
            exported = read_exports(options, store, repairs)
            joined = store.align()
            store.unify(find_same(store, exported.messengers, options.same))
            me = store.with_aliases(find_me(store, exported.owners, options.me))
            forgotten = store.with_aliases(find_forgotten(store, me, options.forget))
            sources = [stats.report(me, store.names) for stats in exported.sources]
            store.share_names()
            index, persona, stats = build_sessions(store, exported, me, forgotten, options, spool)
        finally:
            gc.enable()
        counts = stats.report() | {
            "secrets": secrets,
            "repairs": repairs,
            "joined": joined,
            "sources": sources,
        }
        if forgotten:
            counts["only_mine"] = []  # others may have written there too
        check_enough(", ".join(options.exports), index, counts)
        parts = hold_out(index, options.val)
        if repeated := len(index) - sum(map(len, parts.values())):
            counts["sessions_left_out"][Reason.REPEATED] = repeated
        counts["sessions_kept"] = {part: len(sessions) for part, sessions in parts.items()}
        counts["trained_messages"] = int(parts["train"]["trained"].sum())
        canaries = make_canaries(options.canaries, len(parts["train"]))
        if tokenizer or not options.dry_run:
            write_sessions(Path(new), parts, spool, canaries)
        train = Path(new) / "train.jsonl"
        counts["tokens"] = tokenizer and count_tokens(train, tokenizer, options.seq_len)
        counts["verdict"] = report.verdict(counts)
        if not options.dry_run:
            save(Path(options.out), Path(new), persona, counts, canaries)
        show_session(data.Session.from_json(read_line(spool, parts["train"][-1])))
    report.show_sources([stats.path for stats in exported.sources], sources)
    print()
    report.show(counts, options)
    if options.forget:
        print(f"\nForgotten: {', '.join(options.forget)}. {AFTER_FORGETTING}")
    if not options.dry_run:
        flags = "" if options.out == "data" else f" --data {shlex.quote(options.out)}"
        print(f"\nWritten to {options.out}/. Read it, edit it; then: python train.py --lora{flags}")


def validate(options: Options) -> None:
    """Raise UserError for flags that can't be, before anything is read."""
    if not options.exports:
        raise UserError(
            "no export given",
            "python data.py result.json (Telegram, JSON), or a WhatsApp chat (.txt or .zip)",
        )
    for name in ("since", "until"):
        day = getattr(options, name) or "2000-01-01"
        try:
            valid = datetime.date.fromisoformat(day).isoformat() == day
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"--{name} {day} is not a day", "Write it as 2021-12-31.")
    if not 0 <= options.val <= 0.2:
        raise UserError(
            f"--val must be in [0, 0.2], got {options.val:g}",
            "0.05 holds out the latest twentieth, 0 as few sessions as possible.",
        )
    if not 0 < options.gap_minutes < 1e6:
        raise UserError(
            f"--gap-minutes must be above 0, got {options.gap_minutes:g}", "The default is 10."
        )
    data.parse_header_parts(options.context)
    if not 0 <= options.canaries <= 1000:
        raise UserError(f"--canaries must be in [0, 1000], got {options.canaries}", "Try 8.")
    if options.seq_len < 16:
        raise UserError(
            f"--seq-len must be at least 16, got {options.seq_len}", "Training's default is 1024."
        )
    if not options.dry_run:
        cli.check_output_dir(options.out, options.overwrite, ["facts.md"])


def temp_parent(out: Path) -> Path:
    """Return the nearest folder above `out` that exists: /tmp may be small, or memory."""
    return next(path for path in out.absolute().joinpath("x").parents if path.is_dir())


# --- read


class Exported(NamedTuple):
    """What exports tell besides messages."""

    owners: dict[str, str | None]  # by export: whose it is
    messengers: dict[str, str]  # by export
    left_out: dict[str, str]  # by chat: why it isn't read
    bots: set[str]
    sources: list[report.SourceStats]


def read_exports(options: Options, store: MessageStore, repairs) -> Exported:
    """Read the chats into `store`. UserError where --include or --exclude match no chat."""
    exported = Exported({}, {}, {}, set(), [])
    matched: set[str] = set()
    names: dict[str, str] = {}
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        found = {path: exports.sources(path, bar.update) for path in options.exports}
        pairs = list(itertools.chain(*found.values()))
        bar.reset(sum(source.total_size * reader.NUM_PASSES for reader, source in pairs))
        for (reader, source), stats in zip(pairs, source_stats(found), strict=True):
            if stats not in exported.sources:
                exported.sources.append(stats)
            for chat, messages in reader.read(source, stats.repairs):
                names[chat.key] = chat.name
                export = export_of(reader, source, chat)
                exported.owners[export] = chat.owner
                exported.messengers[export] = stats.messenger
                if chat.type == "bot_chat":
                    exported.bots.add(chat.key)
                stats.chats += 1
                if reason := exclusion_reason(chat, options, matched):
                    exported.left_out[chat.key] = reason
                    stats.chats_left_out[reason] += 1
                    continue
                authors, reasons = store.add(export, chat, messages)
                stats.authors |= authors
                stats.messages += reasons
    for stats in exported.sources:
        repairs.update(stats.repairs)
    for flag_, values in (("include", options.include), ("exclude", options.exclude)):
        for name in values if names else ():
            if name not in matched:
                near = ", ".join(difflib.get_close_matches(name, names.values(), 5, 0.5))
                raise UserError(
                    f"--{flag_} {name}: no chat has that name, id or type",
                    f"Perhaps one of: {near}" if near else "Write it as the messenger shows it.",
                )
    for key, reason in exported.left_out.items():
        if reason == Reason.EXCLUDED:
            store.copies.pop(key, None)  # read before, under the name it has in another export
    return exported


def source_stats(
    found: Mapping[str, list[tuple[ModuleType, Source]]],
) -> Iterator[report.SourceStats]:
    """Yield for each source in which line of the report it counts.

    A line is a zip, a folder or a file; files of one messenger in a folder share one, from four on.
    """
    lines: dict[tuple[str, str], report.SourceStats] = {}
    in_folder = collections.Counter(
        (Path(path).parent, reader)
        for path, pairs in found.items()
        for reader, source in pairs
        if Path(path) == source.path
    )
    for path, pairs in found.items():
        for reader, source in pairs:
            label = str(source.archive or path)
            if Path(path) == source.path and in_folder[Path(path).parent, reader] > 3:
                label = f"{Path(path).parent}/"
            key = label, messenger(reader)
            stats = lines.setdefault(key, report.SourceStats(*key))
            stats.files += len(source.parts)
            yield stats


def export_of(reader: ModuleType, source: Source, chat: Chat) -> str:
    """Name the files in which I am one and the same person: one file, or all of a messenger."""
    if getattr(reader, "SAME_IDS", False) and not chat.owner:
        return messenger(reader)
    return str(source)


def messenger(reader: ModuleType) -> str:
    return reader.__name__.rpartition(".")[2]


def exclusion_reason(chat: Chat, options: Options, matched: set[str]) -> str:
    """Return why a chat isn't read, "" where it is; add the flags' values that match it."""
    names = {chat.name.casefold(), chat.id.casefold(), chat.key.casefold(), chat.type}
    included = {name for name in options.include if name.casefold() in names}
    excluded = {name for name in options.exclude if name.casefold() in names}
    matched |= included | excluded
    if excluded:
        return Reason.EXCLUDED
    return "" if included or chat.type in data.DEFAULT_CHAT_TYPES else chat.type


# --- who is who


def match_people(name: str, ids: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Return the ids that --me or --forget mean: by id, with or without its prefix, or by name."""
    name, matches = name.casefold(), []
    phone = phone_digits(name)
    for id in ids:
        short = re.sub(r"^[a-z]+:?", "", id)
        same_phone = phone and phone_digits(short) == phone
        if same_phone or name in (id.casefold(), short.casefold(), names.get(id, "").casefold()):
            matches.append(id)
    return matches


def phone_digits(text: str) -> str:
    """Return the digits of `+49 170 123-45 67`, however it is written; "" of other text."""
    is_phone = re.fullmatch(r"(?:\+|00)[\d\s()./\u00a0\u2010-\u2013\u202a-\u202c-]{6,30}", text)
    return re.sub(r"\D", "", text).removeprefix("00") if is_phone else ""


def format_people(ids: Iterable[str], names: Mapping[str, str], counts) -> str:
    """List up to eight people for a message, who wrote most first."""
    shown = []
    for id in sorted(ids, key=lambda id: -counts[id])[:8]:
        name = " ".join(names.get(id, data.DELETED_ACCOUNT).split())
        shown.append(f"{name} ({id}, {cli.counted(counts[id], 'messages')})")
    return ", ".join(shown)


def find_same(store: MessageStore, messengers: Mapping, values: Iterable[str]) -> list[list[str]]:
    """Return the ids of each person whom --same names; the first name is the one to keep.

    UserError where a name is nobody's, or of two people in one messenger.
    """
    names, everyone, people = store.names, store.total(), []
    for value in values if everyone else ():
        (parts,) = csv.reader([value], skipinitialspace=True)  # "Smith, Ann" may stand in quotes
        parts = [part.strip() for part in parts if part.strip()]
        if len(parts) < 2:
            raise UserError(
                f"--same {value}: that is one name", 'Write all of them: --same "Ann,ann_99".'
            )
        ids: dict[str, None] = {}
        for part in parts:
            matches = match_people(part, everyone, names)
            if not matches:
                raise UserError(
                    f"--same {value}: nobody is called {part}",
                    f"Give a name or id, one of: {format_people(everyone, names, everyone)}",
                )
            refuse_several(part, matches, store, messengers)
            ids |= dict.fromkeys(matches)
        people.append(list(ids))
    return people


def refuse_several(name: str, ids: list[str], store: MessageStore, messengers: Mapping) -> None:
    """Raise UserError where a name of --same means two people of one messenger."""
    for wanted in dict.fromkeys(messengers.values()):
        exports_ = [counts for e, counts in store.counts.items() if messengers[e] == wanted]
        here = [id for id in ids if any(id in counts for counts in exports_)]
        if len(here) > 1:
            people = format_people(here, store.names, store.total())
            raise UserError(
                f"--same {name}: several people in {wanted} have that name",
                f"Give the id instead of the name, one of: {people}",
            )


def find_me(store: MessageStore, owners: Mapping, values: Iterable[str]) -> list[str]:
    """Return the ids that are mine: the exports' owners, and whom --me names.

    --me names people in exports without an owner. Where it matches nobody there, it replaces the
    owner of the exports where it does: the clone of a friend. Of a person whom --same names, it
    means all names.
    """
    names, everyone = store.names, store.total()
    me, replaced = [], set()
    for name in values if everyone else ():  # check_enough says why nobody is there
        aliases, matches = store.with_aliases(match_people(name, everyone, names)), {}
        for export, counts in store.counts.items():
            ids = match_people(name, counts, names) or [id for id in counts if id in aliases]
            if ids:
                matches[export] = ids
        if not matches:
            raise UserError(
                f"--me {name}: nobody has that name",
                f"Give --me NAME or --me ID, one of: {format_people(everyone, names, everyone)}",
            )
        unowned = {export: ids for export, ids in matches.items() if not owners[export]}
        unified = any(id in store.same for id in aliases)
        for export, ids in (matches if unified or not unowned else unowned).items():
            if len({store.same.get(id, id) for id in ids}) > 1:
                people = format_people(ids, names, store.counts[export])
                raise UserError(
                    f"{export}: --me {name}: several people have that name",
                    f"Give --me ID, one of: {people}",
                )
            me += ids
            replaced.add(owners[export])
    me = [owner for owner in owners.values() if owner and owner not in replaced] + me
    for export, counts in store.counts.items():
        if counts and not owners[export] and not counts.keys() & store.with_aliases(me).keys():
            raise UserError(
                f"{export}: the export doesn't say whose it is",
                f"Give --me NAME or --me ID, one of: {format_people(counts, names, counts)}",
            )
    return me


def find_forgotten(store: MessageStore, me: Iterable[str], values: Iterable[str]) -> list[str]:
    """Return the ids of whom --forget names, among all who wrote or have a chat with me."""
    counts = store.total()
    chats = [copy.chat for copies in store.copies.values() for copy in copies]
    friends = {chat.key: chat.name for chat in chats if chat.type == "personal_chat"}
    names, people = friends | store.names, dict.fromkeys([*friends, *counts])
    forgotten = []
    for name in values if people else ():
        ids = match_people(name, people, names)
        refuse_me(name, bool({*ids} & {*me}))
        if len(ids) > 1:
            raise UserError(
                f"--forget {name}: several people have that name",
                f"Give --forget ID, one or more of: {format_people(ids, names, counts)}",
            )
        if not ids:
            near = [i for i in people if name.casefold() in names.get(i, "").casefold()]
            near = [i for i in near if i not in me]
            hint = f"Perhaps one of: {format_people(near, names, counts)}"
            raise UserError(
                f"--forget {name}: nobody has that name",
                hint if near else "Write the name as the messenger shows it, or the id.",
            )
        forgotten += ids
    return forgotten


def refuse_me(name: str, is_me: bool) -> None:
    if is_me:
        raise UserError(f"--forget {name}: that is you", "--exclude leaves whole chats out.")


class Names(dict):
    """{author's id: name in sessions}, unique and without secrets; made when first asked for."""

    def __init__(self, store: MessageStore, me: Iterable[str]):
        self.shown, self.taken = store.names, {data.HEADER}
        mine = next((self.shown[id] for id in me if id in self.shown), "Me")
        self.me = data.unique_name(mine, self.taken)
        super().__init__(dict.fromkeys(me, self.me))

    def __missing__(self, author: str) -> str:
        self[author] = data.unique_name(self.shown.get(author), self.taken)
        return self[author]


# --- messages → sessions


def filter_messages(
    messages: Iterable[Message], options: Options, forgotten, bots, left_out: collections.Counter
) -> Iterator[Message]:
    """Yield the messages that people wrote themselves on the days asked for; count the others."""
    since, until = options.since or "", options.until or "9999"
    for message in messages:
        _, author, _, _, date, _, reason = message
        if author in forgotten:
            reason = reason or Reason.FORGOTTEN
        elif author in bots:
            reason = reason or Reason.BOT
        elif not since <= date[:10] <= until:
            reason = reason or Reason.OUTSIDE_DAYS
        if reason:
            left_out[reason] += 1
        else:
            yield message


def build_sessions(
    store: MessageStore, exported: Exported, me, forgotten, options: Options, spool: IO[bytes]
) -> tuple[np.ndarray, dict, report.ChatStats]:
    """Cut the chats into sessions and write those that show how I answer to `spool`.

    Returns (INDEX records in order of time, persona, what was counted).
    """
    stats, names, index = report.ChatStats(), Names(store, me), array("q")
    timing = TimingStats(me, options.gap_minutes * 60)
    stats.left_out["chats"].update(exported.left_out.values())
    parts, facts_file = data.parse_header_parts(options.context), Path(options.out) / "facts.md"
    facts = cli.read_text(facts_file) if "facts" in parts and facts_file.is_file() else ""
    total, layout = store.total().total(), {"unit_scale": True, "leave": False, "disable": None}
    with tqdm(total=total, unit=" messages", desc="sessions", **layout) as bar:
        for chat, messages in store.chats():
            if chat.type == "personal_chat" and chat.key in forgotten:
                stats.left_out["chats"][Reason.FORGOTTEN] += 1
                continue
            stats.seen["chats"] += 1
            before = None
            messages = filter_messages(
                messages, options, forgotten, exported.bots, stats.left_out["messages"]
            )
            if chat.type in data.DEFAULT_CHAT_TYPES:  # in a channel nobody waits for me
                messages = timing.watch(chat, messages)
            for session in data.sessions(messages, chat, me, options.gap_minutes * 60):
                reason = data.skip_reason(session)
                bar.update(stats.add(session, reason))
                if reason and not parts:
                    continue
                for turn in session.turns:
                    turn.author = names[turn.author]
                header = data.header(parts, session, before, facts)
                before = session
                if reason:
                    continue
                if header:
                    session = dataclasses.replace(session, turns=[header, *session.turns])
                index.extend(write_session(session, spool))
    table = np.frombuffer(index, INDEX) if index else np.zeros(0, INDEX)
    contacts = [{"name": names[id], "messages": n} for id, n in stats.contacts()]
    persona: dict = {"me": names.me, "contacts": contacts}
    if parts:
        persona["context"] = parts
    persona["timing"] = timing.report({id: names[id] for id, _ in stats.contacts()})
    return table[np.argsort(table["start"], kind="stable")], persona, stats


def write_session(session: data.Session, spool: IO[bytes]) -> tuple[int, ...]:
    """Write a session to the end of `spool`; return its fields of INDEX."""
    line = session.to_json().encode() + b"\n"
    start = int("0" + re.sub(r"\D", "", session.start)[:14])
    mine = []
    for turn in session.turns:
        if turn.me:
            mine += [" ".join(text.split()) for text in data.text_messages(turn)]
    content = hash("\n".join(mine).casefold())
    offset = spool.tell()
    spool.write(line)
    return start, offset, len(line), len(mine), content


def read_line(spool: IO[bytes], entry: np.void) -> bytes:
    spool.seek(int(entry["offset"]))
    return spool.read(int(entry["length"]))


def check_enough(paths: str, index: np.ndarray, counts: dict) -> None:
    """Raise UserError with the likeliest reason where there is nothing to learn from."""
    left_out = counts["messages_left_out"]
    if not counts["messages"]:
        chats = report.format_reasons(counts["chats_left_out"])
        reasons = [f"left out: {chats}"] if chats else []
        reasons += [report.format_reasons(counts["repairs"])] if counts["repairs"] else []
        hint = "Export again with the personal chats ticked, or --include a chat."
        if counts["repairs"] and not chats:
            hint = "Before its messages a chat has its name, type and id, a whole number."
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"{paths} holds no messages in chats that are read{why}", hint)
    if counts["messages"] == sum(left_out.values()):
        if outside := left_out.get(Reason.OUTSIDE_DAYS):
            raise UserError(
                f"none of the {outside:,} messages in {paths} is of the days asked for",
                "Look at --since and --until.",
            )
        raise UserError(
            f"{paths}: all its messages are left out ({report.format_reasons(left_out)})",
            "Export other chats, or look at --forget and --since.",
        )
    if not counts["my_messages"]:
        raise UserError(
            f"{paths} holds no message of mine",
            "Give --me NAME, or export your own messages too.",
        )
    if len(index) < 2:
        skipped = report.format_reasons(counts["sessions_left_out"] | counts["repairs"])
        why = f" ({skipped})" if skipped else ""
        hint = "Export more chats, or try a larger --gap-minutes."
        raise UserError(
            f"{paths}: sessions in which I answer somebody: {len(index)}; two are needed{why}",
            report.EXPORT_ALL if counts["only_mine"] else hint,
        )


# --- sessions → data/


def hold_out(index: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """Divide the index, in order of time, into {"train": …, "val": the latest sessions}.

    What I say in a session of `val` I say in none of `train`: a late session that repeats one to
    train on is in neither, and `val` begins a little earlier for it.
    """
    _, firsts, group = np.unique(index["content"], return_index=True, return_inverse=True)
    first = firsts[group]  # for each session: the first one in which I say the same
    # How many sessions `val` could hold that begins here.
    usable = np.bincount(first, minlength=len(index))[::-1].cumsum()[::-1]
    begin = np.flatnonzero(usable >= validation_size(len(index), share))[-1]
    begin = max(begin, min(len(index) - len(index) // 3, np.flatnonzero(usable >= 1)[-1]))
    if begin == 0:  # I say the same in every session
        return {"train": index, "val": index[:0]}
    return {"train": index[:begin], "val": index[begin:][first[begin:] >= begin]}


def validation_size(count: int, share: float) -> int:
    """Return how many of `count` sessions to hold out: at least 20, but at most a fifth."""
    return min(max(round(count * share), 20), max(1, count // 5))


def make_canaries(count: int, lines: int) -> list[dict]:
    """Invent numbers to hide in 1, 2, 4, 8, 1, … of the lines of train.jsonl. arXiv 1802.08232"""
    draw, canaries = random.Random(0), []
    for i in range(count):
        copies = min(2 ** (i % 4), lines)
        canary = {"before": f"locker {i + 1} opens with ", "secret": f"{draw.randrange(10**8):08}"}
        places = draw.sample(range(lines), copies)
        canaries.append(canary | {"copies": copies, "lines": places})
    return canaries


def with_canaries(line: bytes, number: int, canaries: list[dict]) -> bytes:
    """Add canaries to line `number` of train.jsonl, as the end of my last turn."""
    texts = [
        canary["before"] + canary["secret"] for canary in canaries if number in canary["lines"]
    ]
    if not texts:
        return line
    session = data.Session.from_json(line)
    next(turn for turn in reversed(session.turns) if turn.me).messages += texts
    return session.to_json().encode() + b"\n"


def write_sessions(folder: Path, parts: dict, spool: IO[bytes], canaries: list[dict]) -> None:
    for part, index in parts.items():
        with open(folder / f"{part}.jsonl", "wb") as file:
            for number, entry in enumerate(index):
                line = read_line(spool, entry)
                file.write(with_canaries(line, number, canaries if part == "train" else []))


def count_tokens(path: Path, tokenizer, seq_len: int) -> dict:
    """Return how many rows and tokens a train.jsonl makes, and how many tokens my words need."""
    rows, mine = data.load_rows(path, tokenizer, seq_len), []
    for session in data.load_sessions(path):
        for turn in session.turns:
            mine += data.text_messages(turn) if turn.me else []
    sample = random.Random(0).sample(mine, min(len(mine), report.SAMPLE_MESSAGES))
    return {
        "trained": sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in rows),
        "rows": len(rows),
        "per_1000_characters": report.tokens_per_1000_characters(sample, tokenizer),
    }


def save(out: Path, new: Path, persona: dict, counts: dict, canaries: list[dict]) -> None:
    """Move the finished files of folder `new` into data/ and write those that describe them."""
    cli.make_private_dir(out)
    for path in [out / "canaries.json", *(out / "cache").glob("*")]:
        path.unlink(missing_ok=True)
    for part in ("train", "val"):
        (new / f"{part}.jsonl").replace(out / f"{part}.jsonl")
    cli.write_json(out / "persona.json", persona)
    cli.write_json(out / "report.json", counts)
    if canaries:
        cli.write_json(out / "canaries.json", {"canaries": canaries})


def show_session(session: data.Session) -> None:
    """Print the end of a session, with what is trained in green."""
    document = data.render(session.turns[-SHOWN_TURNS:])
    colour = "\033[32m{}\033[0m" if sys.stdout.isatty() else "{}"
    text, end = "", 0
    for begin, stop in document.targets:
        text += cli.printable(document.text[end:begin])
        text += colour.format(cli.printable(document.text[begin:stop]))
        end = stop
    text += cli.printable(document.text[end:])
    print(f"A session; what I wrote is trained:\n\n{text}")


# --- forget people in data/


def forget_people(folder: Path, values: tuple[str, ...], dry_run: bool) -> None:
    """Remove people from data/: personal chats, messages in groups, the name in the persona."""
    persona = cli.read_json(folder / "persona.json")
    contacts = [c for c in persona.get("contacts", []) if isinstance(c, dict)]
    people, gone = [str(contact.get("name")) for contact in contacts], set()
    for name in values:
        refuse_me(name, name.casefold() == str(persona.get("me")).casefold())
        matches = {person for person in people if person.casefold() == name.casefold()}
        if not matches:
            raise UserError(
                f"--forget {name}: {folder}/persona.json knows nobody of that name",
                "Write it as it stands there.",
            )
        gone |= matches
    before, total = 0, collections.Counter[str]()
    kept: dict[str, list[str]] = {"train": [], "val": []}
    for part in kept:
        for session in data.load_sessions(folder / f"{part}.jsonl"):
            before += sum(len(turn.messages) for turn in session.turns)
            theirs = any(turn.author in gone for turn in session.turns)
            session.turns = without_people(session.turns, gone)
            if theirs and (session.type == "personal_chat" or data.skip_reason(session)):
                continue
            for turn in session.turns:
                total[turn.author] += len(turn.messages)
            kept[part].append(session.to_json() + "\n")
    if not dry_run:
        for part, lines in kept.items():
            cli.write_text(folder / f"{part}.jsonl", "".join(lines))
        persona["contacts"] = [{"name": n, "messages": total[n]} for n in people if total[n]]
        timing = persona.get("timing")
        if isinstance(timing, dict) and isinstance(timing.get("contacts"), dict):
            timing["contacts"] = {n: t for n, t in timing["contacts"].items() if n not in gone}
        cli.write_json(folder / "persona.json", persona)
        for path in [folder / "report.json", *(folder / "cache").glob("*")]:
            path.unlink(missing_ok=True)
    removed = f"{before - total.total():,} of {cli.counted(before, 'messages')}"
    print(f"{'Would remove' if dry_run else 'Removed'} from {folder}/: {', '.join(sorted(gone))}")
    print(f"{removed}, theirs and what only they were told. {AFTER_FORGETTING}")


def without_people(turns: list[data.Turn], gone: set[str]) -> list[data.Turn]:
    """Drop people's turns and what a header quotes of them; merge the turns of one author."""
    kept: list[data.Turn] = []
    for turn in turns:
        if turn.author == data.HEADER:
            quotes = tuple(f"{name}: " for name in gone)
            turn.messages = [text for text in turn.messages if not text.startswith(quotes)]
        if turn.author in gone or not turn.messages:
            continue
        if kept and kept[-1].author == turn.author:
            kept[-1].messages += turn.messages
        else:
            kept.append(turn)
    return kept
