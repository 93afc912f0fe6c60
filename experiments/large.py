"""The cost of large datasets: time to the first steps, private memory per process, and resumption in a late epoch.

    python experiments/large.py --out data/large --rows 1000000 10000000 --results results/large.json

Writes a JSONL file with the given number of pairs, which cycle through a thousand pictures, and as many pairs in
tar archives of 10,000 (links to a single archive, to save disk space). Then trains on both with 4 workers: from a
first start, from a second start, and from a checkpoint set to epoch 20. We measure the time to the tenth step and the
maximum private memory (USS, Linux) of the training process and of a worker. --tree selects the checkout whose
train.py is measured; --form jsonl omits the archives.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402

SHARD = 10_000  # number of pairs per archive
STEPS = 10
OPTIONS = ["--preset", "nano", "--workers", "4", "--log-every", "5", "--w-mrm", "0", "--w-mim", "0"]


def picture(number: int) -> bytes:
    """A small JPEG."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_data(out: Path, rows: int) -> dict[str, str]:
    """Write the data in both forms -> the value of --data for each form"""
    images, jsonl = out / "images", out / f"{rows}.jsonl"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        (images / f"{number}.jpg").write_bytes(picture(number))
    if not jsonl.is_file():
        with open(jsonl, "w", encoding="utf-8") as file:
            for number in range(rows):
                file.write(json.dumps({"image": f"images/{number % 1000}.jpg", "caption": f"picture {number}"}) + "\n")
    first = out / "first.tar"
    if not first.is_file():
        with tarfile.open(first, "w") as archive:
            for number in range(SHARD):
                for ending, content in (("jpg", picture(number)), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:09}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    folder, last = out / f"shards-{rows}", rows // SHARD - 1
    folder.mkdir(exist_ok=True)
    for number in range(last + 1):
        if not (folder / f"{number:05}.tar").exists():
            os.link(first, folder / f"{number:05}.tar")
    return {"jsonl": str(jsonl), "tar": str(folder / f"{{00000..{last:05}}}.tar")}


def uss(process: int) -> float:
    """The private memory (USS) of a process in MB."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def children(process: int) -> list[int]:
    """The child processes of a process."""
    try:
        return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def processor_seconds() -> float:
    """The CPU time of all child processes that have ended, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def timed(tree: Path, *options: str) -> dict[str, float]:
    """Run train.py for some steps -> seconds until they are done, maximum private memory in MB"""
    began, used, largest = time.monotonic(), processor_seconds(), {"training process MB": 0.0, "worker MB": 0.0}
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tree / "train.py"), *OPTIONS, *options]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None:
            largest["training process MB"] = max(largest["training process MB"], uss(process.pid))
            largest["worker MB"] = max([largest["worker MB"], *map(uss, children(process.pid))])
            time.sleep(0.5)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read()[-2000:])
    return {"seconds": time.monotonic() - began, "processor seconds": processor_seconds() - used} | largest


def measure(tree: Path, form: str, data: str, rows: int, out: Path, check: str) -> dict:
    """Measure a first start, a second start, and a start in epoch 20."""
    vocab, run = out / "vocab.txt", out / "run"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "picture", *map(str, range(10))]
                               + [f"##{digit}" for digit in range(10)]) + "\n")  # fmt: skip
    for index in [*out.glob("*.index"), *out.glob("shards-*/*.jsonl*")]:
        index.unlink()
    subprocess.run(["rm", "-rf", str(run)], check=True)
    common = ["--data", data, "--vocab", str(vocab), "--out", str(run), "--check", check]
    result = {"first start": timed(tree, *common, "--steps", str(STEPS))}
    subprocess.run(["rm", "-rf", str(run)], check=True)
    result["second start"] = timed(tree, *common, "--steps", str(STEPS))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["step"] = 20 * (rows // 64) + 5
    state["train"]["steps"] = state["step"] + STEPS
    torch.save(state, run / "checkpoint.pt")
    result["epoch 20"] = timed(tree, *common, "--resume")
    return result


def main() -> None:
    """Command-line entry point."""
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder for the data")
    parser.add_argument("--rows", type=int, nargs="+", required=True, help="dataset sizes, such as 1000000 10000000")
    parser.add_argument("--form", choices=("jsonl", "tar"), nargs="+", default=("jsonl", "tar"))
    parser.add_argument("--check", default="header", help="value of --check for train.py")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout that contains the train.py to measure")
    parser.add_argument("--results", type=Path, required=True, help="JSON file; its other entries are kept")
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.is_file() else {"measured": {}}
    for rows in options.rows:
        given = write_data(options.out, rows)
        for form in options.form:
            name = f"{form}, {rows} rows, --check {options.check}" + ("" if options.tree == ROOT else ", before")
            known["measured"][name] = measure(options.tree, form, given[form], rows, options.out, options.check)
            print(name, known["measured"][name])
            runtime.write_json(options.results, known | runtime.how_made("experiments/large.py"))


if __name__ == "__main__":
    runtime.guarded(main)
