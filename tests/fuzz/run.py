#!/usr/bin/env python3
"""Looks for inputs that the programs cannot bear, with clang's libFuzzer: inputs are changed at
random, and what reaches new code is kept and changed further.

    CC=clang tests/fuzz/run.py [SECONDS] [TARGET...]            20 seconds a target, all targets
    tests/fuzz/run.py --planted [SECONDS] [TARGET...]           is a bug found? 120 seconds at most

A target is a file next to this one. Everything lies in build/fuzz: corpus/TARGET keeps the inputs
that reached something new, for the next time, and found/ those that are too much for a program.
With --planted each target gets a copy of the sources with a bug, and must find it, beginning with
the seeds alone. The last line is "N passed, N failed, N skipped".
"""
import os
import re
import shutil
import struct
import subprocess
import sys
import time

sys.dont_write_bytecode = True
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests"))
import modelbin                                         # noqa: E402

FUZZ = os.path.join(ROOT, "build", "fuzz")
FLAGS = """-O1 -g -DONE_VERSION -Wall -Wextra -Wno-unused-function -Wno-unknown-pragmas
    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined""".split()

# The longest input of each target, in bytes, and a bug for it to find: (file, text, in its place).
TARGETS = {
    "model": (16384, "lib/modelfile.h",
              "expected != file_bytes || h->files_bytes % 64", "h->files_bytes % 64"),
    "tokenizer": (8192, "lib/tokenizer.h",
                  "from <= t->n_ranges && count <= t->n_ranges - from", "from <= t->n_ranges"),
    "run_options": (1024, "lib/lens.h",
                    "k == CONDITIONS || e.value[k] >= 0", "e.value[k] >= 0"),
    "train_options": (1024, "lib/config.h",
                      "for (int i = 0; i < MOST_ENDS; i++) {\n        char *end;",
                      "for (int i = 0; i <= MOST_ENDS; i++) {\n        char *end;"),
    "data": (4096, "lib/data.h",
             "s->tokens[min_size(at, s->n - 1)]", "s->tokens[at]"),
    "resume": (8192, "lib/modelfile.h",
               "if ((unsigned char)*from < 0x20) return NULL;", ""),
}


# ---- seeds --------------------------------------------------------------------------------------

def lines(values):
    return "".join(f"{name} {value}\n" for name, value in values.items()).encode()


def models():
    """Small models by name, of version 1 of the format, which tests/version1 has."""
    folder = os.path.join(ROOT, "tests", "version1")
    return {name: modelbin.read(os.path.join(folder, name + ".bin"))
            for name in ("bf16", "bpe", "problems", "q8", "text", "upcycled")}


# What to change in a config so that other code is reached.
CHANGES = [
    {"num_experts_per_tok": "2", "n_routed_experts": "4", "hidden_size": "12", "inner_iter": "2"},
    {"vocab_size": "258", "bos_token_id": "257", "max_position_embeddings": "32"},
    {"num_attention_heads": "3", "v_head_dim": "6", "qk_rope_head_dim": "6", "kv_lora_rank": "5"},
    {"weight_type": "q8"}, {"weight_type": "bf16"}, {"coe_weights": "true"},
    {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": "2",
     "norm_topk_prob": "true"},
    {"topk_method": "group_limited_greedy", "n_group": "2", "routed_scaling_factor": "2.5"},
    {"q_lora_rank": "5", "attention_bias": "true", "tie_word_embeddings": "false"},
    {"prenorm_chain": "true", "inner_residual": "false"}, {"n_routed_experts": "null"},
    {"use_igate": "false", "outer_residual": "true", "inner_iter": "3", "n_shared_experts": "null"},
    {"rope_scaling.type": "yarn", "rope_scaling.factor": "40",
     "rope_scaling.mscale_all_dim": "0.7"},
    {"rope_scaling.type": "linear", "rope_scaling.factor": "2", "first_k_dense_replace": "1"},
    {"tokenizer": "none", "vocab_size": "16", "bos_token_id": "1", "eos_token_id": "[2, 3]",
     "generation_config.eos_token_id": "4", "default_prompt": '"a\\u00e4\\ud83d\\ude00\\n"'},
    {"chat_template": "deepseek_v2", "temperature": "0.5", "top_k": "5"},
    {"chat_template": "pieces", "chat.begin": '"<|beginoftext|>"', "chat.system": '"S:"',
     "chat.system_user": '"\\n"', "chat.user_assistant": '"A:"', "chat.answer": '"A:"',
     "chat.assistant_user": '"<|endoftext|>"', "chat.trim": '"user"'},
]
PATTERN = struct.pack("<5f", 0.1, 0.05, 0.2, 0.03, 0.15)     # second moments are not negative


