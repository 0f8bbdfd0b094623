"""Writes the hostile files of this folder: make.py. Each is a good file with one thing wrong, which its name tells.

Kept as files, so that what an old version was spared or once took stays refused. What is read from them: `../test_hostile_files.py`.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
import torch

import bitsandbytes as bnb

HERE = Path(__file__).resolve().parent
OUT_FEATURES, IN_FEATURES = 8, 64
STATE = "weight.quant_state.bitsandbytes__nf4"


def blob(values) -> torch.Tensor:
    return torch.tensor(list(values if isinstance(values, bytes) else json.dumps(values).encode()), dtype=torch.uint8)


def weights() -> torch.Tensor:
    return torch.linspace(-1, 1, OUT_FEATURES * IN_FEATURES).reshape(OUT_FEATURES, IN_FEATURES)


def good_linear4bit() -> dict[str, torch.Tensor]:
    layer = bnb.nn.Linear4bit(IN_FEATURES, OUT_FEATURES, bias=False, quant_type="nf4")
    layer.weight.data.copy_(weights())
    return dict(layer.to("cpu").state_dict())


def good_linear8bit() -> dict[str, torch.Tensor]:
    layer = bnb.nn.Linear8bitLt(IN_FEATURES, OUT_FEATURES, bias=False, has_fp16_weights=False)
    layer.weight.data.copy_(weights())
    return dict(layer.to("cpu").state_dict())


def good_adam() -> dict:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 4096))
    optimizer = bnb.optim.Adam8bit([parameter], lr=1e-3)
    parameter.grad = torch.linspace(1, 2, 4096)
    optimizer.step()
    return optimizer.state_dict()


def linear4bit_files() -> dict[str, dict]:
    good = good_linear4bit()
    values = json.loads(bytes(good[STATE].tolist()))

    def said(**changes) -> dict:
        return good | {STATE: blob(values | changes)}

    def without(key: str) -> dict:
        return {name: tensor for name, tensor in good.items() if name != key}

    return {
        "weight-one-byte-short": good | {"weight": good["weight"][:-1]},
        "weight-one-byte-long": good | {"weight": torch.cat((good["weight"], good["weight"][:1]))},
        "weight-empty": good | {"weight": good["weight"][:0]},
        "weight-of-integers": good | {"weight": good["weight"].to(torch.int64)},
        "weight-alone": {"weight": good["weight"]},
        "absmax-one-short": good | {"weight.absmax": good["weight.absmax"][:-1]},
        "absmax-empty": good | {"weight.absmax": good["weight.absmax"][:0]},
        "absmax-of-floats": good | {"weight.absmax": good["weight.absmax"].float()},
        "absmax-two-dimensional": good | {"weight.absmax": good["weight.absmax"][None]},
        "absmax-missing": without("weight.absmax"),
        "quant-map-of-eight": good | {"weight.quant_map": good["weight.quant_map"][:8]},
        "quant-map-missing": without("weight.quant_map"),
        "nested-absmax-empty": good | {"weight.nested_absmax": good["weight.nested_absmax"][:0]},
        "nested-absmax-missing": without("weight.nested_absmax"),
        "nested-quant-map-short": good | {"weight.nested_quant_map": good["weight.nested_quant_map"][:255]},
        "state-missing": without(STATE),
        "state-cut": good | {STATE: good[STATE][:-9]},
        "state-of-floats": good | {STATE: good[STATE].float()},
        "state-of-another-type": without(STATE) | {STATE.replace("nf4", "fp4"): good[STATE]},
        "state-twice": good | {STATE.replace("nf4", "fp4"): blob(values | {"quant_type": "fp4"})},
        "state-a-list": good | {STATE: blob([values])},
        "state-nested-deep": good | {STATE: blob(b'{"shape": ' + b"[" * 20_000)},
        "state-of-a-long-number": good | {STATE: blob(b'{"blocksize": ' + b"9" * 5_000 + b"}")},
        "state-not-unicode": good | {STATE: blob(b"\xff\xfe{")},
        "shape-larger": said(shape=[OUT_FEATURES * 2, IN_FEATURES]),
        "shape-transposed": said(shape=[IN_FEATURES, OUT_FEATURES]),
        "shape-negative": said(shape=[-OUT_FEATURES, -IN_FEATURES]),
        "shape-overflowing": said(shape=[2**62, 8]),
        "shape-of-floats": said(shape=[8.0, 64.0]),
        "shape-null": said(shape=None),
        "blocksize-zero": said(blocksize=0),
        "blocksize-other": said(blocksize=128),
        "blocksize-huge": said(blocksize=2**40),
        "blocksize-true": said(blocksize=True),
        "nested-blocksize-one": said(nested_blocksize=1),
        "dtype-a-function": said(dtype="load"),
        "dtype-an-attribute": said(dtype="__class__"),
        "dtype-integer": said(dtype="int32"),
        "quant-type-unknown": said(quant_type="nf5"),
        "offset-text": said(nested_offset="0"),
        "offset-beyond-floats": said(nested_offset=10**400),
        "entry-unknown": said(code="import os"),
    }


def linear8bit_files() -> dict[str, dict]:
    good = good_linear8bit()
    return {
        "scales-missing": {"weight": good["weight"]},
        "scales-one-short": good | {"SCB": good["SCB"][:-1]},
        "scales-of-integers": good | {"SCB": good["SCB"].to(torch.int32)},
        "codes-transposed": good | {"weight": good["weight"].t().contiguous()},
        "codes-of-another-dtype": good | {"weight": good["weight"].to(torch.int16)},
        "codes-missing": {"SCB": good["SCB"]},
        "format-unknown": good | {"weight_format": torch.tensor(9, dtype=torch.uint8)},
        "format-of-old-gpus": good | {"weight_format": torch.tensor(2, dtype=torch.uint8)},
    }


def adam_files() -> dict[str, dict]:
    good = good_adam()
    [(key, state)] = good["state"].items()
    wrapped = state["__bnb_optimizer_quant_state__"]

    def with_state(**changes) -> dict:
        return good | {"state": {key: state | {"__bnb_optimizer_quant_state__": wrapped | changes}}}

    return {
        "moment-short": with_state(state1=wrapped["state1"][:-1]),
        "moment-none": with_state(state2=None),
        "statistics-none": with_state(absmax1=None),
        "statistics-missing": good | {"state": {key: {"step": 1, "state1": wrapped["state1"], "state2": wrapped["state2"]}}},
        "step-missing": good | {"state": {key: {name: value for name, value in state.items() if name != "step"}}},
        "state-a-list": good | {"state": []},
        "state-null": good | {"state": {key: None}},
        "groups-missing": {"state": good["state"]},
        "groups-without-parameters": good | {"param_groups": [{"lr": 1.0}]},
        "groups-too-many": good | {"param_groups": good["param_groups"] * 2},
    }


def main() -> None:
    for old in (*HERE.glob("*.safetensors"), *HERE.glob("*.pt")):
        old.unlink()
    for layer, files in (("linear4bit", linear4bit_files()), ("linear8bit", linear8bit_files())):
        for name, tensors in files.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, HERE / f"{layer}--{name}.safetensors")
    for name, state in adam_files().items():
        torch.save(state, HERE / f"adam8bit--{name}.pt")


if __name__ == "__main__":
    main()
