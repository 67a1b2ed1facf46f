#!/usr/bin/env python3
"""Checks the scripts in experiments/: statistics against numbers worked out by hand, the grid from
end to end with tiny models, and the page of the viewer in a browser.

    python3 tests/test_experiments.py ./train ./run

The last line is "N passed, N failed, N skipped". Python is enough for most of it; what needs
matplotlib or a Chromium is skipped without.
"""
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
SCRIPTS = os.path.join(ROOT, "experiments")
sys.path.insert(0, SCRIPTS)
sys.path.insert(1, HERE)

import browser
import claims
import routing
import rows
from common import Failure, read_tsv
from tracefile import HEADER, Model, Trace

TRAIN, RUN = (os.path.abspath(x) for x in (sys.argv[1:] or ["train", "run"]))
TINY = """--hidden_size 8 --moe_intermediate_size 4 --num_attention_heads 2 --qk_nope_head_dim 4
--qk_rope_head_dim 4 --v_head_dim 4 --kv_lora_rank 4""".split()
# Documents enough for validation to have some, and characters of several bytes.
TEXT = "".join(f"The {i}th naïve fox → {i * 7}.\nIt jumps.\n<|endoftext|>\n" for i in range(60))

count = {"passed": 0, "failed": 0, "skipped": 0}


def check(what, ok, detail=""):
    count["passed" if ok else "failed"] += 1
    if not ok:
        print(f"FAILED: {what}{': ' if detail != '' else ''}{str(detail)[:600]}")


def equal(what, found, expected):
    check(what, found == expected, f"{found!r}, expected {expected!r}")


def near(what, found, expected):
    check(what, abs(found - expected) < 1e-9, f"{found}, expected {expected}")


def skip(what):
    count["skipped"] += 1
    print(f"skipped: {what}")


