"""Planning: which layer gets which attention, so that a budget is kept and as little as possible is lost."""

from .search import plan

__all__ = ["plan"]
