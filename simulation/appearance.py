"""How a scene looks, drawn at random: textures of table and floor, walls, light."""

from dataclasses import dataclass

import numpy as np

from stereovla.simulation.config import WorldConfig

TEXTURE_PX = 128


@dataclass(frozen=True)
class Appearance:
    """Everything about how the scene looks: sRGB colours in [0, 1], textures uint8 (128, 128, 3), light direction (3,)
    and intensities.
    """

    table: np.ndarray
    floor: np.ndarray
    pedestal_rgb: np.ndarray
    block_rgb: np.ndarray
    wall_rgb: np.ndarray
    light_direction: np.ndarray
    light: float
    ambient: float
    headlight: float


def smooth_noise(cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """float32 (128, 128) noise in [-1, 1] with `cells` (rows, columns) random values, linearly interpolated, wrapping
    around.
    """
    values = rng.uniform(-1, 1, cells).astype(np.float32)
    # by indexing: a matrix product would start BLAS threads, which cost 10 times as much on busy cores
    for axis in (1, 0):
        place = np.arange(TEXTURE_PX) * (cells[axis] / TEXTURE_PX)
        index, weight = place.astype(int), (place % 1.0).astype(np.float32)
        weight = weight[:, None] if axis == 0 else weight
        low, high = np.take(values, index, axis), np.take(values, (index + 1) % cells[axis], axis)
        values = low + (high - low) * weight
    return values


def draw_texture(config: WorldConfig, rng: np.random.Generator) -> np.ndarray:
    """Random muted surface, uint8 (128, 128, 3): cloth, wood, stone or tiles. Low saturation keeps it apart from the
    objects' colours.
    """
    value, saturation = rng.uniform(*config.texture_brightness), rng.uniform(*config.texture_saturation)
    tint = 1.0 + saturation * np.cos(rng.uniform(0, 2 * np.pi) + np.array([0.0, 2.0, 4.0]) * np.pi / 3)
    kind, contrast = rng.integers(4), rng.uniform(*config.texture_contrast)
    grain = rng.random((TEXTURE_PX, TEXTURE_PX), np.float32) - 0.5
    if kind == 0:
        pattern = 0.6 * smooth_noise((24, 24), rng)
    elif kind == 1:
        pattern = 0.8 * smooth_noise((48, 2), rng) + 0.4 * smooth_noise((96, 6), rng)
    elif kind == 2:
        pattern = (
            0.7 * smooth_noise((6, 6), rng) + 0.5 * smooth_noise((16, 16), rng) + 0.4 * smooth_noise((64, 64), rng)
        )
    else:
        cell = np.arange(TEXTURE_PX) * int(rng.integers(4, 13)) // TEXTURE_PX
        pattern = np.where((cell[:, None] + cell[None]) % 2, 0.6, -0.6)
    # 256 shades of one tint: 1 ms instead of the 14 ms of arithmetic on every colour channel
    shade = np.clip(128.0 + (320.0 * contrast) * (pattern + 0.7 * grain), 0, 255).astype(np.uint8)
    palette = (value * tint)[None] * (1.0 + (np.arange(256)[:, None] - 128.0) / 320.0)
    return np.clip(255.0 * palette, 0, 255).astype(np.uint8)[shade]


def draw_appearance(config: WorldConfig, rng: np.random.Generator) -> Appearance:
    """Random look of a scene. Ambient + headlight + light stay <= 1, above which pale tables saturate."""
    tilt, azimuth = rng.uniform(*config.light_tilt_rad), rng.uniform(-np.pi, np.pi)
    ambient, headlight = rng.uniform(*config.ambient_light), rng.uniform(*config.headlight)
    return Appearance(
        table=draw_texture(config, rng),
        floor=draw_texture(config, rng),
        pedestal_rgb=np.repeat(rng.uniform(0.2, 0.6), 3),
        block_rgb=np.repeat(rng.uniform(0.3, 0.75), 3) * (1.0 + rng.uniform(-0.06, 0.06, 3)),
        wall_rgb=rng.uniform(*config.wall_brightness) * (1.0 + rng.uniform(-0.12, 0.12, 3)),
        light_direction=np.array([np.sin(tilt) * np.cos(azimuth), np.sin(tilt) * np.sin(azimuth), -np.cos(tilt)]),
        light=rng.uniform(*config.directional_light) * (1.0 - ambient - headlight),
        ambient=ambient,
        headlight=headlight,
    )
