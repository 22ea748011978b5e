"""The record of an installation, which lives on the model, and what it tells about the model later."""

from dataclasses import dataclass, field

from torch import nn

from lora_fx.adapted import Adapted
from lora_fx.bypass import Patch
from lora_fx.config import LoRAConfig
from lora_fx.init_weights import InitWeights
from lora_fx.targets import clean_path

# The attribute of the model that holds it.
RECORD = "_lora_fx"


@dataclass
class Installation:
    """What `remove` needs to know. It names things instead of holding them, so copies and pickles of a model work."""

    config: LoRAConfig
    requires_grad: dict[str, bool]
    paths: tuple[str, ...] = ()
    """Of the linears and the modules of experts that got adapters."""
    patches: list[Patch] = field(default_factory=list)
    init_weights: InitWeights | None = None


def check_kept(model: nn.Module) -> None:
    """Raise ValueError if something that has no adapter took the place of an adapted module since `install`.

    Quantisation does that when it comes second: it makes new linears out of weight and bias. Modules whose path is gone
    are not missed, because a pipeline stage drops other stages' layers.
    """
    for path, holder in model.named_modules():
        record = holder.__dict__.get(RECORD)
        if not isinstance(record, Installation):
            continue
        modules = {clean_path(below): module for below, module in holder.named_modules(remove_duplicate=False)}
        lost = [at for at in record.paths if at in modules and not isinstance(modules[at], Adapted)]
        if lost:
            where = clean_path(f"{path}.{lost[0]}".strip("."))
            raise ValueError(
                f"{where} became a {type(modules[lost[0]]).__name__} after install and lost its adapter ({len(lost)} "
                f"in all): quantise first, then install, as lora_fx.convert(model, [quantise, LoRAConverter(config)])"
            )
