"""Evaluation: likelihoods against plain ones, runs that go on, batches, variants and reports."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import tiny_config
from peft import LoraConfig, get_peft_model
from small import PROSE, small_model, small_tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from hf_effattn.evaluation import TASKS, Example, Material, Results, Settings, Subject, Variant, evaluate, markdown
from hf_effattn.evaluation import plots as evaluation_plots
from hf_effattn.evaluation.material import Sources
from hf_effattn.evaluation.plots import plots
from hf_effattn.evaluation.runner import RESULTS
from hf_effattn.evaluation.variants import EVICTIONS_START_LATE, as_variant, is_converted
from hf_effattn.recovery import save_adapter

DENSE = Variant("dense", "dense")
VARIANTS = [DENSE, Variant.parse("sparse:window=24,num_sinks=2"), Variant.parse("linear:window=16")]
TOKENIZER = small_tokenizer()


@pytest.fixture
def model() -> Any:
    return small_model(TOKENIZER)


@pytest.fixture
def material() -> Material:
    return Material(lambda text: len(TOKENIZER(text).input_ids), PROSE)


def plain_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")


@pytest.mark.parametrize("name", list(TASKS))
def test_each_task_says_what_it_is_and_is_in_the_readme(name: str) -> None:
    assert TASKS.get(name).__doc__
    assert f"`{name}`" in (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@torch.inference_mode()
def test_losses_are_those_of_the_model_whole_and_through_the_cache(model: Any, variant: Variant) -> None:
    with as_variant(model, variant):
        subject = Subject(model, TOKENIZER)
        ids = subject.ids(PROSE)[:150]
        expected = plain_losses(model, ids)
        torch.testing.assert_close(subject.losses(ids), expected, atol=1e-5, rtol=1e-5)
        for step in (1, 40):
            torch.testing.assert_close(subject.losses_through_cache(ids, step), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_perplexity_through_the_cache_is_the_parallel_one(model: Any, material: Material, variant: Variant) -> None:
    totals = {}
    with as_variant(model, variant):
        for name in ("perplexity", "perplexity_cached"):
            task = TASKS.get(name)(material)
            records = list(task.run(Subject(model, TOKENIZER), task.examples(100, 2), 100))
            totals[name] = task.total(records)
            assert [record["tokens"] for record in records] == [100, 100]
    assert math.isclose(totals["perplexity"], totals["perplexity_cached"], rel_tol=1e-4)


def test_perplexity_beyond_the_positions_counts_each_token_once(material: Material) -> None:
    model = small_model(TOKENIZER, max_position_embeddings=64)
    task = TASKS.get("perplexity")(material)
    (example,) = task.examples(150, 1)
    (record,) = task.run(Subject(model, TOKENIZER), [example], 150)
    ids = Subject(model, TOKENIZER).ids(example.prompt)[:151]
    with torch.inference_mode():
        expected = plain_losses(model, ids[:65])
        for end in (97, 129, 151):  # windows of 64 that move by 32, and a last one
            fresh = end - (len(expected) + 1)
            expected = torch.cat((expected, plain_losses(model, ids[end - 65 : end])[-fresh:]))
    assert len(expected) == record["tokens"] == 150
    assert math.isclose(record["loss"], float(expected.mean()), rel_tol=1e-5)
    sums = {int(bound): pair for bound, pair in record["by_position"].items()}
    assert {bound: pair[1] for bound, pair in sums.items()} == {64: 64, 128: 64, 256: 22}
    assert math.isclose(sums[64][0], float(expected[:64].double().sum()), rel_tol=1e-5)


def test_context_gain_scores_the_same_tokens_under_each_context(model: Any, material: Material) -> None:
    task = TASKS.get("context_gain")(material)
    (example,) = task.examples(128, 1)
    (record,) = task.run(Subject(model, TOKENIZER), [example], 128)
    ids = Subject(model, TOKENIZER).ids(example.prompt)[:129]
    with torch.inference_mode():
        whole = plain_losses(model, ids)[-32:].mean()
        short = torch.cat([plain_losses(model, ids[s : s + 9]) for s in range(96, 128, 8)]).mean()
    assert math.isclose(record["perplexity"]["128"], math.exp(whole), rel_tol=1e-4)
    assert math.isclose(record["perplexity"]["8"], math.exp(short), rel_tol=1e-4)
    assert math.isclose(record["score"], float(short - whole), rel_tol=1e-3, abs_tol=1e-5)


@pytest.fixture(params=["first", "unused"])
def start(request: pytest.FixtureRequest) -> tuple[Any, list[int]]:
    """A tokenizer with a BOS token, and what it begins texts with: BOS, or nothing."""
    tokenizer = small_tokenizer()
    tokenizer.bos_token = "<eos>"
    if request.param == "unused":
        return tokenizer, []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 1)])
    return tokenizer, [1]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@torch.inference_mode()
def test_passages_begin_as_the_tokenizer_begins_texts(
    model: Any, material: Material, start: tuple[Any, list[int]], variant: Variant
) -> None:
    tokenizer, first = start
    with as_variant(model, variant):
        subject = Subject(model, tokenizer)
        for name in ("perplexity", "perplexity_cached"):
            task = TASKS.get(name)(material)
            (example,) = task.examples(100, 1)
            (record,) = task.run(subject, [example], 100)
            ids = torch.tensor([*first, *TOKENIZER(example.prompt).input_ids])[:101]
            assert record["tokens"] == 100
            assert math.isclose(record["loss"], float(plain_losses(model, ids).mean()), rel_tol=1e-5)


@torch.inference_mode()
def test_every_window_of_a_passage_begins_as_texts_do(material: Material, start: tuple[Any, list[int]]) -> None:
    tokenizer, first = start
    model = small_model(TOKENIZER, max_position_embeddings=64)

    def read(ids: torch.Tensor) -> torch.Tensor:
        return plain_losses(model, torch.cat((torch.tensor(first, dtype=torch.long), ids[len(first) :])))

    task = TASKS.get("perplexity")(material)
    (example,) = task.examples(150, 1)
    (record,) = task.run(Subject(model, tokenizer), [example], 150)
    ids = torch.tensor([*first, *TOKENIZER(example.prompt).input_ids])[:151]
    expected = torch.cat([read(ids[:65]), read(ids[32:97])[-32:], read(ids[64:129])[-32:], read(ids[86:151])[-22:]])
    assert math.isclose(record["loss"], float(expected.mean()), rel_tol=1e-5)
    task = TASKS.get("context_gain")(material)
    (example,) = task.examples(64, 1)
    (record,) = task.run(Subject(model, tokenizer), [example], 64)
    ids = torch.tensor([*first, *TOKENIZER(example.prompt).input_ids])[:65]
    contexts = {4: [read(ids[s : s + 5]) for s in range(48, 64, 4)], 16: [read(ids[48:])], 64: [read(ids)[-16:]]}
    for context, losses in contexts.items():
        assert math.isclose(record["perplexity"][str(context)], float(torch.cat(losses).mean().exp()), rel_tol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_batch_answers_as_its_rows_do(model: Any, variant: Variant) -> None:
    prompts = [Example(PROSE[start : start + size], ()) for start, size in ((0, 90), (300, 30), (10, 200), (50, 5))]
    with as_variant(model, variant):
        together, alone = (list(Subject(model, TOKENIZER, n).generate(prompts, 8)) for n in (3, 1))
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    for answer, example in zip(together, prompts, strict=True):
        assert answer.facts["prompt_tokens"] == len(TOKENIZER(example.prompt).input_ids)


def settings(**changes: Any) -> Settings:
    options = {"tasks": ["perplexity", "passkey"], "lengths": [256, 512], "number": 2, "variants": VARIANTS}
    return Settings(**{**options, **changes})


def test_a_killed_run_goes_on_and_loses_nothing(model: Any, material: Material, tmp_path: Path) -> None:
    whole = evaluate(model, TOKENIZER, settings(), material, tmp_path / "whole").records
    assert len(whole) == 2 * 2 * 2 * 3
    assert not is_converted(model)

    class Killed(Exception):
        pass

    def kill(description: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        evaluate(model, TOKENIZER, settings(), material, tmp_path / "killed", kill)
    assert not is_converted(model)
    path = tmp_path / "killed" / RESULTS
    before = path.read_text()
    path.write_text(before + '{"variant": "dense", "ta')  # a line that was being written
    seen: list[int] = []
    again = evaluate(
        model, TOKENIZER, settings(), material, tmp_path / "killed", lambda d, done, t: seen.append(done)
    ).records
    assert seen[0] > 0
    assert path.read_text().startswith(before)
    assert len(path.read_text().splitlines()) == len(whole)
    timing = ("prefill_seconds", "step_seconds")
    for one, other in zip(sorted_records(whole), sorted_records(again), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def sorted_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda r: (r["variant"], r["task"], r["length"], r["index"]))


def test_scores_of_another_version_are_not_mixed_in(
    model: Any, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(lengths=[256], number=1, variants=[DENSE])
    evaluate(model, TOKENIZER, wanted, material, tmp_path)
    monkeypatch.setattr("hf_effattn.evaluation.runner.SCORES", 3)
    with pytest.raises(ValueError, match="results of other settings .scores was 2, is 3"):
        evaluate(model, TOKENIZER, wanted, material, tmp_path)


def test_more_examples_and_variants_are_added_to_what_is_there(model: Any, material: Material, tmp_path: Path) -> None:
    evaluate(model, TOKENIZER, settings(lengths=[256], variants=[DENSE]), material, tmp_path)
    before = (tmp_path / RESULTS).read_text()
    more = settings(lengths=[256], number=3, variants=VARIANTS[:2])
    assert len(evaluate(model, TOKENIZER, more, material, tmp_path).records) == 2 * 3 * 2
    assert (tmp_path / RESULTS).read_text().startswith(before)
    with pytest.raises(ValueError, match="results of other settings .seed was 42, is 7"):
        evaluate(model, TOKENIZER, settings(seed=7), material, tmp_path)
    other = Material(material.count_tokens, PROSE[5000:])
    with pytest.raises(ValueError, match="results of other examples .perplexity at 256 tokens"):
        evaluate(model, TOKENIZER, settings(lengths=[256]), other, tmp_path)


def test_results_of_another_dtype_are_not_mixed_in(model: Any, material: Material, tmp_path: Path) -> None:
    evaluate(model, TOKENIZER, settings(lengths=[256], variants=[DENSE]), material, tmp_path)
    with pytest.raises(ValueError, match="dtype was 'float32', is 'bfloat16'.; give another folder"):
        evaluate(model.bfloat16(), TOKENIZER, settings(lengths=[256], variants=[DENSE]), material, tmp_path)


def test_results_of_an_adapter_that_was_retrained_are_not_mixed_in(
    model: Any, material: Material, tmp_path: Path
) -> None:
    tuned = small_model(TOKENIZER).convert_attention("linear", window=16)
    save_adapter(tuned, tmp_path / "adapter")
    variant = Variant.parse(f"adapter:{tmp_path / 'adapter'}")
    first, both = settings(lengths=[256], variants=[DENSE]), settings(lengths=[256], variants=[DENSE, variant])
    evaluate(model, TOKENIZER, first, material, tmp_path)
    for _ in range(2):
        evaluate(model, TOKENIZER, both, material, tmp_path)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "effattn" in name:
                parameter.normal_()
    save_adapter(tuned, tmp_path / "adapter")
    before = (tmp_path / RESULTS).read_text()
    with pytest.raises(ValueError, match="results of other weights of adapter:.*; give another folder"):
        evaluate(model, TOKENIZER, both, material, tmp_path)
    evaluate(model, TOKENIZER, first, material, tmp_path)
    assert (tmp_path / RESULTS).read_text() == before


def test_an_adapter_may_change_before_it_has_results(model: Any, material: Material, tmp_path: Path) -> None:
    tuned = small_model(TOKENIZER).convert_attention("linear", window=16)
    both = settings(lengths=[256], variants=[DENSE, Variant("tuned", "adapter", {"folder": str(tmp_path / "adapter")})])

    def kill(description: str, done: int, total: int) -> None:
        if done == total / 2:
            raise KeyboardInterrupt

    save_adapter(tuned, tmp_path / "adapter")
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TOKENIZER, both, material, tmp_path, kill)
    save_adapter(tuned.convert_attention("linear", window=8), tmp_path / "adapter")
    assert len(evaluate(model, TOKENIZER, both, material, tmp_path).records) == 8


def test_perplexity_of_evictions_is_told_to_be_dense(model: Any, material: Material, tmp_path: Path) -> None:
    variants = [DENSE, Variant.parse("sparse:eviction=knorm,capacity=64")]
    asked = settings(tasks=["perplexity", "perplexity_cached"], lengths=[256], variants=variants)
    results = evaluate(model, TOKENIZER, asked, material, tmp_path)
    told = f"{EVICTIONS_START_LATE} (perplexity of {variants[1].name})"
    assert results.notes == [told]
    assert told in markdown(results)
    one, other = (results.score(v.name, "perplexity", 256) for v in variants)
    assert math.isclose(one or 0, other or 1, rel_tol=1e-5)
    assert not math.isclose(*(results.score(v.name, "perplexity_cached", 256) or 0 for v in variants), rel_tol=1e-3)
    asked = settings(tasks=["perplexity_cached"], lengths=[256], variants=variants)
    assert not evaluate(model, TOKENIZER, asked, material, tmp_path).notes


@pytest.mark.parametrize("kind", ["chat", "special tokens"])
def test_what_template_and_tokenizer_add_counts(model: Any, material: Material, tmp_path: Path, kind: str) -> None:
    tokenizer = small_tokenizer()
    if kind == "chat":
        tokenizer.chat_template = "You answer well. User: {{ messages[0]['content'] }} Answer:"
    else:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            "<eos> " * 20 + "$A", special_tokens=[("<eos>", 1)]
        )
    asked = settings(tasks=["passkey"], variants=[DENSE], number=4, chat=kind == "chat")
    results = evaluate(model, tokenizer, asked, material, tmp_path)
    for length in asked.lengths:
        longest = max(record["prompt_tokens"] for record in results.of("dense", "passkey", length))
        assert length - 30 < longest + TASKS.get("passkey").max_new_tokens <= length


def test_passages_read_on_beyond_the_positions_are_told_of(material: Material, tmp_path: Path) -> None:
    asked = settings(tasks=["perplexity_cached"], lengths=[100], variants=[DENSE], number=1)
    results = evaluate(small_model(TOKENIZER, max_position_embeddings=64), TOKENIZER, asked, material, tmp_path)
    (note,) = results.notes
    assert "perplexity_cached: passages of more than 64 tokens are read on" in note
    learned = AutoModelForCausalLM.from_config(
        tiny_config("gpt2", vocab_size=len(TOKENIZER), max_position_embeddings=64)
    )
    with pytest.raises(
        ValueError, match="length 100 is more than the 64 positions of the model, and perplexity_cached"
    ):
        evaluate(learned, TOKENIZER, asked, material, tmp_path / "learned")


def test_every_variant_answers_the_same_examples_and_the_report_opens_with_ratios(
    model: Any, material: Material, tmp_path: Path
) -> None:
    results = replace(evaluate(model, TOKENIZER, settings(), material, tmp_path), notes=["0 rows skipped"])
    held = json.loads((tmp_path / "settings.json").read_text())["cache_bytes"]
    for variant in VARIANTS:
        with as_variant(model, variant):
            assert held[variant.name]["512"] == model.attention_report(512).cache_bytes
    report = markdown(results)
    lines = report.splitlines()
    assert lines[0].startswith("# ")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:] if line.startswith("|")]
    assert table[0] == ["over dense", *(variant.name for variant in VARIANTS[1:])]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert list(rows)[:4] == ["perplexity 256 ↓", "perplexity 512 ↓", "passkey 256", "passkey 512"]
    for place, name in enumerate(table[0][1:]):
        expected = results.score(name, "perplexity", 256) / results.score("dense", "perplexity", 256)
        assert rows["perplexity 256 ↓"][place] == f"{expected:.2f}"
        assert rows["cache bytes 512 ↓"][place] == f"{held[name]['512'] / held['dense']['512']:.2f}"
    assert "0 rows skipped" in report
    assert "Break-even" in report
    assert {path.name for path in plots(results, tmp_path)} == {"scores.png", "costs.png", "positions.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("scores.png", "costs.png", "positions.png"))


def test_further_scores_are_recorded_and_reported(model: Any, tmp_path: Path) -> None:
    rows = [{"document": PROSE[i : i + 200], "question": "Who?", "answers": [f"no {i}"]} for i in range(0, 800, 200)]
    material = Material(lambda text: len(TOKENIZER(text).input_ids), PROSE, documents=rows)
    asked = settings(tasks=["distractor_qa", "passkey"], lengths=[512], variants=VARIANTS[:2], number=2)
    results = evaluate(model, TOKENIZER, asked, material, tmp_path)
    for record in results.records:
        told = {"exact match", "string match (any)"} if record["task"] == "distractor_qa" else set()
        assert set(record.get("further", {})) == told
    shared = {"task": "distractor_qa", "length": 1024}
    records = [
        {**shared, "variant": name, "index": i, "score": score, "further": {"exact": more}}
        for name, pairs in {"dense": ((0.5, 0.0), (1.0, 1.0)), "other": ((0.25, 0.0), (0.25, 0.0))}.items()
        for i, (score, more) in enumerate(pairs)
    ]
    report = markdown(Results(records, {}))
    assert "| distractor_qa (F1) | 1k | 2 | 0.75 ± 0.25 | 0.25 ± 0 |" in report
    assert "| distractor_qa (exact) | 1k | 2 | 0.5 ± 0.5 | 0 ± 0 |" in report


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are drawn, by the name of their file."""
    found: dict[str, Any] = {}

    def saved(figure: Any, path: Path) -> Path:
        found[path.name] = figure
        return _saved(figure, path)

    _saved = evaluation_plots._saved
    monkeypatch.setattr(evaluation_plots, "_saved", saved)
    return found


