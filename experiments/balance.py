#!/usr/bin/env python3
"""How evenly the experts are used while a model learns, by three ways of balancing them.

    python3 experiments/balance.py [--steps 10 20 40 ...] [-o OUT] [-- options of ./train]

Trains the demo's model on the built-in task three times: with nothing that balances; with the
balancing loss, as the paper; and with DeepSeek-V3's router, whose correction biases are moved by
--bias_update_speed. At each of the steps it counts which experts the tokens of held-out problems
choose. OUT.tsv has a line "balance step layer iteration expert share" for each expert, and OUT.png
the routers of the last layer's iterations.
"""
import argparse
import os
import subprocess
import sys
import tempfile

from common import COLOURS, ROOT, Failure, command_line, pyplot, read_tsv, save_figure, tsv, write_file
from tracefile import Model, Trace

V3 = ["--scoring_func", "sigmoid", "--topk_method", "noaux_tc", "--aux_loss_alpha", "0"]
KINDS = {"nothing": ["--aux_loss_alpha", "0"], "balancing loss": ["--aux_loss_alpha", "0.001"],
         "bias updates": [*V3, "--bias_update_speed", "0.001"]}
COLUMNS = "balance", "step", "layer", "iteration", "expert", "share"


def call(*command):
    done = subprocess.run([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure(f"{command[0]}: {done.stderr.splitlines()[-1] if done.stderr else 'failed'}")
    return done.stdout


def shares(model, text, folder):
    """{(layer, iteration): the share of all choices that each expert has} on a text."""
    trace = os.path.join(folder, "trace.tsv")
    call("./run", model, "-m", "eval", "-c", 192, "-f", text, "--trace", trace)
    found = Trace(trace, Model(model))
    out = {}
    for layer, chain in found.experts.items():
        for c, chosen in enumerate(chain):
            count = [0] * found.model.experts
            for experts in chosen:
                for e in experts:
                    count[e] += 1
            out[layer, c] = [n / sum(count) for n in count]
    return out


def measure(steps, options):
    """The lines of OUT.tsv."""
    with tempfile.TemporaryDirectory() as folder:
        text, model = os.path.join(folder, "val.txt"), os.path.join(folder, "model.bin")
        write_file(text, call("./train", "--show_val", 40))
        for kind, more in KINDS.items():
            for i, step in enumerate(steps):
                go_on = ["--resume", model] if i else [*more, *options, "--lr_scheduler", "constant"]
                out = call("./train", *go_on, "-x", step, "--val", text, "--eval_problems", 0, "-o",
                           model)
                print(f"{kind}, step {step}: {out.strip()}", file=sys.stderr)
                for (layer, c), part in shares(model, text, folder).items():
                    for e, share in enumerate(part):
                        yield kind, step, layer, c, e, f"{share:.5f}"


def draw(lines, path):
    """A panel for each way of balancing and iteration, a line for each expert."""
    plt = pyplot()
    last = max(int(line["layer"]) for line in lines)
    lines = [line for line in lines if int(line["layer"]) == last]
    iterations = sorted({int(line["iteration"]) for line in lines})
    experts = sorted({int(line["expert"]) for line in lines})
    kinds = list(dict.fromkeys(line["balance"] for line in lines))
    figure, axes = plt.subplots(len(iterations), len(kinds), figsize=(9, 2.3 * len(iterations)),
                                sharex=True, sharey=True, squeeze=False)
    for row, c in zip(axes, iterations):
        for axis, kind in zip(row, kinds):
            for e in experts:
                points = [(int(x["step"]), 100 * float(x["share"])) for x in lines
                          if x["balance"] == kind and int(x["iteration"]) == c
                          and int(x["expert"]) == e]
                axis.plot(*zip(*points), marker="o", markersize=2, color=COLOURS[e % len(COLOURS)],
                          linestyle="-" if e < len(COLOURS) else "--")
            axis.axhline(100 / len(experts), color="black", linewidth=0.8, linestyle=":")
            axis.set(xscale="log", title=f"{kind}, iteration {c}")
            axis.xaxis.set_major_formatter("{x:g}")
        row[0].set(ylabel="% of all choices", ylim=(0, None))
    for axis in axes[-1]:
        axis.set(xlabel="step")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", help="when to count",
                        default=[10, 20, 40, 80, 160, 320, 640, 1280])
    parser.add_argument("-o", "--output", default=os.path.join("build", "balance"),
                        help="OUT [build/balance]")
    argv = sys.argv[1:]
    own, options = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    write_file(args.output + ".tsv", tsv([COLUMNS, *measure(sorted(args.steps), options)]))
    lines = read_tsv(args.output + ".tsv")
    step, last = (max(int(x[key]) for x in lines) for key in ("step", "layer"))
    for kind in KINDS:
        part = [float(x["share"]) for x in lines if x["balance"] == kind and int(x["step"]) == step]
        print(f"{kind}: at step {step} an expert has {100 * min(part):.1f} to {100 * max(part):.1f} % "
              f"of a router's choices")
    draw(lines, args.output)


if __name__ == "__main__":
    command_line(main)
