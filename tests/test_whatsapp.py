import collections
import datetime
import re
import time
import zipfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import exports
import exports.source
from cli import UserError
from exports import whatsapp

LRM, NBSP, NNBSP = "\u200e", "\u00a0", "\u202f"


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode())
    return path


@pytest.fixture
def file(tmp_path):
    return lambda *lines: write(tmp_path / "WhatsApp Chat with Bob.txt", *lines)


def read(path, notes=None):
    return [(chat, list(messages)) for chat, messages in exports.read(path, notes)]


def messages(path, notes=None):
    [(_, found)] = read(path, notes)
    return found


def dates(path):
    return [m.date for m in messages(path)]


def android(*texts, author="Bob"):
    """Lines of one author, a minute between them."""
    return [f"14/03/2021, 10:{i:02} - {author}: {text}" for i, text in enumerate(texts)]


def iphone(*texts, author="Bob"):
    return [f"[14.03.21, 10:{i:02}:33] {author}: {text}" for i, text in enumerate(texts)]


SHAPES = {  # as phones of these languages write five past ten in the evening of 14 March 2021
    "English, Android": "14/03/2021, 22:05 - ",
    "United States, Android": "3/14/21, 10:05 PM - ",
    "United States since iOS 16": f"[3/14/21, 10:05:33{NNBSP}PM] ",
    "United States, old iPhone": "3/14/21, 10:05:33 PM: ",
    "Canada": "2021-03-14, 10:05 p.m. - ",
    "Canada, French": "2021-03-14 22 h 05 - ",
    "Canada, French, iPhone": f"[2021-03-14, 22{NBSP}h{NBSP}05{NBSP}min{NBSP}33{NBSP}s] ",
    "South Africa": "2021/03/14, 22:05 - ",
    "India": "14/03/21, 10:05 pm - ",
    "German": "14.03.21, 22:05 - ",
    "German, iPhone": "[14.03.21, 22:05:33] ",
    "Austrian, twelve hours": "14.03.21, 10:05 nachm. - ",
    "Spanish": "14/3/21 22:05 - ",
    "Colombia": f"14/3/2021, 10:05 p.{NBSP}m. - ",
    "Mexico, iPhone": f"[14/03/21, 10:05:33{NNBSP}p.m.] ",
    "Argentina, iPhone": f"[14/3/21 10:05:33 p.{NNBSP}m.] ",
    "French": "14/03/2021 à 22:05 - ",
    "Finnish, iPhone": "[14.3.2021 klo 22.05.33] ",
    "Dutch": "14-03-2021 22:05 - ",
    "Swedish": "2021-03-14 22:05 - ",
    "Danish": "14.03.2021 22.05 - ",
    "Czech": "14.03.21 22:05 - ",
    "Slovak": "14. 3. 2021, 22:05 - ",
    "Croatian": "14. 03. 2021. 22:05 - ",
    "Hungarian": "2021. 03. 14. 22:05 - ",
    "Hungarian, twelve hours": "2021. 03. 14. du. 10:05 - ",
    "Bulgarian": f"14.03.21{NNBSP}г., 22:05{NBSP}ч. - ",
    "Greek": "14/3/21, 10:05 μ.μ. - ",
    "Turkish": "14.03.2021 ÖS 10:05 - ",
    "Indonesian": "14/03/21 22.05 - ",
    "Hebrew": "14.3.2021, 22:05 - ",
    "Hebrew, twelve hours": "[14.3.2021, 10:05:33 אחה״צ] ",
    "Arabic": "\u200f١٤\u200f/٣\u200f/٢٠٢١، ١٠:٠٥ م - ",
    "Persian, twelve hours": "۲۰۲۱/۳/۱۴، ۱۰:۰۵ ب.ظ. - ",
    "Thai": "14/3/2564 22:05 - ",
    "Thai, two digits": "14/3/64 22:05 - ",
    "Chinese": "2021/3/14 22:05 - ",
    "Taiwan": "2021/3/14 下午10:05 - ",
    "Japanese": "2021/03/14, 22:05 - ",
    "Korean": "2021. 3. 14. 오후 10:05 - ",
    "English, AM and PM first": "14/3/21, PM 10:05 - ",
    "nothing between": "14.03.202122:05 - ",
    "copied from WhatsApp Web": "[10:05 PM, 3/14/2021] ",
    "marked at the front": f"{LRM}[14/03/21, 22:05:33] ",
}


@pytest.mark.parametrize("front", SHAPES.values(), ids=SHAPES)
def test_the_line_of_every_phone_is_a_message(file, front):
    [chat, [message]] = read(file(front + "Bob: it is late"))[0]
    seconds = "33" if "33" in front else "00"
    assert message == exports.Message(
        None, "whatsapp:Bob", "Bob", message.at, f"2021-03-14T22:05:{seconds}", "it is late"
    )
    assert message.at == datetime.datetime.fromisoformat(message.date + "+00:00").timestamp()


@pytest.mark.parametrize(
    "written, hour",
    [("12:05 AM", 0), ("1:05 AM", 1), ("12:05 PM", 12), ("1:05 PM", 13), ("0:05 PM", 12)],
)
def test_midnight_is_twelve_am_and_noon_twelve_pm(file, written, hour):
    assert dates(file(f"14/03/2021, {written} - Bob: hi")) == [f"2021-03-14T{hour:02}:05:00"]


def test_a_day_over_twelve_says_the_order_of_the_whole_file(file):
    assert dates(file("3/4/21, 10:00 - Bob: a", "3/14/21, 10:00 - Bob: b")) == [
        "2021-03-04T10:00:00",
        "2021-03-14T10:00:00",
    ]
    assert dates(file("3/4/21, 10:00 - Bob: a", "14/4/21, 10:00 - Bob: b")) == [
        "2021-04-03T10:00:00",
        "2021-04-14T10:00:00",
    ]


