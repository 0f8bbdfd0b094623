"""A mixture-of-experts model whose experts transformers would leave in 16 bit, in 4 bit: a tiny random Mixtral, made here.

    python examples/moe_experts.py            a few seconds
    python examples/moe_experts.py --steps 5  a shorter training

What is shown, in order:

1. memory     of the model dense, with 4-bit linear layers as `BitsAndBytesConfig` makes them, and with 4-bit experts as well (`quantize_experts`);
2. train      a LoRA adapter on the attention layers learns a sequence, through frozen experts in 4 bit, with gradient checkpointing;
3. save       the quantised model goes to disk and comes back with identical logits.

The program fails if a thing it claims is not so.
"""

import argparse
from pathlib import Path
import sys
import tempfile

try:
    import accelerate
    import peft
    import safetensors.torch
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging
except ImportError as error:
    sys.exit(f"{error}. Install what the examples need: pip install -c constraints.txt -e '.[quickstart]'")

import bitsandbytes as bnb

SIZES = dict(
    vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=128,
)  # fmt: skip
TOKENS = (torch.arange(64) * 37 % 101)[None]


def megabytes(model) -> float:
    """Size of all weights, with the statistics of the quantised ones."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e6


def loaded(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, **options).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def with_adapter(model):
    """A LoRA adapter on the attention layers of the frozen model, with gradient checkpointing."""
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"))


def trained(model, steps: int) -> list[float]:
    """Trains the adapter with an 8-bit optimizer and returns the loss of each step."""
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def reloaded(folder: Path):
    """A model saved with quantised experts: built without memory, given the same modules, then the tensors of the file."""
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        bnb.utils.replace_linear(model, bnb.nn.Linear4bit, skip_modules=None)
        bnb.nn.quantize_experts(model)
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), assign=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    steps = parser.parse_args().steps
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        dense_folder, folder = Path(scratch, "dense"), Path(scratch, "quantised")
        torch.manual_seed(0)
        MixtralForCausalLM(MixtralConfig(**SIZES)).to(torch.bfloat16).save_pretrained(dense_folder)

        dense = loaded(dense_folder)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = loaded(dense_folder, quantization_config=nf4)
        sizes = {"bf16": megabytes(dense), "linear layers in NF4": megabytes(model)}
        names = bnb.nn.quantize_experts(model)
        sizes["experts in NF4 as well"] = megabytes(model)
        change = ((logits(model) - logits(dense)).norm() / logits(dense).norm()).item()

        expected = logits(model)
        model.save_pretrained(folder, save_original_format=False)
        same = torch.equal(logits(reloaded(folder)), expected)
        losses = trained(with_adapter(model), steps)

    claims = {
        "the experts of every layer are in 4 bit": len(names) == SIZES["num_hidden_layers"],
        "the model takes less than 40 % of its memory in bf16": sizes["experts in NF4 as well"] < 0.4 * sizes["bf16"],
        "the reloaded model gives identical logits": same,
        f"the loss falls over {steps} LoRA steps": losses[-1] < losses[0],
    }
    print(f"a Mixtral of {SIZES['num_hidden_layers']} layers with {SIZES['num_local_experts']} experts each\n")
    for name, size in sizes.items():
        print(f"{name:24} {size:6.2f} MB")
    print(f"\nlogits change by {change:.1%}; loss {losses[0]:.2f} -> {losses[-1]:.2f}\n")
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO ':4} {claim}")
    if not all(claims.values()):
        sys.exit("The run did not show what it should: see the lines marked NO.")


if __name__ == "__main__":
    main()
