"""Tables of messages: CSV and JSON lines. Every file here is invented."""

import collections
import csv
import datetime
import io
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import MUTANTS, damaged

import exports
from cli import UserError
from exports import table, table_rows
from exports.dates import Clock

HEADER = ("time", "chat", "author", "text")


def write(path, rows, delimiter=",", header=HEADER, encoding="utf-8"):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    path.write_bytes(out.getvalue().encode(encoding))
    return path


def read(path, repairs=None):
    chats = exports.read(path, repairs)
    return [(chat, list(messages)) for chat, messages in chats]


def spoken(path, repairs=None):
    return [
        (chat.name, message.name, message.text)
        for chat, messages in read(path, repairs)
        for message in messages
        if not message.left_out
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_delimiter_and_encoding_are_found(tmp_path, delimiter, encoding):
    rows = [
        ("2024-01-31 18:05", "Bob", "Zoë", "a,b;c|d\te"),
        ("2024-01-31T18:06", "Bob", "Bob", "hi"),
    ]
    path = write(tmp_path / "x.csv", rows, delimiter, encoding=encoding)
    assert spoken(path) == [("Bob", "Zoë", "a,b;c|d\te"), ("Bob", "Bob", "hi")]


@pytest.mark.parametrize("header", [
    "Timestamp,Conversation,Sender,Message", "date,channel,from,content", "sent_at,Thread,User Name,Body",
    "ts,room,nickname,msg", '"Created At",Group,"Sender Name","Message Text"',
])  # fmt: skip
def test_columns_are_found_by_many_names(tmp_path, header):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n2024-01-31 18:05,Bob,Ann,hi\n")
    assert spoken(path) == [("Bob", "Ann", "hi")]


@pytest.mark.parametrize("header", ["a,b,c", "time,text", "author,text", "id,name,price,time", ""])
def test_other_tables_are_not_exports(header):
    assert not table.can_read(f"{header}\n1,2,3,4\n")


@pytest.mark.parametrize("line", ["[1, 2]", "{}", '{"time": 1, "text": "x"}', "{broken"])
def test_other_json_is_not_a_table(line):
    assert not table.can_read(line)


def test_json_lines_are_read_and_a_broken_line_costs_itself(tmp_path):
    lines = [
        {"timestamp": 1706724300, "chat": "Bob", "author": "Ann", "text": "hi\nthere"},
        {"timestamp": 1706724360000, "chat": "Bob", "author": "Bob", "text": None},
        {"timestamp": 1706724420.5, "chat": "Bob", "author": "Bob", "text": "\ud83d yes"},
    ]
    text = "\n".join([*map(json.dumps, lines), "{oops", "[]"])
    (tmp_path / "x.jsonl").write_text(text)
    repairs = collections.Counter()
    ((chat, messages),) = read(tmp_path / "x.jsonl", repairs)
    assert [(m.at, m.text) for m in messages] == [
        (1706724300, "hi\nthere"), (1706724360, ""), (1706724420, "\ufffd yes"),
    ]  # fmt: skip
    assert (
        repairs == {table_rows.DAMAGED: 2} and chat.type == "personal_chat" and chat.owner is None
    )


@pytest.mark.parametrize(("text", "iso", "shift"), [
    ("2024-01-31T18:05:06.123Z", "2024-01-31T18:05:06", 0),
    ("2024-01-31 18:05:06+02:00", "2024-01-31T18:05:06", 7200),
    ("2024-01-31 18:05 -0530", "2024-01-31T18:05:00", -19800),
    ("1706724306", "2024-01-31T18:05:06", 0),
    ("1706724306123", "2024-01-31T18:05:06", 0),
    ("1706724306123456", "2024-01-31T18:05:06", 0),
    ("2024/1/31 18:05", "2024-01-31T18:05:00", 0),
    ("2024. 1. 31. 오후 6:05", "2024-01-31T18:05:00", 0),
    ("2024年1月31日 下午6:05", "2024-01-31T18:05:00", 0),
    ("31.01.2024, 18:05", "2024-01-31T18:05:00", 0),
    ("1.2.2024", "2024-02-01T00:00:00", 0),
    ("31/01/24 6:05 p.m.", "2024-01-31T18:05:00", 0),
    ("Jan 31, 2024 12:05 AM", "2024-01-31T00:05:00", 0),
    ("Wed, 31 Jan 2024 18:05:06 GMT", "2024-01-31T18:05:06", 0),
    ("31 January 2024 18:05", "2024-01-31T18:05:00", 0),
])  # fmt: skip
def test_times_are_read_as_they_are_written(text, iso, shift):
    clock = Clock()
    clock.add(text)
    clock.settle("x")
    at, date = clock.read(text)
    assert (date or exports.iso_time(at)) == iso
    local = datetime.datetime.fromisoformat(iso).replace(tzinfo=datetime.UTC)
    assert at == int(local.timestamp()) - shift


@pytest.mark.parametrize("text", ["", "soon", "12", "2024-13-01", "2024-02-30 10:00", "2024-01-31 25:00", "2024-01-31 10:00 or so", "13:05 pm", "31 Foo 2024"])  # fmt: skip
def test_what_is_no_time_is_left_out_and_counted(tmp_path, text):
    path = write(tmp_path / "x.csv", [(text, "Bob", "Ann", "lost"), ("2024-01-31 18:05", "Bob", "Ann", "hi")])  # fmt: skip
    repairs = collections.Counter()
    assert spoken(path, repairs) == [("Bob", "Ann", "hi")] and repairs == {table.NO_TIME: 1}


def test_the_order_of_day_and_month_is_one_for_the_whole_file(tmp_path):
    rows = [("03/04/2024 10:00", "Bob", "Ann", "a"), ("04/25/2024 10:00", "Bob", "Bob", "b")]
    ((_, messages),) = read(write(tmp_path / "x.csv", rows))
    assert [m.date for m in messages] == ["2024-03-04T10:00:00", "2024-04-25T10:00:00"]


def test_where_day_and_month_can_not_be_told_the_file_is_refused(tmp_path):
    path = write(tmp_path / "x.csv", [("03/04/2024 10:00", "Bob", "Ann", "a")])
    with pytest.raises(
        UserError, match=r"03/04/2024 10:00 may be day/month/year or month/day/year"
    ):
        read(path)


def test_rows_of_several_chats_are_told_apart_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "SPOOL_ROWS", 7)
    rows = [(1_700_000_000 + n, f"chat {n % 3}", f"P{n % 5}", f"m{n}") for n in range(100)]
    chats = read(write(tmp_path / "x.csv", rows))
    assert [chat.name for chat, _ in chats] == ["chat 0", "chat 1", "chat 2"]
    for number, (chat, messages) in enumerate(chats):
        assert [m.text for m in messages] == [f"m{n}" for n in range(100) if n % 3 == number]
        assert chat.type == "private_group" and "chat" not in chat.id


