// lib/setup.h - from the command line to a run that can start: options, model, data, memory.
// Included by train.c.
//
// Contents: tokenizers, resuming, models, data, memory, the command line.
#ifndef SETUP_H
#define SETUP_H

// ---- tokenizers ---------------------------------------------------------------------------------

// Whether a key of the config belongs to the tokenizer rather than to the weights.
static bool is_of_text(const Key *k) {
    return strstr(k->name, "s_token") || !strncmp(k->name, "chat", 4);
}

// Takes the tokenizer of the model file --tokenizer, and what of the config goes with it, unless
// the user gave that. `fresh`: the vocabulary's size too.
static void take_tokenizer(Run *run, const Options *config_table, bool fresh) {
    Model *m = &run->model, from = model_open(run->job.tokenizer, TOKENIZER, NULL, NULL);
    if (!from.tokenizer) fail(FAILED, "%s: has no tokenizer", run->job.tokenizer);
    m->tokenizer = from.tokenizer;
    m->files = from.files;
    m->files_bytes = from.files_bytes;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        if (config_table->given[i]) continue;
        if (is_of_text(k) || (fresh && !strcmp(k->name, "vocab_size")))
            key_copy(k, &m->config, &from.config);
    }
    if (m->config.vocab_size < m->tokenizer->n_tokens)
        fail(WRONG_USAGE, "vocab_size is %zu, must be at least %u for the tokenizer of %s",
             m->config.vocab_size, m->tokenizer->n_tokens, run->job.tokenizer);
}

// Ends the program unless --tokenizer is the one that the resumed model has.
static void check_resumed_tokenizer(const Run *run) {
    const Model *m = &run->model;
    Model from = model_open(run->job.tokenizer, TOKENIZER, NULL, NULL);
    const Tokenizer *mine = m->tokenizer, *other = from.tokenizer;
    bool same = !mine == !other && from.files_bytes == m->files_bytes;
    if (same && mine)
        same = mine->kind == other->kind && mine->section_bytes == other->section_bytes;
    if (!same || memcmp(from.files, m->files,
                        m->files_bytes + (mine ? mine->section_bytes : 0)))
        fail(WRONG_USAGE, "--tokenizer %s is not the tokenizer of %s", run->job.tokenizer,
             run->job.resume);
    model_free(&from);
}

// A fresh model's tokenizer: bytes, where its vocabulary has room for them.
static void choose_tokenizer(Run *run, const Options *config_table) {
    Config *c = &run->model.config;
    if (c->vocab_size >= BYTE_TOKENS)
        run->model.tokenizer = tokenizer_new(BYTES, NULL, 0, "options", c->vocab_size);
    if (run->model.tokenizer) return;
    if (!is_given(config_table, "bos_token_id")) c->generation.bos_token_id = -1;
    if (!is_given(config_table, "eos_token_id")) c->generation.eos_token_id[0] = -1;
}

// ---- resuming -----------------------------------------------------------------------------------

// Takes the value of key k over from the struct `have`, which came from the file `where`, or ends
// the program if the user gave another one.
static void must_agree(const Options *table, const Key *k, const void *have, const char *where) {
    if (table->given[k - table->keys] && !key_equal(k, table->base, have)) {
        char text[64];
        snprintf(text, sizeof text, "%s", key_text(k, table->base));
        fail(WRONG_USAGE, "--%s is %s, but %s has %s", k->name, text, where, key_text(k, have));
    }
    key_copy(k, table->base, have);
}

