"""compile(): from a trained network to one that runs only the blocks its gates ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipnet_rt import ops
from skipnet_rt.checkpoint import as_skipnet
from skipnet_rt.engines.base import Engine, EnginePass
from skipnet_rt.engines.executor import Executor
from skipnet_rt.engines.registry import EngineError, choose_engine
from skipnet_rt.model.arch import SkipNetArch
from skipnet_rt.model.network import published_output
from skipnet_rt.model.packing import pack
from skipnet_rt.model.routing import InferenceResult

_IMAGE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SkipNetRuntime(nn.Module):
    """A compiled network: a snapshot of a model's weights in an engine. Made by :func:`compile`.

    Calls are independent of each other and may come from several threads. The runtime stays on its device and in its
    dtype: compile the model again for another.

    Attributes:
        arch: the network's architecture.
        engine: the engine that executes it.
        device: where images must be and results are.
        dtype: of the computation and of the logits.
        max_batch: the most images that the engine takes at once; larger batches are split.
    """

    def __init__(self, engine: Engine, model_dtype: torch.dtype, max_batch: int | None) -> None:
        super().__init__()
        self.arch: SkipNetArch = engine.network.arch
        self.engine = engine
        self.device: torch.device = engine.network.device
        self.dtype: torch.dtype = engine.network.dtype
        self.max_batch = max_batch
        self._model_dtype = model_dtype
        self._executor = Executor(engine, max_batch)
        self._number = ops.register(self._executor)
        self.training = False

    @property
    def memory(self) -> int:
        """Bytes of the device's memory that the runtime holds: weights, and workspaces that outlive a call.

        A call allocates its results besides. On the CPU, and with the eager engine, activations and weights in a
        library's own layout come on top.
        """
        return self.engine.memory

    def forward(self, images: Tensor) -> Tensor | tuple:
        """What the compiled model returns in evaluation mode; see :meth:`skipnet_rt.SkipNet.forward`.

        Args:
            images: ``[N, in_channels, H, W]`` of the architecture's image size, of any floating dtype, in any memory
                layout, on the runtime's device. N may be 0. An image with NaN gets NaN logits; others are unaffected.

        Returns:
            The wrapped model's structure: logits in the runtime's dtype, masks and probabilities in the model's own.

        Raises:
            TypeError, ValueError: the images are not as described.
        """
        num_gates = self.arch.num_gates + self.arch.steps_last_gate
        done = self._run(images, None, num_gates)
        decisions = done.decisions
        hidden = (decisions.hidden.unsqueeze(0), decisions.cell.unsqueeze(0)) if self.arch.returns_hidden else None
        return published_output(self.arch, done.logits,
                                decisions.executed[:self.arch.num_gates].t().to(self._model_dtype),
                                decisions.gate_logits.t().to(self._model_dtype), hidden)

    def infer(self, images: Tensor, routing: Tensor | None = None) -> InferenceResult:
        """Logits, decisions and probabilities of a batch.

        Args:
            images: as for a call.
            routing: decisions that replace the gates' own, bool (or 0 and 1) ``[G]`` or ``[N, G]``; the gates are
                computed all the same, and their probabilities returned.

        Raises:
            TypeError, ValueError: the images or the routing are not as described.
        """
        done = self._run(images, routing, self.arch.num_gates)
        return InferenceResult(done.logits, done.decisions.executed.t(), done.decisions.probabilities.t(), self.arch)

    @torch.no_grad()
    def _run(self, images: Tensor, routing: Tensor | None, num_gates: int) -> EnginePass:
        self._check_images(images)
        forced = None if routing is None else self._forced(routing, images.shape[0])
        images = (images if images.dtype in self.engine.image_dtypes else images.to(self.dtype)).contiguous()
        if torch.compiler.is_compiling():
            return ops.as_pass(ops.run(images, forced, self._number, num_gates))
        return self._executor.run(images, forced, num_gates)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.dtype not in _IMAGE_DTYPES:
            raise TypeError(f"images must be floating point (preprocessed and normalised), got {images.dtype}")
        expected = (self.arch.in_channels, *self.arch.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must have shape [N, {', '.join(map(str, expected))}] for {self.arch}, "
                             f"got {list(images.shape)}")
        self._check_device("images", images)

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, where the runtime was compiled, got {tensor.device}")

    def _forced(self, routing: Tensor, batch: int) -> Tensor:
        """A routing ``[G]`` or ``[N, G]`` as engines take it: bool ``[G, N]``, a view where it can be one."""
        if not isinstance(routing, Tensor):
            raise TypeError(f"routing must be a torch.Tensor, got {type(routing).__name__}")
        gates = self.arch.num_gates
        if tuple(routing.shape) not in ((gates,), (batch, gates)):
            raise ValueError(f"routing must have shape [{gates}] or [{batch}, {gates}] for this batch of {self.arch}, "
                             f"got {list(routing.shape)}")
        self._check_device("routing", routing)
        if routing.dtype != torch.bool:
            other = routing[(routing != 0) & (routing != 1)]
            if len(other):
                raise ValueError(f"routing must be bool, or 0 and 1, got {other[0].item()}")
            routing = routing != 0
        return routing.expand(batch, gates).t()

    def train(self, mode: bool = True) -> SkipNetRuntime:
        """A runtime only evaluates; ``train()`` raises and ``eval()`` does nothing."""
        if mode:
            raise RuntimeError("a compiled runtime cannot be trained; train the model and compile it again")
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> SkipNetRuntime:
        raise RuntimeError(f"a runtime stays on {self.device} in {self.dtype}; "
                           "compile the model again with another device or dtype")

    def extra_repr(self) -> str:
        """For ``repr``: what runs where."""
        return f"{self.arch}, engine={self.engine.name}, device={self.device}, dtype={self.dtype}"


def usable_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be put on; ``"cuda"`` means the current one.

    Raises:
        EngineError: PyTorch does not know it, or cannot use it here; the message says why.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        raise EngineError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None


def compile(model: nn.Module, engine: str = "auto", device: torch.device | str | None = None,
            dtype: torch.dtype | None = None, max_batch: int | None = None) -> SkipNetRuntime:
    """Compile a model: take a snapshot of its weights for an engine.

    Args:
        model: a :class:`skipnet_rt.SkipNet`, or an instance of the published code's own classes (recognised by its
            state dict). It is left as it is; later training does not reach the runtime.
        engine: a name of :func:`skipnet_rt.engines`, or ``"auto"`` for the fastest that takes the network: as measured
            here (autoselect.py), or in the registry's order.
        device: where to run; the model's own by default.
        dtype: float32, bfloat16, float16 or float64, as the engine allows; the model's own by default.
        max_batch: split larger batches, which bounds the memory a call takes; results do not depend on it.

    Raises:
        EngineError: no such engine or device, or it cannot take the network here; the message says why.
        CheckpointError: the model is none of ours and not recognised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (srt.load reads checkpoints), got {type(model).__name__}")
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise TypeError(f"model must have parameters, got {type(model).__name__} without any")
    target = usable_device(device or parameter.device)
    chosen_dtype = dtype or parameter.dtype
    network = as_skipnet(model)
    chosen = choose_engine(engine, network.arch, target, chosen_dtype, max_batch)
    return SkipNetRuntime(chosen(pack(network, target, chosen_dtype)), parameter.dtype, max_batch)
