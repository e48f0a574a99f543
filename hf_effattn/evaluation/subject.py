"""A model as the tasks see it: it answers questions and says how likely a text is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..cache import with_cache
from .base import Example
from .material import count_tokens, first_tokens

SAMPLES = (Example("Here. Who?", ()), Example("Here. Who?", (), " It is"), Example("Count to 12\n", (), "Answer:"))
PIECE = 2048  # tokens whose logits are held in float32 at a time


class Answer(NamedTuple):
    """What a model generated.

    Args:
        text: Without special tokens.
        facts: Tokens read and written, and seconds for a row: `prompt_tokens`, `new_tokens`, `prefill_seconds`, and
            `step_seconds` of one more token, None if there was none.
    """

    text: str
    facts: dict[str, Any]


class Subject:
    """A model with its tokenizer.

    Args:
        model: A causal language model, converted or not; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Rows that generate together, padded on the left.
        chat: Whether prompts go through the tokenizer's chat template.

    Raises:
        ValueError: if a chat template is asked for and there is none.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1, chat: bool = False
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; leave chat off")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.chat = batch_size, chat

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, without special ones."""
        return count_tokens(self.tokenizer, text)

    def ids(self, text: str) -> torch.Tensor:
        """Return the tokens of a text `[T]`, without special ones, on the model's device."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids[0]
        return found.to(self.model.device)

    @cached_property
    def first_tokens(self) -> list[int]:
        """The token that texts begin with: BOS, or none."""
        return first_tokens(self.tokenizer)

    def begun(self, ids: torch.Tensor) -> torch.Tensor:
        """Return tokens `[T]` with BOS before them, where the tokenizer begins texts so: models are lost without what
        they saw before every text they learned from."""
        return torch.cat((ids.new_tensor(self.first_tokens), ids))

    def prompt(self, example: Example) -> str:
        """Return what the model reads: the prompt, in the chat template if asked for, and the answer's beginning."""
        if not self.chat:
            return example.prompt + example.answer_prefix
        messages = [{"role": "user", "content": example.prompt}]
        shown = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(shown) + example.answer_prefix

    def overhead(self) -> int:
        """Return the tokens that the chat template and the tokenizer add to a prompt: the most of several prompts,
        since tokens may join where the prompt meets the template."""
        own = [self.count_tokens(x.prompt + x.answer_prefix) for x in SAMPLES]
        read = self.tokenizer([self.prompt(x) for x in SAMPLES], add_special_tokens=not self.chat).input_ids
        return max(len(ids) - tokens for ids, tokens in zip(read, own, strict=True))

    @torch.inference_mode()
    def generate(self, examples: Sequence[Example], max_new_tokens: int) -> Iterator[Answer]:
        """Yield the greedy answer to each example, in order."""
        for start in range(0, len(examples), self.batch_size):
            yield from self._batch([self.prompt(x) for x in examples[start : start + self.batch_size]], max_new_tokens)

    @torch.inference_mode()
    def losses(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token of `ids` `[T]` after the first, in nats, `[T − 1]`, from one parallel pass."""
        logits = self.model(ids[None, :-1], use_cache=False).logits[0]
        parts = zip(logits.split(PIECE), ids[1:].split(PIECE), strict=True)
        return torch.cat([cross_entropy(part.float(), targets, reduction="none") for part, targets in parts])

    @torch.inference_mode()
    def losses_through_cache(self, ids: torch.Tensor, step: int = 1) -> torch.Tensor:
        """Return what `losses` does, reading `step` tokens at a time through the cache."""
        cache, found = DynamicCache(config=self.model.config), []
        for start in range(0, len(ids) - 1, step):
            part = ids[start : start + step + 1]
            logits = self.model(part[None, :-1], **with_cache(self.model, cache)).logits
            found.append(cross_entropy(logits[0].float(), part[1:], reduction="none"))
        return torch.cat(found)

    def _batch(self, prompts: list[str], max_new_tokens: int) -> list[Answer]:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        encoded = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not self.chat
        ).to(self.model.device)
        encoded.pop("token_type_ids", None)
        clock = _Clock()
        own = self.model.generation_config
        options = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=getattr(own, "eos_token_id", None) or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = self.model.generate(
            **encoded, generation_config=options, stopping_criteria=StoppingCriteriaList([clock])
        )
        new = output[:, encoded.input_ids.shape[1] :]
        answers = []
        for row, mask in zip(new, encoded.attention_mask, strict=True):
            facts = {
                "prompt_tokens": int(mask.sum()),
                "new_tokens": int((row != self.tokenizer.pad_token_id).sum()),
                "prefill_seconds": round(clock.prefill / len(prompts), 4),
                "step_seconds": None if clock.step is None else round(clock.step / len(prompts), 5),
            }
            answers.append(Answer(str(self.tokenizer.decode(row, skip_special_tokens=True)), facts))
        return answers


class _Clock(StoppingCriteria):
    """Takes the time of the prompt, and of the tokens after the first; never stops anything."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def prefill(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def step(self) -> float | None:
        """Seconds of a decoding step, the median of all."""
        steps = sorted(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))
        return steps[len(steps) // 2] if steps else None
