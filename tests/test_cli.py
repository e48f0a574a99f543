"""The command line: what it writes, and what it says of input that cannot be right, before it loads a model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import PROSE, small_model, small_tokenizer
from typer.testing import CliRunner

from hf_effattn import Plan
from hf_effattn.cli import make_app
from hf_effattn.evaluation.material import Sources
from hf_effattn.evaluation.runner import RESULTS

TOKENIZER = small_tokenizer()


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def call(*arguments: str, loads: bool = True, converted: bool = False) -> Any:
        def loader(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
            assert loads, "the model was loaded before the arguments were looked at"
            net = small_model(TOKENIZER).to(dtype)
            return (net.convert_attention("linear", window=16) if converted else net), TOKENIZER

        options = ["--lengths", "256", "--number", "2", "--out", str(tmp_path)]
        return CliRunner().invoke(make_app(loader), ["evaluate", "tiny", *options, *arguments])

    return call


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in [name for name in sys.modules if name.startswith("hf_effattn.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"needs typer and rich: pip install hf_effattn\[eval\]"):
        importlib.import_module("hf_effattn.cli")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "passkeys"], "valid: "),
        (["--lengths", "²"], "a length is a number of tokens"),
        (["--lengths", "12x"], "a length is a number of tokens"),
        (["--number", "0"], "'--number'"),
        (["--batch-size", "0"], "'--batch-size'"),
        (["--device", "nodev"], "the device 'nodev' cannot be used here"),
        (["--dtype", "int8"], "valid: float32, bfloat16, float16"),
        (["--column", "question"], "ours=theirs"),
        (["--too-long", "cut"], "too long 'cut'; valid: "),
    ],
    ids=str,
)
def test_bad_arguments_are_told_before_anything_is_loaded(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments, loads=False)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_errors_are_not_read_as_markup(run: Run, tmp_path: Path) -> None:
    result = run("--text", str(tmp_path / "missing[eval].txt"))
    assert result.exit_code == 2
    assert "missing[eval].txt" in "".join(result.output.split())


def test_ablations_of_nothing_are_an_error(run: Run) -> None:
    result = run("--ablate", "--variant", "sparse:window=24")
    assert result.exit_code == 2
    assert "--ablate needs linear attention with a window" in " ".join(result.output.split())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_a_dataset_is_chosen(run: Run, tmp_path: Path, split: str) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("train", "test"):
        row = f'{{"document": "Here is {name}.", "question": "What is here?", "answers": ["{name}"]}}\n'
        (tmp_path / "rows" / f"{name}.jsonl").write_text(row)
    rows = str(tmp_path / "rows")
    material, _ = Sources(documents=rows, split=split).gather(TOKENIZER)
    assert [row["document"] for row in material.documents] == [f"Here is {split}."]
    asked = ["--tasks", "documents", "--number", "1", "--documents", rows]
    assert run(*asked, "--split", split).exit_code == 0
    result = run(*asked, "--split", "dev")
    assert "train" in result.output
    assert result.exit_code == 2


def test_the_command_writes_report_results_and_plots(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(PROSE)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"document": "The cat sat.", "question": "Who sat?", "answers": ["The cat"]}\nnonsense\n')
    arguments = ["--variant", "sparse:window=24", "--text", str(tmp_path / "prose.txt"), "--documents", str(rows)]
    result = run("--tasks", "perplexity,passkey,documents", "--number", "1", *arguments)
    assert result.exit_code == 0, result.output
    report = (tmp_path / "report.md").read_text()
    assert "rows skipped: 1" in report
    assert "rows.jsonl" in report
    assert {"results.jsonl", "scores.png", "costs.png", "positions.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_converted_model_is_compared_with_its_dense_self(run: Run, tmp_path: Path) -> None:
    result = run("--tasks", "perplexity", "--ablate", converted=True)
    assert result.exit_code == 0, result.output
    names = {json.loads(line)["variant"] for line in (tmp_path / RESULTS).read_text().splitlines()}
    assert names == {"as given", "as given, window only", "as given, linear only", "dense"}
    assert (tmp_path / "ablations.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1x"], "a length is a number of tokens such as 4096 or 4k; got '1x'"),
        (["--dtype", "int8"], "unknown dtype 'int8'; valid: float32"),
        (["--variant", "sparse:windows=3"], "windows"),
        (["--against", "other"], "nothing called 'other' to compare with; valid: dense"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--chat"], "no chat template"),
    ],
)
def test_the_command_says_what_is_wrong(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_plan_is_made_and_written(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text(PROSE * 8)
    arguments = ["--documents", str(texts), "--context-length", "2k", "--candidate", "sparse:window=30"]
    app = make_app(lambda name, dtype, device: (small_model(TOKENIZER).to(dtype), TOKENIZER))
    command = ["plan", "tiny", *arguments, "--dtype", "float32", "--out", str(tmp_path / "out"), "--number", "1"]
    result = CliRunner().invoke(app, [*command, "--budget", "60%"])
    assert result.exit_code == 0, result.output
    assert "sparse:window=30" in result.output
    plan, net = Plan.load(tmp_path / "out" / "plan.json"), small_model(TOKENIZER)
    assert plan.price <= 0.6 * net.attention_report(2048).cache_bytes
    assert net.convert_attention(plan).attention_report(2048).cache_bytes == plan.price
    assert (tmp_path / "out" / "plan.png").stat().st_size > 5000
    before = ["--earlier", str(tmp_path / "out" / "plan.json"), "--recall-weight", "0"]
    result = CliRunner().invoke(app, [*command, "--budget", "60%", *before])
    assert result.exit_code == 0, result.output
    again = Plan.load(tmp_path / "out" / "plan.json")
    assert again.recall_weight == 0
    assert again.measured["this plan"].divergence <= plan.measured["this plan"].divergence
    for wrong, message in (
        (["--budget", "much"], "a budget is"),
        (["--budget", "0.1%"], "cannot be kept"),
        (["--earlier", "missing.json"], "missing.json"),
    ):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