def seeds_of(target):
    """The inputs that a target begins with, and the files that its inputs may name."""
    small = models()
    bpe, text = small["bpe"], small["text"]
    with open(os.path.join(ROOT, "tests", "version1", "text.txt"), "rb") as f:
        documents = f.read()
    some = documents if target == "resume" else documents[:100]
    files = {"fuzz-model.bin": modelbin.build(bpe), "fuzz-text.txt": some,
             "fuzz-tokenizer.bin": modelbin.build(bpe)}
    if target == "model":
        seeds = [bytes([8 | i % 8]) + lines(change) + b"\0\0" + PATTERN
                 for i, change in enumerate(CHANGES * 3)]
        alone = {"weight_type": "none", "tokenizer": "bytes", "vocab_size": "258"}
        embedded = b"tokenizer.json".ljust(56, b"\0") + struct.pack("<Q", 2) + b"{}" + bytes(62)
        only = modelbin.Model(alone | {"tokenizer": "bpe", "vocab_size": "270"}, embedded,
                              bpe.tokenizer)
        seeds += [b"\7" + modelbin.build(only), b"\7" + modelbin.build(modelbin.Model(alone))]
        for name in ("q8", "bf16"):
            with open(os.path.join(ROOT, "tests", "version1", name + ".bin"), "rb") as f:
                seeds.append(b"\0" + f.read())
            seeds.append(b"\0" + modelbin.build(small[name]))
        return seeds, files
    if target == "resume":
        newer = {"best_val_loss": "2.5", "problem": "99", "pending": "200", "packing": "true",
                 "completion_only_loss": "true", "completion_marker": '"answer:"',
                 "bias_update_speed": "0.001"}
        of_text = {name: text.recipe[name] for name in
                   ("max_length", "step", "data_tokens", "data_fingerprint")}
        of_text |= {"completion_only_loss": "false", "packing": "true"}
        states = [(8, {}), (10, newer), (10, newer | {"packing": "false"}), (12, of_text),
                  (14, of_text | {"sequential": "true", "micro_batch_size": "1"})]
        return [bytes([choice]) + lines(change) + b"\0" + lines(state) + b"\0" + PATTERN
                for change in CHANGES[:6] for choice, state in states], files
    if target == "tokenizer":
        words = [b"the 12 cats, the <tag> 345  \n", b"a" * 70,
                 "Die Über-Äpfel <bos>x<eos>é\u0301 漢字\r\n".encode(),
                 b"thethethe\xff\xfe\xc3 \xed\xa0\x80 1234567 "]
        # The same with flags of added tokens, of the tokenizer, and with pieces that are tokens.
        section = bpe.tokenizer
        return [section + word for word in words] + \
               [section[:44] + struct.pack("<I", 1) + section[48:] + word for word in words], files
    if target == "run_options":
        start = ["fuzz-model.bin"]
        seeds = [["-i", "the <bos> 12", "-n", "5", "-t", "0"], ["--ids", "-i", "1 2 260", "-n=3"],
                 ["-k", "5", "-p", "0.9", "--min-p", "0.1", "-s", "3", "--repeat-penalty", "1.2"],
                 ["-m", "chat", "-i", "Hello", "--system", "Be brief.", "-n", "4", "-c", "40"],
                 ["-m", "eval", "-f", "fuzz-text.txt", "-c", "7", "--trace", "fuzz-trace"],
                 ["-m", "eval", "--ids", "-i", "1 2 3", "--logits", "fuzz-logits"],
                 ["-m", "eval", "-f", "fuzz-text.txt", "--completion_only_loss", "true",
                  "--completion_marker", "12", "--allow_bytes"],
                 ["-m", "lens", "-i", "the end", "--lens", "fuzz-lens", "--layer", "1"],
                 ["-m", "lens", "-i", "the end", "--silence", "layer=1,iteration=0,expert=2;shared",
                  "--silence", "head=1", "--parallel", "all", "--swap_gates", "layer=0",
                  "--gate_input", "iteration=1"],
                 ["-m", "info"], ["-m", "tokenize", "-i", "the 12"], ["-h"], ["--version"],
                 ["--ignore-eos", "--verbose-prompt", "--threads", "2", "--n_predict", "-1"]]
        return ["\n".join(start + seed).encode() for seed in seeds], files
    if target == "train_options":
        short = ["-b", "1", "-l", "8", "--hidden_size", "8", "--num_hidden_layers", "1"]
        seeds = [[], ["--model", "paper"],
                 ["--model=small", "-x", "9", "--lr_scheduler", "constant"],
                 ["-d", "fuzz-text.txt", "--val", "fuzz-text.txt", "--show_data", "2"],
                 ["--init", "fuzz-model.bin", "-d", "fuzz-text.txt", "--rope_theta", "10000"],
                 ["--tokenizer", "fuzz-tokenizer.bin", "--vocab_size", "270", "--show_val", "1"],
                 ["--eos_token_id", "[257,1,2,3,4,5,6,7]", "--warmup_steps", "null"],
                 ["-h"], ["--version"], ["--show_data", "2", "--show_loss", "--level", "2"],
                 ["--resume", "fuzz-model.bin"], ["--packing=false", "--sequential"]]
        for change in CHANGES:
            option = [f"--{name}={value}" for name, value in change.items()
                      if name not in ("weight_type", "coe_weights", "tokenizer")]
            seeds.append(option + ["--micro_batch_size", "1", "--adam_beta2", "0.5"])
        return ["\n".join(seed + short).encode() for seed in seeds], files
    texts = [documents[:900], documents[:300].replace(b"\n", b"\r\n"), b"\xef\xbb\xbfabc\n" * 30,
             b'{"text": "abc def"}\n' * 20, "Äpfel <|endoftext|>\n<|endoftext|>\nü".encode() * 9,
             b"\x1f\x8b\x08" + bytes(40), struct.pack("<200H", *range(200)), b"answer:" * 40,
             struct.pack("<3i", 20240520, 1, 100).ljust(1024, b"\0") + bytes(200)]
    choices = [0, 1, 2, 4, 7, 8, 16, 36, 68, 128, 134, 256, 512 | 128, 1024 | 256]    # see data.c
    return [struct.pack("<H", choice) + data for data in texts for choice in choices], files


