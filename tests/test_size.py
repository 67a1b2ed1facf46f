#!/usr/bin/env python3
"""A model of DeepSeek-V2-Lite's shape, from Hugging Face to q8 to the first tokens.

    python tests/test_size.py [--layers 4] [--folder build/size] [--keep] [--run ./run]

Writes random weights as a checkpoint of several files in bfloat16, exports them, and runs the
result. What is asserted: that export.py needs little memory, that ./run starts at once, and that
its memory grows with the context by the latents alone. What is reported besides: sizes and speeds.
Real is --layers 27: 31.4 GB and 16.7 GB of disk, and memory for the latter if it is to be fast.
With 4 layers all shapes are the same, and the file is past 2 GiB. Everything is removed in the end.
Needs what requirements.txt says. Ends in a line `N passed, N failed`.
"""
import argparse, json, math, os, re, shutil, signal, struct, subprocess, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True

import ml_dtypes
import numpy as np
import export

CONFIG = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    "max_position_embeddings": 163840, "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 100000,
    "eos_token_id": 100001, "torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1,
    "ep_size": 1, "transformers_version": "4.33.1"}
SHARD = 2 * 10**9       # bytes of a file, at most
MEMORY = 64             # MB that export.py may need over Python with its libraries; see main()
passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}: {detail}")


def shapes(layers):
    """Every tensor: (name, shape)."""
    c = CONFIG
    d, f, V, H, R = 2048, 1408, 102400, 16, 512

    def ffn(name, width):
        return [(f"{name}.gate_proj.weight", (width, d)), (f"{name}.up_proj.weight", (width, d)),
                (f"{name}.down_proj.weight", (d, width))]
    yield "model.embed_tokens.weight", (V, d)
    for l in range(layers):
        p = f"model.layers.{l}."
        yield p + "input_layernorm.weight", (d,)
        yield p + "self_attn.q_proj.weight", (H * (128 + 64), d)
        yield p + "self_attn.kv_a_proj_with_mqa.weight", (R + 64, d)
        yield p + "self_attn.kv_a_layernorm.weight", (R,)
        yield p + "self_attn.kv_b_proj.weight", (H * (128 + 128), R)
        yield p + "self_attn.o_proj.weight", (d, H * 128)
        yield p + "post_attention_layernorm.weight", (d,)
        if l < c["first_k_dense_replace"]:
            yield from ffn(p + "mlp", c["intermediate_size"])
            continue
        yield p + "mlp.gate.weight", (64, d)
        for e in range(64):
            yield from ffn(p + f"mlp.experts.{e}", f)
        yield from ffn(p + "mlp.shared_experts", 2 * f)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (V, d)


def is_matrix(name, shape):
    return len(shape) == 2 and "mlp.gate.weight" not in name


class Weights:
    """Normal numbers of deviation 0.02, the same four million again and again: each tensor starts
    at another of them. Norms are 1."""
    def __init__(self):
        numbers = np.random.default_rng(1).standard_normal(2**22 + 12345, np.float32) * 0.02
        self.pool, self.ones = numbers.astype("bfloat16"), np.ones(2048, "bfloat16")

    def parts(self, number, shape, first=0, n=None):
        """n numbers from the first on of a tensor, in pieces."""
        n = math.prod(shape) if n is None else n
        if len(shape) == 1:
            yield self.ones[:n]
            return
        at = (number * 1000003 + first) % len(self.pool)
        while n:
            piece = self.pool[at:at + n]
            yield piece
            n, at = n - len(piece), 0


def write_checkpoint(folder, layers, weights):
    """Config, index and shards; returns its bytes."""
    os.makedirs(folder)
    shards, size = [[]], 0
    for number, (name, shape) in enumerate(shapes(layers)):
        bytes_of = 2 * math.prod(shape)
        if size + bytes_of > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, number, bytes_of))
        size += bytes_of
    index, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, _, bytes_of in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes_of]}
            index[name], end = file, end + bytes_of
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(folder, file), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name, shape, number, _ in shard:
                for part in weights.parts(number, shape):
                    f.write(part.view(np.uint8).data)
        total += end
    for name, value in (("config.json", CONFIG | {"num_hidden_layers": layers}),
                        ("model.safetensors.index.json",
                         {"metadata": {"total_size": total}, "weight_map": index})):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(value, f, indent=2)
    return total


