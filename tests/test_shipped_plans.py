"""The plans in `recipes/results/plans`, which the report tells of."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import small_model, small_tokenizer

from hf_effattn.evaluation.variants import is_converted
from hf_effattn.plans import PLAN, Plan

RESULTS = Path(__file__).parent.parent / "recipes" / "results"
FILES = sorted((RESULTS / "plans").glob("*.json"))
assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_plan_keeps_its_budget_and_the_report_has_its_losses(path: Path) -> None:
    plan = Plan.load(path)
    assert plan.price <= plan.budget.limit < 0.26 * plan.dense_price
    predicted, measured = (loss - plan.start for loss in (plan.predicted, plan.total(PLAN)))
    assert predicted == pytest.approx(measured, rel=0.3)
    row = f"{plan.price / 1e6:.1f} MB"
    losses = f"{predicted:.4f}, {measured:.4f} |"
    lines = (RESULTS / "plan.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if row in line and line.endswith(losses)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_plan_converts_models_of_its_size(path: Path) -> None:
    options = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
    model = small_model(small_tokenizer(), **options)
    model.convert_attention(Plan.load(path))
    assert is_converted(model)
