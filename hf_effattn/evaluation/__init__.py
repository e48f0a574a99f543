"""Evaluation on long documents: tasks whose answers are generated, perplexity, and reports beside the dense model."""

from . import tasks  # noqa: F401  (registers them)
from .base import TASKS, Example, GenerationTask, Material, Task
from .report import Results, markdown
from .runner import Settings, evaluate
from .subject import Subject
from .variants import Variant

__all__ = [
    "TASKS",
    "Example",
    "GenerationTask",
    "Material",
    "Results",
    "Settings",
    "Subject",
    "Task",
    "Variant",
    "evaluate",
    "markdown",
]
