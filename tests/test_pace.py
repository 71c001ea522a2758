"""Timing: what data.py measures of an invented person comes back when the clone draws from it."""

import asyncio
import collections
import itertools
import json
import math

import numpy as np
import pytest
from conftest import command

import chat
import cli
from cli import UserError
from data import Turn
from exports import Chat, Message, iso_time
from exports.timing import TimingStats
from inference import pace as pace_module
from inference import server
from inference.pace import DEFAULT, GROUPS, Pace, Pacer, Schedule, hold_back, timing_table

HOUR = 3600
SHARES = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
# Seconds: the median of my delay, and the deviation of its logarithm
CONTACTS = {"Bob": (20.0, 1.2), "Cleo": (300.0, 0.8), "Dan": (6.0, 0.5)}
SAME = np.ones(24)
BY_HOUR = np.where((np.arange(24) > 0) & (np.arange(24) < 8), 4.0, 1.0)  # slow at night
PAUSE, SPEED, SPREAD = 2.0, 4.0, 0.6

FIXED = {  # no randomness: ten seconds, then a second a message and one each ten characters
    "everyone": {"delay": {"50%": 10}, "unanswered": 1},
    "typing": {"pause": 1, "characters_per_second": 10, "spread": {"50%": 1}},
}


class Person:
    """Ann, who answers with lognormal delays and types further messages at a speed.

    What she does is kept by contact, unrounded: `delays`, `hours`, `gaps`, `lengths`.
    """

    def __init__(self, seed=0, by_hour=SAME, unit=1):
        self.draw = np.random.default_rng(seed)
        self.by_hour, self.unit = by_hour, unit
        self.delays = collections.defaultdict(list)
        self.hours = collections.defaultdict(list)
        self.gaps, self.lengths = [], []
        self.openings, self.unanswered = collections.Counter(), collections.Counter()

    def message(self, author, at, length=5):
        at = int(at) // self.unit * self.unit
        return Message(None, author, author, at, iso_time(at), "x" * length)

    def chat(self, name, median, sigma, turns, unanswered=0.0, opens=0.0):
        """Yield the messages of a chat in which the contact writes `turns` times."""
        at = 1_600_000_000 + self.draw.random()
        for _ in range(turns):
            at += 7 * HOUR + HOUR * self.draw.random()
            if self.draw.random() < opens:
                self.openings[name] += 1
                yield self.message("ann", at)
                at += 30
            for _ in range(self.draw.integers(1, 3)):
                at += 20 * self.draw.random()
                yield self.message(name, at)
            hour = int(iso_time(int(at))[11:13])
            if self.draw.random() < unanswered:
                self.unanswered[name] += 1
                at += 15 * HOUR  # what I write sooner would be an answer
                continue
            delay = self.by_hour[hour] * self.draw.lognormal(math.log(median), sigma)
            delay = min(delay, 6 * HOUR)
            self.delays[name].append(delay)
            self.hours[name].append(hour)
            at += delay
            yield self.message("ann", at)
            for _ in range(self.draw.integers(0, 3)):
                length = int(self.draw.integers(1, 80))
                gap = (PAUSE + length / SPEED) * self.draw.lognormal(0, SPREAD)
                self.gaps.append(gap)
                self.lengths.append(length)
                at += gap
                yield self.message("ann", at, length)
        yield self.message(name, at + 20 * HOUR)

    def measure(self, contacts=CONTACTS, turns=2500, **habits):
        """Return "timing" as it stands in persona.json."""
        stats = TimingStats(["ann"], gap=600)
        for name, numbers in contacts.items():
            watch(stats, name, self.chat(name, *numbers, turns, **habits))
        return read_back(stats, contacts)


def watch(stats, name, messages, kind="personal_chat"):
    chat = Chat(name, name, kind, name, None)
    collections.deque(stats.watch(chat, messages), maxlen=0)


def read_back(stats, contacts):
    return json.loads(json.dumps(stats.report({name: name for name in contacts})))


