// lib/text.h - texts and token ids in and out of run. Included by run.c.
#ifndef TEXT_H
#define TEXT_H

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

// A result that is a number, in one line.
static void print_value(const char *name, double v) {
    char text[DECIMAL_TEXT];
    printf("%s %s\n", name, decimal(text, v));
}
static void print_count(const char *name, size_t n) { printf("%s %zu\n", name, n); }

// A result that is a text, as a JSON string in one line.
static void print_text(const char *name, const char *text) {
    Lines lines = { 0 };
    add_json_string(&lines, text);
    printf("%s %s\n", name, lines.text);
    release(lines.text);
}

// A text that grows.
typedef struct { char *bytes; size_t n, room; } Text;

// Adds n bytes to a text.
static void add_text(Text *t, const char *bytes, size_t n) {
    if (n == 0) return;
    if (n > t->room - t->n) {
        t->room = checked_mul(2, checked_add(t->n, n));
        t->bytes = realloc(t->bytes, t->room);
        if (!t->bytes) fail(FAILED, "out of memory: %.1f MB for a message", (double)t->room / 1e6);
    }
    memcpy(t->bytes + t->n, bytes, n);
    t->n += n;
}

#endif // TEXT_H