def test_without_a_column_for_the_chat_it_is_called_as_the_file(tmp_path):
    path = tmp_path / "Bob_0_5000.csv"
    path.write_text("date,time,user,message\n31.01.2024,18:05,Ann,hi\n")
    assert spoken(path) == [("Bob", "Ann", "hi")]


@pytest.mark.parametrize("line", [
    '2024-01-31,Bob,Ann,"hi', '2024-01-31,Bob,Ann,"hi" there', "2024-01-31,Bob,Ann", "2024-01-31,Bob,Ann,a,b",
    "2024-01-31,Bob,Ann,hi2024-01-31,Bob,Eve,ho", '2024-01-31,Bob,"Ann,hi',
])  # fmt: skip
def test_a_row_that_is_not_whole_gives_nobody_others_words(tmp_path, line):
    path = tmp_path / "x.csv"
    after = '2024-02-01,Bob,Eve,"well, yes"\n2024-02-02,Bob,Ann,bye\n'
    path.write_text(f"time,chat,author,text\n2024-01-30,Bob,Ann,first\n{line}\n{after}")
    repairs = collections.Counter()
    found = spoken(path, repairs)
    assert found[0] == ("Bob", "Ann", "first") and repairs[table_rows.DAMAGED]
    assert {*found} <= {("Bob", "Ann", "first"), ("Bob", "Eve", "well, yes"), ("Bob", "Ann", "bye")}


def test_a_quote_that_is_never_closed_costs_little_and_ends(tmp_path):
    rows = "".join(f"2024-02-01,Bob,Eve,line {n}\n" for n in range(50_000))
    path = tmp_path / "x.csv"
    path.write_text(f'time,chat,author,text\n2024-01-31,Bob,Ann,"hi\n{rows}')
    assert len(spoken(path)) > 40_000


WECHAT = "id,MsgSvrID,type_name,is_sender,talker,room_name,msg,src,CreateTime\n"


def test_wechat_says_who_i_am_and_what_is_no_text(tmp_path):
    path = tmp_path / "bob_0_5000.csv"
    path.write_text(
        WECHAT + "1,11,文本,0,wxid_bob,wxid_bob,在吗,,2024/10/4 11:42\n"
        "2,12,文本,1,wxid_ann,wxid_bob,在,,2024/10/4 11:43\n"
        "3,13,图片,1,wxid_ann,wxid_bob,图片,a.dat,2024/10/4 11:43\n"
        "4,14,系统通知,0,wxid_bob,wxid_bob,撤回,,2024/10/4 11:44\n"
        "5,15,卡片式链接,0,wxid_bob,wxid_bob,news,,2024/10/4 11:45\n"
    )
    ((chat, messages),) = read(path)
    assert chat.owner == table.ME and chat.name == "wxid_bob"
    assert [(m.author == table.ME, m.text, m.left_out) for m in messages] == [
        (False, "在吗", ""), (True, "在", ""), (True, "<photo>", ""),
        (False, "", "service messages"), (False, "", "messages of an unsupported kind"),
    ]  # fmt: skip


