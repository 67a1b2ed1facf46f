#!/usr/bin/env python3
"""Checks what happens to files: two programs that write one, outputs that are inputs, links, full
disks, signals, and data that is no text.

    python3 tests/test_files.py ./train ./run

The last line is "N passed, N failed". Needs nothing but Python; what a preloaded library has to
stand in for needs a C compiler, and glibc.
"""
import atexit
import gzip
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time

sys.dont_write_bytecode = True
import modelbin
import test_run
import test_train
from test_train import (END, SMALL, TRAIN, bad, check, environment, good, read, read_log, train,
                        write)

RUN = os.path.abspath(sys.argv[2] if len(sys.argv) > 2 else "run")
TEXT = "".join(f"{i} and {i} is {2 * i}, as everybody knows.\n" + END for i in range(60))
QUICK = [*SMALL, "-x", 2, "--eval_problems", 0]


def run(*args, **more):
    more = {"capture_output": True, "stdin": subprocess.DEVNULL, "timeout": 60,
            "env": environment()} | more
    done = subprocess.run([RUN, *map(str, args)], **more)
    return test_train.Result(done.returncode, *((x or b"").decode("utf-8", "replace")
                                                for x in (done.stdout, done.stderr)))


def start(program, *args, **more):
    """Starts a program, which does not ignore SIGHUP even if these tests run under nohup, and does
    not outlive them."""
    process = subprocess.Popen([program, *map(str, args)], env=environment(),
                               **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                                  "stderr": subprocess.PIPE, "preexec_fn": lambda: signal.signal(
                                      signal.SIGHUP, signal.SIG_DFL)} | more)
    atexit.register(lambda: process.poll() is None and process.kill())
    return process


def wait_for(path):
    """Waits until a file is there, 20 seconds at most."""
    for _ in range(2000):
        if os.path.exists(path):
            return True
        time.sleep(0.01)
    return False


def is_model(path):
    return run(path, "-m", "info").code == 0


# ---- two programs -------------------------------------------------------------------------------

def test_two_trainers(folder):
    """The second on an output or a log of the first is refused; a dead one is in nobody's way."""
    here = lambda name: os.path.join(folder, name)
    long = [*SMALL, "-x", 10**9, "--eval_steps", 0, "--save_steps", 5, "--eval_problems", 0]
    first = start(TRAIN, *long, "-o", here("a.bin"), "--log", here("a.tsv"))
    check("the first one saves", wait_for(here("a.bin")))
    for what, options in (("its output", ("-o", here("a.bin"))),
                          ("its output in other words", ("-o", folder + "/./a.bin")),
                          ("its output as a log", ("-o", here("b.bin"), "--log", here("a.bin"))),
                          ("its log", ("-o", here("b.bin"), "--log", here("a.tsv"))),
                          ("its log as --best", ("-o", here("b.bin"), "--best", here("a.tsv")))):
        bad(f"a second run on {what}", 1, ["another run", str(first.pid)], *QUICK, *options)
    os.symlink("a.bin", here("link.bin"))
    bad("a second run through a link", 1, ["another run"], *QUICK, "-o", here("link.bin"))
    os.remove(here("link.bin"))
    check("the first one goes on", first.poll() is None)
    first.send_signal(signal.SIGKILL)
    first.wait()
    check("a lock is left", os.path.exists(here("a.bin.lock")), os.listdir(folder))
    good("a dead one is in nobody's way", *QUICK, "-o", here("a.bin"), "--log", here("a.tsv"))
    check("nothing is left of both", sorted(os.listdir(folder)) == ["a.bin", "a.tsv"],
          os.listdir(folder))


