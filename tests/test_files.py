"""Files are written whole or not at all, whatever fails and whenever a process is killed."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mixcomp import files
from mixcomp.errors import ArtifactError, StorageError

OLD = {"a": b"old a", "b": b"old b" * 1000}
NEW = {"a": b"new a", "c": b"new c" * 1000}


def replace(target: Path, content: dict[str, bytes]) -> None:
    with files.new_folder(target) as partial:
        for name, data in content.items():
            files.write_file(partial / name, [data[:3], data[3:]])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Faults:
    """Counts the calls that reach the disk, and raises or kills at the chosen one."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, strike: Callable[[], None], after: bool = False) -> None:
        self.count = 0
        self.at, self.strike, self.after = at, strike, after
        for name in ("fsync", "rename", "replace", "mkdir"):
            patch.setattr(files.os, name, self.watch(getattr(os, name)))
        patch.setattr(files, "_exchange", self.watch(files._exchange))
        patch.setattr(Path, "open", self.watch(Path.open))

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            here, self.count = self.count, self.count + 1
            if here == self.at and not self.after:
                self.strike()
            try:
                return call(*args, **options)
            finally:
                if here == self.at and self.after:
                    self.strike()

        return watched


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt() -> None:
    raise KeyboardInterrupt


def never() -> None:
    raise AssertionError("not reached")


def count_calls(work: Callable[[], None]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, -1, never)
        work()
    return faults.count


@pytest.mark.parametrize("strike", [full, interrupt])
@pytest.mark.parametrize("start", [None, OLD])
def test_a_failure_at_any_call_leaves_the_old_folder(tmp_path: Path, strike: Callable[[], None], start: Any) -> None:
    def prepare(number: int) -> Path:
        target = tmp_path / str(number) / "out"
        target.parent.mkdir()
        if start is not None:
            replace(target, start)
        return target

    first = prepare(-1)
    calls = count_calls(lambda: replace(first, NEW))
    assert calls >= 8
    for at in range(1, calls):  # call 0 makes the parent folder, which is there
        target = prepare(at)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, strike)
            with pytest.raises((StorageError, KeyboardInterrupt)):
                replace(target, NEW)
        found = content(target) if target.exists() else None
        # only the very last call, the parent's fsync, comes after the change
        assert found == (NEW if at == calls - 1 else start), at
        assert sorted(p.name for p in target.parent.iterdir()) == (["out"] if found is not None else [])


