"""Draw the pictures of README and documentation: ``python docs/figures/draw.py`` (two minutes, on one core)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch

import pyro_mm as mm

FOLDER = Path(__file__).parent
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe & Ito's palette for the colour-blind
EPOCHS = 200
DRAWS = 5
ROWS = 40

BOXES = {
    "batch\nvalues and masks": (0, 1),
    "models\nstories, conditionals": (1, 2),
    "posteriors\nguides, products, mixtures": (1, 0),
    "scoring\nstructure, audit,\nlog densities": (2, 1),
    "estimators\nIWAE, DReG, ..": (3, 2),
    "sampling\nproposals, generate": (3, 0),
    "objectives\nplan, evaluate,\ncombine": (4, 2),
    "evidence\nlog p(x) with its error": (4, 0),
    "training\nfit, stage": (5, 2),
    "diagnostics\ncheck, compare": (5, 0),
}
"""Room, and a word on it -> its column and row in the picture of the flow."""

ARROWS = (
    ("batch", "models"),
    ("batch", "posteriors"),
    ("models", "scoring"),
    ("posteriors", "scoring"),
    ("scoring", "estimators"),
    ("scoring", "sampling"),
    ("estimators", "objectives"),
    ("objectives", "training"),
    ("sampling", "evidence"),
    ("evidence", "diagnostics"),
    ("objectives", "diagnostics"),
)


def draw_front() -> None:
    """Draw images given their labels, and log p(image | label) of test rows by two proposals, with errors."""
    train, test = mm.datasets.load("digits")
    torch.manual_seed(0)
    model, guide, objective = mm.recipes.jmvae_kl(train)
    mm.fit(model, guide, objective, train, epochs=EPOCHS, progress=False)

    digits = torch.stack([(test["label"] == digit).nonzero()[0, 0] for digit in range(10)])
    truth = test[digits]
    draws = mm.generate(model, guide, truth.only("label"), num_samples=DRAWS, mean=True, seed=1)["image"]
    some = test[:ROWS]
    query = {"target": "image", "given": "label"}
    fitted = mm.log_conditional(model, guide, some, **query, proposal="fitted")
    by_guide = mm.log_conditional(model, guide, some, **query)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.3), width_ratios=(1, 1.25), layout="constrained")
    _draw_grid(left, torch.cat([truth["image"][None], draws]))
    _draw_evidence(right, fitted, by_guide)
    figure.savefig(FOLDER / "front.png", dpi=110)
    plt.close(figure)


def _draw_grid(ax: plt.Axes, images: torch.Tensor) -> None:
    """Draw images ``(rows, 10, 8, 8)``, the first row being true ones."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    rows, columns, height, width = padded.shape
    mosaic = padded.permute(0, 2, 1, 3).reshape(rows * height, columns * width)
    ax.imshow(mosaic, cmap="gray_r", vmin=0, vmax=1)
    ax.axhline(height - 0.5, color=BLUE, linewidth=1)
    middles = [height * row + height / 2 - 0.5 for row in range(rows)]
    ax.set_xticks([width * column + width / 2 - 0.5 for column in range(columns)], range(columns))
    ax.set_yticks([middles[0], sum(middles[1:]) / (rows - 1)], ["true", "model"], rotation=90, va="center")
    ax.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=9)
    ax.spines[:].set_visible(False)
    ax.set_title("images given a label", fontsize=10)


def _draw_evidence(ax: plt.Axes, fitted: mm.Evidence, by_guide: mm.Evidence) -> None:
    """Draw two estimates of each row, less the first of them, with two standard errors."""
    place = torch.arange(len(fitted.log_prob))
    named = (("draws of the guide", by_guide, ORANGE, 0.15), ("draws fitted to the row", fitted, BLUE, -0.15))
    for name, evidence, colour, shift in named:
        doubtful = evidence.doubtful
        mean, error = evidence.mean()
        share = f"{name}: {mean:.2f} ± {error:.3f}, {int(doubtful.sum())} of {len(place)} in doubt"
        value = evidence.log_prob - fitted.log_prob
        ax.errorbar(place + shift, value, 2 * evidence.standard_error, fmt="none", ecolor=colour, elinewidth=1)
        ax.plot(place[~doubtful] + shift, value[~doubtful], ".", color=colour, markersize=6, label=share)
        ax.plot(place[doubtful] + shift, value[doubtful], "x", color=colour, markersize=5)
    ax.axhline(0, color="#aaaaaa", linewidth=0.6, zorder=0)
    ax.set(xlabel="test row", ylabel="nats from the fitted estimate")
    ax.set_title("log p(image | label) of each row, ± 2 standard errors; x: k-hat above 0.7", fontsize=10)
    ax.set_ylim(top=1.35 * ax.get_ylim()[1])
    ax.legend(fontsize=8, loc="upper left", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def draw_flow() -> None:
    """Draw the rooms of the package, and what goes from one to the next."""
    figure, ax = plt.subplots(figsize=(11, 2.9), layout="constrained")
    places = {}
    for text, (column, row) in BOXES.items():
        x, y = 2.0 * column, 1.1 * row
        places[text.partition("\n")[0]] = (x, y)
        ax.add_patch(FancyBboxPatch((x - 0.78, y - 0.36), 1.56, 0.72, "round,pad=0.02", fc="#eef4f9", ec=BLUE))
        head, _, rest = text.partition("\n")
        ax.text(x, y + 0.17, head, ha="center", va="center", fontsize=8.5, weight="bold")
        ax.text(x, y - 0.11, rest, ha="center", va="center", fontsize=7.5)
    for start, end in ARROWS:
        (x0, y0), (x1, y1) = places[start], places[end]
        if x1 > x0:
            tail, head = (x0 + 0.82, y0), (x1 - 0.82, y1)
        else:
            tail, head = (x0, y0 - 0.4), (x1, y1 + 0.4)
        ax.annotate("", head, tail, arrowprops={"arrowstyle": "->", "color": "#555555"})
    ax.set(xlim=(-1, 11), ylim=(-0.55, 2.75))
    ax.axis("off")
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "pyro_mm"
    figure.savefig(FOLDER / "flow.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plt.switch_backend("agg")
    draw_flow()
    draw_front()
