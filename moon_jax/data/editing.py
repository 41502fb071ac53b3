"""Edits images without a model: cuts out the subject and shows it in another way.

Co-augmentation uses it in two stages, as in MOON2.0 (arXiv 2511.12449): I_m, the image without clutter, then I_k, k = 1
… n_c: the same product before another background, from another viewpoint, or closer. The evaluation makes query photos
with it, and training replaces plain backgrounds. All random choices depend on the generator that is given.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

cv2.setNumThreads(1)  # processes and reader threads share the cores

JPEG_QUALITY = 92

WORKING_SIDE = 256
"""Length of the longer side, in pixels, at which the subject is segmented."""

BORDER = 0.04
"""Width of the frame that is assumed to be background, as a share of the shorter side."""

LEAST_SIDE = 16
"""Pixels. Smaller images are not expanded; images that get smaller when scaled to WORKING_SIDE are not segmented."""

ALIKE, PLAIN, REACH = 6.0, 0.5, (2.5, 6.0)
"""Colours less than ALIKE apart (CIE76) count as equal. A frame is plain if at least the share PLAIN of it has one
colour. Colours within REACH of that colour are then background: the smaller bound if the colour does not vary.
"""

FRAME_SAMPLE = 120
"""Pixels of the frame among which its most common colour is sought; all pairs are compared."""

PLAIN_RANGE = 16.0
"""`replace_background` takes colours within this distance of the edge's, in the largest of R, G and B, for one."""

COMPACT = 0.75
"""Share of its convex hull that a subject must fill if the background is not plain."""

LEAST_AREA, MOST_AREA = 0.04, 0.92
"""Share of the image that a subject may cover; otherwise no subject was found."""

SCRAP = 0.12
"""Share of the largest part's area. Parts smaller than this, such as a shop's badge, do not belong to the subject."""

WHITE = (255.0, 255.0, 255.0)


