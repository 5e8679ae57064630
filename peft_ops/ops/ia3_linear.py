"""Linear layer with (IA)^3: y = act(x W^T + b) * ia3_l[t], or y = (x * ia3_l[t]) W^T + b if is_feedforward."""

from contextvars import copy_context
from threading import Thread

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import LazyKernels, get_backend, use_triton
from peft_ops._checks import (
    FLOATS,
    check_activation,
    check_ids_in_range,
    check_table,
    check_task_ids,
    check_tensor,
    shape,
)
from peft_ops._launch import launch
from peft_ops._library import Operator, needs_gradient, use_reference
from peft_ops.ops.ia3_scale import as_rows, scale_backward, scale_forward, shaped
from peft_ops.ops.task_plan import launch_plan, per_sequence
from peft_ops.reference import TaskPlan

kernels, tiles = LazyKernels("ia3_linear"), LazyKernels("tiles")


def capability_of(x: Tensor) -> tuple[int, int]:
    """Compute capability and multiprocessors of x's GPU; without one (interpreter), sm_90 and two."""
    if not x.is_cuda:
        return 90, 2
    properties = torch.cuda.get_device_properties(x.device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def aligned(*matrices: Tensor) -> bool:
    """Whether rows start at 16-byte addresses and are contiguous, as TMA requires, in strides that are multiples of 16
    elements, which is what Triton asks for before it loads 16 bytes at a time."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]  # an expanded or overlapping x goes to the pointer kernel
        and t.stride(0) % 16 == t.shape[1] % 16 == t.data_ptr() % 16 == 0
        for t in matrices
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch_with_scratch(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """Launch a kernel that makes TMA descriptors in device memory.

    Triton's allocator is a context variable: set in a copy of the context, the caller's own is untouched.
    """

    def run():
        import triton

        triton.set_allocator(_scratch)
        launch(kernel, grid, *args, **kwargs)

    copy_context().run(run)


def persistent(tile: dict, M: int, N: int, num_sms: int) -> tuple[tuple[int], dict]:
    """Grid of a persistent kernel, no larger than its tiles are many, and its constexpr arguments."""
    tile = dict(tile)
    programs = num_sms * tile.pop("BLOCKS_PER_SM")
    return (min(programs, tiles.cdiv(M, tile["BLOCK_M"]) * tiles.cdiv(N, tile["BLOCK_N"])),), dict(
        tile, NUM_PROGRAMS=programs
    )


def plan_arguments(task_ids, plan, rows_per_id: int, M: int, num_tasks: int) -> tuple[tuple[Tensor | None, ...], str]:
    """Row ids, tiles, run_index and run_end for a large matmul, and its way to select tasks, from shapes alone."""
    if task_ids is None:
        return (None, None, None, None), "one"
    tensors = launch_plan(task_ids, None, M, num_tasks) if plan is None else (task_ids, *plan)
    return tensors, "two" if rows_per_id >= tiles.PLAN_TILE else "runs"


def _launch_large(x, weight, bias, ia3_l, task_ids, plan, rows_per_id, activation, y, z, capability, num_sms) -> None:
    (M, K), N = x.shape, weight.shape[0]
    plan, mode = plan_arguments(task_ids, plan, rows_per_id, M, ia3_l.shape[0])
    tile = tiles.linear(M, N, K, capability, erf=activation == "gelu", runs=mode == "runs")
    grid, tile = persistent(tile, M, N, num_sms)
    w_kn = weight.stride(1) != 1
    with torch.cuda.device_of(x):
        launch_with_scratch(
            kernels.ia3_linear_kernel, grid,
            x, weight, bias, ia3_l, *plan, y, z,
            M, N, K, ia3_l.shape[0],
            x.stride(0), ia3_l.stride(0), weight.stride(1 if w_kn else 0),
            HAS_BIAS=bias is not None, ACTIVATION=activation, SAVE=z is not None, TASKS=mode, W_KN=w_kn,
            TILE=tiles.PLAN_TILE, **tile,
        )  # fmt: skip


def split_workspace(x: Tensor, num_tiles: int, parts: int, M: int, N: int) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums [parts, M, N] in fp32, and a zero per tile, for a kernel that splits K."""
    if parts == 1:
        return None, None
    part = torch.empty((parts, M, N), dtype=torch.float32, device=x.device)
    return part, _counters(x, num_tiles)


_counter_pool: dict[tuple[torch.device, int], Tensor] = {}


def _counters(x: Tensor, count: int) -> Tensor:
    """Zeros that the kernel leaves zero, one buffer per stream; a captured graph has its own, zeroed at each replay."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=x.device)
    stream = torch.cuda.current_stream(x.device)
    key = x.device, stream.cuda_stream
    if key not in _counter_pool or _counter_pool[key].numel() < count:
        # the old buffer may still be in use by a launch before this one on the same stream: the allocator waits for it

        def allocate():
            with torch.cuda.stream(stream):
                _counter_pool[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=x.device)

        # on a thread of its own, once: torch.compile's CUDA graphs warm up with this thread's allocations in a pool of
        # theirs, which they take back
        thread = Thread(target=allocate)
        thread.start()
        thread.join()
    return _counter_pool[key]


def _launch_small(x, weight, bias, ia3_l, task_ids, activation, y, z, capability, takes_wide) -> None:
    (M, K), N = x.shape, weight.shape[0]
    w_kn, erf = weight.stride(1) != 1, activation == "gelu"
    tile = tiles.linear_small(M, N, K, capability, aligned=takes_wide, w_kn=w_kn, erf=erf)
    num_tiles, parts = tiles.cdiv(M, tile["BLOCK_M"]) * tiles.cdiv(N, tile["BLOCK_N"]), tile["SPLIT"]
    part, count = split_workspace(x, num_tiles, parts, M, N)
    with torch.cuda.device_of(x):
        launch(
            kernels.ia3_linear_small_kernel, (num_tiles, parts),
            x, weight, bias, ia3_l, task_ids, y, z, part, count,
            M, N, K, 1 if task_ids is None else M // task_ids.numel(), ia3_l.shape[0], tiles.k_per_split(K, tile),
            x.stride(0), ia3_l.stride(0), weight.stride(0), weight.stride(1),
            HAS_IDS=task_ids is not None, HAS_BIAS=bias is not None, ACTIVATION=activation, SAVE=z is not None,
            EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
        )  # fmt: skip


def _launch_vector(x, weight, bias, ia3_l, task_ids, activation, y, z, capability) -> None:
    (M, K), N = x.shape, weight.shape[0]
    tile = tiles.linear_vector(M, N, K, capability, fp32=x.dtype == torch.float32)
    with torch.cuda.device_of(x):
        launch(
            kernels.ia3_linear_vector_kernel, (tiles.cdiv(N, tile["BLOCK_N"]),),
            x, weight, bias, ia3_l, task_ids, y, z,
            M, N, K, 1 if task_ids is None else M // task_ids.numel(), ia3_l.shape[0],
            x.stride(0), ia3_l.stride(0), weight.stride(0),
            HAS_IDS=task_ids is not None, HAS_BIAS=bias is not None, ACTIVATION=activation, SAVE=z is not None,
            EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
        )  # fmt: skip


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, ia3_l: Tensor, task_ids: Tensor | None, plan: list[Tensor] | None,
    rows_per_id: int, activation: str | None, save: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y and, if save, z = x W^T + b, both [M, N] in x's dtype."""
    M, N = x.shape[0], weight.shape[0]
    bias, task_ids = (None if t is None else t.contiguous() for t in (bias, task_ids))
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if save else None
    if y.numel() == 0:
        return y, z
    capability, num_sms = capability_of(x)
    stored = _stored(weight)
    takes_wide = aligned(x, stored)
    if M <= tiles.VECTOR_M and takes_wide and stored is weight:
        _launch_vector(x, weight, bias, ia3_l, task_ids, activation, y, z, capability)
    elif takes_wide and N % 16 == 0 and not tiles.linear_is_small(M, N, capability):  # y is stored by TMA
        _launch_large(x, weight, bias, ia3_l, task_ids, plan, rows_per_id, activation, y, z, capability, num_sms)
    else:
        _launch_small(x, weight, bias, ia3_l, task_ids, activation, y, z, capability, takes_wide)
    return y, z


def launch_feedforward(
    x: Tensor, weight: Tensor, bias: Tensor | None, ia3_l: Tensor, task_ids: Tensor | None
) -> Tensor:
    """y = (x * l[t]) W^T + b, [M, N] in x's dtype; rows aligned, each id for whole tiles of 128 rows."""
    (M, K), N = x.shape, weight.shape[0]
    bias, task_ids = (None if t is None else t.contiguous() for t in (bias, task_ids))
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    capability, num_sms = capability_of(x)
    grid, tile = persistent(tiles.linear_feedforward(M, N, K, capability), M, N, num_sms)
    w_kn = weight.stride(1) != 1
    with torch.cuda.device_of(x):
        launch_with_scratch(
            kernels.ia3_linear_feedforward_kernel, grid,
            x, weight, bias, ia3_l, task_ids, y,
            M, N, K, M if task_ids is None else M // task_ids.numel(), ia3_l.shape[0],
            x.stride(0), ia3_l.stride(0), weight.stride(1 if w_kn else 0),
            HAS_IDS=task_ids is not None, HAS_BIAS=bias is not None, W_KN=w_kn, **tile,
        )  # fmt: skip
    return y


def _stored(weight: Tensor) -> Tensor:
    """The weight with its contiguous dimension last."""
    return weight if weight.stride(1) == 1 else weight.t()


def is_fused(op: str, x: Tensor, *weights: Tensor, gated: bool = False) -> bool:
    """Whether our own matmul runs on x [M, K]: in the interpreter always, for a backend chosen by name on any 16-bit x.

    fp32 on a GPU is the vendor's: it follows torch's float32 matmul precision, and Triton has no tensor-core form for
    full precision. Unaligned rows too, which would load 2 bytes at a time.
    """
    if not use_triton(op, x) or x.shape[1] == 0:
        return False
    if not x.is_cuda:
        return True
    if x.element_size() != 2:
        return False
    if get_backend() == "triton":
        return True
    (M, K), capability = x.shape, capability_of(x)[0]
    N = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    tma_stores = all(w.shape[0] % 16 == 0 for w in weights) or tiles.linear_is_small(M, N, capability)
    return tma_stores and aligned(x, *map(_stored, weights)) and tiles.linear_is_fused(M, N, K, capability, gated)


def feedforward_is_fused(op: str, x: Tensor, weight: Tensor, task_ids: Tensor | None, rows_per_id: int) -> bool:
    """Whether x [M, K] is scaled inside the matmul: tiles of one task each, rows that TMA takes, and a gain."""
    if not use_triton(op, x) or x.numel() == 0 or (x.is_cuda and x.element_size() != 2):
        return False
    (M, K), N = x.shape, weight.shape[0]
    one_task = task_ids is None or rows_per_id % tiles.PLAN_TILE == 0
    if not (one_task and N % 16 == 0 and aligned(x, _stored(weight))):
        return False
    if not x.is_cuda or get_backend() == "triton":
        return M > tiles.SMALL_M
    return tiles.feedforward_is_fused(M, N, K, capability_of(x)[0])


def _has_amx() -> bool:
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private; where it is missing, every CPU may have it
    return known is None or known()


def reads_beyond_rows(x: Tensor) -> bool:
    """Whether the vendor's matmul takes what follows a row in memory, times zero: a NaN or Inf there is a NaN here.

    oneDNN's bf16 matmul does on a CPU with AMX, in rows whose length is no multiple of 32 (torch 2.13; K 3, 34, 80, but
    not 64). A backward that is traced cannot ask, and has the vendor's rows as they come.
    """
    if x.shape[-1] % 32 == 0 or x.dtype is not torch.bfloat16 or not x.is_cpu or type(x) is not Tensor:
        return False
    return not torch.compiler.is_compiling() and _has_amx()


def finite_rows(x: Tensor) -> Tensor | None:
    """bool [..., 1], the rows of x that may be seen together; None where all may."""
    finite = x.isfinite().all(-1, keepdim=True)
    return None if bool(finite.all()) else finite


def _padded(t: Tensor) -> Tensor:
    return F.pad(t, (0, -t.shape[-1] % 32))


def vendor_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, but no row of x reaches another's result."""
    if not reads_beyond_rows(x):
        return F.linear(x, weight, bias)
    x = x.contiguous()  # between strided rows there may be anything; and the bias is rounded otherwise than here
    finite = finite_rows(x)
    if finite is None:
        return F.linear(x, weight, bias)
    alone = F.linear(torch.where(finite, x, 0), weight, bias)
    return torch.where(finite, alone, F.linear(_padded(x), _padded(weight), bias))


def _ia3_linear(x, weight, bias, ia3_l, task_ids, plan, rows_per_id, activation, is_feedforward, save):
    op = "ia3_linear"
    nothing = x.new_empty(0)
    if use_triton(op, x):
        rows, lead = as_rows(x), (*x.shape[:-1], weight.shape[0])
        if is_feedforward and feedforward_is_fused(op, rows, weight, task_ids, rows_per_id):
            check_ids_in_range(op, task_ids, ia3_l.shape[0])
            return shaped(launch_feedforward(rows, weight, bias, ia3_l, task_ids), lead), nothing
        if not is_feedforward and is_fused(op, rows, weight):
            check_ids_in_range(op, task_ids, ia3_l.shape[0])
            y, z = launch_linear(rows, weight, bias, ia3_l, task_ids, plan, rows_per_id, activation, save)
            return shaped(y, lead), shaped(z, lead) if save else nothing
    if is_feedforward:
        return vendor_linear(scale_forward(op, x, ia3_l, task_ids), weight, bias).contiguous(), nothing
    z = vendor_linear(x, weight, bias)
    y = scale_forward(op, z, ia3_l, task_ids, activation)
    return y, z.contiguous() if save else nothing


def _ia3_linear_fake(x, weight, bias, ia3_l, task_ids, plan, rows_per_id, activation, is_feedforward, save):
    out = (*x.shape[:-1], weight.shape[0])
    saved = out if save and not is_feedforward else 0
    return torch.empty(out, dtype=x.dtype, device=x.device), torch.empty(saved, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output):
    x, weight, _, ia3_l, task_ids, plan, rows_per_id, activation, is_feedforward, save = inputs
    need_x, need_weight, need_bias, need_l = ctx.needs_input_grad[:4]
    ctx.activation, ctx.is_feedforward = activation, is_feedforward
    needs_z = not is_feedforward and (need_l or (activation is not None and (need_x or need_weight or need_bias)))
    if needs_z and not save:
        raise RuntimeError(
            "ia3_linear: save must be True for a gradient of ia3_l, and for one through an activation, got False"
        )
    keep_x = need_weight or (is_feedforward and need_l)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        x if keep_x else None,
        weight if need_x or (is_feedforward and need_l) else None,
        ia3_l,
        per_sequence(task_ids, plan, rows_per_id),
        output[1] if needs_z else None,
    )


