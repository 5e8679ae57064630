"""What was measured, as tables and pictures.

    python -m bench.report [FILE] [--out DIR]   # a saved run of the suite (the newest), JSON lines of bench.matrix, or
                                                # all that bench/gpu.sh left in a folder, into bench/results/cpu or a
                                                # folder named after the GPU
    python -m bench.report --compare            # the last two saved runs; fails where a median is over 15 % slower
    python -m bench.report --pages              # the tables of README.md and docs/performance.md, from bench/results

Ratios are to the bare layer, paired: median, 10th and 90th percentile. Nothing is printed that was not measured: a
shape of the suite that has no time says why, "wrong", "failed" or "Not measured yet".
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.harness import BASELINE_AGAIN
from bench.matrix import PEERS
from bench.native_cpu import TARGETS, verdict
from bench.plots import PLOTS, is_case, save
from bench.tune import TASKS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, STORAGE, PAGES = ROOT / "bench/results", ROOT / ".benchmarks", ("README.md", "docs/performance.md")
NOT_MEASURED = "Not measured yet."
GATE = 1.15  # of a median over the one before
OURS = "peft_ops", "native"  # peers that a change of this project can make slower
TAKEN = "drop_in.json", "task_bank.json", "launcher.json"  # of a folder of bench/gpu.sh, what pages have tables of


def saved_runs(storage: Path = STORAGE) -> list[Path]:
    """Saved runs of the suite, oldest first: pytest-benchmark numbers them."""
    return sorted(storage.rglob("[0-9][0-9][0-9][0-9]_*.json"), key=lambda path: path.name)


def read(path: Path) -> list[dict]:
    """Rows of bench.matrix, from its own JSON lines, a saved run of the suite, or a folder of bench/gpu.sh.

    A row without "us" is of a shape that has no time: it was wrong, or failed.
    """
    if path.is_dir():
        known = {}
        for name in ("matrix", "compile"):  # measured with torch.compile too, a shape has all its peers from that run
            file = path / f"{name}.jsonl"
            for row in read(file) if file.exists() else []:
                key = tuple(row[key] for key in ("layer", "phase", "rows", "tasks"))
                known[key] = row if "us" in row else known.get(key, row)
        return [*known.values()]
    if path.suffix == ".jsonl":
        return [*map(json.loads, path.read_text().splitlines())]
    run, rows = json.loads(path.read_text()), {}
    for one in run["benchmarks"]:
        facts = dict(one["extra_info"])
        peer, ratio, noise = (facts.pop(key) for key in ("peer", "ratio", "noise"))
        row = rows.setdefault(one["group"], facts | {"us": {}, "ratio": {BASELINE_AGAIN: noise}})
        row["us"][peer], row["ratio"][peer] = round(one["stats"]["median"] * 1e6, 3), ratio
    return [row | run["machine_info"]["environment"] for row in rows.values()]


def timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "us" in row]


def load(path: Path) -> list[dict]:
    """The rows that have times."""
    return timed(read(path))


def folder_of(kind: str, device: str) -> str:
    """Where results of a device are kept: a GPU has a folder of its own, bench/results/nvidia-h200."""
    return "cpu" if kind == "cpu" else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def gpu_folders(results: Path) -> list[Path]:
    return sorted(path for path in results.iterdir() if path.is_dir() and path.name != "cpu")


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def place(rows: list[dict]) -> str:
    """Where rows were measured, once for each place, and how long the suite took if it says so."""
    said = dict.fromkeys(
        f"{r['device']}, {r['threads']} threads, PyTorch {r['torch']}, commit {r['commit']}"
        + (f"; the suite took {r['suite_seconds']:,.0f} s" if "suite_seconds" in r else "")
        for r in rows
    )
    return "; ".join(said)


def reason(row: dict) -> str:
    """Why a row has no time."""
    return "wrong" if row.get("wrong") else "failed"


def ratio_table(rows: list[dict], of: str = "") -> str:
    """Every shape: the bare layer's time, each peer's ratio to it, and what the bare layer gives against itself."""

    known = [peer for peer in PEERS[1:] if any(peer in row["ratio"] for row in timed(rows))]

    def cells(row: dict) -> list[str]:
        shape = [row["layer"], row["phase"], str(row["rows"]), str(row["tasks"])]
        if f"{of}us" not in row:
            return [*shape, NOT_MEASURED.rstrip(".") if "us" in row else reason(row), *[""] * len(known), ""]
        us, ratio = row[f"{of}us"], row[f"{of}ratio"]
        named = [f"{ratio[peer][0]:.2f}" if peer in ratio else "" for peer in known]
        noise = "{1:.2f}-{2:.2f}".format(*ratio[BASELINE_AGAIN])
        return [*shape, f"{us['bare']:.1f}", *named, noise]

    header = "layer", "phase", "rows", "tasks", "bare, us", *known, "noise"
    return markdown(header, map(cells, rows))


def summary_table(rows: list[dict], of: str = "") -> str:
    """One line per layer, one column per row count: our ratio, PEFT's arithmetic in brackets.

    Other numbers of tasks, and a row count that the suite has for them alone, have a picture of their own. An empty
    cell is no shape of the suite: a prompt stands before a text, and has no decode.
    """
    rows = [row for row in rows if row["tasks"] == TASKS]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    columns = sorted({(row["phase"], row["rows"]) for row in rows})
    kind = rows[0]["kind"] if rows else "cpu"

    def alone(column: tuple[str, int]) -> bool:
        return len(layers) > 1 and sum(is_case(kind, layer, *column) for layer in layers) == 1

    columns = [column for column in columns if not alone(column)]
    found = {}
    for row in rows:
        if f"{of}us" in row:
            ours, eager = (row[f"{of}ratio"][peer][0] for peer in ("peft_ops", "eager"))
            said = f"{ours:.2f} ({eager:.2f})"
        else:
            said = NOT_MEASURED.rstrip(".") if "us" in row else reason(row)
        found[row["layer"], row["phase"], row["rows"]] = said

    def cell(layer: str, column: tuple[str, int]) -> str:
        missing = NOT_MEASURED.rstrip(".") if is_case(kind, layer, *column) else ""
        return found.get((layer, *column), missing)

    lines = [[layer, *(cell(layer, column) for column in columns)] for layer in layers]
    return markdown(["time / bare layer", *(f"{phase}, {count} rows" for phase, count in columns)], lines)


def kernel_and_wall(rows: list[dict], table: Callable[[list[dict], str], str]) -> str:
    """The table, and where there is a GPU's wall time too, a second one."""
    if not any("wall_us" in row for row in rows):
        return table(rows, "")
    kernels, wall = table(rows, ""), table(rows, "wall_")
    return f"Kernels' time:\n\n{kernels}\n\nWhat a caller waits for, launches and synchronisation included:\n\n{wall}"


