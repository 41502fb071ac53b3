import io

import numpy as np
import pytest
from PIL import Image

from moon_jax.data import images
from tests.conftest import jpeg, tiny

RULE = images.ResizeRule.of(tiny())


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "LA", "1"])
def test_all_modes_become_rgb(mode):
    stream = io.BytesIO()
    Image.new("RGB", (10, 12), (200, 30, 30)).convert(mode).save(stream, "TIFF" if mode in ("CMYK", "LA") else "PNG")
    image = images.decode(stream.getvalue(), 1000)
    assert image.mode == "RGB" and image.size == (10, 12)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "I;16", "1", "CMYK"])
def test_transparency_and_modes_equal_transformers_image_processors(mode):
    """Cut-out products get a white background, not the colours hidden in their transparent pixels."""
    processors = pytest.importorskip("tests.reference", reason="torch is not installed").transformers
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 48, 4), np.uint8))
    stream = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 65536, (32, 48), np.uint16)).save(stream, "PNG")
    elif mode == "P":
        picture.convert("RGB").quantize(16).save(stream, "PNG", transparency=3)
    elif mode in ("L", "RGB"):  # one colour is marked as transparent
        key = 7 if mode == "L" else tuple(int(value) for value in np.asarray(picture)[0, 0, :3])
        picture.convert("RGB").convert(mode).save(stream, "PNG", transparency=key)
    elif mode == "PA":
        picture.convert("LA").save(stream, "PNG")
    else:
        picture.convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
    processor = processors.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    theirs = processor(images=[Image.open(stream)], return_tensors="np")["pixel_values"].reshape(-1, 3, 2, 8, 8)[
        :, :, 0
    ]
    rule = images.ResizeRule(8, 2, 1, 10**6, within_budget=True)
    ours = images.patchify(images.decode(stream.getvalue(), 10**6), rule).pixels
    np.testing.assert_allclose(ours.reshape(theirs.shape) / 127.5 - 1, theirs, atol=1e-6)


def test_orientation_tags_are_applied():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90°
    Image.new("RGB", (10, 20)).save(stream, "JPEG", exif=exif)
    assert images.decode(stream.getvalue(), 1000).size == (20, 10)


@pytest.mark.parametrize("source", [b"", b"nonsense", jpeg((1, 2, 3), (20, 20), 0)[:300], "/nowhere.jpg", 7])
def test_invalid_images_raise_bad_image(source):
    with pytest.raises(images.BadImage):
        images.decode(source, 10**6)


def test_a_file_and_its_bytes_give_the_same_image(tmp_path):
    data = jpeg((1, 2, 3), (20, 20), 0)
    (tmp_path / "a.jpg").write_bytes(data)
    np.testing.assert_array_equal(images.decode(data, 1000), images.decode(tmp_path / "a.jpg", 1000))


def test_every_aspect_ratio_stays_within_the_budget():
    for budget in (1, 2, 6, 9, 40):
        rule = images.ResizeRule(8, 2, 256 * max(1, budget // 2), 256 * budget, within_budget=True)
        for height in (1, 3, 17, 60, 333, 2000):
            for width in (1, 5, 16, 61, 400):
                high, wide = rule.size(height, width)
                assert 0 < high * wide <= rule.max_pixels and high % 16 == wide % 16 == 0


def test_any_accepted_image_can_be_cropped():
    images.check_shape(10, 2000)
    with pytest.raises(images.BadImage, match="more elongated than 200:1"):
        images.check_shape(1, 201)
    image, rng = Image.new("RGB", (2000, 10)), np.random.default_rng(0)
    for _ in range(100):
        assert len(images.patchify(image, RULE, images.crop_box(2000, 10, (0.6, 0.9), rng)).pixels) > 0


def test_formats_that_run_other_programs_are_not_opened():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    with pytest.raises(images.BadImage, match="not one of JPEG"):
        images.decode(script, 1000)


def test_patches_in_merge_block_order():
    # A 4 x 4 grid of 8-pixel patches with grey value row · 4 + column.
    grey = np.kron(np.arange(16).reshape(4, 4), np.ones((8, 8))).astype(np.uint8)
    rule = images.ResizeRule(8, 2, 256, 16 * 256, within_budget=True)
    patches = images.patchify(Image.fromarray(np.stack([grey] * 3, -1)), rule)
    assert patches.hw == (4, 4)
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert patches.pixels[:, 0].tolist() == order
    assert (patches.yx[:, 0] * 4 + patches.yx[:, 1]).tolist() == order


def test_crops_have_the_requested_area_and_aspect_ratio():
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = images.crop_box(60, 80, (0.6, 0.9), rng)
        assert 0 <= left < right <= 60 + 1e-9 and 0 <= top < bottom <= 80 + 1e-9
        assert 0.6 <= (right - left) * (bottom - top) / 4800 <= 0.9
        assert (right - left) / (bottom - top) == pytest.approx(0.75)
