from __future__ import annotations

import pytest

from dtruntime_torch.storage import LocalBackend
from dtruntime_torch.storage.mounts import is_on_network

LOCAL = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"


def mounted(kind: str, place: str) -> str:
    return f"31 27 0:28 / {place} rw,noatime shared:9 - {kind} server:/export rw,vers=4.2\n"


@pytest.fixture
def on_network(tmp_path):
    def ask(folder: str, *mounts: str) -> bool:
        (tmp_path / "mountinfo").write_text("".join(mounts))
        return is_on_network(folder, str(tmp_path / "mountinfo"))

    return ask


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "9p", "lustre", "fuse.sshfs", "fuse"])
def test_a_folder_on_a_network_file_system_is_told_by_its_type(on_network, kind):
    assert on_network("/data/run/7", LOCAL, mounted(kind, "/data"))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "fuseblk", "fuse.fuse-overlayfs"])
def test_a_folder_on_a_disk_of_this_host_is_told_by_its_type(on_network, kind):
    assert not on_network("/data/run/7", LOCAL, mounted(kind, "/data"))


def test_only_the_mount_that_a_folder_lies_in_counts(on_network):
    nfs = mounted("nfs4", "/data")
    assert not on_network("/database", LOCAL, nfs)
    assert not on_network("/data/scratch/x", LOCAL, nfs, mounted("xfs", "/data/scratch"))
    assert on_network("/data", LOCAL, nfs)


def test_of_two_mounts_at_one_place_the_later_one_counts(on_network):
    assert not on_network("/data/x", LOCAL, mounted("nfs4", "/data"), mounted("xfs", "/data"))


def test_spaces_in_the_name_of_a_place_are_read(on_network):
    assert on_network("/my data/x", LOCAL, mounted("nfs", r"/my\040data"))


def test_where_the_system_does_not_say_it_counts_as_a_network(tmp_path):
    assert is_on_network("/data", str(tmp_path / "absent"))


def test_a_local_backend_settles_at_once_on_a_disk_and_later_on_a_network(tmp_path, monkeypatch):
    backend = LocalBackend(tmp_path / "not" / "yet")
    assert backend.settle_seconds == 0.0
    monkeypatch.setattr("dtruntime_torch.storage.local.is_on_network", lambda folder: True)
    assert backend.settle_seconds == 90.0
