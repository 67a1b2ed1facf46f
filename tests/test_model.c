// Tests of the model as a whole: what must not depend on how the work is cut up.
//
//     cc -O3 -march=native -fopenmp -o build/test_model tests/test_model.c -lm && build/test_model
//     cc -O3 -march=native -fopenmp -DREAL=double -o build/test_model_d tests/test_model.c -lm &&
//     ...
//
// With -DPLAIN the same of a model that computes with the plain operations of coe.c [4].
//
// In float: the same bytes with any number of threads. In double: T tokens at once, one by one and
// in pieces; a batch, its sequences alone and micro-batches. Those agree only to rounding, which in
// float can tip the choice of an expert and hide a small mistake; in double neither happens. In
// both: the chain of experts, AdamW and the learning rate against plain loops. Every random model
// has another combination of what a config can ask for.
#define main train_main
#include "../train.c"
#undef main
#include <float.h>

#ifdef REAL_IS_FLOAT
static const double EPS = FLT_EPSILON;
#else
static const double EPS = DBL_EPSILON;
#endif

static int passed, failed;
static uint64_t rng = 1;
static size_t pick(size_t least, size_t most) {
    return least + (size_t)(rng_next(&rng) % (most - least + 1));
}

// Counts a test; what fails is printed.
static void check(int ok, const char *format, ...) {
    if (ok) { passed++; return; }
    va_list args;
    va_start(args, format);
    printf("FAILED: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    failed++;
}

// The larger of two errors, and infinity once there was a NaN.
static double larger(double worst, double error) {
    return error <= worst ? worst : isnan(error) ? INFINITY : error;
}

// ---- random models ------------------------------------------------------------------------------

enum { KINDS = 36 };    // models with numbers below this have every feature, and most pairs of two

// Features go by the number of the model, sizes by chance; `wide` is large enough for the threads
// to have work.
static Config random_config(size_t i, bool wide) {
    Config c;
    keys_init(config_keys, CONFIG_KEYS, &c);
    c.vocab_size = wide ? 300 : pick(20, 60);
    c.hidden_size = wide ? pick(105, 120) : pick(7, 40);
    c.intermediate_size = pick(5, 40);
    c.moe_intermediate_size = pick(3, 20);
    c.num_hidden_layers = 1 + i % 3;
    c.num_attention_heads = pick(1, 4);
    c.n_shared_experts = i / 2 % 3;
    c.n_routed_experts = i % 12 == 11 ? 0 : 6;
    c.num_experts_per_tok = pick(1, 4);
    c.kv_lora_rank = pick(3, 21);
    c.q_lora_rank = i % 2 ? pick(3, 21) : 0;
    c.qk_nope_head_dim = pick(1, 19);
    c.qk_rope_head_dim = 2 * pick(1, 5);
    c.v_head_dim = pick(1, 19);
    c.inner_iter = 1 + i / 3 % 3;
    c.inner_residual = i % 4 < 2;
    c.outer_residual = i % 2;
    c.use_igate = i % 5 < 3;
    c.topk_method = i % 3 == 1 ? GROUP_LIMITED_GREEDY : GREEDY;
    c.n_group = 3;
    c.topk_group = pick((c.num_experts_per_tok + 1) / 2, 3);
    c.norm_topk_prob = i / 3 % 2;
    c.routed_scaling_factor = i % 7 ? 1 : 2.5;
    c.first_k_dense_replace = i % 6 == 5;
    c.moe_layer_freq = 1 + (i % 9 == 7);
    c.aux_loss_alpha = 0.2;
    c.rms_norm_eps = 1e-5;
    c.rope_scaling_type = (int[]){ NO_SCALING, LINEAR, YARN }[i / 2 % 3];
    c.rope_scaling_factor = c.rope_scaling_type ? 4 : 1;
    c.rope_scaling_original = 32;
    c.rope_scaling_mscale_all = i % 4 == 2 ? 0.7 : 0;
    c.max_position_embeddings = 256;
    c.attention_bias = i % 3 == 2;
    c.tie_word_embeddings = i % 4 == 3;
    c.generation.bos_token_id = c.generation.eos_token_id[0] = -1;
    config_check(&c, "random_config", FAILED);
    return c;
}

// Weights are large enough for every part to matter, and for no choice of an expert to be a draw.
static Model random_model(size_t i, bool wide) {
    Model m = { .config = random_config(i, wide) };
    m.upcycled = m.config.inner_iter > 1 && i % 4 == 0;
    m.w = weights_layout(&m.config, m.upcycled, F32);
    m.weights = allocate(m.w.size * sizeof(real), "the weights");
    weights_bind(&m.w, m.weights);
    for (const Tensor *t = m.w.tensor; t < m.w.tensor + m.w.n_tensors; t++) {
        const double gain = t->init == GATE ? 3 : 1.2;
        const double size = t->rows == 1 || t == m.w.embed_tokens ? 0.5
                                                                  : gain / sqrt((double)t->cols);
        for (size_t j = 0; j < tensor_size(t); j++)
            t->data[j] = (real)((t->init == ONES) + size * rng_normal(&rng));
    }
    return m;
}

static int *random_tokens(const Model *m, size_t n) {
    int *tokens = allocate(n * sizeof(int), "tokens");
    for (size_t t = 0; t < n; t++) tokens[t] = (int)pick(0, m->config.vocab_size - 1);
    return tokens;
}

// The largest difference of two arrays, relative to the largest number of the second.
static double furthest(const real *a, const real *b, size_t n) {
    double worst = 0, largest = 1e-300;
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)a[i] - (double)b[i]);
        worst = larger(worst, error);
        largest = fmax(largest, fabs((double)b[i]));
    }
    return worst / largest;
}

