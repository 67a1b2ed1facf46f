#!/usr/bin/env python3
"""Checks what `make bench` counts and prints: that its formulas agree with the programs, and what
the table says where something is missing or broken. How fast anything is, is not tested.

    python3 tests/test_bench.py ./train ./run build/bench

The last line is "N passed, N failed". Needs nothing but Python.
"""
import json
import os
import subprocess
import sys
import tempfile

import bench

TRAIN, RUN, BENCH = map(os.path.abspath, sys.argv[1:4])
SCRIPT = os.path.abspath(bench.__file__)
passed = failed = 0

# A peer that answers at once: as fast as makes the ratios easy to check.
PEER = """import json, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
for mode in arguments["--mode"].split(","):
    print(json.dumps(dict(mode={"decode": "decode128"}.get(mode, mode), tok_s=100, sec=2,
                          adamw_s=1, rss_mib=1, arguments=arguments)))
"""


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}{': ' if detail != '' else ''}{str(detail)[:600]}")


def call(*command):
    return subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=900)


def table(*arguments, train=TRAIN, run=RUN):
    return call(sys.executable, SCRIPT, "--threads", 1, "--train", train, "--run", run,
                "--bench", BENCH, *arguments)


def test_counts(folder):
    """The weights that are counted are those that ./run counts."""
    path = os.path.join(folder, "model.bin")
    models = [bench.model_of("T", 2), bench.model_of("T", 1), bench.model_of("S", 4, K=3, E=7),
              bench.model_of("T", 1, outer=False)]
    for model in models:
        r = call(BENCH, "model", path, *model.config())
        check(f"a file of {model}", r.returncode == 0, r)
        lines = call(RUN, path, "-m", "info").stdout.splitlines()
        info = dict(line.split(" ", 1) for line in lines)
        s, (body, head, total) = model.sizes(), bench.counts(model)
        norms = s.L * (2 * s.d + s.R) + s.d
        check(f"parameters of {model}", int(info["total_parameters"]) == total, info)
        check(f"active parameters of {model}",
              int(info["active_parameters"]) == body + head + norms, info)
        check(f"residuals of {model}", (info["inner_residual"], info["outer_residual"]) ==
              (("false", "true") if model.outer else ("true", "false")), info)
        check(f"cache of {model}", int(info["cache_bytes_per_token"]) ==
              bench.token_bytes(model, 1, 4) - bench.token_bytes(model, 0, 4), info)
        pairs = sum(i + 1 for i in range(37))
        check(f"operations of {model}", bench.forward_flops(model, 37, 2) ==
              2 * (37 * body + 2 * head + pairs * s.L * s.H * (s.dn + s.dr + s.dv)))


def test_table(folder):
    """A table with a peer: every line fits, and the columns mean what they say."""
    peer, tsv = os.path.join(folder, "peer.py"), os.path.join(folder, "table.tsv")
    with open(peer, "w") as f:
        f.write(PEER)
    r = table("--only", "limit:,kernel:T:expert:dx,train:T:C2,gradients:T:C2,decode:T:C2:f32",
              "--peer", peer, "--tsv", tsv)
    check("the table ends well", r.returncode == 0, r)
    check("its lines fit 100 columns", max(map(len, r.stdout.splitlines())) <= 100, r.stdout)
    with open(tsv) as f:
        head, *lines = [line.rstrip("\n").split("\t") for line in f]
    rows = {line[0]: dict(zip(head, line)) for line in lines}
    check("its rows", list(rows) == ["limit:fma:1", "limit:read:1", "kernel:T:expert:dx",
                                     "train:T:C2", "gradients:T:C2", "decode:T:C2:f32"], rows)
    check("each has a result", all(float(row["result"]) > 0 for row in rows.values()), rows)
    value = {name: float(row["result"]) for name, row in rows.items()}
    check("without AdamW is faster", value["gradients:T:C2"] > value["train:T:C2"], rows)
    # The peer's step takes 2 s, 1 s of it AdamW.
    for name, rate in (("train:T:C2", 512), ("gradients:T:C2", 1024), ("decode:T:C2:f32", 100)):
        check(f"{name}: the peer's rate", float(rows[name]["PyTorch"]) == rate, rows[name])
        check(f"{name}: the ratio",
              abs(float(rows[name]["ratio"]) / (value[name] / rate) - 1) < 1e-5, rows[name])
    model = bench.model_of("T", 2)
    flops = 3 * bench.forward_flops(model, 128, 128) / 128 * value["train:T:C2"]
    check("the share of the peak", abs(float(rows["train:T:C2"]["of limit"]) /
          (flops / value["limit:fma:1"] / 1e9) - 1) < 1e-4, rows)


def test_faults(folder):
    r = table("--only", "nonsense")
    check("an unknown row", r.returncode == 2 and '"nonsense"' in r.stderr, r)
    r = table("--only", "decode:T:C2:f32,limit:fma", run="/bin/false")
    check("a program that fails", r.returncode == 1 and "decode:T:C2:f32: exit code" in r.stdout and
          "limit:fma:1" in r.stdout, r)
    r = table("--only", "train:T:C2", train=os.path.join(folder, "missing"))
    check("a program that is not there", r.returncode == 1 and "No such file" in r.stdout, r)
    r = table("--only", "train:T:C2", train=RUN)
    check("a program that does not train", r.returncode == 1 and "unknown option" in r.stdout, r)
    r = table("--only", "train:T:C2", "--peer", "missing.py")
    row = next(line for line in r.stdout.splitlines() if line.startswith("train:T:C2"))
    check("a peer that is not there: our figure is", r.returncode == 0 and
          "T:C2 of the peer: " in r.stdout and "tokens/s" in row, r)
    r = table("--only", "threads:T")
    check("one thread", r.returncode == 0 and "one thread only" in r.stdout, r)
    for arguments in (["fma"], ["dx", 1, 2, 3], ["dx", 1, 2, 3, 0, 1], ["int4", 1, 1, 2, 3, 4],
                      ["model", os.path.join(folder, "no/model.bin")],
                      ["model", os.path.join(folder, "x.bin"), "--hidden_size", 0]):
        r = call(BENCH, *arguments)
        check(f"bench {arguments}", r.returncode in (1, 2) and r.stderr.startswith("bench: "), r)


def test_rows(folder):
    """Every kind of row is explained, and every name is there once."""
    for threads in (1, 2):
        names = [row.name for row in bench.rows(threads)]
        check("names are there once", len(set(names)) == len(names), names)
        check("each kind is explained", {name.split(":")[0] for name in names} == set(bench.KINDS),
              names)
    check("the quick rows are there",
          all(any(name.startswith(q) for name in names) for q in bench.QUICK))
    for x, text in ((0.0123, "0.0123"), (9.996, "10.00"), (123.4, "123"), (98765.4, "98,765")):
        check(f"{x} in three digits", bench.number(x) == text, bench.number(x))


def main():
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            with tempfile.TemporaryDirectory() as folder:
                test(folder)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
