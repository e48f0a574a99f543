"""Facts about model families. A new family is a record and an import line here."""

from . import gpt2, llama
from .base import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "Architecture", "gpt2", "llama"]
