#!/usr/bin/env python3
"""Checks ./run from the outside: against the golden numbers, and that whatever is wrong ends well.

    python3 tests/test_run.py [./run]       the last line is "N passed, N failed"

It needs nothing but Python: the model files are written here and in modelbin.py, from the description
of the format, so that this writer and export.py check each other through the reader in
lib/modelfile.h.
"""
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True
import modelbin

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN, VERSION_1 = os.path.join(HERE, "golden"), os.path.join(HERE, "version1")
RUN = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(HERE, "..", "run"))

passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}{': ' if detail != '' else ''}{str(detail)[:400]}")


# ---- files ------------------------------------------------------------------------------------

def read_safetensors(path):
    """name -> (shape, numbers)"""
    with open(path, "rb") as f:
        data = f.read()
    n, = struct.unpack_from("<Q", data)
    tensors = {}
    for name, t in json.loads(data[8:8 + n]).items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            numbers = array({"F32": "f", "I32": "i"}[t["dtype"]])
            numbers.frombytes(data[8 + n + begin:8 + n + end])
            tensors[name] = t["shape"], numbers
    return tensors


SLOTS = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
num_attention_heads n_shared_experts n_routed_experts num_experts_per_tok kv_lora_rank q_lora_rank
qk_nope_head_dim qk_rope_head_dim v_head_dim inner_iter inner_residual outer_residual use_igate
topk_method n_group topk_group norm_topk_prob routed_scaling_factor first_k_dense_replace
moe_layer_freq aux_loss_alpha seq_aux rms_norm_eps rope_theta rope.type rope.factor
rope.original_max_position_embeddings rope.beta_fast rope.beta_slow rope.mscale rope.mscale_all_dim
max_position_embeddings attention_bias tie_word_embeddings initializer_range bos_token_id
eos_token_id torch_dtype temperature top_k top_p min_p repetition_penalty add_bos_token
chat_template""".split()
REAL = """routed_scaling_factor aux_loss_alpha rms_norm_eps rope_theta rope.factor rope.beta_fast
rope.beta_slow rope.mscale rope.mscale_all_dim initializer_range temperature top_p min_p
repetition_penalty""".split()
WORDS = {"topk_method": ["greedy", "group_limited_greedy"], "rope.type": [None, "linear", "yarn"],
         "torch_dtype": ["float32", "bfloat16"], "chat_template": ["none", "deepseek_v2"]}
NULL = {"bos_token_id": -1, "eos_token_id": -1, "n_group": 1, "topk_group": 1}     # others: 0
DEFAULT = {"rope.factor": 1, "rope.original_max_position_embeddings": 4096, "rope.beta_fast": 32,
           "rope.beta_slow": 1, "rope.mscale": 1, "rope.mscale_all_dim": 0, "temperature": -1,
           "top_k": -1, "top_p": -1, "min_p": -1, "repetition_penalty": -1, "add_bos_token": 0,
           "chat_template": "none"}


def tensor_list(c, upcycled):
    """(name with {} for the copy, copies, rows, columns) in the order of the file."""
    V, d, H, I = (c[k] for k in ("vocab_size", "hidden_size", "num_attention_heads",
                                 "intermediate_size"))
    R, r, f = c["kv_lora_rank"], c["q_lora_rank"] or 0, c["moe_intermediate_size"]
    dn, dr, dv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    E, S, C = c["n_routed_experts"] or 0, c["n_shared_experts"] or 0, c["inner_iter"]
    bias, own = c["attention_bias"], c["use_igate"]
    yield "model.embed_tokens.weight", 1, V, d
    for l in range(c["num_hidden_layers"]):
        moe = E and l >= c["first_k_dense_replace"] and l % c["moe_layer_freq"] == 0
        a, m = f"model.layers.{l}.self_attn.", f"model.layers.{l}.mlp."
        yield f"model.layers.{l}.input_layernorm.weight", 1, 1, d
        if r:
            yield a + "q_a_proj.weight", 1, r, d
            yield a + "q_a_proj.bias", bias, 1, r
            yield a + "q_a_layernorm.weight", 1, 1, r
            yield a + "q_b_proj.weight", 1, H * (dn + dr), r
        else:
            yield a + "q_proj.weight", 1, H * (dn + dr), d
        yield a + "kv_a_proj_with_mqa.weight", 1, R + dr, d
        yield a + "kv_a_proj_with_mqa.bias", bias, 1, R + dr
        yield a + "kv_a_layernorm.weight", 1, 1, R
        yield a + "kv_b_proj.weight", 1, H * (dn + dv), R
        yield a + "o_proj.weight", 1, d, H * dv
        yield a + "o_proj.bias", bias, 1, d
        yield f"model.layers.{l}.post_attention_layernorm.weight", 1, 1, d
        if moe:
            yield m + ("gate.{}.weight" if own else "gate.weight"), C if own else 1, E, d
            for part, rows, cols in (("gate", f, d), ("up", f, d), ("down", d, f)):
                yield m + "experts.{}." + part + "_proj.weight", E, rows, cols
            for part, rows, cols in (("gate", f * S, d), ("up", f * S, d), ("down", d, f * S)):
                yield m + f"shared_experts.{part}_proj.weight", S > 0, rows, cols
            yield m + "coe_weights.{}", (C - 1) * upcycled, 1, d
            corrected = "gate.{}.e_score_correction_bias" if own else "gate.e_score_correction_bias"
            yield m + corrected, (C if own else 1) * (c["topk_method"] == "noaux_tc"), 1, E
        else:
            for part, rows, cols in (("gate", I, d), ("up", I, d), ("down", d, I)):
                yield m + f"{part}_proj.weight", 1, rows, cols
    yield "model.norm.weight", 1, 1, d
    yield "lm_head.weight", not c["tie_word_embeddings"], V, d


def tokenizer_section(merges, added, stages, ahead=()):
    """The tokenizer's section: added tokens (text, flags) that are `ahead`, 256 bytes, merges
    (left, right) by rank, more added tokens; a stage is alternatives, of items (kind, ranges, least,
    most)."""
    tokens = [*(t for t, _ in ahead), *(bytes([i]) for i in range(256)),
              *(a + b for a, b in merges), *(t for t, _ in added)]
    byte, after = len(ahead), len(ahead) + 256 + len(merges)
    merged = sorted((tokens.index(a), tokens.index(b), rank, byte + 256 + rank)
                    for rank, (a, b) in enumerate(merges))
    added = [(*token, i) for i, token in [*enumerate(ahead), *enumerate(added, after)]]
    special = sorted((text, i, flags) for text, flags, i in added)
    alternatives = [a for stage in stages for a in stage]
    items = [item for a in alternatives for item in a]
    starts = lambda parts: [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
    ranges = [item[1] for item in items]                # every item has a class of its own
    tables = [starts(tokens), b"".join(tokens), range(byte, byte + 256), [], sum(merged, ()),
              starts(stages), starts(alternatives),
              sum(((k, i, *n) for i, (k, _, *n) in enumerate(items)), ()),
              sum(zip(starts(ranges), map(len, ranges)), ()),
              sum((r for part in ranges for r in part), ()), sum((a[1:] for a in special), ()), []]
    section = struct.pack("<16I", len(tokens), sum(map(len, tokens)), 0, len(merges), len(stages),
                          len(alternatives), len(items), len(ranges), sum(map(len, ranges)),
                          len(added), 0, *[0] * 5)
    for table in tables:
        section += table if isinstance(table, bytes) else array("I", table).tobytes()
        section += bytes(-len(section) % 64)
    return section


SPACE, DARK, DIGIT = [(9, 13), (32, 32)], [(0, 8), (14, 31), (33, 0x10FFFF)], [(48, 57)]
NO_LIMIT = 2**32 - 1
WORDS_AND_DIGITS = tokenizer_section(
    [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"1", b"2"), (b"\xc3", b"\xbc")],      # ü
    [(b"<bos>", 1), (b"<eos>", 1), (b"<tag>", 0)],                      # 261, 262, 263
    [[[(0, DIGIT, 1, 3)]],
     [[(0, [(32, 32)], 0, 1), (0, DARK, 1, NO_LIMIT)],
      [(0, SPACE, 1, NO_LIMIT), (1, DARK, 0, 0)], [(0, SPACE, 1, NO_LIMIT)]]])


def to_bf16(numbers):
    """The bytes in a file, and the numbers that they stand for."""
    bits = array("I", array("f", numbers).tobytes())
    halves = array("H", ((x + 0x7FFF + (x >> 16 & 1)) >> 16 for x in bits))
    return halves.tobytes(), array("f", array("I", (x << 16 for x in halves)).tobytes())


def to_q8(numbers, cols):
    """The same for int8 in groups of 64 along rows of `cols` numbers."""
    q, scales, values = array("b"), array("f"), array("f")
    for row in range(0, len(numbers), cols):
        for first in range(row, row + cols, 64):
            group = numbers[first:min(first + 64, row + cols)]
            scales.append(max(map(abs, group)) / 127)
            q.extend(round(x / scales[-1]) if scales[-1] else 0 for x in group)
            values.extend(x * scales[-1] for x in q[len(values):])
    parts = (q.tobytes(), scales.tobytes())
    return b"".join(part + bytes(-len(part) % 64) for part in parts), values


def write_model(path, config, weight, tokenizer=0, upcycled=False, dtype="f32", decoded=False,
                section=b"", version=2):
    """A model.bin; weight(name, size) gives the numbers of a tensor. `decoded`: matrices hold the
    numbers that they would have in a file of this type, but as float32."""
    c = {**DEFAULT, **config}
    c |= {"rope." + key: value for key, value in (c.get("rope_scaling") or {}).items()}
    body = b""
    for name, copies, rows, cols in tensor_list(c, upcycled):
        matrix = not re.search(r"norm|bias|mlp.gate\.|coe_weights|correction", name)
        for e in range(copies):
            numbers = array("f", weight(name.format(e), rows * cols))
            narrow = numbers.tobytes()
            if matrix and dtype != "f32":
                narrow, numbers = to_bf16(numbers) if dtype == "bf16" else to_q8(numbers, cols)
            body += numbers.tobytes() if decoded else narrow
        body += bytes(-len(body) % 64)
    file_slots = [0 if decoded else ["f32", "bf16", "q8"].index(dtype), tokenizer, upcycled]
    slots = b"COE1" + struct.pack("<I", 1)
    slots += struct.pack("<15q", 1024 + len(section) + len(body), 0, len(section), 0,
                         *file_slots, *[0] * 8)
    for name in SLOTS:
        value = c.get(name)
        if name in WORDS:
            value = WORDS[name].index(value) if value in WORDS[name] else 0
        elif value is None:
            value = NULL.get(name, 0)
        slots += struct.pack("<d" if name in REAL else "<q", value)
    data = slots.ljust(1024, b"\0") + section + body
    with open(path, "wb") as f:
        f.write(data if version == 1 else modelbin.build(modelbin.parse(data)))
    if c["topk_method"] == "noaux_tc":                  # what version 1 did not have
        change_lines(path, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})
    if c.get("prenorm_chain"):
        change_lines(path, {"prenorm_chain": "true"})


def write_golden(name, path, **how):
    """The golden model of a name as a model.bin; returns its config and golden tensors."""
    folder = os.path.join(GOLDEN, name)
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    if config["model_type"] == "deepseek_v3":
        config |= {"inner_iter": 1, "inner_residual": False, "outer_residual": True,
                   "use_igate": False}
    weights = read_safetensors(os.path.join(folder, "model.safetensors"))
    used = set()

    def weight(name, size):
        used.add(name)
        assert math.prod(weights[name][0]) == size, name
        return weights[name][1]
    write_model(path, config, weight, upcycled=any(".coe_weights." in k for k in weights),
                **how)
    check(f"{name}: all tensors are written", used == weights.keys(), weights.keys() - used)
    return config, read_safetensors(os.path.join(folder, "golden.safetensors"))


TINY = {"vocab_size": 258, "hidden_size": 12, "intermediate_size": 10, "moe_intermediate_size": 6,
        "num_hidden_layers": 2, "num_attention_heads": 2, "n_shared_experts": 1,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 6, "q_lora_rank": None,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "inner_iter": 2,
        "inner_residual": True, "outer_residual": False, "use_igate": True,
        "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "attention_bias": False, "tie_word_embeddings": False, "initializer_range": 0.02,
        "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32", "add_bos_token": 1}


def write_tiny(path, tokenizer=1, spoil=None, section=b"", **config):
    """A model of random weights, for bytes. The tensor called `spoil` gets a NaN."""
    rng = random.Random(1)

    def weight(name, size):
        if size and name == spoil:
            return [math.nan] * size
        if "norm" in name:
            return [1.0] * size
        return [rng.gauss(0, 0.5) for _ in range(size)]
    write_model(path, TINY | config, weight, tokenizer, section=section)
    return path


def change_lines(path, lines):
    """Changes lines of a model.bin's config, or adds them."""
    with open(path, "rb") as f:
        model = modelbin.parse(f.read())
    with open(path, "wb") as f:
        f.write(modelbin.build(model._replace(config=model.config | lines)))
    return path


