"""RULER's tasks that need no data, from lm_eval's own generators, as `custom_dataset` functions of the YAML files here.

They differ from lm_eval's in what surrounds the generators. Lengths start at 1,024. `num_samples` says how many samples
of each length are made (500 by default, as in RULER), so that short runs need not wait for the rest. A sample depends
on its length and its number in the row alone, so every model sees the same ones whatever ran before; lm_eval's own
depend on the state of the process. Lengths alternate, so `--limit` takes as many of each.

    --metadata '{"max_seq_lengths": [1024, 2048], "num_samples": 50}'
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
from lm_eval.tasks.ruler import common_utils

LENGTHS = [2**power for power in range(10, 18)]  # those in the YAML files' metric_list
NUM_SAMPLES = 500
SEED = 42
MARGIN = 20  # tokens by which samples made of the same number of words differ
Samples = list[dict[str, Any]]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the share of the references found in the answer, as the metric of the sample's length."""
    found = common_utils.string_match_all(common_utils.postprocess_pred(results), [doc["outputs"]])
    return {str(doc["max_length"]): found}


def niah_single_1(**metadata: Any) -> dict[str, datasets.Dataset]:
    """One number in a repeated sentence (RULER's NIAH single 1, which is the passkey task)."""
    return _dataset(_needles("repeat", "words", "numbers"), metadata)


def niah_multikey_2(**metadata: Any) -> dict[str, datasets.Dataset]:
    """One number among needles of the same kind (RULER's NIAH multikey 2)."""
    return _dataset(_needles("needle", "words", "numbers"), metadata)


def niah_multikey_3(**metadata: Any) -> dict[str, datasets.Dataset]:
    """One UUID of a UUID among needles of the same kind (RULER's NIAH multikey 3)."""
    return _dataset(_needles("needle", "uuids", "uuids"), metadata)


def vt(**metadata: Any) -> dict[str, datasets.Dataset]:
    """All names of a value, through four assignments (RULER's variable tracking)."""
    from lm_eval.tasks.ruler import vt_utils

    def generate(tokenizer: Any, length: int, number: int) -> Samples:
        _refuse_long(tokenizer, vt_utils.generate_input_output(5, 1, 4, is_icl=True)[0], 500 - 30 - MARGIN)
        (example,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, max_seq_length=500, incremental=5)
        shortest = " ".join([example["input"], *example["outputs"], vt_utils.generate_input_output(10, 1, 4)[0]])
        _refuse_long(tokenizer, shortest, length - 30 - MARGIN)
        return vt_utils.sys_vartrack_w_noise_random(tokenizer, number, max_seq_length=length, icl_example=example)

    return _dataset(generate, metadata)


def cwe(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The ten most frequent words of a list (RULER's common words extraction)."""
    from lm_eval.tasks.ruler import cwe_utils

    def generate(tokenizer: Any, length: int, number: int) -> Samples:
        cwe_utils.RNG.seed(SEED)  # a source of chance of its own
        _refuse_long(tokenizer, cwe_utils.generate_input_output(10, length)[1], length - 120 - MARGIN)
        return cwe_utils.sys_word_pair_random(num_samples=number, max_seq_length=length, tokenizer=tokenizer)

    return _dataset(generate, metadata)


def fwe(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The three most frequent coded words (RULER's frequent words extraction)."""
    from lm_eval.tasks.ruler import fwe_utils

    return _dataset(lambda tokenizer, length, number: fwe_utils.sys_kwext(tokenizer, length, number), metadata)


def _needles(haystack: str, keys: str, values: str) -> Callable[[Any, int, int], Samples]:
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    def generate(tokenizer: Any, length: int, number: int) -> Samples:
        return prepare_niah.generate_samples(
            prepare_niah.get_haystack(type_haystack=haystack),
            tokenizer,
            max_seq_length=length,
            type_haystack=haystack,
            type_needle_k=keys,
            type_needle_v=values,
            template=niah_utils.TEMPLATE,
            num_samples=number,
        )

    return generate


def _dataset(generate: Callable[[Any, int, int], Samples], metadata: dict[str, Any]) -> dict[str, datasets.Dataset]:
    """Make the samples of all lengths that lm_eval's metadata asks for."""
    lengths = metadata.get("max_seq_lengths", [4096])
    lengths = [lengths] if isinstance(lengths, int) else lengths
    wrong = [length for length in lengths if length not in LENGTHS]
    if wrong:
        raise ValueError(f"max_seq_lengths names {wrong[0]!r}; valid: {', '.join(map(str, LENGTHS))}")
    tokenizer = metadata.get("tokenizer")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = common_utils.get_tokenizer(common_utils.resolve_tokenizer_name(metadata))
    rows: Samples = []
    for length in lengths:
        with _seeded():
            rows += generate(tokenizer, length, metadata.get("num_samples", NUM_SAMPLES))
    rows.sort(key=lambda row: row["index"])
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed what the generators draw from, and leave it afterwards as it was."""
    states = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _refuse_long(tokenizer: Any, text: str, room: int) -> None:
    """Raise if the shortest sample is too long; the generator would look for a shorter one without end."""
    if (found := len(tokenizer(text).input_ids)) > room:
        raise ValueError(f"the shortest sample has {found} tokens of this tokenizer; there is room for {room}")
