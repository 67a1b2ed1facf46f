#!/usr/bin/env python3
"""Checks ./train from the outside: that a run can be killed at any moment, that threads change no
byte, what happens to the data, and that whatever is wrong ends well.

    python3 tests/test_train.py ./train [./train-without-OpenMP]

The last line is "N passed, N failed". Needs nothing but Python.
"""
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from array import array

sys.dont_write_bytecode = True
import modelbin
import test_run
from test_run import DARK, NO_LIMIT, SPACE, VERSION_1, tokenizer_section, write_tiny

TRAIN = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "train")
RUN = os.path.join(os.path.dirname(TRAIN), os.path.basename(TRAIN).replace("train", "run"))
SERIAL = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else None

TINY = """--hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --kv_lora_rank 8
--qk_nope_head_dim 4 --qk_rope_head_dim 4 --v_head_dim 4 --n_routed_experts 4
--num_experts_per_tok 2 --moe_intermediate_size 8 --intermediate_size 16""".split()
SMALL = [*TINY, "-b", "2", "-l", "16", "--lr_scheduler", "constant", "--warmup_steps", "2"]
END = "<|endoftext|>\n"

passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}{': ' if detail != '' else ''}{str(detail)[:400]}")


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.last = err.splitlines()[-1] if err else ""

    def values(self):
        return {k: float(v) for k, v in (line.split(" ") for line in self.out.splitlines())}

    def __str__(self):
        return f"exit {self.code}, stdout {self.out[-100:]!r}, stderr {self.err[-250:]!r}"


def environment(threads=1):
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def train(*args, threads=1, program=None, timeout=60, **more):
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL,
            "env": environment(threads)} | more
    command = [program or TRAIN, *map(str, args)]
    try:
        done = subprocess.run(command, timeout=timeout, **more)
    except subprocess.TimeoutExpired:
        return Result("timeout", "", "")
    return Result(done.returncode, *((x or b"").decode("utf-8", "replace")
                                     for x in (done.stdout, done.stderr)))


def good(what, *args, **more):
    """Runs ./train on something that must work."""
    r = train(*args, **more)
    check(what, r.code == 0, r)
    return r


def bad(what, code, words, *args, **more):
    """Runs it on something that must end in a line that has all the words."""
    r = train(*args, **more)
    check(what, r.code == code and r.last.startswith("train: ") and not r.out
          and all(w in r.last for w in words), f"{r}, wanted exit {code}, {words}")


def read(path):
    with open(path, "rb") as f:
        return f.read()


