"""lm_eval's harness: the model type, batches against single texts, the command line, and RULER at short lengths."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import Case, shake, tiny_config
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.feature_maps import FEATURE_MAPS, map_options
from hf_effattn.patterns import PATTERNS, sinks, sliding_window
from hf_effattn.patterns.base import pattern_options

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval._cli.utils import handle_cli_value_string
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from hf_effattn.evaluation import harness
from hf_effattn.evaluation.harness import NAME, TASKS, ConvertedLM
from hf_effattn.evaluation.lm_eval_tasks import utils

WORDS = ["the", "grass", "is", "green", "sky", "blue", "and", "yellow", "sun", "a"]
VOCABULARY = ["<unk>", "<end>", *WORDS]
OUR_TASKS = ["cwe", "fwe", "niah_multikey_2", "niah_multikey_3", "niah_single_1", "vt"]
CASES = [
    Case("dense", "dense", {}),
    Case("linear", "linear", {"window": 4, "num_sinks": 2}),
    Case("elu", "linear", {"window": 0, "feature_map": "elu"}),
    Case("cosformer", "linear", {"window": 3, "feature_map": "cosformer"}),
    Case("retnet", "linear", {"window": 0, "recurrence": "retnet"}),
    Case("gated_delta", "linear", {"window": 4, "recurrence": "gated_delta"}),
    Case("streaming", "sparse", {"window": 4, "num_sinks": 2}),
    Case("rolling", "sparse", {"window": 4, "num_sinks": 2, "position_mode": "rolling"}),
    Case("strided", "sparse", {"pattern": "strided", "stride": 3}),
    Case("bigbird", "sparse", {"pattern": "bigbird", "block_size": 2, "num_random": 1}),
    Case("quest", "sparse", {"selector": "quest", "block_size": 8, "num_blocks": 2}),
    Case(
        "vertical_slash",
        "sparse",
        {"selector": "vertical_slash", "block_size": 8, "num_columns": 2, "num_diagonals": 2},
    ),
    Case("snapkv", "sparse", {"eviction": "snapkv", "capacity": 6}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "eos_token_id": 1,
        "bos_token_id": 1,
        "pad_token_id": 1,
        "num_hidden_layers": 4,
    }
    return AutoModelForCausalLM.from_config(tiny_config("llama-gqa", **{**sizes, **changes})).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")


def text(length: int, seed: int) -> str:
    drawn = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in drawn)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]  # type: ignore[arg-type]


def harness_model(**arguments: Any) -> ConvertedLM:
    return ConvertedLM(llama(), tokenizer=tokenizer(), **arguments)


def num_converted(model: Any) -> int:
    return sum(hasattr(module, "effattn") for module in model.modules())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of its own: answers that never come, so the score is 0, and a perplexity."""
    docs = "\n".join(json.dumps({"text": text(length, seed=length)}) for length in (9, 5, 12))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "docs.jsonl").write_text(docs)
    (tmp_path / "tasks" / "utils.py").write_text(
        "import datasets, json, pathlib\n\n\ndef docs(**metadata):\n"
        "    lines = (pathlib.Path(__file__).parent / 'docs.jsonl').read_text().splitlines()\n"
        "    return {'test': datasets.Dataset.from_list([json.loads(line) for line in lines])}\n"
    )
    (tmp_path / "tasks" / "own.yaml").write_text(
        "task: own_perplexity\ncustom_dataset: !function utils.docs\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"
    )
    return tmp_path / "tasks"


@every_case
def test_loglikelihoods_do_not_depend_on_the_batch(case: Case) -> None:
    found = []
    given = [(text(context, seed=context), " " + text(3, seed=i)) for i, context in enumerate((21, 3, 30, 11, 8))]
    for batch_size in (1, 3):
        model = harness_model(mechanism=case.mechanism, batch_size=batch_size, **case.options)
        shake(model.model)
        found.append(model.loglikelihood(requests("loglikelihood", given), disable_tqdm=True))
        found[-1] += [(value, True) for value in model.loglikelihood_rolling(requests("rolling", [(given[2][0],)]))]
    for (one, greedy_one), (many, greedy_many) in zip(*found, strict=True):
        assert many == pytest.approx(one, abs=1e-4)
        assert greedy_one == greedy_many


@every_case
def test_answers_do_not_depend_on_the_batch(case: Case) -> None:
    found = []
    how = {"until": ["<end>"], "max_gen_toks": 9, "do_sample": False}
    given = [(text(length, seed=length), how) for length in (21, 3, 30, 11, 8)]
    for batch_size in (1, 3):
        model = harness_model(mechanism=case.mechanism, batch_size=batch_size, **case.options)
        shake(model.model)
        found.append(model.generate_until(requests("generate_until", given), disable_tqdm=True))
    assert found[0] == found[1]
    assert any(found[0])


def test_a_conversion_changes_the_results() -> None:
    given = requests("loglikelihood", [(text(30, seed=1), " blue")])
    dense, converted = harness_model(mechanism="dense"), harness_model(mechanism="sparse", window=3, num_sinks=0)
    assert num_converted(converted.model) == converted.config.num_hidden_layers
    assert num_converted(dense.model) == 0
    assert dense.loglikelihood(given) != converted.loglikelihood(given)


