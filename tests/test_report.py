"""What is made of results: pages that hold no other numbers, pictures, a folder for every GPU, native kernels."""

import json
import re
import shutil

import pytest
import torch

from bench import native_cpu, plots, report
from bench.harness import BASELINE_AGAIN
from bench.matrix import PEERS
from bench.shapes import CASES, CPU_CASES, Case
from peft_ops._library import has_native
from tests.test_architecture import ROOT

PLACE = {"kind": "gpu", "device": "NVIDIA H200", "threads": 8, "torch": "2.13.0", "commit": "abc"}
CPU = PLACE | {"kind": "cpu", "device": "a CPU"}
# a digit that begins a number: not that of bf16, sm_90, (IA)^3
NUMBER = re.compile(r"(?<![\w^.])\.?\d")


def row(case: Case, place: dict = PLACE, **more) -> dict:
    """What bench.matrix writes of a case; wall time five times the kernels' on a GPU."""
    peers = [peer for peer in PEERS if peer not in ("ft_style", "compile")]
    ratio = {peer: [1 + i / 8, 1 + i / 9, 1 + i / 7] for i, peer in enumerate(peers)} | {
        BASELINE_AGAIN: [1, 0.98, 1.03]
    }
    found = {"layer": case.layer.name, "phase": case.phase, "rows": case.rows, "tasks": case.tasks}
    found |= {"flops": 0 if case.phase == "train" else 8_000, "bytes": 4_000, "us": {peer: 2.0 for peer in peers}}
    found |= {"ratio": ratio, "roofs": {"flops": 1e11, "bytes": 1e10}}
    if place["kind"] == "gpu":
        found["wall_us"] = {peer: 10.0 for peer in peers}
        found["wall_ratio"] = {name: [5 * r for r in values] for name, values in ratio.items()}
    if case.phase == "train":
        found["saved"] = {"bare": 0, "peft_ops": 64, "eager": 128}
    return found | place | more


def failed(case: Case, place: dict = PLACE, **why) -> dict:
    names = "layer", "phase", "rows", "tasks"
    return {name: value for name, value in row(case, place).items() if name in (*names, *place)} | why


def jsonl(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def filled(block: str, results) -> str:
    page = report.filled(f"<!-- results: {block} -->\n\nold\n\n<!-- end -->", results)
    return page.removeprefix(f"<!-- results: {block} -->\n\n").removesuffix("\n\n<!-- end -->")


def measured_outside(page: str) -> list[str]:
    """Rows of tables outside the markers that have a number: no result file holds it. Shapes and formulas are code."""
    outside = re.sub(r"<!-- results: .*?<!-- end -->", "", page, flags=re.S)
    lines = [line for line in outside.splitlines() if line.lstrip().startswith("|")]
    return [line for line in lines if NUMBER.search(re.sub(r"`[^`\d][^`]*`", "", line))]


@pytest.mark.parametrize("page", report.PAGES)
def test_tables_come_from_committed_results(page):
    text = (ROOT / page).read_text()
    assert report.filled(text) == text, "python -m bench.report --pages, and commit what it changes"
    assert measured_outside(text) == [], "numbers that no result file holds"
    names = re.findall(r"<!-- results: ([\w -]+) -->", text)
    assert names and text.count("<!-- end -->") == len(names) and set(names) <= report.BLOCKS.keys()


@pytest.mark.parametrize("page", report.PAGES)
def test_another_digit_in_a_table_is_seen(page):
    text, seen = (ROOT / page).read_text(), 0
    for block in re.finditer(r"<!-- results: .*?<!-- end -->", text, flags=re.S):
        for digit in re.finditer(r"(?<=[ .])\d(?=.*\|\n)", block[0]):
            at = block.start() + digit.start()
            changed = text[:at] + str(9 - int(text[at])) + text[at + 1 :]
            assert report.filled(changed) != changed, changed[at - 20 : at + 20]
            seen += 1
    assert seen > (100 if page == "README.md" else 5)


def test_pages_follow_the_results(tmp_path):
    """Another number in a file is another number in the page, and what was not measured is not printed."""
    shutil.copytree(report.RESULTS, tmp_path / "results")
    page = "<!-- results: training -->\n\nold\n\n<!-- end -->\n<!-- results: gpu -->\n\n1.5\n\n<!-- end -->"
    before = report.filled(page, tmp_path / "results")
    assert "139,528" in before and "old" not in before
    assert before.endswith("<!-- results: gpu -->\n\nNot measured yet.\n\n<!-- end -->")
    path = tmp_path / "results/cpu/training.json"
    path.write_text(path.read_text().replace("139528", "139529"))
    report.write([row(CASES[0])], tmp_path / "results/nvidia-h200")
    after = report.filled(page, tmp_path / "results")
    assert "139,529" in after and "NVIDIA H200, 8 threads, PyTorch 2.13.0, commit abc." in after
    assert "1.12 (1.38)" in after


@pytest.mark.parametrize("cell", ["12", "1.5", "1,234 us", "about 45", "`12 us`", "3 (4)", "**7**", "-3", ".5", "2x"])
def test_a_number_outside_of_the_markers_is_seen(cell):
    assert measured_outside(f"| operator | time |\n| --- | --- |\n| `ia3_scale` | {cell} |") != []
    assert measured_outside(f"<!-- results: cpu -->\n| a | {cell} |\n<!-- end -->") == []


@pytest.mark.parametrize("cell", ["`x [..., 2 * N]`", "fp32, fp16, bf16", "int32", "(IA)^3", "sm_90", "one launch"])
def test_shapes_and_dtypes_are_no_measurements(cell):
    assert measured_outside(f"| `ia3_scale` | {cell} |") == []


def test_pages_show_pictures_that_are_there():
    for page in report.PAGES:
        for target in re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).resolve().exists(), target
    shown = (ROOT / "docs/performance.md").read_text()
    assert all(f"(../bench/results/cpu/{name}.png)" in shown for name in plots.PLOTS)


