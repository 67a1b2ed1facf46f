#!/usr/bin/env python3
"""Builds and runs all tests: what `make test` does after ./run and ./train are built.

    python3 tests/run_all.py [-v]               -v prints what tests say when they pass, too
    python3 tests/run_all.py --fault N          the tests of one fault alone, by tests/faults.py
    python3 tests/run_all.py --fault N --list   prints them, a line "tests/FILE: test name" each
    python3 tests/run_all.py NAME...            some tests by name, as test_chat or test_ops

The last line is "N passed, N failed, N skipped". Python's standard library and a C compiler are
enough; what more is there is used: pip, to set up numpy and safetensors for the tests of export.py
in build/venv, PyTorch, to compare everything with an independent implementation, matplotlib, and
a Chromium, in which the page of experiments/viewer.py is tried. How things are compiled is what the
Makefile says.
"""
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)
sys.dont_write_bytecode = True
sys.path.insert(0, "tests")
from faults import FAULTS

if "BUILD" not in os.environ:           # then the Makefile was not asked
    flags = subprocess.run(["make", "-s", "print-flags"], stdout=subprocess.PIPE, text=True,
                           check=True)
    os.environ.update(line.split("=", 1) for line in flags.stdout.splitlines())
CC, SERIAL, BUILD, SANITIZE = map(os.environ.get, ("CC", "SERIAL", "BUILD", "SANITIZE"))
CONFIGS = int(os.environ.get("ORACLE_CONFIGS", "4"))   # random models to compare with PyTorch

# Threads that wait must not keep others from working: two tests run at a time.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
os.environ["ASAN_OPTIONS"] = "detect_leaks=0"           # a program that ends gives all back

MOST_FAULTS = 105       # numbers of inputs and faults, see tests/faults.py

total = {"passed": 0, "failed": 0, "skipped": 0}
verbose = "-v" in sys.argv[1:]


def report(name, passed, failed, skipped=0, seconds=0.0, text=""):
    """Counts the tests of a group and prints its line."""
    for key, n in (("passed", passed), ("failed", failed), ("skipped", skipped)):
        total[key] += n
    print(f"{name:34} {passed:5} passed {failed:3} failed" +
          (f" {skipped:3} skipped" if skipped else "") + (f"  {seconds:5.1f} s" if seconds else ""))
    lines = text.strip().splitlines()
    if not verbose:             # what failed, or everything where the test does not say
        lines = [line for line in lines if line.startswith("FAIL")] or lines
    if lines and (failed or skipped or verbose):
        print("    " + "\n    ".join(lines))
    sys.stdout.flush()


