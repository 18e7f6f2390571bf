"""GanLM: pre-training with three losses, fine-tuning to generate and to understand.

small       python -m train --config configs/ganlm.py --workdir runs/ganlm
            docstrings of installed packages, encoder 2 x 128, generator 2, discriminator 1 layer:
            ten minutes of a core, 6.28 bits a target (unigram entropy 8.23), denoising 6.42,
            detection accuracy .955 (always "replaced": .955).
summaries   python -m train --config configs/ganlm.py:summaries --workdir runs/summaries
                --config.init_from=runs/ganlm
            the first sentence of a docstring from the rest (strategy "generator"); `both` trains
            the three passes with label smoothing instead; `reversal` is a toy task with exact
            answers, short docstring sentences written backwards.
functions   python -m train --config configs/ganlm.py:functions --workdir runs/functions
            the three losses on functions of Python's library, which are easier to complete: eight
            minutes of a core, detection accuracy .926 (always "replaced": .923).
messages    python -m train --config configs/ganlm.py:messages --workdir runs/messages
            the three losses on English and German messages of installed programs; `translation`
            with --config.init_from=runs/messages translates them. To French:
            --config.data.options.language=fr, then --config.data.options.target_lang=fr.
pairs       python -m train --config configs/ganlm.py:pairs --workdir runs/pairs
                --config.init_from=runs/ganlm --config.init_skip=classification_heads
            do two sentences follow each other in one docstring? (strategy "discriminator")
paper       python -m train --config configs/ganlm.py:paper --workdir DIR
                --config.data.options.path=SHARDS
            GanLM-m large as its launch log has it: 500,000 updates of 8192 x 512 tokens.
paper_base  the English base model (its learning rate is inferred, 3e-4).
xsum        fine-tuning on binarized pairs as the XSum script; xnli: as the XNLI script.

See docs/systems/ganlm.md for what these reach and how long they take.
"""

from train.data.fairseq_files import dictionary_size, mask_id
from train.defaults import default_config

PRESETS = (
    "small",
    "summaries",
    "both",
    "reversal",
    "functions",
    "messages",
    "translation",
    "pairs",
    "paper",
    "paper_base",
    "xsum",
    "xnli",
)
PIECES = 2000
# XLM-R's dictionary, which the multilingual models share. The English dictionary's size is not
# published; set model_args.vocab_size and task_args.mask_id to those of dict_en.txt.
XLMR_PIECES, ENGLISH_PIECES = 249997, 64000


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/ganlm.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.optimizer.name = "adam"
    config.optimizer.args = {"b1": 0.9, "b2": 0.98, "eps": 1e-8}
    # fairseq's Adam decays weights beside the gradient, all of them.
    config.optimizer.update(weight_decay=0.05, decoupled=True, decay_mask="all")
    if preset in ("paper", "paper_base"):
        _paper(config, preset)
    elif preset in ("xsum", "xnli"):
        _paper_fine_tuning(config, preset)
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    size = dictionary_size(PIECES)
    config.model = "language.ganlm"
    config.model_args = {
        "vocab_size": size,
        "embed_dim": 128,
        "encoder_ffn_embed_dim": 512,
        "decoder_ffn_embed_dim": 512,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layers": 2,
        "generator_decoder_layers": 2,
        "discriminator_decoder_layers": 1,
        "max_source_positions": 128,
        "max_target_positions": 128,
        # Smaller than its data: nothing to drop out.
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "scan_unroll": 2,
    }
    config.data.options = {"pieces": PIECES, "vocab_size": size}
    config.batch_size, config.eval.batch_size = 32, 64
    config.log_every = 50
    if preset in ("small", "functions", "messages"):
        config.task = "ganlm_pretraining"
        config.task_args = {"mask_id": mask_id(PIECES)}
        corpus = "docstrings" if preset == "small" else preset
        config.data.name = f"documents:{corpus}"
        config.steps = 1000
        config.optimizer.clip_norm = 1.0
        config.schedule.update(
            name="polynomial", peak=2e-3, end=0.0, warmup_steps=100, warmup_inside=False
        )
        config.eval.every = config.checkpoint.every = 500
        return
    config.steps = 300
    config.schedule.update(name="inverse_sqrt", peak=1e-3, warmup_steps=50)
    config.eval.every = config.checkpoint.every = 150
    if preset == "pairs":
        config.task = "ganlm_understanding"
        config.data.name = "sentence_pairs:docstrings"
        config.model_args.update(initialization_strategy="discriminator", num_classes=2)
        return
    config.task = "ganlm_generation"
    config.data.name = "fairseq_pairs:docstring_summaries"
    config.model_args.initialization_strategy = "generator"
    search = {"beam_size": 4, "max_len_b": 30, "min_len": 1, "no_repeat_ngram_size": 3}
    config.task_args = {"label_smoothing": 0.1, "search": search, "decoded": 128}
    if preset == "both":
        config.model_args.initialization_strategy = "both"
        config.task_args.update(mask_id=mask_id(PIECES), discriminator_weight=5.0)
    if preset == "reversal":
        config.data.name = "fairseq_pairs:reversed_docstrings"
        config.task_args.search.update(no_repeat_ngram_size=0, max_len_b=12)
    if preset == "translation":
        config.data.name = "fairseq_pairs:messages"
        config.task_args.search.update(no_repeat_ngram_size=0, max_len_b=60)


