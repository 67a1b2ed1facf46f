#!/usr/bin/env python3
"""Draws the figures of README.md and docs/.

    python3 experiments/figures.py front GRID TOKENS LOG... OUT    problems solved over time, by logs
                                                             of train --log with so many tokens a
                                                             step; and GRID's claims
    python3 experiments/figures.py chain MODEL TRACE OUT     the experts of a text's last tokens
    python3 experiments/figures.py grid GRID OUT             OUT-curves and OUT-rows

GRID is a name such as experiments/results/default-task, of GRID.tsv and GRID-curves.tsv, which
experiments/grid.py writes. Each figure becomes OUT.png. A chain is blue and a mixture orange.
"""
import math
import os
import sys

from claims import Grid, claims_in, mean, pooled
from common import BLUE, GREEN, ORANGE, Failure, command_line, pyplot, read_tsv, save_figure
from rows import ROWS
from tracefile import Model, Trace

# The rows whose curves are shown, with their colours and lines.
DRAWN = {"moe-k8": (ORANGE, "-"), "coe-k4c2": (BLUE, "-"), "moe-k16": (ORANGE, "--"),
         "coe-k8c2": (BLUE, "--")}


# ---- the first page ------------------------------------------------------------------------------

def solved_over_time(log, tokens):
    """[(seconds of training, % of the problems solved), ...]"""
    lines = read_tsv(log)
    if not lines:
        raise Failure(f"{log}: holds no step")
    seconds, points = 0.0, []
    for line in lines:
        seconds += tokens / float(line["tokens_per_s"])
        if line["solved"]:
            points.append((seconds, 100 * float(line["solved"])))
    return points


def draw_front(grid, tokens, logs, path):
    """Left, the share of problems solved over the time of training; right, each claim's difference
    of losses, here with its interval at equal steps, and in the paper."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2), width_ratios=(2, 3))
    for log, line in zip(logs, ("-", "--", ":")):
        left.plot(*zip(*solved_over_time(log, tokens)), line, marker="o", markersize=2.5, color=BLUE,
                  label=os.path.basename(log).removesuffix(".tsv"))
    left.set(xlabel="seconds of training", ylabel="% of held-out problems solved", ylim=(0, 100),
             xscale="log", title="Problems solved")
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(loc="upper left")
    claims = [(claim, paper, found[0]) for claim, paper, found in claims_in(grid) if found[0]][::-1]
    for y, (claim, paper, (here, half, _)) in enumerate(claims):
        half = half if math.isfinite(half) else 0       # not known where no row has several seeds
        right.errorbar(here, y, xerr=half, fmt="o", color=BLUE, markersize=5,
                       label=None if y else "here, 95 % interval")
        if claim.margin:
            right.barh(y, claim.margin * mean(grid.finals(claim.other)), 0.7, color="#dddddd",
                       label=None if claim.margin in [c.margin for c, *_ in claims[:y]] else
                       "counts as level")
        right.plot(paper, y, "x", color=GREEN, markersize=6, label=None if y else "paper, one run")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(claims)), [claim.text for claim, *_ in claims])
    right.xaxis.set_major_locator(plt.MultipleLocator(0.05))
    right.set(xlabel="difference of validation losses, nats")
    right.legend(loc="lower right", ncols=3, bbox_to_anchor=(1, 1))
    save_figure(figure, path)


# ---- a chain -------------------------------------------------------------------------------------

def draw_chain(trace, path, most=30):
    """A column for each of a text's last tokens, a row for each round of each layer; in a cell the
    experts that were chosen there, in the colour of the first."""
    plt, E = pyplot(), trace.model.experts
    labels = [{"\n": "\u21b5", " ": "\u2423"}.get(x, x) for x in trace.labels()][-most:]
    rows = [(layer, c) for layer, chain in trace.experts.items() for c in range(len(chain))]
    chosen = [trace.experts[layer][c][-most:] for layer, c in rows]
    figure, axes = plt.subplots(figsize=(1.2 + 0.2 * len(labels), 0.7 + 0.27 * len(rows)))
    axes.imshow([[experts[0] for experts in row] for row in chosen], cmap="hsv", vmin=0, vmax=E,
                alpha=0.35, aspect="auto")
    for y, row in enumerate(chosen):
        for x, experts in enumerate(row):
            axes.text(x, y, "\n".join(map(str, experts[:2])), ha="center", va="center", fontsize=5.5,
                      linespacing=0.95)
    axes.set_xticks(range(len(labels)), labels, family="monospace", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"layer {layer}, round {c}" for layer, c in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_yticks([i - 0.5 for i, (_, c) in enumerate(rows) if c == 0 and i], minor=True)
    axes.grid(True, axis="y", which="minor", color="white", linewidth=4)
    axes.tick_params(which="minor", length=0)
    save_figure(figure, path)


# ---- the grid ------------------------------------------------------------------------------------

def draw_curves(grid, path):
    """Validation loss over steps, FLOPs and time; a band from the best seed to the worst."""
    plt = pyplot()
    rows = [row for row in ROWS if row.name in DRAWN and row.name in grid.runs]
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3), sharey=True)
    for ax, (kind, label, unit) in zip(axes, (("steps", "step", 1), ("FLOPs", "TFLOP", 1e12),
                                              ("time", "seconds of training", 1))):
        for row in rows:
            colour, line = DRAWN[row.name]
            runs = grid.runs[row.name]
            curves = [[y for _, y in run.curve] for run in runs]
            x = [step * runs[0].cost[kind] / unit for step, _ in runs[0].curve]
            ax.plot(x, [mean(ys) for ys in zip(*curves)], color=colour, label=row.about,
                    linestyle=line)
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
    what, *args = sys.argv[1:] or [""]
    if what == "front" and len(args) >= 4:
        draw_front(Grid(args[0]), int(args[1]), args[2:-1], args[-1])
    elif what == "chain" and len(args) == 3:
        draw_chain(Trace(args[1], Model(args[0])), args[2])
    elif what == "grid" and len(args) == 2:
        draw_curves(Grid(args[0]), args[1] + "-curves")
        draw_rows(Grid(args[0]), args[1] + "-rows")
    else:
        print(__doc__.strip())
        return 0 if what in ("-h", "--help") else 2
    return 0


if __name__ == "__main__":
    command_line(main)
