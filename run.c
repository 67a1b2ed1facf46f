// run.c - runs a model.bin: continues a text, evaluates one, measures speed, shows what is inside.
//
// Read coe.c first; it is included as it stands: one program is one translation unit. What is left
// for this file is everything around the model: the command line, text and token ids in and out,
// and one function for each --mode. For the heart of it, read [4] and generate() in [5].
//
//   [1] options          [4] the model at work     [7] bench and info
//   [2] text and tokens  [5] generate and chat     [8] main
//   [3] output files     [6] eval
#include "coe.c"

enum { INTERRUPTED = 130 };         // the exit code after control-C

// ---- [1] options --------------------------------------------------------------------------------
// A table as in [3] of coe.c: parsing, checks and --help follow from it.

//    kind  field           letter name             least  most      words  otherwise
#define OPTIONS(X) \
    X(TEXT, prompt,         'i', "prompt",          0,     0,         "",    NULL,       \
      "the text to start from; empty: BOS")                                              \
    X(TEXT, file,           'f', "file",            0,     0,         "",    NULL,       \
      "the same from a file, its bytes as they are")                                     \
    X(INT,  n_predict,      'n', "n-predict",      -1,     1LL << 50, "",    "256",      \
      "new tokens at most; -1: to the end of the context")                               \
    X(NUM,  temp,           't', "temp",            0,     1e9,       "",    "0.8",      \
      "temperature; 0: always the largest logit")                                        \
    X(INT,  top_k,          'k', "top-k",           0,     1LL << 50, "",    "40",       \
      "draw from the k most probable tokens; 0: all")                                    \
    X(NUM,  top_p,          'p', "top-p",           0,     1,         "",    "0.95",     \
      "draw from the fewest tokens whose probabilities reach this sum; 1: all")          \
    X(NUM,  min_p,          0,   "min-p",           0,     1,         "",    "0",        \
      "and from those with at least this part of the largest probability; 0: all")       \
    X(NUM,  repeat_penalty, 0,   "repeat-penalty",  1e-6,  1e6,       "",    "1",        \
      "divides the logits of tokens that occurred; 1: off")                              \
    X(INT,  seed,           's', "seed",           -1,     1LL << 53, "",    "-1",       \
      "random seed; -1: from the clock, printed")                                        \
    X(INT,  ctx_size,       'c', "ctx-size",        0,     1 << 30,   "",    "0",        \
      "context to allocate, in tokens; 0: what the work needs")                          \
    X(WORD, mode,           'm', "mode",            0,     5,         MODES, "generate", \
      "what to do")                                                                      \
    X(FLAG, ids,            0,   "ids",             0,     1,         "",    "false",    \
      "prompt, file and stdout are token ids; nothing is added to them")                 \
    X(FLAG, ignore_eos,     0,   "ignore-eos",      0,     1,         "",    "false",    \
      "go on past the end-of-text token")                                                \
    X(TEXT, logits,         0,   "logits",          0,     0,         "",    NULL,       \
      "eval: a file for the logits, float32 [tokens, vocab_size]")                       \
    X(TEXT, trace,          0,   "trace",           0,     0,         "",    NULL,       \
      "eval, generate: a TSV file for the experts that were chosen")                     \
    X(INT,  threads,        0,   "threads",         0,     1024,      "",    "0",        \
      "threads; 0: OMP_NUM_THREADS, or one per processor")                               \
    X(FLAG, help,           'h', "help",            0,     1,         "",    "false",    \
      "print this and exit")                                                             \
    X(FLAG, version,        0,   "version",         0,     1,         "",    "false",    \
      "print the version and exit")

#define MODES "generate|chat|eval|bench|info|tokenize"
enum { GENERATE, CHAT, EVAL, BENCH, INFO, TOKENIZE };       // in the order of MODES

typedef struct {
#define X(kind, field, ...) TYPE_##kind field;
    OPTIONS(X)
#undef X
} Settings;

static const Key option_keys[] = {
#define X(kind, field, letter, name, least, most, words, otherwise, help) \
    { name, letter, kind, (double)(least), (double)(most), words, otherwise, help, \
      offsetof(Settings, field) },
    OPTIONS(X)
#undef X
};

enum {                              // OPTION_prompt, ...: their places in the table
#define X(kind, field, ...) OPTION_##field,
    OPTIONS(X)
#undef X
    OPTION_COUNT
};

static const char USAGE[] =
    "usage: ./run MODEL.bin [options]\n"
    "\n"
    "  ./run model.bin -i \"Once upon a time\"           continue a text\n"
    "  ./run model.bin -t 0 -n 24 --ids -i \"5 17 3\"    likeliest token each time, as ids\n"
    "  ./run model.bin -m chat                         a conversation, line by line\n"
    "  ./run model.bin -m eval -f text.txt             how well the model predicts a text\n"
    "  ./run model.bin -m info                         what is in the file\n"
    "\n"
    "options [what they may be; what they are otherwise]:\n";

