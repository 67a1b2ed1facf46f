// run.c - runs a model.bin: continues a text, evaluates one, chats, shows what is inside.
//
// Read coe.c first; it is included as it stands: one program is one translation unit. What is left
// for this file is to bring text and model together, one section for each --mode in the order in
// which a user meets them. The heart of it is [2] and generate() in [3].
//
//   [1] a run                  [3] generate   [5] chat
//   [2] the model at work      [4] eval       [6] main
//
// Around it, in lib/: settings.h (options), text.h (texts and ids in and out), output.h (files),
// chat.h, trace.h, info.h, bench.h, lens.h.
#include "coe.c"
#include "lib/output.h"
#include "lib/documents.h"
#include "lib/settings.h"
#include "lib/text.h"

// ---- [1] a run ----------------------------------------------------------------------------------

typedef struct {                    // everything that the parts of the program share
    Settings set;
    unsigned char given[SETTING_KEYS];  // which options the user wrote
    const char *path;               // of the model
    Model model;
    State state;
    size_t context;                 // positions that the state has room for
    int *tokens;                    // the input; in generate, what follows too
    size_t n_tokens;                // of the input
    unsigned char *counts;          // [n_tokens]  in eval, which of them count; NULL: all
    size_t text_bytes;              // of the input, where it is a text
    real *logits;                   // (LOGIT_ROWS, V) in eval, else (V)
    uint64_t hash;                  // of the logits computed last
    Output logits_file, trace_file, lens_file;      // of those options, where they are wanted
    Edits *edits;                   // what the command line changes in the chain; NULL: nothing
    uint32_t fingerprint;           // the model file's CRC-32
} Run;

// Makes the file of eval, n bytes of text, run->tokens and run->counts: its documents, as train
// reads them, with BOS in front where it belongs.
static void read_documents(Run *run, const char *text, size_t n) {
    const Config *c = &run->model.config;
    const Settings *set = &run->set;
    const bool bos = c->generation.add_bos_token && c->generation.bos_token_id >= 0;
    check_text(set->file, &text, &n, set->allow_bytes);
    Stream s = tokenize_documents(run->model.tokenizer, text, n, (int)c->generation.eos_token_id[0],
                                  set->completion_only_loss ? set->completion_marker : NULL, true,
                                  set->file);
    run->n_tokens = bos + s.n;
    run->tokens = allocate(checked_mul(run->n_tokens + 1, sizeof(int)), "the tokens");
    if (bos) run->tokens[0] = (int)c->generation.bos_token_id;
    memcpy(run->tokens + bos, s.tokens, s.n * sizeof(int));
    if (s.counts) {
        run->counts = allocate(run->n_tokens, "which tokens count");
        memcpy(run->counts + bos, s.counts, s.n);
    } else {
        run->text_bytes = n;
    }
    release(s.tokens);
    release(s.counts);
}

// Fills run->tokens from --prompt, --file or nothing, with BOS in front where it belongs.
static void read_tokens(Run *run) {
    const Config *c = &run->model.config;
    const Settings *set = &run->set;
    size_t n = set->prompt ? strlen(set->prompt) : 0;
    char *from_file = set->file ? read_file(set->file, &n) : NULL;
    const char *text = from_file ? from_file : set->prompt;
    if (!text && set->mode == GENERATE && !set->ids && run->model.tokenizer) {
        text = c->generation.default_prompt;
        n = strlen(text);
    }
    if (!set->ids && !run->model.tokenizer)
        fail(FAILED, "%s: has no tokenizer and cannot read text: --ids takes token ids", run->path);
    const bool documents = (set->mode == EVAL || set->mode == LENS) && from_file && !set->ids;
    if (documents && c->generation.eos_token_id[0] >= 0) {
        read_documents(run, text, n);
        free(from_file);
        return;
    }
    run->tokens = allocate(checked_mul(checked_add(n, 1), sizeof(int)), "the tokens");
    if (set->ids) {
        const char *where = set->file ? set->file : "--prompt";
        const int code = set->file ? FAILED : WRONG_USAGE;
        run->n_tokens = parse_ids(run->tokens, text, n, (int64_t)c->vocab_size, where, code);
    } else {
        const GenerationConfig *g = &c->generation;
        const int bos = set->mode != TOKENIZE && g->add_bos_token && g->bos_token_id >= 0;
        if (bos) run->tokens[0] = (int)g->bos_token_id;
        run->n_tokens = (size_t)bos;
        run->n_tokens += encode(run->model.tokenizer, run->tokens + bos, NULL, text, n, 1);
        run->text_bytes = n;
    }
    if (set->mode == GENERATE && !run->n_tokens) {
        if (c->generation.bos_token_id < 0)
            fail(FAILED, "%s: has no bos_token_id, so it needs a prompt to start from", run->path);
        run->tokens[run->n_tokens++] = (int)c->generation.bos_token_id;
    }
    free(from_file);
}

