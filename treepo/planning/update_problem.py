"""Whether a weight update's way is open where trainer and engines sit."""

from treepo.config.run import RunConfig
from treepo.planning.places import Places


def update_problem(config: RunConfig, places: Places) -> str | None:
    """Why weights cannot go the configured way, in one line; None where they can."""
    shared = config.placement == "colocated" and config.plan.device != "cpu"
    if config.weights.transport == "colocated" and not places.one_machine:
        return (
            "weights.transport = colocated needs every engine on the node of the trainer's rank 0; these are "
            f"on {places.nodes} nodes of {config.plan.devices_per_node} devices "
            f"({'host_broadcast' if shared else 'broadcast, host_broadcast'} and disk are allowed)"
        )
    if config.weights.transport == "broadcast" and shared:
        return (
            "weights.transport = broadcast with placement = colocated: NCCL takes one process a GPU "
            "(colocated, host_broadcast and disk are allowed)"
        )
    return None
