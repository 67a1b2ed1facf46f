// train.c - trains a Chain-of-Experts: hand-derived backward passes, AdamW, data, checkpoints.
//
// Read coe.c first: this file includes it, and backward() here is its forward() read upwards.
//
//   [1] settings                  [5] backward of attention    [9]  checkpoints
//   [2] data                      [6] backward of the chain    [10] measuring
//   [3] word problems             [7] backward                 [11] the training run
//   [4] backward of operations    [8] AdamW
//
// Conventions of the backward functions: dx is the gradient of the loss with respect to x and has
// its shape; d... outputs come first, then what forward kept, then forward's inputs. Gradients of
// weights are always added to (+=), because a weight is used by many tokens, micro-batches and
// iterations; gradients of activations are added to where a comment says +=.
#include "coe.c"

// ---- [1] settings -------------------------------------------------------------------------------
// Two tables. The recipe is what decides which weights come out, to the last bit: a checkpoint
// carries it, and a resumed run must agree with it. The job is the rest: files, and how often to
// report.

//    kind  field              name                letter least most        words       init
#define RECIPE(X) \
    X(INT,  batch_size,        "batch_size",       'b',     1, 1 << 20,    "",         "8",        \
      "sequences per step")                                                                        \
    X(INT,  max_length,        "max_length",       'l',     2, 1 << 24,    "",         "192",      \
      "tokens per sequence")                                                                       \
    X(INT,  micro_batch_size,  "micro_batch_size", 0,       0, 1 << 20,    "null",     "null",     \
      "sequences at once; null: the batch")                                                        \
    X(INT,  max_steps,         "max_steps",        'x',     0, 1e12,       "",         "4000",     \
      "steps in all, resumed ones included")                                                       \
    X(NUM,  learning_rate,     "learning_rate",    0,       0, 1e9,        "",         "1.2e-3",   \
      "of AdamW, after warm-up")                                                                   \
    X(INT,  warmup_steps,      "warmup_steps",     0,      -1, 1e12,       "null",     "null",     \
      "steps of linear warm-up; null: by warmup_ratio")                                            \
    X(NUM,  warmup_ratio,      "warmup_ratio",     0,       0, 1,          "",         "0.05",     \
      "share of max_steps that is warm-up")                                                        \
    X(WORD, lr_scheduler,      "lr_scheduler",     0,       0, 1,          SCHEDULERS, "cosine",   \
      "after warm-up; cosine ends at 0")                                                           \
    X(NUM,  weight_decay,      "weight_decay",     0,       0, 1e9,        "",         "0.01",     \
      "of AdamW, on every tensor")                                                                 \
    X(NUM,  adam_beta1,        "adam_beta1",       0,       0, 0.9999999,  "",         "0.9",      \
      "decay of the first moment")                                                                 \
    X(NUM,  adam_beta2,        "adam_beta2",       0,       0, 0.9999999,  "",         "0.95",     \
      "decay of the second moment")                                                                \
    X(NUM,  adam_epsilon,      "adam_epsilon",     0,   1e-30, 1,          "",         "1e-8",     \
      "added to the root of the second moment")                                                    \
    X(NUM,  max_grad_norm,     "max_grad_norm",    0,       0, 1e9,        "",         "1",        \
      "gradient is clipped to this norm; 0: off")                                                  \
    X(INT,  seed,              "seed",             's',     0, 9e15,       "",         "1",        \
      "of the initial weights and the order of the data")                                          \
    X(FLAG, sequential,        "sequential",       0,       0, 1,          "",         "false",    \
      "windows in file order instead of shuffled")                                                 \
    X(INT,  level,             "level",            0,       1, 2,          "",         "1",        \
      "difficulty of the built-in task")
#define SCHEDULERS "constant|cosine"

#define JOB(X) \
    X(TEXT, init,              "init",             0,       0, 0,          "",         "",         \
      "model file whose weights to start from, with a new optimizer")                              \
    X(TEXT, resume,            "resume",           0,       0, 0,          "",         "",         \
      "checkpoint to go on from, bit by bit")                                                      \
    X(TEXT, data,              "data",             'd',     0, 0,          "",         "",         \
      "training data: UTF-8 text or llm.c tokens; none: the built-in task")                        \
    X(TEXT, val,               "val",              0,       0, 0,          "",         "",         \
      "validation data; none: the last 5 % of the documents")                                      \
    X(TEXT, tokenizer,         "tokenizer",        0,       0, 0,          "",         "",         \
      "model file whose tokenizer to take; none: bytes, or that of --init")                        \
    X(TEXT, output,            "output",           'o',     0, 0,          "",       "model.bin",  \
      "where checkpoints go; with --resume that file")                                             \
    X(TEXT, log,               "log",              0,       0, 0,          "",         "",         \
      "TSV with a line for each step")                                                             \
    X(FLAG, profile,           "profile",          0,       0, 1,          "",         "false",    \
      "at the end, print what the time went into")                                                 \
    X(WORD, model,             "model",            0,       0, 2,          PRESETS,    "demo",     \
      "preset for all settings")                                                                   \
    X(INT,  eval_steps,        "eval_steps",       0,       0, 1e12,       "",         "250",      \
      "validate every so many steps; 0: at the end")                                               \
    X(INT,  save_steps,        "save_steps",       0,       0, 1e12,       "",         "250",      \
      "save every so many steps; 0: at the end")                                                   \
    X(INT,  sample_steps,      "sample_steps",     0,       0, 1e12,       "",         "0",        \
      "show a sample every so many steps; 0: at the end")                                          \
    X(INT,  eval_problems,     "eval_problems",    0,       0, 1 << 20,    "",         "200",      \
      "held-out problems to solve, a quarter of them during the run; 0: off")                      \
    X(INT,  threads,           "threads",          0,       0, MOST_THREADS, "null",   "null",     \
      "threads; null: OMP_NUM_THREADS, else all cores")                                            \
    X(INT,  show_data,         "show_data",        0,       0, 1 << 30,    "",         "0",        \
      "print so many training documents and exit")                                                 \
    X(INT,  show_val,          "show_val",         0,       0, 1 << 30,    "",         "0",        \
      "print so many validation documents and exit")                                               \
    X(FLAG, help,              "help",             'h',     0, 1,          "",         "false",    \
      "this list")                                                                                 \
    X(FLAG, version,           "version",          0,       0, 1,          "",         "false",    \
      "the version")
#define PRESETS "demo|small|paper"

typedef struct {
#define X(kind, field, ...) TYPE_##kind field;
    RECIPE(X)
#undef X
} Recipe;

typedef struct {
#define X(kind, field, ...) TYPE_##kind field;
    JOB(X)
#undef X
} Job;

#define X(kind, field, name, letter, least, most, words, init, help) \
    { name, letter, kind, least, most, words, init, help, offsetof(TABLE, field) },
#define TABLE Recipe
static const Key recipe_keys[] = { RECIPE(X) };
#undef TABLE
#define TABLE Job
static const Key job_keys[] = { JOB(X) };
#undef TABLE
#undef X
enum { RECIPE_KEYS = sizeof recipe_keys / sizeof *recipe_keys,
       JOB_KEYS = sizeof job_keys / sizeof *job_keys };

// What the reference has where the demo chose otherwise: a model this small learns to copy numbers
// much sooner with larger initial weights, faster rotations and one matrix at both ends.
#define REFERENCE "rope_theta 10000 tie_word_embeddings false initializer_range 0.02 "

// Presets, as the options they stand for, in the order of PRESETS. What a preset does not name
// keeps the tables' value, which is the demo's.
static const char *const presets[] = {
    "",
    REFERENCE "vocab_size 4096 hidden_size 384 num_hidden_layers 6 num_attention_heads 6 "
    "qk_nope_head_dim 64 qk_rope_head_dim 32 v_head_dim 64 kv_lora_rank 128 n_routed_experts 32 "
    "moe_intermediate_size 192 intermediate_size 768 batch_size 8 max_length 256 "
    "learning_rate 1e-3 warmup_ratio 0.1",
    REFERENCE "vocab_size 102400 hidden_size 1024 num_hidden_layers 4 num_attention_heads 8 "
    "qk_nope_head_dim 128 qk_rope_head_dim 64 v_head_dim 128 kv_lora_rank 512 n_routed_experts 63 "
    "num_experts_per_tok 4 moe_intermediate_size 704 intermediate_size 2816 "
    "max_position_embeddings 163840 micro_batch_size 1 rope_scaling.type yarn "
    "rope_scaling.factor 40 rope_scaling.mscale 0.707 rope_scaling.mscale_all_dim 0.707",
};
// The paper's training, which --init takes too.
static const char paper_recipe[] = "batch_size 64 max_length 512 max_steps 1000 learning_rate 3e-4 "
    "warmup_ratio 0.1 lr_scheduler constant";

enum { CONFIG_TABLE, RECIPE_TABLE, JOB_TABLE, TABLES };

// Sets every "name value" of a preset that the user did not give.
static void apply_preset(const Options *tables, const char *preset) {
    char text[1024], *save = NULL;
    snprintf(text, sizeof text, "%s", preset);
    for (char *name = strtok_r(text, " ", &save); name; name = strtok_r(NULL, " ", &save)) {
        size_t table;
        const Key *k = find_key(tables, TABLES, name, strlen(name), &table);
        const char *value = strtok_r(NULL, " ", &save);
        if (!k || !value) fail(FAILED, "bug: preset key %s", name);
        if (tables[table].given[k - tables[table].keys]) continue;
        if (!key_parse(k, tables[table].base, value)) fail(FAILED, "bug: preset value of %s", name);
    }
}

// ---- [2] data -----------------------------------------------------------------------------------
// Training data is one stream of tokens, documents ending in EOS, cut into windows of
// max_length + 1 that overlap by one: max_length inputs, and the same shifted by one as targets.
// Which window comes when depends on the recipe and the step alone, so that a checkpoint need only
// know its step.

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
    char *text = allocate(sum((size_t)size, 1), "the data");
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
    s.tokens = allocate(product(sum(bytes, 1), sizeof(int)), "the tokens of the data");
    if (bytes >= 12) memcpy(&magic, text, sizeof magic);
    if (magic == 20240520 || magic == 20240801)
        read_token_file(&s, path, text, bytes, (size_t)m->config.vocab_size);
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

// ---- [3] word problems --------------------------------------------------------------------------
// The built-in task: grade-school word problems with worked solutions, in the manner of GSM8K.
// Problems are made on the fly, so there is nothing to download and no end of data. A document is
//
//     question: Ada has 4 bags of 6 pens and uses 5 pens. How many are left?
//     answer: 4 * 6 = 24
//     24 - 5 = 19
//     #### 19
//
// The answer takes one step after the other because a transformer can only do so much per token:
// every equation is written out before the next one needs its result.
//
// A problem is a template with its blanks filled in: {N} and {M} are two different names, {t} is a
// thing, {a} to {e} are the given numbers, at least 2 each so that every plural is right. The steps
// use the same letters and call their own results p, q, r and s. So a new kind of problem is a new
// line in this table, and no code. (Add it at the end: a template's place tells which of its
// problems are for validation.)

typedef struct {
    const char *steps;          // three characters each, separated by blanks
    const char *text;
} TaskTemplate;

