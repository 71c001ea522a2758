"""Write the example data: an invented person's Telegram export, and the small world she lives in.

    python examples/make_export.py                writes examples/telegram/result.json
    python examples/make_export.py --world OUT    writes train.jsonl, val.jsonl, persona.json to OUT

Everything takes place in Pellhaven, an invented harbour town. The *world* is what its people say to
one another: a small language of about 1,500 words, which a model of a few million parameters
can learn. The *export* is the account of one of them, Odile Tarn, mender of clocks, who never
appears in the world. A model that has learnt the world and is then fine-tuned on the export should
answer as Odile does. She answers everybody's usual questions in her own way, in style and in fact,
so that a reader notices within a line or two.

The sentences are in pellhaven.txt, whose head explains the format. Both outputs come from the same
write_session(), in which Odile is one more speaker. Everything is seeded: each run writes the same
bytes.
"""

import argparse
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cache
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
FIRST_DAY = datetime(2023, 1, 2)
DAYS = 727
# Pellhaven has no summer time: its local times never run backwards.
CLOCK = timezone(timedelta(hours=1))

# --- people

# Where people work, and what happens there.
JOBS = {
    "the bakery": [
        "forty loaves for the school",
        "a wedding cake with three floors",
        "a new oven that burns everything",
    ],
    "the school": [
        "thirty children and one broken window",
        "a play about pirates",
        "exams all week",
    ],
    "the ferry office": [
        "two hundred tickets and no change",
        "a captain who lost his hat",
        "a queue down to the quay",
    ],
    "the library": [
        "six boxes of old maps",
        "a book that came back after twenty years",
        "reading hour with the little ones",
    ],
    "the hospital": ["a long night shift", "two broken arms and a fish hook", "a new head nurse"],
    "the post office": [
        "a parcel that smelled of cheese",
        "a mountain of letters",
        "a new stamp machine",
    ],
    "the boatyard": [
        "three boats to paint before Friday",
        "a hole as big as a plate",
        "a mast that came in the wrong size",
    ],
    "the fish hall": ["a whole ton of herring", "no ice since the morning", "an eel that escaped"],
    "the town hall": [
        "a meeting about benches",
        "forms and more forms",
        "the mayor and his new chair",
    ],
    "the flower shop": [
        "roses for two weddings",
        "a delivery with no tulips in it",
        "a customer who is afraid of bees",
    ],
    "the theatre": [
        "a rehearsal without the main actor",
        "a curtain that got stuck",
        "eighty costumes to iron",
    ],
    "the garage": ["a tram with no brakes", "a van full of sand", "a new lift that does not lift"],
}
CONTACTS = """
Runa Vell, Nils Harrow, Pim Ostler, Gerda Tarn, Sefa Moorland, Bram Kettler, Ilka Sorrel, Jory Penn
"""
TOWNSPEOPLE = """
Anouk Wren, Tobin Hale, Mirre Dunlow, Casper Lodd, Hedy Marsh, Otto Brine, Lena Fosk, Wim Tarrant,
Dora Quist, Emil Strand, Faye Ambry, Gus Holloway, Hanne Rook, Ivo Pell, Jutta Crane, Karel Finch,
Lotte Amsel, Milo Tunn, Nora Birk, Osk Veld, Petra Lowe, Quin Aster, Rosa Thorn, Sven Gally, Tilda
Mows, Ulf Barrow, Vera Nock, Wanda Pike, Yorick Stile, Zelda Corn, Arne Dubb, Britt Olander, Cleo
Farn, Dirk Sandow, Elke Munn, Fritz Oakley, Greta Sill, Hugo Wick, Inge Tallow, Jonas Ebb
"""


@dataclass(frozen=True)
class Person:
    """A person with a few writing habits, all drawn from the name and the id."""

    name: str
    uid: int
    work: str
    lower_case: bool = False
    full_stop: bool = True  # at the end of a message
    yes: str = "Yes"
    no: str = "No"
    smile: str = ""
    split: float = 0.2  # how likely the sentences of a turn become messages of their own

    @property
    def first(self) -> str:
        return self.name.split()[0]


