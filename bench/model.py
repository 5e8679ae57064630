"""What a shape should cost, before a GPU says so: waves of tiles, bytes and operations at the rates of tiles.CHIPS.

    python -m bench.model              # every layer and row count of bench/shapes.py on sm_90
    python -m bench.model --sm 80

Predictions, not measurements: they order candidates and show which limit a shape meets. What a GPU measures corrects
the rates in kernels/tiles.py and the constants below.
"""

import argparse
from typing import NamedTuple

from bench.shapes import LAYERS, ROWS, Layer
from peft_ops.kernels import tiles

LAUNCH = 2e-6  # seconds that a kernel takes however small it is
LATENCY = 0.7e-6  # seconds from a load to its data: bandwidth x latency must be in flight to reach the bandwidth
# bandwidth of the L2 cache over DRAM's. sm_90: what 128 x 256 tiles draw at 790 TFLOP/s; the others as published
L2_SPEEDUP = {80: 2.6, 86: 4.0, 89: 6.0, 90: 2.3, 100: 2.6, 120: 4.5}
EPILOGUE = 0.5e-6  # seconds that a persistent tile's epilogue holds the tensor cores up, where nothing overlaps it
ITEM = 2  # bytes of bf16


class Prediction(NamedTuple):
    """Seconds, and what holds them up: "compute", "memory", or "latency" (too few bytes in flight)."""

    seconds: float
    limit: str


def _l2_speedup(chip: tiles.Chip) -> float:
    return next(L2_SPEEDUP[capability] for capability, known in tiles.CHIPS.items() if known == chip)


def moved(seconds_compute: float, nbytes: float, in_flight: float, chip: tiles.Chip) -> Prediction:
    bandwidth = chip.bandwidth * 1e12
    seconds_memory = nbytes / min(bandwidth, in_flight / LATENCY)
    if seconds_compute >= seconds_memory:
        return Prediction(LAUNCH + seconds_compute, "compute")
    return Prediction(LAUNCH + seconds_memory, "memory" if in_flight >= bandwidth * LATENCY else "latency")


def persistent(M: int, N: int, K: int, tile: dict, chip: tiles.Chip, products: int = 1, outputs: int = 1) -> Prediction:
    """A persistent matmul of `products` weights [N, K] that writes `outputs` tensors [M, N]."""
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    programs = chip.multiprocessors * tile["BLOCKS_PER_SM"]
    waves = tiles.cdiv(tiles.cdiv(M, m) * tiles.cdiv(N, n), programs)
    rate = chip.tflops * 1e12 * chip.efficiency / programs
    hidden = tile["SPECIALIZE"] or tile["BLOCKS_PER_SM"] > 1
    seconds = waves * (products * 2 * m * n * K / rate + (0 if hidden else EPILOGUE))
    from_l2 = ITEM * K * (products * N * tiles.cdiv(M, m) + M * tiles.cdiv(N, n))
    nbytes = max(ITEM * (M * K + products * N * K + outputs * M * N), from_l2 / _l2_speedup(chip))
    return moved(seconds, nbytes, chip.bandwidth * 1e12 * LATENCY, chip)


