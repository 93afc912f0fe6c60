"""A retrieval baseline without learning, for novel combinations: the nearest training picture in 16 x 16 pixels.

    python experiments/nearest.py --train mdi/train.jsonl --data mdi/val.jsonl --results results/nearest.json

Picture to text: captions are ranked by their word overlap with the caption of the nearest training picture. Text to
picture: pictures are ranked by their distance to the training picture whose caption has the largest word overlap with
the query. Ties are in random order, so a hit among them counts by its probability.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from data import captions_of, read_rows, to_tensor  # noqa: E402
from tokenizer import bare_words  # noqa: E402


def shared_words(ones: list[str], others: list[str]) -> Tensor:
    """The word overlap of each pair of texts: shared words divided by all words of the two -> (ones, others)"""
    words = [[set(bare_words(text)) for text in texts] for texts in (ones, others)]
    return torch.tensor([[len(a & b) / max(len(a | b), 1) for b in words[1]] for a in words[0]])


def recalls(scores: Tensor, right: Tensor) -> dict[str, float]:
    """scores (q, g), index of each query's answer (q,) -> expected R@1, R@5 and R@10 over ties, in percent"""
    own = scores.gather(1, right[:, None])
    ahead, tied = (scores > own).sum(dim=1), (scores == own).sum(dim=1)
    return {f"R@{k}": 100 * ((k - ahead) / tied).clamp(0, 1).mean().item() for k in (1, 5, 10)}


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="JSONL file of pairs that are candidate neighbours")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of pairs to rank, one caption per picture")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    known, asked = read_rows([options.train], "pairs"), read_rows([options.data], "pairs")
    known_texts, texts = ([captions_of(row)[0] for row in rows] for rows in (known, asked))
    known_pixels, pixels = (
        torch.stack([to_tensor(row["image"], (16, 16)).flatten() for row in rows]) for rows in (known, asked)
    )
    distance, own = torch.cdist(pixels, known_pixels), torch.arange(len(asked))
    nearest = [known_texts[place] for place in distance.argmin(dim=1).tolist()]
    like = shared_words(texts, known_texts).argmax(dim=1)
    found = {
        "image_to_text": recalls(shared_words(nearest, texts), own),
        "text_to_image": recalls(-torch.cdist(known_pixels[like], pixels), own),
    }
    for name, one in found.items():
        print(name, *(f"{key} {value:.1f}" for key, value in one.items()))
    what = f"Nearest neighbour on 16 x 16 pixels, {len(asked)} pictures and captions, in percent"
    runtime.write_json(options.results, {"what": what, **found} | runtime.how_made("experiments/nearest.py"))


if __name__ == "__main__":
    runtime.guarded(main)
