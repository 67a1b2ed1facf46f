// Every gradient against central differences, with the whole model compiled in double: 1e-6 relative, tensor by
// tensor, over random small models that cover each kind of routing, residual, attention and balancing loss.
//
// A tensor is checked along three directions: its own gradient (an error in size), a random one (an error in any
// entry), and its largest entry alone. With f the loss, u a unit direction, f(k) = f(w + k h u) and step h,
//     (8 (f(1) - f(-1)) - (f(2) - f(-2))) / 12 h = grad . u + O(h^4)
// The second difference removes the h^2 term, which in a stiff model is above the tolerance. In float the
// rounding of f alone would be a thousand times the tolerance; in double it is 1e-12 / h.
#define REAL double
#define main train_main
#include "../train.c"
#undef main

enum { SEQUENCES = 2, MOST_LENGTH = QUERY_BLOCK + 3, MOST_ROWS = SEQUENCES * MOST_LENGTH };
static uint64_t rng = 1;
static int64_t pick(int64_t n) { return (int64_t)(rng_next(&rng) % (uint64_t)n); }

typedef struct { Model m; Weights dw; real *grad; State s; Gradients g; size_t length; int tokens[MOST_ROWS], targets[MOST_ROWS]; } Problem;

// A small model; `i` runs through the kinds, chance does the sizes.
static Config random_config(int i) {
    Config c;
    keys_init(config_keys, CONFIG_KEYS, &c);
    c.vocab_size = 9 + pick(5);      c.hidden_size = 5 + pick(8);         c.num_hidden_layers = 1 + i % 2;
    c.num_attention_heads = 1 + i % 3; c.qk_nope_head_dim = 1 + pick(5);  c.qk_rope_head_dim = 2 + 2 * pick(3);
    c.v_head_dim = 1 + pick(6);      c.kv_lora_rank = 3 + pick(5);        c.q_lora_rank = i % 3 == 1 ? 3 + pick(5) : 0;
    c.n_routed_experts = i % 11 == 10 ? 0 : 4 + 2 * pick(2);             c.num_experts_per_tok = 1 + i % 3;
    c.n_shared_experts = i % 3;      c.moe_intermediate_size = 2 + pick(6); c.intermediate_size = 3 + pick(6);
    c.inner_iter = 1 + i / 2 % 3;    c.inner_residual = i % 2;            c.outer_residual = i / 2 % 2;
    c.use_igate = i % 4 != 3;        c.norm_topk_prob = i % 2;            c.routed_scaling_factor = 1.7;
    c.topk_method = i % 5 == 2;      c.n_group = 2;                       c.topk_group = 1 + (c.num_experts_per_tok > 2);
    c.first_k_dense_replace = i % 4 == 1; c.attention_bias = i % 3 != 0;  c.tie_word_embeddings = i % 4 == 2;
    c.seq_aux = i % 2;               c.aux_loss_alpha = 0.3;              c.max_position_embeddings = MOST_LENGTH;
    c.rope_scaling_type = i % 3;     c.rope_scaling_factor = i % 3 ? 3 : 1; c.rope_scaling_original = 8;
    c.rope_scaling_mscale_all = i % 3 == 2 ? 0.7 : 0;                     c.bos_token_id = c.eos_token_id = 0;
    config_check(&c, "test", FAILED);
    return c;
}

static Problem problem_new(int i) {
    Problem p = { .m.config = random_config(i), .length = i % 9 == 8 ? MOST_LENGTH : 7 };    // some take two blocks of queries
    const size_t rows = SEQUENCES * p.length;
    Config *c = &p.m.config;
    p.m.coe_weights = c->inner_iter > 1 && i % 4 == 2;
    p.m.w = weights_layout(c, p.m.coe_weights, F32);
    p.dw = weights_layout(c, p.m.coe_weights, F32);
    p.m.weights = allocate(p.m.w.size * sizeof(real), "weights");
    p.grad = allocate(p.m.w.size * sizeof(real), "gradients");
    weights_bind(&p.m.w, p.m.weights);
    weights_bind(&p.dw, p.grad);
    for (size_t k = 0; k < p.m.w.n_tensors; k++)
        for (size_t j = 0; j < tensor_size(&p.m.w.tensor[k]); j++)
            p.m.w.tensor[k].data[j] = (p.m.w.tensor[k].init == ONES) + (p.m.w.tensor[k].init == GATE ? 1.5 : 0.4) * rng_normal(&rng);
    p.s = state_new(c, rows, p.length, to_keep(&p.m));
    p.g = gradients_new(c, rows, p.length);
    for (size_t t = 0; t < rows; t++) {
        p.tokens[t] = (int)pick(c->vocab_size);
        p.targets[t] = (int)pick(c->vocab_size);
    }
    return p;
}

