"""What Megatron-Core says at every start and our users can do nothing about, silenced on import.

To be imported before Megatron-Core: most of it is said while that is being imported.
"""

import logging
import warnings

MESSAGES = (
    r".*Apex (is|are) not installed",  # torch's own norm and optimizer are what we use
    "full scope is deprecated",  # of CUDA graphs, which we do not set
    "MimoModelConfig is experimental",  # imported by the optimizer, not used
    "`sequence_parallel` is set to `True`, but tensor",  # said of experts, which are whole on their rank
)
LOGGERS = (
    "megatron.core.models.gpt.gpt_model",  # announces its successor, HybridModel
    "torch.utils.cpp_extension",  # that there is no CUDA
    "megatron.core.distributed.distributed_data_parallel",  # the layout that it makes itself is the right one
)

for message in MESSAGES:
    warnings.filterwarnings("ignore", message=message)
for name in LOGGERS:
    logging.getLogger(name).setLevel(logging.ERROR)
