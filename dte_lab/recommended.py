"""What a model is best used with where its user asks for nothing else.

The settings belong to the model and not to the method: a guidance or a learning rate that suits the
small world spoils Stable Diffusion. A backbone knows its own (`Backbone.recommended`), and a
concept keeps those that it was made with. ("ours, not the paper's")
"""

from dataclasses import dataclass

from dte_lab.common.settings import check_number, check_one_of, check_whole

OPTIMIZERS = ("adamw", "muon")  # of the offsets


@dataclass(frozen=True)
class Recommended:
    """Settings of one kind of model.

    `guidance_scale` of classifier-free guidance. Tuning: `num_steps` with a trained encoder and
    `num_steps_without_encoder`; `batch_size` noise levels per step; `optimizer`, the rates and
    `constant_steps` as in `TuneConfig`. Start of v* without training: a mixture of the
    `zero_shot_words` words nearest to the picture in CLIP's space, at `zero_shot_temperature`.

    Raises DTEError for a value that means nothing.
    """

    guidance_scale: float
    num_steps_without_encoder: int
    batch_size: int
    zero_shot_words: int
    zero_shot_temperature: float
    num_steps: int = 12  # of the paper
    token_learning_rate: float = 0.1
    optimizer: str = "muon"
    offset_learning_rate: float = 0.06
    constant_steps: int = 6

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "token_learning_rate", "offset_learning_rate"):
            check_number(name, getattr(self, name), 0)
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_number("zero_shot_temperature", self.zero_shot_temperature, above=0)
        for name in ("num_steps", "num_steps_without_encoder"):
            check_whole(name, getattr(self, name), 0)
        for name in ("batch_size", "zero_shot_words", "constant_steps"):
            check_whole(name, getattr(self, name), 1)


# Guidance was chosen on val: at 3 colours saturate, and those of the thing leak into the scene.
SMALL_WORLD = Recommended(
    guidance_scale=1.5, num_steps_without_encoder=12, batch_size=8, zero_shot_words=32,
    zero_shot_temperature=0.1,
)  # fmt: skip

# Not measured with the real weights. Guidance is the usual one, the temperature CLIP's own. Each
# of our first six steps moves the offsets as far as about twenty of diffusers' DreamBooth-LoRA
# example, later ones ever less, so that 30 are its 300; a batch of 4 fits a card of 8 GB, barely.
STABLE_DIFFUSION = Recommended(
    guidance_scale=7.5, num_steps_without_encoder=30, batch_size=4, zero_shot_words=8,
    zero_shot_temperature=0.01,
)  # fmt: skip
