"""The model of coe.c in plain PyTorch, to be read beside it. Nothing here is fast.

    python tests/reference.py FOLDER "1 2 3"

reads config.json and model.safetensors in FOLDER and prints the tokens that follow 1 2 3.

The functions have the names and the order of those in coe.c, and then of those in train.c; PyTorch
makes the gradients. `config` is what config.json says, and `w` has all weights by their names in
Hugging Face's files. Activations have one row for each token of a batch, that is of B sequences of
n tokens, T = B*n in all; only attention needs to know which rows are one sequence.

Sizes: V vocab_size, d hidden_size, L layers, H heads, dn / dr / dv the widths of a head's key
without position, of its key with RoPE and of its value, r q_lora_rank, R kv_lora_rank, E experts, K
of them chosen, S shared ones, f moe_intermediate_size, I intermediate_size, C inner_iter.
Counters: token t, position p, choice k, expert e, channel or pair of channels i, head h, layer l,
iteration c of the chain.
"""
import math
import torch

# ---- [4] operations -----------------------------------------------------------------------------

# Scales each row so that the mean of its squares is 1, then each channel by its own weight. The
# small number eps keeps a row of zeros from being divided by zero.
def rmsnorm(w, name, x, eps):                              # x [..., width] -> [..., width]
    return w[name + '.weight'] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

# A linear layer. PyTorch stores its weight as [out, in]; a few layers have a bias [out], too.
def linear(w, name, x):                                    # x [..., in] -> [..., out]
    y = x @ w[name + '.weight'].T
    return y + w[name + '.bias'] if name + '.bias' in w else y

# ---- [5] the chain of experts -------------------------------------------------------------------

# A SwiGLU network. Each expert is one of width f, the shared experts are together one of width S*f,
# and a dense layer, which is a layer without experts, has one of width I.
def feed_forward(w, name, x):                              # x [rows, d] -> [rows, d]
    g, u = linear(w, name + '.gate_proj', x), linear(w, name + '.up_proj', x)
    return linear(w, name + '.down_proj', g * torch.sigmoid(g) * u)

# Tells whether layer l has experts.
def is_moe(config, l):
    return (config['n_routed_experts'] is not None and l >= config['first_k_dense_replace']
            and l % config['moe_layer_freq'] == 0)

# The columns of the largest numbers of each row, `count` of them, the largest first. Of equal
# numbers the one in the lower column comes first: a stable sort promises that, torch.topk does not.
def largest(x, count):                                     # x [rows, columns] -> [rows, count]
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :count]

# Chooses each token's K experts, that of the largest weight first, and their weights, by the scores
# of all experts. In DeepSeek-V3 (noaux_tc) the choice goes by score + bias, and the weight by score.
def choose(config, score, bias=None):   # score [T, E], bias [E] -> expert [T, K], weight [T, K]
    if config['topk_method'] == 'noaux_tc':
        return choose_v3(config, score, bias)
    if config['topk_method'] == 'group_limited_greedy':
        # Neighbouring experts form n_group groups. A token chooses among the topk_group groups
        # whose best experts have the largest scores; the scores in all other groups count as 0.
        group = score.view(len(score), config['n_group'], -1)           # [T, groups, E/groups]
        best = group.max(-1).values                                     # [T, groups]
        mask = torch.zeros_like(best).scatter(1, largest(best, config['topk_group']), 1.0)
        score = (group * mask[:, :, None]).flatten(1)                   # [T, E]
    elif config['topk_method'] != 'greedy':
        raise ValueError(f'topk_method {config["topk_method"]} is not implemented')
    expert = largest(score, config['num_experts_per_tok'])
    weight = score.gather(1, expert)
    if config['norm_topk_prob'] and config['num_experts_per_tok'] > 1:
        return expert, weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return expert, weight * config['routed_scaling_factor']

