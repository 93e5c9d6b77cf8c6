"""Configuration of models, training and sampling, and the names of strategies and arms."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

from features.templates import PromptDropForm
from pipelines.core.config import FrozenConfig, ModelRef, execution_field


class Strategy(StrEnum):
    """How the layers of the text encoder are fused into the conditioning."""

    PENULTIMATE = "penultimate"
    UNIFORM = "uniform"
    STATIC = "static"
    FUSE_DIT = "fuse_dit"
    TIME_WISE = "time_wise"
    DEPTH_WISE = "depth_wise"
    JOINT = "joint"

    @property
    def has_time_gate(self) -> bool:
        """True where the conditioning depends on the flow time."""
        return self in (Strategy.TIME_WISE, Strategy.JOINT)

    @property
    def varies_with_block(self) -> bool:
        """True where blocks differ in their conditioning."""
        return self in (Strategy.DEPTH_WISE, Strategy.JOINT)


SHIFT_SUFFIX = "+shift"


class Arm(FrozenConfig):
    """A strategy as evaluated: a checkpoint is sampled with or without the shift of Eq. 11."""

    strategy: Strategy
    gate_shift: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Arm":
        if self.gate_shift and not self.strategy.has_time_gate:
            raise ValueError(f"{self.strategy}: the shift of Eq. 11 needs a time gate (time_wise or joint)")
        return self

    @property
    def name(self) -> str:
        return self.strategy.value + (SHIFT_SUFFIX if self.gate_shift else "")

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Return the arm called `name`, such as ``depth_wise`` or ``time_wise+shift``; raises ValueError."""
        known = ", ".join(strategy.value for strategy in Strategy)
        strategy_name = name.removesuffix(SHIFT_SUFFIX)
        if strategy_name not in set(Strategy):
            raise ValueError(f"arm {name!r}: unknown strategy; known: {known}")
        return cls(strategy=Strategy(strategy_name), gate_shift=name.endswith(SHIFT_SUFFIX))


PAPER_ARMS = tuple(
    Arm.parse(name)
    for name in (
        "penultimate", "uniform", "static", "fuse_dit", "time_wise", "time_wise+shift", "depth_wise", "joint",
    )
)  # fmt: skip
"""The eight rows of the paper's Table 1, in its order."""


