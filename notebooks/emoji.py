r"""Images of emoji by three artists, for the presets `emoji` and `emoji-latent`. Two commands make them:

    mkdir -p data && npm pack --pack-destination data @lobehub/fluent-emoji-3d@1.1.0 \
        emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fid import read_image  # noqa: E402

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


def drawings(members, artists, packages):
    """{CODE-ARTIST: image} of emoji, on white; not every artist has drawn every one."""
    images = {}
    for code in [emoji["unified"].lower() for emoji in members]:
        for artist in artists:
            file = packages[artist].get(ARTISTS[artist][1].format(code))
            if file:
                image = read_image(io.BytesIO(file))
                images[f"{code}-{artist}"] = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return images


def main(data):
    packages = {artist: unpacked(data / package) for artist, (package, _) in ARTISTS.items()}
    listed = json.loads(packages["noto"]["package/emoji.json"])
    listed.sort(key=lambda emoji: emoji["sort_order"])
    for group, subcategories in GROUPS.items():
        members = [emoji for emoji in listed if emoji["subcategory"] in subcategories]
        artists = FLAGS if group == "flags" else ARTISTS
        held_out = drawings(members[4::5], artists, packages)
        del members[4::5]
        trained_on = drawings(members, artists, packages)
        pixels = {image.tobytes() for image in trained_on.values()}
        unseen = {name: image for name, image in held_out.items() if image.tobytes() not in pixels}
        for part, images in (("train", trained_on), ("val", unseen)):
            folder = data / "emoji" / part / group
            folder.mkdir(parents=True, exist_ok=True)
            for name, image in images.items():
                image.save(folder / f"{name}.png")


if __name__ == "__main__":
    try:
        main(Path("data"))
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is not there; `npm pack`, as at the top of emoji.py, puts it there")
