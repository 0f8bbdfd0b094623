"""Mixture-of-experts layers in 4 bit.

Models keep the experts of a layer as one stack of matrices, [experts, out, in], in a parameter of their own. Integrations that replace linear
layers do not see it, so that nine tenths of such a model stay in 16 bit. ``Experts4bit`` holds a stack in 4 bit and multiplies each token with
the matrix of its expert, straight from the packed codes; ``FusedExperts4bit`` stands in for the expert modules of transformers, and
``quantize_experts`` puts it there.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from .._ops import BLOCKSIZES_4BIT
from ..autograd._functions import _autocast_dtype, matmul_4bit
from .holders import Holds4bitWeight, require_float
from .parameters import Params4bit
from .parametrize import replace_parameter_4bit
from .pieces import part


class Experts4bit(Holds4bitWeight, nn.Module):
    """A stack of linear maps, one an expert, in 4 bit.

    It is used like ``Linear4bit``: construct it, load or copy a floating-point stack, move it to a device. State dicts have the same keys, and are
    read and written the same way.

    Args:
        num_experts: matrices in the stack.
        input_features: size of the last dimension of the input.
        output_features: size of the last dimension of the output.
        bias: whether each expert has a bias; biases are not quantised.
        compress_statistics: quantise the scales as well (double quantisation).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype that the packed bytes are seen as.
        blocksize: elements that share a scale; default 64.
        device, dtype: of the floating-point stack.

    Attributes:
        weight: Params4bit of shape [num_experts, output_features, input_features] until it is quantised.
        bias: [num_experts, output_features], or None.

    Raises:
        ValueError: matrices whose number of elements is not a multiple of 32, the smallest block.
    """

    def __init__(
        self, num_experts, input_features, output_features, bias=False, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8,
        blocksize=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if input_features * output_features % BLOCKSIZES_4BIT[0]:
            raise ValueError(
                f"experts of {output_features} x {input_features} cannot be stored in 4 bit: "
                f"a matrix must have a multiple of {BLOCKSIZES_4BIT[0]} elements"
            )
        self.num_experts, self.in_features, self.out_features = num_experts, input_features, output_features
        self.quant_storage = quant_storage
        self.quant_state = None
        values = torch.empty(self._dense_shape, device=device, dtype=dtype)
        self.weight = Params4bit(
            values,
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.bias = nn.Parameter(torch.empty(num_experts, output_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def _dense_shape(self) -> tuple[int, int, int]:
        return self.num_experts, self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """Initialises matrices and biases like those of ``nn.Linear``."""
        bound = self.in_features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, experts: Tensor | list[int]) -> Tensor:
        """Multiplies each row with the matrix of its expert.

        Args:
            x: [..., in_features]; float16, bfloat16 or float32.
            experts: which expert, int32 or int64, [...]. Or, for x of shape [rows, in_features] that has the rows of expert 0 first, then those of
                expert 1, and so on: how many each has, as a list.

        Returns:
            [..., out_features], dtype of x. Differentiable in x and the bias.

        Raises:
            IndexError: an expert that there is not.
        """
        if isinstance(experts, list):
            return self._grouped(x, experts)
        order, counts = by_expert(experts.reshape(-1), self.num_experts)
        result = self._grouped(x.reshape(-1, self.in_features)[order], counts)
        return result[order.argsort()].view(*x.shape[:-1], self.out_features)

    def _grouped(self, rows: Tensor, counts: list[int]) -> Tensor:
        if len(counts) > self.num_experts:
            raise IndexError(f"there are {self.num_experts} experts, got index {len(counts) - 1}")
        multiply = self._product()
        products = [multiply(chunk, expert) for expert, chunk in enumerate(rows.split(counts)) if len(chunk)]
        return torch.cat(products or [multiply(rows, 0)])

    def _product(self):
        """``(rows, expert) -> rows @ matrix.T + bias`` for the weight as it is."""
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        if state is None and self._is_dense(weight):
            self._warn_about_dense_weight(weight)
            return lambda rows, expert: self._dense_product(rows, weight[expert], expert)
        state = self._recovered_state(weight) if state is None else state
        codes = weight.data
        return lambda rows, expert: matmul_4bit(rows, *part(codes, state, expert), bias=self._bias_of(expert, rows.dtype))

    def _bias_of(self, expert: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias[expert].to(dtype)

    def _dense_product(self, rows: Tensor, matrix: Tensor, expert: int) -> Tensor:
        require_float(self, rows)
        if _autocast_dtype(rows.device.type) is not None:
            return F.linear(rows, matrix, self._bias_of(expert, matrix.dtype))
        dtype = torch.promote_types(rows.dtype, matrix.dtype)
        return F.linear(rows.to(dtype), matrix.to(dtype), self._bias_of(expert, dtype)).to(rows.dtype)

    def dequantize(self) -> Tensor:
        """The dense stack, [num_experts, out_features, in_features]."""
        return self.weight.dequantize()

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The order that brings rows together by expert, and how many rows each expert has.

    Args:
        experts: the expert of each row, [rows].
        num_experts: how many there are; the counts are longer only if larger indices occur.
    """
    return experts.argsort(stable=True), torch.bincount(experts, minlength=num_experts).tolist()