def results_of(scores: dict[str, Sequence[float]], seconds: dict[str, Sequence[float]]) -> Results:
    """Results at 1,024, 2,048 and so on of two tasks, with 1,000 tokens of a prompt and 10 MB of cache each."""
    records = [
        {"variant": name, "task": task, "length": 1024 << i, "index": 0, "score": score, "prompt_tokens": 1000}
        | ({"tokens": 1, "loss": math.log(score)} if task == "perplexity" else {"prefill_seconds": seconds[name][i]})
        for name, found in scores.items()
        for task in ("perplexity", "passkey")
        for i, score in enumerate(found)
    ]
    return Results(records, {name: {str(1024 << i): 10_000_000 for i in range(3)} for name in scores})


def test_parts_have_a_plot_of_their_own(figures: dict[str, Any], tmp_path: Path) -> None:
    scores = {"dense": (8.0, 7.0), "a, window only": (20.0, 19.0), "a": (9.0, 8.5), "a, linear only": (90.0, 80.0)}
    results = results_of(scores | {"b": (3.0, 2.0)}, dict.fromkeys([*scores, "b"], (1.0, 1.0)))
    assert tmp_path / "ablations.png" in plots(results, tmp_path)
    for axis, task in zip(figures["ablations.png"].axes, ("perplexity", "passkey"), strict=True):
        bars = {bar.get_label(): tuple(patch.get_height() for patch in bar) for bar in axis.containers}
        expected = {"whole": "a", "window only": "a, window only", "linear only": "a, linear only"}
        assert bars.keys() == expected.keys()
        assert all(bars[label] == pytest.approx(scores[name]) for label, name in expected.items())
        lines = [segment[0][1] for line in axis.collections for segment in line.get_segments()]
        assert lines == pytest.approx(scores["dense"])
        assert axis.get_title() == f"{task}\na"
    without = replace(results, records=[record for record in results.records if "only" not in record["variant"]])
    assert tmp_path / "ablations.png" not in plots(without, tmp_path)


