"""Bodies of requests, and the documents in them. Keys that a client sends and this server does not know are ignored."""

from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, StringConstraints, field_validator

from dynamicrag.llm.serving.refusals import Refusal
from dynamicrag.rows.row import Doc
from dynamicrag.rows.tasks import known_task

Text = Annotated[str, StringConstraints(pattern=r"\S")]
Given = str | dict[str, Any]  # a document: its text, or an object with `text`


class Rerank(BaseModel):
    """A body of /v1/rerank and /v2/rerank, as clients of Jina and Cohere send it."""

    query: Text
    documents: list[Given] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None
    rank_fields: list[str] | None = None


class Answer(BaseModel):
    """A body of /v1/answer. Without documents, the server's corpus is searched."""

    question: Text
    documents: list[Given] | None = None
    dataset: str | None = None
    id: str | None = None
    stream: bool = False

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and known_task(name) is None:
            raise ValueError("unknown data set")
        return name


class Message(BaseModel):
    """A message of a chat; its content is a text or a list of parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        """Return the text of the message, without parts of other kinds."""
        if isinstance(self.content, list):
            return "\n".join(part["text"] for part in self.content if part.get("type") == "text" and isinstance(part.get("text"), str))
        return self.content or ""


class StreamOptions(BaseModel):
    include_usage: bool = False


class Chat(BaseModel):
    """A body of /v1/chat/completions. The answer's form is the server's: options of sampling are ignored."""

    messages: list[Message] = Field(min_length=1)
    documents: list[Given] | None = None
    n: int | None = Field(None, ge=1, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def question(self) -> str:
        """Return the text of the last user message. Raises Refusal if it has none."""
        text = next((message.text() for message in reversed(self.messages) if message.role == "user"), "")
        if not text.strip():
            raise Refusal(422, "invalid_request", "messages: expected a user message with text")
        return text


def docs_of(given: Sequence[Given], limit: int, fields: Sequence[str] | None = None) -> list[Doc]:
    """Return the documents that a client sent, with their own ids if all are different texts, or else their numbers from 0.

    `fields` are the keys of an object that make its text (Cohere's rank_fields), by default `text`. Raises Refusal for
    more than `limit` documents and for a document without text.
    """
    if len(given) > limit:
        raise Refusal(413, "too_many_documents", f"documents: {len(given)} are more than {limit}, the limit of this server")
    names = [doc.get("id") if isinstance(doc, dict) else None for doc in given]
    own = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
    docs = []
    for number, (doc, name) in enumerate(zip(given, names, strict=True)):
        doc = {"text": doc} if isinstance(doc, str) else doc
        title = doc.get("title")
        text = "\n".join(str(doc[field]) for field in fields if field in doc) if fields else doc.get("text")
        if not isinstance(text, str) or not text.strip():
            raise Refusal(422, "invalid_request", f"documents.{number}: expected a text, or an object with a text in {', '.join(fields or ['text'])}")
        in_text = fields and "title" in fields
        docs.append({"id": name if own else str(number), "title": title if isinstance(title, str) and not in_text else "", "text": text})
    return cast(list[Doc], docs)