static const char NOTES[] =
    "\n"
    "The sampling options (-t, -k, -p, --min-p, --repeat-penalty) are the model's own where its\n"
    "file has some and the command line has none. The prompt is printed first, then what follows.\n"
    "Text gets BOS in front where the model asks for it (add_bos_token); names of special tokens\n"
    "in it become their ids. With --ids the end-of-text token that ends the output is printed as\n"
    "well, and so is the BOS that stands in for an empty prompt.\n"
    "chat answers the prompt, if there is one, and each line of stdin, with -n tokens at most.\n"
    "Names of special tokens in a message are text. When the context is full (--ctx-size, else\n"
    "4096 tokens at most), the oldest messages and answers are forgotten.\n"
    "eval prints tokens (predicted ones), nll (their mean, nats), ppl and bits_per_byte; what is\n"
    "longer than the context is read in windows, half of each as context only. A row of --logits\n"
    "and a position in --trace belong to one token of the input, its BOS included.\n";

// What --help prints: usage and examples, the options, and how they play together.
static void print_help(const Options *options) {
    fputs(USAGE, stdout);
    print_options(options);
    fputs(NOTES, stdout);
}

// ---- [2] text and tokens ------------------------------------------------------------------------

typedef struct {                    // a run of the program: everything that its parts share
    Settings set;
    unsigned char given[OPTION_COUNT];  // which options the user wrote
    const char *path;               // of the model
    Model model;
    State state;
    size_t context;                 // positions that the state has room for
    int *tokens;                    // the input; in generate, what follows too
    size_t n_tokens;                // of the input
    size_t text_bytes;              // of the input, where it is a text
    real *logits;                   // (LOGIT_ROWS, V) in eval, else (V)
    uint64_t hash;                  // of the logits computed last
} Run;

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

// One line of a result.
static void print_value(const char *name, double v) {
    char text[DECIMAL_TEXT];
    printf("%s %s\n", name, decimal(text, v));
}
static void print_count(const char *name, size_t n) { printf("%s %zu\n", name, n); }

// All bytes of a file, *n of them. It may be a pipe, so nobody asks for its size.
static char *read_file(const char *path, size_t *n) {
    const size_t most = (size_t)1 << 30;
    char *bytes = NULL;
    FILE *file = fopen(path, "rb");
    if (!file) fail(FAILED, "%s: cannot be opened: %s", path, strerror(errno));
    *n = 0;
    for (size_t room = 0, got = 1; got; *n += got) {
        if (*n == room) {
            if (room == most) fail(FAILED, "%s: is longer than %zu bytes", path, most);
            room = room ? 2 * room : 1 << 16;
            bytes = realloc(bytes, room);
            if (!bytes) fail(FAILED, "out of memory: %.1f MB for %s", (double)room / 1e6, path);
        }
        got = fread(bytes + *n, 1, room - *n, file);
    }
    if (ferror(file)) fail(FAILED, "%s: cannot be read: %s", path, strerror(errno));
    fclose(file);
    return bytes;
}

// Reads decimal ids below `limit` with white space between them; ids has room for n. Returns how
// many there are. `where` and `code` are for errors.
static size_t parse_ids(int *ids, const char *text, size_t n, int64_t limit,
                        const char *where, int code) {
    size_t count = 0;
    for (size_t i = 0; i < n; ) {
        if (isspace((unsigned char)text[i])) { i++; continue; }
        const size_t first = i;
        int64_t id = 0;
        for (; i < n && isdigit((unsigned char)text[i]); i++)
            if (id < limit) id = 10 * id + text[i] - '0';
        if (i == first || (i < n && !isspace((unsigned char)text[i])) || id >= limit) {
            for (i = first; i < n && i < first + 24 && isgraph((unsigned char)text[i]); ) i++;
            fail(code, "%s: token %zu, at byte %zu, is \"%.*s\", must be an id, 0..%lld", where,
                 count, first, (int)(i - first), text + first, (long long)limit - 1);
        }
        ids[count++] = (int)id;
    }
    return count;
}

// Fills r->tokens from --prompt, --file or nothing, with BOS in front where it belongs.
static void read_tokens(Run *r) {
    const Config *c = &r->model.config;
    const Settings *set = &r->set;
    size_t n = set->prompt ? strlen(set->prompt) : 0;
    char *from_file = set->file ? read_file(set->file, &n) : NULL;
    const char *text = from_file ? from_file : set->prompt;
    if (!set->ids && !r->model.tokenizer)
        fail(FAILED, "%s: has no tokenizer and cannot read text: --ids takes token ids", r->path);
    r->tokens = allocate(product(sum(n, 1), sizeof(int)), "the tokens");
    if (set->ids) {
        const char *where = set->file ? set->file : "--prompt";
        const int code = set->file ? FAILED : WRONG_USAGE;
        r->n_tokens = parse_ids(r->tokens, text, n, c->vocab_size, where, code);
    } else {
        const int bos = set->mode != TOKENIZE && c->add_bos_token && c->bos_token_id >= 0;
        if (bos) r->tokens[0] = (int)c->bos_token_id;
        r->n_tokens = (size_t)bos + encode(r->model.tokenizer, r->tokens + bos, text, n, 1);
        r->text_bytes = n;
    }
    if (set->mode == GENERATE && !r->n_tokens) {
        if (c->bos_token_id < 0)
            fail(FAILED, "%s: has no bos_token_id, so it needs a prompt to start from", r->path);
        r->tokens[r->n_tokens++] = (int)c->bos_token_id;
    }
    free(from_file);
}