// Takes a checkpoint's model, recipe, step and moments. What the user said otherwise must agree,
// except how far to go. *progress: for the data to be compared.
static void resume(Run *run, const Options tables[TABLES], Progress *progress) {
    const char *path = run->job.resume;
    FILE *file;
    Header header;
    Recipe recipe;
    Model m = model_open(path, READ_CHECKED, &file, &header);
    read_state(&recipe, progress, &m, &header, file, path);
    for (int i = 0; i < CONFIG_KEYS; i++)
        must_agree(&tables[CONFIG_TABLE], &config_keys[i], &m.config, path);
    for (int i = 0; i < RECIPE_KEYS; i++) {
        const Key *k = &recipe_keys[i];
        if (!strcmp(k->name, "max_steps") && tables[RECIPE_TABLE].given[i]) continue;
        must_agree(&tables[RECIPE_TABLE], k, &recipe, path);
    }
    run->model = m;
    if (*run->job.tokenizer) check_resumed_tokenizer(run);
    run->saved = true;
    run->step = progress->step;
    run->best_val_loss = progress->best_val_loss;
    run->m = allocate(checked_mul(m.w.size, sizeof(real)), "AdamW's first moments");
    run->v = allocate(checked_mul(m.w.size, sizeof(real)), "AdamW's second moments");
    read_floats(run->m, m.w.size, file, path);
    read_floats(run->v, m.w.size, file, path);
    fclose(file);
}

// Ends the program unless the data is of the kind that the checkpoint of --resume was trained on: a
// file, or the built-in task.
static void check_resumed_kind(const Run *run, const Progress *resumed) {
    const bool built_in = !*run->job.data;
    if (built_in != (resumed->data_tokens == 0))
        fail(FAILED, "%s was trained on %s: %s --data", run->job.resume,
             built_in ? "a file" : "the built-in task", built_in ? "give it with" : "leave out");
}

// Ends the program unless the data is the very one that the checkpoint was trained on.
static void check_resumed_data(const Run *run, const Progress *resumed) {
    const Job *job = &run->job;
    const Data *data = &run->data;
    if (!data->built_in && (resumed->data_tokens != data->train.n ||
                            strcmp(resumed->data_fingerprint, data_fingerprint(data))))
        fail(FAILED, "%s: is not the data that %s was trained on (%zu tokens, there %zu)",
             job->data, job->resume, data->train.n, resumed->data_tokens);
}

// ---- models -------------------------------------------------------------------------------------

// Takes the model of --init. Options may change what does not change the meaning of its weights.
static void init_from(Run *run, const Options *config_table) {
    static const char *const free_keys[] = {
        "aux_loss_alpha", "seq_aux", "max_position_embeddings", "initializer_range", "temperature",
        "top_k", "top_p", "min_p", "repetition_penalty", "torch_dtype", "add_bos_token",
    };
    Model m = model_open(run->job.init, READ_CHECKED, NULL, NULL);
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        bool is_free = !strncmp(k->name, "chat", 4);
        for (size_t j = 0; j < sizeof free_keys / sizeof *free_keys; j++)
            is_free |= !strcmp(k->name, free_keys[j]);
        if (is_free && config_table->given[i]) key_copy(k, &m.config, &run->model.config);
        else must_agree(config_table, k, &m.config, run->job.init);
    }
    run->model = m;
    if (*run->job.tokenizer) take_tokenizer(run, config_table, false);
    config_check(&run->model.config, "options", WRONG_USAGE);
}

// A new model, as the options describe it, still without weights; its context is at least a window
// long.
static void fresh_model(Run *run, const Options *config_table) {
    Model *m = &run->model;
    Config *c = &m->config;
    if (!is_given(config_table, "max_position_embeddings"))
        c->max_position_embeddings = max_size(c->max_position_embeddings, run->recipe.max_length);
    if (c->prenorm_chain && !is_given(config_table, "inner_residual")) c->inner_residual = false;
    if (*run->job.tokenizer) take_tokenizer(run, config_table, true);
    else choose_tokenizer(run, config_table);
    config_check(c, "options", WRONG_USAGE);
    m->w = weights_layout(c, false, F32);       // make_room() gives them memory and values
}

// ---- data ---------------------------------------------------------------------------------------

