"""Join several exports: each chat's messages in order of time, none twice, in little memory.

Messages go to a temporary file in batches; where these lie stays in memory. A batch that begins
before the end of the previous one opens a new run, and the runs of a chat are merged as it is read
back. So an export in order costs one write and one read. (SQLite took 3.3 µs a message for that,
this 0.5.)
"""

import bisect
import collections
import functools
import hashlib
import heapq
import itertools
import marshal
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from exports import Chat, Message, align, iso_time, make_message

BATCH = 256  # messages
TIME = operator.itemgetter(3)  # of a Message


def order(message: Message) -> tuple[int, int]:
    return message.at, message.id or 0


class Run:
    """Batches in order of time. `places`: (offset, length) of each in the file."""

    def __init__(self, first: int):
        self.first = self.last = first  # times
        self.places: list[tuple[int, int]] = []


class ChatCopy:
    """A chat as one export holds it.

    `texts`: hashes of its texts, None where messages have ids. `overlap`: which of its messages a
    newer copy holds, and when all were sent by that copy's clock; None where no copy is newer.
    """

    def __init__(self, chat: Chat, number: int):
        self.chat, self.number = chat, number
        self.runs: list[Run] = []
        self.texts: array | None = array("q")
        self.overlap: align.Overlap | None = None


class MessageStore:
    """Chats by their key: `add` them export by export, `align` them, then read `chats`.

    `file`: where messages go. `clean`: what is done to texts and names before that.
    `names`: {author's id: display name}. `counts`: {export: messages of each author}.
    `same`: {author's id: the id under which `chats` yields the person}, as `unify` sets it.
    """

    def __init__(self, file: IO[bytes], clean: Callable[[str], str] = str):
        self.file, self.clean, self.clean_name = file, clean, functools.cache(clean)
        self.copies: dict[str, list[ChatCopy]] = {}  # by the chat's key, the oldest first
        self.num_copies = 0
        self.names: dict[str, str] = {}
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.same: dict[str, str] = {}

    def total(self) -> collections.Counter:
        total: collections.Counter = collections.Counter()
        for counts in self.counts.values():  # + would copy the sum for each of thousands of files
            total.update(counts)
        return total

    def add(
        self, export: str, chat: Chat, messages: Iterator[Message]
    ) -> tuple[set[str | None], collections.Counter]:
        """Write a chat's messages. What is added last counts, where two exports hold the same.

        Returns (who wrote, how many are left out for each Reason; "" for those that aren't).
        """
        chat = chat._replace(name=self.clean_name(chat.name))
        copy = ChatCopy(chat, self.num_copies)
        self.num_copies += 1
        self.copies.setdefault(chat.key, []).append(copy)
        runs, reasons = copy.runs, collections.Counter[str]()
        names: dict[tuple, None] = {}  # (author, name): in order, each once
        while batch := list(itertools.islice(messages, BATCH)):
            batch.sort(key=TIME)  # stable: messages of one second stay in their order
            ids, authors, shown, times, dates, texts, left_out = zip(*batch)
            names |= dict.fromkeys(zip(authors, shown))
            self.counts[export].update(itertools.compress(authors, map(operator.not_, left_out)))
            reasons.update(left_out)
            cleaned = [text and self.clean(text) for text in texts]
            if ids[0] is not None:
                copy.texts = None
            elif copy.texts is not None:
                copy.texts.extend(map(hash, cleaned))
            if not runs or times[0] < runs[-1].last:
                runs.append(Run(times[0]))
            runs[-1].last = times[-1]
            # Nobody else can write to this file.
            data = marshal.dumps((ids, authors, times, dates, cleaned, left_out))
            runs[-1].places.append((self.file.tell(), len(data)))
            self.file.write(data)
        self.names |= {author: self.clean_name(name) for author, name in names if name}
        return {author for author, _ in names}, reasons

    def align(self) -> list[dict]:
        """Find copies of a chat whose messages have no ids, also under two names: see align.py.

        Returns [{"chats": both names, "messages": in both, "hours": between their clocks}].
        """
        copies = [copy for copies in self.copies.values() for copy in copies if copy.texts]
        copies.sort(key=lambda copy: -copy.number)  # the newest one's clock and names count
        joined = []
        timeline = functools.cache(lambda copy: align.timeline(self.merged(copy.runs)))
        for i, j in align.candidates([np.array(copy.texts) for copy in copies]):
            new, old = copies[i], copies[j]
            overlap = align.overlap(timeline(old), timeline(new), old.chat.key == new.chat.key)
            if not overlap:
                continue
            names, hours = [new.chat.name, old.chat.name], overlap.shift / 3600
            fresh = overlap.seen
            if new.overlap:  # by the clock and the names of the copy that is newer still
                overlap = overlap.shifted(new.overlap)
            if old.overlap:
                fresh = fresh & ~old.overlap.seen
                overlap = old.overlap.joined(overlap)
            old.overlap = overlap
            self.unite(old, new)
            if fresh.any():
                joined.append({"chats": names, "messages": int(fresh.sum()), "hours": hours})
        return joined

    def unite(self, old: ChatCopy, new: ChatCopy) -> None:
        """Put the copies under the key of `old` under that of `new`."""
        keys = {copy: key for key, copies in self.copies.items() for copy in copies}
        if keys[old] != keys[new]:
            both = self.copies[keys[new]] + self.copies.pop(keys[old])
            self.copies[keys[new]] = sorted(both, key=lambda copy: copy.number)

    def with_aliases(self, ids: Iterable[str]) -> dict[str, None]:
        """Return ids of people, then those under which newer exports know them."""
        aliases: dict[str, str] = {}
        for copy in itertools.chain.from_iterable(self.copies.values()):
            aliases |= copy.overlap.rename if copy.overlap else {}
        ids = list(ids)
        ids += [aliases[id] for id in ids if id in aliases]
        people = {self.same[id] for id in ids if id in self.same}
        return dict.fromkeys(ids + [id for id, person in self.same.items() if person in people])

    def unify(self, people: Iterable[list[str]]) -> None:
        """Make each list of ids, the first one's name first, one person. After `align`."""
        for ids in people:
            ids = list(self.with_aliases(ids))
            first = self.same.get(ids[0], ids[0])
            self.same |= dict.fromkeys(ids, first)

    def share_names(self) -> None:
        """Give all ids of a person the name of the first that has one."""
        for person in dict.fromkeys(self.same.values()):
            ids = [id for id, other in self.same.items() if other == person]
            name = next((self.names[id] for id in ids if id in self.names), None)
            if name:
                self.names |= dict.fromkeys(ids, name)

    def chats(self) -> Iterator[tuple[Chat, Iterator[Message]]]:
        """Yield chats as they were first added, with their messages (without names) in order."""
        for copies in itertools.chain.from_iterable(map(by_account, self.copies.values())):
            newer, streams = array("q"), []
            for copy in reversed(copies):
                stream = self.aligned(copy)
                streams.append(without(newer, stream) if newer else stream)
                if copy is not copies[0]:
                    keys = newer + array("q", (key for key, _ in with_keys(self.aligned(copy))))
                    newer = array("q", np.unique(np.array(keys)).tobytes())
            # A personal chat is called as its person is, not as a file "Bob copy".
            named = [copy.chat for copy in copies if copy.chat.key in self.names]
            yield (named or [copies[-1].chat])[-1], self.renamed(heapq.merge(*streams, key=order))

    def renamed(self, messages: Iterator[Message]) -> Iterator[Message]:
        if not self.same:
            return messages
        same = self.same
        return (m._replace(author=same[m.author]) if m.author in same else m for m in messages)

    def aligned(self, copy: ChatCopy) -> Iterator[Message]:
        """Yield the messages of a copy that newer ones lack, by the newest one's clock."""
        if copy.overlap is None:
            yield from self.merged(copy.runs)
            return
        _, times, seen, rename = copy.overlap
        for message, at, is_seen in zip(self.merged(copy.runs), times.tolist(), seen.tolist()):
            if not is_seen:
                date = message.date if at == message.at else iso_time(at)
                author = message.author and rename.get(message.author, message.author)
                yield message._replace(author=author, at=at, date=date)

    def merged(self, runs: list[Run]) -> Iterator[Message]:
        """Yield the messages of runs in order; of runs that overlap a batch each is in memory."""
        groups: list[list[Run]] = []
        until = 0
        for run in sorted(runs, key=lambda run: run.first):
            if groups and run.first <= until:
                groups[-1].append(run)
            else:
                groups.append([run])
            until = max(until, run.last)
        for group in groups:
            yield from heapq.merge(*map(self.read_run, group), key=order)

    def read_run(self, run: Run) -> Iterator[Message]:
        for offset, length in run.places:
            self.file.seek(offset)
            ids, authors, *rest = marshal.loads(self.file.read(length))
            yield from map(make_message, zip(ids, authors, itertools.repeat(None), *rest))


