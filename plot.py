"""Draw how a run went, or what a reward model says about clips: one picture each. Needs matplotlib.

    python plot.py outputs/prfl outputs/pavrm      # RUN/dashboard.png, from RUN/log.jsonl
    python plot.py outputs/scores/scores.json      # scores.png beside it, from what score.py wrote

Measures of every step are drawn faint, with their running mean on top. Panels without data are left out.
"""
import math
import sys
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import cli

import numpy as np

from files import InputError, atomic_write, parse_json, read_json
from forms import LOG, SCORES

COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, GREY = (
    "#2f6db5", "#e0802b", "#3a9a5b", "#c8413b", "#7a5cae", "#2b9eb3", "#d277a8", "#7f7f7f")
STYLE = {
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": "#999999", "axes.labelcolor": "#555555",
    "xtick.color": "#555555", "ytick.color": "#555555",
    "axes.grid": True, "grid.color": "#e8e8e8", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0.02,
    "lines.linewidth": 1.8, "lines.markersize": 4, "legend.fontsize": 9, "legend.edgecolor": "none",
    "text.parse_math": False,  # names may contain a $
}
TIMESTEP = "timestep (0 clean, 1000 noise)"
NAMED_CLIPS = 12  # the names of more clips would fill the picture


# ------------------------------------------------------------------------------ drawing

