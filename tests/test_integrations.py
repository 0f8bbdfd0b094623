"""A small Llama through transformers, accelerate and peft: what users do with models in 4 and in 8 bit, all of it on the CPU and offline."""

import copy
from dataclasses import dataclass
import io

import accelerate
from helpers import DEVICE
import peft
import pytest
from small_llama import IDS, difference, load, logits, one_thread, saved, trained, with_adapter  # noqa: F401
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import bitsandbytes as bnb
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit


@dataclass(frozen=True)
class Kind:
    """A way to quantise: the options that ask for it, the classes that come of it, and how far off results may be, as a share of their norm."""

    options: dict
    layer: type
    weight: type
    least: float  # logits beside those of the dense model
    most: float
    merged: float  # an adapter that was merged beside what it adds
    unmerged: float
    dequantised: float
    requantised: float  # logits after the weights were quantised anew with an adapter in them


KINDS = {
    "4bit": Kind({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Linear4bit, Params4bit, 0.02, 0.2, 0.5, 0.3, 1e-6, 0.6),
    "8bit": Kind({"load_in_8bit": True}, Linear8bitLt, Int8Params, 0.001, 0.03, 0.1, 0.05, 0.02, 0.2),
}
VARIANTS = {
    "nf4": ("4bit", {}),
    "nested": ("4bit", {"bnb_4bit_use_double_quant": True}),
    "fp4": ("4bit", {"bnb_4bit_quant_type": "fp4"}),
    "bfloat16 storage": ("4bit", {"bnb_4bit_quant_storage": torch.bfloat16}),
    "bfloat16 compute": ("4bit", {"bnb_4bit_compute_dtype": torch.bfloat16}),
    "int8": ("8bit", {}),
    "int8, no outliers": ("8bit", {"llm_int8_threshold": 0.0}),
    "int8, many outliers": ("8bit", {"llm_int8_threshold": 2.0}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def variants(*names):
    return pytest.mark.parametrize("kind, changes", [VARIANTS[name] for name in names], ids=names)


def quantisation(kind, **changes) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{**KINDS[kind].options, **changes})


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dense"), layers=2)


@pytest.fixture
def quantised(dense_path):
    return lambda kind, **changes: load(dense_path, quantization_config=quantisation(kind, **changes))


def quantised_layers(model) -> list[Linear4bit | Linear8bitLt]:
    return [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]


# ------------------------------------------------------------------------------------------------------------------ transformers


@variants(*VARIANTS)
def test_a_model_is_quantised_used_saved_and_reloaded(kind, changes, quantised, dense_path, tmp_path):
    model, dense = quantised(kind, **changes), load(dense_path)
    assert [type(layer.weight) for layer in quantised_layers(model)] == 14 * [KINDS[kind].weight]
    assert model.num_parameters() == dense.num_parameters()
    expected = logits(model)
    assert KINDS[kind].least < difference(expected, logits(dense)) < KINDS[kind].most
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)

    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert torch.equal(logits(model), expected)
    for form in ("whole", "sharded"):
        again = load(tmp_path / form)
        assert torch.equal(logits(again), expected) and torch.equal(logits(again), expected)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"hidden_size": 48, "intermediate_size": 100}], ids=["few outputs", "odd blocks"])
@each_kind
def test_sizes_that_fit_no_tile(kind, changes, tmp_path):
    model = load(saved(tmp_path, **changes), quantization_config=quantisation(kind))
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)


def test_an_int8_weight_that_is_kept_in_floating_point(quantised, dense_path):
    assert difference(logits(quantised("8bit", llm_int8_has_fp16_weight=True)), logits(load(dense_path))) < KINDS["8bit"].most


@each_kind
def test_tied_embeddings_stay_tied(kind, tmp_path):
    model = load(saved(tmp_path / "dense", tie_word_embeddings=True), quantization_config=quantisation(kind))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(load(tmp_path / "quantised")), logits(model))


@each_kind
def test_a_head_tied_to_a_float_embedding_computes_with_it(kind, tmp_path):
    """Any value of llm_int8_skip_modules makes transformers convert the head as well, and then tie it to the embedding."""
    path = saved(tmp_path, tie_word_embeddings=True)
    model = load(path, quantization_config=quantisation(kind, llm_int8_skip_modules=["audio_tower"]))
    assert type(model.lm_head) is KINDS[kind].layer and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load(path, quantization_config=quantisation(kind))))


@pytest.mark.parametrize("skip", [["audio_tower"], ["q_proj"], ["lm_head"]], ids=lambda skip: skip[0])
@each_kind
@pytest.mark.parametrize("tied", [True, False])
def test_a_list_of_modules_to_skip_loads_generates_saves_and_reloads(tied, kind, skip, tmp_path):
    config = quantisation(kind, llm_int8_skip_modules=skip)
    model = load(saved(tmp_path / "dense", tie_word_embeddings=tied), quantization_config=config)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(load(tmp_path / "quantised")), logits(model))


@each_kind
def test_device_map_auto(kind, dense_path):
    assert logits(load(dense_path, device_map="auto", quantization_config=quantisation(kind))).shape == (2, 9, 256)


