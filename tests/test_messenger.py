"""Facebook's, Instagram's and Messenger's downloads, as these write them; all names invented."""

import datetime
import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import assert_few_are_lost

import cli
import exports
from exports import repair
from exports.join import order
from exports.messenger_files import undo_mojibake

PEOPLE = ("Ann Ärmel", "Боб", "Zoë 🦆 Quill")  # no one mutation makes one of another
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cc", "Zs"))


def mojibake(value):
    """What Facebook makes of text: each byte of its UTF-8 as a character."""
    if isinstance(value, str):
        return value.encode().decode("latin-1")
    if isinstance(value, list):
        return [mojibake(item) for item in value]
    if isinstance(value, dict):
        return {key: mojibake(item) for key, item in value.items()}
    return value


def said(sender, ms, content=None, **fields):
    content = {} if content is None else {"content": content}
    return {"sender_name": sender, "timestamp_ms": ms, **content, **fields}


def thread(messages, people=PEOPLE[:2], title=PEOPLE[1], path="inbox/bob_17"):
    return {
        "participants": [{"name": name} for name in people],
        "messages": messages,
        "title": title,
        "is_still_participant": True,
        "thread_path": path,
        "magic_words": [],
    }


def write(folder, value, number=1, indent=2, broken=True):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"message_{number}.json"
    value = mojibake(value) if broken else value
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    return path


def read(path):
    return [(chat, sorted(messages, key=order)) for chat, messages in exports.read(path)]


def result(tmp_path, **fields):
    """What becomes of one message of Ann's: its text, or why it is left out."""
    message = said(PEOPLE[0], 1_600_000_000_000, **fields)
    [(_, [message])] = read(write(tmp_path, thread([message])))
    return message.left_out or message.text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PEOPLE),
            st.integers(0, 30_000),
            st.text(CHARACTERS, min_size=1, max_size=30),
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from((None, 2)),
    st.sampled_from((1, 7, 20, 1000)),
)
def test_what_is_generated_comes_back_in_order(tmp_path_factory, lines, indent, size):
    folder, at, messages = tmp_path_factory.mktemp("inbox"), 1_600_000_000_000, []
    for sender, step, text in lines:
        at += step
        messages.append(said(sender, at, text))
    newest_first = messages[::-1]
    for number, first in enumerate(range(0, len(messages), size), 1):
        part = thread(newest_first[first : first + size], PEOPLE, "Zoo")
        write(folder / "bob_17", part, number, indent)
    [(chat, found)] = read(folder)
    assert (chat.name, chat.type) == ("Zoo", "private_group")
    assert [(m.name, m.at, m.text) for m in found] == [
        (m["sender_name"], m["timestamp_ms"] // 1000, m["content"]) for m in messages
    ]
    assert all(m.author == f"messenger:{m.name}" and not m.left_out for m in found)


def test_messages_of_one_second_and_one_millisecond_stay_in_order(tmp_path):
    times = [5000, 5000, 5001, 5999, 6000, 6000]
    messages = [said(PEOPLE[0], ms, f"text {i}") for i, ms in enumerate(times)][::-1]
    [(_, found)] = read(write(tmp_path, thread(messages)))
    assert [m.text for m in found] == [f"text {i}" for i in range(6)]
    assert len({m.id for m in found}) == 6
    write(tmp_path / "split", thread(messages[:3]), 1)
    write(tmp_path / "split", thread(messages[3:]), 2)
    [(_, found)] = read(tmp_path / "split")
    assert [m.text for m in found] == [f"text {i}" for i in range(6)]


def test_a_chat_of_several_files_is_read_in_order_of_time_so_that_little_is_in_memory(tmp_path):
    for number in range(1, 13):
        some = [said(PEOPLE[0], 10**9 - 10**6 * number - 1000 * i, "x") for i in range(9)]
        write(tmp_path, thread(some), number)
    [(_, messages)] = exports.read(tmp_path)
    times = [message.at for message in messages]
    assert len(times) == 108 and times == sorted(times, reverse=True)


def test_mended_text_and_text_in_latin_letters_are_left_alone(tmp_path):
    for text in ("café 🦆", "naïve", "Ünïcode", "привет", "Ã alone"):
        assert undo_mojibake(mojibake(text)) == text == undo_mojibake(text)
    [(chat, [message])] = read(write(tmp_path, thread([said(PEOPLE[0], 1, "é 🦆")]), broken=False))
    assert (chat.name, message.name, message.text) == (PEOPLE[1], PEOPLE[0], "é 🦆")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content": " hi "}, "hi"),
        ({"photos": [{"uri": "photos/1.jpg"}]}, "<photo>"),
        ({"videos": [{"uri": "a.mp4"}], "content": "look"}, "look"),
        ({"audio_files": [{"uri": "a.aac"}]}, "<voice>"),
        ({"gifs": [{"uri": "a.gif"}]}, "<gif>"),
        ({"sticker": {"uri": "a.png", "ai_stickers": []}}, "<sticker>"),
        ({"files": [{"uri": "a.pdf"}]}, "<file>"),
        ({"content": "Ann Ärmel sent a location.", "share": {"link": "https://www.bing.com/maps/default.aspx?x"}}, "<location>"),
        ({"content": "https://example.org", "share": {"link": "https://example.org"}}, "https://example.org"),
        ({"content": "Ann Ärmel sent an attachment.", "share": {"link": "https://example.org"}}, "forwards"),
        ({"content": "You sent an attachment.", "share": {"link": "https://example.org"}}, "forwards"),
        ({"share": {"share_text": "somebody's caption"}}, "forwards"),
        ({"content": "Ann Ärmel hat die Gruppe „Zoo“ genannt."}, "service messages"),
        ({"content": "Reacted 😂 to your message "}, "service messages"),
        ({"content": "Liked a message"}, "service messages"),
        ({"content": "You changed the group photo."}, "service messages"),
        ({"content": "You left the group?"}, "You left the group?"),
        ({"content": "You changed the lock."}, "You changed the lock."),
        ({"content": "The video call ended.", "call_duration": 12}, "service messages"),
        ({"content": "x", "type": "Subscribe", "users": []}, "service messages"),
        ({"is_unsent": True}, "deleted messages"),
        ({"content": "oops", "is_unsent": True}, "deleted messages"),
        ({"is_taken_down": True}, "deleted messages"),
        ({}, "messages without text"),
        ({"content": "ok", "is_unsent": False, "type": "Generic", "reactions": [{"reaction": "👍", "actor": "Боб"}]}, "ok"),
    ],
)  # fmt: skip
def test_media_becomes_a_mark_and_events_a_reason(tmp_path, fields, expected):
    assert result(tmp_path, **fields) == expected


