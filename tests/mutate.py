#!/usr/bin/env python3
"""Breaks the C code on purpose, one place at a time, and counts how often the tests notice.

    python3 tests/mutate.py --seed 1 --count 30     prints a line for each mutant, then the share
    python3 tests/mutate.py --times                 how long each test takes with nothing broken
    python3 tests/mutate.py --seed 1 --list         what would be broken, without trying it

A mutant is a copy of the tree with one small mistake in coe.c, train.c, run.c or lib/: a sign, a
bound, a constant, an operator, a condition, a name taken for a similar one, or a statement or a
term left out. A line of code is drawn, then a kind of mistake that it can have. Comments, texts
and preprocessor lines stay. What does not compile, or compiles to the same instructions as before,
is drawn again. --jobs mutants are tried at a time, in build/mutants/; the tree itself is not
touched.

The tests are those of `make test`. Programs are compiled at -O1, which takes half the time; a test
whose programs are the same as without the mistake is not run; and the first one that fails, or does
not end, is the last one. All mutants see the fast tests first, then those that are left the others,
and are printed when that is decided. Python packages are those of build/venv, or of
build/mutants/venv, which is made where they are missing.
"""
import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import queue
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "build", "mutants")
PACKAGES = "numpy", "safetensors", "ml_dtypes", "jinja2"

CC = os.environ.get("CC", "cc")
WARN = "-w -fno-math-errno"
SERIAL = f"{CC} {WARN} -O1 -march=native"
BUILD = SERIAL + " -fopenmp"
# Without -g, so that equal programs are equal files.
SANITIZE = f"{CC} {WARN} -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fopenmp"


# ---- what is compiled and run --------------------------------------------------------------------

PROGRAMS = {                        # output: compiler, sources
    "run": (BUILD, "run.c"),
    "train": (BUILD, "train.c"),
    "build/test_ops": (BUILD, "tests/test_ops.c tests/plain_ops.c"),
    "build/test_ops_double": (BUILD + " -O2 -DREAL=double", "tests/test_ops.c tests/plain_ops.c"),
    "build/test_ops_debug": (SANITIZE, "tests/test_ops.c tests/plain_ops.c"),
    "build/test_model": (BUILD, "tests/test_model.c"),
    "build/test_model_double": (BUILD + " -DREAL=double", "tests/test_model.c"),
    "build/test_model_debug": (SANITIZE + " -DREAL=double", "tests/test_model.c"),
    "build/test_grad": (BUILD, "tests/test_grad.c"),
    "build/dump_grads": (BUILD, "tests/dump_grads.c"),
    "build/train-serial": (SERIAL, "train.c"),
    "build/bench": (BUILD, "tests/bench.c"),
}
# What says whether a mutant computes what the programs did before.
COMPARED = "run", "train", "build/test_ops"

# (name, command, programs), in this order. PYTHON has the packages, TORCH has PyTorch, too.
TEST_TRAIN = ("python3 tests/test_train.py ./train build/train-serial",
              "train run build/train-serial")
