"""What all programs share: flags from a dataclass, files and folders, and how a program ends."""

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that weights have
FILE_SIGNATURES = {  # the first bytes of files that often lie where another one belongs
    (b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"): (
        "it is a pickle, as torch.save writes it, and may run code"
    ),
    (
        b"version https://git-lfs",
    ): "it is git-LFS's pointer to the file, not the file (git lfs pull)",
    (b"<!", b"<h", b"<H", b"<?"): "it is a web page",
    (b"GGUF",): "it is a GGUF file (python -m weights.gguf_convert makes a folder of one)",
}
NUMBER_KINDS = {int: "a whole number", float: "a number", bool: "true or false,"}
# shapes whose kernels oneDNN and ideep keep; of 1,000, their default, the code is gigabytes
PRIMITIVE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
M_MMAP_THRESHOLD = -3  # mallopt's option, from glibc's malloc.h
# Freed memory of this size and more goes back to the system.
MMAP_BYTES = 1 << 20
# In training smaller blocks are used again: with 1 MiB a sixth of a LoRA step on a CPU was page
# faults. With glibc's own choice memory grows and grows.
TRAINING_MMAP_BYTES = 16 << 20
StrPath = str | os.PathLike
T = typing.TypeVar("T")


class UserError(Exception):
    """What the user can fix: the problem, naming the file or the flag, and a hint how to fix it."""

    def __init__(self, problem: str, hint: str):
        super().__init__(f"{problem}\n{hint}")


# --- flags


def flag(
    default: Any,
    help: str,
    choices: Iterable[str] | None = None,
    short: str | None = None,
    positional: bool = False,
    shown: str | None = None,
    group: str | None = None,
    alias: str | None = None,
) -> Any:
    """Declare a dataclass field that is also a flag: `--micro-batch` for `micro_batch`.

    A bool is a switch. `shown`: the default in words, where its value doesn't tell. `group`: the
    heading in `--help` of this flag and of those after it. `alias`: an old name, not shown.
    """
    return dataclasses.field(default=default, metadata=locals())


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{self.prog}: {message}", f"python {self.prog} --help lists the flags.")


def parse(cls: type[T], argv: list[str] | None = None, prog: str | None = None) -> T:
    """Fill dataclass `cls` from `argv` or the command line; its docstring heads `--help`."""
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    parser = Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description=inspect.getdoc(cls),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=width
        ),
        add_help=False,
        argument_default=argparse.SUPPRESS,  # the dataclass has the defaults
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    types = typing.get_type_hints(cls)
    group: Any = parser
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if title := field.metadata["group"]:
            group = parser.add_argument_group(title)
        add_flag(parser, group, field, types[field.name])
    values = vars(parser.parse_intermixed_args(argv))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return cls(**values)


def add_flag(parser: Parser, group: Any, field: dataclasses.Field, hint: Any) -> None:
    """Add a field of type `hint` to the group as a flag or a positional argument."""
    meta = field.metadata
    many = typing.get_origin(hint) in (list, tuple)
    kind = (typing.get_args(hint) or (hint,))[0]  # of `str | None` too
    text = meta["help"]
    if meta["choices"]:
        text += f": {', '.join(meta['choices'])}"
    default = f"{field.default:g}" if kind is float and field.default else field.default
    if meta["shown"] or (default not in (None, "", ()) and kind is not bool):
        text += f" (default: {meta['shown'] or default})"
    text = text.replace("%", "%%")
    if meta["positional"]:
        metavar = field.name.upper().removesuffix("S")
        shown = f"[{metavar} ...]" if many else metavar
        parser.usage = f"{parser.usage} {shown}"
        nargs = "*" if many else None
        group.add_argument(field.name, metavar=metavar, type=kind, nargs=nargs, help=text)
        return
    names = ["--" + field.name.removesuffix("_").replace("_", "-")]  # `as_` is --as
    if meta["short"]:
        names.insert(0, meta["short"])
    metavar = {int: "N", float: "X"}.get(kind, "TEXT")
    settings: dict[str, Any] = {"metavar": metavar, "type": kind, "choices": meta["choices"]}
    if many:
        settings["action"] = "append"
    if kind is bool:
        settings = {"action": "store_true"}
    group.add_argument(*names, dest=field.name, help=text, **settings)
    if meta["alias"]:
        group.add_argument(meta["alias"], dest=field.name, help=argparse.SUPPRESS, **settings)


