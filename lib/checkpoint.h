// lib/checkpoint.h - a training run on the disk: checkpoints and the log. Included by train.c.
//
// A checkpoint is a model file with a training state behind the weights: lines "name value" that
// say how the model is trained and how far it is, padded to a multiple of 64, then AdamW's moments
// m and v, laid out like the weights.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

// ---- the training state -------------------------------------------------------------------------

// What the lines say besides the recipe.
typedef struct {
    int64_t step;                       // steps done
    size_t data_tokens;                 // of the training data; 0 for the built-in task
    const char *data_fingerprint;       // see fingerprint(); "" for the built-in task
    double best_val_loss;               // the lowest one, whose weights --best keeps; -1: none yet
    int64_t problem;                    // of the built-in task, to make next; -1: not known
    size_t pending;                     // tokens of problems made before that are not used yet
} Progress;

static const Key progress_keys[] = {
    { KEY(Progress, step), RANGE(0, 1e12), .help = "steps done" },
    { KEY(Progress, data_tokens), RANGE(0, 1e15), .help = "tokens of the training data" },
    { KEY(Progress, data_fingerprint), .help = "of the training data" },
    { KEY(Progress, best_val_loss), RANGE(-1, 1e30), .absent = "-1", .help = "the lowest so far" },
    { KEY(Progress, problem), RANGE(-1, 1e18), .absent = "-1", .help = "to make next" },
    { KEY(Progress, pending), RANGE(0, TASK_MAX + 2), .absent = "0", .help = "tokens left over" },
};
enum { PROGRESS_KEYS = sizeof progress_keys / sizeof *progress_keys };

// What tells a checkpoint's data from other data: a number that depends on every token, as text.
static const char *data_fingerprint(const Data *data) {
    static char text[20];
    if (data->built_in) return "";
    snprintf(text, sizeof text, "%016llx", (unsigned long long)fingerprint(&data->train));
    return text;
}

// Version 1 had slots in the place of lines, see lib/modelfile.h; then step, tokens and
// fingerprint.
static const char version_1_recipe[] =
    "batch_size max_length micro_batch_size max_steps learning_rate warmup_steps warmup_ratio "
    "lr_scheduler weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed sequential "
    "level";
enum { VERSION_1_RECIPE = 16 };         // how many

// Reads the lines or slots of a training state of version 1, into the tables' structs.
static void read_version_1_state(const Options tables[2], const char *state, const char *path) {
    static char text[20];
    Progress *progress = tables[1].base;
    read_slots(&tables[0], version_1_recipe, state, path);
    read_slots(&tables[1], "step data_tokens", state + 8 * VERSION_1_RECIPE, path);
    uint64_t print;
    memcpy(&print, state + 8 * (VERSION_1_RECIPE + 2), sizeof print);
    if (progress->data_tokens) snprintf(text, sizeof text, "%016llx", (unsigned long long)print);
    progress->data_fingerprint = text;
    for (int i = 0; i < PROGRESS_KEYS; i++)
        if (!strcmp(progress_keys[i].name, "data_fingerprint")) tables[1].given[i] = 1;
}

// Reads a training state from where the file is into *recipe and *progress, up to the moments,
// which come next. Fails where there is none.
static void read_state(Recipe *recipe, Progress *progress, const Model *m, const Header *h,
                       FILE *file, const char *path) {
    unsigned char given[RECIPE_KEYS + PROGRESS_KEYS] = { 0 };
    const Options tables[2] = { { recipe_keys, RECIPE_KEYS, recipe, given },
                                { progress_keys, PROGRESS_KEYS, progress, given + RECIPE_KEYS } };
    const uint64_t moments = checked_mul(m->w.size, 2 * sizeof(float));
    const uint64_t bytes = h->state_bytes < moments ? 0 : h->state_bytes - moments;
    if (!bytes)
        fail(FAILED, "%s: has no training state; --init starts a new run from its weights", path);
    if (bytes > MOST_CONFIG_BYTES || bytes % 64 || (h->version == 1 && bytes != VERSION_1_BYTES))
        fail(FAILED, "%s: its recipe takes %llu bytes, must be a multiple of 64, at most %d", path,
             (unsigned long long)bytes, MOST_CONFIG_BYTES);
    char *state = allocate((size_t)bytes + 1, "the training state");
    read_exactly(state, (size_t)bytes, file, path);
    if (h->version == 1) read_version_1_state(tables, state, path);
    else read_lines(tables, 2, state, (size_t)bytes, path);
    fill_absent(tables, 2, false, path);
    release(state);
}

