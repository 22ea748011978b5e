"""`LoRAConfig`: what to adapt and how, validated when it is written and not when a model meets it."""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

ALL_LINEAR = "all-linear"
# Those that put a part of the base weight into the factors, and what they leave of it in its place.
CHANGES_BASE = ("pissa", "olora")
INITS = ("kaiming", "gaussian", "orthogonal", *CHANGES_BASE)

# A pattern as a user writes it: a module name, "re:<regular expression>", or a compiled regular expression.
PatternLike = str | re.Pattern[str]
# The keys of a Mapping are invariant: with the last kind alone, a `dict[str, int]` would not do.
Ranks = Mapping[str, int] | Mapping[re.Pattern[str], int] | Mapping[PatternLike, int]
Alphas = Mapping[str, float] | Mapping[re.Pattern[str], float] | Mapping[PatternLike, float]

_REGEX = "re:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What to adapt, with how many numbers, and how the adapters start.

    The adapted linear computes ``y = base(x) + scale * (dropout(x) A^T) B^T`` with A [R, K], B [N, R] and
    ``scale = alpha / R`` (arXiv:2106.09685) or ``alpha / sqrt(R)`` with `use_rslora` (arXiv:2312.03732).

    A *pattern* is one of:

    - a name: the full dotted path of a module, or its end in whole path segments. ``"wq"`` and ``"attention.wq"``
      match ``layers.0.attention.wq``; ``"q"`` does not;
    - ``"re:<regular expression>"`` or a compiled `re.Pattern`, which must match the full path from end to end.

    Args:
        rank: R, a positive integer.
        alpha: the numerator of the scale, positive and finite.
        dropout: the probability of dropping an input element of the low-rank branch while training, in [0, 1).
        target_modules: ``"all-linear"`` (every `nn.Linear` and subclass), or one pattern or several that name linears.
        target_parameters: patterns that name parameters which are stacks of matrices [E, N, K]: the routed experts of a
            mixture (``"experts.gate_up_proj"``), each of which gets an adapter of its own. None is adapted unless it is
            named here. With this field, which is PEFT's, `target_modules` may be empty.
        exclude_modules: patterns that are not adapted. One that names a container leaves out all linears below it.
        modules_to_save: patterns that name modules of any kind which are trained whole, with everything below them, and
            are not adapted: a new head, say. `adapter_parameters` and adapter files hold them too.
        rank_pattern: pattern -> rank, for modules that differ from `rank`.
        alpha_pattern: pattern -> alpha, for modules that differ from `alpha`.
        use_rslora: scale by ``alpha / sqrt(R)``.
        use_dora: train the lengths of the adapted weight's rows apart from it (arXiv:2402.09353, see
            `lora_fx.DoRAModule`): ``y = m / ||W + scale * B A|| * (W x + scale * B A x) + bias``, m [N].
        init: how A starts, B being zero: ``"kaiming"`` (uniform with a = sqrt(5), as `nn.Linear`) or ``"gaussian"``
            (normal with standard deviation 1 / R). Or how both start: ``"orthogonal"`` (to one another, so that B A is
            zero, as in PEFT; ranks must be even), ``"pissa"`` (from the largest singular vectors of the weight,
            arXiv:2404.02948) or ``"olora"`` (from its QR decomposition, arXiv:2406.01775). The last two leave a
            residual in the weight's place, so that the sum is what it was; see `lora_fx.install`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is of the right type and makes no sense. What only a model can tell (a pattern that
            matches nothing) is raised by `lora_fx.install`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: PatternLike | Sequence[PatternLike] = ALL_LINEAR
    target_parameters: PatternLike | Sequence[PatternLike] = ()
    exclude_modules: PatternLike | Sequence[PatternLike] = ()
    modules_to_save: PatternLike | Sequence[PatternLike] = ()
    # Dictionaries are compared and left out of the hash: equal configurations still hash equal.
    rank_pattern: Ranks = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: Alphas = dataclasses.field(default_factory=dict, hash=False)
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        _check_rank("rank", self.rank)
        self._set("target_parameters", _checked_patterns("target_parameters", self.target_parameters))
        self._set("alpha", _checked_alpha("alpha", self.alpha))
        self._set("dropout", _checked_dropout(self.dropout))
        if self.target_modules != ALL_LINEAR:
            targets = _checked_patterns("target_modules", self.target_modules)
            if not targets and not self.target_parameters:
                raise ValueError(f'target_modules is empty: name at least one module, or pass "{ALL_LINEAR}"')
            self._set("target_modules", targets)
        self._set("exclude_modules", _checked_patterns("exclude_modules", self.exclude_modules))
        self._set("modules_to_save", _checked_patterns("modules_to_save", self.modules_to_save))
        ranks = _checked_mapping("rank_pattern", self.rank_pattern)
        for pattern, rank in ranks.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        self._set("rank_pattern", ranks)
        alphas = _checked_mapping("alpha_pattern", self.alpha_pattern)
        self._set("alpha_pattern", {p: _checked_alpha(f"alpha_pattern[{p!r}]", a) for p, a in alphas.items()})
        for name, value in (("use_rslora", self.use_rslora), ("use_dora", self.use_dora)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        if not isinstance(self.init, str):
            raise TypeError(f"init must be a str, got {self.init!r}")
        if self.init not in INITS:
            raise ValueError(
                f"init must be one of {', '.join(INITS)}; got {self.init!r}{_did_you_mean(self.init, INITS)}"
            )
        if self.init == "orthogonal" and (odd := [rank for rank in (self.rank, *ranks.values()) if rank % 2]):
            raise ValueError(f"init='orthogonal' needs even ranks, got {odd[0]}")
        if self.use_dora and self.init in CHANGES_BASE:
            raise ValueError(f"use_dora with init={self.init!r} is not supported: use one of the two")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def scale(self, rank: int, alpha: float) -> float:
        """``alpha / R``, or ``alpha / sqrt(R)`` with `use_rslora`."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it; `from_dict` reads it back to an equal configuration."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """The inverse of `as_dict`; a key that is no field is a TypeError naming the nearest field."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise TypeError(f"LoRAConfig has no field {name!r}{_did_you_mean(name, names)}")
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _checked_alpha(name: str, value: object) -> float:
    alpha = _number(name, value)
    # The scale lives in a float32 buffer: what float32 cannot hold would silently become 0 or inf there.
    limits = torch.finfo(torch.float32)
    if not (limits.tiny <= alpha <= limits.max):
        raise ValueError(f"{name} must be positive and finite (in float32), got {value!r}")
    return alpha


def _checked_dropout(value: object) -> float:
    dropout = _number("dropout", value)
    if not (0.0 <= dropout < 1.0):
        raise ValueError(f"dropout must be in [0, 1), got {value!r}")
    return dropout


def _checked_patterns(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, (str, re.Pattern)):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise TypeError(f"{name} must be a pattern or a sequence of patterns, got {value!r}")
    patterns = tuple(_checked_pattern(name, item) for item in value)
    for pattern in patterns:
        if patterns.count(pattern) > 1:
            raise ValueError(f"{name} holds {pattern!r} twice")
    return patterns


def _checked_mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from a pattern to a number, got {value!r}")
    return dict(zip(_checked_patterns(name, value.keys()), value.values()))


def _checked_pattern(name: str, value: object) -> str:
    """The one form in which a pattern is kept: a dotted name or ``re:<regular expression>``."""
    if isinstance(value, re.Pattern):
        if not isinstance(value.pattern, str):
            raise TypeError(f"{name}: {value!r} matches bytes; module paths are str")
        return _REGEX + _regex_text(value)
    if not isinstance(value, str):
        raise TypeError(f"{name}: a pattern is a str or a compiled regular expression, got {value!r}")
    if value.startswith(_REGEX):
        try:
            re.compile(value.removeprefix(_REGEX))
        except re.error as error:
            raise ValueError(f"{name}: {value!r} is no regular expression: {error}") from error
        return value
    if value == ALL_LINEAR:
        raise ValueError(f'{name}: "{ALL_LINEAR}" stands alone as target_modules; it is no module name')
    if not all(segment and segment == segment.strip() for segment in value.split(".")):
        raise ValueError(f"{name}: {value!r} is no module name: a dotted path with an empty segment or with spaces")
    return value


def _regex_text(pattern: re.Pattern[str]) -> str:
    """An expression that compiles to `pattern`, flags included."""
    letters = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE}
    flags = "".join(letter for letter, flag in letters.items() if pattern.flags & flag)
    # An expression may carry its flags itself, and Python refuses a group of global flags that is not at the start.
    for text in (pattern.pattern, f"(?{flags}){pattern.pattern}"):
        with contextlib.suppress(re.error):
            if re.compile(text).flags == pattern.flags:
                return text
    raise ValueError(f"{pattern!r} has flags that cannot be written into it: put them at its start, as (?ix)")


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern, in the form that `LoRAConfig` keeps, matches the full dotted `path` of a module."""
    if pattern.startswith(_REGEX):
        return re.fullmatch(pattern.removeprefix(_REGEX), path) is not None
    return path == pattern or path.endswith("." + pattern)