// Opens the training and validation data. Fails where they do not make a single batch. `strict`: if
// completions only are to count, they must be there in the validation data, too.
static void open_data(Run *run, bool strict) {
    const Model *m = &run->model;
    Data *data = &run->data;
    const size_t n = run->recipe.max_length, B = run->recipe.batch_size;
    data->recipe = &run->recipe;
    data->tokenizer = m->tokenizer;
    data->eos = (int)m->config.generation.eos_token_id[0];
    data->built_in = !*run->job.data;
    if (data->built_in && (!m->tokenizer || data->eos < 0))
        fail(FAILED, "the built-in task is text, but the model has no tokenizer or no "
             "eos_token_id: give token files with --data");
    data->bos = m->config.generation.add_bos_token ? (int)m->config.generation.bos_token_id : -1;
    if (data->built_in) data->val = task_validation(data);
    else data->train = read_stream(m, run->job.data, marker_of(&run->recipe), true,
                                   run->job.allow_bytes);
    if (*run->job.val) data->val = read_stream(m, run->job.val, marker_of(&run->recipe), strict,
                                                  run->job.allow_bytes);
    else if (!data->built_in)
        data->val = split_stream(&data->train, data->eos, run->recipe.sequential);
    data->val_document = find_documents(&data->val, data->eos, &data->val_documents);
    data->val_targets = count_val_targets(data);
    if (*run->job.val && !data->val_targets)
        fail(FAILED, "%s: has %zu tokens, and none of them to predict: validation needs one that "
             "follows another and has a loss", run->job.val, data->val.n);
    if (data->built_in) return;
    data->train_document = find_documents(&data->train, data->eos, &data->train_documents);
    const size_t samples = train_samples(data);
    if (samples >= B) return;
    if (!run->recipe.packing)
        fail(FAILED, "%s: has %zu documents, a batch needs %zu: make --batch_size smaller",
             run->job.data, samples, B);
    fail(FAILED, "%s: %zu tokens make %zu windows of %zu, a batch needs %zu: "
         "make --batch_size or --max_length smaller", run->job.data, data->train.n, samples, n, B);
}

// Says, without packing, how many documents are longer than a sequence and how much is padding.
static void describe_data(const Run *run) {
    const Data *data = &run->data;
    const size_t n = run->recipe.max_length, documents = data->train_documents;
    if (run->recipe.packing || data->built_in) return;
    size_t cut = 0, tokens = 0;
    for (size_t i = 0; i < documents; i++) {
        const size_t from = data->train_document[i], to = data->train_document[i + 1];
        const size_t ends = data->train.tokens[to - 1] != data->eos;
        const size_t length = (data->bos >= 0) + (to - from) + ends;
        cut += length > n + 1;
        tokens += min_size(length, n + 1);
    }
    fprintf(stderr, "data: %zu documents, %zu of them cut to %zu tokens; %.1f %% of the tokens are "
            "padding\n", documents, cut, n + 1,
            100 - 100 * (double)tokens / ((double)documents * (double)(n + 1)));
}

// The first held-out question of the built-in task, as a text that lives as long as the program.
static const char *first_question(const Run *run) {
    static char text[TASK_MAX];
    const int n = task_problem(text, 0, 0, (int)run->recipe.level, 1);
    const size_t end = completion_start(text, (size_t)n, run->recipe.completion_marker);
    text[end + (text[end] == '\n')] = 0;
    return text;
}

// Prints n bytes of a document, of which those before `begin` have no loss; with `mark` these stand
// in [[ ]], or dimmed on a terminal.
static void show_text(const char *text, size_t n, size_t begin, bool mark) {
    const bool dim = mark && stdout_is_terminal();
    const char *left = dim ? "\033[2m" : "[[", *right = dim ? "\033[0m" : "]]";
    if (mark && begin) printf("%s%.*s%s", left, (int)begin, text, right);
    else fwrite(text, 1, begin, stdout);
    fwrite(text + begin, 1, n - begin, stdout);
}