# WeClone's newest ChatMessage, and the kinds that it cuts at or skips (weclone/data/models.py).
WECLONE = "id,MsgSvrID,type_name,is_sender,talker,msg,src,CreateTime,room_name,is_forward\n"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, "hi") for kind in ("文本", "text", "Text")),
        *((kind, "<photo>") for kind in ("图片", "image", "Image")),
        *((kind, "<sticker>") for kind in ("动画表情", "sticker", "用户上传的GIF表情")),
        *((kind, "<location>") for kind in ("位置", "location")),
        *((kind, "service messages") for kind in ("系统通知", "system notification", "消息撤回", "消息撤回57", "message recall", "拍一拍", "pat pat", "添加好友", "add friend", "邀请加群", "invite to group", "语音通话", "voice call")),
        *((kind, "forwards") for kind in ("合并转发的聊天记录", "merged forward chat records")),
        *((kind, "messages of an unsupported kind") for kind in ("(分享)卡片式链接", "(share) card link", "(分享)小程序", "(share) music", "粘贴的文本", "pasted text", "未知", "unknown", "未知-11000,0", "推荐公众号", "recommend official account", "位置共享", "location sharing", "引用回复", "reply with quote", "群公告", "group announcement", "转账", "transfer", "赠送红包封面", "视频号直播或直播回放等", "Cut")),
    ],
)  # fmt: skip
def test_weclones_columns_and_kinds_are_read_as_they_stand(tmp_path, kind, expected):
    path = tmp_path / "bob_0_5000.csv"
    mine = "0,1,文本,1,wxid_ann,hi,,2024/10/4 11:41,wxid_bob,False\n"
    text = f'1,7437267147299592543,"{kind}",1,wxid_ann,hi,,2024/10/4 11:42,wxid_bob,False\n'
    path.write_text(WECLONE + mine + text + text.replace("False", "True"), encoding="utf-8")
    ((chat, (_, message, forwarded)),) = read(path)
    assert (chat.name, chat.owner, message.author) == ("wxid_bob", table.ME, table.ME)
    assert (message.left_out or message.text) == expected
    assert forwarded.left_out == (message.left_out or "forwards")


def test_where_wechat_writes_one_talker_in_all_rows_i_am_still_another(tmp_path):
    path = tmp_path / "bob.csv"
    path.write_text(
        WECHAT + "1,1,Text,0,bob,r,hi,,2024/10/4 11:42\n2,2,Text,1,bob,r,ho,,2024/10/4 11:42\n"
    )
    ((_, messages),) = read(path)
    assert [(m.author, m.name) for m in messages] == [("table:bob", "bob"), (table.ME, "Me")]


PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NAMES = PLAIN.map(str.strip).filter(bool)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(10**8, 2 * 10**9), NAMES, NAMES, TEXTS.map(str.strip)), max_size=30
    ),
    shape=st.sampled_from([",", ";", "\t", "json"]),
)
def test_what_is_generated_comes_back_message_for_message(tmp_path_factory, rows, shape):
    folder = tmp_path_factory.mktemp("table")
    if shape == "json":
        path = folder / "x.jsonl"
        path.write_text("".join(json.dumps(dict(zip(HEADER, row))) + "\n" for row in rows))
    else:
        path = write(folder / "x.csv", rows, shape)
    if not rows:
        return
    repairs = collections.Counter()
    found = [
        (message.at, chat.name, message.name, message.text)
        for chat, messages in read(path, repairs)
        for message in messages
    ]
    expected = sorted(rows, key=lambda row: [other[1] for other in rows].index(row[1]))
    assert found == expected and not repairs


AUTHORS = ("Ann Ode", "Bob Ut", "Eve Ix")


def invented(rng):
    """A table in which each text says who wrote it, and where."""
    rows = []
    for number in range(rng.randint(1, 30)):
        author, chat = rng.choice(AUTHORS), rng.choice(("tea", "rent"))
        text = f"[{author} in {chat}] " + rng.choice((f"says {number}", 'well, "so"', "two\nlines"))
        rows.append((1_600_000_000 + number * 60, chat, author, text))
    if rng.random() < 0.4:
        return "".join(json.dumps(dict(zip(HEADER, row))) + "\n" for row in rows)
    out = io.StringIO()
    quoting = rng.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
    writer = csv.writer(out, delimiter=rng.choice(",;\t"), lineterminator="\n", quoting=quoting)
    writer.writerows([HEADER, *rows])
    return out.getvalue()


def test_mutated_tables_have_no_traceback_and_no_wrong_author(tmp_path):
    path, kept = tmp_path / "x.csv", 0
    for number in range(MUTANTS):
        rng = random.Random(number)
        path.write_bytes(damaged(invented(rng), rng).encode("utf-8", "replace"))
        try:
            chats = read(path)
        except UserError:
            continue
        for _, messages in chats:
            for message in messages:
                if len(re.findall(r"\[\w+ \w+ in ", message.text)) > 1:
                    continue  # all between two texts is lost: nobody can tell
                for author in AUTHORS:
                    if f"[{author} in " in message.text and message.name in AUTHORS:
                        assert message.name == author, f"mutant {number}: {message}"
                        kept += 1
    assert kept > MUTANTS * 5
