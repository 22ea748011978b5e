"""PEFT's two files of an adapter as values: read and checked as far as it can be without a model, and encoded.

adapter_config.json          see `lora_fx.peft_config`
adapter_model.safetensors    base_model.model.<path>.lora_A.weight [R, K], base_model.model.<path>.lora_B.weight [N, R],
                             base_model.model.<path>.lora_magnitude_vector [N] (DoRA),
                             base_model.model.<path>.<name in its state_dict> of modules that are trained whole
                             of experts, see `lora_fx.peft_experts`
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_fx.packed import is_activation_dtype
from lora_fx.peft_config import PeftConfig, read_config
from lora_fx.targets import clean_path

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEYS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True)
class Factors:
    """A [R, K] and B [N, R] of one linear, and DoRA's magnitudes [N]; or A [E, R, K] and B [E, N, R] of experts."""

    lora_a: Tensor
    lora_b: Tensor
    lora_magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[-2]

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that they have as parameters."""
        held = {name: getattr(self, name) for name in _KEYS}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds: `factors` by their path in it, without what wrappers put into paths, as matrices.

    `trained` has, by their full names, the tensors of modules that are trained whole.
    """

    tensors: Path
    config: PeftConfig
    factors: Mapping[str, Factors]
    trained: Mapping[str, Tensor]


def read_files(folder: Path) -> AdapterFiles:
    """Read an adapter.

    Raises:
        ValueError: a file is missing, cut short or no adapter of this kind, a key is not one of PEFT's, a factor lacks
            the other one, or the ranks contradict the configuration. The text names the file, and the path or key.
    """
    config = read_config(folder / CONFIG)
    file = folder / TENSORS
    halves: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(file).items():
        path, name = _split(file, key, config)
        if not name:
            if path in trained:
                raise ValueError(f"{file}: {path} is there twice, once with a wrapper's name in its key: drop one")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{file}: {key} holds NaN or infinity: take an earlier checkpoint")
            trained[path] = tensor
            continue
        if name in halves.setdefault(path, {}):
            raise ValueError(f"{file}: {path} has {_KEYS[name]} twice, once with a wrapper's name in its key: drop one")
        if tensor.ndim != (1 if name == "lora_magnitude" else 2) or not is_activation_dtype(tensor.dtype):
            raise ValueError(
                f"{file}: {key} is {tensor.dtype} {list(tensor.shape)}, and must be a "
                f"{'vector' if name == 'lora_magnitude' else 'matrix'} of floating point numbers of 16 bits or more: "
                f"save the adapter again"
            )
        halves[path][name] = tensor
    if not halves:
        raise ValueError(f"{file} holds no tensors of adapters: save the adapter again")
    factors = {path: _factors(file, config, path, half) for path, half in halves.items()}
    return AdapterFiles(file, config, factors, trained)


def check_rank(config: PeftConfig, file: Path, path: str, rank: int) -> None:
    """Raise ValueError if `config` gives what is at `path` another rank than its tensors in `file` have."""
    if rank != config.rank_of(path):
        raise ValueError(
            f"{config.file} gives {path} rank {config.rank_of(path)}, and its tensors in {file} have rank "
            f"{rank}: the two files are not of one adapter, or r and rank_pattern were edited"
        )


def encoded(
    factors: Mapping[str, Factors], trained: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, bytes]:
    """The content of the two files, by name."""
    tensors = {
        f"{PREFIX}{path}.{_KEYS[name]}": tensor
        for path, held in factors.items()
        for name, tensor in held.named().items()
    }
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in trained.items()}
    return {
        TENSORS: save(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, allow_nan=False) + "\n").encode(),
    }


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        pickled = file.with_suffix(".bin")
        fix = "save it again with safe_serialization=True (pickles are not read)" if pickled.exists() else "save again"
        raise ValueError(f"{file} is not there: {fix}")
    try:
        with safe_open(file, "pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(f"{file} was cut short or is no safetensors file ({error}): save the adapter again") from error


def _split(file: Path, key: str, config: PeftConfig) -> tuple[str, str]:
    """The path of the linear that a key belongs to, and which factor it is.

    Of a tensor of a module that is trained whole it is the tensor's full name, and nothing.
    """
    if not key.startswith(PREFIX):
        raise ValueError(
            f"{file}: {key!r} does not start with {PREFIX!r}, and PEFT would ignore it: rename the tensors, or save "
            f"the adapter again with save_adapter or PEFT's save_pretrained"
        )
    path = clean_path(key.removeprefix(PREFIX))
    for name, end in _KEYS.items():
        if path.endswith("." + end):
            return path.removesuffix("." + end), name
    segments = path.split(".")
    if any(config.trains(".".join(segments[:end])) for end in range(1, len(segments))):
        return path, ""
    raise ValueError(f"{file}: {key!r} is {_what(path)}")


def _what(path: str) -> str:
    if "lora_embedding_" in path:
        return "an adapter of an embedding, which is not supported: adapt linears alone"
    if named := re.search(r"\.lora_[AB]\.(.+)\.weight$", path):
        return f"a key with the adapter's name in it: drop '.{named[1]}', or save it with PEFT's save_pretrained"
    return (
        "no factor of a linear (lora_A.weight or lora_B.weight), and modules_to_save does not name its module: drop it "
        "from the file, and load it by itself"
    )


def _factors(file: Path, config: PeftConfig, path: str, half: Mapping[str, Tensor]) -> Factors:
    for name, key in _KEYS.items():
        if name not in half and (name != "lora_magnitude" or config.use_dora):
            raise ValueError(f"{file}: {PREFIX}{path}.{key} is missing: save the adapter again")
    if "lora_magnitude" in half and not config.use_dora:
        raise ValueError(
            f"{file} has magnitudes of DoRA ({path}), and use_dora in {config.file} is not set: the two files are not "
            f"of one adapter; PEFT would ignore the magnitudes"
        )
    factors = Factors(half["lora_a"], half["lora_b"], half.get("lora_magnitude"))
    if factors.lora_b.shape[1] != factors.rank:
        raise ValueError(
            f"{file}: {path} has lora_A {list(factors.lora_a.shape)} and lora_B {list(factors.lora_b.shape)}, whose "
            f"ranks are not equal: save the adapter again"
        )
    if (magnitude := factors.lora_magnitude) is not None and len(magnitude) != len(factors.lora_b):
        raise ValueError(
            f"{file}: {path} has lora_B {list(factors.lora_b.shape)} and lora_magnitude_vector "
            f"{list(magnitude.shape)}, which do not belong together: save the adapter again"
        )
    if not config.target_parameters:  # or else the model has to say what these are of
        check_rank(config, file, path, factors.rank)
    for name, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {PREFIX}{path}.{_KEYS[name]} holds NaN or infinity: take an earlier checkpoint")
    return factors