static const TaskTemplate task_templates[] = {
    {"a+b", "{N} has {a} {t}s and gets {b} more. How many now?"},
    {"a+b", "{N} has {a} {t}s, {M} has {b}. How many {t}s in all?"},
    {"a-b", "{N} had {a} {t}s and lost {b}. How many are left?"},
    {"a-b", "{N} used {b} of {a} {t}s. How many are left?"},
    {"a-b", "{N} found {b} {t}s and now has {a}. How many before?"},
    {"a-b", "{N} needs {a} {t}s but has only {b}. How many are missing?"},
    {"a*b", "{N} has {a} bags of {b} {t}s. How many {t}s is that?"},
    {"a*b", "{N} packs {a} {t}s a day. How many in {b} days?"},
    {"a/b", "{N} shares {a} {t}s evenly among {b} kids. How many each?"},

    {"a-b p+c", "{N} has {a} {t}s, loses {b} and buys {c}. How many now?"},
    {"a+b p-c", "{N} has {a} {t}s, {M} has {b}. They sell {c}. How many are left?"},
    {"a+b p+c", "{N} gives {M} {a} {t}s, sells {b} and keeps {c}. How many at first?"},
    {"a+b a+p", "{M} has {b} more {t}s than {N}, who has {a}. How many in all?"},
    {"a-b a+p", "{N} has {a} {t}s, {M} has {b} fewer. How many in all?"},
    {"a*b a+p", "{N} has {a} {t}s, {M} has {b} times as many. How many together?"},
    {"a+b p*c", "{N} packs {a} {t}s a day, {M} packs {b}. How many do they pack in {c} days?"},
    {"b*c a+p", "{N} has {a} {t}s and buys {b} packs of {c}. How many in all?"},
    {"a*b p-c", "{N} has {a} bags of {b} {t}s and uses {c} {t}s. How many are left?"},
    {"b*c a-p", "From {a} {t}s {N} fills {b} bags of {c}. How many {t}s are left?"},
    {"a*b c-p", "{N} has {c} cents and buys {a} {t}s at {b} cents each. What is left?"},
    {"a+b p/c", "{N} puts {a} big and {b} small {t}s in bags of {c}. How many bags?"},
    {"a-b p/c", "{N} keeps {b} of {a} {t}s and puts the rest in bags of {c}. How many bags?"},
    {"a*b p/c", "{N} shares {a} bags of {b} {t}s evenly among {c} kids. How many each?"},
    {"b/a p*c", "{N} pays {b} cents for {a} {t}s. What do {c} cost at that price?"},

    {"a*b c*d p+q", "{N} has {a} bags of {b} {t}s and {c} boxes of {d}. How many {t}s in all?"},
    {"a*b c*d p-q", "{N} has {a} bags of {b} {t}s, {M} has {c} bags of {d}. "
                    "How many more {t}s has {N}?"},
    {"a*b p+c q-d", "{N} buys {a} bags of {b} {t}s, finds {c} {t}s and uses {d}. "
                    "How many are left?"},
    {"a+b p+c q/d", "{N} puts {a} big, {b} small and {c} tiny {t}s in bags of {d}. "
                    "How many bags?"},
    {"a*b p+c q/d", "{N} shares {a} bags of {b} {t}s and {c} loose ones evenly among {d} kids. "
                    "How many each?"},
    {"a+b a+p q/c", "{N} has {a} {t}s, {M} has {b} more. All go into bags of {c}. "
                    "How many bags?"},
    {"a+b p*c q-d", "A box holds {a} big and {b} small {t}s. {N} buys {c} boxes and uses {d} "
                    "{t}s. How many are left?"},

    {"a*b c*d p+q r-e", "{N} buys {a} bags of {b} {t}s and {c} boxes of {d}, then sells {e} {t}s. "
                        "How many are left?"},
    {"a*b c*d p+q e-r", "{N} has {e} cents and buys {a} {t}s at {b} cents and {c} cups at {d} "
                        "cents each. How many cents are left?"},
    {"a*b c*d p+q r/e", "{N} has {a} bags of {b} {t}s, {M} has {c} bags of {d}. They share all "
                        "evenly among {e} kids. How many each?"},
    {"a+b a+p q-c r/d", "{N} has {a} {t}s, {M} has {b} more than {N}. They sell {c} and put the "
                        "rest in bags of {d}. How many bags?"},
    {"a*b p-c a+q r/d", "{N} has {a} {t}s, {M} had {b} times as many but lost {c}. They put all "
                        "they have in bags of {d}. How many bags?"},
    {"a+b p*c q-d r+e", "A box holds {a} big and {b} small {t}s. {N} buys {c} boxes, uses {d} "
                        "{t}s and finds {e}. How many does {N} have now?"},
    {"b/a p*c d+e r-q", "{N} pays {b} cents for {a} {t}s. {M} has {d} cents, finds {e} cents and "
                        "buys {c} {t}s at that price. How many cents are left?"},
    {"a/b c*d q/b p+r", "{N} shares {a} {t}s evenly among {b} kids. {M} shares {c} bags of {d} "
                        "{t}s among them too. How many does each get in all?"},
};

// The things are words whose plural is a plain s.
enum { TASK_NAMES = 32, TASK_THINGS = 32, TASK_PAIRS = TASK_NAMES * TASK_THINGS };

static const char *const task_names[TASK_NAMES] = {
    "Ada", "Amy", "Ana", "Ben", "Bo", "Cleo", "Dan", "Eli", "Eva", "Finn", "Gus", "Hana", "Ian",
    "Ivy", "Jan", "Joe", "Kai", "Kim", "Lea", "Leo", "Max", "Mia", "Nia", "Noah", "Omar", "Pia",
    "Ravi", "Rosa", "Sam", "Tara", "Tom", "Zoe",
};
static const char *const task_things[TASK_THINGS] = {
    "apple", "ball", "bead", "bell", "book", "bow", "bun", "cake", "cap", "card", "clip", "doll",
    "egg", "fig", "flag", "hat", "jar", "kite", "lid", "lime", "map", "mug", "net", "nut", "pear",
    "pen", "pie", "pin", "plum", "ring", "tile", "toy",
};

// What a level may ask for. Numbers are drawn freely and thrown away until every step fits: short
// to write down, and still tens of megabytes a second, so that no training run waits for it.
typedef struct {
    size_t steps;               // no template has more steps
    int range[3];               // a given number is drawn from 2 to one of these
    int sum;                    // no sum is greater
    int times[2][2];            // every product is within one of these tables, say 10 x 5
    int divisor;                // no divisor is greater
} TaskLevel;

static const TaskLevel task_levels[] = {
    {3, .range = {20, 20, 20}, .sum = 60, .times = {{10, 5}, {10, 5}}, .divisor = 10},
    {4, .range = {12, 99, 200}, .sum = 400, .times = {{12, 12}, {99, 9}}, .divisor = 12},
};

enum { TASK_MAX = 320 };        // bytes: the longest template with the longest words and numbers

// With numbers this small chance repeats itself, and a problem met in training would test memory,
// not arithmetic. So the template and its numbers decide, whatever the names, the thing, the seed
// and the level: if their hash is 0 modulo TASK_CLASSES the problem is for validation, otherwise
// for training. However long a run, the two never meet. (The salt is one of those with which the
// hash is fair to the templates that have only few problems at level 1: each gives about a
// sixteenth.)
enum { TASK_CLASSES = 16, TASK_SALT = 230 };

// The hash h with one more number mixed into it.
static uint64_t task_hash(uint64_t h, uint64_t x) {
    h ^= x;
    return rng_next(&h);
}

// Carries out the steps, "a*b p-c": v ['a' .. 'z'] holds the given numbers from a on and gets the
// results from p on. Returns 0 if the level forbids one of the steps.
static int task_solve(const TaskLevel *level, const char *steps, int *v) {
    for (int *result = &v['p' - 'a'], fits;; steps += 4) {
        int x = v[steps[0] - 'a'], y = v[steps[2] - 'a'], z;
        if (steps[1] == '+') {
            z = x + y;
            fits = z <= level->sum;
        } else if (steps[1] == '-') {
            z = x - y;
            fits = z >= 1;
        } else if (steps[1] == '*') {
            int hi = x > y ? x : y, lo = x + y - hi;
            z = x * y;
            fits = lo >= 2 && ((hi <= level->times[0][0] && lo <= level->times[0][1]) ||
                               (hi <= level->times[1][0] && lo <= level->times[1][1]));
        } else {
            z = x / y;
            fits = x % y == 0 && z >= 2 && y >= 2 && y <= level->divisor;
        }
        *result++ = z;
        if (!fits || steps[3] == 0) return fits;
    }
}

// Writes training problem number i of this seed, or number i of the one and only validation list.
// Nothing is carried over from problem to problem, so that a resumed run just goes on counting.
// Returns the length of the text, which takes TASK_MAX bytes at most, with the final NUL.
static int task_problem(char *text, uint64_t seed, uint64_t i, int level, int held_out) {
    const TaskLevel *limits = &task_levels[level - 1];
    const uint64_t count = sizeof task_templates / sizeof *task_templates;
    const TaskTemplate *t;
    int v['z' - 'a' + 1], given, solved;
    uint64_t key, rng = task_hash(task_hash(0, held_out ? 0 : seed), i);
    do {
        do {
            t = &task_templates[rng_next(&rng) % count];
        } while (strlen(t->steps) >= 4 * limits->steps);
        for (given = 0; strchr(t->steps, 'a' + given); given++) {}
        do {
            for (int j = 0; j < given; j++) {
                uint64_t r = rng_next(&rng);
                v[j] = 2 + (int)((r >> 32) % (uint64_t)(limits->range[r % 3] - 1));
            }
            solved = task_solve(limits, t->steps, v);
        } while (!solved);
        key = TASK_SALT + (uint64_t)(t - task_templates);
        for (int j = 0; j < given; j++) key = task_hash(key, (uint64_t)v[j]);
    } while ((key % TASK_CLASSES == 0) != (held_out != 0));

    // A name and a thing make one of 1024 pairs. The validation list goes through all of them (421
    // is odd, so i * 421 meets each remainder), and every template shows both, so its first 1024
    // problems are all different.
    uint64_t pair = (held_out ? i * 421 : rng_next(&rng)) % TASK_PAIRS, n = pair % TASK_NAMES;
    const char *name = task_names[n], *thing = task_things[pair / TASK_NAMES];
    const char *other = task_names[(n + 1 + rng_next(&rng) % (TASK_NAMES - 1)) % TASK_NAMES];

    char *out = text + sprintf(text, "question: ");
    for (const char *s = t->text; *s; s++) {
        if (*s != '{') {
            *out++ = *s;
            continue;
        }
        const char *word = s[1] == 'N' ? name : s[1] == 'M' ? other : s[1] == 't' ? thing : NULL;
        out += word ? sprintf(out, "%s", word) : sprintf(out, "%d", v[s[1] - 'a']);
        s += 2;
    }
    out += sprintf(out, "\nanswer: ");
    int z = 0;
    for (size_t k = 0; 4 * k < strlen(t->steps); k++) {
        const char *s = t->steps + 4 * k;
        z = v['p' - 'a' + (int)k];
        out += sprintf(out, "%d %c %d = %d\n", v[s[0] - 'a'], s[1], v[s[2] - 'a'], z);
    }
    out += sprintf(out, "#### %d\n", z);
    return (int)(out - text);
}

// The length of the prompt, which is the question with its newline; the model's part begins with
// "answer:". The cut is at a newline because the usual tokenizers never join one with the letters
// that follow.
static int task_prompt_length(const char *text) {
    return (int)strcspn(text, "\n") + 1;
}