# ---- running ----------------------------------------------------------------------------------

class Result:
    def __init__(self, code, out, err):
        self.code, self.raw, self.out = code, out, out.decode("utf-8", "replace")
        self.err = err.decode("utf-8", "replace")
        self.errors = [line for line in self.err.splitlines() if line.startswith("run: ")]

    def ids(self):
        return [int(x) for x in self.out.split()]

    def values(self):
        return dict(line.split(" ", 1) for line in self.out.splitlines())

    def __str__(self):
        return f"exit {self.code}, stdout {self.out[:80]!r}, stderr {self.err[-300:]!r}"


def run(*args, threads=1, timeout=30, program=None, **more):
    command = [program or RUN, *map(str, args)] + ([f"--threads={threads}"] if threads else [])
    pipe = subprocess.PIPE
    more = {"stdout": pipe, "stderr": pipe} | more
    if "input" not in more:
        more = {"stdin": subprocess.DEVNULL} | more
    try:
        done = subprocess.run(command, timeout=timeout, **more)
    except subprocess.TimeoutExpired:
        return Result("timeout", b"", b"")
    return Result(done.returncode, done.stdout or b"", done.stderr or b"")


def as_ordinary_user(folder, program):
    """(the program, how subprocess runs it) for a user to whom permissions apply, which root is
    not: under root as nobody, who gets into the folder, and to a copy of the program there."""
    if os.getuid():
        return program, {}
    os.chmod(folder, 0o755)
    copy = shutil.copy(program, os.path.join(folder, "program"))
    os.chmod(copy, 0o755)
    return copy, {"user": 65534, "group": 65534, "extra_groups": []}


def failing(folder, *programs):
    """The environment in which programs meet what tests/failing.c pretends, or None where it cannot
    be loaded into them: without glibc, or with a sanitizer, which wants to be the first itself."""
    library, source = os.path.join(folder, "failing.so"), os.path.join(HERE, "failing.c")
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        return None
    there = {**os.environ, "LD_PRELOAD": library}
    for program in programs:
        done = subprocess.run([program, "--version"], capture_output=True, env=there)
        if done.returncode or done.stderr:
            return None
    return there


def text_of(ids):
    return " ".join(map(str, ids))


def read_weights(path):
    """The weights of a model file in float32, as they lie there."""
    return array("f", modelbin.read(path).weights)


def read_floats(path):
    numbers = array("f")
    with open(path, "rb") as f:
        numbers.frombytes(f.read())
    return numbers


def cross_entropy(logits, target):
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[target]


def furthest(a, b):
    return max((abs(x - y) if x == x else math.inf for x, y in zip(a, b, strict=True)), default=0)


# ---- the model, against the reference ---------------------------------------------------------

def test_golden(name, folder):
    model, table = os.path.join(folder, name + ".bin"), os.path.join(folder, name + ".tsv")
    logits_file = os.path.join(folder, name + ".logits")
    config, golden = write_golden(name, model)
    V, n, K = config["vocab_size"], golden["tokens"][0][1], config["num_experts_per_tok"]
    tokens, targets, logits = (golden[k][1] for k in ("tokens", "targets", "logits"))
    scale, loss, worst_weight = max(map(abs, logits)), 0, 0
    worst = 0
    for b in range(2):
        sequence = [*tokens[b * n:(b + 1) * n], targets[(b + 1) * n - 1]]
        r = run(model, "-m", "eval", "--ids", "-i", text_of(sequence), "--logits", logits_file,
                "--trace", table)
        check(f"{name}: eval", r.code == 0 and r.values()["tokens"] == str(n), r)
        ours = read_floats(logits_file)
        check(f"{name}: a row of logits for every token", len(ours) == (n + 1) * V, len(ours))
        worst = max(worst, furthest(ours[:n * V], logits[b * n * V:(b + 1) * n * V]) / scale)
        loss += sum(cross_entropy(ours[i * V:(i + 1) * V], targets[b * n + i])
                    for i in range(n)) / (2 * n)
        with open(table) as f:
            head, *lines = f.read().splitlines()
        check(f"{name}: header of the trace",
              head == "position\ttoken\tlayer\titeration\trank\texpert\tweight\tmodel", head)
        expected = []           # every layer with experts, position by position
        for position in range(n):
            for key in sorted(k for k in golden if k.startswith("routing") and "experts" in k):
                _, layer, t, _ = key.split(".")
                for rank in range(K):
                    at = (b * n + position) * K + rank
                    weight = golden[key.replace("experts", "weights")][1][at]
                    expected.append(([position, sequence[position], int(layer), int(t), rank,
                                      golden[key][1][at]], weight))
        rows = [line.split("\t") for line in lines]
        with open(model, "rb") as f:
            crc = f"{struct.unpack_from('<I', f.read(12), 8)[0]:08x}"
        check(f"{name}: the trace names the model", {row[7] for row in rows} in ({crc}, set()), crc)
        rows = [([*map(int, row[:6])], float(row[6])) for row in rows if int(row[0]) < n]
        check(f"{name}: routing", [x for x, _ in rows] == [x for x, _ in expected],
              [x for x in zip(rows, expected) if x[0][0] != x[1][0]][:1] or len(rows))
        worst_weight = max(worst_weight, furthest([w for _, w in rows], [w for _, w in expected]))
    check(f"{name}: logits", worst < 5e-5, f"{worst:.2e} of the largest")
    check(f"{name}: weights of the experts", worst_weight < 1e-5, f"{worst_weight:.2e}")
    with open(os.path.join(GOLDEN, name, "golden.json")) as f:
        reference = json.load(f)
    check(f"{name}: loss", abs(loss - reference["loss"]) < 1e-5, f"{loss}, {reference['loss']}")
    greedy, p = list(golden["greedy"][1]), reference["prompt_tokens"]
    for threads in (1, 2):
        r = run(model, "--ids", "-t", 0, "--ignore-eos", "-n", reference["new_tokens"], "-i",
                text_of(greedy[:p]), threads=threads)
        check(f"{name}: greedy, {threads} threads", r.code == 0 and r.ids() == greedy, r)
    r = run(model, "-m", "info")
    names = {name.format(e): f"{rows}x{cols} f32" if rows > 1 else f"{cols} f32"
             for name, copies, rows, cols in tensor_list({**DEFAULT, **config}, name == "upcycled")
             for e in range(copies)}
    values = r.values() if r.code == 0 else {}
    check(f"{name}: info lists the tensors", names.items() <= values.items(),
          names.items() - values.items())
    check(f"{name}: info shows the config",
          all(values.get(k) == str(config[k]) for k in ("vocab_size", "inner_iter")) and
          not any("e-" in v for k, v in values.items() if "weight" not in k), r)
    return worst, worst_weight


def test_types(folder):
    """bf16 and q8 compute what float32 does with the same numbers, for many rows and for one."""
    narrow, wide, logits_file = (os.path.join(folder, x) for x in ("narrow", "wide", "logits"))
    for name in sorted(os.listdir(GOLDEN)):
        for dtype in ("bf16", "q8"):
            config, golden = write_golden(name, narrow, dtype=dtype)
            write_golden(name, wide, dtype=dtype, decoded=True)
            tokens, logits, greedy = text_of(golden["tokens"][1][:24]), [], []
            for model in (narrow, wide):
                run(model, "-m", "eval", "--ids", "-i", tokens, "--logits", logits_file)
                logits.append(read_floats(logits_file))
                greedy.append(run(model, "--ids", "-t", 0, "--ignore-eos", "-n", 20, "-i",
                                  text_of(golden["tokens"][1][:5])).ids())
                one = run(model, "--ids", "-m", "eval", "-i", text_of(golden["tokens"][1][:2]),
                          "--logits", logits_file)
                logits[-1] += read_floats(logits_file)
            off = furthest(*logits) / max(map(abs, logits[1]))
            check(f"{name}: {dtype} is float32 with the same numbers",
                  len(logits[0]) == 26 * config["vocab_size"] and off < 1e-5, f"{off:.2e}, {one}")
            check(f"{name}: {dtype} continues as float32", greedy[0] == greedy[1] != [], greedy)
    r = run(narrow, "-m", "info")
    types = [line.split()[-1] for line in r.out.splitlines() if ".weight " in line]
    check("info shows the types", "dtype q8" in r.out and {*types} == {"f32", "q8"}, r)


def write_with(path, name, numbers, dtype="f32", **config):
    """A tiny model in which the tensors whose names have `name` in them hold numbers(size)."""
    rng = random.Random(1)

    def weight(tensor, size):
        if name in tensor:
            return numbers(size)
        return [1.0] * size if "norm" in tensor else [rng.gauss(0, 0.5) for _ in range(size)]
    write_model(path, TINY | config, weight, 1, dtype=dtype)
    return path


def read_trace(path):
    """{(position, layer, iteration): [(expert, weight), ...]}"""
    calls = {}
    with open(path) as f:
        for line in list(f)[1:]:
            position, _, layer, iteration, _, expert, w, _ = line.split("\t")
            calls.setdefault((position, layer, iteration), []).append((int(expert), float(w)))
    return calls


def test_numbers(folder):
    """Weights that are no numbers in any type; routers with ties and underflow; tiny numbers."""
    here = lambda name: os.path.join(folder, name)
    matrix, norm = "layers.1.mlp.experts.2.up_proj.weight", "layers.1.post_attention_layernorm"
    for dtype in ("f32", "bf16"):
        for x in (math.nan, math.inf, -math.inf):
            model = write_with(here("bad.bin"), matrix, lambda n: [x] * n, dtype)
            for args in (("-i", "x" * 40, "-n", 2), ("-m", "eval", "-i", "x" * 40),
                         ("-m", "lens", "-i", "x" * 40)):
                r = run(model, *args)
                check(f"{x} in {dtype} is named, {args[0]}", r.code == 1 and matrix in r.err, r)
    model = modelbin.read(write_with(here("q8.bin"), "nothing", None, "q8"))
    weights = bytearray(model.weights)
    for x in (math.nan, math.inf):                      # the last scale of lm_head
        at = len(weights) - 64 * 258 % 64 - 64
        struct.pack_into("<16f", weights, at, *[x] * 16)
        modelbin.write(here("bad.bin"), model._replace(weights=bytes(weights)))
        r = run(here("bad.bin"), "-i", "x", "-n", 2)
        check(f"{x} as a scale of q8 is named", r.code == 1 and "lm_head.weight" in r.err, r)
    r = run(write_with(here("bad.bin"), norm, lambda n: [math.nan] * n), "-i", "x", "-n", 2)
    check("NaN in a norm is named", r.code == 1 and norm in r.err, r)

    for E, K in ((4, 2), (7, 3)):
        sizes = {"n_routed_experts": E, "num_experts_per_tok": K}
        run(write_with(here("tie.bin"), "mlp.gate.", lambda n: [0.0] * n, **sizes), "-m", "eval",
            "-i", "abc", "--trace", here("routing"))
        calls = read_trace(here("routing"))
        check("equal logits: the lowest experts, of equal weight", len(calls) == 16 and all(
            call == [(e, call[0][1]) for e in range(K)] for call in calls.values()), calls)
        rng = random.Random(2)
        run(write_with(here("under.bin"), "mlp.gate.", lambda n: [rng.gauss(0, 1e6)
                                                                  for _ in range(n)], **sizes),
            "-m", "eval", "-i", "abc", "--trace", here("routing"))
        calls = read_trace(here("routing"))
        check("the others underflow to 0: the lowest of them", len(calls) == 16 and all(
            call[0][1] == 1 and max(w for _, w in call[1:]) < 1e-37 and [e for e, _ in call[1:]] ==
            [e for e in range(E) if e != call[0][0]][:K - 1] for call in calls.values()), calls)
    seconds = []
    for scale in (0.5, 1e-39):
        rng = random.Random(3)
        model = write_with(here("tiny_numbers.bin"), "proj", lambda n: [rng.gauss(0, scale)
                                                                       for _ in range(n)],
                           hidden_size=128, moe_intermediate_size=64, max_position_embeddings=2048)
        start = time.monotonic()
        r = run(model, "-m", "eval", "-i", "x" * 2000)
        seconds.append(time.monotonic() - start)
        check("denormal numbers", r.code == 0 and float(r.values()["nll"]) > 0, r)
    check("denormal numbers are not much slower", seconds[1] < 10 * seconds[0] + 1, seconds)