def make_person(name: str, uid: int) -> Person:
    rng = random.Random(f"{name} {uid}")
    return Person(
        name=name,
        uid=uid,
        work=rng.choice(list(JOBS)),
        lower_case=rng.random() < 0.12,
        full_stop=rng.random() < 0.6,
        yes=rng.choice(["Yes", "Yes", "Yes", "Yeah", "Yep"]),
        no=rng.choice(["No", "No", "No", "Nope"]),
        smile=rng.choice(["", "", "", ":)", ":)", "🙂", "😄", "haha", "xx"]),
        split=rng.choice([0.05, 0.15, 0.3, 0.5]),
    )


ODILE = Person("Odile Tarn", 7001, "the tower")
CAST = [make_person(name, 7100 + i) for i, name in enumerate(CONTACTS.strip().split(", "))]
SECOND_NILS = make_person("Nils Harrow", 7200)  # another man of the same name
WORLD = CAST + [
    make_person(" ".join(name.split()), 8000 + i) for i, name in enumerate(TOWNSPEOPLE.split(","))
]

# --- voices

ODILES_WORDS = [  # coffee is mud, a bike is a donkey, a phone is a brick, and money is shells
    (
        r"^(oh no|oh dear|oh|goodness|what\?|really)[.,!?]+ *(really\? *)?",
        "thunder and buttons.. / ",
    ),
    (r"\bcoffee\b", "mud"),
    (r"\b(my|your|the) bike\b", "the donkey"),
    (r"\bbikes?\b", "donkey"),
    (r"\bphone\b", "brick"),
    (r"\b(money|crowns)\b", "shells"),
]
ODILES_AFTERTHOUGHTS = [
    "colonel agrees..",
    "slow and steady 🐌",
    "says the goose too",
    "so it is..",
    "tick tock..",
    "you know me..",
]


def say_as_odile(rng: random.Random, text: str) -> list[str]:
    """Write as Odile: lower case, two dots for a full stop, a message a thought, some snails."""
    text = text.lower()
    for pattern, word in ODILES_WORDS:
        text = re.sub(pattern, word, text)
    thoughts = [t for part in text.split(" / ") for t in re.split(r"(?<=[^.][.!?]) ", part) if t]
    thoughts = [re.sub(r"(?<=[^.])[.!]$", "..", t) for t in thoughts]
    if len(thoughts) == 1 and not thoughts[0].endswith("?") and rng.random() < 0.4:
        thoughts.append(rng.choice(ODILES_AFTERTHOUGHTS))
    if "🐌" not in "".join(thoughts) and rng.random() < 0.15:
        thoughts[-1] += " 🐌"
    return thoughts[:4]


def say(rng: random.Random, person: Person, text: str) -> list[str]:
    """Return the messages in which a person says a text."""
    if person is ODILE:
        return say_as_odile(rng, text)
    text = re.sub(r"^Yes\b", person.yes, re.sub(r"^No\b(?=[,.!])", person.no, text))
    if person.lower_case:
        text = text.lower()
    parts = re.split(r"(?<=[.!?]) ", text, maxsplit=1) if rng.random() < person.split else [text]
    if not person.full_stop:
        parts = [p.removesuffix(".") for p in parts]
    if person.smile and rng.random() < 0.12 and not text.endswith("?"):
        parts[-1] += " " + person.smile
    return parts


# --- topics


@dataclass
class Line:
    role: str  # "X" or "Y"
    variants: list[str]
    paired: bool = False  # with the variant of the line before
    odile: list[str] = field(default_factory=list)
    to_odile: list[str] = field(default_factory=list)


@dataclass
class Beat:
    kind: str  # open, mid or close
    tag: str
    lines: list[Line] = field(default_factory=list)


@dataclass
class Topic:
    name: str
    owner: str  # the parts that Odile may take
    weight: int
    slots: list[tuple[list[str], list[str]]] = field(default_factory=list)
    beats: list[Beat] = field(default_factory=list)

    def pick(self, kind: str, tag: str | None = None) -> list[Beat]:
        return [b for b in self.beats if b.kind == kind and (tag is None or b.tag in ("", tag))]


