"""Networks to and from files, without ever running anything that a file holds.

What is in a file, what may be wrong with it and what network it makes; how a network is built or run is elsewhere.
"""

from skipnet_rt.checkpoint.error import CheckpointError
from skipnet_rt.checkpoint.loading import as_skipnet, load
from skipnet_rt.checkpoint.resnets import from_resnet
from skipnet_rt.checkpoint.saving import convert, save

__all__ = ["CheckpointError", "as_skipnet", "convert", "from_resnet", "load", "save"]
