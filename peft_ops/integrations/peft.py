"""`adapter_names` for (IA)^3 and prompt adapters in PEFT models: every row of a batch with its own."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_ops.integrations import _fused, _guard, _layers
from peft_ops.integrations._calls import Call, Shared, calling, current_call, forget_steps, in_backward
from peft_ops.integrations._prompts import (
    KINDS,
    by_name,
    forward_inputs,
    generate_with_prompts,
    has_prompts,
    option_of,
    run_with_pads_behind,
    without_prompts,
)
from peft_ops.integrations._swap import Swapped, swap, unswap
from peft_ops.nn.task_bank import BASE, SlotsInUse, TaskBank

SEQUENCE_FIRST = (  # [S, B, K]
    "modeling_xlnet.XLNetLayer", "modeling_fsmt.EncoderLayer", "modeling_fsmt.DecoderLayer",
    "modeling_longformer.LongformerSelfAttention", "modeling_led.LEDEncoderSelfAttention",
)  # fmt: skip
TOWERS = {  # of models that put what they make of images between the embeddings of a text
    "vision_tower", "image_tower", "video_tower", "audio_tower", "vision_model", "visual", "multi_modal_projector",
    "connector", "aligner", "image_embed", "audio_embed",
}  # fmt: skip
FLATTENING = ("OPTDecoderLayer",)  # their feed-forward layers see [B * S, K], in that order


def accelerate(model: nn.Module, bank=None, level: str = "auto", timeout: float = 0.0) -> nn.Module:
    """Give a PEFT model `adapter_names` for (IA)^3, P-Tuning and prompt tuning, and faster layers.

    In place; weights are shared, and state_dict, save_pretrained, load_adapter, set_adapter, disable_adapter,
    merge_and_unload and the like stay PEFT's. Afterwards

        model(**batch, adapter_names=["reviews", "legal", "__base__"])
        model.generate(**batch, adapter_names=[...])

    gives each row what its own adapter alone would have given it in a batch of that shape; in training mode too, where
    each adapter gets the gradient of its own rows. Without adapter_names the model computes what PEFT computes. With
    them prompts stand right before the first real token, which PEFT's do not where padding is on the left; slots that
    shorter prompts leave over are at the front for decoders and at the back for encoders.

    Args:
        model: a peft.PeftModel with adapters of type IA3, P_TUNING or PROMPT_TUNING (PEFT holds one type at a time).
        bank: a peft_ops.nn.TaskBank that serves the names which the model has not loaded; its modules are named as in
            the base model. It may hold vectors for a model with prompts, and prompts for a model with vectors; vectors
            of linear layers alone, not of convolutions or of bitsandbytes layers.
        level: "auto" takes the widest operator that a module's own code allows (`report` lists them); "module" keeps
            one operator per PEFT layer, which on a CPU is bitwise PEFT's result.
        timeout: seconds that a call waits for slots of the bank that calls of other threads hold, until those end;
            then, and with 0 at once, it raises RuntimeError.

    Raises:
        TypeError: the model is no PeftModel.
        ValueError: it holds adapters of another type; a bank whose modules are not the model's linear layers.
        RuntimeError: the installed PEFT computes something else than the releases that this was written for.
    """
    peft = _checked_peft()
    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"accelerate: model must be a peft.PeftModel, got {type(model).__name__}")
    if level not in ("auto", "module"):
        raise ValueError(f"accelerate: level must be 'auto' or 'module', got {level!r}")
    if bank is not None and not isinstance(bank, TaskBank):
        raise TypeError(f"accelerate: bank must be a peft_ops.nn.TaskBank, got {type(bank).__name__}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise ValueError(f"accelerate: timeout must be seconds from 0 on, got {timeout!r}")
    _check_kinds(model)
    if isinstance(model, Swapped):
        restore(model)
    taken = next((name for name, m in model.get_base_model().named_modules() if isinstance(m, Swapped)), None)
    if taken is not None:
        raise ValueError(f"accelerate: the base model must not be another accelerated model's; restore() that: {taken}")
    _put(model, Shared(level, bank, timeout))
    for module in {model.base_model, model.get_base_model()}:
        module.register_forward_pre_hook(_refuse_names, with_kwargs=True)
    return model


def _put(model: nn.Module, shared: Shared) -> None:
    swap(model, MixedModel, _peft_ops=shared)
    try:
        _swap_layers(model)
    except ValueError:
        restore(model)
        raise


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module is of the class that it was of, nothing is left behind."""
    for module in [*model.modules()]:
        if isinstance(module, Swapped):
            unswap(module, *_ATTRIBUTES)
    for module in model.modules():
        func = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(func, _Checkpoint):
            module._gradient_checkpointing_func = func.func
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _refuse_names]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def _refuse_names(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if kwargs.get("adapter_names") is not None:  # which transformers' models would take, and ignore
        raise ValueError(
            f"adapter_names must be given to the PeftModel that accelerate() took, got them in a call of its "
            f"{type(module).__name__}"
        )


_ATTRIBUTES = (
    "_peft_ops", "_peft_ops_key", "_peft_ops_flat", "_peft_ops_form", "_peft_ops_second",
    "_peft_ops_first", "_peft_ops_alone", "_peft_ops_feedforward", "_peft_ops_sees",
)  # fmt: skip


@contextmanager
def using_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Calls inside have these adapter names: for a decoding loop of one's own, whose tables are then made once.

    Prompt adapters belong to inputs, not to layers: give their names to the call that takes the text. Vectors that are
    written inside, loaded or deleted are noticed; parameters put in their place (`.data =`, `.to()`, assign=True) are
    not: do that outside.
    """
    shared = _shared_of(model)
    with ExitStack() as stack:
        call = _call(model, adapter_names, None, 1, stack)
        if has_prompts(model, call):
            raise ValueError("using_adapters: adapter_names must name (IA)^3 adapters, got one with a prompt")
        stack.enter_context(calling(call))
        shared.mixed |= torch.is_grad_enabled()
        shared.in_blocks |= torch.is_grad_enabled()
        yield


class Row(NamedTuple):
    """One line of `report`."""

    module: str
    operator: str
    why_not_higher: str


def report(model: nn.Module, file=None) -> list[Row]:
    """Print which operator serves each adapted module, and why none that does more; returns the same as rows."""
    level = _shared_of(model).level
    rows, base = [], model.get_base_model()
    inside = {}
    for name, module in base.named_modules():
        if isinstance(module, (_fused.FeedForward, _fused.MixedChunk)):
            parts = module.peft_ops_parts()
            inside[parts.down] = name, parts
    for name, module in base.named_modules():
        if isinstance(module, (_layers.MixedLayer, _layers.MixedHead, _layers.BankLinear)):
            rows.append(Row(name, *_operator_of(module, inside.get(module), level)))
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            rows.append(Row(f"prompt_encoder.{name}", "prompt_concat", f"{config.num_virtual_tokens} virtual tokens"))
    width = max([len(row.module) for row in rows], default=0)
    for row in rows:
        print(f"{row.module:{width}}  {row.operator:16}  {row.why_not_higher}".rstrip(), file=file)
    return rows


def _has_active_prompt(model: nn.Module) -> bool:
    config = model.peft_config.get(model.active_adapter)  # None where the last adapter has been deleted
    return config is not None and config.is_prompt_learning


def _operator_of(module: nn.Module, mlp: tuple | None, level: str) -> tuple[str, str]:
    if isinstance(module, _layers.MixedHead):
        return "heads by row", ""
    if isinstance(module, (_layers.MixedConv, _layers.MixedQuantized)):
        return "PEFT by row", type(module.get_base_layer()).__name__
    if mlp is not None:
        name, parts = mlp
        why = _fused.why_not_fused(parts)
        if why is None:
            operator = "ia3_glu_linear" if parts.gate is not None or parts.packed else "ia3_linear"
            return operator, f"with {name}"
        return "ia3_scale", why
    exact = module.why_no_weight()
    if isinstance(module, (_fused.First, _fused.Second)):
        first = module if isinstance(module, _fused.First) else module._peft_ops_first[0]
        why = _fused.why_not_pair(first, first._peft_ops_second[0])
        if why is None and first._peft_ops_second[0]._peft_ops_alone:
            return "ia3_linear", "the second projection was called on another input"
        if why is None:
            return "ia3_kv_linear", "on a GPU; ia3_scale on a CPU"
    if exact is not None:
        return "ia3_scale", exact
    if level == "module":
        return "ia3_linear", "level='module'"
    if module.is_feedforward:
        return "ia3_linear", "no feed-forward code that an operator computes"
    return "ia3_linear", "no second projection of the same input"


def _checked_peft():
    """The peft package, if its models compute what ours do."""
    import peft

    global _probed
    if not _probed:
        problem = _guard.problem(lambda model: _put(model, Shared("module")))
        if problem is not None:
            raise RuntimeError(
                f"accelerate: peft {peft.__version__} is not one of the releases this was written for ("
                f"{_guard.OLDEST} and later): {problem}. Update peft_ops, or use another release of peft"
            )
        _probed = True
    return peft


_probed = False


def _kind(model: nn.Module, name: str) -> str | None:
    config = model.peft_config.get(name)
    return None if config is None else getattr(config.peft_type, "value", str(config.peft_type))


def _check_kinds(model: nn.Module) -> None:
    for name in model.peft_config:
        if _kind(model, name) not in ("IA3", *KINDS):
            raise ValueError(
                f"accelerate: adapters must be of type IA3, {' or '.join(KINDS)}, got {_kind(model, name)} ({name!r})"
            )


def _shared_of(model: nn.Module) -> Shared:
    if not isinstance(model, MixedModel):
        raise TypeError(f"model must have been given to peft_ops.accelerate, got {type(model).__name__}")
    return model._peft_ops


def _swap_layers(model: nn.Module) -> None:
    """Give every adapted module its mixin; those that have one keep it."""
    from peft.tuners import ia3
    from peft.utils import ModulesToSaveWrapper

    shared, base = model._peft_ops, model.get_base_model()
    shared.configs = list(model.peft_config.values())
    kinds = [(ia3.Linear, _layers.MixedLinear), ((ia3.Conv2d, ia3.Conv3d), _layers.MixedConv)]
    quantized = tuple(cls for name in ("Linear8bitLt", "Linear4bit") if (cls := getattr(ia3, name, None)) is not None)
    kinds += [(quantized, _layers.MixedQuantized), (ModulesToSaveWrapper, _layers.MixedHead)]
    for module in base.modules():
        if isinstance(module, _layers.BankLinear):  # PEFT may have wrapped it since, and what wraps it scales
            unswap(module, *_ATTRIBUTES)
    for name, module in base.named_modules():
        if isinstance(module, Swapped):
            continue
        mixin = next((mixin for cls, mixin in kinds if isinstance(module, cls)), None)
        if mixin is not None:
            swap(module, mixin, _peft_ops=shared, _peft_ops_key=name)
        elif shared.bank is not None and name in shared.bank.widths and _features(module) is not None:
            feedforward = _scales_input(module, name, shared.bank)
            swap(module, _layers.BankLinear, _peft_ops=shared, _peft_ops_key=name, _peft_ops_feedforward=feedforward)
    layers = [module for module in base.modules() if isinstance(module, _layers.MixedLayer)]
    shared.layers = {layer._peft_ops_key for layer in layers}
    shared.disabled_layers = {layer._peft_ops_key for layer in layers if layer.disable_adapters}
    if shared.bank is not None:
        _check_bank(base, shared.bank)
    _say_what_layers_see(base)
    for name, module in base.named_modules():
        if type(module).__name__ in FLATTENING:
            for child in module.children():
                if isinstance(child, _layers.ScaledLinear):
                    child._peft_ops_flat = True
        if shared.level == "auto" and not isinstance(module, Swapped):
            _swap_fused(name, module, shared)


def _say_what_layers_see(base: nn.Module) -> None:
    """Where the first dimension of a layer's input is not the batch, but may be as long by chance."""
    for module in base.modules():
        if f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}" in SEQUENCE_FIRST:
            for part in module.modules():
                if isinstance(part, Swapped):
                    part._peft_ops_sees = "positions of the text", ()
    config = vars(getattr(base, "config", object)).items()
    tokens = tuple(value for name, value in config if re.fullmatch(r"(image|video|audio)_token_(id|index)", name))
    for name, module in base.named_modules():
        if isinstance(module, Swapped):
            if "experts" in (parts := name.split(".")):
                module._peft_ops_sees = "tokens that were routed to it", ()
            elif tokens and not TOWERS.isdisjoint(parts):
                module._peft_ops_sees = "images or sounds", tokens


