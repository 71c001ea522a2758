"""What `data.py` says at its end about the chats it read: `report.json` for programs, and the same in words for a person."""

import collections
import functools
import re
import sys
import unicodedata

import numpy as np

from cli import counted

TOGETHER = 1 << 14  # messages whose letters are counted at once
ONLY_MINE = "Export again and untick 'Only my messages'."
CHAT_KINDS = {"saved_messages": "Saved Messages", "bot_chat": "chats with bots", "private_channel": "private channels",
         "public_channel": "public channels", "replies": "Replies", "verification_codes": "sign-in codes"}  # fmt: skip
SAMPLE_CHARS = 2_000  # of my messages, from which tokens per 1,000 characters are told
MIN_MESSAGES = (  # my messages that are trained, and what to expect of fewer than that
    (
        300,
        "too few: the base model with a few of your favourite words. Export more chats, or every year of them.",
    ),
    (
        2_000,
        "few: your tone, your length and your favourite words; what you know and think hardly.",
    ),
    (15_000, "enough for your style and for what you speak of often; rare facts it will make up."),
    (
        float("inf"),
        "plenty, for style and background alike: `--epochs 2` may do, `python train.py` (full fine-tuning) is worth a look.",
    ),
)


@functools.cache
def script(character):
    """`Latin`, `Cyrillic`, `Cjk`…; "" for what is no letter."""
    return unicodedata.name(character, "").split(" ")[0].title() if character.isalpha() else ""


def scripts(characters):
    """{character: how often} → {script: how many letters}, most first."""
    counts = collections.Counter()
    for character, n in characters.items():
        counts[script(character)] += n
    del counts[""]
    return dict(counts.most_common())


class ChatStats:
    """What is counted over all sessions as they are cut, their authors still ids."""

    def __init__(self):
        self.left_out = {what: collections.Counter() for what in ("chats", "messages", "sessions")}
        self.seen = (
            collections.Counter()
        )  # chats, sessions, messages, characters; mine, my characters and short: of my messages
        self.turns, self.private, self.total = (
            collections.Counter(),
            collections.Counter(),
            collections.Counter(),
        )
        self.authors, self.only_mine, self.days = set(), [], ("9999", "0000")
        self.letters, self.waiting = np.zeros(sys.maxunicode + 1, dtype=np.int64), []

    def add(self, session, why):
        """Count a session, left out for the reason `why` if there is one. → its messages"""
        seen, before = self.seen, self.seen["messages"]
        for turn in session.turns:
            n, characters = len(turn.messages), sum(map(len, turn.messages))
            seen["messages"] += n
            seen["characters"] += characters
            self.authors.add(turn.me or turn.author)
            if turn.me:
                seen["mine"] += n
                seen["my characters"] += characters
                seen["short"] += sum(len(text) <= 3 for text in turn.messages)
                self.waiting += turn.messages
                self.turns[session.chat, session.chat_id] += not why
            elif not why:
                self.total[turn.author] += n
                self.private[turn.author] += n * (session.type == "personal_chat")
        if len(self.waiting) > TOGETHER:
            self.count_letters()
        seen["sessions"] += 1
        if why:
            self.left_out["sessions"][why] += 1
        else:
            self.days = (min(self.days[0], session.start), max(self.days[1], session.turns[-1].at))
        return seen["messages"] - before

    def end_of(self, chat, whole):
        """`whole`: nobody was taken out of the chat."""
        self.seen["chats"] += 1
        if whole and "group" in chat.type and self.authors == {True}:
            self.only_mine.append(chat.name)
        self.authors = set()

    def count_letters(self):
        text = re.sub("<[a-z]+>", "", "\n".join(self.waiting))  # without marks
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        self.letters += np.bincount(codes, minlength=len(self.letters))
        self.waiting = []

    def contacts(self):
        """[(id, messages)] of whom I talk with, personal chats first, then by messages."""
        return sorted(self.total.items(), key=lambda item: (-self.private[item[0]], -item[1]))

    def report(self):
        self.count_letters()
        (chat, _), turns = (self.turns.most_common(1) or [(("", ""), 0)])[0]
        seen = self.seen

        def share(part, whole):
            return seen[part] / max(1, seen[whole])

        return {
            "chats": seen["chats"] + self.left_out["chats"].total(),
            "messages": seen["messages"] + self.left_out["messages"].total(),
            "sessions": seen["sessions"],
            **{
                f"{what}_left_out": dict(reasons.most_common())
                for what, reasons in self.left_out.items()
            },
            "my_messages": seen["mine"],
            "share_of_voice": {
                "messages": share("mine", "messages"),
                "characters": share("my characters", "characters"),
            },
            "short_share": share("short", "mine"),
            "scripts": scripts(
                {chr(code): int(self.letters[code]) for code in np.flatnonzero(self.letters)}
            ),
            "largest_chat": {"name": chat, "share": turns / max(1, self.turns.total())},
            "only_mine": self.only_mine,
            "days": [day[:10] for day in self.days],
        }


