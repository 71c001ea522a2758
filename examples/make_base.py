"""Make examples/base: a tiny Mistral that speaks the world of make_export.py and has never seen Odile.

    python examples/make_base.py

Writes the world, trains a 2,000-piece sentencepiece vocabulary on it, pretrains with our own train.py, and keeps the model folder.
About half an hour on two CPU cores. Everything is seeded; the last digits of the weights depend on the machine.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build"
PIECES = 2000
SHAPE = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": PIECES,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
STEPS = 1600


def main():
    world, shape, trained, base = (BUILD / name for name in ("world", "shape", "trained", "base"))
    for folder in (shape, base):
        folder.mkdir(parents=True, exist_ok=True)
    run("examples/make_export.py", "--world", world)
    learn_pieces(world / "train.jsonl", shape / "tokenizer.model")
    (shape / "config.json").write_text(json.dumps(SHAPE, indent=2) + "\n")
    (shape / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true}\n'
    )
    folders = ("--model", shape, "--data", world, "--out", trained, "--overwrite")
    small = (
        "--lr",
        "2e-3",
        "--batch",
        "4",
        "--weight-decay",
        "0.1",
        "--max-steps",
        STEPS,
        "--samples",
        "0",
        "--device",
        "cpu",
    )
    run("train.py", "--from-scratch", "--loss-on", "everyone", *folders, *small)
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copyfile(trained / name, HERE / "base" / name)


def run(*command):
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def learn_pieces(sessions, out):
    """A sentencepiece BPE vocabulary as Mistral's are: bytes for what is unknown, every space kept."""
    lines = []
    for line in sessions.read_text(encoding="utf-8").splitlines():
        for turn in json.loads(line)["turns"]:
            lines.append(turn["author"])
            lines += [f">>> {part}" for message in turn["messages"] for part in message.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(out.with_suffix("")),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )


if __name__ == "__main__":
    (HERE / "base").mkdir(exist_ok=True)
    main()
