"""Shared types: what goes through JSON or a process boundary comes back equal."""

from __future__ import annotations

import json
import pickle

from lavatar import errors
from lavatar.contracts import Camera, FrameMeta, HeadPose


def test_frame_meta_survives_json() -> None:
    meta = FrameMeta(
        frame=3,
        time=0.12,
        split="eval",
        landmarks=tuple((float(i), i + 0.5) for i in range(68)),
        pose=HeadPose(((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)), (0.0, 0.1, 4.0), 0.1),
        camera=Camera(5000.0, 256.0, 256.0, 512),
        portrait_transform=((1.0, 0.0, 2.0), (0.0, 1.0, 3.0)),
        face_transform=((0.5, 0.0, 2.0), (0.0, 0.5, 3.0)),
        score=0.9,
        expression={"jaw": 0.25},
        irises=((11.5, 20.0), (31.5, 20.25)),
    )
    assert FrameMeta.from_json(json.loads(json.dumps(meta.to_json()))) == meta


def test_every_error_survives_pickling_with_message_and_hint() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LavatarError)]
    assert len(kinds) >= 15
    for kind in kinds:
        again = pickle.loads(pickle.dumps(kind("what happened", "what to do")))
        assert type(again) is kind
        assert (again.message, again.hint, str(again)) == ("what happened", "what to do", "what happened\nwhat to do")


def test_exit_codes_follow_the_kind_of_error() -> None:
    assert errors.ConfigError("").exit_code == 2
    assert errors.UnknownJobError("").exit_code == 2
    assert errors.VideoError("").exit_code == 1
    assert errors.Interrupted("").exit_code == 130
