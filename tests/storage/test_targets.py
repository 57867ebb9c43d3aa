from __future__ import annotations

from pathlib import Path

import pytest

from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage import MemoryBackend, backend_for, run_sync


def test_a_backend_is_taken_as_it_is() -> None:
    backend = MemoryBackend()
    assert backend_for(backend) is backend


@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE://{}", "file://localhost{}"])
def test_a_path_or_a_file_url_is_a_local_folder(tmp_path: Path, form: str) -> None:
    run_sync(backend_for(form.format(tmp_path / "root")).write("file", b"bytes"))
    assert (tmp_path / "root" / "file").read_bytes() == b"bytes"


def test_a_path_object_is_a_local_folder(tmp_path: Path) -> None:
    run_sync(backend_for(tmp_path / "root").write("file", b"bytes"))
    assert (tmp_path / "root" / "file").read_bytes() == b"bytes"


@pytest.mark.parametrize("form", ["~", "~/", "~/a/b"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, kind: type) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run_sync(backend_for(kind(form)).write("file", b"bytes"))
    assert (tmp_path / "home" / form[2:] / "file").read_bytes() == b"bytes"
    assert not (tmp_path / "~").exists()


def test_a_home_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'~nobody.has.this.name/x': there is no such home"):
        backend_for("~nobody.has.this.name/x")


def test_a_name_that_is_a_tilde_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_sync(backend_for("./~").write("file", b"bytes"))
    assert (tmp_path / "~" / "file").read_bytes() == b"bytes"


def test_a_file_url_is_unquoted(tmp_path: Path) -> None:
    run_sync(backend_for((tmp_path / "with space#").as_uri()).write("file", b"bytes"))
    assert (tmp_path / "with space#" / "file").read_bytes() == b"bytes"


def test_a_name_with_a_colon_is_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_sync(backend_for("run:3").write("file", b"bytes"))
    assert (tmp_path / "run:3" / "file").read_bytes() == b"bytes"


@pytest.mark.parametrize("target", ["s3://bucket/run", "gs://bucket", "https://host/path"])
def test_another_scheme_is_refused_by_name(target: str) -> None:
    with pytest.raises(InvalidArgument, match=target):
        backend_for(target)


@pytest.mark.parametrize("target", [Path("s3://bucket/run"), "s3:/bucket/run", Path("file:///tmp/run")])
def test_a_url_that_lost_a_slash_is_no_local_folder(target: str | Path) -> None:
    with pytest.raises(InvalidArgument, match="lost a slash"):
        backend_for(target)


@pytest.mark.parametrize("target", ["file://host/path", "file:///path?query", "file:///path#part"])
def test_a_file_url_that_names_no_local_folder_is_refused(target: str) -> None:
    with pytest.raises(InvalidArgument, match="names no local folder"):
        backend_for(target)


@pytest.mark.parametrize("target", [7, None, b"/tmp/bytes", object()])
def test_what_is_no_target_is_refused(target: object) -> None:
    with pytest.raises(InvalidArgument):
        backend_for(target)  # type: ignore[arg-type]


def test_what_a_backend_lacks_is_named() -> None:
    class Partial:
        settle_seconds = 0.0

        async def write(self, path: str, data: object) -> None: ...

        async def read(self, path: str) -> bytes:
            return b""

    lacks = "create, read_range, size, list, delete, unfinished, discard_unfinished"
    with pytest.raises(InvalidArgument, match=f"lacks {lacks}$"):
        backend_for(Partial())  # type: ignore[arg-type]