// ---- the chain of experts against plain loops ---------------------------------------------------

enum { MOST = 128 };

// y = w x
static void multiply(double *y, const real *w, const double *x, size_t rows, size_t cols) {
    for (size_t i = 0; i < rows; i++) {
        y[i] = 0;
        for (size_t k = 0; k < cols; k++) y[i] += (double)w[i * cols + k] * x[k];
    }
}

// y += weight * down(silu(gate x) * up x), with copy e of the tensors
static void add_network(double *y, double weight, const Tensor *gate, const Tensor *up,
                        const Tensor *down, size_t e, const double *x) {
    double g[MOST], u[MOST], out[MOST];
    multiply(g, data_of(gate, e), x, gate->rows, gate->cols);
    multiply(u, data_of(up, e), x, up->rows, up->cols);
    for (size_t i = 0; i < gate->rows; i++) g[i] = g[i] / (1 + exp(-g[i])) * u[i];
    multiply(out, data_of(down, e), g, down->rows, down->cols);
    for (size_t i = 0; i < down->rows; i++) y[i] += weight * out[i];
}

// Chooses experts for x as the README says: order (K) and their weights. Returns how clear the
// closest decision was, relative to the score.
static double choose_plainly(size_t *order, double *weight, const Model *m, const real *gate,
                             const double *x) {
    const Config *config = &m->config;
    LETTERS(config);
    const size_t size = E / config->n_group;
    double s[MOST], total = 0, clear = 1;
    multiply(s, gate, x, E, d);
    for (size_t e = 0; e < E; e++) total += s[e] = exp(s[e]);
    for (size_t e = 0; e < E; e++) s[e] /= total;
    if (config->topk_method == GROUP_LIMITED_GREEDY) {  // leave the best groups, one by one
        double left[MOST] = { 0 };
        for (size_t j = 0; j < config->topk_group; j++) {
            size_t best = 0;
            for (size_t e = 0; e < E; e++) if (s[e] > s[best]) best = e;
            for (size_t e = 0; e < E; e++)
                if (e / size != best / size) clear = fmin(clear, fabs(s[best] - s[e]) / s[best]);
            for (size_t e = best / size * size; e < (best / size + 1) * size; e++) {
                left[e] = s[e];
                s[e] = 0;
            }
        }
        memcpy(s, left, E * sizeof(double));
    }
    total = 0;
    for (size_t k = 0; k < K; k++) {
        size_t best = 0;
        for (size_t e = 0; e < E; e++) if (s[e] > s[best]) best = e;
        for (size_t e = 0; e < E; e++)
            if (e != best) clear = fmin(clear, fabs(s[best] - s[e]) / s[best]);
        if (s[best] < 1e-30) clear = 0;         // float has no smaller ones left to tell apart
        order[k] = best;
        total += weight[k] = s[best];
        s[best] = 0;
    }
    for (size_t k = 0; k < K; k++)
        weight[k] *= config->norm_topk_prob && K > 1 ? 1 / total : config->routed_scaling_factor;
    return clear;
}

