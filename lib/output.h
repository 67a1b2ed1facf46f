// lib/output.h - output files that are whole or absent.
//
// A file is written under another name and renamed once it is complete and on the disk: whoever
// finds the file finds all of it. Until the rename the old file is there, afterwards the new one;
// whenever the power fails, one of them is whole.
#ifndef OUTPUT_H
#define OUTPUT_H

typedef struct {
    FILE *file;
    const char *path;
    char *temporary;            // the other name; NULL: it is written directly
} Output;

enum { MOST_OUTPUTS = 8 };
static Output *unfinished[MOST_OUTPUTS];        // for discard_outputs()

// Whatever ends the program early leaves no part of a file behind; for atexit.
static void discard_outputs(void) {
    for (int i = 0; i < MOST_OUTPUTS; i++)
        if (unfinished[i]) remove(unfinished[i]->temporary);
}

// Remembers an unfinished output, or with `done` forgets it.
static void remember(Output *o, bool done) {
    static bool registered;
    if (!registered) registered = !atexit(discard_outputs);
    for (int i = 0; i < MOST_OUTPUTS; i++)
        if (unfinished[i] == (done ? o : NULL)) { unfinished[i] = done ? NULL : o; return; }
}

// Whether `path` is something other than a file, as a pipe or a device is; a link is followed.
static bool is_special(const char *path) {
#ifdef _WIN32
    return path == NULL;
#else
    struct stat info;
    return !stat(path, &info) && !S_ISREG(info.st_mode);
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
        const size_t size = strlen(path) + sizeof ".tmp";
        o->temporary = allocate(size, "a file name");
        snprintf(o->temporary, size, "%s.tmp", path);
        o->file = fopen(o->temporary, "wb");
        if (o->file) remember(o, false);
    }
    if (!o->file) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
}

// Has the system write down the name of a file that was renamed. Some file systems refuse, and need
// not.
static void sync_folder(const char *path) {
#ifndef _WIN32
    const size_t size = strlen(path) + 2;
    char *folder = allocate(size, "a folder's name");
    snprintf(folder, size, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0; else strcpy(folder, ".");
    const int directory = open(folder, O_RDONLY);
    if (directory >= 0) {
        fsync(directory);
        close(directory);
    }
    release(folder);
#else
    (void)path;
#endif
}

// Completes an output, if it is open.
static void output_close(Output *o) {
    if (!o->file) return;
    bool bad = ferror(o->file) | fflush(o->file);
#ifndef _WIN32
    if (o->temporary) bad |= fsync(fileno(o->file)) != 0;
#endif
    bad |= fclose(o->file) != 0;
    o->file = NULL;
#ifdef _WIN32
    if (!bad && o->temporary) remove(o->path);      // rename does not replace there
#endif
    if (bad || (o->temporary && rename(o->temporary, o->path)))
        fail(FAILED, "%s: cannot be written: %s", o->path, strerror(errno));
    if (!o->temporary) return;
    remember(o, true);
    sync_folder(o->path);
    release(o->temporary);
    o->temporary = NULL;
}

// Leaves no trace of an output that is open.
static void output_abandon(Output *o) {
    fclose(o->file);
    if (o->temporary) {
        remove(o->temporary);
        remember(o, true);
    }
    release(o->temporary);
    *o = (Output){ 0 };
}
#endif // OUTPUT_H
