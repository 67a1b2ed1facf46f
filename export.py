# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "safetensors==0.8.0", "ml_dtypes==0.6.0"]
# ///
"""Hugging Face checkpoints to model.bin and back.

    python export.py CHECKPOINT_DIR model.bin [--dtype f32|bf16|q8]   a checkpoint becomes one file
    python export.py model.bin CHECKPOINT_DIR                         and a checkpoint again
    python export.py CONFIG.json model.bin --init SEED                a fresh model
    python export.py model.bin small.bin [--dtype q8]                 no training state, other type
    python export.py old.bin new.bin                                  version 1 becomes version 2
    python export.py TOKENIZER_DIR tok.bin                            a tokenizer alone
    python export.py DEEPSEEK_V2_DIR model.bin --upcycle 2            DeepSeek-V2 becomes a CoE

model.bin, version 2, little-endian; every part and every tensor begins at a multiple of 64 bytes:

    +--------------------+  0
    | header             |  "COE1", version, CRC-32 of all that follows it, sizes: HEADER of [4]
    +--------------------+  64
    | config             |  UTF-8, a line "name value" for each key of [1], zeros to 64
    +--------------------+  + config_bytes
    | embedded files     |  each: name[56], u64 bytes, the bytes as they were, zeros to 64
    +--------------------+  + files_bytes
    | tokenizer          |  the tables of a byte-level BPE, see [9]; nothing for bytes and none
    +--------------------+  + tokenizer_bytes
    | weights            |  tensors() of [2]; the experts of a layer are one block, its gates, too;
    |                    |  none in a tokenizer alone, whose config has only what concerns texts
    +--------------------+  file_bytes - state_bytes
    | training state     |  belongs to ./train: never written here, never read
    +--------------------+  file_bytes

A source (a checkpoint, a model.bin, random numbers) has a config, and gives some rows of any of its
tensors. A target (a model.bin, a checkpoint) walks over the tensors in its own order and asks a
source for some rows at a time, which is all that is in memory. Read [1] to [4] for how a checkpoint
becomes a model.bin; the rest serves those, or is another way through them.

    [1] config                 [5] the way back: model.bin to a checkpoint     [9]  tokenizers
    [2] tensors                [6] fresh and upcycled models, a tokenizer      [10] chat templates
    [3] reading a checkpoint   [7] the command line                            [11] patterns
    [4] writing model.bin      [8] checks, errors and files
"""
import argparse, base64, contextlib, functools, glob, itertools, json, math, os, re, shutil, signal
import struct, subprocess, sys, time, unicodedata, zlib
from typing import NamedTuple

try:
    import fcntl
except ImportError:                     # on Windows
    fcntl = None
try:
    import ml_dtypes                    # teaches numpy bfloat16
    import numpy as np
    from safetensors import safe_open
    MISSING = None
except ImportError as e:                # --help and read_header() do without; main() says so
    MISSING = f"{e}; what is needed: pip install numpy safetensors ml_dtypes"


# ---- [1] config ---------------------------------------------------------------------------------
# A model has the keys of CONFIG, a row each, under the names they have in a checkpoint's files. C
# has the same rows in the same order: config_keys in lib/config.h.

INT, NUM, BOOL, TEXT, IDS = "INT", "NUM", "BOOL", "TEXT", "IDS"
NULL = True
ROPE = "rope_scaling."                  # a nested object, here with a dot in its keys' names
CONFIG_JSON = "config.json"
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
GENERATED = "generation_config."        # its eos_token_id is not config.json's
MOST_ENDS = 8                           # ids that an IDS may have


class Key(NamedTuple):
    """A row of CONFIG."""
    name: str
    kind: object                # INT, NUM, BOOL, TEXT, a tuple of the words that are allowed, or
                                # IDS: a list of ids, which in JSON may be one id, or null for none
    least: float = 0            # the range of an INT, a NUM or of each id
    most: float = 0
    default: object = ...       # the value where the key is missing; ... where it must be there.
                                # A number below the range says that the model has none
    null: bool = False          # whether null is allowed; it means the same as a missing key
    file: str = CONFIG_JSON     # the file that has the key; "": found out from the others


CONFIG = [Key(*row) for row in (
    # name                      kind  least   most   default null
    ("vocab_size",              INT,  1,      2**24),                       # V
    ("hidden_size",             INT,  1,      2**16),                       # d
    ("intermediate_size",       INT,  1,      2**20),                       # I, of dense layers
    ("moe_intermediate_size",   INT,  1,      2**20, 1),                    # f
    ("num_hidden_layers",       INT,  1,      2**12),                       # L
    ("num_attention_heads",     INT,  1,      2**12),                       # H
    ("n_shared_experts",        INT,  1,      2**10, 0,      NULL),         # S
    ("n_routed_experts",        INT,  1,      2**14, 0,      NULL),         # E
    ("num_experts_per_tok",     INT,  1,      2**14, 1),                    # K
    ("kv_lora_rank",            INT,  1,      2**16),                       # R
    ("q_lora_rank",             INT,  1,      2**16, 0,      NULL),         # r
    ("qk_nope_head_dim",        INT,  1,      2**16),                       # dn
    ("qk_rope_head_dim",        INT,  2,      2**16),                       # dr
    ("v_head_dim",              INT,  1,      2**16),                       # dv
    ("inner_iter",              INT,  1,      2**10),                       # C
    ("inner_residual",          BOOL, 0,      1,     True),
    ("outer_residual",          BOOL, 0,      1,     False),
    ("prenorm_chain",           BOOL, 0,      1,     False),
    ("use_igate",               BOOL, 0,      1),
    ("scoring_func",            ("softmax", "sigmoid"), 0, 0, "softmax"),
    ("topk_method",             ("greedy", "group_limited_greedy", "noaux_tc")),
    ("n_group",                 INT,  1,      2**14, 1,      NULL),
    ("topk_group",              INT,  1,      2**14, 1,      NULL),
    ("norm_topk_prob",          BOOL, 0,      1,     False),
    ("routed_scaling_factor",   NUM,  -1e9,   1e9,   1.0),
    ("first_k_dense_replace",   INT,  0,      2**12, 0),
    ("moe_layer_freq",          INT,  1,      2**12, 1),
    ("aux_loss_alpha",          NUM,  0,      1e9,   0.001),
    ("seq_aux",                 BOOL, 0,      1,     True),
    ("rms_norm_eps",            NUM,  1e-30,  1,     1e-6),
    ("rope_theta",              NUM,  1e-30,  1e30,  10000.0),
    (ROPE + "type",             (None, "linear", "yarn"), 0, 0, None, NULL),
    (ROPE + "factor",           NUM,  1e-30,  1e9,   1.0),
    (ROPE + "original_max_position_embeddings", INT, 1, 2**30, 4096),
    (ROPE + "beta_fast",        NUM,  1e-30,  1e9,   32.0),
    (ROPE + "beta_slow",        NUM,  1e-30,  1e9,   1.0),
    (ROPE + "mscale",           NUM,  -1e9,   1e9,   1.0),
    (ROPE + "mscale_all_dim",   NUM,  -1e9,   1e9,   0.0),
    ("max_position_embeddings", INT,  1,      2**30),
    ("attention_bias",          BOOL, 0,      1,     False),
    ("tie_word_embeddings",     BOOL, 0,      1,     False),
    ("initializer_range",       NUM,  0,      1e9,   0.02),
    ("bos_token_id",            INT,  0,      2**24, -1,     NULL),
    ("eos_token_id",            IDS,  0,      2**24, (),     NULL),
    (GENERATED + "eos_token_id", IDS, 0,      2**24, (),     NULL, GENERATION),
    ("torch_dtype",             ("float32", "bfloat16"), 0, 0, "float32"),
    ("temperature",             NUM,  0,      1e9,   -1.0,   False, GENERATION),
    ("top_k",                   INT,  0,      2**24, -1,     False, GENERATION),
    ("top_p",                   NUM,  0,      1,     -1.0,   False, GENERATION),
    ("min_p",                   NUM,  0,      1,     -1.0,   False, GENERATION),
    ("repetition_penalty",      NUM,  1e-30,  1e9,   -1.0,   False, GENERATION),
    ("add_bos_token",           BOOL, 0,      1,     False,  False, ""),
    ("chat_template",           ("none", "deepseek_v2", "pieces"), 0, 0, "none", False, ""),
    *((f"chat.{piece}",         TEXT, 0,      0,     "",     False, "") for piece in (
        "begin", "system", "system_user", "user_assistant", "assistant_user", "answer", "trim")),
    ("default_prompt",          TEXT, 0,      0,     ""),                   # of ./run
)]
STORED = [Key(*row) for row in (        # what only a model.bin says
    ("weight_type",             ("f32", "bf16", "q8", "none")), # of matrices; all else is f32
    ("tokenizer",               ("none", "bytes", "bpe")),
    ("coe_weights",             BOOL),                          # whether it is an upcycled model
)]
KEYS = {key.name: key for key in STORED + CONFIG}   # in the order of model.bin
COE_TYPE = "coe_deepseekv2"
MODEL_TYPES = COE_TYPE, "deepseek_v2", "deepseek_v3"
ROUTERS = {COE_TYPE: {"topk_method": "greedy"}, "deepseek_v2": {"topk_method": "greedy"},
           "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid",
                           "aux_loss_alpha": 0.0}}              # what is not in config.json
DEEPSEEK = {"inner_iter": 1, "inner_residual": False, "outer_residual": True,
            "prenorm_chain": False, "use_igate": False}


class Config(dict):
    """{key: value} for all of KEYS, with values as JSON has them; c.name is c["name"]."""
    __getattr__ = dict.__getitem__


# ---- [2] tensors --------------------------------------------------------------------------------

class Tensor(NamedTuple):
    """One tensor of a model, or several of one shape that lie one behind the other."""
    name: str           # as in a checkpoint; {} stands for the number of the copy
    copies: int
    shape: tuple        # of one copy
    kind: str           # one of those below. Only a MATRIX may be stored narrower than in float32


MATRIX, GATE, NORM, BIAS, COE = "matrix", "gate", "norm", "bias", "coe_weights"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(c):
    """Every Tensor of the model with this config, in the order of model.bin. No other place names
    them. A tensor that a model does not have has 0 copies in the table, and is left out."""
    if c.weight_type == "none":
        return
    V, d, H, I = c.vocab_size, c.hidden_size, c.num_attention_heads, c.intermediate_size
    dn, dr, dv = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    r, R, f = c.q_lora_rank, c.kv_lora_rank, c.moe_intermediate_size
    E, S, C = c.n_routed_experts, c.n_shared_experts, c.inner_iter
    bias, own_gates, coe = c.attention_bias, c.use_igate, c.coe_weights
    v3, corrected = c.topk_method == "noaux_tc", "mlp.{}.e_score_correction_bias"

    yield Tensor(EMBEDDING, 1, (V, d), MATRIX)
    for l in range(c.num_hidden_layers):
        moe = E > 0 and l >= c.first_k_dense_replace and l % c.moe_layer_freq == 0
        for name, copies, shape, kind in (
            ("input_layernorm.weight",              1,              (d,),           NORM),
            ("self_attn.q_proj.weight",             r == 0,         (H*(dn+dr), d), MATRIX),
            ("self_attn.q_a_proj.weight",           r > 0,          (r, d),         MATRIX),
            ("self_attn.q_a_proj.bias",             r > 0 and bias, (r,),           BIAS),
            ("self_attn.q_a_layernorm.weight",      r > 0,          (r,),           NORM),
            ("self_attn.q_b_proj.weight",           r > 0,          (H*(dn+dr), r), MATRIX),
            ("self_attn.kv_a_proj_with_mqa.weight", 1,              (R+dr, d),      MATRIX),
            ("self_attn.kv_a_proj_with_mqa.bias",   bias,           (R+dr,),        BIAS),
            ("self_attn.kv_a_layernorm.weight",     1,              (R,),           NORM),
            ("self_attn.kv_b_proj.weight",          1,              (H*(dn+dv), R), MATRIX),
            ("self_attn.o_proj.weight",             1,              (d, H*dv),      MATRIX),
            ("self_attn.o_proj.bias",               bias,           (d,),           BIAS),
            ("post_attention_layernorm.weight",     1,              (d,),           NORM),
            ("mlp.gate.{}.weight",                  moe*own_gates*C, (E, d),        GATE),
            ("mlp.gate.weight",                     moe > own_gates, (E, d),        GATE),
            ("mlp.experts.{}.gate_proj.weight",     moe*E,          (f, d),         MATRIX),
            ("mlp.experts.{}.up_proj.weight",       moe*E,          (f, d),         MATRIX),
            ("mlp.experts.{}.down_proj.weight",     moe*E,          (d, f),         MATRIX),
            ("mlp.shared_experts.gate_proj.weight", moe and S > 0,  (f*S, d),       MATRIX),
            ("mlp.shared_experts.up_proj.weight",   moe and S > 0,  (f*S, d),       MATRIX),
            ("mlp.shared_experts.down_proj.weight", moe and S > 0,  (d, f*S),       MATRIX),
            ("mlp.coe_weights.{}",                  moe*coe*(C-1),  (d,),           COE),
            ("mlp.gate_proj.weight",                not moe,        (I, d),         MATRIX),
            ("mlp.up_proj.weight",                  not moe,        (I, d),         MATRIX),
            ("mlp.down_proj.weight",                not moe,        (d, I),         MATRIX),
            (corrected.format("gate.{}"),           moe*v3*own_gates*C, (E,),       BIAS),
            (corrected.format("gate"),              moe*v3 > own_gates, (E,),       BIAS),
        ):
            if copies:
                yield Tensor(f"model.layers.{l}." + name, int(copies), shape, kind)
    yield Tensor("model.norm.weight", 1, (d,), NORM)
    if not c.tie_word_embeddings:
        yield Tensor(LM_HEAD, 1, (V, d), MATRIX)


