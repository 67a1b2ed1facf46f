// lib/settings.h - the options of run: their table, and what --help says around it.
#ifndef SETTINGS_H
#define SETTINGS_H

// What lib/edits.h numbers, as a user writes it.
static const char *const edit_names[EDIT_KINDS] = { "silence", "parallel", "swap_gates",
                                                    "gate_input" };
static const char *const condition_names[CONDITIONS] = { "layer=", "iteration=", "expert=", "head=",
                                                         "shared" };

enum { GENERATE, CHAT, EVAL, BENCH, INFO, TOKENIZE, LENS };     // mode

typedef struct {
    const char *prompt, *file, *system; // NULL: not given
    int64_t n_predict;                  // -1: to the end of the context
    double temp;
    size_t top_k;
    double top_p, min_p, repeat_penalty;
    int64_t seed;                       // -1: from the clock
    size_t ctx_size;                    // 0: what the work needs
    int mode;
    bool ids, ignore_eos, verbose_prompt;
    const char *logits, *trace, *lens;  // NULL: not wanted
    int64_t layer;                      // lens: the one to show; -1: all that fit
    const char *edits[EDIT_KINDS];      // rules, see lib/edits.h; NULL: none
    bool completion_only_loss;          // of the documents of --file, in eval
    const char *completion_marker;
    bool allow_bytes;                   // eval: --file need not be text
    size_t threads;
    bool help, version;
} Settings;

#define ROW(field, ...) { KEY(Settings, field), __VA_ARGS__ }
#define ROW_AS(field, name, ...) { KEY_AS(Settings, field, name), __VA_ARGS__ }
static const Key setting_keys[] = {
    ROW(prompt, .letter = 'i',
        .help = "the text to start from; empty: BOS"),
    ROW(file, .letter = 'f',
        .help = "the same from a file, its bytes as they are; eval: documents, as train reads"),
    ROW(system,
        .help = "chat: the system message, where the template has one"),
    ROW_AS(n_predict, "n-predict", .letter = 'n', RANGE(-1, 1LL << 50), .init = "256",
        .help = "new tokens at most; -1: to the end of the context"),
    ROW(temp, .letter = 't', RANGE(0, 1e9), .init = "0.8",
        .help = "temperature; 0: always the largest logit"),
    ROW_AS(top_k, "top-k", .letter = 'k', RANGE(0, 1LL << 50), .init = "40",
        .help = "draw from the k most probable tokens; 0: all"),
    ROW_AS(top_p, "top-p", .letter = 'p', RANGE(0, 1), .init = "0.95",
        .help = "draw from the fewest tokens whose probabilities reach this sum; 1: all"),
    ROW_AS(min_p, "min-p", RANGE(0, 1), .init = "0",
        .help = "and from those with at least this part of the largest probability; 0: all"),
    ROW_AS(repeat_penalty, "repeat-penalty", RANGE(1e-6, 1e6), .init = "1",
        .help = "divides the logits of tokens that occurred; 1: off"),
    ROW(seed, .letter = 's', RANGE(-1, 1LL << 53), .init = "-1",
        .help = "random seed; -1: from the clock, printed"),
    ROW_AS(ctx_size, "ctx-size", .letter = 'c', RANGE(0, 1 << 30), .init = "0",
        .help = "context to allocate, in tokens; 0: what the work needs"),
    ROW(mode, .letter = 'm', .words = "generate|chat|eval|bench|info|tokenize|lens",
        .init = "generate",
        .help = "what to do"),
    ROW(ids, .flag = true, .init = "false",
        .help = "prompt, file and stdout are token ids; nothing is added to them"),
    ROW_AS(ignore_eos, "ignore-eos", .flag = true, .init = "false",
        .help = "go on past the end-of-text token"),
    ROW_AS(verbose_prompt, "verbose-prompt", .flag = true, .init = "false",
        .help = "generate, chat: print the ids that go in, on stderr"),
    ROW(logits,
        .help = "eval: a file for the logits, float32 [tokens, vocab_size]"),
    ROW(trace,
        .help = "eval, generate: a TSV file for the experts that were chosen"),
    ROW(lens,
        .help = "lens: a TSV file with all that it finds"),
    ROW(layer, RANGE(-1, 4095), .init = "-1",
        .help = "lens: this layer alone, in detail; -1: the last that fit"),
    ROW_AS(edits[SILENCE], "silence", .repeats = true,
        .help = "eval, generate, lens: make 0: all, or of layer=,iteration=,expert=,shared,head="),
    ROW_AS(edits[PARALLEL], "parallel", .repeats = true,
        .help = "there: iterations see y_0 in the place of y_c: all, or of layer=,iteration="),
    ROW_AS(edits[SWAP_GATES], "swap_gates", .repeats = true,
        .help = "there: routers in reversed order: all, or layer="),
    ROW_AS(edits[GATE_INPUT], "gate_input", .repeats = true,
        .help = "there: routers see y_0, experts y_c: all, or of layer=,iteration="),
    ROW(completion_only_loss, .init = "false",
        .help = "eval: what stands before the completion of a document does not count"),
    ROW(completion_marker, .init = "answer:",
        .help = "eval: what the completion of a document begins with"),
    ROW(allow_bytes, .flag = true, .init = "false",
        .help = "eval: take a file that is not UTF-8 text as it is"),
    ROW(threads, RANGE(0, MOST_THREADS), .init = "0",
        .help = "threads; 0: OMP_NUM_THREADS, or one per processor"),
    ROW(help, .letter = 'h', .flag = true, .init = "false",
        .help = "print this and exit"),
    ROW(version, .flag = true, .init = "false",
        .help = "print the version and exit"),
};
#undef ROW
#undef ROW_AS
enum { SETTING_KEYS = sizeof setting_keys / sizeof *setting_keys };

