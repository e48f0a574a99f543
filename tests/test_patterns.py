"""Patterns: what they show, how they compose, and law 4: eviction is safe."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import COMPOSITIONS, patterns, tiny_model

from hf_effattn import SparseConfig
from hf_effattn.cache import KeyValueStore
from hf_effattn.config import config_from_dict, make_config
from hf_effattn.patterns import (
    PATTERNS,
    Pattern,
    Retention,
    bigbird,
    dilated,
    fixed,
    global_tokens,
    longformer,
    pattern_from_spec,
    shifted,
    sinks,
    sliding_window,
    streaming,
    strided,
)
from hf_effattn.patterns.base import register_pattern

ALL = {**patterns(), "every key": sliding_window((None,)), "windows alike": sliding_window((5, 5))}
LENGTH = 60


def matrix(pattern: Pattern, length: int = LENGTH) -> torch.Tensor:
    index = torch.arange(length)[None]
    return pattern.visible(index, index)[0, 0].expand(length, length)


def by_hand(rule: object, length: int = LENGTH) -> torch.Tensor:
    return torch.tensor([[j <= i and bool(rule(i, j)) for j in range(length)] for i in range(length)])  # type: ignore[operator]


def test_first_self_and_two_before_are_four_keys() -> None:
    pattern = sliding_window(3) | sinks(1)
    assert pattern.num_visible(500) == 4
    assert matrix(pattern, 501)[500].nonzero().flatten().tolist() == [0, 498, 499, 500]


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (sliding_window(6), lambda i, j: i - j < 6),
        (sinks(3), lambda i, j: j < 3),
        (streaming(5, 2), lambda i, j: i - j < 5 or j < 2),
        (global_tokens((0, 9)), lambda i, j: i in (0, 9) or j in (0, 9)),
        (dilated(4, 3), lambda i, j: (i - j) % 3 == 0 and (i - j) / 3 < 4),
        (strided(7), lambda i, j: i - j < 7 or (i - j) % 7 == 0),
        (fixed(8, 2), lambda i, j: i // 8 == j // 8 or j % 8 >= 6),
        (sliding_window(9) & dilated(9, 2), lambda i, j: i - j < 9 and (i - j) % 2 == 0),
        (longformer(5, (3,)), lambda i, j: i - j < 5 or 3 in (i, j)),
        (shifted(8), lambda i, j: i // 8 == j // 8),
        (bigbird(8, 0), lambda i, j: i // 8 - j // 8 < 3 or j // 8 == 0),
    ],
    ids=lambda value: value.describe() if isinstance(value, Pattern) else "",
)
def test_patterns_show_what_their_equations_say(pattern: Pattern, rule: object) -> None:
    assert torch.equal(matrix(pattern), by_hand(rule))


@pytest.mark.parametrize("name", list(ALL))
def test_nothing_from_the_future(name: str) -> None:
    assert not matrix(ALL[name]).triu(1).any()


@pytest.mark.parametrize("name", list(ALL))
def test_eviction_is_safe(name: str) -> None:
    index = torch.arange(LENGTH)
    kept = ALL[name].retention.keeps(index[:, None], index[None, :])
    assert not (matrix(ALL[name]) & ~kept).any()


@pytest.mark.parametrize("name", list(ALL))
def test_a_store_holds_what_later_queries_see(name: str) -> None:
    """The same law for the store itself: no key is gone that the query, or any later one, sees."""
    pattern = ALL[name]
    store = KeyValueStore(pattern.retention)
    seen = matrix(pattern)
    for query in range(LENGTH):
        held = store._held(torch.tensor([query + 1]), store.num_slots(query + 1))[0]
        needed = seen[query:, : query + 1].any(dim=0).nonzero().flatten()
        assert set(needed.tolist()) <= set(held.tolist())
        real = held[held >= 0].tolist()
        assert len(real) == len(set(real)), "a position is held twice"


retentions = st.builds(
    Retention,
    st.none() | st.integers(0, 20),
    st.frozensets(st.integers(0, 20), max_size=4),
    st.none() | st.sampled_from([(4, 1), (4, 2), (7, 7)]),
)


@given(a=retentions, b=retentions)
def test_retentions_compose_safely(a: Retention, b: Retention) -> None:
    q, k = torch.arange(25)[:, None], torch.arange(25)[None]
    causal = k <= q
    union, intersection = a.keeps(q, k) | b.keeps(q, k), a.keeps(q, k) & b.keeps(q, k)
    assert not (causal & union & ~(a | b).keeps(q, k)).any()
    assert not (causal & intersection & ~(a & b).keeps(q, k)).any()


def test_columns_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most their stride \(4\); got 5"):
        Retention(4, columns=(4, 5))
    with pytest.raises(TypeError, match="stride of columns must be an integer"):
        Retention(4, columns=(4.0, 1))  # type: ignore[arg-type]


@given(retention=retentions, begun=st.integers(0, 40), in_place=st.booleans(), alike=st.booleans())
def test_a_store_holds_what_is_to_be_kept(retention: Retention, begun: int, in_place: bool, alike: bool) -> None:
    """After a prefill and token by token, in rows of different lengths: each with its own key, and no other."""
    store, lengths = KeyValueStore(retention), torch.tensor([begun, begun if alike else max(begun - 3, 0)])
    prompt = torch.arange(float(begun)).expand(2, 1, -1)[..., None]
    state = store.append(store.empty(prompt, prompt), prompt, prompt, None if alike else lengths)
    for _ in range(60 - begun):
        token = state.num_tokens.float()[:, None, None, None]
        state = store.append(state, token, token, None, in_place)
    least = retention if retention.window is None else replace(retention, window=max(retention.window, 1))
    for held, keys, number in zip(state.positions, state.keys, state.num_tokens, strict=True):
        kept = least.keeps(number - 1, torch.arange(int(number))).nonzero().flatten()
        assert torch.equal(held[held >= 0].sort().values, kept)
        assert torch.equal(keys[0, held >= 0, 0].long(), held[held >= 0])


@pytest.mark.parametrize("name", list(ALL))
def test_a_band_is_the_pattern(name: str) -> None:
    band = ALL[name].band
    if band is not None:
        window = LENGTH if band.window is None else band.window
        assert torch.equal(matrix(ALL[name]), by_hand(lambda i, j: i - j < window or j < band.num_sinks))


@pytest.mark.parametrize("name", list(ALL))
def test_a_spec_makes_the_pattern_again(name: str) -> None:
    pattern = ALL[name]
    for again in (pattern_from_spec(pattern.spec), pickle.loads(pickle.dumps(pattern))):
        assert again == pattern
        assert again.describe() == pattern.describe()
        assert torch.equal(matrix(again), matrix(pattern))


@pytest.mark.parametrize("name", sorted(set(ALL) - {"sinks", "global_tokens"} - set(COMPOSITIONS)))
def test_presets_leave_no_query_blind(name: str) -> None:
    assert matrix(ALL[name]).diagonal().all()


def test_options_are_taken_once() -> None:
    """A list that changes later, or an iterator, is no live option of a pattern."""
    positions = [0, 9]
    pattern = global_tokens(positions)
    positions.append(20)
    assert pattern.spec == {"name": "global_tokens", "positions": [0, 9]}
    assert global_tokens(range(3)) == global_tokens(i for i in range(3)) == global_tokens({0, 1, 2})


def test_equal_patterns_and_configs_hash_alike() -> None:
    assert hash(streaming(4)) == hash(pattern_from_spec(streaming(4).spec))
    assert len({SparseConfig(pattern=sliding_window(4)), SparseConfig(pattern=sliding_window(4))}) == 1
    assert len({SparseConfig(pattern="global_tokens", positions=[0, 3])}) == 1


def test_a_pattern_of_ones_own_is_chosen_by_name_with_its_own_options() -> None:
    @register_pattern("every_nth")
    def every_nth(step: int, offset: int = 0) -> Pattern:
        """Every `step`-th key (test only)."""
        return Pattern(lambda b, h, q, k: (k <= q) & ((q - k - offset) % step == 0), Retention())

    try:
        config = make_config("sparse", {"pattern": "every_nth", "step": 3, "backend": "masked"})
        assert config_from_dict(config.to_dict()).to_dict() == config.to_dict()
        assert config.resolve() == every_nth(3)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="unknown option 'steps'"):
            make_config("sparse", {"pattern": "every_nth", "steps": 3})
    finally:
        del PATTERNS._entries["every_nth"]


@pytest.mark.parametrize("name", list(PATTERNS))
def test_each_pattern_names_its_paper(name: str) -> None:
    assert "arXiv" in (PATTERNS.get(name).__doc__ or "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sliding_window(0), "window must be at least 1"),
        (lambda: sliding_window("8"), "window must be an integer"),
        (lambda: sinks(-1), "num_sinks must be at least 0"),
        (lambda: global_tokens(()), "at least one global position"),
        (lambda: global_tokens((-1,)), "positions must be at least 0"),
        (lambda: fixed(4, 8), "num_summary must be at most stride"),
        (lambda: pattern_from_spec({"name": "nonsense"}), "valid: .*streaming"),
        (lambda: pattern_from_spec({"name": "strided", "window": 3}), "does not take .*its options: stride"),
        (lambda: pattern_from_spec({}), "has a 'name'"),
    ],
)
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()  # type: ignore[operator]


def by_head(pattern: Pattern, heads: int, length: int = LENGTH) -> torch.Tensor:
    index = torch.arange(length)[None]
    return pattern.visible(index, index, heads)[0].expand(heads, length, length)


def test_every_other_head_has_shifted_groups() -> None:
    first, second, third = by_head(shifted(8), 3)
    assert torch.equal(second, by_hand(lambda i, j: (i + 4) // 8 == (j + 4) // 8))
    assert torch.equal(first, third)


def test_each_head_has_the_window_it_was_given() -> None:
    for seen, window in zip(by_head(sliding_window((2, 5, 3)), 3), (2, 5, 3), strict=True):
        assert torch.equal(seen, matrix(sliding_window(window)))
    assert sliding_window((2, 5, 3)).num_visible(20) == 5
    with pytest.raises(ValueError, match="different numbers of query heads"):
        sliding_window((2, 5, 3)) | sliding_window((2, 5))
    with pytest.raises(ValueError, match="empty"):
        sliding_window(())


def test_bigbird_draws_for_each_head_block_and_seed() -> None:
    size, number = 4, 3
    seen = by_head(bigbird(size, number, seed=1), 4, 160)
    blocks = seen[:, ::size, ::size].sum(dim=-1)  # of the first query of each block: it sees all of a block or nothing
    assert (blocks[:, 3 + number :] == 3 + 1 + number).all()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen, by_head(bigbird(size, number, seed=2), 4, 160))
    assert torch.equal(seen, by_head(bigbird(size, number, seed=1), 4, 160))
    drawn = seen[:, -1, size : -3 * size].float().mean()
    assert abs(float(drawn) - number / (160 / size - 4)) < 1e-6


def test_a_converted_layer_draws_anew_and_a_reloaded_one_the_same() -> None:
    net = tiny_model("llama-gqa").convert_attention("sparse", pattern="bigbird", block_size=4, seed=5)
    specs = [layer["pattern"]["seed"] for layer in net.config.effattn["layers"]]
    assert specs == [5, 6]
    assert SparseConfig(pattern=bigbird(4) | sinks(2)).for_layer(3).to_dict()["pattern"]["any"][0]["seed"] == 3
    assert SparseConfig(window=3).for_layer(3) == SparseConfig(window=3)


def test_a_pattern_is_drawn(tmp_path: Path) -> None:
    drawing = sliding_window(2).show(4)
    assert str(drawing).splitlines()[1:] == [
        "dense   sparse (rows are queries, columns keys)",
        "█       █",
        "██      ██",
        "███      ██",
        "████      ██",
    ]
    assert drawing.density == 7 / 10
    assert drawing.keys_per_query == (7 / 4, 2)
    assert len(str(streaming(100, 4).show(1000)).splitlines()) == 2 + 63
    bigbird(8).show(200, head=2).save(tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="head must be one of 0 to 1; got 2"):
        sliding_window((3, 9)).show(12, head=2)
    with pytest.raises(ValueError, match="length must be at least 1"):
        sliding_window(3).show(0)


@pytest.mark.parametrize("name", list(ALL))
def test_parts_are_the_pattern(name: str) -> None:
    """Each key is admitted by one part at most, and by one if the pattern shows it; candidates miss none."""
    pattern, heads, index = ALL[name], ALL[name].num_heads or 4, torch.arange(LENGTH)
    q, k, h = index[:, None], index[None], torch.arange(heads)[:, None, None]
    admitted = torch.zeros(heads, LENGTH, LENGTH, dtype=torch.long)
    for part in pattern.parts:
        seen = part.mask_mod(q * 0, h, q, k).expand_as(admitted)
        admitted += seen
        for start in range(LENGTH):
            queries = torch.arange(start, LENGTH, part.stride)
            near = torch.zeros(heads, LENGTH, dtype=torch.bool)
            last = min((start // part.stride // part.block_size + 1) * part.block_size * part.stride, LENGTH)
            queries = queries[queries < last]
            for low, high, step in part.candidates(start, int(queries[-1]) + 1):
                near[:, max(low, low % step) : high : step] = True
            if part.by_head:
                found = part.by_head(start, int(queries[-1]) + 1, heads)
                for head in range(heads):
                    near[head, found[head][found[head] >= 0]] = True
            assert not (seen[:, queries].any(dim=1) & ~near).any()
            if part.exact:
                assert torch.equal(seen[:, queries], near[:, None] & (k <= queries[:, None]))
            if part.growing:
                every = {j for ranges in part.candidates(LENGTH - 1, LENGTH) for j in range(*ranges)}
                high = max(high for _, high, _ in part.candidates(start, int(queries[-1]) + 1))
                assert set(near[0].nonzero().flatten().tolist()) == {j for j in every if j < high}
    assert torch.equal(admitted, by_head(pattern, heads).long())
