import collections
import datetime
import json
import os
import re
import time
import types
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exports
from cli import UserError


def write(tmp_path, value, **dump):
    path = tmp_path / "result.json"
    path.write_text(
        json.dumps(value, **{"ensure_ascii": False, "indent": 1} | dump), encoding="utf-8"
    )
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
            {
                "id": i,
                "type": "message",
                "date": "2020-01-01T00:00:00",
                "from": "Bob",
                "from_id": "user2",
                **m,
            }
            for i, m in enumerate(messages)
        ],
    } | fields


def text_of(tmp_path, **message):
    ((_, (only,)),) = read(write(tmp_path, full(chat(message))))
    return only.left_out or only.text


def test_every_chat_is_read_with_its_owner_left_ones_too(tmp_path):
    found = read(
        write(
            tmp_path,
            full(
                chat({"text": "a"}),
                chat(name=None, id=3),
                left=[chat({"text": "b"}, type="private_group", id=-4)],
            ),
        )
    )
    assert [(c.id, c.type, c.name, c.owner, len(m)) for c, m in found] == [
        ("2", "personal_chat", "Bob", "user1", 1),
        ("3", "personal_chat", "Deleted Account", "user1", 0),
        ("-4", "private_group", "Bob", "user1", 1),
    ]


def test_a_single_chat_is_an_export_without_an_owner(tmp_path):
    ((only, messages),) = read(write(tmp_path, chat({"text": "a"})))
    assert (only.name, only.owner, len(messages)) == ("Bob", None, 1)


@pytest.mark.parametrize("indent", [None, 0, 1, 4])
@pytest.mark.parametrize("piece", [7, 1 << 16])
def test_layout_and_reading_size_change_nothing(tmp_path, indent, piece, monkeypatch):
    monkeypatch.setattr(exports.source, "CHUNK", piece)
    value = full(chat({"text": 'ö\u2028"\\ 🦆 }]'}, {"text": "b" * 50}), chat(id=12345))
    found = read(write(tmp_path, value, indent=indent, ensure_ascii=indent == 4))
    assert [m.text for _, messages in found for m in messages] == ['ö\u2028"\\ 🦆 }]', "b" * 50]


def test_chats_left_unread_are_skipped(tmp_path):
    path = write(
        tmp_path, full(chat({"text": "a"}, {"text": "b"}), chat({"text": "c"}, name="Eve"))
    )
    assert [c.name for c, _ in exports.read(path)] == ["Bob", "Eve"]


def test_text_is_a_string_or_a_list_of_any_entities(tmp_path):
    assert (
        text_of(
            tmp_path,
            text=[
                "see ",
                {"type": "link", "text": "x.org"},
                {"type": "of_tomorrow", "text": "!"},
                " ",
            ],
        )
        == "see x.org!"
    )
    assert text_of(tmp_path, text="  two\nlines ") == "two\nlines"


@pytest.mark.parametrize(("fields", "shown"), [
    ({"media_type": "sticker", "sticker_emoji": "😀"}, "😀"),
    ({"media_type": "voice_message"}, "<voice>"),
    ({"photo": "photos/1.jpg"}, "<photo>"),
    ({"photo": "(File not included.)", "text": "the sea"}, "the sea"),
    ({"file": "a.zip"}, "<file>"),
    ({"location_information": None}, "<location>"),
    ({"place_name": "x", "address": "y"}, "<location>"),
    ({"poll": {"question": ["a", {"type": "bold", "text": "b"}]}}, "<poll>"),
    ({"todo_list": {"title": "x"}}, "<list>"),
    ({"contact_information": {"phone_number": "1"}}, "<contact>"),
    ({"game_title": "x"}, "<game>"),
    ({"forwarded_from": None, "text": "a"}, "forwards"),
    ({"forwarded_from": "Eve", "text": "a"}, "forwards"),
    ({"saved_from": "Eve", "text": "a"}, "forwards"),
    ({"via_bot": "@gif", "text": "a"}, "written by or via a bot"),
    ({"inline_bot_buttons": [[{"type": "callback"}]], "text": "a"}, "written by or via a bot"),
    ({"type": "service", "action": "phone_call"}, "service messages"),
    ({"from": None, "text": "a"}, "a"),
    ({"text": ""}, "messages without text"),
])  # fmt: skip
def test_media_becomes_a_mark_and_others_words_a_reason(tmp_path, fields, shown):
    assert text_of(tmp_path, **{"text": "", **fields}) == shown


