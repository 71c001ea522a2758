"""`python data.py result.json`: read exports, leave out what is not wanted, split into sessions, write data/."""

import collections
import contextlib
import dataclasses
import datetime
import difflib
import functools
import gc
import os
import random
import re
import shlex
import signal
import sys
import tempfile
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
import data
import exports
from cli import UserError, counted, flag
from exports.join import MessageStore
from exports.redact import redact
from exports.report import ONLY_MINE, SAMPLE_CHARS, ChatStats, density, kind, show_report, verdict
from weights.tokenizer import load_tokenizer

WRITTEN_FILES = (  # what data.py, train.py, evaluate.py, lora.py merge and remote.sh write, for --wipe; what is in a folder comes before it
    "train.jsonl", "val.jsonl", "persona.json", "canaries.json", "report.json", "report.html", "blind-test.html", "cache/train-*",
    "cache/val-*", "cache", "run.json", "metrics.jsonl", "loss.png", "micro-batch.json", "resume/step-*/rank-*", "resume/step-*", "resume",
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
    "model-*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "Modelfile",
    "special_tokens_map.json", "new-*.safetensors", ".remote", ".incoming/resume/*/*", ".incoming/resume/*", ".incoming/*", ".incoming",
)  # fmt: skip
REMOTE_FILES = (
    "flags",
    "lock",
    "log",
    "exit",
)  # remote.sh's in .run, on the box: the log quotes chats
AFTER_FORGETTING = (
    "Others may still name them in their own words. A model that was trained on them must be trained anew, "
    "and --forget be said at the next export too."
)
SHOWN_TURNS = 16  # turns of the session that is shown at the end
# Columns of the index of sessions: when it starts; where its line lies in the spool; how many messages it trains;
# a hash of what I say in it; the number of its chat; how many characters of mine it holds.
START, OFFSET, LENGTH, TRAINED, CONTENT, CHAT, CHARACTERS = range(7)
REPEATED = (
    "late sessions in which I say the same as in one to train on, neither trained nor held out"
)


# --- the command


@dataclasses.dataclass(frozen=True)
class Options:
    """Turn chat exports into data/train.jsonl and data/val.jsonl: sessions to read, edit and train on.

    python data.py result.json                   Telegram (JSON), WhatsApp (.txt or .zip), or a folder
    python data.py old.json new.json chat.zip    several as one: joined by chat, no message twice
    """

    exports: tuple[str, ...] = flag(
        (),
        "Telegram's result.json, WhatsApp's .txt or .zip, a folder",
        positional=True,
        group="what to read",
    )
    me: tuple[str, ...] = flag(
        (), "whose voice: a name or an id, once a messenger", shown="whose export it is"
    )
    since: str | None = flag(None, "leave out messages before this day, YYYY-MM-DD")
    until: str | None = flag(None, "leave out messages after this day, YYYY-MM-DD")
    include: tuple[str, ...] = flag(
        (), "take this too, by name, id or kind: a bot, channel, Saved Messages (repeatable)"
    )
    exclude: tuple[str, ...] = flag((), "leave this chat out, by name, id or kind (repeatable)")

    out: str = flag("data", "the folder to write", group="what to write")
    overwrite: bool = flag(False, "replace what --out holds")
    dry_run: bool = flag(False, "report only, write nothing")
    gap_minutes: float = flag(10.0, "minutes of silence that end a session")
    val: float = flag(0.05, "share of the sessions, the latest, kept to validate, 0 to 0.2")
    context: str = flag(
        "", "open each session with some of who,when,since,before,facts (of OUT/facts.md)"
    )
    canaries: int = flag(0, "invented numbers to hide in my messages: evaluate.py's leak test")
    tokenizer: str | None = flag(None, "a model folder: count tokens and rows in the report")
    seq_len: int = flag(1024, "tokens a row, for that count")

    keep_secrets: bool = flag(
        False,
        "leave phone numbers, cards, keys and passwords as they were written",
        group="privacy",
    )
    forget: tuple[str, ...] = flag(
        (), "leave a person out everywhere, name or id (repeatable); no EXPORT: out of --out"
    )
    wipe: bool = flag(False, "list all that holds chats below this folder, ask, and delete it")


