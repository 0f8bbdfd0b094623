"""How the many optimizer classes get their constructors: one function an algorithm, and what a class fixes of its arguments.

Also here: the arguments that constructors once had.
"""

from ast import literal_eval
from collections.abc import Callable
import functools
import inspect

from .algorithms import require_numbers

# Keyword arguments of every optimizer, in addition to those of its constructor function.
_COMMON = {"skip_zeros": False, "maximize": False, "stochastic_rounding": False, "seed": 0}


def constructor(function: Callable, hide: tuple[str, ...] = (), defaults: dict | None = None, only_default: tuple[str, ...] = (), **fixed):
    """The ``__init__`` of one class of an algorithm.

    Args:
        function: ``(self, params, ..., **options)``: what all classes of the algorithm do to construct.
        hide: arguments that this class does not have.
        defaults: default values that differ from the function's.
        only_default: arguments that this class has, and that may not differ from their defaults.
        fixed: what arguments are in this class whatever the caller says. A caller may say the same, or leave them at their defaults.

    Returns:
        A function whose signature is that of the class: without ``hide``, and with the common options as keyword arguments.
    """
    given = inspect.signature(function)
    visible = [
        parameter.replace(default=(defaults or {}).get(name, parameter.default))
        for name, parameter in given.parameters.items()
        if name not in hide and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    visible += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in _COMMON.items()]
    signature = given.replace(parameters=visible)
    restricted = [name for name in signature.parameters if name in fixed or name in only_default]

    def __init__(*args, **kwargs):
        owner = type(args[0]).__name__
        try:
            bound = signature.bind(*without_removed_arguments(args, signature), **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if isinstance(value, str) and name != "betas":
                bound.arguments[name] = _spelled_out(owner, name, value, signature.parameters[name].default)
        require_numbers({name: value for name, value in bound.arguments.items() if name != "betas"})  # those may be a string
        for name in restricted:
            value, default = bound.arguments[name], signature.parameters[name].default
            if value != default and (name in only_default or value != fixed[name]):
                raise ValueError(f"{owner} does not support {name}={value!r}: leave it at {default!r}, or take the class that has this choice")
        function(**{**bound.arguments, **fixed})

    __init__.__signature__ = signature
    __init__.__doc__ = function.__doc__
    return __init__


def _spelled_out(owner: str, name: str, value: str, default) -> float | int | bool:
    """What a string says: the Trainer of transformers passes the numbers and switches of its ``optim_args`` on as it reads them.

    Raises:
        TypeError: neither a number, nor True or False for a switch.
    """
    try:
        meant = literal_eval(value)
    except (ValueError, SyntaxError):
        meant = None
    if not isinstance(meant, (int, float)) or isinstance(meant, bool) != isinstance(default, bool):
        raise TypeError(f"{owner}: {name} must be {'True or False' if isinstance(default, bool) else 'a number'}, got the string {value!r}")
    return meant


def without_removed_arguments(args: tuple, signature: inspect.Signature) -> tuple:
    """The positional arguments of a constructor, without ``percentile_clipping`` and ``block_wise``.

    Older versions had these two after ``min_8bit_size``, where now a limit on the update, skipped zeros or paging are, and subclasses still pass
    them. They are recognised by their types, an int of at least 1 and a bool. What they would have switched on is gone, so that only the values
    that switched nothing on are taken.

    Raises:
        ValueError: they ask for percentile clipping, or for 8-bit states without blocks.
    """
    place = list(signature.parameters).index("min_8bit_size") + 1
    removed = args[place : place + 2]
    if removed != (100,) and not (list(map(type, removed)) == [int, bool] and removed[0] >= 1):
        return args
    clipping, block_wise = (*removed, True)[:2]
    if clipping != 100 or not block_wise:
        raise ValueError(
            f"percentile_clipping={clipping} and block_wise={block_wise} no longer exist: 8-bit states are always block-wise, and gradients "
            "are clipped by torch.nn.utils.clip_grad_norm_. To limit the norm of the update pass max_unorm by keyword."
        )
    return args[:place] + args[place + 2 :]


def accepts_removed_arguments(init: Callable) -> Callable:
    """Lets subclasses that were written for older versions call the constructor, see ``without_removed_arguments``."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(*args, **kwargs):
        return init(*without_removed_arguments(args, signature), **kwargs)

    return wrapper
