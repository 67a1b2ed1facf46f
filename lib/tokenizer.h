// lib/tokenizer.h - text to tokens and back, by tables that travel inside the model file.
//
// Text becomes tokens in three steps:
//   1. Added tokens, such as the names of BOS and EOS, are found and taken out.
//   2. The text between them is cut into pieces, words roughly, by patterns.
//   3. Each piece starts as single bytes, and of all pairs of neighbours that may be merged the one
//      of the lowest rank is, again and again: byte-pair encoding.
// A pattern is what export.py makes of a regular expression in tokenizer.json: alternatives, each a
// sequence of items "least to most characters of this class", each class a list of ranges of code
// points. The first pattern cuts the text, the next one its pieces, and so on.
//
// The byte tokenizer is one without patterns and merges: ids 0..255 are bytes, 256 BOS, 257 EOS.

#ifndef TOKENIZER_H
#define TOKENIZER_H

enum { NO_TOKENIZER, BYTES, BPE };                              // kinds of tokenizers
enum { IGNORE_MERGES = 1, NFC = 2 };                            // flags of a tokenizer
enum { SPECIAL = 1, LSTRIP = 2, RSTRIP = 4, NORMALIZED = 8 };   // of an added token
enum ItemKind { CHARACTERS, NOT_BEFORE, AT_END };
enum { BYTE_TOKENS = 258, MOST_ITEMS = 32 };
static const uint32_t NO_LIMIT = UINT32_MAX, NO_TOKEN = UINT32_MAX;
typedef struct { uint32_t left, right, rank, result; } Merge;
typedef struct { uint32_t kind, class, least, most; } Item;
typedef struct { uint32_t id, flags; } Added;

struct Tokenizer {              // the tokenizer's section in the file: first its head ...
    uint32_t n_tokens, text_bytes, n_order, n_merges, n_stages, n_alternatives, n_items, n_classes,
        n_ranges, n_added, n_normal, flags;
    const uint32_t *first;          // [n_tokens + 1]   ... then these: the bytes of token i are
    const char *text;               // [text_bytes]     text[first[i] .. first[i + 1] - 1]
    const uint32_t *byte_token;     // [256]            the token of each byte, or NO_TOKEN
    const uint32_t *order;          // [n_order]        tokens by their bytes, with IGNORE_MERGES
    const Merge *merges;            // [n_merges]       by left, then right
    const uint32_t *stages;         // [n_stages + 1]   the first alternative of each pattern
    const uint32_t *alternatives;   // [n_alternatives + 1]  the first item of each
    const Item *items;              // [n_items]
    const uint32_t (*classes)[2];   // [n_classes]      first range, how many
    const uint32_t (*ranges)[2];    // [n_ranges]       lowest and highest code point
    const Added *added;             // [n_added]        by their bytes
    const uint32_t (*normal)[3];    // [n_normal]       with NFC: lowest, highest, class or 255
    int kind;                   // BYTES or BPE
    size_t section_bytes;       // in the file; the byte tokenizer needs none
    unsigned char starts[256];  // whether an added token starts with this byte
    uint64_t ascii[128];        // bit c: whether the character is in class c < 64
};

// Places the arrays of a tokenizer, whose head is known, in its section.
static void tokenizer_layout(Tokenizer *t, Arena *arena) {
    const size_t u32 = sizeof(uint32_t);
    take(arena, 16, u32);                               // the head
    t->first        = take(arena, (size_t)t->n_tokens + 1, u32);
    t->text         = take(arena, t->text_bytes, 1);
    t->byte_token   = take(arena, 256, u32);
    t->order        = take(arena, t->n_order, u32);
    t->merges       = take(arena, t->n_merges, sizeof(Merge));
    t->stages       = take(arena, (size_t)t->n_stages + 1, u32);
    t->alternatives = take(arena, (size_t)t->n_alternatives + 1, u32);
    t->items        = take(arena, t->n_items, sizeof(Item));
    t->classes      = take(arena, t->n_classes, 2 * u32);
    t->ranges       = take(arena, t->n_ranges, 2 * u32);
    t->added        = take(arena, t->n_added, sizeof(Added));
    t->normal       = take(arena, t->n_normal, 3 * u32);
}

