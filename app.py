"""Captions in the browser: `python app.py --checkpoint RUN`, and a JSON endpoint for programs.

Other sites are kept out: a page of theirs can neither read an answer nor have a photo captioned.
Photos are kept in memory while they are captioned, and never written to disk.
"""

import io
import ipaddress
import logging
import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from PIL import Image

from decoding import DecodingConfig
from inference import Captioner, Explained, named
from util import files
from util.files import UserError
from util.images import MAX_PIXELS, read_image

METHODS = get_args(get_type_hints(DecodingConfig)["method"])
# The least and the most a request may ask for; whole numbers where these are.
BOUNDS: dict[str, tuple[float, float]] = {
    "n": (1, 10),
    "beam_size": (1, 20),
    "length_penalty": (0.0, 10.0),
    "no_repeat_ngram": (0, 100),
    "max_words": (1, 1000),  # or what the model was trained for
    "min_words": (1, 1000),
    "temperature": (0.01, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.001, 1.0),
    "seed": (0, 2**31),
}
THREADS = 16  # requests read and answered at a time; the model has a limit of its own
CONNECTIONS = 64
PATIENCE = 60.0  # seconds that a photo waits for its turn
MEGABYTE = 1_000_000
FORM_BYTES = 500_000  # what a form may hold beside the photo; werkzeug reads it by 64 KiB

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
    """A request that is refused, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def create_app(
    captioner: Captioner,
    *,
    max_mb: float = 20.0,
    at_once: int = 2,
    hostnames: Collection[str] = (),
    patience: float = PATIENCE,
) -> Any:
    """Return the Flask application over a captioner.

    Photos have at most `max_mb` megabytes; `at_once` of them are captioned at a time, the others
    wait `patience` seconds for it. It answers where it is called by an address, as localhost, or by
    one of `hostnames`.
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
    bounds = {**BOUNDS, "max_words": (1, longest), "min_words": (1, longest)}
    turns = threading.BoundedSemaphore(at_once)

    @app.before_request
    def keep_others_out() -> None:
        check_sender(flask.request, hostnames)

    @app.get("/")
    def page() -> Any:
        return app.send_static_file("index.html")

    @app.get("/health")
    def health() -> dict[str, Any]:
        limits = {"max_mb": max_mb, "max_pixels": MAX_PIXELS}
        return {"status": "ok", **limits, "settings": describe(captioner.decoding, bounds)}

    @app.post("/caption")
    def caption() -> dict[str, Any]:
        photo = uploaded(flask.request, max_bytes)
        settings = read_settings(flask.request.form, bounds)
        if not turns.acquire(timeout=patience):
            raise RefusedError(503, "too many photos are waiting; try again in a minute")
        try:
            # Decoded here: a photo of few bytes may be one of many pixels.
            captions = captioner.explain(opened(photo), **settings)
        finally:
            turns.release()
        return {"captions": [as_json(each) for each in captions]}

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
    """Raise RefusedError for a request that another site had a browser make.

    Its page would send its own name as Origin; or, if it lets that name lead to this machine, as
    Host. An address of numbers can't be so redirected.
    """
    if not is_ours(request.host, hostnames):
        raise RefusedError(
            403, "this server does not go by that name; start it with --hostnames NAME"
        )
    origin = request.headers.get("Origin")
    if request.method == "POST" and origin and origin.partition("://")[2] != request.host:
        raise RefusedError(403, "pages of other sites may not ask for captions")


def is_ours(host: str, hostnames: Collection[str]) -> bool:
    """Tell whether a Host header is an address, localhost, or one of `hostnames`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in {"localhost", *(known.lower() for known in hostnames)}
    return True


def uploaded(request: Any, max_bytes: int) -> io.BytesIO:
    """Return the photo of a request, named like its file."""
    photos = request.files.getlist("image")
    if len(photos) != 1:
        wanted = "send one photo as the form's field image: curl -F image=@photo.jpg"
        raise UserError(f"{len(photos) or 'no'} photos came; {wanted}")
    photo = io.BytesIO(photos[0].read())
    photo.name = Path(photos[0].filename or "the photo").name[-80:]
    if (size := photo.getbuffer().nbytes) > max_bytes:
        has, most = (f"{count / MEGABYTE:.3g}" for count in (size, max_bytes))
        raise RefusedError(413, f"{photo.name} has {has} MB; at most {most} MB are taken")
    return photo


def opened(photo: io.BytesIO) -> Image.Image:
    """Return the picture in an upload."""
    try:
        return read_image(photo)
    except OSError as error:  # of the system, which may name what is no visitor's business
        raise UserError(f"{photo.name} is not an image that can be read") from error


def read_settings(
    form: Mapping[str, str], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Return the settings of a form as `Captioner.explain` takes them.

    Raises ValueError for a setting that is not known, and for a value out of bounds.
    """
    return {name: read_setting(name, value.strip(), bounds) for name, value in form.items()}


