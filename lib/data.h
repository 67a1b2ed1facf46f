// lib/data.h - where batches come from.
//
// A sample is max_length inputs and as many targets. With packing, the documents make one stream of
// tokens, cut into windows that overlap by one: max_length inputs, and the same shifted by one as
// targets. Without, a sample is one document: BOS where the tokenizer adds one, its tokens, its
// EOS; cut to max_length + 1, or padded with EOS. A target that has no loss (padding, or not in the
// completion) is NO_TARGET. Which sample comes when depends on the recipe and the step alone, so
// that a checkpoint need only know its step.
#ifndef DATA_H
#define DATA_H

enum { NO_TARGET = -1 };            // a target without a loss; PyTorch calls this ignore_index
enum { TASK_VALIDATION = 500 };     // held-out problems, whose text makes the validation loss

// Where batches come from: a stream in memory, or problems made as they are needed.
typedef struct {
    const Recipe *recipe;
    const Tokenizer *tokenizer; // for problems
    bool built_in;
    int bos, eos;               // bos: what a document begins with without packing; -1: nothing
    Stream train, val;
    size_t *train_document, *val_document;  // without packing: starts of documents, then the end
    size_t train_documents, val_documents;  // how many they are
    size_t val_targets;         // validation tokens that have a loss
    size_t *order;              // [samples] this epoch's order of the samples
    uint64_t epoch;             // the epoch of `order`, + 1; 0: none yet
    Stream pending;             // built-in: tokens made and not used yet
    uint64_t problem;           // built-in: the next problem to make
} Data;

// The marker of completions, or NULL where everything counts.
static const char *marker_of(const Recipe *r) {
    return r->completion_only_loss ? r->completion_marker : NULL;
}

// ---- streams ------------------------------------------------------------------------------------

// Takes the last 5 % of the documents off s for validation; of the tokens where there are fewer
// than 20 documents. Then data read in file order stays whole: its last 5 % serve for both.
static Stream split_stream(Stream *s, int eos, bool sequential) {
    size_t cut = s->n, left = s->documents / 20;
    if (left == 0) {
        cut = s->n - s->n / 20;
        fprintf(stderr, "train: only %zu document%s: the last 5 %% of the tokens validate%s\n",
                s->documents, s->documents == 1 ? "" : "s",
                sequential ? ", and are trained on" : "");
    } else {
        for (cut = s->n - 1; cut > 0; cut--)    // back to the EOS before the last `left` documents
            if (s->tokens[cut - 1] == eos && --left == 0) break;
    }
    Stream val = { s->tokens + cut, s->counts ? s->counts + cut : NULL, s->n - cut, 0 };
    for (size_t i = cut; i < s->n; i++) val.documents += s->tokens[i] == eos;
    if (s->documents / 20 || !sequential) s->n = cut;
    return val;
}

// A number that depends on every token, and on which of them count: it tells a checkpoint's data
// from other data.
static uint64_t fingerprint(const Stream *s) {
    uint64_t h = 0xCBF29CE484222325u;       // FNV-1a
    for (size_t i = 0; i < s->n; i++) {
        const uint64_t mark = s->counts && !s->counts[i] ? (uint64_t)1 << 32 : 0;
        h = (h ^ ((uint64_t)s->tokens[i] | mark)) * 0x100000001B3u;
    }
    return h;
}

// Where the documents of a stream start, and its end behind them; *count of them. A document ends
// behind its EOS, the last one with the stream.
static size_t *find_documents(const Stream *s, int eos, size_t *count) {
    size_t *start = allocate(checked_mul(s->documents + 2, sizeof(size_t)), "the documents");
    *count = 0;
    for (size_t i = 0; i < s->n; i++)
        if (i == 0 || s->tokens[i - 1] == eos) start[(*count)++] = i;
    start[*count] = s->n;
    return start;
}

