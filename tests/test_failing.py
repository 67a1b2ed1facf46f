#!/usr/bin/env python3
"""Checks what happens when a call fails: of each function of the C library that programs of this
kind depend on, the first call, the second, and so on for all of them.

    python3 tests/test_failing.py ./train ./run

The last line is "N passed, N failed", and ", 1 skipped" where tests/failing.c cannot be loaded in
front of the C library. Needs a C compiler.
"""
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True
import modelbin
import test_run
import test_train
from test_train import END, check, documents, environment, read, write

TRAIN = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "train")
RUN = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else "run")
MEMORY = ("malloc", "calloc", "realloc")
FILES = ("mmap", "open", "fopen", "fdopen", "fread", "fwrite", "fflush", "fseeko", "fsync",
         "fsync-folder", "rename", "fclose", "close")
NEEDED = ("mmap", "fdopen", "fseeko", "fsync", "rename", "fclose")     # nothing is done without
OLD = b"what was there before\n"
MODEL = ["--hidden_size", 8, "--num_hidden_layers", 1, "--num_attention_heads", 1,
         "--kv_lora_rank", 4, "--qk_nope_head_dim", 2, "--qk_rope_head_dim", 2, "--v_head_dim", 2,
         "--n_routed_experts", 2, "--num_experts_per_tok", 1, "--moe_intermediate_size", 4,
         "-b", 1, "-l", 8]
MERGES = [(b"t", b"h"), (b"th", b"e")]


