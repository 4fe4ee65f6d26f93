"""The numbers behind the toy. They were tuned together: see `ToyReport.sampled_accuracy`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """How much data there is and how the warm start goes."""

    train_problems: int = 2048
    heldout_problems: int = 256
    measured_samples: int = 4
    """Responses per held-out problem behind the measured accuracy: its standard error is about 0.02."""

    steps: int = 350
    careful_steps: int = 210
    """The first steps, on careful solutions alone."""
    batch: int = 32
    """Demonstrations in one step."""
    warmup_steps: int = 20
    """Steps until the learning rates have risen to those below; from there they fall linearly to nothing."""
    muon_lr: float = 0.006
    adam_lr: float = 0.003

    def rate(self, step: int) -> float:
        """The factor on the learning rates at `step`, counted from 0."""
        return min((step + 1) / self.warmup_steps, (self.steps - step) / (self.steps - self.warmup_steps))


RECIPE = Recipe()
