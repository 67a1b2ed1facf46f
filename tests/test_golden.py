#!/usr/bin/env python3
"""Checks training against the reference's numbers: gradients, losses and twelve steps of AdamW.

    python3 tests/test_golden.py ./train build/dump_grads      the last line is "N passed, N failed"

Logits, routing and greedy decoding of the same golden models are in test_run.py, whose reader and
writer of files serve here, too. Needs nothing but Python.
"""
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from array import array

sys.dont_write_bytecode = True
import test_run
from test_run import DEFAULT, GOLDEN, check, read_floats, read_weights, tensor_list, write_golden

TRAIN, DUMP_GRADS = (os.path.abspath(path) for path in sys.argv[1:3])


def call(*args, threads=1):
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, env=environment)
    check(f"{os.path.basename(args[0])} {' '.join(map(str, args[1:]))}", done.returncode == 0,
          done.stderr)
    return done.stdout


def write_tokens(path, ids):
    """A token file as llm.c writes it."""
    with open(path, "wb") as f:
        f.write(struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0"))
        f.write(array("H", ids).tobytes())


def by_name(numbers, config, upcycled):
    """The tensors in an array laid out like the weights of a model.bin, where every stack of
    copies starts at a multiple of 16 numbers."""
    tensors, at = {}, 0
    for name, copies, rows, cols in tensor_list({**DEFAULT, **config}, upcycled):
        at += -at % 16 if copies else 0
        for e in range(copies):
            tensors[name.format(e)] = numbers[at:at + rows * cols]
            at += rows * cols
    return tensors


def norm(x):
    return math.sqrt(sum(v * v for v in x))


def distance(a, b):
    return norm(x - y for x, y in zip(a, b)) if len(a) == len(b) else math.inf


def relative(a, b):
    return abs(a - b) / abs(b)


def test_gradients(name, config, golden, reference, here):
    B, L = reference["batch_size"], reference["max_length"]
    out = dict(line.split() for line in call(
        DUMP_GRADS, here("model.bin"), here("tokens"), B, L, here("grads"), here("targets"),
    ).splitlines())
    ours = by_name(read_floats(here("grads")), config, name == "upcycled")
    expected = {k[5:]: v for k, (_, v) in golden.items() if k.startswith("grad.")}
    check(f"{name}: names of the gradients", ours.keys() == expected.keys(),
          ours.keys() ^ expected.keys())
    loss, aux = float(out.get("loss", "nan")), float(out.get("aux_loss", "nan"))
    check(f"{name}: loss", relative(loss, reference["loss"]) < 1e-5, loss)
    check(f"{name}: auxiliary loss", abs(aux - reference["aux_loss"]) <=
          1e-5 * reference["aux_loss"], aux)
    worst = 0
    for tensor in expected.keys() & ours.keys():
        a, b = ours[tensor], expected[tensor]
        if not any(b):                  # an expert that nobody chose
            check(f"{name}: no gradient of {tensor}", not any(a))
            continue
        off = distance(a, b) / norm(b)
        entry = max(abs(x - y) for x, y in zip(a, b)) / max(map(abs, b))
        check(f"{name}: gradient of {tensor}", off < 1e-4 and entry < 1e-3,
              f"{off:.1e}, {entry:.1e}")
        worst = max(worst, off)
    return worst


def test_steps(name, config, golden, reference, here):
    """Twelve steps of ./train on a stream in file order."""
    a, steps = reference["adamw"], reference["trajectory"]
    logs = []
    for threads in (1, 2):
        call(TRAIN, "--init", here("model.bin"), "-d", here("stream"), "--sequential",
             "-b", reference["batch_size"], "-l", reference["max_length"], "-x", len(steps),
             "--learning_rate", a["lr"], "--warmup_steps", a["warmup_steps"],
             "--lr_scheduler", "constant", "--log", here("log"), "-o", here("after.bin"),
             threads=threads)
        with open(here("log")) as f:
            head, *rows = [line.rstrip("\n").split("\t") for line in f]
        logs.append([dict(zip(head, row), tokens_per_s="") for row in rows])
    check(f"{name}: one thread and two log the same", logs[0] == logs[1])
    check(f"{name}: steps", [row["step"] for row in logs[0]] == [str(s["step"]) for s in steps])
    worst = 0
    for row, expected in zip(logs[0], steps):
        for what in ("loss", "aux_loss", "grad_norm", "lr"):
            off = relative(float(row[what]), expected[what]) if expected[what] else \
                abs(float(row[what]))
            check(f"{name}: {what} of step {row['step']}", off < 2e-4, f"{off:.1e}")
            worst = max(worst, off)

    # The weights move by AdamW's m / sqrt(v), whose size is about 1 however small the gradient is.
    # Where a gradient is hardly more than its rounding, so is that direction: single entries may
    # be off by a part of the learning rate, while the tensor as a whole is not.
    ours = by_name(read_weights(here("after.bin")), config, name == "upcycled")
    far = 0
    for tensor, after in ours.items():
        if tensor.endswith("e_score_correction_bias"):
            check(f"{name}: {tensor} stays", list(after) == list(golden["after." + tensor][1]))
        off = distance(after, golden["after." + tensor][1]) / norm(golden["after." + tensor][1])
        check(f"{name}: {tensor} after {len(steps)} steps", off < 2e-4, f"{off:.1e}")
        far = max(far, off)
    return worst, far


def test_narrow(name, here):
    """Training from bf16 and q8 starts from the numbers that these stand for."""
    for dtype in ("bf16", "q8"):
        for decoded in (False, True):
            write_golden(name, here("model.bin"), dtype=dtype, decoded=decoded)
            call(TRAIN, "--init", here("model.bin"), "-d", here("stream"), "--sequential", "-b", 2,
                 "-l", 24, "-x", 1, "-o", here(f"{decoded}.bin"))
        with open(here("True.bin"), "rb") as a, open(here("False.bin"), "rb") as b:
            check(f"{name}: a step from {dtype}", a.read() == b.read())


def main():
    print("relative deviations from the reference: gradients, logs of 12 steps, weights after them")
    with tempfile.TemporaryDirectory() as folder:
        here = lambda name: os.path.join(folder, name)
        for name in sorted(os.listdir(GOLDEN)):
            config, golden = write_golden(name, here("model.bin"))
            with open(os.path.join(GOLDEN, name, "golden.json")) as f:
                reference = json.load(f)
            write_tokens(here("tokens"), golden["tokens"][1])
            write_tokens(here("targets"), golden["targets"][1])
            write_tokens(here("stream"), golden["train.stream"][1])
            grads = test_gradients(name, config, golden, reference, here)
            steps, after = test_steps(name, config, golden, reference, here)
            print(f"  {name:24} {grads:.1e} {steps:.1e} {after:.1e}")
            test_narrow(name, here)
    print(f"{test_run.passed} passed, {test_run.failed} failed")
    sys.exit(test_run.failed > 0)


if __name__ == "__main__":
    main()
