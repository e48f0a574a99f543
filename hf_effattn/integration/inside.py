"""A PEFT adapter inside a model, without the `PeftModel` around it, and its way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

PLACE = "_effattn_adapter"  # the attribute of a model with such an adapter


@dataclass
class Inside:
    """What takes the adapter out again; copied with the model.

    Args:
        tuned: The `PeftModel`, which holds the model.
        trainable: Names of the parameters that were trainable before PEFT froze them.
    """

    tuned: Any
    trainable: set[str]


def keep_inside(model: PreTrainedModel, tuned: Any, trainable: set[str]) -> None:
    """Leave the adapter of `tuned` in the layers of `model`, known to transformers' own methods for adapters."""
    setattr(model, PLACE, Inside(tuned, trainable))
    model._hf_peft_config_loaded = True


def take_out(model: PreTrainedModel, merge: bool = False) -> bool:
    """Take the adapter out of `model`, after adding it to the weights if `merge`; return whether there was one."""
    inside = vars(model).get(PLACE)
    if inside is None:
        return False
    if merge:
        inside.tuned.merge_and_unload()
    else:
        unload(inside.tuned)
    for name in (PLACE, "peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in inside.trainable)
    return True


def unload(tuned: Any) -> None:
    """Take the adapter of a `PeftModel` out of the model in it; PEFT would leave its `modules_to_save` there."""
    from peft.utils import ModulesToSaveWrapper

    model = tuned.get_base_model()
    wrappers = {name: each for name, each in model.named_modules() if isinstance(each, ModulesToSaveWrapper)}
    tuned.unload()
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper.original_module)


def refuse_saving(model: PreTrainedModel) -> None:
    """Raise for a model with an adapter inside, of which transformers would save LoRA and lose the conversion."""
    if PLACE in vars(model):
        raise ValueError(
            "the model holds an adapter that convert_attention loaded. Save it by "
            "hf_effattn.recovery.save_adapter(model, folder), or the whole model after merge_adapter(model)"
        )
