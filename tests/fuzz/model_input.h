// tests/fuzz/model_input.h - makes model files of inputs. Included after run.c or train.c.
//
// A model file has to be as long as its header and config say, and to have the right checksum. An
// input that says this itself (version 2 of the format) gets size and checksum made right, and
// seldom comes further. So there is a second form, of three parts: lines of a config, lines of a
// training state, each with a NUL behind them, and a pattern. Lines that are missing are those of a
// small model below, and the pattern is repeated where numbers belong: an input is short, and what
// is changed in it matters.
#ifndef MODEL_INPUT_H
#define MODEL_INPUT_H

enum { MOST_MODEL_BYTES = 1 << 20 };

static const char small_config[] =
    "weight_type f32\ntokenizer bytes\ncoe_weights false\nvocab_size 258\nhidden_size 8\n"
    "intermediate_size 8\nmoe_intermediate_size 8\nnum_hidden_layers 2\nnum_attention_heads 2\n"
    "n_shared_experts 1\nn_routed_experts 4\nnum_experts_per_tok 2\nkv_lora_rank 8\n"
    "q_lora_rank null\nqk_nope_head_dim 4\nqk_rope_head_dim 4\nv_head_dim 4\ninner_iter 2\n"
    "max_position_embeddings 64\n";
static const char small_state[] =
    "batch_size 2\nmax_length 8\nmax_steps 4\nseed 7\nstep 4\ndata_tokens 0\n"
    "data_fingerprint \"\"\n";

// Adds a line to the lines, unless they have one for that name.
static void add_missing(Lines *to, const char *line, size_t bytes) {
    const size_t name = strcspn(line, " ") + 1;
    for (size_t at = 0; at + name <= to->bytes; at++)
        if ((!at || to->text[at - 1] == '\n') && !memcmp(to->text + at, line, name)) return;
    add_bytes(to, line, bytes);
}

// Lines of an input, n bytes of them, and those that are missing: of the small model, else what the
// tables begin with.
static Lines all_lines(const uint8_t *input, size_t n, const char *small, const Key *keys,
                      size_t n_keys) {
    Lines lines = { 0 };
    if (n) add_bytes(&lines, (const char *)input, n);
    for (size_t length; *small; small += length) {
        length = strcspn(small, "\n") + 1;
        add_missing(&lines, small, length);
    }
    for (const Key *k = keys; k < keys + n_keys; k++) {
        char line[256];
        if (k->init) {
            const char *quote = k->kind == TEXT ? "\"" : "";
            snprintf(line, sizeof line, "%s %s%s%s\n", k->name, quote, k->init, quote);
            add_missing(&lines, line, strlen(line));
        }
    }
    return lines;
}

typedef struct { uint8_t *bytes; size_t n; } FuzzFile;

// How many bytes the weights take that a config asks for, and in *moments AdamW's. The program ends
// where it would with the whole file.
static size_t weights_bytes(char *lines, size_t n, size_t *moments) {
    Model m = { 0 };
    Header h = { 0 };
    unsigned char given[CONFIG_KEYS + HEADER_KEYS] = { 0 };
    const Options tables[2] = { { header_keys, HEADER_KEYS, &h, given + CONFIG_KEYS },
                                { config_keys, CONFIG_KEYS, &m.config, given } };
    read_lines(tables, 2, lines, n, "lines");
    const bool alone = h.weight_type == NO_WEIGHTS;
    fill_absent(tables, 2, alone, "lines");
    config_check(&m.config, "lines", FAILED);
    *moments = 0;
    if (alone) return 0;
    *moments = 2 * sizeof(float) * weights_layout(&m.config, h.coe_weights, F32).size;
    return sizeof(float) * weights_layout(&m.config, h.coe_weights, (enum Type)h.weight_type).size;
}

// Adds n bytes to a file.
static void add_part(FuzzFile *f, const void *bytes, size_t n) {
    if (n > MOST_MODEL_BYTES - f->n) fuzz_exit(0);
    memcpy(f->bytes + f->n, bytes, n);
    f->n += n;
}

// Adds `bytes` bytes to a file, the pattern of n bytes again and again.
static void add_pattern(FuzzFile *f, const uint8_t *pattern, size_t n, size_t bytes) {
    if (bytes > MOST_MODEL_BYTES - f->n) fuzz_exit(0);
    for (size_t i = 0; n && i < bytes; i++) f->bytes[f->n + i] = pattern[i % n];
    f->n += bytes;
}

// Where the next part of an input begins, behind the NUL of this one or at the end, and how long
// the text of this one is.
static const uint8_t *part_end(const uint8_t *part, const uint8_t *end) {
    const uint8_t *nul = memchr(part, 0, (size_t)(end - part));
    return nul ? nul + 1 : end;
}
static size_t text_length(const uint8_t *part, const uint8_t *next) {
    const size_t n = (size_t)(next - part);
    return n && !next[-1] ? n - 1 : n;
}

// Writes an input of the first or the second form as the file fuzz-model.bin.
static void model_from(const uint8_t *input, size_t n, bool of_parts, bool with_state) {
    FuzzFile f = { allocate(MOST_MODEL_BYTES, "an input"), 0 };
    if (of_parts) {
        const uint8_t *const end = input + n, *state = part_end(input, end),
            *pattern = part_end(state, end);
        const Lines config = all_lines(input, text_length(input, state), small_config, config_keys,
                                      CONFIG_KEYS);
        Lines recipe = { 0 };
        if (with_state)
            recipe = all_lines(state, text_length(state, pattern), small_state, recipe_keys,
                              RECIPE_KEYS);
        size_t moments;
        char *copy = allocate(config.padded + 1, "an input");
        memcpy(copy, config.text, config.padded);
        const size_t weights = weights_bytes(copy, config.padded, &moments);
        const uint64_t head[8] = { (uint64_t)2 << 32, 0, 0, config.padded, 0, 0,
                                   with_state ? recipe.padded + moments : 0, 0 };
        add_part(&f, head, sizeof head);
        memcpy(f.bytes, "COE1", 4);
        add_part(&f, config.text, config.padded);
        add_pattern(&f, pattern, (size_t)(end - pattern), weights);
        if (with_state) add_part(&f, recipe.text, recipe.padded);
        if (with_state) add_pattern(&f, pattern, (size_t)(end - pattern), moments);
    } else {
        add_part(&f, input, n);
    }
    if (f.n >= HEADER_BYTES && !memcmp(f.bytes, "COE1\2", 5)) {
        const uint64_t size = f.n;
        memcpy(f.bytes + 16, &size, sizeof size);
        const uint32_t checksum = crc32(0, f.bytes + CHECKED_FROM, f.n - CHECKED_FROM);
        memcpy(f.bytes + 8, &checksum, sizeof checksum);
    }
    fuzz_file("fuzz-model.bin", f.bytes, f.n);
    release(f.bytes);
}
#endif // MODEL_INPUT_H
