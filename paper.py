"""The paper's comparisons on the tiny world: what PRFL adds to fine-tuning, and what its parts do.

    make paper                      # or: python paper.py; an hour on two cores
    python paper.py --short         # a smaller form, in ten minutes

Reward models: number of blocks, pools, cross-entropy against Bradley-Terry, number of labels; accuracy by timestep.
Generators: SFT, reward-weighted regression (RWR), PRFL without SFT and PRFL, all with as many iterations; PRFL with k
early, middle and late; PRFL with the other reward models. All are judged by the same reward model, and by the true
share of good motion, which no model sees. Runs that are done are kept: start it again to go on, and in
another --output after a change.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import parallel
import plot
from data import VAE_FILE, Clips, to_uint8
from demo import PAVRM_FLAGS, PRFL_FLAGS, good_motion, make_data, rewards, sample
from files import InputError, read_json, write_json
from reward import PAVRM
from vae import WanVAE

REWARD_MODELS = {  # name: labels (None: all), and flags beside the demo's; PAVRM has 3 of 6 blocks, one query, cross-entropy
    "PAVRM": (None, ""), "1 block": (None, "--num_blocks 1"), "5 blocks": (None, "--num_blocks 5"),
    "mean pool": (None, "--pool mean"), "max pool": (None, "--pool max"),
    "Bradley-Terry": (None, "--loss bt --batch_size 16"),  # 16 pairs are 32 clips
    "100 labels": (100, ""), "300 labels": (300, ""), "1000 labels": (1000, "")}
METHODS = {
    "SFT": "--phases sft", "RWR": "--phases rwr", "RWR, poor clips too": "--phases rwr --good none",
    "PRFL without SFT": "--phases reward", "PRFL": ""}
ABLATIONS = {"PRFL, k early": "--k early", "PRFL, k middle": "--k middle", "PRFL, k late": "--k late"}
OTHER_REWARDS = ["1 block", "5 blocks", "mean pool", "max pool", "Bradley-Terry"]


def run_all(jobs):
    """Run commands, as many at once as there are cores, one thread each; the directory that a command makes says it is done."""
    def run(job):
        result, words = job
        if not result.exists():
            log = result.parent.with_suffix(".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            if list(result.parent.glob("checkpoints/step_*")):  # it was cut short after its training
                words.append("--resume")
            print("$ python " + " ".join(map(str, words)), flush=True)
            with open(log, "w") as file:
                code = subprocess.run([sys.executable, *map(str, words)], stdout=file, stderr=file,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
            if code:
                raise InputError(f"a run has failed; its message is in {log}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            list(pool.map(run, jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def slug(name):
    return name.replace(",", "").replace(" ", "_")


def judge(transformer, texts, vae, pavrm):
    """Mean reward and true share of good motion of one clip a prompt, with the same seeds for every model."""
    latents = sample(transformer, texts)
    with torch.no_grad():
        videos = [to_uint8(video).numpy() for part in latents.split(8) for video in vae.decode(part)]
    return {"reward": rewards(pavrm, latents, texts).mean().item(), "good motion": sum(map(good_motion, videos)) / len(videos)}


def spread(rows):
    """{measure: (mean, standard deviation or None)} over seeds."""
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return {name: (column.mean().item(), column.std().item() if len(rows) > 1 else None) for name, column in columns.items()}


def lines(title, table):
    """A table in Markdown of {row: {column: (mean, deviation) or number}}."""
    def cell(value):
        mean, deviation = value if isinstance(value, tuple) else (value, None)
        return "-" if mean is None else f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")

    columns = list(next(iter(table.values())))
    return "\n".join([f"| {title} | " + " | ".join(map(str, columns)) + " |", "|---" * (1 + len(columns)) + "|",
                      *(f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |" for name, row in table.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory of all runs, tables and plots; None: outputs/paper or outputs/paper_short")
    parser.add_argument("--short", action="store_true", help="one seed, fewer iterations and variants")
    args = parser.parse_args()
    output = args.output or Path("outputs/paper_short" if args.short else "outputs/paper")
    started, seeds, samples = time.time(), range(1 if args.short else 3), 32 if args.short else 64
    pairs, pavrm_flags, prfl_flags = 1500, [*PAVRM_FLAGS, "--steps", "1200", "--save_every", "1200"], list(PRFL_FLAGS)
    models, others, methods = dict(REWARD_MODELS), OTHER_REWARDS, dict(METHODS)
    if args.short:
        pairs, pavrm_flags, prfl_flags = 448, [*pavrm_flags, "--steps", "200"], [*prfl_flags, "--steps", "40"]
        models = {name: models[name] for name in ("PAVRM", "1 block", "mean pool", "Bradley-Terry", "100 labels")}
        methods.pop("RWR, poor clips too")
        others = []

    # The data: pairs of clips; an index that is cut short is as many labels.
    if not (output / "val/index.jsonl").exists():
        make_data(output, pairs, 48 if args.short else 96)
    index = (output / "train/index.jsonl").read_text().splitlines(keepends=True)
    for labels in filter(None, (labels for labels, _ in models.values())):
        (output / f"train/{labels}.jsonl").write_text("".join(index[:labels]))

    def train_pavrm(name):
        labels, flags = models[name]
        run = output / "pavrm" / slug(name)
        return run / "reward", ["train_pavrm.py", "--train", output / f"train/{labels or 'index'}.jsonl",
                                "--val", output / "val/index.jsonl", "--output", run, *pavrm_flags, *flags.split()]

    def train_prfl(name, flags, seed, reward="PAVRM"):
        run = output / "prfl" / f"{slug(name)}_{seed}"
        watched = seed == 0 and name in ("PRFL", "PRFL without SFT")  # for their dashboards; it takes time
        return run / "model", ["train_prfl.py", "--data", output / "train/index.jsonl", "--val", output / "val/index.jsonl",
                               "--reward", output / "pavrm" / slug(reward) / "reward", "--output", run, "--seed", seed, *prfl_flags,
                               "--samples", 16, "--sample_every", 20 if watched else 0, *flags.split()]

    jobs = {name: [train_prfl(name, flags, seed) for seed in seeds] for name, flags in methods.items()}
    jobs |= {name: [train_prfl(name, flags, 0)] for name, flags in ABLATIONS.items()}
    jobs |= {f"PRFL, {reward}": [train_prfl(f"PRFL {reward}", "", 0, reward)] for reward in others}
    run_all([train_pavrm(name) for name in models])
    run_all([job for some in jobs.values() for job in some])

    # Judge them all alike: with new seeds (there are only 72 captions in all), and by the truth from pixels.
    held_out = Clips(output / "val/index.jsonl")
    texts = [held_out.load(i)["text_long"] for i in range(samples)]
    vae, pavrm = WanVAE.from_pretrained(f"demo/model/{VAE_FILE}"), PAVRM.from_pretrained(output / "pavrm/PAVRM/reward")
    results = {"base": [judge("demo/model", texts, vae, pavrm)]}
    for name, some in jobs.items():
        results[name] = [judge(model, texts, vae, pavrm) for model, _ in some]
        print(f"{name}: {results[name]}", flush=True)
    write_json(output / "results.json", results)
    generators = {name: spread(rows) for name, rows in results.items()}

    evaluations = {name: read_json(output / "pavrm" / slug(name) / "evaluation.json")["motion_quality"] for name in models}
    def by_timestep(measure):
        return {name: {f"t = {t}": row.get(measure) for t, row in rows.items()} for name, rows in evaluations.items()}

    accuracy = {name: row for name, row in by_timestep("accuracy").items() if name != "Bradley-Terry"}
    texts = [f"{samples} samples each, {len(seeds)} training seeds (k and reward models: the first), {40 if args.short else 100} iterations; mean ± "
             f"standard deviation over seeds", lines("generator", generators), "AUC of the reward models on held-out clips, by timestep",
             lines("reward model", by_timestep("auc")), "and their accuracy (Bradley-Terry has no threshold; it orders pairs)",
             lines("reward model", accuracy), lines("pairs in order", {"Bradley-Terry": by_timestep("pair_accuracy")["Bradley-Terry"]}),
             f"{(time.time() - started) / 60:.0f} minutes"]
    (output / "tables.md").write_text("\n\n".join(texts) + "\n")
    print("\n" + "\n\n".join(texts))

    plot.bars({name: row for name, row in generators.items() if name in ("base", *METHODS)}, output / "generators.png",
              "Reward and true good motion of new samples")
    plot.by_timestep({name: rows for name, rows in evaluations.items() if "labels" not in name}, output / "reward_models.png", "auc",
                     "Reward models: AUC on held-out clips")
    by_labels = {name: rows for name, rows in evaluations.items() if "labels" in name}
    plot.by_timestep({**by_labels, f"{2 * pairs} labels": evaluations["PAVRM"]}, output / "labels.png", "accuracy",
                     "Accuracy by the number of labels")
    plot.draw(output / "prfl" / "PRFL_0")
    plot.draw(output / "prfl" / "PRFL_without_SFT_0")
    print(f"plots: {output}/*.png, and the dashboard.png of {output}/prfl/PRFL_0 and PRFL_without_SFT_0")


if __name__ == "__main__":
    parallel.run(main)