# A group is worth the sum of its two best; groups that are not chosen do not count at all.
def choose_v3(config, score, bias):
    T, groups = len(score), config['n_group'] or 1
    group = (score + bias).view(T, groups, -1)                          # [T, groups, E/groups]
    worth = group.topk(2).values.sum(-1)                                # [T, groups]
    mask = torch.zeros_like(worth).scatter(1, largest(worth, config['topk_group'] or 1), 1.0)
    z = group.masked_fill(mask[:, :, None] == 0, -math.inf).flatten(1)
    expert = largest(z, config['num_experts_per_tok'])
    order = largest(score.gather(1, expert), expert.shape[1])
    expert = expert.gather(1, order)
    weight = score.gather(1, expert)
    if config['norm_topk_prob']:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return expert, weight * config['routed_scaling_factor']

# The scores of router c in layer l, and its correction bias, if it has one. With use_igate each
# iteration has its own router; otherwise one router serves all of them.
def scores(config, w, l, c, x):     # x [T, d] -> score [T, E], bias [E] or None
    gate = f'model.layers.{l}.mlp.gate' + (f'.{c}' if config['use_igate'] else '')
    z = linear(w, gate, x)
    score = z.sigmoid() if config['scoring_func'] == 'sigmoid' else z.softmax(-1)
    return score, w.get(gate + '.e_score_correction_bias')

# The router of iteration c in layer l.
def route(config, w, l, c, x):      # x [T, d] -> expert, weight [T, K], score [T, E], bias [E]
    score, bias = scores(config, w, l, c, x)
    return *choose(config, score, bias), score, bias

# The feed-forward of layer l in iteration c. The experts are the same in all iterations, and only
# the choice is made anew. If there is a list `records`, the choice is appended to it.
def ffn_forward(config, w, l, c, x, records=None):         # x [T, d] -> [T, d]
    mlp = f'model.layers.{l}.mlp'
    if not is_moe(config, l):
        return feed_forward(w, mlp, x)
    expert, weight, score, bias = route(config, w, l, c, x)
    if records is not None:
        records.append((l, c, expert, weight, score, bias))
    ffn = torch.zeros_like(x)
    for e in range(config['n_routed_experts']):
        t, k = (expert == e).nonzero(as_tuple=True)        # All places where e is choice k of t.
        y = feed_forward(w, f'{mlp}.experts.{e}', x[t])
        ffn = ffn.index_add(0, t, weight[t, k, None] * y)
    return ffn + feed_forward(w, mlp + '.shared_experts', x) if config['n_shared_experts'] else ffn

# The chain of layer l: the feed-forward C times in a row, starting from the normed stream. Without
# outer_residual the stream x itself goes no further than the norm. That looks like a mistake, but
# the models of the paper are made this way. With prenorm_chain, what the chain has added to its
# start goes back to the stream.
def chain_forward(config, w, l, x, records=None):          # x [T, d] -> [T, d]
    layer = f'model.layers.{l}'
    # A model with coe_weights was made from a DeepSeek-V2. No layer of it uses inner_residual.
    upcycled = any('.coe_weights.' in name for name in w)
    y = y_0 = rmsnorm(w, layer + '.post_attention_layernorm', x, config['rms_norm_eps'])
    prenorm = config.get('prenorm_chain', False)
    for c in range(config['inner_iter'] if is_moe(config, l) else 1):
        ffn = ffn_forward(config, w, l, c, y, records)
        if upcycled:
            y = y + w[f'{layer}.mlp.coe_weights.{c - 1}'] * ffn if c > 0 else ffn
        else:
            y = y + ffn if config['inner_residual'] or prenorm else ffn
    if prenorm:
        return x + (y - y_0)
    return y + x if config['outer_residual'] else y

# ---- [6] attention ------------------------------------------------------------------------------

# YaRN multiplies cosines, sines and scores by such numbers. It makes the context `factor` times as
# long, and m is the key mscale or mscale_all_dim of config.json.
def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

