"""Expansions find and keep the subject, change the rest, and depend on the seed alone."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from moon_jax.data import editing
from moon_jax.data.images import decode

SIZE = (120, 90)
INK, PAPER = (190, 40, 40), (245, 245, 242)


def picture(badge: bool = False, noise: float = 1.5, size: tuple[int, int] = SIZE) -> tuple[Image.Image, np.ndarray]:
    """A red jug with a dark mark on its left, on paper; and its true mask."""
    shape, truth = Image.new("RGB", size, PAPER), Image.new("L", size)
    for image, colour in ((shape, INK), (truth, 1)):
        draw = ImageDraw.Draw(image)
        draw.ellipse((40, 20, 85, 75), fill=colour)
        draw.rectangle((55, 10, 70, 30), fill=colour)
    draw = ImageDraw.Draw(shape)
    draw.rectangle((46, 42, 56, 54), fill=(20, 20, 60))
    if badge:
        draw.rectangle((4, 4, 14, 10), fill=(20, 120, 200))
    pixels = np.asarray(shape) + np.random.default_rng(0).normal(0, noise, (size[1], size[0], 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), np.asarray(truth).astype(bool)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize("badge", [False, True])
def test_the_subject_is_found_without_the_badge(badge):
    shown, truth = picture(badge)
    subject = editing.subject_of(shown)
    assert overlap(subject.mask > 0.5, truth) > 0.9
    assert subject.mask[:14, :20].max() == 0
    left, top, right, bottom = subject.box
    assert abs(left - 40) <= 2 and abs(top - 10) <= 2 and abs(right - 86) <= 2 and abs(bottom - 76) <= 2
    alone = subject.alone((0, 0, 255))
    assert np.abs(alone[2, 2] - [0, 0, 255]).max() < 1 and np.abs(alone[60, 70] - INK).max() < 12


def test_a_white_subject_on_white_is_kept_whole():
    """Only its outline is visible; the area inside is not background even though it has the same colour."""
    shown = Image.new("RGB", SIZE, (255, 255, 255))
    draw = ImageDraw.Draw(shown)
    draw.ellipse((30, 15, 90, 75), fill=(255, 255, 255), outline=(150, 150, 150), width=3)
    mask = editing.subject_of(shown).mask
    assert mask[45, 60] == 1 and mask[:8].max() == 0


def test_the_subject_is_found_on_a_varied_wall_but_not_in_noise():
    noise = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    assert editing.subject_of(Image.fromarray(noise)).mask is None
    assert editing.subject_of(Image.new("RGB", SIZE, "teal")).mask is None
    assert editing.subject_of(Image.new("RGB", (12, 300), "teal")).mask is None
    wall = np.zeros((90, 120, 3))
    wall[..., 1] = np.linspace(60, 200, 120)
    wall[..., 2] = np.linspace(60, 200, 90)[:, None]
    shown, truth = picture(noise=0)
    pixels = np.where(truth[..., None], np.asarray(shown), wall) + np.random.default_rng(2).normal(0, 2, wall.shape)
    shown_again = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    mask = editing.subject_of(shown_again).mask
    assert overlap(mask > 0.5, truth) > 0.85
    # GrabCut uses random numbers; the state of OpenCV's generator must not matter.
    cv2.setRNGSeed(12345)
    np.testing.assert_array_equal(editing.subject_of(shown_again).mask, mask)


def red(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] > 140) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)


def dark(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(-1) < 90


def test_another_background_keeps_the_subject():
    shown, truth = picture()
    made = [editing.background(editing.subject_of(shown), np.random.default_rng(seed)) for seed in range(12)]
    for pixels in made:
        assert pixels.shape == (90, 120, 3)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.abs(corners - PAPER).max() > 8
        assert 0.5 * truth.sum() < (red(pixels) | dark(pixels)).sum() < 1.1 * truth.sum()
    assert len({pixels.tobytes() for pixels in made}) == len(made)


def test_another_viewpoint_shows_the_whole_subject_unmirrored():
    shown, truth = picture()
    for seed in range(12):
        pixels = editing.viewpoint(editing.subject_of(shown), np.random.default_rng(seed))
        assert 0.55 * truth.sum() < (red(pixels) | dark(pixels)).sum() < 1.8 * truth.sum()
        # The mark is still left of the middle.
        assert np.nonzero(dark(pixels))[1].mean() < np.nonzero(red(pixels))[1].mean() - 2
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert not red(border).any()


def test_a_detail_is_an_enlarged_part_of_the_subject():
    shown, _ = picture()
    for seed in range(12):
        pixels = editing.detail(editing.subject_of(shown), np.random.default_rng(seed))
        assert pixels.shape == (90, 120, 3) and (red(pixels) | dark(pixels)).mean() > 0.45
        assert dark(pixels).sum() > 1.5 * dark(np.asarray(shown)).sum()


def test_expansions_depend_on_the_seed_and_alternate():
    shown, _ = picture()
    first, again = (editing.expand(shown, 5, np.random.default_rng(7)) for _ in range(2))
    assert first == again and first != editing.expand(shown, 5, np.random.default_rng(8))
    names = [name for name, _ in first]
    assert set(names[:3]) == set(editing.OPERATIONS) and names[3:] == names[:2]
    assert len({image for _, image in first}) == 5
    for _, image in first:
        assert decode(image, 10**6).size == SIZE and Image.open(io.BytesIO(image)).format == "JPEG"
    plain = editing.expand(Image.new("RGB", SIZE, "teal"), 4, np.random.default_rng(0))
    assert [name for name, _ in plain].count("background") == 0


@pytest.mark.parametrize("size", [(16, 16), (16, 1000), (1000, 16), (17, 90), (2000, 1500)])
def test_images_of_any_size_are_expanded(size):
    noise = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    for shown in (Image.fromarray(noise), Image.new("RGB", size, "white"), picture()[0].resize(size)):
        for _, image in editing.expand(shown, 3, np.random.default_rng(0)):
            assert decode(image, 10**7).size == size


def test_a_plain_background_is_replaced_and_the_subject_stays():
    shown, truth = picture()
    pixels = np.asarray(shown)
    rng, changed, kept = np.random.default_rng(0), [], []
    for _ in range(20):
        found = editing.replace_background(pixels, rng)
        assert found.shape == pixels.shape and found.dtype == np.uint8
        changed.append(np.abs(found[:4].astype(int) - pixels[:4]).mean())
        kept.append((np.abs(found.astype(int) - INK).max(2) < 25).sum() / truth.sum())
    assert np.mean(np.array(changed) > 20) > 0.8
    # At 75% to 100% of the sides, so 56% to 100% of the area, less the dark mark on the jug and the blended edge.
    assert min(kept) > 0.4 and max(kept) < 1.05
    again = editing.replace_background(pixels, np.random.default_rng(3))
    np.testing.assert_array_equal(again, editing.replace_background(pixels, np.random.default_rng(3)))


def test_a_replaced_background_leaves_no_trace_of_the_old_one():
    """The subject's edge, mixed with the old white, is not carried over."""
    size = 64
    y, x = np.mgrid[:size, :size]
    inside = np.clip(18 - np.hypot(y - 32, x - 32) + 0.5, 0, 1)[..., None]  # a disc with a soft edge
    pixels = np.rint(255 - inside * 225).astype(np.uint8).repeat(3, axis=2)
    rng, traces = np.random.default_rng(0), []
    for _ in range(120):
        found = editing.replace_background(pixels, rng).astype(int)
        if found[:3].max() < 150:  # a dark scene
            traces.append((found.min(2) > 165).sum())
    assert len(traces) > 3 and max(traces) == 0


def test_an_image_without_a_plain_background_or_without_a_subject_stays():
    noise = np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    empty = np.full((30, 40, 3), 200, np.uint8)
    for pixels in (noise, empty):
        assert editing.replace_background(pixels, np.random.default_rng(0)) is pixels


def test_a_scene_shows_the_subject_smaller_among_other_things():
    shown, truth = picture()
    found = np.asarray(editing.edited(shown, "scene", np.random.default_rng(5)))
    red = np.abs(found.astype(int) - INK).max(2) < 30
    assert 0.05 * truth.sum() < red.sum() < 0.5 * truth.sum()
    assert np.abs(found[:, 0].astype(int) - PAPER).mean() > 5


def test_an_edit_that_needs_a_subject_gives_nothing_without_one():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    for name in editing.EDITS:
        assert (editing.edited(noise, name, np.random.default_rng(0)) is None) == (name in ("background", "scene"))
    assert editing.edited(noise.resize((12, 12)), "detail", np.random.default_rng(0)) is None
