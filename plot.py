"""Draw how a run went, or what a reward model says of clips: one picture each. Needs matplotlib.

    python plot.py outputs/prfl outputs/pavrm      # RUN/dashboard.png, from RUN/log.jsonl
    python plot.py outputs/scores.json             # outputs/scores.png, from what reward.py wrote

What is measured at every step is drawn faint, its running mean over it. Panels without data are left out.
"""
import argparse
import json
import math
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np

import parallel
from files import InputError, read_json, written_whole

BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, GREY = COLOURS = (
    "#2f6db5", "#e0802b", "#3a9a5b", "#c8413b", "#7a5cae", "#2b9eb3", "#d277a8", "#7f7f7f")
STYLE = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": "#999999",
         "axes.labelcolor": "#555555", "xtick.color": "#555555", "ytick.color": "#555555", "axes.grid": True,
         "grid.color": "#e8e8e8", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
         "axes.xmargin": 0.02, "lines.linewidth": 1.8, "lines.markersize": 4, "legend.fontsize": 9, "legend.edgecolor": "none",
         "text.parse_math": False}  # names may hold a $
TIMESTEP = "timestep (0 clean, 1000 noise)"
NAMED_CLIPS = 12  # the names of more would fill the picture


# ---------------------------------------------------------------------------------------------- drawing

@contextmanager
def picture(path, width, height):
    """`with picture(path, 8, 5) as figure:` draw on the figure, of so many inches; it is written to `path` if all went well."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib; install it with: pip install matplotlib") from None
    with matplotlib.rc_context(STYLE), written_whole(path) as beside:
        figure = Figure((width, height), dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        yield figure
        figure.savefig(beside, format="png")


def panel(title, lines, xlabel="step", reference=None, outside=False, **options):
    """What `grid` draws: lines (x, y, options of `Axes.plot`), a thin line at the height `reference`, the legend (`outside`
    or within), and options of `Axes.set`."""
    return [line for line in lines if len(line[0])], reference, outside, {"title": title, "xlabel": xlabel, **options}


def grid(path, title, panels, size=(4.8, 3.1)):
    """A picture of those panels that have data. The same quantity has the same range on all x axes."""
    panels, axes = [panel for panel in panels if panel[0]], {}
    if not panels:
        raise InputError(f"there is nothing to draw for {path}: no such measure, or none that is a finite number")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with picture(path, size[0] * columns, size[1] * rows + 0.4) as figure:
        from matplotlib.ticker import LogLocator
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, color="#444444")
        for place, (lines, reference, outside, options) in enumerate(panels):
            axis = figure.add_subplot(rows, columns, place + 1, sharex=axes.get(options["xlabel"]))
            axes.setdefault(options["xlabel"], axis)
            for x, y, style in lines:
                axis.plot(x, y, **style)
            if reference is not None:
                axis.axhline(reference, color="#444444", linewidth=0.9, zorder=1)
            if outside or sum(bool(style.get("label")) for _, _, style in lines) > 1:
                axis.legend(**{"loc": "center left", "bbox_to_anchor": (1, 0.5)} if outside else {})
            if options["xlabel"] == TIMESTEP:
                axis.set_xlim(0, 1000)
            axis.set(**options)
            if options.get("yscale") == "log":  # plain numbers instead of powers of ten
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.minorticks_off()


def series(rows, name):
    """(steps, values) of the rows in which `name` is a finite number."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
    return np.array(found, dtype=float).reshape(-1, 2).T


