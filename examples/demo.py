"""`make demo`: the example export becomes someone you can talk to, with the same commands as your own will.

Everything is written to build/demo/.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT = ROOT / "build" / "demo"
QUESTIONS = ("Where are you?", "How are you?", "What are you doing at the weekend?")
FRIEND = "Runa Vell"


def main():
    began = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sessions, ckpt = ("--out", OUT / "data", "--tokenizer", HERE / "base"), OUT / "ckpt"
    step("1. The export becomes sessions", "data.py", HERE / "telegram" / "result.json", *sessions)
    small = ("--model", HERE / "base", "--lr", "5e-3", "--batch", "4", "--epochs", "6", "--device", "cpu")
    step("2. The tiny base learns to talk like Odile", "train.py", "--lora", "--data", OUT / "data", "--out", ckpt, *small)
    print("\n\033[1m3. Base and clone answer the same questions\033[0m\n")
    for question in QUESTIONS:
        print(f"{FRIEND}: {question}")
        for name, folder in (("the base", HERE / "base"), ("the clone", ckpt)):
            for message in ask(folder, question):
                print(f"    {name:>9}: {message}")
    before_after = json.loads((ckpt / "run.json").read_text(encoding="utf-8"))["result"]
    print(f"""
Held-out loss: {before_after["loss_before"]:.2f} before, {before_after["loss"]:.2f} after; {time.time() - began:.0f} seconds in all.

Talk to it:          .venv/bin/python chat.py {ckpt.relative_to(ROOT)}

Now your own. Telegram Desktop > Settings > Advanced > Export Telegram data: tick personal chats and groups,
untick "only my messages", format JSON. Then, on a machine with a GPU of 24 GB:

    source .venv/bin/activate
    python data.py path/to/result.json
    python train.py --lora
    python chat.py ckpt/
""")


def step(title, *command):
    print(f"\n\033[1m{title}\033[0m   python {' '.join(short(c) for c in command)}\n", flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def short(word):
    return str(word.relative_to(ROOT)) if isinstance(word, Path) else word


def ask(folder, question):
    command = [sys.executable, "chat.py", folder, "-p", question, "--as", FRIEND, "--seed", "1", "--device", "cpu", "--me", "Odile Tarn"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8")
    return done.stdout.splitlines()


if __name__ == "__main__":
    main()
