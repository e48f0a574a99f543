"""Whether the blocks of selectors hold what is looked for: python recipes/needle.py --length 4096 --trials 10

Passkeys hidden at even depths are read by the dense model, and their digits are predicted one by one, behind the right
ones, by the same model with a part of the blocks (half of them by default). At each digit, in each layer and key/value
head: is a block that holds digits of the key among the chosen? Shows in how many trials it is in some head, how often
it is in heads that look at the key (dense attention would spend a tenth of a query's weight on it or more) and in all
heads, how much of all weight on the key lies in chosen blocks, and how many digits are predicted; writes all as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from models import EMBEDDED, load
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache

import hf_effattn  # noqa: F401  (gives models convert_attention)
from hf_effattn.cache import with_cache
from hf_effattn.evaluation import TASKS, Material, Subject
from hf_effattn.evaluation.base import Example

LOOKS = 0.1  # of a query's weight


def places_of(example: Example, subject: Subject) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the prompt with the answer behind it `[1, T]`, which of its tokens are of the hidden key `[T]`, and the
    first token of the answer that is."""
    key, text = example.references[0], subject.prompt(example)
    encoded = subject.tokenizer(f"{text} {key}", return_offsets_mapping=True, return_tensors="pt")
    first, last = encoded.offset_mapping[0].T
    starts = [at for at in range(len(text)) if text.startswith(key, at)]
    held = torch.stack([(first < at + len(key)) & (last > at) for at in starts]).any(dim=0)
    return encoded.input_ids, held, int((last > len(text) + 1).float().argmax())


def watch(model: Any, held: torch.Tensor, seen: dict[str, list[float]]) -> list[Any]:
    """Let each converted layer note of every single query what it chose; return the hooks."""

    def hook(mechanism: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        query, state = args[0], kwargs["cache_layer"].state
        if query.shape[2] > 1:
            return
        positions = state.store.num_tokens[:, None] - 1
        selection = mechanism.selection(kwargs["scale"])
        chosen = selection.blocks(query, state.summary, positions)[0, :, 0]  # [G, num_blocks]
        tokens = int(positions) + 1
        keys = state.store.keys[0, :, :tokens].float()
        rows = query[0, :, 0].float().unflatten(0, (keys.shape[0], -1))  # [G, R, D]
        weights = (rows @ keys.transpose(1, 2) * kwargs["scale"]).softmax(dim=-1)  # [G, R, S]
        block = torch.arange(tokens) // mechanism.block_size
        here, is_chosen = held[:tokens], (block[None, :, None] == chosen[:, None]).any(dim=-1)  # [G, S]
        looked = (weights * here).sum(dim=-1).amax(dim=1)  # [G]
        seen["chosen"] += (is_chosen & here).any(dim=1).float().tolist()
        seen["looked"] += looked.tolist()
        seen["weight"] += (weights * here).sum(dim=(1, 2)).tolist()
        seen["chosen weight"] += (weights * (is_chosen & here)[:, None]).sum(dim=(1, 2)).tolist()

    modules = [module for name, module in model.named_modules() if name.endswith(".effattn")]
    return [module.register_forward_hook(hook, with_kwargs=True) for module in modules]


@torch.inference_mode()
def trial(subject: Subject, example: Example, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each way to convert the model what heads chose and looked at, and the share of digits predicted."""
    ids, held, answer = places_of(example, subject)
    model: Any = subject.model
    read, found = DynamicCache(config=model.config), {}
    model(ids[:, : answer - 1], **with_cache(model, read), logits_to_keep=1)
    for name, options in ways.items():
        cache, right = copy.deepcopy(read), []
        seen: dict[str, list[float]] = defaultdict(list)
        hooks = watch(model.convert_attention("sparse", **options), held, seen)
        for at in range(answer - 1, ids.shape[1] - 1):
            logits = model(ids[:, at : at + 1], **with_cache(model, cache)).logits
            right.append(float(logits[0, -1].argmax() == ids[0, at + 1]))
        for handle in hooks:
            handle.remove()
        model.revert_attention()
        found[name] = {"depth": example.details["depth"], "right": sum(right) / len(right), **seen}
    return found


def summary(trials: list[dict[str, Any]]) -> dict[str, float]:
    """Return shares over trials, over heads that look, and over all heads."""
    chosen = torch.tensor([x["chosen"] for x in trials])  # [trials, digits · layers · G]
    looks = torch.tensor([x["looked"] for x in trials]) >= LOOKS
    weight, kept = (torch.tensor([x[name] for x in trials]).sum() for name in ("weight", "chosen weight"))
    return {
        "trials in which some head chose it": float(chosen.amax(dim=1).mean()),
        "heads that look": float(looks.float().mean()),
        "of heads that look, those that chose it": float(chosen[looks].mean()),
        "least of that in a trial": min(float(x[y].mean()) for x, y in zip(chosen, looks, strict=True)),
        "of all heads": float(chosen.mean()),
        "of the weight on it": float(kept / weight),
        "digits predicted": sum(x["right"] for x in trials) / len(trials),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="a Hub id, a folder, or the embedded default")
    parser.add_argument("--selector", nargs="+", default=["quest", "moba"], choices=["quest", "moba"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--part", type=float, default=0.5, help="of the blocks that are chosen")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("needle_output/needle.json"))
    options = parser.parse_args()
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    subject = Subject(model, tokenizer)
    examples = TASKS.get("passkey")(Material(subject.count_tokens, "")).examples(options.length, options.trials)
    half = {"block_size": options.block_size, "num_blocks": round(options.part * options.length / options.block_size)}
    ways = {name: {"selector": name, **half} for name in options.selector}
    trials = [trial(subject, example, ways) for example in track(examples, "reading")]
    results: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in ("selector", "out")}
    results |= {name: summary([found[name] for found in trials]) for name in ways}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    Console().print_json(data=results)


if __name__ == "__main__":
    main()