def test_a_folder_is_loaded_and_converted(folder: Path) -> None:
    model = get_model(NAME).create_from_arg_string(
        f"pretrained={folder},mechanism=linear,window=8,feature_map=t2r,feature_dim=6,dtype=float32",
        {"batch_size": 2, "device": "cpu"},
    )
    assert isinstance(model, ConvertedLM)
    spec = model.get_model_info()["effattn"]["layers"][0]
    assert (spec["mechanism"], spec["window"], spec["map_options"]) == ("linear", 8, {"feature_dim": 6})
    assert json.dumps(model.get_model_info()["effattn"])


@pytest.mark.parametrize("written", ["keep_softmax=0+-1", "keep_softmax=-4+3"])
def test_lists_in_a_string(folder: Path, written: str) -> None:
    model = ConvertedLM.create_from_arg_string(f"pretrained={folder},mechanism=sparse,window=8,{written}")
    layers = model.model.config.effattn["layers"]
    assert [bool(spec) for spec in layers] == [False, *[True] * (len(layers) - 2), False]


@pytest.mark.parametrize("value", [-1.0, [-1], "[-1]"])
def test_one_layer(value: Any) -> None:
    if isinstance(value, str):
        value = handle_cli_value_string(value)
    model = harness_model(mechanism="sparse", window=8, layers=value)
    assert [bool(spec) for spec in model.model.config.effattn["layers"]] == [False, False, False, True]


def test_models_are_taken_as_they_are() -> None:
    converted = llama().convert_attention("sparse", window=5)
    assert num_converted(ConvertedLM(converted, tokenizer=tokenizer()).model) == 4
    assert num_converted(ConvertedLM(converted, tokenizer=tokenizer(), mechanism="dense").model) == 0
    pattern = SparseConfig(pattern=sliding_window(5) | sinks(1))
    assert num_converted(ConvertedLM(converted, tokenizer=tokenizer(), mechanism=pattern).model) == 4


def test_a_converted_folder_is_loaded_as_it_is(tmp_path: Path) -> None:
    llama().convert_attention("linear", window=5).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert num_converted(ConvertedLM(str(tmp_path)).model) == 4
    assert num_converted(ConvertedLM(str(tmp_path), mechanism="dense").model) == 0


def test_adapters_come_after_the_conversion(folder: Path, tmp_path: Path) -> None:
    import peft

    base = llama().convert_attention("linear", window=5)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["effattn"]))
    shake(adapted)
    adapted.save_pretrained(tmp_path)
    given = requests("loglikelihood", [(text(30, seed=1), " blue")])
    expected = ConvertedLM(adapted.merge_and_unload(), tokenizer=tokenizer()).loglikelihood(given)
    found = ConvertedLM(str(folder), mechanism="linear", window=5, peft=str(tmp_path)).loglikelihood(given)
    assert found[0][0] == pytest.approx(expected[0][0], abs=1e-4)
    assert found[0][0] != pytest.approx(
        harness_model(mechanism="linear", window=5).loglikelihood(given)[0][0], abs=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanism": "spares"}, "unknown mechanism 'spares'; valid: dense, linear, sparse"),
        ({"mechanism": "sparse", "windw": 4}, "unknown option 'windw' of sparse attention; valid: backend, pattern"),
        ({"mechanism": "linear", "window": 4, "stride": 4}, "unknown option 'stride' of linear attention"),
        ({"mechanism": "sparse", "window": 4, "backend": "quick"}, "unknown backend 'quick' of sparse attention"),
        ({"mechanism": "linear", "window": -4.0}, "window must be"),
        ({"mechanism": "dense", "window": 4}, "unknown option 'window' of dense attention; valid: none"),
        ({"window": 4}, "unknown option 'window' of a model without mechanism="),
        ({"keep_softmax": 4}, "unknown option 'keep_softmax' of a model without mechanism="),
    ],
    ids=str,
)
def test_wrong_options_are_named_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ConvertedLM("no/such-model", **arguments)


@pytest.mark.parametrize("layers", [[9], "0+9", 9])
def test_wrong_layers_are_named(layers: Any) -> None:
    with pytest.raises(ValueError, match="layers names layer 9; valid: 0 to 3"):
        harness_model(mechanism="sparse", window=4, layers=layers)


def test_no_option_is_called_like_an_argument_of_lm_eval() -> None:
    options = {*LinearConfig.options(), *SparseConfig.options()} - {"backend"}  # told apart by their values
    options |= {option for name in FEATURE_MAPS for option in map_options(name)}
    options |= {option for name in PATTERNS for option in pattern_options(name)}
    assert not options & harness._names_of_hflm()


def test_backends_are_told_apart() -> None:
    model = harness_model(mechanism="sparse", window=4, backend="masked")
    assert model.backend == "causal"
    assert model.model.config.effattn["layers"][0]["backend"] == "masked"
    assert harness_model(mechanism="sparse", window=4, backend="default").backend == "causal"


