// tests/failing.c - a library that tests load in front of the C library (LD_PRELOAD), for what
// cannot be had otherwise: calls that fail, disks that are full, clocks that jump, limits on
// memory. It needs glibc. What it pretends is said by the environment:
//
//     FAIL_CALL=fwrite:3      the third call of fwrite fails as it does on a full disk
//     FAIL_CALL=fwrite:0      none fails
//     FAIL_COUNT=FILE         FILE gets a character for each call of that function: of fclose for
//                             files that are written, and not removed before, of fsync for files
//                             alone, of fsync-folder for folders
//     CGROUPS=FOLDER          what is opened in /sys/fs/cgroup, and /proc/self/cgroup, is in FOLDER
//     SMALL_DISK=1            statvfs() knows of disks with room for 2000 bytes
//     CLOCK_JUMPS=1           the time of day jumps back and forth by hours; other clocks do not
//
// A call that fails has the effects of one that fails: fclose and close close their file, and a
// stream that could not be read, written or flushed has its error indicator set.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern int __open(const char *, int, ...), __close(int);
extern ssize_t __write(int, const void *, size_t);

// The next function of a name behind this library, as a pointer of the type of that here.
#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

// Counts a call, and says whether it is the one that fails. Allocates nothing: malloc comes here.
static int fails(const char *name) {
    static int number, count_file = -2;
    static long calls;
    const char *wanted = getenv("FAIL_CALL"), *path = getenv("FAIL_COUNT");
    const size_t length = strlen(name);
    if (!wanted || strncmp(wanted, name, length) || wanted[length] != ':') return 0;
    if (count_file == -2) {
        number = atoi(wanted + length + 1);
        count_file = path ? __open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    }
    const int error = errno;
    if (count_file >= 0 && __write(count_file, "x", 1) < 0) count_file = -1;
    errno = error;
    return __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) == number;
}
// What a call returns that fails, with its reason.
#define FAILS(name, error, result) if (fails(name)) return errno = (error), (result)

// ---- memory -------------------------------------------------------------------------------------

void *malloc(size_t n) { FAILS("malloc", ENOMEM, NULL); return __libc_malloc(n); }
void *calloc(size_t n, size_t size) {
    FAILS("calloc", ENOMEM, NULL);
    return __libc_calloc(n, size);
}
void *realloc(void *p, size_t n) { FAILS("realloc", ENOMEM, NULL); return __libc_realloc(p, n); }
void *mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    FAILS("mmap", ENOMEM, MAP_FAILED);
    return REAL(mmap)(at, n, protection, flags, file, offset);
}

// ---- files --------------------------------------------------------------------------------------

static void set_error(FILE *f) { f->_flags |= 0x20; }          // glibc's _IO_ERR_SEEN

FILE *fopen(const char *path, const char *mode) {
    const char *root = getenv("CGROUPS");
    char other[4096];
    FAILS("fopen", EMFILE, NULL);
    if (root && (!strncmp(path, "/sys/fs/cgroup", 14) || !strcmp(path, "/proc/self/cgroup"))) {
        snprintf(other, sizeof other, "%s%s", root, path);
        path = other;
    }
    return REAL(fopen)(path, mode);
}
FILE *fdopen(int file, const char *mode) {
    FAILS("fdopen", ENOMEM, NULL);
    return REAL(fdopen)(file, mode);
}
int open(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    FAILS("open", EMFILE, -1);
    return __open(path, flags, mode);
}
size_t fread(void *to, size_t size, size_t n, FILE *f) {
    if (fails("fread")) return set_error(f), errno = EIO, 0;
    return REAL(fread)(to, size, n, f);
}
size_t fwrite(const void *from, size_t size, size_t n, FILE *f) {
    if (fails("fwrite")) return set_error(f), errno = ENOSPC, 0;
    return REAL(fwrite)(from, size, n, f);
}
int fflush(FILE *f) {
    if (f && fails("fflush")) return set_error(f), errno = ENOSPC, EOF;
    return REAL(fflush)(f);
}
int fseeko(FILE *f, off_t at, int from) {
    FAILS("fseeko", EIO, -1);
    return REAL(fseeko)(f, at, from);
}
int fsync(int file) {
    struct stat info;
    if (!fstat(file, &info)) FAILS(S_ISDIR(info.st_mode) ? "fsync-folder" : "fsync", EIO, -1);
    return REAL(fsync)(file);
}
int rename(const char *from, const char *to) {
    FAILS("rename", EACCES, -1);
    return REAL(rename)(from, to);
}
int fclose(FILE *f) {
    struct stat info = { 0 };
    fstat(fileno(f), &info);
    const int matters = !(f->_flags & 8) && info.st_nlink;      // glibc's _IO_NO_WRITES
    const int result = REAL(fclose)(f);
    if (matters) FAILS("fclose", EDQUOT, EOF);
    return result;
}
int close(int file) {
    const int result = __close(file);
    FAILS("close", EIO, -1);
    return result;
}
int statvfs(const char *path, struct statvfs *s) {
    const int result = REAL(statvfs)(path, s);
    if (getenv("SMALL_DISK")) s->f_frsize = 1000, s->f_bavail = 2;
    return result;
}

// Programs that look for large files know these functions by other names.
FILE *fopen64(const char *path, const char *mode) { return fopen(path, mode); }
int fseeko64(FILE *f, off64_t at, int from) { return fseeko(f, at, from); }
int statvfs64(const char *path, struct statvfs64 *s) {
    const int result = REAL(statvfs64)(path, s);
    if (getenv("SMALL_DISK")) s->f_frsize = 1000, s->f_bavail = 2;
    return result;
}
int open64(const char *path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    const mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open(path, flags, mode);
}
void *mmap64(void *at, size_t n, int protection, int flags, int file, off64_t offset) {
    return mmap(at, n, protection, flags, file, offset);
}

// ---- the time of day ----------------------------------------------------------------------------

// Seconds that the time of day is off: another number at each call.
static long off(void) {
    static unsigned calls;
    if (!getenv("CLOCK_JUMPS")) return 0;
    return (long)(__atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) * 7919 % 100000) - 50000;
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    const int result = REAL(clock_gettime)(clock, t);
    if (clock == CLOCK_REALTIME) t->tv_sec += off();
    return result;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    const int result = REAL(gettimeofday)(t, zone);
    t->tv_sec += off();
    return result;
}
time_t time(time_t *t) {
    const time_t now = REAL(time)(NULL) + off();
    if (t) *t = now;
    return now;
}