def kolmogorov(a, b):
    """Return the largest distance of two samples' distributions."""
    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    shares = [np.searchsorted(side, both, "right") / len(side) for side in (a, b)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.fixture(scope="module")
def ann():
    person = Person()
    return person, person.measure()


# --- what is measured


def test_delay_quantiles_of_each_contact_come_back_within_5_percent(ann):
    person, timing = ann
    samples = dict(person.delays)
    measured = {name: timing["contacts"][name]["delay"] for name in CONTACTS}
    samples["everyone"] = np.concatenate([*person.delays.values()])
    measured["everyone"] = timing["everyone"]["delay"]
    for name, sample in samples.items():
        true = np.quantile(sample, SHARES)[1:-1]
        # Messengers give whole seconds: half of one is lost
        assert [*measured[name].values()][1:-1] == pytest.approx(true, rel=0.05, abs=0.5), name
    assert timing["delay_by_hour"] == [1] * 24


def test_typing_speed_and_its_spread_come_back_within_5_percent(ann):
    typing = ann[1]["typing"]
    assert typing["characters_per_second"] == pytest.approx(SPEED, rel=0.05)
    assert typing["pause"] == pytest.approx(PAUSE, abs=0.5)
    normal = [-1.2816, -0.6745, 0, 0.6745, 1.2816]  # of 10, 25, 50, 75 and 90%
    measured = [*typing["spread"].values()][2:-2]
    assert measured == pytest.approx(np.exp(SPREAD * np.array(normal)), rel=0.05)


def test_unanswered_turns_and_openings_come_back_within_5_percent():
    person = Person(seed=3)
    timing = person.measure({"Bob": (20.0, 1.0)}, 2500, unanswered=0.2, opens=0.3)
    bob = timing["contacts"]["Bob"]
    answered = len(person.delays["Bob"])
    unanswered = person.unanswered["Bob"]
    assert bob["unanswered"] == pytest.approx(unanswered / (unanswered + answered), rel=0.05)
    days = (unanswered * 22.5 + answered * 7.5) / 24
    assert bob["openings_per_day"] == pytest.approx(person.openings["Bob"] / days, rel=0.05)
    assert sum(timing["opening_hours"]) == person.openings["Bob"]


def test_turn_lengths_come_back():
    stats, person = TimingStats(["ann"], gap=600), Person()
    at, messages = 0, []
    for length in [1] * 50 + [2] * 30 + [5] * 20:
        messages.append(person.message("Bob", at))
        messages += [person.message("ann", at + 20 * (i + 1)) for i in range(length)]
        at += 5000
    watch(stats, "Bob", messages)
    turns = read_back(stats, ["Bob"])["messages_per_turn"]
    assert [turns[share] for share in ("25%", "50%", "75%", "90%")] == [1, 1, 2, 5]


def test_times_to_the_minute_tell_delays_but_no_typing_speed():
    person = Person(seed=4, unit=60)
    timing = person.measure({"Bob": (300.0, 0.8)}, 2500)
    true = np.quantile(person.delays["Bob"], SHARES)[2:-2]
    measured = [*timing["contacts"]["Bob"]["delay"].values()][2:-2]
    assert measured == pytest.approx(true, rel=0.05, abs=30)
    assert timing["typing"] is None
    assert Pace(timing).characters_per_second == DEFAULT["typing"]["characters_per_second"]


@pytest.mark.parametrize("at", [1_600_000_007, 1_599_999_960])  # the latter: a whole minute
def test_messages_imported_at_one_second_are_no_answers(at):
    stats, person = TimingStats(["ann"], gap=600), Person()
    watch(stats, "Bob", [person.message(("Bob", "ann")[i % 2], at) for i in range(1000)])
    timing = read_back(stats, ["Bob"])
    assert timing["contacts"] == {} and timing["everyone"]["delay"] is None
    assert timing["typing"] is None


def test_who_types_very_slowly_has_a_timing_that_is_accepted():
    stats, person = TimingStats(["ann"], gap=600), Person()
    at, messages = 0, []
    for length in [1, 2, 3, 4, 5, 6, 7, 8, 0] * 10:  # a minute each character
        at += 60 * length + 7
        messages.append(person.message("ann", at, length))
    watch(stats, "Bob", messages)
    timing = read_back(stats, ["Bob"])
    assert Pace(timing).characters_per_second == timing["typing"]["characters_per_second"] == 0.1


def test_where_nobody_answers_all_is_null_and_defaults_count():
    stats, person = TimingStats(["ann"], gap=600), Person()
    watch(stats, "Bob", [person.message("Bob", 9000 * i) for i in range(100)])
    watch(stats, "Notes", [person.message("ann", 9000 * i) for i in range(100)])
    watch(stats, "Empty", [])
    timing = read_back(stats, ["Bob"])
    everyone = timing["everyone"]
    assert everyone == {"delay": None, "unanswered": 1, "openings_per_day": None}
    assert timing["contacts"] == {} and timing["delay_by_hour"] is None
    pace = Pace(timing)
    assert pace.ignores("Bob", np.random.default_rng(0))
    assert pace.habit("Bob", "delay").at(0.5) == pytest.approx(30)


def test_groups_count_each_author_and_are_no_contacts():
    stats, person = TimingStats(["ann"], gap=600), Person()
    authors = ["Bob", "Cleo", "Dan", "ann"] * 100
    messages = [person.message(author, 100 * i) for i, author in enumerate(authors)]
    watch(stats, "Friends", messages, "private_group")
    timing = read_back(stats, ["Bob", "Cleo", "Dan"])
    assert timing["contacts"] == {} and timing["everyone"]["delay"] is None
    assert timing["groups"]["unanswered"] == pytest.approx(2 / 3, abs=0.01)
    pace = Pace(timing, longest_wait=1000)
    assert pace.delay(GROUPS, 12, np.random.default_rng(0)) == pytest.approx(100, abs=1)


def test_memory_of_a_chat_is_bounded():
    stats, person = TimingStats(["ann"], gap=600), Person()
    authors = itertools.cycle(["Bob", "ann", "ann"])
    watch(stats, "Bob", (person.message(next(authors), 37 * i) for i in range(80_000)))
    sizes = [len(sample.numbers) for sample in (stats.contacts["Bob"].delays, stats.gaps)]
    assert sizes == [2 * 4096, 2 * 20480]
    assert stats.contacts["Bob"].delays.seen > 26_000


# --- data.py


def write_telegram(path, chats):
    """Write chats, {name: messages}, as Telegram exports them; returns the path."""
    listed = []
    for number, (name, messages) in enumerate(chats.items(), 2):
        ids = {"ann": "user1", name: f"user{number}"}
        lines = []
        for message in messages:
            author = "Ann" if message.author == "ann" else message.author
            fields = {"from": author, "from_id": ids[message.author], "text": message.text}
            stamps = {"date": message.date, "date_unixtime": str(message.at)}
            lines.append({"id": message.id, "type": "message", **stamps, **fields})
        chat = {"name": name, "type": "personal_chat", "id": number, "messages": lines}
        listed.append(chat)
    value = {"personal_information": {"user_id": 1}, "chats": {"list": listed}}
    path.write_text(json.dumps(value))
    return path


def run_data(out, *arguments):
    done = command("data.py", *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "persona.json").read_text())["timing"]