// out (d) = the chain of layer l on one row of the stream after attention, in double. Returns how
// clear all choices were; `same` becomes false where chain_forward chose other experts for token t.
static double chain_plainly(const Model *m, const State *s, size_t l, double *out, const real *mid,
                            size_t t, bool *same) {
    const Config *config = &m->config;
    LETTERS(config);
    const Layer *w = &m->w.layer[l];
    double square = 0, clear = 1;
    for (size_t i = 0; i < d; i++) square += (double)mid[i] * (double)mid[i];
    for (size_t i = 0; i < d; i++)
        out[i] = (double)w->post_attention_layernorm.data[i] * (double)mid[i] /
                 sqrt(square / (double)d + config->rms_norm_eps);
    for (size_t c = 0; c < (is_moe(config, l) ? C : 1); c++) {
        double y[MOST] = { 0 }, weight[MOST];
        size_t order[MOST];
        if (is_moe(config, l)) {
            const Iteration *it = &s->layer[l].iteration[c];
            const real *gate = data_of(&w->gate, config->use_igate ? c : 0);
            clear = fmin(clear, choose_plainly(order, weight, m, gate, out));
            for (size_t k = 0; k < K; k++) {
                add_network(y, weight[k], &w->experts_gate_proj, &w->experts_up_proj,
                            &w->experts_down_proj, order[k], out);
                *same &= (size_t)it->expert[t * K + k] == order[k];
            }
            if (S)
                add_network(y, 1, &w->shared_gate_proj, &w->shared_up_proj, &w->shared_down_proj, 0,
                            out);
        } else {
            add_network(y, 1, &w->dense_gate_proj, &w->dense_up_proj, &w->dense_down_proj, 0, out);
        }
        for (size_t i = 0; i < d; i++) {
            if (!m->upcycled) out[i] = y[i] + (config->inner_residual ? out[i] : 0);
            else if (c == 0) out[i] = y[i];
            else out[i] += (double)data_of(&w->coe_weights, c - 1)[i] * y[i];
        }
    }
    for (size_t i = 0; i < d && config->outer_residual; i++) out[i] += (double)mid[i];
    return clear;
}

static void test_chain(size_t i) {
    enum { T = 25 };
    Model m = random_model(i, false);
    const size_t d = m.config.hidden_size, L = m.config.num_hidden_layers;
    State s = state_new(&m.config, T, T, to_keep(&m));
    real out[T * MOST];
    for (size_t l = 0; l < L; l++) {
        double worst = 0, largest = 0, expected[MOST];
        int unclear = 0;
        bool same_all = true;
        for (size_t j = 0; j < T * d; j++) s.layer[l].mid[j] = (real)rng_normal(&rng);
        chain_forward(&m, &s, l, out, T);
        for (size_t t = 0; t < T; t++) {
            bool same = true;
            const real *mid = s.layer[l].mid + t * d;
            if (chain_plainly(&m, &s, l, expected, mid, t, &same) < 3000 * EPS) {
                unclear++;
                continue;
            }
            same_all &= same;
            for (size_t j = 0; j < d; j++) {
                worst = larger(worst, fabs((double)out[t * d + j] - expected[j]));
                largest = fmax(largest, fabs(expected[j]));
            }
        }
        // Sums of up to 128 numbers of either sign, three iterations one after the other: some
        // hundred roundings of eps.
        check(same_all && worst < 500 * EPS * largest && unclear < T / 2,
              "chain of model %zu, layer %zu: off by %g, experts %s, %d of %d tokens unclear", i,
              l, worst / largest, same_all ? "the same" : "DIFFERENT", unclear, T);
    }
    state_free(&s);
    model_free(&m);
}

