"""Image metrics and LPIPS against scikit-image and the lpips package."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from lavatar.datasets.synthetic import Identity, default_camera, render
from lavatar.datasets.synthetic_acting import performance
from lavatar.models.metrics import image_metrics, mse, psnr, ssim
from lavatar.models.perceptual import LPIPS
from lavatar.models.ssim import _blur, _shifted_sum

FILES = {"vgg": "lpips_vgg16.safetensors", "alex": "lpips_alexnet.safetensors"}


def pictures(size: int = 64) -> tuple[Tensor, Tensor]:
    """Smooth pictures, not noise, so that every layer has something to see; the second differs a little."""
    generator = torch.Generator().manual_seed(5)
    a = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8, generator=generator), size=(size, size), mode="bicubic")
    b = a + 0.1 * torch.rand(2, 3, size, size, generator=generator)
    return a.clamp(0, 1), b.clamp(0, 1)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The lpips package. Its torchvision needs two operators that a CPU torch lacks."""
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            break  # there already: a torchvision that fits
    return importlib.import_module("lpips")


def noises(size: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures of nothing but noise, and others."""
    generator = torch.Generator().manual_seed(6)
    return torch.rand(2, 3, size, size, generator=generator), torch.rand(2, 3, size, size, generator=generator)


def faces(size: int = 64) -> tuple[Tensor, Tensor]:
    """Two drawn heads on white, and the same with another expression."""
    camera = default_camera(size)
    drawn = [
        torch.from_numpy(render(Identity.from_seed(seed), *performance(seed, 40)[frame], camera)[0])
        for frame in (3, 21)
        for seed in (0, 1)
    ]
    pictures_B3HW = torch.stack(drawn).permute(0, 3, 1, 2)
    return pictures_B3HW[:2], pictures_B3HW[2:]


PAIRS = {"smooth": pictures, "noise": noises, "faces": faces}


@pytest.mark.parametrize("kind", PAIRS)
def test_mse_psnr_ssim_equal_scikit_image(kind: str) -> None:
    a, b = PAIRS[kind]()
    values = image_metrics(a, b)
    for i in range(2):
        x, y = a[i].permute(1, 2, 0).double().numpy(), b[i].permute(1, 2, 0).double().numpy()
        assert values["mse"][i].item() == pytest.approx(mean_squared_error(x, y), rel=1e-5)
        assert values["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), rel=1e-5)
        expected = structural_similarity(
            x, y, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert values["ssim"][i].item() == pytest.approx(expected, abs=1e-5)


def test_ssim_is_the_same_under_autocast_and_by_shifted_sums() -> None:
    """In bf16, or in a GPU's TF32, nothing would be left of the variances: values of −30 have been seen."""
    a, b = faces()
    exact = ssim(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ssim(a, b), exact)
    images_NHW = a.flatten(0, 1)
    torch.testing.assert_close(_shifted_sum(_shifted_sum(images_NHW, -1), -2), _blur(images_NHW))


def test_known_values() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.6)
    assert mse(a, b).item() == pytest.approx(0.01)
    assert psnr(a, b).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a).item() == float("inf")
    assert ssim(a, a).item() == pytest.approx(1.0)


def test_metrics_clamp_and_leave_lpips_out_without_weights() -> None:
    a, b = pictures()
    values = image_metrics(a + 5, b)
    assert set(values) == {"mse", "psnr", "ssim"}
    torch.testing.assert_close(values["mse"], mse(torch.ones_like(a), b))


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_lpips_equals_the_package(trunk: str, weights: Path, reference: ModuleType) -> None:
    state = load_file(weights / FILES[trunk])
    theirs = reference.LPIPS(net=trunk, pnet_rand=True, verbose=False).eval()
    for number, module in convolutions(theirs):
        module.load_state_dict({p: state[f"features.{number}.{p}"] for p in ("weight", "bias")})
    for level in range(5):  # the linear weights are in the package: the file's must be the same
        assert torch.equal(getattr(theirs, f"lin{level}").model[-1].weight, state[f"lin{level}.weight"])
    assert_same_distances(LPIPS(state, trunk), theirs)


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_lpips_equals_the_package_at_random_weights(trunk: str, reference: ModuleType) -> None:
    """Needs no files: a trunk and linear weights drawn here, large enough for the distances to say something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = reference.LPIPS(net=trunk, pretrained=False, pnet_rand=True, verbose=False).eval()
        state = {}
        for number, module in convolutions(theirs):
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.normal_(module.bias, std=0.1)
            state |= {f"features.{number}.{name}": value for name, value in module.state_dict().items()}
        for level in range(5):
            weight = getattr(theirs, f"lin{level}").model[-1].weight
            torch.nn.init.uniform_(weight, 0.0, 0.5)
            state[f"lin{level}.weight"] = weight.detach()
    assert_same_distances(LPIPS(state, trunk), theirs)


def convolutions(package: Any) -> list[tuple[str, torch.nn.Conv2d]]:
    """The trunk's convolutions; their names end in torchvision's layer numbers."""
    modules = package.net.named_modules()
    return [(name.split(".")[-1], m) for name, m in modules if isinstance(m, torch.nn.Conv2d)]


def assert_same_distances(ours: LPIPS, theirs: Any) -> None:
    for kind, draw_pair in PAIRS.items():
        a, b = draw_pair()
        with torch.no_grad():
            expected = theirs(a, b, normalize=True).flatten()
        torch.testing.assert_close(image_metrics(a, b, ours)["lpips"], expected, atol=1e-5, rtol=0, msg=kind)
        assert expected.min() > 0.01


def test_lpips_is_frozen_stateless_and_differentiable(weights: Path) -> None:
    lpips = LPIPS(load_file(weights / FILES["alex"]), "alex")
    assert list(lpips.parameters()) == []
    assert lpips.state_dict() == {}
    a, b = pictures()
    a.requires_grad_()
    lpips(a, b).mean().backward()
    assert a.grad is not None
    assert a.grad.abs().max() > 0
    assert lpips(b, b).abs().max().item() == 0
    assert "lpips" in image_metrics(a, b, lpips)


def test_lpips_with_a_layer_missing_names_it() -> None:
    with pytest.raises(KeyError, match=r"features\.0\.weight"):
        LPIPS({}, "vgg")
