"""What two real cameras do differently with the same light: gain, offset, colour, noise."""

from dataclasses import dataclass

import numpy as np

from stereovla.simulation.config import WorldConfig


@dataclass(frozen=True)
class Photometry:
    """Right view = view * gain + offset, per channel (3,), levels of 255; both views with noise of `noise_std` levels,
    a function of `seed` and the step.
    """

    gain: np.ndarray
    offset: float
    noise_std: float
    seed: int

    def apply(self, left: np.ndarray, right: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Both views, uint8 (H, W, 3), as the cameras deliver them."""
        if self.offset != 0 or np.any(self.gain != 1):
            levels = np.arange(256)[:, None] * self.gain + self.offset  # a table: 20 times faster than every pixel
            table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
            right = np.stack([table[right[..., channel], channel] for channel in range(3)], axis=-1)
        if self.noise_std > 0:
            rng = np.random.default_rng((self.seed, step))
            left, right = (self._with_noise(view, rng) for view in (left, right))
        return left, right

    def _with_noise(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = rng.standard_normal(view.shape, np.float32) * np.float32(self.noise_std)
        return np.clip(np.rint(view + noise), 0, 255).astype(np.uint8)


def draw_photometry(config: WorldConfig, rng: np.random.Generator) -> Photometry:
    """Random differences between the views, within the config's ranges."""
    gain = rng.uniform(*config.right_gain) * rng.uniform(*config.right_color, 3)
    return Photometry(gain, rng.uniform(*config.right_offset), rng.uniform(*config.noise_std), int(rng.integers(2**32)))
