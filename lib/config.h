// lib/config.h - keys: whatever has a name and a value, on the command line, in config.json and in
// a model file.
//
// A key is one row of a table: its name, what it may be, what it is otherwise, its line of --help.
// One parser, one check and one --help serve all tables: the config below, the recipe of a training
// run, and the options of each program. The value itself is a field of a struct, whose type says
// what kind of value it is.
//
// Contents: keys, values, the config's table, options, what keys must be together.
#ifndef CONFIG_H
#define CONFIG_H

// ---- keys ---------------------------------------------------------------------------------------

enum Kind { SIZE, INT, NUM, BOOL, WORD, TEXT, IDS };
#define KIND(field) _Generic((field), \
    size_t: SIZE, int64_t: INT, double: NUM, bool: BOOL, int: WORD, const char *: TEXT, \
    int64_t *: IDS)        // [MOST_ENDS] token ids, -1 behind the last

typedef struct {
    const char *name;       // the option is --name
    char letter;            // the option is -letter too; 0: none
    enum Kind kind;
    bool flag;              // a BOOL that is given without a value
    bool repeats;           // a TEXT that may be given more than once: "one;two"
    double least, most;     // the range of a SIZE, INT or NUM
    const char *words;      // WORD: what it may be, "greedy|group_limited_greedy", in the order
                            // of its enum; SIZE, INT: another name for `least`; else NULL
    const char *init;       // the value it starts with, as text; NULL: none
    const char *absent;     // the value in files from before there was this key; NULL: all have it
    const char *help;       // one line with the unit
    size_t offset;          // of the field in the table's struct
} Key;

// The beginning of a row, for a field of a struct: under the field's name, or as `text`.
#define KEY_AS(type, field, text) \
    .name = text, .kind = KIND(((type *)0)->field), .offset = offsetof(type, field)
#define KEY(type, field) KEY_AS(type, field, #field)
#define RANGE(low, high) .least = (low), .most = (high)

// ---- values -------------------------------------------------------------------------------------

// The i-th of the words "a|b|c", and its length in *length; NULL past the last.
static const char *word(const char *words, int i, size_t *length) {
    for (;; words += *length + 1, i--) {
        *length = strcspn(words, "|");
        if (i == 0) return words;
        if (!words[*length]) return NULL;
    }
}

// What a key may be, for messages and --help: "1..65536 or null", "greedy|group_limited_greedy".
// The text is overwritten by the next call.
static const char *key_range(const Key *k) {
    static char text[128];
    if (k->kind == BOOL) return "true or false";
    if (k->kind == WORD) return k->words;
    if (k->kind == TEXT) return "a text";
    if (k->kind == IDS) {
        snprintf(text, sizeof text, "0..%.0f, a list of up to %d of them or null", k->most,
                 MOST_ENDS);
        return text;
    }
    snprintf(text, sizeof text, k->kind == NUM ? "%g..%g%s%s" : "%.0f..%.0f%s%s", k->least, k->most,
             k->words ? " or " : "", k->words ? k->words : "");
    return text;
}

// The value of key k in the struct at `base` as a number; of IDS the first, of a TEXT 0. All ranges
// end where a double still is exact.
static double key_number(const Key *k, const void *base) {
    const void *field = (const char *)base + k->offset;
    switch (k->kind) {
    case SIZE: return (double)*(const size_t *)field;
    case INT: case IDS: return (double)*(const int64_t *)field;
    case NUM:  return *(const double *)field;
    case BOOL: return *(const bool *)field;
    case WORD: return *(const int *)field;
    default:   return 0;
    }
}

