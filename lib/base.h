// lib/base.h - what any C program needs: errors, memory, threads, a clock, random numbers.
//
// Every failure is one line "program: thing: what was found, what was expected" and an exit code: 1
// for what goes wrong while running, 2 for wrong usage. Nothing here tries to survive a failed
// allocation: there is nothing sensible that a program whose model does not fit could go on with.
//
// Contents: precision, errors, sizes and memory, clocks, threads, a busy machine,
// sharing out work, functions that take most of the time, random numbers, the standard files.
#ifndef BASE_H
#define BASE_H
#define COE_VERSION "1.0"
#ifndef _XOPEN_SOURCE
#define _XOPEN_SOURCE 700               // POSIX of 2008, and realpath()
#endif
#define _FILE_OFFSET_BITS 64            // files beyond 2 GB, where long has 32 bits
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile without -ffast-math (or -Ofast): sums would change, and NaN would go unnoticed"
#endif
#if defined(__i386__) && !defined(__SSE2__) && !defined(__clang__)
#pragma GCC target("sse2,fpmath=sse")   // floats that are floats, not parts of longer ones
#endif
#include <ctype.h>      // isspace
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>     // offsetof
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#if !defined(_WIN32) && !defined(__wasi__)
#define POSIX           // files with links, locks and modes; mapped files; all signals
#endif
#ifdef __wasi__         // WebAssembly knows no signals
typedef int sig_atomic_t;
#else
#include <signal.h>
#endif
#include <fcntl.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// ---- precision ----------------------------------------------------------------------------------

#ifndef REAL            // the gradient check compiles the whole model with REAL double
#define REAL float
#define REAL_IS_FLOAT
#endif
typedef REAL real;

// ---- errors -------------------------------------------------------------------------------------

static const char *program = "coe";
enum { FAILED = 1, WRONG_USAGE = 2, INTERRUPTED = 130 };       // exit codes

// Prints one line to stderr and ends the program with `code`.
static _Noreturn void fail(int code, const char *format, ...) {
    va_list args;
    fflush(stdout);
    fprintf(stderr, "%s: ", program);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(code);
}

// Whether one of these is a terminal, on which a line can be redrawn or dimmed.
static int stderr_is_terminal(void) { return isatty(2); }
static int stdout_is_terminal(void) { return isatty(1); }

// What is to be done when a signal ends the program, or NULL.
static void (*on_sudden_end)(void);

// Prints a text on stderr, from a signal handler, in which little else than write() is allowed.
static void say(const char *text) {
    if (*text && write(2, text, (unsigned)strlen(text)) < 0) return;
}

// ---- sizes and memory ---------------------------------------------------------------------------

// The file, or what else, whose sizes are worked with.
static const char *whose_sizes = "the model";

// a * b. Every size in this project passes through here or through checked_add: a product that
// wraps around would be a small allocation followed by large writes.
static size_t checked_mul(size_t a, size_t b) {
    size_t c;
    if (__builtin_mul_overflow(a, b, &c))
        fail(FAILED, "%s: sizes too large: %zu x %zu does not fit %zu bits", whose_sizes, a, b,
             8 * sizeof c);
    return c;
}

// a + b, or the end of the program where that wraps around.
static size_t checked_add(size_t a, size_t b) {
    size_t c;
    if (__builtin_add_overflow(a, b, &c))
        fail(FAILED, "%s: sizes too large: %zu + %zu does not fit %zu bits", whose_sizes, a, b,
             8 * sizeof c);
    return c;
}

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

enum { CACHE_LINE = 64 };       // bytes; also the alignment of everything, and of the widest vector

// A size rounded up to whole cache lines.
static size_t whole_lines(size_t bytes) {
    return checked_add(bytes, CACHE_LINE - 1) & ~(size_t)(CACHE_LINE - 1);
}