// Tokens on their way to stdout: as text or, with --ids, as numbers.
typedef struct { const Tokenizer *tokenizer; size_t count; Utf8 text; } Printer;

// One token on its way to stdout: its text or, without a tokenizer, its id.
static void print_token(Printer *p, int id) {
    size_t n;
    if (!p->tokenizer) {
        printf("%s%d", p->count++ ? " " : "", id);
    } else {
        const char *bytes = decode(p->tokenizer, id, &n);
        utf8_print(&p->text, bytes, n);
    }
}

// ---- [3] output files ---------------------------------------------------------------------------
// --logits and --trace are written under another name and renamed once they are complete: whoever
// finds the file finds all of it. What is no regular file (a pipe, /dev/null) is written directly.

typedef struct { FILE *file; const char *path; char *temporary; } Output;
static Output logits_output, trace_output;

// Whatever ends the program early leaves no part of a file behind; for atexit.
static void discard_outputs(void) {
    if (logits_output.temporary) remove(logits_output.temporary);
    if (trace_output.temporary) remove(trace_output.temporary);
}

// Whether a complete output may take the place of what is at `path`: nothing, or a file.
static int replaceable(const char *path) {
#ifdef _WIN32
    return path != NULL;
#else
    struct stat info;
    return lstat(path, &info) || S_ISREG(info.st_mode);
#endif
}

// Opens an output for writing, unless `path` is NULL.
static void output_open(Output *o, const char *path) {
    if (!path) return;
    o->path = path;
    if (replaceable(path)) {
        const size_t size = strlen(path) + sizeof ".tmp";
        char *temporary = allocate(size, "a file name");
        snprintf(temporary, size, "%s.tmp", path);
        o->file = fopen(temporary, "wb");
        if (o->file) o->temporary = temporary;
    } else {
        o->file = fopen(path, "wb");
    }
    if (!o->file) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
}

// Completes an output, if it is open.
static void output_close(Output *o) {
    if (!o->file) return;
    const int broken = ferror(o->file);
    if (fclose(o->file) || broken)
        fail(FAILED, "%s: cannot be written: %s", o->path, strerror(errno));
    if (!o->temporary) return;
#ifdef _WIN32
    remove(o->path);            // rename does not replace there
#endif
    if (rename(o->temporary, o->path))
        fail(FAILED, "%s: cannot be replaced: %s", o->path, strerror(errno));
    release(o->temporary);
    o->temporary = NULL;
}

// ---- [4] the model at work ----------------------------------------------------------------------
// Tokens go through the model in chunks; what later ones need of earlier ones is in the cache.
// Logits are computed for few rows at a time: 512 rows of a vocabulary of 100,000 are 200 MB.

enum { CHUNK = 512, LOGIT_ROWS = 64 };

static volatile sig_atomic_t interrupted;

// Control-C: the work stops at the next token or chunk; a second one ends the program at once.
static void on_interrupt(int signal_number) {
    interrupted = 1;
    signal(signal_number, SIG_DFL);
}

// Makes control-C end a wait for input, too: signal() would have some systems go on waiting.
static void catch_interrupt(void) {
#ifdef _WIN32
    signal(SIGINT, on_interrupt);
#else
    struct sigaction action = { .sa_handler = on_interrupt };
    sigaction(SIGINT, &action, NULL);
#endif
}

// The longest context there may be.
static size_t context_limit(const Run *r) {
    return (size_t)(r->set.ctx_size ? r->set.ctx_size : r->model.config.max_position_embeddings);
}

// Memory for a context of `needed` positions, or of what is allowed.
static void make_room(Run *r, size_t needed, size_t logit_rows) {
    const Config *c = &r->model.config;
    const size_t n_logits = product(logit_rows, (size_t)c->vocab_size);
    r->context = min_size(needed, context_limit(r));
    r->state = state_new(c, min_size(r->context, CHUNK), r->context, KEEP_NOTHING);
    r->logits = allocate(product(n_logits, sizeof(real)), "the logits");
}

// The trace of the forward() that ran last: a line for every expert that its rows from `skip` on
// chose. Row 0 is token number `index` of the input.
static void trace(const Run *r, size_t index, size_t n, size_t skip) {
    const Config *c = &r->model.config;
    const size_t L = (size_t)c->num_hidden_layers, C = (size_t)c->inner_iter,
        K = (size_t)c->num_experts_per_tok;
    FILE *file = trace_output.file;
    for (size_t row = skip; row < n; row++)
        for (size_t l = 0; l < L; l++)
            for (size_t t = 0; is_moe(c, l) && t < C; t++)
                for (size_t k = 0; k < K; k++) {
                    const Iteration *i = &r->state.layer[l].iteration[t];
                    char text[DECIMAL_TEXT];
                    fprintf(file, "%zu\t%d\t%zu\t%zu\t%zu\t%d\t%s\n", index + row,
                            r->tokens[index + row], l, t, k, i->expert[row * K + k],
                            decimal(text, (double)i->weight[row * K + k]));
                }
}

