"""Evictions: what is kept against a slow definition, rows that do not matter to each other, memory that is freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import Case, converted_model, left_padded, positions_of, shake, through, tiny_model, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from hf_effattn import SparseConfig
from hf_effattn.attention import Call, HeadGeometry, make_mechanism
from hf_effattn.evictions import EVICTIONS

every_eviction = pytest.mark.parametrize("name", list(EVICTIONS))
on_every_model = pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
CAPACITY = 16  # so the cache is reduced when 18 tokens are there


def case(name: str, capacity: int = CAPACITY) -> Case:
    return Case(f"{name}-{capacity}", "sparse", {"eviction": name, "capacity": capacity})


def mechanism(name: str, capacity: int = CAPACITY) -> Any:
    return make_mechanism(SparseConfig(eviction=name, capacity=capacity), HeadGeometry(4, 2, 8, 8))


def texts(batch: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, 8) for heads in (4, 2, 2)]


def softmax(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return ((keys @ q) * 8**-0.5).softmax(dim=0)


class Slow:
    """One row and one key/value head with its query heads, by the definitions, one token after the other in float64."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity, self.full = name, capacity, capacity + max(1, min(64, capacity // 8))
        self.kept: list[int] = []
        self.mass: dict[int, float] = {}

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: int) -> torch.Tensor:
        """Return the outputs `[R, T, D]` for q `[R, T, D]`, k and v `[T, D]`."""
        self.q, self.k, self.v = q.double(), k.double(), v.double()
        outputs = []
        for t in range(q.shape[1]):
            if t > prompt and len(self.kept) == self.full:
                self.reduce(t)
            self.kept.append(t)
            weights = torch.stack([softmax(head[t], self.k[self.kept]) for head in self.q])
            for place, weight in zip(self.kept, weights.sum(dim=0), strict=True):
                self.mass[place] = self.mass.get(place, 0.0) + float(weight)
            outputs.append(weights @ self.v[self.kept])
            if t == prompt and len(self.kept) > self.capacity:
                self.reduce(t + 1)
        return torch.stack(outputs, dim=1)

    def weights_of(self, t: int) -> torch.Tensor:
        seen = [place for place in self.kept if place <= t]
        own = torch.stack([softmax(head[t], self.k[seen]) for head in self.q])
        return torch.cat((own, own.new_zeros(own.shape[0], len(self.kept) - len(seen))), dim=1)

    def importance(self, now: int) -> torch.Tensor:
        last = {n: range(max(now - n, 0), now) for n in (1, 32, 64)}
        if self.name == "knorm":
            return -self.k[self.kept].norm(dim=1)
        if self.name == "h2o":
            return torch.tensor([self.mass[place] for place in self.kept])
        if self.name == "tova":
            return self.weights_of(now - 1).mean(dim=0)
        if self.name == "snapkv":
            votes = sum(self.weights_of(t).sum(dim=0) for t in last[32])
            return torch.stack([votes[max(i - 2, 0) : i + 3].mean() for i in range(len(votes))])
        found = []
        for place in self.kept:
            scores = (self.q[:, [t for t in last[64] if t >= place]] @ self.k[place]) * 8**-0.5  # [R, n]
            expected = scores.mean(dim=1) + scores.var(dim=1, unbiased=False) / 2
            found.append(expected.logsumexp(dim=0) + self.v[place].norm().log())
        return torch.stack(found)

    def reduce(self, now: int) -> None:
        recent = {"h2o": self.capacity // 2, "snapkv": min(32, self.capacity // 2)}
        recent["expected_attention"] = recent["snapkv"]
        order = self.importance(now).float()
        order = (order.view(torch.int32) + (1 << 11) & -(1 << 12)).view(torch.float32)
        order[torch.tensor(self.kept) >= now - recent.get(self.name, 1)] = torch.inf
        best = sorted(range(len(self.kept)), key=lambda i: (-float(order[i]), -i))
        self.kept = [self.kept[i] for i in sorted(best[: self.capacity])]


@every_eviction
@given(
    prompt=st.integers(1, 60),
    more=st.integers(1, 50),
    piece=st.integers(1, 30),
    capacity=st.sampled_from((2, 9, 16, 40)),
)
def test_fast_is_slow(name: str, prompt: int, more: int, piece: int, capacity: int) -> None:
    torch.manual_seed(prompt + 100 * more)
    net, (q, k, v) = mechanism(name, capacity), texts(2, prompt + more)
    output, state = net.attend(None, *(x[:, :, :prompt] for x in (q, k, v)), Call(8**-0.5))
    outputs = [output]
    for start in range(prompt, prompt + more, piece):
        part = (x[:, :, start : start + piece] for x in (q, k, v))
        output, state = net.attend(state, *part, Call(8**-0.5))
        outputs.append(output)
    actual = torch.cat(outputs, dim=2)
    for row in range(2):
        for head in range(2):
            slow = Slow(name, capacity)
            expected = slow.run(q[row, 2 * head : 2 * head + 2], k[row, head], v[row, head], prompt - 1)
            torch.testing.assert_close(actual[row, 2 * head : 2 * head + 2].double(), expected, atol=1e-5, rtol=1e-5)
            held = state.positions[row, head]
            assert held[held >= 0].tolist() == slow.kept


@every_eviction
def test_each_eviction_names_its_paper_and_is_in_the_readme(name: str) -> None:
    assert "arXiv" in (EVICTIONS.get(name).__doc__ or "")
    assert f"`{name}`" in (Path(__file__).parents[1] / "README.md").read_text()


@every_eviction
@on_every_model
@torch.no_grad()
def test_a_prompt_is_attended_to_in_full_and_memory_is_freed_after(model: str, name: str) -> None:
    dense, net, ids = tiny_model(model), converted_model(model, case(name)), tokens(2, 60)
    cache = DynamicCache(config=net.config)
    torch.testing.assert_close(net(ids, **through(cache)).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)
    for number in (60, 61, 70, 90):
        while cache.get_seq_length() < number:
            net(tokens(2, 1, seed=number), **through(cache))
        expected = net.attention_report(context_length=number)
        for layer, record in zip(cache.layers, expected.layers, strict=True):
            assert layer.state.most <= CAPACITY + CAPACITY // 8
            assert layer.nbytes() == 2 * record.cache_bytes


@every_eviction
@on_every_model
@torch.no_grad()
def test_a_cache_that_is_large_enough_changes_nothing(model: str, name: str) -> None:
    dense, net, ids = tiny_model(model), converted_model(model, case(name, 64)), tokens(2, 60)
    cache = DynamicCache(config=net.config)
    parts = [net(ids[:, a:b], **through(cache)).logits for a, b in ((0, 20), (20, 21), (21, 50), (50, 60))]
    torch.testing.assert_close(torch.cat(parts, dim=1), dense(ids).logits, atol=1e-5, rtol=1e-5)


@every_eviction
@on_every_model
@torch.no_grad()
def test_neighbours_and_padding_do_not_matter(model: str, name: str) -> None:
    net = converted_model(model, case(name))
    rows = [tokens(length, seed=length) for length in (30, 9, 17)]
    ids, mask = left_padded(rows)
    cache, alone, new = DynamicCache(config=net.config), [DynamicCache(config=net.config) for _ in rows], tokens(3, 40)
    net(ids, attention_mask=mask, position_ids=positions_of(mask), **through(cache))
    for row, own in zip(rows, alone, strict=True):
        net(row[None], **through(own))
    for a, b in ((0, 1), (1, 6), *((i, i + 1) for i in range(6, 30)), (30, 40)):
        mask = torch.cat((mask, mask.new_ones(3, b - a)), dim=1)
        positions = positions_of(mask)[:, -(b - a) :]
        together = net(new[:, a:b], attention_mask=mask, position_ids=positions, **through(cache)).logits
        for index, own in enumerate(alone):
            single = net(new[index : index + 1, a:b], **through(own)).logits
            torch.testing.assert_close(together[index : index + 1], single, atol=1e-5, rtol=1e-5)


@every_eviction
@on_every_model
def test_generation_goes_on(model: str, name: str, tmp_path: Path) -> None:
    net, ids = converted_model(model, case(name)), tokens(2, 30)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = net.generate(ids, **options)
    assert greedy.shape == (2, 42)
    assert torch.equal(net.generate(ids[1:], **options), greedy[1:])
    assert net.generate(ids, num_beams=3, **options).shape == (2, 42)
    assert net.generate(ids[:1], prompt_lookup_num_tokens=3, **options).shape == (1, 42)
    net.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(ids, **options), greedy)