def test_a_shape_without_a_time_says_why(tmp_path):
    right, wrong, broken, missing = [case for case in CPU_CASES if case.phase == "prefill"][:4]
    rows = [row(right, CPU), failed(wrong, CPU, wrong=True), failed(broken, CPU, failed=True), row(missing, CPU)]
    other = next(case for case in CPU_CASES if case.layer == missing.layer and case.phase == "decode")
    rows.append(row(other, CPU))
    jsonl(tmp_path / "cpu/operators.jsonl", rows)
    assert report.load(tmp_path / "cpu/operators.jsonl") == [rows[0], rows[3], rows[4]]
    shapes = filled("cpu shapes", tmp_path)
    assert f"| {wrong.layer.name} | prefill | 128 | 8 | wrong |" in shapes
    assert f"| {broken.layer.name} | prefill | 128 | 8 | failed |" in shapes
    summary = filled("cpu", tmp_path).splitlines()
    assert f"| {right.layer.name} | Not measured yet | 1.12 (1.38) |" in summary, "its decode is a shape of the suite"
    assert f"| {wrong.layer.name} | Not measured yet | wrong |" in summary
    report.write(report.read(tmp_path / "cpu/operators.jsonl"), tmp_path / "again")
    assert report.read(tmp_path / "again/operators.jsonl") == rows, "nothing is dropped on the way"
    assert "| wrong |" in (tmp_path / "again/operators.md").read_text()


def test_summary_leaves_out_what_is_no_shape():
    prompt = next(case for case in CPU_CASES if case.layer.op == "concat" and case.phase == "prefill")
    linear = next(case for case in CPU_CASES if case.layer.op == "linear" and case.phase == "decode")
    alone = next(case for case in CPU_CASES if case.rows == 64 and case.tasks == 8)
    table = report.summary_table([row(case, CPU) for case in (linear, prompt, alone)])
    assert f"| {prompt.layer.name} |  | 1.12 (1.38) |" in table, "no decode before a text"
    assert "64 rows" not in table, "one layer's alone, for its number of tasks"


