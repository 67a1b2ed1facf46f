"""A reader and a writer of model.bin for the tests, which need nothing but Python: written from the
description of the format, not from the programs.

    model = parse(data)             version 1 or 2
    data = build(model)             version 2, with a checksum that is right
    data = model._replace(...)      and so on
"""
import struct
import zlib
from typing import NamedTuple

# The slots of version 1: of the file, the model and a recipe; q an int64, d a float64.
FILE = "file_bytes files_bytes tokenizer_bytes state_bytes weight_type tokenizer coe_weights".split()
CONFIG = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
    num_attention_heads n_shared_experts n_routed_experts num_experts_per_tok kv_lora_rank q_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim inner_iter inner_residual outer_residual use_igate
    topk_method n_group topk_group norm_topk_prob routed_scaling_factor first_k_dense_replace
    moe_layer_freq aux_loss_alpha seq_aux rms_norm_eps rope_theta rope_scaling.type
    rope_scaling.factor rope_scaling.original_max_position_embeddings rope_scaling.beta_fast
    rope_scaling.beta_slow rope_scaling.mscale rope_scaling.mscale_all_dim max_position_embeddings
    attention_bias tie_word_embeddings initializer_range bos_token_id eos_token_id torch_dtype
    temperature top_k top_p min_p repetition_penalty add_bos_token chat_template""".split()
RECIPE = """batch_size max_length micro_batch_size max_steps learning_rate warmup_steps warmup_ratio
    lr_scheduler weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed sequential
    level""".split()
REAL = set("""routed_scaling_factor aux_loss_alpha rms_norm_eps rope_theta rope_scaling.factor
    rope_scaling.beta_fast rope_scaling.beta_slow rope_scaling.mscale rope_scaling.mscale_all_dim
    initializer_range temperature top_p min_p repetition_penalty learning_rate warmup_ratio
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm""".split())
BOOL = set("""coe_weights inner_residual outer_residual use_igate norm_topk_prob seq_aux attention_bias
    tie_word_embeddings add_bos_token sequential""".split())
WORDS = {"weight_type": ("f32", "bf16", "q8"), "tokenizer": ("none", "bytes", "bpe"),
         "topk_method": ("greedy", "group_limited_greedy"),
         "rope_scaling.type": ("null", "linear", "yarn"), "torch_dtype": ("float32", "bfloat16"),
         "chat_template": ("none", "deepseek_v2"), "lr_scheduler": ("constant", "cosine")}
NULL = {"q_lora_rank": 0, "n_shared_experts": 0, "n_routed_experts": 0, "bos_token_id": -1,
        "eos_token_id": -1, "micro_batch_size": 0, "warmup_steps": -1}


class Model(NamedTuple):
    config: dict            # the lines, name -> value as text, in order
    files: bytes = b""
    tokenizer: bytes = b""
    weights: bytes = b""
    recipe: dict = {}       # the lines of a training state; empty: there is none
    moments: bytes = b""


def text_of(name, value):
    """What stands in a line for the number in a slot."""
    if name in WORDS:
        return WORDS[name][value]
    if name in BOOL:
        return "true" if value else "false"
    if name in NULL and value == NULL[name]:
        return "null"
    return repr(value)


def from_slots(data, names):
    """{name: text} of slots."""
    return {name: text_of(name, *struct.unpack_from("<d" if name in REAL else "<q", data, 8 * i))
            for i, name in enumerate(names)}


def to_lines(values):
    lines = "".join(f"{name} {value}\n" for name, value in values.items()).encode()
    return lines + bytes(-len(lines) % 64)


def from_lines(data):
    text = data.rstrip(b"\0").decode()
    assert not text or text[-1] == "\n"
    return dict(line.split(" ", 1) for line in text.splitlines())


def weights_at(data):
    """Where the weights begin and end."""
    if data[4] == 1:
        files, tokenizer, state = struct.unpack_from("<3Q", data, 16)
        return 1024 + files + tokenizer, len(data) - state
    config, files, tokenizer, state = struct.unpack_from("<4Q", data, 24)
    return 64 + config + files + tokenizer, len(data) - state


def parse(data):
    data = bytes(data)
    first, last = weights_at(data)
    state = data[last:]
    recipe = len(state) - 2 * (last - first)            # of a float32 model
    if data[:8] == b"COE1\1\0\0\0":
        (files,) = struct.unpack_from("<Q", data, 16)
        config = from_slots(data[40:64], FILE[4:]) | from_slots(data[128:1024], CONFIG)
        lines = {}
        if state:
            lines = from_slots(state, RECIPE)
            step, tokens, fingerprint = struct.unpack_from("<3Q", state, 8 * len(RECIPE))
            lines |= {"step": str(step), "data_tokens": str(tokens),
                      "data_fingerprint": f'"{fingerprint:016x}"' if tokens else '""'}
        at = 1024
    else:
        assert data[:8] == b"COE1\2\0\0\0"
        checksum, zero, size, config_bytes, files, _, _, zeros = struct.unpack_from("<2I6Q", data, 8)
        assert size == len(data) and zero == zeros == 0, "sizes"
        assert checksum == zlib.crc32(data[12:]), "checksum"
        at = 64 + config_bytes
        config = from_lines(data[64:at])
        lines = from_lines(state[:recipe]) if state else {}
    return Model(config, data[at:at + files], data[at + files:first], data[first:last], lines,
                 state[recipe:])


def build(model, **sizes):
    """The bytes of a version 2 file; sizes: values to put in the place of the right ones."""
    config, recipe = to_lines(model.config), to_lines(model.recipe)
    body = config + model.files + model.tokenizer + model.weights + recipe + model.moments
    right = {"file_bytes": 64 + len(body), "config_bytes": len(config),
             "files_bytes": len(model.files), "tokenizer_bytes": len(model.tokenizer),
             "state_bytes": len(recipe) + len(model.moments), "zeros": 0}
    checked = struct.pack("<I6Q", 0, *(right | sizes).values()) + body
    return b"COE1" + struct.pack("<2I", 2, zlib.crc32(checked)) + checked


def with_checksum(data):
    """The same bytes with the checksum that belongs to them."""
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:])) + data[12:]


def read(path):
    with open(path, "rb") as f:
        return parse(f.read())


def write(path, model, **sizes):
    with open(path, "wb") as f:
        f.write(build(model, **sizes))
    return path
