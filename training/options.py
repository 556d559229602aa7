"""What several training commands are told in the same words."""

from collections.abc import Sequence

from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation

OBJECTIVES = ("action", "depth", "box", "pose", "camera")


def mixture_weights(text: str, objectives: Sequence[str] = OBJECTIVES, optional: int = 1) -> dict[str, float]:
    """ "5:2:2:1" -> {"action": 5, "depth": 2, "box": 2, "pose": 1, "camera": 0}; a fifth number is the camera's. Of
    other `objectives` likewise, the last `optional` of which need no number.
    """
    try:
        shares = [float(share) for share in text.split(":")]
    except ValueError:
        shares = []
    counts = range(len(objectives) - optional, len(objectives) + 1)
    if len(shares) not in counts or min(shares) < 0 or sum(shares) == 0:
        forms = " or ".join(":".join(objectives[:count]) for count in counts)
        raise ValueError(f"--mixture is {text!r}; it needs shares {forms}, such as {':'.join('5221'[: counts[0]])}")
    missing = [0.0] * (len(objectives) - len(shares))
    return dict(zip(objectives, [*shares, *missing], strict=True))


def dataset_mixture(names: list[str]) -> str | list[tuple[str, float]]:
    """["a", "b=0.3"] -> [("a", 1.0), ("b", 0.3)]; of a single dataset its name."""
    if len(names) == 1:
        return names[0]
    pairs = [(name.rpartition("=") if "=" in name else (name, "", "1")) for name in names]
    try:
        return [(name, float(weight)) for name, _, weight in pairs]
    except ValueError as error:
        raise ValueError(f"--dataset {names}: a weight must be a number, as in PATH=0.3") from error


def augmentation(strength: float) -> PhotometricAugmentation | None:
    """Photometric changes of up to `strength` in brightness, contrast and saturation, and a tenth and a quarter of it
    between the views and the colours; 0 = none.
    """
    if strength == 0:
        return None
    return PhotometricAugmentation(strength, strength, strength, balance=strength / 4, between_views=strength / 10)
