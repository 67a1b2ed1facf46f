#!/usr/bin/env python3
"""What a chain still can do with a part of it changed: counts what it writes right.

    ./train --show_val 60 > val.txt
    python3 experiments/edits.py lab/demo.bin val.txt
    python3 experiments/edits.py lab/demo.bin val.txt -- "--silence layer=3" "--parallel all"

Prints a table, a row for each change (run's options; without any, those of CHANGES): the loss of
the answers in nats a token, how many problems are solved, and of the equations that the model
writes how many are right, by kind. The answers are greedy.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from common import ROOT, Failure, command_line, markdown

RUN = os.path.join(ROOT, "run")
CHANGES = ["", "--gate_input all", "--parallel all", *(f"--parallel layer={l}" for l in range(4)),
           "--swap_gates all", "--silence iteration=0", "--silence iteration=1", "--silence shared"]
KINDS = {"*": "products", "+": "sums", "-": "differences", "/": "quotients"}
RIGHT = {"*": lambda a, b, c: a * b == c, "+": lambda a, b, c: a + b == c,
         "-": lambda a, b, c: a - b == c, "/": lambda a, b, c: b and a == b * c}


def call(*args):
    done = subprocess.run([RUN, *args, "--threads", "1"], capture_output=True, text=True)
    if done.returncode:
        raise Failure(done.stderr.strip().splitlines()[-1])
    return done.stdout


def equations(text):
    """(kind, whether it is right) of each equation."""
    for a, sign, b, c in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
        yield sign, RIGHT[sign](int(a), int(b), int(c))


def answer(text):
    found = re.search(r"^#### (\d+)$", text, re.M)
    return found and found[1]


def row(model, path, problems, change):
    """One row of the table."""
    options = shlex.split(change)
    out = call(model, "-m", "eval", "-c", "192", "--completion_only_loss", "true", "-f", path,
               *options)
    nll = dict(line.split(" ", 1) for line in out.splitlines())["nll"]
    solved, right, written = 0, dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for question, wanted in problems:
        told = call(model, "-t", "0", "-n", "96", "-i", question, *options)[len(question):]
        solved += answer(told) == answer(wanted)
        for sign, good in equations(told):
            written[sign] += 1
            right[sign] += good
    return (f"`{change}`" if change else "nothing", f"{float(nll):.4f}",
            f"{solved} of {len(problems)}", *(f"{right[s]} of {written[s]}" for s in KINDS))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="problems, as ./train --show_val prints them")
    words = sys.argv[1:]
    own = words[:words.index("--")] if "--" in words else words
    args, changes = parser.parse_args(own), words[len(own) + 1:] or CHANGES
    with open(args.text, encoding="utf-8") as f:
        documents = [text for text in f.read().split("<|endoftext|>\n") if "answer:" in text]
    if not documents:
        raise Failure(f"{args.text}: no document has an answer")
    problems = [(text[:text.index("answer:")], text[text.index("answer:"):]) for text in documents]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = list(pool.map(lambda change: row(args.model, args.text, problems, change), changes))
    print(markdown([("what is changed", "nll", "solved", *KINDS.values()), *rows]), end="")


if __name__ == "__main__":
    command_line(main)
