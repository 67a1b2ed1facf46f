// tests/fuzz/tokenizer.c - tokenizers, and texts for them.
//
// An input is the section of a model file that has the tokenizer's tables, which say how long they
// are, and a text.
#include "fuzz.h"
#include "../../run.c"

// Encodes a text, and checks what encode() promises.
static void check_text_of(const Tokenizer *t, const char *text, size_t n, int special,
                          const char *message) {
    int *ids = allocate(n * sizeof(int), "ids");
    size_t *starts = allocate(n * sizeof(size_t), "starts"), length, at = 0;
    bool exact = true;          // whether the tokens' texts must make the text
    const size_t count = encode_around(t, ids, starts, text, n, special, message);
    FUZZ_MUST(count <= n);
    for (uint32_t i = 0; i < t->n_added; i++) exact &= !(t->added[i].flags & (LSTRIP | RSTRIP));
    for (int i = 0; i < 256; i++) exact &= t->byte_token[i] != NO_TOKEN;
    Utf8 out = { .to = stdout };
    for (size_t i = 0; i < count; i++) {
        FUZZ_MUST(ids[i] >= 0 && (uint32_t)ids[i] < t->n_tokens);
        FUZZ_MUST(starts[i] < n && (!i || starts[i - 1] < starts[i]));
        const char *bytes = decode(t, ids[i], &length);
        utf8_print(&out, bytes, length);
        bytes = token_text(t, (uint32_t)ids[i], &length);
        if (!exact) continue;
        FUZZ_MUST(starts[i] == at && length <= n - at && !memcmp(text + at, bytes, length));
        at += length;
    }
    FUZZ_MUST(!exact || at == n);
    utf8_flush(&out, 1);
    release(ids);
    release(starts);
}

static void work_on(const uint8_t *data, size_t n) {
    Tokenizer head;
    Arena measure = { 0 };
    memset(&head, 0, sizeof head);
    memcpy(&head, data, min_size(n, offsetof(Tokenizer, flags) + sizeof head.flags));
    tokenizer_layout(&head, &measure);
    const size_t bytes = min_size(whole_lines(max_size(n, 1)), measure.used);
    char *section = allocate(bytes, "the tokenizer");
    memcpy(section, data, min_size(n, bytes));
    const Tokenizer *t = tokenizer_new(BPE, section, bytes, "fuzz", (size_t)1 << 24);
    const size_t rest = n - min_size(n, bytes);
    char *text = allocate(rest, "the text"), *message = allocate(rest, "the text");
    memcpy(text, data + n - rest, rest);
    check_text_of(t, text, rest, 0, NULL);
    check_text_of(t, text, rest, 1, NULL);
    memset(message + rest / 4, 1, rest / 2);
    check_text_of(t, text, rest, 1, message);
    check_text_of(tokenizer_new(BYTES, NULL, 0, "fuzz", BYTE_TOKENS), text, rest, 1, message);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    fuzz(work_on, data, n);
    return 0;
}
