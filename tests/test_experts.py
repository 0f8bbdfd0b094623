"""Mixture-of-experts stacks in 4 bit, on their own and inside transformers models."""

import copy
import gc
import io
import pickle
import weakref

from helpers import DEVICE, assert_same_bits, bell, grid, raw_bytes
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import bitsandbytes as bnb
from bitsandbytes import functional
from bitsandbytes.nn import Experts4bit, FusedExperts4bit, quantize_experts
from bitsandbytes.nn.pieces import part

EXPERTS, IN, OUT = 4, 64, 48


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share between threads."""
    torch.set_num_threads(1)


def values(experts=EXPERTS, out=OUT, width=IN, seed=1) -> torch.Tensor:
    return bell(experts * out * width, seed).reshape(experts, out, width)


def make(experts=EXPERTS, width=IN, out=OUT, seed=1, device=DEVICE, **options) -> Experts4bit:
    layer = Experts4bit(experts, width, out, **options)
    with torch.no_grad():
        layer.weight.copy_(values(experts, out, width, seed))
    return layer.to(device)


def reference(layer: Experts4bit, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Each row with its own dense matrix."""
    result = torch.einsum("...i,...oi->...o", x.double(), layer.dequantize().double()[experts])
    return result if layer.bias is None else result + layer.bias.double()[experts]


# --------------------------------------------------------------------------------------------------------------------------- stacks
@grid(shape=[(48, 64), (5, 32), (3, 32), (512, 32), (1, 96)], nested=[False, True], blocksize=[64, 128], storage=[torch.uint8, torch.bfloat16])
def test_a_part_is_the_matrix_of_its_expert(shape, nested, blocksize, storage):
    """Also where matrices begin in the middle of a block, of scales or of nested scales."""
    packed, state = functional.quantize_4bit(values(5, *shape), blocksize=blocksize, compress_statistics=nested, quant_storage=storage)
    whole = functional.dequantize_4bit(packed, state)
    for index in range(5):
        codes, own = part(packed, state, index)
        assert_same_bits(functional.dequantize_4bit(codes, own), whole[index])
        assert codes.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_matrices_that_share_bytes_cannot_be_told_apart():
    with pytest.raises(ValueError, match="32"):
        Experts4bit(2, 5, 3)
    packed, state = functional.quantize_4bit(values(2, 3, 5))
    with pytest.raises(ValueError, match="15 elements"):
        part(packed, state, 1)


@grid(nested=[False, True], bias=[False, True], dtype=[torch.float32, torch.bfloat16], width=[64, 96])
def test_each_row_meets_the_matrix_of_its_expert(nested, bias, dtype, width):
    layer = make(6, width, compress_statistics=nested, bias=bias)
    x = torch.randn(3, 5, width).to(dtype)
    experts = torch.tensor([[0, 5, 2, 2, 0], [3, 3, 3, 5, 0], [2, 0, 5, 5, 5]])  # 1 and 4 have nothing to do
    result = layer(x, experts)
    assert result.dtype == dtype and result.shape == (3, 5, OUT)
    assert torch.allclose(result.double(), reference(layer, x, experts), atol=1e-4 if dtype == torch.float32 else 0.3)


def test_rows_in_the_order_of_their_experts_come_with_counts():
    layer, x = make(), torch.randn(5, IN)
    assert_same_bits(layer(x, [2, 0, 3]), layer(x, torch.tensor([0, 0, 2, 2, 2])))
    with pytest.raises(RuntimeError, match="5"):
        layer(x, [2, 2])


def test_no_rows_at_all():
    layer, x = make(bias=True), torch.empty(0, IN, requires_grad=True)
    result = layer(x, torch.empty(0, dtype=torch.int64))
    assert result.shape == (0, OUT)
    result.sum().backward()
    assert x.grad.shape == (0, IN)


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(IndexError, match="4 experts, got index 4"):
        make()(torch.randn(2, IN), torch.tensor([0, 4]))
    with pytest.raises(RuntimeError, match="negative"):
        make()(torch.randn(2, IN), torch.tensor([0, -1]))


@grid(nested=[False, True], checkpointed=[False, True])
def test_gradients_are_those_of_the_dense_matrices(nested, checkpointed):
    layer = make(compress_statistics=nested, bias=True)
    dense = layer.dequantize()
    experts = torch.tensor([3, 0, 0, 3, 1])
    x = torch.randn(5, IN, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    result = checkpoint(layer, x, experts, use_reentrant=False) if checkpointed else layer(x, experts)
    result.square().sum().backward()
    bias = layer.bias.detach().clone().requires_grad_()
    (torch.stack([F.linear(row, dense[e], bias[e]) for row, e in zip(y, experts)])).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-3)


