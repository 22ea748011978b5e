"""The bar charts of the GPU benchmarks, as PNG or SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GREY = "#22262b", "#8b939c"
COLOURS = ("#c3c9cf", "#8b939c", "#d9652b", "#8a4fa3", "#3c8d53", "#1f6fb4")


def draw_forms(path: Path, title: str, panels: Mapping[str, Mapping[str, float]]) -> None:
    """One horizontal bar a form, a panel a measure; the dashed line at 1 is the frozen block.

    Args:
        path: the file to write; its ending says the format.
        title: one line above the picture.
        panels: name of a measure -> form -> ratio to the frozen form, which is left out or 1.
    """
    height = 1.4 + 0.42 * max(len(forms) for forms in panels.values())
    figure = Figure(figsize=(9.6, height), dpi=150, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (measure, forms) in zip(row, panels.items()):
        colours = [COLOURS[-1] if form == "lora_fx" else COLOURS[0] for form in forms]
        bars = axes.barh(list(forms), list(forms.values()), color=colours, height=0.62)
        axes.bar_label(bars, [f"{value:.3f}" for value in forms.values()], padding=4, color=INK, fontsize=9)
        axes.invert_yaxis()
        axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_xlim(0.0, 1.18 * max(1.0, *forms.values()))
        axes.set_xlabel(f"{measure}, frozen block = 1", color=INK)
        axes.set_xticks([0.0, 0.5, 1.0])
        _style(axes)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")
    _save(figure, path)


def draw_cases(path: Path, title: str, cases: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Groups of bars, a group a case: what each form costs beyond the frozen block, in per cent.

    Args:
        path: the file to write; its ending says the format.
        title: one line above the picture.
        cases: the names of the groups.
        series: form -> ratio to the frozen form in each case, None where the form did not run.
    """
    figure = Figure(figsize=(max(7.0, 0.75 * len(cases) + 2), 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (form, ratios) in enumerate(series.items()):
        colour = COLOURS[-1] if form == "lora_fx" else COLOURS[number]
        places = [i + (number - (len(series) - 1) / 2) * width for i in range(len(cases))]
        drawn = [(place, 100 * (ratio - 1)) for place, ratio in zip(places, ratios) if ratio is not None]
        at, heights = [place for place, _ in drawn], [height for _, height in drawn]
        for bar in axes.bar(at, heights, width, color=colour, label=form):
            sign = 1 if bar.get_height() >= 0 else -1
            axes.annotate(
                f"{round(bar.get_height())}", (bar.get_x() + bar.get_width() / 2, bar.get_height()), color=INK,
                fontsize=8, xytext=(0, 2 * sign), textcoords="offset points", ha="center",
                va="bottom" if sign > 0 else "top",
            )  # fmt: skip
    axes.set_xticks(range(len(cases)), cases, rotation=35, ha="right")
    axes.set_ylabel("time over the frozen block, %", color=INK)
    axes.axhline(0.0, color=INK, linewidth=1.0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    _style(axes)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, length=0)
