#!/usr/bin/env python3
"""Checks the built-in training task from the outside, by the text it prints.

    python3 tests/test_task.py ./train         asks   ./train --level L -s SEED --show_data N
                                               and    ./train --level L -s SEED --show_val N
    python3 tests/test_task.py --plain PROG    asks   PROG L SEED N train|val

Every document printed has to be followed by a line <|endoftext|>.
"""
import re
import subprocess
import sys
from collections import Counter

# The words that fill the blanks. Without them a template could not be told from another; a word
# missing here shows as a flood of new templates, which is a failure below.
NAMES = """Ada Amy Ana Ben Bo Cleo Dan Eli Eva Finn Gus Hana Ian Ivy Jan Joe Kai Kim Lea Leo Max Mia
Nia Noah Omar Pia Ravi Rosa Sam Tara Tom Zoe""".split()
THINGS = """apple ball bead bell book bow bun cake cap card clip doll egg fig flag hat jar kite lid
lime map mug net nut pear pen pie pin plum ring tile toy""".split()

TRAIN, VAL, SHARES = 20000, 1000, 5000  # documents: of each seed, held out, to count shares on
END = "<|endoftext|>\n"
NUMBER = r"[1-9][0-9]*"
EQUATION = rf"{NUMBER} [-+*/] {NUMBER} = {NUMBER}\n"
SENTENCE = r"[A-Z][A-Za-z]*(?:,? (?:[A-Za-z]+|[1-9][0-9]*))+"
DOCUMENT = re.compile(rf"question: ((?:{SENTENCE}\. )+{SENTENCE}\?)\n"
                      rf"answer: ((?:{EQUATION})+)#### ({NUMBER})\n")
NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
THING = re.compile(rf"\b({'|'.join(THINGS)})s?\b")

passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}{': ' if detail != '' else ''}{str(detail)[:400]}")


class Problem:
    """A document taken apart; wrong ones raise ValueError."""

    def __init__(self, text):
        match = DOCUMENT.fullmatch(text)
        if not match:
            raise ValueError("not in the format")
        self.text, self.question = text, match[1]
        self.given = [int(x) for x in re.findall(r"\d+", self.question)]
        self.steps = [(int(x), op, int(y), int(z)) for x, op, y, z in
                      re.findall(r"(\d+) (.) (\d+) = (\d+)", match[2])]
        self.result = int(match[3])
        # "N1" and "N2" for the names in order of appearance, so that a name used for two shows.
        order = list(dict.fromkeys(NAME.findall(self.question)))
        self.names, self.things = order, set(THING.findall(self.question))
        masked = NAME.sub(lambda m: f"N{order.index(m[0]) + 1}", self.question)
        masked = re.sub(r"(?<![N\d])\d+", "#", masked)
        self.template = THING.sub(lambda m: "thing" + "s" * (m[0] != m[1]), masked)
        self.key = self.template, tuple(self.given)


def untrue(p):
    """The first equation that is false, or None."""
    for x, op, y, z in p.steps:
        if not {"+": x + y == z, "-": x - y == z, "*": x * y == z, "/": x == y * z}[op]:
            return x, op, y, z
    return None


def unchained(p):
    """What is wrong with the way from the numbers of the question to the result, or None."""
    known, used = set(p.given), []
    for x, _, y, z in p.steps:
        for operand in (x, y):
            if operand not in known:
                return f"{operand} comes from nowhere"
        used += [x, y]
        known.add(z)
    for z in [z for *_, z in p.steps[:-1]] + p.given:
        if z not in used:
            return f"{z} is not used"
    return None if p.steps[-1][3] == p.result else "the last result is not the answer"


def within(level, p):
    """What goes beyond the level, or None."""
    most_steps, most_given, most_sum, most_divisor = [(3, 20, 60, 10), (4, 200, 400, 12)][level - 1]
    if len(p.steps) > most_steps:
        return "too many steps"
    if min(p.given) < 2 or max(p.given) > most_given:
        return "a given number"
    for x, op, y, z in p.steps:
        hi, lo = max(x, y), min(x, y)
        product = hi <= 10 and lo <= 5 if level == 1 else hi <= 12 or hi <= 99 and lo <= 9
        if op == "*" and not product or op == "/" and not 2 <= y <= most_divisor:
            return f"{x} {op} {y}"
        if z < 1 or op == "+" and z > most_sum or level == 1 and max(x, y, z) > 60:
            return f"{x} {op} {y} = {z}"
    return None