def _features(module: nn.Module) -> tuple[int, int] | None:
    """What a linear layer maps to what; GPT-2's Conv1D holds its weight the other way round."""
    if isinstance(module, (nn.Linear, _layers.MixedLinear)):
        return module.in_features, module.out_features
    if _layers.is_conv1d(module):
        return module.nx, module.nf
    return None


def _scales_input(module: nn.Module, name: str, bank) -> bool:
    width, sizes = bank.widths[name], _features(module)
    if bank.feedforward is not None:
        return name in bank.feedforward
    if width not in sizes or sizes[0] == sizes[1]:
        raise ValueError(
            f"accelerate: bank must say with TaskBank(feedforward=[...]) whether {width} features scale the input or "
            f"the output of {name}, which maps {sizes[0]} to {sizes[1]} features"
        )
    return width == sizes[0]


def _check_bank(base: nn.Module, bank) -> None:
    """Every module of the bank is one of the model's, as wide, and scaled on the same side."""
    found = dict(base.named_modules())
    for name, width in bank.widths.items():
        layer = found.get(name)
        if isinstance(layer, _layers.BankLinear):
            is_input = layer._peft_ops_feedforward
        elif isinstance(layer, _layers.MixedLinear):
            is_input = layer.is_feedforward
        else:
            got = "no such module" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(f"accelerate: bank must hold linear layers of the model, got {name!r}, {got}")
        layer_width = _features(layer)[0 if is_input else 1]
        if width != layer_width or (bank.feedforward is not None and is_input != (name in bank.feedforward)):
            raise ValueError(
                f"accelerate: bank must hold {layer_width} features for the {'input' if is_input else 'output'} of "
                f"{name!r}, got {width} features{'' if width != layer_width else ' for the other side'}"
            )
    if bank.prompts is not None:
        width = base.get_input_embeddings().weight.shape[1]
        if bank.prompts.shape[2] != width:
            raise ValueError(f"accelerate: bank must hold prompts of {width} features, got {bank.prompts.shape[2]}")


