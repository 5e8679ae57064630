"""What the demo prints and draws."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from peft_ops.demo.data import Task
from peft_ops.demo.serve import Served
from peft_ops.demo.timing import AGAIN, BARE, Timing
from peft_ops.demo.train import METHODS, Result

COLOURS = {"head": "#9aa5b1", "ia3": "#1f6fb2", "ptuning": "#d9822b"}
PEFT_COLOUR = "#b8c4d0"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def accuracy_table(tasks: list[Task], results: list[Result]) -> str:
    header = [
        "held-out accuracy (training)",
        "labels",
        "train",
        "held out",
        "chance",
        *(METHODS[r.method] for r in results),
    ]
    rows = [
        [task.name, str(len(task.labels)), str(len(task.train)), str(len(task.held_out)), f"{task.chance:.3f}"]
        + [f"{r.held_out[i]:.3f} ({r.train[i]:.2f})" for r in results]
        for i, task in enumerate(tasks)
    ]
    mean = [f"{sum(r.held_out) / len(tasks):.3f} ({sum(r.train) / len(tasks):.2f})" for r in results]
    rows.append(["mean", "", "", "", f"{sum(task.chance for task in tasks) / len(tasks):.3f}", *mean])
    return table(header, rows)


def parameter_table(results: list[Result], base: int, num_tasks: int) -> str:
    header = ["parameters of one task", "trained", "share", "kept to serve", "share", "training time", "final loss"]
    rows = []
    for result in results:
        trained, kept = sum(result.trained) / num_tasks, sum(result.kept) / num_tasks
        rows.append(
            [METHODS[result.method], f"{trained:,.0f}", f"{trained / base:.3%}", f"{kept:,.0f}", f"{kept / base:.3%}"]
            + [f"{result.seconds:.1f} s", f"{result.loss:.3f}"]
        )
    return (
        table(header, rows)
        + f"\n(averages, head included; share of the {base:,} frozen parameters; time of all tasks together)"
    )


def served_table(served: Served) -> str:
    request = served.request
    rows = []
    for name in dict.fromkeys(zip(request.adapters, request.heads, strict=True)):
        owned = [i for i, pair in enumerate(zip(request.adapters, request.heads, strict=True)) if pair == name]
        right = sum(served.answers[i] == request.labels[i] for i in owned)
        rows.append(
            [name[0] or "base model", name[1].partition("-")[2], str(len(owned)), f"{right}/{len(owned)}"]
            + [
                f"{max(values[i] for i in owned):.1e}" if values else ""
                for values in (served.to_single, served.to_peft)
            ]
        )
    header = ["adapter of the row", "task", "rows", "right", "to its single-task run", "to PEFT's own run"]
    return table(header, rows)


def time_table(timing: Timing) -> str:
    rows = [
        [name, f"{timing.seconds[name] * 1e3:.1f} ms", f"{mid:.3f}", f"{low:.3f} - {high:.3f}"]
        for name, (mid, low, high) in timing.ratios.items()
    ]
    header = [
        f"forward pass, {timing.rows} rows, {timing.rounds} rounds",
        "median time",
        "ratio to bare",
        "middle half",
    ]
    return table(header, rows)


def write_json(path: Path, settings: dict, tasks: list[Task], results: list[Result], served: Served) -> None:
    """Everything that was printed, for programs."""
    content = {
        "settings": settings,
        "tasks": [
            {"name": t.name, "labels": t.labels, "train": len(t.train), "held_out": len(t.held_out), "chance": t.chance}
            for t in tasks
        ],
        "results": [asdict(result) for result in results],
        "served": {
            "rows": [
                {"adapter": name, "difference_to_single": single, "difference_to_peft": peft}
                for name, single, peft in zip(served.request.adapters, served.to_single, served.to_peft, strict=True)
            ],
            "timings": [asdict(timing) for timing in served.timings],
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def draw(path: Path, tasks: list[Task], results: list[Result], served: Served, place: str) -> None:
    """Accuracy on the left, cost of serving on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[1.15, 1], layout="constrained")
    draw_accuracy(left, tasks, results)
    draw_cost(right, served.timings, place)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_accuracy(axes, tasks: list[Task], results: list[Result]) -> None:
    width = 0.8 / len(results)
    for i, result in enumerate(results):
        at = [number + (i - (len(results) - 1) / 2) * width for number in range(len(tasks))]
        bars = axes.bar(at, result.held_out, width * 0.94, color=COLOURS[result.method], label=METHODS[result.method])
        axes.bar_label(bars, [f"{value:.2f}" for value in result.held_out], fontsize=8, padding=2)
    for number, task in enumerate(tasks):
        label = "chance" if number == 0 else None
        axes.hlines(
            task.chance, number - 0.45, number + 0.45, colors="black", linestyles="dashed", linewidth=1, label=label
        )
    axes.set_xticks(
        range(len(tasks)), [f"{task.name}\n{len(task.labels)} labels, {len(task.train)} texts" for task in tasks]
    )
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel("held-out accuracy")
    axes.set_title("What each method learned, all tasks in mixed batches", fontsize=11)
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="upper center")


