"""Tests of export.py: python tests/test_export.py

Ends in a line `N passed, N failed`. Needs what requirements.txt says, ./run and ./train, and
tests/golden, the checkpoints that came out of the reference implementation.
"""
import contextlib, io, json, math, os, re, resource, shutil, signal, struct, subprocess, sys
import tempfile, time, traceback, zlib

HERE = os.path.dirname(os.path.abspath(__file__))
EXPORT = os.path.join(os.path.dirname(HERE), "export.py")
GOLDEN = os.path.join(HERE, "golden")
sys.path.insert(0, os.path.dirname(HERE))
sys.dont_write_bytecode = True

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
import export

passed, failed = 0, 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("FAILED:", what)


def run(*args):
    """export.py in this process: (exit code, what it said on stderr)."""
    sys.argv, err = ["export.py", *map(str, args)], io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            code = export.main() or 0
        except SystemExit as e:
            code = e.code
    return code, err.getvalue()


def good(*args):
    code, err = run(*args)
    check(code == 0, f"export {args}: {code} {err}")
    return err


def bad(args, *words, code=1):
    """It fails with one line that has the words, and leaves the folder as it was. (Before it there
    may be warnings, and what the model is.)"""
    folder = os.path.dirname(args[1]) or "."
    before = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
    found, err = run(*args)
    lines = [line for line in err.splitlines() if "warning" not in line and line[-8:] != "M active"]
    check(found == code and len(lines) == 1 and lines[0].startswith("export: ")
          and all(str(w) in lines[0] for w in words), f"{args}: {found} {err!r}, wanted {words}")
    if before is not None:
        check(sorted(os.listdir(folder)) == before, f"{args} left {os.listdir(folder)}")


def golden(name):
    folder = os.path.join(GOLDEN, name)
    with open(os.path.join(folder, "config.json")) as f:
        return json.load(f), load_file(os.path.join(folder, "model.safetensors"))


def write(path, data):
    data = json.dumps(data) if isinstance(data, dict) else data
    with open(path, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return path


def read(path):
    with open(path, "rb") as f:
        return f.read()


def checkpoint(folder, config, weights, **files):
    """Writes a checkpoint; files: tokenizer_config={...} and so on."""
    os.makedirs(folder, exist_ok=True)
    write(f"{folder}/config.json", config)
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    for name, data in files.items():
        write(f"{folder}/{name}.json", data)
    return folder


def same(a, b):
    """Two dicts of arrays: the same names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a)


# ---- a reader of model.bin, written from the description of the format alone -------------------

# The slots of version 1 behind the sizes: . is float64, words are those of an enumeration, the rest
# are int64. Eight slots are reserved behind the first three.
VERSION_1 = """weight_type=f32,bf16,q8 tokenizer=none,bytes,bpe coe_weights=false,true
    0 0 0 0 0 0 0 0 vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
    num_attention_heads n_shared_experts n_routed_experts num_experts_per_tok kv_lora_rank
    q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim inner_iter inner_residual=false,true
    outer_residual=false,true use_igate=false,true topk_method=greedy,group_limited_greedy n_group
    topk_group norm_topk_prob=false,true routed_scaling_factor. first_k_dense_replace moe_layer_freq
    aux_loss_alpha. seq_aux=false,true rms_norm_eps. rope_theta. rope_scaling.type=null,linear,yarn
    rope_scaling.factor. rope_scaling.original_max_position_embeddings rope_scaling.beta_fast.
    rope_scaling.beta_slow. rope_scaling.mscale. rope_scaling.mscale_all_dim.
    max_position_embeddings attention_bias=false,true tie_word_embeddings=false,true
    initializer_range. bos_token_id eos_token_id torch_dtype=float32,bfloat16 temperature. top_k
    top_p. min_p. repetition_penalty. add_bos_token=false,true chat_template=none,deepseek_v2
    """.split()
OURS = "prenorm-chain", "prenorm-one", "v3-routing"        # kinds that version 1 did not have
NULLS = {"n_shared_experts": "0", "n_routed_experts": "0", "q_lora_rank": "0",
         "bos_token_id": "-1", "eos_token_id": "-1"}
SIZES = "file_bytes", "config_bytes", "files_bytes", "tokenizer_bytes", "state_bytes"


def read_header(data):
    """Of either version: ({size: bytes}, {key: the text of its line})"""
    version, = struct.unpack_from("<I", data, 4)
    assert data[:4] == b"COE1" and version in (1, 2)
    if version == 2:
        crc, zero, *sizes, last = struct.unpack_from("<2I6Q", data, 8)
        assert crc == zlib.crc32(data[12:]) and zero == last == 0
        text = data[64:64 + sizes[1]].rstrip(b"\0")
        assert sizes[1] == -(-len(text) // 64) * 64 and text.endswith(b"\n")
        lines = [line.split(" ", 1) for line in text.decode().split("\n")[:-1]]
        assert len(dict(lines)) == len(lines)
        return dict(zip(SIZES, sizes)), dict(lines)
    file, *sizes = struct.unpack_from("<4q", data, 8)
    sizes, lines = dict(zip(SIZES, (file, 1024 - 64, *sizes))), {}
    for slot, row in enumerate(VERSION_1, 5):
        name, _, words = row.partition("=")
        value, = struct.unpack_from("<d" if name[-1] == "." else "<q", data, 8 * slot)
        text = words.split(",")[value] if words else repr(value).removesuffix(".0")
        name = name.removesuffix(".")
        lines[name] = "null" if NULLS.get(name) == text else text
    assert lines.pop("0") == "0" and not any(data[8 * slot + 8:1024])
    return sizes, lines


def version_1(data):
    """The file of version 1 that says the same as this one of version 2."""
    sizes, lines = read_header(data)
    start, end = 64 + sizes["config_bytes"], sizes["file_bytes"]
    out = struct.pack("<4sI4q", b"COE1", 1, 1024 + end - start, *(sizes[n] for n in SIZES[2:]))
    for row in VERSION_1:
        name, _, words = row.partition("=")
        text = lines.get(name.removesuffix("."), "0")
        if text == "null" and not words:
            text = NULLS[name]
        out += (struct.pack("<d", float(text)) if name[-1] == "." else
                struct.pack("<q", words.split(",").index(text) if words else int(text)))
    return out.ljust(1024, b"\0") + data[start:]


def sealed(data):
    """data with the CRC-32 that belongs to it."""
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:])) + data[12:]


def with_config(data, config, pad=None):
    """A model.bin with these bytes in place of its config, and zeros behind them."""
    sizes = list(struct.unpack_from("<5Q", data, 16))
    config += bytes(-len(config) % 64) if pad is None else pad
    start, sizes[1] = 64 + sizes[1], len(config)
    sizes[0] = 64 + len(config) + len(data) - start
    return sealed(data[:16] + struct.pack("<5Q", *sizes) + data[56:64] + config + data[start:])


def with_lines(data, lines):
    return with_config(data, "".join(f"{k} {v}\n" for k, v in lines.items()).encode())


def changed(data, **values):
    """A model.bin in which some keys have other values, as ./train's options change them."""
    return with_lines(data, read_header(data)[1] | {k: str(v) for k, v in values.items()})


def read_model_bin(path, quantised=None):
    """The config, as {key: value}, and the tensors by name. quantised: a dict for the int8 and
    scales of q8."""
    data = read(path)
    sizes, lines = read_header(data)
    assert sizes["file_bytes"] == len(data)
    c = {}
    for name, text in lines.items():
        try:
            c[name] = json.loads(text)
        except ValueError:                                     # a bare word
            c[name] = text
    V, d, I, f, L, H = (c[k] for k in ("vocab_size", "hidden_size", "intermediate_size",
                                       "moe_intermediate_size", "num_hidden_layers",
                                       "num_attention_heads"))
    S, E, R, r = (c[k] or 0 for k in ("n_shared_experts", "n_routed_experts", "kv_lora_rank",
                                      "q_lora_rank"))
    dn, dr, dv, C = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                                    "inner_iter"))
    dense, freq, bias = (c[k] for k in ("first_k_dense_replace", "moe_layer_freq",
                                        "attention_bias"))
    gates = [f"mlp.gate.{t}.weight" for t in range(C)] if c["use_igate"] else ["mlp.gate.weight"]
    at, out, offsets = 64 + sum(sizes[name] for name in SIZES[1:4]), {}, []

    def take(names, *shape, matrix=True):
        nonlocal at
        at += -at % 64                                         # only a stack's first is aligned
        offsets.append(at)
        for name in names:
            if matrix and c["weight_type"] == "q8":
                rows, cols = shape
                groups = (cols + 63) // 64
                q = np.frombuffer(data, np.int8, rows * cols, at).reshape(shape)
                at += rows * cols + -(rows * cols) % 64
                scale = np.frombuffer(data, "<f4", rows * groups, at).reshape(rows, groups)
                at += scale.nbytes + -scale.nbytes % 64
                out[name] = q * np.repeat(scale, 64, axis=1)[:, :cols]
                if quantised is not None:
                    quantised[name] = q, scale
                continue
            kind = np.dtype("bfloat16" if matrix and c["weight_type"] == "bf16" else "<f4")
            out[name] = np.frombuffer(data, kind, math.prod(shape), at).reshape(shape)
            at += out[name].nbytes

    take(["model.embed_tokens.weight"], V, d)
    for l in range(L):
        many = lambda names, *a, **k: take([f"model.layers.{l}.{name}" for name in names], *a, **k)
        one = lambda name, *a, **k: many([name], *a, **k)
        one("input_layernorm.weight", d, matrix=False)
        if r:
            one("self_attn.q_a_proj.weight", r, d)
            if bias: one("self_attn.q_a_proj.bias", r, matrix=False)
            one("self_attn.q_a_layernorm.weight", r, matrix=False)
            one("self_attn.q_b_proj.weight", H * (dn + dr), r)
        else:
            one("self_attn.q_proj.weight", H * (dn + dr), d)
        one("self_attn.kv_a_proj_with_mqa.weight", R + dr, d)
        if bias: one("self_attn.kv_a_proj_with_mqa.bias", R + dr, matrix=False)
        one("self_attn.kv_a_layernorm.weight", R, matrix=False)
        one("self_attn.kv_b_proj.weight", H * (dn + dv), R)
        one("self_attn.o_proj.weight", d, H * dv)
        if bias: one("self_attn.o_proj.bias", d, matrix=False)
        one("post_attention_layernorm.weight", d, matrix=False)
        if E and l >= dense and l % freq == 0:
            many(gates, E, d, matrix=False)
            for part, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                many([f"mlp.experts.{e}.{part}_proj.weight" for e in range(E)], *shape)
            for part, shape in (("gate", (f * S, d)), ("up", (f * S, d)), ("down", (d, f * S))):
                if S: one(f"mlp.shared_experts.{part}_proj.weight", *shape)
            if c["coe_weights"]:
                many([f"mlp.coe_weights.{t}" for t in range(C - 1)], d, matrix=False)
            if c["topk_method"] == "noaux_tc":
                many([gate.replace("weight", "e_score_correction_bias") for gate in gates], E,
                     matrix=False)
        else:
            for part, shape in (("gate", (I, d)), ("up", (I, d)), ("down", (d, I))):
                one(f"mlp.{part}_proj.weight", *shape)
    take(["model.norm.weight"], d, matrix=False)
    if not c["tie_word_embeddings"]: take(["lm_head.weight"], V, d)
    at += -at % 64
    assert at + sizes["state_bytes"] == len(data) and all(o % 64 == 0 for o in offsets)
    return c, out


