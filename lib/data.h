// lib/data.h - where batches come from.
//
// Training data is one stream of tokens, documents ending in EOS, cut into windows of
// max_length + 1 that overlap by one: max_length inputs, and the same shifted by one as targets.
// Which window comes when depends on the recipe and the step alone, so that a checkpoint need only
// know its step.

#ifndef DATA_H
#define DATA_H

// ---- streams ------------------------------------------------------------------------------------

static const char EOS_TEXT[] = "<|endoftext|>";     // in texts, whatever the tokenizer calls it

typedef struct {
    int *tokens;                // [n]
    size_t n;
    size_t documents;
} Stream;

// A whole file in memory, and its size; the caller releases it. Fails on what cannot be read.
static char *read_file(const char *path, size_t *bytes) {
    uint64_t size;
    FILE *file = open_regular(path, &size);
    char *text = allocate(checked_add((size_t)size, 1), "the data");
    read_exactly(text, (size_t)size, file, path);
    fclose(file);
    *bytes = (size_t)size;
    return text;
}

// Whether a line of n bytes, its end included, is what stands between two documents.
static int is_separator(const char *line, size_t n) {
    const size_t length = sizeof EOS_TEXT - 1;
    n -= n && line[n - 1] == '\n';
    n -= n && line[n - 1] == '\r';
    return n == length && !memcmp(line, EOS_TEXT, length);
}

// Adds the tokens of a text whose documents are separated by lines "<|endoftext|>", each of which
// becomes one EOS. s->tokens has room for bytes + 1.
static void tokenize_documents(Stream *s, const Tokenizer *t, const char *text, size_t bytes,
                               int eos) {
    for (size_t i = 0, document = 0, end; i < bytes; i = end) {
        const char *newline = memchr(text + i, '\n', bytes - i);
        end = newline ? (size_t)(newline - text) + 1 : bytes;
        const int separator = is_separator(text + i, end - i);
        if (!separator && end < bytes) continue;
        s->n += encode(t, s->tokens + s->n, text + document, (separator ? i : end) - document, 0);
        if (separator) s->tokens[s->n++] = eos;
        document = end;
    }
    if (s->n && s->tokens[s->n - 1] != eos)     // the last document ends too
        s->tokens[s->n++] = eos;
}

// Adds the ids of an llm.c token file, each below V: 256 int32 of header (magic, version, count),
// then uint16 or uint32.
static void read_token_file(Stream *s, const char *path, const char *text, size_t bytes, size_t V) {
    int32_t header[3];
    memcpy(header, text, sizeof header);
    const size_t width = header[0] == 20240801 ? 4 : 2, version = width == 4 ? 7 : 1;
    if ((size_t)header[1] != version)
        fail(FAILED, "%s: version is %d, must be %zu for magic %d",
             path, header[1], version, header[0]);
    if (bytes < 1024 || header[2] < 0 || bytes - 1024 != width * (size_t)header[2])
        fail(FAILED, "%s: is %zu bytes long, but its header says %d tokens of %zu bytes after 1024",
             path, bytes, header[2], width);
    for (size_t i = 0; i < (size_t)header[2]; i++) {
        uint32_t wide = 0;
        memcpy(&wide, text + 1024 + i * width, width);      // little-endian, as the machine
        if (wide >= V)
            fail(FAILED, "%s: token %u at byte %zu, must be below vocab_size %zu",
                 path, wide, 1024 + i * width, V);
        s->tokens[s->n++] = (int)wide;
    }
}

// Reads a file of either kind, told apart by the magic. Fails on text that no tokenizer can encode.
static Stream read_stream(const Model *m, const char *path) {
    size_t bytes;
    char *text = read_file(path, &bytes);
    int32_t magic = 0;
    Stream s = { 0 };
    if (!bytes) fail(FAILED, "%s: is empty, must be UTF-8 text or a token file", path);
    s.tokens = allocate(checked_mul(checked_add(bytes, 1), sizeof(int)), "the tokens of the data");
    if (bytes >= 12) memcpy(&magic, text, sizeof magic);
    if (magic == 20240520 || magic == 20240801)
        read_token_file(&s, path, text, bytes, m->config.vocab_size);
    else if (!m->tokenizer || m->config.eos_token_id < 0)
        fail(FAILED, "%s: is text, but the model has no tokenizer or no eos_token_id: "
             "give a token file or --tokenizer", path);
    else
        tokenize_documents(&s, m->tokenizer, text, bytes, (int)m->config.eos_token_id);
    for (size_t i = 0; i < s.n; i++) s.documents += s.tokens[i] == m->config.eos_token_id;
    release(text);
    return s;
}

