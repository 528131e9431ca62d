"""Images to measure loaders and whole runs on."""

import shutil
from pathlib import Path

from fastmim_pipelines.demo import DemoSpec, write_demo
from fastmim_pipelines.index import FolderIndex

# As ImageNet's: 500 x 375 and the like, some 100 kB.
PHOTO_SIZE = DemoSpec(short_side_px=(333, 375), grain=(5.0, 20.0))


def drawn(folder: Path, images: int, spec: DemoSpec = PHOTO_SIZE) -> Path:
    """A folder of pictures that are drawn now."""
    write_demo(folder, images=images, val_images=0, spec=spec, progress=lambda line: None)
    return folder / "train"


def repeated(folder: Path, temporary: Path, least: int = 400) -> Path:
    """A folder of at least so many images: copies of the images of a folder, again and again if they are few."""
    index = FolderIndex(folder)
    for turn in range(-(-least // len(index))):
        (temporary / str(turn)).mkdir(parents=True)
        for i in range(len(index)):
            shutil.copyfile(index.path(i), temporary / str(turn) / f"{i:07d}{Path(index.path(i)).suffix}")
    return temporary