static const char USAGE[] =
    "usage: ./run MODEL.bin [options]\n"
    "\n"
    "  ./run model.bin -i \"Once upon a time\"           continue a text\n"
    "  ./run model.bin -t 0 -n 24 --ids -i \"5 17 3\"    likeliest token each time, as ids\n"
    "  ./run model.bin -m chat                         a conversation, line by line\n"
    "  ./run model.bin -m eval -f text.txt             how well the model predicts a text\n"
    "  ./run model.bin -m info                         what is in the file\n"
    "\n"
    "options [what they may be; what they are otherwise]:\n";

static const char NOTES[] =
    "\n"
    "The sampling options (-t, -k, -p, --min-p, --repeat-penalty) are the model's own where its\n"
    "file has some and the command line has none. The prompt is printed first, then what follows.\n"
    "Text gets BOS in front where the model asks for it (add_bos_token); names of special tokens\n"
    "in it become their ids. With --ids the end-of-text token that ends the output is printed as\n"
    "well, and so is the BOS that stands in for an empty prompt.\n"
    "chat answers the prompt, if there is one, and each line of stdin, with -n tokens at most, in\n"
    "the form of the model's chat_template. Names of special tokens in them are text. When the\n"
    "context is full (--ctx-size, else 4096 tokens at most), the oldest messages are forgotten.\n"
    "eval prints tokens (predicted ones), nll (their mean, nats), ppl and bits_per_byte; what is\n"
    "longer than the context is read in windows, half of each as context only. A row of --logits\n"
    "and a position in --trace belong to one token of the input, its BOS included. eval reads a\n"
    "file as train does: documents, separated by lines <|endoftext|>, each of which ends in EOS.\n";

// What --help prints: usage and examples, the options, and how they play together.
static void print_help(const Options *options) {
    fputs(USAGE, stdout);
    print_options(options);
    fputs(NOTES, stdout);
}

// Ends the program on what no single option can know about itself. model: the file, or NULL.
static void check_settings(const Settings *set, const char *model) {
    const int mode = set->mode;
    if (!model) fail(WRONG_USAGE, "which model? ./run MODEL.bin [options]; --help lists them");
    if (set->prompt && set->file) fail(WRONG_USAGE, "--prompt and --file: must be one of them");
    if ((mode == EVAL || mode == TOKENIZE) && !set->prompt && !set->file)
        fail(WRONG_USAGE, "--mode eval and tokenize: need --file or --prompt");
    if (set->logits && mode != EVAL) fail(WRONG_USAGE, "--logits: needs --mode eval");
    if (set->completion_only_loss && (mode != EVAL || !set->file || set->ids))
        fail(WRONG_USAGE, "--completion_only_loss: needs --mode eval and a --file of text");
    if (!*set->completion_marker)
        fail(WRONG_USAGE, "--completion_marker is \"\", must be a text of one byte or more");
    if (mode == LENS && !set->prompt && !set->file)
        fail(WRONG_USAGE, "--mode lens: needs --file or --prompt");
    if ((set->lens || set->layer >= 0) && mode != LENS)
        fail(WRONG_USAGE, "--lens, --layer: need --mode lens");
    for (int k = 0; k < EDIT_KINDS; k++)
        if (set->edits[k] && mode != EVAL && mode != GENERATE && mode != LENS)
            fail(WRONG_USAGE, "--%s: needs --mode eval, generate or lens", edit_names[k]);
    if (set->system && mode != CHAT) fail(WRONG_USAGE, "--system: needs --mode chat");
    if (set->verbose_prompt && mode != CHAT && mode != GENERATE)
        fail(WRONG_USAGE, "--verbose-prompt: needs --mode generate or chat");
    if (set->ids && mode == CHAT) fail(WRONG_USAGE, "--ids: not with --mode chat, which is text");
    if (set->trace && mode != EVAL && mode != GENERATE)
        fail(WRONG_USAGE, "--trace: needs --mode generate or eval");
    const FileUse files[] = { { "--logits", set->logits, true }, { "--trace", set->trace, true },
                              { "--lens", set->lens, true },
                              { "--file", set->file, false }, { "the model", model, false } };
    check_files(files, sizeof files / sizeof *files);
}
#endif // SETTINGS_H
