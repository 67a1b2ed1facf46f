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
    | tokenizer          |  what the C code needs of it; nothing for bytes and for none
    +--------------------+  + tokenizer_bytes
    | weights            |  tensors() in [3]; the experts of a layer are one block, so are its gates
    +--------------------+  file_bytes - state_bytes
    | training state     |  train's own: never written here, never read
    +--------------------+  file_bytes

Three sources (a checkpoint, a model.bin, random numbers) and two targets (a model.bin, a
checkpoint) meet in tensors(): a target walks over it and asks its source for some rows at a time.

Contents: [1] errors and files   [2] config   [3] tensors   [4] tokenizer
          [5] sources            [6] targets  [7] command line
"""
import argparse, contextlib, json, math, os, re, shutil, signal, struct, sys, time
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
    ("tokenizer",               ("none", "bytes")),
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
TEXT_SLOTS = [Slot(*row) for row in (                          # slots 59..64
    ("temperature",             "f?", 0, 1e9, -1.0),           # of generation_config.json
    ("top_k",                   "i?", 0, 2**24, -1),
    ("top_p",                   "f?", 0, 1, -1.0),
    ("min_p",                   "f?", 0, 1, -1.0),
    ("repetition_penalty",      "f?", 1e-30, 1e9, -1.0),
    ("add_bos_token",           "b",  0, 1, False),            # of tokenizer_config.json
)]
DEFAULTS = {"generation_config.json": TEXT_SLOTS[:5], "tokenizer_config.json": TEXT_SLOTS[5:6]}
SLOTS = FILE_SLOTS + MODEL_SLOTS + TEXT_SLOTS + [Slot(*RESERVED)] * 63    # to slot 127
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

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "generation_config.json", "chat_template.jinja")      # travel inside model.bin, verbatim


def byte_tokenizer(c):
    """tokenizer.json and tokenizer_config.json for what the C code does: a token is a byte. For
    each, ByteLevel has a character: its own if it prints, else one from 256 on (GPT-2's table)."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
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
                  "vocab": {chr(b if b in prints else next(others)): b for b in range(256)},
                  "merges": []}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": c.add_bos_token,
              "bos_token": special.get(c.bos_token_id), "eos_token": special.get(c.eos_token_id),
              "pad_token": special[257],
              "clean_up_tokenization_spaces": False, "model_max_length": c.max_position_embeddings}
    return tokenizer, config


def tokenizer_kind(path, c):
    """none, bytes, or an end that names what tokenizer.json is."""
    if not os.path.lexists(path):
        return "none"

    def stage(value):                                          # Sequence(Split, ByteLevel)
        value = value if isinstance(value, dict) else {"type": "none"}
        parts = [stage(v) for key in ("pretokenizers", "normalizers") for v in value.get(key) or ()]
        return str(value.get("type")) + (f"({', '.join(parts)})" if parts else "")
    found, (ours, _) = read_json(path), byte_tokenizer(c)
    stages = ("model", "normalizer", "pre_tokenizer")
    if any(found.get(key) != ours[key] for key in (*stages, "added_tokens")):
        with blame(path, "is not a tokenizer.json: "):
            die(path, "has " + ", ".join(f"{key} {stage(found.get(key))}" for key in stages) + "; "
                "only the byte tokenizer that export.py writes is read (without this file: none)")
    return "bytes"


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
        c["tokenizer"] = tokenizer_kind(file("tokenizer.json"), c)
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
        c |= {"add_bos_token": c.tokenizer == "bytes"} | defaults_in(self.files, folder)

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


if __name__ == "__main__":
    sys.exit(main())
