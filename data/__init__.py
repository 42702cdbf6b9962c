"""Text in, rows out: sources -> tokenizer -> mixture/pack or sft -> loader; tasks are what a fine-tune is judged on."""