def test_unsupported_messages_have_nothing_but_a_type(tmp_path):
    value = full(chat())
    value["chats"]["list"][0]["messages"] = [{"id": 1, "type": "unsupported"}]
    ((_, (only,)),) = read(write(tmp_path, value))
    assert only.left_out == "messages of an unsupported kind"


def test_people_are_known_by_id_old_bare_numbers_too_and_time_is_unix_time(tmp_path):
    ((_, (old, new)),) = read(
        write(
            tmp_path,
            full(chat({"from_id": 2, "text": "a"}, {"text": "b", "date_unixtime": "1577833200"})),
        )
    )
    assert old.author == new.author == "user2"
    assert (old.at, new.at) == (1577836800, 1577833200)


def test_what_is_damaged_inside_a_message_costs_that_message_alone(tmp_path):
    value = full(
        chat(
            {"text": "a"},
            {"text": "b", "date": "soon"},
            {"text": "\ud83d half"},
            {"text": "c", "from": "\udca5"},
        )
    )
    value["chats"]["list"][0]["messages"].append(7)
    value["personal_information"] = None
    ((only, messages),) = read(write(tmp_path, value, ensure_ascii=True))
    assert only.owner is None and [m.text for m in messages if not m.left_out] == [
        "a",
        "\ufffd half",
        "c",
    ]


def test_where_a_tool_sorted_the_keys_it_is_no_export_of_telegrams(tmp_path):
    for value in (full(chat({"text": "a"})), chat({"text": "a"})):
        with pytest.raises(UserError, match="not a Telegram export"):
            read(write(tmp_path, value, sort_keys=True))


def test_between_a_chat_s_number_and_its_messages_telegram_may_come_to_write_more(tmp_path):
    text = json.dumps(full(chat({"text": "a"}))).replace(
        '"id": 2,', '"id": 2, "topic": "x \\" y", "pinned": true,'
    )
    ((only, messages),) = read(written(tmp_path, text))
    assert (only.name, only.id, messages[0].text) == ("Bob", "2", "a")


# --- other tools' files in this shape


def another_tools(*messages, **fields):
    """A chat as WhatsApp-Chat-Exporter's --telegram writes it. `messages`: (from, from_id, text)"""
    return {
        "name": "Club",
        "type": "private_group",
        "id": 491700000021612345678,
        "messages": [
            {
                "id": n,
                "type": "message",
                "date": "2021-03-14T10:00:00",
                "date_unixtime": 1_615_716_000 + n,
                "from": name,
                "from_id": author,
                "text": text,
                "text_entities": [{"type": "plain", "text": text}],
            }
            for n, (name, author, text) in enumerate(messages)
        ],
    } | fields


@pytest.mark.parametrize("digits", [19, 21, 40])
def test_ids_of_chats_and_people_are_as_long_as_they_are(tmp_path, digits):
    number = int("49" * 20) % 10**digits
    value = another_tools(("Bob", f"user{number}", "a"), ("Bob", "user2", "b"), id=number)
    value["messages"][1]["id"] = 10**30
    ((found, (first, second)),) = read(write(tmp_path, value))
    assert (found.id, found.key) == (str(number), f"chat{number}")
    assert (first.author, second.author) == (f"user{number}", "user2")
    assert (first.id, second.id, second.text) == (0, None, "b")  # a number that no 64 bits hold


@pytest.mark.parametrize(("written_id", "author"), [
    ("user00000", "user00000"),
    ("user4917000000001", "user4917000000001"),
    ("userBob Smith", "telegram:userBob Smith"),
    ("Bob Smith", "telegram:Bob Smith"),
    ("4917000000001@s.whatsapp.net", "user4917000000001"),
    ("4917000000001:12@s.whatsapp.net", "user4917000000001"),
    ("+4917000000001", "user4917000000001"),
    ("12125550100", "user12125550100"),  # Telegram's own bare numbers of that size are channels
    ("", None), (None, None), ([], None), (True, None),
])  # fmt: skip
def test_another_tools_authors_are_numbers_names_or_addresses(tmp_path, written_id, author):
    mine = ("Me", "user00000", "b")
    ((_, (first, *_)),) = read(write(tmp_path, another_tools(("Bob", written_id, "a"), mine, mine)))
    why = "" if author else "messages without author or date"
    assert (first.author, first.left_out) == (author, why)


def test_where_another_tool_gives_names_alone_they_tell_people_apart(tmp_path):
    names = ("Bob", "491700000001", "user7", "Bob", None)
    value = another_tools(*((name, None, "a") for name in names))
    for message in value["messages"]:
        del message["from_id"]
    ((_, messages),) = read(write(tmp_path, value))
    assert [m.author for m in messages] == [name and f"telegram:{name}" for name in names]


