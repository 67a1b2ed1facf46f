// lib/task.h - the built-in task.
//
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

#ifndef TASK_H
#define TASK_H

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

static const int64_t NO_ANSWER = INT64_MIN;

// The n of the first line that begins with "####", or NO_ANSWER if there is none or if that line is
// anything but "#### n" with its newline: what was cut off in the middle of n is not an answer.
// Commas in n, as in 1,080, are passed over.
static int64_t task_answer(const char *text) {
    const char *s = strncmp(text, "####", 4) == 0 ? text : strstr(text, "\n####");
    if (!s) return NO_ANSWER;
    s += *s == '\n';
    if (strncmp(s, "#### ", 5)) return NO_ANSWER;
    const bool negative = s[5] == '-';
    int64_t n = 0;
    int digits = 0;
    for (s += 5 + negative; (*s >= '0' && *s <= '9') || (*s == ',' && digits); s++) {
        if (*s == ',') continue;
        if (++digits > 18 || (n == 0 && digits > 1)) return NO_ANSWER;      // no zeros in front
        n = 10 * n + (*s - '0');
    }
    return digits && *s == '\n' ? (negative ? -n : n) : NO_ANSWER;
}
#endif // TASK_H
