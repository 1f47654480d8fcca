"""Generation with an adapter on the CPU: tokens per second of prompts, and of the answers.

    python bench/decode.py [--model smollm2|1b] [--seconds 60] [--threads 2] [--prompts 1,8,64,512] [--new 24]

The models have the shapes of SmolLM2-135M or Llama-3.2-1B (with a vocabulary of 32,000), random weights, bf16 compute,
and an unmerged LoRA of rank 16 on all linear layers, unless stated otherwise. The output head is tied to the embeddings
and bf16, unless stated otherwise. transformers' `generate` is timed token by token; ours is prepared as in the commands
generate and chat, with exact activations unless stated otherwise. llama.cpp (llama-cpp-python, if installed) runs the
same shapes without an adapter, with its own quantization.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora_ext
import quality
from lib import harness
from lib.shapes import LLAMA_1B, SMOLLM2_135M
from qlora_app.decoding import compile_decoding, prepare_to_answer
from qlora_ext.formats import EXACT, INT8
from qlora_ext.integrations.peft import merge_to_4bit
from step import RANK

MODELS = {"smollm2": SMOLLM2_135M, "1b": LLAMA_1B}
COMPILED = "qlora_ext, compiled"


def now() -> float:
    """Seconds. With one thread, its CPU time, which is meaningful even if other processes use the machine."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """A streamer of transformers that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(now())

    def end(self) -> None:
        pass