def test_a_damaged_author_in_telegrams_own_file_is_nobody_not_a_stranger(tmp_path):
    """The rules for other tools' files hold for whole files, never for one message."""
    odd = [{"from_id": written} for written in ("us\x07r2", "Bob", None)]
    for broken in (*odd, {"from_id": "user2", "date_unixtime": 1577836800}):
        only = chat(*SAID, broken | {"text": "x"})
        for value in (only, full(only)):
            ((_, messages),) = read(write(tmp_path, value))
            assert {m.author for m in messages} <= {"user2", None}, broken


def test_what_whatsapp_chat_exporter_writes_for_files_and_events_is_nobodys_text(tmp_path):
    shown = {
        "one <br>two<br>three": "one\ntwo\nthree",
        "WhatsApp/Media/WhatsApp Images/IMG-1.jpg": "<photo>",
        "WhatsApp/Media/WhatsApp Voice Notes/202101/PTT-1.opus": "<voice>",
        "WhatsApp/Media/WhatsApp Stickers/STK-1.webp": "<sticker>",
        "Message/Media/49@s.whatsapp.net/a/b/1.mp4": "<video>",
        "WhatsApp/Media/WhatsApp Documents/a b.pdf": "<file>",
        "Location shared: (1.5, 2.5)": "<location>",
        "Message deleted": "service messages",
        "A voice call was missed": "service messages",
        "The media is missing": "service messages",
        "Message deleted by me, sorry": "Message deleted by me, sorry",
        "see docs/WhatsApp/notes.txt please": "see docs/WhatsApp/notes.txt please",
    }
    mine = [("Me", "user00000", text) for text in shown]
    group = ("491700000021612345678", "user491700000021612345678", "You left")
    path = write(tmp_path, another_tools(*mine, group))
    assert texts(path) == [*shown.values(), "service messages"]


def test_the_other_side_of_another_tools_personal_chat_has_the_chats_name(tmp_path):
    lines = [("4917", "user4917", "a"), ("Me", "user00000", "b")]
    value = another_tools(*lines, type="personal_chat", id=4917, name="Bob")
    ((found, messages),) = read(write(tmp_path, value))
    assert [(m.author == found.key, m.name) for m in messages] == [(True, "Bob"), (False, "Me")]


# --- what isn't JSON, and what is broken


def texts(path, notes=None):
    return [m.left_out or m.text for _, messages in exports.read(path, notes) for m in messages]


