#!/usr/bin/env python3
"""Looks for data races: trains and runs small models of many kinds with several threads, under the
thread sanitizer.

    python3 tests/races.py              the last line is "N passed, N failed"

It needs clang and its OpenMP (Debian: clang and libomp-dev), because the sanitizer has to see what
OpenMP's barriers order: libarcher, which comes with it, tells. With gcc's OpenMP every barrier
looks like a race. Two races that are planted must be found; so silence means something. In what is
built here all loops are shared out, however short: in small models they would not be.
"""
import glob
import os
import shutil
import subprocess
import sys

sys.dont_write_bytecode = True
import test_run
from test_run import check

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "build", "races")
COMPILE = ["clang", "-O1", "-g", "-fsanitize=thread", "-march=native", "-fno-math-errno",
           "-fopenmp", "-Wno-unknown-pragmas"]
SHORT = "if (operations <= 20000 || "                  # a loop so short is not shared out
# Races that are planted: (name, file, what stands there, what takes its place).
PLANTED = (("a counter", "lib/base.h", "__atomic_fetch_add(&w->taken[who], 1, __ATOMIC_RELAXED)",
            "w->taken[who]++"),
           ("a common number", "coe.c", "if (inverse) inverse[t] = scale;",
            "if (inverse) inverse[0] = scale;"))
MODEL = """--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --kv_lora_rank 16
--qk_nope_head_dim 8 --qk_rope_head_dim 8 --v_head_dim 8 --n_routed_experts 4
--num_experts_per_tok 2 --moe_intermediate_size 16 --intermediate_size 32 -b 4 -l 24 -x 2
--eval_windows 2""".split()
KINDS = {
    "a chain": [],
    "micro-batches, clipped": ["--micro_batch_size", "3", "--max_grad_norm", "0.01"],
    "own queries, dense first, biases": ["--q_lora_rank", "8", "--first_k_dense_replace", "1",
                                         "--attention_bias", "true"],
    "shared gates, tied, YaRN": ["--use_igate", "false", "--tie_word_embeddings", "true",
                                 "--rope_scaling.type", "yarn", "--rope_scaling.factor", "4"],
    "sigmoid, balanced, pre-norm": ["--scoring_func", "sigmoid", "--topk_method", "noaux_tc",
                                    "--bias_update_speed", "0.01", "--prenorm_chain", "true"],
    "groups, documents": ["--topk_method", "group_limited_greedy", "--n_group", "2", "--topk_group",
                          "1", "--packing", "false"],
    "completions, no shared expert": ["--completion_only_loss", "true", "--n_shared_experts", "0"]}


def sources(name, *changes):
    """A copy of the programs, with changes (file, old, new)."""
    folder = os.path.join(FOLDER, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for path in ("coe.c", "train.c", "run.c"):
        shutil.copy(os.path.join(ROOT, path), folder)
    shutil.copytree(os.path.join(ROOT, "lib"), os.path.join(folder, "lib"))
    for file, old, new in (("lib/base.h", SHORT, SHORT.replace("20000", "0")), *changes):
        path = os.path.join(folder, file)
        with open(path) as f:
            text = f.read()
        check(f"{file} has {old!r} once", text.count(old) == 1, text.count(old))
        with open(path, "w") as f:
            f.write(text.replace(old, new))
    return folder


def build(folder, *programs):
    jobs = [subprocess.Popen([*COMPILE, "-o", f"{folder}/{name}", f"{folder}/{name}.c", "-lm"],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for name in programs]
    for name, job in zip(programs, jobs):
        check(f"{name} is built", job.wait() == 0, job.stdout.read()[-999:])


def environment():
    """Only what the programs themselves do counts; what OpenMP does is told by libarcher."""
    there = {**os.environ, "OMP_WAIT_POLICY": "passive",
             "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66"}
    archer = sorted(glob.glob("/usr/lib/llvm-*/lib/libarcher.so"))
    return there | ({"OMP_TOOL_LIBRARIES": archer[-1]} if archer else {})


def run(folder, program, *args):
    """Exit code and stderr."""
    done = subprocess.run([f"{folder}/{program}", *map(str, args)], env=environment(), cwd=folder,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    return done.returncode, done.stderr.decode("utf-8", "replace")


def clean(what, folder, *command):
    code, err = run(folder, *command)
    check(what, code == 0 and "ThreadSanitizer" not in err, f"exit {code}\n{err[:2000]}")


def main():
    try:
        subprocess.run([*COMPILE, "-x", "c", "-", "-o", os.devnull], check=True,
                       input=b"int main(void) { return 0; }", capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print("skipped: needs clang, with the thread sanitizer and OpenMP")
        print("0 passed, 0 failed, 1 skipped")
        return 0
    right = sources("right")
    build(right, "train", "run")
    with open(os.path.join(right, "text"), "w") as f:
        f.write("question: what is 1 and 2?\nanswer: 3, as everybody knows.\n<|endoftext|>\n" * 40)
    for threads in (2, 4):
        for kind, options in KINDS.items():
            clean(f"training, {kind}, {threads} threads", right, "train", *MODEL, *options, "-d",
                  "text", "-o", "m.bin", "--threads", threads)
        clean(f"--resume, {threads} threads", right, "train", "--resume", "m.bin", "-d", "text",
              "-x", 3, "--threads", threads)
        clean(f"problems, {threads} threads", right, "train", *MODEL, "--eval_problems", 2, "-o",
              "p.bin", "--threads", threads)
        for name, dtype in (("coe", "f32"), ("v3-routing", "q8"), ("upcycled", "bf16"),
                            ("prenorm-chain", "f32")):
            model = os.path.join(right, f"{name}.bin")
            test_run.write_golden(name, model, dtype=dtype)
            some = ["--ids", "-i", " ".join(str(i % 60) for i in range(40)), "--threads", threads]
            for args in (["-n", 4], ["-m", "eval", "--logits", "l", "--trace", "t"], ["-m", "lens"],
                         ["-m", "eval", "--silence", "layer=1"]):
                clean(f"{name} in {dtype}, {args[:2]}, {threads} threads", right, "run", model,
                      *some, *args)
        clean(f"bench, {threads} threads", right, "run", "m.bin", "-m", "bench", "--threads",
              threads)
    for name, *change in PLANTED:
        wrong = sources("wrong", change)
        build(wrong, "train")
        shutil.copy(os.path.join(right, "text"), wrong)
        code, err = run(wrong, "train", *MODEL, "-d", "text", "-o", "m.bin", "--threads", 4)
        check(f"a planted race, {name}, is found", code == 66 and "data race" in err,
              f"exit {code}\n{err[-500:]}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"{test_run.passed} passed, {test_run.failed} failed")
    return test_run.failed > 0


if __name__ == "__main__":
    sys.exit(main())
