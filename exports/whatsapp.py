"""WhatsApp's exported chat: a text file in the dialect of the phone that wrote it, which it names nowhere. Some of its shapes:

    14/03/2021, 22:05 - Bob: On my way                            Android
    3/14/21, 10:05 PM - Ann added Bob                             a system line has no `name:`
    [14.03.21, 22:05:33] ~ Bob: image omitted                     iPhone: U+200E stands before what WhatsApp itself wrote
    [2021/3/14 下午10:05:33] Bob: <附件：00000012-AUDIO-2021-03-14-22-05-33.opus>

A first pass counts the shapes that lines begin with and, for each, who wrote and what its dates can mean; a second pass yields the messages
of the commonest shape. A line that begins otherwise continues the message before it.

- The order of day, month and year makes fewest impossible dates and steps back in time, then fewest different years. Where that leaves
  two, it is the writer's habit: month first with slashes, capital AM or PM and no zero before a number (the United States), year first with
  Korean, Chinese or Japanese halves of the day, else day first.
- A person is a name of at most 60 characters who wrote anything but service messages. A name met once that has a quotation mark, the end
  of a sentence or a system line's verb in it is the beginning of a system line; four words with an open quote are, however often met.
- What WhatsApp wrote in place of a message is known by its U+200E or angle brackets, then by word stems of some forty languages. Only
  deletions, missed calls and `null`, which Android leaves unmarked, are known by their whole text.
"""

import collections
import datetime
import hashlib
import re
import unicodedata
from pathlib import PurePath
from typing import NamedTuple

from exports import Chat, Message, forward

PASSES = 2  # over the file
LONGEST = 1 << 20  # characters of a message that are kept
MOST_PEOPLE = 20_000  # names that are counted; a chat has at most some thousand members
EPOCH = datetime.datetime(1970, 1, 1)
ORDERS = {"day first": (2, 1, 0), "month first": (2, 0, 1), "year first": (0, 1, 2)}  # where year, month and day stand
LRM = "\u200e"
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # of direction; nobody sees them
BLANK = MARKS + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
UNSEEN = dict.fromkeys(map(ord, BLANK))

