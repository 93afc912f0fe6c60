"""Infrastructure shared by all commands: options, processes, device, precision, files, logging, clean shutdown."""

import argparse
import atexit
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import inspect
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import einops
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from reading.checkpoints import (  # noqa: F401  for whoever imports runtime
    check_fields,
    check_finite,
    load_checkpoint,
    load_optimizer,
    load_weights,
    tensors_of,
)

# ------------------------------------------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-sentence errors; the error for an unknown option suggests the closest match."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        """Print a one-sentence message instead of the full usage, then exit."""
        fail(message)

    def parse_args(self, args=None, namespace=None):
        """As in argparse, but the error for an unknown option suggests the closest match."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], options, n=1)
            self.error(f"unknown option {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        return known

    def parse_run(self, arguments: list[str] | None = None) -> dict:
        """The options given on the command line; with --config, all others come from that config.json."""
        self.add_argument(
            "--config", help="config.json of a run to repeat; options given on the command line override it"
        )
        given = vars(self.parse_args(arguments))
        if not (path := given.pop("config")):
            return given
        before = read_config(path)
        if before.get("task") != given.get("task"):
            raise ValueError(f"{path} is from a run of {before.get('task', 'train.py')}: repeat it with that command")
        if "preset" in given:
            raise ValueError(f"{path} names every size of the model: leave --preset out, or give sizes such as --width")
        mine = {"out", "resume"} | ({"epochs"} if "steps" in given else set())  # saved epochs would override --steps
        known = {action.dest for action in self._actions} - mine
        return {name: value for name, value in before.items() if name in known} | given


def read_config(path: str) -> dict:
    """The options in a run's config.json. Raises ValueError for any other file."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: give the config.json of a run folder")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return content["model"] | content["train"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the config.json of a run: give one from a run folder") from error


def is_config(path: Path) -> bool:
    """Whether a file is the config.json of a run."""
    try:
        return bool(read_config(path))
    except ValueError:
        return False


def add_options(parser: argparse.ArgumentParser, config_class: type, skip: tuple[str, ...] = ()) -> None:
    """Add one option per dataclass field, with its name, type and default; the field's comment is the help text.

    Options that are not given are absent from the result, so that presets and checkpoints can supply their values.
    """
    hints, texts = typing.get_type_hints(config_class), field_comments(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in skip:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        keywords = {"dest": field.name, "default": argparse.SUPPRESS, "help": f"{texts[field.name]} [{shown(default)}]"}
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) in (tuple, list):
            keywords |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": field.name.upper()}
        else:
            keywords |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), **keywords)


def shown(default) -> str:
    """A default value as it would be typed on the command line."""
    return " ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)


@functools.cache
def field_comments(config_class: type) -> dict[str, str]:
    """The trailing comment of each dataclass field, by name: it doubles as the --help text."""
    comments = {}
    classes = [base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base)]
    for line in "".join(map(inspect.getsource, classes)).splitlines():
        name, colon, rest = line.strip().partition(":")
        if colon and name.isidentifier() and "# " in rest:
            comments[name] = rest.split("# ", 1)[1].replace("%", "%%")
    return comments


# Options that may change on resume, because they affect the results only up to rounding. Data files may have moved:
# Run.load in train.py checks that their content is unchanged.
FREE_ON_RESUME = {"out", "workers", "device", "precision", "compile", "grad_checkpointing", "check", "resume"}
FREE_ON_RESUME |= {"log_every", "eval_every", "save_every", "data", "val"}
# On resume, a run may be extended, or its learning rate lowered after it diverged; both apply from the next step on.
MAY_GROW, MAY_SHRINK = {"steps", "epochs"}, {"lr", "lr_head"}


