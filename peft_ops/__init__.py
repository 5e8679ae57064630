"""Fused (IA)^3 and P-Tuning operators: one frozen model, many tasks, each row of a batch with its own."""

from peft_ops._backend import get_backend, set_backend
from peft_ops.integrations.peft import accelerate, report, restore, using_adapters
from peft_ops.ops.ia3_glu import ia3_glu, ia3_glu_linear
from peft_ops.ops.ia3_kv_linear import ia3_kv_linear
from peft_ops.ops.ia3_linear import ia3_fold, ia3_linear
from peft_ops.ops.ia3_scale import ia3_scale
from peft_ops.ops.prompt_concat import prompt_concat
from peft_ops.ops.prompt_concat_packed import prompt_concat_packed
from peft_ops.ops.prompt_embed import prompt_embed
from peft_ops.ops.task_plan import plan_tasks
from peft_ops.reference import PackedPromptBatch, PromptBatch, TaskPlan

__version__ = "0.1.0"

__all__ = [
    "PackedPromptBatch",
    "PromptBatch",
    "TaskPlan",
    "accelerate",
    "get_backend",
    "ia3_fold",
    "ia3_glu",
    "ia3_glu_linear",
    "ia3_kv_linear",
    "ia3_linear",
    "ia3_scale",
    "plan_tasks",
    "prompt_concat",
    "prompt_concat_packed",
    "prompt_embed",
    "report",
    "restore",
    "set_backend",
    "using_adapters",
]
