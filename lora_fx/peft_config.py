"""PEFT's `adapter_config.json`: what one says of every module, and how one is written that says what a model computes.

The rules by which PEFT finds modules are written down here once (`PeftConfig`), checked against peft 0.21. Which
tensors a file holds is `lora_fx.peft_files`' business.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_fx.config import ALL_LINEAR
from lora_fx.targets import WRAPPER_SEGMENTS, clean_path

Value = TypeVar("Value", int, float)

# Initialisations that leave the base weights alone, with our names for them. Others (PiSSA, OLoRA, LoftQ, ...) change
# the base, and their tensors mean nothing beside the base that everybody has.
_PLAIN_INITS = {
    True: "kaiming",
    False: "kaiming",
    None: "kaiming",
    "eva": "kaiming",  # it looks at data, and cannot be repeated without
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}

# Settings that make an adapter something else than ``scale * B A`` on a linear, with what a user can do.
_UNSUPPORTED = {
    "trainable_token_indices": "trained tokens are not supported: merge the adapter into the base in PEFT",
    "lora_bias": "a bias of the low-rank branch is not supported: train with lora_bias=False",
    "layer_replication": "replicated layers are not supported: load into a model that has them, without this setting",
    "alora_invocation_tokens": "activated LoRA is not supported: it is no function of the input of one linear",
    "use_qalora": "QALoRA is not supported: train with use_qalora=False",
    "use_bdlora": "block-diagonal LoRA is not supported: train without it",
    "arrow_config": "Arrow routing is not supported: load one adapter at a time",
    "kasa_config": "KaSA is not supported: train without it",
    "velora_config": "VeLoRA is not supported: train without it",
    "monteclora_config": "MonteCLoRA is not supported: train without it",
}


@dataclass(frozen=True)
class PeftConfig:
    """What `adapter_config.json` says, checked as far as it can be without tensors and model."""

    file: Path
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    init: str
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The numerator of the scale of the module at `path`."""
        return _by_pattern(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """What multiplies the low-rank product of the module at `path`."""
        return self.alpha_of(path) / _divisor(self.rank_of(path), self.use_rslora)

    def targets(self, path: str, *, hidden: bool = False) -> bool:
        """Whether the linear at `path` gets an adapter; with `hidden`, also where `modules_to_save` hides it."""
        if _named(self.exclude_modules, path):
            return False
        if not hidden and hides(self.modules_to_save, path):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or _named(self.target_modules, path)
        if path in self.target_modules:
            return True
        return _named(self.target_modules, path) and (not self.layers_to_transform or self._in_a_chosen_layer(path))

    def targets_parameter(self, path: str) -> bool:
        """Whether the parameter at `path` gets an adapter."""
        return _named(self.target_parameters, path)

    def trains(self, path: str) -> bool:
        """Whether the module at `path` is trained whole. PEFT compares ends of paths, and not of whole segments."""
        return path.endswith(self.modules_to_save) if self.modules_to_save else False

    def _in_a_chosen_layer(self, path: str) -> bool:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(pattern, path) for pattern in patterns)), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def hides(modules_to_save: Collection[str], path: str) -> bool:
    """Whether PEFT leaves the linear at `path` out: one of the names is among the segments of its path."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in modules_to_save)


def read_config(file: Path) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Raises:
        ValueError: it is not there, is no JSON, or asks for what this package does not do; the text names the file.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is not there{_elsewhere(file)}") from error
    except ValueError as error:  # both JSON's and Unicode's
        raise ValueError(f"{file} is no JSON, or was cut short ({error}): save the adapter again") from error
    try:
        return _checked(file, values)
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{file}: {error}") from error


def config_values(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    parameters: Collection[str],
    others: Collection[str],
    trained: Collection[str],
    dropout: float,
    use_rslora: bool,
    use_dora: bool,
    inits: Collection[str],
    base: str | None,
) -> dict[str, Any]:
    """The content of an `adapter_config.json` from which PEFT computes exactly these ranks and scales.

    Args:
        ranks: of everything adapted, by its path.
        scales: likewise; numbers that float32 holds.
        parameters: which of them are parameters; the rest are linears.
        others: paths of the modules that are not adapted.
        trained: paths of the modules that are trained whole.
        dropout: of all of them; PEFT loads no adapted parameters with dropout.
        use_rslora: whether alphas are to be divided by sqrt(R) and not by R. The scales are the same either way.
        use_dora: whether they have magnitudes.
        inits: how they started; PEFT's default where there are several, or where that changed the base.
        base: the name or path of the base model, where one is known.
    """
    alphas = {path: _alpha(scale, ranks[path], use_rslora) for path, scale in scales.items()}
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_modules([path for path in ranks if path not in parameters], others),
        **({"target_parameters": list(parameters)} if parameters else {}),
        "rank_pattern": {_exactly(path): other for path, other in ranks.items() if other != rank},
        "alpha_pattern": {_exactly(path): other for path, other in alphas.items() if other != alpha},
        "use_rslora": use_rslora,
        "use_dora": use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": init if (init := "".join(inits)) in ("gaussian", "orthogonal") else True,
        "modules_to_save": list(trained) or None,
    }


def _divisor(rank: int, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else rank


def _alpha(scale: float, rank: int, use_rslora: bool) -> float:
    """The shortest number that, divided again, gives `scale` in float32."""
    divisor = _divisor(rank, use_rslora)
    exact = scale * divisor
    for digits in range(7):
        short = round(exact, digits)
        if torch.tensor(short / divisor, dtype=torch.float32).item() == scale:
            return int(short) if short == int(short) else short
    return exact


def _usual(numbers: Collection[Value]) -> Value:
    return Counter(numbers).most_common(1)[0][0]


def _exactly(path: str) -> str:
    """A key of a pattern, which PEFT takes for the end of a path or a regular expression, that matches `path` alone."""
    return f"^{re.escape(path)}"


def _target_modules(paths: list[str], others: Collection[str]) -> list[str] | str:
    """Full paths; one regular expression where a path is also the end of another one, which PEFT would adapt too."""
    ends = set(paths)
    for other in others:
        segments = other.split(".")
        if any(".".join(segments[start:]) in ends for start in range(1, len(segments))):
            return "|".join(map(re.escape, paths))
    return paths


def _by_pattern(patterns: Mapping[re.Pattern[str], Value], path: str, default: Value) -> Value:
    return next((number for pattern, number in patterns.items() if pattern.match(path)), default)


def _named(names: str | tuple[str, ...], path: str) -> bool:
    """Whether a regular expression matches the whole path, or one of several names its end in whole segments."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _elsewhere(file: Path) -> str:
    """Where PEFT may have put what is missing."""
    below = sorted(str(path.parent) for path in file.parent.glob(f"*/{file.name}"))
    if below:
        return f": PEFT saves an adapter that is not called 'default' in a folder below; pass {' or '.join(below)}"
    return ": pass the folder that save_adapter or PEFT's save_pretrained wrote"


