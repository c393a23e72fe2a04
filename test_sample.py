"""Sampling with tiny random models of every kind: the files written, the walk by hand, the condition, the
choice between seeds, directories of clips, what is refused."""
import gc
import json
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import av
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import gpu
import label
import lora
import parallel
import sample
from annotations import list_faults, read_list, video_faults
from clip import CLIP_FILE, CLIPVisionModel
from encode import NEGATIVE_PROMPT, Encoder
from evaluation import process_logits
from files import InputError
from model import WanModel
from reward import PAVRM
from solver import UniPC
from t5 import T5_FILE, UMT5Encoder
from testdata.golden import fill_
from testdata.helpers import ROOT, lora_pairs, write_lora
from vae import VAE_FILE, WanVAE
from video import read_image, read_video, to_uint8, write_video

torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way

DIT = dict(dim=24, ffn_dim=32, freq_dim=16, out_dim=16, num_heads=2, num_layers=2, text_len=32, text_dim=16)
SAMPLING = {"size": [48, 32], "frames": 5, "fps": 8, "solver_steps": 3, "shift": 3.0, "guidance": 2.0,
            "prompt": ["a red ball rolls left"]}


def transformer(directory, seed=0, **config):
    model = WanModel({**DIT, **config})
    fill_(model.state_dict(), seed)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(models, tmp_path_factory):
    """{kind: official directory}: the encoders of conftest's `models`, with transformers and SAMPLING.

    i2v is Wan2.2's, without CLIP; i2v_clip and flf2v are Wan2.1's.
    """
    encoders = models["t2v"]
    root = tmp_path_factory.mktemp("sampled")
    for kind in ("t2v", "i2v", "i2v_clip", "flf2v"):
        images = kind in ("i2v_clip", "flf2v")
        channels = 16 if kind == "t2v" else 36
        transformer(root / kind, model_type=kind.removesuffix("_clip"), in_dim=channels, use_clip=images)
        for file in ("google", VAE_FILE, T5_FILE):
            (root / kind / file).symlink_to(encoders / file)
        (root / kind / "sampling.json").write_text(json.dumps(SAMPLING))
        if images and not (root / CLIP_FILE).exists():  # 257 tokens of 1280, as the transformers expect
            torch.manual_seed(0)
            state = CLIPVisionModel(num_layers=1, out_dim=8).state_dict()
            torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, root / CLIP_FILE)
        if images:
            (root / kind / CLIP_FILE).symlink_to(root / CLIP_FILE)
    return {path.name: path for path in root.iterdir() if path.is_dir()}


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """{kind: directory} of reward models with two labels."""
    root = tmp_path_factory.mktemp("rewards")
    for kind, config in [("t2v", {"in_dim": 16}), ("i2v_clip", {"in_dim": 36, "use_clip": True})]:
        dit = WanModel({**DIT, "model_type": kind.removesuffix("_clip"), **config})
        pavrm = PAVRM(dit, 1, ["motion_quality", "text_alignment"])
        fill_(pavrm.state_dict(), 3)
        for mlp in pavrm.heads[1::2]:
            mlp.fc3.weight.data *= 30  # otherwise all rewards are alike
        pavrm.save_pretrained(root / kind)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    if "cuda" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def seen(monkeypatch):
    """What the transformer is given, call by call (`calls`), and what the VAE decodes (`latents`)."""
    forward, decode, record = WanModel.forward, WanVAE.decode, SimpleNamespace(calls=[], latents=[])

    def watched_forward(self, x, t, context, **condition):
        record.calls.append(SimpleNamespace(t=t.item(), text=context[0], condition=condition))
        return forward(self, x, t, context, **condition)

    def watched_decode(self, latents):
        record.latents.append(latents)
        return decode(self, latents)

    monkeypatch.setattr(WanModel, "forward", watched_forward)
    monkeypatch.setattr(WanVAE, "decode", watched_decode)
    return record


def run(directory, output, *flags):
    place = [] if "--output" in flags else ["--save_file", str(output)]
    sample.main(["--model", str(directory), *place, *map(str, flags)])
    return output


def photograph(path, width, height):
    """A picture with a slope of grey from top to bottom."""
    rows = torch.linspace(0, 255, height).round().to(torch.uint8)
    av.VideoFrame.from_ndarray(rows[:, None, None].repeat(1, width, 3).numpy()).save(path)
    return path