def main():
    options = cli.parse(Options)
    if options.wipe:
        return wipe(Path(), options.dry_run)
    if options.forget and not options.exports:
        return forget_people(Path(options.out), options.forget, options.dry_run)
    validate(options)
    words = (
        load_tokenizer(options.tokenizer) if options.tokenizer else None
    )  # what is wrong with it is said before the export is read
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
    secrets, repairs = collections.Counter(), collections.Counter()
    near = (
        None
        if options.dry_run
        else next(
            p
            for p in (Path(options.out).absolute(), *Path(options.out).absolute().parents)
            if p.is_dir()
        )
    )
    with tempfile.TemporaryFile(dir=near) as messages, tempfile.TemporaryFile(dir=near) as spool:
        joined = MessageStore(
            messages, str if options.keep_secrets else functools.partial(redact, counts=secrets)
        )
        gc.disable()  # records hold no cycles; looking for some among millions of them takes as long as reading them
        try:
            left_out, bots, owners = read_exports(options, joined, repairs)
            overlaps, aliases = joined.align(), joined.aliases()
            me = with_aliases(find_me(joined, owners, options), aliases)
            forgotten = with_aliases(find_forgotten(joined, me, options.forget), aliases)
            index, persona, report = build_sessions(
                joined, me, forgotten, bots, left_out, options, spool
            )
        finally:
            gc.enable()
        report |= {"secrets": dict(secrets), "repairs": dict(repairs), "joined": overlaps}
        check_enough(options, index, report)
        parts = hold_out(index, options.val)
        if repeated := len(index) - sum(map(len, parts.values())):
            report["sessions_left_out"][REPEATED] = repeated
        report["sessions_kept"] = {part: len(places) for part, places in parts.items()}
        report["trained_messages"] = int(parts["train"][:, TRAINED].sum())
        planted = make_canaries(options.canaries, len(parts["train"]))
        write_output(parts, spool, persona, report, options, words, near, planted)
        show_session(data.Session.from_json(read_line(spool, parts["train"][-1])))
    show_report(report, options)
    if options.forget:
        print(f"\nForgotten: {', '.join(options.forget)}. {AFTER_FORGETTING}")
    if not options.dry_run:
        where = "" if options.out == "data" else f" --data {shlex.quote(options.out)}"
        print(f"\nWritten to {options.out}/. Read it, edit it; then: python train.py --lora{where}")


def validate(options):
    if not options.exports:
        raise UserError(
            "no export given",
            "python data.py path/to/result.json (Telegram, JSON), or a WhatsApp chat (.txt or .zip)",
        )
    for name in ("since", "until"):
        day = getattr(options, name) or "2000-01-01"
        try:
            if datetime.date.fromisoformat(day).isoformat() != day:
                raise ValueError
        except ValueError:
            raise UserError(f"--{name} {day} is no day", "Write it as 2021-12-31.") from None
    if not 0 <= options.val <= 0.2:
        raise UserError(
            f"--val {options.val:g} is no share from 0 to 0.2",
            "0.05 keeps the latest twentieth, 0 as few sessions as can be.",
        )
    if not 0 < options.gap_minutes < 1e6:
        raise UserError(
            f"--gap-minutes {options.gap_minutes:g} is no silence",
            "Give a number of minutes, such as 10.",
        )
    data.parse_header_parts(options.context)
    if not 0 <= options.canaries <= 1000:
        raise UserError(
            f"--canaries {options.canaries} is no number from 0 to 1000", "8 are enough."
        )
    if options.seq_len < 16:
        raise UserError(
            f"--seq-len {options.seq_len} is too short for a message",
            "Give 16 or more; training's default is 1024.",
        )
    if not options.dry_run:
        cli.check_output_dir(options.out, options.overwrite, ["facts.md"])


def exclusion_reason(chat, options, heard):
    """Why a chat is left out by its kind or by --include and --exclude; "" when it belongs. `heard`: the words of theirs that named one."""
    names = {chat.name.casefold(), chat.id.casefold(), chat.key.casefold(), chat.type}
    included, excluded = (
        {said for said in given if said.casefold() in names}
        for given in (options.include, options.exclude)
    )
    heard |= included | excluded
    if excluded:
        return "excluded"
    return "" if chat.type in data.DEFAULT_CHAT_TYPES or included else chat.type