def _paper(config, preset):
    large = preset == "paper"
    pieces = XLMR_PIECES if large else ENGLISH_PIECES
    config.model = "language.ganlm:ganlm_large" if large else "language.ganlm:ganlm_base"
    config.model_args = {
        "vocab_size": dictionary_size(pieces),
        "max_source_positions": 1024 if large else 512,
        "max_target_positions": 1024 if large else 512,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "remat": True,
    }
    config.task = "ganlm_pretraining"
    config.task_args = {
        "mask_id": mask_id(pieces),
        "discriminator_weight": 10.0,
        "inconsistency_weight": 1.0,
    }
    config.data.name = "documents"
    config.data.options = {"max_tokens": 512, "vocab_size": dictionary_size(pieces), "workers": 8}
    config.steps, config.batch_size = 500_000, 8192
    config.optimizer.clip_norm = 1.0
    config.optimizer.accumulate = 32
    peak = 2.5e-4 if large else 3e-4
    config.schedule.update(
        name="polynomial", peak=peak, end=0.0, warmup_steps=10_000, warmup_inside=False
    )
    config.parallel.update(data=1, fsdp=-1)
    config.precision = "bfloat16"
    config.log_every = 100
    config.eval.update(every=10_000, batch_size=1024)
    config.checkpoint.every = 5_000


def _paper_fine_tuning(config, preset):
    config.model = "language.ganlm:ganlm_base"
    config.precision = "bfloat16"
    config.log_every, config.eval.every, config.checkpoint.every = 50, 1000, 1000
    if preset == "xsum":
        size = dictionary_size(ENGLISH_PIECES)
        config.model_args = {
            "vocab_size": size,
            "initialization_strategy": "both",
            "max_source_positions": 720,
            "max_target_positions": 512,
            "resize_checkpoint": True,
        }
        config.task = "ganlm_generation"
        config.task_args = {
            "mask_id": mask_id(ENGLISH_PIECES),
            "label_smoothing": 0.1,
            "discriminator_weight": 5.0,
            "decoded": 1024,
            "search": {
                "beam_size": 6,
                "len_penalty": 1.0,
                "max_len_b": 60,
                "min_len": 10,
                "no_repeat_ngram_size": 3,
            },
        }
        config.data.name = "fairseq_pairs"
        config.data.options = {"max_source": 720, "max_target": 48, "vocab_size": size}
        # 4096 tokens a device, eight devices: some 64 pairs; 10 epochs of 204,045.
        config.batch_size = 64
        config.steps = 10 * 204_045 // 64
        config.schedule.update(name="inverse_sqrt", peak=1e-4, warmup_steps=1000)
    else:
        size = dictionary_size(XLMR_PIECES)
        config.model_args = {
            "vocab_size": size,
            "initialization_strategy": "discriminator",
            "num_classes": 3,
            "pooler_dropout": 0.1,
            "resize_checkpoint": True,
        }
        config.task = "ganlm_understanding"
        config.data.name = "sentence_pairs:xnli"
        config.data.options = {"max_tokens": 512, "vocab_size": size}
        config.optimizer.weight_decay = 0.1
        config.optimizer.accumulate = 8
        config.batch_size = 128
        # 4 epochs of 15 languages, 392,702 pairs each.
        config.steps = 4 * 15 * 392_702 // 128
        config.schedule.update(name="inverse_sqrt", peak=3e-5, warmup_steps=1000)