# RoPE turns pair i of a vector at position p by the angle p * omega_i; these are the cosines and
# sines of all angles. rope_scaling slows the turning for contexts longer than those in training.
def rope_table(config, n, dtype):                          # -> cos [n, dr/2], sin [n, dr/2]
    dr, theta, scaling = config['qk_rope_head_dim'], config['rope_theta'], config['rope_scaling']
    p = torch.arange(n, dtype=torch.float64)
    i = torch.arange(dr // 2, dtype=torch.float64)
    omega, amplitude = theta ** (-2 * i / dr), 1.0
    if scaling and scaling['type'] == 'linear':
        p = p / scaling['factor']
    elif scaling and scaling['type'] == 'yarn':
        # YaRN (arXiv 2309.00071) asks how often a pair turns around in the original context. With
        # more than beta_fast turns it keeps its speed, with fewer than beta_slow it becomes slower
        # by `factor`, and on the ramp between them it gets a mixture of both speeds.
        factor, original = scaling['factor'], scaling.get('original_max_position_embeddings', 4096)
        def pair(turns):
            return dr * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))
        low = max(math.floor(pair(scaling.get('beta_fast', 32))), 0)
        high = min(math.ceil(pair(scaling.get('beta_slow', 1))), dr - 1)
        ramp = ((i - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        omega = omega / factor * ramp + omega * (1 - ramp)
        amplitude = (mscale(factor, scaling.get('mscale', 1))
                     / mscale(factor, scaling.get('mscale_all_dim', 0)))
    elif scaling:
        raise ValueError(f'rope_scaling type {scaling["type"]} is not implemented')
    angle = p[:, None] * omega
    return (angle.cos() * amplitude).to(dtype), (angle.sin() * amplitude).to(dtype)

# The factor on all scores of attention. mscale is squared: once for the query, once for the key.
def attention_scale(config):
    scaling = config['rope_scaling'] or {}
    m = mscale(scaling.get('factor', 1), scaling.get('mscale_all_dim', 0))
    return m * m / math.sqrt(config['qk_nope_head_dim'] + config['qk_rope_head_dim'])

# Turns the pairs of neighbouring channels at each position by the angles in the tables.
def rope(x, cos, sin):                                     # x [..., n, dr] -> [..., n, dr]
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).flatten(-2)

# The stream plus multi-head latent attention (arXiv 2405.04434) over its norm, in layer l. Keys and
# values of all heads come from one latent of R numbers a token, except k_rope, the part of the key
# with RoPE, which all heads share. The latent and k_rope are all that run.c keeps of past tokens.
def attention_forward(config, w, l, x, B):                 # x [T, d] -> [T, d]
    H, R, n = config['num_attention_heads'], config['kv_lora_rank'], len(x) // B
    dn, dr, dv = config['qk_nope_head_dim'], config['qk_rope_head_dim'], config['v_head_dim']
    attn, eps = f'model.layers.{l}.self_attn', 1e-6        # This eps does not depend on config.
    cos, sin = rope_table(config, n, x.dtype)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)    # True where the key is a later token's.
    norm = rmsnorm(w, f'model.layers.{l}.input_layernorm', x, config['rms_norm_eps'])
    out = []
    for y in norm.split(n):                                # y [n, d] is one sequence.
        if config['q_lora_rank'] is None:
            q = linear(w, attn + '.q_proj', y)
        else:
            q = rmsnorm(w, attn + '.q_a_layernorm', linear(w, attn + '.q_a_proj', y), eps)  # [n, r]
            q = linear(w, attn + '.q_b_proj', q)
        latent, k_rope = linear(w, attn + '.kv_a_proj_with_mqa', y).split([R, dr], -1)
        latent = rmsnorm(w, attn + '.kv_a_layernorm', latent, eps)      # [n, R]
        kv = linear(w, attn + '.kv_b_proj', latent)
        q = q.view(n, H, dn + dr).transpose(0, 1)                       # [H, n, dn+dr]
        kv = kv.view(n, H, dn + dv).transpose(0, 1)                     # [H, n, dn+dv]
        q_nope, q_rope = q.split([dn, dr], -1)
        k_nope, v = kv.split([dn, dv], -1)
        # In head h, the token at position p compares its query with the key of position j.
        score = (torch.einsum('hpi,hji->hpj', q_nope, k_nope)
                 + torch.einsum('hpi,ji->hpj', rope(q_rope, cos, sin), rope(k_rope, cos, sin)))
        score = (score * attention_scale(config)).masked_fill(future, -math.inf)        # [H, n, n]
        heads = (score.softmax(-1) @ v).transpose(0, 1).reshape(n, H * dv)
        out.append(linear(w, attn + '.o_proj', heads))
    return x + torch.cat(out)