def test_a_stack_that_was_never_quantised_is_used_as_it_is_with_one_warning(caplog):
    layer, x, experts = Experts4bit(EXPERTS, IN, OUT), torch.randn(3, IN), torch.tensor([1, 0, 1])
    for _ in range(2):
        expected = torch.stack([layer.weight.data[e] @ row for row, e in zip(x, experts)])
        assert torch.allclose(layer(x, experts), expected, atol=1e-5)
    assert len(caplog.records) == 1 and "num_experts=4" in caplog.text


def test_codes_without_statistics_are_an_error_that_names_the_layer():
    layer = make()
    layer.quant_state = layer.weight.quant_state = None
    with pytest.raises(RuntimeError, match="Experts4bit.*quant_state"):
        layer(torch.randn(1, IN), torch.tensor([0]))


@grid(target=["quantised", "fresh", "meta", "other format"], nested=[False, True], assign=[False, True])
def test_a_saved_stack_loads(target, nested, assign):
    source = make(compress_statistics=nested, bias=True)
    layer = {
        "quantised": lambda: make(seed=2, bias=True),
        "fresh": lambda: Experts4bit(EXPERTS, IN, OUT, bias=True),
        "meta": lambda: Experts4bit(EXPERTS, IN, OUT, bias=True, device="meta"),
        "other format": lambda: make(seed=2, bias=True, quant_type="fp4", blocksize=128, quant_storage=torch.float16),
    }[target]()
    saved = source.state_dict()
    layer.load_state_dict(saved, assign=assign or target == "meta")
    x, experts = torch.randn(6, IN), torch.randint(EXPERTS, (6,))
    assert_same_bits(layer(x, experts), source(x, experts))
    again = layer.state_dict()
    assert set(again) == set(saved) and all(raw_bytes(again[key]) == raw_bytes(saved[key]) for key in saved)


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch_save])
def test_copies_are_whole(duplicate):
    layer, x, experts = make(), torch.randn(3, IN), torch.tensor([0, 1, 3])
    assert_same_bits(duplicate(layer)(x, experts), layer(x, experts))


