"""Text in, rows out: sources, tokenizer, mixture and pack (pretraining) or sft (fine-tuning), loader. Tasks judge."""
