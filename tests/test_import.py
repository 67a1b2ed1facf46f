"""Folders from elsewhere: what export.py and ./run make of them is what transformers makes of them.

    python tests/test_import.py [SEED]          some minutes of random folders: tests/long.sh

Chat templates, tokens that only other files than tokenizer.json have, vocab.json with merges.txt, BOS,
ids that end a text, and contradicting RoPE keys: each is made in many variants, read by both, and
compared. Ends in a line `N passed, N failed`. Needs transformers of requirements-ci.txt, no network.
"""
import json, os, random, re, shutil, subprocess, sys, tempfile, time, traceback

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TMP = tempfile.mkdtemp(prefix="test_import-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{TMP}/home", "TRANSFORMERS_VERBOSITY": "critical",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_WAIT_POLICY": "passive"}
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, ROOT]

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import export

torch.set_num_threads(1)
passed = failed = 0
rng = random.Random(int(sys.argv[1]) if sys.argv[1:] else 1)
ROUNDS = 200 if sys.argv[1:] else 20


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}: {str(detail)[-1500:]}")


def run(*command, input=None):
    return subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, input=input)


def to_model(folder, name="m.bin"):
    """(path of the model.bin, what export.py said); its exit code must be 0."""
    path = f"{TMP}/{name}"
    done = run(sys.executable, "export.py", folder, path)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr.decode()}")
    return path, done.stderr.decode()


def info(path):
    lines = run("./run", path, "-m", "info").stdout.decode().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def ids_of(path, text):
    done = run("./run", path, "-m", "tokenize", "-f", write("text", text))
    check("tokenize ends well", done.returncode == 0, done)
    return [int(i) for i in done.stdout.split()]


def write(name, data):
    path = name if name.startswith("/") else f"{TMP}/{name}"
    data = json.dumps(data, ensure_ascii=False) if isinstance(data, (dict, list)) else data
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    return path


# ---- folders -------------------------------------------------------------------------------------

BOS, EOS, EXTRA = "<bos>", "<eos>", "<extra>"
PAIRS = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "a"), ("t", "h"), ("Ġ", "th"), ("1", "2")]
VOCAB = {token: i for i, token in enumerate([*export.BYTE_LEVEL, *("".join(p) for p in PAIRS)])}
FIRST = len(VOCAB)                      # BOS, EOS, EXTRA follow
V, D = FIRST + 24, 48


def special(content, i, **flags):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True} | flags


def tokenizer_json(added=None, post_processor=None):
    added = [special(t, FIRST + i) for i, t in enumerate((BOS, EOS, EXTRA))] if added is None else added
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": level, "post_processor": post_processor,
            "decoder": level, "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "ignore_merges": False, "vocab": VOCAB, "merges": [" ".join(p) for p in PAIRS]}}


CONFIG = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": V,
          "hidden_size": D, "intermediate_size": 8, "moe_intermediate_size": 8,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
          "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
          "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1,
          "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
          "max_position_embeddings": 2048, "rope_theta": 10000.0, "bos_token_id": FIRST,
          "eos_token_id": FIRST + 1, "tie_word_embeddings": False, "torch_dtype": "float32"}


def weights(follows):
    """A model in which token t is followed by follows[t], whatever is in front of it: no layer adds
    anything, and the head finds the embedding of the token before."""
    c = export.config_from_json(dict(CONFIG), "CONFIG")
    out = {}
    for t in export.tensors(c):
        for copy in range(t.copies):
            ones = t.kind == export.NORM
            out[t.name.format(copy)] = (np.ones if ones else np.zeros)(t.shape, np.float32)
    e = np.random.default_rng(1).standard_normal((V, D)).astype(np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    out[export.EMBEDDING] = e
    head = np.zeros((V, D), np.float32)
    for t in range(V):
        head[follows[t]] += e[t]
    out[export.LM_HEAD] = head
    return out


FOLLOWS = {t: (t * 5 + 3) % 250 + 33 if (t * 5 + 3) % 250 + 33 < 126 else 65 + t % 20 for t in range(V)}
WEIGHTS = weights(FOLLOWS)


def folder(tokenizer=None, settings=None, config=None, w=WEIGHTS, name="in", **files):
    """Writes a checkpoint; files by name, with _ for the dot."""
    path = f"{TMP}/{name}"
    shutil.rmtree(path, ignore_errors=True)
    os.mkdir(path)
    write(f"{path}/config.json", CONFIG | (config or {}))
    if tokenizer is not None:
        write(f"{path}/tokenizer.json", tokenizer)
    if settings is not None:
        write(f"{path}/tokenizer_config.json", settings)
    for file, data in files.items():
        write(f"{path}/" + re.sub("_(json|txt|jinja)$", r".\1", file), data)
    save_file(w, f"{path}/model.safetensors", {"format": "pt"})
    return path


SETTINGS = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}


