"""What networks are fed: normalised images, ids of tokens; and what of activations a head is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frostline.inputs import Images, Texts, real

CPU = torch.device("cpu")
MEAN = Texts(vocabulary=30, pad=2, types=2, longest=64, pool="mean")
CLS = Texts(vocabulary=30, pad=2, types=2, longest=64, pool="cls")


def test_images_are_normalised_by_channel() -> None:
    rows = np.full((2, 4, 4, 3), [0, 127.5, 255], np.uint8)
    fed = Images((0.0, 0.5, 1.0), (1.0, 0.5, 0.25)).fed(rows, CPU)
    assert fed.shape == (2, 3, 4, 4)
    assert fed.is_contiguous(memory_format=torch.channels_last)
    assert [float(channel.mean()) for channel in fed[0]] == pytest.approx([0.0, (127 / 255 - 0.5) / 0.5, 0.0], abs=1e-6)


def test_tokens_are_fed_as_they_are() -> None:
    rows = np.arange(2 * 5 * 2, dtype=np.int32).reshape(2, 5, 2)
    fed = MEAN.fed(rows, CPU)
    assert (fed.shape, fed.dtype) == ((2, 2, 5), torch.int64)
    np.testing.assert_array_equal(fed[:, 0], rows[..., 0])


def test_noise_is_the_same_every_time_and_padded_at_the_end() -> None:
    noise = MEAN.noise(3, 12)
    assert torch.equal(noise, MEAN.noise(3, 12))
    there = noise[:, 0] != MEAN.pad
    assert there.sum(dim=1).tolist() == [12, 9, 6]
    assert (there.int().diff(dim=1) <= 0).all()
    assert int(noise.max()) < 30
    assert Images((0.5,) * 3, (0.5,) * 3).noise(2, 8).shape == (2, 3, 8, 8)


def test_features_of_a_text_are_the_mean_of_its_tokens_or_the_first() -> None:
    activations = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    activations[1, 2:] = 0
    assert real(activations).sum(dim=1).tolist() == [4, 2]
    torch.testing.assert_close(MEAN.pooled(activations)[0], activations[0].mean(dim=0))
    torch.testing.assert_close(MEAN.pooled(activations)[1], activations[1, :2].mean(dim=0))
    assert torch.equal(CLS.pooled(activations), activations[:, 0])
    assert torch.equal(MEAN.pooled(activations[:, 0]), activations[:, 0]), "features that are pooled already"
    assert not MEAN.pooled(torch.zeros(1, 4, 3)).any()


def test_what_is_known_of_inputs_tells_them_apart() -> None:
    found = [each.about() for each in (MEAN, CLS, Texts(30, 3, 2, 64, "mean"), Images((0.5,) * 3, (0.5,) * 3))]
    assert len({str(each) for each in found}) == 4