# ------------------------------------------------------------------------------ the file

def test_a_video_is_written_that_plays_anywhere(models, tmp_path):
    path = run(models["t2v"], tmp_path / "new/a.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (48, 32, 5, 8)
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]
    assert read_video(path, fps=8).float().std() > 5  # a picture, not one colour


def near(a, b):
    """The same video except for rounding: the CPU's sums depend on where a tensor lies in memory."""
    return (a.float() - b.float()).abs().mean() < 0.5  # of 255 levels


def test_the_seed_decides_the_video(models, tmp_path):
    one, again, other = (read_video(run(models["t2v"], tmp_path / name, "--seed", seed))
                         for name, seed in [("a.mp4", 3), ("b.mp4", 3), ("c.mp4", 4)])
    assert near(one, again) and not near(one, other)


def test_several_prompts_are_numbered_and_each_has_the_next_seed(models, tmp_path, capsys):
    run(models["t2v"], tmp_path / "a.mp4", "--prompt", "two balls", "the cat sat", "--seed", 5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-0.mp4", "a-1.mp4"]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a-0.mp4: 5 frames of 48x32, seed 5, 'two balls'",
        f"{tmp_path}/a-1.mp4: 5 frames of 48x32, seed 6, 'the cat sat'"]
    for n, prompt in enumerate(["two balls", "the cat sat"]):
        alone = run(models["t2v"], tmp_path / "alone.mp4", "--prompt", prompt, "--seed", 5 + n)
        assert near(read_video(alone), read_video(tmp_path / f"a-{n}.mp4"))


# ------------------------------------------------------------------------------ the walk

def test_the_walk_by_hand(models, tmp_path, seen, monkeypatch):
    """One float32 draw, three guided UniPC steps, the VAE's decoder, rounding: that is all."""
    written = []

    def keep(path, video, fps):
        written.append((path, video, fps))
        path.touch()

    monkeypatch.setattr(sample, "write_video", keep)
    prompts = ["--prompt", "two balls", "--negative_prompt", "the cat"]
    run(models["t2v"], tmp_path / "a.mp4", *prompts, "--seed", 7, "--size", "32x64")
    model, encoder = WanModel.from_pretrained(models["t2v"]), Encoder(models["t2v"], "cpu")
    positive, negative = encoder.text(["two balls", "the cat"])
    solver = UniPC(3, 3.0)
    x = torch.randn(16, 2, 8, 4, generator=torch.Generator().manual_seed(7))[None]
    with torch.no_grad():
        for i, t in enumerate(solver.timesteps):
            v, v_negative = (model(x, t[None].float(), [text]) for text in (positive, negative))
            x = solver.step(v_negative + 2.0 * (v - v_negative), i, x)
        video = to_uint8(encoder.video_encoder.decode(x)[0])
    assert torch.equal(seen.latents[0], x) and x.dtype == torch.float32
    (path, pixels, fps), = written
    assert torch.equal(pixels, video) and (path, fps) == (tmp_path / ".a.mp4.new", 8)


def test_guidance_one_does_not_evaluate_the_negative_prompt(models, tmp_path, seen):
    positive, negative = Encoder(models["t2v"], "cpu").text([*SAMPLING["prompt"], NEGATIVE_PROMPT])
    run(models["t2v"], tmp_path / "a.mp4", "--guidance", 1)
    assert [torch.equal(call.text, positive) for call in seen.calls] == [True] * 3
    seen.calls.clear()
    run(models["t2v"], tmp_path / "a.mp4")
    assert [torch.equal(call.text, positive) for call in seen.calls] == [True, False] * 3
    assert [torch.equal(call.text, negative) for call in seen.calls] == [False, True] * 3
    assert not torch.equal(*seen.latents)


def test_another_transformer_is_used_with_the_models_encoders(models, tmp_path, seen):
    trained = transformer(tmp_path / "trained", seed=1, model_type="t2v", in_dim=16)
    run(models["t2v"], tmp_path / "a.mp4")
    run(models["t2v"], tmp_path / "b.mp4", "--transformer", trained)
    run(models["t2v"], tmp_path / "c.mp4", "--transformer", models["t2v"])
    base, other, same = seen.latents
    assert torch.equal(base, same) and not torch.allclose(base, other, atol=0.1)


