"""Small SAM3s of both packages as segmenters, and a literal implementation of their scores.

The literal implementation calls a package as its documentation does: one prompt at a time, masks
of every instance as probabilities.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import tiny_sam3
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scclip_fast.segment import Sam3Segmenter

PACKAGES = ("transformers", "meta")
SIZE = (40, 60)


def photo(size: tuple[int, int] = SIZE) -> np.ndarray:
    """The same noise on every call, (H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


class Package:
    """A package's small model, its processor and what its results are called.

    Attributes:
        name: "transformers" or "meta".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "meta":
            pytest.importorskip("sam3", reason="Meta's sam3 is not installed")
        self.tiny = tiny_sam3 if name == "transformers" else __import__("tiny_meta")

    def model(self):
        """The model with the same weights on every call."""
        return self.tiny.tiny_sam3() if self.name == "transformers" else self.tiny.tiny_meta()

    def processor(self, model):
        if self.name == "transformers":
            return tiny_sam3.tiny_processor()
        from sam3.model.sam3_image_processor import Sam3Processor

        return Sam3Processor(model, self.tiny.SIDE, "cpu")

    def unpinned(self):
        """A context without which Meta's package needs a GPU."""
        return nullcontext() if self.name == "transformers" else self.tiny.pinned()

    def segmenter(self, classes, config=None, model=None, **settings) -> Sam3Segmenter:
        model = self.model() if model is None else model
        return Sam3Segmenter(model, self.processor(model), classes, config, **settings)

    def parts(self, model) -> dict[str, torch.nn.Module]:
        """The modules that run once a vocabulary, an image and a batch of prompts."""
        if self.name == "transformers":
            return {
                "text": model.text_encoder,
                "trunk": model.vision_encoder.backbone,
                "prompts": model.detr_encoder,
            }
        return {
            "text": model.backbone.language_backbone,
            "trunk": model.backbone.vision_backbone.trunk,
            "prompts": model.transformer.encoder,
        }

    @torch.inference_mode()
    def results(self, model, name: str, image: np.ndarray) -> dict[str, Tensor]:
        """Float32 probabilities and boxes of one prompt: presence, scores, masks, semantic."""
        processor = self.processor(model)
        with self.unpinned():
            if self.name == "transformers":
                inputs = processor(images=Image.fromarray(image), text=name, return_tensors="pt")
                out = model(**inputs)
                presence, logits, boxes = out.presence_logits, out.pred_logits, out.pred_boxes
            else:
                state = processor.set_image(Image.fromarray(image))
                encoded = state["backbone_out"] | model.backbone.forward_text([name], device="cpu")
                no_boxes = model._get_dummy_prompt()
                out = model.forward_grounding(encoded, processor.find_stage, None, no_boxes)
                presence, boxes = out["presence_logit_dec"], out["pred_boxes_xyxy"]
                logits = out["pred_logits"][..., 0]
        return dict(
            presence=presence[0, 0].float().sigmoid(),
            scores=logits[0].float().sigmoid(),
            boxes=boxes[0].float(),
            masks=out["pred_masks"][0].float().sigmoid(),
            semantic=out["semantic_seg"][0, 0].float().sigmoid(),
        )

    def scores(self, model, classes, image, heads=("instance", "semantic"), presence=True):
        """The scores (classes, H, W) at the image's size, by the equation of `Sam3Segmenter`."""
        maps = []
        for synonyms in classes:
            of_names = []
            for name in synonyms.split(","):
                out = self.results(model, name.strip(), image)
                best = (out["scores"][:, None, None] * out["masks"]).max(dim=0).values
                chosen = {"instance": best, "semantic": out["semantic"]}
                score = torch.stack([chosen[head] for head in heads]).max(dim=0).values
                of_names.append(score * out["presence"] if presence else score)
            maps.append(torch.stack(of_names).max(dim=0).values)
        return F.interpolate(torch.stack(maps)[None], image.shape[:2], mode="bilinear")[0]