FAST = [
    ("test_model", "build/test_model", "build/test_model"),
    ("test_golden.py", "python3 tests/test_golden.py ./train build/dump_grads",
     "train build/dump_grads"),
    ("test_task.py", "python3 tests/test_task.py ./train", "train"),
    ("test_grad", "build/test_grad", "build/test_grad"),
    ("test_ops", "build/test_ops", "build/test_ops"),
    ("test_run.py", "python3 tests/test_run.py ./run", "run"),
    ("test_train.py: data", "env ONLY='test_text test_order test_completions test_packing "
     f"test_windows test_bpe test_data_faults test_usage test_log' {TEST_TRAIN[0]}", TEST_TRAIN[1]),
    ("test_train.py: steps", "env ONLY='test_prenorm test_bias_update test_threads test_best "
     f"test_micro_batches test_damaged_state test_profile' {TEST_TRAIN[0]}", TEST_TRAIN[1]),
    ("test_tokenizer.py", "PYTHON tests/test_tokenizer.py ./run", "run"),
]
SLOW = [
    ("test_train.py", *TEST_TRAIN),
    ("test_files.py", "python3 tests/test_files.py ./train ./run", "train run"),
    ("test_failing.py", "python3 tests/test_failing.py ./train ./run", "train run"),
    ("test_experiments.py", "PYTHON tests/test_experiments.py ./train ./run", "train run"),
    ("test_model_debug", "build/test_model_debug 5", "build/test_model_debug"),
    ("test_bench.py", "python3 tests/test_bench.py ./train ./run build/bench",
     "train run build/bench"),
    ("test_lens.py", "TORCH tests/test_lens.py ./run 'PYTHON export.py' 12", "run"),
    ("oracle.py", "TORCH tests/oracle.py compare --train ./train --run ./run --export "
     "'PYTHON export.py' --dump_grads build/dump_grads --configs 4 --seed 1",
     "train run build/dump_grads"),
    ("test_ops_double", "build/test_ops_double", "build/test_ops_double"),
    ("test_model_double", "build/test_model_double", "build/test_model_double"),
    ("test_export.py", "PYTHON tests/test_export.py", "train run"),
    ("test_ops_debug", "build/test_ops_debug", "build/test_ops_debug"),
    ("test_docs.py", "PYTHON tests/test_docs.py", "train run"),
]
TESTS = FAST + SLOW
# Which tests are asked first about a file: those that know it best.
RUN, DATA, STEPS = "test_run.py", "test_train.py: data", "test_train.py: steps"
FIRST = {
    "run.c": [RUN], "lib/chat.h": [RUN], "lib/config.h": [RUN], "lib/edits.h": [RUN],
    "lib/info.h": [RUN], "lib/lens.h": [RUN], "lib/modelfile.h": [RUN], "lib/one_token.h": [RUN],
    "lib/text.h": [RUN], "lib/trace.h": [RUN], "lib/tokenizer.h": [RUN, "test_tokenizer.py"],
    "lib/settings.h": [RUN, DATA], "lib/data.h": [DATA], "lib/documents.h": [DATA],
    "lib/samples.h": [DATA], "lib/setup.h": [DATA, STEPS], "lib/checkpoint.h": [STEPS],
    "lib/recipe.h": [DATA], "lib/output.h": [DATA], "lib/task.h": ["test_task.py"],
    "lib/base.h": ["test_ops"], "lib/candidates.h": ["test_ops"], "lib/kernels.h": ["test_ops"],
}


def check_tests():
    """Says which test programs of run_all.py are missing in the lists above."""
    with open(os.path.join(ROOT, "tests", "run_all.py")) as f:
        named = set(re.findall(r"\btest_\w+", f.read()))
    known = {name.split(":")[0].removesuffix(".py") for name, _, _ in TESTS}
    missing = [name for name in sorted(named - known) if any(
        os.path.exists(os.path.join(ROOT, "tests", name + end)) for end in (".c", ".py"))]
    if missing:
        print(f"run_all.py also has {', '.join(missing)}, which are not run here", file=sys.stderr)


# ---- mistakes ------------------------------------------------------------------------------------

TOKEN = re.compile(r"""
    (?P<skip>//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'
        |(?<![^\n])[ \t]*\#(?:[^\n\\]|\\.|\\\n)*)
    |(?P<number>(?:0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)[uUlLfF]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<op><<=|>>=|->|\+\+|--|<<|>>|[-+*/%&|^<>=!]=|&&|\|\||[^\s\w])
""", re.S | re.X)
OPERATORS = {"+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "%": ["/"], "+=": ["-=", "="],
             "-=": ["+=", "="], "*=": ["/=", "="], "/=": ["*="], "<": ["<=", ">"], "<=": ["<"],
             ">": [">=", "<"], ">=": [">"], "==": ["!="], "!=": ["=="], "&&": ["||"], "||": ["&&"],
             "<<": [">>"], ">>": ["<<"], "|": ["&"], "&": ["|"], "^": ["|"], "|=": ["&="]}
SIMILAR = [group.split() for group in """
    i j k|t e|t i|rows cols|E K|dn dr dv|R r|d f|H L|first last|start end|begin end|cos sin
    min_size max_size|cosine sine|fmin fmax|floor ceil|gate_proj up_proj|up_proj down_proj|q k|k v
    q_nope q_rope|k_nope k_rope|g u|x y|a b|low high|lo hi|from to|T n|B n|n count|SOFTMAX SIGMOID
    KEEP KEEP_FFN|GREEDY NOAUX_TC|true false|isfinite isnan|beta_fast beta_slow|top_p min_p
    queries keys|before after|best second|score weight|norm final|offset bytes|length bytes
    size used|logits probs|row col|matmul_nn matmul_nt|mid out|beta1 beta2|m v|lr_min lr_max
    position index|expert token|slot token|rope_scaling_mscale rope_scaling_mscale_all
    intermediate_size moe_intermediate_size|n_group topk_group""".replace("\n", "|").split("|")]