// ---- at once, one by one, in pieces -------------------------------------------------------------

// Runs n tokens in `pieces` pieces through a state; all logits go to `logits` (n, V), all choices
// of experts, layer after layer, to `experts` (L C, n, K).
static void run_pieces(const Model *m, State *s, const int *tokens, size_t n, size_t pieces,
                       real *logits, int *experts) {
    LETTERS(&m->config);
    for (size_t left = pieces, p = 0, rows; left > 0; left--, p += rows) {
        const size_t most = n - p - left + 1;           // every piece has a token
        rows = left == 1 || pieces == n ? most : pick(1, most);
        forward(m, s, tokens + p, 1, rows, p, rows);
        logits_forward(m, s, logits + p * V, 0, rows);
        for (size_t l = 0; l < L; l++)
            for (size_t c = 0; is_moe(&m->config, l) && c < C; c++)
                memcpy(experts + ((l * C + c) * n + p) * K, s->layer[l].iteration[c].expert,
                       rows * K * sizeof(int));
    }
}

static void test_pieces(size_t i) {
    Model m = random_model(i, false);
    LETTERS(&m.config);
    const size_t n = i % 4 == 3 ? 2 * QUERY_BLOCK + 9 : 17;
    const size_t choices = L * C * m.config.num_experts_per_tok * n;
    int *tokens = random_tokens(&m, n), *expected = allocate(choices * sizeof(int), "choices"),
        *experts = allocate(choices * sizeof(int), "choices");
    real *whole = allocate(n * V * sizeof(real), "logits"),
         *logits = allocate(n * V * sizeof(real), "logits");
    State training = state_new(&m.config, n, n, to_keep(&m));
    run_pieces(&m, &training, tokens, n, 1, whole, expected);
    const size_t pieces[] = { 1, 2, 3, n };
    for (size_t j = 0; j < 4; j++) {
        State s = state_new(&m.config, n, n + j, KEEP_NOTHING);     // also with room left over
        run_pieces(&m, &s, tokens, n, pieces[j], logits, experts);
        const double off = furthest(logits, whole, n * V);
        check(off < 1e-10 && !memcmp(experts, expected, choices * sizeof(int)),
              "model %zu, %zu tokens in %zu pieces: logits off by %g", i, n, pieces[j], off);
        state_free(&s);
    }
    state_free(&training);
    release(tokens); release(expected); release(experts); release(whole); release(logits);
    model_free(&m);
}

// ---- batches and micro-batches ------------------------------------------------------------------

// Compares the gradients at a and b tensor by tensor, relative to the norm of b's, with a floor for
// tensors whose gradient is rounding.
static void compare_gradients(const Weights *w, const real *a, const real *b, const char *what,
                              size_t i, size_t number_of) {
    double all = 0, worst = 0;
    size_t at_worst = 0;
    char name[128];
    for (size_t j = 0; j < w->size; j++) all += pow((double)b[j], 2);
    for (size_t j = 0; j < w->n_tensors; j++) {
        const Tensor *t = &w->tensor[j];
        double off = 0, norm = 0;
        for (size_t at = t->offset; at < t->offset + tensor_size(t); at++) {
            off += pow((double)a[at] - (double)b[at], 2);
            norm += pow((double)b[at], 2);
        }
        off = sqrt(off) / (sqrt(norm) + 1e-6 * sqrt(all));
        if (!(off <= worst)) { worst = larger(worst, off); at_worst = j; }
    }
    tensor_name(name, sizeof name, w, at_worst, 0);
    check(worst < 1e-9, "model %zu, %s %zu: gradient of %s is off by %g", i, what, number_of, name,
          worst);
}

// Adds the gradient of a batch to `grad` (m->w.size), which becomes that of the model's tensors.
static Loss add_gradient(Model *m, real *grad, State *s, Gradients *g, MicroBatch batch) {
    gradients_bind(&m->w, grad);
    forward(m, s, batch.tokens, batch.B, batch.n, 0, batch.B * batch.n);
    return backward(m, s, g, &batch);
}