@every_eviction
@torch.no_grad()
def test_rolled_back_tokens_were_never_there(name: str) -> None:
    net, ids = converted_model("llama-gqa", case(name)), tokens(2, 50)
    plain, cache = DynamicCache(config=net.config), DynamicCache(config=net.config)
    for each in (plain, cache):
        net(ids[:, :30], **through(each))
    expected = [net(ids[:, t : t + 1], **through(plain)).logits for t in range(30, 50)]
    cache.activate_past_recording()
    found = []
    for start in range(30, 50, 2):
        guess = torch.cat((ids[:, start : start + 2], tokens(2, 3, seed=start)), dim=1)
        found.append(net(guess, **through(cache)).logits[:, :2])
        cache.crop(-3)
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)


@every_eviction
def test_training_is_dense(name: str) -> None:
    net, ids = shake(tiny_model("llama-gqa").convert_attention("sparse", eviction=name, capacity=4)), tokens(2, 40)
    dense = tiny_model("llama-gqa")
    for each in (net, dense):
        each(ids, labels=ids).loss.backward()
    for actual, expected in zip(net.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-5)


def test_what_does_not_work_says_so() -> None:
    for options, message in (
        ({"eviction": "best", "capacity": 8}, "unknown eviction 'best'; valid: expected_attention, h2o, knorm"),
        ({"eviction": "h2o"}, "eviction 'h2o' needs a capacity"),
        ({"eviction": "h2o", "capacity": 1}, "capacity must be at least 2; got 1"),
        (
            {"eviction": "h2o", "capacity": 8, "window": 4},
            "window does not go with eviction 'h2o', which takes capacity",
        ),
        (
            {"eviction": "h2o", "capacity": 8, "selector": "quest"},
            "eviction does not go with selector 'quest'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SparseConfig(**options)
    net = tiny_model("llama-gqa").convert_attention("sparse", eviction="tova", capacity=8)
    with pytest.raises(ValueError, match="dynamic caches only"):
        net.generate(tokens(1, 12), max_new_tokens=4, cache_implementation="static")
    net.revert_attention()
    cache = DynamicCache()
    net(tokens(1, 12), **through(cache))
    net.convert_attention("sparse", eviction="tova", capacity=8)
    with pytest.raises(ValueError, match="without the queries"):
        net(tokens(1, 1), **through(cache))