def test_data_writes_timing_joins_exports_and_forgets_a_person(tmp_path):
    person = Person()
    chats = {}
    for name in ("Bob", "Cleo"):
        messages = enumerate(person.chat(name, *CONTACTS[name], 100))
        chats[name] = [message._replace(id=number) for number, message in messages]
    whole = write_telegram(tmp_path / "whole.json", chats)
    timing = run_data(tmp_path / "data", whole)
    for name in chats:
        median = timing["contacts"][name]["delay"]["50%"]
        assert median == pytest.approx(np.median(person.delays[name]), rel=0.15)
    # Each distribution is one line, to be edited
    lines = (tmp_path / "data" / "persona.json").read_text().splitlines()
    assert len(lines) < 50 and sum('"50%"' in line for line in lines) == 5

    # Two exports that overlap tell the same as one
    parts = []
    for i, part in enumerate((slice(0, 300), slice(200, None))):
        some = {name: messages[part] for name, messages in chats.items()}
        parts.append(write_telegram(tmp_path / f"part{i}.json", some))
    assert run_data(tmp_path / "joined", *parts) == timing

    done = command("data.py", "--out", tmp_path / "data", "--forget", "Cleo")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "data" / "persona.json").read_text()
    assert "Cleo" not in text and [*json.loads(text)["timing"]["contacts"]] == ["Bob"]


# --- what is drawn


def test_paced_clone_is_within_a_kolmogorov_distance_of_a_tenth():
    person = Person(seed=1, by_hour=BY_HOUR)
    pace = Pace(person.measure(), longest_wait=math.inf)
    draw = np.random.default_rng(2)
    drawn = {
        name: [pace.delay(name, hour, draw) for hour in person.hours[name]] for name in CONTACTS
    }
    for name in CONTACTS:
        night = BY_HOUR[person.hours[name]] > 1
        for hours in (night, ~night, night | ~night):
            mine, clone = np.array(person.delays[name])[hours], np.array(drawn[name])[hours]
            assert kolmogorov(mine, clone) < 0.1, (name, night.mean())
    assert kolmogorov(drawn["Bob"], person.delays["Cleo"]) > 0.5  # contacts differ
    gaps = [pace.gap("x" * length, draw) for length in person.lengths]
    assert kolmogorov(person.gaps, gaps) < 0.1


