#!/usr/bin/env python3
"""Compares run --mode lens, and run with --silence, --parallel, --swap_gates and --gate_input, with
the same written down in PyTorch, on random models.

    python tests/test_lens.py ./run 'python export.py' [models]

The last line is "N passed, N failed". Needs PyTorch.
"""
import math
import os
import sys
import tempfile

import numpy as np
import torch

import oracle
import reference
from oracle import call, random_config, random_weights, read_tsv
from reference import choose, feed_forward, is_moe, rmsnorm, scores

CLEAR = 1e-3            # a choice by less than this may fall otherwise in float32
passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}: {str(detail)[:300]}")


class Edits:
    """Rules [(kind, {condition: value})], and how near the closest choice of experts was."""
    def __init__(self, rules=()):
        self.rules, self.gap = rules, math.inf

    def hold(self, kind, part="", **here):
        """Whether a rule of the kind, about such a part, holds here."""
        parts = {"expert", "head", "shared"}
        return any(k == kind and set(rule) & parts == ({part} if part else set())
                   and all(here.get(key, value) == value for key, value in rule.items())
                   for k, rule in self.rules)

    def options(self):
        return [x for kind, rule in self.rules for x in (
            f"--{kind}", ",".join(k if k == "shared" else f"{k}={v}" for k, v in rule.items())
            or "all")]


def route(cfg, w, l, c, x, edits):
    score, bias = scores(cfg, w, l, c, x)
    ordered = score.sort(-1, descending=True).values
    if bias is not None:
        expert, weight = choose(cfg, score, bias)
        gap = oracle.look_at_v3(cfg, (l, c, expert, weight, score, bias))["order_gap"]
        edits.gap = min(edits.gap, gap.min().item())
        return expert, weight
    if score.shape[1] > 1:
        edits.gap = min(edits.gap, ((ordered[:, :-1] - ordered[:, 1:]) / ordered[:, :-1].clamp(1e-9))
                        .min().item())
    return choose(cfg, score)


def ffn(cfg, w, l, c, x, router_sees, edits):
    """The feed-forward of x, whose router sees something else; and the shared expert's part."""
    mlp = f"model.layers.{l}.mlp"
    if not is_moe(cfg, l):
        return feed_forward(w, mlp, x), None, None
    C = cfg["inner_iter"]
    gate = C - 1 - c if edits.hold("swap_gates", layer=l) else c
    expert, weight = route(cfg, w, l, gate, router_sees, edits)
    shared, out = torch.zeros_like(x), torch.zeros_like(x)
    if cfg["n_shared_experts"] and not edits.hold("silence", "shared", layer=l, iteration=c, shared=1):
        shared = feed_forward(w, mlp + ".shared_experts", x)
    for e in range(cfg["n_routed_experts"]):
        if edits.hold("silence", "expert", layer=l, iteration=c, expert=e):
            continue
        t, k = (expert == e).nonzero(as_tuple=True)
        out = out.index_add(0, t, weight[t, k, None] * feed_forward(w, f"{mlp}.experts.{e}", x[t]))
    return out + shared, shared, expert


