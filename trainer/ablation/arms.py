"""The arms of the ablation on the embedded benchmark: the objective, what is around it, and the controls."""

from dataclasses import dataclass, field

from ..sft_config import OBJECTIVE, AMVLSFTConfig


LATENTS = {"num_latents": 2, "latent_size": 64}

# The paper's objective, without what this project adds. Of what it leaves open, beta and the warm-up are the defaults.
PAPER = {"ntp_weight": 1.0, "prior_ntp_weight": 0.0, "gamma": 0.001, "kl_order": "forward_first"}
LORA = {"r": 64, "lora_alpha": 128, "target_modules": "all-linear"}
ONE_TERM = {**PAPER, "kl_order": "together"}  # with one KL term there is no other to wait for


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        name (`str`): of the row in the table.
        group (`str`): the part of the table.
        kind (`"amvl"`, `"sft"` or `"pause"`, defaults to `"amvl"`): what is trained.
        training (`dict`): fields of [`AMVLSFTConfig`] that differ from its defaults; of SFT, of [`~trl.SFTConfig`].
        latents (`dict`): arguments of [`add_latents`] that differ from `LATENTS`; `random_projection` starts the projection from
            noise of the same norm.
        lora (`dict`): arguments of [`~peft.LoraConfig`]: an adapter is trained, by default all weights.
        length (`int`, defaults to 1): times the optimiser steps of the others.
        main (`bool`, defaults to `False`): run with every seed, not only with the first ones.
    """

    name: str
    group: str
    kind: str = "amvl"
    training: dict = field(default_factory=dict)
    latents: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    length: int = 1
    main: bool = False

    @property
    def settings(self):
        """What tells this arm from others, the objective's defaults included; JSON's types."""
        objective = {name: getattr(AMVLSFTConfig, name) for name in OBJECTIVE} if self.kind == "amvl" else {}
        return {
            "kind": self.kind,
            "length": self.length,
            "training": {**objective, **self.training},
            "latents": {} if self.kind == "sft" else {**LATENTS, **self.latents},
            **({"lora": self.lora} if self.lora else {}),
        }


ARMS = (
    Arm("AMVL", "the default", main=True),
    Arm("same-data SFT", "controls", kind="sft", main=True),
    Arm("same-data SFT, 3 x the steps", "controls", kind="sft", length=3),
    Arm("same-data SFT, 3 x the learning rate", "controls", kind="sft", training={"learning_rate": 3e-3}),
    Arm("pause tokens", "controls", kind="pause", main=True),
    Arm(
        "prior-decoded loss alone",
        "controls",
        training={"ntp_weight": 0.0, "beta": 0.0, "gamma": 0.0},
        main=True,
    ),
    Arm("NTP only", "the paper's objective", training={**ONE_TERM, "beta": 0.0, "gamma": 0.0}),
    Arm("forward only", "the paper's objective", training={**ONE_TERM, "ntp_weight": 0.0, "gamma": 0.0}),
    Arm("reverse only", "the paper's objective", training={**ONE_TERM, "ntp_weight": 0.0, "beta": 0.0}),
    Arm("NTP + forward", "the paper's objective", training={**ONE_TERM, "gamma": 0.0}),
    Arm("NTP + reverse", "the paper's objective", training={**ONE_TERM, "beta": 0.0}),
    Arm("NTP + both, reverse first", "the paper's objective", training={**PAPER, "kl_order": "reverse_first"}),
    Arm("NTP + both, forward first", "the paper's objective", training=PAPER),
    Arm("NTP weight 1", "one step from the default", training={"ntp_weight": 1.0}),
    Arm("no prior-decoded loss", "one step from the default", training={"prior_ntp_weight": 0.0}),
    Arm("forward first", "one step from the default", training={"kl_order": "forward_first"}),
    Arm("gamma 0.001", "one step from the default", training={"gamma": 0.001}),
    Arm("KL as a sum", "one step from the default", training={"kl_reduction": "sum"}),
    Arm("placeholder not warm", "one step from the default", latents={"initial_token_id": None}),
    Arm("projection at random", "one step from the default", latents={"random_projection": True}),
    Arm("k = 1", "k and d", latents={"num_latents": 1}),
    Arm("k = 8", "k and d", latents={"num_latents": 8}),
    Arm("d = 16", "k and d", latents={"latent_size": 16}),
    Arm("d = 256", "k and d", latents={"latent_size": 256}),
    Arm("LoRA, 3 x the steps", "LoRA", length=3, lora=LORA),
    Arm("LoRA, 3 x the steps, placeholder not warm", "LoRA", length=3, latents={"initial_token_id": None}, lora=LORA),
)
