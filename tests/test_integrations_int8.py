"""A small Llama in 8 bit through transformers, accelerate and peft: loading, offloading, checkpointing, training; on the CPU, offline."""

import copy
import io

import accelerate
import peft
import pytest
from small_llama import IDS, difference, load, logits, one_thread, saved, trained, with_adapter  # noqa: F401
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from bitsandbytes.nn import Int8Params, Linear8bitLt


@pytest.fixture(scope="module")
def dense_path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dense"), layers=2)


@pytest.fixture
def quantised(dense_path):
    return lambda threshold=6.0, **config: load(
        dense_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, **config)
    )


def quantised_layers(model) -> list[Linear8bitLt]:
    return [module for module in model.modules() if isinstance(module, Linear8bitLt)]


# ------------------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("threshold", [0.0, 6.0, 2.0])
def test_a_model_is_quantised_used_saved_and_reloaded(threshold, quantised, dense_path, tmp_path):
    model, dense = quantised(threshold), load(dense_path)
    assert len(quantised_layers(model)) == 14 and all(type(layer.weight) is Int8Params for layer in quantised_layers(model))
    assert model.num_parameters() == dense.num_parameters()
    expected = logits(model)
    assert difference(expected, logits(dense)) < 0.03
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert torch.equal(logits(model), expected)
    for path in ("whole", "sharded"):
        again = load(tmp_path / path)
        assert all(layer.weight.SCB is not None for layer in quantised_layers(again))
        assert torch.equal(logits(again), expected) and torch.equal(logits(again), expected)


def test_a_float_weight_option(quantised, dense_path):
    model = quantised(llm_int8_has_fp16_weight=True)
    assert difference(logits(model), logits(load(dense_path))) < 0.03


def test_tied_embeddings_stay_tied(tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = load(saved(tmp_path / "dense", tie_word_embeddings=True), quantization_config=config)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(load(tmp_path / "quantised")), logits(model))


def test_a_head_tied_to_a_float_embedding_computes_with_it(tmp_path):
    path = saved(tmp_path / "dense", tie_word_embeddings=True)
    model = load(path, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["audio_tower"]))
    assert type(model.lm_head) is Linear8bitLt and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(load(path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))))


@pytest.mark.parametrize("after_inference", [False, True])
def test_dequantising_copying_moving_and_pickling(after_inference, quantised):
    model = quantised()
    expected = logits(copy.deepcopy(model))
    if after_inference:
        logits(model)
    other = copy.deepcopy(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for same in (other, pickled, model.to("cpu")):
        assert torch.equal(logits(same), expected)
    assert pickled.num_parameters() == model.num_parameters()
    assert difference(logits(pickled.dequantize()), expected) < 0.02


def test_a_state_dict_loads_into_the_model_it_came_from(quantised):
    model, other = quantised(), quantised()
    logits(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_the_model_compiles(quantised):
    model = quantised().train()
    assert torch.equal(logits(torch.compile(model, backend="eager")), logits(model))


# -------------------------------------------------------------------------------------------------------------- offload and training


def offloaded(model, where, tmp_path, layers=None):
    """The model with its layers, or the first ``layers`` of them, living in another place between their uses."""
    accelerate.hooks.remove_hook_from_submodules(model)
    if where == "memory":
        parts = [model] if layers is None else model.base_model.model.model.layers[:layers]
        for part in parts:
            accelerate.cpu_offload(part, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    return model


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloading(where, quantised, tmp_path):
    model = quantised()
    expected = logits(model)
    model = offloaded(model, where, tmp_path)
    assert all(layer.weight.is_meta for layer in quantised_layers(model))
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    x = torch.randn(2, 64, requires_grad=True)
    layer = quantised_layers(model)[0]
    layer(x).sum().backward()
    assert x.grad.norm() > 0 and layer.weight.is_meta


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("layers", [None, 1], ids=["in place", "half offloaded"])
def test_training_is_the_same_with_checkpointing_evaluation_and_offload(layers, evaluate, reentrant, quantised, tmp_path):
    expected = trained(with_adapter(quantised()))
    assert expected[0] > expected[1] > expected[2]
    model = with_adapter(quantised(), reentrant)
    if layers is not None:
        for layer in model.base_model.model.model.layers[:layers]:
            for module in quantised_layers(layer):
                accelerate.cpu_offload(module, execution_device="cpu")
    assert trained(model, evaluate=evaluate) == expected


def test_dispatching_by_a_device_map(quantised, dense_path, tmp_path):
    model = quantised()
    expected = logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    model = accelerate.dispatch_model(model, {**device_map, "lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)


def test_adapters_are_saved_and_reloaded(quantised, tmp_path):
    model = with_adapter(quantised())
    trained(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantised(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


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
    assert difference(logits(model), expected) < 0.1 * difference(base, expected)
    model.unmerge_adapter()
    assert difference(logits(model), expected) < 0.05
    assert {type(layer.weight) for layer in quantised_layers(model.merge_and_unload())} == {Int8Params}


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "olora": lambda: peft.LoraConfig(target_modules="all-linear", init_lora_weights="olora", task_type="CAUSAL_LM"),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "road": lambda: peft.RoadConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "randlora": lambda: peft.RandLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:.*rounding errors")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_other_adapters_train_and_merge(adapter, quantised):
    model = with_adapter(quantised(), config=adapter())
    losses, expected = trained(model), logits(model)
    assert losses[-1] < losses[0] + 1e-3
    if adapter is not ADAPTERS["adalora"]:  # peft does not merge this one into 8-bit weights
        assert difference(logits(model.merge_and_unload()), expected) < 0.2
