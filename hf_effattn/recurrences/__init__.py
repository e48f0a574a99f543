"""Recurrences of linear attention beyond the plain sum, found by name in `RECURRENCES`. A new one is a file and a name
in this import."""

from . import delta, gated_delta, gla, liger, retnet  # noqa: F401
from .base import RECURRENCES, Gates, Recurrence, RecurrenceShape

__all__ = ["RECURRENCES", "Gates", "Recurrence", "RecurrenceShape"]
