"""Shared code of the notebooks: the path of the repository, a checkpoint to inspect, and self-checking exercises.

A notebook begins with `import lab`, which makes the modules of the repository importable, and `demo = lab.start()`.
"""

import contextlib
import io
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # notebooks run in notebooks/, the modules are one level above

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

import runtime  # noqa: E402
from data import Collate, Pairs, TwinBatches, read_rows  # noqa: E402
from eval import load_model  # noqa: E402
from explain import Heat  # noqa: E402
from mamo import VisionLanguageModel  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train import parts_for  # noqa: E402

BLUE, ORANGE = "#4a5a78", "#d9822b"
WORLD = Path("data/scenes")  # paths are relative to the repository, as on the command line
CHECKPOINTS = Path("runs/demo/checkpoint.pt"), Path("weights/demo.pt")


@dataclass
class Demo:
    """A pre-trained model to inspect, and the built-in world that it was trained on."""

    checkpoint: Path
    model: VisionLanguageModel
    tokenizer: Tokenizer
    state: dict  # the whole content of the checkpoint
    world: Path


def run(*command: str) -> str:
    """Run a command of the repository, such as run("eval.py", "foils", ...) -> its standard output

    Raises:  RuntimeError with the command's own error message
    """
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.rpartition("error: ")[2].strip()  # strip the remains of a progress bar
        raise RuntimeError(said or f"{command} failed")
    return done.stdout


def start() -> Demo:
    """Change to the repository's folder -> the demo's checkpoint: your own from `make demo` if it exists, else the
    one that ships with the repository"""
    os.chdir(ROOT)
    style()
    if not (WORLD / "world.json").is_file():
        print("drawing the built-in world, once: half a minute")
        run("-m", "world.scenes", "--out", WORLD)
    checkpoint = next(path for path in CHECKPOINTS if path.is_file())
    model, tokenizer, state = load_model(checkpoint, torch.device("cpu"))
    print(f"{checkpoint}: {state['objective']}, step {state['step']}")
    return Demo(checkpoint, model, tokenizer, state, WORLD)


def batch_of(demo: Demo, size: int = 64, number: int = 0) -> dict[str, Tensor]:
    """A training batch as train.py builds it, number counted from 0: with twins together, noise for the masks of each
    sample, and noise for sampling ITM's negatives. With size 64, the checkpoint was trained on this very batch."""
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar in the notebook
        rows = read_rows([demo.world / "pairs_train.jsonl"], "pairs")
    config, seed = demo.model.config, demo.state["train"]["seed"]
    pairs = Pairs(rows, demo.tokenizer, config, seed=seed)
    order = TwinBatches(rows, size, seed, first=number, parts=parts_for(size, 1))
    batch = Collate(demo.tokenizer.pad_id)([pairs[key] for key in next(iter(order))])
    runtime.seed_everything(seed, number, 0, 0)
    return batch | {"negative_noise": torch.rand(2, size, size)}


def show(axes: Axes, image: Tensor, title: str = "") -> None:
    """Show a picture (3, height, width), values in [-1, 1], without interpolation."""
    axes.imshow((image.permute(1, 2, 0) + 1) / 2, interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


def show_veiled(axes: Axes, image: Tensor, light: Tensor, title: str = "") -> None:
    """Show a picture under a veil whose transparency at each patch is light (n,): 1 = clear, 0 = opaque."""
    height, width = image.shape[1:]
    rows = round((len(light) * height / width) ** 0.5)
    seen = F.interpolate(light.detach().float().reshape(1, 1, rows, -1), size=(height, width))[0]
    veil = 2 * torch.tensor(to_rgb(BLUE))[:, None, None] - 1
    show(axes, seen * image + (1 - seen) * veil, title)


def show_heat(axes: Axes, image: Tensor, heat: Tensor, title: str = "") -> None:
    """Show a map (n,), 0 or more, over a picture: a square in each patch, larger = hotter, as explain.py draws it."""
    height, width = image.shape[1:]
    rows = round((len(heat) * height / width) ** 0.5)
    large = Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).resize(
        (10 * width, 10 * height), Image.Resampling.NEAREST
    )
    axes.imshow(Heat(heat.detach().float().reshape(rows, -1), large, heat.max().item()).image())
    axes.set_title(title)
    axes.axis("off")


def words_of(demo: Demo, ids: Tensor) -> list[str]:
    """Ids (l,) -> the word pieces, without padding"""
    return [demo.tokenizer.vocab[i] for i in ids.tolist() if i != demo.tokenizer.pad_id]


def style() -> None:
    """Set a common style for all figures."""
    plt.rcParams.update(
        {
            "figure.dpi": 90,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
        }
    )


def check(number: int, answer: object, test: Callable) -> None:
    """Print the state of an exercise: not solved yet, right, or what is wrong.

    Args:    answer   a value (... until there is one) or a function (with the body ... until there is one)
             test     the answer -> True, False, or a hint
    """
    if answer is ... or is_stub(answer):
        print(f"exercise {number}: not solved yet")
        return
    try:
        verdict = test(answer)
    except Exception as error:  # a reader's code may raise anything
        verdict = f"it stops with {type(error).__name__}: {error}"
    hint = verdict if isinstance(verdict, str) else "that is not it"
    print(f"exercise {number}: right" if verdict is True else f"exercise {number}: not yet, {hint}")


def is_stub(answer: object) -> bool:
    """Whether a function still has the body ..."""

    def stub(): ...

    return isinstance(answer, types.FunctionType) and answer.__code__.co_code == stub.__code__.co_code
