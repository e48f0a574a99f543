"""Recurrences of linear attention beyond the plain sum, found by name in `RECURRENCES`. A new one is a file and a name
in this import."""

from . import liger, retnet  # noqa: F401
from .base import RECURRENCES, Recurrence

__all__ = ["RECURRENCES", "Recurrence"]
