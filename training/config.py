"""Configuration of models, training and sampling, and the names of strategies and arms. Imports nothing heavy."""

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
        """Whether the conditioning depends on the flow time."""
        return self in (Strategy.TIME_WISE, Strategy.JOINT)

    @property
    def varies_with_block(self) -> bool:
        """Whether blocks differ in their fused text."""
        return self in (Strategy.DEPTH_WISE, Strategy.JOINT)


SHIFT_SUFFIX = "+shift"


class Arm(FrozenConfig):
    """A strategy as evaluated: the same checkpoint can be sampled with or without the shift of Eq. 11."""

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
            raise ValueError(f"arm {name!r}: no such strategy; known: {known}")
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
    """Key and value heads; fuse_dit needs as many as the text encoder has."""
    head_dim: int = Field(128, gt=0, multiple_of=4)
    """A multiple of 4, because rotary positions halve it twice; fuse_dit needs that of the text encoder."""
    mlp_width: int = Field(8192, gt=0)
    patch_size: int = Field(2, gt=0)
    latent_channels: int = Field(16, gt=0)
    latent_size: int = Field(32, gt=0)
    """Height and width of the latents that sampling starts from: 32 is 256 px behind an f8 autoencoder."""
    text_width: int = Field(2560, gt=0)
    num_text_layers: int = Field(36, gt=1)
    """Layers of text features, L: hidden_states[1..L] of the encoder, the embedding output left out."""
    norm_eps: float = Field(1e-6, gt=0)
    residual_scale: float = Field(1.0, gt=0)
    """Factor on the starting values of what blocks add to the residual stream. 1 as released; short runs learn faster
    from smaller ones, because noise then passes through undisturbed."""
    rope_theta: float = Field(10_000.0, gt=1)
    """One base for every strategy. The released code has three, which makes its arms differ in more than fusion."""
    timestep_conditioning: Literal["none", "adaln"] = "none"
    """`none` is the paper's backbone: t reaches the network through the gates alone. `adaln` adds adaLN-single."""
    gate_time_scale: float = Field(1.0, gt=0)
    """Factor on t before the sinusoids of Eq. 12: 1 as printed, where most frequencies hardly move; 1000 spreads."""
    gate_signal: Literal["nominal", "estimated"] = "nominal"
    """Time that gates see: the schedule's, as in the paper, or one that a small head reads off the noisy latents.
    `estimated` is for time_wise and joint alone; in sampling it makes keys and values anew for each image and step."""
    gate_embedding_size: int = Field(128, gt=0, multiple_of=2)
    gate_width: int = Field(512, gt=0)
    fuse_first_layer: int = Field(6, ge=1)
    """fuse_dit: decoder layer (from 0) whose keys and values block 0 shares; the layers before run alone."""
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
    """How a checkpoint is trained. What is an execution field moves rounding at most, never samples or noise."""

    steps: int = Field(500_000, gt=0)
    batch_size: int = Field(512, gt=0)
    """Samples per optimizer step over all processes and accumulation steps."""
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: constant as in the paper, or falling to zero at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    """On matrices alone; norms, biases and fusion logits have none."""
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Per step, in fp32; rises from 0.1 as (1 + step) / (10 + step) so that short runs forget their start."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast over fp32 weights."""
    text_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which prepared text features are kept. Normalised values fit float16 with 2^-11 relative error."""
    seed: int = Field(0, ge=0)
    """Of initial weights, order, noise, times and prompt drop."""
    prompt_drop: float = Field(0.1, ge=0, lt=1)
    """Share of samples that see the unconditional text."""
    prompt_drop_form: PromptDropForm = "instruction"
    """The unconditional text, here and in sampling: `instruction` is the template around no caption, as released;
    `empty` no text at all (one start or end token), as in the paper. The same where the template is the caption."""
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    """Logit-normal sampling: t = sigmoid(time_mean + time_std * N(0, 1))."""
    time_shift: float = Field(1.0, gt=0)
    """Static shift of the noise schedule; above 1 it trains more on noisy times. 1 leaves it alone."""
    validate_every: int = Field(1000, gt=0)
    """Steps between validation losses on the held-out split; there is one after the last step too."""
    num_validation_samples: int = Field(512, ge=0)
    on_bad_step: Literal["stop", "skip"] = "stop"
    """Where a loss or the gradient norm is not finite, or the loss jumps: stop, or leave the step out. A step left out
    moves neither weights nor optimizer nor average; what it read is in the ledger, why it was left out in metrics."""
    max_loss_jump: float | None = Field(None, gt=1)
    """Loss of a step over the median loss of the last `loss_jump_window` steps from which on it is a bad step. None:
    no loss is too high. The first steps of a run, up to that number, are never judged."""
    loss_jump_window: int = Field(100, ge=1)
    max_bad_steps_in_row: int = Field(10, ge=1)
    """Steps left out one after the other that stop the run."""
    max_shard_bytes: int = Field(5_000_000_000, gt=0)
    """Largest file of weights; what is more goes into several, beside an index. Snapshots are split likewise."""
    accumulation_steps: int = execution_field(1, ge=1)
    checkpoint_every: int = execution_field(5000, gt=0)
    """Steps between scratch checkpoints: what a kill can cost."""
    keep_checkpoints: int = execution_field(2, ge=1)
    """Scratch checkpoints that stay, the newest; they go when the run is finished."""
    keep_every: int | None = execution_field(None, gt=0)
    """Scratch checkpoints after each multiple of so many steps stay too while the run is under way, for going back
    further than the newest; they go with the others when it is finished. A multiple of checkpoint_every."""
    checkpoint_activations: bool = execution_field(False)
    """Compute each block's activations again in the backward pass: less memory, about a third more time."""
    compile: bool = execution_field(False)
    """Compile the blocks (torch.compile; on a CPU that needs a C++ compiler)."""
    sharded: bool = execution_field(False)
    """Shard parameters, gradients, optimizer state and moving average over the processes (FSDP2)."""
    num_processes: int = execution_field(1, ge=1)
    """Processes that the launcher starts; batch_size must divide by num_processes * accumulation_steps."""
    threads: int | None = execution_field(None, ge=1)
    """CPU threads of each process; None leaves torch's choice. Results are bit-exact for equal thread counts."""
    device: Literal["cpu", "cuda"] = execution_field("cpu")
    text_memory_bytes: int = execution_field(2 << 30, ge=0)
    """Prepared text features kept in memory, per process; what does not fit is prepared anew each time it is read.
    Where no text features are stored, they are kept on the device that encodes them."""
    log_every: int = execution_field(10, gt=0)
    """Steps between updates of the loss on the progress line, and of the curves for TensorBoard."""
    peak_flops: float | None = execution_field(None, gt=0)
    """Operations per second that the device of one process could do at best, for the share that the model uses of it.
    None: known for common GPUs at bfloat16, else the share is left out."""

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        shares = self.num_processes * self.accumulation_steps
        if self.batch_size % shares:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by num_processes * accumulation_steps = {shares}"
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
    """Euler steps; time grows in proportion."""
    guidance_scale: float = Field(6.0, ge=0)
    """s in u + s * (c - u); 1 leaves the unconditional branch out and halves the cost."""
    time_shift: float = Field(1.0, gt=0)
    """Static shift of the scheduler; as in training unless a comparison asks otherwise."""
    gate_shift: bool = False
    """Eq. 11: feed the gate a time that runs ahead of the nominal one."""
    batch_size: int = Field(16, gt=0)
    """Images per batch. Rounding depends on it, so it is part of a result's identity."""


