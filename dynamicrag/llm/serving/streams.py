"""Replies of an OpenAI-compatible server as a stream, put together as if they had come as a whole."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from dynamicrag.llm.endpoint import gave_reasoning, usable


class StreamedClient:
    """A client of OpenAI whose chat completions are streamed.

    `say` gets the text so far. A server that does not stream is asked again without it, and `streams` is False from then on.
    """

    def __init__(self, client: Any):
        self._client, self.streams = client, True

    def saying(self, say: Callable[[str], None]) -> Any:
        """Return a client that has `chat.completions.create` only."""

        async def create(**options: Any) -> Any:
            import openai

            if self.streams:
                try:
                    if (reply := await self._streamed(options, say)) is not None:
                        return reply
                except openai.BadRequestError as error:
                    if "stream" not in str(error.body):
                        raise
                self.streams = False
            return await self._client.chat.completions.create(**options)

        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))

    async def _streamed(self, options: dict[str, Any], say: Callable[[str], None]) -> Any | None:
        """Return the completion of one choice, or None if no part of it came."""
        text, refusal, finish, usage, reasoned, parts = "", "", None, None, False, 0
        async for part in await self._client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
            parts, usage = parts + 1, getattr(part, "usage", None) or usage
            for choice in (part.choices or ())[:1]:
                finish, reasoned = choice.finish_reason or finish, reasoned or gave_reasoning(choice.delta)
                text, refusal = text + (usable(choice.delta.content) or ""), refusal + (getattr(choice.delta, "refusal", None) or "")
            say(text)
        message = SimpleNamespace(content=text or None, refusal=refusal or None, reasoning_content=reasoned)
        return SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason=finish)], usage=usage) if parts else None