def test_underflow(folder):
    """All scores are 0, or next to it: with sigmoid, a logit of -10^5. The lowest experts that the
    groups allow are chosen, and weigh nothing, also where weights are divided by their sum."""
    here = lambda name: os.path.join(folder, name)

    def numbers(name, size):                            # then each y is (1, 1, ..., 1)
        if re.search("o_proj|down_proj|correction", name):
            return [0.0] * size
        return [-1e5 if "mlp.gate." in name else 1.0] * size
    for groups, kept, chosen in ((1, 1, [0, 1, 2]), (2, 1, [0, 1, 2]), (4, 2, [0, 1, 2])):
        for normalise in (False, True):
            write_model(here("under.bin"), TINY | {
                "n_routed_experts": 8, "num_experts_per_tok": 3, "topk_method": "noaux_tc",
                "n_group": groups, "topk_group": kept, "norm_topk_prob": normalise}, numbers, 1)
            r = run(here("under.bin"), "-m", "eval", "-i", "abc", "--trace", here("routing"))
            calls = read_trace(here("routing")) if r.code == 0 else {}
            check(f"all scores are 0, {groups} groups, normalised: {normalise}", len(calls) == 16
                  and all([e for e, _ in call] == chosen and all(0 <= w < 1e-15 for _, w in call)
                          for call in calls.values())
                  and math.isfinite(float(r.values()["nll"])), (str(r), calls))


def test_memory(folder):
    """A limit on memory, wherever it strikes, ends in a line; a large context costs nothing."""
    here = lambda name: os.path.join(folder, name)
    model = write_tiny(here("m.bin"), max_position_embeddings=163840, chat_template="deepseek_v2")
    r = run(model, "-n", 3)
    check("a context of 163840 takes what is needed", r.code == 0, r)
    if "san" in subprocess.run(["ldd", RUN], capture_output=True, text=True).stdout:
        return                                          # the sanitizers take terabytes
    ended = {0: 0, 1: 0}
    for megabytes in (*range(2, 40, 2), 60, 100, 400):
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
        r = run(model, "-m", "chat", "-c", 163840, "--threads", 1, preexec_fn=limit)
        if "shared libraries" not in r.err:             # with less it is not even loaded
            ended[r.code] = ended.get(r.code, 0) + 1
            check(f"{megabytes} MB: how much, for what", r.code == 0 or r.code == 1 and
                  re.search(r"out of memory: \d+\.\d MB for \w|m\.bin: \d+\.\d MB cannot be mapped",
                            r.errors[-1]), r)
    check("some are too few, some enough", ended[0] and ended[1] and len(ended) == 2, ended)


# ---- eval -------------------------------------------------------------------------------------

