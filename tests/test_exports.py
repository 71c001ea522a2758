import json

import pytest

import exports
from exports import telegram


def write(tmp_path, value, **dump):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(value, **{"ensure_ascii": False, "indent": 1} | dump), encoding="utf-8")
    return path


def read(path):
    return [(chat, list(messages)) for chat, messages in exports.read(path)]


def full(*chats, left=()):
    return {
        "about": "x",
        "personal_information": {"user_id": 1},
        "contacts": {"list": [{"a": [1, {}]}]},
        "chats": {"about": "", "list": list(chats)},
        "left_chats": {"list": list(left)},
    }


def chat(*messages, **fields):
    return {
        "name": "Bob",
        "type": "personal_chat",
        "id": 2,
        "messages": [
            {"id": i, "type": "message", "date": "2020-01-01T00:00:00", "from": "Bob", "from_id": "user2", **m}
            for i, m in enumerate(messages)
        ],
    } | fields


def text_of(tmp_path, **message):
    ((_, (only,)),) = read(write(tmp_path, full(chat(message))))
    return only.left_out or only.text


def test_every_chat_is_read_with_its_owner_left_ones_too(tmp_path):
    found = read(write(tmp_path, full(chat({"text": "a"}), chat(name=None, id=3), left=[chat({"text": "b"}, type="private_group", id=-4)])))
    assert [(c.id, c.type, c.name, c.owner, len(m)) for c, m in found] == [
        ("2", "personal_chat", "Bob", "user1", 1),
        ("3", "personal_chat", "Deleted Account", "user1", 0),
        ("-4", "private_group", "Bob", "user1", 1),
    ]


def test_a_single_chat_is_an_export_without_an_owner(tmp_path):
    ((only, messages),) = read(write(tmp_path, chat({"text": "a"})))
    assert (only.name, only.owner, len(messages)) == ("Bob", None, 1)


@pytest.mark.parametrize("indent", [None, 0, 1, 4])
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_layout_and_reading_size_change_nothing(tmp_path, indent, piece, monkeypatch):
    monkeypatch.setattr(telegram, "PIECE", piece)
    value = full(chat({"text": 'ö\u2028"\\ 🦆 }]'}, {"text": "b" * 50}), chat(id=12345))
    found = read(write(tmp_path, value, indent=indent, ensure_ascii=indent == 4))
    assert [m.text for _, messages in found for m in messages] == ['ö\u2028"\\ 🦆 }]', "b" * 50]


def test_chats_left_unread_are_skipped(tmp_path):
    path = write(tmp_path, full(chat({"text": "a"}, {"text": "b"}), chat({"text": "c"}, name="Eve")))
    assert [c.name for c, _ in exports.read(path)] == ["Bob", "Eve"]


def test_text_is_a_string_or_a_list_of_any_entities(tmp_path):
    assert text_of(tmp_path, text=["see ", {"type": "link", "text": "x.org"}, {"type": "of_tomorrow", "text": "!"}, " "]) == "see x.org!"
    assert text_of(tmp_path, text="  two\nlines ") == "two\nlines"


@pytest.mark.parametrize(("fields", "shown"), [
    ({"media_type": "sticker", "sticker_emoji": "😀"}, "😀"),
    ({"media_type": "voice_message"}, "<voice>"),
    ({"photo": "photos/1.jpg"}, "<photo>"),
    ({"photo": "(File not included.)", "text": "the sea"}, "the sea"),
    ({"file": "a.zip"}, "<file>"),
    ({"location_information": None}, "<location>"),
    ({"forwarded_from": None, "text": "a"}, "forwards"),
    ({"forwarded_from": "Eve", "text": "a"}, "forwards"),
    ({"via_bot": "@gif", "text": "a"}, "written via a bot"),
    ({"type": "service", "action": "phone_call"}, "service messages"),
    ({"from": None, "text": "a"}, "a"),
    ({"text": ""}, "messages without text"),
])  # fmt: skip
def test_what_stands_for_a_message(tmp_path, fields, shown):
    assert text_of(tmp_path, **{"text": "", **fields}) == shown


def test_unsupported_messages_have_nothing_but_a_type(tmp_path):
    value = full(chat())
    value["chats"]["list"][0]["messages"] = [{"id": 1, "type": "unsupported"}]
    ((_, (only,)),) = read(write(tmp_path, value))
    assert only.left_out == "messages of an unsupported kind"


def test_people_are_known_by_id_old_bare_numbers_too_and_time_is_unix_time(tmp_path):
    ((_, (old, new)),) = read(write(tmp_path, full(chat({"from_id": 2, "text": "a"}, {"text": "b", "date_unixtime": "1577833200"}))))
    assert old.author == new.author == "user2"
    assert (old.at, new.at) == (1577836800, 1577833200)


def test_what_is_damaged_inside_a_message_costs_that_message_alone(tmp_path):
    value = full(chat({"text": "a"}, {"text": "b", "date": "soon"}, {"text": "\ud83d half"}, {"text": "c", "from": "\udca5"}))
    value["chats"]["list"][0]["messages"].append(7)
    value["personal_information"] = None
    ((only, messages),) = read(write(tmp_path, value, ensure_ascii=True))
    assert only.owner is None and [m.text for m in messages if not m.left_out] == ["a", "\ufffd half", "c"]


def test_sorted_keys_are_read_too(tmp_path):
    found = read(write(tmp_path, full(chat({"text": "a"}), chat({"text": "b"}, name="Eve")), sort_keys=True))
    assert [(c.name, c.type, m[0].text) for c, m in found] == [("Bob", "personal_chat", "a"), ("Eve", "personal_chat", "b")]
