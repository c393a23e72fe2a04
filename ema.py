"""The exponential moving average of the trained weights: with --ema it is evaluated and saved."""
from contextlib import contextmanager

import torch


class EMA:
    """average = decay * average + (1 - decay) * parameter, for every trained parameter, once per step.

    Averages are float32 shards like the parameters, in CPU memory with `--offload ema`.
    """

    def __init__(self, model, args):
        self.model = model
        self.decay = args.ema
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        if "ema" in args.offload:
            self.average = {name: average.cpu() for name, average in self.average.items()}

    @torch.no_grad()
    def update(self):
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.to(self.average[name].device), 1 - self.decay)

    @contextmanager
    def swapped(self):
        """`with ema.swapped():` the model has the averaged parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        self.model.reshard()  # or FSDP2 would reuse the gathered parameters of the last forward
        for name, parameter in self.parameters.items():
            own = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)
