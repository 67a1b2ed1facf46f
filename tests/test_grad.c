// Every gradient against central differences, with the whole model compiled in double: 1e-6
// relative, tensor by tensor, over random small models that cover each kind of routing, residual,
// attention and balancing loss.
//
// A tensor is checked along three directions: its own gradient (an error in size), a random one (an
// error in any entry), and its largest entry alone. With f the loss, u a unit direction,
// f(k) = f(w + k h u) and step h,
//     (8 (f(1) - f(-1)) - (f(2) - f(-2))) / 12 h = grad . u + O(h^4)
// The second difference removes the h^2 term, which in a stiff model is above the tolerance. In
// float the rounding of f alone would be a thousand times the tolerance; in double it is 1e-12 / h.
#define REAL double
#define main train_main
#include "../train.c"
#undef main

enum { SEQUENCES = 2, MOST_LENGTH = QUERY_BLOCK + 3, MOST_ROWS = SEQUENCES * MOST_LENGTH };
static uint64_t rng = 1;
static size_t pick(size_t n) { return (size_t)(rng_next(&rng) % n); }

typedef struct {
    Model m;
    State s;
    Gradients g;
    size_t n;                           // tokens of a sequence
    int tokens[MOST_ROWS], targets[MOST_ROWS];
} Trial;

// A small model; `i` runs through the kinds, chance does the sizes.
static Config random_config(int i) {
    Config c;
    keys_init(config_keys, CONFIG_KEYS, &c);
    c.vocab_size = 9 + pick(5);
    c.hidden_size = 5 + pick(8);
    c.num_hidden_layers = 1 + (size_t)i % 2;
    c.num_attention_heads = 1 + (size_t)i % 3;
    c.qk_nope_head_dim = 1 + pick(5);
    c.qk_rope_head_dim = 2 + 2 * pick(3);
    c.v_head_dim = 1 + pick(6);
    c.kv_lora_rank = 3 + pick(5);
    c.q_lora_rank = i % 3 == 1 ? 3 + pick(5) : 0;
    c.n_routed_experts = i % 11 == 10 ? 0 : 4 + 2 * pick(2);
    c.num_experts_per_tok = 1 + (size_t)i % 3;
    c.n_shared_experts = (size_t)i % 3;
    c.moe_intermediate_size = 2 + pick(6);
    c.intermediate_size = 3 + pick(6);
    c.inner_iter = 1 + (size_t)i / 2 % 3;
    c.inner_residual = i % 2;
    c.outer_residual = i / 2 % 2;
    c.use_igate = i % 4 != 3;
    c.norm_topk_prob = i % 2;
    c.routed_scaling_factor = 1.7;
    c.topk_method = i % 5 == 2 ? GROUP_LIMITED_GREEDY : GREEDY;
    c.n_group = 2;
    c.topk_group = 1 + (c.num_experts_per_tok > 2);
    if (i % 6 == 5) {                   // DeepSeek-V3's router
        c.scoring_func = SIGMOID;
        c.topk_method = NOAUX_TC;
    }
    if (i % 7 == 3) {
        c.prenorm_chain = true;
        c.inner_residual = c.outer_residual = false;
    }
    c.first_k_dense_replace = i % 4 == 1;
    c.attention_bias = i % 3 != 0;
    c.tie_word_embeddings = i % 4 == 2;
    c.seq_aux = i % 2;
    c.aux_loss_alpha = 0.3;
    c.max_position_embeddings = MOST_LENGTH;
    c.rope_scaling_type = (int[]){ NO_SCALING, LINEAR, YARN }[i % 3];
    c.rope_scaling_factor = i % 3 ? 3 : 1;
    c.rope_scaling_original = 8;
    c.rope_scaling_mscale_all = i % 3 == 2 ? 0.7 : 0;
    c.generation.bos_token_id = c.generation.eos_token_id[0] = 0;
    config_check(&c, "test", FAILED);
    return c;
}

static Trial trial_new(int i) {
    // Some sequences take two blocks of queries.
    Trial p = { .m.config = random_config(i), .n = i % 9 == 8 ? MOST_LENGTH : 7 };
    const size_t rows = SEQUENCES * p.n;
    const Config *config = &p.m.config;
    p.m.upcycled = config->inner_iter > 1 && i % 4 == 2 && !config->prenorm_chain;
    p.m.w = weights_layout(config, p.m.upcycled, F32);
    p.m.weights = allocate(p.m.w.size * sizeof(real), "weights");
    weights_bind(&p.m.w, p.m.weights);
    for (const Tensor *t = p.m.w.tensor; t < p.m.w.tensor + p.m.w.n_tensors; t++)
        for (size_t j = 0; j < tensor_size(t); j++)
            t->data[j] = (t->init == ONES) + (t->init == GATE ? 1.5 : 0.4) * rng_normal(&rng);
    p.s = state_new(config, rows, p.n, to_keep(&p.m));
    p.g = gradients_new(config, rows, p.n);
    for (size_t t = 0; t < rows; t++) {
        p.tokens[t] = (int)pick(config->vocab_size);
        // In half of the models a third of the targets have no loss.
        const bool counts = i % 2 == 0 || pick(3) > 0;
        p.targets[t] = counts ? (int)pick(config->vocab_size) : NO_TARGET;
    }
    return p;
}

