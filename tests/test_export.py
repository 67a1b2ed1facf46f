"""Tests of export.py: python tests/test_export.py

Ends in a line `N passed, N failed`. Needs what requirements.txt says, ./run and ./train, and
tests/golden, the checkpoints that came out of the reference implementation.
"""
import contextlib, io, json, math, os, resource, shutil, signal, struct, subprocess, sys, tempfile
import time, traceback

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

def read_model_bin(path, quantised=None):
    """The slots, and the tensors by name. quantised: a dict for the int8 and scales of q8."""
    data = read(path)
    s = struct.unpack("<128q", data[:1024])
    assert data[:8] == b"COE1\1\0\0\0" and s[1] == len(data)
    V, d, I, f, L, H, S, E, K, R, r, dn, dr, dv, C = s[16:31]
    G, dense, freq, bias, tied, coe = s[33] and C, s[39], s[40], s[53], s[54], s[7]
    gates = [f"mlp.gate.{t}.weight" for t in range(C)] if G else ["mlp.gate.weight"]
    at, out, offsets = 1024 + s[2] + s[3], {}, []

    def take(names, *shape, matrix=True):
        nonlocal at
        at += -at % 64                                         # only a stack's first is aligned
        offsets.append(at)
        for name in names:
            if matrix and s[5] == 2:
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
            kind = np.dtype("bfloat16" if matrix and s[5] == 1 else "<f4")
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
            if coe: many([f"mlp.coe_weights.{t}" for t in range(C - 1)], d, matrix=False)
        else:
            for part, shape in (("gate", (I, d)), ("up", (I, d)), ("down", (d, I))):
                one(f"mlp.{part}_proj.weight", *shape)
    take(["model.norm.weight"], d, matrix=False)
    if not tied: take(["lm_head.weight"], V, d)
    at += -at % 64
    assert at + s[4] == len(data) and all(o % 64 == 0 for o in offsets)
    return s, out


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
        check(read(f"{GOLDEN}/{name}/model.safetensors") == read(f"{tmp}/{name}/model.safetensors"),
              f"{name}: model.safetensors comes back")
        back = json.loads(read(f"{tmp}/{name}/config.json"))
        check(back.pop("auto_map") == {"AutoConfig": "configuration_coe.CoeConfig",
                                       "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM"}, name)
        check(back == config, f"{name}: config.json comes back")
        check(sorted(os.listdir(f"{tmp}/{name}")) == ["config.json", "model.safetensors"], name)
        slots, found = read_model_bin(f"{tmp}/{name}.bin")
        check(same(found, weights), f"{name}: the tensors in model.bin")
        check(slots[0] >> 32 == 1 and slots[5] == slots[6] == 0 and slots[58] == 0, "slots")