class Command:
    """One that is run again and again: in a folder with the `inputs` and, of `outputs`, what was
    there before. `stdin` is what it reads there."""
    def __init__(self, name, program, args, inputs=(), outputs=(), stdin=b""):
        self.name, self.program, self.args = name, program, [str(x) for x in args]
        self.inputs, self.outputs, self.stdin = inputs, outputs, stdin

    def run(self, source, folder, there):
        """Runs it in a fresh folder: (exit code, stdout, stderr, {file: its bytes})."""
        os.makedirs(folder)
        for name in (*self.inputs, *self.outputs):
            if os.path.exists(os.path.join(source, name)):
                shutil.copy(os.path.join(source, name), folder)
            else:
                write(os.path.join(folder, name), OLD)
        done = subprocess.run([self.program, *self.args], input=self.stdin, cwd=folder, env=there,
                              capture_output=True, timeout=60)
        files = {name: read(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
        return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"), files


def commands(source):
    """All commands, with what they need in the folder `source`."""
    here = lambda name: os.path.join(source, name)
    test_run.write_tiny(here("m.bin"), chat_template="deepseek_v2")
    pattern = [[[(0, test_run.DARK, 1, test_run.NO_LIMIT)], [(0, test_run.SPACE, 1, 1)]]]
    test_run.write_tiny(here("bpe.bin"), 2, section=test_run.tokenizer_section(MERGES, [], pattern))
    write(here("prompt"), "the cat")
    write(here("text"), END.join(documents(25)))
    train = lambda *args: subprocess.run([TRAIN, *map(str, args)], cwd=source, check=True,
                                         capture_output=True, env=environment())
    data = ["-d", "text", "--val", "prompt"]
    train(*MODEL, *data, "-x", 2, "-o", "c.bin", "--log", "c.tsv", "--best", "best.bin")
    train(*MODEL, "--inner_iter", 1, "-d", "text", "-x", 1, "-o", "old.bin")
    return [
        Command("generate", RUN, ["m.bin", "-i", "ab", "-n", 3, "-t", 0, "--trace", "trace"],
                ["m.bin"], ["trace"]),
        Command("eval", RUN, ["bpe.bin", "-m", "eval", "-f", "prompt", "--logits", "logits",
                              "--trace", "trace"], ["bpe.bin", "prompt"], ["logits", "trace"]),
        Command("chat", RUN, ["m.bin", "-m", "chat", "-n", 2, "-t", 0], ["m.bin"],
                stdin=b"hi\nyou\n"),
        Command("lens", RUN, ["m.bin", "-m", "lens", "-i", "abc", "--lens", "lens"], ["m.bin"],
                ["lens"]),
        Command("info", RUN, ["c.bin", "-m", "info"], ["c.bin"]),
        Command("tokenize", RUN, ["bpe.bin", "-m", "tokenize", "-f", "prompt"],
                ["bpe.bin", "prompt"]),
        Command("train", TRAIN, [*MODEL, *data, "-x", 2, "--save_steps", 1, "--eval_steps", 1, "-o",
                                 "old.bin", "--log", "log", "--best", "kept.bin"],
                ["text", "prompt"], ["old.bin", "log", "kept.bin"]),
        Command("train on problems", TRAIN, [*MODEL, "-x", 1, "--eval_problems", 1, "-o",
                                             "old.bin"], outputs=["old.bin"]),
        Command("--init", TRAIN, ["--init", "bpe.bin", *data, "-b", 1, "-l", 8, "-x", 1, "-o",
                                  "old.bin"], ["text", "prompt", "bpe.bin"], ["old.bin"]),
        Command("--resume", TRAIN, ["--resume", "c.bin", *data, "-x", 3, "--log", "c.tsv", "--best",
                                    "best.bin"], ["text", "prompt"],
                ["c.bin", "c.tsv", "best.bin"])]


def without_speed(name, data):
    """A file without what differs from run to run: in a log, how fast it was."""
    if name not in ("log", "c.tsv") or data == OLD:
        return data
    return b"\n".join(b"\t".join(line.split(b"\t")[:5] + line.split(b"\t")[6:])
                      for line in data.split(b"\n"))


class Judge:
    """What may be after a command with a call that failed."""
    def __init__(self, command, source, folder, there):
        self.command, self.source, self.folder, self.there = command, source, folder, there
        self.code, self.out, self.err, files = command.run(source, os.path.join(folder, "right"),
                                                           there)
        self.right = {name: without_speed(name, data) for name, data in files.items()}
        self.sound = {}                                 # (file, bytes) -> whether it may be there
        for name in command.outputs:
            before = os.path.join(source, name)
            before = read(before) if os.path.exists(before) else OLD
            self.sound[name, without_speed(name, before)] = True
        for name, data in self.right.items():
            self.sound[name, data] = True

    def is_sound(self, name, data):
        """Whether an output is whole: a log of whole lines that goes on as the right one, or a
        model whose checksum is right."""
        data = without_speed(name, data)
        if (name, data) not in self.sound:
            try:
                self.sound[name, data] = self.right[name].startswith(data) and data[-1:] == b"\n" \
                    if name in ("log", "c.tsv") else bool(modelbin.parse(data).weights)
            except Exception:
                self.sound[name, data] = False
        return self.sound[name, data]

    def wrong_with(self, function, n, folder):
        """Has the n-th call of a function fail. Returns what is wrong then, or "". """
        there = self.there | {"FAIL_CALL": f"{function}:{n}"}
        code, out, err, files = self.command.run(self.source, folder, there)
        expected, lines = {*self.command.inputs, *self.command.outputs}, err.splitlines()
        program = os.path.basename(self.command.program).split("-")[0]
        if code == 0 and function in NEEDED:
            return f"exit 0, as if nothing were wrong: {err[-200:]}"
        if code == 0:                                   # then nobody must notice
            files = {name: without_speed(name, data) for name, data in files.items()}
            if out != self.out or files != self.right:
                return f"exit 0, but stdout {out[-60:]} or one of {[*files]} differs: {err[-200:]}"
            return ""
        if code != 1:
            return f"exit {code}: {err[-200:]}"
        named = [line for line in lines if line.startswith(f"{program}: ")]
        of_openmp = function in MEMORY and lines[-1].startswith("libgomp: Out of memory")
        if not of_openmp and (not named or named[-1] != lines[-1]):
            return f"no line \"{program}: ...\" in the end: {err[-200:]}"
        things = [*expected, "stdout"] + (["memory"] if function in MEMORY else [])
        if not any(thing in lines[-1] for thing in things):
            return f"the line names nothing: {lines[-1]}"
        if set(files) - expected:
            return f"left behind: {set(files) - expected}"
        for name in self.command.outputs:
            if name not in files:
                return f"{name} is gone"
            if not self.is_sound(name, files[name]):
                return f"{name} is neither the old one nor a whole new one: {files[name][:60]}"
        if any(files[name] != read(os.path.join(self.source, name))
               for name in self.command.inputs):
            return "an input has changed"
        return ""


def numbers(judge, function, path):
    """Which calls of a function are to fail: all, or where they are very many (each of the held-out
    problems takes some memory) all of the first, and every tenth of the others."""
    judge.command.run(judge.source, path + ".folder", judge.there | {
        "FAIL_CALL": f"{function}:0", "FAIL_COUNT": path})
    n = os.path.getsize(path) if os.path.exists(path) else 0
    return [i for i in range(1, n + 1) if i <= 300 or i % 10 == 0]


def try_all(folder, functions):
    there = test_run.failing(folder, TRAIN, RUN)
    there |= environment() | {"LD_PRELOAD": there["LD_PRELOAD"]}
    source = os.path.join(folder, "source")
    os.mkdir(source)
    with ThreadPoolExecutor(3) as pool:
        for k, command in enumerate(commands(source)):
            judge = Judge(command, source, os.path.join(folder, str(k)), there)
            check(f"{command.name}: works", judge.code == 0, judge.err)

            def one(case):
                function, n = case
                place = os.path.join(folder, str(k), f"{function}-{n}")
                wrong = judge.wrong_with(function, n, place)
                shutil.rmtree(place, ignore_errors=True)
                return f"{command.name}: {function} number {n}", wrong
            calls = {f: numbers(judge, f, os.path.join(folder, str(k), f)) for f in functions}
            for what, wrong in pool.map(one, [(f, n) for f in functions for n in calls[f]]):
                check(what, not wrong, wrong)
            print(f"{command.name}: {', '.join(f'{len(n)} {f}' for f, n in calls.items() if n)}")


def test_memory(folder):
    """The n-th allocation fails."""
    try_all(folder, MEMORY)


def test_files(folder):
    """A file cannot be opened, read, written, flushed, put on the disk, renamed or closed."""
    try_all(folder, FILES)


def test_next_run(folder):
    """After a save that failed in any way, --resume goes on and ends in the same bytes."""
    there = test_run.failing(folder, TRAIN)
    there |= environment() | {"LD_PRELOAD": there["LD_PRELOAD"]}
    text = write(os.path.join(folder, "text"), END.join(documents(25)))
    here = lambda name: os.path.join(folder, name)
    run = [TRAIN, *map(str, MODEL), "-d", text, "-x", "3", "--save_steps", "1", "--log"]
    subprocess.run([*run, here("right.tsv"), "-o", here("right.bin")], env=there,
                   capture_output=True)
    tried = 0
    for function in ("fwrite", "fflush", "fsync", "rename", "fclose", "fdopen"):
        for n in range(1, 999, 1 if function != "fwrite" else 7):
            for name in ("a.bin", "a.tsv", "count"):
                if os.path.exists(here(name)):
                    os.remove(here(name))
            command = [*run, here("a.tsv"), "-o", here("a.bin")]
            first = subprocess.run(command, capture_output=True, env=there | {
                "FAIL_CALL": f"{function}:{n}", "FAIL_COUNT": here("count")})
            if os.path.getsize(here("count")) < n:
                break
            tried += 1
            if os.path.exists(here("a.bin")):
                command[1:1 + len(MODEL)] = ["--resume", here("a.bin")]
            then = subprocess.run(command, capture_output=True, env=there)
            log = [without_speed("log", read(here(name))) for name in ("a.tsv", "right.tsv")]
            check(f"{function} number {n}: the next run", then.returncode == 0 and
                  log[0] == log[1] and read(here("a.bin")) == read(here("right.bin")),
                  (first.stderr[-200:], then.stderr[-200:]))
            check(f"{function} number {n}: nothing is left", {*os.listdir(folder)} - {"count"} == {
                "a.bin", "a.tsv", "failing.so", "right.bin", "right.tsv", "text"},
                os.listdir(folder))
    check("many were tried", tried > 20, tried)


def test_clock(folder):
    """The time of day jumps: speeds are measured by another clock, and nothing else changes."""
    there = test_run.failing(folder, TRAIN, RUN)
    there |= environment() | {"LD_PRELOAD": there["LD_PRELOAD"]}
    here = lambda name: os.path.join(folder, name)
    text = write(here("text"), END.join(documents(25)))
    logs = []
    for jumps in ({}, {"CLOCK_JUMPS": "1"}):
        r = test_train.good("a run", *MODEL, "-d", text, "-x", 20, "--eval_steps", 5, "--log",
                            here("l"), "-o", here("a.bin"), "--profile", env=there | jumps)
        head, *rows = [line.split("\t") for line in read(here("l")).decode().splitlines()]
        speeds = [float(row[head.index("tokens_per_s")]) for row in rows]
        check("speeds are positive, and no wonder", all(1 < x < 1e8 for x in speeds), speeds)
        check("no time is negative", not re.search(r"[^\w]-\d", r.err), r)
        logs.append((without_speed("log", read(here("l"))), read(here("a.bin"))))
        done = subprocess.run([RUN, here("a.bin"), "-m", "bench"], capture_output=True, text=True,
                              env=there | jumps, timeout=60)
        values = dict(line.split() for line in done.stdout.splitlines())
        check("the speed of run", done.returncode == 0 and
              1 < float(values["decode_tok_s"]) < 1e8, done)
    check("the same model and log", logs[0] == logs[1])


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        loaded = test_run.failing(folder, TRAIN, RUN)
    if not loaded:
        print("skipped: tests/failing.c cannot be loaded in front of the C library here")
        print("0 passed, 0 failed, 1 skipped")
        sys.exit(0)
    test_train.main(globals())