SEPARATOR = rf"[{MARKS}]{{0,3}}[-/.]\s?[{MARKS}]{{0,3}}"
DATE = rf"(?P<a>\d{{1,4}})(?P<first>{SEPARATOR})(?P<b>\d{{1,2}})(?P<second>{SEPARATOR})(?P<c>\d{{4}}|\d{{1,2}})"
TIME = r"(?P<hour>\d{1,2})(?:[:.]|\s?h\s?)(?P<minute>\d\d)(?:(?:[:.]|\smin\s)(?P<seconds>\d\d))?"  # Canada: 22 h 05 min 33 s
WORDS = r"[^\d:/\[\]–-]{0,24}"
START, END = rf"[{MARKS}]{{0,9}}(?P<open>\[?)[{MARKS}]{{0,3}}", r"(?P<end>\]\s?|\s[-–]\s|:\s)"
FRONTS = [  # the second is what WhatsApp Web copies
    re.compile(rf"{START}{DATE}(?P<before>{WORDS}){TIME}(?P<after>{WORDS}){END}"),
    re.compile(rf"{START}{TIME}(?P<after>{WORDS})(?P<before>){DATE}{END}"),
]
LOG = re.compile(r"\W*\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
AUTHOR = re.compile(r"(.{1,90}?):(?:\s|$)")


def word(text):
    """`p. m.` → `pm`."""
    return re.sub(r"[\W_]+", "", text).casefold()


def fold(text):
    """Without accents and capitals: `Médias` → `medias`."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn").casefold()


def stems(text):
    """The pattern that finds any of these in a folded text."""
    return re.compile(fold(text))


def whole(text):
    return {phrase.casefold() for phrase in text.split("|")}


# fmt: off
FILLER = {"", "a", "à", "at", "um", "kl", "klo", "alas", "г", "ч", "uhr", "h", "s", "be"}  # `14.3.2021 klo 22.05`
MORNING = {word(w) for w in (
    "am|ص|صباحا|上午|凌晨|清晨|早上|午前|오전|πμ|ق.ظ|قبل ازظهر|לפנה״צ|vorm|dop|de|fm|fh|ap|öö|sa|pg|дп|пр.об|претпл|пре подне|"
    "прије подне|pre podne|prije podne|priekšp|priešpiet|vm|yb|pd|e paradites|पूर्वाह्न|পূর্বাহ্ণ|முற்பகல்|ก่อนเที่ยง|ກ່ອນທ່ຽງ|පෙ.ව|ү.ө|atm|ਪੂ.ਦੁ|ب.ن|"
    "ጥዋት|da manhã|de la mañana|in the morning").split("|")}
EVENING = {word(w) for w in (
    "pm|م|مساء|下午|中午|晚上|午後|오후|μμ|ب.ظ|بعدازظهر|אחה״צ|nachm|odp|pop|du|em|eh|ip|ös|ch|ptg|пп|сл.об|попл|по подне|поподне|"
    "po podne|popodne|pēcp|popiet|nm|yh|md|e pasdites|अपराह्न|অপরাহ্ণ|பிற்பகல்|หลังเที่ยง|ຫຼັງທ່ຽງ|ප.ව|ү.х|ptm|ਬਾ.ਦੁ|د.ن|ከሰዓት|da tarde|"
    "de la tarde|in the afternoon|in the evening").split("|")}
EASTERN = {"오전", "오후", "上午", "下午", "午前", "午後"}
OMITTED = stems(
    r"omitted|omitid|ocult|revelad|\bomis|\bomess|\bomes|esclus|non inclus|mancant|\babsent|manquant|\bretire|weggel|ausgel|ausgeschl|"
    "weglaat|utelämn|utels|utesl|utelatt|sløyfet|ikke inkludert|udelad|ei kuvaa|sisällytet|jätetty|jätettiin|pominię|vynech|izostav|"
    "kihagy|hiányz|sikertelen|fără|пропущ|отсутств|опущен|не добавл|відсутн|не додан|пропусн|изостав|παράλ|εξαίρ|הושמט|הוסר|נכלל|إدراج|"
    "استبعاد|حذف|نظر|نکال|edilmedi|atlanm|tidak di|disingkir|bỏ qua|đã bỏ|हटा|छोड़|वगळ|বাদ|ไม่|ถูกลบ|ละเว้น|略|忽略|含まれて|생략|제외")
MEDIA = stems(
    "medi|mídia|medya|meedia|mitjan|multim|медиа|медіа|медиј|файл|fichier|ficheiro|archivo|vedlegg|bijlage|pliki|πολυμέσ|фајл|ملف|"
    "αρχεί|מדיה|وسائط|رسانه|میڈیا|मीडिया|মিডিয়া|สื่อ|媒體|媒体|メディア|미디어")
ATTACHED = stems(
    "attach|angehäng|bijgevoegd|aangeheg|joint|adjunt|anexad|allegat|ataşat|atașat|załączon|прикреп|добавлен|додано|прикачен|ekli|"
    "bifogad|vedlagt|vedhæft|liite|přilož|pripojen|csatol|privitku|pievieno|prisegta|lisatud|συνημμ|מצורף|مرفق|پیوست|संलग्न|अटैच|সংযুক্ত|"
    "lampir|đính kèm|แนบ|附件|添付|첨부")
EDITED = stems(
    r"\bedit|bearbeitet|modifi|bewerkt|gewijzigd|edytowan|zmienion|измен|отредакт|редаг|змінен|düzenle|rediger|muokat|uprav|szerkeszt|"
    "επεξεργ|נערכ|تعديل|ویرایش|संपादित|diedit|chỉnh sửa|แก้ไข|編集|编辑|編輯|수정")
KINDS = [
    ("<gif>", stems("gif|জিআইএফ")),
    ("<sticker>", stems(
        "sticker|стикер|наклейк|αυτοκόλλητ|סטיקר|ملصق|اسٹیکر|استیکر|çıkartma|สติกเกอร์|nálepk|naklejk|figurinha|klistrem|klisterm|"
        "pelekat|स्टिकर|স্টিকার|스티커|スタンプ|ステッカー|matrica|stiker|naljepnic|tarra|adhesiu|autocollant|adesiv|貼圖|贴图")),
    ("<contact>", stems(
        "contact|contat|kontak|контакт|επαφ|איש קשר|جهة اتصال|مخاطب|رابطہ|পরিচিতি|聯絡人|联系人|連絡先|liên lạc|kişi|รายชื่อ|wizytówk|"
        "visitekaart|kenalan|संपर्क|कॉन्टैक्ट|연락처|névjegy|posjetnic|yhteystieto|vizitk")),
    ("<video>", stems(
        "video|wideo|видео|відео|βίντεο|וידאו|فيديو|ویدی|ویڈیو|ভিডিও|影片|视频|視訊|วิดีโอ|व्हिडी|वीडियो|비디오|동영상|ビデオ|動画")),
    ("<photo>", stems(
        "image|imatge|imagin|immagin|bild|billed|foto|photo|תמונה|изображ|зображ|εικόν|صور|تصویر|ইমেজ|圖|图|图像|照片|hình ảnh|görüntü|"
        "รูป|obráz|afbeelding|imej|इमेज|फ़ोटो|이미지|사진|画像|写真|kép |gambar|slika|kuva")),
    ("<voice>", stems(
        "audio|voice|ses |קול|аудио|аудіо|ήχο|صوت|صدا|آڈیو|অডিও|音訊|音频|語音|语音|音声|âm thanh|เสียง|ljud|zvuk|lyd |äänit|ऑडि|오디오|"
        "음성|hang ")),
    ("<file>", stems(
        "document|dokument|документ|מסמך|έγγραφ|مستند|سند|دستاویز|ডকুমেন্ট|文件|文档|tài liệu|belge|เอกสาร|dokumen|डॉक्यु|문서|"
        "ドキュメント|asiakirj")),
]
DELETED = whole(
    "this message was deleted|you deleted this message|you deleted this message as admin|diese nachricht wurde gelöscht|"
    "du hast diese nachricht gelöscht|se eliminó este mensaje|este mensaje fue eliminado|eliminaste este mensaje|"
    "ce message a été supprimé|vous avez supprimé ce message|questo messaggio è stato eliminato|hai eliminato questo messaggio|"
    "esta mensagem foi apagada|mensagem apagada|você apagou esta mensagem|apagou esta mensagem|dit bericht is verwijderd|"
    "u hebt dit bericht verwijderd|je hebt dit bericht verwijderd|ta wiadomość została usunięta|usunięto tę wiadomość|"
    "данное сообщение удалено|это сообщение удалено|вы удалили это сообщение|вы удалили данное сообщение|це повідомлення було видалено|"
    "ви видалили це повідомлення|bu mesaj silindi|bu mesajı sildiniz|detta meddelande raderades|det här meddelandet raderades|"
    "du raderade detta meddelande|du raderade det här meddelandet|denne meldingen ble slettet|du slettet denne meldingen|"
    "denne besked blev slettet|denne besked er blevet slettet|du slettede denne besked|du har slettet denne besked|"
    "tämä viesti poistettiin|poistit tämän viestin|tato zpráva byla odstraněna|tato zpráva byla smazána|tuto zprávu jste odstranil/a|"
    "tuto zprávu jste smazal/a|táto správa bola odstránená|túto správu ste odstránili|ez az üzenet törlésre került|"
    "törölted ezt az üzenetet|acest mesaj a fost șters|ați șters acest mesaj|αυτό το μήνυμα διαγράφηκε|διαγράψατε αυτό το μήνυμα|"
    "הודעה זו נמחקה|מחקת הודעה זו|מחקת את ההודעה הזו|تم حذف هذه الرسالة|لقد حذفت هذه الرسالة|أنت حذفت هذه الرسالة|این پیام حذف شد|"
    "این پیام حذف شده است|شما این پیام را حذف کردید|यह संदेश मिटाया गया|यह मैसेज डिलीट कर दिया गया है|आपने यह संदेश मिटाया|"
    "आपने यह मैसेज डिलीट किया|pesan ini telah dihapus|pesan ini dihapus|anda telah menghapus pesan ini|anda menghapus pesan ini|"
    "mesej ini telah dipadam|tin nhắn này đã bị xóa|tin nhắn này đã bị xoá|bạn đã xóa tin nhắn này|bạn đã xoá tin nhắn này|"
    "ข้อความนี้ถูกลบแล้ว|ข้อความนี้ได้ถูกลบ|คุณลบข้อความนี้|คุณได้ลบข้อความนี้|此訊息已刪除|您已刪除此訊息|这条消息已被删除|此消息已删除|您已删除这条消息|"
    "このメッセージは削除されました|このメッセージを削除しました|이 메시지는 삭제되었습니다|삭제된 메시지입니다|삭제한 메시지입니다|"
    "съобщението беше изтрито|изтрихте това съобщение|ova poruka je izbrisana|ova je poruka izbrisana|izbrisali ste ovu poruku|"
    "ова порука је обрисана|aquest missatge s'ha suprimit|aquest missatge està esborrat|has suprimit aquest missatge|"
    "has esborrat aquest missatge")
CALLS = whole(
    "null|missed voice call|missed video call|missed group voice call|missed group video call|verpasster sprachanruf|"
    "verpasster videoanruf|llamada perdida|llamada de voz perdida|videollamada perdida|appel vocal manqué|appel vidéo manqué|"
    "chamada de voz perdida|chamada de vídeo perdida|videochamada perdida|chiamata vocale persa|videochiamata persa|"
    "gemiste spraakoproep|gemist spraakgesprek|gemiste video-oproep|gemist videogesprek|nieodebrane połączenie|"
    "nieodebrane połączenie głosowe|nieodebrane połączenie wideo|пропущенный аудиозвонок|пропущенный голосовой вызов|"
    "пропущенный видеозвонок|пропущений аудіодзвінок|пропущений відеодзвінок|cevapsız sesli arama|cevapsız görüntülü arama|"
    "missat röstsamtal|missat videosamtal|tapt taleanrop|tapt videoanrop|mistet opkald|ubesvaret taleopkald|ubesvaret videoopkald|"
    "vastaamaton äänipuhelu|vastaamaton videopuhelu|zmeškaný hovor|zmeškaný hlasový hovor|zmeškaný videohovor|nem fogadott hanghívás|"
    "nem fogadott videóhívás|apel vocal nepreluat|apel video nepreluat|αναπάντητη κλήση|αναπάντητη φωνητική κλήση|"
    "αναπάντητη βιντεοκλήση|שיחה קולית שלא נענתה|שיחת וידאו שלא נענתה|مكالمة صوتية فائتة|مكالمة فيديو فائتة|تماس صوتی پاسخ داده نشده|"
    "تماس تصویری پاسخ داده نشده|panggilan suara tak terjawab|panggilan video tak terjawab|cuộc gọi nhỡ|cuộc gọi nhỡ video|未接語音通話|"
    "未接视频通话|未接语音通话|未接視像通話|不在着信|音声通話不在着信|ビデオ通話不在着信|부재중 전화|부재중 영상통화")
WAITING = tuple(whole(  # "…This may take a while." follows
    "waiting for this message|warten auf diese nachricht|auf diese nachricht warten|diese nachricht wird erwartet|"
    "esperando este mensaje|esperando el mensaje|en attente de ce message|en attente du message|aguardando esta mensagem|"
    "aguardando mensagem|in attesa del messaggio|in attesa di questo messaggio|wachten op dit bericht|oczekiwanie na wiadomość|"
    "oczekiwanie na tę wiadomość|ожидание сообщения|ожидание этого сообщения|в ожидании данного сообщения|bu mesaj bekleniyor|"
    "menunggu pesan ini"))
BY_ADMIN = tuple(whole("this message was deleted by admin|diese nachricht wurde von admin|este mensaje fue eliminado por el admin"))
LIVE = whole(
    "live location shared|live-standort wird geteilt|ubicación en tiempo real compartida|localisation en direct partagée|"
    "localização atual compartilhada|posizione attuale condivisa|live locatie gedeeld|геоданные отправлены|геодані надіслано|"
    "mevcut konum paylaşıldı|liveposition delad|live placering delt|udostępniona transmisja położenia|lokasi terkini dibagikan")
SYSTEM = stems(
    r'["“„«「]|\w{5,}[.] |\b(?:added|changed|created|joined|left\b|removed|encrypted|hinzugefügt|geändert|erstellt|verlassen|entfernt|'
    r"verschlüsselt|añadió|cambió|creó\b|salió|cifrad|ajouté|modifié|créé|quitté|chiffr|adicionou|mudou|alterou|criou|saiu|aggiunto|cambiato|"
    r"creato|crittograf|toegevoegd|gewijzigd|добавил|изменил|создал|покинул|удалил|шифр|ekledi|değiştirdi|oluşturdu)")
# fmt: on
FILES = [  # what an attachment is, by its name
    ("<gif>", re.compile(r"-GIF-|\.gif$", re.I)),
    ("<sticker>", re.compile(r"^STK-|-STICKER-|\.webp$", re.I)),
    ("<voice>", re.compile(r"^(?:PTT|AUD)-|-AUDIO-|\.opus$", re.I)),
    ("<contact>", re.compile(r"\.vcf$", re.I)),
    ("<photo>", re.compile(r"\.(?:jpe?g|png|heic)$", re.I)),
    ("<video>", re.compile(r"\.(?:mp4|mov|3gp|avi|mkv|webm)$", re.I)),
]
OPENED, CLOSED = "“„«「", "”»」"
OWN_NAME = re.compile(r"(?:IMG|VID|AUD|PTT|STK|DOC)-\d{8}-WA\d|\d{5,}-")  # Android's, the iPhone's
TAGGED = re.compile(r"<[^<>:：\n]{1,40}[:：]\s?([^<>/\\\0\n]{1,255})>")  # <attached: 00000012-PHOTO-….jpg>
NOTED = re.compile(r"([^/\\\0]{1,255}\.\w{1,8}) [(<](.{2,60})[)>]")  # IMG-20210314-WA0003.jpg (file attached)
DOCUMENT = re.compile(r"(?!www|http).{1,255}\.[a-z]\w{1,4}(?: • .{1,40})?", re.I)  # Report.pdf • 2 pages
LOCATION = re.compile(r"[^\n:：]{2,30}[:：] ?(?:.{0,300}\s)?https://(?:maps\.google\.com/\?q=-?\d|foursquare\.com/v/)\S*", re.S)
OPTION = re.compile(r"[^:：]{2,25}[:：] .*\(\D{0,3}\d[^()]*\)")  # OPTION: Pizza (2 votes)
MENTION = re.compile("@\u2068([^\u2068\u2069]{0,100})\u2069")
COPY = re.compile(r"(?:\s?\(\d{1,2}\)|_\d{1,2})+$")
TITLE = re.compile(
    r".{0,30}?WhatsApp.{0,20}?\s(?:[-–]|with|mit|con|com|avec|met|med|amb|cu|[сз] контактом|[сз]|z|s uživatelem|s používateľom|s|"
    r"dengan|με) (.+)|(.+) ile WhatsApp.*",
    re.I,
)


class Front(NamedTuple):
    """What a message's line begins with. `shape`: what is the same in every line of one file."""

    shape: tuple
    date: tuple  # three numbers, in the order of the file
    clock: tuple  # hour of 24, minute, second
    habit: str  # the order that such lines have where nothing else says it
    rest: str


def front(line):
    """→ Front, or None for a line that continues a message."""
    match = next(filter(None, (pattern.match(line) for pattern in FRONTS)), None)
    if not match:
        return None
    before, after = word(match["before"]), word(match["after"])
    half = next((w for w in (before, after) if w in MORNING or w in EVENING), None)
    if any(w not in FILLER and w != half for w in (before, after)) or bool(match["open"]) != match["end"].startswith("]"):
        return None
    a, first, b, second, c, hour, minute, seconds = match.group("a", "first", "b", "second", "c", "hour", "minute", "seconds")
    hour = int(hour) % 12 + 12 * (half in EVENING) if half else int(hour)
    marks = [s.translate(UNSEEN) for s in (match["open"], first, second, match["end"])]
    places = [None if w == half else w for w in (before, after)]  # am and pm are one shape
    shape = (*marks, *places, "," in match["before"], len(a) > 2, len(c) > 2, bool(seconds), match.re is FRONTS[0])
    american = marks[1] == "/" and match["after"].strip(BLANK) in ("AM", "PM") and "0" not in (a[0], b[0])
    habit = "month first" if american else "year first" if half in EASTERN else "day first"
    return Front(shape, (int(a), int(b), int(c)), (hour, int(minute), int(seconds or 0)), habit, line[match.end() :])


def moment(found, order):
    """The local time in that order of day, month and year; None where there is no such date."""
    year, month, day = (found.date[place] for place in ORDERS[order])
    if year < 100:
        year += 2000 if year < 52 else 1957  # Thailand's years: 2564 was 2021
    elif year > 2400:
        year -= 543
    try:
        return datetime.datetime(year, month, day, *found.clock) if 1970 <= year < 2100 else None
    except ValueError:
        return None


def lines(source, notes):
    rest = ""
    for piece in source.pieces(notes):
        *ended, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in ended)
        rest = rest[: 2 * LONGEST]  # a line without end
    yield rest