// The bytes of a token, which exists, and how many.
static const char *token_text(const Tokenizer *t, uint32_t id, size_t *length) {
    *length = t->first[id + 1] - t->first[id];
    return t->text + t->first[id];
}

// Compares two texts byte by byte: < 0, 0 or > 0. A text comes after its own beginnings.
static int compare_texts(const char *a, size_t na, const char *b, size_t nb) {
    const int c = memcmp(a, b, na < nb ? na : nb);
    return c ? c : (na > nb) - (na < nb);
}

// Compares the texts of two tokens byte by byte: < 0, 0 or > 0.
static int compare_tokens(const Tokenizer *t, uint32_t a, uint32_t b) {
    size_t na, nb;
    const char *ta = token_text(t, a, &na), *tb = token_text(t, b, &nb);
    return compare_texts(ta, na, tb, nb);
}

// How many tokens of a sorted list do not come after a text. Token i is list[i * stride].
static size_t count_not_after(const Tokenizer *t, const uint32_t *list, size_t n, size_t stride,
                              const char *text, size_t bytes) {
    size_t low = 0, length;
    while (low < n) {
        const size_t middle = low + (n - low) / 2;
        const char *token = token_text(t, list[middle * stride], &length);
        if (compare_texts(token, length, text, bytes) <= 0) low = middle + 1; else n = middle;
    }
    return low;
}

// For bsearch: merges by left, then right.
static int compare_merges(const void *a, const void *b) {
    const Merge *x = a, *y = b;
    if (x->left != y->left) return x->left < y->left ? -1 : 1;
    return x->right < y->right ? -1 : x->right > y->right;
}

// Whether one token's text is that of two others.
static int is_joined(const Tokenizer *t, const Merge *m) {
    size_t n, nl, nr;
    const char *text = token_text(t, m->result, &n), *left = token_text(t, m->left, &nl),
               *right = token_text(t, m->right, &nr);
    return n == nl + nr && !memcmp(text, left, nl) && !memcmp(text + nl, right, nr);
}

// Whether `start` divides 0 .. all into n parts: part i goes from start[i] to start[i + 1].
static int divides(const uint32_t *start, size_t n, uint32_t all) {
    int ok = start[0] == 0 && start[n] == all;
    for (size_t i = 0; i < n; i++) ok &= start[i] <= start[i + 1];
    return ok;
}

// Whether n ranges (lowest, highest, ...) of `width` numbers are sorted and do not overlap.
static int in_order(const uint32_t *range, size_t n, size_t width) {
    int ok = 1;
    for (size_t i = 0; i < n; i++, range += width)
        ok &= range[0] <= range[1] && (i == 0 || range[1 - (ptrdiff_t)width] < range[0]);
    return ok;
}

