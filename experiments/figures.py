#!/usr/bin/env python3
"""Draws the figures of the README.

    python3 experiments/figures.py learning demo.tsv OUT     a learning curve, from train --log
    python3 experiments/figures.py grid NAME OUT             of NAME.tsv and NAME-curves.tsv, which
                                                             experiments/grid.py writes

Each becomes OUT.png and OUT.svg; the second one OUT-curves and OUT-rows.
"""
import sys

from claims import Grid, mean, pooled
from common import BLUE, COLOURS, ORANGE, Failure, command_line, pyplot, read_tsv, save_figure
from rows import ROWS

DRAWN = ("moe-k8", "coe-k4c2", "moe-k16", "coe-k8c2")   # the rows whose curves are shown


# ---- the demo ------------------------------------------------------------------------------------

def smooth(numbers):
    """Each number's mean with its neighbours, one in a hundred of all to either side."""
    reach = len(numbers) // 100
    return [mean(numbers[max(0, i - reach):i + reach + 1]) for i in range(len(numbers))]


def draw_learning(log, path):
    """Loss and validation loss on the left, the share of problems solved on the right."""
    lines = read_tsv(log)
    if not lines:
        raise Failure(f"{log}: holds no step")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3))
    steps = [int(line["step"]) + 1 for line in lines]
    losses = [float(line["loss"]) for line in lines]
    axes.plot(steps, losses, color=BLUE, alpha=0.2, linewidth=0.7)
    axes.plot(steps, smooth(losses), color=BLUE, label="loss of a batch, smoothed")
    measured = [(int(line["step"]) + 1, line) for line in lines if line["val_loss"]]
    axes.plot(*zip(*[(step, float(line["val_loss"])) for step, line in measured]), "o",
              color="black", markersize=3, label="validation loss")
    axes.set(xlabel="step", ylabel="nats a token", yscale="log")
    axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    solved = [(step, 100 * float(line["solved"])) for step, line in measured if line["solved"]]
    if solved:
        other = axes.twinx()
        other.plot(*zip(*solved), "s-", color=ORANGE, markersize=3, label="problems solved")
        other.set(ylabel="% of held-out problems", ylim=(0, 100))
        other.spines["right"].set_visible(True)
        other.grid(False)
    handles = [x for ax in figure.axes for x in ax.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.16))
    save_figure(figure, path)


# ---- the grid ------------------------------------------------------------------------------------

def draw_curves(grid, path):
    """Validation loss over steps, FLOPs and time; a band from the best seed to the worst."""
    plt = pyplot()
    rows = [row for row in ROWS if row.name in DRAWN and row.name in grid.runs]
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3), sharey=True)
    for ax, (kind, label, unit) in zip(axes, (("steps", "step", 1), ("FLOPs", "TFLOP", 1e12),
                                              ("time", "seconds of training", 1))):
        for row, colour in zip(rows, COLOURS):
            runs = grid.runs[row.name]
            curves = [[y for _, y in run.curve] for run in runs]
            x = [step * runs[0].cost[kind] / unit for step, _ in runs[0].curve]
            ax.plot(x, [mean(ys) for ys in zip(*curves)], color=colour, label=row.about,
                    linestyle="-" if row.name.startswith("coe") else "--")
            ax.fill_between(x, [min(ys) for ys in zip(*curves)], [max(ys) for ys in zip(*curves)],
                            color=colour, alpha=0.15, linewidth=0)
        ax.set(xlabel=label, xscale="log")
        ax.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    axes[0].set(ylabel="validation loss, nats a token")
    axes[0].legend()
    save_figure(figure, path)


def draw_rows(grid, path):
    """Ours and the paper's validation losses, a row each; a line is one standard deviation."""
    plt = pyplot()
    rows = [row for row in ROWS if row.name in grid.runs][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.8 + 0.24 * len(rows)), sharey=True)
    for y, row in enumerate(rows):
        colour = BLUE if row.name.startswith("coe") or row.name == "dense-c2" else ORANGE
        finals = grid.finals(row.name)
        spread = pooled([finals])[0] if len(finals) > 1 else 0
        axes[0].errorbar(mean(finals), y, xerr=spread, fmt="o", color=colour, markersize=5)
        axes[0].plot(finals, [y] * len(finals), "|", color=colour, markersize=9)
        if row.paper:
            axes[1].plot(row.paper, y, "o", color=colour, markersize=5)
    axes[0].set_yticks(range(len(rows)), [row.about for row in rows])
    axes[0].set(title="here: mean, spread and each seed", xlabel="validation loss")
    axes[1].set(title="the paper: one run each", xlabel="validation loss")
    save_figure(figure, path)


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("learning", "grid"):
        print(__doc__.strip())
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    _, what, source, path = sys.argv
    if what == "learning":
        draw_learning(source, path)
    else:
        grid = Grid(source)
        draw_curves(grid, path + "-curves")
        draw_rows(grid, path + "-rows")
    return 0


if __name__ == "__main__":
    command_line(main)