// Runs n <= CHUNK tokens of the input, from number `index` on, at positions pos ... of the context.
// The first `skip` of them have been run before, in another window. The last `wanted` leave their
// rows in the state's `final`, with a trace all of them do. Returns the last such row.
static size_t step(Run *r, size_t index, size_t n, size_t pos, size_t skip, size_t wanted) {
    if (interrupted) exit(INTERRUPTED);
    if (trace_output.file) wanted = n;
    forward(&r->model, &r->state, r->tokens + index, 1, n, pos, wanted);
    if (trace_output.file) trace(r, index, n, skip);
    return wanted - 1;
}

// Ends the program because the logits of a token are not finite; names the tensor that is to blame.
static _Noreturn void not_finite(const Run *r, size_t index) {
    const Weights *w = &r->model.w;
    char name[128];
    for (size_t i = 0; i < w->n_tensors; i++) {
        const Tensor *t = &w->tensor[i];
        for (size_t k = 0; k < tensor_size(t); k++) {
            const size_t e = k / (t->rows * t->cols), row = k / t->cols % t->rows;
            const double x = (double)weight(matrix(t, e, row), 0, k % t->cols);
            if (isfinite(x)) continue;
            tensor_name(name, sizeof name, w, i, e);
            fail(FAILED, "%s: %s holds %g, must be finite", r->path, name, x);
        }
    }
    fail(FAILED, "%s: the logits of token %zu are not finite, though all weights are: an overflow",
         r->path, index);
}

// r->logits of one row of the last step, which is token number `index`, and their hash (FNV-1a,
// four bytes at a time): two builds or machines that print the same one computed the same, to the
// last bit.
static void last_logits(Run *r, size_t row, size_t index) {
    const size_t V = (size_t)r->model.config.vocab_size;
    logits_forward(&r->model, &r->state, r->logits, row, 1);
    r->hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < V; i++) {
        uint32_t bits;
        memcpy(&bits, &r->logits[i], sizeof bits);
        r->hash = (r->hash ^ bits) * 0x100000001B3u;
        if (!isfinite(r->logits[i])) not_finite(r, index);
    }
}

// ---- [5] generate and chat ----------------------------------------------------------------------

// What a sampling option is: the user's value, else the model's own, else the table's. A model
// without its own says -1, which is in no option's range.
static double resolve(const Run *r, int option, double value, double models) {
    const Key *k = &option_keys[option];
    return r->given[option] || !(models >= k->least && models <= k->most) ? value : models;
}

// The sampler: the command line's settings, else the model's own, else the defaults.
static Sampler sampler_new(const Run *r) {
    const Config *c = &r->model.config;
    const Settings *set = &r->set;
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    const uint64_t clock_seed = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
    Sampler s = {
        .temperature = resolve(r, OPTION_temp, set->temp, c->temperature),
        .top_k = (int64_t)resolve(r, OPTION_top_k, (double)set->top_k, (double)c->top_k),
        .top_p = resolve(r, OPTION_top_p, set->top_p, c->top_p),
        .min_p = resolve(r, OPTION_min_p, set->min_p, c->min_p),
        .repetition_penalty = resolve(r, OPTION_repeat_penalty, set->repeat_penalty,
                                      c->repetition_penalty),
        .rng = set->seed < 0 ? clock_seed : (uint64_t)set->seed,
    };
    fprintf(stderr, "sampling: temp %g, top-k %lld, top-p %g, min-p %g, repeat-penalty %g, "
            "seed %llu\n", s.temperature, (long long)s.top_k, s.top_p, s.min_p,
            s.repetition_penalty, (unsigned long long)s.rng);
    return s;
}

typedef struct {                    // what becomes of logits
    Sampler sampler;
    Candidate *candidate;           // [V]
    unsigned char *seen;            // [V] whether a token occurred, for the repetition penalty
    Printer printer;
} Writer;

// A writer with the sampler of the command line.
static Writer writer_new(const Run *r) {
    const size_t V = (size_t)r->model.config.vocab_size;
    Writer w = { .sampler = sampler_new(r), .printer.text.to = stdout };
    w.candidate = allocate(product(V, sizeof *w.candidate), "the sampler");
    w.seen = allocate(V, "the sampler");
    if (!r->set.ids) w.printer.tokenizer = r->model.tokenizer;
    return w;
}

// Ends the line of output.
static void end_line(Writer *w) {
    utf8_flush(&w->printer.text, 1);
    putchar('\n');
    flush_stdout();
}