// Writes a number into key k of the struct at `base`, as a value of its kind. False, and nothing is
// written, where it is none: out of range, or for all but NUM not a whole number.
static bool key_set(const Key *k, void *base, double x) {
    void *field = (char *)base + k->offset;
    size_t length;
    const double most = k->kind == BOOL ? 1 : k->kind == WORD ? 1 << 20 : k->most;
    if (!(x >= (k->kind == BOOL || k->kind == WORD ? 0 : k->least) && x <= most)) return false;
    if (k->kind != NUM && x != floor(x)) return false;
    if (k->kind == WORD && !word(k->words, (int)x, &length)) return false;
    switch (k->kind) {
    case SIZE: *(size_t *)field = (size_t)x; break;
    case IDS:  for (int i = 1; i < MOST_ENDS; i++) ((int64_t *)field)[i] = -1;
               *(int64_t *)field = (int64_t)x; break;
    case INT:  *(int64_t *)field = (int64_t)x; break;
    case NUM:  *(double *)field = x; break;
    case BOOL: *(bool *)field = x != 0; break;
    case WORD: *(int *)field = (int)x; break;
    default:   return false;
    }
    return true;
}

static const size_t IDS_BYTES = MOST_ENDS * sizeof(int64_t);

// Writes ids of which there are two or more as a list, "[5, 7]".
static const char *ids_text(char *text, const int64_t *ids) {
    size_t n = 0;
    for (int i = 0; i < MOST_ENDS && ids[i] >= 0; i++)
        n += (size_t)snprintf(text + n, 16, "%s%lld", i ? ", " : "[", (long long)ids[i]);
    memcpy(text + n, "]", 2);
    return text;
}

// Reads a list "[5, 7]" of ids up to `most` into ids [MOST_ENDS]. False where it is none, is empty
// or has too many.
static bool parse_list(int64_t *ids, const char *list, double most) {
    for (int i = 0; i < MOST_ENDS; i++) ids[i] = -1;
    for (int i = 0; i < MOST_ENDS; i++) {
        char *end;
        while (*++list == ' ') ;                // behind the [ or the comma
        ids[i] = isdigit((unsigned char)*list) ? strtoll(list, &end, 10) : -1;
        if (ids[i] < 0 || (double)ids[i] > most) return false;
        list = end + strspn(end, " ");
        if (*list == ']') return !list[1];
        if (*list != ',') return false;
    }
    return false;
}

// Whether key k has the same value in two structs.
static bool key_equal(const Key *k, const void *a, const void *b) {
    if (k->kind == IDS)
        return !memcmp((const char *)a + k->offset, (const char *)b + k->offset, IDS_BYTES);
    if (k->kind != TEXT) return key_number(k, a) == key_number(k, b);
    const char *const *ta = (const void *)((const char *)a + k->offset);
    const char *const *tb = (const void *)((const char *)b + k->offset);
    return *ta == *tb || (*ta && *tb && !strcmp(*ta, *tb));
}

// Copies the value of key k from one struct to another; of a TEXT, the pointer.
static void key_copy(const Key *k, void *to, const void *from) {
    const size_t bytes = k->kind == TEXT ? sizeof to : k->kind == IDS ? IDS_BYTES : 0;
    if (bytes) memcpy((char *)to + k->offset, (const char *)from + k->offset, bytes);
    else key_set(k, to, key_number(k, from));
}

// The value of key k in the struct at `base`, as it would stand in config.json. Numbers have as few
// digits as read back the same. The text is overwritten by the next call.
static const char *key_text(const Key *k, const void *base) {
    static char text[128];
    const void *field = (const char *)base + k->offset;
    const double x = key_number(k, base);
    size_t length = 0;
    const char *name;
    switch (k->kind) {
    case BOOL: return x != 0 ? "true" : "false";
    case TEXT: memcpy(&name, field, sizeof name); return name ? name : "";
    case WORD:
        name = word(k->words, (int)x, &length);
        snprintf(text, sizeof text, "%.*s", (int)length, name ? name : "");
        break;
    case NUM:
        for (int digits = 15; digits <= 17; digits++) {
            snprintf(text, sizeof text, "%.*g", digits, x);
            if (strtod(text, NULL) == x) break;
        }
        break;
    default:
        if (k->kind == IDS && ((const int64_t *)field)[1] >= 0) return ids_text(text, field);
        if (k->words && x == k->least && k->least < 1) return k->words;
        snprintf(text, sizeof text, "%.0f", x);
    }
    return text;
}

