"""Quantised layers over two processes: FSDP2 and FSDP1 on the loopback device.

The processes run every scenario once and save what they saw; the tests compare it with the same model in one process.
"""

import copy
from datetime import timedelta
import os
import traceback
from types import SimpleNamespace

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from helpers import assert_same_bits, bell, grid, leave_process_group, run_python
import pytest
import torch
from torch import nn
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, StateDictType, fully_shard
import torch.nn.functional as F

import bitsandbytes as bnb

WORLD, VOCABULARY, WIDTH, CLASSES = 2, 33, 62, 7
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
# Mixed precision that would destroy codes in floating-point storage, were they cast like other parameters.
CASTING = MixedPrecisionPolicy(param_dtype=torch.float16)


class Adapted(nn.Module):
    """A frozen layer with a trained detour, as in QLoRA."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Model(nn.Module):
    """A quantised table, two adapted layers and a head that is not quantised.

    The packed weights cannot be divided by two, and rows begin within blocks.
    """

    def __init__(self, table, linear):
        super().__init__()
        self.table = table(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Adapted(linear(WIDTH, 63)), Adapted(linear(63, WIDTH))])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def four_bit(storage=torch.uint8, nested=True, quant_type="nf4"):
    options = dict(quant_type=quant_type, quant_storage=storage, compress_statistics=nested)
    return (lambda n, d: bnb.nn.Embedding4bit(n, d, **options)), (lambda i, o: bnb.nn.Linear4bit(i, o, **options))


def eight_bit():
    return bnb.nn.Embedding8bit, lambda i, o: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)


KINDS = {
    "uint8": four_bit(),
    "bf16": four_bit(torch.bfloat16, nested=False),
    "fp16": four_bit(torch.float16, quant_type="fp4"),
    "fp32": four_bit(torch.float32),
    "int8": eight_bit(),
}


def build(kind, seed=1):
    """A quantised model whose values depend on nothing but ``seed``."""
    model = Model(*KINDS[kind])
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(bell(p.numel(), seed=seed + i).view(p.shape) * 0.2)
        model.blocks[0].base.weight[0] = 1.0  # the code of the largest value is 15: a NaN, in every floating-point storage
    model.to("cpu")
    for module in model.modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            module.requires_grad_(False)
    return model


def sharded(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch(step=0, rank=None):
    """Token ids of one step: those of all processes, or of one."""
    ids = (torch.arange(4 * WORLD * 6) * 7 + 5 * step).view(-1, 6) % VOCABULARY
    return ids if rank is None else ids.chunk(WORLD)[rank]


def loss_of(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten() % CLASSES)


def train(model, rank=None, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        loss_of(model, batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same_entries(model, entries):
    """The same keys as those of the model in one process, whole, as plain tensors with the same bits."""
    expected = model.state_dict()
    assert entries.keys() == expected.keys(), entries.keys() ^ expected.keys()
    for key, value in expected.items():
        assert type(entries[key]) is torch.Tensor, (key, type(entries[key]))
        assert_same_bits(without_padding(key, entries[key]), value)


def without_padding(key, value):
    """The JSON of a quantisation state without the spaces that give it the same length in every sharded model."""
    return value[: int((value != ord(" ")).nonzero().max()) + 1] if "bitsandbytes__" in key else value


# --------------------------------------------------------------------------------------------------- scenarios, run by every process


def scenario_forward(kind, rank, folder):
    model, outputs = sharded(build(kind)), []
    for reshard in (True, False, True):
        model.set_reshard_after_forward(reshard)
        outputs.append(model(batch()))
    return [y.detach() for y in outputs]


def scenario_hybrid(kind, rank, folder):
    """Sharded in one dimension of a mesh, replicated in the other."""
    meshes = [init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")) for shape in ((1, 2), (2, 1))]
    return [sharded(build(kind), mesh=mesh)(batch()).detach() for mesh in meshes]


def scenario_weights(kind, rank, folder):
    """What the layers see while they compute, and what is left of it afterwards."""
    model, seen = sharded(build(kind), mp_policy=CASTING), []
    layer = model.blocks[0].base
    handle = layer.register_forward_pre_hook(
        lambda m, inputs: seen.append((type(m.weight).__name__, isinstance(m.weight, bnb.nn.Params4bit), {**vars(m.weight)}, m.weight.data.clone()))
    )
    y = model(batch())
    handle.remove()
    model.reshard()
    kinds = {type(p).__name__ for p in model.parameters()}
    return seen, kinds, [p.to_local().numel() for p in model.parameters()], y.detach()


def scenario_training(kind, rank, folder):
    model = sharded(build(kind))
    train(model, rank)
    return get_model_state_dict(model, options=FULL)


def scenario_full(kind, rank, folder):
    """A full state dict of a sharded model, loaded into another one, with tensors everywhere and from the first process alone."""
    model = sharded(build(kind))
    full = get_model_state_dict(model, options=FULL)
    offloaded = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    outputs = []
    for options, entries in ((FULL, full), (BROADCAST, full if rank == 0 else {})):
        other = sharded(build(kind, seed=50))
        set_model_state_dict(other, dict(entries), options=options)
        outputs += [other(batch()).detach(), other(batch()).detach()]
    return full, offloaded, outputs


def scenario_meta(kind, rank, folder):
    """Sharded on the meta device, then filled."""
    full = build(kind).state_dict()
    outputs = []
    for fill in (True, False):
        model = sharded(build(kind, seed=50).to("meta"), mp_policy=CASTING)
        if fill:
            model.to_empty(device="cpu")
        set_model_state_dict(model, full, options=FULL)
        outputs += [model(batch()).detach(), model(batch()).detach()]
    return outputs


def scenario_checkpoint(kind, rank, folder):
    """Written by two processes, read by two."""
    path = os.path.join(folder, f"dcp-{kind}")
    dcp.save({"model": get_model_state_dict(sharded(build(kind)))}, checkpoint_id=path)
    other = sharded(build(kind, seed=50))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(other, state["model"])
    return other(batch()).detach()


def scenario_cast(kind, rank, folder):
    """A dtype for the whole model says nothing about codes."""
    model = sharded(build(kind))
    model.to(torch.bfloat16).to(torch.float32)
    return get_model_state_dict(model, options=FULL)


def scenario_tied(kind, rank, folder):
    """Two layers with one quantised weight, sharded once."""
    first, second = KINDS[kind][1](64, 64), KINDS[kind][1](64, 64)
    with torch.no_grad():
        first.weight.copy_(bell(64 * 64).view(64, 64))
    first.bias = second.bias = None
    first.to("cpu")
    second.weight = first.weight
    model = nn.Sequential(first, second)
    x = bell(2 * 64).view(2, 64)
    expected = model(x)
    fully_shard(model)
    assert model[0].weight is model[1].weight
    return expected, model(x), sorted(get_model_state_dict(model, options=FULL))


def scenario_accelerate(kind, rank, folder):
    """As accelerate prepares a model: 4-bit weights in integers stay whole, those in floats are sharded, and mixed precision is on."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Adapted"], mixed_precision_policy="bf16"
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), is_main_process=rank == 0, mixed_precision="bf16", device=torch.device("cpu")
    )
    model = fsdp2_prepare_model(accelerator, build(kind))
    y = model(batch())
    model.reshard()
    return y.detach(), sum(type(p).__name__ == "DTensor" for p in model.parameters()), get_model_state_dict(model, options=FULL)


