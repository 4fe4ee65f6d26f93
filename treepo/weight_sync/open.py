"""The sender that a configuration names."""

from pathlib import Path

import torch

from treepo.config.weights import WeightsConfig
from treepo.weight_sync.broadcast import BroadcastSender
from treepo.weight_sync.colocated import SharedSender
from treepo.weight_sync.disk import DiskSender
from treepo.weight_sync.wire import Sender


def open_sender(config: WeightsConfig, out: Path, host: str, seconds: float) -> Sender:
    """out: the run folder. host: an address of this machine that the engines reach. seconds: deadline of one
    step.
    """
    match config.transport:
        case "colocated":
            return SharedSender()
        case "broadcast":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return BroadcastSender(device, host, seconds)
        case "host_broadcast":
            return BroadcastSender(torch.device("cpu"), host, seconds)
        case "disk":
            return DiskSender((config.folder or out / "weights").resolve(), config.keep)
