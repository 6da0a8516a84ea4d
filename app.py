"""Captions in the browser: `python app.py --checkpoint RUN`, and a JSON endpoint for programs.

Pages of other sites can neither read an answer nor have an image captioned. Images are kept in
memory while they are captioned, and never written to disk.
"""

import io
import ipaddress
import logging
import math
import queue
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from decoding import METHODS, DecodingConfig
from inference import Captioner, Explained, list_checkpoints
from util import program
from util.files import UserError
from util.image_process import ImageReader
from util.images import MAX_PIXELS

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
MEGABYTE = 1_000_000
FORM_BYTES = 500_000  # allowed in a form besides the image; werkzeug reads in blocks of 64 KiB

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


class RefusedError(UserError):
    """A refused request, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def create_app(
    captioner: Captioner,
    *,
    max_mb: float = 20.0,
    at_once: int = 2,
    hostnames: Collection[str] = (),
    max_wait: float = MAX_WAIT,
    max_seconds: float = MAX_SECONDS,
) -> Any:
    """Return the Flask application that serves a captioner.

    An upload has at most `max_mb` megabytes; `at_once` images are captioned at a time, the others
    wait up to `max_wait` seconds. An image that takes more than `max_seconds` to read is refused.
    Requests must name the server by an IP address, as localhost, or by one of `hostnames`.
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
    longest = captioner.model.config.seq_len
    known = {**BOUNDS, "max_words": (1, longest), "min_words": (1, longest)}
    names = ["n", *(each.name for each in fields(DecodingConfig))]
    bounds = {name: known[name] for name in names if name != "method"}
    app.extensions["image_readers"] = [ImageReader(max_seconds) for _ in range(at_once)]
    readers: queue.Queue[ImageReader] = queue.Queue()
    for reader in app.extensions["image_readers"]:
        readers.put(reader)

    @app.before_request
    def refuse_other_sites() -> None:
        check_sender(flask.request, hostnames)

    @app.get("/")
    def page() -> Any:
        return app.send_static_file("index.html")

    @app.get("/health")
    def health() -> dict[str, Any]:
        limits = {"max_mb": max_mb, "max_pixels": MAX_PIXELS}
        settings = describe_settings(captioner.decoding, bounds)
        return {"status": "ok", **limits, "settings": settings}

    @app.post("/caption")
    def caption() -> dict[str, Any]:
        upload = read_upload(flask.request, max_bytes)
        settings = {
            name: read_setting(name, value.strip(), bounds)
            for name, value in flask.request.form.items()
        }
        try:  # images are read and captioned in turn: few bytes may be an image of many pixels
            reader = readers.get(timeout=max_wait)
        except queue.Empty:
            message = "too many photos are waiting; try again in a minute"
            raise RefusedError(503, message) from None
        try:
            image = reader.read(upload.getvalue(), upload.name, captioner.at_least)
            captions = captioner.explain(image, **settings)
        finally:
            readers.put(reader)
        return {"captions": [to_json(each) for each in captions]}

    @app.after_request
    def add_headers(response: Any) -> Any:
        response.headers.update(HEADERS)
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


def check_sender(request: Any, hostnames: Collection[str]) -> None:
    """Raise RefusedError for a request that another site made a browser send.

    The page of the other site sends its own name as Origin; or as Host, if that name is made to
    resolve to this machine. An IP address can't be redirected so.
    """
    if not is_own_host(request.host, hostnames):
        raise RefusedError(
            403, "this server does not go by that name; start it with --hostnames NAME"
        )
    origin = request.headers.get("Origin")
    if request.method == "POST" and origin and origin.partition("://")[2] != request.host:
        raise RefusedError(403, "pages of other sites may not ask for captions")


def is_own_host(host: str, hostnames: Collection[str]) -> bool:
    """Return whether a Host header is an IP address, localhost, or one of `hostnames`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in {"localhost", *(known.lower() for known in hostnames)}
    return True


def read_upload(request: Any, max_bytes: int) -> io.BytesIO:
    """Return the uploaded file of a request, with the name of the file."""
    uploads = request.files.getlist("image")
    if len(uploads) != 1:
        usage = "send one photo as the form's field image: curl -F image=@photo.jpg"
        raise UserError(f"{len(uploads) or 'no'} photos came; {usage}")
    upload = io.BytesIO(uploads[0].read())
    upload.name = Path(uploads[0].filename or "the photo").name[-80:]
    if (size := upload.getbuffer().nbytes) > max_bytes:
        size_mb, max_mb = (f"{count / MEGABYTE:.3g}" for count in (size, max_bytes))
        raise RefusedError(413, f"{upload.name} has {size_mb} MB; at most {max_mb} MB are taken")
    return upload


def read_setting(name: str, value: str, bounds: Mapping[str, tuple[float, float]]) -> Any:
    """Return the value of a form's setting; UserError if it is not known or out of bounds."""
    if name == "method":
        if value not in METHODS:
            raise UserError(f"method {value!r} is not known; choose from {', '.join(METHODS)}")
        return value
    if name not in bounds:
        known = ", ".join(("method", *bounds))
        raise UserError(f"setting {name!r} is not known; choose from {known}")
    least, most = bounds[name]
    kind = "whole number" if isinstance(least, int) else "number"
    try:
        number = type(least)(value)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise UserError(f"{name} {value!r} must be a {kind} between {least} and {most}")
    return number


def describe_settings(
    decoding: DecodingConfig, bounds: Mapping[str, tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Return the default of each setting, and its choices or its bounds."""
    defaults = {"n": 1, **asdict(decoding)}
    method = {"default": defaults["method"], "choices": list(METHODS)}
    numbers = {
        name: {"default": defaults[name], "least": least, "most": most}
        for name, (least, most) in bounds.items()
    }
    return {"method": method, **numbers}


def to_json(caption: Explained) -> dict[str, Any]:
    """Return a caption for JSON, with the geometric mean of its words' probabilities."""
    attention = caption.attention
    return {
        "text": caption.text,
        "log_prob": caption.log_prob,
        "probability": math.exp(caption.score),
        "words": caption.words,
        "attention": None if attention is None else attention.astype(float).round(4).tolist(),
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
    """auto, cpu, cuda, cuda:1, mps."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is for this machine only, 0.0.0.0 for all that reach it."""
    port: int = 8000
    """Port to listen at (0: any that is free)."""
    hostnames: tuple[str, ...] = ()
    """Host names of the page besides localhost and IP addresses, such as that of a proxy."""
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
