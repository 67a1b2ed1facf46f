// lib/modelfile.h - reads and writes model.bin: config, tokenizer and weights in one file.
//
// Little-endian. Every section starts at a multiple of 64, so that a mapped file can be used as it
// lies.
//
//     +--------------------+ 0
//     | header             |  magic, version, checksum, the sizes of the sections
//     +--------------------+ 64
//     | config             |  a line "name value" for each key of lib/config.h
//     +--------------------+ + config_bytes
//     | embedded files     |  tokenizer.json etc.: name (56 bytes), length (8), content, padding
//     +--------------------+ + files_bytes
//     | tokenizer          |  the tables of lib/tokenizer.h; empty for bytes and for none
//     +--------------------+ + tokenizer_bytes
//     | weights            |  the tensors of coe.c [2] in their order, each at a multiple of 64
//     +--------------------+ file_bytes - state_bytes
//     | training state     |  lib/checkpoint.h's, absent in a model that is only run
//     +--------------------+ file_bytes
//
// The header says how long each of them is, and the file must be exactly as long as that: what was
// cut off in a download, or belongs to another config, is found before the first weight is read.
//
// Contents: checksum, lines, reading files, version 1, the header, opening a model, writing.
#ifndef MODELFILE_H
#define MODELFILE_H
#ifdef POSIX
#include <sys/mman.h>
#endif

// ---- checksum -----------------------------------------------------------------------------------

// The CRC-32 (zlib's) of n more bytes behind those whose CRC is `crc`; of nothing it is 0. Eight
// bytes at a time: table[j][b] is what byte b does to the CRC when j more bytes follow it.
static uint32_t crc32(uint32_t crc, const void *bytes, size_t n) {
    static uint32_t table[8][256];
    const unsigned char *b = bytes;
    if (!table[0][1]) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t x = i;
            for (int bit = 0; bit < 8; bit++) x = x >> 1 ^ (x & 1 ? 0xEDB88320u : 0);
            table[0][i] = x;
        }
        for (int j = 1; j < 8; j++)
            for (int i = 0; i < 256; i++)
                table[j][i] = table[j - 1][i] >> 8 ^ table[0][table[j - 1][i] & 255];
    }
    crc = ~crc;
    for (; n >= 8; n -= 8, b += 8) {
        uint32_t next = 0;
        for (int j = 0; j < 8; j++)
            next ^= table[7 - j][b[j] ^ (j < 4 ? crc >> 8 * j & 255 : 0)];
        crc = next;
    }
    for (; n; n--) crc = crc >> 8 ^ table[0][(crc ^ *b++) & 255];
    return ~crc;
}

// ---- lines --------------------------------------------------------------------------------------
// A config, and the recipe of a training run, are lines "name value". A value stands as it would on
// the command line; a text is a JSON string.

// Lines that are being made: `bytes` of them, and zeros up to `padded`, a multiple of 64.
typedef struct { char *text; size_t bytes, padded; } Lines;

// Adds n bytes to the lines.
static void add_bytes(Lines *lines, const char *from, size_t n) {
    const size_t padded = whole_lines(checked_add(lines->bytes, n));
    if (padded > lines->padded) {
        char *more = allocate(padded, "a config");
        if (lines->bytes) memcpy(more, lines->text, lines->bytes);
        release(lines->text);
        lines->text = more;
        lines->padded = padded;
    }
    memcpy(lines->text + lines->bytes, from, n);
    lines->bytes += n;
}

// Adds a text as a JSON string.
static void add_json_string(Lines *lines, const char *text) {
    char escape[8];
    add_bytes(lines, "\"", 1);
    for (; *text; text++) {
        const unsigned char byte = (unsigned char)*text;
        if (byte < 0x20) add_bytes(lines, escape, (size_t)snprintf(escape, 8, "\\u%04x", byte));
        else if (byte == '"' || byte == '\\') add_bytes(lines, byte == '"' ? "\\\"" : "\\\\", 2);
        else add_bytes(lines, text, 1);
    }
    add_bytes(lines, "\"", 1);
}

// Writes a code point as UTF-8; returns how many bytes that are.
static size_t put_utf8(char *to, uint32_t code) {
    if (code < 0x80) { to[0] = (char)code; return 1; }
    const size_t more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    to[0] = (char)(0xF00u >> (more + 1) | code >> 6 * more);
    for (size_t i = 1; i <= more; i++) to[i] = (char)(0x80 | (code >> 6 * (more - i) & 0x3F));
    return more + 1;
}

// Reads 4 hexadecimal digits; false if they are none.
static bool read_hex(const char *digits, uint32_t *x) {
    *x = 0;
    for (int i = 0; i < 4; i++) {
        if (!isxdigit((unsigned char)digits[i])) return false;
        const int digit = tolower((unsigned char)digits[i]);
        *x = *x << 4 | (uint32_t)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    return true;
}

// Makes the text of a JSON string, in place. NULL if it is none, or holds a NUL.
static char *json_string(char *json) {
    static const char names[] = "\"\\/bfnrt", bytes[] = "\"\\/\b\f\n\r\t";
    char *to = json, *from = json + 1;
    if (*json != '"') return NULL;
    while (*from != '"') {
        uint32_t code, low;
        if ((unsigned char)*from < 0x20) return NULL;
        if (*from != '\\') { *to++ = *from++; continue; }
        const char *name = from[1] ? strchr(names, from[1]) : NULL;
        if (name) { *to++ = bytes[name - names]; from += 2; continue; }
        if (from[1] != 'u' || !read_hex(from + 2, &code) || code == 0) return NULL;
        from += 6;
        if (code >= 0xD800 && code < 0xE000) {          // half of a pair that makes one character
            if (code >= 0xDC00 || from[0] != '\\' || from[1] != 'u' || !read_hex(from + 2, &low) ||
                low < 0xDC00 || low >= 0xE000) return NULL;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            from += 6;
        }
        to += put_utf8(to, code);
    }
    if (from[1]) return NULL;
    *to = 0;
    return json;
}

// Adds the lines of a table.
static void add_lines(Lines *lines, const Options *table) {
    for (size_t i = 0; i < table->n; i++) {
        const Key *k = &table->keys[i];
        const char *value = key_text(k, table->base);
        add_bytes(lines, k->name, strlen(k->name));
        add_bytes(lines, " ", 1);
        if (k->kind == TEXT) add_json_string(lines, value);
        else add_bytes(lines, value, strlen(value));
        add_bytes(lines, "\n", 1);
    }
}

// Reads one line, from `line` to its end at `end`, into the field of one of the tables.
static void read_line(const Options *tables, size_t n_tables, char *line, char *end,
                      const char *path) {
    char *blank = memchr(line, ' ', (size_t)(end - line));
    if (!blank || memchr(line, 0, (size_t)(end - line)))
        fail(FAILED, "%s: has a line \"%.*s\", must be \"name value\"", path,
             (int)min_size((size_t)(end - line), 60), line);
    char *value = blank + 1;
    *blank = *end = 0;
    const Options *table;
    const Key *k = find_key(tables, n_tables, line, strlen(line), &table);
    if (!k || strcmp(k->name, line))
        fail(FAILED, "%s: has the key %.60s, which this program does not know", path, line);
    if (table->given[k - table->keys]) fail(FAILED, "%s: %s is there twice", path, line);
    table->given[k - table->keys] = 1;
    if (k->kind == TEXT) {
        const size_t size = strlen(value) + 1;
        char *text = memcpy(allocate(size, "a text of the config"), value, size);
        value = json_string(text) ? text : NULL;
    }
    if (!value) fail(FAILED, "%s: %s is no JSON string", path, line);
    if (!key_parse(k, table->base, value))
        fail(FAILED, "%s: %s is %.60s, must be %s", path, line, value, key_range(k));
}

// Reads lines with zeros behind them into the fields of tables of keys, none of them twice, and
// notes which were there. The text is changed; `path` is for errors.
static void read_lines(const Options *tables, size_t n_tables, char *text, size_t bytes,
                       const char *path) {
    size_t at = 0;
    while (at < bytes && text[at]) {
        char *end = memchr(text + at, '\n', bytes - at);
        if (!end) fail(FAILED, "%s: its last line \"name value\" has no end", path);
        read_line(tables, n_tables, text + at, end, path);
        at = (size_t)(end + 1 - text);
    }
    for (; at < bytes; at++)
        if (text[at]) fail(FAILED, "%s: something follows its lines \"name value\"", path);
}

// Gives keys that a file from before there was such a key cannot have their value. Ends the program
// where a key is missing that every file has; a tokenizer alone has no others than its own, and
// the rest is then that of a new model.
static void fill_absent(const Options *tables, size_t n_tables, bool alone, const char *path) {
    for (const Options *t = tables; t < tables + n_tables; t++)
        for (const Key *k = t->keys; k < t->keys + t->n; k++) {
            if (t->given[k - t->keys]) continue;
            const char *value = k->absent || !alone ? k->absent : k->init;
            if (!value) fail(FAILED, "%s: has no line for %s", path, k->name);
            key_parse(k, t->base, value);
        }
}

// ---- reading files ------------------------------------------------------------------------------

// Reads exactly `bytes` from a file, or ends the program.
static void read_exactly(void *to, size_t bytes, FILE *file, const char *path) {
    if (fread(to, 1, bytes, file) != bytes)
        fail(FAILED, "%s: ends early or cannot be read (%s)",
             path, errno ? strerror(errno) : "end of file");
}

// Reads n float32 numbers.
static void read_floats(real *to, size_t n, FILE *file, const char *path) {
    float chunk[4096];
    for (size_t i = 0; i < n; ) {
        size_t k = n - i < 4096 ? n - i : 4096;
        read_exactly(chunk, k * sizeof(float), file, path);
        for (size_t j = 0; j < k; j++) to[i++] = (real)chunk[j];
    }
}

// Opens a regular file and tells its size. Directories and pipes open too on some systems, hence
// the checks.
static FILE *open_regular(const char *path, uint64_t *bytes) {
    struct stat info = { 0 };   // asked for before fopen, which would wait for a pipe's other end
    errno = 0;
    if (!stat(path, &info) && !S_ISREG(info.st_mode))
        fail(FAILED, "%s: is %s, must be a regular file",
             path, S_ISDIR(info.st_mode) ? "a directory" : "a device or pipe");
    FILE *file = fopen(path, "rb");
    if (!file) fail(FAILED, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(fileno(file), &info))
        fail(FAILED, "%s: cannot be examined: %s", path, strerror(errno));
    *bytes = (uint64_t)info.st_size;
    if (*bytes > SIZE_MAX)
        fail(FAILED, "%s: has %.1f GB, must have less than %.1f GB for a program of %zu bits",
             path, (double)*bytes / 1e9, (double)SIZE_MAX / 1e9, 8 * sizeof(size_t));
    return file;
}

#ifdef POSIX
static const char *mapped_path;         // the file that was mapped last

// A mapped file that another program cuts short raises SIGBUS where the missing page is touched.
static void on_sigbus(int signal_number) {
    (void)signal_number;
    say(program), say(": "), say(mapped_path), say(": became shorter while it was read\n");
    if (on_sudden_end) on_sudden_end();
    _Exit(FAILED);
}
#endif

// Moves a file to byte `at` from its beginning.
static void seek_to(FILE *file, uint64_t at, const char *path) {
    const int bad = fseeko(file, (off_t)at, SEEK_SET);
    if (bad) fail(FAILED, "%s: has no byte %llu: %s", path, (unsigned long long)at,
                  strerror(errno));
}

// ---- version 1 ----------------------------------------------------------------------------------
// It had slots of 8 bytes in the place of lines, int64 or for a NUM float64, in the order of these
// names. Files of that version are read for good, and never written.

enum { VERSION_1_BYTES = 1024 };
static const char version_1_config[] =
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads n_shared_experts n_routed_experts num_experts_per_tok kv_lora_rank "
    "q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim inner_iter inner_residual "
    "outer_residual use_igate topk_method n_group topk_group norm_topk_prob routed_scaling_factor "
    "first_k_dense_replace moe_layer_freq aux_loss_alpha seq_aux rms_norm_eps rope_theta "
    "rope_scaling.type rope_scaling.factor rope_scaling.original_max_position_embeddings "
    "rope_scaling.beta_fast rope_scaling.beta_slow rope_scaling.mscale rope_scaling.mscale_all_dim "
    "max_position_embeddings attention_bias tie_word_embeddings initializer_range bos_token_id "
    "eos_token_id torch_dtype temperature top_k top_p min_p repetition_penalty add_bos_token "
    "chat_template";

// Reads slots, of the names in `names`, into the fields of a table.
static void read_slots(const Options *table, const char *names, const char *slots,
                       const char *path) {
    for (size_t length; *names; names += length + (names[length] == ' '), slots += 8) {
        length = strcspn(names, " ");
        const Key *k = key_named(table->keys, table->n, names, length);
        int64_t whole;
        double x;
        if (!k) fail(FAILED, "bug: slot %.*s", (int)length, names);
        memcpy(&whole, slots, sizeof whole);
        memcpy(&x, slots, sizeof x);
        if (k->kind != NUM) x = (double)whole;
        table->given[k - table->keys] = 1;
        if (key_set(k, table->base, x)) continue;
        if (k->kind == NUM)
            fail(FAILED, "%s: %s is %g, must be %s", path, k->name, x, key_range(k));
        fail(FAILED, "%s: %s is %lld, must be %s", path, k->name, (long long)whole, key_range(k));
    }
}

// ---- the header ---------------------------------------------------------------------------------

enum { MODEL_VERSION = 2, HEADER_BYTES = 64, CHECKED_FROM = 12, MOST_CONFIG_BYTES = 1 << 20 };

typedef struct {
    uint32_t version, checksum;     // checksum: the CRC-32 of everything from byte CHECKED_FROM on
    uint64_t file_bytes, config_bytes, files_bytes, tokenizer_bytes, state_bytes;
    int weight_type;                // of the matrices, an enum Type, or NO_WEIGHTS
    int tokenizer;                  // NO_TOKENIZER, BYTES or BPE
    bool coe_weights;
} Header;

// What the lines of the config say of the file, before the keys of the model itself.
static const Key header_keys[] = {
    { KEY(Header, weight_type), .words = "f32|bf16|q8|none", .help = "type of the matrices" },
    { KEY(Header, tokenizer), .words = "none|bytes|bpe", .help = "kind of the tokenizer" },
    { KEY(Header, coe_weights), .help = "whether the model is upcycled" },
};
enum { HEADER_KEYS = sizeof header_keys / sizeof *header_keys };
enum { NO_WEIGHTS = Q8 + 1 };       // weight_type: the file is a tokenizer alone

// Ends the program and says what a file is that does not start like a model file, from its first n
// bytes.
static _Noreturn void not_a_model(const char *path, const char *head, size_t n) {
    const char *convert = "; python export.py makes a model.bin of a Hugging Face checkpoint";
    if (n == 0) fail(FAILED, "%s: is empty, must be a model file", path);
    if (n >= 4 && !memcmp(head, "1EOC", 4))
        fail(FAILED, "%s: was written on a machine of the other endianness, "
             "must be little-endian", path);
    if (n >= 4 && !memcmp(head, "GGUF", 4))
        fail(FAILED, "%s: is a GGUF file, must be a model file%s", path, convert);
    if (n > 9 && head[8] == '{' && head[9] == '"')
        fail(FAILED, "%s: is a safetensors file, must be a model file%s", path, convert);
    if (n >= 7 && !memcmp(head, "version", 7))
        fail(FAILED, "%s: is a git-LFS pointer, not the file itself: git lfs pull fetches it",
             path);
    if (*head == '{' || *head == '<')
        fail(FAILED, "%s: is %s text, must be a model file%s",
             path, *head == '{' ? "JSON" : "HTML", convert);
    fail(FAILED, "%s: starts with bytes %02x %02x, must start with \"COE1\"",
         path, (unsigned char)head[0], n > 1 ? (unsigned char)head[1] : 0u);
}

// Reads the fixed part of a header, from its `n` bytes, which may be all of the file.
static void header_from_bytes(Header *h, const char *head, size_t n, const char *path) {
    if (n < 8 || memcmp(head, "COE1", 4)) not_a_model(path, head, n);
    memcpy(&h->version, head + 4, 4);
    if (h->version < 1 || h->version > MODEL_VERSION)
        fail(FAILED, "%s: version is %u, this program reads versions 1 and %d", path, h->version,
             MODEL_VERSION);
    const size_t header_bytes = h->version == 1 ? VERSION_1_BYTES : HEADER_BYTES;
    if (n < header_bytes)
        fail(FAILED, "%s: is %zu bytes long, the header alone is %zu", path, n, header_bytes);
    if (h->version == 1) return;
    uint64_t sizes[6];
    memcpy(&h->checksum, head + 8, 4);
    memcpy(sizes, head + 16, sizeof sizes);
    h->file_bytes = sizes[0], h->config_bytes = sizes[1], h->files_bytes = sizes[2];
    h->tokenizer_bytes = sizes[3], h->state_bytes = sizes[4];
}

// ---- opening a model ----------------------------------------------------------------------------

// Checks everything that the header says against itself and against the file's size, and lays out
// the tensors: m gets its config and w, *h the header. The file is read up to the embedded files.
static void read_header(Model *m, Header *h, const char *path, FILE *file, uint64_t file_bytes) {
    char head[VERSION_1_BYTES] = { 0 };
    unsigned char given[CONFIG_KEYS + HEADER_KEYS] = { 0 };
    const Options tables[2] = { { header_keys, HEADER_KEYS, h, given + CONFIG_KEYS },
                                { config_keys, CONFIG_KEYS, &m->config, given } };
    size_t n = (size_t)(file_bytes < HEADER_BYTES ? file_bytes : HEADER_BYTES);
    read_exactly(head, n, file, path);
    if (n == HEADER_BYTES && !memcmp(head, "COE1\1\0\0", 8)) {
        const uint64_t more = file_bytes < VERSION_1_BYTES ? file_bytes - n : VERSION_1_BYTES - n;
        read_exactly(head + n, (size_t)more, file, path);
        n += (size_t)more;
    }
    header_from_bytes(h, head, n, path);
    if (h->version == 1) {
        uint64_t sizes[4];
        memcpy(sizes, head + 8, sizeof sizes);
        h->file_bytes = sizes[0], h->files_bytes = sizes[1];
        h->tokenizer_bytes = sizes[2], h->state_bytes = sizes[3];
        read_slots(&tables[0], "weight_type tokenizer coe_weights", head + 40, path);
        read_slots(&tables[1], version_1_config, head + 128, path);
    }
    if (h->file_bytes != file_bytes)
        fail(FAILED, "%s: is %llu bytes long, its header says %llu: cut off or damaged",
             path, (unsigned long long)file_bytes, (unsigned long long)h->file_bytes);
    if (h->version > 1) {
        if (h->config_bytes > MOST_CONFIG_BYTES || h->config_bytes > file_bytes - HEADER_BYTES ||
            h->config_bytes % 64)
            fail(FAILED, "%s: its config takes %llu bytes, must be a multiple of 64 within the "
                 "file, at most %d", path, (unsigned long long)h->config_bytes, MOST_CONFIG_BYTES);
        char *lines = allocate((size_t)h->config_bytes + 1, "the config");
        read_exactly(lines, (size_t)h->config_bytes, file, path);
        read_lines(tables, 2, lines, (size_t)h->config_bytes, path);
        release(lines);
    }
    const bool alone = h->version > 1 && h->weight_type == NO_WEIGHTS;
    fill_absent(tables, 2, alone, path);
    if (h->tokenizer_bytes % 64 || (h->tokenizer_bytes != 0) != (h->tokenizer == BPE))
        fail(FAILED, "%s: the tokenizer takes %llu bytes, must be %s",
             path, (unsigned long long)h->tokenizer_bytes,
             h->tokenizer == BPE ? "a multiple of 64 and not 0" : "0");
    config_check(&m->config, path, FAILED);
    m->upcycled = h->coe_weights;
    if (m->upcycled && m->config.inner_iter < 2)
        fail(FAILED, "%s: inner_iter is 1, must be at least 2 with coe_weights", path);
    // A layer takes 64 bytes or more. So a file that is too small for its number of layers is
    // found before the list of their tensors takes up memory.
    if (!alone && (uint64_t)m->config.num_hidden_layers * 64 > file_bytes)
        fail(FAILED, "%s: num_hidden_layers is %zu, more than a file of %llu bytes holds",
             path, m->config.num_hidden_layers, (unsigned long long)file_bytes);
    // With this, all sizes fit size_t, because that of the file does.
    if (h->files_bytes > file_bytes || h->tokenizer_bytes > file_bytes ||
        h->state_bytes > file_bytes)
        fail(FAILED, "%s: is %llu bytes long, one of its sections longer: header and file disagree",
             path, (unsigned long long)file_bytes);
    if (!alone) m->w = weights_layout(&m->config, m->upcycled, (enum Type)h->weight_type);
    const size_t before = (size_t)(h->version == 1 ? VERSION_1_BYTES
                                                   : HEADER_BYTES + h->config_bytes);
    const size_t sections = checked_add(checked_add((size_t)h->files_bytes, (size_t)h->state_bytes),
                                        checked_mul(m->w.size, sizeof(float)));
    const size_t expected = checked_add(before, checked_add((size_t)h->tokenizer_bytes, sections));
    if (expected != file_bytes || h->files_bytes % 64)
        fail(FAILED, "%s: is %llu bytes long, this config needs %zu: header and file disagree",
             path, (unsigned long long)file_bytes, expected);
}

// Ends the program unless the file's checksum is the one in its header. It reads all of the file,
// and says how far it is where that takes time; then it goes back to where the file was.
static void verify_checksum(const Header *h, FILE *file, uint64_t back_to, const char *path) {
    enum { BLOCK = 1 << 20 };
    if (h->version == 1) return;            // had none
    char *block = allocate(BLOCK, "a block of the file");
    uint32_t crc = 0;
    double next = seconds() + 2;
    seek_to(file, CHECKED_FROM, path);
    for (uint64_t at = CHECKED_FROM; at < h->file_bytes; ) {
        const size_t n = (size_t)(h->file_bytes - at < BLOCK ? h->file_bytes - at : BLOCK);
        read_exactly(block, n, file, path);
        crc = crc32(crc, block, n);
        at += n;
        if (seconds() < next) continue;
        next = seconds() + 2;
        fprintf(stderr, "%s: %s: checked %.0f of %.0f MB\n", program, path, 1e-6 * (double)at,
                1e-6 * (double)h->file_bytes);
    }
    release(block);
    if (crc != h->checksum)
        fail(FAILED, "%s: its checksum is %08x, its header says %08x: damaged", path, crc,
             h->checksum);
    seek_to(file, back_to, path);
}

// Makes the weights of a model that was read from a narrower type reals, in memory of their own.
static void widen(Model *m) {
    Weights wide = weights_layout(&m->config, m->upcycled, F32);
    real *block = allocate(checked_mul(wide.size, sizeof(real)), "the weights");
    weights_bind(&wide, block);
    for (size_t i = 0; i < wide.n_tensors; i++) {
        const Tensor *from = &m->w.tensor[i], *to = &wide.tensor[i];
        const float *floats = (const float *)(const void *)from->data;
        for (size_t e = 0; e < to->copies; e++)
            for (size_t row = 0; row < to->rows; row++)
                for (size_t j = 0; j < to->cols; j++) {
                    const size_t at = (e * to->rows + row) * to->cols + j;
                    to->data[at] = from->type == F32 ? (real)floats[at]
                                                     : number(matrix(from, e), row, j);
                }
    }
    release(m->weights);
    release(m->w.tensor);
    m->w = wide;
    m->weights = block;
}

// How a model is opened: MAPPED, so that starting takes no longer for a large model and pages come
// as they are used; the same after checking the file's checksum; or read into memory as reals,
// after that check, for training. TOKENIZER is MAPPED, and takes a tokenizer alone too.
enum Opening { MAPPED, MAPPED_CHECKED, READ_CHECKED, TOKENIZER };

// Opens a model file, or ends the program. *state, if wanted (with READ_CHECKED), is the file,
// still open, at its training state of *state_bytes bytes.
static Model model_open(const char *path, enum Opening how, FILE **state, Header *header) {
    Model m = { 0 };
    Header h = { 0 };
    uint64_t bytes;
    FILE *file = open_regular(path, &bytes);
    whose_sizes = path;
    errno = 0;
    read_header(&m, &h, path, file, bytes);
    if (h.weight_type == NO_WEIGHTS && how != TOKENIZER)
        fail(FAILED, "%s: is a tokenizer alone, must be a model: ./train --tokenizer takes it",
             path);
    m.files_bytes = (size_t)h.files_bytes;
    const uint64_t at = h.version == 1 ? VERSION_1_BYTES : HEADER_BYTES + h.config_bytes;
    const size_t before_weights = m.files_bytes + (size_t)h.tokenizer_bytes;
    if (how != MAPPED && how != TOKENIZER) verify_checksum(&h, file, at, path);
    m.files = allocate(before_weights, "the embedded files");
    read_exactly(m.files, before_weights, file, path);
    m.tokenizer = tokenizer_new(h.tokenizer, m.files + m.files_bytes, (size_t)h.tokenizer_bytes,
                                path, m.config.vocab_size);
#ifdef POSIX
    if (how != READ_CHECKED && sizeof(real) == sizeof(float)) {
        m.map_bytes = (size_t)bytes;
        m.map = mmap(NULL, m.map_bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
        if (m.map == MAP_FAILED)
            fail(FAILED, "%s: %.1f MB cannot be mapped: %s", path, (double)bytes / 1e6,
                 strerror(errno));
        mapped_path = path;
        signal(SIGBUS, on_sigbus);
        m.weights = (real *)(void *)((char *)m.map + at + before_weights);
    }
#endif
    if (!m.map) {
        m.weights = allocate(checked_mul(m.w.size, sizeof(real)), "the weights");
        if (h.weight_type == F32) read_floats(m.weights, m.w.size, file, path);
        else read_exactly(m.weights, m.w.size * sizeof(float), file, path);
    }
    weights_bind(&m.w, m.weights);
    if (h.weight_type != F32 && (how == READ_CHECKED || sizeof(real) != sizeof(float))) widen(&m);
    if (state) *state = file; else fclose(file);
    if (header) *header = h;
    return m;
}

// Gives back the memory of a model, or its mapping; m is empty then.
static void model_free(Model *m) {
#ifdef POSIX
    if (m->map) munmap(m->map, m->map_bytes); else
#endif
    release(m->weights);
    release(m->w.tensor);
    release(m->tokenizer);
    release(m->files);
    memset(m, 0, sizeof *m);
}

// ---- writing ------------------------------------------------------------------------------------

// A file that is being written as a model, and the checksum of what is in it so far.
typedef struct { FILE *file; const char *path; uint32_t checksum; } ModelWriter;

// Writes all of `bytes`, or ends the program: a full disk shows here, or when the file is closed.
static void write_exactly(ModelWriter *to, const void *from, size_t bytes) {
    if (fwrite(from, 1, bytes, to->file) != bytes)
        fail(FAILED, "%s: cannot be written: %s", to->path, strerror(errno));
    to->checksum = crc32(to->checksum, from, bytes);
}

// Writes n numbers as float32.
static void write_floats(ModelWriter *to, const real *from, size_t n) {
    float chunk[4096];
    for (size_t i = 0; i < n; ) {
        size_t j = 0;
        for (; j < 4096 && i < n; j++) chunk[j] = (float)from[i++];
        write_exactly(to, chunk, j * sizeof(float));
    }
}

// Writes everything in front of the weights. state_bytes: of the training state that will follow
// them.
static void write_header(ModelWriter *to, const Model *m, size_t state_bytes) {
    const Tokenizer *t = m->tokenizer;
    Header h = { .weight_type = (int)m->w.embed_tokens->type, .coe_weights = m->upcycled,
                 .tokenizer = t ? t->kind : NO_TOKENIZER };
    Config config = m->config;
    const size_t tokenizer_bytes = t ? t->section_bytes : 0;
    const Options tables[2] = { { header_keys, HEADER_KEYS, &h, NULL },
                                { config_keys, CONFIG_KEYS, &config, NULL } };
    Lines lines = { 0 };
    for (int i = 0; i < 2; i++) add_lines(&lines, &tables[i]);
    const size_t sections[] = { HEADER_BYTES, lines.padded, m->files_bytes, tokenizer_bytes,
                                checked_mul(m->w.size, sizeof(float)), state_bytes };
    size_t all = 0;
    for (int i = 0; i < 6; i++) all = checked_add(all, sections[i]);
    const uint64_t sizes[] = { all, lines.padded, m->files_bytes, tokenizer_bytes, state_bytes, 0 };
    const uint32_t version = MODEL_VERSION;
    char head[HEADER_BYTES] = "COE1";
    memcpy(head + 4, &version, sizeof version);
    memcpy(head + 16, sizes, sizeof sizes);
    write_exactly(to, head, CHECKED_FROM);
    to->checksum = 0;                       // which covers what comes behind itself
    write_exactly(to, head + CHECKED_FROM, HEADER_BYTES - CHECKED_FROM);
    write_exactly(to, lines.text, lines.padded);
    if (m->files) write_exactly(to, m->files, m->files_bytes + tokenizer_bytes);
    release(lines.text);
}

// Puts the checksum where it belongs, once all else is written.
static void write_checksum(ModelWriter *to) {
    const uint32_t checksum = to->checksum;
    if (fflush(to->file)) fail(FAILED, "%s: cannot be written: %s", to->path, strerror(errno));
    seek_to(to->file, 8, to->path);
    write_exactly(to, &checksum, sizeof checksum);
}
#endif // MODELFILE_H
