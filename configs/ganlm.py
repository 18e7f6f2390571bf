"""GanLM: pre-training on docstrings, fine-tuning to summarize and to judge pairs; the recipes.

small       python -m train --config configs/ganlm.py --workdir runs/ganlm
"""

from train.data.fairseq_files import dictionary_size, mask_id
from train.defaults import default_config

PRESETS = ("small",)
PIECES = 4000


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/ganlm.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.model = "language.ganlm"
    config.model_args = {
        "vocab_size": dictionary_size(PIECES),
        "embed_dim": 128,
        "encoder_ffn_embed_dim": 512,
        "decoder_ffn_embed_dim": 512,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layers": 2,
        "generator_decoder_layers": 2,
        "discriminator_decoder_layers": 1,
        "max_source_positions": 128,
        "max_target_positions": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    config.task = "ganlm_pretraining"
    config.task_args = {"mask_id": mask_id(PIECES)}
    config.data.name = "documents:docstrings"
    config.steps, config.batch_size = 800, 32
    config.optimizer.name = "adam"
    config.optimizer.args = {"b1": 0.9, "b2": 0.98, "eps": 1e-8}
    config.optimizer.weight_decay, config.optimizer.decoupled = 0.05, True
    config.optimizer.decay_mask = "all"
    config.optimizer.clip_norm = 1.0
    config.schedule.update(
        name="polynomial", peak=2e-3, end=0.0, warmup_steps=80, warmup_inside=False
    )
    config.eval.batch_size = 64
    config.log_every = 50
    config.eval.every = 400
    return config