def transformers_model(path: str, new: int, quantization: Any = None, merged: bool = False, compiled: bool = False):
    """A function from a prompt to the times of the answer's tokens since its start, for a model with an adapter."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval().requires_grad_(False)
    ours = isinstance(quantization, qlora_ext.QLoRAConfig)
    if merged:
        model = merge_to_4bit(model)[0] if ours else model.merge_and_unload()
    if ours:
        prepare_to_answer(model)
    if compiled:
        compile_decoding(model)

    def answer(prompt: torch.Tensor) -> list[float]:
        clock = Clock()
        options = {"max_new_tokens": new + 1, "do_sample": False, "pad_token_id": 0, "streamer": clock}
        with torch.no_grad():
            start = now()
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
        return [moment - start for moment in clock.times[1:]]  # the first is the prompt itself

    return answer


def write_gguf(path: Path, config: LlamaConfig) -> None:
    """A float16 GGUF file of a Llama with random weights and no vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    numbers = np.random.default_rng(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    of_keys = config.num_key_value_heads * config.head_dim
    shapes = {"attn_q": (hidden, hidden), "attn_k": (of_keys, hidden), "attn_v": (of_keys, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    shapes |= {"ffn_down": (hidden, inner)}
    tensors: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, hidden), "output_norm": (hidden,)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in shapes.items()}
        tensors |= {f"blk.{i}.attn_norm": (hidden,), f"blk.{i}.ffn_norm": (hidden,)}
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            weight = numbers.standard_normal(shape, np.float32) * 0.02
            writer.add_tensor(f"{name}.weight", weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_model(path: Path, form: str, threads: int, new: int):
    """The same function for llama.cpp, and the format of its output head; the other weights have ``form``."""
    import gguf
    import llama_cpp as cpp
    import numpy as np

    quantized = path.with_suffix(f".{form}.gguf")
    options = cpp.llama_model_quantize_default_params()
    options.ftype = getattr(cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    options.nthread = threads
    if cpp.llama_model_quantize(str(path).encode(), str(quantized).encode(), ctypes.byref(options)) != 0:
        raise RuntimeError(f"llama.cpp cannot quantize to {form}")
    head = next(t for t in gguf.GGUFReader(quantized).tensors if t.name == "token_embd.weight").tensor_type.name
    model = cpp.llama_model_load_from_file(str(quantized).encode(), cpp.llama_model_default_params())
    settings = cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
    settings.n_threads = settings.n_threads_batch = threads
    context = cpp.llama_init_from_model(model, settings)
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        ids = (cpp.llama_token * len(tokens))(*tokens)
        if cpp.llama_decode(context, cpp.llama_batch_get_one(ids, len(tokens))) != 0:
            raise RuntimeError("llama.cpp: decoding failed")
        logits = np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        return int(logits.argmax())

    def answer(prompt: torch.Tensor) -> list[float]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        tokens, times, start = prompt[0].tolist(), [], now()
        for _ in range(new + 1):
            tokens = [step(tokens)]
            times.append(now() - start)
        return times

    return answer, head


def contenders(config: LlamaConfig, folder: str, threads: int, new: int) -> dict[str, Any]:
    dense = f"{folder}/dense"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(dense)
    found = {}
    for activations, suffix in ((EXACT, ""), (INT8, ", int8 activations")):
        plain = qlora_ext.QLoRAConfig(activations=activations)
        with_head = qlora_ext.QLoRAConfig(activations=activations, embeddings=True)
        for name, quantization, merged in (
            ("", plain, False),
            (", 4-bit head", with_head, False),
            (", 4-bit head, adapter merged", with_head, True),
        ):
            answer = transformers_model(dense, new, quantization, merged=merged, compiled=True)
            found[f"{COMPILED}{name}{suffix}"] = answer
    found |= {
        "qlora_ext, eager": transformers_model(dense, new, qlora_ext.QLoRAConfig()),
        "bf16, adapter merged": transformers_model(dense, new, merged=True),
        "bf16 + PEFT": transformers_model(dense, new),
    }
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes + PEFT"] = transformers_model(dense, new, quality.nf4_of_bitsandbytes(torch.bfloat16))
    if importlib.util.find_spec("llama_cpp"):
        path = Path(folder, "model.gguf")
        write_gguf(path, config)
        for form in ("Q4_0", "IQ4_NL"):
            answer, head = llama_cpp_model(path, form, threads, new)
            found[f"llama.cpp {form}, {head} head, no adapter"] = answer
    return found


def main() -> None:
    parser = harness.parser(__doc__, seconds=60.0)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default smollm2")
    parser.add_argument("--prompts", default="1,8,64,512", help="lengths in tokens (default 1,8,64,512)")
    parser.add_argument("--new", type=int, default=24, help="tokens written after each prompt (default 24)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    harness.keep_freed_memory()
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[arguments.model], bos_token_id=None, eos_token_id=None)
    with TemporaryDirectory() as folder:
        answers = contenders(config, folder, arguments.threads, arguments.new)
    absent = [name for name in ("bitsandbytes", "llama_cpp") if importlib.util.find_spec(name) is None]
    report = harness.Report(
        f"decode_{arguments.model}_{arguments.threads}_threads",
        "Answering with an adapter on the CPU",
        [
            f"{arguments.model}'s shapes, rank {RANK} on all linears, bf16, {arguments.new} tokens after each prompt.",
            f"{'CPU time of one thread' if arguments.threads == 1 else 'Wall-clock time'}. "
            f"Ratio: time per token over that of '{COMPILED}' in the same round, median (10th to 90th percentile).",
            f"Not installed here: {', '.join(absent) or 'none'}.",
        ],
    )
    for length in map(int, arguments.prompts.split(",")):
        prompt = torch.randint(0, config.vocab_size, (1, length))
        prefill, decode = (harness.Times({name: [] for name in answers}) for _ in range(2))
        order = list(answers)
        for name in order:
            answers[name](prompt)
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end or len(decode[order[0]]) < 3:
            order.reverse()
            for name in order:
                first, *_, last = answers[name](prompt)
                prefill[name].append(first / length)
                decode[name].append((last - first) / arguments.new)
        for name in answers:
            report.add(
                **{
                    "prompt": length,
                    "contender": name,
                    "prompt tokens/s": 1 / prefill.median(name),
                    "written tokens/s": 1 / decode.median(name),
                    "best": 1 / decode.best(name),
                    "prompt, ratio": prefill.ratio(name, COMPILED),
                    "written, ratio": decode.ratio(name, COMPILED),
                }
            )
    report.write()


if __name__ == "__main__":
    main()
