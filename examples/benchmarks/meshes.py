"""The jobs of `ranks.py`: which options of `train_3d.py` are a mesh, and how large a model and a batch are."""

from options_3d import parse as parse_job

# name -> its options of `train_3d.py`.
MESHES: dict[str, list[str]] = {
    "tp2": ["--tp", "2"],
    "tp2-async": ["--tp", "2", "--async-tp"],
    "dp2": ["--dp", "2"],
    "cp2": ["--cp", "2"],
    "pp2": ["--pp", "2"],
    "ep2": ["--dp", "2", "--ep", "2", "--adapt-experts"],
    "tp4": ["--tp", "4"],
    "tp4-async": ["--tp", "4", "--async-tp"],
    "dp4": ["--dp", "4"],
    "cp4": ["--cp", "4"],
    "ep4": ["--dp", "4", "--ep", "4", "--adapt-experts"],
    "dp2-tp2": ["--dp", "2", "--tp", "2"],
    "pp2-tp2": ["--pp", "2", "--tp", "2"],
    "pp2-dp2": ["--pp", "2", "--dp", "2"],
    "pp2-cp2": ["--pp", "2", "--cp", "2"],
    "dp2-cp2": ["--dp", "2", "--cp", "2"],
    "ep2-tp2": ["--dp", "2", "--ep", "2", "--tp", "2", "--adapt-experts"],
    "pp2-dp2-tp2": ["--pp", "2", "--dp", "2", "--tp", "2"],
    "pp2-dp2-cp2": ["--pp", "2", "--dp", "2", "--cp", "2"],
    "tp8": ["--tp", "8"],
    "tp8-async": ["--tp", "8", "--async-tp"],
    "dp8": ["--dp", "8"],
    "ep8": ["--dp", "8", "--ep", "8", "--adapt-experts"],
}
# model -> sequences a step for each rank, tokens of a sequence, dtype, rank.
SIZES: dict[str, tuple[int, int, str, int]] = {
    "8B": (2, 4096, "bfloat16", 16),
    "mixtral": (2, 4096, "bfloat16", 16),
    "moe": (2, 4096, "bfloat16", 16),
    "debug": (4, 512, "float32", 8),
    "tiny": (4, 128, "float32", 4),
    "tiny-moe": (4, 128, "float32", 4),
}


def fits(model: str, mesh: str) -> bool:
    """Whether a model is for a mesh: one with experts needs ranks to spread them over."""
    return model != "mixtral" or "--ep" in MESHES[mesh]


def job(mesh: str, model: str, steps: int, *, whole: bool = False) -> list[str]:
    """The options of `train_3d.py` for a mesh; `whole`, for its batch on one GPU."""
    mixture = "--ep" in MESHES[mesh]
    model = {"8B": "moe", "tiny": "tiny-moe"}.get(model, model) if mixture else model
    sequences, length, dtype, rank = SIZES[model]
    degrees = parse_job([*MESHES[mesh], "--compile", "block"]).degrees
    # As many tokens a rank on every mesh. (Tensor-parallel ranks that share one rank's tokens wait for their CPUs.)
    shares = degrees.world
    options = ["--model", model, "--compile", "block", "--exclude", "output", "--draw", "device"]
    options += ["--batch", str(sequences * shares), "--length", str(length), "--dtype", dtype, "--rank", str(rank)]
    options += ["--steps", str(steps), "--lr", "1e-4"]
    if whole:
        return [*options, "--microbatches", str(shares), *(["--adapt-experts"] if mixture else [])]
    return [*options, *MESHES[mesh], *(["--microbatches", str(degrees.pp)] if degrees.pp > 1 else [])]
