"""Modules over the operators: frozen layers with many adapters, and the context that says which row uses which."""

from peft_ops.nn.ia3 import IA3GatedMLP, IA3Linear
from peft_ops.nn.prompts import PromptEmbedding, PromptEncoder
from peft_ops.nn.tasks import TaskBatch, current_tasks, tasks
from peft_ops.nn.template import Template

__all__ = [
    "IA3GatedMLP",
    "IA3Linear",
    "PromptEmbedding",
    "PromptEncoder",
    "TaskBatch",
    "Template",
    "current_tasks",
    "tasks",
]
