"""Launch parameters: pure functions of shape, item size and compute capability. Nothing tunes at run time.

None of the choices below is measured yet on a GPU; each compiles without a spill for sm_80, sm_90 and sm_100
(tests/compile).
"""

PLAN_TILE = 128  # rows of one tile of a task plan
CHUNK_ROWS = 256  # rows of one task that are summed in one piece; part of the result, so never a tuning parameter
SMALL_M = 64  # up to here a matmul reads its weights once in one row tile, and gathers each row's scale

# bytes of shared memory that one block may have, by compute capability
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
VECTOR_M = 4  # up to here fp32 FMAs on 16-byte loads beat a tensor-core tile that is three quarters padding


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


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


def linear_is_fused(itemsize: int) -> bool:
    """Whether ia3_linear runs its own matmul. fp32 does not: without tf32 Triton has no tensor-core form for it."""
    return itemsize == 2


def bucket(M: int) -> int:
    """M rounded up to a power of two: a decode batch that grows by a row keeps its kernel."""
    return next_power_of_2(M)


def linear(M: int, N: int, K: int, capability: int, erf: bool) -> dict:
    """Persistent TMA matmul. 128 x 256 has the best reuse; erf spills there: gelu and few tiles take 128 x 128."""
    shared = SHARED_MEMORY.get(capability, 101_376)
    if shared < 150_000:
        return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3)
    if shared < 200_000:
        return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
    if erf or capability >= 100 or cdiv(bucket(M), 128) * cdiv(N, 256) < MULTIPROCESSORS[capability]:
        return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=4)
    return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)


def linear_is_small(M: int, N: int, capability: int) -> bool:
    """Whether small tiles with split K serve: few rows, or up to 1024 whose 128 x 128 tiles leave most SMs idle."""
    tiles = cdiv(bucket(M), 128) * cdiv(N, 128)
    return M <= SMALL_M or (M <= 1024 and 2 * tiles <= MULTIPROCESSORS.get(capability, 108))


def split_k(blocks: int, K: int, block_k: int, capability: int) -> int:
    """Parts of K, a power of two: enough programs to fill the chip once, at least 4 K-steps in each, at most 8."""
    parts = 1
    while parts < 8 and blocks * parts < 96 * MULTIPROCESSORS.get(capability, 108) // 132 and K >= 8 * parts * block_k:
        parts *= 2
    return parts


def linear_small(M: int, N: int, K: int, capability: int, contiguous_k: bool, aligned: bool, erf: bool) -> dict:
    """Few rows: the weights stream once, bytes in flight count. Above 32 rows x itself fills wgmma's 64 rows.

    x is read once per column tile, M / BLOCK_N of the weight's bytes: 64 columns up to 16 rows, 128 above.
    Unaligned rows load 2 bytes at a time, whose addresses fill the registers: a small tile, and two stages.
    """
    M = bucket(M)
    if not aligned:
        tile = dict(SWAP=True, BLOCK_M=32 if M > 16 else 16, BLOCK_N=64, BLOCK_K=32)
        return tile | dict(SPLIT=1, num_warps=4, num_stages=2)
    small = SHARED_MEMORY.get(capability, 101_376) < 150_000
    if M > 32:
        wide = (N > 1024 or M > 64) and not small and not (erf and capability < 90)  # erf spills on sm_80
        tile = dict(SWAP=False, BLOCK_M=64, BLOCK_N=128 if wide else 64, BLOCK_K=64, num_warps=8)
        tile["num_stages"] = 3 if small else 4
    elif M > 16:
        wide = N > 6144 and contiguous_k and not small
        tile = dict(SWAP=True, BLOCK_M=32, BLOCK_N=128 if wide else 64, BLOCK_K=64 if wide or small else 128)
        tile |= dict(num_warps=8 if wide else 4, num_stages=3 if small else 4)
    else:
        block_k = 128 if contiguous_k and not small else 64
        tile = dict(SWAP=True, BLOCK_M=16, BLOCK_N=64, BLOCK_K=block_k, num_warps=4, num_stages=4)
    blocks = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
    return tile | dict(SPLIT=split_k(blocks, K, tile["BLOCK_K"], capability))


def k_per_split(K: int, tile: dict) -> int:
    """Elements of K in each part: whole K-steps."""
    return cdiv(cdiv(K, tile["SPLIT"]), tile["BLOCK_K"]) * tile["BLOCK_K"]


def linear_one_tile(capability: int) -> dict:
    """One tile per program: projections of unequal widths. No overlap between tiles, so two blocks per SM share it."""
    if SHARED_MEMORY.get(capability, 101_376) < 150_000:
        return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)


def dual_linear(M: int, N: int, K: int, capability: int, gated: bool, erf: bool) -> dict:
    """Two accumulators over one x: 128 x 2 x 128 with 3 stages on sm_90. erf spills there: 128 x 2 x 64."""
    shared = SHARED_MEMORY.get(capability, 101_376)
    if shared < 150_000:
        return dict(SPECIALIZE=False, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=4, num_stages=3)
    if shared < 200_000:
        return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
    if gated and capability >= 100:  # 128 x 2 x 128 spills 19 to 53 registers there
        return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=64, BLOCK_K=128, GROUP_M=8, num_warps=8, num_stages=3)
    if erf or 2 * cdiv(bucket(M), 128) * cdiv(N, 128) < MULTIPROCESSORS[capability]:
        return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=4)
    return dict(SPECIALIZE=False, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)


def glu_linear_small(M: int, N: int, K: int, capability: int, aligned: bool) -> dict:
    """Two weights stream at once, so each has half the bytes in flight of linear_small's tile."""
    M = bucket(M)
    small = SHARED_MEMORY.get(capability, 101_376) < 150_000
    if not aligned:
        return dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32, SPLIT=1, num_warps=4, num_stages=2)
    if M > 16:
        block_k = 64 if small or capability >= 100 else 128
        tile = dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=block_k, num_warps=4, num_stages=3 if block_k == 128 else 4)
    else:
        tile = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4 if small else 5)
    blocks = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
    return tile | dict(SPLIT=split_k(blocks, K, tile["BLOCK_K"], capability))


def glu_backward(N: int) -> dict:
    """8 x 256 with 4 warps: 64 to 96 registers and six 16-byte loads in flight per thread."""
    return dict(BLOCK_M=8, BLOCK_N=min(max(next_power_of_2(N), 16), 256), num_warps=4)


def linear_vector(M: int, N: int, itemsize: int) -> dict:
    """Up to 4 rows: 16-byte loads that stay in their thread. BLOCK_K is one such load for each lane of 4 warps."""
    vector = 16 // itemsize
    rows = next_power_of_2(M)
    columns = 8 if rows > 2 or N >= 4096 else 4
    return dict(BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=128 * vector, VECTOR=vector, num_warps=4)


def prompt_concat(E: int) -> dict:
    """A tile of 4096 elements, 4 warps: four 16-byte stores per thread."""
    block_e = min(max(next_power_of_2(E), 16), 4096)
    return dict(BLOCK_ROWS=4096 // block_e, BLOCK_E=block_e, num_warps=4)


def prompt_backward(E: int) -> dict:
    return dict(BLOCK_E=min(max(next_power_of_2(E), 16), 1024), num_warps=4)
