"""Planning: the choice under a limit, what single changes lose, budgets that are kept, plans that are saved."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import PROSE, small_model, small_tokenizer
from test_families import every_family, model_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import hf_effattn
from hf_effattn.evaluation import Variant
from hf_effattn.evaluation.haystack import ADJECTIVES, NOUNS
from hf_effattn.evaluation.variants import as_variant, digest_of, mechanisms
from hf_effattn.planning.candidates import Candidate, default_candidates, read_candidates
from hf_effattn.planning.journal import FILE
from hf_effattn.planning.measure import assign, end_logits, logits_of, loss_of, read, single_changes
from hf_effattn.planning.probes import DEPTHS, NEEDLE, NOISE, QUESTION, Probe, make_probes
from hf_effattn.plans import Budget, Loss, Plan, choose
from hf_effattn.plans.heads import Unit
from hf_effattn.plans.scale import ratio_at, ratios
from hf_effattn.targets import choose_layers, find_targets

TOKENIZER = small_tokenizer(PROSE + NOISE + " ".join((*ADJECTIVES, *NOUNS, NEEDLE, QUESTION)))
LENGTH = 640
CANDIDATES = ["sparse:window=16", "sparse:window=160", "linear:window=8"]
TEXT = PROSE * 8
tables = st.integers(1, 5).flatmap(
    lambda layers: st.integers(1, 4).flatmap(
        lambda candidates: st.tuples(
            *(
                st.lists(st.lists(values, min_size=candidates, max_size=candidates), min_size=layers, max_size=layers)
                for values in (st.integers(-50, 50), st.integers(0, 40))
            )
        )
    )
)


@pytest.fixture
def model() -> Any:
    return small_model(TOKENIZER, num_hidden_layers=4)


def planned(model: Any, budget: str | int = "40%", **options: Any) -> Plan:
    settings = {"context_length": LENGTH, "candidates": CANDIDATES, "tokenizer": TOKENIZER, "number": 1, "rounds": 2}
    return hf_effattn.plan(model, [TEXT], budget, **settings | options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The plan of `model`, which all tests of a process share."""
    return planned(small_model(TOKENIZER, num_hidden_layers=4))


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed))


@given(table=tables, limit=st.integers(1, 120))
def test_the_choice_is_the_best_of_all_that_keep_the_limit(
    table: tuple[list[list[int]], list[list[int]]], limit: int
) -> None:
    costs, prices = table
    chosen = choose(costs, prices, limit)
    kept = [
        pick
        for pick in itertools.product(range(len(costs[0])), repeat=len(costs))
        if sum(row[i] for row, i in zip(prices, pick, strict=True)) <= limit
    ]
    if chosen is None:
        assert not kept
        return
    assert tuple(chosen) in kept
    best = min(sum(row[i] for row, i in zip(costs, pick, strict=True)) for pick in kept)
    assert sum(row[i] for row, i in zip(costs, chosen, strict=True)) == best


def test_a_limit_that_only_the_cheapest_keep_is_kept() -> None:
    prices = [[0.1, 1 / 3], [1 / 7, 2.0], [1 / 3, 0.5]]
    least = sum(min(row) for row in prices)
    assert choose([[0.0, 0.0]] * 3, prices, least) == [0, 0, 0]
    assert choose([[0.0, 0.0]] * 3, prices, least * 0.999) is None


def test_no_candidate_counts_as_better_than_dense_attention(plan: Plan) -> None:
    for layer in plan.layers:
        assert min(layer.costs.values()) >= min(layer.costs["dense"], 0.0)


def test_prices_that_are_no_whole_parts_of_the_limit_never_exceed_it() -> None:
    costs, prices = [[1.0, 0.0]] * 3, [[0.1, 1 / 3 + 1e-5]] * 3
    assert sum(prices[0][i] for i in choose(costs, prices, 1.0) or []) <= 1.0


def test_of_choices_that_lose_the_same_the_cheaper_one_is_taken() -> None:
    assert choose([[0.0, 0.0]], [[5.0, 2.0]], 10.0) == [1]