def read_exports(options, joined, repairs):
    """Read the exports' chats into `joined`, but for those left out.

    → ({chat's key: why it is left out}, ids of bots, {export: owner's id}). UserError when --include or --exclude name no chat.
    """
    left_out, bots, owners, heard, chats = {}, set(), {}, set(), {}
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        found = [pair for path in options.exports for pair in exports.sources(path, bar.update)]
        bar.reset(sum(source.size * reader.NUM_PASSES for reader, source in found))
        for reader, source in found:
            for chat, messages in reader.read(source, repairs):
                owners[str(source)], chats[chat.key] = chat.owner, chat.name
                if chat.type == "bot_chat":
                    bots.add(chat.key)
                if why := exclusion_reason(chat, options, heard):
                    left_out[chat.key] = why
                else:
                    joined.add(str(source), chat, messages)
    for name, given in (("include", options.include), ("exclude", options.exclude)):
        for said in given:
            if said not in heard and chats:
                near = difflib.get_close_matches(said, chats.values(), 5, 0.5)
                raise UserError(
                    f"--{name} {said}: no chat has that name, id or kind",
                    f"Perhaps one of: {', '.join(near)}"
                    if near
                    else "Write the name as the messenger shows it.",
                )
    for key in [key for key, why in left_out.items() if why == "excluded"]:
        joined.copies.pop(key, None)  # under another name, in another export, it was read
    return left_out, bots, owners


def match_people(said, people):
    """The ids among `people` ({id: display name}) that --me or --forget names: by id, with or without its kind in front, or by name."""
    said = said.casefold()
    return [
        i
        for i, name in people.items()
        if said in (i.casefold(), re.sub(r"^[a-z]+:?", "", i).casefold(), (name or "").casefold())
    ]


def format_people(people, wrote):
    likely = sorted(people, key=lambda i: -wrote[i])[:8]
    return ", ".join(
        f"{' '.join((people[i] or exports.DELETED).split())} ({i}, {counted(wrote[i], 'messages')})"
        for i in likely
    )


def find_me(joined, owners, options):
    """The ids that are mine: the exports' owners, and whom --me names in exports that have none; where it names nobody there, --me
    replaces the owner of the exports in which it names somebody. UserError lists the candidates."""
    me, replaced = {}, set()
    people = {
        export: {author: joined.people.get(author) for author in wrote}
        for export, wrote in joined.wrote.items()
    }
    everyone = sum(joined.wrote.values(), collections.Counter())
    for said in options.me if everyone else ():  # of nobody `check_enough` says why
        found = {
            export: matches for export in people if (matches := match_people(said, people[export]))
        }
        found = {
            export: matches for export, matches in found.items() if not owners[export]
        } or found
        if not found:
            raise UserError(
                f"--me {said}: nobody has that name",
                f"Say --me NAME or --me ID, one of: {format_people({i: joined.people.get(i) for i in everyone}, everyone)}",
            )
        for export, matches in found.items():
            if len(matches) > 1:
                several = format_people(
                    {i: people[export][i] for i in matches}, joined.wrote[export]
                )
                raise UserError(
                    f"{export}: --me {said}: several people have that name",
                    f"Say --me ID, one of: {several}",
                )
            me |= dict.fromkeys(matches)
            replaced.add(owners[export])
    me = dict.fromkeys(owner for owner in owners.values() if owner and owner not in replaced) | me
    for export, wrote in joined.wrote.items():
        if wrote and not owners[export] and not me.keys() & wrote.keys():
            candidates = format_people(people[export], wrote)
            raise UserError(
                f"{export}: the export doesn't say whose it is",
                f"Say --me NAME or --me ID, one of: {candidates}",
            )
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
        matches = match_people(said, people)
        if set(matches) & me:
            raise UserError(f"--forget {said}: that is you", "--exclude leaves whole chats out.")
        if len(matches) > 1:
            several = format_people({i: people[i] for i in matches}, everyone)
            raise UserError(
                f"--forget {said}: several people have that name",
                f"Say --forget ID, one or more of: {several}",
            )
        if not matches:
            near = {
                i: name
                for i, name in people.items()
                if i not in me and said.casefold() in (name or "").casefold()
            }
            way_out = (
                f"Perhaps one of: {format_people(near, everyone)}"
                if near
                else "Write the name as the messenger shows it, or the id."
            )
            raise UserError(f"--forget {said}: nobody has that name", way_out)
        forgotten |= set(matches)
    return forgotten


def filter_messages(messages, options, forgotten, bots, left_out):
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


