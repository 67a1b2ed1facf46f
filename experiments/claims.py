#!/usr/bin/env python3
"""Turns the numbers of a grid into tables, and says which claims of the paper they confirm.

    python3 experiments/claims.py experiments/results/default-task      prints the Markdown again
                                  --short                               that of docs/experiments.md

What it reads: NAME.tsv, a line for each run, and NAME-curves.tsv, one for each validation.
"""
import argparse
import math
import statistics

from common import Failure, command_line, markdown, read_tsv
from rows import CLAIMS, MATCH, ROWS

RULE = f"""The rule. A difference of two means has the interval ± t s √(1/n + 1/m), which covers
95 %: n and m are the seeds of the two, t is Student's, and s the standard deviation between seeds,
pooled over all rows that have several (and a loss at the same point). A claim "A beats B" is
*confirmed* if all of the interval of A - B is below 0, *not confirmed* if all of it is above, and
otherwise *not decidable at this scale*. "A matches B" is the same with {100 * MATCH:.0f} % of B's
loss instead of 0. Equal FLOPs and equal time: at the end of the shorter of the two runs, where the
other's loss lies on a straight line between its validations, over the logarithm of the step. Time
is that of the training steps alone, at the row's median speed. Seed by seed: runs of a seed see the
same batches, so that their differences, at equal steps, may spread less than their losses do; the
interval is ± t s / √n, with the s of these n differences."""

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; the last one is for more.
STUDENT = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
           2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


# ---- statistics ----------------------------------------------------------------------------------

def mean(numbers):
    return sum(numbers) / len(numbers)


def pooled(groups):
    """The spread within groups: (standard deviation, degrees of freedom); nan if there are none."""
    squares = sum((x - mean(group)) ** 2 for group in groups for x in group)
    freedom = sum(len(group) - 1 for group in groups if group)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def difference(a, b, spread, freedom):
    """The mean difference a - b, and half of its interval; infinite where the spread is unknown."""
    t = STUDENT[min(freedom, len(STUDENT)) - 1] if freedom else math.inf
    half = t * spread * math.sqrt(1 / len(a) + 1 / len(b)) if freedom else math.inf
    return mean(a) - mean(b), half


def paired(pairs):
    """The mean of a - b over the pairs (a, b), and half of its interval; infinite for one pair."""
    differences = [a - b for a, b in pairs]
    spread, freedom = pooled([differences])
    t = STUDENT[min(freedom, len(STUDENT)) - 1] if freedom else math.inf
    return mean(differences), t * spread / math.sqrt(len(pairs)) if freedom else math.inf


def verdict(d, half, limit):
    if d + half < limit:
        return "confirmed"
    return "not confirmed" if d - half > limit else "not decidable at this scale"


def loss_at(curve, step):
    """The loss at a step between validations; None before the first and after the last of them."""
    if not curve[0][0] <= step <= curve[-1][0] * (1 + 1e-9):
        return None
    for (s0, y0), (s1, y1) in zip(curve, curve[1:]):
        if s0 <= step <= s1:
            return y0 + (y1 - y0) * math.log(step / s0) / math.log(s1 / s0)
    return curve[-1][1]


# ---- runs ----------------------------------------------------------------------------------------

class Run:
    """A line of NAME.tsv with its curve, [(step, validation loss), ...]. cost: of a step."""

    def __init__(self, line, curve):
        for key, value in line.items():
            word = key in ("row", "build")
            setattr(self, key, value if word else float(value) if value else None)
        self.curve = curve
        self.cost = {"steps": 1.0, "FLOPs": 3 * self.flops_per_token * self.tokens_per_step}

    def total(self, kind):
        return self.steps * self.cost[kind]

    def at(self, kind, budget):
        """The loss when so many steps, FLOPs or seconds are spent."""
        return loss_at(self.curve, budget / self.cost[kind])


class Grid:
    """The runs of a grid by row."""

    def __init__(self, path):
        curves = {}
        for line in read_tsv(path + "-curves.tsv"):
            point = int(line["step"]), float(line["val_loss"])
            curves.setdefault((line["row"], line["seed"]), []).append(point)
        self.runs = {}
        for line in read_tsv(path + ".tsv"):
            key = line["row"], line["seed"]
            if key not in curves:
                raise Failure(f"{path}-curves.tsv: has no validation of {key[0]}, seed {key[1]}")
            self.runs.setdefault(line["row"], []).append(Run(line, curves[key]))
        for runs in self.runs.values():
            speed = statistics.median(run.tokens_per_s for run in runs)
            for run in runs:
                run.cost["time"] = run.tokens_per_step / speed

    def finals(self, row):
        return [run.val_loss for run in self.runs[row]]

    def pairs(self, a, b):
        """The last losses of two rows, seed by seed, as far as both have one and the same steps."""
        others = {(run.seed, run.steps): run.val_loss for run in self.runs[b]}
        return [(run.val_loss, others[run.seed, run.steps]) for run in self.runs[a]
                if (run.seed, run.steps) in others]

    def budget(self, kind, *rows):
        """What the shortest of these rows' runs spent."""
        return min(run.total(kind) for row in rows for run in self.runs[row])

    def losses(self, row, kind, budget):
        """Of the row's runs at a budget; None where one of them has no loss there."""
        losses = [run.at(kind, budget) for run in self.runs[row]]
        return None if None in losses else losses

    def spread(self, kind, budget):
        """Between the seeds of a row, at a budget: as pooled() gives it."""
        return pooled([self.losses(row, kind, budget) or [] for row in self.runs])

    def mean_of(self, row, what):
        values = [getattr(run, what) for run in self.runs[row]]
        return None if None in values else mean(values)