def test_secure_storage_has_other_keys_and_joins_nothing(tmp_path):
    def message(sender, at, text="", kind="text", **fields):
        return {
            "isUnsent": False,
            "media": [],
            "reactions": [],
            "senderName": sender,
            "text": text,
            "timestamp": at,
            "type": kind,
        } | fields

    ms = 1_700_000_000_000
    messages = [
        message("Bob", ms + 4000, "https://example.org", "link"),
        message("Bob", ms + 3000, "This message was deleted", "placeholder"),
        message("Ann", ms + 2000, kind="media", media=[{"uri": "./media/1.jpeg"}]),
        message("Ann", ms + 1000, "gone", isUnsent=True),
        message("Ann", ms, "hé"),
    ]
    value = {"participants": ["Bob", "Ann"], "threadName": "Bob_12", "messages": messages}
    (tmp_path / "messages").mkdir()
    path = tmp_path / "messages/Bob_12.json"
    path.write_text(json.dumps(value))
    [(chat, found)] = read(tmp_path)
    assert (chat.name, chat.type, chat.owner) == ("Bob", "personal_chat", "messenger:Ann")
    assert [(m.name, m.left_out or m.text) for m in found] == [
        ("Ann", "hé"),
        ("Ann", "deleted messages"),
        ("Ann", "<photo>"),
        ("Bob", "deleted messages"),
        ("Bob", "https://example.org"),
    ]
    assert found[0].at == 1_700_000_000


def owners(path):
    return {chat.name: chat.owner for chat, _ in exports.read(path)}


def test_the_owner_is_the_one_whose_name_the_chat_of_two_does_not_have(tmp_path):
    assert owners(write(tmp_path, thread([]))) == {PEOPLE[1]: f"messenger:{PEOPLE[0]}"}
    group = write(tmp_path / "group", thread([], PEOPLE, "Zoo"))
    assert owners(group) == {"Zoo": None}


def test_the_owner_is_the_only_one_in_all_chats_of_two(tmp_path):
    inbox = tmp_path / "your_facebook_activity/messages/inbox"
    for number, other in enumerate(("Bob", "Eve", "Sam")):
        write(inbox / f"x_{number}", thread([], (other, "Ann"), "a nickname", f"inbox/x_{number}"))
    write(inbox / "group", thread([], ("Bob", "Eve", "Sam"), "Zoo", "inbox/group"))
    assert owners(tmp_path) == {"a nickname": "messenger:Ann", "Zoo": "messenger:Ann"}


@pytest.mark.parametrize("app", ["facebook", "instagram"])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_profile_says_whose_export_it_is(tmp_path, app, zipped):
    root = tmp_path / "export"
    if app == "facebook":
        name, folder = "profile_information/profile_information.json", "your_facebook_activity"
        value = {"profile_v2": {"name": {"full_name": PEOPLE[0]}, "family": [{"name": PEOPLE[1]}]}}
    else:
        name, folder = "personal_information/personal_information.json", "your_instagram_activity"
        fields = {"Nombre": {"value": PEOPLE[0]}, "Usuario": {"value": "ann_99"}}
        value = {"profile_user": [{"string_map_data": fields}]}
    profile = root / "personal_information" / name
    profile.parent.mkdir(parents=True)
    profile.write_text(json.dumps(mojibake(value)))
    write(root / folder / "messages/inbox/zoo_1", thread([], PEOPLE, "Zoo", "inbox/zoo_1"))
    if zipped:
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
            for path in root.rglob("*.json"):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "export.zip"
    assert owners(root) == {"Zoo": f"messenger:{PEOPLE[0]}"}


