"""The laws on a CUDA device: one answer, fast = slow, and generation in half precision."""

from __future__ import annotations

import pytest
import torch
from matrix import MODELS, PAIRS, Case, close, left_padded, positions_of, shake, through, tiny_model, tokens
from small import small_model
from test_planning import TOKENIZER, planned
from transformers import DynamicCache

pytestmark = pytest.mark.gpu
on_every_model = pytest.mark.parametrize("model", MODELS)
ON_CUDA = [(model, case) for model, case in PAIRS if case.options["backend"] != "gathered"]  # which is for CPUs
everywhere = pytest.mark.parametrize(("model", "case"), ON_CUDA, ids=str)


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@everywhere
@torch.no_grad()
def test_one_answer_and_that_of_the_cpu(model: str, case: Case) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, **case.options))
    rows = [tokens(size, seed=size) for size in (7, 30, 19)]
    ids, mask = left_padded(rows)
    expected = [net(row[None], use_cache=False).logits[0] for row in rows]
    net, ids, mask = net.cuda(), ids.cuda(), mask.cuda()
    positions, cache = positions_of(mask), DynamicCache(config=net.config)
    parts = [
        net(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **through(cache)).logits
        for a, b in ((0, 14), (14, 15), (15, 30))
    ]
    for index, row in enumerate(rows):
        close(torch.cat(parts, dim=1)[index, -len(row) :].cpu(), expected[index], 1e-4)


def test_a_plan_is_made_there() -> None:
    model = small_model(TOKENIZER, num_hidden_layers=3).cuda()
    plan = planned(model, "60%", by_head=True, candidates=["sparse:window=16", "sparse:window=160"])
    assert plan.price <= plan.budget.limit
    assert model.convert_attention(plan).device.type == "cuda"


@everywhere
@torch.no_grad()
def test_half_precision_generates(model: str, case: Case) -> None:
    net = tiny_model(model).convert_attention(case.mechanism, **case.options).to("cuda", torch.bfloat16)
    ids = tokens(2, 40).cuda()
    assert net(ids).logits.isfinite().all()
    assert net.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, 48)