def written(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


SAID = [{"text": f"message {n}"} for n in range(4)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("old", "new", "expected"), [
    ("message 1", r"bell\x07 rings", "bell\a rings"),
    ("message 1", r"\\x41 and \x1f, \\\x1f.", "\\x41 and \x1f, \\\x1f."),
    ("message 1", r"C:\windows", r"C:\windows"),
    ("message 1", "a\nb\tc", "a\nb\tc"),
    ('"text": "message 1"', '"document_id": video_files/s.webm, "text": "m"', "m"),
    ('"text": "message 1"', '"document_id": (File not included. Change data exporting settings to download.), "text": "m"', "m"),
    ('"text": "message 1"', '"text": "first", "text": "second"', "second"),
    ('"text": "message 1"', '"text": "m", "document_id": true_story.webm', "m"),
])  # fmt: skip
def test_invalid_json_is_mended_and_counted(tmp_path, indent, old, new, expected):
    text = json.dumps(full(chat(*SAID), chat(*SAID)), indent=indent)
    notes = collections.Counter()
    found = texts(written(tmp_path, text.replace(old, new, 1)), notes)
    assert (
        found == ["message 0", expected, "message 2", "message 3"] + [m["text"] for m in SAID]
        and notes.total() == 1
    )


def test_a_byte_order_mark_utf_16_and_damaged_bytes_are_read(tmp_path):
    text = json.dumps(full(chat(*SAID, {"text": "ю"})), ensure_ascii=False)
    for data in (text.encode("utf-8-sig"), text.encode("utf-16")):
        assert len(texts(written(tmp_path, data))) == 5
    notes = collections.Counter()
    assert (
        texts(written(tmp_path, text.encode().replace("ю".encode(), b"\xff\xfe")), notes)[4]
        == "\ufffd\ufffd"
    )
    assert notes == {"unreadable bytes": 2}


def test_a_cut_off_export_gives_every_message_before_the_cut(tmp_path):
    text = json.dumps(full(chat(*SAID), chat(*SAID)), indent=1)
    ends = [m.end() for m in re.finditer(r"\n {4}\}", text)]
    for cut in range(text.index('"messages"') + 12, len(text) - 3):
        notes = collections.Counter()
        found = [t for t in texts(written(tmp_path, text[:cut]), notes) if t.startswith("message")]
        whole = re.findall(r'"text": "(message \d)"\n    \s?', text[:cut])
        assert found == [f"message {n % 4}" for n in range(len(found))] and len(found) in (
            len(whole),
            len(whole) - 1,
        ), (cut, ends)
        assert notes["files cut off, or damaged between messages, read as far as possible"] == 1


@pytest.mark.parametrize(("old", "new", "lost"), [
    ('"message 1"', '"message 1', 1),
    ('"date"', '}"date"', 1),
    (r'"from_id": "user2",\s+"text": "message 1"', '"fr', 1),
    (r'"message 3"\s+\}\s+\]', '"message 3"', 1),
    (r'"message 0"\s+\},', '"message 0"}],', 0),
    ('"message 1"', '"mess\0\0\0\0ge 1"', 1),
])  # fmt: skip
def test_damage_inside_a_chat_costs_the_messages_it_hit(tmp_path, old, new, lost):
    broken, n = re.subn(
        old, new, json.dumps(full(chat(*SAID), chat(*SAID, name="Eve", id=3)), indent=1), count=1
    )
    found = read(written(tmp_path, broken))
    assert (
        n == 1
        and [c.name for c, _ in found] == ["Bob", "Eve"]
        and [m.text for m in found[1][1]] == [m["text"] for m in SAID]
    )
    kept = [m.text for m in found[0][1] if not m.left_out]
    assert len(kept) >= 4 - lost and set(kept) <= {m["text"] for m in SAID}


def test_messages_after_a_damaged_chat_head_belong_to_nobody(tmp_path):
    text = json.dumps(
        full(
            chat(*SAID),
            chat({"text": "to Eve"}, name="Eve", id=33),
            chat({"text": "to Zed"}, name="Zed", id=4),
        ),
        indent=1,
    )
    notes = collections.Counter()
    chats = exports.read(written(tmp_path, text.replace('"id": 33,', '"id" 33,')), notes)
    assert [(c.name, m.text) for c, messages in chats for m in messages] == [
        ("Bob", m["text"]) for m in SAID
    ] + [("Zed", "to Zed")]
    assert notes["messages of chats whose head (name, type, id) can't be read, left out"] == 1


def test_what_stands_before_the_chats_may_be_broken(tmp_path):
    text = json.dumps(full(chat(*SAID), left=[chat(*SAID, id=3)]), indent=1)
    for broken in (
        text.replace('"a": [', '"a": \\x01 [['),
        text.replace('"user_id": 1', '"user_id": 1, "bio": "\\x01"'),
    ):
        found = read(written(tmp_path, broken))
        assert [(c.owner, len(m)) for c, m in found] == [("user1", 4)] * 2


@pytest.mark.parametrize("indent", [None, 1])
def test_one_lost_byte_before_the_chats_loses_no_chat(tmp_path, indent):
    people = [
        {"first_name": f"Friend {n}", "phone_number": "00", "date": "2020-01-01T00:00:00"}
        for n in range(20)
    ]
    text = json.dumps(
        full(chat(*SAID), chat(*SAID, id=3)) | {"contacts": {"about": "x", "list": people}},
        indent=indent,
    )
    begin, end = text.index('"contacts"') - 3, text.index('"chats"')
    for at in range(begin, end, 7):
        assert len(texts(written(tmp_path, text[:at] + text[at + 1 :]))) == 8, at
    for at in range(begin, end - 512, 99):
        assert len(texts(written(tmp_path, text[:at] + "\0" * 512 + text[at + 512 :]))) == 8, at


def test_a_hole_over_a_head_gives_no_chat_the_messages_of_the_next(tmp_path):
    value = full(
        chat(*SAID),
        chat(*({"text": f"to Eve {n}"} for n in range(8)), name="Eve", id=33),
        chat({"text": "to Zed"}, id=4, name="Zed"),
    )
    text = json.dumps(value, indent=1)
    for length in (100, 200, 512):
        for at in range(text.index('"Eve"') - 150, text.index('"Eve"'), 10):
            found = read(written(tmp_path, text[:at] + "\0" * length + text[at + length :]))
            said = {c.name: [m.text for m in messages if not m.left_out] for c, messages in found}
            assert set(said["Bob"]) <= {m["text"] for m in SAID} and said["Zed"] == ["to Zed"], (
                length,
                at,
            )


def test_odd_values_are_no_traceback(tmp_path):
    odd = [
        {"date_unixtime": 1e400},
        {"from_id": 10**4200},
        {"from_id": True},
        {"from_id": "group7"},
        {"text": [{"text": None}]},
        {"id": 10**99},
    ]
    value = full(
        chat(*({"text": "a"} | one for one in odd)),
        chat({"text": "b"}, id="\ud800"),
        chat({"text": "c", "date": "14.11.2023 at ten o'clock"}),
    )
    text = json.dumps(value).replace("1e400", "1e999")
    found = read(written(tmp_path, text))
    assert [m.left_out or m.text for m in found[0][1]] == [
        "a",
        *["messages without author or date"] * 3,
        "messages without text",
        "a",
    ]
    assert [m.text for m in found[1][1]] == ["b"] and found[2][1][0].left_out


def test_missing_quotes_are_found_in_time(tmp_path):
    text = json.dumps(full(chat({"text": "a"}))).replace(
        '"text": "a"', '"text": "a", "x": a' + " " * 200_000 + "!"
    )
    began = time.process_time()
    assert texts(written(tmp_path, text)) == ["a"] and time.process_time() - began < 1


def test_a_folder_gives_all_its_exports_and_strangers_are_no_harm(tmp_path):
    for name in ("ChatExport_1", "ChatExport_2"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, full(chat({"text": name})))
    (tmp_path / "settings.json").write_text('{"type": "x"}')
    (tmp_path / "WhatsApp Chat with Zoe.txt").write_text(
        "14/03/2021, 10:00 - Zoe: tea?\n14/03/2021, 10:01 - Ann: yes\n"
    )
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("./result.json", json.dumps(full(chat({"text": "zipped"}))))
        archive.writestr("__MACOSX/result.json", "{}")
    assert sorted(texts(tmp_path)) == ["ChatExport_1", "ChatExport_2", "tea?", "yes", "zipped"]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("messages.html", b"<!DOCTYPE html>", "HTML"), ("x.zip", b"PK\x03\x04broken", "damaged zip"), ("x.png", b"\x89PNG", "not an export"),
    ("result.json", b"", "result.json is empty"),
    ("chats/chat_001/messages.html", b"<!DOCTYPE html>", "HTML"),
])  # fmt: skip
def test_what_is_no_export_says_what_it_is(tmp_path, name, content, expected):
    with pytest.raises(UserError, match="is empty"):
        exports.sources(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        exports.sources(tmp_path if name.endswith("html") else tmp_path / name)


def test_a_pipe_is_refused_for_it_can_be_read_once_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        exports.sources(tmp_path / "pipe")


def test_saved_messages_tell_the_owner_where_nothing_else_does(tmp_path):
    value = full(chat({"text": "a"}, name=None, type="saved_messages", id=77), chat({"text": "b"}))
    del value["personal_information"]
    assert [(c.name, c.owner) for c, _ in read(write(tmp_path, value))] == [
        ("Saved Messages", "user77"),
        ("Bob", "user77"),
    ]


def test_hostile_files_end(tmp_path):
    for text in (
        '{"messages": ' + "[" * 100_000,
        '{"a": "' + "x" * 3_000_000,
        '{"id": ' + "9" * 100_000 + "}",
        "{" * 1000,
        '{"chats": {"list": [1, 2',
    ):
        try:
            assert set(texts(written(tmp_path, text))) <= {"damaged messages"}
        except UserError as error:
            assert "not an export" in str(error) or "not a Telegram export" in str(error)
    deep = json.dumps(full(chat(*SAID))).replace('"message 1"', "[" * 50_000)
    assert texts(written(tmp_path, deep))[0] == "message 0"


# --- who, when, and what lies beside


@pytest.mark.parametrize(("written_id", "author"), [
    (2, "user2"), ("2", "user2"), ("user2", "user2"), ("channel7", "channel7"), (4294967296 + 7, "chat7"), (8589934592 + 7, "channel7"),
])  # fmt: skip
def test_bare_ids_say_which_kind_of_peer_they_are(tmp_path, written_id, author):
    ((_, (only,)),) = read(write(tmp_path, full(chat({"from_id": written_id, "text": "a"}))))
    assert only.author == author


def test_chat_keys_do_not_collide_and_survive_a_group_turning_public(tmp_path):
    kinds = ("personal_chat", "private_group", "private_supergroup", "public_supergroup")
    keys = [
        c.key for c, _ in read(write(tmp_path, full(*(chat(type=kind, id=5) for kind in kinds))))
    ]
    assert keys == ["user5", "chat5", "channel5", "channel5"]


def test_the_hour_that_summer_time_repeats_is_no_way_back(tmp_path):
    days = [
        "2021-10-31T02:50:00",
        "2021-10-31T02:10:00",
        "2021-10-31T02:55:00",
        "2021-11-02T10:00:00",
        "2021-11-02T09:30:00",
    ]
    ((_, messages),) = read(
        write(tmp_path, full(chat(*({"date": day, "text": "a"} for day in days))))
    )
    first = messages[0].at
    assert [m.at - first for m in messages] == [0, 0, 300, 198600, 196800] and [
        m.date for m in messages
    ] == days


def test_a_transcript_beside_a_voice_message_is_its_text(tmp_path):
    (tmp_path / "voice_messages").mkdir()
    (tmp_path / "voice_messages" / "audio_1.txt").write_text(" hello there\n")
    (tmp_path / "secret.txt").write_text("no")
    voice = {"media_type": "voice_message", "text": ""}
    path = write(
        tmp_path / "",
        full(
            chat(
                *(
                    {**voice, "file": f}
                    for f in (
                        "voice_messages/audio_1.ogg",
                        "voice_messages/audio_2.ogg",
                        "x/../secret.ogg",
                        "(File not included)",
                    )
                )
            )
        ),
    )
    assert texts(path) == ["hello there", "<voice>", "<voice>", "<voice>"]
    with zipfile.ZipFile(tmp_path / "chat.zip", "w") as archive:
        archive.write(path, "ChatExport/result.json")
        archive.write(
            tmp_path / "voice_messages" / "audio_1.txt", "ChatExport/voice_messages/audio_1.txt"
        )
    path.unlink()
    assert texts(tmp_path / "chat.zip") == ["hello there", "<voice>", "<voice>", "<voice>"]


# --- what is generated comes back

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PARTS = TEXTS | st.lists(
    TEXTS
    | st.fixed_dictionaries({"type": st.sampled_from(["bold", "link", "new"]), "text": TEXTS}),
    max_size=4,
)
SPOKEN = st.fixed_dictionaries(
    {
        "from_id": st.sampled_from(["user1", "user2", "user33", "channel2"]),
        "text": PARTS,
        "later": st.integers(0, 90_000),
    }
)
CHATS = st.lists(
    st.tuples(
        st.sampled_from(["personal_chat", "private_group", "public_supergroup"]),
        st.lists(SPOKEN, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    CHATS,
    st.sampled_from([None, 0, 1, 3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([5, 64, 1 << 16]),
)
def test_what_is_generated_comes_back_message_for_message(
    tmp_path_factory, chats, indent, ascii_only, mark, piece
):
    listed, expected = [], []
    for number, (kind, spoken) in enumerate(chats):
        at, there = 1_600_000_000, []
        for i, one in enumerate(spoken):
            at += one["later"]
            flat = (
                one["text"]
                if isinstance(one["text"], str)
                else "".join(p if isinstance(p, str) else p["text"] for p in one["text"])
            )
            there.append(
                {
                    "id": i,
                    "type": "message",
                    "date": "2020-09-13T12:26:40",
                    "date_unixtime": str(at),
                    "from": None,
                    "from_id": one["from_id"],
                    "text": one["text"],
                }
            )
            expected.append((kind, str(number), one["from_id"], at, flat.strip()))
        listed.append({"name": f"chat {number}", "type": kind, "id": number, "messages": there})
    path = tmp_path_factory.mktemp("generated") / "result.json"
    text = json.dumps(full(*listed), indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8-sig" if mark else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports.source, "CHUNK", piece)
        notes = collections.Counter()
        found = [
            (c.type, c.id, m.author, m.at, m.text)
            for c, messages in exports.read(path, notes)
            for m in messages
        ]
    assert found == expected and not notes


# --- other encodings than UTF-8, and what was sent in a chat


CHAT = [f"14/03/2021, 10:0{i} - {'Ann' if i % 2 else 'Bob'}: " for i in range(8)]
WRITTEN = {
    "cp1252": "grüß dich, schön dass du da bist",
    "cp1250": "Příliš žluťoučký kůň, zítra přijdu domů",
    "cp1254": "İyi akşamlar nasılsın çok güzel",
    "cp1251": "привет как дела ну ладно я сегодня не смогу",
    "gb18030": "你好 我在看煙火 明天见 吃饭吗",
}


@pytest.mark.parametrize("encoding", WRITTEN)
@pytest.mark.parametrize("piece", [7, 1 << 16])
def test_a_chat_in_its_language_s_code_page_is_decoded(tmp_path, encoding, piece, monkeypatch):
    if encoding in ("cp1251", "gb18030"):
        pytest.importorskip("charset_normalizer")
    monkeypatch.setattr(exports.source, "CHUNK", piece)
    path, notes = tmp_path / "WhatsApp Chat with Bob.txt", collections.Counter()
    path.write_bytes("\n".join(front + WRITTEN[encoding] for front in CHAT).encode(encoding))
    assert texts(path, notes) == [WRITTEN[encoding]] * 8
    assert notes == {f"files in {encoding} instead of UTF-8": 1}


def test_where_two_code_pages_could_be_the_file_is_refused(tmp_path):
    path = tmp_path / "WhatsApp Chat with Bob.txt"
    path.write_bytes("\n".join(front + "né très" for front in CHAT).encode("cp1252"))  # or né trčs
    with pytest.raises(UserError, match="is not UTF-8"):
        texts(path)


def test_utf_8_with_damaged_bytes_stays_utf_8(tmp_path):
    path, notes = tmp_path / "WhatsApp Chat with Bob.txt", collections.Counter()
    data = "\n".join(front + "grüß dich 😀" for front in CHAT).encode()
    for at in range(30, 330, 100):
        data = data[:at] + b"\xff" + data[at + 1 :]
    path.write_bytes(data)
    assert (
        sum("grüß" in text for text in texts(path, notes)) >= 5
        and notes["unreadable bytes"]
        and "files in cp1252 instead of UTF-8" not in notes
    )


def test_telegram_s_json_in_a_code_page_is_decoded_too(tmp_path):
    text = json.dumps(
        full(chat({"text": "grüß dich"}, {"text": "schön"})), ensure_ascii=False, indent=1
    )
    assert texts(written(tmp_path, text.encode("cp1252"))) == ["grüß dich", "schön"]


def test_one_huge_line_is_joined_once(tmp_path, monkeypatch):
    """Joined again at each of its 16,384 pieces, this line takes over eight minutes."""
    monkeypatch.setattr(exports.source, "CHUNK", 1 << 12)
    path = tmp_path / "line.txt"
    with open(path, "wb") as file:
        file.write(b"short\r\n\nlong")
        file.truncate(1 << 26)
    began = time.process_time()
    lines = exports.source.full_lines(exports.source.Source(path), collections.Counter())
    assert [next(lines), next(lines)] == ["short\r\n", "\n"]
    assert [len(line) for line in lines] == [(1 << 26) - 8]
    assert time.process_time() - began < 2


OTHERS = "14/03/2020, 10:00 - Eve: secret\n14/03/2020, 10:01 - Zed: ok"


@pytest.mark.parametrize(("archive", "member", "sent", "line"), [
    ("WhatsApp Chat with Bob.zip", "WhatsApp Chat with Bob.txt", "WhatsApp Chat with Eve.txt", "hi"),
    ("WhatsApp Chat with Bob (1).zip", "WhatsApp Chat with Bob.txt", "WhatsApp Chat with Eve.txt", "hi"),
    ("WhatsApp Chat - Bob.zip", "_chat.txt", "00000012-WhatsApp Chat with Eve.txt", "hi"),
    ("x.zip", "WhatsApp Chat with Bob.txt", "WhatsApp Chat with Eve.txt", "WhatsApp Chat with Eve.txt (file attached)"),
    ("x.zip", "_chat.txt", "00000012-WhatsApp Chat with Eve.txt", "\u200e<attached: 00000012-WhatsApp Chat with Eve.txt>"),
])  # fmt: skip
def test_a_chat_that_was_sent_in_a_chat_is_not_read_as_one(tmp_path, archive, member, sent, line):
    with zipfile.ZipFile(tmp_path / archive, "w") as out:
        out.writestr(sent, OTHERS)
        out.writestr(member, "\n".join(front + line for front in CHAT))
    notes = collections.Counter()
    assert len(texts(tmp_path / archive, notes)) == 8
    assert notes == {"files that were sent in a chat, not read as chats": 1}
    unpacked = tmp_path / archive.removesuffix(".zip")
    zipfile.ZipFile(tmp_path / archive).extractall(unpacked)
    assert archive == "x.zip" or len(texts(unpacked)) == 8


def test_several_chats_that_a_person_put_into_one_zip_are_all_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "chats.zip", "w") as out:
        out.writestr("WhatsApp Chat with Eve.txt", OTHERS)
        out.writestr(
            "WhatsApp Chat with Bob.txt",
            "\n".join(front + "WhatsApp Chat with Eve.txt is here" for front in CHAT),
        )
    assert len(texts(tmp_path / "chats.zip")) == 10


# --- nested folders, large zips, several files a chat


def beep(name="beep", **more):
    """A reader as docs/CONTRIBUTING.md has one: `beep CHAT AUTHOR`, then a message a line."""
    module = types.ModuleType(f"exports.{name}")

    def read_parts(source, repairs):
        _, chat, author = source.head().split("\n")[0].split()
        lines = [line for part in source.parts for line in part.head().split("\n")[1:]]
        messages = (
            exports.Message(None, f"{name}:{author}", author, at, exports.iso_time(at), text)
            for at, text in enumerate(lines)
        )
        yield exports.Chat(f"{name}:{chat}", chat, "personal_chat", chat, None), messages

    module.NUM_PASSES, module.read = 1, read_parts
    module.can_read = lambda head: head.startswith(f"{name} ")
    vars(module).update(more)
    return module


def by_folder(sources):
    folders = {}
    for source in sources:
        folders.setdefault(source.path.parent, []).append(source)
    return [sorted(files, key=lambda source: source.path.name) for files in folders.values()]


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_one_chat_are_read_as_one_in_the_reader_s_order(tmp_path, packed, monkeypatch):
    readers = (beep(group=by_folder),)
    monkeypatch.setattr(exports, "readers", lambda: readers)
    files = {
        "me/messages/inbox/bob_1/message_2.json": "beep bob Bob\nlater",
        "me/messages/inbox/bob_1/message_1.json": "beep bob Bob\nsoon",
        "me/messages/inbox/eve_2/message_1.json": "beep eve Eve\nhi",
        "me/messages/inbox/eve_2/photos/message_1.json": "beep sent Eve\nnot mine",
        "me/ads/clicks.json": "{}",
        "me/messages/inbox/bob_1/photos/1.jpg": "beep jpg Bob\nno",
    }
    path = tmp_path / ("export.zip" if packed else "export")
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
    found = [(c.name, [m.text for m in messages]) for c, messages in exports.read(path)]
    assert found == [("bob", ["soon", "later"]), ("eve", ["hi"])]
    sources = [source for _, source in exports.sources(path)]
    assert [source.total_size for source in sources] == [35, 15]
    assert sources[0].above("ads/clicks.json") == "{}" and sources[0].above("ads/x.json") is None


def test_two_exports_in_one_folder_are_grouped_apart(tmp_path, monkeypatch):
    readers = (beep(group=by_folder),)
    monkeypatch.setattr(exports, "readers", lambda: readers)
    for name in "old", "new":
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("inbox/bob_1/message_1.json", f"beep bob Bob\n{name}")
    found = [[m.text for m in messages] for _, messages in exports.read(tmp_path)]
    assert found == [["new"], ["old"]]


def test_thousands_of_pictures_in_a_zip_are_never_opened(tmp_path, monkeypatch):
    opened = []
    with zipfile.ZipFile(tmp_path / "big.zip", "w") as archive:
        for number in range(5_000):
            archive.writestr(f"inbox/bob/photos/{number}.jpg", b"")
            archive.writestr(f"inbox/bob/files/{number}.json", b"{}")
        archive.writestr("inbox/bob/result.json", json.dumps(full(chat({"text": "a"}))))
    open_member = zipfile.ZipFile.open

    def count(self, name, *args, **kwargs):
        opened.append(name)
        return open_member(self, name, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "open", count)
    assert texts(tmp_path / "big.zip") == ["a"] and len({str(name) for name in opened}) == 1


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows can't change a process's zone")
@pytest.mark.parametrize(
    "zone",
    # summer time by the hour, by half an hour, at 0:01, at 45 minutes, with seconds
    ["Europe/Berlin", "Australia/Lord_Howe", "America/St_Johns", "Asia/Kathmandu", "Africa/Monrovia"],
)  # fmt: skip
def test_local_time_is_what_datetime_says(monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    exports.begin_of_quarter.cache_clear()
    try:
        # A year with St. John's change at 0:01, in steps that are no divisor of an hour; and 1970.
        moments = [*range(0, 90_000, 601), *range(1_140_000_000, 1_172_000_000, 3_571)]
        moments += range(1_143_944_400, 1_143_954_000, 7)  # around that change
        local = [datetime.datetime.fromtimestamp(at).isoformat() for at in moments]
        assert [exports.local_time(at) for at in moments] == local
    finally:
        monkeypatch.undo()
        time.tzset()
        exports.begin_of_quarter.cache_clear()
