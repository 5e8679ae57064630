"""Launch parameters, the cost model that argues for them, the tools that measure them, and what is made of results."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
import torch

import peft_ops
from bench import gpu_check, harness, matrix, model, overhead, report, task_bank, tune
from bench.harness import BASELINE_AGAIN, LOST, TRIES, Journal, Pieces, Ratio, compare
from bench.shapes import CASES, CPU_CASES, LAYERS, QUICK_CASES, QUICK_LAYERS, ROWS, Case, Layer
from peft_ops.kernels import tiles
from tests.conftest import DEVICE, KERNELS
from tests.test_architecture import ROOT, public_operators

SM90 = 90
needs_kernels = pytest.mark.skipif(not KERNELS, reason="nothing to measure without kernels")


@pytest.fixture
def tuned(monkeypatch):
    """An empty table TUNED that the test may fill."""
    table = {}
    monkeypatch.setattr(tiles, "TUNED", table)
    return table


@pytest.mark.parametrize("capability", sorted(tiles.CHIPS))
def test_decode_keeps_its_kernel_from_step_to_step(capability, tuned):
    """A batch that grows row by row meets one tile per power of two: nothing compiles again in between."""
    for low, high in ((2, 4), (4, 8), (8, 16), (16, 32), (32, 64)):
        for function in (tiles.linear_small, tiles.glu_linear_small):
            assert len({str(function(M, 4096, 4096, capability)) for M in range(low + 1, high + 1)}) == 1


def test_tuned_entries_win(tuned):
    first, second = tiles.linear.candidates(8192, 4096, 4096, SM90, erf=False, runs=True)[:2]
    assert tiles.linear(8192, 4096, 4096, SM90, runs=True) == first
    tuned["linear", SM90, 8192, 4096, 4096, "runs"] = second
    assert tiles.linear(5000, 4096, 4096, SM90, runs=True) == second, "rows of the same bucket share an entry"
    assert tiles.linear(8192, 4096, 4096, SM90, runs=False) != second, "flags are part of the key"
    assert tiles.linear(8192, 4096, 4097, SM90, runs=True) == first


def test_vendor_entries_win(tuned):
    assert tiles.linear_is_fused(8192, 4096, 4096, SM90)
    tuned["vendor", SM90, 8192, 4096, 4096] = True
    assert not tiles.linear_is_fused(8192, 4096, 4096, SM90)
    assert not tiles.feedforward_is_fused(8192, 4096, 14336, SM90)
    tuned["vendor feedforward", SM90, 8192, 4096, 14336] = False
    assert tiles.feedforward_is_fused(8192, 4096, 14336, SM90)


def test_long_products_are_the_vendors(tuned):
    """The pass that fusion saves costs 367 / K of the matmul on sm_90: at large K a matmul 3 % slower loses."""
    fused = [K for K in range(1024, 32768, 1024) if tiles.linear_is_fused(8192, 4096, K, SM90)]
    assert fused == [*range(1024, 11_880, 1024)]
    assert tiles.linear_is_fused(16, 4096, 32768, SM90), "decode is bound by the weights, whatever K is"


def test_unknown_chips_take_the_tables_of_the_next_below():
    assert (
        tiles.chip(87) == tiles.chip(86) and tiles.chip(103) == tiles.chip(100) and tiles.chip(121) == tiles.chip(120)
    )
    assert tiles.chip(75) == tiles.chip(86), "the least shared memory of all"


@pytest.mark.parametrize("capability", sorted(tiles.CHIPS))
@pytest.mark.parametrize("K", [64, 1024, 4096, 14336, 4112])
def test_parts_of_k_cover_it_once(capability, K, tuned):
    for M in (8, 32, 64, 512):
        for tile in tiles.linear_small.candidates(M, 1024, K, capability):
            size, parts = tiles.k_per_split(K, tile), tile["SPLIT"]
            assert size % tile["BLOCK_K"] == 0
            assert K <= parts * size < K + parts * tile["BLOCK_K"], "nothing is left out"


@pytest.mark.parametrize("capability", sorted(tiles.CHIPS))
def test_model_knows_every_choice(capability, tuned):
    """Every layer and row count is predicted, and what dispatch takes is not far behind the unfused path, as far as the
    model can tell: a table entry gone wrong costs a factor."""
    for layer in LAYERS:
        for M in ROWS:
            found = model.choices(layer, M, capability)
            assert all(p.seconds > model.LAUNCH for _, _, p in found)
            vendor = next(p.seconds for name, _, p in found if name == "vendor")
            assert found[0][2].seconds <= 1.4 * vendor, (layer, M, found[0])


def test_compare_finds_the_slower_one():
    x = torch.randn(64, 64)
    calls = {"once": lambda i: x @ x, "many times": lambda i: [x @ x for _ in range(20)]}
    found = compare(calls, "once", 1, torch.device("cpu"), seconds=0.2)
    assert found["many times"].low > 1.5 and found["many times"].low <= found["many times"].ratio
    assert 0.5 < found[BASELINE_AGAIN].ratio < 2 and found["once"].ratio == 1


def test_long_calls_take_few_rounds():
    """What takes its second per call would otherwise take minutes, whatever time was granted."""
    calls = {name: lambda i: time.sleep(0.02) for name in ("one", "other")}
    begin = time.perf_counter()
    compare(calls, "one", 1, torch.device("cpu"), seconds=0.01)
    warm, rounds = 2 * 4, harness.FEWEST * 2 * 4
    assert time.perf_counter() - begin < 0.02 * (warm + rounds) + 0.5


def test_graphs_are_as_long_as_a_clock_needs():
    assert harness.rotations(once=30e-3, copies=2) == 1, "two calls of 30 ms, not 32"
    assert harness.rotations(once=5e-6, copies=3) == 11 and harness.rotations(once=5e-6, copies=64) == 1
    assert harness.rotations(once=0.0, copies=1) == harness.CALLS


def test_small_buffers_are_said_to_be_hot(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(harness, "_cache", lambda device: 50 << 20)
    assert harness.copies_for(4 << 20, device) == 38 and not harness.is_hot(4 << 20, device)
    assert harness.copies_for(8192, device) == harness.MOST_COPIES and harness.is_hot(8192, device)
    assert harness.copies_for(1 << 30, device) == 2 and not harness.is_hot(1 << 30, device)
    assert harness.copies_for(8192, torch.device("cpu")) == 1 and not harness.is_hot(8192, torch.device("cpu"))


def test_lines_to_paste(tuned):
    """Only a candidate that wins by more than the noise floor is printed, and what is printed can be pasted."""
    layer, M = Layer("T0-3B", "kv", 2048, 2048), 8192
    tile = tiles.dual_linear.candidates(M, 2048, 2048, SM90)[1]
    vendor = tune.vendor_key(layer, M, SM90)
    key = ("dual_linear", SM90, 8192, 2048, 2048)
    entries = {"a tile": {vendor: False, key: tile}, "vendor": {vendor: True}}

    def printed(a_tile, vendor):
        ratios = {"a tile": a_tile, "vendor": vendor, BASELINE_AGAIN: 1.0, tune.NOW: 1.0}
        spread = {name: Ratio(1e-6, r, r - 0.01, r + 0.01) for name, r in ratios.items()}
        return eval("{" + "\n".join(tune.lines(layer, M, spread, entries)) + "\n}")

    assert printed(0.9, 1.1) == {key: tile}
    assert printed(1.1, 0.9) == {vendor: True}
    assert printed(0.995, 1.1) == {}


def test_lines_say_that_the_vendor_loses_where_it_runs_by_default(tuned):
    """A tile that nobody would ask for is no use in the table."""
    layer, M = Layer("Llama-3-8B", "feedforward", 4096, 14336), 8192
    vendor = tune.vendor_key(layer, M, SM90)
    assert tune.is_vendors(layer, M, SM90)
    tile = tiles.linear_feedforward.candidates(M, 4096, 14336, SM90)[0]
    key = "linear_feedforward", SM90, 8192, 4096, 14336
    entries = {"a tile": {vendor: False, key: tile}, "vendor": {vendor: True}}
    spread = {name: Ratio(1e-6, r, r, r) for name, r in {"a tile": 0.9, "vendor": 1.0, BASELINE_AGAIN: 1.0}.items()}
    assert eval("{" + "\n".join(tune.lines(layer, M, spread, entries)) + "\n}") == {vendor: False, key: tile}
    tuned |= {vendor: False, key: tile}
    assert tiles.feedforward_is_fused(M, 4096, 14336, SM90)


@pytest.mark.kernels
@needs_kernels
@pytest.mark.parametrize(
    "layer",
    [Layer("tiny", "kv", 32, 128), Layer("tiny", "glu", 32, 128, "silu"), Layer("tiny", "linear", 64, 1024, "gelu")],
    ids=lambda layer: layer.op,
)
def test_tune_measures_every_candidate(layer, tuned):
    device = torch.device(DEVICE)
    with torch.no_grad():
        ratios, entries = tune.measure(layer, 8, device, seconds=0.01)
    assert ratios.keys() - {tune.NOW, BASELINE_AGAIN} == entries.keys(), "a candidate was wrong, or not timed"
    assert "vendor" in entries and len(entries) > 1
    assert not tuned, "measuring leaves no entry behind"


@pytest.mark.kernels
@needs_kernels
def test_tune_leaves_out_what_is_wrong(tuned, monkeypatch, capsys):
    """The check before the clock must see a kernel that computes something else."""
    right = tune.peft_ops.ia3_linear
    monkeypatch.setattr(tune.peft_ops, "ia3_linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)
    layer = Layer("tiny", "linear", 64, 128)
    with torch.no_grad():
        ratios, entries = tune.measure(layer, 8, torch.device(DEVICE), seconds=0.01)
    assert not entries.keys() & ratios.keys() and "WRONG" in capsys.readouterr().out
    assert tune.lines(layer, 8, ratios, entries) == []


@pytest.mark.kernels
@needs_kernels
def test_tune_goes_on_after_a_candidate_that_fails(tuned, monkeypatch, capsys):
    layer, right = Layer("tiny", "linear", 64, 1024), tune.peft_ops.ia3_linear

    def fails(*args, **kwargs):
        if any(value == {**value, "SPLIT": 2} for value in tiles.TUNED.values() if isinstance(value, dict)):
            raise RuntimeError("out of resources")
        return right(*args, **kwargs)

    monkeypatch.setattr(tune.peft_ops, "ia3_linear", fails)
    found = tune.measured(layer, 8, torch.device(DEVICE), seconds=0.01)
    assert found["not timed"] and all("split 2" in name for name in found["not timed"])
    times = found["us, ratio, p10, p90"]
    assert {"vendor", tune.NOW, BASELINE_AGAIN} < times.keys() and all(len(v) == 4 for v in times.values())
    assert "FAILED" in capsys.readouterr().out
    monkeypatch.setattr(tune, "is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="split 2 took the GPU context with it"):
        tune.measured(layer, 8, torch.device(DEVICE), seconds=0.01)


@pytest.mark.kernels
@needs_kernels
def test_candidates_are_asked_without_a_launch(tuned, monkeypatch):
    """A kernel that fails hides neither its own name nor the others."""
    inputs = tune.Inputs(Layer("tiny", "kv", 32, 128), 8, torch.device(DEVICE), torch.bfloat16)
    want = tune.candidates(inputs, 8, SM90).keys()
    import triton

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", None)
    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "run", None)
    assert tune.candidates(inputs, 8, SM90).keys() == want and len(want) > 1


def test_matrix_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A budget that is spent begins no shape; the next call adds what is missing and repeats nothing."""
    out = tmp_path / "matrix.jsonl"

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["matrix", str(out), "--quick", "--match", "feedforward", *arguments])
        with pytest.raises(SystemExit) as end:
            matrix.main()
        return end.value.code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    assert run("--budget", "-1") == (0, [])
    code, rows = run()
    cases = [("tiny feedforward", "decode", 16), ("tiny feedforward", "train", 128)]
    assert code == 0 and [(r["layer"], r["phase"], r["rows"]) for r in rows] == cases
    assert {"bare", "peft_ops", "ft_style", "eager", BASELINE_AGAIN} <= rows[0]["ratio"].keys()
    assert ("peft" in rows[0]["ratio"]) == matrix._installed("peft")
    assert [r["flops"] for r in rows] == [2 * 16 * 64 * 128, 2 * 2 * 128 * 64 * 128], "backward is as much again"
    assert rows[0]["torch"] == torch.__version__ and rows[0]["roofs"]["bytes"] > 1e8
    out.write_text("\n".join(json.dumps(r) for r in rows[:1]) + "\n")
    assert [(r["layer"], r["phase"], r["rows"]) for r in run()[1]] == cases


