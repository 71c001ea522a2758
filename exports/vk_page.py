"""A page of VK's archive: its messages, as the HTML has them."""

import html.parser


class Page(html.parser.HTMLParser):
    """Collect `messages`, each {id, header, link, text, attachments}, and the page's `title`."""

    def __init__(self):
        super().__init__()
        self.messages: list[dict] = []
        self.title = ""
        self.depth = 0  # of <div> in the message that is open, 0 outside
        self.part = ""  # where text goes

    def end_damaged_message(self) -> None:
        """Forget what is open, so that nothing more is added to it: without a header it is lost."""
        if self.depth:
            self.messages[-1]["header"] = ""
        self.depth, self.part = 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        get = dict(attrs).get
        classes = (get("class") or "").split()
        if tag == "div" and "message" in classes:
            raw = {"id": get("data-id") or "", "header": "", "link": "", "text": ""}
            self.messages.append(raw | {"attachments": []})
            self.depth, self.part = 1, ""
            return
        if tag == "div" and "ui_crumb" in classes:
            self.part, self.title = "title", ""
        if not self.depth:
            return
        self.depth += tag == "div"
        if "message__header" in classes:
            if self.messages[-1]["header"]:  # the head of another message is lost between
                self.end_damaged_message()
                return
            self.part = "header"
        elif "attachment__description" in classes:
            self.messages[-1]["attachments"].append("")
            self.part = "attachment"
        elif "kludges" in classes or "attachment" in classes:
            self.part = ""
        elif tag == "div" and self.depth == 2:
            self.part = "text"
        elif tag == "a" and self.part == "header" and not self.messages[-1]["link"]:
            self.messages[-1]["link"] = get("href") or ""
        elif tag == "br" and self.part == "text":
            self.messages[-1]["text"] += "\n"

    def handle_endtag(self, tag: str) -> None:
        if tag != "div":
            return
        self.part = ""
        self.depth = max(0, self.depth - 1)

    def handle_data(self, data: str) -> None:
        if self.part == "title":
            self.title += data.strip()
        elif self.depth and self.part == "attachment":
            self.messages[-1]["attachments"][-1] += data
        elif self.depth and self.part:
            self.messages[-1][self.part] += data
