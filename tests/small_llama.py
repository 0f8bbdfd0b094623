"""A small Llama, made in code, and what the integration tests do with it whatever it is quantised to. Everything happens offline."""

from helpers import DEVICE
import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(18).view(2, 9) * 13 % 256


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **{"device_map": DEVICE, "dtype": torch.float32, **options}).eval()


def saved(path, layers=1, **changes) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers, **changes})).save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    """Waking another thread costs more than a layer of these sizes."""
    torch.set_num_threads(1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def difference(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def with_adapter(model, reentrant=None, config=None):
    checkpointing = reentrant is not None
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None
    )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config or peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


def trained(model, steps=3, evaluate=False):
    """Trains the adapter a little. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        if evaluate:
            logits(model.eval())
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