// Takes the last 5 % of the documents off s for validation; of the tokens where there are fewer
// than 20 documents. Then data read in file order stays whole: its last 5 % serve for both.
static Stream split_stream(Stream *s, int eos, int sequential) {
    size_t cut = s->n, left = s->documents / 20;
    if (left == 0) {
        cut = s->n - s->n / 20;
        fprintf(stderr, "train: %zu documents are too few to set some aside: "
                "the last 5 %% of the tokens validate%s\n",
                s->documents, sequential ? ", and are trained on" : "");
    } else {
        for (cut = s->n - 1; cut > 0; cut--)    // back to the EOS before the last `left` documents
            if (s->tokens[cut - 1] == eos && --left == 0) break;
    }
    Stream val = { s->tokens + cut, s->n - cut, s->documents / 20 };
    if (s->documents / 20 || !sequential) s->n = cut;
    return val;
}

// A number that depends on every token: it tells a checkpoint's data from other data.
static uint64_t fingerprint(const Stream *s) {
    uint64_t h = 0xCBF29CE484222325u;       // FNV-1a
    for (size_t i = 0; i < s->n; i++) h = (h ^ (uint64_t)s->tokens[i]) * 0x100000001B3u;
    return h;
}

// ---- batches ------------------------------------------------------------------------------------

enum { TASK_VALIDATION = 500 };     // held-out problems, whose text makes the validation loss

// Where batches come from: a stream in memory, or problems made as they are needed.
typedef struct {
    const Recipe *recipe;
    const Tokenizer *tokenizer; // for problems
    int built_in, eos;
    Stream train, val;
    size_t *order;              // [windows] this epoch's order of the windows
    uint64_t epoch;             // the epoch of `order`, + 1; 0: none yet
    int *pending;               // [n_pending] built-in: tokens made and not used yet
    size_t n_pending;
    uint64_t document;          // built-in: the next problem to make
} Data;

// Problem number i as tokens, EOS included, at most TASK_MAX of them; returns how many.
static size_t task_tokens(int *tokens, const Data *data, uint64_t i, int held_out) {
    const Recipe *r = data->recipe;
    char text[TASK_MAX];
    int length = task_problem(text, (uint64_t)r->seed, i, (int)r->level, held_out);
    size_t n = encode(data->tokenizer, tokens, text, (size_t)length, 0);
    tokens[n++] = data->eos;
    return n;
}

// The stream of the first held-out problems.
static Stream task_validation(const Data *data) {
    const size_t bytes = TASK_VALIDATION * (TASK_MAX + 1) * sizeof(int);
    Stream s = { .tokens = allocate(bytes, "the validation data"), .documents = TASK_VALIDATION };
    for (uint64_t i = 0; i < TASK_VALIDATION; i++) s.n += task_tokens(s.tokens + s.n, data, i, 1);
    return s;
}

// How many windows of n inputs, and one token more, a stream has.
static size_t windows(const Stream *s, size_t n) { return s->n ? (s->n - 1) / n : 0; }

// Takes the next n = max_length tokens off the endless stream of problems; window (n + 1) gets them
// and the token after them, which stays.
static void next_made_window(Data *data, int *window) {
    const size_t n = data->recipe->max_length, room = n + TASK_MAX + 2;
    if (!data->pending) data->pending = allocate(room * sizeof(int), "a window of data");
    while (data->n_pending < n + 1) {
        int *end = data->pending + data->n_pending;
        data->n_pending += task_tokens(end, data, data->document++, 0);
    }
    memcpy(window, data->pending, (n + 1) * sizeof(int));
    memmove(data->pending, data->pending + n, (data->n_pending -= n) * sizeof(int));
}

// The window (max_length + 1) that is number i of all samples of the run: in file order, or in an
// order drawn anew each epoch.
static const int *window_of(Data *data, uint64_t i) {
    const size_t n = data->recipe->max_length, count = windows(&data->train, n);
    const uint64_t epoch = i / count;
    if (data->recipe->sequential) return data->train.tokens + i % count * n;
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
    return data->train.tokens + data->order[i % count] * n;
}

// The batch of a step: inputs and targets (batch_size, max_length); window (max_length + 1) is
// scratch. The steps must be asked for in order.
static void next_batch(Data *data, uint64_t step, int *inputs, int *targets, int *window) {
    const size_t B = data->recipe->batch_size, n = data->recipe->max_length;
    for (size_t b = 0; b < B; b++) {
        if (data->built_in) next_made_window(data, window);
        const int *from = data->built_in ? window : window_of(data, step * B + b);
        memcpy(inputs + b * n, from, n * sizeof(int));
        memcpy(targets + b * n, from + 1, n * sizeof(int));
    }
}

#endif // DATA_H