def read_setting(name: str, value: str, bounds: Mapping[str, tuple[float, float]]) -> Any:
    """Return one setting as the value it stands for."""
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


def describe(
    decoding: DecodingConfig, bounds: Mapping[str, tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Return what each setting is where a request does not say, and between which bounds."""
    usual = {"n": 1, **asdict(decoding)}
    method = {"default": usual["method"], "choices": METHODS}
    numbers = {
        name: {"default": usual[name], "least": least, "most": most}
        for name, (least, most) in bounds.items()
    }
    return {"method": method, **numbers}


def as_json(caption: Explained) -> dict[str, Any]:
    """Return a caption for JSON, with the geometric mean of its words' probabilities."""
    looks = caption.attention
    return {
        "text": caption.text,
        "log_prob": caption.log_prob,
        "probability": math.exp(caption.log_prob / max(1, len(caption.words))),
        "words": caption.words,
        "attention": None if looks is None else looks.astype(float).round(4).tolist(),
    }


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    checkpoint: Path | None = None
    """A model file, or the folder of a run (default: the shipped model)."""
    ensemble: tuple[Path, ...] = ()
    """Several checkpoints, decoded together: the mean of their probabilities decides."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 all who can reach it."""
    port: int = 8000
    """Port to listen at (0: any that is free)."""
    hostnames: tuple[str, ...] = ()
    """Names that the page is called by, beside localhost and addresses: behind a proxy, its own."""
    max_mb: float = 20.0
    """Largest photo in megabytes."""
    at_once: int = 2
    """How many photos are captioned at a time; the others wait for their turn."""


def check(config: Config) -> None:
    """Raise ValueError for a flag out of bounds."""
    if not 0 <= config.port <= 65535:
        raise UserError(f"port {config.port} must be between 0 and 65535 (0: any that is free)")
    if not 0 < config.max_mb <= 1000:
        raise UserError(f"max mb {config.max_mb:g} must be above 0 and at most 1000")
    if config.at_once < 1:
        raise UserError(f"at once {config.at_once} must be at least 1")


def listen(app: Any, config: Config) -> Any:
    """Return the server of an application, bound to its address.

    Raises ValueError where that can't be had.
    """
    import waitress

    # Twice the limit is read, so that a photo somewhat too large gets an answer that says so.
    most = 2 * round(config.max_mb * MEGABYTE) + FORM_BYTES
    try:
        return waitress.create_server(
            app,
            host=config.host,
            port=config.port,
            threads=THREADS,
            connection_limit=CONNECTIONS,
            max_request_body_size=most,
            inbuf_overflow=most + 1,  # beyond this it would write to the disk
            ident=None,
        )
    except (OSError, ValueError) as error:
        reason = files.explain(error).rstrip(".")
        raise UserError(
            f"can't listen at {config.host}, port {config.port} ({reason}); choose another --port "
            "or --host"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    config = files.parse(Config, argv, program="app.py", description="Caption photos in a browser.")
    check(config)
    try:
        import flask  # noqa: F401
        import waitress  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing; install it: pip install -r requirements-app.txt"
        ) from error
    checkpoint = named(config.checkpoint, config.ensemble)
    captioner = Captioner.load(checkpoint, config.device, **asdict(config.decoding))
    captioner.caption(Image.new("RGB", (64, 64)))  # settings that fail do so here; the next is fast
    app = create_app(
        captioner,
        max_mb=config.max_mb,
        at_once=config.at_once,
        hostnames=(*config.hostnames, config.host),
    )
    server = listen(app, config)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue is no news
    port = getattr(server, "effective_port", config.port)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    print(f"http://{host}:{port} (Ctrl-C stops it)", flush=True)
    server.run()


if __name__ == "__main__":
    files.run(main)
