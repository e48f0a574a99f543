"""The whole path on a real pretrained model, SmolLM2-135M-Instruct (30 layers, 9 query and 3 key/value heads)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import models
import needle
from matrix import through

import hf_effattn  # noqa: F401  (gives models convert_attention)
from hf_effattn.evaluation import TASKS, Material, Subject

pytestmark = pytest.mark.slow
PROSE = (Path(__file__).parent / "data" / "prose.txt").read_text(encoding="utf-8")
MECHANISMS: dict[str, dict[str, Any]] = {
    "streaming": {"mechanism": "sparse", "window": 512, "num_sinks": 4},
    "linear": {"mechanism": "linear"},
}
every_mechanism = pytest.mark.parametrize("name", MECHANISMS)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return models.load()


@pytest.fixture
def smollm2(loaded: Any) -> Iterator[Any]:
    yield loaded[0]
    loaded[0].revert_attention()


@pytest.fixture
def prose(loaded: Any) -> torch.Tensor:
    ids = loaded[1](PROSE, return_tensors="pt").input_ids
    assert ids.shape[1] >= 2048
    return ids[:, :2048]


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    logits = model(ids, use_cache=False).logits[0, :-1]
    return float(cross_entropy(logits, ids[0, 1:]).exp())


@torch.inference_mode()
def test_a_window_longer_than_the_text_gives_the_dense_logits(smollm2: Any, prose: torch.Tensor) -> None:
    ids = prose[:, :400]
    dense = smollm2(ids, use_cache=False).logits
    for options in ({"mechanism": "sparse"}, {"mechanism": "linear"}):
        smollm2.convert_attention(**options, window=512, num_sinks=4)
        assert (smollm2(ids, use_cache=False).logits - dense).abs().max() <= 1e-4
        cache = DynamicCache(config=smollm2.config)
        parts = [smollm2(ids[:, a:b], **through(cache)).logits for a, b in ((0, 350), (350, 351), (351, 400))]
        assert (torch.cat(parts, dim=1) - dense).abs().max() <= 1e-3  # cached and uncached dense differ as much
    smollm2.revert_attention()
    assert torch.equal(smollm2(ids, use_cache=False).logits, dense)


def test_streaming_keeps_the_perplexity_of_prose(smollm2: Any, prose: torch.Tensor) -> None:
    dense = perplexity(smollm2, prose)
    smollm2.convert_attention("sparse", pattern="streaming", window=512, num_sinks=4)
    assert perplexity(smollm2, prose) <= 1.10 * dense


def test_an_untrained_linear_conversion_is_no_worse_than_its_window(smollm2: Any, prose: torch.Tensor) -> None:
    """The linear part starts nearly closed, so that conversion costs what losing the far keys costs, and no more."""
    ids = prose[:, :1024]
    smollm2.convert_attention("sparse", window=64, num_sinks=4)
    window = perplexity(smollm2, ids)
    smollm2.convert_attention("linear", window=64, num_sinks=4)
    assert perplexity(smollm2, ids) <= 1.02 * window


@every_mechanism
@torch.inference_mode()
def test_cache_bytes_at_8192_tokens_are_those_of_the_report(smollm2: Any, prose: torch.Tensor, name: str) -> None:
    smollm2.convert_attention(**MECHANISMS[name])
    cache = DynamicCache(config=smollm2.config)
    for _ in range(4):
        smollm2.model(prose, **through(cache))
    report = smollm2.attention_report(context_length=8192)
    assert cache.get_seq_length() == 8192
    assert sum(layer.nbytes() for layer in cache.layers) == report.cache_bytes
    assert report.cache_bytes < 0.1 * smollm2.revert_attention().attention_report(context_length=8192).cache_bytes


@every_mechanism
def test_a_batch_generates_what_its_rows_do(loaded: Any, smollm2: Any, name: str) -> None:
    tokenizer = loaded[1]
    smollm2.convert_attention(**MECHANISMS[name])
    prompts = ["The capital of France is", PROSE[:900], "Once upon a time there was a little girl who"]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = smollm2.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch.input_ids.shape[1] :]
    for index, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        expected = smollm2.generate(**alone, max_new_tokens=12, do_sample=False)[0, alone.input_ids.shape[1] :]
        length = min(len(expected), 12)
        assert torch.equal(together[index, :length], expected[:length])
    assert "Paris" in tokenizer.decode(together[0])


@every_mechanism
def test_it_saves_and_loads(smollm2: Any, prose: torch.Tensor, name: str, tmp_path: Path) -> None:
    smollm2.convert_attention(**MECHANISMS[name])
    smollm2.save_pretrained(tmp_path, max_shard_size="200MB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(prose[:, :700]).logits, smollm2(prose[:, :700]).logits)


@pytest.mark.parametrize("name", ["dense", *MECHANISMS])
def test_perplexity_through_the_cache_is_the_parallel_one(
    loaded: Any, smollm2: Any, prose: torch.Tensor, name: str
) -> None:
    if name != "dense":
        smollm2.convert_attention(**MECHANISMS[name] | ({"window": 64} if name == "streaming" else {}))
    subject = Subject(smollm2, loaded[1])
    ids = prose[0, :100]
    parallel, cached = (each.double().mean().exp() for each in (subject.losses(ids), subject.losses_through_cache(ids)))
    torch.testing.assert_close(cached, parallel, atol=0.0, rtol=1e-4)


@torch.inference_mode()
def test_the_shipped_adapter_recovers_a_part_of_what_its_window_loses(smollm2: Any, prose: torch.Tensor) -> None:
    ids = prose[:, :1024]
    dense = perplexity(smollm2, ids)
    smollm2.convert_attention("sparse", window=64, num_sinks=4)
    window = perplexity(smollm2, ids)
    smollm2.revert_attention().convert_attention("linear", adapter="smollm2-135m/linear")
    found = perplexity(smollm2, ids)
    assert dense < found < window
    assert perplexity(smollm2.revert_attention(), ids) == dense


def test_it_finds_passkeys_which_a_window_has_lost(loaded: Any, smollm2: Any) -> None:
    subject = Subject(smollm2, loaded[1], batch_size=2)
    material = Material(subject.count_tokens, PROSE)
    task = TASKS.get("passkey")(material)
    examples = task.examples(1024, 2)
    assert [record["score"] for record in task.run(subject, examples, 1024)] == [1.0, 1.0]
    smollm2.convert_attention("sparse", window=128, num_sinks=4)
    assert [record["score"] for record in task.run(subject, examples, 1024)] == [0.0, 0.0]
    smollm2.convert_attention("sparse", selector="quest", num_blocks=32)  # half of the blocks
    assert [record["score"] for record in task.run(subject, examples, 1024)] == [1.0, 1.0]


def test_half_of_the_blocks_hold_the_passkey(loaded: Any, smollm2: Any) -> None:
    subject = Subject(smollm2, loaded[1])
    examples = TASKS.get("passkey")(Material(subject.count_tokens, "")).examples(1024, 2)
    ways = {"quest": {"selector": "quest", "block_size": 16, "num_blocks": 32}}
    found = needle.summary([needle.trial(subject, example, ways)["quest"] for example in examples])
    assert found["trials in which some head chose it"] == found["digits predicted"] == 1.0
    assert found["of heads that look, those that chose it"] >= 0.95
    assert found["of the weight on it"] >= 0.95


def test_a_plan_keeps_recall_that_equal_windows_lose(loaded: Any) -> None:
    model, tokenizer = loaded
    text, window = PROSE[:4000], "sparse:window=112,num_sinks=4"
    options = {"context_length": 384, "tokenizer": tokenizer, "number": 1, "rounds": 2}
    plan = hf_effattn.plan(model, [text], "60%", candidates=[window], **options)
    assert plan.price <= plan.budget.limit
    assert {7, 18} <= {layer.index for layer in plan.layers if layer.choice == "dense"}  # which find what is far away
    kept, lost, dense = (plan.measured[name].recall for name in ("this plan", window, "dense"))
    assert kept - dense < (lost - dense) / 20