# ---- chat templates ------------------------------------------------------------------------------

DEEPSEEK_V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
    "message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + "
    "message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + "
    "'\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
          " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant"
          "\n' }}{% endif %}")
DEFAULT_SYSTEM = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
                  "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
                  + CHATML.removeprefix("{% for message in messages %}"))
LLAMA_3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
           "'<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<eot>' %}"
           "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}")
LLAMA_2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
           "system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% "
           "set system_message = false %}{% endif %}{% for message in loop_messages %}{% if "
           "(message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
           "alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set "
           "content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else"
           " %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ "
           "bos_token + '[INST] ' + content STRIP + ' [/INST]' }}{% elif message['role'] == "
           "'assistant' %}{{ ' ' + content STRIP + ' ' + eos_token }}{% endif %}{% endfor %}")
MISTRAL = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
           "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if "
           "message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif "
           "message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
         "supported') }}{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' "
         "%}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ "
         "'<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
         "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
          "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n'"
          " + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ "
          "'<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and "
          "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
GENERATION = CHATML.replace("{{'<|im_start|>'", "{% generation %}{{'<|im_start|>'").replace(
    "'\n'}}{% endfor %}", "'\n'}}{% endgeneration %}{% endfor %}")
TAKEN = {
    "DeepSeek-V2": DEEPSEEK_V2, "ChatML": CHATML, "a default system message": DEFAULT_SYSTEM,
    "Llama 3": LLAMA_3, "Llama 2 without strip": LLAMA_2.replace(" STRIP", ""), "Mistral": MISTRAL,
    "Gemma": GEMMA, "Zephyr": ZEPHYR, "{% generation %}": GENERATION,
    "ends in <think>": DEEPSEEK_V2.replace("{{ 'Assistant:' }}", "{{ 'Assistant:' }}<think>\n"),
    "another eos_token": "{% set eos_token = '<extra>' %}" + DEEPSEEK_V2,
    "no BOS": DEEPSEEK_V2.replace("{{ bos_token }}", ""),
    "text in front": "A chat. " + DEEPSEEK_V2, "white space between": DEEPSEEK_V2.replace(
        "{% for", " \n {% for").replace("{% endfor %}", "\n\n {% endfor %}"),
    "system messages are left out": MISTRAL.replace("{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}"),
    "trimmed answers only": CHATML.replace("message['content'] +", "(message['content'] | trim if "
        "message['role'] == 'assistant' else message['content']) +"),
    "break and continue": CHATML.replace("%}{{'<|im_start|>'", "%}{% if loop.index > 90 %}{% break %}"
                                         "{% endif %}{{'<|im_start|>'", 1),
    "a namespace and a macro": "{% set ns = namespace(n=0) %}{% macro m(x) %}<{{ x }}>{% endmacro %}"
        "{% for x in messages %}{{ m(x.role) }}{{ x.content }}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ m('assistant') }}",
}
REFUSED = {
    "numbered": ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "does more"),
    "Llama 2": (LLAMA_2.replace("STRIP", ".strip()").replace("content .", "content."), "does more"),
    "thoughts are dropped": (CHATML.replace("message['content'] +", "message['content'].split("
                                            "'</think>')[-1] +"), "does more"),
    "the system message comes last": (
        "{% for m in messages if m.role != 'system' %}{% if loop.last and messages[0].role == 'system' "
        "%}{{ messages[0].content }}\n\n{% endif %}[{{ m.content }}]{% endfor %}", "does more"),
    "only the last message": ("{{ messages[-1].content }}", "does not have the messages"),
    "upper case": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "messages"),
    "the date": (CHATML + "{{ strftime_now('%d %b %Y') }}", "what day it is"),
    "replaces": (CHATML.replace("message['content'] +", "message['content'] | replace('\n', ' ') +"),
                 "odd white space"),
    "a first turn of its own": ("{% for m in messages %}{% if loop.index == 3 %}!{% endif %}"
                                "{{ m.role ~ m.content }}{% endfor %}", "does more"),
    "syntax": ("{% for %}", "cannot be run (TemplateSyntaxError"),
    "no such name": ("{{ 'x' + nothing }}", "cannot be run (UndefinedError"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "cannot be run (SecurityError"),
    "a loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
               "{% endfor %}{% endfor %}{% endfor %}", "takes more than"),
    "memory": ("{{ 'a' * 99999999999 }}", "cannot be run"),
    "much text": ("{{ 'a' * 9999999 }}", "characters"),
    "a large power": ("{{ 9 ** (9 ** 9) }}", "takes more than"),
    "NUL": (CHATML + "{{ '\\x00' }}", "makes NUL"),
    "half a character": (CHATML + "{{ '\\ud800' }}", "halves of characters"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be run"),
    "no list": ("{{ messages | tojson }}", "messages"),
}
SAID = ["hello", "  what is 12?\t", "and <eos> then\u00a0", "a\u2003b", "<|im_end|>\\n", "x" * 30]
SYSTEMS = [None, "be brief", "\n  be <bos> kind\n\n"]
TOKENS = [special(t, FIRST + i) for i, t in enumerate(
    (BOS, EOS, EXTRA, "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<eot>", "<|user|>"))]
