"""Generated tasks: how long examples are, that the same ones come back, what is in them, and how answers are scored."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import hf_effattn.evaluation.tasks  # noqa: F401  (registers them)
from hf_effattn.evaluation.base import TASKS, Example, GenerationTask, Material
from hf_effattn.evaluation.haystack import (
    LONGEST,
    NOISE,
    Draws,
    fill,
    hide,
    plain_words,
    sentences,
    stretch,
    words,
)
from hf_effattn.evaluation.stories import where_is_a_person, where_is_a_thing, where_was_a_thing
from hf_effattn.evaluation.texts import Fitted

TEXT = (Path(__file__).parent / "data" / "prose.txt").read_text()
PARAGRAPHS = [paragraph for paragraph in TEXT.split("\n\n") if 20 <= len(paragraph.split()) <= 60]
DOCUMENTS = [
    {"document": paragraph, "question": f"What is number {i}?", "answers": [f"number{i} zebra", f"quokka {i}x{i}"]}
    for i, paragraph in enumerate(PARAGRAPHS)
]
GENERATED = [name for name in TASKS if issubclass(TASKS.get(name), GenerationTask)]
OF_ROWS = ("distractor_qa", "documents", "summaries")
WHOLE_ROWS = ("documents", "summaries")
BABILONG = ("babilong", "babilong_qa2", "babilong_qa3")
OF_TEXT = (*BABILONG, "niah_multikey", "niah_multiquery", "niah_multivalue", "niah_single")
every_task = pytest.mark.parametrize("name", GENERATED)
RULER = {  # answer tokens in RULER's synthetic tasks
    "niah_single": 128,
    "niah_multikey": 128,
    "niah_multikey_3": 128,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "variable_tracking": 30,
    "common_words": 120,
    "frequent_words": 50,
    "distractor_qa": 32,
}


def count_words(text: str) -> int:
    return len(text.split())


def make(name: str, **changes: Any) -> GenerationTask:
    material = {"count_tokens": count_words, "text": TEXT, "documents": DOCUMENTS} | changes
    task = TASKS.get(name)(Material(**material))
    assert isinstance(task, GenerationTask)
    return task


def read(example: Example) -> str:
    return example.prompt + example.answer_prefix


def middle(example: Example) -> str:
    """Return the haystack of a prompt of one instruction line, a haystack and a question line."""
    return example.prompt.split("\n", 1)[1].rsplit("\n", 1)[0]


def perfect(name: str, example: Example) -> str:
    everything = name in RULER and name != "distractor_qa"
    return " ".join(example.references) if everything else example.references[0]


def test_every_task_is_there() -> None:
    assert set(RULER) | {"passkey", "json_key_value", *BABILONG, "documents", "summaries"} <= set(GENERATED)
    assert {name: TASKS.get(name).max_new_tokens for name in RULER} == RULER  # type: ignore[attr-defined]


@every_task
def test_the_same_seed_gives_the_same_examples(name: str) -> None:
    few, many = make(name).examples(1024, 2), make(name).examples(1024, 5)
    assert many[:2] == few
    assert len({example.prompt for example in many}) == 5
    assert len({example.references for example in many}) == 5 or name in BABILONG
    assert make(name, seed=7).examples(1024, 2) != few


@every_task
@pytest.mark.parametrize("length", [700, 1024, 4096])
def test_examples_fill_the_room_and_no_more(name: str, length: int) -> None:
    task = make(name)
    room = length - task.max_new_tokens
    for example in task.examples(length, 3):
        assert count_words(read(example)) <= room
        if name not in WHOLE_ROWS:
            piece = 70 if name == "distractor_qa" else 40
            assert count_words(read(example)) > room - piece


@every_task
def test_a_length_too_short_is_an_error(name: str) -> None:
    task = make(name)
    with pytest.raises(ValueError, match=r"the shortest example has \d+ tokens; there is room for 5"):
        task.examples(task.max_new_tokens + 5, 1)


@every_task
def test_examples_are_json(name: str) -> None:
    for example in make(name).examples(1024, 2):
        assert json.loads(json.dumps(example.details)) == example.details
        assert example.references
        assert not example.answer_prefix.endswith(" "), "tokenizers join a space to the word behind it"


@every_task
def test_the_right_answer_scores_one_and_a_wrong_one_zero(name: str) -> None:
    task = make(name)
    for example in task.examples(1024, 3):
        assert task.score(example, f"{perfect(name, example)}") == 1.0
        assert task.score(example, "I do not know") == 0.0
        assert task.score(example, "") == 0.0
        assert 0.0 < task.score(example, f"{perfect(name, example)}. There is more of it.") <= 1.0


@every_task
def test_the_answer_is_in_the_prompt(name: str) -> None:
    if name not in WHOLE_ROWS + ("distractor_qa",):
        for example in make(name).examples(1024, 3):
            assert all(reference in example.prompt for reference in example.references)


def test_depths_are_spread_and_true() -> None:
    for name in ("passkey", "niah_single", "json_key_value", "niah_multikey_3", "niah_multikey"):
        examples = make(name).examples(2048, 8)
        depths = [example.details["depth"] for example in examples]
        if name != "niah_multikey":
            assert all(any(abs(depth - (i + 0.5) / 8) < 0.13 for depth in depths) for i in range(8))
        for example, depth in zip(examples, depths, strict=True):
            text = example.prompt.split("\n\n")[1] if name == "json_key_value" else middle(example)
            assert abs(text.index(example.references[0]) / len(text) - depth) < 0.05


def test_passkey_has_one_key_in_noise() -> None:
    (example,) = make("passkey").examples(1024, 1)
    (key,) = example.references
    assert re.fullmatch(r"\d{5}", key)
    assert re.findall(r"\d+", example.prompt) == [key, key]
    rest = middle(example).replace(f"The pass key is {key}. Remember it. {key} is the pass key.", "")
    assert set(re.findall(r"\w[^.]+\.", rest)) == set(NOISE)


@pytest.mark.parametrize(
    ("name", "needles", "keys", "asked"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 4, 1),
        ("niah_multivalue", 4, 1, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_are_as_many_as_in_ruler(name: str, needles: int, keys: int, asked: int) -> None:
    for example in make(name).examples(1024, 4):
        found = re.findall(r"One of the special magic numbers for (\w+-\w+) is: (\d{7})\.", example.prompt)
        assert len(found) == len(set(found)) == needles
        assert len({key for key, _ in found}) == keys
        question = example.prompt.rsplit("\n", 1)[1]
        assert set(example.references) == {value for key, value in found if key in question}
        assert len(example.references) == asked
        assert ("depth" in example.details) == (asked == 1)
        assert all(value not in question for _, value in found)


def test_all_needles_is_nothing_but_needles() -> None:
    (example,) = make("niah_multikey_3").examples(1024, 1)
    lines = middle(example).split("\n")
    found = dict(re.fullmatch(r"One of the special magic uuids for (\S{36}) is: (\S{36})\.", x).groups() for x in lines)  # type: ignore[union-attr]
    assert len(found) == len(lines) > 50
    key = re.findall(r"\S{36}", example.answer_prefix)
    assert example.references == (found[key[0]],)


def test_variables_are_a_chain_behind_a_solved_one() -> None:
    for example in make("variable_tracking").examples(1024, 3):
        solved, question = example.prompt.split("\n\nMemorize")
        for part, names in ((solved, solved.split()[-5:]), (question, example.references)):
            said = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", part)
            assert [name for name, _ in said] == list(names)
            assert [value for _, value in said[1:]] == list(names[:-1])
            assert f"assigned the value {said[0][1]} in" in part
        assert len(set(example.references)) == 5
        assert said[0][1] in example.answer_prefix
        assert said[0][1] not in solved


@pytest.mark.parametrize(("length", "common", "rare"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_come_as_often_as_in_ruler(length: int, common: int, rare: int) -> None:
    for example in make("common_words").examples(length, 2):
        lists = re.findall(r"^1\. .*$", example.prompt, flags=re.MULTILINE)
        counts = [Counter(re.findall(r"\d+\. (\w+)", one)) for one in lists]
        assert len(counts) == 2
        assert {word for word, number in counts[1].items() if number == common} == set(example.references)
        assert Counter(counts[1].values()).keys() == {common, rare}
        assert not counts[0].keys() & counts[1].keys()
        solved = re.search(r"in the list are: (.*)", example.prompt)
        assert solved is not None
        assert {word for word, _ in counts[0].most_common(10)} == set(re.findall(r"[a-z]+", solved[1]))


def test_frequent_words_are_the_most_frequent() -> None:
    for length in (200, 1024, 4096):
        for example in make("frequent_words").examples(length, 2):
            counts = Counter(
                re.findall(r"\.\.\.|\b[a-z]{6}\b", example.prompt.split("coded words. ")[1].split("\n")[0])
            )
            (dots, most), *others = counts.most_common(5)
            assert dots == "..."
            assert tuple(word for word, _ in others[:3]) == example.references
            assert most > others[0][1] > others[1][1] > others[2][1] > others[3][1], "no ties"


def test_the_json_object_is_one() -> None:
    (example,) = make("json_key_value").examples(1024, 1)
    found = json.loads(example.prompt.split("\n\n")[1])
    key = example.prompt.split("Key: ")[1].split("\n")[0]
    assert len(found) > 300
    assert (found[key],) == example.references


def told(text: str) -> list[tuple[int, list[str]]]:
    """Return the facts of bAbI in a text: where each stands, and its words."""
    move = r"(?:moved|went|went back|journeyed|travelled) to the \w+"
    touch = r"(?:got|grabbed|picked up|took|discarded|dropped|left|put down) the (?:apple|football|milk)(?: there)?"
    found = re.finditer(rf"(?:Mary|John|Daniel|Sandra) (?:{move}|{touch})\.", text)
    return [(match.start(), match[0].removesuffix(".").removesuffix(" there").split()) for match in found]


def answer_of(facts: list[list[str]], question: str) -> str | None:
    """Play a story and answer the question about it; None for what cannot be known or has several answers."""
    places: dict[str, list[str]] = {}  # of persons, and of things from when they were first taken
    has: dict[str, list[str]] = {}
    for who, *verb, it in facts:
        if verb[-2:] == ["to", "the"]:
            for each in [who, *has.get(who, [])]:
                places.setdefault(each, []).append(it)
        elif verb[0] in ("got", "grabbed", "picked", "took"):
            assert not any(it in things for things in has.values()), "someone has it"
            assert it not in places or places[it][-1] == places[who][-1], "it is elsewhere"
            places.setdefault(it, places[who][-1:])
            has.setdefault(who, []).append(it)
        else:
            has[who].remove(it)
    asked = question.rstrip("?").split()
    if "before" not in asked:
        return places.get(asked[-1], [None])[-1]
    been = places[asked[3]]
    return been[been.index(asked[-1]) - 1] if been.count(asked[-1]) == 1 and been[0] != asked[-1] else None


@pytest.mark.parametrize(("name", "support"), list(zip(BABILONG, (1, 2, 3), strict=True)))
def test_babilong_answers_follow_from_what_happened(name: str, support: int) -> None:
    for example in make(name).examples(1024, 40):
        text, question = example.prompt.split("\nText:\n")[1].split("\n\nQuestion: ")
        places, facts = zip(*told(text), strict=True)
        assert (len(facts), question) == (example.details["facts"], example.details["question"])
        assert (answer_of(list(facts), question),) == example.references
        assert len(example.details["depths"]) == support
        for depth in example.details["depths"]:
            assert min(abs(place / len(text) - depth) for place in places) < 0.06
        shown, solved = re.findall(r'"(.*?)"', example.prompt)[:2]
        facts = [fact.removesuffix(" there").split() for fact in re.findall(r"[A-Z][^.]+", shown)]
        assert f"the answer: {answer_of(list(facts), solved)}." in example.prompt


@pytest.mark.parametrize("ask", [where_is_a_person, where_is_a_thing, where_was_a_thing])
def test_the_supporting_facts_tell_the_answer(ask: Any) -> None:
    for seed in range(100):
        story = ask(random.Random(seed), 20)
        facts = [fact for _, fact in told(" ".join(story.facts))]
        assert len(facts) == len(story.facts) >= 20
        assert answer_of(facts, story.question) == story.answer
        assert list(story.support) == sorted(set(story.support))
        support = [facts[number] for number in story.support]
        *_, thing = story.question.split(" before ")[0].rstrip("?").split()
        ends = [place.removeprefix("the ").rstrip("?") for place in story.question.split(" before ")[1:]]
        assert [it for *_, it in support if it != thing] == [story.answer, *ends]
        assert [it for *_, it in support].count(thing) == (ask is not where_is_a_person)
        assert len({who for who, *_ in support}) == 1


def test_the_gold_document_is_among_others() -> None:
    for example in make("distractor_qa").examples(1024, 6):
        shown = re.findall(r"Document (\d+):\n(.*(?:\n.+)*)", example.prompt)
        row = DOCUMENTS[example.details["row"]]
        assert [int(number) for number, _ in shown] == list(range(1, example.details["documents"] + 1))
        assert [text for _, text in shown].count(row["document"]) == 1
        assert row["question"] in example.prompt
        before = example.prompt.index(row["document"]) / len(example.prompt)
        assert abs(before - example.details["depth"]) < 0.15


@pytest.mark.parametrize("name", ["distractor_qa", "documents"])
@pytest.mark.parametrize(
    ("answer", "f1", "exact", "anywhere"),
    [
        ("\n The number7 Zebra.\nDocument 3: more", 1.0, 1.0, 1.0),
        ("a number7 cat", 0.5, 0.0, 0.0),
        ("unknown\nnumber7 zebra", 0.0, 0.0, 1.0),
        ("It is number7 zebra", 2 / 3, 0.0, 1.0),
    ],
)
def test_short_answers_have_f1_and_exact_match(
    name: str, answer: str, f1: float, exact: float, anywhere: float
) -> None:
    task, example = make(name), Example("", ("number7 zebra", "quokka"))
    assert task.score(example, answer) == pytest.approx(f1)
    assert task.further(example, answer) == {"exact match": exact, "string match (any)": anywhere}
    assert make("summaries").further(example, answer) == make("passkey").further(example, answer) == {}


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_that_are_too_long_are_left_out(name: str) -> None:
    long = {"document": "word " * 2000, "question": "Why?", "answers": ["this"]}
    rows = [*DOCUMENTS[:2], long, *DOCUMENTS[2:4]]
    examples = make(name, documents=rows).examples(1024, 10)
    assert {example.details["row"] for example in examples} == {0, 1, 3, 4}
    shortest = "40" if name == "distractor_qa" else "20"  # which shows two documents at least
    with pytest.raises(ValueError, match=f"the shortest example has {shortest}"):
        make(name, documents=[long, long | {"document": "other " * 2001}]).examples(1024, 10)


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document": " "}, "row 1 of the documents: document must be a text"),
        (
            {"answers": "Paris"},
            "row 1 of the documents: answers must be a list of texts that are not empty; got 'Paris'",
        ),
        ({"answers": []}, "answers must be a list"),
        ({"answers": [""]}, "answers must be a list"),
        ({"answers": None}, "answers must be a list"),
    ],
)
def test_bad_rows_are_left_out_and_told(name: str, change: dict[str, Any], message: str) -> None:
    task = make(name, documents=[DOCUMENTS[0], DOCUMENTS[1] | change, *DOCUMENTS[2:4]])
    assert {example.details["row"] for example in task.examples(1024, 10)} == {0, 2, 3}
    assert re.search(f"1 row was left out; .*{re.escape(message)}", task.notes[0])
    with pytest.raises(ValueError, match=re.escape(message.replace("row 1", "row 0"))):
        make(name, documents=[DOCUMENTS[0] | change, DOCUMENTS[1] | change]).examples(1024, 1)


@pytest.mark.parametrize("name", OF_ROWS)
def test_every_bad_row_is_told_with_its_place(name: str) -> None:
    rows = [row | {"place": f"rows.jsonl, line {number}"} for number, row in enumerate(DOCUMENTS, 3)]
    for number in (1, 3):
        rows[number] = rows[number] | {"answers": []}
    task = make(name, documents=rows)
    task.examples(1024, 10)
    reason = "answers must be a list of texts that are not empty; got []"
    assert task.notes == [f"2 rows were left out; rows.jsonl, line 4: {reason}; rows.jsonl, line 6: {reason}"]
    rows = [row | {"answers": []} for row in rows] * 3
    with pytest.raises(
        ValueError, match=f"{len(rows)} rows were left out; rows.jsonl, line 3: .*; and {len(rows) - 20} more$"
    ):
        make(name, documents=rows).examples(1024, 10)


@pytest.mark.parametrize("name", OF_ROWS)
def test_answers_longer_than_what_is_generated(name: str) -> None:
    room = make(name).max_new_tokens
    fits, longer = "word " * room, "word " * (room + 1)
    answers = ([longer, fits], [longer], [longer, "more " + longer])
    rows = [row | {"answers": each} for row, each in zip(DOCUMENTS, answers, strict=False)] + DOCUMENTS[3:5]
    task = make(name, documents=rows)
    found = {example.details["row"] for example in task.examples(1024, 10)}
    if name == "summaries":
        assert (found, task.notes) == ({0, 1, 2, 3, 4}, [])
        return
    assert found == {0, 3, 4}
    reason = f"the shortest answer has {room + 1} tokens; at most {room} are generated"
    places = (f"row {row} of the documents: {reason}" for row in (1, 2))
    assert task.notes == [f"2 rows were left out; {'; '.join(places)}"]


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_documents_that_are_slid_over_are_told(name: str) -> None:
    def shorten(text: str, room: int) -> Fitted:
        words = text.split()
        return Fitted([" ".join(words[i : i + room]) for i in range(0, len(words), room)], len(words), [])

    long = [row | {"document": "word " * 2000} for row in DOCUMENTS[:2]]
    task = make(name, documents=[*long, DOCUMENTS[2]], shorten=shorten)
    pieces = len(task.examples(1024, 100)) - 1
    assert task.notes == [f"2 documents were too long for 1,024 tokens and slid over in {pieces} pieces"]
    task = make(name, documents=long[:1], shorten=shorten)
    assert len(task.examples(1024, 2)) == 2
    told = f"slid over in {pieces // 2} pieces, the first 2 of them taken"
    assert task.notes == [f"1 document was too long for 1,024 tokens and {told}"]


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_a_document_that_is_too_long_is_named(name: str) -> None:
    def shorten(text: str, room: int) -> Fitted:
        raise ValueError("too long")

    long = DOCUMENTS[0] | {"document": "word " * 2000, "place": "rows.jsonl, line 7"}
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 7: too long$"):
        make(name, documents=[long], shorten=shorten).examples(1024, 1)


def test_questions_and_documents_must_be_there() -> None:
    for name in OF_ROWS:
        with pytest.raises(ValueError, match="there are no documents"):
            make(name, documents=()).examples(1024, 1)
    nameless = [row | {"question": ""} for row in DOCUMENTS]
    with pytest.raises(ValueError, match="row 0 of the documents: question must be"):
        make("documents", documents=nameless).examples(1024, 1)
    assert "Summarize" in make("summaries", documents=nameless).examples(1024, 1)[0].prompt
    with pytest.raises(ValueError, match="at least 2 different documents"):
        make("distractor_qa", documents=[DOCUMENTS[0], DOCUMENTS[0] | {"question": "Why?"}]).examples(1024, 1)


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_haystack_needs_a_text(name: str) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        make(name, text=" \n").examples(1024, 1)


@every_task
def test_short_and_odd_texts_will_do(name: str) -> None:
    for text in ("One sentence only.", "word " * 500, "没有空格。" * 50 + " {braces} {0}"):
        rows = [row | {"document": f"{{0}} {row['document']}"} for row in DOCUMENTS]
        (example,) = make(name, text=text, documents=rows).examples(1024, 1)
        assert count_words(read(example)) <= 1024


def test_sentences_lose_nothing() -> None:
    found = sentences(TEXT)
    assert " ".join(found).split() == TEXT.split()
    assert len(found) > 80
    assert max(map(count_words, found)) <= LONGEST
    assert sentences('He said "No." Then (so.) we… left! 好。不好。') == (
        'He said "No."',
        "Then (so.)",
        "we…",
        "left!",
        "好。",
        "不好。",
    )


def test_words_are_those_of_the_text_and_then_coined() -> None:
    drawn = words(random.Random(0), TEXT)
    known = plain_words(TEXT)
    many = drawn.first(len(known) + 100)
    assert set(many[: len(known)]) == set(known)
    assert len(set(many)) == len(many)
    assert all(re.fullmatch("[a-z]{4,10}", word) for word in many)
    assert drawn.first(5) == many[:5]


def test_things_are_hidden_at_the_nearest_place() -> None:
    assert hide(["aa", "bb", "cc", "dd"], ["X", "Y", "Z"], [0.0, 0.3, 1.0]) == ("X aa Y bb cc dd Z", [0.0, 0.25, 1.0])
    assert hide(["aa", "b" * 29], ["X", "Y"], [0.4, 0.45]) == (f"aa X Y {'b' * 29}", [0.0909, 0.0909])
    assert hide([], ["X"], [0.5]) == ("X", [0.0])
    assert stretch("abc", 2, 6) == list("cabcab")
    assert Draws(iter("aabcd").__next__, "x").first(4) == list("xabc")


def slow_fill(build: Any, room: int) -> int:
    """The largest size with at most `room` words, by bisection."""
    low, high = 0, 1
    while count_words(build(high)) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_words(build(middle)) <= room else (low, middle)
    return low


@pytest.mark.parametrize("seed", range(5))
def test_the_quick_way_to_fill_gives_the_same(seed: int) -> None:
    chance = random.Random(seed)
    pieces = ["w " * int(chance.expovariate(0.1)) for _ in range(400)]

    def build(size: int) -> str:
        return " ".join(stretch(pieces, seed, size)) + " end"

    for room in (1, 50, 999, 20_000):
        size = fill(build, room, count_words)
        assert count_words(build(size)) <= room < count_words(build(size + 1))
        assert count_words(build(size)) == count_words(build(slow_fill(build, room)))
