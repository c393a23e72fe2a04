"""Every recipe but the tiny world's is a published setting: its flags parse, and they build the full-size
models."""
import re
from pathlib import Path

import pytest
import torch

import files
import train_pavrm
import train_prfl
import train_reward_fl
from model import WanConfig, WanModel
from reward import PAVRM

ROOT = Path(__file__).parent
NAMES = ["pavrm_t2v_14B_480P", "pavrm_t2v_14B_720P", "pavrm_i2v_14B_480P", "pavrm_i2v_14B_720P",
         "pavrm_bt_i2v_14B_720P",  # the only one that was published with Bradley-Terry
         "prfl_t2v_14B_480P", "prfl_t2v_14B_720P", "prfl_i2v_14B_480P", "prfl_i2v_14B_720P"]
TINY = ["tiny_pavrm", "tiny_prfl"]
REWARD_FL = ["reward_fl_i2v_A14B"]  # test_train_reward_fl.py holds its values
MANIFESTS = {"Wan2.1-T2V-14B": "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P": "Wan2.1-I2V-14B",
             "Wan2.1-I2V-14B-720P": "Wan2.1-I2V-14B"}


def stage(name):
    if name in REWARD_FL:
        return train_reward_fl
    return train_pavrm if "pavrm" in name else train_prfl


def parse(name, *flags):
    return stage(name).parse_args([f"@{ROOT}/recipes/{name}.args", *flags])


def official(name):
    """The configuration of a recipe's model, and its checkpoint's shapes by name."""
    manifest = MANIFESTS[parse(name).model]
    tensors = files.read_json(ROOT / f"testdata/manifests/{manifest}.dit.json")
    shapes = {key: shape for key, (_, shape) in tensors.items()}
    config = WanConfig.from_dict(files.read_json(ROOT / "testdata/manifests/config_json.json")[manifest])
    return config, shapes