# ---- tests ------------------------------------------------------------------------------------

def test_memory_and_interrupt(tmp):
    """First, as a child's peak counts the size of its parent where it was forked."""
    config, _ = golden("coe")
    config |= {"hidden_size": 1024, "vocab_size": 4096, "n_routed_experts": 23,
               "num_hidden_layers": 4, "moe_intermediate_size": 224}
    write(f"{tmp}/big.json", config)                           # 290 MB; embed_tokens has 16.8 MB

    def peak(*args):                                           # MB
        child = subprocess.Popen([sys.executable, EXPORT, *args], stderr=subprocess.PIPE,
                                 stdout=subprocess.DEVNULL)
        err = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        check(child.returncode == 0, f"{args}: {err}")
        child.stderr.close()
        return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    base, largest = peak("--version"), 4096 * 1024 * 4 / 1e6
    peaks = {name: peak(*args) for name, args in {
        "init": (f"{tmp}/big.json", f"{tmp}/big.bin", "--init", "1"),
        "to hf": (f"{tmp}/big.bin", f"{tmp}/big"),
        "from hf": (f"{tmp}/big", f"{tmp}/big2.bin"),
        "to bf16": (f"{tmp}/big.bin", f"{tmp}/big3.bin", "--dtype", "bf16"),
        "to q8": (f"{tmp}/big", f"{tmp}/big4.bin", "--dtype", "q8"),
        "from q8": (f"{tmp}/big4.bin", f"{tmp}/big5.bin", "--dtype", "f32")}.items()}
    size = os.path.getsize(f"{tmp}/big.bin") / 1e6
    print(f"peak memory in MB over Python's {base:.0f}, for a model of {size:.0f} with a tensor of "
          f"{largest:.1f}:", ", ".join(f"{k} {v - base:.1f}" for k, v in peaks.items()))
    check(size > 280 and all(v - base < largest for v in peaks.values()), f"memory {peaks}")
    check(read(f"{tmp}/big.bin") == read(f"{tmp}/big2.bin"), "big.bin comes back")
    check(os.path.getsize(f"{tmp}/big4.bin") < 0.27 * size * 1e6, "q8 is small")

    before = sorted(os.listdir(tmp))
    for number in (signal.SIGINT, signal.SIGTERM):     # (a test in the background ignores SIGINT)
        child = subprocess.Popen([sys.executable, EXPORT, f"{tmp}/big.json", f"{tmp}/new.bin",
                                  "--init", "1"], stderr=subprocess.PIPE, text=True,
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while child.poll() is None and sorted(os.listdir(tmp)) == before:
            time.sleep(0.01)
        child.send_signal(number)
        err = child.communicate()[1]
        check(child.returncode == 130 and "interrupted" in err and "Traceback" not in err,
              f"signal {number}: {child.returncode} {err}")
        check(sorted(os.listdir(tmp)) == before, f"signal {number} left {os.listdir(tmp)}")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))
    for target in ("full.bin", "full"):
        source = [f"{tmp}/big.bin", f"{tmp}/{target}"]
        child = subprocess.run([sys.executable, EXPORT, *source], stderr=subprocess.PIPE, text=True,
                               preexec_fn=limit)
        check(child.returncode == 1 and f"{target}" in child.stderr.splitlines()[-1]
              and "cannot be written: File too large" in child.stderr and
              "Traceback" not in child.stderr, f"full disk: {child.returncode} {child.stderr}")
        check(sorted(os.listdir(tmp)) == before, f"full disk left {os.listdir(tmp)}")


def test_golden(tmp):
    """float32: HF -> model.bin -> HF is the same file, and a reader of its own reads model.bin."""
    for name in sorted(os.listdir(GOLDEN)):
        config, weights = golden(name)
        line = good(f"{GOLDEN}/{name}", f"{tmp}/{name}.bin")
        check(f"E {config['n_routed_experts']}, K {config['num_experts_per_tok']}" in line, line)
        good(f"{tmp}/{name}.bin", f"{tmp}/{name}")
        if config["tie_word_embeddings"]:   # is there a second time, for those who do not tie
            wanted = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
            check(same(load_file(f"{tmp}/{name}/model.safetensors"), wanted), f"{name}: tied")
            good(f"{tmp}/{name}", f"{tmp}/again.bin")
            check(read(f"{tmp}/again.bin") == read(f"{tmp}/{name}.bin"), f"{name}: there and back")
        else:
            check(read(f"{GOLDEN}/{name}/model.safetensors") ==
                  read(f"{tmp}/{name}/model.safetensors"), f"{name}: model.safetensors comes back")
        back = json.loads(read(f"{tmp}/{name}/config.json"))
        check(back.pop("auto_map", None) == (None if name in OURS else {
            "AutoConfig": "configuration_coe.CoeConfig",
            "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM"}), name)
        check(back == {key: config[key] for key in config.keys() & back.keys()} and {
            *config} - {*back} <= export.IGNORED, f"{name}: config.json comes back")
        check(sorted(os.listdir(f"{tmp}/{name}")) == ["config.json", "model.safetensors"], name)
        c, found = read_model_bin(f"{tmp}/{name}.bin")
        check(same(found, weights), f"{name}: the tensors in model.bin")
        check((c["weight_type"], c["tokenizer"], c["torch_dtype"]) == ("f32", "none", "float32")
              and read(f"{tmp}/{name}.bin")[:8] == b"COE1\2\0\0\0", f"{name}: {c}")


def test_lines(tmp):
    """The config, line by line, of a checkpoint in which no two values are alike."""
    config, weights = golden("deepseek-v2")
    config |= {"aux_loss_alpha": 0.25, "rms_norm_eps": 2e-5, "rope_theta": 12345.5,
               "seq_aux": False, "initializer_range": 0.03, "bos_token_id": None, "eos_token_id": 7}
    config["rope_scaling"] |= {"beta_fast": 30, "beta_slow": 2, "mscale": 0.5}
    generation = {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.5, "x": "y",
                  "do_sample": True, "eos_token_id": [7, 9]}
    checkpoint(f"{tmp}/lines", config, weights, generation_config=generation,
               tokenizer_config={"add_bos_token": True}, special_tokens_map="{ }\n")
    good(f"{tmp}/lines", f"{tmp}/lines.bin")
    sizes, lines = read_header(read(f"{tmp}/lines.bin"))
    wanted = """weight_type f32|tokenizer none|coe_weights false|vocab_size 64|hidden_size 32
        intermediate_size 48|moe_intermediate_size 16|num_hidden_layers 3|num_attention_heads 2
        n_shared_experts 2|n_routed_experts 8|num_experts_per_tok 3|kv_lora_rank 16|q_lora_rank 20
        qk_nope_head_dim 8|qk_rope_head_dim 8|v_head_dim 8|inner_iter 1|inner_residual false
        outer_residual true|prenorm_chain false|use_igate true|scoring_func softmax|topk_method group_limited_greedy|n_group 4|topk_group 2
        norm_topk_prob false|routed_scaling_factor 2.5|first_k_dense_replace 1|moe_layer_freq 1
        aux_loss_alpha 0.25|seq_aux false|rms_norm_eps 2e-05|rope_theta 12345.5
        rope_scaling.type yarn|rope_scaling.factor 4
        rope_scaling.original_max_position_embeddings 16|rope_scaling.beta_fast 30
        rope_scaling.beta_slow 2|rope_scaling.mscale 0.5|rope_scaling.mscale_all_dim 0.707
        max_position_embeddings 128|attention_bias false|tie_word_embeddings false
        initializer_range 0.03|bos_token_id null|eos_token_id 7
        generation_config.eos_token_id [7, 9]|torch_dtype float32|temperature 0.3
        top_k 5|top_p 0.9|min_p -1|repetition_penalty 1.5|add_bos_token false|chat_template none
        chat.begin ""|chat.system ""|chat.system_user ""|chat.user_assistant ""
        chat.assistant_user ""|chat.answer ""|chat.trim ""
        default_prompt \"\""""
    wanted = [line.strip() for line in wanted.replace("\n", "|").split("|")]
    check([f"{k} {v}" for k, v in lines.items()] == wanted, f"{lines}")
    check(sizes["tokenizer_bytes"] == sizes["state_bytes"] == 0 < sizes["files_bytes"], f"{sizes}")
    good(f"{tmp}/lines.bin", f"{tmp}/lines2")
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        check(read(f"{tmp}/lines/{name}") == read(f"{tmp}/lines2/{name}"), f"{name} verbatim")
    back = json.loads(read(f"{tmp}/lines2/config.json"))
    check(all(back[key] == config[key] for key in config), "config.json comes back")
    names = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
    for generation, values in (
            ({"do_sample": False, "temperature": 0.6}, [0, -1, -1, -1, -1]),
            ({"temperature": 0.6, "top_k": 3}, [0, 3, -1, -1, -1]), ({}, [0, -1, -1, -1, -1]),
            ({"do_sample": True, "min_p": 0.1, "top_k": None}, [-1, -1, -1, 0.1, -1])):
        write(f"{tmp}/lines/generation_config.json", generation)
        good(f"{tmp}/lines", f"{tmp}/lines.bin")
        c, _ = read_model_bin(f"{tmp}/lines.bin")
        check([c[name] for name in names] == values, f"{generation}")


def test_version_1(tmp):
    """Version 1 is read as what it was, and becomes version 2."""
    checkpoint(f"{tmp}/files", *golden("three-iterations"), generation_config={"top_k": 3})
    for source in (*(f"{GOLDEN}/{name}" for name in os.listdir(GOLDEN) if name not in OURS),
                   f"{tmp}/files"):
        for dtype in ("f32", "bf16", "q8"):
            good(source, f"{tmp}/2.bin", "--dtype", dtype)
            new = read(f"{tmp}/2.bin")
            write(f"{tmp}/1.bin", old := version_1(new))
            there = {k: v for k, v in read_header(new)[1].items() if k in export.VERSION_1}
            check(old[4] == 1 and same(read_model_bin(f"{tmp}/1.bin")[1],
                                       read_model_bin(f"{tmp}/2.bin")[1])
                  and read_header(old)[1] == there, f"{source}: the same model")
            good(f"{tmp}/1.bin", f"{tmp}/back.bin")
            check(read(f"{tmp}/back.bin") == new, f"{source}: version 1 becomes version 2")
            for n in (1, 2):
                shutil.rmtree(f"{tmp}/hf{n}", ignore_errors=True)
                good(f"{tmp}/{n}.bin", f"{tmp}/hf{n}")
            for name in os.listdir(f"{tmp}/hf2"):
                check(read(f"{tmp}/hf1/{name}") == read(f"{tmp}/hf2/{name}"), f"{source}: {name}")
    good(f"{tmp}/files", f"{tmp}/2.bin")
    with_state(f"{tmp}/2.bin", f"{tmp}/trained.bin")
    write(f"{tmp}/1.bin", version_1(read(f"{tmp}/trained.bin")))
    good(f"{tmp}/1.bin", f"{tmp}/back.bin")
    check(read(f"{tmp}/back.bin") == read(f"{tmp}/2.bin"), "version 1, without training state")