def write(rows: list[dict], out: Path) -> list[Path]:
    """operators.jsonl, operators.md, and each picture as SVG and PNG. Rows without a time stay in the first two."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "operators.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "operators.md").write_text(f"{place(rows)}.\n\n{kernel_and_wall(rows, ratio_table)}\n")
    for name, draw in PLOTS.items():
        if drawn := draw(timed(rows)):
            save(drawn, out / name)
    return sorted(out.iterdir())


def slower(before: Path, after: Path, gate: float = GATE) -> tuple[list[str], int]:
    """Lines about our benchmarks that got slower by over `gate`, and how many both runs hold.

    Both in their median and over the bare layer, beside which they were measured: between two runs of the same code
    this machine alone makes calls of 10 us up to 1.7 times slower, the bare layer's among them.
    """
    old, new = (json.loads(path.read_text()) for path in (before, after))
    for key in ("device", "threads", "torch"):
        was, now = (run["machine_info"]["environment"][key] for run in (old, new))
        if was != now:
            raise ValueError(f"the runs cannot be compared: {key} was {was}, and is {now}")
    ours = [
        {
            one["fullname"]: (one["stats"]["median"], one["extra_info"]["ratio"][0])
            for one in run["benchmarks"]
            if one["extra_info"]["peer"] in OURS
        }
        for run in (old, new)
    ]
    both = [name for name in ours[1] if name in ours[0]]
    if not both:
        raise ValueError("the runs cannot be compared: they have no benchmark in common")
    change = {name: min(b / a for a, b in zip(ours[0][name], ours[1][name], strict=True)) for name in both}
    return [f"{change[name]:.2f} x  {name.partition('::')[2]}" for name in both if change[name] > gate], len(both)


def demo(results: Path) -> str:
    found = json.loads((results / "cpu/demo.json").read_text())
    count = len(found["tasks"])
    methods = {
        r["method"]: {key: sum(r[key]) / count for key in ("held_out", "trained", "kept")} for r in found["results"]
    }
    head, ia3, ptuning = methods["head"], methods["ia3"], methods["ptuning"]
    lines = [
        ["held-out accuracy, mean of three tasks", *(f"{m['held_out']:.3f}" for m in (head, ia3, ptuning))],
        ["trained parameters of one task", f"{head['trained']:,.0f}", f"{ia3['trained']:,.0f}",
         f"{ptuning['trained']:,.0f} ({ptuning['kept']:,.0f} kept to serve)"],
    ]  # fmt: skip
    for timing in found["served"]["timings"]:
        ratio = {name: f"{values[0]:.3f}" for name, values in timing["ratios"].items()}
        title = f"mixed batch, {timing['rows']} rows, time / bare model (noise {ratio['bare model again']})"
        ia3, theirs = ratio["peft_ops (IA)^3, mixed batch"], ratio["PEFT (IA)^3, adapter by adapter"]
        p, their_p = ratio["peft_ops P-Tuning, mixed batch"], ratio["PEFT P-Tuning, adapter by adapter"]
        lines.append([title, "", f"{ia3} (PEFT, adapter by adapter: {theirs})", f"{p} (PEFT: {their_p})"])
    return markdown(["", "frozen model, trained head", "(IA)^3", "P-Tuning"], lines)


def templates(results: Path) -> str:
    found = json.loads((results / "cpu/templates.json").read_text())["relations"]
    lines = []
    for r in found:
        *cells, control, chance = (
            f"{100 * r[key]:.1f}"
            for key in ("best", "worst", "one_word", "p_tuning", "chance", "control", "control_chance")
        )
        lines.append([r["name"], *cells, f"{control} ({chance})"])
    header = "best wording", "worst", "one word, up to", "P-Tuning", "chance", "control (its chance)"
    return markdown(["held-out accuracy, %", *header], lines)


def bank_hits(found: dict) -> str:
    shares = {}
    for one in found["zipf"]:
        shares.setdefault(one["exponent"], {})[one["slots"]] = one["on the device"]
    row = 2 * found["numbers per task"]  # bytes; a table has two rows more than slots

    def title(slots: int) -> str:
        size = (slots + 2) * row / 1e6
        return f"{slots:,} slots, {f'{size:.0f} MB' if size < 1e3 else f'{size / 1e3:.2f} GB'}"

    header = ["exponent", *map(title, next(iter(shares.values())))]
    return markdown(header, ([f"{e}", *(f"{share:.2f}" for share in known.values())] for e, known in shares.items()))


def bank_swaps(found: dict) -> str:
    times = {n: f"{ms:.2g}" for n, ms in found["ms per batch of one task"].items() if not n.startswith("bytes")}
    return markdown(["one task's batch", *times], [["ms", *times.values()]])


def drop_in(found: dict) -> str:
    tables = {k: v for k, v in found.items() if k.endswith("(median, p10, p90)")}
    lines = []
    for title, ratios in tables.items():
        noise = "{1:.3f}-{2:.3f}".format(*ratios[BASELINE_AGAIN])
        over = title.removesuffix(" (median, p10, p90)")
        lines += [[over, n, f"{r[0]:.3f}", noise] for n, r in list(ratios.items())[1:] if n != BASELINE_AGAIN]
    return f"{place([found])}.\n\n{markdown(['', 'model', 'time', 'noise'], lines)}"


def launcher(found: dict) -> str:
    lines = [
        [
            name,
            f"{us['kernel[grid]']:.1f}",
            f"{us['launch']:.1f}",
            f"{us['ratio']:.2f} ({us['low']:.2f}-{us['high']:.2f})",
        ]
        for name, us in found["us per launch"].items()
    ]
    below = "a driver that does nothing below" if found["device"].startswith("no GPU") else found["device"]
    table = markdown(["", "`kernel[grid](...)`", "`launch(kernel, grid, ...)`", "ratio"], lines)
    return f"Triton {found['triton']}, {below}; microseconds.\n\n{table}"


def everywhere(file: str, needs: str | tuple[str, ...], table: Callable[[dict], str]) -> Callable[[Path], str]:
    """A block with the table of that file from every folder: first the CPU's, then each GPU's under its name.

    needs: how a key begins without which there is no table: files are written as parts are measured.
    """

    def block(results: Path) -> str:
        parts = {}
        for folder in (results / "cpu", *gpu_folders(results)):
            found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
            parts[folder.name] = table(found) if any(key.startswith(needs) for key in found) else NOT_MEASURED
        cpu, *gpus = parts.values()
        if not gpus:
            return cpu if cpu == NOT_MEASURED else f"{cpu}\n\nOn a GPU: {NOT_MEASURED}"
        return "\n\n".join([cpu, *(f"{name}:\n\n{text}" for name, text in [*parts.items()][1:])])

    return block


def training(results: Path) -> str:
    found = json.loads((results / "cpu/training.json").read_text())
    kept, times = found["bytes per token"], found["time / frozen (median, p10, p90)"]
    names = ["frozen", "PEFT, one adapter", "peft_ops, mixed batch"]
    bytes_ = [f"{kept['frozen']:,}", *(f"{kept[n]:,} ({kept[n] / kept['frozen']:.2f} x)" for n in names[1:])]
    time = ["1", *(f"{times[name][0]:.3f}" for name in names[1:])]
    noise = f"time (noise {times[BASELINE_AGAIN][0]:.3f})"
    return markdown(["", "frozen layer", *names[1:]], [["bytes kept per token", *bytes_], [noise, *time]])


def overhead(results: Path) -> str:
    path = results / "cpu/overhead.json"
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    lines = [[name, *(f"{us:.1f}" for pair in modes.values() for us in pair)] for name, modes in found["us"].items()]
    titles = [f"{mode}: {what}" for mode in found["budget"] for what in ("operator", "public function over it")]
    return f"{found['device']}, one thread, PyTorch {found['torch']}; microseconds.\n\n" + markdown(
        ["", *titles], lines
    )


def native_cpu(results: Path) -> str:
    """Per kernel and dtype: microseconds, and how many times as long plain PyTorch and PEFT's arithmetic take."""
    path = results / "cpu/native_cpu.json"
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    parts = [f"{place([found])}; a kernel against itself: {found['A/A'][0]:.2f}-{found['A/A'][1]:.2f}."]
    if found["malloc"]:
        parts[0] += f" {', '.join(f'`{name}={value}`' for name, value in found['malloc'].items())}."
    tables = {}
    for row in found["cases"]:
        table = tables.setdefault(row["group"], {})
        table.setdefault((row["kernel"], row["dtype"]), {})[row["shape"]] = native_cell(row)
    for group, lines in tables.items():
        shapes = list(dict.fromkeys(shape for known in lines.values() for shape in known))
        body = [[*name, *(known.get(shape, "") for shape in shapes)] for name, known in lines.items()]
        parts.append(markdown([group, "dtype", *shapes], body))
    return "\n\n".join(parts)


