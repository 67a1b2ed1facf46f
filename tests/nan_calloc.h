// tests/nan_calloc.h - memory that nobody has written yet is full of NaN, and of numbers that no
// index may have, where it comes from allocate() of lib/base.h. Included in front of a program:
//
//     cc -include tests/nan_calloc.h -o build/nan/run run.c -lm
//
// allocate() promises zeros, and where that is made use of (see tests/poison.py) zeros it remains.
// All else must be written before it is read, or the arithmetic, which is the same, ends in NaN;
// and valgrind, to which zeros from calloc() are as good as any number, knows what is not written.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What counts on zeros, by the second argument of allocate(), and why. Names in the environment
// variable ZEROED, between bars, are zeroed, too (poison.py --find).
static const char *const zeroed[] = {
    "AdamW's first moments", "AdamW's second moments",     // they start at 0
    "the gradients",                // the first step adds to them; AdamW then clears them
    "the weights",                  // what is between tensors, up to multiples of 64 bytes
    "a config",                     // zeros behind its lines, up to a multiple of 64 bytes
    "the edits",                    // how many there are, and which kinds: none at first
    "the name of a token", "a problem",     // the NUL at their end
    "the sampler",                  // which tokens were seen: none
    "the tokenizer",                // the bytes that start an added token; what is in which class;
};                                  // in whose piece something is known about an item: in none

static void *poisoned_calloc(size_t bytes, const char *what) {
    const char *more = getenv("ZEROED");
    char name[100];
    snprintf(name, sizeof name, "|%s|", what);
#ifdef FIND_ZEROED
    const size_t first = sizeof zeroed / sizeof *zeroed;
#else
    const size_t first = 0;
#endif
    for (size_t i = first; i < sizeof zeroed / sizeof *zeroed; i++)
        if (!strcmp(zeroed[i], what)) return calloc(bytes, 1);
    if (more && strstr(more, name)) return calloc(bytes, 1);
    void *block = malloc(bytes);
#ifndef LEFT_UNWRITTEN          // what memset writes, valgrind takes for written
    if (block) memset(block, 0xFF, bytes);
#endif
    return block;
}
#define calloc(n, size) poisoned_calloc((n) * (size), what)