def write(path, data):
    with open(path, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return path


def read_log(path):
    """The lines of a log as dicts, without the speed."""
    head, *rows = [line.split("\t") for line in read(path).decode().splitlines()]
    return [{k: v for k, v in zip(head, row) if k != "tokens_per_s"} for row in rows]


def losses(path):
    return [float(row["loss"]) for row in read_log(path)]


def documents(n):
    """n short texts, all different."""
    rng = random.Random(5)
    words = "the a grey old cat dog tree sees wants has über ✓ some".split()
    return [" ".join(rng.choice(words) for _ in range(rng.randrange(3, 12))) + f" {i}.\n"
            for i in range(n)]


def token_file(ids, wide=False, magic=None, version=None, count=None, width=None):
    magic = magic or (20240801 if wide else 20240520)
    header = struct.pack("<3i", magic, version or (7 if wide else 1),
                         len(ids) if count is None else count)
    return header.ljust(1024, b"\0") + array("I" if width == 4 or wide else "H", ids).tobytes()


# ---- interrupted -------------------------------------------------------------------------------

def test_kills(folder):
    """kill -9 at twenty random moments, most of them while a checkpoint is written."""
    here = lambda name: os.path.join(folder, name)
    data = ["-d", write(here("text"), END.join(documents(40)))]
    run = [*SMALL, *data, "-x", 300, "--save_steps", 1, "--eval_steps", 30]
    start = time.monotonic()
    straight = good("a run left alone", *run, "-o", here("a.bin"), "--log", here("a.tsv"))
    duration, rng, kills, attempts = time.monotonic() - start, random.Random(6), 0, 0
    while kills < 20 and attempts < 300:
        for name in ("b.bin", "b.tsv"):
            if os.path.exists(here(name)):
                os.remove(here(name))
        finished = False
        while not finished and attempts < 300:
            attempts += 1
            args = ["--resume", here("b.bin"), *data] if os.path.exists(here("b.bin")) else \
                [*run, "-o", here("b.bin")]
            p = subprocess.Popen([TRAIN, *map(str, args), "--eval_steps", "30", "--save_steps", "1",
                                  "--log", here("b.tsv")], env=environment(),
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                out, err = p.communicate(timeout=rng.uniform(0, duration / 5))
                finished = True
            except subprocess.TimeoutExpired:
                p.kill()
                p.communicate()
                kills += 1
        check("a killed run that was resumed finishes", p.returncode == 0, err)
        check("it prints the same", out.decode() == straight.out, out)
        check("it ends in the same bytes", read(here("a.bin")) == read(here("b.bin")))
        check("its log has the same lines", read_log(here("a.tsv")) == read_log(here("b.tsv")))
    check("20 kills", kills >= 20, kills)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def test_signals(folder):
    here = lambda name: os.path.join(folder, name)
    data = ["-d", write(here("text"), END.join(documents(40)))]
    for number in (signal.SIGINT, signal.SIGTERM):
        name = number.name
        for file in ("c.bin", "c.tsv"):
            if os.path.exists(here(file)):
                os.remove(here(file))
        p = subprocess.Popen([TRAIN, *SMALL, *data, "-x", "100000", "--save_steps", "0",
                              "-o", here("c.bin"), "--log", here("c.tsv")], env=environment(),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(lambda: os.path.exists(here("c.tsv")) and read(here("c.tsv")).count(b"\n") > 2)
        p.send_signal(number)
        out, err = p.communicate(timeout=20)
        check(f"{name} exits with 130", p.returncode == 130 and not out, (p.returncode, err))
        check(f"{name}: how to go on", b"--resume" in err and here("c.bin").encode() in err, err)
        n = len(read_log(here("c.tsv"))) + 3
        good(f"resumed after {name}", "--resume", here("c.bin"), *data, "-x", n,
             "--log", here("c.tsv"))
        good("a run left alone", *SMALL, *data, "-x", n, "-o", here("d.bin"),
             "--log", here("d.tsv"))
        check(f"{name} finished its step", read(here("c.bin")) == read(here("d.bin")))
        # but for the validation in the last line: the first run did not know that it was the last
        check(f"{name}: log", [r["loss"] for r in read_log(here("c.tsv"))] ==
              [r["loss"] for r in read_log(here("d.tsv"))])
    # A step of many seconds; the second signal does not wait for its end.
    p = subprocess.Popen([TRAIN, *TINY, "-b", "2048", "-l", "256", "-o", here("none.bin")],
                         env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in p.stderr:
        if b"memory" in line:
            break
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    time.sleep(0.2)
    check("the first signal waits for the step", p.poll() is None)
    p.send_signal(signal.SIGINT)
    try:
        p.communicate(timeout=3)
    except subprocess.TimeoutExpired:
        p.kill()
        p.communicate()
    check("the second signal ends at once", p.returncode == 130 and
          not os.path.exists(here("none.bin")), p.returncode)


def test_further(folder):
    """Resuming what is finished, and going further than planned."""
    here = lambda name: os.path.join(folder, name)
    data = ["-d", write(here("text"), END.join(documents(40)))]
    run = [*SMALL, *data]
    first = good("4 steps", *run, "-x", 4, "-o", here("a.bin"), "--log", here("a.tsv"))
    before, log = read(here("a.bin")), read_log(here("a.tsv"))
    inode = os.stat(here("a.bin")).st_ino
    r = good("a finished run", "--resume", here("a.bin"), *data, "--log", here("a.tsv"))
    check("it prints its val_loss again", r.out == first.out, r.out)
    check("it leaves the file alone", read(here("a.bin")) == before and
          os.stat(here("a.bin")).st_ino == inode)
    check("it leaves the log alone", read_log(here("a.tsv")) == log)
    good("all options repeated", "--resume", here("a.bin"), *run, "-x", 4)
    good("5 steps more", "--resume", here("a.bin"), *data, "-x", 9, "--log", here("a.tsv"))
    check("the resumed file is replaced", read(here("a.bin")) != before)
    good("9 steps", *run, "-x", 9, "-o", here("b.bin"), "--log", here("b.tsv"))
    check("4 + 5 steps end in the bytes of 9", read(here("a.bin")) == read(here("b.bin")))
    good("resumed into another file", "--resume", here("a.bin"), *data, "-x", 10,
         "-o", here("c.bin"))
    check("--output with --resume", read(here("a.bin")) == read(here("b.bin")) and
          len(read(here("c.bin"))) == len(before))
    built_in = [*SMALL, "--eval_problems", 4]
    good("the built-in task", *built_in, "-x", 7, "-o", here("d.bin"))
    good("5 steps of it", *built_in, "-x", 5, "-o", here("e.bin"))
    r = good("2 more", "--resume", here("e.bin"), "-x", 7, "--eval_problems", 4)
    check("the built-in task goes on where it was", read(here("d.bin")) == read(here("e.bin")))
    check("it prints two lines", list(r.values()) == ["val_loss", "solved"], r)


def test_contradictions(folder):
    here = lambda name: os.path.join(folder, name)
    texts = documents(40)
    data = ["-d", write(here("text"), END.join(texts))]
    good("4 steps", *SMALL, *data, "-x", 4, "-o", here("a.bin"))
    write(here("other"), END.join(texts[:30] + texts[31:] + ["x\n"]))
    resume = ["--resume", here("a.bin"), "-x", 6]
    for option, value in (("hidden_size", 24), ("inner_iter", 3), ("use_igate", "false"),
                          ("rope_scaling.type", "linear"), ("batch_size", 3), ("max_length", 17),
                          ("micro_batch_size", 1), ("learning_rate", 0.5), ("seed", 2),
                          ("weight_decay", 0), ("lr_scheduler", "cosine"), ("aux_loss_alpha", 1),
                          ("completion_marker", "Answer:")):
        bad(f"resumed with another {option}", 2, [option, here("a.bin")], *resume, *data,
            f"--{option}", value)
    bad("resumed in another order", 2, ["sequential"], *resume, *data, "--sequential")
    bad("resumed with other data", 1, [here("other")], *resume, "-d", here("other"))
    bad("resumed without its data", 1, ["--data"], *resume)
    bad("more memory than there is", 1, ["training takes", "this machine has", "micro_batch_size"],
        "-b", 10 ** 6, "-l", 200)
    sizes = [float(x) for x in re.findall(r"([\d.]+) MB", train("-b", 10 ** 6, "-l", 200).err)]
    check("what training takes is the sum of its parts", len(sizes) == 6 and
          abs(sum(sizes[:4]) - sizes[4]) < 0.3, sizes)
    bad("--init and --resume", 2, ["--init", "--resume"], *resume, "--init", here("a.bin"), *data)
    good("the built-in task", *SMALL, "-x", 1, "--eval_problems", 0, "-o", here("task.bin"))
    bad("resumed with data instead", 1, ["--data"], "--resume", here("task.bin"), *data)
    bad("resumed at another level", 2, ["level"], "--resume", here("task.bin"), "--level", 2)


# ---- kinds of our own ----------------------------------------------------------------------------

V3 = ["--scoring_func", "sigmoid", "--topk_method", "noaux_tc"]


def test_prenorm(folder):
    """A pre-norm chain of one iteration is a DeepSeek-V2, to the last bit."""
    here = lambda name: os.path.join(folder, name)
    data = [*SMALL, "-d", write(here("text"), END.join(documents(40))), "-x", 5, "--inner_iter", 1,
            "--first_k_dense_replace", 1]
    for what, more in (("", []), (", sigmoid", V3)):
        good("DeepSeek-V2", *data, *more, "--inner_residual", "false", "--outer_residual", "true",
             "-o", here("v2.bin"))
        good("a pre-norm chain", *data, *more, "--prenorm_chain", "true", "-o", here("pre.bin"))
        a, b = (modelbin.read(here(name)) for name in ("v2.bin", "pre.bin"))
        check(f"the same weights and moments{what}", a.weights == b.weights and
              a.moments == b.moments)
        check(f"what the file says{what}", (b.config["prenorm_chain"], b.config["inner_residual"]) ==
              ("true", "false"), b.config)
    good("a chain of two", *data, "--inner_iter", 2, "--prenorm_chain", "true", "-o", here("c2.bin"))
    for options, words in ((["--inner_residual", "true"], ["inner_residual"]),
                           (["--outer_residual", "true"], ["outer_residual"])):
        bad("two residuals", 2, ["prenorm_chain", *words], *data, "--prenorm_chain", "true", *options)
    for options in (["--scoring_func", "sigmoid"], ["--topk_method", "noaux_tc"]):
        bad("half of a router", 2, ["sigmoid", "noaux_tc"], *data, *options)
    bad("groups of one expert", 2, ["n_group"], *data, *V3, "--n_group", 4, "--topk_group", 4)


def test_bias_update(folder):
    """Correction biases go up and down by the speed, evenly: they balance, and nothing else moves
    them."""
    here = lambda name: os.path.join(folder, name)
    text = ["-d", write(here("text"), END.join(documents(60)))]
    for gates in ("true", "false"):
        model = [*SMALL, *V3, *text, "--aux_loss_alpha", 0, "--use_igate", gates, "--weight_decay", 0.5]
        loads, biases = {}, {}
        for speed in (0, 0.01):
            good(f"speed {speed}", *model, "-x", 60, "--bias_update_speed", speed, "--log",
                 here("log"), "-o", here("a.bin"))
            with open(here("log")) as f:
                head, *rows = [line.rstrip("\n").split("\t") for line in f]
            loads[speed] = sum(float(row[head.index("load_1")]) for row in rows[-20:]) / 20
            weights = test_run.read_weights(here("a.bin"))
            c = modelbin.read(here("a.bin")).config
            c = test_run.DEFAULT | {k: json.loads(v) if re.fullmatch(r"-?\d+|true|false|null", v)
                                    else v for k, v in c.items()}
            biases[speed], at = [], 0
            for name, copies, n, m in test_run.tensor_list(c, False):
                at += -at % 16 if copies else 0
                if "correction" in name:
                    biases[speed] += weights[at:at + copies * n * m]
                at += copies * n * m
        check(f"without a speed they stay 0, gates {gates}", biases[0] and not any(biases[0]))
        steps = [x / 0.01 for x in biases[0.01]]
        check(f"whole steps, gates {gates}", all(abs(x - round(x)) < 1e-3 for x in steps)
              and max(steps) > 0 > min(steps), steps)
        check(f"it balances, gates {gates}", loads[0.01] < loads[0] - 0.1, loads)
        good("half of it", *model, "-x", 30, "--bias_update_speed", 0.01, "-o", here("b.bin"))
        good("the rest", *model, "--resume", here("b.bin"), "-x", 60, "-o", here("b.bin"))
        with open(here("a.bin"), "rb") as a, open(here("b.bin"), "rb") as b:
            check(f"resumed, the same bytes, gates {gates}", a.read() == b.read())
        good("two threads", *model, "-x", 60, "--bias_update_speed", 0.01, "--micro_batch_size", 2,
             "--threads", 2, "-o", here("b.bin"))
        with open(here("a.bin"), "rb") as a, open(here("b.bin"), "rb") as b:
            check(f"two threads, gates {gates}", modelbin.parse(a.read()).weights ==
                  modelbin.parse(b.read()).weights)


# ---- the same bytes ------------------------------------------------------------------------------

def test_threads(folder):
    """Large enough that the threads have something to share."""
    here = lambda name: os.path.join(folder, name)
    wide = [*TINY, "--hidden_size", 64, "-b", 8, "-l", 64, "-x", 3, "--eval_problems", 6,
            "--eval_steps", 2, "--val", write(here("val"), "".join(documents(60))),
            "--log", here("log")]
    results = {}
    runs = [(f"{n} threads", TRAIN, n) for n in (1, 2, 3, 7)]
    for name, program, threads in runs + ([("no OpenMP", SERIAL, 1)] if SERIAL else []):
        r = good(name, *wide, "-o", here("a.bin"), threads=threads, program=program)
        results[name] = read(here("a.bin")), read_log(here("log")), r.out
    first = results.pop("1 threads")
    for name, result in results.items():
        check(f"{name}: the same model, log and output as with 1 thread", result == first)
    r = good("--threads", *wide, "--threads", 2, "-o", here("a.bin"), threads=1)
    check("--threads is printed", SERIAL is None or "2 threads" in r.err or "1 thread" in r.err, r)
    other = good("another seed", *wide, "--seed", 2, "-o", here("a.bin"))
    check("another seed makes another model", read(here("a.bin")) != first[0] and
          other.out != first[2])
    for number in ("0", "x", "-1", "2,3", "1000"):
        good(f"OMP_NUM_THREADS={number}", *SMALL, "-x", 1, "--eval_problems", 0,
             "-o", here("b.bin"), threads=number)


def test_micro_batches(folder):
    here = lambda name: os.path.join(folder, name)
    run = [*SMALL, "-b", 5, "-x", 3, "--eval_problems", 0, "-o", here("a.bin"),
           "--log", here("log")]
    logs = {}
    for micro in ("null", 1, 2, 5, 7):
        good(f"micro-batches of {micro}", *run, "--micro_batch_size", micro)
        logs[micro] = read_log(here("log"))
    for micro in (5, 7):
        check(f"micro-batches of {micro} are the batch", logs[micro] == logs["null"])
    # Only completions count in these. The balancing loss of a micro-batch weighs by its number of
    # targets, so without it they must add up exactly; and with it where all tokens count.
    for extra, what in ((["--aux_loss_alpha", 0], ("loss", "grad_norm")),
                        (["--completion_only_loss", "false"], ("loss", "aux_loss", "grad_norm"))):
        for micro in ("null", 1, 2):
            good(f"micro-batches of {micro}", *run, *extra, "--micro_batch_size", micro)
            logs[micro] = read_log(here("log"))
        for micro in (1, 2):
            off = max(abs(float(a[k]) / float(b[k]) - 1) for a, b in zip(logs[micro], logs["null"])
                      for k in what)
            # The sums are rounded in another order, 1e-7 each.
            check(f"micro-batches of {micro} add up to the batch, {extra}", off < 1e-5, off)


# ---- data ----------------------------------------------------------------------------------------

def test_text(folder):
    here = lambda name: os.path.join(folder, name)
    texts = documents(60)
    texts[3] = "a line with <|endoftext|> in it\n"
    texts[5] = "\n\n  \n"
    texts[7] = "ends in \\r\r\n"
    write(here("text"), "".join(t + END for t in texts))
    show = lambda *args: good(f"show {args[-2:]}", *SMALL, "-d", here("text"), *args).out
    check("--show_data prints the training documents", show("--show_data", 100) ==
          "".join(t + END for t in texts[:57]))
    check("--show_val prints the last 5 %", show("--show_val", 100) ==
          "".join(t + END for t in texts[57:]))
    check("--show_data 2 prints two", show("--show_data", 2) == "".join(t + END for t in texts[:2]))
    write(here("val"), "only\n" + END + "two")
    check("--val is shown as it is", show("--val", here("val"), "--show_val", 9) ==
          "only\n" + END + "two\n" + END)
    check("all of --data trains then", show("--val", here("val"), "--show_data", 99) ==
          read(here("text")).decode())

    # A text, and what it should become, as token files of both widths.
    ids = sum(([*t.encode(), 257] for t in texts), [])
    write(here("wide"), token_file(ids, wide=True))
    write(here("narrow"), token_file(ids))
    write(here("crlf"), b"".join(t.encode() + b"<|endoftext|>\r\n" for t in texts))
    write(here("open"), read(here("text"))[:-len(END)])             # the last EOS is understood
    models = {}
    for name in ("text", "wide", "narrow", "crlf", "open"):
        r = good(f"train on {name}", *SMALL, "-d", here(name), "-x", 3, "-o", here("a.bin"))
        models[name] = read(here("a.bin")), r.out
    for name in models:
        check(f"{name} is the same data as text", models[name] == models["text"])

    few = documents(5)
    write(here("few"), "".join(t + END for t in few))
    r = good("few documents", *SMALL, "-d", here("few"), "-x", 1, "-o", here("a.bin"))
    check("few documents: the last 5 % of the tokens validate", "5 %" in r.err and
          0 < r.values()["val_loss"] < 20, r)


def test_order(folder):
    """With a learning rate of 0 the loss tells which window came when."""
    here = lambda name: os.path.join(folder, name)
    rng = random.Random(8)
    ids = [rng.randrange(64) for _ in range(8 * 16 + 1 + 9)]       # 8 windows, and a part of one
    write(here("tokens"), token_file(ids))
    still = [*TINY, "--vocab_size", 64, "-l", 16, "--learning_rate", 0, "-d", here("tokens"),
             "-o", here("a.bin"), "--log", here("log"), "--val", here("tokens")]
    r = good("in file order", *still, "-b", 1, "-x", 20, "--sequential")
    order = losses(here("log"))
    check("windows differ", len(set(order)) == 8, order)
    check("--sequential wraps at the end", order == (order[:8] * 3)[:20], order)
    check("val_loss is the mean over the windows",
          abs(r.values()["val_loss"] / (sum(order[:8]) / 8) - 1) < 1e-6, r)
    good("three at once", *still, "-b", 3, "-x", 5, "--sequential")
    for step, loss in enumerate(losses(here("log"))):
        expected = sum(order[(3 * step + b) % 8] for b in range(3)) / 3
        check(f"step {step} reads windows {3 * step} to {3 * step + 2}",
              abs(loss / expected - 1) < 1e-6)
    good("shuffled", *still, "-b", 1, "-x", 24)
    shuffled = losses(here("log"))
    epochs = [shuffled[:8], shuffled[8:16], shuffled[16:]]
    check("an epoch has every window once", all(sorted(e) == sorted(order[:8]) for e in epochs))
    check("every epoch has an order of its own", epochs[0] != epochs[1] != epochs[2] != epochs[0])
    good("shuffled otherwise", *still, "-b", 1, "-x", 8, "--seed", 3)
    good("one long window", *still, "-b", 1, "-x", 1, "--sequential", "-l", 120)
    check("a window of any length", len(losses(here("log"))) == 1)

    # The built-in task is a stream like any text.
    write(here("text"), good("its text", *SMALL, "--show_data", 9).out)
    run = [*TINY, "-b", 2, "-l", 37, "-x", 6, "--learning_rate", 0, "--val", here("text"),
           "--completion_only_loss", "true", "--eval_problems", 0, "-o", here("a.bin"), "--log",
           here("log")]
    good("the built-in task", *run)
    made = losses(here("log"))
    good("the built-in task from a file", *run, "-d", here("text"), "--sequential")
    check("problems made on the fly are the ones shown, in windows that overlap by one",
          losses(here("log")) == made, made)


def test_completions(folder):
    here = lambda name: os.path.join(folder, name)
    docs = ["q: a b\nanswer: c\nanswer: d\n", "q: e answer: f\n", "no marker\n", "answer: g\n",
            "answer:\n", "x\n\nanswer:\n"]
    text = write(here("text"), END.join(docs))
    show = [*TINY, "-b", 1, "-l", 4, "-d", text, "--val", text, "--show_data", 9]
    marked = [*show, "--completion_only_loss", "true"]
    plain = "".join(d + END for d in docs)
    check("--show_data does not change", good("shown", *marked).out == good("too", *show).out)
    r = good("--show_loss", *marked, "--show_loss")
    want = ["[[q: a b]]\nanswer: c\nanswer: d\n", "[[q: e ]]answer: f\n", *docs[2:5],
            "[[x\n]]\nanswer:\n"]
    check("--show_loss marks what has none", r.out == "".join(d + END for d in want), repr(r.out))
    check("and nothing else changes", r.out.replace("[[", "").replace("]]", "") == plain)
    r = good("all of a text counts by default", *show, "--show_loss")
    check("unmarked", r.out == plain, r)
    r = good("another marker", *marked, "--show_loss", "--completion_marker", "nswer: f")
    check("it is marked", "[[q: e a]]nswer: f\n" in r.out and r.out.count("[[") == 1, r)
    r = good("a marker that a document begins with", *marked, "--show_loss",
             "--completion_marker", "q: a")
    check("all of that document counts", r.out == plain, r)
    r = good("the built-in task", *TINY, "--show_val", 20, "--show_loss")
    shown = r.out.split(END)[:-1]
    check("its answers are learned", len(shown) == 20 and all(
        d.startswith("[[question: ") and "]]\nanswer: " in d and d.count("[[") == 1
        for d in shown), r)

    bad("no marker anywhere", 1, ["text", "q: a b", "completion_marker"], *marked,
        "--completion_marker", "Answer", "-o", here("x.bin"))
    bad("an empty marker", 2, ["completion_marker"], *marked, "--completion_marker", "")
    tokens = write(here("tokens"), token_file([1, 2, 257] * 40))
    bad("a token file has no markers", 1, ["tokens", "completion_only_loss"], *TINY, "-b", 1, "-l",
        4, "-d", tokens, "--completion_only_loss", "true", "-o", here("x.bin"))

    # The loss of the completion is that of the windows in which only it is left: at a learning
    # rate of 0 the sums over all tokens, over prompts and over completions must agree.
    doc = "q: some question\nanswer: it is so\n"
    one = write(here("one"), doc)
    run = [*SMALL, "-b", 1, "-l", 60, "--packing", "false", "-d", one, "--val", one, "-x", 1,
           "--learning_rate", 0, "-o", here("a.bin"), "--log", here("log")]
    whole, part = (good(f"loss on {kind}", *run, "--completion_only_loss", kind).values()
                   ["val_loss"] for kind in ("false", "true"))
    check("the loss of a step is that of validation", abs(losses(here("log"))[0] - part) < 2e-6,
          (losses(here("log")), part))
    for kind, want in ("false", whole), ("true", part):
        r = subprocess.run([RUN, here("a.bin"), "-m", "eval", "-f", one,
                            "--completion_only_loss", kind],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           env=environment(), timeout=60)
        got = dict(line.split() for line in r.stdout.decode().splitlines())
        check(f"run's nll of a document is val_loss, completion_only_loss {kind}",
              abs(float(got["nll"]) - want) < 2e-6, (got, want))
        # The file's add_bos_token puts BOS in front; EOS counts.
        check("and its tokens", int(got["tokens"]) == (len(doc) + 1 if kind == "false" else
              len("\nanswer: it is so\n") + 1), got)


def test_default_prompt(folder):
    here = lambda name: os.path.join(folder, name)
    first = good("a held-out problem", *TINY, "--show_val", 1).out.split("answer:")[0]
    text = write(here("text"), END.join(documents(40)))
    for what, options, want in (("the built-in task", [], first),
                                ("a text", ["-d", text], ""),
                                ("what is given", ["--default_prompt", "q: \n1\\2"], "q: \n1\\2")):
        good(what, *SMALL, *options, "-x", 1, "--eval_problems", 0, "-o", here("a.bin"))
        for given, expected in ((), want), (("-i", ""), ""), (("-i", "mine"), "mine"):
            r = subprocess.run([RUN, here("a.bin"), "-n", "0", *given], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=environment(), timeout=60)
            check(f"run starts from {what}, given {given}", r.stdout.decode().rstrip("\n") ==
                  expected.rstrip("\n"), (r.stdout, expected))


def test_packing(folder):
    here = lambda name: os.path.join(folder, name)
    rng = random.Random(8)
    docs = [[rng.randrange(256) for _ in range(rng.choice([0, 3, 9, 15, 16, 17, 40]))] + [257]
            for _ in range(40)]
    ids = sum(docs, [])
    data = write(here("data"), token_file(ids))
    run = [*TINY, "-d", data, "--val", data, "-l", 16, "--packing", "false", "--lr_scheduler",
           "constant", "--learning_rate", 0, "--sequential", "--eval_steps", 0, "-o",
           here("a.bin"), "--log", here("log")]
    r = good("documents in order", *run, "-b", 40, "-x", 1)
    full = [[256, *d] for d in docs]
    cut = sum(len(d) > 17 for d in full)
    check("those that are cut are counted", f"{cut} of them cut to 17 tokens" in r.err, r)
    padding = sum(max(0, 17 - len(d)) for d in full) / (17 * 40) * 100
    check("padding is counted", f"{padding:.1f} % of the tokens are padding" in r.err, (padding, r))
    batch = losses(here("log"))[0]
    check("the batch of all is the validation loss", abs(batch - r.values()["val_loss"]) < 2e-6, r)
    # One document a step: their losses weigh by their targets, the last one of a cut one counts.
    good("one document a step", *run, "-b", 1, "-x", 40)
    targets = [min(len(d), 17) - 1 for d in full]
    mean = sum(l * n for l, n in zip(losses(here("log")), targets)) / sum(targets)
    check("a batch is its documents, weighted by targets", abs(mean - batch) < 2e-6, (mean, batch))
    good("any order", *[a for a in run if a != "--sequential"], "-b", 1, "-x", 40)
    one = sorted(losses(here("log")))
    good("file order", *run, "-b", 1, "-x", 40)
    check("an epoch has every document once", one == sorted(losses(here("log"))))

    # The same bytes for any number of threads, and after a resume.
    text = write(here("text"), END.join(f"q: {d}answer: {d}" for d in documents(60)))
    run = [*SMALL, "-b", 3, "-l", 50, "-d", text, "--packing", "false", "--completion_only_loss",
           "true", "--save_steps", 3, "-x", 6]
    good("one thread", *run, "-o", here("one.bin"))
    good("two threads", *run, "-o", here("two.bin"), threads=2)
    check("threads change nothing", read(here("one.bin")) == read(here("two.bin")))
    good("half of it", *run, "-x", 3, "-o", here("half.bin"))
    good("the rest", "--resume", here("half.bin"), "-d", text, "--save_steps", 3, "-x", 6)
    check("nor does a stop", read(here("one.bin")) == read(here("half.bin")))
    bad("other documents than before", 2, ["packing"], "--resume", here("half.bin"), "-d", text,
        "--packing", "true")
    few = write(here("few"), "x" * 6000 + "\n" + END * 19)
    for packing in ("false", "true"):
        good("fewer than 20 documents, nearly all of them in the last 5 %", *SMALL, "-b", 1, "-x",
             1, "-d", few, "--packing", packing, "-o", here("few.bin"))


def test_best(folder):
    here = lambda name: os.path.join(folder, name)
    text = write(here("text"), END.join(documents(5)))         # so little that it overfits
    val = write(here("val"), END.join(documents(40)[20:]))
    run = [*SMALL, "-b", 4, "-l", 32, "-d", text, "--val", val, "--learning_rate", 3e-2, "-x", 60,
           "--eval_steps", 5, "--eval_windows", 0, "-o", here("a.bin"), "--best", here("best.bin")]
    r = good("--best", *run)
    seen = [float(x) for x in re.findall(r"val_loss ([0-9.]+)", r.err)]
    check("it validates often, and overfits", len(seen) >= 12 and seen[-1] > min(seen) + 0.1, seen)
    done = subprocess.run([TRAIN, "--init", here("best.bin"), "-d", text, "--val", val, "-b", "4",
                           "-l", "32", "-x", "1", "--learning_rate", "0", "-o", here("b.bin")],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment())
    got = float(done.stdout.split()[1])
    check("it has the lowest loss", abs(got - min(seen)) < 1e-4, (got, seen))
    # A run that goes on with worse losses leaves it alone.
    before = read(here("best.bin"))
    r = good("resumed", "--resume", here("a.bin"), "-d", text, "--val", val, "-x", 65, "--best",
             here("best.bin"), "--eval_steps", 1, "--eval_windows", 0)
    more = [float(x) for x in re.findall(r"val_loss ([0-9.]+)", r.err)]
    check("a worse loss does not replace it", min(more) > min(seen) and
          read(here("best.bin")) == before, (seen, more))


def test_windows(folder):
    """With a learning rate of 0, what is measured on the way is a mean over the named samples."""
    here = lambda name: os.path.join(folder, name)
    rng = random.Random(9)
    write(here("tokens"), token_file([rng.randrange(64) for _ in range(20 * 16 + 1)]))
    still = [*TINY, "--vocab_size", 64, "-l", 16, "--learning_rate", 0, "-d", here("tokens"),
             "-o", here("a.bin"), "--log", here("log"), "--val", here("tokens"), "--sequential"]
    good("each window's loss", *still, "-b", 1, "-x", 20)
    order = losses(here("log"))

    def seen(what, batch, steps, *options):
        r = good(what, *still, "-b", batch, "-x", 2 * steps, "--eval_steps", steps, *options)
        return [float(x) for x in re.findall(r"val_loss ([0-9.]+)", r.err)]
    for count, options in ((20, ("--eval_windows", 0)), (20, ("--eval_windows", 99)),
                           (7, ("--eval_windows", 7)), (1, ("--eval_windows", 1)), (3, ())):
        first, last = seen(f"{count} windows", 3, 10, *options)
        wanted = sum(order[i * 20 // count] for i in range(count)) / count
        check(f"{count} windows validate on the way {options}", abs(first - wanted) < 1e-4,
              (first, wanted))
        check("all at the end", abs(last - sum(order) / 20) < 1e-4, (last, order))


def test_solved_text(folder):
    here = lambda name: os.path.join(folder, name)
    docs = [f"{i} and 1?\nanswer: {i} + 1\n#### {i % 3}\n" for i in range(40)]
    text = write(here("text"), END.join(docs))
    run = [*SMALL, "-b", 2, "-l", 40, "-d", text, "--completion_only_loss", "true", "-x", 1, "-o",
           here("a.bin")]
    r = good("a text of answers", *run, "--eval_problems", 2, "--sample_steps", 1)
    check("a sample answers a held-out question",
          re.search(r"^--- step 1 ---\n\d+ and 1\?\n", r.err, re.M), r)
    check("after a step nothing is solved", r.values().get("solved") == 0, r)
    check("says what it trains", re.search("^model: d 16, L 2, E 4, K 2, C 2, S 1, .*own, ", r.err,
                                           re.M), r)
    r = good("only where it is asked for", *run)
    check("no rate", "solved" not in r.values(), r)
    bad("a text without answers", 1, ["none", "####", "eval_problems"], *SMALL, "-l", 40, "-d",
        write(here("none"), END.join(documents(40))), "-x", 1, "-o", here("a.bin"),
        "--eval_problems", 2)


def test_overfit(folder):
    here = lambda name: os.path.join(folder, name)
    write(here("text"), "the quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 2)
    good("overfit", *TINY, "--hidden_size", 32, "-d", here("text"), "--sequential", "-b", 2,
         "-l", 64, "-x", 150, "--learning_rate", "1e-2", "-o", here("a.bin"), "--log", here("log"))
    loss = losses(here("log"))
    check("a batch can be learned by heart", loss[0] > 5 and loss[-1] < 0.05, loss[-1])


def test_other_models(folder):
    here = lambda name: os.path.join(folder, name)
    ids = [i * i % 64 for i in range(600)]
    tokens = ["-d", write(here("tokens"), token_file(ids))]
    few = [*SMALL, "--vocab_size", 64, "-x", 3, "-o", here("few.bin"), "--sample_steps", 1]
    good("a vocabulary of 64", *few, *tokens)
    bad("a vocabulary of 64, text", 1, ["tokenizer", here("text")], *few, "-d",
        write(here("text"), "text " * 100))
    bad("a vocabulary of 64, the built-in task", 1, ["--data"], *few)
    good("resumed", "--resume", here("few.bin"), *tokens, "-x", 5)
    r = good("its data", *few, *tokens, "--show_data", 1)
    check("data without a tokenizer is shown as ids",
          [int(x) for x in r.out.split()[:20]] == ids[:20], r)
    dense = [*SMALL, "--n_routed_experts", "null", "-x", 3, "--eval_problems", 2,
             "--completion_only_loss", "false"]
    good("no experts", *dense, "-o", here("dense.bin"), "--log", here("log"))
    check("no experts: aux_loss is 0", {float(r["aux_loss"]) for r in read_log(here("log"))} == {0})
    check("no experts: it learns", losses(here("log"))[2] < losses(here("log"))[0])

    good("--init", "--init", here("dense.bin"), *SMALL[len(TINY):], "-x", 2, "--eval_problems", 0,
         "--aux_loss_alpha", "0.5", "--learning_rate", 0, "--log", here("log"), "-o", here("b.bin"))
    first = losses(here("log"))
    good("--init again", "--init", here("b.bin"), *SMALL[len(TINY):], "-x", 2, "--eval_problems", 0,
         "--learning_rate", 0, "--log", here("log"), "-o", here("c.bin"))
    check("--init starts from the weights and the first document", losses(here("log")) == first)
    bad("--init with another width", 2, ["hidden_size", here("b.bin")], "--init", here("b.bin"),
        "--hidden_size", 17)
    bad("--init with nothing", 1, [here("nothing")], "--init", here("nothing"))
    bad("--init with a text", 1, [here("text")], "--init", here("text"))
    model = modelbin.read(here("b.bin"))
    modelbin.write(here("bare.bin"), model._replace(recipe={}, moments=b""))
    bad("--resume of a model without training state", 1, [here("bare.bin"), "--init"],
        "--resume", here("bare.bin"))
    good("--init of it", "--init", here("bare.bin"), *SMALL[len(TINY):], "-x", 1,
         "--eval_problems", 0, "-o", here("c.bin"))
    good("--tokenizer", *SMALL, "--tokenizer", here("b.bin"), "-x", 1, "--eval_problems", 0,
         "-o", here("c.bin"))
    bad("--tokenizer of a model that has none", 1, [here("few.bin")], *SMALL, "--tokenizer",
        here("few.bin"))
    bad("--tokenizer with too small a vocabulary", 2, ["vocab_size"], *SMALL, "--tokenizer",
        here("b.bin"), "--vocab_size", 100, "--bos_token_id", 4, "--eos_token_id", 5)
    mute = modelbin.write(here("mute.bin"),                 # the same without tokenizer
                          model._replace(config=model.config | {"tokenizer": "none"}))
    bad("--init of a model without tokenizer, the built-in task", 1, ["--data"], "--init", mute,
        *SMALL[len(TINY):], "-x", 1)
    good("the same with --tokenizer", "--init", mute, "--tokenizer", here("b.bin"),
         *SMALL[len(TINY):], "-x", 1, "--eval_problems", 0, "-o", here("c.bin"))
    bad("--resume with another tokenizer", 2, ["--tokenizer", mute], "--resume", mute, *tokens,
        "--tokenizer", here("b.bin"))
    good("--resume with its own", "--resume", here("b.bin"), "--tokenizer", here("b.bin"),
         "--eval_problems", 0)


def test_bpe(folder):
    """Training with another model's tokenizer: its ids, its section in the checkpoint."""
    here = lambda name: os.path.join(folder, name)
    section = tokenizer_section([(b"t", b"h"), (b"th", b"e"), (b"\n", b"\n")],
                                [(b"<bos>", 1), (b"<eos>", 1)],                     # 259, 260
                                [[[(0, SPACE, 1, NO_LIMIT), (1, DARK, 0, 0)],
                                  [(0, DARK, 1, NO_LIMIT)], [(0, SPACE, 1, NO_LIMIT)]]])
    special = {"vocab_size": 270, "bos_token_id": 259, "eos_token_id": 260}
    bpe = write_tiny(here("bpe.bin"), 2, section=section, chat_template="deepseek_v2", **special)
    other = write_tiny(here("other.bin"), 2, section=section.replace(b"<bos>", b"<BOS>"), **special)
    run = [*SMALL, "--tokenizer", bpe, "-x", 3, "-o", here("a.bin")]

    text, ids = "the\n\n\nthe x\n<eos>", [257, 258, 10, 257, 32, 120, 10, *b"<eos>", 10, 260]
    write(here("text"), f"{text}\n{END}" * 20)
    write(here("tokens"), token_file(ids * 20))
    models = [(good(f"{name} for BPE", *run, "-d", here(name)), read(here("a.bin")))[1]
              for name in ("text", "tokens")]
    check("a document is tokenized as a whole", models[0] == models[1])
    model = modelbin.parse(models[0])
    check("the checkpoint has the tokenizer", model.tokenizer == section and not model.files and
          [model.config[key] for key in ("tokenizer", "chat_template", "bos_token_id",
                                         "eos_token_id")] == ["bpe", "deepseek_v2", "259", "260"])
    r = good("--show_data", *run, "-d", here("text"), "--show_data", 2)
    check("tokens are shown as text", r.out == f"{text}\n{END}" * 2, r)

    good("the built-in task", *run, "--sample_steps", 1)
    r = good("resumed", "--resume", here("a.bin"), "--tokenizer", bpe, "-x", 5)
    resumed = read(here("a.bin"))
    good("all at once", *run, "-x", 5)
    check("resumed or not, the same bytes", r.code == 0 and resumed == read(here("a.bin")))
    bad("--resume with another tokenizer", 2, ["--tokenizer", other], "--resume", here("a.bin"),
        "--tokenizer", other, "-x", 6)
    good("--init takes the tokenizer along", "--init", here("a.bin"), *SMALL[len(TINY):], "-x", 1,
         "--eval_problems", 0, "-o", here("b.bin"))
    check("the section is the same", modelbin.read(here("b.bin")).tokenizer == section)
    bad("a vocabulary too small for it", 2, ["vocab_size", "261"], *run, "--vocab_size", 260,
        "--bos_token_id", "null", "--eos_token_id", 0)
    damaged = modelbin.write(here("damaged.bin"), model._replace(tokenizer=b"\xff" + section[1:]))
    bad("a damaged tokenizer", 1, [damaged], "--init", damaged)
    flipped = bytearray(models[0])
    flipped[-5] ^= 8                                        # in the moments
    write(here("flipped.bin"), flipped)
    for option in ("--init", "--resume"):
        bad(f"{option} of a file with one bit flipped", 1, ["checksum", here("flipped.bin")], option,
            here("flipped.bin"))


# ---- the log -------------------------------------------------------------------------------------

def test_log(folder):
    here = lambda name: os.path.join(folder, name)
    run = [*TINY, "-b", 2, "-l", 16, "-x", 10, "--eval_problems", 8, "--eval_steps", 4,
           "--val", write(here("val"), documents(9)[8] * 3), "-o", here("a.bin"),
           "--log", here("log"), "--learning_rate", "0.004"]
    for scheduler, warmup, extra in (("constant", 3, ["--warmup_ratio", "0.21"]),
                                     ("cosine", 3, ["--warmup_ratio", "0.21"]),
                                     ("cosine", 5, ["--warmup_steps", 5]),
                                     ("cosine", 20, ["--warmup_steps", 20])):
        r = good(f"{scheduler}, warm-up {warmup}", *run, "--lr_scheduler", scheduler, *extra)
        rows = read_log(here("log"))
        for s, row in enumerate(rows):
            rate = 0.004 * min(1, (s + 1) / warmup)
            if scheduler == "cosine" and s >= warmup:
                rate = 0.002 * (1 + math.cos(math.pi * (s - warmup) / (10 - warmup)))
            check(f"{scheduler}, warm-up {warmup}: learning rate of step {s}",
                  abs(float(row["lr"]) / rate - 1) < 1e-7, row["lr"])
    head, *lines = read(here("log")).decode().splitlines()
    check("the log's header", head.split("\t")[:7] ==
          ["step", "loss", "aux_loss", "grad_norm", "lr", "tokens_per_s", "val_loss"], head)
    loads = [name for name in head.split("\t") if name.startswith("load_")]
    check("a load for each iteration", loads and loads == [
        f"load_{t + 1}" for t in range(len(loads))], head)
    check("the busiest expert has between the mean and all of it", all(
        1 <= float(row[name]) <= 64 for row in rows for name in loads), lines[0])
    check("a line for every step", [row["step"] for row in rows] == [str(s) for s in range(10)])
    measured = [int(row["step"]) for row in rows if row["val_loss"]]
    check("val_loss where it was measured", measured == [3, 7, 9], measured)
    check("the last val_loss is printed", float(rows[9]["val_loss"]) == r.values()["val_loss"])
    numbers = [x for line in lines for x in line.split("\t")[1:] if x] + \
        [line.split()[1] for line in r.out.splitlines()]
    check("7 digits, no exponent", all(len(x.replace(".", "").lstrip("0")) >= 7 or float(x) == 0
                                       for x in numbers) and "e" not in "".join(numbers), numbers)


# ---- wrong usage and faults ----------------------------------------------------------------------

def test_usage(folder):
    r = good("--help", "--help")
    check("--help lists options of all kinds", all(f"--{name}" in r.out for name in (
        "resume", "batch_size", "inner_iter", "rope_scaling.factor", "lr_scheduler")), r)
    check("--version", train("--version").out.startswith("train "))
    out = os.path.join(folder, "a.bin")
    for args, word in (
            (["--nothing"], "--nothing"), (["nothing"], "nothing"), (["-"], "-"),
            (["-z", "1"], "-z"), (["-x"], "-x"), (["-x", "abc"], "-x"), (["-x", "1.5"], "-x"),
            (["-x", "-1"], "-x"),
            (["-x", ""], "-x"), (["--max_steps=1x"], "max_steps"), (["-b", "0"], "-b"),
            (["-l", "1"], "-l"), (["--learning_rate", "nan"], "--learning_rate"),
            (["--learning_rate", "-1"], "--learning_rate"), (["--adam_beta1", "1"], "--adam_beta1"),
            (["--warmup_ratio", "1.1"], "--warmup_ratio"), (["--lr_scheduler", "linear"], "cosine"),
            (["--sequential=maybe"], "sequential"), (["--model", "large"], "--model"),
            (["--level", "3"], "--level"), (["--seed", "-1"], "--seed"),
            (["--threads", "-1"], "--threads"), (["--hidden_size", "null"], "--hidden_size"),
            (["--qk_rope_head_dim", "5"], "qk_rope_head_dim"),
            (["--num_experts_per_tok", "5"], "num_experts_per_tok"),
            (["--rope_scaling.type", "dynamic"], "yarn"),
            (["--topk_method", "group_limited_greedy", "--n_group", "3"], "n_group"),
            (["--bos_token_id", "258"], "bos_token_id"),
            (["--max_length", "9" * 20], "--max_length"),
            (["--max_position_embeddings", "8"], "max_position_embeddings")):
        bad(" ".join(args), 2, [word], *SMALL, *args, "-o", out)
    check("wrong usage writes nothing", not os.path.exists(out))


def test_data_faults(folder):
    here = lambda name: os.path.join(folder, name)
    ids = [i % 200 for i in range(300)]
    os.mkfifo(here("pipe"))
    for what, data, words in (
            ("missing", None, ["No such"]), ("empty", b"", ["empty"]),
            ("one byte", b"x", ["batch"]), ("shorter than a batch", b"x" * 32, ["batch_size"]),
            ("an odd byte", token_file(ids) + b"x", ["1625"]),
            ("a token is missing", token_file(ids)[:-2], ["1622", "300"]),
            ("cut in the header", token_file(ids)[:1000], ["1000"]),
            ("a wrong version", token_file(ids, version=2), ["version"]),
            ("a wrong width", token_file(ids, width=4), ["2224"]),
            ("a negative count", token_file(ids, count=-1), ["-1"]),
            ("a large count", token_file(ids, count=2**31 - 1), ["2147483647"]),
            ("a token beyond the vocabulary", token_file(ids[:99] + [258] + ids[100:]),
             ["258", str(1024 + 198)]),
            ("a large token", token_file([2**32 - 1] * 99, wide=True), ["4294967295"]),
            ("no tokens", token_file([]), ["batch"])):
        path = here(what.replace(" ", "_"))
        if data is not None:
            write(path, data)
        bad(f"data: {what}", 1, [path, *words], *SMALL, "-d", path, "-x", 1, "-o", here("a.bin"))
    for path, word in ((folder, "directory"), (here("pipe"), "pipe"), ("/dev/zero", "device")):
        bad(f"data: {word}", 1, [path, word], *SMALL, "-d", path, "-x", 1, "-o", here("a.bin"),
            timeout=5)
    text = write(here("text"), END.join(documents(40)))
    write(here("two"), b"x")                            # with its EOS two tokens: one to predict
    r = good("validation data: two tokens", *SMALL, "-b", 1, "-l", 8, "-d", text, "--val",
             here("two"), "-x", 1, "-o", here("two.bin"), "--threads", 2)
    check("validation data: a loss of one token", 1 < r.values()["val_loss"] < 20, r)
    os.remove(here("two.bin"))
    bad("validation data: missing", 1, [here("none")], *SMALL, "-d", text, "--val", here("none"))
    bad("text without an id that ends it", 1, ["eos_token_id"], *SMALL, "-d", text,
        "--eos_token_id", "null", "-x", 1, "-o", here("a.bin"))
    check("faults of the data write nothing", not os.path.exists(here("a.bin")))


def test_not_finite(folder):
    here = lambda name: os.path.join(folder, name)
    run = [*SMALL, "--eval_problems", 0, "-o", here("a.bin")]
    good("a good run", *run, "-x", 2)
    before = read(here("a.bin"))
    bad("a huge learning rate names the step", 1, ["step 1:"], *run, "-x", 50, "--save_steps", 0,
        "--learning_rate", "1e9", "--warmup_steps", 0)
    check("the last checkpoint is left alone", read(here("a.bin")) == before)
    model = modelbin.parse(before)
    weights = bytearray(model.weights)
    struct.pack_into("<f", weights, ord("q") * 16 * 4, math.nan)        # in the embeddings
    nan = modelbin.build(model._replace(weights=bytes(weights)))
    write(here("nan.bin"), nan)
    bad("a NaN among the weights", 1, ["step 2:"], "--resume", here("nan.bin"), "-x", 300)
    check("it is left alone, too", read(here("nan.bin")) == nan)


def test_gradient_not_finite(folder):
    """A loss that is a number, and gradients that are none: the step is named, nothing is saved."""
    here = lambda name: os.path.join(folder, name)
    good("a good run", *SMALL, "--eval_problems", 0, "-x", 1, "-o", here("a.bin"))
    model = modelbin.parse(read(here("a.bin")))
    weights = array("f", model.weights)
    c = test_run.DEFAULT | {k: json.loads(v) if re.fullmatch(r"-?\d+|true|false|null", v) else v
                            for k, v in model.config.items()}
    at = 0
    for name, copies, rows, cols in test_run.tensor_list(c, False):
        n = copies * rows * cols
        if "embed_tokens" in name:                      # tiny numbers, whose norms multiply
            weights[at:at + n] = array("f", [1e-22 * x for x in weights[at:at + n]])
        if "lm_head" in name:
            weights[at:at + n] = array("f", [1e22 * x for x in weights[at:at + n]])
        at += -(-4 * n // 64) * 16
    config = model.config | {"rms_norm_eps": "1e-30"}
    wild = modelbin.build(model._replace(config=config, weights=weights.tobytes()))
    write(here("wild.bin"), wild)
    r = train("--resume", here("wild.bin"), "-x", 3, "--log", here("log"))
    check("a gradient that is not finite", r.code == 1 and "step 1" in r.last
          and "gradient" in r.last and read(here("wild.bin")) == wild, r)
    check("its step is not in the log", read(here("log")).count(b"\n") <= 1, read(here("log")))


def test_denormal(folder):
    """Moments that have faded away are no slower than others."""
    here = lambda name: os.path.join(folder, name)
    text = ["-d", write(here("text"), END.join(documents(40)))]
    run = [*TINY, "--hidden_size", 64, "--moe_intermediate_size", 256, "-b", 1, "-l", 4]
    good("a start", *run, *text, "-x", 1, "-o", here("a.bin"))
    model, seconds = modelbin.parse(read(here("a.bin"))), []
    for x in (1e-3, 1e-39):
        moments = array("f", [x]) * (len(model.moments) // 4)
        modelbin.write(here("b.bin"), model._replace(moments=moments.tobytes()))
        start = time.monotonic()
        good(f"moments of {x}", "--resume", here("b.bin"), *text, "-x", 300)
        seconds.append(time.monotonic() - start)
    check("denormal moments are not slow", seconds[1] < 5 * seconds[0] + 1, seconds)


def test_no_gradient(folder):
    """A gradient of 0 everywhere is clipped to itself, and changes nothing but by decay."""
    here = lambda name: os.path.join(folder, name)
    run = [*SMALL, "--data", write(here("text"), "aaaa" * 300), "--completion_only_loss", "true",
           "--completion_marker", "aaaa", "--aux_loss_alpha", 0, "--weight_decay", 0, "-x", 3]
    tokens = write(here("tokens"), token_file([5] * 100))
    model = [*SMALL, "-d", tokens, "--aux_loss_alpha", 0, "--weight_decay", 0, "--vocab_size", 258]
    good("a start", *model, "-x", 0, "-o", here("a.bin"))
    good("a start", *model, "-x", 1, "-o", here("a.bin"), "--log", here("l"))
    started = modelbin.parse(read(here("a.bin")))
    zero = started._replace(weights=bytes(len(started.weights)),
                            moments=bytes(len(started.moments)))
    modelbin.write(here("zero.bin"), zero)              # all logits are 0, and no weight matters
    good("no gradient", "--resume", here("zero.bin"), "-d", tokens, "-x", 3, "--log", here("l"))
    norms = [float(row["grad_norm"]) for row in read_log(here("l"))]
    check("its norm is 0, and the loss finite", norms[0] > 0 and norms[1:] == [0, 0] and
          all(0 < x < 9 for x in losses(here("l"))), (norms, losses(here("l"))))
    check("nothing changes", not any(modelbin.parse(read(here("zero.bin"))).weights))
    good("where every token counts", *run, "-o", here("b.bin"))


def test_damaged_state(folder):
    """Numbers of the recipe in a checkpoint that no option would let through."""
    here = lambda name: os.path.join(folder, name)
    good("a good run", *SMALL, "--eval_problems", 0, "-x", 2, "-o", here("a.bin"))
    data = read(here("a.bin"))
    model = modelbin.parse(data)
    check("the recipe is in its place", [model.recipe[name] for name in (
        "batch_size", "max_length", "micro_batch_size", "max_steps", "step", "data_tokens")] ==
        ["2", "16", "null", "2", "2", "0"], model.recipe)
    for name, right in model.recipe.items():
        for value in (-1, 2**62, "x", "1e999", "", right + " ", '"', '"\\x"', '"\\ud800"', None):
            later = ("bias_update_speed", "packing", "completion_only_loss", "completion_marker",
                     "best_val_loss", "problem", "pending")
            if (name in ("warmup_steps", "best_val_loss", "problem") and value == -1    # is null
                    or name in later and value is None          # these need not be there
                    or name == "best_val_loss" and value == 2**62):
                continue
            lines = {k: v for k, v in (model.recipe | {name: value}).items() if v is not None}
            path = modelbin.write(here("spoiled.bin"), model._replace(recipe=lines))
            bad(f"a checkpoint whose {name} is {value}", 1, [path, name], "--resume", path, "-x", 3,
                timeout=5)
    path = modelbin.write(here("spoiled.bin"),
                          model._replace(recipe=model.recipe | {"batch_sise": 3}))
    bad("a checkpoint with a key of the future", 1, [path, "batch_sise"], "--resume", path, "-x", 3)
    for n in (1, 64, 1000, len(data) // 2):
        path = write(here("cut.bin"), data[:-n])
        bad(f"a checkpoint cut by {n}", 1, [path], "--resume", path)


def test_version_1(folder):
    """A checkpoint of version 1 goes on as the same one of version 2 does, and becomes one."""
    text = os.path.join(VERSION_1, "text.txt")
    for name, data in (("text", ["-d", text]), ("problems", [])):
        old = os.path.join(folder, name + ".bin")
        new = os.path.join(folder, name + "-2.bin")
        shutil.copy(os.path.join(VERSION_1, name + ".bin"), old)
        model = modelbin.read(old)
        check(f"{name}: is of version 1", read(old)[4] == 1)
        modelbin.write(new, model)
        for path in (old, new):
            good(f"{name}: resumed", "--resume", path, *data, "-x", 8, "--eval_problems", 0)
        check(f"{name}: the same bytes as from version 2", read(old) == read(new))
        check(f"{name}: it is version 2 now", read(old)[4] == 2)
        check(f"{name}: and has gone on", modelbin.read(old).recipe["step"] == "8" and
              modelbin.read(old).weights != model.weights)
        good(f"{name}: --init", "--init", os.path.join(VERSION_1, name + ".bin"), *data, "-b", 2,
             "-l", 16, "-x", 1, "--eval_problems", 0, "-o", old)
    bad("other data", 1, ["text-2.bin", "data"], "--resume", os.path.join(folder, "text-2.bin"), "-d",
        write(os.path.join(folder, "other"), read(text)[100:]), "-x", 9)
    good("an upcycled one", "--init", os.path.join(VERSION_1, "upcycled.bin"), "-b", 2, "-l", 16, "-x",
         1, "--eval_problems", 0, "-o", os.path.join(folder, "up.bin"))
    check("stays one", modelbin.read(os.path.join(folder, "up.bin")).config["coe_weights"] == "true")


PHASES = ["forward", "backward", "AdamW", "rest", "all"]


def profile_of(r):
    """(steps, {phase: (seconds a step, share)}) of what --profile printed."""
    lines = r.err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("profile of"))
    rows = [line.split() for line in lines[start + 1:][:len(PHASES)]]
    return int(lines[start].split()[2]), {" ".join(n): (float(s), float(p)) for *n, s, p in rows}


def test_profile(folder):
    here = lambda name: os.path.join(folder, name)
    run = [*SMALL, "-b", 4, "-l", 64, "--micro_batch_size", 3, "--eval_problems", 2]
    r = good("without --profile", *run, "-x", 5, "-o", here("a.bin"))
    check("no profile", "profile" not in r.err, r)
    for threads in (1, 2):
        r = good("--profile", *run, "-x", 5, "--profile", "-o", here("b.bin"), "--log", here("log"),
                 threads=threads)
        check("--profile changes no byte", read(here("a.bin")) == read(here("b.bin")))
        steps, table = profile_of(r)
        check("every phase has its line", list(table) == PHASES, r)
        parts = [table[name] for name in PHASES[:-1]]
        check("the first step is left out", steps == 4, r)
        check("the seconds add up", abs(sum(s for s, _ in parts) - table["all"][0]) < 1e-5, r)
        check("the shares add up to 100", abs(sum(p for _, p in parts) - 100) < 0.1, r)
        check("nothing takes less than no time", min(s for s, _ in parts) >= 0, r)
        check("what is computed takes time", min(s for s, _ in parts[:3]) > 0, r)
        head, *rows = [line.split("\t") for line in read(here("log")).decode().splitlines()]
        logged = sum(4 * 64 / float(row[head.index("tokens_per_s")]) for row in rows[1:])
        check("it is the time of the log", logged / 2 < 4 * table["all"][0] < logged + 1e-5,
              f"{logged}, {table}")
    r = good("--profile of one step", *run, "-x", 1, "--profile", "-o", here("b.bin"))
    check("one step is not left out", profile_of(r)[0] == 1, r)
    r = good("--profile and --resume", "--resume", here("b.bin"), "-x", 4, "--profile")
    check("the first step after --resume is left out", profile_of(r)[0] == 2, r)
    r = good("--profile of nothing", "--resume", here("b.bin"), "--profile")
    check("no steps, no profile", "profile of" not in r.err, r)


def limit_files(size):
    """A disk that is full after so many bytes of a file, as far as the program can tell."""
    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return set_limit


def test_output_faults(folder):
    here = lambda name: os.path.join(folder, name)
    run = [*SMALL, "-d", write(here("text"), END.join(documents(40))), "-x", 2]
    good("a good run", *run, "-o", here("a.bin"), "--log", here("log"))
    before, log = read(here("a.bin")), read_log(here("log"))
    files = sorted(os.listdir(folder))
    write(here("a.bin.tmp-123-0"), "stale")
    write(here("a.bin.lock"), "")
    good("what a killed run has left", *run, "-o", here("a.bin"))
    check("it is gone, and the model is there", read(here("a.bin")) == before and
          sorted(os.listdir(folder)) == files, os.listdir(folder))
    for size in (0, 500, 5000, len(before) - 1):
        bad(f"a disk with room for {size} bytes", 1, [here("a.bin")], *run, "--seed", 2,
            "-o", here("a.bin"), preexec_fn=limit_files(size))
        check("the old checkpoint is whole", read(here("a.bin")) == before)
        check("nothing is left of the new one", sorted(os.listdir(folder)) == files)
    bad("no room for the log", 1, [here("log")], *run, "-o", here("b.bin"), "--log", here("log"),
        preexec_fn=limit_files(10))
    bad("no folder", 1, [here("no/a.bin")], *run, "-o", here("no/a.bin"))
    r = train(*run, "-o", here("no/a.bin"))
    check("that is found before the first step", "step" not in r.err, r)
    bad("no folder for the log", 1, [here("no/log")], *run, "-o", here("b.bin"),
        "--log", here("no/log"))
    bad("a folder as output", 1, [folder], *run, "-o", folder)
    check("a folder as output: nothing is left", not os.path.exists(folder + ".tmp"))
    for option in ("-o", "--log"):
        if not os.path.exists(here("pipe")):
            os.mkfifo(here("pipe"))
        bad(f"{option} pipe", 1, [here("pipe")], *run, "-o", here("b.bin"), option, here("pipe"),
            timeout=5)
        check(f"{option} pipe leaves the pipe, so /dev/null as well, where it is",
              stat.S_ISFIFO(os.stat(here("pipe")).st_mode))
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            r = train(*run, "-o", here("b.bin"), stdout=full)
        check("stdout is full", r.code == 1 and r.last.startswith("train: stdout"), r)
    command = " ".join(f"'{x}'" for x in [TRAIN, *run, "-o", here("c.bin"), "--log", here("log")])
    for closed in ("<&- 2>&-", "2>&-", "2>&- >&-"):
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], env=environment(),
                              stdout=subprocess.PIPE)
        check(f"standard files closed, {closed}: files are whole", read(here("c.bin")) == before and
              read_log(here("log")) == log, read(here("log"))[:200])
        expected = ">&-" in closed.split()              # 1: nobody gets the result
        check(f"standard files closed, {closed}", done.returncode == expected, done)
    done = subprocess.run(["sh", "-c", f"ulimit -s 256; {command}"], env=environment(),
                          capture_output=True)
    check("a small stack", done.returncode == 0, done.stderr)


def test_permission(folder):
    """A read-only folder, a read-only output, and files that may not be read, under a user to whom
    that applies."""
    here = lambda name: os.path.join(folder, name)
    program, user = test_run.as_ordinary_user(folder, TRAIN)
    for name in ("locked", "open"):
        os.mkdir(here(name))
    os.chmod(here("open"), 0o777)
    run = [*SMALL, "-d", write(here("text"), END.join(documents(40))), "-x", 1]
    good("a model", *run, "-o", here("locked/a.bin"))
    before = read(here("locked/a.bin"))
    os.chmod(here("locked"), 0o555)
    more = {"program": program, **user}
    good("a folder that may be written", *run, "-o", here("open/a.bin"), **more)
    for option in ("-o", "--best", "--log"):
        output = ["-o", here("open/a.bin")] if option != "-o" else []
        bad(f"a read-only folder, {option}", 1, [here("locked/new"), "ermission"], *run, *output,
            option, here("locked/new"), **more)
    bad("--resume in a read-only folder", 1, [here("locked/a.bin"), "ermission"], "--resume",
        here("locked/a.bin"), "-d", here("text"), "-x", 2, **more)
    check("the read-only folder is as it was", os.listdir(here("locked")) == ["a.bin"] and
          read(here("locked/a.bin")) == before)
    os.chmod(here("open/a.bin"), 0o444)
    kept = read(here("open/a.bin"))
    bad("a read-only file", 1, [here("open/a.bin"), "ermission"], *run, "-o", here("open/a.bin"),
        **more)
    check("it stays", read(here("open/a.bin")) == kept and os.listdir(here("open")) == ["a.bin"])
    secret = write(here("secret"), "x" * 999)
    os.chmod(secret, 0)
    for options in (["-d", secret], ["-d", here("text"), "--val", secret], ["--init", secret],
                    ["--resume", secret], ["--tokenizer", secret]):
        bad(f"no permission to read, {options[-2]}", 1, [secret, "ermission"], *SMALL, "-x", 1,
            *options, "-o", here("open/b.bin"), **more)


def test_locale(folder):
    """A decimal comma changes nothing that is read or written."""
    here = lambda name: os.path.join(folder, name)
    there = test_run.comma_locale(folder)
    if not there:
        return                                          # another C library
    results = []
    for more in ({}, {"env": there | environment()}):
        r = good("with a decimal comma", *SMALL, "--learning_rate", "0.0125", "-x", 2, "--log",
                 here("l"), "--eval_problems", 2, "-o", here("a.bin"), **more)
        results.append((r.out, read(here("a.bin")), read_log(here("l"))))
        good("and resumed", "--resume", here("a.bin"), "-x", 3, **more)
        results[-1] += (read(here("a.bin")),)
    check("a decimal comma changes nothing", results[0] == results[1])
    bad("0,5 is no number", 2, ["--learning_rate"], *SMALL, "--learning_rate", "0,5", env=there)


def test_memory(folder):
    """A small RLIMIT_AS: a line says how much was asked for, and for what; no output is touched."""
    here = lambda name: os.path.join(folder, name)
    if "san" in subprocess.run(["ldd", TRAIN], capture_output=True, text=True).stdout:
        return                                          # the sanitizers take terabytes
    text = write(os.path.join(tempfile.mkdtemp(dir=folder), "text"), END.join(documents(400)))
    run = [*SMALL, "-l", 128, "-b", 32, "-d", text, "-x", 1]
    write(here("a.bin"), "old")
    files, ended = sorted(os.listdir(folder)), {0: 0, 1: 0}
    for megabytes in (*range(2, 40, 2), 60, 400):
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
        r = train(*run, "-o", here("a.bin"), preexec_fn=limit)
        if "shared libraries" in r.err:                 # with less it is not even loaded
            continue
        ended[r.code] = ended.get(r.code, 0) + 1
        check(f"{megabytes} MB", r.code == 0 or r.code == 1 and re.search(
            r"^train: out of memory: \d+\.\d MB for \w|^train: training takes \d.* MB|"
            r"^libgomp: Out of memory allocating \d+ bytes", r.last), r)
        check(f"{megabytes} MB: the output", (read(here("a.bin")) != b"old") == (r.code == 0) and
              sorted(os.listdir(folder)) == files, os.listdir(folder))
        write(here("a.bin"), "old")
    check("some are too few, some enough", ended[0] and ended[1] and len(ended) == 2, ended)


def main(names):
    """Runs the tests among these names; those in ONLY alone, if that is set."""
    only = os.environ.get("ONLY", "").split()
    tests = [value for name, value in names.items() if name.startswith("test_") and callable(value)
             and (not only or name in only)]
    for test in tests:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                test(folder)
            except Exception as e:                      # go on with the next test
                check(test.__name__, False, repr(e))
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(globals())
