"""What replies look like: their words and habits, what gives a clone away, what it copies."""

import collections
import math
import re
from collections.abc import Callable, Iterable

import data

Reply = list[str]  # messages

LENGTHS = (5, 10, 20, 40, 80)  # limits of a message's letters
COPIED_RUN = 5  # words in a row that count as copied
GENERIC = """
    ok okay okey k kk yes yeah yep yup ya no nope nah lol haha hahaha hehe hm hmm mm mhm idk sure
    fine cool nice good great thanks thx ty np busy later soon same oh ah right true maybe
    ок окей да нет неа ага угу лол хаха ахах хз норм ладно хорошо понял спасибо пока занят потом
    ja nein nö jo klar gut danke oui non ouais si sí vale sì va bene bon merci gracias grazie
    tak nie evet hayır tamam
""".split()
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50\u2b55\u2764]")


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def reply_words(reply: Reply) -> list[str]:
    return words_of(" ".join(reply))


def case(message: str) -> str:
    letters = [c for c in message if c.islower() or c.isupper()]
    if not letters:
        return "no letters"
    if message.islower():
        return "all small"
    if message.isupper() and len(letters) > 1:
        return "ALL CAPITALS"
    return "Capital first" if letters[0].isupper() else "mixed"


def ending(message: str) -> str:
    if message.endswith(("..", "…")):
        return ".."
    if message[-1] in ".!?)":
        return message[-1]
    return "emoji" if EMOJI.match(message.rstrip("\ufe0f\u200d")[-1:]) else "nothing"


def habits(reply: Reply) -> set[str]:
    """Name the habits that show in a reply."""
    found = {f"messages a turn: {len(reply)}"}
    for message in reply:
        length = next((f"up to {n}" for n in LENGTHS if len(message) <= n), f"over {LENGTHS[-1]}")
        found |= {
            f"letters in a message: {length}",
            f"emoji in a message: {len(EMOJI.findall(message))}",
            f"end of a message: {ending(message)}",
            f"capitals: {case(message)}",
        }
    return found


def features(reply: Reply) -> set[str]:
    """List what may give a reply away: habits, words, pairs of words, emoji."""
    words = reply_words(reply)
    texts = {*words, *map(" ".join, zip(words, words[1:])), *EMOJI.findall(" ".join(reply))}
    return habits(reply) | {f"“{text}”" for text in texts}


def shares(replies: list[Reply], of: Callable[[Reply], set[str]]) -> dict[str, float]:
    """Return the share of replies that have each feature."""
    counts = collections.Counter(feature for reply in replies for feature in of(reply))
    return {feature: count / len(replies) for feature, count in sorted(counts.items())}


def giveaways(mine: list[Reply], theirs: list[Reply], most: int = 8) -> list[dict]:
    """List what they do more often than I do, and than chance explains (3 deviations)."""
    m, n = len(mine), len(theirs)
    my_shares = shares(mine, features)
    rows: list[dict] = []
    for feature, share in shares(theirs, features).items():
        my_share = my_shares.get(feature, 0)
        pooled = (m * my_share + n * share) / (m + n)
        z = (share - my_share) / math.sqrt(pooled * (1 - pooled) * (1 / m + 1 / n) or 1)
        if z > 3 and round(n * share) >= 3:
            example = next(" / ".join(reply) for reply in theirs if feature in features(reply))
            row = {"what": feature, "mine": my_share, "clone": share, "z": z, "example": example}
            rows.append(row)
    return sorted(rows, key=lambda row: -row["z"])[:most]


def is_generic(reply: Reply) -> bool:
    words = reply_words(reply)
    return len(words) <= 3 and all(word in GENERIC for word in words)


def word_runs(words: list[str]) -> list[tuple]:
    return [tuple(words[i : i + COPIED_RUN]) for i in range(len(words) - COPIED_RUN + 1)]


def runs_in(sessions: Iterable[data.Session]) -> set[tuple]:
    """Collect all runs of words that a turn in `sessions` holds."""
    runs: set[tuple] = set()
    for session in sessions:
        for turn in session.turns:
            runs.update(word_runs(reply_words(turn.messages)))
    return runs


def copied_words(reply: Reply, known: set[tuple]) -> int:
    """Count the words of a reply that stand in a run of `known`."""
    runs = word_runs(reply_words(reply))
    return len({i + j for i, run in enumerate(runs) if run in known for j in range(COPIED_RUN)})
