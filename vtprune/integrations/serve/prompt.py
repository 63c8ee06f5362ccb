"""Messages made into the tensors that `generate` takes, and kept tokens into places on the picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from vtprune import panels
from vtprune.evals.accuracy.exam import turn
from vtprune.integrations.serve.errors import RequestError
from vtprune.integrations.serve.limits import Limits
from vtprune.integrations.serve.media import MediaReader
from vtprune.integrations.serve.model import ServedModel
from vtprune.integrations.serve.parts import ChatCompletionHandler
from vtprune.places import boxes

Size = tuple[int, int]
# What a template or a processor raises where a message is not as the model's family wants it.
UNFIT = (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError)


@dataclass
class Prompt:
    """A request's pictures and films in the order in which they stand in the messages, and the text around them."""

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    films: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, served: ServedModel, messages: list[dict[str, Any]], limits: Limits) -> Prompt:
        """Decode the media of a request. Raises RequestError that names the part at fault."""
        try:
            made = ChatCompletionHandler.get_processor_inputs_from_messages(messages, served.modality)
        except UNFIT as error:  # calls of tools that are not as OpenAI has them
            raise RequestError(f"messages: {type(error).__name__}: {error!s:.200}", param="messages") from error
        prompt, reader = cls(made), MediaReader(limits)
        for message in made:
            for part in message["content"]:
                prompt._take(part, served, reader)
        return prompt

    def _take(self, part: dict[str, Any], served: ServedModel, reader: MediaReader) -> None:
        if part["type"] == "text":
            _check_text(part["text"], served.processor)
        elif part["type"] == "image":
            self.images.append(reader.picture(part.pop("url"), f"image {len(self.images) + 1}"))
        elif part["type"] == "video":
            name = f"video {len(self.films) + 1}"
            if not served.takes_films:
                raise RequestError(f"{name}: the model {served.name!r} takes no videos: send pictures")
            self.films.append(reader.film(part.pop("url"), name))

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of every picture, [] where there is a film, whose tokens nothing places on a picture."""
        return [] if self.films else [image.size for image in self.images]

    def inputs(self, served: ServedModel, fields: dict[str, Any]) -> Any:
        """The tensors [1, ...] of the prompt on the host. Raises RequestError."""
        options = fields.get("chat_template_kwargs", {})
        reserved = sorted(options.keys() & inspect.signature(served.reader.apply_chat_template).parameters.keys())
        if reserved:
            message = f"chat_template_kwargs: {', '.join(reserved)} cannot be set by a request"
            raise RequestError(message, param="chat_template_kwargs")
        try:
            text = served.reader.apply_chat_template(
                self.messages, add_generation_prompt=True, tokenize=False, tools=fields.get("tools"), **options
            )
            return tensors(served.reader, text, self.images, self.films)
        except UNFIT as error:
            raise RequestError(f"this model cannot take these messages: {error!s:.300}", param="messages") from error


def tensors(processor: Any, text: str, images: Sequence[Any], films: Sequence[Any] = ()) -> Any:
    """What a processor makes of a text and the media that it has places for."""
    media: dict[str, Any] = {}
    if images:
        media["images"] = [list(images)]
    if films:  # their frames have been chosen
        media |= {"videos": [[f.frames for f in films]], "video_metadata": [[f.metadata for f in films]]}
        media["do_sample_frames"] = False
    begins = processor.tokenizer.bos_token
    has_begin = bool(begins) and text.startswith(begins)
    return processor(text=[text], **media, return_tensors="pt", add_special_tokens=not has_begin)


def _check_text(text: str, processor: Any) -> None:
    """A placeholder in a text would be taken for a place of a picture."""
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if token and token in text:
            raise RequestError(
                f"a text holds {token!r}, which stands for a picture or a film in this model's prompts: leave it out, "
                "and send them as parts of the message",
                param="messages",
            )


def drawn(served: ServedModel, sizes: Sequence[Size], units: Sequence[panels.Kept]) -> list[dict[str, Any]]:
    """Where the kept tokens of each picture stand on it: its panels; none where no place is known.

    sizes: `Prompt.sizes`. units: what was kept of every picture and film.
    """
    if len(sizes) == 1:  # its crops may be units of their own
        units = [panels.joined(units)]
    if len(units) != len(sizes):
        return [_told(unit, []) for unit in units]
    return [_told(unit, _panels(served, size, unit)) for size, unit in zip(sizes, units)]


def _panels(served: ServedModel, size: Size, unit: panels.Kept) -> list[panels.Panel]:
    asked = turn(served.reader, "?")
    try:
        places = boxes(lambda seen: tensors(served.reader, asked, [seen]), size, panels.rasters(unit))
        return panels.panels(unit, size[0] / size[1], places)
    except ValueError:  # a family whose tokens cannot be placed on a picture
        return []


def _told(unit: panels.Kept, parts: Sequence[panels.Panel]) -> dict[str, Any]:
    """As JSON. Edges are shares of the picture's width (xs) and height (ys)."""
    told = [
        {
            "title": part.title,
            "rows": part.rows,
            "cols": part.cols,
            "kept": [int(flag) for flag in part.kept],
            "merged": [int(flag) for flag in part.merged],
            "xs": [round(float(x), 5) for x in part.edges()[0]],
            "ys": [round(float(y), 5) for y in part.edges()[1]],
        }
        for part in parts
    ]
    return {"tokens": unit.n, "kept": unit.idx.tolist(), "grid": unit.grid, "panels": told}