// ---- [2] the model at work ----------------------------------------------------------------------
// Tokens go through the model in chunks; what later ones need of earlier ones is in the cache.
// Logits are computed for few rows at a time: 512 rows of a vocabulary of 100,000 are 200 MB.

enum { CHUNK = 512, LOGIT_ROWS = 64 };

// Ends the program after an interruption, and says which files are missing for that.
static _Noreturn void stop(const Run *run) {
    const Output *const outputs[] = { &run->logits_file, &run->trace_file, &run->lens_file };
    for (int i = 0; i < 3; i++)
        if (outputs[i]->file)
            fprintf(stderr, "run: %s: interrupted, not written\n", outputs[i]->path);
    exit(INTERRUPTED);
}

// The longest context there may be.
static size_t context_limit(const Run *run) {
    return run->set.ctx_size ? run->set.ctx_size : run->model.config.max_position_embeddings;
}

// Memory for a context of `needed` positions, or of what is allowed.
static void make_room(Run *run, size_t needed, size_t logit_rows) {
    const Config *c = &run->model.config;
    const size_t n_logits = checked_mul(logit_rows, c->vocab_size);
    const size_t rows = min_size(min_size(needed, context_limit(run)), CHUNK);
    run->context = min_size(needed, context_limit(run));
    run->state = state_new(c, rows, run->context, KEEP_NOTHING);
    run->state.edits = run->edits;
    if (run->edits) {
        run->edits->y_0 = allocate(checked_mul(rows, c->hidden_size * sizeof(real)), "the edits");
        run->edits->y_c = allocate(checked_mul(rows, c->hidden_size * sizeof(real)), "the edits");
    }
    run->logits = allocate(checked_mul(n_logits, sizeof(real)), "the logits");
}

#include "lib/trace.h"

// Runs n <= CHUNK tokens of the input, from number `index` on, at positions pos ... of the context.
// The first `skip` of them have been run before, in another window. The last `wanted` leave their
// rows in the state's `final`, with a trace all of them do. Returns the last such row.
static size_t step(Run *run, size_t index, size_t n, size_t pos, size_t skip, size_t wanted) {
    if (interrupted) stop(run);
    if (run->trace_file.file) wanted = n;
    forward(&run->model, &run->state, run->tokens + index, 1, n, pos, wanted);
    if (run->trace_file.file) trace(run, index, n, skip);
    return wanted - 1;
}

// Ends the program because the logits of a token are not finite; names the tensor that is to blame.
static _Noreturn void not_finite(const Run *run, size_t index) {
    const Weights *w = &run->model.w;
    char name[128];
    for (size_t i = 0; i < w->n_tensors; i++) {
        const Tensor *t = &w->tensor[i];
        for (size_t k = 0; k < tensor_size(t); k++) {
            const size_t e = k / (t->rows * t->cols), row = k / t->cols % t->rows;
            const double x = (double)number(matrix(t, e), row, k % t->cols);
            if (isfinite(x)) continue;
            tensor_name(name, sizeof name, w, i, e);
            fail(FAILED, "%s: %s holds %g, must be finite", run->path, name, x);
        }
    }
    fail(FAILED, "%s: the logits of token %zu are not finite, though all weights are: an overflow",
         run->path, index);
}

