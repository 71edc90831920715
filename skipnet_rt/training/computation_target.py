"""A wanted computation instead of a reward: a controller that moves alpha.

What alpha leads to which computation is known only after the training. Seen the other way, alpha is the Lagrange
multiplier of the constraint ``computation = target``, and can be found on the way: raised as long as too much is
executed, lowered when it is too little. That alone (dual ascent, an integral controller) swings, because gates
follow alpha late; a proportional term damps it.
"""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 2.0
"""Percentage points within which a target counts as reached."""

_PROPORTIONAL = 20.0  # 10 points too much raise alpha by 2
_INTEGRAL = 30.0  # and by 3 over a whole training


@dataclass
class ComputationTarget:
    """A proportional-integral controller of alpha.

    Attributes:
        target: the computation wanted, in percent.
        integral: the integral part of alpha; it begins as the alpha that was asked for.
    """

    target: float
    integral: float

    def alpha(self, computation: float, share: float) -> float:
        """The next step's alpha, which may become negative: a reward for executing.

        Args:
            computation: what the last batch executed, in percent.
            share: of the whole training that a step is, so that trainings of any length are controlled alike; 0 keeps
                the integral part, for a stage in which the target is out of reach.
        """
        excess = (computation - self.target) / 100
        self.integral += _INTEGRAL * share * excess
        return self.integral + _PROPORTIONAL * excess

    def verdict(self, computation: float) -> str | None:
        """What to say of a training that ended with so much computation, in percent; None if it reached the target."""
        if abs(computation - self.target) <= TOLERANCE:
            return None
        return (f"the computation did not reach its target: wanted were {self.target:g} %, it is {computation:.1f} % "
                f"(within {TOLERANCE:g} points it counts as reached); train longer, or with a higher gates_lr or "
                "rl_weight")
