"""Full fine-tuning of SmolLM2-135M with the 8-bit and 32-bit AdamW, beside torch.optim.AdamW: loss by step, memory of the states.

    python benchmarking/training_curves.py                      # after `make quickstart`, which makes the model; about 15 minutes on 2 cores
    python benchmarking/training_curves.py --steps 5 --save ''   # a short form that records nothing

Every run starts from the same weights (fp32) and sees the same batches, cut from the English help texts of Python's standard library. Results
go to benchmarking/results/<name>.json, .md and .png.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import bitsandbytes as bnb  # noqa: E402

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "examples" / "output" / "smollm2-fp32"

BATCH, TOKENS = 2, 128
SETTINGS = {"lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
REFERENCE = "torch.optim.AdamW"
OPTIMIZERS = {
    REFERENCE: torch.optim.AdamW,
    "bitsandbytes AdamW": bnb.optim.AdamW,
    "bitsandbytes AdamW8bit": bnb.optim.AdamW8bit,
}
LAST = 10  # the final loss is the mean of so many steps


def batches(model_folder: Path, steps: int) -> torch.Tensor:
    """Token ids [steps, BATCH, TOKENS]: consecutive text, none of it twice."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    needed = steps * BATCH * TOKENS
    if len(ids) < needed:
        raise SystemExit(f"the text has {len(ids)} tokens, {steps} steps need {needed}: choose fewer --steps")
    return ids[:needed].view(steps, BATCH, TOKENS)


def bytes_of_states(optimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))


def train(name: str, model_folder: Path, data: torch.Tensor) -> dict:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    optimizer = OPTIMIZERS[name](model.parameters(), **SETTINGS)
    losses = []
    for ids in tqdm(data, desc=name, disable=None):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "final": mean(losses[-LAST:]), "state_bytes": bytes_of_states(optimizer)}


def table(runs: dict[str, dict]) -> str:
    reference = runs[REFERENCE]["final"]
    rows = [f"| optimizer | first loss | final loss (mean of the last {LAST} steps) | against {REFERENCE} | states |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        change = 100 * (run["final"] / reference - 1)
        rows.append(f"| {name} | {run['losses'][0]:.4f} | {run['final']:.4f} | {change:+.3f} % | {run['state_bytes'] / 1e6:.0f} MB |")
    return "\n".join(rows)


def draw(runs: dict[str, dict], path: Path) -> None:
    figure, (curves, differences) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    reference = runs[REFERENCE]["losses"]
    for (name, run), style in zip(runs.items(), ("k-", "C0--", "C1:")):
        curves.plot(run["losses"], style, label=f"{name}, {run['state_bytes'] / 1e6:.0f} MB of states")
        if name != REFERENCE:
            differences.plot([100 * (mine / theirs - 1) for mine, theirs in zip(run["losses"], reference)], style, label=name)
    curves.set(title="SmolLM2-135M, full fine-tuning, fp32", ylabel="loss")
    differences.set(xlabel="step", ylabel=f"difference from {REFERENCE}, %")
    for axes in (curves, differences):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="an fp32 checkpoint; default: the one that `make quickstart` made")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", default="training-curves", metavar="NAME", help="name of the result files; '' records nothing")
    options = parser.parse_args()
    if not options.model.exists():
        raise SystemExit(f"{options.model} does not exist: run `make quickstart` first or name a checkpoint with --model")
    data = batches(options.model, options.steps)
    runs = {name: train(name, options.model, data) for name in OPTIMIZERS}
    print(table(runs))
    if options.save:
        results = HERE / "results" / options.save
        record = {"torch": torch.__version__, "bitsandbytes": bnb.__version__, "batch": [BATCH, TOKENS], "settings": SETTINGS, "runs": runs}
        results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        results.with_suffix(".md").write_text(
            f"# SmolLM2-135M, full fine-tuning in fp32, {options.steps} steps of {BATCH} x {TOKENS} tokens\n\n"
            f"`python benchmarking/training_curves.py`, torch {torch.__version__}, bitsandbytes {bnb.__version__}.\n\n{table(runs)}\n\n"
            f"![loss by step]({options.save}.png)\n"
        )
        draw(runs, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