def test_the_order_in_which_time_runs_forward_is_taken(file):
    month_first = ["01/12/2021", "02/03/2021", "02/11/2021", "03/02/2021"]
    assert [d[:10] for d in dates(file(*(f"{d}, 10:00 - Bob: hi" for d in month_first)))] == [
        "2021-01-12",
        "2021-02-03",
        "2021-02-11",
        "2021-03-02",
    ]
    year_first = ["20. 11. 30.", "20. 12. 1.", "20. 12. 31.", "21. 1. 1."]
    assert [d[:10] for d in dates(file(*(f"{d} 오후 10:00 - Bob: hi" for d in year_first)))] == [
        "2020-11-30",
        "2020-12-01",
        "2020-12-31",
        "2021-01-01",
    ]


def test_of_two_digit_dates_the_year_is_the_number_that_stays(file):
    assert [
        d[:10] for d in dates(file(*(f"21. 3. {d}. 오후 10:00 - Bob: hi" for d in (14, 15, 16))))
    ] == [
        "2021-03-14",
        "2021-03-15",
        "2021-03-16",
    ]
    assert [
        d[:10] for d in dates(file(*(f"{d}.03.21, 22:00 - Bob: hi" for d in (14, 15, 16))))
    ] == [
        "2021-03-14",
        "2021-03-15",
        "2021-03-16",
    ]


@pytest.mark.parametrize("front, month", [("3/4/21, 10:05 PM - ", 3), ("[3/4/21, 10:05:33 PM] ", 3), ("03/04/21, 10:05 PM - ", 4), ("3/4/21, 10:05 pm - ", 4), ("3/4/21, 22:05 - ", 4), ("3.4.21, 22:05 - ", 4)])  # fmt: skip
def test_where_nothing_says_it_only_the_united_states_put_the_month_first(file, front, month):
    assert dates(file(front + "Bob: hi"))[0].startswith(f"2021-{month:02}-")


def test_what_does_not_begin_as_the_file_s_lines_do_continues_a_message(file):
    lines = ["14/03/2021, 10:00 - Bob: first", "", "second: really", "14.03.21 is the day", "[14/03/2021, 10:00:00] Eve: pasted", "13/13/2021, 10:00 - Bob: no such month", "14/03/2021, 25:00 - Bob: no such hour", "14/03/2021, 10:01 - Ann: last"]  # fmt: skip
    notes = collections.Counter()
    assert [(m.name, m.text) for m in messages(file(*lines), notes)] == [
        ("Bob", "\n".join(lines[:-1])[24:].removeprefix(" ")),
        ("Ann", "last"),
    ]
    assert notes == {"lines with a date of another format, kept as text": 3}


def test_lines_may_end_as_in_windows_and_utf16(tmp_path):
    text = "\r\n".join([*android("one\r\ntwo", "three")])
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.txt"
        path.write_bytes(text.encode(encoding))
        assert [m.text for m in messages(path)] == ["one\ntwo", "three"]


def test_the_order_of_the_file_is_kept(file):
    lines = [
        "14/03/2021, 10:05 - Bob: late",
        "14/03/2021, 09:00 - Ann: early",
        "15/03/2021, 10:00 - Bob: then",
    ]
    assert [m.text for m in messages(file(*lines))] == ["late", "early", "then"]
    assert [m.at for m in messages(file(*lines))] != sorted(m.at for m in messages(file(*lines)))


def test_the_hour_that_repeats_is_no_way_back(file):
    found = messages(
        file(
            "31/10/2021, 02:59 - Bob: summer",
            "31/10/2021, 02:01 - Ann: winter",
            "31/10/2021, 03:05 - Bob: on",
        )
    )
    assert [m.at for m in found] == sorted(m.at for m in found)
    assert found[1].date == "2021-10-31T02:01:00"


SYSTEM = [
    "Messages and calls are end-to-end encrypted. No one outside of this chat, not even WhatsApp, can read or listen to them. Tap to learn more.",
    'Ann created group "Trip: Rome"',
    "Ann changed the subject from “Trip: Rome” to “Trip: Pisa”",
    "Ann changed the subject from “Trip: Rome” to “Trip: Nice”",
    "Ann hat den Betreff von „Reise: Rom“ zu „Reise: Nizza“ geändert",
    "Ann added this group to the community: Climbers",
    "Ваш код безопасности изменился. Подробнее: здесь",
    "+49 170 1234567 left",
]


def test_system_lines_are_nobody_s_even_with_a_colon(file):
    lines = (
        android("hi")
        + [f"14/03/2021, 11:00 - {line}" for line in SYSTEM]
        + android("yes", author="Ann")
    )
    [[chat, found]] = read(file(*lines))
    assert [(m.author, m.text, m.left_out) for m in found if m.left_out] == [
        (None, line, "service messages") for line in SYSTEM
    ]
    assert (chat.type, {m.name for m in found}) == ("personal_chat", {"Ann", "Bob", None})


def test_on_an_iphone_what_begins_with_a_mark_is_whatsapp_s(file):
    lines = iphone("hi", f"{LRM}Missed voice call", f"{LRM}Videoanruf, {LRM}5 Min") + iphone(
        f"{LRM}Ann created this group", author="Trip"
    )
    [[chat, found]] = read(file(*lines))
    assert [(m.name, m.left_out) for m in found] == [
        ("Bob", ""),
        ("Bob", "service messages"),
        ("Bob", "service messages"),
        (None, "service messages"),
    ]
    assert chat.type == "personal_chat"