// Ends the program unless all that encode() and decode() rely on is so.
static void tokenizer_check(const Tokenizer *t, const char *path) {
    const uint32_t n = t->n_tokens;
#define REQUIRE(condition, ...) \
    if (!(condition)) fail(FAILED, "%s: the tokenizer is damaged: " __VA_ARGS__)
    REQUIRE(t->flags < 4, "its flags are %u, must be below 4", path, t->flags);
    REQUIRE(divides(t->first, n, t->text_bytes), "its tokens do not divide its text", path);
    REQUIRE(divides(t->stages, t->n_stages, t->n_alternatives) &&
            divides(t->alternatives, t->n_alternatives, t->n_items), "its patterns overlap", path);
    for (uint32_t i = 0; i < 256; i++) {
        const uint32_t id = t->byte_token[i];
        const int not_utf8 = i == 0xC0 || i == 0xC1 || i >= 0xF5;   // no text needs these
        REQUIRE(id < n ? t->first[id + 1] - t->first[id] == 1 &&
                         (unsigned char)t->text[t->first[id]] == i : id == NO_TOKEN && not_utf8,
                "token %u is not byte %u", path, id, i);
    }
    for (uint32_t i = 0; i < t->n_order; i++)
        REQUIRE(t->order[i] < n && (!i || compare_tokens(t, t->order[i - 1], t->order[i]) < 0),
                "number %u of its tokens in order", path, i);
    for (uint32_t i = 0; i < t->n_merges; i++) {
        const Merge *m = &t->merges[i];
        REQUIRE(m->left < n && m->right < n && m->result < n && is_joined(t, m) &&
                (!i || compare_merges(m - 1, m) < 0), "merge %u", path, i);
    }
    for (uint32_t i = 0; i < t->n_alternatives; i++)
        REQUIRE(t->alternatives[i + 1] - t->alternatives[i] <= MOST_ITEMS,
                "alternative %u of its patterns has more than %d items", path, i, MOST_ITEMS);
    for (uint32_t i = 0; i < t->n_items; i++)
        REQUIRE(t->items[i].kind == AT_END ||
                (t->items[i].kind < AT_END && t->items[i].class < t->n_classes),
                "item %u of its patterns", path, i);
    for (uint32_t i = 0; i < t->n_classes; i++) {
        const uint32_t from = t->classes[i][0], count = t->classes[i][1];
        REQUIRE(from <= t->n_ranges && count <= t->n_ranges - from &&
                in_order(t->ranges[from], count, 2), "class %u", path, i);
    }
    for (uint32_t i = 0; i < t->n_added; i++)
        REQUIRE(t->added[i].id < n && t->first[t->added[i].id] < t->first[t->added[i].id + 1] &&
                (!i || compare_tokens(t, t->added[i - 1].id, t->added[i].id) < 0),
                "added token %u", path, i);
    REQUIRE(in_order(*t->normal, t->n_normal, 3), "its normal form", path);
#undef REQUIRE
}

// For bsearch: whether a code point is before a range (lowest, highest, ...), after it, or in it.
static int compare_range(const void *code, const void *range) {
    const uint32_t c = *(const uint32_t *)code, *r = range;
    return c < r[0] ? -1 : c > r[1];
}

// Whether a character is in a class of the tokenizer.
static int in_class(const Tokenizer *t, uint32_t class, uint32_t code) {
    if (code < 128 && class < 64) return (int)(t->ascii[code] >> class & 1);
    const uint32_t *c = t->classes[class];
    return bsearch(&code, t->ranges + c[0], c[1], sizeof *t->ranges, compare_range) != NULL;
}

// The byte tokenizer's tables.
static void fill_byte_tokenizer(Tokenizer *t) {
    static const char names[] = "<|beginoftext|>" "<|endoftext|>";
    static Added added[] = { { 256, SPECIAL }, { 257, SPECIAL } };
    static char text[256 + sizeof names];
    static uint32_t first[BYTE_TOKENS + 1], byte_token[256];
    for (uint32_t i = 0; i < 256; i++) {
        first[i] = byte_token[i] = i;
        text[i] = (char)i;
    }
    memcpy(text + 256, names, sizeof names);
    first[256] = 256;
    first[257] = 256 + sizeof "<|beginoftext|>" - 1;
    first[258] = 256 + sizeof names - 1;
    *t = (Tokenizer){ .kind = BYTES, .n_tokens = BYTE_TOKENS, .first = first, .text = text,
                      .byte_token = byte_token, .n_added = 2, .added = added };
}

