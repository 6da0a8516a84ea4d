"""Draw attention.jpg: a photograph, its caption, and where each word of it attends to.

`python docs/examples/attention.py`. `python inference.py PHOTO --attention PAGE.png` makes such a
page of any photograph; here the photograph is larger, and the words are in two rows beside it.
"""

import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from inference import Captioner  # noqa: E402
from util import plots  # noqa: E402
from util.images import read_image  # noqa: E402

PHOTO = HERE / "coffee.jpg"
WIDTH, GAP = 206, 12  # pixels: of a word's image, and between images
LARGE = 2 * WIDTH + GAP


def draw(photo: Image.Image, text: str, width: int, size: int) -> Image.Image:
    """Return the photograph `width` pixels wide, above its text in letters of `size` pixels."""
    shown = photo.resize((width, round(width * photo.height / photo.width)))
    return plots.stack([shown, plots.draw_text(text, width, size, plots.INK)])


def main(output: Path = HERE / "attention.jpg") -> None:
    """Caption the photograph and write the figure."""
    photo = read_image(PHOTO)
    (caption,) = Captioner.load(precision="float32").explain(photo)
    words = [
        draw(plots.highlight(photo, weights), word, WIDTH, 17)
        for word, weights in zip(caption.words, caption.attention, strict=True)
    ]
    large = draw(photo, caption.text, LARGE, 21)
    columns = -(-len(words) // 2)
    height = max(large.height, 2 * words[0].height + GAP)
    figure = Image.new("RGB", (LARGE + columns * (WIDTH + GAP), height), plots.PAPER)
    figure.paste(large, (0, (height - large.height) // 2))
    for number, word in enumerate(words):
        row, column = divmod(number, columns)
        left, top = LARGE + GAP + column * (WIDTH + GAP), row * (word.height + GAP)
        figure.paste(word, (left, top))
    figure.save(output, quality=88)


if __name__ == "__main__":
    main()