def test_types(tmp):
    """bfloat16 and sharded checkpoints come back bit by bit; float16 as the same numbers."""
    for name in ("coe", "upcycled", "three-iterations"):
        config, weights = golden(name)
        config["torch_dtype"] = "bfloat16"
        b16 = {k: v.astype(ml_dtypes.bfloat16) for k, v in weights.items()}
        source = checkpoint(f"{tmp}/b16-{name}", config, b16)
        for dtype in ("f32", "bf16"):
            good(source, f"{tmp}/b16.bin", "--dtype", dtype)
            good(f"{tmp}/b16.bin", f"{tmp}/b16-back")
            check(read(f"{tmp}/b16-back/model.safetensors") == read(f"{source}/model.safetensors"),
                  f"{name}: bfloat16 comes back through {dtype}")
            back = json.loads(read(f"{tmp}/b16-back/config.json"))
            check(back["torch_dtype"] == "bfloat16", name)
            c, found = read_model_bin(f"{tmp}/b16.bin")
            check(c["weight_type"] == dtype and c["torch_dtype"] == "bfloat16", f"{c}")
            check(same({k: v.astype("f4") for k, v in found.items()},
                       {k: v.astype("f4") for k, v in b16.items()}), f"{name} in {dtype}")
            check({str(v.dtype) for k, v in found.items() if v.ndim == 1 or ".mlp.gate." in k}
                  == {"float32"}, "norms, biases, gates and coe_weights are float32")
    config, weights = golden("coe")
    f16 = {k: v.astype(np.float16) for k, v in weights.items()}
    checkpoint(f"{tmp}/f16", config | {"torch_dtype": "float16"}, f16)
    good(f"{tmp}/f16", f"{tmp}/f16.bin")
    _, found = read_model_bin(f"{tmp}/f16.bin")
    check(same(found, {k: v.astype("f4") for k, v in f16.items()}), "float16")
    shards(f"{tmp}/shards", config, weights)
    good(f"{tmp}/shards", f"{tmp}/shards.bin")
    good(f"{GOLDEN}/coe", f"{tmp}/coe.bin")
    check(read(f"{tmp}/shards.bin") == read(f"{tmp}/coe.bin"), "shards give the same model.bin")


def test_q8(tmp):
    """int8 and scales, number by number; from each kind of source; and back."""
    def close(q, scale, w, name):
        rows, cols = w.shape
        groups = scale.shape[1]
        wide = np.zeros((rows, groups * 64), np.float32)
        wide[:, :cols] = w.astype(np.float32)
        wide = wide.reshape(rows, groups, 64)
        check((scale == abs(wide).max(axis=2) / np.float32(127)).all(), f"{name}: scales")
        with np.errstate(all="ignore"):
            exact = np.nan_to_num(wide / scale[:, :, None], posinf=0, neginf=0)
        exact = np.clip(np.round(exact), -127, 127).reshape(rows, -1)[:, :cols]
        check((q == exact).all(), f"{name}: int8")

    for name in sorted(os.listdir(GOLDEN)):
        config, weights = golden(name)
        good(f"{GOLDEN}/{name}", f"{tmp}/f.bin")
        for source in (f"{GOLDEN}/{name}", f"{tmp}/f.bin"):
            good(source, f"{tmp}/q.bin", "--dtype", "q8")
            parts = {}
            c, found = read_model_bin(f"{tmp}/q.bin", parts)
            check(c["weight_type"] == "q8" and found.keys() == weights.keys(), f"{name}: tensors")
            check(same({k: v for k, v in found.items() if k not in parts},
                       {k: v for k, v in weights.items() if k not in parts}), f"{name}: float32")
            check(all(v.ndim == 2 and ".mlp.gate." not in k for k, v in weights.items()
                      if k in parts), f"{name}: which are q8")
            for k, (q, scale) in parts.items():
                close(q, scale, weights[k], f"{name} {k}")
        q8 = read(f"{tmp}/q.bin")
        check("warning" not in good(f"{tmp}/q.bin", f"{tmp}/q2.bin"), "no change of type")
        err = good(f"{tmp}/q.bin", f"{tmp}/wide.bin", "--dtype", "f32")
        check("q.bin" in err and "warning" in err and "rounded" in err, err)
        check(same(read_model_bin(f"{tmp}/wide.bin")[1], found), f"{name}: q8 in float32")
        good(f"{tmp}/wide.bin", f"{tmp}/q3.bin", "--dtype", "q8")
        err = good(f"{tmp}/q.bin", f"{tmp}/hf")
        check("warning" in err and "rounded" in err, err)
        head = {"lm_head.weight": found["model.embed_tokens.weight"]}   # is there if tied, too
        check(same(load_file(f"{tmp}/hf/model.safetensors"), head | found), f"{name}: q8 to hf")
        good(f"{tmp}/hf", f"{tmp}/q4.bin", "--dtype", "q8")
        check(q8 == read(f"{tmp}/q2.bin") == read(f"{tmp}/q3.bin") == read(f"{tmp}/q4.bin"),
              f"{name}: q8, float32 and q8 again is the same file")
        good(f"{tmp}/q.bin", f"{tmp}/b.bin", "--dtype", "bf16")
        check(same({k: v.astype("f4") for k, v in read_model_bin(f"{tmp}/b.bin")[1].items()},
                   {k: v.astype("bfloat16").astype("f4") if k in parts else v
                    for k, v in found.items()}), f"{name}: q8 in bfloat16")

    config, weights = golden("coe")                            # awkward numbers
    weights["lm_head.weight"] = w = np.zeros((64, 32), np.float32)
    w[1, 3], w[2, 5], w[3, :] = 3.3e38, -1e-45, 2.7e-43        # huge; subnormal: no scale, clipped
    w[4, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -0.0]  # ties to even
    config["torch_dtype"] = "bfloat16"
    b16 = {k: v.astype(ml_dtypes.bfloat16) for k, v in weights.items()}
    for kind, w in (("f4", weights), ("b16", b16)):
        parts, w = {}, dict(w)
        good(checkpoint(f"{tmp}/{kind}", config, w), f"{tmp}/x.bin", "--dtype", "q8")
        read_model_bin(f"{tmp}/x.bin", parts)
        q, scale = parts["lm_head.weight"]
        check(list(q[4, :8]) == [127, 0, 2, 2, 0, -2, -126, 0] and scale[4, 0] == 1, "ties")
        check(q[1, 3] == 127 and np.isfinite(scale).all() and not q[2].any(), "huge and tiny")
        check(not q[0].any() and not scale[0].any(), "a group of zeros")
        for name, (q, scale) in parts.items():
            close(q, scale, w[name], f"awkward {kind} {name}")
        for x in (math.nan, math.inf, -math.inf):
            for name in ("lm_head.weight", "model.layers.0.mlp.experts.3.down_proj.weight"):
                broken = w[name].copy()
                broken[7, 9] = x
                checkpoint(f"{tmp}/broken", config, w | {name: broken})
                bad([f"{tmp}/broken", f"{tmp}/y.bin", "--dtype", "q8"], name, "not finite", "q8")
                good(f"{tmp}/broken", f"{tmp}/nan.bin")
                bad([f"{tmp}/nan.bin", f"{tmp}/y.bin", "--dtype", "q8"], "nan.bin", name)
    gate = "model.layers.0.mlp.gate.0.weight"                  # float32 stays as it is, NaN too
    w = weights[gate] = weights[gate].copy()
    w[0, 0] = math.nan
    good(checkpoint(f"{tmp}/broken", config, weights), f"{tmp}/x.bin", "--dtype", "q8")
    check(read_model_bin(f"{tmp}/x.bin")[1][gate].tobytes() == w.tobytes(), "NaN in a gate")


def test_blocks(tmp):
    """Tensors of more than one block of rows, fused or not, are what they are in one piece."""
    config, weights = golden("moe")
    d, f, E = 1056, 200, 8                                     # blocks of 992 rows
    config |= {"hidden_size": d, "moe_intermediate_size": f, "vocab_size": 2100,
               "n_routed_experts": E}
    write(f"{tmp}/c.json", config)
    good(f"{tmp}/c.json", f"{tmp}/c.bin", "--init", 5)
    good(f"{tmp}/c.bin", f"{tmp}/c")
    weights = load_file(f"{tmp}/c/model.safetensors")
    check(weights["lm_head.weight"].shape == (2100, d), "three blocks")
    check(len(export.blocks(export.Tensor("", 1, (2100, d), ""))) == 3, "three blocks")
    good(f"{tmp}/c", f"{tmp}/q.bin", "--dtype", "q8")
    _, found = read_model_bin(f"{tmp}/q.bin")
    for name, w in weights.items():
        x = found[name]
        if w.ndim == 2 and ".gate." not in name:
            q, scale = export.quantise(w)
            check((export.dequantise(q, scale) == x).all(), name)
            check(abs(x - w).max() <= abs(w).max() / 127 * 0.5001, name)
        else:
            check(w.tobytes() == x.tobytes(), name)
    for l in range(config["num_hidden_layers"]):
        p = f"model.layers.{l}.mlp.experts."
        if p + "0.up_proj.weight" in weights:
            part = lambda name: [weights.pop(f"{p}{e}.{name}_proj.weight") for e in range(E)]
            weights[p + "gate_up_proj"] = np.concatenate([part("gate"), part("up")], axis=1)
            weights[p + "down_proj"] = np.stack(part("down"))
    checkpoint(f"{tmp}/fused", config, weights)
    for dtype in ("f32", "q8"):
        good(f"{tmp}/fused", f"{tmp}/f.bin", "--dtype", dtype)
        check(read(f"{tmp}/f.bin") == read(f"{tmp}/c.bin" if dtype == "f32" else f"{tmp}/q.bin"),
              f"fused, {dtype}")


