"""Find exports of the same chat where messages have no ids: the same texts in the same order.

Two phones, another time zone, a renamed contact or a copied file give one WhatsApp chat several
times. Copies are compared by hashes of their texts: 26 bytes a message, while two are compared.
"""

import re
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

STEP = 900  # seconds: time zones differ by quarters of an hour
DST = 3600  # seconds by which the offset of two zones changes with the season
MAX_COPIES = 8  # a text in more copies than this tells none from another
MARK = re.compile("<[a-z]+>")
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64).view(np.int64)


class Timeline(NamedTuple):
    """A chat's messages in order of time: (n,) each."""

    times: np.ndarray  # int64, seconds
    texts: np.ndarray  # int64 hashes; 0 for media, which exports name differently
    authors: np.ndarray  # int64, places in `people`
    spoken: np.ndarray  # bool: somebody's own words
    people: list[str]  # ids of authors


class Overlap(NamedTuple):
    """How an older copy of a chat lies over a newer one."""

    shift: int  # seconds between the copies' clocks
    times: np.ndarray  # (n,) int64: when the older copy's messages were sent, by the newer clock
    seen: np.ndarray  # (n,) bool: the older copy's messages that the newer one holds
    rename: dict[str, str]  # ids of the older copy's authors → theirs in the newer one

    def shifted(self, newer: "Overlap") -> "Overlap":
        """Return this by the clock and the names of a copy that is newer than the newer one."""
        rename = {old: newer.rename.get(new, new) for old, new in self.rename.items()}
        return Overlap(self.shift + newer.shift, self.times + newer.shift, self.seen, rename)

    def joined(self, other: "Overlap") -> "Overlap":
        """Return this with what the copy of `other` also holds."""
        return self._replace(seen=self.seen | other.seen, rename=self.rename | other.rename)


def timeline(messages: Iterable) -> Timeline:
    times, texts, authors, spoken = array("q"), array("q"), array("q"), array("b")
    names: dict[str, int] = {}
    for _, author, _, at, _, text, left_out in messages:
        mark = MARK.fullmatch(text)
        times.append(at)
        texts.append(0 if mark else hash(text))
        authors.append(names.setdefault(author, len(names)))
        spoken.append(not mark and not left_out)
    return Timeline(
        times=np.array(times, np.int64),
        texts=np.array(texts, np.int64),
        authors=np.array(authors, np.int64),
        spoken=np.array(spoken, bool),
        people=list(names),
    )


def candidates(texts: list[np.ndarray]) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of copies that share three texts, each written once in both.

    `texts`: hashes of each copy's texts, (n,) int64.
    """
    once = [unique_texts(hashes)[0] for hashes in texts]
    hashes = np.concatenate(once) if once else np.zeros(0, np.int64)
    owners = np.repeat(np.arange(len(once)), [len(one) for one in once])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    shared = [np.zeros((0, 2), np.int64)]
    for step in range(1, min(MAX_COPIES, len(hashes))):
        pairs = np.stack([owners[:-step], owners[step:]], 1)
        shared.append(pairs[hashes[:-step] == hashes[step:]])
    pairs, counts = np.unique(np.concatenate(shared), axis=0, return_counts=True)
    return [tuple(pair) for pair in pairs[counts >= 3].tolist()]


def unique_texts(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts that are written once, and their places."""
    values, places, counts = np.unique(hashes, return_index=True, return_counts=True)
    return values[counts == 1], places[counts == 1]


def overlap(old: Timeline, new: Timeline, same_chat: bool) -> Overlap | None:
    """Return how an older copy lies over a newer one; None where they may be two chats.

    They are one if, of the texts in the time that both cover, at least 80% are in both (90% for
    chats of two names), in the same minutes at the offset of most texts that are written once (or
    an hour beside it, for summer time), and if each author has one name in either.
    """
    (old_once, i), (new_once, j) = unique_texts(old.texts), unique_texts(new.texts)
    _, a, b = np.intersect1d(old_once, new_once, assume_unique=True, return_indices=True)
    steps = np.rint((new.times[j[b]] - old.times[i[a]]) / STEP).astype(np.int64)
    steps, counts = np.unique(steps, return_counts=True)
    if not len(steps):
        return None
    shift = int(steps[counts.argmax()]) * STEP
    offsets = [shift]
    for offset in (shift + DST, shift - DST):
        if counts[steps * STEP == offset].sum() >= 3:
            offsets.append(offset)
    match, taken = np.full(len(old.times), -1), np.zeros(len(new.times), bool)
    new_keys = keys(new.times, new.texts)
    for offset in offsets:
        old_keys = keys(old.times + offset, old.texts)
        _, a, b = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
        free = (match[a] < 0) & ~taken[b]
        match[a[free]] = b[free]
        taken[b[free]] = True

    begin = max(old.times[0] + shift, new.times[0]) - 60
    end = min(old.times[-1] + shift, new.times[-1]) + 60
    both_old = old.spoken & (old.times + shift >= begin) & (old.times + shift <= end)
    both_new = new.spoken & (new.times >= begin) & (new.times <= end)
    agreed = both_old & (match >= 0)
    min_texts, min_share = (3, 0.8) if same_chat else (5, 0.9)
    if (
        len(np.unique(old.texts[agreed])) < min_texts
        or agreed.sum() < min_share * both_old.sum()
        or (taken & both_new).sum() < min_share * both_new.sum()
    ):
        return None
    rename = same_people(old, new, agreed, match)
    if rename is None:
        return None
    # Where one copy knows minutes only, the messages that the older one alone holds would change
    # places with their neighbours: keep each between those.
    seen, never = match >= 0, np.iinfo(np.int64).max
    before = np.maximum.accumulate(np.where(seen, new.times[match], -never))
    after = np.minimum.accumulate(np.where(seen, new.times[match], never)[::-1])[::-1]
    times = np.maximum(np.minimum(old.times + shift, after - 1), before)
    return Overlap(shift, times, seen, rename)


def keys(times: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return a key for each message: of its minute, its text, and the number of such before."""
    minutes = texts ^ (times // 60 * MIX[0])
    order = np.argsort(minutes, kind="stable")
    minutes = minutes[order]
    starts = np.flatnonzero(np.concatenate([[True], minutes[1:] != minutes[:-1]]))
    nth = np.arange(len(minutes)) - np.repeat(starts, np.diff([*starts, len(minutes)]))
    unordered = np.empty_like(minutes)
    unordered[order] = minutes + nth * MIX[1]
    return unordered


def same_people(
    old: Timeline, new: Timeline, agreed: np.ndarray, match: np.ndarray
) -> dict[str, str] | None:
    """Map ids in the older copy to those in the newer one, where they differ.

    None where one name stands for several people.
    """
    table = np.zeros((len(old.people), len(new.people)), np.int64)
    np.add.at(table, (old.authors[agreed], new.authors[match[agreed]]), 1)
    rows = np.flatnonzero(table.any(1))
    best = table[rows].argmax(1)
    if (table[rows, best] < 0.95 * table[rows].sum(1)).any() or len(set(best)) < len(best):
        return None
    pairs = [(old.people[a], new.people[b]) for a, b in zip(rows, best)]
    return {a: b for a, b in pairs if a != b}
