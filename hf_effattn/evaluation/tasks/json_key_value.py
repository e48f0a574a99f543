"""A value of a JSON object."""

from __future__ import annotations

from ..base import TASKS, Example
from ..haystack import Draws, hide, uuids
from .drawn import DrawnTask, even_depth

PROMPT = (
    "Extract the value that belongs to the given key from the JSON object below.\n\n{{{text}}}\n\n"
    "Key: {key}\nQuestion: What is the value of this key?"
)
PREFIX = " Answer: The value is"


@TASKS.register("json_key_value")
class JsonKeyValue(DrawnTask):
    """A JSON object of UUIDs that stand for UUIDs, one of which is asked for (the json_kv of HELMET, Yen 2024, arXiv
    2410.02694, which shows two solved examples). The depths are spread evenly over the examples."""

    max_new_tokens = 100

    def example(self, length: int, index: int) -> Example:
        drawn = uuids(self.random(length, index))
        key, value = drawn.first(2)
        others = Draws(lambda: _pair(drawn.draw(), drawn.draw()))

        def build(size: int) -> tuple[str, list[float]]:
            text, places = hide(others.first(size), [_pair(key, value)], [even_depth(index)], ",\n")
            return PROMPT.format(text=text, key=key), places

        prompt, places = build(self.size(lambda size: build(size)[0] + PREFIX, length))
        return Example(prompt, (value,), PREFIX, {"depth": places[0]})


def _pair(key: str, value: str) -> str:
    return f'"{key}": "{value}"'
