"""Shared fixtures: a tiny random backbone in the Stable Diffusion layout, and a fresh encoder."""

import base64
import copy
import functools
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import install_import_hook
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # every core has a worker: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"  # also in the kernels and processes that tests start
    torch.set_num_threads(1)

# What takes longest begins first, so that the workers end together: notebooks, then these files.
SLOW = (
    "test_world_training", "test_small", "test_processes", "test_train_encoder", "test_evaluation",
    "test_page", "test_world_evaluate", "test_memory", "test_sd15",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Folders of tests are shared out, file by file, to one worker per core, of four at most.

    `pytest -n 0` keeps them in one process, where single files stay anyway: they start sooner.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    from dte_lab.common.processes import usable_cores

    debugged = option.usepdb or option.collectonly
    if option.numprocesses is None and not debugged and any(map(os.path.isdir, config.args)):
        option.numprocesses = min(4, usable_cores())
        option.dist, option.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(config, items):
    """The order of SLOW, for the workers."""

    def rank(item):
        name = item.path.stem
        if item.path.suffix == ".ipynb":
            return -1
        return SLOW.index(name) if name in SLOW else len(SLOW)

    if hasattr(config, "workerinput"):
        items.sort(key=rank)


def checked_shapes(function, *args, **kwargs):
    """beartype for the annotations that name an array's shape, within whatever other type.

    Other types stay unchecked: tests hand in stand-ins and, on purpose, wrong values.
    """
    kinds = function.__annotations__.items()
    function.__annotations__ = {name: kind for name, kind in kinds if "jaxtyping" in repr(kind)}
    return beartype(function, *args, **kwargs)


def modules_with_shapes():
    """The modules of dte_lab that import jaxtyping."""
    root = Path(__file__).parents[1]
    for path in sorted((root / "dte_lab").rglob("*.py")):
        if "from jaxtyping import" in path.read_text():
            yield ".".join(path.relative_to(root).with_suffix("").parts)


# Modules imported from here on check at run time the shapes that their signatures name.
install_import_hook(list(modules_with_shapes()), "conftest.checked_shapes")

WORDS = (
    "picture photo the beach night red green blue apple cat dog house tree car boat flower on at "
    "of in is an ab x9y 123"
).split()


def save_tiny_backbone(root, prediction_type="v_prediction"):
    """Random weights: 8x8x4 latents of 16x16 pictures, two levels with cross-attention."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    alphabet = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocabulary, merges = ["<|startoftext|>", "<|endoftext|>"], []
    vocabulary += alphabet + [letter + "</w>" for letter in alphabet]
    for word in WORDS:  # merge letter by letter, so that each is one whole-word token
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair, pieces = pieces[:2], ["".join(pieces[:2]), *pieces[2:]]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
                vocabulary.append(pieces[0])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(m.split()) for m in merges], model_max_length=16
    )
    tokenizer.save_pretrained(root / "tokenizer")

    common = {"intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=24, projection_dim=12, max_position_embeddings=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **common,
    )  # fmt: skip
    CLIPTextModelWithProjection(text).save_pretrained(root / "text_encoder")
    vision = CLIPVisionConfig(
        hidden_size=20, projection_dim=12, image_size=16, patch_size=4, **common
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(root / "image_encoder")
    CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(root / "feature_extractor")
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(root / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(root / "vae")
    DPMSolverMultistepScheduler(prediction_type=prediction_type, steps_offset=1).save_pretrained(
        root / "scheduler"
    )


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny_backbone")
    save_tiny_backbone(root)
    return root


@pytest.fixture(scope="session")
def small_world_path(tmp_path_factory):
    """As `save_tiny_backbone`, laid out as the small world: 4x4 latents of 64x64 pictures."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    from dte_lab import load_backbone
    from dte_lab.patch_autoencoder import PatchAutoencoder

    root = tmp_path_factory.mktemp("small_world")
    save_tiny_backbone(root)
    UNet2DConditionModel(
        sample_size=4, in_channels=16, out_channels=16, block_out_channels=(32,),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",), cross_attention_dim=24,
        attention_head_dim=4, norm_num_groups=8,
    ).save_pretrained(root / "unet")  # fmt: skip
    channels = {"block_out_channels": (16,) * 5, "scaling_factor": 0.5}
    PatchAutoencoder(patch_channels=4, width=16, fine_width=8, **channels).save_pretrained(
        root / "vae"
    )
    vision = CLIPVisionConfig(
        hidden_size=20, projection_dim=12, image_size=64, patch_size=8, intermediate_size=32,
        num_attention_heads=2, num_hidden_layers=2,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(root / "image_encoder")
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    ).save_pretrained(root / "feature_extractor")
    load_backbone("small").scheduler.save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="session")
