"""Gated (IA)^3 feed-forward: h = act(g) * u * ia3_l[t], elementwise, and with its two linear layers in one pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import LazyKernels, use_triton
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
from peft_ops._library import Operator, native, needs_gradient, use_native, use_reference
from peft_ops.ops.ia3_linear import (
    aligned,
    as_matrix,
    autocast,
    autocast_enabled,
    capability_of,
    check_layer,
    is_fused,
    launch_with_scratch,
    persistent,
    plan_arguments,
    split_workspace,
    times_weight,
    vendor_linear,
)
from peft_ops.ops.ia3_scale import _unsafe_view, as_rows, chunks_by_task, shaped, sum_chunks
from peft_ops.ops.task_plan import per_sequence
from peft_ops.reference import TaskPlan

kernels, dual, tiles = LazyKernels("ia3_glu"), LazyKernels("dual"), LazyKernels("tiles")
_native_glu = native.ia3_glu.default


def launch_glu(gate: Tensor, up: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None) -> Tensor:
    M, N = gate.shape
    task_ids = None if task_ids is None else task_ids.contiguous()
    h = torch.empty((M, N), dtype=gate.dtype, device=gate.device)
    if h.numel() == 0:
        return h
    tile = tiles.rowwise(M, N)
    with torch.cuda.device_of(gate):
        launch(
            kernels.ia3_glu_fwd_kernel, (tiles.cdiv(M, tile["BLOCK_M"]), tiles.cdiv(N, tile["BLOCK_N"])),
            gate, up, ia3_l, task_ids, h,
            M, N, 1 if task_ids is None else M // task_ids.numel(), ia3_l.shape[0],
            gate.stride(0), up.stride(0), ia3_l.stride(0),
            HAS_IDS=task_ids is not None, ACTIVATION=activation, **tile,
        )  # fmt: skip
    return h


def launch_glu_backward(dh, gate, up, ia3_l, task_ids, activation, need_dx: bool, need_dl: bool):
    """dgate and dup, contiguous, and dl fp32 [num_tasks, N]; what is not needed is empty."""
    M, N = gate.shape
    num_tasks = ia3_l.shape[0]
    dgate, dup = (gate.new_empty((M, N) if need_dx else 0) for _ in range(2))
    dl = torch.zeros((num_tasks, N) if need_dl else 0, dtype=torch.float32, device=gate.device)
    if M * N == 0:
        return dgate, dup, dl
    order, chunks, chunk_start = chunks_by_task(task_ids, M, num_tasks, gate.device)
    part = torch.empty((chunks.shape[0], N) if need_dl else 0, dtype=torch.float32, device=gate.device)
    tile = tiles.glu_backward(N)
    with torch.cuda.device_of(gate):
        launch(
            kernels.ia3_glu_bwd_kernel, (chunks.shape[0], tiles.cdiv(N, tile["BLOCK_N"])),
            dh, gate, up, ia3_l, order, chunks, dgate, dup, part,
            N, 1 if task_ids is None else M // task_ids.numel(), num_tasks,
            dh.stride(0), gate.stride(0), up.stride(0), ia3_l.stride(0),
            HAS_IDS=task_ids is not None, ACTIVATION=activation, NEED_DX=need_dx, NEED_DL=need_dl, **tile,
        )  # fmt: skip
    if need_dl and num_tasks:
        sum_chunks(part, chunk_start, dl)
    return dgate, dup, dl


def launch_glu_linear(
    x, gate_weight, up_weight, gate_bias, up_bias, ia3_l, task_ids, plan, rows_per_id, activation, save
):
    """h, and g and u if save, all [M, N] in x's dtype, in one launch."""
    (M, K), N = x.shape, gate_weight.shape[0]
    gate_bias, up_bias, task_ids = (None if t is None else t.contiguous() for t in (gate_bias, up_bias, task_ids))
    h = torch.empty((M, N), dtype=x.dtype, device=x.device)
    g, u = (torch.empty_like(h), torch.empty_like(h)) if save else (None, None)
    if h.numel() == 0:
        return h, g, u
    capability, num_sms = capability_of(x)
    weights, biases = (gate_weight, up_weight), (gate_bias, up_bias)
    has_bias = [bias is not None for bias in biases]
    wide = aligned(x, *weights)
    with torch.cuda.device_of(x):
        if not wide or N % 16 or tiles.linear_is_small(M, 2 * N, capability):  # the large kernel stores by TMA
            tile = tiles.glu_linear_small(M, N, K, capability, aligned=wide)
            num_tiles, parts = tiles.cdiv(M, tile["BLOCK_M"]) * tiles.cdiv(N, tile["BLOCK_N"]), tile["SPLIT"]
            part, count = split_workspace(x, num_tiles, parts, 2 * M, N)
            launch(
                kernels.ia3_glu_linear_small_kernel, (num_tiles, parts),
                x, *weights, *biases, ia3_l, task_ids, h, g, u, part, count,
                M, N, K, 1 if task_ids is None else M // task_ids.numel(), ia3_l.shape[0], tiles.k_per_split(K, tile),
                x.stride(0), ia3_l.stride(0), gate_weight.stride(0), gate_weight.stride(1),
                HAS_IDS=task_ids is not None, HAS_G_BIAS=has_bias[0], HAS_U_BIAS=has_bias[1], ACTIVATION=activation,
                SAVE=save, EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
            )  # fmt: skip
            return h, g, u
        plan, mode = plan_arguments(task_ids, plan, rows_per_id, M, ia3_l.shape[0])
        erf, runs = activation == "gelu", mode == "runs"
        grid, tile = persistent(tiles.dual_linear(M, N, K, capability, gated=True, erf=erf, runs=runs), M, N, num_sms)
        launch_with_scratch(
            dual.dual_linear_kernel, grid,
            x, *weights, *biases, ia3_l, None, *plan, h, None, g, u,
            M, N, K, ia3_l.shape[0],
            x.stride(0), ia3_l.stride(0), 0,
            GATED=True, HAS_A_BIAS=has_bias[0], HAS_B_BIAS=has_bias[1], ACTIVATION=activation, SAVE=save, TASKS=mode,
            TILE=tiles.PLAN_TILE, **tile,
        )  # fmt: skip
    return h, g, u


