// lib/lens.h - run --silence and the like: reading their rules; and run --mode lens: what the model
// would say after each iteration of each layer. Included by run.c.
#ifndef LENS_H
#define LENS_H

// ---- rules --------------------------------------------------------------------------------------

// Ends the program because a rule of an option does not fit the model.
static _Noreturn void does_not_apply(const char *option, const char *rule, size_t length,
                                     const char *why) {
    fail(WRONG_USAGE, "--%s %.*s: %s", option, (int)length, rule, why);
}

// Ends the program if a rule is about something that this model does not have.
static void check_edit(const Config *c, bool upcycled, const Edit *e, const char *rule, size_t n) {
    const char *name = edit_names[e->kind];
    const int64_t *v = e->value;
    const int64_t limit[CONDITIONS] = { (int64_t)c->num_hidden_layers, (int64_t)c->inner_iter,
                                        (int64_t)c->n_routed_experts,
                                        (int64_t)c->num_attention_heads, 2 };
    char why[120];
    for (int k = 0; k < SHARED_KEY; k++)
        if (v[k] >= limit[k]) {
            snprintf(why, sizeof why, "%s%lld is not there, the model has %lld of them, from 0",
                     condition_names[k], (long long)v[k], (long long)limit[k]);
            does_not_apply(name, rule, n, why);
        }
    bool any_moe = false;                               // in the layers that the rule is about
    for (size_t l = 0; l < c->num_hidden_layers; l++)
        any_moe |= is_moe(c, l) && (v[LAYER] < 0 || v[LAYER] == (int64_t)l);
    const bool of_moe = e->kind != SILENCE || v[ITERATION_KEY] > 0 || v[EXPERT] >= 0 ||
                        v[SHARED_KEY] >= 0;
    if (e->kind != SILENCE && (v[EXPERT] >= 0 || v[HEAD] >= 0 || v[SHARED_KEY] >= 0))
        does_not_apply(name, rule, n, "expert, head and shared are for --silence");
    if (e->kind == SWAP_GATES && v[ITERATION_KEY] >= 0)
        does_not_apply(name, rule, n, "takes layer= alone");
    if ((v[EXPERT] >= 0) + (v[HEAD] >= 0) + (v[SHARED_KEY] >= 0) > 1 ||
        (v[HEAD] >= 0 && v[ITERATION_KEY] >= 0))
        does_not_apply(name, rule, n, "these do not go together: expert, head, shared; and a head "
                                      "is in no iteration");
    if (of_moe && !any_moe) does_not_apply(name, rule, n, "there is no layer of experts");
    if (v[SHARED_KEY] >= 0 && !c->n_shared_experts)
        does_not_apply(name, rule, n, "the model has no shared expert");
    if (e->kind != SILENCE && c->inner_iter < 2)
        does_not_apply(name, rule, n, "the chain has one iteration");
    if (e->kind == SWAP_GATES && !c->use_igate)
        does_not_apply(name, rule, n, "all iterations share one router (use_igate false)");
    if (e->kind == PARALLEL && !c->inner_residual && !c->prenorm_chain && !upcycled)
        does_not_apply(name, rule, n, "the chain has no residual inside, y_c alone goes on");
}

// One rule of n bytes, "layer=3,iteration=1" or "all".
static Edit read_rule(enum EditKind kind, const char *rule, size_t n) {
    Edit e = { .kind = kind, .value = { -1, -1, -1, -1, -1 } };
    if (n == 3 && !memcmp(rule, "all", 3)) return e;
    for (size_t at = 0, end; at <= n; at = end + 1) {
        for (end = at; end < n && rule[end] != ','; end++) {}
        int k = 0;
        size_t length = 0;
        for (; k < CONDITIONS; k++) {
            length = strlen(condition_names[k]);
            if (end - at >= length && !memcmp(rule + at, condition_names[k], length)) break;
        }
        char *stop = NULL;
        const bool number = k < SHARED_KEY && end > at + length;
        const long long value = number ? strtoll(rule + at + length, &stop, 10) : 1;
        if (k == CONDITIONS || e.value[k] >= 0 || value < 0 ||
            (number ? !isdigit((unsigned char)rule[at + length]) || stop != rule + end
                    : k != SHARED_KEY || end != at + length))
            does_not_apply(edit_names[kind], rule, n, "must be all, or of layer=N, iteration=N, "
                           "expert=N, head=N and shared, each once, with commas between them");
        e.value[k] = value;
    }
    return e;
}

