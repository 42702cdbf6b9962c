"""Tokenizers: text to ids and back, and chats by the template of a Hugging Face tokenizer."""