// The n of the first line that begins with "####", or -1 if there is none or if that line is
// anything but "#### n" with its newline: what was cut off in the middle of n is not an answer.
static long task_answer(const char *text) {
    const char *s = strncmp(text, "####", 4) == 0 ? text : strstr(text, "\n####");
    if (!s) return -1;
    s += *s == '\n';
    size_t digits = strncmp(s, "#### ", 5) == 0 ? strspn(s + 5, "0123456789") : 0;
    if (digits < 1 || digits > 9 || s[5 + digits] != '\n' || (s[5] == '0' && digits > 1)) return -1;
    return strtol(s + 5, NULL, 10);
}

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

// How many windows of L inputs, and one token more, a stream has.
static size_t windows(const Stream *s, size_t L) { return s->n ? (s->n - 1) / L : 0; }

// Takes the next L = max_length tokens off the endless stream of problems; window (L + 1) gets them
// and the token after them, which stays.
static void next_made_window(Data *data, int *window) {
    const size_t L = (size_t)data->recipe->max_length, room = L + TASK_MAX + 2;
    if (!data->pending) data->pending = allocate(room * sizeof(int), "a window of data");
    while (data->n_pending < L + 1) {
        int *end = data->pending + data->n_pending;
        data->n_pending += task_tokens(end, data, data->document++, 0);
    }
    memcpy(window, data->pending, (L + 1) * sizeof(int));
    memmove(data->pending, data->pending + L, (data->n_pending -= L) * sizeof(int));
}

// The window (max_length + 1) that is number i of all samples of the run: in file order, or in an
// order drawn anew each epoch.
static const int *window_of(Data *data, uint64_t i) {
    const size_t L = (size_t)data->recipe->max_length, n = windows(&data->train, L);
    const uint64_t epoch = i / n;
    if (data->recipe->sequential) return data->train.tokens + i % n * L;
    if (data->epoch != epoch + 1) {
        uint64_t rng = (uint64_t)data->recipe->seed * 0x9E3779B97F4A7C15u + epoch;
        if (!data->order)
            data->order = allocate(product(n, sizeof(size_t)), "the order of the data");
        for (size_t k = 0; k < n; k++) {                // Fisher and Yates, from the inside out
            size_t j = (size_t)(rng_next(&rng) % (k + 1));
            data->order[k] = data->order[j];
            data->order[j] = k;
        }
        data->epoch = epoch + 1;
    }
    return data->train.tokens + data->order[i % n] * L;
}

// The batch of a step: inputs and targets (batch_size, max_length); window (max_length + 1) is
// scratch. The steps must be asked for in order.
static void next_batch(Data *data, uint64_t step, int *inputs, int *targets, int *window) {
    const size_t B = (size_t)data->recipe->batch_size, L = (size_t)data->recipe->max_length;
    for (size_t b = 0; b < B; b++) {
        if (data->built_in) next_made_window(data, window);
        const int *from = data->built_in ? window : window_of(data, step * B + b);
        memcpy(inputs + b * L, from, L * sizeof(int));
        memcpy(targets + b * L, from + 1, L * sizeof(int));
    }
}

// ---- [4] backward of operations -----------------------------------------------------------------
// As [6] and [7] in coe.c: what is above a function is the forward equation, then its derivative.

// Where a sum runs over rows, the columns are shared out among the threads in blocks of this many.
enum { COLUMN_BLOCK = 32 };

// dw (d) += the sum over the n rows of dy * x * scale, and of dy alone where x is NULL (a bias).
// x and dy are (n, d) at strides ldx and ldy, scale (n). A thread owns columns, so that the order
// of the sum is fixed.
static void add_rows(real *dw, const real *dy, size_t ldy, const real *x, size_t ldx,
                     const real *scale, size_t n, size_t d) {
    SHARED(n * d, for (size_t block = 0; block < d; block += COLUMN_BLOCK) {
        const size_t end = block + COLUMN_BLOCK < d ? block + COLUMN_BLOCK : d;
        for (size_t t = 0; t < n; t++)
            for (size_t i = block; i < end; i++)
                dw[i] += x ? dy[t * ldy + i] * (x[t * ldx + i] * scale[t]) : dy[t * ldy + i];
    })
}

// y_i = w_i x_i s,   s = (mean_j x_j^2 + eps)^(-1/2)
// Let u_i = w_i dy_i. x_j acts directly and through s, with ds/dx_j = -s^3 x_j / d, so
//     dx_j = s u_j - (s^3 / d) x_j sum_i u_i x_i               dw_i += dy_i x_i s
// dx (n, d) at stride lddx, += with `add`; dy at lddy, x at ldx; s = inverse (n) was kept.
static void rmsnorm_backward(real *dx, size_t lddx, const Tensor *dw, const real *dy, size_t lddy,
                             const real *inverse, const real *x, size_t ldx, const Tensor *w,
                             size_t n, int add) {
    const size_t d = w->cols;
    SHARED(n * d, for (size_t t = 0; t < n; t++) {
        const real *xt = x + t * ldx, *dyt = dy + t * lddy, s = inverse[t];
        real *dxt = dx + t * lddx;
        vec lanes = { 0 };
        real along = 0;                 // sum_i u_i x_i
        size_t i = 0;
        for (; i + LANES <= d; i += LANES)
            lanes += load(w->data + i) * load(dyt + i) * load(xt + i);
        for (; i < d; i++) along += w->data[i] * dyt[i] * xt[i];
        along = (along + add_lanes(&lanes)) * s * s * s / (real)d;
        for (i = 0; i < d; i++)
            dxt[i] = (add ? dxt[i] : 0) + (s * w->data[i] * dyt[i] - along * xt[i]);
    })
    add_rows(dw->data, dy, lddy, x, ldx, inverse, n, d);
}

// y = x w^T + b:   dx = dy w (+= with `add`),   dw += dy^T x,   db += the rows of dy
// dx and x (n, columns of w), dy (n, rows of w), copy e of the stacks w and dw. dx and db may be
// NULL.
static void linear_backward(real *dx, const Tensor *dw, const Tensor *db, const real *dy,
                            const real *x, const Tensor *w, size_t e, size_t n, int add) {
    if (dx) matmul_nn(dx, w->cols, dy, w->rows, matrix(w, e, 0), n, w->cols, w->rows, add);
    matmul_tn(at(dw, e), w->cols, dy, w->rows, x, w->cols, n, w->cols, w->rows, 1);
    if (db && db->data) add_rows(db->data, dy, w->rows, NULL, 0, NULL, n, w->rows);
}

// y_i = e^(x_i) / sum_j e^(x_j):   dy_i/dx_j = y_i ([i = j] - y_j), so
//     dx_j = y_j (dy_j - sum_i dy_i y_i)
// In place: d (n) holds dy and becomes dx.
static void softmax_backward(real *d, const real *y, size_t n) {
    real along = dot(d, y, n);
    for (size_t i = 0; i < n; i++) d[i] = y[i] * (d[i] - along);
}

// What forward must keep for the backward pass of a model.
static enum Keep to_keep(const Model *m) { return m->coe_weights ? KEEP_FFN : KEEP; }

// What backward writes besides weight gradients. T is all rows of a micro-batch.
typedef struct {
    real *dx;           // (T, d)           of the stream, from layer to layer
    real *dmid;         // (T, d)           of the stream after attention
    real *dffn;         // (T, d)           of a feed-forward's output
    real *dnorm;        // (T, d)           of a norm's output
    real *dlatent_q;    // (T, r)           of the query's normed latent
    real *dq_a;         // (T, r)
    real *dq;           // (T, H (dn + dr))
    real *dkv;          // (T, H (dn + dv))
    real *dk_rot;       // (T, H, dr)       each head's part, added up in one order
    real *dlatent;      // (T, R)
    real *dkv_a;        // (T, R + dr)
    real *dheads;       // (T, H dv)
    real *dscores;      // (threads, QUERY_BLOCK, context)
    real *dgrouped;     // (T K, d)         of the experts' outputs, grouped by expert
    real *dinput;       // (T K, d)         of their inputs
    real *dact, *dg, *du;       // (T K, f) or (T, f S) or (T, I), the largest
    real *dweight;      // (T, K)           of the routing weights
    real *row_weight;   // (T K)            the routing weights, grouped by expert
    real *drow_weight;  // (T K)            and their gradients
    real *dscore;       // (T, E)           of the routers' scores, then of their logits
    real *logits;       // (loss_rows, V)     at logits_stride(V)
    size_t loss_rows;
    char *memory;
    size_t memory_bytes;
} Gradients;

// Rows whose logits are in memory at a time: so many that lm_head and its gradient are not fetched
// too often, but no more than 256 MB of them; T is cut into equal parts.
static size_t loss_rows(size_t T, size_t V) {
    const size_t fit = ((size_t)1 << 26) / V, most = fit < 96 ? 96 : fit > 512 ? 512 : fit;
    const size_t parts = (T + most - 1) / most;
    return (T + parts - 1) / parts;
}

// How far apart their rows are. V is often a multiple of a power of two, and a column of such a
// matrix would fall into few places of a cache.
static size_t logits_stride(size_t V) { return V + LANES; }

// Places everything in Gradients for T rows, of sequences of up to `context` tokens.
static void gradients_layout(Gradients *g, const Config *c, size_t T, size_t context,
                             Arena *arena) {
    const size_t d = c->hidden_size, H = c->num_attention_heads, dn = c->qk_nope_head_dim,
        dr = c->qk_rope_head_dim, dv = c->v_head_dim, r = c->q_lora_rank, R = c->kv_lora_rank,
        E = c->n_routed_experts, K = E ? (size_t)c->num_experts_per_tok : 0,
        f = c->moe_intermediate_size, fit = sizeof(real);
    size_t wide = f * (size_t)c->n_shared_experts;
    for (size_t l = 0; l < (size_t)c->num_hidden_layers; l++)
        if (!is_moe(c, l)) wide = max_size(wide, (size_t)c->intermediate_size);
    wide = max_size(T * K * f, T * wide);
    g->loss_rows = loss_rows(T, (size_t)c->vocab_size);
    g->dx        = take(arena, T * d, fit);
    g->dmid      = take(arena, T * d, fit);
    g->dffn      = take(arena, T * d, fit);
    g->dnorm     = take(arena, T * d, fit);
    g->dlatent_q = take(arena, T * r, fit);
    g->dq_a      = take(arena, T * r, fit);
    g->dq        = take(arena, T * H * (dn + dr), fit);
    g->dkv       = take(arena, T * H * (dn + dv), fit);
    g->dk_rot    = take(arena, T * H * dr, fit);
    g->dlatent   = take(arena, T * R, fit);
    g->dkv_a     = take(arena, T * (R + dr), fit);
    g->dheads    = take(arena, T * H * dv, fit);
    g->dscores   = take(arena, (size_t)thread_count() * QUERY_BLOCK * context, fit);
    g->dgrouped  = take(arena, T * K * d, fit);
    g->dinput    = take(arena, T * K * d, fit);
    g->dact      = take(arena, wide, fit);
    g->dg        = take(arena, wide, fit);
    g->du        = take(arena, wide, fit);
    g->dweight   = take(arena, T * K, fit);
    g->row_weight  = take(arena, T * K, fit);
    g->drow_weight = take(arena, T * K, fit);
    g->dscore    = take(arena, T * E, fit);
    g->logits    = take(arena, product(g->loss_rows, logits_stride((size_t)c->vocab_size)), fit);
}

// Memory for the backward pass of T rows, laid out like a State: once to measure, once to place.
static Gradients gradients_new(const Config *c, size_t T, size_t context) {
    Gradients g = { 0 };
    Arena arena = { 0 };
    gradients_layout(&g, c, T, context, &arena);
    g.memory_bytes = arena.used;
    g.memory = arena.base = allocate(arena.used, "gradients of the activations");
    arena.used = 0;
    gradients_layout(&g, c, T, context, &arena);
    return g;
}

