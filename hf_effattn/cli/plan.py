"""`effattn plan`: which layer of a model gets which attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..planning import plan
from ..planning.candidates import check_for_heads, read_candidates
from ..planning.search import RECALL_WEIGHT, ROUNDS
from ..plans import Plan
from ..plotting import new_figure
from .common import DTYPES, Loader, check_device, check_dtype, length_of, told_plainly


def add(app: typer.Typer, loader: Loader, default_model: str | None) -> None:
    """Add the command to an application."""

    @app.command("plan")
    def plan_command(
        model: Annotated[str, typer.Argument(help="A Hub id or a folder.")] = default_model or ...,  # type: ignore[assignment]
        documents: Annotated[str, typer.Option(help="A file, folder or dataset of long documents.")] = ...,  # type: ignore[assignment]
        budget: Annotated[
            str, typer.Option(help="Such as 25% of the dense cache, 40MB, or 30 tokens/s of decoding.")
        ] = "25%",
        context_length: Annotated[str, typer.Option(help="Tokens, as in 8k.")] = "8k",
        candidate: Annotated[
            list[str] | None,
            typer.Option(help="As in sparse:window=512,num_sinks=4; may be given several times. Dense is always one."),
        ] = None,
        number: Annotated[int, typer.Option(min=1, help="Calibration texts.")] = 2,
        recall_weight: Annotated[
            float, typer.Option(min=0.0, help="Of a nat of recall beside one of text.")
        ] = RECALL_WEIGHT,
        rounds: Annotated[int, typer.Option(min=1, help="Of the search, and steps to better choices.")] = ROUNDS,
        by_head: Annotated[bool, typer.Option("--by-head", help="Choose for each head, not for each layer.")] = False,
        measured: Annotated[int, typer.Option(min=1, help="Tokens of each text that changes are measured on.")] = 512,
        seed: Annotated[int, typer.Option(help="Of what is hidden in the texts.")] = 42,
        earlier: Annotated[
            Path | None, typer.Option(help="A plan.json among the same candidates, for any budget, to go on from.")
        ] = None,
        dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
        device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
        out: Annotated[
            Path, typer.Option(help="Folder for plan.json and measurements; a run that was killed goes on from it.")
        ] = Path("plan_output"),
    ) -> None:
        """Choose the attention of each layer so that a budget is kept and as little as possible is lost."""
        with told_plainly():
            kind, length = check_dtype(dtype), length_of(context_length)
            check_device(device)
            if candidate:
                given = read_candidates(candidate)  # rather now than after the model is loaded
                if by_head:
                    check_for_heads(given)
            new_figure()  # rather now than after an hour, if there is no matplotlib
            before = None if earlier is None else Plan.load(earlier)
            net, tokenizer = loader(model, kind, device)
            found = plan(
                net,
                documents,
                budget,
                length,
                candidate,
                tokenizer=tokenizer,
                number=number,
                recall_weight=recall_weight,
                rounds=rounds,
                by_head=by_head,
                measured=measured,
                out=out,
                seed=seed,
                earlier=before,
            )
            found.save(out / "plan.json")
            found.plot(out / "plan.png")
            Console().print(str(found), markup=False, highlight=False, soft_wrap=True)
            typer.echo(f"written: {out / 'plan.json'}, plan.png; model.convert_attention(Plan.load(...)) does it")