def test_a_lora_is_sampled_with_as_if_it_had_been_merged(models, tmp_path, seen):
    path = write_lora(tmp_path / "a.safetensors", lora_pairs(["blocks.0.ffn.0", "head.head"], models["t2v"]))
    lora.main(["--merge", str(models["t2v"]), f"{path}=2", "--output", str(tmp_path / "merged")])
    run(models["t2v"], tmp_path / "a.mp4", "--lora", f"{path}=2")
    run(models["t2v"], tmp_path / "b.mp4", "--transformer", tmp_path / "merged")
    run(models["t2v"], tmp_path / "c.mp4", "--lora", path)
    beside, on, weaker = seen.latents
    assert torch.equal(beside, on) and not torch.allclose(beside, weaker, atol=1e-3)


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_the_solver_is_chosen(models, tmp_path, seen, solver):
    run(models["t2v"], tmp_path / "a.mp4", "--solver", solver, "--solver_steps", 2, "--shift", 4)
    expected = sample.SOLVERS[solver](2, 4.0).timesteps.tolist()
    assert [call.t for call in seen.calls[::2]] == pytest.approx(expected)
    run(models["t2v"], tmp_path / "a.mp4", "--solver_steps", 2, "--shift", 4)
    assert not torch.equal(*seen.latents)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_on_cuda_in_bf16(models, rewards, tmp_path, seen, kind):
    picture = photograph(tmp_path / "picture.png", 48, 32)
    images = [] if kind == "t2v" else ["--image", picture, "--last_image", picture]
    assert read_video(run(models[kind], tmp_path / "a.mp4", *images), fps=8).shape == (5, 32, 48, 3)
    assert seen.latents[0].is_cuda and seen.latents[0].dtype == torch.float32
    reward = rewards["t2v" if kind == "t2v" else "i2v_clip"]
    choice = ["--best_of", 2, "--drop_at", 1, "--keep", 2, "--reward", reward]
    run(models[kind], tmp_path / "b.mp4", *images, *choice)
    assert seen.latents[1].isfinite().all()


# ------------------------------------------------------------------------------ the numbers

def test_numbers_come_from_the_command_then_sampling_json_then_the_published_ones(models, tmp_path):
    def numbers(directory, *flags):
        args = sample.parse_args(["--model", str(directory), *flags])
        sample.fill_in(args, sample.model_type_of(args))
        size = tuple(args.size)
        return [args.solver_steps, args.shift, args.guidance, size, args.frames, args.fps, args.prompt]

    own = [3, 3.0, 2.0, (48, 32), 5, 8, ["a red ball rolls left"]]
    assert numbers(models["t2v"]) == own
    assert numbers(models["t2v"], "--solver_steps", "9", "--prompt", "p") == [9, *own[1:6], ["p"]]
    given = "--solver_steps 1 --shift 2 --guidance 1 --size 16x32 --frames 9 --fps 24 --prompt p q".split()
    assert numbers(models["t2v"], *given) == [1, 2.0, 1.0, (16, 32), 9, 24.0, ["p", "q"]]
    images = ["--prompt", "p", "--image", "a.jpg", "--last_image", "b.jpg"]
    for kind, flags, published in [("t2v", images[:2], [50, 5.0, 5.0, (832, 480)]),
                                   ("i2v", images[:4], [40, 5.0, 5.0, (832, 480)]),
                                   ("flf2v", images, [50, 16.0, 5.0, (1280, 720)])]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert numbers(tmp_path, *flags) == [*published, 81, 16, ["p"]]
    (tmp_path / "sampling.json").write_text('{"solver_steps": 4}')
    assert numbers(tmp_path, *images)[:2] == [4, 16.0]
    (tmp_path / "sampling.json").write_text('{"steps": 4}')
    with pytest.raises(InputError, match="sampling.json: steps is 4; expected no such key"):
        numbers(tmp_path, *images)


# ------------------------------------------------------------------------------ images

def test_the_size_follows_the_photograph():
    def size(width, height, wanted):
        return sample.size_for(torch.empty(3, height, width), *wanted)

    for same in [(832, 480), (480, 832), (1280, 720), (720, 1280), (112, 144), (64, 64)]:
        assert size(*same, same) == same and size(10 * same[0], 10 * same[1], same) == same
    assert size(4000, 3000, (832, 480)) == (720, 544)  # exactly 729.7 x 547.3, the area of 832 x 480
    assert size(3000, 4000, (832, 480)) == (544, 720) == size(3000, 4000, (480, 832))


