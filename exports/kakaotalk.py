"""KakaoTalk's exported chat: text of a phone or a PC, in Korean or English, or a Mac's CSV.

    Bob 님과 카카오톡 대화 / Bob with KakaoTalk Chats
    저장한 날짜 : 2024-01-31 18:05:00 / Date Saved : …

    --------------- 2024년 1월 31일 수요일 ---------------      PC: a line for each day
    [Bob] [오후 6:05] On my way
    2024년 1월 31일 오후 6:05, Bob : On my way               Android
    2024. 1. 31. 오후 6:05, Bob : On my way                  iPhone; a system line has `6:05: `
    Date,User,Message                                        Mac, read as a table

A line that begins otherwise continues the message before it.
"""

import collections
import datetime
import functools
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason, table, table_rows
from exports.dated import DAMAGED, UNDATED, Event, Pieces, chat_name, first_line, read_chat
from exports.dates import find_date, find_time, make_date
from exports.source import Source, full_lines

NUM_PASSES = 2  # over the file
SAME_IDS = True  # my name is the same in all chats
CSV = "Date,User,Message"
HEADER = re.compile(r"카카오톡 ?대화|KakaoTalk Chats|저장한 날짜|Date Saved|Saved Date")
TITLE = re.compile(
    r"(.+?) ?님과(?:의)? 카카오톡 ?대화|(.+?) 카카오톡 ?대화"
    r"|(.+) with KakaoTalk Chats|KakaoTalk Chats with (.+)"
)
FILE = re.compile(r"KakaoTalk(?:_Chat|Chats)?_(.+?)(?:_\d{4}-\d\d-\d\d.*)?")
DAY = r"(?:\d{4}(?:년|\.) ?\d{1,2}(?:월|\.) ?\d{1,2}(?:일|\.)|[A-Z][a-z]{2,8} \d{1,2}, \d{4})"
CLOCK = r"(?:(?:오전|오후|AM|PM) )?\d{1,2}:\d\d(?: ?[AP]M)?"
DATED = re.compile(rf"({DAY},?(?: at)? {CLOCK})(?:, (.+?) : (.*)|[,:] .*|)", re.DOTALL)
BRACKETS = re.compile(rf"\[(.+?)\] \[({CLOCK})\] ?(.*)", re.DOTALL)
RULE = re.compile(rf"(?:-{{5,}} ?)?(?:[A-Z][a-z]+day, )?({DAY})(?: .요일)?(?: ?-{{5,}})?")
SYSTEM = re.compile(
    r".{1,80}님(?:이|을|과) .{0,80}(?:습니다|니다)\.?(?:채팅방으로 초대하기)?"
    r"|.{1,80} (?:has )?(?:joined|left)(?: this chatroom)?\.|.{1,80} invited .{1,200}\."
    r"|채팅방 관리자가 .{1,60}|The message has been deleted\.|메시지가 삭제되었습니다\."
)
MARKS = (
    ("<photo>", re.compile(r"사진(?: \d+장)?|Photos?(?: \d+)?|\d+ photos")),
    ("<video>", re.compile(r"동영상|[Vv]ideos?")),
    ("<sticker>", re.compile(r"\(?이모티콘\)? ?|\(?[Ee]moticons?\)? ?")),
    ("<voice>", re.compile(r"음성메시지|Voice (?:Note|Message)s?")),
    ("<file>", re.compile(r"(?:파일|File): .+")),
    ("<location>", re.compile(r"(?:지도|Map): .+", re.DOTALL)),
    ("<contact>", re.compile(r"(?:연락처|Contact): .+", re.DOTALL)),
)
CALL = re.compile(r"(?:보이스톡|페이스톡|라이브톡|Voice Call|Video Call|Live Talk)\b.{0,40}")
DELETED = re.compile(r"삭제된 메시지입니다\.|This message was deleted\.")
# A damaged line is no part of the message before it: somebody else may have written it.
BROKEN = re.compile(
    r".{0,81}\] \[.{1,12}\d|\[.{1,81}\d?\d.\d\d.{0,4}\]|.{0,81}\].{1,3}\d?\d:\d\d"
    r"|.{0,40}\d.\d\d.{1,90} : "
)
CONTROL = re.compile(r"[\x01-\x08\x0b-\x1f]")  # no part of a chat; in a time it hides a message
INNER = re.compile(rf"\[[^\[\]]{{1,80}}\] \[{CLOCK}\]|{DAY}.{{0,5}}{CLOCK}, .{{1,80}} : ")


def can_read(head: str) -> bool:
    lines = [line.rstrip("\r") for line in head.lstrip("\ufeff").split("\n")[:200]]
    if lines[0] == CSV:
        return True
    wrote = any(BRACKETS.fullmatch(line) or DATED.fullmatch(line) for line in lines)
    return wrote and any(map(HEADER.search, lines[:3]))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. The file is read twice."""
    first = first_line(source)
    titles = TITLE.fullmatch(first), FILE.fullmatch(source.path.stem)
    pieces = functools.partial(csv_events if first == CSV else read_pieces, source)
    yield read_chat("kakaotalk", chat_name(source, *titles), pieces, read_text, repairs)


def csv_events(source: Source, repairs: collections.Counter) -> Iterator[Event]:
    for row in table_rows.rows(source, repairs):
        if time := parse(row.time):
            reason = "" if row.author else Reason.NO_AUTHOR
            yield Event(time, row.author or None, row.text, reason)
        else:
            repairs[table.NO_TIME] += 1


def read_pieces(source: Source, repairs: collections.Counter) -> Pieces:
    day = ""
    for line in full_lines(source, repairs):
        text = CONTROL.sub("", line.strip("\ufeff\r\n"))
        if rule := RULE.fullmatch(text):
            day = rule[1]
            yield None
        elif dated := DATED.fullmatch(text):
            time = parse(dated[1]) if dated[2] else None
            yield Event(time, dated[2], dated[3]) if time else None
        elif brackets := BRACKETS.fullmatch(text):
            if not day:
                repairs[UNDATED] += 1
            time = parse(f"{day} {brackets[2]}")
            yield Event(time, brackets[1], brackets[3]) if time else None
        elif BROKEN.match(text):
            repairs[DAMAGED] += 1
        else:
            yield None if SYSTEM.fullmatch(text) else text


def parse(text: str) -> datetime.datetime | None:
    found = find_date(text.lower())
    day = make_date(*found[:2]) if found and found[1] == "ymd" else None
    time = find_time(found[2]) if found else None
    return datetime.datetime.combine(day, time[0]) if day and time else None


def read_text(text: str) -> tuple[str, str]:
    """Return (what was written, or its mark; why it is left out)."""
    if INNER.search(text) or "\0" in text:  # the end of its line is lost
        return text, Reason.DAMAGED
    if CALL.fullmatch(text) or SYSTEM.fullmatch(text):
        return text, Reason.SERVICE
    if DELETED.fullmatch(text):
        return text, Reason.DELETED
    return next((mark for mark, pattern in MARKS if pattern.fullmatch(text)), text), ""
