// lib/memory.h - where tensors and activations lie: allocates what the tables of coe.c [2] and [3]
// list, names the tensors as a checkpoint does, gives them their first values, and counts them.
//
// Contents: weights, names, first values, activations, counting.
#ifndef MEMORY_H
#define MEMORY_H

// ---- weights ------------------------------------------------------------------------------------

// Lays out the tensors of a model: shapes and offsets. weights_bind() then gives them memory.
// `upcycled`: with coe_weights; `type`: of the matrices. Fails where sizes overflow.
static Weights weights_layout(const Config *config, bool upcycled, enum Type type) {
    LETTERS(config);
    const size_t gates = n_gates(config);
    const bool biased = config->attention_bias;
    const bool corrected = config->topk_method == NOAUX_TC;
    const char *gate_name = config->use_igate ? "mlp.gate.%d.weight" : "mlp.gate.weight";
    const char *bias_name = config->use_igate ? "mlp.gate.%d.e_score_correction_bias"
                                              : "mlp.gate.e_score_correction_bias";
    Weights w = { .n_tensors = 3 + L * LAYER_TENSOR_COUNT };
    w.tensor = allocate(checked_mul(w.n_tensors, sizeof(Tensor)), "the list of tensors");
    w.embed_tokens = w.tensor;
    w.layer = (Layer *)(w.tensor + 1);
    w.norm = w.tensor + w.n_tensors - 2;
    w.lm_head = w.tensor + w.n_tensors - 1;
    const size_t heads = config->tie_word_embeddings ? 0 : 1;
    *w.embed_tokens = (Tensor){ .name = "embed_tokens.weight", 1, V, d, .init = NORMAL };
    *w.norm         = (Tensor){ .name = "norm.weight", 1, 1, d, .init = ONES };
    *w.lm_head      = (Tensor){ .name = "lm_head.weight", heads, V, d, .init = NORMAL };
    for (size_t l = 0; l < L; l++) {
        const bool moe = is_moe(config, l);
#define X(field, label, n_copies, n_rows, n_cols, start) w.layer[l].field = (Tensor){ \
        .name = label, .copies = n_copies, .rows = n_rows, .cols = n_cols, .init = start };
        LAYER_TENSORS(X)
#undef X
    }
    for (size_t i = 0; i < w.n_tensors; i++) {
        Tensor *t = &w.tensor[i];
        t->type = t->init == NORMAL ? type : F32;
        t->offset = w.size;
        const size_t bytes = checked_mul(t->copies, copy_bytes(t));
        w.size = checked_add(w.size, whole_lines(bytes) / sizeof(float));
    }
    checked_mul(w.size, 4 * sizeof(real));  // weights, gradients, both moments: countable in bytes
    if (config->tie_word_embeddings) w.lm_head = w.embed_tokens;
    return w;
}

// Points every tensor into `block`, which holds w->size numbers in file order: reals, or where the
// matrices are of a narrower type what the file holds.
static void weights_bind(Weights *w, void *block) {
    const size_t unit = w->tensor[0].type == F32 ? sizeof(real) : sizeof(float);
    for (size_t i = 0; i < w->n_tensors; i++) {
        Tensor *t = &w->tensor[i];
        t->data = t->copies ? (real *)(void *)((char *)block + unit * t->offset) : NULL;
    }
}

// Points the gradients of all tensors into `block`, which holds w->size reals.
static void gradients_bind(Weights *w, real *block) {
    for (size_t i = 0; i < w->n_tensors; i++)
        w->tensor[i].grad = w->tensor[i].copies ? block + w->tensor[i].offset : NULL;
}

// How many numbers a tensor holds, all copies together.
static size_t tensor_size(const Tensor *t) { return t->copies * t->rows * t->cols; }

// ---- names --------------------------------------------------------------------------------------

