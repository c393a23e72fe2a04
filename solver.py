"""Flow matching: noise levels, targets, the solvers that walk from noise to a clip, and the walk itself.

A clip x_0 and noise give x_s = (1 - s) x_0 + s noise at the noise level s in [0, 1] (`sigma`). The model is
told the timestep t = 1000 s and predicts the velocity dx/ds = noise - x_0. A `shift` f moves levels towards
noise: s -> f s / (1 + (f - 1) s).

A solver is a class `Name(steps, shift)` with an entry in SOLVERS. It has

    .timesteps       what the model is told at each step, as numbers or a tensor: one per step
    .sigmas          the noise level of x before each step, and a last one, 0: numbers or a tensor, one more
    .step(v, i, x)   takes the velocity at step i (from 0), returns x at step i + 1, differentiable in v and x

Steps come in order. A solver may keep what it needs of earlier steps as attributes; step 0 starts afresh. It
computes its coefficients once, as Python numbers, so that no step waits for the GPU.
"""
import math
from statistics import NormalDist

import numpy as np
import torch
from tqdm import tqdm

from files import InputError


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


# ------------------------------------------------------------------------------ training

class TrainingSchedule:
    """The 1000 noise levels of training: `.timesteps` (1000,), integers, and `.sigmas` (1001,), the last 0.

    `draws` says how `draw` chooses one: ["uniform"] over the table, as published; ["logit_normal"], the
    sigmoid of a standard normal in place of the uniform number; or a list of timesteps, each equally often.
    """

    def __init__(self, shift=5.0, draws=("uniform",)):
        self.draws = list(draws)
        if self.draws not in (["uniform"], ["logit_normal"]):
            try:
                self.draws = [float(t) for t in draws]
                if not all(0 <= t <= 1000 for t in self.draws):
                    raise ValueError
            except ValueError:
                raise InputError(f"--timesteps {' '.join(draws)} is not possible; give uniform, logit_normal "
                                 f"or numbers from 0 to 1000") from None
        self.sigmas = shifted(torch.linspace(1, 0, 1001), shift)
        self.timesteps = (1000 * self.sigmas[:-1]).long()

    def draw(self, u):
        """(sigma, timestep) for u uniform in [0, 1)."""
        if self.draws == ["logit_normal"]:
            u = 1 / (1 + math.exp(-NormalDist().inv_cdf(max(u, 1e-12))))
        elif self.draws != ["uniform"]:
            t = self.draws[math.floor(u * len(self.draws))]
            return self.near(t), t
        index = math.floor(1000 * u)
        return self.sigmas[index].item(), self.timesteps[index].item()

    def near(self, timestep):
        """The table's sigma with the nearest timestep, for levels named by timestep; 0 at timestep 0."""
        if timestep == 0:
            return 0.0
        return self.sigmas[(self.timesteps - timestep).abs().argmin()].item()


def add_noise(x0, noise, sigma):
    """x_s = (1 - s) x_0 + s noise; sigma (B,) or a number, x0 and noise (B, ...)."""
    if torch.is_tensor(sigma):
        sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise


def flow_matching_target(x0, noise):
    return noise - x0


# ------------------------------------------------------------------------------ solvers

class Euler:
    """x += (s_next - s) v. Models that are distilled to a few steps use it."""

    def __init__(self, steps, shift):
        self.sigmas = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()
        self.timesteps = 1000 * self.sigmas[:-1]
        self._sigmas = self.sigmas.tolist()

    def step(self, v, i, x):
        return x + (self._sigmas[i + 1] - self._sigmas[i]) * v


class Multistep:
    """What UniPC and DPM-Solver++ share: truncated timesteps, and predictions of x_0 kept over two steps.

    In lambda = log((1 - s) / s), the log signal-to-noise ratio, one exponential-integrator step of size
    h = lambda_next - lambda from x_s with a constant prediction m of x_0 is
    x_next = (s_next / s) x - (1 - s_next) (exp(-h) - 1) m.
    """

    def __init__(self, steps, shift, largest):
        # numpy's linspace, as in the official code: torch's rounds differently, and truncation shows it.
        grid = torch.from_numpy(np.linspace(largest, 0, steps + 1)[:-1])
        sigmas = shifted(grid, shift)
        self.timesteps = (1000 * sigmas).long()
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).float()
        self._s = self.sigmas.tolist()
        self._lambda = [log_ratio(s) for s in self._s]
        self.steps = steps

    def constant_step(self, x, m, i, j):
        """From level i to level j with the constant prediction m."""
        decay = math.expm1(-(self._lambda[j] - self._lambda[i]))
        return self._s[j] / self._s[i] * x - (1 - self._s[j]) * decay * m


