"""Build the turns that go before a conversation: a context header, facts, similar past exchanges.

Past exchanges are retrieved with BM25 over what others wrote to me (bm25s, in
requirements-extra.txt).
"""

import datetime
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import cli
import data
from cli import UserError
from weights.tokenizer import Tokenizer

# Words that open a sentence about oneself, in nine languages
FIRST_PERSON = frozenset(
    """
    i i'm i've i'll i'd my mine we our ich mein meine wir unser unsere я мне меня мой моя моё мы
    je j'ai mon ma mes nous yo soy mi mis tengo io sono mio mia ho eu sou meu minha tenho
    ja mam mój moja jestem
    """.split()
)


class Exchange(NamedTuple):
    """What somebody wrote to me and what I replied. `day`: ISO date."""

    day: str
    prompt: data.Turn
    reply: data.Turn


class ExchangeIndex:
    """A BM25 index of the exchanges in some sessions."""

    def __init__(self, sessions: Iterable[data.Session]):
        try:
            import bm25s
        except ImportError:
            raise UserError(
                "bm25s is not installed", "pip install -r requirements-extra.txt"
            ) from None
        self.exchanges = []
        for session in sessions:
            for index in data.replies(session):
                prompt, reply = session.turns[index - 1 : index + 1]
                self.exchanges.append(Exchange(session.start[:10], prompt, reply))
        self.tokenize = functools.partial(bm25s.tokenize, stopwords=[], show_progress=False)
        self.index = bm25s.BM25()
        texts = [" ".join(exchange.prompt.messages) for exchange in self.exchanges]
        texts.append("no exchanges")  # bm25s can't index an empty list
        self.index.index(self.tokenize(texts), show_progress=False)

    def similar(self, turns: list[data.Turn], count: int = 8) -> list[Exchange]:
        """Return the exchanges most like the last of `turns`, the most similar one last."""
        query = self.tokenize([" ".join(turns[-1].messages)])
        count = min(count, len(self.exchanges) + 1)
        indices, scores = self.index.retrieve(query, k=count, show_progress=False)
        exchanges = []
        for index, score in zip(indices[0], scores[0]):
            if score > 0 and index < len(self.exchanges):
                exchanges.append(self.exchanges[index])
        return exchanges[::-1]


def statements(sessions: Iterable[data.Session], count: int = 40) -> list[str]:
    """Return my latest `count` messages about myself, the latest last.

    They begin with "I" or the like, in some language, and have at least five words.
    """
    about_me: dict[str, None] = {}  # in order, each once
    for session in sessions:
        for turn in session.turns:
            for text in data.text_messages(turn) if turn.me else []:
                words = text.lower().replace("’", "'").split()
                if len(words) >= 5 and words[0] in FIRST_PERSON:
                    about_me.setdefault(text)
    return list(about_me)[-count:]


class ContextBuilder:
    """Put before the turns of a conversation what the model should know.

    `ckpt`: its persona.json names the parts of the header; facts.md lies beside it. `data_dir`:
    the folder of data.py to retrieve exchanges from, or None. `on_retrieved` is called once for
    each exchange that is added to a prompt.
    """

    def __init__(
        self,
        ckpt: Path,
        data_dir: Path | str | None = None,
        on_retrieved: Callable[[Exchange], None] = lambda exchange: None,
    ):
        parts = cli.read_json(Path(ckpt) / "persona.json", {}).get("context", [])
        self.parts = data.parse_header_parts(",".join(parts))
        facts = Path(ckpt) / "facts.md"
        self.facts = cli.read_text(facts) if facts.is_file() else ""
        if self.facts and "facts" not in self.parts:
            self.parts.append("facts")
        self.sessions: list[data.Session] = []
        self.index = None
        if data_dir:
            for name in ("train.jsonl", "val.jsonl"):
                self.sessions += data.load_sessions(Path(data_dir) / name)
            self.index = ExchangeIndex(self.sessions)
        self.on_retrieved = on_retrieved
        self.reported: set[int] = set()

    def __call__(
        self, turns: list[data.Turn], chat: str = "", group: bool = False
    ) -> list[data.Turn]:
        """Return the turns with what goes before them.

        `chat`: the name of the contact, or of the group, where it isn't the first other author's.
        Such a talk lasts for weeks: the header has the hour of its last turn, not of its first.
        """
        friend = chat or next((turn.author for turn in turns if not turn.me), "")
        start = turns[-1 if chat else 0].at if turns else ""
        start = start or datetime.datetime.now().isoformat(timespec="hours")
        chat_type = "private_group" if group else "personal_chat"
        session = data.Session(friend, "", chat_type, start, turns)
        header = data.header(self.parts, session, self.last_session_with(friend), self.facts)
        context = [header] if header else []
        for exchange in self.index.similar(turns) if self.index and turns else []:
            context += [exchange.prompt, exchange.reply]
            if id(exchange) not in self.reported:
                self.reported.add(id(exchange))
                self.on_retrieved(exchange)
        return context + turns

    def last_session_with(self, friend: str) -> data.Session | None:
        """Return the latest personal session with `friend`, without its header."""
        for session in reversed(self.sessions):
            authors = {turn.author for turn in session.turns}
            if session.type == "personal_chat" and friend in authors:
                return data.without_header(session)
        return None


def longer_prompts(
    past: list[data.Session], exchanges: ExchangeIndex, facts: Path, tokenizer: Tokenizer, size: int
) -> dict[str, Callable[[list[data.Turn]], list[data.Turn]]]:
    """Return the baselines that add context before a session's turns: {name: turns → turns}.

    `past`: sessions that I was trained on; `facts`: a file of lines, where it exists.
    """
    lines = cli.read_text(facts).splitlines() if facts.is_file() else statements(past)
    lines = [line for line in lines if line.strip()]

    def similar(turns):
        return [turn for _, *pair in exchanges.similar(turns) for turn in pair] + turns

    def messages(turns):
        """Add the latest sessions with whom I answer, as many as fill half a prompt."""
        added: list[data.Turn] = []
        for session in reversed(past):
            if any(turn.author == turns[-1].author for turn in session.turns):
                longer = session.turns + added
                text = data.render(longer, specials=tokenizer.specials).text
                if len(tokenizer.encode(text)[0]) > size // 2:
                    break
                added = longer
        return added + turns

    prompts = {"similar exchanges": similar, "past messages": messages}
    if lines:
        prompts["facts"] = lambda turns: [data.Turn(data.HEADER, False, "", lines), *turns]
    return prompts