// Problem number i as a document at the end of s, which has room for TASK_MAX tokens more.
static void add_problem(Stream *s, const Data *data, uint64_t i, int held_out) {
    const Recipe *r = data->recipe;
    char text[TASK_MAX];
    size_t starts[TASK_MAX];
    const int length = task_problem(text, (uint64_t)r->seed, i, (int)r->level, held_out);
    add_document(s, data->tokenizer, text, (size_t)length, data->eos, marker_of(r), starts);
    s->documents++;
}

// An empty stream with room for so many problems.
static Stream room_for_problems(size_t problems) {
    const size_t tokens = checked_mul(problems, TASK_MAX + 1);
    return (Stream){ .tokens = allocate(checked_mul(tokens, sizeof(int)), "problems"),
                     .counts = allocate(tokens, "problems") };
}

// The stream of the first held-out problems.
static Stream task_validation(const Data *data) {
    Stream s = room_for_problems(TASK_VALIDATION);
    for (uint64_t i = 0; i < TASK_VALIDATION; i++) add_problem(&s, data, i, 1);
    return s;
}

// ---- samples ------------------------------------------------------------------------------------

// How many windows of n inputs, and one token more, a stream has.
static size_t windows(const Stream *s, size_t n) { return s->n ? (s->n - 1) / n : 0; }

// How many samples the validation data makes. A stream shorter than a window is one of its own.
static size_t val_samples(const Data *data) {
    const size_t n = windows(&data->val, data->recipe->max_length);
    return !data->recipe->packing ? data->val_documents : n ? n : data->val.n > 1;
}

// How many samples training data in memory makes.
static size_t train_samples(const Data *data) {
    return data->recipe->packing ? windows(&data->train, data->recipe->max_length)
                                 : data->train_documents;
}

// The target for predicting token i of a stream.
static int target_of(const Stream *s, size_t i) {
    return s->counts && !s->counts[i] ? NO_TARGET : s->tokens[i];
}

// The window of a stream that starts at token `from`: inputs and targets (n). Where the stream ends
// before the window, its last token is repeated, without a loss.
static void window_sample(int *inputs, int *targets, size_t n, const Stream *s, size_t from) {
    for (size_t i = 0; i < n; i++) {
        const size_t at = from + i;
        inputs[i] = s->tokens[min_size(at, s->n - 1)];
        targets[i] = at + 1 < s->n ? target_of(s, at + 1) : NO_TARGET;
    }
}

// The document from token `from` up to `to` of a stream as a sample: inputs and targets (n).
static void document_sample(int *inputs, int *targets, size_t n, const Data *data, const Stream *s,
                            size_t from, size_t to) {
    const bool bos = data->bos >= 0, has_end = to > from && s->tokens[to - 1] == data->eos;
    const size_t length = bos + (to - from) + !has_end;     // with BOS and EOS
    for (size_t i = 0; i < n + 1; i++) {
        const size_t at = from + i - bos;                   // of token i of the sample
        const bool is_bos = i == 0 && bos, inside = i < length && at < to && !is_bos;
        const int token = is_bos ? data->bos : inside ? s->tokens[at] : data->eos;
        if (i < n) inputs[i] = token;
        if (i > 0) targets[i - 1] = i >= length ? NO_TARGET : inside ? target_of(s, at) : token;
    }
}

// Validation sample number i: inputs and targets (max_length).
static void val_sample(int *inputs, int *targets, const Data *data, size_t i) {
    const size_t n = data->recipe->max_length, *start = data->val_document;
    if (data->recipe->packing) window_sample(inputs, targets, n, &data->val, i * n);
    else document_sample(inputs, targets, n, data, &data->val, start[i], start[i + 1]);
}