// The tokenizer of this kind, or NULL for none. What its section, of so many bytes, says is
// believed only after a check; it must live as long as the tokenizer.
static Tokenizer *tokenizer_new(int kind, char *section, size_t bytes, const char *path,
                                size_t vocab_size) {
    if (kind == NO_TOKENIZER) return NULL;
    Tokenizer *t = allocate(sizeof *t, "the tokenizer");
    if (kind == BYTES) {
        fill_byte_tokenizer(t);
    } else {
        Arena measure = { 0 }, place = { section, 0 };
        memcpy(t, section, offsetof(Tokenizer, flags) + sizeof t->flags);
        tokenizer_layout(t, &measure);
        if (measure.used != bytes)
            fail(FAILED, "%s: the tokenizer takes %zu bytes, but its head adds up to %zu",
                 path, bytes, measure.used);
        tokenizer_layout(t, &place);
        tokenizer_check(t, path);
        t->kind = BPE;
        t->section_bytes = bytes;
    }
    if (t->n_tokens > vocab_size)
        fail(FAILED, "%s: vocab_size is %zu, must be at least %u, the tokens of the tokenizer",
             path, vocab_size, t->n_tokens);
    for (uint32_t i = 0; i < t->n_added; i++)
        t->starts[(unsigned char)t->text[t->first[t->added[i].id]]] = 1;
    for (uint32_t c = 0; c < t->n_classes && c < 64; c++)
        for (uint32_t i = 0; i < 128; i++)
            if (bsearch(&i, t->ranges + t->classes[c][0], t->classes[c][1], sizeof *t->ranges,
                        compare_range))
                t->ascii[i] |= (uint64_t)1 << c;
    return t;
}

// How many bytes the character that starts with these n bytes has: 0 if they start none.
static size_t utf8_length(const unsigned char *b, size_t n) {
    size_t length = b[0] < 0x80 ? 1 : b[0] < 0xC2 ? 0 : b[0] < 0xE0 ? 2 :
                    b[0] < 0xF0 ? 3 : b[0] < 0xF5 ? 4 : 0;
    if (n > 1 && ((b[0] == 0xE0 && b[1] < 0xA0) ||      // longer than it must be
                  (b[0] == 0xED && b[1] > 0x9F) ||      // half of a surrogate pair
                  (b[0] == 0xF0 && b[1] < 0x90) ||      // longer than it must be
                  (b[0] == 0xF4 && b[1] > 0x8F)))       // above U+10FFFF
        return 0;
    for (size_t i = 1; i < n && i < length; i++) if ((b[i] & 0xC0) != 0x80) return 0;
    return length;
}

// The length of the character that n > 0 bytes of text start with, and its code point. A byte that
// is not part of UTF-8 is a character of its own, and taken for U+FFFD.
static size_t next_char(const char *text, size_t n, uint32_t *code) {
    const unsigned char *b = (const unsigned char *)text;
    *code = b[0];
    if (b[0] < 0x80) return 1;
    const size_t length = utf8_length(b, n);
    if (length < 2 || length > n) {
        *code = 0xFFFD;
        return 1;
    }
    *code &= 0x7Fu >> length;
    for (size_t i = 1; i < length; i++) *code = *code << 6 | (b[i] & 0x3Fu);
    return length;
}

// Where the character that ends at text[at] starts; that is not before `low`. In UTF-8 no character
// ends within another, so it is the longest that fits.
static size_t previous_char(const char *text, size_t low, size_t at) {
    uint32_t code;
    for (size_t k = 4; k > 1; k--)
        if (at - low >= k && next_char(text + at - k, k, &code) == k) return at - k;
    return at - 1;
}

// Whether n > 0 bytes of text start with a character of a class, and that character's length.
static int next_in_class(const Tokenizer *t, uint32_t class, const char *text, size_t n,
                         size_t *length) {
    uint32_t code;
    *length = next_char(text, n, &code);
    return in_class(t, class, code);
}

// What is known about an item in the piece that ends at `end`: it takes any characters from `run`
// up to `run_end`; and the alternative cannot match with the item at any of `low` to `high`. So
// no character is looked at twice for an item that takes any number, and where items overlap, as in
// a*a*a*b, each is tried once at each character and not once for each way to get there.
typedef struct { const char *end; size_t run, run_end, low, high; } Memo;

// Forgets what is known about an item if that was in another piece.
static Memo *memo_of(Memo *m, const char *end) {
    if (m->end != end) *m = (Memo){ .end = end, .low = 1 };
    return m;
}

// Notes that the alternative does not match with an item at text[at] of a piece.
static void note_failure(Memo *m, const char *text, size_t at, size_t end) {
    uint32_t code;
    const bool known = m->low <= m->high;
    if (known && at >= m->low && at <= m->high) return;
    if (!known || at >= end || at + next_char(text + at, end - at, &code) != m->low) m->high = at;
    m->low = at;
}