// Prints the tokens of one document, without its EOS: those from token `from` up to `to` of a
// stream. Returns whether a line begins behind it.
static bool show_tokens(const Run *run, const Stream *s, size_t from, size_t to) {
    const bool mark = run->job.show_loss && s->counts;
    size_t begin = from, bytes = 0, at = 0, all = 0, hidden = 0;
    while (mark && begin < to && !s->counts[begin]) begin++;
    for (size_t i = from; i < to; i++) {
        if (!run->model.tokenizer) printf("%d ", s->tokens[i]);
        else decode(run->model.tokenizer, s->tokens[i], &bytes), all += bytes;
    }
    if (!run->model.tokenizer) return from == to;
    char *text = allocate(all + 1, "a document");
    for (size_t i = from; i < to; i++) {
        const char *part = decode(run->model.tokenizer, s->tokens[i], &bytes);
        memcpy(text + at, part, bytes);
        at += bytes;
        if (i + 1 == begin) hidden = at;
    }
    show_text(text, all, hidden, mark);
    const bool line = all == 0 || text[all - 1] == '\n';
    release(text);
    return line;
}

// Prints n documents of a stream, or that many problems of the built-in task, each followed by a
// line <|endoftext|>.
static void show_documents(const Run *run, const Stream *s, size_t n, bool held_out) {
    const Recipe *r = &run->recipe;
    char problem[TASK_MAX];
    for (size_t i = 0; run->data.built_in && i < n; i++) {
        const size_t length = (size_t)task_problem(problem, (uint64_t)r->seed, i, (int)r->level,
                                                   held_out);
        const size_t begin = r->completion_only_loss
            ? completion_start(problem, length, r->completion_marker) : 0;
        show_text(problem, length, begin < length ? begin : 0, run->job.show_loss);
        puts(EOS_TEXT);
    }
    size_t from = 0;
    for (size_t i = 0; i < s->n && n > 0 && !run->data.built_in; i++) {
        if (s->tokens[i] != run->data.eos) continue;
        printf("%s%s\n", show_tokens(run, s, from, i) ? "" : "\n", EOS_TEXT);
        from = i + 1;
        n--;
    }
    if (n && from < s->n && !run->data.built_in) show_tokens(run, s, from, s->n);
}

// ---- memory -------------------------------------------------------------------------------------

#ifdef _SC_PHYS_PAGES
// How much memory this process may have: the machine's, or what a container or a batch system
// allows it, which Linux would kill it for exceeding.
static double memory_allowed(void) {
    double least = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE), limit;
    char line[4096], path[8192];
    FILE *groups = fopen("/proc/self/cgroup", "r");
    while (groups && fgets(line, sizeof line, groups)) {    // "0::/a/b", or "4:memory:/a/b"
        char *group = strrchr(line, ':');
        const bool new = !strncmp(line, "0::", 3);
        if (!group || (!new && !strstr(line, ":memory:"))) continue;
        *group++ = 0;
        for (size_t n = strcspn(group, "\n") + 1; n-- > 0; ) {     // of /a/b, /a and /
            if (n && group[n] != '/' && group[n] != '\n' && group[n]) continue;
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%.*s/memory.%s", new ? "" : "/memory",
                     (int)n, group, new ? "max" : "limit_in_bytes");
            FILE *file = fopen(path, "r");
            if (file && fscanf(file, "%lf", &limit) == 1) least = fmin(least, limit);
            if (file) fclose(file);
        }
    }
    if (groups) fclose(groups);
    return least;
}
#endif

// Prints what training will take, by kind, with `rows` tokens at once. Fails if the machine has
// less: it would go on, but on its disk.
static void check_memory(const Run *run, size_t rows) {
    const Config *c = &run->model.config;
    const size_t n = run->recipe.max_length;
    const double numbers = 1e-6 * sizeof(real) * (double)run->model.w.size;
    State s = { .rows = rows, .context = n, .keep = to_keep(&run->model) };
    Gradients g = { 0 };
    Arena kept = { 0 }, other = { 0 };
    state_layout(&s, c, &kept);
    gradients_layout(&g, c, rows, n, &other);
    const double activations = 1e-6 * ((double)kept.used + (double)other.used);
    fprintf(stderr, "memory: weights %.1f MB, gradients %.1f MB, moments %.1f MB, "
            "activations %.1f MB\n", numbers, numbers, 2 * numbers, activations);
#ifdef _SC_PHYS_PAGES
    const double there = 1e-6 * memory_allowed();
    if (4 * numbers + activations > there)
        fail(FAILED, "training takes %.1f MB of memory, this machine has %.1f MB for it: a smaller "
             "model, --micro_batch_size or --max_length takes less", 4 * numbers + activations,
             there);
#endif
}