// Reads `value` into key k of the struct at `base`. False where it is not one of the key's values:
// not a number to its last character, out of range, not one of the words.
static bool key_parse(const Key *k, void *base, const char *value) {
    char *end;
    size_t length;
    const char *name;
    errno = 0;
    if (k->kind == TEXT) {
        memcpy((char *)base + k->offset, &value, sizeof value);
        return true;
    }
    if (k->kind == BOOL)
        return (!strcmp(value, "true") || !strcmp(value, "false")) &&
               key_set(k, base, *value == 't');
    if (k->kind == WORD) {
        for (int i = 0; (name = word(k->words, i, &length)); i++)
            if (strlen(value) == length && !strncmp(name, value, length))
                return key_set(k, base, i);
        return false;
    }
    if (k->words && !strcmp(value, k->words)) return key_set(k, base, k->least);
    if (k->kind == IDS && *value == '[') {
        int64_t ids[MOST_ENDS];
        const bool ok = parse_list(ids, value, k->most);
        if (ok) memcpy((char *)base + k->offset, ids, sizeof ids);
        return ok;
    }
    if (!*value || isspace((unsigned char)*value)) return false;
    if (k->kind == NUM) {
        const double x = strtod(value, &end);
        return !*end && key_set(k, base, x);
    }
    const long long i = strtoll(value, &end, 10);
    return !*end && !errno && key_set(k, base, (double)i);
}

// Every key of a table gets the value it starts with.
static void keys_init(const Key *keys, size_t n, void *base) {
    for (size_t i = 0; i < n; i++)
        if (keys[i].init && !key_parse(&keys[i], base, keys[i].init))
            fail(FAILED, "bug: default of %s", keys[i].name);
}

// The key of this name (of `length` characters, in which - and _ are the same) or of this one
// letter; NULL if there is none.
static const Key *key_named(const Key *keys, size_t n, const char *name, size_t length) {
    for (size_t i = 0; i < n; i++) {
        const char *own = keys[i].name;
        size_t same = 0;
        while (same < length && own[same] &&
               (own[same] == '-' ? '_' : own[same]) == (name[same] == '-' ? '_' : name[same]))
            same++;
        if (length == 1 ? *name == keys[i].letter : same == length && !own[same]) return &keys[i];
    }
    return NULL;
}

// ---- the config's table -------------------------------------------------------------------------
// In the order of the struct in coe.c [1]. What a new model starts with is the demo's.

#define ROW(field, ...) { KEY(Config, field), __VA_ARGS__ }
#define TEXT_ROW(field, ...) { KEY_AS(Config, generation.field, #field), __VA_ARGS__ }
#define CHAT_ROW(i, name, what) { KEY_AS(Config, generation.chat[i], "chat." name), .init = "", \
                                  .absent = "", .help = what }
