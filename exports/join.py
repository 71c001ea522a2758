"""Several exports as one: each chat's messages in order of time, none twice, in little memory whatever the exports' size.

What is read goes to a file on disk, in batches; what stays in memory is where they lie. A batch that begins before the one before it
ended opens a new run, and a chat's runs are merged as it is read back. So an export in order, as nearly all are, costs one writing and one
reading, and one that isn't is sorted all the same.
"""

import bisect
import collections
import datetime
import functools
import hashlib
import heapq
import itertools
import marshal
import operator
from array import array

import numpy as np

from exports import align, make

BATCH = 256  # messages
TIME = operator.itemgetter(3)  # of a Message


def order(message):
    return message.at, message.id or 0


class Run:
    """Batches in order of time. `first`, `last`: the times at its ends; `places`: (offset, length) of its batches in the file."""

    def __init__(self, first):
        self.first, self.last, self.places = first, first, []


class Copy:
    """A chat as one export holds it. `texts`: hashes of its texts, None where messages are numbered. What `align` finds: `seen`, which of
    its messages a newer copy holds; `times`, when by the newer one's clock; `rename`, its authors' ids there."""

    def __init__(self, chat, number):
        self.chat, self.number, self.runs, self.texts = chat, number, [], array("q")
        self.seen, self.times, self.shift, self.rename = None, None, 0, {}


class MessageStore:
    """Chats by their key: `add` them as they are read, export by export, `align` them, then take them from `chats`.

    `file`: where the messages go, a binary file open for writing and reading. `clean`: what happens to texts and names before that.
    `people`: {id: display name}, `wrote`: {export: Counter of the messages of each id}.
    """

    def __init__(self, file, clean=lambda text: text):
        self.file, self.clean, self.clean_name = file, clean, functools.cache(clean)
        self.copies = {}  # by key: a Copy for each time it was added
        self.people, self.wrote = {}, collections.defaultdict(collections.Counter)

    def add(self, export, chat, messages):
        """Write a chat's messages. When it was added before: of a message in both, and of the chat's head, the one added last counts."""
        chat = chat._replace(name=self.clean_name(chat.name))
        copy, shown = Copy(chat, sum(map(len, self.copies.values()))), {}
        runs = copy.runs
        self.copies.setdefault(chat.key, []).append(copy)
        while batch := list(itertools.islice(messages, BATCH)):
            batch.sort(key=TIME)  # stable: what was written in one second stays in its order
            numbers, authors, names, times, dates, texts, left_out = zip(*batch)
            shown |= dict.fromkeys(zip(authors, names))
            self.wrote[export].update(author for author, why in zip(authors, left_out) if not why)
            if not runs or times[0] < runs[-1].last:
                runs.append(Run(times[0]))
            runs[-1].last = times[-1]
            texts = [text and self.clean(text) for text in texts]
            if numbers[0] is not None:
                copy.texts = None
            elif copy.texts is not None:
                copy.texts.extend(map(hash, texts))
            data = marshal.dumps(
                (numbers, authors, times, dates, texts, left_out)
            )  # nobody else can write to this file
            runs[-1].places.append((self.file.tell(), len(data)))
            self.file.write(data)
        self.people |= {author: self.clean_name(name) for author, name in shown if name}

    def align(self):
        """Join the copies of unnumbered chats that surely are one, also under two names: of a message in both, the one added last counts.

        → [{"chats": the two names, "messages": how many of the older copy's count no more, "hours": between their clocks}]
        """
        copies = [copy for copies in self.copies.values() for copy in copies if copy.texts]
        copies.sort(
            key=lambda copy: -copy.number
        )  # the newest first: its clock and its names count
        timelines, joined = {}, []
        for i, j in align.candidates([np.array(copy.texts) for copy in copies]):
            new, old = copies[i], copies[j]
            for copy in (new, old):
                if copy.number not in timelines:
                    timelines[copy.number] = align.timeline(self.merged(copy.runs))
            lines = timelines[old.number], timelines[new.number]
            if found := align.overlap(*lines, old.chat.key == new.chat.key):
                if old.seen is None:
                    old.seen, old.shift = np.zeros_like(found.seen), new.shift + found.shift
                    old.times = found.times + new.shift
                more = int((found.seen & ~old.seen).sum())
                old.seen |= found.seen
                old.rename |= {a: new.rename.get(b, b) for a, b in found.rename.items()}
                self.unite(old, new)
                names, hours = [new.chat.name, old.chat.name], found.shift / 3600
                joined += [{"chats": names, "messages": more, "hours": hours}] if more else []
        return joined

    def unite(self, old, new):
        """Make the copies under the older one's key those of the newer one's."""
        key, other = (
            next(key for key, copies in self.copies.items() if copy in copies)
            for copy in (new, old)
        )
        if key != other:
            self.copies[key] = sorted(
                self.copies[key] + self.copies.pop(other), key=lambda copy: copy.number
            )

    def aliases(self):
        """{id of an author: theirs in a newer export}, of those whose name changed."""
        return {
            old: new
            for copies in self.copies.values()
            for copy in copies
            for old, new in copy.rename.items()
        }

    def chats(self):
        """Yield (Chat, iterator of its Messages, without names) in the order in which the chats were first added."""
        for copies in itertools.chain.from_iterable(map(by_account, self.copies.values())):
            newer, streams = array("q"), []
            for copy in reversed(copies):
                streams.append(absent(self.aligned(copy), newer))
                if copy is not copies[0]:
                    found = np.array(
                        newer + array("q", (number for number, _ in numbered(self.aligned(copy))))
                    )
                    newer = array("q", np.unique(found).tobytes())
            # of a personal chat the name that a person in it has, not that of a file called "Bob copy"
            head = next(
                (copy.chat for copy in reversed(copies) if copy.chat.key in self.people),
                copies[-1].chat,
            )
            yield head, heapq.merge(*streams, key=order)

    def aligned(self, copy):
        """The messages of a copy that no newer one is known to hold, by the newer one's clock and names."""
        if copy.seen is None:
            return self.merged(copy.runs)
        unseen = itertools.compress(zip(self.merged(copy.runs), copy.times), ~copy.seen)
        return (moved(message, int(at), copy.rename) for message, at in unseen)

    def merged(self, runs):
        """The messages of runs in order. Those that overlap are read side by side, a batch of each in memory."""
        groups, until = [], 0
        for run in sorted(runs, key=lambda run: run.first):
            if groups and run.first <= until:
                groups[-1].append(run)
            else:
                groups.append([run])
            until = max(until, run.last)
        for group in groups:
            yield from heapq.merge(*map(self.messages, group), key=order)

    def messages(self, run):
        for offset, length in run.places:
            self.file.seek(offset)
            numbers, authors, *rest = marshal.loads(self.file.read(length))
            yield from map(make, zip(numbers, authors, itertools.repeat(None), *rest))