def shards(folder, config, weights):
    os.makedirs(folder, exist_ok=True)
    names, index = sorted(weights), {}
    for n in range(3):
        file = f"model-{n + 1:05}-of-00003.safetensors"
        save_file({k: weights[k] for k in names[n::3]}, f"{folder}/{file}", {"format": "pt"})
        index |= {k: file for k in names[n::3]}
    save_file({"other": np.ones(3)}, f"{folder}/other.safetensors")       # not to be looked at
    write(f"{folder}/config.json", config)
    write(f"{folder}/model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return index


def deepseek(tmp):
    config, weights = golden("deepseek-v2")
    for key in ("inner_iter", "inner_residual", "outer_residual", "use_igate"):
        del config[key]
    config |= {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    weights = {k.replace(".gate.0.", ".gate."): v for k, v in weights.items()}
    return checkpoint(f"{tmp}/deepseek", config, weights), config, weights


def test_deepseek(tmp):
    source, config, weights = deepseek(tmp)
    good(source, f"{tmp}/ds.bin")
    good(f"{tmp}/ds.bin", f"{tmp}/ds", "--model_type", "deepseek_v2")
    check(read(f"{tmp}/ds/model.safetensors") == read(f"{source}/model.safetensors"), "comes back")
    check(json.loads(read(f"{tmp}/ds/config.json")) == config, "deepseek_v2's config comes back")
    chain = "inner_iter", "inner_residual", "outer_residual", "use_igate"
    c, found = read_model_bin(f"{tmp}/ds.bin")
    check(same(found, weights) and [c[key] for key in chain] == [1, False, True, False], f"{c}")
    good(f"{tmp}/ds.bin", f"{tmp}/ds-coe")                     # as a CoE: its reference loads it
    check(json.loads(read(f"{tmp}/ds-coe/config.json"))["use_igate"] is False, "one gate")
    good(f"{tmp}/ds-coe", f"{tmp}/ds2.bin")
    check(read(f"{tmp}/ds.bin") == read(f"{tmp}/ds2.bin"), "and back")
    good(f"{GOLDEN}/deepseek-v2", f"{tmp}/own-gate.bin")       # mlp.gate.0 becomes mlp.gate
    good(f"{tmp}/own-gate.bin", f"{tmp}/ds3", "--model_type", "deepseek_v2")
    check(read(f"{tmp}/ds3/model.safetensors") == read(f"{source}/model.safetensors"), "gate.0")
    for name, key in (("coe", "inner_iter"), ("moe", "inner_residual")):
        good(f"{GOLDEN}/{name}", f"{tmp}/{name}.bin")
        bad([f"{tmp}/{name}.bin", f"{tmp}/no", "--model_type", "deepseek_v2"], key, "deepseek_v2")


def test_v3(tmp):
    """A deepseek_v3: what may be missing, what is left out, and what goes out as what."""
    config, weights = golden("v3-routing")
    good(f"{GOLDEN}/v3-routing", f"{tmp}/v3.bin")
    c, found = read_model_bin(f"{tmp}/v3.bin")
    check((c["scoring_func"], c["topk_method"], c["inner_iter"], c["outer_residual"],
           c["use_igate"]) == ("sigmoid", "noaux_tc", 1, True, False), f"{c}")
    missing = {"scoring_func", "topk_method", "aux_loss_alpha", "moe_layer_freq", "rope_interleave"}
    bare = {key: value for key, value in config.items() if key not in missing}
    good(checkpoint(f"{tmp}/bare", bare, weights), f"{tmp}/bare.bin")
    check(read(f"{tmp}/bare.bin") == read(f"{tmp}/v3.bin"), "what is missing is DeepSeek-V3's")
    more = {name.replace("layers.2", "layers.3"): x for name, x in weights.items() if "layers.2" in name}
    more |= {"model.layers.3.eh_proj.weight": np.ones((4, 4), np.float32)}
    line = good(checkpoint(f"{tmp}/mtp", config, weights | more), f"{tmp}/mtp.bin")
    check("leaves out layer 3, of multi-token prediction" in line and
          read(f"{tmp}/mtp.bin") == read(f"{tmp}/v3.bin"), line)
    for change, words in (({"rope_interleave": False}, ["rope_interleave", "true"]),
                          ({"scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
                          ({"topk_method": "greedy"}, ["scoring_func", "softmax"]),
                          ({"n_group": 12, "topk_group": 12}, ["n_group", "half"]),
                          ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 4}, ["topk_group"])):
        bad([checkpoint(f"{tmp}/x", config | change, weights), f"{tmp}/x.bin"], *words)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.5}
    line = good(checkpoint(f"{tmp}/x", config | {"rope_scaling": yarn}, weights), f"{tmp}/x.bin")
    check("warning: of rope_scaling.mscale 0.5 with mscale_all_dim 0" in line, line)
    for dtype in ("bf16", "q8"):        # the bias stays float32
        good(f"{GOLDEN}/v3-routing", f"{tmp}/n.bin", "--dtype", dtype)
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        check(read_model_bin(f"{tmp}/n.bin")[1][bias].tobytes() == weights[bias].tobytes(), dtype)
    bad([f"{tmp}/v3.bin", f"{tmp}/v2", "--model_type", "deepseek_v2"], "scoring_func is sigmoid")
    good(f"{GOLDEN}/deepseek-v2", f"{tmp}/v2.bin")
    bad([f"{tmp}/v2.bin", f"{tmp}/v3", "--model_type", "deepseek_v3"], "scoring_func is softmax")
    good(f"{tmp}/v3.bin", f"{tmp}/up.bin", "--upcycle", "2")
    up, tensors = read_model_bin(f"{tmp}/up.bin")
    check(up["inner_iter"] == 2 and all((tensors[bias.replace("gate.", f"gate.{i}.")] ==
                                         weights[bias]).all() for i in (0, 1)), "upcycled")
    line = good(f"{tmp}/up.bin", f"{tmp}/up")
    check("scoring_func sigmoid is not part of the reference" in line and
          "auto_map" not in json.loads(read(f"{tmp}/up/config.json")), line)
    good(f"{tmp}/up", f"{tmp}/back.bin")
    check(read(f"{tmp}/back.bin") == read(f"{tmp}/up.bin"), "a chain with this router comes back")
    config, weights = golden("prenorm-chain")
    good(checkpoint(f"{tmp}/p", {k: v for k, v in config.items() if k != "inner_residual"}, weights),
         f"{tmp}/p.bin")
    check(not read_model_bin(f"{tmp}/p.bin")[0]["inner_residual"], "missing is false")
    for change in ({"inner_residual": True}, {"outer_residual": True}):
        bad([checkpoint(f"{tmp}/x", config | change, weights), f"{tmp}/x.bin"], "prenorm_chain")
    bad([f"{tmp}/p.bin", f"{tmp}/v2", "--model_type", "deepseek_v2"], "inner_iter is 2")
    good(f"{GOLDEN}/prenorm-one", f"{tmp}/one.bin")
    good(f"{tmp}/one.bin", f"{tmp}/v2", "--model_type", "deepseek_v2")
    good(f"{tmp}/v2", f"{tmp}/back.bin")
    c, found = read_model_bin(f"{tmp}/back.bin")
    check(c["outer_residual"] and not c["prenorm_chain"], "one iteration is a DeepSeek-V2")


def test_newer_names(tmp):
    """rope_parameters, rope_type, dtype and fused experts give the same model.bin."""
    source, config, weights = deepseek(tmp)
    good(source, f"{tmp}/old.bin")
    rope = config.pop("rope_scaling")
    rope["rope_type"], rope["rope_theta"] = rope.pop("type"), config.pop("rope_theta")
    config |= {"rope_parameters": rope, "dtype": config.pop("torch_dtype"), "rope_scaling": None}
    for l in (1, 2):
        p = f"model.layers.{l}.mlp.experts."
        part = lambda name: [weights.pop(f"{p}{e}.{name}_proj.weight") for e in range(8)]
        weights[p + "gate_up_proj"] = np.concatenate([part("gate"), part("up")], axis=1)
        weights[p + "down_proj"] = np.stack(part("down"))
    check(weights["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 32, 32), "fused")
    fused = checkpoint(f"{tmp}/fused", config, weights)
    warning = good(fused, f"{tmp}/new.bin")
    check(read(f"{tmp}/old.bin") == read(f"{tmp}/new.bin") and "warning" not in warning, warning)
    weights["model.layers.1.mlp.experts.gate_up_proj"] = np.ones((8, 31, 32), np.float32)
    checkpoint(fused, config, weights)
    bad([fused, f"{tmp}/x.bin"], "layers.1.mlp.experts.gate_up_proj", "[8, 31, 32]", "[8, 32, 32]")
    config, weights = golden("coe")
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 7}, "foo_bar": 1,
               "n_group": None, "topk_group": None, "num_key_value_heads": 99}
    checkpoint(f"{tmp}/default", config, weights)
    warning = good(f"{tmp}/default", f"{tmp}/default.bin")
    check(warning.count("foo_bar") == 1 and warning.count("warning") == 1, warning)
    check(read_model_bin(f"{tmp}/default.bin")[0]["rope_theta"] == 7, "rope_theta")
    linear = {"rope_type": "linear", "factor": 2}
    for ropes, kind in (({"rope_scaling": linear | {"type": "yarn"}}, "linear"),
                        ({"rope_scaling": {"type": "yarn"} | linear}, "linear"),
                        ({"rope_scaling": linear, "rope_parameters": {"rope_type": "default"}},
                         "linear"),
                        ({"rope_scaling": {}, "rope_parameters": linear}, "linear"),
                        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}},
                         None)):
        config, weights = golden("coe")
        warning = good(checkpoint(f"{tmp}/default", config | ropes, weights), f"{tmp}/default.bin")
        check(read_model_bin(f"{tmp}/default.bin")[0]["rope_scaling.type"] == kind and
              ("warning: rope_scaling" in warning) == (ropes["rope_scaling"] != {}), warning)


def test_init(tmp):
    config, _ = golden("three-iterations")
    config |= {"hidden_size": 256, "n_shared_experts": 1, "initializer_range": 0.05,
               "vocab_size": 999}
    write(f"{tmp}/init.json", config)
    good(f"{tmp}/init.json", f"{tmp}/init.bin", "--init", 42)
    c, found = read_model_bin(f"{tmp}/init.bin")
    sizes, _ = read_header(read(f"{tmp}/init.bin"))
    check([sizes[name] for name in SIZES[2:]] == [0, 0, 0] and c["tokenizer"] == "none"
          and not c["coe_weights"], "no tokenizer, no state")
    for name, x in found.items():
        if name.endswith("norm.weight"):
            check((x == 1).all(), name)
        elif name.endswith("bias"):
            check((x == 0).all(), name)
        elif ".gate." in name:
            bound = 256 ** -0.5
            check(0.99 * bound < abs(x).max() <= bound and abs(x.mean()) < bound / 10, name)
            check(abs(x.std() * math.sqrt(3) / bound - 1) < 0.05, name)
        else:
            few = 5 / x.size ** 0.5                            # five standard errors
            check(abs(x.mean() / 0.05) < few and abs(x.std() / 0.05 - 1) < few, name)
    check(len({x.tobytes() for x in found.values() if x.ndim == 2}) ==
          sum(x.ndim == 2 for x in found.values()), "no two matrices are the same")
    good(f"{tmp}/init.json", f"{tmp}/init2.bin", "--init", 42)
    good(f"{tmp}/init.json", f"{tmp}/init3.bin", "--init", 43)
    check(read(f"{tmp}/init.bin") == read(f"{tmp}/init2.bin") != read(f"{tmp}/init3.bin"), "seeds")
    nulls = {"n_routed_experts": None, "n_shared_experts": 0, "bos_token_id": None}
    write(f"{tmp}/dense.json", config | nulls | {"num_experts_per_tok": None,
                                             "moe_intermediate_size": None})
    good(f"{tmp}/dense.json", f"{tmp}/dense.bin", "--init", 2**64 - 1)
    good(f"{tmp}/dense.bin", f"{tmp}/dense")
    back = json.loads(read(f"{tmp}/dense/config.json"))
    check(all(back[key] is None for key in nulls), "nulls come back")
    good(f"{tmp}/dense", f"{tmp}/dense2.bin")
    check(read(f"{tmp}/dense.bin") == read(f"{tmp}/dense2.bin"), "all layers dense")


