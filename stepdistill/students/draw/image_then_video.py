"""Text to video in two stages: a student makes an image of the prompt, and another one continues it.

Magic 1-For-1, https://arxiv.org/abs/2502.07701: each of the two stages is easier to distil into few steps than text to
video at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.core.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.networks.pipeline_loras import adapters_on, switch_on
from stepdistill.students.base_model import absolute
from stepdistill.students.contract import Contract, read_contract, read_contracts, teacher
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.filters import DrawnImage
from stepdistill.students.draw.first_frame import covering
from stepdistill.students.draw.loras import weigh_loras
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.draw.windows import LongVideo, Windows
from stepdistill.students.load import folder_of, load_student

VIDEO = "video"  # the adapter's name, beside that of the image's student


@dataclass(frozen=True)
class ImageThenVideo:
    """Two students, one after the other, in pipelines of their own around one base or two.

    Args:
        image: makes images from prompts alone; of any family.
        video: continues an image.
        worn: LoRAs of the image's stage where both stages have one network; they take turns with the video's.
    """

    image: StudentPipeline
    video: StudentPipeline
    worn: tuple[str, ...] | None

    @staticmethod
    def load(
        image: str | Path,
        video: str | Path,
        base: str | None = None,
        device: torch.device | str = "cpu",
        strength: float | None = None,
        loras: Sequence[tuple[str, float]] = (),
        controlnet: str | None = None,
    ) -> ImageThenVideo:
        """Both students. A base that both are of is loaded once; see `one_base`.

        Args:
            base: another checkpoint of the base of `image`, and of `video` where its base is the same.
            strength, loras, controlnet: of the image's stage, see `StudentPipeline.load`.

        Raises:
            StudentError: see `check_stages`, and `StudentPipeline.load`.
        """
        check_stages(image, video)
        contract, other = read_contracts(folder_of(image))[0], read_contract(folder_of(video))
        made, continued = absolute(teacher(contract)), absolute(teacher(other))
        if base is not None:
            made = replace(made, pretrained_teacher_model=base)
            if contract.base_hash == other.base_hash:
                continued = replace(continued, pretrained_teacher_model=base)
        first = StudentPipeline.load(image, base, device, strength, loras, controlnet=controlnet)
        if first.contract is not None and one_base((made, contract), (continued, other)):
            worn = tuple(adapters_on(made.network(first.pipe)))
            return ImageThenVideo(first, _beside(first, continued, folder_of(video)), worn)
        second = StudentPipeline.of(continued, video, device)
        second.weigh({})
        return ImageThenVideo(first, second, None)

    def _wear(self, student: StudentPipeline, names: Sequence[str]) -> None:
        if self.worn is not None:
            switch_on(student.family.network(student.pipe), names)

    def draw_images(
        self, prompts: Sequence[str], seeds: Sequence[int], call: PipelineCall, batch: int = 4
    ) -> Iterator[DrawnImage]:
        """An image (3, h, w) in [0, 1], float32 on the CPU, of each prompt: that which the student alone draws."""
        self._wear(self.image, self.worn or ())
        for drawn in self.image.draw(prompts, seeds, call.plus(output_type="pt"), batch):
            pixels: Tensor = drawn.image.float().cpu().clamp(0, 1)
            yield DrawnImage(pixels[0] if pixels.ndim == 4 else pixels, drawn.flagged)  # a video family's has one frame

    def draw_videos(
        self, prompts: Sequence[str], seeds: Sequence[int], call: PipelineCall, images: Sequence[Tensor]
    ) -> Iterator[DrawnImage]:
        """A video of each prompt that begins with its image, as a list of frames.

        The image is handed on in floats. It is resized and cropped to the size of the call, as in training.
        """
        for prompt, seed, begun in zip(prompts, seeds, self._begun(call, images), strict=True):
            yield from self.video.draw([prompt], [seed], begun)

    def draw_long_videos(
        self, prompts: Sequence[str], seeds: Sequence[int], call: PipelineCall, images: Sequence[Tensor], long: Windows
    ) -> Iterator[LongVideo]:
        """As `draw_videos`, of several windows."""
        for prompt, seed, begun in zip(prompts, seeds, self._begun(call, images), strict=True):
            yield from long.draw(self.video, [prompt], [seed], begun)

    def _begun(self, call: PipelineCall, images: Sequence[Tensor]) -> Iterator[PipelineCall]:
        """The call of the video's student with each image. The network has that student's LoRA alone."""
        self._wear(self.video, (VIDEO,))
        for image in images:
            yield call.plus(image=covering(image, size_of_call(call))[None])


def size_of_call(call: PipelineCall) -> tuple[int, int]:
    """Height and width in pixels of what a student's call draws."""
    return call.arguments["height"], call.arguments["width"]


def one_base(image: tuple[Family, Contract], video: tuple[Family, Contract]) -> bool:
    """Whether two students, as LoRAs, can take turns on one base: its hashes agree, it is read from the same place in
    the same way, it was trained in the same precision, and the pipeline of one has all parts for that of the other."""
    (first, contract), (second, other) = image, video
    same = [getattr(first, field.name) == getattr(second, field.name) for field in fields(Family)]
    facts = contract.base_hash == other.base_hash, contract.dtype == other.dtype
    loras = contract.lora is not None and other.lora is not None
    return loras and all(same) and all(facts) and isinstance(second, ImageToVideo) and second.takes_base_of(first)


def _beside(image: StudentPipeline, family: Family, folder: Path) -> StudentPipeline:
    """A student of image to video on the base of another one. Its LoRA is the only one on afterwards."""
    assert isinstance(family, ImageToVideo)
    pipe, contracts = family.around(image.pipe), read_contracts(folder)
    pipe.scheduler = image.native
    pipe.set_progress_bar_config(disable=True)
    student = StudentPipeline(family, pipe, image.native, load_student(pipe, folder, VIDEO), contracts)
    assert contracts[0].lora is not None
    weigh_loras(family, pipe, {VIDEO: contracts[0].lora.strength})
    return student


def check_stages(image: str | Path, video: str | Path) -> None:
    """Raise StudentError where the students are not one that makes images and one that continues them."""
    made, contracts = teacher(read_contracts(folder_of(image))[0]), read_contracts(folder_of(video))
    continued = teacher(contracts[0])
    frames, later = (family.arguments().get("num_frames", 1) for family in (made, continued))
    if isinstance(made, ImageToVideo) or frames > 1:
        got = f"the student {image}, which makes videos of {frames} frames, with --video {video}"
        todo = "name a student that makes images first, or leave --video out"
        raise StudentError(problem(got, "one that makes images", "the videos begin with its images", todo))
    if not isinstance(continued, ImageToVideo):
        got, todo = f"--video {video}, a student of {type(continued).__name__}", "name a student of image to video"
        raise StudentError(problem(got, "one that continues an image", "its videos begin with the image", todo))
    if later == 1:
        got, todo = f"--video {video}, a student of one frame", "name one that was trained for several"
        raise StudentError(problem(got, "one of several frames", "the first one is the image", todo))
    if len(contracts) > 1:
        got, todo = f"--video {video}, a folder of {len(contracts)} students", "name one of the folders in students/"
        raise StudentError(problem(got, "one student", "each has its own sampling contract", todo))