// Whether an item matches at text[at] in a piece that ends at `end`. What it takes ends at *to, the
// least that it may take at *low.
static bool take_item(const Tokenizer *t, const Item *item, Memo *m, const char *text, size_t at,
                      size_t end, size_t *low, size_t *to) {
    const bool any = item->most == NO_LIMIT;
    size_t length, n = 0;
    *low = *to = at;
    if (item->kind == AT_END) return at == end || text[at] == '\n';
    if (item->kind == NOT_BEFORE)
        return at == end || !next_in_class(t, item->class, text + at, end - at, &length);
    for (; *to < end && (any || n < item->most); n++) {
        if (any && n >= item->least && *to >= m->run && *to < m->run_end) {
            *to = m->run_end;
            break;
        }
        if (!next_in_class(t, item->class, text + *to, end - *to, &length)) break;
        *to += length;
        if (n + 1 == item->least) *low = *to;
    }
    if (any && (*to != m->run_end || at < m->run)) m->run = at, m->run_end = *to;
    return n >= item->least;
}

static const size_t NOWHERE = SIZE_MAX;

// Where the match of an alternative at text[at] ends, or NOWHERE. Every item takes as many
// characters as it can, and gives them back one by one while those after it do not match.
// memo [n_items]; *work counts what was looked at.
static size_t match(const Tokenizer *t, uint32_t alternative, Memo *memo, const char *text,
                    size_t at, size_t end, size_t *work) {
    const Item *item = t->items + t->alternatives[alternative];
    const size_t n = t->alternatives[alternative + 1] - t->alternatives[alternative];
    size_t from[MOST_ITEMS], low[MOST_ITEMS], to[MOST_ITEMS];
    memo += t->alternatives[alternative];
    for (size_t i = 0; i < n; at = to[i++]) {
        Memo *m = memo_of(&memo[i], text + end);
        from[i] = at;
        bool ok = (at < m->low || at > m->high) &&
                  take_item(t, &item[i], m, text, at, end, &low[i], &to[i]);
        *work += item[i].most == NO_LIMIT || !ok ? 1 : 1 + to[i] - at;
        while (!ok && i > 0) {          // back to the last item that can give a character back
            note_failure(&memo[i], text, from[i], end);
            const size_t failing = memo[i--].low;           // from there up to to[i]
            ok = failing > low[i];
            if (ok) to[i] = previous_char(text, low[i], failing);
        }
        if (!ok) return NOWHERE;
    }
    return at;
}

// What encode() works with.
typedef struct {
    const Tokenizer *t;
    int special;                // whether special tokens are looked for,
    const char *message;        // [n]  but not where this is 1; NULL: everywhere
    const char *begin;          // of the text
    int *ids;
    size_t *starts;             // where in the text each id starts, or NULL
    size_t count;
    char *cut;                  // [n + 1]  whether a piece starts at this byte
    Memo *memo;                 // [n_items]  for match()
    size_t work, most_work;     // what match() looked at, and how much that may be
    struct Symbol *symbol;      // [room]   for merge_piece()
    struct Pair *heap;          // [2 room]
    size_t room;
} Encoder;

// Adds a token to the result, which starts at this place in the text. A byte that no UTF-8 has need
// not have one, and is left out then.
static void add_id(Encoder *e, uint32_t id, const char *at) {
    if (id == NO_TOKEN) return;
    if (e->starts) e->starts[e->count] = (size_t)(at - e->begin);
    e->ids[e->count++] = (int)id;
}

// Cuts every piece of the text (n bytes) into the matches of one pattern and what is between them.
static void cut_pieces(Encoder *e, uint32_t stage, const char *text, size_t n) {
    const Tokenizer *t = e->t;
    for (size_t at = 0, end; at < n; ) {
        end = (size_t)((char *)memchr(e->cut + at + 1, 1, n - at) - e->cut);
        while (at < end) {
            uint32_t a = t->stages[stage], code;
            size_t to = NOWHERE;
            for (; a < t->stages[stage + 1] && to == NOWHERE; a++)
                to = match(t, a, e->memo, text, at, end, &e->work);
            if (e->work > e->most_work)
                fail(FAILED, "the tokenizer's patterns take too long on this text of %zu bytes", n);
            if (to != NOWHERE) e->cut[at] = e->cut[to] = 1;
            if (to != NOWHERE && to > at) at = to;
            else at += next_char(text + at, end - at, &code);
        }
    }
}