def draw_cost(axes, timings: list[Timing], place: str) -> None:
    names = [name for name in timings[0].ratios if name != AGAIN]
    height = 0.8 / len(timings)
    widest = max(timing.ratios[name][2] for timing in timings for name in names)
    for number, timing in enumerate(timings):
        values, lows, highs = zip(*(timing.ratios[name] for name in names), strict=True)
        at = [i + (number - (len(timings) - 1) / 2) * height for i in range(len(names))]
        spread = [
            [v - low for v, low in zip(values, lows, strict=True)],
            [h - v for v, h in zip(values, highs, strict=True)],
        ]
        colours = [run_colour(name) for name in names]
        fade = 0.55 if number == 0 else 1.0
        axes.barh(
            at,
            values,
            height * 0.92,
            color=colours,
            alpha=fade,
            xerr=spread,
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
        for y, name, value, high in zip(at, names, values, highs, strict=True):
            text = f"{value:.2f} x  ({timing.seconds[name] * 1e3:.0f} ms, {timing.rows} rows)"
            axes.text(high + 0.02 * widest, y, text, va="center", fontsize=7.5)
    floor = [timing.ratios[AGAIN] for timing in timings]
    low, high = min(1, *(f[1] for f in floor)), max(1, *(f[2] for f in floor))
    ends = -0.5, len(names) - 0.4  # not through the legend
    axes.fill_betweenx(
        ends, low, high, color="#d0d0d0", alpha=0.7, zorder=0, linewidth=0, label="noise: bare model against itself"
    )
    axes.vlines(1, *ends, colors="black", linestyles="dashed", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8.5)
    axes.set_ylim(ends[1], -1.0)  # first on top, below the legend
    axes.set_xlim(0, widest * 1.5)  # room for the numbers
    axes.set_xlabel(f"forward time / bare model's, {place}\n(bars: medians, lines: middle half)", fontsize=9)
    axes.set_title("What serving all tasks in one batch costs", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def run_colour(name: str) -> str:
    if name == BARE:
        return "#4a5560"
    if name.startswith("PEFT"):
        return PEFT_COLOUR
    return COLOURS["ia3" if METHODS["ia3"] in name else "ptuning"]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def wordings_table(relations: list[dict]) -> str:
    rows = []
    for relation in relations:
        for i, one in enumerate(one for pair in relation["pairs"] for one in pair):
            told = "" if one["told_of"] is None else str(one["told_of"])
            rows.append([one["wording"], relation["name"] if i == 0 else "", told, percent(one["accuracy"])])
    return table(["hand-written template", "asks for", "told of", "held-out accuracy, %"], rows)


def summary_table(relations: list[dict]) -> str:
    columns = {
        "best wording": "best",
        "worst": "worst",
        "spread": "spread",
        "one word, up to": "one_word",
        "P-Tuning": "p_tuning",
        "chance": "chance",
        "control": "control",
        "its chance": "control_chance",
        "as told": "as_told",
    }
    rows = [[relation["name"], *(percent(relation[key]) for key in columns.values())] for relation in relations]
    return table(["held-out accuracy, %", *columns], rows)


def templates_text(results: dict) -> str:
    relations, served = results["relations"], results["served"]
    return f"""
{wordings_table(relations)}

{summary_table(relations)}
(right: first of the whole vocabulary. Told of: the text says it so of as many towns, none of which is asked for here.
Chance: the commonest answer. Control: the same P-Tuning on facts that the model cannot know. As told: in the sentences
that the text has of these very facts)

encoders dropped: {served["trained"]:,} parameters of a task become {served["kept"]:,}
{served["tasks"]} tasks, {served["rows"]} rows in one batch: largest difference to each task alone \
{served["difference_to_single"]:.1e}, to the encoders {served["difference_to_encoders"]:.1e}
"""


def finding(relations: list[dict]) -> str:
    """What was measured, as a title."""
    word, spread = (percent(max(relation[key] for relation in relations)) for key in ("one_word", "spread"))
    where = (
        "at or above" if all(relation["p_tuning"] >= relation["best"] for relation in relations) else "not always at"
    )
    return (
        f"One word moves a hand-written template by up to {word} points, the choice of six by up to {spread};\n"
        f"P-Tuning is {where} the best of the six"
    )


def draw_templates(path: Path, results: dict) -> None:
    """A row per pair of wordings, a panel per relation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    relations = results["relations"]
    figure, panels = plt.subplots(len(relations), 1, figsize=(10.5, 2.2 * len(relations) + 0.9), layout="constrained")
    for axes, relation in zip(panels, relations, strict=True):
        draw_relation(axes, relation)
    panels[0].legend(ncols=3, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    told = any(one["told_of"] is not None for relation in relations for pair in relation["pairs"] for one in pair)
    panels[-1].set_xlabel(
        "held-out accuracy, %: the answer is first of the whole vocabulary"
        + "\n(told of: of how many other subjects it has read the fact in the first word's template | the second's)"
        * told,
        fontsize=9,
    )
    figure.suptitle(f"{finding(relations)} ({results['model']})", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_relation(axes, relation: dict) -> None:
    labels = [both_wordings(*(one["wording"] for one in pair)) for pair in relation["pairs"]]
    labels += [f"P-Tuning, {relation['train']} other subjects", "control: the same, unknown facts"]
    values = [[100 * one["accuracy"] for one in pair] for pair in relation["pairs"]]
    firsts, seconds = zip(*values, strict=True)
    rows = range(len(values))
    axes.hlines(rows, firsts, seconds, colors=PEFT_COLOUR, linewidth=3, zorder=1)
    axes.scatter(firsts, rows, s=75, color=COLOURS["ia3"], zorder=2, label="first of the two words")
    axes.scatter(seconds, rows, s=28, facecolors="white", edgecolors="#4a5560", zorder=3, label="second")
    tuned, control = 100 * relation["p_tuning"], 100 * relation["control"]
    axes.scatter([tuned], [len(values)], marker="D", color=COLOURS["ptuning"], zorder=2)
    axes.scatter([control], [len(values) + 1], marker="D", facecolors="white", edgecolors=COLOURS["ptuning"], zorder=2)
    bottom = len(values) + 0.5
    for key, low, high, label in (("chance", -0.5, bottom, "chance"), ("control_chance", bottom, bottom + 1, None)):
        line = {"colors": "black", "linestyles": "dashed", "linewidth": 1, "zorder": 0}
        axes.vlines(100 * relation[key], low, high, **line, label=label)
    numbers = [" | ".join(percent(one["accuracy"]) for one in pair) + told_text(pair) for pair in relation["pairs"]]
    numbers += [percent(relation["p_tuning"]), percent(relation["control"])]
    for row, text in enumerate(numbers):
        axes.text(104, row, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.grid(axis="x", color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"{relation['name']}, {relation['held_out']} held-out subjects", fontsize=9.5, loc="right")
    axes.spines[["top", "right"]].set_visible(False)


def told_text(pair: list[dict]) -> str:
    counts = [one["told_of"] for one in pair]
    return "" if None in counts else f"   (told of {counts[0]} | {counts[1]})"


def both_wordings(first: str, second: str) -> str:
    """[X] lies in | within [Y], of two templates that differ in a word."""
    pairs = zip(first.removesuffix(" .").split(), second.removesuffix(" .").split(), strict=True)
    return " ".join(a if a == b else f"{a} | {b}" for a, b in pairs)