// The loss whose gradient is checked; the gradients go to `dw`.
static double loss(Problem *p, const Weights *dw) {
    Loss l = backward(&p->m, dw, &p->s, &p->g, p->tokens, p->targets, SEQUENCES, p->length, 0.8 / (double)(SEQUENCES * p->length), 0.6);
    return l.loss + l.aux;
}

// A number for all choices of experts: a difference across a changed choice says nothing about the gradient.
static uint64_t choices(const Problem *p) {
    const Config *c = &p->m.config;
    uint64_t h = 1;
    for (size_t l = 0; l < (size_t)c->num_hidden_layers; l++)
        for (int64_t t = 0; is_moe(c, l) && t < c->inner_iter; t++)
            for (size_t k = 0; k < SEQUENCES * p->length * (size_t)c->num_experts_per_tok; k++) h = h * 31 + (uint64_t)p->s.layer[l].iteration[t].expert[k];
    return h;
}

// The derivative of the loss along u (n) from point w (n), by differences; NAN where a choice changes.
static double difference(Problem *p, const Weights *scratch, real *w, const real *u, real *saved, size_t n) {
    const double h = 2e-5;
    double f[5];
    uint64_t chosen = 0;
    int changed = 0;
    memcpy(saved, w, n * sizeof(real));
    for (int k = -2; k <= 2; k++) {
        if (k == 0) continue;
        for (size_t i = 0; i < n; i++) w[i] = saved[i] + k * h * u[i];
        f[k + 2] = loss(p, scratch);
        if (k > -2) changed |= choices(p) != chosen;
        chosen = choices(p);
    }
    memcpy(w, saved, n * sizeof(real));
    return changed ? NAN : (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * h);
}

int main(void) {
    int passed = 0, failed = 0, unclear = 0;
    double worst = 0;
    program = "test_grad";
    for (int i = 0; i < 36; i++) {
        Problem p = problem_new(i);
        Weights scratch = weights_layout(&p.m.config, p.m.coe_weights, F32);
        real *block = allocate(p.m.w.size * sizeof(real), "scratch"), *u = allocate(p.m.w.size * sizeof(real), "direction");
        real *saved = allocate(p.m.w.size * sizeof(real), "saved");
        weights_bind(&scratch, block);
        loss(&p, &p.dw);
        for (size_t k = 0; k < p.m.w.n_tensors; k++) {
            const Tensor *t = &p.m.w.tensor[k], *d = &p.dw.tensor[k];
            const size_t n = tensor_size(t);
            double norm = 0, bad = 0;
            for (size_t j = 0; j < n; j++) norm += d->data[j] * d->data[j];
            norm = sqrt(norm);
            for (int way = 0; n && way < 3; way++) {
                double along = 0, length = 0;
                size_t top = 0;
                for (size_t j = 0; j < n; j++) {
                    if (fabs(d->data[j]) > fabs(d->data[top])) top = j;
                    u[j] = way == 0 ? d->data[j] : way == 1 ? rng_normal(&rng) : 0;
                    length += u[j] * u[j];
                }
                if (way == 2) length = u[top] = 1;
                for (size_t j = 0; j < n && length > 0; j++) along += (u[j] /= sqrt(length)) * d->data[j];
                double measured = difference(&p, &scratch, t->data, u, saved, n);
                if (isnan(measured)) { unclear++; continue; }
                // relative to the gradient's part along u, with a floor where that is all but zero: the difference's own
                // error is about 1e-10 whatever the gradient
                double error = fabs(measured - along) / (fabs(along) + 1e-3 * norm + 1e-4);
                bad = error > bad ? error : bad;
            }
            if (!n) continue;
            worst = bad > worst ? bad : worst;
            if (bad < 1e-6) { passed++; continue; }
            char name[128];
            tensor_name(name, sizeof name, &p.m.w, k, 0);
            printf("FAIL config %d: %s is off by %.2e relative, must be below 1e-6\n", i, name, bad);
            failed++;
        }
        release(block); release(u); release(saved); release(scratch.tensor);
        release(p.grad); release(p.dw.tensor); release(p.g.memory);
        state_free(&p.s);
        model_free(&p.m);
    }
    printf("gradients: worst relative error %.1e, %d directions skipped because a choice of expert changed\n", worst, unclear);
    if (unclear > passed / 10) { printf("FAIL too many directions skipped\n"); failed++; }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