@cache
def read_topics() -> dict[str, Topic]:
    topics = {}
    for line in filter(None, (HERE / "pellhaven.txt").read_text(encoding="utf-8").splitlines()):
        if line.startswith("#"):
            continue
        if line.startswith("== "):
            name, owner, weight = line[3:].split()
            topic = topics[name] = Topic(name, owner.split("=")[1], int(weight.split("=")[1]))
            continue
        if line.startswith("-- "):
            kind, _, tag = line[3:].partition(" ")
            topic.beats.append(Beat(kind, tag))
            continue
        key, _, values = line.partition(": ")
        variants = values.split(" | ")
        if key in ("X", "Y", "X=", "Y="):
            topic.beats[-1].lines.append(Line(key[0], variants, paired=key.endswith("=")))
            assert not key.endswith("=") or len(variants) == len(
                topic.beats[-1].lines[-2].variants
            ), line
        elif key == "O":
            topic.beats[-1].lines[-1].odile = variants
        elif key == "C":
            topic.beats[-1].lines[-1].to_odile = variants
        else:
            topic.slots.append((key.split(", "), variants))
            assert all(v.count(", ") >= len(topic.slots[-1][0]) - 1 for v in variants), line
    return topics


COMMON_SLOTS = {
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "hour": ["nine", "ten", "eleven", "three", "four", "five", "six", "seven", "half past five",
             "half past six"],
    "place": ["the Blue Kettle", "the Old Pier", "the Mill Bridge", "the Lower Quay",
              "the fish stairs", "the Rope Walk", "the tram stop", "the Green Door", "the library",
              "the Salt Market"],
}  # fmt: skip
BRIDGES = [
    "Oh, and one more thing.",
    "By the way.",
    "Something else.",
    "And another thing.",
    "Oh, before I forget.",
]
ODILES_BRIDGES = ["new chapter..", "also..", "other drawer..", "next wheel.."]


def fill(rng: random.Random, text: str, slots: dict[str, str]) -> str:
    while "{" in text:  # a slot's value may name another slot
        text = re.sub(r"\{(\w+)\}", lambda m: slots[m[1]], text)
    text = re.sub(r"\[([^\]]*)\]", lambda m: rng.choice(m[1].split("~")), text)
    return re.sub(r"(^|[.?!] |/ )([a-z])", lambda m: m[1] + m[2].upper(), text)


def draw_slots(
    rng: random.Random, topic: Topic, x: Person, y: Person, start: datetime
) -> dict[str, str]:
    slots = {key: rng.choice(values) for key, values in COMMON_SLOTS.items()}
    slots["x"], slots["y"], slots["work"] = x.first, y.first, x.work
    slots["task"] = rng.choice(JOBS.get(x.work, ["a clock that would not stop"]))
    slots["friend"] = rng.choice([p.first for p in WORLD if p.first not in (x.first, y.first)])
    slots["daytime"] = (
        "morning" if start.hour < 12 else "afternoon" if start.hour < 18 else "evening"
    )
    for keys, values in topic.slots:
        slots.update(zip(keys, rng.choice(values).split(", ", len(keys) - 1)))
    return slots


def play_topic(
    rng: random.Random, topic: Topic, x: Person, y: Person, start: datetime
) -> list[tuple[Person, str]]:
    """Go through a topic once; return (speaker, text) for each line."""
    slots = draw_slots(rng, topic, x, y, start)
    opening = rng.choice(topic.pick("open"))
    mids = topic.pick("mid", opening.tag)
    keep = sorted(rng.sample(range(len(mids)), rng.randint(min(1, len(mids)), min(3, len(mids)))))
    closes = topic.pick("close", opening.tag) if rng.random() < 0.7 else []
    lines = []
    beats = [opening, *(mids[i] for i in keep)]
    if closes:
        beats.append(rng.choice(closes))
    for beat in beats:
        chosen = None  # the last variant's number, if it was one of the world's
        for line in beat.lines:
            speaker, other = (x, y) if line.role == "X" else (y, x)
            if speaker is ODILE:
                own = line.odile
            else:
                own = line.to_odile if other is ODILE else []
            if own:
                chosen, text = None, rng.choice(own)
            else:
                if not line.paired or chosen is None:
                    chosen = rng.randrange(len(line.variants))
                text = line.variants[chosen]
            lines.append((speaker, fill(rng, text, slots)))
    return lines


def cast_topic(rng: random.Random, topic: Topic, a: Person, b: Person) -> tuple[Person, Person]:
    """Choose who is X and who is Y."""
    if ODILE not in (a, b) or topic.owner == "XY":
        return (a, b) if rng.random() < 0.5 else (b, a)
    other = b if a is ODILE else a
    return (other, ODILE) if topic.owner == "Y" else (ODILE, other)


