"""What the scripts of this folder share: errors, tables in files, and how a figure looks."""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "experiments", "results")


class Failure(Exception):
    """An error for the user, one line: file or option, what was found, what was expected."""


def command_line(main):
    """Runs main(); what goes wrong becomes one line on stderr and an exit code."""
    name = os.path.basename(sys.argv[0]).removesuffix(".py")
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(f"{name}: {e}")
    except OSError as e:
        sys.exit(f"{name}: {e.filename or 'stdout'}: {e.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---- tables --------------------------------------------------------------------------------------

def write_file(path, content):
    """Writes text or bytes so that the file is there complete or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    new = f"{path}.tmp-{os.getpid()}"       # a name of its own: two may write this file
    try:
        with open(new, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
        os.replace(new, path)
    finally:
        if os.path.exists(new):
            os.remove(new)


def tsv(rows):
    """Lines of cells with tabs in between; None is an empty cell."""
    return "".join("\t".join("" if x is None else str(x) for x in row) + "\n" for row in rows)


def markdown(rows, left=1):
    """A table; the first `left` columns hold words, the others numbers."""
    head, *rows = [["" if x is None else str(x) for x in row] for row in rows]
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows))


def read_tsv(path):
    """The lines of a TSV file with a header, as dicts of strings."""
    with open(path, encoding="utf-8") as f:
        head, *rows = [line.rstrip("\n").split("\t") for line in f]
    for i, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise Failure(f"{path}: line {i} has {len(row)} columns, the first line {len(head)}")
    return [dict(zip(head, row)) for row in rows]


# ---- figures -------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart too.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = [BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#E69F00", "#000000"]


def pyplot():
    """matplotlib.pyplot, set up for all our figures. Imported as late as here, because what does
    not draw needs nothing but Python."""
    try:
        import matplotlib
    except ImportError:
        raise Failure("figures need matplotlib: pip install -r tests/requirements-figures.txt, "
                      "or make figures")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "figure.constrained_layout.use": True, "figure.dpi": 100, "savefig.dpi": 160,
        "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
        "axes.grid": True, "grid.color": "#e8e8e8", "grid.linewidth": 0.6, "axes.axisbelow": True,
        "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6,
    })
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(figure, path):
    """Writes path.png, on white, which is readable on a dark page too."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path + ".png", metadata={"Software": None})
    pyplot().close(figure)
    print(f"{os.path.relpath(path)}.png", file=sys.stderr)
