"""skipnet-rt: a runtime for SkipNets, networks that decide image by image which residual blocks to run."""

from importlib.metadata import version

from skipnet_rt.arch import ArchError, BlockPlan, SkipNetArch, arch
from skipnet_rt.card import ModelCard
from skipnet_rt.checkpoint import CheckpointError, convert, load, save
from skipnet_rt.engines import EngineError, engines
from skipnet_rt.model import SkipNet, build
from skipnet_rt.preprocessing import Preprocessing
from skipnet_rt.routing import InferenceResult, RoutingStats, count_operations
from skipnet_rt.runtime import SkipNetRuntime, compile

__version__ = version("skipnet-rt")

__all__ = [
    "ArchError",
    "BlockPlan",
    "CheckpointError",
    "EngineError",
    "InferenceResult",
    "ModelCard",
    "Preprocessing",
    "RoutingStats",
    "SkipNet",
    "SkipNetArch",
    "SkipNetRuntime",
    "arch",
    "build",
    "compile",
    "convert",
    "count_operations",
    "engines",
    "load",
    "save",
]