def test_waits_are_capped_and_repeatable(ann):
    pace = Pace(ann[1], longest_wait=5)
    draws = [np.random.default_rng(0) for _ in range(2)]
    waits = [[pace.delay("Cleo", 12, draw) for _ in range(100)] for draw in draws]
    assert waits[0] == waits[1] and max(waits[0]) == 5
    assert max(pace.gap("x" * 500, draws[0]) for _ in range(10)) == 5


def test_stranger_gets_everyones_habits_and_missing_timing_the_default(ann, tmp_path):
    pace = Pace(ann[1])
    assert pace.everyone["unanswered"] == 0 and ann[1]["groups"]["unanswered"] is None
    assert pace.habit(GROUPS, "unanswered") == DEFAULT["groups"]["unanswered"]  # not everyone's
    assert pace.habit("Zed", "delay") is pace.habit("", "delay") is pace.everyone["delay"]
    assert pace.measured
    (tmp_path / "persona.json").write_text('{"me": "Ann"}')
    for folder in (tmp_path, tmp_path / "none"):
        pace = Pace.load(folder)
        assert not pace.measured and pace.longest_wait == 30
        assert pace.habit("Bob", "delay").at(0.5) == pytest.approx(30)
        assert pace.opening_hours.sum() == pytest.approx(1)


# --- persona.json, edited by hand


def test_edited_persona_counts(tmp_path):
    timing = {
        "contacts": {"Bob": {"delay": {"90%": 4, "50%": 2}, "unanswered": 1}},
        "delay_by_hour": [1] * 12 + [2] * 12,
        "typing": {"characters_per_second": 10, "pause": 0, "spread": {"50%": 1}},
    }
    cli.write_json(tmp_path / "persona.json", {"me": "Ann", "timing": timing})
    pace, draw = Pace.load(tmp_path), np.random.default_rng(0)
    delays = np.array([pace.delay("Bob", 0, draw) for _ in range(1000)])
    assert 0.45 < (delays < 2.001).mean() < 0.55 and delays.max() == pytest.approx(4)
    assert max(pace.delay("Bob", 23, draw) for _ in range(99)) == pytest.approx(8)
    assert pace.gap("x" * 30, draw) == 3 and pace.ignores("Bob", draw)


@pytest.mark.parametrize(
    "edit, place",
    [
        (3, "timing must be"),
        ({"dealy": 3}, "timing must be an object of everyone, "),
        ({"contacts": []}, "timing.contacts must be an object"),
        ({"contacts": {"Bob": {"delay": 3}}}, "timing.contacts.Bob.delay must be"),
        ({"everyone": {"delay": {}}}, "timing.everyone.delay must be quantiles such as"),
        ({"everyone": {"delay": {"50%": 3, "90%": 2}}}, "must be quantiles that rise"),
        ({"everyone": {"delay": {"150%": 3}}}, "from 0% to 100%, got '150%'"),
        ({"everyone": {"delay": {"half": 3}}}, "got 'half'"),
        ({"everyone": {"delay": {"50%": -1}}}, "timing.everyone.delay.50% must be a number"),
        ({"everyone": {"unanswered": 10}}, "timing.everyone.unanswered must be a number from 0"),
        ({"delay_by_hour": [1] * 23}, "timing.delay_by_hour must be a list of 24 numbers"),
        ({"opening_hours": [1] * 23 + ["x"]}, "timing.opening_hours[23] must be a number"),
        ({"typing": {"characters_per_second": 0}}, "characters_per_second must be a number"),
        ({"typing": {"pause": float("nan")}}, "timing.typing.pause must be a number"),
    ],
)
def test_bad_edit_is_named_in_one_line(tmp_path, edit, place):
    cli.write_json(tmp_path / "persona.json", {"me": "Ann", "timing": edit})
    with pytest.raises(UserError) as error:
        Pace.load(tmp_path)
    problem, hint = str(error.value).splitlines()
    assert problem.startswith(f"{tmp_path}/persona.json: timing") and place in problem
    assert len(problem) < 300 and "docs/CHAT.md" in hint


# --- the report card


def test_table_has_my_timing_beside_the_clones(tmp_path):
    folders = {}
    for name, timing in (
        ("mine", FIXED),
        ("clone", {"everyone": {"delay": {"50%": 99}}}),
        ("other", None),
    ):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        cli.write_json(folders[name] / "persona.json", {"me": "Ann", "timing": timing})
    prompts = [Turn("Bob", False, f"2024-01-01T{hour:02}:00:00", ["hi"]) for hour in range(24)]
    replies = {"mine": [["hm", "x" * 20]] * 24, "clone": [["ok"]] * 24, "other": [[]] * 24}
    table = timing_table(folders, replies, prompts, seed=0)
    assert table.keys() == {"mine", "clone"}  # the other has none
    mine, clone = table["mine"], table["clone"]
    assert mine["delay"]["50%"] == pytest.approx(10) and mine["gap"]["90%"] == pytest.approx(3)
    assert clone["delay"]["90%"] == pytest.approx(99) and clone["gap"] is None
    assert (mine["messages"]["mean"], clone["messages"]["mean"]) == (2, 1)


