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
    module.__class__ = _swapped_class(mixin, type(module))
    module.__dict__.update(attributes)


def unswap(module: nn.Module, *attributes: str) -> None:
    module.__class__ = type(module)._swapped_with[1]
    for name in attributes:
        module.__dict__.pop(name, None)
