# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "safetensors==0.8.0", "ml_dtypes==0.6.0"]
# ///
"""Hugging Face checkpoints to model.bin and back.

    python export.py CHECKPOINT_DIR model.bin [--dtype f32|bf16|q8]   a checkpoint becomes one file
    python export.py model.bin CHECKPOINT_DIR                         and a checkpoint again
    python export.py CONFIG.json model.bin --init SEED                a fresh model
    python export.py model.bin small.bin [--dtype q8]                 no training state, other type
    python export.py DEEPSEEK_V2_DIR model.bin --upcycle 2            DeepSeek-V2 becomes a CoE

model.bin, little-endian, every part and every tensor at a multiple of 64 bytes:

    +--------------------+  0
    | header             |  128 slots of 8 bytes: "COE1" and the version, then SLOTS in [2]
    +--------------------+  1024
    | embedded files     |  each: name[56], u64 bytes, the bytes as they were, zeros to 64
    +--------------------+  + files_bytes
    | tokenizer          |  tables of a byte-level BPE, see [4]; nothing for bytes and for none
    +--------------------+  + tokenizer_bytes
    | weights            |  tensors() in [3]; the experts of a layer are one block, so are its gates
    +--------------------+  file_bytes - state_bytes
    | training state     |  train's own: never written here, never read
    +--------------------+  file_bytes

Three sources (a checkpoint, a model.bin, random numbers) and two targets (a model.bin, a
checkpoint) meet in tensors(): a target walks over it and asks its source for some rows at a time.

Contents: [1] errors and files   [2] config   [3] tensors       [4] tokenizer
          [5] sources            [6] targets  [7] command line  [8] patterns
"""
import argparse, base64, contextlib, json, math, os, re, shutil, signal, struct, sys, time
import unicodedata, zlib
from typing import NamedTuple

try:
    import ml_dtypes                        # teaches numpy bfloat16
    import numpy as np
    from safetensors import safe_open
except ImportError as e:
    sys.exit(f"export: {e}; what is needed: pip install numpy safetensors ml_dtypes")

np.seterr(all="ignore")                     # a NaN among the weights stays one, without a warning


# ---- [1] errors and files ---------------------------------------------------------------------

class Failure(Exception):
    """An error for the user, one line. main() prints it."""


def die(where, what):
    raise Failure(f"{where}: {what}")


def note(text):
    print("export:", text, file=sys.stderr)


@contextlib.contextmanager
def blame(path, doing=""):
    """Whatever is raised inside becomes a line about path. BaseException: Rust's panics are one."""
    try:
        yield
    except (Failure, KeyboardInterrupt):
        raise
    except BaseException as e:
        die(path, doing + (getattr(e, "strerror", None) or str(e) or type(e).__name__))


def open_file(path):
    if os.path.exists(path) and not os.path.isfile(path):
        die(path, "is a folder or a device, must be a file")
    return open(path, "rb")


