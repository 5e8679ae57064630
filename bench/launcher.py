"""What one launch costs the host: `kernel[grid](...)` beside the package's `launch(kernel, grid, ...)`.

    python -m bench.launcher               # on a GPU: whole launches of one program, which the host outlasts
    python -m bench.launcher --json FILE   # without one: the Python above the driver, which is replaced by nothing

Arguments are those of real call sites. Without a GPU neither the driver's own time is in a number, nor the two (empty)
chains of hooks that Triton's C code calls for `kernel[grid]` alone. Times are ABBA-interleaved.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

from bench.harness import compare
from bench.offline import Launch, _glu_linear, _kv, _linear, _scale
from peft_ops._launch import launch

PLAIN, OURS = "kernel[grid]", "launch"
GRID = 1, 1


class NoLauncher(CudaLauncher):
    """Triton's launcher up to its C code, which does nothing."""

    def __init__(self, src, metadata):
        for name in ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"):
            setattr(self, name, getattr(metadata, name))
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, False, False
        self.arg_annotations = self.kernel_signature = None
        self.launch = lambda *args: None


class NoDriver:
    """A driver of sm_90 devices that are not there. Attributes may be set: device, stream, launcher_cls."""

    launcher_cls = NoLauncher
    utils = SimpleNamespace(
        load_binary=lambda *args: (None, 0, 0, 0, 1024),  # module, function, registers, spills, threads
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
    )

    def __init__(self, device: int = 0):
        self.device, self.stream = device, 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def active(stub: NoDriver) -> Iterator[NoDriver]:
    """Triton launches through this driver."""
    before = driver._active
    driver.set_active(stub)
    try:
        yield stub
    finally:
        driver.set_active(before)


def launches(capability: int) -> dict[str, Launch]:
    """Launches of one decoding step, in bf16 with ids."""
    bf16 = torch.bfloat16
    cases = {
        "ia3_scale 4x256": _scale(4, 256, bf16, torch.float32, True, None),
        "ia3_linear 4x256x256": _linear(4, 256, 256, bf16, "runs", None),
        "ia3_linear 16x256x256": _linear(16, 256, 256, bf16, "runs", None),
        "ia3_kv_linear 4x256+256x256": _kv(4, 256, 256, 256, bf16, "runs", bias=False),
        "ia3_glu_linear 16x256x256": _glu_linear(16, 256, 256, bf16, "runs", "silu", bias=False),
    }
    return {name: record(capability) for name, record in cases.items()}


def real(value, device: torch.device):
    """A recorded tensor on a device, of zeros: ids of task 0, counters at their start."""
    return torch.zeros_like(value, device=device) if isinstance(value, torch.Tensor) else value


def measure(device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds per launch of both, and their ratio with its 10th and 90th percentile, by call site."""
    capability = 90
    if device.type == "cuda":
        capability = 10 * torch.cuda.get_device_capability(device)[0] + torch.cuda.get_device_capability(device)[1]
    found = {}
    for name, (kernel, args, kwargs) in launches(capability).items():
        args = [real(a, device) for a in args]
        calls = {
            PLAIN: lambda _, k=kernel, a=args, kw=kwargs: k[GRID](*a, **kw),
            OURS: lambda _, k=kernel, a=args, kw=kwargs: launch(k, GRID, *a, **kw),
        }
        for call in calls.values():
            call(0)  # compiles, and is remembered
        ratios = compare(calls, PLAIN, 1, torch.device("cpu"), seconds)  # cpu: wall time, also of launches on a GPU
        r = ratios[OURS]
        found[name] = {
            PLAIN: ratios[PLAIN].seconds * 1e6, OURS: r.seconds * 1e6, "ratio": r.ratio, "low": r.low, "high": r.high,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to spend on each launch")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if gpu:
        what, found = torch.cuda.get_device_name(), measure(torch.device("cuda"), args.seconds)
    else:
        with active(NoDriver()):
            what, found = "no GPU: Python above the driver", measure(torch.device("cpu"), args.seconds)
    load = os.getloadavg()[0]
    print(f"{what}; triton {triton.__version__}, load {load:.1f}; us per launch")
    print(f"{'launch':30}{PLAIN:>14}{OURS:>9}  ratio")
    for name, row in found.items():
        print(f"{name:30}{row[PLAIN]:14.2f}{row[OURS]:9.2f}  {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})")
    if args.json:
        rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in found.items()}
        with open(args.json, "w") as f:
            head = {"device": what, "torch": torch.__version__, "triton": triton.__version__, "load": round(load, 2)}
            json.dump({**head, "us per launch": rounded}, f, indent=2)
            f.write("\n")


if __name__ == "__main__":
    main()
