"""From chats and images to what the model reads: tiles of pixels, and one placeholder per image token."""

from collections.abc import Mapping, Sequence
from functools import wraps
from math import isqrt
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData

from core.deadline import deadline
from core.model.configuration import BLOCK
from core.model.image_patches import SailVL2AnyResImageProcessor
from core.model.image_tiles import SailVL2ImageProcessor, decisive_sizes
from core.model.tokenizer import IMAGE_END, IMAGE_START, IMAGE_TOKEN, token_id
from core.model.videos import Frame, tiles


class SailVL2Processor(ProcessorMixin):
    """Image processor and tokenizer of a core in one call.

    `image_seq_length` is the number of language-model tokens per tile (`config.image_seq_length`). Images are cut into
    tiles by InternVL's rule (core/model/image_tiles.py). Pillow always does the resizing, so the pixels are the same
    with and without torchvision, in the trainer and in vLLM.

    With a SailVL2AnyResImageProcessor an image is one grid of patches of its own size, four of which make a token.
    """

    def __init__(
        self,
        image_processor: SailVL2ImageProcessor | SailVL2AnyResImageProcessor | None = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ):
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.any_resolution = isinstance(image_processor, SailVL2AnyResImageProcessor)
        self.image_token, self.image_token_id = IMAGE_TOKEN, token_id(tokenizer, IMAGE_TOKEN)
        # Ids of the tokens of an expanded image, which `mm_token_type_ids` marks.
        self.image_token_ids = [
            self.image_token_id,
            *(token_id(tokenizer, token) for token in (IMAGE_START, IMAGE_END)),
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` (rows, tokens), and `pixel_values` (tiles, 3, size, size) of any images.

        At any resolution: `pixel_values` (patches, 3 * patch_size**2) and `image_grid_thw` (images, 3).

        `images` is one list per row of `text` (an empty list or None for a row without images), or a flat list in
        reading order. Each `<IMG_CONTEXT>` in a row becomes `<img>`, the image tokens of its tiles, and `</img>`. The
        tiles of all rows are concatenated in order. A video is given as its frames (core.model.videos).

        Raises ValueError if a row's placeholders and images differ in number, or there is no text.
        """
        if videos is not None or audio is not None:
            raise ValueError("a SAIL-VL2 core reads images and text; give a video as its frames")
        if text is None:
            raise ValueError(
                "text is missing: a SAIL-VL2 core reads images inside a text, one placeholder each"
            )
        rows = [text] if isinstance(text, str) else list(text)
        images = _checked(images, rows)
        images = tiles(images, self.frame_px) if images else images
        wants_expansions = kwargs.pop("return_text_replacement_offsets", False)
        inputs = super().__call__(images=images, text=rows, return_text_replacement_offsets=True, **kwargs)
        expansions = inputs.pop("text_replacement_offsets")
        if "offset_mapping" in inputs:
            _refer_to_given_text(inputs["offset_mapping"], expansions, rows)
        if wants_expansions:
            inputs["text_replacement_offsets"] = expansions
        return inputs

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        processed = self.image_processor(images, **kwargs)
        return processed, [self.replace_image_token(processed, place) for place in range(len(images))]

    @wraps(ProcessorMixin.apply_chat_template)
    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        """As transformers'. Raises TooSlow for a template that does not end: it came with the checkpoint."""
        with deadline("chat_template.jinja of the core: use another template"):
            return super().apply_chat_template(*arguments, **options)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **_: Any) -> str:
        """The text that replaces the placeholder of the image at `image_idx` of the call."""
        tokens = self._image_tokens(int(image_inputs["num_patches"][image_idx]))
        return f"{IMAGE_START}{IMAGE_TOKEN * tokens}{IMAGE_END}"

    def _image_tokens(self, count: int) -> int:
        """Image tokens of an image with `count` tiles, or at any resolution with `count` patches."""
        return count // BLOCK**2 if self.any_resolution else count * self.image_seq_length

    @property
    def frame_px(self) -> int:
        """Side in pixels of the tile that a frame of a video is; it has `image_seq_length` tokens."""
        if self.any_resolution:
            return isqrt(self.image_seq_length) * BLOCK * self.image_processor.patch_size
        return self.image_processor.size["height"]

    @property
    def unused_input_names(self) -> list[str]:
        """The counts of tiles or patches per image: only the expansion uses them, not the model."""
        return ["num_patches"]

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts of tokens and tiles (or patches) of images of the given (height, width), for vLLM."""
        if image_sizes is None:
            return MultiModalData()
        counts = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        # Besides the image tokens there are <img> and </img>.
        return MultiModalData(
            num_image_tokens=[2 + self._image_tokens(count) for count in counts], num_image_patches=counts
        )

    def image_lengths(self, images: Sequence[Any]) -> list[int]:
        """Tokens of each image or frame, `<img>` and `</img>` included; no pixel is read."""
        frame = (self.frame_px, self.frame_px)
        sizes = [frame if isinstance(image, Frame) else (image.height, image.width) for image in images]
        return list(self._get_num_multimodal_tokens(sizes)["num_image_tokens"] or ())

    def costliest_image(self) -> tuple[int, int]:
        """(height, width) of an image with the most tokens; among those, of one with few pixels."""
        size, most = dict(self.image_processor.size), getattr(self.image_processor, "max_patches", 1)
        side = size.get("longest_edge") or size["height"]  # longest_edge is set at any resolution
        grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
        sizes = [(side * rows, side * columns) for rows, columns in grids]
        if getattr(self.image_processor, "use_msac", False):
            sizes += decisive_sizes(side, self.image_processor.min_patches, most)
        tokens = dict(zip(sizes, self._get_num_multimodal_tokens(sizes)["num_image_tokens"], strict=True))
        return max(sizes, key=lambda size: (tokens[size], -size[0] * size[1], -abs(size[0] - size[1])))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        folder, subfolder = pretrained_model_name_or_path, kwargs.pop("subfolder", "")
        saved, _ = SailVL2ImageProcessor.get_image_processor_dict(folder, subfolder=subfolder, **kwargs)
        any_resolution = saved.get("image_processor_type") == SailVL2AnyResImageProcessor.__name__
        images: Any = SailVL2AnyResImageProcessor if any_resolution else SailVL2ImageProcessor
        image_processor = images.from_pretrained(folder, subfolder=subfolder, **kwargs)
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", folder, subfolder=subfolder, **kwargs)
        for key in ("is_local", "local_files_only"):  # its location is not part of the tokenizer
            tokenizer.init_kwargs.pop(key, None)
        return [image_processor, tokenizer]


def _checked(images: Any, rows: Sequence[str]) -> list[Any] | None:
    """The images in reading order, or None. Raises ValueError if their number differs from the placeholders'."""
    placeholders = [row.count(IMAGE_TOKEN) for row in rows]
    if images is not None and not isinstance(images, list | tuple):
        images = [images]
    nested = bool(images) and any(group is None or isinstance(group, list | tuple) for group in images)
    if not nested:
        flat = list(images or ())
        if len(flat) != sum(placeholders):
            raise ValueError(
                f"{len(flat)} images for {sum(placeholders)} {IMAGE_TOKEN} placeholders in {len(rows)} rows: "
                "give each row one placeholder per image"
            )
        return flat or None
    groups = [list(group or ()) for group in images]
    if len(groups) != len(rows):
        raise ValueError(f"{len(groups)} lists of images for {len(rows)} rows of text: give one list per row")
    for index, (group, count) in enumerate(zip(groups, placeholders, strict=True)):
        if len(group) != count:
            raise ValueError(
                f"row {index}: {len(group)} images for {count} {IMAGE_TOKEN} placeholders: give one per image"
            )
    return [image for group in groups for image in group] or None


def _refer_to_given_text(
    offsets: Any, expansions: Sequence[Sequence[dict[str, Any]]], rows: Sequence[str]
) -> None:
    """Rewrite character offsets, in place, from the expanded rows to the rows the caller passed.

    The tokens of an expansion point at their placeholder. Padding on the right points past the last character, so
    that starts never decrease: transformers finds the assistant's tokens by bisection.

    Differs from transformers 5.17, whose offsets refer to the expanded text. Callers never see that text, so
    `return_assistant_tokens_mask` is shifted by the length of every image there.
    """
    for row, (spans, text) in enumerate(zip(expansions, rows, strict=True)):
        seen_text = False
        for token, (start, end) in enumerate(offsets[row]):
            start, end = int(start), int(end)
            if start == end:
                place = (len(text), len(text)) if seen_text else (0, 0)
            else:
                place, seen_text = _given_span(start, end, spans), True
            offsets[row][token] = offsets[row].new_tensor(place) if hasattr(offsets, "new_tensor") else place


def _given_span(start: int, end: int, spans: Sequence[dict[str, Any]]) -> tuple[int, int]:
    shift = 0
    for span in spans:
        new_start, new_end = span["new_span"]
        if end <= new_start:
            break
        if start < new_end:
            return span["span"]
        shift = new_end - span["span"][1]
    return start - shift, end - shift
