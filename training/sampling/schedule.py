"""The only module where the paper's flow time meets diffusers: sigma = 1 - t, scheduler timestep = 1000 * sigma.

Everywhere else t = 0 is noise and t = 1 is data. The scheduler integrates d x / d sigma = noise - data, which is the
negative velocity.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

NUM_TRAIN_TIMESTEPS = 1000


def build_scheduler(num_steps: int, shift: float) -> "FlowMatchEulerDiscreteScheduler":
    """Return diffusers' Euler scheduler, set to `num_steps` steps from noise to data."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError for a scheduler that does not do flow matching with `NUM_TRAIN_TIMESTEPS`."""
    name, config = type(scheduler).__name__, scheduler.config
    is_flow_matching = any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__)
    if not is_flow_matching and not (
        config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    ):
        raise ValueError(
            f"{name} is not set to flow matching, which the model was trained with; use one of diffusers' FlowMatch "
            "schedulers, or build it with prediction_type='flow_prediction', use_flow_sigmas=True and flow_shift"
        )
    if config.get("num_train_timesteps") != NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{name} has num_train_timesteps {config.get('num_train_timesteps')}; build it with {NUM_TRAIN_TIMESTEPS}"
        )


def flow_time(timestep: Tensor) -> Tensor:
    """Return t of a scheduler timestep."""
    return 1 - timestep / NUM_TRAIN_TIMESTEPS


def euler_step(scheduler: "FlowMatchEulerDiscreteScheduler", x_t: Tensor, velocity: Tensor, timestep: Tensor) -> Tensor:
    """Return x at the scheduler's next, less noisy time."""
    step: Any = scheduler.step  # its annotations demand FloatTensor, which a type checker accepts no tensor as
    return step(-velocity, timestep, x_t, return_dict=False)[0]
