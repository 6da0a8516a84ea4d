"""Captions in the browser: `python app.py --checkpoint RUN`, and a JSON endpoint for programs.

Pages of other sites can neither read an answer nor have an image captioned. Images are kept in
memory while they are captioned, and never written to disk.
"""

import contextlib
import io
import logging
import math
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from decoding import METHODS, DecodingConfig
from inference import SHIPPED, Captioner, Explained, list_checkpoints
from model_file import read_header
from util import cards, fetching, openapi, origins, program, uploads
from util.files import UserError
from util.image_process import ImageReader
from util.images import MAX_PIXELS
from util.origins import RefusedError
from util.results import Caption
from util.scripts import list_words
from util.uploads import FORM_BYTES, MEGABYTE, Upload

# The smallest and the largest value a request may have; integers where these are. Those of
# min_words and max_words depend on the model.
BOUNDS: dict[str, tuple[float, float]] = {
    "n": (1, 10),
    "beam_size": (1, 20),
    "length_penalty": (0.0, 10.0),
    "no_repeat_ngram": (0, 100),
    "temperature": (0.01, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.001, 1.0),
    "seed": (0, 2**31),
}
THREADS = 16  # requests handled at a time; captioning has a limit of its own
CONNECTIONS = 64
MAX_WAIT = 60.0  # seconds that an image waits for its turn
MAX_SECONDS = 20.0  # that reading an image may take; the slowest JPEG that is read takes 10
FETCHES = 4  # images fetched at a time: slow addresses must leave threads to the others
EXAMPLES = Path(__file__).parent / "docs" / "examples"