def test_at_once(folder):
    """Two trainers, and two evals, begun at once on one file: one's file, whole, or a refusal."""
    here = lambda name: os.path.join(folder, name)
    wanted = []
    for seed in (1, 2):
        good("alone", *QUICK, "-s", seed, "-o", here("m.bin"))
        wanted.append(read(here("m.bin")))
    refused = 0
    for _ in range(50):
        both = [start(TRAIN, *QUICK, "-s", seed, "-o", here("m.bin")) for seed in (1, 2)]
        errors = [process.communicate()[1].decode() for process in both]
        codes = [process.returncode for process in both]
        refused += 1 in codes
        check("two trainers: one at least is done, the other refused or done",
              0 in codes and all(code == 0 or code == 1 and "another run" in error
                                 for code, error in zip(codes, errors)), errors)
        found = read(here("m.bin"))
        check("the file is that of one which is done", found in
              [w for w, code in zip(wanted, codes) if code == 0])
    check("some met", refused > 0, refused)
    prompts, logits = ("abc", "defgh"), []
    for prompt in prompts:
        run(here("m.bin"), "-m", "eval", "-i", prompt, "--logits", here("l"))
        logits.append(read(here("l")))
    for _ in range(50):
        both = [start(RUN, here("m.bin"), "-m", "eval", "-i", prompt, "--logits", here("l"))
                for prompt in prompts]
        check("two evals", [p.wait() for p in both] == [0, 0])
        check("the logits are one's", read(here("l")) in logits)
        for process in both:
            process.communicate()
    check("nothing is left", sorted(os.listdir(folder)) == ["l", "m.bin"], os.listdir(folder))


def test_kills(folder):
    """What is killed while it saves leaves the old file or the new one, and what it leaves beside it
    is gone after the next run."""
    here = lambda name: os.path.join(folder, name)
    rng = random.Random(1)
    for _ in range(100):
        process = start(TRAIN, *SMALL, "-x", 10**6, "--save_steps", 1, "--eval_steps", 0, "-o",
                        here("a.bin"), "--eval_problems", 0)
        wait_for(here("a.bin"))
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        check("whole after a kill", is_model(here("a.bin")))
    good("the next run", *QUICK, "-o", here("a.bin"))
    check("cleans up", os.listdir(folder) == ["a.bin"], os.listdir(folder))


# ---- files that meet ----------------------------------------------------------------------------

def test_clobber(folder):
    """Outputs that are inputs or other outputs, by any name, are refused before anything happens."""
    here = lambda name: os.path.join(folder, name)
    write(here("text"), TEXT)
    good("a model", *QUICK, "-o", here("m.bin"))
    os.symlink("m.bin", here("link"))
    os.link(here("text"), here("hard"))
    os.symlink("new", here("dangling"))
    os.mkdir(here("sub"))
    m, text, new = here("m.bin"), here("text"), here("new")
    before = {name: read(here(name)) for name in ("text", "m.bin")}
    for options in (["-d", text, "-o", text], ["-d", text, "-o", here("sub/../text")],
                    ["-d", text, "-o", here("hard")], ["-d", text, "-o", new, "--log", text],
                    ["-d", text, "--val", here("hard"), "-o", new, "--best", text],
                    ["--init", m, "-o", m], ["--init", m, "-o", here("link"), "-b", 1],
                    ["--tokenizer", m, "-o", here("link")], ["-o", new, "--log", new],
                    ["-o", new, "--log", here("dangling")], ["-o", new, "--best", new],
                    ["-o", new, "--best", here("sub/../new")], ["-o", here("b"), "--log", new,
                    "--best", new], ["--resume", m, "-o", new, "--log", m],
                    ["--resume", m, "--best", here("link")]):
        bad(f"train {options}", 2, ["file of its own"], *QUICK, *options)
    for options in (["-m", "eval", "-f", text, "--logits", text],
                    ["-m", "eval", "-f", text, "--trace", here("hard")],
                    ["-m", "eval", "-i", "x", "--logits", here("sub/../m.bin")],
                    ["-i", "x", "--trace", here("link")],
                    ["-m", "eval", "-i", "x", "--logits", new, "--trace", here("dangling")]):
        r = run(m, *options)
        check(f"run {options}", r.code == 2 and "file of its own" in r.err, r)
    check("nothing was touched", all(read(here(name)) == x for name, x in before.items())
          and not os.path.exists(new), os.listdir(folder))
    good("--resume may be replaced", "--resume", m, "-x", 3, "-o", here("link"))
    r = run(m, "-m", "eval", "-i", "abc", "--logits", "/dev/null", "--trace", "/dev/null")
    check("/dev/null may be named twice", r.code == 0, r)


