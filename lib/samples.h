// lib/samples.h - trying the model out during training: solving held-out problems, and showing what
// it writes. Included by train.c.
//
// A problem is a held-out document: a question, which is given, and a completion that ends in a
// line "#### n". It is solved if what the model completes ends in the same number.
#ifndef SAMPLES_H
#define SAMPLES_H

enum { ANSWER_TOKENS = 96, MOST_ANSWER_TOKENS = 1024 };     // of the built-in task; of any

typedef struct {
    char *text;                 // all of the document, and a final NUL
    size_t prompt_bytes;        // of its beginning, up to the marker
    int *tokens;                // [n]  the prompt, and before it what precedes a document
    size_t n;
} Problem;

// The text of held-out document i: made anew, or decoded. The caller releases it.
static char *held_out_text(const Run *run, size_t i) {
    const Data *data = &run->data;
    if (data->built_in) {
        char *text = allocate(TASK_MAX, "a problem");
        task_problem(text, 0, i, (int)run->recipe.level, 1);
        return text;
    }
    size_t room = 1, length = 0, bytes;
    for (size_t j = data->val_document[i]; j < data->val_document[i + 1]; j++) {
        decode(run->model.tokenizer, data->val.tokens[j], &bytes);
        room += bytes;
    }
    char *text = allocate(room, "a problem");
    for (size_t j = data->val_document[i]; j < data->val_document[i + 1]; j++) {
        const char *part = decode(run->model.tokenizer, data->val.tokens[j], &bytes);
        memcpy(text + length, part, bytes);
        length += bytes;
    }
    return text;
}

// Held-out problem i. The prompt ends with the newline in front of the marker, where the usual
// tokenizers never join it with what follows.
static Problem problem_new(const Run *run, size_t i) {
    const Data *data = &run->data;
    Problem p = { .text = held_out_text(run, i) };
    const size_t n = strlen(p.text);
    p.prompt_bytes = completion_start(p.text, n, run->recipe.completion_marker);
    p.prompt_bytes += p.text[p.prompt_bytes] == '\n';
    p.tokens = allocate((p.prompt_bytes + 1) * sizeof(int), "a problem");
    const int before = run->recipe.packing ? data->eos : data->bos;
    if (before >= 0) p.tokens[p.n++] = before;
    p.n += encode(run->model.tokenizer, p.tokens + p.n, NULL, p.text, p.prompt_bytes, 0);
    return p;
}

static void problem_free(Problem *p) { release(p->text); release(p->tokens); }

// How many held-out problems there are; of the built-in task as many as anybody wants.
static size_t problem_count(const Run *run) {
    return run->data.built_in ? SIZE_MAX : run->model.tokenizer ? run->data.val_documents : 0;
}

// Whether any held-out text has an answer to compare with.
static bool has_answers(const Run *run) {
    bool found = false;
    for (size_t i = 0; i < problem_count(run) && !found; i++) {
        char *text = held_out_text(run, i);
        found = task_answer(text) != NO_ANSWER;
        release(text);
    }
    return found;
}

// The most tokens that may follow a prompt of n.
static size_t answer_room(const Run *run, size_t n) {
    if (run->data.built_in) return ANSWER_TOKENS;
    const size_t context = run->model.config.max_position_embeddings;
    return min_size(MOST_ANSWER_TOKENS, context > n ? context - n : 0);
}

// Continues a prompt of n tokens by at most `most` tokens, or up to EOS. Returns the bytes of what
// follows, with a final NUL; the caller releases them. s has room for all of it.
static char *complete(const Model *m, State *s, Sampler *sampler, const int *prompt, size_t n,
                      size_t most) {
    const size_t V = m->config.vocab_size;
    real *logits = allocate(V * sizeof(real), "logits");
    Candidate *candidate = allocate(V * sizeof(Candidate), "candidates");
    size_t length = 0, room = 256, bytes;
    char *text = allocate(room, "an answer");
    forward(m, s, prompt, 1, n, 0, 1);
    for (size_t i = 0; i < most; i++) {
        logits_forward(m, s, logits, 0, 1);
        int token = sample(sampler, logits, candidate, NULL, V);
        if (ends_text(&m->config.generation, token)) break;
        const char *from = decode(m->tokenizer, token, &bytes);
        if (length + bytes >= room) {
            char *more = allocate(room = 2 * room + bytes, "an answer");
            memcpy(more, text, length);
            release(text);
            text = more;
        }
        memcpy(text + length, from, bytes);
        length += bytes;
        if (i + 1 < most) forward(m, s, &token, 1, 1, n + i, 1);
    }
    text[length] = 0;
    release(logits);
    release(candidate);
    return text;
}

// Whether greedy decoding gets the final number of a problem right.
static bool solves(const Run *run, const Problem *p) {
    const size_t most = answer_room(run, p->n);
    State s = state_new(&run->model.config, p->n, p->n + most, KEEP_NOTHING);
    Sampler greedy = { .temperature = 0 };
    char *answer = complete(&run->model, &s, &greedy, p->tokens, p->n, most);
    const int64_t right = task_answer(p->text);
    const bool solved = right != NO_ANSWER && task_answer(answer) == right;
    release(answer);
    state_free(&s);
    return solved;
}

// The share of the first `problems` held-out problems that are solved; NAN if there are none. A
// thread takes a problem at a time.
static double solve(const Run *run, size_t problems) {
    size_t right = 0;
    const double start = seconds();
    problems = min_size(problems, problem_count(run));
    #pragma omp parallel for schedule(dynamic, 1) reduction(+:right)
    for (size_t i = 0; i < problems; i++) {
        if (interrupted) continue;
        if (thread_id() == 0) show_part("problems", i, problems, start);
        Problem p = problem_new(run, i);
        if (p.n) right += solves(run, &p);
        problem_free(&p);
    }
    return problems ? (double)right / (double)problems : NAN;
}

// Shows what the model makes of a held-out question or, where it learns to write whole documents,
// of an empty page, on stderr.
static void show_sample(const Run *run) {
    const Config *c = &run->model.config;
    const bool ask = run->data.built_in || run->recipe.completion_only_loss;
    int eos = (int)c->generation.eos_token_id[0];
    if (!run->model.tokenizer || eos < 0 || (ask && !problem_count(run))) return;
    Problem p = { .tokens = &eos, .n = 1 };
    const size_t problems = min_size(problem_count(run), TASK_VALIDATION);
    if (ask) p = problem_new(run, (size_t)run->step % problems);
    const size_t most = ask ? answer_room(run, p.n) : 2 * ANSWER_TOKENS;
    State s = state_new(c, p.n, p.n + most, KEEP_NOTHING);
    Sampler sampler = { .temperature = ask ? 0 : 0.8, .top_k = 40, .top_p = 0.95,
                        .rng = (uint64_t)run->step };
    char *text = complete(&run->model, &s, &sampler, p.tokens, p.n, most);
    Utf8 out = { .to = stderr };
    fprintf(stderr, "--- step %lld ---\n%.*s", (long long)run->step, (int)p.prompt_bytes,
            ask ? p.text : "");
    utf8_print(&out, text, strlen(text));
    utf8_flush(&out, 1);
    fprintf(stderr, "\n---\n");
    release(text);
    state_free(&s);
    if (ask) problem_free(&p);
}
#endif // SAMPLES_H