static const Key config_keys[] = {
    ROW(vocab_size, RANGE(1, 1 << 24), .init = "258",
        .help = "tokens in the vocabulary, V"),
    ROW(hidden_size, RANGE(1, 1 << 16), .init = "128",
        .help = "width of the stream, d"),
    ROW(intermediate_size, RANGE(1, 1 << 20), .init = "256",
        .help = "width of a dense layer's feed-forward, I"),
    ROW(moe_intermediate_size, RANGE(1, 1 << 20), .init = "64",
        .help = "width of an expert, f"),
    ROW(num_hidden_layers, RANGE(1, 1 << 12), .init = "4",
        .help = "layers, L"),
    ROW(num_attention_heads, RANGE(1, 1 << 12), .init = "8",
        .help = "heads, H"),
    ROW(n_shared_experts, RANGE(0, 1 << 10), .words = "null", .init = "1",
        .help = "experts that every token visits, S"),
    ROW(n_routed_experts, RANGE(0, 1 << 14), .words = "null", .init = "8",
        .help = "experts to choose from, E; null: all layers are dense"),
    ROW(num_experts_per_tok, RANGE(1, 1 << 14), .init = "2",
        .help = "experts chosen per token and iteration, K"),
    ROW(kv_lora_rank, RANGE(1, 1 << 16), .init = "64",
        .help = "width of the key-value latent, R"),
    ROW(q_lora_rank, RANGE(0, 1 << 16), .words = "null", .init = "null",
        .help = "width of the query latent, r; null: one matrix"),
    ROW(qk_nope_head_dim, RANGE(1, 1 << 16), .init = "16",
        .help = "width of a head's key without position, dn"),
    ROW(qk_rope_head_dim, RANGE(2, 1 << 16), .init = "16",
        .help = "width of the key with RoPE, dr, even"),
    ROW(v_head_dim, RANGE(1, 1 << 16), .init = "16",
        .help = "width of a head's value, dv"),
    ROW(inner_iter, RANGE(1, 1 << 10), .init = "2",
        .help = "iterations of the chain, C"),
    ROW(inner_residual, .init = "true",
        .help = "y = y + experts(y) in every iteration"),
    ROW(outer_residual, .init = "false",
        .help = "the layer's input is added to the chain's end"),
    ROW(prenorm_chain, .init = "false", .absent = "false",
        .help = "stream + what the chain adds to its y; without the residuals above"),
    ROW(use_igate, .init = "true",
        .help = "a router for each iteration; false: one for all"),
    ROW(scoring_func, .words = "softmax|sigmoid", .init = "softmax", .absent = "softmax",
        .help = "what makes scores of a router's outputs; sigmoid goes with noaux_tc"),
    ROW(topk_method, .words = "greedy|group_limited_greedy|noaux_tc", .init = "greedy",
        .help = "how experts are chosen"),
    ROW(n_group, RANGE(1, 1 << 14), .words = "null", .init = "1",
        .help = "groups of experts (not with greedy)"),
    ROW(topk_group, RANGE(1, 1 << 14), .words = "null", .init = "1",
        .help = "groups a token may choose from"),
    ROW(norm_topk_prob, .init = "false",
        .help = "weights of the chosen sum to 1"),
    ROW(routed_scaling_factor, RANGE(-1e9, 1e9), .init = "1",
        .help = "weights of the chosen times this, unless softmax's are normalised"),
    ROW(first_k_dense_replace, RANGE(0, 1 << 12), .init = "0",
        .help = "layers before this one are dense"),
    ROW(moe_layer_freq, RANGE(1, 1 << 12), .init = "1",
        .help = "every how many layers there are experts"),
    ROW(aux_loss_alpha, RANGE(0, 1e9), .init = "0.001",
        .help = "weight of the load-balancing loss, per router call"),
    ROW(seq_aux, .init = "true",
        .help = "balance each sequence; false: the batch"),
    ROW(rms_norm_eps, RANGE(1e-30, 1), .init = "1e-6",
        .help = "epsilon of the layer norms"),
    ROW(rope_theta, RANGE(1e-30, 1e30), .init = "100",
        .help = "base of the rotation frequencies"),
    { KEY_AS(Config, rope_scaling_type, "rope_scaling.type"), .words = "null|linear|yarn",
        .init = "null", .help = "how rotations are stretched" },
    { KEY_AS(Config, rope_scaling_factor, "rope_scaling.factor"), RANGE(1e-30, 1e9), .init = "1",
        .help = "by how much" },
    { KEY_AS(Config, rope_scaling_original, "rope_scaling.original_max_position_embeddings"),
        RANGE(1, 1 << 30), .init = "4096", .help = "context before stretching (yarn)" },
    { KEY_AS(Config, rope_scaling_beta_fast, "rope_scaling.beta_fast"), RANGE(1e-30, 1e9),
        .init = "32", .help = "turns above which a frequency is kept (yarn)" },
    { KEY_AS(Config, rope_scaling_beta_slow, "rope_scaling.beta_slow"), RANGE(1e-30, 1e9),
        .init = "1", .help = "turns below which it is stretched fully (yarn)" },
    { KEY_AS(Config, rope_scaling_mscale, "rope_scaling.mscale"), RANGE(-1e9, 1e9),
        .init = "1", .help = "temperature on cos and sin (yarn)" },
    { KEY_AS(Config, rope_scaling_mscale_all, "rope_scaling.mscale_all_dim"), RANGE(-1e9, 1e9),
        .init = "0", .help = "temperature on the scores; 0: none" },
    ROW(max_position_embeddings, RANGE(1, 1 << 30), .init = "256",
        .help = "longest context in tokens"),
    ROW(attention_bias, .init = "false",
        .help = "biases in q_a, kv_a and o projections"),
    ROW(tie_word_embeddings, .init = "true",
        .help = "lm_head is embed_tokens"),
    ROW(initializer_range, RANGE(0, 1e9), .init = "0.06",
        .help = "deviation of fresh weights"),
    TEXT_ROW(bos_token_id, RANGE(-1, 1 << 24), .words = "null", .init = "257",
        .help = "token that starts a text; EOS, as between documents"),
    TEXT_ROW(eos_token_id, RANGE(-1, 1 << 24), .words = "null", .init = "257",
        .help = "token that ends a text; of several, the first ends training texts"),
    { KEY_AS(Config, generation.generation_eos, "generation_config.eos_token_id"),
        RANGE(-1, 1 << 24), .words = "null", .init = "null", .absent = "null",
        .help = "more tokens that end what is generated" },
    ROW(torch_dtype, .words = "float32|bfloat16", .init = "float32",
        .help = "type of the weights in safetensors"),
    TEXT_ROW(temperature, RANGE(-1, 1e9), .init = "-1",
        .help = "generation default; -1: none given"),
    TEXT_ROW(top_k, RANGE(-1, 1 << 24), .init = "-1",
        .help = "generation default; -1: none given"),
    TEXT_ROW(top_p, RANGE(-1, 1), .init = "-1",
        .help = "generation default; -1: none given"),
    TEXT_ROW(min_p, RANGE(-1, 1), .init = "-1",
        .help = "generation default; -1: none given"),
    TEXT_ROW(repetition_penalty, RANGE(-1, 1e9), .init = "-1",
        .help = "generation default; -1: none given"),
    TEXT_ROW(add_bos_token, .init = "true",
        .help = "text gets BOS in front"),
    TEXT_ROW(chat_template, .words = "none|deepseek_v2|pieces", .init = "none",
        .help = "form of a conversation, for run --mode chat; pieces: the following"),
    CHAT_ROW(CHAT_BEGIN, "begin", "what stands before the first message of the user"),
    CHAT_ROW(CHAT_SYSTEM, "system", "before a system message, where there is one"),
    CHAT_ROW(CHAT_SYSTEM_USER, "system_user", "between that and the user's first"),
    CHAT_ROW(CHAT_USER_ASSISTANT, "user_assistant", "between a message of the user and its answer"),
    CHAT_ROW(CHAT_ASSISTANT_USER, "assistant_user", "between an answer and the user's next"),
    CHAT_ROW(CHAT_ANSWER, "answer", "behind the last message, where the model goes on"),
    CHAT_ROW(CHAT_TRIM, "trim", "whose messages lose white space at both ends"),
    TEXT_ROW(default_prompt, .init = "", .absent = "",
        .help = "what run starts from where no prompt is given; empty: BOS"),
};
#undef ROW
#undef TEXT_ROW
#undef CHAT_ROW
enum { CONFIG_KEYS = sizeof config_keys / sizeof *config_keys };