// All rules of the command line, for this model; NULL: there are none. The caller releases them.
static Edits *read_edits(const Settings *set, const Model *m) {
    Edits *edits = allocate(sizeof *edits, "the edits");
    for (int kind = 0; kind < EDIT_KINDS; kind++)
        for (const char *rule = set->edits[kind]; rule; ) {
            const size_t n = strcspn(rule, ";");
            if (edits->n == MOST_EDITS) fail(WRONG_USAGE, "more than %d edits", MOST_EDITS);
            const Edit e = read_rule((enum EditKind)kind, rule, n);
            check_edit(&m->config, m->upcycled, &e, rule, n);
            edits->edit[edits->n++] = e;
            rule = rule[n] ? rule + n + 1 : NULL;
        }
    if (edits->n || set->mode == LENS) return edits;
    release(edits);
    return NULL;
}

// ---- the lens -----------------------------------------------------------------------------------
// With c iterations of layer l done, the model would go on with what the next layer gets: y_c,
// and mid with an outer residual; in a prenorm chain mid + (y_c - y_0). Without a residual
// inside y_0 goes no further: before iteration 0 the lens shows mid alone. The lens puts it
// through the final norm and lm_head as if the layers ended there. (The final norm is not
// trained for that: early rows say less than they could.)

// What is seen of one token with c iterations of a layer done. Not there: NAN, or other_choice -1.
typedef struct {
    int guess, other_choice;
    double p_guess, p_next, loss, ffn_norm, y_norm, shared_part;
} View;

typedef struct {
    Run *run;
    View *view;                 // (n, L, C + 1)
    size_t index, first;        // the input's token of row 0; rows before `first` were seen before
    real *stream, *shared;      // (T, d)  what the next layer would get; the shared expert's output
    real *g, *u, *act;          // (T, f S)
    real *y;                    // (T, d)  the y that the iteration before started from
    real *before;               // (T, d)  the y that the iteration now done started from
    real *score, *left, *weight;    // (E), (E), (K)
    int *expert;                // (K)
} Lens;

// The length of a vector.
static double norm_of(const real *x, size_t d) { return sqrt((double)dot(x, x, d)); }

// Whether the router of iteration c would have chosen others on y (d) than it did for token t.
static int other_choice(Lens *p, const Iteration *it, size_t l, size_t c, const real *y, size_t t) {
    const Model *m = &p->run->model;
    const size_t K = m->config.num_experts_per_tok;
    const Layer *w = &m->w.layer[l];
    const size_t gate = gate_of(&m->config, router_of(&p->run->state, l, c, m->config.inner_iter));
    linear(p->score, y, &w->gate, gate, NULL, 1);
    make_scores(p->score, &m->config);
    choose(p->expert, p->weight, p->left, p->score, bias_of(w, gate), &m->config);
    size_t same = 0;
    for (size_t k = 0; k < K; k++)
        for (size_t j = 0; j < K; j++) same += p->expert[k] == it->expert[t * K + j];
    return same < K;
}

// What the iteration c - 1 just done added, for T tokens: sizes, and whether the y before would
// have led elsewhere. p->before is what it started from, p->y what the one before it started from.
static void see_round(Lens *p, const State *s, const Iteration *it, size_t l, size_t c, size_t T) {
    Model *m = &p->run->model;
    LETTERS(&m->config);
    const bool moe = is_moe(&m->config, l);
    const real *input = edited(s, PARALLEL, l, c - 1, -1, 0) ? s->edits->y_0 : p->before;
    if (moe && S)
        feed_forward(shared_mlp(&m->w.layer[l], 1),
                     (MlpRows){ T, (real *)(uintptr_t)input, p->g, p->u, p->act, p->shared, NULL });
    for (size_t t = p->first; t < T; t++) {
        View *v = &p->view[((p->index + t) * L + l) * (C + 1) + c];
        v->ffn_norm = norm_of(it->ffn + t * d, d);
        v->y_norm = norm_of(p->before + t * d, d);
        if (moe && v->ffn_norm > 0)
            v->shared_part = S && !edited(s, SILENCE, l, c - 1, SHARED_KEY, 1)
                             ? norm_of(p->shared + t * d, d) / v->ffn_norm : 0;
        if (moe && c > 1) v->other_choice = other_choice(p, it, l, c - 1, p->y + t * d, t);
    }
}