// ---- [5] backward of attention ------------------------------------------------------------------
// Mirrors [9] in coe.c.

// For one head, with p_ij = softmax_j(scale s_ij), s_ij = q_i . k_j + qr_i . kr_j and
// o_i = sum_j p_ij v_j:
//     dv_j  = sum_i p_ij do_i                           dp_ij = do_i . v_j
//     ds_ij = scale p_ij (dp_ij - sum_k p_ik dp_ik)     where sum_k p_ik dp_ik = do_i . o_i
//     dq_i  = sum_j ds_ij k_j     dk_j = sum_i ds_ij q_i     and the same for qr, kr
// From g->dheads into g->dq, g->dkv and g->dk_rot, which need not be 0. p was not kept: it is
// e^(scale s - log_sum), one block of queries at a time, the last first. A thread owns a head of a
// sequence, and writes only its own rows.
static void attend_backward(const Config *c, State *s, const LayerState *a, Gradients *g,
                            size_t B, size_t n) {
    const size_t H = c->num_attention_heads, dn = c->qk_nope_head_dim, dr = c->qk_rope_head_dim,
        dv = c->v_head_dim, R = c->kv_lora_rank, dq = dn + dr, dkv = dn + dv;
    const real scale = attention_scale(c);
    Work work = { .n = B * H };
    #pragma omp parallel
    for (size_t task; (task = next_piece(&work)) < work.n; ) {
        const size_t b = task / H, h = task % H, start = b * n * H + h;
        const real *kv = a->kv + start * dkv, *k_rot = a->latent + b * n * (R + dr) + R;
        real *dkv_h = g->dkv + start * dkv, *dk_rot = g->dk_rot + start * dr;
        real *p = s->scores + (size_t)thread_id() * QUERY_BLOCK * s->context;
        real *ds = g->dscores + (size_t)thread_id() * QUERY_BLOCK * s->context;
        for (size_t block = query_blocks(n); block-- > 0; ) {
            const size_t i0 = block * QUERY_BLOCK, rows = block_rows(n, i0), keys = i0 + rows;
            const size_t first = b * n + i0;
            const int add = keys < n;           // the last block sees, and writes, all keys
            const real *q = a->q + (first * H + h) * dq, *o = a->heads + (first * H + h) * dv;
            const real *d_o = g->dheads + (first * H + h) * dv;
            real *dq_h = g->dq + (first * H + h) * dq;
            scores_of(p, q, H * dq, kv, H * dkv, k_rot, R + dr, rows, keys, dn, dr);
            matmul_nt(ds, keys, d_o, H * dv, plain(kv + dn, H * dkv), rows, dv, keys, 0);
            for (size_t i = 0; i < rows; i++) {
                const real log_sum = a->log_sum[(first + i) * H + h];
                const real along = dot(d_o + i * H * dv, o + i * H * dv, dv);
                real *pi = p + i * keys, *dsi = ds + i * keys;
                const size_t seen = i0 + i + 1;
                for (size_t j = 0; j < seen; j++) {
                    pi[j] = exp_fast(scale * pi[j] - log_sum);
                    dsi[j] = scale * pi[j] * (dsi[j] - along);
                }
                memset(pi + seen, 0, (keys - seen) * sizeof(real));
                memset(dsi + seen, 0, (keys - seen) * sizeof(real));
            }
            matmul_tn(dkv_h + dn, H * dkv, p, keys, d_o, H * dv, rows, dv, keys, add);
            matmul_nn(dq_h, H * dq, ds, keys, plain(kv, H * dkv), rows, dn, keys, 0);
            matmul_nn(dq_h + dn, H * dq, ds, keys, plain(k_rot, R + dr), rows, dr, keys, 0);
            matmul_tn(dkv_h, H * dkv, ds, keys, q, H * dq, rows, dn, keys, add);
            matmul_tn(dk_rot, H * dr, ds, keys, q + dn, H * dq, rows, dr, keys, add);
        }
    }
}

// g->dx (T, d), of the layer's input, from g->dmid, in whose memory it is made (the two change
// places, and g->dmid means nothing afterwards): mid = x + attention(rmsnorm(x)), read upwards.
// Normed inputs were not kept and are computed again.
static void attention_backward(const Model *m, const Weights *dw, State *s, Gradients *g, size_t l,
                               size_t B, size_t n) {
    const Config *c = &m->config;
    const Layer *w = &m->w.layer[l], *dl = &dw->layer[l];
    const LayerState *a = &s->layer[l];
    const size_t T = B * n, d = c->hidden_size, H = c->num_attention_heads,
        dn = c->qk_nope_head_dim, dr = c->qk_rope_head_dim, dv = c->v_head_dim,
        r = c->q_lora_rank, R = c->kv_lora_rank, dkv = dn + dv;
    const real eps = (real)c->rms_norm_eps, latent_eps = (real)1e-6;

    linear_backward(g->dheads, &dl->o_proj, &dl->o_bias, g->dmid, a->heads, &w->o_proj, 0, T, 0);
    attend_backward(c, s, a, g, B, n);
    // kv = kv_b_proj c, whose rows lie in the latent at stride R + dr
    matmul_nn(g->dlatent, R, g->dkv, H * dkv, matrix(&w->kv_b_proj, 0, 0), T, R, H * dkv, 0);
    matmul_tn(dl->kv_b_proj.data, R, g->dkv, H * dkv, a->latent, R + dr, T, R, H * dkv, 1);
    SHARED(T * H * dr, for (size_t t = 0; t < T; t++) {
        real *dk = g->dkv_a + t * (R + dr) + R;
        memset(dk, 0, dr * sizeof(real));
        for (size_t h = 0; h < H; h++) {
            for (size_t i = 0; i < dr; i++) dk[i] += g->dk_rot[(t * H + h) * dr + i];
            rope(g->dq + (t * H + h) * (dn + dr) + dn, s, t % n, dr, -1);
        }
        rope(dk, s, t % n, dr, -1);         // a rotation's transpose is the rotation back
    })
    rmsnorm_backward(g->dkv_a, R + dr, &dl->kv_a_layernorm, g->dlatent, R, a->inverse_kv,
                     a->kv_a, R + dr, &w->kv_a_layernorm, T, 0);
    if (r) {
        rmsnorm(s->norm, r, NULL, a->q_a, r, &w->q_a_layernorm, T, latent_eps);
        linear_backward(g->dlatent_q, &dl->q_b_proj, NULL, g->dq, s->norm, &w->q_b_proj, 0, T, 0);
        rmsnorm_backward(g->dq_a, r, &dl->q_a_layernorm, g->dlatent_q, r, a->inverse_q,
                         a->q_a, r, &w->q_a_layernorm, T, 0);
    }
    rmsnorm(s->norm, d, NULL, a->x, d, &w->input_layernorm, T, eps);
    if (r)
        linear_backward(g->dnorm, &dl->q_a_proj, &dl->q_a_bias, g->dq_a, s->norm, &w->q_a_proj, 0,
                        T, 0);
    else
        linear_backward(g->dnorm, &dl->q_proj, NULL, g->dq, s->norm, &w->q_proj, 0, T, 0);
    linear_backward(g->dnorm, &dl->kv_a_proj, &dl->kv_a_bias, g->dkv_a, s->norm, &w->kv_a_proj, 0,
                    T, 1);
    real *dx = g->dmid;                     // what x + attention(x) passes on as it is
    rmsnorm_backward(dx, d, &dl->input_layernorm, g->dnorm, d, a->inverse_x,
                     a->x, d, &w->input_layernorm, T, 1);
    g->dmid = g->dx;
    g->dx = dx;
}

// ---- [6] backward of the chain ------------------------------------------------------------------
// Mirrors [10] in coe.c.

// act = weight silu(g) u and, for a the gradient of act before the weight was on it,
//     du = weight a silu(g),   dg = weight a u silu'(g),   dweight = a . silu(g) u
//     silu'(g) = s + g s (1 - s),   s = sigmoid(g)
// for a row of f numbers and its weight; weight and dweight may be NULL, for 1.
// `restrict`: without the promise that nothing overlaps, the loop would not be vectorised.
WIDE static void swiglu_backward(real *restrict dg, real *restrict du, real *restrict dweight,
                                 real *restrict act, const real *restrict a, const real *restrict g,
                                 const real *restrict u, const real *weight, size_t f) {
    const real k = weight ? *weight : 1;
    for (size_t i = 0; i < f; i++) {
        const real s = sigmoid(g[i]), silu = g[i] * s, d = k * a[i];
        act[i] = silu * u[i];
        du[i] = d * silu;
        dg[i] = d * u[i] * (s + silu * (1 - s));
    }
    if (!weight) return;
    *dweight = dot(a, act, f);
    for (size_t i = 0; i < f; i++) act[i] *= k;
}

// One swiglu network: y = weight * down(act), act = silu(g) u, g = gate x, u = up x, where weight
// (n) is the routing weight of each row, or NULL for 1. With a = dy down, the gradient of act
// before the weight is on it:
//     dweight = dy . down(act) = a . act
//     dact = weight a,     ddown += dy^T (weight act)
//     dx = dg gate + du up (+= with `add`),   dgate += dg^T x,   dup += du^T x
// dx, dy, x (n, d); gate = gate x and up = up x (n, f) were kept; act, dact, dg, du (n, f) are
// scratch; copy e of the stacks w[3], dw[3] = gate, up, down.
static void feed_forward_backward(real *dx, real *dweight, const Tensor *dw[3], real *act,
                                  real *dact, real *dg, real *du, const real *dy, const real *x,
                                  const real *weight, const real *gate, const real *up,
                                  const Tensor *w[3], size_t e, size_t n, int add) {
    const size_t f = w[0]->rows, d = w[0]->cols;
    matmul_nn(dact, f, dy, d, matrix(w[2], e, 0), n, f, d, 0);
    SHARED(n * f, for (size_t t = 0; t < n; t++) {
        swiglu_backward(dg + t * f, du + t * f, weight ? dweight + t : NULL, act + t * f,
                        dact + t * f, gate + t * f, up + t * f, weight ? weight + t : NULL, f);
    })
    linear_backward(NULL, dw[2], NULL, dy, act, w[2], e, n, 0);
    linear_backward(dx, dw[0], NULL, dg, x, w[0], e, n, add);
    linear_backward(dx, dw[1], NULL, du, x, w[1], e, n, 1);
}

// The load-balancing loss of one router call, and its gradient into dscore (T, E), which it
// overwrites. Over a group of tokens (a sequence with seq_aux, else all B sequences of n), with N
// tokens in it:
//     alpha * sum_e count_e E / (N K) * mean_t s_te,     d/ds_te = alpha count_e E / (N K) / N
// The mean over sequences divides by B. `share` is the micro-batch's part of the batch. How often
// an expert was chosen, count_e, is a constant: a choice has no gradient.
static double balance(real *dscore, const Config *c, const Iteration *i, size_t B, size_t n,
                      double share) {
    const size_t E = c->n_routed_experts, K = c->num_experts_per_tok,
        groups = c->seq_aux ? B : 1, N = B * n / groups;
    double loss = 0;
    real factor[E];
    for (size_t group = 0; group < groups; group++) {
        memset(factor, 0, E * sizeof(real));
        for (size_t k = group * N * K; k < (group + 1) * N * K; k++) factor[i->expert[k]]++;
        double per_count = share * c->aux_loss_alpha * (double)E / (double)(N * K) / (double)N /
                           (double)groups;
        for (size_t e = 0; e < E; e++) factor[e] *= (real)per_count;
        for (size_t t = group * N; t < (group + 1) * N; t++) {
            memcpy(dscore + t * E, factor, E * sizeof(real));
            loss += (double)dot(factor, i->score + t * E, E);
        }
    }
    return loss;
}