// Goes to the place in the built-in task that belongs to run->step: to where the checkpoint says it
// is or, for one from before, problem after problem.
static void skip_problems(Run *run, const Progress *resumed) {
    Data *data = &run->data;
    const uint64_t samples = (uint64_t)run->step * run->recipe.batch_size;
    const double start = seconds();
    if (!run->recipe.packing) data->problem = samples;
    else if (run->step && resumed->problem >= 0)
        go_to_problem(data, (uint64_t)resumed->problem, resumed->pending);
    else for (uint64_t i = 0; i < samples; i++) {
        show_part("problems that were seen before", (size_t)i, (size_t)samples, start);
        next_made_sample(run->inputs, run->targets, data);
    }
}

// Memory for everything that training needs, the weights of a new model among it, and the place in
// the data that belongs to run->step, which a resumed run knows from its checkpoint.
static void make_room(Run *run, const Progress *resumed) {
    Model *m = &run->model;
    const Recipe *r = &run->recipe;
    const size_t B = r->batch_size, n = r->max_length, size = m->w.size;
    const size_t at_once = r->micro_batch_size ? min_size(r->micro_batch_size, B) : B;
    check_memory(run, checked_mul(at_once, n));
    if (!m->weights) {
        m->weights = allocate(checked_mul(size, sizeof(real)), "the weights");
        weights_bind(&m->w, m->weights);
        weights_init(m, (uint64_t)r->seed);
    }
    run->grad = allocate(checked_mul(size, sizeof(real)), "the gradients");
    gradients_bind(&m->w, run->grad);
    if (!run->m) run->m = allocate(checked_mul(size, sizeof(real)), "AdamW's first moments");
    if (!run->v) run->v = allocate(checked_mul(size, sizeof(real)), "AdamW's second moments");
    run->state = state_new(&m->config, checked_mul(at_once, n), n, to_keep(m));
    run->g = gradients_new(&m->config, at_once * n, n);
    run->inputs = allocate(checked_mul(B * n, sizeof(int)), "a batch");
    run->targets = allocate(checked_mul(B * n, sizeof(int)), "a batch");
    run->n_chosen = checked_mul(m->config.num_hidden_layers,
                                checked_mul(m->config.inner_iter, m->config.n_routed_experts));
    run->chosen = allocate(checked_mul(run->n_chosen, sizeof(int)), "the choices of experts");
    if (run->data.built_in) skip_problems(run, resumed);
}

// Makes sure of the files that this run will write. A finished one writes no checkpoint.
static void claim_outputs(const Run *run) {
    const double number = (double)run->model.w.size * sizeof(float);
    if (run->step < run->recipe.max_steps) try_output(run->job.output, 3 * number);
    try_output(run->job.best, number);
    try_output(run->job.log, 0);
}

// ---- the command line ---------------------------------------------------------------------------

// Ends the program where a file that the run writes is also another one's. Only --resume's is meant
// to be replaced.
static void check_run_files(const Job *j) {
    const bool again = *j->resume && same_file(j->resume, j->output);
    const bool own = again && *j->tokenizer && same_file(j->tokenizer, j->resume);
    const FileUse files[] = {
        { "--output", j->output, true }, { "--best", j->best, true }, { "--log", j->log, true },
        { "--resume", again ? "" : j->resume, false }, { "--init", j->init, false },
        { "--data", j->data, false }, { "--val", j->val, false },
        { "--tokenizer", own ? "" : j->tokenizer, false },
    };
    check_files(files, sizeof files / sizeof *files);
}