def scenario_refused(kind, rank, folder):
    """Loads that cannot be right leave a sharded layer as it was."""
    model, messages = sharded(build(kind)), []
    full = get_model_state_dict(model, options=FULL)
    dense = {"blocks.0.base.weight": torch.ones(63, WIDTH)}
    lost = {"blocks.0.base.weight": full["blocks.0.base.weight"]}
    for entries in (dense, lost):
        try:
            messages.append(str(model.load_state_dict(entries, strict=False).missing_keys))
        except Exception as error:
            messages.append(str(error))
    return messages, model(batch()).detach()


def without_frozen_biases(model):
    """FSDP1 flattens the parameters of a module into one, which must then have one dtype."""
    for block in model.blocks:
        block.base.bias = None
    return model


def scenario_fsdp1(kind, rank, folder):
    """FSDP1 flattens codes in floating-point storage, and leaves others whole when they are ignored."""
    results = []
    for use_orig_params in (True, False):
        model = without_frozen_biases(build(kind))
        ignored = [p for p in model.parameters() if not p.is_floating_point()]
        options = dict(device_id=torch.device("cpu"), use_orig_params=use_orig_params, ignored_states=ignored)
        if not ignored:
            model.table = FSDP1(model.table, **options)
            for block in model.blocks:
                block.base = FSDP1(block.base, **options)
        model = FSDP1(model, **options)
        y = model(batch()).detach()
        train(model, rank)
        if use_orig_params:
            entries = get_model_state_dict(model, options=FULL)
        else:  # there torch looks entries up as attributes of parameters, which are plain views without this option
            with FSDP1.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                entries = model.state_dict()
        results.append((y, model(batch()).detach(), entries))
    return results


