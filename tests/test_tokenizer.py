"""Tests of the byte-level BPE tokenizer, from tokenizer.json through export.py to ./run's ids.

    python3 tests/test_tokenizer.py ./run              with the ids stored in tests/tokenizers.json
    python3 tests/test_tokenizer.py ./run --library ./train [TOKENIZER.json...]
                                          with Hugging Face's library `tokenizers`: more and longer
                                          texts, larger tokenizers, and those given by their path
    python3 tests/test_tokenizer.py --write            trains small tokenizers with the library and
                                                       writes tests/tokenizers.json
    python3 tests/test_tokenizer.py --unicode          prints the table for export.py [10]

Ends in a line `N passed, N failed`. Needs what requirements.txt says, and for all but the first
what requirements-ci.txt says of tokenizers.
"""
import base64, functools, glob, json, os, random, shutil, struct, subprocess, sys, tempfile
import textwrap, time, traceback, unicodedata, zlib

sys.dont_write_bytecode = True
import test_export
from test_export import HERE, bad, check, good, read, write
import export
import numpy as np

STORED = os.path.join(HERE, "tokenizers.json")
END = "<|endoftext|>"


# ---- small tokenizers of the kinds that are in use ---------------------------------------------

def split(regex, form="Regex"):
    return {"type": "Split", "pattern": {form: regex}, "behavior": "Isolated", "invert": False}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}