// The next training sample of the built-in task. With packing it takes max_length tokens off an
// endless stream of problems, whose last token stays; else it is a problem of its own.
static void next_made_sample(int *inputs, int *targets, Data *data) {
    const size_t n = data->recipe->max_length;
    Stream *s = &data->pending;
    if (!s->tokens) *s = room_for_problems(n / TASK_MAX + 2);
    if (!data->recipe->packing) {
        s->n = 0;
        add_problem(s, data, data->problem++, 0);
        document_sample(inputs, targets, n, data, s, 0, s->n);
        return;
    }
    while (s->n < n + 1) add_problem(s, data, data->problem++, 0);
    window_sample(inputs, targets, n, s, 0);
    memmove(s->tokens, s->tokens + n, (s->n - n) * sizeof(int));
    memmove(s->counts, s->counts + n, s->n - n);
    s->n -= n;
}

// Goes on where a run was: the next problem to make is number `problem`, and the last `pending`
// tokens of those before it, which are not more than a problem has, are still to come.
static void go_to_problem(Data *data, uint64_t problem, size_t pending) {
    Stream *s = &data->pending;
    *s = room_for_problems(data->recipe->max_length / TASK_MAX + 4);
    for (uint64_t first = problem; s->n < pending && first > 0; ) {
        s->n = 0;
        for (uint64_t i = --first; i < problem; i++) add_problem(s, data, i, 0);
    }
    const size_t gone = s->n - min_size(s->n, pending);
    memmove(s->tokens, s->tokens + gone, (s->n - gone) * sizeof(int));
    memmove(s->counts, s->counts + gone, s->n - gone);
    s->n -= gone;
    data->problem = problem;
}

// The place in the data of sample number i of a run: in file order, or in an order drawn anew each
// epoch.
static size_t place_of(Data *data, uint64_t i) {
    const size_t count = train_samples(data);
    const uint64_t epoch = i / count;
    if (data->recipe->sequential) return i % count;
    if (data->epoch != epoch + 1) {
        uint64_t rng = (uint64_t)data->recipe->seed * 0x9E3779B97F4A7C15u + epoch;
        if (!data->order)
            data->order = allocate(checked_mul(count, sizeof(size_t)), "the order of the data");
        for (size_t w = 0; w < count; w++) {            // Fisher and Yates, from the inside out
            const size_t other = (size_t)(rng_next(&rng) % (w + 1));
            data->order[w] = data->order[other];
            data->order[other] = w;
        }
        data->epoch = epoch + 1;
    }
    return data->order[i % count];
}

// Training sample number i of a run: inputs and targets (max_length). Samples of the built-in task
// must be asked for in order.
static void train_sample(int *inputs, int *targets, Data *data, uint64_t i) {
    const size_t n = data->recipe->max_length, *start = data->train_document;
    if (data->built_in) {
        next_made_sample(inputs, targets, data);
        return;
    }
    const size_t place = place_of(data, i);
    if (data->recipe->packing) window_sample(inputs, targets, n, &data->train, place * n);
    else document_sample(inputs, targets, n, data, &data->train, start[place], start[place + 1]);
}

// How many of n targets have a loss.
static size_t count_targets(const int *targets, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += targets[i] != NO_TARGET;
    return count;
}

// How many validation tokens have a loss.
static size_t count_val_targets(const Data *data) {
    const size_t n = data->recipe->max_length;
    int *sample = allocate(checked_mul(2 * n, sizeof(int)), "a validation sample");
    size_t count = 0;
    for (size_t i = 0; i < val_samples(data); i++) {
        val_sample(sample, sample + n, data, i);
        count += count_targets(sample + n, n);
    }
    release(sample);
    return count;
}

// The batch of a step: inputs and targets (batch_size, max_length). The steps must be asked for in
// order.
static void next_batch(Data *data, uint64_t step, int *inputs, int *targets) {
    const size_t B = data->recipe->batch_size, n = data->recipe->max_length;
    for (size_t b = 0; b < B; b++)
        train_sample(inputs + b * n, targets + b * n, data, step * B + b);
}

#endif // DATA_H