// The router: dx (T, d) += and its weights' gradient, from g->dweight (T, K). The choice itself has
// no gradient; the scores have one where they became weights. With S the sum of the chosen scores,
//     weight_k = factor s_k:      ds_k = factor dweight_k
//     weight_k = s_k / S:         ds_k = (dweight_k - sum_j dweight_j weight_j) / S
// and through the balancing loss, which is returned.
static double route_backward(const Config *c, Gradients *g, real *dx, const Iteration *i,
                             const Layer *w, const Layer *dl, size_t t, size_t B, size_t n,
                             double share) {
    const size_t T = B * n, d = c->hidden_size, E = c->n_routed_experts, K = c->num_experts_per_tok;
    phase(BACKWARD + ROUTER);
    const double loss = balance(g->dscore, c, i, B, n, share);
    const int normalised = c->norm_topk_prob && K > 1;
    const real factor = (real)c->routed_scaling_factor;
    SHARED(T * E, for (size_t k = 0; k < T; k++) {
        const real *score = i->score + k * E, *weight = i->weight + k * K;
        const real *dweight = g->dweight + k * K;
        const int *expert = i->expert + k * K;
        real *dscore = g->dscore + k * E, along = 0, total = (real)1e-20;
        for (size_t j = 0; normalised && j < K; j++) {
            along += dweight[j] * weight[j];
            if (weight[j] != 0) total += score[expert[j]];      // 0: its group was not allowed
        }
        for (size_t j = 0; j < K; j++)
            if (weight[j] != 0)
                dscore[expert[j]] += normalised ? (dweight[j] - along) / total
                                                : dweight[j] * factor;
        softmax_backward(dscore, score, E);
    })
    const size_t router = c->use_igate ? t : 0;
    matmul_nn(dx, d, g->dscore, E, matrix(&w->gate, router, 0), T, d, E, 1);
    matmul_tn(at(&dl->gate, router), d, g->dscore, E, i->x, d, T, d, E, 1);
    phase(BACKWARD + EXPERTS);
    return loss;
}

// dx (T, d) += of the input of iteration t of layer l, from dy (T, d), of ffn_t's output:
// ffn_forward read upwards. Returns the balancing loss.
static double ffn_backward(const Model *m, const Weights *dw, State *s, Gradients *g, real *dx,
                           const real *dy, size_t l, size_t t, size_t B, size_t n, double share) {
    const Config *c = &m->config;
    const Layer *w = &m->w.layer[l], *dl = &dw->layer[l];
    const Iteration *i = &s->layer[l].iteration[t];
    const size_t T = B * n, d = c->hidden_size, E = c->n_routed_experts,
        K = c->num_experts_per_tok, f = c->moe_intermediate_size;
    const int moe = is_moe(c, l);
    if (!moe || c->n_shared_experts) {
        const Tensor *w3[]  = { moe ? &w->shared_gate_proj : &w->dense_gate_proj,
                                moe ? &w->shared_up_proj : &w->dense_up_proj,
                                moe ? &w->shared_down_proj : &w->dense_down_proj };
        const Tensor *dw3[] = { moe ? &dl->shared_gate_proj : &dl->dense_gate_proj,
                                moe ? &dl->shared_up_proj : &dl->dense_up_proj,
                                moe ? &dl->shared_down_proj : &dl->dense_down_proj };
        feed_forward_backward(dx, NULL, dw3, s->act, g->dact, g->dg, g->du, dy, i->x, NULL,
                              i->shared_g, i->shared_u, w3, 0, T, 1);
    }
    if (!moe) return 0;
    const Tensor *w3[]  = { &w->experts_gate_proj, &w->experts_up_proj, &w->experts_down_proj };
    const Tensor *dw3[] = { &dl->experts_gate_proj, &dl->experts_up_proj, &dl->experts_down_proj };
    for (size_t k = 0; k < T * K; k++) g->row_weight[i->slot[k]] = i->weight[k];
    Work work = { .n = E };
    #pragma omp parallel
    for (size_t e; (e = next_piece(&work)) < E; ) {
        const size_t first = (size_t)i->start[e], rows = (size_t)i->start[e + 1] - first;
        if (!rows) continue;
        for (size_t k = first; k < first + rows; k++) {
            memcpy(s->gathered + k * d, i->x + (size_t)i->token[k] * d, d * sizeof(real));
            memcpy(g->dgrouped + k * d, dy + (size_t)i->token[k] * d, d * sizeof(real));
        }
        feed_forward_backward(g->dinput + first * d, g->drow_weight + first, dw3,
                              s->act + first * f, g->dact + first * f, g->dg + first * f,
                              g->du + first * f, g->dgrouped + first * d, s->gathered + first * d,
                              g->row_weight + first, i->g + first * f, i->u + first * f,
                              w3, e, rows, 0);
    }
    SHARED(T * K * d, for (size_t k = 0; k < T; k++) {
        for (size_t j = k * K; j < (k + 1) * K; j++) {
            const real *from = g->dinput + (size_t)i->slot[j] * d;
            for (size_t e = 0; e < d; e++) dx[k * d + e] += from[e];
            g->dweight[j] = g->drow_weight[i->slot[j]];
        }
    })
    return route_backward(c, g, dx, i, w, dl, t, B, n, share);
}

// g->dmid (T, d) from g->dx, of the layer's output: chain_forward read upwards. With
// y' = ffn(y) + y the gradient reaches y through both; with y' = y + v * ffn(y) (coe_weights v):
// dffn = v dy', dv += dy' ffn(y). Returns the balancing loss of the layer.
static double chain_backward(const Model *m, const Weights *dw, State *s, Gradients *g, size_t l,
                             size_t B, size_t n, double share) {
    const Config *c = &m->config;
    const Layer *w = &m->w.layer[l], *dl = &dw->layer[l];
    const LayerState *a = &s->layer[l];
    const size_t T = B * n, d = c->hidden_size, C = is_moe(c, l) ? (size_t)c->inner_iter : 1;
    double loss = 0;
    if (c->outer_residual) memcpy(g->dmid, g->dx, T * d * sizeof(real));
    for (size_t t = C; t-- > 0; ) {
        const Iteration *i = &a->iteration[t];
        const int upcycled = m->coe_weights && t > 0;
        const int inner = upcycled || (!m->coe_weights && c->inner_residual);
        const real *v = upcycled ? at(&w->coe_weights, t - 1) : NULL;
        real *dv = upcycled ? at(&dl->coe_weights, t - 1) : NULL;
        SHARED(T * d, for (size_t block = 0; block < d; block += COLUMN_BLOCK) {
            const size_t end = block + COLUMN_BLOCK < d ? block + COLUMN_BLOCK : d;
            for (size_t k = 0; k < T; k++)
                for (size_t e = block; e < end; e++) {
                    const real dy = g->dx[k * d + e];
                    g->dffn[k * d + e] = v ? v[e] * dy : dy;
                    if (dv) dv[e] += dy * i->ffn[k * d + e];
                }
        })
        if (!inner) memset(g->dx, 0, T * d * sizeof(real));
        loss += ffn_backward(m, dw, s, g, g->dx, g->dffn, l, t, B, n, share);
    }
    rmsnorm_backward(g->dmid, d, &dl->post_attention_layernorm, g->dx, d, a->inverse_mid,
                     a->mid, d, &w->post_attention_layernorm, T, (int)c->outer_residual);
    return loss;
}

// ---- [7] backward -------------------------------------------------------------------------------

// The sum over all rows of s->final of the cross entropy against targets (T), times `scale`, and
// with dw given the gradient of that: into lm_head and, as g->dnorm (T, d), into s->final. For
// logits z and probabilities p = softmax(z),
//     loss = log sum_j e^(z_j) - z_target,    dloss/dz_j = p_j - [j = target]
// A block of rows at a time: the logits of all rows would dwarf the model.
static double loss_of(const Model *m, const Weights *dw, State *s, Gradients *g,
                      const int *targets, size_t T, double scale) {
    const size_t V = m->config.vocab_size, d = m->config.hidden_size, ld = logits_stride(V);
    const Matrix lm_head = matrix(m->w.lm_head, 0, 0);
    double total = 0;
    for (size_t first = 0; first < T; first += g->loss_rows) {
        const size_t rows = T - first < g->loss_rows ? T - first : g->loss_rows;
        double row_loss[rows];
        phase(HEAD);
        const real *x = s->final + first * d;
        matmul_nt(g->logits, ld, x, d, lm_head, rows, d, V, 0);
        SHARED(rows * V, for (size_t t = 0; t < rows; t++) {
            real *z = g->logits + t * ld;
            row_loss[t] = cross_entropy(z, V, targets[first + t]);      // z is p now
            z[targets[first + t]] -= 1;
            for (size_t i = 0; dw && i < V; i++) z[i] *= (real)scale;
        })
        for (size_t t = 0; t < rows; t++) total += row_loss[t];
        phase(BACKWARD + HEAD);
        if (!dw) continue;
        matmul_nn(g->dnorm + first * d, d, g->logits, ld, lm_head, rows, d, V, 0);
        matmul_tn(dw->lm_head->data, d, g->logits, ld, x, d, rows, d, V, 1);
    }
    return total * scale;
}

typedef struct { double loss, aux; } Loss;

// Adds the gradient of (cross entropy * scale + balancing loss * share) for tokens and targets
// (B, n) to dw: forward(), then forward() read upwards. Returns both losses.
static Loss backward(const Model *m, const Weights *dw, State *s, Gradients *g, const int *tokens,
                     const int *targets, size_t B, size_t n, double scale, double share) {
    const Config *c = &m->config;
    const size_t d = c->hidden_size, T = B * n;
    Loss loss = { 0, 0 };
    forward(m, s, tokens, B, n, 0, T);
    loss.loss = loss_of(m, dw, s, g, targets, T, scale);
    rmsnorm_backward(g->dx, d, dw->norm, g->dnorm, d, s->inverse_out, s->out, d, m->w.norm, T, 0);
    for (size_t l = (size_t)c->num_hidden_layers; l-- > 0; ) {
        phase(BACKWARD + EXPERTS);
        loss.aux += chain_backward(m, dw, s, g, l, B, n, share);
        phase(BACKWARD + ATTENTION);
        attention_backward(m, dw, s, g, l, B, n);
    }
    phase(BACKWARD + EMBEDDING);
    for (size_t t = 0; t < T; t++) {        // embedding rows were copied: their gradients add up
        real *row = at(dw->embed_tokens, 0) + (size_t)tokens[t] * d;
        for (size_t i = 0; i < d; i++) row[i] += g->dx[t * d + i];
    }
    return loss;
}

// The norm of all n gradients. Partial sums over fixed pieces make it independent of the number of
// threads.
static double gradient_norm(const real *grad, size_t n) {
    enum { PIECE = 1 << 14, PIECES = 256 };
    double total = 0;
    for (size_t start = 0; start < n; start += (size_t)PIECE * PIECES) {
        double part[PIECES];
        const size_t left = (n - start + PIECE - 1) / PIECE, pieces = left < PIECES ? left : PIECES;
        #pragma omp parallel for
        for (size_t k = 0; k < pieces; k++) {
            const size_t from = start + k * PIECE, to = from + PIECE < n ? from + PIECE : n;
            part[k] = (double)dot(grad + from, grad + from, to - from);
        }
        for (size_t k = 0; k < pieces; k++) total += part[k];
    }
    return sqrt(total);
}