# --------------------------------------------------------------------------------------------------------------- transformers models
transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen": lambda: transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, head_dim=16),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),  # fmt: skip
}
IDS = torch.arange(18).reshape(2, 9) * 7 % 61 + 3


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def with_rounded_experts(kind: str, quantised: nn.Module) -> nn.Module:
    """The same model as transformers has it, with the values that the quantised experts stand for."""
    model = model_of(kind)
    for experts, ours in zip(experts_of(model), experts_of(quantised)):
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(ours, name).dequantize()
            getattr(experts, name).data = (stack.mT if experts.is_transposed else stack).contiguous()
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_computes_with_its_rounded_experts(kind):
    model = model_of(kind)
    names = quantize_experts(model)
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(isinstance(experts, FusedExperts4bit) for experts in experts_of(model))
    assert quantize_experts(model) == []
    reference, original = with_rounded_experts(kind, model), model_of(kind)
    with torch.no_grad():
        ours, rounded, dense = (m(IDS).logits for m in (model, reference, original))
    assert torch.allclose(ours, rounded, atol=1e-4)
    assert not torch.allclose(ours, dense, atol=1e-3)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), reference.generate(IDS, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_passes_through_the_experts_and_their_weights(kind):
    model = model_of(kind)
    quantize_experts(model)
    gradients = []
    for m in (model, with_rounded_experts(kind, model)):
        m.train()
        m(IDS, labels=IDS).loss.backward()
        gradients.append([m.model.embed_tokens.weight.grad, m.model.layers[0].self_attn.q_proj.weight.grad, router_weight(m).grad])
    for ours, dense in zip(*gradients):
        assert dense.abs().max() > 0 and torch.allclose(ours, dense, rtol=1e-3, atol=1e-5)


def router_weight(model: nn.Module) -> torch.Tensor:
    mlp = model.model.layers[0].mlp
    return (mlp.gate if hasattr(mlp, "gate") else mlp.router).weight


def test_experts_of_other_ranks_add_nothing():
    model = model_of("mixtral")
    quantize_experts(model)
    experts, x = experts_of(model)[0], torch.randn(3, 64)
    weights = torch.tensor([[0.5, 0.5]] * 3)
    partial = experts(x, torch.tensor([[0, 4], [4, 4], [3, 1]]), weights)
    alone = experts(x[:1], torch.tensor([[0]]), weights[:1, :1])
    assert torch.allclose(partial[0], alone[0]) and partial[1].eq(0).all() and partial[2].ne(0).any()


def test_experts_take_an_eighth_of_the_memory():
    model = model_of("olmoe")
    before = sum(parameter.nbytes for experts in experts_of(model) for parameter in experts.parameters())
    quantize_experts(model)
    after = sum(tensor.nbytes for experts in experts_of(model) for tensor in experts.state_dict().values())
    assert after < before * (1 / 8 + 0.01)


def test_float_stacks_are_freed_one_module_at_a_time(monkeypatch):
    model, alive = model_of("olmoe"), []
    stacks = [weakref.ref(parameter) for experts in experts_of(model) for parameter in experts.parameters()]
    original = FusedExperts4bit.__init__

    def counting(self, *args, **recipe):
        gc.collect()
        alive.append(sum(stack() is not None for stack in stacks))
        original(self, *args, **recipe)

    monkeypatch.setattr(FusedExperts4bit, "__init__", counting)
    quantize_experts(model)
    assert alive == [4, 2]


def test_modules_can_be_left_alone():
    model = model_of("olmoe")
    names = quantize_experts(model, skip=["model.layers.0.mlp.experts"], quant_type="fp4", compress_statistics=False)
    assert names == ["model.layers.1.mlp.experts"]
    state = experts_of(model)[1].down_proj.quant_state
    assert isinstance(experts_of(model)[0].down_proj, nn.Parameter) and state.quant_type == "fp4" and not state.nested
    assert quantize_experts(model, skip=["experts"]) == []


def test_stacks_of_other_expert_modules_are_parametrised():
    class PlainExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(values())
            self.scale = nn.Parameter(torch.ones(EXPERTS))

        def forward(self, x):
            return torch.einsum("bi,eoi->ebo", x, self.stack) * self.scale[:, None, None]

    model, x = nn.Sequential(PlainExperts()), torch.randn(2, IN)
    expected = model(x)
    assert quantize_experts(model) == ["0"]
    error = (model(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.2 and "0.stack.absmax" in model.state_dict()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_quantised_model_is_copied_whole(duplicate):
    model = model_of("gpt-oss")
    quantize_experts(model)
    replica = duplicate(model)
    with torch.no_grad():
        expected = model(IDS).logits
        assert_same_bits(replica(IDS).logits, expected)
        for parameter in replica.parameters():
            parameter.data.zero_()
        assert_same_bits(model(IDS).logits, expected)


def test_offloaded_experts_are_refused_and_quantised_ones_can_be_offloaded():
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(model_of("olmoe"), execution_device=DEVICE)
    with pytest.raises(RuntimeError, match="model.layers.0.mlp.experts"):
        quantize_experts(offloaded)
    model = model_of("olmoe")
    quantize_experts(model)
    with torch.no_grad():
        expected = model(IDS).logits
        assert_same_bits(accelerate.cpu_offload(model, execution_device=DEVICE)(IDS).logits, expected)


def load_4bit(path):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map=DEVICE)


def test_a_model_is_saved_and_rebuilt_without_its_float_weights(tmp_path):
    accelerate, safetensors = pytest.importorskip("accelerate"), pytest.importorskip("safetensors.torch")
    model_of("mixtral").save_pretrained(tmp_path / "float")
    model = load_4bit(tmp_path / "float")
    assert experts_of(model)[0].down_proj.dtype == torch.float32, "transformers quantises experts by now"
    quantize_experts(model)
    model.save_pretrained(tmp_path / "quantised", save_original_format=False)

    with accelerate.init_empty_weights():
        rebuilt = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "quantised"))
        bnb.utils.replace_linear(rebuilt, bnb.nn.Linear4bit, skip_modules=None)
        quantize_experts(rebuilt)
    rebuilt.load_state_dict(safetensors.load_file(tmp_path / "quantised" / "model.safetensors", device=DEVICE), assign=True)
    with torch.no_grad():
        assert_same_bits(rebuilt.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_around_quantised_experts(checkpointing, tmp_path):
    peft = pytest.importorskip("peft")
    model_of("mixtral").save_pretrained(tmp_path)
    model = load_4bit(tmp_path)
    quantize_experts(model)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=32))
    before = [raw_bytes(experts.down_proj.weight.data) for experts in experts_of(model.base_model.model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert [raw_bytes(experts.down_proj.weight.data) for experts in experts_of(model.base_model.model)] == before