class CheckpointConfig(FrozenConfig):
    """Configuration of the stage `checkpoint`: one strategy, trained."""

    strategy: Strategy
    model: ModelConfig
    training: TrainingConfig
    text_encoder: ModelRef
    """Encodes the unconditional text (and captions where no text features are cached); fuse_dit shares its layers."""
    template_version: str = Field(min_length=1)
    """Version of the text template around captions; cached text features must have been made with the same."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        check_gate_signal(self.model, self.strategy)
        return self


class PipelineExportConfig(FrozenConfig):
    """Configuration of the stage `pipeline_export`: what a checkpoint needs beside it to be a diffusers pipeline."""

    text_encoder: ModelRef
    autoencoder: ModelRef
    sampler: SamplerConfig
    """Steps, guidance and schedule of a call that names none."""
    save_text_encoder: bool = False
    """Whether the encoder lies in the folder, which costs its size again for every strategy. Otherwise it is named, and
    loaded when the pipeline is first called."""


def check_gate_signal(model: ModelConfig, strategy: Strategy) -> None:
    """Raise ValueError where gates are to follow an estimated time and there are none."""
    if model.gate_signal == "estimated" and not strategy.has_time_gate:
        raise ValueError(
            f"{strategy}: gate_signal = estimated needs a time gate (time_wise or joint); leave it nominal, or the "
            "strategy out"
        )


def demo_model(**changes: Any) -> ModelConfig:
    """A backbone that a laptop's CPU trains in under a minute an arm, on SmolLM2-135M and 32 x 32 x 16 latents.

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
    """Training of `demo_model`: many small steps, a high learning rate that falls to zero, SD3's shift towards noise.

    Tried with depth_wise on 550 drawn scenes, 81 s of CPU time on a busy core: backgrounds and the colours of objects
    come out right, shapes do not. Losses of the last 25 steps: 250 steps at 2e-3 1.09, at 3.5e-3 1.04; 450 steps at
    3e-3 0.94. With the shift (0.91, another mix of times) colours are cleaner and flat areas quieter.
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
    """Sampling of `demo_model`, shifted as its training; a guidance of 6 reddens warm backgrounds, 3 does not."""
    return SamplerConfig(**{"num_steps": 12, "guidance_scale": 3.0, "time_shift": 3.0, "batch_size": 16, **changes})