TOKENS[4]["rstrip"] = True              # as Phi-3's <|end|>, which takes the newline behind it


def plain(tokenizer, template, messages):
    """The ids of a conversation for transformers, whose contents it takes as text, as ./run does."""
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True,
                                         add_generation_prompt=True, return_dict=False,
                                         sanitize_control_tokens=True)


def test_templates():
    for name, template in TAKEN.items():
        path = folder(tokenizer_json(TOKENS), SETTINGS | {"chat_template": template})
        model, said = to_model(path)
        form = info(model)["chat_template"]
        check(f"{name}: is taken, in silence", form == (
            "deepseek_v2" if name == "DeepSeek-V2" else "pieces") and said.count("\n") == 1, said)
        theirs = AutoTokenizer.from_pretrained(path)
        for system in SYSTEMS:
            lines = [line for line in SAID if line.strip()]
            options = ["-m", "chat", "-t", 0, "-n", 7, "--verbose-prompt"]
            options += [] if system is None else ["--system", system]
            done = run("./run", model, *options, input="".join(x + "\n" for x in lines).encode())
            if done.returncode == 2:
                check(f"{name}: no place for a system message", system is not None and
                      name in ("Mistral", "Gemma", "system messages are left out"), done)
                continue
            prompts = [[int(i) for i in line.split()[1:]]
                       for line in done.stderr.decode().splitlines() if line.startswith("prompt: ")]
            answers = done.stdout.decode().split("\n")[:-1]
            check(f"{name}: an answer for each line", len(answers) == len(prompts) == len(lines), done)
            messages = [] if system is None else [{"role": "system", "content": system}]
            for line, prompt, answer in zip(lines, prompts, answers):
                messages.append({"role": "user", "content": line})
                wanted = plain(theirs, template, messages)
                check(f"{name}: the ids with system {system!r}, {len(messages)} messages",
                      prompt == wanted, (prompt, wanted))
                messages.append({"role": "assistant", "content": answer})


def test_refused_templates():
    for name, (template, words) in REFUSED.items():
        path = folder(tokenizer_json(), SETTINGS | {"chat_template": template})
        start = time.monotonic()
        model, said = to_model(path)
        check(f"{name}: is said in one line, with words {words}", said.count("\n") == 2 and words in said
              and "no ./run -m chat" in said, said)
        check(f"{name}: no template", info(model)["chat_template"] == "none")
        check(f"{name}: soon", time.monotonic() - start < 30, time.monotonic() - start)
    path = folder(tokenizer_json(), SETTINGS | {"chat_template": CHATML})
    code = "import sys; sys.modules['jinja2'] = None; sys.argv = sys.argv[1:]; import export; sys.exit(export.main())"
    done = run(sys.executable, "-c", code, "export.py", "--render-chat", input=json.dumps([CHATML, {}]).encode())
    check("without jinja2", "needs jinja2" in done.stdout.decode(), done)