def run_model(cfg, w, ids, edits):
    """Logits [T, V], and what the lens should see: {(layer, iterations): dict of columns [T]}."""
    x, seen = w["model.embed_tokens.weight"][ids], {}
    head = w["lm_head.weight"] if "lm_head.weight" in w else w["model.embed_tokens.weight"]
    norm = lambda v: v.norm(dim=-1)
    say = lambda v: rmsnorm(w, "model.norm", v, cfg["rms_norm_eps"]) @ head.T
    for l in range(cfg["num_hidden_layers"]):
        layer = f"model.layers.{l}"
        dead = [h for h in range(cfg["num_attention_heads"])
                if edits.hold("silence", "head", layer=l, head=h)]
        silent = dict(w)
        o = silent[layer + ".self_attn.o_proj.weight"].clone()
        for h in dead:      # what a head puts into o_proj is 0: so are its columns there
            o[:, h * cfg["v_head_dim"]:(h + 1) * cfg["v_head_dim"]] = 0
        silent[layer + ".self_attn.o_proj.weight"] = o
        mid = reference.attention_forward(cfg, silent, l, x, 1)
        upcycled = any(".coe_weights." in name for name in w)
        y = before = y_0 = rmsnorm(w, layer + ".post_attention_layernorm", mid, cfg["rms_norm_eps"])
        prenorm = cfg.get("prenorm_chain", False)
        inside = cfg["inner_residual"] and not upcycled
        outer = mid if cfg["outer_residual"] else 0
        seen[l, 0] = {"logits": say(y_0 + outer if inside else mid)}
        for c in range(cfg["inner_iter"] if is_moe(cfg, l) else 1):
            x_in = y_0 if edits.hold("parallel", layer=l, iteration=c) else y
            router = y_0 if edits.hold("gate_input", layer=l, iteration=c) else x_in
            out, shared, expert = ffn(cfg, w, l, c, x_in, router, edits)
            if edits.hold("silence", layer=l, iteration=c):
                out = torch.zeros_like(out)
            row = {"ffn_norm": norm(out), "y_norm": norm(y)}
            if shared is not None:
                row["shared_part"] = norm(shared) / norm(out)
                if c:
                    gate = cfg["inner_iter"] - 1 - c if edits.hold("swap_gates", layer=l) else c
                    other, _ = route(cfg, w, l, gate, before, edits)
                    row["other_choice"] = torch.tensor([float(set(a.tolist()) != set(b.tolist()))
                                                        for a, b in zip(other, expert)])
            before = y
            if upcycled:
                y = y + w[f"{layer}.mlp.coe_weights.{c - 1}"] * out if c else out
            else:
                y = y + out if cfg["inner_residual"] or prenorm else out
            x = mid + (y - y_0) if prenorm else y + outer
            seen[l, c + 1] = row | {"logits": say(x)}
    return say(x), seen


def random_rules(rng, cfg):
    """One or two rules that apply to the model."""
    L, C, H = cfg["num_hidden_layers"], cfg["inner_iter"], cfg["num_attention_heads"]
    moe = [l for l in range(L) if is_moe(cfg, l)]
    some = lambda n: int(rng.integers(n))
    kinds = ["head", "layer", "all"]
    if moe:
        kinds += ["iteration", "expert"] + ["shared"] * bool(cfg["n_shared_experts"])
        if C > 1:
            kinds += ["gate_input", "gate_input"] + ["swap_gates"] * cfg["use_igate"]
            kinds += ["parallel"] * 2 * bool(cfg["inner_residual"] or cfg.get("upcycled")
                                             or cfg.get("prenorm_chain"))
    rules = []
    for _ in range(1 + some(2)):
        kind = kinds[some(len(kinds))]
        layer = {"layer": moe[some(len(moe))]} if moe and rng.random() < 0.6 else {}
        iteration = {"iteration": some(C)} if rng.random() < 0.6 else {}
        rules.append({
            "head": ("silence", {"head": some(H)}), "layer": ("silence", {"layer": some(L)}),
            "all": ("silence", {}), "iteration": ("silence", layer | {"iteration": some(C)}),
            "expert": ("silence", layer | iteration | {"expert": some(cfg["n_routed_experts"] or 1)}),
            "shared": ("silence", layer | iteration | {"shared": 1}),
            "gate_input": ("gate_input", layer | iteration), "swap_gates": ("swap_gates", layer),
            "parallel": ("parallel", layer | iteration)}[kind])
    return rules


def compare_lens(name, path, run, cfg, ids, edits, wanted, seen):
    """--lens against the reference, and its last row against the logits."""
    out = call(run, path("model.bin"), "-m", "lens", "--ids", "-f", path("ids"), "--lens",
               path("lens"), *edits.options())
    lines = read_tsv(path("lens"))
    where = {(int(x["position"]), int(x["layer"]), int(x["iterations"])): x for x in lines}
    check(f"{name}: all rows are there", set(where) == {(t, l, c) for l, c in seen
                                                        for t in range(len(ids))}, len(lines))
    for (l, c), row in seen.items():
        p = row["logits"].softmax(-1)
        for t in range(len(ids)):
            x, columns = where[t, l, c], {}
            top = p[t].topk(2)
            columns["p_guess"] = top.values[0].item()
            if top.values[1] < 0.999 * top.values[0]:
                check(f"{name}: guess", int(x["guess"]) == top.indices[0].item(), (x, top))
            if t + 1 < len(ids):
                columns["p_next"] = p[t, ids[t + 1]].item()
                columns["loss"] = -math.log(max(p[t, ids[t + 1]].item(), 1e-300))
            columns |= {k: v[t].item() for k, v in row.items() if k != "logits"}
            for key in ("p_guess", "p_next", "loss", "ffn_norm", "y_norm", "shared_part",
                        "other_choice"):
                if key not in columns:
                    check(f"{name}: {key} is empty", x[key] == "", (key, x))
                elif math.isfinite(columns[key]):
                    error = abs(float(x[key] or "nan") - columns[key])
                    check(f"{name}: {key} of token {t}, layer {l}, {c} done",
                          error <= 1e-3 * abs(columns[key]) + 1e-5, (x[key], columns[key]))
    check(f"{name}: nll", abs(float(out.split("\nnll ")[1].split()[0]) - wanted) < 1e-4 * wanted)