def signed(rest):
    """`Bob: hi` → (display name, text); the name is "" where there is none, as in a system line."""
    match = AUTHOR.match(rest)
    name = display(match[1]) if match else ""
    return (name, rest[match.end() :]) if 0 < len(name) <= 60 else ("", rest)


def display(name):
    """Of `~ Bob`, as a group shows whom the phone has no name for, and of what marks of direction wrap: Bob."""
    name = "".join(c for c in unicodedata.normalize("NFC", name) if c not in MARKS)
    return " ".join(name.strip().removeprefix("~").split())


class Survey:
    """What the lines of one shape say together."""

    def __init__(self):
        self.count, self.habits, self.names = 0, set(), {}
        self.wrong, self.last, self.years = collections.Counter(), {}, {order: set() for order in ORDERS}

    def add(self, found):
        self.count += 1
        self.habits.add(found.habit)
        for order in ORDERS:
            at = moment(found, order)
            self.wrong[order] += not at or at < self.last.get(order, at)
            if at:
                self.last[order] = at
                self.years[order].add(at.year)
        name, text = signed(found.rest)
        if name and (name in self.names or len(self.names) < MOST_PEOPLE):
            times, wrote = self.names.get(name, (0, False))
            self.names[name] = times + 1, wrote or content(text, found.shape[0])[1] != "service messages"

    def order(self):
        habit = "day first" if len(self.habits) > 1 else next(iter(self.habits), "")
        return min(ORDERS, key=lambda order: (self.wrong[order], max(2, len(self.years[order])), order != habit))

    def people(self):
        return {name for name, (times, wrote) in self.names.items() if wrote and is_person(name, times)}