# What weights/README.md says of the shipped model, and the probabilities from which its captions
# are called fairly sure and sure: of 550 validation images (400 of Flickr8k, 150 of COCO), 44 % of
# the captions below the first have a CIDEr below 0.2, so that they have next to nothing in common
# with those of people; between the two 27 %, above the second 12 %.
WARNING = "Captions are often wrong."
CARD = "of a hundred everyday photographs, 28 had a caption with nothing false in it"
SURE = [0.5, 0.6]

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    captioner: Captioner,
    *,
    max_mb: float = 20.0,
    at_once: int = 2,
    hostnames: Collection[str] = (),
    allow_origin: Collection[str] = (),
    model: dict[str, Any] | None = None,
    fetch: Callable[[str, int], bytes] | None = None,
    max_wait: float = MAX_WAIT,
    max_seconds: float = MAX_SECONDS,
) -> Any:
    """Return the Flask application that serves a captioner.

    An upload has at most `max_mb` megabytes; `at_once` images are captioned at a time, the others
    wait up to `max_wait` seconds. An image that takes more than `max_seconds` to read is refused.
    Requests must name the server by an IP address, as localhost, or by one of `hostnames`; pages
    of `allow_origin` may send them too. `model` is what `describe_model` returns. `fetch` returns
    the file at an address, of at most so many bytes; without it, addresses are refused.
    """
    import flask

    class InMemoryRequest(flask.Request):
        def _get_file_stream(self, *args: Any, **keywords: Any) -> io.BytesIO:
            return io.BytesIO()  # werkzeug's own would put larger files on the disk

    app = flask.Flask("app", root_path=str(Path(__file__).parent), static_folder="static")
    app.request_class = InMemoryRequest
    app.json.sort_keys = False
    max_bytes = round(max_mb * MEGABYTE)
    app.config["MAX_CONTENT_LENGTH"] = max_bytes + FORM_BYTES
    app.config["MAX_FORM_MEMORY_SIZE"] = FORM_BYTES
    app.config["MAX_FORM_PARTS"] = 32
    allowed = frozenset(map(origins.parse_origin, allow_origin))
    settings = list_settings(captioner)
    bounds = {
        name: (each["least"], each["most"]) for name, each in settings.items() if "least" in each
    }
    examples = cards.list_examples(EXAMPLES)
    app.extensions["image_readers"] = [ImageReader(max_seconds) for _ in range(at_once)]
    readers: queue.Queue[ImageReader] = queue.Queue()
    for reader in app.extensions["image_readers"]:
        readers.put(reader)
    fetches = threading.BoundedSemaphore(FETCHES)

    def get_content(upload: Upload) -> bytes:
        """Return the file of a request, which is fetched if it is an address."""
        if not upload.url:
            return upload.content
        if fetch is None:
            raise UserError("this server fetches no addresses; send the photo itself")
        if not fetches.acquire(timeout=max_wait / 4):
            raise RefusedError(503, "too many addresses are being fetched; try again in a minute")
        try:
            return fetch(upload.url, max_bytes)
        finally:
            fetches.release()

    @contextlib.contextmanager
    def take_reader() -> Iterator[ImageReader]:
        """Wait for a turn to read and caption an image: few bytes may be many pixels."""
        try:
            reader = readers.get(timeout=max_wait)
        except queue.Empty:
            message = "too many photos are waiting; try again in a minute"
            raise RefusedError(503, message) from None
        try:
            yield reader
        finally:
            readers.put(reader)

    @app.before_request
    def check_request() -> Any:
        origins.check_sender(flask.request, hostnames, allowed)
        flask.request.max_content_length = uploads.body_limit(flask.request, max_bytes)
        return ("", 204) if origins.is_preflight(flask.request) else None

    @app.get("/")
    def page() -> Any:
        return app.send_static_file("index.html")

    @app.get("/health")
    def health() -> dict[str, Any]:
        limits = {"max_mb": max_mb, "max_pixels": MAX_PIXELS, "at_once": at_once}
        return {
            "status": "ok",
            **limits,
            "fetches": fetch is not None,
            "settings": settings,
            "model": model or {"name": "", "about": "", "warning": WARNING, "sure": None},
            "examples": examples,
        }

    @app.get("/openapi.json")
    def description() -> dict[str, Any]:
        return openapi.describe(settings, fetches=fetch is not None)

    @app.get("/examples/<name>")
    def example(name: str) -> Any:
        if not any(each["name"] == name for each in examples):
            flask.abort(404)
        return flask.send_from_directory(EXAMPLES, name)

    @app.post("/caption")
    def caption() -> dict[str, Any]:
        upload, sent = uploads.read_upload(flask.request, max_bytes)
        values = {
            name: uploads.read_setting(name, value, bounds, METHODS) for name, value in sent.items()
        }
        explain = captioner.explain if values.pop("attention", True) else captioner.candidates
        content = get_content(upload)
        with take_reader() as reader:
            image = reader.read(content, upload.name, captioner.at_least)
            captions = explain(image, **{"n": 1, **values})
        return {"captions": [to_json(each) for each in captions]}

    if fetch is not None:

        @app.post("/fetch")
        def fetch_image() -> Any:
            upload, others = uploads.read_upload(flask.request, max_bytes)
            if others or not upload.url:
                raise UserError("send the address of one photo as url, and nothing else")
            content = get_content(upload)
            with take_reader() as reader:  # no files of other kinds pass through here
                reader.read(content, upload.name, captioner.at_least)
            return flask.Response(content, mimetype="application/octet-stream")

    @app.after_request
    def add_headers(response: Any) -> Any:
        response.headers.update(HEADERS)
        response.headers.update(origins.cors_headers(flask.request, allowed))
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.errorhandler(UserError)
    def refuse(error: UserError) -> tuple[dict[str, str], int]:
        return {"error": " ".join(str(error).split())}, getattr(error, "status", 400)

    messages = {
        400: "this is not a request that can be read",
        404: "there is nothing here; the page is at /, captions are given at POST /caption",
        405: "this address is not asked that way; captions are given at POST /caption",
        413: f"this upload has more than {max_mb:g} MB, the most that is taken",
        500: "something went wrong on the server; its terminal says what",
    }
    for status, message in messages.items():
        answer = ({"error": message}, status)
        app.register_error_handler(status, lambda _, answer=answer: answer)
    return app


def list_settings(captioner: Captioner) -> dict[str, dict[str, Any]]:
    """Return the default of each setting of a request, and its choices or its bounds."""
    longest = captioner.model.config.seq_len
    known = {**BOUNDS, "max_words": (1, longest), "min_words": (1, longest)}
    defaults = {"n": 1, **asdict(captioner.decoding)}
    settings = {"method": {"default": defaults.pop("method"), "choices": list(METHODS)}}
    for name, default in defaults.items():
        least, most = known[name]
        settings[name] = {"default": default, "least": least, "most": most}
    return settings


def to_json(caption: Caption | Explained) -> dict[str, Any]:
    """Return a caption for JSON, with the geometric mean of its words' probabilities."""
    attention = getattr(caption, "attention", None)
    return {
        "text": caption.text,
        "log_prob": caption.log_prob,
        "probability": math.exp(caption.score),
        "words": getattr(caption, "words", None) or list_words(caption.text),
        "attention": None if attention is None else attention.astype(float).round(4).tolist(),
    }