def test_slots(tmp):
    """The header, number by number, of a checkpoint in which no two values are alike."""
    config, weights = golden("deepseek-v2")
    config |= {"aux_loss_alpha": 0.25, "rms_norm_eps": 2e-5, "rope_theta": 12345.5,
               "seq_aux": False, "initializer_range": 0.03, "bos_token_id": None, "eos_token_id": 7}
    config["rope_scaling"] |= {"beta_fast": 30, "beta_slow": 2, "mscale": 0.5}
    generation = {"temperature": 0.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.5, "x": "y"}
    checkpoint(f"{tmp}/slots", config, weights, generation_config=generation,
               tokenizer_config={"add_bos_token": True}, special_tokens_map="{ }\n")
    good(f"{tmp}/slots", f"{tmp}/slots.bin")
    data = read(f"{tmp}/slots.bin")
    i = lambda a, b: list(struct.unpack_from(f"<{b - a + 1}q", data, 8 * a))
    d = lambda a, b: list(struct.unpack_from(f"<{b - a + 1}d", data, 8 * a))
    check(i(16, 26) == [64, 32, 48, 16, 3, 2, 2, 8, 3, 16, 20], f"16..26: {i(16, 26)}")
    check(i(27, 37) == [8, 8, 8, 1, 0, 1, 1, 1, 4, 2, 0], f"27..37: {i(27, 37)}")
    check(d(38, 38) == [2.5] and i(39, 40) == [1, 1] and d(41, 41) == [0.25], "38..41")
    check(i(42, 42) == [0] and d(43, 44) == [2e-5, 12345.5] and i(45, 45) == [2], "42..45")
    check(d(46, 46) == [4] and i(47, 47) == [16] and d(48, 51) == [30, 2, 0.5, 0.707], "46..51")
    check(i(52, 54) == [128, 0, 0] and d(55, 55) == [0.03] and i(56, 58) == [-1, 7, 0], "52..58")
    check(d(59, 59) == [0.3] and i(60, 60) == [5] and d(61, 63) == [0.9, -1, 1.5], "59..63")
    check(i(64, 65) == [1, 0], "add_bos_token, chat_template")
    check(not any(data[8 * 8:16 * 8]) and not any(data[66 * 8:1024]), "reserved slots are 0")
    good(f"{tmp}/slots.bin", f"{tmp}/slots2")
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        check(read(f"{tmp}/slots/{name}") == read(f"{tmp}/slots2/{name}"), f"{name} verbatim")
    back = json.loads(read(f"{tmp}/slots2/config.json"))
    check(all(back[key] == config[key] for key in config), "config.json comes back")
    for generation, slots in (
            ({"do_sample": False, "temperature": 0.6}, [0, -1, -1, -1, -1]),
            ({"do_sample": True, "min_p": 0.1, "top_k": None}, [-1, -1, -1, 0.1, -1])):
        write(f"{tmp}/slots/generation_config.json", generation)
        good(f"{tmp}/slots", f"{tmp}/slots.bin")
        data = read(f"{tmp}/slots.bin")
        check([*d(59, 59), *i(60, 60), *d(61, 63)] == slots, f"{generation}")


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
            slots, found = read_model_bin(f"{tmp}/b16.bin")
            check(slots[5] == (dtype == "bf16") and slots[58] == 1, "dtype slots")
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
            slots, found = read_model_bin(f"{tmp}/q.bin", parts)
            check(slots[5] == 2 and found.keys() == weights.keys(), f"{name}: q8's tensors")
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
        check(same(load_file(f"{tmp}/hf/model.safetensors"), found), f"{name}: q8 as a checkpoint")
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
    slots, found = read_model_bin(f"{tmp}/ds.bin")
    check(same(found, weights) and slots[30:34] == (1, 0, 1, 0), "deepseek_v2 in model.bin")
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
    check(struct.unpack_from("<d", read(f"{tmp}/default.bin"), 44 * 8) == (7.0,), "rope_theta")


def test_init(tmp):
    config, _ = golden("three-iterations")
    config |= {"hidden_size": 256, "n_shared_experts": 1, "initializer_range": 0.05,
               "vocab_size": 999}
    write(f"{tmp}/init.json", config)
    good(f"{tmp}/init.json", f"{tmp}/init.bin", "--init", 42)
    slots, found = read_model_bin(f"{tmp}/init.bin")
    check(slots[2] == slots[3] == slots[4] == slots[6] == slots[7] == 0, "no tokenizer, no state")
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
    for kind, files in sources.items():
        source = checkpoint(f"{tmp}/{kind}", config, weights, **files)
        good(source, f"{tmp}/{kind}.bin")
        for t, k, p, m, r, bos in cases:
            data = bytearray(read(f"{tmp}/{kind}.bin"))        # as train's options change it
            struct.pack_into("<dqdddq", data, 59 * 8, t, k, p, m, r, bos)
            write(f"{tmp}/x.bin", bytes(data))
            shutil.rmtree(f"{tmp}/hf", ignore_errors=True)
            good(f"{tmp}/x.bin", f"{tmp}/hf")
            good(f"{tmp}/hf", f"{tmp}/y.bin")
            back = read(f"{tmp}/y.bin")[59 * 8:65 * 8]
            with_bos = data[59 * 8:65 * 8] if kind == "bos" else data[59 * 8:64 * 8] + bytes(8)
            check(back == with_bos, f"{kind} {t, k, p, m, r, bos} come back")
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
                check(generation.get("do_sample") is (t != 0), f"{kind} {t}: do_sample")
            check(not generation or generation.get("temperature") != 0, "0 is not for transformers")
            if kind == "bos":
                check(found["tokenizer_config.json"] == {"add_bos_token": bos == 1,
                                                         "model_max_length": 5}, "add_bos_token")
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
    data = bytearray(read(path))
    start = 1024 + sum(struct.unpack_from("<2q", data, 16))
    state = 1024 + 2 * (len(data) - start)
    struct.pack_into("<q", data, 8, len(data) + state)
    struct.pack_into("<q", data, 32, state)
    write(out, bytes(data + b"\7" * state))


