"""KiloGram (Ji et al., EMNLP 2022): one caption per annotated tangram, from the names of the whole and of its parts.

    python experiments/kilogram.py --data kilogram/grounding_train.jsonl --out kilogram/whole_train.jsonl

Converts rows of `grounding` to rows of `pairs`: "a rolled up snake with body, tail, head". The boxes are not used, so a
model has to learn the location of each part from the co-occurrence of words and pictures.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL file of KiloGram's grounding rows")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of pairs to write, in the same folder")
    options = parser.parse_args()
    if options.out.resolve().parent != options.data.resolve().parent:
        raise ValueError(f"--out is {options.out}: its rows name pictures beside {options.data}, put it there too")
    parts: dict[tuple, list[str]] = {}
    for line in options.data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts.setdefault((row["image"], row["annotation"], row["whole"]), []).append(row["text"])
    captions: dict[str, list[str]] = {}
    for (image, _, whole), names in parts.items():
        captions.setdefault(image, []).append(f"{whole} with {', '.join(dict.fromkeys(names))}")
    rows = [{"image": image, "caption": texts} for image, texts in captions.items()]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pictures with {sum(map(len, captions.values()))} captions")


if __name__ == "__main__":
    runtime.guarded(main)
