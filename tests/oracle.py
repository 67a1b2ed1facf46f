"""The model a second time, in plain PyTorch: what the C programs are compared with.

    python tests/oracle.py check   GOLDEN_DIR...     # this file against the reference's numbers
    python tests/oracle.py compare --train ./train --run ./run --export 'python export.py'
                                                     # the C programs against this file

Nothing here is fast and nothing is shared with the C code: autograd makes the gradients, loops
are loops, and everything is computed in the type of the weights that come in. `compare` uses
float64, so that what it reports is the rounding of the C programs alone.

Needs torch, numpy and safetensors. Letters in the shape comments: B sequences of T tokens,
N = B*T, d hidden_size, V vocab_size, H heads, R kv_lora_rank, E experts, K of them chosen,
f the width of an expert.

Contents: [1] the model  [2] loss, gradients, AdamW  [3] checkpoints and random models
          [4] check      [5] compare                 [6] command line
"""
import argparse, json, math, os, shlex, struct, subprocess, sys, tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)        # the models are tiny: a second thread only waits


# ---- [1] the model ----------------------------------------------------------------------------

def rmsnorm(x, weight, eps):                               # x [..., n]   weight [n]
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def linear(w, name, x):                                    # x [..., in] -> [..., out]
    y = x @ w[name + '.weight'].T
    return y + w[name + '.bias'] if name + '.bias' in w else y


def swiglu(w, name, x):                                    # x [N, d] -> [N, d]
    gate, up = linear(w, name + '.gate_proj', x), linear(w, name + '.up_proj', x)
    return linear(w, name + '.down_proj', gate * torch.sigmoid(gate) * up)


def is_moe(cfg, layer):
    return (cfg['n_routed_experts'] is not None and layer >= cfg['first_k_dense_replace']
            and layer % cfg['moe_layer_freq'] == 0)


