"""A pytest plugin: test suites that others wrote run against converted models, and bugs are planted to see who notices.

    PYTHONPATH=tests/conformance pytest -p conformance_plugin --kind linear --families llama <somebody's tests>
    PYTHONPATH=tests/conformance pytest -p conformance_plugin --plant reorder_cache tests/test_one_answer.py

With `--kind`, every model of the given families ends its construction (constructor, `from_config`, `from_pretrained` on
the meta device) converted. The tests are not changed, except for what only their authors' caches have (see `_adapt`).
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEFAULT_STD = 0.02  # what the testers of transformers ask for; --init-std replaces only this value

# How each kind converts: the layers by index (None for all) and the options.
KINDS: dict[str, list[tuple[list[int] | None, str, dict[str, Any]]]] = {
    "native": [],
    "identity": [(None, "sparse", {"pattern": "sliding_window", "window": 1 << 16})],
    "linear": [(None, "linear", {"feature_map": "elu", "window": 0, "num_sinks": 0})],
    "linear_window": [(None, "linear", {"feature_map": "hedgehog", "window": 4, "num_sinks": 1})],
    "streaming": [(None, "sparse", {"pattern": "streaming", "window": 4, "num_sinks": 2})],
    "mixed": [([0], "linear", {"feature_map": "hedgehog", "window": 4, "num_sinks": 1})],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--kind", choices=KINDS, help="what every model becomes at its construction")
    group.addoption("--families", default="", help="model types to convert, separated by commas")
    group.addoption("--init-std", type=float, help=f"replaces initializer_range={DEFAULT_STD}, so attention matters")
    group.addoption("--without-attentions", action="store_true", help="the tests don't ask for attention weights")
    group.addoption("--plant", help="a deliberate bug; see plants.py")
    group.addoption("--outcomes", type=Path, help="file for the outcome of each test, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")), "conformance-outcomes")
    plant = config.getoption("--plant")
    if plant:
        from plants import PLANTS

        if plant not in PLANTS:
            raise pytest.UsageError(f"unknown bug {plant!r}; known: {', '.join(PLANTS)}")
        PLANTS[plant]()
    kind = config.getoption("--kind")
    if kind:
        families = frozenset(filter(None, config.getoption("--families").split(",")))
        Converter(kind, families, config.getoption("--init-std")).install()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    classes = {item.cls for item in items if getattr(item, "cls", None) is not None}  # type: ignore[attr-defined]
    for cls in classes:
        _adapt(cls, config.getoption("--without-attentions"))
    for name in {f"{cls.__module__.rpartition('.')[0]}.testing_utils" for cls in classes} & set(sys.modules):
        if hasattr(sys.modules[name], "_HUB_MODEL_ACCESSES"):  # PEFT goes online for models it has not met before
            sys.modules[name]._HUB_MODEL_ACCESSES = Met()  # type: ignore[attr-defined]


class Met(dict[str, int]):
    """Counts for names that were all met before."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


class Outcomes:
    """Collects the outcome of each test and how many models were converted.

    Args:
        path: Where they go at the end, as JSON.
    """

    conversions = 0

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tests: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "message": ""})
        if report.failed and test["outcome"] != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash else report.longrepr).strip()
            test.update(outcome="failed", message=message[:600])
        elif report.skipped and test["outcome"] == "passed" and type(report) is pytest.TestReport:
            test["outcome"] = "skipped"

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.path and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.path.write_text(json.dumps({"conversions": Outcomes.conversions, "tests": self.tests}, indent=1))


