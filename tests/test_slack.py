"""Slack's export of a workspace. Every file here is invented."""

import collections
import json
import random
import re
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import MUTANTS, damaged

import exports
from exports import Reason, slack, source

AT = 1_700_000_000
USERS = [
    {"id": "U1ANN", "name": "ann", "profile": {"display_name": "Ann", "real_name": "Ann A."}},
    {
        "id": "U2BOB",
        "name": "bob",
        "deleted": True,
        "profile": {"display_name": "", "real_name": "Bob B."},
    },
    {"id": "U3CY", "name": "cy"},
    {"id": "U9BOT", "name": "bot", "is_bot": True},
]


def message(user, text, second=0, **more):
    return {"user": user, "type": "message", "ts": f"{AT + second}.000100", "text": text, **more}


def make(folder, days, dms=(), users=USERS):
    """A workspace; `days` are messages by `conversation/day.json`."""
    folder.mkdir(exist_ok=True)
    (folder / "users.json").write_text(json.dumps(users))
    (folder / "channels.json").write_text(json.dumps([{"id": "C1", "name": "media"}]))
    (folder / "groups.json").write_text(json.dumps([{"id": "G1", "name": "secret"}]))
    (folder / "mpims.json").write_text(json.dumps([{"id": "G2", "name": "mpdm-ann--bob--cy-1"}]))
    dms = [{"id": f"D{i}", "members": pair} for i, pair in enumerate(dms, 1)]
    (folder / "dms.json").write_text(json.dumps(dms))
    for name, messages in days.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(messages))
    return folder


def read(path, repairs=None):
    return [(chat, list(messages)) for chat, messages in exports.read(path, repairs)]


def one(tmp_path, **raw):
    ((_, (found,)),) = read(make(tmp_path, {"media/2023-11-14.json": [message(**raw)]}))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_days_of_a_channel_are_one_chat_whatever_its_name(tmp_path, packed):
    days = {
        "media/2023-11-15.json": [message("U2BOB", "third", 90_000)],
        "media/2023-11-14.json": [message("U1ANN", "second", 5), message("U2BOB", "first", 1)],
        "D1/2023-11-14.json": [message("U1ANN", "hi")],
        "secret/2023-11-14.json": [message("U1ANN", "psst")],
    }
    path = make(tmp_path / "export", days, dms=[["U1ANN", "U2BOB"]])
    if packed:
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
            for file in sorted(path.rglob("*.json")):
                archive.write(file, file.relative_to(path))
        path = tmp_path / "export.zip"
    chats = {chat.name: (chat, messages) for chat, messages in read(path)}
    assert {chat.id: chat.type for chat, _ in chats.values()} == {
        "C1": "private_supergroup",
        "D1": "personal_chat",
        "G1": "private_group",
    }
    chat, messages = chats["media"]
    assert [(m.name, m.text) for m in messages] == [
        ("Bob B.", "first"),
        ("Ann", "second"),
        ("Bob B.", "third"),
    ]
    assert "Ann, Bob B." in chats and chat.owner is None


def test_the_lists_of_a_workspace_are_read_once_for_all_its_conversations(tmp_path, monkeypatch):
    read_names, real = [], source.Source.read_other

    def counted(self, path):
        text = real(self, path)
        if text is not None:
            read_names.append(path.name)
        return text

    monkeypatch.setattr(source.Source, "read_other", counted)
    days = {f"D{i}/2023-11-14.json": [message("U1ANN", "hi")] for i in range(5)}
    assert len(read(make(tmp_path, days, dms=[["U1ANN", "U2BOB"]] * 5))) == 5
    assert read_names.count("users.json") == 1 and read_names.count("dms.json") == 1


@pytest.mark.parametrize("both", [False, True])
def test_an_enterprise_grid_names_people_in_org_users_json(tmp_path, both):
    path = make(tmp_path, {"photos/2023-11-14.json": [message("U3CY", "hi")]})
    users = USERS[:2] if both else []
    (path / "users.json").rename(path / "org_users.json")
    if both:
        (path / "users.json").write_text(json.dumps(users))
    (path / "org_users.json").write_text(json.dumps(USERS))
    ((chat, (found,)),) = read(path)
    assert (chat.name, found.name) == ("photos", "cy")


def test_three_dms_that_share_one_person_tell_who_i_am(tmp_path):
    pairs = [["U1ANN", "U2BOB"], ["U3CY", "U1ANN"], ["U1ANN", "U4"]]
    days = {"D1/2023-11-14.json": [message("U1ANN", "hi")]}
    ((chat, _),) = read(make(tmp_path, days, dms=pairs))
    assert (chat.owner, chat.name) == ("slack:U1ANN", "Bob B.")
    ((chat, _),) = read(make(tmp_path, days, dms=[*pairs, ["U2BOB", "U3CY"]]))
    assert chat.owner is None
    ((chat, _),) = read(make(tmp_path, days, dms=pairs[:2]))
    assert chat.owner is None


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("<@U2BOB> &amp; <@U77|Dan>: a &lt;b&gt;", "@Bob B. & @Dan: a <b>"),
        ("see <#C1|general> or <#C1>", "see #general or #media"),
        ("<!here> <!channel> <!subteam^S1|@devs> <!subteam^S1>", "@here @channel @devs @subteam"),
        (
            "<https://x.org/?a=1&amp;b=2> <https://x.org|the page>",
            "https://x.org/?a=1&b=2 the page",
        ),
        ("<mailto:a@x.org|a@x.org> <mailto:b@x.org>", "a@x.org b@x.org"),
        ("<!date^1392734382^{date}|Feb 18>", "Feb 18"),
        ("&amp;lt; isn't a sign", "&lt; isn't a sign"),
        ("\ud83d half", "\ufffd half"),
    ],
)
def test_markup_becomes_plain_text(tmp_path, written, text):
    assert one(tmp_path, user="U1ANN", text=written).text == text