@pytest.mark.parametrize("written, name", [("Dr. Smith", "Dr. Smith"), ("\u202a+49 170 1234567\u202c", "+49 170 1234567"), (f"~{NNBSP}Zoë", "Zoë"), ("Zoe\u0308", "Zoë"), (f"Ann{NBSP} B", "Ann B"), ('Bob "Bo" B', 'Bob "Bo" B'), ("👩‍👧 Mum", "👩‍👧 Mum"), ("x" * 60, "x" * 60)])  # fmt: skip
def test_a_name_is_what_one_reads(file, written, name):
    for message in messages(file(*android("hi", "there", author=written))):
        assert (message.name, message.author, message.left_out) == (name, f"whatsapp:{name}", "")


def test_a_group_has_more_than_two_who_wrote(file):
    [[chat, _]] = read(
        file(*android("hi"), *android("hi", author="Ann"), *android("hi", author="Eve"))
    )
    assert (chat.key, chat.type, chat.name, chat.owner) == (
        "whatsapp:Bob",
        "private_group",
        "Bob",
        None,
    ) and "Bob" not in chat.id


MEDIA = [  # what an Android phone writes, the mark
    ("<Media omitted>", "<file>"),
    ("<Medien ausgeschlossen>", "<file>"),
    ("<Multimedia omitido>", "<file>"),
    ("<Médias omis>", "<file>"),
    ("<Mídia oculta>", "<file>"),
    ("<Media omessi>", "<file>"),
    ("<Media weggelaten>", "<file>"),
    ("<pominięto multimedia>", "<file>"),
    ("<Без медиафайлов>", "<file>"),
    ("<Файл пропущен>", "<file>"),
    ("<Медіа пропущено>", "<file>"),
    ("<Medya dahil edilmedi>", "<file>"),
    ("<Média vynechány>", "<file>"),
    ("<המדיה לא נכללה>", "<file>"),
    ("<تم استبعاد الوسائط>", "<file>"),
    ("<मीडिया के बिना>", "<file>"),
    ("<Media tidak disertakan>", "<file>"),
    ("<省略多媒体文件>", "<file>"),
    ("<メディアは含まれていません>", "<file>"),
    ("<미디어 파일을 제외한 내용>", "<file>"),
    ("<Video note omitted>", "<video>"),
    ("IMG-20210314-WA0003.jpg (file attached)", "<photo>"),
    ("IMG-20210314-WA0003.jpg (Datei angehängt)", "<photo>"),
    (f"{LRM}IMG-20210314-WA0003.jpg (in a tongue of the future)", "<photo>"),
    ("PTT-20210314-WA0003.opus (archivo adjunto)", "<voice>"),
    ("VID-20210314-WA0003.mp4 (fichier joint)", "<video>"),
    ("STK-20210314-WA0003.webp (файл добавлен)", "<sticker>"),
    ("Report of the year.pdf (bestand bijgevoegd)", "<file>"),
    ("Report.pdf (file attached)\nReport.pdf", "<file>"),
    (f"{LRM}Bob.vcf (arquivo anexado)", "<contact>"),
    ("location: https://maps.google.com/?q=52.51,13.40", "<location>"),
    ("Standort: https://maps.google.com/?q=-52.51,13.40", "<location>"),
    ("live location shared", "<location>"),
    ("POLL:\nWhere to?\nOPTION: Rome (2 votes)\nOPTION: Pisa (0 votes)", "<poll>"),
    ("UMFRAGE:\nWohin?\nOPTION: Rom (2 Stimmen)", "<poll>"),
]
MEDIA_OF_IPHONES = [
    ("image omitted", "<photo>"),
    ("Bild weggelassen", "<photo>"),
    ("imagen omitida", "<photo>"),
    ("image absente", "<photo>"),
    ("изображение отсутствует", "<photo>"),
    ("画像は含まれていません", "<photo>"),
    ("video omitted", "<video>"),
    ("vídeo omitido", "<video>"),
    ("audio omitted", "<voice>"),
    ("ses dahil edilmedi", "<voice>"),
    ("GIF omitted", "<gif>"),
    ("GIF retiré", "<gif>"),
    ("sticker omitted", "<sticker>"),
    ("figurinha omitida", "<sticker>"),
    ("document omitted", "<file>"),
    ("Contact card omitted", "<contact>"),
    ("Kontaktkarte ausgelassen", "<contact>"),
    ("<attached: 00000012-PHOTO-2021-03-14-22-05-33.jpg>", "<photo>"),
    ("<Anhang: 00000012-VIDEO-2021-03-14-22-05-33.mp4>", "<video>"),
    ("<adjunto: 00000012-AUDIO-2021-03-14-22-05-33.opus>", "<voice>"),
    ("<pièce jointe : 00000012-GIF-2021-03-14-22-05-33.mp4>", "<gif>"),
    ("<附件：00000012-STICKER-2021-03-14-22-05-33.webp>", "<sticker>"),
    ("<прикреплено: 00000012-Bob.vcf>", "<contact>"),
    ("<attached: 00000012-Report.pdf>", "<file>"),
    ("Location: Ristorante Roma (Via Appia 1): https://foursquare.com/v/4b5", "<location>"),
    (f"POLL:\nWhere to?\n{LRM}OPTION: Rome ({LRM}2 votes)", "<poll>"),
]


@pytest.mark.parametrize("written, mark", MEDIA)
def test_what_android_left_out_becomes_a_mark(file, written, mark):
    assert [(m.text, m.left_out) for m in messages(file(*android(written)))] == [(mark, "")]