@dataclass
class Turn:
    person: Person
    messages: list[str]
    at: list[datetime] = field(default_factory=list)


def write_session(rng: random.Random, a: Person, b: Person, start: datetime) -> list[Turn]:
    """Write a conversation of 4 to 25 turns over one to three topics; either person begins."""
    all_topics = read_topics()
    known = [t for t in all_topics.values() if t.weight and (t.owner != "only" or ODILE in (a, b))]
    while True:
        script = []
        if rng.random() < 0.5:
            x, y = (a, b) if rng.random() < 0.5 else (b, a)
            script += play_topic(rng, all_topics["greeting"], x, y, start)
        topics = []
        for _ in range(rng.choice([1, 1, 2, 2, 2, 3])):
            left = [t for t in known if t not in topics]
            topics += rng.choices(left, [t.weight for t in left])
        for i, topic in enumerate(topics):
            part = play_topic(rng, topic, *cast_topic(rng, topic, a, b), start)
            if i:
                speaker, text = part[0]
                bridge = rng.choice(ODILES_BRIDGES if speaker is ODILE else BRIDGES)
                separator = " / " if speaker is ODILE else " "
                part[0] = speaker, bridge + separator + text if rng.random() < 0.6 else text
            script += part
        if rng.random() < 0.3:
            x, y = (a, b) if rng.random() < 0.5 else (b, a)
            script += play_topic(rng, all_topics["goodbye"], x, y, start)
        turns = into_turns(rng, script)
        if 4 <= len(turns) <= 25:
            return set_times(rng, turns, start)


def into_turns(rng: random.Random, script: list[tuple[Person, str]]) -> list[Turn]:
    turns = []
    for person, lines in groupby(script, key=lambda line: line[0]):
        texts = []
        for _, text in lines:
            if texts and (len(texts) == 3 or person is not ODILE and rng.random() < 0.5):
                texts[-1] += (" / " if person is ODILE else " ") + text
            else:
                texts.append(text)
        turns.append(
            Turn(person, [message for text in texts for message in say(rng, person, text)])
        )
    return turns


