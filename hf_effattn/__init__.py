"""Convert the softmax attention of pretrained transformers models to linear or sparse attention.

Importing this package gives `PreTrainedModel` three methods, `convert_attention`, `revert_attention` and
`attention_report`, and enters names of its own into transformers' tables. No existing model changes.
"""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from . import integration
from .config import LinearConfig, SparseConfig
from .convert import convert_attention, register_architectures, revert_attention
from .plans import Plan
from .report import attention_report
from .targets import supported_models

if TYPE_CHECKING:
    from .planning import plan

__version__ = "0.1.0"

__all__ = [
    "LinearConfig",
    "Plan",
    "SparseConfig",
    "attention_report",
    "convert_attention",
    "plan",
    "revert_attention",
    "supported_models",
]

integration.register()
register_architectures()
PreTrainedModel.convert_attention = convert_attention  # type: ignore[attr-defined]
PreTrainedModel.revert_attention = revert_attention  # type: ignore[attr-defined]
PreTrainedModel.attention_report = attention_report  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Import planning when it is asked for: it needs packages that conversion does not."""
    if name == "plan":
        from .planning import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