def _swap_fused(name: str, module: nn.Module, shared: Shared) -> None:
    form = _fused.FORMS.get(_fused.code_of(type(module)))
    if getattr(module, "slow_but_exact", False):  # Bloom's, which reads its last layer's weight past the layer
        form = None
    if form is not None and isinstance(getattr(module, form.down, None), _layers.ScaledLinear):
        swap(module, _fused.MixedMLP, _peft_ops=shared, _peft_ops_form=form)
    elif _fused.is_chunk(module) and isinstance(module.output.dense, _layers.ScaledLinear):
        swap(module, _fused.MixedChunk, _peft_ops=shared)
    elif isinstance(getattr(module, "fc2", None), _layers.ScaledLinear):
        found = _fused.inline_of(type(module))
        if found is not None:
            swap(module, _fused.MixedInline, _peft_ops=shared, _peft_ops_form=found[0])
    for names in _fused.PAIRS:
        pair = [getattr(module, name, None) for name in names]
        if all(type(layer) is type(pair[0]) and _is_plain_linear(layer) for layer in pair):
            if _fused.why_not_pair(*pair) is None and not _fused.reads_two_texts(name, names):
                first, second = pair
                mixins = _fused.PairFirst, _fused.PairSecond
                if isinstance(first, _layers.BankLinear):
                    mixins = _fused.BankFirst, _fused.BankSecond
                _change_mixin(first, mixins[0], _peft_ops_second=(second,))
                _change_mixin(second, mixins[1], _peft_ops_first=(first,), _peft_ops_alone=False)
                break