def test_links(folder):
    """A link stays one, a file keeps its mode, and what may not be written stays as it is."""
    here = lambda name: os.path.join(folder, name)
    os.mkdir(here("big"))
    for name in ("m.bin", "l.tsv", "b.bin"):
        os.symlink(f"big/{name}", here(name))
    write(here("big/m.bin"), "")
    os.chmod(here("big/m.bin"), 0o640)
    good("through links", *QUICK, "-o", here("m.bin"), "--log", here("l.tsv"), "--best",
         here("b.bin"))
    check("links stay", all(os.path.islink(here(n)) for n in ("m.bin", "l.tsv", "b.bin")))
    check("their files are written", is_model(here("big/m.bin")) and is_model(here("big/b.bin")) and
          len(read_log(here("big/l.tsv"))) == 2)
    check("the mode stays", stat.S_IMODE(os.stat(here("m.bin")).st_mode) == 0o640)
    os.chmod(here("big/m.bin"), 0o600)
    good("resumed", "--resume", here("m.bin"), "-x", 3)
    check("and after --resume", stat.S_IMODE(os.stat(here("m.bin")).st_mode) == 0o600)
    umask = os.umask(0o027)
    good("a new file", *QUICK, "-o", here("new.bin"))
    os.umask(umask)
    check("has the mode of new files", stat.S_IMODE(os.stat(here("new.bin")).st_mode) == 0o640)
    check("nothing else is there", sorted(os.listdir(here("big"))) == ["b.bin", "l.tsv", "m.bin"])
    os.mkdir(here("other"))
    os.chmod(here("other"), 0o777)                      # the file alone may not be written
    good("a file", *QUICK, "-o", here("other/new.bin"))
    os.chmod(here("other/new.bin"), 0o444)
    os.symlink("other/new.bin", here("read-only.bin"))
    program, user = test_run.as_ordinary_user(folder, TRAIN)
    for name in ("other/new.bin", "read-only.bin"):
        before = read(here(name))
        bad(f"a read-only file, {name}", 1, [here(name), "ermission"], *QUICK, "-s", 2, "-o",
            here(name), program=program, **user)
        check("it stays, and nothing is beside it", read(here(name)) == before and
              os.listdir(here("other")) == ["new.bin"], os.listdir(here("other")))


def test_log(folder):
    """A log that is there and cannot be read is not taken for one that is not there."""
    here = lambda name: os.path.join(folder, name)
    good("a run", *QUICK, "-o", here("a.bin"), "--log", here("l"))
    os.rename(here("l"), here("kept"))
    os.mkdir(here("l"))
    bad("a folder as log", 1, [here("l")], "--resume", here("a.bin"), "-x", 3, "--log", here("l"))
    program, user = test_run.as_ordinary_user(folder, TRAIN)
    os.mkdir(here("open"))
    os.chmod(here("open"), 0o777)
    good("a run", *QUICK, "-o", here("open/a.bin"), "--log", here("open/l"))
    os.chmod(here("open/a.bin"), 0o666)
    os.chmod(here("open/l"), 0o222)
    before = read(here("open/l"))
    bad("a log that may not be read", 1, [here("open/l"), "ermission"], "--resume",
        here("open/a.bin"), "-x", 3, "--log", here("open/l"), program=program, **user)
    check("it stays", read(here("open/l")) == before)


# ---- numbers that are not finite ----------------------------------------------------------------

def test_diverged(folder):
    """Weights that are not finite never take the place of the last good checkpoint."""
    here = lambda name: os.path.join(folder, name)
    good("a good run", *QUICK, "-o", here("a.bin"))
    wild = ["--learning_rate", 1e9, "--weight_decay", 1e9, "--warmup_steps", 0, "--save_steps", 1]
    for steps in (1, 2, 5):
        before = read(here("a.bin"))
        bad(f"a run that explodes in {steps} steps", 1, ["finite"], *SMALL, *wild, "-x", steps,
            "--eval_problems", 0, "-o", here("a.bin"))
        check("the old file is there", read(here("a.bin")) == before or is_model(here("a.bin")))
        check("a model that can be used", run(here("a.bin"), "-i", "x", "-n", 3).code == 0)
    good("a good start", *SMALL, "-x", 3, "--eval_problems", 0, "-o", here("b.bin"))
    before = read(here("b.bin"))
    model = modelbin.parse(before)
    recipe = model.recipe | {"learning_rate": "1e9", "weight_decay": "1e9"}
    modelbin.write(here("c.bin"), model._replace(recipe=recipe))
    wild = read(here("c.bin"))
    bad("one that explodes after --resume", 1, ["finite", here("c.bin")], "--resume", here("c.bin"),
        "-x", 6, "--save_steps", 1)
    check("its checkpoint is the last good one", is_model(here("c.bin")) and
          run(here("c.bin"), "-i", "x", "-n", 3).code == 0 and len(read(here("c.bin"))) == len(wild))


