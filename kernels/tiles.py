"""Launch parameters: pure functions of shape, item size and compute capability. Nothing tunes at run time.

A tunable function lists its candidates, the first of which runs unless TUNED names another. Every candidate compiles
without a spill for its architecture (python -m bench.offline); none is measured on a GPU yet.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

PLAN_TILE = 128  # rows of one tile of a task plan
CHUNK_ROWS = 256  # rows of one task that are summed in one piece; part of the result, so never a tuning parameter
SORT_BLOCK = 64  # ids per program when a backward sorts them; 128 compares with 128 in 255 registers
SORT_LIMIT = 4096  # ids from which torch.sort sorts them: the kernel compares each with each
SMALL_M = 64  # up to here a matmul reads its weights once in one row tile, and gathers each row's scale
VECTOR_M = 4  # up to here fp32 FMAs on 16-byte loads beat a tensor-core tile that is three quarters padding


class Chip(NamedTuple):
    """What the choices below know of an architecture. Rates: data sheets times 0.8 and 0.9, sm_90 as an H200 holds."""

    multiprocessors: int
    shared_memory: int  # bytes that one block may have
    tflops: float  # TFLOP/s of a vendor GEMM in bf16
    bandwidth: float  # TB/s of a copy
    efficiency: float  # vendor GEMM's time over that of the persistent kernel, published for other Triton GEMMs


CHIPS = {
    80: Chip(108, 166_912, 250, 1.8, 0.93),  # A100
    86: Chip(84, 101_376, 100, 0.54, 0.93),  # A10, RTX 3090
    89: Chip(142, 101_376, 290, 0.78, 0.93),  # L40S, L4, RTX 4090
    90: Chip(132, 232_448, 790, 4.3, 0.97),  # H100, H200
    100: Chip(148, 232_448, 1800, 7.2, 0.90),  # B200
    120: Chip(188, 101_376, 400, 1.6, 0.93),  # RTX PRO 6000, RTX 5090
}

# (function, capability, bucket(M), N, K, *names of its flags that are true): one of its candidates; or under "vendor"
# and "vendor feedforward", whether the vendor's matmul and an elementwise pass are the faster.
# `python -m bench.tune` prints lines for this table.
TUNED: dict[tuple, dict | bool] = {}


def chip(capability: int) -> Chip:
    """The nearest known architecture below; what is older than all gets the least of them."""
    return CHIPS[max((known for known in CHIPS if known <= capability), default=86)]


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def bucket(M: int) -> int:
    """M rounded up to a power of two: a decode batch that grows by a row keeps its kernel. From 8192 on all are one."""
    return min(next_power_of_2(M), 8192)


def tunable(candidates: Callable[..., list[dict]]) -> Callable[..., dict]:
    """A function of (M, N, K, capability, *, flags) that returns its first candidate, or the one TUNED names."""
    name, defaults = candidates.__name__, candidates.__kwdefaults__ or {}

    @wraps(candidates)
    def choose(M: int, N: int, K: int, capability: int, **flags: bool) -> dict:
        flags = defaults | flags
        tuned = TUNED.get((name, capability, bucket(M), N, K, *sorted(flag for flag in flags if flags[flag])))
        return tuned or candidates(M, N, K, capability, **flags)[0]

    choose.candidates = candidates
    return choose


def rowwise(M: int, N: int) -> dict:
    """Elementwise kernels: 4096 elements a tile, 4 warps, so that each thread has four 16-byte accesses in flight."""
    block_n = min(max(next_power_of_2(N), 16), 1024)
    block_m = min(4096 // block_n, next_power_of_2(M))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)


def scale_backward(N: int, erf: bool) -> dict:
    """16 x 256 with 4 warps: about 100 registers, five blocks per SM (sm_90). erf spills there: gelu takes half."""
    return dict(BLOCK_M=8 if erf else 16, BLOCK_N=min(max(next_power_of_2(N), 16), 256), num_warps=4)


def sum_chunks(N: int) -> dict:
    return dict(BLOCK_N=min(max(next_power_of_2(N), 16), 256), num_warps=2)


def glu_backward(N: int) -> dict:
    """8 x 256 with 4 warps: 64 to 96 registers and six 16-byte loads in flight per thread."""
    return dict(BLOCK_M=8, BLOCK_N=min(max(next_power_of_2(N), 16), 256), num_warps=4)


def prompt_concat(E: int) -> dict:
    """A tile of 4096 elements, 4 warps: four 16-byte stores per thread."""
    block_e = min(max(next_power_of_2(E), 16), 4096)
    return dict(BLOCK_ROWS=4096 // block_e, BLOCK_E=block_e, num_warps=4)


def prompt_backward(E: int) -> dict:
    return dict(BLOCK_E=min(max(next_power_of_2(E), 16), 1024), num_warps=4)


def fusion_pays(capability: int, flops: float, saved: float, handicap: float = 0.0) -> bool:
    """Whether our matmul takes less time than the vendor's plus the elementwise pass that it saves.

    flops, saved: operations of the matmul and bytes of the pass, both per output element; M and N cancel. One pass over
    16-bit outputs pays for sm_90 up to K = 11,880, for sm_80 up to 3,690.
    """
    tflops, bandwidth, efficiency = chip(capability)[2:]
    return flops / tflops * (1 / (efficiency - handicap) - 1) <= saved / bandwidth


def linear_is_fused(M: int, N: int, K: int, capability: int, gated: bool = False) -> bool:
    """Whether 16-bit x runs our matmul, or the vendor's and one elementwise pass. Decode always does: its cost is the
    weights, and the pass would be a launch. gated: two products, and a pass that reads both and writes one."""
    key = "vendor", capability, bucket(M), N, K, *["gated"][: int(gated)]
    if key in TUNED:
        return not TUNED[key]
    if linear_is_small(M, 2 * N if gated else N, capability):
        return True
    return fusion_pays(capability, 4 * K if gated else 2 * K, 6 if gated else 4)


def feedforward_is_fused(M: int, N: int, K: int, capability: int) -> bool:
    """Whether the input is scaled in registers on its way to the tensor cores, or by a pass of its own.

    The way through registers is taken to cost 7 % (not measured); the pass over x is 367 / N of the matmul on sm_90.
    """
    if ("vendor feedforward", capability, bucket(M), N, K) in TUNED:
        return not TUNED["vendor feedforward", capability, bucket(M), N, K]
    return not linear_is_small(M, N, capability) and fusion_pays(capability, 2 * N, 4, handicap=0.07)


def _persistent(m: int, n: int, k: int, warps: int, stages: int, specialize: bool = False, per_sm: int = 1) -> dict:
    tile = dict(SPECIALIZE=specialize, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8)
    return tile | dict(BLOCKS_PER_SM=per_sm, num_warps=warps, num_stages=stages)


def _by_waves(found: list[dict], M: int, N: int, capability: int) -> list[dict]:
    """Sorted by the time of their waves of tiles, where the last one takes as long as a full one. Half the tile draws a
    third more from the L2 cache, and is taken to cost 15 % more time (not measured)."""
    largest = max(tile["BLOCK_M"] * tile["BLOCK_N"] for tile in found)

    def cost(tile: dict) -> float:
        area = tile["BLOCK_M"] * tile["BLOCK_N"]
        waves = cdiv(cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]), chip(capability).multiprocessors)
        return waves * area * (1.0 if area == largest else 1.15)

    return sorted(found, key=cost)


@tunable
def linear(M: int, N: int, K: int, capability: int, *, erf: bool = False, runs: bool = False) -> list[dict]:
    """Persistent TMA matmul. 128 x 256 has the best reuse, 128 x 128 the shorter last wave; erf spills at 128 x 256.

    The specialised twin, one warp group loading while two multiply, is clean with every epilogue at 128 x 128; at
    128 x 256 it spills with a bias, and a loop over runs of tasks fails to compile at all.
    """
    kind = chip(capability)
    if kind.shared_memory < 150_000:
        return [_persistent(128, 128, 32, 8, 4), _persistent(128, 64, 64, 4, 3)]
    if kind.shared_memory < 200_000:
        return [_persistent(128, 128, 64, 8, 3), _persistent(128, 128, 32, 8, 4)]
    square, wide = _persistent(128, 128, 64, 8, 4), _persistent(128, 256, 64, 8, 3)
    if erf and capability >= 100:  # 128 x 128 spills up to 12 there
        return [_persistent(128, 64, 64, 4, 4)]
    found = [square] if erf or capability >= 100 else _by_waves([wide, square], M, N, capability)
    if capability == 90:
        found += [_persistent(64, 128, 64, 4, 3, per_sm=2)]
        found += [] if runs else [_persistent(128, 128, 64, 4, 4, specialize=True)]
    return found


@tunable
def linear_feedforward(M: int, N: int, K: int, capability: int) -> list[dict]:
    """Persistent TMA matmul whose left operand passes through registers, where it is scaled."""
    kind = chip(capability)
    if kind.shared_memory < 150_000:
        return [_persistent(128, 128, 32, 8, 4)]
    if kind.shared_memory < 200_000:
        return [_persistent(128, 128, 64, 8, 3)]
    square, wide = _persistent(128, 128, 64, 8, 4), _persistent(128, 256, 64, 8, 3)
    if capability >= 100:
        return [square]
    found = _by_waves([wide, square], M, N, capability)
    return found + [_persistent(128, 256, 64, 4, 3, specialize=True), _persistent(128, 128, 64, 4, 4, specialize=True)]


def linear_is_small(M: int, N: int, capability: int) -> bool:
    """Whether small tiles with split K serve: few rows, or up to 1024 whose 128 x 128 tiles leave most SMs idle."""
    blocks = cdiv(bucket(M), 128) * cdiv(N, 128)
    return M <= SMALL_M or (M <= 1024 and 2 * blocks <= chip(capability).multiprocessors)


def split_k(blocks: int, K: int, block_k: int, capability: int) -> int:
    """Parts of K, a power of two: enough programs for 0.7 of the SMs, at least 4 K-steps in each, at most 8."""
    parts = 1
    while parts < 8 and blocks * parts < 0.72 * chip(capability).multiprocessors and K >= 8 * parts * block_k:
        parts *= 2
    return parts


def _with_splits(tile: dict, blocks: int, K: int, capability: int) -> list[dict]:
    """The tile with the split that fills the chip, then with half and twice as many parts."""
    parts = split_k(blocks, K, tile["BLOCK_K"], capability)
    others = [p for p in (parts // 2, parts * 2) if 1 <= p <= 8 and K >= 4 * p * tile["BLOCK_K"]]
    return [tile | dict(SPLIT=p) for p in (parts, *others)]


@tunable
def linear_small(
    M: int, N: int, K: int, capability: int, *, aligned: bool = True, w_kn: bool = False, erf: bool = False
) -> list[dict]:
    """Few rows: the weights stream once, bytes in flight count. Above 32 rows x itself fills wgmma's 64 rows.

    x is read once per column tile, M / BLOCK_N of the weight's bytes: 64 columns up to 16 rows, 128 above. From 65 rows
    on the L2 cache's bandwidth is what counts, and 128 x 128 halves what 64 x 128 reads per product.
    Unaligned rows load 2 bytes at a time, whose addresses fill the registers: a small tile, and two stages.
    """
    M = bucket(M)
    if not aligned:
        tile = dict(SWAP=True, BLOCK_M=32 if M > 16 else 16, BLOCK_N=64, BLOCK_K=32)
        return [tile | dict(SPLIT=1, num_warps=4, num_stages=2)]
    small = chip(capability).shared_memory < 150_000
    if M > 64 and not (erf and capability >= 100):  # which spills 14 to 46
        tile = dict(SWAP=False, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32 if small else 64, num_warps=8)
        tile["num_stages"] = 4 if small else 3
    elif M > 32:
        wide = N > 1024 and not small and not (erf and capability < 90)  # erf spills on sm_80
        tile = dict(SWAP=False, BLOCK_M=64, BLOCK_N=128 if wide else 64, BLOCK_K=64, num_warps=8)
        tile["num_stages"] = 3 if small else 4
    elif M > 16:
        wide = N > 6144 and not w_kn and capability >= 90 and not small  # sm_80 spills
        tile = dict(SWAP=True, BLOCK_M=32, BLOCK_N=128 if wide else 64, BLOCK_K=64 if wide or small else 128)
        tile |= dict(num_warps=8 if wide else 4, num_stages=3 if small else 4)
    else:
        block_k = 64 if w_kn or small else 128
        tile = dict(SWAP=True, BLOCK_M=16, BLOCK_N=64, BLOCK_K=block_k, num_warps=4, num_stages=4)
    return _with_splits(tile, cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]), K, capability)


def k_per_split(K: int, tile: dict) -> int:
    """Elements of K in each part: whole K-steps."""
    return cdiv(cdiv(K, tile["SPLIT"]), tile["BLOCK_K"]) * tile["BLOCK_K"]


@tunable
def linear_vector(M: int, N: int, K: int, capability: int, *, fp32: bool = False) -> list[dict]:
    """Up to 4 rows: 16-byte loads that stay in their thread. BLOCK_K is one such load for each lane of 4 warps."""
    vector = 4 if fp32 else 8
    rows = next_power_of_2(M)
    tile = dict(BLOCK_M=rows, BLOCK_K=128 * vector, VECTOR=vector, num_warps=4)
    columns = (8, 4) if rows > 2 or N >= 4096 else (4, 8)
    return [tile | dict(BLOCK_N=n) for n in columns]


@tunable
def linear_one_tile(M: int, N: int, K: int, capability: int) -> list[dict]:
    """One tile per program: projections of unequal widths. No overlap between tiles, so two blocks per SM share it."""
    if chip(capability).shared_memory < 150_000:
        return [dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=4)]
    return [dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)]


@tunable
def dual_linear(
    M: int, N: int, K: int, capability: int, *, gated: bool = False, erf: bool = False, runs: bool = False
) -> list[dict]:
    """Two accumulators over one x: 128 x 2 x 128 with 3 stages on sm_90. erf spills there: 128 x 2 x 64."""
    kind = chip(capability)
    if kind.shared_memory < 150_000:
        return [_persistent(64, 128, 32, 8, 4), _persistent(128, 64, 64, 8, 2)]  # 128 x 64 x 32 spills 2 to 4
    if kind.shared_memory < 200_000:
        return [_persistent(128, 64, 64, 8, 3)]
    if gated and capability >= 100:  # 128 x 2 x 128 spills 19 to 53 registers there, a BLOCK_K of 128 up to 6
        return [_persistent(128, 64, 64, 8, 3)]
    narrow, wide = _persistent(128, 64, 64, 8, 4), _persistent(128, 128, 64, 8, 3)
    if capability >= 100 and runs:  # narrow spills 13 there
        return [wide]
    found = [narrow] if erf else _by_waves([wide, narrow], M, N, capability)
    if capability == 90 and not runs:
        found.append(_persistent(128, 128, 64, 4, 3, specialize=True))
    return found


@tunable
def glu_linear_small(M: int, N: int, K: int, capability: int, *, aligned: bool = True) -> list[dict]:
    """Two weights stream at once, so each has half the bytes in flight of linear_small's tile."""
    M = bucket(M)
    small = chip(capability).shared_memory < 150_000
    if not aligned:
        return [dict(SWAP=True, BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, SPLIT=1, num_warps=4, num_stages=2)]
    if M > 32:
        block_n = 64 if small or capability >= 100 else 128  # 128 spills up to 4 on sm_100
        tile = dict(SWAP=False, BLOCK_M=64, BLOCK_N=block_n, BLOCK_K=64, num_warps=8, num_stages=3)
    elif M > 16:
        block_k = 64 if small or capability >= 100 else 128
        tile = dict(SWAP=True, BLOCK_M=32, BLOCK_N=64, BLOCK_K=block_k, num_warps=4)
        tile["num_stages"] = 3 if block_k == 128 else 4
    else:
        tile = dict(SWAP=True, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4 if small else 5)
    return _with_splits(tile, cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]), K, capability)