// Memory for the gradients of all weights, which are 0.
static real *no_gradient(const Model *m) {
    return allocate(m->w.size * sizeof(real), "gradients");
}

static void test_batch(size_t i) {
    enum { B = 3 };
    const size_t n = i % 6 == 4 ? 200 : 11;     // 600 rows are more than loss_of takes at once
    Model m = random_model(i, false);
    int *tokens = random_tokens(&m, B * n), *targets = random_tokens(&m, B * n);
    State s = state_new(&m.config, B * n, n, to_keep(&m));
    Gradients g = gradients_new(&m.config, B * n, n);
    real *whole = no_gradient(&m), *alone = no_gradient(&m);
    // In half of the models some targets have no loss, and the last sequence has none at all.
    for (size_t t = 0; i % 2 && t < B * n; t++)
        if (t >= (B - 1) * n || pick(0, 2) == 0) targets[t] = NO_TARGET;
    const size_t all = count_targets(targets, B * n);
    const double scale = 1.0 / (double)all;
    Loss loss = add_gradient(&m, whole, &s, &g, (MicroBatch){ tokens, targets, B, n, scale, 1 }),
         total = { 0, 0 };
    for (size_t b = 0; b < B; b++) {
        // The balancing loss of the batch is the mean over its sequences.
        const MicroBatch sequence = { tokens + b * n, targets + b * n, 1, n, scale, 1.0 / B };
        Loss part = add_gradient(&m, alone, &s, &g, sequence);
        total.loss += part.loss;
        total.aux += part.aux;
    }
    check(fabs(loss.loss / total.loss - 1) < 1e-12 &&
              fabs(loss.aux - total.aux) <= 1e-12 * loss.aux,
          "model %zu, a batch: loss %.15g and %.15g, alone %.15g and %.15g", i, loss.loss, loss.aux,
          total.loss, total.aux);
    compare_gradients(&m.w, alone, whole, "sequences alone", i, B);
    release(whole); release(alone);
    release(tokens); release(targets); release(g.memory);
    state_free(&s);
    model_free(&m);
}

// One step of training as train() does it, from the model's weights, on `tokens`.
static Run one_step(const Model *m, const int *tokens, size_t B, size_t n, size_t micro, Loss *loss,
                    double *norm) {
    Run run = { .model = *m };
    keys_init(recipe_keys, RECIPE_KEYS, &run.recipe);
    run.recipe.batch_size = B;
    run.recipe.max_length = n;
    run.recipe.micro_batch_size = micro;
    run.recipe.sequential = true;
    run.model.weights = allocate(m->w.size * sizeof(real), "weights");
    memcpy(run.model.weights, m->weights, m->w.size * sizeof(real));
    run.model.w = weights_layout(&m->config, m->upcycled, F32);
    weights_bind(&run.model.w, run.model.weights);
    make_room(&run, NULL);
    run.data =
        (Data){ .recipe = &run.recipe, .train = { .tokens = (int *)tokens, .n = B * n + 1 } };
    *loss = batch_gradient(&run);
    *norm = gradient_norm(run.grad, run.model.w.size);
    return run;
}

static void free_run(Run *run) {
    release(run->chosen);
    release(run->model.weights); release(run->model.w.tensor); release(run->grad);
    release(run->m); release(run->v); release(run->inputs); release(run->targets);
    release(run->g.memory);
    state_free(&run->state);
}