class ModelConfig(FrozenConfig):
    """Shape of the backbone; the defaults are the paper's. One configuration serves every strategy of a comparison."""

    hidden_size: int = Field(2048, gt=0)
    num_blocks: int = Field(24, gt=0)
    num_heads: int = Field(32, gt=0)
    """Query heads."""
    num_kv_heads: int = Field(8, gt=0)
    """Key and value heads; fuse_dit needs the text encoder's number."""
    head_dim: int = Field(128, gt=0, multiple_of=4)
    """A multiple of 4, because rotary positions halve it twice; fuse_dit needs the text encoder's."""
    mlp_width: int = Field(8192, gt=0)
    patch_size: int = Field(2, gt=0)
    latent_channels: int = Field(16, gt=0)
    latent_size: int = Field(32, gt=0)
    """Height and width of sampled latents: 32 is 256 px with an f8 autoencoder."""
    text_width: int = Field(2560, gt=0)
    num_text_layers: int = Field(36, gt=1)
    """Layers of text features, L: hidden_states[1..L] of the encoder, without the embedding output."""
    norm_eps: float = Field(1e-6, gt=0)
    residual_scale: float = Field(1.0, gt=0)
    """Factor on the initial weights of each block's residual branches. 1 as released; short runs learn faster with
    less, because blocks then start near the identity and pass noise through."""
    rope_theta: float = Field(10_000.0, gt=1)
    """One base for every strategy. The released code has three, so its arms differ in more than fusion."""
    timestep_conditioning: Literal["none", "adaln"] = "none"
    """`none` is the paper's backbone: t reaches the network only through the gates. `adaln` adds adaLN-single."""
    gate_time_scale: float = Field(1.0, gt=0)
    """Factor on t before the sinusoids of Eq. 12. At 1, as printed, most of them barely change over t; 1000 spreads
    them."""
    gate_signal: Literal["nominal", "estimated"] = "nominal"
    """Time that gates see: the schedule's, as in the paper, or a small head's estimate from the noisy latents.
    `estimated` needs time_wise or joint; sampling then computes keys and values for each image and step."""
    gate_embedding_size: int = Field(128, gt=0, multiple_of=2)
    gate_width: int = Field(512, gt=0)
    fuse_first_layer: int = Field(6, ge=1)
    """fuse_dit: decoder layer (from 0) whose keys and values block 0 shares; earlier layers run alone."""
    fuse_layer_stride: int = Field(1, ge=1)
    """fuse_dit: block i shares layer fuse_first_layer + i * fuse_layer_stride."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.latent_size % self.patch_size:
            raise ValueError(f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """fuse_dit: the decoder layers (from 0) that the blocks share, one per block."""
        return tuple(self.fuse_first_layer + index * self.fuse_layer_stride for index in range(self.num_blocks))


class TrainingConfig(FrozenConfig):
    """How a checkpoint is trained. Execution fields change at most rounding, never samples or noise."""

    steps: int = Field(500_000, gt=0)
    batch_size: int = Field(512, gt=0)
    """Samples per optimizer step over all processes and accumulation steps."""
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant as in the paper, or decaying to zero at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    """On matrices only, not on norms, biases and fusion logits."""
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Per step, in fp32; rises from 0.1 as (1 + step) / (10 + step), so that short runs forget initial values."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast over fp32 weights."""
    text_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of prepared text features in memory. Normalised values fit float16 with 2^-11 relative error."""
    seed: int = Field(0, ge=0)
    """Of initial weights, order, noise, times and prompt drop."""
    prompt_drop: float = Field(0.1, ge=0, lt=1)
    """Share of samples trained with the unconditional text."""
    prompt_drop_form: PromptDropForm = "instruction"
    """The unconditional text of training and sampling: `instruction` is the template around no caption, as released;
    `empty` is no text (one start or end token), as in the paper. Equal where the template is the caption alone."""
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    """Logit-normal sampling: t = sigmoid(time_mean + time_std * N(0, 1))."""
    time_shift: float = Field(1.0, gt=0)
    """Static shift of the noise schedule; above 1 trains more on noisy times, 1 is no shift."""
    validate_every: int = Field(1000, gt=0)
    """Steps between validation losses on the held-out split; the last step has one too."""
    num_validation_samples: int = Field(512, ge=0)
    on_bad_step: Literal["stop", "skip"] = "stop"
    """At a non-finite loss or gradient norm, or a loss jump: stop, or skip the step. A skipped step changes neither
    weights nor optimizer nor average; its samples are in the ledger, its reason in the metrics."""
    max_loss_jump: float | None = Field(None, gt=1)
    """Ratio of a step's loss to the median of the last `loss_jump_window` steps above which the step is bad; None: no
    limit. The first `loss_jump_window` steps of a run are not judged."""
    loss_jump_window: int = Field(100, ge=1)
    max_bad_steps_in_row: int = Field(10, ge=1)
    """Consecutive skipped steps that stop the run."""
    max_shard_bytes: int = Field(5_000_000_000, gt=0)
    """Largest file of weights; larger models are split into several with an index, and so are snapshots."""
    accumulation_steps: int = execution_field(1, ge=1)
    checkpoint_every: int = execution_field(5000, gt=0)
    """Steps between snapshots: the most that a kill can lose."""
    keep_checkpoints: int = execution_field(2, ge=1)
    """Newest snapshots to retain; all are removed when the run finishes."""
    keep_every: int | None = execution_field(None, gt=0)
    """Also retain snapshots at multiples of so many steps while the run is unfinished, to go back further. A multiple
    of checkpoint_every."""
    checkpoint_activations: bool = execution_field(False)
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    compile: bool = execution_field(False)
    """Compile the blocks with torch.compile; on a CPU that needs a C++ compiler."""
    sharded: bool = execution_field(False)
    """Shard parameters, gradients, optimizer state and moving average over the processes (FSDP2)."""
    num_processes: int = execution_field(1, ge=1)
    """Processes that the launcher starts; batch_size must be divisible by num_processes * accumulation_steps."""
    threads: int | None = execution_field(None, ge=1)
    """CPU threads per process; None is torch's default. Results are bit-exact for equal thread counts."""
    device: Literal["cpu", "cuda"] = execution_field("cpu")
    text_memory_bytes: int = execution_field(2 << 30, ge=0)
    """Cache of prepared texts per process; texts beyond it are prepared again at each read. Without stored text
    features it is on the device of the text encoder."""
    log_every: int = execution_field(10, gt=0)
    """Steps between updates of the progress line's loss and of the trackers' curves."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = execution_field(("tensorboard",))
    """Where the curves go: TensorBoard files in the stage's log folder, or Weights & Biases (throughline[wandb])."""
    peak_flops: float | None = execution_field(None, gt=0)
    """Peak operations per second of one process's device, for the model-FLOPs utilisation. None: that of common GPUs at
    bfloat16; on other devices utilisation is not logged."""

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        shares = self.num_processes * self.accumulation_steps
        if self.batch_size % shares:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by num_processes * accumulation_steps = {shares}"
            )
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of checkpoint_every {self.checkpoint_every}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be fewer than steps {self.steps}")
        return self


