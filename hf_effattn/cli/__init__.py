"""The command line: `effattn evaluate MODEL ...`, `effattn plan MODEL ...`, `effattn models`."""

from __future__ import annotations

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise ImportError("the command line needs typer and rich: pip install hf_effattn[eval]") from error

from ..targets import supported_models
from . import evaluate, plan
from .common import Loader, load

__all__ = ["main", "make_app"]


def make_app(loader: Loader = load, default_model: str | None = None) -> typer.Typer:
    """Return the application.

    Args:
        loader: What gives a model and a tokenizer for a name, a dtype and a device.
        default_model: The model if none is named; None to ask for one.
    """
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback()
    def group() -> None:
        """Linear and sparse attention for pretrained transformers models."""

    @app.command("models")
    def models() -> None:
        """List the model types that can be converted."""
        typer.echo("\n".join(supported_models()))

    evaluate.add(app, loader, default_model)
    plan.add(app, loader, default_model)
    return app


def main() -> None:
    make_app()()
