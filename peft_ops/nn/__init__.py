"""Modules over the operators: frozen layers with many adapters, and the context that says which row uses which."""

from peft_ops.nn.adapters import check_adapters
from peft_ops.nn.ia3 import IA3GatedMLP, IA3Linear
from peft_ops.nn.multitask_prompts import MultitaskPromptEmbedding
from peft_ops.nn.prompt_encoders import PromptEncoder, PromptNetwork
from peft_ops.nn.prompts import PromptEmbedding
from peft_ops.nn.task_bank import BankStats, TaskBank
from peft_ops.nn.tasks import TaskBatch, current_tasks, tasks
from peft_ops.nn.template import Template

__all__ = [
    "BankStats",
    "IA3GatedMLP",
    "IA3Linear",
    "MultitaskPromptEmbedding",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptNetwork",
    "TaskBank",
    "TaskBatch",
    "Template",
    "check_adapters",
    "current_tasks",
    "tasks",
]
