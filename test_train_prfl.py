"""PRFL: every option of the training does what it says, against the official values and computations by hand.

Faults of the published code, and the tests that would notice them here:

    fault                                               noticed by (here, where no file is named)
    --------------------------------------------------  ----------------------------------------------------
    Heads start differently on each process, or are     test_parallel.py: test_one_process_or_two_*
    trained apart from each other.
    The blocks' gradients are smaller than the heads',  the same, since the norm is of both;
    by the number of processes.                         test_train_pavrm.py: test_pavrm_gradients_by_hand
    Batches above 1 fail, and so do runs without a      test_train_pavrm.py: test_pavrm_gradients_by_hand
    launcher.
    The sigmoid before the cross-entropy is taken in    test_reward.py: test_the_gradient_lives_at_a_large_*
    bf16.
    The heads' gradients are never clipped.             test_train_pavrm.py: test_blocks_and_heads_are_*
    A missing label counts as 0.                        test_train_pavrm.py: test_a_missing_label_*
    Bradley-Terry takes a random clip as the loser,     test_train_pavrm.py: test_bradley_terry_*
    and is evaluated by cross-entropy.
    An unreadable clip is replaced by another one.      test_clips.py: test_a_clip_that_breaks_during_*;
                                                        test_missing_latents_are_found_before_training
    All epochs have the same order.                     test_clips.py: test_every_epoch_has_another_order
    The reward model collects gradients.                test_the_reward_model_is_frozen
    Training goes on against a random head.             test_a_reward_model_without_its_head_is_refused
    The two phases share one accumulation of            test_each_phase_has_its_own_update;
    gradients.                                          test_parallel.py: test_the_learning_rate_in_the_log
    The latents of a rollout are bf16.                  test_the_rollout_stays_float32
    A run cannot be resumed.                            test_records.py: test_resume_is_exact
    Text to video needs CLIP.                           test_text_to_video_needs_no_clip
    Every rollout step waits for the other processes.   test_a_rollout_step_waits_for_nothing
"""
import gc
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import files
import records
import train_pavrm
import train_prfl
from files import InputError
from model import WanModel
from reward import PAVRM, reward_loss
from solver import SOLVERS, DPMSolverPP, Euler, TrainingSchedule, UniPC, add_noise, walk
from testdata.golden import agree, draw, fill_
from testdata.helpers import (
    SEVERAL,
    SHAPE,
    Calls,
    batch,
    fill_pavrm,
    golden,
    golden_inputs,
    gradients_agree,
    gradients_of,
    latents,
    long_texts,
    noises,
    run,
    steps,
    tiny,
    watched,
    weights_of,
    write_index,
)

STILL = ["--lr", "0", "--long_caption", "1", "--drop_prompt", "0"]  # what is saved is what was computed with


def judge_and_policy():
    """The world's reward model and policy."""
    return fill_pavrm(tiny().config, 2, 3, 4).requires_grad_(False), tiny()


def told(model, texts):
    """The function (x, t) of a model that knows its texts."""
    return lambda x, t: model(x, t, texts)


def rollout(policy, pavrm, k, noise, texts, solver=UniPC, gradient_steps=1, judge="next", guidance=1.0,
            start=None):
    """By hand: (logits (B, labels), distance to the start) after step k; the last steps have a gradient."""
    solver, x, distances = solver(6, 5.0), noise, []

    def velocity(model, x, t):
        v = model(x, t, texts)
        negative = [draw((2, 8), 1).bfloat16()] * len(x)
        return v if guidance == 1 else guidance * v - (guidance - 1) * model(x, t, negative)

    for i in range(k + 1):
        t = torch.full((len(x),), float(solver.timesteps[i]))
        with torch.set_grad_enabled(i > k - gradient_steps):
            v = velocity(policy, x, t)
            if start and torch.is_grad_enabled():
                distances.append((v - velocity(start, x.detach(), t).detach()).square().mean())
            clean = x - solver.sigmas[i] * v
            x = solver.step(v, i, x)
    t_next = float(solver.timesteps[k + 1])
    if judge == "clean":
        x, t_next = clean, 0.0
    logits = pavrm(x, torch.full((len(x),), t_next), texts, labels=pavrm.labels)
    return logits, sum(distances) / max(len(distances), 1)


