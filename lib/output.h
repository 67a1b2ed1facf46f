// lib/output.h - output files that are whole or absent, and never a file that is needed elsewhere.
//
// A file is written under another name and renamed once it is complete and on the disk: whoever
// finds the file finds all of it. Until the rename the old file is there, afterwards the new one;
// whenever the power fails, one of them is whole. A link stays one, and the file that it leads to
// keeps its mode.
//
// The other name is PATH.tmp-PROCESS-0, and its file is locked as long as that process lives. So
// two programs that write one file do not meet, and whoever comes next can tell what a killed one
// has left, and removes it. (export.py does likewise, with folders.)
#ifndef OUTPUT_H
#define OUTPUT_H
#ifdef POSIX
#include <dirent.h>
#include <sys/statvfs.h>
#endif

typedef struct {
    FILE *file;
    const char *path;
    char *target;               // where the path leads; NULL: something that is no file
    char *temporary;            // the other name
} Output;

// ---- what a program that ends early leaves behind -----------------------------------------------

enum { MOST_LEFTOVERS = 16 };
static const char *volatile leftovers[MOST_LEFTOVERS];      // files to remove, whatever happens

// Removes them; for atexit, and for signal handlers, in which unlink() is allowed.
static void remove_leftovers(void) {
    for (int i = 0; i < MOST_LEFTOVERS; i++)
        if (leftovers[i]) unlink(leftovers[i]);
}

// Adds a name to them or, with `gone`, takes it off.
static void remember(const char *name, bool gone) {
    if (!on_sudden_end) atexit(remove_leftovers);
    on_sudden_end = remove_leftovers;
    for (int i = 0; i < MOST_LEFTOVERS; i++)
        if (leftovers[i] == (gone ? name : NULL)) { leftovers[i] = gone ? NULL : name; return; }
}

// ---- names --------------------------------------------------------------------------------------

// a, b and c one after the other, for the caller to release.
static char *joined(const char *a, const char *b, const char *c) {
    const size_t size = strlen(a) + strlen(b) + strlen(c) + 1;
    char *text = allocate(size, "a file name");
    snprintf(text, size, "%s%s%s", a, b, c);
    return text;
}

// The folder of a path, with its last slash, and in *name what follows; the caller releases it.
static char *folder_of(const char *path, const char **name) {
    const char *slash = strrchr(path, '/');
    *name = slash ? slash + 1 : path;
    char *folder = joined(slash ? path : "./", "", "");
    if (slash) folder[slash + 1 - path] = 0;
    return folder;
}

// Whether `path` is something other than a file, as a pipe or a device is; a link is followed.
static bool is_special(const char *path) {
    struct stat info;
    return !stat(path, &info) && (info.st_mode & S_IFMT) != S_IFREG;
}

// Where a path leads through folders and links, also where nothing is yet; the caller releases it.
static char *where_to(const char *path) {
    char *now = joined(path, "", "");
#ifdef POSIX
    const char *name;
    char target[4096];
    ssize_t n;
    for (int links = 0; links < 40 && (n = readlink(now, target, sizeof target - 1)) > 0; links++) {
        target[n] = 0;
        char *folder = folder_of(now, &name);
        char *next = joined(*target == '/' ? "" : folder, target, "");
        release(folder);
        release(now);
        now = next;
    }
    char *folder = folder_of(now, &name), *absolute = realpath(folder, NULL);
    char *there = absolute ? joined(absolute, absolute[1] ? "/" : "", name)
                           : joined(now, "", "");
    free(absolute);
    release(folder);
    release(now);
    now = there;
#endif
    return now;
}

// Whether two paths lead to one file, by whatever names and links, or would if it were there.
static bool same_file(const char *a, const char *b) {
    struct stat x, y;
    if (!stat(a, &x) && !stat(b, &y) && x.st_ino)           // Windows does not number its files
        return x.st_dev == y.st_dev && x.st_ino == y.st_ino && !is_special(a);
    char *first = where_to(a), *second = where_to(b);
    const bool same = !strcmp(first, second);
    release(first);
    release(second);
    return same;
}

