"""Planning: which layer gets which attention, so that a budget is kept and as little as possible is lost."""

from .budget import Budget
from .plans import LayerChoice, Loss, Plan
from .search import plan

__all__ = ["Budget", "LayerChoice", "Loss", "Plan", "plan"]
