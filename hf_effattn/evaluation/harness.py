"""Converted models in EleutherAI's lm-evaluation-harness: the model type "hf-effattn".

    python -m hf_effattn.evaluation.harness --model hf-effattn --tasks effattn_niah_single_1 \\
        --model_args pretrained=NAME,mechanism=sparse,window=512,num_sinks=4 \\
        --metadata '{"max_seq_lengths": [1024, 2048], "num_samples": 50}'

takes the arguments of `lm_eval`, with or without its commands (`run`, `ls`, `validate`), and knows the tasks under
`lm_eval_tasks` too. `lm_eval` itself cannot find the model type: it looks names up in a registry, but neither reads
entry points nor imports anything that would enter ours.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..config import CONFIGS, MechanismConfig, make_config
from ..config.base import refuse_unknown
from ..convert import convert_attention, revert_attention
from .variants import EVICTIONS_START_LATE

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import warning_once
except ImportError as error:
    raise ImportError("this needs EleutherAI's lm-evaluation-harness: pip install hf_effattn[lm-eval]") from error

logger = logging.getLogger(__name__)

NAME = "hf-effattn"
TASKS = Path(__file__).parent / "lm_eval_tasks"
BACKENDS_OF_HFLM = ("default", "causal", "seq2seq")  # other values of `backend` are those of a mechanism
LISTS = ("layers", "keep_softmax", "positions")
# What `from_pretrained` and `HFLM` know beside the parameters they name.
LOADING = ("attn_implementation", "device_map", "experts_implementation", "use_kernels", "variant")


class ConvertedLM(HFLM):
    """lm_eval's `HFLM` with a model that is converted after loading.

    Lists of numbers are written `keep_softmax=[5,11]` on the command line, or `keep_softmax=5+11`, which lm_eval also
    understands where arguments are a string in Python. Loglikelihoods are read off one forward pass over a whole text:
    with an `eviction` that is dense attention (a warning says so), so evictions show in generation only.

    Args:
        pretrained: A Hub id or folder, of a converted model too; or a model, which is converted in place.
        mechanism: "linear" or "sparse", or a config; "dense" for softmax attention, also of a model that is converted;
            None to leave the model as it is.
        layers, keep_softmax: As in `convert_attention`.
        backend: A backend of the mechanism, or what `HFLM` calls a backend.
        arguments: Options of the mechanism, and arguments of `HFLM`. Its `peft=` is loaded after the conversion.

    Raises:
        TypeError, ValueError: as `convert_attention` does; for wrong options before anything is loaded.
    """

    _model: Any  # set by HFLM

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        mechanism: str | MechanismConfig | None = None,
        *,
        layers: Iterable[int] | None = None,
        keep_softmax: Iterable[int] | None = None,
        backend: str = "causal",
        **arguments: Any,
    ) -> None:
        known = _names_of_hflm()
        options = {name: _value(name, arguments.pop(name)) for name in list(arguments) if name not in known}
        if backend not in BACKENDS_OF_HFLM:
            options["backend"], backend = backend, "causal"
        chosen = {"layers": _value("layers", layers), "keep_softmax": _value("keep_softmax", keep_softmax)}
        self._chosen = {name: value for name, value in chosen.items() if value is not None}
        self._mechanism = _checked(mechanism, options, self._chosen)
        if not isinstance(pretrained, str):
            self._convert(pretrained)
        # HFLM's own default, "cuda", fails where there is none; that of lm_eval's command line falls back to the CPU.
        super().__init__(pretrained, backend=backend, **{"device": "cuda:0", **arguments})

    def _convert(self, model: PreTrainedModel) -> None:
        if isinstance(self._mechanism, MechanismConfig):
            convert_attention(model, self._mechanism, **self._chosen)
        elif self._mechanism == "dense":
            revert_attention(model)

    def _create_model(self, pretrained: str, *, peft: str | None = None, **arguments: Any) -> None:
        """Load, convert, and only then put an adapter on: it may hold parameters that the conversion makes."""
        if peft and arguments.get("delta"):
            raise ValueError("give peft= or delta=, not both")
        super()._create_model(pretrained=pretrained, **arguments)
        self._convert(self._model)
        if peft:
            from peft import PeftModel

            if len(self.tokenizer) > self._model.get_input_embeddings().num_embeddings:
                self._model.resize_token_embeddings(len(self.tokenizer))  # an adapter with tokens of its own
            self._model = PeftModel.from_pretrained(self._model, peft, revision=arguments.get("revision"))

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        specs = (getattr(self.model.config, "effattn", None) or {}).get("layers", [])
        if any(spec and "eviction" in spec for spec in specs):
            warning_once(logger, f"{EVICTIONS_START_LATE}.")
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes beside the results, and how the model is converted."""
        return {**super().get_model_info(), "effattn": getattr(self.model.config, "effattn", None)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm_eval's command line with the model type and tasks of this package.

    Args:
        arguments: What follows `lm_eval` on a command line; None for those of this process.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    setup_logging()
    before = sys.argv
    # lm_eval reads nothing but sys.argv, and enters the command `run` there if none is given.
    sys.argv = ["lm_eval", *(before[1:] if arguments is None else arguments)]
    try:
        cli = HarnessCLI()
        parsed = cli.parse_args()
    finally:
        sys.argv = before
    if hasattr(parsed, "include_path"):
        own = parsed.include_path
        if own is None and getattr(parsed, "config", None):
            own = EvaluatorConfig.load_yaml_config(parsed.config).get("include_path")
        paths = own if isinstance(own, list) else [own] if own else []
        parsed.include_path = [str(TASKS), *paths]  # where a name is taken twice, the later one counts
    cli.execute(parsed)


def _names_of_hflm() -> set[str]:
    """The arguments that are not the mechanism's."""
    functions = HFLM.__init__, PreTrainedModel.from_pretrained
    named = {name for function in functions for name in inspect.signature(function).parameters}
    return {*named, *LOADING} - {"kwargs"}


def _value(name: str, value: Any) -> Any:
    """Return what the user meant by what lm_eval's parser made of it: lists may be 5+11, and one number -1.0."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\+-?\d+)+", value):
        return [int(part) for part in value.split("+")]
    if name in LISTS and isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return [int(value)]
    return value


def _checked(
    mechanism: str | MechanismConfig | None, options: dict[str, Any], chosen: dict[str, Any]
) -> MechanismConfig | str | None:
    """Return the config of a mechanism, "dense" or None; raise for whatever can be wrong without a model."""
    if mechanism is None or mechanism == "dense":
        refuse_unknown([*options, *chosen], [], f"{mechanism} attention" if mechanism else "a model without mechanism=")
        return mechanism
    if isinstance(mechanism, str) and mechanism not in CONFIGS:
        raise ValueError(f"unknown mechanism {mechanism!r}; valid: dense, {', '.join(CONFIGS)}")
    return make_config(mechanism, options)


if __name__ == "__main__":
    # Again under its own name: this copy is known as __main__, and one registration is enough.
    from . import harness

    harness.main()
else:
    register_model(NAME)(ConvertedLM)