def words():
    """The names of all keys and their words, for libFuzzer to put into inputs, and some more."""
    found = set("<|endoftext|> answer: null true false all shared layer= iteration= expert= head= "
                "fuzz-model.bin fuzz-text.txt -1 [1,2] #### inf nan 1e30 4294967295".split())
    for header in ("config", "recipe", "settings", "checkpoint", "modelfile"):
        with open(os.path.join(ROOT, "lib", header + ".h")) as f:
            text = f.read()
        for pattern in (r"\bROW\((\w+),", r"TEXT_ROW\((\w+),", r"KEY\(\w+, (\w+)\)",
                        r'_AS\([^"\n]*"([\w.-]+)"'):
            found |= set(re.findall(pattern, text))
        found |= {"chat." + name for name in re.findall(r'CHAT_ROW\(\w+, "(\w+)"', text)}
        for several in re.findall(r'\.words = "([^"]+)"', text):
            found |= set(several.split("|"))
    return "".join(f'"{word}"\n' for word in sorted(found - {"field", "chat."}))


def prepare(target):
    """Makes the seeds; returns their folder, and the one that the target runs in."""
    seeds, work = os.path.join(FUZZ, "seeds", target), os.path.join(FUZZ, "work", target)
    for folder in (seeds, work):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    inputs, files = seeds_of(target)
    numbered = {f"{i:03}": data for i, data in enumerate(inputs)}
    for folder, content in ((seeds, numbered), (work, files)):
        for name, data in content.items():
            with open(os.path.join(folder, name), "wb") as f:
                f.write(data)
    with open(os.path.join(work, "words"), "w") as f:
        f.write(words())
    return seeds, work


# ---- building and running -----------------------------------------------------------------------

