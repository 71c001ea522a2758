"""`python lora.py merge ckpt/ clone/`: fold an adapter into its base, and write a folder that any tool reads."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

import cli
import lora
from cli import UserError, flag
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

MAX_LOGIT_CHANGE = (
    0.05  # of the logits' deviation: what a merge may add, whose every weight is rounded
)


@torch.no_grad()
def merge_and_check(model, ids):
    """`merge`; UserError unless the logits after `ids` stay the adapter's, but for the rounding of the merged weights."""
    model.dtype, dtype = torch.float32, model.dtype
    before = model(torch.tensor([ids]))
    gap = float((lora.merge(model)(torch.tensor([ids])) - before).std() / before.std())
    model.dtype = dtype
    if not gap < MAX_LOGIT_CHANGE:
        raise UserError(
            f"merged, the model answers otherwise than with its adapter: logits differ by {gap:.1%} (rounding makes up to {MAX_LOGIT_CHANGE:.0%})",
            "Nothing was written. Use the adapter folder as it is, and report this.",
        )
    return model


@dataclasses.dataclass(frozen=True)
class Options:
    """Merge an adapter into its base: a folder that any tool reads.  python lora.py merge ckpt/ clone/"""

    ckpt: str = flag(
        "", "an adapter folder (train.py --lora)", positional=True, group="what to merge"
    )
    model: str = flag("", "the base, when it lies elsewhere than the adapter says")

    out: str = flag("", "the folder to write", positional=True, group="what to write")
    weights: str = flag(
        "bf16", "precision, all but bf16 for chat.py alone", choices=("bf16", "int8", "int4")
    )
    as_: str | None = flag(None, "an Ollama Modelfile too, for a talk with this person")
    overwrite: bool = flag(False, "replace what OUT holds")


# Ollama's recipe for a merged folder; >>> comes before what is said, by whom Ollama calls user and assistant
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


def modelfile(me, you):
    names = {"<YOU>": you, "<ME>": me}
    return re.sub(
        "<YOU>|<ME>",
        lambda found: f"{{{{ {json.dumps(names[found[0]], ensure_ascii=False)} }}}}",
        MODELFILE,
    )


def main():
    if sys.argv[1:2] not in (["merge"], ["--help"], ["-h"]):
        raise UserError("lora.py knows one verb: merge", "python lora.py merge ckpt/ clone/")
    options = cli.parse(
        Options, sys.argv[2:] if sys.argv[1] == "merge" else sys.argv[1:], prog="lora.py merge"
    )
    if options.weights == "bf16" and not (Path(options.ckpt) / "adapter_config.json").exists():
        raise UserError(
            f"{options.ckpt} holds no adapter (adapter_config.json)",
            "Give the folder that train.py --lora wrote.",
        )
    cli.check_output_dir(options.out, options.overwrite)
    base = lora.read_adapter_config(options.ckpt)[1] if hf.is_adapter(options.ckpt) else None
    cli.refuse_overlap(options.out, options.ckpt, options.model or base)
    tokenizer = load_tokenizer(options.ckpt)
    me, _ = read_names(options.ckpt)
    if stranger := unknown_name_warning(options.ckpt, options.as_):
        print(stranger, file=sys.stderr)
    given = {"base": options.model or None, "words": tokenizer}
    if options.weights == "bf16":
        probe = tokenizer.encode(f"{IM_START}{me}\n>>> {PROBE_TEXT}{IM_END}")[0]
        model = merge_and_check(load_model(options.ckpt, **given), probe)
    else:
        model = load_model(options.ckpt, torch.bfloat16, weights=options.weights, **given)
    out = cli.make_private_dir(options.out)
    hf.clear_output(out)
    save_model(model, out, tokenizer)
    hf.copy_companions(options.ckpt, out)
    tokenizer.save(out)
    if options.as_:
        cli.write_text(out / "Modelfile", modelfile(me, options.as_))
    print(f"{out} is a whole model now: python chat.py {out}")
