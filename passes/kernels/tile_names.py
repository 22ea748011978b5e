"""What the kernels of tile programs, and their arguments, are called."""

from __future__ import annotations

from lora_fx.passes.kernels.tile_program import Program


class Names:
    """What the arguments of a program are called, in their order; with a prefix where it is one of several."""

    def __init__(self, program: Program, prefix: str = "") -> None:
        kinds = [kind[0] for kind in program.inputs]
        self.inputs = [f"{prefix}in{i}" for i in range(len(kinds))]
        small = [i for i, kind in enumerate(kinds) if kind in ("thin", "factor")]
        self.strides = [f"{prefix}{name}{i}" for i in small for name in ("outer", "inner")]
        self.outputs = [f"{prefix}out{i}" for i in range(len(program.outputs))]
        values = [f"in{i}" for i, kind in enumerate(kinds) if kind == "full"]
        values += [f"out{i}" for i, statement in enumerate(program.outputs) if statement[0] == "store"]
        self.constants = [f"{prefix}{value}_{name}" for value in values for name in ("stride", "along", "apart")]
        self.constants.append(f"{prefix}EVEN_ROWS")
        self.seeds = [f"{prefix}in{i}" for i, kind in enumerate(kinds) if kind == "seed"]

    @property
    def all(self) -> list[str]:
        return [*self.inputs, *self.strides, *self.outputs, "M", *self.constants]

    @property
    def typed(self) -> list[str]:
        return [*self.all[: -len(self.constants)], *(f"{name}: tl.constexpr" for name in self.constants)]


def head(programs: list[Program], names: list[Names]) -> list[str]:
    """The first lines of a kernel. All that is of one kind comes together, as :mod:`tile_launch` gives it."""
    seeds = [seed for each in names for seed in each.seeds]  # a seed is one of several side by side
    arguments = [n for kind in ("inputs", "strides", "outputs") for each in names for n in getattr(each, kind)]
    arguments += ["M", *(f"{constant}: tl.constexpr" for each in names for constant in each.constants)]
    name = name_of_all(programs)
    return [f"@triton.jit(do_not_specialize_on_alignment={seeds})", f"def {name}({', '.join(arguments)}):"]


def name_of(program: Program) -> str:
    """What profilers call the kernel: how many statements of each kind it has, and N."""
    kinds = [statement[0] for statement in program.body]
    counts = "_".join(
        f"{kinds.count(k)}{k}" for k in ("load", "product", "store", "down", "across", "largest") if k in kinds
    )
    return f"lora_fx_{counts}_n{program.columns}"


def name_of_all(programs: list[Program]) -> str:
    """Likewise, of a launch."""
    names = [name_of(program) for program in programs]
    if len(names) == 1:
        return names[0]
    each = [name.removeprefix("lora_fx_") for name in names]
    return "lora_fx_" + "_and_".join(f"{each.count(name)}x_{name}" for name in dict.fromkeys(each))