def build_sessions(joined, me, forgotten, bots, chats_left_out, options, spool):
    """Cut the joined chats into sessions, and write each that teaches something to `spool`, a line of data/*.jsonl.

    → (index: an array with a row a session, in order of time, its columns START to CHARACTERS; persona; report).
    Memory grows with the index alone.
    """
    census = ChatStats()
    census.left_out["chats"].update(chats_left_out.values())
    taken = {data.HEADER}
    kinds, facts = data.parse_header_parts(options.context), Path(options.out) / "facts.md"
    facts = cli.read_text(facts) if "facts" in kinds and facts.is_file() else ""
    my_name = data.unique_name(
        next((joined.people[i] for i in me if joined.people.get(i)), "Me"), taken
    )
    names = dict.fromkeys(me, my_name)
    index, chats, count = array("q"), [], sum(wrote.total() for wrote in joined.wrote.values())
    with tqdm(
        total=count, unit=" messages", unit_scale=True, desc="sessions", disable=None, leave=False
    ) as bar:
        for chat, messages in joined.chats():
            if chat.type == "personal_chat" and chat.key in forgotten:
                census.left_out["chats"]["of people to forget"] += 1
                continue
            own, before = (
                filter_messages(messages, options, forgotten, bots, census.left_out["messages"]),
                None,
            )
            chats.append(chat.name)
            for session in data.sessions(own, chat, me, options.gap_minutes * 60):
                why = data.skip_reason(session)
                bar.update(census.add(session, why))
                if why and not kinds:
                    continue
                for turn in session.turns:
                    if turn.author not in names:
                        names[turn.author] = data.unique_name(joined.people.get(turn.author), taken)
                    turn.author = names[turn.author]
                known, before = before, session
                if why:
                    continue
                if opening := data.header(kinds, session, known, facts):
                    session = dataclasses.replace(session, turns=[opening, *session.turns])
                written = session.to_json().encode() + b"\n"
                start = int("0" + re.sub(r"\D", "", session.start)[:14])
                mine = [
                    " ".join(text.split())
                    for turn in session.turns
                    if turn.me
                    for text in data.text_messages(turn)
                ]
                content = hash("\n".join(mine).casefold())
                characters = sum(map(len, mine))
                index.extend(
                    (
                        start,
                        spool.tell(),
                        len(written),
                        len(mine),
                        content,
                        len(chats) - 1,
                        characters,
                    )
                )
                spool.write(written)
            census.end_of(chat, not forgotten)
    table = np.array(index, dtype=np.int64).reshape(-1, CHARACTERS + 1)
    contacts = [{"name": names[i], "messages": n} for i, n in census.contacts()]
    persona = {"me": my_name, "contacts": contacts} | ({"context": kinds} if kinds else {})
    report = census.report() | {"repeated": find_repeats(table, chats)}
    return table[np.argsort(table[:, START], kind="stable")], persona, report


def find_repeats(index: np.ndarray, chats: list[str]) -> list[dict]:
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


def check_enough(options, index, report):
    """UserError, with the likeliest reason and its way out, when there is nothing to learn from."""
    path, outside = (
        ", ".join(options.exports),
        report["messages_left_out"].get("outside --since and --until", 0),
    )
    if not report["messages"]:
        kinds = ", ".join(counted(n, kind(why)) for why, n in report["chats_left_out"].items())
        reasons = [f"left out: {kinds}"] if kinds else []
        reasons += [counted(n, why) for why, n in report["repairs"].items()]
        way_out = "Export again with the personal chats ticked, or --include a chat."
        if reasons and not kinds:
            way_out = "Before its messages a chat has its name, type and id, a whole number."
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"{path} holds no messages in chats that are taken{why}", way_out)
    if outside and report["messages"] == sum(report["messages_left_out"].values()):
        raise UserError(
            f"none of the {outside:,} messages in {path} is of the days asked for",
            "Look at --since and --until.",
        )
    if report["messages"] == sum(report["messages_left_out"].values()):
        reasons = "; ".join(counted(n, why) for why, n in report["messages_left_out"].items())
        raise UserError(
            f"{path}: all its messages are left out ({reasons})",
            "Export other chats, or look at --forget and --since.",
        )
    if not report["my_messages"]:
        raise UserError(
            f"{path} holds no message by me",
            "Say who you are with --me NAME, or export your own messages too.",
        )
    if len(index) < 2:
        why = "; ".join(
            counted(n, why)
            for why, n in [*report["sessions_left_out"].items(), *report["repairs"].items()]
        )
        raise UserError(
            f"{path}: sessions in which I answer somebody: {len(index)}; two are needed"
            + (f" ({why})" if why else ""),
            ONLY_MINE
            if report["only_mine"]
            else "Export more chats, or try a larger --gap-minutes.",
        )


def read_line(spool, place):
    offset, length = place[[OFFSET, LENGTH]].tolist()
    spool.seek(offset)
    return spool.read(length)


