"""Data sources of prompts, images, clips and latents, the order of samples in a run, and a check of sources."""

from stepdistill.data.base import BadSample, FixedCrops, GuidedState, PromptsOf, Sample, Source, inside
from stepdistill.data.check import check_source
from stepdistill.data.clips import Clips
from stepdistill.data.folder import ImageFolder
from stepdistill.data.hub import HubDataset
from stepdistill.data.images import ImageSource
from stepdistill.data.inverted import InvertedImages
from stepdistill.data.latents import Latents
from stepdistill.data.order import Stream, loader
from stepdistill.data.partition import Partition
from stepdistill.data.prompts import Prompts
from stepdistill.data.shards import Shards
from stepdistill.data.teacher_samples import TeacherSamples
from stepdistill.data.trajectories import Trajectories

__all__ = [
    "BadSample",
    "Clips",
    "FixedCrops",
    "GuidedState",
    "HubDataset",
    "ImageFolder",
    "ImageSource",
    "InvertedImages",
    "Latents",
    "Partition",
    "Prompts",
    "PromptsOf",
    "Sample",
    "Shards",
    "Source",
    "Stream",
    "TeacherSamples",
    "Trajectories",
    "check_source",
    "inside",
    "loader",
]
