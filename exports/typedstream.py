"""The text of an iMessage that isn't in its column `text`: Apple's typedstream, and its plist.

A typedstream is how macOS archives objects. Only its first string is read: see docs/EXPORTS.md.
"""

import plistlib
import re

# The first string: its class, then its length (in one byte, two or four), then UTF-8.
STRING = re.compile(rb"NSString\x01.\x84\x01\+(?:([\0-\x7f])|\x81(..)|\x82(....))", re.DOTALL)


def string_of(stream: object) -> str:
    """Return the text of an attributed string in a typedstream; "" where there is none."""
    match = STRING.search(stream) if isinstance(stream, bytes) else None
    if not match or not isinstance(stream, bytes):
        return ""
    length = int.from_bytes(match[1] or match[2] or match[3], "little")
    text = stream[match.end() : match.end() + length]
    return text.decode("utf-8", "replace") if len(text) == length else ""


def edited_text(summary: object) -> str:
    """Return the latest texts of an edited message's parts, from its `message_summary_info`."""
    try:
        info = plistlib.loads(summary, fmt=plistlib.FMT_BINARY)  # type: ignore[arg-type]
        parts = info.get("ec", {})
        return "\n".join(string_of(parts[part][-1]["t"]) for part in sorted(parts, key=int))
    except (plistlib.InvalidFileException, ArithmeticError, AttributeError, LookupError):
        return ""
    except (TypeError, ValueError, RecursionError):
        return ""
