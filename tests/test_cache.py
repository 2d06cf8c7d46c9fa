"""The cache: what an uncached run computes, rounded to fp16, in pieces and by several processes."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator

from dte_lab import TuningEncoder
from dte_lab.features import ImageFeatures
from dte_lab.training import cache
from dte_lab.training.cache import CachedPictures, bytes_each, fill_cache
from dte_lab.training.config import PretrainConfig
from dte_lab.training.pretrain import pretrain
from dte_lab.training.step import encode_pictures


class Pictures(torch.utils.data.Dataset):
    """Item i is a pure function of i; `read` says which were asked for."""

    def __init__(self, length=11, targets=True):
        self.length, self.targets, self.read = length, targets, []

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        self.read.append(i)
        g = torch.Generator().manual_seed(i)
        image, target = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
        item = {"image": image, "prompt": f"S* on the {'beach' if i % 2 else 'house'}"}
        item |= {"concept": i // 2, "skipped": f"{i}: bad" if i == 3 else ""}
        return item | {"target": target} if self.targets else item


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 4)
    monkeypatch.setattr(cache, "ENCODED_AT_ONCE", 2)


def fill(folder, dataset, backbone, accelerator=None, **options):
    accelerator = accelerator or Accelerator(cpu=True)
    return fill_cache(folder, dataset, backbone, -1, accelerator, **options)


@pytest.mark.parametrize("targets", [True, False])
def test_items_are_what_the_frozen_parts_see(tiny_backbone, tmp_path, targets):
    said, dataset = [], Pictures(targets=targets)
    assert fill(tmp_path, dataset, tiny_backbone, say=said.append)
    cached = CachedPictures(tmp_path)
    assert len(cached) == 11 and cached.concepts.tolist() == [i // 2 for i in range(11)]
    for i in (0, 3, 6, 10):
        item, found = dataset[i], cached[i]
        assert (found["prompt"], found["skipped"]) == (item["prompt"], item["skipped"])
        assert found["concept"] == i // 2
        encode, clip = tiny_backbone.encode_images, tiny_backbone.image_encoder
        own = encode(item["image"][None]).half()
        expected = torch.cat([encode(item["target"][None]).half(), own]) if targets else own
        torch.testing.assert_close(found["latents"], expected, rtol=2e-3, atol=1e-5)
        output = clip(tiny_backbone.clip_pixels(item["image"][None]), output_hidden_states=True)
        patches = output.hidden_states[-1][0, 1:].T.reshape(20, 4, 4).half()
        torch.testing.assert_close(found["patches"], patches, rtol=2e-3, atol=1e-5)
        embeds = output.image_embeds[0] / output.image_embeds[0].norm()
        torch.testing.assert_close(found["embeds"], embeds)
    size = sum(f.get_tensor(n).nbytes for f, _ in cached.shards.values() for n in f.keys())
    expected = 11 * bytes_each(tiny_backbone, 2 if targets else 1)
    assert size == expected + 11 * 8  # and the concept
    assert f"11 items takes {expected / 1e6:.2f} MB" in said[0]


def test_a_cached_run_has_the_losses_of_one_on_the_same_values(
    tiny_backbone, tiny_config, tmp_path, monkeypatch
):
    """That is, of a run that rounds latents and patches to fp16; here to 1e-6."""
    config = PretrainConfig(
        steps=3, batch_size=4, warmup_steps=1, log_every=1, shared_timestep_probability=0.5
    )

    def losses(name, dataset):
        encoder = TuningEncoder.from_backbone(tiny_backbone, tiny_config)
        pretrain(tiny_backbone, encoder, dataset, config, tmp_path / name, progress=False)
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [line for line in lines if "loss" in line]

    assert fill(tmp_path / "cache", Pictures(), tiny_backbone)
    found = losses("cached", CachedPictures(tmp_path / "cache"))
    full = losses("full", Pictures())
    encode, clip = tiny_backbone.encode_images, TuningEncoder.image_features

    def rounded(self, backbone, images):
        patches, embeds = clip(self, backbone, images)
        return ImageFeatures(patches.half().float(), embeds)

    monkeypatch.setattr(tiny_backbone, "encode_images", lambda x: encode(x).half())
    monkeypatch.setattr(TuningEncoder, "image_features", rounded)
    expected = losses("rounded", Pictures())
    for a, b, c in zip(found, expected, full, strict=True):
        for name in ("loss", "diffusion", "contrastive", "norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), name
            assert a[name] == pytest.approx(c[name], rel=2e-3), name


def test_a_cache_goes_on_where_it_stopped(tiny_backbone, tmp_path):
    dataset = Pictures()
    assert not fill(tmp_path, dataset, tiny_backbone, max_minutes=0.0)
    with pytest.raises(ValueError, match="holds no whole cache"):
        CachedPictures(tmp_path)
    (tmp_path / "000001.safetensors").write_bytes(b"kept as it is")
    dataset.read.clear()
    assert fill(tmp_path, dataset, tiny_backbone)
    assert dataset.read == [0, *range(4), *range(8, 11)]  # the first for the size
    assert (tmp_path / "000001.safetensors").read_bytes() == b"kept as it is"
    dataset.read.clear()
    assert fill(tmp_path, dataset, tiny_backbone) and not dataset.read
    with pytest.raises(ValueError, match="other settings .settings?.?pictures|pictures"):
        fill(tmp_path, Pictures(5), tiny_backbone)


def test_processes_share_out_the_shards(tiny_backbone, tmp_path):
    class One(Accelerator):
        rank = 0

        @property
        def num_processes(self):
            return 2

        @property
        def process_index(self):
            return self.rank

    written = []
    for rank in (0, 1):
        accelerator, dataset = One(cpu=True), Pictures()
        accelerator.rank = rank
        (tmp_path / "cache.json").unlink(missing_ok=True)
        fill(tmp_path, dataset, tiny_backbone, accelerator)
        written.append(sorted(set(dataset.read[1:])))
    assert written == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7]]
    assert len(CachedPictures(tmp_path)) == 11


def test_a_disk_that_is_too_small_is_named_beforehand(tiny_backbone, tmp_path, monkeypatch):
    usage = dataclasses.make_dataclass("Usage", ["free"])(free=100)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"A cache of 11 items takes .* has 0.00 MB left"):
        fill(tmp_path, Pictures(), tiny_backbone)


def test_latents_of_a_cache_are_the_targets_first(tiny_backbone):
    both = torch.stack([torch.zeros(4, 8, 8), torch.ones(4, 8, 8)])
    pictures = {"latents": torch.stack([both, 2 + both, 4 + both]).half()}
    values = encode_pictures(tiny_backbone, pictures)[:, 0, 0, 0].tolist()
    assert values == [0, 2, 4, 1, 3, 5]
    pictures = {"latents": pictures["latents"][:, :1]}
    assert encode_pictures(tiny_backbone, pictures)[:, 0, 0, 0].tolist() == [0, 2, 4] * 2
