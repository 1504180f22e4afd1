"""The table of pretrained files: official address, SHA-256 and licence of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """One file. `url` is the official address; `trunk` says that it is a torchvision file that is to be converted."""

    name: str
    file: str
    url: str
    sha256: str
    licence: str
    bytes: int  # 0: not known
    trunk: str = ""
    bz2: bool = False  # what is downloaded is compressed
    url_sha256: str = ""  # of what is downloaded, where that is not the file itself; torchvision names carry its start


WEIGHTS: dict[str, Weight] = {
    w.name: w
    for w in (
        Weight(
            "face_landmarker",
            "face_landmarker.task",
            "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
            "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
            "Apache-2.0",
            3_758_596,
        ),
        Weight(
            "rvm",
            "rvm_mobilenetv3_fp32.onnx",
            "https://github.com/PeterL1n/RobustVideoMatting/releases/download/v1.0.0/rvm_mobilenetv3_fp32.onnx",
            "88d4531297118f595bf2fd60f6f566aec2e559393802d1f436c380f0cbbd2828",
            "GPL-3.0",
            14_975_696,
        ),
        Weight(
            "selfie_segmenter",
            "selfie_segmentation.tflite",
            "https://storage.googleapis.com/mediapipe-assets/selfie_segmentation.tflite?generation=1683332563830600",
            "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
            "Apache-2.0",
            249_505,
        ),
        # The author's names carry the first ten digits; the whole digests are those that several public projects pin.
        Weight(
            "fan_2d",
            "2DFAN4-11f355bf06.pth.tar",
            "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar",
            "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
            "BSD-3-Clause (face-alignment; the file itself states none)",
            0,
        ),
        Weight(
            "s3fd",
            "s3fd-619a316812.pth",
            "https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth",
            "619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
            "BSD-3-Clause (face-alignment; the file itself states none)",
            89_843_225,
        ),
        Weight(
            "lpips_vgg16",
            "lpips_vgg16.safetensors",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "78ea99263c3aa23f7b23fc276be31655facdfdab6e9835d811451c40da2429bb",
            "BSD-3-Clause (torchvision), BSD-2-Clause (lpips)",
            58_867_624,
            trunk="vgg",
            url_sha256="397923af",
        ),
        Weight(
            "lpips_alexnet",
            "lpips_alexnet.safetensors",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "07fba9c1054c516c9ea98be3961d861999415abf6a4c099979b48a2ea67dc15a",
            "BSD-3-Clause (torchvision), BSD-2-Clause (lpips)",
            9_884_816,
            trunk="alex",
            url_sha256="7be5be79",
        ),
        # The same file lies in the package face_recognition_models 0.3.0, from which its digest was taken.
        Weight(
            "face_recognition",
            "dlib_face_recognition_resnet_model_v1.dat",
            "http://dlib.net/files/dlib_face_recognition_resnet_model_v1.dat.bz2",
            "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            "CC0-1.0",
            22_466_066,
            bz2=True,
        ),
    )
}
