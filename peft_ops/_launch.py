"""Launches of Triton kernels that skip what Triton would find out again: `launch(kernel, grid, ...)`.

`kernel[grid](...)` binds and specialises every argument, and prints all options into a string, on every launch: 8 to
14 us of Python for the kernels of a decoding step, where 3.5 to 4.7 do (Triton 3.7.1, one x86 core, no driver below;
`python -m bench.launcher`). Here the first launch of a kind goes Triton's way, and leaves the compiled kernel under a
key at least as fine as Triton's own; the next ones of that kind go straight to its launcher.
"""

from bisect import bisect
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

VERSIONS = ("3.6", "3.7")  # of Triton, whose jit.py and binder were read for what follows
KINDS = 4096  # per kernel and argument types; far more than tiles and classes of sizes make, so this is for a leak
PLAIN = (int, float, bool, str, type(None))  # what a keyword may be: never a tensor, which the key would keep alive
RANGES = (-(2**63), -(2**31), 2**31, 2**63, 2**64)  # where an integer's type changes: i64, i32, i64, u64


class _Kind(NamedTuple):
    """A kernel as compiled for one kind of arguments, and what its launcher takes besides them."""

    compiled: object
    run: Callable
    function: object
    metadata: object
    constants: tuple  # values of the constexpr parameters, which stand behind the others
    globals: tuple[tuple[dict, str, object], ...]  # (scope, name, value) that the kernel was compiled with


class _Site(NamedTuple):
    """All launches of one kernel with one tuple of argument types."""

    kernel: object  # alive as long as the site, so that no other takes its id
    classify: Callable[..., tuple]
    kinds: dict[tuple, _Kind]


_sites: dict[tuple[int, tuple[type, ...]], _Site | None] = {}


@cache
def _triton() -> SimpleNamespace | None:
    """What of Triton a direct launch uses; None where it is another version, or does not look like these."""
    try:
        import triton
        from triton import knobs
        from triton.compiler import CompiledKernel
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError:
        return None
    if not triton.__version__.startswith(VERSIONS):
        return None
    needs = {
        JITFunction: ("run",),
        CompiledKernel: ("run", "launch_metadata"),
        knobs.runtime: ("debug", "launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook"),
        knobs.compilation: ("instrumentation_mode",),
        knobs.HookChain(): ("calls",),
        type(driver): ("active",),
    }
    if not all(hasattr(owner, name) for owner, names in needs.items() for name in names):
        return None
    return SimpleNamespace(
        JITFunction=JITFunction, CompiledKernel=CompiledKernel, HookChain=knobs.HookChain,
        driver=driver, runtime=knobs.runtime, compilation=knobs.compilation,
    )  # fmt: skip


def _is_watched(triton: SimpleNamespace, kernel) -> bool:
    """Whether somebody wants to see this launch, or changes how its kernel is compiled: that is Triton's own to do."""
    runtime = triton.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and (type(hook) is not triton.HookChain or hook.calls):
            return True
    return bool(
        kernel.pre_run_hooks
        or kernel.debug
        or runtime.debug
        or triton.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook
    )


def _ranges(*ints: int) -> tuple[int, ...]:
    return tuple(bisect(RANGES, i) for i in ints)


def _aligned(*tensors: Tensor) -> tuple[bool, ...]:
    return tuple(t.data_ptr() % 16 == 0 for t in tensors)


