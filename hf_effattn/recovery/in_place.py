"""Loading an adapter into the model itself: its class stays, and `revert_attention` takes everything out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel

from .. import integration
from .adapter_files import PEFT_PREFIX, Saved, read
from .adapter_names import local
from .adapters import load_adapter

# Fields of PEFT's config, and the values with which layers work by themselves and leave the base weights as they are.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
}


def load_in_place(model: PreTrainedModel, adapter: str | Path, mechanism: Any) -> None:
    """Do what `load_adapter` does, without a `PeftModel` around `model`; what is loaded is frozen.

    Raises:
        FileNotFoundError: for a missing folder or file.
        ValueError: as `load_adapter` does, for a mechanism that the adapter does not have, and for an adapter that
            needs the `PeftModel` or changes weights of the base. The model is then as it was.
    """
    saved = read(local(adapter))
    _check_mechanism(saved, mechanism)
    _check_plain(model, saved)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = model.training
    loaded = load_adapter(model, saved.folder)
    if loaded is not model:
        integration.keep_inside(model, loaded, trainable)
        model.train(training)  # PEFT has put all of it into evaluation mode


def _check_mechanism(saved: Saved, mechanism: Any) -> None:
    had = sorted({layer["mechanism"] for layer in saved.layers if layer})
    if mechanism not in had:
        names = " and ".join(map(repr, had))
        raise ValueError(f"the adapter in {saved.folder} has layers of {names}; got the mechanism {mechanism!r}")


def _check_plain(model: PreTrainedModel, saved: Saved) -> None:
    """Raise a ValueError unless the PEFT adapter, if there is one, is LoRA that can be taken out without a trace."""
    if saved.peft is None:
        return
    config = PeftConfig.from_pretrained(str(saved.folder))
    values = {field: getattr(config, field, fine[0]) for field, fine in PLAIN.items()}
    odd = {field: getattr(value, "value", value) for field, value in values.items() if value not in PLAIN[field]}
    reasons = [f"has {field}={value!r}" for field, value in odd.items()]
    reasons += [f"changes {key}" for key in _of_the_base(model, saved, getattr(config, "modules_to_save", None) or [])]
    if reasons:
        raise ValueError(
            f"the PEFT adapter in {saved.folder} {reasons[0]}, so it cannot be loaded into the model itself and be "
            "taken out again; hf_effattn.recovery.load_adapter takes it"
        )


def _of_the_base(model: PreTrainedModel, saved: Saved, copied: list[str]) -> list[str]:
    """Return the parameters of the base that PEFT would overwrite; those of modules in `copied` it keeps apart."""
    base = {name for name, _ in model.named_parameters()}
    keys = [key.removeprefix(PEFT_PREFIX) for key in saved.peft or {}]
    overwritten = [key for key in keys if key in base or ".base_layer." in key]
    return [key for key in overwritten if not any(f".{name}." in f".{key}" for name in copied)]