// The full name of copy e of tensor i, as in a checkpoint, into name[size]:
// "model.layers.3.mlp.experts.7.up_proj.weight".
static void tensor_name(char *name, size_t size, const Weights *w, size_t i, size_t e) {
    char part[96];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(part, sizeof part, w->tensor[i].name, (int)e);     // the format is a name of the table
#pragma GCC diagnostic pop
    if (i == 0 || i >= w->n_tensors - 2)
        snprintf(name, size, "%s%s", i == w->n_tensors - 1 ? "" : "model.", part);
    else
        snprintf(name, size, "model.layers.%zu.%s", (i - 1) / LAYER_TENSOR_COUNT, part);
}

// ---- first values -------------------------------------------------------------------------------

// The number of a tensor's random stream: its place in the list as it was when a layer had 24 of
// them, so that a seed makes the same model as ever. Those that came later are not random.
static size_t random_stream(const Weights *w, size_t i) {
    enum { ROWS = 24 };
    const size_t layers = (w->n_tensors - 3) / LAYER_TENSOR_COUNT;
    if (i == 0) return 0;
    if (i >= w->n_tensors - 2) return 1 + layers * ROWS + (i - (w->n_tensors - 2));
    return 1 + (i - 1) / LAYER_TENSOR_COUNT * ROWS + (i - 1) % LAYER_TENSOR_COUNT;
}

// Fresh weights from a seed. Each tensor has a random stream of its own.
static void weights_init(Model *m, uint64_t seed) {
    for (size_t i = 0; i < m->w.n_tensors; i++) {
        Tensor *t = &m->w.tensor[i];
        uint64_t rng = seed * 0x2545F4914F6CDD1Du + random_stream(&m->w, i);
        rng = rng_next(&rng);
        const double bound = 1 / sqrt((double)m->config.hidden_size);
        const double deviation = m->config.initializer_range;
        for (size_t n = tensor_size(t), j = 0; j < n; j++)
            switch (t->init) {
            case NORMAL: t->data[j] = (real)(deviation * rng_normal(&rng)); break;
            case GATE:   t->data[j] = (real)(bound * (2 * rng_uniform(&rng) - 1)); break;
            case ONES:   t->data[j] = 1; break;
            case ZEROS:  t->data[j] = 0; break;
            }
    }
}

// ---- activations --------------------------------------------------------------------------------

// Places the rows of a table in an arena: the field of *a becomes an array (rows, cols).
#define PLACE(type, field, rows, cols) \
    a->field = take(arena, checked_mul(rows, cols), sizeof(type));

// One layer, but for the cache, with room for T rows.
static void place_layer(LayerState *a, const Config *config, size_t T, Arena *arena) {
    LETTERS(config);
    LAYER_STATE(PLACE)
}

// One iteration, but for its choices, with room for T rows. E experts, of which K are chosen: 0 in
// a dense layer. W: the width of the feed-forward for every token.
static void place_iteration(Iteration *a, size_t T, size_t d, size_t E, size_t K, size_t f,
                            size_t W, Arena *arena) {
    ITERATION(PLACE)
}

// The choices of one iteration.
static void place_choices(Iteration *a, size_t T, size_t K, Arena *arena) { CHOICES(PLACE) }

// Everything that a State holds. The cache and the choices of experts exist for every layer in any
// case; the rest, without `keep`, once for all of them.
static void state_layout(State *a, const Config *config, Arena *arena) {
    LETTERS(config);
    const size_t T = a->rows, context = a->context, threads = (size_t)thread_count();
    size_t dense = 0;                           // the width of dense layers, if there are any
    for (size_t l = 0; l < L; l++) if (!is_moe(config, l)) dense = I;
    const size_t W = max_size(f * S, dense);
    a->layer = take(arena, L, sizeof *a->layer);
    a->iterations = take(arena, checked_mul(L, C), sizeof *a->iterations);
    LayerState layer = { 0 };
    Iteration it = { 0 };
    real *ffn = take(arena, checked_mul(T, d), sizeof(real));
    for (size_t l = 0; l < L; l++) {
        const bool moe = is_moe(config, l);
        if (a->keep || l == 0) place_layer(&layer, config, T, arena);
        layer.latent = take(arena, checked_mul(a->keep ? T : context, R + dr), sizeof(real));
        for (size_t c = 0; c < C; c++) {
            if (!a->keep && l + c == 0) place_iteration(&it, T, d, E, K, f, W, arena);
            if (a->keep && c < iterations(config, l))
                place_iteration(&it, T, d, moe ? E : 0, moe ? K : 0, f, moe ? f * S : I, arena);
            it.ffn = ffn;
            if (a->keep == KEEP_FFN && moe && c)
                it.ffn = take(arena, checked_mul(T, d), sizeof(real));
            place_choices(&it, T, K, arena);
            if (arena->base) a->iterations[l * C + c] = it;
        }
        if (!arena->base) continue;
        layer.iteration = a->iterations + l * C;
        a->layer[l] = layer;
    }
    a->out = a->keep || !arena->base ? take(arena, checked_mul(T, d), sizeof(real)) : a->layer[0].x;
    const size_t latent_rows = a->keep ? 0 : most_latent_rows(config),
        score_rows = max_size(QUERY_BLOCK, latent_rows);
    STATE(PLACE)
}
#undef PLACE

