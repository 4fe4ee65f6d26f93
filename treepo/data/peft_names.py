"""PEFT's names of an adapter's tensors: the matrices A and B beside each weight."""

PEFT_PREFIX = "base_model.model."  # before the names of transformers


def peft_name(weight: str, matrix: str) -> str:
    """PEFT's name of the matrix ("A" or "B") beside the weight of this name in transformers."""
    return f"{PEFT_PREFIX}{weight.removesuffix('.weight')}.lora_{matrix}.weight"


def weight_name(tensor: str) -> str:
    """Transformers' name of the weight that an A or B of this name is beside."""
    return tensor.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] + ".weight"