def call(command, timeout=900):
    """(exit code, output, seconds) of a command."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=timeout)
        code, output = done.returncode, done.stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        code, output = -1, f"{' '.join(command)}: {e}".encode()
    return code, output.decode("utf-8", "replace"), time.monotonic() - start


def run_tests(group):
    """Runs a test program, which ends in the line "N passed, N failed"."""
    name, command = group
    code, output, seconds = call(command)
    counts = re.search(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?\s*\Z", output, re.M)
    passed, failed, skipped = (int(n or 0) for n in counts.groups()) if counts else (0, 1, 0)
    if code and not failed or not passed:
        failed = max(failed, 1)
        output += f"\n{' '.join(command)} ended with exit code {code}"
    report(name, passed, failed, skipped, seconds, output)


# ---- building ------------------------------------------------------------------------------------

def builds():
    """What is compiled: (file in build/, command without the output, sources)."""
    yield "coe.o", f"{BUILD} -c", "coe.c"               # it compiles alone
    yield "run-generic", f"{CC} -O3", "run.c"           # as the README says
    yield "run-single", f"{CC} -O1", "build/run-single.c"
    yield "train-single", f"{CC} -O1", "build/train-single.c"
    yield "run-plain", f"{BUILD} -DPLAIN", "run.c"
    yield "train-serial", SERIAL, "train.c"
    yield "dump_grads", BUILD, "tests/dump_grads.c"
    yield "bench", BUILD, "tests/bench.c"
    for name, flags, source in (
            ("test_ops", "", "test_ops"), ("test_ops_double", " -DREAL=double", "test_ops"),
            ("test_model", "", "test_model"), ("test_model_double", " -DREAL=double", "test_model"),
            ("test_grad", "", "test_grad")):
        yield name, BUILD + flags, SOURCES_OF.get(source, f"tests/{source}.c")
    if has_sanitizers():
        yield "test_ops_debug", SANITIZE, SOURCES_OF["test_ops"]
        yield "test_model_debug", SANITIZE + " -DREAL=double", "tests/test_model.c"


# The plain operations are compared with the fast ones of the same names: a second unit.
SOURCES_OF = {"test_ops": "tests/test_ops.c tests/plain_ops.c"}


def has_sanitizers():
    with open("build/try.c", "w") as f:
        f.write("int main(void) { return 0; }\n")
    return call(shlex.split(SANITIZE) + ["-o", "build/try", "build/try.c"])[0] == 0 and \
        call(["build/try"])[0] == 0


def build(what):
    output, compiler, sources = what
    print(f"compiling build/{output}", flush=True)
    command = [*shlex.split(compiler), "-o", "build/" + output, *sources.split()]
    code, text, _ = call(command + ([] if output.endswith(".o") else ["-lm"]))
    return output, code, f"{' '.join(command)}\n{text}" if text else ""


def build_all(pool):
    """Returns what could be built."""
    start = time.monotonic()
    code, text, _ = call(["make", "-s", "single"])
    report("make single", code == 0, code != 0, text=text)
    results = list(pool.map(build, list(builds())))
    built = {output for output, code, _ in results if code == 0}
    report("compiled", len(built), len(results) - len(built), 0, time.monotonic() - start,
           "\n".join(text for _, _, text in results))
    return built


def check_contents():
    """The contents in a file's overture are its banners."""
    wrong = []
    for path in ("coe.c", "train.c", "run.c"):
        with open(path) as f:
            text = f.read()
        overture = re.match(r"(//.*\n)*", text)[0]
        rows = re.findall(r"^// +(\[\d+\] .*)$", overture, re.M)
        listed = re.findall(r"\[(\d+)\] +(\S.*?)(?=  +\[|$)", "\n".join(rows), re.M)
        banners = re.findall(r"^// -+ \[(\d+)\] (.*?) -+$", text, re.M)
        if sorted(listed, key=lambda x: int(x[0])) != banners or not banners:
            wrong.append(f"{path}: the contents list {sorted(set(listed) - set(banners))}, "
                         f"the banners {sorted(set(banners) - set(listed))}")
    report("contents of coe.c, train.c, run.c", 3 - len(wrong), len(wrong), text="\n".join(wrong))