# ---- [3] reading a checkpoint -------------------------------------------------------------------

TYPES = {"F32": "<f4", "BF16": "bfloat16", "F16": "<f2"}        # of safetensors, and of numpy


class Checkpoint:
    """A source: a folder with config.json, safetensors files and maybe a tokenizer. All but the
    weights is read and checked at once. Every source has
        .path                       for messages
        .config                     a Config
        .files                      {name: bytes} of what travels inside a model.bin as it is
        .tokenizer_section          bytes: the tokenizer's tables in a model.bin
        .read(tensor, copy, rows)   an array: these rows, a slice, of one copy of a Tensor"""

    def __init__(self, folder):
        self.path = folder
        path = os.path.join(folder, CONFIG_JSON)
        self.config = c = config_from_json(read_json(path), path)
        self.tokenizer_section = read_tokenizer(folder, c)
        self.places = {}        # name -> open file, its path, type, shape, where its bytes begin
        for path, names in shards(folder):
            self.places |= places_in(path, names)
        self.places = with_plain_names(self.places, folder)
        self.leave_out_predictions()
        c["coe_weights"] = any(".mlp.coe_weights." in name for name in self.places)
        check_together(c, folder)
        check_tensors(self)
        self.files = embedded_files(folder)
        c |= defaults_in(self.files, folder)
        check_together(c, folder)

    def leave_out_predictions(self):
        """A DeepSeek-V3's layers behind the last one predict further tokens, and are not used."""
        ours = self.config.num_hidden_layers
        layer = lambda name: int((re.match(r"model\.layers\.(\d{1,9})\.", name) or [0, -1])[1])
        more = {name for name in self.places if layer(name) >= ours}
        if more and self.config.scoring_func == "sigmoid":
            layers = ", ".join(map(str, sorted({*map(layer, more)})))
            note(f"{self.path}: leaves out layer {layers}, of multi-token prediction")
            self.places = {name: self.places[name] for name in self.places.keys() - more}

    def read(self, t, copy, rows):
        name, _, first = self.locate(t, copy)
        f, path, dtype, _, start = self.places[name]
        rows = slice(first + rows.start, first + rows.stop)
        return rows_at(f, path, start, np.dtype(TYPES[dtype]), rows, t.shape[1:])

    def locate(self, t, copy):
        """Where a copy of a tensor is: (name in the checkpoint, shape of that, the copy's first
        row). The experts of a layer may be fused into one tensor [E, rows, cols], in which
        gate_proj's rows come before up_proj's."""
        before, experts, part = t.name.partition("experts.{}.")
        down = part.startswith("down")
        fused = before + "experts." + ("down_proj" if down else "gate_up_proj")
        if not experts or fused not in self.places:
            return t.name.format(copy), t.shape, 0
        rows, cols = t.shape
        if down:
            return fused, (t.copies, rows, cols), copy * rows
        return fused, (t.copies, 2 * rows, cols), (2 * copy + part.startswith("up")) * rows


def with_plain_names(places, folder):
    """The places of tensors under their names in the model: without the prefixes of torch.compile
    and DataParallel, and without inv_freq, a table that older code saved with the weights."""
    out, taken = {}, set()
    for name, place in places.items():
        plain = re.sub(r"^((_orig_mod|module)\.)+", "", name)
        if plain != name:
            taken.add(name.removesuffix(plain))
        if plain in out:
            die(place[1], f"tensor {name} is there twice, once without {name.removesuffix(plain)}")
        if not plain.endswith(".inv_freq"):
            out[plain] = place
    if taken:
        note(f"{folder}: takes {' and '.join(sorted(taken))} off the names of tensors")
    return out


def embedded_files(folder, *without):
    """{name: bytes} of the FILES that a folder has. vocab.json and merges.txt count where there is
    no tokenizer.json."""
    files = {}
    for name in FILES:
        path = os.path.join(folder, name)
        if os.path.lexists(path) and name not in without and (
                name not in (VOCAB, MERGES) or TOKENIZER not in files):
            with open_file(path) as f:
                files[name] = f.read()
    return files


def config_from_json(config, where):
    """The Config of what a config.json holds. Refuses by name what is not computed, and warns of
    keys that are not known."""
    config = with_old_names(config, where)
    check_computed(config, where)
    if config["model_type"] != COE_TYPE:
        config |= DEEPSEEK
    if config.get("prenorm_chain"):     # where it is, the others are not there
        config = {"inner_residual": False} | config
    c = Config(weight_type="f32", tokenizer="none", coe_weights=False)
    for key in CONFIG:
        value = config.get(key.name, ...) if key.file == CONFIG_JSON else ...
        c[key.name] = check(key, value, where)
    check_together(c, where)
    differs, what = odd_temperature(c)
    if differs and config["model_type"] == "deepseek_v3":
        note(f"{where}: warning: of {what} transformers takes neither for the amplitude, here both "
             "count")
    return c


# ---- [4] writing model.bin ----------------------------------------------------------------------

HEADER = struct.Struct("<4sIII6Q")      # "COE1", version, CRC-32, 0, SIZES, 0
SIZES = "file_bytes", "config_bytes", "files_bytes", "tokenizer_bytes", "state_bytes"
SUMMED = 12             # the CRC-32 is that of the bytes from this one on
MOST_CONFIG = 2**20     # what config_bytes may be at most
GROUP = 64              # in q8, so many neighbours in a row share a scale


def write_model_bin(source, path, weight_type):
    """Writes a model.bin whose matrices have this type."""
    c = Config(source.config, weight_type=weight_type)
    config = "".join(f"{name} {to_text(key, c[name])}\n" for name, key in KEYS.items() if name in c)
    files = [padded(struct.pack("<56sQ", name.encode(), len(data)) + data)
             for name, data in source.files.items()]
    parts = padded(config.encode()), b"".join(files), source.tokenizer_section
    *places, (_, file_bytes) = layout(c, HEADER.size + sum(map(len, parts)))
    header = HEADER.pack(b"COE1", 2, 0, 0, file_bytes, *map(len, parts), 0, 0)

    folder, name = os.path.split(os.path.realpath(path))       # a link stays a link
    if not os.path.isdir(folder):
        die(path, f"cannot be written: there is no folder {folder}")
    with new_files(folder, [name], file_bytes) as (file,):
        note(describe(c))
        progress, f = Progress("written", file_bytes), Summing(file)
        file.write(header[:SUMMED])
        f.write(header[SUMMED:] + b"".join(parts))
        for t, start in places:
            f.write(bytes(start - f.tell()))
            for copy in range(t.copies):
                write_copy(f, source, t, copy, stored_as(t, weight_type), progress)
        f.write(bytes(file_bytes - f.tell()))
        file.seek(8)
        file.write(struct.pack("<I", f.crc))
        progress.add(0, last=True)


def write_copy(f, source, t, copy, kind, progress):
    """Writes one copy of a tensor, a block of rows at a time, as numbers of this type; int8 stands
    for q8."""
    scales = []
    for rows in blocks(t):
        x = source.read(t, copy, rows)
        if kind == np.int8:
            x, scale = quantise(x)
            if not np.isfinite(scale).all():                   # where x has NaN or infinity
                die(source.path, f"tensor {t.name.format(copy)} has weights that are not finite, "
                    "q8 cannot hold them")
            scales.append(scale)
        write_array(f, x.astype(kind, copy=False), progress)
    if scales:
        f.write(bytes(-f.tell() % 64))
        for scale in scales:
            write_array(f, scale, progress)
        f.write(bytes(-f.tell() % 64))


def write_array(f, array, progress):
    f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    progress.add(array.nbytes)


def to_text(key, value):
    """A value as it stands in a line of model.bin's config, which is how ./train's options are
    written: a bare word, true, false, null, or a number with as few digits as read back the same;
    a text is a JSON string, and several ids are a JSON list. Generation defaults are never null: -1
    says that there is none."""
    if key.kind == TEXT:
        return json.dumps(value, ensure_ascii=False)
    value = to_value(key, value)
    return value if isinstance(value, str) else json.dumps(value).removesuffix(".0")


class Summing:
    """A file that is being written, and the CRC-32 of what went through here."""
    def __init__(self, file):
        self.file, self.tell, self.crc = file, file.tell, 0

    def write(self, data):
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


def layout(c, start):
    """(tensor, where it begins) for each tensor of a model.bin whose weights begin at start; in the
    end (None, where they end)."""
    for t in tensors(c):
        yield t, start
        start = aligned(start + t.copies * copy_bytes(t, c.weight_type))
    yield None, start


def stored_as(t, weight_type):
    """The numpy type of a tensor where matrices have this type. int8 stands for q8."""
    kinds = {"f32": "<f4", "bf16": "bfloat16", "q8": "i1"}
    return np.dtype(kinds[weight_type] if t.kind == MATRIX else "<f4")