// run->logits of one row of the last step, which is token number `index`, and their hash (FNV-1a,
// four bytes at a time): two builds or machines that print the same one computed the same, to the
// last bit.
static void last_logits(Run *run, size_t row, size_t index) {
    const size_t V = run->model.config.vocab_size;
    logits_forward(&run->model, &run->state, run->logits, row, 1);
    run->hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < V; i++) {
        uint32_t bits;
        memcpy(&bits, &run->logits[i], sizeof bits);
        run->hash = (run->hash ^ bits) * 0x100000001B3u;
        if (!isfinite(run->logits[i])) not_finite(run, index);
    }
}

// ---- [3] generate -------------------------------------------------------------------------------

// What a sampling option is: the user's value, else the model's own, else the table's. A model
// without its own says -1, which is in no option's range.
static double resolve(const Run *run, const char *option, double models) {
    const Key *k = key_named(setting_keys, SETTING_KEYS, option, strlen(option));
    const bool has_own = models >= k->least && models <= k->most;
    return has_own && !run->given[k - setting_keys] ? models : key_number(k, &run->set);
}

// The sampler: the command line's settings, else the model's own, else the defaults.
static Sampler sampler_new(const Run *run) {
    const Config *c = &run->model.config;
    const Settings *set = &run->set;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const uint64_t clock_seed = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
    Sampler s = {
        .temperature = resolve(run, "temp", c->generation.temperature),
        .top_k = (int64_t)resolve(run, "top-k", (double)c->generation.top_k),
        .top_p = resolve(run, "top-p", c->generation.top_p),
        .min_p = resolve(run, "min-p", c->generation.min_p),
        .repetition_penalty = resolve(run, "repeat-penalty", c->generation.repetition_penalty),
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
static Writer writer_new(const Run *run) {
    const size_t V = run->model.config.vocab_size;
    Writer w = { .sampler = sampler_new(run), .printer.text.to = stdout };
    w.candidate = allocate(checked_mul(V, sizeof *w.candidate), "the sampler");
    w.seen = allocate(V, "the sampler");
    if (!run->set.ids) w.printer.tokenizer = run->model.tokenizer;
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

// Makes `needed` positions of room, or as many as are allowed; run->tokens too has that many.
static void make_room_to_write(Run *run, size_t needed) {
    make_room(run, needed, 1);
    int *tokens = allocate(checked_mul(run->context, sizeof(int)), "the tokens");
    if (run->tokens) memcpy(tokens, run->tokens, run->n_tokens * sizeof(int));
    release(run->tokens);
    run->tokens = tokens;
}

// Runs the tokens from number `from` on, n in all, and leaves the logits of the last.
static void read_on(Run *run, size_t from, size_t n) {
    size_t row = 0;
    for (size_t pos = from; pos < n; pos += CHUNK)
        row = step(run, pos, min_size(n - pos, CHUNK), pos, 0, 1);
    last_logits(run, row, n - 1);
}

// Adds tokens to the n that have been run, and prints them, until there are `most` or one comes
// that ends a text. Returns how many there are then; the last one that is added is not run.
static size_t write_on(Run *run, Writer *w, size_t n, size_t most) {
    const unsigned char *penalised = w->sampler.repetition_penalty == 1 ? NULL : w->seen;
    while (n < most) {
        const int id = sample(&w->sampler, run->logits, w->candidate, penalised,
                              run->model.config.vocab_size);
        run->tokens[n++] = id;
        w->seen[id] = 1;
        print_token(&w->printer, id);
        flush_stdout();
        const bool ends = !run->set.ignore_eos && ends_text(&run->model.config.generation, id);
        if (ends || n == most || interrupted) break;
        read_on(run, n - 1, n);
    }
    return n;
}

// Speeds on stderr: of the prompt, run all at once, and of the n tokens run one by one after it.
static void print_speed(const Run *run, double prompt_s, size_t n, double n_s) {
    const size_t prompt = run->n_tokens;
    fprintf(stderr, "prompt: %zu tokens, %.1f tok/s; ", prompt, (double)prompt / prompt_s);
    if (n) fprintf(stderr, "then %zu, %.1f tok/s; ", n, (double)n / n_s);
    fprintf(stderr, "last logits #%016llx\n", (unsigned long long)run->hash);
}

// With --verbose-prompt, the tokens that go in, as a line of ids on stderr.
static void print_prompt(const Run *run) {
    if (!run->set.verbose_prompt) return;
    fputs("prompt:", stderr);
    for (size_t i = 0; i < run->n_tokens; i++) fprintf(stderr, " %d", run->tokens[i]);
    fputc('\n', stderr);
}

// How many tokens to write at most: with -1 more than any context holds.
static size_t most_new_tokens(const Run *run) {
    const int64_t n = run->set.n_predict;
    return n < 0 || n > INT32_MAX ? INT32_MAX : (size_t)n;
}

// Continues the prompt token by token.
static void generate(Run *run) {
    const size_t prompt = run->n_tokens, limit = context_limit(run);
    if (prompt > limit)
        fail(FAILED, "the prompt is %zu tokens long, the context holds %zu (--ctx-size, at most "
             "max_position_embeddings %zu)", prompt, limit,
             run->model.config.max_position_embeddings);
    const size_t most = prompt + most_new_tokens(run);
    make_room_to_write(run, min_size(most, limit));
    Writer w = writer_new(run);
    print_prompt(run);
    for (size_t i = 0; i < prompt; i++) {
        print_token(&w.printer, run->tokens[i]);
        w.seen[run->tokens[i]] = 1;
    }
    flush_stdout();
    const double start = seconds();
    read_on(run, 0, prompt);
    const double middle = seconds();
    const size_t n = write_on(run, &w, prompt, run->context);
    const double end = seconds();
    end_line(&w);
    if (n == limit && n < most)
        fprintf(stderr, "run: the context of %zu tokens is full: the text may go on\n", limit);
    print_speed(run, middle - start, n > prompt ? n - prompt - 1 : 0, end - middle);
    writer_free(&w);
    if (interrupted) stop(run);
}

// ---- [4] eval -----------------------------------------------------------------------------------

// A line on stderr about how far the work is, every 2 seconds; on a terminal it redraws itself.
// `last` ends what was begun.
static void progress(size_t done, size_t all, double nll, int last) {
    static double next;
    static int open_line;
    const double now = seconds();
    if (next == 0) next = now + 2;
    if (last ? !open_line : now < next) return;
    const int terminal = stderr_is_terminal();
    next = now + 2;
    open_line = terminal && !last;
    fprintf(stderr, "eval: %zu of %zu tokens, nll %.4f%c", done, all, nll,
            open_line ? '\r' : '\n');
}

// Scores the rows from `skip` on of the last step, row 0 being token number `index`: writes their
// logits and returns the sum of -log p(next token), where there is a next one that counts; *counted
// grows by how many these are.
static double score(Run *run, size_t index, size_t n, size_t skip, size_t *counted) {
    const size_t V = run->model.config.vocab_size;
    double nats = 0, loss[LOGIT_ROWS];
    for (size_t first = skip; first < n; first += LOGIT_ROWS) {
        const size_t rows = min_size(n - first, LOGIT_ROWS), next = index + first + 1;
        const size_t predicted = next + rows <= run->n_tokens ? rows : rows - 1;
        logits_forward(&run->model, &run->state, run->logits, first, rows);
        if (run->logits_file.file)
            fwrite(run->logits, sizeof(real), rows * V, run->logits_file.file);
        SHARED(rows * V, for (size_t i = 0; i < predicted; i++) {
            loss[i] = cross_entropy(run->logits + i * V, V, run->tokens[next + i]);
        })
        for (size_t i = 0; i < predicted; i++) {
            if (!isfinite(loss[i])) not_finite(run, index + first + i);
            if (run->counts && !run->counts[next + i]) continue;
            nats += loss[i];
            ++*counted;
        }
    }
    return nats;
}

// A walk through the input in chunks. What is longer than the context is read in windows that
// overlap by half: the first half of a window is there as context for the second.
typedef struct {
    size_t index, rows, position;       // a chunk: first token, how many, and where in the context
    size_t skip;                        // how many of them were in a window before
    size_t start, end;                  // of the window
    size_t seen;                        // tokens in the windows before
} Walk;

// Goes to the next chunk. False where there is none.
static bool next_chunk(const Run *run, Walk *w) {
    const size_t n = run->n_tokens;
    w->index += w->rows;
    if (w->index == w->end) {
        w->seen = w->end;
        if (w->seen == n) return false;
        if (w->end) w->start += run->context > 1 ? run->context / 2 : 1;
        w->end = w->start + min_size(n - w->start, run->context);
        w->index = w->start;
    }
    w->rows = min_size(w->end - w->index, CHUNK);
    w->position = w->index - w->start;
    w->skip = w->seen > w->index ? min_size(w->seen - w->index, w->rows) : 0;
    return true;
}

// The loss of every token but the first, given those before it: their sum in nats, and in *counted
// how many count.
static double score_all(Run *run, size_t *counted) {
    double nats = 0;
    *counted = 0;
    for (Walk w = { 0 }; next_chunk(run, &w); ) {
        step(run, w.index, w.rows, w.position, w.skip, w.rows);
        nats += score(run, w.index, w.rows, w.skip, counted);
        if (w.skip < w.rows && *counted)
            progress(w.index + w.rows, run->n_tokens, nats / (double)*counted, 0);
    }
    return nats;
}

// Where the command line changes the chain: the loss without that.
static void print_untouched(Run *run) {
    size_t counted;
    if (!run->edits || !run->edits->n) return;
    run->state.edits = NULL;
    FILE *const logits = run->logits_file.file, *const routing = run->trace_file.file;
    run->logits_file.file = run->trace_file.file = NULL;
    const double nats = score_all(run, &counted);
    run->logits_file.file = logits;
    run->trace_file.file = routing;
    if (counted) print_value("nll_untouched", nats / (double)counted);
}

// How well the model predicts the input.
static void evaluate(Run *run) {
    const size_t n = run->n_tokens;
    size_t counted;
    make_room(run, n ? n : 1, LOGIT_ROWS);
    const double begin = seconds(), nats = score_all(run, &counted), nll = nats / (double)counted;
    progress(n, n, nll, 1);
    fprintf(stderr, "eval: %.1f tok/s\n", (double)n / (seconds() - begin));
    print_count("tokens", counted);
    if (!counted) return;
    print_value("nll", nll);
    print_untouched(run);
    print_value("ppl", exp(nll));
    if (run->text_bytes) print_value("bits_per_byte", nats / log(2) / (double)run->text_bytes);
}

// ---- [5] chat -----------------------------------------------------------------------------------

#include "lib/chat.h"
enum { CHAT_CONTEXT = 4096 };       // tokens, unless --ctx-size says otherwise

// Adds a line of stdin, without its end, to a text. False where there is none.
static int add_line(Text *t) {
    const size_t before = t->n;
    int c;
    if (isatty(0)) fputs("> ", stderr);
    while ((c = getchar()) != EOF && c != '\n') {
        const char byte = (char)c;
        add_text(t, &byte, 1);
    }
    if (interrupted) exit(INTERRUPTED);
    if (ferror(stdin)) fail(FAILED, "stdin: cannot be read: %s", strerror(errno));
    if (t->n > before && t->bytes[t->n - 1] == '\r') t->n--;
    return c != EOF || t->n > before;
}

// Drops the oldest questions and their answers until the conversation has `most` tokens or fewer,
// or only its last question is left. Returns its ids, *n of them; the caller releases them.
static int *forget(const Run *run, Chat *chat, size_t most, size_t *n) {
    size_t too_early = chat->from, from = chat->n - 1;
    while (too_early + 2 < from) {      // bisection, over every second message
        const size_t middle = too_early + (from - too_early) / 4 * 2;
        chat->from = middle > too_early ? middle : too_early + 2;
        release(chat_ids(&run->model, chat, n));
        if (*n > most) too_early = chat->from; else from = chat->from;
    }
    chat->from = from;
    return chat_ids(&run->model, chat, n);
}

// Makes run->tokens the conversation with its last question, and forgets what is older where the
// context has no room for that and an answer. What the cache holds of the beginning, of n_run
// tokens, stays there: returns how much. SIZE_MAX, with a line on stderr, if the question alone is
// too long; it is taken out of the conversation then.
static size_t ask(Run *run, Chat *chat, size_t n_run) {
    const size_t from = chat->from;
    const size_t answer = min_size(run->context / 4, most_new_tokens(run));  // what to leave for it
    size_t n, whole;
    int *ids = chat_ids(&run->model, chat, &whole);
    n = whole;
    if (from < chat->n - 1 && whole + answer + 1 > run->context) {
        release(ids);
        const size_t most = run->context - min_size(answer + 1, run->context);
        ids = forget(run, chat, min_size(run->context / 2, most), &n);
    }
    const bool fits = n && n + 2 <= run->context;     // with one token of an answer, and its end
    if (!fits) {
        fprintf(stderr, "chat: the message makes %zu tokens, the context holds %zu (--ctx-size): "
                "it is passed over\n", n, run->context);
        free(chat->message[--chat->n].bytes);
        chat->from = from;
        release(ids);
        return SIZE_MAX;
    }
    if (n < whole)
        fprintf(stderr, "chat: the context of %zu tokens (--ctx-size) is full: the oldest %zu are "
                "forgotten\n", run->context, whole - n);
    size_t same = 0;
    while (same < n_run && same + 1 < n && ids[same] == run->tokens[same]) same++;
    memcpy(run->tokens, ids, n * sizeof(int));
    run->n_tokens = n;
    release(ids);
    return same;
}

// Answers the prompt, if there is one, and every line of stdin.
static void chat(Run *run) {
    const Config *c = &run->model.config;
    const Settings *set = &run->set;
    if (!run->model.tokenizer)
        fail(FAILED, "%s: has no tokenizer, which --mode chat needs", run->path);
    Chat chat = chat_new(&run->model, set->system, run->path);
    const size_t limit = context_limit(run);
    make_room_to_write(run, set->ctx_size ? limit : min_size(limit, CHAT_CONTEXT));
    Writer w = writer_new(run);
    size_t n_run = 0, prompt_bytes = set->prompt ? strlen(set->prompt) : 0;
    char *file = set->file ? read_file(set->file, &prompt_bytes) : NULL;
    const char *prompt = file ? file : set->prompt;
    for (;; prompt = NULL) {
        Text said = { 0 }, answer = { 0 };
        if (prompt) add_text(&said, prompt, prompt_bytes);
        else if (!add_line(&said)) break;
        if (said.n == 0) continue;
        chat_add(&chat, said);
        const size_t from = ask(run, &chat, n_run);
        if (from == SIZE_MAX) continue;
        const size_t n = run->n_tokens, room = run->context - n - 1;
        print_prompt(run);
        memset(w.seen, 0, c->vocab_size);
        for (size_t i = 0; i < n; i++) w.seen[run->tokens[i]] = 1;
        read_on(run, from, n);
        size_t end = n + min_size(room, most_new_tokens(run));
        end = write_on(run, &w, n, end);
        end_line(&w);
        if (interrupted) exit(INTERRUPTED);
        n_run = end > n ? end - 1 : n;
        if (end == run->context - 1 && !ends_text(&c->generation, run->tokens[end - 1]))
            fprintf(stderr, "chat: the context of %zu tokens is full: the answer ends here\n",
                    run->context);
        for (size_t i = n, bytes; i < end; i++) {
            const char *text = decode(run->model.tokenizer, run->tokens[i], &bytes);
            if (i + 1 < end || !ends_text(&c->generation, run->tokens[i]))
                add_text(&answer, text, bytes);
        }
        chat_add(&chat, answer);
    }
    chat_free(&chat);
    free(file);
    writer_free(&w);
}

// ---- [6] main -----------------------------------------------------------------------------------

#include "lib/info.h"
#include "lib/bench.h"
#include "lib/lens.h"

// Mode tokenize: the ids of the text on one line.
static void print_tokens(const Run *run) {
    for (size_t i = 0; i < run->n_tokens; i++) printf("%s%d", i ? " " : "", run->tokens[i]);
    if (run->n_tokens) putchar('\n');
}

// Opens the model and does what --mode says.
static void work(Run *run) {
    const Settings *set = &run->set;
    set_threads(set->threads);
    Header header;
    run->model = model_open(run->path, set->mode == INFO ? MAPPED_CHECKED :
                            set->mode == TOKENIZE ? TOKENIZER : MAPPED, NULL, &header);
    run->fingerprint = header.checksum;
    run->edits = read_edits(set, &run->model);
    for (int k = 0, n = 0; k < EDIT_KINDS; k++)
        if (set->edits[k]) fprintf(stderr, "%s --%s %s", n++ ? "" : "edits:", edit_names[k],
                                   set->edits[k]);
    if (run->edits && run->edits->n) fputc('\n', stderr);
    const size_t longest = run->model.config.max_position_embeddings;
    if (set->ctx_size > longest)
        fail(WRONG_USAGE, "--ctx-size is %zu, must be 1..%zu (max_position_embeddings)",
             set->ctx_size, longest);
    if (run->model.w.n_tensors) print_model(&run->model);
    if (set->mode != CHAT && set->mode != BENCH && set->mode != INFO) read_tokens(run);
    catch_interrupts(true);
    if (set->logits) output_open(&run->logits_file, set->logits, true);
    if (set->trace) output_open(&run->trace_file, set->trace, true);
    if (set->trace) fputs(TRACE_COLUMNS, run->trace_file.file);
    if (set->lens) output_open(&run->lens_file, set->lens, true);
    switch (set->mode) {
    case GENERATE: generate(run); break;
    case CHAT:     chat(run); break;
    case EVAL:     evaluate(run); break;
    case BENCH:    bench(run); break;
    case INFO:     info(run); break;
    case TOKENIZE: print_tokens(run); break;
    case LENS:     lens(run); break;
    }
    output_close(&run->logits_file);
    output_close(&run->trace_file);
    output_close(&run->lens_file);
}

// Reads the command line, then hands over to the mode.
int main(int argc, char **argv) {
    program = "run";
    occupy_standard_files();
    static Run run;
    const Options options = { setting_keys, SETTING_KEYS, &run.set, run.given };
    keys_init(setting_keys, SETTING_KEYS, &run.set);
    int first = 1;                                  // the model is the first argument, or the last
    if (argc > 1 && argv[1][0] != '-') run.path = argv[first++];
    else if (argc > 2 && argv[argc - 1][0] != '-') run.path = argv[--argc];
    parse_options(&options, 1, argc, argv, first, "prompt");
    if (run.set.help) {
        print_help(&options);
    } else if (run.set.version) {
        puts("run " COE_VERSION);
    } else {
        check_settings(&run.set, run.path);
        work(&run);
        state_free(&run.state);
        release(run.logits);
        release(run.tokens);
        release(run.counts);
        model_free(&run.model);
    }
    flush_stdout();
    return 0;
}