def test_defaults(tmp):
    """Defaults that differ from the embedded files: the header's go into a checkpoint."""
    config, weights = golden("coe")
    other = {"max_length": 99, "eos_token_id": 3}
    sources = {"none": {}, "some": {"generation_config": other | {"temperature": 0.5, "top_k": 7}},
               "only": {"generation_config": {"temperature": 0.5}},
               "greedy": {"generation_config": other | {"do_sample": False}},
               "bos": {"tokenizer_config": {"add_bos_token": True, "model_max_length": 5}}}
    cases = [(-1, -1, -1, -1, -1, 0), (0.25, -1, -1, -1, -1, 0), (0, -1, -1, -1, -1, 1),
             (0.5, 7, -1, -1, -1, 0), (-1, 9, 0.5, 0.25, 1.5, 1), (0, 3, 0.75, -1, -1, 0),
             (-1, -1, 0, 0, -1, 0)]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "add_bos_token")
    for kind, files in sources.items():
        source = checkpoint(f"{tmp}/{kind}", config, weights, **files)
        good(source, f"{tmp}/{kind}.bin")
        for t, k, p, m, r, bos in cases:
            values = dict(zip(names, (t, k, p, m, r, "true" if bos else "false")))
            write(f"{tmp}/x.bin", changed(read(f"{tmp}/{kind}.bin"), **values))
            shutil.rmtree(f"{tmp}/hf", ignore_errors=True)
            good(f"{tmp}/x.bin", f"{tmp}/hf")
            good(f"{tmp}/hf", f"{tmp}/y.bin")
            back, _ = read_model_bin(f"{tmp}/y.bin")
            check([back[name] for name in names[:-1]] == [t, k, p, m, r],
                  f"{kind} {t, k, p, m, r, bos} come back")
            found = {name: json.loads(read(f"{tmp}/hf/{name}")) for name in os.listdir(f"{tmp}/hf")
                     if name in ("generation_config.json", "tokenizer_config.json")}
            generation = found.get("generation_config.json")
            if "generation_config" in files:
                check(kind == "only" or {k: generation[k] for k in other} == other,
                      f"{kind}: what else was there")
            elif (t, k, p, m, r) == (-1,) * 5:
                check(generation is None, "no defaults, no file")
            else:
                check(generation["bos_token_id"] == 0 and generation["eos_token_id"] == 1, "ids")
            if generation and (t, k, p, m, r) != (-1,) * 5 and (kind != "some" or k != 7):
                check(generation.get("do_sample", False) is (t != 0), f"{kind} {t}: do_sample")
            check(not generation or generation.get("temperature") != 0, "0 is not for transformers")
            if kind == "bos":
                check(found["tokenizer_config.json"] == {"add_bos_token": True,
                                                         "model_max_length": 5}, "no tokenizer")
        good(f"{tmp}/{kind}.bin", f"{tmp}/hf2-{kind}")
        for name in files:
            check(read(f"{source}/{name}.json") == read(f"{tmp}/hf2-{kind}/{name}.json"),
                  f"{kind}: {name} verbatim where nothing changed")


def test_linear(tmp):
    """Linear scaling keeps the temperature on the scores, where there is one."""
    config, weights = golden("coe")
    for rope in ({"type": "linear", "factor": 4.0},
                 {"type": "linear", "factor": 4.0, "mscale_all_dim": 0.5}):
        good(checkpoint(f"{tmp}/l", config | {"rope_scaling": rope}, weights), f"{tmp}/l.bin")
        good(f"{tmp}/l.bin", f"{tmp}/l2")
        check(json.loads(read(f"{tmp}/l2/config.json"))["rope_scaling"] == rope, rope)


def with_state(path, out):
    """A training checkpoint: the same file with Adam's state behind the weights."""
    data = read(path)
    sizes = list(struct.unpack_from("<5Q", data, 16))
    sizes[4] = 1024 + 2 * (len(data) - 64 - sum(sizes[1:]))
    sizes[0] += sizes[4]
    data = data[:16] + struct.pack("<5Q", *sizes) + data[56:] + b"\7" * sizes[4]
    write(out, sealed(data))


def test_bin_to_bin(tmp):
    config, weights = golden("upcycled")
    checkpoint(f"{tmp}/b", config, weights, generation_config={"top_k": 3})
    good(f"{tmp}/b", f"{tmp}/b.bin")
    good(f"{tmp}/b", f"{tmp}/b16.bin", "--dtype", "bf16")
    with_state(f"{tmp}/b.bin", f"{tmp}/trained.bin")
    read_model_bin(f"{tmp}/trained.bin")
    for args, target in (([f"{tmp}/trained.bin", f"{tmp}/1.bin"], "b.bin"),
                         ([f"{tmp}/trained.bin", f"{tmp}/2.bin", "--dtype", "bf16"], "b16.bin"),
                         ([f"{tmp}/b16.bin", f"{tmp}/3.bin"], "b16.bin")):
        good(*args)
        check(read(args[1]) == read(f"{tmp}/{target}"), f"{args}")
    good(f"{tmp}/b16.bin", f"{tmp}/4.bin", "--dtype", "f32")
    c, found = read_model_bin(f"{tmp}/4.bin")
    check(c["weight_type"] == "f32" and same(found, {
        k: v.astype(ml_dtypes.bfloat16).astype("f4") if v.ndim == 2 and ".gate." not in k else v
        for k, v in weights.items()}), "bf16 -> f32")
    os.symlink(f"{tmp}/4.bin", f"{tmp}/link.bin")
    good(f"{tmp}/b.bin", f"{tmp}/link.bin")
    check(os.path.islink(f"{tmp}/link.bin"), "a link stays one")
    check(read(f"{tmp}/4.bin") == read(f"{tmp}/b.bin"), "and is written through")


def test_stale(tmp):
    """Into a folder that holds another checkpoint: nothing of that is left, foreign files stay."""
    good(f"{GOLDEN}/moe", f"{tmp}/m.bin")
    good(f"{tmp}/m.bin", f"{tmp}/fresh")
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json", "merges.txt",
             "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "tokenizer.model", "chat_template.jinja", "generation_config.json"]
    foreign = ["README.md", "modeling_coe.py", "configuration_coe.py", "eval.json", "my_model.bin",
               "notes.txt"]
    os.mkdir(f"{tmp}/old")
    for name in (*stale, *foreign, "config.json", "model.safetensors"):
        write(f"{tmp}/old/{name}", b"old")
    code, err = run(f"{tmp}/m.bin", f"{tmp}/old")
    check(code == 0 and all(name in err for name in stale), err)
    check(sorted(os.listdir(f"{tmp}/old")) == sorted([*foreign, *os.listdir(f"{tmp}/fresh")]),
          os.listdir(f"{tmp}/old"))
    for name in os.listdir(f"{tmp}/fresh"):
        check(read(f"{tmp}/old/{name}") == read(f"{tmp}/fresh/{name}"), f"{name} is the new one")
    check(all(read(f"{tmp}/old/{name}") == b"old" for name in foreign), "foreign files")
    good(f"{tmp}/old", f"{tmp}/back.bin")
    check(read(f"{tmp}/back.bin") == read(f"{tmp}/m.bin"), "it comes back")


def test_upcycle(tmp):
    source, config, weights = deepseek(tmp)
    good(source, f"{tmp}/ds.bin")
    good(source, f"{tmp}/up.bin", "--upcycle", 3)
    c, found = read_model_bin(f"{tmp}/up.bin")
    check([c[key] for key in ("coe_weights", "inner_iter", "inner_residual", "outer_residual",
                              "use_igate")] == [True, 3, True, True, True], f"{c}")
    for p in ("model.layers.1.mlp.", "model.layers.2.mlp."):
        gate = weights.pop(p + "gate.weight")
        weights |= {f"{p}gate.{t}.weight": gate for t in range(3)}
        weights |= {f"{p}coe_weights.{t}": np.zeros(32, np.float32) for t in range(2)}
    check(same(found, weights), "gates are copies, coe_weights 0, all else as it was")
    good(f"{tmp}/ds.bin", f"{tmp}/up2.bin", "--upcycle", 3)
    good(f"{GOLDEN}/deepseek-v2", f"{tmp}/up3.bin", "--upcycle", 3)       # with mlp.gate.0
    check(read(f"{tmp}/up.bin") == read(f"{tmp}/up2.bin") == read(f"{tmp}/up3.bin"), "3 sources")
    good(f"{tmp}/ds.bin", f"{tmp}/up", "--upcycle", 2)
    back = json.loads(read(f"{tmp}/up/config.json"))
    check(back["inner_iter"] == 2 and back["inner_residual"] and back["use_igate"], "config")
    for name, key in (("coe", "inner_iter"), ("moe", "inner_residual"), ("upcycled", "inner_iter")):
        bad([f"{GOLDEN}/{name}", f"{tmp}/x.bin", "--upcycle", "2"], key, "--upcycle")
    write(f"{tmp}/dense.json", config | {"n_routed_experts": None})
    bad([f"{tmp}/dense.json", f"{tmp}/x.bin", "--init", "1", "--upcycle", "2"], "no layer with")
    for c in ("1", "0", "-1", "x", "99999999"):
        bad([source, f"{tmp}/x.bin", f"--upcycle={c}"], "--upcycle", "2..", code=2)


