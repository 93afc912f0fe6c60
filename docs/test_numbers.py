"""Every number in README.md, docs/ and CONTRIBUTING.md is traced: to a file under results/, or to the code.

A number in prose stands, rounded alike, in a file of results that its section names; one in a table or a printed output
in the files of the line 'Source: ...' under it. "a ± b" is the mean and the spread of one entry, and where a file
compares arms, a row (or a column) of a table is one arm. What follows from the code instead is written out by
`facts`. Whole numbers up to twelve that count things pass, as do headings, code, links and names such as R@5 or fp32.
"""

import dataclasses
import itertools
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from eval import FEW
from mamo import PRESETS, Config, MAMOConfig, ema_for, replace_words
from siblings import OBJECTIVES
from tools.costs import flops_of_step, growth_table, memory_table, table
from tools.prepare import scores
from train import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "weights/README.md",
]
NUMBER = re.compile(r"(?<![\w.@/^])(?<!\d,)\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?(?!\w)(?!\.\d)(?!,\d{3})")
SPREAD = re.compile(r"(\d+\.\d+) ± (\d+\.\d+)")
FILE = re.compile(r"`(results/[\w./-]+)`")
NAMES = re.compile(  # numbers that are part of a name
    r"\b(?:SIGIR|ICLR|CVPR|ACL|COCO|Table|Tables|Figure|Eq\.|Sec\.|seed|CC BY|CC BY-SA|arXiv|batch|layer) \d+(?:\.\d+)*"
    r"|https?://\S+|\]\([^)]*\)|<[^>]*>"
)
COUNTS_THINGS = 12  # whole numbers up to this one need no source in prose


# ----------------------------------------------------------------------------------------------------- what is known


class Known:
    """The numbers of some files of results."""

    def __init__(self, files: tuple[str, ...]):
        self.files = files
        self.contents = [json.loads((ROOT / file).read_text(encoding="utf-8")) for file in files]
        self.numbers, self.values, self.written = [], [], set()  # values: of single seeds, where a mean is given
        for content in self.contents:
            self.collect(content)

    def collect(self, value) -> None:
        """Leaves as numbers, keys and texts as the numbers written in them."""
        if isinstance(value, dict):
            for key, part in value.items():
                self.collect(key)
                if key == "values" and "mean" in value:
                    self.values += part
                else:
                    self.collect(part)
        elif isinstance(value, list):
            for part in value:
                self.collect(part)
        elif isinstance(value, str):
            self.written.update(NUMBER.findall(value))
        elif not isinstance(value, bool) and value is not None:
            self.numbers.append(abs(float(value)))  # the sign is not part of a number on a page

    def holds(self, number: str, one_seed: bool = False) -> bool:
        """Whether the number stands there, rounded to as many places; `one_seed` admits the values behind a mean."""
        if number in self.written or number.replace(",", "") in self.written:
            return True
        places, plain = len(number.partition(".")[2]), float(number.replace(",", ""))
        numbers = self.numbers + self.values if one_seed else self.numbers
        return any(abs(n - plain) <= 0.5 * 10**-places + 1e-9 for n in numbers)

    def pairs_of(self, value) -> set[tuple[str, str]]:
        """Every (mean, spread) below a value, with one place."""
        if isinstance(value, list):
            return set().union(*map(self.pairs_of, value))
        if not isinstance(value, dict):
            return set()
        own = {(f"{value['mean']:.1f}", f"{value['std']:.1f}")} if {"mean", "std"} <= value.keys() else set()
        return own.union(*map(self.pairs_of, value.values()))

    @property
    def arms(self) -> list[set[tuple[str, str]]]:
        """The pairs of each arm that the files compare, and of each entry beside the arms."""
        compared = [content for content in self.contents if "arms" in content]
        return [self.pairs_of(arm) for content in compared for arm in arms_of(content)]


def arms_of(content: dict) -> list:
    """The arms of a file that compares some, and what stands beside them."""
    return [*content["arms"].values(), *(part for key, part in content.items() if key != "arms")]


@cache
def known(*files: str) -> Known:
    """Each set of files is read once."""
    return Known(files)


