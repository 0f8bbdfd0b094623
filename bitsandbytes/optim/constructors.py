"""How the many optimizer classes get their constructors: one function an algorithm, and what a class fixes of its arguments.

Also here: the arguments that constructors once had.
"""

from collections.abc import Callable
import functools
import inspect

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
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        bound.apply_defaults()
        for name in restricted:
            value, default = bound.arguments[name], signature.parameters[name].default
            if value != default and (name in only_default or value != fixed[name]):
                raise ValueError(f"{owner} does not support {name}={value!r}: leave it at {default!r}, or take the class that has this choice")
        function(**{**bound.arguments, **fixed})

    __init__.__signature__ = signature
    __init__.__doc__ = function.__doc__
    return __init__


def accepts_removed_arguments(init: Callable) -> Callable:
    """Lets subclasses written for older versions pass ``percentile_clipping`` and ``block_wise`` by position, in front of ``max_unorm``.

    Both are recognised by their types, an int of at least 1 and a bool, where now a float and a bool are: they must not silently become a limit
    on the update and skipped zeros. What they would have switched on is gone, so that only the values that switched nothing on are taken.
    """
    names = list(inspect.signature(init).parameters)
    place = names.index("max_unorm")

    @functools.wraps(init)
    def wrapper(*args, **kwargs):
        removed = args[place : place + 2]
        if removed == (100,) or (list(map(type, removed)) == [int, bool] and removed[0] >= 1):
            clipping, *rest = args[place:]
            block_wise, *rest = rest or (True,)
            if clipping != 100 or not block_wise:
                raise ValueError(
                    f"percentile_clipping={clipping} and block_wise={block_wise} no longer exist: 8-bit states are always block-wise, and gradients "
                    "are clipped by torch.nn.utils.clip_grad_norm_. To limit the norm of the update pass max_unorm by keyword."
                )
            args = (*args[:place], *rest)
        return init(*args, **kwargs)

    return wrapper
