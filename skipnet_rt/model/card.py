"""What a trained network says of itself beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skipnet_rt.model.preprocessing import Preprocessing


@dataclass(frozen=True)
class ModelCard:
    """Everything about a trained network that its weights don't tell; written to and read from checkpoints.

    Attributes:
        labels: the classes' names in the order of the logits, where known.
        preprocessing: how pictures become inputs, where known.
        training: a summary of the training (data set, epochs, accuracy in percent, computation in percent ...).
    """

    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for metadata."""
        return {"labels": list(self.labels) if self.labels else None,
                "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
                "training": self.training}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        """The inverse of :meth:`to_dict`."""
        labels, preprocessing = values.get("labels"), values.get("preprocessing")
        return cls(tuple(labels) if labels else None,
                   Preprocessing.from_dict(preprocessing) if preprocessing else None,
                   dict(values.get("training") or {}))
