"""The optimizers through the Trainer of transformers, under every name it knows them by, and through accelerate."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
from helpers import assert_same_bits, bell, grid
import pytest
import torch
from torch import nn
import transformers
from transformers import Trainer, TrainingArguments

from bitsandbytes import optim

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

NAMES = {
    "adamw_bnb_8bit": (optim.AdamW, 8), "adamw_8bit": (optim.AdamW, 8), "paged_adamw_32bit": (optim.AdamW, 32), "paged_adamw_8bit": (optim.AdamW, 8),
    "ademamix": (optim.AdEMAMix, 32), "ademamix_8bit": (optim.AdEMAMix, 8), "paged_ademamix_32bit": (optim.AdEMAMix, 32),
    "paged_ademamix_8bit": (optim.AdEMAMix, 8), "lion_32bit": (optim.Lion, 32), "lion_8bit": (optim.Lion, 8), "paged_lion_32bit": (optim.Lion, 32),
    "paged_lion_8bit": (optim.Lion, 8), "rmsprop_bnb": (optim.RMSprop, 32),
    "rmsprop_bnb_8bit": (optim.RMSprop, 8), "rmsprop_bnb_32bit": (optim.RMSprop, 32),
}  # fmt: skip

ROWS = [{"ids": (torch.arange(8) * (i + 3)) % 80, "labels": torch.tensor(float(i % 5))} for i in range(16)]


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield
    manager.initialize()


class Model(nn.Module):
    """An embedding and two layers; the states of the embedding and of the first layer are large enough for 8 bits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(80, 64), nn.Linear(64, 80), nn.Linear(80, 1)
        for i, p in enumerate(self.parameters()):
            p.data.copy_(bell(p.numel(), seed=i).view(p.shape) * 0.1)

    def forward(self, ids, labels):
        out = self.second(self.first(self.embedding(ids).mean(dim=1)).relu()).squeeze(-1)
        return {"loss": (out - labels).square().mean(), "logits": out}


def trainer(folder, name, **kwargs):
    arguments = TrainingArguments(
        str(folder), optim=name, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **kwargs},
    )  # fmt: skip
    return Trainer(Model(), arguments, train_dataset=ROWS)


ARGUMENTS = {
    "rmsprop_bnb": ("alpha=0.9,momentum=0.5,centered=True,eps=1e-6", dict(betas=(0.9, 0.5), eps=1e-6)),
    "rmsprop_bnb_8bit": ("alpha=0.9, momentum=0, min_8bit_size=128", dict(betas=(0.9, 0))),
    "ademamix_8bit": ("alpha=3,t_alpha=5,beta3=0.99", dict(alpha=3.0, t_alpha=5, betas=(0.9, 0.999, 0.99))),
}


@grid(name=ARGUMENTS)
def test_arguments_of_the_trainer_arrive_as_numbers(tmp_path, name):
    text, settings = ARGUMENTS[name]
    through = trainer(tmp_path, name, optim_args=text, max_steps=1)
    through.train()
    group = getattr(through.optimizer, "optimizer", through.optimizer).param_groups[0]
    assert {key: group[key] for key in settings} == settings
    assert not torch.equal(through.model.first.weight, Model().first.weight)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@grid(name=NAMES)
def test_trainer_trains_and_resumes(tmp_path, name):
    cls, bits = NAMES[name]
    through = trainer(tmp_path, name)
    through.train()
    optimizer = getattr(through.optimizer, "optimizer", through.optimizer)
    assert isinstance(optimizer, cls) and optimizer.args.optim_bits == bits and optimizer.is_paged is name.startswith("paged")
    state = {key: optimizer.state[p]["state1"].dtype for key, p in through.model.named_parameters()}
    assert state["first.weight"] == (torch.uint8 if bits == 8 else torch.float32)
    assert state["embedding.weight"] == torch.float32  # the Trainer asks for it
    assert not torch.equal(through.model.first.weight, Model().first.weight)

    resumed = trainer(tmp_path, name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(resumed.model.parameters(), through.model.parameters()):
        assert_same_bits(a.detach(), b.detach())


def test_trainer_passes_options_of_ademamix(tmp_path):
    run = trainer(tmp_path, "ademamix_8bit", optim_args="t_alpha=4,t_beta3=4,alpha=2.0,beta3=0.999", save_strategy="no")
    run.train()
    group = getattr(run.optimizer, "optimizer", run.optimizer).param_groups[0]
    assert (group["t_alpha"], group["t_beta3"], group["alpha"], group["betas"][2]) == (4, 4, 2.0, 0.999)


@grid(cls=["AdamW8bit", "PagedLion8bit", "RMSprop"])
def test_accelerate_prepares_accumulates_saves_and_loads(tmp_path, cls):
    def start():
        model = Model()
        return accelerator.prepare(model, getattr(optim, cls)(model.parameters(), lr=1e-3))

    def train(model, optimizer, steps):
        for step in steps:
            with accelerator.accumulate(model):
                batch = {key: torch.stack([row[key] for row in ROWS[step : step + 4]]) for key in ROWS[0]}
                accelerator.backward(model(**batch)["loss"])
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = start()
    train(model, optimizer, range(4))
    accelerator.save_state(tmp_path)
    train(model, optimizer, range(4, 8))
    expected = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(tmp_path)
    train(model, optimizer, range(4, 8))
    for p, other in zip(model.parameters(), expected):
        assert_same_bits(p.detach(), other)
    assert optimizer.state[next(model.parameters())]["step"] == 4


def test_deepspeed_mapping_finds_what_it_looks_for():
    """accelerate translates these by class and by the bits in ``args``."""
    p = nn.Parameter(torch.zeros(4))
    for cls in (optim.AdamW, optim.AdamW32bit, optim.Adagrad, optim.Adagrad32bit, optim.Lion, optim.Lion32bit):
        assert cls([p]).args.optim_bits == 32
    assert not isinstance(optim.AdamW8bit([p]), optim.AdamW)
