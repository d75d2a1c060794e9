"""What forked processes find in memory: imported and computed once, in the process that they are forked from."""

from importlib import import_module

from transformers import conversion_mapping

for name in (
    "datasets",
    "matplotlib.figure",
    "peft.tuners.lora.bnb",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "trl.trainer.dpo_trainer",
    "common.distillation.teacher_cache",
    "common.export.model_card",
    "common.generation.generate",
    "common.generation.json_grammar",
    "common.models.lora_inference",
    "common.models.packed_weights",
    "common.tasks.idp.readers",
    "common.tasks.ranking.torch_ranker",
    "common.training.dpo",
    "common.training.quantization_aware",
    "distill_train",
    "dpo_train",
    "kd_train",
    "sft_train",
    "support.served",
):
    import_module(name)

conversion_mapping.get_checkpoint_conversion_mapping("qwen2")  # a thousand regular expressions, at each first load
