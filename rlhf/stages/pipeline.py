"""The three stages in order, each one's model feeding the next."""

import dataclasses

from rlhf.config import PipelineRun, PPORun, RewardRun
from rlhf.data.dataset import texts
from rlhf.data.schema import DEMONSTRATIONS, PREFERENCES, PROMPTS
from rlhf.io.progress import console
from rlhf.stages.ppo import run_ppo
from rlhf.stages.reward import run_reward
from rlhf.stages.rewards import check_source
from rlhf.stages.run import StageResult
from rlhf.stages.sft import run_sft

STAGES = ("sft", "reward", "ppo")


def run_pipeline(config: PipelineRun) -> dict[str, StageResult]:
    """Run SFT, reward model and PPO from `config.start_at` on; each reads what the one before left in the output folder.

    All data files are read through and all reward functions imported before anything is trained. With
    `config.resume`, finished stages are passed over and the interrupted one continues from its last checkpoint.

    Raises:
        UserError, NonFiniteError, Interrupted: see `rlhf.stages.run`.
    """
    files = (
        (config.sft_data, DEMONSTRATIONS),
        (config.sft_val_data, DEMONSTRATIONS),
        (config.preference_data, PREFERENCES),
        (config.preference_val_data, PREFERENCES),
        (config.prompt_data, PROMPTS),
    )
    for path, schema in files:
        if path is not None:
            for _ in texts(path, schema):
                pass
    for spec in config.ppo.reward:
        check_source(spec)
    runs = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
    return {stage: runs[stage](config) for stage in STAGES[STAGES.index(config.start_at) :]}


def run_with_earlier_stages(config: RewardRun | PPORun) -> StageResult:
    """Run the reward or the PPO stage; on the embedded example, train first what it needs and nobody has trained.

    So `rlhf-train ppo` works as typed. As soon as a data file, a model or a reward is named, nothing is made up.
    """
    settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    output, ppo = config.output_dir, config.ppo if isinstance(config, PPORun) else None
    if ppo is None:
        bare = config.preference_data is None and config.reward.model_path is None
    else:
        bare = config.prompt_data is None and ppo.model_path is None
    if bare and not (output / "sft").is_dir():
        console.print(f"{output / 'sft'}: no SFT model yet; training one on the embedded example first")
        run_sft(PipelineRun(**settings))
    if bare and ppo is not None and not ppo.reward and not (output / "reward").is_dir():
        console.print(f"{output / 'reward'}: no reward model yet; training one on the embedded example first")
        run_reward(PipelineRun(**settings))
    return run_reward(config) if isinstance(config, RewardRun) else run_ppo(config)
