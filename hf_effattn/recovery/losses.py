"""Losses of distillation, on logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div

BLOCK = 1 << 21  # logits that are compared at a time: a vocabulary is large, and what fits into a cache is fast
Compared = tuple[torch.Tensor, torch.Tensor]  # divergence of each row, and its gradient with respect to the logits
Rule = Callable[[torch.Tensor, torch.Tensor], Compared]


class TopK(NamedTuple):
    """The K largest log-probabilities of a teacher, to be kept in place of all logits.

    Args:
        values: `[..., K]`, float32; indices: `[..., K]`.
    """

    values: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, number: int, temperature: float = 1.0) -> TopK:
        """Return the largest of `logits` `[..., V]`."""
        best = (logits.float() / temperature).log_softmax(dim=-1).topk(number, dim=-1)
        return cls(best.values, best.indices)

    @property
    def rest(self) -> torch.Tensor:
        """The log-probability of everything else `[..., 1]`."""
        return torch.log1p(-self.values.exp().sum(dim=-1, keepdim=True).clamp(max=1.0 - 1e-6))


def forward_kl(student: torch.Tensor, teacher: torch.Tensor | TopK, temperature: float = 1.0) -> torch.Tensor:
    """Return KL(teacher ‖ student), the mean over tokens, times temperature² (Hinton 2015, arXiv 1503.02531).

    Only the student's logits get a gradient, once.

    Args:
        student: Logits `[..., V]`.
        teacher: Logits `[..., V]`, or the largest of them, taken at the same temperature: then all others count as one.
        temperature: By which logits are divided.
    """
    if isinstance(teacher, TopK):
        return _top_k_kl(student, teacher, temperature)
    found: torch.Tensor = _Divergence.apply(student, teacher, temperature, _forward)
    return found


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return KL(student ‖ teacher), the mean over tokens, times temperature² (MiniLLM, Gu 2023, arXiv 2306.08543).

    Arguments and gradients as in `forward_kl`.
    """
    found: torch.Tensor = _Divergence.apply(student, teacher, temperature, _reverse)
    return found


def _forward(own: torch.Tensor, wanted: torch.Tensor) -> Compared:
    """Of log-probabilities `[N, V]`: Σ p (log p − log q) and q − p, for the teacher's p and the student's q."""
    p = wanted.exp()
    return torch.linalg.vecdot(p, wanted - own), own.exp_().sub_(p)


def _reverse(own: torch.Tensor, wanted: torch.Tensor) -> Compared:
    """Of log-probabilities `[N, V]`: Σ q (log q − log p) and q (log q − log p − that sum)."""
    q, difference = own.exp(), own - wanted
    found = torch.linalg.vecdot(q, difference)
    return found, difference.sub_(found[:, None]).mul_(q)


class _Divergence(torch.autograd.Function):
    """A divergence of the rows of logits, some at a time, that leaves only its gradient behind."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float, rule: Rule) -> torch.Tensor:
        rows, others = (x.flatten(0, -2) for x in (student, teacher))
        size = max(1, BLOCK // rows.shape[1])
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=rows.device)
        for start in range(0, len(rows), size):
            some, goal = (x[start : start + size].float() / temperature for x in (rows, others))
            divergence, slope = rule(some.log_softmax(dim=-1), goal.log_softmax(dim=-1))
            total += divergence.sum()
            if gradient is not None:
                gradient[start : start + size] = slope.mul_(temperature / len(rows))
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student))
        return total * (temperature**2 / len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None


def _top_k_kl(student: torch.Tensor, teacher: TopK, temperature: float) -> torch.Tensor:
    own = (student.float() / temperature).log_softmax(dim=-1)
    wanted = torch.cat((teacher.values, teacher.rest), dim=-1)
    best = own.gather(-1, teacher.indices)
    rest = torch.log1p(-best.exp().sum(dim=-1, keepdim=True).clamp(max=1.0 - 1e-6))
    total = kl_div(torch.cat((best, rest), dim=-1), wanted, log_target=True, reduction="sum")
    return total / best[..., 0].numel() * temperature**2