// ---- options ------------------------------------------------------------------------------------

// A table of keys as options of a program: where the values go, and which of them the user gave.
typedef struct { const Key *keys; size_t n; void *base; unsigned char *given; } Options;

// Whether the user gave the option of this name, which the table has.
static bool is_given(const Options *table, const char *name) {
    return table->given[key_named(table->keys, table->n, name, strlen(name)) - table->keys];
}

// The key that an option means, by its name of `length` characters or its one letter, and its table
// in *table. NULL if there is no such key.
static const Key *find_key(const Options *tables, size_t n_tables, const char *name, size_t length,
                           const Options **table) {
    for (*table = tables; *table < tables + n_tables; ++*table) {
        const Key *k = key_named((*table)->keys, (*table)->n, name, length);
        if (k) return k;
    }
    return NULL;
}

// Sets one option, or ends the program; `shown` is how the user wrote its name.
static void set_option(const Options *table, const Key *k, const char *shown, const char *value) {
    if (!value) fail(WRONG_USAGE, "%s: needs a value, %s", shown, key_range(k));
    if (k->repeats && table->given[k - table->keys]) {
        const char *before = key_text(k, table->base);
        const size_t size = strlen(before) + strlen(value) + 2;
        char *both = allocate(size, "an option");           // for as long as the program runs
        snprintf(both, size, "%s;%s", before, value);
        value = both;
    }
    if (!key_parse(k, table->base, value))
        fail(WRONG_USAGE, "%s is \"%s\", must be %s", shown, value, key_range(k));
    if (table->given) table->given[k - table->keys] = 1;
}