def check_ranges(options: Any, minimums: dict, positive: Iterable[str]) -> None:
    """Check the flags that train.py and plan.py share. UserError for a value out of range.

    `minimums`: {flag: its smallest value}; `positive`: flags that must be above 0 and finite.
    """
    for name in (*minimums, *positive):
        value, minimum = getattr(options, name), minimums.get(name)
        if value is None:
            continue
        if minimum is None and not 0 < value < math.inf:
            bound = "more than 0"
        elif minimum is not None and value < minimum:
            bound = f"at least {minimum}"
        else:
            continue
        spelling = f"--{name.replace('_', '-')}"
        raise UserError(
            f"{spelling} must be {bound}, got {value}", f"Leave {spelling} out for the default."
        )
    if options.lora and options.pure_bf16:
        raise UserError(
            "--pure-bf16 is for full fine-tuning: an adapter's fp32 masters are small",
            "Leave one of them out.",
        )


# --- how a program runs and ends


def run(main: Callable[[], Any], mmap_bytes: int = MMAP_BYTES) -> None:
    """Call `main()`. A UserError or OSError ends it with exit code 2 and two lines on stderr.

    Ctrl-C ends it with code 130. Under torchrun one rank per host prints the error. Freed memory of
    `mmap_bytes` and more goes back to the system.
    """
    prepare_process(mmap_bytes)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python data.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                describe_os_error(error) if isinstance(error, OSError) else error, file=sys.stderr
            )
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which isn't imported here
            raise
        hint = "Does another program use it (nvidia-smi)? Otherwise a smaller base is needed."
        print(UserError("The GPU is out of memory", hint), file=sys.stderr)
        sys.exit(2)
    finally:
        gc.freeze()  # else Python's last collection goes through all of torch: a third of a second


def prepare_process(mmap_bytes: int) -> None:
    """Set what every program needs: memory limits, private files, and text streams in UTF-8."""
    for cache, capacity in PRIMITIVE_CACHES.items():
        os.environ.setdefault(cache, capacity)  # read at the first matrix product
    if sys.platform == "linux":
        # glibc alone has it. Without it a run of many shapes takes twice the memory that is in use
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, mmap_bytes)
    os.umask(0o077)  # our files hold chats, or were made from them
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Windows' pipes and files use its old code pages, which have no emoji
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def describe_os_error(error: OSError) -> UserError:
    """Turn a failed read or write (permissions, a full disk) into a UserError."""
    path = error.filename or "a file"
    if error.errno == errno.ENOSPC:
        return write_error(path, error)
    return UserError(f"{path}: {error.strerror or error}", "Fix that, then run it again.")


def write_error(
    path: StrPath,
    error: Any,
    hint: str = "Make room on the disk, or fix that, then run it again.",
) -> UserError:
    """Make a UserError of what kept a file from being written: an OSError, or safetensors' own."""
    full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
    return UserError(f"{path} can't be written: {'the disk is full' if full else error}", hint)


# --- folders and text files


def check_output_dir(path: StrPath, overwrite: bool, allowed: Iterable[str] = ()) -> None:
    """UserError when an output folder holds more than `allowed` names, unless `overwrite`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file", "Name another folder.")
    if overwrite or not path.is_dir():
        return
    if any(child.name not in allowed for child in path.iterdir()):
        raise UserError(
            f"{path} already holds something",
            "Name another folder, or pass --overwrite to replace what it holds.",
        )


def refuse_overlap(out: StrPath, *sources: StrPath | None) -> None:
    """UserError when the output folder is also an input."""
    for source in sources:
        if source and Path(source).is_dir() and Path(source).resolve() == Path(out).resolve():
            raise UserError(
                f"{out} is an input and can't be the output too", "Name another output folder."
            )


def make_private_dir(path: StrPath) -> Path:
    """Make a folder that only its owner can read (0700), for chats and what is made of them."""
    path = Path(path)
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)  # another rank may have been quicker
        path.chmod(0o700)
    return path


def read_text(path: StrPath) -> str:
    """Read a text file that a person may have edited, without its BOM. UserError unless UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", "Save it again as UTF-8.") from None


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename: a crash never leaves half a file."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # the system names no file when a disk is full
        raise


