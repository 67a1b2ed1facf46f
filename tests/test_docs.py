#!/usr/bin/env python3
"""Checks README.md and docs/: every command runs as it is written, and what they name is there.

    python3 tests/test_docs.py            in the repository's root, after make
    python3 tests/test_docs.py --write    puts the programs' --help into docs/options.md

The commands run in a copy, the README's first and then those of the pages, in the order of PAGES.
The last line is "N passed, N failed, N skipped".
"""
import difflib
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)
PAGES = ["README.md"] + [f"docs/{name}.md" for name in (
    "running", "chain", "training", "options", "experiments", "exercises", "speed", "huggingface",
    "tokenizer", "format", "design", "faq")]
MOST_LINES = 200            # of the README: it is read in one sitting

# What is not run as it stands: (pattern, what is put there, why). Nothing is a command left out.
NETWORK = "needs the network"
CHANGED = [
    (r"^make demo$", "./train -x 60 --eval_problems 4 -o demo.bin --log demo.tsv && "
     "./run demo.bin -t 0 -n 40", "takes minutes"),
    (r"^make test$", "", "would run this test again"),
    (r"^make bench.*|^python3 tests/bench.py --list$", "", "tests/test_bench.py does it"),
    (r"^python3 experiments/grid.py$", r"\g<0> --dry-run", "takes hours"),
    (r"^python3 experiments/balance.py -o (\S+)$", r"build/python/bin/python experiments/balance.py "
     r"-o \1 --steps 2 4 -- -b 2 -l 32", "takes minutes"),
    (r"^.* gsm8k-train.txt.*", "", "takes a text that is not here"),
    (r"^\./train --show_val 60 ", "./train --show_val 2 ", "takes a minute"),
    (r"-x 1[05]00\b", "-x 6 --eval_problems 4", "takes minutes"),
    (r"^python3 -m venv .*|^build/python/bin/pip .*", "", NETWORK),
    (r"^git clone .*|^cp reference/.*|^.*\bhf2\b.*", "", NETWORK),
    (r"^uv run (--with jinja2 )?export.py ", "build/python/bin/python export.py ", NETWORK),
    (r"^.*\bv2b\b.*", "", "tests/test_torchrun.py does it"),
    (r"^cc ", os.environ.get("CC", "cc") + " ", "the compiler that is tested"),
]
# What is left out where a Python package is missing: (pattern, package).
PACKAGES = [(r"^build/python/bin/python export.py ", "safetensors"),
            (r"\bexperiments/tokenizer.py\b|\btok\.bin\b|\bown\.bin\b", "tokenizers"),
            (r"\bhf\b|\bup\.bin\b|\bon\.bin\b|\bbytes\.bin\b|\bds\.bin\b|^uv ",
             "safetensors"),
            (r"\bbalance\.py\b", "matplotlib"), (r"\bshow\.py\b", "pandas"), (r"\bto_wandb\.py\b", "wandb"),
            (r"\bto_tensorboard\.py\b", "tensorboard")]

count = {"passed": 0, "failed": 0, "skipped": 0}


def check(what, ok, detail=""):
    count["passed" if ok else "failed"] += 1
    if not ok:
        print(f"FAILED: {what}{': ' if detail else ''}{str(detail)[-1500:]}")


def skip(what):
    count["skipped"] += 1
    print(f"skipped: {what}")


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


TEXTS = {page: read(page) for page in PAGES}


def output_of(*command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "80"}, timeout=60)
    return done.stdout


# ---- the options ---------------------------------------------------------------------------------

HELP = {"./train --help": ["./train", "--help"], "./run --help": ["./run", "--help"],
        "python3 export.py --help": [sys.executable, "export.py", "--help"]}


def block_of(command):
    """The place of a program's --help in docs/options.md: its heading, and the block below."""
    return re.search(rf"^## `{re.escape(command)}`\n+```\n(.*?)^```$", TEXTS["docs/options.md"],
                     re.M | re.S)


def test_options():
    for command, arguments in HELP.items():
        found, now = block_of(command), output_of(*arguments)
        check(f"{command} prints something", len(now) > 500, now)
        old = found[1] if found else ""         # another Python may break lines elsewhere
        check(f"docs/options.md has {command}; tests/test_docs.py --write renews it",
              old.split() == now.split(),
              "\n".join(difflib.unified_diff(old.splitlines(), now.splitlines(), lineterm="", n=0)))


def write_options():
    for command, arguments in HELP.items():
        found = block_of(command)
        text = TEXTS["docs/options.md"]
        begin, end = text[:found.start(1)], text[found.end(1):]
        TEXTS["docs/options.md"] = begin + output_of(*arguments) + end
    with open("docs/options.md", "w", encoding="utf-8") as f:
        f.write(TEXTS["docs/options.md"])


# ---- names ---------------------------------------------------------------------------------------

def sources():
    return [path for pattern in ("*.c", "*.py", "lib/*.h", "tests/*.py", "tests/*.c",
                                 "experiments/*.py", "Makefile") for path in glob.glob(pattern)]