@every_family
def test_losses_from_a_layer_on_are_those_of_whole_passes(variant: str) -> None:
    model = model_of(variant, None)
    window, dense = Candidate("w", hf_effattn.SparseConfig(window=5)), Candidate("dense", None)
    units = [Unit(index) for index in choose_layers(find_targets(model), None, None)]
    base = dict.fromkeys(units, dense)
    length, start = 31, 12
    marks = torch.arange(length - 1) % 3 == 0
    probe = Probe(random_ids(length), marks, ~marks, start)
    past = read(model, probe)
    whole = logits_of(model, probe)
    torch.testing.assert_close(past.logits, whole, atol=1e-5, rtol=1e-4)
    try:
        found = list(single_changes(model, probe, past, base, [(unit, window) for unit in units]))
        for unit, candidate, loss in found:
            assign(model, base | {unit: candidate})
            assert loss == loss_of(end_logits(model, probe, past), probe.since(start), past.logits[start:])
        assert [unit for unit, _, _ in found] == units
        everywhere = Candidate("all", hf_effattn.SparseConfig(window=length))
        assign(model, dict.fromkeys(units, everywhere))
        torch.testing.assert_close(end_logits(model, probe, past), past.logits[start:], atol=1e-5, rtol=1e-4)
    finally:
        model.revert_attention()
    assert torch.equal(logits_of(model, probe), whole)


def test_what_was_replaced_while_measuring_is_put_back(model: Any) -> None:
    names = [name for name, _ in model.named_modules()]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    planned(model)
    assert model.training
    model.eval()
    assert [name for name, _ in model.named_modules()] == names
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert not hasattr(model.config, "effattn")


@pytest.mark.parametrize("budget", ["15%", "40%", "70%"])
def test_a_budget_is_kept_by_the_bytes_of_a_cache(model: Any, budget: str) -> None:
    found = planned(model, budget)
    dense = model.attention_report(LENGTH).cache_bytes
    assert found.price <= float(budget[:-1]) / 100 * dense
    model.convert_attention(found)
    assert model.attention_report(LENGTH).cache_bytes == found.price


@torch.no_grad()
def test_what_a_plan_says_was_measured_is_what_the_converted_model_loses(model: Any, plan: Plan) -> None:
    (probe,) = make_probes([TEXT], TOKENIZER, LENGTH, 1, 42)
    inputs, targets = probe.ids[None, :-1], probe.ids[1:]
    dense = model(inputs).logits[0].log_softmax(dim=-1)
    own = model.convert_attention(plan).eval()(inputs).logits[0].log_softmax(dim=-1)
    losses = cross_entropy(own, targets, reduction="none")
    divergences = (dense.exp() * (dense - own)).sum(dim=1)
    told = plan.measured["this plan"]
    assert told.text == pytest.approx(float(losses[probe.is_text].mean()), abs=1e-5)
    assert told.recall == pytest.approx(float(losses[probe.is_answer].mean()), abs=1e-5)
    assert told.divergence == pytest.approx(float(divergences[probe.is_text].mean()), abs=1e-5)
    assert plan.measured["dense"].divergence == pytest.approx(0.0, abs=1e-6)


WINDOWS = ["sparse:window=16,num_sinks=2", "sparse:window=160,num_sinks=2"]


def test_heads_have_plans_of_their_own(model: Any, tmp_path: Path) -> None:
    found = planned(model, "40%", candidates=WINDOWS, by_head=True)
    geometry = [(layer.index, layer.head) for layer in found.layers]
    assert geometry == [(index, head) for index in range(4) for head in range(model.config.num_key_value_heads)]
    assert any("|" in line for line in str(found).splitlines()), "no layer has heads that differ"
    found.plot(tmp_path / "plan.png")
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    ids = random_ids(LENGTH)[None]
    model.convert_attention(found)
    assert found.for_budget("40%").budget == found.budget  # of what dense attention needs, not of stores for each head
    spent = model.attention_report(LENGTH).cache_bytes
    assert spent <= found.price <= found.budget.limit
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert sum(layer.nbytes() if hasattr(layer, "nbytes") else 0 for layer in cache.layers) <= spent
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    windows = {(x.index, x.head): found.candidates[x.choice] for x in found.layers}
    for index, config in found.configs().items():
        own = [windows[index, head] for head in range(model.config.num_key_value_heads)]
        given = config.to_dict()["pattern"]["window"]
        wanted = [None if spec is None else spec["pattern"]["window"] for spec in own]
        assert given == (wanted if len(set(wanted)) > 1 else wanted[0])


