"""The values of a table's column `kind`: which mark a message gets, or why it is left out.

The kinds are those that WeClone lists for WeChat in Chinese and English (weclone/data/models.py,
2026-11-28), and those that people may write in a table of their own.
"""

import functools
import re

from exports import Reason

MARKS = {
    "<photo>": "image photo picture 图片",
    "<voice>": "voice 语音",
    "<video>": "video 视频",
    "<audio>": "audio",
    "<gif>": "gif",
    "<sticker>": "sticker emoji 动画表情 用户上传的gif表情",
    "<file>": "file document 文件 文件(猜)",
    "<location>": "location 位置",
    "<contact>": "contact 名片",
}
KINDS = {name: mark for mark, names in MARKS.items() for name in names.split()}
SERVICE = re.compile(
    r"service|system(?: notification)?|(?:voice )?call|add friend|invite to group|message recall"
    r"|pat pat|系统通知|拍一拍|语音通话|音视频通话|(?:消息)?撤回\d*|添加好友|邀请加群|企业微信.*"
)
FORWARDS = ("forward", "merged forward chat records", "合并转发的聊天记录")
# Cards (a link, a mini program, money), and answers that hold what they answer.
UNSUPPORTED = re.compile(
    r"link|\(share\).*|\(?分享.*|卡片式链接|小程序|transfer|转账|.*红包.*|推荐公众号|接龙|游戏相关"
    r"|recommend official account|location sharing|位置共享|group announcement|群公告|视频号.*"
    r"|reply with quote|引用回复|pasted text|粘贴的文本|unknown|未知.*|cut"
)


def mark_of(kind: str) -> str | None:
    return KINDS.get(kind.casefold())


@functools.lru_cache(1 << 8)
def reason_of(kind: str) -> str:
    """Return why a row of this kind is left out, "" if it is read."""
    kind = kind.casefold()
    if SERVICE.fullmatch(kind):
        return Reason.SERVICE
    if kind in FORWARDS:
        return Reason.FORWARD
    return Reason.UNSUPPORTED if UNSUPPORTED.fullmatch(kind) else ""
