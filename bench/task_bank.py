"""TaskBank on a CPU with many tasks of Llama-3-8B's size: memory, time per swap, hits under Zipf loads.

    python -m bench.task_bank               # 1, 100 and 10,000 tasks in bf16; at most 7 GB of memory, about 4 minutes
    python -m bench.task_bank --json FILE   # written as it comes; --resume goes on where it stopped
    python -m bench.task_bank --quick       # a small layer, few tasks: walks the whole path

Each layer has k and v (1024 features) and the input of down_proj (14336): 524,288 numbers a task, 1.05 MB in bf16.
Up to 100 tasks are put; of 10,000 a loader makes each when it is asked for, and 2,048 keep a host copy: they would not
fit all. One thread: two wait for each other where other processes use the cores. Hits are counted in batches of 8 rows
whose tasks are drawn by Zipf's law, after as many batches to warm up.
What a million tasks take is computed from these, not measured, and says so.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.harness import Pieces
from peft_ops.integrations.folder_bank import loader_from_folder
from peft_ops.integrations.folders import ia3_adapter, write_adapter
from peft_ops.nn import TaskBank

LAYERS, K, DOWN = 32, 1024, 14336
EXPONENTS, SLOTS = (0.8, 1.0, 1.2), (32, 256, 1024)
TASKS, HOST_CAPACITY, BATCH = 10_000, 2048, 8


def widths(layers: int = LAYERS) -> dict[str, int]:
    names = {"self_attn.k_proj": K, "self_attn.v_proj": K, "mlp.down_proj": DOWN}
    return {f"model.layers.{i}.{name}": width for i in range(layers) for name, width in names.items()}


def generated(sizes: dict[str, int]) -> Callable[[str], tuple[dict[str, Tensor], None]]:
    """A loader of tasks "0", "1", ...: windows of one pool of numbers, cheap to make and different for each task."""
    total = sum(sizes.values())
    pool = (1 + torch.randn(total + TASKS) / 2).to(torch.bfloat16)

    def load(name: str) -> tuple[dict[str, Tensor], None]:
        row = pool[int(name) : int(name) + total]
        return dict(zip(sizes, row.split([*sizes.values()]), strict=True)), None

    return load


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def milliseconds(call: Callable[[int], object], count: int, device: str) -> float:
    """Median of calls of 0, 1, ..., count - 1, until their work is done."""
    times = []
    for i in range(count):
        start = time.perf_counter()
        call(i)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(median(times) * 1e3, 4)


def used(bank: TaskBank, *names: str) -> None:
    with bank.use(names):
        pass


def swaps(sizes: dict[str, int], count: int, device: str = "cpu") -> dict[str, float]:
    """Milliseconds of a batch of one task: already there, copied from the host, from a loader, from a file."""
    load, row = generated(sizes), torch.ones(sum(sizes.values()), dtype=torch.bfloat16, device=device)
    names = [str(i) for i in range(16)]
    bank = TaskBank(1, sizes, torch.bfloat16, device)
    for name in names:
        bank.put(name, *load(name))
    buffer = torch.empty(16, len(row), dtype=torch.bfloat16, pin_memory=device == "cuda")
    found = {
        "hit": milliseconds(lambda i: used(bank, "0"), count, device),
        "swap from the host": milliseconds(lambda i: used(bank, names[i % 16]), count, device),
        "copy of the row alone": milliseconds(lambda i: row.copy_(buffer[i % 16]), count, device),
    }
    lazy = TaskBank(1, sizes, torch.bfloat16, device, loader=load, host_capacity=0)
    found["swap from a loader that has the vectors"] = milliseconds(lambda i: used(lazy, names[i % 16]), count, device)
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            vectors = load(name)[0]
            write_adapter(Path(root, name), ia3_adapter(vectors, [m for m in vectors if m.endswith("down_proj")]))
        size = sum(path.stat().st_size for path in Path(root).glob("*/*"))
        files = TaskBank(1, sizes, torch.bfloat16, device, loader=loader_from_folder(root), host_capacity=0)
        found["swap from a PEFT folder, its file cached"] = milliseconds(
            lambda i: used(files, names[i % 16]), count // 4, device
        )
    return found | {"bytes of a PEFT folder": size // 16}


def memory(
    sizes: dict[str, int], tasks: int, slots: int, capacity: int | None = None, device: str = "cpu"
) -> dict[str, int | str]:
    """Bytes that a bank holds with so many tasks seen once, and that the process grew by."""
    torch.set_num_threads(1)
    load = generated(sizes)
    load("0")
    before = resident()
    bank = TaskBank(slots, sizes, torch.bfloat16, device, loader=load, host_capacity=capacity)
    for i in range(tasks):
        if capacity is None:
            bank.put(str(i), *load(str(i)))
        used(bank, str(i))
    stats = bank.stats
    return {
        "tasks": tasks,
        "slots": slots,
        "host copies": "all" if capacity is None else capacity,
        "device bytes": stats.device_bytes,
        "host bytes": stats.host_bytes,
        "process grew by": resident() - before,
    }


def memories(sizes: dict[str, int], *cases: tuple) -> list[dict[str, int | str]]:
    """Each in a process of its own, whose heap has no room left over from another."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(memory, [(sizes, *case) for case in cases], chunksize=1)