// How like a wrong name is to an option's: the letters that they have in common at the start, more
// where one is a part of the other, or the other's initials (lr for learning_rate).
static size_t likeness(const char *wrong, size_t length, const char *name) {
    char initials[64] = { 0 }, part[64];
    size_t n = 0, same = 0;
    for (size_t i = 0; name[i] && n < 63; i++)
        if (i == 0 || !isalnum((unsigned char)name[i - 1])) initials[n++] = name[i];
    snprintf(part, sizeof part, "%.*s", (int)min_size(length, 63), wrong);
    while (part[same] && part[same] == name[same]) same++;
    if (length > 1 && !strcmp(part, initials)) return 100;
    if (length > 2 && strstr(name, part)) return 50;
    return same > 2 ? same : 0;
}

// Ends the program on an argument that is no option, and names the one that may be meant. `text`:
// the option that takes what stands alone.
static _Noreturn void unknown_option(const Options *tables, size_t n_tables, const char *arg,
                                     const char *text) {
    const Options *table;
    if (arg[0] != '-')
        fail(WRONG_USAGE, "%.60s: is no option; did you mean --%s \"%.60s\"?", arg, text, arg);
    const char *best = NULL, *name = arg + 1 + (arg[1] == '-');
    if (arg[1] != '-' && arg[1] && find_key(tables, n_tables, arg + 1, 1, &table))
        fail(WRONG_USAGE, "%s: unknown option; did you mean -%c %s?", arg, arg[1], arg + 2);
    for (size_t t = 0, most = 0; t < n_tables; t++)
        for (size_t i = 0; i < tables[t].n; i++) {
            const size_t like = likeness(name, strcspn(name, "="), tables[t].keys[i].name);
            if (like > most) most = like, best = tables[t].keys[i].name;
        }
    fail(WRONG_USAGE, best ? "%s: unknown option; did you mean --%s?"
                           : "%s: unknown option; --help lists them%s", arg, best ? best : "");
}

// Reads the command line from argv[first] on: --name value, --name=value, -letter value; a flag
// takes no value. Ends the program on what it does not know; `text` is the option for a text alone.
static void parse_options(const Options *tables, size_t n_tables, int argc, char **argv, int first,
                          const char *text) {
    for (int i = first; i < argc; i++) {
        const char *arg = argv[i], *name = arg + (arg[0] == '-') + (arg[0] == '-' && arg[1] == '-');
        const size_t length = strcspn(name, "=");
        const Options *table;
        const bool is_long = name == arg + 2, is_short = name == arg + 1 && name[0] && !name[1];
        const Key *k = (is_long && length > 1) || is_short
            ? find_key(tables, n_tables, name, length, &table) : NULL;
        if (!k) unknown_option(tables, n_tables, arg, text);
        if (name[length]) set_option(table, k, k->name, name + length + 1);
        else if (k->flag) set_option(table, k, arg, "true");
        else set_option(table, k, arg, ++i < argc ? argv[i] : NULL);
    }
}