# ------------------------------------------------------------------------------ the method

@pytest.mark.parametrize("k", [0, 3, 11])
def test_official_prfl_values(k):
    values, meta = golden("prfl_t2v")
    inputs, config, seed = golden_inputs({**meta, "t": "[0]", "clip_n": "0"})
    policy = WanModel(config)
    fill_(policy.state_dict(), seed)
    pavrm = fill_pavrm(config, int(meta["k"]), seed + 100, seed + 107).requires_grad_(False)
    solver = UniPC(int(meta["steps"]), float(meta["shift"]))
    velocity, judge = told(policy, inputs["context"]), told(pavrm, inputs["context"])
    x_next, logit, _ = train_prfl.rewarded_step(velocity, judge, solver, inputs["x"], k)
    loss = reward_loss(logit)
    loss.backward()
    assert agree(x_next, values[f"{k}.x_next"], 1e-5)
    assert agree(logit.sigmoid(), values[f"{k}.reward"], 1e-5)
    assert agree(loss.view(1), values[f"{k}.loss"], 1e-5)
    for name in ("blocks.0.self_attn.q.weight", "head.head.weight"):
        assert agree(policy.get_parameter(name).grad, values[f"{k}.grad.{name}"], 1e-4)
    assert all(parameter.grad is None for parameter in pavrm.parameters())


def test_sft_learns_the_velocity():
    """The flow-matching loss of the true velocity is zero; of a zero velocity it is the target's square."""
    x0, noise = draw((2, *SHAPE), 1), draw((2, *SHAPE), 2)
    sigma, t = torch.tensor([0.3, 0.9]), torch.tensor([300.0, 900.0])
    assert train_prfl.sft_loss(lambda x, t: noise - x0, x0, noise, sigma, t).item() == 0
    seen = []
    loss = train_prfl.sft_loss(lambda x, t: seen.append(x) or torch.zeros_like(x), x0, noise, sigma, t)
    assert loss.item() == pytest.approx((noise - x0).square().mean().item())
    assert torch.allclose(seen[0][1], 0.1 * x0[1] + 0.9 * noise[1])


def test_prfl_raises_the_reward(quick):
    """Of the same noise, at the same k, scored before and after."""
    log = run(train_prfl, "run", "--steps", "12", "--phases", "reward")
    ks = [k for line in log for k in line["k"]]
    assert min(ks) == 0 and max(ks) == 4 and len(ks) == 24  # of six solver steps, the last is never rewarded
    pavrm, scores = PAVRM.from_pretrained("reward"), []
    for policy in (tiny(), WanModel.from_pretrained("run/model")):
        with torch.no_grad():
            logits, _ = rollout(policy, pavrm, 2, draw((8, *SHAPE), 5), [draw((5, 8), 30)] * 8)
        scores.append(logits.sigmoid().mean().item())
    assert scores[1] > scores[0] + 0.01


def test_the_reward_model_is_frozen(quick, monkeypatch):
    """Its parameters ask for no gradient and get none, while the policy's do."""
    before = PAVRM.from_pretrained("reward").state_dict()
    _, (policy, pavrm), _ = watched(monkeypatch, train_prfl, "run", "--steps", "2")
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in pavrm.parameters())
    assert all(parameter.grad is not None for parameter in policy.parameters())
    for name, parameter in pavrm.named_parameters():
        assert torch.equal(before[name], parameter.full_tensor()), name


# ------------------------------------------------------------------------------ the reward's gradient

FORMS = {"hinge": lambda logit: 2 - logit.sigmoid(), "log_sigmoid": lambda logit: -logit.sigmoid().log(),
         "logit": lambda logit: -logit}