def test_programs(tmp):
    """./run computes with each type what it does with the same numbers in float32. A model of
    ./train can be upcycled, computes the same then, bit by bit, and ./train goes on with it."""
    ids = "257 72 101 108 108 111 10 0 255 7"

    def program(name, *args):
        done = subprocess.run([os.path.join(os.path.dirname(HERE), name), *args],
                              capture_output=True, text=True)
        check(done.returncode == 0, f"{name} {args}: {done.returncode} {done.stderr}")
        return done.stdout

    def logits(model):
        program("run", model, "-m", "eval", "--ids", "-i", ids, "--logits", f"{tmp}/logits")
        return np.fromfile(f"{tmp}/logits", "<f4")

    def train(out, *args):
        program("train", "-d", text, "-b", "2", "-l", "32", "-x", "2", "-s", "3",
                "-o", f"{tmp}/{out}", *args)
    text = write(f"{tmp}/text", program("train", "--show_data", "20"))
    train("m.bin", "--hidden_size", "72", "--num_hidden_layers", "2", "--inner_iter", "1",
          "--first_k_dense_replace", "1", "--inner_residual", "false", "--outer_residual", "true")
    good(f"{tmp}/m.bin", f"{tmp}/up.bin", "--upcycle", 2)
    train("up2.bin", "--init", f"{tmp}/up.bin", "--learning_rate", "0.01", "--warmup_steps", "0")
    before, after = read_model_bin(f"{tmp}/up.bin")[1], read_model_bin(f"{tmp}/up2.bin")[1]
    for part in ("mlp.coe_weights.0", "mlp.gate.0.weight", "mlp.gate.1.weight"):
        name = "model.layers.1." + part
        check((before[name] != after[name]).any(), f"{name} is trained")
    check((after["model.layers.1.mlp.gate.0.weight"] != after["model.layers.1.mlp.gate.1.weight"])
          .any(), "the gates part")
    for model in ("m", "up", "up2"):
        for dtype in ("f32", "bf16", "q8"):
            good(f"{tmp}/{model}.bin", f"{tmp}/{model}-{dtype}.bin", "--dtype", dtype)
            good(f"{tmp}/{model}-{dtype}.bin", f"{tmp}/wide.bin", "--dtype", "f32")
            narrow, wide = logits(f"{tmp}/{model}-{dtype}.bin"), logits(f"{tmp}/wide.bin")
            check(len(wide) == 10 * 258 and abs(narrow - wide).max() < 1e-5 * abs(wide).max(),
                  f"{model} in {dtype} and the same in float32: {abs(narrow - wide).max()}")
    for dtype in ("f32", "bf16", "q8"):
        good(f"{tmp}/m-{dtype}.bin", f"{tmp}/x.bin", "--upcycle", 3)
        check((logits(f"{tmp}/x.bin") == logits(f"{tmp}/m-{dtype}.bin")).all(), f"{dtype} upcycled")
    exact = logits(f"{tmp}/up2.bin")
    off = {t: abs(logits(f"{tmp}/up2-{t}.bin") - exact).max() / abs(exact).max()
           for t in ("bf16", "q8")}
    print("logits are off by", ", ".join(f"{v:.1e} of the largest in {k}" for k, v in off.items()))
    check(0 < off["bf16"] < 0.05 and 0 < off["q8"] < 0.05, f"{off}")


def test_keys_of_both_languages(tmp):
    """export.CONFIG and the table in lib/config.h, as ./train --help shows it: the same keys in the
    same order, of the same kind and range."""
    done = subprocess.run([os.path.join(os.path.dirname(HERE), "train"), "--help"],
                          capture_output=True, text=True)
    lines = done.stdout.split("(keys of config.json):")[1].strip().splitlines()
    rows = [re.match(r" *--(\S+) [^[]*(?:.*\[(.*); .*\])?$", line).groups() for line in lines]
    check([name for name, _ in rows] == [key.name for key in export.CONFIG],
          f"only one has {set(dict(rows)) ^ {key.name for key in export.CONFIG}}")
    for key, (name, allowed) in zip(export.CONFIG, rows):
        if isinstance(key.kind, tuple):
            words = "|".join("null" if word is None else word for word in key.kind)
            check(allowed == words, f"{name}: {allowed}, here {words}")
        elif key.kind == export.BOOL:
            check(allowed == "true or false", f"{name}: {allowed}")
        elif key.kind == export.TEXT:
            check(allowed is None, f"{name}: {allowed}")
        else:
            least, most, of_ids, null = re.fullmatch(
                r"(.*?)\.\.(\d\S*?)(, a list of up to 8 of them)?( or null)?", allowed).groups()
            check(bool(of_ids) == (key.kind == export.IDS), f"{name}: {allowed}")
            none = key.default if isinstance(key.default, (int, float)) else key.least
            check(float(least) == min(key.least, none) and float(most) == key.most
                  and bool(null) == bool(key.null), f"{name}: {allowed}, here {key}")


def test_tokenizer(tmp):
    """The byte tokenizer goes to Hugging Face and back. For others there is test_tokenizer.py."""
    config, _ = golden("coe")
    byte_ids = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
    write(f"{tmp}/bytes.json", config | byte_ids)
    good(f"{tmp}/bytes.json", f"{tmp}/bytes.bin", "--init", 7)
    write(f"{tmp}/bytes.bin", changed(read(f"{tmp}/bytes.bin"), tokenizer="bytes",
                                      add_bos_token="true"))   # as train would have written it
    good(f"{tmp}/bytes.bin", f"{tmp}/bytes")
    t = json.loads(read(f"{tmp}/bytes/tokenizer.json"))
    settings = json.loads(read(f"{tmp}/bytes/tokenizer_config.json"))
    check(t["model"]["type"] == "BPE" and t["model"]["merges"] == [], "BPE without merges")
    check(sorted(t["model"]["vocab"].values()) == list(range(256)), "ids 0..255")
    table = {"A": 65, "~": 126, "Ā": 0, "Ġ": 32, "Ċ": 10, "ġ": 127, "¡": 161, "Ń": 173, "ÿ": 255}
    check(all(t["model"]["vocab"][k] == v for k, v in table.items()), "GPT-2's table of characters")
    check([(a["id"], a["content"], a["special"]) for a in t["added_tokens"]] ==
          [(256, "<|beginoftext|>", True), (257, "<|endoftext|>", True)], "added tokens")
    check(t["pre_tokenizer"]["type"] == t["decoder"]["type"] == "ByteLevel"
          and not t["pre_tokenizer"]["add_prefix_space"] and t["normalizer"] is None, "ByteLevel")
    check(settings["add_bos_token"] and settings["bos_token"] == "<|beginoftext|>"
          and settings["eos_token"] == "<|endoftext|>", "tokenizer_config.json")

    write(f"{tmp}/bytes/tokenizer.json", json.dumps(t))        # other white space, the same thing
    good(f"{tmp}/bytes", f"{tmp}/bytes2.bin")
    c, _ = read_model_bin(f"{tmp}/bytes2.bin")
    sizes, _ = read_header(read(f"{tmp}/bytes2.bin"))
    check(c["tokenizer"] == "bytes" and c["add_bos_token"], "bytes again")
    check(sizes["files_bytes"] > 0 == sizes["files_bytes"] % 64, "and the files")
    good(f"{tmp}/bytes2.bin", f"{tmp}/bytes3.bin", "--dtype", "bf16")
    good(f"{tmp}/bytes3.bin", f"{tmp}/bytes3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        check(read(f"{tmp}/bytes/{name}") == read(f"{tmp}/bytes3/{name}"), f"{name} verbatim")
    write(f"{tmp}/bytes/tokenizer_config.json", {"add_bos_token": False})
    note = good(f"{tmp}/bytes", f"{tmp}/bytes2.bin")
    check(read_model_bin(f"{tmp}/bytes2.bin")[0]["add_bos_token"] and "add_bos_token false does not "
          "count" in note, "the post_processor counts, not add_bos_token")
    write(f"{tmp}/bytes/tokenizer.json", t | {"post_processor": None})
    write(f"{tmp}/bytes/tokenizer_config.json", {})
    check(len(good(f"{tmp}/bytes", f"{tmp}/bytes2.bin").splitlines()) == 1
          and not read_model_bin(f"{tmp}/bytes2.bin")[0]["add_bos_token"], "no BOS without one")

    x = [f"{tmp}/bytes", f"{tmp}/x.bin"]
    path = f"{tmp}/bytes/tokenizer.json"
    write(path, t | {"added_tokens": t["added_tokens"][::-1]})
    bad(x, "tokenizer.json", '"<|endoftext|>" is 257, must be 256')
    write(path, t)
    good(*x)
    _, weights = golden("coe")
    few = checkpoint(f"{tmp}/few", config, weights, tokenizer=t)
    bad([few, f"{tmp}/x2.bin"], "vocab_size is 64", "258")


def test_config_faults(tmp):
    base, weights = golden("deepseek-v2")
    yarn = base["rope_scaling"]
    INT_MAX, NAN = 2**31 - 1, "@NaN"
    cases = {
        "model_type": ("llama", None, 3), "scoring_func": ("sigmoid",), "hidden_act": ("gelu", 1),
        "mlp_bias": (True,), "quantization_config": ({"quant_method": "fp8"},),
        "attention_dropout": (NAN,), "topk_method": ("noaux_tc", "gready", 3, []),
        "hidden_size": (0, -5, INT_MAX, 2**63, 10**400, 32.0, "32", None, True, [32], NAN,
                        "@1e999"),
        "vocab_size": (0, -1, 2**31), "num_hidden_layers": (0, -1, 2**32, "@missing"),
        "num_attention_heads": (0, -1), "max_position_embeddings": (0, -1, 2**40),
        "intermediate_size": (0, "@missing"), "moe_intermediate_size": (0, -1, None),
        "n_shared_experts": (-1, "2", 1.5), "n_routed_experts": (0, -1),
        "num_experts_per_tok": (0, 9, -1, None), "kv_lora_rank": (0, None, "@missing"),
        "q_lora_rank": (0, -3), "qk_nope_head_dim": (0,), "qk_rope_head_dim": (0, 7, -2),
        "v_head_dim": (0,), "inner_iter": (0, -1, 2**31, "@missing"),
        "outer_residual": (1, None, "x"),
        "use_igate": (0, "@missing"), "n_group": (0, 3, 9, None, "@missing"),
        "topk_group": (0, 5, 1, None), "norm_topk_prob": (0,),
        "routed_scaling_factor": ("1", NAN),
        "first_k_dense_replace": (-1,), "moe_layer_freq": (0, -1), "aux_loss_alpha": (-0.1, NAN),
        "rms_norm_eps": (0, -1e-6, NAN, "1e-6"), "rope_theta": (0, -1, NAN, "@Infinity", 1),
        "initializer_range": (-1,), "bos_token_id": (-1, 64, [1]),
        "eos_token_id": (64, "a", -1, [1, 64], [1, "a"], [1, [2]], [True], [1, None], list(range(9))),
        "tie_word_embeddings": (1,), "attention_bias": ("no",), "torch_dtype": ("int8", 3),
        "rope_scaling": (3, "yarn", [1])}
    faults = [(key, base | {key: value}) for key, values in cases.items() for value in values]
    cases = {"type": ("dynamic", "longrope", "llama3", 3), "mscale": (NAN,),
             "factor": (0, -1, None, "4", NAN, "@missing"), "beta_fast": (0.5, 0),
             "original_max_position_embeddings": (0, -1, 1.5), "beta_slow": (-1, 33),
             "truncate": (False,), "attention_factor": (1.1,)}
    faults += [("rope_scaling." + key, base | {"rope_scaling": yarn | {key: value}})
               for key, values in cases.items() for value in values]
    checkpoint(f"{tmp}/c", base, weights)

    def without_missing(value):
        if not isinstance(value, dict):
            return value
        return {k: without_missing(v) for k, v in value.items() if v != "@missing"}
    for key, config in faults:
        text = json.dumps(without_missing(config))
        for name in ("NaN", "Infinity", "1e999"):              # what json.dumps would not write
            text = text.replace(f'"@{name}"', name)
        word = key.replace("beta_slow", "beta")                # the pair is named by beta_fast
        word = "is not JSON" if "NaN" in text or "Infinity" in text else word
        write(f"{tmp}/c/config.json", text)
        bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", word)
    for text in ("", "{", "[]", "null", "3", '{"a": 1,}', '{"a": 1, "a": 2}', "[" * 100000,
                 b"\xff\xfe", b"\0" * 99, "<html>", '{"a": ' + "9" * 9999 + "}"):
        write(f"{tmp}/c/config.json", text)
        bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "JSON")
        bad([f"{tmp}/c/config.json", f"{tmp}/c.bin", "--init", "1"], "c/config.json", "JSON")
    write(f"{tmp}/c/config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "git-LFS pointer", "git lfs pull")
    os.remove(f"{tmp}/c/config.json")
    bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "No such file")
    os.mkdir(f"{tmp}/c/config.json")
    bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "is a folder")
    for name, value in (("temperature", -1), ("top_k", 1.5), ("top_p", 1.1), ("min_p", "a"),
                        ("repetition_penalty", 0)):
        checkpoint(f"{tmp}/g", base, weights, generation_config={name: value, "do_sample": True})
        bad([f"{tmp}/g", f"{tmp}/g.bin"], "generation_config.json", name)
    for ids in (64, -1, [1, 64], "a", list(range(9))):
        checkpoint(f"{tmp}/g", base, weights, generation_config={"eos_token_id": ids})
        bad([f"{tmp}/g", f"{tmp}/g.bin"], "g", "generation_config.eos_token_id")


