r"""Images of emoji by three artists, for the presets `emoji` and `emoji-latent`. Two commands make them:

    npm pack --pack-destination data @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 \
        emoji-datasource-twitter@16.0.0
    python notebooks/emoji.py

Fluent Emoji 3D: Microsoft, MIT licence. Noto Emoji: Google, Apache-2.0. Twemoji: Twitter and contributors,
CC BY 4.0. Written are 64x64 pixels on white, data/emoji/train/GROUP/CODE-ARTIST.png, and in data/emoji/val/
every fifth emoji of a group in Unicode's order: the same emoji by another artist is no held-out image, nor
is a flag that another country has, too.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

ARTISTS = {"fluent": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/{}.webp"),
           "noto": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/{}.png"),
           "twemoji": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/{}.png")}
# Subcategories of Unicode whose members look alike: so few pictures teach little of animals, dishes or tools,
# each of another shape.
GROUPS = {"faces": ("face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical",
                    "face-sleepy", "face-unwell", "face-hat", "face-glasses", "face-concerned"),
          "flags": ("country-flag",), "fruit": ("food-fruit", "food-vegetable"), "hearts": ("heart",)}
FLAGS = ("twemoji",)                    # one artist's, or they would be most of all pictures
SIZE = 64


def unpacked(path):
    """The files of a package, {name: bytes}."""
    with tarfile.open(path) as package:
        return {member.name: package.extractfile(member).read() for member in package if member.isfile()}


def on_white(file):
    """An image file's bytes -> SIZE x SIZE, RGB."""
    image = Image.open(io.BytesIO(file)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def drawings(emoji, artists, packages):
    """{CODE-ARTIST: image} of an emoji; not every artist has drawn every one."""
    code = emoji["unified"].lower()
    files = {artist: packages[artist].get(ARTISTS[artist][1].format(code)) for artist in artists}
    return {f"{code}-{artist}": on_white(file) for artist, file in files.items() if file}


def main(data):
    packages = {artist: unpacked(data / package) for artist, (package, _) in ARTISTS.items()}
    listed = json.loads(packages["noto"]["package/emoji.json"])
    for group, subcategories in GROUPS.items():
        members = [emoji for emoji in listed if emoji["subcategory"] in subcategories]
        members.sort(key=lambda emoji: emoji["sort_order"])
        held_out = members[4::5]
        parts = {"train": [emoji for emoji in members if emoji not in held_out], "val": held_out}
        trained_on = set()
        for part, some in parts.items():
            folder = data / "emoji" / part / group
            folder.mkdir(parents=True, exist_ok=True)
            for emoji in some:
                for name, image in drawings(emoji, FLAGS if group == "flags" else ARTISTS, packages).items():
                    if part == "train":
                        trained_on.add(image.tobytes())
                    if part == "train" or image.tobytes() not in trained_on:
                        image.save(folder / f"{name}.png")


if __name__ == "__main__":
    try:
        main(Path("data"))
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is not there; `npm pack`, as at the top of emoji.py, puts it there")