def is_person(name, times):
    unclosed = sum(name.count(c) for c in OPENED) > sum(name.count(c) for c in CLOSED) or name.count('"') % 2
    return not (unclosed and len(name.split()) > 3) and (times > 1 or not SYSTEM.search(fold(name)))


def recognises(head):
    """Whether a file that begins so is a WhatsApp chat."""
    whole_lines = [line for line in head.split("\n") if line.strip(BLANK)]
    fronts = [f if (f := front(line)) and any(moment(f, order) for order in ORDERS) else None for line in whole_lines]
    dated = [f for f in fronts if f]
    if not dated or not (fronts[0] or sum(map(bool, fronts[:40])) > 2):
        return False
    log = LOG.match(whole_lines[fronts.index(dated[0])]) and LRM not in head  # WhatsApp begins a chat with a line of its own
    return not log and any(signed(f.rest)[0] for f in dated)


def read(source, notes):
    """See `exports.read`; the file is read twice. What is odd in it is counted in `notes`."""
    surveys = collections.defaultdict(Survey)
    for line in lines(source, collections.Counter()):
        if found := front(line):
            surveys[found.shape].add(found)
    shape, survey = max(surveys.items(), key=lambda item: item[1].count, default=(None, Survey()))
    people = survey.people()
    name = chat_name(source)
    known = name or ", ".join(sorted(people))
    number = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()  # the id is written into data/: no name, no number of a contact
    kind = "personal_chat" if len(people) < 3 else "private_group"
    chat = Chat(f"whatsapp:{known}", f"whatsapp:{number}", kind, name or "WhatsApp", None)
    yield chat, messages(source, notes, shape, survey.order(), people)


