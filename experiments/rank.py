#!/usr/bin/env python3
"""Which part of a chain does what? Leaves out every iteration, every expert in every iteration, the
shared expert and every head, one at a time, and ranks them by the damage on a text.

    ./train --show_val 60 > val.txt
    python3 experiments/rank.py lab/demo.bin val.txt -- -c 192 --completion_only_loss true

Prints TSV, the worst first: by how much the loss grows (nats a token), what was left out, and how it
is written for `run --silence`. What follows -- goes to `run -m eval`. --figure OUT draws OUT.png.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from common import ROOT, Failure, command_line, pyplot, save_figure, tsv
from tracefile import Model, export

RUN = os.path.join(ROOT, "run")


def config_of(path):
    with export.open_file(path) as f:
        return export.read_header(f, path).config


def parts(c):
    """(kind, rule) of everything that can be left out alone."""
    moe = [l for l in range(c.num_hidden_layers) if c.n_routed_experts
           and l >= c.first_k_dense_replace and l % c.moe_layer_freq == 0]
    for l in range(c.num_hidden_layers):
        if l not in moe:
            yield "layer", f"layer={l}"
        for i in range(c.inner_iter) if l in moe else ():
            yield "iteration", f"layer={l},iteration={i}"
            if c.n_shared_experts:
                yield "shared", f"layer={l},iteration={i},shared"
            for e in range(c.n_routed_experts):
                yield "expert", f"layer={l},iteration={i},expert={e}"
        for h in range(c.num_attention_heads):
            yield "head", f"layer={l},head={h}"


def loss(model, text, rule, options):
    """run -m eval's nll with a part left out; with rule None of the model as it is."""
    command = [RUN, model, "-m", "eval", "-f", text, "--threads", "1", *options]
    done = subprocess.run(command + (["--silence", rule] if rule else []), capture_output=True,
                          text=True)
    if done.returncode:
        raise Failure(done.stderr.strip().splitlines()[-1])
    values = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    if "nll" not in values:
        raise Failure(f"{text}: has nothing to predict")
    return float(values["nll"])


def draw(c, damage, path):
    """A row for each iteration of each layer: its experts, the shared one, all of it; and the heads
    of the layer beside the first."""
    plt = pyplot()
    E, H = c.n_routed_experts, c.num_attention_heads
    rows = [(l, i) for l in range(c.num_hidden_layers) for i in range(c.inner_iter)
            if f"layer={l},iteration={i}" in damage]
    labels = [f"expert {e}" for e in range(E)] + ["shared", "all"] + [f"head {h}" for h in range(H)]
    cells = [[damage.get(f"layer={l},iteration={i},expert={e}") for e in range(E)]
             + [damage.get(f"layer={l},iteration={i},shared"), damage[f"layer={l},iteration={i}"]]
             + [damage.get(f"layer={l},head={h}") if i == 0 else None for h in range(H)]
             for l, i in rows]
    shown = [[max(x, 1e-4) if x is not None else float("nan") for x in row] for row in cells]
    figure, axes = plt.subplots(figsize=(1.5 + 0.3 * len(labels), 1.2 + 0.25 * len(rows)))
    image = axes.imshow(shown, cmap="Blues", norm="log", aspect="auto")
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(rows)), [f"layer {l}, iteration {i}" for l, i in rows])
    axes.grid(False)
    axes.set_yticks([n - 0.5 for n, (_, i) in enumerate(rows) if i == 0 and n], minor=True)
    axes.grid(True, axis="y", which="minor", color="white", linewidth=4)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="damage, nats a token", pad=0.01)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="what the damage is measured on")
    parser.add_argument("--figure", metavar="OUT", help="draw OUT.png, needs matplotlib")
    words = sys.argv[1:]
    own = words[:words.index("--")] if "--" in words else words
    args, options = parser.parse_args(own), words[len(own) + 1:]
    Model(args.model)                                   # says what is wrong with the file
    c = config_of(args.model)
    todo = list(parts(c))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        whole, *losses = pool.map(lambda rule: loss(args.model, args.text, rule, options),
                                  [None, *(rule for _, rule in todo)])
    found = sorted(zip(losses, todo), key=lambda x: -x[0])
    print(tsv([("damage", "nll", "kind", "silence")] +
              [(f"{x - whole:.5f}", f"{x:.5f}", kind, rule) for x, (kind, rule) in found]), end="")
    if args.figure:
        draw(c, {rule: x - whole for x, (_, rule) in found}, args.figure)


if __name__ == "__main__":
    command_line(main)
