"""A pytest plugin for PEFT's own tests: our operators in every (IA)^3 layer that they build, and a tally of what ran.

`--mode plain` leaves PEFT as it is. "module" and "auto" accelerate every model at that level; "names" does as "auto"
and gives every call that has one active adapter its name for each row, so that the tests run as mixed batches do.
"""

import functools
import importlib.util
import inspect
import json
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import torch
from peft.tuners import ia3

from peft_ops.integrations import _fused, _layers
from peft_ops.integrations import peft as ours
from peft_ops.integrations._calls import Shared
from tests.conformance import BREAKS, MODES

TUNERS = {"IA3", *ours.KINDS}
STUBS = {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline"}  # imported by test files, called by none


def pytest_addoption(parser):
    group = parser.getgroup("conformance")
    group.addoption("--mode", choices=MODES, default="plain")
    group.addoption("--break", dest="broken", choices=BREAKS)
    group.addoption("--tally", type=Path, required=True)


def pytest_configure(config):
    for package, name in STUBS.items():
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__spec__ = ModuleSpec(package, None)
            setattr(sys.modules[package], name, type(name, (), {}))
    tally = Tally(config.option.tally)
    config.pluginmanager.register(tally)
    ours._checked_peft()  # it calls a PEFT layer, which the tally would count
    ia3.Linear.forward = counting_peft(ia3.Linear.forward, tally.calls)
    for module in (_layers, _fused):
        for name, operator in [*vars(module).items()]:
            if getattr(operator, "__module__", "").startswith("peft_ops.ops."):
                setattr(module, name, counting(operator, tally.calls, config.option.broken))
    if config.option.mode != "plain":
        switch_on("module" if config.option.mode == "module" else "auto")
    if config.option.mode == "names":
        for method in ("forward", "generate"):
            setattr(ours.MixedModel, method, naming(getattr(ours.MixedModel, method), tally.calls))


class Tally:
    """Writes the file that `Run.read` reads."""

    def __init__(self, path: Path):
        self.path, self.outcomes, self.messages = path, {}, {}
        self.calls = Counter(trained=0, PEFT=0, named=0)

    def pytest_runtest_setup(self):
        torch.manual_seed(0)  # not every test does, and all runs are to see the same numbers

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        if report.failed:
            self.messages[report.nodeid] = report.longreprtext

    def pytest_sessionfinish(self):
        found = {"outcomes": self.outcomes, "messages": self.messages, "calls": self.calls}
        self.path.write_text(json.dumps(found))


def counting(operator, calls: Counter, broken: str | None):
    """The operator, counted; or wrong in one way, to show that PEFT's tests see it."""
    signature = inspect.signature(operator)

    @functools.wraps(operator)
    def run(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        vectors = [name for name in bound.arguments if name.endswith("ia3_l")]
        trained = sum(torch.is_grad_enabled() and bound.arguments[name].requires_grad for name in vectors)

        def count():
            calls[operator.__name__] += len(vectors)
            calls["trained"] += trained

        for name in vectors:
            bound.arguments[name] = bound.arguments[name] if broken is None else BREAKS[broken](bound.arguments[name])
        out = operator(*bound.args, **bound.kwargs)
        if not callable(out):
            count()
            return out
        return lambda *tensors: (count(), out(*tensors))[1]  # a step that is prepared once, and counts when it runs

    return run


def counting_peft(forward, calls: Counter):
    """PEFT's own forward, counted where it multiplies."""

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        multiplies = not (self.disable_adapters or self.merged)
        calls["PEFT"] += multiplies and not self.ia3_l.keys().isdisjoint(self.active_adapters)
        return forward(self, *args, **kwargs)

    return run


def switch_on(level: str) -> None:
    """Accelerate every model right after PEFT has built it, and every model that it put layers into without its own."""
    built, injected = peft.PeftModel.__init__, peft.inject_adapter_in_model

    @functools.wraps(built)
    def init(self, *args, **kwargs):
        built(self, *args, **kwargs)
        if {config.peft_type for config in self.peft_config.values()} <= TUNERS:
            ours.accelerate(self, level=level)

    @functools.wraps(injected)
    def inject(config, model, *args, **kwargs):
        model = injected(config, model, *args, **kwargs)
        if config.peft_type in TUNERS:
            shared = Shared(level)
            ours._swap_layers(SimpleNamespace(_peft_ops=shared, get_base_model=lambda: model, peft_config={}))
        return model

    peft.PeftModel.__init__ = init
    peft.inject_adapter_in_model = peft.mapping.inject_adapter_in_model = inject


def naming(method, calls: Counter):
    """A model's forward or generate, with the active adapter's name for every row."""

    @functools.wraps(method)
    def run(self, *args, adapter_names=None, **kwargs):
        rows = next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim()), 0)
        layers = [module for module in self.modules() if isinstance(module, _layers.MixedLayer)]
        if any(isinstance(layer, _layers.MixedConv) for layer in layers):
            rows = 2  # PEFT's convolution models make two images of nine rows
        active = {None if layer.disable_adapters or layer.merged else (*layer.active_adapters,) for layer in layers}
        names = active.pop() if len(active) == 1 else None
        if adapter_names is None and rows and names is not None and len(names) == 1:
            adapter_names = [*names] * rows
            calls["named"] += 1
        return method(self, *args, adapter_names=adapter_names, **kwargs)

    return run