def size(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_all_published_settings_are_there():
    assert {path.name for path in (ROOT / "recipes").iterdir()} == {
        f"{name}.args" for name in NAMES + TINY + REWARD_FL}


def pages():
    """{name: text} of the documents and of the files whose heads show commands."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.args")]
    files += [ROOT / name for name in ("train_pavrm.py", "train_prfl.py", "train_reward_fl.py", "cli.py")]
    return {str(file.relative_to(ROOT)): file.read_text().replace("\\\n", " ") for file in files}


def test_recipes_that_are_mentioned_exist():
    mentioned = set()
    for text in pages().values():
        mentioned |= set(re.findall(r"recipes/(\w+)\.args", text))
    assert mentioned >= set(TINY) and mentioned <= set(NAMES + TINY + REWARD_FL)


def test_commands_that_begin_with_a_recipe_run():
    """Their flags exist, and their batch can be shared by their processes."""
    launcher = r"(?:torchrun .*--nproc_per_node=(\d+) |python )"
    command = re.compile(launcher + r"(?:.* )?(train_\w+)\.py @recipes/(\w+)\.args([^#$`\n]*)")
    count = 0
    for page, text in pages().items():
        for processes, script, name, flags in command.findall(text):
            args = parse(name, *flags.split())
            assert script == stage(name).__name__, f"{page}: {name}"
            if processes:
                assert args.batch_size * args.sp % int(processes) == 0, f"{page}: {name} {flags}"
            count += 1
    assert count > 10


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_recipes_run_as_they_are(name):
    """Without another flag they use what the repository ships."""
    args = parse(name)
    assert args.model == "demo/model" and args.shift == 5.0 and args.batch_size >= 16
    command = (ROOT / f"recipes/{name}.args").read_text().splitlines()[1]
    assert command == f"# python {stage(name).__name__}.py @recipes/{name}.args"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_published_setting(name):
    args = parse(name)
    assert args.model == ("Wan2.1-T2V-14B" if "t2v" in name else f"Wan2.1-I2V-14B-{name[-4:]}")
    assert (args.batch_size, args.weight_decay, args.max_norm) == (2, 0.01, 1.0)
    assert (args.shift, args.timesteps, args.lr_schedule) == (5.0, ["uniform"], "constant")
    assert args.activation_checkpointing and not (args.warmup or args.lora_rank or args.ema)
    if stage(name) is train_pavrm:
        head_lr, loss = (1e-5, "bt") if "bt" in name else (1e-6, "ce")
        assert (args.lr, args.head_lr, args.loss) == (1e-6, head_lr, loss)
        assert (args.num_blocks, args.train_blocks, args.labels) == (8, None, ["motion_quality"])
        assert args.accumulation == 1
        assert (args.pool, args.num_queries, args.long_caption, args.drop_prompt) == ("query", 1, 0, 0)
        assert args.eval_timesteps == [201, 400, 600, 800, 1000]
    else:
        assert (args.lr, args.accumulation, args.phases) == (5e-6, 5, ["sft", "reward"])
        assert (args.solver, args.solver_steps, args.rollout_guidance) == ("unipc", 40, 1.0)
        assert (args.reward_weight, args.reward_form) == (0.1, "hinge")
        assert (args.judge, args.gradient_steps) == ("next", 1)
        assert (args.long_caption, args.drop_prompt, args.kl_weight) == (0.7, 0.1, 0.0)
        assert train_prfl.rewardable(args.k, args.solver_steps) == list(range(39))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_called(name):
    """It names the size to encode, the command that begins with it, and the number of steps."""
    what, encode, command, *flags = (ROOT / f"recipes/{name}.args").read_text().splitlines()
    size = "1280x704" if "720P" in name else "832x480"
    assert what.startswith("# P") and f"81 frames of {size}" in what
    assert encode == f"# Encode the clips with data.py --size {size} --frames 81"
    assert any(line.startswith("--steps ") and "not published" in line for line in flags)
    script = stage(name).__name__
    assert command.startswith(f"# torchrun --nproc_per_node=8 {script}.py @recipes/{name}.args ")
    args = parse(name, *command.split(".args ")[1].split())
    assert args.batch_size * args.sp == 8  # as published: eight GPUs, four for each clip
    assert len(flags) <= 14 and all(line.startswith("--") for line in flags)


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_models_of_a_recipe(name):
    """The policy has the official names and shapes, PAVRM those of its first 8 blocks and a head 5120, 1024,
    512, 1."""
    args, (config, shapes) = parse(name), official(name)
    with torch.device("meta"):
        dit = WanModel(config)
        assert {key: list(tensor.shape) for key, tensor in dit.state_dict().items()} == shapes
        assert config.use_clip == ("i2v" in name) == any(key.startswith("img_emb.") for key in shapes)
        if stage(name) is train_prfl:
            assert size(shapes.values()) > 14e9
            return
        pavrm = PAVRM(dit, args.num_blocks, args.labels, args.pool, args.num_queries)
    dropped = re.compile(r"head\.|blocks\.([89]|\d\d)\.")
    kept = [shape for key, shape in shapes.items() if not dropped.match(key)]
    attention = {"in_proj_weight": [15360, 5120], "in_proj_bias": [15360],
                 "out_proj.weight": [5120, 5120], "out_proj.bias": [5120]}
    head = {"query_attention.queries": [1, 5120],
            **{f"query_attention.multihead_attn.{key}": shape for key, shape in attention.items()},
            "mlp.fc1.weight": [1024, 5120], "mlp.fc1.bias": [1024],
            "mlp.fc2.weight": [512, 1024], "mlp.fc2.bias": [512],
            "mlp.fc3.weight": [1, 512], "mlp.fc3.bias": [1]}
    state = pavrm.state_dict()
    assert {key: list(state[key].shape) for key in state if not key.startswith("dit.")} == head
    assert sum(parameter.numel() for parameter in pavrm.parameters()) == size(kept) + size(head.values())
    assert pavrm.query_attention.multihead_attn.num_heads == 8 and len(pavrm.dit.blocks) == 8