def random_pipe(small_world_path):
    """A small world of random fp16 numbers, with an encoder whose every part does something."""
    from dte_lab import DTEPipeline, EncoderConfig, PromptEncoder, TuningEncoder, load_backbone

    backbone = load_backbone(small_world_path)
    settings = EncoderConfig(
        rank=2, width=16, grid=8, fusion_depth=1, trunk_depth=1, num_heads=2, zero_shot_words=4,
        negative_bank_size=6, patch_channels=3, feature_timesteps=(0.2, 0.6),
    )  # fmt: skip
    encoder = TuningEncoder.from_backbone(backbone, settings)
    g = torch.Generator().manual_seed(3)
    for module in (*backbone.modules, encoder):
        for value in module.parameters():
            if module is encoder:
                value.data += 0.1 * torch.randn(value.shape, generator=g)
            value.data = value.data.half().float()
    encoder.enqueue(torch.randn(4, encoder.bank.shape[1], generator=g), torch.arange(4))
    encoder.bank.copy_(encoder.bank.half())
    encoder.bind(backbone, PromptEncoder(backbone).table)
    return DTEPipeline(backbone, encoder.requires_grad_(False))


@pytest.fixture(scope="session")
def tiny_backbone(tiny_path):
    from dte_lab import load_backbone

    return load_backbone(tiny_path)


@pytest.fixture
def tiny_sd15(monkeypatch):
    """Changes that make `sd15.random_parts` tiny; its tokenizer is made up once for all tests."""
    from dte_lab import sd15

    monkeypatch.setattr(
        sd15, "made_up_tokenizer", functools.partial(made_up, sd15.made_up_tokenizer)
    )
    return {
        "unet": {
            "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
            "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        },
        "vae": {
            "block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1,
        },
        "text": {
            "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
            "num_hidden_layers": 2, "projection_dim": 16,
        },
        "vision": {
            "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
            "num_hidden_layers": 2, "projection_dim": 16, "image_size": 28,
        },
    }  # fmt: skip


@functools.cache
def made_up(make):
    return make()


@pytest.fixture(scope="session")
def wide_cache(tmp_path_factory):
    """The folder of a wide world: 24 boxes of colour with names, and 4 of things held out."""
    import json

    from safetensors.torch import save_file

    from dte_lab.world.wide import sha256

    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("wide")
    names = [f"{of} {thing}" for of in ("war", "toy", "steel") for thing in ("axe", "lamp", "box")]
    names += ["axe", "lamp", "box", "a lamp of a toy box", "war toy", "steel toy"] * 2
    names += ["solitaire", "lamp of war", "box of war"]
    listed, pixels = {}, {}
    for key, chosen in (
        ("drawings", names),
        ("held_out", ["strawberry", "peacock", "tractor", "cupcake"]),
    ):
        rgba = np.zeros((len(chosen), 48, 48, 4), np.uint8)
        for drawing in rgba:
            top, left = rng.integers(2, 20, 2)
            drawing[top : top + 24, left : left + 24] = [*rng.integers(0, 255, 3), 255]
        pixels[key] = torch.from_numpy(rgba)
        listed[key] = [
            {"icon": f"{key}-{i}", "name": name, "style": "game", "colour": ("red", None)[i % 2]}
            for i, name in enumerate(chosen)
        ]
    text = json.dumps(listed)
    (root / "wide.json").write_text(text)
    save_file(pixels, root / "wide.safetensors", {"json": sha256(text)})
    return root


@pytest.fixture(scope="session")
def small_pipe():
    """The shipped models, for tests that leave them as they are."""
    from dte_lab import DTEPipeline

    return DTEPipeline.from_pretrained("small")


@pytest.fixture(scope="session")
def tiny_config():
    from dte_lab import EncoderConfig

    return EncoderConfig(
        rank=2, width=16, grid=4, fusion_depth=1, trunk_depth=1, num_heads=2, zero_shot_words=4,
        negative_bank_size=6,
    )  # fmt: skip


@pytest.fixture
def tiny_encoder(tiny_backbone, tiny_config):
    from dte_lab import TuningEncoder

    return TuningEncoder.from_backbone(tiny_backbone, tiny_config)


@pytest.fixture
def tiny_offsets(tiny_backbone):
    """make(batch_size) -> random offsets of rank 2 for every projection."""
    from dte_lab.lora import projection_shapes

    def make(batch_size=1, rank=2, scale=0.3, seed=0):
        g = torch.Generator().manual_seed(seed)
        return {
            key: (
                torch.randn(batch_size, d_in, rank, generator=g) * d_in**-0.5,
                torch.randn(batch_size, rank, d_out, generator=g) * scale,
            )
            for key, (d_in, d_out) in projection_shapes(tiny_backbone.unet).items()
        }

    return make


@pytest.fixture
def merged_unet(tiny_backbone):
    """merge(offsets) -> a copy of the UNet with W + A B of sample 0 as its plain weights."""
    from dte_lab.lora import PROJECTIONS

    def merge(offsets):
        unet = copy.deepcopy(tiny_backbone.unet)
        for key, (a, b) in offsets.items():
            name, projection = key.rsplit(".", 1)
            assert projection in PROJECTIONS
            linear = unet.get_submodule(f"{key}.0" if projection == "to_out" else key)
            linear.weight.data += (a[0] @ b[0]).T
        return unet

    return merge


@pytest.fixture(scope="session")
def picture():
    """A 24x20 PIL image."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def tiny_pixels():
    """Three random pictures (3, 3, 16, 16) in [-1, 1]."""
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def shown_picture():
    """The picture that a panel of `figure_panel` shows, read from its HTML."""

    def read(panel):
        data = panel.view.value.partition("base64,")[2].partition('"')[0]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    return read
