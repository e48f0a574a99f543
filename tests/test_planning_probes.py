"""Texts for planning: what is hidden in them, what is asked for, and which are read at once."""

from __future__ import annotations

import pytest
import torch
from small import PROSE
from test_planning_recall import TOKENIZER

from hf_effattn.planning import probes
from hf_effattn.planning.probes import ASKED, DEPTHS, HIDDEN, SAID, make_asked, make_probes


@pytest.mark.parametrize("length", [600, 1200])
def test_one_thing_is_hidden_in_each_text_and_asked_for(length: int) -> None:
    found = [probe for batch in make_asked(TOKENIZER, length, 3) for probe in batch]
    assert len(found) == len(HIDDEN)
    for thing, share, depth in HIDDEN:
        (own,) = (x for x in found if f"What is the {thing}?" in TOKENIZER.decode(x.ids))
        tokens = int(share * length)
        assert len(own.ids) == tokens + 1
        assert not own.is_text.any()
        assert own.answer_tokens == own.is_answer.sum()
        assert int(own.is_answer.nonzero().min()) >= own.start > tokens // 2
        answer = TOKENIZER.decode(own.ids[1:][own.is_answer]).strip()
        whole = TOKENIZER.decode(own.ids)
        assert whole.count(answer) == 3  # said twice, and the answer
        assert len(answer) == 5
        said = SAID.format(thing=thing, value=answer)
        noise = len(whole) - len(said) - len(ASKED.format(thing=thing)) - len(f" {answer}")
        assert whole.index(said) / noise == pytest.approx(depth, abs=0.1 if share > 0.25 else 0.35)
    assert make_asked(TOKENIZER, length, 4)[0][0].ids.tolist() != found[0].ids.tolist()


def test_several_things_are_asked_for_in_calibration_texts() -> None:
    (own,) = make_probes([PROSE * 8], TOKENIZER, 640, 1, 7)
    assert own.answer_tokens == own.questions.answer_tokens == own.is_answer.sum() / len(DEPTHS)


def test_the_questions_of_a_text_come_after_it() -> None:
    (own,) = make_probes([PROSE * 8], TOKENIZER, 640, 1, 7)
    asked = own.questions
    assert not asked.is_text.any()
    assert torch.equal(asked.is_answer, own.is_answer)
    assert int(own.is_text.nonzero().max()) < asked.start <= int(own.is_answer.nonzero().min())
    assert "What is the secret number" in TOKENIZER.decode(asked.ids[asked.start :])
    assert PROSE[:40] not in TOKENIZER.decode(asked.ids[asked.start :])


@pytest.mark.parametrize("at_once", [100, 1000, 10_000])
def test_texts_that_are_read_at_once_are_of_the_same_length_and_few(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(probes, "AT_ONCE", at_once)
    found = make_asked(TOKENIZER, 600, 3)
    for batch in found:
        assert {(len(own.ids), own.start) for own in batch} == {(len(batch[0].ids), batch[0].start)}
        assert len(batch) == 1 or len(batch) * len(batch[0].ids) <= at_once
    assert len(found) == {100: len(HIDDEN), 1000: 2 + 3 + 1, 10_000: 3}[at_once]
    assert len({own.ids for batch in found for own in batch}) == len(HIDDEN)