def small(M: int, N: int, K: int, tile: dict, chip: tiles.Chip, products: int = 1, outputs: int = 1) -> Prediction:
    """A matmul of few rows: weights leave DRAM once; x per column tile, and weights per row tile, the L2 cache."""
    m, n, k, parts = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"], tile.get("SPLIT", 1)
    blocks = tiles.cdiv(M, m) * tiles.cdiv(N, n) * parts
    stages = tile.get("num_stages", 3)
    stage = ITEM * k * (products * n + min(m, M))
    resident = max(1, min(8, chip.shared_memory // (stage * stages)))
    in_flight = min(blocks, resident * chip.multiprocessors) * stage * (stages - 1)
    sums = 2 * 4 * parts * products * M * N if parts > 1 else 0
    from_l2 = ITEM * K * (products * N * tiles.cdiv(M, m) + M * tiles.cdiv(N, n)) + sums
    nbytes = ITEM * (products * N * K + M * K + outputs * M * N)
    per_block = products * 2 * max(m, 16) * n * K / parts
    compute = tiles.cdiv(blocks, chip.multiprocessors) * per_block / (chip.tflops * 1e12 / chip.multiprocessors)
    return moved(compute, max(nbytes, from_l2 / _l2_speedup(chip)), in_flight, chip)


def vendor(M: int, N: int, K: int, chip: tiles.Chip) -> Prediction:
    """The vendor's GEMM: the best of what we could do ourselves, at its own rate."""
    splits = [1, 2, 4, 8] if M <= 1024 else [1]
    shapes = [(16, 64), (32, 128), (64, 64), (64, 128), (128, 128), (128, 256)]
    found = []
    for m, n in shapes:
        for parts in splits:
            tile = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, SPLIT=parts, num_stages=4)
            found.append(small(M, N, K, tile, chip))
    return min(found)


def elementwise(elements: float, passes: int, chip: tiles.Chip) -> float:
    return LAUNCH + ITEM * passes * elements / (chip.bandwidth * 1e12)


def bare(layer: Layer, M: int, chip: tiles.Chip) -> float:
    """The layer without an adapter: vendor GEMMs, and one fused gate for a gated layer."""
    _, op, N, K, activation = layer
    count = 2 if op in ("kv", "glu") else 1
    seconds = vendor(M, count * N, K, chip).seconds  # both weights in one, the strongest form
    if op == "glu":
        return seconds + elementwise(M * N, 3, chip)
    return seconds + (elementwise(M * N, 2, chip) if activation else 0)


def ft_style(layer: Layer, M: int, chip: tiles.Chip) -> float:
    """Vendor GEMMs and one fused elementwise pass that also scales."""
    _, op, N, K, activation = layer
    if op == "glu" or activation:
        return bare(layer, M, chip)  # the pass is there already, and takes the scale with it
    elements = M * K if op == "feedforward" else (2 if op == "kv" else 1) * M * N
    return bare(layer, M, chip) + elementwise(elements, 2, chip)


def choices(layer: Layer, M: int, capability: int) -> list[tuple[str, dict | None, Prediction]]:
    """(kernel, tile, prediction) of every candidate, the one that dispatch takes first."""
    _, op, N, K, activation = layer
    chip, erf = tiles.chip(capability), activation == "gelu"
    products = 2 if op in ("kv", "glu") else 1
    outputs = 2 if op == "kv" else 1
    width = products * N
    other = ("vendor", None, Prediction(ft_style(layer, M, chip), "vendor"))
    if op == "feedforward":
        found = tiles.linear_feedforward.candidates(M, N, K, capability)
        ours = [("prologue", tile, persistent(M, N, K, tile, chip)) for tile in found]
        return [*ours, other] if tiles.feedforward_is_fused(M, N, K, capability) else [other, *ours]
    if op != "glu" and M <= tiles.VECTOR_M:
        tile = tiles.linear_vector(M, N, K, capability)
        found = [("vector", tile, small(M, width, K, tile, chip, outputs=1))]
    elif tiles.linear_is_small(M, width, capability):
        if op == "glu":
            found = tiles.glu_linear_small.candidates(M, N, K, capability)
            found = [("small", tile, small(M, N, K, tile, chip, products=2)) for tile in found]
        else:
            found = tiles.linear_small.candidates(M, width, K, capability, erf=erf)
            found = [("small", tile, small(M, width, K, tile, chip)) for tile in found]
    elif products == 2:
        found = tiles.dual_linear.candidates(M, N, K, capability, gated=op == "glu", erf=erf)
        found = [("dual", tile, persistent(M, N, K, tile, chip, 2, outputs)) for tile in found]
    else:
        found = tiles.linear.candidates(M, N, K, capability, erf=erf)
        found = [("persistent", tile, persistent(M, N, K, tile, chip)) for tile in found]
    fused = tiles.linear_is_fused(M, N if op == "glu" else width, K, capability, gated=op == "glu")
    return [*found, other] if fused else [other, *found]


def short(tile: dict | None) -> str:
    if tile is None:
        return ""
    text = "x".join(str(tile[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    split = f" split {tile['SPLIT']}" if tile.get("SPLIT", 1) > 1 else ""
    return text + split + " specialised" * tile.get("SPECIALIZE", False) + " x2" * (tile.get("BLOCKS_PER_SM", 1) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, default=90, choices=sorted(tiles.CHIPS))
    args = parser.parse_args()
    chip = tiles.chip(args.sm)
    print(f"sm_{args.sm}, predicted (not measured): {chip.tflops:g} TFLOP/s, {chip.bandwidth:g} TB/s")
    print(
        "bare: the layer without adapters. ft_style: vendor GEMM and one elementwise pass; peft_ops: what runs; both /"
    )
    print("bare. Named last: a candidate that should be at least 3 % faster.")
    titles = "bare us", "ft_style", "peft_ops"
    print(f"{'layer':24} {'rows':>5}", *(f"{title:>9}" for title in titles), "limit    what runs; what would be faster")
    for layer in LAYERS:
        for M in ROWS:
            base = bare(layer, M, chip)
            found = choices(layer, M, args.sm)
            kernel, tile, ours = found[0]
            best = min(found, key=lambda c: c[2].seconds)
            wins = best[2].seconds < 0.97 * ours.seconds
            better = f"; {best[0]} {short(best[1])} {best[2].seconds / base:.3f}" if wins else ""
            print(
                f"{layer.name:24} {M:5} {base * 1e6:9.1f} {ft_style(layer, M, chip) / base:9.3f} "
                f"{ours.seconds / base:9.3f} {ours.limit:8} {kernel} {short(tile)}{better}"
            )


if __name__ == "__main__":
    main()
