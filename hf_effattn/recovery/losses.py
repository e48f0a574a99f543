"""Losses of distillation, on logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import kl_div


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

    Args:
        student: Logits `[..., V]`.
        teacher: Logits `[..., V]`, or the largest of them, taken at the same temperature: then all others count as one.
        temperature: By which logits are divided.
    """
    own = (student.float() / temperature).log_softmax(dim=-1)
    if isinstance(teacher, TopK):
        wanted = torch.cat((teacher.values, teacher.rest), dim=-1)
        best = own.gather(-1, teacher.indices)
        rest = torch.log1p(-best.exp().sum(dim=-1, keepdim=True).clamp(max=1.0 - 1e-6))
        own = torch.cat((best, rest), dim=-1)
    else:
        wanted = (teacher.float() / temperature).log_softmax(dim=-1)
    return _mean_kl(wanted, own) * temperature**2


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return KL(student ‖ teacher), the mean over tokens, times temperature² (MiniLLM, Gu 2023, arXiv 2306.08543)."""
    own, wanted = ((x.float() / temperature).log_softmax(dim=-1) for x in (student, teacher))
    return _mean_kl(own, wanted) * temperature**2


def _mean_kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    total = kl_div(second, first, log_target=True, reduction="sum")
    return total / first[..., 0].numel()
