"""What messages are made of, whatever the messenger: whole text, marks of files, ids, objects."""

import hashlib
import json
import re

SUFFIXES = {
    "<photo>": "jpg jpeg png heic heif webp avif bmp tif tiff",
    "<gif>": "gif",
    "<video>": "mp4 mov webm mkv avi 3gp m4v mpg mpeg",
    "<audio>": "mp3 wav flac m4a ogg oga opus aac amr wma caf aif aiff",
}
BY_SUFFIX = {suffix: mark for mark, names in SUFFIXES.items() for suffix in names.split()}
BY_TYPE = {"image": "<photo>", "video": "<video>", "audio": "<audio>"}


def without_surrogates(text: str) -> str:
    """Replace half characters (lone surrogates), which JSON can spell and no file can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def hash_name(name: str) -> str:
    """Return an id made of a name. Ids are written into data/, so they must not hold the name."""
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).hexdigest()


def file_mark(name: object, mime_type: object = None) -> str:
    """Return the mark of a file by its MIME type, or by its name where it has none."""
    if not mime_type:
        return BY_SUFFIX.get(str(name).rpartition(".")[2].lower(), "<file>")
    mime_type = str(mime_type)
    return "<gif>" if mime_type == "image/gif" else BY_TYPE.get(mime_type.split("/")[0], "<file>")


def parse_object(text: str | None) -> dict:
    """Return the object that a JSON text holds; an empty one of any other text."""
    try:
        return as_dict(json.loads(text or "{}"))
    except (ValueError, RecursionError):
        return {}


def value_behind(text: str, key: str) -> object:
    """Decode the object or array behind a key, in the beginning of a file; None where none is."""
    place = re.search(rf'"{key}"\s*:\s*(?=[\[{{])', text)
    try:
        return place and json.JSONDecoder().raw_decode(text, place.end())[0]
    except (ValueError, RecursionError):
        return None


def as_dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list:
    return value if isinstance(value, list) else []


def as_text(value: object) -> str:
    """Return a string without half characters; "" of what isn't a string."""
    return without_surrogates(value) if isinstance(value, str) else ""
