#!/usr/bin/env python3
"""Measures speed: what this machine can do, what the kernels reach of it, then whole programs.

    make bench                          everything; up to 10 minutes, the large models if they fit
    make bench-quick                    a selection, under a minute
    make bench PEER=torch_coe.py PEER_PYTHON=build/venv/bin/python      beside PyTorch
    make bench ONLY=train:T,decode:S    rows by the beginning of their name (--list shows them)
    make bench TSV=bench.tsv            the table once more, for programs

Rows are medians of 5 (training T: 20) after a warm-up, and the spread is (most - least) / median;
the peer's are of as many, at scale P of 3, for it would take most of the time.
The models have random weights and random data, in three sizes: T is a toy, S fits a laptop, P is
the paper's. C2 is Chain-of-Experts with two iterations, C1 the mixture of experts of equal cost.

What counts as work is one formula for both sides, counts() and forward_flops() below: 2 operations
for each weight that a token is multiplied with, routed experts only where it is sent to, and for
each pair of tokens in causal attention, at the width of expanded keys and values; training is 3
times that, because the backward pass has two products for each one forward. A token decoded reads
each of those weights, in the type of the file, and the cached latents. Norms, softmax, choosing
experts and embedding rows count as nothing, so they lower the share of the limit; what a program
saves itself, as the last layer's experts for rows whose logits nobody wants, counts as if done.

The peer is a script that prints one JSON line a measurement:
    python PEER bench --impl fast --scale S --mode train,prefill,decode --C 2 --threads 2
"""
import argparse
import functools
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from array import array
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ---- what is measured ----------------------------------------------------------------------------

class Sizes(dict):
    """A dict whose keys are attributes too: s.d instead of s["d"]."""
    __getattr__ = dict.__getitem__


# The letters of coe.c; KC is K times C, at constant cost. B sequences of n tokens are a step of
# training.
SCALES = {
    "T": Sizes(V=512, d=128, L=4, H=4, dn=32, dr=16, dv=32, R=64, E=16, f=64, KC=4, B=8, n=128),
    "S": Sizes(V=4096, d=384, L=6, H=6, dn=64, dr=32, dv=64, R=128, E=32, f=192, KC=4, B=8, n=256),
    "P": Sizes(V=102400, d=1024, L=4, H=8, dn=128, dr=64, dv=128, R=512, E=63, f=704, KC=8, B=1,
               n=512),
}
KEYS = dict(V="vocab_size", d="hidden_size", L="num_hidden_layers", H="num_attention_heads",
            dn="qk_nope_head_dim", dr="qk_rope_head_dim", dv="v_head_dim", R="kv_lora_rank",
            E="n_routed_experts", f="moe_intermediate_size", K="num_experts_per_tok",
            C="inner_iter")
ALIKE = dict(q_lora_rank="null", n_shared_experts=1, rope_theta=10000, tie_word_embeddings="false",
             initializer_range=0.02, max_position_embeddings=8192)
DTYPES = "f32", "bf16", "q8"
REPEATS = 5
GIGA = 1e9

KINDS = {       # what a row measures, by the first word of its name
    "limit": "fused multiply-adds in registers, and reading 0.5 GB, with so many threads",
    "kernel": "matrix products of a training step; f32, bf16, q8: of one token, as in decoding",
    "train": "a training step: forward, backward, AdamW, without clipping",
    "gradients": "the same without AdamW",
    "adamw": "AdamW alone, which clears the gradients: 32 bytes a parameter at the speed of reading",
    "memory": "peak memory of training; the share: 16 bytes a parameter of it",
    "prefill": "a prompt of 512 tokens and the logits of its last one",
    "decode": "128 tokens, one by one",
    "context": "decoding after a prompt of 128 and of 4,096 tokens",
    "threads": "speed with all threads over that with one; the share: of what the limits do",
    "experts": "speed with 64 experts over that with 16, K and f the same; the share: with 64",
    "chain": "extra time of 2 or 4 iterations over 1, by their extra operations or bytes; same K",
    "startup": "the file in memory: until it has been checked, and until the first token is out",
}
QUICK = "limit kernel:S:expert train:T:C2 train:S:C2 gradients:S:C2 prefill:S:C2 decode:T:C2:f32 " \
        "decode:S:C2".split()