def test_eval(folder):
    model = write_tiny(os.path.join(folder, "tiny.bin"))
    file, logits_file = os.path.join(folder, "text"), os.path.join(folder, "logits")
    text = "Grüße, \0 <|endoftext|>\n".encode() + bytes([0xff, 0xc0, 0xaf])
    with open(file, "wb") as f:
        f.write(text)
    ids = [256, *(257 if b == 1 else b for b in text.replace(b"<|endoftext|>", b"\1"))]
    r = run(model, "-m", "tokenize", "-f", file)
    check("tokenize a file", r.code == 0 and r.ids() == ids[1:], r)
    r = run(model, "-m", "eval", "-f", file, "--allow_bytes", "--logits", logits_file)
    logits, V = read_floats(logits_file), TINY["vocab_size"]
    ids = [256, *text, 257]     # a marker within a line is text to eval, and the document ends
    check("eval: logits of a text, its BOS and its EOS", len(logits) == len(ids) * V, len(logits))
    nats = sum(cross_entropy(logits[i * V:(i + 1) * V], ids[i + 1]) for i in range(len(ids) - 1))
    values = {k: float(v) for k, v in r.values().items()}
    expected = {"tokens": len(ids) - 1, "nll": nats / (len(ids) - 1),
                "ppl": math.exp(nats / (len(ids) - 1)),
                "bits_per_byte": nats / math.log(2) / len(text)}
    check("eval: what it prints follows from the logits", values.keys() == expected.keys() and
          all(abs(values[k] - expected[k]) < 1e-5 * expected[k] for k in expected),
          (values, expected))
    check("eval: 7 digits, no exponent", all(len(v.replace(".", "").lstrip("0")) >= 7 and
          "e" not in v for k, v in r.values().items() if k != "tokens"), r)

    long = [random.Random(2).randrange(V) for _ in range(50)]
    with open(file, "w") as f:
        f.write("\n".join(map(str, long)))
    r = run(model, "-m", "eval", "--ids", "-f", file, "-c", 16, "--logits", logits_file, "--trace",
            file + ".tsv")
    windows, expected = read_floats(logits_file), array("f")
    for start in range(0, 43, 8):
        end = min(start + 16, 50)
        run(model, "-m", "eval", "--ids", "-i", text_of(long[start:end]), "--logits", logits_file)
        expected += read_floats(logits_file)[(len(expected) // V - start) * V:]
    check("eval: windows", len(windows) == 50 * V and furthest(windows, expected) < 1e-5, r)
    nats = sum(cross_entropy(expected[i * V:(i + 1) * V], long[i + 1]) for i in range(49))
    check("eval: nll over windows", abs(float(r.values()["nll"]) - nats / 49) < 1e-5, r)
    check("eval --ids has no bits_per_byte", "bits_per_byte" not in r.values(), r)
    with open(file + ".tsv") as f:
        positions = [int(line.split("\t")[0]) for line in f.readlines()[1:]]
    check("eval: the trace has every token once, with 2 layers of 2 iterations of 2 experts",
          positions == [p for p in range(50) for _ in range(8)], positions[:20])

    # 700 tokens are two chunks; fed one by one they give the same.
    big = write_tiny(os.path.join(folder, "long.bin"), max_position_embeddings=1024)
    long = [random.Random(3).randrange(V) for _ in range(700)]
    one, two = (run(big, "-t", 0, "--ids", "--ignore-eos", "-n", 3, "-i", text_of(long[:k]))
                for k in (700, 400))
    check("a long prompt", one.code == 0 and len(one.ids()) == 703 and two.code == 0, one)
    r = [run(big, "-m", "eval", "--ids", "-i", text_of(long), threads=t).out for t in (1, 2)]
    check("eval: threads change nothing", r[0] == r[1] and r[0], r)

    for what, args, code, lines in (
            ("empty text", ("-i", ""), 0, "tokens 0\n"),
            ("one id", ("--ids", "-i", "7"), 0, "tokens 0\n"),
            ("no ids", ("--ids", "-i", " \n"), 0, "tokens 0\n")):
        r = run(model, "-m", "eval", *args)
        check(f"eval: {what}", r.code == code and r.out == lines, r)


# ---- text -------------------------------------------------------------------------------------

def test_text(folder):
    model = os.path.join(folder, "tiny.bin")
    wild = ("-n", 60, "--ignore-eos", "-k", 0, "-t", 2)
    out = run(model, "-i", "é", "-s", 5, *wild)
    check("text begins with the prompt", out.code == 0 and out.out.startswith("é"), out)
    ids = run(model, "-i", "256 195 169", "--ids", "-s", 5, *wild)
    expected = bytes(i for i in ids.ids() if i < 256).decode("utf-8", "replace") + "\n"
    check("broken UTF-8 becomes U+FFFD", out.out == expected and "\ufffd" in expected,
          (out.out, expected))
    check("stdout is UTF-8", out.raw.decode("utf-8", "strict") == out.out)
    again = [run(model, "-i", "é", "-s", 5, *wild, threads=t) for t in (1, 2)]
    check("same seed, same text", all(r.raw == out.raw for r in again))
    check("other seed, other text", run(model, "-i", "é", "-s", 6, *wild).raw != out.raw)
    greedy = run(model, "-i", "x", "-n", 20, "-t", 0)
    for args in (("-p", 1e-9), ("-k", 1), ("--min-p", 1), ("-t", 1e-9), ("-t", 1e-40), ("-t", 0)):
        r = run(model, "-i", "x", "-n", 20, *args)
        check(f"{text_of(args)} is greedy", r.code == 0 and r.raw == greedy.raw, r)
    seed = [line for line in run(model, "-n", 1).err.splitlines() if "seed" in line]
    check("the seed is printed", seed and int(seed[0].split("seed ")[1]) > 0, seed)
    prompt = "héllo ✓ 🙂 日本"
    r = run(model, "-i", prompt, "-n", 0)
    check("-n 0 prints the prompt", r.code == 0 and r.out == prompt + "\n", r)
    r = run(model, "-n", -1, "--ignore-eos", "--ids", "-i", "1 2")
    check("-n -1 fills the context", len(r.ids()) == 64, len(r.ids()))
    r = run(model, "--ids", "-n", 2**40, "-c", 10, "--ignore-eos")
    check("an empty prompt starts from BOS, -n 2^40 and -c", r.code == 0 and r.ids()[0] == 256 and
          len(r.ids()) == 10, r)
    r = run(model, "-i", "", "-n", 5)
    check("an empty text starts from BOS", r.code == 0, r)
    r = run(model, "-i", "a" * 65, "-n", 5)
    check("a prompt longer than the context names both",
          r.code == 1 and "66" in r.err and "64" in r.err, r)
    r = run(model, "-m", "tokenize", "-i", "")
    check("tokenize nothing", r.code == 0 and r.out == "", r)
    r = run(model, "-m", "tokenize", "-i", "a<|endoftext|><|beginoftext|><|end")
    check("tokenize special tokens", r.ids() == [97, 257, 256, *b"<|end"], r)
    stop = write_tiny(os.path.join(folder, "stop.bin"), eos_token_id=ids.ids()[5])
    r = run(stop, "-i", "256 195 169", "--ids", "-s", 5, "-n", 60, "-k", 0, "-t", 2)
    check("generate stops at EOS", r.ids() == ids.ids()[:6], r)
    warm = write_tiny(os.path.join(folder, "warm.bin"), temperature=0.0, top_k=3, top_p=0.5,
                      min_p=0.25, repetition_penalty=1.5)
    r = run(warm, "-n", 3, "-k", 7, "-s", 1)
    check("the model's own sampling options, the command line's first",
          "temp 0, top-k 7, top-p 0.5, min-p 0.25, repeat-penalty 1.5, seed 1\n" in r.err, r)


def test_stream(folder):
    """What comes through the pipe at any time is whole characters."""
    model = os.path.join(folder, "tiny.bin")
    for seed in range(3):
        command = [RUN, model, "-n", "60", "-s", str(seed), "--ignore-eos", "-t", "3", "-k", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
            broken = False
            while part := os.read(p.stdout.fileno(), 65536):
                try:
                    part.decode("utf-8", "strict")
                except UnicodeDecodeError:
                    broken = True
        check("streamed text is whole characters", not broken and p.returncode == 0)


def test_bpe(folder):
    here = lambda name: os.path.join(folder, name)
    special = {"bos_token_id": 261, "eos_token_id": 262, "vocab_size": 270}
    model = write_tiny(here("bpe.bin"), 2, section=WORDS_AND_DIGITS, **special)
    for text, ids in (("the the12123", [257, 258, 259, 49, 50, 51]),
                      ("12the", [259, 257]), ("the  the\n ", [257, 32, 258, 10, 32]),
                      ("<bos>the<eos><tag> the", [261, 257, 262, 263, 258]),
                      ("<tag", [*b"<tag"]), ("ü", [260]), ("x\tthe", [120, 9, 257])):
        r = run(model, "-m", "tokenize", "-i", text)
        check(f"tokens of {text!r}", r.code == 0 and r.ids() == ids, r)
    with open(here("text"), "wb") as f:
        f.write(b"the\xff\xc3\x28 the")
    r = run(model, "-m", "tokenize", "-f", here("text"))
    check("bytes that are no UTF-8", r.ids() == [257, 0xff, 0xc3, 0x28, 258], r)
    r = run(model, "-m", "eval", "-i", "the the", "--logits", here("logits"))
    check("eval counts tokens, BOS included", r.values()["tokens"] == "2" and
          len(read_floats(here("logits"))) == 3 * 270, r)
    nats = float(r.values()["nll"]) * 2
    check("bits_per_byte counts bytes",
          abs(float(r.values()["bits_per_byte"]) - nats / math.log(2) / 7) < 1e-6, r)
    r = run(model, "-i", "<eos>the<tag> ü12", "-n", 0)
    check("special tokens are shown as nothing, others as they are", r.out == "the<tag> ü12\n", r)
    ids = run(model, "--ids", "-i", "261 257", "-n", 40, "-s", 3, "-t", 3, "-k", 0, "--ignore-eos")
    text = run(model, "-i", "the", "-n", 40, "-s", 3, "-t", 3, "-k", 0, "--ignore-eos")
    token = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"12", "ü".encode(), b"",
                                                b"", b"<tag>", *[b""] * 6]
    expected = b"".join(token[i] for i in ids.ids()).decode("utf-8", "replace") + "\n"
    check("text is that of the ids", text.code == 0 and text.out == expected, (text, expected))
    r = run(model, "-m", "info")
    check("info names the tokenizer", r.values()["tokenizer"] == "bpe", r)
    r = run(write_tiny(here("few.bin"), 2, section=WORDS_AND_DIGITS, vocab_size=263,
                       bos_token_id=261, eos_token_id=262), "-m", "info")
    check("more tokens than vocab_size", ends_well(r, False) and here("few.bin") in r.err and
          "263" in r.err and "264" in r.err, r)


def test_long_words(folder):
    """A word of 1 MB, and one of 9,400 A, whose pairs merge again and again: soon, and without
    recursion, which the small stack would not have room for."""
    here = lambda name: os.path.join(folder, name)
    merges = [(b"A" * 2**i, b"A" * 2**i) for i in range(12)] + [(b"a", b"b"), (b"ab", b"ab")]
    word = [[[(0, SPACE, 0, 1), (0, DARK, 1, NO_LIMIT)], [(0, SPACE, 1, NO_LIMIT)]]]
    model = write_tiny(here("words.bin"), 2, section=tokenizer_section(merges, [], word),
                       vocab_size=270, bos_token_id=None, eos_token_id=None)
    stack = lambda: resource.setrlimit(resource.RLIMIT_STACK, (256 << 10, 256 << 10))
    # All pairs of one rank merge from the left, then those of the next: 9400 = 2 * 4096 + ...
    powers = [256 + i - 1 if i else 65 for i in range(13)]
    counted = [powers[12]] * 2 + [powers[i] for i in range(11, -1, -1) if 9400 % 4096 >> i & 1]
    for what, text, wanted in (
            ("9,400 A", b"A" * 9400, counted), ("a word of 1 MB", b"ab" * 500000, [269] * 250000),
            ("1 MB without a pair", b"x" * 10**6, [120] * 10**6),
            ("1 MB of A", b"A" * 2**20, [powers[12]] * 2**8),
            ("1 MB of blanks", b" " * 10**6, None)):
        with open(here("text"), "wb") as f:
            f.write(text)
        for path in (model, here("tiny.bin")):
            start = time.monotonic()
            r = run(path, "-m", "tokenize", "-f", here("text"), preexec_fn=stack)
            check(f"{what}: soon", r.code == 0 and time.monotonic() - start < 3, r)
            ids = r.ids() if r.code == 0 else []
            right = wanted if path == model and wanted else [*text]
            check(f"{what}: its tokens", ids == right, (ids[:9], len(ids)))


def random_item(rng):
    """An item of a pattern over the letters abc, and the same for Python's re."""
    letters = "".join(rng.sample("abc", rng.randint(1, 3)))
    ranges = [(ord(x), ord(x)) for x in sorted(letters)]
    if rng.random() < 0.08:
        return (2, [], 0, 0), r"(?=\n|\Z)"
    if rng.random() < 0.12:
        return (1, ranges, 0, 0), f"(?![{letters}])"
    least, most = rng.choice([(1, 1), (0, 1), (0, NO_LIMIT), (1, NO_LIMIT), (2, NO_LIMIT), (1, 3),
                              (0, 2), (2, 2)])
    return (0, ranges, least, most), f"[{letters}]{{{least},{'' if most == NO_LIMIT else most}}}"


def merged(piece, ranks):
    """A piece as the ids that merging leaves: the lowest rank first, the leftmost of equals."""
    parts = [bytes([x]) for x in piece.encode()]
    while pairs := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_patterns(folder):
    """Random patterns, which overlap much, cut texts as Python's re does; and none takes long."""
    rng = random.Random(6)
    path = os.path.join(folder, "patterns.bin")
    merges = [(a.encode(), b.encode()) for a in "abc" for b in "abc"]
    merges += [(a + b, c + d) for a, b in merges for c, d in merges[:4]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    numbers = {bytes([i]): i for i in range(256)} | {a + b: 256 + r for (a, b), r in ranks.items()}
    sizes = {"vocab_size": 256 + len(merges), "bos_token_id": -1, "eos_token_id": -1}

    def tokens_of(stages, text):
        model = write_tiny(path, 2, section=tokenizer_section(merges, [], stages), **sizes)
        with open(os.path.join(folder, "text"), "w") as f:
            f.write(text)
        return run(model, "-m", "tokenize", "-f", os.path.join(folder, "text"), timeout=20)
    for _ in range(150):
        alternatives, regex = [], []
        while len(alternatives) < 3:
            items = [random_item(rng) for _ in range(rng.randint(1, 6))]
            if any(item[2] for item, _ in items):
                alternatives.append([item for item, _ in items])
                regex.append("".join(part for _, part in items))
        text = "".join(rng.choices("aabbc\n", [9, 3, 5, 3, 2, 1], k=200))
        pieces = [x for x in re.split(f"({'|'.join(regex)})", text) if x]
        wanted = [numbers[part] for piece in pieces for part in merged(piece, ranks)]
        r = tokens_of([alternatives], text)
        check(f"{'|'.join(regex)} cuts as re does", r.code == 0 and r.ids() == wanted, (text, r))
    a, ab = (0, [(97, 97)], 0, NO_LIMIT), (0, [(97, 98)], 0, 1)
    b = (0, [(98, 98)], 1, 1)
    for what, items in (("x?a*b", [(0, [(99, 99)], 0, 1), a, b]), ("a*a*a*a*a*b", [a] * 5 + [b]),
                        ("thirty times a*", [a] * 30 + [b]), ("thirty times [ab]?", [ab] * 30 + [b]),
                        ("[ab]?a*, five times", [ab, a] * 5 + [b])):
        start = time.monotonic()
        r = tokens_of([[items]], "a" * 20000)
        check(f"{what} does not take long", time.monotonic() - start < 3 and
              (r.code == 0 or ends_well(r, False) and "too long" in r.err), r)
        behind = tokens_of([[items]], "ü" + "a" * 20000)
        check(f"{what}: nor behind a character of two bytes", behind.code == r.code and
              len(behind.ids()) == len(r.ids()) + 2 * (r.code == 0), behind)


# ---- lens and edits ----------------------------------------------------------------------------

def test_lens(folder):
    """The grid fits, the table ends in eval's loss, and what does not apply is refused by name."""
    here = lambda name: os.path.join(folder, name)
    model = write_tiny(here("lens.bin"), max_position_embeddings=600)
    text = "Grüße\n to all, " * 60
    with open(here("text"), "w") as f:
        f.write(text)
    for args in (("-i", text[:30]), ("-f", here("text")), ("-i", "x"), ("-i", ""), ("--ids", "-i", "5 6 7"),
                 ("-i", text[:40], "--layer", 1), ("-i", text[:700], "-c", 100)):
        evaluated = run(model, "-m", "eval", *(x for x in args if x not in ("--layer", 1)))
        r = run(model, "-m", "lens", *args, "--lens", here("lens.tsv"))
        check(f"lens {args[:3]}", r.code == 0 and not r.errors, r)
        check("the grid has 80 columns", max(map(len, r.out.splitlines())) <= 80, r)
        values = dict(line.split(" ") for line in evaluated.out.splitlines())
        check("its nll is eval's", "nll" not in values or f"nll {values['nll']}\n" in r.out,
              (values, r))
        with open(here("lens.tsv")) as f:
            head, *rows = [line.rstrip("\n").split("\t") for line in f]
        check("the columns", head == """position token layer iterations guess p_guess p_next loss
            ffn_norm y_norm shared_part other_choice model""".split(), head)
        rows = [dict(zip(head, row)) for row in rows]
        count = int(values["tokens"]) + 1
        check("a line for every token, layer and iteration", len(rows) == count * 2 * 3, len(rows))
        last = [float(x["loss"]) for x in rows if x["layer"] == "1" and x["iterations"] == "2"
                and x["loss"]]
        check("the last rows are eval's loss", not last or
              abs(sum(last) / len(last) - float(values["nll"])) < 1e-6, (last, values))
        with open(model, "rb") as f:
            check("the fingerprint", {x["model"] for x in rows} ==
                  {f"{struct.unpack_from('<I', f.read(), 8)[0]:08x}"})
    many = write_tiny(here("many.bin"), num_hidden_layers=9)
    r = run(many, "-m", "lens", "-i", "abc")
    check("as many layers as fit", r.code == 0 and "layers 5 to 8 of 9" in r.err and
          max(map(len, r.out.splitlines())) <= 80, r)

    shared_gate = write_tiny(here("shared.bin"), use_igate=False, n_shared_experts=0)
    outer = write_tiny(here("outer.bin"), inner_residual=False, outer_residual=True)
    single = write_tiny(here("single.bin"), inner_iter=1)
    dense = write_tiny(here("dense2.bin"), first_k_dense_replace=1)
    for path, options, word in (
            (model, ("--silence", "layer=2"), "layer=2"), (model, ("--silence", "iteration=2"), "2"),
            (model, ("--silence", "expert=4"), "expert=4"), (model, ("--silence", "head=2"), "head=2"),
            (model, ("--silence", "expert=1,shared"), "together"), (model, ("--silence", ""), "all"),
            (model, ("--silence", "head=1,iteration=0"), "together"), (model, ("--silence", "x=1"), "all"),
            (model, ("--silence", "head=0,expert=0"), "together"),
            (model, ("--silence", "layer=1,layer=1"), "once"), (model, ("--silence", "layer=-1"), "all"),
            (model, ("--silence", "layer=1x"), "all"), (model, ("--silence", "layer="), "all"),
            (model, ("--silence", "layer=1,"), "all"), (model, ("--silence", "all", "--silence", "q"), "q"),
            (model, ("--parallel", "expert=1"), "silence"), (model, ("--parallel", "layer=7"), "layer=7"),
            (model, ("--swap_gates", "iteration=1"), "layer="), (model, ("--gate_input", "head=1"), "silence"),
            (shared_gate, ("--swap_gates", "all"), "router"), (shared_gate, ("--silence", "shared"), "shared"),
            (outer, ("--parallel", "all"), "residual"), (single, ("--parallel", "all"), "one iteration"),
            (single, ("--swap_gates", "all"), "one iteration"), (single, ("--gate_input", "all"), "one"),
            (dense, ("--silence", "layer=0,expert=1"), "no layer of experts"),
            (dense, ("--gate_input", "layer=0"), "no layer of experts")):
        for mode in ("eval", "lens", "generate"):
            r = run(path, "-m", mode, "-i", "abc", "-n", 1, *options)
            check(f"{mode} {options}", r.code == 2 and options[0] in r.err and word in r.errors[-1], r)
    for args, word in ((("-m", "info", "--silence", "all"), "--silence"),
                       (("-m", "eval", "-i", "x", "--layer", 1), "--layer"),
                       (("-m", "lens"), "--prompt"), (("-m", "lens", "-i", "x", "--layer", 2), "--layer"),
                       (("-m", "chat", "--parallel", "all"), "--parallel")):
        r = run(model, *args)
        check(f"{args}", r.code == 2 and word in r.err, r)
    good = run(model, "-i", "abc", "-n", 3, "-t", 0, "--silence", "layer=1", "--silence", "head=0")
    check("generate says what is changed in its first line", good.code == 0 and
          good.err.splitlines()[0] == "edits: --silence layer=1;head=0", good)
    check("a dense layer is silenced, too", run(dense, "-m", "eval", "-i", "abc", "--silence",
                                                "layer=0").code == 0)
    untouched = run(model, "-m", "eval", "-i", text[:200])
    edited = run(model, "-m", "eval", "-i", text[:200], "--silence", "iteration=1", "--trace",
                 here("routing"), "--logits", here("floats"))
    check("nll_untouched", edited.values()["nll_untouched"] == untouched.values()["nll"] !=
          edited.values()["nll"], edited)
    run(model, "-m", "eval", "-i", text[:200], "--logits", here("l2"))
    check("the files are of the edited pass", len(read_floats(here("floats"))) ==
          len(read_floats(here("l2"))) and read_floats(here("floats")) != read_floats(here("l2")))


# ---- chat -------------------------------------------------------------------------------------

BOS, EOS = "<|beginoftext|>", "<|endoftext|>"
DEEPSEEK_V2 = {"begin": BOS + "User: ", "system": BOS, "system_user": "\n\nUser: ",
               "user_assistant": "\n\nAssistant: ", "assistant_user": EOS + "User: ",
               "answer": "\n\nAssistant:", "trim": ""}
CHATML = {"begin": "<|im_start|>user\n", "system": "<|im_start|>system\n",
          "system_user": "<|im_end|>\n<|im_start|>user\n", "answer": EOS + "\n<|im_start|>answer\n",
          "user_assistant": EOS + "\n<|im_start|>answer\n", "trim": "user assistant",
          "assistant_user": EOS + "\n<|im_start|>user\n"}


def conversation(model, messages, n, context, pieces=DEEPSEEK_V2, system=None):
    """What -m chat should answer, by generating with --ids; what it should say was forgotten; and
    the ids that should go in each time."""
    def ids_of(history):
        ids, before = [], "system" if system is not None else "begin"
        if system is not None:
            ids += of_piece("system") + of_message("system", system)
            before = "system_user"
        for i, message in enumerate(history):
            ids += of_piece(before) + of_message(("user", "assistant")[i % 2], message)
            before = ("user_assistant", "assistant_user")[i % 2]
        return ids + of_piece("answer")

    def of_piece(name):
        parts = re.split(f"({re.escape(BOS)}|{re.escape(EOS)})", pieces[name])
        return sum(([256] if p == BOS else [257] if p == EOS else list(p.encode()) for p in parts), [])

    def of_message(role, message):
        text = message if isinstance(message, bytes) else message.encode()
        if role in pieces["trim"].split():
            text = text.decode("utf-8", "surrogateescape").strip().encode("utf-8", "surrogateescape")
        return list(text)
    history, start, answers, forgotten, prompts = [], 0, "", 0, []
    rest = pieces["user_assistant"].removeprefix(pieces["answer"]).encode()
    for message in messages:
        history.append(message)
        last, ids, room = len(history) - 1, ids_of(history[start:]), min(n, context // 4) + 1
        alone = len(ids_of(history[last:]))
        if start < last and len(ids) + room > context:
            most, whole = min(context // 2, context - min(room, context)), len(ids)
            fitting = [i for i in range(start + 2, last, 2) if len(ids_of(history[i:])) <= most]
            kept = min([*fitting, last])
            ids = ids_of(history[kept:])
            forgotten += (whole - len(ids)) * (len(ids) + 2 <= context)
        else:
            kept = start
        if len(ids) + 2 > context:
            assert alone + 2 > context
            history.pop()
            continue
        start = kept
        r = run(model, "--ids", "-t", 0, "-n", min(n, context - 1 - len(ids)), "-i", text_of(ids))
        prompts.append(ids)
        answer = r.ids()[len(ids):]
        text = bytes(i for i in answer if i < 256)
        answers += text.decode("utf-8", "replace") + "\n"
        cut = rest and rest != pieces["user_assistant"].encode() and text.startswith(rest)
        history.append(text[len(rest):] if cut else text)
    return answers, forgotten, prompts


def test_chat(folder):
    here = lambda name: os.path.join(folder, name)
    model = write_tiny(here("chat.bin"), chat_template="deepseek_v2", max_position_embeddings=512)
    lines = ["hello", "what is <|endoftext|>?", "ü ✓", "a" * 50, "and then?", "b" * 33, "c" * 70,
             "d"]
    for n, context in ((20, 512), (9, 150), (60, 200), (0, 150), (30, 110)):
        r = run(model, "-m", "chat", "-t", 0, "-n", n, "-c", context,
                input="".join(x + "\n" for x in lines).encode())
        expected, forgotten, _ = conversation(model, lines, n, context)
        check(f"chat with -n {n} -c {context}", r.code == 0 and r.out == expected, (r, expected))
        said = [int(x.split()[-3]) for x in r.err.splitlines() if "forgotten" in x]
        check(f"chat with -n {n} -c {context} forgets {forgotten}", sum(said) == forgotten and
              all(x.startswith(("chat: ", "model: ", "sampling: ")) for x in r.err.splitlines()), r)
    check("chats of this length do forget", forgotten > 0)
    forms = (("ChatML", CHATML, None), ("ChatML with a system message", CHATML, "be\nbrief "),
             ("DeepSeek-V2 with one", DEEPSEEK_V2, "  " + EOS),
             ("no BOS, all trimmed", DEEPSEEK_V2 | {"begin": "", "trim": "system user assistant"},
              "\u3000s\t"))
    for what, pieces, system in forms:
        is_v2 = pieces is DEEPSEEK_V2
        form = change_lines(write_tiny(here("form.bin"), max_position_embeddings=512),
                          {"chat_template": "pieces"} | {
                              f"chat.{name}": json.dumps(text) for name, text in pieces.items()})
        said = ["  hello\t", "\u00a0\x1cwhat is <|endoftext|>?\x1f ", "and", "a" * 60, "b"]
        for n, context in ((15, 500), (20, 220)):
            args = ("-m", "chat", "-t", 0, "-n", n, "-c", context, "--verbose-prompt")
            args += () if system is None else ("--system", system)
            text = "".join(x + "\n" for x in said).encode()
            r = run(form, *args, input=text)
            expected, _, prompts = conversation(form, said, n, context, pieces, system)
            found = [[*map(int, line.split()[1:])] for line in r.err.splitlines()
                     if line.startswith("prompt: ")]
            check(f"chat: {what}: the ids that go in", found == prompts, (r, prompts))
            check(f"chat: {what}: the answers", r.code == 0 and r.out == expected, (r, expected))
            if is_v2:
                old = run(model, *args, input=text)
                check(f"chat: {what}: deepseek_v2 stands for its pieces", old.out == r.out, old)
    bare = change_lines(write_tiny(here("bare.bin")), {"chat_template": "pieces",
                                                     "chat.answer": '"A"'})
    r = run(bare, "-m", "chat", "--system", "x", input=b"x\n")
    check("chat: no place for a system message", r.code == 2 and len(r.errors) == 1 and
          "--system" in r.err and "bare.bin" in r.err, r)
    empty = change_lines(write_tiny(here("empty.bin")), {"chat_template": "pieces",
                                                         "chat.trim": '"user"'})
    r = run(empty, "-m", "chat", "-t", 0, "-n", 2, input=b" \t\nx\n")
    check("chat: a message that makes no tokens", r.code == 0 and "makes 0 tokens" in r.err and
          r.out.count("\n") == 1, r)
    r = run(model, "-t", 0, "-n", 2, "-i", "ab", "--verbose-prompt")
    check("generate: --verbose-prompt", "prompt: 256 97 98\n" in r.err, r)
    section = tokenizer_section([], [], [[[(0, [(0, 0x10FFFF)], 1, 1)]]],
                                ahead=[(b"<bos>", 1), (b"<eos>", 1)])
    v3 = write_tiny(here("v3.bin"), 2, section=section, chat_template="deepseek_v2",
                    bos_token_id=0, eos_token_id=1)
    r = run(v3, "-m", "chat", "-t", 0, "-n", 1, "--verbose-prompt", input=b"x\n")
    ids = [0, *(byte + 2 for byte in b"User: x\n\nAssistant:")]
    check("chat: BOS has id 0, as DeepSeek-V3's has", r.code == 0 and
          f"prompt: {text_of(ids)}\n" in r.err, r)
    for args in (("--system", "x"), ("-m", "info", "--verbose-prompt")):
        r = run(model, *args)
        check(f"{args} where it does not belong", r.code == 2 and args[-2 + len(args) % 2] and
              len(r.errors) == 1, r)
    ends = {"eos_token_id": "[257, 7]", "generation_config.eos_token_id": "[9, 11]"}
    text = run(model, "--ids", "-t", 0, "-n", 30, "-i", "256 72 105").ids()
    for name in ends:               # whichever comes first ends it, of either list
        for i in (3, 6):
            stop = change_lines(write_tiny(here("ends.bin")), ends | {name: f"[250, {text[i]}]"})
            r = run(stop, "--ids", "-t", 0, "-n", 30, "-i", "256 72 105")
            check(f"{name}: generation stops at any", r.ids() == text[:text.index(text[i], 3) + 1], r)
    first = conversation(model, lines[:2], 20, 512)[0]
    for what, args, text in (("a prompt, then lines", ("-i", lines[0]), lines[1] + "\n"),
                             ("the last line without its end", (), "\n".join(lines[:2])),
                             ("empty lines, Windows' line ends", (),
                              f"\n{lines[0]}\r\n\r\n\n{lines[1]}\r\n")):
        r = run(model, "-m", "chat", "-t", 0, "-n", 20, *args, input=text.encode())
        check(f"chat: {what}", r.code == 0 and r.out == first, (r, first))
    ids = [256, *b"User: hello\n\nAssistant:"]
    once, twice = (run(model, "-t", 0, "-n", 25, "--repeat-penalty", 2, *args, input=text)
                   for args, text in ((("--ids", "-i", text_of(ids)), b""),
                                      (("-m", "chat"), b"hello\n")))
    check("chat: what was said counts as a repetition", twice.out == bytes(
        i for i in once.ids()[len(ids):] if i < 256).decode("utf-8", "replace") + "\n", (once, twice))
    with open(here("message"), "w") as f:
        f.write("one\ntwo")
    r = run(model, "-m", "chat", "-t", 0, "-n", 20, "-f", here("message"))
    check("chat: a file is one message", r.out == conversation(model, ["one\ntwo"], 20, 512)[0], r)
    r = run(model, "-m", "chat", "-i", "")
    check("chat: end of file", r.code == 0 and r.out == "" and not r.errors, r)
    r = run(model, "-m", "chat", "-t", 0, "-n", 5, "-c", 60, input=b"x" * 99 + b"\nhello\n")
    check("chat: a message that does not fit is passed over", r.code == 0 and
          r.out == conversation(model, ["hello"], 5, 60)[0] and "118" in r.err and "60" in r.err, r)
    r = run(model, "-m", "chat", "-t", 0, "-n", -1, "-c", 60, "--ignore-eos", input=b"x\n")
    check("chat: an answer ends where the context does", r.code == 0 and "ends here" in r.err, r)
    wild = ("-m", "chat", "-t", 2, "-k", 0, "-n", 30, "--repeat-penalty", 1.2, "-s")
    r = [run(model, *wild, seed, input=b"x\ny\n", threads=t).raw
         for seed, t in ((1, 1), (1, 2), (2, 1))]
    check("chat: the seed decides", r[0] == r[1] != r[2], r)
    for what, spoil, words in (("no template", {"chat_template": "none"}, ["chat template"]),
                               ("no tokenizer", {"tokenizer": 0}, ["tokenizer"]),
                               ("no EOS", {"eos_token_id": None}, ["eos_token_id"])):
        bad = write_tiny(here("bad.bin"), **{"chat_template": "deepseek_v2"} | spoil)
        r = run(bad, "-m", "chat", input=b"x\n")
        check(f"chat: {what}", ends_well(r, False) and not r.out and
              all(word in r.errors[0] for word in [*words, bad]), r)
    r = run(model, "-m", "chat", "--ids")
    check("chat with --ids", r.code == 2 and len(r.errors) == 1 and "--ids" in r.err, r)
    r = run(write_tiny(here("huge.bin"), chat_template="deepseek_v2",
                       max_position_embeddings=1 << 30), "-m", "chat", "-n", 3, input=b"x\n")
    check("chat: a large context costs nothing", r.code == 0, r)
    for what, args in (("while it waits", ("-n", "2")), ("in an answer", ("-n", "-1",
                                                                          "--ignore-eos"))):
        slow = write_tiny(here("slow.bin"), chat_template="deepseek_v2",
                          max_position_embeddings=1 << 16)
        with subprocess.Popen([RUN, slow, "-m", "chat", "-c", "60000", "-t", "2", *args],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as p:
            p.stdin.write(b"hello\n")
            p.stdin.flush()
            text = p.stdout.read(1) if args[1] == "2" else p.stdout.read(20)
            while args[1] == "2" and not text.endswith(b"\n"):
                text += p.stdout.read(1)
            p.send_signal(signal.SIGINT)
            p.stdout.read()
        check(f"chat: SIGINT {what} ends with 130", p.returncode == 130, p.returncode)


# ---- wrong usage ------------------------------------------------------------------------------

def test_usage(folder):
    model = os.path.join(folder, "tiny.bin")
    r = run("--help", threads=0)
    check("--help", r.code == 0 and "--n-predict" in r.out and "256" in r.out and not r.err, r)
    check("model.bin --help", run(model, "--help").out == r.out)
    r = run("--version", threads=0)
    check("--version", r.code == 0 and r.out.startswith("run "), r)
    r = run("-t", "0", "-n", "4", "-i", "x", model, threads=0)
    check("the model as the last argument", r.code == 0 and r.out.startswith("x"), r)
    check("no arguments", run(threads=0).code == 2)
    for args, name in (
            (("-n", "abc"), "-n"), (("-n", "1.5"), "-n"), (("-n", "-2"), "-n"), (("-n", ""), "-n"),
            (("-n", "1 "), "-n"), (("-n", " 1"), "-n"), (("-n", "9" * 30), "-n"),
            (("--n-predict=x",), "n-predict"), (("-t", "nan"), "-t"), (("-t", "inf"), "-t"),
            (("-t", "-1"), "-t"), (("-t", "1,5"), "-t"), (("--temp", "x"), "--temp"),
            (("-p", "1.1"), "-p"), (("-p", "-0.1"), "-p"), (("--top-p", "nan"), "--top-p"),
            (("--min-p", "2"), "--min-p"), (("-k", "-1"), "-k"),
            (("--repeat-penalty", "0"), "--repeat-penalty"), (("--ids=1",), "ids"),
            (("-s", "18446744073709551616"), "-s"), (("-s", "x"), "-s"), (("-c", "-1"), "-c"),
            (("-c", "65"), "ctx-size"), (("-m", "nothing"), "-m"), (("--mode", ""), "--mode"),
            (("--threads", "1025"), "--threads"), (("--threads", "-1"), "--threads"),
            (("--nothing",), "--nothing"), (("-z",), "-z"), (("-",), "-"), (("--",), "--"),
            (("more.bin",), "more.bin"), (("-n",), "-n"), (("--trace",), "--trace"),
            (("-i", "x", "-f", "y"), "--file"), (("--logits", "l"), "--logits"),
            (("-m", "info", "--trace", "t"), "--trace"), (("-m", "eval"), "--file"),
            (("-m", "tokenize"), "--file"), (("--ids", "-i", "1 x"), "--prompt"),
            (("--ids", "-i", "1 258"), "258"), (("--ids", "-i", "-1"), "--prompt"),
            (("--ids", "-i", "1,2"), "--prompt"), (("--ids", "-i", "9" * 40), "--prompt")):
        r = run(model, *args, threads=0)
        check(f"wrong usage: {text_of(args)}", r.code == 2 and len(r.errors) == 1 and
              name in r.errors[0] and not r.out, r)
    r = run(model, "-t", "1e-3", "-k", "1000000", "-n", "2")
    check("top-k beyond the vocabulary", r.code == 0, r)
    r = run(model, "-s", "-1", "-n", "1")
    check("seed -1 is from the clock", r.code == 0 and
          int(r.err.split("seed ")[1].split()[0]) > 0, r)


def test_environment(folder):
    model, here = os.path.join(folder, "tiny.bin"), lambda name: os.path.join(folder, name)
    for threads in ("0", "1000", "5000", "2,3"):
        r = run(model, "-n", 2, "-t", 0, threads=0, env={**os.environ, "OMP_NUM_THREADS": threads})
        check(f"OMP_NUM_THREADS={threads}", r.code == 0, r)
    if os.path.exists("/dev/full"):
        for args in (("-n", "3"), ("-m", "info"), ("--help",), ("-m", "tokenize", "-i", "a")):
            with open("/dev/full", "wb") as full:
                r = run(model, *args, stdout=full)
            check(f"stdout is full: {text_of(args)}", r.code == 1 and "stdout" in r.err, r)
        r = run(model, "-n", "3", "--trace", "/dev/full")
        check("a full disk for --trace", r.code == 1 and "/dev/full" in r.err, r)
    chat = write_tiny(here("chat.bin"), chat_template="deepseek_v2")
    for what, code, command in (("stdout is closed", 1, "RUN MODEL -n 3 --trace TRACE >&-"),
                                ("stdin and stderr are closed", 0, "RUN MODEL -n 3 <&- 2>&-"),
                                ("chat, stdin is closed", 0, "RUN CHAT -m chat <&-"),
                                ("a small stack", 0, "ulimit -s 256; RUN MODEL -n 30")):
        for name, path in (("RUN", RUN), ("MODEL", model), ("CHAT", chat), ("TRACE", here("t"))):
            command = command.replace(name, f"'{path}'")
        r = subprocess.run(["sh", "-c", command], capture_output=True)
        check(what, r.returncode == code and not os.path.exists(here("t")), r)
    r = run(model, "-n", "3", "--trace", here("no/folder"))
    check("--trace into no folder", r.code == 1 and "no/folder" in r.err, r)
    with open(here("kept"), "w") as f:
        f.write("old")
    spoiled = write_tiny(here("nan.bin"), spoil="model.layers.1.mlp.experts.2.up_proj.weight")
    r = run(spoiled, "-m", "eval", "-i", "x" * 40, "--logits", here("kept"))
    check("NaN among the weights names the tensor",
          r.code == 1 and "model.layers.1.mlp.experts.2.up_proj.weight" in r.err, r)
    with open(here("kept")) as f:
        check("a failed run leaves the old file",
              f.read() == "old" and not os.path.exists(here("kept.tmp")))
    r = run(spoiled, "-i", "x" * 40, "-n", 3)
    check("NaN when generating", r.code == 1 and "layers.1" in r.err, r)
    huge = write_tiny(here("huge.bin"), max_position_embeddings=1 << 30)
    r = run(huge, "-n", 3)
    check("a large context costs nothing until used", r.code == 0, r)
    slow = write_tiny(here("slow.bin"), max_position_embeddings=1 << 16)
    with subprocess.Popen([RUN, slow, "-n", "-1", "--ignore-eos", "--trace", here("t")],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
        p.stdout.read(20)
        p.send_signal(signal.SIGINT)
        p.stdout.read()
    check("SIGINT ends with 130", p.returncode == 130 and not os.path.exists(here("t.tmp")),
          p.returncode)
    r = run(model, "-m", "bench")
    check("-m bench", r.code == 0 and not r.errors, r)
    r = run(write_tiny(here("one.bin"), max_position_embeddings=1), "-m", "bench")
    check("bench in a context of 1", r.code == 0 and float(r.values()["decode_tok_s"]) > 0, r)
    r = run(here("one.bin"), "-m", "eval", "--ids", "-i", "1 2 3")
    check("eval in a context of 1", r.code == 0 and r.values()["tokens"] == "2", r)
    dense = write_tiny(here("dense.bin"), n_routed_experts=None)
    r = run(dense, "-n", 3, "--trace", here("t"))
    with open(here("t")) as f:
        check("a model without experts has an empty trace",
              r.code == 0 and len(f.readlines()) == 1, r)
    bare = write_tiny(here("bare.bin"), tokenizer=0, bos_token_id=None)
    for args in (("-i", "x"), (), ("-m", "eval", "-i", "x"), ("-m", "tokenize", "-i", "x")):
        r = run(bare, *args)
        check("no tokenizer: text is refused", ends_well(r, False) and "--ids" in r.err, r)
    r = run(bare, "--ids", "-n", 3)
    check("no BOS: an empty prompt is refused", r.code == 1 and "bos_token_id" in r.err, r)


def comma_locale(folder):
    """The environment of a locale whose numbers have a decimal comma, or None. It need not be
    installed: its file, in glibc's form, is written here."""
    os.makedirs(os.path.join(folder, "xx_XX.UTF-8"), exist_ok=True)
    texts = [b",\0", b".\0", b"\3\3\0"]         # decimal point, thousands, how they are grouped
    fields = [*texts, *(struct.pack("<I", ord(c)) for c in ",."), b"UTF-8\0"]
    offsets, body = [], b""
    for field in fields:
        body += bytes(-len(body) % 4 if len(field) == 4 and field not in texts else 0)
        offsets.append(8 + 4 * len(fields) + len(body))
        body += field
    with open(os.path.join(folder, "xx_XX.UTF-8", "LC_NUMERIC"), "wb") as f:
        f.write(struct.pack(f"<{2 + len(fields)}I", 0x20031115 ^ 1, len(fields), *offsets) + body)
    there = {k: v for k, v in os.environ.items() if k[:3] != "LC_" and k != "LANG"}
    there |= {"LOCPATH": folder, "LC_NUMERIC": "xx_XX.UTF-8"}
    probe = "import locale; locale.setlocale(locale.LC_ALL, ''); print(locale.str(0.5))"
    done = subprocess.run([sys.executable, "-c", probe], env=there, capture_output=True)
    return there if done.stdout == b"0,5\n" else None


def test_locale(folder):
    """Numbers have a point, whatever the locale says."""
    model, there = os.path.join(folder, "tiny.bin"), comma_locale(folder)
    if not there:
        return                                          # another C library
    for args in (("-m", "info"), ("-m", "eval", "-i", "a text"),
                 ("-i", "x", "-t", "0.25", "-p", "0.5", "-s", "1", "-n", "20")):
        here, plain = run(model, *args, env=there), run(model, *args)
        check(f"decimal comma: {args}", here.code == 0 and here.out == plain.out, (here, plain))
    check("decimal comma: 0.25 is shown so", "temp 0.25," in here.err, here)
    r = run(model, "-t", "0,25", env=there)
    check("decimal comma: 0,25 is no number", r.code == 2 and "-t" in r.err, r)


# ---- files that are no model files, and damaged ones --------------------------------------------

def ends_well(r, may_work):
    return r.code in ((0, 1) if may_work else (1,)) and len(r.errors) == r.code


def damaged_lines(model):
    """(what, bytes, word of the message) of files whose config has one line that is wrong, with a
    checksum that is right."""
    names, made = list(model.config), lambda lines: modelbin.build(model._replace(config=lines))
    for name, value in model.config.items():
        without = {k: v for k, v in model.config.items() if k != name}
        yield f"no {name}", made(without), name
        for bad in ("x", "", " ", "-", "1e999", "nan", "0x", value + " ", value + "x", "-1000000000000",
                    "1" + "0" * 40, "é"):
            if name in ("temperature", "top_p", "min_p") and bad == "-":
                continue
            yield f"{name} is {bad!r}", made(model.config | {name: bad}), name
        twice = modelbin.to_lines(model.config).rstrip(b"\0") + f"{name} {value}\n".encode()
        twice += bytes(-len(twice) % 64)
        yield f"{name} twice", with_lines(model, twice), name
    yield "an unknown key", made(model.config | {"hidden_sise": "3"}), "hidden_sise"
    lines = modelbin.to_lines(model.config).rstrip(b"\0")
    for what, damaged in (("no blank", lines + b"inner_iter\n"), ("no end", lines[:-1]),
                          ("an empty line", lines + b"\n"), ("a NUL", lines[:9] + b"\0" + lines[10:]),
                          ("not UTF-8", lines[:9] + b"\xff" + lines[10:]), ("nothing", b""),
                          ("something behind", lines + bytes(70) + b"x")):
        yield what, with_lines(model, damaged + bytes(-len(damaged) % 64)), ""


def with_lines(model, lines):
    """A file whose config is these bytes."""
    data = modelbin.build(model._replace(config={}))
    sizes = list(struct.unpack_from("<2Q", data, 16))
    data = data[:16] + struct.pack("<2Q", sizes[0] + len(lines), len(lines)) + data[32:64] + \
        lines + data[64:]
    return modelbin.with_checksum(data)


def test_damage(folder):
    with open(os.path.join(folder, "coe.bin"), "rb") as f:
        good = f.read()
    write_golden("coe", os.path.join(folder, "old.bin"), version=1)
    with open(os.path.join(folder, "old.bin"), "rb") as f:
        old = f.read()
    model = modelbin.parse(good)
    cases = []                                                  # what, bytes, whether it may work
    for version, data in ((1, old), (2, good)):
        size = len(data)
        for n in (*range(0, 1536, 31), 63, 64, 65, 1023, 1024, 1025, 1088, size // 128 * 64, size - 1):
            cases.append((f"version {version}, cut to {n} bytes", data[:n], False))
        cases.append((f"version {version}, a byte too many", data + b"\0", False))
    for slot in range(66):
        nasty = [struct.pack("<q", v) for v in (0, 1, -1, 2**31 - 1, -2**31, 2**31, 2**32, 2**62,
                                                -2**63, 2**63 - 1, len(old) - 1, len(old) + 1)]
        if slot >= 16 and SLOTS[slot - 16] in REAL:
            nasty += [struct.pack("<d", v) for v in (1, -1, math.nan, math.inf, 1e-300, 1e300)]
        for value in nasty:
            data = old[:8 * slot] + value + old[8 * slot + 8:]
            cases.append((f"slot {slot} is {value.hex()}", data, True))
    for name in ("file_bytes", "config_bytes", "files_bytes", "tokenizer_bytes", "state_bytes"):
        for value in (0, 1, 63, 64, 2**31, 2**32, 2**62, 2**64 - 1, 2**64 - 64, len(good) - 1,
                      len(good) + 1):
            cases.append((f"{name} is {value}", modelbin.build(model, **{name: value}), True))
    for version in (0, 3, 2**31, 2**32 - 1):
        data = good[:4] + struct.pack("<I", version) + good[8:]
        cases.append((f"version {version}", data, False))
    rng = random.Random(4)
    for data, last in ((old, 66), (good, (64 + len(modelbin.to_lines(model.config))) // 8)):
        for _ in range(60):
            spoiled = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                at = 8 * rng.randrange(1, last) + rng.randrange(4)
                spoiled[at] = rng.choice((0, 1, 2, 7, 10, 32, 48, 64, 128, 255))
            cases.append(("several bytes: " + spoiled[:520].hex(), bytes(spoiled), True))
    for what, head in (("magic", b"COE2"), ("the other endianness", b"1EOC"), ("GGUF", b"GGUF"),
                       ("JSON", b'{"a": 1}'), ("HTML", b"<!DOCTYPE html>"),
                       ("safetensors", struct.pack("<Q", 900) + b'{"a"'),
                       ("LFS", b"version https://git-lfs.github.com/spec/v1\n")):
        cases += [(what, head + good[len(head):], False), (what + ", short", head, False)]
    words = {what: word for what, _, word in damaged_lines(model)}
    cases += [(what, data, False) for what, data, _ in damaged_lines(model)]

    def try_one(case):
        number, (what, data, may_work) = case
        path = os.path.join(folder, f"damaged{number}.bin")
        with open(path, "wb") as f:
            f.write(data)
        r = run(path, "--ids", "-i", "1 2 3", "-n", 2, timeout=20)
        os.remove(path)
        return what, ends_well(r, may_work) and words.get(what, "") in r.err, r
    with ThreadPoolExecutor(3) as pool:
        for what, ok, r in pool.map(try_one, enumerate(cases)):
            check(f"damaged: {what}", ok, r)


def test_version_1(folder):
    """Files of version 1, made by the last program that wrote it: the same as version 2."""
    new, logits = os.path.join(folder, "new.bin"), os.path.join(folder, "logits")
    for name in sorted(os.listdir(VERSION_1)):
        if not name.endswith(".bin"):
            continue
        old, results = os.path.join(VERSION_1, name), []
        for path in (old, modelbin.write(new, modelbin.read(old))):
            info = run(path, "-m", "info")
            text = run(path, "-m", "eval", "-i", "the 16 pens", "--logits", logits)
            check(f"{name}: {os.path.basename(path)} works", info.code == text.code == 0, text)
            results.append((info.out, text.out, bytes(read_floats(logits))))
        check(f"{name}: version 1 is read as version 2 is", results[0] == results[1])
        with open(old, "rb") as f:
            check(f"{name} is of version 1", f.read(8) == b"COE1\1\0\0\0")


def test_checksum(folder):
    """A bit that flipped is found wherever it is, where the whole file is read."""
    path, bad = os.path.join(folder, "tiny.bin"), os.path.join(folder, "flipped.bin")
    with open(path, "rb") as f:
        good = f.read()
    check("info reads a good file", run(path, "-m", "info").code == 0)
    rng = random.Random(6)
    lines = modelbin.weights_at(good)[0]
    for at in (8, 9, 10, 11, *(rng.randrange(lines, len(good)) for _ in range(40)), len(good) - 1):
        data = bytearray(good)
        data[at] ^= 1 << rng.randrange(8)
        with open(bad, "wb") as f:
            f.write(data)
        r = run(bad, "-m", "info")
        check(f"a bit of byte {at}", ends_well(r, False) and bad in r.err and "checksum" in r.err, r)


def test_kinds_of_files(folder):
    """What people take for a model file is named, and what to do about it."""
    path, export = os.path.join(folder, "file.bin"), "export.py"
    with open(os.path.join(folder, "tiny.bin"), "rb") as f:
        good = f.read()
    model = modelbin.parse(good)
    weights, end = modelbin.weights_at(good)
    of_version = lambda n: good[:4] + struct.pack("<I", n) + good[8:]
    for what, data, words in (
            ("empty", b"", ["empty"]), ("one byte", b"C", ["COE1"]),
            ("shorter than the header", good[:40], ["40 bytes", "64"]),
            ("another magic", b"COE2" + good[4:], ["starts with", "COE1"]),
            ("the magic backwards", good[3::-1] + good[4:], ["machine of the other endianness"]),
            ("version 0", of_version(0), ["version is 0", "1 and 2"]),
            ("version 3", of_version(3), ["version is 3", "1 and 2"]),
            ("a version of the other endianness", of_version(2 << 24), ["version is 33554432"]),
            ("git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 +
             b"\nsize 123\n", ["git-LFS pointer", "git lfs pull"]),
            ("HTML", b"<!DOCTYPE html>\n<html>" + b" " * 99, ["HTML", export]),
            ("JSON", b'{"error": "not found"}', ["JSON", export]),
            ("safetensors", struct.pack("<Q", 99) + b'{"model.norm.weight":' + b" " * 99,
             ["safetensors", export]),
            ("GGUF", b"GGUF\3\0\0\0" + bytes(99), ["GGUF", export]),
            ("cut by one byte", good[:-1], [len(good) - 1, len(good), "cut off"]),
            ("cut where a tensor begins", good[:weights + 4 * 258 * 12],
             [weights + 4 * 258 * 12, len(good), "cut off"]),
            ("without weights", good[:weights], [weights, len(good), "cut off"]),
            ("a byte behind it", good + b"\0", [len(good) + 1, len(good)]),
            ("a size beyond the file", modelbin.build(model, files_bytes=2**40),
             ["disagree", len(good)]),
            ("a config beyond the file", modelbin.build(model, config_bytes=2**40),
             ["config takes", 2**40])):
        with open(path, "wb") as f:
            f.write(data)
        for args in ((), ("-m", "info"), ("-m", "tokenize", "-i", "x")):
            r = run(path, *args)
            check(f"{what}: {args}", ends_well(r, False) and path in r.err and not r.out and
                  all(str(word) in r.err for word in words), r)


def test_permission(folder):
    """Files that may not be read, and folders that may not be written, under a user who may not."""
    here = lambda name: os.path.join(folder, name)
    program, user = as_ordinary_user(folder, RUN)
    model = shutil.copy(here("tiny.bin"), here("readable.bin"))
    os.chmod(model, 0o644)
    r = run(model, "-n", 1, program=program, **user)
    check("a file that may be read", r.code == 0, r)
    shutil.copy(model, here("locked.bin"))
    os.chmod(here("locked.bin"), 0)
    for args in ((here("locked.bin"),), (here("locked.bin"), "-m", "info"),
                 (model, "-f", here("locked.bin")),
                 (model, "-m", "eval", "-f", here("locked.bin"))):
        r = run(*args, program=program, **user)
        check(f"no permission to read, {args[1:2]}", ends_well(r, False) and here("locked.bin") in
              r.err and "ermission" in r.err, r)
    os.mkdir(here("locked"), 0o555)
    for option in ("--trace", "--logits"):
        r = run(model, "-m", "eval", "-i", "x", option, here("locked/file"), program=program,
                **user)
        check(f"a folder that may not be written, {option}", ends_well(r, False) and
              here("locked/file") in r.err and "ermission" in r.err and
              not os.listdir(here("locked")), r)


def test_large_file(folder):
    """A model of more than 2 GiB, most of it a hole: what lies behind is found, also by a program
    whose long has 32 bits, or that one says that the file is too large."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_hidden_layers": 1,
             "tie_word_embeddings": False}
    small, large = os.path.join(folder, "small.bin"), os.path.join(folder, "large.bin")
    rng = random.Random(7)

    def weight(name, size):                     # experts of zeros, so any number is the same
        if ".experts." in name or "mlp.gate." in name:
            return bytes(4 * size)
        return [1.0] * size if "norm" in name else [rng.gauss(0, 0.05) for _ in range(size)]
    write_model(small, TINY | sizes, weight, 1)
    model, more = modelbin.read(small), 345
    config = model.config | {"n_routed_experts": str(more)}
    at, places = 0, {}
    for name, copies, rows, cols in tensor_list(DEFAULT | TINY | sizes, False):
        if "experts.{}" in name or "mlp.gate." in name:
            places[name] = at
        at += -(-4 * copies * rows * cols // 64) * 64
    gates, experts = (min(v for k, v in places.items() if part in k)
                      for part in ("gate.{}.w", "experts"))
    shared = experts + 3 * 4 * 4 * 1024 * 512
    parts = [(0, model.weights[:gates]),                # where its pieces lie in the large file
             (gates + 2 * 4 * more * 512 + 3 * 4 * more * 1024 * 512, model.weights[shared:])]
    total = parts[1][0] + len(parts[1][1])
    head = modelbin.build(model._replace(config=config, weights=b""))
    begin = 64 + len(modelbin.to_lines(config)) + len(model.files)
    with open(large, "wb") as f:
        f.write(head[:16] + struct.pack("<Q", begin + total) + head[24:begin])
        for place, data in parts:
            f.seek(begin + place)
            f.write(data)
    check("the file has more than 2 GiB, and is a hole",
          os.path.getsize(large) == begin + total > 2**31 and
          os.stat(large).st_blocks * 512 < 2**28, (begin, total))
    wanted = run(small, "-m", "eval", "-i", "some words")
    crc = 0
    with open(large, "r+b") as f:                       # the checksum, which info wants to be right
        f.seek(12)
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
        f.seek(8)
        f.write(struct.pack("<I", crc))
    programs, compiler = [("64 bits", RUN)], os.environ.get("CC", "cc")
    narrow = [*compiler.split(), "-m32", "-O1", "-w", "-o", os.path.join(folder, "run32"),
              os.path.join(HERE, "..", "run.c"), "-lm"]
    for include in ([], ["-I/usr/include/x86_64-linux-gnu"]):
        if len(programs) == 1 and not subprocess.run(narrow + include,
                                                     capture_output=True).returncode:
            programs.append(("32 bits", os.path.join(folder, "run32")))
    for bits, program in programs:
        r = run(large, "-m", "eval", "-i", "some words", program=program)
        refused = bits == "32 bits" and ends_well(r, False) and large in r.err and \
            re.search("too large|cannot be mapped", r.err)
        close = r.code == 0 and abs(float(r.values()["nll"]) - float(wanted.values()["nll"])) < 1e-5
        check(f"a model of more than 2 GiB, {bits}", refused or close and wanted.code == 0, r)
    check("its checksum", run(large, "-m", "info").code == 0)
    os.remove(large)


def refused_lines(folder, cases):
    """Cases (lines of a config, words): each is refused with one line that names the file and has
    the words."""
    path, bad = os.path.join(folder, "tiny.bin"), os.path.join(folder, "lines.bin")
    model = modelbin.read(path)
    for lines, *words in cases:
        lines = {name: str(value) for name, value in lines.items()}
        modelbin.write(bad, model._replace(config=model.config | lines))
        r = run(bad, "--ids", "-i", "1 2 3", "-n", 1)
        check(f"{lines}", ends_well(r, False) and bad in r.err and not r.out and
              (all(str(word) in r.err for word in words) or "not fit 32 bits" in r.err), r)


DISAGREE = "header and file disagree"


def test_header_sizes(folder):
    """Sizes of nothing, of less, and of more than any number holds; products and sums that wrap."""
    refused_lines(folder, [
        ({name: value}, f"{name} is {value}") for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
            "max_position_embeddings", "intermediate_size", "moe_intermediate_size", "kv_lora_rank",
            "qk_nope_head_dim", "v_head_dim", "num_experts_per_tok", "inner_iter", "moe_layer_freq")
        for value in (0, -1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 + 1)])
    refused_lines(folder, [
        ({name: value}, f"{name} is {value}") for name in (
            "n_routed_experts", "n_shared_experts", "q_lora_rank", "first_k_dense_replace",
            "n_group", "topk_group", "bos_token_id", "eos_token_id", "qk_rope_head_dim")
        for value in (-2, 2**31 - 1, 2**31, 2**32, 2**63, 2**64)])
    most = {"hidden_size": 65536, "vocab_size": 1 << 24, "moe_intermediate_size": 1 << 20,
            "intermediate_size": 1 << 20, "n_routed_experts": 16384, "n_shared_experts": 1024,
            "num_attention_heads": 4096, "qk_nope_head_dim": 65536, "qk_rope_head_dim": 65536,
            "v_head_dim": 65536, "kv_lora_rank": 65536, "q_lora_rank": 65536, "inner_iter": 1024,
            "max_position_embeddings": 1 << 30, "num_hidden_layers": 600}
    refused_lines(folder, [({a: most[a], b: most[b]}, DISAGREE) for a in most for b in most if a < b
                           and "max_position_embeddings" not in (a, b)])
    refused_lines(folder, [(most, "too large"), ({"num_hidden_layers": 4096},
                                                 "num_hidden_layers is 4096", "bytes holds")])
    path, bad = os.path.join(folder, "tiny.bin"), os.path.join(folder, "sizes.bin")
    with open(path, "rb") as f:
        size = len(f.read())
    model = modelbin.read(path)
    names = ("config_bytes", "files_bytes", "tokenizer_bytes", "state_bytes")
    for name in names:                                  # sums that wrap to what they should be
        for other in names:
            if name != other:
                r = run(modelbin.write(bad, model, **{name: 2**64 - 64, other: 64}), "-n", 1)
                check(f"{name} and {other} wrap", ends_well(r, False) and bad in r.err, r)
    r = run(modelbin.write(bad, model, state_bytes=2**64 - 64, file_bytes=size - 64), "-n", 1)
    check("a file_bytes that has wrapped", ends_well(r, False) and str(size - 64) in r.err, r)


def test_header_experts(folder):
    limited = {"topk_method": "group_limited_greedy"}
    refused_lines(folder, [
        ({"n_routed_experts": 0}, DISAGREE), ({"n_routed_experts": "null"}, DISAGREE),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5", "1..4", "n_routed_experts"),
        (limited | {"n_group": 0}, "n_group is 0"),
        (limited | {"n_group": 3}, "n_group is 3", "divide"),
        (limited | {"n_group": 2, "topk_group": 3}, "topk_group is 3", "1..2"),
        (limited | {"n_group": 2, "topk_group": 0}, "topk_group is 0"),
        (limited | {"n_group": 4, "topk_group": 1}, "topk_group 1 of n_group 4",
         "num_experts_per_tok"),
        ({"inner_iter": 0}, "inner_iter is 0"),
        ({"inner_iter": 1025}, "inner_iter is 1025", "1024"),
        *(({"inner_iter": n}, DISAGREE) for n in (1, 3, 1024)),
        ({"use_igate": "false"}, DISAGREE), ({"coe_weights": "true"}, DISAGREE),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3", "0..2"),
        ({"first_k_dense_replace": 1}, DISAGREE), ({"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ({"moe_layer_freq": 2}, DISAGREE)])


def test_header_positions(folder):
    yarn = {"rope_scaling.type": "yarn"}
    key = "rope_scaling."
    refused_lines(folder, [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3", "even"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0"), ({"v_head_dim": 0}, "v_head_dim is 0"),
        *(({"kv_lora_rank": x}, f"kv_lora_rank is {x}") for x in (0, "null")),
        ({"q_lora_rank": 7}, DISAGREE),
        *(({"rope_theta": x}, "rope_theta is " + x) for x in ("0", "-1", "nan", "inf", "-inf")),
        *(({"rms_norm_eps": x}, "rms_norm_eps is " + x) for x in ("0", "-1e-06", "nan", "inf")),
        *((yarn | {key + "factor": x}, f"factor is {x}") for x in ("0", "-1", "nan")),
        ({"rope_scaling.type": "linear", key + "factor": 0}, "factor is 0"),
        (yarn | {key + "original_max_position_embeddings": 0},
         "original_max_position_embeddings is 0"),
        (yarn | {key + "beta_fast": 1, key + "beta_slow": 32}, "beta_fast is 1", "beta_slow 32"),
        ({"rope_scaling.type": "dynamic"}, "rope_scaling.type is dynamic", "null|linear|yarn")])
    model, other = os.path.join(folder, "tiny.bin"), os.path.join(folder, "null.bin")
    shutil.copy(model, other)
    results = []
    for value in ("null", "0"):                         # both say that queries are not compressed
        r = run(change_lines(other, {"q_lora_rank": value}), "-m", "eval", "-i", "abc")
        results.append(r.out)
        check(f"q_lora_rank {value}", r.code == 0 and "nll" in r.out, r)
    check("q_lora_rank null is q_lora_rank 0", results[0] == results[1], results)


def test_header_words(folder):
    """Kinds of which there is none, and matrices that a flag denies."""
    refused_lines(folder, [
        ({"topk_method": "gready"}, "topk_method is gready", "greedy|group_limited_greedy"),
        ({"scoring_func": "tanh"}, "scoring_func is tanh", "softmax|sigmoid"),
        ({"weight_type": "f16"}, "weight_type is f16", "f32|bf16|q8"),
        ({"weight_type": "3"}, "weight_type is 3"), ({"tokenizer": "words"}, "tokenizer is words"),
        ({"torch_dtype": "int8"}, "torch_dtype is int8"), ({"hidden_act": "gelu"}, "hidden_act"),
        ({"inner_residual": "maybe"}, "inner_residual is maybe", "true or false"),
        ({"inner_residual": "2"}, "inner_residual is 2"),
        ({"outer_residual": "yes"}, "outer_residual is yes"),
        ({"chat_template": "llama"}, "chat_template is llama"),
        ({"weight_type": "bf16"}, DISAGREE), ({"weight_type": "q8"}, DISAGREE),
        ({"tie_word_embeddings": "true"}, DISAGREE)])
    tied = write_tiny(os.path.join(folder, "tied.bin"), tie_word_embeddings=True)
    check("tied embeddings", run(tied, "-n", 1).code == 0)
    r = run(change_lines(tied, {"tie_word_embeddings": "false"}), "-n", 1)
    check("a flag that wants lm_head, and a file without", ends_well(r, False) and
          DISAGREE in r.err, r)


def test_damaged_tokenizer(folder):
    path, bad = os.path.join(folder, "bpe.bin"), os.path.join(folder, "damaged.bin")
    model = modelbin.read(path)
    size, rng = len(WORDS_AND_DIGITS), random.Random(5)
    check("the section is there", model.tokenizer == WORDS_AND_DIGITS)
    for sizes in ({"tokenizer_bytes": n} for n in (0, size - 64, size + 64, size - 1, 2**62)):
        r = run(modelbin.write(bad, model, **sizes), "-m", "tokenize", "-i", "the")
        check(f"{sizes}", ends_well(r, False) and bad in r.err, r)
    for kind in ("none", "bytes", "words"):
        lines = model.config | {"tokenizer": kind}
        r = run(modelbin.write(bad, model._replace(config=lines)), "-m", "tokenize", "-i", "the")
        check(f"tokenizer {kind}", ends_well(r, False) and bad in r.err, r)
    refused = 0
    for i in range(200):
        section = bytearray(model.tokenizer)
        for _ in range(rng.randrange(1, 4)):
            at = 4 * rng.randrange(12 if i % 4 == 0 else size // 4)
            section[at:at + 4] = struct.pack("<I", rng.choice((0, 1, 255, 270, 2**31, 2**32 - 1)))
        modelbin.write(bad, model._replace(tokenizer=bytes(section)))
        r = run(bad, "-m", "tokenize", "-i", "the <eos>12123 the  <tag>\n ü")
        refused += r.code == 1
        check("a damaged tokenizer", ends_well(r, True) and (r.code == 0 or bad in r.err), r)
    check("some damage is found", refused > 50, refused)
    many = tokenizer_section([], [], [[[(0, SPACE, 1, 1)], [(0, DARK, 1, 1)] * 33]])
    r = run(write_tiny(bad, 2, section=many, vocab_size=256, bos_token_id=-1, eos_token_id=-1),
            "-m", "tokenize", "-i", "x")
    check("a pattern of too many items is named", ends_well(r, False) and bad in r.err and
          "alternative 1 of" in r.err and "more than 32 items" in r.err, r)


def test_token_lengths(folder):
    """Tokens that are empty, of a negative or a huge length, and there twice."""
    path, bad = os.path.join(folder, "bpe.bin"), os.path.join(folder, "lengths.bin")
    write_tiny(path, 2, section=WORDS_AND_DIGITS, vocab_size=270, bos_token_id=261,
               eos_token_id=262)
    model = modelbin.read(path)
    tokens = struct.unpack_from("<I", WORDS_AND_DIGITS)[0]
    start = struct.unpack_from(f"<{tokens + 1}I", WORDS_AND_DIGITS, 64)

    def with_start(i, value):
        section = bytearray(WORDS_AND_DIGITS)
        struct.pack_into("<I", section, 64 + 4 * i, value % 2**32)
        return run(modelbin.write(bad, model._replace(tokenizer=bytes(section))), "-m", "tokenize",
                   "-i", "the ü 12<tag> the")
    for i in (1, 100, 257, tokens - 1):
        for what, value in (("negative", start[i - 1] - 1), ("huge", start[i] + 2**31),
                            ("all but endless", -1), ("longer than all", start[-1] + 1)):
            r = with_start(i, value)
            check(f"token {i - 1} has a length that is {what}", ends_well(r, False) and
                  bad in r.err, r)
        r = with_start(i, start[i - 1])
        check(f"token {i - 1} is empty", ends_well(r, True) and (r.code == 0 or bad in r.err), r)
    for i in (0, tokens):
        r = with_start(i, start[i] + 1)
        check(f"where the tokens {'end' if i else 'begin'}", ends_well(r, False) and
              bad in r.err, r)
    first = 64 + -(-4 * (tokens + 1) // 64) * 64        # the bytes of token 0
    section = bytearray(WORDS_AND_DIGITS)
    section[first + ord("b")] = ord("a")
    r = run(modelbin.write(bad, model._replace(tokenizer=bytes(section))), "-m", "tokenize", "-i",
            "ab")
    check("a token that is there twice", ends_well(r, True) and (r.code == 0 or bad in r.err), r)


def test_not_models(folder):
    here = lambda name: os.path.join(folder, name)
    os.mkfifo(here("pipe"))
    coe = os.path.join(GOLDEN, "coe")
    for path in (here("missing"), folder, here("pipe"), "/dev/zero", "/dev/null",
                 os.path.join(coe, "config.json"), os.path.join(coe, "model.safetensors")):
        r = run(path, "-n", 1, timeout=5)
        check(f"not a model: {path}", ends_well(r, False) and path in r.err, r)
    model = here("tiny.bin")
    for path in (here("missing"), folder):
        r = run(model, "-f", path, timeout=5)
        check(f"not a prompt: {path}", ends_well(r, False) and path in r.err, r)
    for text, at in (("1 2 258", 'byte 4, is "258"'), ("1 2\n3 x", "byte 6"), ("1 2 -3", "-3"),
                     ("1\0002", "byte 0")):
        with open(here("ids"), "w") as f:
            f.write(text)
        r = run(model, "--ids", "-f", here("ids"))
        check(f"not ids: {text!r}", ends_well(r, False) and here("ids") in r.err and at in r.err, r)


def main():
    only = os.environ.get("ONLY", "").split()           # names of tests; otherwise all
    tests = [test for name, test in globals().items() if name.startswith("test_")
             and test is not test_golden and (not only or name in only)]
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(os.path.join(folder, "tiny.bin"))
        print("deviations from the reference: logits (of the largest), weights of experts")
        for name in sorted(os.listdir(GOLDEN)):         # their models are used below
            print(f"  {name:24} {'%.1e %.1e' % test_golden(name, folder)}")
        for test in tests:
            start = time.monotonic()
            test(folder)
            print(f"{test.__name__}: {time.monotonic() - start:.1f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
