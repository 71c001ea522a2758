"""llama.cpp reads what we write: its own converter, its own tokenizer, its own arithmetic."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, VOCAB

from model import Transformer
from weights import hf
from weights.load import load_weights
from weights.save import save_model

PEERS = ROOT / "build" / "peers"
PROMPT = "<|im_start|>Bob\n>>> hello there, how's the 42nd?<|im_end|>\n<|im_start|>Ann\n>>>"
READ = """
import json, sys
from llama_cpp import Llama
path, text, count = sys.argv[1:]
model, generated = Llama(path, n_ctx=256, n_threads=1, verbose=False), []
ids = model.tokenize(text.encode(), add_bos=True, special=True)
for id in model.generate(ids, temp=0.0, top_k=1):
    generated.append(id)
    if len(generated) == int(count):
        break
print(json.dumps([ids, generated]))
"""


@pytest.mark.skipif(
    not (PEERS / "done").exists(), reason="llama.cpp is not here: make peers (a quarter of an hour)"
)
def test_llama_cpp_reads_our_folder_with_equal_tokens(base, tokenizer, tmp_path):
    folder = tmp_path / "clone"
    folder.mkdir()
    model = Transformer(hf.with_vocab_size(hf.read_config(base), VOCAB + 2))
    load_weights(model, base)
    save_model(model, folder, tokenizer, torch.float32)
    (folder / "persona.json").write_text(json.dumps({"me": "Ann", "contacts": [{"name": "Bob"}]}))
    tokenizer.save(folder)
    assert_llama_cpp_agrees(folder, model, tokenizer, tmp_path / "clone.gguf")


def assert_llama_cpp_agrees(folder, model, tokenizer, file):
    """llama.cpp converts `folder`, gives PROMPT the same ids and greedily the same tokens."""
    converter, env = (
        PEERS / "vendor" / "llama.cpp",
        {**os.environ, "PYTHONPATH": str(PEERS / "vendor" / "llama.cpp" / "gguf-py")},
    )
    command = [
        sys.executable,
        converter / "convert_hf_to_gguf.py",
        folder,
        "--outfile",
        file,
        "--outtype",
        "f32",
    ]
    subprocess.run(command, env=env, check=True, capture_output=True)
    done = subprocess.run(
        [PEERS / "bin" / "python", "-c", READ, file, PROMPT, "24"],
        check=True,
        capture_output=True,
        text=True,
    )
    ids, generated = json.loads(done.stdout.splitlines()[-1])
    assert ids == tokenizer.encode(PROMPT)[0]
    with torch.no_grad():
        for expected in generated:
            assert int(model(torch.tensor([ids]))[0, -1].argmax()) == expected
            ids.append(expected)