def _is_plain_linear(layer) -> bool:
    return isinstance(layer, _layers.ScaledLinear) and not isinstance(layer, (_fused.First, _fused.Second))


def _change_mixin(module: nn.Module, mixin: type, **attributes) -> None:
    unswap(module)
    swap(module, mixin, **attributes)


class _Checkpoint:
    """A checkpointing function that runs again under the adapter names that it ran under first."""

    def __init__(self, func):
        self.func = func

    def __call__(self, function, *args, **kwargs):
        call = current_call()

        def run(*args, **kwargs):
            with calling(call):
                return function(*args, **kwargs)

        return self.func(run, *args, **kwargs)


class MixedModel(Swapped):
    """peft.PeftModel with adapter_names."""

    def forward(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        if adapter_names is None:
            with calling(self._unnamed()):
                return super().forward(*args, **kwargs)
        with ExitStack() as stack:
            ids = _input_ids(args, kwargs)
            # models of multiple choice flatten [B, choices, S] to rows
            choices = ids.shape[1] if ids is not None and ids.dim() == 3 else 1
            call = _call(self, adapter_names, _rows(args, kwargs), 1, stack, choices)
            call.input_ids = ids
            if torch.is_grad_enabled():
                self._peft_ops.mixed = True
                self._keep_calls_through_checkpoints()
            stack.enter_context(calling(call))
            base = self.get_base_model()
            if has_prompts(self, call):
                return run_with_pads_behind(base, base, forward_inputs(self, call, by_name(self, args, kwargs)))
            if _has_active_prompt(self):  # without a prompt this is the base model
                return run_with_pads_behind(base, base, without_prompts(self, by_name(self, args, kwargs)))
            return super().forward(*args, **kwargs)

    def generate(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        if adapter_names is None:
            with calling(self._unnamed()):
                return super().generate(*args, **kwargs)
        with ExitStack() as stack:
            call = _call(self, adapter_names, _rows(args, kwargs), self._repeats(kwargs), stack)
            call.input_ids = _input_ids(args, kwargs)
            stack.enter_context(calling(call))
            base = self.get_base_model()
            if has_prompts(self, call):
                return generate_with_prompts(self, call, args, kwargs)
            if _has_active_prompt(self):
                return run_with_pads_behind(base, partial(base.generate, *args), kwargs)
            return super().generate(*args, **kwargs)

    def _repeats(self, kwargs: dict) -> int:
        """How many rows generate() makes of each: its beams, or the sequences that it samples."""
        return max(option_of(self.get_base_model(), kwargs, f"num_{of}") or 1 for of in ("beams", "return_sequences"))

    def _unnamed(self) -> Call:
        """The call around this one, if its names are for this model; else one that only keeps what layers prepare."""
        around = current_call()
        if around is None or around.shared is not self._peft_ops:
            if self._peft_ops.in_blocks and in_backward():
                raise RuntimeError(
                    "using_adapters: the model runs again in backward(), outside the block that named its adapters; "
                    "call backward() inside the block, or give adapter_names to the call"
                )
            return Call(self._peft_ops)
        gone = next((name for name in around.names if name not in self.peft_config and name not in around.held), None)
        if gone is not None:
            raise ValueError(_unknown(self, gone))
        around.renew()
        around.keep_bank_rows()
        return around

    @contextmanager
    def disable_adapter(self):
        with super().disable_adapter():
            shared, unnamed = self._peft_ops, self.forward  # PEFT puts a base model's here, which takes no names

            def forward(*args, adapter_names: Sequence[str] | None = None, **kwargs):
                if adapter_names is None:
                    return unnamed(*args, **kwargs)
                return MixedModel.forward(self, *args, adapter_names=adapter_names, **kwargs)

            before, shared.disabled = shared.disabled, True
            forget_steps(shared)  # a bank's layers have no switch of PEFT's that would
            if _has_active_prompt(self):
                self.forward = forward
            try:
                yield
            finally:
                shared.disabled = before
                forget_steps(shared)

    def merge_and_unload(self, *args, **kwargs):
        return restore(self.base_model.merge_and_unload(*args, **kwargs))

    def unload(self, *args, **kwargs):
        return restore(self.base_model.unload(*args, **kwargs))

    def add_adapter(self, *args, **kwargs):
        super().add_adapter(*args, **kwargs)
        _check_kinds(self)
        _swap_layers(self)

    def _keep_calls_through_checkpoints(self) -> None:
        """Both kinds of activation checkpointing run a layer again in backward(), when this call has long ended."""
        for module in self.modules():
            func = module.__dict__.get("_gradient_checkpointing_func")
            if func is not None and not isinstance(func, _Checkpoint):
                module._gradient_checkpointing_func = _Checkpoint(func)


def _rows(args: tuple, kwargs: dict) -> int | None:
    """Rows of the batch: the first dimension of what the model is called with."""
    names = (
        "input_ids", "inputs", "inputs_embeds", "input_features", "input_values", "pixel_values", "decoder_input_ids",
        "decoder_inputs_embeds",
    )  # fmt: skip
    encoded = kwargs.get("encoder_outputs")
    encoded = encoded[0] if isinstance(encoded, tuple) else getattr(encoded, "last_hidden_state", None)
    tensors = [*args[:1], *(kwargs.get(name) for name in names), encoded]
    return next((t.shape[0] for t in tensors if isinstance(t, Tensor)), None)


def _input_ids(args: tuple, kwargs: dict) -> Tensor | None:
    ids = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]) if t is not None), None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None