def make_canaries(count, among):
    """Invented numbers, said 1, 2, 4, 8, 1, … times → [{"before", "secret", "copies", "lines": of train.jsonl}]. arXiv 1802.08232"""
    draw, found = random.Random(0), []
    for i in range(count):
        copies = min(2 ** (i % 4), among)
        secret = f"{draw.randrange(10**8):08}"
        lines = draw.sample(range(among), copies)
        found.append(
            {
                "before": f"locker {i + 1} opens with ",
                "secret": secret,
                "copies": copies,
                "lines": lines,
            }
        )
    return found


def with_canaries(written, number, planted):
    """A line of train.jsonl with what is planted in it: messages at the end of my last turn."""
    texts = [canary["before"] + canary["secret"] for canary in planted if number in canary["lines"]]
    if not texts:
        return written
    session = data.Session.from_json(written)
    next(turn for turn in reversed(session.turns) if turn.me).messages += texts
    return session.to_json().encode() + b"\n"


def write_output(parts, spool, persona, report, options, words, near, planted):
    """Write data/: all of it beside, in `near`, then renamed. With --dry-run only `report` is filled in."""
    out, parts = (
        Path(options.out),
        {part: parts[part] for part in parts if not options.dry_run or (part == "train" and words)},
    )
    with tempfile.TemporaryDirectory(prefix="new-", dir=near) as beside:
        for part, places in parts.items():
            with open(Path(beside) / f"{part}.jsonl", "wb") as file:
                hidden = planted if part == "train" else []
                file.writelines(
                    with_canaries(read_line(spool, place), number, hidden)
                    for number, place in enumerate(places)
                )
        report["tokens"] = (
            count_tokens(Path(beside) / "train.jsonl", words, options.seq_len) if words else None
        )
        report["verdict"] = verdict(report)
        if options.dry_run:
            return
        cli.make_private_dir(out)
        for cached in (out / "cache").glob("*"):
            cached.unlink()
        for part in parts:
            (Path(beside) / f"{part}.jsonl").replace(out / f"{part}.jsonl")
        cli.write_json(out / "persona.json", persona)
        cli.write_json(out / "report.json", report)
        (out / "canaries.json").unlink(missing_ok=True)
        if planted:
            cli.write_json(out / "canaries.json", {"canaries": planted})


def hold_out(index: np.ndarray, share: float) -> dict:
    """The sessions' index, in order of time → {"train": …, "val": the latest}.

    In no session of `val` do I say what I say in one of `train`. A session that repeats one to train on, message for message of mine,
    is in neither, and `val` begins a little earlier for it.
    """
    firsts = np.unique(index[:, CONTENT], return_index=True, return_inverse=True)
    first = firsts[1][firsts[2]]  # of each session: the first that says the same
    held_out = validation_size(len(index), share)
    usable = np.bincount(first, minlength=len(index))[::-1].cumsum()[
        ::-1
    ]  # how many a `val` that begins here could hold
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
    packed, talks = data.load_rows(path, words, seq_len), data.load_sessions(path)
    mine = [
        text
        for talk in talks
        for turn in talk.turns
        if turn.me
        for text in data.text_messages(turn)
    ]
    return {
        "written": sum(
            len(words.encode(data.render(talk.turns, specials=words.specials).text)[0])
            for talk in talks
        ),
        "computed": sum(len(row.ids) for row in packed),
        "trained": sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in packed),
        "rows": len(packed),
        "filled": data.fill_share(packed, seq_len),
        "per_1000_characters": density(
            random.Random(0).sample(mine, min(len(mine), SAMPLE_CHARS)), words
        ),
    }


def show_session(session):
    """Print the end of a session, with what will be trained in colour."""
    document, green = data.render(session.turns[-SHOWN_TURNS:]), sys.stdout.isatty()
    text, end = "", 0
    for begin, stop in document.targets:
        text += document.text[end:begin] + ("\033[32m{}\033[0m" if green else "{}").format(
            cli.printable(document.text[begin:stop])
        )
        end = stop
    print(
        f"One session, with what is trained {'in green' if green else 'being my turns'}:\n\n{text}{cli.printable(document.text[end:])}"
    )


# --- what people want gone


