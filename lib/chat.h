// lib/chat.h - a conversation, as the text that a model has learned to go on from. Included by
// run.c.
//
// The chat template of a checkpoint is a program in Jinja. export.py runs it and looks at what
// comes out; a model file has the pieces that stand around the messages, under chat.begin and so on
// in its config. A conversation of questions Q and answers A is
//
//     begin Q user_assistant A assistant_user Q user_assistant A assistant_user Q answer
//
// and the model goes on behind it. With a system message S, the beginning is `system S system_user`
// in the place of `begin`. For each answer all of it becomes text, and then tokens, anew, just as
// the template would make it; most of them are in the cache already.
#ifndef CHAT_H
#define CHAT_H

typedef struct {
    const char *piece[CHAT_KEYS];       // the texts around the messages
    Text system;                        // the system message, if there is one
    Text *message;                      // [n]  questions, and at every second place answers
    size_t n, from;                     // from: the first question that is not forgotten
    bool has_system;
} Chat;

// The text of a token that a template names; nothing for none.
static char *token_name(const Model *m, int64_t id) {
    size_t n = 0;
    const bool known = id >= 0 && id < (int64_t)m->tokenizer->n_tokens;
    const char *text = known ? token_text(m->tokenizer, (uint32_t)id, &n) : NULL;
    char *name = allocate(n + 1, "the name of a token");
    if (n) memcpy(name, text, n);
    return name;
}

// A conversation that is still empty. system: the system message, or NULL. Ends the program if the
// model has no form for a conversation, or none for a system message, or nothing that ends an
// answer.
static Chat chat_new(const Model *m, const char *system, const char *path) {
    const Config *c = &m->config;
    Chat chat = { .has_system = system != NULL };
    if (!c->generation.chat_template)
        fail(FAILED, "%s: has no chat template, which --mode chat needs; generate continues a text",
             path);
    if (c->generation.eos_token_id[0] < 0 && c->generation.generation_eos[0] < 0)
        fail(FAILED, "%s: has no eos_token_id, which --mode chat needs", path);
    if (c->generation.chat_template == CHAT_OF_PIECES) {
        memcpy(chat.piece, c->generation.chat, sizeof chat.piece);
    } else {
        const char *bos = token_name(m, c->generation.bos_token_id);
        const char *eos = token_name(m, c->generation.eos_token_id[0]);
        chat.piece[CHAT_BEGIN] = joined(bos, "User: ", "");
        chat.piece[CHAT_SYSTEM] = bos;
        chat.piece[CHAT_SYSTEM_USER] = "\n\nUser: ";
        chat.piece[CHAT_USER_ASSISTANT] = "\n\nAssistant: ";
        chat.piece[CHAT_ASSISTANT_USER] = joined(eos, "User: ", "");
        chat.piece[CHAT_ANSWER] = "\n\nAssistant:";
        chat.piece[CHAT_TRIM] = "";
    }
    if (system && !*chat.piece[CHAT_SYSTEM] && !*chat.piece[CHAT_SYSTEM_USER])
        fail(WRONG_USAGE, "--system: the chat template of %s has no place for a system message",
             path);
    if (system) add_text(&chat.system, system, strlen(system));
    return chat;
}

// Adds the next message, which the conversation keeps. The answer of a model often begins with a
// blank that the template has behind "Assistant:" in an earlier answer; then it is left out here.
static void chat_add(Chat *chat, Text message) {
    const char *before = chat->piece[CHAT_USER_ASSISTANT], *answer = chat->piece[CHAT_ANSWER];
    const size_t length = strlen(answer), rest = strlen(before) - min_size(strlen(before), length);
    if (chat->n % 2 && rest && message.n >= rest && !strncmp(before, answer, length) &&
        !memcmp(message.bytes, before + length, rest))
        memmove(message.bytes, message.bytes + rest, message.n -= rest);
    Text *more = allocate(checked_mul(chat->n + 1, sizeof *more), "the conversation");
    if (chat->n) memcpy(more, chat->message, chat->n * sizeof *more);
    release(chat->message);
    chat->message = more;
    chat->message[chat->n++] = message;
}

// Adds a piece of the template to a text, and that it is none of a message to a mask.
static void add_piece(Text *text, Text *mask, const char *piece) {
    for (; *piece; piece++) {
        add_text(text, piece, 1);
        add_text(mask, "", 1);
    }
}

// Whether a character is white space for Python, which a template's trim takes off.
static bool is_trimmed(uint32_t code) { return is_white(code) || (code >= 0x1C && code <= 0x1F); }

// Adds a message, without the white space around it where the template trims those of this role.
static void add_message(Text *text, Text *mask, const Chat *chat, const Text *m, const char *role) {
    const bool trim = strstr(chat->piece[CHAT_TRIM], role) != NULL;
    size_t from = 0, to = m->n;
    uint32_t code;
    for (size_t length; trim && from < to; from += length) {
        length = next_char(m->bytes + from, to - from, &code);
        if (!is_trimmed(code)) break;
    }
    while (trim && to > from) {
        const size_t last = previous_char(m->bytes, from, to);
        next_char(m->bytes + last, to - last, &code);
        if (!is_trimmed(code)) break;
        to = last;
    }
    for (size_t i = from; i < to; i++) {
        add_text(text, m->bytes + i, 1);
        add_text(mask, "\1", 1);
    }
}

// The ids of the conversation from its first question that is not forgotten up to where the model
// is to answer the last one, *n of them. The caller releases them. Names of special tokens count in
// the pieces of the template, and are text in messages.
static int *chat_ids(const Model *m, const Chat *chat, size_t *n) {
    Text text = { 0 }, mask = { 0 };
    if (chat->has_system) {
        add_piece(&text, &mask, chat->piece[CHAT_SYSTEM]);
        add_message(&text, &mask, chat, &chat->system, "system");
    }
    add_piece(&text, &mask, chat->piece[chat->has_system ? CHAT_SYSTEM_USER : CHAT_BEGIN]);
    for (size_t i = chat->from; i < chat->n; i++) {
        const bool last = i + 1 == chat->n, answer = i % 2;
        add_message(&text, &mask, chat, &chat->message[i], answer ? "assistant" : "user");
        add_piece(&text, &mask, chat->piece[last ? CHAT_ANSWER : answer ? CHAT_ASSISTANT_USER
                                                                       : CHAT_USER_ASSISTANT]);
    }
    int *ids = allocate(checked_mul(text.n + 1, sizeof(int)), "the conversation");
    *n = encode_around(m->tokenizer, ids, NULL, text.bytes, text.n, 1, mask.bytes);
    free(text.bytes);
    free(mask.bytes);
    return ids;
}

// Gives back the memory of a conversation.
static void chat_free(Chat *chat) {
    for (size_t i = 0; i < chat->n; i++) free(chat->message[i].bytes);
    release(chat->message);
    free(chat->system.bytes);
}
#endif // CHAT_H