def test_matrix_goes_on_after_a_peer_that_fails(tmp_path, monkeypatch):
    def fails(inputs):
        if inputs.trains:
            raise RuntimeError("no kernel image")
        return (inputs.x.clone(),)

    out = tmp_path / "matrix.jsonl"
    monkeypatch.setattr(matrix, "eager", fails)
    monkeypatch.setattr("sys.argv", ["matrix", str(out), "--quick", "--match", "tiny scale"])

    def run() -> list[dict]:
        with pytest.raises(SystemExit) as end:
            matrix.main()
        assert end.value.code == 1, "what failed is not forgotten"
        return [json.loads(line) for line in out.read_text().splitlines()]

    decode, train = run()
    assert "us" in decode and train["failed"] and "us" not in train
    assert report.load(out) == [decode]
    assert len(run()) == TRIES + 1 and len(run()) == TRIES + 1, "once more, and no further time"


def test_matrix_leaves_with_the_gpu_context(tmp_path, monkeypatch):
    """After an illegal access nothing says anything of the other shapes: none of them is marked."""

    def fails(inputs):
        raise RuntimeError("an illegal memory access was encountered")

    class Left(BaseException):
        pass

    def leave(why):
        raise Left(why)

    out = tmp_path / "matrix.jsonl"
    monkeypatch.setattr(matrix, "eager", fails)
    monkeypatch.setattr(harness, "is_lost", lambda device: True)
    monkeypatch.setattr(harness, "leave", leave)
    monkeypatch.setattr("sys.argv", ["matrix", str(out), "--quick", "--match", "tiny scale"])
    with pytest.raises(Left, match="tiny scale decode"):
        matrix.main()
    assert not out.exists() and Journal(out.with_suffix(".journal")).begun.total() == 1
    with pytest.raises(Left, match="tiny scale train"):
        matrix.main()


