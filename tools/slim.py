"""Reduce a checkpoint for sharing: weights in half precision, vocabulary and options, without the optimiser state.

    python -m tools.slim runs/demo/checkpoint.pt --out weights/demo.pt

The resulting file is four to six times smaller. All commands that load checkpoints accept it, including evaluation and
fine-tuning, except for --resume, which needs the optimiser state. Scores change in the fourth digit.
"""

import argparse
from pathlib import Path

import torch

import runtime

LEFT_OUT = ("optimizer", "scaler", "meter", "best")  # only needed to resume a run


def slim(state: dict) -> dict:
    """The reduced content of a checkpoint. Raises ValueError for weights too large for half precision."""
    kept = {name: value for name, value in state.items() if name not in LEFT_OUT}
    weights = {name: value.half() if value.is_floating_point() else value for name, value in state["model"].items()}
    if any(not value.isfinite().all() for value in weights.values()):
        raise ValueError("the weights are too large for half precision: share the checkpoint as it is")
    return kept | {"model": weights}


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(
        prog="python -m tools.slim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt or best.pt of a run")
    parser.add_argument("--out", type=Path, required=True, help="output file")
    options = parser.parse_args()
    runtime.check_outputs([options.out], [options.checkpoint])
    state = runtime.load_checkpoint(options.checkpoint)
    runtime.check_run(state, options.checkpoint)
    state = slim(state)
    runtime.write_beside(options.out, lambda temporary: torch.save(state, temporary))
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, step {state['step']} of {state['objective']}")


if __name__ == "__main__":
    runtime.guarded(main)