// Told of each y (T, d): with c iterations of layer l done.
static void see(void *watcher, const State *s, const Iteration *it, size_t l, size_t c,
                const real *y, size_t T) {
    Lens *p = watcher;
    Run *run = p->run;
    const Model *m = &run->model;
    LETTERS(&m->config);
    const bool outer = m->config.outer_residual, last = c == iterations(&m->config, l);
    const bool from_mid = c == 0 && residual_of(m, 0) == NOTHING;
    const real *y_0 = m->config.prenorm_chain && !last ? s->edits->y_0 : NULL;
    const real *mid = s->layer[l].mid;
    if (c) see_round(p, s, it, l, c, T);
    for (size_t i = 0; i < T * d; i++)
        p->stream[i] = y_0 ? mid[i] + (y[i] - y_0[i])
                           : (from_mid ? 0 : y[i]) + (from_mid || (outer && !last) ? mid[i] : 0);
    memcpy(p->y, p->before, T * d * sizeof(real));
    memcpy(p->before, y, T * d * sizeof(real));
    rmsnorm(p->stream, NULL, p->stream, d, m->w.norm, T, m->config.rms_norm_eps);
    for (size_t first = p->first; first < T; first += LOGIT_ROWS) {
        const size_t rows = min_size(T - first, LOGIT_ROWS);
        linear(run->logits, p->stream + first * d, m->w.lm_head, 0, NULL, rows);
        SHARED(rows * V, for (size_t i = 0; i < rows; i++) {
            const size_t at = p->index + first + i;
            real *logits = run->logits + i * V;
            View *v = &p->view[(at * L + l) * (C + 1) + c];
            v->guess = (int)argmax(logits, V);
            if (at + 1 < run->n_tokens) {
                v->loss = cross_entropy(logits, V, run->tokens[at + 1]);
                v->p_next = (double)logits[run->tokens[at + 1]];
            } else {
                softmax(logits, V, 1, NULL);
            }
            v->p_guess = (double)logits[v->guess];
        })
    }
}

// A column of the TSV file: nothing where there is no number.
static void lens_number(FILE *file, double x) {
    char text[DECIMAL_TEXT];
    fprintf(file, "\t%s", isnan(x) ? "" : decimal(text, x));
}

// --lens: a line for every token, layer and number of iterations done.
static void write_lens(const Run *run, const View *view, FILE *file) {
    LETTERS(&run->model.config);
    fputs("position\ttoken\tlayer\titerations\tguess\tp_guess\tp_next\tloss\tffn_norm\ty_norm\t"
          "shared_part\tother_choice\tmodel\n", file);
    for (size_t t = 0; t < run->n_tokens; t++)
        for (size_t l = 0; l < L; l++)
            for (size_t c = 0; c <= iterations(&run->model.config, l); c++) {
                const View *v = &view[(t * L + l) * (C + 1) + c];
                const double numbers[] = { v->p_guess, v->p_next, v->loss, v->ffn_norm, v->y_norm,
                                           v->shared_part };
                fprintf(file, "%zu\t%d\t%zu\t%zu\t%d", t, run->tokens[t], l, c, v->guess);
                for (int i = 0; i < 6; i++) lens_number(file, numbers[i]);
                fprintf(file, v->other_choice < 0 ? "\t" : "\t%d", v->other_choice);
                fprintf(file, "\t%08x\n", run->fingerprint);
            }
}

// Prints a token in so many columns: what it stands for, with marks for what cannot be seen.
static void print_piece(const Run *run, int id, size_t columns) {
    char text[64];
    size_t n = 0, width = 0, length;
    if (!run->model.tokenizer) n = width = (size_t)snprintf(text, sizeof text, "%d", id);
    else for (const char *b = decode(run->model.tokenizer, id, &length); length && n < 60; ) {
        uint32_t code;
        const size_t bytes = next_char(b, length, &code);
        const bool whole = code >= 0x80 && code != 0xFFFD;
        if (whole) memcpy(text + n, b, bytes), n += bytes;
        else text[n++] = *b == '\n' ? '$' : *b == ' ' ? '_' : code < 33 || code > 126 ? '?' : *b;
        b += bytes, length -= bytes;
        if (++width == columns) break;
    }
    if (!n && run->model.tokenizer) text[n++] = '.', width = 1;         // special tokens
    printf("%.*s%*s", (int)n, text, (int)(columns > width ? columns - width : 0), "");
}

