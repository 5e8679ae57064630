"""Operators as torch sees them: all schemas in one table, and the doors from a public function to its operator."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from peft_ops._backend import INTERPRET, get_backend
from peft_ops._native_rule import CUDA_OPS, native_wins, native_wins_on_cuda

SCHEMAS = {
    "plan_tasks": "(Tensor task_ids, Tensor? cu_seqlens, SymInt rows, SymInt num_tasks)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "ia3_scale": "(Tensor x, Tensor ia3_l, Tensor? task_ids, str? activation) -> Tensor",
    "ia3_scale_backward": "(Tensor dy, Tensor x, Tensor ia3_l, Tensor? task_ids, str? activation, bool[2] needs)"
    " -> (Tensor, Tensor)",
    "ia3_linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor ia3_l, Tensor? task_ids, Tensor[]? plan,"
    " SymInt rows_per_id, str? activation, bool is_feedforward, bool save) -> (Tensor, Tensor)",
    "ia3_kv_linear": "(Tensor x, Tensor k_weight, Tensor v_weight, Tensor? k_bias, Tensor? v_bias, Tensor k_ia3_l,"
    " Tensor v_ia3_l, Tensor? task_ids, Tensor[]? plan, SymInt rows_per_id, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "ia3_glu": "(Tensor gate, Tensor up, Tensor ia3_l, Tensor? task_ids, str? activation) -> Tensor",
    "ia3_glu_backward": "(Tensor dh, Tensor gate, Tensor up, Tensor ia3_l, Tensor? task_ids, str? activation,"
    " bool[2] needs) -> (Tensor, Tensor, Tensor)",
    "ia3_glu_linear": "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias,"
    " Tensor ia3_l, Tensor? task_ids, Tensor[]? plan, SymInt rows_per_id, str? activation, bool save)"
    " -> (Tensor, Tensor, Tensor)",
    "prompt_concat": "(Tensor tokens, Tensor? embedding, Tensor prompts, Tensor? position_embedding,"
    " Tensor? token_type_embedding, Tensor? task_ids, Tensor? prompt_lengths, Tensor? attention_mask, Tensor? labels,"
    " Tensor? token_type_ids, SymInt position_offset, float embed_scale, bool left, bool after_bos)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "prompt_concat_backward": "(Tensor dout, Tensor layout, SymInt num_tasks, SymInt P) -> Tensor",
    "prompt_embed": "(Tensor input_ids, Tensor embedding, Tensor prompts, Tensor? position_embedding,"
    " Tensor? token_type_embedding, Tensor? task_ids, Tensor? prompt_lengths, Tensor? position_ids,"
    " Tensor? token_type_ids, SymInt position_offset, float embed_scale) -> (Tensor, Tensor)",
    "prompt_embed_backward": "(Tensor dout, Tensor rows, SymInt num_tasks, SymInt P) -> Tensor",
    "prompt_concat_packed": "(Tensor tokens, Tensor cu_seqlens, Tensor? embedding, Tensor prompts, Tensor? task_ids,"
    " Tensor? prompt_lengths, Tensor? labels, SymInt max_seqlen, SymInt num_rows, float embed_scale, bool after_bos)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "prompt_concat_packed_backward": "(Tensor dout, Tensor layout, Tensor cu_seqlens, SymInt num_tasks, SymInt P)"
    " -> Tensor",
}
# csrc/cpu implements these, csrc/cuda those of CUDA_OPS.
# x, dy, z, gate, up, dh: [M, N], last dimension contiguous, or [..., N], contiguous; task_ids: [G], G dividing M
NATIVE_SCHEMAS = {
    "first_bad_id": "(Tensor ids, int low, int end) -> int",
    "first_bad_offset": "(Tensor cu_seqlens, int total, int max_seqlen) -> int",
    "ia3_glu": "(Tensor gate, Tensor up, Tensor ia3_l, Tensor? task_ids, str? activation) -> Tensor",
    "ia3_glu_backward": "(Tensor dh, Tensor gate, Tensor up, Tensor ia3_l, Tensor? task_ids, str? activation,"
    " bool need_dx, bool need_dl) -> (Tensor, Tensor, Tensor)",
    "ia3_scale": "(Tensor x, Tensor ia3_l, Tensor? task_ids, str? activation) -> Tensor",
    "ia3_scale_backward": "(Tensor dy, Tensor z, Tensor ia3_l, Tensor? task_ids, str? activation,"
    " bool need_dz, bool need_dl) -> (Tensor, Tensor)",
    "prompt_layout": "(Tensor tokens, Tensor prompts, Tensor? task_ids, Tensor? prompt_lengths, Tensor? attention_mask,"
    " Tensor? labels, bool left, bool after_bos) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "prompt_concat": "(Tensor tokens, Tensor? embedding, Tensor prompts, Tensor layout, float scale, Tensor? types,"
    " Tensor? type_embedding, Tensor? positions, Tensor? position_embedding) -> Tensor",
    "prompt_concat_backward": "(Tensor dout, Tensor layout, int num_tasks, int P) -> Tensor",
    "packed_layout": "(Tensor tokens, Tensor cu_seqlens, Tensor prompts, Tensor? task_ids, Tensor? prompt_lengths,"
    " Tensor? labels, int num_rows, bool after_bos) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "prompt_concat_packed": "(Tensor tokens, Tensor? embedding, Tensor prompts, Tensor layout, Tensor cu_seqlens,"
    " int num_rows, float scale) -> Tensor",
    "prompt_concat_packed_backward": "(Tensor dout, Tensor layout, Tensor cu_seqlens, int num_tasks, int P) -> Tensor",
    "prompt_embed": "(Tensor input_ids, Tensor embedding, Tensor prompts, Tensor? task_ids, Tensor? prompt_lengths,"
    " float scale, Tensor? types, Tensor? type_embedding, Tensor? positions, Tensor? position_embedding)"
    " -> (Tensor, Tensor)",
    "prompt_embed_backward": "(Tensor dout, Tensor rows, int num_tasks, int P) -> Tensor",
}

_lib = torch.library.Library("peft_ops", "DEF")
_native_lib = torch.library.Library("peft_ops_native", "DEF")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
for _name, _schema in NATIVE_SCHEMAS.items():
    _native_lib.define(_name + _schema)

native = torch.ops.peft_ops_native


def _load_native() -> frozenset[str]:
    """Load what was built, the CUDA library only where torch has CUDA. Returns the devices that have native kernels."""
    loaded = set()
    for name, device in {"_C": "cpu", **({"_C_cuda": "cuda"} if torch.version.cuda else {})}.items():
        for path in Path(__file__).parent.glob(f"{name}.*so"):
            try:
                torch.ops.load_library(path)
            except OSError as error:
                instead = "plain PyTorch runs" if device == "cpu" else "Triton runs"
                warnings.warn(f"peft_ops: {path.name} cannot be loaded, {instead} instead: {error}", stacklevel=2)
            else:
                loaded.add(device)
    return frozenset(loaded)


_NATIVE = _load_native()


def has_native(device: str = "cpu") -> bool:
    return device in _NATIVE


def use_native(op: str, x: Tensor, fused: bool = True, numel: int | None = None) -> bool:
    """Whether the C++ kernel of `op` serves x. fused: it does more than scale by one vector.

    numel: elements that it writes; None: as many as x has.
    """
    backend, device = get_backend(), x.device.type
    if backend == "native" and device in ("cpu", "cuda") and not has_native(device):
        library = "CUDA library" if device == "cuda" else "library"
        raise RuntimeError(
            f"{op}: backend 'native' needs the compiled {library}, which this install lacks; "
            f"see python -m peft_ops.info"
        )
    if x.dtype == torch.float64 or not has_native(device) or (device == "cuda" and op not in CUDA_OPS):
        return False
    if backend != "auto":
        return backend == "native"
    if device == "cuda":
        return native_wins_on_cuda(op, x.numel() if numel is None else numel)
    return not INTERPRET and native_wins(op, x.dtype, fused)


# Names under torch._C are private: where one is missing, the slower public road is taken.
_BelowAutograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
_functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)


def below_autograd(op: Callable, *args):
    """Call an operator past the autograd keys: nothing needs a gradient, and finding that out again costs 5 us."""
    with _BelowAutograd():
        return op(*args)


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # any() over a generator costs 0.4 us more
            if t is not None and t.requires_grad:
                return True
    return False


def _functorch_active() -> bool:
    return _functorch is not None and _functorch() is not None


def _forward_mode_active() -> bool:
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


@contextmanager
def _no_autocast():
    kinds = [k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def refuse_double_backward(op: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: double backward is not supported (create_graph=True); "
            f"use peft_ops.set_backend('reference') for higher derivatives"
        )


class Operator:
    """One operator: its implementation for CPU and CUDA, fake, and gradient. Calling it takes the cheapest door.

    Args:
        name: a key of SCHEMAS.
        implementation: runs on real tensors and chooses the kernel.
        fake: shapes and dtypes of the outputs.
        setup_context, backward: as in torch.library.register_autograd; None for an operator without a gradient.
    """

    def __init__(
        self,
        name: str,
        implementation: Callable,
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
    ):
        self.name = name
        _lib.impl(name, implementation, "CPU")
        _lib.impl(name, implementation, "CUDA")
        torch.library.register_fake(f"peft_ops::{name}", fake, lib=_lib)
        self.overload = overload = getattr(torch.ops.peft_ops, name).default
        self.apply = None
        if backward is None:
            return

        def checked_setup_context(ctx, inputs, output):
            ctx.num_inputs = len(inputs)
            ctx.set_materialize_grads(False)  # no zeros the size of an activation for outputs without a gradient
            setup_context(ctx, inputs, output)

        def checked_backward(ctx, *grads):
            refuse_double_backward(name)
            if all(grad is None for grad in grads):
                return (None,) * ctx.num_inputs
            with _no_autocast():  # the gradient has the forward's dtypes, wherever backward() is called
                return backward(ctx, *grads)

        def registered_setup_context(ctx, inputs, output):
            ctx.list_sizes = {i: len(value) for i, value in enumerate(inputs) if isinstance(value, (list, tuple))}
            checked_setup_context(ctx, inputs, output)

        def registered_backward(ctx, *grads):
            grads = list(checked_backward(ctx, *grads))
            for i, size in ctx.list_sizes.items():  # a list of tensors wants a list of gradients
                grads[i] = [None] * size
            return tuple(grads)

        torch.library.register_autograd(
            f"peft_ops::{name}", registered_backward, setup_context=registered_setup_context, lib=_lib
        )

        class Function(torch.autograd.Function):  # 7 us cheaper per call than the registered gradient
            @staticmethod
            def forward(ctx, *args):
                output = below_autograd(overload, *args)
                checked_setup_context(ctx, args, output)
                return output

            backward = staticmethod(checked_backward)

        Function.__name__ = Function.__qualname__ = name
        self.apply = super(torch.autograd.Function, Function).apply  # past its own apply, which is for functorch: 1 us

    def __call__(self, *args, differentiable: Sequence[Tensor | None] = ()):
        """Args: the operator's, in schema order; `differentiable` are those that may carry a gradient."""
        if torch.compiler.is_compiling():
            return self.overload(*args)  # traced once; the registered gradient serves it
        if self.apply is not None:
            if _forward_mode_active():
                # a dual tensor has requires_grad False and would lose its tangent without a word
                raise NotImplementedError(
                    f"{self.name}: forward-mode AD is not supported; use peft_ops.set_backend('reference')"
                )
            if needs_gradient(differentiable):
                return self.apply(*args)
        with _BelowAutograd():
            return self.overload(*args)


def use_reference(x: Tensor) -> bool:
    """Chosen before the operator: compilers and functorch then see plain PyTorch, and other devices work."""
    if get_backend() == "reference" or not (x.is_cpu or x.is_cuda or x.is_meta):  # device.type is a new string
        return True
    # Dynamo answers the question for functorch's interpreters with yes, although none is there
    return not torch.compiler.is_compiling() and _functorch_active()
