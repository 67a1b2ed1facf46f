// tests/fuzz/arguments.h - makes a command line of an input, which has one argument a line.
#ifndef ARGUMENTS_H
#define ARGUMENTS_H

enum { MOST_ARGUMENTS = 64 };

// Fills argv [MOST_ARGUMENTS + 1], argv[0] excepted; returns how many there are. Each is a block of
// its own, so that reading past its end is seen.
static int arguments_from(char **argv, const uint8_t *data, size_t n) {
    int argc = 1;
    for (size_t i = 0, end; i < n && argc < MOST_ARGUMENTS; i = end + 1) {
        for (end = i; end < n && data[end] && data[end] != '\n'; ) end++;
        argv[argc] = allocate(end - i + 1, "an argument");
        memcpy(argv[argc++], data + i, end - i);
    }
    return argc;
}
#endif // ARGUMENTS_H