class SamplerConfig(FrozenConfig):
    """How images are drawn from a checkpoint."""

    num_steps: int = Field(50, gt=0)
    """Euler steps; time is proportional to them."""
    guidance_scale: float = Field(6.0, ge=0)
    """s in u + s * (c - u); 1 omits the unconditional branch and halves the cost."""
    time_shift: float = Field(1.0, gt=0)
    """Static shift of the scheduler; as in training unless a comparison asks otherwise."""
    gate_shift: bool = False
    """Eq. 11: give the gates a time ahead of the nominal one."""
    batch_size: int = Field(16, gt=0)
    """Images per batch. Rounding depends on it, so it is part of a result's identity."""


class CheckpointConfig(FrozenConfig):
    """Configuration of the stage `checkpoint`: one strategy, trained."""

    strategy: Strategy
    model: ModelConfig
    training: TrainingConfig
    text_encoder: ModelRef
    """Encodes the unconditional text, and captions where no text features are stored; fuse_dit shares its layers."""
    template_version: str = Field(min_length=1)
    """Version of the text template around captions; stored text features must have the same."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        check_gate_signal(self.model, self.strategy)
        return self


class PipelineExportConfig(FrozenConfig):
    """Configuration of the stage `pipeline_export`: the other parts of a diffusers pipeline."""

    text_encoder: ModelRef
    autoencoder: ModelRef
    sampler: SamplerConfig
    """Default steps, guidance and schedule of a call."""
    save_text_encoder: bool = False
    """Save the text encoder in the folder, once per strategy. Otherwise the folder names it, and the pipeline loads it
    at its first call."""


def check_gate_signal(model: ModelConfig, strategy: Strategy) -> None:
    """Raise ValueError where an estimated gate time is configured for a strategy without gates."""
    if model.gate_signal == "estimated" and not strategy.has_time_gate:
        raise ValueError(
            f"{strategy}: gate_signal = estimated needs a time gate (time_wise or joint); set it to nominal, or "
            "omit the strategy"
        )


def demo_model(**changes: Any) -> ModelConfig:
    """A backbone that a laptop's CPU trains in under a minute per arm, on SmolLM2-135M and 32 x 32 x 16 latents.

    Key and value heads are the encoder's, which fuse_dit asks for. Patches of 4 make 64 image tokens of 256 values;
    the hidden size is not below those 256, or noise could not pass through to be taken away. Blocks share decoder
    layers 6, 14 and 22 in fuse_dit.
    """
    return ModelConfig(
        **{
            "hidden_size": 256,
            "num_blocks": 3,
            "num_heads": 3,
            "num_kv_heads": 3,
            "head_dim": 64,
            "mlp_width": 512,
            "patch_size": 4,
            "residual_scale": 0.3,
            "text_width": 576,
            "num_text_layers": 30,
            "fuse_first_layer": 6,
            "fuse_layer_stride": 8,
            "gate_width": 128,
            **changes,
        }
    )


def demo_training(**changes: Any) -> TrainingConfig:
    """Training of `demo_model`: many small steps, a high learning rate that decays to zero, SD3's shift towards noise.

    Measured with depth_wise on 550 scenes, 81 s of CPU time on a busy core: background and object colours come out
    right, shapes do not. Mean loss of the last 25 steps: 250 steps at 2e-3 1.09, at 3.5e-3 1.04; 450 steps at 3e-3
    0.94. With the shift (0.91, another mix of times) colours are cleaner and flat areas less noisy.
    """
    return TrainingConfig(
        **{
            "steps": 450,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 20,
            "schedule": "cosine",
            "betas": (0.9, 0.95),
            "ema_decay": 0.98,
            "text_dtype": "float16",
            "time_shift": 3.0,
            "validate_every": 225,
            "num_validation_samples": 24,
            "checkpoint_every": 90,
            "threads": 2,
            "log_every": 5,
            **changes,
        }
    )


def demo_sampler(**changes: Any) -> SamplerConfig:
    """Sampling of `demo_model`, with the shift of its training; guidance 6 reddens warm backgrounds, 3 does not."""
    return SamplerConfig(**{"num_steps": 12, "guidance_scale": 3.0, "time_shift": 3.0, "batch_size": 16, **changes})
