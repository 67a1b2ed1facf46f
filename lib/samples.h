// lib/samples.h - trying the model out during training: solving held-out problems, and showing what
// it writes. Included by train.c.
#ifndef SAMPLES_H
#define SAMPLES_H

enum { ANSWER_TOKENS = 96, ANSWER_BYTES = 4096 };  // the longest answer has about 60 bytes

// Continues a prompt of n tokens by at most `most` tokens, or up to EOS; text (ANSWER_BYTES) gets
// their bytes, as far as they fit, and a final NUL. s has room for all of it.
static void complete(const Model *m, State *s, Sampler *sampler, const int *prompt, size_t n,
                     size_t most, char *text) {
    const size_t V = m->config.vocab_size;
    real *logits = allocate(V * sizeof(real), "logits");
    Candidate *candidate = allocate(V * sizeof(Candidate), "candidates");
    size_t length = 0, bytes;
    forward(m, s, prompt, 1, n, 0, 1);
    for (size_t i = 0; i < most; i++) {
        logits_forward(m, s, logits, 0, 1);
        int token = sample(sampler, logits, candidate, NULL, V);
        if (token == m->config.eos_token_id) break;
        const char *from = decode(m->tokenizer, token, &bytes);
        if (length + bytes >= ANSWER_BYTES) break;
        memcpy(text + length, from, bytes);
        length += bytes;
        if (i + 1 < most) forward(m, s, &token, 1, 1, n + i, 1);
    }
    text[length] = 0;
    release(logits);
    release(candidate);
}

// Held-out problem i: its text, and as tokens EOS (what precedes a document) and the question, a
// line that is tokenized as it is in training. Returns the number of tokens.
static size_t question_tokens(int *tokens, char *problem, const Run *run, size_t i) {
    task_problem(problem, 0, i, (int)run->recipe.level, 1);
    tokens[0] = run->data.eos;
    return 1 + encode(run->model.tokenizer, tokens + 1, problem,
                      (size_t)task_prompt_length(problem), 0);
}

// The share of the first `problems` held-out problems whose final number greedy decoding gets
// right. A thread takes a problem at a time, with a cache of its own.
static double solve(const Run *run, size_t problems) {
    size_t right = 0;
    #pragma omp parallel reduction(+:right)
    {
        State s = state_new(&run->model.config, TASK_MAX, TASK_MAX + ANSWER_TOKENS, KEEP_NOTHING);
        #pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < problems; i++) {
            char problem[TASK_MAX], answer[ANSWER_BYTES];
            int tokens[TASK_MAX + 1];
            Sampler greedy = { .temperature = 0 };
            size_t n = question_tokens(tokens, problem, run, i);
            complete(&run->model, &s, &greedy, tokens, n, ANSWER_TOKENS, answer);
            right += task_answer(answer) == task_answer(problem);
        }
        state_free(&s);
    }
    return (double)right / (double)problems;
}

// Shows what the model makes of a held-out question, or of an empty page, on stderr.
static void show_sample(const Run *run) {
    const Config *c = &run->model.config;
    const int built_in = run->data.built_in;
    if (!run->model.tokenizer || c->eos_token_id < 0) return;
    State s = state_new(c, TASK_MAX, TASK_MAX + ANSWER_TOKENS * 2, KEEP_NOTHING);
    char problem[TASK_MAX] = "", text[ANSWER_BYTES];
    int tokens[TASK_MAX + 1] = { (int)c->eos_token_id };
    Sampler sampler = { .temperature = built_in ? 0 : 0.8, .top_k = 40, .top_p = 0.95,
                        .rng = (uint64_t)run->step };
    size_t n = 1;
    if (built_in) n = question_tokens(tokens, problem, run, (size_t)run->step % TASK_VALIDATION);
    complete(&run->model, &s, &sampler, tokens, n, ANSWER_TOKENS * (built_in ? 1 : 2), text);
    if (built_in) problem[task_prompt_length(problem)] = 0;
    Utf8 out = { .to = stderr };
    fprintf(stderr, "--- step %lld ---\n%s", (long long)run->step, problem);
    utf8_print(&out, text, strlen(text));
    utf8_flush(&out, 1);
    fprintf(stderr, "\n---\n");
    state_free(&s);
}
#endif // SAMPLES_H