@contextmanager
def picture(path, width, height):
    """`with picture(path, 8, 5) as figure:` draw on the figure, its size in inches; it is then written."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib; install it with: pip install matplotlib") from None
    with matplotlib.rc_context(STYLE), atomic_write(path) as beside:
        figure = Figure((width, height), dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        yield figure
        figure.savefig(beside, format="png")


def panel(title, lines, xlabel="step", reference=None, outside=False, **options):
    """What `grid` draws.

    lines: (x, y, options of `Axes.plot`) each. reference: height of a thin horizontal line. outside: the
    legend is beside the panel, not in it. options: of `Axes.set`.
    """
    lines = [line for line in lines if len(line[0])]
    return lines, reference, outside, {"title": title, "xlabel": xlabel, **options}


def grid(path, title, panels, size=(4.8, 3.1)):
    """Write a picture of the panels that have data. All x axes of the same quantity have the same range."""
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        raise InputError(f"there is nothing to draw for {path}: the measure is missing or never finite")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with picture(path, size[0] * columns, size[1] * rows + 0.4) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color="#444444")
        first = {}  # the first axis of each quantity
        for place, (lines, reference, outside, options) in enumerate(panels):
            quantity = options["xlabel"]
            axis = figure.add_subplot(rows, columns, place + 1, sharex=first.get(quantity))
            first.setdefault(quantity, axis)
            draw_panel(axis, lines, reference, outside, options)


def draw_panel(axis, lines, reference, outside, options):
    """Draw one panel, as `panel` describes it."""
    from matplotlib.ticker import LogLocator

    for x, y, style in lines:
        axis.plot(x, y, **style)
    if reference is not None:
        axis.axhline(reference, color="#444444", linewidth=0.9, zorder=1)
    labelled = [style for _, _, style in lines if style.get("label")]
    if outside:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    elif len(labelled) > 1:
        axis.legend()
    if options["xlabel"] == TIMESTEP:
        axis.set_xlim(0, 1000)
    axis.set(**options)
    if options.get("yscale") == "log":  # plain numbers instead of powers of ten
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()


# ------------------------------------------------------------------------------ lines

def series(rows, name):
    """(steps, values) of the rows in which `name` is a finite number."""
    found = []
    for row in rows:
        value = row.get(name)
        if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:  # nan is not
            found.append((row["step"], value))
    return np.array(found, dtype=float).reshape(-1, 2).T


def noisy(rows, *names):
    """Lines of measures that jump from step to step, for each (name, label, colour).

    The values are faint. On top is their mean over a fifteenth of the run, or over fewer steps at its ends.
    """
    raw, smooth = [], []
    for name, label, colour in names:
        x, y = series(rows, name)
        raw.append((x, y, {"color": colour, "alpha": 0.25, "linewidth": 0.8}))
        running = y
        if len(y):
            window = np.ones(min(len(y), max(9, len(y) // 15)))
            running = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
        smooth.append((x, running, {"color": colour, "label": label}))
    return raw + smooth


def dotted(rows, *names, **style):
    """A line with a dot at every value, for each (name, label, colour)."""
    lines = []
    for name, label, colour in names:
        x, y = series(rows, name)
        lines.append((x, y, {"color": colour, "label": label, "marker": "o", **style}))
    return lines


def curve(measures, name, label, colour, **style):
    """One measure against the timestep, from {timestep: measures}."""
    by_timestep = sorted((float(t), row) for t, row in measures.items())
    rows = [{"step": t, **row} for t, row in by_timestep]
    return dotted(rows, (name, label, colour), clip_on=False, **style)


def mean(measures, name):
    """The mean of one measure over the timesteps, None if no timestep has it."""
    values = [row[name] for row in measures.values() if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def shades(count):
    """Colours from light to dark."""
    stops = ((0.96, 0.16, 0.25), (0.70, 0.58, 0.05), (0.20, 0.55, 0.36))  # red, green, blue at 0, 0.5, 1
    colours = []
    for place in np.linspace(0, 1, count):
        colours.append(tuple(np.interp(place, (0, 0.5, 1), stop) for stop in stops))
    return colours


# ------------------------------------------------------------------------------ what is drawn

def prfl(steps, evaluations, held_out=False):
    """train_prfl.py: is the reward earned, or do motion and colours pay for it?

    held_out: the prompts of the samples are held out (--val), not from the training data.
    """
    samples = [{"step": row["step"], **row["evaluation"]} for row in evaluations]
    looks = dotted(samples, ("motion_energy", "motion energy", GREEN), ("contrast", "contrast", PURPLE),
                   ("saturation", "colour saturation", ORANGE))
    relative = [(x, y / y[0], style) for x, y, style in looks if len(y) and y[0]]

    # The reward by rollout step, in the first and the second half of the run.
    rewarded = [row for row in steps if row.get("k")]
    middle = len(rewarded) // 2
    by_k = []
    halves = [("first half", GREY, rewarded[:middle]), ("second half", BLUE, rewarded[middle:])]
    for label, colour, half in halves:
        rows = [{"step": k, "reward": row.get("reward")} for row in half for k in row["k"]]
        k, reward = series(rows, "reward")
        dots = {"color": colour, "marker": ".", "linestyle": "", "alpha": 0.4, "markeredgewidth": 0}
        by_k.append((k, reward, dots))
        means = [reward[k == each].mean() for each in np.unique(k)]
        by_k.append((np.unique(k), means, {"color": colour, "label": label}))

    memory = max(series(steps, "gigabytes")[1], default=0)
    norms = noisy(steps, ("sft_norm", "SFT", ORANGE), ("rwr_norm", "RWR", PINK),
                  ("reward_norm", "reward", BLUE))
    return [
        panel("reward in training", noisy(steps, ("reward", "reward", BLUE))),
        panel("held-out reward" if held_out else "reward of samples",
              dotted(samples, ("reward", "reward", BLUE), ("saturated", "share of saturated rewards", RED)),
              ylim=(-0.02, None)),
        panel("frames, relative to the start", relative, reference=1),
        panel("reward by rollout step", by_k, "k"),
        panel("distance of the velocity from the start",
              dotted(samples, ("velocity_distance", "distance", TEAL))),
        panel("KL to the start", noisy(steps, ("kl", "KL", TEAL))),
        panel("loss on real clips", noisy(steps, ("sft_loss", "SFT", ORANGE), ("rwr_loss", "RWR", PINK))),
        panel("reward loss", noisy(steps, ("reward_loss", "reward", BLUE))),
        panel("gradient norm", norms, yscale="log"),
        panel(f"seconds per step (at most {memory:.1f} GB)", noisy(steps, ("seconds", "seconds", GREY)),
              ylim=(0, None)),
    ]


def pavrm(steps, evaluations):
    """train_pavrm.py: does it learn, and at which timesteps?"""
    labels = dict.fromkeys(label for row in evaluations for label in row["evaluation"])
    colours = dict(zip(labels, cycle(COLOURS), strict=False))

    def against_timestep(name):
        """One line per label for the last evaluation, faint ones for those before."""
        lines = []
        for row in evaluations:
            last = row is evaluations[-1]
            style = {} if last else {"alpha": 0.25, "linewidth": 0.8, "marker": ""}
            for label, measures in row["evaluation"].items():
                lines += curve(measures, name, label if last else None, colours[label], **style)
        return lines

    def over_steps(name, **style):
        """One line per label: the mean over the timesteps."""
        lines = []
        for label, colour in colours.items():
            means = []
            for row in evaluations:
                means.append({"step": row["step"], "mean": mean(row["evaluation"].get(label, {}), name)})
            lines += dotted(means, ("mean", f"{label}: {name}", colour), **style)
        return lines

    losses = [{"step": row["step"], **row["loss_by_timestep"]} for row in steps if "loss_by_timestep" in row]
    bins = {name for row in losses for name in row} - {"step"}
    bins = sorted(bins, key=lambda name: float(name.split("-")[0]))
    by_bin = noisy(losses, *zip(bins, bins, shades(len(bins)), strict=True))
    training = noisy(steps, ("loss", "loss", RED))
    training += noisy(steps, ("accuracy", "accuracy", GREY))[1:]  # only the running mean
    return [
        panel("training", training),
        panel("training loss by timestep", by_bin[len(bins):]),  # only the running means
        panel("held out, mean over timesteps",
              over_steps("accuracy") + over_steps("pair_accuracy") + over_steps("loss", linestyle=":")),
        panel("held-out accuracy", against_timestep("accuracy"), TIMESTEP, reference=0.5),
        panel("held-out accuracy on pairs", against_timestep("pair_accuracy"), TIMESTEP, reference=0.5),
        panel("held-out AUC", against_timestep("auc"), TIMESTEP, reference=0.5),
        panel("held-out calibration error (ECE)", against_timestep("ece"), TIMESTEP),
    ]


def scores(content):
    """score.py: the process reward, from noise (right) to the clip, and how well it tells good from poor."""
    clips = sorted(content["scores"], key=lambda clip: -clip["reward"])
    few = len(clips) <= NAMED_CLIPS
    style = {"marker": ""} if few else {"marker": "", "alpha": 0.4, "linewidth": 0.7}
    panels = []
    for label in clips[0]["rewards"]:
        lines = []
        by_timestep = {t: [] for t in content["timesteps"]}
        for clip, shade in zip(clips, shades(len(clips)), strict=True):
            rewards = dict(zip(content["timesteps"], clip["rewards"][label], strict=True))
            for t, reward in rewards.items():
                by_timestep[t].append(reward)
            name = f"{clip['reward']:.2f}  {clip['name'][-30:]}" if few else None
            rewards = {t: {"reward": reward} for t, reward in rewards.items()}
            lines += curve(rewards, "reward", name, shade, **style)
        title = f"{label}: reward"
        if not few:
            title += " (black: mean)"
            means = {t: {"reward": np.mean(rewards)} for t, rewards in by_timestep.items()}
            lines += curve(means, "reward", None, "black", linewidth=2.5)
        panels.append(panel(title, lines, TIMESTEP, outside=few, ylim=(-0.02, 1.02)))

    lines = []
    measured = content.get("measures") or {}
    for (label, measures), colour in zip(measured.items(), cycle(COLOURS), strict=False):
        lines += curve(measures, "auc", f"{label}: auc", colour, linestyle="-")
        lines += curve(measures, "accuracy", f"{label}: accuracy", colour, linestyle=":")
    return [*panels, panel("AUC and accuracy", lines, TIMESTEP, reference=0.5)]


def by_timestep(runs, output, measure="auc", title=None):
    """Compare reward models, one line per run. runs: {run: {timestep: measures}}."""
    lines = []
    for (run, measures), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        lines += curve(measures, measure, run, colour)
    title = title or f"held-out {measure}".replace("auc", "AUC")
    chance = 0.5 if measure in ("auc", "accuracy", "pair_accuracy") else None
    grid(output, None, [panel(title, lines, TIMESTEP, reference=chance)], size=(6.8, 4))


def bars(rows, output, title):
    """Compare methods by bars with error bars. rows: {method: {quantity: (mean, deviation or None)}}."""
    quantities = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = 0.8 / len(rows)
    with picture(output, max(5.5, 1.5 + 0.75 * len(rows) * len(quantities)), 4.2) as figure:
        axis = figure.add_subplot()
        for n, (method, row) in enumerate(rows.items()):
            offset = (n - (len(rows) - 1) / 2) * width
            places = [quantities.index(name) + offset for name in row]
            means, deviation = np.array(list(row.values()), dtype=float).T  # None becomes nan: no error bar
            drawn = axis.bar(places, means, 0.9 * width, color=COLOURS[n % len(COLOURS)], label=method,
                             yerr=deviation, error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "#444444"})
            axis.bar_label(drawn, fmt="{:.2f}", padding=3, fontsize=9, color="#444444")
        axis.set_xticks(range(len(quantities)), quantities)
        axis.tick_params(axis="x", length=0, labelsize=11)
        axis.grid(False, axis="x")
        axis.margins(y=0.12)
        axis.set_title(title)
        figure.legend(loc="outside lower center", ncols=min(len(rows), 4))


# ------------------------------------------------------------------------------ reading

def draw(source):
    """Draw the picture of a run's directory, a log.jsonl or a scores.json; returns the picture's path."""
    path = Path(source, "log.jsonl") if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise InputError(f"{path} does not exist; "
                         f"give a run's directory, its log.jsonl or a scores.json of score.py")
    is_scores = path.suffix == ".json"
    content = read_json(path, SCORES) if is_scores else read_log(path)
    try:
        if is_scores:
            panels = scores(content)
            title = f"rewards by {content['reward_model']}"
        else:
            panels = panels_of_run(content, has_val(path.with_name("run.json")))
            title = f"{path.parent}, step {content[-1]['step']}"
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} does not have the form that train_prfl.py, train_pavrm.py and score.py "
                         f"write ({error!r})") from error
    output = path.with_suffix(".png") if is_scores else path.with_name("dashboard.png")
    grid(output, title, panels, size=(6.2, 4) if is_scores else (4.8, 3.1))
    return output


def panels_of_run(rows, held_out):
    """The panels of a log of train_pavrm.py (its evaluations are by label and timestep) or train_prfl.py."""
    steps = [row for row in rows if "evaluation" not in row]
    evaluations = [row for row in rows if "evaluation" in row]
    by_label = any(isinstance(value, dict) for row in evaluations for value in row["evaluation"].values())
    if by_label or any("loss" in row for row in steps):
        return pavrm(steps, evaluations)
    return prfl(steps, evaluations, held_out)


def has_val(path):
    """Whether the run of a run.json had held-out clips (--val)."""
    return path.is_file() and bool(read_json(path, {"arguments": dict})["arguments"].get("val"))


def read_log(path):
    """The lines of a log.jsonl. The last one may be torn, if the run was cut off or goes on."""
    lines = path.read_bytes().splitlines()
    rows = []
    for n, line in enumerate(lines):
        try:
            rows.append(parse_json(line, f"{path}, line {n + 1}", LOG))
        except InputError as error:
            if 0 < n == len(lines) - 1:
                return rows
            raise InputError(f"{error}; is it the log of a training run?") from None
    if not rows:
        raise InputError(f"{path} is empty; wait for the first step")
    return rows


def main(argv=None):
    parser = cli.Parser("Draw training runs and scores.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="a run's directory, its log.jsonl or a scores.json")
    for source in parser.parse_args(argv).sources:
        print(draw(source))


if __name__ == "__main__":
    cli.run(main)