def blocks(source, notes, shape, order):
    """Each message of the file: its local time, and its text behind the front, continued lines too."""
    time, parts, size = None, [], 0
    for line in lines(source, notes):
        found = front(line)
        new = moment(found, order) if found and found.shape == shape else None
        if found and not new:
            notes["lines with a date of another format, kept as text"] += 1
        if new:
            if time:
                yield time, "\n".join(parts)
            time, parts, size, line = new, [], 0, found.rest
        elif not time:
            notes["lines before the first message"] += 1
            continue
        if size <= LONGEST:
            parts.append(line[: LONGEST - size])
            size += len(line) + 1
            if size > LONGEST:
                notes["messages cut to a million characters"] += 1
    if time:
        yield time, "\n".join(parts)


def messages(source, notes, shape, order, people):
    last = None
    for time, text in blocks(source, notes, shape, order):
        last = forward(int((time - EPOCH).total_seconds()), last)
        name, said = signed(text)
        if name in people:
            said, left_out = content(said, shape[0], source.beside)
            yield Message(None, f"whatsapp:{name}", name, last, time.isoformat(), said, left_out)
        else:
            yield Message(None, None, None, last, time.isoformat(), text.strip(BLANK), "service messages")


def content(text, iphone, beside=lambda name: None):
    """What stands behind a name → (text, why it is left out). `beside`: reads the transcript of a voice message, see `Source.beside`."""
    text = MENTION.sub(r"@\1", unedited(text))
    plain = text.strip(BLANK)
    key = plain[:200].casefold().rstrip(".。।")
    if key in DELETED or key.startswith(BY_ADMIN):
        return plain, "deleted messages"
    if key in CALLS or (len(plain) < 200 and key.startswith(WAITING)):
        return plain, "service messages"
    mark, file, caption = media(text, plain, key)
    if caption and not (mark == "<file>" and DOCUMENT.fullmatch(caption)):
        return caption, ""
    if mark == "<voice>" and file:
        mark = (beside(PurePath(file).stem + ".txt") or "")[:LONGEST].strip(BLANK) or mark
    if mark:
        return mark, ""
    if iphone and text.startswith(LRM) and not plain.endswith(":"):  # of a poll the first pass sees `POLL:` only
        return plain, "service messages"
    return plain, "" if plain else "messages without text"