def zipf(exponent: float, tasks: int, batches: int) -> list[list[str]]:
    """Batches of names: task i is drawn with probability 1 / (i + 1) ** exponent, up to a factor."""
    weights = torch.arange(1, tasks + 1, dtype=torch.float64) ** -exponent
    draws = torch.rand(batches, BATCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.searchsorted(weights.cumsum(0) / weights.sum(), draws).clamp(max=tasks - 1).tolist()
    return [[*map(str, row)] for row in rows]


def hits(
    sizes: dict[str, int], exponent: float, slots: int, tasks: int, batches: int, capacity: int, device: str = "cpu"
) -> dict:
    """Share of a batch's tasks that were on the device, and of those that were not, in host memory."""
    bank = TaskBank(slots, sizes, torch.bfloat16, device, loader=generated(sizes), host_capacity=capacity)
    load = zipf(exponent, tasks, 2 * batches)
    for rows in load[:batches]:
        used(bank, *rows)
    warm = bank.stats
    for rows in load[batches:]:
        used(bank, *rows)
    end = bank.stats
    hit, miss, loads = end.hits - warm.hits, end.misses - warm.misses, end.loads - warm.loads
    return {
        "exponent": exponent,
        "slots": slots,
        "on the device": round(hit / (hit + miss), 4),
        "else in host memory": round(1 - loads / miss, 4) if miss else None,
    }


def million(sizes: dict[str, int], swap: dict[str, float]) -> dict[str, float | str]:
    row = 2 * sum(sizes.values())
    return {
        "note": "computed from the sizes and times above, not measured",
        "host memory of all, GB": round(row * 1e6 / 1e9),
        "disk, GB": round(swap["bytes of a PEFT folder"] * 1e6 / 1e9),
        "host memory of 20,000 copies, GB": round(row * 2e4 / 1e9),
        "device memory of 1,024 slots, GB": round(row * 1026 / 1e9, 2),
        "reading every folder once, minutes": round(swap["swap from a PEFT folder, its file cached"] * 1e6 / 6e4),
    }


def measure(found: Pieces, layers: int, tasks: int, capacity: int, batches: int, device: str) -> None:
    sizes = widths(layers)
    found.add("ms per batch of one task", lambda: swaps(sizes, 4 * batches // 10, device))
    cases = (1, 1, None, device), (min(tasks, 100), 32, None, device), (tasks, 256, capacity, device)
    found.add("memory", lambda: memories(sizes, *cases))
    draws = [(exponent, slots) for exponent in EXPONENTS for slots in SLOTS]
    found.add("zipf", lambda: [hits(sizes, *draw, tasks, batches, capacity, device) for draw in draws])
    if "ms per batch of one task" in found:
        found.add("1,000,000 tasks", lambda: million(sizes, found["ms per batch of one task"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--resume", action="store_true", help="leave out what the file already holds")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, after which nothing is begun")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (1, 20, 10, 20) if args.quick else (LAYERS, TASKS, HOST_CAPACITY, 1000)
    place = {"cpu": cpu(), "device": args.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    place["numbers per task"] = sum(widths(sizes[0]).values())
    found = Pieces(args.json, place, args.resume, args.budget)
    measure(found, *sizes, args.device)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
