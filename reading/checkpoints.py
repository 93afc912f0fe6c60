"""Checkpoints: read, and checked before anything is used. A file may be damaged, or made to do harm.

`load_checkpoint` reads the content, `load_weights` and `load_optimizer` put it into a model and its optimiser. Each
raises ValueError, in one sentence, for content that does not fit.
"""

import os
import pickle
import types
import typing
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


def tensors_of(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every tensor in nested dicts."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(part, f"{name} {key}".strip())


def check_finite(state: dict, when: str, so: str) -> None:
    """Raise ValueError if a tensor is not finite, i.e. the run diverged; `when` and `so` complete the message."""
    bad = [name for name, value in tensors_of(state) if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{len(bad)} tensors are not finite {when} ({bad[0]} first): the run diverged, and {so}; continue "
            "from its last good checkpoint, if any, with --resume and a smaller --lr, or start over with a smaller --lr"
        )


def load_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint written by save_checkpoint onto the CPU.

    Raises:  ValueError if the file is missing, damaged, not a checkpoint, or contains more than tensors and plain
             values: unpickling such a file could execute arbitrary code
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: give the checkpoint.pt of a run folder")
    try:
        packed = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        if packed and sum(part.file_size for part in packed.filelist) > os.stat(path).st_size:
            raise ValueError("its content is compressed, which is never the case")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is damaged or holds more than plain tensors and plain values, which could run code "
            "while it is read; use a checkpoint that train.py wrote"
        ) from error
    except Exception as error:  # torch raises many exception types for damaged files, some with an empty message
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole checkpoint ({reason}): use another") from error
    if not isinstance(state, dict) or not {"config", "model", "vocab", "objective"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: expected a file that train.py wrote")
    damaged = packed and packed.testzip()
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it does not match; use another checkpoint")
    check_fields(Content, state, str(path))
    counts = state.get("data", {}).values()
    if any(not isinstance(rows, list) or not rows or type(rows[0]) is not int for rows in counts):
        raise ValueError(f"{path} does not say what rows it was trained on: use a checkpoint that train.py wrote")
    if any(not isinstance(value, torch.Tensor) or not isinstance(name, str) for name, value in state["model"].items()):
        raise ValueError(f"{path} contains weights that are not tensors: use a checkpoint that train.py wrote")
    for name, one in tensors_of(state):  # torch may read past the end of others
        plain = one.layout == torch.strided and not one.is_nested and one.device.type == "cpu" and one.is_contiguous()
        if not plain or one.dtype not in SAVED:
            raise ValueError(f"{path} holds a tensor of a kind that is never saved, {name}: use another checkpoint")
    if not state.get("matching_weight", 1.0) >= 0 or state.get("step", 0) < 0:
        raise ValueError(f"{path} has a negative step or matching_weight, or none: use another checkpoint")
    if len(state["vocab"]) != state["config"].get("vocab_size"):
        raise ValueError(
            f"{path} holds a vocabulary of {len(state['vocab'])} words and a model of "
            f"{state['config'].get('vocab_size')}: the two do not belong together"
        )
    check_sizes(state["config"], {name: tuple(one.shape) for name, one in state["model"].items()}, path)
    check_finite(state["model"], f"in {path}", "its weights are unusable")
    return state


SAVED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def check_sizes(config: dict, shapes: dict[str, tuple], path: str | Path) -> None:
    """Raise ValueError if the sizes in a checkpoint's config are not those of its weights: a model that is far too
    large would be built before its weights are compared."""
    found = {"width": shapes.get("student.image.class_token", (None,))[0]}
    for part in ("image", "text", "fusion"):
        start = f"student.{part}.blocks."
        found[f"{part}_depth"] = len({name.split(".")[3] for name in shapes if name.startswith(start)}) or None
    found["queue_size"] = shapes.get("queue.filled", (None,))[0]
    for name, size in found.items():
        if size is not None and name in config and config[name] != size:
            raise ValueError(
                f"{path} was saved by a model of another shape: {name} is {config[name]!r} in its config, and "
                f"{size} in its weights"
            )


@dataclass
class Content:
    """The fields of a checkpoint, see Run.state in train.py; only the first four are always present."""

    objective: str
    config: dict
    vocab: list[str]
    model: dict
    train: dict
    step: int
    optimizer: dict
    scaler: dict
    meter: dict
    data: dict
    matching_weight: float
    head: dict
    best: list[float]


def check_fields(config_class: type, values: dict, where: str) -> None:
    """Raise ValueError for a name that is not a field of the dataclass, or for a value of the wrong type."""
    hints = typing.get_type_hints(config_class)
    if strange := ", ".join(sorted(map(str, values.keys() - hints.keys()))):
        raise ValueError(f"{strange} is no field of {where}: it was saved by other code or for another model")
    for name, value in values.items():
        if not is_a(value, hints[name]):
            said = repr(value) if len(repr(value)) < 50 else f"a {type(value).__name__}"
            hint, inner = hints[name], typing.get_args(hints[name])
            expected = f"a value of type {hint if inner else hint.__name__}"
            if typing.get_origin(hint) in (list, tuple):
                expected = f"a list of {inner[0].__name__}"
            raise ValueError(f"{name} of {where} is {said}: expected {expected}")


def is_a(value: object, kind: type) -> bool:
    """As isinstance, for the type hints that dataclasses use here: lists, tuples and dicts with all that they hold, and
    unions. An int counts as a float, a bool only as a bool, and a list as a tuple, which JSON does not know."""
    inner, outer = typing.get_args(kind), typing.get_origin(kind)
    if outer is types.UnionType:
        return any(is_a(value, one) for one in inner)
    if outer is dict:
        return isinstance(value, dict) and all(is_a(k, inner[0]) and is_a(v, inner[1]) for k, v in value.items())
    if outer in (list, tuple):
        return isinstance(value, list | tuple) and all(is_a(one, inner[0]) for one in value)
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def load_weights(model: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Load weights strictly. Raises ValueError naming the first missing, unexpected or mismatched weights."""
    expected, found = (
        {name: f"{tuple(one.shape)}{'' if one.is_floating_point() else f' {one.dtype}'}" for name, one in some.items()}
        for some in (model.state_dict(), weights)
    )
    wrong = [f"{name} is {found.get(name, 'missing')} where {expected.get(name, 'nothing')} is expected"
             for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path} was saved by a model of another shape: {'; '.join(wrong[:3])}{more}; "
            "build the model with the options in the checkpoint's config"
        )
    model.load_state_dict(weights)


# Per-parameter state, of Muon or not.
OPTIMIZER_STATES = {True: {"step", "momentum"}, False: {"step", "exp_avg", "exp_avg_sq"}}


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: str | Path) -> None:
    """Load an optimiser's state, but keep this run's hyperparameters. Raises ValueError if it does not fit the model:
    torch would accept moments of the wrong shape and read past their end."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_muon = [group.get("orthogonal", False) for group in optimizer.param_groups for _ in group["params"]]
    states, whole = saved.get("state"), isinstance(saved.get("state"), dict)
    for number, state in states.items() if whole else ():
        whole &= type(number) is int and 0 <= number < len(parameters) and isinstance(state, dict)
        whole = whole and state.keys() == OPTIMIZER_STATES[by_muon[number]]
        for name, value in state.items() if whole else ():
            shape = torch.Size() if name == "step" else parameters[number].shape
            whole &= isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.shape == shape
    theirs = saved.get("param_groups") if isinstance(saved.get("param_groups"), list) else []
    numbers = [group.get("params") if isinstance(group, dict) else None for group in theirs]
    if not whole or str(numbers) != str([group["params"] for group in groups]):
        raise ValueError(f"{path} holds the state of another optimiser, or of another model: begin another run")
    optimizer.load_state_dict({"state": states, "param_groups": groups})
