"""What every program does alike: its command line (made from a frozen dataclass), its folders, JSON and tensor files, and how it ends."""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import functools
import gc
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import typing
from pathlib import Path

from safetensors import SafetensorError, safe_open

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # what weights are kept in, by safetensors' names
DISGUISES = {  # the first bytes of what often lies where another file belongs
    (
        b"PK\3\4",
        b"\x80\2",
        b"\x80\3",
        b"\x80\4",
        b"\x80\5",
    ): "it is a pickle, as torch.save writes it, and may run code",
    (
        b"version https://git-lfs",
    ): "it is git-LFS's pointer to the file, not the file (git lfs pull)",
    (b"<!", b"<h", b"<H", b"<?"): "it is a web page",
    (b"GGUF",): "it is a GGUF file (python -m weights.gguf_convert makes a folder of one)",
}


PRIMITIVES = (
    "64"  # shapes whose kernels a CPU keeps; of a thousand, the default, they are gigabytes
)
M_MMAP_THRESHOLD = -3  # mallopt's option, from glibc's malloc.h
MMAP_BYTES = 1 << 20  # bytes: memory of this size and more goes back to the system when it is freed


class UserError(Exception):
    """Something a person can mend: what is wrong, naming the file or the flag, and the way out."""

    def __init__(self, problem, way_out):
        super().__init__(f"{problem}\n{way_out}")


def flag(
    default, help, choices=None, short=None, positional=False, shown=None, group=None, alias=None
):
    """A dataclass field that is also a flag: `--micro-batch` for `micro_batch`; a bool is a switch.

    `shown`: the default in words, where its value doesn't tell. `group`: heads this flag and those after it in `--help`.
    `alias`: the flag's old name, still taken, not shown.
    """
    return dataclasses.field(default=default, metadata=locals())


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(
            f"{self.prog}: {message}", f"python {self.prog} --help lists what it takes."
        )


def parse(cls, argv=None, prog=None):
    """Fill dataclass `cls` from `argv` (default: the command line); its docstring heads `--help`."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    layout = functools.partial(
        argparse.RawDescriptionHelpFormatter, max_help_position=26, width=width
    )
    parser = Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description=inspect.getdoc(cls),
        formatter_class=layout,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    hints, group = typing.get_type_hints(cls), parser
    for field in dataclasses.fields(cls):
        hint, meta, default = hints[field.name], field.metadata, field.default
        many = typing.get_origin(hint) in (list, tuple)
        kind = (typing.get_args(hint) or (hint,))[0]  # of `str | None` too
        shown = meta["shown"] or (
            ""
            if default in (None, "", ()) or kind is bool
            else f"{default:g}"
            if kind is float
            else default
        )
        said = f"{meta['help']}: {', '.join(meta['choices'])}" if meta["choices"] else meta["help"]
        said += f" (default: {shown})" if shown != "" else ""
        options = {"help": said.replace("%", "%%"), "default": default}
        group = parser.add_argument_group(meta["group"]) if meta["group"] else group
        if meta["positional"]:
            metavar = field.name.upper().removesuffix("S")
            parser.usage += f" [{metavar} ...]" if many else f" {metavar}"
            group.add_argument(
                field.name, metavar=metavar, type=kind, nargs="*" if many else None, **options
            )
            continue
        names = [
            n for n in (meta["short"], "--" + field.name.removesuffix("_").replace("_", "-")) if n
        ]  # `as_` is --as
        takes = {
            "metavar": {int: "N", float: "X"}.get(kind, "TEXT"),
            "type": kind,
            "choices": meta["choices"],
        }
        if many:
            takes |= {"action": "append", "default": None}
        if kind is bool:
            takes = {"action": "store_true"}
        group.add_argument(*names, dest=field.name, **options | takes)
        if meta["alias"]:
            hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            group.add_argument(meta["alias"], dest=field.name, **takes | hidden)
    given = vars(parser.parse_intermixed_args(argv))
    return cls(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
    )


def run(main):
    """Call `main()`; end with its UserError on stderr and exit code 2, with 130 on Ctrl-C. Under torchrun one rank a host speaks."""
    for cache in (
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):  # oneDNN's, and ideep's above it
        os.environ.setdefault(cache, PRIMITIVES)  # read at the first product
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than glibc
            # else such memory lies between what is kept, and a run of many shapes takes twice what lives
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
    os.umask(0o077)  # what our programs write is chats, or was made of them: for its owner's eyes
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # Windows' pipes and files are in its old code pages, which have no emoji
            stream.reconfigure(
                encoding=stream.encoding if stream.isatty() else "utf-8", errors="replace"
            )
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python data.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if isinstance(
            error, OSError
        ):  # no right to read or write, a full disk, a folder where a file belongs
            path = error.filename or "a file"
            other = UserError(f"{path}: {error.strerror or error}", "Mend that, then run it again.")
            error = write_error(path, error) if error.errno == errno.ENOSPC else other
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(2)
    finally:
        gc.freeze()  # or Python looks through all of torch for garbage before it ends: a third of a second


def write_error(path, error, way_out="Make room, or mend that, and run it again."):
    """What kept a file from being written (an OSError, or safetensors' own) → UserError"""
    full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
    return UserError(f"{path} can't be written: {'the disk is full' if full else error}", way_out)


def check_output_dir(path, overwrite, but=()):
    """UserError when an output folder holds something already, unless `overwrite`, or it is of these names."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file", "Name another folder.")
    if path.is_dir() and any(inner.name not in but for inner in path.iterdir()) and not overwrite:
        raise UserError(
            f"{path} already holds something",
            "Name another folder, or say --overwrite to replace it.",
        )


def refuse_overlap(out, *sources):
    """UserError when an output folder is one of those that are read."""
    for source in sources:
        if source and Path(source).is_dir() and Path(source).resolve() == Path(out).resolve():
            raise UserError(
                f"{out} is read, it can't be written too", "Name another folder to write."
            )


def make_private_dir(path):
    """Make a folder for its owner's eyes only (0700): chats, or what was learned from them, will be in it."""
    path = Path(path)
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)  # another rank may have been quicker
        path.chmod(0o700)
    return path