// ---- [8] AdamW ----------------------------------------------------------------------------------

// The learning rate of a step, counted from 0: warm-up reaches the full one in its last step.
static double learning_rate(const Recipe *r, int64_t step) {
    const double warmup = r->warmup_steps >= 0 ? (double)r->warmup_steps
                                               : ceil(r->warmup_ratio * (double)r->max_steps);
    if ((double)step < warmup) return r->learning_rate * ((double)step + 1) / warmup;
    if (r->lr_scheduler == 0) return r->learning_rate;
    const double left = (double)r->max_steps - warmup;
    return r->learning_rate * 0.5 *
           (1 + cos(3.14159265358979324 * ((double)step - warmup) / (left > 0 ? left : 1)));
}

// One step of AdamW (arXiv 1711.05101) on all n numbers, moments m and v, gradient g times `clip`;
// step counts from 0:
//     m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2
//     w = w - lr weight_decay w - lr m / (1 - b1^(step+1)) / (sqrt(v / (1 - b2^(step+1))) + eps)
// It leaves 0 in g, where the next step adds up its gradients: g is in the cache here.
static void adamw(real *restrict w, real *restrict m, real *restrict v, real *restrict g, size_t n,
                  const Recipe *r, int64_t step, double clip) {
    const double correction1 = 1 - pow(r->adam_beta1, (double)step + 1);
    const double correction2 = 1 - pow(r->adam_beta2, (double)step + 1);
    const double rate = learning_rate(r, step);
    const real b1 = (real)r->adam_beta1, c1 = (real)(1 - r->adam_beta1),
        b2 = (real)r->adam_beta2, c2 = (real)(1 - r->adam_beta2),
        keep = (real)(1 - rate * r->weight_decay), size = (real)(rate / correction1),
        root = (real)(1 / sqrt(correction2)), eps = (real)r->adam_epsilon, scale = (real)clip;
    enum { PIECE = 1 << 14 };
    #pragma omp parallel for
    for (size_t from = 0; from < n; from += PIECE)
        for (size_t i = from; i < (from + PIECE < n ? from + PIECE : n); i++) {
            const real gi = scale * g[i];
            m[i] = b1 * m[i] + c1 * gi;
            v[i] = b2 * v[i] + c2 * gi * gi;
            w[i] = keep * w[i] - size * m[i] / ((real)sqrt(v[i]) * root + eps);
            g[i] = 0;
        }
}

// ---- [9] checkpoints ----------------------------------------------------------------------------
// A checkpoint is a model file (coe.c [5]) with a training state behind the weights: 1024 bytes
// that say how the model is trained and how far it is, then AdamW's moments m and v, laid out like
// the weights.

typedef struct {
    Model model;
    Recipe recipe;
    Job job;
    Data data;
    Weights dw;                 // the gradients, by name
    real *grad, *m, *v;         // [model.w.size] each; grad, m and v are laid out like the weights
    State state;
    Gradients g;
    int64_t step;               // steps done
    int saved;                  // there is a checkpoint of this run
    int *inputs, *targets;      // (batch_size, max_length)
    int *window;                // [max_length + 1]
    double val_loss, solved;    // the last ones measured; NAN: none
    int *chosen;                // (L, C, E) tokens that each expert got in the last step
    size_t n_chosen;
} Run;

typedef struct {
    Recipe recipe;
    int64_t step;
    uint64_t data_tokens, data_fingerprint;         // 0 for the built-in task
    char padding[1024 - sizeof(Recipe) - 3 * 8];
} TrainingState;
_Static_assert(sizeof(TrainingState) == 1024, "the training state starts with 1024 bytes");

// Writes all of `bytes`, or removes the file and ends the program: a full disk shows here, or in
// the flush and sync after it.
static void write_exactly(const void *from, size_t bytes, FILE *file, const char *path) {
    if (fwrite(from, 1, bytes, file) != bytes) {
        remove(path);
        fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    }
}

// Writes n numbers as float32.
static void write_floats(const real *from, size_t n, FILE *file, const char *path) {
    float chunk[4096];
    for (size_t i = 0; i < n; ) {
        size_t k = 0;
        for (; k < 4096 && i < n; k++) chunk[k] = (float)from[i++];
        write_exactly(chunk, k * sizeof(float), file, path);
    }
}

// Makes what was written under `temporary` the file `path`, on the disk and not only in its cache.
// Until the rename the old file is there, afterwards the new one: whenever the power fails, one of
// them is whole.
static void publish(FILE *file, const char *temporary, const char *path) {
    int bad = fflush(file);
#ifndef _WIN32
    bad |= fsync(fileno(file));
#endif
    bad |= fclose(file);
#ifdef _WIN32
    if (!bad) remove(path);             // rename does not replace there
#endif
    if (bad || rename(temporary, path)) {
        int error = errno;
        remove(temporary);
        fail(FAILED, "%s: cannot be written: %s", path, strerror(error));
    }
#ifndef _WIN32
    char folder[4096];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0; else strcpy(folder, ".");
    int directory = open(folder, O_RDONLY);
    if (directory >= 0) {           // some file systems refuse, and need not
        fsync(directory);
        close(directory);
    }
#endif
}

// Opens `path`.tmp for writing, its name in temporary[size]; publish() makes it `path`.
static FILE *open_temporary(char *temporary, size_t size, const char *path) {
#ifndef _WIN32
    struct stat info;
    if (!stat(path, &info) && !S_ISREG(info.st_mode))       // a rename would replace /dev/null
        fail(FAILED, "%s: cannot be written: is not a regular file", path);
#endif
    if ((size_t)snprintf(temporary, size, "%s.tmp", path) >= size)
        fail(FAILED, "%s: name too long", path);
    FILE *file = fopen(temporary, "wb");
    if (!file) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    return file;
}

// Writes --output: the model, how it is trained, the step, and AdamW's moments.
static void save_checkpoint(Run *run) {
    const Model *m = &run->model;
    const char *path = run->job.output;
    char temporary[4096];
    Header h = { .version = MODEL_VERSION, .files_bytes = m->files_bytes,
                 .coe_weights = m->coe_weights, .config = m->config };
    TrainingState state = { .recipe = run->recipe, .step = run->step };
    if (!run->data.built_in) {
        state.data_tokens = run->data.train.n;
        state.data_fingerprint = fingerprint(&run->data.train);
    }
    memcpy(h.magic, "COE1", 4);
    if (m->tokenizer) {
        h.tokenizer = m->tokenizer->kind;
        h.tokenizer_bytes = m->tokenizer->section_bytes;
    }
    h.state_bytes = sizeof state + 2 * 4 * m->w.size;
    h.file_bytes = sizeof h + m->files_bytes + h.tokenizer_bytes + 4 * m->w.size + h.state_bytes;
    FILE *file = open_temporary(temporary, sizeof temporary, path);
    write_exactly(&h, sizeof h, file, temporary);
    if (m->files) write_exactly(m->files, m->files_bytes + h.tokenizer_bytes, file, temporary);
    write_floats(m->weights, m->w.size, file, temporary);
    write_exactly(&state, sizeof state, file, temporary);
    write_floats(run->m, m->w.size, file, temporary);
    write_floats(run->v, m->w.size, file, temporary);
    publish(file, temporary, path);
    run->saved = 1;
}

// Takes the value of key k over from the struct `have`, which came from the file `where`, or ends
// the program if the user gave another one.
static void must_agree(const Options *table, const Key *k, const void *have, const char *where) {
    char *mine = (char *)table->base + k->offset;
    const char *theirs = (const char *)have + k->offset;
    if (table->given[k - table->keys] && memcmp(mine, theirs, 8)) {
        char text[64];
        snprintf(text, sizeof text, "%s", key_text(k, table->base));
        fail(WRONG_USAGE, "--%s is %s, but %s has %s", k->name, text, where, key_text(k, have));
    }
    memcpy(mine, theirs, 8);
}

// ---- [10] measuring -----------------------------------------------------------------------------

// The mean cross entropy over all validation windows, in file order. A stream shorter than a window
// is one of its own; NAN where there is nothing to predict.
static double validate(Run *run) {
    const Model *m = &run->model;
    State *s = &run->state;
    const Stream *val = &run->data.val;
    const size_t L = (size_t)run->recipe.max_length, n = windows(val, L), step = s->rows / L;
    double total = 0;
    if (val->n < 2) return NAN;
    if (n == 0) {
        forward(m, s, val->tokens, 1, val->n - 1, 0, val->n - 1);
        return loss_of(m, NULL, s, &run->g, val->tokens + 1, val->n - 1,
                       1.0 / (double)(val->n - 1));
    }
    int *inputs = allocate(step * L * sizeof(int), "validation windows");
    int *targets = allocate(step * L * sizeof(int), "validation windows");
    for (size_t i = 0; i < n; i += step) {
        const size_t B = n - i < step ? n - i : step;
        memcpy(inputs, val->tokens + i * L, B * L * sizeof(int));
        memcpy(targets, val->tokens + i * L + 1, B * L * sizeof(int));
        forward(m, s, inputs, B, L, 0, B * L);
        total += loss_of(m, NULL, s, &run->g, targets, B * L, 1);
    }
    release(inputs);
    release(targets);
    return total / (double)(n * L);
}

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

// ---- [11] the training run ----------------------------------------------------------------------

static volatile sig_atomic_t interrupted;

// The first SIGINT or SIGTERM lets the step finish and save; the second ends the program at once.
static void on_interrupt(int signal_number) {
    if (interrupted) _Exit(130);
    interrupted = 1;
    signal(signal_number, on_interrupt);        // some systems forget the handler once it has run
}

// Whether something done every `period` steps is due after step s (from 0), or that is the last.
static int due(int64_t period, int64_t s, int64_t last) {
    return s == last || (period && (s + 1) % period == 0);
}

// The log, ready for the line of step `step`: a resumed run keeps the lines before that. The last
// columns are the load of each of C iterations.
static FILE *open_log(const char *path, int64_t step, int64_t C) {
    char temporary[4096];
    size_t bytes = 0, keep = 0;
    char *old = NULL;
    FILE *file = step ? fopen(path, "rb") : NULL;
    if (file) {
        fclose(file);
        old = read_file(path, &bytes);
        for (size_t line = 0; keep < bytes; line++) {
            const char *newline = memchr(old + keep, '\n', bytes - keep);
            if (!newline || (line && strtoll(old + keep, NULL, 10) >= step)) break;
            keep = (size_t)(newline + 1 - old);
        }
    }
    file = open_temporary(temporary, sizeof temporary, path);
    if (keep) write_exactly(old, keep, file, temporary);
    else {
        fputs("step\tloss\taux_loss\tgrad_norm\tlr\ttokens_per_s\tval_loss\tsolved", file);
        for (int64_t t = 1; t <= C; t++) fprintf(file, "\tload_%lld", (long long)t);
        write_exactly("\n", 1, file, temporary);
    }
    publish(file, temporary, path);
    release(old);
    file = fopen(path, "ab");
    if (!file) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    return file;
}

// One line of progress on stderr: redrawn on a terminal, and every few seconds elsewhere. `last`:
// in any case, for something else is printed next.
static void show_progress(const Run *run, double loss, double rate, double tokens_per_s, int last) {
    static double shown;
    static int terminal = -1;
    if (terminal < 0) {
#ifdef _WIN32
        terminal = 0;
#else
        terminal = isatty(2);
#endif
    }
    const double now = seconds();
    if (!last && now - shown < (terminal ? 0.1 : 5)) return;
    shown = now;
    const double tokens = (double)(run->recipe.batch_size * run->recipe.max_length);
    const double left = (double)(run->recipe.max_steps - run->step) * tokens / tokens_per_s;
    fprintf(stderr, "%sstep %lld/%lld  loss %.4f  lr %.2e  %.0f tok/s  %.0f s left%s",
            terminal ? "\r" : "", (long long)run->step, (long long)run->recipe.max_steps,
            loss, rate, tokens_per_s, left, terminal && !last ? "  " : "\n");
}