// A file that the command line names; path NULL or empty: it does not.
typedef struct { const char *option, *path; bool written; } FileUse;

// Ends the program where a file that will be written is named a second time.
static void check_files(const FileUse *use, size_t n) {
    for (size_t i = 0; i < n * n; i++) {
        const FileUse *a = &use[i / n], *b = &use[i % n];
        if (a == b || !a->written || !a->path || !*a->path || !b->path || !*b->path) continue;
        if (same_file(a->path, b->path))
            fail(WRONG_USAGE, "%s %s: is %s, too, must be a file of its own", a->option, a->path,
                 b->option);
    }
}

// ---- locks --------------------------------------------------------------------------------------
#ifdef POSIX

// Creates or opens a file and locks it until it is closed or the process ends. Returns -1 where it
// cannot be opened, or -2 where a living process, *holder, has it. Where the file system knows no
// locks, errno says so, else it is 0.
static int lock_file(const char *name, int flags, long *holder) {
    for (;;) {
        struct flock whole = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
        struct stat a, b;
        const int file = open(name, O_RDWR | flags, 0666);
        if (file < 0) return -1;
        const int why = fcntl(file, F_SETLK, &whole) ? errno : 0;
        const bool taken = why == EACCES || why == EAGAIN;
        *holder = taken && !fcntl(file, F_GETLK, &whole) ? (long)whole.l_pid : 0;
        errno = why;
        // Its owner may have removed it before the lock was there: then it is another file.
        if (!taken && !fstat(file, &a) && !stat(name, &b) && a.st_ino == b.st_ino) return file;
        close(file);
        if (taken) return -2;
        if (!(flags & O_CREAT)) return -1;
    }
}

// Removes what killed programs have left of an output: files PATH.tmp-... that nobody has locked.
static void sweep(const char *target) {
    const char *name;
    char *folder = folder_of(target, &name), *prefix = joined(name, ".tmp-", "");
    DIR *directory = opendir(folder);
    for (struct dirent *entry; directory && (entry = readdir(directory)); ) {
        if (strncmp(entry->d_name, prefix, strlen(prefix))) continue;
        char *path = joined(folder, entry->d_name, "");
        long holder;
        const int file = lock_file(path, 0, &holder);
        if (file >= 0 && !errno) unlink(path);
        if (file >= 0) close(file);
        release(path);
    }
    if (directory) closedir(directory);
    release(prefix);
    release(folder);
}
#endif

// Makes an output this program's own until it ends; ends the program if another one has it. Says so
// where files cannot be locked, as on some network file systems, and where the disk has no room for
// `bytes` more.
static void claim(const char *path, double bytes) {
#ifdef POSIX
    const char *rest;
    char *target = where_to(path), *name = joined(target, ".lock", "");
    char *folder = folder_of(target, &rest);
    long holder;
    struct statvfs disk;
    const int file = lock_file(name, O_CREAT, &holder);
    if (file == -2) fail(FAILED, "%s: another run is writing it (process %ld)", path, holder);
    if (file == -1) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    if (errno)
        fprintf(stderr, "%s: %s: cannot be locked (%s): start no second run that writes it\n",
                program, path, strerror(errno));
    remember(name, false);
    const double room = statvfs(folder, &disk) ? bytes
                                               : (double)disk.f_bavail * (double)disk.f_frsize;
    if (room < bytes)
        fprintf(stderr, "%s: %s: takes %.1f MB, its disk has %.1f MB left: saving will fail\n",
                program, path, bytes / 1e6, room / 1e6);
    release(folder);
    release(target);
#else
    (void)path, (void)bytes;
#endif
}

// ---- outputs ------------------------------------------------------------------------------------

