"""The package as users install it: from a wheel and editable, with the kernels under our own name only."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from object_cache import FOLDER, ROOT

# Nothing is compiled that has been; without CUDA, which test_cuda_build.py compiles.
ENVIRONMENT = {**os.environ, "SKIPNET_CUDA": "0", "SKIPNET_OBJECT_CACHE": str(FOLDER)}

# Run by the installed package's interpreter, away from the source tree.
CHECK = """
import importlib.util, json, sys
import torch, skipnet_rt as srt, skipnet_rt.kernels
from importlib import resources
from skipnet_rt import _C
rows, count = skipnet_rt.kernels.compact_ref(torch.tensor([True, False, True]))
assert rows.tolist() == [0, 2, -1] and count.tolist() == [2]
assert importlib.util.find_spec("kernels") is None, "PyPI's `kernels` is shadowed"
assets = resources.files("skipnet_rt.assets")
model = srt.load(assets / "skipnet38-digits.safetensors")
logits, masks, probabilities = srt.compile(model)(torch.zeros(2, 3, 32, 32))
assert logits.shape == (2, 10) and all(srt.engines()[name] for name in ("eager", "cpu"))
assert (resources.files("skipnet_rt") / "py.typed").is_file()
print(json.dumps({"package": srt.__file__, "native": _C.__file__, "cuda": _C.cuda_build}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks: what a user clones."""
    folder = tmp_path_factory.mktemp("source")
    archive = folder / "source.tar"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout.decode().split("\0")
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, listed):
            if (ROOT / name).exists():
                tar.add(ROOT / name, name)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "skipnet-rt", filter="data")
    return folder / "skipnet-rt"


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel of it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", str(folder), str(source)], check=True, env=ENVIRONMENT, capture_output=True)
    return next(folder.glob("*.whl"))


def installed(folder, *what):
    """The check's answer from a new virtual environment that sees our dependencies but not our package."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    ours = {name for name in os.listdir(next(path for path in sys.path if path.endswith("site-packages")))
            if "skipnet" in name}
    dependencies = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for entry in dependencies.iterdir():
        if entry.name not in ours and not entry.name.endswith(".pth"):
            (site / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
                    "--no-build-isolation", *map(str, what)], check=True,
                   env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run([python, "-c", CHECK], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import json
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_wheel_is_complete(wheel, tmp_path):
    answer = installed(tmp_path, wheel)
    assert str(tmp_path / "venv") in answer["package"]
    assert str(tmp_path / "venv") in answer["native"]
    assert "SKIPNET_CUDA=0" in answer["cuda"]


@pytest.mark.slow
def test_an_editable_install_is_complete(source, tmp_path):
    answer = installed(tmp_path, "--editable", source)
    assert answer["package"].startswith(str(source))


@pytest.mark.slow
def test_a_wheels_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"skipnet_rt/kernels/compaction.py", "skipnet_rt/py.typed", "skipnet_rt/_C.pyi",
            "skipnet_rt/assets/skipnet38-digits.safetensors", "skipnet_rt/assets/digits.npz",
            "skipnet_rt/serving/page.html", "skipnet_rt/serving/ray.yaml"} <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.startswith("skipnet_rt")} == set(), "nothing beside our own name"