def test_evictions_and_loglikelihoods(caplog: pytest.LogCaptureFixture) -> None:
    given = requests("loglikelihood", [(text(30, seed=1), " blue")])
    harness.warning_once.cache_clear()
    found = harness_model(mechanism="sparse", eviction="knorm", capacity=4).loglikelihood(given)
    assert "those of dense attention" in caplog.text
    assert found[0][0] == pytest.approx(harness_model(mechanism="dense").loglikelihood(given)[0][0], abs=1e-4)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api.registry", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    with pytest.raises(ImportError, match=r"pip install hf_effattn\[lm-eval\]"):
        importlib.import_module(harness.__name__)


def test_simple_evaluate(task: Path) -> None:
    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = {}
    for mechanism, options in (("dense", {}), ("linear", {"window": 3}), ("sparse", {"window": 64})):
        model = harness_model(mechanism=mechanism, batch_size=2, **options)
        results = lm_eval.simple_evaluate(model, tasks=["own_perplexity"], task_manager=manager, bootstrap_iters=0)
        found[mechanism] = results["results"]["own_perplexity"]["word_perplexity,none"]
        assert (results["config"]["effattn"] is None) == (mechanism == "dense")
    assert found["sparse"] == pytest.approx(found["dense"], rel=1e-5)  # the window holds all of it
    assert found["linear"] != pytest.approx(found["dense"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["run", "flat", "config"])
def test_command_line(folder: Path, task: Path, tmp_path: Path, style: str) -> None:
    model = f"pretrained={folder},mechanism=sparse,pattern=global_tokens,positions=[0,2],keep_softmax=[0,-1]"
    arguments = ["--model", NAME, "--model_args", model, "--tasks", "own_perplexity", "--batch_size", "2"]
    arguments += ["--output_path", str(tmp_path / "out")]
    if style == "config":
        (tmp_path / "config.yaml").write_text(f"include_path: {task}\n")
        arguments += ["--config", str(tmp_path / "config.yaml")]
    else:
        arguments += ["--include_path", str(task)]
    before = list(sys.argv)
    harness.main(["run", *arguments] if style == "run" else arguments)
    assert sys.argv == before
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["results"]["own_perplexity"]["word_perplexity,none"] > 1
    assert [bool(spec) for spec in results["config"]["effattn"]["layers"]] == [False, True, True, False]


@pytest.mark.slow
def test_as_a_module(task: Path) -> None:
    command = [sys.executable, "-m", harness.__name__, "--model", NAME, "--include_path", str(task), "--tasks"]
    command += ["own_perplexity,effattn_ruler,hellaswag", "--model_args", "pretrained=x,mechanism=lin"]
    done = subprocess.run(command, capture_output=True, text=True)
    # Tasks are looked up first, then the model type, which is there only once.
    assert done.stderr.strip().endswith("ValueError: unknown mechanism 'lin'; valid: dense, linear, sparse")


def test_our_tasks_have_metrics_for_short_lengths() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert manager.all_subtasks == [f"effattn_{name}" for name in OUR_TASKS]
    assert manager.all_tags == ["effattn_ruler"]
    for name in manager.all_subtasks:
        config = manager.task_index[name].cfg
        assert config is not None
        assert [metric["metric"] for metric in config["metric_list"]] == [str(length) for length in utils.LENGTHS]


def pieces(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that makes a token of every `length` characters: enough to measure samples with."""
    cut = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    cut.pre_tokenizer = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{length}}}"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=cut, unk_token="<unk>")


@pytest.mark.parametrize("name", ["vt", "fwe"])
def test_samples_depend_on_nothing_that_ran_before(name: str) -> None:
    make = getattr(utils, name)
    found = make(tokenizer=pieces(4), max_seq_lengths=[1024, 2048], num_samples=3)["test"]
    assert found["max_length"] == [1024, 2048] * 3
    torch.manual_seed(5)
    alone = make(tokenizer=pieces(4), max_seq_lengths=2048, num_samples=2)["test"]
    assert alone["input"] == found["input"][1:5:2]
    assert len(set(found["input"])) == 6
    assert all(len(pieces(4)(row["input"]).input_ids) <= row["max_length"] for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cwe", "niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_samples_with_words_of_wonderwords(name: str) -> None:
    pytest.importorskip("wonderwords")
    test_samples_depend_on_nothing_that_ran_before(name)


def test_lengths_without_a_metric_are_refused() -> None:
    with pytest.raises(ValueError, match="max_seq_lengths names 1000; valid: 1024, 2048"):
        utils.fwe(tokenizer=pieces(4), max_seq_lengths=[1000])


def test_samples_too_long_for_the_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="the shortest sample has .* tokens of this tokenizer; there is room for"):
        utils.vt(tokenizer=pieces(1), max_seq_lengths=[1024], num_samples=1)


def test_a_right_answer_scores() -> None:
    doc = {"max_length": 1024, "outputs": ["Ab", "cd"]}
    assert utils.score(doc, ["it is ab, CD"]) == {"1024": 1.0}
    assert utils.score(doc, ["ab"]) == {"1024": 0.5}
