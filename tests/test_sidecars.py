"""Text files and copies that captioning writes beside the images: never over somebody's own."""

import os
from pathlib import Path

import pytest
from helpers.tiny import picture

from util import files, sidecars
from util.files import UserError

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
YOLO = "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.2 0.2\n"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_text_that_exists_is_kept_unless_it_is_to_be_replaced(overwrite, tmp_path):
    path = tmp_path / "photo.txt"
    assert sidecars.write_sidecar(str(path), "a dog", overwrite)
    assert path.read_text() == "a dog\n"
    assert sidecars.write_sidecar(str(path), "a dog", overwrite)  # the same is no matter
    path.write_text(YOLO)
    assert sidecars.write_sidecar(str(path), "a dog", overwrite) == overwrite
    assert path.read_text() == ("a dog\n" if overwrite else YOLO)


@POSIX
def test_a_write_protected_text_is_kept_in_any_case(tmp_path):
    path = tmp_path / "photo.txt"
    path.write_text(YOLO)
    path.chmod(0o444)
    for overwrite in (False, True):
        assert not sidecars.write_sidecar(str(path), "a dog", overwrite)
    assert path.read_text() == YOLO


@POSIX
def test_a_link_that_leads_nowhere_is_kept(tmp_path):
    (tmp_path / "photo.txt").symlink_to(tmp_path / "away.txt")
    assert not sidecars.write_sidecar(str(tmp_path / "photo.txt"), "a dog", False)
    assert os.listdir(tmp_path) == ["photo.txt"]


def test_an_image_is_never_its_own_text(tmp_path):
    for name in ("photo.txt", "other.png"):
        picture(1).save(tmp_path / name, "PNG")
    with pytest.raises(UserError, match="would replace the image"):
        sidecars.check_sidecars([str(tmp_path / "photo.txt")])
    os.link(tmp_path / "other.png", tmp_path / "linked.txt")
    (tmp_path / "linked.png").touch()
    with pytest.raises(UserError, match=r"linked\.txt would replace the image .*other\.png"):
        sidecars.check_sidecars([str(tmp_path / name) for name in ("linked.png", "other.png")])
    sidecars.check_sidecars([str(tmp_path / "other.png")])


def test_a_copy_that_is_to_be_captioned_is_not_replaced(tmp_path):
    picture(1).save(tmp_path / "a.png")
    out = tmp_path / "out"
    sidecars.write_annotated(str(out / "a.png"), str(tmp_path / "a.png"), "a dog")
    before = (out / "a.png").read_bytes()
    for places in ([out / "a.png"], [tmp_path / "a.png", out / "a.png"]):
        with pytest.raises(UserError, match="would replace the image"):
            sidecars.plan_annotated(out, places, map(str, places))
    assert (out / "a.png").read_bytes() == before
    copies = sidecars.plan_annotated(out, [tmp_path], [str(tmp_path / "a.png")])
    assert copies == {str(tmp_path / "a.png"): str(out / "a.png")}


def test_only_a_file_nobody_may_write_is_protected(tmp_path):
    path = Path(tmp_path / "a")
    assert not files.is_protected(path)
    path.touch()
    assert not files.is_protected(path)
    path.chmod(0o444)
    assert files.is_protected(path)
    with pytest.raises(PermissionError, match="cannot write"):
        files.check_output(path)
    path.chmod(0o644)
