from __future__ import annotations

import pytest

from dtruntime_torch.checkpoint.cleaning import look
from dtruntime_torch.checkpoint.cleaning.look import Manifests
from dtruntime_torch.checkpoint.names import Attempt
from dtruntime_torch.errors import CleaningBlocked, StorageError
from dtruntime_torch.storage import run_sync
from dtruntime_torch.testing.faulty_backend import Call, FaultyBackend
from tests.checkpoint.commits import NAME
from tests.checkpoint.lineages import Shelf


def needed(backend: FaultyBackend, manifests: Manifests | None = None) -> set[str]:
    return set(run_sync(look.needed(backend, NAME, manifests or Manifests(backend, NAME))))


def reads(backend: FaultyBackend) -> list[str]:
    return [path for operation, path in backend.calls if operation == "read"]


def test_of_nothing_nothing_is_needed(backend):
    assert needed(backend) == set()


def test_what_a_manifest_names_is_needed_whether_or_not_it_is_committed(shelf, backend):
    shelf.put(1, 1)
    delta = shelf.put_intent(Attempt(1, 3, 1), Attempt(1, 2, 1))
    shelf.put_data(Attempt(1, 4, 1))
    assert needed(backend) == {Attempt(1, 1, 1).path, Attempt(1, 2, 1).path, delta.path}


def test_a_manifest_that_comes_while_it_looks_is_needed(shelf, backend):
    first, second = shelf.put(1, 1), Attempt(1, 2, 1)

    async def meanwhile(call: Call) -> object:
        found = await call.proceed()
        late.put(1, 2)
        return found

    late = Shelf(backend._inner)
    backend.when("list", "*", meanwhile)
    assert needed(backend) == {first.path, second.path}


def test_a_manifest_that_goes_while_it_looks_makes_it_look_again(shelf, backend):
    first, second = shelf.put(1, 1), shelf.put(1, 2, Attempt(1, 1, 1))
    manifest = f"{NAME}/{second.path}/manifest.json"

    async def gone(call: Call) -> object:
        await backend._inner.delete(manifest)
        late.put(1, 3, first)
        return await call.proceed()

    late = Shelf(backend._inner)
    backend.when("read", manifest, gone)
    assert needed(backend) == {first.path, Attempt(1, 3, 1).path}


def test_a_manifest_is_read_once_for_it_never_changes(shelf, backend):
    shelf.put(1, 1)
    manifests = Manifests(backend, NAME)
    assert needed(backend, manifests) == needed(backend, manifests)
    assert len(reads(backend)) == 1


def test_one_that_was_read_before_and_is_gone_is_not_needed(shelf, backend):
    attempt = shelf.put(1, 1)
    manifests = Manifests(backend, NAME)
    needed(backend, manifests)
    run_sync(backend.delete(f"{NAME}/{attempt.path}/manifest.json"))
    assert needed(backend, manifests) == set()


@pytest.mark.parametrize("data", [b"", b"{}"])
def test_one_that_cannot_be_understood_is_named_with_the_command_that_drops_it(shelf, backend, data):
    shelf.put(1, 1)
    attempt = shelf.put(1, 2)
    shelf.write(f"{NAME}/{attempt.path}/manifest.json", data)
    with pytest.raises(CleaningBlocked) as caught:
        needed(backend)
    assert f"{NAME}/{attempt.path}/manifest.json" in str(caught.value)
    assert f"dtruntime drop PATH {NAME} {attempt.path}" in str(caught.value)


def test_one_that_is_out_of_place_cannot_be_understood(shelf, backend):
    first, second = shelf.put(1, 1), shelf.put(1, 2)
    shelf.write(
        f"{NAME}/{second.path}/manifest.json", run_sync(backend.read(f"{NAME}/{first.path}/manifest.json"))
    )
    with pytest.raises(CleaningBlocked, match=f"is the manifest of {NAME}/{first.path}"):
        needed(backend)


def test_it_gives_up_where_manifests_never_stop_moving(shelf, backend):
    step = 0

    async def one_more(call: Call) -> object:
        nonlocal step
        step += 1
        late.put(1, step)
        return await call.proceed()

    late = Shelf(backend._inner)
    backend.when("list", "*", one_more, nth=None)
    with pytest.raises(StorageError, match="try again later"):
        needed(backend)


def test_folders_that_are_no_attempts_are_none_of_its_business(shelf, backend):
    for path in ("step-1/0001-1", "step-00000001/notes", "other/step-00000001/0001-1"):
        shelf.write(f"{NAME}/{path}/manifest.json", b"not ours")
    assert needed(backend) == set()


def test_one_of_a_later_version_blocks_until_the_upgrade(shelf, backend):
    attempt = shelf.put(1, 2)
    data = b'{"format":"dtruntime.manifest","version":2}'
    shelf.write(f"{NAME}/{attempt.path}/manifest.json", data)
    with pytest.raises(CleaningBlocked, match="upgrade") as caught:
        needed(backend)
    assert f"{NAME}/{attempt.path}/manifest.json" in str(caught.value)
    assert "drop" not in str(caught.value) and "epair" not in str(caught.value)
