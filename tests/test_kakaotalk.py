"""KakaoTalk's exports of PC, Android, iPhone and Mac. Every file here is invented."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import assert_tags_name_the_authors
from test_line import AUTHORS, TEXTS

import exports
from exports import kakaotalk


def read(path, repairs=None):
    ((chat, messages),) = exports.read(path, repairs)
    return chat, list(messages)


PC = "Bob 님과 카카오톡 대화\n저장한 날짜 : 2024-02-01 10:00:00\n\n--------------- 2024년 1월 31일 수요일 ---------------\n"
PC_EN = "Bob with KakaoTalk Chats\nDate Saved : 2024-02-01 10:00:00\n\n--------------- Wednesday, January 31, 2024 ---------------\n"
PHONE = "Bob 님과 카카오톡 대화\n저장한 날짜 : 2024년 2월 1일 오전 10:00\n\n\n2024년 1월 31일 오후 6:00\n"
IPHONE = "Bob 님과 카카오톡 대화\n저장한 날짜: 2024. 2. 1. 오전 10:00\n\n2024년 1월 31일 수요일\n"
ENGLISH = "KakaoTalk Chats with Bob\nDate Saved : Feb 1, 2024 10:00\n\n"


@pytest.mark.parametrize(("head", "front"), [
    (PC, "[Bob] [오후 6:05] "), (PC_EN, "[Bob] [6:05 PM] "), (PC_EN, "[Bob] [PM 6:05] "), (PC, "[Bob] [18:05] "),
    (PHONE, "2024년 1월 31일 오후 6:05, Bob : "), (PHONE, "2024년 1월 31일 18:05, Bob : "),
    (IPHONE, "2024. 1. 31. 오후 6:05, Bob : "),
    (ENGLISH, "January 31, 2024, 6:05 PM, Bob : "), (ENGLISH, "Jan 31, 2024 at 6:05 PM, Bob : "),
])  # fmt: skip
def test_phones_and_pcs_write_differently(tmp_path, head, front):
    path = tmp_path / "x.txt"
    path.write_text(f"{head}{front}hi: there\nand more\n{front}사진\n")
    chat, messages = read(path)
    assert [(m.date, m.name, m.text) for m in messages] == [
        ("2024-01-31T18:05:00", "Bob", "hi: there\nand more"), ("2024-01-31T18:05:00", "Bob", "<photo>"),
    ]  # fmt: skip
    assert chat.name == "Bob" and messages[0].at == 1706724300


def test_a_mac_s_csv_is_read_with_the_same_marks(tmp_path):
    path = tmp_path / "KakaoTalk_Chat_Bob_2024-02-01-10-00-00.csv"
    path.write_text('Date,User,Message\n2024-01-31 18:05:06,"Bob","a, b\nc"\n2024-01-31 18:05:07,"Ann","이모티콘"\n')  # fmt: skip
    chat, messages = read(path)
    assert [(m.date, m.name, m.text) for m in messages] == [
        ("2024-01-31T18:05:06", "Bob", "a, b\nc"), ("2024-01-31T18:05:07", "Ann", "<sticker>"),
    ]  # fmt: skip
    assert chat.name == "Bob" and messages[0].author == "kakaotalk:Bob"


def test_what_kakaotalk_writes_itself_is_nobodys_text(tmp_path):
    text = (
        PC + "[Bob] [오후 6:05] hi\nEve님이 들어왔습니다.\n[Bob] [오후 6:06] 보이스톡 해요\n"
        "[Bob] [오후 6:07] 삭제된 메시지입니다.\n[Ann] [오후 6:08] 파일: a.pdf\n"
    )
    (tmp_path / "x.txt").write_text(text)
    _, messages = read(tmp_path / "x.txt")
    assert [(m.text, m.left_out) for m in messages] == [
        ("hi", ""), ("", "service messages"), ("", "deleted messages"), ("<file>", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("text", [
    "hello\n[Bob] [오후 6:05] hi\n", PC, "2024. 1. 31. 오후 6:05, Bob : hi\n", "Date,User\n1,2\n",
])  # fmt: skip
def test_other_text_is_not_kakaotalk(text):
    assert not kakaotalk.can_read(text)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5_000), st.sampled_from(["Ann", "Bob, B", "소 Ø"]), TEXTS), min_size=1),
    shape=st.sampled_from(["pc", "android", "iphone", "mac"]),
)  # fmt: skip
def test_what_is_generated_comes_back_message_for_message(tmp_path_factory, steps, shape):
    path = tmp_path_factory.mktemp("kakao") / "x.txt"
    time, out, day, expected = datetime.datetime(2024, 1, 31, 18, 5), [], None, []
    heads = {"pc": PC, "android": PHONE, "iphone": IPHONE, "mac": "Date,User,Message\n"}
    for minutes, author, text in steps:
        time += datetime.timedelta(minutes=minutes)
        half, hour = ("오후", "오전")[time.hour < 12], time.hour % 12 or 12
        date = f"{time.year}년 {time.month}월 {time.day}일"
        if shape == "pc" and time.date() != day:
            out.append(f"--------------- {date} 수요일 ---------------")
        day = time.date()
        clock = f"{half} {hour}:{time:%M}"
        out.append({
            "pc": f"[{author}] [{clock}] {text}",
            "android": f"{date} {clock}, {author} : {text}",
            "iphone": f"{time.year}. {time.month}. {time.day}. {clock}, {author} : {text}",
            "mac": f'{time:%Y-%m-%d %H:%M:%S},"{author}","{text}"',
        }[shape])  # fmt: skip
        expected.append((time.isoformat(), author, text))
    path.write_text(heads[shape] + "\n".join(out) + "\n")
    _, messages = read(path)
    assert [(m.date, m.name, m.text) for m in messages] == expected


def invented(rng):
    pc, lines = rng.random() < 0.5, []
    for number in range(rng.randint(3, 40)):
        author, clock = rng.choice(AUTHORS), f"오전 10:{number:02}"
        front = f"[{author}] [{clock}] " if pc else f"2024. 1. 31. {clock}, {author} : "
        lines.append(f"{front}<{author}> says {number}")
    return (PC if pc else IPHONE) + "\n".join(lines) + "\n"


def test_mutated_chats_have_no_traceback_and_no_wrong_author(tmp_path):
    kinds = "cut", "change", "hole", "mark"
    path = tmp_path / "x.txt"
    assert_tags_name_the_authors(path, invented, AUTHORS, r"<(\w+ \w+)>", kinds)