def compare(number, run, export, folder):
    """One random model. False where a choice of experts is too close."""
    rng = np.random.default_rng([77, number])
    cfg = random_config(rng)
    w32 = random_weights(cfg, rng)
    w = oracle.as_type(w32, torch.float64)
    cfg["upcycled"] = any(".coe_weights." in n for n in w)
    ids = rng.integers(0, cfg["vocab_size"], 7).tolist()
    loss = lambda logits: torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(ids[1:])).item()
    name, path = f"model {number}", lambda file: os.path.join(folder, file)
    edits, none = Edits(random_rules(rng, cfg)), Edits()
    with torch.no_grad():
        logits, seen = run_model(cfg, w, torch.tensor(ids), edits)
        untouched, seen_untouched = run_model(cfg, w, torch.tensor(ids), none)
    if min(edits.gap, none.gap) < CLEAR:
        return False
    name += f", {' '.join(edits.options())}"
    oracle.save(path("hf"), {k: v for k, v in cfg.items() if k != "upcycled"}, w32)
    call(export, path("hf"), path("model.bin"), "--dtype", "f32")
    with open(path("ids"), "w") as f:
        f.write(" ".join(map(str, ids)))
    whole = call(run, path("model.bin"), "-m", "eval", "--ids", "-f", path("ids"), "--logits",
                 path("logits"), *edits.options())
    found = torch.tensor(np.fromfile(path("logits"), "<f4")).double().view(logits.shape)
    check(f"{name}: logits", torch.equal(found, logits) or oracle.far(found, logits) < 1e-4,
          (found, logits))
    values = dict(line.split() for line in whole.splitlines())
    for key, want in (("nll", loss(logits)), ("nll_untouched", loss(untouched))):
        check(f"{name}: {key}", abs(float(values[key]) - want) < 1e-4 * abs(want), (values, want))
    compare_lens(name, path, run, cfg, ids, edits, loss(logits), seen)
    compare_lens(name + " (untouched)", path, run, cfg, ids, none, loss(untouched), seen_untouched)

    # Token by token as at once: what is drawn greedily is the argmax of the whole text's logits.
    told = call(run, path("model.bin"), "--ids", "-f", path("ids"), "-n", 6, "-t", 0,
                "--repeat-penalty", 1, "--ignore-eos", *edits.options()).split()
    with open(path("told"), "w") as f:
        f.write(" ".join(told))
    call(run, path("model.bin"), "-m", "eval", "--ids", "-f", path("told"), "--logits",
         path("logits"), *edits.options())
    whole = np.fromfile(path("logits"), "<f4").reshape(len(told), -1)
    for t in range(len(ids) - 1, len(told) - 1):
        best = whole[t].max()
        check(f"{name}: token by token", best - whole[t, int(told[t + 1])] < 1e-3 * abs(best) + 1e-5)
    if cfg["inner_iter"] > 1 and any(is_moe(cfg, l) for l in range(cfg["num_hidden_layers"])):
        outputs = []
        for options in ([], ["--gate_input", "iteration=0"]):
            call(run, path("model.bin"), "-m", "eval", "--ids", "-f", path("ids"), "--logits",
                 path("logits"), *options)
            with open(path("logits"), "rb") as f:
                outputs.append(f.read())
        check(f"{name}: an edit of nothing changes nothing", outputs[0] == outputs[1])
    return True


def main():
    run, export = sys.argv[1:3]
    models = int(sys.argv[3]) if len(sys.argv) > 3 else 12
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    done = number = 0
    while done < models:
        with tempfile.TemporaryDirectory() as folder:
            done += compare(number, run, export, folder)
        number += 1
    print(f"{done} random models compared, {number - done} left out for a choice too close")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
