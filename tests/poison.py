#!/usr/bin/env python3
"""Looks for memory that is read before it is written: trains and runs small models of many kinds
with programs whose new memory is full of NaN (tests/nan_calloc.h), and with the same programs with
zeros. All that they write must be the same, byte for byte.

    python3 tests/poison.py                 the last line is "N passed, N failed"
    python3 tests/poison.py --find          which memory counts on zeros, as allocate() calls it
    python3 tests/poison.py --valgrind      under valgrind, whether anything depends on such memory

Needs a C compiler, and the last one valgrind.
"""
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
import test_run
from races import KINDS, MODEL
from test_run import check
from test_train import END, documents, write

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FOLDER = os.path.join(ROOT, "build", "poison")
CC = os.environ.get("CC", "cc")
BUILD = os.environ.get("BUILD", f"{CC} -O3 -fno-math-errno -march=native")
# What this valgrind does not know must not be in the programs: vectors of 64 bytes.
VALGRIND = ["valgrind", "-q", "--error-exitcode=99", "--track-origins=yes"]
FOR_VALGRIND = f"{CC} -O1 -g -march=haswell -DLEFT_UNWRITTEN -Wno-unknown-pragmas"
POISON = ["-include", os.path.join(HERE, "nan_calloc.h"), "-w"]
GOLDEN = (("coe", "f32"), ("v3-routing", "q8"), ("upcycled", "bf16"), ("dense-experts", "q8"),
          ("prenorm-chain", "f32"))


def build(kind, compiler):
    """Both programs, in a folder of their own."""
    folder = os.path.join(FOLDER, kind)
    os.makedirs(folder, exist_ok=True)
    jobs = [subprocess.Popen([*shlex.split(compiler), "-o", f"{folder}/{name}",
                              f"{ROOT}/{name}.c", "-lm"], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
            for name in ("train", "run")]
    for job in jobs:
        check(f"{kind} is built", job.wait() == 0, job.stdout.read()[-999:])
    return folder


# valgrind takes its time: fewer kinds, and fewer ways to run each model.
SOME_KINDS = ["a chain", "sigmoid, balanced, pre-norm", "completions, no shared expert"]


def commands(source, kinds):
    """(what, program, arguments); those of one kind of training need what the first has made."""
    some = ["-i", "".join(chr(97 + i % 26) for i in range(40))]
    for kind in kinds:
        data = ["-d", f"{source}/text"] if kind != "problems" else ["--eval_problems", "2"]
        yield kind, "train", [*MODEL, *KINDS.get(kind, []), *data, "--save_steps", "1", "--log",
                              "log", "--best", "best.bin", "-o", "m.bin"]
        yield f"{kind}, resumed", "train", ["--resume", "m.bin", *data, "-x", "3", "--log", "log"]
    models = [f"{source}/{name}.bin" for name, _ in GOLDEN] + ["m.bin", f"{source}/bpe.bin"]
    for model in models:
        texts = some if model[0] == "m" or "bpe" in model else ["--ids", "-i", " ".join(
            str(i % 60) for i in range(40))]
        name = os.path.basename(model)
        for args in (["-n", "9", "-s", "1"],
                     ["-m", "eval", "--logits", "logits", "--trace", "trace"],
                     ["-m", "lens", "--lens", "lens"],
                     ["-m", "eval", "-c", "16", "--silence", "layer=1"],
                     ["-n", "5", "-t", "0", "--repeat-penalty", "1.3", "--gate_input", "layer=1"]
                     )[:3 if kinds == SOME_KINDS else 5]:
            if "--gate_input" not in args or name not in ("v3-routing.bin",):
                yield f"{name} {args}", "run", [model, *texts, *args]
        yield f"{name} -m info", "run", [model, "-m", "info"]
    yield "chat", "run", [f"{source}/bpe.bin", "-m", "chat", "-t", "0", "-n", "8", "-c", "40"]
    yield "tokenize", "run", [f"{source}/bpe.bin", "-m", "tokenize", "-f", f"{source}/text"]


def prepare(source):
    write(os.path.join(source, "text"), END.join(f"{text}answer: {text}" for text in documents(40)))
    for name, dtype in GOLDEN:
        test_run.write_golden(name, os.path.join(source, f"{name}.bin"), dtype=dtype)
    test_run.write_tiny(os.path.join(source, "bpe.bin"), 2, section=test_run.WORDS_AND_DIGITS,
                        vocab_size=270, bos_token_id=261, eos_token_id=262,
                        chat_template="deepseek_v2")


def results(source, programs, kinds, before=(), more={}):
    """{what: (exit code, stdout, the files' bytes)} of all commands."""
    found = {}
    there = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **more}
    with tempfile.TemporaryDirectory() as folder:
        for what, program, args in commands(source, kinds):
            done = subprocess.run([*before, f"{programs}/{program}", *args], cwd=folder, env=there,
                                  input=b"one two\nthree\n", capture_output=True)
            files = {}
            for path in sorted(glob.glob(folder + "/*")):
                with open(path, "rb") as f:
                    data = f.read()
                if path.endswith("log"):                # how fast it was
                    rows = [row.split(b"\t") for row in data.split(b"\n")]
                    data = [row[:5] + row[6:] for row in rows]
                files[os.path.basename(path)] = data
            found[what] = done.returncode, done.stdout, files, done.stderr
    return found


def compare(right, found):
    """The commands whose results differ."""
    return [what for what in right if right[what][:3] != found[what][:3]]


def names():
    """What memory is called that is allocated anywhere."""
    found = set()
    for path in ("coe.c", "train.c", "run.c", *glob.glob(f"{ROOT}/lib/*.h")):
        with open(os.path.join(ROOT, path)) as f:
            found |= {*re.findall(r'allocate\([^;"]*"([^"]*)"\)', f.read())}
    return sorted(found)


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    kinds = [*KINDS, "problems"]
    with tempfile.TemporaryDirectory() as source:
        prepare(source)
        if "--valgrind" in sys.argv:
            wild = build("valgrind", f"{FOR_VALGRIND} {' '.join(POISON)}")
            for what, (code, _, _, err) in results(source, wild, SOME_KINDS, VALGRIND).items():
                check(f"{what}, under valgrind", code == 0, f"exit {code}\n{err.decode()[:3000]}")
        else:
            zeros, wild = build("zeros", f"{BUILD} -w"), build("nan", f"{BUILD} {' '.join(POISON)}")
            right = results(source, zeros, kinds)
            for what, result in right.items():
                check(f"{what} works", result[0] == 0, result[3][-300:])
            if "--find" in sys.argv:                    # where nothing is zeroed but what is named
                wild = build("find", f"{BUILD} -DFIND_ZEROED {' '.join(POISON)}")
                for name in names():
                    zeroed = "|" + "|".join(n for n in names() if n != name) + "|"
                    wrong = compare(right, results(source, wild, kinds, more={"ZEROED": zeroed}))
                    print(f"{name}: {f'counts on zeros, as in {wrong[0]}' if wrong else 'ok'}",
                          flush=True)
            else:
                found = results(source, wild, kinds)
                for what in right:
                    check(f"{what}: the same with NaN in new memory",
                          what not in compare(right, found),
                          (found[what][0], found[what][3][-300:]))
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"{test_run.passed} passed, {test_run.failed} failed")
    return test_run.failed > 0


if __name__ == "__main__":
    sys.exit(main())
