"""The solvers agree with the official ones at every step, differentiate, and solve the equation they
should."""
import pytest
import torch

from files import InputError
from solver import (
    SOLVERS,
    DPMSolverPP,
    Euler,
    TrainingSchedule,
    UniPC,
    add_noise,
    flow_matching_target,
    guided,
    timestep,
    walk,
)
from testdata.golden import agree, draw
from testdata.helpers import golden

VALUES, _ = golden("solver")


def velocity(x, t):
    return torch.tanh(x) * (0.5 + t.view(-1, *[1] * (x.ndim - 1)) / 2000) - 0.3 * x.roll(1, -1)


@pytest.mark.parametrize("key", ["unipc.8.5.0", "unipc.40.5.0", "unipc.25.3.0", "dpm++.20.5.0",
                                 "dpm++.8.12.0"])
def test_official_values(key):
    name, steps, shift = key.split(".", 2)
    solver = SOLVERS[name](int(steps), float(shift))
    assert torch.equal(solver.timesteps, VALUES[f"{key}.timesteps"].long())
    assert agree(solver.sigmas, VALUES[f"{key}.sigmas"], 1e-6)
    x = VALUES["x0"]
    for _ in range(2):  # the second walk starts afresh: no history is left over from the first
        for i in range(int(steps)):
            v = velocity(x, solver.timesteps[i].float().expand(len(x)))
            x = solver.step(v, i, x)
            assert agree(x, VALUES[f"{key}.x"][i], 1e-5), i
        x = VALUES["x0"]
    assert agree(walk(velocity, x, solver), VALUES[f"{key}.x"][-1], 1e-5)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0, 16.0])
def test_official_timesteps(name, shift):
    """What the model is told, for 1, 2, ... 60 steps: rounding decides some of them, I2V 480P's (40, 3) among
    them."""
    timesteps, _ = golden("timesteps")
    found = torch.cat([SOLVERS[name](steps, shift).timesteps for steps in range(1, 61)])
    assert torch.equal(found, timesteps[f"{name}.{shift}"].long())


class AdamsBashforth:
    """A solver as the head of solver.py describes one, with numbers as timesteps and a list that it changes
    in place."""

    def __init__(self, steps, shift):
        self.sigmas = [1 - n / steps for n in range(steps + 1)]
        self.timesteps = [1000 * sigma for sigma in self.sigmas[:-1]]

    def step(self, v, i, x):
        if i == 0:
            self.history = []
        self.history.append(v)
        if i > 0:
            v = 1.5 * self.history[-1] - 0.5 * self.history[-2]
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * v