KILL = """
import os, signal, sys
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
import test_files as t
base = Path(sys.argv[2])
for at in range(int(sys.argv[3])):
    for after in (False, True):
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                t.Faults(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL), after)
                t.replace(base / f"{at}{after}" / "out", t.NEW)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_a_kill_at_any_call_leaves_one_whole_version_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    replace(tmp_path / "count" / "out", OLD)
    calls = count_calls(lambda: replace(tmp_path / "count" / "out", NEW))
    targets = [tmp_path / f"{at}{after}" / "out" for at in range(calls) for after in (False, True)]
    for target in targets:
        replace(target, OLD)
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", KILL, here, str(tmp_path), str(calls)], check=True, timeout=120)
    assert all(content(target) in (OLD, NEW) for target in targets)
    strays = [p for target in targets for p in target.parent.iterdir() if p != target]
    assert strays, "some kill must have left unfinished files, or this test shows nothing"
    for target in targets:
        replace(target, NEW)
        assert content(target) == NEW
        assert list(target.parent.iterdir()) == [target]


def test_the_next_writer_leaves_a_living_one_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.new_folder(target) as slow:
        files.write_file(slow / "a", [b"slow"])
        replace(target, NEW)
        assert slow.is_dir()
    assert content(target) == {"a": b"slow"}
    assert list(tmp_path.iterdir()) == [target]


class NoExchange:
    """A C library without ``renameat2``."""


class RefusedExchange:
    """A file system without ``RENAME_EXCHANGE``."""

    @staticmethod
    def renameat2(*args: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("library", [NoExchange, RefusedExchange])
def test_folders_change_places_without_the_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: type
) -> None:
    target = tmp_path / "out"
    replace(target, OLD)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: library())
    replace(target, NEW)
    assert content(target) == NEW
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_exchange_in_two_steps_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    replace(target, OLD)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: NoExchange())
    rename, seen = os.rename, []

    def third_fails(one: Any, other: Any) -> None:
        seen.append(one)
        if len(seen) == 3:  # straight, old aside, new in place
            raise OSError(errno.EIO, "Input/output error")
        rename(one, other)

    monkeypatch.setattr(files.os, "rename", third_fails)
    with pytest.raises(StorageError, match="Input/output error"):
        replace(target, NEW)
    assert content(target) == OLD
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomic_replaces_or_keeps(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    files.write_atomic(path, "first")
    calls = count_calls(lambda: files.write_atomic(path, b"second"))
    assert path.read_bytes() == b"second"
    for at in range(calls):
        files.write_atomic(path, b"second")
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at, full)
            with pytest.raises(StorageError, match=r"plan\.json.*No space left on device.*bytes free"):
                files.write_atomic(path, "third")
        assert path.read_bytes() == (b"third" if at == calls - 1 else b"second")
        assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mixcomp import files
from mixcomp.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with files.new_folder(Path(sys.argv[1])) as partial:
        files.write_file(partial / "a", [b"x" * 30_000] * 10)
except StorageError as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short_is_a_storage_error(tmp_path: Path) -> None:
    replace(tmp_path / "out", OLD)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")], capture_output=True, text=True, check=True, timeout=60
    )
    assert "File too large" in done.stdout
    assert content(tmp_path / "out") == OLD
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_too_little_room_is_found_before_writing(tmp_path: Path) -> None:
    files.need_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match=r"\d+ bytes are needed and \d+ are free"):
        files.need_room(tmp_path / "not" / "yet", 1 << 60)


GOOD_NAMES = ["config.json", "mixcomp-00001.safetensors", "a", "_", "-", "A" * 64, "a..b"]
BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "C:a", "a\0", "a\n", "a b", "é", "A" * 65, 3, None]


def test_plain_names_only() -> None:
    assert [files.check_name(name) for name in GOOD_NAMES] == GOOD_NAMES
    for name in BAD_NAMES:
        with pytest.raises(ArtifactError, match="not a plain name"):
            files.check_name(name)


def make(path: Path, kind: str) -> None:
    match kind:
        case "link":
            path.symlink_to(path.parent / "real")
        case "dangling":
            path.symlink_to(path.parent / "nowhere")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("nothing", "missing"),
    ],
)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "real").write_bytes(b"secret")
    make(tmp_path / "x", kind)
    with pytest.raises(ArtifactError, match=message) as caught:
        files.open_regular(tmp_path, "x")
    assert str(tmp_path / "x") in str(caught.value)


def test_links_of_a_hub_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "f00", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"blob")
    (tmp_path / "secret").write_bytes(b"secret")
    (blobs / "hop").symlink_to(tmp_path / "secret")
    for name, place in {"x": "../../blobs/abc", "out": "../../../secret", "hop": "../../blobs/hop"}.items():
        (snapshot / name).symlink_to(place)
    assert files.read_whole(snapshot, "x", 10) == b"blob"
    for name in ("out", "hop"):
        with pytest.raises(ArtifactError, match="symbolic link"):
            files.open_regular(snapshot, name)


def test_devices_are_not_opened() -> None:
    with pytest.raises(ArtifactError, match="not a regular file"):
        files.open_regular(Path("/dev"), "null")


def test_short_reads_are_continued_and_an_early_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    preadv = os.preadv
    monkeypatch.setattr(files.os, "preadv", lambda fd, views, at: preadv(fd, [views[0][: 1 + at % 3]], at))
    with files.open_regular(tmp_path, "x") as file:
        target = bytearray(90)
        files.fill(file, "x", memoryview(target), 10)
        assert target == bytes(range(10, 100))
        with pytest.raises(ArtifactError, match="x: ended 3 bytes early"):
            files.fill(file, "x", memoryview(target), 13)


def test_an_unreadable_disk_is_an_artifact_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "x").write_bytes(b"abc")
    monkeypatch.setattr(files.os, "preadv", broken)
    with pytest.raises(ArtifactError, match=r"x: cannot be read .Input/output error"):
        files.read_whole(tmp_path, "x", 3)


def test_sizes_and_digests(tmp_path: Path) -> None:
    size, digest = files.write_file(tmp_path / "x", iter([b"ab", memoryview(b"c"), b""]))
    assert (size, digest) == (3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # FIPS 180-2
    assert files.sha256(b"abc") == digest
    files.check_digest(tmp_path, "x", 3, digest)
    for size_listed, message in ((2, "too long, 3 bytes where 2"), (4, "truncated, 3 bytes where 4")):
        with pytest.raises(ArtifactError, match=message):
            files.check_digest(tmp_path, "x", size_listed, digest)
    with pytest.raises(ArtifactError, match="sha256"):
        files.check_digest(tmp_path, "x", 3, files.sha256(b"abd"))
    with pytest.raises(ArtifactError, match="at most 2 are read"):
        files.read_whole(tmp_path, "x", 2)
    assert files.read_whole(tmp_path, "x", 3) == b"abc"


def test_writers_at_the_same_time_leave_one_whole_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_files as t\n"
        "for i in range(20):\n"
        "    t.replace(Path(sys.argv[2]), {n: sys.argv[3].encode() * 5000 for n in 'abc'})\n"
    )
    here, target = str(Path(__file__).parent), tmp_path / "out"
    start = [sys.executable, "-c", script, here, str(target)]
    writers = [subprocess.Popen([*start, name], stderr=subprocess.PIPE) for name in "xyz"]
    problems = [writer.communicate(timeout=120)[1].decode() for writer in writers]
    assert not any(re.search("Error", problem) for problem in problems), problems
    found = content(target)
    assert sorted(found) == ["a", "b", "c"]
    assert len(set(found.values())) == 1
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture(autouse=True)
def _no_signal_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGXFSZ)
    yield
    assert signal.getsignal(signal.SIGXFSZ) == before
