"""QLoRA over several processes with FSDP2: train, checkpoint, resume, and export one quantised file.

    python examples/fsdp2_qlora.py --tiny         a small random model, a quarter of a minute on two CPU cores
    python examples/fsdp2_qlora.py                SmolLM2-135M-Instruct, on CPUs over gloo
    python examples/fsdp2_qlora.py --device cuda  the same on as many GPUs as there are processes, over NCCL

What happens, in order:

1. every process loads the model with its weights in NF4 (double quantisation), adds LoRA adapters, and `fully_shard` leaves it its part of both;
2. the adapters are trained with an 8-bit optimizer. Mixed precision casts adapters and norms to bfloat16; the packed codes travel as they are;
3. half way the adapters and the optimizer go to a distributed checkpoint. A new model resumes from it, and repeats the second half loss for loss;
4. the whole model is gathered, merged, and saved as one quantised file, which `from_pretrained` reads in one process.

The program fails if a thing it claims is not so.
"""

import argparse
import contextlib
import io
import math
import os
from pathlib import Path
import tempfile

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig
from transformers.utils.logging import disable_progress_bar

import bitsandbytes as bnb

OUTPUT = Path(__file__).resolve().parent / "output"
TINY = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)  # fmt: skip
PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ROWS, LENGTH = 4, 48  # of a batch, all processes together


# --- model and data ----------------------------------------------------------------------------------------------------------


def prepare(folder: Path, tiny: bool) -> None:
    """Puts a float checkpoint into the folder."""
    if tiny:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(TINY).save_pretrained(folder)
    else:
        from quickstart import prepare_float_model  # it needs packages that the tiny model does without

        prepare_float_model(folder)


def training_tokens(folder: Path, tiny: bool) -> torch.Tensor:
    """The Zen of Python, over and over, as one row of token ids; bytes for the tiny model."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        import this  # noqa: F401
    ids = list(text.getvalue().encode()) if tiny else AutoTokenizer.from_pretrained(folder)(text.getvalue())["input_ids"]
    return torch.tensor(ids).repeat(-(-(ROWS * LENGTH + len(ids)) // len(ids)))


def quantised_model(folder: Path, device: torch.device | str) -> peft.PeftModel:
    """The model in 4 bit, whole, with fresh adapters: the same ones in every process."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4, dtype=torch.float32, device_map={"": device})
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def sharded_model(folder: Path, mesh) -> peft.PeftModel:
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    model = quantised_model(folder, device)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=PRECISION)
    return fully_shard(model, mesh=mesh, mp_policy=PRECISION)


# --- training ----------------------------------------------------------------------------------------------------------------


class Training:
    """A sharded model with its optimizer, and how far it has come."""

    def __init__(self, folder: Path, mesh, tokens: torch.Tensor):
        self.model, self.tokens, self.mesh, self.step = sharded_model(folder, mesh), tokens, mesh, 0
        self.optimizer = bnb.optim.AdamW8bit([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)

    def run(self, until: int) -> list[float]:
        """Trains up to a step; the loss of each step, averaged over the processes."""
        losses = []
        while self.step < until:
            start = 7 * self.step % (self.tokens.numel() - ROWS * LENGTH)
            batch = self.tokens[start : start + ROWS * LENGTH].view(ROWS, LENGTH)
            mine = batch.chunk(self.mesh.size())[self.mesh.get_rank()].to(self.mesh.device_type)
            loss = self.model(input_ids=mine, labels=mine).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total = loss.detach().float().clone()
            dist.all_reduce(total)
            losses.append(total.item() / self.mesh.size())
            self.step += 1
        return losses

    def _state(self) -> dict:
        entries = get_model_state_dict(self.model)
        return {
            "adapters": {key: value for key, value in entries.items() if "lora_" in key},
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "step": torch.tensor(self.step),
        }

    def save(self, folder: Path) -> None:
        """Every process writes its part; the frozen weights are left out."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["adapters"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state["optimizer"])
        self.step = int(state["step"])


# --- export ------------------------------------------------------------------------------------------------------------------


def export(entries: dict[str, torch.Tensor], folder: Path, target: Path, tokens: torch.Tensor) -> float:
    """One process: the gathered entries become a model with merged adapters in one file. Returns the loss of what was read back."""
    whole = quantised_model(folder, "cpu")
    whole.load_state_dict(entries)  # strict: every code and every statistic is there
    merged = whole.merge_and_unload().eval()
    merged.save_pretrained(target)
    if (folder / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    files = list(target.glob("*.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(target, device_map={"": "cpu"}).eval()
    row = tokens[None, :LENGTH]
    with torch.no_grad():
        expected, found = merged(input_ids=row, labels=row), again(input_ids=row, labels=row)
    assert torch.equal(found.logits, expected.logits), "the exported model computes something else"
    assert len(files) == 1 and any(isinstance(m, bnb.nn.Linear4bit) for m in again.modules())
    print(f"exported {target}: {files[0].name}, {files[0].stat().st_size / 1e6:.2f} MB")
    return found.loss.item()


# --- the program -------------------------------------------------------------------------------------------------------------


def work(rank: int, options: argparse.Namespace, float_model: Path, scratch: Path) -> None:
    """What each process does."""
    disable_progress_bar()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(scratch / "store"), options.processes)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo", store=store, rank=rank, world_size=options.processes)
    mesh, tokens = init_device_mesh(options.device, (options.processes,)), training_tokens(float_model, options.tiny)
    half = options.steps // 2

    training = Training(float_model, mesh, tokens)
    before = training.run(half)
    training.save(scratch / "checkpoint")
    after = training.run(options.steps)

    resumed = Training(float_model, mesh, tokens)
    resumed.load(scratch / "checkpoint")
    repeated = resumed.run(options.steps)
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(after, repeated, strict=True)), (after, repeated)
    assert after[-1] < before[0], "training did not lower the loss"

    packed = [p for p in resumed.model.parameters() if p.dtype == torch.uint8]
    mine, total = sum(p.to_local().numel() for p in packed), sum(p.numel() for p in packed)
    entries = get_model_state_dict(resumed.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        print(f"packed weights: {total / 1e6:.2f} MB, {mine / 1e6:.2f} MB of them here, the first of {options.processes} processes")
        print(f"loss: {before[0]:.3f} at the start, {before[-1]:.3f} at the checkpoint, {after[-1]:.3f} at the end, {repeated[-1]:.3f} resumed")
        loss = export(entries, float_model, options.output, tokens)
        print(f"loss of the exported model, in one process: {loss:.3f}")
        assert loss < before[0], "the exported model has lost what was learnt"
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small random model instead of SmolLM2")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps; the checkpoint comes half way")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: over gloo; cuda: a GPU for each process, over NCCL")
    parser.add_argument("--output", type=Path, help="folder of the exported model; default: in examples/output")
    options = parser.parse_args()
    if options.steps < 2 or ROWS % options.processes:
        parser.error(f"--steps must be at least 2, and --processes must divide a batch of {ROWS}")
    options.output = options.output or OUTPUT / ("tiny-fsdp2" if options.tiny else "smollm2-fsdp2")
    with tempfile.TemporaryDirectory() as scratch:
        float_model = Path(scratch, "float") if options.tiny else OUTPUT / "smollm2-fp32"
        float_model.mkdir(parents=True, exist_ok=True)
        prepare(float_model, options.tiny)
        torch.multiprocessing.spawn(work, args=(options, float_model, Path(scratch)), nprocs=options.processes)


if __name__ == "__main__":
    main()
