"""`python lora.py merge ckpt/ clone/`: merge an adapter into a model folder that any tool reads."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import torch

import cli
import lora
from cli import UserError, flag
from model import Transformer
from weights import hf
from weights.load import load_model
from weights.save import save_model
from weights.tokenizer import (
    IM_END,
    IM_START,
    PROBE_TEXT,
    load_tokenizer,
    read_names,
    unknown_name_warning,
)

COMPANION_FILES = ("persona.json", "facts.md", "run.json", "metrics.jsonl")
# of the logits' standard deviation: how far rounding the merged weights may move them
MAX_LOGIT_CHANGE = 0.05
# Ollama's recipe for a merged folder. Ollama calls the two people user and assistant
MODELFILE = """# ollama create clone -f Modelfile
FROM .
TEMPLATE \"""{{ range .Messages }}<|im_start|>
{{- if eq .Role "user" }}<YOU>{{ else if eq .Role "assistant" }}<ME>{{ else }}{{ .Role }}{{ end }}
>>>{{ if ne (printf "%.1s" .Content) " " }} {{ end }}{{ .Content }}<|im_end|>
{{ end }}<|im_start|><ME>
>>>\"""
PARAMETER stop <|im_end|>
PARAMETER temperature 0.7
PARAMETER top_p 0.95
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Merge an adapter into a folder that any tool reads.  python lora.py merge ckpt/ clone/"""

    ckpt: str = flag(
        "", "an adapter folder (train.py --lora)", positional=True, group="what to merge"
    )
    model: str = flag("", "the base, if it is not where the adapter says")

    out: str = flag("", "the folder to write", positional=True, group="what to write")
    weights: str = flag(
        "bf16", "weight format; only chat.py reads int8, int4", choices=("bf16", "int8", "int4")
    )
    as_: str | None = flag(None, "also write an Ollama Modelfile, to chat as this person")
    overwrite: bool = flag(False, "replace what OUT holds")


@torch.no_grad()
def merge_and_check(model: Transformer, ids: list[int]) -> Transformer:
    """Merge the adapter. UserError if the logits for `ids` change more than rounding explains."""
    dtype, model.dtype = model.dtype, torch.float32
    before = model(torch.tensor([ids]))
    after = lora.merge(model)(torch.tensor([ids]))
    model.dtype = dtype
    change = float((after - before).std() / before.std())
    if not change < MAX_LOGIT_CHANGE:
        raise UserError(
            f"merging changes the logits by {change:.1%} "
            f"(rounding explains up to {MAX_LOGIT_CHANGE:.0%})",
            "Nothing was written. Use the adapter folder as it is, and report this.",
        )
    return model


def modelfile(me: str, you: str) -> str:
    names = {"<YOU>": you, "<ME>": me}

    def literal(match: re.Match) -> str:
        return f"{{{{ {json.dumps(names[match[0]], ensure_ascii=False)} }}}}"

    return re.sub("<YOU>|<ME>", literal, MODELFILE)


def main() -> None:
    verb, *argv = sys.argv[1:] or [""]
    if verb in ("--help", "-h"):
        argv = [verb]
    elif verb != "merge":
        raise UserError("lora.py has one command: merge", "python lora.py merge ckpt/ clone/")
    options = cli.parse(Options, argv, prog="lora.py merge")
    if options.weights == "bf16" and not hf.is_adapter(options.ckpt):
        raise UserError(
            f"{options.ckpt} holds no adapter (adapter_config.json)",
            "Give the folder that train.py --lora wrote.",
        )
    cli.check_output_dir(options.out, options.overwrite)
    base = hf.adapter_base(options.ckpt) if hf.is_adapter(options.ckpt) else None
    cli.refuse_overlap(options.out, options.ckpt, options.model or base)
    tokenizer = load_tokenizer(options.ckpt)
    me, _ = read_names(options.ckpt)
    if warning := unknown_name_warning(options.ckpt, options.as_):
        print(warning, file=sys.stderr)
    if options.weights == "bf16":
        model = load_model(options.ckpt, base=options.model, tokenizer=tokenizer)
        probe, _ = tokenizer.encode(f"{IM_START}{me}\n>>> {PROBE_TEXT}{IM_END}")
        merge_and_check(model, probe)
    else:
        model = load_model(
            options.ckpt,
            torch.bfloat16,
            base=options.model,
            tokenizer=tokenizer,
            weights=options.weights,
        )
    # everything was checked: from here on OUT changes
    out = cli.make_private_dir(options.out)
    hf.clear_output(out)
    save_model(model, out, tokenizer)
    for name in COMPANION_FILES:
        if (source := Path(options.ckpt) / name).is_file():
            shutil.copyfile(source, out / name)
    tokenizer.save(out)
    if options.as_:
        cli.write_text(out / "Modelfile", modelfile(me, options.as_))
    print(f"{out} is a whole model now: python chat.py {out}")