def _classifier(types: tuple[type, ...]) -> Callable[..., tuple] | None:
    """A function of the arguments to what Triton specialises on: dtype and 16-byte alignment of a tensor; of an
    integer whether it is 1, a multiple of 16, and its type. None if there is an argument of a type not known here.

    Written out as one expression, as Triton's binder is: 1.6 us for nineteen arguments, where loops take 3.3.
    """
    tensors = [f"a{i}" for i, kind in enumerate(types) if kind in (Tensor, torch.nn.Parameter)]
    ints = [f"a{i}" for i, kind in enumerate(types) if kind is int]
    if len(tensors) + len(ints) + sum(kind in (float, bool, type(None)) for kind in types) < len(types):
        return None  # of floats, bools and None the type says it all
    parts = [f"{t}.dtype" for t in tensors] + [f"-1 if {i} == 1 else {i} & 15 == 0" for i in ints]
    if tensors:  # nearly always all are aligned
        pointers = " | ".join(f"{t}.data_ptr()" for t in tensors)
        parts.append(f"({pointers}) & 15 == 0 or _aligned({', '.join(tensors)})")
    if ints:  # nearly always all are 32-bit
        small = " and ".join(f"{RANGES[1]} <= {i} < {RANGES[2]}" for i in ints)
        parts.append(f"{small} or _ranges({', '.join(ints)})")
    arguments = ", ".join(f"a{i}" for i in range(len(types)))
    return eval(f"lambda {arguments}: ({', '.join(parts)},)" if parts else f"lambda {arguments}: ()", globals())


def _site(kernel, types: tuple[type, ...]) -> _Site | None:
    """None if the arguments by position are not exactly the parameters before the constexpr ones."""
    split = [p.is_constexpr for p in kernel.params] == [i >= len(types) for i in range(len(kernel.params))]
    classify = _classifier(types) if split else None
    return None if classify is None else _Site(kernel, classify, {})


def _kind(triton: SimpleNamespace, kernel, compiled, count: int, kwargs: dict) -> _Kind | None:
    """A launch to be repeated, unless its compiled kernel or its keywords are not what this module knows."""
    if type(compiled) is not triton.CompiledKernel or compiled.metadata.target.backend != "cuda":
        return None
    if not all(type(value) in PLAIN for value in kwargs.values()):
        return None
    constants = tuple(kwargs.get(p.name, p.default) for p in kernel.params[count:])
    used = tuple((scope, name, scope.get(name)) for (name, _), (_, scope) in kernel.used_global_vals.items())
    return _Kind(compiled, compiled.run, compiled.function, compiled.packed_metadata, constants, used)


def launch(kernel, grid: tuple[int, ...], /, *args, **kwargs):
    """kernel[grid](*args, **kwargs), with two fifths of its Python for a kind of arguments seen before.

    Args:
        kernel: what triton.jit returns; anything else, the interpreter's kernels say, is launched as it is.
        args: tensors, numbers, None: the parameters before the first constexpr one.
        kwargs: constexpr parameters and options of the compiler.

    Whatever else is passed, a hook, TRITON_DEBUG or another version of Triton has the launch done by Triton.
    """
    triton = _triton()
    if triton is None or type(kernel) is not triton.JITFunction or type(grid) is not tuple:
        return kernel[grid](*args, **kwargs)
    types = tuple(map(type, args))
    place = id(kernel), types
    site = _sites.get(place, place)  # None is an answer too
    if site is place:
        site = _sites[place] = _site(kernel, types)
    if site is None or _is_watched(triton, kernel):
        return kernel[grid](*args, **kwargs)
    driver = triton.driver.active
    device = driver.get_current_device()
    key = device, site.classify(*args), tuple(kwargs), tuple(kwargs.values())
    try:
        kind = site.kinds.get(key)
    except TypeError:  # a keyword that has no hash
        return kernel[grid](*args, **kwargs)
    if kind is None:
        compiled = kernel[grid](*args, **kwargs)
        kind = _kind(triton, kernel, compiled, len(args), kwargs)
        if kind is not None:
            if len(site.kinds) >= KINDS:
                site.kinds.clear()
            site.kinds[key] = kind
        return compiled
    for scope, name, value in kind.globals:
        if scope.get(name) is not value:  # Triton compares the values, and says so
            return kernel[grid](*args, **kwargs)
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    kind.run(x, y, z, stream, kind.function, kind.metadata, None, None, None, *args, *kind.constants)
    return kind.compiled
