"""llama.cpp's side of bench.generate and bench.batch.

    python bench/llama.py FOLDER make OUT PRECISION...      OUT/bf16.gguf and others, random weights
    python bench/llama.py FOLDER one GGUF                   one reply
    python bench/llama.py FOLDER batch GGUF PROMPT REPLY N...   N replies at once, of these lengths

Run it with a Python that has llama-cpp-python and gguf.
"""

import json
import os
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


def make(folder: Path, out: Path, precisions: list[str]) -> None:
    """Write a GGUF file of the folder's shape with random weights in each precision.

    It has no tokenizer: only ids go in.
    """
    shapes = tensor_shapes(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for precision in precisions:
        write_gguf(out / f"{precision.lower()}.gguf", precision, config, shapes)


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

    threads = len(os.sched_getaffinity(0))
    model = Llama(str(path), n_ctx=1024, n_batch=512, n_threads=threads, verbose=False)

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


def measure_batch(path: Path, prompt: int, reply: int, numbers: list[int]) -> dict[str, dict]:
    """Time replies that begin together, and one that joins the others: see bench.batch."""
    batch = Batch(path, prompt + reply + 1, max(numbers))
    generator = random.Random(0)

    def prompts(number: int) -> list[list[int]]:
        return [generator.choices(range(3, 7000), k=prompt) for _ in range(number)]

    figures = {}
    for number in [numbers[0], *numbers]:  # the first one also warms up
        batch.clear()
        start = time.perf_counter()
        # Each prompt is a call, as their server reads them
        last = [batch.decode({row: ids})[row] for row, ids in enumerate(prompts(number))]
        begun = time.perf_counter()
        for _ in range(reply - 1):
            last = list(batch.decode({row: [id] for row, id in enumerate(last)}).values())
        end = time.perf_counter()

        batch.clear()
        *others, joining = prompts(number)
        for row, ids in enumerate(others):
            batch.decode({row: ids})
        joins = time.perf_counter()
        # Their server reads a prompt in the same call as the others' next tokens
        batch.decode({row: [5] for row in range(number - 1)} | {number - 1: joining})
        figures[str(number)] = {
            "tok_per_s": number * (reply - 1) / (end - begun),
            "all_tok_per_s": number * reply / (end - start),
            "last_begins_s": begun - start,
            "joins_s": time.perf_counter() - joins,
        }
    return figures


class Batch:
    """Several sequences in one context, by llama.cpp's own functions."""

    def __init__(self, path: Path, size: int, rows: int):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        # Kept, because llama.cpp holds only its address
        self.ignore_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.ignore_log, None)
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * -(-size // 256) * 256
        # A prompt, and a token of each other row
        capacity = max(512, size + rows)
        settings.n_batch, settings.n_ubatch = capacity, 512
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(capacity, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.lengths = [0] * rows

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.lengths = [0] * len(self.lengths)

    def decode(self, ids: dict[int, list[int]]) -> dict[int, int]:
        """Append ids to rows, in one call; return the likeliest next id of each row."""
        batch, count, ends = self.batch, 0, {}
        for row, row_ids in ids.items():
            for id in row_ids:
                batch.token[count] = id
                batch.pos[count] = self.lengths[row]
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = row
                batch.logits[count] = 0
                self.lengths[row] += 1
                count += 1
            batch.logits[count - 1] = 1
            ends[row] = count - 1
        batch.n_tokens = count
        status = self.api.llama_decode(self.context, batch)
        assert status == 0, status
        return {row: int(self.logits(end).argmax()) for row, end in ends.items()}

    def logits(self, index: int) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))


def main() -> None:
    folder, task, path, *rest = sys.argv[1:]
    if task == "make":
        make(Path(folder), Path(path), rest)
    elif task == "one":
        print(json.dumps(measure(Path(path))))
    else:
        prompt, reply, *numbers = map(int, rest)
        print(json.dumps(measure_batch(Path(path), prompt, reply, numbers)))


if __name__ == "__main__":
    main()
