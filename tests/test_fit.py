"""Texts that are too long: what is cut is told exactly, pieces fit by themselves, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_effattn.evaluation.texts import Fitted, fit


def words_tokenizer() -> PreTrainedTokenizerBase:
    """Whole words, w0 … w99."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16)


def growing_tokenizer() -> PreTrainedTokenizerBase:
    """Letters, with one more in front of every text: pieces have more tokens by themselves than in the text."""
    letters = Tokenizer(models.BPE({"▁": 0, "w": 1, **{str(i): i + 2 for i in range(10)}}, []))
    letters.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    letters.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=16)


TOKENIZERS = {"words": words_tokenizer(), "growing": growing_tokenizer(), "bytes": ByT5Tokenizer()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))


def count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


@given(length=st.integers(1, 60), room=st.integers(1, 70))
@settings(max_examples=40)
def test_words_that_are_cut_are_exactly_those_reported(length: int, room: int) -> None:
    words = [f"w{i}" for i in range(length)]
    text, tokenizer = " ".join(words), TOKENIZERS["words"]
    whole = length <= room
    for how in ("truncate_middle", "truncate_end"):
        fitted = fit(text, room, tokenizer, how)
        first = (room + 1) // 2 if how == "truncate_middle" else room
        assert fitted.num_tokens == length
        assert fitted.cuts == ([] if whole else [(first, length - room + first)])
        kept = words if whole else words[:first] + words[length - room + first :]
        assert [piece.split() for piece in fitted.pieces] == [kept]
    fitted = fit(text, room, tokenizer, "slide")
    assert (fitted.num_tokens, fitted.cuts) == (length, [])
    seen = [[int(word[1:]) for word in piece.split()] for piece in fitted.pieces]
    assert seen[0][0] == 0
    assert seen[-1][-1] == length - 1
    assert all(piece == list(range(piece[0], piece[-1] + 1)) and len(piece) <= room for piece in seen)
    assert all(len(piece) == room for piece in seen[:-1])
    assert all(last[-1] + 1 - new[0] == room // 10 for last, new in zip(seen, seen[1:], strict=False))


@every_tokenizer
@given(text=st.text("w12 é\n", min_size=1, max_size=60), room=st.integers(3, 70))
@settings(max_examples=40)
def test_pieces_fit_by_themselves_and_nothing_is_lost(tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> None:
    total = count(text, tokenizer)
    for how in ("truncate_middle", "truncate_end", "slide"):
        fitted = fit(text, room, tokenizer, how)
        assert fitted.num_tokens == total
        assert all(count(piece, tokenizer) <= room for piece in fitted.pieces)
        if total <= room:
            assert (fitted.pieces, fitted.cuts) == ([text], [])
        elif how == "slide":
            assert fitted.cuts == []
            covered = 0
            for piece in fitted.pieces if tokenizer is not TOKENIZERS["bytes"] else [text]:
                begin = text.rindex(piece, 0, covered + len(piece))
                assert begin <= covered < begin + len(piece)
                covered = begin + len(piece)
            assert covered == len(text)
        else:
            ((start, end),) = fitted.cuts
            assert 0 < start < end <= total
            (piece,) = fitted.pieces
            assert tokenizer is TOKENIZERS["bytes"] or any(
                text.startswith(piece[:k]) and text.endswith(piece[k:]) for k in range(len(piece) + 1)
            )
            assert total - (end - start) <= room
            assert (end == total) == (how == "truncate_end" or start == total - (end - start))


@every_tokenizer
def test_a_text_too_long_is_an_error_where_it_shall_be(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    text = "w1 " * 2000
    total = count(text, tokenizer)
    caplog.clear()
    with pytest.raises(ValueError, match=f"the text has {total:,} tokens; there is room for 1,000"):
        fit(text, 1000, tokenizer, "error")
    assert fit(text, total, tokenizer, "error").pieces == [text]
    assert not caplog.records  # of the tokenizer, that a text is longer than the model takes
    with pytest.raises(
        ValueError, match="unknown way to fit 'middle'; valid: error, truncate_middle, truncate_end, sli"
    ):
        fit("w1", 5, tokenizer, "middle")
    with pytest.raises(ValueError, match="room must be at least 1; got 0"):
        fit("w1", 0, tokenizer, "error")


def test_one_token_is_enough_or_too_much() -> None:
    for how in ("error", "truncate_middle", "truncate_end", "slide"):
        assert fit("w1", 1, TOKENIZERS["words"], how) == Fitted(["w1"], 1, [])
    assert fit("w1 w2 w3", 1, TOKENIZERS["words"], "truncate_middle") == Fitted(["w1"], 3, [(1, 3)])
    with pytest.raises(ValueError, match="no part of the text has at most 1 token by itself"):
        fit("w1", 1, TOKENIZERS["growing"], "slide")
