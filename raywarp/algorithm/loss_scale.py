"""The factor of the loss in a float16 backward pass, where small gradients would become 0.

float16 holds numbers from 6e-8 to 65,504. The loss is multiplied by the factor, and gradients are
divided by it in float32 (Micikevicius et al. 2018). It is a power of two, so it changes no digit.
"""

from dataclasses import dataclass

START, LARGEST, SMALLEST = 2.0**16, 2.0**24, 2.0**-16
CLEAN_STEPS = 100  # without an overflow, before the factor is doubled


@dataclass
class LossScale:
    """The factor, which follows the gradients' size.

    Attributes:
        value: the factor of the next step.
        clean_steps: steps in a row that did not overflow, since the factor last changed.
    """

    value: float = START
    clean_steps: int = 0

    def fits(self) -> None:
        """Count a step without overflow. Double the factor after CLEAN_STEPS of them."""
        self.clean_steps += 1
        if self.clean_steps == CLEAN_STEPS:
            self.value, self.clean_steps = min(2 * self.value, LARGEST), 0

    def halve(self) -> bool:
        """Halve the factor after an overflow.

        Returns:
            whether that was possible. The gradient itself is not finite at the smallest factor.
        """
        if self.value <= SMALLEST:
            return False
        self.value, self.clean_steps = self.value / 2, 0
        return True