@pytest.mark.parametrize(
    ("candidates", "budget", "message"),
    [
        (["linear:window=8"], "40%", "is for whole layers; heads may have windows"),
        (["sparse:selector=quest"], "40%", "is for whole layers"),
        (["sparse:pattern=strided,stride=8"], "40%", "is for whole layers"),
        (["sparse:window=[8,8,9,9]"], "40%", "is for whole layers"),
        (["sparse:window=8,num_sinks=1", "sparse:window=9,num_sinks=2"], "40%", "must have the same sinks"),
        (WINDOWS, "10 tokens/s", "give bytes as a budget, or plan by layers"),
    ],
)
def test_what_heads_cannot_have_is_told(model: Any, candidates: list[str], budget: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(model, budget, candidates=candidates, by_head=True)


@pytest.mark.parametrize("candidate", ["gla", "liger,feature_map=elu"])
def test_candidates_that_cannot_take_over_a_cache_read_all_by_themselves(model: Any, candidate: str) -> None:
    names = [f"linear:window=0,recurrence={candidate}", "sparse:window=16"]
    found = planned(model, "60%", candidates=names, rounds=1)
    assert found.price <= found.budget.limit
    assert found.sum_of(names[0]) > 0


def test_sums_of_losses_are_scaled_to_what_whole_models_lose() -> None:
    known = ratios([4.0, 1.0, 0.0], [2.0, 2.0, 5.0])
    assert known == ((1.0, 2.0), (4.0, 0.5))
    assert [ratio_at(known, x) for x in (-1.0, 0.0, 0.5, 1.0, 4.0, 9.0)] == [2.0, 2.0, 2.0, 2.0, 0.5, 0.5]
    assert ratio_at(known, 2.0) == pytest.approx(1.0)
    assert ratio_at((), 3.0) == 1.0


def test_a_plan_is_no_worse_than_uniform_choices_that_keep_the_budget(plan: Plan) -> None:
    for name in plan.candidates:
        price = sum(layer.prices[name] for layer in plan.layers)
        if price <= plan.budget.limit:
            assert plan.total("this plan") <= plan.total(name) + 1e-9


@pytest.mark.parametrize("by_head", [False, True])
def test_the_first_choice_is_read_whole_so_its_divergence_is_predicted_exactly(model: Any, by_head: bool) -> None:
    windows = ["dense", "sparse:window=16", "sparse:window=64"]
    found = planned(model, number=2, rounds=1, by_head=by_head, candidates=windows, recall_weight=0.0)
    assert found.predicted - found.start == pytest.approx(found.measured["this plan"].divergence, rel=1e-3)


def test_recall_counts_as_much_as_is_said(model: Any) -> None:
    light, heavy = (planned(model, recall_weight=weight, rounds=3) for weight in (0.0, 100.0))
    for own, other in ((light, heavy), (heavy, light)):  # each is the best by what it counts
        assert own.total("this plan") <= replace(own, measured=other.measured).total("this plan")
    assert [x.costs for x in light.layers] != [x.costs for x in heavy.layers]
    assert Loss(7.0, 3.0, 2.0).total(0.5) == 3.5


def test_answers_likelier_than_those_of_the_dense_model_make_up_for_nothing(model: Any) -> None:
    found = planned(model, rounds=1, recall_weight=0.5)
    dense = found.measured["dense"]
    for more, loss in ((-1.0, 0.25), (0.0, 0.25), (1.0, 0.75)):
        own = replace(found, measured=found.measured | {"this plan": Loss(7.0, dense.recall + more, 0.25)})
        assert own.total("this plan") - own.total("dense") == pytest.approx(loss)


def test_needles_are_hidden_far_before_and_asked_for_at_the_end() -> None:
    (probe,) = make_probes([TEXT], TOKENIZER, LENGTH, 1, 7)
    assert len(probe.ids) == LENGTH + 1
    assert not bool((probe.is_text & probe.is_answer).any())
    answers = TOKENIZER.decode(probe.ids[1:][probe.is_answer]).split()
    assert len(answers) == len(DEPTHS)
    assert all(len(x) == 5 and x.isdigit() for x in answers)
    whole = TOKENIZER.decode(probe.ids)
    for answer in answers:
        first, last = whole.index(answer), whole.rindex(answer)
        assert 0.02 < first / len(whole) < 0.75
        assert last / len(whole) > 0.6
        assert whole[first - 60 : first].count("secret number of the ") == 1
    document = TOKENIZER.decode(probe.ids[1:][probe.is_text])
    assert document[:200] in TEXT
    assert not any(x in document for x in answers)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(model, out=tmp_path / "whole")
    lines = (tmp_path / "whole" / FILE).read_text().splitlines()
    half = tmp_path / "half" / FILE
    half.parent.mkdir()
    half.write_text("\n".join(lines[:12]) + "\n" + lines[12][:9])  # killed in the middle of a line
    assert planned(model, out=half.parent) == whole
    assert sorted(half.read_text().splitlines()) == sorted(lines)

    def refuse(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("hf_effattn.planning.measurements.loss_of", refuse)
    monkeypatch.setattr("hf_effattn.planning.measure.loss_of", refuse)
    assert planned(model, out=half.parent).layers == whole.layers


def test_measurements_of_something_else_are_refused(model: Any, tmp_path: Path) -> None:
    planned(model, out=tmp_path)
    with pytest.raises(ValueError, match="measurements of another model"):
        planned(model, out=tmp_path, seed=1)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    with pytest.raises(ValueError, match="measurements of another model"):
        planned(model, out=tmp_path)


def test_a_plan_is_saved_with_the_model_and_by_itself(model: Any, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    model.convert_attention(plan)
    ids = random_ids(60)[None]
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert Plan.from_dict(loaded.config.effattn["plan"]) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    loaded.convert_attention("sparse", window=7, layers=[0])
    assert "plan" not in loaded.config.effattn  # which it no longer is


def test_a_plan_is_a_variant_of_evaluation(model: Any, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    variant = Variant.parse(f"plan:{path}")
    assert [config.to_dict() for config in mechanisms(model, variant)] == [
        spec for layer in plan.layers if (spec := plan.candidates[layer.choice])
    ]
    with as_variant(model, variant):
        assert model.attention_report(LENGTH).cache_bytes == plan.price
    before = digest_of(variant)
    plan.for_budget("20%").save(path)
    assert digest_of(variant) != before


def test_the_same_measurements_serve_other_budgets(model: Any, plan: Plan) -> None:
    assert plan.model_type == "llama"
    cheaper = plan.for_budget("15%")
    assert cheaper.price <= 0.15 * model.attention_report(LENGTH).cache_bytes
    assert "this plan" not in cheaper.measured
    assert plan.for_budget("40%") == plan, "with what was refined and measured"
    assert cheaper.predicted >= plan.predicted - 1e-9
    with pytest.raises(ValueError, match="plan again for seconds"):
        plan.for_budget("10 tokens/s")


def test_a_speed_is_a_budget(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 1.0, 2.0, 1.5])  # of dense attention, then of the candidates
    monkeypatch.setattr("hf_effattn.planning.measurements.step_seconds", lambda *_: next(seconds))
    found = planned(model, "0.5 tokens/s")
    assert found.budget == Budget("seconds", 2.0)
    assert found.price <= 2.0
    assert "tokens/s" in str(found)


def test_a_step_takes_some_time(model: Any) -> None:
    from hf_effattn.planning.speed import step_seconds

    assert 0.0 < step_seconds(model, random_ids(50)) < 10.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25%", Budget("bytes", 250.0)),
        (300, Budget("bytes", 300)),
        ("2 kB", Budget("bytes", 2000.0)),
        ("1MiB", Budget("bytes", 2.0**20)),
        ("20 tokens/s", Budget("seconds", 0.05)),
    ],
)
def test_budgets_are_written_in_several_ways(text: Any, expected: Budget) -> None:
    assert Budget.parse(text, 1000) == expected


@pytest.mark.parametrize("text", ["", "a lot", "25 percent", "-3%", "0%", "120%", 0, "..%", "5 seconds"])
def test_what_is_no_budget_is_told(text: Any) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text, 1000)
    with pytest.raises(TypeError, match="budget"):
        Budget.parse(2.5, 1000)  # type: ignore[arg-type]