// What a step of one micro-batch counted, against its choices of experts taken one by one.
static void check_choices(const Run *run, size_t T, size_t i) {
    LETTERS(&run->model.config);
    bool right = true;
    for (size_t c = 0; c < C; c++) {
        double total = 0, layers = 0;
        for (size_t l = 0; l < L; l++) {
            if (!is_moe(&run->model.config, l)) continue;
            int count[MOST] = { 0 }, most = 0;
            for (size_t j = 0; j < T * K; j++) count[run->state.layer[l].iteration[c].expert[j]]++;
            for (size_t e = 0; e < E; e++) most = count[e] > most ? count[e] : most;
            right &= !memcmp(count, run->chosen + (l * C + c) * E, E * sizeof *count);
            total += (double)most * (double)E / (double)(T * K);
            layers++;
        }
        const double load = expert_load(run, c);
        right &= layers > 0 ? fabs(load - total / layers) < 1e-9 : isnan(load);
    }
    check(right, "model %zu: the load of the experts", i);
}

static void test_micro_batches(size_t i) {
    enum { B = 5, n = 7 };
    Model m = random_model(i, false);
    int *tokens = random_tokens(&m, B * n + 1);
    double norm, part_norm;
    Loss loss, part;
    Run whole = one_step(&m, tokens, B, n, 0, &loss, &norm);
    check_choices(&whole, B * n, i);
    static const size_t sizes[] = { 1, 2, 3, 5, 9 };
    for (size_t j = 0; j < 5; j++) {
        Run run = one_step(&m, tokens, B, n, sizes[j], &part, &part_norm);
        compare_gradients(&m.w, run.grad, whole.grad, "micro-batches of", i, sizes[j]);
        check(fabs(part.loss / loss.loss - 1) < 1e-12 &&
                  fabs(part.aux - loss.aux) <= 1e-12 * loss.aux &&
                  fabs(part_norm / norm - 1) < 1e-9,
              "model %zu, micro-batches of %zu: loss %.15g, not %.15g", i, sizes[j], part.loss,
              loss.loss);
        check(!memcmp(run.chosen, whole.chosen, whole.n_chosen * sizeof *whole.chosen),
              "model %zu, micro-batches of %zu: other choices", i, sizes[j]);
        free_run(&run);
    }
    free_run(&whole);
    release(tokens);
    model_free(&m);
}

// ---- the optimizer ------------------------------------------------------------------------------

static void test_adamw(void) {
    enum { N = (1 << 14) + 77, STEPS = 6 };
    static real w[N], m[N], v[N], g[N], used[N];
    static double exact_w[N], exact_m[N], exact_v[N];
    for (int kind = 0; kind < 3; kind++) {
        Recipe r;
        keys_init(recipe_keys, RECIPE_KEYS, &r);
        r.learning_rate = 0.01;
        r.warmup_steps = 3;
        r.lr_scheduler = CONSTANT;
        if (kind == 1) {
            r.weight_decay = 0.3;
            r.adam_beta1 = 0.5;
            r.adam_beta2 = 0.999;
            r.adam_epsilon = 1e-3;
        }
        if (kind == 2) { r.weight_decay = 0; r.adam_beta1 = 0; r.adam_beta2 = 0; }
        const double clip = kind == 1 ? 0.37 : 1;
        for (size_t i = 0; i < N; i++) {
            w[i] = (real)rng_normal(&rng);
            exact_w[i] = (double)w[i];
            m[i] = v[i] = 0;
            exact_m[i] = exact_v[i] = 0;
        }
        double worst = 0;
        for (int step = 0; step < STEPS; step++) {
            const double rate = 0.01 * fmin(1, (step + 1) / 3.0);
            for (size_t i = 0; i < N; i++) used[i] = g[i] = (real)rng_normal(&rng);
            adamw(w, m, v, used, N, &r, step, clip);
            for (size_t i = 0; i < N; i++) {
                if (used[i] != 0) worst = INFINITY;     // the next gradient starts from there
                const double gi = (double)g[i] * clip;
                exact_m[i] = r.adam_beta1 * exact_m[i] + (1 - r.adam_beta1) * gi;
                exact_v[i] = r.adam_beta2 * exact_v[i] + (1 - r.adam_beta2) * gi * gi;
                const double m_hat = exact_m[i] / (1 - pow(r.adam_beta1, step + 1)),
                             v_hat = exact_v[i] / (1 - pow(r.adam_beta2, step + 1));
                exact_w[i] -= rate * r.weight_decay * exact_w[i] +
                              rate * m_hat / (sqrt(v_hat) + r.adam_epsilon);
            }
        }
        // Six steps, each a rounding of a weight up to 5 and of a change below 0.03.
        for (size_t i = 0; i < N; i++) worst = larger(worst, fabs((double)w[i] - exact_w[i]));
        check(worst < 40 * EPS, "AdamW, kind %d: off by %g", kind, worst);
    }
    // n positive numbers, added up one after the other, are off by n / 2 eps at most, their root by
    // half of that. The fast dot() has 2 LANES sums, which it adds up in the end.
#ifdef PLAIN
    const double most = PIECE / 4.0 + 2;
#else
    const double most = (PIECE / (2.0 * LANES) + 2 * LANES) / 4 + 2;
#endif
    long double total = 0;
    for (size_t i = 0; i < N; i++) total += (long double)g[i] * g[i];
    check(fabs((double)(gradient_norm(g, N) / sqrtl(total) - 1)) < most * EPS,
          "the norm of the gradient is %.9g, not %.9g", gradient_norm(g, N), (double)sqrtl(total));
}

