"""Modules that change their class in place, and back: same parameters, hooks, state dict and class name."""

from functools import cache

from torch import nn


class Swapped:
    """Mixin of every class that `swap` makes; what it does not define is the module's own."""

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        return _empty, type(self)._swapped_with, *reduced[2:]  # such a class has no place that pickle could import


@cache
def _swapped_class(mixin: type, original: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "_swapped_with": (mixin, original)})


def _empty(mixin: type, original: type) -> nn.Module:
    cls = _swapped_class(mixin, original)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type, **attributes) -> None:
    """Put the mixin before the module's class, whose methods it reaches with super()."""
    forward = module.__dict__.get("forward")  # found before the class's
    if (
        forward is not None
        and "_old_forward" not in module.__dict__
        and getattr(forward, "__self__", None) is not module
    ):
        raise ValueError(
            f"accelerate: the forward of a {type(module).__name__} has been replaced by {forward}; call accelerate "
            f"before what replaces it"
        )
    module.__class__ = _swapped_class(mixin, type(module))
    module.__dict__.update(attributes)
    _rebind(module)


def unswap(module: nn.Module, *attributes: str) -> None:
    module.__class__ = type(module)._swapped_with[1]
    for name in attributes:
        module.__dict__.pop(name, None)
    _rebind(module)


def _rebind(module: nn.Module) -> None:
    """Methods that an instance holds under the class's names are those of the class that it has now.

    PEFT's disable_adapter() leaves them behind; accelerate's hooks keep the forward that they wrap.
    """
    for name in ("forward", "generate", "prepare_inputs_for_generation"):
        if getattr(module.__dict__.get(name), "__self__", None) is module:
            del module.__dict__[name]
    if "_old_forward" in module.__dict__:
        module._old_forward = module.__class__.forward.__get__(module)
