"""What was measured, as tables and plots.

    python -m bench.report [FILE] [--out DIR]   # a saved run of the suite (the newest), or JSON lines of bench.matrix,
                                                # into bench/results/cpu or, measured there, gpu
    python -m bench.report --compare            # the last two saved runs; fails where a median is over 15 % slower
    python -m bench.report --pages              # the tables of README.md and docs/performance.md, from bench/results

Ratios are to the bare layer, paired: median, 10th and 90th percentile. Nothing is printed that was not measured.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.harness import BASELINE_AGAIN
from bench.matrix import PEERS
from bench.tune import TASKS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, STORAGE, PAGES = ROOT / "bench/results", ROOT / ".benchmarks", ("README.md", "docs/performance.md")
NOT_MEASURED = "Not measured yet."
GATE = 1.15  # of a median over the one before
OURS = "peft_ops", "native"  # peers that a change of this project can make slower
COLOURS = dict(zip(PEERS, ("#4a5560", "#1f6fb2", "#6aa84f", "#d9822b", "#c0504d", "#b8c4d0", "#8e63b0"), strict=True))


def saved_runs(storage: Path = STORAGE) -> list[Path]:
    """Saved runs of the suite, oldest first: pytest-benchmark numbers them."""
    return sorted(storage.rglob("[0-9][0-9][0-9][0-9]_*.json"), key=lambda path: path.name)


def load(path: Path) -> list[dict]:
    """Rows of bench.matrix, from its own JSON lines or from a saved run of the suite. What was wrong is left out."""
    if path.suffix == ".jsonl":
        return [row for row in map(json.loads, path.read_text().splitlines()) if "us" in row]
    run, rows = json.loads(path.read_text()), {}
    for one in run["benchmarks"]:
        facts = dict(one["extra_info"])
        peer, ratio, noise = (facts.pop(key) for key in ("peer", "ratio", "noise"))
        row = rows.setdefault(one["group"], facts | {"us": {}, "ratio": {BASELINE_AGAIN: noise}})
        row["us"][peer], row["ratio"][peer] = round(one["stats"]["median"] * 1e6, 3), ratio
    return [row | run["machine_info"]["environment"] for row in rows.values()]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def place(rows: list[dict]) -> str:
    """Where rows were measured, once for each place."""
    said = (f"{r['device']}, {r['threads']} threads, PyTorch {r['torch']}, commit {r['commit']}" for r in rows)
    return "; ".join(dict.fromkeys(said))


def ratio_table(rows: list[dict], of: str = "") -> str:
    """Every shape: the bare layer's time, each peer's ratio to it, and what the bare layer gives against itself."""

    known = [peer for peer in PEERS[1:] if any(peer in row["ratio"] for row in rows)]

    def cells(row: dict) -> list[str]:
        us, ratio = row[f"{of}us"], row[f"{of}ratio"]
        named = [f"{ratio[peer][0]:.2f}" if peer in ratio else "" for peer in known]
        noise = "{1:.2f}-{2:.2f}".format(*ratio[BASELINE_AGAIN])
        return [row["layer"], row["phase"], str(row["rows"]), str(row["tasks"]), f"{us['bare']:.1f}", *named, noise]

    header = "layer", "phase", "rows", "tasks", "bare, us", *known, "noise"
    return markdown(header, map(cells, rows))


def summary_table(rows: list[dict]) -> str:
    """One line per layer, one column per row count: our ratio, PEFT's arithmetic in brackets."""
    rows = [row for row in rows if row["tasks"] == TASKS]  # other counts have a plot of their own
    columns = sorted({(row["phase"], row["rows"]) for row in rows})
    found = {}
    for row in rows:
        ours, eager = (row["ratio"][peer][0] for peer in ("peft_ops", "eager"))
        found.setdefault(row["layer"], {})[row["phase"], row["rows"]] = f"{ours:.2f} ({eager:.2f})"
    lines = [[layer, *(known.get(column, "") for column in columns)] for layer, known in found.items()]
    return markdown(["time / bare layer", *(f"{phase}, {count} rows" for phase, count in columns)], lines)


def figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "peft_ops"  # the same numbers make the same file
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def draw_ratios(rows: list[dict]):
    """Time over the bare layer's, one line per shape; grey: the bare layer against itself."""
    drawn, axes = figure(9, 1.5 + 0.24 * len(rows))
    for y, row in enumerate(rows):
        low, high = row["ratio"][BASELINE_AGAIN][1:]
        axes.barh(y, high - low, left=low, height=0.8, color="#d8d8d8", zorder=0)
        for peer in PEERS[1:]:
            if peer in row["ratio"]:
                middle, low, high = row["ratio"][peer]
                axes.plot([low, high], [y, y], color=COLOURS[peer], linewidth=1)
                label = peer if peer not in axes.get_legend_handles_labels()[1] else None
                axes.plot(middle, y, "o", color=COLOURS[peer], markersize=5, label=label)
    axes.axvline(1, color="black", linestyle="dashed", linewidth=1)
    names = [f"{r['layer']}, {r['phase']}, {r['rows']} rows, {r['tasks']} tasks" for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("time / bare layer's (median, p10 to p90)")
    axes.legend(fontsize=8, frameon=False, ncols=len(PEERS), loc="lower center", bbox_to_anchor=(0.5, 1))
    return drawn


def draw_roofline(rows: list[dict]):
    """Operations per second against operations per byte that the bare layer cannot do without."""
    drawn, axes = figure(7, 4.5)
    flops, nbytes = (max(row["roofs"][key] for row in rows) for key in ("flops", "bytes"))
    known = [row for row in rows if row["flops"]]
    intensities = [row["flops"] / row["bytes"] for row in known] + [flops / nbytes]
    ends = sorted((min(intensities) / 2, flops / nbytes, max(intensities) * 2))
    axes.plot(
        ends, [min(flops, nbytes * x) / 1e9 for x in ends], color="black", linewidth=1, label="large matmul, copy"
    )
    for peer in ("bare", "peft_ops"):
        at = [(row["flops"] / row["bytes"], row["flops"] / row["us"][peer] / 1e3) for row in known]
        axes.plot(*zip(*at, strict=True), "o", color=COLOURS[peer], markersize=4, label=peer)
    axes.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="10$^9$ operations / s")
    axes.legend(fontsize=8, frameon=False)
    return drawn