def test_every_gpu_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    """From what bench/gpu.sh leaves: shapes with torch.compile from that run, and what pages have tables of."""
    first, second = CASES[:2]
    jsonl(tmp_path / "OUT/matrix.jsonl", [row(first), row(second)])
    compiled = row(first)
    compiled["ratio"]["compile"] = [1.75, 1.7, 1.8]
    jsonl(tmp_path / "OUT/compile.jsonl", [compiled, failed(second, failed=True)])
    ratios = {"bare model": [1, 1, 1], "peft_ops": [1.25, 1.2, 1.3], BASELINE_AGAIN: [1, 0.97, 1.02]}
    (tmp_path / "OUT/drop_in.json").write_text(json.dumps(PLACE | {"forward, over bare (median, p10, p90)": ratios}))
    (tmp_path / "OUT/task_bank.json").write_text(json.dumps({"device": "cuda"}))
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "OUT")])
    report.main()
    assert {path.name for path in results.iterdir()} == {"nvidia-h200"} and "1.75" in capsys.readouterr().out
    known = report.read(results / "nvidia-h200/operators.jsonl")
    assert known == [compiled, row(second)], "what failed with torch.compile keeps its other peers"
    jsonl(results / "nvidia-b200/operators.jsonl", [row(first, PLACE | {"device": "NVIDIA B200"})])
    shapes = filled("gpu shapes", results)
    assert shapes.index("NVIDIA B200") < shapes.index("NVIDIA H200")
    assert "(../bench/results/nvidia-h200/ratios.png)" in shapes
    kernels, wall = shapes[shapes.index("NVIDIA H200") :].split("What a caller waits for")
    assert "| 2.0 | 1.12 |" in kernels and "| 10.0 | 5.62 |" in wall
    assert "5.62 (6.88)" in filled("gpu", results), "README too says what a caller waits for"
    drop_in = filled("drop-in", results)
    assert drop_in.startswith(report.NOT_MEASURED) and "nvidia-h200:\n\nNVIDIA H200, 8 threads" in drop_in
    assert "| forward, over bare | peft_ops | 1.250 | 0.970-1.020 |" in drop_in
    assert filled("task bank", results).endswith("nvidia-h200:\n\nNot measured yet."), "begun, without its loads"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_pictures_stay_of_a_size_to_look_at(kind, tmp_path):
    cases, place = (CPU_CASES, CPU) if kind == "cpu" else (CASES, PLACE)
    rows = [row(case, place) for case in cases]
    assert kind == "cpu" or len(rows) > 150
    for name, draw in plots.PLOTS.items():
        drawn = draw(rows)
        width, height = drawn.get_size_inches()
        assert width <= 14 and height <= 14, (name, width, height)
        plots.save(drawn, tmp_path / name)
    assert plots.draw_tasks(rows[:1]) is None and plots.draw_memory([]) is None


def test_every_peer_looks_different():
    assert plots.STYLES.keys() == set(PEERS)
    colours = [colour for colour, _ in plots.STYLES.values()] + [plots.NOISE]
    assert len(set(colours)) == len(colours)

    def rgb(colour: str) -> list[int]:
        return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]

    for i, one in enumerate(colours):
        for other in colours[i + 1 :]:
            assert sum((a - b) ** 2 for a, b in zip(rgb(one), rgb(other), strict=True)) > 60**2, (one, other)


def test_ratios_keep_peers_apart():
    """Equal times are as many points, below one another."""
    rows = [row(case, CPU) for case in CPU_CASES[:1]]
    rows[0]["ratio"] = {name: [1.25, 1.2, 1.3] for name in rows[0]["ratio"]}
    ((axes,),) = [drawn.axes for drawn in [plots.draw_ratios(rows)]]
    dots = [line.get_ydata()[0] for line in axes.get_lines() if len(line.get_ydata()) == 1]
    assert len(dots) == len(set(dots)) == len(PEERS) - 3
    assert {t.get_text() for t in axes.figure.legends[0].get_texts()} >= {"noise: bare against itself", "peft"}


def test_pictures_keep_the_row_count_that_was_measured_first():
    """Of a GPU's ten counts; one shape that failed does not change the picture."""
    rows = [row(case) for case in CASES]
    first = plots.usual(rows)
    assert {(one["phase"], one["rows"]) for one in first} == {("decode", 16), ("prefill", 1024), ("train", 8192)}
    rows.remove(first[0])
    assert plots.usual(rows) == first[1:]


def test_place_says_how_long_the_suite_took():
    case = CPU_CASES[0]
    assert report.place([row(case, CPU, suite_seconds=1234)] * 2).endswith("commit abc; the suite took 1,234 s")
    assert report.place([row(case, CPU)]).endswith("commit abc")


