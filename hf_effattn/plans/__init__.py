"""What a plan is: the attention of each layer, what that costs and loses, and the choice under a budget."""

from .budget import Budget
from .knapsack import choose
from .plan import DENSE, PLAN, LayerChoice, Loss, Plan

__all__ = ["DENSE", "PLAN", "Budget", "LayerChoice", "Loss", "Plan", "choose"]