def parse_json(data, path):
    """The object in JSON. NaN and keys that are there twice, which Python takes, are faults."""
    def refuse(constant):
        raise ValueError(constant + " is not a value of JSON")

    def unique(pairs):
        if len(pairs) > len(value := dict(pairs)):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice")
        return value
    try:
        value = json.loads(data, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        die(path, f"is not JSON: {e}")
    return value if isinstance(value, dict) else die(path, "must hold a JSON object")


def read_json(path):
    with open_file(path) as f:
        return parse_json(f.read(), path)


def to_json(value):
    return json.dumps(value, indent=1).encode() + b"\n"


@contextlib.contextmanager
def new_files(folder, names, size):
    """Opens files in a temporary folder inside folder. Once all are complete and on the disk they
    take their own names; where that fails nothing is left, and what was there before still is."""
    def remove_if_empty(folder):
        with contextlib.suppress(OSError):
            os.rmdir(folder)

    paths = [os.path.join(folder, name) for name in names]
    with blame(paths[0], "cannot be written: "), contextlib.ExitStack() as stack:
        if not os.path.exists(folder):
            os.mkdir(folder)
            stack.callback(remove_if_empty, folder)
        for path in paths:
            if os.path.exists(path) and not os.path.isfile(path):
                die(path, "is not a file, so it is not replaced")
        if size > (free := shutil.disk_usage(folder).free):
            die(paths[0], f"needs {size} bytes, only {free} are free there")
        new = os.path.join(folder, f".export-{os.getpid()}")
        stack.callback(shutil.rmtree, new, ignore_errors=True)  # first: then no signal is too early
        os.mkdir(new)
        files = [stack.enter_context(open(os.path.join(new, name), "wb")) for name in names]
        yield files
        for f in files:
            f.flush()
            os.fsync(f.fileno())
            f.close()
        for f, path in zip(files, paths):
            os.replace(f.name, path)
        if os.name == "posix":                                 # the new names must last too
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            os.fsync(handle)


class Progress:
    """Says what the model is, and where it takes longer than a second or two, how far it is."""
    def __init__(self, c, total):
        note(describe(c))
        self.done, self.total, self.shown = 0, total, False
        self.next = time.monotonic() + 1.5

    def add(self, size, last=False):
        self.done += size
        if time.monotonic() >= self.next or last and self.shown:
            tty, self.shown = sys.stderr.isatty(), True
            self.next = time.monotonic() + (0.2 if tty else 5)
            print(f"export: {self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB written",
                  end="\r" if tty and not last else "\n", file=sys.stderr, flush=True)


# ---- [2] config -------------------------------------------------------------------------------

class Slot(NamedTuple):
    name: str           # for the model's own, the key in config.json
    kind: object        # i int64, f float64, b 0 or 1, tuple: index into it; with ? null is allowed
    low: float = 0      # the range allowed
    high: float = 0
    default: object = ...   # where the key is missing (...: must not be), and how null is stored


ROPE, RESERVED = "rope_scaling.", ("reserved", "i", 0, 0)
FILE_SLOTS = [Slot(*row) for row in (                          # slots 1..15
    ("file_bytes",              "i",  0, 2**62),   ("files_bytes",          "i",  0, 2**62),
    ("tokenizer_bytes",         "i",  0, 2**62),   ("state_bytes",          "i",  0, 2**62),
    ("dtype",                   ("f32", "bf16", "q8")),        # of matrices; all else is f32
    ("tokenizer",               ("none", "bytes", "bpe")),
    ("coe_weights",             "b"),                          # are there any: an upcycled model
    *[RESERVED] * 8,
)]
MODEL_SLOTS = [Slot(*row) for row in (                         # slots 16..58
    ("vocab_size",              "i",  1, 2**24),   ("hidden_size",          "i",  1, 2**16),
    ("intermediate_size",       "i",  1, 2**20),   ("moe_intermediate_size", "i?", 1, 2**20, 1),
    ("num_hidden_layers",       "i",  1, 2**12),   ("num_attention_heads",  "i",  1, 2**12),
    ("n_shared_experts",        "i?", 1, 2**10, 0), ("n_routed_experts",    "i?", 1, 2**14, 0),
    ("num_experts_per_tok",     "i?", 1, 2**14, 1),
    ("kv_lora_rank",            "i",  1, 2**16),   ("q_lora_rank",          "i?", 1, 2**16, 0),
    ("qk_nope_head_dim",        "i",  1, 2**16),   ("qk_rope_head_dim",     "i",  2, 2**16),
    ("v_head_dim",              "i",  1, 2**16),
    ("inner_iter",              "i",  1, 2**10),   ("inner_residual",       "b",  0, 1, True),
    ("outer_residual",          "b",  0, 1, False), ("use_igate",           "b"),
    ("topk_method",             ("greedy", "group_limited_greedy")),
    ("n_group",                 "i?", 1, 2**14, 1), ("topk_group",          "i?", 1, 2**14, 1),
    ("norm_topk_prob",          "b",  0, 1, False),
    ("routed_scaling_factor",   "f",  -1e9, 1e9, 1.0),
    ("first_k_dense_replace",   "i",  0, 2**12, 0), ("moe_layer_freq",      "i",  1, 2**12, 1),
    ("aux_loss_alpha",          "f",  0, 1e9, 0.001), ("seq_aux",           "b",  0, 1, True),
    ("rms_norm_eps",            "f",  1e-30, 1, 1e-6),
    ("rope_theta",              "f",  1e-30, 1e30, 10000.0),
    (ROPE + "type",             ("none", "linear", "yarn"), 0, 2, "none"),
    (ROPE + "factor",           "f",  1e-30, 1e9, 1.0),
    (ROPE + "original_max_position_embeddings", "i", 1, 2**30, 4096),
    (ROPE + "beta_fast",        "f",  1e-30, 1e9, 32.0),
    (ROPE + "beta_slow",        "f",  1e-30, 1e9, 1.0),
    (ROPE + "mscale",           "f",  -1e9, 1e9, 1.0),
    (ROPE + "mscale_all_dim",   "f",  -1e9, 1e9, 0.0),
    ("max_position_embeddings", "i",  1, 2**30),
    ("attention_bias",          "b",  0, 1, False), ("tie_word_embeddings", "b",  0, 1, False),
    ("initializer_range",       "f",  0, 1e9, 0.02),
    ("bos_token_id",            "i?", 0, 2**24, -1), ("eos_token_id",       "i?", 0, 2**24, -1),
    ("torch_dtype",             ("float32", "bfloat16"), 0, 1, "float32"),  # of the checkpoint
)]
TEXT_SLOTS = [Slot(*row) for row in (                          # slots 59..65
    ("temperature",             "f?", 0, 1e9, -1.0),           # of generation_config.json
    ("top_k",                   "i?", 0, 2**24, -1),
    ("top_p",                   "f?", 0, 1, -1.0),
    ("min_p",                   "f?", 0, 1, -1.0),
    ("repetition_penalty",      "f?", 1e-30, 1e9, -1.0),
    ("add_bos_token",           "b",  0, 1, False),            # of tokenizer_config.json
    ("chat_template",           ("none", "deepseek_v2"), 0, 1, "none"),
)]
DEFAULTS = {"generation_config.json": TEXT_SLOTS[:5], "tokenizer_config.json": TEXT_SLOTS[5:6]}
SLOTS = FILE_SLOTS + MODEL_SLOTS + TEXT_SLOTS + [Slot(*RESERVED)] * 62    # to slot 127
DEEPSEEK = {"inner_iter": 1, "inner_residual": False, "outer_residual": True, "use_igate": False}
FIXED = {"hidden_act": "silu", "scoring_func": "softmax", "attention_dropout": 0.0,
         "mlp_bias": False, "quantization_config": None, ROPE + "truncate": True,
         ROPE + "attention_factor": None}                      # the only values that are computed
IGNORED = set("""model_type architectures auto_map transformers_version _name_or_path use_cache
    pad_token_id ep_size pretraining_tp num_key_value_heads head_dim qk_head_dim
    output_router_logits""".split())


class Config(dict):
    """Slot name -> value, as config.json has it; for null, what is stored."""
    __getattr__ = dict.__getitem__                             # c.hidden_size


def check(slot, value, where):
    """The value for a slot from one in JSON, ... for a missing one."""
    name, kind, low, high, default = slot
    if value is ... and default is ...:
        die(where, f"{name} is missing")
    if value is ... or value is None and "?" in kind:
        return default
    if isinstance(kind, tuple):
        if value in kind:
            return value
        must = " or ".join(json.dumps(k) for k in kind)
    elif kind == "b":
        if isinstance(value, bool):
            return value
        must = "true or false"
    else:
        integer = kind[0] == "i"
        if type(value) in ((int,) if integer else (int, float)) and low <= value <= high:
            return value if integer else float(value)
        must = f"{'an integer' if integer else 'a number'} in {low}..{high}"
        must += " or null" if "?" in kind else ""
    die(where, f"{name} is {json.dumps(value)[:80]}, must be {must}")


def check_together(c, where):
    """What cannot be said of one value alone."""
    def need(ok, name, must):
        if not ok:
            die(where, f"{name} is {c[name]}, must be {must}")
    E, K, n, k = c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group
    need(c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even")
    need(c.first_k_dense_replace <= c.num_hidden_layers, "first_k_dense_replace",
         f"at most num_hidden_layers, {c.num_hidden_layers}")
    for name in ("bos_token_id", "eos_token_id"):
        need(c[name] < c.vocab_size, name, f"below vocab_size, {c.vocab_size}")
    if E:
        need(K <= E, "num_experts_per_tok", f"1..{E} (n_routed_experts)")
    if E and c.topk_method == "group_limited_greedy":
        need(E % n == 0, "n_group", f"a divisor of n_routed_experts, {E}")
        need(k <= n, "topk_group", f"at most n_group, {n}")
        need(k * E // n >= K, "topk_group", f"enough for {K} experts in groups of {E // n}")
    if c[ROPE + "type"] == "yarn":
        need(c.rope_theta > 1, "rope_theta", "above 1 for yarn")
        need(c[ROPE + "beta_fast"] >= c[ROPE + "beta_slow"], ROPE + "beta_fast",
             f"at least beta_slow, {c[ROPE + 'beta_slow']}")
    if c.tokenizer == "bytes":
        need(c.vocab_size >= 258, "vocab_size", "258 or more, as the byte tokenizer has 258 tokens")
    if c.coe_weights:
        need(c.inner_iter > 1, "inner_iter", "2 or more where there are coe_weights")


def config_from_json(config, where):
    """Refuses what is not computed, warns of what is not known."""
    model_type = config.get("model_type")
    if model_type not in ("coe_deepseekv2", "deepseek_v2"):
        die(where, f"model_type is {json.dumps(model_type)}, must be coe_deepseekv2 or deepseek_v2")
    for new, old in (("dtype", "torch_dtype"), ("rope_parameters", "rope_scaling")):
        if (value := config.pop(new, None)) is not None:
            config[old] = value

    rope = config.pop("rope_scaling", None) or {}
    if not isinstance(rope, dict):
        die(where, f"rope_scaling is {json.dumps(rope)[:80]}, must be null or an object")
    rope = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope and rope.get("type") != "default":
        for key, value in ({"type": None, "factor": None} | rope).items():
            config[ROPE + key] = value

    dtype = str(config.get("torch_dtype") or "float32").removeprefix("torch.")
    config["torch_dtype"] = "float32" if dtype == "float16" else dtype
    config["n_shared_experts"] = config.get("n_shared_experts") or None
    for key, need in (("n_routed_experts", ("moe_intermediate_size", "num_experts_per_tok")),
                      ("topk_method", ("n_group", "topk_group"))):
        for other in need:
            if config.get(key) not in (None, "greedy") and config.get(other) is None:
                die(where, f"{other} is missing, {key} {json.dumps(config[key])[:80]} needs it")
    for key, must in FIXED.items():
        if config.get(key) not in (None, must):
            die(where, f"{key} is {json.dumps(config[key])[:80]}, must be {json.dumps(must)}")

    known = {s.name for s in MODEL_SLOTS} | FIXED.keys() | IGNORED
    if model_type == "deepseek_v2":
        known -= DEEPSEEK.keys()
    for key in sorted(config.keys() - known):
        note(f"{where}: warning: unknown key {key} is ignored")
    if model_type == "deepseek_v2":
        config |= DEEPSEEK
    c = Config(dtype="f32", tokenizer="none", tokenizer_bytes=0, state_bytes=0, coe_weights=False)
    c |= {s.name: s.default for s in TEXT_SLOTS}
    c |= {s.name: check(s, config.get(s.name, ...), where) for s in MODEL_SLOTS}
    check_together(c, where)
    return c


def config_to_json(c, model_type):
    """The config.json that the reference reads."""
    coe = model_type == "coe_deepseekv2"
    out = {"model_type": model_type,
           "architectures": ["CoeForCausalLM" if coe else "DeepseekV2ForCausalLM"]}
    if coe:
        out["auto_map"] = {"AutoConfig": "configuration_coe.CoeConfig",
                           "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM"}
    rope = {}
    for name, kind, low, *_ in MODEL_SLOTS:
        if name.startswith(ROPE):
            rope[name.removeprefix(ROPE)] = c[name]
        elif coe or name not in DEEPSEEK:
            out[name] = None if "?" in kind and c[name] < low else c[name]
    linear = {"type", "factor", "mscale_all_dim" if rope["mscale_all_dim"] else "type"}
    used = {"none": (), "linear": linear, "yarn": rope}[rope["type"]]
    out["rope_scaling"] = {key: value for key, value in rope.items() if key in used} or None
    out |= {key: FIXED[key] for key in ("hidden_act", "scoring_func", "attention_dropout")}
    return to_json(out | {"ep_size": 1, "num_key_value_heads": c.num_attention_heads})


def header_to_bytes(c):
    header = struct.pack("<4sI", b"COE1", 1)
    for name, kind, *_ in SLOTS:
        value = c.get(name, 0)                                 # 0: the reserved ones
        value = kind.index(value) if isinstance(kind, tuple) else value
        header += struct.pack("<d" if kind[0] == "f" else "<q", value)
    return header


def header_from_bytes(header, where):
    if header[:4] != b"COE1":
        die(where, f"starts with {header[:8]!r}, a model.bin starts with COE1"
            + (" (a config.json needs --init SEED)" if header[:1] == b"{" else ""))
    if len(header) < 1024:
        die(where, f"has {len(header)} bytes, the header alone must have 1024")
    if (version := struct.unpack_from("<I", header, 4)[0]) != 1:
        die(where, f"version is {version}, must be 1")
    c = Config()
    for i, slot in enumerate(SLOTS, 1):
        name, kind, *_, default = slot
        value, = struct.unpack_from("<d" if kind[0] == "f" else "<q", header, 8 * i)
        if isinstance(kind, tuple):
            value = kind[value] if 0 <= value < len(kind) else value
        elif kind == "b":
            value = {0: False, 1: True}.get(value, value)
        c[name] = value if "?" in kind and value == default else check(slot, value, where)
    check_together(c, where)
    return c


# ---- [3] tensors ------------------------------------------------------------------------------

class Tensor(NamedTuple):
    name: str           # Hugging Face's; {} stands for the number of the copy
    copies: int
    shape: tuple        # of one copy
    kind: str


MATRIX, GATE, NORM, BIAS, COE = "matrix", "gate", "norm", "bias", "coe_weights"


def tensors(c):
    """Every tensor of the model, in the order of model.bin. The one place that names them."""
    V, d, H, I = c.vocab_size, c.hidden_size, c.num_attention_heads, c.intermediate_size
    R, r, f = c.kv_lora_rank, c.q_lora_rank, c.moe_intermediate_size
    dn, dr, dv = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    E, S, C = c.n_routed_experts, c.n_shared_experts, c.inner_iter
    bias, own_gates, coe = c.attention_bias, c.use_igate, c.coe_weights

    yield Tensor("model.embed_tokens.weight", 1, (V, d), MATRIX)
    for l in range(c.num_hidden_layers):
        moe = E > 0 and l >= c.first_k_dense_replace and l % c.moe_layer_freq == 0
        for name, copies, shape, kind in (                     # copies 0 or False: not there
            ("input_layernorm.weight",                1,                (d,),            NORM),
            ("self_attn.q_proj.weight",               r == 0,           (H*(dn+dr), d),  MATRIX),
            ("self_attn.q_a_proj.weight",             r > 0,            (r, d),          MATRIX),
            ("self_attn.q_a_proj.bias",               r > 0 and bias,   (r,),            BIAS),
            ("self_attn.q_a_layernorm.weight",        r > 0,            (r,),            NORM),
            ("self_attn.q_b_proj.weight",             r > 0,            (H*(dn+dr), r),  MATRIX),
            ("self_attn.kv_a_proj_with_mqa.weight",   1,                (R+dr, d),       MATRIX),
            ("self_attn.kv_a_proj_with_mqa.bias",     bias,             (R+dr,),         BIAS),
            ("self_attn.kv_a_layernorm.weight",       1,                (R,),            NORM),
            ("self_attn.kv_b_proj.weight",            1,                (H*(dn+dv), R),  MATRIX),
            ("self_attn.o_proj.weight",               1,                (d, H*dv),       MATRIX),
            ("self_attn.o_proj.bias",                 bias,             (d,),            BIAS),
            ("post_attention_layernorm.weight",       1,                (d,),            NORM),
            ("mlp.gate.{}.weight",                    moe*own_gates*C,  (E, d),          GATE),
            ("mlp.gate.weight",                       moe > own_gates,  (E, d),          GATE),
            ("mlp.experts.{}.gate_proj.weight",       moe*E,            (f, d),          MATRIX),
            ("mlp.experts.{}.up_proj.weight",         moe*E,            (f, d),          MATRIX),
            ("mlp.experts.{}.down_proj.weight",       moe*E,            (d, f),          MATRIX),
            ("mlp.shared_experts.gate_proj.weight",   moe and S > 0,    (f*S, d),        MATRIX),
            ("mlp.shared_experts.up_proj.weight",     moe and S > 0,    (f*S, d),        MATRIX),
            ("mlp.shared_experts.down_proj.weight",   moe and S > 0,    (d, f*S),        MATRIX),
            ("mlp.coe_weights.{}",                    moe*coe*(C-1),    (d,),            COE),
            ("mlp.gate_proj.weight",                  not moe,          (I, d),          MATRIX),
            ("mlp.up_proj.weight",                    not moe,          (I, d),          MATRIX),
            ("mlp.down_proj.weight",                  not moe,          (d, I),          MATRIX),
        ):
            if copies:
                yield Tensor(f"model.layers.{l}." + name, int(copies), shape, kind)
    yield Tensor("model.norm.weight", 1, (d,), NORM)
    if not c.tie_word_embeddings:
        yield Tensor("lm_head.weight", 1, (V, d), MATRIX)


GROUP = 64              # q8: neighbours in a row that share a scale


def stored_as(tensor, dtype):
    """The numpy type of a tensor in a model.bin whose matrices have dtype; int8 stands for q8."""
    kinds = {"f32": "<f4", "bf16": "bfloat16", "q8": "i1"}
    return np.dtype(kinds[dtype] if tensor.kind == MATRIX else "<f4")


def aligned(n):
    return (n + 63) // 64 * 64


def copy_bytes(t, dtype):
    """The bytes that a copy of a tensor takes in a model.bin. q8: the int8, the scales."""
    kind = stored_as(t, dtype)
    size = math.prod(t.shape) * kind.itemsize
    if kind != np.int8:
        return size
    rows, cols = t.shape
    return aligned(size) + aligned(4 * rows * -(-cols // GROUP))


def layout(c):
    """(tensor, its offset in model.bin) in file order, and (None, the end of the weights)."""
    at = 1024 + c.files_bytes + c.tokenizer_bytes
    for t in tensors(c):
        yield t, at
        at = aligned(at + t.copies * copy_bytes(t, c.dtype))
    yield None, at


def blocks(t):
    """A copy of a tensor as slices of rows, of about a million numbers: what is in memory at a
    time, and few enough for the processor's cache."""
    step = max(1, 2**20 // math.prod(t.shape[1:]))
    return [slice(i, min(i + step, t.shape[0])) for i in range(0, t.shape[0], step)]


def in_groups(x):
    """(rows, groups, GROUP) of a matrix; zeros fill up the last group of a row."""
    rows, cols = x.shape
    return np.pad(x, ((0, 0), (0, -cols % GROUP))).reshape(rows, -1, GROUP)


def quantise(x):
    """The int8 and the scales of some rows. What dequantise makes of them has the same int8 and
    the same scales, to the bit: the largest of a group is 127 times its scale."""
    x, cols = in_groups(x.astype(np.float32, copy=False)), x.shape[1]
    scale = np.abs(x).max(2) / np.float32(127)
    x /= np.where(scale > 0, scale, np.inf)[:, :, None]        # a group of zeros stays one
    np.rint(x, out=x)
    np.clip(x, -127, 127, out=x)                               # where the scale is subnormal
    return x.astype(np.int8).reshape(len(x), -1)[:, :cols], scale


def dequantise(q, scale):
    x = in_groups(q.astype(np.float32)) * scale[:, :, None]
    return x.reshape(len(x), -1)[:, :q.shape[1]]


def describe(c):
    """The model in one line. Active: the parameters that one token is multiplied with."""
    total = active = 0
    for t in tensors(c):
        size, times = math.prod(t.shape), t.copies
        total += size * times
        if ".experts." in t.name:
            times = c.num_experts_per_tok * c.inner_iter
        elif "shared_experts" in t.name or "mlp.gate.weight" in t.name:
            times = c.inner_iter
        elif "embed_tokens" in t.name:
            times = c.tie_word_embeddings                      # else its rows are only looked up
        active += size * times
    residual = ["coe_weights"] * c.coe_weights or ["inner"] * c.inner_residual
    residual = "+".join(residual + ["outer"] * c.outer_residual) or "none"
    return (f"d {c.hidden_size}, L {c.num_hidden_layers}, E {c.n_routed_experts}, "
            f"K {c.num_experts_per_tok}, C {c.inner_iter}, S {c.n_shared_experts}, "
            f"residual {residual}, gates {'own' if c.use_igate else 'shared'}, "
            f"{total / 1e6:.3f} M parameters, {active / 1e6:.3f} M active")


# ---- [4] tokenizer ----------------------------------------------------------------------------

# A byte-level BPE goes into model.bin as these tables. Each starts at a multiple of 64 bytes; all
# numbers but those of text are u32.
#
#     head          [16]          the numbers of tokens, bytes of text, order, merges, stages,
#                                 alternatives, items, classes, ranges, added, normal; and flags:
#                                 1 ignore_merges, 2 the text is to be in NFC
#     first         [tokens + 1]  token i decodes to text[first[i] : first[i + 1]]
#     text          [bytes]
#     byte_token    [256]         the token of each byte; of the 13 that no UTF-8 has there may be
#                                 none, 2^32 - 1
#     order         [order]       tokens by their bytes; none unless ignore_merges
#     merges        [merges, 4]   left, right, rank, result; sorted
#     stages        [stages + 1]  of the pre-tokenizer: the first alternative of each,
#     alternatives  [... + 1]     the first item of each,
#     items         [items, 4]    kind, class, least, most, see [8]
#     classes       [classes, 2]  the first range, how many
#     ranges        [ranges, 2]   lowest and highest code point; sorted
#     added         [added, 2]    tokens that are found in the text before all else, by their bytes:
#                                 id, flags (ADDED_FLAGS)
#     normal        [normal, 3]   lowest and highest code point, and 255: text with it may not be in
#                                 NFC; or else the combining class. Empty without flag 2

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "generation_config.json", "chat_template.jinja")      # travel inside model.bin, verbatim
ADDED_FLAGS = {"special": 1, "lstrip": 2, "rstrip": 4, "normalized": 8}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEEPSEEK_V2_CHAT = ["bos_token", r"'User: ' + message['content'] + '\n\n'",
                    "'Assistant: ' + message['content'] + eos_token",
                    r"message['content'] + '\n\n'", "'Assistant:'"]


def byte_level():
    """The character that stands for each byte in a tokenizer.json (GPT-2's table): its own if that
    prints, else one from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(b if b in prints else next(others)): b for b in range(256)}


BYTE_LEVEL = byte_level()                                      # character -> byte
NOT_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))                   # DeepSeek-V2 has no tokens for these


def byte_tokenizer(c):
    """tokenizer.json and tokenizer_config.json for what the C code does: a token is a byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    special = {256: "<|beginoftext|>", 257: "<|endoftext|>"}   # a model of train.c uses only 257
    with_bos, bos = None, special.get(c.bos_token_id)
    if c.add_bos_token and bos:            # transformers does not look at add_bos_token itself
        one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        with_bos = {"type": "TemplateProcessing", "single": one,
                    "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {bos: {"id": bos, "ids": [c.bos_token_id], "tokens": [bos]}}}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for i, text in special.items()],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": with_bos,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": BYTE_LEVEL, "merges": []}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": c.add_bos_token,
              "bos_token": special.get(c.bos_token_id), "eos_token": special.get(c.eos_token_id),
              "pad_token": special[257],
              "clean_up_tokenization_spaces": False, "model_max_length": c.max_position_embeddings}
    return tokenizer, config


def read_tokenizer(folder, c):
    """Sets what c says of text, from the tokenizer's files. Returns its section of model.bin."""
    path, settings_path = (os.path.join(folder, name) for name in FILES[:2])
    settings = read_json(settings_path) if os.path.lexists(settings_path) else {}
    section = b""
    if os.path.lexists(path):
        found, (ours, _) = read_json(path), byte_tokenizer(c)
        stages = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        c["tokenizer"] = "bytes" if all(found.get(s) == ours[s] for s in stages) else "bpe"
        with blame(path, "is not a tokenizer.json: "):
            try:
                section = bpe_section(found, c) if c.tokenizer == "bpe" else b""
                c["add_bos_token"] = c.tokenizer == "bytes" or begins_with_bos(found, c)
            except Failure as e:
                die(path, e)
            except KeyError as e:
                raise ValueError(f"{e} is missing")
        ids = {t["content"]: t["id"] for t in found.get("added_tokens", [])}
        ids |= found["model"]["vocab"]
        for name in ("bos_token", "eos_token"):
            token, known = settings.get(name), c[name + "_id"]
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and ids.get(str(token), -1) != known:
                note(f"{settings_path}: warning: {name} {json.dumps(token)} is "
                     f"{ids.get(str(token), 'no token')}, {name}_id of config.json "
                     f"{'null' if known < 0 else known}")
        c["chat_template"] = chat_template(folder, settings, settings_path)
    c["tokenizer_bytes"] = len(section)
    return section


def chat_template(folder, settings, where):
    """Which of the chats that run.c knows this is, by what the template puts out."""
    template, path = settings.get("chat_template"), os.path.join(folder, FILES[-1])
    if isinstance(template, list):
        with blame(where, "chat_template: "):
            template = {t["name"]: t["template"] for t in template}.get("default")
    if os.path.lexists(path):
        where = path
        with blame(path), open_file(path) as f:
            template = f.read().decode()
    if template is None:
        return "none"
    outputs = re.findall(r"\{\{-?\s*(.*?)\s*-?\}\}", str(template), re.DOTALL)
    if [output.replace("\n", r"\n") for output in outputs] == DEEPSEEK_V2_CHAT:
        return "deepseek_v2"
    note(f"{where}: the chat_template is not DeepSeek-V2's, so there is no ./run -m chat")
    return "none"


def show(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def must(ok, what, *values):
    """Fails with what, in which {} stands for values. read_tokenizer() adds the file's name."""
    if not ok:
        raise Failure(what.format(*map(show, values)) if values else what)


def parts(value, key):
    """The parts of a Sequence, or the one stage that is there, or nothing for null."""
    if value is not None and value["type"] == "Sequence":
        return [part for v in value[key] for part in parts(v, key)]
    return [] if value is None else [value]


def begins_with_bos(found, c):
    """Whether what the library makes of a text begins with BOS."""
    for part in parts(found.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing":
            first = part["single"][0].get("SpecialToken")
            return first and part["special_tokens"][first["id"]]["ids"] == [c.bos_token_id] or False
    return False


def bpe_section(found, c):
    """The tables of a tokenizer.json. What Hugging Face's library would do with it and the C code
    does not is refused by name; what has no influence (unk_token, most of what comes after the
    model) is ignored."""
    model = found["model"]
    must(model.get("type", "BPE") == "BPE",                    # GPT-2's has no type
         "model {} is not supported, only BPE (without this file: none)", model.get("type"))
    for key, only in (("dropout", 0), ("continuing_subword_prefix", ""), ("end_of_word_suffix", ""),
                      ("byte_fallback", False)):
        must(model.get(key) in (None, only), "model." + key + " is {}, must be {} or null",
             model.get(key), only)
    normalizers = parts(found.get("normalizer"), "normalizers")
    for part in normalizers:
        must(part["type"] == "NFC", "normalizer {} is not supported, only NFC", part["type"])
    for part in parts(found.get("decoder"), "decoders"):
        must(part["type"] == "ByteLevel", "decoder {} is not supported, only ByteLevel",
             part["type"])

    vocab, text, pieces = model["vocab"], {}, set()            # text: id -> bytes
    for token, i in vocab.items():
        must(type(i) is int and 0 <= i < c.vocab_size,
             "token {} is {}, must be in 0..{} (vocab_size)", token, i, c.vocab_size - 1)
        must(i not in text, "token {} is {}, as another one is", token, i)
        try:
            text[i] = bytes(map(BYTE_LEVEL.__getitem__, token))
            pieces.add(i)
        except KeyError:                                       # text never becomes such a token
            text[i] = token.encode()
    for char, byte in BYTE_LEVEL.items():
        must(char in vocab or byte in NOT_UTF8, f"byte 0x{byte:02X}, {{}}, has no token", char)
    added = added_tokens(found, c, bool(normalizers))
    for i, content, _ in added:
        must(text.setdefault(i, content) == content, "added token {} is {}, as another token is",
             content.decode(), i)

    merges, rank = {}, 0
    for pair in model["merges"]:
        if isinstance(pair, str) and pair.startswith("#version"):
            continue
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        for token in (left, right, left + right):
            must(token in vocab, "merge {} needs the token {}, there is none", pair, token)
        if vocab[left + right] in pieces:
            merges[vocab[left], vocab[right]] = rank, vocab[left + right]  # the last one counts
        rank += 1

    n_tokens = max(text) + 1
    texts = [text.get(i, b"") for i in range(n_tokens)]        # a hole in the ids: no bytes
    order = sorted(pieces, key=text.get) if model.get("ignore_merges") else []
    patterns = pattern_tables(stages(found.get("pre_tokenizer")))
    normal = nfc_table() if normalizers else []
    head = [n_tokens, sum(map(len, texts)), len(order), len(merges), len(patterns[0]) - 1,
            len(patterns[1]) - 1, *map(len, patterns[2:]), len(added), len(normal),
            bool(order) + 2 * bool(normal), 0, 0, 0, 0]
    section = b""
    for table in (head, np.cumsum([0, *map(len, texts)]), b"".join(texts),
                  [vocab.get(char, 2**32 - 1) for char in BYTE_LEVEL], order,
                  [(*pair, *merges[pair]) for pair in sorted(merges)], *patterns,
                  [(i, flags) for i, _, flags in added], normal):
        section += table if isinstance(table, bytes) else np.array(table, "<u4").tobytes()
        section += bytes(-len(section) % 64)
    return section


def added_tokens(found, c, nfc):
    """(id, bytes, flags) of each, sorted by its bytes. The library looks their ids up in the
    vocabulary and counts on behind it for others; it does not believe what the file says."""
    vocab, added = found["model"]["vocab"], {}
    end = len(vocab)
    for token in found.get("added_tokens", []):
        content = token["content"]
        i = vocab.get(content, end)
        end = max(end, i + 1)
        must(content, "added token {} is empty", token["id"])
        must(content not in added, "added token {} is there twice", content)
        must(token["id"] == i, "added token {} is {}, must be {}, its place in the vocabulary",
             content, token["id"], i)
        must(i < c.vocab_size, "added token {} is {}, must be below vocab_size, {}", content, i,
             c.vocab_size)
        must(not token["single_word"], "added token {}: single_word is not supported", content)
        must(not (nfc and token["normalized"]) or unicodedata.is_normalized("NFC", content),
             "added token {} is normalized, but not in NFC", content)
        added[content] = i, sum(bit for key, bit in ADDED_FLAGS.items() if token[key])
    rstrip, normalized = ADDED_FLAGS["rstrip"], ADDED_FLAGS["normalized"]
    greedy = {flags & normalized for _, flags in added.values() if flags & rstrip}
    for content, (_, flags) in added.items():                  # the library takes such spaces twice
        must(content[0] not in WHITE_SPACE or flags & normalized not in greedy, "added token {} "
             "starts with white space, which another one with rstrip takes: not supported", content)
    return sorted(((i, content.encode(), flags) for content, (i, flags) in added.items()),
                  key=lambda token: token[1])


def stages(pre_tokenizer):
    """The pattern of each stage: it splits the text into its matches and what is between them."""
    found = parts(pre_tokenizer, "pretokenizers")
    must(found and found[-1]["type"] == "ByteLevel",
         "pre_tokenizer does not end in ByteLevel, only byte-level BPE is supported")
    for n, part in enumerate(found, 1):
        kind, what = part["type"], f"pre_tokenizer {n}, {part['type']}"
        if kind == "Split":
            (form, text), = part["pattern"].items()
            what += f" {show(text)}: "
            must(part["behavior"] == "Isolated",
                 f"{what}behavior {part['behavior']} is not supported, only Isolated")
            must(form in ("Regex", "String"), f"{what}pattern is {form}, must be Regex or String")
            try:
                yield Regex(text).alternatives if form == "Regex" else literal(text)
            except ValueError as e:
                must(False, f"{what}{e}")
        elif kind == "Digits":
            yield [[Item(TAKE, digits(), 1, 1 if part["individual_digits"] else NO_LIMIT)]]
        else:
            must(kind == "ByteLevel", f"{what} is not supported")
            must(n == len(found), f"{what} must be the last")
            must(not part.get("add_prefix_space", True),
                 f"{what}: add_prefix_space is true, must be false")
            if part.get("use_regex", True):
                yield Regex(GPT2).alternatives


def pattern_tables(stages):
    """stages, alternatives, items, classes, ranges."""
    first_alternative, first_item, items, classes, ranges = [0], [0], [], {}, []
    for alternatives in stages:
        for alternative in alternatives:
            for kind, chars, least, most, _ in alternative:
                key = chars.tobytes()
                if key not in classes:
                    edges = np.flatnonzero(np.diff(chars, prepend=False, append=False))
                    classes[key] = len(classes), len(ranges), len(edges) // 2
                    ranges += zip(edges[::2], edges[1::2] - 1)
                items.append((kind, classes[key][0], least, most))
            first_item.append(len(items))
        first_alternative.append(len(first_item) - 1)
    return first_alternative, first_item, items, [c[1:] for c in classes.values()], ranges


def nfc_table():
    """Text is in NFC if none of its characters has 255 here (NFC_QC is No or Maybe) and combining
    classes do not decrease from one mark to the next."""
    value = np.zeros(END_OF_UNICODE, np.uint8)
    value[0x1161:0x1176] = value[0x11A8:0x11C3] = 255          # a Hangul vowel and final consonant
    for code in range(END_OF_UNICODE):
        char = chr(code)
        value[code] = value[code] or unicodedata.combining(char)
        if not unicodedata.is_normalized("NFC", char):
            value[code] = 255
        first, _, second = unicodedata.decomposition(char).partition(" ")
        if second and first[0] != "<":
            both = chr(int(first, 16)) + chr(int(second, 16))
            if unicodedata.normalize("NFC", both) == char:     # the second joins the first
                value[ord(both[1])] = 255
    starts = np.flatnonzero(np.diff(value, prepend=0, append=0))
    return [(a, b - 1, value[a]) for a, b in zip(starts, starts[1:]) if value[a]]


# ---- [5] sources: .path, .config, .files {name: bytes}, .read(tensor, copy, rows) -> array ------

def bytes_at(file, path, offset, size):
    with blame(path):
        data = bytearray(size)
        file.seek(offset)
        if file.readinto(data) != size:
            die(path, f"ends before byte {offset + size}")
    return data


def rows_at(file, path, offset, kind, rows, width=()):
    """Some rows of an array whose first row is at offset. width: the shape of a row."""
    size, n = math.prod(width) * kind.itemsize, rows.stop - rows.start
    data = bytes_at(file, path, offset + rows.start * size, n * size)
    return np.frombuffer(data, kind).reshape(n, *width)


def defaults_in(files, folder):
    """{slot: value} of what generation_config.json and tokenizer_config.json say."""
    out = {}
    for name, slots in DEFAULTS.items():
        path = os.path.join(folder, name)
        found = parse_json(files[name], path) if name in files else {}
        if found.get("do_sample") is False:
            found["temperature"] = 0
        out |= {s.name: check(s, found[s.name], path) for s in slots if s.name in found}
    return out


class Checkpoint:
    """A folder with config.json, safetensors and maybe a tokenizer. All tensors are checked before
    anything is written."""
    TYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype("bfloat16"), "F16": np.dtype("<f2")}
    HINTS = {"e_score_correction_bias": "sigmoid scoring is not computed",
             "weight_scale_inv": "fp8 weights are not read, convert them to bfloat16",
             "lm_head": "tie_word_embeddings is true"}

    def __init__(self, folder):
        self.path = folder
        file = lambda name: os.path.join(folder, name)
        self.config = c = config_from_json(read_json(file("config.json")), file("config.json"))
        self.tokenizer_section = read_tokenizer(folder, c)
        self.where = {}                    # tensor name -> open file, its path, type, shape, offset
        for path, names in self.shards():
            # The library checks the header, but for names that occur twice. To read some rows it
            # would read the whole tensor, so that is done here.
            with blame(path), safe_open(path, framework="numpy", backend="pread") as f:
                found = set(f.keys())
            f = open_file(path)
            start = 8 + int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(start - 8), path)
            for name in sorted(found ^ (names or found)):
                die(path, f"tensor {name} " + ("is here, but not in the index" if name in found
                                               else "is not here, where the index says it is"))
            self.where |= {name: (f, path, header[name]["dtype"], header[name]["shape"],
                                  start + header[name]["data_offsets"][0]) for name in found}
        c["coe_weights"] = any(".mlp.coe_weights." in name for name in self.where)
        check_together(c, folder)
        self.check_tensors()
        self.files = {}
        for name in FILES:
            if os.path.lexists(file(name)):
                with open_file(file(name)) as f:
                    self.files[name] = f.read()
        c |= defaults_in(self.files, folder)

    def shards(self):
        """(path, the tensors that the index says are in it; without an index None)"""
        single = os.path.join(self.path, "model.safetensors")
        index = single + ".index.json"
        shards = {single: None}
        if not os.path.lexists(single):
            if not os.path.lexists(index):
                die(self.path, "has neither model.safetensors nor model.safetensors.index.json")
            shards, weight_map = {}, read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                die(index, "has no weight_map from tensors to files")
            for name, file in weight_map.items():
                if not isinstance(file, str) or file != os.path.basename(file) or not file:
                    die(index, f"{name} is in {json.dumps(file)[:80]}, must be a file's name")
                shards.setdefault(os.path.join(self.path, file), set()).add(name)
        for path in shards:
            if not os.path.isfile(path):
                die(path, "is no file" + ", but the index names it" * (path != single))
        return shards.items()

    def check_tensors(self):
        """Finds the missing, wrongly shaped and unknown ones, and the type of them all together."""
        known, types = set(), set()
        for t in tensors(self.config):
            for i in range(t.copies):
                name, shape, _ = self.place(t, i)
                if name not in self.where:
                    die(self.path, f"tensor {name} {list(shape)} is missing")
                if name not in known:                          # else another part of a fused one
                    _, path, dtype, found, _ = self.where[name]
                    if found != list(shape):
                        die(path, f"tensor {name} is {found}, must be {list(shape)}")
                    if dtype not in self.TYPES:
                        die(path, f"tensor {name} is {dtype}, must be F32, BF16 or F16")
                    known.add(name)
                    types.add(dtype)
        for name in sorted(self.where.keys() - known):
            hint = [hint for part, hint in self.HINTS.items() if part in name]
            die(self.where[name][1], f"tensor {name} is unknown: "
                + (hint or ["this config has no such tensor"])[0])
        self.config["torch_dtype"] = "bfloat16" if types == {"BF16"} else "float32"

    def place(self, t, i):
        """(name in the checkpoint, its shape, the first row of the copy). A layer's experts may be
        fused in one tensor, with gate_proj's rows above up_proj's."""
        before, experts, part = t.name.partition("experts.{}.")
        fused = before + "experts." + ("down_proj" if part.startswith("down") else "gate_up_proj")
        if not experts or fused not in self.where:
            return t.name.format(i), t.shape, 0
        rows, cols = t.shape
        if part.startswith("down"):
            return fused, (t.copies, rows, cols), i * rows
        return fused, (t.copies, 2 * rows, cols), (2 * i + part.startswith("up")) * rows

    def read(self, t, i, rows):
        name, _, first = self.place(t, i)
        f, path, dtype, _, offset = self.where[name]
        rows = slice(first + rows.start, first + rows.stop)
        return rows_at(f, path, offset, self.TYPES[dtype], rows, t.shape[1:])


class ModelBin:
    """A model.bin, whose size must be what its header says, to the byte."""
    def __init__(self, path):
        self.path, self.file, self.offset = path, open_file(path), {}
        self.config = c = header_from_bytes(self.file.read(1024), path)
        size = os.fstat(self.file.fileno()).st_size
        for name in ("files_bytes", "tokenizer_bytes", "state_bytes"):
            if c[name] % 64 or c[name] > size:
                die(path, f"{name} is {c[name]}, must be a multiple of 64 within {size}")
        for t, at in layout(c):
            self.offset[t and t.name] = at
            if at > size:                                      # not through a million layers
                break
        if not size == c.file_bytes == at + c.state_bytes:
            die(path, f"has {size} bytes, says {c.file_bytes}, and its header adds up to "
                f"{at + c.state_bytes}{' or more' if t else ''}")
        if (c.tokenizer == "bpe") != (c.tokenizer_bytes > 0):
            die(path, f"tokenizer is {c.tokenizer}, but tokenizer_bytes {c.tokenizer_bytes}")
        self.files = dict(self.embedded(bytes_at(self.file, path, 1024, c.files_bytes)))
        self.tokenizer_section = bytes_at(self.file, path, 1024 + c.files_bytes, c.tokenizer_bytes)

    def embedded(self, section):
        at = 0
        while at < len(section):
            name, size = struct.unpack_from("<56sQ", section, at)
            name = name.rstrip(b"\0").decode(errors="replace")
            if name not in FILES:                              # no paths, no config.json
                die(self.path, f"embedded file {name!r} must be one of {', '.join(FILES)}")
            if size > len(section) - at - 64:
                die(self.path, f"embedded file {name} has {size} bytes, more than its section")
            yield name, section[at + 64 : at + 64 + size]
            at = aligned(at + 64 + size)

    def read(self, t, i, rows):
        kind = stored_as(t, self.config.dtype)
        at = self.offset[t.name] + i * copy_bytes(t, self.config.dtype)
        x = rows_at(self.file, self.path, at, kind, rows, t.shape[1:])
        if kind != np.int8:
            return x
        at, groups = at + aligned(math.prod(t.shape)), -(-t.shape[1] // GROUP)
        return dequantise(x, rows_at(self.file, self.path, at, np.dtype("<f4"), rows, (groups,)))


class Fresh:
    """Random weights, as the paper's runs start from."""
    def __init__(self, path, seed):
        self.path, self.files = path, {}
        self.config = config_from_json(read_json(path), path)
        self.random = np.random.default_rng(seed)

    def read(self, t, i, rows):
        shape = rows.stop - rows.start, *t.shape[1:]
        if t.kind == NORM:
            return np.ones(shape, np.float32)
        if t.kind == BIAS:
            return np.zeros(shape, np.float32)
        if t.kind == GATE:
            bound = np.float32(self.config.hidden_size ** -0.5)
            return self.random.random(shape, np.float32) * 2 * bound - bound
        x = self.random.standard_normal(shape, np.float32)
        x *= np.float32(self.config.initializer_range)
        return x


def must_be_deepseek(source, who):
    for key, must in DEEPSEEK.items():
        if key != "use_igate" and source.config[key] != must:
            die(source.path, f"{key} is {json.dumps(source.config[key])}, {who} {json.dumps(must)}")


def upcycle(source, C):
    """Makes a DeepSeek-V2 source a CoE of C iterations: every gate a copy of the one there was, the
    coe_weights 0. Until it is trained, it computes what it computed before."""
    must_be_deepseek(source, "--upcycle needs")
    c, read = source.config, source.read
    if not any(t.kind == GATE for t in tensors(c)):
        die(source.path, "has no layer with experts, so there is nothing to --upcycle")
    source.config = Config(c, inner_iter=C, use_igate=True, inner_residual=True, coe_weights=True)
    old_gate = "gate.{}." if c.use_igate else "gate."

    def read_upcycled(t, i, rows):
        if t.kind == COE:
            return np.zeros(rows.stop - rows.start, np.float32)
        if t.kind == GATE:
            return read(t._replace(name=t.name.replace("gate.{}.", old_gate)), 0, rows)
        return read(t, i, rows)
    source.read = read_upcycled


# ---- [6] targets ------------------------------------------------------------------------------

def write_array(f, array, progress):
    f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    progress.add(array.nbytes)


def write_copy(f, source, t, i, kind, progress):
    """A copy of a tensor, as numbers of this kind or, for int8, as q8 has it."""
    scales = []
    for rows in blocks(t):
        x = source.read(t, i, rows)
        if kind == np.int8:
            x, scale = quantise(x)
            if not np.isfinite(scale).all():                   # NaN and infinity come through
                die(source.path, f"tensor {t.name.format(i)} has weights that are not finite, "
                    "q8 cannot hold them")
            scales.append(scale)
        write_array(f, x.astype(kind, copy=False), progress)
    if scales:
        f.write(bytes(-f.tell() % 64))
        for scale in scales:
            write_array(f, scale, progress)
        f.write(bytes(-f.tell() % 64))


def write_bin(source, path, dtype):
    files, tokenizer = b"", getattr(source, "tokenizer_section", b"")
    for name, data in source.files.items():
        files += struct.pack("<56sQ", name.encode(), len(data)) + data
        files += bytes(-len(files) % 64)
    c = Config(source.config, dtype=dtype, files_bytes=len(files), state_bytes=0)
    *places, (_, c["file_bytes"]) = layout(c)

    folder, name = os.path.split(os.path.realpath(path))       # a link stays one
    if not os.path.isdir(folder):
        die(path, f"cannot be written: there is no folder {folder}")
    with new_files(folder, [name], c.file_bytes) as (f,):
        progress = Progress(c, c.file_bytes)
        f.write(header_to_bytes(c) + files + tokenizer)
        for t, offset in places:
            f.write(bytes(offset - f.tell()))
            for i in range(t.copies):
                write_copy(f, source, t, i, stored_as(t, dtype), progress)
        f.write(bytes(c.file_bytes - f.tell()))
        progress.add(0, last=True)


def with_defaults(source):
    """The embedded files as they go into a checkpoint: verbatim, but where the header has other
    defaults than generation_config.json or tokenizer_config.json, these follow (train's options
    change the header)."""
    c, files = source.config, dict(source.files)
    said = {s.name: s.default for s in TEXT_SLOTS} | {"add_bos_token": c.tokenizer == "bytes"}
    if c.tokenizer == "bpe" and "tokenizer.json" in files:
        found = parse_json(files["tokenizer.json"], source.path)
        said["add_bos_token"] = begins_with_bos(found, c)
    said |= defaults_in(files, source.path)
    for name, slots in DEFAULTS.items():
        if all(c[s.name] == said[s.name] for s in slots):
            continue
        old = parse_json(files[name], name) if name in files else None
        new = {s.name: c[s.name] for s in slots if c[s.name] != s.default or s.kind == "b"}
        if name == "generation_config.json":
            if old is None:                # as transformers would make it from config.json
                ids = "bos_token_id", "eos_token_id"
                old = {key: c[key] if c[key] >= 0 else None for key in ids}
            if new:                        # greedy is no temperature there, but this flag
                new["do_sample"] = new.get("temperature") != 0
            if not c.temperature:
                del new["temperature"]
            old = {k: v for k, v in old.items() if k not in {"do_sample", *said}}
        if old is not None:                # a tokenizer's file is not made up
            files[name] = to_json(old | new)
    return files


def warn_of_transformers(c, path):
    """Names what is part of DeepSeek-V2, but not of transformers' class of that name."""
    n, all_n = c[ROPE + "mscale"], c[ROPE + "mscale_all_dim"]
    yarn = c[ROPE + "type"] == "yarn" and c[ROPE + "factor"] > 1
    for differs, what in (
            (c.norm_topk_prob and c.num_experts_per_tok > 1, "norm_topk_prob true"),
            (c.moe_layer_freq > 1, f"moe_layer_freq {c.moe_layer_freq}"),
            (not c.n_shared_experts, "n_shared_experts null"),
            (not c.n_routed_experts, "n_routed_experts null"),
            (c.hidden_size % c.num_attention_heads, "hidden_size no multiple of the heads"),
            (yarn and not (n and all_n) and (n, all_n) != (1, 0),
             f"rope_scaling.mscale {n} with mscale_all_dim {all_n}")):
        if differs:
            note(f"{path}: warning: transformers' DeepseekV2ForCausalLM does not know {what}")


def write_checkpoint(source, folder, model_type):
    """config.json, model.safetensors and the tokenizer's files. The safetensors library writes only
    what is in memory all at once, so its format is written here: u64 bytes of JSON, the JSON padded
    to 8, and the arrays by name, as the library sorts them."""
    c = source.config
    dtype, kind = ("BF16", "bfloat16") if c.torch_dtype == "bfloat16" else ("F32", "<f4")
    kind = np.dtype(kind)
    places = {t.name.format(i): (t, i) for t in tensors(c) for i in range(t.copies)}
    if model_type == "deepseek_v2":
        must_be_deepseek(source, "a deepseek_v2 has")
        warn_of_transformers(c, folder)
        places = {name.replace(".gate.0.", ".gate."): place for name, place in places.items()}
    places = dict(sorted(places.items()))
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, (t, _) in places.items():
        end = size + math.prod(t.shape) * kind.itemsize
        header[name] = {"dtype": dtype, "shape": t.shape, "data_offsets": [size, end]}
        size = end
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    files = with_defaults(source)
    if c.tokenizer == "bytes":
        for name, value in zip(("tokenizer.json", "tokenizer_config.json"), byte_tokenizer(c)):
            files.setdefault(name, to_json(value))
    files["config.json"] = config_to_json(c, model_type)
    with new_files(folder, ["model.safetensors", *files], size) as (f, *others):
        progress = Progress(c, size)
        f.write(struct.pack("<Q", len(header)) + header)
        for t, i in places.values():
            write_copy(f, source, t, i, kind, progress)
        for other, data in zip(others, files.values()):
            other.write(data)
        progress.add(0, last=True)


# ---- [7] command line -------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"export: {' '.join(message.split())} (see --help)\n")


def number(low, high):
    def parse(text):
        if not re.fullmatch("[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer in {low}..{high}")
        return int(text)
    return parse


def arguments():
    p = Parser(
        prog="export.py", allow_abbrev=False,
        description="Converts Hugging Face checkpoints (coe_deepseekv2, deepseek_v2) to model.bin "
        "and back, some rows of a tensor in memory at a time.",
        epilog="SOURCE is a folder, a model.bin or, with --init, a config.json. From a model.bin, "
        "TARGET is a folder if there is one of that name, or if it does not end in .bin and is no "
        "file; else a model.bin. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.")
    p.add_argument("source", metavar="SOURCE")
    p.add_argument("target", metavar="TARGET")
    p.add_argument("--dtype", choices=("f32", "bf16", "q8"), help="type of model.bin's matrices: "
                   "4, 2 or about 1.06 bytes a weight; norms, gates and biases are always f32 "
                   "(default: as in SOURCE, if that is a model.bin, else f32)")
    p.add_argument("--init", metavar="SEED", type=number(0, 2**64 - 1),
                   help="fresh weights, 0..2^64-1 (default: SOURCE has the weights)")
    p.add_argument("--upcycle", metavar="C", type=number(2, 1024), help="make a DeepSeek-V2 model "
                   "a CoE of C iterations, 2..1024, that starts out the same (default: no)")
    p.add_argument("--model_type", choices=("coe_deepseekv2", "deepseek_v2"),
                   help="of the checkpoint to write (default: coe_deepseekv2)")
    p.add_argument("--version", action="version", version="export.py 1, for model.bin version 1")
    a = p.parse_args()
    a.to_folder = a.init is None and not os.path.isdir(a.source) and (
        os.path.isdir(a.target) or not a.target.endswith(".bin") and not os.path.exists(a.target))
    if a.dtype and a.to_folder:
        p.error("argument --dtype: is for a model.bin, a checkpoint has its config's torch_dtype")
    if a.model_type and not a.to_folder:
        p.error("argument --model_type: is for a checkpoint, TARGET is to be a model.bin")
    return a


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as an interrupt does
    try:
        a = arguments()
        if a.init is not None:
            source = Fresh(a.source, a.init)
        else:
            source = Checkpoint(a.source) if os.path.isdir(a.source) else ModelBin(a.source)
        if a.upcycle:
            upcycle(source, a.upcycle)
        if source.config.dtype == "q8" and (a.to_folder or a.dtype not in (None, "q8")):
            note(f"{a.source}: warning: its matrices are q8, they stay rounded to that")
        if a.to_folder:
            write_checkpoint(source, a.target, a.model_type or "coe_deepseekv2")
        else:
            write_bin(source, a.target, a.dtype or source.config.dtype)
    except Failure as e:
        note(" ".join(str(e).split()))
        return 1
    except (OSError, MemoryError) as e:
        note(f"{getattr(e, 'filename', None) or a.source}: {getattr(e, 'strerror', None) or e}")
        return 1
    except KeyboardInterrupt:
        note("interrupted, nothing was written")
        return 130


# ---- [8] patterns -----------------------------------------------------------------------------

# The regular expressions of pre-tokenizers are alternatives of sequences of "so many characters of
# this class", and in this form the C code matches them: at one place the first alternative that
# matches wins; an item takes as many characters as it can and gives them back one by one.

TAKE, NOT_NEXT, LINE_END = range(3)                            # the kinds of items
NO_LIMIT, MOST_ITEMS = 2**32 - 1, 32                           # the second is coe.c's
END_OF_UNICODE = 0x110000


class Item(NamedTuple):
    kind: int           # TAKE characters, or take none: where one is NOT_NEXT (the text may end),
                        # LINE_END: where the text ends or "\n" follows
    chars: object       # the class of characters: bool [END_OF_UNICODE]
    least: int = 1
    most: int = 1
    possessive: bool = False    # would give nothing back; not written, as it makes no difference


def chars_of(codes):
    chars = np.zeros(END_OF_UNICODE, bool)
    chars[list(codes)] = True
    return chars


def literal(text):
    return checked([[Item(TAKE, chars_of([ord(char)])) for char in text]])


def checked(alternatives):
    for items in alternatives:
        if not any(item.kind == TAKE and item.least for item in items):
            raise ValueError("it matches the empty text")
        if len(items) > MOST_ITEMS:
            raise ValueError(f"it has {len(items)} items in a row, at most {MOST_ITEMS} are read")
        if not all(item.chars.any() for item in items if item.kind != LINE_END):
            raise ValueError("a class in it has no characters")
        for i, item in enumerate(items):
            if item.possessive and not as_if_possessive(item, items[i + 1:]):
                raise ValueError("possessive here is not the same as greedy, not supported")
    return alternatives


class Regex:
    """Parses the part of Oniguruma's language (as Hugging Face's library has it: Ruby's) that items
    can express. ValueError says what is outside."""

    def __init__(self, regex):
        self.text, self.at = regex, 0
        self.alternatives = self.alternation()
        if self.at < len(regex):
            self.refuse()
        checked(self.alternatives)

    def refuse(self, what=""):
        found = self.text[self.at:self.at + 8]
        raise ValueError(f"{what or found or 'its end'} is not supported (character {self.at + 1})")

    def take(self, regex):
        """What matches here, or None."""
        match = re.compile(regex, re.ASCII).match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match

    def alternation(self, in_group=False, fold=False):
        alternatives = self.sequence(in_group, fold)
        while self.take(r"\|"):
            alternatives += self.sequence(in_group, fold)
        return alternatives

    def sequence(self, in_group, fold):
        """Groups are written out: x(?:a|b)y becomes xay|xby."""
        paths = [[]]
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start, choices = self.at, self.element(in_group, fold)
            if not all(may_branch(path, choices) for path in paths):
                self.at = start
                self.refuse("a group after items that may give back what it starts with")
            paths = [path + choice for path in paths for choice in choices]
        return paths

    def element(self, in_group, fold):
        """The items of each of the ways to go on."""
        if self.take(r"\$"):
            return [[Item(LINE_END, chars_of([]), 0, 0)]]
        if self.take(r"\(\?!"):
            item = Item(NOT_NEXT, self.characters(fold), 0, 0)
            return [[item]] if self.take(r"\)") else self.refuse("(?!) of more than one character")
        if not in_group and (group := self.take(r"\(\?(i?):")):
            fold = bool(group[1])
            choices = self.alternation(True, fold)
            if fold and any(folds_together(path) for path in choices):
                self.refuse("(?i:) of letters that one character folds to")     # like U+00DF to ss
            if not self.take(r"\)") or self.take(r"[*+{]|\?[?+*{]"):
                self.refuse()
            return choices + [[]] if self.take(r"\?") else choices

        chars = self.characters(fold)
        found = self.take(r"([?*+])(\+?)(?![?*+{])|\{(\d{1,6})(,?)(\d{0,6})\}(?![?*+{])")
        if not found:
            return self.refuse() if self.take(r"(?=[?*+{])") else [[Item(TAKE, chars)]]
        sign, possessive, least, comma, most = found.groups()
        if sign:
            least, most = {"?": (0, 1), "*": (0, NO_LIMIT), "+": (1, NO_LIMIT)}[sign]
        else:
            least, most = int(least), int(most or (NO_LIMIT if comma else least))
        if fold or not least <= most > 0:
            self.refuse(found[0])
        return [[Item(TAKE, chars, least, most, bool(possessive))]]

    def characters(self, fold):
        """The class of one character: [...], an escape, or itself."""
        if self.take(r"(?=[.^$()\]{}*+?|]|\Z)"):
            self.refuse()
        if not self.take(r"\["):
            chars = self.one()
            return self.folded(chars if isinstance(chars, np.ndarray) else chars_of([chars]), fold)
        negated, chars = self.take(r"\^"), chars_of([])
        while True:
            if self.take(r"(?=[\[\]]|&&|\Z)"):
                self.refuse()
            low = high = self.one()
            if self.take(r"-(?!\])"):
                high = self.refuse() if self.take(r"(?=\[|&&|\Z)") else self.one()
            if isinstance(low, np.ndarray) and high is low:
                chars |= low
            elif type(low) is type(high) is int and low <= high:
                chars[low:high + 1] = True
            else:
                self.refuse("such a range")
            if self.take(r"\]"):
                chars = self.folded(chars, fold)
                return ~chars if negated else chars

    def one(self):
        """One character, or an escape for a class."""
        if found := self.take(r"\\(?:([pP])\{(\w+)\}|([sSdD]))"):
            p, name, letter = found.groups()
            if p and name not in ("L", *CATEGORIES[1:]):
                self.refuse(found[0])
            chars = category(name or "Nd")
            if letter in ("s", "S"):
                chars = chars_of(map(ord, WHITE_SPACE))
            return ~chars if (p or letter).isupper() else chars
        if found := self.take(r"\\u([0-9a-fA-F]{4})|\\x\{([0-9a-fA-F]{1,6})\}"):
            code = int(found[1] or found[2], 16)
            return code if code < END_OF_UNICODE else self.refuse(found[0])
        if found := self.take(r"\\([rntfv])"):
            return ord({"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}[found[1]])
        if not self.take(r"\\(?=[!-/:-@\[-`{-~ ])") and self.take(r"(?=\\)"):
            self.refuse()
        self.at += 1
        return ord(self.text[self.at - 1])

    def folded(self, chars, fold):
        if fold:
            if chars[128:].any():
                self.refuse("(?i:) with more than ASCII")
            chars = chars.copy()
            for code in np.flatnonzero(chars):
                chars[ord(chr(code).swapcase())] = True
            chars[0x17F] = chars[ord("s")]                     # long s, and the sign for Kelvin
            chars[0x212A] = chars[ord("k")]
        return chars


def folds_together(items):
    """Whether two neighbours may be what one character, like U+00DF for ss, is without case."""
    return any(a.chars[ord(pair[0])] and b.chars[ord(pair[1])]
               for a, b in zip(items, items[1:]) for pair in ("ss", "st", "ff", "fi", "fl"))


def as_if_possessive(item, rest):
    """Whether it makes no difference that the item may give back: nothing that follows can fail, or
    all of it starts with other characters than the item takes."""
    for after in rest:
        if after.kind != TAKE or (after.chars & item.chars).any():
            return all(after.kind == TAKE and not after.least for after in rest)
        if after.least:
            return True
    return True


def may_branch(path, choices):
    """Whether path(a|b) is path a|path b, whatever follows. It is if there is one place at most
    where path can end and a or b begin, and path tries that place first. So it is where all of path
    has a fixed length; or where, behind that and one optional item, it takes only characters that
    neither a nor b starts with, in one item or in two without limit."""
    while path and (path[0].kind != TAKE or path[0].least == path[0].most):
        path = path[1:]
    if len(choices) == 1 or not path:
        return True
    optional = len(path) > 1 and (path[0].least, path[0].most) == (0, 1)
    path = path[optional:]
    starts = [choice[0] for choice in choices if choice]
    return (all(item.kind == TAKE for item in path)
            and (len(path) == 1 or len(path) == 2 and all(i.most == NO_LIMIT for i in path))
            and (not optional or any(item.least for item in path))
            and all(start.kind == TAKE and start.least for start in starts)
            and not any((item.chars & start.chars).any() for item in path for start in starts))


# The general categories of Unicode 16, as the library's \p{..} has them; N is what Nd leaves of it.
# How many code points of which, one after another, by tests/test_tokenizer.py --unicode.
CATEGORIES = ("", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Nd", "N", "P", "S")
UNICODE = """
c-
p;~39{v=5k<EoX4nl<3kul(0(>sK|GVsHyV~7h$9s~H#E|50^QNkE)2$iT^gqls?Q+xJHtN}WxN@n^&lTpfjrQ`xu7`f3&Ee*4-
MZ6b{d)5K{I#F`<%3`R?7p~j<>Z*be_H#g{k@<4>awr4F|PUhx99W!wIud*bI<*kf9c4i$^G}kSlVOLYx451vCH^3tn{vTnbeKhg
1qZ~s(l~SUj4H7yj{JkCNrtt<#9pcY0v*=VcxH^?>m^s{|Sq&p8n!4?cXx#fBmbs%jjmt$D3&@eq6f`v(Ik#zvgCB_099rBzgJbZ
&B^6(=}(`X0C3Hg1|T1TPd^kR9BC$?RIq@@~%0Bf$`P0-
W&rGtz4L<RpWOD*UQV~?ya`d+1l=39(DKjQ0+9KHXFL5S(`C6G=itantN&9yxscRoom5&*Sg8bumzi1eIlfWHn!TV4qIEQt>VM1C
V7#S!!_n(x4d?GAi>z}h?2gmLuE<-
^Bnf`x4j~#Khsp#YhvzJ(+^3(Y_rl}cwy@L)8McL$Ox~$MIG$yvo^SqT95S)ME@T7EqYBH|0McqBWl$qp`DiXT<D<TZXZb6j798#
$TGboi2c}PxRq<@fwi~H943AiJ)Kk6avEd5g|2Civ|4xb=W*BX^8P+FZq<E_qg4%7|ES0t^!C-gEw<+RNZ*?qMb?*QOx9-
nRxNTQDc?(L6}3jq%o3>IHlI6-;LZ$vd!8G)t4l{Gaxj@penYpS$wGZA1NJ1+o^6DH37|W2EKNSpbJuTT`@Q2RFSv-
F7VvLGjCJL{INKSPKP!61UrhqU7TMo+TPNw*p>M`@<n3}EAr>)u*Kk++csBtu;;zV=c6;$|cyq4K{mTmlPDrO6<t=WOVJ{gzF7_4
gj8Pws*`mGHY)1YSC1*=vy5ZOs(Uh@TX{IoNRU=~wgfvd(I_<#hmJlWlwtlP{hfdQN*>OK;F1#(^ujmJPJ^mS5x~f0`b!~Uli3B<
ic3j&MV1@Vc@VKoys#}gbx8Z>fsO&<H!WQ>B`!o~SrcImb3$E<R3W@z3Tu3OOmsKXtFIY0}pp{1gUo(j2VwbLF&}{TM^1Nv0DWGS
#J??+InE?)m&5^NV(6+H8Jl?<2J;q@(|GLzp|6c?8U;CB+#}ZjicFWl^?fmn-^09vVsnW!gf6L!TsA49+t!I&>KW+D@7tKmD-
+{zszh5d>O)Cq^p$(+W=+PjzfaSQ=tFV<Hzql`c<f;;c&P3bt_xjKwN8(?O+2g(T55fldX#QDR+%BkrU)+sg?q@I>zjY~2qP8ee2
AmUCVyZPGUMuCnZ8QXgAMRRSot&9S<1gglontIP#N*_Zk8Q<C@w0r0hx_IP{_q3x?B8Nlf0}Nh11{ak?WZ3^0I)>+QFO*ippiDZ;
Jyfb{^&1s@N{%&MkaBnN$6Mrk7Z?dASpsD*4u`ZqF!s19w)TU4)?;P0c#-^_-kL%ax3I_1sj-
34!|Gm@JnHe@^U3jfOCZZw)i#j8W`ExeOpfZYB3b{2b!3RV1-
|Jxdq09T<mBEbuw}@*X9J(UjLo;TKBVyiTtNdVoV_6*u({Dv#fi|`WFu9{+=1%Pr>m!&wS4c?cYxx_Wz%M{!BsuKRChHQ{4Pzj`r
H8C751s+ao%8uUALxdGJ5r1i&R;1L9@{>4s{tHVP;#x&ge|Op3M|O^m`f8_=%YC<ylib$vC=3;O%piiU(u8;tT4OXn|U!Fm|(ZTN
wbEX$r;Yj*}B|5z;lG7(uSaFHF9j-
pcLK0Y2z`dzPo%BwhkGCmfN@oSmLc$0P_w4!3Z)a(N(E@~2ULBjHrcnzQhmK8%&_6&!S>2Iz~;ZhArGKy={h)Uc6!n8y`2nTW#@U
az!x<Um?#78PMCsJuP!&CpO@^p$Izs(1Ni12Vf?beDHE=W9*K-
?v~#EZ;aj+jBu;6vz@twIv2A07_5$_OOYG*n2ejjh$E<pb2tUE6|E3t&5TSwS4iSoRt%50v6^mu|@Ta}%kS=U^{@`t|s$rTo$Kt(
VX4;V){GVC5k<IC~@8O<8B_!`;IjDu2Xf!nTa#X%UOYzRX5`uCFH#lu9M3tyi&(O^)lf;~bPgXhGc5)I3V{`J;z0;Ob-
)_<^(&W(7ikLTdd6z%bkJvGvW4f;{)|;j-zv?@W~@2Tz8Tdk-fQ=Ox$2lq1Z9tk~XREJU_ruN-uNk`YA)u_}I;FhZa>MavK8G~__
=wfx0|nt$8P6oeuKl17$YuRNT1qpf1dDlp`EOr^37aJ-
u8KUI6fPi3;r0$JDb*swIvDZE!u5vG!ty<a~LgGQG{yA}<`H6h4V1S{;K2={f85idHmqq=7W)ZF8o*t${S=>?semd%EviMv7tQGn
_}15j$M8ow#;X1q*EJPImM{aMccaS?T@jISc<ls`ehP*p03U23&!*B021WqYZ8*L#$liev4~){Qo0>meg`IK{>6ils}Nk*;PtCNX
gfr*&Zf?6oTy?ky)EkR=a$74j7o3n*@WDD4jvV0T%LVF(U!VJpT>wC1q6Yf!a$-
HsG}Y9)DoK6P3?ShFi6?GeqRdlXxC@wTI)xw2(TsGO}*gvx_1?y*JIM*&st{vc4pGY}6KOoAnoRfNn_LSh3|b4dkm-
W{)9GZk_BP3$|ikP{^Lu?P?lRl*^h*88|Hp}Ak$9`>7XO6%$njFLoERoYm-%MpJphx+7-
6|Dd{!x~5#qCy#V{1c*p!8`^oL~C@2oAjlFM1Kj%qsY7oyEZ9B&=j((F?+Mig=5R)6!i*Zg6S(KrBXlDjyAasBJ(DdfUl>r-
<qgHo7UG1RN|e5$iO$S#-
6z3W5QvbV*N7IW8g;X5R=rsxNG$EehDn2l;vAAfMOOZ=jylL=0d&Y>znE;yBDJ`4D!_TwLz#v*lGLj%G$Ps(RTrDNXc^v8(eX5S-
)i_i?c`~qBae~b0D}BWzaRR4-
W7uM#YP)@4CLwfHgfqzNlrRnDB}OKN<i#70jRW%Ann_a;8A8B2DQGc$@sW6{=e}#=iJUso=#u)Wv*_sJyUuRu1^Szex$zeLac4I%
lmA$derLPq&~#Kf<+w!P=rbw5j@G#47uh@o-
#ulDYhYFFfoyssN(YhZvh3ZpXE2cq4G&WK{}#eVR#_Z)ZMz2@zpMnK+(;eTP{f&5FLJ_uRv!_h+_t+>w-
Zwfzm?lf7{_CLD@#Z*E5_C1l=>C3VMACbyL}+#)}xNNyKx#v^wUvnNtFAPO1xR})+v>2_;pxzGEr-
?{hoBgW@LOV!7Q&<+Vw(<&_`sv#<UNc{E-u??N};XpY6#6gV+n|LDnbjM*;`Qc=!o7=qS00|BeF$%Fo5L099&kJz>-
3X%E$FB*OrGPyzELmkae}qsmcIJ_~Rq%WSGYr(y#>1G(wvxF7`8Mg(fj-
Ry(O#<z-a?8yP?Jw8H(S(GPdW%>VG}O$LLq*@aZ|8^u@@j@B}0k0!#@D1+=zY"""


RUNS = zlib.decompress(base64.b85decode(UNICODE.replace("\n", ""))).decode()
RUNS = re.findall(r"(\D)(\d*)", RUNS)
CATEGORY = np.repeat(np.array([ord(kind) - ord("`") for kind, _ in RUNS], np.uint8),
                     [int(length or 1) for _, length in RUNS])
WHITE_SPACE = "".join(map(chr, [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
                                0x2028, 0x2029, 0x202F, 0x205F, 0x3000]))


def category(name):
    """The characters of a category, or of those that start with its name."""
    return np.isin(CATEGORY, [i for i, c in enumerate(CATEGORIES) if i and c.startswith(name)])


def digits():
    """N for the stage Digits: there the library has Unicode 17."""
    return category("N") | chars_of([*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)])


if __name__ == "__main__":
    sys.exit(main())