def call(*command, code=0):
    """Runs a command that should end with this code; returns its stdout and stderr."""
    done = subprocess.run([str(x) for x in command], stdin=subprocess.DEVNULL, timeout=300,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    out, err = done.stdout.decode(), done.stderr.decode()
    check(f"{' '.join(map(str, command))[:200]} ends with {code}", done.returncode == code,
          f"{done.returncode}: {err[-400:]}")
    return out, err


def script(name, *args, code=0):
    return call(sys.executable, os.path.join(SCRIPTS, name), *args, code=code)


def write(path, content):
    with open(path, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
    return path


# ---- a trace worked out by hand ------------------------------------------------------------------

def padded(data):
    return data + bytes(-len(data) % 64)


def tokenizer(pieces):
    """A tokenizer section as far as decoding needs it: head, where pieces begin, their bytes."""
    first = [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]
    return padded(struct.pack("<16I", len(pieces), first[-1], *[0] * 14)) + \
        padded(struct.pack(f"<{len(first)}I", *first)) + padded(b"".join(pieces))


def write_model(path, kind=1, section=b"", layers=2, E=4, K=2, C=2):
    """The header of a model.bin of version 1 and its tokenizer: what the scripts read of it."""
    slots = [1024 + len(section), 0, len(section), 0, 0, kind, 0] + [0] * 8 + [
        258, 8, 8, 4, layers, 2, 1, E, K, 4, 0, 4, 4, 4, C, 1, 0, 1, 0, 1, 1, 0, 1.0, 1, 1, 0.001,
        1, 1e-6, 1e4, 0, 1.0, 4096, 32.0, 1.0, 1.0, 0.0, 64, 0, 1, 0.02, -1, -1, 0, -1.0, -1, -1.0,
        -1.0, -1.0, 0, 0]
    header = b"COE1\1\0\0\0" + b"".join(
        struct.pack("<d" if isinstance(value, float) else "<q", value) for value in slots)
    return write(path, header.ljust(1024, b"\0") + section)


# Layer 0 is dense. For each token: id, then (expert, weight) by rank in iterations 0 and 1.
CHOICES = [(104, [(0, .5), (1, .25)], [(1, .5), (2, .5)]),
           (105, [(0, .75), (2, .125)], [(2, .5), (1, .25)]),
           (195, [(1, .5), (0, .25)], [(1, .5), (2, .5)]),
           (169, [(0, .25), (3, .25)], [(3, .5), (1, .25)])]


def trace_lines(model, choices=CHOICES):
    """A trace of these choices, as the model of this path would have written it."""
    lines, fingerprint = [HEADER], Model(model).fingerprint
    for position, (token, *chain) in enumerate(choices):
        for c, chosen in enumerate(chain):
            for k, (expert, weight) in enumerate(chosen):
                lines.append("\t".join(map(str, (
                    position, token, 1, c, k, expert, weight, fingerprint))))
    return lines


def rows_of(table):
    return [tuple(map(str, row)) for row in table]


def test_statistics(folder):
    model = write_model(os.path.join(folder, "model.bin"))
    path = write(os.path.join(folder, "trace.tsv"), "\n".join(trace_lines(model)) + "\n")
    trace = Trace(path, Model(model))
    equal("layers that choose", list(trace.experts), [1])
    equal("experts", trace.experts[1][0], [(0, 1), (0, 2), (1, 0), (0, 3)])
    equal("a character of two tokens belongs to the last", trace.labels(), ["h", "i", "", "é"])
    # Loads 4 2 1 1 and 0 4 3 1 of 8: 4/8 1 + 2/8 2 + 2/8 3 bits, and 1/2 + 3/8 log2(8/3) + 3/8.
    equal("load", rows_of(routing.load_table(trace))[1:], [
        ("1", "0", "1.7500000", "0.8750000", "2.0000000", "0", "0", "0.5000000"),
        ("1", "1", "1.4056391", "0.7028195", "2.0000000", "1", "1", "0.5000000")])
    # Each token returns to one of its two; by chance (2 4 + 1 3 + 1 1) / 4^2 / 2.
    equal("returns", rows_of(routing.returns_table(trace))[1:],
          [("1", "0", "1", "0.5000000", "0.3750000", "0.5000000")])
    equal("combinations", rows_of(routing.combinations_table(trace))[1:],
          [("1", "0", "3", "4", "6"), ("1", "1", "2", "4", "6"), ("1", "chain", "3", "4", "36")])
    equal("weights", rows_of(routing.weights_table(trace))[1:], [
        ("1", "0", "0.5000000", "0.2187500", "0.7187500"),
        ("1", "1", "0.5000000", "0.3750000", "0.8750000")])
    equal("pairs", [row[2:] for row in list(routing.pairs_table(trace))[1:]],
          [(0, 1, 4), (0, 2, 3), (1, 1, 2), (1, 2, 2), (0, 3, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1),
           (3, 3, 1)])
    near("all in one expert", routing.entropy([8, 0]), 0)
    near("all even", routing.entropy([2] * 16), 4)
    out, _ = script("routing.py", os.path.join(folder, "model.bin"), path)
    for name, table in routing.TABLES.items():
        check(f"routing.py prints {name}", f"# {name}\n" + "".join(
            "\t".join(row) + "\n" for row in rows_of(table(trace))) in out, out)


def test_faults(folder):
    here = lambda name: os.path.join(folder, name)
    model, lines = Model(write_model(here("model.bin"))), trace_lines(here("model.bin"))

    def bad(what, words, changed):
        path = write(here("bad.tsv"), "".join(line + "\n" for line in changed))
        try:
            Trace(path, model)
        except Failure as e:
            check(f"{what}: the message", path in str(e) and all(w in str(e) for w in words), e)
        else:
            check(f"{what} is found", False)
    line = lambda i, j, value: lines[:i] + ["\t".join(
        value if n == j else x for n, x in enumerate(lines[i].split("\t")))] + lines[i + 1:]
    bad("no header", ["line 1"], lines[1:])
    bad("nothing but a header", ["no expert"], lines[:1])
    bad("a word for a number", ["line 3"], line(2, 5, "x"))
    bad("a number short", ["line 4"], lines[:3] + ["0\t104\t1\t0\t1\t1\t0.5"] + lines[4:])
    bad("another model", ["line 3", "of the model 01234567", model.fingerprint],
        line(2, 7, "01234567"))
    bad("an expert too many", ["line 2", "expert 4"], line(1, 5, "4"))
    bad("a negative expert", ["line 2", "expert -1"], line(1, 5, "-1"))
    bad("a layer too many", ["line 2", "layer 2"], line(1, 2, "2"))
    bad("an iteration too many", ["line 2", "iteration 2"], line(1, 3, "2"))
    bad("a rank left out", ["layer 1, iteration 0", "not complete"], lines[:2] + lines[3:])
    bad("the first rank left out", ["line 2", "rank 1"], lines[:1] + lines[2:])
    bad("a line twice", ["line 4", "rank"], lines[:3] + lines[2:])
    bad("a position left out", ["line 6", "position 2"], lines[:5] + lines[9:])
    bad("another token at a position", ["line 3", "token 7"], line(2, 1, "7"))
    bad("the end missing", ["layer 1, iteration 1", "not complete"], lines[:-1])
    _, err = script("routing.py", here("model.bin"), here("none.tsv"), code=1)
    equal("a missing file", err, f"routing: {here('none.tsv')}: No such file or directory\n")
    _, err = script("viewer.py", write(here("no.bin"), "x" * 2000), here("none.tsv"), code=1)
    check("no model", err.startswith("viewer: ") and "a model.bin starts with COE1" in err, err)


def test_tokenizers(folder):
    here = lambda name: os.path.join(folder, name)
    pieces = [b"The", b" fox", b"", "naï".encode()[:3], "ï".encode()[1:], b"<|end|>"]
    section = tokenizer(pieces)
    bpe = Model(write_model(here("bpe.bin"), 2, section))
    equal("pieces of a tokenizer section", [bpe.piece(i) for i in range(7)], pieces + [b""])
    choices = [(token, *chain) for token, (_, *chain) in zip((0, 1, 3, 4), CHOICES)]
    path = write(here("trace.tsv"), "\n".join(trace_lines(here("bpe.bin"), choices)) + "\n")
    equal("their text", Trace(path, bpe).labels(), ["The", " fox", "na", "ï"])
    lines = trace_lines(write_model(here("bytes.bin")), CHOICES[:3])
    cut = write(here("cut.tsv"), "\n".join(lines) + "\n")
    equal("half a character at the end", Trace(cut, Model(here("bytes.bin"))).labels(),
          ["h", "i", "\ufffd"])
    path = write(here("ids.tsv"), "\n".join(trace_lines(write_model(here("none.bin"), 0), choices))
                 + "\n")
    equal("no tokenizer", Trace(path, Model(here("none.bin"))).labels(),
          ["0 ", "1 ", "3 ", "4 "])
    for what, kind, wrong in (("cut off", 2, section[:60]), ("too short", 2, section[:128]),
                              ("descending", 2, section[:64] + b"\xff" * 4 + section[68:]),
                              ("unknown", 3, b"")):
        try:
            Model(write_model(here("wrong.bin"), kind, wrong))
            check(f"tokenizer {what} is found", False)
        except Failure as e:
            check(f"tokenizer {what}: the message", "tokenizer" in str(e), e)


# ---- the grid ------------------------------------------------------------------------------------

def test_claims(folder):
    spread, freedom = claims.pooled([[1, 3], [2, 2, 5], [9]])
    near("pooled spread: 2 + 6 over 1 + 2 + 0", spread, (8 / 3) ** 0.5)
    equal("its degrees of freedom", freedom, 3)
    d, half = claims.difference([1, 3], [2, 2, 5], spread, freedom)
    near("difference", d, -1)
    near("interval", half, 3.182 * (8 / 3) ** 0.5 * (1 / 2 + 1 / 3) ** 0.5)
    d, half = claims.paired([(1, 2), (5, 9), (2, 6)])
    near("difference of pairs", d, -3)
    near("its interval: s² is (2² + 1 + 1) / 2", half, 4.303 * 3 ** 0.5 / 3 ** 0.5)
    equal("one pair decides nothing", claims.paired([(1, 2)]), (-1, math.inf))
    check("one seed decides nothing", claims.verdict(*claims.difference(
        [1], [2], *claims.pooled([[1], [2]])), 0) == "not decidable at this scale")
    for d, limit, expected in ((-3, 0, "confirmed"), (-1, 0, "not decidable at this scale"),
                               (3, 0, "not confirmed"), (-1, 2, "confirmed"),
                               (5, 2, "not confirmed")):
        equal(f"verdict on {d} ± 2 against {limit}", claims.verdict(d, 2, limit), expected)
    curve = [(10, 4.0), (100, 2.0), (1000, 1.5)]
    for step, expected in ((10, 4), (1000 ** 0.5, 3), (100, 2), (1000, 1.5)):
        near(f"loss at {step}", claims.loss_at(curve, step), expected)
    equal("loss before the first validation", claims.loss_at(curve, 9), None)
    equal("loss after the last", claims.loss_at(curve, 1001), None)
    names = {row.name: row.paper for row in rows.ROWS}
    for claim in rows.CLAIMS:
        a, b = names[claim.better], names[claim.other]
        check(f"the paper's numbers support: {claim.text}", a - b <= claim.margin * b, (a, b))


def test_sizes(folder):
    """Parameters as ./run counts them, for every row."""
    text = write(os.path.join(folder, "text"), TEXT)
    model = os.path.join(folder, "model.bin")
    extra = {name[2:]: int(value) for name, value in zip(TINY[::2], TINY[1::2])}
    for row in rows.ROWS:
        options = rows.options_of(row, rows.PRESETS["quick"], extra)
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        call(TRAIN, *words, "-d", text, "-x", 1, "-b", 1, "-l", 8, "-o", model)
        info = dict(line.split(" ", 1) for line in call(RUN, model, "-m", "info")[0].splitlines())
        equal(f"{row.name}: parameters", rows.sizes(options),
              (int(info["total_parameters"]), int(info["active_parameters"])))


def test_grid(folder):
    here = lambda name: os.path.join(folder, name)
    text = write(here("fox.txt"), TEXT)

    def grid(logs, *args, steps=10, code=0):
        command = ["grid.py", "--quick", "--data", text, "--steps", steps, "--results",
                   here(logs + "-results"), "--logs", here(logs), *args, "--", *TINY,
                   "--batch_size", 2, "--max_length", 16]
        return script(*command, code=code)
    some = ["--only", "moe-k8", "coe-k4c2", "moe-k8-2layers", "--seeds", "2"]
    out, err = grid("a", *some)
    check("six runs", err.count("val_loss") == 6 and "[6/6]" in err, err)
    check("it prints the tables", "| MoE K=8 | 1.196 |" in out and "A beats B" in out, out)
    runs = read_tsv(here("a-results/quick-fox.tsv"))
    curves = read_tsv(here("a-results/quick-fox-curves.tsv"))
    equal("lines of the runs", [(r["row"], r["seed"]) for r in runs],
          [(row, seed) for row in some[1:4] for seed in "12"])
    equal("validations", len(curves), 6 * 5)
    for run in runs:
        last = [c for c in curves if (c["row"], c["seed"]) == (run["row"], run["seed"])][-1]
        check(f"{run['row']}: the last validation is the result",
              last["step"] == "10" and float(last["val_loss"]) == float(run["val_loss"]), last)
        check(f"{run['row']}: memory and speed", float(run["peak_bytes"]) > 1e6 and
              float(run["tokens_per_s"]) > 0, run)
        equal(f"{run['row']}: nothing to solve in a text", run["solved"], "")
    with open(here("a-results/quick-fox.md"), encoding="utf-8") as f:
        equal("the Markdown file is what was printed", f.read(), out)
    equal("claims.py prints it, too", script("claims.py", here("a-results/quick-fox"))[0], out)
    short = script("claims.py", "--short", here("a-results/quick-fox"))[0].splitlines()
    equal("--short: the claims whose rows are there", len(short), 2 + 1)
    again, err = grid("a", *some)
    check("a second time nothing is trained", again == out and "val_loss" not in err, err)
    _, err = grid("a", *some, steps=11)
    check("other settings, other runs", err.count("val_loss") == 6, err)
    listed = grid("a", "--list")[0].splitlines()
    equal("--list names all rows", len(listed), 1 + len(rows.ROWS))
    dry = grid("a", "--dry-run", *some, steps=12)[0]
    equal("--dry-run shows the commands", dry.count("--max_steps 12 "), 6)

    # Interrupted in the middle of the second run, and started again: the same numbers.
    command = [sys.executable, os.path.join(SCRIPTS, "grid.py"), "--quick", "--data", text,
               "--steps", "500", *some[:3], "--seeds", "1", "--logs", here("b"), "--results",
               here("b-results"), "--", *TINY, "--batch_size", "2", "--max_length", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = here("b/quick-fox/coe-k4c2-s1.log")
    deadline = time.monotonic() + 300                   # of a machine that has other things to do
    while process.poll() is None and time.monotonic() < deadline and not (
            os.path.exists(log) and os.path.getsize(log) > 3000):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    check("interrupted", process.returncode == 130 and b"goes on" in err, err[-300:])
    with open(log, encoding="utf-8") as f:
        done = f.readlines()
    check("in the middle", 1 < len(done) < 501, len(done))
    _, err = call(*command)
    check("only the second run was left", err.count("val_loss") == 1, err)
    equal("its log has no gap", [int(line["step"]) for line in read_tsv(log)], list(range(500)))
    with open(log, encoding="utf-8") as f:              # speeds and all, which are never the same
        equal("it went on, and did not begin again", f.readlines()[:len(done)], done)
    command[command.index("--logs") + 1] = here("c")
    command.remove("moe-k8")
    call(*command)

    def losses(logs):
        with open(here(logs + "/quick-fox/coe-k4c2-s1.json"), encoding="utf-8") as f:
            return json.load(f)["curve"]
    equal("interrupted or not: the same losses", losses("b"), losses("c"))

    for what, words, args in (("an unknown row", "moe-k9", ["--only", "moe-k9"]),
                              ("no steps", "--steps", ["--steps", "0"])):
        check(what, words in script("grid.py", *args, code=2)[1])
    _, err = script("grid.py", "--", "--hidden_size", code=1)
    check("half an option", err.startswith("grid: --hidden_size"), err)
    _, err = script("grid.py", "--logs", here("d"), "--results", here("d"), "--quick", "--only",
                    "moe-k8", "--", "--hidden_size", "-1", code=1)
    check("./train's own words on what is wrong", "hidden_size" in err and "moe-k8" in err, err)


# ---- figures -------------------------------------------------------------------------------------

def test_rank(folder):
    """Every part is left out once, and the ranking is by what run itself says."""
    here = lambda name: os.path.join(folder, name)
    text = write(here("text"), TEXT[:600])
    call(TRAIN, *TINY, "--num_hidden_layers", 2, "--first_k_dense_replace", 1, "--n_routed_experts",
         3, "-d", write(here("data"), TEXT), "-x", 3, "-b", 2, "-l", 16, "-o", here("m.bin"))
    out, _ = script("rank.py", here("m.bin"), text, "--", "-c", 16)
    head, *rows = [line.split("\t") for line in out.splitlines()]
    equal("columns", head, ["damage", "nll", "kind", "silence"])
    kinds = [row[2] for row in rows]
    equal("every part once", {k: kinds.count(k) for k in kinds},
          {"layer": 1, "iteration": 2, "shared": 2, "expert": 6, "head": 4})
    damage = [float(row[0]) for row in rows]
    equal("the worst first", damage, sorted(damage, reverse=True))
    for row in rows[:3]:
        found, _ = call(RUN, here("m.bin"), "-m", "eval", "-f", text, "-c", 16, "--silence", row[3])
        values = dict(line.split() for line in found.splitlines())
        check("as run says", abs(float(values["nll"]) - float(row[1])) < 1e-5 and abs(
            float(values["nll"]) - float(values["nll_untouched"]) - float(row[0])) < 2e-5, (row, values))
    script("rank.py", here("m.bin"), here("nothing"), code=1)


def test_edits(folder):
    """Equations are judged by arithmetic, and rows are as run says."""
    import edits
    equal("equations", list(edits.equations("1 + 2 = 3\n7 - 5 = 3\n3 * 4 = 12\n12 / 5 = 2\n8 / 2 = 4")),
          [("+", True), ("-", False), ("*", True), ("/", False), ("/", True)])
    equal("answers", [edits.answer(x) for x in ("a\n#### 12\n", "#### 12", "### 1", "x #### 1\n")],
          ["12", "12", None, None])
    here = lambda name: os.path.join(folder, name)
    problems, _ = call(TRAIN, "--show_val", 3)
    text = write(here("problems"), problems)
    call(TRAIN, *TINY, "-x", 2, "--eval_problems", 0, "-o", here("m.bin"))
    out, _ = script("edits.py", here("m.bin"), text, "--", "", "--silence all")
    head, rule, *rows = [[x.strip() for x in line.strip("|").split("|")] for line in out.splitlines()]
    equal("columns", head[:3], ["what is changed", "nll", "solved"])
    equal("rows", [row[0] for row in rows], ["nothing", "`--silence all`"])
    check("of three problems", all(row[2].endswith(" of 3") for row in rows), rows)
    found, _ = call(RUN, here("m.bin"), "-m", "eval", "-f", text, "-c", "192",
                    "--completion_only_loss", "true", "--silence", "all")
    check("nll", abs(float(dict(line.split() for line in found.splitlines())["nll"])
                     - float(rows[1][1])) < 1e-4, rows)
    script("edits.py", here("m.bin"), write(here("none"), "nothing"), code=1)


def test_figures(folder):
    try:
        import matplotlib                                               # noqa: F401
    except ImportError:
        return skip("figures, without matplotlib")
    here = lambda name: os.path.join(folder, name)
    model = write_model(here("model.bin"))
    trace = write(here("trace.tsv"), "\n".join(trace_lines(model)) + "\n")
    text = write(here("text"), TEXT)
    call(TRAIN, *TINY, "-d", text, "-x", 30, "-b", 2, "-l", 16, "--eval_steps", 10, "-o",
         here("m.bin"), "--log", here("log.tsv"))
    script("grid.py", "--quick", "--data", text, "--steps", 4, "--only", "moe-k8", "coe-k4c2",
           "--results", here("r"), "--logs", here("l"), "--", *TINY, "--batch_size", 2,
           "--max_length", 16)
    names = ["routing-load", "routing-pairs", "routing-returns", "routing-weights", "front",
             "chain", "grid-curves", "grid-rows"]
    files = []
    for _ in range(2):
        script("routing.py", model, trace, "--figures", here("f/routing"))
        script("figures.py", "front", here("r/quick-text"), 32, here("log.tsv"), here("f/front"))
        script("figures.py", "chain", model, trace, here("f/chain"))
        script("figures.py", "grid", here("r/quick-text"), here("f/grid"))
        files.append({})
        for name in os.listdir(here("f")):
            with open(here("f/" + name), "rb") as f:
                files[-1][name] = f.read()
    equal("figures", sorted(files[0]), sorted(n + ".png" for n in names))
    equal("drawn again, the same bytes", [n for n in files[0] if files[0][n] != files[1][n]], [])
    check("PNG", all(x.startswith(b"\x89PNG") for x in files[0].values()))


# ---- the viewer ----------------------------------------------------------------------------------

CHAIN = "[...document.querySelectorAll('.chip b')].map(x => +x.textContent)"
READINGS = "readings.map(r => [...r.text.querySelectorAll('mark')].map(x => +x.dataset.t))"
READOUT = "document.getElementById('readout').textContent"


def test_viewer(folder):
    path = browser.find()
    if not path:
        return skip("the viewer, without a Chromium")
    here = lambda name: os.path.join(folder, name)
    text = write(here("text"), TEXT * 2)
    call(TRAIN, *TINY, "--num_hidden_layers", 3, "--first_k_dense_replace", 1, "-d", text, "-x", 3,
         "-b", 2, "-l", 16, "--max_position_embeddings", 4096, "-o", here("model.bin"))
    call(RUN, here("model.bin"), "-m", "eval", "-f", text, "--trace", here("trace.tsv"))
    script("viewer.py", here("model.bin"), here("trace.tsv"), "-o", here("page.html"))
    trace = Trace(here("trace.tsv"), Model(here("model.bin")))
    check("2,000 tokens and more", len(trace.tokens) > 2000, len(trace.tokens))
    try:
        b = browser.Browser(path, folder, 1280, 800)
    except (RuntimeError, OSError, StopIteration) as e:
        return skip(f"the viewer: {path}: {e}")
    with b:
        b.open(here("page.html"))
        look_at_page(b, trace)
        use_keyboard(b, trace)
        use_mouse(b, trace)
        compare_iterations(b, trace)
        come_back(b, here("page.html"))
        call(RUN, here("model.bin"), "-m", "lens", "-f", text, "--lens", here("lens.tsv"))
        script("viewer.py", here("model.bin"), here("trace.tsv"), "--lens", here("lens.tsv"), "-o",
               here("lens-page.html"))
        b.open(here("lens-page.html"))
        look_at_lens(b, trace, read_tsv(here("lens.tsv")))
        equal("the page complains about nothing", b.errors, [])
        equal("nothing comes from elsewhere", [u for u in b.requests if "page.html" not in u], [])


def look_at_lens(b, trace, rows):
    """The page opens at the token whose prediction changes most, and says what the lens says."""
    where = {(int(r["layer"]), int(r["iterations"]), int(r["position"])): r for r in rows}
    last, C, T = max(trace.experts), trace.model.iterations, len(trace.tokens)
    next_of = lambda c, t: float(where[last, c, t]["p_next"])
    change = [max(abs(next_of(c + 1, t) - next_of(c, t)) for c in range(C)) for t in range(T - 1)]
    t = b.js("state.token")
    check("opens where the prediction changes most", change[t] > max(change) - 1e-6, (t, change[t]))
    said = b.js("[...document.querySelectorAll('.call .said')].map(x => x.textContent)")
    wanted = []
    for l in trace.experts:
        for c in range(1, C + 1):
            row = where[l, c, t]
            percent = float(row["p_guess"]) * 100
            wanted.append((f"{percent:.0f} %", row["other_choice"] == "1"))
    equal("what it says after each iteration", [(x.removesuffix(" !").split("” ")[-1].split("> ")[-1],
                                                 x.endswith(" !")) for x in said], wanted)
    early = b.js("[...document.querySelectorAll('h3 .said')].map(x => x.textContent)")
    equal("and before the first", len(early), len(trace.experts))
    loss = b.js("document.querySelector('.token span').textContent").split("loss ")[-1]
    check("the loss", abs(float(loss) - float(where[last, C, t]["loss"])) < 0.006, loss)


def chain_of(trace, t):
    return [e for chains in trace.experts.values() for call in chains for e in call[t]]


def look_at_page(b, trace):
    summary = b.js("document.getElementById('summary').textContent")
    check("summary", f"{len(trace.tokens):,} tokens; 2 layers of experts, each with 2 iterations"
          in summary and "2 of 8 experts" in summary, summary)
    equal("the chain of the first token", b.js(CHAIN), chain_of(trace, 0))
    equal("layers have the model's numbers", b.js(
        "[...document.querySelectorAll('.layer h3')].map(x => x.textContent)"),
        ["layer 1", "layer 2"])
    equal("the text is whole", b.js("readings[0].text.textContent.replace(/[↵‥]/g, '')"),
          "".join(trace.labels()).replace("<|endoftext|>", "◆"))
    check("as many elements for 2,000 tokens as for a few, but for the marks", b.js(
        "document.querySelectorAll('*:not(mark)').length") < 400)
    check("the canvas is no larger than the window", b.js("canvas.width < 1300"))


def use_keyboard(b, trace):
    for _ in range(30):                     # the chart is reached by tabbing
        if b.js("document.activeElement.id") == "roll":
            break
        b.key("Tab")
    equal("Tab reaches the chart", b.js("document.activeElement.id"), "roll")
    for key, shift, token in (("ArrowRight", 0, 1), ("ArrowRight", 1, 11), ("ArrowLeft", 0, 10),
                              ("End", 0, len(trace.tokens) - 1), ("ArrowRight", 0,
                              len(trace.tokens) - 1), ("Home", 0, 0), ("PageDown", 0, 50)):
        b.key(key, shift)
        equal(f"{key} to token {token}", b.js(CHAIN), chain_of(trace, token))
        check(f"token {token} is in sight", b.js(
            "left[state.token] >= roll.scrollLeft && left[state.token] < roll.scrollLeft + 1000"))
    for _ in range(4):                      # along the chain: layer 1, iteration 1, rank 1
        b.key("ArrowDown")
    expert, weight = trace.experts[1][1][50][1], trace.weights[1][1][50][1]
    check("the place in the chain is read out", f"layer 1, iteration 1: expert {expert}, weight "
          f"{weight:#.3g}, rank 1" in b.js(READOUT), b.js(READOUT))
    equal("and marked", b.js("chips.findIndex(x => x.classList.contains('cursor'))"), 3)
    b.key("Enter")
    equal("Enter shows the expert", b.js("[+$('expert-l').value, +$('expert-e').value]"),
          [0, expert])
    equal("what it reads in each iteration", b.js(READINGS), [
        [t for t, x in enumerate(call) if expert in x] for call in trace.experts[1]])
    b.key("Escape")
    b.key("Escape")
    equal("Escape lets go", b.js("[$('expert-e').value, state.step, state.e]"), ["", -1, -1])


def use_mouse(b, trace):
    """Points are computed where the page says that it has drawn things."""
    def place(t, l, c, e):
        return b.js("(() => { const r = canvas.getBoundingClientRect(); return ["
                    f"r.left + GUTTER + (left[{t}] + left[{t + 1}]) / 2 - roll.scrollLeft,"
                    f"r.top + bandTop({l}, {c}) + ({e} + 0.5) * lane - roll.scrollTop]; }})()")
    b.key("Home")
    t, (first, _) = 20, trace.experts[2][0][20]
    x, y = place(t, 1, 0, first)
    b.mouse(x, y, click=False)
    equal("pointing shows a chain", b.js(CHAIN), chain_of(trace, t))
    check("and says what is there", f"token {t} " in b.js(READOUT) and
          f"layer 2, iteration 0: expert {first}, weight" in b.js(READOUT), b.js(READOUT))
    colour = b.js(f"[...pen.getImageData({x} - canvas.getBoundingClientRect().left, "
                  f"{y} - canvas.getBoundingClientRect().top, 1, 1).data].slice(0, 3)")
    check("the mark is blue", colour[2] > colour[0] + 40, colour)
    b.mouse(5, 5, click=False)
    equal("away from it, the chosen one", b.js(CHAIN), chain_of(trace, 0))
    b.mouse(x, y)
    equal("a click chooses token and expert", b.js("[state.token, state.l, state.e]"),
          [t, 1, first])
    equal("what it reads", b.js(READINGS), [
        [t for t, x in enumerate(call) if first in x] for call in trace.experts[2]])
    b.click(".layer:nth-of-type(3) .call:nth-of-type(2) .chip:nth-of-type(1)")
    equal("a chip of the chain is a button", b.js("[state.l, state.e]"),
          [0, trace.experts[1][1][t][0]])
    there = b.js(READINGS + "[0][0]")
    b.click(".reading mark")
    equal("a mark in the text leads to its token", b.js("state.token"), there)


def compare_iterations(b, trace):
    chains, tokens = trace.experts[2], len(trace.tokens)
    for name, value in (("first", 2), ("second", 3)):       # layer 2 is number 1: calls 2 and 3
        b.js(f"$('{name}').value = {value}, $('{name}').dispatchEvent(new Event('change'))")
    note = b.js("$('compare-note').textContent")
    for what, share in (("returns", routing.returns(*chains)),
                        ("by chance", routing.returns_by_chance(*chains, 8))):
        check(f"share of {what}", f"{100 * share:.1f} %" in note, f"{share}, {note}")
    pairs = routing.pairs(*chains)
    most = max(pairs.values())
    pair = b.js("$('pair').textContent")
    check("the most frequent pair", f": {most:,} tokens" in pair, f"{most}: {pair}")
    b.js("$('matrix').focus(), state.row = 3, state.column = 4, 0")
    b.key("ArrowDown")
    b.key("ArrowRight")
    n = pairs[4, 5]
    check("arrow keys move in the matrix", b.js("$('pair').textContent").startswith(
        f"expert 4, then 5: {n:,} token"), b.js("$('pair').textContent"))
    loads = routing.counts(chains[1], 8)
    equal("loads", b.js("loads.map(x => x.children[2].children[1].textContent)"),
          [f"{100 * n / tokens:.1f}" for n in loads])


def come_back(b, path):
    address = "#token=77&l=1&e=6&first=1&second=3&show=1"
    b.open(path, address)
    shown = "[state.token, state.l, state.e, state.first, state.second, state.show, shown().length]"
    equal("a link brings back what it names", b.js(shown), [77, 1, 6, 1, 3, 1, 1])
    b.open(path, "#token=99999&l=-2&e=x&first=1.5&second=&show=7")
    equal("nonsense in a link is left aside", b.js(shown), [0, 0, b.js("experts[0]"), 0, 1, -1, 2])
    paper = "getComputedStyle(document.body).backgroundColor"
    light = b.js(paper)
    b.dark(True)
    check("dark where the system is", b.js(paper) != light and
          b.js("colours.paper") == b.js("getComputedStyle(document.documentElement)"
                                        ".getPropertyValue('--paper').trim()"))


def main():
    os.makedirs(os.path.join(ROOT, "build"), exist_ok=True)
    tests = [value for name, value in globals().items() if name.startswith("test_")]
    for test in tests:
        start = time.monotonic()
        # Not in /tmp, which a browser that comes as a snap cannot see.
        with tempfile.TemporaryDirectory(dir=os.path.join(ROOT, "build"),
                                         ignore_cleanup_errors=True) as folder:
            try:
                test(folder)
            except Exception as e:                      # go on with the next test
                check(test.__name__, False, repr(e))
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s")
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**count))
    sys.exit(count["failed"] > 0)


if __name__ == "__main__":
    main()