def test_an_archived_chat_is_the_same_one_and_two_of_one_name_are_not(tmp_path):
    messages = [said("Bob", 1000, "hi")]
    paths = ("inbox/bob_17", "archived_threads/bob_17", "e2ee_cutover/bob_18")
    keys = []
    for number, path in enumerate(paths):
        value = thread(messages, ("Bob", "Ann"), "Bob", path)
        [(chat, _)] = read(write(tmp_path / str(number), value))
        keys.append(chat.key)
        assert "bob" not in chat.id
    assert keys[0] == keys[1] != keys[2]


def test_old_exports_have_seconds_and_deleted_people_no_name(tmp_path):
    old = {"sender_name": "Ann", "timestamp": 1_500_000_000, "content": "hi", "type": "Generic"}
    messages = [old, said("", 1_600_000_000_000, "who?"), said("Ann", "soon", "x")]
    [(_, found)] = read(write(tmp_path, thread(messages)))
    assert [(m.at, m.author, m.left_out or m.text) for m in found] == [
        (1_500_000_000, "messenger:Ann", "hi"),
        (1_600_000_000, "messenger:Ann", "messages without author or date"),
        (1_600_000_000, None, "messages without author or date"),
    ]
    assert found[0].date == datetime.datetime.fromtimestamp(1_500_000_000).isoformat()


def test_odd_values_are_no_traceback(tmp_path):
    odd = (None, True, -1, 1e99, 10**30, [], {}, "x", [None], [[1]], {"a": "\ud800"}, "\ud800")
    fields = ("sender_name", "timestamp_ms", "content", "photos", "share", "media", "type", "text")
    for value in odd:
        for field in fields:
            message = said("Ann", 1_600_000_000_000, "x") | {field: value}
            one = thread([message, said("Ann", 1, "whole")])
            texts = [m.text for m in read(write(tmp_path, one, broken=False))[0][1]]
            assert "whole" in texts
        for field in ("participants", "title", "thread_path"):
            path = write(tmp_path, thread([said("Ann", 1, "x")]) | {field: value}, broken=False)
            try:
                read(path)
            except cli.UserError:
                assert field == "participants"


@pytest.mark.parametrize("damaged", [False, True])
def test_large_files_give_the_same_messages_as_small_ones(tmp_path, monkeypatch, damaged):
    messages = [said(PEOPLE[i % 2], 10**12 - 400 * i, f"é {i} 🦆") for i in range(300)]
    path = write(tmp_path, thread(messages))
    if damaged:  # the border of two messages is lost, so one has its keys twice
        before, messages_of, after = path.read_text().partition('"messages"')
        path.write_text(before + messages_of + after.replace("\n    },\n    {", ",", 1))
    small = read(path)
    monkeypatch.setattr(repair, "WHOLE", 0)
    assert read(path) == small and len(small[0][1]) == 300 - damaged
    assert sum(bool(m.left_out) for m in small[0][1]) == damaged


AUTHORS = ("ann_1111", "bob_2222", "cid_3333")


def healthy(rng):
    """A chat whose messages say who wrote them, in either shape."""
    at, messages = 1_600_000_000_000, []
    for i in range(rng.randint(0, 40)):
        at -= rng.choice((5, 900, 60_000))
        who = rng.choice(AUTHORS)
        text = f"[{who}] " + rng.choice((f"says {i}", f'\\ " \u20ac\n \U0001f986 {i}'))
        extra = rng.choice(({}, {"photos": [{"uri": "p/1.jpg"}]}, {"reactions": [{"actor": "x"}]}))
        messages.append(said(who, at, *rng.choice(((text,), (text,), ())), **extra))
    value = mojibake(thread(messages, AUTHORS, "Zoo"))
    if rng.random() < 0.3:
        names = {"sender_name": "senderName", "timestamp_ms": "timestamp", "content": "text"}
        messages = [{names.get(k, k): v for k, v in m.items()} for m in messages]
        value = {"participants": AUTHORS, "threadName": "Zoo_3", "messages": messages}
    return json.dumps(value, indent=rng.choice((None, 2)))


def test_mutated_files_have_no_traceback_no_hang_and_no_wrong_author(tmp_path):
    path = tmp_path / "message_1.json"
    count = r"\[\w{3}_\d{4}\] "
    assert_few_are_lost(path, healthy, AUTHORS, "messenger", r"\[(\w+)\] ", count, 0.8)