# ---- [7] forward --------------------------------------------------------------------------------

# The whole model up to the rows that lm_head turns into logits.
def forward(config, w, tokens, records=None):              # tokens [B, n] -> [T, d]
    x = w['model.embed_tokens.weight'][tokens.flatten()]
    for l in range(config['num_hidden_layers']):
        x = attention_forward(config, w, l, x, len(tokens))
        x = chain_forward(config, w, l, x, records)
    return rmsnorm(w, 'model.norm', x, config['rms_norm_eps'])

# The logits of each row: one number for each token that may come next, larger if more likely.
def logits_forward(config, w, x):                          # x [rows, d] -> [rows, V]
    return linear(w, 'model.embed_tokens' if config['tie_word_embeddings'] else 'lm_head', x)

# How much the token that did come next surprises the model: -log of its probability, in nats.
def cross_entropy(logits, target):                         # [rows, V], [rows] -> [rows]
    return -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

# The tokens and `more` further ones, each the likeliest. Every step computes the whole text again.
@torch.no_grad()
def generate(config, w, tokens, more):
    for _ in range(more):
        x = forward(config, w, torch.tensor([tokens]))
        tokens = tokens + [logits_forward(config, w, x[-1:]).argmax().item()]
    return tokens

# ---- train.c: the loss and its gradient ---------------------------------------------------------

# The balancing loss of one call of a router. It is large when experts that are chosen often have
# high scores, too, in each sequence (seq_aux) or in the whole batch. Only the scores have a
# gradient: the counts are constants to it. Sigmoids are made to sum to 1, as a softmax does.
def balance(config, expert, score, B):                     # [T, K], [T, E] -> one number
    K, E, groups, total = expert.shape[1], score.shape[1], B if config['seq_aux'] else 1, 0.0
    if config['scoring_func'] == 'sigmoid':
        score = score / score.sum(-1, keepdim=True)
    for chosen, s in zip(expert.view(groups, -1, K), score.view(groups, -1, E)):
        count = torch.bincount(chosen.flatten(), minlength=E).to(s.dtype)               # [E]
        total = total + (count * E / (len(s) * K) * s.mean(0)).sum()
    return config['aux_loss_alpha'] * total / groups

# A target that has no loss: it is padding, or belongs to a question whose answer is learned.
NO_TARGET = -1

# The mean cross entropy of the targets that have a loss, the sum of all balancing losses, and a
# list of all choices of experts. Training works to make the sum of the two losses small.
def loss(config, w, tokens, targets):                      # tokens, targets [B, n]
    records = []
    x = forward(config, w, tokens, records)
    targets = targets.flatten()
    counts = targets != NO_TARGET
    nats = cross_entropy(logits_forward(config, w, x[counts]), targets[counts])
    mean = nats.sum() / max(len(nats), 1)
    aux = torch.zeros_like(mean)
    for l, c, expert, weight, score, bias in records:
        aux = aux + balance(config, expert, score, len(tokens))
    return mean, aux, records

