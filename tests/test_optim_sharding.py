"""Optimizers over sharded parameters: two processes on the loopback device run every scenario once, the tests look at what they saved."""

from datetime import timedelta
import os
import socket
import traceback

from helpers import assert_same_bits, bell, grid, leave_process_group
from hypothesis import given
from hypothesis import strategies as st
import pytest
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
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bitsandbytes import functional as F
from bitsandbytes import optim
from bitsandbytes.optim.sharding import absmax_by_granules, blocks_from_granules

WORLD = 2
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

OPTIMIZERS = {
    "AdamW": lambda p: optim.AdamW(p, lr=1e-2),
    "AdamW8bit": lambda p: optim.AdamW8bit(p, lr=1e-2),
    "PagedAdamW8bit": lambda p: optim.PagedAdamW8bit(p, lr=1e-2),
    "AdEMAMix8bit": lambda p: optim.AdEMAMix8bit(p, lr=1e-2, t_alpha=10, t_beta3=10),
    "Lion8bit": lambda p: optim.Lion8bit(p, lr=1e-3),
    "LAMB": lambda p: optim.LAMB(p, lr=1e-2, max_unorm=0.1, weight_decay=0.1),
    "RMSprop8bit": lambda p: optim.RMSprop8bit(p, lr=1e-3, momentum=0.9),
}


