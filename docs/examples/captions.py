"""Draw captions.jpg, the photographs of this folder with the captions of the shipped model.

`python docs/examples/captions.py`. What is right and wrong was judged by a person, caption by
caption: after a change of the model, the table below must be judged anew.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
FIGURES = ("attention", "captions")  # the images of this folder that are no photographs
sys.path.insert(0, str(HERE.parents[1]))

import inference  # noqa: E402
from util import plots  # noqa: E402

JUDGED = {
    "a cat is looking at the camera": "right",
    "a cup of coffee on a wooden table": "right",
    "a man in a black shirt is holding a camera": "the camera is on a tripod, the shirt a coat",
    "a red boat is sitting on top of a white building": "a red temple, and no boat",
    "a man in a black shirt and tie is smiling": "a woman in uniform before a flag",
    "a boy in a orange shirt is riding a bike": "an astronaut, a woman; only the colour is right",
    "a man is standing in front of a building": "a rocket at its launch, and no man",
    "a white bird is flying through the air": "a flower",
}


def main() -> None:
    """Caption the photographs and write the page."""
    paths = [path for path in sorted(HERE.glob("*.jpg")) if path.stem not in FIGURES]
    captions = {path: inference.caption(path) for path in paths}
    order = sorted(paths, key=lambda path: list(JUDGED).index(captions[path]))
    items = [(Image.open(path), captions[path], [JUDGED[captions[path]]]) for path in order]
    with tempfile.TemporaryDirectory() as folder:
        plots.caption_page(Path(folder) / "page.png", items, title="")
        Image.open(Path(folder) / "page.png").convert("RGB").save(HERE / "captions.jpg", quality=88)


if __name__ == "__main__":
    main()