def test_environment_says_what_the_gpu_was_found_as(monkeypatch):
    found = {
        "nvidia-smi": "580.1, 1980 MHz, 3201 MHz, 1980 MHz, 120.5 W, 700.00 W, 35",
        "git": "",
    }
    monkeypatch.setattr(matrix, "_said", lambda command: found[command[0]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("COMMIT", "abc1234")
    place = matrix.environment()
    assert place["commit"] == "abc1234" and place["device"] == "a GPU"
    assert place["nvidia-smi"]["power.limit"] == "700.00 W" and place["nvidia-smi"]["clocks.sm"] == "1980 MHz"
    found["nvidia-smi"] = ""
    assert matrix.environment()["nvidia-smi"] == {}
    monkeypatch.undo()
    assert matrix._said(["no such program"]) == matrix._said(["false"]) == ""


def test_native_is_a_peer_only_where_cuda_has_a_kernel(monkeypatch):
    """Elsewhere the row would time plain PyTorch under that name."""
    monkeypatch.setattr(matrix, "has_native", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(peft_ops, "plan_tasks", lambda ids, rows, tasks: ids)
    for layer in QUICK_LAYERS:
        for trains in (False, True):
            inputs = tune.Inputs(layer, 32, torch.device("cpu"), torch.bfloat16, sequence=32)
            inputs.trains = trains
            has = "native" in matrix.peers([inputs], with_compile=False)
            assert has == (layer.op in ("linear", "kv", "feedforward", "scale", "concat") and not trains), layer.op


TINY = Case(Layer("tiny", "scale", 64), "train", 64, sequence=16)


def test_matrix_times_nothing_that_is_wrong(monkeypatch):
    right = peft_ops.ia3_scale

    def wrong_gradient(x, ia3_l, task_ids):
        off = 0.05 * ia3_l.sum()
        return right(x, ia3_l, task_ids) + (off - off.detach())

    assert "us" in matrix.row(TINY, torch.device("cpu"), 0.01, False)
    monkeypatch.setattr(peft_ops, "ia3_scale", wrong_gradient)
    assert matrix.row(TINY, torch.device("cpu"), 0.01, False) == matrix.identity(TINY) | {"wrong": True}
    assert "us" in matrix.row(TINY._replace(phase="decode"), torch.device("cpu"), 0.01, False), "the values are right"


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("layer", QUICK_LAYERS, ids=lambda layer: layer.op)
def test_peers_compute_the_same(layer, trains, tuned):
    """A peer that does less work would win: all adapted ones agree with the reference, the bare one does not."""
    inputs = tune.Inputs(layer, 64, torch.device(DEVICE), torch.float32, sequence=32, trains=trains)
    want = tune.results(tune.reference, inputs)
    for peer in (matrix.eager, matrix.ft_style):
        if peer is matrix.ft_style and layer.op in (*tune.ELEMENTWISE, *tune.PROMPTS):
            continue
        ys = [y for y in peer(inputs) if y.is_floating_point()]  # not the mask
        grads = torch.autograd.grad(ys, inputs.leaves(), inputs.dys) if trains else ()
        for got, one in zip((*ys, *grads), want, strict=True):
            torch.testing.assert_close(got, one)
    bare = matrix.bare(inputs)[0]
    assert bare.shape != want[0].shape or not torch.allclose(bare, want[0])


@pytest.mark.parametrize("cases", [CPU_CASES, CASES, QUICK_CASES], ids=["cpu", "gpu", "quick"])
def test_cases_cover_every_operator(cases):
    assert len({json.dumps(matrix.identity(case)) for case in cases}) == len(cases), "a row would stand for two cases"
    ops = {"linear", "kv", "feedforward", "glu", "scale", "gate", "concat", "embed"}
    for phase in ("decode", "train"):
        assert {c.layer.op for c in cases if c.phase == phase} >= ops - (
            {"concat", "embed"} if phase == "decode" else set()
        )


def test_training_peers_run_backward():
    measured = matrix.Measured(TINY, torch.device("cpu"), False)
    x, table = measured.sets[0].leaves()
    for name, call in measured.calls.items():
        call(0)
        assert x.grad is not None and (table.grad is None) == (name == "bare")
    assert measured.saved() == {"bare": 0, "peft_ops": 64 * 64 * 2, "eager": measured.saved()["eager"]}
    assert measured.saved()["eager"] > 64 * 64 * 2, "the gathered vectors are kept too"


def saved_run(slowdown: float = 1.0, machine: float = 1.0, **environment) -> dict:
    """What pytest-benchmark saves of two shapes."""
    place = {
        "device": "a CPU",
        "kind": "cpu",
        "threads": 2,
        "torch": "2.13.0",
        "commit": "abc",
        "roofs": {"flops": 1e11, "bytes": 1e10},
    }
    benchmarks = []
    for layer, phase, tasks in (
        ("T0-3B kv", "decode", 8),
        ("T0-3B kv", "train", 8),
        *(("B", "decode", t) for t in (1, 2, 64)),
    ):
        for number, peer in enumerate(("bare", "peft_ops", "eager")):
            facts = {"layer": layer, "phase": phase, "rows": 8, "tasks": tasks, "flops": 8_000, "bytes": 4_000}
            facts |= {"peer": peer, "ratio": [1 + number / 8, 1.0, 1.5], "noise": [1.0, 0.98, 1.03]}
            if phase == "train":
                facts["saved"] = {"bare": 0, "peft_ops": 64, "eager": 128}
            name, group = (
                f"bench/test_operators.py::test_operator[{layer}-{phase}-{tasks}-{peer}]",
                f"{layer} {phase} {tasks}",
            )
            late = slowdown if peer == "peft_ops" and tasks == 64 else 1.0
            facts["ratio"] = [late * r for r in facts["ratio"]]
            benchmarks.append(
                {"fullname": name, "group": group, "extra_info": facts, "stats": {"median": 2e-6 * late * machine}}
            )
    return {"benchmarks": benchmarks, "machine_info": {"environment": place | environment}}


@pytest.fixture
def store(tmp_path):
    """A folder of saved runs, and a way to add one."""

    def add(number: int, run: dict):
        path = tmp_path / "store" / "Linux" / f"{number:04}_abc.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
        return path

    add.folder = tmp_path / "store"
    return add


def test_report_reads_a_saved_run(store, tmp_path):
    rows = report.load(store(1, saved_run()))
    assert len(rows) == 5 and rows[0]["us"] == {"bare": 2.0, "peft_ops": 2.0, "eager": 2.0}
    assert rows[0]["ratio"]["peft_ops"] == [1.125, 1.0, 1.5] and rows[0]["device"] == "a CPU"
    table = report.ratio_table(rows)
    assert "| T0-3B kv | decode | 8 | 8 | 2.0 | 1.12 | 1.25 | 0.98-1.03 |" in table.splitlines()
    assert "| T0-3B kv | 1.12 (1.25) | 1.12 (1.25) |" in report.summary_table(rows).splitlines()
    written = {path.name for path in report.write(rows, tmp_path / "out")}
    plots = {f"{name}.{kind}" for name in report.PLOTS for kind in ("svg", "png")}
    assert written == {"operators.jsonl", "operators.md"} | plots
    assert report.load(tmp_path / "out" / "operators.jsonl") == rows, "what was written reads the same"


def test_report_shows_kernel_and_wall_time_apart(store, tmp_path):
    rows = report.load(store(1, saved_run()))
    for row in rows:
        row["wall_us"] = {name: 9.0 for name in row["us"]}
        row["wall_ratio"] = {name: [3.5, 3.4, 3.6] for name in row["ratio"]}
    report.write(rows, tmp_path)
    kernel, wall = (tmp_path / "operators.md").read_text().split("What a caller waits for")
    assert " 2.0 |" in kernel and "3.50" not in kernel and " 9.0 | 3.50 |" in wall


def test_compare_holds_the_last_two_runs(store, monkeypatch, capsys):
    def compare_runs():
        monkeypatch.setattr("sys.argv", ["report", "--compare", "--storage", str(store.folder)])
        with pytest.raises(SystemExit) as end:
            report.main()
        return end.value.code, capsys.readouterr().out

    store(1, saved_run(slowdown=9))
    store(2, saved_run())
    store(3, saved_run(slowdown=1.14))
    assert compare_runs()[0] == 0
    store(4, saved_run(slowdown=1.14 * 1.2))
    code, printed = compare_runs()
    assert code == 1 and "5 benchmarks, 1 over" in printed and "1.20 x  test_operator[B-decode-64-peft_ops]" in printed
    store(5, saved_run(slowdown=1.14 * 1.2, machine=2))
    assert compare_runs()[0] == 0, "the bare layer is as much slower"
    store(6, saved_run(threads=8))
    monkeypatch.setattr("sys.argv", ["report", "--compare", "--storage", str(store.folder)])
    with pytest.raises(ValueError, match="the runs cannot be compared: threads was 2, and is 8"):
        report.main()


def test_compare_wants_something_to_compare(store):
    other = saved_run()
    for one in other["benchmarks"]:
        one["fullname"] += "quick"
    with pytest.raises(ValueError, match="no benchmark in common"):
        report.slower(store(1, saved_run()), store(2, other))


def test_overhead_is_of_the_same_call():
    found = overhead.cases(gradients=False)
    assert {name.split(",")[0] for name in found} == public_operators().keys()
    with torch.no_grad():
        for name, public in found.items():
            raw, want = overhead.raw_of(public)(), public()
            first = (t[0] if isinstance(t, (tuple, list)) else t for t in (raw, want))
            torch.testing.assert_close(*first, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    measured = overhead.measure(1, "ia3_scale, one task")
    assert (
        measured.keys() == {"ia3_scale, one task"} and measured["ia3_scale, one task"].keys() == overhead.BUDGET.keys()
    )
    assert all(raw > 0 and raw + more > 0 for raw, more in measured["ia3_scale, one task"].values())


def test_pieces_go_on_where_they_stopped(tmp_path, capsys):
    path = str(tmp_path / "found.json")
    first = Pieces(path, {"device": "a CPU"})
    first.add("a", lambda: 1)
    assert json.loads((tmp_path / "found.json").read_text()) == {"device": "a CPU", "a": 1}, "written as it comes"
    Pieces(path, {}, resume=True).add("a", lambda: 2)
    late = Pieces(path, {}, resume=True, budget=-1)
    late.add("b", lambda: 3)
    assert late == first and "left out, the budget is spent: b" in capsys.readouterr().out
    again = Pieces(path, {})
    again.add("a", lambda: 4)
    assert json.loads((tmp_path / "found.json").read_text()) == {"a": 4}


def test_journal_puts_last_what_did_not_end(tmp_path, capsys):
    path, device, done = tmp_path / "found.journal", torch.device("cpu"), []

    def piece(name, outcome=True):
        def run():
            done.append(name)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return name, run

    class Killed(BaseException):
        pass

    pieces = [piece("a"), piece("kills", Killed()), piece("wrong", False), piece("fails", ValueError()), piece("b")]

    def work(**more):
        done.clear()
        return dict(Journal(path).work(pieces, device, **more))

    with pytest.raises(Killed):
        work()
    assert done == ["a", "kills"]
    with pytest.raises(Killed):
        work()
    assert done == ["wrong", "fails", "b", "kills"], "first what was not tried yet"
    assert work() == {"kills": "left out", "wrong": "wrong", "fails": "failed"}
    assert work() == {"kills": "left out", "wrong": "left out", "fails": "left out"} and not done
    assert "after 2 tries it never ended: kills" in capsys.readouterr().out
    assert Journal(path).right() == {"a", "b"}


def test_journal_asks_for_nothing_once_the_budget_is_spent(capsys):
    """Another piece's inputs would be built, and its kernels compiled, to be left out."""

    def pieces():
        yield "first", lambda: True
        raise AssertionError("asked for another")

    assert not list(Journal(None).work(pieces(), torch.device("cpu"), budget=-1))
    assert "the budget is spent" in capsys.readouterr().out


def test_an_interrupt_is_no_try(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    path = tmp_path / "found.journal"
    for _ in range(TRIES + 1):
        with pytest.raises(KeyboardInterrupt):
            list(Journal(path).work([("slow", interrupted)], torch.device("cpu")))
    assert list(Journal(path).work([("slow", lambda: True)], torch.device("cpu"))) == [("slow", "right")]


def test_a_piece_that_hangs_ends_its_process(tmp_path):
    script = (
        "import sys, time, torch, pathlib; from bench.harness import Journal\n"
        "pieces = [('hangs', lambda: time.sleep(60)), ('b', lambda: True)]\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "print(list(journal.work(pieces, torch.device('cpu'), limit=0.2)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "found.journal")]
    first, second = (run_outside(command) for _ in range(2))
    assert first.returncode == LOST and "hangs did not end within 0.2 s" in first.stdout
    assert second.returncode == LOST and Journal(tmp_path / "found.journal").right() == {"b"}


def test_gpu_check_tells_nan_infinity_and_the_largest_number_apart(monkeypatch):
    """In fp16 a number that stands in for NaN beyond 65504 is infinity, and infinity then stands for 65504."""
    device = torch.device("cpu")
    checks, right = dict(gpu_check.native_kernels((3,), device)), peft_ops.ia3_scale
    fill = {"native": float("nan"), "reference": float("nan")}
    monkeypatch.setattr(
        peft_ops, "ia3_scale", lambda *args: right(*args).index_fill(0, torch.tensor([1]), fill[peft_ops.get_backend()])
    )
    monkeypatch.setattr(torch, "randint", lambda low, high, size, device: torch.zeros(size, dtype=torch.int64))
    assert checks["native M=3 N=64 float16"]()
    for fill["native"], fill["reference"] in itertools.permutations((float("nan"), float("inf"), 65504.0), 2):
        assert not checks["native M=3 N=64 float16"](), fill


@pytest.mark.kernels
@needs_kernels
def test_gpu_check_begins_with_what_tells_most(monkeypatch):
    """Every operator, then what only a GPU shows, before any table entry; each check once."""
    monkeypatch.setattr(gpu_check, "only_on_a_gpu", lambda *args: iter([("streams and graphs", bool)]))
    device = torch.device(DEVICE)
    names = [name for name, _ in gpu_check.once(gpu_check.checks(device, small=True))]
    first = [name for name, _ in gpu_check.first_checks(device, small=True)]
    assert names[: len(first)] == first and len(set(names)) == len(names) and first[-1] == "streams and graphs"
    assert all(name in first for name in ("small kv M=16 bfloat16", "small glu M=512 bfloat16 with gradients"))
    assert {layer.op for layer in gpu_check.FIRST} == {"kv", "glu", "linear", "feedforward", "scale", "gate"}


def test_gpu_check_leaves_graphs_out_without_an_allocator(monkeypatch):
    def named():
        found = gpu_check.only_on_a_gpu([Layer("tiny", "kv", 32, 64)], (8,), torch.device("cuda"), True)
        return [name.split("M=8 ")[1] for name, _ in found]

    assert named() == ["repeats", "side streams", "graph", "no sync"]
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert named() == ["repeats", "side streams", "no sync"]


@pytest.mark.kernels
@needs_kernels
def test_gpu_check_asks_every_key(tuned, monkeypatch):
    """Every tunable function, with each of its flags, is asked by some form of call."""
    asked, candidates = set(), tune.offline.candidates
    for module in (tiles, *(ops.tiles for ops in (tune.ia3_linear, tune.ia3_kv_linear, tune.ia3_glu))):
        monkeypatch.setattr(module, "linear_is_small", lambda M, N, capability: M <= tiles.SMALL_M)
    monkeypatch.setattr(tune.offline, "candidates", lambda key: asked.add((key[0], *key[5:])) or candidates(key))
    with torch.no_grad():
        for _ in gpu_check.checks(torch.device(DEVICE), small=True):
            pass
    names = {key[0] for key in asked}
    assert names == {name for name, value in vars(tiles).items() if hasattr(value, "candidates")}
    flags = {(key[0], flag) for key in asked for flag in key[1:]}
    fp32 = {("linear_vector", "fp32")}  # a GPU's fp32 is the vendor's
    assert flags | fp32 == {
        (name, flag) for name in names for flag in getattr(tiles, name).candidates.__kwdefaults__ or ()
    }


def test_gpu_check_knows_all_that_prompts_come_with(monkeypatch):
    """Without kernels too: each operator beside its reference, wrong values and wrong gradients are seen."""
    device = torch.device("cpu")
    named = dict(gpu_check.prompts(64, device))
    assert {name.split()[0] for name in named} == {"prompt_concat", "prompt_concat_packed", "prompt_embed"}
    picked = [name for name in named if "float16 added" in name or "packed" in name]
    with peft_ops.set_backend("reference"):
        assert all(named[name]() for name in picked)
    right = peft_ops.prompt_concat

    def shifted(*args, **kwargs):
        batch = right(*args, **kwargs)
        return batch._replace(position_ids=batch.position_ids + 1)

    def detached(tokens, embedding, prompts, *args, **kwargs):
        return right(tokens, embedding, prompts + prompts - prompts.detach(), *args, **kwargs)

    for wrong in (shifted, detached):
        monkeypatch.setattr(peft_ops, "prompt_concat", wrong)
        with peft_ops.set_backend("reference"):
            assert not named["prompt_concat left E=64 float16 added"]()


def run_outside(command: list[str], **env: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_suite_walks_its_path(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = run_outside(
        [sys.executable, "-m", "pytest", "bench", "--quick", "--no-compile", "-k", "tiny-linear-decode or tiny-concat",
         "-q", "-p", "no:cacheprovider", "--benchmark-autosave", f"--benchmark-storage={tmp_path}"]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = report.saved_runs(tmp_path)
    linear, concat = report.load(run)
    assert linear["ratio"].keys() - {"peft"} == {"bare", "peft_ops", "ft_style", "eager", BASELINE_AGAIN}
    assert concat["us"].keys() == {"bare", "peft_ops", "eager"} and concat["phase"] == "train" and concat["saved"]
    assert linear["flops"] == 2 * 16 * 64 * 128 and linear["torch"] == torch.__version__


@pytest.fixture
def gpu_script(tmp_path):
    """bench/gpu.sh into a folder, with a stand-in for Python that says what it was called with, if one is given."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")

    def run(*parts: str, fake: str | None = None, **env: str) -> subprocess.CompletedProcess:
        python = sys.executable
        if fake is not None:
            python = str(tmp_path / "python")
            (tmp_path / "python").write_text(f"#!/usr/bin/env bash\n{fake}\n")
            (tmp_path / "python").chmod(0o755)
        return run_outside(["bash", "bench/gpu.sh", str(tmp_path / "out"), *parts], PYTHON=python, **env)

    run.out = tmp_path / "out"
    return run


def kept(out) -> dict[str, str]:
    with tarfile.open(out / "results.tgz") as archive:
        return {m.name.removeprefix("./"): archive.extractfile(m).read().decode() for m in archive if m.isfile()}


def test_gpu_script_reports_what_there_is(gpu_script, tmp_path, store):
    pytest.importorskip("matplotlib")
    report.write(report.load(store(1, saved_run())), tmp_path / "earlier")
    (tmp_path / "earlier/operators.jsonl").rename(tmp_path / "earlier/matrix.jsonl")
    done = gpu_script("report", "nothing", EARLIER=str(tmp_path / "earlier"))
    assert "T0-3B kv" in (gpu_script.out / "operators.md").read_text(), done.stdout + done.stderr
    assert (gpu_script.out / "parts.txt").read_text().startswith("report status=0")
    assert done.returncode == 2 and "no part named nothing" in done.stdout
    assert len(list(gpu_script.out.iterdir())) <= 8, "few to look at, and to bring home"


CPU = 'case "$*" in *is_available*) echo 0; exit ;; esac; '
GPU = 'case "$*" in *is_available*) echo 1; exit ;; *capability*) echo 9.0; exit ;; esac; '


def test_gpu_script_keeps_every_log(gpu_script, tmp_path):
    """A rerun adds to a log, also where the machine is another and has only what was brought along."""
    gpu_script("matrix", fake=CPU + 'echo "first $COMMIT"', COMMIT="abc1234")
    shutil.move(gpu_script.out / "results.tgz", tmp_path / "brought.tgz")
    shutil.rmtree(gpu_script.out)
    gpu_script("matrix", fake=CPU + "echo second", EARLIER=str(tmp_path / "brought.tgz"))
    log = kept(gpu_script.out)["matrix.log"]
    assert "first abc1234" in log and "second" in log and log.count("== matrix: ") == 2 and "commit abc1234" in log


def test_gpu_script_goes_on_behind_what_took_its_process(gpu_script):
    counts = 'echo x >>"$COUNT"; [ "$(wc -l <"$COUNT")" -lt 3 ] && exit 75; exit 0'
    done = gpu_script("matrix", fake=CPU + counts, COUNT=str(gpu_script.out.parent / "count"))
    assert "matrix status=0" in done.stdout and "processes=3" in done.stdout


def test_gpu_script_ends_in_its_time(gpu_script):
    """One deadline for the whole call, whatever each part may take."""
    begin = time.monotonic()
    done = gpu_script("build", "first", "matrix", fake=GPU + "exec sleep 15", TOTAL_SECONDS="12")
    assert time.monotonic() - begin < 20
    assert "build status=124" in done.stdout and "matrix: left out, the time is spent" in done.stdout


def test_gpu_script_runs_every_test_file(gpu_script):
    """On a GPU all but what a missing module forbids; without one the first file."""
    done = gpu_script("tests", fake=GPU + 'case "$*" in *find_spec*) echo peft ;; *"-m pytest"*) echo "$@" ;; esac')
    command = next(line for line in done.stdout.splitlines() if line.startswith("-m pytest"))
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    peft = {name for name, text in files.items() if re.search(r"^(import|from) (peft[ .\n]|tests\.tiny)", text, re.M)}
    asked = re.findall(r"test_\w+\.py", command)
    assert set(asked) == files.keys() - peft and "-m not nightly" in command and "test_launch.py" in asked
    marked = ["mark.kernels" in files[name] for name in asked]
    assert marked == sorted(marked, reverse=True), "kernels first"
    done = gpu_script("tests", fake=CPU + 'case "$*" in *"-m pytest"*) echo "$@" ;; esac')
    assert len(re.findall(r"test_\w+\.py", done.stdout.splitlines()[-2])) == 1


def test_gpu_script_counts_what_the_sanitizer_found_nothing_in(gpu_script, tmp_path):
    """A check that computes the right thing past the end of a tensor is not done."""
    (tmp_path / "compute-sanitizer").write_text(
        '#!/usr/bin/env bash\nwhile [ "$1" != --done ]; do shift; done; echo "right a" >>"$2"\n'
        'echo "caching ${PYTORCH_NO_CUDA_MEMORY_CACHING:-on}"; exit "$FOUND"\n'
    )
    (tmp_path / "compute-sanitizer").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script("sanitizer", fake=GPU, PATH=path, FOUND="9")
    assert "sanitizer-memcheck status=9" in done.stdout and "memcheck.txt" not in kept(gpu_script.out)
    done = gpu_script("sanitizer", fake=GPU, PATH=path, FOUND="0")
    assert kept(gpu_script.out)["memcheck.txt"] == "right a\n"
    assert re.findall("caching (.*)", done.stdout) == ["1", "on", "1"], "a tool for accesses sees each allocation"


def test_profiling_leaves_the_clocks_alone():
    script = (ROOT / "bench/gpu.sh").read_text()
    assert len(re.findall(r"\bncu --", script)) == len(re.findall(r"\bncu --clock-control none", script)) == 1


def test_tests_are_resumed_one_by_one(tmp_path):
    """What passed is not run again; what took its process with it comes last, and twice at most."""
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_kills(): os._exit(75)\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_passes(n): pass\n"
        "def test_fails(): assert False\n"
    )
    journal = tmp_path / "tests.journal"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.resume"]
    command += ["--journal", str(journal), str(tmp_path / "test_some.py")]
    first, second, third = (run_outside(command) for _ in range(3))
    assert first.returncode == second.returncode == LOST, first.stdout + second.stdout
    assert third.returncode == 1 and "1 failed, 4 deselected" in third.stdout, third.stdout
    found = Journal(journal)
    assert len(found.right()) == 3 and sum(map(found.is_spent, found.begun)) == 2


@pytest.mark.kernels
@needs_kernels
def test_gpu_check_sees_a_wrong_kernel(tuned, monkeypatch):
    device = torch.device(DEVICE)
    name, check = next(gpu_check.table_entries([Layer("tiny", "linear", 32, 64)], (8,), device))
    with torch.no_grad():
        assert check(), name
        right = tune.peft_ops.ia3_linear
        monkeypatch.setattr(tune.peft_ops, "ia3_linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)
        assert not check()


def test_task_bank_counts_hits_and_says_what_is_computed():
    sizes = task_bank.widths(layers=1)
    sizes = {module: width // 512 for module, width in sizes.items()}
    everything = task_bank.hits(sizes, 1.0, slots=16, tasks=10, batches=50, capacity=10)
    assert everything["on the device"] == 1 and everything["else in host memory"] is None
    some, more = (task_bank.hits(sizes, 1.0, slots, tasks=100, batches=50, capacity=100) for slots in (8, 32))
    assert 0 < some["on the device"] < more["on the device"] < 1
    draws = [int(name) for rows in task_bank.zipf(1.0, 100, 500) for name in rows]
    assert 0.17 < draws.count(0) / len(draws) < 0.22, "1 / H(100) is 0.193"
    swap = task_bank.swaps(sizes, 8)
    assert "computed" in task_bank.million(sizes, swap)["note"] and min(swap.values()) > 0