// `bytes` of zeroed memory at a multiple of CACHE_LINE, for release(); `what` is for the error
// message. Large blocks come from the system as untouched pages and cost nothing until they are
// used.
static void *allocate(size_t bytes, const char *what) {
    void *block = calloc(checked_add(bytes, CACHE_LINE + sizeof(void *)), 1);
    if (!block) fail(FAILED, "out of memory: %.1f MB for %s", (double)bytes / 1e6, what);
    const uintptr_t first = (uintptr_t)block + sizeof(void *) + CACHE_LINE - 1;
    const uintptr_t aligned = first & ~(uintptr_t)(CACHE_LINE - 1);
    ((void **)aligned)[-1] = block;     // where release() finds what calloc returned
    return (void *)aligned;
}

// Gives back what allocate() gave, or does nothing for NULL.
static void release(void *aligned) { if (aligned) free(((void **)aligned)[-1]); }

// A block of memory that is dealt out from its beginning. Without memory (base NULL) an arena only
// counts, so that one function both measures what it needs and places it.
typedef struct { char *base; size_t used; } Arena;

// n * size bytes at a multiple of CACHE_LINE, or NULL while the arena only counts.
static void *take(Arena *arena, size_t n, size_t size) {
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used = whole_lines(checked_add(arena->used, checked_mul(n, size)));
    return p;
}

// ---- clocks -------------------------------------------------------------------------------------

// Seconds from some fixed point.
static double clock_seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// On a clock that nobody can set back.
static double seconds(void) { return clock_seconds(CLOCK_MONOTONIC); }

// ---- threads ------------------------------------------------------------------------------------

enum { MOST_THREADS = 1024 };

static struct {
    int all, working;           // threads that there are, and that are at work
    bool watched, said;         // whether `working` follows what others leave; a line was printed
    double start, cpu;          // when the present stretch of time began, and processor time then
    double inside, begin;       // how much of it was spent in loops, and when the last one began
    double pause, again;        // how long to wait before all try again, and when that is
} team;

#ifdef _OPENMP
// Whether several threads are at work here already.
static int at_work(void) { return omp_in_parallel(); }
// The number of the running thread, from 0, and how many are in its team.
static int thread_id(void) { return omp_get_thread_num(); }
static int team_size(void) { return omp_get_num_threads(); }
// How many were asked for, and cores for them.
static int wanted_threads(void) { return omp_get_max_threads(); }
static int cores(void) { return omp_get_num_procs(); }
#else
static int at_work(void)        { return 0; }
static int thread_id(void)      { return 0; }
static int team_size(void)      { return 1; }
static int wanted_threads(void) { return 1; }
static int cores(void)          { return 1; }
#endif

// Uses n threads; with 0 as many as OMP_NUM_THREADS says, or where that makes no sense the machine.
static void set_threads(size_t n) {
    if (!n) n = (size_t)wanted_threads();
    const int most = cores() < MOST_THREADS ? cores() : MOST_THREADS;
    team.all = team.working = n >= 1 && n <= MOST_THREADS ? (int)n : most;
    team.watched = team.all > 1 && team.all <= cores() && !getenv("OMP_WAIT_POLICY") &&
                   !getenv("GOMP_SPINCOUNT") && !getenv("KMP_BLOCKTIME");
#ifdef _OPENMP
    omp_set_num_threads(team.all);
#else
    team.all = team.working = 1;
#endif
}

// The most threads that there can be, for memory that each of them needs.
static int thread_count(void) {
    if (!team.all) set_threads(0);
    return team.all;
}

// ---- a busy machine -----------------------------------------------------------------------------
// Threads wait for each other at the end of every loop that they share. Where other programs want
// the same cores, one of them is held up for milliseconds again and again while the rest wait, and
// two threads can be ten times slower than one. It shows: a thread that waits goes round in a loop
// for some time before it sleeps (unless the environment says otherwise), so that on an idle
// machine the processor time of a team is the time that passed times its threads. What is missing
// was taken by others. Then fewer threads work, and all of them try again after a pause, which
// becomes longer each time that this fails.

static const double STRETCH = 0.02, LONGEST_PAUSE = 10, WORTH_A_LINE = 0.5;     // seconds
#ifdef _OPENMP
static double cpu_seconds(void) { return clock_seconds(CLOCK_PROCESS_CPUTIME_ID); }