def test_bin_to_bin(tmp):
    config, weights = golden("upcycled")
    checkpoint(f"{tmp}/b", config, weights, generation_config={"top_k": 3})
    good(f"{tmp}/b", f"{tmp}/b.bin")
    good(f"{tmp}/b", f"{tmp}/b16.bin", "--dtype", "bf16")
    with_state(f"{tmp}/b.bin", f"{tmp}/trained.bin")
    read_model_bin(f"{tmp}/trained.bin")
    for args, target in (([f"{tmp}/trained.bin", f"{tmp}/1.bin"], "b.bin"),
                         ([f"{tmp}/trained.bin", f"{tmp}/2.bin", "--dtype", "bf16"], "b16.bin"),
                         ([f"{tmp}/b16.bin", f"{tmp}/3.bin"], "b16.bin"),
                         ([f"{tmp}/trained.bin", f"{tmp}/trained.bin"], "b.bin")):
        good(*args)
        check(read(args[1]) == read(f"{tmp}/{target}"), f"{args}")
    good(f"{tmp}/b16.bin", f"{tmp}/4.bin", "--dtype", "f32")
    slots, found = read_model_bin(f"{tmp}/4.bin")
    check(slots[5] == 0 and same(found, {
        k: v.astype(ml_dtypes.bfloat16).astype("f4") if v.ndim == 2 and ".gate." not in k else v
        for k, v in weights.items()}), "bf16 -> f32")
    os.symlink(f"{tmp}/4.bin", f"{tmp}/link.bin")
    good(f"{tmp}/b.bin", f"{tmp}/link.bin")
    check(os.path.islink(f"{tmp}/link.bin"), "a link stays one")
    check(read(f"{tmp}/4.bin") == read(f"{tmp}/b.bin"), "and is written through")


def test_upcycle(tmp):
    source, config, weights = deepseek(tmp)
    good(source, f"{tmp}/ds.bin")
    good(source, f"{tmp}/up.bin", "--upcycle", 3)
    slots, found = read_model_bin(f"{tmp}/up.bin")
    check(slots[7] == 1 and slots[30:34] == (3, 1, 1, 1), "slots")
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