// Gives back the memory of a writer.
static void writer_free(Writer *w) {
    release(w->candidate);
    release(w->seen);
}

// Makes `needed` positions of room, or as many as are allowed; r->tokens too has that many.
static void make_room_to_write(Run *r, size_t needed) {
    make_room(r, needed, 1);
    int *tokens = allocate(product(r->context, sizeof(int)), "the tokens");
    if (r->tokens) memcpy(tokens, r->tokens, r->n_tokens * sizeof(int));
    release(r->tokens);
    r->tokens = tokens;
}

// Runs the tokens from number `from` on, n in all, and leaves the logits of the last.
static void read_on(Run *r, size_t from, size_t n) {
    size_t row = 0;
    for (size_t pos = from; pos < n; pos += CHUNK)
        row = step(r, pos, min_size(n - pos, CHUNK), pos, 0, 1);
    last_logits(r, row, n - 1);
}

// Adds tokens to the n that have been run, and prints them, until there are `most` or EOS comes.
// Returns how many there are then; the last one that is added is not run.
static size_t write_on(Run *r, Writer *w, size_t n, size_t most) {
    const int64_t eos = r->set.ignore_eos ? -1 : r->model.config.eos_token_id;
    const unsigned char *penalised = w->sampler.repetition_penalty == 1 ? NULL : w->seen;
    while (n < most) {
        const int id = sample(&w->sampler, r->logits, w->candidate, penalised,
                              (size_t)r->model.config.vocab_size);
        r->tokens[n++] = id;
        w->seen[id] = 1;
        print_token(&w->printer, id);
        flush_stdout();
        if (id == eos || n == most || interrupted) break;
        read_on(r, n - 1, n);
    }
    return n;
}

// Speeds on stderr: of the prompt, run all at once, and of the n tokens run one by one after it.
static void print_speed(const Run *r, double prompt_s, size_t n, double n_s) {
    const size_t prompt = r->n_tokens;
    fprintf(stderr, "prompt: %zu tokens, %.1f tok/s; ", prompt, (double)prompt / prompt_s);
    if (n) fprintf(stderr, "then %zu, %.1f tok/s; ", n, (double)n / n_s);
    fprintf(stderr, "last logits #%016llx\n", (unsigned long long)r->hash);
}

// Continues the prompt token by token.
static void generate(Run *r) {
    const size_t prompt = r->n_tokens, limit = context_limit(r);
    if (prompt > limit)
        fail(FAILED, "the prompt is %zu tokens long, the context holds %zu (--ctx-size, at most "
             "max_position_embeddings %lld)", prompt, limit,
             (long long)r->model.config.max_position_embeddings);
    make_room_to_write(r, r->set.n_predict < 0 ? limit : prompt + (size_t)r->set.n_predict);
    Writer w = writer_new(r);
    for (size_t i = 0; i < prompt; i++) {
        print_token(&w.printer, r->tokens[i]);
        w.seen[r->tokens[i]] = 1;
    }
    flush_stdout();
    const double start = seconds();
    read_on(r, 0, prompt);
    const double middle = seconds();
    const size_t n = write_on(r, &w, prompt, r->context);
    const double end = seconds();
    end_line(&w);
    print_speed(r, middle - start, n > prompt ? n - prompt - 1 : 0, end - middle);
    writer_free(&w);
    if (interrupted) exit(INTERRUPTED);
}

// A conversation in the form of DeepSeek-V2 is BOS, then turns: "User: ", a message, two newlines,
// "Assistant:", the model's answer and EOS.
enum { CHAT_CONTEXT = 4096 };       // tokens, unless --ctx-size says otherwise
typedef struct { char *bytes; size_t n, room; } Text;

// Adds n bytes to a text.
static void add_text(Text *t, const char *bytes, size_t n) {
    if (n > t->room - t->n) {
        t->room = product(2, sum(t->n, n));
        t->bytes = realloc(t->bytes, t->room);
        if (!t->bytes) fail(FAILED, "out of memory: %.1f MB for a message", (double)t->room / 1e6);
    }
    memcpy(t->bytes + t->n, bytes, n);
    t->n += n;
}

// Adds a line of stdin, without its end, to a text. False where there is none.
static int add_line(Text *t) {
    const size_t before = t->n;
    int c;
#ifndef _WIN32
    if (isatty(0)) fputs("> ", stderr);
#endif
    while ((c = getchar()) != EOF && c != '\n') {
        const char byte = (char)c;
        add_text(t, &byte, 1);
    }
    if (interrupted) exit(INTERRUPTED);
    if (ferror(stdin)) fail(FAILED, "stdin: cannot be read: %s", strerror(errno));
    if (t->n > before && t->bytes[t->n - 1] == '\r') t->n--;
    return c != EOF || t->n > before;
}