// Memory for `rows` tokens at once and sequences of up to `context` positions. With `keep`, for
// training, rows are whole sequences. Fails where memory does not suffice.
static State state_new(const Config *config, size_t rows, size_t context, enum Keep keep) {
    State s = { .rows = rows, .context = context, .keep = keep };
    Arena arena = { 0 };
    state_layout(&s, config, &arena);
    s.memory_bytes = arena.used;
    s.memory = arena.base = allocate(arena.used, "activations");
    arena.used = 0;
    state_layout(&s, config, &arena);
    rope_table(&s, config);
    return s;
}

// Gives a State's memory back.
static void state_free(State *s) { release(s->memory); s->memory = NULL; }

// ---- counting -----------------------------------------------------------------------------------

typedef struct {
    size_t total, bytes;                // parameters in all
    size_t active, active_bytes;        // those that one token is multiplied with, once per
                                        // iteration where the chain repeats them
    size_t last_ffn;                    // of the active, those behind the last layer's attention
} Parameters;

// How many there are. (Embedding rows are looked up, not multiplied.)
static Parameters count_parameters(const Model *m) {
    LETTERS(&m->config);
    Parameters p = { 0 };
    for (size_t i = 0; i < m->w.n_tensors; i++) {
        const Tensor *t = &m->w.tensor[i];
        size_t times = t->copies;       // that a copy is used per token
        if (strstr(t->name, ".experts.") && times) times = K * C;
        if (strstr(t->name, ".shared_experts.") || strstr(t->name, "mlp.gate.weight")) times *= C;
        if (t == m->w.embed_tokens && t != m->w.lm_head) times = 0;
        p.total += tensor_size(t);
        p.bytes += t->copies * copy_bytes(t);
        p.active += times * t->rows * t->cols;
        p.active_bytes += times * copy_bytes(t);
        if (t >= &m->w.layer[L - 1].gate && t < m->w.norm) p.last_ffn += times * t->rows * t->cols;
    }
    return p;
}

// The resolved model in one line, on stderr.
static void print_model(const Model *m) {
    const Config *c = &m->config;
    const char *inside = m->upcycled ? "coe_weights" : c->prenorm_chain ? "prenorm" :
                         c->inner_residual ? "inner" : "";
    const char *outside = c->outer_residual ? "outer" : *inside ? "" : "none";
    const Parameters p = count_parameters(m);
    fprintf(stderr, "model: d %zu, L %zu, E %zu, K %zu, C %zu, S %zu, residual %s%s%s, gates %s, "
            "%.3f M parameters, %.3f M active, %d thread%s\n",
            c->hidden_size, c->num_hidden_layers, c->n_routed_experts, c->num_experts_per_tok,
            c->inner_iter, c->n_shared_experts, inside, *inside && *outside ? "+" : "", outside,
            c->use_igate ? "own" : "shared", (double)p.total / 1e6, (double)p.active / 1e6,
            thread_count(), thread_count() == 1 ? "" : "s");
}
#endif // MEMORY_H