@pytest.mark.parametrize("flags, changes", [
    ([], {}),
    (["--k", "late"], {}),
    (["--reward_form", "log_sigmoid", "--reward_weight", "2"], dict(form="log_sigmoid", weight=2.0)),
    (["--reward_form", "logit"], dict(form="logit")),
    (["--judge", "clean"], dict(judge="clean")),
    (["--solver", "euler"], dict(solver=Euler)),
    (["--solver", "dpm++", "--gradient_steps", "2", "--judge", "clean"],
     dict(solver=DPMSolverPP, gradient_steps=2, judge="clean")),
    (["--gradient_steps", "2"], dict(gradient_steps=2)),
    (["--gradient_steps", "9", "--k", "3"], dict(gradient_steps=9)),
    (["--rollout_guidance", "3"], dict(guidance=3.0)),
])
def test_prfl_gradients_by_hand(quick, monkeypatch, flags, changes):
    """Every form of the reward phase: the mean over micro-steps, each with its own k, noise and clips."""
    changes = {"form": "hinge", "weight": 0.1, **changes}
    form, weight = FORMS[changes.pop("form")], changes.pop("weight")
    flags = ["--steps", "1", "--phases", "reward", *STILL, *flags]
    (line,), _, (gradients,) = watched(monkeypatch, train_prfl, "run", *flags)
    pavrm, policy = judge_and_policy()
    losses, rewards = [], []
    for micro_step, k in enumerate(line["k"]):
        noise, texts = noises(micro_step, "reward"), long_texts(batch(micro_step))
        logit, _ = rollout(policy, pavrm, k, noise, texts, **changes)
        losses.append(weight * form(logit).mean())
        rewards.append(logit.sigmoid().mean().item())
    assert len(losses) == 2
    assert line["reward_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert line["reward"] == pytest.approx(sum(rewards) / 2, rel=1e-5)
    assert gradients_agree(gradients, gradients_of(policy, sum(losses) / 2), 1e-3)


def test_two_gradient_steps_are_not_one():
    """The gradient passes through both steps' velocities and no further, whatever the solver remembers."""
    pavrm, policy = judge_and_policy()
    noise, texts, found, with_gradient = draw((2, *SHAPE), 0), long_texts([0, 1]), [], []

    def velocity(x, t):
        with_gradient.append(torch.is_grad_enabled())
        return policy(x, t, texts)

    for gradient_steps in (1, 2, 4):
        with_gradient.clear()
        _, logits, _ = train_prfl.rewarded_step(velocity, told(pavrm, texts), UniPC(6, 5.0), noise, 3,
                                                gradient_steps)
        found.append(gradients_of(policy, logits.sum()))
        assert with_gradient == [False] * (4 - gradient_steps) + [True] * gradient_steps
    assert not gradients_agree(found[0], found[1], 0.05)
    assert not gradients_agree(found[1], found[2], 0.05)


@pytest.mark.parametrize("name", SOLVERS)
def test_rollouts_with_one_solver_know_nothing_of_each_other(name):
    """Training makes one solver for all iterations; step 0 starts afresh, wherever a rollout has stopped."""
    pavrm, policy = judge_and_policy()
    noise, texts, calls = draw((1, *SHAPE), 0), long_texts([0]), []

    def velocity(x, t):
        calls.append(t)
        return policy(x, t, texts)

    def judge(x, t):
        return pavrm(x, t, texts, labels=pavrm.labels)

    solver = SOLVERS[name](6, 5.0)
    for k in (4, 0, 2):
        calls.clear()
        _, logits, _ = train_prfl.rewarded_step(velocity, judge, solver, noise, k)
        assert len(calls) == k + 1
        found = gradients_of(policy, logits.sum())
        expected, _ = rollout(policy, pavrm, k, noise, texts, solver=SOLVERS[name])
        assert torch.allclose(logits, expected, atol=1e-5)
        assert gradients_agree(found, gradients_of(policy, expected.sum()), 1e-3)


def test_labels_are_weighted(several_labels, monkeypatch):
    """The loss is the weighted sum of each label's; so is the reward."""
    torch.manual_seed(0)
    PAVRM(tiny(3), 2, SEVERAL[1:]).save_pretrained("several")
    flags = ["--reward", "several", "--labels", "blur_quality=0.3", "physics_quality=0.5", "--steps", "1"]
    (line,), _, (gradients,) = watched(monkeypatch, train_prfl, "run", *flags, "--phases", "reward", *STILL)
    pavrm, policy = PAVRM.from_pretrained("several").requires_grad_(False), tiny()
    losses, rewards = [], []
    for micro_step, k in enumerate(line["k"]):
        logits, _ = rollout(policy, pavrm, k, noises(micro_step, "reward"), long_texts(batch(micro_step)))
        physics, _, blur = logits.sigmoid().mean(0)
        losses.append(0.1 * (0.3 * (2 - blur) + 0.5 * (2 - physics)))
        rewards.append((0.3 * blur + 0.5 * physics).item())
    assert line["reward"] == pytest.approx(sum(rewards) / 2, rel=1e-5)
    assert line["reward_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert gradients_agree(gradients, gradients_of(policy, sum(losses) / 2), 1e-3)
    with pytest.raises(InputError, match="--labels motion_quality: .* physics_quality, text_align"):
        run(train_prfl, "other", "--reward", "several", "--labels", "motion_quality")


@pytest.mark.parametrize("words, ks", [
    (["all"], range(39)), (["early"], range(13)), (["middle"], range(13, 26)), (["late"], range(26, 39)),
    (["0"], [0]), (["38", "5", "5"], [5, 38])])
def test_steps_that_may_be_rewarded(words, ks):
    assert train_prfl.rewardable(words, 40) == list(ks)


@pytest.mark.parametrize("words, steps, message", [
    (["soon"], 40, "--k soon names no steps; give all, early, middle, late, or numbers"),
    (["all", "early"], 40, "names no steps"),
    (["-1"], 40, "names no steps"),
    (["1.5"], 40, "names no steps"),
    (["²"], 40, "names no steps"),
    (["9" * 5000], 40, "names no steps"),
    (["39"], 40, "--k 39 does not fit 40 solver steps; k is 0 to 38")])
def test_steps_that_cannot_be_rewarded(words, steps, message):
    with pytest.raises(InputError, match=message):
        train_prfl.rewardable(words, steps)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 12, 41])
