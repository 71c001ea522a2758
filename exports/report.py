"""Report what `data.py` read: `report.json` for programs, the same in words for a person."""

import collections
import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping

from cli import counted, printable
from exports.redact import redact

MARK = re.compile("<[a-z]+>")
SAMPLE_MESSAGES = 2_000  # of mine, for tokens per 1,000 characters
EXPORT_ALL = "Export again and untick 'Only my messages'; Discord: with DiscordChatExporter."
CHAT_TYPES = {
    "saved_messages": "Saved Messages",
    "bot_chat": "chats with bots",
    "private_channel": "private channels",
    "public_channel": "public channels",
    "replies": "Replies",
    "verification_codes": "sign-in codes",
}
# What to expect of fewer than so many trained messages.
EXPECTATIONS = (
    (300, "too few: the base model with a few of your favourite words. Export more chats."),
    (2_000, "few: your tone, your length and your favourite words; hardly what you know."),
    (15_000, "enough for your style and frequent subjects; it will make up rare facts."),
    (float("inf"), "plenty, for style and background; try `--epochs 2`, or full fine-tuning."),
)


@functools.cache
def script(character: str) -> str:
    """Return `Latin`, `Cyrillic`, `Cjk`…; "" for what is not a letter."""
    return unicodedata.name(character, "").split(" ")[0].title() if character.isalpha() else ""


def count_scripts(characters: Mapping[str, int]) -> dict[str, int]:
    """Turn {character: how often} into {script: how many letters}, most first."""
    counts = collections.Counter[str]()
    for character, n in characters.items():
        counts[script(character)] += n
    del counts[""]
    return dict(counts.most_common())


class ChatStats:
    """Counts over all sessions, while authors are still ids."""

    def __init__(self):
        # Of chats, messages and sessions; `mine` and `short` are my messages.
        self.seen = collections.Counter[str]()
        self.left_out = {
            part: collections.Counter[str]() for part in ("chats", "messages", "sessions")
        }
        # Messages of others in sessions that are kept, by id; those of them in personal chats.
        self.written = collections.Counter[str]()
        self.in_private = collections.Counter[str]()
        self.groups: dict[str, str] = {}  # names by id
        self.answered: set[str] = set()  # chats in which others write
        self.letters = collections.Counter[str]()  # of mine

    def add(self, session, skip_reason: str) -> int:
        """Count a session and return its messages; `skip_reason`: "" where it is kept."""
        messages = 0
        if "group" in session.type:
            self.groups[session.chat_id] = session.chat
        for turn in session.turns:
            count = len(turn.messages)
            messages += count
            if turn.me:
                self.seen["mine"] += count
                self.seen["short"] += sum(len(text) <= 3 for text in turn.messages)
                self.letters.update(MARK.sub("", "".join(turn.messages)))
                continue
            self.answered.add(session.chat_id)
            if not skip_reason:
                self.written[turn.author] += count
                self.in_private[turn.author] += count * (session.type == "personal_chat")
        self.seen["messages"] += messages
        self.seen["sessions"] += 1
        if skip_reason:
            self.left_out["sessions"][skip_reason] += 1
        return messages

    def contacts(self) -> list[tuple[str, int]]:
        """Return (id, messages) of others: who writes in personal chats first, then by messages."""
        return sorted(self.written.items(), key=lambda pair: (-self.in_private[pair[0]], -pair[1]))

    def report(self) -> dict:
        report: dict = {"my_messages": self.seen["mine"]}
        for part, reasons in self.left_out.items():
            report[part] = self.seen[part]
            report[f"{part}_left_out"] = dict(reasons.most_common())
        for part in ("chats", "messages"):  # a session that is left out is in `seen`
            report[part] += self.left_out[part].total()
        return report | {
            "short_share": self.seen["short"] / max(1, self.seen["mine"]),
            "scripts": count_scripts(self.letters),
            "only_mine": [name for id, name in self.groups.items() if id not in self.answered],
        }


@dataclasses.dataclass
class SourceStats:
    """What was read of one file, folder or zip given, by one reader."""

    path: str  # printed only: the name of a file may be a person's
    messenger: str
    files: int = 0
    chats: int = 0
    authors: set[str | None] = dataclasses.field(default_factory=set)
    chats_left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    # By Reason; "" for those that aren't left out.
    messages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repairs: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def report(self, me: Iterable[str], names: Mapping[str, str]) -> dict:
        """Return its part of report.json; `me`: my ids."""
        mine = [names.get(id, id) for id in me if id in self.authors]
        return {
            "messenger": self.messenger,
            "files": self.files,
            "chats": self.chats,
            "messages": self.messages.total(),
            "me": list(dict.fromkeys(mine)),
            "chats_left_out": dict(self.chats_left_out.most_common()),
            "messages_left_out": {r: n for r, n in self.messages.most_common() if r},
            "repairs": dict(self.repairs),
        }


