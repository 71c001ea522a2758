"""llama.cpp's side of bench.generate: `python bench/llama.py FOLDER make|bf16|q8_0|q4_0`.

Run it with a Python that has llama-cpp-python and gguf.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np

# As in bench/generate.py, which this Python can't import
PROMPT_TOKENS = 512
REPLY_TOKENS = 32
SECOND_TURN_TOKENS = 20
GGUF_NAMES = {
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


def make(folder: Path) -> None:
    """Write a GGUF file of the folder's shape with random weights in each precision.

    It has no tokenizer: only ids go in.
    """
    shapes = tensor_shapes(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for precision in ("BF16", "Q8_0", "Q4_0"):
        write_gguf(folder / f"{precision.lower()}.gguf", precision, config, shapes)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in folder.glob("*.safetensors"):
        start = file.read_bytes()[: 1 << 20]
        header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
        header.pop("__metadata__", None)
        shapes |= {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    return shapes


def write_gguf(path: Path, precision: str, config: dict, shapes: dict) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[precision]
    quantized = {}  # by shape: quantizing is slow, and equal weights do as well
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
            continue
        if shape not in quantized:
            weight = generator.normal(0, 0.02, shape).astype(np.float32)
            quantized[shape] = gguf.quantize(weight, quantization)
        writer.add_tensor(gguf_name(name), quantized[shape], raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight → blk.3.ffn_up.weight"""
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return f"{GGUF_NAMES[name]}.weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def measure(path: Path) -> dict[str, float]:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=1024, n_batch=512, n_threads=2, verbose=False)

    def seconds(ids: list[int]) -> float:
        start = time.perf_counter()
        model.eval(ids)
        return time.perf_counter() - start

    prefills: list[float] = []
    steps: list[float] = []
    second_turns: list[float] = []
    for seed in (1, 2, 3, 4):
        model.reset()
        ids = random.Random(seed).choices(range(3, 7000), k=PROMPT_TOKENS)
        prefills.append(seconds(ids))
        steps += [seconds([5]) for _ in range(REPLY_TOKENS)]
        second_turns.append(seconds(ids[:SECOND_TURN_TOKENS]))
    return {
        "tok_per_s": 1 / statistics.median(steps),
        "first_token_s": statistics.median(prefills[1:]),
        "second_turn_s": statistics.median(second_turns),
    }


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2]
    if task == "make":
        make(folder)
    else:
        print(json.dumps(measure(folder / f"{task}.gguf")))


if __name__ == "__main__":
    main()