def read_metrics(folder: StrPath) -> list[dict]:
    """Read a run's metrics.jsonl, if there is one, up to the first broken line."""
    path = Path(folder) / "metrics.jsonl"
    metrics: list[dict] = []
    for line in read_text(path).splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except ValueError:  # the machine went down while it was written
            break
    return metrics


# --- JSON


def read_json(path: StrPath, missing: dict | None = None) -> dict:
    """Read the object in a JSON file; return `missing`, if given, where there is no such file."""
    path = Path(path)
    if not path.exists() and missing is not None:
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors add a BOM
    except FileNotFoundError:
        raise UserError(f"{path} is missing", f"Is {path.parent} the right folder?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON: {describe_file(path, error)}", "Copy it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", "Copy it again.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read: a list or an object that holds no other takes one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # Newlines in strings are escaped: a bracket beside a real one is no character of a text.
    text = re.sub(r"[\[{]\n[^\[\]{}]{1,400}\n *[\]}]", lambda match: one_line(match[0]), text)
    write_text(path, text + "\n")


def one_line(text: str) -> str:
    """Join lines of JSON, unless that gets longer than 160 characters."""
    joined = re.sub(r"\n *", " ", text)
    joined = joined[0] + joined[2:-2] + joined[-1]
    return joined if len(joined) <= 160 else text


def check_number(
    path: StrPath, name: str, value: Any, least: float, most: float, kind: type = int
) -> Any:
    """Return a number or bool that a JSON file gives. UserError unless it is within the limits."""
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds or not least <= value <= most:
        wanted = f"{NUMBER_KINDS[kind]} from {least} to {most}"
        raise UserError(f"{path}: {name} is {value!r:.60}, it must be {wanted}", "Copy it again.")
    return value


# --- safetensors


def describe_file(path: Path, error: Any) -> str:
    """Say why a file can't be read: what its first bytes show, else the reader's `error`."""
    if path.is_dir():
        return "it is a folder"
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "it is empty"
    if not any(head):
        return "it holds only zeros: it was not written completely"
    if head[8:9] != b"{":  # where the header of a safetensors file begins
        for signatures, description in FILE_SIGNATURES.items():
            if head.lstrip().startswith(signatures):
                return description
    return str(error).splitlines()[0]


def open_safetensors(path: Path, hint: str = "Copy it again.") -> Any:
    """Open a safetensors file and check its header and length. UserError says what is wrong."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        problem = f"it is missing{pickle_hint(path.parent)}"
    except (OSError, SafetensorError) as error:
        problem = describe_file(path, error)
    raise UserError(f"{path} can't be read: {problem}", hint)


def pickle_hint(folder: Path) -> str:
    """Name a pickle in a folder that lacks safetensors, or return ""."""
    pickles = [path.name for path in folder.glob("*.*") if path.suffix in (".bin", ".pth", ".pt")]
    return f", only {pickles[0]} is there, which is a pickle and may run code" if pickles else ""


def check_tensors(
    path: StrPath,
    files: dict,
    shapes: dict,
    source: str,
    hint: str,
    dtypes: tuple = FLOAT_DTYPES,
) -> None:
    """UserError unless `files` {name: open file} hold just these `shapes`, of these `dtypes`.

    `source`: what the shapes come from. Only headers are read.
    """
    missing, unknown = sorted(shapes.keys() - files.keys()), sorted(files.keys() - shapes.keys())
    counts = f"({len(missing)} missing, {len(unknown)} unknown)"
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing {counts}", hint)
    if unknown:
        raise UserError(
            f"{path}: tensor {unknown[0]} belongs to no part of the model {counts}", hint
        )
    for name, shape in shapes.items():
        tensor = files[name].get_slice(name)
        stored, dtype = tensor.get_shape(), tensor.get_dtype()
        if stored != [*shape]:
            raise UserError(
                f"{path}: tensor {name} is {stored}, {source} makes it {[*shape]}", hint
            )
        if dtype not in dtypes:
            names = ", ".join(dtypes)
            raise UserError(f"{path}: tensor {name} is of {dtype}, weights are of {names}", hint)


# --- printed text


def counted(n: int, noun: str) -> str:
    """Format a count: 1, "sessions kept" → "1 session kept"; a name (Saved Messages) stays."""
    if n == 1:
        noun = re.sub(r"^((?:[a-z-]+ )?[a-z]+)s\b", r"\1", noun)
    return f"{n:,} {noun}"


def printable(text: str) -> str:
    """Replace control characters, which could command a terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