// Forgets the oldest turns: what stays, BOS and whole turns, takes up no more than half of the
// context and leaves room for `needed` tokens.
static void forget(Run *r, size_t needed) {
    const Config *c = &r->model.config;
    const size_t n = r->n_tokens, bos = c->bos_token_id >= 0;
    const size_t most = min_size(r->context / 2, r->context - min_size(needed, r->context));
    size_t from = n;                // the first token that stays: one behind an EOS
    for (size_t i = n; i-- > bos && bos + n - i <= most; )
        if (r->tokens[i - 1] == c->eos_token_id) from = i;
    memmove(r->tokens + bos, r->tokens + from, (n - from) * sizeof(int));
    r->n_tokens = bos + n - from;
    fprintf(stderr, "chat: the context of %zu tokens (--ctx-size) is full: the oldest %zu are "
            "forgotten\n", r->context, from - bos);
}

// Adds a turn up to its "Assistant:" to the tokens, of which *n_run have been run; forgets others
// where there is no room for it. False, with a line on stderr, if it does not fit in any case.
static int add_turn(Run *r, Writer *w, const Text *turn, size_t *n_run) {
    const Config *c = &r->model.config;
    const size_t bos = c->bos_token_id >= 0;
    int *ids = allocate(product(turn->n, sizeof(int)), "the message");
    const size_t n = encode(r->model.tokenizer, ids, turn->bytes, turn->n, 0);
    const int fits = bos + n + 2 <= r->context;     // with one token of an answer, and EOS
    size_t answer = r->context / 4;                 // what should be left for it
    if (r->set.n_predict >= 0) answer = min_size(answer, (size_t)r->set.n_predict);
    if (!fits) {
        fprintf(stderr, "chat: the message is %zu tokens long, the context holds %zu (--ctx-size): "
                "it is passed over\n", n, r->context);
    } else {
        if (r->n_tokens > bos && r->n_tokens + n + answer + 1 > r->context) {
            forget(r, n + answer + 1);
            *n_run = 0;
        }
        memcpy(r->tokens + r->n_tokens, ids, n * sizeof(int));
        r->n_tokens += n;
        memset(w->seen, 0, (size_t)c->vocab_size);
        for (size_t i = 0; i < r->n_tokens; i++) w->seen[r->tokens[i]] = 1;
    }
    release(ids);
    return fits;
}

// Answers the prompt, if there is one, and every line of stdin.
static void chat(Run *r) {
    const Config *c = &r->model.config;
    const Settings *set = &r->set;
    const int eos = (int)c->eos_token_id;
    if (!c->chat_template)
        fail(FAILED, "%s: has no chat template, which --mode chat needs; generate continues a text",
             r->path);
    if (!r->model.tokenizer || eos < 0)
        fail(FAILED, "%s: has no %s, which --mode chat needs", r->path,
             r->model.tokenizer ? "eos_token_id" : "tokenizer");
    const size_t limit = context_limit(r);
    make_room_to_write(r, set->ctx_size ? limit : min_size(limit, CHAT_CONTEXT));
    Writer w = writer_new(r);
    Text turn = { 0 };
    size_t n_run = 0, prompt_bytes = set->prompt ? strlen(set->prompt) : 0;
    char *file = set->file ? read_file(set->file, &prompt_bytes) : NULL;
    const char *prompt = file ? file : set->prompt;
    if (c->bos_token_id >= 0) r->tokens[r->n_tokens++] = (int)c->bos_token_id;
    for (;; prompt = NULL) {
        turn.n = 0;
        add_text(&turn, "User: ", 6);
        if (prompt) add_text(&turn, prompt, prompt_bytes);
        else if (!add_line(&turn)) break;
        if (turn.n == 6) continue;                  // nothing was said
        add_text(&turn, "\n\nAssistant:", 12);
        if (!add_turn(r, &w, &turn, &n_run)) continue;
        const size_t n = r->n_tokens, room = r->context - n - 1;
        read_on(r, n_run, n);
        size_t end = n + (set->n_predict < 0 ? room : min_size(room, (size_t)set->n_predict));
        end = write_on(r, &w, n, end);
        end_line(&w);
        if (interrupted) exit(INTERRUPTED);
        n_run = end > n ? end - 1 : n;
        if (r->tokens[end - 1] != eos) {            // it was cut short
            if (end == r->context - 1)
                fprintf(stderr, "chat: the context of %zu tokens is full: the answer ends here\n",
                        r->context);
            r->tokens[end++] = eos;
        }
        r->n_tokens = end;
    }
    free(turn.bytes);
    free(file);
    writer_free(&w);
}

// ---- [6] eval -----------------------------------------------------------------------------------

// A line on stderr about how far the work is, every 2 seconds; on a terminal it redraws itself.
// `last` ends what was begun.
static void progress(size_t done, size_t all, double nll, int last) {
    static double next;
    static int unfinished;
    const double now = seconds();
    if (next == 0) next = now + 2;
    if (last ? !unfinished : now < next) return;
#ifdef _WIN32
    const int terminal = 0;
#else
    const int terminal = isatty(2);
#endif
    next = now + 2;
    unfinished = terminal && !last;
    fprintf(stderr, "eval: %zu of %zu tokens, nll %.4f%c", done, all, nll,
            unfinished ? '\r' : '\n');
}

