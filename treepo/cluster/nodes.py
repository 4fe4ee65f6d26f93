"""The living nodes of the Ray cluster that this process has joined."""

import ray

from treepo.cluster.placement import Node


def cluster_nodes() -> list[Node]:
    """The cluster's living nodes with their total resources, free or not."""
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def living_nodes() -> set[str]:
    """The ids of the cluster's living nodes."""
    return {node.id for node in cluster_nodes()}