def log_ratio(s):
    """lambda = log((1 - s) / s), infinite at both ends."""
    if s in (0, 1):
        return math.inf if s == 0 else -math.inf
    return math.log((1 - s) / s)


class DPMSolverPP(Multistep):
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095), midpoint form; first order at both ends."""

    def __init__(self, steps, shift):
        super().__init__(steps, shift, largest=1.0)

    def step(self, v, i, x):
        m = x - self._s[i] * v  # the predicted x_0
        out = self.constant_step(x, m, i, i + 1)
        if 0 < i < self.steps - 1:
            h = self._lambda[i + 1] - self._lambda[i]
            h_before = self._lambda[i] - self._lambda[i - 1]
            slope = (m - self._m) / (h_before / h)  # zero after a step from pure noise, whose h is infinite
            out = out - 0.5 * (1 - self._s[i + 1]) * math.expm1(-h) * slope
        self._m = m
        return out


class UniPC(Multistep):
    """UniPC of order 2, B(h) = expm1(-h) (Zhao et al. 2023, arXiv 2302.04867), Wan's default solver.

    Every step but the first begins with a corrector: now that the model has seen x_i, the step that led to
    x_i is repeated with the new prediction. So step i depends on v twice, through corrector and predictor.
    """

    def __init__(self, steps, shift):
        super().__init__(steps, shift, largest=float(np.float32(0.999)))  # as in the official code

    def step(self, v, i, x):
        m = x - self._s[i] * v  # from the x that the model saw, before it is corrected
        if i > 0:
            x = self._correct(m, i)
        order = 1 if i == 0 or i == self.steps - 1 else 2
        out = self.constant_step(x, m, i, i + 1)
        if order == 2:
            h = self._lambda[i + 1] - self._lambda[i]
            slope = (self._m - m) / self._ratio(i - 1, i, i + 1)
            out = out - (1 - self._s[i + 1]) * math.expm1(-h) * 0.5 * slope
        self._m_before = self._m if i else None
        self._m, self._x, self._order = m, x, order
        return out

    def _ratio(self, before, start, end):
        """Where an earlier level lies, in units of the step from `start` to `end` (negative: behind it)."""
        return (self._lambda[before] - self._lambda[start]) / (self._lambda[end] - self._lambda[start])

    def _correct(self, m, i):
        """Repeat the step from i - 1 to i with m, the prediction at i, at the order of that predictor."""
        h = self._lambda[i] - self._lambda[i - 1]
        weight = (1 - self._s[i]) * math.expm1(-h)
        out = self.constant_step(self._x, self._m, i - 1, i)
        if self._order == 1:
            return out - weight * 0.5 * (m - self._m)
        # Order 2: rho solves  rho_0 + rho_1 = b_0  and  r rho_0 + rho_1 = b_1, the conditions of eq. 5 there.
        r = self._ratio(i - 2, i - 1, i)
        b = math.expm1(-h)
        phi_2 = b / -h - 1
        phi_3 = phi_2 / -h - 0.5
        b_0 = phi_2 / b
        b_1 = 2 * phi_3 / b
        rho_0 = (b_0 - b_1) / (1 - r)
        rho_1 = b_0 - rho_0
        return out - weight * (rho_0 * (self._m_before - self._m) / r + rho_1 * (m - self._m))


SOLVERS = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler}


# ------------------------------------------------------------------------------ the walk

def guided(velocity, guidance):
    """Classifier-free guidance: v_neg + g (v_pos - v_neg).

    `velocity(x, t, negative_prompt)` evaluates the model with the prompt or with the negative prompt. At g =
    1 the negative prompt has no part in the result and is not evaluated.
    """
    def combined(x, t):
        positive = velocity(x, t, False)
        if guidance == 1:
            return positive
        negative = velocity(x, t, True)
        return negative + guidance * (positive - negative)
    return combined


def walk(velocity, x, solver, first=0, last=None, progress=None):
    """Follow `velocity(x, t)` from noise x, or from where the solver stopped before step `first`.

    x (B, ...) float32; t (B,) float32 on x's device. Steps `first` to `last` - 1 are taken; None: to the end.
    Samples and PRFL's rollouts all come through here. `progress` names a progress bar.
    """
    steps = range(first, len(solver.timesteps) if last is None else last)
    for i in tqdm(steps, desc=progress, disable=None if progress else True, leave=False):
        x = solver.step(velocity(x, timestep(solver, i, x)), i, x)
    return x


def timestep(solver, i, x):
    """The timestep (B,) of step i, for x (B, ...)."""
    return torch.full((len(x),), float(solver.timesteps[i]), device=x.device)
