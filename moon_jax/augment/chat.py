"""Enriched titles from a multimodal language model behind any server with OpenAI's chat API: vLLM, SGLang,
`transformers serve`, or a hosted one. Needs `pip install -e '.[openai]'`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import urllib.parse
from typing import Any

from moon_jax.augment.text import LONGEST_TITLE, entities
from moon_jax.data.images import decode
from moon_jax.errors import Unavailable, UserError
from moon_jax.types import Product

PROMPT_VERSION = "title-1"
"""Must change whenever PROMPT, or the way it is filled, changes."""

PROMPT = f"""\
Rewrite the title of a product so that a shopper finds it: keep what it says, and add what the facts and the picture \
show of kind, colour, material, pattern, shape and use.
Rules: one line of at most {LONGEST_TITLE} characters, in the language of the title, beginning with the title's own \
words. No brand, model, number or size that title and facts do not hold. Words that you add are in lower case. No \
praise, no prices, no explanation, no quotation marks: the title alone.

Title: {{title}}
Facts: {{facts}}"""

LONGEST_SIDE = 512
"""Of the image that is sent, in pixels."""

MOST_TOKENS = 160
"""Of an answer."""

SECONDS, TRIES = 120.0, 8
"""Timeout of a request, and its retries. The waits double up to eight seconds, or follow the server's Retry-After."""


class Refused(Exception):
    """The server rejects this particular request."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A server and its model. A request depends on product and seed alone."""

    url: str
    model: str
    seconds: float = SECONDS
    tries: int = TRIES

    def request(self, product: Product, seed: int, max_pixels: int) -> dict[str, Any]:
        """The body of the request for a product's enriched title."""
        facts = json.dumps({name: list(values) for name, values in entities(product).items()}, ensure_ascii=False)
        prompt = PROMPT.format(title=product.text, facts=facts)
        content: list[dict[str, Any]] = []
        if product.images:
            picture = decode(product.images[0], max_pixels)
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=90)
            data = base64.b64encode(stream.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
        content.append({"type": "text", "text": prompt})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "seed": seed % 2**31,
            "max_tokens": MOST_TOKENS,
        }

    def client(self) -> Any:
        """A client of the API; threads may share it. If the server needs a key, it is read from $OPENAI_API_KEY."""
        import openai  # behind an extra

        return openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.seconds,
            max_retries=self.tries,
        )

    def answer(self, client: Any, request: dict[str, Any]) -> str:
        """The text of the model's answer.

        Raises:
            Refused: the server rejects this request: too long, or of a kind that the model does not take.
            UserError: the server has no such model, or denies permission.
            Unavailable: no answer after all retries.
        """
        import openai

        try:
            reply = client.chat.completions.create(**request)
        except (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError) as error:
            raise Unavailable(f"--text {self.url}: {_short(error)}; finished work is kept, try again later") from None
        except openai.APIStatusError as error:
            if error.status_code in REFUSALS:
                raise Refused(_short(error)) from None
            raise UserError(
                f"--text {self.url}: {_short(error)}; give a --text-model that the server has, and set OPENAI_API_KEY"
                " if it needs a key"
            ) from None
        except (openai.APIError, ValueError) as error:
            raise UserError(f"--text {self.url}: {_short(error)}; {FOREIGN}") from None
        if isinstance(reply, str):
            raise UserError(f"--text {self.url}: {FOREIGN}")
        try:
            content = reply.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError):
            raise Refused("the answer has no choices") from None
        if not isinstance(content, str):
            raise Refused("the answer is not text")
        return content.encode("utf-8", "replace").decode()


REFUSALS = (400, 413, 422)
"""HTTP statuses that concern one request only: too long, or of a kind that the model does not take."""

FOREIGN = "the server does not answer in OpenAI's format; give its API's URL, which usually ends in /v1"


def _short(error: Exception) -> str:
    """The error's message, shortened; the API key is removed if the message repeats it."""
    message = " ".join(str(error).split())
    key = os.environ.get("OPENAI_API_KEY")
    return ((message.replace(key, "…") if key else message)[:200] or type(error).__name__).rstrip(".")


def check(url: str, model: str) -> None:
    """
    Raises:
        UserError: `url` is not a URL or contains a password, `model` is empty, or the client is not installed.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--text {url}: give rules, none, or a server's URL such as http://localhost:8000/v1")
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise UserError(
            f"--text {shown}: the URL is stored, so it must not contain a password; set OPENAI_API_KEY instead, which"
            " is not stored"
        )
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(f"--text {url}: needs the openai client ({error}); pip install -e '.[openai]'") from None
    if not model:
        raise UserError(f"--text {url}: needs a model; give --text-model")