// What --help prints.
static void print_help(const Options tables[TABLES]) {
    puts("usage: ./train [options]\n"
         "Trains a Chain-of-Experts; without options a small one on built-in word problems.\n"
         "\n"
         "files and reports:");
    print_options(&tables[JOB_TABLE]);
    puts("\nthe recipe:");
    print_options(&tables[RECIPE_TABLE]);
    puts("\nthe model (keys of config.json):");
    print_options(&tables[CONFIG_TABLE]);
}

// Settles recipe, model and data, from the options and the files that they name. *resumed: how far
// the checkpoint is, with --resume.
static void settle(Run *run, const Options tables[TABLES], Progress *resumed) {
    Job *job = &run->job;
    set_threads(job->threads);
    if (*job->resume && !is_given(&tables[JOB_TABLE], "output")) job->output = job->resume;
    if (*job->init && *job->resume)
        fail(WRONG_USAGE, "--init and --resume: only one of them can be given");
    check_run_files(job);
    if (*job->data) apply_preset(tables, text_recipe);
    apply_preset(tables, *job->init ? paper_recipe : presets[job->model]);
    if (job->model == PAPER && !*job->init) apply_preset(tables, paper_recipe);
    if (*job->resume) {
        resume(run, tables, resumed);
        check_resumed_kind(run, resumed);
    } else if (*job->init) {
        init_from(run, &tables[CONFIG_TABLE]);
    } else {
        fresh_model(run, &tables[CONFIG_TABLE]);
    }
    if (!*run->recipe.completion_marker)
        fail(WRONG_USAGE, "--completion_marker is \"\", must be a text of one byte or more");
    const size_t longest = run->model.config.max_position_embeddings;
    if (run->recipe.max_length > longest)
        fail(WRONG_USAGE, "--max_length is %zu, must be 2..%zu (max_position_embeddings)",
             run->recipe.max_length, longest);
    open_data(run, is_given(&tables[RECIPE_TABLE], "completion_only_loss"));
    if (!run->data.built_in && !is_given(&tables[JOB_TABLE], "eval_problems"))
        job->eval_problems = 0;
    if (!run->data.built_in && job->eval_problems && !has_answers(run))
        fail(FAILED, "%s: no held-out document ends in a line \"#### n\", which --eval_problems "
             "needs", *job->val ? job->val : job->data);
    if (*job->resume) check_resumed_data(run, resumed);
    describe_data(run);
    if (run->data.built_in && !*run->model.config.generation.default_prompt)
        run->model.config.generation.default_prompt = first_question(run);
}

// Does what the command line says up to where training can begin. False where all is done already.
static bool prepare(Run *run, Progress *resumed, int argc, char **argv) {
    unsigned char given[TABLES][CONFIG_KEYS] = { { 0 } };
    const Options tables[TABLES] = {
        [CONFIG_TABLE] = { config_keys, CONFIG_KEYS, &run->model.config, given[CONFIG_TABLE] },
        [RECIPE_TABLE] = { recipe_keys, RECIPE_KEYS, &run->recipe, given[RECIPE_TABLE] },
        [JOB_TABLE]    = { job_keys, JOB_KEYS, &run->job, given[JOB_TABLE] },
    };
    const Job *job = &run->job;
    for (int i = 0; i < TABLES; i++) keys_init(tables[i].keys, tables[i].n, tables[i].base);
    parse_options(tables, TABLES, argc, argv, 1, "data");
    if (job->version) puts("train (coe.c) " COE_VERSION);
    else if (job->help) print_help(tables);
    else settle(run, tables, resumed);
    if (!job->version && !job->help && !job->show_data && !job->show_val) return true;
    if (job->show_data) show_documents(run, &run->data.train, job->show_data, false);
    if (job->show_val) show_documents(run, &run->data.val, job->show_val, true);
    flush_stdout();
    return false;
}
#endif // SETUP_H