def draw_tasks(rows: list[dict]):
    """Time over the bare layer's against the number of tasks in the batch, where a shape has several."""
    series = {}
    for row in rows:
        series.setdefault((row["layer"], row["phase"], row["rows"]), []).append(row)
    series = {name: known for name, known in series.items() if len(known) > 2}
    if not series:
        return None
    drawn, axes = figure(6, 4)
    for (layer, phase, count), known in series.items():
        known = sorted(known, key=lambda row: row["tasks"])
        for peer in PEERS[1:]:
            at = [(row["tasks"], row["ratio"][peer][0]) for row in known if peer in row["ratio"]]
            if at and peer != "peft":  # whose module has one adapter
                axes.plot(*zip(*at, strict=True), "o-", color=COLOURS[peer], label=f"{peer}, {layer} {phase} {count}")
    axes.axhline(1, color="black", linestyle="dashed", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tasks in the table", ylabel="time / bare layer's")
    axes.legend(fontsize=7, frameon=False)
    return drawn


def draw_memory(rows: list[dict]):
    """Bytes per token that a layer's forward keeps for its backward."""
    rows = [row for row in rows if "saved" in row]
    if not rows:
        return None
    drawn, axes = figure(8, 1.5 + 0.5 * len(rows))
    height = 0.8 / len(PEERS)
    for number, peer in enumerate(PEERS):
        at = [
            (y + number * height, row["saved"][peer] / row["rows"])
            for y, row in enumerate(rows)
            if peer in row["saved"]
        ]
        if at:
            axes.barh(*zip(*at, strict=True), height=height, color=COLOURS[peer], label=peer)
    axes.set_yticks([y + 0.4 for y in range(len(rows))], [f"{r['layer']}, {r['rows']} rows" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bytes kept for backward, per token")
    axes.legend(fontsize=8, frameon=False)
    return drawn


PLOTS = {"ratios": draw_ratios, "roofline": draw_roofline, "tasks": draw_tasks, "memory": draw_memory}


def write(rows: list[dict], out: Path) -> list[Path]:
    """operators.jsonl, operators.md, and each plot as SVG and PNG."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "operators.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = [f"{place(rows)}.\n", ratio_table(rows)]
    if any("wall_us" in row for row in rows):
        tables += ["\nWhat a caller waits for, launches and synchronisation included:\n", ratio_table(rows, "wall_")]
    (out / "operators.md").write_text("\n".join(tables) + "\n")
    for name, draw in PLOTS.items():
        if drawn := draw(rows):
            svg = out / f"{name}.svg"
            drawn.savefig(svg, metadata={"Date": None})
            svg.write_text("".join(line.rstrip() + "\n" for line in svg.read_text().splitlines()))
            drawn.savefig(out / f"{name}.png", dpi=150)
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


def task_bank(results: Path) -> str:
    found, shares = json.loads((results / "cpu/task_bank.json").read_text()), {}
    for one in found["zipf"]:
        shares.setdefault(one["exponent"], {})[one["slots"]] = one["on the device"]
    row = 2 * found["numbers per task"]  # bytes; a table has two rows more than slots

    def title(slots: int) -> str:
        size = (slots + 2) * row / 1e6
        return f"{slots:,} slots, {f'{size:.0f} MB' if size < 1e3 else f'{size / 1e3:.2f} GB'}"

    header = ["exponent", *map(title, next(iter(shares.values())))]
    return markdown(header, ([f"{e}", *(f"{share:.2f}" for share in known.values())] for e, known in shares.items()))


def bank_swaps(results: Path) -> str:
    found = json.loads((results / "cpu/task_bank.json").read_text())["ms per batch of one task"]
    times = {name: f"{ms:.2g}" for name, ms in found.items() if not name.startswith("bytes")}
    return markdown(["one task's batch", *times], [["ms", *times.values()]])


def drop_in(results: Path) -> str:
    path = results / "cpu/drop_in.json"
    if not path.exists():
        return NOT_MEASURED
    tables = {k: v for k, v in json.loads(path.read_text()).items() if k.endswith("(median, p10, p90)")}
    lines = []
    for title, ratios in tables.items():
        noise = "{1:.3f}-{2:.3f}".format(*ratios[BASELINE_AGAIN])
        over = title.removesuffix(" (median, p10, p90)")
        lines += [[over, n, f"{r[0]:.3f}", noise] for n, r in list(ratios.items())[1:] if n != BASELINE_AGAIN]
    return markdown(["", "model", "time", "noise"], lines)


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


def launcher(results: Path) -> str:
    path = results / "cpu/launcher.json"
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text())
    lines = [
        [
            name,
            f"{us['kernel[grid]']:.1f}",
            f"{us['launch']:.1f}",
            f"{us['ratio']:.2f} ({us['low']:.2f}-{us['high']:.2f})",
        ]
        for name, us in found["us per launch"].items()
    ]
    place = f"Triton {found['triton']}, a driver that does nothing below; microseconds."
    return f"{place}\n\n" + markdown(["", "`kernel[grid](...)`", "`launch(kernel, grid, ...)`", "ratio"], lines)


def operators(device: str, table: Callable[[list[dict]], str]) -> Callable[[Path], str]:
    def block(results: Path) -> str:
        path = results / device / "operators.jsonl"
        return f"{place(rows)}.\n\n{table(rows)}" if path.exists() and (rows := load(path)) else NOT_MEASURED

    return block


BLOCKS = {
    "demo": demo,
    "templates": templates,
    "task bank": task_bank,
    "task bank swaps": bank_swaps,
    "drop-in": drop_in,
    "training": training,
    "overhead": overhead,
    "launcher": launcher,
    "cpu": operators("cpu", summary_table),
    "gpu": operators("gpu", summary_table),
    "cpu shapes": operators("cpu", ratio_table),
    "gpu shapes": operators("gpu", ratio_table),
}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every block between `<!-- results: NAME -->` and `<!-- end -->` made anew."""

    def block(match: re.Match) -> str:
        return f"{match[1]}\n\n{BLOCKS[match[2]](results)}\n\n{match[3]}"

    return re.sub(r"(<!-- results: ([\w -]+) -->)\n.*?\n(<!-- end -->)", block, page, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="the newest saved run if left out")
    parser.add_argument("--out", type=Path, help="bench/results/cpu or gpu if left out")
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
    rows = load(args.file or runs[-1])
    if not rows:
        parser.error(f"{args.file or runs[-1]} holds no times")
    print(ratio_table(rows), *write(rows, args.out or RESULTS / rows[0]["kind"]), sep="\n")


if __name__ == "__main__":
    main()