LETTERS = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
FAMILIES = {            # name: the stages before ByteLevel, and what else is special about it
    "gpt-2": ([], {}),
    "deepseek-v2": ([
        split("[\r\n]"), split("\\s?[A-Za-zµÀ-ÖØ-öø-ƺΑ-Ωα-ωЀ-ҁＡ-Ｚ]+"),
        split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"), split("\\s+$"), split("[一-龥ࠀ-一가-퟿]+"),
        digits(True)], {"holes": 7}),
    "deepseek-v3": ([
        split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"),
        split(r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"""
              r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + REST)], {}),
    "llama-3": ([
        split(f"{SHORT}|{LETTERS}" r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST)],
        {"whole": ["Ġquestion", "Ġpens", "199", "ä¸Ńæĸĩ", "ĠĠĠĠ", "<tool"]}),
    "o200k": ([
        split(f"{LETTERS}{UPPER}*{LOWER}+{SHORT}?|{LETTERS}{UPPER}+{LOWER}*{SHORT}?|"
              r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + REST)], {}),
    "nfc": ([
        digits(False), split(" =", "String"),
        split(f"'(?i:[sdmt]|ll|ve|re)|{LETTERS}" r"+\p{L}+| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
              r"\s+(?!\S)|\s+")], {"nfc": True}),
}
ADDED = {END: "special", "<tool": "", "<tool>": "", "<tool>s": "normalized",
         "<|left|>": "special lstrip", "<|right|>": "special rstrip", "\u200b": "normalized",
         "<both>": "lstrip rstrip normalized", "<｜x▁y｜>": "special normalized"}
SPACES = {"   ": "", "\t\t": "normalized", " <|left": "normalized", "\u3000": "lstrip"}


def tokenizer_json(name, merges):
    stages, special = FAMILIES[name]
    added = ADDED
    if name == "gpt-2":
        pre = BYTE_LEVEL | {"use_regex": True}
        added = {key: words for key, words in ADDED.items() if "rstrip" not in words} | SPACES
    else:
        pre = {"type": "Sequence", "pretokenizers": [*stages, BYTE_LEVEL]}
    tokens = sorted(export.BYTE_LEVEL)
    tokens += ["".join(pair) for pair in merges if "".join(pair) not in tokens]
    tokens += special.get("whole", [])
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    new = [content for content in added if content not in vocab]
    ids = {content: len(vocab) + special.get("holes", 0) + i for i, content in enumerate(new)}
    if "holes" in special:                                     # added tokens in the vocabulary
        vocab |= ids
    flags = "single_word", "lstrip", "rstrip", "normalized", "special"
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": (ids | vocab)[content], "content": content} |
                         {flag: flag in words.split() for flag in flags}
                         for content, words in added.items()],
        "normalizer": {"type": "NFC"} if "nfc" in special else None, "pre_tokenizer": pre,
        "post_processor": None, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": "whole" in special, "vocab": vocab,
                  "merges": merges}}


def trained(name, texts, n):
    """The n merges that the library finds in texts."""
    from tokenizers import Tokenizer, trainers
    t = Tokenizer.from_str(json.dumps(tokenizer_json(name, []) | {"added_tokens": []}))
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=256 + n, initial_alphabet=list(export.BYTE_LEVEL), show_progress=False))
    return json.loads(t.to_str())["model"]["merges"]


# ---- from texts to ids and back ------------------------------------------------------------------

CONFIG = {"model_type": "deepseek_v2", "hidden_size": 2, "intermediate_size": 1,
          "num_hidden_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 1, "q_lora_rank": None,
          "qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1, "n_routed_experts": None,
          "topk_method": "greedy", "max_position_embeddings": 64, "tie_word_embeddings": True,
          "bos_token_id": None, "eos_token_id": None}


def checkpoint(folder, tokenizer, vocab_size=4096, settings=None, **config):
    """A checkpoint of a tiny model with this tokenizer.json."""
    config = CONFIG | {"vocab_size": vocab_size} | config
    weights = {t.name: np.zeros(t.shape, np.float32)
               for t in export.tensors(export.config_from_json(dict(config), folder))}
    test_export.checkpoint(folder, config, weights, tokenizer=tokenizer)
    if settings is not None:
        write(f"{folder}/tokenizer_config.json", settings)
    return folder


def tokenize(run, path, texts, end=END):
    """The ids of each text, by one call of ./run: the token `end`, found first of all, separates
    them."""
    separator = tables(path)["ids"][end.encode()]
    file = path + ".txt"
    write(file, b"".join((t if isinstance(t, bytes) else t.encode()) + end.encode() for t in texts))
    done = subprocess.run([run, path, "-m", "tokenize", "-f", file], capture_output=True)
    check(done.returncode == 0, f"{path}: {done.stderr.decode()}")
    found = [[]]
    for i in map(int, done.stdout.split()):
        if i == separator:
            found.append([])
        else:
            found[-1].append(i)
    check(len(found) == len(texts) + 1 and not found[-1], f"{path}: {len(found)} texts")
    return found[:-1]


def tables(path):
    """What the checks need of the tokenizer's section of a model.bin."""
    data = read(path)
    sizes, lines = test_export.read_header(data)
    at = 64 + sizes["config_bytes"] + sizes["files_bytes"]
    section = data[at:at + sizes["tokenizer_bytes"]]
    head = struct.unpack_from("<16I", section)
    n = head[0]
    first = struct.unpack_from(f"<{n + 1}I", section, 64)
    at = 64 + export.aligned(4 * (n + 1))
    texts = [section[at + a:at + b] for a, b in zip(first, first[1:])]
    return {"head": head, "texts": texts, "ids": {t: i for i, t in enumerate(texts)},
            "lines": lines, "section": section}


def compare(name, path, texts, found, expected):
    decode = tables(path)["texts"]
    wrong = [i for i, ids in enumerate(found) if ids != expected[i]]
    for i in wrong[:5]:
        print(f"FAILED: {name}: {texts[i]!a:.300}\n  got    {found[i]!s:.300}\n"
              f"  wanted {expected[i]!s:.300}")
    test_export.failed += len(wrong)
    test_export.passed += len(found) - len(wrong)
    for text, ids in zip(texts, found):                        # these take in the space around them
        if not any(mark in text for mark in ("<|left|>", "<|right|>", "<both>", "\u3000")):
            back = b"".join(decode[i] for i in ids)
            check(back == text.encode(), f"{name}: {text!a:.99} comes back as {back!r:.99}")


# ---- with what is stored -------------------------------------------------------------------------

def test_stored(tmp, run):
    with open(STORED) as f:
        stored = json.load(f)
    for name, t in stored["tokenizers"].items():
        tokenizer = tokenizer_json(name, [tuple(merge.split(" ")) for merge in t["merges"]])
        path = f"{tmp}/{name}.bin"
        good(checkpoint(f"{tmp}/{name}", tokenizer), path)
        special, head = FAMILIES[name][1], tables(path)["head"]
        check(head[11] == ("whole" in special) + 2 * ("nfc" in special)
              and (head[2] > 256) == ("whole" in special) and (head[10] > 99) == ("nfc" in special),
              f"{name}: ignore_merges, NFC, and their tables")
        expected = [list(map(int, ids.split())) for ids in t["ids"]]
        check(len(expected) == len(stored["texts"]) > 20, name)
        compare(name, path, stored["texts"], tokenize(run, path, stored["texts"]), expected)
        random.seed(1)                                         # not UTF-8: nothing may get lost
        texts = [random.randbytes(n) for n in range(200)] + [
            bytes(random.choices(b"\xf0\x9f\x98\x80 \xe4\xb8a\n", k=n)) for n in range(200)]
        decode = tables(path)["texts"]
        for text, ids in zip(texts, tokenize(run, path, texts)):
            check(b"".join(decode[i] for i in ids) == text, f"{name}: {text}")


# ---- what is refused, and what else the files say -----------------------------------------------

def test_bombs(tmp, run):
    """Patterns that would grow beyond all bounds when written out are refused, soon."""
    for name, regex in (("groups", "(?:a|b)" * 40 + "c"), ("optional groups", "(?:ab)?" * 30 + "c"),
                        ("classes", r"[\p{L}x]" * 5000), ("alternatives", "ab|" * 20000 + "c"),
                        ("a group of alternatives", "(?:" + "a|" * 900 + "b)" + "(?i:k|s)" * 3),
                        ("many counts", r"\p{L}{1,999999}" * 2000), ("a literal", "a" * 100000),
                        ("nested", "(?:" * 2000 + "a" + ")" * 2000)):
        start = time.monotonic()
        try:
            export.Regex(regex)
            check(len(regex) < 9999, name)
        except ValueError as e:
            check(len(str(e)) < 200, f"{name}: {e}")
        check(time.monotonic() - start < 3, f"{name} takes {time.monotonic() - start:.1f} s")
    try:
        export.literal("a" * 100000)
        check(False, "a literal pattern")
    except ValueError:
        check(True, "a literal pattern")


def test_refusals(tmp, run):
    """By name, in one line, before anything is written."""
    folder = checkpoint(f"{tmp}/r", {}, 300)
    path, args = f"{folder}/tokenizer.json", [folder, f"{tmp}/r.bin"]
    merges = [["a", "b"], ["Ġ", "ab"]]
    t = tokenizer_json("gpt-2", merges)
    vocab, added, end = t["model"]["vocab"], t["added_tokens"], len(t["model"]["vocab"])

    def case(change, *words):
        write(path, t | change)
        bad(args, "tokenizer.json", *words)

    def model(change, *words):
        case({"model": t["model"] | change}, *words)

    def stages(*stages_and_words):
        *found, words = stages_and_words
        case({"pre_tokenizer": {"type": "Sequence", "pretokenizers": found}}, *words)

    def token(change, *words, i=0):
        case({"added_tokens": added[:i] + [added[i] | change] + added[i + 1:]}, *words)
    write(path, t)
    good(*args)
    os.remove(args[1])

    for kind in ("Unigram", "WordPiece", "WordLevel"):
        model({"type": kind}, f'model "{kind}"', "only BPE")
    model({"dropout": 0.1}, "dropout is 0.1")
    model({"continuing_subword_prefix": "##"}, 'continuing_subword_prefix is "##"')
    model({"end_of_word_suffix": "</w>"}, 'end_of_word_suffix is "</w>"')
    model({"byte_fallback": True}, "byte_fallback is true")
    for kind in ("NFD", "NFKC", "Lowercase", "Replace", "ByteLevel"):
        case({"normalizer": {"type": kind}}, f'normalizer "{kind}"', "only NFC")
        case({"normalizer": {"type": "Sequence", "normalizers": [{"type": kind}]}}, kind)
    case({"decoder": {"type": "Metaspace"}}, 'decoder "Metaspace"')

    case({"pre_tokenizer": None}, "pre_tokenizer", "ByteLevel")
    case({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer", "ByteLevel")
    case({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space")
    stages(["ByteLevel"])
    stages(BYTE_LEVEL, digits(True), ["ByteLevel"])
    stages(BYTE_LEVEL, BYTE_LEVEL, ["pre_tokenizer 1, ByteLevel must be the last"])
    for kind in ("Punctuation", "Metaspace", "Whitespace", "BertPreTokenizer", "UnicodeScripts"):
        stages(digits(True), {"type": kind}, BYTE_LEVEL, ["pre_tokenizer 2", kind])
    for behavior in ("Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        stages(split("a") | {"behavior": behavior}, BYTE_LEVEL, [behavior, "only Isolated"])
    stages(split("a", "Glob"), BYTE_LEVEL, ["Glob"])
    stages(split("x" * 33, "String"), BYTE_LEVEL, ["xxx", "33 items", "32"])
    for regex, *words in (
            ("", "empty text"), ("a*", "empty text"), ("a|", "empty text"), ("$", "empty text"),
            ("(?!a)", "empty text"), ("a{0,3}", "empty text"), ("(?:a|b)?", "empty text"),
            (".", "."), ("^a", "^a"), ("a**", "*"), ("a+?", "+?"), ("a{,3}", "{,3}"), ("+", "+"),
            ("a{2}+", "{2}+"), ("a{3,2}", "{3,2}"), ("a{0}", "{0}"), ("(a)", "(a)"), ("a)", ")"),
            ("(?=a)", "(?=a)"), ("(?<!a)b", "(?<!a)b"), ("(?<a>b)", "(?<a>b)"), ("(?>a)", "(?>a)"),
            ("(?s)a", "(?s)a"), ("(?:a", "its end"), ("[a", "its end"), ("[]a]", "]a]"),
            ("[[a]b]", "[a]b]"), ("[a&&b]", "&&b]"), ("[[:alpha:]]", "[:alpha:"),
            ("[b-a]", "range"), (r"[a-\s]", "range"), (r"[\s-a]", "range"), (r"\w", r"\\w"),
            (r"\b", r"\\b"), (r"\1", r"\\1"), (r"\A", r"\\A"), (r"\p{Han}", r"\\p{Han}"),
            (r"\p{Cf}", r"\\p{Cf}"), (r"\pL", r"\\pL"), (r"\p{^L}", r"\\p{^L}"), ("a\\", "\\\\"),
            (r"\x{110000}", r"\\x{110000}"), ("(?!ab)c", "(?!)"), ("(?!a+)c", "(?!)"),
            ("(?:(?:a))", "(?:a"), ("(?:a|b)+", "its end"), ("(?i:ß)", "ASCII"),
            (r"(?i:\s)", "ASCII"), ("(?i:ss)", "folds"), ("(?i:a+)", "+"),
            (r"[^\s\S]", "no characters"), ("a++a", "possessive"), ("a?+(?!b)a", "possessive"),
            ("a*(?:ab|c)", "group"), ("a?b?(?:c|d)", "group"), ("a*(?:b|c?)d", "group"),
            ("[ab]*[bc]{1,2}(?:d|e)", "group"), ("'?a*(?:''|'c)", "group")):
        stages(split(regex), BYTE_LEVEL,
               ["pre_tokenizer 1, Split " + json.dumps(regex, ensure_ascii=False), *words])

    model({"vocab": vocab | {"xy": 300}}, '"xy" is 300', "0..299")
    model({"vocab": vocab | {"xy": -1}}, '"xy" is -1')
    model({"vocab": vocab | {"xy": "7"}}, '"xy" is "7"')
    model({"vocab": vocab | {"xy": True}}, '"xy" is true')
    model({"vocab": vocab | {"xy": 5}}, '"xy" is 5, as another')
    for byte in (0x00, 0x20, 0x80, 0xC2, 0xF4):
        model({"vocab": {k: v for k, v in vocab.items() if export.BYTE_LEVEL.get(k) != byte}},
              f"0x{byte:02X}", "no token")
    model({"merges": [*merges, ["a", "zz"]]}, '["a", "zz"]', 'token "zz"')
    model({"merges": ["a b", "b a"]}, '"b a"', 'token "ba"')
    model({"merges": ["a b c"]}, "is not a tokenizer.json")
    model({"merges": [3]}, "is not a tokenizer.json")
    token({"content": ""}, f"added token {end} is empty")
    token({"content": "<tool"}, '"<tool"', i=0)
    token({"content": END}, "is there twice", i=1)
    token({"id": end + 1}, END, f"is {end + 1}, must be {end}")
    token({"content": "a"}, '"a"', f"must be {vocab['a']}")
    case({"added_tokens": [added[0] | {"content": "é", "id": vocab["é"]}]}, '"é"', "as another")
    token({"single_word": True}, END, "single_word")
    token({"rstrip": True}, "starts with white space", "rstrip")
    case({"model": t["model"] | {"vocab": vocab | {"xy": end + 1}}}, END, f"must be {end + 1}")
    case({"model": t["model"] | {"vocab": vocab | {"Ġab": end}}}, END, f"is {end}, as another")
    many = [added[0] | {"id": end + i, "content": f"<{i}>"} for i in range(300 - end + 1)]
    case({"added_tokens": many}, "is 300, must be below vocab_size, 300")
    nfc = tokenizer_json("nfc", [])
    nfc["added_tokens"][0] |= {"content": "e\u0301", "normalized": True}
    write(path, nfc)
    bad(args, "tokenizer.json", "not in NFC")
    for text in ("{}", '{"model": 3}', '{"model": {"type": "BPE"}}', "[]", "nonsense",
                 json.dumps(t | {"pre_tokenizer": [3]}), json.dumps(t | {"normalizer": "NFC"}),
                 json.dumps(t | {"added_tokens": [{"content": "<x>"}]}),
                 json.dumps(t | {"added_tokens": 7}),
                 json.dumps(t | {"model": t["model"] | {"vocab": vocab | {"\ud800": 280}}}),
                 json.dumps(t | {"model": t["model"] | {"vocab": [["a", 0.5]]}})):
        write(path, text)
        bad(args, "tokenizer.json", "JSON" if text[0] in "[n" else "is not a tokenizer.json")


def test_merges(tmp, run):
    """Merges as "a b" and as ["a", "b"] are the same, and what is there twice is refused."""
    pairs = [["a", "b"], ["Ġ", "ab"], ["1", "2"]]
    sections, texts = [], ["ab ab12", " abc"]
    for form, merges in (("list", pairs), ("text", [" ".join(pair) for pair in pairs])):
        t = tokenizer_json("gpt-2", pairs)
        t["model"]["merges"] = merges
        folder, path = checkpoint(f"{tmp}/{form}", t), f"{tmp}/{form}.bin"
        good(folder, path)
        sections.append((tables(path)["section"], tokenize(run, path, texts)))
    vocab = t["model"]["vocab"]
    check(sections[0] == sections[1], "both forms of merges")
    check(sections[0][1][0] == [vocab[x] for x in ("ab", "Ġab", "12")], f"merged: {sections[0][1]}")
    text = json.dumps(t)
    for what, token in (("of the same id", f'"ab": {vocab["ab"]}'), ("of two ids", '"ab": 300')):
        write(f"{folder}/tokenizer.json", text.replace('"vocab": {', f'"vocab": {{{token}, ', 1))
        bad([folder, f"{tmp}/twice.bin"], "tokenizer.json", "twice")
    model = t["model"] | {"merges": [*merges, "ab 12"]}
    write(f"{folder}/tokenizer.json", t | {"model": model})
    bad([folder, f"{tmp}/unknown.bin"], "tokenizer.json", '"ab 12"', 'token "ab12"')


def test_settings(tmp, run):
    """The other files: who gets BOS, which chat it is, and that all of them travel."""
    t = tokenizer_json("llama-3", [("a", "b")])
    bos = t["added_tokens"][0]["id"]
    ids = {"bos_token_id": bos, "eos_token_id": bos + 1}
    post = {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": END, "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {END: {"id": END, "ids": [bos], "tokens": [END]}}}
    after = post | {"single": post["single"][::-1]}
    several = {"type": "Sequence", "processors": [BYTE_LEVEL, post]}
    folder, path = f"{tmp}/s", f"{tmp}/s.bin"

    def of_text(path):
        """What a model.bin says of text: (tokenizer, add_bos_token, chat_template)"""
        lines = tables(path)["lines"]
        return tuple(lines[key] for key in ("tokenizer", "add_bos_token", "chat_template"))

    def case(post_processor, settings, add_bos, chat, *words, config=ids, jinja=None):
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint(folder, t | {"post_processor": post_processor}, settings=settings, **config)
        if jinja is not None:
            write(f"{folder}/chat_template.jinja", jinja)
        notes = good(folder, path).splitlines()[:-1]           # the last one describes the model
        wanted = "bpe", ("false", "true")[add_bos], ("none", "deepseek_v2", "pieces")[chat]
        check(of_text(path) == wanted, f"{of_text(path)}, wanted {wanted}")
        check(bool(notes) == bool(words) and all(word in "".join(notes) for word in words),
              f"{notes}, wanted {words}")
    case(None, None, 0, 0)
    case(post, None, 1, 0)
    case(several, None, 1, 0)
    case(after, None, 0, 0, "warning: the tokenizer adds <|endoftext|> behind every text")
    case(post, {}, 1, 0)
    case(post, {"add_bos_token": False}, 1, 0, "add_bos_token false does not count", "gets BOS")
    case(BYTE_LEVEL, {"add_bos_token": True}, 0, 0, "true does not count", "gets no BOS")
    case(post, None, 0, 0, config=ids | {"bos_token_id": None})
    case(post, None, 0, 0, config=ids | {"bos_token_id": bos + 1})
    case(None, {"bos_token": END, "eos_token": {"content": "<tool>"}}, 0, 0)
    case(None, {"bos_token": "<tool>"}, 0, 0, "s/tokenizer_config.json: warning: bos_token",
         f'"<tool>" is {bos + 1}, bos_token_id of config.json {bos}')
    case(None, {"eos_token": "<none>"}, 0, 0, "adds, as transformers does", f"<none> ({bos + 8})",
         f'warning: eos_token "<none>" is {bos + 8}, eos_token_id of config.json {bos + 1}')
    case(None, {"bos_token": END}, 0, 0, "config.json null", config={})
    chat = ("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
            "{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user'"
            " %}{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == "
            "'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif "
            "message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
    other = chat.replace("'User: '", "'Human: '")
    tokens = {"bos_token": END, "eos_token": "<tool>"}         # what a template may ask for
    case(None, {"chat_template": chat} | tokens, 0, 1)
    case(None, {"chat_template": chat.replace("\n", "\\n").replace("{{ ", "{{-")} | tokens, 0, 1)
    named = [{"name": "tool", "template": other}, {"name": "default", "template": chat}]
    case(None, {"chat_template": named} | tokens, 0, 1)
    case(None, {"chat_template": named[:1]}, 0, 0)
    case(None, {"chat_template": other} | tokens, 0, 2)
    case(None, {"chat_template": chat.replace("{{ bos_token }}", "")} | tokens, 0, 2)
    case(None, {"chat_template": chat} | {"bos_token": END}, 0, 0,
         "s/tokenizer_config.json: the chat_template cannot be run (UndefinedError: 'eos_token' is")
    case(None, {"chat_template": other} | tokens, 0, 1, jinja=chat)
    case(None, {"chat_template": chat} | tokens, 0, 2, jinja=other)
    case(None, {"chat_template": chat}, 0, 0, "s/chat_template.jinja: the chat_template",
         jinja="{% for %}")
    write(f"{folder}/chat_template.jinja", b"\xff")
    bad([folder, f"{tmp}/no.bin"], "chat_template.jinja")
    os.remove(f"{folder}/chat_template.jinja")
    write(f"{folder}/tokenizer_config.json", {"chat_template": [3]})
    bad([folder, f"{tmp}/no.bin"], "tokenizer_config.json", "chat_template")

    case(post, {"chat_template": chat} | tokens, 1, 1)
    section = tables(path)["section"]
    good(path, f"{tmp}/half.bin", "--dtype", "bf16")
    check(tables(f"{tmp}/half.bin")["section"] == section
          and of_text(f"{tmp}/half.bin") == of_text(path), "to bf16")
    good(path, f"{tmp}/back", "--model_type", "deepseek_v2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        check(read(f"{tmp}/back/{name}") == read(f"{folder}/{name}"), f"{name} verbatim")
    good(f"{tmp}/back", f"{tmp}/again.bin")
    check(read(f"{tmp}/again.bin") == read(path), "there and back")
    data = read(path)
    old = test_export.version_1(data)
    write(f"{tmp}/old.bin", old)
    good(f"{tmp}/old.bin", f"{tmp}/again.bin")
    check(read(f"{tmp}/again.bin") == data, "version 1 becomes version 2")
    slots = [(old[:8 * slot] + struct.pack("<q", value) + old[8 * slot + 8:], name)
             for slot, value, name in ((6, 0, "tokenizer"), (6, 1, "tokenizer"),
                                       (3, 0, "tokenizer"), (65, 3, "chat_template"),
                                       (65, -1, "chat_template"))]
    lines = [(test_export.changed(data, **{name: value}), name)
             for name, value in (("tokenizer", "none"), ("tokenizer", "bytes"),
                                 ("chat_template", "x"), ("add_bos_token", "1"))]
    for new, name in slots + lines:
        write(f"{tmp}/bad.bin", new)
        bad([f"{tmp}/bad.bin", f"{tmp}/no.bin"], "bad.bin", f"{name} is ")

    # Ways to write the same: GPT-2's file has no type, merges as text and a line of version.
    same = json.loads(json.dumps(t))
    same["model"] |= {"merges": ["#version: 0.2", "a b"], "dropout": 0.0, "unk_token": "a",
                      "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    same["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [same["pre_tokenizer"]]}
    del same["model"]["type"], same["normalizer"], same["decoder"]
    good(checkpoint(f"{tmp}/same", same, settings=tokens), f"{tmp}/same.bin")
    check(tables(f"{tmp}/same.bin")["section"] == section, "other ways to write the same")
    # A merge of tokens that text cannot become is no merge, but it has a rank.
    more = json.loads(json.dumps(t))
    more["model"]["vocab"] |= {"▁": 3000, "▁a": 3001}
    more["model"]["merges"] = [["▁", "a"], ["a", "b"]]
    more["added_tokens"] = []
    good(checkpoint(f"{tmp}/more", more), f"{tmp}/more.bin")
    head, texts = tables(f"{tmp}/more.bin")["head"], tables(f"{tmp}/more.bin")["texts"]
    check(head[0] == 3002 and head[3] == 1 and texts[3001] == "▁a".encode() and not texts[2999],
          "a token of other characters, and holes")
    ids = tokenize(run, f"{tmp}/same.bin", ["▁aab"])[0]
    check(ids[-2:] == [t["model"]["vocab"][x] for x in ("a", "ab")], "it is not found")
    # Bytes that no UTF-8 has need no token. Where there is none, they are left out.
    few = json.loads(json.dumps(t))
    for char, byte in export.BYTE_LEVEL.items():
        if byte in (0xC0, 0xC1) or byte >= 0xF5:
            few["model"]["vocab"][f"other {byte}"] = few["model"]["vocab"].pop(char)
    good(checkpoint(f"{tmp}/few", few), f"{tmp}/few.bin")
    found = tokenize(run, f"{tmp}/few.bin", [b"x\xffy\xc0\xf5", b"\xfe", b"xy"])
    check(found[0] == found[2] == [few["model"]["vocab"][x] for x in "xy"] and found[1] == [],
          f"bytes without a token: {found}")


# ---- with the library ----------------------------------------------------------------------------

@functools.cache
def matched(regex):
    """The code points that a regular expression of the library matches."""
    from tokenizers import Regex, pre_tokenizers
    removed, left = pre_tokenizers.Split(Regex(regex), "removed"), set()
    for start in range(0, len(CHARS), 20000):
        for piece, _ in removed.pre_tokenize_str("".join(CHARS[start:start + 20000])):
            left.update(piece)
    return export.chars_of(ord(char) for char in CHARS if char not in left)


CHARS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def categories():
    """What export.categories() is to be."""
    kinds = np.zeros(export.END_OF_UNICODE, int)
    for name in sorted(export.CATEGORIES[1:], key=len):        # Nd after N, of which it is a part
        kinds[matched(rf"\p{{{name}}}")] = export.CATEGORIES.index(name)
    return kinds


def unicode_runs():
    """How many code points of which category follow each other: UNICODE, unpacked."""
    kinds = categories()
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    return "".join(chr(ord("`") + kinds[a]) + (str(b - a) if b - a > 1 else "")
                   for a, b in zip(starts, [*starts[1:], len(kinds)]))


def test_unicode(tmp, run):
    """Every code point, in every class."""
    for regex in (*(rf"\p{{{name}}}" for name in ("L", *export.CATEGORIES[1:])), r"\s", r"\d",
                  "(?i:s)", "(?i:k)", "(?i:')", "(?i:[a-z])", "(?i:[^a-k])"):
        (item,), = export.Regex(regex).alternatives
        found = item.chars.copy()
        found[0xD800:0xE000] = False                           # surrogates are in no text
        check((found == matched(regex)).all(), regex)
    from tokenizers import pre_tokenizers
    stage = pre_tokenizers.Digits(individual_digits=True)
    found = [piece for piece, _ in stage.pre_tokenize_str("a".join(CHARS)) if piece != "a"]
    found = export.chars_of(ord(piece) for piece in found if len(piece) == 1)
    check((found == export.digits()).all(), "Digits")
    check((export.categories() == categories()).all(), "--unicode gives the table again")


def test_nfc(tmp, run):
    """What is surely in NFC by the table of export.py stays as it is in the library."""
    from tokenizers import normalizers
    nfc, r, value = normalizers.NFC(), random.Random(6), {}
    for low, high, number in export.nfc_table():
        value |= {chr(code): number for code in range(low, high + 1)}
    whole = [char for char in CHARS if unicodedata.decomposition(char)]
    marks = [char for char in CHARS if unicodedata.combining(char)]
    hangul = [chr(code) for code in range(0x1100, 0x1200)] + ["가", "각"]
    sure = changed = 0
    for _ in range(50000):
        text = "".join(r.choice(r.choice((whole, marks, hangul, list("aeo x"))))
                       for _ in range(r.randint(1, 4)))
        values = [value.get(char, 0) for char in text]
        may_change = 255 in values or any(b and b < a for a, b in zip(values, values[1:]))
        changes = nfc.normalize_str(text) != text
        sure, changed = sure + (not may_change), changed + changes
        if changes and not may_change:
            check(False, f"{text!a} is not in NFC")
    check(sure > 5000 and changed > 5000, f"{sure} in NFC, {changed} changed")


def pieces(alternatives, text):
    """How a stage cuts a text, by the description of items in export.py [10]."""
    def end(items, at):
        if not items:
            return at
        kind, chars, least, most, _ = items[0]
        if kind != export.TAKE:
            fits = at == len(text) or (text[at] == "\n" if kind == export.LINE_END else
                                       not chars[ord(text[at])])
            return end(items[1:], at) if fits else None
        n = 0
        while n < most and at + n < len(text) and chars[ord(text[at + n])]:
            n += 1
        ends = (end(items[1:], at + k) for k in range(n, least - 1, -1))
        return next((e for e in ends if e is not None), None)
    at = start = 0
    while at < len(text):
        to = next((e for e in (end(items, at) for items in alternatives) if e is not None), None)
        if to is not None:
            yield from filter(None, (text[start:at], text[at:to]))
            start = at = to
        else:
            at += 1
    if start < at:
        yield text[start:]


def test_regexes(tmp, run):
    """Random ones mean what they mean to the library. Most of the random ones are refused."""
    from tokenizers import Regex, pre_tokenizers
    r = random.Random(4)

    classes = r"\s \S \p{L} \p{N} \p{M}".split()
    single = [*"aAb's1 ", *r"\p{Lu} \p{Ll} \P{L} \d \D \p{P} \n \.".split(), *classes]
    several = [*"abé'1^", "A-Z", "a-c", "!-/", r"\r\n", r"\-", r"\]", r"\p{P}\p{S}", *classes]
    quantifiers = ["", "", "", "", "?", "*", "+", "+", "{2}", "{1,3}", "{2,}", "?+", "*+", "++"]

    def some(n, choices):
        return r.choices(choices, k=r.randint(1, n))

    def characters():
        inner = some(3, several)
        return r.choice([r.choice(single), f"[x{''.join(inner)}]", f"[^{''.join(inner)}]"])

    def element(group):
        kind, end = r.random(), r.choice([")", ")?"])
        if kind < 0.1:
            return r.choice([f"(?!{characters()})", "$"])
        if group and kind < 0.2:
            names = ["'", "s", "t", "K", "l", "[sd]", "[^a]", "1"]
            return "(?i:" + "|".join("".join(some(2, names)) for _ in some(3, [1])) + end
        if group and kind < 0.3:
            return "(?:" + "|".join(element(False) + element(False) for _ in some(3, [1])) + end
        return characters() + r.choice(quantifiers)
    alphabet = list("aaabbsstAABKk\'\'\'11  \n\r.-]^&_é\u0301ǅʰ中ſ\u212a\u1e9eß٣²")
    taken, groups = 0, 0
    while taken < 600:
        regex = "|".join("".join(element(True) for _ in some(4, [1])) for _ in some(3, [1]))
        try:
            alternatives = export.Regex(regex).alternatives
            library = pre_tokenizers.Split(Regex(regex), "isolated")
        except Exception as e:                                 # the library refuses a little more
            check(type(e) is ValueError or "Oniguruma" in str(e), f"{regex!r}: {e!r}")
            continue
        taken += 1
        groups += "(?" in regex
        for _ in range(20):
            text = "".join(r.choices(alphabet, k=r.randint(1, 14)))
            wanted = [piece for piece, _ in library.pre_tokenize_str(text)]
            found = list(pieces(alternatives, text))
            if found != wanted:
                check(False, f"{regex!a} in {text!a}: {found!a}, wanted {wanted!a}")
                break
        else:
            check(True, regex)
    check(groups > 200, f"{groups} of {taken} have groups")


def corpus(train):
    """Documents: prose, programs, word problems, and what is hard on pre-tokenizers."""
    import pydoc_data.topics
    r = random.Random(5)
    texts = subprocess.run([train, "--show_data", "200"], capture_output=True, check=True
                           ).stdout.decode().split(END + "\n")
    texts += list(pydoc_data.topics.topics.values())
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py"))):
        texts.append(read(path).decode(errors="replace")[:3000])
    texts = [text.replace(END, "") for text in texts]

    kinds = [code for code in range(0, 0x110000) if export.categories()[code]]
    blocks = {}
    for code in kinds:
        blocks.setdefault(code >> 7, []).append(chr(code))
    for block in blocks.values():                              # every block of Unicode
        texts.append("".join(r.choices(block + list(" a1.\n'"), k=40)))
    space = list(export.WHITE_SPACE)
    for n in range(300):
        texts.append("".join(r.choices(space + ["x", "\n", " ", "  ", "\r\n", "9", "."], k=n % 40)))
        texts.append("".join(r.choices(CHARS, k=20)))
    hard = ["👩\u200d👧", "🏳️\u200d🌈", "1️⃣", "ที่นี่", "١٢٣", "۴۵", "１２３", "1234567", "3.14", "½²Ⅷ",
            "中文", "日本語テキスト", "한국어", "e\u0301", "é", "ǅ", "ʰ", "ß", "ﬁ", "ſ", "\u212a", "naïve",
            "Ω", "iPhone", "XMLHttp", "'s", "'S", "'ſ", "'ll", "'LL", "'rE", "’s", "don't", "can'T",
            "the", "a", "Z", "\xa0", "\u3000", "\u2028", "\x85", "\0", "\ufeff", "\ufffd", "\u200b",
            "\U0010ffff", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "!", "...", "//", "=>", "_",
            "$", "€", "<", ">", " =", "===", *ADDED, *SPACES, "<|left", "<|endof", "<both"]
    hard.remove(END)
    for n in range(1500):
        texts.append("".join(r.choices(hard, k=1 + n % 30)))
    for char in "a1 \n\t.é中\u3000\u0301\U0001f469":           # long runs, alone and before an "x"
        texts += [char * 1500, char * 999 + "x", "x" + char * 500 + "\n" + char * 500]
    return texts + ["", "\n", "a"]


def against_library(run, name, path, tokenizer, texts, end):
    from tokenizers import Tokenizer
    library = Tokenizer.from_str(tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer))
    expected = [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]
    print(f"{name}: {len(texts)} texts, {sum(map(len, expected))} tokens")
    compare(name, path, texts, tokenize(run, path, texts, end), expected)


def test_families(tmp, run):
    for name, (_, special) in FAMILIES.items():
        merges = trained(name, TEXTS[:400], 1500)
        tokenizer = tokenizer_json(name, merges + merges[100:110])         # some are there twice
        good(checkpoint(f"{tmp}/{name}", tokenizer), f"{tmp}/{name}.bin")
        texts = [t for t in TEXTS if "nfc" not in special or unicodedata.is_normalized("NFC", t)]
        against_library(run, name, f"{tmp}/{name}.bin", tokenizer, texts, END)


def test_files(tmp, run):
    """Tokenizers from elsewhere, each with the tokenizer_config.json beside it."""
    from tokenizers import Tokenizer
    for i, file in enumerate(FILES):
        text = read(file).decode()
        settings = json.loads(read(os.path.join(os.path.dirname(file), "tokenizer_config.json")))
        ids = json.loads(text)["model"]["vocab"]
        ids |= {t["content"]: t["id"] for t in json.loads(text)["added_tokens"]}
        bos, eos = (settings[name] if isinstance(settings[name], str) else settings[name]["content"]
                    for name in ("bos_token", "eos_token"))
        folder = checkpoint(f"{tmp}/{i}", text, max(ids.values()) + 100, settings,
                            bos_token_id=ids[bos], eos_token_id=ids[eos])
        good(folder, f"{tmp}/{i}.bin")
        lines = tables(f"{tmp}/{i}.bin")["lines"]
        with_bos = Tokenizer.from_file(file).encode("a").ids[0] == ids[bos]
        check((lines["add_bos_token"] == "true", lines["chat_template"] == "deepseek_v2") == (
            with_bos, "'User: '" in settings.get("chat_template", "")), f"{file}: {lines}")
        ends = [bos, "", "User: hi\n\nAssistant: ", "<｜User｜>"]
        texts = [text + ends[i % 4] for i, text in enumerate(TEXTS)]
        against_library(run, file, f"{tmp}/{i}.bin", text, texts, eos)


# ---- the end -------------------------------------------------------------------------------------

STORED_TEXTS = [
    "question: Mia has 3 bags of 8 pens and uses 5 pens. How many are left?\nanswer: 3 * 8 = 24\n"
    "24 - 5 = 19\n#### 19\n", "", " questions 中文 question pens 199", "x =  = y", "\n" * 20,
    "def f(x):\n\treturn x**2  # square\n\n\n    if x >= 10 and y != 'a':\r\n        pass\r\n",
    "foo_bar.baz(qux)[0]->{'k': \"v\"}; // ~!@#$%^&*/\n", "a\rb\r\nc\n d \n  e", "a" * 50, "=" * 33,
    "I'm sure they'LL say it's HE'S, we'Ve, 'ſx 'SX don’t I'Dn't", " " * 40 + "x",
    " \t\n \n\n   x  \u3000\xa0 y\u2003 z   ", "CamelCase XMLHttpRequest iPhone ABCdef's éÀÉ",
    "naïve Ωmega straße ﬁ ǅ ʰ 中文字符。日本語テキスト한국어", "١٢٣ １２３４ ²³½ 1234567 ৪৫ Ⅷ 3.14",
    "👩\u200d👧 🏳️\u200d🌈 1️⃣ ที่นี่ हिन्दी", "\0\x7f\x85\ufeff\ufffd\U0010ffff", "\u200b \u200bx",
    "a<tool>s <tool>  <toolx <|left|> b <|right|>  c <both> <|endof",
    "<｜x▁y｜> <｜x <|right|> <|left|> <|left"]


def write_stored():
    from tokenizers import Tokenizer
    stored = {"texts": STORED_TEXTS, "tokenizers": {}}
    for name in FAMILIES:
        merges = trained(name, STORED_TEXTS, 60)
        merges += merges[:3]                                   # of twins the last one counts
        library = Tokenizer.from_str(json.dumps(tokenizer_json(name, merges)))
        ids = [library.encode(text, add_special_tokens=False).ids for text in STORED_TEXTS]
        stored["tokenizers"][name] = {"merges": [" ".join(pair) for pair in merges],
                                      "ids": [" ".join(map(str, i)) for i in ids]}
    with open(STORED, "w") as f:
        json.dump(stored, f, indent=0)
        f.write("\n")


def main():
    global FILES, TEXTS
    args = sys.argv[1:]                                        # good() and bad() change them
    if args == ["--write"]:
        return write_stored()
    if args == ["--unicode"]:
        table = base64.b85encode(zlib.compress(unicode_runs().encode(), 9)).decode()
        return print("\n".join(textwrap.wrap(table, 100)))
    if len(args) != 1 and args[1:2] != ["--library"] or len(args) == 2:
        sys.exit(__doc__)
    tests = [test_stored, test_refusals, test_merges, test_bombs, test_settings]
    if len(args) > 2:
        FILES, TEXTS = args[3:], corpus(args[2])
        tests += [test_unicode, test_nfc, test_regexes, test_families, test_files]
    only = os.environ.get("ONLY", "").split()
    for test in [test for test in tests if not only or test.__name__ in only]:
        start = time.monotonic()
        tmp = tempfile.mkdtemp(prefix="test_tokenizer-")
        try:
            test(tmp, args[0])
        except Exception:                                      # go on with the next test
            traceback.print_exc()
            check(False, test.__name__)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        print(f"{test.__name__}: {time.monotonic() - start:.1f} s")
    print(f"{test_export.passed} passed, {test_export.failed} failed")
    return test_export.failed > 0


if __name__ == "__main__":
    sys.exit(main())