def test_budgets_that_cannot_be_kept_are_told_before_anything_is_measured(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_effattn.planning.measurements.loss_of", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="cannot be kept: the cheapest candidates need"):
        planned(model, "0.1%")
    assert not hasattr(model.config, "effattn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": ["short"]}, "no document is long enough for a context of 640 tokens: the longest of 1 has 1,"),
        ({"number": 900}, "stretches of"),
        ({"context_length": 99}, "use a longer one"),
        ({"context_length": 9999}, "more than the 4096 positions"),
        ({"candidates": ["dense"]}, "besides dense"),
        ({"candidates": ["sparse:window=4", "sparse:window=4"]}, "twice"),
        ({"candidates": ["sparse:widow=4"]}, "unknown option 'widow'"),
        ({"candidates": ["sparse:window=4,layers=[0]"]}, "the plan is there to choose"),
        ({"candidates": ["adapter:folder"]}, "plan first, then train"),
        ({"candidates": ["sparse:eviction=tova,capacity=40"]}, "likelihood does not see"),
        ({"number": 0}, "number must be at least 1"),
        ({"recall_weight": -0.1}, "recall_weight must be 0 or more"),
        ({"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_impossible_wishes_are_told(model: Any, options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"context_length": LENGTH, "candidates": CANDIDATES, "tokenizer": TOKENIZER, **options}
    with pytest.raises(ValueError, match=message):
        hf_effattn.plan(model, settings.pop("documents", [TEXT]), **settings)


@pytest.mark.parametrize("given", ["dense", 5, [3]])
def test_candidates_are_a_list_of_names(given: Any) -> None:
    with pytest.raises(TypeError):
        read_candidates(given)


def test_default_candidates_are_parts_of_the_context() -> None:
    names = [candidate.name for candidate in read_candidates(default_candidates(8192))]
    assert names == ["dense", *(f"sparse:window={w},num_sinks=4" for w in (252, 1020, 2044))]
    assert read_candidates([hf_effattn.SparseConfig(window=7)])[1].name == "sparse:window=7"


def test_plans_are_for_dense_models_of_their_size(model: Any, plan: Plan) -> None:
    with pytest.raises(ValueError, match="plan is for a model of 4 layers; this one has 2"):
        small_model(TOKENIZER).convert_attention(plan)
    with pytest.raises(ValueError, match="window does not go with a plan"):
        model.convert_attention(plan, window=4)
    with pytest.raises(ValueError, match="layers does not go with a plan"):
        model.convert_attention(plan, layers=[0])
    model.convert_attention("sparse", window=8)
    with pytest.raises(ValueError, match="converted already"):
        model.convert_attention(plan)
    with pytest.raises(ValueError, match="converted already"):
        planned(model)


def test_the_tokenizer_must_be_known(model: Any) -> None:
    with pytest.raises(ValueError, match="give tokenizer="):
        hf_effattn.plan(model, [TEXT], context_length=LENGTH)


def test_a_plan_prints_as_a_table_and_is_drawn(plan: Plan, tmp_path: Path) -> None:
    shown = str(plan).splitlines()
    assert shown[0].split()[:3] == ["layer", "attention", "price"]
    assert len(shown) == 1 + 4 + 1 + 1 + 1 + 5 + 1
    assert f"{math.exp(plan.measured['dense'].text):.3f} (1.0000x)" in str(plan)
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no plan"):
        Plan.load(tmp_path / "no.json")
