"""Our samples beside those of lm_eval's generators, which are RULER's: the same sentences, as many things."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_effattn.evaluation import TASKS, Material
from hf_effattn.evaluation.haystack import NOISE, sentences

pytest.importorskip("lm_eval.tasks.ruler.common_utils")
pytest.importorskip("scipy")
from hf_effattn.evaluation.lm_eval_tasks import utils

TEXT = (Path(__file__).parent / "data" / "prose.txt").read_text()
NUMBER = 4  # samples of each
ROWS = [
    {"document": text, "question": f"What is {i}?", "answers": [f"{i}", f"no. {i}"]}
    for i, text in enumerate(TEXT.strip().split("\n\n"))
]
FORMS = {
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "seven digits": r"[1-9]\d{6}",
    "words": r"[A-Za-z]+(-[A-Za-z]+)+",
}


def tokenizer(text: str) -> Any:
    """Words for tokens."""
    return SimpleNamespace(input_ids=text.split())


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with utils._seeded():
        yield


@pytest.fixture(scope="module")
def words() -> Iterator[None]:
    """lm_eval's generators that need wonderwords: imported with few of its words, since all pairs of them are millions,
    and without a download."""
    wonderwords, nltk = pytest.importorskip("wonderwords"), pytest.importorskip("nltk")

    class Few(wonderwords.RandomWord):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._categories = self._categories | {k: self._categories[k][:50] for k in ("nouns", "adjectives")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", Few)
        patch.setattr(nltk, "download", lambda *_: False)
        for name in ("niah_utils", "cwe_utils"):
            importlib.import_module(f"lm_eval.tasks.ruler.{name}")
        yield


def ours(name: str, length: int = 1024) -> list[tuple[str, str, list[str]]]:
    """Return prompts, answer prefixes and references."""
    material = Material(lambda text: len(text.split()), TEXT, documents=ROWS)
    examples = TASKS.get(name)(material).examples(length, NUMBER)
    return [(example.prompt, example.answer_prefix.strip(), list(example.references)) for example in examples]


def theirs(rows: Any) -> list[tuple[str, str, list[str]]]:
    return [(row["input"], row["gen_prefix"], row["outputs"]) for row in rows]


def without(text: str, names: dict[str, str]) -> str:
    """Return a text with names for what differs from sample to sample, and single spaces."""
    for old, new in names.items():
        text = text.replace(old, new)
    return " ".join(text.split())


def form(thing: str) -> str:
    return next(name for name, pattern in FORMS.items() if re.fullmatch(pattern, thing))


def needles(prompt: str, prefix: str, references: list[str]) -> tuple[Any, ...]:
    """What is the same in all samples of a task of needles."""
    first, *lines, question = prompt.split("\n")
    pattern = r"One of the special magic (\w+) for (\S+) is: (\S+)\."
    facts, rest = re.findall(pattern, "\n".join(lines)), re.sub(pattern, "", "\n".join(lines))
    asked = [key for key in dict.fromkeys(key for _, key, _ in facts) if key in question]
    assert sorted(references) == sorted(value for _, key, value in facts if key in asked)
    values = Counter(key for _, key, _ in facts)
    counts = (len(facts), len(values)) if rest.strip() else "only needles"
    kinds = {(kind, form(key), form(value)) for kind, key, value in facts}
    names = dict.fromkeys(asked, "KEY")
    return counts, set(values.values()), len(asked), kinds, first, without(question, names), without(prefix, names)


@pytest.mark.parametrize(
    ("name", "ruler"),
    [
        ("niah_single", "niah_single_2"),
        ("niah_multikey", "niah_multikey_1"),
        ("niah_multikey_3", "niah_multikey_3"),
        ("niah_multivalue", "niah_multivalue"),
        ("niah_multiquery", "niah_multiquery"),
    ],
)
def test_needles(name: str, ruler: str, words: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    def haystack(type_haystack: str) -> Any:
        return TEXT.split() if type_haystack == "essay" else prepare_niah.get_haystack(type_haystack)

    def generate(*args: Any, **options: Any) -> Any:
        return prepare_niah.generate_samples(*args, **options | {"num_samples": NUMBER})

    monkeypatch.setattr(prepare_niah, "cached_sent_tokenize", sentences)  # nltk's needs data
    monkeypatch.setattr(niah_utils, "get_haystack", haystack)  # the essays are on the Hub
    monkeypatch.setattr(niah_utils, "generate_samples", generate)
    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda name: tokenizer)
    rows = getattr(niah_utils, ruler)(max_seq_lengths=[1024])["test"]
    expected, *others = [needles(*sample) for sample in theirs(rows)]
    assert all(found == expected for found in [*others, *(needles(*sample) for sample in ours(name))])


def chain(prompt: str, prefix: str, names: list[str]) -> tuple[Any, ...]:
    """What is the same in all questions about a chain of variables."""
    facts = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt)
    (_, value), *rest = facts
    assert [name for name, _ in facts] == names
    assert [before for _, before in rest] == names[:-1]
    instruction, question = prompt.split("\n\n")[0], "Question:" + prompt.split("Question:")[1]
    text = re.sub(r"VAR \w+ = (VAR )?\w+", " ", prompt.removeprefix(instruction).removesuffix(question))
    assert set(re.findall(r"\w[^.]+\.", text)) == set(NOISE)
    said = [without(part, {value: "VALUE"}) for part in (instruction, question, prefix)]
    return len(facts), len(value), value.isdigit(), {len(name) for name in names}, *said


def test_variable_tracking() -> None:
    found = []
    for prompt, prefix, names in ours("variable_tracking") + theirs(
        utils.vt(tokenizer=tokenizer, max_seq_lengths=[1024], num_samples=NUMBER)["test"]
    ):
        prompt, prefix = (text.replace("assgined", "assigned") for text in (prompt, prefix))  # a slip of RULER's
        begin = prompt.rindex("Memorize")
        solved, answer = prompt[:begin].split(" Answer:")
        shown, answers = ("Answer:" + answer).split("are: ")
        found.append((chain(solved, f"{shown}are:", answers.split()), chain(prompt[begin:].rstrip(), prefix, names)))
    assert len(found) == 2 * NUMBER
    assert all(each == found[0] for each in found)
    assert [each[0] for each in found[0]] == [5, 5]


def listed(text: str) -> list[str]:
    return re.findall(r"\d+\. (.+?)(?= \d+\. |$)", text, flags=re.MULTILINE)


def common_words(shown: str, prompt: str, prefix: str, references: list[str]) -> tuple[Any, ...]:
    """What is the same in all samples about common words."""
    times, solved = Counter(listed(prompt.split("\n")[1])), Counter(listed(shown.split("\n")[1]))
    assert {word for word, _ in times.most_common(10)} == set(references)
    answers = listed(shown.split("\n")[-1])
    assert {word for word, _ in solved.most_common(10)} == set(answers)
    said = [without(re.sub(r"\d+\. .*", "", text), {}) for text in (shown, prompt, prefix)]
    return sorted(set(times.values())), sorted(solved.values()), len(references), len(answers), said


@pytest.mark.parametrize("length", [1024, 4096])
def test_common_words(length: int, words: None) -> None:
    found = []
    for prompt, *rest in ours("common_words", length):
        shown, question = re.split(r"\n\n(?=Below)", prompt)
        found.append(common_words(shown, question, *rest))
    rows = utils.cwe(tokenizer=tokenizer, max_seq_lengths=[length], num_samples=NUMBER)["test"]
    expected = [common_words(row["input_example"], *sample) for row, sample in zip(rows, theirs(rows), strict=True)]
    assert len(found) == len(expected) == NUMBER
    assert all(each == found[0] for each in found + expected)


def frequent_words(prompt: str, prefix: str, references: list[str]) -> tuple[str, ...]:
    """What is the same in all samples about frequent words: also that the k-th comes in proportion to 1 / k²."""
    match = re.fullmatch(r"(.* coded words\.) (.*)\n(.*)", prompt)
    assert match is not None
    ranked = Counter(match[2].split()).most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == references
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    most = ranked[0][1]
    assert all(most // k**2 <= times <= (most + 1) // k**2 for k, (_, times) in enumerate(ranked, start=1))
    return match[1], match[3], prefix


def test_frequent_words() -> None:
    rows = utils.fwe(tokenizer=tokenizer, max_seq_lengths=[1024], num_samples=NUMBER)["test"]
    found = {frequent_words(*sample) for sample in ours("frequent_words") + theirs(rows)}
    assert len(found) == 1


def test_questions_about_documents() -> None:
    qa_utils = pytest.importorskip("lm_eval.tasks.ruler.qa_utils")
    documents = [row["document"] for row in ROWS]
    questions = [{"query": r["question"], "outputs": r["answers"], "context": [i]} for i, r in enumerate(ROWS)]
    rows = qa_utils.generate_samples(tokenizer, documents, questions, 1024, num_samples=NUMBER)
    found = set()
    for prompt, prefix, references in ours("distractor_qa") + theirs(rows):
        begin, *shown = re.split(r"\n\nDocument \d+:\n", prompt)
        question = re.findall(r"Question: What is (\d+)\?$", prompt)[0]
        *_, order, _ = shown[-1].split("\n\n")
        row = ROWS[int(question)]
        assert references == row["answers"]
        assert prompt.count(f":\n{row['document']}\n\n") == 1
        assert re.findall(r"\n\nDocument (\d+):\n", prompt) == [str(i + 1) for i in range(len(shown))]
        found.add((begin, order, prefix))
    assert len(found) == 1
