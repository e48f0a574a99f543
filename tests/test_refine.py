"""Steps from a choice to better ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from hf_effattn.planning.refine import refine

UNITS, CANDIDATES = 8, 3


class Task:
    """What changes do to the outputs adds up, and the loss is its square: units repeat or make up for each other."""

    def __init__(self, seed: int, alike: float = 0.7) -> None:
        chance = torch.Generator().manual_seed(seed)
        shared, own = torch.randn(2, UNITS, 1, 6, generator=chance).double()
        size = torch.tensor([0.0, 0.5, 1.0]).double()[:, None]  # of what each candidate leaves out; the first is dense
        self.left_out = (alike * shared.mean(0) + (1 - alike) * own) * size
        self.prices = torch.tensor([[4.0, 2.0, 1.0]]).double().expand(UNITS, -1)
        self.costs = self.left_out.square().sum(-1)
        self.tells = torch.rand(UNITS, CANDIDATES, generator=chance).double()  # of each choice, which adds up
        self.seen: list[tuple[int, ...]] = []

    def loss(self, gates: torch.Tensor) -> torch.Tensor:
        return (gates[:, :, None] * self.left_out).sum((0, 1)).square().sum() + 0.01

    def told(self, choice: tuple[int, ...]) -> float:
        return 5.0 + float(self.tells.gather(1, torch.tensor(choice)[:, None]).sum())

    def look(self, choice: tuple[int, ...]) -> tuple[float, float]:
        self.seen.append(choice)
        return float(self.loss(one_hot(torch.tensor(choice), CANDIDATES).double())), self.told(choice)

    def gradient(self, choice: tuple[int, ...]) -> torch.Tensor:
        assert choice == self.seen[-1]
        leaf = one_hot(torch.tensor(choice), CANDIDATES).double().requires_grad_()
        return torch.stack((torch.autograd.grad(self.loss(leaf), leaf)[0], self.tells))

    def price(self, choice: tuple[int, ...]) -> float:
        return float(self.prices.gather(1, torch.tensor(choice)[:, None]).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_no_step_makes_it_worse_or_spends_too_much(seed: int, rounds: int) -> None:
    task, first = Task(seed), (1,) * UNITS
    found = refine(first, task.costs, task.prices, 16.0, task.look, task.gradient, rounds)
    looked = list(task.seen)
    losses = {choice: task.look(choice)[0] for choice in looked}
    assert losses[found.choice] == min(losses.values())
    assert all(task.price(choice) <= 16.0 for choice in losses)
    assert len(looked) <= rounds + 1
    assert len(set(looked)) == len(looked)
    best, most = first, 4
    for choice in looked[1:]:
        assert 0 < sum(a != b for a, b in zip(choice, best, strict=True)) <= most
        if losses[choice] < losses[best]:
            best = choice
        else:
            most = sum(a != b for a, b in zip(choice, best, strict=True)) // 2
    assert best == found.choice
    if found.choice == first:
        assert found.expected == task.told(first)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_told_is_expected_by_its_own_gradient(seed: int) -> None:
    """Whatever the loss does. Changes that cost nothing by themselves leave what is told as its gradient says."""
    task = Task(seed)
    nothing = torch.zeros_like(task.costs)
    found = refine((1,) * UNITS, nothing, task.prices, 16.0, task.look, task.gradient, 1)
    assert found.expected == pytest.approx(task.told(found.choice))
    with_costs = refine((1,) * UNITS, nothing + 0.001, task.prices, 16.0, task.look, task.gradient, 1)
    assert with_costs == found, "costs that are alike change nothing"


@pytest.mark.parametrize(
    ("told", "near", "far"),
    [(-2.0, 9.0 - 0.5 * 8.0, 10.0 - 0.5 * 16.0), (2.0, 9.0 + 8.0, 10.0 + 0.0), (-20.0, 0.009, 0.01)],
)
def test_what_is_expected_goes_by_all_choices_before(told: float, near: float, far: float) -> None:
    """The first step, of units 0 to 3, promises 16 and keeps 8; the second one, of the others, promises 4. Gains are
    expected as far as the step before kept what it promised, and the choice before the last is twice as near."""
    losses, tells = {0: 100.0, 4: 92.0, 8: 88.0}, {0: 10.0, 4: 9.0, 8: 3.0}

    def gradient(choice: tuple[int, ...]) -> torch.Tensor:
        slope, tell = torch.tensor([-4.0] * 4 + [-1.0] * 4), torch.full((8,), told)
        slope[torch.tensor(choice) == 1] = 0.5  # worth keeping
        changes = torch.stack((slope, tell))
        return torch.stack((torch.zeros(2, 8), torch.where(torch.tensor(choice) == 1, -changes.abs(), changes)), -1)

    nothing = torch.zeros(8, 2)
    found = refine((0,) * 8, nothing, nothing, 1.0, lambda c: (losses[sum(c)], tells[sum(c)]), gradient, 2)
    assert found.choice == (1,) * 8
    assert found.expected == pytest.approx((2 * near + far) / 3)


@pytest.mark.slow
def test_noise_of_what_is_told_is_not_expected_again() -> None:
    """Steps that change nothing of what is told, each of which is told to be one off, more or less."""
    chance = torch.Generator().manual_seed(0)
    slope = torch.tensor([[0.0, -1.0 - unit / 32] for unit in range(32)])
    errors = []
    for _ in range(50):
        tells = 9.0 + 2.0 * torch.randint(0, 2, (5,), generator=chance)

        def gradient(choice: tuple[int, ...]) -> torch.Tensor:
            return torch.stack((slope, torch.zeros_like(slope)))

        def look(choice: tuple[int, ...], tells: torch.Tensor = tells) -> tuple[float, float]:
            return 32.0 - sum(choice), float(tells[sum(choice) // 4])

        nothing = torch.zeros(32, 2)
        found = refine((0,) * 32, nothing, nothing, 1.0, look, gradient, 4)
        assert sum(found.choice) == 16
        errors.append(found.expected - 10.0)
    assert torch.tensor(errors).square().mean() < 0.5, "of the last choice before by itself: 1"


@pytest.mark.parametrize("alike", [0.7, 0.3, 0.0])
@pytest.mark.parametrize("seed", range(5))
def test_steps_come_near_the_best_of_all_choices(seed: int, alike: float) -> None:
    task = Task(seed, alike)
    found = refine((1,) * UNITS, task.costs, task.prices, 16.0, task.look, task.gradient, 40)
    everything = [c for c in itertools.product(range(CANDIDATES), repeat=UNITS) if task.price(c) <= 16.0]
    losses = sorted(task.look(choice)[0] for choice in everything)
    assert len(everything) == 1832
    assert task.look(found.choice)[0] <= losses[18], "among the best hundredth"


def test_steps_that_are_too_large_are_halved_and_one_change_in_vain_is_the_end() -> None:
    """A gradient that promises what no change keeps."""
    seen: list[tuple[int, ...]] = []

    def look(choice: tuple[int, ...]) -> tuple[float, float]:
        seen.append(choice)
        return 1.0 + sum(choice), 0.3

    slope = torch.tensor([[0.0, -float(unit + 2)] for unit in range(32)]).expand(2, -1, -1)
    nothing = torch.zeros(32, 2)
    found = refine((0,) * 32, nothing, nothing, 1.0, look, lambda *_: slope, 10)
    assert [sum(choice) for choice in seen] == [0, 4, 2, 1]
    assert [choice.index(1) for choice in seen[1:]] == [28, 30, 31], "those that promise most"
    assert found == ((0,) * 32, 0.3)


def test_where_nothing_is_to_be_won_nothing_is_looked_at() -> None:
    task = Task(0)
    costs = torch.full((UNITS, CANDIDATES), 100.0).double()
    costs[:, 1] = 0.0
    found = refine((1,) * UNITS, costs, task.prices, 16.0, task.look, task.gradient, 10)
    assert found.choice == (1,) * UNITS
    assert len(task.seen) == 1