def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rope_tables(cfg, T, dtype):
    """cos and sin of the angle of every position and pair, both [T, rope/2]."""
    dim, theta, scaling = cfg['qk_rope_head_dim'], cfg['rope_theta'], cfg['rope_scaling'] or {}
    i = torch.arange(dim // 2, dtype=torch.float64)
    p = torch.arange(T, dtype=torch.float64)
    omega, amplitude = theta ** (-2 * i / dim), 1.0
    if scaling.get('type') == 'linear':
        p = p / scaling['factor']
    elif scaling.get('type') == 'yarn':
        factor, n0 = scaling['factor'], scaling.get('original_max_position_embeddings', 4096)
        corr = lambda n: dim * math.log(n0 / (2 * math.pi * n)) / (2 * math.log(theta))
        low = max(math.floor(corr(scaling.get('beta_fast', 32))), 0)
        high = min(math.ceil(corr(scaling.get('beta_slow', 1))), dim - 1)
        ramp = ((i - low) / ((high - low) if high != low else 0.001)).clamp(0, 1)
        omega = omega / factor * ramp + omega * (1 - ramp)
        amplitude = (mscale(factor, scaling.get('mscale', 1))
                     / mscale(factor, scaling.get('mscale_all_dim', 0)))
    elif scaling:
        raise ValueError(f'rope_scaling {scaling} is not implemented')
    angle = p[:, None] * omega
    return (angle.cos() * amplitude).to(dtype), (angle.sin() * amplitude).to(dtype)


def rotate(x, cos, sin):                       # x [T, heads, rope]   cos, sin [T, rope/2]
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attention(cfg, w, name, x):                            # one sequence: x [T, d] -> [T, d]
    T, H, R = len(x), cfg['num_attention_heads'], cfg['kv_lora_rank']
    nope, rope, v_dim = cfg['qk_nope_head_dim'], cfg['qk_rope_head_dim'], cfg['v_head_dim']
    cos, sin = rope_tables(cfg, T, x.dtype)
    if cfg['q_lora_rank'] is None:
        q = linear(w, name + '.q_proj', x)
    else:
        q = rmsnorm(linear(w, name + '.q_a_proj', x), w[name + '.q_a_layernorm.weight'], 1e-6)
        q = linear(w, name + '.q_b_proj', q)
    q_nope, q_rope = q.view(T, H, nope + rope).split([nope, rope], -1)
    c, k_rope = linear(w, name + '.kv_a_proj_with_mqa', x).split([R, rope], -1)
    c = rmsnorm(c, w[name + '.kv_a_layernorm.weight'], 1e-6)                    # [T, R]
    kv = linear(w, name + '.kv_b_proj', c).view(T, H, nope + v_dim)
    k_nope, v = kv.split([nope, v_dim], -1)
    q_rope = rotate(q_rope, cos, sin)                                           # [T, H, rope]
    k_rope = rotate(k_rope[:, None], cos, sin)[:, 0]                            # [T, rope]
    scale = (nope + rope) ** -0.5
    scaling = cfg['rope_scaling'] or {}
    if scaling.get('mscale_all_dim'):
        scale *= mscale(scaling['factor'], scaling['mscale_all_dim']) ** 2
    score = (torch.einsum('qhn,khn->hqk', q_nope, k_nope)
             + torch.einsum('qhr,kr->hqk', q_rope, k_rope)) * scale            # [H, T, T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    score = score.masked_fill(future, -math.inf).softmax(-1)
    return linear(w, name + '.o_proj', torch.einsum('hqk,khv->qhv', score, v).reshape(T, H * v_dim))


def largest(s, k):
    """Columns of the k largest of every row, best first; equal ones by the lower column, which
    torch.topk does not promise and a stable sort does. Also by how much log s the choice was
    clear: of the set (the k-th against the next) and of the order (the closest neighbours)."""
    value, column = s.detach().sort(dim=-1, descending=True, stable=True)
    step = value.log()[:, :-1] - value.log()[:, 1:]        # [N, n-1]
    step = torch.cat([step, torch.full_like(value[:, :1], math.inf)], -1)
    step = step.nan_to_num(nan=0.0, posinf=math.inf)       # two zeros are a tie
    return column[:, :k], step[:, k - 1], step[:, :k].min(-1).values


def route(cfg, gate, x):                                   # gate [E, d]   x [N, d]
    """The experts of every token, with everything that the tests ask about the choice."""
    N, E, K = len(x), len(gate), cfg['num_experts_per_tok']
    s = (x @ gate.T).softmax(-1)                           # [N, E]
    allowed, group_gap = s, torch.full_like(s[:, 0], math.inf)
    if cfg['topk_method'] == 'group_limited_greedy':
        G = cfg['n_group']
        best = s.view(N, G, E // G).max(-1).values         # [N, G]
        group, group_gap, _ = largest(best, cfg['topk_group'])
        mask = torch.zeros_like(best).scatter(1, group, 1.0)
        allowed = s * mask.repeat_interleave(E // G, 1)
    elif cfg['topk_method'] != 'greedy':
        raise ValueError(f'topk_method {cfg["topk_method"]} is not implemented')
    expert, gap, order_gap = largest(allowed, K)           # [N, K]
    weight = allowed.gather(1, expert)
    if cfg['norm_topk_prob'] and K > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    else:
        weight = weight * cfg['routed_scaling_factor']
    return {'experts': expert, 'weights': weight, 'scores': s,
            'gap': torch.minimum(gap, group_gap), 'order_gap': torch.minimum(order_gap, group_gap)}


def balance(cfg, r, B):
    """Auxiliary loss of one gate call: how often an expert was chosen (a constant to the
    gradient) times how much the gate likes it."""
    E, K = r['scores'].shape[1], r['experts'].shape[1]
    groups = B if cfg['seq_aux'] else 1                    # per sequence, or all tokens as one
    total = 0.0
    for s, e in zip(r['scores'].chunk(groups), r['experts'].chunk(groups)):
        count = torch.bincount(e.flatten(), minlength=E).to(s.dtype)
        total = total + (count * E / (len(s) * K) * s.mean(0)).sum()
    return cfg['aux_loss_alpha'] * total / groups


def mixture(cfg, w, name, x, r):                           # x [N, d] -> [N, d]
    y = torch.zeros_like(x)
    for e in range(cfg['n_routed_experts']):
        token, rank = (r['experts'] == e).nonzero(as_tuple=True)
        if len(token):
            out = swiglu(w, f'{name}.experts.{e}', x[token])
            y = y.index_add(0, token, r['weights'][token, rank, None] * out)
    return y + swiglu(w, name + '.shared_experts', x) if cfg['n_shared_experts'] else y


def forward(cfg, w, tokens):                               # tokens [B, T]
    """Logits [B, T, V], one routing record per (layer, iteration), the auxiliary loss."""
    B, T = tokens.shape
    upcycled = any('coe_weights' in name for name in w)
    eps, records, aux = cfg['rms_norm_eps'], [], torch.zeros((), dtype=w['model.norm.weight'].dtype)
    x = w['model.embed_tokens.weight'][tokens.flatten()]   # [N, d]
    for layer in range(cfg['num_hidden_layers']):
        p = f'model.layers.{layer}'
        h = rmsnorm(x, w[p + '.input_layernorm.weight'], eps)
        x = x + torch.cat([attention(cfg, w, p + '.self_attn', seq) for seq in h.chunk(B)])
        r = x
        x = rmsnorm(x, w[p + '.post_attention_layernorm.weight'], eps)
        for t in range(cfg['inner_iter'] if is_moe(cfg, layer) else 1):
            if is_moe(cfg, layer):
                gate = w[f'{p}.mlp.gate.{t}.weight' if cfg['use_igate'] else f'{p}.mlp.gate.weight']
                record = {'layer': layer, 'iteration': t, **route(cfg, gate, x)}
                records.append(record)
                aux = aux + balance(cfg, record, B)
                y = mixture(cfg, w, p + '.mlp', x, record)
            else:
                y = swiglu(w, p + '.mlp', x)
            if upcycled:                                   # inner_residual is not looked at
                x = x + w[f'{p}.mlp.coe_weights.{t - 1}'] * y if t else y
            else:
                x = x + y if cfg['inner_residual'] else y
        if cfg['outer_residual']:
            x = x + r
    head = 'model.embed_tokens' if cfg['tie_word_embeddings'] else 'lm_head'
    logits = linear(w, head, rmsnorm(x, w['model.norm.weight'], eps))
    return logits.view(B, T, -1), records, aux


@torch.no_grad()
def greedy(cfg, w, prompt, n):
    """The prompt and n more tokens, past EOS too; and how clear the closest choice was, in
    parts of the largest logit."""
    ids, margin = list(prompt), math.inf
    for _ in range(n):
        last = forward(cfg, w, torch.tensor([ids]))[0][0, -1]
        two = last.topk(2).values
        margin = min(margin, ((two[0] - two[1]) / last.abs().max()).item())
        ids.append(int((last == two[0]).nonzero()[0]))     # ties: the lower id
    return ids, margin


# ---- [2] loss, gradients, AdamW ---------------------------------------------------------------

def cross_entropy(logits, targets):                        # logits [B, T, V]   targets [B, T]
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


def loss_and_grads(cfg, w, tokens, targets, micro=None, keep=None):
    """Mean cross entropy, auxiliary loss, and the gradient of their sum by name. With micro,
    that many sequences are taken at once; each part counts by its number of sequences.
    keep: a list that gets the routing records."""
    w = {name: t.detach().requires_grad_() for name, t in w.items()}
    grads = {name: torch.zeros_like(t) for name, t in w.items()}
    micro, ce_sum, aux_sum = micro or len(tokens), 0.0, 0.0
    for x, y in zip(tokens.split(micro), targets.split(micro)):
        logits, records, aux = forward(cfg, w, x)
        share, ce = len(x) / len(tokens), cross_entropy(logits, y)
        parts = torch.autograd.grad((ce + aux) * share, list(w.values()), allow_unused=True)
        for g, part in zip(grads.values(), parts):
            if part is not None:                           # None: an expert that nobody chose
                g += part
        ce_sum, aux_sum = ce_sum + ce.item() * share, aux_sum + aux.item() * share
        if keep is not None:
            keep += records
    return ce_sum, aux_sum, grads


def windows(stream, first, B, L):                          # inputs and targets, both [B, L]
    """Sequence b holds tokens [(first + b)*L, +L] and predicts the same shifted by one."""
    at = [(first + b) * L for b in range(B)]
    return (torch.stack([stream[i:i + L] for i in at]),
            torch.stack([stream[i + 1:i + L + 1] for i in at]))


def adamw(cfg, w, stream, B, L, steps, lr, warmup_steps=0, betas=(0.9, 0.95), eps=1e-8,
          weight_decay=0.01, clip=1.0, micro=None):
    """Trains on the windows of the stream in file order, at a constant rate after the warm-up.
    Yields after every step (log, weights): the loss before the update, aux_loss, grad_norm
    before clipping, and how clear every choice of experts was (gaps)."""
    w = {name: t.clone() for name, t in w.items()}
    m = {name: torch.zeros_like(t) for name, t in w.items()}
    v = {name: torch.zeros_like(t) for name, t in w.items()}
    for step in range(steps):
        records = []
        loss, aux, grads = loss_and_grads(cfg, w, *windows(stream, step * B, B, L), micro, records)
        norm = math.sqrt(sum((g * g).sum().item() for g in grads.values()))
        factor = clip / (norm + 1e-6) if clip and norm > clip else 1.0
        rate = lr * min(1.0, (step + 1) / warmup_steps) if warmup_steps else lr
        for name, g in grads.items():
            g = g * factor
            m[name] = betas[0] * m[name] + (1 - betas[0]) * g
            v[name] = betas[1] * v[name] + (1 - betas[1]) * g * g
            m_hat = m[name] / (1 - betas[0] ** (step + 1))
            v_hat = v[name] / (1 - betas[1] ** (step + 1))
            w[name] = w[name] * (1 - rate * weight_decay) - rate * m_hat / (v_hat.sqrt() + eps)
        gaps = torch.cat([r['gap'] for r in records] or [torch.tensor([math.inf])])
        yield {'step': step, 'lr': rate, 'loss': loss, 'aux_loss': aux, 'grad_norm': norm,
               'gaps': gaps}, w


def adamw_steps(*args, **kwargs):
    """The same, all steps at once: (a list with the log of every step, the weights afterwards)."""
    done = list(adamw(*args, **kwargs))
    return [log for log, _ in done], done[-1][1]


# ---- [3] checkpoints and random models --------------------------------------------------------

def load(folder):
    """(config, weights by name) of a checkpoint folder, float32."""
    with open(os.path.join(folder, 'config.json')) as f:
        cfg = json.load(f)
    w = load_file(os.path.join(folder, 'model.safetensors'))
    return cfg, {name: t.float() for name, t in w.items()}


def save(folder, cfg, w):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(cfg, f, indent=1)
    save_file({name: t.float().contiguous() for name, t in w.items()},
              os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})


def as_type(w, dtype):
    return {name: t.to(dtype) for name, t in w.items()}


def random_config(rng):
    """A small legal config.json; rng is a numpy Generator. Sizes are anything, on purpose."""
    size = lambda low, high: int(rng.integers(low, high + 1))
    pick = lambda *options: options[size(0, len(options) - 1)]
    chance = lambda p: bool(rng.random() < p)
    vocab, layers, heads, n_group, topk_group = size(9, 90), size(1, 3), size(1, 4), None, None
    if chance(0.35):
        method, n_group, per_group = 'group_limited_greedy', size(1, 4), size(1, 4)
        topk_group, experts = size(1, n_group), n_group * per_group
        k = size(1, min(topk_group * per_group, 5))
    else:
        method, experts = 'greedy', size(1, 13)
        k = size(1, min(experts, 5))
        n_group, topk_group = pick((1, 1), (None, None))
    # Without the inner residual a chain squares the size of its stream, about, in every iteration:
    # more than two of them end in nothing or in very large numbers.
    chain = size(1, 4)
    residual = chain > 2 or chance(0.4)
    scaling = pick(None, 'linear', 'yarn', 'yarn')
    if scaling == 'linear':
        scaling = {'type': 'linear', 'factor': pick(1.0, 2.0, 3.5)}
        scaling |= pick({}, {}, {}, {'mscale_all_dim': 0.707})     # scales attention here, too
    elif scaling == 'yarn':
        scaling = {'type': 'yarn', 'factor': pick(1.0, 4.0, 40.0), 'beta_fast': pick(32, 8),
                   'original_max_position_embeddings': pick(8, 16, 100, 4096),
                   'beta_slow': pick(1, 2)}
        for key in 'mscale', 'mscale_all_dim':             # both may be missing
            scaling |= pick({}, {key: 0.707}, {key: 1.0})
    return {
        'vocab_size': vocab, 'hidden_size': size(5, 45), 'intermediate_size': size(3, 40),
        'moe_intermediate_size': size(1, 21), 'num_hidden_layers': layers,
        'num_attention_heads': heads, 'n_shared_experts': pick(None, 0, 1, 1, 2),
        'n_routed_experts': None if chance(0.04) else experts, 'ep_size': 1,
        'routed_scaling_factor': pick(1.0, 2.5, 0.7), 'kv_lora_rank': size(2, 21),
        'q_lora_rank': pick(None, size(2, 21)), 'qk_rope_head_dim': 2 * size(1, 5),
        'v_head_dim': size(1, 13), 'qk_nope_head_dim': size(1, 13), 'topk_method': method,
        'n_group': n_group, 'topk_group': topk_group, 'num_experts_per_tok': k,
        'moe_layer_freq': pick(1, 1, 1, 1, 2), 'first_k_dense_replace': pick(0, 0, int(layers > 1)),
        'norm_topk_prob': chance(0.4), 'scoring_func': 'softmax',
        'aux_loss_alpha': pick(0.0, 0.001, 0.05, 0.5), 'seq_aux': chance(0.4),
        'hidden_act': 'silu', 'max_position_embeddings': size(64, 200),
        'initializer_range': 0.02, 'rms_norm_eps': pick(1e-6, 1e-5, 1e-3),
        'bos_token_id': 0, 'eos_token_id': 1, 'tie_word_embeddings': chance(0.3),
        'rope_theta': pick(10000.0, 500.0, 1e6), 'rope_scaling': scaling,
        'attention_bias': chance(0.4), 'attention_dropout': 0.0, 'inner_iter': chain,
        'outer_residual': chance(0.5), 'inner_residual': residual, 'use_igate': chance(0.75),
        'torch_dtype': 'float32', 'architectures': ['CoeForCausalLM'],
        'num_key_value_heads': heads, 'model_type': 'coe_deepseekv2'}


def shapes(cfg, coe_weights):
    """Every tensor's shape by name, in the order of model.bin: a list of stacks, each a list of
    (name, shape) that lie behind one another there."""
    d, H, I = cfg['hidden_size'], cfg['num_attention_heads'], cfg['intermediate_size']
    R, r, f = cfg['kv_lora_rank'], cfg['q_lora_rank'], cfg['moe_intermediate_size']
    nope, rope, v = cfg['qk_nope_head_dim'], cfg['qk_rope_head_dim'], cfg['v_head_dim']
    E, C, S = cfg['n_routed_experts'], cfg['inner_iter'], cfg['n_shared_experts'] or 0
    bias, out = cfg['attention_bias'], []
    one = lambda name, *shape: out.append([(name, shape)])
    one('model.embed_tokens.weight', cfg['vocab_size'], d)
    for l in range(cfg['num_hidden_layers']):
        p = f'model.layers.{l}.'
        a, m = p + 'self_attn.', p + 'mlp.'
        one(p + 'input_layernorm.weight', d)
        if r is None:
            one(a + 'q_proj.weight', H * (nope + rope), d)
        else:
            one(a + 'q_a_proj.weight', r, d)
            if bias: one(a + 'q_a_proj.bias', r)
            one(a + 'q_a_layernorm.weight', r)
            one(a + 'q_b_proj.weight', H * (nope + rope), r)
        one(a + 'kv_a_proj_with_mqa.weight', R + rope, d)
        if bias: one(a + 'kv_a_proj_with_mqa.bias', R + rope)
        one(a + 'kv_a_layernorm.weight', R)
        one(a + 'kv_b_proj.weight', H * (nope + v), R)
        one(a + 'o_proj.weight', d, H * v)
        if bias: one(a + 'o_proj.bias', d)
        one(p + 'post_attention_layernorm.weight', d)
        if is_moe(cfg, l):
            gates = [f'{t}.' for t in range(C)] if cfg['use_igate'] else ['']
            out.append([(f'{m}gate.{t}weight', (E, d)) for t in gates])
            for proj, shape in ('gate', (f, d)), ('up', (f, d)), ('down', (d, f)):
                out.append([(f'{m}experts.{e}.{proj}_proj.weight', shape) for e in range(E)])
            if S:
                one(m + 'shared_experts.gate_proj.weight', f * S, d)
                one(m + 'shared_experts.up_proj.weight', f * S, d)
                one(m + 'shared_experts.down_proj.weight', d, f * S)
            if coe_weights and C > 1:
                out.append([(f'{m}coe_weights.{t}', (d,)) for t in range(C - 1)])
        else:
            one(m + 'gate_proj.weight', I, d)
            one(m + 'up_proj.weight', I, d)
            one(m + 'down_proj.weight', d, I)
    one('model.norm.weight', d)
    if not cfg['tie_word_embeddings']:
        one('lm_head.weight', cfg['vocab_size'], d)
    return out


def random_weights(cfg, rng, scale=1.0):
    """Random float32 weights: norms are not 1, biases not 0, gates larger, so that the choice of
    experts is clear. Where nothing is added to what the experts return, they are larger, too, or
    the stream would fade from one iteration to the next and all experts be alike to the gate.
    A third of the models that can be are upcycled ones (have coe_weights)."""
    w, down = {}, 0.5 if cfg['inner_residual'] else 4.0
    for name, shape in sum(shapes(cfg, rng.random() < 0.33), []):
        x = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
        if 'norm' in name:                          w[name] = 1 + 0.3 * x
        elif name.endswith('.bias'):                w[name] = 0.3 * x
        elif 'coe_weights' in name:                 w[name] = 0.5 * x
        elif name.startswith('model.embed_tokens'): w[name] = 0.7 * scale * x
        elif '.gate.' in name:                      w[name] = 1.5 * scale * x / math.sqrt(shape[1])
        elif 'down_proj' in name:                   w[name] = down * scale * x / math.sqrt(shape[1])
        else:                                       w[name] = scale * x / math.sqrt(shape[1])
    return w


# ---- [4] check --------------------------------------------------------------------------------

def far(a, b):
    """Largest difference, in parts of the largest number of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def far_norm(a, b, floor=0.0):
    """Norm of the difference, in parts of b's norm; floor keeps a tensor whose gradient is
    nothing but rounding from being held to a standard of its own."""
    return ((a - b).norm() / max(b.norm().item(), floor, 1e-30)).item()


def off(got, ref):
    """Relative distance of two log entries: loss, aux_loss and grad_norm."""
    return max(abs(got[key] - ref[key]) / max(abs(ref[key]), 1e-6)
               for key in ('loss', 'aux_loss', 'grad_norm'))


class Report:
    """Collects deviations, keeps the worst of each kind, and knows what is too much."""
    def __init__(self, name):
        self.name, self.worst = name, {}

    def add(self, kind, value, limit, what=''):
        if not value <= self.worst.get(kind, (-1,))[0]:    # so that NaN becomes the worst, too
            self.worst[kind] = (value, limit, what)

    def same(self, kind, equal, what=''):
        self.add(kind, 0.0 if equal else math.inf, 0.0, what)

    def end(self, note=''):
        ok, parts = True, []
        for kind, (value, limit, what) in self.worst.items():
            good = value <= limit
            text = ('same' if good else 'DIFFERENT') if limit == 0 else f'{value:.1e}'
            parts.append(f'{kind} {text}' + ('' if good else f' (limit {limit:.0e}) {what}'))
            ok = ok and good
        print(f'{self.name}: ' + ', '.join(parts) + note + ('' if ok else '   FAILED'), flush=True)
        return ok


def far_grads(grads, want):
    """(distance, name) of the worst tensor."""
    total = math.sqrt(sum((g * g).sum().item() for g in want.values()))
    return max((far_norm(grads[n].to(g.dtype), g, 1e-5 * total), n) for n, g in want.items())


def check(folder):
    cfg, w = load(folder)
    gold = load_file(os.path.join(folder, 'golden.safetensors'))
    with open(os.path.join(folder, 'golden.json')) as f:
        scalars = json.load(f)
    rep = Report(os.path.basename(os.path.normpath(folder)))
    tokens, targets = gold['tokens'].long(), gold['targets'].long()
    with torch.no_grad():
        logits, records, _ = forward(cfg, w, tokens)
    rep.add('logits', far(logits, gold['logits']), 2e-5)
    calls = {name for name in gold if name.startswith('routing.')}
    rep.same('routing', len(calls) == 2 * len(records), 'number of gate calls')
    for r in records:
        p = f'routing.{r["layer"]}.{r["iteration"]}.'
        rep.same('routing', torch.equal(r['experts'], gold[p + 'experts'].long()), p)
        rep.add('weights', far(r['weights'], gold[p + 'weights']), 2e-5, p)

    loss, aux, grads = loss_and_grads(cfg, w, tokens, targets)
    rep.add('loss', abs(loss / scalars['loss'] - 1), 1e-5)
    rep.add('aux', abs(aux / scalars['aux_loss'] - 1), 1e-5)
    want = {name[5:]: g for name, g in gold.items() if name.startswith('grad.')}
    rep.same('names', set(want) == set(grads))
    worst, name = far_grads(grads, want)
    rep.add('grads', worst, 1e-4, name)

    prompt = scalars['prompt_tokens']
    ids, _ = greedy(cfg, w, gold['tokens'][0, :prompt].tolist(), scalars['new_tokens'])
    rep.same('greedy', ids == gold['greedy'].tolist())

    a, steps = scalars['adamw'], scalars['trajectory']
    log, after = adamw_steps(cfg, w, gold['train.stream'].long(), scalars['batch_size'],
                             scalars['max_length'], len(steps), a['lr'], a['warmup_steps'],
                             a['betas'], a['eps'], a['weight_decay'], a['clip'])
    for got, ref in zip(log, steps):
        rep.add('steps', off(got, ref), 2e-4, f'step {ref["step"]}')
        rep.add('lr', abs(got['lr'] / ref['lr'] - 1), 1e-6)
    for name in after:
        rep.add('after', far_norm(after[name], gold['after.' + name]), 2e-4, name)
    return rep.end()


# ---- [5] compare ------------------------------------------------------------------------------

# How clear every choice of an expert must be, in log score: for one pass, many times the error
# that float32 makes there. Training accumulates errors, so there the error is measured: how far
# a float32 run of this file is from a float64 one.
CLEAR = 1e-4
CLEAR_TRAIN = 10            # times that error
CALM = 1e-5                 # and its loss and weights must not be further away than this, relative:
                            # in some random models rounding alone would be visible


def write_tokens(path, ids, wide):
    """A token file as llm.c writes it: 16 bits a token, or 32."""
    header = np.zeros(256, dtype='<i4')
    header[:3] = (20240801, 7, len(ids)) if wide else (20240520, 1, len(ids))
    with open(path, 'wb') as f:
        f.write(header.tobytes() + np.asarray(ids, dtype='<u4' if wide else '<u2').tobytes())


def unpack(data, cfg, w):
    """Tensors by name out of the bytes of a float32 weights section, laid out as in model.bin:
    every stack starts at a multiple of 64."""
    out, at = {}, 0
    for stack in shapes(cfg, any('coe_weights' in name for name in w)):
        at = (at + 63) // 64 * 64
        for name, shape in stack:
            n = math.prod(shape)
            out[name] = torch.tensor(np.frombuffer(data, '<f4', n, at)).view(shape)
            at += 4 * n
    return out


def read_model(path, cfg, w):
    with open(path, 'rb') as f:
        data = f.read()
    files, tokenizer = struct.unpack_from('<QQ', data, 16)
    return unpack(data[1024 + files + tokenizer:], cfg, w)


def read_tsv(path):
    with open(path) as f:
        head, *lines = [line.rstrip('\n').split('\t') for line in f]
    return [dict(zip(head, line)) for line in lines]


def call(command, *args):
    """Runs a program and returns its stdout; a failure is an exception with its stderr."""
    done = subprocess.run(shlex.split(command) + [str(a) for a in args], capture_output=True,
                          text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f'{command} exits {done.returncode}: {done.stderr.strip()[-400:]}')
    return done.stdout


def clear(records, which='gap'):
    """How clear the closest choice of these gate calls was."""
    return min([r[which].min().item() for r in records], default=math.inf)


def draw(rng, cfg, steps):
    """Random weights and tokens, and everything that the C programs will be asked about them;
    or None, where some expert is chosen by less than rounding may change. All in float64."""
    w32 = random_weights(cfg, rng)
    w, V = as_type(w32, torch.float64), cfg['vocab_size']

    # The more gate calls a token goes through, the fewer tokens, or there is always a close call.
    calls = cfg['inner_iter'] * sum(is_moe(cfg, l) for l in range(cfg['num_hidden_layers']))
    ids = torch.tensor(rng.integers(0, V, (1, int(rng.integers(9, 21 if calls > 4 else 41)))))
    with torch.no_grad():
        logits, routing, _ = forward(cfg, w, ids)
        logits32 = forward(cfg, w32, ids)[0]
    # order_gap: the trace has the order of the experts, too.
    if clear(routing, 'order_gap') < CLEAR or far(logits32.double(), logits) > CALM / 10:
        return None
    continued, margin = greedy(cfg, w, ids[0, :7].tolist(), 12)
    with torch.no_grad():
        greedy_records = forward(cfg, w, torch.tensor([continued]))[1]
    if margin < 1e-3 or clear(greedy_records) < CLEAR:
        return None

    # Training reads two batches over and over, for the same reason. They are written out as one
    # long stream, so that nothing depends on how its end is handled.
    B, L = int(rng.integers(1, 4)), int(rng.integers(2, 5 if calls > 4 else 11))
    micro, clip = int(rng.integers(1, B + 1)), int(rng.choice([1, 1, 5, 0]))    # 0: no clipping
    stream = torch.tensor(np.resize(rng.integers(0, V, 2 * B * L), steps * B * L + 1))
    records, batch = [], windows(stream, 0, B, L)
    grads = loss_and_grads(cfg, w, *batch, keep=records)[2]
    grads32 = loss_and_grads(cfg, w32, *batch)[2]
    if clear(records) < CLEAR or far_grads(grads32, grads)[0] > CALM / 5:
        return None
    lr, log, gap, error, noise = 1e-4 if calls > 4 else 1e-3, [], math.inf, 0.0, 0.0
    run = lambda w: adamw(cfg, w, stream, B, L, steps, lr, warmup_steps=3, clip=clip, micro=micro)
    for (entry, after), (entry32, after32) in zip(run(w), run(w32)):
        log.append(entry)
        gap = min(gap, entry['gaps'].min().item())
        near = entry['gaps'] < 0.5
        error = max([error] + (entry['gaps'] - entry32['gaps'])[near].abs().tolist())
        noise = max(noise, off(entry32, entry))
        if not gap > CLEAR_TRAIN * error or noise > CALM:
            return None
    noise = max([noise] + [far_norm(after32[n].double(), after[n]) for n in w])
    if noise > CALM:
        return None
    return {'cfg': cfg, 'w32': w32, 'w': w, 'ids': ids, 'logits': logits[0], 'records': routing,
            'greedy': continued, 'B': B, 'L': L, 'micro': micro, 'clip': clip, 'stream': stream,
            'grads': grads, 'lr': lr, 'log': log, 'after': after, 'gap': gap, 'noise': noise,
            'wide': bool(rng.random() < 0.5)}


def compare(case, name, opt, folder):
    """Every number of one case against the C programs; True where all are near enough."""
    cfg, w, B, L = case['cfg'], case['w'], case['B'], case['L']
    rep = Report(name)
    # The C programs round no worse than this file does in float32, but in another order.
    limit = min(max(30 * case['noise'], 5e-5), opt.tolerance)
    path = lambda file: os.path.join(folder, file)
    save(path('hf'), cfg, case['w32'])
    with open(path('ids.txt'), 'w') as f:
        f.write(' '.join(map(str, case['ids'][0].tolist())))
    write_tokens(path('stream.bin'), case['stream'].tolist(), case['wide'])
    try:
        call(opt.export, path('hf'), path('model.bin'), '--dtype', 'f32')
        stored = read_model(path('model.bin'), cfg, w)
        rep.same('export', all(torch.equal(stored[n], case['w32'][n]) for n in w))

        call(opt.run, path('model.bin'), '-m', 'eval', '--ids', '-f', path('ids.txt'),
             '--logits', path('logits'), '--trace', path('trace'))
        logits = torch.tensor(np.fromfile(path('logits'), '<f4')).double()
        rep.add('logits', far(logits.view(case['logits'].shape), case['logits']), 5e-5)
        trace = {tuple(int(line[k]) for k in ('position', 'layer', 'iteration', 'rank')): line
                 for line in read_tsv(path('trace'))}
        expected = 0
        for r in case['records']:
            for (pos, rank), e in np.ndenumerate(r['experts'].numpy()):
                line = trace.get((pos, r['layer'], r['iteration'], rank), {})
                expected += 1
                rep.same('routing', line.get('expert') == str(e)
                         and line.get('token') == str(case['ids'][0, pos].item()),
                         f'layer {r["layer"]} iteration {r["iteration"]} position {pos}')
                want = r['weights'][pos, rank].item()
                error = abs(float(line.get('weight', 'nan')) - want) / max(want, 1e-2)
                rep.add('weights', error, 1e-4)
        rep.same('routing', len(trace) == expected, f'{len(trace)} lines, not {expected}')

        with open(path('prompt.txt'), 'w') as f:
            f.write(' '.join(map(str, case['greedy'][:7])))
        out = call(opt.run, path('model.bin'), '--ids', '-f', path('prompt.txt'), '-n', 12,
                   '--temp', 0, '--repeat-penalty', 1, '--ignore-eos')
        rep.same('greedy', out.split() == list(map(str, case['greedy'])), out.strip())

        call(opt.dump_grads, path('model.bin'), path('stream.bin'), B, L, path('grads.bin'))
        with open(path('grads.bin'), 'rb') as f:
            worst, n = far_grads(unpack(f.read(), cfg, w), case['grads'])
        rep.add('grads', worst, 1e-4, n)

        out = call(opt.train, '--init', path('model.bin'), '-d', path('stream.bin'), '--val',
                   path('stream.bin'), '--sequential', '-b', B, '-l', L, '--micro_batch_size',
                   case['micro'], '-x', len(case['log']), '--learning_rate', f'{case["lr"]:.7f}',
                   '--warmup_steps', 3, '--lr_scheduler', 'constant', '--weight_decay', 0.01,
                   '--adam_beta1', 0.9, '--adam_beta2', 0.95, '--adam_epsilon', '0.00000001',
                   '--max_grad_norm', case['clip'], '--eval_steps', 0, '--save_steps', 0,
                   '--sample_steps', 0, '--log', path('log.tsv'), '-o', path('out.bin'))
        log = read_tsv(path('log.tsv'))
        if len(log) != len(case['log']):
            raise ValueError(f'log.tsv has {len(log)} steps')
        for got, ref in zip(log, case['log']):
            got = {key: float(got[key]) for key in ('loss', 'aux_loss', 'grad_norm', 'lr')}
            rep.add('steps', off(got, ref), limit, f'step {ref["step"]}: {got}')
            rep.add('lr', abs(got['lr'] / ref['lr'] - 1), 1e-5)
        after = read_model(path('out.bin'), cfg, w)
        for n in w:
            rep.add('after', far_norm(after[n].double(), case['after'][n]), limit, n)
        n = B * len(case['log'])                           # the windows of the whole stream
        with torch.no_grad():
            x, y = windows(case['stream'], 0, n, L)
            want = cross_entropy(forward(cfg, case['after'], x)[0], y).item()
        val = dict(line.split(maxsplit=1) for line in out.splitlines() if ' ' in line)
        rep.add('val_loss', abs(float(val.get('val_loss', 'nan')) / want - 1), limit)
    except Exception as e:                                 # whatever it is, this model failed
        rep.same('output', False, f'{type(e).__name__}: {e}')
    return rep.end(f' (lr {case["lr"]:.0e}, limit {limit:.0e}, closest choice {case["gap"]:.0e})')


# ---- [6] command line -------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description='the model a second time, in PyTorch')
    sub = parser.add_subparsers(dest='command', required=True)
    c = sub.add_parser('check', help='this file against golden folders')
    c.add_argument('folders', nargs='+')
    c = sub.add_parser('compare', help='the C programs against this file, on random models')
    c.add_argument('--train', default='./train')
    c.add_argument('--run', default='./run')
    c.add_argument('--export', default='python export.py')
    c.add_argument('--dump_grads', default='./tests/dump_grads')
    c.add_argument('--configs', type=int, default=30, help='models to compare')
    c.add_argument('--steps', type=int, default=50, help='AdamW steps of each')
    c.add_argument('--seed', type=int, default=1)
    c.add_argument('--first', type=int, default=0, help='number of the first model, to repeat one')
    c.add_argument('--tolerance', type=float, default=3e-4,
                   help='of the training steps, relative, at most')
    c.add_argument('--keep', help='a folder in which the files of each model stay')
    opt = parser.parse_args()

    if opt.command == 'check':
        results = [check(folder) for folder in opt.folders]
    else:
        os.environ.setdefault('OMP_NUM_THREADS', '1')
        results, number, redrawn, skipped = [], opt.first, 0, 0
        while len(results) < opt.configs:
            rng = np.random.default_rng([opt.seed, number])
            cfg, case, tries = random_config(rng), None, 0
            while case is None and tries < 12:             # the same kind of model, other weights
                case, tries = draw(rng, cfg, opt.steps), tries + 1
            redrawn += tries - 1
            if case is None:
                skipped += 1
            else:
                with tempfile.TemporaryDirectory() as folder:
                    folder = os.path.join(opt.keep or folder, f'model-{number}')
                    os.makedirs(folder, exist_ok=True)
                    results.append(compare(case, f'model {number}', opt, folder))
            number += 1
        print(f'{len(results)} random models compared; weights drawn again {redrawn} times and '
              f'{skipped} models left out, because\nrounding alone could change the choice of an '
              'expert or show in a result')
    print(f'{sum(results)} passed, {len(results) - sum(results)} failed')
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