def shares(level, problems):
    """How much of what there is at least, as fractions of the problems: (what, share, least)."""
    def of(test):
        return sum(1 for p in problems if test(p)) / len(problems)

    def step(test):
        return of(lambda p: any(test(*s) for s in p.steps))

    top = {1: (10, 30, 30), 2: (100, 200, 200)}[level]
    out = [("two steps or more", of(lambda p: len(p.steps) >= 2), .6),
           ("one step", of(lambda p: len(p.steps) == 1), .1),
           ("most steps", of(lambda p: len(p.steps) == level + 2), .1),
           ("large given numbers", of(lambda p: max(p.given) > top[0]), .1),
           ("large results", step(lambda x, op, y, z: z > top[1]), .1),
           ("large answers", of(lambda p: p.result > top[1]), .1),
           ("large sums", step(lambda x, op, y, z: op == "+" and z > top[1]), .1),
           ("large dividends", step(lambda x, op, y, z: op == "/" and x > top[2]), .05)]
    out += [(f"steps with {o}", step(lambda x, op, y, z, o=o: op == o), .2) for o in "+-*/"]
    factors = [(6, 10, 3)] if level == 1 else [(7, 12, 7), (50, 99, 5)]
    out += [(f"factors from {a} to {b} with {c} or more",
             step(lambda x, op, y, z: op == "*" and a <= max(x, y) <= b and min(x, y) >= c), .05)
            for a, b, c in factors]
    return out


def documents(command, plain, level, seed, n, held_out):
    if plain:
        args = [str(level), str(seed), str(n), "val" if held_out else "train"]
    else:
        args = ["--level", str(level), "-s", str(seed),
                "--show_val" if held_out else "--show_data", str(n)]
    run = subprocess.run(command + args, stdout=subprocess.PIPE, check=True)
    return run.stdout.decode("ascii")


def split(text):
    return text.split(END)[:-1]


def first(problems, fault):
    """The first fault and its text, for the message; empty if there is none."""
    return next((f"{found} in {p.text!r}" for p in problems if (found := fault(p))), "")


def test_level(command, plain, level):
    def ask(seed, n, held_out=False):
        return documents(command, plain, level, seed, n, held_out)

    def report(what, ok, detail=""):
        check(f"level {level}: {what}", ok, detail)

    raw = {seed: ask(seed, TRAIN) for seed in (1, 2)}
    raw_val = ask(1, VAL, True)
    parsed, bad = {}, []
    for kind, text, n in ((1, raw[1], TRAIN), (2, raw[2], TRAIN), ("val", raw_val, VAL)):
        docs = split(text)
        report(f"number of documents ({kind})", len(docs) == n and text.endswith(END), len(docs))
        parsed[kind] = []
        for doc in docs:
            try:
                parsed[kind].append(Problem(doc))
            except ValueError:
                bad.append(doc)
    report("format", not bad, bad[:1])
    train, val = parsed[1] + parsed[2], parsed["val"]
    everything = train + val
    if not parsed[1] or not val:
        return everything, val

    for what, fault in (("equations are true", untrue), ("steps lead to the answer", unchained),
                        ("numbers are in range", lambda p: within(level, p))):
        found = first(everything, fault)
        report(what, not found, found)
    for what, share, least in shares(level, parsed[1][:SHARES]):
        report(f"share of {what}", share >= least, f"{share:.3f} < {least}")

    templates = Counter(p.template for p in train)
    report("two dozen templates", 24 <= len(templates) <= 99, len(templates))
    # A problem about two people of the same name would look like a template of its own, too.
    rare = [t for t, n in templates.items() if n * len(templates) < len(train) / 2]
    report("no template is rare", not rare, rare[:1])
    odd = set(templates) ^ {p.template for p in val}
    report("training and held-out problems have the same templates", not odd, list(odd)[:1])
    names = Counter(name for p in train for name in p.names)
    things = Counter(thing for p in train for thing in p.things)
    for what, words, expected in (("names", names, NAMES), ("things", things, THINGS)):
        even = len(words) == len(expected) and max(words.values()) < 2 * min(words.values())
        report(f"{what} are all used, about as often", even, words)
    found = first(everything, lambda p: not p.names or len(p.things) != 1)
    report("a name and one thing in each", not found, found)

    mean = sum(len(p.text) for p in train) / len(train)
    report("documents are short", mean <= (110, 140)[level - 1], f"{mean:.1f} bytes")

    texts, keys = {p.text for p in train}, {p.key for p in train}
    both = [p.text for p in val if p.text in texts]
    report("no held-out text in training", not both, both[:1])
    both = [p.text for p in val if p.key in keys]
    report("no held-out numbers in training", not both, f"{len(both)}, {both[:1]}")
    report("held-out problems differ", len({p.text for p in val}) == VAL)
    report("held-out numbers vary", len({p.key for p in val}) >= VAL / 2)
    report("held-out problems do not depend on the seed", ask(2, VAL, True) == raw_val)
    report("a longer list starts like a shorter one", raw_val.startswith(ask(1, 10, True)) and
           raw[1].startswith(ask(1, 10)))
    report("same seed, same bytes", ask(1, TRAIN) == raw[1])
    same = sum(a == b for a, b in zip(split(raw[1]), split(raw[2])))
    report("other seed, other problems", same < TRAIN / 100, f"{same} equal")
    return train, val


def main():
    args = sys.argv[1:]
    plain = args[:1] == ["--plain"]
    command = args[plain:]
    if not command:
        sys.exit(__doc__)
    sets = [test_level(command, plain, level) for level in (1, 2)]
    for a, b in ((0, 1), (1, 0)):
        keys = {p.key for p in sets[a][0]}
        both = [p.text for p in sets[b][1] if p.key in keys]
        check(f"nothing held out at level {b + 1} is in the training of level {a + 1}", not both,
              both[:1])
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