def test_a_solver_from_the_description_alone():
    solver = AdamsBashforth(200, 1.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    expected = pytest.approx(2.718281828 ** -2, rel=1e-3)
    for _ in range(2):  # step 0 starts afresh
        assert walk(lambda x, t: 2 * x, x, solver).item() == expected
    assert timestep(solver, 50, x).tolist() == [750.0]
    half = walk(lambda x, t: 2 * x, x, solver, last=100)
    assert walk(lambda x, t: 2 * x, half, solver, first=100).item() == expected


def test_training_schedule():
    schedule = TrainingSchedule(5.0)
    assert agree(schedule.sigmas, VALUES["train.shift5.sigmas"], 1e-6)
    assert torch.equal(schedule.timesteps, VALUES["train.shift5.timesteps"].long())
    for t, sigma in [(201, 0.20134), (400, 0.40082), (600, 0.60031), (800, 0.80036), (1000, 1.0)]:
        assert abs(schedule.near(t) - sigma) < 1e-5
    assert schedule.draw(0.0) == (1.0, 1000) and schedule.draw(0.9999)[0] > 0
    assert schedule.near(0) == 0  # the clean clip


def draws(schedule, n=4000):
    """(sigma, timestep) for u evenly over [0, 1)."""
    return [schedule.draw((i + 0.5) / n) for i in range(n)]


def test_timesteps_are_drawn_uniformly_over_the_table():
    schedule = TrainingSchedule(5.0)
    assert sorted(t for _, t in draws(schedule)) == sorted(4 * schedule.timesteps.tolist())
    assert all(abs(1000 * sigma - t) < 1.001 for sigma, t in draws(schedule))
    flat = [sigma for sigma, _ in draws(TrainingSchedule(1.0))]  # without a shift, uniform
    assert sum(flat) / 4000 == pytest.approx(0.5, abs=0.002)
    assert sum(sigma < 0.25 for sigma in flat) / 4000 == pytest.approx(0.25, abs=0.002)
    assert sum(t for _, t in draws(schedule)) / 4000 > 700  # and with one, towards noise


def test_timesteps_are_drawn_by_a_logit_normal():
    """The place in the table is the sigmoid of a standard normal, whose median is the middle of the table."""
    schedule, plain = TrainingSchedule(5.0, ["logit_normal"]), TrainingSchedule(1.0, ["logit_normal"])
    levels = sorted(sigma for sigma, _ in draws(plain))
    assert levels[2000] == pytest.approx(0.5, abs=0.002)
    assert sum(levels) / 4000 == pytest.approx(0.5, abs=0.002)
    for deviations, below in [(-2, 0.02275), (-1, 0.15866), (1, 0.84134), (2, 0.97725)]:
        limit = 1 / (1 + 2.718281828 ** -deviations)
        assert sum(sigma < limit for sigma in levels) / 4000 == pytest.approx(below, abs=0.003)
    shifted_levels = sorted(sigma for sigma, _ in draws(schedule))
    assert shifted_levels[2000] == pytest.approx(5 * 0.5 / (1 + 4 * 0.5), abs=0.002)
    assert schedule.draw(0.0)[0] == pytest.approx(1, abs=1e-3) and schedule.draw(1 - 1e-16)[0] > 0


def test_timesteps_are_drawn_from_a_list():
    """Each equally often, with the table's sigma."""
    schedule = TrainingSchedule(5.0, ["201", "600", "1000"])
    found = draws(schedule, 3000)
    assert [[t for _, t in found].count(t) for t in (201, 600, 1000)] == [1000] * 3
    assert set(found) == {(schedule.near(t), t) for t in (201, 600, 1000)}
    assert abs(schedule.near(600) - 0.60031) < 1e-5


@pytest.mark.parametrize("words", [["often"], ["uniform", "500"], ["uniform", "logit_normal"]])
def test_draws_that_mean_nothing(words):
    with pytest.raises(InputError, match=f"--timesteps {' '.join(words)} is not possible; give uniform"):
        TrainingSchedule(5.0, words)


def test_euler_by_hand():
    solver = Euler(4, 5.0)
    assert solver.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    x, v = draw((2, 3), 0), draw((2, 3), 1)
    assert torch.allclose(solver.step(v, 1, x), x + (0.8333333 - 0.9375) * v)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_straight_path_is_solved_exactly(name):
    """With the true velocity of a straight path, noise - x0, every solver ends on x0 whatever its steps."""
    x0, noise = draw((1, 4, 2), 0), draw((1, 4, 2), 1)
    solver = SOLVERS[name](6, 5.0)
    sigma = float(solver.sigmas[0])
    end = walk(lambda x, t: flow_matching_target(x0, noise), add_noise(x0, noise, sigma), solver)
    assert torch.allclose(end, x0, atol=1e-5)


@pytest.mark.parametrize("solver", [UniPC(8, 5.0), DPMSolverPP(8, 5.0), Euler(8, 5.0)])
@pytest.mark.parametrize("k", [0, 1, 4, 6])
def test_a_step_is_differentiable_in_velocity_and_x(solver, k):
    with torch.no_grad():
        x = walk(lambda x, t: velocity(x.float(), t).double(), draw((1, 3, 4), 0).double(), solver, last=k)
    history = dict(vars(solver))

    def step(v, x):
        vars(solver).update(history)
        return solver.step(v, k, x)

    v = draw((1, 3, 4), 1).double().requires_grad_()
    assert torch.autograd.gradcheck(step, (v, x.requires_grad_()))


def test_guidance():
    v = guided(lambda x, t, negative: x * (1.0 if negative else 3.0), 5.0)
    assert v(torch.ones(1), None) == 1 + 5 * (3 - 1)
    calls = []
    guided(lambda x, t, negative: calls.append(negative) or x, 1)(torch.ones(1), None)
    assert calls == [False]
