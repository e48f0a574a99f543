"""Planning with recall: what lies between choices, its gradient, and the choice of all layers together."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from matrix import through
from small import PROSE, small_model, small_tokenizer
from test_families import VARIANTS, every_family, model_of
from torch.nn.functional import one_hot

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.architectures import head_counts
from hf_effattn.evaluation.haystack import ADJECTIVES, NOUNS
from hf_effattn.evaluation.variants import is_converted
from hf_effattn.planning.candidates import Candidate, read_candidates
from hf_effattn.planning.frank_wolfe import frank_wolfe
from hf_effattn.planning.gates import can_be_gated, gated
from hf_effattn.planning.measure import assign, end_logits, logits_of, loss_of, read, read_batch, single_changes
from hf_effattn.planning.parts import STEEP, divergence, divergence_gradient, parts
from hf_effattn.planning.probes import (
    ASKED,
    HIDDEN,
    NEEDLE,
    NOISE,
    QUESTION,
    SAID,
    Probe,
    make_probes,
)
from hf_effattn.planning.recall import Recall
from hf_effattn.planning.weighing import Weighing
from hf_effattn.planning.whole import Whole
from hf_effattn.plans import choose
from hf_effattn.plans.heads import Unit
from hf_effattn.targets import choose_layers, find_targets

WORDS = (*ADJECTIVES, *NOUNS, *(thing for thing, _, _ in HIDDEN), NEEDLE, QUESTION)
TOKENIZER = small_tokenizer(PROSE + NOISE + SAID + ASKED + " ".join(WORDS))
DENSE = Candidate("dense", None)
SHORT, LONG = (Candidate(f"w{n}", SparseConfig(window=n, num_sinks=1)) for n in (3, 11))
LINEAR = Candidate("linear", LinearConfig(window=4))
LENGTH, START = 41, 23
# Families that cache what keys and values are made of, keys of each query head, or only those in a window of their own.
WITHOUT_GATES = (
    "afmoe",
    "axk1",
    "bailing_hybrid",
    "beam",
    "cohere2",
    "cohere2_moe",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "exaone4",
    "exaone_moe",
    "falcon-grouped",
    "gemma3_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm4_moe_lite",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "lara_mini",
    "llama4_text",
    "longcat_flash",
    "minicpm3",
    "ministral",
    "mistral",
    "modernbert-decoder",
    "moshi",
    "olmo3",
    "youtu",
)
with_gates = pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WITHOUT_GATES])


def probe(length: int = LENGTH, start: int = START, seed: int = 0) -> Probe:
    ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed))
    marks = torch.arange(length - 1)
    return Probe(ids, torch.zeros(length - 1).bool(), marks >= start + 3, start)


def drawn(units: int, candidates: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(candidates, (units,), generator=torch.Generator().manual_seed(seed))


def units_of(model: Any, by_head: bool) -> list[Unit]:
    targets = find_targets(model)
    layers = choose_layers(targets, None, None)
    if not by_head:
        return [Unit(index) for index in layers]
    return [Unit(i, head) for i in layers for head in range(head_counts(targets.modules[i], model.config)[1])]


def check_gates(model: Any, candidates: list[Candidate], by_head: bool) -> None:
    """Gates of 0 and 1 are the choice that they stand for."""
    units, own = units_of(model, by_head), probe()
    past = read(model, own)
    chosen = drawn(len(units), len(candidates))
    assign(model, {unit: candidates[index] for unit, index in zip(units, chosen.tolist(), strict=True)})
    expected = end_logits(model, own, past)
    assign(model, {})
    recall = Recall(model, [[own]])
    with gated(model, units, candidates, LENGTH) as gates:
        loss = recall.losses(gates, one_hot(chosen, len(candidates)).float())
        found = end_logits(model, own, past)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    answers = own.since(own.start)
    nats = -expected.log_softmax(dim=-1).gather(1, answers.ids[1:, None])[:, 0][answers.is_answer]
    assert float(loss) == pytest.approx(float(nats.mean()), abs=1e-5)
    assert not hasattr(model.config, "effattn")


@every_family
def test_families_have_gates_where_they_cache_what_layers_attend_to(variant: str) -> None:
    assert (read(model_of(variant, None), probe()).cache is None) == (variant in WITHOUT_GATES)


@with_gates
def test_closed_and_open_gates_are_a_choice(variant: str) -> None:
    check_gates(model_of(variant, None), [DENSE, SHORT, LONG], by_head=False)


@pytest.mark.parametrize(
    ("candidates", "by_head"),
    [
        ([DENSE, SHORT, LONG], False),
        ([DENSE, SHORT, LONG], True),
        ([LONG, DENSE], False),
        ([LONG, DENSE], True),
        ([DENSE, LINEAR, SHORT], False),  # heads have windows only
    ],
)
def test_gates_are_of_layers_or_heads_and_of_all_candidates(candidates: list[Candidate], by_head: bool) -> None:
    check_gates(small_model(TOKENIZER, num_hidden_layers=3), candidates, by_head)


@pytest.mark.parametrize("shut", [False, True])
def test_the_gradient_is_what_recall_loses_with_small_changes(shut: bool) -> None:
    """Between candidates, and where gates of a candidate are shut in each, some or no layers."""
    model = small_model(TOKENIZER, num_hidden_layers=3).double()
    units, candidates = units_of(model, True), [DENSE, SHORT, LONG]
    recall = Recall(model, [[probe()], [probe(35, 20)]])
    values = torch.rand(len(units), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    way = torch.randn(len(units), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if shut:
        values = one_hot(values.argmax(1).clamp(min=1), 3).double()
    with gated(model, units, candidates, LENGTH) as gates:
        losses, slopes = recall.gradients(gates, values)
        ahead, behind = (recall.losses(gates, values + step * way) for step in (1e-3, -1e-3))
        torch.testing.assert_close(losses, recall.losses(gates, values))
    assert not shut or {bool(values[rows, index].any()) for rows in gates.rows.values() for index in range(3)} == {
        True,
        False,
    }
    torch.testing.assert_close((slopes * way).sum((1, 2)), (ahead - behind) / 2e-3, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def weighing(texts: int, tokens: int = 1) -> Weighing:
    """Of three texts with answers of so many tokens; weight 0.5."""
    answers = torch.tensor([False, *[True] * tokens, False, *[True] * tokens])
    return Weighing([Probe(torch.zeros(len(answers) + 1), ~answers, answers, 0)] * 3, texts, 0.5)


@pytest.mark.parametrize(
    ("answers", "tokens", "lost"),
    [
        ([0.02, 0.01, 0.03], 1, 0.01977),
        ([math.log(2), math.log(4), 20.0], 1, 0.75),  # what is lost anyway counts as much as what is
        ([math.log(2) / 4, math.log(4) / 4, 20.0], 4, 0.75 / 4),  # whole answers are found or not
        ([math.log(2), -0.25, math.log(4)], 1, 1.25 / 3),  # answers that get likelier do not make up for others
        ([-0.5, -0.25, -1.0], 1, 0.0),
    ],
)
def test_recall_is_what_answers_lose_and_plans_tell_that_of_calibration_texts(
    answers: list[float], tokens: int, lost: float
) -> None:
    """Of which all answers together count: two texts here."""
    at, own = torch.tensor(answers).double(), weighing(2, tokens)
    loss, told = own.lost(0.125, at)
    assert loss == pytest.approx(0.125 + 0.5 * lost, abs=1e-5)
    assert told == pytest.approx(0.125 + 0.5 * max(sum(answers[:2]) / 2, 0.0))
    slopes = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for gradient, index in zip(own.gradients(slopes, at), (0, 1), strict=True):
        values = torch.zeros(4, 2, dtype=torch.float64)
        values[1, 1] = 1e-6
        ahead = own.lost(0.125, at + (slopes * values).sum((1, 2)))[index]
        assert float(gradient[1, 1]) == pytest.approx((ahead - (loss, told)[index]) / 1e-6, abs=1e-5)


def test_where_nothing_is_lost_recall_is_as_steep_as_where_a_little_is() -> None:
    slopes = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    nothing, little = (weighing(2).gradients(slopes, torch.full((3,), x)) for x in (0.0, 1e-3))
    for own, other in zip(nothing, little, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-3, atol=0)
        assert own.any()


def test_between_choices_what_is_lost_altogether_is_as_steep_as_the_rest() -> None:
    """Without that a search stays where all is lost."""
    slopes = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    lost, own = torch.tensor([20.0, 0.5, -0.5]), weighing(1, 6)
    torch.testing.assert_close(own.gradient(slopes, lost), slopes[:2].sum(0) / 6)
    assert torch.allclose(own.gradients(slopes, lost)[0], math.exp(-3) * slopes[1] / 6)


def test_of_units_that_stand_in_for_each_other_one_is_kept() -> None:
    """Unit 0 and 1 each do what the other does: losing one costs nothing, losing both costs 1."""
    costs = torch.tensor([[0.0, 0.01], [0.0, 0.012], [0.0, 0.02], [0.0, 0.05]], dtype=torch.float64)
    prices = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    alone = choose(costs.tolist(), prices.tolist(), 2.0)
    assert alone == [1, 1, 0, 0]

    def loss(gates: torch.Tensor) -> torch.Tensor:
        return gates[0, 1] * gates[1, 1]

    def gradient(gates: torch.Tensor) -> torch.Tensor:
        leaf = gates.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    start = one_hot(torch.zeros(4, dtype=torch.long), 2).double()
    assert not gradient(start).any(), "where all is dense neither seems to matter"
    found = frank_wolfe(costs, prices, 2.0, start, lambda x: float((costs * x).sum() + loss(x)), gradient, 10)
    assert sorted(found.choice[:2]) == [0, 1]
    assert found.choice[2:] == (1, 0)
    assert found.gradient[:2, 1].min() > 0


def test_a_choice_by_the_mean_of_slopes_is_looked_at_too() -> None:
    """Each slope alone keeps the unit that the round before gave up; their mean keeps that which always matters."""
    costs, start = torch.zeros(3, 2), one_hot(torch.zeros(3, dtype=torch.long), 2).float()
    prices = torch.tensor([[1.0, 0.0]] * 3)
    slopes = iter([[9.0, 0.0, 5.0], [0.0, 6.0, 5.0]])
    seen: list[tuple[float, ...]] = []

    def loss(gates: torch.Tensor) -> float:
        seen.append(tuple(gates[:, 1].tolist()))
        return float(gates[:, 1] @ torch.tensor([4.0, 4.0, 5.0]))

    found = frank_wolfe(costs, prices, 1.0, start, loss, lambda _: torch.tensor([[0.0, x] for x in next(slopes)]), 2)
    assert seen == [(0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)], "each choice is looked at once"
    assert found.choice == (1, 1, 0)
    torch.testing.assert_close(found.gradient[:, 1], torch.tensor([3.0, 4.0, 5.0]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", True),
        ("sparse:window=8,num_sinks=2", True),
        ("sparse:pattern=strided,stride=8", True),
        ("linear", True),
        ("linear:window=0,recurrence=retnet", True),
        ("linear:recurrence=gla", False),
        ("linear:window=0,feature_map=cosformer", False),
        ("sparse:selector=quest", False),
        ("sparse:window=8,position_mode=rolling", False),
    ],
)
def test_what_reads_more_than_queries_and_keys_has_no_gates(name: str, expected: bool) -> None:
    found = {candidate.name: candidate for candidate in read_candidates([name, "sparse:window=3"])}
    assert can_be_gated(found[name]) is expected


def test_single_changes_of_a_document_need_no_questions() -> None:
    model, own, dense = text_and_model()
    units = units_of(model, True)
    base, wanted = dict.fromkeys(units, DENSE), [(unit, SHORT) for unit in units]
    asked = own.document
    assert torch.equal(asked.ids, own.ids[: len(asked.ids)])
    assert asked.is_text[-1]
    assert not own.is_text[len(asked.is_text) :].any()
    assert not asked.is_answer.any()
    every, some = (list(single_changes(model, x, dense, base, wanted)) for x in (own, asked))
    for (unit, candidate, loss), (same, _, less) in zip(every, some, strict=True):
        assert (same, candidate) == (unit, SHORT)
        assert less.divergence == pytest.approx(loss.divergence, rel=1e-4)
        assert less.text == pytest.approx(loss.text, rel=1e-6)
        assert math.isnan(less.recall)
        assert loss.recall > 0


def test_parts_of_a_text_are_compared_with_what_the_dense_model_made_of_them() -> None:
    model = small_model(TOKENIZER, num_hidden_layers=3)
    (own,) = make_probes([PROSE * 8], TOKENIZER, 640, 1, 7, measured=100)
    past = read(model, own)
    found = parts(own, past)
    assert [begin for _, begin in found] == [own.start * n // 16 for n in range(1, 16, 2)]
    for part, begin in found:
        assert torch.equal(part.ids, own.ids[begin : begin + len(part.ids)])
        assert part.is_text.any()
        assert not part.is_answer.any()
    assert divergence(model, [(own, past)]) < 1e-6
    assign(model, {Unit(1): SHORT, Unit(2): LONG})
    whole = loss_of(logits_of(model, own), own, past.logits).divergence
    assert divergence(model, [(own, past)]) == pytest.approx(whole, rel=0.3)
    past.cache.layers[0].__class__ = type("Other", (type(past.cache.layers[0]),), {})
    assert [begin for _, begin in parts(own, past)] == [own.start]


@with_gates
def test_what_a_choice_reads_is_what_it_goes_on_from(variant: str) -> None:
    """Keys and values that converted layers attended to, behind which the end is as if all was read at once."""
    model, own = model_of(variant, None), probe()
    units = units_of(model, by_head=False)
    dense = read(model, own)
    assign(model, dict.fromkeys(units, LONG) | {units[0]: DENSE})
    past = read(model, own)
    assert past.cache is not None
    torch.testing.assert_close(past.logits, logits_of(model, own)[-len(past.logits) :], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(end_logits(model, own, past), past.logits, atol=1e-5, rtol=1e-4)
    first, last = units[0].layer, units[-1].layer
    torch.testing.assert_close(past.cache.layers[first].keys, dense.cache.layers[first].keys)
    assert past.cache.layers[last].keys.shape == dense.cache.layers[last].keys.shape
    assert len(units) < 3 or not torch.equal(past.cache.layers[last].keys, dense.cache.layers[last].keys)
    assert all("attend" not in vars(mechanism) for mechanism in model.modules())


def text_and_model() -> tuple[Any, Any, Any]:
    model = small_model(TOKENIZER, num_hidden_layers=3).double()
    (own,) = make_probes([PROSE * 8], TOKENIZER, 640, 1, 7, measured=100)
    return model, own, read(model, own)


def test_the_gradient_of_the_divergence_is_what_small_changes_do() -> None:
    model, own, dense = text_and_model()
    units, candidates = units_of(model, True), [DENSE, SHORT, LONG]
    assign(model, dict.fromkeys(units, LONG))
    past = read(model, own)
    assign(model, {})
    values = torch.rand(len(units), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    way = torch.randn(len(units), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def moved(values: torch.Tensor) -> float:
        gates.set(values)
        found = []
        for part, begin in parts(own, past, STEEP):
            cache = copy.deepcopy(past.cache)
            cache.crop(begin - own.start)
            with torch.no_grad():
                logits = model(part.ids[None, :-1], **through(cache)).logits[0].log_softmax(-1)
            wanted = dense.logits[begin : begin + len(logits)].log_softmax(-1)
            found.append((wanted.exp() * (wanted - logits)).sum(-1)[part.is_text].mean())
        return float(torch.stack(found).mean())

    with gated(model, units, candidates, 700) as gates:
        gradient = divergence_gradient(model, gates, values, [(own, dense)], [past])
        ahead, behind = (moved(values + step * way) for step in (1e-3, -1e-3))
    assert float((gradient * way).sum()) == pytest.approx((ahead - behind) / 2e-3, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


@with_gates
def test_gates_have_gradients_in_every_family(variant: str) -> None:
    """Of what the end of a text and its answers lose, as small changes say: too small to move tokens to other experts.
    Of texts behind states that are native to the model there is one part. Some families compute gates of their own in
    single precision, which rounds losses to 5e-8 here."""
    model, own = copy.deepcopy(model_of(variant, None)).double(), probe()
    model.set_experts_implementation("eager")  # others know no double precision
    own = own._replace(is_text=~own.is_answer)
    dense = read(model, own)
    units, candidates = units_of(model, by_head=False), [DENSE, SHORT]
    values, recall = torch.full((len(units), 2), 0.5, dtype=torch.float64), Recall(model, [[own]])
    step = 1e-4 * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    with gated(model, units, candidates, LENGTH) as gates:
        gates.set(values)
        assert divergence(model, [(own, dense)]) >= 0.0
        steep = divergence_gradient(model, gates, values, [(own, dense)], [dense])
        slope = recall.gradients(gates, values)[1][0]
        ahead, behind = (float(recall.losses(gates, values + sign * step)) for sign in (1, -1))
    assert values.is_leaf
    assert not values.requires_grad
    assert steep.isfinite().all()
    assert float(steep.abs().max()) > 0.0
    assert float((slope * step).sum()) == pytest.approx((ahead - behind) / 2, rel=0.01, abs=5e-8)


def test_whole_texts_are_read_with_the_choice_and_compared_with_the_dense_model() -> None:
    model, own, dense = text_and_model()
    other = probe()
    other_dense, units, candidates = read_batch(model, [other]), units_of(model, True), [DENSE, SHORT, LONG]
    whole = Whole(model, units, candidates, 700, [(own, dense)], [([other], other_dense)])
    nothing = whole.look((0,) * len(units))
    assert float(nothing[0]) == pytest.approx(0.0, abs=1e-9)
    assert nothing[1].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    chosen = tuple(drawn(len(units), 3).tolist())
    total, lost_answers = whole.look(chosen)
    assert not is_converted(model)
    assign(model, {unit: candidates[index] for unit, index in zip(units, chosen, strict=True)})
    expected = loss_of(logits_of(model, own), own, dense.logits)
    answers = loss_of(logits_of(model, other), other.since(other.start), other_dense.logits[0])
    assign(model, {})
    assert float(total) == pytest.approx(expected.divergence, rel=1e-5)
    dense_recall = loss_of(dense.logits, own, dense.logits).recall, float(whole.dense[1])
    for found, lost, before in zip(lost_answers, (expected.recall, answers.recall), dense_recall, strict=True):
        assert float(found) == pytest.approx(lost - before, abs=1e-5)
    whole.look((0,) * len(units))  # gradients are of the choice that they are asked for
    slope, slopes = whole.gradient(chosen)
    assert not is_converted(model)
    assign(model, {unit: candidates[index] for unit, index in zip(units, chosen, strict=True)})
    pasts = [read(model, text) for text in (own, other)]
    assign(model, {})
    values = one_hot(torch.tensor(chosen), 3).float()
    with gated(model, units, candidates, 700) as gates:
        steep = divergence_gradient(model, gates, values, [(own, dense)], pasts[:1])
        losses, recall = Recall(model, [[own], [other]], pasts).gradients(gates, values)
    torch.testing.assert_close(slope, steep)
    torch.testing.assert_close(slopes, recall)
    torch.testing.assert_close((losses - whole.dense).float(), lost_answers, atol=1e-5, rtol=1e-4)
    assert float(recall.abs().max()) > 1e-6


@with_gates
def test_texts_of_a_batch_lose_and_change_what_each_does_alone(variant: str) -> None:
    model = model_of(variant, None)
    batch = [probe(), probe(seed=1), probe(seed=2)]
    units, candidates = units_of(model, by_head=False), [DENSE, SHORT]
    values = torch.full((len(units), 2), 0.5)
    values[0] = torch.tensor([0.0, 1.0])
    together, alone = Recall(model, [batch]), Recall(model, [[own] for own in batch])
    with gated(model, units, candidates, LENGTH) as gates:
        torch.testing.assert_close(together.losses(gates, values), alone.losses(gates, values), atol=1e-5, rtol=1e-5)
        found, expected = (recall.gradients(gates, values) for recall in (together, alone))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[1][0], found[1][1])