def test_break_even_is_told_and_marked(figures: dict[str, Any], tmp_path: Path) -> None:
    seconds = {"dense": (1.0, 2.0, 4.0), "late": (2.0, 2.0, 2.0), "never": (9.0, 1.0, 9.0), "always": (0.5, 0.5, 0.5)}
    results = results_of(dict.fromkeys(seconds, (1.0, 1.0, 1.0)), seconds)
    starts = {"late": 4096, "never": None, "always": 1024}
    report = markdown(results)
    for name, start in starts.items():
        told = "nowhere" if start is None else f"from {start // 1024}k on"
        assert f"- `{name}` is cheaper than `dense`: cache nowhere, prefill {told}\n" in report
    plots(results, tmp_path)
    cache, prefill, decoding = figures["costs.png"].axes
    assert len(cache.lines) == len(seconds)
    assert not decoding.lines
    marked = [line.get_xydata().tolist()[0] for line in prefill.lines if line.get_marker() == "*"]
    assert marked == [[4096, 500], [1024, 2000]]
    texts = [text.get_text() for text in figures["costs.png"].legends[0].get_texts()]
    assert texts.count("cheaper than dense from here on") == 1


def test_parts_of_a_linear_layer_stand_alone_with_what_they_have_learned(model: Any) -> None:
    model.convert_attention("linear", window=16, num_sinks=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "effattn" in name:
                parameter.normal_()
    ids, before = torch.arange(3, 103)[None], copy.deepcopy(model.state_dict())
    given, modules, conversion = model(ids).logits, list(model.modules()), copy.deepcopy(model.config.effattn)
    window, linear = Variant("as given", None).ablations()
    assert (window.name, linear.name) == ("as given, window only", "as given, linear only")
    expected = small_model(TOKENIZER).convert_attention("sparse", window=16, num_sinks=2)
    with as_variant(model, window):
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    expected.convert_attention("linear", window=0, num_sinks=0)
    expected.load_state_dict({k: v for k, v in before.items() if not k.endswith("effattn.bias")})
    with as_variant(model, linear):
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(ids).logits, given)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert model.config.effattn == conversion


