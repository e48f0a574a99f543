"""What the command line says of input that cannot be right, before it loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import small_model, small_tokenizer
from typer.testing import CliRunner

from hf_effattn.cli import make_app
from hf_effattn.evaluation.material import Sources

TOKENIZER = small_tokenizer()


def invoke(*arguments: str, loads: bool = False) -> Any:
    def loader(*names: Any) -> tuple[Any, Any]:
        assert loads, "the model was loaded before the arguments were looked at"
        return small_model(TOKENIZER), TOKENIZER

    return CliRunner().invoke(make_app(loader), ["evaluate", "tiny", "--lengths", "256", *arguments])


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
def test_bad_arguments_are_told_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_errors_are_not_read_as_markup(tmp_path: Path) -> None:
    result = invoke("--text", str(tmp_path / "missing[eval].txt"), "--out", str(tmp_path), loads=True)
    assert result.exit_code == 2
    assert "missing[eval].txt" in "".join(result.output.split())


def test_ablations_of_nothing_are_an_error(tmp_path: Path) -> None:
    result = invoke("--ablate", "--variant", "sparse:window=24", "--out", str(tmp_path), loads=True)
    assert result.exit_code == 2
    assert "--ablate needs linear attention with a window" in " ".join(result.output.split())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_of_a_dataset_is_chosen(tmp_path: Path, split: str) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("train", "test"):
        row = f'{{"document": "Here is {name}.", "question": "What is here?", "answers": ["{name}"]}}\n'
        (tmp_path / "rows" / f"{name}.jsonl").write_text(row)
    rows = str(tmp_path / "rows")
    material, _ = Sources(documents=rows, split=split).gather(TOKENIZER)
    assert [row["document"] for row in material.documents] == [f"Here is {split}."]
    asked = ["--tasks", "documents", "--number", "1", "--documents", rows, "--out", str(tmp_path / "out")]
    assert invoke(*asked, "--split", split, loads=True).exit_code == 0
    result = invoke(*asked, "--split", "dev", loads=True)
    assert "train" in result.output
    assert result.exit_code == 2