def test_names():
    text = "\n".join(read(path) for path in sources())
    words = set(re.findall(r"[\w.]+", text)) | set(re.findall(r"\w+", text))
    scripts = [[sys.executable, f"experiments/{name}.py", "--help"]
               for name in ("grid", "claims", "routing", "viewer", "figures")]
    helps = "\n".join(output_of(*command) for command in [*HELP.values(), *scripts])
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", helps)) | \
        set(re.findall(r'"(--[\w.-]+)"', text))
    check("all pages are tested", sorted(PAGES[1:]) == sorted(glob.glob("docs/*.md")),
          sorted(glob.glob("docs/*.md")))
    for page, content in TEXTS.items():
        prose = re.sub(r"^```.*?^```$", "", content, flags=re.M | re.S)
        names = re.findall(r"`([^`\n]+)`", prose)
        for option in {x for name in names for x in re.findall(r"(?<!\S)--[a-z][\w.-]*", name)}:
            check(f"{page}: {option} is an option", option in known)
        for name in {x for x in names if re.fullmatch(r"[a-z]\w*", x)}:
            check(f"{page}: `{name}` is in the sources", name in words)
        for path in set(re.findall(r"\b(?:docs|lib|tests|experiments)/[\w/.-]*\w", content)):
            check(f"{page}: {path} is there", os.path.exists(path) or glob.glob(path + "*"))
        for link in set(re.findall(r"\]\(([^)#]+)\)", content)):
            if not link.startswith("http"):
                check(f"{page}: {link} is there",
                      os.path.exists(os.path.join(os.path.dirname(page), link)))
        for alt in re.findall(r"!\[([^\]]*)\]", content):
            check(f"{page}: a picture has a text in its place", len(alt.split()) >= 5, alt)
        if page != "README.md":
            check(f"{page}: says for whom it is, and where to go next",
                  re.search(r"^For whoever ", content, re.M) and "Next: " in content)
        long = [line for line in prose.splitlines()
                if len(line) > 100 and not line.startswith(("|", "!"))]
        check(f"{page}: no line is longer than 100 columns", not long, long)
    lines = TEXTS["README.md"].count("\n")
    check(f"README.md has {MOST_LINES} lines at most", lines <= MOST_LINES, lines)


# ---- commands ------------------------------------------------------------------------------------

def commands_of(block):
    """The commands of a block, with lines that end in a backslash joined and comments left out."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def as_run(command):
    """What is run in the place of a command: "" if nothing is."""
    for pattern, package in PACKAGES:
        if re.search(pattern, command) and not importlib.util.find_spec(package):
            skip(f"{command}: needs {package}")
            return ""
    for pattern, other, _ in CHANGED:
        command, n = re.subn(pattern, other, command)
        if n and not other:
            return ""
    return command


def make_copy(folder):
    """The repository without what is built, but for the two programs; and a Python where the README
    makes one."""
    leave = shutil.ignore_patterns("build", ".git", "__pycache__", "*.bin", "*.tsv", "*-debug")
    for name in os.listdir("."):
        if name in ("build", ".git") or name.endswith((".bin", ".tsv")):
            continue
        target = os.path.join(folder, name)
        shutil.copytree(name, target, ignore=leave) if os.path.isdir(name) else \
            shutil.copy2(name, target)
    for whole in ("experiments/results", "lab"):
        shutil.copytree(whole, os.path.join(folder, whole), dirs_exist_ok=True)
    python = os.path.join(folder, "build/python/bin/python")
    os.makedirs(os.path.dirname(python))
    with open(python, "w") as f:
        f.write(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    os.chmod(python, 0o755)


def test_commands():
    used = set()
    with tempfile.TemporaryDirectory() as folder:
        make_copy(folder)
        for page, content in TEXTS.items():
            for name, code in re.findall(r"^```python\n# (\w+\.py) - (.*?)^```$", content,
                                         re.M | re.S):
                with open(os.path.join(folder, name), "w") as f:
                    f.write(f"# {name} - {code}")
            for block in re.findall(r"^```sh\n(.*?)^```$", content, re.M | re.S):
                commands = commands_of(block)
                used |= {row for row in CHANGED for c in commands if re.search(row[0], c)}
                commands = [c for c in map(as_run, commands) if c]
                if not commands:
                    continue
                start = time.monotonic()
                done = subprocess.run(
                    ["bash", "-c", "set -e -x\n" + "\n".join(commands)], cwd=folder,
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                    timeout=600)
                print(f"{time.monotonic() - start:5.1f} s  {page}: {commands[0][:60]}")
                check(f"{page}: {' ; '.join(commands)}", done.returncode == 0, done.stderr)
                if "python3 read.py lab/demo.bin" in commands:
                    test_reader(folder, done.stdout)
    for row in CHANGED:
        check(f"a command is changed by {row[0]}", row in used)


def test_reader(folder, printed):
    """The reader in docs/format.md finds the tensors that run finds."""
    info = subprocess.run(["./run", "lab/demo.bin", "-m", "info"], cwd=folder, capture_output=True,
                          text=True).stdout
    tensors = [(name, *shape.split("x")) for name, shape in
               re.findall(r"^(\S+) ([\dx]+) (?:f32|bf16|q8)$", info, re.M)]
    found = [tuple(line.split()[:-3]) for line in printed.splitlines()]
    check("read.py finds every tensor", found == tensors and len(tensors) > 50,
          printed[:300] + info[-300:])


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_options()
        sys.exit()
    for test in (test_options, test_names, test_commands):
        test()
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**count))
    sys.exit(count["failed"] > 0)
