"""What every test starts from: one thread, no network, one seed."""

import os
import random

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it on import, after this
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # tiny networks are many times slower on threads that wait for one another


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seed_of_module() -> None:
    """Fixtures of a module draw the same, whatever ran before them in this process."""
    _seed()


@pytest.fixture(autouse=True)
def seed(seed_of_module: None) -> None:
    _seed()