static void trial_free(Trial *p) {
    release(p->g.memory);
    state_free(&p->s);
    model_free(&p->m);
}

// The loss whose gradient is checked; it is added to where the model's gradients are bound to.
static double loss(Trial *p) {
    const double scale = 0.8 / (double)(SEQUENCES * p->n);
    const MicroBatch batch = { p->tokens, p->targets, SEQUENCES, p->n, scale, 0.6 };
    forward(&p->m, &p->s, batch.tokens, batch.B, batch.n, 0, batch.B * batch.n);
    const Loss l = backward(&p->m, &p->s, &p->g, &batch);
    return l.loss + l.aux;
}

// A number for all choices of experts: a difference across a changed choice says nothing about the
// gradient.
static uint64_t choices(const Trial *p) {
    LETTERS(&p->m.config);
    uint64_t hash = 1;
    for (size_t l = 0; l < L; l++)
        for (size_t c = 0; is_moe(&p->m.config, l) && c < C; c++)
            for (size_t j = 0; j < SEQUENCES * p->n * K; j++)
                hash = hash * 31 + (uint64_t)p->s.layer[l].iteration[c].expert[j];
    return hash;
}

// The derivative of the loss along u (n) from point w (n), by differences; NAN where a choice
// changes. saved (n) is scratch.
static double difference(Trial *p, real *w, const real *u, real *saved, size_t n) {
    const double h = 2e-5;
    double f[5];
    uint64_t chosen = 0;
    bool changed = false;
    memcpy(saved, w, n * sizeof(real));
    for (int k = -2; k <= 2; k++) {
        if (k == 0) continue;
        for (size_t i = 0; i < n; i++) w[i] = saved[i] + k * h * u[i];
        f[k + 2] = loss(p);
        if (k > -2) changed |= choices(p) != chosen;
        chosen = choices(p);
    }
    memcpy(w, saved, n * sizeof(real));
    return changed ? NAN : (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * h);
}

// u (n) = one of three directions of length 1, from the gradient. Returns the gradient along it.
static double direction(real *u, const real *grad, size_t n, int way) {
    double along = 0, length = 0;
    size_t top = 0;
    for (size_t i = 0; i < n; i++) {
        if (fabs(grad[i]) > fabs(grad[top])) top = i;
        u[i] = way == 0 ? grad[i] : way == 1 ? rng_normal(&rng) : 0;
        length += u[i] * u[i];
    }
    if (way == 2) length = u[top] = 1;
    for (size_t i = 0; i < n && length > 0; i++) along += (u[i] /= sqrt(length)) * grad[i];
    return along;
}

// The largest relative error of the gradient of a tensor, of which some `unclear` directions do not
// count. u and saved are scratch.
static double gradient_error(Trial *p, const Tensor *t, const real *grad, real *u, real *saved,
                             int *unclear) {
    const size_t n = tensor_size(t);
    double norm = 0, worst = 0;
    for (size_t i = 0; i < n; i++) norm += grad[i] * grad[i];
    norm = sqrt(norm);
    for (int way = 0; way < 3; way++) {
        const double along = direction(u, grad, n, way);
        const double measured = difference(p, t->data, u, saved, n);
        if (isnan(measured)) { ++*unclear; continue; }
        // relative to the gradient's part along u, with a floor where that is all but zero: the
        // difference's own error is about 1e-10 whatever the gradient
        const double error = fabs(measured - along) / (fabs(along) + 1e-3 * norm + 1e-4);
        worst = error <= worst ? worst : isnan(error) ? INFINITY : error;
    }
    return worst;
}

int main(void) {
    int passed = 0, failed = 0, unclear = 0;
    double worst = 0;
    program = "test_grad";
    for (int i = 0; i < 36; i++) {
        Trial p = trial_new(i);
        const size_t bytes = p.m.w.size * sizeof(real);
        real *grad = allocate(bytes, "gradients"), *others = allocate(bytes, "gradients");
        real *u = allocate(bytes, "direction"), *saved = allocate(bytes, "saved");
        gradients_bind(&p.m.w, grad);
        loss(&p);
        gradients_bind(&p.m.w, others);         // those of other points interest nobody
        for (size_t j = 0; j < p.m.w.n_tensors; j++) {
            const Tensor *t = &p.m.w.tensor[j];
            if (!tensor_size(t)) continue;
            const double error = gradient_error(&p, t, grad + t->offset, u, saved, &unclear);
            worst = error > worst ? error : worst;
            if (error < 1e-6) { passed++; continue; }
            char name[128];
            tensor_name(name, sizeof name, &p.m.w, j, 0);
            printf("FAIL config %d: %s is off by %.2e relative, must be below 1e-6\n", i, name,
                   error);
            failed++;
        }
        release(grad); release(others); release(u); release(saved);
        trial_free(&p);
    }
    printf("gradients: worst relative error %.1e, %d directions skipped because a choice of expert "
           "changed\n", worst, unclear);
    if (unclear > passed / 10) { printf("FAIL too many directions skipped\n"); failed++; }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