def describe_model(checkpoints: Sequence[Path] | None) -> dict[str, Any]:
    """Return the name of the model, what it is, how far it can be trusted, as the page shows it.

    `sure` are the probabilities from which a caption is called fairly sure, and sure: they have
    been compared with captions of people for the shipped model alone.
    """
    paths = [SHIPPED] if checkpoints is None else checkpoints
    headers = [({}, None) if path.suffix == ".onnx" else read_header(path) for path in paths]
    about = dict.fromkeys(cards.describe_header(header) for header, _ in headers)
    is_shipped = SHIPPED.exists() and headers == [read_header(SHIPPED)]
    return {
        "name": "the shipped model" if is_shipped else " + ".join(map(cards.name_model, paths)),
        "about": "; ".join(filter(None, about)),
        "warning": f"{WARNING[:-1]}: {CARD}." if is_shipped else WARNING,
        "sure": SURE if is_shipped else None,
    }


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    checkpoint: Path | None = None
    """A model file, or the folder of a run (default: the shipped model)."""
    ensemble: tuple[Path, ...] = ()
    """Several checkpoints that decode together by the mean of their probabilities."""
    device: str = "auto"
    """auto, cpu, cuda (or gpu), cuda:1, mps."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is for this machine only, 0.0.0.0 for all that reach it."""
    port: int = 8000
    """Port to listen at (0: any that is free)."""
    hostnames: tuple[str, ...] = ()
    """Host names of the page besides localhost and IP addresses, such as that of a proxy."""
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Site whose pages may ask for captions, as https://example.org; may be given several times."""
    fetch_urls: bool = True
    """Let visitors name the http(s) address of a photo, which this machine then fetches."""
    max_mb: float = 20.0
    """Largest photo in megabytes."""
    at_once: int = 2
    """Number of photos captioned at a time; the others wait for their turn."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port {self.port} must be between 0 and 65535 (0: any that is free)")
        if not 0 < self.max_mb <= 1000:
            raise UserError(f"max mb {self.max_mb:g} must be above 0 and at most 1000")
        if self.at_once < 1:
            raise UserError(f"at once {self.at_once} must be at least 1")
        for origin in self.allow_origin:
            origins.parse_origin(origin)


def create_server(app: Any, config: Config) -> Any:
    """Return the server of an application, bound to its address; UserError if it can't be."""
    import waitress

    from util import connections

    # Twice the limit is read, so that a photo slightly too large gets an answer that says so.
    most = 2 * round(config.max_mb * MEGABYTE) + FORM_BYTES
    try:
        server = waitress.create_server(
            app,
            host=config.host,
            port=config.port,
            threads=THREADS,
            connection_limit=CONNECTIONS,
            cleanup_interval=1,  # seconds between looks for connections that are late
            max_request_body_size=most,
            inbuf_overflow=most + 1,  # above it, waitress writes to the disk
            ident=None,
        )
    except (OSError, ValueError) as error:
        reason = program.explain(error).rstrip(".")
        raise UserError(
            f"can't listen at {config.host}, port {config.port} ({reason}); choose another --port "
            "or --host"
        ) from error
    connections.limit_requests(server)
    return server


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    config = program.parse(
        Config, argv, program="app.py", description="Caption photos in a browser."
    )
    try:
        import flask  # noqa: F401
        import waitress  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing; install it: pip install -r requirements-app.txt"
        ) from error
    checkpoints = list_checkpoints(config.checkpoint, config.ensemble)
    captioner = Captioner.load(checkpoints, config.device, **asdict(config.decoding))
    # Invalid settings fail here, and the first request is not slower than the others.
    captioner.caption(Image.new("RGB", (64, 64)))
    app = create_app(
        captioner,
        max_mb=config.max_mb,
        at_once=config.at_once,
        hostnames=(*config.hostnames, config.host),
        allow_origin=config.allow_origin,
        model=describe_model(checkpoints),
        fetch=fetching.fetch if config.fetch_urls else None,
    )
    server = create_server(app, config)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it reports queues
    port = getattr(server, "effective_port", config.port)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    print(f"http://{host}:{port} (Ctrl-C stops it)", flush=True)
    try:
        server.run()
    finally:
        for reader in app.extensions["image_readers"]:
            reader.close()


if __name__ == "__main__":
    program.run(main)