// Begins another stretch of time.
static void watch(double now) { team.start = now, team.cpu = cpu_seconds(), team.inside = 0; }

// Lets all threads try again. The stretch that ends says what the others cost: a line, if it lasts.
static void try_all_threads(double now) {
    const double stretch = now - team.start;
    if (team.pause > WORTH_A_LINE && !team.said && stretch < team.pause) {  // no wait for a user
        team.said = true;
        fprintf(stderr, "%s%s: other programs keep this machine busy: %d of %d threads work%s, and "
                "it takes %.1f times as long as it would alone\n",
                stderr_is_terminal() ? "\n" : "", program, team.working, team.all,
                team.working == 1 ? "s" : "",
                team.all * stretch / (cpu_seconds() - team.cpu));
    }
    team.working = team.all;
    watch(now);
}

// Called before a loop that threads share.
static void team_begins(void) {
    if (!team.watched) return;
    team.begin = seconds();
    if (team.working < team.all && team.begin >= team.again) try_all_threads(team.begin);
}

// Called after it: says how many threads work from now on, once a stretch of time is over.
static void team_ends(void) {
    if (!team.watched) return;
    const double now = seconds(), stretch = now - team.start;
    team.inside += now - team.begin;
    if (stretch < STRETCH) return;
    const double own = cpu_seconds() - team.cpu, outside = stretch - team.inside;
    const double taken = (team.working * team.inside + outside - own) / stretch;    // cores
    if (taken > 0.4 && team.inside > 0.75 * stretch) {
        const int left = team.working - (int)(2 * taken + 0.5);     // two who share have half each
        team.working = left > 1 ? left : 1;
        team.again = now + team.pause;
        team.pause = 2 * team.pause < LONGEST_PAUSE ? 2 * team.pause : LONGEST_PAUSE;
    } else if (team.working == team.all) {
        team.pause = STRETCH;
    }
    watch(now);
}
#else
static void try_all_threads(double now) { (void)now; }
static void team_begins(void) {} static void team_ends(void) {}
#endif

// ---- sharing out work ---------------------------------------------------------------------------
// Two macros do it, SHARED and TASKS. Threads share out results, never the terms of one sum: so any
// number of them computes the same bits.

// Whether work of this many operations repays waking the other threads, which takes a few
// microseconds. Where all are at work already it does not.
static int worth_threads(size_t operations) {
    if (operations <= 20000 || thread_count() == 1 || at_work()) return 0;
    if (team.working == 1 && seconds() >= team.again) try_all_threads(seconds());
    return team.working > 1;
}

// SHARED(operations, for (...) { ... }) is that loop, whose rounds are independent and about
// equally long, on all threads if that is worth it. If not, the loop does not reach the pragma:
// OpenMP would make a team of one thread, which takes longer than a small loop.
#define SHARED(operations, ...) \
    if (worth_threads(operations)) { \
        team_begins(); \
        _Pragma("omp parallel for num_threads(team.working)") __VA_ARGS__ \
        team_ends(); \
    } else { __VA_ARGS__ }

// TASKS(operations, task, count, { ... }) runs the block for every `task` below count, on all
// threads if that is worth it, each thread taking one task after another: for tasks that are long,
// or not equally so.
#define TASKS(operations, task, count, ...) \
    if (worth_threads(operations)) { \
        Work work_ = { .tasks = (count) }; \
        team_begins(); \
        _Pragma("omp parallel num_threads(team.working)") \
        for (size_t task; (task = next_task(&work_)) < work_.tasks; ) __VA_ARGS__ \
        team_ends(); \
    } else { \
        for (size_t task = 0; task < (count); task++) __VA_ARGS__ \
    }

// The tasks of a team, counted from 0. A thread begins with a share of its own, the same every
// time, because what it wrote there before is in its cache; then it helps the others, which may be
// slower or disturbed. taken[i]: how many tasks of thread i's share are taken.
typedef struct { size_t tasks; unsigned taken[MOST_THREADS]; } Work;

