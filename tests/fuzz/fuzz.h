// tests/fuzz/fuzz.h - what the fuzz targets share: a program that runs again and again in one
// process, on inputs that clang's libFuzzer makes.
//
// A target includes this file, then run.c or train.c as they stand, and gives fuzz() something to
// do with an input. The programs end with exit(), keep memory and files until then, and begin with
// variables that are 0. So here macros turn exit() into a jump back to fuzz(), which gives back
// what is left and sets all variables of the program to what they were at first.
//
// Contents: the end of a program, memory, files, variables, an input.
#ifndef FUZZ_H
#define FUZZ_H
#define _GNU_SOURCE
#define _XOPEN_SOURCE 700
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// ---- the end of a program -----------------------------------------------------------------------

// What is wrong and no sanitizer can see.
#define FUZZ_MUST(condition) \
    if (!(condition)) { fprintf(stderr, "must be: %s\n", #condition); __builtin_trap(); }

static jmp_buf fuzz_end;
static void (*fuzz_at_exit)(void);  // what the program asks for with atexit()
static bool fuzz_must_go_on;        // whether it would be a fault if the program ended now

static _Noreturn void fuzz_exit(int code) {
    (void)code;
    FUZZ_MUST(!fuzz_must_go_on);
    longjmp(fuzz_end, 1);
}

// Ends an input that asks for more work than a fuzzer has time for. A program that is told to print
// a billion problems does so, which is no fault.
static size_t fuzz_work;
static void fuzz_spend(size_t work) {
    enum { MOST_WORK = 30000 };
    fuzz_work += work;
    if (fuzz_work > MOST_WORK) fuzz_exit(0);
}

static int fuzz_puts(const char *text) {
    fuzz_spend(10);
    return fputs(text, stdout), putchar('\n');
}

// ---- memory -------------------------------------------------------------------------------------
// Blocks that are not freed yet are in a list. A block that is too large, or one too many, is not
// to be had, which a program must survive like any machine without memory.

enum { MOST_BLOCKS = 1 << 14, MOST_BYTES = 1 << 26 };
typedef struct { void *start, *block; size_t bytes; } FuzzBlock;
static FuzzBlock fuzz_blocks[MOST_BLOCKS];
static size_t fuzz_n_blocks, fuzz_bytes;

// A block of zeros for the list. allocate() in lib/base.h asks for 72 bytes more than it needs,
// finds a multiple of 64 in them, and notes in the 8 bytes before that where the block begins. So
// that the address sanitizer sees an access that is one byte off, the block begins where 71 bytes
// are needed in front of the multiple of 64, and all but these 8 are out of bounds.
enum { LINE = 64, IN_FRONT = 71, MORE = 72 };
static void *fuzz_calloc(size_t n, size_t size) {
    size_t bytes;
    fuzz_spend(1);
    if (__builtin_mul_overflow(n, size, &bytes) || bytes > MOST_BYTES - fuzz_bytes) return NULL;
    if (fuzz_n_blocks == MOST_BLOCKS) return NULL;
    char *start = calloc(bytes + 2 * LINE, 1), *block = start;
    if (!start) return NULL;
    FUZZ_MUST(bytes >= MORE);
    while (((uintptr_t)block + IN_FRONT) % LINE) block++;
    char *aligned = block + IN_FRONT, *end = aligned + bytes - MORE;
    ASAN_POISON_MEMORY_REGION(start, (size_t)(aligned - 8 - start));
    ASAN_POISON_MEMORY_REGION(end, (size_t)(start + bytes + 2 * LINE - end));
    fuzz_blocks[fuzz_n_blocks++] = (FuzzBlock){ start, block, bytes };
    fuzz_bytes += bytes;
    return block;
}

// Takes block number i off the list.
static void fuzz_give_back(size_t i) {
    const FuzzBlock b = fuzz_blocks[i];
    fuzz_blocks[i] = fuzz_blocks[--fuzz_n_blocks];
    fuzz_bytes -= b.bytes;
    free(b.start);
}

static size_t fuzz_find(const void *block) {
    size_t i = fuzz_n_blocks;
    while (i-- > 0) if (fuzz_blocks[i].block == block) return i;
    FUZZ_MUST(!"a block that is freed was allocated");
    return 0;
}

static void fuzz_free(void *block) { if (block) fuzz_give_back(fuzz_find(block)); }

// Blocks that grow are no multiple of 64 and need nothing in front.
static void *fuzz_realloc(void *old, size_t bytes) {
    const size_t before = old ? fuzz_blocks[fuzz_find(old)].bytes : 0;
    if (bytes > MOST_BYTES - fuzz_bytes || fuzz_n_blocks == MOST_BLOCKS) return NULL;
    char *block = malloc(bytes);
    if (!block) return NULL;
    if (old) memcpy(block, old, before < bytes ? before : bytes);
    fuzz_free(old);
    fuzz_blocks[fuzz_n_blocks++] = (FuzzBlock){ block, block, bytes };
    fuzz_bytes += bytes;
    return block;
}

// realpath() with memory of its own, as the programs use it.
static char *fuzz_realpath(const char *path, char *none) {
    char *found = realpath(path, none), *copy = NULL;
    if (found) copy = fuzz_realloc(NULL, strlen(found) + 1);
    if (copy) strcpy(copy, found);
    free(found);
    return copy;
}

// ---- files --------------------------------------------------------------------------------------
// The programs may open the files fuzz-... in the folder that the target runs in, and no others:
// an input that says where to write must not be able to.

enum { MOST_FILES = 64 };
static FILE *fuzz_files[MOST_FILES];
static char fuzz_folder[4096];

static bool fuzz_allowed(const char *path) {
    const size_t n = strlen(fuzz_folder);
    if (!strncmp(path, fuzz_folder, n) && path[n] == '/') path += n + 1;
    else if (!strncmp(path, "./", 2)) path += 2;
    const bool allowed = !strncmp(path, "fuzz-", 5) && !strchr(path, '/');
    if (!allowed) errno = EACCES;
    return allowed;
}

static FILE *fuzz_keep(FILE *file) {
    for (int i = 0; file && i < MOST_FILES; i++)
        if (!fuzz_files[i]) return fuzz_files[i] = file;
    FUZZ_MUST(!file);
    return NULL;
}

// File numbers that are open: at most a few at a time.
static int fuzz_numbers[MOST_FILES];        // 0: none

static int fuzz_open(const char *path, int flags, ...) {
    const int file = fuzz_allowed(path) ? open(path, flags, 0666) : -1;
    for (int i = 0; file > 0 && i < MOST_FILES; i++)
        if (!fuzz_numbers[i]) { fuzz_numbers[i] = file; break; }
    return file;
}

// Takes a number off the list; returns it.
static int fuzz_forget(int file) {
    for (int i = 0; i < MOST_FILES; i++) if (fuzz_numbers[i] == file) fuzz_numbers[i] = 0;
    return file;
}

static FILE *fuzz_fopen(const char *path, const char *mode) {
    return fuzz_allowed(path) ? fuzz_keep(fopen(path, mode)) : NULL;
}

static int fuzz_fclose(FILE *file) {
    for (int i = 0; i < MOST_FILES; i++) if (fuzz_files[i] == file) fuzz_files[i] = NULL;
    return fclose(file);
}

// A mapped file is a block like others: the address sanitizer knows where that ends.
static void *fuzz_mmap(void *at, size_t bytes, int protection, int flags, int file, off_t from) {
    (void)at, (void)protection, (void)flags;
    char *block = fuzz_calloc(bytes + MORE, 1);
    if (!block) { errno = ENOMEM; return MAP_FAILED; }
    FUZZ_MUST(pread(file, block + IN_FRONT, bytes, from) == (ssize_t)bytes);
    return block + IN_FRONT;
}

static int fuzz_munmap(void *map, size_t bytes) {
    (void)bytes;
    fuzz_free((char *)map - IN_FRONT);
    return 0;
}

// Makes a file for the program to read.
static void fuzz_file(const char *name, const void *bytes, size_t n) {
    FILE *file = fopen(name, "wb");
    FUZZ_MUST(file && fwrite(bytes, 1, n, file) == n);
    FUZZ_MUST(!fclose(file));
}

// ---- variables ----------------------------------------------------------------------------------
// From here on the variables of this file, which is the program's text, lie in two sections, whose
// bounds the linker tells. So they can all be set back, those inside of functions as well.

extern char __start_coe_data[], __stop_coe_data[], __start_coe_bss[], __stop_coe_bss[];

// Copies byte by byte, where the address sanitizer does not look: there are gaps between variables.
__attribute__((no_sanitize("address", "undefined"), optnone))
static void fuzz_copy(char *to, const char *from, size_t n) {
    for (size_t i = 0; i < n / 8; i++) ((volatile uint64_t *)to)[i] = ((const uint64_t *)from)[i];
    for (size_t i = n / 8 * 8; i < n; i++) ((volatile char *)to)[i] = from[i];
}

static void fuzz_reset(void) {
    static char *data, *bss;
    const size_t n_data = (size_t)(__stop_coe_data - __start_coe_data),
                 n_bss = (size_t)(__stop_coe_bss - __start_coe_bss);
    if (!data) {
        data = malloc(n_data);
        bss = malloc(n_bss);
        fuzz_copy(data, __start_coe_data, n_data);
        fuzz_copy(bss, __start_coe_bss, n_bss);
        FUZZ_MUST(getcwd(fuzz_folder, sizeof fuzz_folder));
    }
    fuzz_copy(__start_coe_data, data, n_data);
    fuzz_copy(__start_coe_bss, bss, n_bss);
}

// ---- an input -----------------------------------------------------------------------------------

// Does something with an input, until its end or the program's, and leaves no trace of it.
static void fuzz(void (*work)(const uint8_t *data, size_t n), const uint8_t *data, size_t n) {
    fuzz_reset();
    fuzz_work = 0;
    fuzz_must_go_on = false;
    if (!setjmp(fuzz_end)) work(data, n);
    if (fuzz_at_exit) fuzz_at_exit();
    fuzz_at_exit = NULL;
    for (int i = 0; i < MOST_FILES; i++) {
        if (fuzz_files[i]) fclose(fuzz_files[i]), fuzz_files[i] = NULL;
        if (fuzz_numbers[i]) close(fuzz_numbers[i]), fuzz_numbers[i] = 0;
    }
    while (fuzz_n_blocks) fuzz_give_back(fuzz_n_blocks - 1);
}

// The sanitizers' settings: what the programs leave behind is given back above.
const char *__asan_default_options(void) {
    return "detect_leaks=0:quarantine_size_mb=8:allocator_may_return_null=1:handle_segv=1";
}

#define exit fuzz_exit
#define puts fuzz_puts
#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define free fuzz_free
#define realpath fuzz_realpath
#define fopen fuzz_fopen
#define fdopen(file, mode) fuzz_keep(fdopen(fuzz_forget(file), mode))
#define fclose fuzz_fclose
#define open fuzz_open
#define close(file) close(fuzz_forget(file))
#define mmap fuzz_mmap
#define munmap fuzz_munmap
#define fsync(file) ((void)(file), 0)           // takes long
#define atexit(function) (fuzz_at_exit = (function))
#define signal(number, handler) ((void)(number), (void)(handler))
#define sigaction(number, new, old) ((void)(new), 0)
#define main program_main
#pragma clang section bss="coe_bss" data="coe_data"
#endif // FUZZ_H
