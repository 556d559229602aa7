"""A look as pictures: the chunk and the keyframe in the left view, where the pointers look, disparity or depth."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stereovla.app.frames import Frame
from stereovla.app.look import Look, enlarge, path_of
from stereovla.evaluation.film import colours
from stereovla.processing.camera_geometry import project_points
from stereovla.processing.image_processing_stereovla import ViewGeometry

SIDE_PX = 560  # longer side of what is drawn
SMOOTH = 2  # lines are drawn this many times larger, since Pillow does not smooth them
WHITE, INK = (255, 255, 255), (24, 32, 40)
NOW, LAST = np.array([250, 204, 21]), np.array([234, 58, 110])  # first and last action of a chunk
ANSWERED, POINTED = (124, 58, 237), (6, 148, 162)
SEEN = {"target": (234, 58, 80), "gripper": (37, 120, 235), "destination": (20, 160, 80)}  # where the pointers look
STRONGEST = 0.8  # of the colour, where a pointer looks most
BAR_PX, MARGIN_PX = 16, 12


def ramp(count: int) -> list[tuple[int, ...]]:
    """RGB of the actions of a chunk, first to last."""
    return [tuple(int(v) for v in NOW + (LAST - NOW) * share) for share in np.linspace(0, 1, max(count, 2))[:count]]


def magnified(view: np.ndarray) -> Image.Image:
    """A view with its longer side at SIDE_PX."""
    scale = SIDE_PX / max(view.shape[:2])
    size = (max(1, round(view.shape[1] * scale)), max(1, round(view.shape[0] * scale)))
    return Image.fromarray(view).resize(size, Image.Resampling.BICUBIC)


def draw_chunk(frame: Frame, look: Look, posed: bool) -> Image.Image:
    """The left view with the tool's way through the chunk and the keyframe, where the calibration tells the place."""
    picture = magnified(frame.views["left"])
    known = frame.calibration
    if not posed or known is None or known.transform_camera_to_base is None:
        return picture
    scale = SMOOTH * picture.width / frame.views["left"].shape[1]
    big = picture.resize((picture.width * SMOOTH, picture.height * SMOOTH), Image.Resampling.BICUBIC)
    draw, unit = ImageDraw.Draw(big), SMOOTH * SIDE_PX / 280
    path = scale * project_points(path_of(frame.states[-1], look.actions), known)
    ahead = np.isfinite(path).all(axis=1)
    marks = [(look.answered, ANSWERED), (look.pointed, POINTED)]
    for number, colour in enumerate(ramp(len(path) - 1)):
        if ahead[number] and ahead[number + 1]:
            line = [tuple(path[number]), tuple(path[number + 1])]
            draw.line(line, WHITE, round(3.4 * unit))
            draw.line(line, colour, round(2 * unit))
    for number, colour in enumerate(ramp(len(path) - 1), 1):
        if ahead[number]:
            _dot(draw, path[number], 2.2 * unit, colour, unit)
    if ahead[0]:
        _dot(draw, path[0], 4 * unit, INK, 1.6 * unit)
    for place, colour in marks:
        if place is not None:
            (point,) = scale * project_points(place[None, :3], known)
            if np.isfinite(point).all():
                _diamond(draw, point, 6 * unit, colour, unit)
    return big.resize(picture.size, Image.Resampling.LANCZOS)


def _dot(draw: ImageDraw.ImageDraw, at: np.ndarray, radius: float, colour: tuple[int, ...], edge: float) -> None:
    outline = round(max(1, edge))
    draw.ellipse([*(at - radius - outline), *(at + radius + outline)], fill=WHITE)
    draw.ellipse([*(at - radius), *(at + radius)], fill=colour)


def _diamond(draw: ImageDraw.ImageDraw, at: np.ndarray, radius: float, colour: tuple[int, ...], edge: float) -> None:
    for size, fill in ((radius + 1.6 * edge, WHITE), (radius, colour)):
        draw.polygon([tuple(at + size * np.array(way)) for way in ((0, -1), (1, 0), (0, 1), (-1, 0))], fill=fill)