class Converter:
    """Converts models at the end of their outermost construction.

    Args:
        kind: One of `KINDS`.
        families: Model types that are converted; all others stay as they are.
        init_std: Standard deviation of initial weights in place of the testers', or None.
    """

    def __init__(self, kind: str, families: frozenset[str], init_std: float | None) -> None:
        self.kind = kind
        self.families = families
        self.init_std = init_std
        self.depth = 0

    def install(self) -> None:
        """Wrap the constructors of all model classes, those of modules that are imported later included."""
        from transformers import PreTrainedModel

        import hf_effattn.config

        # Tests meet untrained models: open the linear part, or nothing of it would be seen behind a window.
        hf_effattn.config.JOINS["log"] = 0.0
        for cls in _subclasses(PreTrainedModel):
            self._wrap_constructor(cls)
        self._wrap_later_subclasses(PreTrainedModel)
        if self.kind != "native":
            self._wrap_loading(PreTrainedModel)

    def _wrap_later_subclasses(self, base: type) -> None:
        original = base.__init_subclass__.__func__  # type: ignore[attr-defined]

        def __init_subclass__(cls: type, **kwargs: Any) -> None:
            original(cls, **kwargs)
            self._wrap_constructor(cls)

        base.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]

    def _wrap_constructor(self, cls: Any) -> None:
        original = cls.__init__

        @functools.wraps(original)
        def __init__(model: Any, *args: Any, **kwargs: Any) -> None:
            config = args[0] if args else kwargs.get("config")
            if self.depth or not self._is_wanted(config):
                return original(model, *args, **kwargs)
            if self.init_std and getattr(config, "initializer_range", None) == DEFAULT_STD:
                config.initializer_range = self.init_std
            if getattr(config, "is_effattn", False) and not _is_twin(type(model)):
                model.__class__ = _twin(type(model))  # a class of transformers given the config of a converted model
                original_of_twin = type(model).__init__
                return original_of_twin(model, *args, **kwargs)
            self.depth += 1
            try:
                original(model, *args, **kwargs)
            finally:
                self.depth -= 1
            self._convert(model)

        cls.__init__ = __init__

    def _is_wanted(self, config: Any) -> bool:
        model_type = str(getattr(config, "model_type", "")).removeprefix("effattn_")
        other = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
        return model_type in self.families and not other

    def _convert(self, model: Any) -> None:
        if getattr(model.config, "effattn", None) or self.kind == "native":
            return
        for layers, mechanism, options in KINDS[self.kind]:
            model.convert_attention(mechanism, layers=layers, **options)
        Outcomes.conversions += 1

    def _wrap_loading(self, base: Any) -> None:
        """Let `LlamaForCausalLM.from_pretrained(folder)` load what a converted model saved, as the Auto classes do."""
        original = base.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            if not _is_twin(cls) and kwargs.get("config") is None and _is_converted(path):
                return _twin(cls).from_pretrained(*args, **kwargs)
            return original(cls, *args, **kwargs)

        base.from_pretrained = classmethod(from_pretrained)


def _subclasses(cls: type) -> list[type]:
    found = list(cls.__subclasses__())
    return [*found, *(inner for sub in found for inner in _subclasses(sub))]


def _twin(cls: type) -> Any:
    from hf_effattn.integration.classes import model_class

    return model_class(cls)


def _is_twin(cls: type) -> bool:
    return bool(getattr(getattr(cls, "config_class", None), "is_effattn", False))


def _is_converted(path: Any) -> bool:
    config = Path(str(path)) / "config.json"
    return config.is_file() and str(json.loads(config.read_text()).get("model_type", "")).startswith("effattn_")


def _adapt(cls: Any, without_attentions: bool) -> None:
    """Replace, in a test class, the check of what a cache holds: it reads tensors that converted layers don't have."""
    if without_attentions and hasattr(cls, "has_attentions"):
        cls.has_attentions = False
    native = getattr(cls, "_check_past_key_values_for_generate", None)
    if native is not None and not hasattr(native, "is_adapted"):
        cls._check_past_key_values_for_generate = _cache_check(native)


def _cache_check(native: Callable[..., None]) -> Callable[..., None]:
    from torch.utils import _pytree as pytree

    from hf_effattn.cache import EffAttnCacheLayer

    def check(self: Any, batch_size: int, past_key_values: Any, seq_length: int | None, config: Any) -> None:
        layers = getattr(past_key_values, "layers", [])
        ours = [layer for layer in layers if isinstance(layer, EffAttnCacheLayer)]
        if not ours:
            return native(self, batch_size, past_key_values, seq_length, config)
        assert config.get_text_config(decoder=True).num_hidden_layers == len(past_key_values)
        length = past_key_values.get_seq_length()
        for layer in ours:
            assert layer.get_seq_length() == length
            for tensor in pytree.tree_leaves((layer.state, layer.pending)):
                if hasattr(tensor, "shape") and tensor.ndim:
                    assert tensor.shape[0] == batch_size
        if len(ours) < len(layers):  # the others as upstream checks them, in a cache where ours are made to look alike
            softmax = next(layer for layer in layers if layer not in ours)
            seeming = copy.copy(past_key_values)
            seeming.layers = [softmax if layer in ours else layer for layer in layers]
            native(self, batch_size, seeming, seq_length, config)

    check.is_adapted = True  # type: ignore[attr-defined]
    return check