def test_random_templates():
    """Programs of random parts: whatever is taken makes what transformers makes."""
    contents = ["message['content']", "message.content | trim", "message['content'].strip()",
                "(' ' ~ message.content)", "message['content'] | replace('  ', ' ')",
                "(message.content if loop.index < 4 else message.content | trim)"]
    texts = ["'User: '", "'\n'", "bos_token", "eos_token", "'<|im_start|>'", "message['role']", "' '",
             "('-' if loop.first else '')", "('+' if loop.last else '')", "'[/INST]'",
             "('even' if loop.index0 % 2 else 'odd')", "(loop.index | string if loop.index > 5 else '')"]
    taken = 0
    for n in range(3 * ROUNDS):
        pick = lambda n: [rng.choice(texts) for _ in range(rng.randrange(n))]
        body = "".join(
            "{%% %s message['role'] == '%s' %%}{{ %s }}" % (
                "elif" if i else "if", role, " + ".join([*pick(3), rng.choice(
                    contents if rng.random() < 0.3 else contents[:1]), *pick(3)]))
            for i, role in enumerate(("user", "assistant", "system"))) + "{% endif %}"
        template = rng.choice(["", "{{ bos_token }}", " "]) + (
            "{% for message in messages %}" + body + rng.choice(["", "\n"]) + "{% endfor %}"
            + rng.choice(["", "{{ 'Assistant:' }}", "{% if add_generation_prompt %}>{% endif %}"]))
        path = folder(tokenizer_json(TOKENS), SETTINGS | {"chat_template": template})
        model, said = to_model(path)
        if info(model)["chat_template"] == "none":
            check("the reason is said", "no ./run -m chat" in said, said)
            continue
        taken += 1
        theirs = AutoTokenizer.from_pretrained(path)
        lines = rng.sample(SAID, 4)
        for system in (None, rng.choice(SYSTEMS[1:])):
            options = [] if system is None else ["--system", system]
            done = run("./run", model, "-m", "chat", "-t", 0, "-n", 5, "--verbose-prompt", *options,
                       input="".join(x + "\n" for x in lines).encode())
            if done.returncode == 2 and system:
                continue
            messages = [] if system is None else [{"role": "system", "content": system}]
            prompts = [[int(i) for i in line.split()[1:]]
                       for line in done.stderr.decode().splitlines() if line.startswith("prompt: ")]
            for line, prompt, answer in zip(lines, prompts, done.stdout.decode().split("\n")):
                messages.append({"role": "user", "content": line})
                wanted = plain(theirs, template, messages)
                check(f"random template {template!r}", prompt == wanted, (prompt, wanted))
                messages.append({"role": "assistant", "content": answer})
    check("some are taken, others not", 3 * ROUNDS > taken > ROUNDS // 2, taken)


# ---- tokens --------------------------------------------------------------------------------------

def random_token(content):
    flags = {key: rng.random() < 0.3 for key in ("lstrip", "rstrip", "normalized", "special")}
    return {"content": content, "single_word": False} | flags


def test_outside_tokens():
    """added_tokens_decoder, added_tokens.json, special_tokens_map.json, extra special tokens."""
    names = [BOS, EOS, EXTRA, "<new>", "<b>", "hello", "<pad>", " <x>"]
    for n in range(6 * ROUNDS):
        inside = [random_token(t) | {"id": FIRST + i} for i, t in enumerate((BOS, EOS, EXTRA))]
        settings, files = dict(SETTINGS), {}
        some = lambda k: rng.sample(names, rng.randrange(k))
        if rng.random() < 0.5:
            ids = {name: FIRST + i for i, name in enumerate((BOS, EOS, EXTRA))} | {"hello": VOCAB["hello"]}
            settings["added_tokens_decoder"] = {
                str(ids.get(t, FIRST + 3 + i)): random_token(t)
                for i, t in enumerate(dict.fromkeys(some(8)))}
        if rng.random() < 0.4:
            files["added_tokens_json"] = {t: FIRST + 3 + i for i, t in enumerate(some(4))}
        if rng.random() < 0.4:
            files["special_tokens_map_json"] = {"pad_token": rng.choice(["<pad>", random_token("<pad>")]),
                                                "eos_token": EOS}
        if rng.random() < 0.3:
            settings[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = some(4)
        if rng.random() < 0.2:
            settings["pad_token"] = "<pad>"
        path = folder(tokenizer_json(inside), settings, **files)
        try:
            model, said = to_model(path)
        except RuntimeError as e:       # what the C code cannot do is refused by name
            check("refused by name", "not supported" in str(e), e)
            continue
        theirs = AutoTokenizer.from_pretrained(path)
        for _ in range(4):
            parts = [rng.choice([*names, " ", "\t", "a", "hello", " the", "\n\n", "12"]) for _ in range(9)]
            text = "".join(parts)
            wanted = theirs(text, add_special_tokens=False).input_ids
            check(f"ids of {text!r}", ids_of(model, text) == wanted, (wanted, ids_of(model, text), said,
                  settings, files, inside))


def test_bos():
    def template(*ends):
        parts = [{"SpecialToken": {"id": ends[0], "type_id": 0}}] if ends[0] else []
        return {"type": "TemplateProcessing", "single": [*parts, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [*parts, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {BOS: {"id": BOS, "ids": [FIRST], "tokens": [BOS]}}}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    for kind in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", None):
        for post in (None, level, template(BOS), template(None),
                     {"type": "Sequence", "processors": [level, template(BOS)]}):
            for add in (None, True, False):
                settings = SETTINGS | {"tokenizer_class": kind} | {"add_bos_token": add}
                settings = {k: v for k, v in settings.items() if v is not None}
                path = folder(tokenizer_json(post_processor=post), settings)
                model, said = to_model(path)
                theirs = AutoTokenizer.from_pretrained(path)
                wanted = theirs("a").input_ids[0] == FIRST
                check(f"{kind}, {post}, add_bos_token {add}", info(model)["add_bos_token"] ==
                      ("true" if wanted else "false"), said)
                check("what does not count is said", ("does not count" in said) == (add not in (None, wanted)))
    for add in ("true", "false"):       # and through transformers and back
        path = folder(tokenizer_json(), SETTINGS)
        model, _ = to_model(path)
        run("./train", "--init", model, "-d", write("data.txt", "hello the 12\n" * 99), "-x", 1, "-b", 1,
            "-l", 16, "--add_bos_token", add, "--eval_steps", 0, "-o", f"{TMP}/trained.bin")
        done = run(sys.executable, "export.py", f"{TMP}/trained.bin", f"{TMP}/out", "--model_type", "deepseek_v2")
        check("goes out", done.returncode == 0, done)
        AutoTokenizer.from_pretrained(f"{TMP}/out").save_pretrained(f"{TMP}/out")
        model, _ = to_model(f"{TMP}/out")
        check(f"add_bos_token {add} survives", info(model)["add_bos_token"] == add, info(model))
        shutil.rmtree(f"{TMP}/out")


def test_vocab_and_merges():
    for kind in ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"):
        for add_bos in (None, True):
            settings = SETTINGS | {"tokenizer_class": kind} | ({"add_bos_token": True} if add_bos else {})
            path = folder(None, settings, vocab_json=VOCAB, merges_txt="#version: 0.2\n" + "".join(
                " ".join(pair) + "\n" for pair in PAIRS))
            model, said = to_model(path)
            theirs = AutoTokenizer.from_pretrained(path)
            for text in ("hello <eos> wörld 12 the", "a  b\r\n\n\tthe\u3000x", "it's 1234 IT'S", "<|endoftext|>"):
                wanted = theirs(text, add_special_tokens=False).input_ids
                check(f"{kind}: ids of {text!r}", ids_of(model, text) == wanted, (wanted, ids_of(model, text)))
            check(f"{kind}: BOS", info(model)["add_bos_token"] == ("true" if theirs("a").input_ids[0] == FIRST
                                                                  else "false"), said)
            run(sys.executable, "export.py", model, f"{TMP}/out", "--model_type", "deepseek_v2")
            check(f"{kind}: the files come back", {"vocab.json", "merges.txt"} <= {*os.listdir(f"{TMP}/out")}
                  and "tokenizer.json" not in os.listdir(f"{TMP}/out"))
            shutil.rmtree(f"{TMP}/out")
    path = folder(None, SETTINGS)
    write(f"{path}/tokenizer.model", b"\n\x0e")
    _, said = to_model(path)
    check("tokenizer.model is named", "has tokenizer.model but no tokenizer.json" in said, said)


# ---- config.json ---------------------------------------------------------------------------------

def test_rope():
    """Which of contradicting keys count."""
    kinds = [{}, {"type": "yarn"}, {"rope_type": "yarn"}, {"rope_type": "default"}, {"rope_type": "linear"},
             {"type": "linear", "rope_type": "default"}, {"rope_type": "yarn", "type": "default"},
             {"type": "yarn", "rope_type": "linear"}, {"type": "linear", "rope_type": "linear"}]
    for n in range(4 * ROUNDS):
        config = {}
        for name in ("rope_scaling", "rope_parameters"):
            rope = dict(rng.choice(kinds)) | rng.choice([{}, {"rope_theta": 500.0}])
            if rope.keys() - {"rope_theta"}:
                rope |= {"factor": float(rng.randrange(2, 9)), "original_max_position_embeddings": 64}
                rope |= rng.choice([{}, {"mscale": None, "mscale_all_dim": None}, {"beta_fast": 16.0}])
            config[name] = rng.choice([None, rope, rope])
        config = {"rope_theta": 777.0} | {k: dict(rng.sample([*v.items()], len(v))) if v else v
                                          for k, v in config.items()}
        path = folder(None, None, config)
        theirs = AutoConfig.from_pretrained(path).rope_parameters
        model, said = to_model(path)
        ours = info(model)
        kind = {"default": "null"}.get(theirs["rope_type"], theirs["rope_type"])
        check(f"kind of {config}", ours["rope_scaling.type"] == kind, (ours["rope_scaling.type"], theirs))
        check(f"theta of {config}", float(ours["rope_theta"]) == theirs["rope_theta"], theirs)
        if kind != "null":
            check(f"factor of {config}", float(ours["rope_scaling.factor"]) == theirs["factor"], theirs)
        if kind == "yarn":
            check(f"original context of {config}", ours["rope_scaling.original_max_position_embeddings"]
                  == str(theirs["original_max_position_embeddings"]), theirs)
        several = [c for c in (config["rope_scaling"], config["rope_parameters"]) if c]
        clash = len(several) == 2 and several[0] != several[1] or any(
            c.get("type", c.get("rope_type")) != c.get("rope_type", c.get("type")) for c in several)
        check(f"a contradiction is said: {config}", ("warning: rope" in said) >= clash, said)


def test_odd_configs():
    """What makes no difference is read."""
    to_model(folder(None, None, {"torch_dtype": "auto"}))      # transformers' own demands a type
    for config in ({"attention_dropout": 0.1}, {"topk_method": None},
                   {"first_k_dense_replace": 9}, {"num_key_value_heads": 2, "head_dim": 8},
                   {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": None, "mscale_all_dim": 0.7,
                                     "original_max_position_embeddings": 64}}):
        path = folder(None, None, config)
        model, said = to_model(path)
        ids = [FIRST, 70, 71, 72]
        theirs = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits[0].detach().float().numpy()
        run("./run", model, "-m", "eval", "--ids", "-i", " ".join(map(str, ids)), "--logits", f"{TMP}/logits")
        ours = np.fromfile(f"{TMP}/logits", "<f4").reshape(4, -1)
        check(f"{config}: logits", abs(ours - theirs).max() < 1e-5 * abs(theirs).max(), abs(ours - theirs).max())
        check(f"{config}: no warning", "warning" not in said, said)
    path = folder(None, None, {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    check("yarn without its original context", "original_max_position_embeddings is missing" in to_model(path)[1])


def test_ends():
    """Ids that end a text, of config.json and of generation_config.json."""
    start = 70
    chain = [start]
    while FOLLOWS[chain[-1]] not in chain:
        chain.append(FOLLOWS[chain[-1]])
    check("the model does not repeat itself at once", len(chain) > 5, chain)
    a, b, far = chain[3], chain[5], FIRST + 9
    cases = [({"eos_token_id": ids}, None) for ids in (a, [a], [far, b], [b, a], [far])]
    cases += [({"eos_token_id": far}, ids) for ids in (a, [a], [far, b], [b, a])]
    cases += [({"eos_token_id": [far, b]}, [far, b, a]), ({"eos_token_id": None}, [b])]
    for config, ids in cases:
        files = {} if ids is None else {"generation_config_json": {"eos_token_id": ids, "do_sample": False}}
        path = folder(None, None, config, **files)
        model, said = to_model(path)
        theirs = AutoModelForCausalLM.from_pretrained(path)
        wanted = theirs.generate(torch.tensor([[start]]), max_new_tokens=8, pad_token_id=0)[0].tolist()
        done = run("./run", model, "-t", 0, "--ids", "-i", start, "-n", 8)
        check(f"{config}, {ids}: greedy ids", [int(i) for i in done.stdout.split()] == wanted, (done, wanted))
        run(sys.executable, "export.py", model, f"{TMP}/out", "--model_type", "deepseek_v2")
        with open(f"{TMP}/out/config.json") as f:
            back = json.load(f)["eos_token_id"]
        one = config["eos_token_id"]
        check(f"{config}: comes back", back == (one[0] if isinstance(one, list) and len(one) == 1 else one), back)
        again, _ = to_model(f"{TMP}/out", "again.bin")
        with open(model, "rb") as x, open(again, "rb") as y:
            check(f"{config}: there and back", x.read() == y.read())
        shutil.rmtree(f"{TMP}/out")


def test_generation_defaults():
    """A generation_config.json without do_sample is greedy, there and here."""
    for generation in ({}, {"temperature": 0.5}, {"do_sample": None, "top_k": 3}, {"do_sample": True},
                       {"do_sample": True, "temperature": 0.5}, {"do_sample": False, "top_p": 0.5}):
        path = folder(None, None, generation_config_json=generation)
        theirs = AutoModelForCausalLM.from_pretrained(path).generation_config
        ours = info(to_model(path)[0])["temperature"]
        check(f"{generation}: greedy or not", (float(ours) == 0) == (not theirs.do_sample), (ours, theirs))


# ---- weights -------------------------------------------------------------------------------------

def test_names_of_tensors():
    tied = {"tie_word_embeddings": True}
    one = {k: v for k, v in WEIGHTS.items() if k != export.LM_HEAD}
    model, _ = to_model(folder(None, None, tied, w=one), "one.bin")
    with open(model, "rb") as f:
        wanted = f.read()
    for what, w, words in (
            ("stored twice", one | {export.LM_HEAD: one[export.EMBEDDING]}, ""),
            ("_orig_mod.", {"_orig_mod." + k: v for k, v in one.items()}, "takes _orig_mod. off"),
            ("module.", {"module." + k: v for k, v in one.items()}, "takes module. off"),
            ("both", {"module._orig_mod." + k: v for k, v in one.items()}, "takes module._orig_mod. off"),
            ("inv_freq", one | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}, "")):
        model, said = to_model(folder(None, None, tied, w=w))
        with open(model, "rb") as f:
            check(f"{what}: the same model", f.read() == wanted, said)
        check(f"{what}: what is said", said.count("\n") == 1 + bool(words) and words in said, said)
    for what, w, config, words in (
            ("two heads", one | {export.LM_HEAD: WEIGHTS[export.LM_HEAD]}, tied, "is not model.embed_tokens.weight"),
            ("a bias", WEIGHTS | {"lm_head.bias": np.zeros(V, np.float32)}, {}, "bias of lm_head"),
            ("the same name twice", one | {"module." + export.EMBEDDING: one[export.EMBEDDING]}, tied, "there twice")):
        done = run(sys.executable, "export.py", folder(None, None, config, w=w), f"{TMP}/no.bin")
        check(f"{what}: refused", done.returncode == 1 and words in done.stderr.decode()
              and len(done.stderr.splitlines()) == 1 and not os.path.exists(f"{TMP}/no.bin"), done)


def test_hub_cache():
    path = folder(tokenizer_json(), SETTINGS, name="plain")
    cache = f"{TMP}/models--org--name"
    os.makedirs(f"{cache}/snapshots")
    os.makedirs(f"{cache}/refs")
    shutil.move(path, f"{cache}/snapshots/0123abcd")
    _, said = to_model(cache)
    check("one snapshot", "reads its snapshot 0123abcd" in said, said)
    shutil.copytree(f"{cache}/snapshots/0123abcd", f"{cache}/snapshots/other")
    done = run(sys.executable, "export.py", cache, f"{TMP}/no.bin")
    check("two snapshots", done.returncode == 1 and b"0123abcd, other" in done.stderr, done)
    write(f"{cache}/refs/main", "other")
    _, said = to_model(cache)
    check("the one of main", "reads its snapshot other" in said, said)
    write(f"{cache}/refs/main", "../../etc")
    done = run(sys.executable, "export.py", cache, f"{TMP}/no.bin")
    check("main names nothing", done.returncode == 1 and b"which is not there" in done.stderr, done)
    done = run(sys.executable, "export.py", "deepseek-ai/DeepSeek-V2-Lite", f"{TMP}/no.bin")
    check("a name on the hub", done.returncode == 1 and b"hf download deepseek-ai/DeepSeek-V2-Lite --local-dir" in
          done.stderr and len(done.stderr.splitlines()) == 1, done)


def test_tokenizer_alone():
    whole = folder(tokenizer_json(TOKENS), SETTINGS | {"chat_template": CHATML})
    model, _ = to_model(whole)
    alone = f"{TMP}/alone"
    os.makedirs(alone)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{whole}/{name}", alone)
    for source in (alone, f"{alone}/tokenizer.json"):
        tok, said = to_model(source, "tok.bin")
        check("what it is", "a tokenizer of" in said, said)
        text = "hello <eos> the 12\n"
        check("the same ids", ids_of(tok, text) == ids_of(model, text))
        done = run("./run", tok, "-i", "x")
        check("is no model", done.returncode == 1 and b"is a tokenizer alone" in done.stderr, done)
        done = run("./train", "-d", write("data.txt", "hello the 12\n" * 99), "--tokenizer", tok, "-x", 2, "-b", 2,
                   "-l", 16, "--hidden_size", 16, "--num_hidden_layers", 1, "-o", f"{TMP}/t.bin")
        check("train takes it", done.returncode == 0, done)
        a, b = info(f"{TMP}/t.bin"), info(model)
        check("with what concerns texts", all(a[k] == b[k] for k in a if "token_id" in k or "chat" in k), (a, b))
        check("and its size", int(a["vocab_size"]) == FIRST + len(TOKENS), a["vocab_size"])
        for args in (["--resume", f"{TMP}/t.bin"], ["--init", f"{TMP}/t.bin"]):
            done = run("./train", *args, "-d", f"{TMP}/data.txt", "--tokenizer", tok, "-x", 3, "-b", 2,
                       "-l", 16, "-o", f"{TMP}/t2.bin")
            check(f"train {args[0]} agrees", done.returncode == 0, done)
        for args in ([tok, f"{TMP}/hf"], [tok, f"{TMP}/x.bin"], [source, f"{TMP}/x.bin", "--dtype", "q8"]):
            done = run(sys.executable, "export.py", *args)
            check(f"{args}: refused", done.returncode == 1 and b"tokenizer alone" in done.stderr, done)
    write(f"{alone}/fresh.json", CONFIG)
    done = run(sys.executable, "export.py", f"{alone}/fresh.json", f"{TMP}/fresh.bin", "--init", 3)
    check("--init takes the tokenizer beside config.json", done.returncode == 0 and
          ids_of(f"{TMP}/fresh.bin", "hello") == ids_of(model, "hello"), done)
    empty = f"{TMP}/empty"
    os.makedirs(empty)
    done = run(sys.executable, "export.py", empty, f"{TMP}/no.bin")
    check("an empty folder", done.returncode == 1 and b"config.json" in done.stderr, done)


def main():
    try:
        for name, test in globals().copy().items():
            if name.startswith("test_") and name in os.environ.get("ONLY", name).split():
                start = time.monotonic()
                try:
                    test()
                except Exception:                              # go on with the next test
                    check(name, False, traceback.format_exc())
                print(f"{name}: {time.monotonic() - start:.1f} s")
    finally:
        shutil.rmtree(TMP, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
