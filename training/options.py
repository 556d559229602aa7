"""What several training commands are told in the same words."""

OBJECTIVES = ("action", "depth", "box", "pose")


def mixture_weights(text: str) -> dict[str, float]:
    """ "5:2:2:1" -> {"action": 5, "depth": 2, "box": 2, "pose": 1}."""
    try:
        shares = [float(share) for share in text.split(":")]
    except ValueError:
        shares = []
    if len(shares) != len(OBJECTIVES) or min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"--mixture is {text!r}; it needs four shares, action:depth:box:pose, such as 5:2:2:1")
    return dict(zip(OBJECTIVES, shares, strict=True))


def dataset_mixture(names: list[str]) -> str | list[tuple[str, float]]:
    """["a", "b=0.3"] -> [("a", 1.0), ("b", 0.3)]; of a single dataset its name."""
    if len(names) == 1:
        return names[0]
    pairs = [(name.rpartition("=") if "=" in name else (name, "", "1")) for name in names]
    try:
        return [(name, float(weight)) for name, _, weight in pairs]
    except ValueError as error:
        raise ValueError(f"--dataset {names}: a weight must be a number, as in PATH=0.3") from error
