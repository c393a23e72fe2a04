"""The paper's comparisons on the tiny world: what PRFL adds to fine-tuning, and what its parts do.

    make paper                         # or: python -m tools.paper; an hour on two cores
    python -m tools.paper --short      # a smaller version, 8 minutes

Reward models: number of blocks, pools, cross-entropy against Bradley-Terry, number of labels; accuracy by
timestep. Generators: SFT, reward-weighted regression (RWR), PRFL without SFT and PRFL, each with as many
iterations; PRFL with k early, middle and late; PRFL with the other reward models. All are judged by the same
reward model, and by the true share of good motion, which no model sees.

Finished runs are kept, so you can restart it to continue; after a change of code, use another --output.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cli

import torch

import plot
from clips import Clips
from demo import PAVRM_FLAGS, PRFL_FLAGS, good_motion, make_data, rewards, sample
from files import InputError, read_json, write_json
from reward import PAVRM
from vae import VAE_FILE, WanVAE
from video import to_uint8

# {name: (number of labels or None for all, flags besides the demo's)}. The demo's PAVRM has 3 of 6 blocks and
# one query, and is trained with cross-entropy.
REWARD_MODELS = {
    "PAVRM": (None, ""),
    "1 block": (None, "--num_blocks 1"),
    "5 blocks": (None, "--num_blocks 5"),
    "mean pool": (None, "--pool mean"),
    "max pool": (None, "--pool max"),
    "Bradley-Terry": (None, "--loss bt --batch_size 16"),  # 16 pairs are 32 clips
    "100 labels": (100, ""),
    "300 labels": (300, ""),
    "1000 labels": (1000, ""),
}
SHORT_REWARD_MODELS = ["PAVRM", "1 block", "mean pool", "Bradley-Terry", "100 labels"]
METHODS = {
    "SFT": "--phases sft",
    "RWR": "--phases rwr",
    "RWR, poor clips too": "--phases rwr --skip_poor none",
    "PRFL without SFT": "--phases reward",
    "PRFL": "",
}
ABLATIONS = {"PRFL, k early": "--k early", "PRFL, k middle": "--k middle", "PRFL, k late": "--k late"}
OTHER_REWARDS = ["1 block", "5 blocks", "mean pool", "max pool", "Bradley-Terry"]
WATCHED = ["PRFL", "PRFL without SFT"]  # sampled during training, for a dashboard; it takes time


# ------------------------------------------------------------------------------ runs

def run_all(jobs):
    """Run commands, as many at once as there are cores, with one thread each.

    jobs: (directory that the command makes when it is done, words of the command).
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            list(pool.map(run_job, jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_job(job):
    result, words = job
    if result.exists():
        return
    if list(result.parent.glob("checkpoints/step_*")):  # it was stopped after its training
        words = [*words, "--resume"]
    print("$ python " + " ".join(map(str, words)), flush=True)
    log = result.parent.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise InputError(f"a run has failed; its message is in {log}")


def slug(name):
    return name.replace(",", "").replace(" ", "_")


def judge(transformer, texts, vae, pavrm):
    """Mean reward and true share of good motion of one clip per prompt, with the same seeds for every
    model."""
    latents = sample(transformer, texts)
    good = 0
    with torch.no_grad():
        for part in latents.split(8):
            for video in vae.decode(part):
                good += good_motion(to_uint8(video).numpy())
    return {"reward": rewards(pavrm, latents, texts).mean().item(), "good motion": good / len(texts)}


# ------------------------------------------------------------------------------ tables

def spread(rows):
    """{measure: (mean, standard deviation or None)} over seeds."""
    found = {}
    for name in rows[0]:
        column = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        found[name] = (column.mean().item(), column.std().item() if len(rows) > 1 else None)
    return found


def cell(value):
    """A number, (mean, deviation or None), or None, as text."""
    mean, deviation = value if isinstance(value, tuple) else (value, None)
    if mean is None:
        return "-"
    if deviation is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {deviation:.3f}"


def markdown(title, table):
    """A table {row: {column: value}} in Markdown; values as `cell` takes them."""
    columns = list(next(iter(table.values())))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |")
    return "\n".join(lines)


def by_timestep(evaluations, measure, names):
    """{reward model: {"t = 201": value, ...}} of one measure."""
    table = {}
    for name in names:
        rows = evaluations[name]
        table[name] = {f"t = {t}": row.get(measure) for t, row in rows.items()}
    return table


# ------------------------------------------------------------------------------ the comparison

def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.prog = "python -m tools.paper"
    parser.add_argument("--output", type=Path,
                        help="directory of all runs, tables and plots (default: outputs/paper, or "
                             "outputs/paper_short with --short)")
    parser.add_argument("--short", action="store_true", help="one seed, fewer iterations and variants")
    return parser.parse_args()


def main():
    args = parse_args()
    started = time.time()

    # ---- the full form, or the short one
    output = args.output or Path("outputs/paper")
    seeds, samples, pairs, held_out_pairs, iterations = range(3), 64, 1500, 96, 100
    pavrm_flags = [*PAVRM_FLAGS, "--steps", "1200", "--save_every", "1200"]
    models, methods, others = dict(REWARD_MODELS), dict(METHODS), OTHER_REWARDS
    if args.short:
        output = args.output or Path("outputs/paper_short")
        seeds, samples, pairs, held_out_pairs, iterations = range(1), 32, 448, 48, 40
        pavrm_flags += ["--steps", "200"]
        models = {name: models[name] for name in SHORT_REWARD_MODELS}
        methods.pop("RWR, poor clips too")
        others = []
    prfl_flags = [*PRFL_FLAGS, "--steps", iterations]

    # ---- the data: pairs of clips, and for fewer labels the first lines of the index
    if not (output / "val/index.jsonl").exists():
        make_data(output, pairs, held_out_pairs)
    index = (output / "train/index.jsonl").read_text().splitlines(keepends=True)
    for number, _ in models.values():
        if number:
            (output / f"train/{number}.jsonl").write_text("".join(index[:number]))

    # ---- the commands
    def train_pavrm(name):
        number, flags = models[name]
        run = output / "pavrm" / slug(name)
        return run / "reward", ["train_pavrm.py", "--train", output / f"train/{number or 'index'}.jsonl",
                                "--val", output / "val/index.jsonl", "--output", run, *pavrm_flags,
                                *flags.split()]

    def train_prfl(name, flags, seed, reward="PAVRM"):
        run = output / "prfl" / f"{slug(name)}_{seed}"
        sample_every = 20 if seed == 0 and name in WATCHED else 0
        return run / "model", ["train_prfl.py", "--data", output / "train/index.jsonl",
                               "--val", output / "val/index.jsonl",
                               "--reward", output / "pavrm" / slug(reward) / "reward", "--output", run,
                               "--seed", seed, *prfl_flags, "--samples", 16, "--sample_every", sample_every,
                               *flags.split()]

    jobs = {}
    for name, flags in methods.items():
        jobs[name] = [train_prfl(name, flags, seed) for seed in seeds]
    for name, flags in ABLATIONS.items():
        jobs[name] = [train_prfl(name, flags, 0)]
    for reward in others:
        jobs[f"PRFL, {reward}"] = [train_prfl(f"PRFL {reward}", "", 0, reward)]

    # ---- train all reward models, then all generators
    run_all([train_pavrm(name) for name in models])
    run_all([job for some in jobs.values() for job in some])

    # ---- judge all generators alike: with new seeds (there are only 72 captions), and by the truth too
    held_out = Clips(output / "val/index.jsonl")
    texts = [held_out.load(i)["text_long"] for i in range(samples)]
    vae = WanVAE.from_pretrained(f"demo/model/{VAE_FILE}")
    pavrm = PAVRM.from_pretrained(output / "pavrm/PAVRM/reward")
    results = {"base": [judge("demo/model", texts, vae, pavrm)]}
    for name, some in jobs.items():
        results[name] = [judge(model, texts, vae, pavrm) for model, _ in some]
        print(f"{name}: {results[name]}", flush=True)
    write_json(output / "results.json", results)
    generators = {name: spread(rows) for name, rows in results.items()}

    # ---- the reward models' own evaluations
    evaluations = {}
    for name in models:
        evaluations[name] = read_json(output / "pavrm" / slug(name) / "evaluation.json")["motion_quality"]
    by_threshold = [name for name in models if name != "Bradley-Terry"]

    # ---- tables
    parts = [f"{samples} samples each, {len(seeds)} training seeds (k and reward models: the first), "
             f"{iterations} iterations; mean ± standard deviation over seeds",
             markdown("generator", generators),
             "AUC of the reward models on held-out clips, by timestep",
             markdown("reward model", by_timestep(evaluations, "auc", models)),
             "and their accuracy (Bradley-Terry has no threshold; it orders pairs)",
             markdown("reward model", by_timestep(evaluations, "accuracy", by_threshold)),
             markdown("pairs in order", by_timestep(evaluations, "pair_accuracy", ["Bradley-Terry"])),
             f"{(time.time() - started) / 60:.0f} minutes"]
    (output / "tables.md").write_text("\n\n".join(parts) + "\n")
    print("\n" + "\n\n".join(parts))

    # ---- plots
    compared = {name: row for name, row in generators.items() if name in ("base", *METHODS)}
    plot.bars(compared, output / "generators.png", "Reward and true good motion of new samples")
    by_form = {name: rows for name, rows in evaluations.items() if "labels" not in name}
    plot.by_timestep(by_form, output / "reward_models.png", "auc", "Reward models: AUC on held-out clips")
    by_labels = {name: rows for name, rows in evaluations.items() if "labels" in name}
    by_labels[f"{2 * pairs} labels"] = evaluations["PAVRM"]
    plot.by_timestep(by_labels, output / "labels.png", "accuracy", "Accuracy by the number of labels")
    for name in WATCHED:
        plot.draw(output / "prfl" / f"{slug(name)}_0")
    print(f"plots: {output}/*.png, and the dashboard.png of {output}/prfl/PRFL_0 and PRFL_without_SFT_0")


if __name__ == "__main__":
    cli.run(main)