// Ends the program if the weights, the moments, or any logits of the last batch are not finite:
// they must not replace the last good checkpoint. (The loss of an echo looks at all logits.)
static void must_be_sound(Run *run) {
    Model *m = &run->model;
    const size_t n = run->recipe.max_length, rows = run->state.rows;
    const real *const all[] = { m->weights, run->m, run->v };
    double loss = 0;
    for (int i = 0; i < 3; i++)
        for (size_t j = 0; j < m->w.size; j++) loss += 0 * (double)all[i][j];
    if (isfinite(loss)) {
        forward(m, &run->state, run->inputs, rows / n, n, 0, rows);
        loss = loss_of(m, &run->state, &run->g, run->inputs, rows, 1, false);
    }
    if (!isfinite(loss))
        fail(FAILED, "step %lld: the weights after it, or their logits, are not finite; "
             "%s%s", (long long)run->step - 1, run->saved ? "the last good checkpoint is " :
             "nothing was saved yet", run->saved ? run->job.output : "");
}

// Writes --output: the model, how it is trained, how far, and AdamW's moments.
static void save_checkpoint(Run *run) {
    const Model *m = &run->model;
    must_be_sound(run);
    const Data *data = &run->data;
    Progress progress = { run->step, data->built_in ? 0 : data->train.n, data_fingerprint(data),
                          run->best_val_loss,
                          data->built_in ? (int64_t)data->problem : -1, data->pending.n };
    const Options tables[2] = { { recipe_keys, RECIPE_KEYS, &run->recipe, NULL },
                                { progress_keys, PROGRESS_KEYS, &progress, NULL } };
    Lines lines = { 0 };
    for (int i = 0; i < 2; i++) add_lines(&lines, &tables[i]);
    Output output;
    output_open(&output, run->job.output, false);
    ModelWriter to = { .file = output.file, .path = output.path };
    write_header(&to, m, lines.padded + checked_mul(m->w.size, 2 * sizeof(float)));
    write_floats(&to, m->weights, m->w.size);
    write_exactly(&to, lines.text, lines.padded);
    write_floats(&to, run->m, m->w.size);
    write_floats(&to, run->v, m->w.size);
    write_checksum(&to);
    output_close(&output);
    release(lines.text);
    run->saved = true;
}

// Writes --best, a model without a training state, if val_loss is the lowest so far.
static void keep_best(Run *run) {
    const Model *m = &run->model;
    if (!*run->job.best || !isfinite(run->val_loss)) return;
    if (run->best_val_loss >= 0 && run->val_loss >= run->best_val_loss) return;
    Output output;
    output_open(&output, run->job.best, false);
    ModelWriter to = { .file = output.file, .path = output.path };
    write_header(&to, m, 0);
    write_floats(&to, m->weights, m->w.size);
    write_checksum(&to);
    output_close(&output);
    run->best_val_loss = run->val_loss;
}

// Makes an output of at least `bytes` bytes this run's own. Fails now, and not after hours of
// training, if it cannot be written.
static void try_output(const char *path, double bytes) {
    Output output;
    if (!*path) return;
    output_open(&output, path, false);
    output_abandon(&output);
    claim(path, bytes);
}

// ---- the log ------------------------------------------------------------------------------------

// The log, ready for the line of step `step`: a resumed run keeps the lines before that. The last
// columns are the load of each of C iterations.
static FILE *open_log(const char *path, int64_t step, size_t C) {
    size_t bytes = 0, keep = 0;
    char *old = NULL;
    if (step && !access(path, F_OK)) {
        old = read_file(path, &bytes);
        for (size_t line = 0; keep < bytes; line++) {
            const char *newline = memchr(old + keep, '\n', bytes - keep);
            if (!newline || (line && strtoll(old + keep, NULL, 10) >= step)) break;
            keep = (size_t)(newline + 1 - old);
        }
    }
    Output output;
    output_open(&output, path, false);
    if (keep) {
        fwrite(old, 1, keep, output.file);
    } else {
        fputs("step\tloss\taux_loss\tgrad_norm\tlr\ttokens_per_s\tval_loss\tsolved", output.file);
        for (size_t c = 1; c <= C; c++) fprintf(output.file, "\tload_%zu", c);
        fputc('\n', output.file);
    }
    output_close(&output);
    free(old);
    FILE *file = fopen(path, "ab");
    if (!file) fail(FAILED, "%s: cannot be written: %s", path, strerror(errno));
    return file;
}

// A log column: the number, or nothing where it was not measured.
static void log_number(FILE *log, double x) {
    char text[DECIMAL_TEXT];
    fprintf(log, "\t%s", isnan(x) ? "" : decimal(text, x));
}

// The line of step s: its n columns after the step, and the loads of the experts.
static void log_step(FILE *log, const Run *run, int64_t s, const double *column, size_t n) {
    fprintf(log, "%lld", (long long)s);
    for (size_t i = 0; i < n; i++) log_number(log, column[i]);
    for (size_t c = 0; c < run->model.config.inner_iter; c++) log_number(log, expert_load(run, c));
    fputc('\n', log);
    if (fflush(log))
        fail(FAILED, "%s: cannot be written: %s", run->job.log, strerror(errno));
}
#endif // CHECKPOINT_H
