"""Optimizers over parameters that are spread over two processes: they train, and their state can be gathered, cut and resumed."""

import os
import socket
import traceback

import pytest
import torch
from torch import nn
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bitsandbytes import optim

WORLD = 2
FULL = StateDictOptions(full_state_dict=True)
OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, lr=1e-2),
    "AdamW8bit": lambda p: optim.AdamW8bit(p, lr=1e-2),
    "AdEMAMix8bit": lambda p: optim.AdEMAMix8bit(p, lr=1e-2),
    "Lion8bit": lambda p: optim.Lion8bit(p, lr=1e-3),
}


def build():
    """One matrix that can be cut into whole blocks, one that cannot, one whose parts are below the size for 8 bits, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 101), nn.Tanh(), nn.Linear(101, 41))


def train(model, optimizer, steps):
    for step in steps:
        for index, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            grad = torch.randn(p.shape, generator=generator) * 0.01
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def close(found, expected, name):
    for a, b in zip(found, expected):
        if "8bit" not in name or b.shape == (96, 128):
            assert torch.equal(a, b)
        else:  # blocks begin elsewhere
            torch.testing.assert_close(a, b, rtol=0.05, atol=5e-3)


def trained_alone(name, steps):
    model = build()
    train(model, OPTIMIZERS[name](model.parameters()), range(steps))
    return whole(model)


# ------------------------------------------------------------------------------------------------------------ two processes


def trains(name, folder):
    model = fully_shard(build())
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(4))
    close(whole(model), trained_alone(name, 4), name)
    for p, state in optimizer.state.items():
        assert state["state1"].dtype == (torch.uint8 if "8bit" in name and p.numel() >= 4096 else torch.float32)


def resumes(name, folder, options):
    first = fully_shard(build())
    optimizer = OPTIMIZERS[name](first.parameters())
    train(first, optimizer, range(2))
    if options is None:
        dcp.save(get_optimizer_state_dict(first, optimizer), checkpoint_id=folder)
    else:
        state = get_optimizer_state_dict(first, optimizer, options=options)
        assert state["state"]["0.weight"]["state2" if name == "AdamW" else "state1_0" if "Mix" in name else "state1"].shape == (96, 128)
    second = fully_shard(build())
    for p, q in zip(second.parameters(), first.parameters()):
        p.data.to_local().copy_(q.data.to_local())
    new = OPTIMIZERS[name](second.parameters())
    if options is None:
        state = get_optimizer_state_dict(second, new)
        dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(second, new, state, options=options)
    train(first, optimizer, range(2, 4))
    train(second, new, range(2, 4))
    for a, b in zip(whole(second), whole(first)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    formats = [[s["state1"].dtype for s in o.state.values()] for o in (optimizer, new)]
    assert formats[0] == formats[1]


def resumes_from_a_full_state(name, folder):
    resumes(name, folder, FULL)


def resumes_from_a_sharded_checkpoint(name, folder):
    resumes(name, folder, None)


def fsdp1_gathers_and_resumes(name, folder):
    models = [FSDP1(build(), device_id=torch.device("cpu"), use_orig_params=False) for _ in range(2)]
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]

    def steps(model, optimizer, which):
        for step in which:
            torch.manual_seed(step)
            model(torch.randn(8, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    for model, optimizer in zip(models, optimizers):
        steps(model, optimizer, range(2))
    state = FSDP1.optim_state_dict(models[0], optimizers[0])
    key = "state1_0" if "Mix" in name else "state1"
    for parameter, p in build().named_parameters():
        assert state["state"][parameter][key].shape == p.shape and state["state"][parameter][key].dtype == torch.float32
    optimizers[1] = OPTIMIZERS[name](models[1].parameters())
    optimizers[1].load_state_dict(FSDP1.optim_state_dict_to_load(models[1], optimizers[1], state))
    for model, optimizer in zip(models, optimizers):
        steps(model, optimizer, range(2, 4))
    found = []
    for model in models:
        with FSDP1.summon_full_params(model):
            found.append(whole(model))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


SCENARIOS = [trains, resumes_from_a_full_state, resumes_from_a_sharded_checkpoint, fsdp1_gathers_and_resumes]


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for scenario in SCENARIOS:
        for name in OPTIMIZERS:
            try:
                scenario(name, os.path.join(folder, f"{scenario.__name__}-{name}"))
                failure = None
            except Exception:
                failure = traceback.format_exc()
            failures = [None] * WORLD
            dist.all_gather_object(failures, failure)
            results[scenario.__name__, name] = "\n".join(filter(None, failures))
    if rank == 0:
        torch.save(results, os.path.join(folder, "results"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharded"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    return torch.load(os.path.join(folder, "results"), weights_only=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_two_processes(failures, scenario, name):
    failure = failures[scenario.__name__, name]
    assert not failure, failure


# ------------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ordinary_parameters_are_saved_as_before(name):
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()["state"][0]
    assert saved.keys() == {"step", "__bnb_optimizer_quant_state__"}
    assert saved["__bnb_optimizer_quant_state__"]["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)


def test_a_norm_of_the_whole_parameter_is_refused_and_not_guessed(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(64, 64))
        with pytest.raises(NotImplementedError, match="max_unorm"):
            train(model, optim.LAMB(model.parameters(), max_unorm=1.0), range(1))
    finally:
        dist.destroy_process_group()
