"""The entry point of `torch.hub.load("OWNER/image-captioning", "captioner", checkpoint=FILE)`.

The project's modules have plain names (`model`, `dataset`, `util`) that the calling program may use
for modules of its own. So they are imported under a package name of this folder alone, and neither
`sys.path` nor the caller's entries of `sys.modules` change.
"""

# Modules and names with an underscore only: torch.hub.list takes any other callable for an entry.
import builtins
import importlib
import importlib.machinery
import pathlib
import sys
import types
import typing
import zlib

dependencies = ["torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = f"_image_captioning_{zlib.crc32(str(_ROOT).encode()):08x}"


def captioner(
    checkpoint: str | pathlib.Path | None = None, device: str = "auto", **decoding: typing.Any
) -> typing.Any:
    """Return an `inference.Captioner`: `.caption(image)`, `.candidates(image, n=5)`, and more.

    `checkpoint` is a model file or the folder of a run (default: the shipped model); `decoding`
    are the decoding flags of `inference.py`, for example `beam_size=3`. Raises FileNotFoundError
    where there is no checkpoint.
    """
    if _PACKAGE not in sys.modules:
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(_ROOT)]
        sys.meta_path.insert(0, _Finder)
        sys.modules[_PACKAGE] = package
    inference = importlib.import_module(f"{_PACKAGE}.inference")
    return inference.Captioner.load(checkpoint, device, **decoding)


class _Finder:
    """Finds the project's modules under the name of the package, and no others."""

    @staticmethod
    def find_spec(name: str, path: typing.Any = None, target: typing.Any = None) -> typing.Any:
        if not name.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Gives a module its own `__import__`, which its functions use too when they run later."""

    def exec_module(self, module: types.ModuleType) -> None:
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(
    name: str,
    scope: typing.Any = None,
    local: typing.Any = None,
    fromlist: typing.Any = (),
    level: int = 0,
) -> types.ModuleType:
    """What an import statement in the project calls: the project's modules come first."""
    top = name.split(".")[0]
    files = (_ROOT / f"{top}.py", _ROOT / top / "__init__.py")
    if level or not any(file.is_file() for file in files):
        return builtins.__import__(name, scope, local, fromlist, level)
    module = builtins.__import__(f"{_PACKAGE}.{name}", scope, local, fromlist)
    return module if fromlist else sys.modules[f"{_PACKAGE}.{top}"]
