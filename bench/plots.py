"""Pictures of what bench.matrix measured: ratios, share of the roof, number of tasks, memory kept for backward."""

from bench.harness import BASELINE_AGAIN
from bench.matrix import PEERS
from bench.shapes import CASES, CPU_CASES, PHASES
from bench.tune import TASKS

# a colour and a mark each: points of one row lie close together
STYLES = {
    "bare": ("#4a5560", "o"),
    "peft_ops": ("#1f6fb2", "o"),
    "ft_style": ("#2e9e5b", "s"),
    "native": ("#17becf", "P"),
    "eager": ("#d1495b", "D"),
    "peft": ("#e58a1f", "^"),
    "compile": ("#7d4fa3", "v"),
}
MATMULS = ("linear", "kv", "glu", "feedforward")  # the others pass over memory, and their ratios need another scale
PHASE_MARKS = dict(zip(PHASES, "os^", strict=True))
NOISE = "#dcdcdc"
INCHES = 0.42  # of a layer's row: the points of six peers lie below one another


def figure(rows: int, columns: int, size: tuple[float, float], **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "peft_ops"  # the same numbers make the same file
    import matplotlib.pyplot as plt

    drawn, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kwargs)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return drawn, panels


def save(drawn, stem) -> None:
    """As SVG, the same text for the same numbers, and PNG; and forgotten, or matplotlib keeps it."""
    import matplotlib.pyplot as plt

    svg = stem.with_suffix(".svg")
    drawn.savefig(svg, metadata={"Date": None})
    svg.write_text("".join(line.rstrip() + "\n" for line in svg.read_text().splitlines()))
    drawn.savefig(stem.with_suffix(".png"), dpi=150)
    plt.close(drawn)


def is_case(kind: str, layer: str, phase: str, rows: int, tasks: int = TASKS) -> bool:
    """Whether the suite has this shape: where it has not, nothing is missing."""
    known = CPU_CASES if kind == "cpu" else CASES
    return any((c.layer.name, c.phase, c.rows, c.tasks) == (layer, phase, rows, tasks) for c in known)


def op_of(row: dict) -> str:
    return row["layer"].rpartition(" ")[2]


def usual(rows: list[dict]) -> list[dict]:
    """One row count per phase, and TASKS tasks: of several counts the first measured, if not of a few layers alone.

    A GPU's ten counts would make a picture of four feet.
    """
    rows = [row for row in rows if row["tasks"] == TASKS] or rows
    found = []
    for phase in PHASES:
        counts = [row["rows"] for row in rows if row["phase"] == phase]
        if counts:
            most = max(map(counts.count, counts))
            count = next(count for count in counts if 2 * counts.count(count) >= most)
            found += [row for row in rows if (row["phase"], row["rows"]) == (phase, count)]
    return found


