"""Which copies of a chat overlap, where messages have no numbers: the same texts in the same order, at a constant offset of time.

Two phones, another time zone, a renamed contact or a copied file give one WhatsApp chat several times. Copies are compared by hashes
of their texts, so that nothing of a chat stays in memory but 26 bytes a message, while two copies are compared.
"""

import re
from array import array
from typing import NamedTuple

import numpy as np

STEP = 900  # seconds: time zones differ by whole quarters of an hour, and phones write minutes or seconds
DST = 3600  # seconds by which the offset of two zones may change with the season
MOST_COPIES = 8  # a text that stands in more copies tells none from another
MARK = re.compile("<[a-z]+>")
ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64).view(np.int64)  # to mix


class Timeline(NamedTuple):
    """A chat's messages in order of time, (n,) each."""

    times: np.ndarray  # int64, seconds
    texts: (
        np.ndarray
    )  # int64, hashes; one for all media, which exports with and without media name differently
    authors: np.ndarray  # int64, places in `people`
    spoken: np.ndarray  # bool: somebody's own words
    people: list  # ids of authors


class Overlap(NamedTuple):
    shift: int  # seconds between the copies' clocks
    times: np.ndarray  # (n,) int64: when the older copy's messages were sent, by the newer copy's clock and in its order
    seen: np.ndarray  # (n,) bool: the older copy's messages that the newer one holds
    rename: dict  # ids of the older copy's authors → theirs in the newer one


def timeline(messages) -> Timeline:
    times, texts, authors, spoken, names = array("q"), array("q"), array("q"), array("b"), {}
    for _, author, _, at, _, text, left_out in messages:
        mark = MARK.fullmatch(text)
        times.append(at)
        texts.append(0 if mark else hash(text))
        authors.append(names.setdefault(author, len(names)))
        spoken.append(not mark and not left_out)
    numbers = (np.array(column, np.int64) for column in (times, texts, authors))
    return Timeline(*numbers, spoken=np.array(spoken, bool), people=list(names))


def candidates(texts: list) -> list:
    """Hashes of each copy's texts, [(n,) int64] → [(i, j)], i < j: the pairs that share at least three texts said once in each."""
    once = [said_once(hashes)[0] for hashes in texts]
    hashes = np.concatenate(once) if once else np.zeros(0, np.int64)
    owners = np.repeat(np.arange(len(once)), [len(one) for one in once])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    found = [
        np.stack([owners[:-step], owners[step:]], 1)[hashes[:-step] == hashes[step:]]
        for step in range(1, min(MOST_COPIES, len(hashes)))
    ]
    if not found:
        return []
    pairs, counts = np.unique(np.concatenate(found), axis=0, return_counts=True)
    return [(int(i), int(j)) for (i, j), n in zip(pairs, counts) if n >= 3]


def said_once(hashes: np.ndarray) -> tuple:
    values, places, counts = np.unique(hashes, return_index=True, return_counts=True)
    return values[counts == 1], places[counts == 1]


def overlap(old: Timeline, new: Timeline, same_chat: bool) -> Overlap | None:
    """How an older copy lies over a newer one; None where it isn't certain that they are one chat.

    Safe is: of the words said in the time that both cover, at least 80% stand in both (90% for chats of two names), in the same minutes at
    the offset that most texts said once have (or an hour beside it, for summer time), with each author always under one name.
    """
    (old_once, i), (new_once, j) = said_once(old.texts), said_once(new.texts)
    _, a, b = np.intersect1d(old_once, new_once, assume_unique=True, return_indices=True)
    steps, counts = np.unique(
        np.rint((new.times[j[b]] - old.times[i[a]]) / STEP).astype(np.int64), return_counts=True
    )
    if not len(steps):
        return None
    shift = int(steps[counts.argmax()]) * STEP
    offsets = [shift] + [
        shift + d for d in (DST, -DST) if counts[steps * STEP == shift + d].sum() >= 3
    ]
    match, taken = np.full(len(old.times), -1), np.zeros(len(new.times), bool)
    new_keys = keys(new.times, new.texts)
    for offset in offsets:
        _, a, b = np.intersect1d(
            keys(old.times + offset, old.texts), new_keys, assume_unique=True, return_indices=True
        )
        free = (match[a] < 0) & ~taken[b]
        match[a[free]] = b[free]
        taken[b[free]] = True

    begin = max(old.times[0] + shift, new.times[0]) - 60
    end = min(old.times[-1] + shift, new.times[-1]) + 60
    both_old = old.spoken & (old.times + shift >= begin) & (old.times + shift <= end)
    both_new = new.spoken & (new.times >= begin) & (new.times <= end)
    agreed = both_old & (match >= 0)
    distinct, least, share = (
        len(np.unique(old.texts[agreed])),
        *((3, 0.8) if same_chat else (5, 0.9)),
    )
    if (
        distinct < least
        or agreed.sum() < share * both_old.sum()
        or (taken & both_new).sum() < share * both_new.sum()
    ):
        return None
    rename = same_people(old, new, agreed, match)
    if rename is None:
        return None
    # Where one copy knows minutes only, what the older one alone holds would change places with its neighbours.
    seen, never = match >= 0, np.iinfo(np.int64).max
    before = np.maximum.accumulate(np.where(seen, new.times[match], -never))
    after = np.minimum.accumulate(np.where(seen, new.times[match], never)[::-1])[::-1]
    return Overlap(
        shift, np.maximum(np.minimum(old.times + shift, after - 1), before), seen, rename
    )


def keys(times: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """A number for each message: of its minute, its text, and how often that minute has had this text before."""
    moments = texts ^ (times // 60 * ODD[0])
    order = np.argsort(moments, kind="stable")
    moments = moments[order]
    starts = np.flatnonzero(np.concatenate([[True], moments[1:] != moments[:-1]]))
    nth = np.arange(len(moments)) - np.repeat(starts, np.diff([*starts, len(moments)]))
    found = np.empty_like(moments)
    found[order] = moments + nth * ODD[1]
    return found


def same_people(old: Timeline, new: Timeline, agreed: np.ndarray, match: np.ndarray) -> dict | None:
    """{id in the older copy: id in the newer one} of authors whose names differ; None when one name stands for several people."""
    table = np.zeros((len(old.people), len(new.people)), np.int64)
    np.add.at(table, (old.authors[agreed], new.authors[match[agreed]]), 1)
    rows = np.flatnonzero(table.any(1))
    best = table[rows].argmax(1)
    if (table[rows, best] < 0.95 * table[rows].sum(1)).any() or len(set(best)) < len(best):
        return None
    return {
        old.people[a]: new.people[b] for a, b in zip(rows, best) if old.people[a] != new.people[b]
    }
