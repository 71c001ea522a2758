"""What it knows when it answers, beside its weights: the header that training had, live; facts; old exchanges like what was just said.

Old exchanges are found by BM25 over what others wrote to me (bm25s, in requirements-extra.txt).
"""

import datetime
import functools
from pathlib import Path

import cli
import data
from cli import UserError

SELF = """
    i i'm i've i'll i'd my mine we our ich mein meine wir unser unsere я мне меня мой моя моё мы je j'ai mon ma mes nous
    yo soy mi mis tengo io sono mio mia ho eu sou meu minha tenho ja mam mój moja jestem
""".split()  # how a sentence about oneself begins


class ExchangeIndex:
    """What others wrote to me and what I answered: (day, their turn, my turn), of some sessions."""

    def __init__(self, talks):
        try:
            import bm25s
        except ImportError:
            raise UserError(
                "bm25s is not installed", "pip install -r requirements-extra.txt"
            ) from None
        self.pairs = [
            (talk.start[:10], *talk.turns[i - 1 : i + 1])
            for talk in talks
            for i in data.replies(talk)
        ]
        self.cut = functools.partial(bm25s.tokenize, stopwords=[], show_progress=False)
        self.index = bm25s.BM25()
        texts = [" ".join(asked.messages) for _, asked, _ in self.pairs]
        self.index.index(self.cut([*texts, "no words, no index"]), show_progress=False)

    def similar(self, turns, count=8):
        """The `count` exchanges most like the last of `turns`, the likest last."""
        query = self.cut([" ".join(turns[-1].messages)])
        found, scores = self.index.retrieve(
            query, k=min(count, len(self.pairs) + 1), show_progress=False
        )
        return [
            self.pairs[i]
            for i, score in zip(found[0][::-1], scores[0][::-1])
            if score > 0 and i < len(self.pairs)
        ]


def statements(talks, most=40):
    """What I said of myself, in my own words, the latest last: messages that begin as sentences about oneself do, of five words or more."""
    said = [
        text
        for talk in talks
        for turn in talk.turns
        if turn.me
        for text in data.text_messages(turn)
    ]
    of_me = [
        text
        for text in said
        if len(text.split()) >= 5 and text.split()[0].lower().replace("’", "'") in SELF
    ]
    return [*dict.fromkeys(of_me)][-most:]


class ContextBuilder:
    """The turns of a talk → the same behind what I know: the header as the checkpoint was trained with it, and old exchanges.

    `ckpt`: its persona.json says which kinds; facts.md lies beside it. `past`: the folder of data.py to remember, or None.
    `shown(day, their turn, my turn)` is called for each old exchange that is taken, once.
    """

    def __init__(self, ckpt, past=None, shown=lambda *exchange: None):
        self.kinds = data.parse_header_parts(
            ",".join(cli.read_json(Path(ckpt) / "persona.json", {}).get("context", []))
        )
        facts = Path(ckpt) / "facts.md"
        self.facts = cli.read_text(facts) if facts.is_file() else ""
        if self.facts and "facts" not in self.kinds:
            self.kinds.append("facts")
        self.talks = (
            [
                talk
                for part in ("train", "val")
                for talk in data.load_sessions(Path(past) / f"{part}.jsonl")
            ]
            if past
            else []
        )
        self.exchanges = ExchangeIndex(self.talks) if past else None
        self.shown, self.known = shown, set()

    def __call__(self, turns):
        friend = next((turn.author for turn in turns if not turn.me), "")
        start = (turns[0].at if turns else "") or datetime.datetime.now().isoformat(
            timespec="hours"
        )
        session = data.Session(friend, "", "personal_chat", start, turns)
        header = data.header(self.kinds, session, self.last_with(friend), self.facts)
        remembered = self.exchanges.similar(turns) if self.exchanges and turns else []
        for exchange in remembered:
            if id(exchange) not in self.known:
                self.known.add(id(exchange))
                self.shown(*exchange)
        return [
            *([header] if header else []),
            *(turn for _, *pair in remembered for turn in pair),
            *turns,
        ]

    def last_with(self, friend):
        """The latest session with whom I talk to now, without its header; None when none is known."""
        for talk in reversed(self.talks):
            if talk.type == "personal_chat" and any(turn.author == friend for turn in talk.turns):
                return data.without_header(talk)
        return None
