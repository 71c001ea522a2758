"""LINE's chat history: a text file with a line for each day and tabs between columns.

    [LINE] Chat history with Bob
    Saved on: 2024/01/31 18:05

    Wed, 1/31/2024              or 2024/01/31(水), 2024.01.31 Wednesday
    18:05<tab>Bob<tab>On my way
    18:06<tab>Ann<tab>"Good.    several lines stand in quotes
    I wait"
    18:07<tab><tab>Bob left     a system line has no name

Of a date with slashes the weekday tells whether the day or the month comes first. The variant with
spaces instead of tabs is not read: nothing shows where a name ends there.
"""

import collections
import datetime
import itertools
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason
from exports.dated import Event, read_chat
from exports.dates import find_time
from exports.source import Source, full_lines

NUM_PASSES = 3  # over the file
SAME_IDS = True  # my name is the same in all chats
DAYS = re.compile(r"(\d{4})[./](\d{1,2})[./](\d{1,2})(?:\s*[(（]?\D{0,14}[)）.]?)")
YEAR_LAST = re.compile(r"([A-Za-z]{3})[a-z]*\.?,?\s(\d{1,2})/(\d{1,2})/(\d{4})")
MESSAGE = re.compile(
    r"((?:[上下]午|午[前後]|오[전후])?\s?\d{1,2}:\d\d\s?(?:[AaPp][Mm])?)\t(.*)", re.DOTALL
)
TITLE = re.compile(
    r"(?:\[LINE\] ?)?Chat history (?:with|in) (.+)|\[LINE\] ?(?:[与與](.+)的聊天[记記][录錄]"
    r"|(.+?)(?:との|の)トーク履歴|(.+?)(?:的聊天[记記][录錄])?)"
)
WEEKDAYS = "mon tue wed thu fri sat sun".split()
MARKS = {
    "<photo>": "[Photo] [照片] [写真] [사진]",
    "<video>": "[Video] [视频] [影片] [動画] [동영상]",
    "<voice>": "[Voice_message] [语音信息] [語音訊息] [ボイスメッセージ] [음성_메시지]",
    "<sticker>": "[Sticker] [贴图] [貼圖] [スタンプ] [스티커]",
    "<file>": "[File] [文件] [檔案] [ファイル] [파일]",
    "<location>": "[Location] [位置] [位置情報] [위치]",
    "<contact>": "[Contact] [联系人信息] [聯絡資訊] [連絡先] [연락처]",
}
SHOWN = {text.replace("_", " "): mark for mark, texts in MARKS.items() for text in texts.split()}
CALL = re.compile(r"☎")
UNSENT = re.compile(r"Message unsent\.|メッセージの送信を取り消しました|已收回訊息|撤回了一条消息")
INNER = re.compile(r"\d{1,2}:\d\d\s?(?:[AaPp][Mm])?\t")
DAMAGED = "damaged lines, left out"
UNDATED = "messages before the first date, left out"


def can_read(head: str) -> bool:
    lines = head.lstrip("\ufeff").split("\n")[:200]
    dated = any(day_of(line.strip(), "mdy") for line in lines)
    tabs = sum(bool(MESSAGE.match(line) and line.count("\t") > 1) for line in lines)
    return bool(dated and tabs and (TITLE.fullmatch(lines[0].strip()) or tabs > 1))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. The file is read three times."""
    order = find_order(source)
    title = TITLE.fullmatch(source.head().lstrip("\ufeff").split("\n")[0].strip())
    title = title or TITLE.fullmatch(source.path.stem)
    name = next(filter(None, title.groups()), "") if title else source.path.stem
    yield read_chat("line", name.strip(), lambda repairs: events(source, order, repairs), repairs)


def find_order(source: Source) -> str:
    """Return in which order dates have day and month, by their weekdays."""
    right = collections.Counter(mdy=0, dmy=0)  # of equals the first: LINE writes mdy in English
    for line in full_lines(source, collections.Counter()):
        match = YEAR_LAST.fullmatch(line.strip())
        if not match:
            continue
        for order in right:
            day = day_of(line.strip(), order)
            right[order] += bool(day and WEEKDAYS[day.weekday()] == match[1].lower())
    return max(right, key=lambda order: right[order])


def day_of(line: str, order: str) -> datetime.date | None:
    """Return the day that a line begins; None of other lines."""
    if match := DAYS.fullmatch(line):
        year, month, day = match.groups()
    elif match := YEAR_LAST.fullmatch(line):
        _, month, day, year = match.groups()
        if order == "dmy":
            month, day = day, month
    else:
        return None
    try:
        return datetime.date(int(year), int(month), int(day))
    except ValueError:
        return None


def events(source: Source, order: str, repairs: collections.Counter) -> Iterator[Event]:
    day, event = None, None
    for line in itertools.chain(full_lines(source, repairs), ["\n"]):
        text = line.strip("\ufeff\r\n")
        following = day_of(text, order)
        match = MESSAGE.fullmatch(text)
        time = find_time(match[1].strip().lower()) if match else None
        if following or time:
            if event:
                yield finished(event)
            event, day = None, following or day
        if time and not day:
            repairs[UNDATED] += 1
        elif time and match and day:
            name, tab, body = match[2].partition("\t")
            service = "" if name and tab else Reason.SERVICE
            moment = datetime.datetime.combine(day, time[0])
            event = Event(moment, None if service else name, body if tab else name, service)
        elif "\t" in text and not following:
            # No part of the message before: somebody else may have written it.
            repairs[DAMAGED] += 1
        elif event and not following:
            event = event._replace(text=f"{event.text}\n{text}")
    if event:
        yield finished(event)


def finished(event: Event) -> Event:
    text, reason = event.text.strip(), event.left_out
    if "\n" in text and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    text = SHOWN.get(text, text)
    if INNER.search(text) or "\0" in text:  # the end of its line is lost
        reason = Reason.DAMAGED
    elif CALL.match(text):
        reason = Reason.SERVICE
    elif UNSENT.fullmatch(text):
        reason = Reason.DELETED
    return event._replace(text=text, left_out=reason)
