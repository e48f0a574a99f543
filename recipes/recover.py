"""Recover a converted model and see what it gained: python recipes/recover.py [--config FILE] [key=value ...]

Runs distill.py, then reads documents that were held out, and any others that are named, with the dense model, with its
untrained window alone, with the recovered model, and with each of its two parts alone. The report says how much of the
window's loss of perplexity is made good.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill
import models
import torch
from data import Cutter, open_data
from plots import training
from rich.console import Console
from rich.markdown import Markdown
from settings import DistillConfig, read_config
from texts import sources_of

from hf_effattn.evaluation import Subject, Variant
from hf_effattn.evaluation.variants import ADAPTER, as_variant
from hf_effattn.plans import DENSE

WINDOW, BOTH = "its window alone, untrained", "recovered"
PARTS = {"recovered, window alone": "window", "recovered, linear part alone": "linear"}


def perplexity(model: Any, tokenizer: Any, windows: torch.Tensor) -> float:
    """Return the perplexity of all windows `[N, T]` together."""
    subject = Subject(model, tokenizer)
    losses = [subject.losses(ids.to(model.device)).double().mean() for ids in windows]
    return math.exp(float(torch.stack(losses).mean()))


def unseen(config: DistillConfig, tokenizer: Any, others: list[str], length: int, number: int) -> dict[str, Any]:
    """Return windows `[N, T]` by what they are of: documents held out of training, by source, and other texts."""
    sources = open_data(config.documents, config.streaming, tokenizer, 0).sources
    found = {f"{name}, held out": source.held_out(length, number) for name, source in sources.items()}
    cutter = Cutter(tokenizer)
    for name, texts in (sources_of(others) if others else {}).items():
        found[name] = cutter.spread([text for _, text in texts], length, number)
    return found


def measure(config: DistillConfig, adapter: Path, load: Any, others: list[str], length: int, number: int) -> Any:
    """Return perplexities by text and variant."""
    model, tokenizer = load(config.model)
    texts = unseen(config, tokenizer, others, length, number)
    untrained = Variant(WINDOW, config.mechanism, dict(config.options), "window")
    recovered = Variant(BOTH, ADAPTER, {"folder": str(adapter)})
    parts = [replace(recovered, name=name, part=part) for name, part in PARTS.items()]
    results: dict[str, dict[str, float]] = {text: {} for text in texts}
    for variant in (Variant(DENSE, DENSE), untrained, recovered, *parts):
        with as_variant(model, variant):
            for text, windows in texts.items():
                results[text][variant.name] = perplexity(model, tokenizer, windows)
    return results


def report(results: dict[str, dict[str, float]], length: int) -> str:
    """Return the table, and what is left of the gap."""
    names = [DENSE, WINDOW, BOTH, *PARTS]
    lines = [f"Perplexity of windows of {length:,} tokens", "", f"| | {' | '.join(results)} |"]
    lines.append("|---|" + "---|" * len(results))
    for name in names:
        row = [f"{found[name]:.2f} ({found[name] / found[DENSE]:.2f}x)" for found in results.values()]
        lines.append(f"| {name} | {' | '.join(row)} |")
    left = [(found[BOTH] - found[DENSE]) / (found[WINDOW] - found[DENSE]) for found in results.values()]
    lines.append(f"| **left of the window's gap** | {' | '.join(f'**{share:.0%}**' for share in left)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent / "configs" / "recover.yaml"))
    parser.add_argument("--others", nargs="*", default=[], help="files or folders of other unseen texts")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=6, help="of each text")
    parser.add_argument("changes", nargs="*", help="key=value of the config")
    options = parser.parse_args()
    config = read_config(DistillConfig, ["--config", options.config, *options.changes])
    if config.plan is not None:
        parser.error("plan= is for distill.py: here layers are compared with their windows, and a plan may have none")
    adapter = distill.run(config)
    console = Console()
    console.print("reading documents that were not trained on")
    results = measure(config, adapter, models.load, options.others, options.length, options.windows)
    (adapter.parent / "perplexity.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results, options.length)
    (adapter.parent / "report.md").write_text(text)
    log = (adapter.parent / "log.jsonl").read_text().splitlines()
    training([json.loads(line) for line in log], adapter.parent / "curve.png")
    console.print(Markdown(text))
    console.print(f"written: {adapter}, {adapter.parent / 'report.md'}, curve.png, log.jsonl")


if __name__ == "__main__":
    main()