// Scores the rows from `skip` on of the last step, row 0 being token number `index`: writes their
// logits and returns the sum of -log p(next token), where there is a next one.
static double score(Run *r, size_t index, size_t n, size_t skip) {
    const size_t V = (size_t)r->model.config.vocab_size;
    double nats = 0, loss[LOGIT_ROWS];
    for (size_t first = skip; first < n; first += LOGIT_ROWS) {
        const size_t rows = min_size(n - first, LOGIT_ROWS);
        const int *target = r->tokens + index + first + 1;
        const size_t predicted = index + first + rows < r->n_tokens ? rows : rows - 1;
        logits_forward(&r->model, &r->state, r->logits, first, rows);
        if (logits_output.file) fwrite(r->logits, sizeof(real), rows * V, logits_output.file);
        SHARED(rows * V, for (size_t i = 0; i < predicted; i++) {
            loss[i] = cross_entropy(r->logits + i * V, V, target[i]);
        })
        for (size_t i = 0; i < predicted; i++) {
            if (!isfinite(loss[i])) not_finite(r, index + first + i);
            nats += loss[i];
        }
    }
    return nats;
}

// How well the model predicts the input: every token but the first, each from those before it. What
// is longer than the context is read in windows that overlap by half: the first half of a window is
// there as context for the second.
static void evaluate(Run *r) {
    const size_t n = r->n_tokens, predicted = n ? n - 1 : 0;
    make_room(r, n ? n : 1, LOGIT_ROWS);
    const size_t stride = r->context > 1 ? r->context / 2 : 1;
    const double begin = seconds();
    double nats = 0;
    for (size_t start = 0, scored = 0; scored < n; start += stride) {
        const size_t end = start + min_size(n - start, r->context);
        for (size_t i = start; i < end; i += CHUNK) {
            const size_t rows = min_size(end - i, CHUNK);
            const size_t skip = scored > i ? min_size(scored - i, rows) : 0;
            step(r, i, rows, i - start, skip, rows);
            nats += score(r, i, rows, skip);
            if (skip < rows) progress(i + rows, n, nats / (double)(i + rows), 0);
        }
        scored = end;
    }
    const double nll = nats / (double)predicted;
    progress(n, n, nll, 1);
    fprintf(stderr, "eval: %.1f tok/s\n", (double)n / (seconds() - begin));
    print_count("tokens", predicted);
    if (!predicted) return;
    print_value("nll", nll);
    print_value("ppl", exp(nll));
    if (r->text_bytes) print_value("bits_per_byte", nats / log(2) / (double)r->text_bytes);
}

// ---- [7] bench and info -------------------------------------------------------------------------

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

// Bytes that one token adds to the cache.
static size_t cache_bytes(const Config *c) {
    return (size_t)(c->num_hidden_layers * (c->kv_lora_rank + c->qk_rope_head_dim)) * sizeof(real);
}

// Operations, a product and its sum being 2, for n tokens at positions pos ... and the logits of
// the last one, which alone passes the last layer's experts: the matrices, and attention to all
// that each token sees, in one of the two forms of [9] in coe.c.
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
static void time_tokens(Run *r, size_t prompt, size_t before, size_t n,
                        double at_once[2], double single[2]) {
    double all[BENCH_REPEATS], each[BENCH_REPEATS];
    step(r, 0, prompt, 0, 0, 1);        // the first run brings the weights into memory
    for (int k = 0; k < BENCH_REPEATS; k++) {
        double start = seconds();
        logits_forward(&r->model, &r->state, r->logits, step(r, 0, prompt, 0, 0, 1), 1);
        all[k] = (seconds() - start) / (double)prompt;
        if (before) step(r, 0, before, 0, 0, 1);
        start = seconds();
        for (size_t i = before; i < before + n; i++) {
            logits_forward(&r->model, &r->state, r->logits, step(r, i, 1, i, 0, 1), 1);
        }
        each[k] = (seconds() - start) / (double)n;
    }
    at_once[0] = median(all, BENCH_REPEATS, &at_once[1]);
    single[0] = median(each, BENCH_REPEATS, &single[1]);
}