# ---- tables --------------------------------------------------------------------------------------

def scaled(x, factor, form=".2f"):
    return None if x is None else format(x * factor, form)


def rows_table(grid, base="moe-k8"):
    """Every row with its means. The losses at equal FLOPs and time are for what `base` spent."""
    solved = any(run.solved is not None for runs in grid.runs.values() for run in runs)
    yield ("row", "paper", "val. loss", "spread", "seeds", "at equal FLOPs", "at equal time",
           *(["solved"] if solved else []), "parameters, M", "active, M", "MFLOP a token",
           "tokens/s", "peak MB")
    for row in ROWS:
        if row.name not in grid.runs:
            continue
        finals, equal = grid.finals(row.name), []
        for kind in ("FLOPs", "time"):
            losses = base in grid.runs and grid.losses(row.name, kind, grid.budget(kind, base))
            equal.append(f"{mean(losses):.4f}" if losses else "")
        of = lambda what: grid.mean_of(row.name, what)
        yield (row.about, f"{row.paper:.3f}" if row.paper else "", f"{mean(finals):.4f}",
               f"{pooled([finals])[0]:.4f}" if len(finals) > 1 else "", len(finals), *equal,
               *([scaled(of("solved"), 100, ".1f") + " %"] if solved else []),
               scaled(of("total_parameters"), 1e-6), scaled(of("active_parameters"), 1e-6),
               scaled(of("flops_per_token"), 1e-6), scaled(of("tokens_per_s"), 1, ".0f"),
               scaled(of("peak_bytes"), 1e-6, ".0f"))


KINDS = ("steps", "FLOPs", "time")
ABOUT = {row.name: row.about for row in ROWS}
PAPER = {row.name: row.paper for row in ROWS}


def measured(grid, claim):
    """Of a claim, at equal steps, FLOPs and time: (difference, half its interval, verdict), or None
    where the shorter run ends before the other's first validation."""
    for kind in KINDS:
        budget = grid.budget(kind, claim.better, claim.other)
        losses = [grid.losses(row, kind, budget) for row in (claim.better, claim.other)]
        if None in losses:
            yield None
            continue
        d, half = difference(*losses, *grid.spread(kind, budget))
        yield d, half, verdict(d, half, claim.margin * mean(losses[1]))


def with_interval(d, half):
    return f"{d:+.4f} ± {half:.4f}" if math.isfinite(half) else f"{d:+.4f}"


def claims_table(grid):
    """Every claim whose two rows are there: the paper's difference, and ours in three ways."""
    yield ("claim", "A", "B", "paper, A - B", *(f"equal {kind}" for kind in KINDS),
           "seed by seed", "A's parameters", "A's memory")
    for claim, paper, found in claims_in(grid):
        a, b = claim.better, claim.other
        cells = [f"{with_interval(*x[:2])}: {x[2]}" if x else "too short" for x in found]
        ratio = [f"{grid.mean_of(a, what) / grid.mean_of(b, what) - 1:+.0%}"
                 for what in ("total_parameters", "peak_bytes")]
        pairs = grid.pairs(a, b)
        yield (claim.text, ABOUT[a], ABOUT[b], f"{paper:+.3f}", *cells,
               with_interval(*paired(pairs)) if len(pairs) > 1 else "", *ratio)


def claims_in(grid):
    """Every claim whose two rows are there: (claim, the paper's difference, what measured() finds)."""
    for claim in CLAIMS:
        if claim.better in grid.runs and claim.other in grid.runs:
            yield claim, PAPER[claim.better] - PAPER[claim.other], list(measured(grid, claim))


def short_table(grid):
    """That of docs/experiments.md: differences at equal steps, and the three verdicts."""
    yield "claim", "A - B", "paper", "here", *(f"equal {kind}" for kind in KINDS)
    for claim, paper, found in claims_in(grid):
        verdicts = [x[2].removesuffix(" at this scale") if x else "" for x in found]
        yield (claim.text, f"{ABOUT[claim.better]} - {ABOUT[claim.other]}", f"{paper:+.3f}",
               with_interval(*found[0][:2]), *verdicts)


def report(path, title):
    """Everything as Markdown."""
    grid = Grid(path)
    some = next(iter(grid.runs.values()))[0]
    spread, freedom = grid.spread("steps", some.steps)
    known = f"At equal steps s = {spread:.4f}, with {freedom} degrees of freedom." if freedom else \
        "Here no row has several seeds, so nothing can be decided."
    if len({run.build for runs in grid.runs.values() for run in runs}) > 1:
        known += " Several builds of ./train were at work: do not trust the times."
    return (f"# {title}\n\n{some.steps:.0f} steps of {some.tokens_per_step:.0f} tokens. Losses are "
            f"nats a token.\n\n{markdown(rows_table(grid))}\nEqual FLOPs and equal time: at what "
            f"{ROWS[0].about} has spent at its end; empty where a run ends before that.\n\n"
            f"{markdown(claims_table(grid), 3)}\n{RULE} {known}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="such as experiments/results/default-task")
    parser.add_argument("--short", action="store_true", help="a short table of the claims")
    args = parser.parse_args()
    print(markdown(short_table(Grid(args.name)), 2) if args.short else
          report(args.name, "The paper's grid, " + args.name.rpartition("/")[2]), end="")


if __name__ == "__main__":
    command_line(main)