// A task that nobody has taken yet, or w->tasks when there is none.
static size_t next_task(Work *w) {
    const size_t threads = (size_t)team_size(), me = (size_t)thread_id();
    for (size_t i = 0; i < threads; i++) {
        const size_t who = (me + i) % threads, first = w->tasks * who / threads;
        const size_t share = w->tasks * (who + 1) / threads - first;
        const size_t task = __atomic_fetch_add(&w->taken[who], 1, __ATOMIC_RELAXED);
        if (task < share) return first + task;
    }
    return w->tasks;
}

// ---- functions that take most of the time -------------------------------------------------------
// WIDE marks them. A build for any x86-64 may count on vectors of 16 bytes only, and on no fused
// multiply-adds, but nearly all of these machines have more. So such a build has each WIDE function
// twice, and when the program starts, the one that the processor can run is linked. It is then half
// as fast as a build for the widest vectors, instead of a fifth. (-DONE_VERSION does without.)
// INLINE functions are the insides of WIDE ones.

#if defined(__x86_64__) && !defined(__AVX__) && defined(__GLIBC__) && !defined(ONE_VERSION)
#if __has_attribute(target_clones)
#define TWO_VERSIONS
// It warns that how a vector is passed to a function depends on the version; only INLINE functions
// are passed any, so nobody is concerned.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#endif

#if defined(TWO_VERSIONS)
#define WIDE __attribute__((target_clones("default", "fma")))
#define INLINE static inline __attribute__((always_inline))
#elif defined(__clang__) && __has_attribute(min_vector_width)
// clang would split 64-byte vectors in two, for processors on which they slow down the clock.
#define WIDE __attribute__((min_vector_width(512)))
#define INLINE WIDE static inline __attribute__((always_inline))
#else
#define WIDE
#define INLINE static inline __attribute__((always_inline))
#endif

// ---- random numbers -----------------------------------------------------------------------------
// splitmix64 (Steele, Lea, Flood 2014). Its state is a counter, so a stream can start anywhere: any
// number is as good a seed as any other.

// The next 64 random bits of the stream whose state is *state.
static uint64_t rng_next(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Uniform in [0, 1), with 53 random bits.
static double rng_uniform(uint64_t *state) { return (double)(rng_next(state) >> 11) * 0x1p-53; }

// Normal with mean 0 and deviation 1 (Box and Muller 1958; the pair's second value is not used).
static double rng_normal(uint64_t *state) {
    double radius = sqrt(-2 * log(1 - rng_uniform(state)));
    return radius * cos(6.283185307179586 * rng_uniform(state));
}

// ---- the standard files -------------------------------------------------------------------------

// A closed stdin, stdout or stderr would leave its number to the next file that is opened, and what
// is meant for it would end up there. So /dev/null stands in, and writing to it fails.
static void occupy_standard_files(void) {
#ifdef POSIX
    int file = open("/dev/null", O_RDONLY);
    while (file >= 0 && file < 3) file = open("/dev/null", O_RDONLY);
    if (file >= 0) close(file);
    signal(SIGPIPE, SIG_IGN);       // a closed pipe shows as a failed write, with a message
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);       // and so does a file that becomes longer than is allowed
#endif
#endif
}

// Sends off what was printed. A full disk or a closed pipe is an error: nobody gets the result.
static void flush_stdout(void) {
    if (fflush(stdout) || ferror(stdout))
        fail(FAILED, "stdout: cannot be written: %s", strerror(errno));
}

enum { DECIMAL_TEXT = 400 };        // enough for the largest double with all its digits
// x with 9 significant digits, never with an exponent, for tables and logs. Returns `text`.
static const char *decimal(char text[DECIMAL_TEXT], double x) {
    int digits = x == 0 || !isfinite(x) ? 8 : 8 - (int)floor(log10(fabs(x)));
    snprintf(text, DECIMAL_TEXT, "%.*f", digits < 0 ? 0 : digits > 60 ? 60 : digits, x);
    return text;
}

// The index of the largest of n numbers, the lowest among equals.
static size_t argmax(const real *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++) if (x[i] > x[best]) best = i;
    return best;
}
#endif // BASE_H