def moved(message, at: int, rename: dict):
    """A message as another export would date it, and name its author."""
    date = (
        message.date
        if at == message.at
        else datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()[:19]
    )
    return message._replace(author=rename.get(message.author, message.author), at=at, date=date)


def by_account(copies):
    """The copies of a chat, apart where they are of several accounts: what two people wrote to Bob is not one chat. Supergroups are."""
    owners = dict.fromkeys(copy.chat.owner for copy in copies if copy.chat.owner)
    kind = copies[-1].chat.type
    if len(owners) < 2 or "supergroup" in kind or "channel" in kind:
        return [copies]
    return [
        part
        for owner in [*owners, None]
        if (part := [copy for copy in copies if copy.chat.owner == owner])
    ]


def numbered(messages):
    """(a 64-bit number by which a message is known, Message): of its id and author; where it has no id, of what it says and when, and of
    how often that was said (the second "ok" of one moment is another)."""
    moment, said = None, collections.Counter()
    for message in messages:
        known = f"{message.id} {message.author}"
        if message.id is None:
            if message.at != moment:
                moment, said = message.at, collections.Counter()
            said[message.author, message.text] += 1
            known = (
                f"{message.at} {message.author} {said[message.author, message.text]} {message.text}"
            )
        yield (
            int.from_bytes(
                hashlib.blake2b(known.encode(), digest_size=8).digest(), "big", signed=True
            ),
            message,
        )


def absent(messages, newer):
    """The messages that are not among `newer`: what messages are known by, ascending."""
    if not newer:
        return messages
    return (
        message
        for number, message in numbered(messages)
        if newer[bisect.bisect_left(newer, number, hi=len(newer) - 1)] != number
    )
