"""Progress bars, which are lines where there is no terminal."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Lines:
    """A file for tqdm where there is no terminal: lines in place of a bar that is redrawn."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def track(name: str, task: str) -> Callable[..., tqdm]:
    """Return tqdm with a label; where there is no terminal it prints a line every 10 seconds."""
    settings: dict[str, Any] = {"desc": f"{name}: {task}", "leave": False, "smoothing": 0}
    if not sys.stderr.isatty():
        layout = "{desc} {n_fmt}/{total_fmt}, {remaining} left"
        settings |= {"file": Lines(), "mininterval": 10, "miniters": 1, "bar_format": layout}
        settings["position"] = 0  # two bars at once move the cursor up and down
    return functools.partial(tqdm, **settings)