// The grid: a row for each token, a column for each number of iterations in each of the layers from
// `from` on: the best guess, marked where it is the next token. Of one layer more is said.
static void print_lens(const Run *run, const View *view, size_t from, size_t to) {
    LETTERS(&run->model.config);
    const bool colour = stdout_is_terminal(), one = to == from + 1 && run->set.layer >= 0;
    const size_t width = one ? 15 : 5;
    printf("%-10s", "layer");
    for (size_t l = from; l < to; l++) printf("%-*zu ", (int)((C + 1) * width), l);
    printf("\n%-10s", "done");
    for (size_t l = from; l < to; l++, putchar(' '))
        for (size_t c = 0; c <= C; c++) printf("%-*zu", (int)width, c);
    putchar('\n');
    for (size_t t = 0; t < run->n_tokens; t++) {
        print_piece(run, run->tokens[t], 9);
        putchar(' ');
        for (size_t l = from; l < to; l++, putchar(' '))
            for (size_t c = 0; c <= C; c++) {
                const View *v = &view[(t * L + l) * (C + 1) + c];
                if (c > iterations(&run->model.config, l)) {
                    printf("%*s", (int)width, "");
                    continue;
                }
                const bool right = t + 1 < run->n_tokens && v->guess == run->tokens[t + 1];
                if (colour && right) fputs("\033[32m", stdout);
                print_piece(run, v->guess, 3);
                putchar(right ? '*' : ' ');
                if (colour && right) fputs("\033[0m", stdout);
                if (!one) putchar(' ');
                else if (isnan(v->ffn_norm)) printf("%3.0f%%       ", 100 * v->p_guess);
                else printf("%3.0f%% %4.2f%s ", 100 * v->p_guess,
                            fmin(v->ffn_norm / v->y_norm, 9.99), v->other_choice > 0 ? "!" : " ");
            }
        const View *v = &view[((t + 1) * L - 1) * (C + 1) + iterations(&run->model.config, L - 1)];
        if (isnan(v->loss)) putchar('\n');
        else printf("%6.2f\n", v->loss);
    }
    puts("");
    puts(one ? "best guess, * is right; its probability; size of what the iteration added over\n"
               "that of y; ! the router would have chosen others on the y before; loss"
             : "best guess with so many iterations done, * is right; loss of the model");
    puts("_ is a blank, $ a newline, . a special token, ? what cannot be shown");
}

// --mode lens.
static void lens(Run *run) {
    const Config *config = &run->model.config;
    LETTERS(config);
    const size_t n = run->n_tokens, rows = min_size(n ? n : 1, CHUNK);
    if (run->set.layer >= (int64_t)L)
        fail(WRONG_USAGE, "--layer is %lld, must be 0..%zu", (long long)run->set.layer, L - 1);
    make_room(run, n ? n : 1, LOGIT_ROWS);
    Lens p = { .run = run };
    const size_t cells = checked_mul(checked_mul(n + 1, L), C + 1), vector = checked_mul(rows, d);
    p.view = allocate(checked_mul(cells, sizeof(View)), "what the lens sees");
    for (size_t i = 0; i < cells; i++)
        p.view[i] = (View){ -1, -1, NAN, NAN, NAN, NAN, NAN, NAN };
    real **const vectors[] = { &p.stream, &p.shared, &p.y, &p.before };
    for (int i = 0; i < 4; i++)
        *vectors[i] = allocate(checked_mul(vector, sizeof(real)), "the lens");
    real **const wide[] = { &p.g, &p.u, &p.act };
    for (int i = 0; i < 3; i++)
        *wide[i] = allocate(checked_mul(rows * sizeof(real), checked_mul(f, S + 1)), "the lens");
    p.score = allocate((E + 1) * sizeof(real), "the lens");
    p.left = allocate((E + 1) * sizeof(real), "the lens");
    p.weight = allocate((K + 1) * sizeof(real), "the lens");
    p.expert = allocate((K + 1) * sizeof(int), "the lens");
    run->state.edits->watch = see;
    run->state.edits->watcher = &p;
    double nats = 0;
    for (Walk w = { 0 }; next_chunk(run, &w); ) {
        p.index = w.index, p.first = w.skip;
        step(run, w.index, w.rows, w.position, w.skip, w.rows);
    }
    run->state.edits->watch = NULL;
    for (size_t t = 0; t + 1 < n; t++) {
        const double loss = p.view[((t + 1) * L - 1) * (C + 1) + iterations(config, L - 1)].loss;
        if (!isfinite(loss)) not_finite(run, t);
        nats += loss;
    }
    const size_t fit = min_size(L, (80 - 10 - 6) / ((C + 1) * 5 + 1));
    size_t from = L - (fit ? fit : 1), to = L;
    if (run->set.layer >= 0) from = (size_t)run->set.layer, to = from + 1;
    if (from && run->set.layer < 0)
        fprintf(stderr, "lens: layers %zu to %zu of %zu, as many as fit; --layer N shows another\n",
                from, L - 1, L);
    print_lens(run, p.view, from, to);
    if (n > 1) print_value("nll", nats / (double)(n - 1)), print_untouched(run);
    if (run->lens_file.file) write_lens(run, p.view, run->lens_file.file);
    release(p.view);
    for (int i = 0; i < 4; i++) release(*vectors[i]);
    for (int i = 0; i < 3; i++) release(*wide[i]);
    release(p.score), release(p.left), release(p.weight), release(p.expert);
}
#endif // LENS_H
