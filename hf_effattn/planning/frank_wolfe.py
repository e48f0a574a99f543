"""The choice under a limit where a part of what is lost does not add up, but has a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from ..plans.knapsack import choose


class Found(NamedTuple):
    """A choice.

    Args:
        choice: Index of a candidate of each unit.
        gradient: Of what does not add up, `[units, candidates]`, the mean over the way.
    """

    choice: tuple[int, ...]
    gradient: torch.Tensor


def frank_wolfe(
    costs: torch.Tensor,
    prices: torch.Tensor,
    limit: float,
    start: torch.Tensor,
    loss: Callable[[torch.Tensor], float],
    gradient: Callable[[torch.Tensor], torch.Tensor],
    rounds: int,
) -> Found:
    """Make a loss small among choices whose prices keep the limit, as Frank and Wolfe (1956) do.

    Gates g between choices go, in round k = 0, 1, …, a part 2/(k + 3) of the way to the choice s that is best if the
    loss were as steep everywhere as it is at g, which a knapsack finds. Looked at besides is the choice that is best if
    it were as steep as it has been on the way, in the mean (round k counts k + 1 times), which changes less. Units that
    stand in for each other each seem to cost nothing while the other is there; between choices they are judged with the
    others half gone.

    Args:
        costs: What adds up of the loss, `[units, candidates]`.
        prices: Likewise.
        start: The gates at first.
        loss: Of a choice, as gates of 0 and 1.
        gradient: In gates, of all that does not add up of the loss, or of what it grows with.
        rounds: Each looks at these two choices.

    Returns:
        The best of them.
    """
    gates, mean, totals = start, torch.zeros_like(start), {}
    with tqdm(range(rounds), desc="choosing", unit="round") as bar:
        for number in bar:
            slope = gradient(gates)
            mean = mean + 2 / (number + 2) * (slope - mean)
            for steep in (mean, slope):
                found = choose((costs + steep).tolist(), prices.tolist(), limit)
                assert found is not None, "a limit that cannot be kept is told before"
                chosen = one_hot(torch.tensor(found), costs.shape[1]).to(start.dtype)
                if tuple(found) not in totals:
                    totals[tuple(found)] = loss(chosen)
            bar.set_postfix(lost=f"{min(totals.values()):.4f}")
            gates = gates + 2 / (number + 3) * (chosen - gates)
    return Found(min(totals, key=totals.__getitem__), mean)
