"""Compares the model of tests/reference.py with the C programs, and with the original's numbers.

    python tests/oracle.py check   GOLDEN_DIR...     # reference.py against the original's numbers
    python tests/oracle.py compare --train ./train --run ./run --export 'python export.py'
                                                     # the C programs against reference.py

Nothing is shared with the C code. `compare` computes in float64, so that what it reports is the
rounding of the C programs alone.

Needs torch, numpy and safetensors. Letters as in reference.py; L is the length of a window here.

Contents: [1] passes over the model, with how clear each choice was  [2] training
          [3] checkpoints and random models   [4] check   [5] compare   [6] command line
"""
import argparse, json, math, os, shlex, struct, subprocess, sys, tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import reference
from reference import is_moe

torch.set_num_threads(1)        # the models are tiny: a second thread only waits


# ---- [1] passes over the model, with how clear each choice was --------------------------------

def steps_down(score):
    """By how much log each number of a row, best first, lies above the next one: [rows, n]. Two
    zeros are a tie, and behind the last one nothing is close."""
    value = score.sort(dim=-1, descending=True).values.log()
    step = (value[:, :-1] - value[:, 1:]).nan_to_num(nan=0.0, posinf=math.inf)
    return torch.cat([step, torch.full_like(value[:, :1], math.inf)], -1)