def forget_people(folder, names, dry_run):
    """Take people out of data/ itself: their personal chats, their messages in groups, their name in the persona."""
    persona = cli.read_json(folder / "persona.json")
    people = {
        str(contact.get("name")): None
        for contact in persona.get("contacts", [])
        if isinstance(contact, dict)
    }
    gone = set()
    for said in names:
        if said.casefold() == str(persona.get("me")).casefold():
            raise UserError(f"--forget {said}: that is you", "--exclude leaves whole chats out.")
        matches = [name for name in people if name.casefold() == said.casefold()]
        if not matches:
            raise UserError(
                f"--forget {said}: {folder}/persona.json knows nobody of that name",
                "Write it as it stands there.",
            )
        gone |= set(matches)
    before, after, parts, total = 0, 0, {}, collections.Counter()
    for part in ("train", "val"):
        parts[part] = []
        for talk in data.load_sessions(folder / f"{part}.jsonl"):
            before += sum(len(turn.messages) for turn in talk.turns)
            theirs = any(turn.author in gone for turn in talk.turns)
            talk.turns = without_people(
                talk.turns, gone
            )  # a header may quote them where they say nothing
            if theirs and (talk.type == "personal_chat" or data.skip_reason(talk)):
                continue
            for turn in talk.turns:
                total[turn.author] += len(turn.messages)
            parts[part].append(talk.to_json() + "\n")
    after = total.total()
    if not dry_run:
        for part, lines in parts.items():
            cli.write_text(folder / f"{part}.jsonl", "".join(lines))
        contacts = [{"name": name, "messages": total[name]} for name in people if total[name]]
        cli.write_json(folder / "persona.json", persona | {"contacts": contacts})
        for path in [folder / "report.json", *(folder / "cache").glob("*")]:
            path.unlink(missing_ok=True)
    would, count = (
        "would be forgotten" if dry_run else "forgotten",
        f"{before - after:,} of {counted(before, 'messages')}",
    )
    print(
        f"{', '.join(sorted(gone))} {would} in {folder}/: {count}, theirs and what was said to them alone."
    )
    print(AFTER_FORGETTING)


def without_people(turns, gone):
    """Turns but for those of people to forget; what one author wrote before and behind them becomes one turn."""
    left = []
    for turn in turns:
        if turn.author == data.HEADER:
            said = [
                text
                for text in turn.messages
                if not text.startswith(tuple(f"{name}: " for name in gone))
            ]
            left += [dataclasses.replace(turn, messages=said)] if said else []
        elif turn.author not in gone:
            if left and left[-1].author == turn.author:
                left[-1].messages += turn.messages
            else:
                left.append(turn)
    return left


def find_our_files(folder):
    """Whether one of our programs wrote into this folder."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        with open(folder / "train.jsonl", encoding="utf-8") as file:
            data.Session.from_json(file.readline())
            return True
    with contextlib.suppress(OSError, ValueError):  # how remote.sh's word of a run ends
        if (
            (folder / ("flags" if folder.name == ".run" else ".remote"))
            .read_text(encoding="utf-8")
            .endswith(" --data data --out ckpt \n")
        ):
            return True
    for name, keys in (
        ("persona.json", {"me", "contacts"}),
        ("run.json", {"config", "commit", "versions"}),
    ):
        with contextlib.suppress(UserError, OSError):
            if keys <= cli.read_json(folder / name, {}).keys():
                return True
    return False


def wipe(root, dry_run):
    """List the folders below `root` that hold chats or what was made of them, ask, and delete what our programs wrote in them."""
    found, seen = {}, set()
    for name, inner, _ in os.walk(root, followlinks=True):
        folder = Path(name)
        inner[:] = (
            []
            if folder.resolve() in seen
            else [n for n in inner if n not in (".git", ".venv", "cache", "resume", ".incoming")]
        )
        if folder.resolve() not in seen and find_our_files(folder):
            patterns = (
                REMOTE_FILES
                if folder.name == ".run"
                else (beside for name in WRITTEN_FILES for beside in (name, name + ".new"))
            )
            found[folder] = [
                *dict.fromkeys(
                    path for pattern in patterns for path in sorted(folder.glob(pattern))
                )
            ]
        seen.add(folder.resolve())
    if not found:
        print(f"Nothing below {root.resolve()} holds chats, as far as our own files go.")
        return
    for folder, paths in found.items():
        size = sum(path.stat().st_size for path in paths if path.is_file()) / 1e3
        print(
            f"{size:>12,.0f} kB  {folder}/  {', '.join(sorted({path.relative_to(folder).parts[0] for path in paths}))}"
        )
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
    print(
        "Deleted. The exports, talks kept with chat.py --history, and copies elsewhere (a rented machine, a backup) are yours to delete."
    )