def native_cell(row: dict) -> str:
    """12.3 us, 3.0 (2.7): the reference takes 3.0 times as long, PEFT's arithmetic 2.7 times."""
    ratio = row["ratio"]
    theirs = next((f"({r:.2f})" for peer, r in ratio.items() if peer.startswith("peft")), "")
    ours = f"{ratio['reference']:.2f}" if "reference" in ratio else ""
    said = f"{row['us']['native']:,.1f} us, {' '.join(filter(None, (ours, theirs)))}"
    return said.removesuffix(", ") if row["auto"] else f"{said}, not by `auto`"


def native_targets(results: Path) -> str:
    path = results / "cpu/native_cpu.json"
    cases = json.loads(path.read_text())["cases"] if path.exists() else []
    lines = []
    for kernel, dtype, shape, aim in TARGETS:
        found = [c for c in cases if (c["kernel"], c["dtype"], c["shape"]) == (kernel, dtype, shape)]
        said = f"{found[0]['ratio']['peft']:.2f}" if found else NOT_MEASURED.rstrip(".")
        met = ("met" if found[0]["ratio"]["peft"] >= aim else "missed") if found else ""
        lines.append([f"{kernel}, {dtype}, {shape}", f"{aim:g}", said, met])
    late = verdict(cases)
    said = f"{len(late)} slower" if late else "none slower"
    lines.append(["what `auto` runs natively: never behind", "", said if cases else NOT_MEASURED.rstrip("."), ""])
    return markdown(["PEFT's arithmetic / native", "at least", "measured", ""], lines)


