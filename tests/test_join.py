import collections
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exports import Chat, Message, join
from exports.join import MessageStore

CHAT = Chat("user1", "1", "personal_chat", "Bob", "ann")


def said(number, at, text="x", author="bob"):
    return Message(number, author, author.title(), at, "2024-01-01T00:00:00", text)


def joined(*exports, chat=CHAT, batch=4):
    """Each export's messages of one chat → those that come back."""
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "BATCH", batch)
        together = MessageStore(file)
        for number, messages in enumerate(exports):
            together.add(number, chat, iter(messages))
        ((_, found),) = together.chats()
        return list(found)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_messages_in_any_order_come_back_in_order_of_time(times, batch):
    found = joined([said(i, at, f"text {i}") for i, at in enumerate(times)], batch=batch)
    assert [m.at for m in found] == sorted(times)
    assert sorted(m.id for m in found) == list(range(len(times))) and all(
        m.text == f"text {m.id}" and m.at == times[m.id] for m in found
    )


def test_in_one_second_messages_stay_in_their_order():
    assert [m.id for m in joined([said(i, 7) for i in range(20)])] == list(range(20))
    found = joined(
        [said(i, at) for i, at in enumerate((10, 11, 12, 20, 5, 13, 20, 21))]
    )  # over several runs too
    assert [m.id for m in found] == [4, 0, 1, 2, 5, 3, 6, 7]


def test_the_same_chat_of_two_accounts_is_two_chats_but_for_a_supergroup():
    for kind, expected in (
        ("personal_chat", [["a"], ["b"]]),
        ("private_group", [["a"], ["b"]]),
        ("private_supergroup", [["b"]]),
    ):
        with tempfile.TemporaryFile() as file:
            together = MessageStore(file)
            together.add("one", CHAT._replace(type=kind), iter([said(1, 1, "a")]))
            together.add("two", CHAT._replace(type=kind, owner="annie"), iter([said(1, 1, "b")]))
            assert [[m.text for m in messages] for _, messages in together.chats()] == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=4), st.integers(1, 9))
def test_several_exports_of_a_chat_are_one_none_of_its_messages_twice(exports, batch):
    found = joined(
        *(
            [said(i, 10 * i, f"of export {n}") for i in sorted(ids)]
            for n, ids in enumerate(exports)
        ),
        batch=batch,
    )
    last = {i: n for n, ids in enumerate(exports) for i in ids}
    assert [(m.id, m.text) for m in found] == [
        (i, f"of export {last[i]}") for i in sorted(last)
    ]  # the latest export's wording counts


def test_one_id_of_two_authors_is_two_messages():
    """Other tools number each export on their own."""
    assert [
        m.text
        for m in joined(
            [said(1, 1, "a"), said(2, 2, "b")], [said(1, 1, "c"), said(2, 3, "d", "ann")]
        )
    ] == ["c", "b", "d"]


def test_next_months_export_continues_this_ones():
    old, new = [said(i, 60 * i) for i in range(30)], [said(i, 60 * i) for i in range(20, 50)]
    assert [m.id for m in joined(old, new)] == [m.id for m in joined(new, old)] == list(range(50))


def test_where_nothing_numbers_messages_what_they_say_and_when_tells_them_apart():
    old = [
        said(None, 60, "ok"),
        said(None, 60, "ok"),
        said(None, 60, "ok", "ann"),
        said(None, 120, "bye"),
    ]
    new = [*old, said(None, 180, "ok")]
    expected = [("bob", "ok"), ("bob", "ok"), ("ann", "ok"), ("bob", "bye"), ("bob", "ok")]
    assert [(m.author, m.text) for m in joined(old, new)] == expected
    assert [(m.author, m.text) for m in joined(new)] == expected


def test_a_chat_is_known_by_its_key_and_the_latest_name_of_chats_and_people_counts():
    with tempfile.TemporaryFile() as file:
        together = MessageStore(file, clean=str.upper)
        together.add("old", CHAT, iter([said(1, 1, "a")]))
        together.add("old", CHAT._replace(key="chat1"), iter([said(1, 1, "b")]))
        together.add(
            "new", CHAT._replace(name="Robert"), iter([said(2, 2, "c")._replace(name="Robert")])
        )
        found = [(chat.name, [m.text for m in messages]) for chat, messages in together.chats()]
    assert found == [("ROBERT", ["A", "C"]), ("BOB", ["B"])]
    assert together.names == {"bob": "ROBERT"}
    assert together.counts == {"old": collections.Counter(bob=2), "new": collections.Counter(bob=1)}