def glu_forward(
    op: str, gate: Tensor, up: Tensor, ia3_l: Tensor, task_ids: Tensor | None, activation: str | None
) -> Tensor:
    """act(gate) * up * ia3_l[t], contiguous: ids checked, kernel chosen."""
    check_ids_in_range(op, task_ids, ia3_l.shape[0])
    if use_triton(op, gate):
        return shaped(launch_glu(as_rows(gate), as_rows(up), ia3_l, task_ids, activation), gate.shape)
    if use_native("ia3_glu", gate):
        if gate.is_contiguous() and up.is_contiguous() and gate.dim() > 1:  # the C++ kernel takes any dimensions
            return _native_glu(gate, up, ia3_l, task_ids, activation)
        return shaped(_native_glu(as_rows(gate), as_rows(up), ia3_l, task_ids, activation), gate.shape)
    return _unsafe_view(reference.act_glu(gate, up, ia3_l, task_ids, activation).contiguous(), gate.shape)


def _ia3_glu(gate, up, ia3_l, task_ids, activation):
    return glu_forward("ia3_glu", gate, up, ia3_l, task_ids, activation)


def _ia3_glu_backward(dh, gate, up, ia3_l, task_ids, activation, needs):
    if use_triton("ia3_glu", gate):
        backward = launch_glu_backward
    elif use_native("ia3_glu_backward", gate):
        backward = native.ia3_glu_backward
    else:
        dgate, dup, dl = reference.act_glu_backward(dh, gate, up, ia3_l, task_ids, activation, needs)
        return dgate, dup.clone() if dup.numel() == 0 else dup, dl
    dgate, dup, dl = backward(as_rows(dh), as_rows(gate), as_rows(up), ia3_l, task_ids, activation, *needs)
    return (dgate.view(gate.shape), dup.view(gate.shape), dl) if needs[0] else (dgate, dup, dl)


def _ia3_glu_backward_fake(dh, gate, up, ia3_l, task_ids, activation, needs):
    dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32

    def new(size, wanted, dtype):
        return torch.empty(size if wanted else 0, dtype=dtype, device=gate.device)

    dgate, dup = (new(gate.shape, needs[0], gate.dtype) for _ in range(2))
    return dgate, dup, new(ia3_l.shape, needs[1], dtype)


_backward_op = Operator("ia3_glu_backward", _ia3_glu_backward, _ia3_glu_backward_fake)


def glu_backward(dh, gate, up, ia3_l, task_ids, activation, need_dx: bool, need_dl: bool):
    """Gradients of act(gate) * up * ia3_l[t] for gate, up and ia3_l, in their dtypes; None where not needed."""
    if not (need_dx or need_dl):
        return (None, None), None
    dgate, dup, dl = _backward_op(dh, gate, up, ia3_l, task_ids, activation, [need_dx, need_dl])
    return (dgate, dup) if need_dx else (None, None), dl.to(ia3_l.dtype) if need_dl else None


