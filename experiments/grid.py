#!/usr/bin/env python3
"""The paper's comparisons at the scale of a laptop: trains its models one after the other.

    python3 experiments/grid.py --quick                  ten minutes
    python3 experiments/grid.py --only moe-k8 coe-k4c2   the main pair, three seeds each
    python3 experiments/grid.py --data text.txt          the whole grid on a text: an evening
    python3 experiments/grid.py -- --learning_rate 2e-3  what follows -- goes to ./train

A run that is there already is not repeated, one that was interrupted goes on: start the same
command again. Models of a seed see the same batches in the same order. The results replace what was
in experiments/results: PRESET-DATA.tsv has a line a run, -curves.tsv one a validation, .md the
tables and what they say about the paper's claims. Speeds and times mean something only if nothing
else was running.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import zlib

from claims import report
from common import RESULTS, ROOT, Failure, command_line, read_tsv, tsv, write_file
from rows import PRESETS, ROWS, flops_per_token, options_of, sizes

TRAIN = os.path.join(ROOT, "train")
EVALUATION = 1.15       # what validations and solving problems add to the time of the steps


# ---- one run -------------------------------------------------------------------------------------

class Job:
    """A run of ./train: a row with a seed. Its files are FOLDER/ROW-sSEED.bin, .log, .err and
    .json, which has the settings, and once it is finished what came out of it."""

    def __init__(self, row, seed, args):
        self.row, self.seed, self.args = row, seed, args
        self.path = os.path.join(args.folder, f"{row.name}-s{seed}")
        self.options = options_of(row, args.preset, args.extra)
        self.every = max(1, args.steps // args.preset.evals)
        self.settings = self.options | {"seed": seed, "max_steps": args.steps, "data": args.data,
                                        "eval_steps": self.every}
        self.known = {}
        if os.path.exists(self.path + ".json"):
            with open(self.path + ".json", encoding="utf-8") as f:
                known = json.load(f)
            if known["settings"] == json.loads(json.dumps(self.settings)):
                self.known = known

    @property
    def finished(self):
        return "val_loss" in self.known

    def tokens_per_step(self):
        return self.options["batch_size"] * self.options["max_length"]

    def flop(self):
        """Of all steps: a forward pass, and a backward pass of twice its size."""
        return 3 * flops_per_token(self.options) * self.tokens_per_step() * self.args.steps

    def command(self):
        command = [TRAIN]
        if os.path.exists(self.path + ".bin"):
            command += ["--resume", self.path + ".bin"]
        for key, value in self.options.items():
            command += [f"--{key}", str(value)]
        if self.args.data:
            command += ["--data", self.args.data["file"]]
        problems = 0 if self.args.data else self.args.preset.problems
        return command + ["--seed", str(self.seed), "--max_steps", str(self.args.steps),
                          "--eval_steps", str(self.every), "--save_steps", str(self.every),
                          "--eval_problems", str(problems),
                          "--output", self.path + ".bin", "--log", self.path + ".log"]

    def run(self):
        """Trains, or goes on. Raises KeyboardInterrupt if it was told to stop."""
        os.makedirs(self.args.folder, exist_ok=True)
        if not self.known and os.path.exists(self.path + ".bin"):
            os.remove(self.path + ".bin")               # of other settings
        write_file(self.path + ".json", json.dumps({"settings": self.settings}))
        code, out, peak = supervised(self.command(), self.path + ".err")
        if code == 130:
            raise KeyboardInterrupt
        if code:
            with open(self.path + ".err", encoding="utf-8", errors="replace") as f:
                last = f.read().strip().rpartition("\n")[2]
            raise Failure(f"{self.row.name}, seed {self.seed}: exit code {code}: {last}")
        log = read_tsv(self.path + ".log")
        curve = [(int(line["step"]) + 1, line["val_loss"], line["solved"])
                 for line in log if line["val_loss"]]
        result = dict(line.split() for line in out.splitlines())
        speed = statistics.median(float(line["tokens_per_s"]) for line in log)
        self.known = {"settings": self.settings, "val_loss": float(result["val_loss"]),
                      "solved": result.get("solved"), "tokens_per_s": speed, "peak_bytes": peak,
                      "build": build(), "curve": curve}
        write_file(self.path + ".json", json.dumps(self.known))
        os.remove(self.path + ".bin")                   # moments and all, 16 bytes a parameter


def build():
    """A number that tells this ./train from others, which may be faster or slower."""
    with open(TRAIN, "rb") as f:
        return f"{zlib.crc32(f.read()):08x}"


def supervised(command, errors):
    """Runs a command: (exit code, its stdout, most memory it had in bytes).

    It is a process group of its own, and our signals are handed on to it one by one: ./train takes
    the first as "finish this step and save", a second as "stop now", and control-C at a terminal
    would reach it twice, directly and through us. The memory of a child counts what its parent had
    when it began, which is why nothing large is imported here.
    """
    with open(errors, "wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=log, start_new_session=True)
    before = {s: signal.signal(s, lambda s, _: os.kill(child.pid, s))
              for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        out = child.stdout.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, out, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the grid ------------------------------------------------------------------------------------

def all_jobs(args):
    """Every run that the settings ask for."""
    jobs = []
    for row in ROWS:
        most = args.seeds or args.preset.seeds[not row.ablation]
        jobs += [Job(row, seed, args) for seed in range(1, most + 1)]
    return jobs


def speed(args, jobs):
    """FLOP/s of the runs that are finished, or of a few steps that are made for this."""
    measured = [job for job in jobs if job.finished]
    if not measured:
        few = {"steps": 6, "preset": args.preset._replace(evals=1, problems=0)}
        measured = [Job(ROWS[0], 0, argparse.Namespace(**{**vars(args), **few}))]
        measured[0].run()
        os.remove(measured[0].path + ".json")           # next time the machine may be less busy
    return statistics.median(3 * flops_per_token(job.options) * job.known["tokens_per_s"]
                             for job in measured)


def minutes(flop, speed):
    return f"{flop / speed * EVALUATION / 60:.0f} min"


def write_results(args, jobs):
    """The tables of all runs that are finished; returns the Markdown."""
    runs = [("row", "seed", "steps", "tokens_per_step", "val_loss", "solved", "total_parameters",
             "active_parameters", "flops_per_token", "tokens_per_s", "peak_bytes", "build")]
    curves = [("row", "seed", "step", "val_loss", "solved")]
    for job in jobs:
        if not job.finished:
            continue
        known = job.known
        runs.append((job.row.name, job.seed, args.steps, job.tokens_per_step(),
                     f"{known['val_loss']:.9f}", known["solved"], *sizes(job.options),
                     f"{flops_per_token(job.options):.0f}", f"{known['tokens_per_s']:.3f}",
                     known["peak_bytes"], known["build"]))
        curves += [(job.row.name, job.seed, *point) for point in known["curve"]]
    if len(runs) == 1:
        return ""
    path = os.path.join(args.results, args.name)
    write_file(path + ".tsv", tsv(runs))
    write_file(path + "-curves.tsv", tsv(curves))
    text = report(path, "The paper's grid, " + args.name)
    write_file(path + ".md", text)
    return text


def show_list(args, jobs):
    """What there is to run, what is done, and about how long the rest takes."""
    pace = speed(args, jobs)
    print("row\tseeds\tdone\tparameters\tactive\tpaper\ttime_left\tabout")
    for row in ROWS:
        own = [job for job in jobs if job.row is row]
        left = sum(job.flop() for job in own if not job.finished)
        total, active = sizes(own[0].options)
        print(row.name, len(own), sum(job.finished for job in own), total, active, row.paper or "",
              minutes(left, pace), row.about, sep="\t")


def train_all(args, jobs, todo):
    """Trains what is to do; the results are written after each of them."""
    for i, job in enumerate(todo):
        left = sum(other.flop() for other in todo[i:])
        print(f"[{i + 1}/{len(todo)}] {job.row.name}, seed {job.seed}; about "
              f"{minutes(left, speed(args, jobs))} left; tail -f {os.path.relpath(job.path)}.err",
              file=sys.stderr)
        job.run()
        solved = f", solved {float(job.known['solved']):.1%}" if job.known["solved"] else ""
        print(f"    val_loss {job.known['val_loss']:.4f}{solved}, "
              f"{job.known['tokens_per_s']:.0f} tokens/s, {job.known['peak_bytes'] / 1e6:.0f} MB",
              file=sys.stderr)
        write_results(args, jobs)


def extra_options(words):
    """What follows --, as {option: value}."""
    if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
        raise Failure(f"{' '.join(words)}: what follows -- must be pairs, --option value")

    def value(word):
        for kind in (int, float):
            try:
                return kind(word)
            except ValueError:
                pass
        return word
    return {name[2:].replace("-", "_"): value(word) for name, word in zip(words[::2], words[1::2])}


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("quick", "large"):
        parser.add_argument("--" + name, dest="preset_name", action="store_const", const=name,
                            default="default", help=f"other sizes: {PRESETS[name].about}")
    parser.add_argument("--data", metavar="FILE", help="a text [the built-in task]")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS],
                        help="train only these rows; --list names them")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 1 to N for every row")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of every run")
    parser.add_argument("--list", action="store_true", help="what there is, and how long it takes")
    parser.add_argument("--dry-run", action="store_true", help="commands, and how long they take")
    parser.add_argument("--results", default=RESULTS, metavar="DIR", help="[experiments/results]")
    parser.add_argument("--logs", default=os.path.join(ROOT, "build", "experiments"), metavar="DIR",
                        help="[build/experiments]")
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    for name in ("seeds", "steps"):
        if (n := getattr(args, name)) is not None and n < 1:
            parser.error(f"--{name} is {n}, must be 1 or more")
    args.preset, args.extra = PRESETS[args.preset_name], extra_options(words[cut + 1:])
    args.steps = args.steps or args.preset.steps
    args.name = args.preset_name + "-task"
    if args.data:
        stem = os.path.splitext(os.path.basename(args.data))[0]
        args.name = f"{args.preset_name}-{stem}"
        args.data = {"file": os.path.abspath(args.data), "bytes": os.path.getsize(args.data)}
    args.folder = os.path.join(args.logs, args.name)
    return args


def main():
    args = parse(sys.argv[1:])
    if not os.path.exists(TRAIN):
        raise Failure(f"{TRAIN}: is not there: make")
    jobs = all_jobs(args)
    if args.list:
        show_list(args, jobs)
        return 0
    wanted = args.only or [row.name for row in ROWS]
    todo = [job for job in jobs if job.row.name in wanted and not job.finished]
    if args.dry_run:
        pace = speed(args, jobs)
        for job in todo:
            print(f"# {job.row.name}, seed {job.seed}: about {minutes(job.flop(), pace)}")
            print(" ".join(job.command()))
        print(f"# {len(todo)} runs, about {minutes(sum(job.flop() for job in todo), pace)}")
        return 0
    try:
        train_all(args, jobs, todo)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise
    print(write_results(args, jobs), end="")
    return 0


if __name__ == "__main__":
    command_line(main)