def noisy(rows, *names):
    """Faint values, and over them their mean over a fifteenth of the run (fewer at its ends), for each (name, label, colour)."""
    raw, smooth = [], []
    for name, label, colour in names:
        x, y = series(rows, name)
        window = np.ones(max(1, min(len(y), max(9, len(y) // 15))))
        running = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same") if len(y) else y
        raw.append((x, y, {"color": colour, "alpha": 0.25, "linewidth": 0.8}))
        smooth.append((x, running, {"color": colour, "label": label}))
    return raw + smooth


def dotted(rows, *names, **style):
    """A line with a dot at every value, for each (name, label, colour)."""
    return [(*series(rows, name), {"color": colour, "label": label, "marker": "o", **style}) for name, label, colour in names]


def curve(measures, name, label, colour, **style):
    """One measure against the timestep, of {timestep: measures}."""
    rows = [{"step": t, **row} for t, row in sorted((float(t), row) for t, row in measures.items())]
    return dotted(rows, (name, label, colour), clip_on=False, **style)


def mean(measures, name):
    """The mean of one measure over the timesteps, None where it is at none."""
    values = [row[name] for row in measures.values() if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def shades(count):
    """Colours from light to dark."""
    stops = ((0.96, 0.16, 0.25), (0.70, 0.58, 0.05), (0.20, 0.55, 0.36))
    return [tuple(np.interp(place, (0, 0.5, 1), stop) for stop in stops) for place in np.linspace(0, 1, count)]


# ---------------------------------------------------------------------------------------------- what is drawn

def prfl(steps, evaluations):
    """train_prfl.py: is the reward earned, or do motion and colours pay for it?"""
    held_out = [{"step": row["step"], **row["evaluation"]} for row in evaluations]
    looks = dotted(held_out, ("motion_energy", "motion energy", GREEN), ("contrast", "contrast", PURPLE),
                   ("saturation", "colour saturation", ORANGE))
    rewarded, by_k = [row for row in steps if row.get("k")], []
    middle = len(rewarded) // 2
    for label, colour, half in (("first half", GREY, rewarded[:middle]), ("second half", BLUE, rewarded[middle:])):
        k, reward = series([{"step": k, "reward": row.get("reward")} for row in half for k in row["k"]], "reward")
        by_k += [(k, reward, {"color": colour, "marker": ".", "linestyle": "", "alpha": 0.4, "markeredgewidth": 0}),
                 (np.unique(k), [reward[k == each].mean() for each in np.unique(k)], {"color": colour, "label": label})]
    memory = max(series(steps, "gigabytes")[1], default=0)
    return [
        panel("reward in training", noisy(steps, ("reward", "reward", BLUE))),
        panel("held-out reward", dotted(held_out, ("reward", "reward", BLUE), ("saturated", "share of saturated rewards", RED)),
              ylim=(-0.02, None)),
        panel("frames, relative to the start", [(x, y / y[0], style) for x, y, style in looks if len(y) and y[0]], reference=1),
        panel("reward by rollout step", by_k, "k"),
        panel("distance of the velocity from the start", dotted(held_out, ("velocity_distance", "distance", TEAL))),
        panel("KL to the start", noisy(steps, ("kl", "KL", TEAL))),
        panel("loss on real clips", noisy(steps, ("sft_loss", "SFT", ORANGE), ("rwr_loss", "RWR", PINK))),
        panel("reward loss", noisy(steps, ("reward_loss", "reward", BLUE))),
        panel("gradient norm", noisy(steps, ("sft_norm", "SFT", ORANGE), ("rwr_norm", "RWR", PINK),
                                     ("reward_norm", "reward", BLUE)), yscale="log"),
        panel(f"seconds a step (at most {memory:.1f} GB)", noisy(steps, ("seconds", "seconds", GREY)), ylim=(0, None)),
    ]


def pavrm(steps, evaluations):
    """train_pavrm.py: does it learn, and at which timesteps?"""
    colours = dict(zip(dict.fromkeys(label for row in evaluations for label in row["evaluation"]), cycle(COLOURS)))

    def against_timestep(name):
        """A line a label for the last evaluation, faint ones for those before."""
        lines, faint = [], {"alpha": 0.25, "linewidth": 0.8, "marker": ""}
        for row in evaluations:
            last = row is evaluations[-1]
            for label, measures in row["evaluation"].items():
                lines += curve(measures, name, label if last else None, colours[label], **{} if last else faint)
        return lines

    def over_steps(name, **style):
        """A line a label: the mean over the timesteps."""
        lines = []
        for label, colour in colours.items():
            means = [{"step": row["step"], "mean": mean(row["evaluation"].get(label, {}), name)} for row in evaluations]
            lines += dotted(means, ("mean", f"{label}: {name}", colour), **style)
        return lines

    losses = [{"step": row["step"], **row["loss_by_timestep"]} for row in steps if "loss_by_timestep" in row]
    bins = sorted({name for row in losses for name in row} - {"step"}, key=lambda name: float(name.split("-")[0]))
    return [
        panel("training", noisy(steps, ("loss", "loss", RED)) + noisy(steps, ("accuracy", "accuracy", GREY))[1:]),  # mean only
        panel("training loss by timestep", noisy(losses, *zip(bins, bins, shades(len(bins))))[len(bins):]),  # means only
        panel("held out, mean over timesteps",
              over_steps("accuracy") + over_steps("pair_accuracy") + over_steps("loss", linestyle=":")),
        panel("held-out accuracy", against_timestep("accuracy"), TIMESTEP, reference=0.5),
        panel("held-out accuracy on pairs", against_timestep("pair_accuracy"), TIMESTEP, reference=0.5),
        panel("held-out AUC", against_timestep("auc"), TIMESTEP, reference=0.5),
        panel("held-out calibration error (ECE)", against_timestep("ece"), TIMESTEP),
    ]


def scores(content):
    """reward.py: the process reward, from noise (on the right) to the clip, and how well it tells good from poor."""
    clips = sorted(content["scores"], key=lambda clip: -clip["reward"])
    few, panels = len(clips) <= NAMED_CLIPS, []
    style = {"marker": ""} if few else {"marker": "", "alpha": 0.4, "linewidth": 0.7}
    for task in clips[0]["rewards"]:
        rewards = [{t: {"reward": value} for t, value in zip(content["timesteps"], clip["rewards"][task])} for clip in clips]
        lines = [line for row, clip, shade in zip(rewards, clips, shades(len(clips))) for line in
                 curve(row, "reward", f"{clip['reward']:.2f}  {clip['name'][-30:]}" if few else None, shade, **style)]
        if not few:
            means = {t: {"reward": np.mean([row[t]["reward"] for row in rewards])} for t in rewards[0]}
            lines += curve(means, "reward", None, "black", linewidth=2.5)
        panels.append(panel(f"{task}: reward" + ("" if few else " (black: mean)"), lines, TIMESTEP,
                            outside=few, ylim=(-0.02, 1.02)))
    measured = [line for (task, measures), colour in zip((content.get("measures") or {}).items(), cycle(COLOURS))
                for name, style in (("auc", "-"), ("accuracy", ":"))
                for line in curve(measures, name, f"{task}: {name}", colour, linestyle=style)]
    return panels + [panel("AUC and accuracy", measured, TIMESTEP, reference=0.5)]


def by_timestep(runs, output, measure="auc", title=None):
    """Compare reward models: one line a run, of {run: {timestep: measures}}, as evaluations of train_pavrm.py have them."""
    lines = [line for (run, measures), colour in zip(runs.items(), cycle(COLOURS))
             for line in curve(measures, measure, run, colour)]
    chance = {"reference": 0.5} if measure in ("auc", "accuracy", "pair_accuracy") else {}
    grid(output, None, [panel(title or f"held-out {measure}".replace("auc", "AUC"), lines, TIMESTEP, **chance)], size=(6.8, 4))


def bars(rows, output, title):
    """Compare methods: grouped bars with error bars, of {method: {quantity: (mean, standard deviation)}}."""
    quantities = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = 0.8 / len(rows)
    with picture(output, max(5.5, 1.5 + 0.75 * len(rows) * len(quantities)), 4.2) as figure:
        axis = figure.add_subplot()
        for n, ((method, row), colour) in enumerate(zip(rows.items(), cycle(COLOURS))):
            places = [quantities.index(name) + (n - (len(rows) - 1) / 2) * width for name in row]
            means, deviation = np.array(list(row.values()), dtype=float).T  # no deviation, None, is nan
            drawn = axis.bar(places, means, 0.9 * width, color=colour, label=method, yerr=deviation,
                             error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "#444444"})
            axis.bar_label(drawn, fmt="{:.2f}", padding=3, fontsize=9, color="#444444")
        axis.set_xticks(range(len(quantities)), quantities)
        axis.tick_params(axis="x", length=0, labelsize=11)
        axis.grid(False, axis="x")
        axis.margins(y=0.12)
        axis.set_title(title)
        figure.legend(loc="outside lower center", ncols=min(len(rows), 4))


# ---------------------------------------------------------------------------------------------- reading

def draw(source):
    """Draw the picture of a run's directory, a log.jsonl or a scores.json; returns the picture's path."""
    path = Path(source, "log.jsonl") if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a run's directory, its log.jsonl or a scores.json of reward.py")
    is_scores = path.suffix == ".json"
    content = read_json(path) if is_scores else read_log(path)
    try:
        if is_scores:
            panels, title = scores(content), f"rewards by {content['reward_model']}"
        else:
            steps = [row for row in content if "evaluation" not in row]
            evaluations = [row for row in content if "evaluation" in row]
            nested = any(isinstance(value, dict) for row in evaluations for value in row["evaluation"].values())
            panels_of = pavrm if nested or any("loss" in row for row in steps) else prfl
            panels, title = panels_of(steps, evaluations), f"{path.parent}, step {content[-1]['step']}"
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} has not the form that train_prfl.py, train_pavrm.py and reward.py write ({error!r})") from error
    output = path.with_suffix(".png") if is_scores else path.with_name("dashboard.png")
    grid(output, title, panels, size=(6.2, 4) if is_scores else (4.8, 3.1))
    return output


def read_log(path):
    """The lines of a log.jsonl; the last may be torn, where the run was cut off or goes on."""
    lines, rows = path.read_bytes().splitlines(), []
    for n, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, KeyError, TypeError):
            if 0 < n == len(lines) - 1:
                return rows[:n]
            raise InputError(f"{path} is no log of a training run: line {n + 1} is not JSON with a step") from None
    if not rows:
        raise InputError(f"{path} is empty; wait for the first step")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw training runs and scores.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a run's directory, its log.jsonl or a scores.json")
    for source in parser.parse_args(argv).sources:
        print(draw(source))


if __name__ == "__main__":
    parallel.run(main)