@pytest.mark.parametrize("after_inference", [False, True])
@each_kind
def test_models_are_copied_pickled_moved_and_dequantised(kind, after_inference, quantised):
    model = quantised(kind)
    expected = logits(copy.deepcopy(model))
    if after_inference:
        logits(model)
    other = copy.deepcopy(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for same in (other, pickled, model.to(DEVICE)):
        assert torch.equal(logits(same), expected)
    assert pickled.num_parameters() == model.num_parameters()
    for dense in (pickled, model):
        assert difference(logits(dense.dequantize(dtype=torch.float32)), expected) < KINDS[kind].dequantised


@variants("nested", "int8")
def test_a_deep_copy_is_independent(kind, changes, quantised):
    model = quantised(kind, **changes)
    other = copy.deepcopy(model)
    if kind == "4bit":
        for layer in quantised_layers(other):
            assert layer.weight.module is layer and layer.quant_state is layer.weight.quant_state
    for layer in quantised_layers(model):
        layer.weight.zero_()
    assert difference(logits(other), logits(model)) > 0.1


@variants(*VARIANTS)
def test_a_state_dict_loads_into_the_model_it_came_from(kind, changes, quantised):
    model, other = quantised(kind, **changes), quantised(kind, bnb_4bit_quant_type="fp4")
    logits(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    for source, target in zip(quantised_layers(model), quantised_layers(other)):  # settings that are no state
        if kind == "4bit":
            target.compute_dtype = source.compute_dtype
        else:
            target.state.threshold = source.state.threshold
    assert torch.equal(logits(other), logits(model))


@each_kind
def test_the_model_compiles(kind, quantised):
    model = quantised(kind).train()
    assert torch.equal(logits(torch.compile(model, backend="eager")), logits(model))


# -------------------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("where", ["memory", "disk"])
@variants("nested", "int8")
def test_offloading(kind, changes, where, quantised, tmp_path):
    model = quantised(kind, **changes)
    expected = logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    if where == "memory":
        accelerate.cpu_offload(model, execution_device=DEVICE)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=DEVICE)
    assert all(layer.weight.is_meta for layer in quantised_layers(model))
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    x = torch.randn(2, 64, requires_grad=True)
    layer = quantised_layers(model)[0]
    layer(x).sum().backward()
    assert x.grad.norm() > 0 and layer.weight.is_meta


@each_kind
def test_dispatching_by_a_device_map(kind, quantised, tmp_path):
    model = quantised(kind)
    expected = logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    model = accelerate.dispatch_model(model, {**device_map, "lm_head": "cpu"}, main_device=DEVICE, offload_dir=tmp_path, force_hooks=True)
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)


def test_4bit_layers_are_made_on_meta_with_their_attributes():
    with accelerate.init_empty_weights():
        layer = bnb.nn.LinearNF4(64, 32, compress_statistics=False)
    assert layer.weight.is_meta and layer.weight.quant_type == "nf4" and not layer.weight.compress_statistics
    accelerate.utils.set_module_tensor_to_device(layer, "weight", "cpu", value=torch.randn(32, 64))
    assert layer.weight.bnb_quantized and layer.quant_state.quant_type == "nf4"


# -------------------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("offloaded", [False, True], ids=["in place", "half offloaded"])
@variants("nested", "bfloat16 storage", "int8")
def test_training_is_the_same_with_checkpointing_evaluation_and_offload(kind, changes, offloaded, quantised):
    expected = trained(with_adapter(quantised(kind, **changes)))
    assert expected[0] > expected[1] > expected[2]
    for reentrant in (None, True, False):
        for evaluate in (False, True):
            model = with_adapter(quantised(kind, **changes), reentrant)
            if offloaded:
                for layer in quantised_layers(model.base_model.model.model.layers[0]):
                    accelerate.cpu_offload(layer, execution_device=DEVICE)
            assert trained(model, evaluate=evaluate) == expected, (reentrant, evaluate)


@each_kind
def test_adapters_are_saved_and_reloaded(kind, quantised, tmp_path):
    model = with_adapter(quantised(kind))
    trained(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    result = peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model))
    assert not result.unexpected_keys and torch.equal(logits(again), logits(model))


@each_kind
def test_modules_trained_in_full_are_saved_beside_the_adapter(kind, quantised, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM")
    model = with_adapter(quantised(kind), config=config)
    losses = trained(model)
    assert losses[0] > losses[1] > losses[2]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(quantised(kind), tmp_path).eval()), logits(model))


@pytest.mark.filterwarnings("ignore:.*rounding errors")
@pytest.mark.parametrize("after_inference", [False, True])
@each_kind
def test_adapters_merge_and_unmerge(kind, after_inference, quantised):
    model = with_adapter(quantised(kind))
    base = logits(model.base_model.model)
    trained(model, steps=8)
    expected = logits(model)
    if not after_inference:
        model.train()
    model.merge_adapter()
    assert difference(logits(model), expected) < KINDS[kind].merged * difference(base, expected)
    if kind == "4bit":
        assert all(layer.weight.quant_type == "nf4" and layer.quant_state is layer.weight.quant_state for layer in quantised_layers(model))
    model.unmerge_adapter()
    assert difference(logits(model), expected) < KINDS[kind].unmerged
    assert {type(layer.weight) for layer in quantised_layers(model.merge_and_unload())} == {KINDS[kind].weight}


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "olora": lambda: peft.LoraConfig(target_modules="all-linear", init_lora_weights="olora", task_type="CAUSAL_LM"),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "road": lambda: peft.RoadConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "randlora": lambda: peft.RandLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:.*rounding errors")
@pytest.mark.parametrize("adapter", ADAPTERS)
@each_kind
def test_other_adapters_train_and_merge(kind, adapter, quantised):
    model = with_adapter(quantised(kind), config=ADAPTERS[adapter]())
    losses, expected = trained(model), logits(model)
    assert losses[-1] < losses[0] + 1e-3
    if adapter != "adalora":  # peft does not merge this one into quantised weights
        assert difference(logits(model.merge_and_unload()), expected) < KINDS[kind].requantised