def scenario_fsdp1_mixed(kind, rank, folder):
    """Mixed precision in the dtype of the storage, as recipes for FSDP1 have it."""
    model = nn.Sequential(bnb.nn.LinearNF4(64, 64, bias=False, quant_storage=torch.bfloat16), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(bell(64 * 64, seed=i + 1).view(64, 64))
    model.to("cpu").bfloat16()
    x = bell(2 * 64).view(2, 64).bfloat16()
    expected = model(x).detach()
    options = dict(device_id=torch.device("cpu"), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16), use_orig_params=True)
    return expected, FSDP1(model, **options)(x).detach()


def scenario_fsdp1_cast(kind, rank, folder):
    layer = bnb.nn.LinearNF4(64, 64, bias=False, quant_storage=torch.float16).to("cpu")
    model = FSDP1(nn.Sequential(layer), device_id=torch.device("cpu"), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    try:
        model(torch.ones(1, 64))
    except RuntimeError as error:
        return str(error)


def scenario_trained_int8(kind, rank, folder):
    """LLM.int8() with weights that stay in floating point and are trained."""

    def make():
        layer = bnb.nn.Linear8bitLt(64, 64)
        with torch.no_grad():
            layer.weight.copy_(bell(64 * 64).view(64, 64))
            layer.bias.zero_()
        return nn.Sequential(layer.to("cpu"))

    alone, model, x = make(), fully_shard(make()), bell(8 * 64).view(8, 64)
    for m in (alone, model):
        m(x).square().mean().backward()
    return alone[0].weight.grad, model[0].weight.grad.full_tensor()


SCENARIOS = [
    *((scenario, kind) for scenario in (scenario_forward, scenario_training, scenario_full, scenario_meta, scenario_checkpoint) for kind in KINDS),
    *((scenario_weights, kind) for kind in KINDS),
    *((scenario_hybrid, kind) for kind in ("bf16", "int8")),
    *((scenario_cast, kind) for kind in KINDS),
    *((scenario_tied, kind) for kind in ("bf16", "int8")),
    *((scenario_accelerate, kind) for kind in ("uint8", "bf16", "fp32")),
    *((scenario_refused, kind) for kind in ("uint8", "int8")),
    *((scenario_fsdp1, kind) for kind in ("uint8", "bf16", "fp32", "int8")),
    (scenario_fsdp1_mixed, "bf16"),
    (scenario_fsdp1_cast, "fp16"),
    (scenario_trained_int8, "int8"),
]


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results = {}
    for scenario, kind in SCENARIOS:
        try:
            results[scenario.__name__, kind] = scenario(kind, rank, folder)
        except Exception:
            results[scenario.__name__, kind] = traceback.format_exc()
            if os.environ.get("SHARDING_DEBUG"):
                print(scenario.__name__, kind, rank, results[scenario.__name__, kind], flush=True)
    torch.save(results, os.path.join(folder, f"results{rank}"))
    leave_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results(scenario, kind)``: what each process returned."""
    folder = str(tmp_path_factory.mktemp("sharding"))
    torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD)
    saved = [torch.load(os.path.join(folder, f"results{rank}"), weights_only=False) for rank in range(WORLD)]

    def result(scenario, kind):
        values = [of_rank[f"scenario_{scenario}", kind] for of_rank in saved]
        assert not any(isinstance(value, str) and value.startswith("Traceback") for value in values), values
        return values

    result.folder = folder
    return result


every_kind = pytest.mark.parametrize("kind", KINDS)


# ----------------------------------------------------------------------------------------------------------------------------- FSDP2


@every_kind
def test_forward_is_that_of_one_process(results, kind):
    expected = build(kind)(batch())
    for outputs in results("forward", kind):
        for y in outputs:
            assert_same_bits(y, expected.detach())


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_hybrid_sharding(results, kind):
    for outputs in results("hybrid", kind):
        for y in outputs:
            assert_same_bits(y, build(kind)(batch()).detach())


@every_kind
def test_layers_see_their_own_weight_under_mixed_precision(results, kind):
    """Gathered as it was: no byte is cast, whatever the policy; only one half of it stays in each process."""
    alone = build(kind)
    weight = alone.blocks[0].base.weight
    assert kind == "int8" or weight.numel() % WORLD == 1
    assert not weight.is_floating_point() or weight.isnan().any()  # the pattern that would not survive being treated as numbers
    for seen, kinds, sizes, y in results("weights", kind):
        [(name, is_params4bit, attributes, codes)] = seen
        assert_same_bits(codes, weight.data)
        assert kinds == {"DTensor"}
        assert sum(sizes) < 0.6 * sum(p.numel() for p in alone.parameters())
        torch.testing.assert_close(y.float(), alone(batch()), rtol=0.05, atol=0.05)
        if kind != "int8":
            assert is_params4bit and name == "Params4bit"
            for attribute in ("quant_type", "blocksize", "compress_statistics", "quant_storage", "bnb_quantized", "quant_state"):
                assert attributes[attribute] == vars(weight)[attribute], attribute


@every_kind
def test_adapters_are_trained_as_in_one_process(results, kind):
    alone = build(kind)
    train(alone)
    for entries in results("training", kind):
        expected = alone.state_dict()
        assert entries.keys() == expected.keys()
        for key, value in expected.items():
            if any(name in key for name in ("up", "down", "head")):
                torch.testing.assert_close(entries[key], value, rtol=1e-4, atol=1e-5)
            else:
                assert_same_bits(without_padding(key, entries[key]), value)
    assert any(not torch.equal(value, build(kind).state_dict()[key]) for key, value in expected.items())


@every_kind
def test_full_state_dicts_have_every_statistic(results, kind):
    alone = build(kind)
    (full, offloaded, _), (_, nothing, _) = results("full", kind)
    same_entries(alone, full)
    same_entries(alone, offloaded)
    assert nothing == {}
    other = build(kind, seed=50)
    other.load_state_dict(full)
    assert_same_bits(other(batch()).detach(), alone(batch()).detach())


@every_kind
def test_full_state_dicts_load_into_sharded_models(results, kind):
    expected = build(kind)(batch()).detach()
    for _, _, outputs in results("full", kind):
        for y in outputs:
            assert_same_bits(y, expected)


@every_kind
def test_models_are_sharded_on_the_meta_device(results, kind):
    """Filled by a load; the hooks are still there, or mixed precision would cast the codes."""
    first, *others = [y for outputs in results("meta", kind) for y in outputs]
    (_, _, _, expected), _ = results("weights", kind)
    for y in (first, *others):
        assert_same_bits(y, expected)


@every_kind
def test_distributed_checkpoints(results, kind):
    """Written by two processes, read by two and by one."""
    alone, other = build(kind), build(kind, seed=50)
    for y in results("checkpoint", kind):
        assert_same_bits(y, alone(batch()).detach())
    file = os.path.join(results.folder, f"{kind}.pt")
    dcp_to_torch_save(os.path.join(results.folder, f"dcp-{kind}"), file)
    other.load_state_dict(torch.load(file)["model"])
    assert_same_bits(other(batch()).detach(), alone(batch()).detach())


@every_kind
def test_casts_of_a_sharded_model_spare_the_codes(results, kind):
    codes = {key: value for key, value in build(kind).state_dict().items() if key.endswith(("base.weight", "table.weight"))}
    assert len(codes) == 3
    for entries in results("cast", kind):
        for key, value in codes.items():
            assert_same_bits(entries[key], value)
        assert entries["head.weight"].dtype is torch.float32


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_layers_that_share_a_weight(results, kind):
    for expected, y, keys in results("tied", kind):
        assert_same_bits(y, expected)
        assert {"0.weight", "1.weight"} <= set(keys)
        assert len(keys) == 2 * len({key[2:] for key in keys})


@pytest.mark.parametrize("kind", ["uint8", "bf16", "fp32"])
def test_models_that_accelerate_prepares(results, kind):
    alone = build(kind)
    for y, distributed, entries in results("accelerate", kind):
        torch.testing.assert_close(y.float(), alone(batch()), rtol=0.05, atol=0.05)
        assert distributed == len(list(alone.parameters())) - (3 if kind == "uint8" else 0)
        same_entries(alone, entries)


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_what_cannot_be_loaded_is_refused(results, kind):
    for (dense, lost), y in results("refused", kind):
        assert "sharded" in dense and "lost" not in dense
        assert ("absmax" if kind == "uint8" else "SCB") in lost
        assert_same_bits(y, build(kind)(batch()).detach())


def test_trained_int8_weights_get_the_gradient_of_one_process(results):
    for alone, gathered in results("trained_int8", "int8"):
        torch.testing.assert_close(gathered, alone)


# ----------------------------------------------------------------------------------------------------------------------------- FSDP1


@grid(kind=["uint8", "bf16", "fp32", "int8"])
def test_fsdp1(results, kind):
    alone = without_frozen_biases(build(kind))
    before = alone(batch()).detach()
    train(alone)
    after = alone(batch()).detach()
    for values in results("fsdp1", kind):
        for y, trained, entries in values:
            assert_same_bits(y, before)
            torch.testing.assert_close(trained, after, rtol=1e-4, atol=1e-4)
            assert entries.keys() == alone.state_dict().keys()
            other = without_frozen_biases(build(kind, seed=50))
            other.load_state_dict(entries)
            torch.testing.assert_close(other(batch()).detach(), after, rtol=1e-4, atol=1e-4)


def test_fsdp1_with_mixed_precision_in_the_dtype_of_the_storage(results):
    for expected, y in results("fsdp1_mixed", "bf16"):
        assert_same_bits(y, expected)


def test_fsdp1_with_another_dtype_than_the_storage_says_so(results):
    """It casts what it flattens; there is no hook to keep codes out of that."""
    for message in results("fsdp1_cast", "fp16"):
        assert "float16" in message and "bfloat16" in message and "quant_storage" in message


# --------------------------------------------------------------------------------------------------------- plain tensors and gathered ones


@pytest.mark.parametrize("make", [lambda: KINDS["int8"][1](64, 48), lambda: bnb.nn.Embedding8bit(48, 64)], ids=["linear", "embedding"])
def test_int8_codes_in_a_plain_parameter_get_their_scales_back(make):
    """Whatever replaced the parameter. The layer computes, saves and is copied; scales written to the original count."""
    layer = make().to("cpu").eval()
    inputs = torch.arange(5) if isinstance(layer, nn.Embedding) else bell(2 * 64).view(2, 64)
    layer.weight.SCB = layer.weight.SCB * 2
    expected, saved = layer(inputs), layer.state_dict()
    layer._parameters["weight"] = nn.Parameter(layer.weight.data, requires_grad=False)
    for plain in (layer, copy.deepcopy(layer)):
        assert type(plain.weight) is nn.Parameter
        assert_same_bits(plain(inputs), expected)
        assert plain.state_dict().keys() == saved.keys()
        assert_same_bits(plain.state_dict()["SCB"], saved["SCB"])


def test_4bit_codes_in_a_plain_parameter_get_their_statistics_back():
    """Also those of a weight that was assigned without a word about the layer, in another storage than the layer was made for."""
    layer, x = bnb.nn.LinearNF4(64, 48), bell(2 * 64).view(2, 64)
    layer.weight = bnb.nn.Params4bit(bell(48 * 64).view(48, 64), quant_type="nf4", quant_storage=torch.float16).to("cpu")
    expected = layer(x)
    layer._parameters["weight"] = nn.Parameter(layer.weight.data, requires_grad=False)
    assert_same_bits(layer(x), expected)
    layer._parameters["weight"] = nn.Parameter(layer.weight.data.to(torch.bfloat16), requires_grad=False)
    with pytest.raises(RuntimeError, match="float16.* cast to torch.bfloat16"):
        layer(x)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_gathered_weight_is_a_weight_like_any_other(storage):
    """One process is enough, and must be one of its own: it joins a process group."""
    done = run_python(
        "import copy, io, sys, torch, torch.distributed as dist, bitsandbytes as bnb\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "layer = bnb.nn.LinearNF4(64, 64, bias=False, quant_storage=getattr(torch, sys.argv[1])).to('cpu')\n"
        "dense, x = layer.weight.dequantize(), torch.randn(2, 64)\n"
        "expected = layer(x)\n"
        "fully_shard(layer, mesh=init_device_mesh('cpu', (1,)))\n"
        "layer.unshard()\n"
        "weight = layer.weight\n"
        "assert torch.equal(weight.dequantize(), dense) and torch.equal(torch.nn.functional.linear(x, weight), expected)\n"
        "assert type(weight.to('cpu')) is bnb.nn.Params4bit\n"
        "again = bnb.nn.Params4bit(dense, **{**vars(weight), 'bnb_quantized': False}).to('cpu')\n"
        "assert again.quant_type == 'nf4' and again.dtype is weight.dtype and again.compress_statistics\n"
        "layer.reshard()\n"
        "shard, file = layer.weight._local_tensor, io.BytesIO()\n"
        "assert copy.deepcopy(shard).attributes['quant_state'] == weight.quant_state\n"
        "torch.save(shard, file); file.seek(0)\n"
        "assert type(torch.load(file)) is torch.Tensor\n"
        "assert type(layer.weight.to_local()) is torch.Tensor\n"
        "assert torch.equal(torch.compile(layer, backend='aot_eager')(x), expected)\n"
        "dist.destroy_process_group()\n"
        "print('fine')\n",
        str(storage).removeprefix("torch."),
    )
    assert done.stdout.strip() == "fine", done.stderr
