"""Images of strangers, read in a process of its own that can be ended.

Pillow and the libraries below it can't be interrupted from Python: a file made to be slow, or a
fault in a decoder, would otherwise hold or end the program that reads it.
"""

import contextlib
import io
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from util.files import UserError

MAX_MEMORY = 4 * 2**30  # bytes; the largest image that is read takes half of it
# Bytes of the file, bytes of its name, `at_least` (0: none), seconds.
REQUEST = struct.Struct(">QQQd")
REPLY = struct.Struct(">LLQ")  # width, height (0: an error), bytes of the pixels or the message
ROOT = Path(__file__).parent.parent


class ImageReader:
    """Reads one image at a time, in a process of its own."""

    def __init__(self, seconds: float):
        """`seconds`: how long an image may take; then the process is killed."""
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        """Start the process."""
        command = [sys.executable, "-W", "ignore", "-m", "util.image_process"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)

    def read(self, content: bytes, name: str, at_least: int | None = None) -> Image.Image:
        """Return the image in a file, as `util.images.read_image` does; `name` is for messages.

        Raises UserError if it can't be read, takes too long or too much memory.
        """
        if self.process.poll() is not None:  # it was ended
            self.start()
        process, encoded = self.process, name.encode("utf-8", "backslashreplace")
        late = threading.Event()
        timer = threading.Timer(self.seconds, lambda: (late.set(), process.kill()))
        timer.daemon = True  # the end of the server does not wait for it
        timer.start()
        try:
            sizes = len(content), len(encoded), at_least or 0
            process.stdin.write(REQUEST.pack(*sizes, self.seconds) + encoded)
            process.stdin.write(content)
            process.stdin.flush()
            width, height, size = REPLY.unpack(process.stdout.read(REPLY.size))
            result = process.stdout.read(size)
            if len(result) < size:
                raise EOFError
        except (OSError, EOFError, struct.error) as error:  # the process is gone
            self.close()
            reason = "its decoder failed"
            if late.is_set():
                reason = f"it takes more than {self.seconds:g} seconds; save it as an ordinary JPEG"
            raise UserError(f"{name} is not an image that can be read ({reason})") from error
        finally:
            timer.cancel()
        if not width:
            raise UserError(result.decode())
        return Image.frombuffer("RGB", (width, height), result, "raw", "RGB", 0, 1)

    def close(self) -> None:
        """End the process; another one is started when the next image is read."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not sent is lost
                pipe.close()
        self.process.wait()


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more: the loop of the process."""
    from util.images import read_image

    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        size, name_size, at_least, seconds = REQUEST.unpack(head)
        if hasattr(signal, "alarm"):  # ends this process, should nobody be left to kill it
            signal.alarm(int(seconds) + 2)
        name = requests.read(name_size).decode()
        stream = io.BytesIO(requests.read(size))
        stream.name = name
        try:
            image = read_image(stream, at_least or None)
            width, height, result = *image.size, image.tobytes()
        except UserError as error:
            width, height, result = 0, 0, str(error).encode("utf-8", "backslashreplace")
        replies.write(REPLY.pack(width, height, len(result)))
        replies.write(result)
        replies.flush()
        stream = image = result = None  # not kept until the next request
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def limit_memory(size: int) -> None:
    """Let this process use at most `size` bytes, where the system allows such a limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, and its end ends this
    limit_memory(MAX_MEMORY)
    serve(sys.stdin.buffer, sys.stdout.buffer)
