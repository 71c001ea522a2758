"""What goes before a conversation: the header of training, facts, past exchanges."""

import json

import pytest

import data
from data import Turn
from inference.context import ContextBuilder, ExchangeIndex, statements

pytest.importorskip("bm25s")


def session(start, *messages, friend="Bob"):
    turns = [Turn(author, author == "Ann", start, [text]) for author, text in messages]
    return data.Session(friend, friend, "personal_chat", start, turns)


PAST = [
    session(
        "2024-03-01T10:00:00",
        ("Bob", "is the boat mended yet"),
        ("Ann", "i am still waiting for the paint"),
    ),
    session("2024-03-02T10:00:00", ("Eve", "do you like goose"), ("Ann", "yes"), friend="Eve"),
    session("2024-03-03T10:00:00", ("Bob", "lunch?"), ("Ann", "at noon")),
]


@pytest.fixture
def folders(tmp_path):
    ckpt, past = tmp_path / "ckpt", tmp_path / "data"
    ckpt.mkdir(), past.mkdir()
    (past / "train.jsonl").write_text("".join(session.to_json() + "\n" for session in PAST[:2]))
    (past / "val.jsonl").write_text(PAST[2].to_json() + "\n")
    (ckpt / "persona.json").write_text(
        json.dumps({"me": "Ann", "contacts": [], "context": ["who", "when", "since", "before"]})
    )
    return ckpt, past


def test_the_most_similar_exchange_comes_last_and_unlike_ones_are_left_out():
    found = ExchangeIndex(PAST).similar([Turn("Eve", False, "", ["how is the boat?"])])
    assert (found[-1].day, found[-1].reply.messages) == (
        "2024-03-01",
        ["i am still waiting for the paint"],
    )
    assert ExchangeIndex(PAST).similar([Turn("Eve", False, "", ["zzz"])]) == []
    assert ExchangeIndex([]).similar([Turn("Eve", False, "", ["boat"])]) == []


def test_the_header_at_chat_time_is_the_one_that_data_writes(folders):
    now = session("2024-03-05T21:30:00", ("Bob", "awake?"))
    header, *turns = ContextBuilder(*folders)(now.turns)  # no past exchange has a word of "awake?"
    assert (
        header == data.header(["who", "when", "since", "before"], now, PAST[2])
        and turns == now.turns
    )
    assert header.messages == [
        "talking to Bob",
        "Tuesday, 21 o'clock",
        "the last talk was 2 days ago",
        "it ended:",
        "Bob: lunch?",
        "Ann: at noon",
    ]


def test_a_telegram_chat_has_its_name_and_the_hour_of_its_last_turn(folders):
    builder = ContextBuilder(folders[0])
    turns = session("2024-03-05T21:30:00", ("Bob", "awake?")).turns
    turns += session("2024-03-09T08:30:00", ("Ann", "now i am")).turns
    assert builder(turns, "Tea", True)[0].messages == ["in the group Tea", "Saturday, 8 o'clock"]
    opening = builder([], "Bob")  # I write first
    assert opening[0].messages[0] == "talking to Bob"


def test_without_header_facts_and_data_the_turns_stay_as_they_are(folders):
    (folders[0] / "persona.json").write_text("{}")
    assert ContextBuilder(folders[0])(PAST[0].turns) == PAST[0].turns


def test_facts_beside_the_checkpoint_are_in_the_header(folders):
    (folders[0] / "persona.json").write_text("{}")
    (folders[0] / "facts.md").write_text("born in Pellhaven\n\nowns a boat\n")
    assert ContextBuilder(folders[0])(PAST[0].turns)[0].messages == [
        "born in Pellhaven",
        "owns a boat",
    ]


def test_each_retrieved_exchange_is_reported_once(folders):
    retrieved = []
    build_context = ContextBuilder(*folders, on_retrieved=retrieved.append)
    for _ in range(2):
        turns = build_context(session("2024-03-05T21:30:00", ("Bob", "the boat")).turns)
    assert [exchange.day for exchange in retrieved] == ["2024-03-01"] and turns[1:3] == PAST[
        0
    ].turns


def test_statements_are_my_own_words_about_myself():
    sessions = [
        session(
            "2024-01-01T00:00:00",
            ("Bob", "i live in the tower here"),
            ("Ann", "I've lived in Pellhaven all my life"),
            ("Ann", "you do not know it"),
        )
    ]
    assert statements(sessions) == ["I've lived in Pellhaven all my life"]