@pytest.mark.parametrize("kind", ["i2v", "i2v_clip"])
def test_image_to_video_is_given_the_photograph(models, tmp_path, seen, kind):
    picture = photograph(tmp_path / "picture.png", 60, 90)
    path = run(models[kind], tmp_path / "a.mp4", "--image", picture, "--size", "32x48")
    assert read_video(path, fps=8).shape == (5, 48, 32, 3)
    # Only the area counts.
    path = run(models[kind], tmp_path / "a.mp4", "--image", picture, "--size", "48x32")
    assert read_video(path, fps=8).shape == (5, 48, 32, 3)

    encoder, image = Encoder(models[kind], "cpu"), read_image(picture)[None]
    condition = seen.calls[0].condition
    video = torch.zeros(1, 3, 5, 48, 32)
    video[:, :, 0] = F.interpolate(image, (48, 32), mode="bicubic")
    y = condition["y"]
    assert torch.equal(y[:, 4:], encoder.video_encoder.encode(video))
    assert torch.equal(y[:, :4], torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(1, 4, 2, 6, 4))
    assert all(torch.equal(call.condition["y"], y) for call in seen.calls)  # with the negative prompt too
    if kind == "i2v":
        assert condition.keys() == {"y"}
    else:
        assert condition["clip_fea"].shape == (1, 257, 1280)
        assert torch.equal(condition["clip_fea"], encoder.image_encoder(image))
    negative, = encoder.text([("镜头晃动，" if kind == "i2v_clip" else "") + NEGATIVE_PROMPT])
    assert torch.equal(seen.calls[1].text, negative)


def test_first_and_last_frame_to_video(models, tmp_path, seen):
    first, last = photograph(tmp_path / "first.png", 48, 32), photograph(tmp_path / "last.png", 24, 48)
    path = run(models["flf2v"], tmp_path / "a.mp4", "--image", first, "--last_image", last)
    assert read_video(path, fps=8).shape == (5, 32, 48, 3)
    encoder, condition = Encoder(models["flf2v"], "cpu"), seen.calls[0].condition
    first, last = read_image(first)[None], read_image(last)[None]
    video = torch.zeros(1, 3, 5, 32, 48)
    video[:, :, 0], video[:, :, -1] = first, F.interpolate(last, (32, 48), mode="bicubic")
    assert torch.equal(condition["y"][:, 4:], encoder.video_encoder.encode(video))
    assert condition["y"][0, :4, :, 3, 5].tolist() == [[1, 0], [1, 0], [1, 0], [1, 1]]
    expected = torch.cat([encoder.image_encoder(image) for image in (first, last)])
    assert torch.equal(condition["clip_fea"], expected)


# ------------------------------------------------------------------------------ the best of several