// Adds to run->chosen how many tokens each expert got in what went through last.
static void count_choices(Run *run) {
    const Config *c = &run->model.config;
    const size_t E = c->n_routed_experts, C = c->inner_iter, L = c->num_hidden_layers;
    for (size_t l = 0; l < L; l++)
        for (size_t t = 0; is_moe(c, l) && t < C; t++) {
            const int *start = run->state.layer[l].iteration[t].start;
            for (size_t e = 0; e < E; e++)
                run->chosen[(l * C + t) * E + e] += start[e + 1] - start[e];
        }
}

// How unevenly iteration t shared out the tokens of the last step: those of the busiest expert over
// the mean of all experts, averaged over the layers. NAN without experts.
static double expert_load(const Run *run, size_t t) {
    const Config *c = &run->model.config;
    const size_t E = c->n_routed_experts, C = c->inner_iter, L = c->num_hidden_layers;
    double total = 0, layers = 0;
    for (size_t l = 0; l < L; l++) {
        if (!is_moe(c, l)) continue;
        const int *chosen = run->chosen + (l * C + t) * E;
        double most = 0, all = 0;
        for (size_t e = 0; e < E; e++) {
            most = chosen[e] > most ? chosen[e] : most;
            all += chosen[e];
        }
        total += most * (double)E / all;
        layers++;
    }
    return layers > 0 ? total / layers : NAN;
}

// Adds the gradient of one batch, the one at run->step, to run->grad, and counts its choices of
// experts. Returns its losses.
static Loss batch_gradient(Run *run) {
    const Recipe *r = &run->recipe;
    const size_t B = (size_t)r->batch_size, L = (size_t)r->max_length,
        at_once = run->state.rows / L;
    Loss loss = { 0, 0 };
    memset(run->chosen, 0, run->n_chosen * sizeof *run->chosen);
    next_batch(&run->data, (uint64_t)run->step, run->inputs, run->targets, run->window);
    for (size_t b = 0; b < B; b += at_once) {
        const size_t n = B - b < at_once ? B - b : at_once;
        Loss part = backward(&run->model, &run->dw, &run->state, &run->g, run->inputs + b * L,
                             run->targets + b * L, n, L,
                             1.0 / (double)(B * L), (double)n / (double)B);
        loss.loss += part.loss;
        loss.aux += part.aux;
        count_choices(run);
    }
    return loss;
}

// One step: gradients of the batch in micro-batches, clipping, AdamW. Returns the losses; *norm is
// the gradient's before clipping. Ends the program where one of them is not finite.
static Loss train_step(Run *run, double *norm) {
    const Recipe *r = &run->recipe;
    const size_t size = run->model.w.size;
    phase(REST);
    const Loss loss = batch_gradient(run);
    phase(REST);
    *norm = gradient_norm(run->grad, size);
    if (!isfinite(loss.loss) || !isfinite(*norm))
        fail(FAILED, "step %lld: the loss is %g and the gradient's norm %g, must be finite; %s%s",
             (long long)run->step, loss.loss, *norm,
             run->saved ? "the last good checkpoint is " : "nothing was saved yet",
             run->saved ? run->job.output : "");
    const int too_long = r->max_grad_norm > 0 && *norm > r->max_grad_norm;
    const double clip = too_long ? r->max_grad_norm / (*norm + 1e-6) : 1;
    phase(ADAMW);
    adamw(run->model.weights, run->m, run->v, run->grad, size, r, run->step, clip);
    phase(IDLE);
    run->step++;
    return loss;
}

// Validates, and on the built-in task solves problems: all of them at the end, a quarter on the
// way. The results go to run->val_loss, run->solved and stderr.
static void measure(Run *run, int last) {
    size_t problems = (size_t)run->job.eval_problems;
    if (!last) problems = (problems + 3) / 4;
    run->val_loss = validate(run);
    run->solved = run->data.built_in && problems ? solve(run, problems) : NAN;
    fprintf(stderr, "step %lld: val_loss %.4f", (long long)run->step, run->val_loss);
    if (!isnan(run->solved))
        fprintf(stderr, ", solved %.1f %% of %zu held-out problems", 100 * run->solved, problems);
    fputc('\n', stderr);
}

// A log column: the number, or nothing where it was not measured.
static void log_number(FILE *log, double x) {
    char text[DECIMAL_TEXT];
    fprintf(log, "\t%s", isnan(x) ? "" : decimal(text, x));
}

// What --profile prints, on stderr: seconds a step and share of each phase, over `steps` steps.
static void print_profile(int64_t steps) {
    static const char *const names[] = { "embedding", "attention", "router", "experts", "head" };
    double all = 0;
    for (int p = 0; p < IDLE; p++) all += phase_seconds[p];
    fprintf(stderr, "profile of %lld step%s %14s %7s\n", (long long)steps, steps == 1 ? "" : "s",
            "s a step", "%");
    for (int p = 0; p <= IDLE; p++) {
        const double s = p < IDLE ? phase_seconds[p] : all;
        fprintf(stderr, "%-12s%-12s %10.6f %7.2f\n",
                p < ADAMW ? names[p % BACKWARD] : p == ADAMW ? "AdamW" : p == REST ? "rest" : "all",
                p < BACKWARD ? "forward" : p < ADAMW ? "backward" : "",
                s / (double)steps, 100 * s / all);
    }
}

// Trains from run->step to max_steps, with reports and checkpoints on the way. Returns the exit
// code.
static int train(Run *run) {
    const Recipe *r = &run->recipe;
    const Job *job = &run->job;
    FILE *log = *job->log ? open_log(job->log, run->step, run->model.config.inner_iter)
                           : NULL;
    const int64_t first = run->step;
    const int finished = first >= r->max_steps;
    int64_t profiled = 0;
    while (run->step < r->max_steps && !interrupted) {
        const int64_t s = run->step, last = r->max_steps - 1;
        const double start = seconds(), rate = learning_rate(r, s);
        double norm;
        profiling = job->profile && (s > first || s == last);   // the first step also gets memory
        Loss loss = train_step(run, &norm);
        profiled += profiling;
        profiling = 0;
        const double tokens_per_s = (double)(r->batch_size * r->max_length) / (seconds() - start);
        const int measured = due(job->eval_steps, s, last);
        show_progress(run, loss.loss, rate, tokens_per_s, measured);
        if (measured) measure(run, s == last);
        if (due(job->sample_steps, s, last)) show_sample(run);
        if (log) {
            fprintf(log, "%lld", (long long)s);
            const double columns[] = { loss.loss, loss.aux, norm, rate, tokens_per_s,
                                       measured ? run->val_loss : NAN,
                                       measured ? run->solved : NAN };
            for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
                log_number(log, columns[i]);
            for (int64_t t = 0; t < run->model.config.inner_iter; t++)
                log_number(log, expert_load(run, (size_t)t));
            fputc('\n', log);
            if (fflush(log)) fail(FAILED, "%s: cannot be written: %s", job->log, strerror(errno));
        }
        if (profiled && (s == last || interrupted)) print_profile(profiled);
        if (due(job->save_steps, s, last) || interrupted) save_checkpoint(run);
    }
    if (log) fclose(log);
    if (run->step < r->max_steps) {
        fprintf(stderr, "train: interrupted after step %lld; ./train --resume %s goes on\n",
                (long long)run->step, job->output);
        return 130;
    }
    if (finished) measure(run, 1);
    char text[DECIMAL_TEXT];
    if (!isnan(run->val_loss)) printf("val_loss %s\n", decimal(text, run->val_loss));
    if (!isnan(run->solved)) printf("solved %s\n", decimal(text, run->solved));
    flush_stdout();
    return 0;
}

// Takes the tokenizer of the model file --tokenizer, and what of the config goes with it, unless
// the user gave that. `fresh`: the vocabulary's size too.
static void take_tokenizer(Run *run, const Options *tables, int fresh) {
    Model *m = &run->model, from = model_open(run->job.tokenizer, 0, NULL, NULL);
    if (!from.tokenizer) fail(FAILED, "%s: has no tokenizer", run->job.tokenizer);
    m->tokenizer = from.tokenizer;
    m->files = from.files;
    m->files_bytes = from.files_bytes;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        if (tables[CONFIG_TABLE].given[i]) continue;
        if (strstr(k->name, "s_token") || !strcmp(k->name, "chat_template") ||
            (fresh && !strcmp(k->name, "vocab_size")))
            memcpy((char *)&m->config + k->offset, (char *)&from.config + k->offset, 8);
    }
    if (m->config.vocab_size < m->tokenizer->n_tokens)
        fail(WRONG_USAGE, "vocab_size is %lld, must be at least %u for the tokenizer of %s",
             (long long)m->config.vocab_size, m->tokenizer->n_tokens, run->job.tokenizer);
}

// Ends the program unless --tokenizer is the one that the resumed model has.
static void check_resumed_tokenizer(const Run *run) {
    const Model *m = &run->model;
    Model from = model_open(run->job.tokenizer, 0, NULL, NULL);
    const Tokenizer *mine = m->tokenizer, *other = from.tokenizer;
    int same = !mine == !other && from.files_bytes == m->files_bytes;
    if (same && mine)
        same = mine->kind == other->kind && mine->section_bytes == other->section_bytes;
    if (!same || memcmp(from.files, m->files,
                        m->files_bytes + (mine ? mine->section_bytes : 0)))
        fail(WRONG_USAGE, "--tokenizer %s is not the tokenizer of %s", run->job.tokenizer,
             run->job.resume);
    model_free(&from);
}

// A fresh model's tokenizer: bytes, where its vocabulary has room for them.
static void choose_tokenizer(Run *run, const Options *tables) {
    Config *c = &run->model.config;
    if (c->vocab_size >= BYTE_TOKENS)
        run->model.tokenizer = tokenizer_new(BYTES, NULL, 0, "options", c->vocab_size);
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        if (!run->model.tokenizer && !tables[CONFIG_TABLE].given[i] &&
            strstr(k->name, "s_token_id"))
            key_parse(k, c, "null");
    }
}

// Takes a checkpoint's model, recipe, step and moments. What the user said otherwise must agree,
// except how far to go. Returns its training state, for the data to be compared.
static TrainingState resume(Run *run, const Options *tables) {
    const char *path = run->job.resume;
    FILE *file;
    uint64_t bytes;
    TrainingState state;
    Model m = model_open(path, 1, &file, &bytes);
    if (bytes != sizeof state + 2 * 4 * m.w.size)
        fail(FAILED, "%s: has no training state; --init starts a new run from its weights", path);
    read_exactly(&state, sizeof state, file, path);
    check_ranges(recipe_keys, RECIPE_KEYS, &state.recipe, path, FAILED);
    if (state.step < 0 || state.step > 1000000000000)
        fail(FAILED, "%s: step is %lld, must be 0..10^12", path, (long long)state.step);
    Config mine = run->model.config;
    Options config_table = tables[CONFIG_TABLE];
    config_table.base = &mine;
    for (int i = 0; i < CONFIG_KEYS; i++)
        must_agree(&config_table, &config_keys[i], &m.config, path);
    for (int i = 0; i < RECIPE_KEYS; i++) {
        const Key *k = &recipe_keys[i];
        if (!strcmp(k->name, "max_steps") && tables[RECIPE_TABLE].given[i]) continue;
        must_agree(&tables[RECIPE_TABLE], k, &state.recipe, path);
    }
    run->model = m;
    if (*run->job.tokenizer) check_resumed_tokenizer(run);
    run->saved = 1;
    run->step = state.step;
    run->m = allocate(product(m.w.size, sizeof(real)), "AdamW's first moments");
    run->v = allocate(product(m.w.size, sizeof(real)), "AdamW's second moments");
    read_floats(run->m, m.w.size, file, path);
    read_floats(run->v, m.w.size, file, path);
    fclose(file);
    return state;
}

