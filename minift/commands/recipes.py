"""Recipes: named values for the flags of both scripts.

A recipe is chosen by `--recipe`. `tiny` also holds when neither `--model` nor `--data` is given. Nothing of a recipe is
used otherwise: with a model or data of the user's own and no `--recipe`, every value is the default or a flag.
"""

from typing import Any

# fmt: off
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        # Minutes on two CPU cores, with the model and data in data/.
        "tiny": {
            "model": "data/model", "data": "data/instructions.jsonl", "eval_data": "data/heldout.jsonl",
            "out": "runs/sft", "max_length": 256, "max_steps": 2600, "batch_size": 8,
            "lr": 1e-3, "warmup_steps": 40, "dropout": 0.0, "eval_every": 650, "bleu_samples": 402, "run_checks": True,
        },
        # The course lab's run. lr: the default of the trl version that the lab used. Evaluated and saved once an epoch:
        # 7,811 rows in batches of two.
        "course": {
            "model": "facebook/opt-350m", "data": "sahil2801/CodeAlpaca-20k", "no_input_only": True,
            "eval_fraction": 0.2, "out": "runs/sft-course", "template": "course", "max_length": 1024,
            "epochs": 10, "batch_size": 2, "lr": 5e-5, "eval_every": 3906, "save_every": 3906,
            "lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.1, "lora_targets": ("q_proj", "v_proj"),
        },
    },
    "rm": {
        "tiny": {
            "model": "data/model", "data": "data/pairs.jsonl", "eval_data": "data/heldout_pairs.jsonl",
            "out": "runs/rm", "max_length": 256, "max_steps": 800, "batch_size": 10,
            "center_rewards": 0.01, "group_prompts": True, "lm_weight": 0.03,
            "lr": 1.2e-3, "warmup_steps": 20, "dropout": 0.0,
        },
        # The course lab's run, except for the model: the lab's is gpt2. Evaluated and saved once an epoch: 26,514 of
        # the 33,143 pairs, 3 x 8 at a time.
        "course": {
            "model": "facebook/opt-350m", "data": "Dahoas/synthetic-instruct-gptj-pairwise",
            "eval_fraction": 0.2, "out": "runs/rm-course", "template": "dialogue", "max_length": 512,
            "epochs": 3, "batch_size": 3, "grad_accum": 8, "lr": 1.41e-5, "eval_every": 1105, "save_every": 1105,
            "lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.1, "lora_targets": ("q_proj", "v_proj"),
        },
    },
}
# fmt: on

# Values of a recipe that are ignored if a flag is given. data, eval_data: they describe the recipe's own data, and the
# checks of a user's rows are run only if a flag says so. shuffle_labels: they use which side was chosen. epochs and
# eval_fraction: they contradict the flag.
DROPPED_BY = {
    "data": ("eval_data", "no_input_only", "group_prompts", "run_checks"),
    "shuffle_labels": ("group_prompts", "lm_weight"),
    "epochs": ("max_steps",),
    "eval_data": ("run_checks",),
    "eval_fraction": ("eval_data", "run_checks"),
}