@pytest.mark.parametrize("lora", [None, {}, {"modules_to_save": ["lm_head"]}], ids=["maps", "lora", "lora and head"])
def test_an_adapter_is_a_variant_and_leaves_the_model_as_it_was(
    model: Any, tmp_path: Path, lora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids, dense = torch.arange(3, 103)[None], model(torch.arange(3, 103)[None]).logits
    tuned = small_model(TOKENIZER).convert_attention("linear", window=16)
    if lora is not None:
        tuned = get_peft_model(tuned, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **lora))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "effattn" in name or "lm_head.modules_to_save" in name:
                parameter.normal_()
    save_adapter(tuned, tmp_path)
    variant = Variant.parse(f"adapter:{tmp_path}")
    with as_variant(model, variant):
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, atol=1e-5, rtol=1e-5)
    for part in variant.ablations():
        with as_variant(model, part):
            assert (model(ids).logits - tuned(ids).logits).abs().max() > 1e-4
    assert not caplog.records
    assert torch.equal(model(ids).logits, dense)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in small_model(TOKENIZER).named_parameters()
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["passkeys"]}, "unknown task 'passkeys'; valid: .*passkey"),
        ({"lengths": [0]}, "must be at least 1; got 0"),
        ({"lengths": []}, "no lengths"),
        ({"variants": [DENSE, DENSE]}, "variants must differ"),
        ({"variants": [DENSE, Variant("x", None)]}, "must come first"),
        ({"variants": [Variant("x", None)]}, "not converted"),
        ({"variants": [Variant("x", "sparse", {"window": 0})]}, "window must be at least 1"),
        ({"lengths": [256, 8192]}, "length 8,192 is more than the 4,096 positions of the model, and passkey"),
        ({"lengths": [20]}, "shortest example has"),
        ({"lengths": [4096], "tasks": ["perplexity"], "text": "a few words"}, "the text has 3 words"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    model: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    text = changes.pop("text", PROSE)
    material = Material(lambda text: len(TOKENIZER(text).input_ids), text)
    with pytest.raises(ValueError, match=message):
        evaluate(model, TOKENIZER, settings(**changes), material, tmp_path)
    assert not (tmp_path / RESULTS).exists()


@pytest.mark.parametrize(
    ("given", "variants", "message"),
    [
        ("sparse", ["sparse:windows=3"], "unknown option 'windows'"),
        ("sparse", ["linear:feature_map=none"], "none"),
        ("sparse", ["sparse:window=8,layers=[9]"], "layers"),
        ("sparse", Variant("as given", None).ablations(), "as given, window only: only linear attention with a window"),
        ("linear", Variant.parse("linear:window=0").ablations(), "only linear attention with a window"),
    ],
)
def test_mistakes_in_variants_of_a_converted_model_are_told_before_anything_runs(
    model: Any, material: Material, tmp_path: Path, given: str, variants: list[Any], message: str
) -> None:
    model.convert_attention(given, window=16)
    parsed = [Variant.parse(each) if isinstance(each, str) else each for each in variants]
    asked = settings(lengths=[256], variants=[Variant("as given", None), *parsed])
    with pytest.raises(ValueError, match=message):
        evaluate(model, TOKENIZER, asked, material, tmp_path)
    assert not (tmp_path / RESULTS).exists()
    assert is_converted(model)


@pytest.mark.parametrize(("how", "number"), [("skip", 1), ("truncate_middle", 3), ("truncate_end", 3), ("slide", 6)])
@pytest.mark.parametrize("name", ["documents", "summaries"])
def test_long_documents_are_treated_as_asked(name: str, how: str, number: int, tmp_path: Path) -> None:
    rows = [{"document": PROSE[:size], "question": "Who?", "answers": ["he"]} for size in (900, 6000, 5000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    material, skipped = Sources(documents=str(path), too_long=how).gather(TOKENIZER)
    task = TASKS.get(name)(material)
    examples = task.examples(1024, 8)
    assert not skipped
    assert len(examples) >= number if how == "slide" else len(examples) == number
    for example in examples:
        total = len(TOKENIZER(example.prompt + example.answer_prefix).input_ids)
        assert total <= 1024 - task.max_new_tokens
        cut = sum(end - start for start, end in example.details.get("cuts", []))
        if cut:  # as much as there is room for is kept
            assert total >= 0.97 * (1024 - task.max_new_tokens)
            assert example.details["document_tokens"] > cut > 0
    left, told = "2 documents were left out", "2 documents were cut to 1,024 tokens"
    assert [left in "".join(task.notes), told in "".join(task.notes)] == [how == "skip", how.startswith("truncate")]


def test_a_document_that_is_too_long_can_be_an_error(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(PROSE[:6000])
    material, _ = Sources(documents=str(tmp_path / "long.txt"), too_long="error").gather(TOKENIZER)
    with pytest.raises(ValueError, match="question must be a text"):
        TASKS.get("documents")(material).examples(1024, 1)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"document": PROSE[:6000], "question": "Who?", "answers": ["he"]}))
    material, _ = Sources(documents=str(tmp_path / "rows.jsonl"), too_long="error").gather(TOKENIZER)
    with pytest.raises(ValueError, match="the text has .* tokens; there is room for"):
        TASKS.get("documents")(material).examples(1024, 1)
    with pytest.raises(ValueError, match="unknown way .* 'cut'; valid: .*truncate_middle"):
        Sources(too_long="cut")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("linear", {}),
        ("sparse:window=512,num_sinks=4", {"window": 512, "num_sinks": 4}),
        ("sparse:pattern=strided,stride=16,layers=[0,1]", {"pattern": "strided", "stride": 16, "layers": [0, 1]}),
        ("linear:feature_map=elu,window=0", {"feature_map": "elu", "window": 0}),
    ],
)
def test_variants_are_read_as_typed(text: str, options: dict[str, Any]) -> None:
    assert Variant.parse(text).options == options
    assert Variant.parse(text).name == text


@pytest.mark.parametrize("text", ["", "softmax", "dense:window=3", "sparse:window", "sparse:=3"])
def test_variants_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        Variant.parse(text)
