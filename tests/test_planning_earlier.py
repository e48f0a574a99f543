"""Plans that are refined, and plans that go on from earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_planning
import torch
from small import small_model
from test_planning import LENGTH, TEXT, TOKENIZER

from hf_effattn.planning import together
from hf_effattn.planning.measure import assign, logits_of, loss_of
from hf_effattn.planning.probes import make_probes
from hf_effattn.planning.recall import Recall
from hf_effattn.planning.refine import Refined
from hf_effattn.planning.whole import Whole
from hf_effattn.plans import Plan


def planned(model: Any, budget: str = "60%", **options: Any) -> Plan:
    windows = {"candidates": ["sparse:window=16", "sparse:window=160"], "rounds": 2}
    return test_planning.planned(model, budget, **windows | options)


@pytest.mark.parametrize("changes", [False, True])
def test_a_plan_is_the_choice_that_was_refined(monkeypatch: pytest.MonkeyPatch, changes: bool) -> None:
    """It is to lose what the last step left to expect; where nothing was changed, what the search expected."""
    model, lost = small_model(TOKENIZER, num_hidden_layers=3), []
    expected: list[tuple[int, ...]] = []

    def refined(choice: tuple[int, ...], costs: Any, prices: Any, limit: float, look: Any, *_: Any) -> Refined:
        new = tuple((index + changes) % costs.shape[1] for index in choice)
        lost.extend((look(choice)[1], look(new)[1]))
        expected.append(new)
        return Refined(new, 0.5 * lost[0])

    monkeypatch.setattr(together, "refine", refined)
    found = planned(model, recall_weight=0)
    names = list(found.candidates)
    assert [names.index(row.choice) for row in found.layers] == list(expected[0])
    assert found.measured["this plan"].divergence == pytest.approx(lost[1], rel=1e-4)
    before = found.predicted - found.start
    assert before == pytest.approx(0.5 * lost[0], rel=1e-4) if changes else before == pytest.approx(lost[0], rel=0.3)


def test_plans_can_be_made_where_no_gradients_are_wanted() -> None:
    """The search has gradients of its own."""
    model = small_model(TOKENIZER, num_hidden_layers=2)
    with torch.inference_mode():
        found = planned(model)
    assert found == planned(model)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [9, 3, 0])
def test_a_search_and_steps_that_were_killed_go_on_from_what_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: int
) -> None:
    model, calls = small_model(TOKENIZER, num_hidden_layers=4), []
    for owner, name in ((Recall, "losses"), (Recall, "gradients"), (Whole, "look"), (together, "divergence")):
        real = getattr(owner, name)

        def counted(*args: Any, _real: Any = real, _name: str = name) -> Any:
            calls.append(_name)
            return _real(*args)

        monkeypatch.setattr(owner, name, counted)
    whole = planned(model, by_head=True, recall_weight=1.0, out=tmp_path / "whole")
    assert set(calls) == {"losses", "gradients", "look", "divergence"}
    every = len(calls)
    lines = (tmp_path / "whole" / "measurements.jsonl").read_text().splitlines()
    half = tmp_path / "half" / "measurements.jsonl"
    half.parent.mkdir()
    half.write_text("\n".join(lines[: len(lines) - missing]) + "\n")
    calls.clear()
    assert planned(model, by_head=True, recall_weight=1.0, out=half.parent) == whole
    assert len(calls) <= min(missing, every - 1)


@pytest.mark.slow
def test_a_folder_serves_other_candidates_weights_and_heads(tmp_path: Path) -> None:
    model = small_model(TOKENIZER, num_hidden_layers=3)
    others = ["sparse:window=16", "sparse:window=100"]
    for options in ({}, {"candidates": others}, {"recall_weight": 2.0}, {"by_head": True}, {"budget": "80%"}, {}):
        assert planned(model, **options, out=tmp_path) == planned(model, **options)


@pytest.mark.parametrize("by_head", [False, True])
def test_an_earlier_plan_is_made_better(monkeypatch: pytest.MonkeyPatch, by_head: bool) -> None:
    """For its budget or another one, without a search."""
    model = small_model(TOKENIZER, num_hidden_layers=4)
    first = planned(model, by_head=by_head, rounds=1)
    monkeypatch.setattr(together, "frank_wolfe", lambda *_: pytest.fail("searched"))
    again = planned(model, by_head=by_head, rounds=4, recall_weight=0, earlier=first)
    assert again.measured["this plan"].divergence <= first.measured["this plan"].divergence
    assert [row.costs for row in again.layers] == [row.costs for row in first.layers]
    with monkeypatch.context() as patch:
        patch.setattr(together, "refine", lambda choice, *args: Refined(choice, args[3](choice)[1]))
        as_it_was = planned(model, by_head=by_head, recall_weight=5.0, earlier=again, number=4)
    assert [row.choice for row in as_it_was.layers] == [row.choice for row in again.layers]
    assert as_it_was.predicted == pytest.approx(as_it_was.total("this plan"), rel=1e-4), "whole texts were looked at"
    cheaper = planned(model, "30%", by_head=by_head, recall_weight=0, earlier=first)
    assert cheaper.price <= cheaper.budget.limit < first.price
    assign(model, {})
    model.convert_attention(first.for_budget("30%"))
    with torch.no_grad():
        (own,) = make_probes([TEXT], TOKENIZER, LENGTH, 1, 42)
        converted = logits_of(model, own)
        assign(model, {})
        unrefined = loss_of(converted, own, logits_of(model, own)).divergence
    assert cheaper.measured["this plan"].divergence <= unrefined + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 660}, "another context length: 640, not 660"),
        (
            {"candidates": ["sparse:window=16", "sparse:window=200"]},
            r"another candidates: \['dense', 'sparse:window=16', 'sparse:window=160'\], not",
        ),
        ({"by_head": True}, "for other layers, heads or prices"),
        ({"budget": "0.1%"}, "cannot be kept"),
    ],
)
def test_earlier_plans_for_something_else_are_refused(options: dict[str, Any], message: str) -> None:
    model = small_model(TOKENIZER, num_hidden_layers=2)
    first = planned(model, rounds=1)
    with pytest.raises(ValueError, match=message):
        planned(model, earlier=first, **options)


def test_candidates_without_gates_do_not_go_on_from_earlier_plans() -> None:
    model = small_model(TOKENIZER, num_hidden_layers=2)
    candidates = ["sparse:selector=moba", "sparse:window=16"]
    first = planned(model, candidates=candidates)
    with pytest.raises(ValueError, match="not refined: leave out earlier="):
        planned(model, candidates=candidates, earlier=first)