def test_the_seed_with_the_best_reward_is_kept(models, rewards, tmp_path, seen, capsys):
    prompts, noise = ["two balls", "the cat sat"], parallel.noise((1, 16, 2, 4, 6), "best_of")
    pavrm, expected = PAVRM.from_pretrained(rewards["t2v"]), []
    for n, text in enumerate(Encoder(models["t2v"], "cpu").text(prompts)):
        found = {}
        for seed in range(5 + 3 * n, 8 + 3 * n):
            run(models["t2v"], tmp_path / "alone.mp4", "--prompt", prompts[n], "--seed", seed)
            logits = process_logits(pavrm, seen.latents[-1], text, {}, noise, [201, 400, 600, 800])
            found[seed] = (logits.sigmoid() @ torch.tensor([0.3, 0.7])).mean().item(), seen.latents[-1]
        expected.append(found)
    seen.latents.clear(), seen.calls.clear(), capsys.readouterr()
    run(models["t2v"], tmp_path / "a.mp4", "--prompt", *prompts, "--seed", 5, "--best_of", 3,
        "--reward", rewards["t2v"], "--labels", "text_alignment=0.7", "motion_quality=0.3")
    lines = []
    for n, found in enumerate(expected):
        best = max(found, key=lambda seed: found[seed][0])
        lines += [f"  seed {seed}: reward {value:.3f} finished{', kept' if seed == best else ''}"
                  for seed, (value, _) in found.items()]
        lines += [f"{tmp_path}/a-{n}.mp4: 5 frames of 48x32, seed {best}, {prompts[n]!r}"]
        assert torch.allclose(seen.latents[n], found[best][1], atol=1e-4)
    assert capsys.readouterr().out.splitlines() == lines and len(seen.latents) == 2
    values = {f"{value:.3f}" for found in expected for value, _ in found.values()}
    assert len(values) > 3  # there was something to choose


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_dropping_saves_evaluations_and_changes_nothing_for_those_kept(
        models, rewards, tmp_path, seen, monkeypatch, capsys, solver):
    """A process reward that prefers one seed keeps it, with the same latents; one that shuns it drops it."""
    flags = ["--solver_steps", 4, "--guidance", 1, "--solver", solver]
    flags += ["--best_of", 4, "--reward", rewards["t2v"]]
    run(models["t2v"], tmp_path / "a.mp4", *flags)
    best, = [line for line in capsys.readouterr().out.splitlines() if line.endswith("kept")]
    x, noisy, forward, sign = seen.latents[0], {}, PAVRM.forward, 1
    drop_at = sample.SOLVERS[solver](4, 3.0).timesteps[1].item()

    def judge(self, x, t, context, **more):
        if t.item() != drop_at:
            return forward(self, x, t, context, **more)
        assert more["labels"] == ["motion_quality"] and len(context) == 1
        noisy[len(noisy)] = x
        return torch.tensor([[sign * float(f"seed {(len(noisy) - 1) % 4}:" in best)]])

    monkeypatch.setattr(PAVRM, "forward", judge)
    seen.calls.clear()
    run(models["t2v"], tmp_path / "a.mp4", *flags, "--drop_at", 1)
    assert torch.allclose(seen.latents[1], x, atol=1e-4) and len(seen.calls) == 4 * 1 + 2 * 3
    assert "  2 of 4 seeds dropped: 6 of 16 solver steps saved, 38%" in capsys.readouterr().out.splitlines()
    start = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    text, = Encoder(models["t2v"], "cpu").text(SAMPLING["prompt"])
    model = WanModel.from_pretrained(models["t2v"])
    with torch.no_grad():
        step = sample.walk(lambda x, t: model(x, t, [text]), start, sample.SOLVERS[solver](4, 3.0), 0, 1)
    assert torch.allclose(noisy[1], step, atol=1e-4)  # the solver's latents are judged, without more noise

    sign = -1
    seen.calls.clear()
    run(models["t2v"], tmp_path / "a.mp4", *flags, "--drop_at", 1, "--keep", 3)
    assert not torch.allclose(seen.latents[2], x, atol=0.1) and len(seen.calls) == 4 * 1 + 3 * 3
    assert best not in capsys.readouterr().out


def test_the_reward_model_is_given_the_image(models, rewards, tmp_path, seen, monkeypatch):
    picture, forward, given = photograph(tmp_path / "picture.png", 48, 32), PAVRM.forward, []

    def judge(self, x, t, context, **condition):
        given.append((t.item(), context[0], condition))
        return forward(self, x, t, context, **condition)

    monkeypatch.setattr(PAVRM, "forward", judge)
    choice = ["--best_of", 2, "--drop_at", 2, "--keep", 1, "--reward", rewards["i2v_clip"]]
    run(models["i2v_clip"], tmp_path / "a.mp4", "--image", picture, *choice)
    assert [t for t, *_ in given] == [UniPC(3, 3.0).timesteps[2]] * 2 + [201, 400, 600, 800]
    for _, text, condition in given:
        assert torch.equal(text, seen.calls[0].text)
        assert all(torch.equal(condition[name], seen.calls[0].condition[name]) for name in ("y", "clip_fea"))


# ------------------------------------------------------------------------------ memory

