"""A small Llama through transformers, accelerate and peft: what users do with 4-bit models, all of it on the CPU and offline."""

import copy
import io

import accelerate
import peft
import pytest
from small_llama import IDS, difference, load, logits, one_thread, saved, trained, with_adapter  # noqa: F401
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import bitsandbytes as bnb
from bitsandbytes.nn import Linear4bit, Params4bit

CONFIGS = {
    "nf4": {},
    "nested": {"bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "bfloat16 storage": {"bnb_4bit_quant_storage": torch.bfloat16},
    "bfloat16 compute": {"bnb_4bit_compute_dtype": torch.bfloat16},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def quantisation(**config) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **config})


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def quantised(dense_path):
    return lambda **config: load(dense_path, quantization_config=quantisation(**config))


def quantised_layers(model) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


# ------------------------------------------------------------------------------------------------------------------ transformers


@every_config
def test_a_model_is_quantised_used_saved_and_reloaded(config, quantised, dense_path, tmp_path):
    model, dense = quantised(**config), load(dense_path)
    assert len(quantised_layers(model)) == 7 and all(type(layer.weight) is Params4bit for layer in quantised_layers(model))
    assert model.num_parameters() == dense.num_parameters()
    expected = logits(model)
    assert 0.02 < difference(expected, logits(dense)) < 0.2
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)

    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(tmp_path / "whole")), expected)
    assert torch.equal(logits(load(tmp_path / "sharded")), expected)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"hidden_size": 48, "intermediate_size": 100}], ids=["few outputs", "odd blocks"])
def test_sizes_that_fit_no_tile(changes, tmp_path):
    model = load(saved(tmp_path, **changes), quantization_config=quantisation())
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)


def test_tied_embeddings_stay_tied(tmp_path):
    model = load(saved(tmp_path / "dense", tie_word_embeddings=True), quantization_config=quantisation())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(load(tmp_path / "quantised")), logits(model))


def test_a_head_tied_to_a_float_embedding_computes_with_it(tmp_path):
    """Any value of llm_int8_skip_modules makes transformers convert the head as well, and then tie it to the embedding."""
    path = saved(tmp_path, tie_word_embeddings=True)
    model = load(path, quantization_config=quantisation(llm_int8_skip_modules=["audio_tower"]))
    assert type(model.lm_head) is Linear4bit and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load(path, quantization_config=quantisation())))


@pytest.mark.parametrize("skip", [["audio_tower"], ["q_proj"], ["lm_head"]], ids=lambda skip: skip[0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_list_of_modules_to_skip_loads_generates_saves_and_reloads(tied, bits, skip, tmp_path):
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skip)
    model = load(saved(tmp_path / "dense", tie_word_embeddings=tied), quantization_config=config)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(load(tmp_path / "quantised")), logits(model))


def test_device_map_auto(dense_path):
    assert logits(load(dense_path, device_map="auto", quantization_config=quantisation())).shape == (2, 9, 256)


@pytest.mark.parametrize("after_inference", [False, True])
def test_dequantising_the_model(after_inference, quantised):
    model = quantised()
    expected = logits(copy.deepcopy(model))
    if after_inference:
        logits(model)
    assert difference(logits(model.dequantize(dtype=torch.float32)), expected) < 1e-6


def test_a_deep_copy_is_independent(quantised):
    model = quantised(bnb_4bit_use_double_quant=True)
    other = copy.deepcopy(model)
    for layer in quantised_layers(other):
        assert layer.weight.module is layer and layer.quant_state is layer.weight.quant_state
    for layer in quantised_layers(model):
        layer.weight.zero_()
    assert difference(logits(other), logits(model)) > 0.1


def test_a_pickled_model_is_whole(quantised):
    model = quantised()
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(again), logits(model)) and again.num_parameters() == model.num_parameters()
    assert difference(logits(again.dequantize(dtype=torch.float32)), logits(model)) < 1e-6


@every_config
def test_a_state_dict_loads_into_the_model_it_came_from(config, quantised):
    model, other = quantised(**config), quantised(bnb_4bit_quant_type="fp4")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    for layer, compute_dtype in zip(quantised_layers(other), (layer.compute_dtype for layer in quantised_layers(model))):
        layer.compute_dtype = compute_dtype
    assert torch.equal(logits(other), logits(model))


def test_the_model_compiles(quantised):
    model = quantised().train()
    assert torch.equal(logits(torch.compile(model, backend="eager")), logits(model))


# -------------------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloading(where, quantised, tmp_path):
    model = quantised(bnb_4bit_use_double_quant=True)
    expected = logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    if where == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)


def test_layers_are_made_on_meta_with_their_attributes():
    with accelerate.init_empty_weights():
        layer = bnb.nn.LinearNF4(64, 32, compress_statistics=False)
    assert layer.weight.is_meta and layer.weight.quant_type == "nf4" and not layer.weight.compress_statistics
    accelerate.utils.set_module_tensor_to_device(layer, "weight", "cpu", value=torch.randn(32, 64))
    assert layer.weight.bnb_quantized and layer.quant_state.quant_type == "nf4"


# -------------------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("config", [CONFIGS["nested"], CONFIGS["bfloat16 storage"]], ids=["nested", "bfloat16 storage"])
def test_training_is_the_same_with_checkpointing_and_with_evaluations(config, quantised):
    losses = trained(with_adapter(quantised(**config)))
    assert losses[0] > losses[1] > losses[2]
    for variant in ({"reentrant": True}, {"reentrant": False}, {"evaluate": True}):
        evaluate = variant.pop("evaluate", False)
        assert trained(with_adapter(quantised(**config), **variant), evaluate=evaluate) == losses, variant


def test_adapters_are_saved_and_reloaded(quantised, tmp_path):
    model = with_adapter(quantised())
    trained(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantised(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    result = peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    assert not result.unexpected_keys and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_modules_trained_in_full_are_saved_beside_the_adapter(bits, dense_path, tmp_path):
    quantised = lambda: load(dense_path, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))  # noqa: E731
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM")
    model = with_adapter(quantised(), config=config)
    losses = trained(model)
    assert losses[0] > losses[1] > losses[2]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(quantised(), tmp_path).eval()), logits(model))


@pytest.mark.filterwarnings("ignore:.*rounding errors")
@pytest.mark.parametrize("after_inference", [False, True])
def test_adapters_merge_and_unmerge(after_inference, quantised):
    model = with_adapter(quantised())
    base = logits(model.base_model.model)
    trained(model, steps=8)
    expected = logits(model)
    if not after_inference:
        model.train()
    model.merge_adapter()
    merged = difference(logits(model), expected)
    assert merged < 0.5 * difference(base, expected)
    assert all(layer.weight.quant_type == "nf4" and layer.quant_state is layer.weight.quant_state for layer in quantised_layers(model))
    model.unmerge_adapter()
    assert difference(logits(model), expected) < 0.3
    assert {type(layer.weight) for layer in quantised_layers(model.merge_and_unload())} == {Params4bit}


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "olora": lambda: peft.LoraConfig(target_modules="all-linear", init_lora_weights="olora", task_type="CAUSAL_LM"),
    "road": lambda: peft.RoadConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "randlora": lambda: peft.RandLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:.*rounding errors")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_other_adapters_train_and_merge(adapter, quantised):
    model = with_adapter(quantised(), config=adapter())
    losses, expected = trained(model), logits(model)
    assert losses[-1] < losses[0]
    assert difference(logits(model.merge_and_unload()), expected) < 0.6