# --- the terminal and the server


class Clock:
    """time, in which sleeping takes no time."""

    def __init__(self):
        self.now, self.naps = 100.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    monkeypatch.setattr(server, "time", clock)
    return clock


def growing(clock, seconds=0.5):
    """An answer of three messages, as the model writes it: a piece each half second."""
    for messages in (["y"], ["yes"], ["yes", "I"], ["yes", "I am"], ["yes", "I am", "x" * 90]):
        clock.now += seconds
        yield messages


def test_messages_are_shown_whole_and_when_due_with_typing_before(clock):
    schedule = Schedule(Pace(FIXED), "Bob", np.random.default_rng(0))
    events = []
    show_typing = lambda: events.append((clock.now - 100, "typing"))  # noqa: E731
    for messages in hold_back(growing(clock), schedule, show_typing):
        events.append((clock.now - 100, messages[-1]))
    expected = [
        (8.7, "typing"),
        (10, "yes"),
        (11, "typing"),  # the model had to go on
        (11.4, "I am"),
        (11.4, "typing"),
        (21.4, "x" * 90),
    ]
    assert [what for _, what in events] == [what for _, what in expected]
    assert [at for at, _ in events] == pytest.approx([at for at, _ in expected])


def test_slow_model_delays_a_message_but_adds_no_wait(clock):
    schedule = Schedule(Pace(FIXED), "Bob", np.random.default_rng(0))
    shown = [clock.now - 100 for _ in hold_back(growing(clock, 20), schedule, lambda: None)]
    assert shown == pytest.approx([60, 100, 110])


def test_terminal_shows_typing_between_messages_and_read_where_it_ignores(
    clock, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    pacer = Pacer(Pace(FIXED), human=True, may_ignore=True)
    conversation = chat.TerminalChat(
        "Ann", "Bob", lambda *_: growing(clock), temperature=1, pacer=pacer
    )
    conversation.add(chat.make_turn("Bob", "hi"))
    conversation.add(chat.make_turn("Bob", "there?"))
    assert [turn.messages for turn in conversation.turns] == [["hi", "there?"]]
    conversation.reply()
    typing, clear = "Ann is typing…", "\r\033[K"
    assert capsys.readouterr().out == (
        f"\r{typing}{clear}Ann: yes\n{typing}{clear}     I am\n{typing}{clear}     {'x' * 90}\n"
    )
    assert conversation.turns[-1].messages == ["yes", "I am", "x" * 90]

    lines = iter(["are you there?"])
    monkeypatch.setattr(
        "builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError)
    )
    conversation.run()
    assert "(read)" in capsys.readouterr().out and clock.now < 130


def test_fast_pace_is_the_default_and_waits_for_nothing(clock, capsys):
    pacer = Pacer.load("none", chat.Options())
    assert pacer.pace is None and pacer.schedule("Bob") is None and not pacer.ignores("Bob")
    conversation = chat.TerminalChat("Ann", "Bob", lambda *_: growing(clock, 0), pacer=pacer)
    conversation.reply()
    assert clock.now == 100 and capsys.readouterr().out.startswith("Ann: yes\n")


def test_server_sends_lines_when_due_and_comments_while_it_waits(clock, monkeypatch):
    async def sleep(seconds):
        clock.now += seconds

    async def pieces():
        for piece in ("y", "es\nI", " am", "\n", "x" * 90):
            yield piece

    async def collect():
        schedule = Schedule(Pace(FIXED, longest_wait=20), "Bob", np.random.default_rng(0))
        return [
            (clock.now - 100, getattr(piece, "text", piece))
            async for piece in server.hold_back(pieces(), schedule)
        ]

    monkeypatch.setattr(server.asyncio, "sleep", sleep)
    monkeypatch.setattr(server, "IDLE_SECONDS", 5)
    events = asyncio.run(collect())
    expected = [
        (0, "read"),
        (5, "waiting"),
        (8.7, "typing"),
        (10, "yes"),
        (10, "typing"),
        (11.4, "\nI am"),
        (11.4, "typing"),
        (16.4, "waiting"),
        (21.4, "\n" + "x" * 90),
    ]
    assert [what for _, what in events] == [what for _, what in expected]
    assert [at for at, _ in events] == pytest.approx([at for at, _ in expected])