def check_house():
    """What keeps the model readable: the model alone is in coe.c and train.c, and both stay short."""
    wrong, tests, text = [], 0, {}
    for path in ("coe.c", "train.c", "run.c", *sorted(glob.glob("lib/*.h"))):
        with open(path) as f:
            text[path] = f.read()

    def must(ok, what):
        nonlocal tests
        tests += 1
        if not ok:
            wrong.append(what)
    for path, most in (("coe.c", 1050), ("train.c", 1200)):
        must(text[path].count("\n") <= most, f"{path} has more than {most} lines")
        for word in ("vec", "LANES", "TILE_\\w+", "panel", "spread", "per_word", "pack", "Product"):
            must(not re.search(rf"\b{word}\b", text[path]), f"{path}: {word} belongs to lib/kernels.h")
        for name, arguments in re.findall(r"^[a-z].*?(\w+)\(([^;{]*?)\)\s*\{", text[path], re.M):
            must(arguments.count(",") < 9, f"{path}: {name} has more than nine arguments")
    forward = text["coe.c"].split("\nstatic void forward(")[0].count("\n")
    must(forward < 950, f"coe.c: forward() begins at line {forward}, must be before 950")
    must(text["coe.c"].count("PLAIN") == 1 and "PLAIN" not in text["train.c"], "one place for PLAIN")
    for path, lines in text.items():
        long = [n for n, line in enumerate(lines.splitlines(), 1) if len(line) > 100]
        must(not long, f"{path}: lines {long} have more than 100 columns")
    fields = []
    for path, struct in (("coe.c", "Config"), ("lib/generation.h", "GenerationConfig")):
        inside = re.search(r"typedef struct \{\n([^}]*)\} %s;" % struct, text[path])[1]
        fields += [name for line in re.findall(r"^ +(?:const )?\w+ \*?([\w, ]+)(?:\[\w+\])?;",
                                               inside, re.M) for name in line.split(", ")]
    table = text["lib/config.h"].split("config_keys[] = {")[1].split("};")[0]
    rows = [a or b or "chat" for a, b in re.findall(
        r"ROW\((?:CHAT_)?(\w+),|KEY_AS\(Config, (?:generation\.)?(\w+),", table)]
    rows = ["chat" if row.isupper() else row for row in rows]
    must({*fields} - {"generation"} == {*rows},
         f"Config and lib/config.h: only one has {set(fields) ^ set(rows)}")
    report("the house: sizes, places, columns", tests - len(wrong), len(wrong), text="\n".join(wrong))


def check_faults():
    """Every number of tests/faults.py has tests, and these are functions of their files."""
    wrong, found = [], {}
    for number in sorted({*FAULTS, *range(1, MOST_FAULTS + 1)}):
        if not 1 <= number <= MOST_FAULTS or not FAULTS.get(number):
            wrong.append(f"there is no fault, or no test of fault {number}")
        for file, names in FAULTS.get(number, []):
            if file not in found:
                with open(f"tests/{file}") as f:
                    found[file] = {*re.findall(r"^def (test_\w+)\(", f.read(), re.M)}
            wrong += [f"fault {number}: tests/{file} has no test {name}"
                      for name in names.split() or ["at all"] if name not in found[file]]
    report("faults", len(FAULTS) - len(wrong), len(wrong), text="\n".join(wrong))


# ---- Python packages -----------------------------------------------------------------------------

VENV = os.path.join("build", "venv", "bin", "python")
EXPORT = "numpy", "safetensors", "ml_dtypes", "jinja2"  # what export.py needs


def python_with(*modules):
    """A Python that can import these modules, or None."""
    for python in (VENV, sys.executable):
        if os.path.exists(python) and call([python, "-c", "import " + ", ".join(modules)])[0] == 0:
            return python
    return None


def set_up_venv():
    """Makes build/venv with what export.py needs. Returns what went wrong."""
    for command in ([sys.executable, "-m", "venv", "build/venv"],
                    [VENV, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                     "-r", "tests/requirements.txt"]):
        code, output, _ = call(command, timeout=300)
        if code:
            shutil.rmtree("build/venv", ignore_errors=True)
            return (output.strip() or "failed").splitlines()[-1]
    return ""