// Creates the file of the other name, of the mode that the file has, or that a new one gets.
static FILE *create(Output *o) {
    o->temporary = allocate(strlen(o->target) + 32, "a file name");
#ifndef POSIX
    snprintf(o->temporary, strlen(o->target) + 32, "%s.tmp", o->target);
    remember(o->temporary, false);
    return fopen(o->temporary, "wb");
#else
    struct stat old;
    const bool exists = !stat(o->target, &old);
    long holder;
    int file = -2;
    if (exists && access(o->target, W_OK)) return NULL;
    sweep(o->target);
    for (int i = 0; i < 100 && file == -2; i++) {       // somebody's sweep may lock it for a moment
        snprintf(o->temporary, strlen(o->target) + 32, "%s.tmp-%ld-%d", o->target, (long)getpid(),
                 i);
        file = lock_file(o->temporary, O_CREAT | O_EXCL, &holder);
    }
    if (file < 0) return NULL;
    remember(o->temporary, false);
    if (exists && fchmod(file, old.st_mode & 07777)) errno = 0;         // some disks have no modes
    return fdopen(file, "wb");
#endif
}

// Opens an output for writing. With `special`, what is no file (/dev/null, a pipe) is written
// directly; without, it is an error.
static void output_open(Output *o, const char *path, bool special) {
    *o = (Output){ .path = path };
    if (is_special(path)) {
        if (!special) fail(FAILED, "%s: cannot be written: is not a regular file", path);
        o->file = fopen(path, "wb");
    } else {
        o->target = where_to(path);
        o->file = create(o);
    }
    if (!o->file) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
}

// Has the system write down the name of a file that was renamed. Some file systems refuse, and need
// not.
static void sync_folder(const char *path) {
#ifdef POSIX
    const char *name;
    char *folder = folder_of(path, &name);
    const int directory = open(folder, O_RDONLY);
    if (directory >= 0) fsync(directory), close(directory);
    release(folder);
#else
    (void)path;
#endif
}

// Forgets an output, of which no file is left under the other name.
static void output_done(Output *o) {
    if (o->temporary) remember(o->temporary, true);
    release(o->temporary);
    release(o->target);
    *o = (Output){ 0 };
}

// Completes an output, if it is open.
static void output_close(Output *o) {
    if (!o->file) return;
    bool bad = ferror(o->file) | fflush(o->file);
#ifdef POSIX
    if (o->temporary) bad |= fsync(fileno(o->file)) != 0;
    if (!bad && o->temporary) bad = rename(o->temporary, o->target) != 0;
    bad |= fclose(o->file) != 0;                    // with that the lock ends
#else
    bad |= fclose(o->file) != 0;
    if (!bad && o->temporary) remove(o->target);    // rename does not replace there
    if (!bad && o->temporary) bad = rename(o->temporary, o->target) != 0;
#endif
    if (bad) fail(FAILED, "%s: cannot be written: %s", o->path, strerror(errno));
    if (o->target) sync_folder(o->target);
    output_done(o);
}

// Leaves no trace of an output that is open.
static void output_abandon(Output *o) {
    if (o->temporary) remove(o->temporary);
    fclose(o->file);
    output_done(o);
}

// ---- interruptions ------------------------------------------------------------------------------

static volatile sig_atomic_t interrupted;
static const char *on_interrupt_say = "";           // what the first one answers, at once

#ifdef __wasi__
static void catch_interrupts(bool wake) { (void)wake; }
#else
// Control-C and the like: the work stops at the next good moment; the second one ends the program.
static void on_interrupt(int signal_number) {
    if (interrupted) {
        remove_leftovers();
        _Exit(INTERRUPTED);
    }
    interrupted = 1;
    say(on_interrupt_say);
    signal(signal_number, on_interrupt);            // some systems forget it once it has run
}

// Has SIGINT, SIGTERM and SIGHUP set `interrupted`; SIGHUP not where it is ignored, as under nohup.
// `wake`: they end a wait for input, too, where signal() would have some systems go on waiting.
static void catch_interrupts(bool wake) {
#ifdef POSIX
    static const int numbers[] = { SIGINT, SIGTERM, SIGHUP };
    const struct sigaction action = { .sa_handler = on_interrupt,
                                      .sa_flags = wake ? 0 : SA_RESTART };
    struct sigaction before;
    for (int i = 0; i < 3; i++)
        if (numbers[i] != SIGHUP || (!sigaction(SIGHUP, NULL, &before) &&
                                     before.sa_handler != SIG_IGN))
            sigaction(numbers[i], &action, NULL);
#else
    (void)wake;
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
#endif
}
#endif
#endif // OUTPUT_H
