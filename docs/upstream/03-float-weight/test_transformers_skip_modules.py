"""The companion change in transformers: a list of modules to skip adds to the default one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

CONFIG = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=96)
TOKENS = torch.arange(8)[None]
KINDS = {
    "4bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8bit": dict(load_in_8bit=True),
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=request.param, **CONFIG)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    quantization = {"quantization_config": BitsAndBytesConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **quantization).eval()


def quantized_names(model):
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_layer_stays_protected(folder, kind):
    usual = quantized_names(load(folder, **KINDS[kind]))
    model = load(folder, llm_int8_skip_modules=["o_proj"], **KINDS[kind])
    assert quantized_names(model) == {name for name in usual if "o_proj" not in name}
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_is_reloaded_with_the_same_layers(folder, kind, tmp_path):
    model = load(folder, llm_int8_skip_modules=["o_proj"], **KINDS[kind])
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert quantized_names(again) == quantized_names(model)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_of_the_caller_is_not_changed(folder, kind):
    config = BitsAndBytesConfig(llm_int8_skip_modules=["o_proj"], **KINDS[kind])
    AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=config)
    assert config.llm_int8_skip_modules == ["o_proj"]


def test_an_empty_list_skips_nothing(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **CONFIG)).save_pretrained(tmp_path)
    assert "lm_head" in quantized_names(load(tmp_path, llm_int8_skip_modules=[], **KINDS["4bit"]))
