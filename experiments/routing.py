#!/usr/bin/env python3
"""What the routers of a model do with a text.

    ./run demo.bin -m eval -f val.txt --trace trace.tsv
    python3 experiments/routing.py demo.bin trace.tsv [--figures PREFIX]

Prints tables as TSV, a line "# name" before each. Everything counts from 0, as in the trace:

  load          how a router call spreads its choices. `entropy` is in bits, `evenness` that divided
                by log2 E: 1 where all experts have the same share; `max_mean` the busiest expert's
                load as a multiple of the mean; `dead` how many had none.
  returns       of the choices in `second`, the share that goes to an expert which the same token
                had in `first` already. `by_chance`: the share that independent routers with these
                loads would return; `uniform`: with even loads, K / E.
  combinations  how many different sets of experts the tokens got, of how many there are: in one
                iteration, and as the chain of all of them.
  weights       mean weight by rank, and `sum`, the mean of their sum: what the chosen have of the
                softmax over all experts, where that is not normalised.
  pairs         tokens with expert `first` in iteration t and expert `second` in t + 1, the most
                frequent 10 of each layer and t.

--figures draws PREFIX-load, PREFIX-pairs, PREFIX-returns and PREFIX-weights as .png.
"""
import argparse
import math
from collections import Counter
from itertools import combinations

from common import BLUE, COLOURS, command_line, pyplot, save_figure, tsv
from tracefile import Model, Trace


# ---- statistics ----------------------------------------------------------------------------------

def counts(chosen, E):
    """How often each of E experts was chosen; chosen has a tuple of experts for each token."""
    load = [0] * E
    for experts in chosen:
        for e in experts:
            load[e] += 1
    return load


def entropy(load):
    """Of the shares, in bits."""
    total = sum(load)
    return sum(n / total * math.log2(total / n) for n in load if n)


def pairs(first, second):
    """(a, b) -> how many tokens had expert a in first and expert b in second."""
    return Counter((a, b) for x, y in zip(first, second) for a in x for b in y)


def returns(first, second):
    """The share of the choices in second that were made by the same token in first."""
    again = sum(len(set(x) & set(y)) for x, y in zip(first, second))
    return again / sum(map(len, second))


def returns_by_chance(first, second, E):
    """What returns() would be on average if tokens chose in both with the loads that there are,
    but independently. With p_e and q_e the shares of tokens that have e: sum of p_e q_e, over K."""
    tokens, K = len(first), len(second[0])
    both = sum(p * q for p, q in zip(counts(first, E), counts(second, E)))
    return both / tokens ** 2 / K


def mean_weights(weights):
    """By rank, over all tokens."""
    return [sum(rank) / len(weights) for rank in zip(*weights)]


# ---- tables --------------------------------------------------------------------------------------

def number(x):
    return f"{x:.7f}"


def load_table(trace):
    yield "layer", "iteration", "entropy", "evenness", "max_mean", "dead", "busiest", "its_share"
    E = trace.model.experts
    for layer, chain in trace.experts.items():
        for c, chosen in enumerate(chain):
            load = counts(chosen, E)
            h, most, total = entropy(load), max(load), sum(load)
            yield (layer, c, number(h), number(h / math.log2(E) if E > 1 else 1.0),
                   number(most * E / total), load.count(0), load.index(most), number(most / total))


def returns_table(trace):
    yield "layer", "first", "second", "returns", "by_chance", "uniform"
    E, K = trace.model.experts, trace.model.chosen
    for layer, chain in trace.experts.items():
        for a, b in combinations(range(len(chain)), 2):
            yield (layer, a, b, number(returns(chain[a], chain[b])),
                   number(returns_by_chance(chain[a], chain[b], E)), number(K / E))


def combinations_table(trace):
    yield "layer", "iteration", "seen", "tokens", "possible"
    tokens, C = len(trace.tokens), trace.model.iterations
    possible = math.comb(trace.model.experts, trace.model.chosen)
    for layer, chain in trace.experts.items():
        sets = [[frozenset(experts) for experts in chosen] for chosen in chain]
        for c in range(C):
            yield layer, c, len(set(sets[c])), tokens, possible
        yield layer, "chain", len(set(zip(*sets))), tokens, possible ** C


def weights_table(trace):
    yield ("layer", "iteration", *(f"rank_{k}" for k in range(trace.model.chosen)), "sum")
    for layer, chain in trace.weights.items():
        for c, weights in enumerate(chain):
            means = mean_weights(weights)
            yield (layer, c, *map(number, means), number(sum(means)))


def pairs_table(trace, most=10):
    yield "layer", "iteration", "first", "second", "tokens"
    for layer, chain in trace.experts.items():
        for t in range(len(chain) - 1):
            found = pairs(chain[t], chain[t + 1])
            for (a, b), n in sorted(found.items(), key=lambda x: (-x[1], x[0]))[:most]:
                yield layer, t, a, b, n


