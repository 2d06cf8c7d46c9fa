"""Stable Diffusion 1.5's layout at tiny widths, and at full size without numbers."""

import dataclasses
import errno
import gzip
import importlib.metadata
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from dte_lab import DTEPipeline, TokenTable, TuneConfig, load_backbone, sd15
from dte_lab.common.weights import load_weights
from dte_lab.features import image_features
from dte_lab.lora import attention_layers, projection_shapes
from dte_lab.sd15 import CLIP_FILES, CLIP_L14, CLIP_L14_REVISION, SD15, random_parts

TINY = {
    "unet": {
        "block_out_channels": (8, 16, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "vae": {"block_out_channels": (4, 8, 16, 16), "norm_num_groups": 2},
    "text": {
        "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16,
    },
    "vision": {
        "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 16,
        "image_size": 28,
    },
}  # fmt: skip


def real_tokenizer():
    """CLIP's own vocabulary where there is one, from the merges that open_clip_torch carries.

    pip install --no-deps open_clip_torch: its torchvision would be a build for another torch, with
    which transformers cannot be imported any more. So it is no declared dependency, and the file is
    found without importing the package. Otherwise made-up words of the same number serve.
    """
    try:
        files = importlib.metadata.files("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        return sd15.made_up_tokenizer()
    (packed,) = (f for f in files if f.name == "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.open(packed.locate()).read().decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49_408 - 512 - 2 + 1]]
    byte = sorted(sd15.made_up_tokenizer().get_vocab().items(), key=lambda item: item[1])[:256]
    alphabet = [token for token, _ in byte]
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.fixture(scope="module")
def tokenizer():
    return real_tokenizer()


def save(root, tokenizer, **parts):
    """Write the folders of a copy of Stable Diffusion 1.5, and beside them those of its CLIP."""
    folders = {"text_encoder": "text_encoder", "unet": "unet", "vae": "vae"}
    folders |= {"scheduler": "scheduler", "image_encoder": "image_encoder"}
    for part, folder in (folders | {"image_processor": "feature_extractor"}).items():
        parts[part].save_pretrained(root / folder)
    tokenizer.save_pretrained(root / "tokenizer")


@pytest.fixture(scope="module")
def parts():
    """Of few layers; that the full number has the names of the full-size model is one test."""
    layers = {"num_hidden_layers": 2}
    few = {"text": TINY["text"] | layers, "vision": TINY["vision"] | layers}
    return random_parts(resolution=64, **TINY | few)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parts, tokenizer):
    root = tmp_path_factory.mktemp("sd15")
    save(root, **(parts | {"tokenizer": tokenizer}))
    words = sorted(t[:-4] for t in tokenizer.get_vocab() if t.endswith("</w>") and t[:-4].isalpha())
    (root / "words.json").write_text(json.dumps(words[::60]))  # to look at all takes a minute
    return root


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder)


def test_the_module_tree_is_that_of_sd15(backbone):
    """The names of all 32 attention layers, against the full-size model on the meta device."""
    full, tiny = random_parts("meta"), random_parts("meta", resolution=64, **TINY)
    for part in ("unet", "vae", "text_encoder", "image_encoder"):
        ours = [name for name, _ in tiny[part].named_parameters()]
        assert ours == [name for name, _ in full[part].named_parameters()], part
    assert len(attention_layers(backbone.unet)) == 32
    assert backbone.prediction_type == "epsilon" and backbone.resolution == 64
    assert len(backbone.tokenizer) == 49_408


def test_a_copy_of_the_halved_files_alone_is_read(folder, backbone, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "half")
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    again = load_backbone(copy)
    for ours, theirs in zip(again.modules, backbone.modules, strict=True):
        for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(x, y)


def test_tensors_of_the_other_tower_are_not_reported(parts, tmp_path, caplog, capfd):
    """CLIP's file holds both: each tower finds the other's tensors unknown."""
    tensors = {}
    for part in ("text_encoder", "image_encoder"):
        parts[part].save_pretrained(tmp_path / part)
        tensors |= load_file(tmp_path / part / "model.safetensors")
    save_file(tensors, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    kind = type(parts["text_encoder"])
    capfd.readouterr()
    load_weights(kind.from_pretrained, tmp_path / "text_encoder", strangers=True)
    assert not caplog.records and "UNEXPECTED" not in "".join(capfd.readouterr())


def test_the_licence_is_named_once(caplog, monkeypatch):
    def fetch(*_):
        raise OSError("not here")

    monkeypatch.setattr("dte_lab.backbone_parts.fetch", fetch)
    sd15.tell_licence.cache_clear()
    for _ in range(2):
        with pytest.raises(OSError, match="not here"):
            load_backbone("sd15")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "CreativeML OpenRAIL-M" in said and "no safety checker" in said


def test_full_size_is_the_published_size():
    """Parameters in millions as published; offsets as the paper's facts sheet counted them."""
    full = random_parts("meta")
    millions = {
        part: round(sum(p.numel() for p in full[part].parameters()) / 1e6, 1)
        for part in ("unet", "vae", "text_encoder", "image_encoder")
    }
    assert millions == {"unet": 859.5, "vae": 83.7, "text_encoder": 123.7, "image_encoder": 304.0}
    shapes = projection_shapes(full["unet"])
    assert len(shapes) == 128
    assert round(sum(i * o for i, o in shapes.values()) / 1e6, 1) == 93.5
    assert sum(i + o for i, o in shapes.values()) == 199_296


@pytest.mark.parametrize("make", [sd15.made_up_tokenizer, real_tokenizer])
def test_vocabulary(backbone, make):
    tokenizer = make()
    assert len(tokenizer) == 49_408
    table = TokenTable(dataclasses.replace(backbone, name="all words", tokenizer=tokenizer))
    assert len(table) == sd15.USABLE_WORDS
    is_real = "teapot</w>" in tokenizer.get_vocab()
    words = ["dog", "teapot"] if is_real else ["aab", "abc"]
    ids = tokenizer(" ".join(words)).input_ids
    assert ids[0] == 49_406 and ids[-1] == 49_407 and len(ids) == 4
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids[1:-1]] == [w + "</w>" for w in words]
    if is_real:  # ids of the released model
        ids = tokenizer("a picture of a dog").input_ids
        assert ids == [49_406, 320, 1674, 539, 320, 1929, 49_407]


def test_noise_schedule_is_stable_diffusions(backbone):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(
        backbone.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6
    )


@pytest.fixture(scope="module")
def pipe(folder):
    return DTEPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def start(pipe, picture):
    """What is known before any tuning."""
    return pipe.personalize(picture, num_steps=0, progress=False)


TUNE = TuneConfig(batch_size=2)


@pytest.fixture(scope="module")
def tuned(pipe, picture):
    return pipe.personalize(picture, num_steps=2, progress=False, config=TUNE)


def test_personalize_without_an_encoder(pipe, start, tuned, picture):
    words = pipe.prompt_encoder.table.embeddings
    embeds = image_features(pipe.backbone, pipe.pixels([picture])).embeds
    best, rows = (pipe.encoder.word_clip @ embeds[0]).sort(descending=True)
    share, some = (best[:8] / 0.01).softmax(0)[:, None], words[rows[:8]]  # of eight words
    mixture = (share * some).sum(0)
    mixture *= (share * some.norm(dim=1, keepdim=True)).sum() / mixture.norm()
    torch.testing.assert_close(start.v_star[0], mixture, atol=1e-5, rtol=1e-4)
    assert all((b == 0).all() for _, b in start.offsets.values())
    flat = "mid_block.attentions.0.transformer_blocks.0.attn1.to_"  # a softmax over one position
    moved = {name for name, (_, b) in tuned.offsets.items() if b.any()}
    assert moved | {flat + "q", flat + "k"} == set(tuned.offsets), "rounding may move the two"
    assert not torch.equal(tuned.v_star, start.v_star)
    image = pipe.generate(tuned, "S* at night", num_inference_steps=2, progress=False)[0][0]
    assert image.size == (64, 64)


def test_the_first_word_is_clips(pipe, start, picture):
    """Against the similarity computed text by text, with full padding, for a few words."""
    backbone, table = pipe.backbone, pipe.prompt_encoder.table
    best = pipe.encoder.class_row(backbone, pipe.pixels([picture]), table)
    rows = [best, *range(0, len(table), 60)]
    texts = [f"a picture of a {table.words[i]}" for i in rows]
    ids = backbone.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    words = F.normalize(backbone.text_encoder(ids).text_embeds, dim=-1)
    similarity = (image_features(backbone, pipe.pixels([picture])).embeds @ words.T).mean(dim=0)
    assert similarity.argmax() == 0
    torch.testing.assert_close(pipe.encoder.word_clip[rows], words, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_checkpointing": True, "offload": True}, 1e-5),
        ({"dtype": torch.bfloat16}, 0.2),
        ({"dtype": torch.float16}, 0.05),
    ],
)
def test_options_change_memory_and_not_the_result(pipe, tuned, folder, picture, options, tolerance):
    def losses(concept):
        return torch.tensor([step["loss"] for step in concept.info["losses"]])

    other = DTEPipeline.from_pretrained(folder, **options)
    other.encoder.word_clip = pipe.encoder.word_clip
    concept = other.personalize(picture, num_steps=2, progress=False, config=TUNE)
    torch.testing.assert_close(losses(concept), losses(tuned), rtol=tolerance, atol=0)


def test_pickled_weights_are_never_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors, and pickled ones are never"):
        load_backbone(tmp_path)


def test_other_models_are_refused(folder, tmp_path):
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="two text encoders, as Stable Diffusion XL"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match="Only sd15"):
        load_backbone("small", random=True)
    wide = tmp_path / "sd2"
    for part in ("unet", "vae", "tokenizer", "scheduler", "text_encoder"):
        (wide / part).mkdir(parents=True)
    (wide / "text_encoder" / "config.json").write_text('{"hidden_size": 1024}')
    with pytest.raises(ValueError, match="Stable Diffusion 2 has 1024"):
        load_backbone(wide)


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path, tiny_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").mkdir()  # from which transformers makes an empty one, silently
    with pytest.raises((ValueError, OSError), match="tokenizer"):
        load_backbone(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub that is there on demand: hub(files) fills it."""
    monkeypatch.setattr(sd15.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sd15.constants, "HF_HUB_OFFLINE", False)  # whatever runs the tests says
    monkeypatch.setattr(sd15, "check_hub", lambda: None)
    calls = []

    def serve(source=None, error=None):
        def snapshot_download(repository, *, revision, allow_patterns, local_files_only):
            calls.append((repository, revision, tuple(allow_patterns), local_files_only))
            if local_files_only or error:
                raise error or FileNotFoundError("not cached")
            return source[repository]

        monkeypatch.setattr(sd15, "snapshot_download", snapshot_download)
        return calls

    return serve


def test_a_plain_copy_takes_the_image_encoder_from_clip(hub, parts, tmp_path, monkeypatch):
    """SD 1.5 as it is published: no image encoder, and a text encoder without projection."""
    monkeypatch.setattr("dte_lab.backbone_parts.TEXT", {"hidden_size": 32})
    save(tmp_path / "sd", **parts)
    root, clip = tmp_path / "sd", tmp_path / "clip"
    shutil.move(root / "image_encoder", clip)
    shutil.copy(root / "feature_extractor" / "preprocessor_config.json", clip)
    vision = parts["image_encoder"].state_dict()
    text = parts["text_encoder"].state_dict()
    from transformers import CLIPConfig

    CLIPConfig(
        text_config=parts["text_encoder"].config.to_dict(),
        vision_config=parts["image_encoder"].config.to_dict(),
        projection_dim=16,
    ).save_pretrained(clip)
    other = {k: v + 1 if k.startswith("text_model") else v for k, v in (text | vision).items()}
    save_file(other, clip / "model.safetensors", {"format": "pt"})
    CLIPTextModel.from_pretrained(root / "text_encoder").save_pretrained(root / "text_encoder")
    calls = hub({CLIP_L14: clip})
    backbone = load_backbone(root)
    assert calls[-1] == (CLIP_L14, CLIP_L14_REVISION, tuple(CLIP_FILES), False)
    assert backbone.has_projection
    for name, value in backbone.text_encoder.state_dict().items():  # the copy's own text tower
        assert torch.equal(value, text[name]), name
    for name, value in backbone.image_encoder.state_dict().items():
        assert torch.equal(value, vision[name]), name


def test_messages_of_the_hub(hub, monkeypatch):
    calls = hub(error=ConnectionError("Name or service not known"))
    with pytest.raises(OSError, match=r"cannot be downloaded from the hub \(Name or service"):
        load_backbone("sd15")
    assert [call[-1] for call in calls] == [True, False]  # the cache first
    assert calls[0][:2] == (SD15, sd15.SD15_REVISION)
    assert not any(name.endswith((".bin", ".ckpt")) for name in calls[0][2])
    calls.clear()
    with pytest.raises(OSError, match="downloads are switched off"):
        load_backbone("sd15", local_files_only=True, revision="abc")
    assert calls == [(SD15, "abc", tuple(sd15.sd15_files(False)), True)]
    hub(error=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="3.8 GB in .* the disk is too full: make room"):
        load_backbone("sd15")
    monkeypatch.setattr(sd15.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    hub({})
    with pytest.raises(OSError, match="the disk is too full"):
        load_backbone("sd15")


def test_half_precision_on_a_gpu_by_default(monkeypatch):
    wanted = {}

    def parts(name, dtype, *args):
        wanted[name] = dtype
        raise KeyboardInterrupt

    monkeypatch.setattr("dte_lab.backbone.load_parts", parts)
    monkeypatch.setattr("dte_lab.backbone.checked_device", lambda device: device)
    for name, device in (("sd15", "cuda"), ("small", "cuda:1"), ("other", "cpu")):
        with pytest.raises(KeyboardInterrupt):
            load_backbone(name, device)
    assert wanted == {"sd15": torch.float16, "small": torch.float32, "other": torch.float32}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in sd15.sd15_files(half=True)


def test_the_stock_pipeline_draws_the_same(pipe, start):
    """Our sampler against StableDiffusionPipeline itself, with a word in the place of v*."""
    backbone, table = pipe.backbone, pipe.prompt_encoder.table
    stock = StableDiffusionPipeline(
        backbone.vae, backbone.text_encoder, backbone.tokenizer, backbone.unet,
        backbone.scheduler, None, None, requires_safety_checker=False,
    )  # fmt: skip
    stock.set_progress_bar_config(disable=True)
    concept = dataclasses.replace(start, v_star=table.embeddings[5][None])
    ours = pipe.generate(concept, "S*", num_inference_steps=3, progress=False)[0][0]
    ids = backbone.tokenizer(
        [table.words[5], ""], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    prompt, negative = backbone.text_encoder(ids).last_hidden_state[:, None]
    theirs = stock(
        prompt_embeds=prompt, negative_prompt_embeds=negative, latents=pipe.initial_noise(0),
        num_inference_steps=3, guidance_scale=7.5,
    ).images[0]  # fmt: skip
    difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
    assert np.abs(difference).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_full_size_model_tunes_on_a_gpu():
    pipe = DTEPipeline.from_pretrained(
        "sd15", device="cuda", random=True, gradient_checkpointing=True, offload=True
    )
    picture, config = Image.new("RGB", (512, 512), "red"), TuneConfig(batch_size=1)
    concept = pipe.personalize(picture, num_steps=1, progress=False, config=config)
    assert concept.info["peak_memory_mb"] < 8000