// Takes the model of --init. Options may change what does not change the meaning of its weights.
static void init_from(Run *run, const Options *tables) {
    static const char *const free_keys[] = {
        "aux_loss_alpha", "seq_aux", "max_position_embeddings", "initializer_range", "temperature",
        "top_k", "top_p", "min_p", "repetition_penalty", "torch_dtype", "add_bos_token",
        "chat_template",
    };
    Model m = model_open(run->job.init, 1, NULL, NULL);
    Config mine = run->model.config;
    Options table = tables[CONFIG_TABLE];
    table.base = &mine;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        int is_free = 0;
        for (size_t j = 0; j < sizeof free_keys / sizeof *free_keys; j++)
            is_free |= !strcmp(k->name, free_keys[j]);
        if (is_free && table.given[i])
            memcpy((char *)&m.config + k->offset, (char *)&mine + k->offset, 8);
        else must_agree(&table, k, &m.config, run->job.init);
    }
    run->model = m;
    if (*run->job.tokenizer) take_tokenizer(run, tables, 0);
    config_check(&run->model.config, "options", WRONG_USAGE);
}

// Opens the training and validation data. Fails where they do not make a single batch.
static void open_data(Run *run) {
    const Model *m = &run->model;
    Data *data = &run->data;
    const size_t L = (size_t)run->recipe.max_length, B = (size_t)run->recipe.batch_size;
    data->recipe = &run->recipe;
    data->tokenizer = m->tokenizer;
    data->eos = (int)m->config.eos_token_id;
    data->built_in = !*run->job.data;
    if (data->built_in && (!m->tokenizer || data->eos < 0))
        fail(FAILED, "the built-in task is text, but the model has no tokenizer or no "
             "eos_token_id: give token files with --data");
    if (data->built_in) data->val = task_validation(data);
    else data->train = read_stream(m, run->job.data);
    if (*run->job.val) data->val = read_stream(m, run->job.val);
    else if (!data->built_in)
        data->val = split_stream(&data->train, data->eos, (int)run->recipe.sequential);
    if (!data->built_in && windows(&data->train, L) < B)
        fail(FAILED, "%s: %zu tokens make %zu windows of %zu, a batch needs %zu: "
             "make --batch_size or --max_length smaller",
             run->job.data, data->train.n, windows(&data->train, L), L, B);
}

// Prints n documents of a stream, or that many problems of the built-in task, each followed by a
// line <|endoftext|>.
static void show_documents(const Run *run, const Stream *s, int64_t n, int held_out) {
    const Recipe *r = &run->recipe;
    char problem[TASK_MAX];
    for (int64_t i = 0; run->data.built_in && i < n; i++) {
        task_problem(problem, (uint64_t)r->seed, (uint64_t)i, (int)r->level, held_out);
        printf("%s%s\n", problem, EOS_TEXT);
    }
    for (size_t i = 0, line = 1; i < s->n && n > 0 && !run->data.built_in; i++) {
        const int id = s->tokens[i];
        if (id == run->data.eos) {
            printf("%s%s\n", line ? "" : "\n", EOS_TEXT);
            n--;
            line = 1;
            continue;
        }
        if (run->model.tokenizer) {
            size_t bytes;
            const char *text = decode(run->model.tokenizer, id, &bytes);
            fwrite(text, 1, bytes, stdout);
            if (bytes) line = text[bytes - 1] == '\n';
        } else {
            printf("%d ", id);
            line = 0;
        }
    }
}

// A new model, as the options describe it, still without weights; its context is at least a window
// long.
static void fresh_model(Run *run, const Options *tables) {
    Model *m = &run->model;
    Config *c = &m->config;
    const unsigned char *given = tables[CONFIG_TABLE].given;
    const int context_given = given[offsetof(Config, max_position_embeddings) / 8];
    if (!context_given && c->max_position_embeddings < run->recipe.max_length)
        c->max_position_embeddings = run->recipe.max_length;
    if (*run->job.tokenizer) take_tokenizer(run, tables, 1);
    else choose_tokenizer(run, tables);
    config_check(c, "options", WRONG_USAGE);
    m->w = weights_layout(c, 0, F32);           // make_room() gives them memory and values
}

// Ends the program unless the data is what the checkpoint of --resume was trained on.
static void check_resumed_data(const Run *run, const TrainingState *resumed) {
    const Job *job = &run->job;
    const Stream *data = &run->data.train;
    const int built_in = run->data.built_in;
    if (!built_in != (resumed->data_tokens != 0))
        fail(FAILED, "%s was trained on %s: %s --data", job->resume,
             built_in ? "a file" : "the built-in task", built_in ? "give it with" : "leave out");
    if (!built_in && (resumed->data_tokens != data->n ||
                      resumed->data_fingerprint != fingerprint(data)))
        fail(FAILED, "%s: is not the data that %s was trained on (%zu tokens, there %llu)",
             job->data, job->resume, data->n, (unsigned long long)resumed->data_tokens);
}

// Reads options and files until everything about the run is settled: recipe, model and data.
static void prepare(Run *run, const Options *tables) {
    const Job *job = &run->job;
    TrainingState resumed = { 0 };
    if (*job->init && *job->resume)
        fail(WRONG_USAGE, "--init and --resume: only one of them can be given");
    apply_preset(tables, *job->init ? paper_recipe : presets[job->model]);
    if (job->model == 2 && !*job->init) apply_preset(tables, paper_recipe);
    if (*job->resume) resumed = resume(run, tables);
    else if (*job->init) init_from(run, tables);
    else fresh_model(run, tables);
    const int64_t longest = run->model.config.max_position_embeddings;
    if (run->recipe.max_length > longest)
        fail(WRONG_USAGE, "--max_length is %lld, must be 2..%lld (max_position_embeddings)",
             (long long)run->recipe.max_length, (long long)longest);
    open_data(run);
    if (*job->resume) check_resumed_data(run, &resumed);
}

// Prints what training will take, by kind, with `rows` tokens at once. Fails if the machine has
// less: it would go on, but on its disk.
static void check_memory(const Run *run, size_t rows) {
    const Config *c = &run->model.config;
    const size_t L = (size_t)run->recipe.max_length;
    const double numbers = 1e-6 * sizeof(real) * (double)run->model.w.size;
    State s = { .rows = rows, .context = L, .keep = to_keep(&run->model) };
    Gradients g = { 0 };
    Arena kept = { 0 }, other = { 0 };
    state_layout(&s, c, &kept);
    gradients_layout(&g, c, rows, L, &other);
    const double activations = 1e-6 * ((double)kept.used + (double)other.used);
    fprintf(stderr, "memory: weights %.1f MB, gradients %.1f MB, moments %.1f MB, "
            "activations %.1f MB\n", numbers, numbers, 2 * numbers, activations);
#ifdef _SC_PHYS_PAGES
    const double there = 1e-6 * (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (4 * numbers + activations > there)
        fail(FAILED, "training takes %.1f MB of memory, this machine has %.1f MB: a smaller model, "
             "--micro_batch_size or --max_length takes less", 4 * numbers + activations, there);
#endif
}

// Memory for everything that training needs, the weights of a new model among it, and the place in
// the data that belongs to run->step.
static void make_room(Run *run) {
    Model *m = &run->model;
    Recipe *r = &run->recipe;
    const size_t B = (size_t)r->batch_size, L = (size_t)r->max_length;
    const int in_parts = r->micro_batch_size && r->micro_batch_size < r->batch_size;
    const size_t at_once = in_parts ? (size_t)r->micro_batch_size : B;
    check_memory(run, product(at_once, L));
    if (!m->weights) {
        m->weights = allocate(product(m->w.size, sizeof(real)), "the weights");
        weights_bind(&m->w, m->weights);
        weights_init(m, (uint64_t)r->seed);
    }
    run->dw = weights_layout(&m->config, m->coe_weights, F32);
    run->grad = allocate(product(m->w.size, sizeof(real)), "the gradients");
    weights_bind(&run->dw, run->grad);
    if (!run->m) run->m = allocate(product(m->w.size, sizeof(real)), "AdamW's first moments");
    if (!run->v) run->v = allocate(product(m->w.size, sizeof(real)), "AdamW's second moments");
    run->state = state_new(&m->config, product(at_once, L), L, to_keep(m));
    run->g = gradients_new(&m->config, at_once * L, L);
    run->inputs = allocate(product(B * L, sizeof(int)), "a batch");
    run->targets = allocate(product(B * L, sizeof(int)), "a batch");
    run->window = allocate((L + 1) * sizeof(int), "a window");
    run->n_chosen = product((size_t)m->config.num_hidden_layers,
                            product((size_t)m->config.inner_iter,
                                    (size_t)m->config.n_routed_experts));
    run->chosen = allocate(product(run->n_chosen, sizeof(int)), "the choices of experts");
    for (int64_t i = 0; run->data.built_in && i < run->step * r->batch_size; i++)
        next_made_window(&run->data, run->window);
}

// Fails now, and not after hours of training, if the checkpoint cannot be written.
static void try_output(const Run *run) {
    char temporary[4096];
    fclose(open_temporary(temporary, sizeof temporary, run->job.output));
    remove(temporary);
}

// Options, then either a list (--help), documents to look at, or training.
int main(int argc, char **argv) {
    static Run run = { .val_loss = NAN, .solved = NAN };
    static unsigned char given[TABLES][CONFIG_KEYS];
    const Options tables[TABLES] = {
        { config_keys, CONFIG_KEYS, &run.model.config, given[CONFIG_TABLE] },
        { recipe_keys, RECIPE_KEYS, &run.recipe, given[RECIPE_TABLE] },
        { job_keys, JOB_KEYS, &run.job, given[JOB_TABLE] },
    };
    program = "train";
    occupy_standard_files();
    for (int i = 0; i < TABLES; i++) keys_init(tables[i].keys, tables[i].n, tables[i].base);
    parse_options(tables, TABLES, argc, argv, 1);
    if (run.job.version) { puts("train (coe.c) " COE_VERSION); return 0; }
    if (run.job.help) {
        puts("usage: ./train [options]\n"
             "Trains a Chain-of-Experts; without options a small one on built-in word problems.\n"
             "\n"
             "files and reports:");
        print_options(&tables[JOB_TABLE]);
        puts("\nthe recipe:");
        print_options(&tables[RECIPE_TABLE]);
        puts("\nthe model (keys of config.json):");
        print_options(&tables[CONFIG_TABLE]);
        return 0;
    }
    set_threads(run.job.threads);
    if (*run.job.resume && !given[JOB_TABLE][offsetof(Job, output) / 8])
        run.job.output = run.job.resume;
    prepare(&run, tables);
    if (run.job.show_data || run.job.show_val) {
        show_documents(&run, &run.data.train, run.job.show_data, 0);
        show_documents(&run, &run.data.val, run.job.show_val, 1);
        flush_stdout();
        return 0;
    }
    print_model(&run.model);
    make_room(&run);
    if (run.step < run.recipe.max_steps) try_output(&run);
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    return train(&run);
}
