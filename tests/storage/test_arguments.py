from __future__ import annotations

import os

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from dtruntime_torch.errors import InvalidArgument
from dtruntime_torch.storage.arguments import as_views, check_path, check_prefix, is_name, temporary_name


@given(st.text(alphabet=st.characters() | st.sampled_from("./\\\0ab"), max_size=12))
@example("a/../../b")
@example("/etc/passwd")
@example("..")
def test_a_path_that_passes_stays_in_the_root_under_its_own_name(path: str) -> None:
    try:
        check_path(path)
    except InvalidArgument:
        return
    assert os.path.normpath(f"/root/{path}") == f"/root/{path}"
    assert os.fsdecode(os.fsencode(path)) == path


@given(st.lists(st.text("ab.-_", min_size=1, max_size=4), min_size=1, max_size=3).map("/".join))
def test_every_start_of_a_path_is_a_prefix(path: str) -> None:
    try:
        check_path(path)
    except InvalidArgument:
        return
    for end in range(len(path) + 1):
        if path[:end].rpartition("/")[2] not in (".", ".."):
            check_prefix(path[:end], None)


def test_temporary_names_differ_and_are_no_names() -> None:
    drawn = {temporary_name() for _ in range(100)}
    assert len(drawn) == 100
    assert not any(map(is_name, drawn))


def test_views_share_the_memory_of_what_was_given() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    (view,) = as_views(array.data)
    array[0, 0] = 77
    assert bytes(view) == array.tobytes()


def test_empty_buffers_of_any_shape_are_left_out() -> None:
    assert as_views([b"", np.zeros((0, 3)).data, np.zeros((3, 0), dtype=np.int8).data]) == []