class Model(NamedTuple):
    scale: str
    C: int
    K: int
    E: int
    outer: bool = False                 # where the residual is: around the chain, or in it

    def sizes(self):
        return Sizes(SCALES[self.scale] | dict(C=self.C, K=self.K, E=self.E))

    def config(self):
        """The model as options."""
        s = self.sizes()
        keys = {name: s[letter] for letter, name in KEYS.items()} | ALIKE
        keys |= dict(inner_residual=str(not self.outer).lower(),
                     outer_residual=str(self.outer).lower())
        return [word for name, value in keys.items() for word in (f"--{name}", str(value))]


def model_of(scale, C, **more):
    s = SCALES[scale]
    return Model(**dict(scale=scale, C=C, K=s.KC // C, E=s.E, outer=C == 1) | more)


def counts(model):
    """(weights that a token is multiplied with before lm_head, those of lm_head, parameters)."""
    s = model.sizes()
    attention = s.d * s.H * (s.dn + s.dr) + s.d * (s.R + s.dr) + s.R * s.H * (s.dn + s.dv) \
        + s.H * s.dv * s.d
    expert, routers, head = 3 * s.d * s.f, s.C * s.E * s.d, s.V * s.d
    norms = s.L * (2 * s.d + s.R) + s.d
    body = s.L * (attention + routers + s.C * (s.K + 1) * expert)
    return body, head, s.L * (attention + routers + (s.E + 1) * expert) + 2 * head + norms


def forward_flops(model, n, logits):
    """Operations of a sequence of n tokens, and the logits of so many of them."""
    s = model.sizes()
    body, head, _ = counts(model)
    attention = s.L * s.H * (s.dn + s.dr + s.dv) * n * (n + 1)      # 2 for each of n (n + 1) / 2
    return 2 * body * n + attention + 2 * head * logits


def token_bytes(model, context, weight_bytes):
    """What decoding a token reads: weights, and the cached latents of the context."""
    s = model.sizes()
    body, head, _ = counts(model)
    return (body + head) * weight_bytes + context * s.L * (s.R + s.dr) * 4


# ---- running programs ----------------------------------------------------------------------------

class Missing(Exception):
    """Something that a row needs is not there: the row stays empty."""


class Broken(Exception):
    """A program failed that should not have."""


def call(command):
    """The finished process of a command, with its output as text."""
    try:
        return subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as e:
        raise Broken(f"{command[0]}: {e.strerror}") from None


def problem(done):
    """How a command ended that should have ended well."""
    lines = done.stderr.strip().splitlines() or ["no message"]
    return f"exit code {done.returncode}: {lines[-1]}"


def succeed(command):
    """(stdout, stderr) of a command that must end well."""
    done = call(command)
    if done.returncode:
        raise Broken(problem(done))
    return done.stdout, done.stderr


def free_memory():
    """Bytes that a program can have now."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if "MemAvailable" in line)
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def median_and_spread(x):
    middle = statistics.median(x)
    return middle, (max(x) - min(x)) / middle


class Timing(NamedTuple):
    rate: float                         # tokens per second
    spread: float


class Training(NamedTuple):
    speed: Timing
    adamw: float                        # share of the time
    memory: float                       # bytes at the peak; NAN where nobody knows


class Bench:
    """Measures; what two rows need is measured once."""

    def __init__(self, options, folder):
        self.options, self.folder, self.threads = options, folder, options.threads
        self.peer_modes = {}            # (scale, C) -> what the peer will be asked for
        self.stored = None              # the model whose files there are
        self.notes = {}                 # what went wrong -> where

    # -- models and data

    def path(self, model, dtype="f32"):
        """A file of the model; those of another one go. Model files are large."""
        if self.stored != model:
            for name in os.listdir(self.folder):
                os.remove(os.path.join(self.folder, name))
            self.stored = None
            self.need(5 * counts(model)[2], 8 * counts(model)[2])
            succeed([self.options.bench, "model", self.file("f32.bin"), *model.config()])
            self.stored = model
        path = self.file(dtype + ".bin")
        if not os.path.exists(path):
            done = call([*self.options.export, self.file("f32.bin"), path, "--dtype", dtype])
            if done.returncode:
                raise Missing(problem(done))
        return path

    def file(self, name):
        return os.path.join(self.folder, name)

    def need(self, memory, disk=0):
        for what, needed, there in (("memory", memory, free_memory()),
                                    ("disk", disk, shutil.disk_usage(self.folder).free)):
            if needed > there:
                raise Missing(f"needs {needed / GIGA:.1f} GB of {what}, "
                              f"{there / GIGA:.1f} are free")

    def tokens(self, name, n, V):
        """A token file as llm.c has them, with n random ids."""
        rng = random.Random(n)
        with open(self.file(name), "wb") as f:
            f.write(struct.pack("<3i", 20240801, 7, n).ljust(1024, b"\0"))
            f.write(array("I", (rng.randrange(V) for _ in range(n))).tobytes())
        return self.file(name)

    # -- measurements

    @functools.cache
    def rate(self, *what):
        """(operations or bytes per second, spread) of a measurement of tests/bench.c."""
        return tuple(map(float, succeed([self.options.bench, *what])[0].split()))

    def peak(self, threads):
        return self.rate("fma", threads)[0]

    def reading(self, threads):
        return self.rate("read", threads)[0]

    @functools.cache
    def training(self, model, threads):
        """./train on random tokens. The end of the profile is the end of what is measured: saving
        is not waited for."""
        s = model.sizes()
        self.need(17 * counts(model)[2])
        warm = 1 if model.scale == "P" else 2
        steps = 4 * REPEATS if model.scale == "T" else REPEATS
        command = [self.options.train, "--init", self.path(model), "--profile",
                   "-b", s.B, "-l", s.n, "-x", warm + steps, "--threads", threads,
                   "-d", self.tokens("tokens", 8 * s.B * s.n + 1, s.V),
                   "--val", self.tokens("two", 2, s.V), "--max_grad_norm", 0,
                   "--eval_steps", 0, "--save_steps", 0,
                   "-o", self.file("trained"), "--log", self.file("log.tsv")]
        adamw, line = None, "no message"
        with subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                for line in process.stderr:
                    if line.startswith("AdamW "):
                        adamw = float(line.split()[-1]) / 100
                    if line.startswith("all "):
                        break
                else:
                    raise Broken(line.strip())
            finally:
                memory = end(process)
        with open(self.file("log.tsv")) as f:
            head, *lines = [line.rstrip("\n").split("\t") for line in f]
        speeds = [float(line[head.index("tokens_per_s")]) for line in lines]
        return Training(Timing(*median_and_spread(speeds[warm:])), adamw, memory)

    @functools.cache
    def running(self, model, dtype, threads):
        """./run -m bench: prefill and decode. P takes long: a short context where prefill is not
        wanted."""
        wanted = dtype == "f32" and threads == self.threads
        short = ["-c", 48] if model.scale == "P" and not wanted else []
        out, _ = succeed([self.options.run, self.path(model, dtype), "-m", "bench",
                          "--threads", threads, *short])
        value = {name: float(x) for name, x in (line.split() for line in out.splitlines())}
        return {what: Timing(value[what + "_tok_s"], value[what + "_spread"])
                for what in ("prefill", "decode")}

    @functools.cache
    def generating(self, model, context):
        """./run: 128 tokens after a prompt of so many."""
        path, rng, rates = self.path(model), random.Random(context), []
        with open(self.file("prompt"), "w") as f:
            f.write(" ".join(str(rng.randrange(model.sizes().V)) for _ in range(context)))
        for _ in range(REPEATS):
            _, text = succeed([self.options.run, path, "--ids", "-f", self.file("prompt"),
                               "-n", 129, "-t", 0, "--ignore-eos", "--threads", self.threads])
            rates.append(float(text.split("then 128, ")[1].split()[0]))
        return Timing(*median_and_spread(rates))

    def wall(self, *command):
        """(seconds, spread) of a program from start to end."""
        times = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            succeed(command)
            times.append(time.perf_counter() - start)
        return median_and_spread(times[1:])

    @functools.cache
    def peer(self, scale, C):
        """The peer's measurements, by mode."""
        if not self.options.peer:
            return {}
        modes = ",".join(sorted(self.peer_modes[scale, C], reverse=True))   # training first
        try:
            self.need(17 * counts(model_of(scale, C))[2])
            out, _ = succeed([self.options.peer_python, self.options.peer, "bench", "--impl",
                              "fast", "--scale", scale, "--mode", modes, "--C", C,
                              "--threads", self.threads, "--reps", 3 if scale == "P" else REPEATS])
            return {line["mode"]: line for line in map(json.loads, out.splitlines())}
        except (Missing, Broken, ValueError, KeyError) as e:
            self.note(f"{scale}:C{C} of the peer", e)
            return {}

    def note(self, where, problem):
        self.notes.setdefault(str(problem).replace(self.folder + os.sep, ""), []).append(where)


def end(process):
    """Ends a process, of which nothing more is wanted. Returns the most memory that it had."""
    if not hasattr(os, "wait4"):
        process.kill()
        return math.nan
    os.kill(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the rows ------------------------------------------------------------------------------------

class Figure(NamedTuple):
    value: float
    unit: str
    spread: float = None
    detail: str = ""                    # what the value is in other terms
    share: float = None                 # of what is possible
    peer: float = None                  # the peer's value
    less: bool = False                  # less is better


class Row(NamedTuple):
    name: str
    measure: object                     # (Bench) -> Figure
    peer: tuple = None                  # (scale, C, mode) of the peer that it is compared with


def gflops(rate):
    return f"{rate / GIGA:.1f} GFLOP/s"


def gbytes(rate):
    return f"{rate / GIGA:.1f} GB/s"


def limit(b, what, threads):
    rate, spread = b.rate(what, threads)
    return Figure(rate / GIGA, "GFLOP/s" if what == "fma" else "GB/s", spread)


def kernel(b, kind, *sizes):
    rate, spread = b.rate(kind, b.threads, *sizes)
    shape = "x".join(map(str, sizes if sizes[-1] > 1 else sizes[:-1]))
    if sizes[0] == 1:
        return Figure(rate / GIGA, "GB/s", spread, shape, rate / b.reading(b.threads))
    return Figure(rate / GIGA, "GFLOP/s", spread, shape, rate / b.peak(b.threads))


def train(b, model, without_adamw=False):
    t, s, peer = b.training(model, b.threads), model.sizes(), None
    speed = t.speed.rate / (1 - t.adamw if without_adamw else 1)
    flops = 3 * forward_flops(model, s.n, s.n) / s.n * speed
    if line := b.peer(model.scale, model.C).get("train"):
        peer = s.B * s.n / (line["sec"] - (line["adamw_s"] if without_adamw else 0))
    return Figure(speed, "tokens/s", t.speed.spread, gflops(flops), flops / b.peak(b.threads), peer)


def adamw(b, model):
    t, s = b.training(model, b.threads), model.sizes()
    seconds = t.adamw * s.B * s.n / t.speed.rate
    traffic = 32 * counts(model)[2] / seconds       # reads and writes w, m, v and g
    line = b.peer(model.scale, model.C).get("train")
    return Figure(1e3 * seconds, "ms", None, gbytes(traffic), traffic / b.reading(b.threads),
                  line and 1e3 * line["adamw_s"], less=True)


def memory(b, model):
    peak, line = b.training(model, b.threads).memory, b.peer(model.scale, model.C).get("train")
    return Figure(peak / 2**20, "MiB", None, "", 16 * counts(model)[2] / peak,
                  line and line["rss_mib"], less=True)


def prefill(b, model):
    speed = b.running(model, "f32", b.threads)["prefill"]
    flops = forward_flops(model, 512, 1) / 512 * speed.rate
    line = b.peer(model.scale, model.C).get("prefill512_last_logit")
    return Figure(speed.rate, "tokens/s", speed.spread, gflops(flops), flops / b.peak(b.threads),
                  line and line["tok_s"])


def read_rate(b, model, speed, context, dtype="f32"):
    """(text, share of the limit) of decoding."""
    size = {d: os.path.getsize(b.path(model, d)) for d in ("f32", dtype)}
    rate = speed.rate * token_bytes(model, context, 4 * size[dtype] / size["f32"])
    return gbytes(rate), rate / b.reading(b.threads)


def decode(b, model, dtype):
    speed = b.running(model, dtype, b.threads)["decode"]
    line = b.peer(model.scale, model.C).get("decode128") if dtype == "f32" else None
    return Figure(speed.rate, "tokens/s", speed.spread, *read_rate(b, model, speed, 80, dtype),
                  line and line["tok_s"])


def context(b, model, n):
    speed = b.generating(model, n)
    return Figure(speed.rate, "tokens/s", speed.spread, *read_rate(b, model, speed, n + 64))


def threads(b, what, model):
    if b.threads == 1:
        raise Missing("there is one thread only")
    one, all_ = ((b.training(model, n).speed, b.peak(n)) if what == "train" else
                 (b.running(model, "f32", n)["decode"], b.reading(n)) for n in (1, b.threads))
    ratio = all_[0].rate / one[0].rate
    return Figure(ratio, "x", None, f"{one[0].rate:,.1f} with 1", ratio / (all_[1] / one[1]))


def speed_of(b, what, model):
    if what == "train":
        return b.training(model, b.threads).speed
    return b.running(model, "f32", b.threads)["decode"]


def experts(b, what, few, many):
    speeds = [speed_of(b, what, model) for model in (few, many)]
    share = read_rate(b, many, speeds[1], 80)[1] if what == "decode" else None
    return Figure(speeds[1].rate / speeds[0].rate, "x", None,
                  "{:,.0f} to {:,.0f}".format(*(s.rate for s in speeds)), share)


def chain(b, what, one, more):
    """How much more time, by how much more work: in decoding that is the bytes that are read."""
    speeds = [speed_of(b, what, model).rate for model in (one, more)]
    n = one.sizes().n
    cost = [forward_flops(model, n, n) if what == "train" else token_bytes(model, 80, 4)
            for model in (one, more)]
    return Figure((speeds[0] / speeds[1] - 1) / (cost[1] / cost[0] - 1), "x", None,
                  "{:,.0f} to {:,.0f}".format(*speeds))


def startup(b, model, token):
    arguments = ["--ids", "-i", "1", "-n", "1", "-t", "0"] if token else ["-m", "info"]
    seconds, spread = b.wall(b.options.run, b.path(model), "--threads", b.threads, *arguments)
    return Figure(1e3 * seconds, "ms", spread)


def rows(threads_):
    """All rows. Those of one model follow one another, because its file is made for them."""
    result = []

    def add(name, function, *arguments, peer=None):
        result.append(Row(name, lambda b: function(b, *arguments), peer))

    for what in ("fma", "read"):
        for n in sorted({1, threads_}):
            add(f"limit:{what}:{n}", limit, what, n)
    for scale, s in SCALES.items():
        tokens, K = s.B * s.n, s.KC // 2
        loss_rows = min(tokens, max(96, min(384, (1 << 24) // s.V)))    # as in train.c [6]
        for part, n, sizes, copies in (("attention", tokens, (s.d, s.H * (s.dn + s.dr)), s.L),
                                       ("expert", tokens * K // s.E, (s.d, s.f), s.E),
                                       ("head", loss_rows, (s.d, s.V), 1)):
            for kind in ("forward", "dx", "dw"):
                add(f"kernel:{scale}:{part}:{kind}", kernel, kind, n, *sizes,
                    copies if part == "expert" else 1)
            for dtype in DTYPES:
                add(f"kernel:{scale}:{part}:{dtype}", kernel, dtype, 1, *sizes, copies)
    for scale in SCALES:
        for C in (2, 1):
            m, tag = model_of(scale, C), f"{scale}:C{C}"
            add(f"train:{tag}", train, m, peer=(scale, C, "train"))
            add(f"gradients:{tag}", train, m, True, peer=(scale, C, "train"))
            if scale == "P":
                add(f"adamw:{tag}", adamw, m, peer=(scale, C, "train"))
                add(f"memory:{tag}", memory, m, peer=(scale, C, "train"))
            add(f"prefill:{tag}", prefill, m, peer=(scale, C, "prefill"))
            for dtype in DTYPES:
                add(f"decode:{tag}:{dtype}", decode, m, dtype,
                    peer=(scale, C, "decode") if dtype == "f32" else None)
            if C == 2:
                if scale == "P":
                    add(f"startup:{tag}:check", startup, m, False)
                    add(f"startup:{tag}:token", startup, m, True)
                if scale == "S":
                    for n in (128, 4096):
                        add(f"context:{tag}:{n}", context, m, n)
                add(f"threads:{tag}:{'decode' if scale == 'P' else 'train'}", threads,
                    "decode" if scale == "P" else "train", m)
        if scale == "S":
            base, inner = model_of("S", 2), dict(K=s.KC // 2, outer=False)
            for what in ("train", "decode"):
                add(f"experts:S:{what}", experts, what, base._replace(E=16), base._replace(E=64))
            for what in ("train", "decode"):
                for C in (2, 4):
                    add(f"chain:S:C{C}:{what}", chain, what, model_of("S", 1, **inner),
                        model_of("S", C, **inner))
    return result


# ---- the table -----------------------------------------------------------------------------------

COLUMNS = ("row", "result", "unit", "spread", "that is", "of limit", "PyTorch", "ratio")


def number(x):
    """A number with 3 or more digits that fits its column."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.{max(0, 2 - math.floor(math.log10(x or 1)))}f}"


def percent(x):
    return "" if x is None else f"{100 * x:.{int(x < 10)}f} %"


def line_of(name, result="-", unit="", spread="", detail="", share="", peer="", ratio=""):
    return f"{name:27}{result:>10} {unit:8}{spread:>8}{detail:>17}{share:>9}{peer:>11}{ratio:>7}" \
        .rstrip()


def ratio_of(figure):
    """How much better than the peer."""
    if not figure.peer:
        return None
    return figure.peer / figure.value if figure.less else figure.value / figure.peer


def print_row(name, figure):
    if not figure:
        print(line_of(name), flush=True)
        return
    ratio = ratio_of(figure)
    print(line_of(name, number(figure.value), figure.unit, percent(figure.spread), figure.detail,
                  percent(figure.share), number(figure.peer) if figure.peer else "",
                  f"{ratio:.2f}" if ratio else ""), flush=True)


def tsv_line(name, figure):
    if not figure:
        return name + "\t" * (len(COLUMNS) - 1)
    cells = [figure.value, figure.unit, figure.spread, figure.detail, figure.share, figure.peer,
             ratio_of(figure)]
    return "\t".join([name] + ["" if x is None else f"{x:.7g}" if isinstance(x, float) else str(x)
                               for x in cells])


def processor():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(": ", 1)[1].strip() for line in f if "model name" in line)
    except (OSError, StopIteration):
        import platform
        return platform.processor() or platform.machine()


def measure_all(bench, chosen):
    """Prints the table as it grows. Returns the figures and whether something broke."""
    figures, broken = {}, False
    print(f"{processor()}, {bench.threads} thread{'s'[:bench.threads > 1]}")
    print(line_of(*COLUMNS))
    for row in chosen:
        try:
            figures[row.name] = row.measure(bench)
        except (Missing, Broken, OSError) as e:
            figures[row.name] = None
            bench.note(row.name, e)
            broken |= not isinstance(e, Missing)
        print_row(row.name, figures[row.name])
    print()
    for kind, meaning in KINDS.items():
        if any(row.name.startswith(kind + ":") for row in chosen):
            print(f"{kind:10} {meaning}")
    for note, where in bench.notes.items():
        print(textwrap.fill(f"- {', '.join(where)}: {note}", 100, subsequent_indent="  "))
    return figures, broken


def parse_options():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="rows whose names begin with one of these, a,b,c")
    p.add_argument("--quick", action="store_true", help="a selection of rows")
    p.add_argument("--list", action="store_true", help="print the names of the rows")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="all cores if not given")
    p.add_argument("--tsv", metavar="FILE", help="a file for the table, tab-separated")
    p.add_argument("--peer", metavar="FILE", help="the script to compare with")
    p.add_argument("--peer_python", default=sys.executable, help="the Python that has its packages")
    p.add_argument("--export", type=shlex.split, metavar="COMMAND", help="how to call export.py")
    for program in ("train", "run", "build/bench"):
        name = os.path.basename(program)
        p.add_argument(f"--{name}", default=os.path.join(ROOT, program), help=f"the program {name}")
    options = p.parse_args()
    if not options.export:
        venv = os.path.join(ROOT, "build", "venv", "bin", "python")     # what make test sets up
        options.export = [venv if os.path.exists(venv) else sys.executable,
                          os.path.join(ROOT, "export.py")]
    return p, options


def main():
    parser, options = parse_options()
    if not 1 <= options.threads <= 1024:
        parser.error(f"--threads is {options.threads}, must be 1..1024")
    every = rows(options.threads)
    wanted = [name for name in options.only.split(",") if name] or \
        (QUICK if options.quick else [""])
    for name in wanted:
        if not any(row.name.startswith(name) for row in every):
            parser.error(f"--only: no row begins with \"{name}\"; --list shows them")
    chosen = [row for row in every if row.name.startswith(tuple(wanted))]
    if options.list:
        print("\n".join(row.name for row in chosen))
        return 0
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # what is in the folder must go
    os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.path.join(ROOT, "build")) as folder:
        bench = Bench(options, folder)
        for row in chosen:
            if row.peer:
                bench.peer_modes.setdefault(row.peer[:2], set()).add(row.peer[2])
        figures, broken = measure_all(bench, chosen)
    if options.tsv:
        with open(options.tsv, "w") as f:
            f.write("\t".join(COLUMNS) + "\n")
            f.writelines(tsv_line(name, figure) + "\n" for name, figure in figures.items())
    print(f"{time.monotonic() - start:.0f} s")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
