"""A web page to try out a checkpoint on a picture and a text: both scores, a map per word, nearest gallery items.

    python -m tools.serve --checkpoint weights/demo.pt --data data/scenes/pairs_test.jsonl

Then open the printed address. The server is meant for one person on one machine: it listens on the loopback interface
only, rejects cross-site requests, and processes one picture at a time. Files dropped on the page are decoded in memory
and never written to disk; their names are not sent.

How to read it: `Looker.look` computes the content of the page, `Handler` serves the requests of the page.
"""

import argparse
import base64
import binascii
import contextlib
import io
import json
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image

import runtime
from data import captions_of, is_text, is_video, read_rows
from eval import UNASKED, Encoded, check_ranks, encode_rows, load_for, match_best, rerank
from explain import How, hidden_views, pixels_of
from reading.pictures import FORMATS, load_image, to_rgb
from tokenizer import Tokenizer
from tools.report import embed, filled, maps_of_words, number, packed, words_of

TEMPLATE = Path(__file__).with_name("serve.html")
LONGEST = 1000  # maximum number of characters in a text
MOST_BYTES = 30 * 2**20  # maximum size of a request
MOST_PIXELS = 50_000_000  # maximum size of a picture, which takes 150 MB when decoded
GALLERY = 5000  # maximum number of pictures in the gallery
NEAREST = 5  # number of nearest pictures and captions to show
OFFERED = 8  # number of gallery pictures offered on the start page
RERANKED = 32  # number of candidates re-ranked by matching


