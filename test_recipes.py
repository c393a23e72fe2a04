"""Every recipe is a published setting: its flags parse, and with them the full-size models are built, without weights."""
import re
from pathlib import Path

import pytest
import torch

import files
import train_pavrm
import train_prfl
from model import WanConfig, WanModel
from reward import PAVRM

ROOT = Path(__file__).parent
NAMES = [f"{stage}_{kind}_14B_{size}" for stage in ("pavrm", "prfl") for kind in ("t2v", "i2v") for size in ("480P", "720P")]
NAMES.append("pavrm_bt_t2v_14B_480P")
MANIFESTS = {"Wan2.1-T2V-14B": "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P": "Wan2.1-I2V-14B", "Wan2.1-I2V-14B-720P": "Wan2.1-I2V-14B"}


def stage(name):
    return train_pavrm if name.startswith("pavrm") else train_prfl


def parse(name, *flags):
    return stage(name).parse_args([f"@{ROOT}/recipes/{name}.args", *flags])


def official(name):
    """The configuration of a recipe's model, and its checkpoint's shapes by name."""
    manifest = MANIFESTS[parse(name).model]
    shapes = {key: shape for key, (_, shape) in files.read_json(ROOT / f"testdata/manifests/{manifest}.dit.json").items()}
    config = WanConfig.from_dict(files.read_json(ROOT / "testdata/manifests/config_json.json")[manifest])
    return config, shapes


def size(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_all_published_settings_are_there():
    assert {path.name for path in (ROOT / "recipes").iterdir()} == {f"{name}.args" for name in NAMES}


@pytest.mark.parametrize("file", ["README.md", "train_pavrm.py", "train_prfl.py", "parallel.py", "recipes"])
def test_recipes_that_are_mentioned_exist(file):
    texts = [path.read_text() for path in (ROOT / file).iterdir()] if file == "recipes" else [(ROOT / file).read_text()]
    mentioned = {name for text in texts for name in re.findall(r"recipes/(\w+)\.args", text)}
    assert mentioned and mentioned <= set(NAMES)


@pytest.mark.parametrize("file", ["README.md", "train_pavrm.py", "train_prfl.py"])
def test_commands_that_begin_with_a_recipe_run(file):
    """Their flags exist, and their batch can be shared by their processes."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    commands = re.findall(r"torchrun --nproc_per_node=(\d+) (train_\w+)\.py @recipes/(\w+)\.args(.*)", text)
    assert commands
    for processes, script, name, flags in commands:
        args = parse(name, *flags.replace("$DATA", "--data index.jsonl").split())
        assert script == stage(name).__name__ and args.batch_size * args.sp % int(processes) == 0, f"{name}{flags}"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_published_setting(name):
    args = parse(name)
    assert args.model == ("Wan2.1-T2V-14B" if "t2v" in name else f"Wan2.1-I2V-14B-{name[-4:]}")
    assert (args.batch_size, args.weight_decay, args.max_norm, args.shift, args.timesteps) == (2, 0.01, 1.0, 5.0, ["uniform"])
    assert args.checkpoint_blocks and args.lr_schedule == "constant" and not (args.warmup or args.lora_rank or args.ema)
    if stage(name) is train_pavrm:
        assert (args.lr, args.head_lr, args.loss) == ((1e-6, 1e-5, "bt") if "bt" in name else (1e-6, 1e-6, "ce"))
        assert (args.num_blocks, args.train_blocks, args.task, args.accumulation) == (8, None, ["motion_quality"], 1)
        assert (args.pool, args.num_queries, args.long_caption, args.drop_prompt) == ("query", 1, 0, 0)
        assert args.eval_timesteps == [201, 400, 600, 800, 1000]
    else:
        assert (args.lr, args.accumulation, args.phases, args.reward_weight) == (5e-6, 5, ["sft", "reward"], 0.1)
        assert (args.solver, args.rollout_steps, args.rollout_guidance, args.judge) == ("unipc", 40, 1.0, "next")
        assert (args.reward_form, args.gradient_steps, args.rewards_per_rollout) == ("hinge", 1, 1)
        assert (args.long_caption, args.drop_prompt, args.sft_ratio, args.kl_weight) == (0.7, 0.1, 1.0, 0.0)
        assert train_prfl.rewardable(args.k, args.rollout_steps) == list(range(39))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_called(name):
    """Its second line is a command that begins with it; flags after the recipe change it."""
    what, command, *flags = (ROOT / f"recipes/{name}.args").read_text().splitlines()
    assert what.startswith("# P") and ("1280x720" if "720P" in name else "832x480") in what and "81 frames" in what
    script = stage(name).__name__
    assert command.startswith(f"# torchrun --nproc_per_node=8 {script}.py @recipes/{name}.args ")
    args = parse(name, *command.split(".args ")[1].split())
    assert args.batch_size * args.sp == 8  # as published: eight GPUs, four a clip
    assert len(flags) <= 13 and all(line.startswith("--") for line in flags) and max(map(len, [what, command, *flags])) <= 135


@pytest.mark.parametrize("name", NAMES)
def test_the_full_size_models_of_a_recipe(name):
    """The policy has the official names and shapes; PAVRM has those of its first 8 blocks, and its head 5120, 1024, 512, 1."""
    args, (config, shapes) = parse(name), official(name)
    with torch.device("meta"):
        dit = WanModel(config)
        assert {key: list(tensor.shape) for key, tensor in dit.state_dict().items()} == shapes
        assert config.use_clip == ("i2v" in name) == any(key.startswith("img_emb.") for key in shapes)
        if stage(name) is train_prfl:
            assert size(shapes.values()) > 14e9
            return
        pavrm = PAVRM(dit, args.num_blocks, args.task, args.pool, args.num_queries)
    kept = [shape for key, shape in shapes.items() if not key.startswith("head.") and not re.match(r"blocks\.([89]|\d\d)\.", key)]
    head = {"query_attention.queries": [1, 5120],
            "query_attention.multihead_attn.in_proj_weight": [15360, 5120], "query_attention.multihead_attn.in_proj_bias": [15360],
            "query_attention.multihead_attn.out_proj.weight": [5120, 5120], "query_attention.multihead_attn.out_proj.bias": [5120],
            "mlp.fc1.weight": [1024, 5120], "mlp.fc1.bias": [1024], "mlp.fc2.weight": [512, 1024], "mlp.fc2.bias": [512],
            "mlp.fc3.weight": [1, 512], "mlp.fc3.bias": [1]}
    assert {key: list(tensor.shape) for key, tensor in pavrm.state_dict().items() if not key.startswith("dit.")} == head
    assert sum(parameter.numel() for parameter in pavrm.parameters()) == size(kept) + size(head.values())
    assert pavrm.query_attention.multihead_attn.num_heads == 8 and len(pavrm.dit.blocks) == 8