# What has no statement to leave out; and memory that is not given back changes no result.
NO_STATEMENT = set("""free release return if for while do else switch case default goto break
    continue typedef static struct enum const sizeof""".split())
ASSIGNS = "(", "[", "=", "+=", "-=", "*=", "/=", "|=", ".", "->", "++", "--"
SPACED = set("+-*/%<>&|^=") | {"<<", ">>"}


def tokens_of(text):
    """[(kind, token, position)] of the code, without what is skipped."""
    return [(m.lastgroup, m[0], m.start()) for m in TOKEN.finditer(text) if m.lastgroup != "skip"]


def matching(tokens, at, step=1):
    """The index of the bracket that closes, or with step -1 opens, the one at this index."""
    depth = 0
    while 0 <= at < len(tokens):
        token = tokens[at][1]
        depth += (token in "([{") - (token in ")]}")
        if depth == 0:
            return at
        at += step
    return None


def end_of_term(tokens, at):
    """The index after the product that starts at tokens[at], or None."""
    while True:
        while at < len(tokens) and tokens[at][1] in ("-", "!", "~", "*", "&"):
            at += 1
        if at >= len(tokens) or not (tokens[at][0] in ("name", "number") or tokens[at][1] == "("):
            return None
        cast = tokens[at][1] == "("
        at = (matching(tokens, at) if cast else at) or len(tokens)
        at += 1
        if cast and at < len(tokens) and tokens[at][0] in ("name", "number"):
            continue                    # (type)number
        while at < len(tokens) and tokens[at][1] in ("(", "[", ".", "->"):
            if tokens[at][1] in "([":
                at = (matching(tokens, at) or len(tokens)) + 1
            else:
                at += 2
        if at < len(tokens) and tokens[at][1] in ("*", "/", "%"):
            at += 1
            continue
        return at


def mistakes(text):
    """All mistakes that this program text can have: [(line, kind, position, old, new)]. Not among
    them are a wrong amount of work for SHARED and TASKS, by which they choose how many threads to
    use, and too large an array: no result depends on these."""
    tokens, found, amount_until = tokens_of(text), [], 0
    line_of = lambda position: text.count("\n", 0, position) + 1

    def add(kind, position, old, new):
        found.append((line_of(position), kind, position, old, new))
    for n, (kind, token, at) in enumerate(tokens):
        before = tokens[n - 1] if n else ("", "", 0)
        after = tokens[n + 1] if n + 1 < len(tokens) else ("", "", len(text))
        if kind == "name" and token in ("SHARED", "TASKS") and after[1] == "(":
            work = n + 1
            while tokens[work][1] != ",":
                work += 1
            amount_until = tokens[work][2]
        if at < amount_until:
            continue
        spaced = text[at - 1:at].isspace() and text[at + len(token):at + len(token) + 1].isspace()
        if kind == "op" and token in OPERATORS and (spaced or token not in SPACED):
            for new in OPERATORS[token]:
                add("operator", at, token, new)
            if token in "+-" and (end := end_of_term(tokens, n + 1)):
                stop = tokens[end - 1][2] + len(tokens[end - 1][1])
                add("term", at, text[at:stop], "")
        elif token == "!":
            add("condition", at, token, "")
        elif kind == "number" and before[1] != "[":
            whole = re.fullmatch(r"(\d+)([uUlL]*)", token)
            if whole and not (token.startswith("0") and len(token) > 1):
                for new in sorted({int(whole[1]) + 1, int(whole[1]) - 1} - {-1}):
                    add("constant", at, token, f"{new}{whole[2]}")
            else:
                add("constant", at, token, f"(2 * {token})")
        elif kind == "name":
            if before[0] != "name" or before[1] in ("return", "else", "case"):
                for group in SIMILAR:
                    if token in group:
                        for new in sorted(set(group) - {token}):
                            add("name", at, token, new)
                index = before[1] == "[" and after[1] == "]" and tokens[n - 3][0] != "name"
                bound = before[1] in ("<", "<=", ">", ">=") and after[1] in (";", "&&", ")", "||")
                if index or bound:
                    add("bound", at, token, f"{token} + 1")
                    add("bound", at, token, f"{token} - 1")
            if token in ("if", "while") and after[1] == "(" and (close := matching(tokens, n + 1)):
                stop = tokens[close][2]
                add("condition", after[2] + 1, text[after[2] + 1:stop],
                    f"!({text[after[2] + 1:stop]})")
            elif token == "continue":
                add("condition", at, token, "break")
            elif before[1] in (";", "{", "}", ")", "else") and token not in NO_STATEMENT and \
                    after[1] in ASSIGNS:
                end, depth = n, 0
                while end < len(tokens) and (depth or tokens[end][1] != ";"):
                    depth += (tokens[end][1] in "([{") - (tokens[end][1] in ")]}")
                    if depth < 0:
                        break
                    end += 1
                if depth == 0 and end < len(tokens):
                    add("statement", at, text[at:tokens[end][2]], "")
    return found