static void test_learning_rate(void) {
    Recipe r;
    keys_init(recipe_keys, RECIPE_KEYS, &r);
    r.learning_rate = 0.5;
    r.max_steps = 21;
    r.warmup_ratio = 0.1;                               // 2.1 steps, so 3
    for (int kind = 0; kind < 4; kind++) {
        r.lr_scheduler = kind % 2 ? COSINE : CONSTANT;
        r.warmup_steps = kind < 2 ? -1 : 30;            // more than there are steps
        const double warmup = kind < 2 ? 3 : 30;
        double worst = 0;
        for (int s = 0; s < 21; s++) {
            double rate = 0.5 * fmin(1, (s + 1) / warmup);
            if (s >= warmup && r.lr_scheduler == COSINE)
                rate = 0.5 * (1 + cos(3.14159265358979324 * (s - warmup) / (21 - warmup))) / 2;
            worst = larger(worst, fabs(learning_rate(&r, s) - rate));
        }
        check(worst < 1e-15, "learning rate, kind %d: off by %g", kind, worst);
    }
    r.warmup_steps = 0;
    check(learning_rate(&r, 0) == 0.5 && learning_rate(&r, 21) < 1e-15,
          "no warm-up; the cosine ends at 0");
}

// ---- threads ------------------------------------------------------------------------------------

// Everything that a step of training and a few tokens of generating compute, as bytes.
static char *work(const Model *m, const int *tokens, size_t threads, size_t *bytes) {
    enum { B = 2, n = 201, GENERATED = 3 };     // 402 rows are more than loss_of takes at once
    const size_t V = m->config.vocab_size, size = m->w.size;
    set_threads(threads);
    double norm;
    Loss loss;
    Run run = one_step(m, tokens, B, n, 0, &loss, &norm);
    State s = state_new(&m->config, n, n + GENERATED, KEEP_NOTHING);
    *bytes = (2 * size + (GENERATED + 1) * V) * sizeof(real) + 3 * sizeof(double);
    char *result = allocate(*bytes, "the result"), *to = result;
    real *logits = allocate(V * sizeof(real), "logits");
    for (size_t i = 0; i <= GENERATED; i++) {
        forward(m, &s, tokens + (i ? n + i - 1 : 0), 1, i ? 1 : n, i ? n + i - 1 : 0, 1);
        logits_forward(m, &s, logits, 0, 1);
        memcpy(to, logits, V * sizeof(real));
        to += V * sizeof(real);
    }
    memcpy(to, run.grad, size * sizeof(real));
    to += size * sizeof(real);
    memcpy(to, run.model.weights, size * sizeof(real));
    to += size * sizeof(real);
    memcpy(to, (double[]){ loss.loss, loss.aux, norm }, 3 * sizeof(double));
    release(logits);
    state_free(&s);
    free_run(&run);
    return result;
}

