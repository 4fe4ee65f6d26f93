"""The sizes and rates of the toy, tuned together for a `ToyReport.sampled_accuracy` of about 0.4."""

from dataclasses import dataclass, replace

EXPERTS_PER_TOKEN = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of the data and of the model, and the schedule of the warm start."""

    train_problems: int = 2048
    heldout_problems: int = 256
    measured_samples: int = 4
    """Responses to each held-out problem in the measured accuracy; its standard error is about 0.02."""

    experts: int = 0
    """Experts in each layer; 0 for a dense model."""

    steps: int = 350
    careful_steps: int = 210
    """The first steps, on careful solutions alone."""
    batch: int = 32
    """Demonstrations in one step."""
    warmup_steps: int = 20
    """Steps until the learning rates reach those below; from there they fall linearly to 0."""
    muon_lr: float = 0.006
    adam_lr: float = 0.003

    @property
    def family(self) -> str:
        """The model's family, for people."""
        if not self.experts:
            return "Qwen2"
        return f"Qwen3-MoE, {EXPERTS_PER_TOKEN} of {self.experts} experts a token"

    def rate(self, step: int) -> float:
        """The factor on the learning rates at `step`, counted from 0."""
        return min((step + 1) / self.warmup_steps, (self.steps - step) / (self.steps - self.warmup_steps))


RECIPE = Recipe()
"""The dense toy, of a million parameters."""
MIXTURE = replace(RECIPE, experts=8)
"""The toy mixture, of two million."""