def draw(rng, tree, files):
    """Endless mistakes (file, line, position, old, new), in a random order, none of them twice."""
    lines = {}
    for file in files:
        with open(os.path.join(tree, file)) as f:
            for line, kind, *what in mistakes(f.read()):
                lines.setdefault((file, line), {}).setdefault(kind, []).append(what)
    places, seen = sorted(lines), set()
    while True:
        place = rng.choice(places)
        kinds = lines[place]
        what = rng.choice(kinds[rng.choice(sorted(kinds))])
        if (place[0], *what) not in seen:
            seen.add((place[0], *what))
            yield (*place, *what)


def shown(text, position, old, new):
    """The mistake as 'old' -> 'new' with what stands around it in the line."""
    left = text[text.rfind("\n", 0, position) + 1:position].lstrip()[-24:]
    right = text[position + len(old):text.find("\n", position + len(old))][:24]
    brief = lambda s: " ".join(f"{left}{s}{right}".split())
    return f"'{brief(old)}' -> '{brief(new)}'"


# ---- trying one ----------------------------------------------------------------------------------

def environment(tree):
    """That of the tests: threads that wait do not keep others from working."""
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1",
            "ASAN_OPTIONS": "detect_leaks=0", "PYTHONUNBUFFERED": "1", "SERIAL": SERIAL,
            "BUILD": BUILD, "SANITIZE": SANITIZE, "CFLAGS": "-O1 -fno-math-errno",
            "TMPDIR": os.path.join(tree, "build", "tmp")}