// Speed, and what it means for the machine. A short context makes the runs shorter.
static void bench(Run *r) {
    const Model *m = &r->model;
    make_room(r, BENCH_PROMPT, 1);
    const size_t prompt = r->context, before = min_size(BENCH_BEFORE, prompt - 1);
    const size_t n = min_size(BENCH_TOKENS, prompt - before);
    uint64_t rng = 0;
    r->tokens = allocate(prompt * sizeof(int), "the tokens");
    for (size_t i = 0; i < prompt; i++)
        r->tokens[i] = (int)(rng_next(&rng) % (uint64_t)m->config.vocab_size);
    double at_once[2], single[2];
    time_tokens(r, prompt, before, n, at_once, single);
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

// What is in the file: the config, every tensor of a checkpoint, and what that amounts to.
static void info(const Run *r) {
    const Model *m = &r->model;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        double f;
        memcpy(&f, (const char *)&m->config + k->offset, sizeof f);
        if (k->kind == NUM) print_value(k->name, f);
        else printf("%s %s\n", k->name, key_text(k, &m->config));
    }
    static const char *const type_names[] = { "f32", "bf16", "q8" };
    printf("dtype %s\n", type_names[m->w.embed_tokens->type]);
    printf("tokenizer %s\n",
           !m->tokenizer ? "none" : m->tokenizer->kind == BYTES ? "bytes" : "bpe");
    for (size_t i = 0; i < m->w.n_tensors; i++) {
        const Tensor *t = &m->w.tensor[i];
        const int vector = t->init == ONES || t->init == ZEROS;
        for (size_t e = 0; e < t->copies; e++) {
            char name[128];
            tensor_name(name, sizeof name, &m->w, i, e);
            if (!vector) printf("%s %zux%zu %s\n", name, t->rows, t->cols, type_names[t->type]);
            else printf("%s %zu f32\n", name, t->cols);
        }
    }
    const Parameters p = count_parameters(m);
    print_count("total_parameters", p.total);
    print_count("active_parameters", p.active);
    print_count("bytes", p.bytes);
    print_count("flops_per_token", 2 * p.active);   // without attention to the past, which grows
    print_count("cache_bytes_per_token", cache_bytes(&m->config));
}

// Mode tokenize: the ids of the text on one line.
static void print_tokens(const Run *r) {
    for (size_t i = 0; i < r->n_tokens; i++) printf("%s%d", i ? " " : "", r->tokens[i]);
    if (r->n_tokens) putchar('\n');
}

// ---- [8] main -----------------------------------------------------------------------------------

static int same(const char *a, const char *b) { return a && b && !strcmp(a, b); }

// What no single option can know about itself.
static void check_settings(const Run *r) {
    const Settings *set = &r->set;
    const int64_t mode = set->mode;
    if (!r->path) fail(WRONG_USAGE, "which model? ./run MODEL.bin [options]; --help lists them");
    if (set->prompt && set->file) fail(WRONG_USAGE, "--prompt and --file: must be one of them");
    if ((mode == EVAL || mode == TOKENIZE) && !set->prompt && !set->file)
        fail(WRONG_USAGE, "--mode eval and tokenize: need --file or --prompt");
    if (set->logits && mode != EVAL) fail(WRONG_USAGE, "--logits: needs --mode eval");
    if (set->ids && mode == CHAT) fail(WRONG_USAGE, "--ids: not with --mode chat, which is text");
    if (set->trace && mode != EVAL && mode != GENERATE)
        fail(WRONG_USAGE, "--trace: needs --mode generate or eval");
    if (same(set->logits, set->trace) || same(set->logits, r->path) || same(set->trace, r->path))
        fail(WRONG_USAGE, "--logits, --trace: must be files of their own");
}

// Opens the model and does what --mode says.
static void work(Run *r) {
    const Settings *set = &r->set;
    set_threads(set->threads);
    r->model = model_open(r->path, 0, NULL, NULL);
    const long long longest = (long long)r->model.config.max_position_embeddings;
    if (set->ctx_size > longest)
        fail(WRONG_USAGE, "--ctx-size is %lld, must be 1..%lld (max_position_embeddings)",
             (long long)set->ctx_size, longest);
    print_model(&r->model);
    if (set->mode == GENERATE || set->mode == EVAL || set->mode == TOKENIZE) read_tokens(r);
    catch_interrupt();
    output_open(&logits_output, set->logits);
    output_open(&trace_output, set->trace);
    if (trace_output.file)
        fputs("position\ttoken\tlayer\titeration\trank\texpert\tweight\n", trace_output.file);
    switch (set->mode) {
    case GENERATE: generate(r); break;
    case CHAT:     chat(r); break;
    case EVAL:     evaluate(r); break;
    case BENCH:    bench(r); break;
    case INFO:     info(r); break;
    case TOKENIZE: print_tokens(r); break;
    }
    output_close(&logits_output);
    output_close(&trace_output);
}

// Reads the command line, then hands over to the mode.
int main(int argc, char **argv) {
    program = "run";
    occupy_standard_files();
    atexit(discard_outputs);
    Run r = { 0 };
    const Options options = { option_keys, OPTION_COUNT, &r.set, r.given };
    keys_init(option_keys, OPTION_COUNT, &r.set);
    int first = 1;                                  // the model is the first argument, or the last
    if (argc > 1 && argv[1][0] != '-') r.path = argv[first++];
    else if (argc > 2 && argv[argc - 1][0] != '-') r.path = argv[--argc];
    parse_options(&options, 1, argc, argv, first);
    if (r.set.help) {
        print_help(&options);
    } else if (r.set.version) {
        puts("run " COE_VERSION);
    } else {
        check_settings(&r);
        work(&r);
        state_free(&r.state);
        release(r.logits);
        release(r.tokens);
        model_free(&r.model);
    }
    flush_stdout();
    return 0;
}