def _glu_setup_context(ctx, inputs, output):
    gate, up, ia3_l, task_ids, ctx.activation = inputs
    ctx.save_for_backward(gate, up, ia3_l, task_ids)


def _glu_backward(ctx, dh):
    need_gate, need_up, need_l = ctx.needs_input_grad[:3]
    (dgate, dup), dl = glu_backward(dh, *ctx.saved_tensors, ctx.activation, need_gate or need_up, need_l)
    return dgate if need_gate else None, dup if need_up else None, dl, None, None


_glu_op = Operator(
    "ia3_glu",
    _ia3_glu,
    lambda gate, up, ia3_l, task_ids, activation: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
    _glu_setup_context,
    _glu_backward,
)


def _ia3_glu_linear(
    x, gate_weight, up_weight, gate_bias, up_bias, ia3_l, task_ids, plan, rows_per_id, activation, save
):
    op = "ia3_glu_linear"
    lead, weights = (*x.shape[:-1], gate_weight.shape[0]), (gate_weight, up_weight)
    # transposed or sliced weights are the vendor's: the kernels walk along K in two weights with one stride
    if use_triton(op, x) and all(w.is_contiguous() for w in weights) and is_fused(op, as_rows(x), *weights, gated=True):
        check_ids_in_range(op, task_ids, ia3_l.shape[0])
        h, g, u = launch_glu_linear(
            as_rows(x), *weights, gate_bias, up_bias, ia3_l, task_ids, plan, rows_per_id, activation, save
        )
    else:
        g, u = vendor_linear(x, gate_weight, gate_bias), vendor_linear(x, up_weight, up_bias)
        h = glu_forward(op, g, u, ia3_l, task_ids, activation)
    if not save:
        return shaped(h, lead), x.new_empty(0), x.new_empty(0)
    return shaped(h, lead), shaped(g.contiguous(), lead), shaped(u.contiguous(), lead)


def _ia3_glu_linear_fake(
    x, gate_weight, up_weight, gate_bias, up_bias, ia3_l, task_ids, plan, rows_per_id, activation, save
):
    lead = (*x.shape[:-1], gate_weight.shape[0])

    def new(size):
        return torch.empty(size, dtype=x.dtype, device=x.device)

    return new(lead), new(lead if save else 0), new(lead if save else 0)