def unedited(text):
    """Without the `<This message was edited>` that WhatsApp hangs on."""
    body, _, tail = text.rstrip(BLANK).rpartition("<")
    tail = tail.strip(MARKS)
    phrase = 4 < len(tail) < 60 and tail.endswith(">") and (" " in tail or not tail.isascii())
    return body if phrase and EDITED.search(fold(tail)) else text


def media(text, plain, key):
    """→ (the mark of what was sent or "", its file's name or "", the caption or ""). `plain`: `text` stripped; `key`: in small letters."""
    if key in LIVE or LOCATION.fullmatch(plain[:1000]):
        return "<location>", "", ""
    first, _, rest = plain.partition("\n")
    _, several, option = rest.rpartition("\n")
    if several and len(first) < 30 and first.endswith((":", "：")) and first == first.upper() and OPTION.fullmatch(option):
        return "<poll>", "", ""
    written = text.startswith(tuple(MARKS))
    if match := TAGGED.search(text):
        if text[match.start() - 1 : match.start()] in tuple(MARKS) or OWN_NAME.match(match[1]):
            return by_name(match[1]), match[1], (text[: match.start()] + text[match.end() :]).strip(BLANK)
    if len(first) < 400 and (match := NOTED.fullmatch(first)):
        if written or OWN_NAME.match(match[1]) or ATTACHED.search(fold(match[2])):
            return by_name(match[1]), match[1], rest.strip(BLANK)
    if len(first) < 80 and first.startswith("<") and first.endswith(">"):
        if found := omitted(first) or MEDIA.search(fold(first)) and "<file>":
            return found, "", rest.strip(BLANK)
    before, mark, phrase = text.rstrip(BLANK).rpartition(LRM)
    phrase, _, rest = phrase.partition("\n")
    if mark and len(phrase) < 60 and (found := omitted(phrase)):
        return found, "", f"{before}\n{rest}".strip(BLANK)
    return "", "", ""


def by_name(file):
    return next((mark for mark, name in FILES if name.search(file)), "<file>")


def omitted(phrase):
    """The mark of `Bild weggelassen`; "" where the phrase is none of these."""
    phrase = fold(phrase)
    return next((mark for mark, kind in KINDS if kind.search(phrase)), "") if OMITTED.search(phrase) else ""


def chat_name(source):
    """As the file's name says; where that is always the same, as the zip's or the folder's does; "" where none says WhatsApp."""
    stem = source.path.stem
    if re.fullmatch(r"_?chat[\s\d()_-]*", stem, re.I):
        outer = [source.archive.stem if source.archive else "", source.path.parent.name]
        stem = next((name for name in outer if "whatsapp" in name.casefold()), "")
    stem = display(COPY.sub("", stem.replace("_", " ") if " " not in stem and "whatsapp" in stem.casefold() else stem))
    match = TITLE.fullmatch(stem)
    return display(match[1] or match[2]) if match else stem
