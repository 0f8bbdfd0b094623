"""The helpers in `bitsandbytes.utils`: replacing layers, what to leave alone, outlier features."""

import gc

from helpers import DEVICE, run_python
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.utils import OutlierTracer, find_outlier_dims, modules_to_skip, replace_linear


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.tokens = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 32, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# ------------------------------------------------------------------------------------------------------------------- replace_linear
def linear_nf4(in_features, out_features, bias):
    return bnb.nn.LinearNF4(in_features, out_features, bias, compress_statistics=False)


def test_replaces_every_linear_layer_but_the_head():
    model = replace_linear(Model(), bnb.nn.Linear4bit)
    replaced = [name for name, kind in kinds(model).items() if kind is bnb.nn.Linear4bit]
    assert replaced == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert model.blocks[0].up.bias is not None and model.blocks[0].down.bias is None


def test_skips_by_last_part_and_by_full_name():
    by_part = kinds(replace_linear(Model(), bnb.nn.Linear4bit, skip_modules=["up"]))
    assert [name for name, kind in by_part.items() if kind is nn.Linear] == ["blocks.0.up", "blocks.1.up"]
    by_path = kinds(replace_linear(Model(), bnb.nn.Linear4bit, skip_modules=["blocks.1.up"]))
    assert [name for name, kind in by_path.items() if kind is nn.Linear] == ["blocks.1.up"]


def test_copied_weights_are_quantised_when_the_layer_moves():
    model, ids = Model().eval(), torch.arange(8).reshape(2, 4)
    expected = model(ids)
    weight = model.blocks[0].up.weight.detach().clone()
    replace_linear(model, linear_nf4, copy_weights=True).to(DEVICE)
    up = model.blocks[0].up
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(up.weight.data, packed) and torch.equal(up.weight.quant_state.absmax, state.absmax)
    assert up.weight.module is up and not up.training
    error = (model(ids) - expected).norm() / expected.norm()
    assert 0 < error < 0.2


def test_plain_replacement_takes_the_parameters_themselves():
    class Other(nn.Linear):
        pass

    model = Model()
    before = dict(model.named_parameters())
    replace_linear(model, Other, copy_weights=True)
    assert type(model.blocks[0].up) is Other
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "kind", [linear_nf4, lambda *sizes: bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False), nn.Linear], ids=["4 bit", "8 bit", "plain"]
)
def test_no_random_weights_are_made_where_others_are_copied(kind, monkeypatch):
    model = Model()
    filled = []
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, *args, **kwargs: filled.append(tensor.device.type))
    replace_linear(model, kind, copy_weights=True)
    assert filled and set(filled) == {"meta"}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_further_tensors_of_a_replacement_have_their_values():
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("scale", torch.full((self.out_features,), 3.0))

    model = Model()
    before = dict(model.named_parameters())
    replace_linear(model, Scaled, copy_weights=True)
    assert (model.blocks[0].up.scale == 3).all()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_copying_a_packed_weight_is_refused():
    model = replace_linear(Model(), linear_nf4, copy_weights=True).to(DEVICE)
    with pytest.raises(ValueError, match="blocks.0.up"):
        replace_linear(model, nn.Linear, copy_weights=True)


def test_post_processing_runs_on_the_new_layer():
    seen = []

    class Noted(nn.Linear):
        def note(self, module):
            seen.append((self, module))

    model = replace_linear(Model(), Noted, post_processing_function="note")
    assert [(id(a), id(b)) for a, b in seen] == [(id(m), id(m)) for m in model.modules() if type(m) is Noted]


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(8, 8)
    model = replace_linear(nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}), linear_nf4, copy_weights=True)
    assert type(model["a"]) is bnb.nn.LinearNF4 and model["a"] is model["b"]["c"]


def test_no_list_means_the_modules_to_skip():
    model = replace_linear(Model(tied=True), bnb.nn.Linear4bit, skip_modules=None)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.tokens.weight
    last = replace_linear(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), bnb.nn.Linear4bit, skip_modules=None)
    assert type(last[0]) is bnb.nn.Linear4bit and type(last[2]) is nn.Linear


# ------------------------------------------------------------------------------------------------------------------ modules_to_skip
def test_the_callers_list_adds_to_the_head_and_the_tied_modules():
    assert modules_to_skip(Model()) == ["lm_head"]
    assert modules_to_skip(Model(), ["up"]) == ["lm_head", "up"]
    assert modules_to_skip(Model(tied=True), ("lm_head", "up")) == ["lm_head", "tokens", "up"]