def look_at(cfg, record):
    """What reference.py recorded of one call of a router, by name, with how clear each token's
    choice was: `gap` of the set (the K-th expert against the next one), `order_gap` also of the
    order. Where groups are chosen first, their choice counts, too."""
    layer, iteration, experts, weights, score, bias = record
    allowed, K = score.detach(), experts.shape[1]
    if bias is not None:
        return look_at_v3(cfg, record)
    group_gap = torch.full_like(allowed[:, 0], math.inf)
    if cfg['topk_method'] == 'group_limited_greedy':
        G, kept = cfg['n_group'], cfg['topk_group']
        best = allowed.view(len(allowed), G, -1).max(-1).values                 # [B*T, G]
        group_gap = steps_down(best)[:, kept - 1]
        enough = best >= best.topk(kept).values[:, -1:]
        allowed = allowed * enough.repeat_interleave(allowed.shape[1] // G, 1)
    step = steps_down(allowed)
    return {'layer': layer, 'iteration': iteration, 'experts': experts, 'weights': weights,
            'gap': torch.minimum(step[:, K - 1], group_gap),
            'order_gap': torch.minimum(step[:, :K].min(-1).values, group_gap)}


def look_at_v3(cfg, record):
    """The same where the choice goes by score + bias, which may be negative: gaps are differences."""
    layer, iteration, experts, weights, score, bias = record
    z, K, groups = (score + bias).detach(), experts.shape[1], cfg['n_group'] or 1
    down = lambda x: (lambda v: torch.cat([v[:, :-1] - v[:, 1:], torch.full_like(v[:, :1], math.inf)],
                                          -1))(x.sort(dim=-1, descending=True).values)
    worth = z.view(len(z), groups, -1).topk(2).values.sum(-1)
    kept = cfg['topk_group'] or 1
    group_gap = down(worth)[:, kept - 1]
    enough = worth >= worth.topk(kept).values[:, -1:]
    z = z.masked_fill(~enough.repeat_interleave(z.shape[1] // groups, 1), -math.inf)
    gap = torch.minimum(down(z)[:, K - 1].nan_to_num(nan=math.inf), group_gap)
    order = down(score.detach().gather(1, experts)).min(-1).values if K > 1 else gap
    return {'layer': layer, 'iteration': iteration, 'experts': experts, 'weights': weights,
            'gap': gap, 'order_gap': torch.minimum(order, gap)}


@torch.no_grad()
def forward(cfg, w, tokens):                               # tokens [B, T]
    """Logits [B, T, V] and what look_at says of every choice of experts."""
    records = []
    logits = reference.logits_forward(cfg, w, reference.forward(cfg, w, tokens, records))
    return logits.view(*tokens.shape, -1), [look_at(cfg, r) for r in records]


def greedy(cfg, w, prompt, n):
    """The prompt and n more tokens, past EOS too; how clear the closest choice of a token was, in
    parts of the largest logit; and what look_at says of every choice of experts."""
    ids = reference.generate(cfg, w, list(prompt), n)
    logits, records = forward(cfg, w, torch.tensor([ids]))
    logits = logits[0, len(prompt) - 1:-1]                 # [n, V]
    two = logits.topk(2).values
    return ids, ((two[:, 0] - two[:, 1]) / logits.abs().max(-1).values).min().item(), records


# ---- [2] training -----------------------------------------------------------------------------

def loss_and_grads(cfg, w, tokens, targets, micro=None, with_records=False):
    """Mean cross entropy, balancing losses, the gradient of their sum by name, and what look_at
    says of every choice of experts. With micro, that many sequences are taken at once."""
    loss, aux, grads, records = reference.batch_gradient(cfg, w, tokens, targets, micro)
    looks = [look_at(cfg, r) for r in records]
    return loss, aux, grads, looks if not with_records else (looks, records)


def windows(stream, first, B, L):                          # inputs and targets, both [B, L]
    """Sequence b holds tokens [(first + b)*L, +L] and predicts the same shifted by one."""
    at = [(first + b) * L for b in range(B)]
    return (torch.stack([stream[i:i + L] for i in at]),
            torch.stack([stream[i + 1:i + L + 1] for i in at]))


def documents(stream, first, B, L, eos=1):                 # inputs and targets, both [B, L]
    """Sequence b holds document first + b of the stream, cut to L + 1 tokens or padded with EOS."""
    ends = (stream == eos).nonzero().flatten().tolist()
    inputs, targets = torch.full((B, L), eos), torch.full((B, L), reference.NO_TARGET)
    for b in range(B):
        start = ends[first + b - 1] + 1 if first + b else 0
        document = stream[start:ends[first + b] + 1][:L + 1]
        inputs[b, :len(document)] = document[:L]
        targets[b, :len(document) - 1] = document[1:]
    return inputs, targets


def adamw(cfg, w, stream, B, L, steps, lr, warmup_steps=0, betas=(0.9, 0.95), eps=1e-8,
          weight_decay=0.01, clip=1.0, micro=None, samples=windows, bias_speed=0.0):
    """Trains on samples of the stream in file order, at a constant rate after the warm-up.
    Yields after every step (log, weights): the loss before the update, aux_loss, grad_norm
    before clipping, and how clear every choice of experts was (gaps)."""
    recipe = {'learning_rate': lr, 'warmup_steps': warmup_steps, 'max_steps': steps,
              'lr_scheduler': 'constant', 'adam_beta1': betas[0], 'adam_beta2': betas[1],
              'adam_epsilon': eps, 'weight_decay': weight_decay, 'max_grad_norm': clip}
    w = dict(w)
    m = {name: torch.zeros_like(t) for name, t in w.items()}
    v = {name: torch.zeros_like(t) for name, t in w.items()}
    for step in range(steps):
        loss, aux, grads, (records, calls) = loss_and_grads(
            cfg, w, *samples(stream, step * B, B, L), micro, with_records=True)
        norm = reference.adamw(w, m, v, grads, recipe, step)
        reference.update_biases(cfg, w, calls, bias_speed)
        gaps = torch.cat([r['gap'] for r in records] or [torch.tensor([math.inf])])
        yield {'step': step, 'lr': reference.learning_rate(recipe, step), 'loss': loss,
               'aux_loss': aux, 'grad_norm': norm, 'gaps': gaps}, w


def adamw_steps(*args, **kwargs):
    """All steps of adamw at once: (a list with the log of every step, the weights afterwards)."""
    done = list(adamw(*args, **kwargs))
    return [log for log, _ in done], done[-1][1]


# ---- [3] checkpoints and random models --------------------------------------------------------

def load(folder):
    """(config, weights by name) of a checkpoint folder, float32."""
    with open(os.path.join(folder, 'config.json')) as f:
        cfg = json.load(f)
    if cfg['model_type'] == 'deepseek_v3':
        cfg |= {'inner_iter': 1, 'inner_residual': False, 'outer_residual': True, 'use_igate': False}
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
    scoring = 'softmax'
    if chance(0.25):                                       # DeepSeek-V3's router
        groups = size(1, 4)
        experts, scoring, method = groups * size(2, 5), 'sigmoid', 'noaux_tc'
        n_group, topk_group = pick((groups, size(1, groups)), (groups, groups))
        if groups == 1:
            n_group, topk_group = pick((1, 1), (None, None))
        k = size(1, min((topk_group or 1) * experts // groups, 5))
    prenorm = chance(0.25)
    outer = chance(0.5) and not prenorm
    more = {'prenorm_chain': True} if prenorm else {}
    return more | {
        'vocab_size': vocab, 'hidden_size': size(5, 45), 'intermediate_size': size(3, 40),
        'moe_intermediate_size': size(1, 21), 'num_hidden_layers': layers,
        'num_attention_heads': heads, 'n_shared_experts': pick(None, 0, 1, 1, 2),
        'n_routed_experts': None if chance(0.04) else experts, 'ep_size': 1,
        'routed_scaling_factor': pick(1.0, 2.5, 0.7), 'kv_lora_rank': size(2, 21),
        'q_lora_rank': pick(None, size(2, 21)), 'qk_rope_head_dim': 2 * size(1, 5),
        'v_head_dim': size(1, 13), 'qk_nope_head_dim': size(1, 13), 'topk_method': method,
        'n_group': n_group, 'topk_group': topk_group, 'num_experts_per_tok': k,
        'moe_layer_freq': pick(1, 1, 1, 1, 2), 'first_k_dense_replace': pick(0, 0, int(layers > 1)),
        'norm_topk_prob': chance(0.4), 'scoring_func': scoring,
        'aux_loss_alpha': pick(0.0, 0.001, 0.05, 0.5), 'seq_aux': chance(0.4),
        'hidden_act': 'silu', 'max_position_embeddings': size(64, 200),
        'initializer_range': 0.02, 'rms_norm_eps': pick(1e-6, 1e-5, 1e-3),
        'bos_token_id': 0, 'eos_token_id': 1, 'tie_word_embeddings': chance(0.3),
        'rope_theta': pick(10000.0, 500.0, 1e6), 'rope_scaling': scaling,
        'attention_bias': chance(0.4), 'attention_dropout': 0.0, 'inner_iter': chain,
        'outer_residual': outer, 'inner_residual': residual and not prenorm,
        'use_igate': chance(0.75),
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
            if cfg['topk_method'] == 'noaux_tc':
                out.append([(f'{m}gate.{t}e_score_correction_bias', (E,)) for t in gates])
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
    prenorm = cfg.get('prenorm_chain', False)
    w, down = {}, 0.5 if cfg['inner_residual'] or prenorm else 4.0
    for name, shape in sum(shapes(cfg, rng.random() < 0.33 and not prenorm), []):
        x = torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
        if 'norm' in name:                          w[name] = 1 + 0.3 * x
        elif name.endswith('_bias'):                w[name] = 0.1 * x
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
    """(distance, name) of the worst tensor. Where a gradient cancels out to nothing at all, as that
    of a query that sees one key, rounding of the terms is left: so much less is asked of it."""
    total = math.sqrt(sum((g * g).sum().item() for g in want.values()))
    nothing = 1e-12 * total
    floor = lambda g: (1e-5 if g.norm() > nothing else 1e-2) * total
    return max((far_norm(grads[n].to(g.dtype), g, floor(g)), n) for n, g in want.items())


def check(folder):
    cfg, w = load(folder)
    gold = load_file(os.path.join(folder, 'golden.safetensors'))
    with open(os.path.join(folder, 'golden.json')) as f:
        scalars = json.load(f)
    rep = Report(os.path.basename(os.path.normpath(folder)))
    tokens, targets = gold['tokens'].long(), gold['targets'].long()
    logits, records = forward(cfg, w, tokens)
    rep.add('logits', far(logits, gold['logits']), 2e-5)
    calls = {name for name in gold if name.startswith('routing.')}
    rep.same('routing', len(calls) == 2 * len(records), 'number of gate calls')
    for r in records:
        p = f'routing.{r["layer"]}.{r["iteration"]}.'
        rep.same('routing', torch.equal(r['experts'], gold[p + 'experts'].long()), p)
        rep.add('weights', far(r['weights'], gold[p + 'weights']), 2e-5, p)

    loss, aux, grads, _ = loss_and_grads(cfg, w, tokens, targets)
    rep.add('loss', abs(loss / scalars['loss'] - 1), 1e-5)
    rep.add('aux', abs(aux - scalars['aux_loss']), 1e-5 * abs(scalars['aux_loss']))
    want = {name[5:]: g for name, g in gold.items() if name.startswith('grad.')}
    rep.same('names', set(want) == set(grads))
    worst, name = far_grads(grads, want)
    rep.add('grads', worst, 1e-4, name)

    prompt = scalars['prompt_tokens']
    ids, _, _ = greedy(cfg, w, gold['tokens'][0, :prompt].tolist(), scalars['new_tokens'])
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
# a float32 run of reference.py is from a float64 one.
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
    """Tensors by name out of a model.bin of version 1 or 2; its weights start behind the header,
    the config (a section in version 2, in the header of version 1), files and tokenizer."""
    with open(path, 'rb') as f:
        data = f.read()
    version, = struct.unpack_from('<I', data, 4)
    header = 1024, *struct.unpack_from('<QQ', data, 16)
    if version == 2:
        header = 64, *struct.unpack_from('<QQQ', data, 24)
    return unpack(data[sum(header):], cfg, w)


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
    logits, routing = forward(cfg, w, ids)
    logits32 = forward(cfg, w32, ids)[0]
    # order_gap: the trace has the order of the experts, too.
    if clear(routing, 'order_gap') < CLEAR or far(logits32.double(), logits) > CALM / 10:
        return None
    continued, margin, greedy_records = greedy(cfg, w, ids[0, :7].tolist(), 12)
    if margin < 1e-3 or clear(greedy_records) < CLEAR:
        return None

    # Training reads two batches over and over, for the same reason. They are written out as one
    # long stream, so that nothing depends on how its end is handled.
    B, L = int(rng.integers(1, 4)), int(rng.integers(2, 5 if calls > 4 else 11))
    micro, clip = int(rng.integers(1, B + 1)), int(rng.choice([1, 1, 5, 0]))    # 0: no clipping
    packing = bool(rng.random() < 0.5)
    if packing:
        samples, stream = windows, np.resize(rng.integers(0, V, 2 * B * L), steps * B * L + 1)
    else:   # Some documents are cut, and some are an EOS alone, which leaves nothing to predict.
        lengths = [int(rng.integers(1 if i % B else 2, L + 4)) for i in range(2 * B)]
        some = [[*rng.choice([0, *range(2, V)], n - 1), 1] for n in lengths]
        samples = documents
        stream = sum((some[i % (2 * B)] for i in range(steps * B)), [])
    stream = torch.tensor(np.array(stream))
    batch = samples(stream, 0, B, L)
    grads, records = loss_and_grads(cfg, w, *batch)[2:]
    grads32 = loss_and_grads(cfg, w32, *batch)[2]
    if clear(records) < CLEAR or far_grads(grads32, grads)[0] > CALM / 5:
        return None
    lr, log, gap, error, noise = 1e-4 if calls > 4 else 1e-3, [], math.inf, 0.0, 0.0
    speed = float(rng.choice([0, 0.004, 0.03])) if cfg['topk_method'] == 'noaux_tc' else 0.0
    run = lambda w: adamw(cfg, w, stream, B, L, steps, lr, warmup_steps=3, clip=clip, micro=micro,
                          samples=samples, bias_speed=speed)
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
            'wide': bool(rng.random() < 0.5), 'packing': packing, 'samples': samples, 'speed': speed}


def compare(case, name, opt, folder):
    """Every number of one case against the C programs; True where all are near enough."""
    cfg, w, B, L = case['cfg'], case['w'], case['B'], case['L']
    rep = Report(name)
    # The C programs round no worse than reference.py does in float32, but in another order.
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

        x, y = case['samples'](case['stream'], 0, B, L)
        counts = y != reference.NO_TARGET
        for file, ids in ('inputs', x), ('targets', y.clamp(0)), ('counts', counts.int()):
            write_tokens(path(file), ids.flatten().tolist(), case['wide'])
        call(opt.dump_grads, path('model.bin'), path('inputs'), B, L, path('grads.bin'),
             path('targets'), path('counts'))
        with open(path('grads.bin'), 'rb') as f:
            worst, n = far_grads(unpack(f.read(), cfg, w), case['grads'])
        rep.add('grads', worst, 1e-4, n)

        out = call(opt.train, '--init', path('model.bin'), '-d', path('stream.bin'), '--val',
                   path('stream.bin'), '--sequential', '-b', B, '-l', L,
                   '--packing', str(case['packing']).lower(), '--micro_batch_size',
                   case['micro'], '-x', len(case['log']), '--learning_rate', f'{case["lr"]:.7f}',
                   '--bias_update_speed', case['speed'], '--warmup_steps', 3, '--lr_scheduler', 'constant', '--weight_decay', 0.01,
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
        x, y = case['samples'](case['stream'], 0, B * len(case['log']), L)
        with torch.no_grad():
            want = reference.loss(cfg, case['after'], x, y)[0].item()
        val = dict(line.split(maxsplit=1) for line in out.splitlines() if ' ' in line)
        rep.add('val_loss', abs(float(val.get('val_loss', 'nan')) / want - 1), limit)
    except Exception as e:                                 # whatever it is, this model failed
        rep.same('output', False, f'{type(e).__name__}: {e}')
    kind = "windows" if case["packing"] else "documents"
    kind += ", sigmoid" * (cfg['scoring_func'] == 'sigmoid') + \
        ", prenorm" * cfg.get('prenorm_chain', False)
    return rep.end(f' ({kind}, lr {case["lr"]:.0e}, limit {limit:.0e}, closest choice '
                   f'{case["gap"]:.0e})')


# ---- [6] command line -------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description='compares tests/reference.py with the C programs')
    sub = parser.add_subparsers(dest='command', required=True)
    c = sub.add_parser('check', help='reference.py against golden folders')
    c.add_argument('folders', nargs='+')
    c = sub.add_parser('compare', help='the C programs against reference.py, on random models')
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