static void test_threads(size_t i) {
    Model m = random_model(i, true);
    int *tokens = random_tokens(&m, 403);
    size_t bytes, again;
    char *one = work(&m, tokens, 1, &bytes);
    static const size_t counts[] = { 1, 2, 3, 7 };
    for (size_t j = 0; j < 4; j++) {
        char *many = work(&m, tokens, counts[j], &again);
        check(bytes == again && !memcmp(one, many, bytes),
              "model %zu: other bytes with %zu threads", i, counts[j]);
        release(many);
    }
    set_threads(1);
    release(one);
    release(tokens);
    model_free(&m);
}

// What a state or its gradients held before does not matter.
static void test_used_before(size_t i) {
    enum { B = 2, n = 60 };
    Model m = random_model(i, false);
    int *tokens = random_tokens(&m, 2 * B * n);
    real *first = no_gradient(&m), *second = no_gradient(&m), *unused = no_gradient(&m);
    for (int used = 0; used < 2; used++) {
        State s = state_new(&m.config, B * n, n, to_keep(&m));
        Gradients g = gradients_new(&m.config, B * n, n);
        const MicroBatch before = { tokens + B * n, tokens, B, n, 1, 1 },
            batch = { tokens, tokens + B * n, B, n / 2, 0.01, 1 };
        if (used) add_gradient(&m, unused, &s, &g, before);
        add_gradient(&m, used ? second : first, &s, &g, batch);
        state_free(&s);
        release(g.memory);
    }
    check(!memcmp(first, second, m.w.size * sizeof(real)),
          "model %zu: other gradients in memory that was used before", i);
    release(first); release(second); release(unused);
    release(tokens);
    model_free(&m);
}

// One layer more takes, for each token, what the README says and nothing else.
static void test_activations(size_t i) {
    Model m = random_model(i, false);
    Config config = m.config;
    LETTERS(&config);
    model_free(&m);
    if (!E) return;
    config.first_k_dense_replace = 0;
    config.moe_layer_freq = 1;
    const size_t T = 1000;
    for (enum Keep keep = KEEP; keep <= KEEP_FFN; keep++) {
        State s = { .rows = T, .context = T, .keep = keep };
        Arena arena[2] = { { 0 } };
        for (size_t more = 0; more < 2; more++) {
            config.num_hidden_layers = 2 + more;
            state_layout(&s, &config, &arena[more]);
        }
        const size_t numbers = 2 * d + r + H * (2 * dn + dr + 2 * dv + 1) + 2 * (R + dr) + 4 +
            C * (d + E + K + 2 * f * (K + S)) + (keep == KEEP_FFN ? (C - 1) * d : 0);
        const size_t expected = T * (numbers * sizeof(real) + C * 3 * K * sizeof(int));
        const size_t found = arena[1].used - arena[0].used;
        // What does not grow with T: names, starts of groups, and arrays begin at whole lines.
        const size_t rest = sizeof(LayerState) + C * (sizeof(Iteration) + (E + 1) * sizeof(int)) +
            64 * (16 + 12 * C);
        check(found >= expected && found <= expected + rest,
              "model %zu: a layer of %zu tokens takes %zu bytes, should be %zu to %zu", i, T, found,
              expected, expected + rest);
    }
}

// With an argument only every so many models are tested: sanitizers are slow.
int main(int argc, char **argv) {
    const size_t step = argc > 1 ? strtoul(argv[1], NULL, 10) : 1;
    program = "test_model";
    if (!freopen("/dev/null", "w", stderr)) return 1;   // make_room says how much memory it takes
    set_threads(2);
    test_adamw();
    test_learning_rate();
    for (size_t i = 0; i < KINDS; i += step) test_activations(i);
    for (size_t i = 0; i < KINDS; i += step) test_chain(i);
#ifdef REAL_IS_FLOAT
    for (size_t i = 0; i < KINDS; i += step) test_used_before(i);
#ifdef _OPENMP
    for (size_t i = 0; i < KINDS; i += 3 * step) test_threads(i);
#else
    printf("no OpenMP: threads are not tested\n");
#endif
#else
    for (size_t i = 0; i < KINDS; i += step) {
        test_pieces(i);
        test_batch(i);
        test_micro_batches(i);
    }
#endif
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