def test_models_leave_memory_when_they_are_done(models, rewards, tmp_path, monkeypatch):
    """The encoders before the transformer is loaded; all but the VAE before the last video is decoded."""
    made, alive = {}, []

    def watch(cls):
        load = cls.from_pretrained

        def watched(*args, **kwargs):
            alive.append((cls.__name__, [name for name, reference in made.items() if reference()]))
            model = load(*args, **kwargs)
            made[cls.__name__] = weakref.ref(model)
            return model

        monkeypatch.setattr(cls, "from_pretrained", watched)

    for cls in (UMT5Encoder, CLIPVisionModel, WanModel, PAVRM):
        watch(cls)
    decode = WanVAE.decode

    def watched_decode(self, x):
        alive.append(("decode", [name for name, reference in made.items() if reference()]))
        return decode(self, x)

    monkeypatch.setattr(WanVAE, "decode", watched_decode)
    picture = photograph(tmp_path / "picture.png", 48, 32)
    flags = ["--image", picture, "--prompt", "two balls", "the cat sat"]
    gc.disable()  # so that reference counts alone decide
    try:
        run(models["i2v_clip"], tmp_path / "a.mp4", *flags, "--best_of", 2, "--reward", rewards["i2v_clip"])
    finally:
        gc.enable()
    assert alive == [("UMT5Encoder", []), ("CLIPVisionModel", []), ("WanModel", []), ("PAVRM", ["WanModel"]),
                     ("decode", ["WanModel", "PAVRM"]), ("decode", [])]


def test_models_leave_the_device_while_a_video_is_decoded(models, rewards, tmp_path, monkeypatch):
    """The VAE needs their memory, for every video; each is written before the next one is sampled. A CPU with
    a number stands for the GPU."""
    device, events = torch.device("cpu:0"), []
    to, decode = torch.nn.Module.to, WanVAE.decode

    def watched_to(self, target):
        if not isinstance(target, torch.dtype):
            events.append((type(self).__name__, str(target)))
        return to(self, target)

    def watched_decode(self, x):
        events.append(f"decode, {len(list(tmp_path.glob('*.mp4')))} are written")
        return decode(self, x)

    monkeypatch.setattr(gpu, "start", lambda: device)
    monkeypatch.setattr(torch.nn.Module, "to", watched_to)
    monkeypatch.setattr(WanVAE, "decode", watched_decode)
    prompts = ["--prompt", "two balls", "the cat sat", "a red ball"]
    run(models["t2v"], tmp_path / "a.mp4", *prompts, "--best_of", 1, "--reward", rewards["t2v"])
    back, away = ([(name, place) for name in ("WanModel", "PAVRM")] for place in ("cpu:0", "cpu"))
    assert events == [*back, *away, "decode, 0 are written", *back, *away, "decode, 1 are written",
                      *back, "decode, 2 are written"]


# ------------------------------------------------------------------------------ directories

def test_a_directory_of_clips_to_label(models, tmp_path, seen, monkeypatch, capsys):
    """It can be read, labelled and encoded; an interrupted run continues, and no label is lost on the way."""
    folder, file = tmp_path / "clips", tmp_path / "prompts.txt"
    file.write_text("\ufeff\n two balls\r\n\n  \nthe cat sat", encoding="utf-8")
    flags = [models["t2v"], None, "--prompts", file, "--output", folder, "--count", 2, "--seed", 5]
    written = []

    def interrupted(path, video, fps):
        written.append(path.name)
        if len(written) == 2:  # somebody labels the first clip while the second one is made
            with label.Server(folder / "clips.json", "physics_quality", 0) as server:
                server.set_label(0, 0)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_video(path, video, fps)

    monkeypatch.setattr(sample, "write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert sorted(path.name for path in folder.iterdir()) == ["0-5.mp4", "0-6.mp4", "clips.json"]
    assert [entry["source_id"] for entry in read_list(folder / "clips.json")] == ["0-5", "0-6"]

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "0-6.mp4").unlink()
    before = (folder / "0-5.mp4").stat().st_mtime_ns
    run(*flags)
    entries = read_list(folder / "clips.json")
    assert [entry["source_id"] for entry in entries] == ["0-5", "0-6", "1-7", "1-8"]
    assert not any([*list_faults(entries), *[video_faults(entry, None, 8)[0] for entry in entries]])
    assert [(entry["pair_id"], entry["short_caption"], entry["long_caption"]) for entry in entries[1:3]] == [
        ("0", "two balls", "two balls"), ("1", "the cat sat", "the cat sat")]
    assert [entry["labels"]["physics_quality"] for entry in entries] == [0, None, None, None]
    assert (folder / "0-5.mp4").stat().st_mtime_ns == before
    run(models["t2v"], tmp_path / "alone.mp4", "--prompt", "the cat sat", "--seed", 8)
    assert near(read_video(tmp_path / "alone.mp4"), read_video(folder / "1-8.mp4"))
    with label.Server(folder / "clips.json", port=0) as server:
        assert len(server.clips()) == 4

    listed = json.loads((folder / "clips.json").read_text())
    del listed[0]["made_with"]["lora"]  # as it was before there was --lora
    (folder / "clips.json").write_text(json.dumps(listed))
    content = (folder / "clips.json").read_bytes()
    capsys.readouterr()
    run(*flags)
    assert capsys.readouterr().out == f"all videos are in {folder} already\n"
    message = "0-5.mp4 was made with other solver_steps and guidance; choose another --output or --seed"
    with pytest.raises(InputError, match=message):
        run(*flags, "--solver_steps", 2, "--guidance", 1)
    with pytest.raises(InputError, match="0-5.mp4 was made with other lora; choose"):
        run(*flags, "--lora", "a.safetensors")
    file.write_text("one ball\nthe cat sat")
    with pytest.raises(InputError, match="0-5.mp4 was made with other prompt"):
        run(*flags)
    assert (folder / "clips.json").read_bytes() == content
    (folder / "clips.json").write_text("{}")
    with pytest.raises(InputError, match="clips.json .* list of clips"):
        run(*flags)