def log_ticks(axis, low: float, high: float) -> None:
    """A log scale whose ticks are plain numbers, also where the range is short."""
    powers = [2.0**k for k in range(-8, 12)]
    ticks = [t for t in powers if low <= t <= high]
    if len(ticks) < 4:
        ticks = [t / 10 for t in range(1, 100) if low <= t / 10 <= high]
        ticks = (
            ticks[:: -(-len(ticks) // 8)]
            if 1 not in ticks
            else [t for t in ticks if (10 * t - 10) % (2 if t <= 2 else 5) < 1e-6]
        )
    axis.set_major_locator(_ticker().FixedLocator(ticks))
    axis.set_major_formatter(_ticker().FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(_ticker().NullLocator())


def _ticker():
    from matplotlib import ticker

    return ticker


def draw_ratios(rows: list[dict]):
    """A panel per phase, matmuls above what passes over memory; the peers of a layer below one another."""
    rows = usual(rows)
    phases = list(dict.fromkeys((row["phase"], row["rows"]) for row in rows))
    groups = [[r for r in rows if (op_of(r) in MATMULS) == matmul] for matmul in (True, False)]
    groups = [(group, list(dict.fromkeys(r["layer"] for r in group))) for group in groups if group]
    known = [peer for peer in PEERS[1:] if any(peer in row["ratio"] for row in rows)]
    heights = [len(layers) + 0.8 for _, layers in groups]
    size = 2.2 + 3.3 * len(phases), 1.4 + INCHES * sum(heights)
    drawn, panels = figure(len(groups), len(phases), size, height_ratios=heights, sharey="row", sharex="row")
    for line, (group, layers) in zip(panels, groups, strict=True):
        spread = [v for row in group for r in row["ratio"].values() for v in r] + [1]
        for axes, phase in zip(line, phases, strict=True):
            for row in group:
                if (row["phase"], row["rows"]) == phase:
                    draw_peers(axes, layers.index(row["layer"]), row["ratio"], known)
            found = [row["layer"] for row in group if (row["phase"], row["rows"]) == phase]
            for y, layer in enumerate(layers):
                if layer not in found:
                    said = (
                        "no time: see the table" if is_case(group[0]["kind"], layer, *phase) else f"has no {phase[0]}"
                    )
                    axes.text(1, y, f"  {said}", fontsize=7.5, va="center", color="#808890")
            axes.axvline(1, color="black", linestyle="dashed", linewidth=1, zorder=1)
            axes.set_xscale("log")
            pad = (max(spread) / min(spread)) ** 0.05
            axes.set_xlim(min(spread) / pad, max(spread) * pad)
            log_ticks(axes.xaxis, *axes.get_xlim())
            axes.hlines([y + 0.5 for y in range(len(layers) - 1)], *axes.get_xlim(), colors="#eeeeee", linewidth=0.8)
            axes.set_ylim(len(layers) - 0.45, -0.55)
            axes.set_yticks(range(len(layers)), layers, fontsize=9)
            axes.tick_params(axis="y", length=0)
    for axes, (phase, count) in zip(panels[0], phases, strict=True):
        axes.set_title(f"{phase}, {count:,} rows", fontsize=10)
    what = "kernels' time" if any("wall_us" in row for row in rows) else "time"
    drawn.supxlabel(
        f"{what} / bare layer's, log scale: median, p10 to p90; {rows[0]['tasks']} tasks in a table", fontsize=9
    )
    drawn.legend(handles=peer_handles(known), fontsize=9, frameon=False, ncols=len(known) + 2, loc="outside upper left")
    return drawn


def draw_peers(axes, y: int, ratio: dict, known: list[str]) -> None:
    low, high = ratio[BASELINE_AGAIN][1:]
    axes.barh(y, high - low, left=low, height=0.92, color=NOISE, zorder=0)
    for number, peer in enumerate(known):
        if peer in ratio:
            middle, low, high = ratio[peer]
            colour, mark = STYLES[peer]
            at = y + 0.8 * ((number + 0.5) / len(known) - 0.5)
            axes.plot([low, high], [at, at], color=colour, linewidth=1, zorder=2)
            axes.plot(middle, at, mark, color=colour, markersize=4.5, zorder=3)


def peer_handles(known: list[str]) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=STYLES[p][0], marker=STYLES[p][1], linestyle="none", markersize=5, label=p) for p in known
    ]
    return [
        *handles,
        Line2D([], [], color="black", linestyle="dashed", linewidth=1, label="bare"),
        Patch(color=NOISE, label="noise: bare against itself"),
    ]


def shares(row: dict) -> dict[str, float]:
    """What each of two has of the speed that the roofs allow the bare layer's operations and bytes."""
    roofs = row["roofs"]
    seconds = max(row["flops"] / roofs["flops"], row["bytes"] / roofs["bytes"])
    return {peer: seconds / row["us"][peer] * 1e6 for peer in ("bare", "peft_ops")}


def draw_roofline(rows: list[dict]):
    """Left, operations per second against operations per byte; right, the share of the roof that each layer reaches."""
    rows = usual(rows)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    size = 12, 1.4 + INCHES * max(len(layers), 9)
    drawn, ((left, right),) = figure(1, 2, size, width_ratios=[1, 1.1])
    draw_roof(left, rows)
    draw_shares(right, rows, layers)
    from matplotlib.lines import Line2D

    phases = list(dict.fromkeys((row["phase"], row["rows"]) for row in rows))
    handles = [mark(peer, "o", label=peer) for peer in ("bare", "peft_ops")]
    handles += [
        Line2D([], [], color="black", marker=PHASE_MARKS[p], linestyle="none", markersize=5, label=f"{p}, {n:,} rows")
        for p, n in phases
    ]
    drawn.legend(handles=handles, fontsize=9, frameon=False, ncols=len(handles), loc="outside upper left")
    return drawn


def mark(peer: str, phase_mark: str, x=(), y=(), label: str | None = None):
    """A ring for the bare layer, a dot inside for ours: neither hides the other."""
    from matplotlib.lines import Line2D

    colour, bare = STYLES[peer][0], peer == "bare"
    return Line2D(
        x, y, color=colour, marker=phase_mark, linestyle="none", markersize=8 if bare else 4, label=label,
        markerfacecolor="none" if bare else colour, zorder=3,
    )  # fmt: skip


def draw_roof(axes, rows: list[dict]) -> None:
    flops, nbytes = (max(row["roofs"][key] for row in rows) for key in ("flops", "bytes"))
    known = [row for row in rows if row["flops"]]
    at = [row["flops"] / row["bytes"] for row in known]
    ends = sorted((min(at, default=1) / 2, flops / nbytes, max(at, default=1) * 2))
    axes.plot(ends, [min(flops, nbytes * x) / 1e9 for x in ends], color="black", linewidth=1)
    axes.text(flops / nbytes, flops * 1.1 / 1e9, "large matmul", fontsize=8, ha="center", va="bottom")
    middle = (ends[0] * flops / nbytes) ** 0.5
    said = "large copy from memory\n(above it: from cache)"
    axes.text(middle / 1.2, nbytes * middle / 1e9, said, fontsize=8, ha="right", va="bottom")  # no point lies there
    axes.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="10$^9$ operations / s")
    lowest: dict[str, list[tuple[float, float]]] = {}
    for x, row in zip(at, known, strict=True):
        for peer in ("bare", "peft_ops"):
            y = row["flops"] / row["us"][peer] / 1e3
            axes.add_line(mark(peer, PHASE_MARKS[row["phase"]], [x], [y]))
            matmul = op_of(row) in MATMULS
            phase = "decode" if row["phase"] == "decode" else "prefill, train"
            lowest.setdefault(f"matmuls,\n{phase}" if matmul else op_of(row), []).append((x, y))
    for name, points in lowest.items():
        xs, ys = zip(*points, strict=True)
        side = {"scale": "right", "gate": "left"}.get(name, "center")  # a third apart, too little for two names
        axes.text(max(xs), min(ys) / 1.25, name, fontsize=8, ha=side, va="top", color="#4a5560")
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.6, high)
    axes.set_title(
        "operations of the bare layer per second\n(prompts do none: they are on the right alone)", fontsize=9
    )


