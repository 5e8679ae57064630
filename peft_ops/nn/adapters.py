"""What modules with adapters share: the names they know, and checks of what they are given."""

from collections.abc import Container, Iterable, Mapping
from difflib import get_close_matches

from torch import Tensor, nn

_RESERVED = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}  # torch keeps parameters and attributes in one namespace


class AdapterModule(nn.Module):
    """A module that holds adapters by name. Rows of an adapter that it does not hold are the base model's there."""

    @property
    def adapters(self) -> Iterable[str]:
        """The names, in the order of their addition."""
        raise NotImplementedError


def writes(t: Tensor) -> int | None:
    """How often torch has written to t, which inference tensors do not count."""
    return None if t.is_inference() else t._version


def stamp(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int, int | None]]:
    """What a snapshot of these tensors is true for: themselves, so that no address is used again, where they lie, and
    how often they were written. Fused optimizers and writes through `.data` leave no trace in it."""
    return [(t, t.data_ptr(), writes(t)) for t in tensors]


def same_stamp(before: list[tuple], now: list[tuple]) -> bool:
    return len(before) == len(now) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, now, strict=True))


def check_adapters(model: nn.Module, names: Iterable[str | None]) -> None:
    """Notice names that no module of the model knows: each module alone would serve them as the base model.

    An adapter may be absent from one module and present in another; it has to be in one at least. Call it once per
    model and set of names, before serving, or pass the model to `tasks(rows, model=model)`, which calls it each time.

    Args:
        model: any module; the (IA)^3 and prompt modules inside it, however deep, are asked.
        names: adapter names, or a TaskBatch; None, the base model, is always known.

    Raises:
        ValueError: naming the first unknown adapter, and those that exist.
    """
    check_type("check_adapters", "model", model, nn.Module, "an nn.Module")
    names = check_names("check_adapters", "names", getattr(names, "names", names))
    found = (module.adapters for module in model.modules() if isinstance(module, AdapterModule))
    known = dict.fromkeys(name for adapters in found for name in adapters)
    unknown = next((name for name in names if name is not None and name not in known), None)
    if unknown is not None:
        some = ", ".join(map(repr, [*known][:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise ValueError(f"check_adapters: names must be adapters of the model, [{some}], got {unknown!r}")


def check_type(op: str, arg: str, value, types: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{op}: {arg} must be {what}, got {type(value).__name__}")


def check_size(op: str, arg: str, value, least: int = 1) -> None:
    check_type(op, arg, value, int, "an int")
    if value < least:
        raise ValueError(f"{op}: {arg} must be at least {least}, got {value}")


def check_new_name(op: str, name, taken: Container[str]) -> None:
    """A name that torch can keep a parameter or a module under, and that no adapter has."""
    if not isinstance(name, str):
        raise TypeError(f"{op}: adapter must be a name, got {type(name).__name__}")
    if name in taken:
        raise ValueError(f"{op}: adapter must have a new name, got {name!r}")
    if not name or "." in name or name in _RESERVED:
        raise ValueError(f"{op}: adapter must not be named as an attribute of a module, or with a dot, got {name!r}")


def check_known_name(op: str, name, known: Iterable[str]) -> None:
    known = list(known)
    if not isinstance(name, str):
        raise TypeError(f"{op}: adapter must be a name, got {type(name).__name__}")
    if name not in known:
        raise ValueError(f"{op}: adapter must be one of {known}, got {name!r}")


def check_names(op: str, arg: str, names) -> tuple[str | None, ...]:
    """Names as a tuple; one str is a mistake, not a sequence of its letters."""
    if isinstance(names, (str, bytes, Mapping)) or not isinstance(names, Iterable):
        raise TypeError(f"{op}: {arg} must be a sequence of adapter names, got {type(names).__name__}")
    names = tuple(names)
    wrong = next((name for name in names if not isinstance(name, (str, type(None)))), None)
    if wrong is not None:
        raise TypeError(f"{op}: {arg} must hold adapter names or None, got {type(wrong).__name__}")
    return names


def similar(name, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: known ones that look like it."""
    near = get_close_matches(name, known) if isinstance(name, str) else []
    return f"; similar: {', '.join(map(repr, near))}" if near else ""