# Both losses of a batch, the gradient of their sum by the names of the weights, and all choices. A
# batch that needs too much memory is taken in micro-batches of `micro` sequences, one after the
# other. Each counts by its share of the targets, in its balancing losses as well; of the sequences
# in a batch that has no targets.
def batch_gradient(config, w, tokens, targets, micro=None):
    w = {name: x.detach().requires_grad_() for name, x in w.items()}
    grad = {name: torch.zeros_like(x) for name, x in w.items()}
    batch_mean, batch_aux, batch_records, micro = 0.0, 0.0, [], micro or len(tokens)
    all_targets = (targets != NO_TARGET).sum().item()
    for x, y in zip(tokens.split(micro), targets.split(micro)):
        count = (y != NO_TARGET).sum().item()
        share = count / all_targets if all_targets else len(x) / len(tokens)
        mean, aux, records = loss(config, w, x, y)
        # A weight that took no part has a gradient of 0.
        part = torch.autograd.grad((mean + aux) * share, list(w.values()), allow_unused=True,
                                   materialize_grads=True)
        for name, g in zip(w, part):
            grad[name] += g
        batch_mean, batch_aux = batch_mean + mean.item() * share, batch_aux + aux.item() * share
        batch_records += records
    return batch_mean, batch_aux, grad, batch_records

# ---- train.c: AdamW -----------------------------------------------------------------------------
# `recipe` has the settings of a training run by their names on the command line of ./train. Steps
# are counted from 0.

# The learning rate rises along a line in the warm-up steps. Then it stays, or falls along a cosine.
def learning_rate(recipe, step):
    full, warmup, steps = recipe['learning_rate'], recipe['warmup_steps'], recipe['max_steps']
    warmup = math.ceil(recipe['warmup_ratio'] * steps) if warmup is None else warmup
    if step < warmup:
        return full * ((step + 1) / warmup)
    if recipe['lr_scheduler'] == 'constant':
        return full
    return full * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

# One step of AdamW (arXiv 1711.05101), which changes w, m and v. m and v are dictionaries like w
# and hold running means of the gradient and of its square. The gradient of all weights together is
# one long vector: if it is longer than max_grad_norm, it is cut to that length first, unless
# max_grad_norm is 0. The length before the cut is returned. Correction biases do not decay; their
# gradient is 0.
def adamw(w, m, v, grad, recipe, step):
    norm = math.sqrt(sum((g * g).sum().item() for g in grad.values()))
    limit = recipe['max_grad_norm']
    clip = limit / (norm + 1e-6) if limit and norm > limit else 1.0
    b1, b2, rate = recipe['adam_beta1'], recipe['adam_beta2'], learning_rate(recipe, step)
    for name in w:
        g = grad[name] * clip
        m[name] = b1 * m[name] + (1 - b1) * g
        v[name] = b2 * v[name] + (1 - b2) * g * g
        m_hat, v_hat = m[name] / (1 - b1 ** (step + 1)), v[name] / (1 - b2 ** (step + 1))
        decay = 0 if name.endswith('e_score_correction_bias') else recipe['weight_decay']
        w[name] = (w[name] * (1 - rate * decay)
                   - rate * m_hat / (v_hat.sqrt() + recipe['adam_epsilon']))
    return norm

# DeepSeek-V3's way to balance experts, after a step whose choices are in records: the correction
# bias of an expert goes up by `speed` if it got fewer tokens than the mean, and down if more.
def update_biases(config, w, records, speed):
    counts = {}
    for l, c, expert, *_ in records:
        name = f'model.layers.{l}.mlp.gate' + (f'.{c}' if config['use_igate'] else '')
        count = torch.bincount(expert.flatten(), minlength=config['n_routed_experts'])
        counts[name] = counts.get(name, 0) + count
    for name, count in counts.items():
        name += '.e_score_correction_bias'
        if name in w:
            w[name] = w[name] + speed * torch.sign(count.sum() / len(count) - count)

if __name__ == '__main__':
    import json, sys
    from safetensors.torch import load_file
    if len(sys.argv) != 3:
        sys.exit('usage: python tests/reference.py FOLDER "1 2 3"')
    with open(sys.argv[1] + '/config.json') as f:
        config = json.load(f)
    w = {name: x.float() for name, x in load_file(sys.argv[1] + '/model.safetensors').items()}
    prompt = [int(token) for token in sys.argv[2].split()]
    print(*generate(config, w, prompt, 16)[len(prompt):])