def test_tensor_faults(tmp):
    config, weights = golden("upcycled")
    args = [f"{tmp}/t", f"{tmp}/t.bin"]
    layer = "model.layers.1."

    def case(change, *words, **more):
        w = dict(weights)
        change(w)
        checkpoint(f"{tmp}/t", config | more, w)
        bad(args, *words)
    for name in weights:
        shape = list(weights[name].shape)
        case(lambda w: w.pop(name), name, shape, "is missing")
        case(lambda w: w.update({name: np.ones((3, *shape), np.float32)}), name, [3, *shape], shape)
    ones = np.ones((32, 32), np.float32)
    case(lambda w: w.update({"model.extra": ones}), "model.extra", "unknown")
    case(lambda w: w.update({layer + "mlp.gate.3.weight": ones}), "mlp.gate.3.weight", "unknown")
    case(lambda w: w.update({layer + "mlp.coe_weights.2": ones[0]}), "mlp.coe_weights.2", "unknown")
    case(lambda w: w.update({layer + "self_attn.o_proj.bias": ones[0]}), "o_proj.bias", "unknown")
    case(lambda w: w.update({layer + "mlp.gate.e_score_correction_bias": ones}),
         "e_score_correction_bias", "noaux_tc")
    case(lambda w: w.update({layer + "mlp.gate_proj.weight_scale_inv": ones}),
         "weight_scale_inv", "fp8")
    case(lambda w: None, "lm_head.weight is not model.embed_tokens.weight", "tie_word_embeddings",
         tie_word_embeddings=True)
    case(lambda w: w.update({"lm_head.bias": ones[0]}), "lm_head.bias", "a bias of lm_head")
    case(lambda w: w.pop("lm_head.weight"), "lm_head.weight", "missing")
    case(lambda w: None, "mlp.gate.weight", "missing", use_igate=False)
    case(lambda w: None, "inner_iter", "coe_weights", inner_iter=1)
    case(lambda w: w.update({"model.norm.weight": np.ones(32)}), "model.norm.weight", "F64")
    case(lambda w: w.update({"model.norm.weight": np.ones(32, np.int8)}), "model.norm.weight", "I8")
    case(lambda w: w.update({"model.norm.weight": np.ones(32, ml_dtypes.float8_e4m3fn)}), "F8_E4M3")
    os.remove(f"{tmp}/t/model.safetensors")
    bad(args, "neither model.safetensors nor")
    os.mkfifo(f"{tmp}/t/model.safetensors")
    bad(args, "model.safetensors", "is no file")


