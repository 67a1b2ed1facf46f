// lib/bench.h - run --mode bench: speed, and what it means for the machine. Included by run.c.
#ifndef BENCH_H
#define BENCH_H

enum { BENCH_REPEATS = 5, BENCH_PROMPT = 512, BENCH_BEFORE = 16, BENCH_TOKENS = 128 };

// For qsort: doubles, the smallest first.
static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// The middle one of n numbers, which it sorts, and how far apart they are as a part of that.
static double median(double *x, size_t n, double *spread) {
    qsort(x, n, sizeof *x, ascending);
    *spread = (x[n - 1] - x[0]) / x[n / 2];
    return x[n / 2];
}

// Operations, a product and its sum being 2, for n tokens at positions pos ... and the logits of
// the last one, which alone passes the last layer's experts: the matrices, and attention to all
// that each token sees, in one of the two forms of coe.c [6].
static double operations(const Model *m, double n, double pos) {
    const Config *c = &m->config;
    const double head = (double)(c->vocab_size * c->hidden_size);
    const double heads = (double)(c->num_attention_heads * c->num_hidden_layers);
    const double keys = n * pos + n * (n + 1) / 2;
    const double per_key = pos == 0 && n > 1
        ? (double)(c->qk_nope_head_dim + c->qk_rope_head_dim + c->v_head_dim)
        : (double)(c->kv_lora_rank + c->qk_rope_head_dim + c->kv_lora_rank);
    const Parameters p = count_parameters(m);
    const double before = (double)p.active - head - (double)p.last_ffn;     // of the last row alone
    return 2 * (n * before + (double)p.last_ffn + head + keys * per_key * heads);
}

// Seconds per token, on random ones: the first `prompt` at once; then, from `before` on, n one by
// one. The median of 5 runs each, and their spread.
static void time_tokens(Run *run, size_t prompt, size_t before, size_t n,
                        double at_once[2], double single[2]) {
    double all[BENCH_REPEATS], each[BENCH_REPEATS];
    step(run, 0, prompt, 0, 0, 1);        // the first run brings the weights into memory
    for (int k = 0; k < BENCH_REPEATS; k++) {
        double start = seconds();
        logits_forward(&run->model, &run->state, run->logits, step(run, 0, prompt, 0, 0, 1), 1);
        all[k] = (seconds() - start) / (double)prompt;
        if (before) step(run, 0, before, 0, 0, 1);
        start = seconds();
        for (size_t i = before; i < before + n; i++) {
            logits_forward(&run->model, &run->state, run->logits, step(run, i, 1, i, 0, 1), 1);
        }
        each[k] = (seconds() - start) / (double)n;
    }
    at_once[0] = median(all, BENCH_REPEATS, &at_once[1]);
    single[0] = median(each, BENCH_REPEATS, &single[1]);
}

// Speed, and what it means for the machine. A short context makes the runs shorter.
static void bench(Run *run) {
    const Model *m = &run->model;
    make_room(run, BENCH_PROMPT, 1);
    const size_t prompt = run->context, before = min_size(BENCH_BEFORE, prompt - 1);
    const size_t n = min_size(BENCH_TOKENS, prompt - before);
    uint64_t rng = 0;
    run->tokens = allocate(prompt * sizeof(int), "the tokens");
    for (size_t i = 0; i < prompt; i++)
        run->tokens[i] = (int)(rng_next(&rng) % m->config.vocab_size);
    double at_once[2], single[2];
    time_tokens(run, prompt, before, n, at_once, single);
    const double prompt_s = at_once[0], token_s = single[0];
    // A token reads every active parameter, and the cache up to where it is: on average the middle.
    const double middle = (double)before + (double)(n - 1) / 2;
    const double prompt_flop = operations(m, (double)prompt, 0);
    const double bytes = (double)count_parameters(m).active_bytes +
                         middle * (double)cache_bytes(&m->config);
    print_count("prefill_tokens", prompt);
    print_value("prefill_tok_s", 1 / prompt_s);
    print_value("prefill_spread", at_once[1]);
    print_value("prefill_gflop_s", prompt_flop / (double)prompt / prompt_s * 1e-9);
    print_count("decode_tokens", n);
    print_value("decode_tok_s", 1 / token_s);
    print_value("decode_spread", single[1]);
    print_value("decode_gflop_s", operations(m, 1, middle) / token_s * 1e-9);
    print_value("decode_gb_s", bytes / token_s * 1e-9);
    print_value("bytes_per_token", bytes);
}
#endif // BENCH_H
