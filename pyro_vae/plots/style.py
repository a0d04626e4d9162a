"""How every figure here looks: colours, type sizes, axes."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart with every common colour vision
BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
INK, GREY, PALE = "#222222", "#777777", "#D9D9D9"

# Tol's "muted" scheme, and a dark grey as its tenth
CLASSES = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933",
    "#DDCC77", "#CC6677", "#882255", "#AA4499", "#555555",
)  # fmt: skip

TITLE, LABEL, TICK = 10, 9, 8  # points


def figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose layout keeps labels apart."""
    return Figure(figsize=(width, height), layout="constrained")


def dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Title, labels, and a light frame open at the top and right."""
    axes.set_title(title, fontsize=TITLE, loc="left")
    axes.set_xlabel(x, fontsize=LABEL)
    axes.set_ylabel(y, fontsize=LABEL)
    axes.tick_params(labelsize=TICK, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def class_colours(number: int) -> list[str]:
    """As many colours as there are classes; only the first ten sets of them are easy to name."""
    if number <= len(CLASSES):
        return list(CLASSES[:number])
    viridis = colormaps["viridis"]
    return [to_hex(viridis(i / (number - 1))) for i in range(number)]