@cache
def facts() -> tuple[str, ...]:
    """Fragments of text whose numbers follow from the code. Where the code changes, its fragment is found no more."""
    mamo, run, sizes = MAMOConfig(), TrainConfig(), {name: Config(**preset) for name, preset in PRESETS.items()}
    base, nano = sizes["base"], sizes["nano"]
    patches, words = 100 * mamo.mask_image, 100 * mamo.mask_text
    scenes = (ROOT / "world/scenes.py").read_text(encoding="utf-8")
    train, test = (int(re.search(rf'"--{split}", type=int, default=(\d+)', scenes)[1]) for split in ("train", "test"))
    masked, drawn, kept = bert_shares()
    processes = (ROOT / "tests" / "test_processes.py").read_text(encoding="utf-8")
    exact, loose = re.search(r"abs=(1e-\d)", processes)[1], re.search(r'"abs": (1e-\d)', processes)[1]
    steps = re.search(r"--steps (\d+)", processes)[1]
    siblings = (ROOT / "tests" / "test_siblings.py").read_text(encoding="utf-8")
    learning = re.search(r'"""(\d+) steps of AdamW', siblings)[1]
    agreeing = [scores(["yes"] * count + ["no"] * (10 - count))["yes"] for count in (1, 2, 3, 4)]
    fragments = [
        f"{patches:.0f} % of the patches",
        f"% of the patches in place of {patches:.0f} %",
        f"{words:.0f} % of the words",
        f"{masked} % become [MASK], {drawn} % a random word, {kept} % stay",
        f"{run.steps:,} steps",
        f"fewer than {FEW:,} rows",
        f"at most ALBEF's {ema_for(10**9)}",
        f"{train:,} training pictures",
        f"{test} new captions for {test} new pictures",
        f"among {test}",
        f"gallery of {test}",
        f"chance {100 / 2}",  # of a foil against its caption
        *("".join([f"| {100 / 2} "] * kinds) for kinds in (2, 5)),
        f"{nano.image_size[0]} x {nano.image_size[1]} px",
        f"`tiny` ({sizes['tiny'].image_size[0]} px)",
        f"ViT-S/16, {sizes['small'].image_size[0]} px",
        f"{base.image_size[0]} px: the paper's size",
        f"`base` has {base.num_patches} patches beside 30 tokens. `nano` has {nano.num_patches} beside 14",
        f"ITC and its gradient to {exact}, all losses of {steps} steps",
        f"limits after {learning} steps",
        f"to {loose}. There is one exception",
        f"agree: {', '.join(f'{score:g}' for score in agreeing)}",
        *objective_facts(),
    ]
    return tuple(sorted(fragments, key=len, reverse=True))


def bert_shares() -> list[int]:
    """Of the chosen words, how many become [MASK], another word, or stay, in percent."""
    config, ids = Config(vocab_size=1000), torch.full((1, 1000), 7)
    noise, places = (torch.arange(1000)[None] + 0.5) / 1000, torch.arange(1000)[None]
    said = replace_words(ids, places, torch.ones_like(places, dtype=torch.bool), noise, config).input_ids
    masked, stay = (said == config.mask_id).sum().item(), (said == ids).sum().item()
    return [round(share / 10) for share in (masked, 1000 - masked - stay, stay)]


def objective_facts() -> list[str]:
    """Ratios, weights and costs in the tables of docs/objectives.md; its own test holds each to its column."""
    result, bert = [], "/".join(map(str, bert_shares()))
    for model, changes in OBJECTIVES.values():
        config = model.config_class(**changes)
        ratios = [getattr(config, field) for field in vars(config) if field.startswith("mask_")]
        for ratio in (f"{100 * ratio:.0f} %" for ratio in ratios if type(ratio) is float):
            result += [f"words {ratio}", f"patches {ratio}", f"patches {ratio} dropped", f"{ratio} of the units"]
            result += [f"{ratio} mask token", f"{ratio} whole words"]
        weights = {f"{weight:g}" for weight in config.loss_weights.values() if 0 < weight < 1}
        result += [f"NCE ({weight} + {weight})" for weight in weights]
    result += table().splitlines() + memory_table("base").splitlines() + growth_table("base").splitlines()
    base = MAMOConfig(**PRESETS["base"], vocab_size=30522)
    alone = [
        dataclasses.replace(base, **{f"w_{name}": float(name == loss) for name in base.loss_weights})
        for loss in base.loss_weights
    ]
    together, *apart = (sum(flops_of_step(config, 64, 30).values()) for config in (base, *alone))
    result += [f"in `base` is {together / sum(apart):.2f} of five steps with one loss each"]
    dropped = sum(flops_of_step(dataclasses.replace(base, drop_masked=True), 64, 30).values())
    result += [f"{base.image_size[0]} px takes {dropped / together:.2f} of the operations"]
    result += ["`nano`, 14 tokens | `base`, 30 tokens", "batches of 64"]  # as the costs above
    return [*result, f"words {bert}", f"BERT's {bert}", f", {bert}"]