def python_groups():
    """The tests that need packages; what is missing is counted as skipped."""
    problem, python = "", python_with(*EXPORT)
    if not python:
        problem = set_up_venv()
        python = python_with(*EXPORT)
    if python:
        yield "export.py", [python, "tests/test_export.py"]
        yield "tokenizer", [python, "tests/test_tokenizer.py", "./run"]
    else:
        report("export.py, tokenizer", 0, 0, 2, text=f"needs {', '.join(EXPORT)}: {problem}")
    python = python_with("torch", *EXPORT)
    if not python:
        report("comparison with PyTorch", 0, 0, 3, text="needs torch")
        return
    yield "PyTorch oracle", [python, "tests/oracle.py", "check",
                             *sorted(glob.glob("tests/golden/*"))]
    yield "lens and edits", [python, "tests/test_lens.py", "./run", f"{python} export.py",
                             str(3 * CONFIGS)]
    for half in (1, 2):
        yield f"comparison with PyTorch, part {half}", [
            python, "tests/oracle.py", "compare", "--train", "./train", "--run", "./run",
            "--export", f"{python} export.py", "--dump_grads", "build/dump_grads",
            "--configs", str((CONFIGS + half - 1) // 2), "--seed", str(half)]


def run_some(tests, only_list):
    """Runs tests [(file, names of its functions)], or lists them. Returns the exit code."""
    for file, names in tests:
        for name in names.split():
            print(f"tests/{file}: {name}", flush=True)
    if only_list or not tests:
        return not tests
    python = python_with(*EXPORT) or sys.executable
    programs = {"test_run.py": ["./run"], "test_tokenizer.py": ["./run"], "test_export.py": [],
                "test_files.py": ["./train", "./run"], "test_failing.py": ["./train", "./run"]}
    if any(file == "test_train.py" and "test_threads" in names for file, names in tests):
        build(("train-serial", SERIAL, "train.c"))          # threads, and a program without any
        programs["test_train.py"] = ["./train", "build/train-serial"]
    for file, names in tests:
        os.environ["ONLY"] = names
        if file.endswith(".py"):
            command = [python, f"tests/{file}", *programs.get(file, ["./train"])]
        else:
            _, _, problem = build(next(b for b in builds() if b[0] == file))
            command = [f"build/{file}", *(["5"] if file == "test_model_debug" else [])]
            print(problem, end="")
        run_tests((file, command))
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**total))
    return total["failed"] > 0


def tests_named(names):
    """The tests of these names: functions of Python files, or C programs."""
    found = [(output, output) for output, _, _ in builds() if output in names]
    for path in sorted(glob.glob("tests/test_*.py")):
        with open(path) as f:
            mine = [x for x in re.findall(r"^def (test_\w+)\(", f.read(), re.M) if x in names]
        if mine:
            found.append((os.path.basename(path), " ".join(mine)))
    return found


def main():
    os.makedirs("build", exist_ok=True)
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    if names:
        tests = FAULTS.get(int(names[0]), []) if "--fault" in sys.argv else tests_named(names)
        if not tests:
            print(f"there is no test {' '.join(names)}", file=sys.stderr)
        return run_some(tests, "--list" in sys.argv)
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        built = build_all(pool)
        of_packages = list(python_groups())     # makes build/venv, which the others use, too
        check_contents()
        check_house()
        check_faults()
        groups = [("test_docs.py", [python_with(*EXPORT) or sys.executable, "tests/test_docs.py"])]
        groups += [(f"build/{name}", [f"build/{name}", *args]) for name, *args in (
            ("test_model_debug", "5"), ("test_ops_debug",), ("test_grad",), ("test_ops",),
            ("test_ops_double",), ("test_model",), ("test_model_double",)) if name in built]
        if not built & {"test_ops_debug"}:
            report("sanitizers", 0, 0, 2, text=f"not with this compiler: {SANITIZE}")
        for name, *args in (("test_train", "./train", "build/train-serial"), ("test_run", "./run"),
                            ("test_golden", "./train", "build/dump_grads"),
                            ("test_files", "./train", "./run"),
                            ("test_failing", "./train", "./run"), ("test_task", "./train"),
                            ("test_bench", "./train", "./run", "build/bench")):
            groups.append((name + ".py", [sys.executable, f"tests/{name}.py", *args]))
        groups.append(("test_experiments.py", [python_with("matplotlib") or sys.executable,
                                               "tests/test_experiments.py", "./train", "./run"]))
        list(pool.map(run_tests, [*groups, *of_packages]))      # the longest first
    print(f"{time.monotonic() - start:.0f} s")
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**total))
    return total["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