def draw_shares(axes, rows: list[dict], layers: list[str]) -> None:
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    beyond = [1.0]
    for row in rows:
        y = layers.index(row["layer"]) + 0.8 * ((phases.index(row["phase"]) + 0.5) / len(phases) - 0.5)
        found = shares(row)
        beyond += found.values()
        axes.plot([*found.values()], [y, y], color="#b8c4d0", linewidth=1.5, zorder=1)
        for peer, share in found.items():
            axes.add_line(mark(peer, PHASE_MARKS[row["phase"]], [share], [y]))
    axes.set_xscale("log")
    low, high = min(beyond) / 1.2, max(beyond) * 1.25
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvspan(1, high, color="#f4ecd8", zorder=0)
    axes.text(1, -0.6, " from cache", fontsize=8, va="bottom", ha="left")
    axes.hlines([y + 0.5 for y in range(len(layers) - 1)], low, high, colors="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(layers)), layers, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(layers) - 0.45, -1.2)
    axes.set_xlabel("share of the roof's speed, log scale")
    axes.set_title(
        "share of the roof: 1 is a large matmul, or a copy from memory;\nwhat fits into cache can be over the copy's",
        fontsize=9,
    )


def draw_tasks(rows: list[dict]):
    """Time over the bare layer's against the number of tasks in the table, where a shape has several."""
    series = {}
    for row in rows:
        series.setdefault((row["layer"], row["phase"], row["rows"]), []).append(row)
    series = {name: sorted(known, key=lambda r: r["tasks"]) for name, known in series.items() if len(known) > 2}
    if not series:
        return None
    drawn, panels = figure(1, len(series), (1.2 + 5.8 * len(series), 4.4))
    for axes, ((layer, phase, count), known) in zip(panels[0], series.items(), strict=True):
        peers = [peer for peer in PEERS[1:] if peer != "peft" and all(peer in r["ratio"] for r in known)]
        tasks = [row["tasks"] for row in known]
        noise = [row["ratio"][BASELINE_AGAIN] for row in known]
        axes.fill_between(tasks, [n[1] for n in noise], [n[2] for n in noise], color=NOISE, linewidth=0, zorder=0)
        for number, peer in enumerate(peers):
            middle, low, high = zip(*(row["ratio"][peer] for row in known), strict=True)
            at = [t * 1.04 ** (number - (len(peers) - 1) / 2) for t in tasks]  # beside one another: spreads overlap
            colour, dot = STYLES[peer]
            axes.vlines(at, low, high, colors=colour, linewidth=1)
            axes.plot(at, middle, f"{dot}-", color=colour, markersize=5)
        axes.axhline(1, color="black", linestyle="dashed", linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks(tasks, [f"{t:,}" for t in tasks])
        axes.xaxis.set_minor_locator(_ticker().NullLocator())
        axes.set_xlabel(f"tasks in the table; a batch has {count:,} rows, so at most {count:,} of them")
        axes.set_ylabel("time / bare layer's (median, p10 to p90)")
        axes.set_title(f"{layer}, {phase}, {count:,} rows (peft has one adapter, and cannot mix)", fontsize=9.5)
    handles = peer_handles(peers)
    drawn.legend(handles=handles, fontsize=8.5, frameon=False, ncols=3, loc="outside upper left")
    return drawn


def draw_memory(rows: list[dict]):
    """Bytes per token that a layer's forward keeps for its backward, a bar with its number for every peer there is."""
    rows = [row for row in rows if "saved" in row]
    if not rows:
        return None
    known = [peer for peer in PEERS if any(peer in row["us"] for row in rows)]
    total = sum(len(row["us"]) + 1 for row in rows)
    drawn, ((axes,),) = figure(1, 1, (9, 1.2 + 0.1 * total))
    widest, y, middles = max(v / row["rows"] for row in rows for v in row["saved"].values()) or 1, 0, []
    for row in rows:
        peers = [peer for peer in known if peer in row["us"]]
        middles.append(y + (len(peers) - 1) / 2)
        for peer in peers:
            kept = row["saved"].get(peer)
            value = 0 if kept is None else kept / row["rows"]
            axes.barh(y, value, height=0.9, color=STYLES[peer][0])
            said = "not measured" if kept is None else f"{value:,.0f}"
            axes.text(value + widest / 150, y, said, va="center", fontsize=6.5, color=STYLES[peer][0])
            y += 1
        y += 1
    axes.set_yticks(middles, [f"{row['layer']}, {row['rows']:,} rows" for row in rows], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.5, -1)
    axes.set_xlim(0, widest * 1.1)
    axes.xaxis.set_major_formatter(_ticker().StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("bytes of floating-point tensors that forward keeps for backward, per token (0: none)", fontsize=9)
    from matplotlib.patches import Patch

    drawn.legend(
        handles=[Patch(color=STYLES[peer][0], label=peer) for peer in known], fontsize=8.5, frameon=False,
        title="no line: the layer has no such peer", title_fontsize=8.5, ncols=len(known), loc="outside upper left",
    )  # fmt: skip
    return drawn


PLOTS = {"ratios": draw_ratios, "roofline": draw_roofline, "tasks": draw_tasks, "memory": draw_memory}