def read_text(path):
    """What a text file holds that a person may have edited, a BOM left off. UserError when it isn't UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}", "Save it again in UTF-8.") from None


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, if there is one, to the first that is none: half a line, where a machine was lost."""
    path, found = Path(folder) / "metrics.jsonl", []
    for line in read_text(path).splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read_json(path, missing=None):
    """The object in a JSON file, or `missing` where there is no such file. UserError when it isn't one."""
    path = Path(path)
    if not path.exists() and missing is not None:
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", f"Is {path.parent} the right folder?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON: {describe_file(path, error)}", "Copy it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", "Copy it again.")
    return value


KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false,"}


def check_number(path, name, value, least, most, kind=int):
    """A number (or bool) that a JSON file gives. UserError unless it is one, within these limits."""
    if (
        type(value) not in ((int, float) if kind is float else (kind,))
        or not least <= value <= most
    ):
        raise UserError(
            f"{path}: {name} is {value!r:.60}, it must be {KIND_NAMES[kind]} from {least} to {most}",
            "Copy it again.",
        )
    return value


def describe_file(path, error):
    """Why a file can't be read: what its first bytes tell that it is, else the reader's own `error`."""
    if path.is_dir():
        return "it is a folder"
    with open(path, "rb") as file:
        head = file.read(64)
    if not any(head):
        return "it holds zeros, it was never wholly written" if head else "it is empty"
    found = [what for begins, what in DISGUISES.items() if head.lstrip().startswith(begins)]
    if found and head[8:9] != b"{":  # where a safetensors file's header begins
        return found[0]
    return str(error).splitlines()[0]


def open_safetensors(path, way_out="Copy it again."):
    """→ the open file, its header read and its length right. UserError says what it really is."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(
            f"{path} can't be read: it is missing{pickle_hint(path.parent)}", way_out
        ) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read: {describe_file(path, error)}", way_out) from None


def pickle_hint(folder):
    found = [path.name for path in folder.glob("*.*") if path.suffix in (".bin", ".pth", ".pt")]
    return f", only {found[0]} is there, which is a pickle and may run code" if found else ""


def check_tensors(where, found, wanted, maker, way_out, dtypes=FLOAT_DTYPES):
    """UserError unless `found` {name: open file} are just the `wanted` {name: shape}, and of `dtypes`. Reads headers alone."""
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        what = (
            f"{missing[0]} is missing"
            if missing
            else f"{unknown[0]} belongs to no part of the model"
        )
        raise UserError(
            f"{where}: tensor {what} ({len(missing)} missing, {len(unknown)} unknown)", way_out
        )
    for name, shape in wanted.items():
        tensor = found[name].get_slice(name)
        if tensor.get_shape() != [*shape]:
            raise UserError(
                f"{where}: tensor {name} is {tensor.get_shape()}, {maker} makes it {[*shape]}",
                way_out,
            )
        if tensor.get_dtype() not in dtypes:
            raise UserError(
                f"{where}: tensor {name} is of {tensor.get_dtype()}, weights are of {', '.join(dtypes)}",
                way_out,
            )


def counted(n, what):
    """1, "sessions kept" → "1 session kept", 1,000 as it is; a name, such as Saved Messages, has no singular."""
    return f"{n:,} " + (re.sub(r"^((?:[a-z-]+ )?[a-z]+)s\b", r"\1", what) if n == 1 else what)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Written beside, then renamed: never half a file."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # the system names no file when a disk is full
        raise


def check_ranges(options, least, positive):
    """UserError for what train.py's flags and ours can't be. `least`: {flag: its least value}; `positive`: those above 0."""
    for name, limit in {**least, **dict.fromkeys(positive, 0)}.items():
        value, flag_ = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and not (0 < value < math.inf if name in positive else value >= limit):
            bound = f"{'more than' if name in positive else 'at least'} {limit}"
            raise UserError(
                f"{flag_} {value}: {bound} is needed", f"Leave {flag_} out for the default."
            )
    if options.lora and options.pure_bf16:
        raise UserError(
            "--pure-bf16 is for full fine-tuning: an adapter's fp32 masters are small",
            "Leave one of them out.",
        )


def printable(text):
    """Without what would command a terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