def copy_bytes(t, weight_type):
    """The bytes of one copy of a tensor. In q8 that is its int8 and then its scales, each padded to
    a multiple of 64."""
    kind, size = stored_as(t, weight_type), math.prod(t.shape)
    if kind != np.int8:
        return size * kind.itemsize
    rows, cols = t.shape
    return aligned(size) + aligned(4 * rows * -(-cols // GROUP))


def aligned(n):
    return (n + 63) // 64 * 64


def padded(data):
    return data + bytes(-len(data) % 64)


def blocks(t):
    """The rows of a copy as slices of about a million numbers. One of them is in memory at a time,
    and fits the processor's cache."""
    step = max(1, 2**20 // math.prod(t.shape[1:]))
    return [slice(i, min(i + step, t.shape[0])) for i in range(0, t.shape[0], step)]


# ---- [5] the way back: model.bin to a checkpoint ------------------------------------------------

class Header(NamedTuple):
    """What read_header() finds."""
    config: Config
    crc: int                # None in version 1, which has none
    start: int              # where the embedded files begin; the tokenizer and the weights follow
    files_bytes: int
    tokenizer_bytes: int
    state_bytes: int


def read_header(f, path):
    """The Header of an open model.bin of version 1 or 2. It is checked, and against the file's size
    too. What is not: the CRC-32, and whether the weights fill what is left. Needs nothing but
    Python."""
    data, size = f.read(HEADER.size), os.fstat(f.fileno()).st_size
    if data[:4] != b"COE1":
        die(path, f"starts with {data[:8]!r}, a model.bin starts with COE1"
            + (" (a config.json needs --init SEED)" if data[:1] == b"{" else ""))
    if len(data) < HEADER.size:
        die(path, f"has {len(data)} bytes, the header alone must have {HEADER.size}")
    _, version, crc, zero, *sizes, last = HEADER.unpack(data)
    if version == 1:                    # all of its header but the sizes is config
        crc, zero, last = None, 0, 0
        sizes = list(struct.unpack_from("<4Q", data, 8))
        sizes.insert(1, VERSION_1_BYTES - HEADER.size)
    elif version != 2:
        die(path, f"version is {version}, this program reads versions 1 and 2")
    if zero or last:
        die(path, f"what is reserved in its header is {zero} and {last}, must be 0")
    if sizes[0] != size:
        die(path, f"has {size} bytes, its header says {sizes[0]}")
    for name, value in zip(SIZES[1:], sizes[1:]):
        most = min(size - HEADER.size, MOST_CONFIG if name == "config_bytes" else size)
        if value % 64 or value > most:
            die(path, f"{name} is {value}, must be a multiple of 64 up to {most}")
    config = f.read(sizes[1])
    if re.search(rb"^weight_type none$", config, re.MULTILINE):
        die(path, "is a tokenizer alone, must be a model: ./train --tokenizer takes it")
    c = config_of_lines(config, path) if version == 2 else config_of_slots(data[40:] + config, path)
    check_together(c, path)
    if (c.tokenizer == "bpe") != (sizes[3] > 0):
        die(path, f"tokenizer is {c.tokenizer}, but tokenizer_bytes {sizes[3]}")
    return Header(c, crc, HEADER.size + sizes[1], *sizes[2:])


def config_of_lines(data, path):
    """The Config of version 2, from the lines of a model.bin."""
    text = data.rstrip(b"\0")
    if not text.endswith(b"\n") or padded(text) != data:
        die(path, f"its config ends in {data[-16:]!r}, must end in a newline and zeros up to a "
            "multiple of 64")
    try:
        lines = text.decode().split("\n")[:-1]
    except UnicodeDecodeError as e:
        die(path, f"byte {HEADER.size + e.start}, in its config, is 0x{text[e.start]:02x}, must be "
            "UTF-8")
    c = Config()
    for number, line in enumerate(lines, 1):
        name, blank, value = line.partition(" ")
        where = f"line {number} of its config"
        if not blank:
            die(path, f"{where} is {line[:80]!r}, must be a key, a blank and a value")
        if name not in KEYS:
            die(path, f"{where} has the key {name[:80]!r}, which this program does not know")
        if name in c:
            die(path, f"{where} has the key {name}, which is there twice, must be there once")
        c[name] = from_text(KEYS[name], value, path)
    for name, key in KEYS.items():
        if name not in c and name in VERSION_1:
            die(path, f"{name} is missing in its config")
        c.setdefault(name, key.default)
    return c


def from_text(key, text, where):
    """The value of a key from what to_text() makes of it."""
    value = {"true": True, "false": False, "null": None}.get(text, text)
    if key.kind == TEXT:
        value = None
        with contextlib.suppress(ValueError):
            value = json.loads(text) if text[:1] == text[-1:] == '"' else None
    if key.kind in (INT, IDS) and re.fullmatch("-?[0-9]{1,18}", text):
        value = int(text)
    if key.kind == IDS and re.fullmatch(r"\[[0-9, ]{1,99}\]", text):
        with contextlib.suppress(ValueError):
            value = json.loads(text)
    if key.kind == NUM and re.fullmatch(r"-?[0-9]{1,99}(\.[0-9]{0,99})?(e[-+]?[0-9]{1,3})?", text):
        value = float(text)
    return check_stored(key, value, where)


def check_stored(key, value, where):
    """check() for a value in a model.bin, where it may also be the key's default."""
    if key.kind == IDS and value == -1:
        return ()
    if type(value) is type(key.default) and value == key.default:
        return value
    return check(key, value, where)


class ModelBin:
    """A source: a model.bin whose parts add up to its size, to the byte, and that has the CRC-32
    its header says."""

    def __init__(self, path):
        self.path, self.file = path, open_file(path)
        self.config, crc, start, files, tokenizer, state = read_header(self.file, path)
        size = os.fstat(self.file.fileno()).st_size
        self.starts = {}                                       # a tensor's name -> where it begins
        for t, at in layout(self.config, start + files + tokenizer):
            if not t or at > size:                             # not through a million layers
                break
            self.starts[t.name] = at
        if at + state != size:
            die(path, f"has {size} bytes, its header adds up to {at + state}"
                + " or more" * (t is not None))
        if crc is not None:
            check_crc(self.file, path, size, crc)
        self.files = dict(self.embedded(bytes_at(self.file, path, start, files)))
        self.tokenizer_section = bytes_at(self.file, path, start + files, tokenizer)

    def embedded(self, section):
        """(name, bytes) of each embedded file. A name is one of FILES, never a path."""
        at = 0
        while at < len(section):
            name, size = struct.unpack_from("<56sQ", section, at)
            name = name.rstrip(b"\0").decode(errors="replace")
            if name not in FILES:
                die(self.path, f"embedded file {name!r} must be one of {', '.join(FILES)}")
            if size > len(section) - at - 64:
                die(self.path, f"embedded file {name} has {size} bytes, more than its section")
            yield name, section[at + 64 : at + 64 + size]
            at = aligned(at + 64 + size)

    def read(self, t, copy, rows):
        kind = stored_as(t, self.config.weight_type)
        at = self.starts[t.name] + copy * copy_bytes(t, self.config.weight_type)
        x = rows_at(self.file, self.path, at, kind, rows, t.shape[1:])
        if kind != np.int8:
            return x
        at, groups = at + aligned(math.prod(t.shape)), -(-t.shape[1] // GROUP)
        return dequantise(x, rows_at(self.file, self.path, at, np.dtype("<f4"), rows, (groups,)))


def quantise(x):
    """(int8, scales) of some rows. The largest number of a group is 127 times its scale, so that
    what dequantise() makes of them has the same int8 and the same scales, to the bit."""
    x, cols = in_groups(x.astype(np.float32, copy=False)), x.shape[1]
    scale = np.abs(x).max(2) / np.float32(127)
    x /= np.where(scale > 0, scale, np.inf)[:, :, None]        # a group of zeros stays zero
    np.rint(x, out=x)
    np.clip(x, -127, 127, out=x)                               # a subnormal scale is not exact
    return x.astype(np.int8).reshape(len(x), -1)[:, :cols], scale


def in_groups(x):
    """A matrix as (rows, groups, GROUP). The last group of a row is filled up with zeros."""
    rows, cols = x.shape
    return np.pad(x, ((0, 0), (0, -cols % GROUP))).reshape(rows, -1, GROUP)


def dequantise(q, scale):
    """The numbers that quantise() made these int8 and scales of, as float32."""
    x = in_groups(q.astype(np.float32)) * scale[:, :, None]
    return x.reshape(len(x), -1)[:, :q.shape[1]]


def write_checkpoint(source, folder, model_type):
    """Writes config.json, model.safetensors and the tokenizer's files. The safetensors library
    writes only what is in memory all at once, so its format is written here: u64 bytes of JSON, the
    JSON padded to 8, and the arrays sorted by name, as the library sorts them."""
    c = source.config
    dtype = "BF16" if c.torch_dtype == "bfloat16" else "F32"
    kind = np.dtype(TYPES[dtype])
    places = {t.name.format(i): (t, i) for t in tensors(c) for i in range(t.copies)}
    if c.tie_word_embeddings:           # not all readers tie them, so it is there twice
        places[LM_HEAD] = places[EMBEDDING]
    if model_type != COE_TYPE:
        must_be_deepseek(source, f"a {model_type} has")
        scoring = "sigmoid" if model_type == "deepseek_v3" else "softmax"
        if c.scoring_func != scoring:
            die(source.path, f"scoring_func is {c.scoring_func}, a {model_type} has {scoring}")
        warn_of_transformers(c, folder, model_type)
        places = {name.replace(".gate.0.", ".gate."): place for name, place in places.items()}
    places = dict(sorted(places.items()))
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, (t, _) in places.items():
        end = size + math.prod(t.shape) * kind.itemsize
        header[name] = {"dtype": dtype, "shape": t.shape, "data_offsets": [size, end]}
        size = end
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    files = files_with_defaults(source)
    if c.tokenizer == "bytes":
        for name, value in zip(("tokenizer.json", SETTINGS), byte_tokenizer(c)):
            files.setdefault(name, to_json(value))
    files[CONFIG_JSON] = to_json(config_to_json(c, model_type))
    with new_files(folder, ["model.safetensors", *files], size) as (f, *others):
        note(describe(c))
        progress = Progress("written", size)
        f.write(struct.pack("<Q", len(header)) + header)
        for t, copy in places.values():
            write_copy(f, source, t, copy, kind, progress)
        for other, data in zip(others, files.values()):
            other.write(data)
        progress.add(0, last=True)
    remove_others(folder, ["model.safetensors", *files])


# What would be taken for a part of a checkpoint that is written into a folder.
OF_A_CHECKPOINT = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|tokenizer(_config)?\.json|"
    r"(special_tokens_map|added_tokens|vocab|generation_config)\.json|merges\.txt|tokenizer\.model|"
    r"chat_template\.(jinja|json)")


def remove_others(folder, names):
    """Removes what an older checkpoint has left in a folder beside the files of these names, as
    shards, their index, a tokenizer. What is no checkpoint's stays."""
    for name in sorted(os.listdir(folder)):
        if OF_A_CHECKPOINT.fullmatch(name) and name not in names:
            note(f"{folder}: warning: removes {name}, of another checkpoint")
            os.remove(os.path.join(folder, name))


def config_to_json(c, model_type):
    """The config.json that the reference reads."""
    coe = model_type == COE_TYPE
    out = {"model_type": model_type, "architectures": [
        "CoeForCausalLM" if coe else model_type.title().replace("_", "") + "ForCausalLM"]}
    if coe and unknown_to_reference(c):
        note(f"warning: {unknown_to_reference(c)} is not part of the reference, whose code would "
             "compute something else: the checkpoint names none (no auto_map)")
    elif coe:
        out["auto_map"] = {"AutoConfig": "configuration_coe.CoeConfig",
                           "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM"}
    rope = {}
    for key in CONFIG:
        value = to_value(key, c[key.name])
        if key.name.startswith(ROPE):
            rope[key.name.removeprefix(ROPE)] = value
        elif key.kind == TEXT and not value or key.name == "prenorm_chain" and not value:
            pass                        # the reference has no such key
        elif key.file == CONFIG_JSON and (coe or key.name not in DEEPSEEK):
            out[key.name] = value
    if rope["type"] == "linear":        # all that is looked at then
        rope = {key: rope[key] for key in ("type", "factor", "mscale_all_dim") if rope[key] != 0}
    out["rope_scaling"] = rope if rope["type"] else None
    out["hidden_act"] = FIXED["hidden_act"]
    if model_type == "deepseek_v3":
        out["rope_interleave"] = True
    return out | {"attention_dropout": 0.0, "ep_size": 1,
                  "num_key_value_heads": c.num_attention_heads}


def files_with_defaults(source):
    """The embedded files as they go into a checkpoint: as they are, unless the model's defaults
    have changed since, for which ./train has options. Then generation_config.json, or the files of
    the tokenizer, say what the model's config says."""
    c, files = source.config, dict(source.files)
    keys = [key for key in CONFIG if key.file == GENERATION]
    said = {key.name: key.default for key in keys} | defaults_in(files, source.path)
    if any(c[key.name] != said[key.name] for key in keys):
        new = {in_file(key): to_value(key, c[key.name]) for key in keys
               if c[key.name] != key.default}
        if GENERATION in files:
            old = parse_json(files[GENERATION], GENERATION)
        else:                           # what transformers would make of config.json
            old = {name: to_value(KEYS[name], c[name]) for name in ("bos_token_id", "eos_token_id")}
        new["do_sample"] = c.temperature != 0                  # there, this flag is what greedy is
        if not c.temperature:
            del new["temperature"]
        ours = {"do_sample"} | {in_file(key) for key in keys if key.kind != IDS}
        files[GENERATION] = to_json({k: v for k, v in old.items() if k not in ours} | new)
    if c.tokenizer == "bpe":
        files |= files_with_bos(c, files)
    return files


def files_with_bos(c, files):
    """The files of a tokenizer that are not what add_bos_token says: tokenizer.json's
    post_processor, by which transformers 5 goes, and add_bos_token, by which older ones do."""
    new, settings = {}, parse_json(files.get(SETTINGS, b"{}"), SETTINGS)
    if TOKENIZER in files:
        found = parse_json(files[TOKENIZER], TOKENIZER)
        if begins_with_bos(found, c) == c.add_bos_token or c.bos_token_id < 0:
            return {}
        found["post_processor"] = with_bos_or_not(found, c)
        new[TOKENIZER] = to_json(found)
    elif settings.get("add_bos_token", False) == c.add_bos_token:
        return {}
    return new | {SETTINGS: to_json(settings | {"add_bos_token": c.add_bos_token})}


def in_file(key):
    """The name of a key in its file."""
    return key.name.removeprefix(GENERATED)


def defaults_in(files, folder):
    """{key: value} of what generation_config.json says. Without do_sample it is greedy."""
    path = os.path.join(folder, GENERATION)
    if GENERATION not in files:
        return {}
    found = {k: v for k, v in parse_json(files[GENERATION], path).items() if v is not None}
    if found.get("do_sample") is not True:
        found["temperature"] = 0
    return {key.name: check(key, found[in_file(key)], path) for key in CONFIG
            if key.file == GENERATION and in_file(key) in found}


def must_be_deepseek(source, who):
    """A DeepSeek-V2 is a chain of one iteration that is added to the residual stream."""
    if source.config.prenorm_chain and source.config.inner_iter == 1:
        return                          # is the same
    for name, value in DEEPSEEK.items():
        if name != "use_igate" and source.config[name] != value:
            die(source.path,
                f"{name} is {json.dumps(source.config[name])}, {who} {json.dumps(value)}")


def unknown_to_reference(c):
    """What of a model the reference's code does not compute."""
    return "prenorm_chain" if c.prenorm_chain else "scoring_func sigmoid" * (
        c.scoring_func == "sigmoid")


def odd_temperature(c):
    """(Whether transformers has another amplitude of YaRN, of which keys)."""
    n, all_n = c[ROPE + "mscale"], c[ROPE + "mscale_all_dim"]
    yarn = c[ROPE + "type"] == "yarn" and c[ROPE + "factor"] > 1
    return (yarn and not (n and all_n) and (n, all_n) != (1, 0),
            f"rope_scaling.mscale {n} with mscale_all_dim {all_n}")


def warn_of_transformers(c, path, model_type):
    """Names what is part of DeepSeek-V2 or V3, but not of transformers' class of that name."""
    v2 = model_type == "deepseek_v2"
    for differs, what in (
            (v2 and c.norm_topk_prob and c.num_experts_per_tok > 1, "norm_topk_prob true"),
            (c.moe_layer_freq > 1, f"moe_layer_freq {c.moe_layer_freq}"),
            (not c.n_shared_experts, "n_shared_experts null"),
            (not c.n_routed_experts, "n_routed_experts null"),
            (c.hidden_size % c.num_attention_heads, "hidden_size no multiple of the heads"),
            odd_temperature(c)):
        if differs:
            kind = f"Deepseek{model_type[-2:].upper()}ForCausalLM"
            note(f"{path}: warning: transformers' {kind} does not know {what}")


# Version 1 had 128 slots of 8 bytes: "COE1" and the version, the four sizes but config_bytes, then
# the keys of this list, where - and all behind it are 0. A float64 holds a NUM, an int64 the place
# of a word among the words, and all else. Version 2 must have the same keys. It may also have
# others, which came later and have a default.
VERSION_1 = """weight_type tokenizer coe_weights - - - - - - - - vocab_size hidden_size
    intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads n_shared_experts
    n_routed_experts num_experts_per_tok kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim
    v_head_dim inner_iter inner_residual outer_residual use_igate topk_method n_group topk_group
    norm_topk_prob routed_scaling_factor first_k_dense_replace moe_layer_freq aux_loss_alpha seq_aux
    rms_norm_eps rope_theta rope_scaling.type rope_scaling.factor
    rope_scaling.original_max_position_embeddings rope_scaling.beta_fast rope_scaling.beta_slow
    rope_scaling.mscale rope_scaling.mscale_all_dim max_position_embeddings attention_bias
    tie_word_embeddings initializer_range bos_token_id eos_token_id torch_dtype temperature top_k
    top_p min_p repetition_penalty add_bos_token chat_template""".split()
VERSION_1_BYTES = 1024


def config_of_slots(data, path):
    """The Config of version 1, from its slots behind the sizes."""
    c = Config({name: key.default for name, key in KEYS.items()})
    for i in range(len(data) // 8):
        name = VERSION_1[i] if i < len(VERSION_1) else "-"
        key = KEYS.get(name, Key(f"slot {i + 5}", INT))
        value, = struct.unpack_from("<d" if key.kind == NUM else "<q", data, 8 * i)
        if isinstance(key.kind, tuple):
            value = key.kind[value] if 0 <= value < len(key.kind) else value
        elif key.kind == BOOL:
            value = {0: False, 1: True}.get(value, value)
        value = check_stored(key, value, path)
        if name in KEYS:
            c[name] = value
    return c


# ---- [6] fresh and upcycled models, a tokenizer -------------------------------------------------

class Fresh:
    """A source: random weights for the config of a config.json, as the paper's runs begin, and the
    tokenizer that lies beside it."""

    def __init__(self, path, seed):
        folder = os.path.dirname(path) or "."
        self.path = path
        self.config = config_from_json(read_json(path), path)
        self.tokenizer_section = read_tokenizer(folder, self.config)
        self.files = embedded_files(folder, GENERATION) if self.config.tokenizer != "none" else {}
        check_together(self.config, path)
        self.random = np.random.default_rng(seed)

    def read(self, t, copy, rows):
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


class Upcycled:
    """A source: another one, a DeepSeek-V2, as a CoE of C iterations. Every gate is a copy of the
    one there was and the coe_weights are 0, so that until it is trained it computes the same."""

    def __init__(self, source, C):
        must_be_deepseek(source, "--upcycle needs")
        if not any(t.kind == GATE for t in tensors(source.config)):
            die(source.path, "has no layer with experts, so there is nothing to --upcycle")
        self.source, self.path, self.files = source, source.path, source.files
        self.tokenizer_section = source.tokenizer_section
        self.config = Config(source.config, inner_iter=C, use_igate=True, inner_residual=True,
                             outer_residual=True, prenorm_chain=False, coe_weights=True)

    def read(self, t, copy, rows):
        if t.kind == COE:
            return np.zeros(rows.stop - rows.start, np.float32)
        if t.kind == GATE or "correction_bias" in t.name:
            copy = 0
            if not self.source.config.use_igate:
                t = t._replace(name=t.name.replace("gate.{}.", "gate."))
        return self.source.read(t, copy, rows)


class TokenizerAlone:
    """A source without weights: the tokenizer of a folder, or a tokenizer.json with what lies
    beside it. Its config has the keys that concern texts."""

    def __init__(self, path):
        folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
        self.path = path
        self.config = c = Config({name: KEYS[name].default for name in KEYS if name in (
            "bos_token_id", "eos_token_id", "add_bos_token") or name.startswith("chat")})
        c |= {"weight_type": "none", "tokenizer": "none", "coe_weights": False}
        c["vocab_size"] = KEYS["vocab_size"].most
        self.tokenizer_section = read_tokenizer(folder, c, alone=True)
        if c.tokenizer == "none":
            die(path, "has no tokenizer.json, and no vocab.json with merges.txt")
        n_tokens, = struct.unpack_from("<I", self.tokenizer_section or struct.pack("<I", 258))
        c["vocab_size"] = n_tokens
        self.files = embedded_files(folder, GENERATION)


# ---- [7] the command line -----------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""
    def error(self, message):
        self.exit(2, f"export: {' '.join(message.split())} (see --help)\n")


def number(low, high):
    """A type for argparse: an integer from low to high."""
    def parse(text):
        if not re.fullmatch("[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer in {low}..{high}")
        return int(text)
    return parse


def arguments():
    """The arguments, and in to_folder whether TARGET is to be a checkpoint."""
    p = Parser(
        prog="export.py", allow_abbrev=False,
        description="Converts Hugging Face checkpoints (coe_deepseekv2, deepseek_v2, deepseek_v3) "
        "to model.bin and back, some rows of a tensor in memory at a time.",
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
    p.add_argument("--model_type", choices=MODEL_TYPES, help="of the checkpoint to write (default: "
                   "coe_deepseekv2; deepseek_v3 if that is what it is)")
    p.add_argument("--version", action="version", version="export.py 1, writes model.bin "
                   "version 2, reads versions 1 and 2")
    a = p.parse_args()
    if same_file(a.source, a.target):
        p.error(f"TARGET {a.target} is SOURCE, too, must be a file of its own")
    a.to_folder = a.init is None and not os.path.isdir(a.source) and (
        os.path.isdir(a.target) or not a.target.endswith(".bin") and not os.path.exists(a.target))
    if a.dtype and a.to_folder:
        p.error("argument --dtype: is for a model.bin, a checkpoint has its config's torch_dtype")
    if a.model_type and not a.to_folder:
        p.error("argument --model_type: is for a checkpoint, TARGET is to be a model.bin")
    return a


def convert(a):
    """Does what the arguments say."""
    if MISSING:
        raise Failure(MISSING)
    np.seterr(all="ignore")             # a NaN among the weights stays one, without a warning
    path = snapshot(a.source)
    if a.init is not None:
        source = Fresh(path, a.init)
    elif os.path.isdir(path):
        there = {*os.listdir(path)}
        alone = there & {TOKENIZER, VOCAB} and CONFIG_JSON not in there and not any(
            name.endswith(".safetensors") for name in there)
        source = TokenizerAlone(path) if alone else Checkpoint(path)
    else:
        alone = os.path.basename(path) == TOKENIZER and os.path.isfile(path)
        source = TokenizerAlone(path) if alone else ModelBin(path)
    if source.config.weight_type == "none" and (a.dtype or a.upcycle or a.to_folder):
        die(path, "is a tokenizer alone, which becomes a tok.bin and has no weights")
    if a.upcycle:
        source = Upcycled(source, a.upcycle)
    if source.config.weight_type == "q8" and (a.to_folder or a.dtype not in (None, "q8")):
        note(f"{a.source}: warning: its matrices are q8, they stay rounded to that")
    if a.to_folder:
        c = source.config
        v3 = c.scoring_func == "sigmoid" and c.inner_iter == 1 and (
            c.prenorm_chain or c.outer_residual and not c.inner_residual)
        write_checkpoint(source, a.target, a.model_type or ("deepseek_v3" if v3 else COE_TYPE))
    else:
        write_model_bin(source, a.target, a.dtype or source.config.weight_type)


def main():
    """Returns the exit code, None for success. Errors are one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as an interrupt does
    if sys.argv[1:] == [RENDER]:
        print(json.dumps(render_here(*json.load(sys.stdin))))
        return 0
    try:
        convert(a := arguments())
    except Failure as e:
        note(" ".join(str(e).split()))
        return 1
    except (OSError, MemoryError, RecursionError) as e:
        note(f"{getattr(e, 'filename', None) or a.source}: "
             f"{getattr(e, 'strerror', None) or e or 'takes too much memory'}")
        return 1
    except KeyboardInterrupt:
        note("interrupted, nothing was written")
        return 130


# ---- [8] checks, errors and files ---------------------------------------------------------------

class Failure(Exception):
    """An error for the user, one line. main() prints it."""


def same_file(a, b):
    """Whether two paths lead to one file, by whatever names and links, or would if it existed."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b) and os.path.isfile(a)
    return os.path.realpath(a) == os.path.realpath(b)


def die(where, what):
    raise Failure(f"{where}: {what}")


def note(text):
    print("export:", text, file=sys.stderr)


def to_value(key, value):
    """A key's value as it stands in JSON: with null, and one id alone instead of a list of it."""
    if key.kind == IDS:
        return value[0] if len(value) == 1 else list(value) or None
    return None if key.null and key.kind == INT and value < key.least else value


def check(key, value, where):
    """The value of a key from one in JSON, or from ... where the key is missing."""
    if value is ... and key.default is ...:
        die(where, f"{key.name} is missing")
    if value is ... or value is None and key.null:
        return key.default
    if key.kind == IDS:
        ids = value if isinstance(value, list) else [value]
        fits = all(type(i) is int and key.least <= i <= key.most for i in ids)
        if fits and len(ids) <= MOST_ENDS:
            return tuple(dict.fromkeys(ids))
    if isinstance(key.kind, tuple):
        if value in key.kind:
            return value
        must = " or ".join(map(json.dumps, key.kind))
    elif key.kind == BOOL:
        if isinstance(value, bool):
            return value
        must = "true or false"
    elif key.kind == TEXT:
        if isinstance(value, str) and "\0" not in value:
            return value
        must = "a text"
    else:
        integer = key.kind == INT
        numbers = (int,) if integer else (int, float)
        if key.kind != IDS and type(value) in numbers and key.least <= value <= key.most:
            return value if integer else float(value)
        must = f"{'an integer' if integer else 'a number'} in {key.least}..{key.most}"
        must = must.replace(" number", "n integer") if key.kind == IDS else must
        must += f", a list of up to {MOST_ENDS} of them" * (key.kind == IDS) + " or null" * key.null
    die(where, f"{key.name} is {json.dumps(value)[:80]}, must be {must}")


def check_together(c, where):
    """Checks what cannot be said of one key alone."""
    def need(ok, name, must):
        if not ok:
            die(where, f"{name} is {c[name]}, must be {must}")
    E, K, groups, most = c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group
    need(c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even")
    need(c.first_k_dense_replace <= c.num_hidden_layers, "first_k_dense_replace",
         f"at most num_hidden_layers, {c.num_hidden_layers}")
    need(c.bos_token_id < c.vocab_size, "bos_token_id", f"below vocab_size, {c.vocab_size}")
    for name in ("eos_token_id", GENERATED + "eos_token_id"):
        for i in c[name]:
            if i >= c.vocab_size:
                die(where, f"{name} is {i}, must be below vocab_size, {c.vocab_size}")
    if E:
        need(K <= E, "num_experts_per_tok", f"1..{E} (n_routed_experts)")
    need(not (c.prenorm_chain and (c.inner_residual or c.outer_residual)), "prenorm_chain",
         "false where there is another residual")
    need((c.scoring_func == "sigmoid") == (c.topk_method == "noaux_tc"), "scoring_func",
         f"{'sigmoid' if c.topk_method == 'noaux_tc' else 'softmax'} with topk_method "
         f"{c.topk_method}")
    if E and c.topk_method == "noaux_tc":
        need(E // groups >= 2, "n_group", f"at most half of n_routed_experts, {E}")
    if E and c.topk_method != "greedy":
        need(E % groups == 0, "n_group", f"a divisor of n_routed_experts, {E}")
        need(most <= groups, "topk_group", f"at most n_group, {groups}")
        need(most * E // groups >= K, "topk_group",
             f"enough for {K} experts in groups of {E // groups}")
    if c[ROPE + "type"] == "yarn":
        need(c.rope_theta > 1, "rope_theta", "above 1 for yarn")
        need(c[ROPE + "beta_fast"] >= c[ROPE + "beta_slow"], ROPE + "beta_fast",
             f"at least beta_slow, {c[ROPE + 'beta_slow']}")
    if c.tokenizer == "bytes":
        need(c.vocab_size >= 258, "vocab_size", "258 or more, as the byte tokenizer has 258 tokens")
    if c.coe_weights:
        need(c.inner_iter > 1, "inner_iter", "2 or more where there are coe_weights")
        need(not c.prenorm_chain, "prenorm_chain", "false where there are coe_weights")


def with_old_names(config, where):
    """A config.json in which what has been renamed has its older name, and rope_scaling's keys
    stand beside the others. Keys that are null and not looked at are left out."""
    config = dict(config)
    if (value := config.pop("dtype", None)) is not None:
        config["torch_dtype"] = value
    rope = one_rope(config, where)
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope and rope.get("type", "default") != "default":
        for name in ("type", "factor"):
            if rope.get(name) is None:
                die(where, f"{ROPE}{name} is missing")
        config |= {ROPE + name: value for name, value in rope.items() if value is not None}
        if rope["type"] == "yarn" and rope.get("original_max_position_embeddings") is None:
            note(f"{where}: warning: rope_scaling.original_max_position_embeddings is missing: "
                 "here it is 4096, as in the authors' code; transformers takes "
                 "max_position_embeddings")

    dtype = str(config.get("torch_dtype") or "float32").removeprefix("torch.")
    config["torch_dtype"] = "float32" if dtype in ("float16", "auto") else dtype
    config["n_shared_experts"] = config.get("n_shared_experts") or None
    for name, value in ROUTERS.get(config.get("model_type"), ROUTERS[COE_TYPE]).items():
        if config.get(name) is None:
            config[name] = value
    layers, dense = config.get("num_hidden_layers"), config.get("first_k_dense_replace")
    if type(layers) is type(dense) is int and dense > layers:  # all of them are dense
        config["first_k_dense_replace"] = layers
    for name, needs in (("n_routed_experts", ("moe_intermediate_size", "num_experts_per_tok")),
                        ("topk_method", ("n_group", "topk_group"))):
        for other in needs:
            if config.get(other) is None:
                if config.get(name) not in (None, "greedy", "noaux_tc"):
                    die(where, f"{other} is missing, "
                        f"{name} {json.dumps(config[name])[:80]} needs it")
                config.pop(other, None)
    return config


def one_rope(config, where):
    """Takes rope_scaling and rope_parameters out of a config.json, and returns the one that counts
    with `type` as the name of its kind. Where they contradict each other transformers decides:
    rope_scaling counts before rope_parameters, and rope_type before type."""
    ropes = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.pop(name, None) or {}
        if not isinstance(rope, dict):
            die(where, f"{name} is {json.dumps(rope)[:80]}, must be null or an object")
        rope, kinds = dict(rope), [rope[key] for key in ("rope_type", "type")
                                   if rope.get(key) is not None]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            note(f"{where}: warning: {name} has the rope_type {json.dumps(kinds[0])[:80]} and the "
                 f"type {json.dumps(kinds[1])[:80]}: rope_type counts, as in transformers")
        for key in ("rope_type", "type"):
            rope.pop(key, None)
        if kinds:
            rope["type"] = kinds[0]
        if rope:
            ropes.append(rope)
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        note(f"{where}: warning: rope_scaling and rope_parameters differ: rope_scaling counts, as "
             "in transformers")
    return ropes[0] if ropes else {}


FIXED = {"hidden_act": "silu", "rope_interleave": True, "mlp_bias": False,
         "quantization_config": None, ROPE + "truncate": True,
         ROPE + "attention_factor": None}                      # the only values that are computed
IGNORED = set("""model_type architectures auto_map transformers_version _name_or_path use_cache
    pad_token_id ep_size pretraining_tp num_key_value_heads head_dim qk_head_dim
    output_router_logits attention_dropout num_nextn_predict_layers
    """.split())                                               # make no difference to the model


def check_computed(config, where):
    """Refuses a config.json of another model, and warns of keys that are not known."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        die(where, f"model_type is {json.dumps(model_type)[:80]}, must be "
            + " or ".join(MODEL_TYPES))
    for name, must in FIXED.items():
        if config.get(name) not in (None, must):
            die(where, f"{name} is {json.dumps(config[name])[:80]}, must be {json.dumps(must)}")
    known = {key.name for key in CONFIG if key.file == CONFIG_JSON} | FIXED.keys() | IGNORED
    if model_type != COE_TYPE:
        known -= DEEPSEEK.keys()
    for name in sorted(config.keys() - known):
        note(f"{where}: warning: unknown key {name} is ignored")


def shards(folder):
    """(path, the names that the index says are in it) of each safetensors file. If there is one
    file and no index, its names are None."""
    single = os.path.join(folder, "model.safetensors")
    index = single + ".index.json"
    found = {single: None}
    if not os.path.lexists(single):
        if not os.path.lexists(index):
            die(folder, "has neither model.safetensors nor model.safetensors.index.json")
        found, weight_map = {}, read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            die(index, "has no weight_map from tensors to files")
        for name, file in weight_map.items():
            if not isinstance(file, str) or file != os.path.basename(file) or not file:
                die(index, f"{name} is in {json.dumps(file)[:80]}, must be a file's name")
            found.setdefault(os.path.join(folder, file), set()).add(name)
    for path in found:
        if not os.path.isfile(path):
            die(path, "is no file" + ", but the index names it" * (path != single))
    return found.items()


def places_in(path, names):
    """Checkpoint.places of one safetensors file, which must hold the tensors of these names and no
    others. The library checks the file, but does not see a name that is there twice; and to read
    some rows it would read the whole tensor. So it is read here, and not by the library."""
    f = open_file(path)
    must_be_whole(f, path)
    with blame(path), safe_open(path, framework="numpy", backend="pread") as opened:
        found = set(opened.keys())
    start = 8 + int.from_bytes(f.read(8), "little")
    header = parse_json(f.read(start - 8), path)
    for name in sorted(found ^ (names or found)):
        die(path, f"tensor {name} " + ("is here, but not in the index" if name in found else
                                       "is not here, where the index says it is"))
    return {name: (f, path, header[name]["dtype"], header[name]["shape"],
                   start + header[name]["data_offsets"][0]) for name in found}


def must_be_whole(f, path):
    """Refuses an open safetensors file that is shorter than it says, which is what a download that
    did not end leaves. What else may be wrong with it the library says."""
    size, start = os.fstat(f.fileno()).st_size, 8 + int.from_bytes(f.read(8), "little")
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        end = start
        if start <= min(size, MOST_HEADER):
            header = json.loads(f.read(start - 8))
            end += max(value["data_offsets"][1] for name, value in header.items()
                       if name != "__metadata__")
        if 8 < size < end <= 2**62 and start < MOST_HEADER:
            die(path, f"is {end - size} bytes shorter than its header says: was its download cut "
                "off?")
    f.seek(0)


MOST_HEADER = 10**8     # bytes of a safetensors header, at most
HINTS = {"e_score_correction_bias": "the config has no topk_method noaux_tc",
         "weight_scale_inv": "fp8 weights are not read, convert them to bfloat16",
         "lm_head.bias": "a bias of lm_head is not computed"}  # why a tensor may be unknown


def check_tensors(checkpoint):
    """Finds tensors that are missing, wrongly shaped or unknown. What type all of them together
    have is the config's torch_dtype."""
    c, places, known = checkpoint.config, checkpoint.places, set()
    for t in tensors(c):
        for copy in range(t.copies):
            name, shape, _ = checkpoint.locate(t, copy)
            if name not in places:
                die(checkpoint.path, f"tensor {name} {list(shape)} is missing")
            if name not in known:                              # else it is fused, and was seen
                _, path, dtype, found, _ = places[name]
                if found != list(shape):
                    die(path, f"tensor {name} is {found}, must be {list(shape)}")
                if dtype not in TYPES:
                    die(path, f"tensor {name} is {dtype}, must be F32, BF16 or F16")
                known.add(name)
    if c.tie_word_embeddings and LM_HEAD in places:
        known.add(LM_HEAD)
        if not same_tensor(places[EMBEDDING], places[LM_HEAD]):
            die(places[LM_HEAD][1], f"tensor {LM_HEAD} is not {EMBEDDING}, though "
                "tie_word_embeddings is true: one of the two is wrong")
    for name in sorted(places.keys() - known):
        hint = [hint for part, hint in HINTS.items() if part in name]
        die(places[name][1], f"tensor {name} is unknown: "
            + (hint or ["this config has no such tensor"])[0])
    types = {places[name][2] for name in known}
    c["torch_dtype"] = "bfloat16" if types == {"BF16"} else "float32"


def same_tensor(a, b):
    """Whether two tensors of a checkpoint, of which a is one of the model's matrices, hold the same
    numbers."""
    if a[3] != b[3] or b[2] not in TYPES:
        return False
    for rows in blocks(Tensor("", 1, tuple(a[3]), MATRIX)):
        x, y = (rows_at(f, path, start, np.dtype(TYPES[dtype]), rows, tuple(shape[1:]))
                .astype(np.float32) for f, path, dtype, shape, start in (a, b))
        if not np.array_equal(x, y, equal_nan=True):
            return False
    return True


def describe(c):
    """The model in one line. Active: the parameters that one token is multiplied with."""
    if c.weight_type == "none":
        return f"a tokenizer of {c.vocab_size} tokens, without a model"
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
    residual = (["coe_weights"] * c.coe_weights or ["prenorm"] * c.prenorm_chain
                or ["inner"] * c.inner_residual)
    residual = "+".join(residual + ["outer"] * c.outer_residual) or "none"
    return (f"d {c.hidden_size}, L {c.num_hidden_layers}, E {c.n_routed_experts}, "
            f"K {c.num_experts_per_tok}, C {c.inner_iter}, S {c.n_shared_experts}, "
            f"residual {residual}, gates {'own' if c.use_igate else 'shared'}, "
            f"{total / 1e6:.3f} M parameters, {active / 1e6:.3f} M active")


class Progress:
    """Says how many of so many bytes are done, where that takes longer than a second or two."""
    def __init__(self, done, total):
        self.word, self.done, self.total, self.shown = done, 0, total, False
        self.next = time.monotonic() + 1.5

    def add(self, size, last=False):
        self.done += size
        if time.monotonic() >= self.next or last and self.shown:
            tty, self.shown = sys.stderr.isatty(), True
            self.next = time.monotonic() + (0.2 if tty else 5)
            print(f"export: {self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB {self.word}",
                  end="\r" if tty and not last else "\n", file=sys.stderr, flush=True)


def check_crc(file, path, size, said):
    """Reads a model.bin from SUMMED on, to see whether its CRC-32 is what its header says."""
    progress, crc = Progress("checked", size), 0
    file.seek(SUMMED)
    with blame(path):
        while data := file.read(2**20):
            crc = zlib.crc32(data, crc)
            progress.add(len(data))
    progress.add(0, last=True)
    if crc != said:
        die(path, f"its checksum is {crc:08x}, its header says {said:08x}: damaged")


def open_file(path):
    if os.path.exists(path) and not os.path.isfile(path):
        die(path, "is a folder or a device, must be a file")
    f = open(path, "rb")
    if f.peek(24)[:24] == b"version https://git-lfs.":
        die(path, "is a git-LFS pointer, not the file itself: git lfs pull fetches it")
    return f


def snapshot(path):
    """The checkpoint that a path means. In the hub's cache that is the snapshot that main names."""
    snapshots, main = (os.path.join(path, *name) for name in (("snapshots",), ("refs", "main")))
    if not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        die(path, f"is no file and no folder here; if it is on the Hugging Face hub: hf download "
            f"{path} --local-dir {os.path.basename(path)}, and then that folder")
    if not os.path.isdir(snapshots) or os.path.exists(os.path.join(path, CONFIG_JSON)):
        return path
    names = sorted(os.listdir(snapshots))
    if os.path.isfile(main):
        with open_file(main) as f:
            name = f.read(100).decode(errors="replace").strip()
        if name not in names:
            die(main, f"names the snapshot {name}, which is not there")
        names = [name]
    if len(names) != 1:
        die(snapshots, f"has {', '.join(names)[:200] or 'no snapshot'}, and there is no {main} "
            "that names one: give the folder of one")
    note(f"{path}: reads its snapshot {names[0]}")
    return os.path.join(snapshots, names[0])


def bytes_at(file, path, start, size):
    """size bytes of an open file."""
    with blame(path):
        data = bytearray(size)
        file.seek(start)
        if file.readinto(data) != size:
            die(path, f"ends before byte {start + size}")
    return data


def rows_at(file, path, start, kind, rows, width=()):
    """Some rows of an array in a file, whose first row is at start. width: the shape of a row."""
    size, n = math.prod(width) * kind.itemsize, rows.stop - rows.start
    data = bytes_at(file, path, start + rows.start * size, n * size)
    return np.frombuffer(data, kind).reshape(n, *width)


def read_json(path):
    with open_file(path) as f:
        return parse_json(f.read(), path)


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


def to_json(value):
    return json.dumps(value, indent=1).encode() + b"\n"


@contextlib.contextmanager
def blame(path, doing=""):
    """Whatever is raised inside becomes a line about path. A panic of the libraries' Rust is no
    Exception, but a BaseException."""
    try:
        yield
    except (Failure, KeyboardInterrupt):
        raise
    except BaseException as e:
        die(path, doing + (getattr(e, "strerror", None) or str(e) or type(e).__name__))


@contextlib.contextmanager
def locked(path):
    """A file that is locked until this process ends: it tells others that it is alive."""
    with open(path, "wb") as file:
        if fcntl:
            with contextlib.suppress(OSError):                 # some network file systems cannot
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def sweep(folder):
    """Removes the temporary folders of killed runs: those whose lock nobody holds."""
    for old in glob.glob(os.path.join(glob.escape(folder), ".export-*")) if fcntl else ():
        with contextlib.suppress(OSError), open(os.path.join(old, "lock"), "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)


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
        sweep(folder)
        new = os.path.join(folder, f".export-{os.getpid()}")
        stack.callback(shutil.rmtree, new, ignore_errors=True)  # before mkdir: a signal may follow
        os.mkdir(new)
        stack.enter_context(locked(os.path.join(new, "lock")))
        files = [stack.enter_context(open(os.path.join(new, name), "wb")) for name in names]
        yield files
        for f, path in zip(files, paths):
            f.flush()
            os.fsync(f.fileno())
            if os.path.exists(path):
                os.chmod(f.name, os.stat(path).st_mode & 0o7777)
            f.close()
        for f, path in zip(files, paths):
            os.replace(f.name, path)
        if os.name == "posix":                                 # the new names must last too
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            os.fsync(handle)


# ---- [9] tokenizers -----------------------------------------------------------------------------
# A byte-level BPE goes into model.bin as these tables. Each begins at a multiple of 64 bytes; all
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
#     items         [items, 4]    kind, class, least, most, see [11]
#     classes       [classes, 2]  the first range, how many
#     ranges        [ranges, 2]   lowest and highest code point; sorted
#     added         [added, 2]    tokens that are found in the text before all else, by their bytes:
#                                 id, flags (ADDED_FLAGS)
#     normal        [normal, 3]   lowest and highest code point, and 255: text with it may not be in
#                                 NFC; or else the combining class. Empty without flag 2

TOKENIZER, SPECIAL_MAP, ADDED = "tokenizer.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, VOCAB, MERGES = "chat_template.jinja", "vocab.json", "merges.txt"
FILES = (TOKENIZER, SETTINGS, SPECIAL_MAP, GENERATION, TEMPLATE, ADDED, VOCAB, MERGES)
                                        # these travel inside model.bin, byte by byte
ADDED_FLAGS = {"special": 1, "lstrip": 2, "rstrip": 4, "normalized": 8}
NOT_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))                   # DeepSeek-V2 has no tokens for these
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"


def byte_level():
    """{character: byte}: what stands for each byte in a tokenizer.json (GPT-2's table). A byte that
    prints is itself, the others are characters from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(b if b in prints else next(others)): b for b in range(256)}


BYTE_LEVEL = byte_level()


def read_tokenizer(folder, c, alone=False):
    """Sets the tokenizer, add_bos_token and the chat template of the config c from the files of a
    checkpoint; where it is alone, bos_token_id and eos_token_id, too. Returns the tokenizer section
    of model.bin, empty where the tokens are bytes."""
    path, settings_path = os.path.join(folder, TOKENIZER), os.path.join(folder, SETTINGS)
    settings = read_json(settings_path) if os.path.lexists(settings_path) else {}
    whole = os.path.lexists(path)
    if whole:
        found = read_json(path)
    else:
        found, path = from_vocab_and_merges(folder, settings), os.path.join(folder, VOCAB)
        if not found:
            return b""
    with blaming_tokenizer(path):
        must_have_tokens(found)
    with blame(settings_path, "its special tokens: "):
        found = with_outside_tokens(found, settings, folder, c.vocab_size)
    ids = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
    ids |= found["model"]["vocab"]
    for name in ("bos_token", "eos_token") if alone else ():
        c[name + "_id"] = check(KEYS[name + "_id"], ids.get(text_of(settings.get(name))), path)
    ours, _ = byte_tokenizer(c)
    same = all(found.get(part) == ours[part] for part in ("model", "normalizer", "pre_tokenizer",
                                                          "added_tokens"))
    c["tokenizer"] = "bytes" if same else "bpe"
    with blaming_tokenizer(path):
        section = b"" if same else bpe_section(found, c)
        c["add_bos_token"] = begins_with_bos(found, c) if whole else (
            settings.get("add_bos_token") is True
            and ids.get(text_of(settings.get("bos_token"))) == c.bos_token_id)
    warn_of_settings(found, settings, ids, c, settings_path)
    names = {name: text_of(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
    c |= chat_template(folder, settings, names, ids, c)
    return section


@contextlib.contextmanager
def blaming_tokenizer(path):
    """What goes wrong inside becomes a line about a tokenizer.json."""
    with blame(path, "is not a tokenizer.json: "):
        try:
            yield
        except Failure as e:
            die(path, e)
        except KeyError as e:
            raise ValueError(f"{e} is missing")


def must_have_tokens(found):
    """Refuses a tokenizer.json without a vocabulary, or with an added token that is there twice."""
    found["model"]["vocab"].keys()
    seen = set()
    for token in found.get("added_tokens", []):
        content, _ = token["content"], token["id"]
        must(content not in seen, "added token {} is there twice", content)
        seen.add(content)


def text_of(token):
    """The text of a token in the settings, where it may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def warn_of_settings(found, settings, ids, c, where):
    """Names what tokenizer_config.json says otherwise than what counts."""
    for name in ("bos_token", "eos_token"):
        token, known = text_of(settings.get(name)), c[name + "_id"]
        known = (list(known) or [-1]) if name == "eos_token" else [known]
        if token is not None and ids.get(token, -1) not in known:
            known = ", ".join("null" if i < 0 else str(i) for i in known)
            note(f"{where}: warning: {name} {json.dumps(token)} is {ids.get(token, 'no token')}, "
                 f"{name}_id of config.json {known}")
    said = settings.get("add_bos_token")
    if said is not None and said != c.add_bos_token and c.bos_token_id >= 0:
        note(f"{where}: warning: add_bos_token {json.dumps(said)} does not count, tokenizer.json's "
             f"post_processor does: text gets {'' if c.add_bos_token else 'no '}BOS, as in "
             "transformers 5 (transformers 4 differs)")
    for part in parts(found.get("post_processor"), "processors"):
        if part["type"] == "TemplateProcessing" and part["single"][-1].get("SpecialToken"):
            note(f"{where}: warning: the tokenizer adds {part['single'][-1]['SpecialToken']['id']} "
                 "behind every text, ./run does not")


def from_vocab_and_merges(folder, settings):
    """What a tokenizer.json would be for vocab.json and merges.txt: GPT-2's, or Qwen2's if
    tokenizer_class says so. None where they are not there; then a note names what is."""
    vocab, merges = os.path.join(folder, VOCAB), os.path.join(folder, MERGES)
    if not (os.path.lexists(vocab) and os.path.lexists(merges)):
        others = sorted({*os.listdir(folder)} & {"tokenizer.model", "spiece.model", "tekken.json",
                                                 "vocab.txt", "tiktoken.model", VOCAB, MERGES})
        if others:
            note(f"{folder}: has {' and '.join(others)} but no tokenizer.json, so the model has no "
                 "tokenizer: AutoTokenizer.from_pretrained(..).save_pretrained(..) writes one")
        return None
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    qwen = kind == "Qwen2Tokenizer"
    if not qwen and kind != "GPT2Tokenizer":
        note(f"{folder}: has no tokenizer.json: vocab.json and merges.txt are read as GPT-2's")
    for name in ("unk_token", "eos_token", "pad_token" if qwen else "bos_token"):
        if qwen or kind == "GPT2Tokenizer":
            settings.setdefault(name, END_OF_TEXT)
    with blame(merges), open_file(merges) as f:
        lines = f.read().decode().split("\n")
    cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not qwen}
    if qwen:
        cut = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"}, cut]}
    return {"added_tokens": [], "normalizer": {"type": "NFC"} if qwen else None,
            "pre_tokenizer": cut, "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": read_json(vocab), "merges": [
                line.rstrip("\r") for line in lines if line.strip()]}}


SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                 "mask_token")
NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def with_outside_tokens(found, settings, folder, vocab_size):
    """A tokenizer.json with the tokens, and the flags of tokens, that only other files have. What
    they do is up to the program that reads them: here it is what transformers 5 does, step by step.
    settings, of tokenizer_config.json, gets the names of special tokens from the older file."""
    old = found.get("added_tokens", [])
    known = {token["content"]: {k: v for k, v in token.items() if k != "id"} for token in old}
    if "added_tokens_decoder" in settings:
        outside = {int(i): as_token(t) for i, t in settings["added_tokens_decoder"].items()}
        named = {token["content"]: token for token in outside.values()}
    else:
        path, outside = os.path.join(folder, SPECIAL_MAP), {}
        for name, token in (read_json(path) if os.path.lexists(path) else {}).items():
            settings[name] = as_token(token, special=True) if isinstance(token, dict) else token
        special = {text_of(settings.get(name)) for name in SPECIAL_NAMES} | {
            text_of(token) for token in extra_tokens(settings)}
        path = os.path.join(folder, ADDED)
        for content, i in (read_json(path) if os.path.lexists(path) else {}).items():
            outside[i] = as_token(content, special=content in special)
        named = {token["content"]: token for token in outside.values()}
        outside |= {token["id"]: known[token["content"]] for token in old}
        named |= known
    named_specials = [settings[name] for name in SPECIAL_NAMES if settings.get(name)]
    named_specials += [token for name, token in settings.items() if name.endswith("_token")
                       and not name.startswith("add_") and name not in SPECIAL_NAMES
                       and isinstance(token, str)]
    named_specials = [named.get(text_of(token), token) for token in named_specials]

    new = [token for _, token in sorted(outside.items())]
    there = {*known, *(token["content"] for token in new)}
    new += [token for token in [*named_specials, *extra_tokens(settings)]
            if text_of(token) not in there]
    special = {text_of(token) for token in named_specials}
    added = Added(found)
    for token in new:
        token = as_token(token, special=True)
        added.add(token | {"special": True} if token["content"] in special else token)
    new = {content: added.ids[content] for content in added.tokens if content not in known}
    for fits, what in ((True, "adds, as transformers does,"), (False, "warning: leaves out")):
        names = [f"{content} ({i})" for content, i in new.items() if (i < vocab_size) == fits]
        if names:
            note(f"{folder}: {what} tokens that tokenizer.json does not have: "
                 + ", ".join(names)[:200] + f", for vocab_size is {vocab_size}" * (not fits))
    for content in [content for content, i in new.items() if i >= vocab_size]:
        del added.tokens[content]
    return found | {"added_tokens": [{"id": added.ids[content]} | token
                                     for content, token in added.tokens.items()]}


class Added:
    """Added tokens of a tokenizer, which grow as in Hugging Face's library: a token that has an id
    keeps it, and takes over the flags of a later one with its text."""

    def __init__(self, found):
        self.vocab, self.ids, self.tokens = found["model"]["vocab"], {}, {}
        self.end = len(self.vocab)      # the first id behind all others
        for token in found.get("added_tokens", []):
            self.ids[token["content"]] = token["id"]
            self.tokens[token["content"]] = {k: v for k, v in token.items() if k != "id"}
            self.end = max(self.end, token["id"] + 1)

    def add(self, token):
        content = token["content"]
        if content:
            i = self.ids.setdefault(content, self.vocab.get(content, self.end))
            self.end = max(self.end, i + 1)
            self.tokens[content] = dict(token)


def as_token(token, special=False):
    """A token with its flags, from its text or an object with some of them."""
    if isinstance(token, str):
        return {"content": token} | NO_FLAGS | {"normalized": not special, "special": special}
    must(isinstance(token, dict), "{} is no token", token)
    token = NO_FLAGS | {key: value for key, value in token.items() if key != "__type"}
    token.setdefault("special", special)
    token.setdefault("normalized", not token["special"])
    must(isinstance(token["content"], str), "token {} must be a text", token["content"])
    return token


def extra_tokens(settings):
    """Special tokens that have no name of their own."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else list(extra)


def byte_tokenizer(c):
    """(tokenizer.json, tokenizer_config.json) of a model whose tokens are the bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    special = {256: "<|beginoftext|>", 257: "<|endoftext|>"}   # ./train makes models of 257 alone
    with_bos, bos = None, special.get(c.bos_token_id)
    if c.add_bos_token and bos:         # transformers 5 looks at this, and not at add_bos_token
        with_bos = template_processor(bos, c.bos_token_id)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for i, text in special.items()],
        "normalizer": None, "pre_tokenizer": level, "post_processor": with_bos, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": BYTE_LEVEL, "merges": []}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": c.add_bos_token,
              "bos_token": bos, "eos_token": special.get(first_eos(c)),
              "pad_token": special[257], "clean_up_tokenization_spaces": False,
              "model_max_length": c.get("max_position_embeddings")}
    return tokenizer, config


def template_processor(bos, i):
    """The post_processor that puts BOS, of this text and id, in front of a text."""
    one = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": one,
            "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}}}


def with_bos_or_not(found, c):
    """The post_processor of a tokenizer.json, changed to what add_bos_token says."""
    if not c.add_bos_token:
        rest = [part for part in parts(found.get("post_processor"), "processors")
                if part["type"] != "TemplateProcessing"]
        return {"type": "Sequence", "processors": rest} if rest else None
    names = found["model"]["vocab"] | {t["content"]: t["id"] for t in found.get("added_tokens", [])}
    return template_processor({i: name for name, i in names.items()}[c.bos_token_id],
                              c.bos_token_id)


def first_eos(c):
    """The token that ends training texts; -1 where there is none."""
    return c.eos_token_id[0] if c.eos_token_id else -1


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
        if vocab[left + right] in pieces:                      # the last of the same pairs counts
            merges[vocab[left], vocab[right]] = rank, vocab[left + right]
        rank += 1

    n_tokens = max(text) + 1
    texts = [text.get(i, b"") for i in range(n_tokens)]        # a hole in the ids has no bytes
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
    """(id, bytes, flags) of each added token, sorted by the bytes. The library takes their ids from
    the vocabulary, and counts on from its end for those that are not in it. A file that says
    otherwise is refused."""
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
    # The library gives white space that one token starts with and another's rstrip takes to both.
    for content, (_, flags) in added.items():
        must(content[0] not in WHITE_SPACE or flags & normalized not in greedy, "added token {} "
             "starts with white space, which another one with rstrip takes: not supported", content)
    return sorted(((i, content.encode(), flags) for content, (i, flags) in added.items()),
                  key=lambda token: token[1])


def stages(pre_tokenizer):
    """The alternatives (see [11]) of each stage of a pre-tokenizer, which cuts every piece that
    reaches it into the matches of its pattern and what is between them."""
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
    """The tables stages, alternatives, items, classes and ranges."""
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
    """The table normal. A character has 255 if NFC replaces it, or if it may join the one before it
    (Unicode's NFC_QC is No or Maybe), else its combining class. A text is in NFC if none of its
    characters has 255 and classes do not decrease from one mark to the next."""
    value = np.zeros(END_OF_UNICODE, np.uint8)
    value[0x1161:0x1176] = value[0x11A8:0x11C3] = 255          # Hangul vowels and final consonants
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


def parts(value, key):
    """What a pipeline of a tokenizer.json consists of: the parts of a Sequence, which may be
    nested, or the one that is there, or none for null."""
    if value is not None and value["type"] == "Sequence":
        return [part for v in value[key] for part in parts(v, key)]
    return [] if value is None else [value]


def show(value):
    """A value of JSON as text of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def must(ok, what, *values):
    """Fails unless ok, with what, in which {} stands for values. read_tokenizer() catches that and
    adds the name of the file."""
    if not ok:
        raise Failure(what.format(*map(show, values)) if values else what)


# ---- [10] chat templates ------------------------------------------------------------------------
# A chat template is a program in Jinja, which makes the text of a conversation. The C code has
# pieces of text instead (lib/chat.h): of questions U and answers A, and maybe a system message S,
#
#     begin U user_assistant A assistant_user U ... U answer      or, with S in front,
#     system S system_user U user_assistant A ... U answer
#
# So the template is run on conversations of known words, and what stands between these is taken as
# the pieces. They are believed if they make of many other conversations what the template makes.

PIECES = "begin", "system", "system_user", "user_assistant", "assistant_user", "answer"
ROLES = "system", "user", "assistant"
RENDER, SECONDS, MEMORY, MOST_TEXT = "--render-chat", 10, 2**31, 2**16
WORDS = {role: [f"{role}Xq{i}z" for i in range(5)] for role in ROLES}
ODD = {"system": ["\n\tbe  brief.\n\n<b> & \u00e9 \n "],         # texts on which templates differ
       "user": ["  what  now?\n\n", "\u00a0and\x1cthen\n", "\n 1\t", "<b>&\"{{y}}'\\n %} \u00e9",
                " no\r\n"],
       "assistant": [" that \n", "<think>\nhm\n</think>\n\n so", "", "\t- a\n\n- b  c\n\n",
                     "&<y>\u00e9"]}


def conversation(turns, system, texts):
    """Messages as a template gets them, which end with a question."""
    messages = [{"role": "system", "content": texts["system"][0]}] if system else []
    for i in range(turns):
        messages.append({"role": "user", "content": texts["user"][i]})
        messages.append({"role": "assistant", "content": texts["assistant"][i]})
    return messages[:-1]


PROBES = [conversation(turns, system, texts) for texts in (WORDS, ODD) for system in (False, True)
          for turns in (1, 2, 3, 5)]


def chat_template(folder, settings, names, ids, c):
    """{key: value} of the config for the chat template of a checkpoint, if it has one that pieces
    can stand for. names: the special tokens that a template may ask for."""
    where, path = os.path.join(folder, SETTINGS), os.path.join(folder, TEMPLATE)
    template = settings.get("chat_template")
    if isinstance(template, list):
        with blame(where, "chat_template: "):
            template = {t["name"]: t["template"] for t in template}.get("default")
    if os.path.lexists(path):
        where = path
        with blame(path), open_file(path) as f:
            template = f.read().decode()
    if template is None:
        return {}
    try:
        pieces = unrolled(render(str(template), names))
    except ValueError as e:
        note(f"{where}: the chat_template {e}, so there is no ./run -m chat")
        return {}
    texts = {i: text for text, i in ids.items()}
    bos, eos = texts.get(c.bos_token_id, ""), texts.get(first_eos(c), "")
    if pieces == deepseek_v2(bos, eos):
        return {"chat_template": "deepseek_v2"}
    return {"chat_template": "pieces"} | {f"chat.{name}": text for name, text in pieces.items()}


def deepseek_v2(bos, eos):
    """The pieces of DeepSeek-V2, which model files have had a word for before there were pieces."""
    return {"begin": bos + "User: ", "system": bos, "system_user": "\n\nUser: ",
            "user_assistant": "\n\nAssistant: ", "assistant_user": eos + "User: ",
            "answer": "\n\nAssistant:", "trim": ""}


def unrolled(texts):
    """The pieces of a template that makes these texts of PROBES, None where it refuses one.
    ValueError says why there are none."""
    made = {json.dumps(probe): text for probe, text in zip(PROBES, texts)}
    text = lambda turns, system: made[json.dumps(conversation(turns, system, WORDS))]
    plain, spoken = WORDS["user"], WORDS["assistant"]
    parts = between(text(3, False), [plain[0], spoken[0], plain[1], spoken[1], plain[2]])
    if not parts:
        raise ValueError("does not have the messages, each once, in what it makes of three")
    pieces = dict.fromkeys((*PIECES, "trim"), "")
    pieces |= dict(zip(("begin", "user_assistant", "assistant_user"), parts), answer=parts[-1])
    head = between(text(1, True) or "", [WORDS["system"][0], plain[0]])
    if head:
        pieces |= {"system": head[0], "system_user": head[1]}
    has_system = bool(pieces["system"] or pieces["system_user"])

    def wrong(trim):
        """The probes of which the pieces make something else."""
        for probe, wanted in zip(PROBES, texts):
            messages = probe
            if probe[0]["role"] == "system" and not has_system:     # refused, or left out
                messages, wanted = probe[1:], wanted or made[json.dumps(probe[1:])]
            if wanted != joined(pieces | {"trim": trim}, messages):
                yield probe
    trims = [" ".join(roles) for n in range(4) for roles in itertools.combinations(ROLES, n)]
    fails = {trim: next(wrong(trim), None) for trim in trims}
    pieces["trim"] = next((trim for trim in trims if fails[trim] is None), None)
    if pieces["trim"] is None:
        probe = max(fails.values(), key=PROBES.index)
        turns = sum(message["role"] == "user" for message in probe)
        kind = " of odd white space" * (probe[-1]["content"] not in plain)
        system = " with a system message" * (probe[0]["role"] == "system")
        raise ValueError(f"does more than put texts around messages (seen at {turns} "
                         f"question{'s' * (turns > 1)}{kind}{system})")
    if any("\0" in piece or re.search("[\ud800-\udfff]", piece) for piece in pieces.values()):
        raise ValueError("makes NUL, or halves of characters")
    return pieces


def between(text, marks):
    """What stands around the marks, which must be in the text in this order and once; else None."""
    parts = re.split("|".join(map(re.escape, marks)), text or "")
    found = re.findall("|".join(map(re.escape, marks)), text or "")
    return parts if found == marks else None


def joined(pieces, messages):
    """The text of a conversation, as lib/chat.h makes it."""
    text, before = "", None
    for message in messages:
        role, content = message["role"], message["content"]
        piece = {"system": "system", "assistant": "user_assistant",
                 "user": {None: "begin", "system": "system_user"}.get(before, "assistant_user")}
        text += pieces[piece[role]] + (content.strip() if role in pieces["trim"] else content)
        before = role
    return text + pieces["answer"]


def render(template, names):
    """What a template makes of PROBES, a list of texts, None where it refuses. The template may do
    anything, so it runs in a process of its own that ends in any case. ValueError says why there
    are no texts."""
    try:
        done = subprocess.run([sys.executable, os.path.abspath(__file__), RENDER],
                              input=json.dumps([template, names]).encode(), timeout=SECONDS,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError(f"takes more than {SECONDS} seconds")
    try:
        texts, error = json.loads(done.stdout)
    except ValueError:
        raise ValueError("takes too much memory, or ends the program that runs it")
    if error:
        raise ValueError(error)
    return texts


def render_here(template, names):
    """(texts, None), or (None, why there are none), in the process that render() started. What the
    template may use is what transformers gives it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource                                        # not on Windows
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        import jinja2, jinja2.ext, jinja2.sandbox
    except ImportError:
        return None, "needs jinja2 (pip install jinja2, uv run --with jinja2 export.py ..)"

    class Generation(jinja2.ext.Extension):
        """{% generation %} .. {% endgeneration %}, which only marks what is between."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def strftime_now(text):
        dated.append(text)
        return time.strftime(text)

    dated, texts, error = [], [], None
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    for messages in PROBES:
        try:
            texts.append(env.from_string(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **names))
            if len(texts[-1]) > MOST_TEXT:
                return None, f"makes more than {MOST_TEXT} characters of a few words"
        except Exception as e:
            texts.append(None)
            error = error or " ".join(f"{type(e).__name__}: {e}".split())[:100]
    if dated:
        return None, "says what day it is, which a model file cannot"
    if None in texts[:4]:               # those without a system message, and with usual texts
        return None, f"cannot be run ({error})"
    return texts, None


# ---- [11] patterns ------------------------------------------------------------------------------
# The regular expressions of pre-tokenizers become alternatives, each a sequence of items: "so many
# characters of this class". In this form the C code matches them. At a place of the text the first
# alternative that matches wins. An item takes as many characters as it can, and where the items
# after it then do not match, gives them back one by one.

TAKE, NOT_NEXT, LINE_END = range(3)     # the kinds of items
NO_LIMIT = 2**32 - 1
MOST_ITEMS = 32                         # in an alternative, for the C code
MOST_ALTERNATIVES = 1000                # of a pattern
MOST_CLASSES = 256                      # in a pattern: each takes a megabyte here
END_OF_UNICODE = 0x110000


class Item(NamedTuple):
    """A part of an alternative. TAKE takes characters of its class. The others take none: NOT_NEXT
    matches where no character of its class follows, LINE_END at the end and in front of "\\n"."""
    kind: int
    chars: object               # the class: bool [END_OF_UNICODE]
    least: int = 1
    most: int = 1
    possessive: bool = False    # it gives nothing back. Allowed, and then not written into
                                # model.bin, where that makes no difference


def chars_of(codes):
    """The class of these code points."""
    chars = np.zeros(END_OF_UNICODE, bool)
    chars[list(codes)] = True
    return chars


def literal(text):
    """The alternatives of a pattern that is the text itself."""
    if len(text) > MOST_ITEMS:
        raise ValueError(f"it has {len(text)} items in a row, at most {MOST_ITEMS} are read")
    return checked([[Item(TAKE, chars_of([ord(char)])) for char in text]])


def checked(alternatives):
    """The same alternatives. ValueError says what the C code cannot do with them."""
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
    """The alternatives of a regular expression in Oniguruma's language (Hugging Face's library has
    it with Ruby's syntax). ValueError says what of it items cannot express."""

    def __init__(self, regex):
        self.text, self.at, self.classes = regex, 0, 0
        self.alternatives = self.alternation()
        if self.at < len(regex):
            self.refuse()
        checked(self.alternatives)

    def refuse(self, what=""):
        """Fails because of what, or else of what stands here."""
        found = self.text[self.at:self.at + 8]
        raise ValueError(f"{what or found or 'its end'} is not supported (character {self.at + 1})")

    def take(self, regex):
        """Goes past what matches here, and returns the match; or None."""
        match = re.compile(regex, re.ASCII).match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match

    def alternation(self, in_group=False, fold=False):
        """a|b|c. fold: without regard to case."""
        alternatives = self.sequence(in_group, fold)
        while self.take(r"\|"):
            alternatives += self.sequence(in_group, fold)
        return alternatives

    def sequence(self, in_group, fold):
        """The alternatives of one sequence, as groups are written out: x(?:a|b)y is xay|xby. What
        that may take is bounded, for (?:a|b) forty times would be 2^40 alternatives."""
        paths = [[]]
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            start, choices = self.at, self.element(in_group, fold)
            if len(paths) * len(choices) > MOST_ALTERNATIVES:
                raise ValueError(f"it has more than {MOST_ALTERNATIVES} alternatives with groups "
                                 "written out, not supported")
            if len(paths[0]) > MOST_ITEMS:
                raise ValueError(f"it has more than {MOST_ITEMS} items in a row, not supported")
            if not all(may_branch(path, choices) for path in paths):
                self.at = start
                self.refuse("a group after items that may give back what it starts with")
            paths = [path + choice for path in paths for choice in choices]
        return paths

    def element(self, in_group, fold):
        """Items for each of the ways in which one element of a sequence can match."""
        if self.take(r"\$"):
            return [[Item(LINE_END, chars_of([]), 0, 0)]]
        if self.take(r"\(\?!"):
            item = Item(NOT_NEXT, self.characters(fold), 0, 0)
            return [[item]] if self.take(r"\)") else self.refuse("(?!) of more than one character")
        if not in_group and (group := self.take(r"\(\?(i?):")):
            fold = bool(group[1])
            choices = self.alternation(True, fold)
            if fold and any(folds_together(path) for path in choices):
                self.refuse("(?i:) of letters that one character folds to")     # U+00DF to ss
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
        self.classes += 1
        if self.classes > MOST_CLASSES:
            raise ValueError(f"it has more than {MOST_CLASSES} classes, not supported")
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
        """The code point of one character, or the class of an escape."""
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
        """A class, with fold together with what its characters are in the other case."""
        if fold:
            if chars[128:].any():
                self.refuse("(?i:) with more than ASCII")
            chars = chars.copy()
            for code in np.flatnonzero(chars):
                chars[ord(chr(code).swapcase())] = True
            chars[0x17F] = chars[ord("s")]                     # the long s
            chars[0x212A] = chars[ord("k")]                    # the sign for Kelvin
        return chars


def folds_together(items):
    """Whether two neighbours may be two letters that without case one character stands for, as
    U+00DF does for ss."""
    return any(a.chars[ord(pair[0])] and b.chars[ord(pair[1])]
               for a, b in zip(items, items[1:]) for pair in ("ss", "st", "ff", "fi", "fl"))


def as_if_possessive(item, rest):
    """Whether it makes no difference that the item gives nothing back. It makes none where nothing
    in rest can fail, or where rest begins with other characters than the item takes."""
    for after in rest:
        if after.kind != TAKE or (after.chars & item.chars).any():
            return all(after.kind == TAKE and not after.least for after in rest)
        if after.least:
            return True
    return True


def may_branch(path, choices):
    """Whether path(a|b), where a and b are choices, means the same as path a|path b, whatever
    follows. It does if there is at most one place where path can end and a or b begin, and path
    tries that place first. That is so where all of path has a fixed length. It is also so where,
    behind a part of fixed length and one optional item, path takes only characters that neither a
    nor b begins with, in one item or in two without limit."""
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


# The general categories of Unicode 16, as the library's \p{..} has them. Here M, P and S are what
# begins with that letter, and N what does and is not Nd. UNICODE says, packed, how many code points
# of which category follow each other. tests/test_tokenizer.py --unicode makes it.
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


WHITE_SPACE = "".join(map(chr, [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B),
                                0x2028, 0x2029, 0x202F, 0x205F, 0x3000]))


@functools.cache
def categories():
    """The category of every code point, as its place in CATEGORIES."""
    runs = zlib.decompress(base64.b85decode(UNICODE.replace("\n", ""))).decode()
    runs = re.findall(r"(\D)(\d*)", runs)                      # "b12": 12 of number 2; "b": 1
    return np.repeat(np.array([ord(letter) - ord("`") for letter, _ in runs], np.uint8),
                     [int(length or 1) for _, length in runs])


def category(name):
    """The class of the characters of a category, or of all whose names begin with this one."""
    return np.isin(categories(), [i for i, c in enumerate(CATEGORIES) if i and c.startswith(name)])


def digits():
    """The class N for the stage Digits, which in the library has Unicode 17."""
    return category("N") | chars_of([*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)])


if __name__ == "__main__":
    sys.exit(main())
