#!/usr/bin/env python3
"""Makes a page that shows the routing of a text, token by token.

    ./run demo.bin -t 0 --trace trace.tsv -i "question: Tom had 9 figs and lost 7. Now?"
    python3 experiments/viewer.py demo.bin trace.tsv -o routing.html

With --lens FILE, which `run -m lens --lens FILE` makes of the same text, it also shows what the model
would say after each iteration:

    ./run demo.bin -m eval -f text.txt --trace trace.tsv
    ./run demo.bin -m lens -f text.txt --lens lens.tsv
    python3 experiments/viewer.py demo.bin trace.tsv --lens lens.tsv

The page is one file that needs no network and no server: open it in any browser. Everything counts
from 0, as in the trace. A part of the page can be linked to: what is chosen is in its address.
"""
import argparse
import base64
import json
import os
import re
import sys
from array import array

from common import ROOT, Failure, command_line, read_tsv, write_file
from tracefile import Model, Trace, export

PARTS = os.path.join(ROOT, "experiments", "viewer")


def packed(kind, numbers):
    """Numbers as little-endian binary in base64: a page for 2,000 tokens stays below a megabyte."""
    numbers = array(kind, numbers)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def flat(chains):
    """All numbers of experts or weights in the order layer, iteration, position, rank."""
    return [x for chain in chains.values() for call in chain for token in call for x in token]


def read_lens(path, trace):
    """What --lens holds of the trace's layers, in the order layer, iterations done, position."""
    rows = {}
    for line in read_tsv(path):
        try:
            key = int(line["layer"]), int(line["iterations"]), int(line["position"])
            rows[key] = line
            if trace.tokens[key[2]] != int(line["token"]):
                raise Failure(f"{path}: has token {line['token']} at position {key[2]}, the trace "
                              f"{trace.tokens[key[2]]}: they must be of one text")
            if line["model"] != trace.model.fingerprint:
                raise Failure(f"{path}: is of the model {line['model'][:60]}, {trace.model.path} is "
                              f"{trace.model.fingerprint}")
        except (KeyError, ValueError, IndexError):
            raise Failure(f"{path}: is not what run --lens makes of the trace's text")
    C, T = trace.model.iterations, range(len(trace.tokens))
    try:
        found = [rows[l, c, t] for l in trace.experts for c in range(C + 1) for t in T]
    except KeyError as e:
        raise Failure(f"{path}: has no line for layer, iterations, position {e}")
    number = lambda name, line: float(line[name] or "nan")
    guesses = [int(line["guess"]) for line in found]
    ids = sorted(set(guesses))
    place = {token: i for i, token in enumerate(ids)}
    last = max(trace.experts)
    return {"names": [trace.model.piece(token).decode("utf-8", "replace") for token in ids],
            "guess": packed("H", [place[token] for token in guesses]),
            "other": packed("H", [int(line["other_choice"] or 0) for line in found]),
            "sure": packed("f", [number("p_guess", line) for line in found]),
            "next": packed("f", [number("p_next", line) for line in found]),
            "loss": packed("f", [number("loss", rows[last, C, t]) for t in T])}


def data(trace, lens):
    """What the page has to know, as JSON; "<" is escaped because it goes into a <script>."""
    model = trace.model
    facts = {"model": os.path.basename(model.path), "E": model.experts, "K": model.chosen,
             "C": model.iterations, "shared": model.shared, "layers": list(trace.experts),
             "tokens": trace.tokens, "labels": trace.labels(),
             "experts": packed("H", flat(trace.experts)),
             "weights": packed("f", flat(trace.weights)),
             "lens": lens and read_lens(lens, trace)}
    return json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")


def page(trace, lens=None):
    """viewer/page.html with the files it names in {{}} put in their places, and the trace."""
    def part(match):
        if match[1] == "trace":
            return data(trace, lens)
        with open(os.path.join(PARTS, match[1]), encoding="utf-8") as f:
            return f.read().rstrip()
    with open(os.path.join(PARTS, "page.html"), encoding="utf-8") as f:
        return re.sub(r"\{\{(.+?)\}\}", part, f.read())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model.bin that wrote the trace")
    parser.add_argument("trace", help="what ./run --trace wrote")
    parser.add_argument("--lens", help="what run --lens wrote of the same text")
    parser.add_argument("-o", "--output", default="routing.html", help="[routing.html]")
    args = parser.parse_args()
    if any(export.same_file(args.output, x) for x in (args.model, args.trace, args.lens)
           if x):
        parser.error(f"{args.output} is read, too, --output must be a file of its own")
    trace = Trace(args.trace, Model(args.model))
    write_file(args.output, page(trace, args.lens))
    print(f"{args.output}: {len(trace.tokens)} tokens, {os.path.getsize(args.output)} bytes",
          file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