def resolve(given: dict, config_class: type, model_class: type) -> tuple:
    """Command-line options -> the run's options, and the given fields of the model's Config that were given.

    A resumed run takes its options from its checkpoint. Raises ValueError for an option that may not change on resume.
    """
    run_fields = {field.name for field in dataclasses.fields(config_class)}
    options = {name: value for name, value in given.items() if name in run_fields}
    overrides = {name: value for name, value in given.items() if name not in run_fields}
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value) and (name, value) != ("clip", math.inf):
            raise ValueError(f"{name} is {value}: give a finite number")
    check_fields(config_class, options, "the options")  # those in a --config may be of any kind
    check_fields(model_class, overrides, "the options")
    path = Path(options.get("out", config_class.out)) / "checkpoint.pt"
    if options.get("resume") and path.is_file():
        saved = load_checkpoint(path)
        check_run(saved, path)
        if ("task" in saved["train"]) != ("task" in run_fields):
            command = f"finetune.py {saved['train']['task']}" if "task" in saved["train"] else "train.py"
            raise ValueError(f"{path} is a run of {command}: resume it with that command, or give another --out")
        check_fields(config_class, saved["train"], str(path))
        saved["train"] = {"optimizer": "adamw"} | saved["train"]  # the only optimiser when old checkpoints were saved
        # Defaults come first, to fill in options that were added after the checkpoint was saved.
        before = dataclasses.asdict(config_class()) | vars(model_class()) | saved["train"] | saved["config"]
        changed = [name for name in given if not may_become(name, before[name], given[name])]
        if changed:
            was = ", ".join(f"{name} (was {before[name]}, now {given[name]})" for name in changed)
            raise ValueError(
                f"a resumed run keeps its options, and these differ: {was}; leave them out or use another --out "
                "(only --steps and --epochs may increase, and --lr and --lr-head decrease)"
            )
        free = FREE_ON_RESUME | MAY_GROW | MAY_SHRINK
        options = saved["train"] | {name: value for name, value in options.items() if name in free}
    elif options.get("resume") and "out" in given and given.keys() <= FREE_ON_RESUME - {"data"} | {"task"}:
        runs = [run.parent.name for run in path.parent.parent.glob("*/checkpoint.pt")]
        near = difflib.get_close_matches(path.parent.name, runs, n=1)
        hint = f"did you mean {path.parent.with_name(near[0])}?" if near else "is --out right?"
        raise ValueError(f"there is no {path} to resume from: {hint} A new run also needs --data")
    return config_class(**options), overrides