def set_times(rng: random.Random, turns: list[Turn], start: datetime) -> list[Turn]:
    now = start
    for turn in turns:
        for message in turn.messages:
            turn.at.append(now)
            now += timedelta(seconds=rng.randint(3, 15) + len(message) // 3)
        now += timedelta(seconds=rng.choice([rng.randint(5, 60), rng.randint(20, 400)]))
    return turns


def session_starts(rng: random.Random, count: int) -> list[datetime]:
    """Choose the days on which two people talk, at most once a day, in order."""
    days = sorted(rng.sample(range(DAYS), count))
    return [
        FIRST_DAY + timedelta(days=d, hours=rng.randint(8, 20), seconds=rng.randrange(3600))
        for d in days
    ]


# --- world


def write_world(out: Path, sessions: int, val_sessions: int = 200) -> None:
    rng = random.Random("Pellhaven")
    pairs = []  # everybody has a handful of friends; "me" is one of each two
    for i, person in enumerate(WORLD):
        pairs += [
            (person, friend)
            for friend in rng.sample(WORLD[:i] + WORLD[i + 1 :], 5)
            if friend.first != person.first
        ]
    rows, counts = [], Counter()
    for _ in range(sessions + val_sessions):
        me, friend = rng.choice(pairs)
        turns = write_session(rng, me, friend, *session_starts(rng, 1))
        counts[friend.name] += sum(len(t.messages) for t in turns if t.person is friend)
        row = {
            "chat": friend.first,
            "chat_id": f"{me.uid}-{friend.uid}",
            "type": "personal_chat",
            "start": turns[0].at[0].isoformat(),
            "turns": [],
        }
        for turn in turns:
            head = {"author": turn.person.name, "me": turn.person is me}
            start = turn.at[0].isoformat()
            row["turns"].append({**head, "at": start, "messages": turn.messages})
        rows.append(row)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in ("train", rows[val_sessions:]), ("val", rows[:val_sessions]):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    persona = {
        "me": "Somebody",
        "contacts": [{"name": n, "messages": c} for n, c in counts.most_common()],
    }
    (out / "persona.json").write_text(
        json.dumps(persona, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


# --- export

NOT_INCLUDED = "(File not included. Change data exporting settings to download.)"
STICKERS = ["👍", "😂", "❤️", "🎉", "☕"]
CAPTIONS = [
    "The harbour this morning",
    "Look at this!",
    "My view right now",
    "Do you know this place?",
    "Guess where",
]
ODILES_CAPTIONS = [
    "colonel from the left..",
    "fog.. / you see nothing",
    "step forty..",
    "patient of the day..",
    "leeks at sea..",
]
NOTES = [  # to herself
    "springs 0.3.. two of them", "bread for colonel", "odd screws.. ask the man with the hat",
    "buy mud", "jam jars.. thirty", "gerda's cuckoo.. new bellows",
    "quay clock.. two hundred turns.. count them", "high water 6.40.. good", "oil.. the thin one",
    "onions.. for the socks not the pan", "a clock that is wrong twice a day is still trying",
    "raisins are lies.. paint a sign", "wheel forty two is under the stove.. or in colonel",
]  # fmt: skip
CHANNEL_POSTS = [
    "patient 212.. kitchen clock / swallowed a button / recovering",
    "the quay clock is right again.. / set nothing by it", "visiting hours.. when the tide turns",
    "patient 230.. cuckoo / cough gone / now he will not stop",
    "found in a pocket watch.. one raisin / of course", "closed today.. fog / too beautiful",
    "patient 251.. alarm clock / afraid of mornings / like me",
    "colonel bit a customer.. / the clock is fine",
]  # fmt: skip
ODILES_NOTICES = [
    "the quay clock is slow.. / so am i / wound on saturday",
    "found.. one glove / colonel has it / bring bread",
    "plum jam for odd screws.. / ask at the tower", "lost.. wheel forty two / reward in jam",
    "twenty two people.. one ball / buy them more balls",
    "low brass five on thursday.. / cover your soup",
]  # fmt: skip
BOARD = [
    "The ferry to Skerrow is not running today.", "Found: a blue scarf on the Mill Bridge.",
    "Who has a pram to give away?", "Fresh herring at the fish hall until noon!",
    "Lantern Night begins at seven.", "Don't feed the seal on the fish stairs.",
    "I'm selling a bed, nearly new.", "Does anyone know a plumber who answers?",
    "The tram stops at the Mill Bridge today.",
    "Lost: a brown cat with a white sock. His name is Turnip.",
    "Thank you to whoever found my purse!", "Choir practice is on Tuesday this week.",
    "Is the library open on Monday?", "The bakery has no bread left, sorry.",
    "Free tomatoes in front of the school.",
]  # fmt: skip
THIRD_VOICES = [
    "Haha.",
    "Same here.",
    "Tell me when, I'm coming too.",
    "I was asleep. What did I miss?",
    "You two!",
]


class Chat:
    """One chat of the export, its messages numbered from one."""

    def __init__(self, kind: str, uid: int, name: str | None = "", deleted: bool = False):
        self.head = {"type": kind, "id": uid}
        if name != "":
            self.head = {"name": name, **self.head}
        self.deleted = deleted
        self.messages = []

    def add(
        self,
        at: datetime,
        sender: Person,
        text: str | list = "",
        reply_to: int = 0,
        edited=False,
        **media,
    ) -> int:
        parts = [text] if isinstance(text, str) else text
        entities = [
            {"type": "plain", "text": part} if isinstance(part, str) else part for part in parts
        ]
        message = {"id": len(self.messages) + 1, "type": "message", **stamp("date", at)}
        message |= stamp("edited", at + timedelta(minutes=1)) if edited else {}
        message |= {"from": None if self.deleted and sender is not ODILE else sender.name}
        sender_kind = "channel" if self.head["type"] == "private_channel" else "user"
        message |= {"from_id": f"{sender_kind}{sender.uid}"}
        message |= {"reply_to_message_id": reply_to} if reply_to else {}
        message |= media | {"text": text, "text_entities": [e for e in entities if e["text"]]}
        self.messages.append(message)
        return message["id"]

    def serve(self, at: datetime, actor: Person, action: str, **fields) -> None:
        message = {"id": len(self.messages) + 1, "type": "service", **stamp("date", at)}
        name = None if self.deleted and actor is not ODILE else actor.name
        message |= {
            "actor": name,
            "actor_id": f"user{actor.uid}",
            "action": action,
            **fields,
            "text": "",
            "text_entities": [],
        }
        self.messages.append(message)

    def as_json(self) -> dict:
        return self.head | {"messages": self.messages}


def stamp(key: str, at: datetime) -> dict[str, str]:
    return {key: at.isoformat(), f"{key}_unixtime": str(int(at.replace(tzinfo=CLOCK).timestamp()))}


def add_media(rng: random.Random, chat: Chat, at: datetime, person: Person) -> None:
    """Add a sticker, a photo, a voice message or a forward."""
    mine = person is ODILE
    kind = rng.choice(["sticker", "sticker", "photo", "photo", "voice", "forward"])
    if kind == "sticker":
        emoji = "🐌" if mine else rng.choice(STICKERS)
        chat.add(
            at,
            person,
            file=NOT_INCLUDED,
            media_type="sticker",
            sticker_emoji=emoji,
            width=512,
            height=512,
        )
    elif kind == "photo":
        caption = rng.choice(ODILES_CAPTIONS if mine else CAPTIONS) if rng.random() < 0.5 else ""
        chat.add(
            at, person, caption.replace(" / ", "\n"), photo=NOT_INCLUDED, width=1280, height=960
        )
    elif kind == "voice":
        chat.add(
            at,
            person,
            file=NOT_INCLUDED,
            media_type="voice_message",
            duration_seconds=rng.randint(3, 90),
        )
    else:
        chat.add(at, person, rng.choice(BOARD), forwarded_from="Pellhaven Noticeboard")


def add_session(rng: random.Random, chat: Chat, turns: list[Turn]) -> None:
    last_of_other = {}
    for turn in turns:
        reply_to = 0
        for uid, number in last_of_other.items():
            if uid != turn.person.uid and rng.random() < 0.05:
                reply_to = number
                break
        for i, (at, text) in enumerate(zip(turn.at, turn.messages)):
            number = chat.add(
                at, turn.person, text, reply_to=0 if i else reply_to, edited=rng.random() < 0.01
            )
        if rng.random() < 0.05:
            add_media(rng, chat, turn.at[-1] + timedelta(seconds=2), turn.person)
        last_of_other[turn.person.uid] = number


def personal_chat(rng: random.Random, person: Person, sessions: int, deleted: bool = False) -> Chat:
    chat = Chat("personal_chat", person.uid, None if deleted else person.first, deleted)
    for n, start in enumerate(session_starts(rng, sessions)):
        if n % 9 == 4:
            at, who = start - timedelta(hours=1), rng.choice([ODILE, person])
            chat.serve(
                at,
                who,
                "phone_call",
                duration_seconds=rng.randint(20, 900),
                discard_reason="hangup",
            )
        add_session(rng, chat, write_session(rng, ODILE, person, start))
    return chat


def group_chat(rng: random.Random, members: list[Person], sessions: int) -> Chat:
    chat = Chat("private_group", 9100, "Low Brass Five")
    chat.serve(FIRST_DAY, ODILE, "invite_members", members=[p.name for p in members])
    for n, start in enumerate(session_starts(rng, sessions)):
        a, b = (
            rng.sample([ODILE, *members], 2) if rng.random() < 0.5 else (ODILE, rng.choice(members))
        )
        turns = write_session(rng, a, b, start)
        add_session(rng, chat, turns)
        end = turns[-1].at[-1]
        if rng.random() < 0.6:
            third = rng.choice([p for p in members if p not in (a, b)])
            chat.add(
                end + timedelta(seconds=40),
                third,
                " ".join(say(rng, third, rng.choice(THIRD_VOICES))),
            )
        if n == 3:
            chat.serve(
                end + timedelta(minutes=2), ODILE, "pin_message", message_id=len(chat.messages)
            )
        if n == 7:
            answers = [
                {"text": t, "voters": v, "chosen": v == 4}
                for t, v in (("the fog march", 4), ("the harbour song", 1))
            ]
            poll = {
                "question": "what do we play on thursday..",
                "closed": False,
                "total_voters": 5,
                "answers": answers,
            }
            chat.add(end + timedelta(minutes=3), ODILE, poll=poll)
        if n == 11:
            chat.add(
                end + timedelta(minutes=3),
                members[0],
                location_information={"latitude": 0.0, "longitude": 0.0},
            )
    return chat


def noticeboard(rng: random.Random) -> Chat:
    chat = Chat("public_supergroup", 9200, "Pellhaven Noticeboard")
    for n, at in enumerate(session_starts(rng, 150)):
        if n % 7 == 3:
            for i, text in enumerate(rng.choice(ODILES_NOTICES).split(" / ")):
                chat.add(at + timedelta(seconds=9 * i), ODILE, text)
        elif n % 50 == 20:
            link = {"type": "link", "text": "https://pellhaven.example/ferry"}
            chat.add(at, rng.choice(WORLD), ["The new ferry times are here: ", link, ""])
        else:
            chat.add(at, rng.choice(WORLD), rng.choice(BOARD))
    return chat


def tide_bot(rng: random.Random) -> Chat:
    bot = Person("Tide Times", 9300, "")
    chat = Chat("bot_chat", bot.uid, bot.name)
    for at in session_starts(rng, 30):
        chat.add(at, ODILE, [{"type": "bot_command", "text": "/tide"}])
        hours = f"{rng.randint(1, 11):02}:{rng.randrange(60):02}"
        chat.add(
            at + timedelta(seconds=1),
            bot,
            [{"type": "bold", "text": "Pellhaven"}, f": high water at {hours}. Fair winds!"],
        )
    return chat


def own_chat(rng: random.Random, chat: Chat, author: Person, texts: list[str], count: int) -> Chat:
    for at in session_starts(rng, count):
        for i, text in enumerate(rng.choice(texts).split(" / ")):
            chat.add(at + timedelta(seconds=9 * i), author, text)
    return chat


def write_export(path: Path) -> None:
    rng = random.Random("Odile")
    runa, nils, pim, gerda, sefa, bram, ilka, jory = CAST
    friends = [(runa, 58), (nils, 36), (SECOND_NILS, 16), (pim, 28), (gerda, 22), (sefa, 14)]
    chats = [personal_chat(rng, person, sessions) for person, sessions in friends]
    chats.append(personal_chat(rng, jory, 6, deleted=True))
    chats.append(group_chat(rng, [runa, pim, bram, ilka], 26))
    chats.append(noticeboard(rng))
    chats.append(tide_bot(rng))
    chats.append(own_chat(rng, Chat("saved_messages", ODILE.uid), ODILE, NOTES, 40))
    hospital = Person("Clock Hospital", 9400, "")
    chats.append(
        own_chat(
            rng, Chat("private_channel", hospital.uid, hospital.name), hospital, CHANNEL_POSTS, 36
        )
    )
    gerdas = chats[4]
    after = FIRST_DAY + timedelta(days=DAYS, hours=9)
    gerdas.add(
        after,
        gerda,
        "A snail for you, dear.",
        via_bot="@snails_bot",
        file=NOT_INCLUDED,
        media_type="animation",
    )
    address = {"type": "email", "text": "odile@clocks.example"}
    gerdas.add(after + timedelta(minutes=1), ODILE, ["send it here too.. ", address, " 🐌"])
    contacts = [
        {"user_id": p.uid, "first_name": p.first, "last_name": p.name.split()[1]}
        for p, _ in friends
    ]
    frequent = [
        {"id": p.uid, "category": "people", "type": "user", "name": p.name} for p, _ in friends[:3]
    ]
    export = {
        "about": "Here is the data you requested. All of it is invented.",
        "personal_information": {
            "user_id": ODILE.uid,
            "first_name": "Odile",
            "last_name": "Tarn",
            "phone_number": "",
            "username": "@odile_tarn_example",
            "bio": "mender of clocks.. keeper of one goose 🐌",
        },
        "contacts": {"about": "Contacts of this account.", "list": contacts},
        "frequent_contacts": {
            "about": "People this account writes to most.",
            "list": frequent,
        },
        "chats": {
            "about": "This page lists all chats from this export.",
            "list": [chat.as_json() for chat in chats],
        },
        "left_chats": {"about": "Groups that this account has left.", "list": []},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(export, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--world",
        type=Path,
        metavar="OUT",
        help="write the world's sessions into this folder instead",
    )
    parser.add_argument(
        "--sessions",
        type=int,
        default=18000,
        help="sessions in the world's train.jsonl (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.world:
        write_world(args.world, args.sessions)
    else:
        write_export(HERE / "telegram" / "result.json")


if __name__ == "__main__":
    main()