def test_safetensors_faults(tmp):
    config, weights = golden("coe")
    args = [checkpoint(f"{tmp}/s", config, weights), f"{tmp}/s.bin"]
    path = f"{tmp}/s/model.safetensors"
    data = read(path)
    n = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + n])
    norm = header["model.norm.weight"]
    begin, end = norm["data_offsets"]

    def case(header, body=data[8 + n:]):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        write(path, struct.pack("<Q", len(text)) + text + body)
        bad(args, "model.safetensors")
    for length in (0, 1, n - 1, n + 1, len(data), 101 << 20, 2**63, 2**64 - 1):
        write(path, struct.pack("<Q", length) + data[8:])
        bad(args, "model.safetensors")
    for cut in (0, 1, 7, 8, 100, 8 + n, len(data) - 1):
        write(path, data[:cut])
        bad(args, "model.safetensors")
    write(path, data + b"\0")
    bad(args, "model.safetensors")
    write(path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    bad(args, "model.safetensors")
    for offsets in ([begin + 4, end + 4], [begin - 4, end - 4], [begin, end + 4], [end, begin],
                    [-1, 127], [begin, 2**63], [0, 128]):
        case(header | {"model.norm.weight": norm | {"data_offsets": offsets}})
    for change in ({"dtype": "F99"}, {"dtype": 3}, {"shape": [33]}, {"shape": [2**62, 2**62]},
                   {"shape": [-32]}, {"shape": "x"}):
        case(header | {"model.norm.weight": norm | change})
    case(json.dumps(header).encode().replace(b"model.norm.weight", b"model.norm.weight\xff"))
    twice = json.dumps({"model.norm.weight": norm})[:-1] + "," + json.dumps(header)[1:]
    case(twice.encode())
    check("model.norm.weight is there twice" in run(*args)[1], "a name that is there twice")
    case(b"[]"), case(b"{}"), case(b"null"), case(b"")

    os.remove(path)
    index = shards(f"{tmp}/s", config, weights)
    good(*args)
    os.remove(args[1])
    index_path, shard = path + ".index.json", "model-00002-of-00003.safetensors"
    norm = "model.norm.weight"
    for change, word in (({norm: "model-00001-of-00003.safetensors"}, norm),
                         ({"model.foo": shard}, "model.foo"), ({norm: "../x"}, "../x"),
                         ({norm: "nope.safetensors"}, "nope.safetensors"), ({norm: 3}, norm)):
        check((index | change) != index, "a change")
        write(index_path, {"weight_map": index | change})
        bad(args, word)
    for text in ("{}", "x", '{"weight_map": []}', '{"weight_map": {}}'):
        write(index_path, text)
        bad(args, "model.safetensors.index.json")
    write(index_path, {"weight_map": index})
    os.remove(f"{tmp}/s/{shard}")
    bad(args, shard, "the index names it")


def test_model_bin_faults(tmp):
    checkpoint(f"{tmp}/m", *golden("three-iterations"), generation_config={"top_k": 3})
    good(f"{tmp}/m", f"{tmp}/m.bin")
    data, x, args = read(f"{tmp}/m.bin"), f"{tmp}/x.bin", [f"{tmp}/x.bin", f"{tmp}/y.bin"]
    sizes, lines = read_header(data)
    start = 64 + sizes["config_bytes"]

    def case(data, *words):
        write(x, data)
        bad(args, "x.bin", *words)
    for file in (data, version_1(data)):
        for cut in [*range(0, start + 1, 64), 1, 7, 12, 63, 65, 1023, 1025, 1088, 2000,
                    len(file) - 64, len(file) - 1]:
            case(file[:cut], *([cut] if cut >= 4 else []))
        case(file + b"\0", len(file), len(file) + 1)
        for text in (b"1EOC" + file[4:], file[4:], b"<html>", b"GGUF", b'{"model_type": "x"}'):
            case(text, "COE1")
        for version in (0, 3, 2**32 - 1):
            case(file[:4] + struct.pack("<I", version) + file[8:], f"version is {version}, this "
                 "program reads versions 1 and 2")
        at = len(file) - len(data) + start                     # where the embedded file is
        for name in (b"../../evil", b"config.json", b"/etc/x", b"\xff", b""):
            new = file[:at] + name.ljust(56, b"\0") + file[at + 56:]
            case(sealed(new) if file is data else new, "embedded file")
        new = file[:at + 56] + struct.pack("<Q", 2**63) + file[at + 64:]
        case(sealed(new) if file is data else new, "generation_config.json", 2**63)


def test_header_faults(tmp):
    """Every size and every reserved field of version 2, with every awkward value."""
    checkpoint(f"{tmp}/m", *golden("three-iterations"), generation_config={"top_k": 3})
    good(f"{tmp}/m", f"{tmp}/m.bin")
    data, args = read(f"{tmp}/m.bin"), [f"{tmp}/x.bin", f"{tmp}/y.bin"]
    fields = [(12, "<I", "0"), *((16 + 8 * i, "<Q", name) for i, name in enumerate(SIZES)),
              (56, "<Q", "0")]
    for at, form, name in fields:
        old, = struct.unpack_from(form, data, at)
        for value in (0, 1, 63, 64, 2**31 - 1, 2**31, 2**32 - 64, 2**32, 2**63 - 1, 2**63,
                      2**64 - 64, 2**64 - 1, old - 64, old - 1, old + 1, old + 64, len(data)):
            if value != old and 0 <= value < 256 ** struct.calcsize(form):
                new = bytearray(data)
                struct.pack_into(form, new, at, value)
                write(args[0], sealed(bytes(new)))
                if name in ("file_bytes", "0"):
                    bad(args, "x.bin", value)
                elif value % 64 or value > len(data):
                    bad(args, "x.bin", name, value, "a multiple of 64 up to")
                else:                                          # then what follows is not right
                    bad(args, "x.bin")

    # One bit that is another one, anywhere. In most places only the checksum can tell.
    start = 64 + read_header(data)[0]["config_bytes"]
    for bit in (*range(8 * 64), *range(8 * 64, 8 * start, 37),
                *range(8 * start, 8 * len(data), 997)):
        new = bytearray(data)
        new[bit // 8] ^= 1 << bit % 8
        write(args[0], bytes(new))
        bad(args, "x.bin", *(["checksum", "damaged"] if bit >= 8 * start else []))
    write(args[0], data[:8] + b"\x12\x34\x56\x78" + data[12:])
    bad(args, f"its checksum is {zlib.crc32(data[12:]):08x}, its header says 78563412: damaged")
    for at in (0, len(data) - 1):                              # nothing is wrong with a right one
        good(f"{tmp}/m.bin", args[0])
        check(read(args[0]) == data, "the same file again")


def test_line_faults(tmp):
    """Every line of the config, in every way in which it can be wrong."""
    config, weights = golden("deepseek-v2")
    checkpoint(f"{tmp}/m", config, weights, generation_config={"top_k": 3})
    good(f"{tmp}/m", f"{tmp}/m.bin")
    data, args = read(f"{tmp}/m.bin"), [f"{tmp}/x.bin", f"{tmp}/y.bin"]
    _, lines = read_header(data)
    text, ended = "".join(f"{k} {v}\n" for k, v in lines.items()), {0: 0, 1: 0}

    def case(config, *words, **pad):
        config = config if isinstance(config, bytes) else config.encode()
        write(args[0], with_config(data, config, **pad))
        bad(args, "x.bin", *words)
    for name, old in lines.items():
        line = f"{name} {old}\n"
        for value in ("", " ", "x", "nan", "inf", "-inf", "1e999", "0x10", "1_0", "+1", "٣", "[1]",
                      "{}", '"x"', "True", "None", f" {old}", f"{old} ", f"{old}\r", f"{old}\t",
                      f"{old}\0", f"{old},", "9" * 99, "-" + "9" * 99, "1" * 5000):
            text_key = export.KEYS[name].kind == export.TEXT
            if not (text_key and value == '"x"' or "eos" in name and value == "[1]"):
                case(text.replace(line, f"{name} {value}\n"), f"{name} is ")
        for value in ("0", "1", "-1", "2", "3", "1.5", "-0.1", "0.1", "1e-99", "1e300", "true",
                      "false", "null", "f32", "q8", "bytes", "bpe", "greedy", "yarn", "linear",
                      "2147483647", "-2147483648", "4294967296", "9223372036854775807"):
            if value != old:
                write(args[0], with_lines(data, lines | {name: value}))
                code, err = run(args[0], f"{tmp}/fuzz.bin")
                ended[code] += 1
                check(code == 0 or len(err.splitlines()) == 1 and "x.bin: " in err,
                      f"{name} {value}: {err}")
        if name in export.VERSION_1:
            case(text.replace(line, ""), f"{name} is missing")
        case(text + line, f"{name}, which is there twice")
        case(text.replace(line, line * 2), f"{name}, which is there twice")
        case(text.replace(line, f"{name}\n"), f"'{name}', must be a key, a blank and a value")
        case(text.replace(line, f"{name}\t{old}\n"), "must be a key, a blank and a value")
        case(text.replace(line, f"{name}s {old}\n"), f"the key '{name}s', which")
        case(text.replace(line, f" {line}"), "the key '', which")
        case(text.replace(line, f"{name[:-1]}\xff {old}\n"), f"the key '{name[:-1]}\xff', which")
        case(text.replace(line, f"\n{line}"), "must be a key, a blank and a value")
    check(ended[0] > 100 < ended[1], f"{ended}")
    for at in (0, 20, len(text) - 2):
        case(text[:at].encode() + b"\xff" + text[at + 1:].encode(), f"byte {64 + at}", "0xff",
             "UTF-8")
        case(text[:at].encode() + b"\0" + text[at + 1:].encode())
    case(text + "foo_bar 1\n", "the key 'foo_bar', which this program does not know")
    case(text + "foo\33[31m\u2028bar 1\n", "does not know")
    case("", "config", "newline")
    case(text[:-1], "config", "newline")
    case(text, "newline", pad=bytes(-len(text) % 64) + bytes(64))
    case(text, "newline", pad=b"\0" * (-len(text) % 64 - 1) + b"x")
    case(text + "\n" * 2**20, "config_bytes", 2**20)
    shuffled = list(lines.items())                             # the order of the lines is free
    write(args[0], with_lines(data, dict(shuffled[::-1])))
    good(args[0], f"{tmp}/fuzz.bin")
    check(read(f"{tmp}/fuzz.bin") == data, "another order of lines")
    lines["topk_method"] = "greedy"
    for name, texts, value in (("rope_theta", ("10000.000", "1e4", "1e+04", "10000"), 1e4),
                               ("min_p", ("-1", "-1.0"), -1.0), ("hidden_size", ("032",), 32),
                               ("n_group", ("null", "1"), 1), ("q_lora_rank", ("null", "0"), 0),
                               ("n_shared_experts", ("null", "0"), 0),
                               ("bos_token_id", ("null", "-1"), -1)):
        for text in texts:
            write(args[0], with_lines(data, lines | {name: text}))
            with open(args[0], "rb") as f:
                found = export.read_header(f, args[0]).config[name]
            check(found == value and type(found) is type(value), f"{name} {text}: {found}")


def test_slot_faults(tmp):
    """Every slot of version 1, with every awkward value."""
    checkpoint(f"{tmp}/m", *golden("three-iterations"), generation_config={"top_k": 3})
    good(f"{tmp}/m", f"{tmp}/m.bin")
    data, x = version_1(read(f"{tmp}/m.bin")), f"{tmp}/x.bin"
    slots, ended = struct.unpack("<128q", data[:1024]), {0: 0, 1: 0}
    doubles = struct.unpack("<4q", struct.pack("<4d", math.nan, math.inf, -1.0, 1e300))
    for i in range(1, 128):
        old = slots[i]
        for value in (0, 1, -1, 2, 2**31 - 1, -2**31, 2**31, 2**32, 2**63 - 1, -2**63, old - 1,
                      old + 1, old + 64, *doubles):
            if value == old or not -2**63 <= value < 2**63:
                continue
            write(x, data[:8 * i] + struct.pack("<q", value) + data[8 * i + 8:])
            code, err = run(x, f"{tmp}/fuzz.bin")
            ended[code] += 1
            check(code == 0 or len(err.splitlines()) == 1 and "x.bin: " in err, f"slot {i}: {err}")
            if 1 <= i <= 15 or 66 <= i:
                check(code == 1, f"slot {i} = {value} was taken")
    check(ended[0] < ended[1], f"{ended}")


def test_command_line(tmp):
    good(f"{GOLDEN}/moe", f"{tmp}/same.bin")
    os.symlink("same.bin", f"{tmp}/same-link.bin")
    before = read(f"{tmp}/same.bin")
    for args in ([f"{tmp}/same.bin", f"{tmp}/same.bin"], [f"{tmp}/same-link.bin", f"{tmp}/same.bin"],
                 [f"{tmp}/same.bin", f"{tmp}/same-link.bin"], [f"{tmp}/same.bin", f"{tmp}/./same.bin"]):
        bad([*args, "--dtype", "q8"], "file of its own", code=2)
    check(read(f"{tmp}/same.bin") == before, "an output that is the input is refused")
    os.mkdir(f"{tmp}/.export-1")                        # what a killed run has left
    write(f"{tmp}/.export-1/lock", b"")
    os.chmod(f"{tmp}/same.bin", 0o640)
    good(f"{GOLDEN}/moe", f"{tmp}/same.bin")
    check(not os.path.exists(f"{tmp}/.export-1"), "leftovers are removed")
    check(os.stat(f"{tmp}/same.bin").st_mode & 0o777 == 0o640, "a file's mode stays")
    good(f"{GOLDEN}/coe", f"{tmp}/m.bin")
    m, c = f"{tmp}/m.bin", f"{GOLDEN}/coe/config.json"
    a, folder = f"{tmp}/a.bin", f"{tmp}/a"
    for args in ([m], [], [m, a, "b"], [m, a, "--nope"], [m, a, "--dtype"], [m, a, "--dtype", "q4"],
                 [m, folder, "--dtype", "bf16"], [m, folder, "--dtype", "q8"], [c, a, "--ini", "3"],
                 [m, a, "--model_type", "deepseek_v2"], [m, folder, "--model_type", "llama"],
                 [c, a, "--init", "-1"], [c, a, "--init", str(2**64)], [c, a, "--init", "1e3"],
                 [c, a, "--init", "٣"], [c, a, "--init"]):
        code, err = run(*args)
        check(code == 2 and len(err.splitlines()) == 1 and err.startswith("export: "), f"{args}")
    bad([f"{tmp}/nope", f"{tmp}/a.bin"], "nope", "No such file")
    bad([c, f"{tmp}/a.bin"], "--init")
    bad([f"{GOLDEN}/coe", f"{tmp}/a.bin", "--init", "3"], "is a folder")
    bad(["/dev/zero", f"{tmp}/a.bin"], "/dev/zero")
    bad([m, "/dev/null"], "/dev/null", "not replaced")
    bad([f"{GOLDEN}/coe", tmp], tmp, "not a file")
    bad([m, f"{tmp}/no/such.bin"], "no folder")
    bad([m, f"{tmp}/no/such"], "cannot be written")
    os.makedirs(f"{tmp}/dir/config.json")
    bad([m, f"{tmp}/dir"], "config.json", "not a file")
    check(os.listdir(f"{tmp}/dir") == ["config.json"], "nothing new in the folder")
    config, _ = golden("coe")
    huge = {"vocab_size": 1 << 24, "hidden_size": 1 << 16}
    write(f"{tmp}/huge.json", config | huge)
    bad([f"{tmp}/huge.json", f"{tmp}/a.bin", "--init", "3"], "a.bin", "bytes", "are free there")
    old = read(m)
    write(f"{tmp}/cut.bin", old[:-64])
    bad([f"{tmp}/cut.bin", m], "cut.bin")
    check(read(m) == old, "a failure leaves the old file alone")
    for option, words in (("--help", ("--dtype", "--init", "--upcycle", "--model_type", "default")),
                          ("--version", ("writes model.bin version 2, reads versions 1 and 2",))):
        done = subprocess.run([sys.executable, EXPORT, option], capture_output=True, text=True)
        check(done.returncode == 0 and all(w in done.stdout for w in words), option)
    text = read(EXPORT).decode()
    with open(os.path.join(HERE, "requirements.txt")) as f:
        wanted = [line for line in f.read().split() if not line.startswith("jinja2")]     # optional
        check(all(f'"{line}"' in text for line in wanted), "PEP 723 and requirements.txt")
    sections = re.findall(r"^# ---- (.*\]) (.*?) -*$", text, re.M)
    contents = " ".join(text[:text.index("import")].split())
    check([tag for tag, _ in sections] == [f"[{i}]" for i in range(1, 12)]
          and all(f"{tag} {title}" in contents for tag, title in sections), f"{sections}")
    for args, code, word in ((["--help"], 0, "--dtype"), ([m, a], 1, "pip install numpy")):
        done = subprocess.run([sys.executable, "-S", EXPORT, *args], capture_output=True, text=True)
        check(done.returncode == code and word in done.stdout + done.stderr
              and len(done.stderr.splitlines()) == code, f"without packages: {args} {done}")


def main():
    only = os.environ.get("ONLY", "").split()           # names of tests; otherwise all
    tests = [value for name, value in globals().items() if name.startswith("test_")
             and (not only or name in only)]
    for test in tests:
        start = time.monotonic()
        tmp = tempfile.mkdtemp(prefix="test_export-")
        try:
            test(tmp)
        except Exception:                                      # go on with the next test
            traceback.print_exc()
            check(False, test.__name__)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