def test_nothing_to_predict(folder):
    here = lambda name: os.path.join(folder, name)
    text = write(here("text"), TEXT)
    token_file = lambda *ids: struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + \
        struct.pack(f"<{len(ids)}H", *ids)
    for name, data in (("one", token_file(5)), ("none", token_file())):
        bad(f"validation data with {name} token", 1, [here(name), "predict"], *QUICK, "-d", text,
            "--val", write(here(name), data), "-o", here("a.bin"))
    check("nothing is written", not os.path.exists(here("a.bin")))
    good("two tokens", *QUICK, "-d", text, "--val", write(here("two"), token_file(5, 6)), "-o",
         here("a.bin"))


# ---- signals and disks --------------------------------------------------------------------------

def test_signals(folder):
    here = lambda name: os.path.join(folder, name)
    good("a model", *QUICK, "-o", here("m.bin"), "-l", 4000, "-b", 1)
    long = [here("m.bin"), "-n", -1, "--ignore-eos", "--trace", here("t"), "-i", "x"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = start(RUN, *long)
        process.stdout.read(3)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        check(f"run after {number.name}: names the file, leaves nothing", process.returncode == 130
              and here("t") in err.decode() and os.listdir(folder) == ["m.bin"],
              (process.returncode, err, os.listdir(folder)))
    endless = [*SMALL, "-x", 10**9, "--save_steps", 0, "--eval_steps", 0, "--eval_problems", 0,
               "-o", here("a.bin"), "--log", here("l")]
    for number in (signal.SIGHUP, signal.SIGTERM):
        process = start(TRAIN, *endless)
        wait_for(here("l"))
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        check(f"train after {number.name}: saves, and says so at once", process.returncode == 130 and
              b"finishes the step" in err and is_model(here("a.bin")), err)
        os.remove(here("l"))
    process = start(TRAIN, *endless, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(here("l"))
    time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    check("as under nohup it goes on", process.poll() is None)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    for name in ("a.bin", "l"):
        os.remove(here(name))
    r = run(here("m.bin"), "-m", "eval", "-i", "x" * 3000, "--logits", here("big"),
            preexec_fn=lambda: test_train.resource.setrlimit(test_train.resource.RLIMIT_FSIZE,
                                                             (10000, 10000)))
    check("a limit on files' sizes (SIGXFSZ)", r.code == 1 and here("big") in r.err and
          os.listdir(folder) == ["m.bin"], r)


def test_shrinks(folder):
    """A model file that another program cuts short while it is in use."""
    here = lambda name: os.path.join(folder, name)
    good("a model", *QUICK, "-d", write(here("text"), "A short text. " * 99), "--eval_windows", 1,
         "-o", here("m.bin"), "--moe_intermediate_size", 4096)
    os.remove(here("text"))
    whole = read(here("m.bin"))
    for what, cut, options in (("generating", 4096, ["-n", -1, "--ignore-eos"]),
                               ("generating, all of it gone", 0, ["-n", -1, "--ignore-eos"]),
                               ("with a trace", 4096, ["-n", -1, "--ignore-eos", "--trace",
                                                       here("trace")])):
        write(here("m.bin"), whole)
        process = start(RUN, here("m.bin"), *options)
        process.stdout.read(1)
        os.truncate(here("m.bin"), cut)
        _, err = process.communicate(timeout=20)
        line = f"run: {here('m.bin')}: became shorter while it was read"
        check(f"{what}: it ends in a line that names it", process.returncode == 1 and
              err.decode().splitlines()[-1] == line, err[-200:])
        check(f"{what}: nothing is left", os.listdir(folder) == ["m.bin"], os.listdir(folder))


def test_validation(folder):
    """Control-C during a long validation: it says at once that it saves, and soon has."""
    here = lambda name: os.path.join(folder, name)
    val = write(here("val"), TEXT * 3000)
    text = write(here("text"), TEXT)
    process = start(TRAIN, *SMALL, "-d", text, "--val", val, "-x", 10, "--eval_steps", 1,
                    "--eval_windows", 0, "-o", here("a.bin"))
    seen = b""
    while b"validation:" not in seen and process.poll() is None:
        seen += process.stderr.read1(4096)
    check("progress is shown", b"validation:" in seen, seen[-200:])
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    check("saved in two seconds", time.monotonic() - begin < 2 and process.returncode == 130 and
          is_model(here("a.bin")) and b"saves" in err, err)


def test_far_along(folder):
    """A checkpoint with millions of batches behind it goes on at once, and in the right place."""
    here = lambda name: os.path.join(folder, name)
    for packing in ("true", "false"):
        run_ = [*SMALL, "-l", 48, "-b", 3, "--packing", packing, "--eval_problems", 0]
        good("all at once", *run_, "-x", 9, "-o", here("a.bin"))
        good("a part", *run_, "-x", 5, "-o", here("b.bin"))
        good("the rest", "--resume", here("b.bin"), "-x", 9)
        model = modelbin.parse(read(here("b.bin")))
        check("the same, resumed", model == modelbin.parse(read(here("a.bin"))))
        old = {k: v for k, v in model.recipe.items() if k not in ("problem", "pending")}
        modelbin.write(here("old.bin"), model._replace(recipe=old))
        for name in ("old", "b"):
            good("further", "--resume", here(f"{name}.bin"), "-x", 12)
        check("a checkpoint without its place finds it",
              read(here("old.bin")) == read(here("b.bin")))
        far = model.recipe | {"step": str(10**8), "problem": str(3 * 10**8), "pending": "7",
                              "max_steps": str(10**8 + 1)}
        modelbin.write(here("far.bin"), model._replace(recipe=far))
        begin = time.monotonic()
        good("far along", "--resume", here("far.bin"))
        check("at once", time.monotonic() - begin < 3)


def test_help(folder):
    if os.path.exists("/dev/full"):
        for program in (TRAIN, RUN):
            with open("/dev/full", "wb") as full:
                done = subprocess.run([program, "--help"], stdout=full, stderr=subprocess.PIPE)
            check("--help that nobody gets", done.returncode == 1 and b"stdout" in done.stderr, done)


def test_little_room(folder):
    """A limit on memory, and a disk that is nearly full, which a preloaded library pretends."""
    here = lambda name: os.path.join(folder, name)
    fake = test_run.failing(folder, TRAIN)
    if not fake:
        return                                          # not this kind of machine
    fake |= environment() | {"LD_PRELOAD": fake["LD_PRELOAD"], "SMALL_DISK": "1"}
    r = train(*QUICK, "-o", here("a.bin"), env=fake)
    check("a full disk is foreseen", r.code == 0 and re.search(r"a\.bin: .*disk has 0\.0 MB", r.err),
          r)
    for kind, names in (("2", ("/memory.max",)), ("1", ("/memory.limit_in_bytes",))):
        for group, limited in (("/", ""), ("/a/b", "/a/b"), ("/a/b", "/a"), ("/a/b", "")):
            root = here(f"cgroups{kind}{group.replace('/', '_')}{limited.replace('/', '_')}")
            base = root + "/sys/fs/cgroup" + ("/memory" if kind == "1" else "")
            os.makedirs(base + group)
            os.makedirs(root + "/proc/self")
            write(root + "/proc/self/cgroup", f"0::{group}\n" if kind == "2" else
                  f"12:cpu,cpuacct:/\n4:memory:{group}\n")
            for there in ("", "/a", "/a/b"):
                if os.path.isdir(base + there):
                    write(base + there + names[0], "3000000\n" if there == limited else
                          "max\n" if kind == "2" else "9223372036854771712\n")
            bad(f"a limit of cgroup {kind} on {limited or '/'}, as seen from {group}", 1,
                ["memory", "3.0 MB"], *QUICK, "-l", 400, "-b", 40, "-o", here("a.bin"),
                env=fake | {"CGROUPS": root})



# ---- other programs -----------------------------------------------------------------------------

def test_busy(folder):
    """Every core is taken by others: two threads are not slower than one, and the user is told why
    all takes so long."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < 2 or "OpenMP" in subprocess.run([TRAIN, "--version"], capture_output=True,
                                                text=True).stdout:
        return
    run = ["--model", "demo", "-x", 8, "-b", 8, "-d", write(os.path.join(folder, "text"), TEXT * 8),
           "--val", write(os.path.join(folder, "val"), TEXT[:300])]
    waits = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"

    def seconds(threads):
        there = {k: v for k, v in os.environ.items() if k not in waits}
        start = time.monotonic()
        r = good(f"{threads} threads, all cores taken", *run, "--threads", threads, "-o",
                 os.path.join(folder, "a.bin"), env=there, timeout=300)
        return time.monotonic() - start, r
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        (one, _), (two, r) = seconds(1), seconds(2)
        if two > 1.5 * one:                             # once more: others come and go
            (one, _), (two, r) = seconds(1), seconds(2)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    print(f"all cores taken: {one:.1f} s with one thread, {two:.1f} s with two")
    check("two threads are not slower than one", two < 1.5 * one, (one, two))
    check("it is said that others are there", "2 threads" not in r.err or
          "other programs keep this machine busy" in r.err, r)


# ---- what goes in -------------------------------------------------------------------------------

def not_texts():
    """(name, bytes, words of the message) of what people take for text."""
    text = TEXT.encode()
    shuffled = bytes(random.Random(3).randbytes(3000))
    rng = random.Random(4)
    tokens = struct.pack("<900H", *[rng.randrange(50257) for _ in range(900)])
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    yield "gzip", gzip.compress(text), ["gzip"]
    yield "zip", b"PK\3\4" + shuffled, ["zip"]
    yield "zstd", b"\x28\xb5\x2f\xfd" + shuffled, ["zstd"]
    yield "bzip2", b"BZh9" + shuffled, ["bzip2"]
    yield "xz", b"\xfd7zXZ\0" + shuffled, ["xz"]
    yield "parquet", b"PAR1" + shuffled + b"PAR1", ["parquet"]
    yield "arrow", b"ARROW1\0\0" + shuffled, ["Arrow"]
    yield "UTF-16", TEXT.encode("utf-16"), ["UTF-16"]
    yield "UTF-16, big end first", b"\xfe\xff" + TEXT.encode("utf-16-be"), ["UTF-16"]
    yield "UTF-16 without its mark", TEXT.encode("utf-16-le"), ["UTF-16"]
    yield "Latin-1", "Ein Bär und ein Käse.\n".encode("latin-1"), ["byte 5", "0xE4", "Latin-1"]
    yield "a late byte", text + b"\xff", [f"byte {len(text)}", "0xFF"]
    yield "a character cut off", text + b"\xe2\x82", [f"byte {len(text)}"]
    yield "a surrogate", text + b"\xed\xa0\x80", [f"byte {len(text)}"]
    yield "a NUL", text + b"\0" + text, [f"byte {len(text)}", "0x00"]
    yield "nanoGPT's tokens", tokens, ["llm.c's header"]
    yield "small tokens", struct.pack("<900H", *range(900)), ["llm.c's header"]
    yield "safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 4, ["safetensors"]
    yield "GGUF", b"GGUF\3\0\0\0" + shuffled, ["GGUF"]
    yield "PDF", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + shuffled, ["PDF"]
    yield "NumPy", b"\x93NUMPY\1\0" + shuffled, ["NumPy"]
    yield "git LFS", (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 +
                      b"\nsize 12345\n"), ["git lfs pull"]


def test_not_text(folder):
    here = lambda name: os.path.join(folder, name)
    text = write(here("text"), TEXT)
    good("a model", *QUICK, "-o", here("m.bin"))
    kinds = [*not_texts(), ("a model file", read(here("m.bin")), ["model file"])]
    for name, data, words in kinds:
        path = write(here("data"), data)
        bad(f"-d {name}", 1, [path, *words, "--allow_bytes"], *QUICK, "-d", path, "-o", here("a.bin"))
        bad(f"--val {name}", 1, [path, *words], *QUICK, "-d", text, "--val", path, "-o",
            here("a.bin"))
        r = run(here("m.bin"), "-m", "eval", "-f", path, "-c", 16)
        check(f"eval -f {name}", r.code == 1 and path in r.err and all(w in r.err for w in words), r)
        good(f"--allow_bytes: {name}", *SMALL, "-x", 0, "-b", 1, "-d", path, "--allow_bytes", "-o",
             here("a.bin"))
        r = run(here("m.bin"), "-m", "eval", "-f", path, "-c", 16, "--allow_bytes")
        check(f"eval --allow_bytes {name}", r.code == 0, r)
        r = run(here("m.bin"), "-m", "tokenize", "-f", path)
        check(f"tokenize takes any bytes: {name}", r.code == 0 and r.out.split(), r)
    for name, data in (("a text that begins as bzip2 does", "BZh is no word.\n" * 40),
                       ("one that begins with PK", "PK" * 400), ("PAR1", "PAR1 is a name.\n" * 40),
                       ("a text about versions", "version https://example.org is old\n" * 40),
                       ("text in many languages", "Grüße, Привет, 你好, สวัสดี, 🙂\n" * 40)):
        good(f"{name} is text", *QUICK, "-b", 1, "-d", write(here("data"), data), "-o",
             here("a.bin"))
    results = {}
    for name, data in (("bom", "\ufeff" + TEXT), ("plain", TEXT)):
        r = good(name, *QUICK, "-d", write(here("data"), data), "-o", here("a.bin"))
        results[name] = read(here("a.bin")), "byte order mark" in r.err
    check("a byte order mark is said and left out", results["bom"] == (results["plain"][0], True) and
          not results["plain"][1])
    lines = "".join(json.dumps({"text": f"This is number {i}."}) + "\n" for i in range(99))
    path = write(here("data"), lines)
    r = good("JSON lines", *QUICK, "-b", 1, "-d", path, "-o", here("a.bin"))
    check("JSON lines are noticed", "JSON lines" in r.err and "python3 -c" in r.err, r)
    made = subprocess.run(["sh", "-c", re.search(r"python3 -c '.*'", r.err)[0] + f" < {path}"],
                          capture_output=True, text=True)
    check("what is advised makes text of them", made.stdout ==
          "".join(f"This is number {i}.\n" + END for i in range(99)), made)


def test_advice(folder):
    """Options that are nearly right, and what a user should know at the end."""
    here = lambda name: os.path.join(folder, name)
    for wrong, right in (("--lr", "--learning_rate"), ("--steps", "--max_steps"),
                         ("--hiden_size", "--hidden_size"), ("-x20", "-x 20"),
                         ("text.txt", "--data"), ("--temprature", "--temperature")):
        bad(f"train {wrong}", 2, [wrong, "did you mean", right], wrong, 1)
    bad("nothing like it", 2, ["--zzz", "--help"], "--zzz", 1)
    good("a model", *QUICK, "-o", here("m.bin"), "--max_position_embeddings", 40)
    for wrong, right in (("--temperature", "--temp"), ("-t0", "-t 0"), ("a text", "--prompt"),
                         ("--topk", "--top-k")):
        r = run(here("m.bin"), wrong, "-n", 1)
        check(f"run {wrong}", r.code == 2 and "did you mean" in r.err and right in r.err, r)
    r = run(here("m.bin"), "-n", -1, "--ignore-eos", "-i", "x")
    check("the end of the context is said", r.code == 0 and "context of 40 tokens is full" in r.err)
    r = run(here("m.bin"), "-n", 3, "--ignore-eos", "-i", "x")
    check("and only then", "full" not in r.err, r)
    r = good("a run that is past its end", "--resume", here("m.bin"), "-x", 1)
    check("says so", "2 steps behind it" in r.err, r)


if __name__ == "__main__":
    test_train.main(globals())
