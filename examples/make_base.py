"""Make examples/base: a tiny Mistral that knows the world of make_export.py but not Odile.

    python examples/make_base.py

Writes the world, trains a sentencepiece vocabulary of 2,000 pieces on it, pretrains with our own
train.py, and keeps the model folder. Takes about half an hour on two CPU cores. Everything is
seeded; the last digits of the weights depend on the machine.
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
STEPS = 1600
VOCAB_SIZE = 2000
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main() -> None:
    world, trained = BUILD / "world", BUILD / "trained"
    untrained = BUILD / "untrained"  # config and tokenizer, no weights yet
    untrained.mkdir(parents=True, exist_ok=True)
    run("examples/make_export.py", "--world", world)
    train_tokenizer(world / "train.jsonl", untrained / "tokenizer.model")
    (untrained / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (untrained / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG) + "\n")

    folders = ("--model", untrained, "--data", world, "--out", trained, "--overwrite")
    recipe = f"--lr 2e-3 --batch 4 --weight-decay 0.1 --max-steps {STEPS}"
    other = "--from-scratch --loss-on everyone --samples 0 --device cpu"
    run("train.py", *folders, *recipe.split(), *other.split())
    (HERE / "base").mkdir(exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(trained / name, HERE / "base" / name)


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train_tokenizer(sessions: Path, out: Path) -> None:
    """Train a sentencepiece BPE like Mistral's: unknown text as bytes, every space kept."""
    lines = []
    for line in sessions.read_text(encoding="utf-8").splitlines():
        for turn in json.loads(line)["turns"]:
            lines.append(turn["author"])
            lines += [f">>> {part}" for message in turn["messages"] for part in message.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(out.with_suffix("")),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )


if __name__ == "__main__":
    main()
