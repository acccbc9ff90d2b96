"""Protocols of published figures, and how an evaluation deviates from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepdistill.evaluation.metrics.identity import Identity
    from stepdistill.evaluation.metrics.resize import Resize


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings that a figure depends on, of a paper or of nobody.

    Args:
        name: what the report calls it.
        n: images; None is any number.
        features: name of the extractor, as `stepdistill.evaluation.metrics.extractors.extractor` has it.
        resize: of the images, to the extractor's size.
        eval_res: side in pixels that images of both sides are cropped and resized to before; None leaves them.
        reference: what the reference must be, in words; empty for anything.
        reference_n: its images; None where its file does not say.
        clip: the CLIP that the score is by; empty for any.
        prefix: before each prompt in the CLIP score.
        guide: whether figures under it are no more than a hint.
    """

    name: str
    n: int | None = None
    features: str = "efficientnet-lite0"
    resize: Resize = "clean"
    eval_res: int | None = None
    reference: str = ""
    reference_n: int | None = None
    clip: str = ""
    prefix: str = ""
    guide: bool = False

    def deviations(
        self, n: int, identity: Identity, eval_res: int | None, reference: Mapping[str, Any], clip: str | None = None
    ) -> list[str]:
        """What of an evaluation is not as the protocol has it, in words; of a protocol of nobody, that.

        Args:
            n: images.
            identity: of the features.
            eval_res: side in pixels that images were cropped and resized to; None left them.
            reference: its facts.
            clip: of the CLIP score, where there is one.
        """
        if self.guide:
            return [f"protocol {self.name} belongs to no paper"]
        drawn, size = reference["kind"] == "teacher", reference.get("n")
        deviations = {
            f"n={n} (protocol {self.n})": n != self.n,
            f"features {identity.id} are not FID's Inception": identity.key != "fid",
            f"resize {identity.resize} (protocol {self.resize})": identity.resize != self.resize,
            f"eval_res {eval_res} (protocol {self.eval_res})": eval_res != self.eval_res,
            f"the reference is the teacher (protocol: {self.reference})": drawn,
            f"a reference of n={size} (protocol {self.reference_n})": not drawn
            and self.reference_n not in (None, size),
            f"CLIP {clip} (protocol {self.clip})": clip is not None and self.clip not in ("", clip),
        }
        return [text for text, deviates in deviations.items() if deviates]

    def trusted(self, reference: Mapping[str, Any]) -> list[str]:
        """What cannot be checked and is taken on trust, in words."""
        if self.guide:
            return []
        assumptions = [
            f"that {reference['path']} is {self.reference}",
            "that the prompts, or classes, are the protocol's",
        ]
        if reference.get("features_id") == "unknown":
            assumptions.append(f"that {reference['path']} was made with these features")
        return assumptions


# The sizes, crops and prefixes of the coco protocols are those of DMD2's evaluation (Yin et al. 2024,
# https://arxiv.org/abs/2405.14867), those of imagenet64-edm of EDM's (Karras et al. 2022,
# https://arxiv.org/abs/2206.00364).
COCO = Protocol(
    name="coco30k-dmd2",
    n=30_000,
    features="inception",
    eval_res=256,
    reference="all images of COCO 2014's validation set",
    reference_n=40_504,
    clip="laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    prefix="A photo depicts ",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="none", guide=True),
        Protocol(name="quick", n=256, guide=True),
        COCO,
        replace(
            COCO,
            name="coco10k-sdxl",
            n=10_000,
            eval_res=512,
            reference="the 10,000 images of COCO 2014's validation set that belong to the prompts",
            reference_n=10_000,
        ),
        Protocol(
            name="imagenet64-edm",
            n=50_000,
            features="inception",
            resize="tf1",
            reference="EDM's statistics imagenet-64x64.npz",
        ),
    )
}