// A piece while it is merged is a linked list of symbols, of which each stays where its first byte
// was, and a heap of pairs. A pair is not taken out of the heap when one of its symbols is merged
// otherwise: it is then no longer what the merge wants, and is passed over.
typedef struct Symbol { size_t previous, next; uint32_t id; } Symbol;
typedef struct Pair { size_t at; uint32_t rank, merge; } Pair;

// The order of the heap: the lowest rank first, then from the left.
static int pair_before(const Pair *a, const Pair *b) {
    return a->rank < b->rank || (a->rank == b->rank && a->at < b->at);
}

// Adds a pair to a heap of *n.
static void heap_push(Pair *heap, size_t *n, Pair p) {
    size_t i = (*n)++;
    for (; i && pair_before(&p, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = p;
}

// Takes the first pair out of a heap of *n.
static Pair heap_pop(Pair *heap, size_t *n) {
    const Pair first = heap[0], last = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && pair_before(&heap[child + 1], &heap[child])) child++;
        if (!pair_before(&heap[child], &last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return first;
}

// Adds the pair of symbol `at` and the next one to the heap, if there is a merge for it.
static void propose(const Encoder *e, size_t at, size_t n_symbols, size_t *n_heap) {
    const Symbol *left = &e->symbol[at];
    if (left->next == n_symbols) return;
    const Merge pair = { .left = left->id, .right = e->symbol[left->next].id };
    const Merge *m = bsearch(&pair, e->t->merges, e->t->n_merges, sizeof pair, compare_merges);
    if (m) heap_push(e->heap, n_heap, (Pair){ at, m->rank, (uint32_t)(m - e->t->merges) });
}

// The tokens of a piece, by merging.
static void merge_piece(Encoder *e, const char *text, size_t n) {
    const Tokenizer *t = e->t;
    size_t n_heap = 0;
    if (n > e->room) {
        release(e->symbol);
        release(e->heap);
        e->room = checked_add(n, n);
        e->symbol = allocate(checked_mul(e->room, sizeof(Symbol)), "the tokenizer");
        e->heap = allocate(checked_mul(e->room, 2 * sizeof(Pair)), "the tokenizer");
    }
    Symbol *s = e->symbol;
    for (size_t i = 0; i < n; i++)
        s[i] = (Symbol){ i - 1, i + 1, t->byte_token[(unsigned char)text[i]] };
    for (size_t i = 0; i < n; i++) propose(e, i, n, &n_heap);
    while (n_heap) {
        const Pair pair = heap_pop(e->heap, &n_heap);
        const Merge *m = &t->merges[pair.merge];
        const size_t at = pair.at, next = s[at].next;
        if (s[at].id != m->left || next == n || s[next].id != m->right) continue;
        s[at] = (Symbol){ s[at].previous, s[next].next, m->result };
        s[next].id = NO_TOKEN;
        if (s[at].next < n) s[s[at].next].previous = at;
        propose(e, at, n, &n_heap);
        if (at) propose(e, s[at].previous, n, &n_heap);
    }
    for (size_t i = 0; i < n; i = s[i].next) add_id(e, s[i].id, text + i);
}

// The tokens of a piece: with IGNORE_MERGES the one token that is the whole piece, if there is one;
// else what merging makes of it.
static void encode_piece(Encoder *e, const char *text, size_t n) {
    const Tokenizer *t = e->t;
    if (t->flags & IGNORE_MERGES) {
        const size_t i = count_not_after(t, t->order, t->n_order, 1, text, n);
        size_t length;
        const char *token = i ? token_text(t, t->order[i - 1], &length) : NULL;
        if (i && !compare_texts(token, length, text, n)) {
            add_id(e, t->order[i - 1], text);
            return;
        }
    }
    if (t->n_merges) { merge_piece(e, text, n); return; }
    for (size_t i = 0; i < n; i++) add_id(e, t->byte_token[(unsigned char)text[i]], text + i);
}

// The tokens of a text without added tokens.
static void encode_text(Encoder *e, const char *text, size_t n) {
    memset(e->cut, 0, n);
    e->cut[n] = 1;
    for (uint32_t i = 0; i < e->t->n_stages; i++) cut_pieces(e, i, text, n);
    for (size_t at = 0, end; at < n; at = end) {
        end = (size_t)((char *)memchr(e->cut + at + 1, 1, n - at) - e->cut);
        encode_piece(e, text + at, end - at);
    }
}

// The longest added token that n bytes of text start with, of those that are NORMALIZED or, with
// pass 0, of the others; NULL if there is none. Of the tokens in order, the last one that does not
// come after the text is tried first. If it is not a beginning of the text, then any token that is
// one is also a beginning of what the two have in common, so the search goes on with that.
static const Added *added_at(const Tokenizer *t, const char *text, size_t n, uint32_t pass) {
    for (size_t i, length, common; n; n = common) {
        i = count_not_after(t, &t->added->id, t->n_added, 2, text, n);
        if (i == 0) break;
        const Added *a = &t->added[i - 1];
        const char *token = token_text(t, a->id, &length);
        for (common = 0; common < length && common < n && token[common] == text[common]; common++) ;
        if (common == length && (a->flags & NORMALIZED) == pass) return a;
        common -= common == length;     // of the other pass: a shorter one may do
    }
    return NULL;
}

// Whether a character is white space (Unicode's property White_Space).
static int is_white(uint32_t code) {
    static const uint32_t white[][2] = {
        { 0x09, 0x0D }, { 0x20, 0x20 }, { 0x85, 0x85 }, { 0xA0, 0xA0 }, { 0x1680, 0x1680 },
        { 0x2000, 0x200A }, { 0x2028, 0x2029 }, { 0x202F, 0x202F }, { 0x205F, 0x205F },
        { 0x3000, 0x3000 },
    };
    return bsearch(&code, white, sizeof white / sizeof *white, sizeof *white,
                   compare_range) != NULL;
}

// Where the white space before text[at] starts, at `low` at the earliest.
static size_t white_before(const char *text, size_t low, size_t at) {
    uint32_t code;
    while (at > low) {
        const size_t from = previous_char(text, low, at);
        next_char(text + from, at - from, &code);
        if (!is_white(code)) break;
        at = from;
    }
    return at;
}

// Where the white space from text[at] on ends, at n at the latest.
static size_t white_after(const char *text, size_t at, size_t n) {
    uint32_t code;
    while (at < n) {
        const size_t length = next_char(text + at, n - at, &code);
        if (!is_white(code)) break;
        at += length;
    }
    return at;
}

// The next added token of a pass from text[*at] on, and where it is; NULL and n if there is none.
static const Added *next_added(const Encoder *e, const char *text, size_t n, uint32_t pass,
                               size_t *at) {
    const Tokenizer *t = e->t;
    for (size_t length; *at < n; *at += length) {
        const Added *a = NULL;
        length = 1;
        if (t->starts[(unsigned char)text[*at]]) a = added_at(t, text + *at, n - *at, pass);
        if (!a) continue;
        token_text(t, a->id, &length);
        const char *message = e->message ? e->message + (text + *at - e->begin) : NULL;
        const bool named = e->special && !(message && memchr(message, 1, length));
        if (named || !(a->flags & SPECIAL)) return a;
        if (message && memchr(message, 0, length)) length = 1;  // else it is text, and all of it is
    }
    return NULL;
}

// The tokens of a text. Pass 0 finds added tokens that are not NORMALIZED, from the left and the
// longest of those at one place. Between them a second pass finds the others.
static void encode_added(Encoder *e, const char *text, size_t n, uint32_t pass) {
    for (size_t done = 0, at = 0, from, length; done < n; at = done) {
        const Added *a = next_added(e, text, n, pass, &at);
        from = at;
        if (a) {
            token_text(e->t, a->id, &length);
            at += length;
            if (a->flags & LSTRIP) from = white_before(text, done, from);
            if (a->flags & RSTRIP) at = white_after(text, at, n);
        }
        if (from > done && pass == 0) encode_added(e, text + done, from - done, NORMALIZED);
        else if (from > done) encode_text(e, text + done, from - done);
        if (a) add_id(e, a->id, text + from);
        done = at;
    }
}

// Warns, once, of text that Unicode's normal form C may change: that is not done here. A character
// is fine if it may stand in NFC and its combining class is not below that of the one before.
static void warn_of_nfc(const Tokenizer *t, const char *text, size_t n) {
    static int warned;
    uint32_t code, last = 0;
    for (size_t at = 0; at < n && !warned; ) {
        at += next_char(text + at, n - at, &code);
        const uint32_t *range = bsearch(&code, t->normal, t->n_normal, sizeof *t->normal,
                                        compare_range);
        const uint32_t class = range ? range[2] : 0;
        if (class == 255 || (class && class < last)) {
            fprintf(stderr, "%s: the text may not be in Unicode's normal form C, which this "
                    "tokenizer expects: its ids may differ\n", program);
            warned = 1;
        }
        last = class;
    }
}

// Token ids of n bytes of text; there are never more than n, and `ids` has room for that. starts,
// of the same length, tells where in the text each begins, white space that it takes along
// included; it may be NULL. With `special`, the names of special tokens written in the text become
// their ids, but not where `message`, of the same length, is 1; it may be NULL. Returns how many.
static size_t encode_around(const Tokenizer *t, int *ids, size_t *starts, const char *text,
                            size_t n, int special, const char *message) {
    Encoder e = { .t = t, .ids = ids, .starts = starts, .begin = text, .special = special,
                  .message = message };
    e.cut = allocate(checked_add(n, 1), "the tokenizer");
    e.memo = allocate(checked_mul(t->n_items, sizeof *e.memo), "the tokenizer");
    e.most_work = checked_mul(4000, checked_add(n, 1000));
    if (t->flags & NFC) warn_of_nfc(t, text, n);
    encode_added(&e, text, n, 0);
    release(e.cut);
    release(e.memo);
    release(e.symbol);
    release(e.heap);
    return e.count;
}

// encode_around() of a text without messages.
static size_t encode(const Tokenizer *t, int *ids, size_t *starts, const char *text, size_t n,
                     int special) {
    return encode_around(t, ids, starts, text, n, special, NULL);
}

// The bytes of a token, *length of them: none for special tokens and padding.
static const char *decode(const Tokenizer *t, int id, size_t *length) {
    *length = 0;
    if ((uint32_t)id >= t->n_tokens) return t->text;
    for (uint32_t i = 0; i < t->n_added; i++)
        if (t->added[i].id == (uint32_t)id && t->added[i].flags & SPECIAL) return t->text;
    return token_text(t, (uint32_t)id, length);
}

// Text on its way out, in whole characters: bytes wait until their UTF-8 character is complete, and
// what can no longer become one is printed as U+FFFD.
typedef struct { unsigned char waiting[4]; size_t n; FILE *to; } Utf8;

// Prints what is whole of the waiting bytes; with `end`, all of them.
static void utf8_flush(Utf8 *u, int end) {
    while (u->n) {
        size_t length = utf8_length(u->waiting, u->n), done = length;
        if (length > u->n) {
            if (!end) return;
            length = 0;
        }
        if (length) {
            fwrite(u->waiting, 1, length, u->to);
        } else {        // one U+FFFD for the longest beginning that could have become a character
            for (done = u->n; done > 1 && !utf8_length(u->waiting, done); done--) ;
            fputs("\xEF\xBF\xBD", u->to);
        }
        memmove(u->waiting, u->waiting + done, u->n -= done);
    }
}

// Adds n bytes to the output; what they complete is printed.
static void utf8_print(Utf8 *u, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        u->waiting[u->n++] = (unsigned char)bytes[i];
        utf8_flush(u, 0);
    }
}
#endif // TOKENIZER_H