def draw_pointing(frame: Frame, look: Look) -> Image.Image | None:
    """The left view, darkened but where the pointers look; None for a model without pointers."""
    if not look.attention:
        return None
    grey = np.asarray(magnified(frame.views["left"]).convert("L"), np.float32)[..., None]
    picture = np.repeat(0.75 * grey + 50, 3, axis=-1)
    for name, seen in look.attention.items():
        share = STRONGEST * enlarge(on_source(seen / seen.max(), look.geometry), picture.shape[:2])[..., None]
        picture = picture * (1 - share) + np.array(SEEN[name], np.float32) * share
    return Image.fromarray(picture.round().astype(np.uint8))


def draw_distances(look: Look) -> Image.Image | None:
    """Disparity or depth of the source view in colours, near = warm, with its scale; None where the model sees none."""
    values = look.disparity if look.disparity is not None else look.depth
    if values is None:
        return None
    shown = on_source(values, look.geometry)
    if look.disparity is not None:  # of the source view
        shown, unit, digits = shown / look.geometry.scale[0], "px", 1
    else:
        unit, digits = "m", 2
    known = shown[shown > 0]
    low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
    scale = SIDE_PX / max(shown.shape)
    shown = enlarge(shown, (max(1, round(shown.shape[0] * scale)), max(1, round(shown.shape[1] * scale))))
    near = shown if look.disparity is not None else -shown
    ends = (low, high) if look.disparity is not None else (-high, -low)
    picture = Image.fromarray(colours(near, *ends))
    return _with_scale(picture, [f"{value:.{digits}f} {unit}" for value in (abs(ends[0]), abs(ends[1]))])


def _with_scale(picture: Image.Image, words: list[str]) -> Image.Image:
    """A picture with the scale of its colours in a corner, from far to near."""
    draw, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(20)
    width, top = picture.width * 2 // 5, picture.height - BAR_PX - MARGIN_PX
    draw.rounded_rectangle([MARGIN_PX - 8, top - 34, MARGIN_PX + width + 8, picture.height - 4], 6, fill=(*INK, 165))
    bar = np.repeat(np.linspace(0, 1, width)[None], BAR_PX - 6, axis=0)
    picture.paste(Image.fromarray(colours(bar, 0.0, 1.0)), (MARGIN_PX, top))
    draw.text((MARGIN_PX, top - 6), words[0], WHITE, font, anchor="ls")
    draw.text((MARGIN_PX + width, top - 6), words[1], WHITE, font, anchor="rs")
    return picture


def on_source(values: np.ndarray, geometry: ViewGeometry) -> np.ndarray:
    """(h, w) of the processed view, in any resolution -> float32 (source_height, source_width), 0 where a crop cut."""
    whole = enlarge(values, (geometry.height, geometry.width))
    rows = slice(geometry.pad_top, geometry.pad_top + geometry.scaled_height)
    columns = slice(geometry.pad_left, geometry.pad_left + geometry.scaled_width)
    inner = enlarge(whole[rows, columns], (geometry.crop_height, geometry.crop_width))
    out = np.zeros((geometry.source_height, geometry.source_width), np.float32)
    top, left = geometry.crop_top, geometry.crop_left
    out[top : top + geometry.crop_height, left : left + geometry.crop_width] = inner
    return out


def legend(look: Look) -> Mapping[str, tuple[int, ...]]:
    """{what: RGB} of what `draw_chunk` may draw."""
    drawn = {"tool now": INK, "first action": tuple(NOW.tolist()), "last action": tuple(LAST.tolist())}
    if look.answered is not None:
        drawn["keyframe answered"] = ANSWERED
    if look.pointed is not None:
        drawn["keyframe pointed at"] = POINTED
    return drawn
