"""The page to try a checkpoint: what it answers is what eval.py says, and nothing that is sent to it brings it down."""

import base64
import http.client
import io
import json
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import new_run, square, write_squares
from PIL import Image
from test_eval import shaken

from data import read_rows
from eval import load, load_model, search
from explain import How
from tools import serve
from tools.report import word_maps

CPU = torch.device("cpu")
HOW = How(passes=32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Twelve pairs of squares."""
    return write_squares(tmp_path_factory.mktemp("data") / "pairs.jsonl", 12)


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory) -> Path:
    """A model that says something different about every pair."""
    run = new_run(pairs, tmp_path_factory.mktemp("runs") / "shaken", "--max-tokens", "20")
    run.model.matching_weight = 1.0
    shaken(run)
    return run.out / "checkpoint.pt"


@pytest.fixture(scope="module")
def server(pairs, checkpoint):
    """A server that runs while the tests of this file do."""
    model, tokenizer, _ = load_model(checkpoint, CPU)
    looker = serve.Looker(model, tokenizer, read_rows([pairs], "pairs"), CPU, HOW)
    with serve.make_server(looker, checkpoint, 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def request(server, method: str = "POST", path: str = "/look", body: bytes = b"", **headers) -> tuple[int, bytes]:
    """One request -> status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def look(server, **asked) -> tuple[int, dict]:
    """What the page would be told."""
    status, body = request(server, body=json.dumps(asked).encode())
    return status, json.loads(body)


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """A picture as the page sends it."""
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def header_of(width: int, height: int) -> str:
    """A PNG of any size that ends behind its header."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\x0aIDAT"
    )
    return base64.b64encode(png).decode()


def test_it_answers_what_the_commands_say(server, pairs, checkpoint):
    """Scores, maps, and the order of pictures and captions, for a picture that is sent and for one of the gallery."""
    rows, text = read_rows([pairs], "pairs"), "a red square at the top left"
    model, tokenizer, _ = load_model(checkpoint, CPU)
    expected = load(checkpoint, "cpu").score(rows[3]["image"], text)
    found = search(model, tokenizer, [row["image"] for row in rows], text, CPU, serve.RERANKED)
    (maps,) = word_maps(model, tokenizer, [(rows[3]["image"], text)], HOW, CPU)
    for given in ({"number": 3}, {"picture": encoded(Image.open(rows[3]["image"]))}):
        status, said = look(server, text=text, **given)
        assert status == 200
        assert said["contrast"] == pytest.approx(expected["itc"], abs=2e-3)
        assert said["matching"] == pytest.approx(expected["itm"], abs=2e-3)
        sent = np.frombuffer(base64.b64decode(said["maps"]), dtype=np.uint8).reshape(len(maps), -1)
        np.testing.assert_allclose(sent / 255, maps / maps.amax(dim=1, keepdim=True).clamp(min=1e-12), atol=1 / 255)
        names = [row["caption"] for one in found[: serve.NEAREST] for row in rows if row["image"] == one["image"]]
        assert [one["caption"] for one in said["pictures"]] == names
        assert len(said["captions"]) == min(serve.NEAREST, len({row["caption"] for row in rows}))
        assert [word for word, mapped in said["words"] if mapped] == text.split() and not said["unknown"]


def test_it_says_what_it_does_not_know(server):
    """Words that the model lacks, and a text whose end is cut off."""
    _, said = look(server, text="a kitten at the top " * 9, number=0)
    assert said["unknown"] == ["kitten"] and not said["read"]


def test_without_matching_there_is_no_map_and_without_a_gallery_nothing_near(pairs, tmp_path):
    run = new_run(pairs, tmp_path / "run", "--w-itm", "0")
    looker = serve.Looker(run.model, run.tokenizer, [], CPU, HOW)
    said = looker.look({"text": "a red square", "picture": encoded(square(1))})
    assert said["maps"] is None and said["matching"] is None and not said["pictures"] and not said["captions"]
    assert not any(mapped for _, mapped in said["words"]) and looker.about(Path("x"))["offered"] == []


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "a text is missing"),
        ({"text": " ", "number": 0}, "a text is missing"),
        ({"text": ["a"], "number": 0}, "a text is missing"),
        ({"text": "a" * 10_000, "number": 0}, "the text has 10,000 letters: give at most 1,000"),
        ({"text": "half a pair \ud800", "number": 0}, "a text is missing, or cannot be read"),
        ({"text": "a"}, "a picture is missing"),
        ({"text": "a", "number": 12}, "there is no picture 12"),
        ({"text": "a", "number": -1}, "there is no picture -1"),
        ({"text": "a", "number": True}, "there is no picture True"),
        ({"text": "a", "number": "x" * 999}, "there is no picture 'xxx"),
        ({"text": "a", "picture": "not base64!"}, "a picture is missing"),
        ({"text": "a", "picture": 7}, "a picture is missing"),
        ({"text": "a", "picture": ""}, "cannot be read as a picture"),
        ({"text": "a", "picture": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n").decode()}, "cannot be read as"),
        ({"text": "a", "picture": encoded(square(1))[:80]}, "cannot be read as a picture"),
        ({"text": "a", "picture": header_of(10_000, 10_000)}, "10000 x 10000 pixels is larger than the 50 million"),
        ({"text": "a", "picture": header_of(2**31 - 1, 2**31 - 1)}, "picture"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_sentence(server, asked, says):
    status, said = look(server, **asked)
    assert status == 400 and says in said["error"] and "\n" not in said["error"] and len(said["error"]) < 200


def test_only_the_page_itself_is_answered(server):
    """Not another site in the same browser, whatever address it came by; and there is one page."""
    body, port = json.dumps({"text": "a", "number": 0}).encode(), server.server_address[1]
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ):
        assert request(server, body=body, **headers)[0] == 403
        assert request(server, "GET", "/", **headers)[0] == 403
    assert request(server, body=body, Origin=f"http://127.0.0.1:{port}")[0] == 200
    for path in ("/look", "/../weights", "/%2e%2e/etc/passwd", "/?x"):
        assert request(server, "GET", path)[0] == 404
    assert request(server, path="/other", body=body)[0] == 404
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null", b'{"text": NaN}'])
def test_a_request_that_is_none_is_refused(server, body):
    assert request(server, body=body)[0] == 400


def test_a_request_says_how_long_it_is(server):
    """And not too long."""
    assert request(server, body=b"{}", Content_Length=str(serve.MOST_BYTES + 1))[0] == 413
    assert request(server, body=b"{}", Content_Length="9" * 5000)[0] in (400, 413)
    assert request(server, body=b"{}", Content_Length="-1")[0] == 411


def test_two_requests_at_once_are_both_answered(server):
    """One waits for the other."""
    said, threads = {}, []
    for number in range(4):
        threads.append(
            threading.Thread(
                target=lambda n: said.update({n: look(server, text="a red square", number=n)}), args=(number,)
            )
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(said[number] == look(server, text="a red square", number=number) for number in range(4))


def test_the_page_holds_what_it_needs(server, checkpoint):
    """One file without another address in it, and the gallery's first pictures."""
    status, page = request(server, "GET", "/")
    text = page.decode()
    assert (
        status == 200
        and "REPORT_AS_JSON" not in text
        and "PAGES_" not in text
        and "src=" not in text.split("<script")[0]
    )
    about = json.loads(text.split('id="report">')[1].split("</script>")[0])
    assert about["gallery"]["pictures"] == 12 and len(about["offered"]) == serve.OFFERED and about["mapped"]


def test_a_port_that_is_taken_is_one_sentence(server, checkpoint):
    for port in (server.server_address[1], 10**6):
        with pytest.raises(ValueError, match="give another --port"):
            serve.make_server(serve.Looker(*load_model(checkpoint, CPU)[:2], [], CPU, HOW), checkpoint, port)