def expected_bytes(layers):
    """(of the checkpoint, of model.bin in q8 without its config)"""
    hf, q8 = 0, 64
    for name, shape in shapes(layers):
        n = math.prod(shape)
        hf += 2 * n
        q8 += n + 4 * shape[0] * (shape[1] // 64) if is_matrix(name, shape) else 4 * n
    return hf, q8


# A child's peak begins with its parent's size, so export.py gets a small parent.
PEAK = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


def peak(*args):
    """(seconds, peak memory in MB) of export.py."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PEAK, sys.executable,
                           os.path.join(ROOT, "export.py"), *args], capture_output=True, text=True)
    check(f"export {args}", done.returncode == 0, done.stderr)
    return time.monotonic() - start, \
        int(done.stdout.split()[-1]) / (1e6 if sys.platform == "darwin" else 1e3)


def check_rows(path, layers, weights):
    """Some rows from all over model.bin are what they were, to half a step of their group."""
    model = export.ModelBin(path)
    numbers = {name: number for number, (name, _) in enumerate(shapes(layers))}
    for t in export.tensors(model.config):
        if t.kind != export.MATRIX:
            continue
        name, row = t.name.format(t.copies - 1), t.shape[0] - 1
        x = model.read(t, t.copies - 1, slice(row, row + 1))[0]
        was = np.concatenate([part.astype(np.float32) for part in weights.parts(
            numbers[name], t.shape, row * t.shape[1], t.shape[1])])
        step = abs(was.reshape(-1, 64)).max(1) / 127
        check(f"last row of {name}",
              (abs(x - was).reshape(-1, 64) <= 0.50001 * step[:, None]).all())
    model.file.close()


def run(program, model, *args):
    """(seconds, stdout, stderr) of ./run."""
    start = time.monotonic()
    done = subprocess.run([program, model, "--ids", *args], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)
    check(f"run {args}", done.returncode == 0, done.stderr)
    return time.monotonic() - start, done.stdout, done.stderr


def first_output(program, model):
    """Seconds until ./run shows the prompt, as the model is there, and until the first token."""
    start, times = time.monotonic(), []
    child = subprocess.Popen([program, model, "--ids", "-i", "100000", "-n", "1"],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while child.stdout.read1():
        times.append(time.monotonic() - start)
    check("first token", child.wait() == 0 and len(times) >= 2, times)
    return times[:2]


def memory(program, model, context):
    """What ./run has in memory after the first tokens in a context of this size, from /proc, in
    bytes: VmData is what it allocated, RssAnon what it used of that, RssFile weights."""
    child = subprocess.Popen([program, model, "--ids", "--threads", "2", "-i", "5", "-n", "-1",
                              "--ignore-eos", "-c", str(context)], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    read = b""
    while read.count(b" ") < 4 and (more := child.stdout.read1()):
        read += more
    with open(f"/proc/{child.pid}/status") as f:
        found = {k: 1024 * int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", f.read(), re.M)}
    child.send_signal(signal.SIGINT)
    child.communicate()
    check(f"interrupted at {read}", child.returncode == 130, child.returncode)
    return found


def test(folder, layers, program, keep):
    hf, q8 = expected_bytes(layers)
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free - 10**9
    if hf + q8 > free:
        fits = [n for n in range(2, layers) if sum(expected_bytes(n)) <= free]
        check(f"disk for {layers} layers", False,
              f"needs {(hf + q8) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
              + (f", which is enough for --layers {fits[-1]}" if fits else ""))
        return
    source, model = os.path.join(folder, "hf"), os.path.join(folder, "model.bin")
    weights, start = Weights(), time.monotonic()
    total = write_checkpoint(source, layers, weights)
    check("size of the checkpoint", total == hf, (total, hf))
    parameters = sum(math.prod(shape) for _, shape in shapes(layers))
    largest = max(2 * math.prod(shape) for _, shape in shapes(layers))
    print(f"{layers} layers, {parameters / 1e9:.2f} G weights: {hf / 1e9:.2f} GB in "
          f"{len(os.listdir(source)) - 2} files, written in {time.monotonic() - start:.0f} s")

    # export.py has some rows in memory at a time, the scales of one matrix, and the names of all
    # tensors. So what it needs does not grow with the largest tensor.
    _, base = peak("--version")
    seconds, most = peak(source, model, "--dtype", "q8")
    size = os.path.getsize(model)
    print(f"export to q8: {size / 1e9:.2f} GB in {seconds:.0f} s, "
          f"{parameters / seconds / 1e6:.0f} M weights/s; memory {most:.0f} MB, {most - base:.0f} "
          f"over Python's (the largest tensor has {largest / 1e6:.0f})")
    check("memory of export.py", most - base < MEMORY < largest / 1e6, (base, most))
    with open(model, "rb") as f:
        file_bytes, config_bytes = struct.unpack_from("<2Q", f.read(64), 16)
    check("size of model.bin", size == q8 + config_bytes, (size, q8, config_bytes))
    check("the header says its size", file_bytes == size, file_bytes)
    check_rows(model, layers, weights)
    if not keep:
        shutil.rmtree(source)

    run(program, model, "-i", "100000", "-n", "1")             # from here on it is warm
    info = min(run(program, model, "-m", "info")[0] for _ in range(3))
    start, first = map(min, zip(*[first_output(program, model) for _ in range(3)]))
    print(f"run: info after {info:.2f} s, prompt after {start:.2f} s, token after {first:.2f} s")
    check("start-up", start < 1, start)
    check("info, which checks the whole file, reads 500 MB/s", info < size / 500e6, info)

    some = ["-i", "100000 17464 11 1526 0 102399"]
    _, out, err = run(program, model, *some, "-t", "0", "--ignore-eos", "-n", "33")
    tokens = [int(t) for t in out.split()]
    check("33 tokens after 6", len(tokens) == 39 and max(tokens) < 102400, out)
    speed = re.search(r"then 32, ([\d.]+) tok/s", err)
    check("speed", speed, err)
    _, out, _ = run(program, model, "-m", "eval", *some)
    nll = re.search(r"^nll ([\d.]+)$", out, re.M)
    check("a finite loss", nll and 0 < float(nll[1]) < 100, out)

    if os.path.exists("/proc/self/status"):
        latents, short, long = 4 * (512 + 64) * layers, 1024, 33792
        small, large = memory(program, model, short), memory(program, model, long)
        growth = (large["VmData"] - small["VmData"]) / (long - short)
        print(f"decode {speed and speed[1]} tok/s; memory {small['RssAnon'] / 1e6:.0f} MB, and "
              f"{small['RssFile'] / 1e6:.0f} MB of the file; {growth:.0f} bytes for each token of "
              f"context, {latents} of them latents")
        # The rest: angles of RoPE, the token's id, and scores of a block of queries per thread.
        check("memory per token of context", latents <= growth < latents + 1024, growth)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--layers", type=int, default=4, help="2 or more, the real model has 27")
    p.add_argument("--folder", default=os.path.join(ROOT, "build", "size"))
    p.add_argument("--keep", action="store_true", help="leave the files there")
    p.add_argument("--run", default=os.path.join(ROOT, "run"), help="the program ./run")
    a = p.parse_args()
    if a.layers < 2:
        p.error("--layers must be 2 or more")
    if os.path.exists(a.folder):
        p.error(f"{a.folder} is there already")
    try:
        test(a.folder, a.layers, os.path.abspath(a.run), a.keep)
    finally:
        if not a.keep:
            shutil.rmtree(a.folder, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