class Looker:
    """A checkpoint and a gallery, which is encoded once; processes one picture at a time."""

    def __init__(self, model, tokenizer: Tokenizer, rows: list[dict], device: torch.device, how: How):
        self.model, self.tokenizer, self.device, self.how = model.eval(), tokenizer, device, how
        self.lock, self.encoded = threading.Lock(), None
        if rows:
            _, _, self.encoded = encode_rows(model, tokenizer, rows, device, captions_of)
        self.captions = {row["image"]: captions_of(row)[0] for row in reversed(rows)}

    def about(self, checkpoint: Path) -> dict:
        """The content of the page before the first request."""
        offered = self.encoded.images[:OFFERED] if self.encoded else []
        sizes = {"pictures": len(self.encoded.images), "captions": len(self.encoded.texts)} if self.encoded else {}
        return {
            "checkpoint": str(checkpoint),
            "grid": self.model.config.grid,
            "mapped": self.model.config.w_itm > 0,
            "how": str(self.how),
            "longest": LONGEST,
            "gallery": sizes,
            "offered": [self.shown(number) for number in range(len(offered))],
        }

    def shown(self, number: int) -> dict:
        """A gallery picture in the format of the page."""
        name = self.encoded.images[number]
        return embed(load_image(name)) | {"number": number, "caption": self.captions[name]}

    def picture(self, asked: dict) -> Image.Image:
        """The picture in a request. Raises ValueError, in one sentence, if it is missing or cannot be read."""
        if "number" in asked:
            if type(asked["number"]) is not int or not self.encoded or not 0 <= asked["number"] < len(self.captions):
                raise ValueError(f"there is no picture {asked['number']!r:.50} in the gallery")
            return load_image(self.encoded.images[asked["number"]])
        try:
            raw = base64.b64decode(asked["picture"], validate=True)
        except (LookupError, TypeError, ValueError, binascii.Error) as error:
            raise ValueError("a picture is missing: drop one, or choose one from the gallery") from error
        try:
            with Image.open(io.BytesIO(raw), formats=FORMATS) as file:
                size = file.size
                if size[0] * size[1] <= MOST_PIXELS:
                    return to_rgb(file)
        except Exception as error:  # Pillow raises many kinds of exceptions for corrupt files
            raise ValueError("this file cannot be read as a picture: give a JPEG, a PNG or a WebP") from error
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels is larger than the {MOST_PIXELS // 10**6} million that this "
            "page takes: make it smaller"
        )

    @torch.inference_mode()
    def look(self, asked: dict) -> dict:
        """The content of the page for a picture and a text.

        Args:    asked   {"text", and "picture": a base64-encoded image file, or "number": index of a gallery picture}
        Returns: {"picture", "words": [[word, whether it has a map]], "maps", "contrast", "matching", "unknown": words,
                 "captions": [{"text", "contrast", "matching"}], "pictures": [{...}]}; see report.py for maps
        Raises:  ValueError, in one sentence, for a request that cannot be answered
        """
        text = asked.get("text")
        if not is_text(text):
            raise ValueError("a text is missing, or cannot be read: say what the picture might show")
        if len(text) > LONGEST:
            raise ValueError(f"the text has {len(text):,} letters: give at most {LONGEST:,}")
        picture, model, config = self.picture(asked), self.model, self.model.config
        words = words_of(self.tokenizer, text, config.max_tokens)
        with self.lock:
            pixels = pixels_of(picture, config).to(self.device)
            ids, mask = (part.to(self.device) for part in self.tokenizer([text], config.max_tokens))
            image, read = model.encode_image(pixels[None]), model.encode_text(ids, mask)
            embeds = model.embed_image(image).cpu(), model.embed_text(read).cpu()
            own = Encoded([""], [text], image.cpu(), read.cpu(), mask.cpu(), *embeds)
            maps, each = None, config.w_itm > 0 and config.w_mlm > 0  # without MLM head, only a map of the whole text
            if config.w_itm > 0:
                views = hidden_views(model, pixels, self.how)
                maps = packed(maps_of_words(model, self.tokenizer, *views, text), config.grid)
            scores = self.scored(own, own, "image_to_text")[0]
            near = {"captions": [], "pictures": []}
            if self.encoded:
                found = self.scored(own, self.encoded, "image_to_text")[:NEAREST]
                near["captions"] = [{"text": self.encoded.texts[one["place"]]} | one for one in found]
                found = self.scored(own, self.encoded, "text_to_image")[:NEAREST]
                near["pictures"] = [self.shown(one["place"]) | one for one in found]
        return {
            "picture": embed(picture),
            "words": [[word, each and bool(places)] for word, places in words],
            "maps": maps,
            "unknown": self.tokenizer.unknown_words(text),
            "read": int(mask.sum()) == len(self.tokenizer.encode(text)),
            **scores,
            **near,
        }

    def scored(self, own: Encoded, gallery: Encoded, direction: str) -> list[dict]:
        """The gallery ranked for the user's picture or text, best first, as in retrieval -> [{"place", "contrast",
        "matching"}]"""
        to_text, model = direction == "image_to_text", self.model
        cosines = own.image_embed @ gallery.text_embed.T if to_text else own.text_embed @ gallery.image_embed.T
        logits = torch.full_like(cosines, torch.nan, dtype=torch.double)
        if model.config.w_itm > 0:
            mine = {"image": own.image} if to_text else {"text": own.text, "attention_mask": own.attention_mask}
            both, most = replace(gallery, **mine), min(RERANKED, cosines.shape[1])
            logits = match_best(model, both, cosines, 0, direction, most, self.device)
        ranked = rerank(cosines, logits, model.temperature.item(), model.matching_weight)[0]
        return [
            {
                "place": place,
                "contrast": number(cosines[0, place].item()),
                "matching": number(logits[0, place].sigmoid().item()),
            }
            for place in ranked.argsort(descending=True, stable=True).tolist()
        ]


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page, POST /look answers a request of the page; all other requests are rejected."""

    timeout = 30  # seconds without data after which a request times out
    server_version = "mamo"

    def __init__(self, looker: Looker, page: bytes, *given):
        self.looker, self.page = looker, page
        super().__init__(*given)

    def handle(self) -> None:
        """Handle the requests of a connection, which the other side may close at any time."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        """Send one complete response."""
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
             "img-src data: blob:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, sentence: str) -> None:
        """Reject a request with a one-sentence reason, without reading the rest of it."""
        self.close_connection = True
        self.answer(status, json.dumps({"error": sentence}).encode())

    def is_ours(self) -> bool:
        """Whether a request comes from our page, not from another site in the browser, whatever its host name."""
        port = self.server.server_address[1]
        ours = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in ours and (origin is None or origin.removeprefix("http://") in ours)

    def do_GET(self) -> None:
        """Serve the page."""
        if not self.is_ours():
            self.refuse(403, "this page answers its own address only")
        elif self.path != "/":
            self.refuse(404, "there is one page here, /")
        else:
            self.answer(200, self.page, "text/html")

    def do_POST(self) -> None:
        """Answer a request of the page."""
        length = self.headers.get("Content-Length", "")
        if not self.is_ours():
            self.refuse(403, "this page answers its own address only")
        elif self.path != "/look":
            self.refuse(404, "only /look takes requests")
        elif not length.isascii() or not length.isdecimal():
            self.refuse(411, "the length of the request is missing")
        elif int(length.lstrip("0")[:20] or 0) > MOST_BYTES:
            self.refuse(413, f"this is larger than {MOST_BYTES // 2**20} MB: give a smaller picture")
        else:
            try:
                asked = json.loads(self.rfile.read(int(length)))
                if not isinstance(asked, dict):
                    raise ValueError("a request must hold a text and a picture")
                found = self.looker.look(asked)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                self.refuse(400, "the request is not JSON")
            except ValueError as error:
                self.refuse(400, str(error))
            else:
                self.answer(200, json.dumps(found).encode())

    def log_message(self, form: str, *given) -> None:
        """Do not log successful requests."""

    def log_error(self, form: str, *given) -> None:
        """Log errors, without control characters that could affect a terminal."""
        print((form % given).encode("unicode_escape").decode(), file=sys.stderr)


def make_server(looker: Looker, checkpoint: Path, port: int) -> ThreadingHTTPServer:
    """Create a server without starting it; port 0 = any free port. Raises ValueError for a port that is in use."""
    page = filled(TEMPLATE, looker.about(checkpoint)).encode()
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, looker, page))
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {port} cannot be used ({error}): give another --port") from error


def parse() -> argparse.Namespace:
    """Parse the command line, and set the fields that load_for expects but only the commands of eval.py define."""
    parser = runtime.Parser(
        prog="python -m tools.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt of train.py, or weights/demo.pt")
    parser.add_argument("--data", nargs="+", default=[], help="JSONL files of pairs that form the gallery")
    parser.add_argument("--port", type=int, default=8000, help="port on the loopback interface (%(default)s)")
    parser.add_argument("--passes", type=int, default=How.passes, help="masked images per map, see explain.py")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.set_defaults(command="search", **UNASKED)
    return parser.parse_args()


def main() -> None:
    """Load the checkpoint, encode the gallery, and serve until Ctrl-C."""
    options = parse()
    device = runtime.pick_device(options.device)
    model, tokenizer = load_for(options, device)
    check_ranks(model, 0)
    rows = read_rows(options.data, "pairs") if options.data else []
    if any(is_video(row["image"]) for row in rows):
        raise ValueError(f"{' '.join(options.data)} holds videos: this page looks at pictures")
    if len({row["image"] for row in rows}) > GALLERY:
        raise ValueError(f"the gallery has more than {GALLERY:,} pictures: give fewer rows")
    server = make_server(
        Looker(model, tokenizer, rows, device, How(passes=options.passes)), options.checkpoint, options.port
    )
    with server:
        print(f"open http://127.0.0.1:{server.server_address[1]} in a browser; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    runtime.guarded(main)
