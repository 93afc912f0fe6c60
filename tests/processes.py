"""Several processes for the tests: they find each other as torchrun's would, and each writes what it says to a file."""

import copy
import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from helpers import resumed_run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import finetune
import runtime
import train
from data import read_rows
from eval import load_model, retrieval

# A server that has imported everything once forks each worker: a fresh interpreter would take seconds, and so would
# torch._dynamo, which the first step of an optimiser imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "train", "finetune", "helpers"])


def start(world: int, folder: Path, task, *arguments) -> list:
    """Start task(*arguments) in so many processes; what process r says is in folder/said-r.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [FORKS.Process(target=work, args=(rank, world, port, folder, task, arguments)) for rank in range(world)]
    for worker in workers:
        worker.start()
    return workers


def together(world: int, folder: Path, task, *arguments) -> None:
    """Run task(*arguments) in so many processes to its end."""
    workers = start(world, folder, task, *arguments)
    for worker in workers:
        worker.join(120)
    said = "".join((folder / f"said-{rank}.txt").read_text() for rank in range(world))
    assert [worker.exitcode for worker in workers] == [0] * world, said


def work(rank: int, world: int, port: int, folder: Path, task, arguments: tuple) -> None:
    """What one process does: as a command does it, guarded and inside runtime.processes."""
    with open(folder / f"said-{rank}.txt", "w", buffering=1) as said:
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)

        def main() -> None:
            with runtime.process_group("cpu"):
                task(*arguments)

        try:
            runtime.guarded(main)
        except Exception:
            traceback.print_exc()  # while the file is open
            raise


def watched(run: train.Run) -> dict:
    """What a run does, as it does it: the rows of each batch, and how often gradients were exchanged in each step."""
    seen, batches = {"rows": [], "exchanges": []}, run.batches

    def noting():
        for batch in batches():
            seen["rows"].append(batch["patch_noise"][:, 0].tolist())  # belongs to (seed, epoch, row)
            yield batch

    run.batches = noting
    if run.processes > 1:

        def hook(state, bucket):
            if len(seen["exchanges"]) <= run.step:
                seen["exchanges"] += [0] * (run.step + 1 - len(seen["exchanges"]))
            seen["exchanges"][run.step] += 1
            return allreduce_hook(state, bucket)

        run.parallel.register_comm_hook(None, hook)
    return seen


def train_some(arguments: list[str], folder: Path, stop_at: int | None = None) -> None:
    """Train a new run, or one to resume, and leave what each process saw and the state it ended with."""
    config, sizes = train.parse(arguments)
    run = train.start(config, sizes)
    seen = watched(run)
    run.train(stop_at)
    (folder / f"seen-{run.rank}.json").write_text(json.dumps(seen))
    torch.save(run.model.state_dict(), folder / f"model-{run.rank}.pt")


def go_on(out: Path, folder: Path) -> None:
    """Take a run up again and train it to its end."""
    run = resumed_run(out)
    seen = watched(run)
    run.train()
    (folder / f"seen-{run.rank}.json").write_text(json.dumps(seen))


def fine_tune(arguments: list[str], folder: Path) -> None:
    """Fine-tune from the command line's arguments, and leave what each process ended with."""
    run = finetune.start(*finetune.parse(arguments))
    run.train()
    torch.save({"model": run.model.state_dict(), "best": [run.best, run.best_step]}, folder / f"ended-{run.rank}.pt")


def gradients_of(model, batch: dict, folder: Path) -> None:
    """Losses and gradients of one step in which each process has its share of the batch."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = copy.deepcopy(model)  # tensors sent to another process stay shared with the sender
    torch.distributed.barrier()
    shared = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    size = len(batch["images"]) // world
    mine = {name: value[rank * size : (rank + 1) * size] for name, value in batch.items() if name != "negative_noise"}
    losses = shared(mine | {"negative_noise": batch["negative_noise"][:, :size, :size]})
    sum(weight * losses[name] for name, weight in model.config.loss_weights.items() if weight > 0).backward()
    found = {"losses": {name: loss.detach() for name, loss in losses.items()}}
    found["gradients"] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save(found, folder / f"found-{rank}.pt")


def evaluate(checkpoint: Path, pairs: Path, folder: Path) -> None:
    """Retrieval of a file on several processes; every process must come to the same figures."""
    model, tokenizer, _ = load_model(checkpoint, torch.device("cpu"))
    result = retrieval(model, tokenizer, read_rows([pairs], "pairs"), torch.device("cpu"), k=5, block=3)
    rank = torch.distributed.get_rank()
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
