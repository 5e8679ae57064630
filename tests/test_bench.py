"""Launch parameters, the cost model that argues for them, and the tools that measure them."""

import json

import pytest
import torch

from bench import gpu_check, matrix, model, task_bank, tune
from bench.harness import BASELINE_AGAIN, Ratio, compare
from bench.shapes import LAYERS, ROWS, Layer
from peft_ops.kernels import tiles
from tests.conftest import DEVICE, KERNELS

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
    with torch.no_grad():
        ratios, entries = tune.measure(Layer("tiny", "linear", 64, 128), 8, torch.device(DEVICE), seconds=0.01)
    assert not entries.keys() & ratios.keys() and "WRONG" in capsys.readouterr().out


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
    assert code == 0 and [(r["layer"], r["rows"]) for r in rows] == [
        ("tiny feedforward", 16),
        ("tiny feedforward", 1024),
    ]
    assert {"bare", "peft_ops", "ft_style", "eager", "peft", BASELINE_AGAIN} <= rows[0]["ratio"].keys()
    assert rows[0]["flops"] == 2 * 16 * 64 * 128 and rows[0]["torch"] == torch.__version__
    out.write_text("\n".join(json.dumps(r) for r in rows[:1]) + "\n")
    assert [(r["layer"], r["rows"]) for r in run()[1]] == [("tiny feedforward", 16), ("tiny feedforward", 1024)]


def test_matrix_times_nothing_that_is_wrong(monkeypatch):
    monkeypatch.setattr(matrix, "is_right", lambda inputs: False)
    assert matrix.row(Layer("tiny", "linear", 16, 32), 4, torch.device("cpu"), 0.01, False) == {"wrong": True}


def test_peers_compute_the_same(tuned):
    """A peer that does less work would win: all adapted ones agree with the reference, the bare one does not."""
    for layer in matrix.QUICK:
        inputs = tune.Inputs(layer, 16, torch.device(DEVICE), torch.float32)
        want = tune.apply(tune.reference, inputs)
        for peer in (matrix.eager, matrix.ft_style):
            for got, one in zip(peer(inputs), want, strict=True):
                torch.testing.assert_close(got, one)
        assert not torch.allclose(matrix.bare(inputs)[0], want[0])


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