# ------------------------------------------------------------------------------------------------- reading the pages


@dataclasses.dataclass
class Block:
    """A piece of a page that is traced as one."""

    page: str
    line: int  # of its first line
    kind: str  # prose, table or output
    lines: list[str]
    files: tuple[str, ...]

    def where(self, offset: int) -> str:
        """For messages."""
        return f"{self.page}:{self.line + offset}"


def blocks_of(text: str, page: str) -> list[Block]:
    """The page in pieces: printed output, tables, and lines of prose, each with the files that it may be traced to."""
    lines, result, number = text.splitlines(), [], 0
    section = sections_of(lines)
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if line.startswith("```"):
            while not lines[number].startswith("```"):
                number += 1
            number += 1
            if line == "```text":
                files = source_below(lines, number)
                result.append(Block(page, start + 2, "output", lines[start + 1 : number - 1], files))
        elif line.startswith("|"):
            while number < len(lines) and lines[number].startswith("|"):
                number += 1
            files = source_below(lines, number)
            kind = "table" if files else "prose"
            result.append(Block(page, start + 1, kind, lines[start:number], files or section[start]))
        elif line and not line.startswith("#"):
            while number < len(lines) and lines[number] and not lines[number].startswith(("```", "|", "#")):
                number += 1
            result.append(Block(page, start + 1, "prose", lines[start:number], section[start]))
    return result


def sections_of(lines: list[str]) -> list[tuple[str, ...]]:
    """Of each line: the files that are named between its heading and the next."""
    heads = [number for number, line in enumerate(lines) if re.match(r"#+ ", line)]
    result: list[tuple[str, ...]] = []
    for start, end in itertools.pairwise([0, *heads, len(lines)]):
        result += [tuple(dict.fromkeys(FILE.findall("\n".join(lines[start:end]))))] * (end - start)
    return result


def source_below(lines: list[str], number: int) -> tuple[str, ...]:
    """The files of a line 'Source: ...' under a table that ends before line `number`."""
    for line in lines[number : number + 2]:
        if line.startswith("Source:"):
            return tuple(FILE.findall(line))
    return ()


def plain(line: str) -> str:
    """A line without links and names."""
    return NAMES.sub("·", line)


# ------------------------------------------------------------------------------------------------------------ tracing


def untraced(text: str, page: str) -> list[str]:
    """A sentence for each number that stands nowhere."""
    return [fault for block in blocks_of(text, page) for fault in faults_of(block)]


def faults_of(block: Block) -> list[str]:
    """Numbers of a block that are not in its files, and spreads that are not those of their mean."""
    source, faults = known(*block.files), []
    one_seed = block.kind == "prose" and "seed" in " ".join(block.lines)
    looked = ", ".join(block.files) or "a file, as its section names none"
    pairs = source.pairs_of(source.contents)
    whole = "\n".join(block.lines)
    for fact in facts():
        whole = whole.replace(fact, "·")
    whole = re.sub(r"`[^`]*`", lambda code: re.sub(r"\S", "·", code[0]), whole)  # code may go on in the next line
    for offset, line in enumerate(whole.splitlines()):
        label, cells = ("", line) if block.kind != "table" else cut(line)
        for said in SPREAD.findall(cells):
            if said not in pairs:
                faults.append(f"{block.where(offset)}: {' ± '.join(said)} is no mean with its spread in {looked}")
        for piece, strict in ((label, False), (cells, block.kind != "prose")):
            for number in NUMBER.findall(SPREAD.sub("·", plain(piece))):
                small = number.isdigit() and int(number) <= COUNTS_THINGS
                if not (small and not strict) and not source.holds(number, one_seed):
                    faults.append(f"{block.where(offset)}: {number} is not in {looked}, nor a fact of the code: {line}")
    return faults + (arm_faults(block, source) if block.kind == "table" else [])


