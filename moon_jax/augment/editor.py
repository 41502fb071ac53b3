"""Expanded images from an image-editing pipeline of diffusers, such as Qwen-Image-Edit.

Needs `pip install -e '.[diffusers]'`. As in MOON2.0 (arXiv 2511.12449): first I_m, the image reduced to its subject,
then I_k = edit(I_m, T, prompt_k).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from moon_jax.config import Prepare
from moon_jax.data.editing import jpeg
from moon_jax.data.images import decode
from moon_jax.errors import UserError
from moon_jax.hub import folder as folder_lib

LONGEST_SIDE = Prepare().longest_side
"""Of the stored images, in pixels: the limit of the catalogue's own images."""

PROMPT_VERSION = "image-1"
"""Must change whenever the prompts change."""

SUBJECT = (
    "Keep only the product, {title}, exactly as it is, on a plain white background. Remove people, hands, other"
    " objects, text overlays, logos of shops and watermarks."
)
PROMPTS = {
    "background": "Show exactly this product, {title}, in a natural everyday setting that fits it. Do not change the"
    " product.",
    "viewpoint": "Show exactly this product, {title}, from another viewpoint, on a plain background. Do not change its"
    " colours, pattern, logo and parts.",
    "detail": "Show a close-up of exactly this product, {title}, with its logo, material and finest details sharp. Do"
    " not change the product.",
}


@dataclasses.dataclass(frozen=True)
class Editor:
    """A pipeline: a folder, or hf://owner/name[@revision]. The same seed gives the same image on one kind of device."""

    model: str
    steps: int = 0  # of denoising; 0 uses the pipeline's default

    def signature(self) -> str:
        """Identifies the weights: for a folder by names, sizes and times of its files, for the hub by the name."""
        if self.model.startswith(folder_lib.HUB):
            return self.model
        digest = hashlib.blake2b(digest_size=8)
        for path in sorted(path for path in Path(self.model).rglob("*") if path.is_file()):
            stat = path.stat()
            digest.update(repr((str(path.relative_to(self.model)), stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()

    def load(self) -> Callable[[Image.Image, str, int], Image.Image]:
        """Returns edit(picture, prompt, seed). Reads safetensors only and runs no code from the folder.

        Raises:
            UserError: diffusers is not installed, or the model is not an image-editing pipeline.
        """
        check(self.model)
        import diffusers
        import torch

        hub = self.model.startswith(folder_lib.HUB)
        name, _, revision = self.model.removeprefix(folder_lib.HUB).partition("@") if hub else (self.model, "", "")
        accelerated = torch.cuda.is_available()
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                name,
                revision=revision or None,
                local_files_only=not hub,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.bfloat16 if accelerated else torch.float32,
            )
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise UserError(f"--images {self.model}: {' '.join(str(error).split())[:300]}") from None
        pipeline.set_progress_bar_config(disable=True)
        diffusers.utils.logging.set_verbosity_error()
        if accelerated:
            pipeline.to("cuda")

        def edit(picture: Image.Image, prompt: str, seed: int) -> Image.Image:
            options: dict[str, Any] = {"num_inference_steps": self.steps} if self.steps else {}
            generator = torch.Generator("cpu").manual_seed(seed)
            edited = pipeline(image=picture, prompt=prompt, generator=generator, **options).images[0].convert("RGB")
            edited.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            return edited

        return edit


def check(model: str) -> None:
    """
    Raises:
        UserError: there is no pipeline, the pipeline contains code, or diffusers is not installed.
    """
    if not model.startswith(folder_lib.HUB):
        if not (Path(model) / "model_index.json").is_file():
            raise UserError(
                f"--images {model}: has no model_index.json; give classical, none, a folder that diffusers saved, or"
                f" {folder_lib.HUB}owner/name"
            )
        code = next(Path(model).rglob("*.py"), None)
        if code:
            raise UserError(
                f"--images {model}: contains code ({code.relative_to(model)}), which is never run; give a pipeline"
                " without code"
            )
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"--images {model}: needs diffusers ({error}); pip install -e '.[diffusers]'") from None


def expand(
    edit: Callable[[Image.Image, str, int], Image.Image],
    picture: Image.Image,
    title: str,
    count: int,
    seed: int,
    cache: Callable[[str, Callable[[], bytes]], bytes],
) -> list[tuple[str, int, bytes]]:
    """I_1 … I_count of an RGB image, each as (operation, seed of the edit, JPEG).

    Args:
        cache: (name, make) → bytes: the bytes stored under that name, or else the result of `make`.
    """

    def edited(base: Image.Image, prompt: str, number: int) -> bytes:
        return jpeg(edit(base, prompt.format(title=title or "as in the picture"), seed + number))

    subject = cache("subject", lambda: edited(picture, SUBJECT, 0))
    made = []
    for number in range(1, count + 1):
        name = tuple(PROMPTS)[(number - 1) % len(PROMPTS)]
        base = decode(subject, 2**31)
        image = cache(f"{number}", lambda b=base, n=name, k=number: edited(b, PROMPTS[n], k))
        made.append((name, seed + number, image))
    return made