def by_account(copies: list[ChatCopy]) -> list[list[ChatCopy]]:
    """Divide the copies of a chat by whose export they are from: my chat with Bob isn't hers.

    A supergroup or channel is the same for all.
    """
    owners = dict.fromkeys(copy.chat.owner for copy in copies if copy.chat.owner)
    if len(owners) < 2 or copies[-1].chat.type.endswith(("supergroup", "channel")):
        return [copies]
    groups = [[copy for copy in copies if copy.chat.owner == owner] for owner in [*owners, None]]
    return [group for group in groups if group]


def with_keys(messages: Iterable[Message]) -> Iterator[tuple[int, Message]]:
    """Yield (64-bit key, message): of its id and author, else of its time, author and text.

    Of two messages without ids that are alike, the second "ok" of one second is another one.
    """
    last, alike = None, collections.Counter[tuple]()
    for message in messages:
        key = f"{message.id} {message.author}"
        if message.id is None:
            if message.at != last:
                last = message.at
                alike.clear()
            alike[message.author, message.text] += 1
            nth = alike[message.author, message.text]
            key = f"{message.at} {message.author} {nth} {message.text}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        yield int.from_bytes(digest, "big", signed=True), message


def without(keys: array, messages: Iterable[Message]) -> Iterator[Message]:
    """Yield the messages whose keys are not among `keys`, which ascend."""
    for key, message in with_keys(messages):
        if keys[bisect.bisect_left(keys, key, hi=len(keys) - 1)] != key:
            yield message