def _checked(file: Path, values: Any) -> PeftConfig:
    if not isinstance(values, dict):
        raise ValueError("the file must hold an object of settings: save the adapter again")
    if (kind := values.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type is {kind!r}, and only 'LORA' is supported: it is another kind of adapter")
    for name, fix in _UNSUPPORTED.items():
        if values.get(name):
            raise ValueError(f"{name} is {values[name]!r}: {fix}")
    init = values.get("init_lora_weights")
    if isinstance(init, (list, dict)) or init not in _PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights is {init!r}, which changed the base weights: save in PEFT with "
            f"path_initial_model_for_weight_conversion, which makes an ordinary adapter of it"
        )
    if (bias := values.get("bias", "none")) != "none":
        raise ValueError(f"bias is {bias!r}: trained biases are not supported, train with bias='none'")
    targets = _names(values, "target_modules")
    parameters = _names(values, "target_parameters")
    if isinstance(parameters, str):
        raise ValueError(f"target_parameters must be a list of strings, got {parameters!r}")
    if not targets and not parameters:
        raise ValueError("target_modules is empty: name the adapted linears")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    config = PeftConfig(
        file=file,
        rank=_rank("r", values.get("r", 8)),  # PEFT's defaults
        alpha=_number("lora_alpha", values.get("lora_alpha", 8)),
        dropout=_number("lora_dropout", values.get("lora_dropout", 0.0)),
        use_rslora=bool(values.get("use_rslora")),
        use_dora=bool(values.get("use_dora")),
        init=_PLAIN_INITS[init],
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=_names(values, "exclude_modules"),
        modules_to_save=_several(_names(values, "modules_to_save")),
        rank_pattern=_patterns(values, "rank_pattern", _rank),
        alpha_pattern=_patterns(values, "alpha_pattern", _number),
        layers_to_transform=_layers(values.get("layers_to_transform")),
        layers_pattern=_several(_names(values, "layers_pattern")),
    )
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {config.dropout!r}")
    for expression in (
        config.target_modules,
        config.exclude_modules,
        *config.layers_pattern,
        *config.modules_to_save,
    ):
        if isinstance(expression, str):
            re.compile(expression)
    return config


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    # Scales live in float32 buffers.
    most = torch.finfo(torch.float32).max
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= most:
        raise ValueError(f"{name} must be a finite number (in float32), got {value!r}")
    return value


def _names(values: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    """A regular expression, or names; both without the segments of wrappers around the model that was saved."""
    value = values.get(name) or ()
    if isinstance(value, str):
        for segment in WRAPPER_SEGMENTS:
            value = value.replace(segment + r"\.", "").replace(segment + ".", "")
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
    return tuple(map(clean_path, value))


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _patterns(
    values: Mapping[str, Any], name: str, checked: Callable[[str, Any], Value]
) -> dict[re.Pattern[str], Value]:
    """Number by compiled expression, in the file's order, the first that matches being the one that counts."""
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}")
    numbers = {_names({name: pattern}, name): checked(f"{name}[{pattern!r}]", n) for pattern, n in value.items()}
    return {re.compile(rf"(.*\.)?({pattern})$"): number for pattern, number in numbers.items()}


def _layers(value: Any) -> tuple[int, ...]:
    layers = [value] if isinstance(value, int) else value or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers_to_transform must be an integer or a list of them, got {value!r}")
    return tuple(layers)