def test_a_video_that_is_not_its_own_is_not_overwritten(models, tmp_path):
    (tmp_path / "0-0.mp4").write_bytes(b"precious")
    with pytest.raises(InputError, match="0-0.mp4 is there already, but not in clips.json; move it away"):
        run(models["t2v"], None, "--output", tmp_path)
    assert (tmp_path / "0-0.mp4").read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["0-0.mp4"]


# ------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize("file, name", [
    ("model/diffusion_pytorch_model.safetensors", "head.head.weight"),
    (f"model/{VAE_FILE}", "decoder.head.2.weight"),
    ("reward/pavrm.safetensors", "mlp.fc3.weight")])
def test_values_that_are_not_finite_are_not_written(models, rewards, tmp_path, file, name):
    """The weights are finite, and too large."""
    shutil.copytree(models["t2v"], tmp_path / "model")
    shutil.copytree(rewards["t2v"], tmp_path / "reward")
    load, save = (torch.load, torch.save) if file.endswith(".pth") else (load_file, save_file)
    state = load(tmp_path / file)
    state[name] = torch.full_like(state[name], 3e38)
    save(state, tmp_path / file)
    with pytest.raises(InputError, match="seed [56] of 'a red ball rolls left' became NaN or infinite, and"):
        run(tmp_path / "model", tmp_path / "out/a.mp4", "--seed", 5, "--reward", tmp_path / "reward",
            "--best_of", 2)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content, message", [
    ({"output": "/tmp/x"}, 'sampling.json: output is "/tmp/x"; expected no such key'),
    ({"image": "a.jpg"}, "sampling.json: image is"), ({"transformer": "/x"}, "sampling.json: transformer is"),
    ({"prompts": "/etc/passwd"}, "sampling.json: prompts is"), ({"seed": 3}, "sampling.json: seed is 3"),
    ({"prompt": "a ball"}, 'sampling.json: prompt is "a ball"; expected a list'),
    ({"size": [64]}, "sampling.json: size is a list; expected a list of 2"),
    ({"size": "64x64"}, 'sampling.json: size is "64x64"'), ({"frames": 8}, r"frames is 8; expected 1 \+ 4n"),
    ({"fps": "16"}, 'fps is "16"; expected a number'), ({"shift": float("nan")}, "shift is NaN; expected"),
    ({"guidance": float("inf")}, "guidance is Infinity"), ({"solver_steps": 10**9}, "solver_steps is 1000"),
    ([], "sampling.json: the content is a list; expected an object"),
])
def test_a_models_settings_choose_no_files(models, tmp_path, content, message):
    shutil.copytree(models["t2v"], tmp_path / "model", symlinks=True)
    (tmp_path / "model/sampling.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        run(tmp_path / "model", tmp_path / "a.mp4")
    with pytest.raises(InputError, match=message):
        Encoder(tmp_path / "model", "cpu")  # encoding reads them too
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind, flags, message", [
    ("nowhere", [], "nowhere/config.json does not exist"),
    ("ti2v", [], "Wan2.2 TI2V, whose VAE"),
    ("experts", [], "experts is Wan2.2 A14B, whose two transformers"),
    ("other", [], "does not describe a Wan model .model_type 'vace'"),
    ("bare", [], "the prompt is empty; give one with --prompt"),
    ("t2v", ["--prompt", "two balls", " "], "the prompt is empty"),
    ("t2v", ["--image", "picture.png"], "the t2v model t2v does not take --image"),
    ("i2v", ["--image", "picture.png", "--last_image", "picture.png"], "i2v does not take --last_image"),
    ("i2v", [], "the i2v model i2v needs --image"),
    ("flf2v", ["--image", "picture.png"], "the flf2v model flf2v needs --last_image"),
    ("i2v", ["--image", "gone.png"], "gone.png does not exist"),
    ("i2v", ["--image", "text.png"], "text.png is damaged"),
    ("i2v", ["--image", "thin.png"], "a video of 0x576 does not fit the model"),
    ("t2v", ["--size", "40x32"], "40x32 does not fit the model; give a --size in multiples of 16"),
    ("t2v", ["--size", "0x32"], "--size 0x32 is not a size"),
    ("t2v", ["--frames", "8"], "--frames 8 is not possible; give 1 . 4n"),
    ("t2v", ["--transformer", "nowhere"], "nowhere/config.json does not exist"),
    ("t2v", ["--transformer", "i2v"], "--transformer i2v is a i2v model, but t2v is a t2v model"),
    ("t2v", ["--prompts", "gone.txt"], "--prompts gone.txt cannot be read .*No such file"),
    ("t2v", ["--prompts", "blank.txt"], "the prompt is empty; .* --prompts"),
    ("t2v", ["--best_of", "2"], "demo/reward holds no reward model"),
    ("t2v", ["--best_of", "2", "--reward", "reward_i2v_clip"], "reward_i2v_clip has in_dim 36"),
    ("i2v", ["--best_of", "2", "--reward", "reward_i2v_clip", "--image", "picture.png"],
     "reward_i2v_clip has use_clip True"),
    ("t2v", ["--best_of", "2", "--reward", "reward_t2v", "--labels", "beauty"], "--labels beauty: .* text"),
    ("t2v", ["--labels", "text_alignment"], "--labels does nothing without --best_of"),
    ("t2v", ["--drop_at", "1"], "--drop_at does nothing without --best_of"),
    ("t2v", ["--best_of", "4", "--keep", "2"], "--keep does nothing without --drop_at"),
    ("t2v", ["--best_of", "4", "--drop_at", "3"], "--drop_at 3 is not within .*; give 1 to 2"),
    ("t2v", ["--best_of", "4", "--drop_at", "1", "--keep", "5"], "--keep 5 of 4 seeds is impossible"),
    ("t2v", ["--count", "4"], "--count does nothing without --output"),
    ("t2v", ["--output", "f", "--best_of", "4"], "--output keeps the video of every seed"),
    ("t2v", ["--output", "text.png"], "text.png cannot be written to .File exists"),
    ("t2v", ["--save_file", "text.png/new/a.mp4"], "text.png/new cannot be written to .Not a directory"),
    ("t2v", ["--save_file", "bare"], "bare is a directory; give a file name, such as bare/sample.mp4"),
])
def test_what_cannot_be_sampled_is_refused_in_one_sentence(
        models, rewards, tmp_path, monkeypatch, kind, flags, message):
    for name, directory in models.items():
        (tmp_path / name).symlink_to(directory)
    for name, directory in rewards.items():
        (tmp_path / f"reward_{name}").symlink_to(directory)
    for name, model_type in [("ti2v", "ti2v"), ("other", "vace"), ("bare", "t2v")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "experts/low_noise_model").mkdir(parents=True)
    photograph(tmp_path / "picture.png", 60, 90)
    photograph(tmp_path / "thin.png", 4, 900)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "blank.txt").write_text("\n  \n")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        run(kind, "out/a.mp4", *flags)
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")
    assert set(tmp_path.rglob("*")) == before


def test_the_command_ends_in_one_line_and_an_exit_code(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", "nowhere"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere/config.json does not exist; check the path\n"
