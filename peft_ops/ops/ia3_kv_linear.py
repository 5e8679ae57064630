"""Two linear layers over one x, each with its own (IA)^3 vector: k = (x Wk^T) * lk[t], v = (x Wv^T) * lv[t]."""

import torch
from torch import Tensor

from peft_ops import reference
from peft_ops._backend import LazyKernels, use_triton
from peft_ops._checks import FLOATS, check_ids_in_range, check_table, check_task_ids, check_tensor, shape
from peft_ops._launch import launch
from peft_ops._library import Operator, needs_gradient, use_reference
from peft_ops.ops import ia3_linear as single
from peft_ops.ops.ia3_linear import (
    aligned,
    autocast,
    autocast_enabled,
    capability_of,
    launch_linear,
    launch_with_scratch,
    linear_backward,
    persistent,
    plan_arguments,
    split_workspace,
    vendor_linear,
)
from peft_ops.ops.ia3_scale import as_rows, scale_forward, shaped
from peft_ops.ops.task_plan import per_sequence
from peft_ops.reference import TaskPlan

kernels, dual, tiles = LazyKernels("ia3_kv_linear"), LazyKernels("dual"), LazyKernels("tiles")


def _both_biases(
    k_bias: Tensor | None, v_bias: Tensor | None, k: Tensor, v: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A kernel that branches on the pointers wants both or none; one alone is rare, zeros stand in for the other."""
    if (k_bias is None) == (v_bias is None):
        return k_bias, v_bias
    return (k.new_zeros(k.shape[1]), v_bias) if k_bias is None else (k_bias, v.new_zeros(v.shape[1]))


def launch_kv(x, k_weight, v_weight, k_bias, v_bias, k_l, v_l, task_ids, plan, rows_per_id) -> tuple[Tensor, Tensor]:
    """k [M, K_N] and v [M, V_N] in x's dtype, in one launch; x aligned, both weights contiguous."""
    (M, K), k_n, v_n = x.shape, k_weight.shape[0], v_weight.shape[0]
    k_bias, v_bias, task_ids = (None if t is None else t.contiguous() for t in (k_bias, v_bias, task_ids))
    k, v = (torch.empty((M, n), dtype=x.dtype, device=x.device) for n in (k_n, v_n))
    capability, num_sms = capability_of(x)
    tables, tasks = (k_l, v_l), k_l.shape[0]
    rows = 1 if task_ids is None else M // task_ids.numel()
    widest = max(k_n, v_n)
    with torch.cuda.device_of(x):
        if M <= tiles.VECTOR_M:
            tile = tiles.linear_vector(M, widest, K, capability, fp32=x.dtype == torch.float32)
            k_bias, v_bias = _both_biases(k_bias, v_bias, k, v)
            launch(
                kernels.ia3_kv_linear_vector_kernel, (tiles.cdiv(widest, tile["BLOCK_N"]), 2),
                x, k_weight, v_weight, k_bias, v_bias, *tables, task_ids, k, v,
                M, k_n, v_n, K, rows, tasks,
                x.stride(0), k_l.stride(0), v_l.stride(0),
                HAS_IDS=task_ids is not None, HAS_BIAS=k_bias is not None, EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
            )  # fmt: skip
        elif tiles.linear_is_small(M, k_n + v_n, capability):
            tile = tiles.linear_small(M, k_n + v_n, K, capability)
            k_bias, v_bias = _both_biases(k_bias, v_bias, k, v)
            parts, tiles_m = tile["SPLIT"], tiles.cdiv(M, tile["BLOCK_M"])
            k_tiles, v_tiles = (tiles_m * tiles.cdiv(n, tile["BLOCK_N"]) for n in (k_n, v_n))
            part, count = split_workspace(x, k_tiles + v_tiles, parts, M, k_n + v_n)
            launch(
                kernels.ia3_kv_linear_small_kernel, (max(k_tiles, v_tiles), parts, 2),
                x, k_weight, v_weight, k_bias, v_bias, *tables, task_ids, k, v, part, count,
                M, k_n, v_n, K, rows, tasks, tiles.k_per_split(K, tile),
                x.stride(0), k_l.stride(0), v_l.stride(0),
                HAS_IDS=task_ids is not None, HAS_BIAS=k_bias is not None, EVEN_K=K % tile["BLOCK_K"] == 0, **tile,
            )  # fmt: skip
        else:
            plan, mode = plan_arguments(task_ids, plan, rows_per_id, M, tasks)
            runs = mode == "runs"
            if k_n == v_n:
                tile = tiles.dual_linear(M, k_n, K, capability, runs=runs)
                grid, tile = persistent(tile, M, k_n, num_sms)
                launch_with_scratch(
                    dual.dual_linear_kernel, grid,
                    x, k_weight, v_weight, k_bias, v_bias, *tables, *plan, k, v, None, None,
                    M, k_n, K, tasks,
                    x.stride(0), k_l.stride(0), v_l.stride(0),
                    GATED=False, HAS_A_BIAS=k_bias is not None, HAS_B_BIAS=v_bias is not None, ACTIVATION=None,
                    SAVE=False, TASKS=mode, TILE=tiles.PLAN_TILE, **tile,
                )  # fmt: skip
            else:
                tile = tiles.linear_one_tile(M, k_n + v_n, K, capability)
                tiles_n = tiles.cdiv(k_n, tile["BLOCK_N"]) + tiles.cdiv(v_n, tile["BLOCK_N"])
                launch_with_scratch(
                    kernels.ia3_kv_linear_kernel, (tiles.cdiv(M, tile["BLOCK_M"]) * tiles_n,),
                    x, k_weight, v_weight, k_bias, v_bias, *tables, *plan, k, v,
                    M, k_n, v_n, K, tasks,
                    x.stride(0), k_l.stride(0), v_l.stride(0),
                    HAS_K_BIAS=k_bias is not None, HAS_V_BIAS=v_bias is not None, TASKS=mode, TILE=tiles.PLAN_TILE,
                    **tile,
                )  # fmt: skip
    return k, v


def _ia3_kv_linear(x, k_weight, v_weight, k_bias, v_bias, k_l, v_l, task_ids, plan, rows_per_id, save):
    op = "ia3_kv_linear"
    nothing = x.new_empty(0)
    sides = (k_weight, k_bias, k_l), (v_weight, v_bias, v_l)
    fused = use_triton(op, x) and x.numel() > 0 and single.is_fused(op, as_rows(x), k_weight, v_weight)
    if not fused:
        zs = [vendor_linear(x, weight, bias) for weight, bias, _ in sides]
        k, v = (scale_forward(op, z, table, task_ids) for z, (_, _, table) in zip(zs, sides, strict=True))
        return k, v, *((z.contiguous() for z in zs) if save else (nothing, x.new_empty(0)))
    rows, lead = as_rows(x), x.shape[:-1]
    check_ids_in_range(op, task_ids, k_l.shape[0])
    one_launch = (
        not save
        and k_l.dtype == v_l.dtype
        and aligned(rows, k_weight, v_weight)
        and all(w.shape[0] % 16 == 0 for w in (k_weight, v_weight))
    )
    if one_launch and k_weight.is_contiguous() and v_weight.is_contiguous():
        k, v = launch_kv(rows, k_weight, v_weight, k_bias, v_bias, k_l, v_l, task_ids, plan, rows_per_id)
        return shaped(k, (*lead, k.shape[1])), shaped(v, (*lead, v.shape[1])), nothing, x.new_empty(0)
    (k, zk), (v, zv) = (
        launch_linear(rows, weight, bias, table, task_ids, plan, rows_per_id, None, save)
        for weight, bias, table in sides
    )
    saved = (shaped(zk, (*lead, zk.shape[1])), shaped(zv, (*lead, zv.shape[1]))) if save else (nothing, x.new_empty(0))
    return shaped(k, (*lead, k.shape[1])), shaped(v, (*lead, v.shape[1])), *saved


def _fake(x, k_weight, v_weight, k_bias, v_bias, k_l, v_l, task_ids, plan, rows_per_id, save):
    def new(weight, wanted):
        return torch.empty((*x.shape[:-1], weight.shape[0]) if wanted else 0, dtype=x.dtype, device=x.device)

    return new(k_weight, True), new(v_weight, True), new(k_weight, save), new(v_weight, save)


def _setup_context(ctx, inputs, output):
    x, k_weight, v_weight, k_bias, v_bias, k_l, v_l, task_ids, plan, rows_per_id, save = inputs
    need_x, need_kw, need_vw, _, _, need_kl, need_vl = ctx.needs_input_grad[:7]
    if (need_kl or need_vl) and not save:
        raise RuntimeError("ia3_kv_linear: save must be True for a gradient of k_ia3_l or v_ia3_l, got False")
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(
        x if need_kw or need_vw else None,
        k_weight if need_x else None,
        v_weight if need_x else None,
        k_l,
        v_l,
        per_sequence(task_ids, plan, rows_per_id),
        output[2] if need_kl else None,
        output[3] if need_vl else None,
    )


def _backward(ctx, dk, dv, *_):
    x, k_weight, v_weight, k_l, v_l, task_ids, zk, zv = ctx.saved_tensors
    need_x, need_kw, need_vw, need_kb, need_vb, need_kl, need_vl = ctx.needs_input_grad[:7]
    sides = (
        (dk, k_weight, k_l, zk, (need_x, need_kw, need_kb, need_kl)),
        (dv, v_weight, v_l, zv, (need_x, need_vw, need_vb, need_vl)),
    )
    dx, grads = None, []
    for dy, weight, table, z, needs in sides:
        if dy is None:  # an output that nobody used has no gradient, and its tensors get none
            grads.append((None, None, None))
            continue
        dx, *rest = linear_backward(dy, x, weight, table, task_ids, z, None, needs, onto=dx)
        grads.append(rest)
    (dkw, dkb, dkl), (dvw, dvb, dvl) = grads
    return dx, dkw, dvw, dkb, dvb, dkl, dvl, None, None, None, None


_op = Operator("ia3_kv_linear", _ia3_kv_linear, _fake, _setup_context, _backward)


def ia3_kv_linear(
    x: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    *,
    k_ia3_l: Tensor,
    v_ia3_l: Tensor,
    task_ids: Tensor | TaskPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Any two projections of one x under (IA)^3 (arXiv 2205.05638), keys and values say, in one pass over x.

    Semantics: ia3_linear(x, k_weight, k_bias, ia3_l=k_ia3_l, task_ids=task_ids), and the same with v_*.

    Args:
        x: [..., K]; fp32, fp16 or bf16 (fp64 runs on plain PyTorch). Its leading dimensions may be strided.
        k_weight, v_weight: [K_N, K] and [V_N, K] in x's dtype; the widths may differ.
        k_bias, v_bias: [K_N] and [V_N] in x's dtype, or None.
        k_ia3_l, v_ia3_l: [num_tasks, K_N] and [num_tasks, V_N] (or [K_N], [V_N]), in any of those dtypes.
        task_ids: as in `ia3_linear`: -1 is the base model, None one task for all rows.

    Returns:
        k [..., K_N] and v [..., V_N] in x's dtype, contiguous. Saved for backward: what two ia3_linear would save.

    Raises:
        IndexError: an id outside [-1, num_tasks), on a CPU. On a GPU that row is NaN (PEFT_OPS_DEBUG=1 raises there
            too).
        NotImplementedError, RuntimeError: forward-mode AD, double backward.
    """
    op = "ia3_kv_linear"
    check_tensor(op, "x", x, dtypes=FLOATS)
    if autocast_enabled(x):
        x, k_weight, v_weight, k_bias, v_bias = autocast(x, k_weight, v_weight, k_bias, v_bias)
    has_ids = task_ids is not None
    k_N, _ = single.check_layer(op, x, k_weight, k_bias, "k_weight", "k_bias")
    k_l = check_table(op, "k_ia3_l", k_ia3_l, k_N, x, has_ids)
    v_N, _ = single.check_layer(op, x, v_weight, v_bias, "v_weight", "v_bias")
    v_l = check_table(op, "v_ia3_l", v_ia3_l, v_N, x, has_ids)
    if k_l.shape[0] != v_l.shape[0]:
        raise ValueError(f"{op}: v_ia3_l must hold {k_l.shape[0]} tasks as k_ia3_l does, got shape {shape(v_l)}")
    ids, plan, rows_per_id = check_task_ids(op, task_ids, x.shape[:-1], k_l.shape[0], x)
    if use_reference(x):
        return reference.ia3_kv_linear(x, k_weight, v_weight, k_bias, v_bias, k_ia3_l=k_l, v_ia3_l=v_l, task_ids=ids)
    save = needs_gradient((k_l, v_l))
    args = x, k_weight, v_weight, k_bias, v_bias, k_l, v_l, ids, plan, rows_per_id, save
    return _op(*args, differentiable=args[:7])[:2]
