"""The way out, whole: a model of ./train goes on under torchrun with FSDP, and comes back.

    python tests/test_torchrun.py                           one iteration, as transformers' DeepSeek-V2
    python tests/test_torchrun.py --reference FOLDER        two, by the reference's own PyTorch code:
                                        FOLDER has its configuration_coe.py and modeling_coe.py, which
                                        want transformers 4.49.0

The script is the one that docs/huggingface.md prints, on two CPU processes. Its first loss must be
that of ./run on the same tokens, it must learn, and what it saves must be the same model in ./run.
Ends in a line `N passed, N failed`.
"""
import os, re, shutil, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TMP = tempfile.mkdtemp(prefix="test_torchrun-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{TMP}/home", "OMP_NUM_THREADS": "1",
               "OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, B, T = 6, 4, 48
passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}: {str(detail)[-3000:]}")


def call(*command):
    """stdout of a program, which must end well."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode} {done.stderr[-3000:]}")
    return done.stdout


def run(model, *options):
    lines = call("./run", model, "-m", "eval", "--ids", *options).splitlines()
    return dict(line.split() for line in lines)


def go_on(name, options, model_type, reference):
    """One model, there and back."""
    model, folder, saved = f"{TMP}/{name}.bin", f"{TMP}/{name}", f"{TMP}/{name}-saved"
    call("./train", *options.split(), "-x", 3, "-b", 2, "-l", 64, "--hidden_size", 32,
         "--num_attention_heads", 2, "--num_hidden_layers", 2, "--max_position_embeddings", 128,
         "--eval_problems", 0, "-o", model)
    call(sys.executable, "export.py", model, folder, "--model_type", model_type)
    for file in ("configuration_coe.py", "modeling_coe.py") if reference else ():
        for place in (folder, saved):   # AutoModel looks for them in both
            os.makedirs(place, exist_ok=True)
            shutil.copy(f"{reference}/{file}", place)
    text = call("./train", "--show_data", 60)
    for path, data in (("text.txt", text), ("go_on.py", SCRIPT)):
        with open(f"{TMP}/{path}", "w") as f:
            f.write(data)
    said = call(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2,
                "--master_port", 29000 + os.getpid() % 1000, f"{TMP}/go_on.py", folder,
                f"{TMP}/text.txt", saved, STEPS, B, T)
    losses = [float(x) for x in re.findall(r"^step \d+ loss ([\d.]+)$", said, re.M)]
    check(f"{name}: a loss for each step", len(losses) == STEPS, said)

    ids = AutoTokenizer.from_pretrained(folder)(text.replace("<|endoftext|>\n", "<|endoftext|>"),
                                                add_special_tokens=False).input_ids
    first = torch.randint(len(ids) - T, (B, 1), generator=torch.Generator().manual_seed(0))
    windows = [" ".join(map(str, ids[i:i + T + 1])) for i in first.flatten().tolist()]
    ours = sum(float(run(model, "-i", window)["nll"]) for window in windows) / B
    check(f"{name}: the first loss is ./run's", abs(losses[0] - ours) < 1e-4, (losses, ours))

    back = f"{TMP}/{name}-back.bin"
    call(sys.executable, "export.py", saved, back)
    after = sum(float(run(back, "-i", window)["nll"]) for window in windows) / B
    check(f"{name}: it has learned", after < ours - 0.01, (ours, after))
    run(back, "-i", windows[0], "--logits", f"{TMP}/logits")
    kind = {} if reference is None else {"trust_remote_code": True}
    theirs = AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.float32, **kind).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor([[int(i) for i in windows[0].split()]]),
                        use_cache=False).logits[0].numpy()
    found = np.fromfile(f"{TMP}/logits", "<f4").reshape(wanted.shape)
    off = abs(found - wanted).max() / abs(wanted).max()
    check(f"{name}: what comes back is what was saved", off < 1e-5, off)
    again = f"{TMP}/{name}-again"
    call(sys.executable, "export.py", back, again, "--model_type", model_type)
    call(sys.executable, "export.py", again, f"{TMP}/again.bin")
    with open(back, "rb") as a, open(f"{TMP}/again.bin", "rb") as b:
        check(f"{name}: there and back", a.read() == b.read())
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, logits off by {off:.1e}")


def main():
    global SCRIPT
    with open(os.path.join(ROOT, "docs", "huggingface.md")) as f:
        SCRIPT = re.search(r"```python\n(import sys, torch.*?)```", f.read(), re.S)[1]
    reference = sys.argv[2] if sys.argv[1:2] == ["--reference"] else None
    c1 = "--inner_iter 1 --inner_residual false --outer_residual true"
    try:
        for tied in ("false", "true"):
            name = "tied" if tied == "true" else "untied"
            options, model_type = (("", "coe_deepseekv2") if reference else (c1, "deepseek_v2"))
            try:
                go_on(name, f"{options} --tie_word_embeddings {tied}", model_type, reference)
            except Exception as e:      # go on with the next
                check(name, False, e)
    finally:
        shutil.rmtree(TMP, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