def as_matrix(t: Tensor) -> Tensor:
    return t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def times_weight(dz: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """dz [..., N] times weight [N, K]; added to `onto`, in place, if that is given. No row of dz reaches another's."""
    if onto is None:
        return vendor_linear(dz, weight.t())
    dz, dx = as_matrix(dz), as_matrix(onto)
    finite = None
    if reads_beyond_rows(dz):
        dz = dz.contiguous()
        finite = finite_rows(dz)
    if finite is None:
        return dx.addmm_(dz, weight).view(onto.shape)
    own = dx + F.linear(_padded(dz), _padded(weight.t()))
    return torch.where(finite, dx.addmm_(torch.where(finite, dz, 0), weight), own).view(onto.shape)


def linear_backward(
    dy, x, weight, ia3_l, task_ids, z, activation, needs: tuple[bool, bool, bool, bool], onto: Tensor | None = None
):
    """Gradients of act(z) * ia3_l[t], z = x W^T + b, for x, W, b and ia3_l; None where not needed. The gradient of x is
    added to `onto`, in place, where another use of x has left its own: no second tensor of its size."""
    need_x, need_weight, need_bias, need_l = needs
    need_dz = need_x or need_weight or need_bias
    dz, dl = scale_backward(dy, dy if z is None else z, ia3_l, task_ids, activation, need_dz, need_l)
    dx = onto
    if need_x:
        dx = times_weight(dz, weight, onto)
    dweight = as_matrix(dz).t() @ as_matrix(x) if need_weight else None
    return dx, dweight, as_matrix(dz).sum(0) if need_bias else None, dl


def _backward(ctx, dy, _):
    x, weight, ia3_l, task_ids, z = ctx.saved_tensors
    needs = need_x, need_weight, need_bias, need_l = ctx.needs_input_grad[:4]
    if not ctx.is_feedforward:
        grads = linear_backward(dy, x, weight, ia3_l, task_ids, z, ctx.activation, needs)
        return *grads, None, None, None, None, None, None
    dx = dl = dweight = None
    if need_x or need_l:
        dscaled = times_weight(dy, weight)
        dx, dl = scale_backward(dscaled, dscaled if x is None else x, ia3_l, task_ids, None, need_x, need_l)
    if need_weight:
        scaled = _scale_op(x, ia3_l, task_ids, None)
        dweight = as_matrix(dy).t() @ as_matrix(scaled)
    dbias = as_matrix(dy).sum(0) if need_bias else None
    return dx, dweight, dbias, dl, None, None, None, None, None, None


def _scale_op(x, ia3_l, task_ids, activation):
    return torch.ops.peft_ops.ia3_scale(x, ia3_l, task_ids, activation)


_op = Operator("ia3_linear", _ia3_linear, _ia3_linear_fake, _setup_context, _backward)


def autocast_enabled(x: Tensor) -> bool:
    kind = "cpu" if x.is_cpu else x.device.type  # the string is made anew each time
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """What F.linear's rule makes of x, weight and bias where autocast is enabled; ia3_l keeps its dtype."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t):
        wanted = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if wanted else t  # what is no such tensor meets the checks as it came

    return [cast(t) for t in (x, *tensors)]


def check_layer(
    op: str, x: Tensor, weight, bias, weight_arg: str = "weight", bias_arg: str = "bias"
) -> tuple[int, int]:
    """N and K of a layer that takes x."""
    check_tensor(op, weight_arg, weight, dtypes=(x.dtype,), dim=2, like=x)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"{op}: x must have {K} features, as {weight_arg} {shape(weight)} takes, got shape {shape(x)}")
    if bias is not None:
        check_tensor(op, bias_arg, bias, dtypes=(x.dtype,), dim=1, like=x)
        if bias.shape[0] != N:
            raise ValueError(f"{op}: {bias_arg} must have shape [{N}], got {shape(bias)}")
    return N, K


def ia3_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
    activation: str | None = None,
    is_feedforward: bool = False,
) -> Tensor:
    """A linear layer under (IA)^3 (arXiv 2205.05638), each row with the vector of its own task.

    Semantics: activation(F.linear(x, weight, bias)) * ia3_l[task_ids]   (keys, values: scale what comes out)
               F.linear(x * ia3_l[task_ids], weight, bias)               if is_feedforward (scale what goes in)
    with row -1 of ia3_l ones: the base model. Of a contiguous x, without activation, and where no fused kernel is
    chosen, bitwise what PEFT computes.

    Args:
        x: [..., K]; fp32, fp16 or bf16 (fp64 runs on plain PyTorch). Its leading dimensions may be strided.
        weight: [N, K] in x's dtype, contiguous along either dimension.
        bias: [N] in x's dtype, or None.
        ia3_l: [num_tasks, N] or [N] ([num_tasks, K] or [K] if is_feedforward), in any of those dtypes; the product is
            taken in fp32.
        task_ids: int32 or int64; its shape is a prefix of x.shape[:-1], or [B] where x is at least 3-D and x.shape[0] a
            multiple of B (beams); or a plan of `plan_tasks`. -1 is the base model. None: one task for all rows.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu", applied before the scale; not with is_feedforward.
        is_feedforward: scale the input instead of the output.

    Returns:
        [..., N] in x's dtype, contiguous. Saved for backward: x if weight (or, with is_feedforward, ia3_l) needs a
        gradient, and z if ia3_l does or an activation stands between. Autocast casts x, weight and bias as F.linear
        does, never ia3_l.

    Raises:
        IndexError: an id outside [-1, num_tasks), on a CPU. On a GPU that row is NaN (PEFT_OPS_DEBUG=1 raises there
            too).
        NotImplementedError, RuntimeError: forward-mode AD, double backward.
    """
    op = "ia3_linear"
    check_tensor(op, "x", x, dtypes=FLOATS)
    if autocast_enabled(x):
        x, weight, bias = autocast(x, weight, bias)
    N, K = check_layer(op, x, weight, bias)
    check_activation(op, activation)
    if activation is not None and is_feedforward:
        raise ValueError(
            f"{op}: activation must be None with is_feedforward, got {activation!r}; "
            f"scale the layer that produces x instead: ia3_linear(..., activation={activation!r}, ia3_l=ia3_l)"
        )
    table = check_table(op, "ia3_l", ia3_l, K if is_feedforward else N, x, task_ids is not None)
    ids, plan, rows_per_id = check_task_ids(op, task_ids, x.shape[:-1], table.shape[0], x)
    if use_reference(x):
        return reference.ia3_linear(
            x, weight, bias, ia3_l=table, task_ids=ids, activation=activation, is_feedforward=is_feedforward
        )
    if not weight.is_contiguous() and weight.stride(0) != 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    differentiable = x, weight, bias, table
    save = not is_feedforward and needs_gradient(differentiable if activation is not None else (table,))
    args = x, weight, bias, table, ids, plan, rows_per_id, activation, is_feedforward, save
    return _op(*args, differentiable=differentiable)[0]


def ia3_fold(
    weight: Tensor, bias: Tensor | None, ia3_l: Tensor, is_feedforward: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One task's vector folded into the layer's weights: served alone, that task costs nothing.

    Semantics: (weight * ia3_l[:, None], bias * ia3_l), or (weight * ia3_l, bias) if is_feedforward; the product in fp32
    with one rounding, bitwise PEFT's merge. With an activation after the layer only the feed-forward form is exact.

    Args:
        weight: [N, K], fp32, fp16 or bf16 (or fp64).
        bias: [N] in its dtype, or None.
        ia3_l: [N], [N, 1] or [1, N] ([K] with is_feedforward), in any of those dtypes.

    Returns:
        New weight and bias in their dtypes (the given bias itself where nothing scales it). Keep the old ones to undo
        it: a division does not bring back a row whose scale is zero, and rounds every other.
    """
    op = "ia3_fold"
    check_tensor(op, "weight", weight, dtypes=FLOATS, dim=2)
    if bias is not None:
        check_tensor(op, "bias", bias, dtypes=(weight.dtype,), dim=1, like=weight)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{op}: bias must have shape [{weight.shape[0]}], got {shape(bias)}")
    check_tensor(op, "ia3_l", ia3_l, dtypes=FLOATS, like=weight)
    N = weight.shape[1 if is_feedforward else 0]
    if ia3_l.numel() != N or ia3_l.dim() > 2 or N not in ia3_l.shape:
        raise ValueError(f"{op}: ia3_l must have shape [{N}], the vector of one task, got {shape(ia3_l)}")
    return reference.ia3_fold(weight, bias, ia3_l, is_feedforward)
