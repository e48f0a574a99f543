"""What the training recipes read: documents, cut into windows, and configs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"


@pytest.fixture
def data(recipes: Any) -> ModuleType:
    return recipes("data")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Thirty documents, the words of each its own number."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{chr(65 + number)} " * (10 + number))
    return folder


def rows_file(texts: Path) -> Path:
    path = texts.parent / "rows.jsonl"
    rows = [{"id": file.name, "text": file.read_text()} for file in sorted(texts.iterdir())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Letters:
    """A tokenizer whose tokens are characters; texts begin with a token of their own."""

    bos_token_id = 1

    def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        start = [1] if add_special_tokens else []
        ids = [[*start, *map(ord, x)] for x in text] if isinstance(text, list) else [*start, *map(ord, text)]
        return type("Encoded", (), {"input_ids": ids})


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_stay_within_one_document_and_off_those_held_out(data: Any, texts: Path, streaming: bool) -> None:
    source = str(rows_file(texts) if streaming else texts)
    training, held_out = data.split(data.sources_of(str(texts))["texts"])
    assert {name for name, _ in held_out} == {f"{n}.txt" for n in range(30) if data.is_held_out(f"{n}.txt")}
    found = data.open_data(source, streaming, Letters(), 0)
    windows = [tuple(row["input_ids"]) for row in found.dataset(16)]
    seen = set()
    for window in windows:
        assert len(window) == 16
        assert window[0] == 1
        letters = set(window[1:]) - {ord(" ")}
        assert len(letters) == 1
        seen |= letters
    assert seen == {ord(text[0]) for _, text in training if len(text) >= 15}
    kept = set(found.held_out(16, 100).flatten().tolist()) - {1, ord(" ")}
    assert kept == {ord(text[0]) for _, text in held_out if len(text) >= 15}


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_go_on_from_any_step(data: Any, texts: Path, streaming: bool) -> None:
    source = str(rows_file(texts) if streaming else texts)

    def batches(start: int, number: int, seed: int = 0) -> list[torch.Tensor]:
        found = data.open_data(source, streaming, Letters(), seed).batches(16, 3, start)
        return [next(found) for _ in range(number)]

    whole = batches(0, 40)  # more than an epoch
    size = len(list(data.open_data(source, streaming, Letters(), 0).dataset(16)))
    assert size < 120
    for start in (1, 20, 37):
        assert torch.equal(torch.stack(whole[start:]), torch.stack(batches(start, 40 - start)))
    rows = torch.cat(whole)[:size].tolist()
    expected = [row["input_ids"] for row in data.open_data(source, streaming, Letters(), 0).dataset(16)]
    assert sorted(rows) == sorted(expected)  # each once in an epoch
    assert rows != expected
    assert not torch.equal(torch.stack(whole), torch.stack(batches(0, 40, seed=1)))


def test_a_single_document_holds_out_its_end(data: Any) -> None:
    text = "".join(f"line {n}\n" for n in range(100))
    ((_, training),), ((_, held_out),) = data.split([("a", text)])
    assert training + held_out == text
    assert 0.85 < len(training) / len(text) < 0.95


def test_both_sides_have_documents_and_no_text_is_on_both(data: Any, tmp_path: Path) -> None:
    for names in (["a", "b"], ["a", "b", "c"]):
        assert all(data.split([(name, name) for name in names]))
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": f"text {n % 5}"}) + "\n" for n in range(50)))
    assert len(data.sources_of(str(path))["twice.jsonl"]) == 5
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps({"id": f"other {n}", "text": f"text {n}"}) + "\n" for n in range(9)))
    found = data.sources_of([str(path), str(again)])
    assert [text for _, text in found["again.jsonl"]] == [f"text {n}" for n in range(5, 9)]


def test_what_python_has_is_split_by_name(data: Any) -> None:
    training, held_out = data.split(data.sources_of(None)["Python"])
    assert not {name for name, _ in training} & {name for name, _ in held_out}
    assert 0.05 < len(held_out) / len(training) < 0.25
    assert {name.partition("/")[0] for name, _ in held_out} == {"topics", "stdlib"}


def test_pieces_of_novels_come_along_each_of_another_author(data: Any, recipes: Any) -> None:
    novels = data.sources_of(None)["novels"]
    with gzip.open(recipes("texts").NOVELS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert novels == [(row["id"], row["text"]) for row in rows]
    assert len({row["author"] for row in rows}) == len(rows) == 40
    assert all(len(text) > 20_000 for _, text in novels)
    assert len(data.split(novels)[1]) == 4


@pytest.fixture
def two(texts: Path) -> list[str]:
    """Two sources: a folder of lower-case letters, and the upper-case ones of `texts`, of which there are more."""
    folder = texts.parent / "few"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{chr(97 + number)} " * 20)
    return [str(folder), str(texts)]


def test_several_sources_are_read_in_turn(data: Any, two: list[str]) -> None:
    def batches(start: int, number: int) -> list[torch.Tensor]:
        found = data.open_data(two, False, Letters(), 0).batches(16, 2, start)
        return [next(found) for _ in range(number)]

    whole = batches(0, 30)
    for number, batch in enumerate(whole):
        letters = {chr(token) for token in batch.flatten().tolist()} - {chr(1), " "}
        assert all(letter.islower() == (number % 2 == 0) for letter in letters)
    for start in (1, 2, 13):
        assert torch.equal(torch.stack(whole[start:]), torch.stack(batches(start, 30 - start)))
    single = data.open_data(two[1], False, Letters(), 0).batches(16, 2)
    assert torch.equal(torch.stack(whole[1::2]), torch.stack([next(single) for _ in range(15)]))


def test_rows_and_held_out_windows_are_of_all_sources_alike(data: Any, two: list[str]) -> None:
    found = data.open_data(two, False, Letters(), 0)
    few, many = (source.dataset(16) for source in found.sources.values())
    rows = found.dataset(16)
    assert len(few) < len(many)
    assert rows[1::2] == many
    assert rows[::2] == [few[i % len(few)] for i in range(len(many))]
    lower, upper = (source.held_out(16, 2) for source in found.sources.values())
    assert torch.equal(found.held_out(16, 4), torch.cat((lower, upper)))
    assert len(found.held_out(16, 1)) == 1


def test_sources_have_names(data: Any, texts: Path, two: list[str]) -> None:
    assert list(data.sources_of(None)) == ["Python", "novels"]
    assert list(data.sources_of(str(texts))) == ["texts"]
    assert list(data.sources_of(two)) == ["few", "texts"]
    other = texts.parent / "other" / "few"
    other.mkdir(parents=True)
    (other / "a.txt").write_text("x y z")
    assert list(data.sources_of([two[0], str(other)])) == [two[0], str(other)]
    with pytest.raises(ValueError, match="got an empty list"):
        data.sources_of([])


def test_too_little_text_and_other_streams_are_refused(data: Any, texts: Path) -> None:
    with pytest.raises(ValueError, match="none of the .* documents of texts to train on has 1000 tokens"):
        next(data.open_data(str(texts), False, Letters(), 0).batches(1000, 1))
    with pytest.raises(ValueError, match="has 1000 tokens"):
        next(data.open_data(str(rows_file(texts)), True, Letters(), 0).batches(1000, 1))
    with pytest.raises(ValueError, match="streaming reads"):
        data.open_data(str(texts), True, Letters(), 0)
    with pytest.raises(ValueError, match="streaming reads one"):
        data.open_data([str(rows_file(texts))], True, Letters(), 0)


def test_configs_are_read_and_overridden(recipes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = recipes("settings")
    path = tmp_path / "a.yaml"
    path.write_text("transfer_lr: 1e-3\nlengths: [64]\noptions: {window: 8}\n")
    read = settings.read_config
    config = read(settings.DistillConfig, ["--config", str(path), "options.num_sinks=2", "seed=3", "documents=null"])
    assert config.transfer_lr == 1e-3
    assert config.options == {"window": 8, "num_sinks": 2}
    assert (config.lengths, config.seed, config.documents) == ([64], 3, None)
    assert read(settings.DistillConfig, ["documents=[a, b/c]"]).documents == ["a", "b/c"]
    for wrong, message in (
        ("windws=[1]", "unknown keys windws; valid: model, options"),
        ("seed=many", "seed is int"),
        ("seed=1.5", "seed is int"),
        ("bf16=1", "bf16 is bool"),
        ("transfer_lr=fast", "transfer_lr is float"),
        ("--seed=3", "arguments are"),
    ):
        with pytest.raises(ValueError, match=message):
            read(settings.DistillConfig, [wrong])
    with pytest.raises(SystemExit):
        read(settings.FinetuneConfig, ["--help"])
    assert "lora_rank" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_valid(path: Path, recipes: Any) -> None:
    settings = recipes("settings")
    settings.read_config(settings.DistillConfig, ["--config", str(path)])
