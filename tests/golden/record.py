"""Records the data of this folder from the published library. Run it with an interpreter that has bitsandbytes 0.50.2:

    python tests/golden/record.py [--out FOLDER]

Inputs come from integer formulas (`tests/helpers.py`), so only results are stored. The published library has two sets of kernels on a CPU,
native and plain PyTorch, that do not always agree; the program runs itself once more with the native library out of reach and records both.
What is stored:

    codes.safetensors         code maps and 4-bit tables
    four_bit.safetensors      packed bytes, statistics and dequantised values (PyTorch kernels)
    eight_bit.safetensors     blockwise codes and dequantised values (PyTorch kernels)
    states.json               the JSON text, the keys and their order, of packed quantisation states
    departures_*.safetensors  results on small inputs on which this library decides otherwise on purpose, of the native and the PyTorch kernels
    layer_*.safetensors       checkpoints of layers; `layer.pt` is one by torch.save; `layer_results.safetensors` holds what they computed
    int8.safetensors          row codes, scales and outlier columns of LLM.int8(), and what 8-bit layers computed
    int8_*.pt                 8-bit layers: a state dict before a forward, one after it, and a pickled module
    llama/                    a small Llama saved by transformers after quantising it in 4 bit, and its logits
"""

import argparse
import ctypes
import json
from pathlib import Path
import subprocess
import sys
import tempfile

from safetensors.torch import save_file
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cases  # noqa: E402
from helpers import FLOAT_DTYPES, bell, model_quantize_4bit, model_quantize_blockwise, raw_bytes, short_name, unpack  # noqa: E402

PUBLISHED = "0.50.2"


def hide_native_library() -> None:
    """Makes loading the native library fail, so that the plain PyTorch kernels answer."""
    load = ctypes.CDLL.__init__

    def refuse(self, name, *args, **kwargs):
        if name and "libbitsandbytes" in str(name):
            raise OSError(f"{name} is hidden on purpose")
        load(self, name, *args, **kwargs)

    ctypes.CDLL.__init__ = refuse


def contiguous(tensors: dict) -> dict:
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}


def as_metadata(values: dict) -> dict[str, str]:
    """One entry only: safetensors writes several in no fixed order."""
    return {"about": json.dumps(values)}


def record_codes(F, out: Path) -> None:
    maps = {name: getattr(F, function)(*args) for name, (function, args) in cases.CODE_MAPS.items()}
    maps |= {name: F.get_4bit_type(name, device="cpu") for name in ("nf4", "fp4", "af4")}
    save_file(contiguous(maps), out / "codes.safetensors")


def record_four_bit(F, out: Path) -> None:
    tensors = {}
    for name, case in cases.four_bit().items():
        A = case.input()
        packed, state = F.quantize_4bit(A, blocksize=case.blocksize, quant_type=case.quant_type, quant_storage=case.storage)
        assert_agrees_but_for_zero(name, A, packed, state)
        tensors[f"{name}.packed"], tensors[f"{name}.absmax"] = packed, state.absmax
    for name, case in cases.four_bit_dequantize().items():
        tensors[f"{name}.values"] = torch.ops.bitsandbytes.dequantize_4bit(
            case.packed(), case.absmax(), case.blocksize, case.quant_type, [case.n], case.dtype
        )
    for name, case in cases.nested().items():
        packed, state = F.quantize_4bit(case.input(), blocksize=case.blocksize, quant_type=case.quant_type, compress_statistics=True)
        tensors |= {f"{name}.packed": packed, f"{name}.absmax": state.absmax, f"{name}.offset": state.offset, f"{name}.absmax2": state.state2.absmax}
        tensors[f"{name}.values"] = F.dequantize_4bit(packed, state)
    save_file(contiguous(tensors), out / "four_bit.safetensors")


def assert_agrees_but_for_zero(name, A, packed, state) -> None:
    """The general cases must not touch a point on which this library decides otherwise, but for the second zero of FP4."""
    ours, absmax = model_quantize_4bit(A, state.blocksize, state.quant_type)
    theirs = unpack(packed, A.numel())
    if state.quant_type == "fp4":
        theirs[theirs == 8] = 0
    if not torch.equal(theirs, unpack(ours, A.numel())) or not torch.equal(state.absmax.nan_to_num(-1), absmax.nan_to_num(-1)):
        raise SystemExit(f"{name}: the published result differs; choose another input or move it to the departures")


def record_eight_bit(F, out: Path) -> None:
    tensors = {}
    for name, case in cases.eight_bit().items():
        codes, state = F.quantize_blockwise(case.input(), code=case.code(F), blocksize=case.blocksize)
        tensors[f"{name}.codes"], tensors[f"{name}.absmax"] = codes, state.absmax
        for dtype in FLOAT_DTYPES:
            values = torch.ops.bitsandbytes.dequantize_blockwise(codes, state.absmax, state.code, case.blocksize, dtype)
            tensors[f"{name}.{short_name(dtype)}"] = values
    save_file(contiguous(tensors), out / "eight_bit.safetensors")