// The lines of --help for a table: every option with what it may be and what it is otherwise.
static void print_options(const Options *table) {
    for (size_t i = 0; i < table->n; i++) {
        const Key *k = &table->keys[i];
        char option[80];
        if (k->letter) snprintf(option, sizeof option, "-%c, --%s", k->letter, k->name);
        else snprintf(option, sizeof option, "--%s", k->name);
        printf("  %-28s %s", option, k->help);
        if (!k->flag && k->kind != TEXT)
            printf(" [%s; %s]", key_range(k), k->init ? k->init : "none");
        else if (k->kind == TEXT && k->init && *k->init)
            printf(" [%s]", k->init);
        putchar('\n');
    }
}

// ---- what keys must be together -----------------------------------------------------------------

// Ends the program unless the config, whose keys are each in their range, describes a model that
// coe.c computes. `where` is the file or option that it came from.
static void config_check(const Config *c, const char *where, int code) {
#define REQUIRE(condition, ...) if (!(condition)) fail(code, __VA_ARGS__)
    REQUIRE(c->qk_rope_head_dim % 2 == 0, "%s: qk_rope_head_dim is %zu, must be even",
            where, c->qk_rope_head_dim);
    REQUIRE(c->generation.bos_token_id < (int64_t)c->vocab_size,
            "%s: bos_token_id is %lld, must be below vocab_size %zu",
            where, (long long)c->generation.bos_token_id, c->vocab_size);
    for (int i = 0; i < 2 * MOST_ENDS; i++) {
        const GenerationConfig *g = &c->generation;
        const int64_t id = i < MOST_ENDS ? g->eos_token_id[i] : g->generation_eos[i - MOST_ENDS];
        REQUIRE(id < (int64_t)c->vocab_size, "%s: %seos_token_id is %lld, must be below vocab_size "
                "%zu", where, i < MOST_ENDS ? "" : "generation_config.", (long long)id,
                c->vocab_size);
    }
    REQUIRE(c->rope_scaling_type != YARN || c->rope_scaling_beta_fast >= c->rope_scaling_beta_slow,
            "%s: rope_scaling.beta_fast is %g, must be at least beta_slow %g",
            where, c->rope_scaling_beta_fast, c->rope_scaling_beta_slow);
    REQUIRE(c->first_k_dense_replace <= c->num_hidden_layers,
            "%s: first_k_dense_replace is %zu, must be 0..%zu (the layers)",
            where, c->first_k_dense_replace, c->num_hidden_layers);
    REQUIRE(!c->prenorm_chain || (!c->inner_residual && !c->outer_residual),
            "%s: prenorm_chain is true, and so is %s, must be one of them", where,
            c->inner_residual ? "inner_residual" : "outer_residual");
    REQUIRE((c->scoring_func == SIGMOID) == (c->topk_method == NOAUX_TC),
            "%s: scoring_func is %s and topk_method %snoaux_tc, must be sigmoid with noaux_tc",
            where, c->scoring_func == SIGMOID ? "sigmoid" : "softmax",
            c->topk_method == NOAUX_TC ? "" : "not ");
    if (!c->n_routed_experts) return;
    REQUIRE(c->num_experts_per_tok <= c->n_routed_experts,
            "%s: num_experts_per_tok is %zu, must be 1..%zu (n_routed_experts)",
            where, c->num_experts_per_tok, c->n_routed_experts);
    if (c->topk_method == GREEDY) return;
    REQUIRE(c->n_routed_experts % c->n_group == 0,
            "%s: n_group is %zu, must divide n_routed_experts %zu",
            where, c->n_group, c->n_routed_experts);
    REQUIRE(c->topk_group <= c->n_group, "%s: topk_group is %zu, must be 1..%zu (n_group)",
            where, c->topk_group, c->n_group);
    REQUIRE(c->topk_method != NOAUX_TC || c->n_routed_experts / c->n_group >= 2,
            "%s: n_group is %zu, must leave 2 or more of %zu experts a group", where, c->n_group,
            c->n_routed_experts);
    const size_t left = c->topk_group * (c->n_routed_experts / c->n_group);
    REQUIRE(left >= c->num_experts_per_tok,
            "%s: topk_group %zu of n_group %zu leave %zu experts, "
            "fewer than num_experts_per_tok %zu",
            where, c->topk_group, c->n_group, left, c->num_experts_per_tok);
#undef REQUIRE
}
#endif // CONFIG_H