TABLES = {"load": load_table, "returns": returns_table, "combinations": combinations_table,
          "weights": weights_table, "pairs": pairs_table}


# ---- figures -------------------------------------------------------------------------------------

def draw_load(trace, path):
    """A row of squares for each router call; the darker, the busier."""
    plt, E = pyplot(), trace.model.experts
    names = [(layer, c) for layer, chain in trace.experts.items() for c in range(len(chain))]
    shares = [[100 * n / len(trace.tokens) for n in counts(trace.experts[layer][c], E)]
              for layer, c in names]
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.24 * len(names)))
    image = axes.imshow(shares, cmap="Blues", aspect="auto", vmin=0)
    axes.set_yticks(range(len(names)), [f"layer {layer}, iteration {c}" for layer, c in names])
    axes.set(xlabel="expert", title="Share of the tokens that visit an expert")
    axes.grid(False)
    axes.set_yticks([i - 0.5 for i, (_, c) in enumerate(names) if c == 0 and i], minor=True)
    axes.grid(True, axis="y", which="minor", color="white", linewidth=4)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="% of tokens", pad=0.01)
    save_figure(figure, path)


def draw_pairs(trace, path):
    """The paper's figure: what iteration 0 chose against what iteration 1 chose, layer by layer."""
    plt, E = pyplot(), trace.model.experts
    layers = list(trace.experts)
    shown = [[[0.0] * E for _ in range(E)] for _ in layers]
    for matrix, layer in zip(shown, layers):
        for (a, b), n in pairs(*trace.experts[layer][:2]).items():
            matrix[a][b] = 100 * n / len(trace.tokens)
    top = max(max(map(max, matrix)) for matrix in shown)
    figure, axes = plt.subplots(1, len(layers), figsize=(1 + 1.9 * len(layers), 2.4), squeeze=False)
    for ax, matrix, layer in zip(axes[0], shown, layers):
        image = ax.imshow(matrix, cmap="Blues", vmin=0, vmax=top)
        ax.grid(False)
        ax.set(title=f"layer {layer}", xlabel="expert in iteration 1")
    axes[0][0].set_ylabel("expert in iteration 0")
    figure.colorbar(image, ax=list(axes[0]), label="% of tokens", pad=0.01, shrink=0.8)
    save_figure(figure, path)


def draw_returns(trace, path):
    """Bars: the share of returns in each layer, and a mark where chance would be."""
    plt = pyplot()
    rows = [row for row in list(returns_table(trace))[1:] if row[2] == row[1] + 1]
    figure, axes = plt.subplots(figsize=(2.8 + 0.7 * len(rows), 2.6))
    axes.bar(range(len(rows)), [100 * float(row[3]) for row in rows], 0.6, color=BLUE,
             label="measured")
    for i, row in enumerate(rows):
        axes.plot([i - 0.4, i + 0.4], [100 * float(row[4])] * 2, color="black",
                  label=None if i else "independent routers")
    axes.set_xticks(range(len(rows)), [f"layer {row[0]}\n{row[1]} to {row[2]}" for row in rows])
    axes.set(ylabel="% of choices", title="Back to an expert of the iteration before")
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def draw_weights(trace, path):
    """Lines: mean weight by rank, one for each iteration, a panel for each layer."""
    plt = pyplot()
    layers = list(trace.weights)
    figure, axes = plt.subplots(1, len(layers), figsize=(1 + 1.7 * len(layers), 2.4), sharey=True,
                                squeeze=False)
    for ax, layer in zip(axes[0], layers):
        for c, weights in enumerate(trace.weights[layer]):
            ax.plot(mean_weights(weights), marker="os^D"[c % 4], color=COLOURS[c % len(COLOURS)],
                    label=f"iteration {c}")
        ax.set(title=f"layer {layer}", xlabel="rank", xticks=range(trace.model.chosen))
        ax.margins(x=0.2)
    axes[0][0].set(ylabel="mean weight", ylim=(0, None))
    axes[0][0].legend()
    save_figure(figure, path)


def draw_all(trace, prefix):
    draw_load(trace, prefix + "-load")
    draw_weights(trace, prefix + "-weights")
    if trace.model.iterations > 1:
        draw_pairs(trace, prefix + "-pairs")
        draw_returns(trace, prefix + "-returns")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model.bin that wrote the trace")
    parser.add_argument("trace", help="what ./run --trace wrote")
    parser.add_argument("--figures", metavar="PREFIX", help="draw figures, needs matplotlib")
    args = parser.parse_args()
    trace = Trace(args.trace, Model(args.model))
    print("\n".join(f"# {name}\n{tsv(table(trace))}" for name, table in TABLES.items()), end="")
    if args.figures:
        draw_all(trace, args.figures)


if __name__ == "__main__":
    command_line(main)
