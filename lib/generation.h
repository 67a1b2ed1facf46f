// lib/generation.h - the keys of a config that concern texts rather than weights: tokens with a
// meaning, defaults for sampling, and the form of a conversation.
#ifndef GENERATION_H
#define GENERATION_H

enum { NO_TEMPLATE, DEEPSEEK_V2, CHAT_OF_PIECES };  // chat_template
enum { MOST_ENDS = 8 };                             // ids that end a text, at most
enum { CHAT_BEGIN, CHAT_SYSTEM, CHAT_SYSTEM_USER, CHAT_USER_ASSISTANT, CHAT_ASSISTANT_USER,
       CHAT_ANSWER, CHAT_TRIM, CHAT_KEYS };         // the keys of CHAT_OF_PIECES, see lib/chat.h

typedef struct {
    int64_t bos_token_id;           // token that starts a text; -1: none
    int64_t eos_token_id[MOST_ENDS];        // those that end one, train's first; -1: no more
    int64_t generation_eos[MOST_ENDS];      // those that generation_config.json has
    double temperature;             // defaults for sampling, -1 where the checkpoint had none
    int64_t top_k;
    double top_p, min_p, repetition_penalty;
    bool add_bos_token;             // a text gets BOS in front
    int chat_template;              // form of a conversation
    const char *chat[CHAT_KEYS];    // with CHAT_OF_PIECES: what stands around messages
    const char *default_prompt;     // what generating starts from where no prompt is given
} GenerationConfig;

// Whether generating stops at a token.
static bool ends_text(const GenerationConfig *g, int64_t id) {
    bool ends = false;
    for (int i = 0; i < MOST_ENDS; i++)
        ends |= id == g->eos_token_id[i] || id == g->generation_eos[i];
    return ends;
}
#endif // GENERATION_H
