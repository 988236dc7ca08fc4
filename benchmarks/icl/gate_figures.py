"""Pictures of gates, from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimic_core.demo.digits import images

from .gate_report import WHO, GateRow, first_runs, grid, title

SHARE = "share of attention, 0 to 1"
# Equal steps look equal, and in grey they still go from dark to light.
COLOURS = "viridis"


def draw(rows: Sequence[GateRow], folder: Path) -> list[Path]:
    """The pictures of each world's first run."""
    folder.mkdir(parents=True, exist_ok=True)
    first = first_runs(rows)
    drawn = []
    for name, make in {"gates": _heads, "gates-tokens": _tokens, "gates-rule": _rule, "gates-size": _sizes}.items():
        figure = make(first)
        if figure is not None:
            drawn.append(folder / f"{name}.png")
            # Without matplotlib's version in it, the same rows give the same bytes.
            figure.savefig(drawn[-1], dpi=130, facecolor="white", metadata={"Software": None})
    return drawn


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _map(axes: Any, values: Tensor, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("attention head", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.imshow(values.numpy(), cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")


def _scale(figure: Any, axes: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=axes, aspect=30)
    bar.set_label(SHARE, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _heads(runs: Sequence[Sequence[GateRow]]) -> Any:
    figure = _figure(1 + 5.2 * len(runs), 4.8, "Share of attention for demonstrations, where the prompt ends")
    parts = figure.subfigures(1, len(runs), squeeze=False)[0]
    for part, rows in zip(parts, runs, strict=True):
        part.suptitle(title(rows), fontsize=10)
        panels = part.subplots(1, len(WHO), sharey=True)
        for axes, (who, label) in zip(panels, WHO.items(), strict=True):
            values = grid(rows, who)
            _map(axes, values, label if who == "demonstrations" else f"MimIC {label}")
            axes.set_xticks(range(values.shape[1]))
        panels[0].invert_yaxis()
        panels[0].yaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("layer", fontsize=9)
        if part is parts[-1]:
            _scale(part, panels)
    return figure


def _tokens(runs: Sequence[Sequence[GateRow]]) -> Any:
    figure = _figure(10, 0.8 + 4.2 * len(runs), "Share of attention for demonstrations, token by token of one line")
    for part, rows in zip(figure.subfigures(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        of = [row for row in rows if row.what == "token"]
        texts = [row.text for row in of if row.head is None]
        places = list(dict.fromkeys((row.layer, row.head) for row in of))
        part.suptitle(title(rows), fontsize=10)
        panels = part.subplots(1, 3, width_ratios=[3, 3, 1])
        for axes, who in zip(panels, ("learned", "demonstrations"), strict=False):
            values = torch.tensor([getattr(row, who) for row in of]).unflatten(0, (len(texts), -1)).T
            _map(axes, values, f"MimIC {WHO[who]}" if who == "learned" else WHO[who])
            axes.set_xticks(range(len(texts)), texts, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
            axes.set_yticks(range(len(places)), [])
            for edge in (1, (1 + len(places)) // 2):  # the mean, the strongest, those that change most
                axes.axhline(edge - 0.5, color="white", linewidth=3)
            axes.set_xlabel("token", fontsize=9)
        panels[0].set_yticks(range(len(places)), [_place(*place) for place in places])
        panels[0].set_ylabel("attention head", fontsize=9)
        _picture(panels[2], of[0].image)
        _scale(part, panels[:2])
    return figure


def _place(layer: int | None, head: int | None) -> str:
    return "mean of all" if head is None else f"layer {layer}, head {head}"


def _picture(axes: Any, index: int | None) -> None:
    """The image a line is about, cut into its patches."""
    axes.set_axis_off()
    if index is not None:
        axes.imshow(images().pixels[index, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axes.axhline(3.5, color="#D55E00", linewidth=1.5)
        axes.axvline(3.5, color="#D55E00", linewidth=1.5)
        axes.set_title("its image,\nin four patches", fontsize=9)


def _rule(runs: Sequence[Sequence[GateRow]]) -> Any:
    of = [row for rows in runs for row in rows if row.what == "rule"]
    if not of:
        return None
    figure = _figure(10, 4.6, f"Share of attention for demonstrations, where the prompt ends, by question\n{title(of)}")
    asked = list(dict.fromkeys(row.text for row in of))
    places = list(dict.fromkeys((row.layer, row.head) for row in of))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, who in zip(panels, ("learned", "demonstrations"), strict=True):
        values = torch.tensor([getattr(row, who) for row in of]).unflatten(0, (len(asked), -1)).T
        _map(axes, values, f"MimIC {WHO[who]}" if who == "learned" else WHO[who])
        axes.set_xticks(range(len(asked)), asked, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set_xlabel("digit and word: answer", fontsize=9)
    panels[0].set_yticks(range(len(places)), [_place(*place) for place in places])
    panels[0].set_ylabel("attention head", fontsize=9)
    _scale(figure, panels)
    return figure


def _sizes(runs: Sequence[Sequence[GateRow]]) -> Any:
    figure = _figure(1 + 4.5 * len(runs), 3.6, "How long the shift is, where the prompt ends")
    style = {
        "learned": ("MimIC after training", "#0072B2", "o"),
        "demonstrations": (WHO["demonstrations"], "#D55E00", "s"),
    }
    for axes, rows in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        for who, (label, colour, marker) in style.items():
            values = grid(rows, who, "size").tolist()
            axes.plot(range(len(values)), values, label=label, color=colour, marker=marker, markersize=5, linewidth=1.6)
        axes.set_title(title(rows), fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer", fontsize=9)
        axes.set_ylabel("length of shift / length of attention output", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure
