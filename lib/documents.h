// lib/documents.h - texts and token files as one stream of tokens, made of documents.
//
// In a text, documents are separated by lines "<|endoftext|>". Each of these becomes one EOS, which
// ends the document before it; the last document ends too. (The newline in front of the separator
// belongs to the document.) A token file, as llm.c writes them, is such a stream already.
//
// Of a document that is a question with its answer one may want to learn the answer only. Its
// completion is what begins with the first occurrence of a marker, and with the newline right in
// front of that, so that the model learns to begin an answer by itself. A token counts, that is,
// predicting it has a loss, if its first byte lies in the completion; EOS counts; and a document
// without a marker counts wholly.
#ifndef DOCUMENTS_H
#define DOCUMENTS_H

static const char EOS_TEXT[] = "<|endoftext|>";     // in texts, whatever the tokenizer calls it

typedef struct {
    int *tokens;                // [n]
    unsigned char *counts;      // [n]  whether it counts; NULL: all of them do
    size_t n;
    size_t documents;           // EOS tokens
} Stream;

// ---- files --------------------------------------------------------------------------------------

// All bytes of a file, *n of them, and a final NUL; the caller frees them. It may be a pipe, of up
// to 1 GiB.
static char *read_file(const char *path, size_t *n) {
    char *bytes = NULL;
    FILE *file = fopen(path, "rb");
    if (!file) fail(FAILED, "%s: cannot be opened: %s", path, strerror(errno));
    const size_t most = is_special(path) ? (size_t)1 << 30 : SIZE_MAX / 4;
    *n = 0;
    for (size_t room = 0, got = 1; got; *n += got) {
        if (*n == room) {
            if (room >= most) fail(FAILED, "%s: is longer than %zu bytes", path, most);
            room = room ? 2 * room : 1 << 16;
            bytes = realloc(bytes, room + 1);
            if (!bytes) fail(FAILED, "out of memory: %.1f MB for %s", (double)room / 1e6, path);
        }
        got = fread(bytes + *n, 1, room - *n, file);
    }
    if (ferror(file)) fail(FAILED, "%s: cannot be read: %s", path, strerror(errno));
    fclose(file);
    bytes[*n] = 0;
    return bytes;
}

// What people take for text, by how it begins. (Much of it would pass as some tokens or other, and
// nobody would notice but by a loss that does not fall.)
static const struct { const char *begin; size_t n; const char *what; } not_text[] = {
    { "\x1F\x8B", 2, "gzip: unpack it first" },
    { "PK\3\4", 4, "a zip archive: unpack it first" },
    { "\x28\xB5\x2F\xFD", 4, "zstd: unpack it first" },
    { "BZh", 3, "bzip2: unpack it first" },
    { "\xFD" "7zXZ", 5, "xz: unpack it first" },
    { "PAR1", 4, "parquet: write its texts to a file, with lines <|endoftext|> between them" },
    { "ARROW1", 6, "Arrow: write its texts to a file, with lines <|endoftext|> between them" },
    { "\xFF\xFE", 2, "UTF-16: iconv -f utf-16 -t utf-8 makes text of it" },
    { "\xFE\xFF", 2, "UTF-16: iconv -f utf-16 -t utf-8 makes text of it" },
    { "COE1", 4, "a model file" },
    { "GGUF", 4, "a GGUF model" },
    { "%PDF", 4, "a PDF: pdftotext makes text of it" },
    { "\x93NUMPY", 6, "a NumPy array: as tokens it needs llm.c's header" },
    { "version https://git-lfs", 23, "what git LFS leaves in the place of a file: git lfs pull" },
};

// Ends the program if data is not UTF-8 text, and says what it looks like. *bytes of *text: a byte
// order mark at the start is taken off. `allow`: anything is text, as it is.
static void check_text(const char *path, const char **text, size_t *bytes, bool allow) {
    const unsigned char *b = (const unsigned char *)*text;
    const char *what = NULL;
    const size_t n = *bytes;
    size_t at = 0, zeros = 0;
    if (allow) return;
    for (size_t length; at < n && b[at] && (length = utf8_length(b + at, n - at)); at += length)
        if (length > n - at) break;
    const bool whole = at == n;
    for (size_t i = 0; i < sizeof not_text / sizeof *not_text && !what; i++)
        if ((!whole || not_text[i].n > 20) && n >= not_text[i].n &&
            !memcmp(b, not_text[i].begin, not_text[i].n)) what = not_text[i].what;
    for (size_t i = 0; i < min_size(n, 4096); i++) zeros += !b[i];
    if (!what && !whole && n > 9 && b[8] == '{' && !b[7]) what = "safetensors";
    if (!what && !whole && zeros > min_size(n, 4096) / 4)
        what = "UTF-16, or tokens without llm.c's header";
    if (what) fail(FAILED, "%s: is not text but %s (--allow_bytes takes it as it is)", path, what);
    if (!whole)
        fail(FAILED, "%s: byte %zu is 0x%02X, not UTF-8 text: is it Latin-1 (iconv -f latin1 -t "
             "utf-8), or tokens without llm.c's header? --allow_bytes takes it as it is", path, at,
             b[at]);
    if (n >= 3 && !memcmp(b, "\xEF\xBB\xBF", 3)) {
        fprintf(stderr, "%s: %s: leaves out the byte order mark at its start\n", program, path);
        *text += 3;
        *bytes -= 3;
    }
    const size_t line = strcspn(*text, "\n");          // there is a NUL behind the text
    if (**text == '{' && line && (*text)[line - 1] == '}' && memchr(*text, '"', line))
        fprintf(stderr, "%s: %s: looks like JSON lines, all of which is learned, braces and all; "
                "text is made by: python3 -c 'import json, sys; [print(json.loads(x)[\"text\"] + "
                "\"\\n<|endoftext|>\") for x in sys.stdin]'\n", program, path);
}

