"""skipnet-rt: a runtime for SkipNets, networks that decide image by image which residual blocks to run."""

from importlib.metadata import version

from skipnet_rt.checkpoint import CheckpointError, convert, from_resnet, load, save
from skipnet_rt.engines.registry import EngineError, engines
from skipnet_rt.model.arch import ArchError, BlockPlan, SkipNetArch, arch
from skipnet_rt.model.card import ModelCard
from skipnet_rt.model.flops import count_operations
from skipnet_rt.model.network import SkipNet, build
from skipnet_rt.model.preprocessing import Preprocessing
from skipnet_rt.model.routing import InferenceResult, RoutingStats
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
    "from_resnet",
    "load",
    "save",
]