class FusedExperts4bit(nn.Module):
    """The experts of one layer, in 4 bit: each an up projection, an activation (gated or not) and a down projection.

    It takes the place of the expert modules of transformers that follow its experts interface (Mixtral, Qwen-MoE, OLMoE, DeepSeek, GPT-OSS,
    ...), with the same call. Their other attributes and their way to apply the gate come along.

    Args:
        experts: such a module; its stacks are quantised where they are. Stacks on the meta device stay there, for a checkpoint to be loaded.
        recipe: arguments for ``Experts4bit``: quant_type, compress_statistics, quant_storage, blocksize.
    """

    def __init__(self, experts: nn.Module, **recipe):
        super().__init__()
        kept = {name: value for name, value in vars(experts).items() if name not in vars(self) and not name.startswith("_")}
        self.__dict__.update(kept)
        self.experts_class = type(experts)
        self.num_experts = experts.down_proj.shape[0]
        self.up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name in (self.up_name, "down_proj"):
            bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
            self.add_module(name, _stack(getattr(experts, name), bias, experts.is_transposed, recipe))
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sends each token through its experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: experts of each token, [tokens, k]; indices beyond the last expert stand for experts on other ranks, and add nothing.
            top_k_weights: their weights, [tokens, k].

        Returns:
            [tokens, hidden], dtype of hidden_states.
        """
        tokens, k = top_k_index.shape
        order, counts = by_expert(top_k_index.reshape(-1), self.num_experts)
        counts = counts[: self.num_experts]
        order = order[: sum(counts)]
        rows = self._apply_gate(self._modules[self.up_name](hidden_states[order // k], counts))
        rows = self.down_proj(rows, counts)
        if getattr(self, "has_post_expert_norm", False):
            rows = self.post_expert_norm(rows)
        rows = rows * top_k_weights.reshape(-1)[order, None]
        slots = rows.new_zeros(tokens * k, rows.shape[-1]).index_copy(0, order, rows)  # each once, so that the sum has one order
        return slots.view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _apply_gate(self, up: Tensor) -> Tensor:
        return self.experts_class._apply_gate(self, up) if self.has_gate else self.act_fn(up)


def _stack(values: Tensor, bias: Tensor | None, transposed: bool, recipe: dict) -> Experts4bit:
    """A stack of an expert module as an Experts4bit, on the device of its values."""
    num_experts, first, second = values.shape
    inputs, outputs = (first, second) if transposed else (second, first)
    stack = Experts4bit(num_experts, inputs, outputs, bias=bias is not None, **recipe, device="meta", dtype=values.dtype)
    if not values.is_meta:
        values = values.detach().mT if transposed else values.detach()
        stack.weight = stack._new_weight(values.contiguous(), module=stack).to(values.device)
    if bias is not None:
        stack.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return stack


def quantize_experts(
    model: nn.Module, skip: Iterable[str] = (), quant_type: str = "nf4", compress_statistics: bool = True, blocksize: int | None = None
) -> list[str]:  # fmt: skip
    """Quantises the experts of a mixture-of-experts model, in place.

    Expert modules that follow transformers' experts interface are replaced by ``FusedExperts4bit``. Of other modules whose class is named after
    experts, the stacks (parameters of three dimensions) are parametrised, see ``nn.parametrize``. Linear layers are not touched.

    A model on the meta device becomes one into which a checkpoint of a quantised model can be loaded (``load_state_dict(..., assign=True)``).

    Args:
        model: the model.
        skip: names of modules to leave alone, in full or the last part.
        quant_type, compress_statistics, blocksize: as for ``Experts4bit``.

    Returns:
        The names of the modules whose experts are now in 4 bit.

    Raises:
        ValueError: matrices whose number of elements is not a multiple of 32.
        RuntimeError: experts whose values accelerate has put elsewhere.
    """
    recipe = {"quant_type": quant_type, "compress_statistics": compress_statistics, "blocksize": blocksize}
    skip, quantised = set(skip), []
    for name in [name for name, _ in model.named_modules()]:  # names only: what has been replaced is to be freed
        parent, _, last = name.rpartition(".")
        if name not in skip and last not in skip and _quantise(model, parent, last, recipe):
            quantised.append(name)
    return quantised


def _quantise(model: nn.Module, parent: str, name: str, recipe: dict) -> bool:
    """Quantises one module if it holds experts; whether it does."""
    holder = model.get_submodule(parent)
    module = holder.get_submodule(name)
    fused, stacks = bool(name) and _follows_interface(module), _other_stacks(module)
    if (fused or stacks) and hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        full_name = f"{parent}.{name}" if parent else name
        raise RuntimeError(f"the weights of {full_name!r} are offloaded; quantise the experts before the model is dispatched or offloaded")
    if fused:
        holder.add_module(name, FusedExperts4bit(module, **recipe))
        return True
    for stack in stacks:
        replace_parameter_4bit(module, stack, **recipe)
    return bool(stacks)


def _follows_interface(module: nn.Module) -> bool:
    """Whether a module has what transformers' ``use_experts_implementation`` gives to expert modules."""
    stack = module._parameters.get("down_proj")
    marks = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    return stack is not None and stack.dim() == 3 and all(hasattr(module, mark) for mark in marks)


def _other_stacks(module: nn.Module) -> list[str]:
    if "Experts" not in type(module).__name__ or isinstance(module, (Experts4bit, FusedExperts4bit)):
        return []
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]
