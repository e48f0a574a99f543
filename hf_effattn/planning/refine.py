"""A choice under a limit that is made better in small steps, each looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..plans.knapsack import choose

SHARE = 8  # of all units, one in so many may change in the first step; four at least: one gets what others give
LEAST_BEND = 1 / 16  # least κ
LEAST_LEFT = 1e-3  # of what is told, after a step that promises more
HALVINGS = 14  # of what a change is to be worth at least


class Refined(NamedTuple):
    """A choice.

    Args:
        choice: Index of a candidate of each unit.
        expected: What is told of its loss, as it was expected before the last step; as it was seen if there was none.
            It is noisy, so all choices that were looked at before count, the nearer ones more, each changed as the
            gradient says; gains as far as the steps before kept what they promised.
    """

    choice: tuple[int, ...]
    expected: float


def refine(
    choice: tuple[int, ...],
    costs: torch.Tensor,
    prices: torch.Tensor,
    limit: float,
    look: Callable[[tuple[int, ...]], tuple[float, float]],
    gradient: Callable[[tuple[int, ...]], torch.Tensor],
    rounds: int,
) -> Refined:
    """Make the loss of a choice smaller, in steps within a trust region.

    Around a choice a the loss of another one b is expected to be `L(a) + Σ_u (g_u,b - g_u,a + κ|c_u,b - c_u,a|)`, with
    the gradient g of the loss in the choices of units u and their costs c: in the second order a change costs what it
    does by itself where the gradient is nothing, or, as changes repeat each other, a part κ of it. A knapsack finds the
    best choice that differs from a in some units at most. If it is not better when it is looked at, or was looked at
    before, they become half as many; if it is better than expected, or if none is expected to be better, κ is halved.

    Args:
        choice: The first one.
        costs: Of single changes where all is dense, `[units, candidates]`.
        prices: Likewise.
        limit: The most that all prices may add up to.
        look: Returns the loss of a choice, and what is told of it.
        gradient: Of both in gates between choices `[2, units, candidates]`, at the choice that was looked at last.
        rounds: Choices that are looked at besides the first one.
    """
    loss, told = look(choice)
    slopes, most, expected, bend = None, max(len(choice) // SHARE, 4), told, 1.0
    promised, kept, looked = 0.0, 0.0, {choice: told}
    with tqdm(total=rounds, desc="refining", unit="round") as bar:
        while loss > 0 and most and len(looked) <= rounds:
            bar.set_postfix(lost=f"{loss:.4f}")
            slopes = gradient(choice) if slopes is None else slopes
            changes = slopes - slopes.gather(2, _at(choice).expand(2, -1, -1))
            changes = changes + bend * (costs - costs.gather(1, _at(choice))).abs()
            found = _step(choice, changes[0], prices, limit, most)
            less = _sum(changes[0], found)
            if less >= 0 and bend <= LEAST_BEND:
                break
            if less >= 0:
                bend = max(bend / 2, LEAST_BEND)
                continue
            if found in looked:
                most = _changes(found, choice) // 2
                continue
            new, told = look(found)
            bar.update()
            trust = min(max(kept / promised, 0.0), 1.0) if promised else 1.0
            before, looked = looked, looked | {found: told}
            promised, kept = promised - less, kept + loss - new
            if new >= loss:
                most = _changes(found, choice) // 2
                continue
            bend = max(bend / 2, LEAST_BEND) if new < loss + less else bend
            expected = _expected(found, before, changes[1], trust)
            choice, loss, slopes = found, new, None
    return Refined(choice, expected)


def _expected(
    choice: tuple[int, ...], looked: dict[tuple[int, ...], float], changes: torch.Tensor, trust: float
) -> float:
    """Return what is to be told of a choice, of which others were told that were `looked` at."""
    total = weights = 0.0
    for other, told in looked.items():
        more = _sum(changes, choice) - _sum(changes, other)
        weight = 1 / _changes(choice, other)
        total += weight * max(told + more * (trust if more < 0 else 1.0), LEAST_LEFT * told)
        weights += weight
    return total / weights


def _step(
    choice: tuple[int, ...], changes: torch.Tensor, prices: torch.Tensor, limit: float, most: int
) -> tuple[int, ...]:
    """Return the choice of least expected loss that differs in `most` units or fewer, where each unit `changes` it. A
    difference has to be worth something, which is raised until so few are left."""
    differs = torch.ones_like(changes).scatter(1, _at(choice), 0.0)

    def found(worth: float) -> tuple[int, ...]:
        indices = choose((changes + worth * differs).tolist(), prices.tolist(), limit)
        assert indices is not None, "the choice itself keeps the limit"
        return tuple(indices)

    best, low, high = found(0.0), 0.0, float(-changes.min())
    if _changes(best, choice) > most:
        best = choice
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            own = found(middle)
            if _changes(own, choice) > most:
                low = middle
            else:
                best, high = own, middle
    return best


def _at(choice: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(choice)[:, None]


def _sum(values: torch.Tensor, choice: tuple[int, ...]) -> float:
    return float(values.gather(1, _at(choice)).sum())


def _changes(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))
