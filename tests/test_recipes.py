"""The recipes run: the demo on models and texts of several lengths, the benchmark on short ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matrix import MODELS, tiny_model, tokens
from rich.console import Console

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    import demo

    return demo


class Words:
    """A tokenizer of random tokens, one a character."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        return type("Encoded", (), {"input_ids": tokens(1, len(text))})

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.parametrize("wanted", [4096, 90, 64])
@pytest.mark.parametrize("model", MODELS)
def test_the_demo_measures_every_variant(model: str, wanted: int, demo: ModuleType, tmp_path: Path) -> None:
    net = tiny_model(model)
    results, length, _ = demo.run(net, Words(), "x" * 300, wanted, Console(quiet=True))
    assert length == min(wanted, 128 - demo.CONTINUED)
    assert list(results) == list(demo.VARIANTS)
    for result in results.values():
        assert len(result["contexts"]) == len(result["cache_bytes"]) == len(result["decode_seconds"])
        assert result["perplexity"] > 1
    report = net.attention_report(context_length=length)
    assert results["dense"]["cache_bytes_at_length"] == report.cache_bytes
    demo.table(results, length)
    demo.curves(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 0


def test_a_text_too_short_to_show_anything_is_refused(demo: ModuleType) -> None:
    with pytest.raises(SystemExit, match="at least 64"):
        demo.run(tiny_model("gpt2"), Words(), "x" * 20, 4096, Console(quiet=True))


@pytest.mark.slow
def test_the_benchmark_writes_numbers_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "results" / "tiny.json"
    arguments = ["--lengths", "64", "128", "--rounds", "1", "--out", str(out)]
    suites = ["prefill", "decode", "draft", "train"]
    command = [sys.executable, str(RECIPES / "benchmark.py"), "--suite", *suites, *arguments]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert set(result["seconds"]) == {"prefill", "decode", "draft", "train"}
    assert all(seconds > 0 for best in result["seconds"]["decode"].values() for seconds in best.values())
    assert "streaming 256+4" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 0
