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
import functools
import re
from collections.abc import Iterator

from exports import Chat, Message, Reason
from exports.dated import DAMAGED, UNDATED, Event, Pieces, chat_name, first_line, read_chat
from exports.dates import find_time, make_date
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
UNSENT = re.compile(r"Message unsent\.|メッセージの送信を取り消しました|已收回訊息|撤回了一条消息")
INNER = re.compile(r"\d{1,2}:\d\d\s?(?:[AaPp][Mm])?\t")


def can_read(head: str) -> bool:
    lines = head.lstrip("\ufeff").split("\n")[:200]
    dated = any(day_of(line.strip(), "mdy") for line in lines)
    tabs = sum(bool(MESSAGE.match(line) and line.count("\t") > 1) for line in lines)
    return bool(dated and tabs and (TITLE.fullmatch(lines[0].strip()) or tabs > 1))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. The file is read three times."""
    order = find_order(source)
    titles = TITLE.fullmatch(first_line(source)), TITLE.fullmatch(source.path.stem)
    pieces = functools.partial(read_pieces, source, order)
    yield read_chat("line", chat_name(source, *titles), pieces, read_text, repairs)


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
    """Return the day that a line begins, None of other lines; `order`: where the year is last."""
    match = DAYS.fullmatch(line)
    order = "ymd" if match else order
    match = match or YEAR_LAST.fullmatch(line)
    if not match:
        return None
    first, second, third = map(int, match.groups()[-3:])
    return make_date((first, second, third), order)


def read_pieces(source: Source, order: str, repairs: collections.Counter) -> Pieces:
    day = None
    for line in full_lines(source, repairs):
        text = line.strip("\ufeff\r\n")
        match = MESSAGE.fullmatch(text)
        time = find_time(match[1].strip().lower()) if match else None
        if begun := day_of(text, order):
            day = begun
            yield None
        elif match and time and day:
            name, tab, body = match[2].partition("\t")
            moment = datetime.datetime.combine(day, time[0])
            if name and tab:
                yield Event(moment, name, body)
            else:
                yield Event(moment, None, body or name, Reason.SERVICE)
        elif time:
            repairs[UNDATED] += 1
            yield None
        elif "\t" in text:
            # No part of the message before: somebody else may have written it.
            repairs[DAMAGED] += 1
        else:
            yield text


def read_text(text: str) -> tuple[str, str]:
    """Return (what was written, or its mark; why it is left out)."""
    if "\n" in text and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    text = SHOWN.get(text, text)
    if INNER.search(text) or "\0" in text:  # the end of its line is lost
        return text, Reason.DAMAGED
    if text.startswith("☎"):  # a call
        return text, Reason.SERVICE
    return text, Reason.DELETED if UNSENT.fullmatch(text) else ""