def native(kernel: str = "ia3_scale", elements: int = 1 << 14, auto: bool = True, us: float = 10, **ratio) -> dict:
    place = {"group": "elementwise", "kernel": kernel, "dtype": "bf16", "shape": "64x4096", "elements": elements}
    times = {"native": us} | {peer: round(us * r, 2) for peer, r in ratio.items()}
    return place | {"auto": auto, "us": times, "ratio": ratio}


def test_native_kernels_that_are_behind():
    late = native_cpu.verdict
    assert late([native(reference=0.95, peft=2.0), native(reference=3.0, peft=0.96)]) == []
    assert late([native(peft=0.94)]) == ["ia3_scale bf16 64x4096: 0.94 of peft, +0.6 us"]
    assert late([native(reference=0.5, auto=False), native(**{"F.embedding": 0.5, BASELINE_AGAIN: 0.5})]) == []
    assert late([native(elements=(1 << 14) - 1, reference=0.51)]) == [], "4.9 us slower on few elements"
    assert len(late([native(elements=(1 << 14) - 1, reference=0.49), native(**{"peft, gathered": 0.9})])) == 2
    assert native_cpu.missed([native(peft=3.9)]) == ["ia3_scale bf16 64x4096: 3.90, the target is 4"]
    assert native_cpu.missed([native(peft=4.0), native(kernel="ia3_scale relu", peft=1.0)]) == []


def test_page_of_native_kernels(tmp_path):
    assert filled("native cpu", tmp_path) == report.NOT_MEASURED
    assert "Not measured yet" in filled("native cpu targets", tmp_path)
    cases = [native(peft=4.5, reference=3.0), native(kernel="ia3_scale tasks", auto=False, reference=0.9, us=1234.5)]
    found = CPU | {"malloc": {"MALLOC_TRIM_THRESHOLD_": "1"}, BASELINE_AGAIN: [0.97, 1.03], "cases": cases}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/native_cpu.json").write_text(json.dumps(found))
    table, targets = filled("native cpu", tmp_path), filled("native cpu targets", tmp_path)
    assert "a kernel against itself: 0.97-1.03. `MALLOC_TRIM_THRESHOLD_=1`." in table
    assert "| ia3_scale | bf16 | 10.0 us, 3.00 (4.50) |" in table
    assert "| ia3_scale tasks | bf16 | 1,234.5 us, 0.90, not by `auto` |" in table
    assert "| ia3_scale, bf16, 64x4096 | 4 | 4.50 | met |" in targets and "| none slower |" in targets


@pytest.mark.skipif(not has_native(), reason="no C++ kernels here")
def test_native_cases_do_the_same_work(monkeypatch, tmp_path, capsys):
    """A peer that does less would win; on small shapes, and the targets are among the cases."""
    monkeypatch.setattr(native_cpu, "SHAPES", [(4, 64)])
    monkeypatch.setattr(native_cpu, "DTYPES", {"fp32": torch.float32})
    small = [
        *native_cpu.scale_cases(),
        *native_cpu.glu_cases(),
        *native_cpu.public_shape("fp32", torch.float32, 2, 5, 3, 8),
    ]
    for case in small:
        first, *others = (call() for peer, call in case.calls.items() if peer.startswith(("native", *native_cpu.LIKE)))
        first = first if isinstance(first, (tuple, list)) else (first,)
        for other in others:
            other = other if isinstance(other, (tuple, list)) else (other,)
            for got, want in zip(first, other, strict=False):  # a PromptBatch says more
                torch.testing.assert_close(got.flatten(), want.flatten().to(got.dtype), rtol=1e-4, atol=1e-4)
    names = {(case.kernel, case.shape.sizes) for case in small}
    wanted = {kernel for kernel, *_ in native_cpu.TARGETS}
    assert wanted <= {kernel for kernel, _ in names}
    monkeypatch.setattr(native_cpu, "cases", lambda: iter(small))
    out = tmp_path / "native.json"
    monkeypatch.setattr("sys.argv", ["native_cpu", "--budget", "0", "--only", "ia3_scale fp32", "--json", str(out)])
    with pytest.raises(SystemExit) as end:
        native_cpu.main()
    (one,) = json.loads(out.read_text())["cases"]
    assert (
        end.value.code == 0
        and one["shape"] == "4x64"
        and not one["auto"]
        and one["ratio"].keys() >= {"peft", "reference"}
    )
    assert "behind: " in capsys.readouterr().out