def check_bounds(config, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError for the first option outside its (minimum, maximum)."""
    for name, (least, most) in bounds.items():
        if not least <= getattr(config, name) <= most:
            upper = "or more" if most >= 1e9 else f"to {most}"
            raise ValueError(f"{name} is {getattr(config, name)}: give {least} {upper}")


def may_become(name: str, was, now) -> bool:
    """Whether an option of a resumed run may change to this value."""
    if name in ("vocab", "init"):  # the checkpoint contains both, and different paths may lead to the same file
        was, now = ([value] if isinstance(value, str) else value for value in (was, now))
        return list(map(os.path.realpath, was)) == list(map(os.path.realpath, now))
    grown, shrunk = name in MAY_GROW and now > was, name in MAY_SHRINK and 0 < now < was
    equal = now == (list(was) if isinstance(was, tuple) else was)  # the command line yields lists
    return name in FREE_ON_RESUME or equal or grown or shrunk


def fail(message: object) -> typing.NoReturn:
    """Print a one-sentence error message and exit with status 2."""
    print(f"error: {readable(str(message))}", file=sys.stderr)
    sys.exit(2)


def readable(sentence: str) -> str:
    """An error message in which long quoted values are truncated and control characters escaped."""
    short = re.sub(r"'([^']{300,})'", lambda quoted: f"'{quoted[1][:120]}...'", sentence)
    short = re.sub(r"\S{200,}", lambda word: f"{word[0][:80]}...{word[0][-20:]}", short)
    return "".join(letter if letter in "\n\t" or letter.isprintable() else repr(letter)[1:-1] for letter in short)


def world_size() -> int:
    """The number of processes that torchrun started. Raises ValueError for environment variables that do not fit."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1 or (int(size) > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys()):
        raise ValueError(f"WORLD_SIZE is {size} in the environment, without a RANK: start with torchrun, or unset it")
    return int(size)


def end(stopped: bool) -> None:
    """After an interrupted run, exit with status 130, as shells expect, so that a calling script stops as well."""
    if stopped and world_size() == 1:  # torchrun would report status 130 as a failure
        sys.exit(130)


def guarded(main) -> None:
    """Run main(), ending with a one-sentence error instead of a traceback if the input is invalid."""
    Output.gone, streams = False, (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = Output(sys.stdout, plain=True), Output(sys.stderr)
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted")
    finally:
        sys.stdout, sys.stderr = streams


# -------------------------------------------------------------------------------------- processes, device, precision


@contextlib.contextmanager
def process_group(device_name: str):
    """Context manager around a whole command: joins the process group under torchrun, yields this process's device.

    Only rank 0 prints and draws progress bars, but every process reports its own errors. If one process exits early,
    the next collective fails in all others, and each exits with an error message; torchrun then terminates the rest.
    """
    if world_size() == 1:
        yield pick_device(device_name)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Both devices need collectives: gradients are reduced on the GPU, counts and evaluation results on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.6 lacks its replacement
    with contextlib.ExitStack() as stack:
        if rank > 0:
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield device
        except (ValueError, OSError) as error:
            raise ValueError(f"process {rank} of {os.environ['WORLD_SIZE']}: {error}") from error
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise ValueError(
                f"process {rank} of {os.environ['WORLD_SIZE']} stops at once, because another process of this run "
                "ended: see its error; the last checkpoint is intact, continue from it with --resume"
            ) from error
    dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device of that name; auto = cuda, else mps, else cpu. Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(str(name).split(":")[0]) or not re.fullmatch(r"cpu(:0)?|[a-z]+(:\d{1,3})?", name):
        raise ValueError(
            f"device {name} is not available here: use auto, or one of {[k for k, v in available.items() if v]}"
        )
    return torch.device(name)


def keep_memory() -> None:
    """Keep freed memory in the process for the next step (CPU, Linux): 11 to 14 % more pairs/s in `nano`.

    By default, glibc returns large blocks to the system immediately, which must then zero their pages in every step.
    """
    try:
        allocator = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in malloc.h
    if allocator(mmap_threshold, 2**30) or allocator(mmap_threshold, 2**25):  # older versions allow at most 32 MB
        allocator(trim_threshold, 2**31 - 1)  # only with the other one; alone, it made a step 1.6 times slower


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision of that name, and why it was chosen; auto = bf16 on a GPU with native bf16 support, else fp32."""
    if name == "auto":
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has it"
        return "fp32", "the GPU has no bf16" if device.type == "cuda" else f"on {device.type} it is the safe choice"
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}: use auto, {', '.join(PRECISIONS)}")
    slow = name != "fp32" and device.type == "cpu"
    return name, "as asked" + ("; on a CPU it can be hundreds of times slower than fp32" if slow else "")


def autocast(device: torch.device, precision: str):
    """Autocast a forward pass to bf16 or fp16, disabled for fp32; mamo.py marks the operations that stay in fp32."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def recompute_blocks(model: torch.nn.Module) -> None:
    """Gradient checkpointing: every block except the teacher's stores only its input and is recomputed in backward.

    Blocks are the modules in an encoder's list `blocks`. Raises ValueError for an encoder without such a list.
    """
    for name, encoder in model.student.named_children():
        if isinstance(encoder, torch.nn.Linear):
            continue  # a projection head
        if not len(getattr(encoder, "blocks", [])):
            raise ValueError(f"grad_checkpointing: the {name} encoder has no list `blocks` of modules to recompute")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks" and not name.startswith("teacher."):
            for block in module:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_step(model: torch.nn.Module) -> None:
    """Compile the model's forward pass, and with it the backward pass, for batches of a fixed shape."""
    # einops caches the tensor types that it has seen; fill this cache first, or its growth would cause a recompilation.
    for known in (torch.zeros(1), torch.nn.Parameter(torch.zeros(1))):
        einops.rearrange(known, "d -> d")
    model.compile(dynamic=False)


@contextlib.contextmanager
def first_process_first():
    """Run the block on rank 0 first, then on all other ranks, which then find the files written by rank 0."""
    if not dist.is_initialized():
        yield
        return
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    if dist.get_rank() > 0:
        dist.barrier(waiting)
    yield
    if dist.get_rank() == 0:
        dist.barrier(waiting)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any rank. This is a collective: all processes must call it at the same point."""
    if not dist.is_initialized():
        return flag
    said = torch.tensor(float(flag))
    dist.all_reduce(said)
    return bool(said)


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all processes, which must pass the same names."""
    if not dist.is_initialized():
        return values
    mean = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(mean)
    return dict(zip(values, (mean / dist.get_world_size()).tolist(), strict=True))


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch from a key such as (seed, step, rank)."""
    value = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB, of the GPU for a CUDA device, else of the process. NaN if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # Linux, where getrusage would include the parent process's peak
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**10
    try:
        import resource  # not available on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --------------------------------------------------------------------------------------------------------------- files


def write_beside(path: Path, write, size: int = 0) -> None:
    """Write atomically: call write(temporary path), then rename, so that path always holds a complete file, old or new.

    size: number of bytes to write, if known. A failed write leaves no partial file. Raises OSError if the disk is full.
    """
    path = Path(os.path.realpath(path))  # keep a symlink and replace its target
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file that could be replaced: give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # the path could be a symlink to another file
    try:
        write(temporary)
        with open(temporary, "r+b") as file:  # r+ because Windows only syncs files opened for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        free, written = shutil.disk_usage(path.parent).free, temporary.stat().st_size if temporary.is_file() else 0
        temporary.unlink(missing_ok=True)
        # If the disk is full, torch raises a RuntimeError about file positions that does not mention the disk.
        full = isinstance(error, RuntimeError) and (free < 2**20 or free + written < size)
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"the disk is full: {path} needs {max(size, written) / 2**20:.1f} MB or more, and {path.parent} has "
                f"{(free + written) / 2**20:.1f} MB left for it; any previous file is kept: free some space"
            ) from error
        raise


@contextlib.contextmanager
def side_file(path: Path):
    """Context manager for writing an optional file: if it cannot be written, print a warning and continue."""
    try:
        yield
    except OSError as error:
        UNWRITTEN.add(path)
        warn(f"{path} cannot be written ({error}); continuing without it")


def check_outputs(outputs: Iterable, inputs: Iterable) -> None:
    """Raise ValueError if a file to write is one that is read. Empty names are ignored."""
    read = {os.path.realpath(path): path for path in inputs if path}
    for path in filter(None, outputs):
        if os.path.realpath(path) in read:
            raise ValueError(f"{path} would be overwritten, and it is an input: give another name to write to")


UNWRITTEN: set[Path] = set()  # files that side_file has warned about


@functools.cache
def warn(sentence: str) -> None:
    """Print a warning to stderr, once per text, without breaking a progress bar."""
    tqdm.write(f"warning: {sentence}", file=sys.stderr)


def save_checkpoint(path: Path, state: dict) -> None:
    """Save tensors and plain Python values atomically. Raises ValueError if a tensor is not finite."""
    check_finite(state, f"at step {state.get('step')}", f"{path} was not written")
    size = sum(value.nbytes for _, value in tensors_of(state))
    write_beside(path, lambda temporary: torch.save(state, temporary), size)


def check_run(saved: dict, path: str | Path, more: tuple = ()) -> None:
    """Raise ValueError if a checkpoint lacks parts that describe its run."""
    if missing := ", ".join(sorted({"train", "step", *more} - saved.keys())):
        raise ValueError(f"{path} holds no run to go on from, {missing} are missing: is it a copy of best.pt?")


def saved_run(config) -> dict | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:  ValueError if there is one but config.resume is not set (it would be overwritten), or it cannot be resumed
    """
    path = Path(config.out) / "checkpoint.pt"
    if not path.is_file():
        if config.resume:
            print(f"there is no {path} to go on from: a new run begins")
        log, about = path.with_name("log.csv"), path.with_name("config.json")
        theirs = log.is_file() and not log.read_bytes().startswith((b"step", b"\r\n")) and log.stat().st_size > 0
        if theirs or path.with_name("best.pt").exists() or (about.is_file() and not is_config(about)):
            raise ValueError(
                f"{config.out} holds files of yours, or of another run: move them away, or give another --out"
            )
        return None
    if not config.resume:
        raise ValueError(f"{path} exists: pass --resume to continue from it, or give another --out")
    saved = load_checkpoint(path)
    check_run(saved, path, ("optimizer", "scaler", "meter"))
    state, meter, best = saved["optimizer"].get("state"), saved["meter"], saved.get("best", [0.0, 0, 0])
    numbers = [*meter.values(), *best] if all(isinstance(name, str) for name in meter) and len(best) == 3 else [None]
    if (saved["step"] > 0 and not state) or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"{path} is damaged: its optimiser, means or best score are not those of a run; use another")
    if saved["train"].get("objective", saved["objective"]) != saved["objective"]:
        raise ValueError(
            f"{path} names two objectives, {saved['objective']} and {saved['train']['objective']}: use another"
        )
    saved["config"].setdefault("albef_negatives", True)  # the behaviour before the option existed
    return saved


def write_json(path: Path, value) -> None:
    """Write indented JSON atomically."""
    write_beside(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def how_made(script: str) -> dict[str, str]:
    """The provenance recorded in a results file: command, hardware and date."""
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    command = " ".join(["python", script, *sys.argv[1:]])
    return {"command": command, "hardware": hardware, "date": datetime.date.today().isoformat()}


class CsvLog:
    """log.csv: one row per logging step. On resume, rows past the checkpoint's step are dropped."""

    def __init__(self, path: Path, first_step: int):
        self.path, self.rows, self.columns = path, [], []
        if path.is_file() and first_step > 0:
            with contextlib.suppress(csv.Error), open(path, newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.DictReader(file):
                    whole = None not in row and None not in row.values() and row.get("step", "").isdecimal()
                    if whole and int(row["step"]) <= first_step:  # a killed run may leave an incomplete line
                        self.rows.append(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        with side_file(path):
            write_beside(path, self.rewrite)

    def rewrite(self, path: Path) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if self.rows:
                writer.writeheader()
                writer.writerows(self.rows)
        self.columns = columns

    def write(self, row: dict) -> None:
        """Append a row; rewrite the file if there is a new column or an earlier row could not be written."""
        row = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        self.rows.append(row)
        columns, self.columns = self.columns, []  # forces a rewrite next time if this attempt fails
        with side_file(self.path):
            if not row.keys() <= set(columns):
                write_beside(self.path, self.rewrite)
                return
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerow(row)
            self.columns = columns


# ------------------------------------------------------------------------------------------------------ how a run ends
#
# Signals, closed pipes, data-loading workers, one run per folder. However a run ends, its state is consistent: a stop
# request takes effect at the end of a step, and the next batch, whose loading may fail, is fetched before the step.

# Ctrl-C, kill, a closed terminal (not on Windows)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupt:
    """Signal handler: on a stop signal or a closed output pipe, the training loop saves and stops at the end of the
    step; a second Ctrl-C stops immediately. Signals that are ignored, as under `nohup`, stay ignored."""

    def __init__(self):
        self.heard, self.before = set(), {}
        for number in STOP_SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)

    @property
    def asked(self) -> bool:
        return bool(self.heard) or Output.gone

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Restore the handlers, except for a received SIGTERM or SIGHUP, which often arrives twice as the run ends."""
        for number, handler in self.before.items():
            if number == signal.SIGINT or number not in self.heard:
                signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        # Only a second Ctrl-C is deliberate: a scheduler may signal both the process group and each process in it.
        if self.heard and number == signal.SIGINT and world_size() == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.heard.add(number)


class DataFailed(ValueError):
    """The next batch could not be loaded. The last step is complete, so the run can still be saved."""


def batches_of(loader) -> Iterator[dict]:
    """The batches of a loader. Raises DataFailed, with a one-sentence message, if the next one cannot be loaded."""
    try:
        yield from without_alarm(loader)
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError) as error:
        # A worker process wraps the message in its full traceback: "Caught ValueError in DataLoader worker".
        sentence = (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix("ValueError: ")
        if loader.num_workers and "Caught" not in str(error):
            sentence = "a process that loads data was killed, probably for lack of memory: use fewer --workers"
        elif "shared memory" in sentence:
            sentence = "/dev/shm has no room for the batches of --workers: use fewer, or 0, or a smaller --batch-size"
        raise DataFailed(sentence) from error


@dataclass
class Shared:
    """Collate wrapper that moves the batch to shared memory inside the worker, so that an error can be reported.

    By default, torch does this in a background thread, where a batch that does not fit is lost and training hangs.
    """

    collate: Callable

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return {name: value.share_memory_() for name, value in self.collate(samples).items()}


def without_alarm(loader) -> Iterator:
    """The batches of a loader, without torch's SIGCHLD handler, which would raise in mid-step when a worker dies.

    A dead worker is still detected within seconds, as soon as the loop waits for its next batch.
    """
    alarms = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before, batches = alarms and signal.getsignal(signal.SIGCHLD), iter(loader)
    if alarms:
        signal.signal(signal.SIGCHLD, before)
    return batches


def in_worker(_: int) -> None:
    """Worker init function: ignore stop signals, because the training process handles them and ends the workers."""
    for lock in LOCKS:
        os.close(lock)  # otherwise, the folder stays locked until the workers of a killed run have exited
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the remaining workers at exit: they ignore SIGTERM, so multiprocessing would wait for them forever."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # letters that steer a terminal


class Output:
    """A wrapper of standard output or error for which a closed pipe or terminal (`| head`) is not an error.

    Later output is discarded, and a training run saves and stops, see Interrupt.
    """

    gone = False  # whether an output stream of this process has been closed

    def __init__(self, stream, plain: bool = False):
        """plain: escape terminal control sequences, e.g. in captions; not for a progress bar, which needs them"""
        self.stream, self.plain = stream or open(os.devnull, "w"), plain  # noqa: SIM115  None where it was closed

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        said = CONTROLS.sub(lambda found: repr(found[0])[1:-1], text) if self.plain else text
        code = getattr(self.stream, "encoding", None) or "utf-8"  # an old console's encoding may lack characters
        self.attempt(self.stream.write, said.encode(code, "backslashreplace").decode(code))
        if "\n" in text:  # deliver each line to a pipe immediately
            self.flush()
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, do, *what) -> None:
        try:
            do(*what)
        except OSError as error:
            Output.gone |= error.errno in (errno.EPIPE, errno.EIO, errno.EINVAL)  # not for a full disk
            with open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), self.stream.fileno())


@contextlib.contextmanager
def sole_run(folder: str | Path):
    """Context manager around training: locks the run folder. Raises ValueError if another process is training in it.

    The lock is on the folder itself and is released when the process exits, for whatever reason. Not on Windows.
    """
    if fcntl is None or int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    LOCKS.append(os.open(folder, os.O_RDONLY))
    try:
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # any other OSError means a file system without locks
            if isinstance(error, BlockingIOError):
                raise ValueError(f"another process is training in {folder}: wait for it, or change --out") from error
        yield
    finally:
        os.close(LOCKS.pop())
        with contextlib.suppress(OSError):  # removes the folder only if nothing was written
            os.rmdir(folder)


LOCKS: list[int] = []  # file descriptors of folders locked by sole_run