def density(messages, tokenizer):
    """Tokens per 1,000 characters of messages, by the script that most of a message's letters are of."""
    tokens, characters = collections.Counter(), collections.Counter()
    for text in messages:
        if mostly := next(iter(scripts(collections.Counter(text))), ""):
            tokens[mostly] += len(tokenizer.encode(text)[0])
            characters[mostly] += len(text)
    return {
        name: round(1000 * tokens[name] / n) for name, n in characters.most_common() if n >= 100
    }


def kind(why):
    """Why a chat is left out, for a person."""
    return f"{CHAT_KINDS[why]} (--include takes it)" if why in CHAT_KINDS else why


def verdict(report):
    """Is it enough, and for what; what is lopsided, and the way out. → lines"""
    mine = report["trained_messages"]
    said = [
        f"{mine:,} of your messages will be trained: "
        + next(words for most, words in MIN_MESSAGES if mine < most)
    ]
    if not report["sessions_kept"]["val"]:
        said.append(
            "Nothing is held out: you say the same in every session. train.py needs others."
        )
    chat = report["largest_chat"]
    if chat["share"] > 0.5 and report["chats"] - sum(report["chats_left_out"].values()) > 1:
        said.append(
            f"{chat['share']:.0%} of your turns are from one chat, {chat['name']}: it will talk as you do there."
        )
    if report["short_share"] > 0.4:
        said.append(
            f"{report['short_share']:.0%} of your messages are of at most 3 letters: so will its answers be."
        )
    if report["only_mine"]:
        said.append(
            f"Only your own messages are in {', '.join(report['only_mine'][:5])}: there is nothing to answer. {ONLY_MINE}"
        )
    dense, letters = (report["tokens"] or {}).get("per_1000_characters", {}), report["scripts"]
    mixed = [name for name, n in letters.items() if n > 0.05 * sum(letters.values())]
    if len(mixed) > 1 and not dense:
        said.append(
            f"You write {' and '.join(mixed[:2])}: --tokenizer FOLDER says how well a base fits each."
        )
    for name, n in dense.items():
        if n > 450 and letters.get(name, 0) > 1_000:
            said.append(
                f"This tokenizer needs {n} tokens for 1,000 characters of your {name}: another base may know it better."
            )
    return said


def show_report(report, options):
    """Print the report for a person."""
    voice, kept, tokens = report["share_of_voice"], report["sessions_kept"], report["tokens"]
    chats = {kind(why): n for why, n in report["chats_left_out"].items()}
    format_line(report["chats"], "chats", chats)
    format_line(
        report["messages"], "messages in the chats that are taken", report["messages_left_out"]
    )
    format_line(
        report["my_messages"],
        f"of them mine ({voice['messages']:.0%}; of the letters {voice['characters']:.0%})",
    )
    format_line(
        report["sessions"],
        f"sessions (cut at {options.gap_minutes:g} minutes of silence)",
        report["sessions_left_out"],
    )
    format_line(
        sum(kept.values()),
        f"sessions kept: {kept['train']:,} to train on, the latest {kept['val']:,} to validate",
    )
    if tokens:
        format_line(tokens["written"], "tokens in the sessions to train on")
        format_line(
            tokens["computed"],
            "tokens computed (the rest stands behind my last word; some count twice, as context)",
        )
        filled = f"{tokens['filled']:.1%} filled; {tokens['trained']:,} of their tokens trained"
        format_line(tokens["rows"], f"rows of {options.seq_len:,} tokens, {filled}")
        dense = ", ".join(f"{n} of {name}" for name, n in tokens["per_1000_characters"].items())
        print(f"{'':>11} tokens for 1,000 characters of mine: {dense}")
    elif report["scripts"]:
        print(
            f"{'':>11} what I write: "
            + ", ".join(f"{n:,} letters {name}" for name, n in list(report["scripts"].items())[:3])
        )
    if report["secrets"]:
        what = {f"<{name}>": n for name, n in report["secrets"].items()}
        format_line(
            sum(report["secrets"].values()),
            "secrets replaced by marks as the exports were read",
            what,
        )
    for what, n in report["repairs"].items():
        format_line(n, what)
    for pair in report["joined"]:
        format_line(
            pair["messages"],
            f"messages of {named(pair['chats'])} stood in two exports{apart(pair['hours'])}, and count once",
        )
    for pair in report["repeated"]:
        a, b = pair["chats"]
        where = f"chat {a} also stand in chat {b}" if a != b else f"chat {a} stand twice in it"
        print(
            f"{pair['sessions']:>11,} of {pair['of']:,} sessions of {where}: are they one? --exclude leaves a chat out"
        )
    print("", *report["verdict"], sep="\n")


def named(chats):
    """`Bob`, or `Bob and Bob 2` where a chat has two names."""
    return " and ".join(dict.fromkeys(chats))


def apart(hours):
    return f", their clocks {abs(hours):g} hour{'s' * (abs(hours) != 1)} apart" if hours else ""


def format_line(count, what, reasons=()):
    number, _, rest = counted(count, what).partition(" ")
    print(f"{number:>11} {rest}")
    for why, n in sorted(dict(reasons).items(), key=lambda item: -item[1]):
        print(f"{'':>12}- {counted(n, why)}")