def compiler():
    """A clang that has libFuzzer, or None."""
    probe = os.path.join(FUZZ, "probe")
    with open(probe + ".c", "w") as f:
        f.write("int LLVMFuzzerTestOneInput(const char *d, long n) { return d == 0 && n; }\n")
    for cc in (os.environ.get("CC", "clang"), "clang"):
        try:
            done = subprocess.run([*cc.split(), *FLAGS, probe + ".c", "-o", probe],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            continue
        if done.returncode == 0:
            return cc.split()
    return None


def build(cc, root, target, program):
    """Builds a target from the sources below `root`. Returns what went wrong, or nothing."""
    source = os.path.join(root, "tests", "fuzz", target + ".c")
    ignored = "-fsanitize-coverage-ignorelist=" + os.path.join(root, "tests", "fuzz", "fast.txt")
    done = subprocess.run([*cc, *FLAGS, ignored, source, "-o", program, "-lm"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout if done.returncode else ""


def fuzz(program, target, folders, work, seconds, found):
    """Runs a target. Returns its exit code and what it says on stderr."""
    os.makedirs(os.path.dirname(found), exist_ok=True)
    command = [program, f"-max_total_time={seconds}", f"-max_len={TARGETS[target][0]}",
               "-timeout=60", "-rss_limit_mb=2048", "-close_fd_mask=3", "-print_final_stats=1",
               "-dict=words", f"-artifact_prefix={found}", *folders]
    done = subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE)
    return done.returncode, done.stderr.decode(errors="replace")


def number(pattern, text):
    """The last number that follows a pattern."""
    found = re.findall(pattern + r"\s*(\d+)", text)
    return int(found[-1]) if found else 0


def look_for_bugs(cc, target, seconds):
    """Runs a target on the program as it is. Returns whether it found nothing."""
    program, corpus = os.path.join(FUZZ, target), os.path.join(FUZZ, "corpus", target)
    found = os.path.join(FUZZ, "found", target + "-")
    os.makedirs(corpus, exist_ok=True)
    seeds, work = prepare(target)
    said = build(cc, ROOT, target, program)
    if said:
        print(f"cannot be built\n{said}")
        return False
    print(f"for {seconds} s ... ", end="", flush=True)
    code, said = fuzz(program, target, [corpus, seeds], work, seconds, found)
    runs = number("number_of_executed_units:", said)
    print(f"{runs} inputs, {number('average_exec_per_sec:', said)} a second, "
          f"{number('cov:', said)} places reached, {'nothing' if code == 0 else 'A BUG'} found",
          flush=True)
    if code:
        at = said.find("ERROR:")
        at = max(at, said.find("runtime error:") - 200) if at < 0 else at
        print(said[at if at >= 0 else -3000:][:3000])
        name = re.search(r"Test unit written to (\S+)", said)
        print(f"again: cd {work} && {program} {name[1] if name else ''}")
    return code == 0


def look_for_plant(cc, target, seconds):
    """Runs a target on a program with a bug. Returns whether it found that."""
    _, file, old, new = TARGETS[target]
    root = os.path.join(FUZZ, "planted", target)
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(os.path.join(root, "tests"))
    for name in ("coe.c", "run.c", "train.c"):
        shutil.copy(os.path.join(ROOT, name), root)
    for name in ("lib", os.path.join("tests", "fuzz")):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(root, name))
    with open(os.path.join(root, file)) as f:
        source = f.read()
    if source.count(old) != 1:
        print(f"{file} has {source.count(old)} places with the text {old!r}, must be one: which "
              "bug to plant stands at the top of tests/fuzz/run.py")
        return False
    with open(os.path.join(root, file), "w") as f:
        f.write(source.replace(old, new))
    seeds, work = prepare(target)
    corpus, program = os.path.join(root, "corpus"), os.path.join(root, target)
    os.makedirs(corpus)
    said = build(cc, root, target, program)
    if said:
        print(f"cannot be built\n{said}")
        return False
    start = time.monotonic()
    code, said = fuzz(program, target, [corpus, seeds], work, seconds, os.path.join(root, "found-"))
    what = re.search(r"ERROR: \w+: ([\w-]+)|runtime error: (.*)|(deadly signal)", said)
    what = next(filter(None, what.groups()), "") if what else f"exit code {code}"
    print(f"{file}: found after {time.monotonic() - start:.1f} s: {what}" if code else
          f"{file}: not found in {seconds} s", flush=True)
    return code != 0


def main(arguments):
    planted = "--planted" in arguments
    arguments = [a for a in arguments if a != "--planted"]
    seconds = 120 if planted else 20
    if arguments and arguments[0].isdigit():
        seconds = int(arguments.pop(0))
    wrong = [a for a in arguments if a not in TARGETS]
    if wrong:
        sys.exit(f"run.py: {wrong[0]}: is no target, must be one of: {' '.join(TARGETS)}")
    targets = arguments or list(TARGETS)
    os.makedirs(FUZZ, exist_ok=True)
    cc = compiler()
    if not cc:
        print("skipped: no clang with libFuzzer (Debian: apt install clang libclang-rt-14-dev)")
        print(f"0 passed, 0 failed, {len(targets)} skipped")
        return 0
    passed = 0
    for target in targets:
        print(f"{target:14} ", end="", flush=True)
        passed += (look_for_plant if planted else look_for_bugs)(cc, target, seconds)
    print(f"{passed} passed, {len(targets) - passed} failed, 0 skipped")
    return passed != len(targets)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
