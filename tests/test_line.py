"""LINE's text exports. Every file here is invented."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import assert_tags_name_the_authors

import exports
from exports import line


def read(path, repairs=None):
    ((chat, messages),) = exports.read(path, repairs)
    return chat, list(messages)


@pytest.mark.parametrize(("title", "day", "clock", "name"), [
    ("[LINE] Chat history with Bob", "Wed, 1/31/2024", "06:05PM", "Bob"),
    ("Chat history in Tea: late", "2024.01.31 Wednesday", "18:05", "Tea: late"),
    ("[LINE] Bobとのトーク履歴", "2024/01/31(水)", "18:05", "Bob"),
    ("[LINE] Teaのトーク履歴", "2024/1/31(水)", "午後6:05", "Tea"),
    ("[LINE] 與Bob的聊天記錄", "2024/01/31（三）", "下午06:05", "Bob"),
    ("[LINE] 与Bob的聊天记录", "2024/1/31周三", "18:05", "Bob"),
])  # fmt: skip
def test_languages_differ_in_title_day_and_clock(tmp_path, title, day, clock, name):
    path = tmp_path / "x.txt"
    path.write_text(f"{title}\r\nSaved on: 2024/02/01 10:00\r\n\r\n{day}\r\n{clock}\tBob\thi\r\n")
    chat, (message,) = read(path)
    assert (chat.name, message.name, message.text) == (name, "Bob", "hi")
    assert message.date == "2024-01-31T18:05:00" and message.at == 1706724300


def test_several_lines_stand_in_quotes_and_system_lines_have_no_name(tmp_path):
    text = (
        '[LINE] Chat history with Bob\n\n2024/01/31(Wed)\n18:05\tBob\t"a\n\nb"\n18:06\tAnn\t"so"\n'
        "18:07\t\tBob left the group.\n18:08\tAnn unsent a message.\n18:09\tAnn\t[Sticker]\n"
        "18:10\tAnn\t☎ Call time 0:10\n"
    )
    (tmp_path / "x.txt").write_text(text)
    chat, messages = read(tmp_path / "x.txt")
    assert [(m.name, m.text, m.left_out) for m in messages] == [
        ("Bob", "a\n\nb", ""), ("Ann", '"so"', ""), (None, "", "service messages"),
        (None, "", "service messages"), ("Ann", "<sticker>", ""), ("Ann", "", "service messages"),
    ]  # fmt: skip
    assert chat.type == "personal_chat" and "Bob" not in chat.id


def test_the_weekday_tells_which_number_is_the_day(tmp_path):
    path = tmp_path / "[LINE] Bob.txt"
    path.write_text("Sat, 3/2/2024\n18:05\tBob\thi\n18:06\tAnn\tho\nTue, 3/5/2024\n18:05\tBob\tx\n")
    assert line.find_order(exports.Source(path)) == "mdy"
    path.write_text("Sun, 3/3/2024\n1:05\tB\thi\n1:06\tA\tho\nSun, 4/2/2024\n18:05\tBob\tx\n")
    assert line.find_order(exports.Source(path)) == "dmy"


@pytest.mark.parametrize("text", [
    "2024/01/31\nno tabs here\n", "10:05\tBob\thi\n", "a\tb\tc\n2024/01/31\n", "time\tauthor\ttext\n",
])  # fmt: skip
def test_other_text_is_not_line(text):
    assert not line.can_read(text)


WORDS = st.text(st.characters(categories=["L", "N", "So"]), min_size=1, max_size=9)
TEXTS = st.lists(WORDS, min_size=1, max_size=3).flatmap(
    lambda words: st.sampled_from([" ", "\n", "\n\n"]).map(lambda joint: joint.join(words))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5_000), st.sampled_from(["Ann", "Bob B", "莉 Ø"]), TEXTS), min_size=2))  # fmt: skip
def test_what_is_generated_comes_back_message_for_message(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("line") / "[LINE] Tea.txt"
    time, out, day, expected = datetime.datetime(2024, 1, 31, 18, 5), [], None, []
    for minutes, author, text in steps:
        time += datetime.timedelta(minutes=minutes)
        if time.date() != day:
            day = time.date()
            out.append(f"\n{day:%Y/%m/%d}({day:%a})")
        shown = f'"{text}"' if "\n" in text else text
        out.append(f"{time:%H:%M}\t{author}\t{shown}")
        expected.append((time.isoformat(), author, text))
    path.write_text("[LINE] Chat history in Tea\nSaved on: 2024/02/01\n" + "\n".join(out) + "\n")
    chat, messages = read(path)
    assert [(m.date, m.name, m.text) for m in messages] == expected and chat.name == "Tea"


AUTHORS = ("Ann Ode", "Bob Ut", "Eve Ix")


def invented(rng):
    lines = ["[LINE] Chat history in Tea", "Saved on: 2024/02/01", "", "2024/01/31(Wed)"]
    for number in range(rng.randint(3, 40)):
        author = rng.choice(AUTHORS)
        lines.append(f"{10 + number // 60}:{number % 60:02}\t{author}\t[{author}] says {number}")
    return "\n".join(lines) + "\n"


def test_mutated_chats_have_no_traceback_and_no_wrong_author(tmp_path):
    kinds = "cut", "change", "insert", "hole", "mark"
    path = tmp_path / "x.txt"
    assert_tags_name_the_authors(path, invented, AUTHORS, r"\[(\w+ \w+)\]", kinds)