@pytest.mark.parametrize("written, mark", MEDIA_OF_IPHONES)
def test_what_an_iphone_left_out_becomes_a_mark(file, written, mark):
    assert [(m.text, m.left_out) for m in messages(file(*iphone(LRM + written)))] == [(mark, "")]


def test_a_caption_is_the_text(file):
    lines = iphone(f"the sea\nat night {LRM}image omitted", f"the hills {LRM}<attached: 00000012-PHOTO-2021-03-14-22-05-33.jpg>", f"{LRM}<attached: 00000013-PHOTO-2021-03-14-22-05-33.jpg>\nthe town", f"{LRM}Report.pdf • {LRM}2 pages {LRM}document omitted")  # fmt: skip
    assert [m.text for m in messages(file(*lines))] == [
        "the sea\nat night",
        "the hills",
        "the town",
        "<file>",
    ]
    lines = android(
        "IMG-20210314-WA0003.jpg (file attached)\nthe sea\nat night",
        "<Media omitted>\nat 5.30",
        "<Media omitted>\n4 pages.pdf",
    )
    assert [m.text for m in messages(file(*lines))] == ["the sea\nat night", "at 5.30", "<file>"]


@pytest.mark.parametrize("typed", ["image omitted", "<3 you", "I omitted the video <b>", "audio omitted <3", "see photo.jpg (nice one)", "<attached: this>", "<sighs and goes away>", "deleted this message", "this message was deleted?", "Location: my place", "<this is my credit card>", "TODO:\nmilk", "who are you: Bob (2)"])  # fmt: skip
def test_what_a_person_could_type_is_text(file, typed):
    for lines in (android(typed), iphone(typed)):
        assert [(m.text, m.left_out) for m in messages(file(*lines))] == [(typed, "")]


