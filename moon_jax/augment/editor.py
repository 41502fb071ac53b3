"""Expanded images by an image-editing pipeline of diffusers, such as Qwen-Image-Edit: `pip install -e '.[diffusers]'`.

As MOON2.0 (arXiv 2511.12449) has it: I_m, the picture edited down to its subject, then I_k = edit(I_m, T, prompt_k).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from moon_jax.augment.images import jpeg
from moon_jax.config import Prepare
from moon_jax.data.images import decode
from moon_jax.errors import UserError
from moon_jax.hub import folder as folder_lib

LONGEST_SIDE = Prepare().longest_side
"""Of what is kept, in pixels: no more than of the catalogue's own images."""

PROMPT_VERSION = "image-1"
"""Changes with the prompts."""

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
    """A pipeline: a folder, or hf://owner/name[@revision]. On one kind of device a picture follows from its seed."""

    model: str
    steps: int = 0  # of denoising; 0 leaves the pipeline's own number

    def signature(self) -> str:
        """Of the weights: names, sizes and times of a folder's files; of the hub's, the name says it."""
        if self.model.startswith(folder_lib.HUB):
            return self.model
        digest = hashlib.blake2b(digest_size=8)
        for path in sorted(path for path in Path(self.model).rglob("*") if path.is_file()):
            told = path.stat()
            digest.update(repr((str(path.relative_to(self.model)), told.st_size, told.st_mtime_ns)).encode())
        return digest.hexdigest()

    def load(self) -> Callable[[Image.Image, str, int], Image.Image]:
        """What edits a picture by a prompt and a seed. Weights are safetensors; no code of the folder is run.

        Raises:
            UserError: diffusers is not installed, or that is no pipeline which edits images.
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
        UserError: there is no pipeline, or one with code of its own; or diffusers is not installed.
    """
    if not model.startswith(folder_lib.HUB):
        if not (Path(model) / "model_index.json").is_file():
            raise UserError(
                f"--images {model}: no model_index.json there; give classical, none, a folder that diffusers saved, or"
                f" {folder_lib.HUB}owner/name"
            )
        code = next(Path(model).rglob("*.py"), None)
        if code:
            raise UserError(f"--images {model}: holds code, {code.relative_to(model)}, which is never run")
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"--images {model}: wants diffusers ({error}); pip install -e '.[diffusers]'") from None


def expand(
    edit: Callable[[Image.Image, str, int], Image.Image],
    picture: Image.Image,
    title: str,
    count: int,
    seed: int,
    kept: Callable[[str, Callable[[], bytes]], bytes],
) -> list[tuple[str, int, bytes]]:
    """I_1 … I_count of an RGB picture: what the prompt asked for, the seed of that edit and a JPEG each.

    Args:
        kept: (name, make) → bytes: what was made under that name before, or what `make` gives.
    """

    def edited(base: Image.Image, prompt: str, number: int) -> bytes:
        return jpeg(edit(base, prompt.format(title=title or "as in the picture"), seed + number))

    subject = kept("subject", lambda: edited(picture, SUBJECT, 0))
    made = []
    for number in range(1, count + 1):
        name = tuple(PROMPTS)[(number - 1) % len(PROMPTS)]
        base = decode(subject, 2**31)
        made.append((name, seed + number, kept(f"{number}", lambda b=base, n=name, k=number: edited(b, PROMPTS[n], k))))
    return made