def test_the_thirds_make_the_whole(steps):
    thirds = []
    for third in ("early", "middle", "late"):
        try:
            thirds += train_prfl.rewardable([third], steps)
        except InputError:  # there are fewer steps than thirds
            assert steps < 4
    assert thirds == train_prfl.rewardable(["all"], steps) == list(range(steps - 1))


# ------------------------------------------------------------------------------ rollouts

def test_the_rollout_stays_float32():
    """Between the steps of a bf16 policy and before its judge, latents keep what bf16 would round off."""
    pavrm, policy = judge_and_policy()
    policy.bfloat16()
    pavrm.dit.bfloat16()
    texts, seen = long_texts([0]), []

    def velocity(x, t):
        seen.append(x)
        return policy(x, t, texts)

    def judge(x, t):
        seen.append(x)
        return pavrm(x, t, texts)

    x_next, logits, _ = train_prfl.rewarded_step(velocity, judge, UniPC(6, 5.0), draw((1, *SHAPE), 0), 3)
    assert len(seen) == 5 and logits.dtype == torch.float32
    for x in [*seen, x_next]:
        assert x.dtype == torch.float32 and (x != x.bfloat16().float()).float().mean() > 0.9


def test_the_rollout_waits_for_nothing():
    """No value is read back from the device, so that the CPU runs ahead of it."""
    pavrm, policy = judge_and_policy()
    texts, noise, solver = long_texts([0]), draw((1, *SHAPE), 5), UniPC(6, 5.0)
    solver.timesteps = solver.timesteps.tolist()  # on the CPU, wherever the models are: reading it is free
    with Calls("_local_scalar_dense") as counted:
        _, logit, _ = train_prfl.rewarded_step(told(policy, texts), told(pavrm, texts), solver, noise, 3)
        assert counted.all == 0
        logit.item()
    assert counted.all == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_rollout_waits_for_nothing_on_cuda():
    policy = tiny().cuda()
    texts, x = [draw((5, 8), 30).cuda()], draw((1, *SHAPE), 5).cuda()
    with torch.no_grad():
        policy(x, torch.full((1,), 500.0, device="cuda"), texts)  # makes the rotary table
        torch.cuda.set_sync_debug_mode("error")
        try:
            walk(lambda x, t: policy(x, t, texts), x, UniPC(6, 5.0), 0, 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_rollout_step_waits_for_nothing(quick, monkeypatch):
    """No anomaly detection; nothing is collected, emptied or synchronised more often in a longer rollout."""
    calls, anomaly, counts, loss = [], [], [], train_prfl.ProcessReward.loss

    def count(place, name, original):
        monkeypatch.setattr(place, name, lambda *a, **b: calls.append(name) or original(*a, **b))

    def watched_loss(self, scores):
        anomaly.append(torch.is_anomaly_enabled())
        return loss(self, scores)

    for name in ("barrier", "all_reduce"):
        count(dist, name, getattr(dist, name))
    for place, name in [(gc, "collect"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")]:
        count(place, name, lambda *_: None)
    monkeypatch.setattr(train_prfl.ProcessReward, "loss", watched_loss)
    for solver_steps, k in [("3", "1"), ("9", "7")]:
        calls.clear()
        run(train_prfl, f"run{k}", "--steps", "1", "--solver_steps", solver_steps, "--k", k)
        counts.append({name: calls.count(name) for name in calls})
    assert counts[0] == counts[1] and set(counts[0]) == {"barrier", "all_reduce"} and anomaly == [False] * 4


# ------------------------------------------------------------------------------ phases, adapters, start

def test_each_phase_has_its_own_update(quick, monkeypatch):
    """Two phases are two optimizer steps, and the reward's gradient has nothing of the SFT phase in it."""
    updates, step = [], torch.optim.AdamW.step

    def spy(self, *rest):
        updates.append(self)
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    both = run(train_prfl, "both", "--steps", "1", "--lr", "0")
    assert {int(state["step"]) for state in updates[-1].state.values()} == {2}
    for phase in ("sft", "reward"):
        alone = run(train_prfl, phase, "--steps", "1", "--lr", "0", "--phases", phase)
        for name in (f"{phase}_loss", f"{phase}_norm"):
            assert both[0][name] == alone[0][name], name


@pytest.mark.parametrize("phase", ["sft", "rwr"])
def test_sft_and_rwr_by_hand(quick, monkeypatch, phase):
    """rwr weights each clip's loss by exp((reward - 1) / temperature) of the noisy clip, without gradient."""
    flags = ["--steps", "1", "--phases", phase, "--rwr_temperature", "0.2", "--timesteps", "400", *STILL]
    (line,), models, (gradients,) = watched(monkeypatch, train_prfl, "run", *flags)
    assert len(models) == 1 + (phase == "rwr")
    assert set(line) >= {f"{phase}_loss", f"{phase}_norm"} and "reward" not in line
    pavrm, policy = judge_and_policy()
    sigma, losses = TrainingSchedule().near(400), []
    for micro_step in range(2):
        clips, noise = batch(micro_step), noises(micro_step, "sft")
        x0, t, texts = latents(clips), torch.full((2,), 400.0), long_texts(clips)
        x = add_noise(x0, noise, sigma)
        weight = torch.ones(2)
        if phase == "rwr":
            weight = ((pavrm(x, t, texts).sigmoid() - 1) / 0.2).exp()
        errors = (policy(x, t, texts) - (noise - x0)).square().flatten(1).mean(1)
        losses += list(weight * errors)
    assert line[f"{phase}_loss"] == pytest.approx(sum(losses).item() / 4, rel=1e-5)
    assert gradients_agree(gradients, gradients_of(policy, sum(losses) / 4))


def test_micro_steps_go_on_from_step_to_step(quick, monkeypatch):
    """A step's loss is the mean of its micro-steps', and no two micro-steps of a run draw the same."""
    losses, rewards, seen = [], [], []

    def spy(place, name, values):
        original = getattr(place, name)

        def spied(*inputs):
            values.append(original(*inputs))
            return values[-1]

        monkeypatch.setattr(place, name, spied)

    spy(train_prfl, "sft_loss", losses)
    spy(train_prfl.ProcessReward, "loss", rewards)
    spy(TrainingSchedule, "draw", seen)
    log = steps(run(train_prfl, "run", "--steps", "2", "--accumulation", "3", "--solver_steps", "2"))
    assert len(losses) == len(rewards) == 6 and len(set(seen)) == len(seen) == 12  # of two clips each
    for n, line in enumerate(log):
        for name, values in (("sft_loss", losses), ("reward_loss", rewards)):
            assert line[name] == pytest.approx(sum(values[3 * n:3 * n + 3]).item() / 3, rel=1e-5)


def test_timesteps_reach_the_policy(quick, monkeypatch):
    seen, forward = [], WanModel.forward

    def spy(self, x, t, *rest, **more):
        seen.extend(t.tolist())
        return forward(self, x, t, *rest, **more)

    monkeypatch.setattr(WanModel, "forward", spy)
    run(train_prfl, "run", "--steps", "3", "--timesteps", "250", "750", "--phases", "sft")
    assert set(seen) == {250.0, 750.0}
    with pytest.raises(InputError, match="--timesteps sometimes"):
        run(train_prfl, "other", "--timesteps", "sometimes")


def test_the_distance_to_the_start_by_hand():
    """The mean over clips and steps with gradient of |v - v_start|^2, at the same latents; v_start has no
    gradient."""
    pavrm, policy = judge_and_policy()
    other, noise, texts = tiny(9), draw((2, *SHAPE), 0), long_texts([0, 1])
    velocity, judge, start = told(policy, texts), told(pavrm, texts), told(other, texts)
    for gradient_steps in (1, 3):
        _, _, distance = train_prfl.rewarded_step(velocity, judge, UniPC(6, 5.0), noise, 3, gradient_steps,
                                                  start=start)
        _, expected = rollout(policy, pavrm, 3, noise, texts, gradient_steps=gradient_steps, start=other)
        assert distance.item() == pytest.approx(expected.item(), rel=1e-4) and distance > 0.01
        assert gradients_agree(gradients_of(policy, distance), gradients_of(policy, expected), 1e-3)
        assert all(parameter.grad is None for parameter in other.parameters())


@pytest.mark.parametrize("adapters", [[], ["--lora_rank", "4"]], ids=["copy", "adapters"])
def test_the_distance_to_the_start_in_training(quick, monkeypatch, adapters):
    """Zero at first, with adapters and with a frozen copy, and then not; it has a gradient of its own."""
    flags = ["--phases", "reward", "--reward_form", "logit", "--reward_weight", "10", "--solver_steps", "3",
             "--accumulation", "1", "--rollout_guidance", "2", *adapters]  # both velocities are guided
    with_kl = ["--steps", "3", "--kl_weight", "1", *flags]
    log, models, gradients = watched(monkeypatch, train_prfl, "run", *with_kl)
    free_log, _, free = watched(monkeypatch, train_prfl, "free", "--steps", "2", *flags)
    assert log[0]["kl"] == 0 < log[1]["kl"] < log[2]["kl"]
    assert log[0]["reward_loss"] == free_log[0]["reward_loss"]
    assert len(models) == (2 if adapters else 3)  # policy, frozen copy, reward model
    if not adapters:
        for (name, copy), start in zip(models[1].named_parameters(), tiny().parameters(), strict=True):
            assert not copy.requires_grad and copy.grad is None, name
            assert torch.equal(files.full_tensor(copy), start), name
    assert gradients_agree(gradients[0], free[0], 1e-6) and not gradients_agree(gradients[1], free[1], 1e-3)


def test_adapters_of_the_policy(quick, monkeypatch):
    """The base stays; the merged model, the base with the adapter's file, and what was trained are one."""
    flags = ["--lora_rank", "3", "--lora_alpha", "12", "--ema", "0.5"]
    log, models, gradients = watched(monkeypatch, train_prfl, "run", "--steps", "3", *flags)
    whole = run(train_prfl, "whole", "--steps", "1")
    assert log[0]["sft_loss"] == whole[0]["sft_loss"]
    assert all(".lora_" in name for name in gradients[0]) and len(gradients[0]) == 3 * 8 * 2
    assert all(gradient.any() for gradient in gradients[-1].values())
    start = tiny().state_dict()
    trained = {name: tensor.full_tensor() for name, tensor in models[0].state_dict().items()}
    assert all(torch.equal(tensor, start[name]) for name, tensor in trained.items() if ".lora_" not in name)

    for kind in ("", "_ema"):
        merged, adapter = weights_of(f"run/model{kind}"), weights_of(f"run/adapter{kind}.safetensors")
        assert merged.keys() == start.keys() and len(adapter) == 48
        for name, tensor in merged.items():
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            a, b = (adapter.get(f"{layer}.{part}.weight") for part in ("lora_A", "lora_B"))
            if a is None:
                assert torch.equal(tensor, start[name]), name
            else:
                assert torch.allclose(tensor, start[name] + b @ a, atol=1e-6), name
                assert not torch.equal(tensor, start[name]), name
    b, adapter = "blocks.2.cross_attn.o.lora_B.weight", weights_of("run/adapter.safetensors")
    assert torch.allclose(adapter[f"diffusion_model.{b}"], 4 * trained[b])  # alpha / rank
    q = "blocks.0.self_attn.q.weight"
    assert not torch.equal(weights_of("run/model")[q], weights_of("run/model_ema")[q])
    with pytest.raises(InputError, match="heads"):
        run(train_prfl, "other", "--lora_rank", "3", "--lora_targets", "heads")


# ------------------------------------------------------------------------------ conditions

def test_image_to_video_trains(quick):
    """Latents of the first frame and CLIP tokens reach the policy and the reward model."""
    shutil.rmtree("model")
    shutil.rmtree("reward")
    changes = dict(model_type="i2v", in_dim=36)
    tiny(**changes).save_pretrained("model")
    PAVRM(tiny(3, **changes), 2).save_pretrained("reward")
    for i in range(8):
        tensors = weights_of(f"clips/{i}.safetensors")
        tensors |= {"condition": draw(SHAPE, 50 + i), "clip": draw((257, 1280), 60 + i)}
        files.write_safetensors(f"clips/{i}.safetensors", tensors)
    assert len(run(train_prfl, "prfl", "--steps", "1")) == 1
    assert len(steps(run(train_pavrm, "pavrm", "--steps", "1"))) == 1


def test_text_to_video_needs_no_clip(quick):
    """Neither the clips nor the model hold anything of an image model."""
    for i in range(8):
        assert set(weights_of(f"clips/{i}.safetensors")) == {"latents", "text_short", "text_long"}
    assert not any("img" in name for name in weights_of("model"))
    assert steps(run(train_pavrm, "pavrm", "--steps", "1")) and run(train_prfl, "prfl", "--steps", "1")


# ------------------------------------------------------------------------------ a reward of one's own

BRIGHTNESS = '''
class Reward:
    """The mean of the latents, judged clean, squashed into (-1, 1)."""
    largest = 1.0
    timesteps = [0]

    def __init__(self, args, device):
        self.weight = args.reward_weight

    def scores(self, x, t, batch):
        assert len(batch.texts) == len(x)
        return x.flatten(1).mean(1, keepdim=True)

    def value(self, scores):
        return scores[:, 0].tanh()

    def loss(self, scores):
        return -self.weight * scores.mean()
'''


def test_a_reward_of_ones_own(quick, monkeypatch):
    """--reward FILE.py: training follows its loss, and its own value, without a sigmoid, is logged."""
    Path("brightness.py").write_text(BRIGHTNESS)
    flags = ["--reward", "brightness.py", "--reward_weight", "3", "--phases", "reward", "--judge", "clean"]
    (line,), models, (gradients,) = watched(monkeypatch, train_prfl, "run", "--steps", "1", *flags, *STILL)
    assert len(models) == 1  # there is no reward model to shard
    policy, losses, rewards = tiny(), [], []
    for micro_step, k in enumerate(line["k"]):
        inputs = noises(micro_step, "reward"), long_texts(batch(micro_step))
        clean, _ = rollout(policy, Echo(), k, *inputs, judge="clean")
        scores = clean.flatten(1).mean(1)
        losses.append(-3 * scores.mean())
        rewards.append(scores.tanh().mean().item())
    assert line["reward_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    assert line["reward"] == pytest.approx(sum(rewards) / 2, rel=1e-4)
    assert gradients_agree(gradients, gradients_of(policy, sum(losses) / 2), 1e-3)


class Echo:
    """In place of a reward model: returns the latents that it is given."""
    labels = None

    def __call__(self, x, t, texts, labels):
        return x


def test_a_reward_of_ones_own_that_is_not_there(world):
    with pytest.raises(InputError, match="nowhere.py"):
        run(train_prfl, "run", "--reward", "nowhere.py")
    Path("empty.py").write_text("reward = 1\n")
    with pytest.raises(InputError, match="empty.py has no scores, value, loss, largest, timesteps in a"):
        run(train_prfl, "run", "--reward", "empty.py")
    assert not Path("run").exists()


# ------------------------------------------------------------------------------ refusals

def test_prfl_needs_a_reward_model(world):
    with pytest.raises(InputError, match="nowhere holds no reward model"):
        run(train_prfl, "run", "--reward", "nowhere")
    fill_pavrm(tiny(text_dim=16).config, 2, 3, 4).save_pretrained("other")
    with pytest.raises(InputError, match="other has text_dim 16, and model has 8"):
        run(train_prfl, "run", "--reward", "other")
    with pytest.raises(InputError, match="config.json: pavrm is missing"):
        run(train_prfl, "run", "--reward", "model")
    assert not Path("run").exists()


def test_a_reward_model_without_its_head_is_refused(world):
    """Nothing trains against a random head."""
    tensors = {name: tensor for name, tensor in weights_of("reward").items() if not name.startswith("mlp.")}
    files.write_safetensors("reward/pavrm.safetensors", tensors)
    with pytest.raises(InputError, match="reward .*another model: mlp.fc1.weight is missing"):
        run(train_prfl, "run")
    shutil.rmtree("reward")
    with pytest.raises(InputError, match="reward holds no reward model"):
        run(train_prfl, "run")
    assert not Path("run").exists()


def test_a_phase_is_given_once(world):
    with pytest.raises(InputError, match="--phases sft sft"):
        run(train_prfl, "run", "--phases", "sft", "sft")


def test_poor_clips_are_skipped(quick, monkeypatch, capsys):
    """Clips 0, 2, 4 and 6 are annotated as poor; one without annotation is trained on."""
    quick[1]["labels"]["physics_quality"] = None
    write_index(quick)
    subsets, order = [], train_prfl.Order
    monkeypatch.setattr(train_prfl, "Order", lambda *a: subsets.append(list(a[3])) or order(*a))
    flags = ["--steps", "1", "--phases", "sft", "--accumulation", "1", "--skip_poor"]
    run(train_prfl, "run", *flags, "physics_quality")
    run(train_prfl, "all", *flags, "none")
    assert subsets == [[1, 3, 5, 7], list(range(8))]
    assert "on 4 clips, 4 poor ones left out" in capsys.readouterr().out


def test_nan_latents_stop_the_run(world):
    broken = draw(SHAPE, 0)
    broken[3, 1, 2, 2] = float("nan")
    texts = {"text_short": torch.zeros(2, 8), "text_long": torch.zeros(5, 8)}
    save_file({"latents": broken, **texts}, "clips/5.safetensors")
    with pytest.raises(InputError, match="clip 5: .*5.safetensors has NaN"):
        run(train_prfl, "run", "--steps", "8", "--phases", "sft")
    assert not records.checkpoints("run")
    again = run(train_prfl, "run", "--steps", "1", "--phases", "sft", "--seed", "1")  # may start again
    assert len(again) == 1


def test_missing_latents_are_found_before_training(world):
    Path("clips/6.safetensors").unlink()
    with pytest.raises(InputError, match="clip 6"):
        run(train_prfl, "run")
    assert not Path("run").exists()
