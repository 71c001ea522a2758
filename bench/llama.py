"""llama.cpp's side of bench.generate, run by a Python that has llama-cpp-python and gguf: FOLDER make|bf16|q8_0|q4_0."""

import json
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np

PROMPT, NEW, AGAIN = 512, 32, 20  # as in bench/generate.py
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make(folder):
    """The folder's shape with random weights, once a kind; no tokenizer is needed where only ids go in."""
    import gguf

    said = json.loads((folder / "config.json").read_text())
    shapes = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()[: 1 << 20]
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        shapes |= {name: header[name]["shape"] for name in header if name != "__metadata__"}
    for kind in ("BF16", "Q8_0", "Q4_0"):
        writer = gguf.GGUFWriter(folder / f"{kind.lower()}.gguf", "llama")
        writer.add_vocab_size(said["vocab_size"])
        writer.add_context_length(said["max_position_embeddings"])
        writer.add_embedding_length(said["hidden_size"])
        writer.add_block_count(said["num_hidden_layers"])
        writer.add_feed_forward_length(said["intermediate_size"])
        writer.add_head_count(said["num_attention_heads"])
        writer.add_head_count_kv(said["num_key_value_heads"])
        writer.add_rope_dimension_count(said["head_dim"])
        writer.add_layer_norm_rms_eps(said["rms_norm_eps"])
        writer.add_tokenizer_model("no_vocab")
        some, done = np.random.default_rng(0), {}
        for name, shape in shapes.items():
            ours = name.removesuffix(".weight")
            block = ours.split(".")[2] if ours.startswith("model.layers.") else None
            theirs = NAMES[ours if block is None else ours.split(".", 3)[3]]
            theirs = theirs if block is None else f"blk.{block}.{theirs}"
            if len(shape) == 1:
                writer.add_tensor(f"{theirs}.weight", np.ones(shape, np.float32))
                continue
            if tuple(shape) not in done:
                value = some.normal(0, 0.02, shape).astype(np.float32)
                done[tuple(shape)] = gguf.quantize(value, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(
                f"{theirs}.weight", done[tuple(shape)], raw_dtype=gguf.GGMLQuantizationType[kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def measure(path):
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=1024, n_batch=512, n_threads=2, verbose=False)

    def took(ids):
        began = time.perf_counter()
        model.eval(ids)
        return time.perf_counter() - began

    firsts, steps, again = [], [], []
    for seed in (1, 2, 3, 4):
        model.reset()
        ids = random.Random(seed).choices(range(3, 7000), k=PROMPT)
        firsts.append(took(ids))
        steps += [took([5]) for _ in range(NEW)]
        again.append(took(ids[:AGAIN]))
    return {
        "tok_per_s": 1 / statistics.median(steps),
        "first_token_s": statistics.median(firsts[1:]),
        "second_turn_s": statistics.median(again),
    }


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    print(make(folder) if what == "make" else json.dumps(measure(folder / f"{what}.gguf")))
