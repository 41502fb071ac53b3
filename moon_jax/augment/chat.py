"""Enriched titles by a multimodal language model, over any server of OpenAI's chat protocol: vLLM, SGLang,
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
"""Changes with PROMPT, or with how it is filled."""

PROMPT = f"""\
Rewrite the title of a product so that a shopper finds it: keep what it says, and add what the facts and the picture \
show of kind, colour, material, pattern, shape and use.
Rules: one line of at most {LONGEST_TITLE} characters, in the language of the title, beginning with the title's own \
words. No brand, model, number or size that title and facts do not hold. Words that you add are in lower case. No \
praise, no prices, no explanation, no quotation marks: the title alone.

Title: {{title}}
Facts: {{facts}}"""

LONGEST_SIDE = 512
"""Of the picture that is sent, in pixels."""

MOST_TOKENS = 160
"""Of an answer."""

SECONDS, TRIES = 120.0, 8
"""Of a request; how often one is tried again. The waits double up to eight seconds, or are what the server asks for."""


class Refused(Exception):
    """The server does not take this one request."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A server and its model. What a request asks follows from product and seed alone."""

    url: str
    model: str
    seconds: float = SECONDS
    tries: int = TRIES

    def request(self, product: Product, seed: int, max_pixels: int) -> dict[str, Any]:
        """The body of the request for a product's enriched title."""
        facts = json.dumps({name: list(values) for name, values in entities(product).items()}, ensure_ascii=False)
        asked = PROMPT.format(title=product.text, facts=facts)
        content: list[dict[str, Any]] = []
        if product.images:
            picture = decode(product.images[0], max_pixels)
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=90)
            data = base64.b64encode(stream.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
        content.append({"type": "text", "text": asked})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "seed": seed % 2**31,
            "max_tokens": MOST_TOKENS,
        }

    def client(self) -> Any:
        """The protocol's client; threads may share it. The key is $OPENAI_API_KEY, where a server wants one."""
        import openai  # behind an extra

        return openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.seconds,
            max_retries=self.tries,
        )

    def answer(self, client: Any, request: dict[str, Any]) -> str:
        """What the model says.

        Raises:
            Refused: to this request: too long, or of a kind that the model does not take.
            UserError: no such model there, or no permission.
            Unavailable: no answer, however often it was asked.
        """
        import openai

        try:
            given = client.chat.completions.create(**request)
        except (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError) as error:
            raise Unavailable(f"--text {self.url}: {_short(error)}; nothing done is lost, try again later") from None
        except openai.APIStatusError as error:
            if error.status_code in REFUSALS:
                raise Refused(_short(error)) from None
            raise UserError(
                f"--text {self.url}: {_short(error)}; give the server's own --text-model, and OPENAI_API_KEY if it"
                " wants one"
            ) from None
        except (openai.APIError, ValueError) as error:
            raise UserError(f"--text {self.url}: {_short(error)}; {FOREIGN}") from None
        if isinstance(given, str):
            raise UserError(f"--text {self.url}: {FOREIGN}")
        try:
            content = given.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError):
            raise Refused("an answer without a choice") from None
        if not isinstance(content, str):
            raise Refused("an answer that is no text")
        return content.encode("utf-8", "replace").decode()


REFUSALS = (400, 413, 422)
"""Statuses that are about one request alone: too long, or of a kind that the model does not take."""

FOREIGN = "what answers there does not speak OpenAI's protocol; its URL mostly ends in /v1"


def _short(error: Exception) -> str:
    """What an error says, without the key that it may repeat."""
    told = " ".join(str(error).split())
    key = os.environ.get("OPENAI_API_KEY")
    return ((told.replace(key, "…") if key else told)[:200] or type(error).__name__).rstrip(".")


def check(url: str, model: str) -> None:
    """
    Raises:
        UserError: no URL, no model is named, or the client is not installed.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--text {url}: give rules, none, or a server's URL such as http://localhost:8000/v1")
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        told = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise UserError(f"--text {told}: give no password in the URL, which is kept; OPENAI_API_KEY is not")
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(f"--text {url}: wants the openai client ({error}); pip install -e '.[openai]'") from None
    if not model:
        raise UserError(f"--text {url}: name the server's model by --text-model")