def test_tokenizer(tmp):
    """The byte tokenizer goes to Hugging Face and back. For others there is test_tokenizer.py."""
    config, _ = golden("coe")
    byte_ids = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
    write(f"{tmp}/bytes.json", config | byte_ids)
    good(f"{tmp}/bytes.json", f"{tmp}/bytes.bin", "--init", 7)
    data = bytearray(read(f"{tmp}/bytes.bin"))                 # as train would have written it
    struct.pack_into("<q", data, 48, 1)
    struct.pack_into("<q", data, 64 * 8, 1)
    write(f"{tmp}/bytes.bin", bytes(data))
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
    slots = struct.unpack("<128q", read(f"{tmp}/bytes2.bin")[:1024])
    check(slots[6] == 1 and slots[64] == 1 and slots[2] > 0 and slots[2] % 64 == 0, "bytes again")
    read_model_bin(f"{tmp}/bytes2.bin")
    good(f"{tmp}/bytes2.bin", f"{tmp}/bytes3.bin", "--dtype", "bf16")
    good(f"{tmp}/bytes3.bin", f"{tmp}/bytes3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        check(read(f"{tmp}/bytes/{name}") == read(f"{tmp}/bytes3/{name}"), f"{name} verbatim")
    write(f"{tmp}/bytes/tokenizer_config.json", {"add_bos_token": False})
    good(f"{tmp}/bytes", f"{tmp}/bytes2.bin")
    check(struct.unpack("<128q", read(f"{tmp}/bytes2.bin")[:1024])[64] == 0, "add_bos_token")

    x = [f"{tmp}/bytes", f"{tmp}/x.bin"]
    path = f"{tmp}/bytes/tokenizer.json"
    write(path, t | {"added_tokens": t["added_tokens"][::-1]})
    bad(x, "tokenizer.json", '"<|endoftext|>" is 257, must be 256')
    write(path, t)
    good(*x)
    write(f"{tmp}/bytes/tokenizer_config.json", {"add_bos_token": "yes"})
    bad(x, "tokenizer_config.json", "add_bos_token", '"yes"')
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
        "attention_dropout": (0.1, NAN), "topk_method": ("noaux_tc", "gready", None, 3, []),
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
        "first_k_dense_replace": (4, -1), "moe_layer_freq": (0, -1), "aux_loss_alpha": (-0.1, NAN),
        "rms_norm_eps": (0, -1e-6, NAN, "1e-6"), "rope_theta": (0, -1, NAN, "@Infinity", 1),
        "initializer_range": (-1,), "bos_token_id": (-1, 64, [1]), "eos_token_id": (64, "a"),
        "tie_word_embeddings": (1,), "attention_bias": ("no",), "torch_dtype": ("int8", 3),
        "rope_scaling": (3, "yarn", [1])}
    faults = [(key, base | {key: value}) for key, values in cases.items() for value in values]
    cases = {"type": ("dynamic", "longrope", "llama3", None, 3), "mscale": (NAN,),
             "factor": (0, -1, None, "4", NAN, "@missing"), "beta_fast": (0.5, 0),
             "original_max_position_embeddings": (0, -1, 1.5), "beta_slow": (-1, 33),
             "truncate": (False,), "attention_factor": (1.1,)}
    faults += [("rope_scaling." + key, base | {"rope_scaling": yarn | {key: value}})
               for key, values in cases.items() for value in values]
    faults.append(("rope_scaling.type", base | {"rope_scaling": {"factor": 2}}))
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
                 b"\xff\xfe", b"\0" * 99, "version https://git-lfs.github.com/spec/v1\n",
                 "<html>", '{"a": ' + "9" * 9999 + "}"):
        write(f"{tmp}/c/config.json", text)
        bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "JSON")
        bad([f"{tmp}/c/config.json", f"{tmp}/c.bin", "--init", "1"], "c/config.json", "JSON")
    os.remove(f"{tmp}/c/config.json")
    bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "No such file")
    os.mkdir(f"{tmp}/c/config.json")
    bad([f"{tmp}/c", f"{tmp}/c.bin"], "c/config.json", "is a folder")
    for name, value in (("temperature", -1), ("top_k", 1.5), ("top_p", 1.1), ("min_p", "a"),
                        ("repetition_penalty", 0)):
        checkpoint(f"{tmp}/g", base, weights, generation_config={name: value})
        bad([f"{tmp}/g", f"{tmp}/g.bin"], "generation_config.json", name)


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
         "e_score_correction_bias", "sigmoid")
    case(lambda w: w.update({layer + "mlp.gate_proj.weight_scale_inv": ones}),
         "weight_scale_inv", "fp8")
    case(lambda w: None, "lm_head.weight", "tie_word_embeddings", tie_word_embeddings=True)
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
    config, weights = golden("three-iterations")
    checkpoint(f"{tmp}/m", config, weights, generation_config={"top_k": 3})
    good(f"{tmp}/m", f"{tmp}/m.bin")
    data, x = read(f"{tmp}/m.bin"), f"{tmp}/x.bin"
    for cut in [*range(0, 1025, 64), 1023, 1025, 1088, 2000, len(data) - 64, len(data) - 1]:
        write(x, data[:cut])
        bad([x, f"{tmp}/y.bin"], "x.bin")
    write(x, data + b"\0")
    bad([x, f"{tmp}/y.bin"], "x.bin", len(data))
    for text in (b"1EOC" + data[4:], data[4:], b"<html>", b"GGUF", b'{"model_type": "x"}'):
        write(x, text)
        bad([x, f"{tmp}/y.bin"], "x.bin", "COE1")
    for version in (0, 2):
        write(x, data[:4] + struct.pack("<I", version) + data[8:])
        bad([x, f"{tmp}/y.bin"], "x.bin", f"version is {version}")
    slots, ended = struct.unpack("<128q", data[:1024]), {0: 0, 1: 0}
    doubles = struct.unpack("<4q", struct.pack("<4d", math.nan, math.inf, -1.0, 1e300))
    for i in range(1, 128):                                    # every field, every awkward value
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
    for name in (b"../../evil", b"config.json", b"/etc/x", b"\xff", b""):
        write(x, data[:1024] + name.ljust(56, b"\0") + data[1080:])
        bad([x, f"{tmp}/y"], "embedded file")
    write(x, data[:1080] + struct.pack("<Q", 2**63) + data[1088:])
    bad([x, f"{tmp}/y"], "generation_config.json", 2**63)


def test_command_line(tmp):
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
                          ("--version", ("1",))):
        done = subprocess.run([sys.executable, EXPORT, option], capture_output=True, text=True)
        check(done.returncode == 0 and all(w in done.stdout for w in words), option)
    text = read(EXPORT).decode()
    with open(os.path.join(HERE, "requirements.txt")) as f:
        check(all(f'"{line}"' in text for line in f.read().split()), "PEP 723 and requirements.txt")


def main():
    tests = [value for name, value in globals().items() if name.startswith("test_")]
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