def record_departures(F, path: Path) -> None:
    tensors = {}
    for name, case in cases.departures().items():
        codes, absmax = case.quantize(F)
        tensors |= {f"{name}.codes": codes, f"{name}.absmax": absmax}
    save_file(contiguous(tensors), path, metadata=as_metadata({name: case.reason for name, case in cases.departures().items()}))


def record_states(F, out: Path) -> None:
    texts = {}
    for name, case in cases.states().items():
        _, state = F.quantize_4bit(case.input(), blocksize=case.blocksize, quant_type=case.quant_type, compress_statistics=case.nested)
        packed = state.as_dict(packed=True)
        blob = packed[f"quant_state.bitsandbytes__{case.quant_type}"]
        texts[name] = {"json": bytes(blob.tolist()).decode(), "packed_keys": list(packed), "plain_keys": list(state.as_dict())}
    (out / "states.json").write_text(json.dumps(texts, indent=1) + "\n")


def assert_rules_agree(name, layer) -> None:
    """The weights recorded are ones on which the published rules and those of this library give the same bytes."""
    state, weight = layer.weight.quant_state, cases.layers()[name].weight()
    packed, absmax = model_quantize_4bit(weight, state.blocksize, state.quant_type)
    differ = raw_bytes(layer.weight.data) != raw_bytes(packed)
    if state.nested:  # the native kernels round to 16-bit steps before they look for the nearest code
        codes, _ = model_quantize_blockwise(absmax - absmax.mean(), state.state2.code, 256)
        differ |= not torch.equal(codes, state.absmax)
    if differ:
        raise SystemExit(f"{name}: the published result differs; choose another seed")


def record_layers(bnb, out: Path) -> None:
    results, orders = {}, {}
    for name, case in cases.layers().items():
        layer = case.quantised(bnb).train()
        assert_rules_agree(name, layer)
        with torch.no_grad():
            results[name] = layer(case.x())
        state_dict = layer.state_dict()
        orders[name] = list(state_dict)
        save_file(contiguous(state_dict), out / f"layer_{name}.safetensors")
    save_file(contiguous(results), out / "layer_results.safetensors", metadata=as_metadata(orders))
    torch.save(cases.layers()[cases.PICKLED_LAYER].quantised(bnb).state_dict(), out / "layer.pt")


def record_int8(bnb, out: Path) -> None:
    tensors = {}
    for name, case in cases.int8_rows().items():
        codes, scales, columns = bnb.functional.int8_vectorwise_quant(case.input(), threshold=case.threshold)
        tensors |= {f"{name}.codes": codes, f"{name}.scales": scales}
        if columns is not None:
            tensors[f"{name}.columns"] = columns
    for name, case in cases.int8_layers().items():
        layer = case.quantised(bnb)
        torch.save(layer.state_dict(), out / f"int8_{name}_new.pt")
        with torch.no_grad():
            tensors[f"{name}.result"] = layer(case.x())
        torch.save(layer.state_dict(), out / f"int8_{name}_used.pt")
        torch.save(layer, out / f"int8_{name}_module.pt")
    save_file(contiguous(tensors), out / "int8.safetensors")


def record_llama(out: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        dense = LlamaForCausalLM(LlamaConfig(**cases.LLAMA_CONFIG)).to(torch.bfloat16)
        for seed, parameter in enumerate(dense.parameters()):
            if parameter.dim() > 1:
                parameter.data = (bell(parameter.numel(), seed) / parameter.shape[1] ** 0.5).reshape(parameter.shape).to(torch.bfloat16)
        dense.save_pretrained(folder)
        recipe = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=recipe, device_map="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model.train()(cases.llama_tokens()).logits
    model.save_pretrained(out / "llama")
    for extra in (out / "llama").glob("generation_config.json"):
        extra.unlink()
    save_file(contiguous({"logits": logits}), out / "llama" / "logits.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Record golden data from the published library.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--hide-native", action="store_true", help="record what the plain PyTorch kernels give (the program calls itself so)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.hide_native:
        hide_native_library()

    import bitsandbytes as bnb
    from bitsandbytes import functional as F

    if bnb.__version__ != PUBLISHED:
        raise SystemExit(f"bitsandbytes {PUBLISHED} is what is to be recorded, this interpreter has {bnb.__version__} ({bnb.__file__})")
    if args.hide_native:
        for step in (record_codes, record_four_bit, record_eight_bit, record_states):
            step(F, args.out)
        record_departures(F, args.out / "departures_torch.safetensors")
    else:
        subprocess.run([sys.executable, __file__, "--out", str(args.out), "--hide-native"], check=True)
        record_departures(F, args.out / "departures_native.safetensors")
        record_layers(bnb, args.out)
        record_int8(bnb, args.out)
        record_llama(args.out)


if __name__ == "__main__":
    main()
