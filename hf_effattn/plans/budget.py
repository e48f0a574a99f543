"""What a plan may cost: bytes of the cache, or time of a decoding step."""

from __future__ import annotations

import re
from dataclasses import dataclass

BYTES, SECONDS = "bytes", "seconds"
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FORMS = "'25%' of the dense cache, bytes as a number or as in '40MB', or a speed as in '30 tokens/s'"


@dataclass(frozen=True)
class Budget:
    """A limit on what all layers together cost.

    Args:
        unit: "bytes" of the cache of one row of a batch at the context length, or "seconds" of a decoding step there.
        limit: The most of it.
    """

    unit: str
    limit: float

    @classmethod
    def parse(cls, budget: str | int | Budget, dense_bytes: int) -> Budget:
        """Read what users type.

        Args:
            dense_bytes: What 100% is.

        Raises:
            TypeError, ValueError: if it is no budget; the message says what one looks like.
        """
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, bool) or not isinstance(budget, (str, int)):
            raise TypeError(f"a budget is {FORMS}; got {budget!r}")
        if isinstance(budget, int):
            return cls(BYTES, cls._positive(budget, budget))
        found = re.fullmatch(r"\s*([0-9.]+)\s*(%|tokens/s|[KMG]?i?B)?\s*", budget, re.IGNORECASE)
        if found is None or found[1].count(".") > 1 or found[1] == ".":
            raise ValueError(f"a budget is {FORMS}; got {budget!r}")
        number, unit = cls._positive(float(found[1]), budget), (found[2] or "B").upper()
        if unit == "TOKENS/S":
            return cls(SECONDS, 1.0 / number)
        if unit == "%" and number > 100:
            raise ValueError(f"a budget of {budget!r} is more than dense attention needs")
        return cls(BYTES, number / 100 * dense_bytes if unit == "%" else number * UNITS[unit])

    @staticmethod
    def _positive(number: float, budget: str | int) -> float:
        if number <= 0:
            raise ValueError(f"a budget must be more than nothing; got {budget!r}")
        return number

    def show(self, price: float) -> str:
        """Return a price in words."""
        if self.unit == BYTES:
            return f"{price / 1e6:,.2f} MB"
        return f"{1e3 * price:,.1f} ms a step, {1 / price:,.1f} tokens/s" if price > 0 else "nothing"
