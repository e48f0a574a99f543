"""`effattn evaluate`: variants of a model on long examples, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..evaluation import TASKS, Settings, Variant, evaluate, markdown
from ..evaluation.material import TOO_LONG, Sources
from ..evaluation.plots import plots
from ..evaluation.variants import ADAPTER, is_converted
from ..plans import DENSE
from ..plotting import new_figure
from .common import DTYPES, Loader, check_device, check_dtype, length_of, told_plainly


def add(app: typer.Typer, loader: Loader, default_model: str | None) -> None:
    """Add the command to an application."""

    @app.command("evaluate")
    def evaluate_command(
        model: Annotated[str, typer.Argument(help="A Hub id or a folder.")] = default_model or ...,  # type: ignore[assignment]
        tasks: Annotated[str, typer.Option(help="Names, separated by commas.")] = "perplexity,passkey,niah_single",
        lengths: Annotated[str, typer.Option(help="Tokens of an example, as in 1k,2k.")] = "1k,2k",
        number: Annotated[int, typer.Option(min=1, help="Examples of each task and length.")] = 10,
        variant: Annotated[
            list[str] | None,
            typer.Option(
                help="A conversion, as in sparse:window=512,num_sinks=4, or adapter:NAME (a folder, a shipped adapter, "
                "a Hub id), or plan:FILE; may be given several times."
            ),
        ] = None,
        against: Annotated[str, typer.Option(help="The variant that others are compared with.")] = DENSE,
        ablate: Annotated[bool, typer.Option(help="Also the parts of linear attention with a window, alone.")] = False,
        text: Annotated[
            list[str] | None, typer.Option(help="Haystack and passages: files or folders; Python's manual by default.")
        ] = None,
        documents: Annotated[str | None, typer.Option(help="Rows of document, question, answers.")] = None,
        column: Annotated[
            list[str] | None, typer.Option(help="What a field is called there, as in question=q.")
        ] = None,
        split: Annotated[str | None, typer.Option(help="Of documents that are a dataset with several.")] = None,
        join: Annotated[str | None, typer.Option(help="Where documents are, if rows name theirs by doc_id.")] = None,
        too_long: Annotated[str, typer.Option(help=f"Documents without room: {', '.join(TOO_LONG)}.")] = "skip",
        batch_size: Annotated[int, typer.Option(min=1, help="Rows that generate together.")] = 1,
        chat: Annotated[bool, typer.Option(help="Put prompts into the chat template.")] = False,
        seed: Annotated[int, typer.Option(help="Of the examples.")] = 42,
        dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
        device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
        out: Annotated[Path, typer.Option(help="Folder for results; a run that was killed goes on from it.")] = Path(
            "evaluation_output"
        ),
    ) -> None:
        """Compare variants of a model on long examples, dense and converted side by side."""
        with told_plainly():
            kind = check_dtype(dtype)
            check_device(device)
            asked = [Variant.parse(each) for each in variant or []]
            columns = dict(_column(each) for each in column or [])
            sources = Sources(tuple(text or []), documents, columns, split, join, too_long)
            names, sizes = _names(tasks), [length_of(each) for each in _names(lengths)]
            for name in names:
                TASKS.get(name)
            net, tokenizer = loader(model, kind, device)
            settings = Settings(names, sizes, number, _variants(net, asked, against, ablate), batch_size, chat, seed)
            _run(net, tokenizer, settings, against, model, sources, out)


def _run(
    net: Any,
    tokenizer: Any,
    settings: Settings,
    against: str,
    name: str,
    sources: Sources,
    out: Path,
) -> None:
    console = Console()
    new_figure()  # rather now than after hours, if there is no matplotlib
    material, skipped = sources.gather(tokenizer, settings.seed)
    columns = (TextColumn("{task.description:40}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("reading", total=None)

        def advance(description: str, done: int, total: int) -> None:
            progress.update(bar, description=description, completed=done, total=total)

        results = evaluate(net, tokenizer, settings, material, out, advance)
    source = ", ".join(sources.texts) or "Python's language reference"
    notes = [
        f"model {name}, {net.dtype}, seed {settings.seed}, answers generated greedily"
        + (" through the chat template" if settings.chat else ""),
        f"haystack and passages from {source}: numbers are comparable in kind with RULER's, not digit for digit",
        f"rows skipped: {len(skipped)}" + "".join(f"; {each.place}: {each.reason}" for each in skipped[:20]),
        *results.notes,
    ]
    results = replace(results, against=against, title=f"Evaluation of {name}", notes=notes)
    report = markdown(results)
    (out / "report.md").write_text(report, encoding="utf-8")
    drawn = plots(results, out)
    console.print(Markdown(report))
    console.print(f"written: {out / 'report.md'}, results.jsonl, {', '.join(path.name for path in drawn)}")


def _variants(net: Any, asked: list[Variant], against: str, ablate: bool) -> list[Variant]:
    """Return what to run: the model as given if it is converted, the dense one if compared with, and what was asked."""
    found = [Variant("as given", None)] if is_converted(net) else []
    linear = [v for v in (*found, *asked) if v.mechanism in (None, "linear", ADAPTER)]
    if ablate and not linear:
        raise ValueError("--ablate needs linear attention with a window; no variant has it")
    found += [part for v in found if ablate for part in v.ablations()]
    names = [each.name for each in asked]
    if DENSE not in names and (against == DENSE or not (found or asked)):
        found.append(Variant(DENSE, DENSE))
    for each in asked:
        found += [each, *(each.ablations() if ablate and each in linear else [])]
    if against not in [each.name for each in found]:
        raise ValueError(f"nothing called {against!r} to compare with; valid: {', '.join(v.name for v in found)}")
    return found


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals:
        raise ValueError(f"a column is given as ours=theirs, such as question=query; got {text!r}")
    return ours.strip(), theirs.strip()