def test_a_module_in_two_places_is_not_tied():
    shared = nn.Linear(8, 8)
    assert modules_to_skip(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU())) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformers_model_names_its_own_head(tied):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    assert modules_to_skip(model, ["q_proj"]) == ["lm_head", *["model.embed_tokens"] * tied, "q_proj"]
    assert modules_to_skip(model.model) == []


def test_a_model_can_say_what_its_head_is():
    model = Model()
    model.get_output_embeddings = lambda: model.blocks[1].up
    assert modules_to_skip(model) == ["blocks.1.up"]


# ------------------------------------------------------------------------------------------------------------------ outlier features
def test_outlier_dimensions_by_deviation():
    weight = torch.randn(32, 64)
    weight[:, 3] *= 10
    weight[5] *= 10
    assert find_outlier_dims(weight).tolist() == [3]
    assert find_outlier_dims(weight, reduction_dim=1).tolist() == [5]
    assert find_outlier_dims(weight, topk=4).tolist() == weight.std(0).topk(4).indices.tolist()
    assert len(set(find_outlier_dims(weight, rdm=True, topk=40).tolist())) == 40
    with pytest.raises(ValueError, match="topk"):
        find_outlier_dims(weight, rdm=True)
    with pytest.raises(ValueError, match="matrix"):
        find_outlier_dims(weight[0])


@pytest.fixture
def tracer():
    tracer = OutlierTracer.get_instance()
    yield tracer
    tracer.initialize(nn.Module())
    tracer.initialized = False


def outlier_model():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 16))
    with torch.no_grad():
        model[0].weight[:, 5] *= 20
        model[1].weight[:, 3] *= 20
    return model


def test_tracer_judges_the_first_layer_by_its_input_and_the_others_by_their_weight(tracer):
    model = outlier_model()
    tracer.initialize(model)
    assert tracer.get_outliers(model[0].weight) is None
    x = torch.randn(4, 7, 64)
    x[..., 11] *= 30
    x[2, 3, 20] = 7.0
    model(x)
    assert [tracer.get_outliers(layer.weight).tolist() for layer in model] == [[11, 20], [3], []]
    assert tracer.last_w is model[2].weight and tracer.current_outlier_dims.tolist() == []


def test_tracer_lets_go_of_a_model(tracer):
    first, second = outlier_model(), outlier_model()
    tracer.initialize(first)
    first(torch.randn(4, 64))
    tracer.initialize(second)
    first(torch.randn(4, 64))
    assert tracer.hvalues == [], "the first model is still traced"
    second(torch.randn(4, 64))
    assert len(tracer.hvalues) == 3
    del second
    gc.collect()
    assert tracer.hvalues == [] and tracer.outliers == [], "a new weight at an old address would inherit its outliers"


def test_tracer_is_made_by_get_instance_and_says_when_it_is_idle(tracer, caplog):
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()
    tracer.initialized = False
    assert tracer.get_outliers(torch.zeros(2, 2)) is None
    assert "not initialized" in caplog.text


def test_outlier_aware_linear_quantises_once_and_hands_over_its_outliers(tracer):
    class Doubling(bnb.nn.OutlierAwareLinear):
        def quantize_weight(self, w, outlier_idx):
            return 2 * w

        def forward_with_outliers(self, x, outlier_idx):
            return nn.functional.linear(x, self.weight, self.bias), outlier_idx

    model = nn.Sequential(nn.Linear(64, 64), Doubling(64, 8))
    with torch.no_grad():
        model[1].weight[:, 9] *= 30
    weight = model[1].weight.detach().clone()
    tracer.initialize(model)
    for _ in range(2):
        _, outliers = model(torch.randn(2, 64))
        assert outliers.tolist() == [9]
        assert torch.equal(model[1].weight, 2 * weight) and model[1].is_quantized

    plain = bnb.nn.OutlierAwareLinear(8, 8)
    with pytest.raises(NotImplementedError, match="forward_with_outliers"):
        plain.forward_with_outliers(torch.randn(2, 8), None)
    with pytest.raises(NotImplementedError, match="quantize_weight"):
        plain(torch.randn(2, 8))


def test_importing_utils_first_makes_no_circle():
    done = run_python("import bitsandbytes.utils, bitsandbytes.replacement, bitsandbytes.outliers")
    assert done.returncode == 0, done.stderr