def _glu_linear_setup_context(ctx, inputs, output):
    x, gate_weight, up_weight, gate_bias, up_bias, ia3_l, task_ids, plan, rows_per_id, ctx.activation, save = inputs
    if not save:
        raise RuntimeError("ia3_glu_linear: save must be True where a gradient is needed, got False")
    need_x, need_gate_weight, need_up_weight = ctx.needs_input_grad[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(
        x if need_gate_weight or need_up_weight else None,
        gate_weight if need_x else None,
        up_weight if need_x else None,
        ia3_l,
        per_sequence(task_ids, plan, rows_per_id),
        *output[1:],
    )


def _glu_linear_backward(ctx, dh, *_):
    x, gate_weight, up_weight, ia3_l, task_ids, g, u = ctx.saved_tensors
    need_x, need_gw, need_uw, need_gb, need_ub, need_l = ctx.needs_input_grad[:6]
    need_dx = need_x or need_gw or need_uw or need_gb or need_ub
    (dg, du), dl = glu_backward(dh, g, u, ia3_l, task_ids, ctx.activation, need_dx, need_l)
    dx = None
    if need_x:  # both products into one dx: no third tensor of its size, no addition of its own
        dx = times_weight(du, up_weight, onto=times_weight(dg, gate_weight))
    rows = None if x is None else as_matrix(x)
    dgw, duw = (as_matrix(d).t() @ rows if need else None for d, need in ((dg, need_gw), (du, need_uw)))
    dgb, dub = (as_matrix(d).sum(0) if need else None for d, need in ((dg, need_gb), (du, need_ub)))
    return dx, dgw, duw, dgb, dub, dl, None, None, None, None, None


_glu_linear_op = Operator(
    "ia3_glu_linear", _ia3_glu_linear, _ia3_glu_linear_fake, _glu_linear_setup_context, _glu_linear_backward
)


def glu_by(ia3_l: Tensor, task_ids: Tensor | None, activation: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up) -> act(gate) * up * ia3_l[t], as `scale_by`; gate and up may be halves of one tensor."""
    served: dict[torch.dtype, bool] = {}

    def glu(gate: Tensor, up: Tensor) -> Tensor:
        by_native = served.get(gate.dtype)
        if by_native is None:
            by_native = served[gate.dtype] = use_native("ia3_glu", gate)
        if not by_native:
            return _glu_op(gate, up, ia3_l, task_ids, activation)
        if gate.dim() > 1 and gate.is_contiguous() and up.is_contiguous():
            return _native_glu(gate, up, ia3_l, task_ids, activation)
        return shaped(_native_glu(as_rows(gate), as_rows(up), ia3_l, task_ids, activation), gate.shape)

    return glu


def ia3_glu(
    gate: Tensor,
    up: Tensor,
    ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """The elementwise half of a gated feed-forward layer under (IA)^3, each row with its own task's vector.

    Semantics: activation(gate) * up * ia3_l[task_ids], in fp32 with one rounding; row -1 of ia3_l is ones (base model).

    Args:
        gate, up: [..., N], one dtype: fp32, fp16 or bf16 (fp64 runs on plain PyTorch).
        ia3_l: [N] or [num_tasks, N], any of those dtypes.
        task_ids: as in `ia3_scale`: -1 is the base model, None one task for all rows.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        Like gate, contiguous. Saved for backward: gate, up and ia3_l.

    Raises:
        IndexError: an id outside [-1, num_tasks), on a CPU. On a GPU that row is NaN (PEFT_OPS_DEBUG=1 raises there
            too).
        NotImplementedError, RuntimeError: forward-mode AD, double backward.
    """
    op = "ia3_glu"
    check_tensor(op, "gate", gate, dtypes=FLOATS)
    check_tensor(op, "up", up, dtypes=(gate.dtype,), like=gate)
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(f"{op}: up must have gate's shape {shape(gate)}, of at least 1 dimension, got {shape(up)}")
    check_activation(op, activation)
    table = check_table(op, "ia3_l", ia3_l, gate.shape[-1], gate, task_ids is not None)
    ids = per_sequence(*check_task_ids(op, task_ids, gate.shape[:-1], table.shape[0], gate))
    if use_reference(gate):
        return reference.act_glu(gate, up, table, ids, activation)
    return _glu_op(gate, up, table, ids, activation, differentiable=(gate, up, table))


def ia3_glu_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """The gated feed-forward layer up to its down projection, under (IA)^3 (arXiv 2205.05638, 2002.05202).

    Semantics: ia3_glu(F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias), ia3_l, task_ids, ...)
    The scale that PEFT applies to the down projection's input stands here, where it is free: that layer stays bare.

    Args:
        x: [..., K]; fp32, fp16 or bf16 (fp64 runs on plain PyTorch). Its leading dimensions may be strided.
        gate_weight, up_weight: [N, K] in x's dtype.
        gate_bias, up_bias: [N] in x's dtype, or None.
        ia3_l: [N] or [num_tasks, N], in any of those dtypes.
        task_ids: as in `ia3_linear`: -1 is the base model, None one task for all rows.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        [..., N] in x's dtype, contiguous. Saved for backward: the two pre-activations, and x if a weight needs a
        gradient.

    Raises:
        IndexError: an id outside [-1, num_tasks), on a CPU. On a GPU that row is NaN (PEFT_OPS_DEBUG=1 raises there
            too).
        NotImplementedError, RuntimeError: forward-mode AD, double backward.
    """
    op = "ia3_glu_linear"
    check_tensor(op, "x", x, dtypes=FLOATS)
    if autocast_enabled(x):
        x, gate_weight, up_weight, gate_bias, up_bias = autocast(x, gate_weight, up_weight, gate_bias, up_bias)
    check_layer(op, x, gate_weight, gate_bias, "gate_weight", "gate_bias")
    check_layer(op, x, up_weight, up_bias, "up_weight", "up_bias")
    if gate_weight.shape != up_weight.shape:
        raise ValueError(f"{op}: up_weight must have gate_weight's shape {shape(gate_weight)}, got {shape(up_weight)}")
    check_activation(op, activation)
    table = check_table(op, "ia3_l", ia3_l, gate_weight.shape[0], x, task_ids is not None)
    ids, plan, rows_per_id = check_task_ids(op, task_ids, x.shape[:-1], table.shape[0], x)
    if use_reference(x):
        return reference.ia3_glu_linear(
            x, gate_weight, up_weight, gate_bias, up_bias, ia3_l=table, task_ids=ids, activation=activation
        )
    differentiable = x, gate_weight, up_weight, gate_bias, up_bias, table
    save = needs_gradient(differentiable)
    args = *differentiable, ids, plan, rows_per_id, activation, save
    return _glu_linear_op(*args, differentiable=differentiable)[0]
