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

// A whole file in memory, and its size; the caller releases it. Fails on what cannot be read.
static char *read_whole(const char *path, size_t *bytes) {
    uint64_t size;
    FILE *file = open_regular(path, &size);
    char *text = allocate(checked_add((size_t)size, 1), "the data");
    read_exactly(text, (size_t)size, file, path);
    fclose(file);
    *bytes = (size_t)size;
    return text;
}

// Reads a text or a token file, told apart by the magic. With a marker, not NULL, only completions
// count, as in tokenize_documents(). Fails on text that no tokenizer can encode.
static Stream read_stream(const Model *m, const char *path, const char *marker, bool strict) {
    size_t bytes;
    char *text = read_whole(path, &bytes);
    int32_t magic = 0;
    Stream s = { 0 };
    if (!bytes) fail(FAILED, "%s: is empty, must be UTF-8 text or a token file", path);
    if (bytes >= 12) memcpy(&magic, text, sizeof magic);
    if (magic == 20240520 || magic == 20240801) {
        if (marker && strict)
            fail(FAILED, "%s: is a token file, in which there is no marker to find: "
                 "--completion_only_loss is for text", path);
        read_token_file(&s, path, text, bytes, m->config.vocab_size);
    } else if (!m->tokenizer || m->config.eos_token_id < 0) {
        fail(FAILED, "%s: is text, but the model has no tokenizer or no eos_token_id: "
             "give a token file or --tokenizer", path);
    } else {
        const int eos = (int)m->config.eos_token_id;
        s = tokenize_documents(m->tokenizer, text, bytes, eos, marker, strict, path);
    }
    for (size_t i = 0; i < s.n; i++) s.documents += s.tokens[i] == m->config.eos_token_id;
    release(text);
    return s;
}
#endif // DOCUMENTS_H
