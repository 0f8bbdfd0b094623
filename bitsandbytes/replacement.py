"""Replacing the linear layers of a model, and which of them to leave alone."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn


def modules_to_skip(model: nn.Module, skip: Iterable[str] | None = None) -> list[str]:
    """Names of the modules of a model that should keep their precision.

    These are the output head, whose error goes straight into the predictions; modules that share a parameter with another one (an output head
    tied to the input embedding), since a quantised weight cannot be the other's float weight as well; and those that the caller names. The
    caller's names come on top: naming one module does not give up the protection of the others.

    Args:
        model: a transformers model, which says itself what its output head is (``get_output_embeddings``), or any other module: then every
            module called "lm_head" is one, and without such the last child, if that is a linear layer.
        skip: further names, in full ("decoder.proj") or only the last part ("proj").

    Returns:
        The names as a list without repetition: heads and tied modules in full, then the caller's as they are.
    """
    return list(dict.fromkeys([*_output_heads(model), *_tied_modules(model), *(skip or ())]))


def _output_heads(model: nn.Module) -> list[str]:
    if callable(getattr(model, "get_output_embeddings", None)):
        head = model.get_output_embeddings()
        return [name for name, module in model.named_modules() if module is head]
    named = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    if named:
        return named
    last = list(model.named_children())[-1:]
    return [name for name, module in last if isinstance(module, nn.Linear)]


def _tied_modules(model: nn.Module) -> list[str]:
    """Modules that hold a parameter that another module holds too; a module that is merely used in two places is not tied."""
    owners = defaultdict(dict)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)][name] = module
    return [name for holders in owners.values() if len(holders) > 1 for name in holders]


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[..., nn.Module],
    skip_modules: Iterable[str] | None = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:  # fmt: skip
    """Replaces the linear layers below a module, in place.

    Args:
        model: its children, their children and so on are looked at, itself not.
        linear_replacement: called as ``linear_replacement(in_features, out_features, has_bias)``: a class such as ``nn.Linear4bit``, or a
            function.
        skip_modules: layers to keep, by full name or its last part; None: what ``modules_to_skip(model)`` says.
        copy_weights: give the new layers the parameters of the old. Where the new layer has a kind of parameter of its own (``Params4bit``,
            ``Int8Params``) the values become one, to be quantised when the layer moves to a device.
        post_processing_function: name of a method of the new layers that is called, with the layer as its argument, when it is in place.

    Returns:
        ``model``.

    Raises:
        ValueError: ``copy_weights`` from a layer whose weight is quantised already.
    """
    skipped = set(modules_to_skip(model) if skip_modules is None else skip_modules)
    replacements = {}  # a layer used in several places stays one layer
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            full_name = f"{path}.{name}" if path else name
            if not isinstance(child, nn.Linear) or name in skipped or full_name in skipped:
                continue
            made_before = child in replacements
            new = replacements[child] if made_before else _replacement(child, full_name, linear_replacement, copy_weights)
            parent._modules[name] = replacements[child] = new
            if post_processing_function is not None and not made_before:
                getattr(new, post_processing_function)(new)
    return model


def _replacement(old: nn.Linear, name: str, make: Callable[..., nn.Module], copy_weights: bool) -> nn.Module:
    arguments = (old.in_features, old.out_features, old.bias is not None)
    if not copy_weights:
        return make(*arguments).train(old.training)
    if not old.weight.is_floating_point() or tuple(old.weight.shape) != (old.out_features, old.in_features):
        found = f"{old.weight.dtype} {list(old.weight.shape)}"
        raise ValueError(f"cannot copy the weight of {name!r}: {found} is not a plain matrix; dequantise it first")
    with torch.device("meta"):  # random weights that are thrown away at once take longer than all the rest
        new = _with_parameters_of(old, make(*arguments))
    if not old.weight.is_meta and any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers())):
        new = _with_parameters_of(old, make(*arguments))  # it has further tensors, and those need their values
    return new.train(old.training)


def _with_parameters_of(old: nn.Linear, new: nn.Module) -> nn.Module:
    new.weight = _as_kind_of(new.weight, old.weight)
    new.bias = old.bias
    return new


def _as_kind_of(parameter: nn.Parameter, values: nn.Parameter) -> nn.Parameter:
    """``values`` as a parameter of the class and recipe of ``parameter``; where both are plain, ``values`` itself."""
    kind = type(parameter)
    if kind is type(values) is nn.Parameter:
        return values
    recipe = {} if kind is nn.Parameter else parameter.__dict__
    return kind(values.data, requires_grad=parameter.requires_grad, **recipe)