def rows_of(folder: Path) -> list[dict]:
    path = folder / "operators.jsonl"
    return read(path) if path.exists() else []


def on_cpu(table: Callable[..., str]) -> Callable[[Path], str]:
    def block(results: Path) -> str:
        rows = rows_of(results / "cpu")
        return f"{place(rows)}.\n\n{table(rows)}" if rows else NOT_MEASURED

    return block


def on_gpus(table: Callable[..., str], pictures: str | None = None) -> Callable[[Path], str]:
    """Every GPU's table. pictures: where the page finds bench/results, if it is to show them."""

    def block(results: Path) -> str:
        parts = []
        for folder in gpu_folders(results):
            if rows := rows_of(folder):
                parts += [f"{place(rows)}.", kernel_and_wall(rows, table)]
                drawn = [name for name in PLOTS if pictures and (folder / f"{name}.png").exists()]
                parts += [f"![{name}, {rows[0]['device']}]({pictures}/{folder.name}/{name}.png)" for name in drawn]
        return "\n\n".join(parts) or NOT_MEASURED

    return block


BLOCKS = {
    "demo": demo,
    "templates": templates,
    "task bank": everywhere("task_bank.json", "zipf", bank_hits),
    "task bank swaps": everywhere("task_bank.json", "ms per batch", bank_swaps),
    "drop-in": everywhere("drop_in.json", ("forward", "generate"), drop_in),
    "training": training,
    "overhead": overhead,
    "launcher": everywhere("launcher.json", "us per launch", launcher),
    "native cpu": native_cpu,
    "native cpu targets": native_targets,
    "cpu": on_cpu(summary_table),
    "gpu": on_gpus(summary_table),
    "cpu shapes": on_cpu(ratio_table),
    "gpu shapes": on_gpus(ratio_table, pictures="../bench/results"),
}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every block between `<!-- results: NAME -->` and `<!-- end -->` made anew."""

    def block(match: re.Match) -> str:
        return f"{match[1]}\n\n{BLOCKS[match[2]](results)}\n\n{match[3]}"

    return re.sub(r"(<!-- results: ([\w -]+) -->)\n.*?\n(<!-- end -->)", block, page, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="the newest saved run if left out")
    parser.add_argument("--out", type=Path, help="bench/results/cpu, or that of the GPU, if left out")
    parser.add_argument("--storage", type=Path, default=STORAGE, help="where the suite saves its runs")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--pages", action="store_true")
    args = parser.parse_args()
    if args.pages:
        for page in map(ROOT.joinpath, PAGES):
            page.write_text(filled(page.read_text()))
        return
    runs = saved_runs(args.storage)
    if args.compare:
        if len(runs) < 2:
            parser.error(f"two saved runs are needed, {args.storage} holds {len(runs)}: make bench")
        late, count = slower(*runs[-2:])
        print(f"{runs[-2].name}\n{runs[-1].name}\n{count} benchmarks, {len(late)} over {GATE} x", *late, sep="\n")
        sys.exit(bool(late))
    if args.file is None and not runs:
        parser.error(f"{args.storage} holds no saved run: make bench")
    source = args.file or runs[-1]
    rows = read(source)
    if not timed(rows):
        parser.error(f"{source} holds no times")
    out = args.out or RESULTS / folder_of(rows[0]["kind"], rows[0]["device"])
    written = write(rows, out)
    for name in TAKEN:
        if source.is_dir() and (source / name).exists():
            written.append(shutil.copy(source / name, out / name))
    print(ratio_table(rows), *written, sep="\n")


if __name__ == "__main__":
    main()