def limits():
    """A mutant may not fill the disk or the memory."""
    for what, most in ((resource.RLIMIT_FSIZE, 4 << 30), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def call(command, tree, seconds):
    """What a test said against the program: "" if it passed. Ends at its first failure."""
    process = subprocess.Popen(command, cwd=tree, env=environment(tree), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True, preexec_fn=limits)
    os.set_blocking(process.stdout.fileno(), False)
    text, end, verdict = b"", time.monotonic() + seconds, None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while verdict is None:
            if not selector.select(max(0, end - time.monotonic())):
                verdict = f"no end after {seconds:.0f} s"
                break
            part = process.stdout.read()
            if part == b"":
                break
            text = text[-4000:] + (part or b"")
            wrong = re.search(rb"^FAIL.*\n", text, re.M)
            if wrong:
                verdict = wrong[0].decode("utf-8", "replace").strip()
    if verdict is None:
        try:
            code = process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            code = None
        last = (text.decode("utf-8", "replace").strip() or "nothing").splitlines()[-1]
        counts = re.fullmatch(r"\d+ passed, (\d+) failed.*", last)
        verdict = "" if code == 0 and counts and counts[1] == "0" else f"exit code {code}: {last}"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    return verdict


def digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


class Tree:
    """A copy of the repository in which programs are built and tests run."""

    def __init__(self, path, pythons):
        self.path, self.pythons = path, pythons
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(ROOT, path, symlinks=True, ignore=lambda folder, names: [
            name for name in names if folder == ROOT and (
                name in (".git", "build", "run", "train", "demo.bin", "demo.tsv") or
                re.fullmatch(r"(run|train)-(plain|debug|plain-debug)", name)) or
            name == "__pycache__"])
        os.makedirs(os.path.join(path, "build", "tmp"))
        if pythons["PYTHON"] != sys.executable:         # test_docs.py looks for it there
            os.symlink(os.path.dirname(os.path.dirname(pythons["PYTHON"])),
                       os.path.join(path, "build", "venv"))

    def build(self, program):
        """Compiles a program. Returns its digest, or None if it does not compile."""
        compiler, sources = PROGRAMS[program]
        done = subprocess.run([*shlex.split(compiler), "-o", program, *sources.split(), "-lm"],
                              cwd=self.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return digest(os.path.join(self.path, program)) if done.returncode == 0 else None

    def command(self, text):
        for name, python in self.pythons.items():
            text = text.replace(name, python or name)
        return shlex.split(text)

    def clean(self):
        shutil.rmtree(os.path.join(self.path, "build", "tmp"), ignore_errors=True)
        os.makedirs(os.path.join(self.path, "build", "tmp"))

    def attempt(self, mistake, tests, sound, times):
        """(verdict, seconds): which of the tests noticed, and what it said; "" if none did, None if
        there is nothing to notice. `sound` are the digests of the programs without the mistake."""
        file, _, position, old, new = mistake
        path = os.path.join(self.path, file)
        with open(path) as f:
            text = f.read()
        assert text[position:position + len(old)] == old
        built, start = {}, time.monotonic()

        def changed(programs):
            """Whether one of them is not what it was, or None if one does not compile."""
            for program in programs:
                if program not in built:
                    built[program] = self.build(program)
            if None in (built[program] for program in programs):
                return None
            return any(built[program] != sound[program] for program in programs)
        with open(path, "w") as f:
            f.write(text[:position] + new + text[position + len(old):])
        try:
            for source in ("run.c", "train.c"):         # compiling itself takes ten times as long
                if subprocess.run([*shlex.split(BUILD), "-fsyntax-only", source], cwd=self.path,
                                  stderr=subprocess.DEVNULL).returncode:
                    return None, 0
            first = FIRST.get(file, [])
            for name, command, programs in sorted(tests, key=lambda test: test[0] not in first):
                if name not in times:
                    continue
                change = changed(programs.split())
                if change is None:
                    return f"{name}: does not compile", time.monotonic() - start
                if change:
                    said = call(self.command(command), self.path, 6 * times[name] + 120)
                    if said:
                        return f"{name}: {said}", time.monotonic() - start
            return "" if changed(COMPARED) else None, time.monotonic() - start
        finally:
            with open(path, "w") as f:
                f.write(text)
            self.clean()


# ---- all of them ---------------------------------------------------------------------------------

def can_import(python, *modules):
    return python and (os.path.exists(python) or python == sys.executable) and subprocess.run(
        [python, "-c", "import " + ", ".join(modules)], capture_output=True).returncode == 0


def find_pythons():
    """The Python of each kind of test, None where its packages cannot be had."""
    own = os.path.join(HERE, "venv", "bin", "python")
    choice = os.path.join(ROOT, "build", "venv", "bin", "python"), own, sys.executable
    python = next((p for p in choice if can_import(p, *PACKAGES)), None)
    if not python:
        for command in ([sys.executable, "-m", "venv", os.path.join(HERE, "venv")],
                        [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                         "-r", os.path.join(ROOT, "tests", "requirements.txt")]):
            subprocess.run(command, check=False)
        python = own if can_import(own, *PACKAGES) else None
    return {"PYTHON": python or sys.executable,
            "TORCH": python if can_import(python, "torch", *PACKAGES) else None}


def measure(tree, pythons):
    """Builds everything and runs each test: its seconds by name, and the programs' digests."""
    sound = {program: tree.build(program) for program in PROGRAMS}
    broken = [program for program, value in sound.items() if not value]
    if broken:
        sys.exit(f"do not compile: {', '.join(broken)}")
    times = {}
    for name, command, _ in TESTS:
        if "TORCH" in command and not pythons["TORCH"]:
            print(f"{name:20} left out: needs torch", flush=True)
            continue
        start = time.monotonic()
        said = call(tree.command(command), tree.path, 900)
        tree.clean()
        if said:
            print(f"{name:20} left out, fails with nothing broken: {said[:200]}", flush=True)
            continue
        times[name] = time.monotonic() - start
        print(f"{name:20} {times[name]:6.1f} s", flush=True)
    return times, sound


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=30, help="how many mutants")
    parser.add_argument("--jobs", type=int, default=2, help="how many of them at a time")
    parser.add_argument("--files", nargs="+", help="files to break; default: all C code but tests")
    parser.add_argument("--only", type=int, nargs="+",
                        help="numbers of the mutants to try; the others are passed over")
    parser.add_argument("--fast", action="store_true", help="the fast tests alone")
    parser.add_argument("--times", action="store_true", help="measure the tests, and end")
    parser.add_argument("--list", action="store_true", help="print the mistakes drawn, and end")
    opt = parser.parse_args()
    check_tests()
    files = opt.files or ["coe.c", "train.c", "run.c", *sorted(
        "lib/" + name for name in os.listdir(os.path.join(ROOT, "lib")) if name.endswith(".h"))]
    drawn = draw(random.Random(opt.seed), ROOT, files)
    if opt.list:
        for file, line, position, old, new in (next(drawn) for _ in range(opt.count)):
            with open(os.path.join(ROOT, file)) as f:
                print(f"{file}:{line}  {shown(f.read(), position, old, new)}")
        return 0
    os.makedirs(HERE, exist_ok=True)
    pythons = find_pythons()
    trees = queue.Queue()
    first = Tree(os.path.join(HERE, "0"), pythons)
    stored = os.path.join(HERE, "times.json")
    key = hashlib.sha256(repr((TESTS, PROGRAMS, pythons, [
        digest(os.path.join(folder, name)) for part in (".", "lib", "tests")
        for folder in [os.path.join(first.path, part)] for name in sorted(os.listdir(folder))
        if name.endswith((".c", ".h", ".py")) and name != "mutate.py"])).encode()).hexdigest()
    times = sound = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(stored) as f:
            known = json.load(f)
        if known["key"] == key and not opt.times:
            times, sound = known["times"], known["sound"]
    if not times:
        times, sound = measure(first, pythons)
        with open(stored, "w") as f:
            json.dump({"key": key, "times": times, "sound": sound}, f)
    if opt.times:
        return 0
    trees.put(first)
    for number in range(1, opt.jobs):
        trees.put(Tree(os.path.join(HERE, str(number)), pythons))
    # The mutants are numbered in the order in which they are drawn, so that a seed gives the same
    # ones with any number of jobs. One in work is taken to count until that is known.
    lock, counts = threading.Lock(), {"noticed": 0, "survived": 0}
    results, left = {}, {}

    def attempt(number, mistake, tests):
        """Tries a mutant, and prints it when something noticed."""
        tree = trees.get()
        try:
            with open(os.path.join(tree.path, mistake[0])) as f:
                what = f"#{number} {mistake[0]}:{mistake[1]}  {shown(f.read(), *mistake[2:])}"
            verdict, seconds = tree.attempt(mistake, tests, sound, times)
        finally:
            trees.put(tree)
        with lock:
            results[number] = verdict
            if verdict:
                counts["noticed"] += 1
                print(f"{what}  noticed by {verdict[:110]} after {seconds:.0f} s", flush=True)
            elif verdict == "" and tests is FAST and not opt.fast:
                left[number] = mistake
            elif verdict == "":
                counts["survived"] += 1
                print(f"{what}  SURVIVED", flush=True)

    def work_fast():
        while True:
            with lock:
                if sum(verdict is not None for verdict in results.values()) >= opt.count:
                    return
                number, mistake = len(results), next(drawn)
                results[number] = ""
            if not opt.only or number in opt.only:
                attempt(number, mistake, FAST)

    def work_slow():
        while True:
            with lock:
                if not left:
                    return
                number = min(left)
                mistake = left.pop(number)
            attempt(number, mistake, SLOW)
    with concurrent.futures.ThreadPoolExecutor(opt.jobs) as pool:
        for work in (work_fast, work_slow):
            for job in [pool.submit(work) for _ in range(opt.jobs)]:
                job.result()
            if left:
                print(f"the fast tests leave {' '.join(f'#{n}' for n in sorted(left))}",
                      file=sys.stderr, flush=True)
    tried = sum(counts.values())
    print(f"{counts['noticed']} noticed, {counts['survived']} survived of {tried} "
          f"({100 * counts['noticed'] / max(tried, 1):.1f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