// ---- documents ----------------------------------------------------------------------------------

// Where the completion of a document of n bytes begins: at n where the marker is not there.
static size_t completion_start(const char *text, size_t n, const char *marker) {
    const size_t length = strlen(marker);
    for (size_t i = 0; i + length <= n; i++) {
        const char *first = memchr(text + i, *marker, n - i - length + 1);
        if (!first) break;
        i = (size_t)(first - text);
        if (!memcmp(first, marker, length)) return i && text[i - 1] == '\n' ? i - 1 : i;
    }
    return n;
}

// Adds a document of n bytes to a stream, which has room for its tokens and EOS. With a marker, not
// NULL, only its completion counts, and the stream has `counts`. starts (n) is scratch for streams
// that have. Returns whether the marker is there.
static bool add_document(Stream *s, const Tokenizer *t, const char *text, size_t n, int eos,
                         const char *marker, size_t *starts) {
    const size_t begin = marker ? completion_start(text, n, marker) : 0, first = s->n;
    const bool found = begin < n;
    s->n += encode(t, s->tokens + first, s->counts ? starts : NULL, text, n, 0);
    for (size_t i = first; s->counts && i < s->n; i++)
        s->counts[i] = !found || starts[i - first] >= begin;
    if (s->counts) s->counts[s->n] = 1;
    s->tokens[s->n++] = eos;
    return found;
}

// Whether a line of n bytes, its end included, is what stands between two documents.
static bool is_separator(const char *line, size_t n) {
    const size_t length = sizeof EOS_TEXT - 1;
    n -= n && line[n - 1] == '\n';
    n -= n && line[n - 1] == '\r';
    return n == length && !memcmp(line, EOS_TEXT, length);
}

// The documents of a text, as a stream. With a marker, not NULL, only completions count; where no
// document has one, all of it counts, or if `strict` that is an error. `path` is for that.
static Stream tokenize_documents(const Tokenizer *t, const char *text, size_t bytes, int eos,
                                 const char *marker, bool strict, const char *path) {
    Stream s = { 0 };
    size_t marked = 0;
    s.tokens = allocate(checked_mul(checked_add(bytes, 1), sizeof(int)), "the tokens of the data");
    if (marker) s.counts = allocate(checked_add(bytes, 1), "which tokens of the data count");
    size_t *starts = marker ? allocate(checked_mul(bytes, sizeof(size_t)), "the data") : NULL;
    for (size_t i = 0, document = 0, end; i < bytes; i = end) {
        const char *newline = memchr(text + i, '\n', bytes - i);
        end = newline ? (size_t)(newline - text) + 1 : bytes;
        const bool separator = is_separator(text + i, end - i);
        if (!separator && end < bytes) continue;
        const size_t length = (separator ? i : end) - document;
        marked += add_document(&s, t, text + document, length, eos, marker, starts);
        document = end;
    }
    release(starts);
    if (marker && !marked && strict)
        fail(FAILED, "%s: no document has the marker \"%.40s\" (--completion_marker); the first "
             "one begins \"%.*s\"", path, marker, (int)min_size(strcspn(text, "\n"), 60), text);
    return s;
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
    s->tokens = allocate(checked_mul((size_t)header[2] + 1, sizeof(int)), "the tokens of the data");
    for (size_t i = 0; i < (size_t)header[2]; i++) {
        uint32_t wide = 0;
        memcpy(&wide, text + 1024 + i * width, width);      // little-endian, as the machine
        if (wide >= V)
            fail(FAILED, "%s: token %u at byte %zu, must be below vocab_size %zu",
                 path, wide, 1024 + i * width, V);
        s->tokens[s->n++] = (int)wide;
    }
}

// Reads a text or a token file, told apart by the magic. With a marker, not NULL, only completions
// count, as in tokenize_documents(). Fails on text that no tokenizer can encode, and on what is no
// text unless that is allowed.
static Stream read_stream(const Model *m, const char *path, const char *marker, bool strict,
                          bool allow_bytes) {
    uint64_t size;
    fclose(open_regular(path, &size));          // a pipe or a device may have no end
    size_t bytes;
    char *file = read_file(path, &bytes);
    const char *text = file;
    int32_t magic = 0;
    Stream s = { 0 };
    if (!bytes) fail(FAILED, "%s: is empty, must be UTF-8 text or a token file", path);
    if (bytes >= 12) memcpy(&magic, text, sizeof magic);
    if (magic == 20240520 || magic == 20240801) {
        if (marker && strict)
            fail(FAILED, "%s: is a token file, in which there is no marker to find: "
                 "--completion_only_loss is for text", path);
        read_token_file(&s, path, text, bytes, m->config.vocab_size);
    } else if (!m->tokenizer || m->config.generation.eos_token_id[0] < 0) {
        fail(FAILED, "%s: is text, but the model has no tokenizer or no eos_token_id: "
             "give a token file or --tokenizer", path);
    } else {
        const int eos = (int)m->config.generation.eos_token_id[0];
        check_text(path, &text, &bytes, allow_bytes);
        s = tokenize_documents(m->tokenizer, text, bytes, eos, marker, strict, path);
    }
    for (size_t i = 0; i < s.n; i++)
        s.documents += s.tokens[i] == m->config.generation.eos_token_id[0];
    free(file);
    return s;
}
#endif // DOCUMENTS_H
