"""Prepared data and a small ImageNet in the published folder format, once a test process."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def prepared_path(tmp_path_factory) -> str:
    """Where the bundled families are prepared in this session, by whichever process is first."""
    own = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each process has a folder of its own within the session's.
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return str(shared / "prepared")


def write_imagenet(root: pathlib.Path) -> pathlib.Path:
    """train/ and val/ of three classes; sizes differ, one file is gray, one has four channels."""
    rng = np.random.default_rng(0)
    for folder, count in (("train", 4), ("val", 3)):
        for label, wnid in enumerate(("n01440764", "n01443537", "n02084071")):
            directory = root / folder / wnid
            directory.mkdir(parents=True)
            for i in range(count):
                height, width = (40, 56) if i % 2 else (64, 48)
                smooth = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
                image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
                if (folder, label, i) == ("train", 0, 1):
                    image = image.convert("L")
                if (folder, label, i) == ("train", 1, 1):
                    image = image.convert("CMYK")
                image.save(directory / f"{wnid}_{i}.JPEG", format="jpeg", quality=95)
    return root


@pytest.fixture(scope="session")
def imagenet_path(tmp_path_factory) -> str:
    """A folder with 12 training and 9 validation images of three classes."""
    return str(write_imagenet(tmp_path_factory.mktemp("imagenet")))