def test_a_transcript_beside_a_voice_message_is_its_text(file, tmp_path):
    write(tmp_path / "PTT-20210314-WA0003.txt", "\ufeff  I'm late, ", "sorry\n")
    write(tmp_path / "PTT-20210314-WA0004.txt", " \n")
    path = file(
        *android(
            "PTT-20210314-WA0003.opus (file attached)",
            "PTT-20210314-WA0004.opus (file attached)",
            "PTT-20210314-WA0005.opus (file attached)",
        )
    )
    assert [m.text for m in messages(path)] == ["I'm late, \nsorry", "<voice>", "<voice>"]
    archive = tmp_path / "WhatsApp Chat - Bob.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr(
            "_chat.txt", iphone(f"{LRM}<attached: 00000012-AUDIO-2021-03-14-22-05-33.opus>")[0]
        )
        out.writestr("00000012-AUDIO-2021-03-14-22-05-33.txt", "soon")
    assert [m.text for m in messages(archive)] == ["soon"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..\\secret", "a\0b", "x" * 300])
def test_an_attachment_s_name_leads_nowhere_else(file, tmp_path, name):
    write(tmp_path.parent / "secret.txt", "secret")
    [message] = messages(file(*android(f"{LRM}PTT-20210314-WA0003/{name}.opus (file attached)")))
    assert "secret\n" not in message.text and message.text != "secret"
    [message] = messages(file(*iphone(f"{LRM}<attached: 00000012-AUDIO-{name}.opus>")))
    assert message.text != "secret"


DELETED = ["This message was deleted", "You deleted this message", "Diese Nachricht wurde gelöscht.", "Du hast diese Nachricht gelöscht.", "Данное сообщение удалено", "Se eliminó este mensaje.", "Ce message a été supprimé", "このメッセージは削除されました。", "This message was deleted by admin Ann."]  # fmt: skip
SERVICE = [
    "Missed voice call",
    "Verpasster Videoanruf",
    "Пропущенный голосовой вызов",
    "Waiting for this message. This may take a while.",
    "null",
]


def test_deleted_messages_and_missed_calls_keep_their_author(file):
    for lines in (android, iphone):
        found = messages(file(*lines("hi", *DELETED, *SERVICE)))
        assert {m.name for m in found} == {"Bob"}
        assert [m.left_out for m in found] == [""] + ["deleted messages"] * len(DELETED) + [
            "service messages"
        ] * len(SERVICE)


@pytest.mark.parametrize("suffix", [" <This message was edited>", f" {LRM}<This message was edited>", " <Diese Nachricht wurde bearbeitet.>", " <Сообщение изменено>", f" {LRM}<Se editó este mensaje.>", "<此訊息已編輯>"])  # fmt: skip
def test_that_a_message_was_edited_is_cut_off(file, suffix):
    assert [m.text for m in messages(file(*android("so <b>\nit is" + suffix)))] == ["so <b>\nit is"]


def test_marks_of_direction_are_taken_from_the_front_and_from_mentions(file):
    found = messages(
        file(
            *android(
                f"{LRM}\u202ahi\u202c there",
                "@\u2068~ Ann\u2069 and @\u2068Eve\u2069!",
                "\u200f \ufeff",
                "",
            )
        )
    )
    assert [(m.text, m.left_out) for m in found] == [
        ("hi\u202c there", ""),
        ("@~ Ann and @Eve!", ""),
        ("", "messages without text"),
        ("", "messages without text"),
    ]


NAMES = {
    "WhatsApp Chat with Bob.txt": "Bob",
    "WhatsApp Chat with Bob (1).txt": "Bob",
    "WhatsApp Chat with Bob_1.txt": "Bob",
    "WhatsApp_Chat_with_Bob_B.txt": "Bob B",
    "WhatsApp-Chat mit Bob - Arbeit.txt": "Bob - Arbeit",
    "Chat de WhatsApp con Bob.txt": "Bob",
    "Conversa do WhatsApp com Bob.txt": "Bob",
    "Discussion WhatsApp avec Zoe\u0308.txt": "Zoë",
    "Чат WhatsApp с контактом Bob.txt": "Bob",
    "Bob ile WhatsApp Sohbeti.txt": "Bob",
    "WhatsApp Chat - Bob/_chat.txt": "Bob",
    "WhatsApp Chat - Bob (2)/_chat (1).txt": "Bob",
    "Downloads/_chat.txt": "Ann, Bob",
    "Downloads/chat.txt": "Ann, Bob",
    "Downloads/trip.txt": "trip",
}


@pytest.mark.parametrize("path, name", NAMES.items())
def test_a_chat_is_called_as_its_file_or_its_folder_says(tmp_path, path, name):
    [[chat, _]] = read(write(tmp_path / path, *android("hi"), *android("ho", author="Ann")))
    shown = "WhatsApp" if name == "Ann, Bob" else name  # a name that we make up names nobody
    assert (chat.key, chat.type, chat.name, chat.owner) == (
        f"whatsapp:{name}",
        "personal_chat",
        shown,
        None,
    )


@pytest.mark.parametrize("archive, member, name", [("WhatsApp Chat - Bob.zip", "_chat.txt", "Bob"), ("x.zip", "_chat.txt", "WhatsApp"), ("x.zip", "WhatsApp Chat with Bob.txt", "Bob"), ("x.zip", "WhatsApp Chat - Bob/_chat.txt", "Bob")])  # fmt: skip
def test_a_zip_is_read_as_it_is(tmp_path, archive, member, name):
    with zipfile.ZipFile(tmp_path / archive, "w") as out:
        out.writestr(member, "\n".join([*android("hi"), *android("ho", author="Ann")]))
        out.writestr("notes.txt", "milk\neggs")
    [[chat, found]] = read(tmp_path / archive)
    assert (chat.name, [m.text for m in found]) == (name, ["hi", "ho"])


def test_a_folder_may_hold_many_chats(tmp_path):
    write(tmp_path / "WhatsApp Chat with Ann.txt", *android("hi", author="Ann"))
    write(tmp_path / "WhatsApp Chat with Bob.txt", *iphone("ho"))
    write(tmp_path / "PTT-20210314-WA0003.txt", "I'm late")
    assert [(chat.name, [m.text for m in found]) for chat, found in read(tmp_path)] == [
        ("Ann", ["hi"]),
        ("Bob", ["ho"]),
    ]


def test_other_files_are_not_chats():
    others = [
        "",
        "Dear Bob,\non 14/03/2021, 10:05 - as you know: it rained",
        "2021-03-14 10:05:33 INFO: started\n2021-03-14 10:05:34 INFO: ended\n",
        "[2021-03-14 10:05:33] app.ERROR: no such file\n[2021-03-14 10:05:34] app.INFO: ended\n",
        "2021-03-14 10:05:33 - INFO: started\n2021-03-14 10:05:34 - INFO: ended\n",
        "2021/03/14 10:05:33 [error] 123#0: no such file",
        '{"messages": [{"date": "2021-03-14T10:05:33", "text": "14/03/2021, 10:05 - Bob: hi"}]}',
        "14/03/2021, 10:05 - went to the sea\n15/03/2021, 10:05 - came back",
        "99/99/2021, 10:05 - Bob: hi",
        "10:05 - Bob: hi",
    ]
    assert [text for text in others if whatsapp.can_read(text)] == []


def test_a_chat_is_recognised_with_a_line_above_it():
    assert whatsapp.can_read("\n".join(["my chat with Bob", *android("a", "b", "c")]))
    assert whatsapp.can_read(
        f"[2021-03-14 10:05:33] Bob: {LRM}Meddelanden är krypterade\n[2021-03-14 10:05:34] Bob: hej"
    )


@pytest.mark.parametrize("hostile", [LRM * 300_000, "<" * 300_000, f"{LRM}<" * 100_000, "a:" * 150_000, "(1" * 150_000, "[" * 300_000, " " * 300_000 + "x", "1/" * 150_000, ".a" * 150_000, "@\u2068" * 100_000, "“" * 300_000])  # fmt: skip
def test_no_text_takes_long(file, hostile):
    start = time.process_time()
    path = file(
        *android("hi", hostile, f"{hostile}\n{hostile}\nPOLL:\n{hostile}: (1"),
        hostile,
        f"14/03/2021, 10:00 - {hostile}",
        *iphone(hostile),
    )
    assert len(messages(path)) == 4
    assert time.process_time() - start < 5


def test_a_message_is_bounded_and_memory_does_not_hold_a_line_without_end(file, monkeypatch):
    monkeypatch.setattr(whatsapp, "LONGEST", 1000)
    notes = collections.Counter()
    found = messages(
        file(
            *android("x" * 999_999, "\n" * 5000 + "end", "y" * 400 + "\n" + "z" * 900),
            "more" * 9999,
            *android("ok"),
        ),
        notes,
    )
    assert [len(m.text) <= 1000 for m in found] == [True] * 4
    assert found[3].text == "ok" and notes["messages cut to a million characters"] == 3


FORMATS = {
    "Android": lambda t: f"{t:%d/%m/%Y, %H:%M} - ",
    "United States": lambda t: f"{t.month}/{t.day}/{t:%y}, {t:%I}:{t:%M}{NNBSP}{t:%p} - ",
    "iPhone": lambda t: f"[{t:%d.%m.%y, %H:%M:%S}] ",
    "Taiwan": lambda t: (
        f"[{t.year}/{t.month}/{t.day} {'上午' if t.hour < 12 else '下午'}{t:%I:%M:%S}] "
    ),
    "Korea": lambda t: (
        f"{t:%y}. {t.month}. {t.day}. {'오전' if t.hour < 12 else '오후'} {t:%I:%M} - "
    ),
    "Thailand": lambda t: f"{t.day}/{t.month}/{t.year + 543} {t:%H:%M} - ",
    "Arabic": lambda t: (
        f"\u200f{t:%d\u200f/%m\u200f/%Y}، {t:%I:%M} {'ص' if t.hour < 12 else 'م'} - ".translate(
            {ord("0") + i: c for i, c in enumerate("٠١٢٣٤٥٦٧٨٩")}
        )
    ),
}
WORD = (
    st.text("abcäßжщ中の한ש0123459.,!?'-–/ ()*_~😀👍\u200d\n", min_size=1)
    .map(str.strip)
    .filter(bool)
)
CHAT = st.lists(
    st.tuples(
        st.sampled_from(["Ann", "Bob B.", "+49 170 1234567", "Жанна 😀"]),
        WORD,
        st.integers(0, 40 * 86400),
    ),
    min_size=2,
    max_size=12,
)


@given(st.sampled_from(sorted(FORMATS)), CHAT, st.integers(1, 64))
@example("Android", [("Ann", "a\n\n14/03 b", 0), ("Bob B.", "c", 1)], 7)
def test_what_was_written_comes_back_message_for_message(tmp_path_factory, format, chat, piece):
    t, lines, expected = datetime.datetime(2021, 3, 14, 22, 5, 33), [], []
    for author, text, later in chat:
        lines.append(f"{FORMATS[format](t)}{author}: {text}")
        expected.append(
            (
                f"whatsapp:{author}",
                author,
                t.isoformat()[: 19 if format in ("iPhone", "Taiwan") else 16],
                text,
                "",
            )
        )
        t += datetime.timedelta(seconds=later)
    path = write(tmp_path_factory.mktemp("chat") / "_chat.txt", *lines)
    with pytest.MonkeyPatch.context() as patch:  # pieces are cut anywhere, even inside a letter
        patch.setattr(exports.source, "CHUNK", piece)
        [[info, found]] = [
            (info, list(found))
            for info, found in whatsapp.read(exports.Source(path), collections.Counter())
        ]
    assert [
        (m.author, m.name, m.date[: len(e[2])], m.text, m.left_out)
        for m, e in zip(found, expected, strict=True)
    ] == expected
    assert info.key == "whatsapp:" + ", ".join(sorted({author for author, _, _ in chat}))
    assert found == messages(path)


@given(st.text('[]0123456789/.-:, \n<>()PMpm\u200e\u202f~@\u2068\u2069”“"ab😀', max_size=200))
def test_nothing_breaks_the_reader(tmp_path_factory, text):
    path = write(tmp_path_factory.mktemp("chat") / "_chat.txt", text)
    [[_, found]] = [
        (info, list(found))
        for info, found in whatsapp.read(exports.Source(path), collections.Counter())
    ]
    assert all(isinstance(m.at, int) and (m.text or m.left_out) for m in found)
    whatsapp.can_read(text)


# --- hours, calendars, names with a colon


def hours(path, notes=None):
    return [m.date[11:16] for m in messages(path, notes)]


def test_parts_of_the_day_are_told_as_in_taiwan(file):
    """CLDR's zh_Hant, checked with ICU: midnight, before dawn, morning, forenoon, noon, afternoon, evening."""
    written = [
        "午夜12:00",
        "凌晨4:59",
        "清晨5:00",
        "上午8:00",
        "中午12:30",
        "下午1:00",
        "晚上11:59",
    ]
    expected = ["00:00", "04:59", "05:00", "08:00", "12:30", "13:00", "23:59"]
    assert hours(file(*(f"2021/1/1 {time} - Bob: hi" for time in written))) == expected


def test_a_word_that_spans_midnight_is_told_by_the_hour(file):
    """रात is 20:00 to 4:00 in Hindi."""
    assert hours(file("14/3/21, रात 10:05 - Bob: a", "15/3/21, रात 1:05 - Bob: b")) == [
        "22:05",
        "01:05",
    ]


UNKNOWN = [
    "14/03/21, 9:00 xxa - Ann: a",
    "14/03/21, 3:00 xxb - Bob: b",
    "14/03/21, 4:00 xxb - Ann: c",
    "15/03/21, 12:10 xxa - Ann: d",
]


def test_which_of_two_unknown_words_is_am_shows_in_a_day_that_runs_forward(file):
    notes = collections.Counter()
    assert hours(file(*UNKNOWN), notes) == ["09:00", "15:00", "16:00", "00:10"]
    assert notes == {
        "lines with “xxa” beside the time, taken for AM": 2,
        "lines with “xxb” beside the time, taken for PM": 2,
    }


def test_an_unknown_word_among_known_ones_is_told_by_its_neighbours(file):
    lines = [
        "14/03/21, 11:50 AM - Ann: a",
        "14/03/21, 12:00 xxn - Bob: b",
        "14/03/21, 1:00 PM - Ann: c",
    ]
    assert hours(file(*lines)) == ["11:50", "12:00", "13:00"]


def test_a_line_whose_word_nothing_tells_is_left_out_by_name_and_is_nobody_s_words(file):
    notes = collections.Counter()
    lines = [
        "14/03/21, 9:00 AM - Ann: a",
        "15/03/21, 9:00 xxn - Bob: b",
        "Bob's second line",
        "16/03/21, 9:00 AM - Ann: c",
    ]
    assert [m.text for m in messages(file(*lines), notes)] == ["a", "c"]
    assert notes == {"lines with “xxn” beside the time, which may be AM or PM: left out": 1}


def test_an_unknown_word_beside_24_hours_says_nothing(file):
    assert hours(file("14/03/2021 xxu 9:00 - Ann: a", "14/03/2021 xxu 13:00 - Bob: b")) == [
        "09:00",
        "13:00",
    ]


def test_where_no_line_s_half_of_the_day_is_known_the_words_are_named(file):
    with pytest.raises(UserError, match="“xxa” beside the time, is that AM or PM"):
        messages(file(*(f"{day}/03/21, 9:00 xxa - Bob: hi" for day in range(10, 14))))


@given(
    st.lists(st.integers(0, 40 * 3600), min_size=30, max_size=40), st.permutations(["qqa", "qqb"])
)
def test_unknown_words_never_give_a_wrong_hour(tmp_path_factory, gaps, halves):
    t, lines, expected = datetime.datetime(2021, 3, 14), [], []
    for gap in gaps:
        t += datetime.timedelta(seconds=gap)
        lines.append(f"{t:%d/%m/%Y, %I:%M} {halves[t.hour > 11]} - Bob: hi")
        expected.append(f"{t:%Y-%m-%dT%H:%M}:00")
    try:
        found = dates(write(tmp_path_factory.mktemp("chat") / "_chat.txt", *lines))
    except UserError:
        return
    assert found == expected or len(found) < len(expected) and set(found) <= set(expected)


def test_a_day_of_one_digit_before_an_hour_of_one_is_as_any_other(file):
    lines = [
        "2021/3/14 22:05 - Bob: a",
        "2021/3/15 2:05 - Bob: b",
        "2021/4/1 1:05 - Bob: c",
        "2021/4/2 22:05 - Bob: d",
    ]
    assert [m.text for m in messages(file(*lines))] == ["a", "b", "c", "d"]


CALENDARS = {  # as ICU writes 14 March 2021 for a phone of that language and calendar
    "Islamic, Arabic": "[١\u200f/٨\u200f/١٤٤٢ هـ، ١٠:٠٥:٣٣ م] ",
    "Islamic, English": f"[8/1/1442 AH, 10:05:33{NNBSP}PM] ",
    "Islamic, German": "[01.08.42 AH, 22:05:33] ",
    "Persian": "[۱۳۹۹/۱۲/۲۴, ۲۲:۰۵:۳۳] ",
    "Persian, English": "[24/12/1399 AP, 10:05:33\u202fpm] ",
    "Persian, German": "[24.12.99 AP, 22:05:33] ",
    "Japanese": "[R3/3/14 22:05:33] ",
    "Japanese, Taiwan": "[令和3/3/14 晚上10:05:33] ",
    "Japanese, German": "[14.03.03 R, 22:05:33] ",
    "Taiwan": "[民國110/3/14 晚上10:05:33] ",
    "Taiwan, English": f"[3/14/110 Minguo, 10:05:33{NNBSP}PM] ",
    "Buddhist, Taiwan": "[佛曆2564/3/14 晚上10:05:33] ",
    "Buddhist, German": "[14.03.64 BE, 22:05:33] ",
    "Buddhist, Italian": "[14/03/64 EB, 22:05:33] ",
}


@pytest.mark.parametrize("front", CALENDARS.values(), ids=CALENDARS)
def test_dates_of_other_calendars_are_ours(file, front):
    if "AH" in front or "هـ" in front:
        pytest.importorskip("hijridate")
    assert [m.date for m in messages(file(f"{front}Bob: hi"))] == ["2021-03-14T22:05:33"]


REFUSED = {
    "Hebrew": [
        "[1 Nisan 5781, 10:05:33 PM] ",
        "[א׳ בניסן תשפ״א, 22:05:33] ",
        "[01/07/5781 A. M. 22:05:33] ",
    ],
    "Indian": ["[12/23/1942 Saka, 10:05:33 PM] "],
    "Coptic or Ethiopic": [
        "[7/5/1737 ERA1, 10:05:33 PM] ",
        "[05/07/2013 ERA1 10:05:33 ከሰዓት] ",
        "[05/07/2013 ap. Inc. 22:05:33] ",
    ],
    "Ethiopic (Amete Alem)": ["[7/5/7513 ERA0, 10:05:33 PM] "],
    "Chinese": ["[辛丑/2/2 晚上10:05:33] "],
}


@pytest.mark.parametrize(
    "calendar, front", [(name, front) for name, fronts in REFUSED.items() for front in fronts]
)
def test_a_calendar_that_is_not_converted_is_refused_by_name(file, calendar, front):
    with pytest.raises(UserError, match=re.escape(f"dates of the {calendar} calendar")):
        messages(file(*(f"{front}{name}: hi" for name in ("Ann", "Bob", "Ann"))))


def test_a_month_that_ours_has_not_shows_a_chinese_calendar(file):
    lines = [f"[2021/{month}/{day} 22:05:33] Bob: hi" for month in (1, 2, 3) for day in (1, 29, 30)]
    with pytest.raises(UserError, match="Chinese"):
        messages(file(*lines, lines[5], lines[5]))


@pytest.mark.parametrize("year", ["03", "38", "2003"])
def test_dates_before_whatsapp_or_in_the_future_are_refused(file, year):
    with pytest.raises(UserError, match="a calendar that is not known"):
        messages(file(*(f"[0{day}.03.{year}, 22:05:33] Bob: hi" for day in range(1, 6))))


def test_the_persian_year_begins_as_in_tehran():
    """On 21 March, but on the 20th in these years, by the almanac."""
    for year in range(1388, 1412):
        first = datetime.date(
            year + 621, 3, 20 if year in (1391, 1395, 1399, 1403, 1407, 1408, 1411) else 21
        ).toordinal()
        assert whatsapp.ordinal("Persian", year, 1, 1) == first
        assert whatsapp.ordinal("Persian", year, 7, 30) == first + 6 * 31 + 29
    with pytest.raises(ValueError):
        whatsapp.ordinal("Persian", 1400, 12, 30)  # 1399 was the leap year
    assert whatsapp.ordinal("Persian", 1399, 12, 30) + 1 == whatsapp.ordinal("Persian", 1400, 1, 1)


def test_every_word_of_cldr_for_a_part_of_the_day_is_known():
    pytest.importorskip("babel")
    from bench.day_periods import day_periods, table

    unknown, wrong = set(), set()
    for name, period, text, hours in day_periods():
        plain = whatsapp.word(text)
        if plain in whatsapp.FILLER - {"a"}:
            assert period not in ("am", "pm"), (name, text)
            continue
        if plain not in whatsapp.HOURS:
            unknown.add(text)
        elif period in ("am", "pm") and any(
            whatsapp.hour_of(plain, h % 12 or 12) not in (h, None) for h in hours
        ):
            wrong.add((name, text))
    assert unknown == {"1ka", "2ja"}  # Anii's
    assert {name for name, _ in wrong} <= {"smn", "smn_FI"}  # Inari Sami's ip. is AM, Finnish's PM
    assert table() in whatsapp.Path(whatsapp.__file__).with_suffix(".toml").read_text(
        encoding="utf-8"
    )


def test_old_iphones_mark_what_whatsapp_wrote_too(file):
    lines = [
        f"3/14/17, 10:05:{i:02} PM: Bob: {text}"
        for i, text in enumerate(["hi", f"{LRM}Missed Call", f"{LRM}You changed the icon"])
    ]
    assert [(m.name, m.left_out) for m in messages(file(*lines))] == [("Bob", "")] + [
        ("Bob", "service messages")
    ] * 2


def said(author, *texts, day=14):
    return [f"{day}/03/2021, 10:{i:02} - {author}: {text}" for i, text in enumerate(texts)]


def authors(path):
    return [m.name for m in messages(path)]


def test_a_name_may_hold_a_colon_where_every_line_shows_it(file):
    lines = (
        said("Work: Bob", "can you?", "todo: milk")
        + said("Work: Eve", "no", "<Media omitted>")
        + said("Ann", "ok")
    )
    assert authors(file(*lines)) == ["Work: Bob"] * 2 + ["Work: Eve"] * 2 + ["Ann"]


def test_whoever_writes_one_line_without_a_second_colon_has_a_short_name(file):
    lines = said("Bob", *["Todo: milk"] * 9, *["Note: rain"] * 9, "ok") + said("Ann", "ok")
    assert set(authors(file(*lines))) == {"Bob", "Ann"}


def test_small_letters_after_the_colon_are_no_name(file):
    assert set(authors(file(*said("Bob", *["todo: milk"] * 9, *["ps: rain"] * 9)))) == {"Bob"}


def test_the_chat_s_title_says_its_contact_s_whole_name(tmp_path):
    lines = said("Work: Bob", "hi") + said("Ann", "ok")
    for title, name in (("Work_ Bob", "Work: Bob"), ("Work Bob", "Work: Bob"), ("Team", "Work")):
        assert authors(write(tmp_path / f"WhatsApp Chat with {title}.txt", *lines)) == [name, "Ann"]
    lines = said("Bob", *["Todo: milk"] * 20) + said("Ann", "ok")
    assert set(authors(write(tmp_path / "WhatsApp Chat with Bob.txt", *lines))) == {"Bob", "Ann"}


def test_a_system_line_says_a_whole_name(tmp_path):
    lines = [
        "14/03/2021, 09:00 - Ann added Work: Bob",
        "14/03/2021, 09:00 - Ann added Work: Eve",
        *said("Work: Bob", "hi"),
        *said("Ann", "ok"),
    ]
    found = messages(
        write(
            tmp_path / "WhatsApp Chat with Team.txt",
            *lines,
            "14/03/2021, 11:00 - Work: Bob left",
            *said("Work: Eve", "so"),
        )
    )
    assert [(m.name, m.left_out) for m in found] == [
        (None, "service messages"),
        (None, "service messages"),
        ("Work: Bob", ""),
        ("Ann", ""),
        (None, "service messages"),
        ("Work: Eve", ""),
    ]


TEXTS = st.lists(
    st.sampled_from(
        [
            "todo: milk",
            "Todo: milk",
            "PS: rain",
            "ok",
            "at 10: no",
            "see: this: that",
            "Bob: hi",
            "x",
        ]
    ),
    min_size=2,
    max_size=8,
)


@given(
    st.dictionaries(st.sampled_from(["Bob", "Ann", "Dr. Eve"]), TEXTS, min_size=1),
    st.dictionaries(st.sampled_from(["Work: Bob", "Work: Eve", "Work: Ann B"]), TEXTS),
)
def test_names_with_and_without_colons_come_back(tmp_path_factory, plain, colons):
    lines, expected = [], []
    texts = {
        name: [*texts, "yes"] for name, texts in plain.items()
    }  # one line without another colon
    texts |= colons if len(colons) > 1 else {}
    for day, (name, some) in enumerate(texts.items()):
        lines += said(name, *some, day=10 + day)
        expected += [(name, text) for text in some]
    found = messages(write(tmp_path_factory.mktemp("chat") / "WhatsApp Chat with Team.txt", *lines))
    assert [(m.name, m.text) for m in found] == expected