@dataclasses.dataclass(frozen=True)
class Subject:
    """I_m: the subject of an image."""

    pixels: np.ndarray  # u8[height,width,3]: the whole image
    mask: np.ndarray | None  # f32[height,width]: 1 on the subject; None if no subject was found

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the subject, or of the whole image if no subject was found."""
        height, width = self.pixels.shape[:2]
        if self.mask is None:
            return 0, 0, width, height
        rows, columns = (np.flatnonzero((self.mask > 0.5).any(axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def alone(self, background: tuple[float, ...] | np.ndarray = WHITE) -> np.ndarray:
        """The subject on `background`, a colour or f32[height,width,3]. Returns f32[height,width,3]."""
        if self.mask is None:
            return self.pixels.astype(np.float32)
        mask = self.mask[..., None]
        return self.pixels * mask + np.broadcast_to(np.float32(background), self.pixels.shape) * (1 - mask)


def subject_of(picture: Image.Image) -> Subject:
    """Finds the subject of an RGB image.

    If the frame has one colour, as in a studio photo, the subject is everything that a flood fill of that colour from
    the edge does not reach. Otherwise GrabCut (Rother et al., 2004) segments the image with the frame as background;
    its result is used only if it is compact. Small separate parts, such as badges and captions, are removed and holes
    are filled.
    """
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if min(size) < LEAST_SIDE:
        return Subject(pixels, None)
    frame = max(1, round(BORDER * min(size)))
    ring = np.ones(small.shape[:2], bool)
    ring[frame:-frame, frame:-frame] = False
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    distance, share = _from_frame(lab, ring)
    mask = _beyond(distance, ring) if share >= PLAIN else _grabbed(small, ring)
    mask = _solid(mask)
    if not LEAST_AREA <= mask.mean() <= MOST_AREA or (share < PLAIN and not _compact(mask, ring)):
        return Subject(pixels, None)
    soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    soft = cv2.GaussianBlur(soft, (0, 0), max(0.6, 0.6 / scale))
    return Subject(pixels, np.clip((soft - 0.25) * 2, 0, 1))


def _from_frame(lab: np.ndarray, ring: np.ndarray) -> tuple[np.ndarray, float]:
    """Each pixel's distance (CIE76) from the frame's most common colour, and the frame's share of that colour."""
    there = lab[ring][:: max(1, int(ring.sum()) // FRAME_SAMPLE)]
    between = np.sqrt(((there[:, None] - there[None]) ** 2).sum(-1))
    alike = there[between[np.argmax((between < ALIKE).sum(1))] < ALIKE]
    distance = np.sqrt(((lab - np.median(alike, axis=0)) ** 2).sum(-1))
    return distance, float((distance[ring] < ALIKE).mean())


def _beyond(distance: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """Mask u8[h,w] of the pixels that the frame's colour does not reach from the edge."""
    reach = np.clip(4 * np.median(distance[ring & (distance < ALIKE)]), *REACH)
    _, parts = cv2.connectedComponents((distance < reach).astype(np.uint8), connectivity=4)
    touching = np.unique(parts[ring & (distance < reach)])
    beyond = (~np.isin(parts, touching[touching > 0])).astype(np.uint8)
    # Camera and JPEG blur the edges: the outermost one or two pixels are still background.
    return cv2.erode(beyond, np.ones((3, 3), np.uint8), iterations=min(2, min(beyond.shape) // 120))


def _grabbed(small: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """GrabCut's mask of the subject, u8[h,w]."""
    cv2.setRNGSeed(0)  # grabCut uses random numbers
    labels = np.where(ring, cv2.GC_BGD, cv2.GC_PR_FGD).astype(np.uint8)
    models = np.zeros((2, 1, 65))
    cv2.grabCut(cv2.cvtColor(small, cv2.COLOR_RGB2BGR), labels, None, *models, 4, cv2.GC_INIT_WITH_MASK)
    return (labels % 2).astype(np.uint8)


def _solid(mask: np.ndarray) -> np.ndarray:
    """The mask u8[h,w] without small parts and holes."""
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count == 1:
        return mask
    area = stats[1:, cv2.CC_STAT_AREA]
    kept = np.isin(parts, 1 + np.flatnonzero(area >= SCRAP * area.max())).astype(np.uint8)
    outlines, _ = cv2.findContours(kept, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(kept, outlines, -1, 1, cv2.FILLED)


def _compact(mask: np.ndarray, ring: np.ndarray) -> bool:
    """Whether the mask is one part that fills its convex hull and leaves most of the frame free."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if len(outlines) != 1:
        return False
    hull = cv2.contourArea(cv2.convexHull(outlines[0]))
    return mask.sum() > COMPACT * hull and cv2.dilate(mask, np.ones((3, 3), np.uint8))[ring].mean() < 0.3


def _scene(size: tuple[int, int], colours: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A background of two colours: a wall and floor, a gradient or soft patches. f32[height,width,3].

    Args:
        size: width and height.
    """
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    kind = int(rng.integers(3))
    if kind == 0:
        share = 1 / (1 + np.exp(-(y - rng.uniform(0.6, 0.85) * height) / (0.01 * height)))
    elif kind == 1:
        turn = rng.uniform(0, 2 * np.pi)
        share = 0.5 + 0.5 * (np.cos(turn) * (2 * x / width - 1) + np.sin(turn) * (2 * y / height - 1)) / np.sqrt(2)
    else:
        share = cv2.resize(rng.uniform(0, 1, (4, 4)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    share = np.clip(share, 0, 1)[..., None]
    return colours[0] * (1 - share) + colours[1] * share


def background(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """The subject with its shadow, moved a little, before a wall and floor, a gradient or soft patches of colour."""
    height, width = subject.pixels.shape[:2]
    colours = _pale(rng), _pale(rng)
    scene = _scene((width, height), colours, rng)
    left, top, right, bottom = subject.box
    scale = rng.uniform(0.8, 1.0) * min(1.0, 0.92 * width / (right - left), 0.92 * height / (bottom - top))
    margin = np.array([width - scale * (right - left), height - scale * (bottom - top)])
    corner = margin * rng.uniform(0.25, 0.75, 2)
    size = width, height
    move = np.float32([[scale, 0, corner[0] - scale * left], [0, scale, corner[1] - scale * top]])
    pixels = cv2.warpAffine(
        subject.pixels, move, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE
    )
    mask = cv2.warpAffine(subject.mask, move, size, flags=cv2.INTER_LINEAR)
    blur = 0.03 * min(height, width)
    shadow = cv2.GaussianBlur(np.roll(mask, (round(blur), round(blur / 2)), (0, 1)), (0, 0), blur)
    scene = scene * (1 - 0.35 * shadow[..., None])
    return Subject(pixels, mask).alone(scene.astype(np.float32))


def _pale(rng: np.random.Generator) -> np.ndarray:
    """A light colour of low saturation, unlikely to be mistaken for a product."""
    grey = rng.uniform(150, 240)
    return np.clip(grey + rng.uniform(-35, 35, 3), 0, 255).astype(np.float32)


MOVED = 0.75, 1.0
"""Range of the scale of a subject on a replaced background."""


def replace_background(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image before a random background of any colours, its subject a little smaller and moved.

    An image without a plain background is returned as it is. Made for small images, in a training step: it does
    without the costly parts of `subject_of`.

    Args:
        pixels: u8[height,width,3].

    Returns:
        u8[height,width,3].
    """
    height, width = pixels.shape[:2]
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(np.float32)
    alike = np.abs(edge - np.median(edge, axis=0)).max(1) < PLAIN_RANGE
    if alike.mean() < PLAIN:
        return pixels
    distance = np.abs(pixels.astype(np.float32) - np.median(edge[alike], axis=0)).max(2)
    _, parts = cv2.connectedComponents((distance < PLAIN_RANGE).astype(np.uint8), connectivity=4)
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    mask = (~np.isin(parts, np.unique(border[border > 0]))).astype(np.float32)
    if not LEAST_AREA <= mask.mean() <= MOST_AREA:
        return pixels
    # The subject's outermost pixels are mixed with the old background.
    mask = cv2.GaussianBlur(cv2.erode(mask, np.ones((3, 3), np.uint8)), (3, 3), 0.6)
    colours = [rng.uniform(0, 255, 3).astype(np.float32) for _ in range(2)]
    if rng.random() < 0.5:
        colours[1] = colours[0]
    scene = _scene((width, height), tuple(colours), rng)
    scale = rng.uniform(*MOVED)
    corner = rng.uniform(0, 1, 2) * (width, height) * (1 - scale)
    move = np.float32([[scale, 0, corner[0]], [0, scale, corner[1]]])
    moved = cv2.warpAffine(pixels, move, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.warpAffine(mask, move, (width, height), flags=cv2.INTER_LINEAR)[..., None]
    return np.clip(np.rint(moved * mask + scene * (1 - mask)), 0, 255).astype(np.uint8)


def viewpoint(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """The subject alone from another viewpoint: rotated about three axes, in perspective, never mirrored."""
    height, width = subject.pixels.shape[:2]
    yaw, pitch, roll = rng.choice([-1, 1], 3) * rng.uniform((12, 4, 2), (28, 14, 9)) * np.pi / 180
    left, top, right, bottom = subject.box
    centre = np.array([(left + right) / 2, (top + bottom) / 2])
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)
    flat = np.concatenate([corners - centre, np.zeros((4, 1))], 1)
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    turned = flat @ (about_z @ about_x @ about_y).T
    eye = 2.5 * max(height, width)
    seen = turned[:, :2] * (eye / (eye + turned[:, 2:]))
    # Centre it, and shrink it if it does not fit.
    seen -= (seen.min(0) + seen.max(0)) / 2
    seen *= min(1.0, 0.94 * min(np.array([width, height]) / np.ptp(seen, axis=0)))
    seen += [width / 2, height / 2]
    move = cv2.getPerspectiveTransform(np.float32(corners), np.float32(seen))
    fill = _edge_colour(subject)
    pixels = cv2.warpPerspective(
        np.clip(subject.alone(fill), 0, 255),
        move,
        (width, height),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=tuple(map(float, fill)),
    )
    return pixels


def _edge_colour(subject: Subject) -> np.ndarray:
    """f32[3]: white, or the colour of the image's edge if no subject was found."""
    if subject.mask is not None:
        return np.float32(WHITE)
    pixels = subject.pixels
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edge, axis=0).astype(np.float32)


def detail(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """A crop of the part of the subject with the most detail, enlarged to the image's size."""
    height, width = subject.pixels.shape[:2]
    left, top, right, bottom = subject.box
    share = rng.uniform(0.5, 0.7)
    # The window has the image's aspect ratio and covers that share of the subject's longer side.
    scale = min(1.0, share * max((right - left) / width, (bottom - top) / height))
    wide, high = max(8, round(scale * width)), max(8, round(scale * height))
    wide, high = min(wide, width), min(high, height)
    grey = cv2.cvtColor(subject.pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    edges = cv2.magnitude(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    weight = edges if subject.mask is None else edges * subject.mask + 8 * subject.mask
    total = cv2.integral(weight)
    score = total[high:, wide:] - total[:-high, wide:] - total[high:, :-wide] + total[:-high, :-wide]
    score = score * rng.uniform(0.9, 1.0, score.shape)  # choose at random among windows of similar score
    y, x = np.unravel_index(int(np.argmax(score)), score.shape)
    part = subject.pixels[y : y + high, x : x + wide]
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)


def scene(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """The subject in a room among other shapes, at about a third to a half of the image's sides."""
    height, width = subject.pixels.shape[:2]
    room = np.ascontiguousarray(_scene((width, height), (_pale(rng), _pale(rng)), rng), np.float32)
    for _ in range(int(rng.integers(2, 5))):
        centre = rng.uniform(0, 1, 2) * (width, height)
        half = rng.uniform(0.06, 0.2, 2) * min(width, height)
        colour = rng.uniform(30, 220, 3).tolist()
        first, last = (tuple(np.rint(centre + sign * half).astype(int).tolist()) for sign in (-1, 1))
        if rng.random() < 0.5:
            cv2.rectangle(room, first, last, colour, cv2.FILLED)
        else:
            axes = tuple(np.maximum(np.rint(half), 1).astype(int).tolist())
            cv2.ellipse(
                room, tuple(np.rint(centre).astype(int).tolist()), axes, rng.uniform(0, 180), 0, 360, colour, -1
            )
    left, top, right, bottom = subject.box
    scale = rng.uniform(0.35, 0.55) * min(width / (right - left), height / (bottom - top))
    corner = rng.uniform(0, 1, 2) * (width - scale * (right - left), height - scale * (bottom - top))
    move = np.float32([[scale, 0, corner[0] - scale * left], [0, scale, corner[1] - scale * top]])
    pixels = cv2.warpAffine(
        subject.pixels, move, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE
    )
    mask = cv2.warpAffine(subject.mask, move, (width, height), flags=cv2.INTER_LINEAR)
    return Subject(pixels, mask).alone(room)


NEED_SUBJECT = ("background", "scene")
"""The edits that are possible only if a subject was found."""

EDITS: dict[str, Callable[[Subject, np.random.Generator], np.ndarray]] = {
    "background": background,
    "viewpoint": viewpoint,
    "detail": detail,
    "scene": scene,
}
"""All edits of an image. Co-augmentation uses OPERATIONS, all but the last."""


def edited(picture: Image.Image, name: str, rng: np.random.Generator) -> Image.Image | None:
    """One of EDITS applied to an RGB image, in its size; None if the edit needs a subject and none was found."""
    if min(picture.size) < LEAST_SIDE:
        return None
    subject = subject_of(picture)
    if subject.mask is None and name in NEED_SUBJECT:
        return None
    return Image.fromarray(np.clip(np.rint(EDITS[name](subject, rng)), 0, 255).astype(np.uint8))


OPERATIONS = ("background", "viewpoint", "detail")


def expand(picture: Image.Image, count: int, rng: np.random.Generator) -> list[tuple[str, bytes]]:
    """I_1 … I_count of an RGB image, in its size, each as (operation, JPEG).

    Operations alternate in a random order. If no subject was found, the background is not changed.
    """
    subject = subject_of(picture)
    names = [name for name in OPERATIONS if name != "background" or subject.mask is not None]
    order = [names[index] for index in rng.permutation(len(names))]
    made = []
    for number in range(count):
        name = order[number % len(order)]
        pixels = np.clip(np.rint(EDITS[name](subject, rng)), 0, 255).astype(np.uint8)
        made.append((name, jpeg(Image.fromarray(pixels))))
    return made


def jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