def build_model():
    """A matrix whose halves are whole blocks, one with an odd number of rows of 100, and vectors."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.ReLU(), torch.nn.Linear(96, 100), torch.nn.Linear(100, 57))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(bell(p.numel(), seed=i + 1).view(p.shape) * 0.1)
    return model


def set_gradients(model, step):
    for i, p in enumerate(model.parameters()):
        g = bell(p.numel(), seed=1000 * step + i).view(p.shape) * 0.01
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def train(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def sharded_model():
    return fully_shard(build_model())


def copied(tree):
    """A state dict whose tensors are copies: the optimizer goes on."""
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


# -------------------------------------------------------------------------------------------------- what the two processes do
def scenario_train(name, folder):
    model = sharded_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(5))
    return whole(model)


def scenario_reload(name, folder, options):
    """Five steps; and two, with a new optimizer that gets the state of the first, and three."""
    first, second = sharded_model(), sharded_model()
    optimizer = OPTIMIZERS[name](first.parameters())
    train(first, optimizer, range(2))
    state = copied(get_optimizer_state_dict(first, optimizer, options=options))
    if options is FULL:  # only the first process has it
        box = [state]
        dist.broadcast_object_list(box)
        state = box[0]
    set_model_state_dict(second, get_model_state_dict(first))
    new = OPTIMIZERS[name](second.parameters())
    set_optimizer_state_dict(second, new, state, options=options)
    train(first, optimizer, range(2, 5))
    train(second, new, range(2, 5))
    return whole(first), whole(second)


def scenario_full(name, folder):
    return scenario_reload(name, folder, FULL)


def scenario_sharded(name, folder):
    return scenario_reload(name, folder, None)


def scenario_flat(name, folder):
    return scenario_reload(name, folder, FLAT)


def scenario_save(name, folder):
    """Two steps, saved by all processes together."""
    model = sharded_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(2))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=os.path.join(folder, f"checkpoint-{name}"))
    full = get_optimizer_state_dict(model, optimizer, options=FULL)
    train(model, optimizer, range(2, 5))
    return full, whole(model)


def scenario_fsdp1(name, folder):
    """FSDP1: the gathered state, and training resumed from it. The shards end in the middle of a parameter.

    With use_orig_params=True torch 2.13 itself gathers wrong states on a CPU, those of torch.optim too.
    """
    models = [FSDP1(build_model(), device_id=torch.device("cpu"), use_orig_params=False) for _ in range(2)]
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
    optimizers[1] = OPTIMIZERS[name](models[1].parameters())
    optimizers[1].load_state_dict(FSDP1.optim_state_dict_to_load(models[1], optimizers[1], state))
    results = []
    for model, optimizer in zip(models, optimizers):
        steps(model, optimizer, range(2, 4))
        with FSDP1.summon_full_params(model):
            results.append([p.detach().clone() for p in model.parameters()])
    return state, *results


def scenario_columns(name, folder):
    """Tensor parallelism: the last dimension is cut, in the middle of rows."""
    mesh = init_device_mesh("cpu", (WORLD,))
    p = torch.nn.Parameter(distribute_tensor(bell(64 * 150).view(64, 150), mesh, [Shard(1)]))
    optimizer = OPTIMIZERS[name]([p])
    for step in range(3):
        p.grad = distribute_tensor(bell(64 * 150, seed=step).view(64, 150), mesh, [Shard(1)])
        optimizer.step()
    copy = torch.nn.Parameter(p.detach().clone())
    new = OPTIMIZERS[name]([copy])
    new.load_state_dict(optimizer.state_dict())
    for q, o in ((p, optimizer), (copy, new)):
        q.grad = distribute_tensor(bell(64 * 150, seed=9).view(64, 150), mesh, [Shard(1)])
        o.step()
    return p.full_tensor().detach(), copy.full_tensor().detach()


RELOADED = ("AdamW", "AdamW8bit", "AdEMAMix8bit", "RMSprop8bit")
SCENARIOS = [
    *((scenario_train, name) for name in OPTIMIZERS),
    *((reload, name) for reload in (scenario_sharded, scenario_full, scenario_flat) for name in RELOADED),
    *((scenario_save, name) for name in ("AdamW", "AdamW8bit", "AdEMAMix8bit")),
    *((scenario_fsdp1, name) for name in ("AdamW", "AdamW8bit", "AdEMAMix8bit")),
    (scenario_columns, "AdamW8bit"),
]


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results = {}
    for scenario, name in SCENARIOS:
        try:
            results[scenario.__name__, name] = scenario(name, folder)
        except Exception:
            results[scenario.__name__, name] = traceback.format_exc()
            if os.environ.get("SHARDING_DEBUG"):
                traceback.print_exc()
    if rank == 0:
        torch.save(results, os.path.join(folder, "results"))
    leave_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharding"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    saved = torch.load(os.path.join(folder, "results"), weights_only=False)

    def result(scenario, name):
        value = saved[f"scenario_{scenario}", name]
        assert not isinstance(value, str), value
        return value

    result.folder = folder
    return result


def trained_alone(name, steps=5):
    model = build_model()
    train(model, OPTIMIZERS[name](model.parameters()), range(steps))
    return whole(model)


# ---------------------------------------------------------------------------------------------------------------------- tests
@grid(name=OPTIMIZERS)
def test_sharded_training_is_training(results, name):
    """In 32 bits to the last bit, but for norms, which are summed in another order. In 8 bits where shards are whole blocks."""
    for sharded, alone in zip(results("train", name), trained_alone(name)):
        in_8bit = "8bit" in name and alone.numel() >= 4096
        if not in_8bit and name != "LAMB" or alone.shape == (96, 128):
            assert_same_bits(sharded, alone) if name != "LAMB" else torch.testing.assert_close(sharded, alone)
        else:
            torch.testing.assert_close(sharded, alone, rtol=0.05, atol=5e-3)


@grid(how=["sharded", "full", "flat"], name=RELOADED)
def test_training_resumes_from_a_distributed_state_dict(results, how, name):
    through, resumed = results(how, name)
    for a, b in zip(through, resumed):
        if how == "full" and a.shape == (100, 96) or name == "AdamW":
            torch.testing.assert_close(a, b)
        else:
            assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@grid(name=["AdamW", "AdamW8bit", "AdEMAMix8bit"])
def test_a_checkpoint_of_two_processes_is_resumed_by_one(results, name):
    _, through = results("save", name)
    model = build_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=os.path.join(results.folder, f"checkpoint-{name}"))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for p in model.parameters():
        assert optimizer.state[p]["step"] == 2
        assert optimizer.state[p]["state1"].dtype == (torch.uint8 if "8bit" in name and p.numel() >= 4096 else torch.float32)
    train(model, optimizer, range(2, 5))
    for a, b in zip(whole(model), through):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3 if "8bit" in name else 0)


@grid(name=["AdamW", "AdamW8bit", "AdEMAMix8bit"])
def test_a_gathered_state_loads_into_an_ordinary_optimizer(results, name):
    full, through = results("save", name)
    model = build_model()
    train(model, OPTIMIZERS[name](model.parameters()), range(2))
    optimizer = OPTIMIZERS[name](model.parameters())
    set_optimizer_state_dict(model, optimizer, full)
    train(model, optimizer, range(2, 5))
    for a, b in zip(whole(model), through):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3 if "8bit" in name else 0)


@grid(name=["AdamW", "AdamW8bit", "AdEMAMix8bit"])
def test_fsdp1_gathers_states_by_parameter(results, name):
    state, through, resumed = results("fsdp1", name)
    for key, p in build_model().named_parameters():
        moment = state["state"][key]["state1_0" if "AdEMAMix" in name else "state1"]
        assert moment.shape == p.shape and moment.dtype == torch.float32
    for a, b in zip(through, resumed):
        if name == "AdamW":
            assert_same_bits(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


def test_shards_that_cut_rows_keep_their_8_bit_state(results):
    through, resumed = results("columns", "AdamW8bit")
    assert_same_bits(through, resumed)


@grid(name=["AdamW", "AdamW8bit", "AdEMAMix8bit", "LAMB"])
def test_flattened_state_dicts_without_shards(name):
    """Distributed checkpoints of an ordinary model, in a single process."""
    models = [build_model(), build_model()]
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    train(models[0], optimizers[0], range(2))
    models[1].load_state_dict(models[0].state_dict())
    flat = copied(get_optimizer_state_dict(models[0], optimizers[0], options=FLAT))
    assert "state.0.weight.state1" in flat
    set_optimizer_state_dict(models[1], optimizers[1], flat, options=FLAT)
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, range(2, 4))
    for a, b in zip(*map(whole, models)):
        assert_same_bits(a, b)


@given(rows=st.integers(1, 40), row=st.sampled_from([1, 3, 64, 96, 100, 256, 300, 512]), cut=st.floats(0, 1))
def test_granules_survive_being_cut_anywhere_between_rows(rows, row, cut):
    """Values quantised in blocks from two starting points are read back by granules, from a third."""
    values, qmap, at = bell(rows * row).view(rows, row), F.create_dynamic_map(), round(cut * rows)
    codes, spread, expected = [], [], []
    for part in (values[:at], values[at:]):
        if part.numel():
            c, state = F.quantize_blockwise(part.contiguous(), code=qmap, blocksize=256)
            codes.append(c)
            spread.append(absmax_by_granules(state.absmax, part).reshape(len(part), -1))
            expected.append(F.dequantize_blockwise(c, absmax=state.absmax, code=qmap, blocksize=256))
    joined, absmax = blocks_from_granules(torch.cat(codes), torch.cat(spread), qmap)
    assert absmax.shape == (-(-values.numel() // 256),)
    read = F.dequantize_blockwise(joined, absmax=absmax, code=qmap, blocksize=256)
    if len(codes) == 1 or at * row % 256 == 0:
        assert_same_bits(read, torch.cat(expected))
    torch.testing.assert_close(read, torch.cat(expected), rtol=0.02, atol=0.02)