@pytest.mark.parametrize(
    ("more", "text", "left_out"),
    [
        ({"subtype": "thread_broadcast"}, "hi", ""),
        ({"subtype": "me_message"}, "hi", ""),
        ({"edited": {"user": "U1ANN", "ts": "1700000009.000000"}}, "hi", ""),
        ({"thread_ts": "1700000000.000100", "parent_user_id": "U2BOB"}, "hi", ""),
        ({"subtype": "channel_join"}, "", Reason.SERVICE),
        ({"subtype": "channel_topic"}, "", Reason.SERVICE),
        ({"subtype": "huddle_thread"}, "", Reason.SERVICE),
        ({"subtype": "tombstone"}, "", Reason.DELETED),
        ({"bot_id": "B1"}, "", Reason.BOT),
        ({"subtype": "bot_message", "user": None}, "", Reason.BOT),
        ({"user": "USLACKBOT"}, "", Reason.BOT),
        ({"user": "U9BOT"}, "", Reason.BOT),
        ({"user": None}, "", Reason.NO_AUTHOR),
        ({"ts": "soon"}, "", Reason.NO_AUTHOR),
        ({"text": ""}, "", Reason.NO_TEXT),
        ({"text": "", "files": [{"mimetype": "image/png"}]}, "<photo>", ""),
        ({"text": "", "files": [{"mode": "tombstone"}]}, "<file>", ""),
        (
            {"text": "", "files": [{"mimetype": "audio/mp4", "subtype": "slack_audio"}]},
            "<voice>",
            "",
        ),
        ({"files": [{"mimetype": "image/png"}]}, "hi", ""),
    ],
)
def test_what_becomes_of_a_message(tmp_path, more, text, left_out):
    found = one(tmp_path, **{"user": "U1ANN", "text": "hi", **more})
    assert (found.text, found.left_out) == (text, left_out)


def test_names_of_guests_stand_in_their_messages_and_a_missing_list_leaves_ids(tmp_path):
    guest = message("U8", "hi", user_profile={"display_name": "", "real_name": "Guest"})
    path = make(tmp_path, {"media/2023-11-14.json": [guest, message("U7", "ho", 1)]})
    ((_, messages),) = read(path)
    assert [m.name for m in messages] == ["Guest", "U7"]
    for name in ("users.json", "channels.json"):
        (tmp_path / name).write_text("{broken")
    ((chat, messages),) = read(path)
    assert (chat.name, len(messages)) == ("media", 2)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>&"), min_size=1)
WRITTEN = st.lists(
    st.tuples(TEXT.map(str.strip).filter(bool), st.sampled_from(range(3)), st.integers(0, 200_000)),
    min_size=1,
    unique_by=lambda row: row[2],
)


@settings(max_examples=40, deadline=None)
@given(WRITTEN)
def test_messages_come_back_with_author_order_and_time(tmp_path_factory, written):
    days = collections.defaultdict(list)
    for text, who, second in written:
        days[f"media/{exports.iso_time(AT + second)[:10]}.json"].append(
            message(USERS[who]["id"], text, second)
        )
    folder = tmp_path_factory.mktemp("slack")
    ((_, messages),) = read(make(folder, days))
    expected = [(AT + second, f"slack:{USERS[who]['id']}", text) for text, who, second in written]
    assert [(m.at, m.author, m.text) for m in messages] == sorted(expected)


def test_mutated_days_have_no_traceback_and_no_wrong_author(tmp_path):
    path, kept = make(tmp_path, {"media/2023-11-14.json": []}), 0
    for number in range(MUTANTS):
        rng = random.Random(number)
        day = []
        for i in range(12):
            user = USERS[rng.randrange(3)]["id"]
            day.append(message(user, f"[{user}] says {i} &amp; <@U1ANN> \u20ac", i))
        (path / "media/2023-11-14.json").write_text(json.dumps(day))
        text = damaged(json.dumps(day, indent=rng.choice((None, 4)), ensure_ascii=False), rng)
        (path / "media/2023-11-15.json").write_bytes(text.encode("utf-8", "replace"))
        for _, messages in read(path, collections.Counter()):
            for found in messages:
                tag = re.match(r"\[(\w+)\] ", found.text)
                known = tag and tag[1] in {user["id"] for user in USERS}
                if known and found.author in {f"slack:{user['id']}" for user in USERS}:
                    assert found.author == f"slack:{tag[1]}", f"mutant {number}: {found}"
                    kept += 1
    assert kept > 12 * MUTANTS  # the whole day, and some of the damaged ones


def test_other_json_is_no_slack():
    for head in ("[]", '[{"id": "U1"}]', '{"messages": [{"type": "message", "ts": 1}]}'):
        assert not slack.can_read(head)