def _call(model: nn.Module, adapter_names, rows: int | None, repeats: int, stack: ExitStack, choices: int = 1) -> Call:
    shared = model._peft_ops
    if isinstance(adapter_names, (str, bytes)) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names must be a list of names, one per row, got {type(adapter_names).__name__}")
    wrong = [type(name).__name__ for name in adapter_names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"adapter_names must hold names, {BASE!r} for the base model, got {wrong[0]}")
    if not adapter_names or (rows is not None and len(adapter_names) != rows):
        what = "a batch" if rows is None else f"{rows} rows"
        raise ValueError(f"adapter_names must hold one name per row, for {what}, got {len(adapter_names)}")
    configs = list(model.peft_config.values())
    if len(configs) != len(shared.configs) or any(a is not b for a, b in zip(configs, shared.configs, strict=True)):
        _check_kinds(model)
        _swap_layers(model)  # an adapter has come that may have targeted other modules
    elsewhere = [name for name in dict.fromkeys(adapter_names) if name != BASE and name not in model.peft_config]
    held = {}
    if elsewhere:
        if shared.bank is None:
            raise ValueError(_unknown(model, elsewhere[0]))
        try:
            held = stack.enter_context(shared.bank.hold(elsewhere, shared.timeout))
        except KeyError as error:
            raise ValueError(f"{_unknown(model, elsewhere[0])}; {error.args[0]}") from error
        except SlotsInUse as error:
            raise SlotsInUse(
                f"adapter_names: the bank has no free slot for all of {elsewhere} while other calls run: give the bank "
                f"more slots, call again when one has ended, or let calls wait with accelerate(model, bank=bank, "
                f"timeout=seconds); {error}"
            ) from error
    off = shared.is_off
    rows = [None if name == BASE or off else name for name in adapter_names]
    rows = [name for name in rows for _ in range(choices)]
    call = Call(shared, rows, repeats, {} if off else held)
    call.keep_bank_rows()  # a checkpoint runs without gradients now, and with them when the slots are free
    return call


def _unknown(model: nn.Module, name: str) -> str:
    some = ", ".join(map(repr, [*model.peft_config][:20]))
    return (
        f"adapter_names must name adapters of the model, [{some}] or {BASE!r}, got {name!r}; load it with "
        f"model.load_adapter(..., adapter_name={name!r})"
    )