def show_sources(paths: Iterable[str], sources: list[dict]) -> None:
    """Print a line for each source; of several also what was left out of each."""
    several = len(sources) > 1
    for path, source in zip(paths, sources, strict=True):
        files = f"{source['files']:,} files, " if source["files"] > 1 else ""
        chats, messages = counted(source["chats"], "chats"), counted(source["messages"], "messages")
        me = f"I am {' and '.join(source['me'])}" if source["me"] else "nothing of mine"
        name = redact(path, collections.Counter())  # WhatsApp names a file by the contact's number
        print(printable(f"{name} ({source['messenger']}): {files}{chats}, {messages}; {me}"))
        for part in ("chats_left_out", "messages_left_out", "repairs") if several else ():
            for reason, n in source[part].items():
                print(printable(f"{'':>12}- {counted(n, chat_reason(reason))}"))


def tokens_per_1000_characters(messages: Iterable[str], tokenizer) -> dict[str, int]:
    """Return {script: tokens}; a message counts for the script of most of its letters."""
    tokens, characters = collections.Counter[str](), collections.Counter[str]()
    for text in messages:
        if scripts := count_scripts(collections.Counter(text)):
            main = next(iter(scripts))
            tokens[main] += len(tokenizer.encode(text)[0])
            characters[main] += len(text)
    return {
        name: round(1000 * tokens[name] / n) for name, n in characters.most_common() if n >= 100
    }


def verdict(report: dict) -> list[str]:
    """Say whether it is enough, for what, and what is lopsided."""
    mine, short, scripts = report["trained_messages"], report["short_share"], report["scripts"]
    expectation = next(text for limit, text in EXPECTATIONS if mine < limit)
    lines = [f"{mine:,} of your messages will be trained: {expectation}"]
    if not report["sessions_kept"]["val"]:
        lines.append(
            "Nothing is held out: you say the same in every session. train.py needs others."
        )
    if short > 0.4:
        lines.append(f"{short:.0%} of your messages have at most 3 letters: so will its answers.")
    if report["only_mine"]:
        names = ", ".join(report["only_mine"][:5])
        lines.append(
            f"Only your own messages are in {names}: there is nothing to answer. {EXPORT_ALL}"
        )
    if not report["tokens"]:
        mixed = [name for name, n in scripts.items() if n > 0.05 * sum(scripts.values())]
        if len(mixed) > 1:
            lines.append(
                f"You write {' and '.join(mixed[:2])}: "
                "--tokenizer FOLDER shows how well a base model fits each."
            )
        return lines
    for name, n in report["tokens"]["per_1000_characters"].items():
        if n > 450 and scripts.get(name, 0) > 1_000:
            lines.append(
                f"This tokenizer needs {n} tokens for 1,000 characters of your {name}: "
                "another base model may know it better."
            )
    return lines


def show(report: dict, options) -> None:
    """Print the report for a person."""
    kept, tokens = report["sessions_kept"], report["tokens"]
    read = report["messages"] - sum(report["messages_left_out"].values())
    chats = {chat_reason(reason): n for reason, n in report["chats_left_out"].items()}
    show_count(report["chats"], "chats", chats)
    show_count(
        report["messages"], "messages in the chats that are read", report["messages_left_out"]
    )
    show_count(report["my_messages"], f"of them mine ({report['my_messages'] / read:.0%})")
    show_count(
        report["sessions"],
        f"sessions (cut at {options.gap_minutes:g} minutes of silence)",
        report["sessions_left_out"],
    )
    show_count(
        sum(kept.values()),
        f"sessions kept: {kept['train']:,} to train on, the latest {kept['val']:,} to validate",
    )
    if tokens:
        show_count(
            tokens["rows"],
            f"rows of {options.seq_len:,} tokens; {tokens['trained']:,} tokens are trained",
        )
        for name, n in tokens["per_1000_characters"].items():
            show_count(n, f"tokens for 1,000 characters of my {name}")
    else:
        main_scripts = dict(list(report["scripts"].items())[:3])
        show_count(sum(report["scripts"].values()), "letters of mine", main_scripts)
    secrets = {f"<{mark}>": n for mark, n in report["secrets"].items()}
    if secrets:
        show_count(sum(secrets.values()), "secrets replaced by marks", secrets)
    for repair, n in report["repairs"].items():
        show_count(n, repair)
    for pair in report["joined"]:
        names = " and ".join(dict.fromkeys(pair["chats"]))
        show_count(pair["messages"], f"messages of {names} stood in two exports, and count once")
    print("", *report["verdict"], sep="\n")


def chat_reason(reason: str) -> str:
    return f"{CHAT_TYPES[reason]} (--include reads them)" if reason in CHAT_TYPES else reason


def format_reasons(reasons: Mapping[str, int]) -> str:
    return "; ".join(counted(n, chat_reason(reason)) for reason, n in reasons.items())


def show_count(count: int, name: str, parts: Mapping[str, int] | None = None) -> None:
    """Print a number, its name, and below it what it is made of, the most first."""
    number, _, rest = counted(count, name).partition(" ")
    print(f"{number:>11} {rest}")
    for part, n in collections.Counter(parts).most_common():
        print(f"{'':>12}- {counted(n, part)}")