def cut(row: str) -> tuple[str, str]:
    """A row of a table: its label, and its other cells."""
    _, label, cells = row.split("|", 2)
    return label, cells


def arm_faults(block: Block, source: Known) -> list[str]:
    """Where a file compares arms, the figures of a row are of one arm, or those of each column are."""
    if len(block.files) != 1 or not source.arms:
        return []
    rows = [[SPREAD.findall(cell) for cell in line.split("|")[2:-1]] for line in block.lines[2:]]
    by_row = [{pair for cell in row for pair in cell} for row in rows]
    by_column = [{pair for cell in column for pair in cell} for column in zip(*rows, strict=False)]
    mixed = {
        name: [place for place, pairs in enumerate(groups) if not any(pairs <= arm for arm in source.arms)]
        for name, groups in (("row", by_row), ("column", by_column))
    }
    if not mixed["row"] or not mixed["column"]:
        return []
    return [f"{block.where(2 + row)}: this row mixes the arms of {block.files[0]}" for row in mixed["row"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_number_stands_in_a_file_of_results_or_follows_from_the_code(page):
    faults = untraced(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("page", "right", "wrong"),
    [
        ("README.md", "| test, re-ranked | 97.9 ± 0.6", "| test, re-ranked | 96.1 ± 0.6"),  # the mean
        ("docs/results.md", "| maskvlm | 1000 | 1.04", "| maskvlm | 1003 | 1.04"),  # a plain number in a table
        ("docs/results.md", "95.5 | 84.3 | 76.6", "95.5 | 84.3 | 77.6"),  # the paper's
        ("README.md", "it answers 85.6 %", "it answers 17.6 %"),  # prose
        ("README.md", "1,600 steps", "1,650 steps"),  # the code's
        ("README.md", "97.8 100.0 100.0        98.2", "97.3 100.0 100.0        98.2"),  # printed
        ("docs/results.md", "| ITC | 2973 | 0.27 | 87.8 ± 0.6 |", "| ITC | 2973 | 0.27 | 87.8 ± 0.7 |"),  # the spread
        ("docs/results.md", "in 85 s on one core", "in 86 s on one core"),
        ("docs/results.md", "| glscl | 1.69 | 1.83 |", "| glscl | 1.69 | 1.87 |"),
        ("docs/objectives.md", "patches 60 % in units", "patches 65 % in units"),
        ("docs/running.md", "ITC and its gradient to 1e-6", "ITC and its gradient to 1e-7"),
        ("docs/data.md", "captions 1.3 GB", "captions 1.4 GB"),
    ],
)
def test_a_wrong_digit_is_found(page, right, wrong):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(right) >= 1, f"{page} no longer says: {right}"
    before = len(untraced(text, page))
    faults = untraced(text.replace(right, wrong, 1), page)
    assert len(faults) > before and all(fault.startswith(page + ":") for fault in faults)


def test_two_rows_that_are_exchanged_in_part_are_found():
    """Every figure stands in the file, but not in one arm."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    one, other = "| 85.8 ± 6.5 | 85.8 ± 6.1 |", "| 85.8 ± 6.1 | 85.8 ± 6.5 |"
    assert one in text
    assert any("mixes the arms" in fault for fault in untraced(text.replace(one, other), "docs/results.md"))


def test_a_number_without_a_source_is_found():
    page = "# Title\n\nFast: 13.7 times.\n\n## Another\n\nSee `results/demo.json`: 1.61 times.\n"
    found = untraced(page, "page.md")
    assert len(found) == 2 and found[0].startswith("page.md:3: 13.7") and found[1].startswith("page.md:7: 1.61")
