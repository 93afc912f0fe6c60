"""Large data: an index beside a file in place of its rows in memory, and tar archives as they come."""

import io
import json
import os
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import new_run, read_log, resumed_run, same, square, write_rows, write_squares

from data import Collate, Pairs, TwinBatches, load_image, make_batch, open_rows, read_rows, size_of, training_batches
from mamo import MAMOConfig
from reading import rows as reading
from tokenizer import Tokenizer


@pytest.fixture
def kept(monkeypatch):
    """Every check is kept, however short."""
    monkeypatch.setattr(reading, "SAVE_AFTER", -1.0)


def counting(monkeypatch) -> list[str]:
    """A list that takes up every picture that is checked from now on."""
    seen, check = [], reading.check_image.__wrapped__
    monkeypatch.setattr(reading, "check_image", lambda path, how: seen.append(path) or check(path, how))
    return seen


# ------------------------------------------------------------------------------------------------------------- an index


def test_rows_on_demand_are_the_rows(tmp_path, kept):
    """By number, from the end, as a slice, as a whole, after pickling, from two files, from the index of the start
    before, and with a byte order mark, blank lines and no line feed at the end."""
    one = write_squares(tmp_path / "one" / "pairs.jsonl", 22, twins=10, several=True)
    text = one.read_text(encoding="utf-8").replace("\n", "\r\n\n").rstrip()
    two = one.with_name("two.jsonl")
    two.write_bytes(b"\xef\xbb\xbf" + text.encode())
    expected = [json.loads(line) for line in one.read_text(encoding="utf-8").splitlines()]
    for start in ("first", "second"):
        rows = open_rows([one, two], "pairs")
        assert len(rows) == 44 and rows[0] == rows[:1][0] and rows[-1] == rows[43] == list(rows)[43]
        assert (one.with_name(one.name + ".index")).is_file()
        for number, row in enumerate(rows):
            assert row["caption"] == expected[number % 22]["caption"], start
            assert row["image"] == str(one.parent / expected[number % 22]["image"])
        assert list(pickle.loads(pickle.dumps(rows))) == list(rows) == read_rows([one, two], "pairs")
        assert rows.twins.tolist() == [n // 2 * 2 if n % 22 < 10 else n for n in range(44)]
        with pytest.raises(IndexError):
            rows[44]
    assert open_rows(one, "pairs").content == [22, rows.content[1]] and rows.content[1] == rows.content[2]


def test_what_was_checked_is_not_checked_again_until_the_file_changes(tmp_path, kept, monkeypatch, capsys):
    """Another size, time or task, or a more thorough check: checked anew; a damaged index is none."""
    path = write_squares(tmp_path / "pairs.jsonl", 6)
    index, seen = tmp_path / "pairs.jsonl.index", counting(monkeypatch)

    def checked(task: str = "pairs", check: str = "header") -> bool:
        seen.clear()
        assert len(open_rows(path, task, check)) == 6
        return bool(seen)

    assert checked() and not checked() and not checked(check="none")
    assert "1 of 1 files were checked before; to check them again delete" in capsys.readouterr().out
    assert checked(check="full") and not checked() and not checked(check="full")
    os.utime(path, ns=(0, 10**18))
    assert checked() and not checked()
    index.write_bytes(index.read_bytes()[:-8])
    assert checked() and not checked()
    whole = index.read_bytes()
    for place in range(0, len(whole), 37):  # a disk may change a byte anywhere
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert checked() and not checked(), f"byte {place} of {len(whole)}"
    rows = [json.loads(line) | {"text": "a"} for line in path.read_text().splitlines()]
    write_rows(path, rows)
    assert checked() and checked("phrases") and not checked("phrases") and checked()


def test_check_none_looks_at_nothing_and_twins_are_known_all_the_same(tmp_path):
    """Rows are taken as they are; with a picture that is missing, and without a digest."""
    twins = [{"image": "none.png", "caption": f"c {n}", "twin": n // 2} for n in range(6)]
    path = write_rows(tmp_path / "pairs.jsonl", [*twins, "not JSON"])
    rows = open_rows(path, "pairs", "none")
    assert rows.content == [7, ""] and rows.twins.tolist() == [0, 0, 2, 2, 4, 4, 6]
    with pytest.raises(ValueError, match="not JSON"):
        open_rows(path, "pairs")


def test_bad_rows_are_not_kept_for_who_does_not_leave_them_out(tmp_path, kept, capsys):
    """What skip_bad found is told at every start, and is no excuse for a start without it."""
    good = [json.loads(line) for line in write_squares(tmp_path / "a.jsonl", 4).read_text().splitlines()]
    path = write_rows(tmp_path / "pairs.jsonl", [*good, "[]", good[0] | {"image": "none.png"}])
    for _ in range(2):
        assert len(open_rows(path, "pairs", skip_bad=True)) == 4
        assert "left out: 1 bad rows and 1 rows whose picture cannot be used" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"pairs\.jsonl:5: found list"):
            open_rows(path, "pairs")
    write_rows(path, [*good, good[0] | {"image": "none.png"}])
    assert len(open_rows(path, "pairs", skip_bad=True)) == 4
    with pytest.raises(ValueError, match="1 of 5 pictures cannot be used"):
        open_rows(path, "pairs")


def test_an_index_that_cannot_be_written_is_done_without(tmp_path, kept, monkeypatch, capsys):
    """The data may lie where nobody may write."""
    path = write_squares(tmp_path / "pairs.jsonl", 4)
    monkeypatch.setattr(
        "runtime.os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert len(open_rows(path, "pairs")) == 4
    assert "pairs.jsonl.index cannot be written" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- archives


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar archive of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def png(number: int) -> bytes:
    """A square as the bytes of a PNG."""
    buffer = io.BytesIO()
    square(number).save(buffer, format="PNG")
    return buffer.getvalue()


def shard(path: Path, numbers: range, kind: str = "txt") -> Path:
    """Squares with captions in one of the forms that archives have."""
    members = {}
    for number in numbers:
        members[f"{number:06}.png"] = png(number)
        if kind in ("txt", "both"):
            members[f"{number:06}.txt"] = f"caption {number}\n".encode()
        if kind in ("json", "both"):
            members[f"{number:06}.json"] = json.dumps({"caption": f"caption {number}", "url": "x"}).encode()
    return write_tar(path, members)


@pytest.mark.parametrize("kind", ["txt", "json", "both"])
def test_archives_hold_the_rows_that_loose_files_would(tmp_path, kind):
    """In order, with the same pixels, sizes and batches; the archives one by one or as a range."""
    for number in range(3):
        shard(tmp_path / f"{number:05}.tar", range(4 * number, 4 * number + 4), kind)
    rows = open_rows([str(tmp_path / "{00000..00002}.tar")], "pairs", check="full")
    assert list(rows) == list(open_rows([tmp_path / f"{number:05}.tar" for number in range(3)], "pairs"))
    assert [row["caption"] for row in rows] == [f"caption {number}" for number in range(12)]
    loose = []
    for number, row in enumerate(rows):
        square(number).save(tmp_path / f"{number}.png")
        loose.append({"image": str(tmp_path / f"{number}.png"), "caption": row["caption"]})
        assert load_image(row["image"]).tobytes() == square(number).tobytes()
        assert size_of(row["image"]) == square(number).size
    tokenizer = Tokenizer.build(row["caption"] for row in rows)
    config = MAMOConfig(vocab_size=len(tokenizer), image_size=(16, 24), patch_size=8, max_tokens=16)
    batches = [
        list(islice(training_batches(Pairs(some, tokenizer, config), TwinBatches(some, 4), Collate(0), workers), 7))
        for some, workers in ((rows, 0), (rows, 2), (loose, 0))
    ]
    for one, other, third in zip(*batches, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name])
            assert torch.equal(one[name], third[name]) or name == "image_id"
    ids = make_batch([row["image"] for row in rows[:3]], ["a", "b", "c"], config, tokenizer)["image_id"]
    assert len(set(ids.tolist())) == 3


def test_an_archive_is_listed_once_and_anew_when_it_changes(tmp_path):
    """The list beside it belongs to this very archive."""
    path = shard(tmp_path / "a.tar", range(4))
    listed = tmp_path / "a.tar.jsonl"
    open_rows(path, "pairs")
    listed.write_text(listed.read_text().replace("caption 0", "caption nought"))
    made = path.stat().st_mtime_ns
    os.utime(listed, ns=(made, made))
    assert open_rows(path, "pairs")[0]["caption"] == "caption nought", "listed once"
    shard(path, range(6))
    os.utime(path, ns=(made - 1, made - 1))  # an older one that was put in its place
    assert len(open_rows(path, "pairs")) == 6


def test_samples_without_a_picture_or_a_caption_are_left_out_with_a_count(tmp_path, capsys):
    """Also a caption that is blank, a file in a folder, and members that are neither."""
    members = {"a.png": png(0), "a.txt": b"one", "b.txt": b"two", "c.png": png(1), "d.png": png(2), "d.txt": b" "}
    members |= {"x/a.png": png(3), "x/a.txt": b"three", "x/a.cls": b"7", "README": b"?", "e.json": b'{"caption": "no"}'}
    rows = open_rows(write_tar(tmp_path / "a.tar", members), "pairs")
    assert [row["caption"] for row in rows] == ["one", "three"]
    assert "5 of 7 samples lack a picture or a caption" in capsys.readouterr().out


def test_what_is_no_archive_is_one_sentence(tmp_path):
    """Half an archive, a compressed one, something else, nothing, and one without a pair; nothing is left behind."""
    whole = shard(tmp_path / "whole.tar", range(4)).read_bytes()
    (tmp_path / "half.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.tar").write_bytes(b"something else" * 100)
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    write_tar(tmp_path / "empty.tar", {"a.cls": b"1"})
    says = {
        "half.tar": "cannot be read to its end",
        "other.tar": "cannot be read to its end",
        "a.tar.gz": "is compressed: unpack it",
        "none.tar": "is not a file: give archives that are there",
        "empty.tar": "holds no pair",
    }
    for name, sentence in says.items():
        with pytest.raises(ValueError, match=sentence) as error:
            open_rows(tmp_path / name, "pairs")
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.jsonl")) and not list(tmp_path.glob("*.tmp"))


def test_a_picture_that_is_broken_in_an_archive_is_named(tmp_path):
    """By archive and member."""
    path = write_tar(tmp_path / "a.tar", {"a.png": png(0)[:40], "a.txt": b"one", "b.png": png(1), "b.txt": b"two"})
    with pytest.raises(ValueError, match=r"1 of 2 pictures.*\n.*a\.tar#a\.png"):
        open_rows(path, "pairs", check="full")
    assert len(open_rows(path, "pairs", check="full", skip_bad=True)) == 1


def test_resuming_in_the_middle_of_an_epoch_from_archives_is_exact(tmp_path, capsys):
    """Weights, optimiser and log, with workers, and after the archives were moved."""
    for number in range(2):
        shard(tmp_path / "here" / f"{number:05}.tar", range(8 * number, 8 * number + 8))
    data, more = tmp_path / "here" / "{00000..00001}.tar", ("--steps", "7", "--workers", "1")
    straight = new_run(data, tmp_path / "straight", *more)
    straight.train()
    new_run(data, tmp_path / "broken", *more).train(stop_at=3)
    (tmp_path / "here").rename(tmp_path / "there")
    run = resumed_run(tmp_path / "broken", "--data", str(tmp_path / "there" / "{00000..00001}.tar"))
    assert run.step == 3 and 3 % run.order.batches_per_epoch
    run.train()
    assert same(straight.state()["model"], run.state()["model"]) and straight.content == run.content
    assert same(straight.state()["optimizer"], run.state()["optimizer"])
    assert read_log(straight.out) == read_log(run.out)
